"""Faults: one kernel call of a verb fails, at one place or from there on, and everything around it is real.

The functions of `os` (and `fcntl.flock`) themselves are replaced, for the calling thread only. So no call is missed,
whoever makes it. A failing `close` really closes first, as Linux does. The number is free afterwards, whatever the call
answers.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

#: In the place of an errno: `read`, `pread`, `write` and `pwrite` do a part of what they were asked for.
SHORT = 0
#: The disk fills up in the middle of a write: a part of it is done, and the next call is refused.
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
    # Not EACCES, because from `flock` it means that another process holds the lock.
    "flock": (*_EVERYWHERE, errno.ENOLCK),
    # The disk is gone: from one call on, each call that would reach the disk fails, whatever it is.
    "any": (errno.EIO,),
}
#: The calls that make data durable. When one of them fails, the later calls of the other are counted.
SYNCS = ("fsync", "fdatasync")
_REACHES_THE_DISK = tuple(name for name in ERRORS if name not in ("close", "lseek", "flock", "any"))


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of the `place`-th call of a kernel function, counted from 1.

    If the fault is persistent, every later call fails, too.
    """

    call: str
    place: int
    errno: int
    is_persistent: bool

    @property
    def functions(self) -> tuple[str, ...]:
        return _REACHES_THE_DISK if self.call == "any" else (self.call,)

    @property
    def watched(self) -> tuple[str, ...]:
        """The functions that do not fail, but whose calls are counted."""
        return tuple(name for name in SYNCS if self.call in SYNCS and name != self.call)

    def __str__(self) -> str:
        answer = {SHORT: "SHORT", TORN: "TORN"}.get(self.errno) or errno.errorcode[self.errno]
        return f"{self.call} {self.place}{'+' if self.is_persistent else ''} {answer}"


def faults(call: str, place: int) -> list[Fault]:
    """Return every fault of one call at one place."""
    kinds = (True,) if call == "any" else (False, True)
    return [Fault(call, place, error, is_persistent) for error in ERRORS[call] for is_persistent in kinds]


@dataclass(frozen=True, slots=True)
class FullDisk:
    """A disk that has room for so many bytes more. A new file or directory takes one of them.

    A removed file makes no room, but bytes that are cut off a file do. To write over bytes takes no room.
    """

    room_bytes: int
    call: str = "write"
    errno: int = errno.ENOSPC

    @property
    def functions(self) -> tuple[str, ...]:
        return ("open", "mkdir", "write", "pwrite", "ftruncate")

    @property
    def watched(self) -> tuple[str, ...]:
        return ()

    def __str__(self) -> str:
        return f"a disk with room for {self.room_bytes} bytes"


class Injection:
    """A fault at work.

    `hits` counts the calls that it made fail. `passed_since` counts the calls that passed after the last of them.
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


class Filling(Injection):
    """A disk at work that gets full. `hits` counts the calls that it refused or did in part."""

    def __init__(self, fault: FullDisk) -> None:
        super().__init__(Fault("write", 1, errno.ENOSPC, is_persistent=True))
        self._room = fault.room_bytes

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        steps: dict[str, Callable[..., Any]] = {"open": self._open, "mkdir": self._mkdir, "ftruncate": self._cut}
        one: Callable[..., Any] = steps.get(real.__name__, self._write)

        def bounded(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != self._thread:
                return real(*arguments, **options)
            return one(real, *arguments, **options)

        return bounded

    def _open(self, real: Callable[..., int], path: Path, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and not os.path.lexists(path):
            self._take(1)
        return real(path, flags, *rest, **options)

    def _mkdir(self, real: Callable[..., None], *arguments: Any, **options: Any) -> None:
        self._take(1)
        real(*arguments, **options)

    def _cut(self, real: Callable[..., None], fd: int, size: int) -> None:
        self._room += max(0, os.fstat(fd).st_size - size)
        real(fd, size)

    def _write(self, real: Callable[..., int], fd: int, content: bytes, position: int | None = None) -> int:
        size = os.fstat(fd).st_size
        start = size if position is None else position
        growth = max(0, start + len(content) - size)
        if growth > self._room:
            self.hits += 1
            content = content[: len(content) - (growth - self._room)]
            growth = self._room
            if not content:
                raise OSError(errno.ENOSPC, f"injected: {os.strerror(errno.ENOSPC)}")
        self._room -= growth
        return real(fd, content, *(() if position is None else (position,)))

    def _take(self, size: int) -> None:
        if size > self._room:
            self.hits += 1
            raise OSError(errno.ENOSPC, f"injected: {os.strerror(errno.ENOSPC)}")
        self._room -= size


@contextmanager
def injecting(fault: Fault | FullDisk) -> Iterator[Injection]:
    """Make one fault happen to this thread for a block."""
    module: ModuleType = fcntl if fault.call == "flock" else os
    real = {name: getattr(module, name) for name in (*fault.functions, *fault.watched)}
    injection = Filling(fault) if isinstance(fault, FullDisk) else Injection(fault)
    for name, function in real.items():
        setattr(module, name, (injection.around if name in fault.functions else injection.watching)(function))
    try:
        yield injection
    finally:
        for name, function in real.items():
            setattr(module, name, function)


# --- one call, by what it does ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A call that changes the disk, or makes it durable.

    Attributes:
        name: the name of the function of `os`.
        path: the file or directory. For a rename, the new name.
        content: the bytes that are written.
        position: the place of a write, if the call names it.
    """

    name: str
    path: Path
    content: bytes = b""
    position: int | None = None


#: Takes a call and the calls before it. Returns the errno that the kernel is to answer, or None.
Refuse = Callable[[Call, list[Call]], int | None]
_CHANGING = ("open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "replace", "unlink")


def refuse_nothing(_call: Call, _before: list[Call]) -> int | None:
    """Refuse no call, only look on."""
    return None


@contextmanager
def refusing(refuse: Refuse = refuse_nothing) -> Iterator[list[Call]]:
    """Make this thread's calls fail for which `refuse` names an errno. Yield all calls, also those that failed."""
    thread, calls = threading.get_ident(), list[Call]()
    real = {name: getattr(os, name) for name in _CHANGING}

    def around(name: str) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == thread and (name != "open" or arguments[1] & os.O_CREAT):
                call = _call_of(name, *arguments)
                answer = refuse(call, calls)
                calls.append(call)
                if answer is not None:
                    raise OSError(answer, f"injected: {os.strerror(answer)}")
            return real[name](*arguments, **options)

        return called

    for name in real:
        setattr(os, name, around(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def _call_of(name: str, *arguments: Any) -> Call:
    if name in ("open", "mkdir", "unlink"):
        return Call(name, Path(arguments[0]))
    if name == "replace":
        return Call(name, Path(arguments[1]))
    path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
    if name in ("write", "pwrite"):
        return Call(name, path, bytes(arguments[1]), arguments[2] if name == "pwrite" else None)
    return Call(name, path)


def descriptors(*, collect: bool = False) -> set[int]:
    """Return the descriptors that this process has open.

    With `collect`, garbage of earlier tests is closed first. The first of two looks needs it if they must be equal,
    because the collector could come between them.
    """
    if collect:
        gc.collect()
    # The answer of listdir() holds the descriptor that it had open itself, which is closed by now.
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@contextmanager
def quick_directory() -> Iterator[Path]:
    """Yield a directory in memory, where there is one.

    The proofs that use it do not depend on a disk, and use it often.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="persist-", dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def make_socket(path: Path) -> None:
    """Make a socket. It is bound by a short, relative name, because the path of a socket is at most 107 bytes long."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)
