"""Locks: how a thread comes to hold a session, and the only order in which anything is locked.

Order: the session's in-process mutex -> its file lock -> (its lease, only ever *tried*; see `lease`). A thread holds
the lock of one session at a time; asking for a second one raises `NestedLock` instead of risking a deadlock.

Threads that poll one file starve each other (p99 82 ms against 5 ms behind a first-in-first-out mutex), and so do
processes: these queue up in the kernel (see `turns`). No system call waits there with a time limit, so a thread does it
for the one that has asked. Where that cannot be, processes poll.
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
from persist.storage import turns
from persist.storage.held import HeldFile, table, try_hold

# Growing only to 1 ms: backing off to 5 ms starves the longest waiter (860 ms, measured).
_POLL_FIRST_S = 0.0002
_POLL_LAST_S = 0.001
#: For so long a place in the queue is all that is waited for: the process at its head may be stopped (a paused
#: container).
PATIENCE_S = 0.05
#: So long it is given then to take what is free: it may just be about to.
GRACE_S = 0.005


class Turn:
    """One thread's place in the queue of a mutex.

    Only the block that asked for it keeps it: a turn that is gone has given up whatever it had, even if an exception of
    a signal kept its `release` from running.
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
    _refuse_nesting(thread, session_id)
    mutex, turn, held = None, Turn(session_id), None
    start = time.monotonic()

    def timed_out(holder: str, **remedy: str) -> LockTimeout:
        waited_s = time.monotonic() - start
        return LockTimeout(
            session_id=session_id, path=path, holder=holder, timeout_s=timeout_s, waited_s=waited_s, **remedy
        )

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
        # One after the other, whatever exception a signal raises among them. A child that was forked inside the block
        # has neither the lock nor the mutex.
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
        # A signal handler (or a finaliser) in the middle of opening or closing a lock: to wait here would stop
        # everybody.
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
    """Hold the file, behind those who wait for it already.

    None at the deadline, or if the file was removed meanwhile.
    """
    held, place, found = HeldFile(), None, None
    try:
        if held.open(path, os.O_RDWR | os.O_CREAT, in_turn=True):
            found = held
        # One that is locked was removed: who holds it holds up its queue.
        elif not held.is_locked:
            place = _place(path, held)
            found = _poll(path, deadline) if place is None else place.wait(deadline)
        return found
    finally:
        if place is None and (queued := _places.get(path)) is not None and queued.file is held:
            # A signal's exception came when its thread had been started.
            place = queued
        if place is not None and found is not place.file:
            place.leave()
        if found is not held and (place is None or place.file is not held):
            held.close()


def _poll(path: Path, deadline: float) -> HeldFile | None:
    """Hold the file as soon as a look finds it free; None at the deadline."""
    pause_s = _POLL_FIRST_S
    while (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(left_s, pause_s * random.uniform(0.5, 1.0)))
        if (held := try_hold(path, create=True)) is not None:
            return held
        pause_s = min(pause_s * 2, _POLL_LAST_S)
    return None


# --- the queue of processes ------------------------------------------------------------------------------------------


class _Place:
    """A place in the queue: a thread that sleeps in the kernel, where nothing can call it back.

    Who gives up leaves it to the next caller of this process who waits for that file; what it gets before, it gives up.

    Attributes:
        file: the file, open; whoever waits takes it when it is locked.
    """

    def __init__(self, path: Path, file: HeldFile) -> None:
        self.file = file
        self._path = path
        self._is_next = self._is_locked = self._has_ended = self._is_left = False
        self._end = threading.Lock()
        self._end.acquire()

    def take(self) -> bool:
        """Start the thread, if that is possible."""
        _places[self._path] = self
        try:
            # Costs half of what a `threading.Thread` does, which is made to be waited for.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # too many threads, or the interpreter ends
            _places.pop(self._path, None)
            return False
        return True

    def take_over(self) -> None:
        """Wait where somebody has given up."""
        self._is_left = False

    def wait(self, deadline: float) -> HeldFile | None:
        """Wait until the file is locked; while the queue does not move, look now and then whether it is free all the
        same.
        """
        head = turns.head(self.file.fd)
        while (left_s := deadline - time.monotonic()) > 0:
            timeout_s = min(left_s, threading.TIMEOUT_MAX if self._is_next else PATIENCE_S)
            if self._end.acquire(timeout=timeout_s):
                if not self._is_locked:
                    return _poll(self._path, deadline)
                return self.file if self.file.take(self._path) else None
            before, head = head, turns.head(self.file.fd)
            if not self._is_next and head == before and (other := _overtake(self._path)) is not None:
                return other
        return None

    def leave(self) -> None:
        """Give up; the thread goes on to wait."""
        with table:
            self._is_left = True
            if self._has_ended:
                self._give_back()

    def _run(self) -> None:
        is_locked = False
        try:
            place = turns.queue_up(self.file.fd)
            self._is_next = True
            turns.lock(self.file.fd, place)
            is_locked = True
        except OSError:
            pass  # the one who waits for it polls, and says what is wrong
        finally:
            with table:
                _places.pop(self._path, None)
                self._is_locked, self._has_ended = is_locked, True
                if self._is_left:
                    self._give_back()
            self._end.release()

    def _give_back(self) -> None:
        # To close it would do, but for copies that leaked into a child.
        self.file.unlock_on_close()
        self.file.close()


def _overtake(path: Path) -> HeldFile | None:
    """Hold the file if it is free, and who stands first does not take it."""
    free = try_hold(path, create=True)
    if free is None:
        return None
    free.close()
    time.sleep(GRACE_S)
    return try_hold(path, create=True)


#: The places that this process has in queues.
_places: dict[Path, _Place] = {}


def _place(path: Path, held: HeldFile) -> _Place | None:
    """A place in the queue for a file that is open: that of a caller who gave up, or a new one; None if there can be
    none.
    """
    with table:
        if (left := _places.get(path)) is not None:
            left.take_over()
            return left
    # gevent and eventlet put something of theirs there, which would let nobody else run.
    if not turns.ARE_THERE or not isinstance(_thread.start_new_thread, types.BuiltinFunctionType):
        return None
    place = _Place(path, held)
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
    _places.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
