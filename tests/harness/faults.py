"""Faults: one kernel call of a verb fails, at one place or from there on, and everything around it is real.

What is replaced are the functions of `os` (and `fcntl.flock`) themselves, for the calling thread only: so no call is
missed, whoever makes it. A failing `close` really closes first, as Linux does: the number is free afterwards, whatever
is answered.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

#: Instead of an errno: `read`, `pread`, `write` and `pwrite` do a part of what they were asked for.
SHORT = 0
#: The disk fills up in the middle of a write: a part of it is done, and what comes next is refused.
TORN = -1

_EVERYWHERE = (errno.EIO, errno.EINTR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES)
#: The kernel calls that can fail, each with the errors that it is made to answer.
ERRORS: dict[str, tuple[int, ...]] = {
    "open": (*_EVERYWHERE, *_FULL, *_REFUSED, errno.EMFILE),
    "write": (*_EVERYWHERE, *_FULL, errno.EROFS, SHORT, TORN),
    "pwrite": (*_EVERYWHERE, *_FULL, errno.EROFS, SHORT, TORN),
    "read": (*_EVERYWHERE, SHORT),
    "pread": (*_EVERYWHERE, SHORT),
    "lseek": (errno.EIO,),
    "ftruncate": (*_EVERYWHERE, errno.EROFS),
    "fsync": (*_EVERYWHERE, *_FULL, errno.EROFS),
    "fdatasync": (*_EVERYWHERE, *_FULL, errno.EROFS),
    "close": (*_EVERYWHERE, *_FULL),
    "replace": (*_EVERYWHERE, *_FULL, *_REFUSED),
    "unlink": (*_EVERYWHERE, *_REFUSED),
    "mkdir": (*_EVERYWHERE, *_FULL, *_REFUSED),
    "listdir": (*_EVERYWHERE, errno.EMFILE, errno.EACCES),
    "fstat": _EVERYWHERE,
    "lstat": (*_EVERYWHERE, errno.EACCES),
    "stat": (*_EVERYWHERE, errno.EACCES),
    # Not EACCES: there it means that somebody else holds the lock.
    "flock": (*_EVERYWHERE, errno.ENOLCK),
    # The disk is gone: from one call on, whatever that is, each that would reach it fails.
    "any": (errno.EIO,),
}
#: What makes something durable: those that pass are counted for each other.
SYNCS = ("fsync", "fdatasync")
_REACHES_THE_DISK = tuple(name for name in ERRORS if name not in ("close", "lseek", "flock", "any"))


@dataclass(frozen=True, slots=True)
class Fault:
    """The `place`-th call of a kernel function fails, counted from 1; if it is persistent, every later one does too."""

    call: str
    place: int
    errno: int
    is_persistent: bool

    @property
    def functions(self) -> tuple[str, ...]:
        return _REACHES_THE_DISK if self.call == "any" else (self.call,)

    @property
    def watched(self) -> tuple[str, ...]:
        """Functions that do not fail, but of which it is of interest whether they are called."""
        return tuple(name for name in SYNCS if self.call in SYNCS and name != self.call)

    def __str__(self) -> str:
        answer = {SHORT: "SHORT", TORN: "TORN"}.get(self.errno) or errno.errorcode[self.errno]
        return f"{self.call} {self.place}{'+' if self.is_persistent else ''} {answer}"


def faults(call: str, place: int) -> list[Fault]:
    """Every fault of one call at one place."""
    kinds = (True,) if call == "any" else (False, True)
    return [Fault(call, place, error, is_persistent) for error in ERRORS[call] for is_persistent in kinds]


class Injection:
    """A fault at work.

    `hits` counts the calls that it made fail, `passed_since` those that passed after the last of them.
    """

    def __init__(self, fault: Fault) -> None:
        self.hits = 0
        self.passed_since = 0
        self._fault = fault
        self._calls = 0
        self._thread = threading.get_ident()

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != self._thread or not self._is_due():
                self.passed_since += 1
                return real(*arguments, **options)
            self.hits, self.passed_since = self.hits + 1, 0
            return self._fail(real, *arguments)

        return faulty

    def watching(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.passed_since += 1
            return real(*arguments, **options)

        return watched

    def _is_due(self) -> bool:
        self._calls += 1
        place = self._fault.place
        last = place + (self._fault.errno == TORN)
        return self._calls >= place if self._fault.is_persistent else place <= self._calls <= last

    def _fail(self, real: Callable[..., Any], *arguments: Any) -> Any:
        fault = self._fault
        if fault.errno == TORN and self.hits > 1:
            raise OSError(errno.ENOSPC, f"injected: {os.strerror(errno.ENOSPC)}")
        if fault.errno in (SHORT, TORN):
            fd, what, *position = arguments
            return real(
                fd, max(1, what // 2) if fault.call in ("read", "pread") else what[: max(1, len(what) // 2)], *position
            )
        if fault.call == "close":
            real(*arguments)
        raise OSError(fault.errno, f"injected: {os.strerror(fault.errno)}")


@contextmanager
def injecting(fault: Fault) -> Iterator[Injection]:
    """Make one fault happen to this thread for a block."""
    module: ModuleType = fcntl if fault.call == "flock" else os
    real = {name: getattr(module, name) for name in (*fault.functions, *fault.watched)}
    injection = Injection(fault)
    for name, function in real.items():
        setattr(module, name, (injection.around if name in fault.functions else injection.watching)(function))
    try:
        yield injection
    finally:
        for name, function in real.items():
            setattr(module, name, function)


def descriptors() -> set[int]:
    """The descriptors that this process has open."""
    # The one that listdir() itself had open is in its answer, and closed by now.
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@contextmanager
def quick_directory() -> Iterator[Path]:
    """A directory in memory, where there is one: what is proved here does not depend on a disk, and is asked often."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="persist-", dir=memory if memory.is_dir() else None) as name:
        yield Path(name)
