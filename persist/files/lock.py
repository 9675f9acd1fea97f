"""Locks: the one place that knows filelock, and the only order in which anything is locked.

Order: the session's in-process mutex -> its file lock -> (its lease, only ever *tried*; see `lease`). A thread holds the
lock of one session at a time; asking for a second one raises `NestedLock` instead of risking a deadlock.

Why not a `filelock.FileLock` object: threads that poll one file starve each other (p99 82 ms against 5 ms behind a
first-in-first-out mutex), and a cycle costs 270 µs against 12 µs for `lock_descriptor` on a fresh descriptor. Both take
the same kernel lock, so each excludes the other.

Fork: a child closes the descriptors it inherited and never unlocks them, because unlocking in the child would release
the parent's lock. Opening and closing happen under `_table`, which a fork waits for, so that no descriptor is missed. The
parent unlocks before it closes, so that a copy which leaked into a child all the same holds nothing.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary, ref

from filelock import lock_descriptor, unlock_descriptor

from persist.errors import CommitFailed, LockTimeout, NestedLock, PersistError
from persist.files import disk

# Growing only to 1 ms: backing off to 5 ms starves the longest waiter (860 ms, measured).
_POLL_FIRST_S = 0.0002
_POLL_LAST_S = 0.001

_table = threading.RLock()
_descriptors: set[int] = set()


class HeldFile:
    """A file that this process has open and locked. `close` gives it up; so does the end of the process.

    Dropped without `close` (a signal's exception may come between any two steps), it is closed by its finaliser.
    """

    __slots__ = ("_fd", "_is_locked", "_pid")

    def __init__(self) -> None:
        self._fd = -1
        self._is_locked = False
        self._pid = os.getpid()

    @property
    def is_held(self) -> bool:
        """Whether it is still open, in the process that opened it."""
        return self._fd >= 0 and self._pid == os.getpid()

    @property
    def fd(self) -> int:
        return self._fd

    def open(self, path: Path, flags: int) -> bool:
        """Open and try to lock; tell whether it is locked, and still bears its name."""
        with _table:
            self._fd = disk.open_plain(path, flags)
            _descriptors.add(self._fd)
            self._is_locked = lock_descriptor(self._fd, blocking=False)
            # A waiter may lock a file that its holder has just unlinked. Its number of links would not tell: a backup may
            # hold a hard link.
            return self._is_locked and disk.bears_name(self._fd, path)

    def close(self) -> None:
        """Unlock and close, once. In a forked child nothing is left to close."""
        with _table:
            fd = self._fd
            if fd < 0 or self._pid != os.getpid():
                return
            _descriptors.discard(fd)
            try:
                if self._is_locked:
                    unlock_descriptor(fd)
            except OSError:
                pass  # what was done under the lock is done, and closing unlocks, too
            self._fd = -1
            try:
                os.close(fd)
            except OSError:
                pass  # the kernel gives the descriptor up even where it complains

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def try_hold(path: Path, *, create: bool, exclusive: bool = False, append: bool = False) -> HeldFile | None:
    """Open and lock a file, without waiting.

    Args:
        create: make the file if it is missing; else a missing file raises `FileNotFoundError`.
        exclusive: with `create`, a file that exists raises `FileExistsError`.
        append: what is written goes to the end of the file, wherever that is by then.

    Returns:
        The held file, or None if somebody else holds it, or if its holder removed it in the meantime.
    """
    held = HeldFile()
    flags = os.O_RDWR | (os.O_CREAT if create else 0) | (os.O_EXCL if exclusive else 0) | (os.O_APPEND if append else 0)
    try:
        if held.open(path, flags):
            return held
    except BaseException:
        held.close()
        raise
    held.close()
    return None


class Turn:
    """One thread's place in the queue of a mutex.

    Only the block that asked for it keeps it: a turn that is gone has given up whatever it had, even if an exception of a
    signal kept its `release` from running.
    """

    __slots__ = ("__weakref__", "given", "session_id", "thread")

    def __init__(self, session_id: str = "") -> None:
        self.session_id = session_id
        self.thread = threading.current_thread()
        #: Locked while the turn waits; made only if it has to.
        self.given: threading.Lock | None = None


class FifoMutex:
    """A mutex that serves its waiters in the order of their arrival, each with a deadline.

    `release` belongs into a ``finally`` around `acquire`: it undoes whatever of it has happened.
    """

    __slots__ = ("__weakref__", "_guard", "_holder", "_waiters")

    def __init__(self) -> None:
        # Re-entrant: a signal handler may come here while its own thread is inside.
        self._guard = threading.RLock()
        self._holder: ref[Turn] | None = None
        self._waiters: deque[Turn] = deque()

    @property
    def holder(self) -> str:
        """The name of the thread that holds it."""
        holder = self._holding()
        return "unknown" if holder is None else holder.thread.name

    def _holding(self) -> Turn | None:
        return None if self._holder is None else self._holder()

    def acquire(self, turn: Turn, timeout_s: float) -> bool:
        """Take the mutex, waiting at most `timeout_s` seconds; tell whether it was taken."""
        with self._guard:
            if self._holding() is None:
                self._holder = ref(turn)
                return True
            turn.given = given = threading.Lock()
            given.acquire()
            self._waiters.append(turn)
        return given.acquire(timeout=max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))

    def release(self, turn: Turn) -> None:
        """Hand the mutex to the first waiter if this turn has it, also if it came too late; else leave the queue."""
        with self._guard:
            if self._holding() is turn:
                following = self._waiters.popleft() if self._waiters else None
                self._holder = None if following is None else ref(following)
                if following is not None and following.given is not None:
                    following.given.release()
            elif turn in self._waiters:
                self._waiters.remove(turn)


_mutexes: WeakValueDictionary[Path, FifoMutex] = WeakValueDictionary()
# Making one takes as long as taking the file lock: keep some of those that nobody uses just now.
_kept: deque[FifoMutex] = deque(maxlen=256)


def _mutex(path: Path) -> FifoMutex:
    with _table:
        mutex = _mutexes.get(path)
        if mutex is None:
            mutex = _mutexes[path] = FifoMutex()
            _kept.append(mutex)
        return mutex


#: Thread -> its turn, while it holds a lock or waits for one. By thread and not thread-local: a block that is entered in one
#: thread and left in another (a synchronous dependency of a web framework, say) must free the one that entered it.
_turn_of: dict[int, ref[Turn]] = {}


@contextmanager
def hold(path: Path, session_id: str, timeout_s: float) -> Iterator[HeldFile]:
    """Hold the lock of a session for a block.

    Args:
        path: the lock file; made if missing.
        timeout_s: seconds to wait in all, for other threads and for other processes.

    Raises:
        LockTimeout: not free in time; it names the holder.
        NestedLock: this thread holds a session's lock, or waits for one: in a signal handler, say.
        CommitFailed: the lock file cannot be opened.
    """
    thread, pid = threading.get_ident(), os.getpid()
    _refuse_nesting(thread, session_id)
    mutex, turn, held = None, Turn(session_id), None
    start = time.monotonic()

    def timed_out(holder: str, **remedy: str) -> LockTimeout:
        waited_s = time.monotonic() - start
        return LockTimeout(session_id=session_id, path=path, holder=holder, timeout_s=timeout_s, waited_s=waited_s, **remedy)

    try:
        _turn_of[thread] = ref(turn)
        mutex = _mutex(path)
        if not mutex.acquire(turn, timeout_s):
            remedy = "leave that thread's edit() or update() sooner: it must not wait for others who write this session"
            raise timed_out(f"this process (pid {pid}), thread {mutex.holder!r}", remedy=remedy)
        held = _poll(path, session_id, start + timeout_s)
        if held is None:
            raise timed_out(_holder_of(path))
        yield held
    finally:
        # One after the other, whatever exception a signal raises among them. A child that was forked inside the block has
        # neither the lock nor the mutex.
        try:
            if held is not None:
                held.close()
        finally:
            try:
                if mutex is not None and pid == os.getpid():
                    mutex.release(turn)
            finally:
                if pid == os.getpid():
                    _turn_of.pop(thread, None)


def _refuse_nesting(thread: int, session_id: str) -> None:
    outer = _turn_of[thread]() if thread in _turn_of else None
    if outer is not None:
        raise NestedLock(session_id=session_id, held=outer.session_id)
    if _table._is_owned():  # type: ignore[attr-defined]
        # A signal handler (or a finaliser) in the middle of opening or closing a lock: to wait here would stop everybody.
        raise NestedLock(session_id=session_id, held="unknown")


def _poll(path: Path, session_id: str, deadline: float) -> HeldFile | None:
    pause_s = _POLL_FIRST_S
    try:
        while (held := try_hold(path, create=True)) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            time.sleep(min(left_s, pause_s * random.uniform(0.5, 1.0)))
            pause_s = min(pause_s * 2, _POLL_LAST_S)
    except OSError as error:
        if isinstance(error, PersistError):
            raise
        reason = error.strerror or type(error).__name__
        raise CommitFailed(session_id=session_id, path=path, reason=reason, errno=error.errno) from error
    return held


def _holder_of(path: Path) -> str:
    """Who holds a locked file, by the kernel's table (Linux), else "unknown"."""
    try:
        status = os.stat(path)
        table = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return "unknown"
    # 1: FLOCK ADVISORY WRITE 812 fe:00:1234 0 EOF
    holders = {fields[5]: int(fields[4]) for fields in table if len(fields) > 5 and fields[1] == "FLOCK"}
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    # Some file systems (btrfs) show another device number there than stat() does: then the inode has to do.
    same_inode = [pid for file, pid in holders.items() if file.rpartition(":")[2] == str(status.st_ino)]
    pid = holders.get(f"{device}:{status.st_ino}", same_inode[0] if same_inode else None)
    return "unknown" if pid is None else describe_process(pid)


def describe_process(pid: int) -> str:
    """Name a process for a message: "pid 812 (uvicorn)"."""
    if pid <= 0:
        return "a process outside this container"
    try:
        return f"pid {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"pid {pid}"


def _forget_in_child() -> None:
    for fd in _descriptors:
        # Somebody else's mistake may have closed it.
        with suppress(OSError):
            os.close(fd)
    _descriptors.clear()
    _mutexes.clear()
    _kept.clear()
    _turn_of.clear()
    _table.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_table.acquire, after_in_parent=_table.release, after_in_child=_forget_in_child)
