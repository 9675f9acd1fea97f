"""The wait for files to grow: its waiters, and the one thread of this process that looks at the files.

A write of this process wakes the waiters at once. For the writes of other processes, one thread looks at the size of
each file that has a waiter, every 10 ms. The thread ends when nobody waits. So a hundred waiters of one file cost one
look at a time, and a server without listeners costs nothing.

The wake functions are called from any thread, also from a signal handler in the middle of another such call. They must
not wait, and they must not take a lock that is not re-entrant.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The pause between two looks at the files.
POLL_S = 0.01

Wake = Callable[[], None]

_waiting: dict[str, tuple[Wake, ...]] = {}
# Re-entrant, because the garbage collector may end a dropped wait in the thread that is inside just now.
_guard = threading.RLock()
_looking: threading.Thread | None = None


@contextmanager
def waking(path: str, wake: Wake) -> Iterator[None]:
    """Call `wake` during a block, whenever any process has appended to a file."""
    try:
        with _guard:
            _waiting[path] = (*_waiting.get(path, ()), wake)
            _look_from_now_on()
        yield
    finally:
        # At the end of the interpreter nobody waits, and a thread that was stopped inside the guard never leaves it.
        if not sys.is_finalizing():
            with _guard:
                # Replaced in one step, because another thread may be about to wake the others. In a forked child the
                # entry is missing.
                _waiting[path] = tuple(each for each in _waiting.get(path, ()) if each is not wake)
                if not _waiting[path]:
                    del _waiting[path]


def wake(path: str) -> None:
    """Wake the waiters of a file, in this process."""
    for each in _waiting.get(path, ()):
        each()


def _look_from_now_on() -> None:
    global _looking  # noqa: PLW0603 - one thread a process
    if _looking is None:
        thread = threading.Thread(target=_look, name="persist-events", daemon=True)
        # The thread waits for the guard, which the caller holds, before it looks for waiters.
        thread.start()
        _looking = thread


def _look() -> None:
    global _looking  # noqa: PLW0603
    sizes: dict[str, int] = {}
    while True:
        time.sleep(POLL_S)
        with _guard:
            paths = list(_waiting)
            if not paths:
                _looking = None
                return
        before, sizes = sizes, {path: _size(path) for path in paths}
        for path, size in sizes.items():
            # Also at the first look, because the file may have grown since its waiter has read it.
            if before.get(path) != size:
                wake(path)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _forget_in_child() -> None:
    global _guard, _looking
    _guard, _looking = threading.RLock(), None
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
