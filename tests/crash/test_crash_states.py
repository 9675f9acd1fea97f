"""Every disk that a power cut may leave of every verb: the old or the new revision, and nothing else.

A change that was acknowledged must be there. Other tests here prove that the suite would notice a fault. They leave out
each single sync of each trace and swap each two neighbouring steps, and the suite must find fault with the result.
`is_spare` and `is_harmless` say where it need not, and why. `scripts/crash-states` prints how many states there are.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
from harness import crash_scenarios
from harness.crash_scenarios import MESSAGE, SCENARIOS, Opening, Scenario, Sound, faults
from harness.crashes import (
    MOST_SECTORS,
    SECTOR_BYTES,
    Recorder,
    Step,
    Trace,
    is_sampled,
    record,
    recording,
    states,
    written_to,
)
from harness.journal_scenarios import JOURNALED, UNSYNCED

import persist
from persist.storage.cache import Replica
from persist.storage.content import Content
from persist.storage.diff import Change
from persist.storage.document import Header
from persist.storage.journal import MARK, Journal, Record, Tail
from persist.storage.lease import End
from persist.storage.transaction import Transaction

Play = Scenario | Opening
by_name = pytest.mark.parametrize("scenario", [*SCENARIOS, *JOURNALED], ids=lambda scenario: scenario.name)


@by_name
def test_every_crash_state_is_old_or_new(scenario: Play, scratch: Path) -> None:
    """Nothing is lost, nothing is torn and nobody is stuck, in every state that a power cut may leave of this verb."""
    case = scenario.play(scratch)
    assert case.trace.steps, "nothing was recorded"
    assert len(list(states(case.trace))) > 1
    assert list(faults(case, case.trace, scratch)) == []


@by_name
def test_every_sync_is_needed(scenario: Play, scratch: Path) -> None:
    """If any single sync of the trace is left out, a state shows a fault.

    The fault is an acknowledged commit that is lost, a torn commit, or a stuck session.
    """
    case = scenario.play(scratch)
    syncs = [i for i, step in enumerate(case.trace.steps) if step.kind.startswith("sync")]
    needed = [i for i in syncs if not is_spare(case.trace, i)]
    assert needed
    sound = Sound(case)
    for index in needed:
        assert next(sound.faults(case.trace.without(index), scratch), None), f"{case.trace.steps[index]} is not needed"


@by_name
def test_the_order_is_needed(scenario: Play, scratch: Path) -> None:
    """If two neighbouring steps are swapped of which one is a sync or a rename, a state shows it. See `is_harmless`.

    Marks are left out, because they speak to living processes only. `test_old_replicas` shows that they come before the
    rename.
    """
    case = scenario.play(scratch)
    trace = Trace(case.trace.before, tuple(step for step in case.trace.steps if not is_mark(step)))
    steps, sound = trace.steps, Sound(case)
    for index, (one, two) in enumerate(pairwise(steps)):
        if is_harmless(one, two) or is_spare(trace, index) or is_spare(trace, index + 1):
            continue
        fault = next(sound.faults(trace.swapped(index), scratch), None)
        assert fault, f"{one} and {two} could be swapped"


@pytest.mark.parametrize("sync_kind", ["sync", "sync directory"])
def test_what_is_found_is_made_durable_before_it_is_acknowledged(scratch: Path, sync_kind: str) -> None:
    """An idempotent append to a file that another program wrote and never synced needs both of its syncs."""
    store = persist.Store(scratch / "recorded")
    content = b'{"messages":[{"id":"m3","role":"user","content":"more"}]}'
    (store.path / "s-1.json").write_bytes(content)
    trace = record(store.path, lambda: store.append("s-1", "messages", MESSAGE))
    file = next(step.file for step in trace.steps if step.kind == "sync")
    other = Step("create", "s-1.json", file), Step("write", "s-1.json", file, content=content)
    trace = Trace({}, (*other, *trace.steps))
    [place] = [index for index, step in enumerate(trace.steps) if step.kind == sync_kind and step.path[:2] != ".."]
    assert all(state["s-1.json"] == content for state, returned in states(trace) if returned)
    assert any(state.get("s-1.json") != content for state, returned in states(trace.without(place)) if returned)


@pytest.mark.parametrize("scenario", UNSYNCED, ids=lambda scenario: scenario.name)
def test_a_record_whose_sync_failed_is_written_again(
    scenario: Scenario, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states above would show a missing write: with a sync alone, an acknowledged commit is lost.

    The writer of the record saw its fdatasync fail, and was killed. The kernel may have dropped the record, so a later
    sync proves nothing of it. A fold is sound either way, because it writes the whole document.
    """
    monkeypatch.setattr(Journal, "read_new_records", without_unsynced(Journal.read_new_records))
    case = scenario.play(scratch)
    found = list(faults(case, case.trace, scratch, deep=False))
    if any(step.kind == "rename" for step in case.trace.steps):
        assert found == []
    else:
        assert any(fault.startswith("acknowledged and lost") for fault in found)


def without_unsynced(real: Callable[..., Iterator[Record]]) -> Callable[..., Iterator[Record]]:
    def read_new_records(log: Journal, fd: int, header: Header, tail: Tail) -> Iterator[Record]:
        yield from real(log, fd, header, tail)
        if tail.unsynced:
            tail.unsynced = tail.unsynced[:0]

    return read_new_records


BY_NAME = {scenario.name: scenario for scenario in [*SCENARIOS, *JOURNALED]}


really_commit = Transaction.commit


def commit_in_two(
    tx: Transaction, header: Header, content: Content, changes: tuple[Change, ...] | None = None, end: End | None = None
) -> Replica:
    """Commit as `Transaction.commit` does, but commit the values that stand apart first, and then the fields."""
    before = {} if tx._replica is None else tx._replica.content.fields
    really_commit(tx, header, Content(before, content.apart), changes)
    return really_commit(tx, header.next(), content, (), end)


@pytest.mark.parametrize(
    "name",
    [
        *("transaction of several changes", "transaction that creates", "start that creates"),
        *("start once, with fields", "start once, of what a stale stream has asked"),
        *("stream.transaction", "finish with fields"),
    ],
)
@pytest.mark.parametrize("kind", ["", "journal: "], ids=["document", "journal"])
def test_a_verb_of_two_commits_is_seen(kind: str, name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states above would show a verb of two commits: between the two, a list has changed, and the fields not."""
    monkeypatch.setattr(Transaction, "commit", commit_in_two)
    case = BY_NAME[kind + name].play(scratch)
    assert any(fault.startswith("neither old nor new") for fault in faults(case, case.trace, scratch, deep=False))


@pytest.mark.parametrize("name", ["extend", "extend that creates", "journal: extend", "journal: extend that creates"])
def test_a_pair_that_is_two_commits_is_seen(name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states above would show a pair of two commits: between the two, one of the pair is there."""
    real = persist.Store.extend

    def one_by_one(store: persist.Store, session_id: str, field: str, items: list[Any], **options: Any) -> str:
        return [real(store, session_id, field, [item], **options) for item in items][-1]

    monkeypatch.setattr(persist.Store, "extend", one_by_one)
    case = BY_NAME[name].play(scratch)
    assert any(fault.startswith("neither old nor new") for fault in faults(case, case.trace, scratch, deep=False))


@pytest.mark.parametrize(
    "name", [name for name in BY_NAME if re.match("(journal: )?(extend|transaction|start).*killed", name)]
)
def test_an_answer_without_a_sync_is_seen(name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states above would show a missing sync: the commit of a killed writer is acknowledged, and lost."""
    monkeypatch.setattr(Transaction, "confirm", lambda tx, **_: tx.read())
    case = BY_NAME[name].play(scratch)
    found = list(faults(case, case.trace, scratch, deep=False))
    if case.between == case.new:
        assert any(fault.startswith("acknowledged and lost") for fault in found)
    else:
        # Half of it was there, so there is a commit.
        assert found == []


def test_a_sync_after_a_failed_one_makes_only_later_writes_durable() -> None:
    """The model itself: a sector that a failed sync has given up stays given up, until it is written again."""
    first, second = b"x" * SECTOR_BYTES, b"y" * SECTOR_BYTES
    steps = (
        Step("write", "f", 0, content=first),
        Step("failed sync", "f", 0),
        Step("write", "f", 0, content=second),
        Step("sync", "f", 0),
    )
    left = {state["f"] for state, returned in states(Trace({"f": b""}, steps)) if returned}
    assert left == {first + second, bytes(SECTOR_BYTES) + second}
    again = (*steps[:2], Step("write", "f", 0, content=first + second, position=0), steps[3])
    assert {state["f"] for state, returned in states(Trace({"f": b""}, again)) if returned} == {first + second}


def test_a_file_that_was_cut_off_may_have_either_length() -> None:
    """The model itself: until a sync, a file that was cut off has the old length or the new one."""
    long, short = b"x" * 2 * SECTOR_BYTES, b"x" * SECTOR_BYTES
    trace = Trace({"f": long}, (Step("truncate", "f", 0, position=SECTOR_BYTES),))
    assert {state["f"] for state, returned in states(trace) if returned} == {long, short}
    trace = Trace(trace.before, (*trace.steps, Step("sync", "f", 0)))
    assert {state["f"] for state, returned in states(trace) if returned} == {short}


#: The calls of the kernel that change a disk or make it durable, and the steps that they are recorded as.
KERNEL_CALLS = {
    "write": "write",
    "pwrite": "write",
    "ftruncate": "truncate",
    "fsync": "sync",
    "fdatasync": "sync",
    "replace": "rename",
    "unlink": "unlink",
    "mkdir": "mkdir",
}


@by_name
def test_no_call_goes_past_the_recorder(scenario: Play, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is done is recorded: each call of the kernel that matters is a step of the trace."""
    calls: Counter[str] = Counter()
    is_recording = False

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            answer = real(*arguments, **options)
            calls[KERNEL_CALLS[name]] += is_recording
            return answer

        return call

    def opened(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        descriptor = real_open(path, flags, *mode, **options)
        calls["create"] += is_recording and bool(flags & os.O_CREAT)
        return descriptor

    @contextmanager
    def recording_and_counting(root: Path) -> Iterator[Recorder]:
        nonlocal is_recording
        with recording(root) as recorder:
            is_recording = True
            yield recorder
            is_recording = False

    real_open = os.open
    monkeypatch.setattr(os, "open", opened)
    for name in KERNEL_CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(crash_scenarios, "recording", recording_and_counting)
    case = scenario.play(scratch)
    recorded = Counter(step.kind.removesuffix(" directory") for step in case.trace.steps if step.kind != "failed sync")
    assert recorded == +calls


def test_what_was_made_in_a_lost_directory_is_lost() -> None:
    """Syncing a file and its directory is not enough, as long as the directory's own name is not durable."""
    made = (
        Step("mkdir", "d", 0),
        Step("create", "d/f", 1),
        Step("write", "d/f", 1, content=b"x"),
        Step("sync", "d/f", 1),
    )
    trace = Trace({}, (*made, Step("sync directory", "d/*")))
    assert [state for state, returned in states(trace) if returned] == [{}, {"d": None, "d/f": b"x"}]
    trace = Trace({}, (*trace.steps, Step("sync directory", "*")))
    assert [state for state, returned in states(trace) if returned] == [{"d": None, "d/f": b"x"}]


@pytest.mark.parametrize("sectors", [MOST_SECTORS, 20])
def test_a_torn_file_is_left_in_every_extreme_way(sectors: int) -> None:
    """Few sectors are lost in all 2**n ways. Many are lost in the extreme ways and a sample, the same one each time."""
    content = b"x" * SECTOR_BYTES * sectors
    trace = Trace({"f": b""}, (Step("write", "f", 0, content=content),))
    found = {kept_sectors(state["f"] or b"") for state, _ in states(trace)}
    one_each = [tuple(place == each for each in range(sectors)) for place in range(sectors)]
    all_but_one = [tuple(not kept for kept in pattern) for pattern in one_each]
    prefixes = [tuple(each < count for each in range(sectors)) for count in range(sectors + 1)]
    shorter = [(True,) * count for count in range(sectors)]
    assert found.issuperset([*one_each, *all_but_one, *prefixes, *shorter])
    assert is_sampled(trace) == (sectors > MOST_SECTORS)
    assert len(found) == 2**sectors + sectors if not is_sampled(trace) else 100 < len(found) < 200
    assert list(states(trace)) == list(states(trace))


def kept_sectors(content: bytes) -> tuple[bool, ...]:
    return tuple(content[start] != 0 for start in range(0, len(content), SECTOR_BYTES))


def is_spare(trace: Trace, index: int) -> bool:
    """Tell whether this trace could do without a step. Each such step is needed in another trace."""
    steps, step = trace.steps, trace.steps[index]
    return (
        (step.kind == "sync" and not _has_news(steps[:index], step.file))
        or (step.kind == "sync directory" and _is_spare_sync_of_directory(steps, index))
        or (_removes_a_journal(step) and any(map(_removes_a_journal, steps[index + 1 :])))
        or (step.kind == "write" and _is_written_again(trace, index))
    )


def _is_written_again(trace: Trace, index: int) -> bool:
    """Tell whether a write repeats the record of a killed writer, where the writer's sync was not tried.

    The record is written once more, because its sync may have failed.
    """
    step = trace.steps[index]
    has_failed = any(each.kind == "failed sync" and each.file == step.file for each in trace.steps[:index])
    before, after = (written_to(step.file, Trace(trace.before, trace.steps[:end])) for end in (index, index + 1))
    return not has_failed and before == after


def _has_news(steps: Sequence[Step], file: int) -> bool:
    """Tell whether a file was written to since it was synced.

    `confirm` and the first record of a process also sync data that its writer has synced, maybe under another name,
    because they cannot know. The tests above with the files of another program show that these syncs are needed.
    """
    kinds = [step.kind for step in steps if step.file == file and step.kind in ("write", "sync")]
    return kinds[-1:] == ["write"]


def _is_spare_sync_of_directory(steps: Sequence[Step], index: int) -> bool:
    """Tell whether nothing was made in a directory, or whether it is synced twice before any rename.

    `Store` syncs names that another process may just have made, also where it has made and synced them itself. Each of
    the two syncs is needed where it is alone: in "first start", and in the scenarios "not yet synced".
    """
    step = steps[index]
    # The name of a lock file need not be durable.
    changes = [each for each in steps[:index] if each.kind in ("mkdir", "create", "rename", "unlink")]
    changes = [each for each in changes if not each.path.endswith(".lock")]
    opening = list(takewhile(lambda each: each.kind != "rename" and not each.path.endswith(".journal"), steps))
    is_doubled = index < len(opening) and opening.count(step) > 1
    return is_doubled or step.directory not in [each.directory for each in changes]


def _removes_a_journal(step: Step) -> bool:
    """Tell whether a step removes a journal.

    Of several such steps, the last one removes the journal of the document that was replaced. No document names the
    earlier ones.
    """
    return step.kind == "unlink" and step.path.endswith(".journal")


def is_mark(step: Step) -> bool:
    """Tell whether a step takes a journal, or a file of events, out of use."""
    return step.kind == "write" and step.content in (MARK, b'{"moved":true}\n')


def _is_journal(step: Step) -> bool:
    return step.path.endswith(".journal")


def is_harmless(one: Step, two: Step) -> bool:
    """Tell whether the order of two steps cannot matter, or cannot be another one."""
    kinds = {one.kind, two.kind}
    if "create" in kinds and one.file == two.file:
        return True  # nothing can be written to a file before it is made
    if any(step.kind == "create" and step.path.endswith((".tmp", ".journal")) for step in (one, two)):
        return True  # a temporary file is nobody's document yet, and no document names a new journal
    if {one.kind, two.kind} <= {"sync", "sync directory"} and (
        one.kind == two.kind or _is_journal(one) or _is_journal(two)
    ):
        return True  # both are done before anything depends on either
    if kinds == {"write", "sync directory"} and (_is_journal(one) or _is_journal(two)):
        return True  # a record is acknowledged after a sync of its own, which comes later
    if one.directory != two.directory and "sync directory" in kinds and {"mkdir", "create"} & kinds:
        return True  # an empty directory or file says nothing yet, and only its own directory's sync makes it durable
    if any(step.path.endswith(".lock") for step in (one, two)):
        return True  # a lock file has no content, and a missing one is made
    if any(step.kind == "write" and step.directory.endswith(".leases") for step in (one, two)):
        return True  # a lease's text is for people, and only its name and the kernel's lock count
    are_events = [step.directory == ".events" for step in (one, two)]
    if all(are_events) and kinds == {"sync", "sync directory"}:
        return True  # an event is acknowledged after both
    if any(are_events) and kinds == {"write", "sync directory"} and one.directory != two.directory:
        return True  # an end line is no part of the commit, and a reader that misses it asks the document
    return not {"sync", "sync directory", "rename"} & kinds
