"""Locks: how a thread comes to hold a session, and the only order in which anything is locked.

Order: the session's in-process mutex -> its file lock -> (its lease, only ever *tried*; see `lease`). A thread holds the
lock of one session at a time; asking for a second one raises `NestedLock` instead of risking a deadlock.

Threads that poll one file starve each other (p99 82 ms against 5 ms behind a first-in-first-out mutex), and so do processes:
these queue up in the kernel (see `turnstile`). No system call waits there with a time limit, so a thread does it for the one
that has asked. Where that cannot be, processes poll.
"""

from __future__ import annotations

import _thread
import os
import random
import threading
import time
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary, ref

from persist.errors import CommitFailed, LockTimeout, NestedLock, PersistError
from persist.files import turnstile
from persist.files.held import HeldFile, table, try_hold

# Growing only to 1 ms: backing off to 5 ms starves the longest waiter (860 ms, measured).
_POLL_FIRST_S = 0.0002
_POLL_LAST_S = 0.001
#: For so long a place in the queue is all that is waited for: the process at its head may be stopped (a paused container).
PATIENCE_S = 0.05


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
    with table:
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
        held = _wait(path, session_id, start + timeout_s)
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
    if table._is_owned():  # type: ignore[attr-defined]
        # A signal handler (or a finaliser) in the middle of opening or closing a lock: to wait here would stop everybody.
        raise NestedLock(session_id=session_id, held="unknown")


def _wait(path: Path, session_id: str, deadline: float) -> HeldFile | None:
    """Hold the file, when it is this process's turn; None if it is not until the deadline (`time.monotonic`)."""
    try:
        held, is_late = None, time.monotonic() >= deadline
        while held is None and not is_late:
            held = _in_turn(path, deadline)
            is_late = time.monotonic() >= deadline
        # Once more: it may be free by now, or the queue be stuck.
        return held or try_hold(path, create=True)
    except OSError as error:
        if isinstance(error, PersistError):
            raise
        reason = error.strerror or type(error).__name__
        raise CommitFailed(session_id=session_id, path=path, reason=reason, errno=error.errno) from error


def _in_turn(path: Path, deadline: float) -> HeldFile | None:
    """Hold the file, behind those who wait for it already. None at the deadline, or if the file was removed meanwhile."""
    held = HeldFile()
    try:
        if held.open(path, os.O_RDWR | os.O_CREAT, in_turn=True):
            return held
        # One that is locked was removed: who holds it holds up its queue.
        other = None if held.is_locked else _wait_for(held, path, deadline)
    except BaseException:
        held.close()
        raise
    if other is not held:
        held.close()
    return other


def _wait_for(held: HeldFile, path: Path, deadline: float) -> HeldFile | None:
    """Wait in the queue of processes; where there is none, or while it does not move, poll. Return what holds the file."""
    place, is_taken = _place(path, held), False
    pause_s = _POLL_FIRST_S if place is None else PATIENCE_S
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            if place is None:
                time.sleep(min(left_s, pause_s * random.uniform(0.5, 1.0)))
                pause_s = min(pause_s * 2, _POLL_LAST_S)
            elif place.has_ended(left_s if place.is_next else min(left_s, pause_s)):
                is_taken = place.is_locked and held.take(path)
                return held if is_taken else None
            if (other := try_hold(path, create=True)) is not None:
                return other
        return None
    finally:
        if place is not None and not is_taken:
            place.leave(held)


# --- the queue of processes ------------------------------------------------------------------------------------------------

#: Files that a thread of this process waits for in the kernel, where nothing can call it back. There is one for each at most:
#: who finds that of a caller who has given up polls.
_queued: set[Path] = set()


class _Place:
    """A place in the queue: a thread that sleeps in the kernel. If nobody waits for it any more, it gives up what it gets.

    Attributes:
        is_next: it is at the head of the queue.
        is_locked: the file is locked.
    """

    def __init__(self, path: Path, copy: HeldFile) -> None:
        self.is_next = self.is_locked = False
        self._is_left = False
        self._path = path
        self._copy = copy
        self._end = threading.Lock()

    def take(self) -> bool:
        """Start the thread, if that is possible."""
        self._end.acquire()
        _queued.add(self._path)
        try:
            # Costs half of what a `threading.Thread` does, which is made to be waited for.
            _thread.start_new_thread(self._run, ())
        except BaseException as error:
            _queued.discard(self._path)
            if isinstance(error, RuntimeError):  # too many threads, or the interpreter ends
                return False
            raise
        return True

    def has_ended(self, timeout_s: float) -> bool:
        """Wait at most so long until the file is locked, or that has failed."""
        return self._end.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))

    def leave(self, held: HeldFile) -> None:
        """Give up what the thread gets, or has got: of the two, whoever comes to it last unlocks it."""
        self._is_left = True
        held.unlock_on_close()

    def _run(self) -> None:
        try:
            turnstile.enter(self._copy.fd)
            self.is_next = True
            turnstile.lock(self._copy.fd)
            self.is_locked = True
        except OSError:
            pass  # the one who waits for it polls, and says what is wrong
        finally:
            _queued.discard(self._path)
            self._end.release()
            if self._is_left:
                self._copy.unlock_on_close()
            self._copy.close()


def _place(path: Path, held: HeldFile) -> _Place | None:
    """A place in the queue for a file that is open; None if there is none."""
    # gevent and eventlet put something of theirs there, which would let nobody else run.
    is_possible = turnstile.IS_THERE and isinstance(_thread.start_new_thread, types.BuiltinFunctionType)
    if not is_possible or path in _queued:
        return None
    try:
        place = _Place(path, held.copy())
    except OSError:  # too many files are open
        return None
    return place if place.take() else None


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
    _mutexes.clear()
    _kept.clear()
    _turn_of.clear()
    _queued.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
