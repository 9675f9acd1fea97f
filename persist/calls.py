"""The calls of event loops. Each session has a queue, and one thread waits for it, however many calls wait.

    call = function + time-out, put into the queue of its session by a task
    thread of the queue: lock the session -> take the first call out of the queue -> run it -> free the lock

A call waits as long as it is in the queue. It is taken out only once. If the thread takes it out, the call has begun.
Otherwise its task takes it out, because the task was cancelled or has waited for too long. So a task that only waits
can end at once, and nothing is done for it later. A call that has begun runs to its end, and its task waits for that.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from persist.arguments import seconds
from persist.engine import Engine, Held
from persist.errors import LockTimeout
from persist.storage import lock

#: How many calls of a store read at the same time, each in its thread.
QUICK_THREADS = 16
#: How many sessions are waited for and written at the same time.
SESSION_THREADS = 128
#: How many calls look at sessions of their own choice at the same time, as a sweep does.
LOOK_THREADS = 128
#: A call is late only after its session was tried once, because a busy machine may not try it in time. `_FIRST_TRY_S`
#: later it is late in any case, because all threads may be taken. `_ASK_AGAIN_S` is the pause between two looks.
_FIRST_TRY_S, _ASK_AGAIN_S = 1.0, 0.01
#: How long a description of a session's holder counts as new.
_DESCRIBED_FOR_S = 0.05


class Call:
    """A function that a thread runs for a task.

    Attributes:
        is_done: whether it has ended, with `result` or with `error`. Only the thread of the loop sets and reads it.
        deadline: the end of its wait for the session, by the clock of the locks.
        timer: ends the wait in time.
    """

    __slots__ = (
        "_context",
        "_function",
        "_loop",
        "_waker",
        "deadline",
        "error",
        "is_done",
        "result",
        "timeout_s",
        "timer",
        "waited_s",
    )

    def __init__(
        self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop, timeout_s: float, waited_s: float
    ) -> None:
        self._context = contextvars.copy_context()
        self._function = function
        self._loop = loop
        self._waker: asyncio.Future[None] | None = None
        self.deadline = 0.0
        self.error: BaseException | None = None
        self.is_done = False
        self.result: Any = None
        self.timeout_s = timeout_s
        self.timer: asyncio.TimerHandle | None = None
        self.waited_s = waited_s

    def run(self) -> None:
        """Call the function, in a thread. Call `end` when the session is free again."""
        try:
            self.result = self._context.run(self._function)
        except BaseException as error:
            self.error = error

    def fail(self, error: BaseException) -> None:
        """End the call without having begun it, from any thread."""
        self.error = error
        self.end()

    def end(self) -> None:
        """Tell the task that the call is done, from any thread."""
        # RuntimeError: the loop has ended, and nobody waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.end_in_loop)

    def end_in_loop(self) -> None:
        """Tell the task that the call is done, from the thread of its loop."""
        self.is_done = True
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def wait(self) -> asyncio.Future[None]:
        """Return a future for the task to await. It is new each time, because a cancelled task cancels it, too."""
        self._waker = self._loop.create_future()
        return self._waker

    def stop_timer(self) -> None:
        """Forget the time-out, because the wait has ended."""
        if self.timer is not None:
            self.timer.cancel()

    def take_result(self) -> Any:
        """Return the result, or raise the error. The call forgets both.

        Otherwise the thread, which may still have the call, could be the last one to drop a result. And the traceback
        of an error leads back here.
        """
        result, self.result = self.result, None
        error, self.error = self.error, None
        if error is None:
            return result
        try:
            raise error
        finally:
            del error

    def timed_out(self, session_id: str, path: Any, described: dict[str, str]) -> LockTimeout:
        """Return the error for a call that has waited for too long. `described` tells who holds the session."""
        waited_s = self.timeout_s - lock.Waiting.left_s(self.deadline)
        facts: dict[str, Any] = {"path": path, "timeout_s": self.timeout_s, "waited_s": waited_s}
        return LockTimeout(session_id=session_id, **facts, **described)


class Queue:
    """The calls that wait for one session, or for a thread alone, in the order of their arrival.

    Attributes:
        session_id: None if they wait for a thread alone.
        waiting: how long the session's thread waits.
    """

    __slots__ = ("_calls", "_described", "_mutex", "_pid", "session_id", "waiting")

    def __init__(self, mutex: threading.Lock, session_id: str | None = None) -> None:
        # An OrderedDict finds its first entry in constant time, even after thousands were removed. A dict does not.
        self._calls: OrderedDict[Call, None] = OrderedDict()
        self._described: tuple[float, dict[str, str]] = -1.0, {}
        self._mutex = mutex
        self._pid = os.getpid()
        self.session_id = session_id
        self.waiting = lock.Waiting()

    def is_empty(self) -> bool:
        """Tell whether no call waits. The caller holds the mutex."""
        return not self._calls

    def put(self, call: Call) -> None:
        """Add a call to the queue. The caller holds the mutex."""
        self._calls[call] = None
        call.deadline = self.waiting.extend(call.timeout_s - call.waited_s)

    def pop(self) -> Call | None:
        """Take out the first call, which begins with that.

        None if no call waits, or if this is a forked child of the process where the calls wait.
        """
        if self._pid != os.getpid():
            return None
        with self._mutex:
            return self._calls.popitem(last=False)[0] if self._calls else None

    def leave(self, call: Call) -> bool:
        """Take out a call that nobody wants any more. False if it has begun."""
        with self._mutex:
            if call not in self._calls:
                return False
            del self._calls[call]
            if not self._calls:
                self.waiting.give_up()
            return True

    def refuse(self, error: BaseException) -> None:
        """End the calls that cannot begin: after a time-out the calls that are late, after another error the first."""
        if not isinstance(error, LockTimeout):
            first = self.pop()
            if first is not None:
                first.fail(error)
            return
        with self._mutex:
            late = [call for call in self._calls if lock.Waiting.left_s(call.deadline) <= 0]
            for call in late:
                del self._calls[call]
        for call in late:
            call.fail(call.timed_out(error.session_id, error.path, {"holder": error.holder, "remedy": error.remedy}))

    def describe_holder(self, hold: Held, now: float) -> dict[str, str]:
        """Tell who holds the session. Hundreds of calls that are late together look once."""
        if now > self._described[0] + _DESCRIBED_FOR_S:
            self._described = now, hold.describe_holder(self.waiting)
        return self._described[1]


class _Pools:
    """The threads of one process, and the queues that they serve."""

    def __init__(self, engine: Engine) -> None:
        self.pid = os.getpid()
        self._engine = engine
        #: Guards all queues. A thread that holds it waits for nothing else.
        self._mutex = threading.Lock()
        #: The queues that have a thread.
        self._queues: dict[str, Queue] = {}
        self._sessions = ThreadPoolExecutor(SESSION_THREADS, thread_name_prefix="persist-session")
        self._quick = Queue(self._mutex), ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="persist-quick")
        self._looks = Queue(self._mutex), ThreadPoolExecutor(LOOK_THREADS, thread_name_prefix="persist-look")

    def put(self, call: Call, *, is_quick: bool) -> Queue:
        """Let a call wait for a thread.

        Raises:
            RuntimeError: no more threads can be started. The call will not run.
        """
        queue, threads = self._quick if is_quick else self._looks
        try:
            with self._mutex:
                queue.put(call)
            threads.submit(_run_first, queue)
        except BaseException as error:
            # Also after Ctrl-C, because a call that is left behind would run in the place of a later one.
            if queue.leave(call) or not isinstance(error, RuntimeError):
                raise
        return queue

    def put_in_session(self, call: Call, session_id: str) -> Queue:
        """Let a call wait for its session.

        Raises:
            RuntimeError: no more threads can be started. The call will not run.
        """
        queue = None
        try:
            with self._mutex:
                queue = self._queues.get(session_id)
                has_thread = queue is not None
                if queue is None:
                    queue = self._queues[session_id] = Queue(self._mutex, session_id)
                queue.put(call)
            if not has_thread:
                self._sessions.submit(self._serve, queue)
            return queue
        except BaseException as error:
            if queue is None:
                raise
            # There is no thread, or Ctrl-C came in between. Calls of other loops may wait in this queue by now. They
            # are refused, too, because no thread will come.
            with self._mutex:
                if self._queues.get(session_id) is queue:
                    del self._queues[session_id]
            is_refused = queue.leave(call)
            refusal = error if isinstance(error, RuntimeError) else RuntimeError("The session's thread did not start.")
            while (other := queue.pop()) is not None:
                other.fail(refusal)
            if is_refused or not isinstance(error, RuntimeError):
                raise
            return queue

    def _serve(self, queue: Queue) -> None:
        """Run the calls of a session, one in each hold of its lock, until none waits."""
        while self._goes_on(queue):
            call = None
            try:
                assert queue.session_id is not None
                hold = self._engine.transaction(queue.session_id, 0.0)
                hold.waiting = queue.waiting
                with hold:
                    queue.waiting.has_tried = queue.waiting.is_lent = True
                    call = queue.pop()
                    if call is not None:
                        # The verb of the call takes over the lock, and frees it.
                        call.run()
            except BaseException as error:
                if call is None:
                    queue.refuse(error)
                else:
                    call.error = error
            finally:
                # The session is free again, and it was not tried yet for the next call.
                queue.waiting.has_tried = queue.waiting.is_lent = False
            if call is not None:
                call.end()

    def _goes_on(self, queue: Queue) -> bool:
        assert queue.session_id is not None
        if self.pid != os.getpid():
            # A function of `update` has forked, and its thread goes on in the child.
            return False
        with self._mutex:
            # Another queue is there if this queue's thread could not be started at first.
            is_current = self._queues.get(queue.session_id) is queue
            if is_current and queue.is_empty():
                del self._queues[queue.session_id]
            return is_current and not queue.is_empty()


def _run_first(queue: Queue) -> None:
    call = queue.pop()
    if call is not None:
        call.run()
        call.end()


class Threads:
    """The threads that run the verbs of a store, apart from the threads that the application uses.

    Reads, sessions and looks have threads of their own, so that a session that is locked for long blocks no other work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pools = _Pools(engine)

    def _here(self) -> _Pools:
        if self._pools.pid != os.getpid():
            # A forked child has none of the threads.
            with _making:
                if self._pools.pid != os.getpid():
                    self._pools = _Pools(self._engine)
        return self._pools

    def timeout_s(self, timeout_s: float | None) -> float:
        """Return a verb's time-out, or the store's."""
        return self._engine.timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)

    async def run(
        self,
        function: Callable[[], Any],
        session_id: object = None,
        *,
        timeout_s: float | None = None,
        waited_s: float = 0.0,
        apply: Callable[[Any], Any] | None = None,
        undo: Callable[[Any], Awaitable[None]] | None = None,
        is_quick: bool = False,
        is_cleaning_up: bool = False,
    ) -> Any:
        """Call a function in a thread, and return its result.

        A task that is cancelled before the function has begun ends at once. A function that has begun runs to its end,
        and the cancellation is raised after that.

        Args:
            session_id: the session whose lock the function takes. None if it takes no lock, or several.
            timeout_s: seconds that the call waits for its session, in the place of the store's time-out.
            waited_s: seconds of that time that have passed already.
            apply: called with the result, in the loop's thread, also if the task was cancelled. `run` returns the value
                that it returns.
            undo: awaited with the result, if the task was cancelled and will not get the result.
            is_quick: whether the function waits for no session.
            is_cleaning_up: whether the function must run even if the task is cancelled before.

        Raises:
            LockTimeout: the session was not free in time.
            RuntimeError: no more threads can be started.
        """
        pools, loop = self._here(), asyncio.get_running_loop()
        timeout_s = self.timeout_s(timeout_s)
        call = Call(function, loop, timeout_s, waited_s)
        cancellation: asyncio.CancelledError | None = None
        if type(session_id) is str:
            queue = pools.put_in_session(call, session_id)
            call.timer = loop.call_later(timeout_s - waited_s, self._expire, queue, call)
        else:
            # The verb itself refuses a value that is no id.
            queue = pools.put(call, is_quick=is_quick)
        while not call.is_done:
            try:
                await call.wait()
            except asyncio.CancelledError as error:
                if not is_cleaning_up and queue.leave(call):
                    call.stop_timer()
                    raise
                cancellation = error
            except BaseException:
                # The task was dropped with its loop, or Ctrl-C ends the loop.
                queue.leave(call)
                raise
        call.stop_timer()
        if call.error is None and apply is not None:
            try:
                call.result = apply(call.result)
            except BaseException as error:
                call.error = error
        if cancellation is None:
            return call.take_result()
        if call.error is None and undo is not None:
            try:
                await undo(call.result)
            except Exception as failure:
                # The caller that cancelled waits for the cancellation, and for nothing else.
                cancellation.add_note(f"What was obtained could not be given back: {failure}")
        raise cancellation from call.error

    def _expire(self, queue: Queue, call: Call) -> None:
        """End a call that has waited for too long, in the thread of its loop."""
        loop = asyncio.get_running_loop()
        if not queue.waiting.has_tried and lock.Waiting.left_s(call.deadline) > -_FIRST_TRY_S:
            call.timer = loop.call_later(_ASK_AGAIN_S, self._expire, queue, call)
        elif queue.leave(call):
            session_id = str(queue.session_id)
            hold = self._engine.transaction(session_id)
            call.error = call.timed_out(session_id, hold.path, queue.describe_holder(hold, loop.time()))
            call.end_in_loop()


#: Two threads of a forked child may want their pools at the same time.
_making = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_making._at_fork_reinit)  # type: ignore[attr-defined]
