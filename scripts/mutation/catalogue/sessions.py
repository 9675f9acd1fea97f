"""Mutants of session objects: what a save compares, merges, refuses and remembers."""

from __future__ import annotations

from mutation.catalogue.suites import HAZARDS, LOST_UPDATES, REQUESTS, SESSION, SHARED_SESSIONS
from mutation.edits import (
    Edit,
    condition,
    drop_call,
    drop_context,
    drop_handler,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    replace_statement,
)
from mutation.mutant import Change, Mutant

MODULE = "session.py"


def _saved(name: str, function: str, edit: Edit, tests: tuple[str, ...], select: str) -> Mutant:
    return Mutant(f"save: {name}", MODULE, function, edit, tests, select)


def _merged(name: str, function: str, edit: Edit, tests: tuple[str, ...], select: str) -> Mutant:
    return Mutant(f"save: {name}", "content_merge.py", function, edit, tests, select)


MUTANTS = (
    _saved(
        "the merge",
        "Session._write",
        replace_statement(
            "is_current = base.is_whole and there.header.commit == base.header.commit", "is_current = True"
        ),
        HAZARDS,
        "a3 or c2 or c3",
    ),
    _saved(
        "the incarnation",
        "Session._refuse_other",
        condition("there.header.incarnation != self._base.header.incarnation", "False"),
        HAZARDS,
        "c1",
    ),
    _saved("the refusal of removals in mid-turn", "Session._write", drop_call("self._refuse_removal"), HAZARDS, "b2"),
    Mutant(
        "the version that an edit was decided on",
        "transaction.py",
        "require_version",
        condition("if_version is not None and copy.version != if_version", "False"),
        HAZARDS,
        "a9",
    ),
    Mutant(
        "the version that a delete was decided on",
        "store.py",
        "Store.delete",
        condition("if_version is not None", "False"),
        REQUESTS,
        "delete_of_a_version",
    ),
    Mutant(
        "the session that a version asks for",
        "store.py",
        "Store.transaction",
        drop_operand("if_version is None"),
        REQUESTS,
        "creates_none",
    ),
    Mutant(
        "the look for the session that a first write would make",
        "working_copy.py",
        "WorkingCopy.of",
        drop_operand("not tx.exists()"),
        REQUESTS,
        "first_writes",
    ),
    # The edit changes a copy that was read before the lock was held.
    Mutant(
        "the re-read of an edit under the lock",
        "store.py",
        "Store.transaction",
        replace_expression("WorkingCopy.of(tx, create=is_new)", "WorkingCopy(earlier, tx)"),
        LOST_UPDATES,
        "kept and edit-1",
        (
            Change(
                "store.py",
                "Store.transaction",
                replace_expression(
                    "self._locked(session_id, timeout_s)",
                    "((earlier := self._open().engine.read(session_id)), IT)[1]",
                ),
            ),
            Change("store.py", "Store.transaction", replace_statement("yield block", "tx.read()\nyield block")),
        ),
    ),
    _merged(
        "the stream fields of the disk",
        "merge_contents",
        drop_statement("base, mine = (with_stream_fields_of(theirs, side) for side in (base, mine))"),
        SHARED_SESSIONS,
        "never_writes_none",
    ),
    _merged(
        "the look for a list that a preference drops",
        "merge_contents",
        condition("type(dropped.get(name)) is list and type(found.get(name)) is not list", "False"),
        SESSION,
        "never_drops",
    ),
    # --- a save that was cut off ---
    _saved(
        "the recognition of one that was cut off",
        "Session.save",
        drop_call("self._recognise"),
        SHARED_SESSIONS,
        "cut_off_counts_once",
    ),
    _saved(
        "the refusal where nobody can tell",
        "Session._recognise",
        condition("there.header.commit == base.header.commit", "True"),
        SHARED_SESSIONS,
        "cut_off_under_the_commit",
    ),
    _saved(
        "the sync of one that was cut off",
        "Session._recognise",
        replace_expression("self._take(there, mine, is_durable=False)", "self._take(there, mine, is_durable=True)"),
        SHARED_SESSIONS,
        "cut_off_is_made_durable",
    ),
    _saved(
        "the note that one was refused",
        "Session._write",
        drop_statement("self._base = structs.replace(base, is_durable=False)"),
        SHARED_SESSIONS,
        "refused_may_be_repeated",
    ),
    _saved(
        "the rest that is shown after an exception",
        "Session._show",
        drop_handler("BaseException"),
        SHARED_SESSIONS,
        "any_line",
    ),
    _saved(
        "the unsaved edits of what a clear has changed",
        "Session._show_changes",
        condition("json_codec.encode_all_unchecked(live[change.at:stop]) != old", "False"),
        SHARED_SESSIONS,
        "beside_a_contradiction or keeps_unsaved",
    ),
    _saved(
        "the look whether a clear changed what the object is based on",
        "Session._show_cleared",
        drop_operand("self._base.header.commit == cleared.before.header.commit"),
        SHARED_SESSIONS,
        "clear",
    ),
    _saved(
        "the look whether the merge base is the content of its commit",
        "Session._write",
        drop_operand("base.is_whole"),
        SHARED_SESSIONS,
        "mixed_base",
    ),
    # --- durability ---
    _saved(
        "the sync of what others committed",
        "Session._write",
        drop_operand("is_current"),
        SHARED_SESSIONS,
        "made_durable",
    ),
    _saved(
        "the sync of what a refresh has read",
        "Session._refresh",
        replace_expression(
            "self._merge_in(there, self._base.content, is_durable=False)",
            "self._merge_in(there, self._base.content, is_durable=self._base.is_durable)",
        ),
        SHARED_SESSIONS,
        "made_durable",
    ),
    # --- one object ---
    _saved(
        "the guard between refresh and save",
        "Session.save",
        drop_context("self._alone()"),
        SHARED_SESSIONS,
        "exclude_each_other or waits_for_the_one",
    ),
    _saved(
        "the refusal of a verb in the middle of one",
        "Session._alone",
        condition("self._guard._is_owned()", "False"),
        SHARED_SESSIONS,
        "in_the_middle_of_one",
    ),
    _saved(
        "the look of a child whose guard it is",
        "Session._alone",
        condition("self._pid != os.getpid()", "False"),
        SHARED_SESSIONS,
        "another_thread_is_inside",
    ),
    _saved(
        "the look for an edit while it ran",
        "Session._merge_in",
        replace_call("merge_contents", "there.content"),
        SHARED_SESSIONS,
        "contradicts",
    ),
)
