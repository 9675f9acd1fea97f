"""The test files that more than one mutant is tried on."""

from __future__ import annotations

AIO = ("tests/processes/test_aio.py",)
CRASH_STATES = ("tests/crash/test_crash_states.py",)
EVENTS = ("tests/processes/test_events.py", "tests/unit/test_events.py")
HAZARDS = ("tests/processes/test_hazards.py",)
LOCKS = ("tests/processes/test_locks.py",)
LOST_UPDATES = ("tests/processes/test_lost_updates.py",)
MERGE = ("tests/unit/test_merge.py",)
SEED_RACE = ("tests/processes/test_seed_race.py",)
STREAMS = ("tests/processes/test_streams.py",)
