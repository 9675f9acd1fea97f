"""The waking of a thread, by other threads, by signal handlers and by finalisers."""

from __future__ import annotations

import contextlib
import threading


class Wake:
    """The call that a thread waits for. Signal handlers and finalisers may make it, wherever they interrupt a thread.

    Inside of a `threading.Event` such a thread would wait for itself.
    """

    def __init__(self) -> None:
        #: Held while there was no call.
        self._silence = threading.Lock()
        self._silence.acquire()

    def set(self) -> None:
        """Let the thread go on. Several calls may count as one."""
        with contextlib.suppress(RuntimeError):
            self._silence.release()

    def clear(self) -> None:
        """Forget the calls of `set` that came before."""
        self._silence.acquire(blocking=False)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a call of `set`, and forget it. Tell whether there was one."""
        return self._silence.acquire(timeout=timeout_s)
