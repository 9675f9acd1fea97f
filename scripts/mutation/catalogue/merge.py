"""Mutants of the three-way merge."""

from __future__ import annotations

from mutation.catalogue.suites import MERGE, MERGE_LISTS
from mutation.edits import condition, replace_expression, replace_statement
from mutation.mutant import Mutant

MODULE = "merge.py"

MUTANTS = (
    # Two messages of one id, a placeholder say, are then one, and the other is lost.
    Mutant(
        "merge: ids that count only where no list has them twice",
        MODULE,
        "_labels",
        replace_expression("n > 1 or name in in_front", "name in in_front"),
        MERGE_LISTS,
        "small_merge_of_messages",
    ),
    # The items at the beginning that are the same objects in all lists are not compared. Their ids count, too.
    Mutant(
        "merge: a look at the ids of items that all lists share",
        MODULE,
        "_labels",
        replace_expression("n > 1 or name in in_front", "n > 1"),
        MERGE_LISTS,
        "small_merge_of_messages",
    ),
    # A text comes under another one's role.
    Mutant(
        "merge: ids that count only where the roles agree",
        MODULE,
        "_labels",
        condition("not same(role, roles.setdefault(name, role))", "False"),
        MERGE_LISTS,
        "small_merge_of_messages",
    ),
    Mutant(
        "merge: a conflict for two new items of one id",
        MODULE,
        "_Merger.item",
        condition("b is MISSING and MISSING not in (m, t) and (not same(m, t))", "False"),
        MERGE,
        "preference or contradiction",
    ),
    # The edit would vanish, although its side is preferred.
    Mutant(
        "merge: a preferred edit of what the other side removed",
        MODULE,
        "_Merger.array",
        condition("MISSING in versions and items[name] is not MISSING", "False"),
        MERGE,
        "preference",
    ),
    # F1: both sides stamp all old messages alike, and each appends one.
    Mutant(
        "merge: the changes that both made alike taken once",
        MODULE,
        "_merge_run",
        replace_statement("lead, tail = _ends(mine, theirs)", "lead, tail = 0, 0"),
        MERGE_LISTS,
        "both_make or stamp",
    ),
    Mutant(
        "merge: one run where both made the same of the whole base",
        MODULE,
        "_merge_labels",
        condition("lead + tail < len(base) or not rests.isdisjoint(base)", "True"),
        MERGE_LISTS,
        "both_make",
    ),
    Mutant(
        "merge: items replaced by as many beside the other side's additions",
        MODULE,
        "_merge_run",
        condition("len(side) == len(base) and other[at : at + len(base)] == base", "False"),
        MERGE,
        "do_not_contradict",
    ),
    Mutant(
        "merge: both removals where both sides only removed",
        MODULE,
        "_merge_run",
        condition('prefer == "error" and (not one | two <= was)', 'prefer == "error"'),
        MERGE,
        "do_not_contradict",
    ),
    # A conflict is settled by taking one side's run, which lacks what the other has added.
    Mutant(
        "merge: both additions under a preference",
        MODULE,
        "_merge_run",
        replace_expression("((side, left), (other, added))", "((side, left),)"),
        MERGE,
        "preference",
    ),
    # A conflict is settled by taking one side's run, which has what the other has removed.
    Mutant(
        "merge: the other side's removals under a preference",
        MODULE,
        "_merge_run",
        replace_expression("one - ((was & one) - two)", "one"),
        MERGE,
        "preference",
    ),
    Mutant(
        "merge: items with an id once, at whichever place a side gave them",
        MODULE,
        "_merge_labels",
        condition("type(name) is bytes or name not in now", "True"),
        MERGE_LISTS,
        "small_merge_of_messages",
    ),
    Mutant(
        "merge: the count of every item at last",
        MODULE,
        "_merge_labels",
        condition("not min(least, both) <= now[name] - before[name] <= max(least, both)", "False"),
        MERGE_LISTS,
        "small_merge_of_items",
    ),
)
