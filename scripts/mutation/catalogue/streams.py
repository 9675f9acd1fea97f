"""Mutants of leases, and of what a turn does to the messages."""

from __future__ import annotations

from mutation.catalogue.suites import EVENTS, FINALISERS, HAZARDS, REPAIR, REQUESTS, SEED_RACE, SHARED_SESSIONS, STREAMS
from mutation.edits import (
    condition,
    drop_call,
    drop_keyword,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    replace_statement,
)
from mutation.mutant import Change, Mutant

LEASE = "storage/lease.py"
TURN = "turn.py"
MODULE = "streams.py"

# A lease is alive in the process that has taken it, and dead in every other.
KNOWN_HERE_ONLY = replace_call("try_hold", "None if path in vars(take).get('here', ()) else IT or HeldFile(path)")
REMEMBERED_HERE = Change(
    LEASE,
    "take",
    replace_statement(
        "return held",
        """
        vars(take).setdefault("here", set()).add(path)
        return held
        """,
    ),
)

COMPARE = drop_operand("not _is_same(active, stream_id)")
FENCE = "owner is None or active_stream_id != self.id or header.epoch != self.epoch"

MUTANTS = (
    Mutant(
        "repair: a live turn is left alone",
        MODULE,
        "repair_tool_calls",
        drop_call("require_free"),
        REPAIR,
        "live_turn",
    ),
    Mutant(
        "repair: the calls of a turn that breaks off",
        MODULE,
        "_settle_tool_calls",
        condition("copy.has_list(turn.MESSAGES)", "False"),
        REPAIR,
        "breaks_off or killed_between",
    ),
    Mutant(
        "the compare of a clear, between threads", MODULE, "clear_stale", COMPARE, SEED_RACE, "TwoThreads and spares"
    ),
    Mutant(
        "the compare of a clear, between processes",
        MODULE,
        "clear_stale",
        COMPARE,
        SEED_RACE,
        "TwoProcesses and spares",
    ),
    Mutant("the compare of a clear (A1)", MODULE, "clear_stale", COMPARE, HAZARDS, "a1"),
    Mutant(
        "the incarnation in a clear",
        MODULE,
        "clear_stale",
        drop_operand("incarnation not in (None, copy.header.incarnation)"),
        SHARED_SESSIONS,
        "not_cleared_by_an_old_object",
    ),
    Mutant(
        "the fence",
        MODULE,
        "Stream._require_ownership",
        condition(FENCE, "owner is None"),
        (*HAZARDS, *STREAMS),
        "a5 or fences",
        (Change(MODULE, "owner_of", replace_expression("owner if owner.stream_id == stream_id else None", "owner")),),
    ),
    # A stream whose owner record is gone takes itself for the owner.
    Mutant(
        "the fence that fails closed",
        MODULE,
        "Stream._require_ownership",
        replace_expression("owner_of(header, self.id)", "IT or StreamOwner(self.id, 0, '', '', '')"),
        HAZARDS,
        "a6",
    ),
    Mutant(
        "the epoch in the fence",
        MODULE,
        "Stream._require_ownership",
        drop_operand("header.epoch != self.epoch"),
        SHARED_SESSIONS,
        "older_epoch",
    ),
    Mutant(
        "the incarnation in the fence",
        MODULE,
        "Stream._require_ownership",
        condition("header.incarnation != self._incarnation", "False"),
        STREAMS,
        "earlier_incarnation",
    ),
    Mutant(
        "the time that a repair keeps",
        MODULE,
        "_take_away",
        drop_keyword("before.header.next", "touch"),
        (*SEED_RACE, *HAZARDS),
        "keeps_updated_at or b7",
    ),
    Mutant(
        "the removal of the lease of a failed claim",
        MODULE,
        "start",
        condition("isinstance(error, errors.PersistError)", "False"),
        HAZARDS,
        "a8_failed_launch",
    ),
    Mutant(
        "events: the look at the owner before the first",
        MODULE,
        "Stream.emit",
        drop_call("self._require_ownership"),
        EVENTS,
        "first_emission_of",
    ),
    Mutant(
        "liveness across processes",
        LEASE,
        "probe",
        KNOWN_HERE_ONLY,
        SEED_RACE,
        "lives_in_another_process",
        (REMEMBERED_HERE,),
    ),
    Mutant(
        "liveness across processes (one winner)", LEASE, "probe", KNOWN_HERE_ONLY, STREAMS, "forty", (REMEMBERED_HERE,)
    ),
    Mutant(
        "the look for a stream that runs the same prompt",
        MODULE,
        "start",
        drop_call("_refuse_started"),
        REQUESTS,
        "three_processes",
    ),
    Mutant(
        "the look for the answer that says whose it is",
        TURN,
        "answer_to",
        condition("linked is not None", "False"),
        ("tests/contract/test_once.py",),
        "wherever_it_stands",
    ),
    Mutant(
        "the interruption that makes a prompt one without an answer",
        TURN,
        "answer_to",
        drop_operand("not there.get(INTERRUPTED)"),
        ("tests/contract/test_once.py",),
        "taken_up_again or up_again",
    ),
    Mutant(
        "the refusal of a second message of a running turn's id",
        MODULE,
        "refuse_twins",
        condition("turn.has_twin(after, own) and not turn.has_twin(before, own)", "False"),
        ("tests/contract/test_stream_transaction.py",),
        "has_no_twin",
    ),
    Mutant(
        "the prompt of an old server that has no stream",
        MODULE,
        "start",
        drop_operand('copy.fields.get("pending_user_message")'),
        ("tests/unit/verbs/test_pending_prompt.py",),
        "without_a_stream",
    ),
    Mutant(
        "the fence of a stream's transaction",
        MODULE,
        "Stream._owned",
        replace_expression(
            "self._require_ownership(copy.header, active_in(copy.committed))",
            "StreamOwner(self.id, 0, '', '', '')",
        ),
        REQUESTS,
        "not_entered",
    ),
    Mutant(
        "the place of what a stream's transaction adds",
        MODULE,
        "Stream.transaction",
        condition("is_last", "False"),
        REQUESTS,
        "before_the_partial",
    ),
    Mutant(
        "the look for a partial answer that a block removes",
        MODULE,
        "checked",
        drop_call("require_free"),
        REQUESTS,
        "removal_of and not delete",
    ),
    Mutant(
        "the look for a live stream before a delete in a block",
        "store.py",
        "Store.transaction",
        replace_expression("streams.require_free(tx)", "None"),
        REQUESTS,
        "removal_of and delete",
        (Change(MODULE, "delete", condition("not force", "False")),),
    ),
    Mutant(
        "the mark on prompt and partial",
        TURN,
        "interrupt",
        drop_statement("messages[place][INTERRUPTED] = True"),
        HAZARDS,
        "b3 or d4",
    ),
    Mutant(
        "the replacement of the partial",
        TURN,
        "put_answer",
        replace_statement("messages[place] = answer", "messages.append(answer)"),
        HAZARDS,
        "d1",
    ),
    Mutant(
        "the look for an item of the same id before an append",
        TURN,
        "add_once",
        condition("(place := messages.place_of(identity, key)) is not None", "IT and False"),
        HAZARDS,
        "d2",
    ),
    # --- finalisers ---
    Mutant(
        "the warning for a stream whose lease was finalised first",
        MODULE,
        "Stream.__del__",
        drop_operand("lease.is_dropped"),
        FINALISERS,
        "one_warning and cycle",
    ),
    Mutant(
        "the silence of a stream at the end of the interpreter",
        MODULE,
        "Stream.__del__",
        replace_call("_is_ending", "False"),
        FINALISERS,
        "end_of_the_interpreter and module",
    ),
)
