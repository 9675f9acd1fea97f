"""Locks: how a thread gets the lock of a session, and the only order in which anything is locked.

Order: the session's in-process mutex -> its file lock -> (its lease, only ever *tried*, see `lease`). A thread holds
the lock of one session at a time. If it asks for a second one, it gets `LockError` instead of the risk of a deadlock.

Threads that poll one file starve each other (p99 82 ms against 5 ms behind a first-in-first-out mutex), and so do
processes. Therefore the process that waits next stands in the turnstile, and the others let it go first.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any
from weakref import ref

from persist.errors import CommitFailed, LockTimeout, PersistError, Unreadable, nested, refused
from persist.log import log
from persist.storage import disk, turnstile
from persist.storage.clock import now_s
from persist.storage.held import HeldFile, table

#: Seconds between two tries of the process in the turnstile. There is only one such process.
_POLL_NEXT_S = 0.0001
# A process outside asks for the turnstile. The longer it has waited, the more often it asks, because a newcomer must
# not be quicker.
_POLL_FIRST_S = 0.002
_MOST_EAGER_AFTER_S = 0.03
#: Seconds that others wait for the process in the turnstile, because it may be stopped (a paused container).
PATIENCE_S = 0.05
#: With these errors the system refuses a lock file to a user who may only read the store.
_MAY_ONLY_READ = (errno.EACCES, errno.EPERM, errno.EROFS)
#: A longer wait is logged.
LONG_WAIT_S = 0.05
#: Seconds between two looks at a deadline that may change, while a hold waits for other threads.
_LOOK_AGAIN_S = 0.05


#: The path of a lock -> the holds of this process that want it, in the order of their arrival. It is the first one's
#: turn. Guarded by `table`.
_queues: dict[str, deque[ref[Hold]]] = {}
#: Thread -> its hold, while it has a lock or waits for one. This is not thread-local, because one thread may enter a
#: block and another may leave it. A synchronous dependency of a web framework does that, for example. The end of the
#: block must free the thread that entered it.
_hold_of: dict[int, ref[Hold]] = {}


class Waiting:
    """The wait of one thread on behalf of several calls. The thread learns only with the lock which call it runs.

    Attributes:
        deadline: the end of the wait. The thread looks at it again and again, so calls may come and go meanwhile.
        has_tried: whether the thread has found the lock taken, or has it.
        is_lent: whether the thread holds the lock, and the next verb of that thread may take it over.
    """

    __slots__ = ("deadline", "has_tried", "is_lent")

    def __init__(self) -> None:
        self.deadline = 0.0
        self.has_tried = self.is_lent = False

    def extend(self, timeout_s: float) -> float:
        """Wait for a further call, too. Return the deadline of that call."""
        deadline = now_s() + timeout_s
        self.deadline = max(self.deadline, deadline)
        return deadline

    def give_up(self) -> None:
        """End the wait, because no call is left."""
        self.deadline = 0.0

    @staticmethod
    def left_s(deadline: float) -> float:
        """Return how many seconds are left until a deadline. The number is negative after the deadline."""
        return deadline - now_s()


class Hold:
    """The lock of a session, as one thread takes it and gives it up. If the hold is dropped, the lock is given up.

    Args:
        path: the lock file. It is made if it is missing.
        timeout_s: seconds to wait in all, for other threads and for other processes.

    Attributes:
        waiting: the calls for which the thread takes the lock, in the place of `timeout_s`. None for an ordinary verb.
        thread: the native id of the thread that asked for the lock, 0 before that.
        given: locked while that thread waits for other threads.
        has_lock: whether the thread has the lock. Until then another process may have it.
        mode: the mode of a new lock file.
    """

    __slots__ = (
        "__weakref__",
        "_file",
        "_me",
        "_pid",
        "given",
        "has_lock",
        "mode",
        "path",
        "session_id",
        "thread",
        "timeout_s",
        "waiting",
    )

    #: The part of the lock that other processes see. Another engine has another one.
    held: type[Any] = HeldFile
    is_taken = staticmethod(turnstile.is_taken)

    def __init__(self, path: str, session_id: str, timeout_s: float) -> None:
        self.path = path
        self.session_id = session_id
        self.timeout_s = timeout_s
        self.waiting: Waiting | None = None
        self.mode = disk.PRIVATE
        self.given = threading.Lock()
        self.has_lock = False
        self.thread = 0
        self._file: Any = None
        self._me = ref(self)
        self._pid = os.getpid()

    def before_create(self) -> None:
        """Do what has to be done before a missing lock file is created."""

    def acquire(self) -> Any:
        """Take the lock, and return its file.

        Raises:
            LockTimeout: the lock is not free in time. The error names the holder.
            LockError: this thread holds a session's lock, or waits for one, in a signal handler for example.
            Unreadable: the lock file's directory is gone.
            CommitFailed: the lock file cannot be opened.
        """
        # This is the kernel's number, because `get_ident` gives the number of an ended thread to the next one.
        thread = threading.get_native_id()
        outer = _hold_of[thread]() if thread in _hold_of else None
        # If this thread owns the table, this is a signal handler (or a finaliser) in the middle of opening or closing a
        # lock. To wait here would stop everybody.
        if outer is not None or table._is_owned():  # type: ignore[attr-defined]
            is_lent = outer is not None and outer.waiting is not None and outer.waiting.is_lent
            if outer is not None and is_lent and not table._is_owned():  # type: ignore[attr-defined]
                return self._take_over(outer)
            raise nested(self.session_id, held="unknown" if outer is None else outer.session_id)
        start = now_s()
        try:
            self.thread = thread
            _hold_of[thread] = self._me
            with table:
                queue = _queues.setdefault(self.path, deque())
                if queue:
                    _give_to_first(queue)
                if queue:
                    self.given.acquire()
                queue.append(self._me)
            must_wait = self.given.locked()
            if must_wait and not self._wait_for_threads(start):
                raise self._timeout(start, **self.describe_holder())
            self._file = self.held(self.path, before_create=self.before_create, mode=self.mode)
            if self.is_taken(self._file.fd) or not self._file.try_lock():
                self._wait_for_processes(start)
                must_wait = True
            if must_wait and (waited_s := now_s() - start) > LONG_WAIT_S:
                log.debug("Session %r: waited %.3f s for its lock", self.session_id, waited_s)
            self.has_lock = True
            return self._file
        except OSError as error:
            self.release()
            if isinstance(error, PersistError):
                raise
            if isinstance(error, FileNotFoundError):
                raise Unreadable(path=os.path.dirname(self.path), reason="it is gone", errno=error.errno) from None
            if error.errno in _MAY_ONLY_READ:
                raise refused(self.session_id, self.path, error) from error
            reason = error.strerror or type(error).__name__
            facts: dict[str, Any] = {"path": self.path, "reason": reason, "errno": error.errno}
            log.warning("Session %r: the disk refused at %s: %s", self.session_id, self.path, reason)
            raise CommitFailed(session_id=self.session_id, **facts) from error
        except BaseException:
            self.release()
            raise

    def _take_over(self, lent: Hold) -> Any:
        """Take over the lock that this thread holds for its next verb.

        If the verb wants the lock of another session first, free the lent one.
        """
        if lent.path != self.path:
            lent.release()
            return self.acquire()
        with table:
            _queues[self.path][0] = self._me
        _hold_of[lent.thread] = self._me
        self.thread, lent.thread = lent.thread, 0
        self._file, lent._file = lent._file, None
        assert self._file is not None
        self.has_lock = True
        return self._file

    def describe_holder(self, waiting: Waiting | None = None) -> dict[str, str]:
        """Return the holder of the lock for which a thread waits, and a remedy, as the facts of a `LockTimeout`.

        The thread that waits for the calls of `waiting` may have the lock by now.
        """
        first = _first_in(self.path)
        if first is None or not first.has_lock or (waiting is not None and first.waiting is waiting):
            return {"holder": self._other_process()}
        return _described_thread(first)

    def _other_process(self) -> str:
        """Name the process that holds the lock, or return "unknown"."""
        return _process_that_holds(self.path)

    def _deadline(self, start: float) -> float:
        """Return the end of this hold's wait."""
        if self.waiting is None:
            return start + self.timeout_s
        self.waiting.has_tried = True
        return self.waiting.deadline

    def _wait_for_threads(self, start: float) -> bool:
        """Wait for the threads that asked before. Tell whether it is this thread's turn."""
        longest_s = threading.TIMEOUT_MAX if self.waiting is None else _LOOK_AGAIN_S
        while True:
            left_s = self._deadline(start) - now_s()
            if self.given.acquire(timeout=max(0.0, min(left_s, longest_s))):
                return True
            if self._deadline(start) <= now_s():
                return False

    def _wait_for_processes(self, start: float) -> None:
        """Wait until the file is locked. The process in the turnstile goes first."""
        assert self._file is not None
        has_turn, waiting_since = False, now_s()
        try:
            has_turn = turnstile.take(self._file.fd)
            while (now := now_s()) < (deadline := self._deadline(start)):
                waited_s = now - waiting_since
                outside_s = _POLL_FIRST_S * (1.0 - waited_s / _MOST_EAGER_AFTER_S) * random.uniform(0.5, 1.0)
                time.sleep(min(deadline - now, _POLL_NEXT_S if has_turn else max(_POLL_NEXT_S, outside_s)))
                if not self._file.bears_name():
                    # The holder removed the lock file, together with its turnstile.
                    has_turn = False
                    self._file.close()
                    self._file = HeldFile(self.path, before_create=self.before_create, mode=self.mode)
                has_turn = has_turn or turnstile.take(self._file.fd)
                if (has_turn or waited_s > PATIENCE_S) and self._file.try_lock():
                    return
            # A last try, because the lock may be free by now, or the process that is next may be stopped.
            if not self._file.try_lock():
                raise self._timeout(start, holder=self._other_process())
        finally:
            if has_turn:
                # The close of the file is not enough, because a child may have a copy of the descriptor.
                turnstile.leave(self._file.fd)

    def _timeout(self, start: float, **facts: Any) -> LockTimeout:
        log.debug("Session %r: waited in vain for its lock, %.3f s", self.session_id, now_s() - start)
        facts |= {"path": self.path, "timeout_s": self.timeout_s, "waited_s": now_s() - start}
        return LockTimeout(session_id=self.session_id, **facts)

    def release(self) -> None:
        """Give the lock up, even if `acquire` took only a part of it."""
        # Each step is done, even if a signal raises an exception in an earlier one. The thread is freed last, because a
        # signal handler of this thread must not wait before that. A child that was forked inside the block has only its
        # copy of the file.
        try:
            if self._file is not None:
                self._file.close()
        finally:
            if self.thread and self._pid == os.getpid():
                try:
                    with table:
                        queue = _queues.get(self.path) or deque()
                        if self._me in queue:
                            queue.remove(self._me)
                        if queue:
                            # This is needed also if this hold's turn came too late, or if an earlier release removed
                            # the hold and did no more.
                            _give_to_first(queue)
                        else:
                            _queues.pop(self.path, None)
                finally:
                    if _hold_of.get(self.thread) is self._me:
                        del _hold_of[self.thread]
            self.thread = 0

    def __del__(self) -> None:
        # A signal's exception may have come between any two steps.
        if getattr(self, "thread", 0):
            self.release()


def _give_to_first(queue: deque[ref[Hold]]) -> None:
    """Let the first hold of a queue go on, if it waits. A hold that is gone has given up its place."""
    while queue and (first := queue[0]()) is None:
        queue.popleft()
    if queue and first is not None and first.given.locked():
        first.given.release()


def _process_that_holds(path: str) -> str:
    """Name the process that holds a locked file, from the kernel's table (Linux), or return "unknown"."""
    try:
        status = os.stat(path)
        table = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return "unknown"
    # 1: FLOCK ADVISORY WRITE 812 fe:00:1234 0 EOF
    holders = {fields[5]: int(fields[4]) for fields in table if len(fields) > 5 and fields[1] == "FLOCK"}
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    # Some file systems (btrfs) show another device number there than stat() does. Then the inode has to be enough.
    same_inode = [pid for file, pid in holders.items() if file.rpartition(":")[2] == str(status.st_ino)]
    pid = holders.get(f"{device}:{status.st_ino}", same_inode[0] if same_inode else None)
    return "unknown" if pid is None else describe_process(pid)


def _first_in(path: str) -> Hold | None:
    queue = _queues.get(path)
    try:
        return queue[0]() if queue else None
    except IndexError:
        # The only hold has left just now.
        return None


def _described_thread(hold: Hold) -> dict[str, str]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    name = names.get(hold.thread, "unknown")
    remedy = "Wait for longer (timeout_s), or leave that thread's transaction() sooner."
    return {"holder": f"this process (pid {os.getpid()}), thread {name!r}", "remedy": remedy}


def describe_process(pid: int) -> str:
    """Name a process for a message: "pid 812 (uvicorn)"."""
    if pid <= 0:
        return "a process outside this container"
    try:
        return f"pid {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"pid {pid}"


def _forget_in_child() -> None:
    _queues.clear()
    _hold_of.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
