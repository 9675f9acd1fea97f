"""Mutants of the session's lock, of the turnstile before it, and of what a fork does to it."""

from __future__ import annotations

from mutation.catalogue.suites import CLOCKS, HAZARDS, LOCKS, LOST_UPDATES, SEED_RACE, STREAMS
from mutation.edits import (
    Edit,
    condition,
    drop_call,
    drop_handler,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    return_now,
)
from mutation.mutant import Change, Mutant

LOCK = "storage/lock.py"
HELD = "storage/held.py"
TURNSTILE = "storage/turnstile.py"

# The lock file is opened, and whether it is locked does not matter.
NO_FILE_LOCK = condition("self.is_taken(self._file.fd) or not self._file.try_lock()", "False")
NO_QUEUE = Change(LOCK, "Hold.acquire", drop_call("self.given.acquire"))
NOTHING_CLOSED = drop_call("os.close")
REMOVED = "file_that_was_removed"


def _without_file_lock(name: str, tests: tuple[str, ...], select: str, *also: Change) -> Mutant:
    return Mutant(name, LOCK, "Hold.acquire", NO_FILE_LOCK, tests, select, also)


def _waiting(name: str, edit: Edit, select: str) -> Mutant:
    return Mutant(name, LOCK, "Hold._wait_for_processes", edit, LOCKS, select)


MUTANTS = (
    _without_file_lock("the lock, between threads", SEED_RACE, "TwoThreads and cannot_start", NO_QUEUE),
    _without_file_lock("the lock, between processes", SEED_RACE, "TwoProcesses and cannot_start"),
    _without_file_lock("the lock (A4)", HAZARDS, "a4"),
    _without_file_lock("the lock (A12)", HAZARDS, "a12"),
    _without_file_lock("the lock (800 appends, save)", LOST_UPDATES, "kept and save-1"),
    _without_file_lock("the lock (800 appends, edit)", LOST_UPDATES, "kept and edit-1"),
    _without_file_lock("the lock (800 appends, append)", LOST_UPDATES, "kept and append-1"),
    _without_file_lock("the lock (one winner)", STREAMS, "forty"),
    Mutant(
        "the refusal of a second lock",
        LOCK,
        "Hold.acquire",
        drop_operand("outer is not None"),
        LOCKS,
        "second_lock",
    ),
    Mutant(
        "the refusal of a handler inside the table",
        LOCK,
        "Hold.acquire",
        drop_operand("table._is_owned()"),
        LOCKS,
        "inside_the_table",
    ),
    Mutant(
        "the clock that no test tool moves",
        LOCK,
        "Hold._wait_for_processes",
        replace_call("now_s", "time.monotonic()"),
        CLOCKS,
        "lock_timeout",
    ),
    Mutant(
        "the thread that itself waits for another process",
        LOCK,
        "Hold.describe_holder",
        drop_operand("not first.has_lock"),
        ("tests/contract/test_timeouts.py",),
        "names_the_process and auto",
    ),
    # --- the file behind the name ---
    Mutant("the look at the name", HELD, "HeldFile.bears_name", return_now("True"), LOCKS, "deleted_session"),
    # A file that has any name at all counts as the one that was looked for.
    Mutant(
        "the inode behind the name",
        HELD,
        "HeldFile.bears_name",
        replace_call("disk.bears_name", "os.fstat(self._fd).st_nlink > 0"),
        LOCKS,
        "hard_link",
    ),
    _waiting(
        "the new file of a lock file that was removed", condition("not self._file.bears_name()", "False"), REMOVED
    ),
    _waiting("the turnstile of the new file", drop_statement("has_turn = False"), REMOVED),
    # --- the turnstile ---
    Mutant(
        "the look at the turnstile before a lock is taken",
        LOCK,
        "Hold.acquire",
        drop_operand("self.is_taken(self._file.fd)"),
        LOCKS,
        "left_to_who_waits",
    ),
    Mutant(
        "the turn that is passed on by who came too late",
        LOCK,
        "Hold.release",
        drop_call("_give_to_first"),
        LOCKS,
        "passed_on or served_in_their_order",
    ),
    Mutant(
        "the place of a hold that is gone",
        LOCK,
        "_give_to_first",
        condition("queue and (first := queue[0]()) is None", "IT and False"),
        LOCKS,
        "that_is_gone",
    ),
    Mutant(
        "the number of a thread that no other gets soon",
        LOCK,
        "Hold.acquire",
        replace_call("threading.get_native_id", "threading.get_ident()"),
        LOCKS,
        "number_of_an_ended_one",
    ),
    _waiting(
        "the turnstile before polling",
        replace_expression("has_turn or waited_s > PATIENCE_S", "True"),
        "in_the_turnstile_is_next",
    ),
    _waiting(
        "the limit of patience with a process that is stopped",
        drop_operand("waited_s > PATIENCE_S"),
        "that_is_stopped",
    ),
    _waiting(
        "the last try of a caller that does not wait",
        condition("not self._file.try_lock()", "True"),
        "left_to_who_waits",
    ),
    _waiting("the leaving of the turnstile before the closing", drop_call("turnstile.leave"), "gave_up_keeps"),
    Mutant(
        "the turnstile that holds one",
        TURNSTILE,
        "take",
        replace_expression("error.errno not in (errno.EAGAIN, errno.EACCES)", "True"),
        LOCKS,
        "turnstile_holds_one",
    ),
    Mutant(
        "polling where the kernel has no such locks",
        TURNSTILE,
        "is_taken",
        drop_handler("OSError"),
        LOCKS,
        "has_no_such_locks",
    ),
    # --- forks ---
    Mutant(
        "the forgetting of the parent's locks in a child",
        LOCK,
        "_forget_in_child",
        drop_call("_hold_of.clear"),
        LOCKS,
        "forked_inside",
    ),
    Mutant(
        "the fork that goes on after a closed descriptor",
        HELD,
        "_forget_in_child",
        replace_call("suppress", "suppress()"),
        LOCKS,
        "somebody_closed",
    ),
    Mutant(
        "the child's look whose descriptor it is",
        HELD,
        "HeldFile.close",
        drop_operand("self.pid != os.getpid()"),
        LOCKS,
        "number_may_be_another",
    ),
    Mutant(
        "the closing of what a child inherited",
        HELD,
        "_forget_in_child",
        NOTHING_CLOSED,
        STREAMS,
        "forked_child_lives_on",
    ),
    Mutant(
        "the unlocking before the closing",
        HELD,
        "HeldFile.close",
        drop_call("unlock_descriptor"),
        LOCKS,
        "forked_parent",
        (Change(HELD, "_forget_in_child", NOTHING_CLOSED),),
    ),
)
