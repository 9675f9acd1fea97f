"""Mutants of the API for event loops, and of the queues in which its calls wait."""

from __future__ import annotations

from mutation.catalogue.suites import AIO, AIO_WAITING
from mutation.edits import (
    Edit,
    condition,
    drop_call,
    drop_handler,
    drop_keyword,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    replace_statement,
)
from mutation.mutant import Change, Mutant

MODULE, CALLS, LOCK = "aio.py", "calls.py", "storage/lock.py"


def _waiting(name: str, module: str, function: str, edit: Edit, select: str, *also: Change) -> Mutant:
    return Mutant(f"aio: {name}", module, function, edit, AIO_WAITING, select, also)


MUTANTS = (
    Mutant(
        "aio: the wait for a cancelled write",
        CALLS,
        "Threads.run",
        condition("not is_cleaning_up and queue.leave(call)", "queue.leave(call) or True"),
        AIO,
        "again_and_again",
    ),
    Mutant(
        "aio: the end of the stream of a cancelled start",
        MODULE,
        "Store._started",
        drop_keyword("self._threads.run", "undo"),
        AIO,
        "cancelled_start",
    ),
    Mutant(
        "aio: the way out of a block that a cancellation does not stop",
        MODULE,
        "Stream.__aexit__",
        drop_keyword("self._threads.run", "is_cleaning_up"),
        AIO,
        "turn_is_marked",
    ),
    _waiting(
        "one thread for all calls of a session",
        CALLS,
        "_Pools.put_in_session",
        replace_expression("self._queues.get(session_id)", "None"),
        "hold_up_no_other",
    ),
    _waiting(
        "the time-out in the loop",
        CALLS,
        "Threads._expire",
        condition("not queue.waiting.has_tried and lock.Waiting.left_s(call.deadline) > -_FIRST_TRY_S", "True"),
        "same_loop_counts",
    ),
    _waiting(
        "the first try of a call",
        CALLS,
        "Threads._expire",
        condition("not queue.waiting.has_tried and lock.Waiting.left_s(call.deadline) > -_FIRST_TRY_S", "False"),
        "now_or_never",
    ),
    _waiting(
        "the longer wait for a call that comes later",
        LOCK,
        "Waiting.extend",
        replace_statement("self.deadline = max(self.deadline, deadline)", "self.deadline = self.deadline or deadline"),
        "outlives",
    ),
    _waiting(
        "the end of a task that only waits",
        CALLS,
        "Threads.run",
        condition("not is_cleaning_up and queue.leave(call)", "False"),
        "ends_at_once",
    ),
    _waiting(
        "the removal of a call that was cancelled",
        CALLS,
        "Queue.leave",
        replace_statement("del self._calls[call]", "pass"),
        "ends_at_once",
    ),
    _waiting(
        "the end of a wait that nobody wants",
        CALLS,
        "Queue.leave",
        drop_call("self.waiting.give_up"),
        "stops_waiting",
    ),
    _waiting(
        "the lease of a block that gets no lock",
        MODULE,
        "Stream.__aexit__",
        drop_call("self._sync._close"),
        "also_where_its_session or given_up_also",
    ),
    _waiting(
        "the encoding before the hop",
        MODULE,
        "Session.save",
        replace_expression(
            "partial(session._write_apart, base, mine, touch, on_conflict, timeout_s)",
            "lambda: session._write_apart(base, session._encode(), touch, on_conflict, timeout_s)",
        ),
        "found_when_it_was_called",
    ),
    _waiting(
        "one verb of an object after the other",
        MODULE,
        "Session._alone",
        replace_call("turn.acquire", "asyncio.sleep(0)"),
        "follow_one_another or same_object_counts",
        Change(MODULE, "Session._alone", drop_call("turn.release")),
    ),
    _waiting(
        "the wait for another verb of the same object",
        MODULE,
        "Session._alone",
        replace_call("asyncio.timeout", "asyncio.timeout(None)"),
        "same_object_counts",
    ),
    _waiting(
        "the look whether others have only added items",
        "session.py",
        "Session._take_written",
        drop_operand("all(each.is_splice and not each.remove for each in changes)"),
        "others_committed",
    ),
    _waiting(
        "the result of a save whose task is cancelled",
        CALLS,
        "Threads.run",
        condition("call.error is None and apply is not None", "cancellation is None and apply is not None"),
        "cancelled_is_taken",
    ),
    _waiting(
        "the lock of the loop that runs",
        MODULE,
        "Session._alone",
        condition("self._turn_in is not loop", "self._turn_in is None"),
        "one_loop_after_the_other",
    ),
    _waiting(
        "the base of a save of another loop",
        "session.py",
        "Session._write_apart",
        condition("self._base is not base", "False"),
        "left_behind_counts_once",
    ),
    _waiting(
        "the edit that is no JSON",
        "session.py",
        "Session._take",
        drop_handler("errors.PersistError"),
        "edit_that_is_no_json",
    ),
    _waiting(
        "the end of a queue that gets no thread",
        CALLS,
        "_Pools.put_in_session",
        drop_statement("del self._queues[session_id]"),
        "gets_no_thread",
    ),
    _waiting(
        "the queues of a forked child",
        CALLS,
        "Threads._here",
        condition("self._pools.pid != os.getpid()", "False"),
        "queues_of_its_own",
    ),
    _waiting(
        "the queues that a forked thread leaves alone",
        CALLS,
        "_Pools._goes_on",
        condition("self.pid != os.getpid()", "False"),
        "function_of_update_forks",
        Change(CALLS, "Queue.pop", condition("self._pid != os.getpid()", "False")),
    ),
    _waiting(
        "the lock that a verb takes over",
        LOCK,
        "Hold.acquire",
        condition("outer is not None and is_lent and not table._is_owned()", "False"),
        "now_or_never",
    ),
)
