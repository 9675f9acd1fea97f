"""Soak, in short; `scripts/soak` is the long form. And the soak sees what is lost when a mechanism is out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.planted import Mutation, run_harness, write_mutated_package
from harness.soak import Soaked, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")

DEADLINE_S = 120

NOT_WRITTEN = (
    "store.py",
    "    return tx.commit(found.header.next(touch=touch), body).header.revision\n",
    "    return tx.commit(found.header.next(), body).header.revision if found.header.revision % 4 else 1\n",
)
NOT_COUNTED = (
    "session.py",
    "        mine = Body.of(self.data)\n",
    "        mine = Body.of(self.data | {'n': min(self.data['n'], 3)})\n",
)
UNMARKED = ("turn.py", "messages[place][INTERRUPTED] = True", "pass")


def test_thousands_of_commits_leave_nothing_behind(scratch: Path) -> None:
    """3,000 commits of every kind: the same descriptors, flat memory, no stray file, and each session holds what it must."""
    soaked = soak(scratch / "sessions", 3_000)
    assert soaked.commits >= 3_000
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
def test_the_soak_sees_a_planted_bug(tmp_path: Path, mutation: Mutation) -> None:
    """With one mechanism taken out of a copy of the package, sessions do not hold what was committed to them."""
    write_mutated_package(mutation, tmp_path)
    done = run_harness("soak", ["--commits=700", f"--directory={tmp_path}"], tmp_path, DEADLINE_S)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: not what was committed: ['s-" in done.stdout
