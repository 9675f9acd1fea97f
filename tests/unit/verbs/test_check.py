"""The problems that `check` names: only those that it sees under the lock, whatever the directory listed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness.chats import everything
from harness.files import file_engine

import persist
from persist.storage import disk, journal, layout

IDS = ["s", "user:7/chat", "long " * 50, "con", "日本"]
OTHER_HEX = "7" * 16


def journaled(store: persist.Store) -> persist.Store:
    return persist.Store(store.path, journal="always")


def delete(store: persist.Store, session_id: str) -> None:
    store.delete(session_id)


def make_anew(store: persist.Store, session_id: str) -> None:
    store.delete(session_id)
    journaled(store).create(session_id, {"messages": [1]})


def fold(store: persist.Store, session_id: str) -> None:
    store.compact(session_id, alone=True)


def fold_and_go_on(store: persist.Store, session_id: str) -> None:
    store.compact(session_id, alone=True)
    folding = journaled(store)
    file_engine(folding).options.fold_bytes = 1
    for number in range(3):
        folding.append(session_id, "messages", number)


@pytest.mark.parametrize("session_id", IDS, ids=ascii)
@pytest.mark.parametrize("change", [delete, make_anew, fold, fold_and_go_on])
def test_what_changed_since_the_listing_is_no_problem(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch, change: Callable[[persist.Store, str], None], session_id: str
) -> None:
    """A delete, a new session of that id and a fold may come between the listing and the look (HAZARDS F11).

    The listing also holds a temporary file that existed for a moment. Fails if a file that is gone counts: with
    `disk.exists(paths.temp)` or `disk.version_of(path)` out.
    """
    log = journaled(store)
    log.create(session_id, {"messages": []})
    log.append(session_id, "messages", 0)
    temp = Path(layout.SessionPaths.of(str(store.path), session_id).temp)
    listed = [*disk.names(str(store.path)), temp.name]
    change(store, session_id)
    monkeypatch.setattr(disk, "names", lambda directory: [*listed])
    before = everything(store.path)
    assert store.check() == []
    assert everything(store.path) == before


@pytest.mark.parametrize("session_id", IDS, ids=ascii)
def test_what_is_there_under_the_lock_is_named(store: persist.Store, session_id: str) -> None:
    """A temporary file and journals that a crash left are named if nobody holds the session's lock."""
    store.create(session_id, {"messages": []})
    paths = layout.SessionPaths.of(str(store.path), session_id)
    Path(paths.temp).write_bytes(b"half")
    Path(paths.journal(OTHER_HEX)).write_bytes(journal.opening(OTHER_HEX))
    before = everything(store.path)
    assert [(problem.session_id, problem.kind) for problem in store.check()] == [(session_id, "left-over")] * 2
    assert everything(store.path) == before
    store.compact(session_id)
    assert store.check() == []


@pytest.mark.parametrize("session_id", IDS, ids=ascii)
def test_what_is_left_of_no_session_is_named(store: persist.Store, session_id: str) -> None:
    """A journal with a commit but no document is named, because its delete was cut off. A lone lock file is no problem:
    it goes when the check gives its lock up.
    """
    log = journaled(store)
    log.create(session_id, {"messages": []})
    log.append(session_id, "messages", 0)
    paths = layout.SessionPaths.of(str(store.path), session_id)
    Path(paths.document).unlink()
    assert [problem.kind for problem in store.check()] == ["orphaned"]
    for path in store.path.glob("*.journal"):
        path.unlink()
    Path(paths.lock).touch()
    assert store.check() == []
    assert [path.name for path in store.path.iterdir()] == [".leases"]


FOREIGN = ["_index.json", "s.jsonl", "s.json~", ".s.json.swp", "#s.json#", "s.json.bak", "s.json.lock.lock", "4913"]
FOREIGN += ["notes.txt", "con.json", "a b.json", "s.0123.journal", ".DS_Store", "s.journal.damaged", "\udcff.json"]


@pytest.mark.parametrize("name", FOREIGN, ids=ascii)
def test_foreign_file_is_named_once(store: persist.Store, name: str) -> None:
    """An index, a log or an editor's file is named once, as foreign, beside sound sessions."""
    for session_id in ("s", "t"):
        journaled(store).create(session_id, {"messages": []})
    path = store.path / name
    path.write_text("{not even JSON")
    assert [(problem.kind, problem.path) for problem in store.check()] == [("foreign", path)]
    path.unlink()
    path.mkdir()
    assert [(problem.kind, problem.path) for problem in store.check()] == [("foreign", path)]


def test_files_of_persist_are_not_foreign(store: persist.Store) -> None:
    """A damaged journal that was kept, the leases and the events are files of persist."""
    log = journaled(store)
    log.create("s", {"messages": []})
    log.append("s", "messages", 0)
    log.accept("s", drop_journal=True)
    with store.start_stream("s") as stream:
        stream.emit(1)
        stream.finish()
    assert {path.suffix for path in store.path.iterdir()} >= {".damaged", ".json", ".lock"}
    assert (store.path / layout.EVENTS).is_dir()
    assert store.check() == []


def test_document_is_judged_under_its_lock(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that the first look finds damaged is sound if the look under the lock finds it sound.

    Fails if the first look decides.
    """
    store.create("s", {"messages": []})

    def half_way(session_id: str) -> object:
        raise persist.CorruptSession(session_id=session_id, path="s.json", reason="it is half-way")

    monkeypatch.setattr(store._backend.engine, "read", half_way, raising=True)
    assert store.check() == []
    path = store.path / "s.json"
    path.write_bytes(path.read_bytes().replace(b"messages", b"messengers"))
    assert [problem.kind for problem in store.check()] == ["corrupt"]


@pytest.mark.parametrize("name", ["s.json.lock", "s.json.tmp"])
def test_file_of_a_session_that_is_none_is_named(store: persist.Store, name: str) -> None:
    """Where a lock or a temporary file should stand, a directory keeps every writer out. It is no left-over."""
    store.create("s", {"messages": []})
    (store.path / name).unlink(missing_ok=True)
    (store.path / name).mkdir()
    (problem,) = store.check()
    assert (problem.session_id, problem.kind) == ("s", "unreadable")
    assert str(store.path / name) in problem.message
    assert "Move it away" in problem.message
    if name.endswith("lock"):
        with pytest.raises(persist.Unreadable):
            store.append("s", "messages", {"id": "m"})
