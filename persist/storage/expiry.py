"""Expiry: files that go away some time after they are done with."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from pathlib import Path

from persist.storage import disk

# No timer can wait for centuries.
_LONGEST_WAIT_S = 3600.0


class Expiry:
    """Removes files when their time has come, in a thread that is there only while there is something to remove."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        # Re-entrant, for signal handlers and finalisers.
        self._guard = threading.RLock()
        self._due: dict[Path, tuple[float, disk.Version]] = {}
        self._timer: threading.Timer | None = None
        self._next = math.inf

    def add(self, path: Path, delay_s: float) -> None:
        """Remove a file after some seconds, if it is the same by then: its id may be used again by a stream that lives."""
        if self._pid != os.getpid():
            # A forked child has no such thread; its parent sees to what is there already.
            self._forget()
        due = time.monotonic() + delay_s
        with self._guard:
            self._due[path] = (due, disk.version_of(path))
            if due < self._next:
                self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = min(due for due, _ in self._due.values())
        wait_s = min(max(0.0, self._next - time.monotonic()), _LONGEST_WAIT_S)
        self._timer = threading.Timer(wait_s, self._remove_due)
        self._timer.daemon = True
        # An interpreter that is ending starts no thread; a sweep removes the files.
        with contextlib.suppress(RuntimeError):
            self._timer.start()

    def _remove_due(self) -> None:
        with self._guard:
            now, self._next = time.monotonic(), math.inf
            expired = {path: version for path, (due, version) in self._due.items() if due <= now}
            for path in expired:
                del self._due[path]
            if self._due:
                self._arm()
        for path, version in expired.items():
            with contextlib.suppress(OSError):
                if disk.version_of(path) == version:
                    disk.unlink(path)
