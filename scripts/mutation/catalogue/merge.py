"""Mutants of the three-way merge and of the patch that brings its result into a document."""

from __future__ import annotations

from mutation.catalogue.suites import MERGE, SHARED_SESSIONS
from mutation.edits import condition, replace_expression, replace_statement
from mutation.mutant import Change, Mutant

MODULE = "merge.py"

MUTANTS = (
    Mutant(
        "the look whether another thread has set a field",
        MODULE,
        "_Patch.value",
        replace_expression("wanted if same(known, target) else target", "wanted"),
        SHARED_SESSIONS,
        "field_set_while",
    ),
    # A clash is settled by taking one side's whole list, which lacks what the other side has added.
    Mutant(
        "merge: both additions under a preference",
        MODULE,
        "_Merger.array",
        replace_statement(
            "raise MergeConflict(path=path, reason=clash.reason, base=b, mine=m, theirs=t) from None",
            "return self.conflict(path, clash.reason, b, m, t)",
        ),
        MERGE,
        "preference",
        (Change(MODULE, "_Merger.added_beside", condition('self.prefer == "error"', "True")),),
    ),
)
