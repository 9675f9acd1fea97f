"""Soak, in short; `scripts/soak` is the long form."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.soak import Soaked, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")


def test_thousands_of_commits_leave_nothing_behind(scratch: Path) -> None:
    """3,000 commits of every kind: the same descriptors, flat memory, no stray file."""
    soaked = soak(scratch / "sessions", 3_000)
    assert soaked.commits >= 3_000
    assert soaked.faults == []


def test_verdict_names_each_kind_of_leak() -> None:
    """The soak can fail: each of its counts is looked at."""
    clean = Soaked(10, 5, 5, 0, [], 0)
    assert clean.faults == []
    leaking = [replace(clean, descriptors_after=6), replace(clean, grown_bytes=2_000_000)]
    leaking += [replace(clean, stray=["s-1.json.tmp"]), replace(clean, problems=1)]
    assert [len(soaked.faults) for soaked in leaking] == [1, 1, 1, 1]
