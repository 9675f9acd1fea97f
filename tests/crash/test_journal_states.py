"""A power cut leaves any part of a journal's record that was never acknowledged, and all of every other record."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from harness.crash_scenarios import Case, disk_of, documents, faults
from harness.crashes import SECTOR_BYTES, Disk, Step, Trace, read_disk, record, states, write_disk
from harness.journal_scenarios import ALWAYS, ANOTHER, append, append_another, journaled, recorded

import persist
from persist.storage.journal import opening


def journal_of(state: Disk | persist.Store) -> str:
    """Return the name of the one journal."""
    names = read_disk(state.path) if isinstance(state, persist.Store) else state
    [name] = [name for name in names if name.endswith(".journal")]
    return name


def journaled_store(path: Path) -> persist.Store:
    store = ALWAYS.open(path)
    store.create("s-1", {"title": "t", "messages": [{"id": "m1", "content": "hi"}]})
    recorded(store)
    return store


def size_of(store: persist.Store) -> int:
    return (store.path / journal_of(store)).stat().st_size


def padding(scratch: Path, item: dict[str, str], *, end: int) -> str:
    """Return the text that makes a record with this item end at such a byte of a sector."""
    store = journaled_store(scratch / "measured")
    store.append("s-1", "messages", item)
    return "x" * ((end - size_of(store)) % SECTOR_BYTES)


def torn_states(store: persist.Store, item: dict[str, str]) -> tuple[list[Disk], Disk, Disk]:
    """Return every disk that holds a torn record of an item, because its writer was killed.

    Return also the disk before the record and the disk after it.
    """
    trace = record(store.path, lambda: store.append("s-1", "messages", item))
    [write] = [step for step in trace.steps if step.kind == "write"]
    before, after, journal = trace.before, read_disk(store.path), journal_of(store)
    assert after[journal] == (before[journal] or b"") + write.content
    left = [state for state, _ in states(Trace(before, (write,)))]
    whole = before[journal], after[journal]
    # Zeros at the end are room for more.
    return [state for state in left if (state[journal] or b"").rstrip(b"\0") not in whole], before, after


# The record ends anywhere, or with its newline alone in a sector, or with a sector.
@pytest.mark.parametrize("end", [300, 1, 0], ids=lambda end: f"ends at {end}")
def test_a_torn_tail_is_no_record_and_the_next_writer_folds_it_away(scratch: Path, end: int) -> None:
    """Nothing is torn or lost, whatever is left of a record: the session is as before it, and the next append stays.

    Fails if a torn tail is not folded away (`tail.is_torn` taken out of `_must_fold`), and if the fold puts its mark
    into the torn tail (`_needs_mark`).
    """
    item = {"id": "torn", "content": "torn"}
    item["content"] += padding(scratch, item, end=end) + "x" * SECTOR_BYTES
    torn, before, _ = torn_states(journaled_store(scratch / "sessions"), item)
    assert len(torn) > 4, "a record of one sector: nothing is torn"
    write_disk(scratch / "before", before)
    old = documents(ALWAYS.open(scratch / "before"))
    for state in torn:
        with disk_of(state, scratch / "torn"):
            store = ALWAYS.open(scratch / "torn")
            assert documents(store) == old
            trace = record(store.path, lambda store=store: append_another(store))  # type: ignore[misc]
            case = Case(trace, old, documents(store), mode=ALWAYS)
            assert "rename s-1.json.tmp to s-1.json" in map(str, trace.steps), "it was not folded away"
        assert list(faults(case, trace, scratch, deep=False)) == []


def test_a_torn_tail_does_not_keep_what_stands_before_it_from_being_acknowledged(scratch: Path) -> None:
    """An idempotent append finds its item before a torn tail, and makes it durable, writing nothing else."""
    store = journaled_store(scratch / "sessions")
    append(store)
    torn, _, _ = torn_states(store, ANOTHER | {"content": "x" * SECTOR_BYTES})
    for state in torn:
        with disk_of(state, scratch / "torn"):
            store = ALWAYS.open(scratch / "torn")
            old = documents(store)
            trace = record(store.path, lambda store=store: append(store))  # type: ignore[misc]
            # The first sync is that of the store's own name.
            assert [step.kind for step in trace.steps] == ["sync directory", "sync", "sync directory", "write", "sync"]
            assert read_disk(store.path) == state
            case = Case(trace, old, documents(store), mode=ALWAYS)
        assert case.old == case.new
        assert list(faults(case, trace, scratch, deep=False)) == []


def test_two_records_of_which_neither_was_acknowledged_may_be_torn(scratch: Path) -> None:
    """The records of a killed writer and of the next one are cut before any sync, and no state is taken for damaged.

    Fails if a bad line with a good one behind it is always taken for damage.
    """
    padded = ANOTHER | {"content": "x" * SECTOR_BYTES}
    append_padded = journaled("two records", lambda store, _: store.append("s-1", "messages", padded), recorded, append)
    case = append_padded.play(scratch)
    writes = [step for step in case.trace.steps if step.kind == "write"]
    assert len(writes) == 2
    trace = Trace(case.trace.before, tuple(writes))
    assert len(list(states(trace))) > 8
    for state, _ in states(trace):
        with disk_of(state, scratch / "state") as root:
            assert documents(persist.Store(root)) in (case.old, case.between, case.new)


@pytest.mark.parametrize("is_idempotent", [True, False], ids=["found", "appended to"])
@pytest.mark.parametrize(("kind", "suffix"), [("sync", ".journal"), ("sync", "s-1.json"), ("sync directory", "*")])
def test_what_another_program_has_copied_is_made_durable(
    scratch: Path, kind: str, suffix: str, is_idempotent: bool
) -> None:
    """After the restore of a backup that was never synced, each of the first commit's syncs is needed.

    Fails without `commit._settle` in a commit and in `confirm`, which syncs the document and the directory, and without
    either of these two syncs.
    """
    store = journaled_store(scratch / "sessions")
    append(store)
    files = (journal_of(store), "s-1.json")
    backup = {name: content for name, content in read_disk(store.path).items() if name in files}
    store = ALWAYS.open(store.path)
    verb = append if is_idempotent else append_another
    trace = record(store.path, lambda: verb(store))
    numbers = {name: number for number, name in enumerate(trace.before)}
    copied: list[Step] = []
    for name, content in backup.items():
        copied += Step("create", name, numbers[name]), Step("write", name, numbers[name], content=content or b"")
    around = {name: content for name, content in trace.before.items() if name not in backup}
    trace = Trace(around, tuple(renumbered(step, list(trace.before), list(around)) for step in (*copied, *trace.steps)))
    new = documents(store)
    # For the journal, this is the sync of the new record. It makes the earlier records durable, too.
    *_, place = (i for i, step in enumerate(trace.steps) if step.kind == kind and step.path.endswith(suffix))
    assert shown(trace, scratch) == [new]
    assert shown(trace.without(place), scratch) != [new]


def renumbered(step: Step, before: list[str], around: list[str]) -> Step:
    """Return the same step, where the copied files count as made by the trace.

    Files that were there are known by their place.
    """
    name = before[step.file] if 0 <= step.file < len(before) else None
    number = around.index(name) if name in around else step.file + len(before)
    return replace(step, file=step.file if step.file < 0 else number)


def shown(trace: Trace, scratch: Path) -> list[object]:
    """Return all that the session may be after the verb has returned and the power was cut, each once."""
    found: list[object] = []
    for state, returned in states(trace):
        if returned:
            with disk_of(state, scratch / "state") as root:
                each = documents(persist.Store(root))
                found += [each] if each not in found else []
    return found


def test_without_its_first_sync_of_the_directory_a_fold_loses_the_session(scratch: Path) -> None:
    """The new journal's name must be durable before the rename. Otherwise a document may be left without its journal.

    Fails if `commit._publish` does not sync the directory.
    """
    case = journaled("fold", lambda store, _: store.compact("s-1"), recorded).play(scratch)
    first, rename, _second = (i for i, step in enumerate(case.trace.steps) if step.kind in ("sync directory", "rename"))
    assert case.trace.steps[first].kind == "sync directory"
    assert case.trace.steps[rename].kind == "rename"
    unreadable = set()
    for state, _ in states(case.trace.without(first)):
        with disk_of(state, scratch / "state") as root:
            try:
                persist.Store(root).load("s-1")
            except persist.CorruptSession as error:
                is_there = any(name in str(error) for name in state if name.endswith(".journal"))
                unreadable.add((error.path.name if error.path else "", is_there))
    assert unreadable == {("s-1.json", False)}


def test_an_acknowledged_record_stands_in_a_journal_that_bears_its_name_durably(scratch: Path) -> None:
    """A process that appends to a new journal makes its name durable first, because the fold may not have done so.

    The fold was killed between its rename and its last sync. Fails without `commit._is_settled`: after the cut the old
    document is there, with the old journal.
    """
    case = journaled("append", append, recorded, lambda store: store.compact("s-1"), is_cold=True).play(scratch)
    after_rename = [step.kind for step in case.trace.steps].index("rename") + 1
    places = [i for i, step in enumerate(case.trace.steps) if step.kind == "sync directory" and i > after_rename]
    assert len(places) == 1
    assert list(faults(case, case.trace, scratch, deep=False)) == []
    found = list(faults(case, case.trace.without(places[0]), scratch, deep=False))
    assert any(fault.startswith("acknowledged and lost") for fault in found)


def test_the_journal_of_another_document_is_not_taken_for_this_one(scratch: Path) -> None:
    """The store reads nothing from another document's journal, and records nothing in it.

    Fails if `Journal.check_opening` takes any opening.
    """
    store = journaled_store(scratch / "sessions")
    another = ALWAYS.open(scratch / "another")
    another.create("s-1", {"messages": []})
    (store.path / journal_of(store)).write_bytes((another.path / journal_of(another)).read_bytes())
    before = read_disk(store.path)
    for process in (store, ALWAYS.open(store.path)):
        with pytest.raises(persist.CorruptSession):
            process.load("s-1")
        with pytest.raises(persist.CorruptSession):
            append(process)
    assert read_disk(store.path) == before


def test_what_a_process_knows_of_a_journal_is_compared_with_it(scratch: Path) -> None:
    """After a backup was restored under a running server, its next record follows the file, not the server's memory.

    Fails if the record that a process knew as the last is not looked for (`ends_at`).
    """
    store = journaled_store(scratch / "sessions")
    journal = store.path / journal_of(store)
    backup = journal.read_bytes()
    append(store)
    journal.write_bytes(backup)
    append_another(store)
    messages = persist.Store(store.path).load("s-1").data["messages"]
    assert [message["id"] for message in messages] == ["m1", "m2", "m4"]


@pytest.mark.parametrize("is_cold", [False, True], ids=["warm", "cold"])
def test_however_many_folds_were_cut_off_compact_leaves_nothing_over(scratch: Path, is_cold: bool) -> None:
    """Each cut-off fold has left a journal that no document names. `compact` removes all of them."""
    store = journaled_store(scratch / "sessions")
    for number in range(2, 9):
        name = f"{number:016x}"
        (store.path / f"s-1.{name}.journal").write_bytes(opening(name))
    assert {problem.kind for problem in store.check()} == {"left-over"}
    store = ALWAYS.open(store.path) if is_cold else store
    assert store.compact("s-1")
    assert len(list(store.path.glob("*.journal"))) == 1
    assert store.check() == []


def test_a_record_is_one_write_and_one_fdatasync(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm append makes two calls that reach the disk, and syncs nothing but the record."""
    store = journaled_store(scratch / "sessions")
    calls: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    trace = record(store.path, lambda: append(store))
    journal = journal_of(store)
    assert [(step.kind, step.path) for step in trace.steps] == [("write", journal), ("sync", journal)]
    assert len(calls) == 1
