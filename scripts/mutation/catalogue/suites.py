"""The test files that more than one mutant is tried on."""

from __future__ import annotations

AIO = ("tests/processes/test_aio.py", "tests/contract/test_aio.py")
AIO_WAITING = ("tests/processes/test_aio_waiting.py", "tests/contract/test_aio.py")
BACKUP = ("tests/unit/verbs/test_backup.py",)
RECENT = ("tests/unit/verbs/test_recent.py",)
REPAIR = ("tests/contract/test_repair.py",)
CHECK = ("tests/unit/verbs/test_check.py",)
COPYING = ("tests/contract/test_copying.py",)
CLOCKS = ("tests/processes/test_clocks.py",)
CRASH_STATES = ("tests/crash/test_crash_states.py",)
EVENTS = ("tests/processes/test_events.py", "tests/contract/test_events.py", "tests/unit/test_events.py")
FILE_SYSTEM = ("tests/unit/test_file_system.py",)
FINALISERS = ("tests/processes/test_finalisers.py",)
GROUPS = ("tests/processes/test_groups.py",)
HALVES = ("tests/unit/test_halves.py",)
HAZARDS = ("tests/processes/test_hazards.py",)
KEPT_EVENTS = ("tests/processes/test_kept_events.py",)
LOCKS = ("tests/processes/test_locks.py",)
LOOKS = ("tests/cli/test_looks.py",)
LOST_UPDATES = ("tests/contract/test_lost_updates.py",)
MERGE = ("tests/unit/test_merge.py",)
MERGE_LISTS = ("tests/unit/test_merge_lists.py",)
REQUESTS = ("tests/contract/test_requests.py",)
SEED_RACE = ("tests/processes/test_seed_race.py",)
STREAMS = ("tests/processes/test_streams.py", "tests/contract/test_streams.py")
CONTENT = ("tests/unit/test_content.py",)
DIFF = ("tests/unit/test_diff.py",)
DOCUMENT = ("tests/unit/test_document.py",)
IO_ERRORS = ("tests/faults/test_io_errors.py",)
JOURNAL = ("tests/unit/test_journal.py",)
JOURNAL_DAMAGE = ("tests/faults/test_journal_damage.py",)
JOURNAL_STATES = ("tests/crash/test_journal_states.py",)
KEPT_HEADS = ("tests/unit/test_kept_heads.py",)
REPLICA = ("tests/processes/test_journal.py",)
SESSION = ("tests/unit/test_session.py", "tests/contract/test_session.py")
SHARED_SESSIONS = ("tests/processes/test_shared_sessions.py",)
POSTGRES = (
    "tests/contract/test_postgres.py",
    "tests/contract/test_postgres_events.py",
    "tests/contract/test_postgres_costs.py",
    "tests/contract/test_follow.py",
)
OPENING = ("tests/unit/verbs/test_opening.py",)
UNREAD = ("tests/unit/test_unread.py",)
COMMIT = ("tests/unit/test_commit.py",)
WAYS_OUT = ("tests/faults/test_ways_out.py",)
