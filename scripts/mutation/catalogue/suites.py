"""The test files that more than one mutant is tried on."""

from __future__ import annotations

AIO = ("tests/processes/test_aio.py",)
CRASH_STATES = ("tests/crash/test_crash_states.py",)
EVENTS = ("tests/processes/test_events.py", "tests/unit/test_events.py")
HAZARDS = ("tests/processes/test_hazards.py",)
JOURNAL = ("tests/processes/test_journal.py",)
LOCKS = ("tests/processes/test_locks.py",)
LOST_UPDATES = ("tests/processes/test_lost_updates.py",)
MERGE = ("tests/unit/test_merge.py",)
SEED_RACE = ("tests/processes/test_seed_race.py",)
SHARED_SESSIONS = ("tests/processes/test_shared_sessions.py",)
STREAMS = ("tests/processes/test_streams.py",)
UNREAD = ("tests/unit/test_unread.py",)
