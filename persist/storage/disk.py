"""All access to the disk: one function per step of a protocol, so that faults have one seam.

Rules kept here:

- Nothing is opened through a symbolic link.
- Only plain files are opened, and a FIFO cannot block the opener.
- Writes loop until all is written.
- A file is synced with the call that the platform needs (macOS: F_FULLFSYNC).

Other modules call these functions as ``disk.name(...)``, so a test can replace one of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from persist.errors import unsafe

if sys.platform == "darwin":
    import fcntl

#: The paths of a session are strings, because a `Path` costs as much as the system call that it is for.
StrPath = str | Path

_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) if os.name == "posix" else 0
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
# Windows refuses to replace a file that somebody has open (hermes-webui #5196). Readers are quick, so try again.
REPLACE_ATTEMPTS = 50 if os.name == "nt" else 1
REPLACE_PAUSE_S = 0.02

_WRITE_CHUNK = 64 * 1024 * 1024


#: The mode of a file that its owner alone may use.
PRIVATE = 0o600
_GROUP = 0o070
#: For so long a file or a directory may be there that another user has made, and not shared yet.
_SHARING_S, _SHARING_PAUSE_S = 0.1, 0.001


def directory_mode(file_mode: int) -> int:
    """Return the mode of a directory for files of a mode. If a group shares them, they get the directory's group."""
    group = file_mode & _GROUP
    return 0o2700 | group | 0o010 if group else 0o700


def open_plain(path: StrPath, flags: int, mode: int = PRIVATE) -> int:
    """Open a plain file, and give it `mode` if it is created. Raise `Unreadable` for anything else of that name."""
    return open_known(path, flags, mode=mode)[0]


def open_unseen(path: StrPath, flags: int) -> int:
    """Open a file that exists, without a check that it is a plain one. Its content shows that, or `require_plain`.

    A look at a file's times makes the next write set new times that differ (Linux 6.13, multigrain timestamps). On ext4
    that costs one more write at the fdatasync. So no process looks at the times between two records.
    """
    try:
        return os.open(path, flags | _FLAGS | _BINARY, 0o600)
    except OSError as error:
        _refuse_unsafe(path, error)
        raise


def _refuse_unsafe(path: StrPath, error: OSError) -> None:
    # ELOOP: a symbolic link. ENXIO: a FIFO without reader or a socket. EISDIR: opened for writing.
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
        raise unsafe(path, _what_is(path)) from None


def require_plain(fd: int, path: StrPath) -> None:
    """Raise `Unreadable` if an open file is no plain one."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise unsafe(path, _what_is(path))


def open_known(
    path: StrPath, flags: int, before_create: Callable[[], None] | None = None, mode: int = PRIVATE
) -> tuple[int, os.stat_result]:
    """Open a file as `open_plain` does, and return its status, too.

    `before_create` is called before a missing file is created.
    """
    # Opening and creating are separate calls, so that it is known which of the two was done.
    is_either = flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT
    if is_either:
        flags &= ~os.O_CREAT
    # A file that is made on demand may have been made by root, who gives it to the directory's owner an instant later.
    patience_s = _SHARING_S if is_either or mode & _GROUP else 0.0
    while True:
        try:
            fd = os.open(path, flags | _FLAGS | _BINARY, mode)
            break
        except OSError as error:
            if error.errno == errno.EACCES and patience_s > 0:
                # Between the open and the chmod by another user, that user's umask limits the file's mode.
                patience_s -= _SHARING_PAUSE_S
                time.sleep(_SHARING_PAUSE_S)
                continue
            # Another process may have created the file first, or removed it again. A link that leads nowhere stays
            # (Windows).
            expected = errno.EEXIST if flags & os.O_EXCL else errno.ENOENT
            if is_either and error.errno == expected and not (flags & os.O_EXCL and os.path.islink(path)):
                if before_create is not None and error.errno == errno.ENOENT:
                    before_create()
                flags ^= os.O_CREAT | os.O_EXCL
                continue
            _refuse_unsafe(path, error)
            raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise unsafe(path, _what_is(path))
        if flags & os.O_EXCL:
            _share(path, mode, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def _share(path: StrPath, mode: int, fd: int | None = None) -> None:
    """Give a new file to the group that shares its directory. When run as root, give it to the directory's owner.

    One `sudo persist clear-stale` must not lock the server out. The mode is set whatever the umask is.
    """
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not hasattr(os, "geteuid") or not (is_root or mode & _GROUP):
        return
    owner, own = os.stat(os.path.dirname(path)), os.lstat(path) if fd is None else os.fstat(fd)
    uid = owner.st_uid if is_root else own.st_uid
    if (own.st_uid, own.st_gid) != (uid, owner.st_gid):
        # A user who is no member of the group cannot give it anything.
        with contextlib.suppress(*([] if is_root else [PermissionError])):
            if fd is None:
                os.lchown(path, uid, owner.st_gid)
            else:
                os.fchown(fd, uid, owner.st_gid)
    if mode & _GROUP:
        os.chmod(path if fd is None else fd, mode)


def _what_is(path: StrPath) -> str:
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except OSError:
        return "something else"
    return _KINDS.get(kind, "a device")


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a file",
}


def read(path: StrPath, limit: int) -> bytes:
    """Return at most `limit` bytes from the start of a plain file."""
    return read_version(path, limit)[0]


Version = tuple[int, int, int, int]
"""A write to a file, or another file under its name, changes this: inode, size, mtime and ctime in nanoseconds."""


def version_in(status: os.stat_result) -> Version:
    """Return the version of a file, from its status."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_version(path: StrPath, limit: int) -> tuple[bytes, Version]:
    """Return at most `limit` bytes from the start of a plain file, and its version."""
    fd, status = open_known(path, os.O_RDONLY)
    try:
        # A document is never written to once it bears its name, so its size is known.
        size = min(status.st_size, limit)
        content = b""
        while len(content) < size and (more := os.read(fd, size - len(content))):
            content += more
        return content, version_in(status)
    finally:
        os.close(fd)


def size_of(fd: int) -> int:
    """Return the size of an open file, without a look at its times (see `open_unseen`)."""
    return os.lseek(fd, 0, os.SEEK_END)


def read_at(fd: int, limit: int, position: int) -> bytes:
    """Return `limit` bytes of an open file, from a position on, or fewer if the file ends before."""
    content = b""
    while len(content) < limit:
        rest, place = limit - len(content), position + len(content)
        # After a fork, both processes share one position of a descriptor. `pread` uses none.
        more = os.pread(fd, rest, place) if hasattr(os, "pread") else _seek_and_read(fd, rest, place)
        if not more:
            break
        content += more
    return content


def _seek_and_read(fd: int, limit: int, position: int) -> bytes:
    os.lseek(fd, position, os.SEEK_SET)
    return os.read(fd, limit)


def read_cached(fd: int, limit: int, position: int) -> bytes | None:
    """Read as `read_at` does, but return None if that would wait for the disk, or if the platform cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    buffer = bytearray(limit)
    try:
        return bytes(buffer[: os.preadv(fd, [buffer], position, os.RWF_NOWAIT)])
    except OSError:
        return None


def modified_at(path: StrPath) -> float:
    """Return when a file was last written, in seconds since the epoch."""
    return os.lstat(path).st_mtime


def set_modified_now(path: StrPath) -> None:
    """Set a file's times to now."""
    os.utime(path, follow_symlinks=os.name != "posix")


def touch(file: StrPath | int, time_ns: int | None = None) -> None:
    """Give a file the time of now, or another one. Nothing is synced."""
    if time_ns is None:
        os.utime(file)
    else:
        os.utime(file, ns=(time_ns, time_ns))


def modified_times(directory: StrPath, ending: str) -> tuple[dict[str, int], list[str]]:
    """Return when the files with that ending were last written, in nanoseconds, and the names of all others.

    No other file is looked at, because a look at a journal's times can make its next sync dearer (see `open_unseen`).
    """
    times: dict[str, int] = {}
    others: list[str] = []
    length = len(ending)
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if not name.endswith(ending):
                others.append(name)
                continue
            try:
                times[name[:-length]] = entry.stat(follow_symlinks=False).st_mtime_ns
            except FileNotFoundError:
                # It is gone since the listing.
                continue
    return times, others


def kernel_time(directory: StrPath) -> float:
    """Return the time of the clock that stamps files, from a stamp on a directory. No Python tool moves this clock."""
    os.utime(directory, follow_symlinks=os.name != "posix")
    return modified_at(directory)


def bears_name(file: os.stat_result, path: StrPath) -> bool:
    """Tell whether a path leads to the file with this status."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return found.st_ino == file.st_ino and found.st_dev == file.st_dev


def identity_of(directory: StrPath) -> tuple[int, int]:
    """Return the device and the inode of a directory, behind symbolic links."""
    status = os.stat(directory)
    return status.st_dev, status.st_ino


def version_of(file: StrPath | int) -> Version:
    """Return the version of a file, by its name or its descriptor."""
    status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    # The same as `version_in`, but inline, because each call counts here (see tests/unit/test_costs.py).
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def exists(path: StrPath) -> bool:
    """Tell whether a name is taken, by any kind of file. A dangling link counts."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def is_plain(path: StrPath) -> bool:
    """Tell whether a name is that of a plain file, or of none."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return True


def create(path: StrPath, mode: int = PRIVATE) -> int:
    """Create a file that must not exist, open for writing."""
    return open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def write(fd: int, content: bytes) -> None:
    """Write all of `content`. The kernel may take it piece by piece."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest[:_WRITE_CHUNK]) :]


def write_at(fd: int, content: bytes, position: int) -> None:
    """Write all of `content` from a position on, over whatever stands there."""
    rest = memoryview(content)
    while rest:
        chunk = rest[:_WRITE_CHUNK]
        done = os.pwrite(fd, chunk, position) if hasattr(os, "pwrite") else _seek_and_write(fd, chunk, position)
        rest, position = rest[done:], position + done


def _seek_and_write(fd: int, content: memoryview, position: int) -> int:
    os.lseek(fd, position, os.SEEK_SET)
    return os.write(fd, content)


def truncate(fd: int, size: int) -> None:
    """Cut an open file off at a size."""
    os.ftruncate(fd, size)


class SyncFailed(OSError):
    """An fsync failed. The kernel may have dropped the data that it should have written. Another fsync may say OK."""


def sync(fd: int) -> None:
    """Sync a file, so that its content survives a power cut. If the sync fails, raise `SyncFailed`."""
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror or type(error).__name__) from error


def sync_data(fd: int) -> None:
    """Sync the data of a file that was appended to, as `sync` does. The file's times may be lost.

    The descriptor must be open for reading, too.
    """
    if not hasattr(os, "fdatasync"):
        sync(fd)
        return
    try:
        os.fdatasync(fd)
        # If ext4 or XFS is shut down at this moment, it may answer OK and lose the data (measured). But then a read
        # fails.
        os.pread(fd, 1, 0)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror or type(error).__name__) from error


def close(fd: int) -> None:
    """Close a descriptor."""
    os.close(fd)


def sync_file(path: StrPath) -> None:
    """Make the present content of a file durable."""
    fd = open_plain(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        sync(fd)
    finally:
        close(fd)


def open_directory(path: StrPath) -> int:
    """Open a directory for `sync_directory`.

    Windows cannot do that, and on NTFS there is no need. So the descriptor is -1 there.
    """
    return -1 if os.name == "nt" else os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def close_directory(fd: int) -> None:
    """Close a directory that `open_directory` has opened."""
    if fd >= 0:
        try:
            os.close(fd)
        except OSError:
            pass  # the answer of an fsync stays true, whatever becomes of the descriptor


def sync_directory(path: StrPath, opened: int | None = None) -> None:
    """Sync a directory, so that the names in it survive a power cut.

    `opened` is its descriptor, if there is one already.
    """
    fd = open_directory(path) if opened is None else opened
    try:
        if fd >= 0:
            sync(fd)
            # After an I/O error XFS shuts itself down. It then answers OK to the fsync of a directory, but not to this
            # call.
            os.fstat(fd)
    finally:
        if opened is None:
            close_directory(fd)


def replace(source: StrPath, target: StrPath) -> None:
    """Give `target` the content of `source` in one step. A reader sees the old file or the new one."""
    for attempt in range(1, REPLACE_ATTEMPTS + 1):
        try:
            os.replace(source, target)
        except PermissionError:
            if attempt == REPLACE_ATTEMPTS:
                raise
            time.sleep(REPLACE_PAUSE_S)
        else:
            return


def unlink(path: StrPath) -> bool:
    """Remove a name, and tell whether it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EPERM) and os.path.isdir(path):
            raise unsafe(path, "a directory") from None
        raise
    return True


def remove_quietly(path: StrPath) -> None:
    """Remove a file that no longer counts.

    If the disk refuses, the file stays as a left-over, and a sweep or `check` finds it.
    """
    try:
        unlink(path)
    except OSError:
        pass


def check_directory(path: StrPath) -> None:
    """Raise `Unreadable` for a path that is no directory of its own. A missing one is fine.

    A symbolic link is refused, too, because somebody else's files stand behind it.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise unsafe(path, _what_is(path), "a directory")


def names(directory: StrPath) -> list[str]:
    """Return the names in a directory, unsorted. A missing directory has none."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def mkdir(path: StrPath, file_mode: int = PRIVATE) -> None:
    """Make one directory for files of a mode. Its name is durable once the directory above it is synced."""
    os.mkdir(path, mode=0o700)
    _share(path, directory_mode(file_mode))


def awaited_mode(path: StrPath, wanted: int) -> int:
    """Return the mode of a directory. One that lacks wanted bits may have been made an instant ago, and gets them."""
    patience_s = _SHARING_S
    while True:
        found = stat.S_IMODE(os.stat(path).st_mode)
        if not wanted & ~found or patience_s <= 0:
            return found
        patience_s -= _SHARING_PAUSE_S
        time.sleep(_SHARING_PAUSE_S)


def make_directory(path: StrPath, file_mode: int = PRIVATE) -> None:
    """Make a directory for files of a mode, and the missing directories above it. They are durable on return."""
    missing = []
    while not _is_there(path):
        missing.append(path)
        path = os.path.dirname(path)
    if missing:
        # Another process may have made this directory a moment ago, and may not have synced its name yet.
        with contextlib.suppress(PermissionError):
            sync_directory(os.path.dirname(path))
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            mkdir(directory, file_mode)
        sync_directory(os.path.dirname(directory))


def _is_there(path: StrPath) -> bool:
    # `os.path.exists` would say that a file is missing if the disk refuses to answer.
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def ignores_case(directory: str, name: str) -> bool:
    """Tell whether the file system takes `name` and its upper case for one name. `name` must exist in lower case."""
    try:
        other = os.stat(os.path.join(directory, name.upper()))
    except FileNotFoundError:
        return False
    return os.path.samestat(os.stat(os.path.join(directory, name)), other)
