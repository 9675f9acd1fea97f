"""The turnstile: a second lock on a lock file, so that the processes that wait for the first come to their turn.

Whoever frees a lock and takes it again at once is always there before those whom the kernel has to wake, or who poll. So who
has to wait takes the turnstile first, waits in it for the lock, and leaves it then; and nobody takes the lock while somebody
is in the turnstile. Then all take turns, and whoever is greedy stands at the end of the line each time.

It is an OFD lock (man 2 fcntl) of one byte, far behind all content: the kernel keeps it apart from the flock of the same file,
and frees it with the descriptor. It only ever says who comes first; what excludes is the lock. So where there is none (Linux
alone has it), or where somebody does not heed it, nothing is lost but fairness.
"""

from __future__ import annotations

import os
import struct
import sys

IS_THERE = sys.platform == "linux"

if sys.platform == "linux":
    import fcntl

    # struct flock: type, whence, start, length, pid. A file system that takes both kinds of lock for one (NFS) must not
    # take leaving the turnstile for giving up the lock: of that, this byte is a part that nobody asks for.
    def _flock(kind: int) -> bytes:
        return struct.pack("hhqqi4x", kind, os.SEEK_SET, 1 << 62, 1, 0)

    _TAKE, _LEAVE = _flock(fcntl.F_WRLCK), _flock(fcntl.F_UNLCK)
    _NOBODY = struct.pack("h", fcntl.F_UNLCK)

    def is_taken(fd: int) -> bool:
        """Whether somebody else waits in the turnstile for the lock of a file."""
        try:
            return fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _TAKE)[: len(_NOBODY)] != _NOBODY
        except OSError:
            return False

    def enter(fd: int) -> None:
        """Wait until nobody else is in the turnstile."""
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _TAKE)

    def lock(fd: int) -> None:
        """Wait in the turnstile for the lock of a file, and leave it with that."""
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LEAVE)

else:

    def is_taken(fd: int) -> bool:
        """Nobody waits in a turnstile here."""
        return False

    def enter(fd: int) -> None:
        """Not called."""
        raise NotImplementedError

    def lock(fd: int) -> None:
        """Not called."""
        raise NotImplementedError
