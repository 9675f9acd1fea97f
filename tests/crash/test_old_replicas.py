"""A process with an old replica appends after others have taken its journal out of use: nothing acknowledged is lost.

The others are killed at every disk call. Without the mark that they put behind the journal's end, commits are lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.old_replicas import FIRST, SECOND, Deed, Ending, Kill, play

from persist.storage import commit, disk

by_deeds = pytest.mark.parametrize("first", FIRST, ids=str)
by_second = pytest.mark.parametrize("second", SECOND, ids=str)
by_removal = pytest.mark.parametrize("refuses_removal", [False, True], ids=["journals go", "journals stay"])


def endings(
    deeds: tuple[Deed, Deed], scratch: Path, *, refuses_removal: bool, of_both: bool = False
) -> dict[tuple[Kill | None, Kill | None], Ending]:
    """Return the outcome of two deeds for each kill of the first process, or for each kill of both."""
    whole = play(deeds, scratch, refuses_removal=refuses_removal)
    found: dict[tuple[Kill | None, Kill | None], Ending] = {(None, None): whole}
    for kill in whole.first.kills_at_effects if of_both else whole.first.kills:
        found[kill, None] = after = play(deeds, scratch, (kill, None), refuses_removal=refuses_removal)
        assert after.first.is_dead
        for other in after.second.kills_at_effects if of_both else ():
            found[kill, other] = play(deeds, scratch, (kill, other), refuses_removal=refuses_removal)
            assert found[kill, other].second.is_dead
    return found


def faults(found: dict[tuple[Kill | None, Kill | None], Ending]) -> dict[tuple[Kill | None, Kill | None], list[str]]:
    return {kills: ending.faults for kills, ending in found.items() if ending.faults}


@by_removal
@by_second
@by_deeds
def test_an_old_replica_loses_nothing_whenever_the_first_process_is_killed(
    scratch: Path, first: Deed, second: Deed, refuses_removal: bool
) -> None:
    """Nothing is lost if the first process is killed at any disk call, and the second one comes to its end."""
    found = endings((first, second), scratch, refuses_removal=refuses_removal)
    assert len(found) > 10
    assert faults(found) == {}


@by_second
@by_deeds
def test_an_old_replica_loses_nothing_whenever_both_processes_are_killed(
    scratch: Path, first: Deed, second: Deed
) -> None:
    """Nothing is lost if each process is killed at any call that changes the disk. Every pair of these is played."""
    found = endings((first, second), scratch, refuses_removal=False, of_both=True)
    assert len(found) > 5
    assert faults(found) == {}


@by_deeds
def test_without_the_mark_an_old_replica_loses_commits(
    scratch: Path, first: Deed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would notice a missing mark: each way to take a journal out of use needs its mark."""
    monkeypatch.setattr(commit, "put_mark", lambda *_: None)
    found = faults_of_any(first, scratch)
    assert any(fault.startswith("acknowledged and lost") for fault in found)
    assert any(fault.endswith("is out of use, and was written to") for fault in found)


@pytest.mark.parametrize("first", [each for each in FIRST if "delete" not in each.name], ids=str)
def test_a_mark_that_comes_after_the_rename_is_too_late(
    scratch: Path, first: Deed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between rename and mark leaves a journal that is out of use and has no mark."""
    marks: list[tuple[Any, ...]] = []
    real_mark, real_replace = commit.put_mark, disk.replace

    def replace_and_mark(source: Path, target: Path) -> None:
        real_replace(source, target)
        disk.exists(target)  # here it may be killed
        while marks:
            journal, end = marks.pop()
            if disk.exists(journal):
                real_mark(journal, end)

    monkeypatch.setattr(commit, "put_mark", lambda *arguments: marks.append(arguments))
    monkeypatch.setattr(disk, "replace", replace_and_mark)
    assert any(fault.startswith("acknowledged and lost") for fault in faults_of_any(first, scratch))


def faults_of_any(first: Deed, scratch: Path) -> list[str]:
    """Return the faults of a first deed, with journals that stay. They are at most those of one second deed."""
    for second in SECOND:
        found = faults(endings((first, second), scratch, refuses_removal=True))
        if found:
            return [fault for each in found.values() for fault in each]
    return []
