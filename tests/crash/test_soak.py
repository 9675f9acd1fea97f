"""The short form of the soak, whose long form is `scripts/soak`. It also sees the loss if a mechanism is taken out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.journaling import Journaling
from harness.planted import NOT_WRITTEN, Mutation, run_harness, write_mutated_package
from harness.soak import Soaked, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")

DEADLINE_S = 120

NOT_COUNTED = (
    "session.py",
    "        mine = encoded(self.data, self._base.content)\n",
    "        mine = encoded(self.data | {'n': min(self.data['n'], 3)}, self._base.content)\n",
)
UNMARKED = ("turn.py", "messages[place][INTERRUPTED] = True", "pass")
JOURNALS_THAT_STAY = ("storage/commit.py", "    _remove(map(paths.journal, journals))\n", "")
NOT_CLOSED = ("storage/transaction.py", "                disk.close(fd)\n", "                pass\n")


@pytest.mark.parametrize(
    "journaling",
    [
        pytest.param(Journaling(), id="each-in-its-way"),
        pytest.param(Journaling("auto", "normal"), id="large-sessions-have-journals"),
        pytest.param(Journaling("always", "normal"), id="all-have-journals"),
        pytest.param(Journaling("always", "1"), id="all-are-folded-at-each-commit"),
    ],
)
def test_thousands_of_commits_leave_nothing_behind(scratch: Path, journaling: Journaling) -> None:
    """6,000 commits of every kind leave the same descriptors, flat memory and no stray file.

    Each session holds what it must.
    """
    soaked = soak(scratch / "sessions", 6_000, journaling)
    assert soaked.commits >= 6_000
    assert soaked.faults == []


def test_verdict_names_each_kind_of_leak() -> None:
    """The soak can fail: each of its counts is looked at."""
    clean = Soaked(10, 5, 5, 0, [], 0, [])
    assert clean.faults == []
    leaking = [replace(clean, descriptors_after=6), replace(clean, grown_bytes=2_000_000)]
    leaking += [replace(clean, stray=["s-1.json.tmp"]), replace(clean, problems=1), replace(clean, wrong=["s-1"])]
    assert [len(soaked.faults) for soaked in leaking] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(NOT_WRITTEN, id="acknowledged-and-not-written"),
        pytest.param(NOT_COUNTED, id="a-small-field-stays-behind"),
        pytest.param(UNMARKED, id="no-mark-on-an-interrupted-turn"),
    ],
)
def test_the_soak_sees_a_planted_bug(scratch: Path, mutation: Mutation) -> None:
    """With one mechanism taken out of a copy of the package, sessions do not hold what was committed to them."""
    write_mutated_package(mutation, scratch)
    done = run_harness("soak", ["--commits=700", f"--directory={scratch}"], scratch, DEADLINE_S)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: not what was committed: ['s-" in done.stdout


@pytest.mark.parametrize(
    ("mutation", "fault"),
    [
        pytest.param(JOURNALS_THAT_STAY, "left over: ['s-", id="journals-that-nobody-removes"),
        pytest.param(NOT_CLOSED, "descriptors went from", id="journals-that-nobody-closes"),
    ],
)
def test_the_soak_sees_what_journals_leave_behind(scratch: Path, mutation: Mutation, fault: str) -> None:
    """With one mechanism taken out of a copy of the package, there are more files, or more descriptors, than before."""
    write_mutated_package(mutation, scratch)
    done = run_harness("soak", ["--commits=700", "--journal=always", f"--directory={scratch}"], scratch, DEADLINE_S)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAULT: {fault}" in done.stdout
