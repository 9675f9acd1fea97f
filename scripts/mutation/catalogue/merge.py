"""Mutants of the three-way merge."""

from __future__ import annotations

from mutation.catalogue.suites import MERGE
from mutation.edits import condition, replace_statement
from mutation.mutant import Change, Mutant

MODULE = "merge.py"

MUTANTS = (
    # A clash is settled by taking one side's whole list, which lacks what the other side has added.
    Mutant(
        "merge: both additions under a preference",
        MODULE,
        "_Merger.array",
        replace_statement(
            "raise MergeConflict(path=path, reason=str(clash), base=b, mine=m, theirs=t) from None",
            "return self.conflict(path, str(clash), b, m, t)",
        ),
        MERGE,
        "preference",
        (Change(MODULE, "_Merger.added_beside", condition('self.prefer == "error"', "True")),),
    ),
)
