"""Locks: how a thread comes to hold a session, and the only order in which anything is locked.

Order: the session's in-process mutex -> its file lock -> (its lease, only ever *tried*; see `lease`). A thread holds
the lock of one session at a time; asking for a second one raises `NestedLock` instead of risking a deadlock.

Threads that poll one file starve each other (p99 82 ms against 5 ms behind a first-in-first-out mutex), and so do
processes: the process that waits next stands in the turnstile, and the others let it go first.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, ref

from persist.errors import CommitFailed, LockTimeout, NestedLock, PersistError
from persist.storage import turnstile
from persist.storage.held import HeldFile, table

#: How often a process in the turnstile asks for the lock. There is one.
_POLL_NEXT_S = 0.0001
# Outside it, a process asks for the turnstile, the more often the longer it has waited: a newcomer must not be quicker.
_POLL_FIRST_S = 0.002
_MOST_EAGER_AFTER_S = 0.03
#: For so long the process in the turnstile is waited for: it may be stopped (a paused container).
PATIENCE_S = 0.05


class Turn:
    """One thread's place in the queue of a mutex.

    Only the block that asked for it keeps it: a turn that is gone has given up whatever it had, even if an exception of
    a signal kept its `release` from running.
    """

    __slots__ = ("__weakref__", "given", "session_id", "thread")

    def __init__(self, session_id: str = "") -> None:
        self.session_id = session_id
        self.thread = threading.current_thread()
        #: Locked while the turn waits.
        self.given = threading.Lock()


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
            turn.given.acquire()
            self._waiters.append(turn)
        return turn.given.acquire(timeout=max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))

    def release(self, turn: Turn) -> None:
        """Hand the mutex to the first waiter if this turn has it, also if it came too late; else leave the queue."""
        with self._guard:
            if self._holding() is turn:
                following = self._waiters.popleft() if self._waiters else None
                self._holder = None if following is None else ref(following)
                if following is not None:
                    following.given.release()
            elif turn in self._waiters:
                self._waiters.remove(turn)


_mutexes: WeakValueDictionary[Path, FifoMutex] = WeakValueDictionary()
# Making one takes as long as taking the file lock: keep some of those that nobody uses just now.
_kept: deque[FifoMutex] = deque(maxlen=256)


#: Thread -> its turn, while it holds a lock or waits for one. By thread and not thread-local: a block that is entered
#: in one thread and left in another (a synchronous dependency of a web framework, say) must free the one that entered
#: it.
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
    outer = _turn_of[thread]() if thread in _turn_of else None
    # Where the table is owned, this is a signal handler (or a finaliser) in the middle of opening or closing a lock: to
    # wait here would stop everybody.
    if outer is not None or table._is_owned():  # type: ignore[attr-defined]
        raise NestedLock(session_id=session_id, held="unknown" if outer is None else outer.session_id)
    mutex, turn, held = None, Turn(session_id), None
    start = time.monotonic()
    facts: dict[str, Any] = {"session_id": session_id, "path": path, "timeout_s": timeout_s}
    try:
        _turn_of[thread] = ref(turn)
        with table:
            mutex = _mutexes.get(path)
            if mutex is None:
                mutex = _mutexes[path] = FifoMutex()
                _kept.append(mutex)
        if not mutex.acquire(turn, timeout_s):
            remedy = "leave that thread's transaction() or update() sooner: it must not wait for other writers"
            holder = f"this process (pid {pid}), thread {mutex.holder!r}"
            raise LockTimeout(**facts, holder=holder, waited_s=time.monotonic() - start, remedy=remedy)
        held = HeldFile(path)
        try:
            is_locked = _in_turn(held, start + timeout_s)
        except PersistError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CommitFailed(session_id=session_id, path=path, reason=reason, errno=error.errno) from error
        if not is_locked:
            raise LockTimeout(**facts, holder=_holder_of(path), waited_s=time.monotonic() - start)
        yield held
    finally:
        # One after the other, whatever exception a signal raises among them. A child that was forked inside the block
        # has neither the lock nor the mutex.
        try:
            if held is not None:
                held.close()
        finally:
            if pid == os.getpid():
                try:
                    if mutex is not None:
                        mutex.release(turn)
                finally:
                    _turn_of.pop(thread, None)


def _in_turn(held: HeldFile, deadline: float) -> bool:
    """Open and lock a file, behind the process that is next. Tell whether that was done until the deadline."""
    held.open()
    if not turnstile.is_taken(held.fd) and held.try_lock():
        return True
    has_turn, start = False, time.monotonic()
    try:
        has_turn = turnstile.take(held.fd)
        while (now := time.monotonic()) < deadline:
            waited_s = now - start
            outside_s = _POLL_FIRST_S * (1.0 - waited_s / _MOST_EAGER_AFTER_S) * random.uniform(0.5, 1.0)
            time.sleep(min(deadline - now, _POLL_NEXT_S if has_turn else max(_POLL_NEXT_S, outside_s)))
            if not held.bears_name():
                # Its holder removed it, together with its turnstile.
                has_turn = False
                held.open()
            has_turn = has_turn or turnstile.take(held.fd)
            if (has_turn or waited_s > PATIENCE_S) and held.try_lock():
                return True
        # Once more: it may be free by now, or the process that is next may be stopped.
        return held.try_lock()
    finally:
        if has_turn:
            # Not only by the close: a child may have a copy of the descriptor.
            turnstile.leave(held.fd)


def _holder_of(path: Path) -> str:
    """Name the process that holds a locked file, by the kernel's table (Linux), else "unknown"."""
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
    _mutexes.clear()
    _kept.clear()
    _turn_of.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
