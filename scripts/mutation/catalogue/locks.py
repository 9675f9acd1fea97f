"""Mutants of the session's lock, of the queue for it, and of what a fork does to it."""

from __future__ import annotations

from mutation.catalogue.suites import HAZARDS, LOCKS, LOST_UPDATES, SEED_RACE, STREAMS
from mutation.edits import (
    Edit,
    body,
    drop_call,
    drop_handler,
    drop_keyword,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    return_now,
)
from mutation.mutant import Change, Mutant

LOCK = "storage/lock.py"
HELD = "storage/held.py"
TURNS = "storage/turns.py"

# The lock file is opened, and whether it is locked does not matter.
NO_FILE_LOCK = body("""
    held.open()
    return True
""")
NO_MUTEX = Change(LOCK, "FifoMutex.acquire", return_now("True"))
# A file that has any name at all counts as the one that was looked for.
ANY_NAME = replace_call("disk.bears_name", "os.fstat(self.fd).st_nlink > 0")
NOTHING_CLOSED = drop_call("os.close")


def _without_file_lock(name: str, tests: tuple[str, ...], select: str, *also: Change) -> Mutant:
    return Mutant(name, LOCK, "_in_turn", NO_FILE_LOCK, tests, select, also)


def _waiting(name: str, function: str, edit: Edit, select: str) -> Mutant:
    return Mutant(name, LOCK, function, edit, LOCKS, select)


MUTANTS = (
    _without_file_lock("the lock, between threads", SEED_RACE, "TwoThreads and cannot_start", NO_MUTEX),
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
        "hold",
        drop_operand("outer is not None"),
        LOCKS,
        "second_lock",
    ),
    Mutant(
        "the refusal of a handler inside the table",
        LOCK,
        "hold",
        drop_operand("table._is_owned()"),
        LOCKS,
        "inside_the_table",
    ),
    # --- the file behind the name ---
    Mutant(
        "the look at the name",
        HELD,
        "HeldFile.open",
        drop_operand("disk.bears_name(self._file, path)"),
        LOCKS,
        "deleted_session",
        (Change(HELD, "HeldFile.take", replace_call("disk.bears_name", "True")),),
    ),
    Mutant(
        "the inode behind the name",
        HELD,
        "HeldFile.open",
        ANY_NAME,
        LOCKS,
        "hard_link",
        (Change(HELD, "HeldFile.take", ANY_NAME),),
    ),
    _waiting(
        "a new attempt when the lock file was removed",
        "_Place.wait",
        replace_expression(
            "self.file if self.file.take(self._path) else None",
            "self.file if self.file.take(self._path) else _poll(self._path, deadline)",
        ),
        "file_that_was_removed",
    ),
    # --- the queue of processes ---
    _waiting(
        "the end of the queue for the process that frees the lock",
        "_in_turn",
        drop_keyword("held.open", "in_turn"),
        "left_to_who_waits",
    ),
    _waiting(
        "the limit of patience with a process that is stopped",
        "_Place.wait",
        replace_expression("PATIENCE_S", "threading.TIMEOUT_MAX"),
        "that_is_stopped",
    ),
    _waiting(
        "the look whether the queue moves, before it is overtaken",
        "_Place.wait",
        drop_operand("head == before"),
        "that_moves",
    ),
    Mutant(
        "the wait for the process before",
        TURNS,
        "queue_up",
        replace_expression("place - 1 if place > _FIRST else None", "None"),
        LOCKS,
        "order_in_which or in_the_middle",
    ),
    Mutant(
        "the wait for the others behind a process that gave up",
        TURNS,
        "queue_up",
        replace_call("_taken", "None"),
        LOCKS,
        "in_the_middle",
    ),
    Mutant("the search for another place that is free", TURNS, "_take_last", drop_handler("OSError"), LOCKS, "at_once"),
    # --- the thread that waits in the kernel ---
    _waiting("the file of a thread that waits", "_in_turn", drop_statement("place = queued"), "exception_behind"),
    _waiting(
        "the unlocking after a caller has left the queue",
        "_Place._give_back",
        drop_call("self.file.unlock_on_close"),
        "that_gave_up",
    ),
    _waiting("the one thread that waits for a file", "_place", replace_call("_places.get", "None"), "that_gave_up"),
    _waiting("polling where the kernel has no queue", "_Place.wait", replace_call("_poll", "None"), "kernel_refuses"),
    _waiting("polling where no thread can be started", "_Place.take", drop_handler("RuntimeError"), "cannot_queue"),
    _waiting(
        "polling in a green thread",
        "_place",
        drop_operand("not isinstance(_thread.start_new_thread, types.BuiltinFunctionType)"),
        "cannot_queue",
    ),
    # --- forks ---
    Mutant(
        "the forgetting of the parent's locks in a child",
        LOCK,
        "_forget_in_child",
        drop_call("_turn_of.clear"),
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
        drop_operand("self._pid != os.getpid()"),
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
