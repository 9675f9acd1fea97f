"""Mutants of a stream's events, and of following them."""

from __future__ import annotations

from mutation.catalogue.suites import CLOCKS, CRASH_STATES, EVENTS, KEPT_EVENTS
from mutation.edits import condition, drop_call, drop_operand, drop_statement, replace_expression
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
        "files.py",
        "FileEngine.how_ended",
        replace_expression("'died' if is_dead else None", "'died'"),
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
        drop_operand("self._reader.count < self.after"),
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
    # --- the oldest events ---
    Mutant(
        "events: the error for a cursor before the first event",
        FILES,
        "EventReader._take_first",
        drop_statement("self.is_overtaken = self.is_overtaken or self.first - 1 > max(self.count, self._after)"),
        KEPT_EVENTS,
        "told_where_it_is",
    ),
    Mutant(
        "events: the look at the owner before the oldest are dropped",
        "streams.py",
        "Stream._drop_oldest_events",
        drop_call("self._require_ownership"),
        KEPT_EVENTS,
        "fenced_stream",
    ),
    Mutant(
        "events: the sync of the new file before the rename",
        FILES,
        "EventWriter.drop_oldest",
        drop_call("disk.sync"),
        CRASH_STATES,
        "old_or_new and oldest",
    ),
)
