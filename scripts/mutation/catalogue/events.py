"""Mutants of a stream's events, and of following them."""

from __future__ import annotations

from mutation.catalogue.suites import CLOCKS, CRASH_STATES, EVENTS
from mutation.edits import condition, drop_statement, replace_expression
from mutation.mutant import Mutant

FILES = "event_log.py"
FOLLOWING = "follow.py"

MUTANTS = (
    Mutant(
        "events: the fence",
        FILES,
        "EventWriter.append",
        condition("os.lseek(fd, 0, os.SEEK_CUR) != self._end", "False"),
        EVENTS,
        "late_emission",
    ),
    Mutant(
        "events: the end at the end line",
        FILES,
        "EventReader._take",
        condition("self.ended is not None", "False"),
        EVENTS,
        "behind_the_end",
    ),
    Mutant(
        "events: the refusal of a gap in the offsets",
        FILES,
        "EventReader._take",
        condition("int(shape[1]) != self.count + 1", "False"),
        EVENTS,
        "behind_a_hole",
    ),
    Mutant(
        "events: the sync of the name",
        FILES,
        "EventWriter._sync",
        drop_statement("disk.sync_directory(directory.parent)"),
        CRASH_STATES,
        "old_or_new and events and synced",
    ),
    Mutant(
        "events: the look at the lease",
        FOLLOWING,
        "Cursor._ended_unsaid",
        replace_expression("None if info.is_live else 'died'", "'died'"),
        EVENTS,
        "silent_owner",
    ),
    Mutant(
        "events: the events that were written before the look",
        FOLLOWING,
        "Cursor.take",
        replace_expression("self._first or self._reader.read()", "[] if unsaid else IT"),
        EVENTS,
        "before_the_look",
    ),
    Mutant(
        "events: the refusal of a cursor ahead",
        FOLLOWING,
        "Cursor.__init__",
        condition("self._reader.count < after", "False"),
        EVENTS,
        "refused_at_once",
    ),
    Mutant(
        "events: the age by the clock that stamps files",
        FILES,
        "EventFiles._remove_expired",
        condition("not 0 <= age_s < self._keep_s", "False"),
        CLOCKS,
        "stamps_files",
    ),
)
