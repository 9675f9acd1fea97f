"""Mutants of leases, and of what a turn does to the messages."""

from __future__ import annotations

from mutation.catalogue.suites import HAZARDS, SEED_RACE, STREAMS
from mutation.edits import condition, drop_statement, replace_call, replace_statement
from mutation.mutant import Change, Mutant

LEASE = "storage/lease.py"
TURN = "turn.py"

# A lease is alive in the process that has taken it, and dead in every other.
KNOWN_HERE_ONLY = replace_call("try_hold", "None if path in vars(take).get('here', ()) else IT or HeldFile()")
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

MUTANTS = (
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
        "append_once",
        condition("place is None", "True"),
        HAZARDS,
        "d2",
    ),
)
