"""Turns: the processes that wait for a lock get it in the order in which they came.

Whoever frees a lock and takes it again at once is always there before those whom the kernel has to wake, or who poll.
So who has to wait locks a byte of the lock file, the one behind the last that somebody else has locked, and waits until
no byte before it is locked. Then it waits for the lock itself, and frees its byte with that. Nobody takes the lock
while somebody waits for it like that. And who leaves wakes one only, the next.

The bytes stand far behind all content. Their locks are OFD locks (man 2 fcntl): the kernel keeps them apart from the
flock of the same file, and frees them with the descriptor. They only ever say who comes first; what excludes is the
lock. So where there are none (Linux alone has them), or where somebody does not heed them, nothing is lost but the
order.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

ARE_THERE = sys.platform == "linux"

if sys.platform == "linux":
    import fcntl

    # A file system that takes both kinds of lock for one (NFS) must not take freeing a byte for giving up the lock: of
    # that, these bytes are a part that nobody asks for.
    _FIRST = 1 << 62
    # struct flock: type, whence, start, length (0: without end), pid
    _FLOCK = struct.Struct("hhqqi4x")

    def has_waiters(fd: int) -> bool:
        """Whether somebody else waits for the lock of a file."""
        try:
            return _taken(fd, _FIRST) is not None
        except OSError:
            return False

    def head(fd: int) -> int | None:
        """The byte of who waits first, but for ourselves; None if nobody does, or if that cannot be known."""
        try:
            first = _taken(fd, _FIRST)
            while first is not None and first > _FIRST and (before := _taken(fd, _FIRST, first - _FIRST)) is not None:
                first = before
        except OSError:
            return None
        return first

    def queue_up(fd: int) -> int:
        """Wait until all who came before have had the lock of a file, or have given up; return the byte that stands for
        it.
        """
        place = _take_last(fd)
        before = place - 1 if place > _FIRST else None
        while before is not None:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _flock(fcntl.F_RDLCK, before))
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, before))
            # Where that one has given up, there may be others before it.
            before = _taken(fd, _FIRST, place - _FIRST)
        return place

    def lock(fd: int, place: int) -> None:
        """Wait for the lock of a file, and make way for the next with that."""
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, place))

    def _take_last(fd: int) -> int:
        """Lock the byte behind the last that is locked."""
        place = _FIRST
        while True:
            while (taken := _taken(fd, place)) is not None:
                place = taken + 1
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, place))
            except OSError as error:
                # Somebody else has been quicker.
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            else:
                return place

    def _taken(fd: int, start: int, length: int = 0) -> int | None:
        """A byte that somebody else has locked; None if there is none."""
        kind, _, start, *_ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length)))
        return None if kind == fcntl.F_UNLCK else start

    def _flock(kind: int, start: int, length: int = 1) -> bytes:
        return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)

else:

    def has_waiters(fd: int) -> bool:
        """Nobody waits like that here."""
        return False

    def head(fd: int) -> int | None:
        """Not called."""
        raise NotImplementedError

    def queue_up(fd: int) -> int:
        """Not called."""
        raise NotImplementedError

    def lock(fd: int, place: int) -> None:
        """Not called."""
        raise NotImplementedError
