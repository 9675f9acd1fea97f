"""The waking of a thread, by other threads and by finalisers."""

from __future__ import annotations

import contextlib
import threading
from queue import Empty, SimpleQueue

from persist.log import log


class Wake:
    """The call that a thread waits for. A finaliser or a signal handler may make it, wherever it interrupts a thread.

    `queue.SimpleQueue` is made for that. `threading.Event` has a lock, in which such a thread would wait for itself.
    """

    def __init__(self) -> None:
        self._calls = SimpleQueue[None]()

    def set(self) -> None:
        """Let the thread go on."""
        self._calls.put(None)

    def clear(self) -> None:
        """Forget the calls of `set` that came before."""
        with contextlib.suppress(Empty):
            while True:
                self._calls.get_nowait()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a call of `set` that nobody has waited for yet. Tell whether there was one."""
        try:
            self._calls.get(timeout=timeout_s)
        except Empty:
            return False
        return True


def is_started(thread: threading.Thread) -> bool:
    """Start a thread. Tell whether the system had one left."""
    try:
        thread.start()
    except RuntimeError as error:
        log.warning("%s: %s", thread.name, error)
        return False
    return True
