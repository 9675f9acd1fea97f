"""The turnstile: the process that waits next for a lock, so that no process overtakes it for long.

A process that frees a lock and takes it again at once is always there before the processes that poll. So a process that
has to wait takes the turnstile first. The turnstile is one byte of the lock file, locked on the same descriptor. Only
the process in the turnstile polls the lock. While the turnstile is taken, nobody else takes the lock. That lasts 50 ms
at most.

The byte stands far behind all content. Its lock is an OFD lock (man 2 fcntl). The kernel keeps it apart from the flock
of the same file, and frees it with the descriptor. It only ever says which process is next. Only the flock excludes
other processes. So where OFD locks are missing (Linux alone has them), only the order is lost.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

if sys.platform == "linux":
    import fcntl

    # A file system that takes both kinds of lock for one (NFS) must not take the byte for the whole file.
    _BYTE = 1 << 62
    # struct flock: type, whence, start, length, pid
    _FLOCK = struct.Struct("hhqqi4x")
    _TAKE, _LEAVE = (_FLOCK.pack(kind, os.SEEK_SET, _BYTE, 1, 0) for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK))

    def is_taken(fd: int) -> bool:
        """Tell whether another process is in the turnstile."""
        try:
            return bool(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _TAKE))[0] != fcntl.F_UNLCK)
        except OSError:
            return False

    def take(fd: int) -> bool:
        """Enter the turnstile. Tell whether this process is in it."""
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _TAKE)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def leave(fd: int) -> None:
        """Leave the turnstile to the next process."""
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LEAVE)
        except OSError:
            pass  # it is left with the descriptor

else:

    def is_taken(fd: int) -> bool:
        """Return False, because there is no turnstile."""
        return False

    def take(fd: int) -> bool:
        """Return True, so that every process may poll."""
        return True

    def leave(fd: int) -> None:
        """Do nothing, because there is no turnstile."""
