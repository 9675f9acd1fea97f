"""Store in one process, on files: what other programs leave in its directory, and what it leaves there itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.chats import everything

import persist


def test_the_version_of_a_foreign_document_is_its_content(store: persist.Store) -> None:
    """Another program's document has no commit, so its version follows from its content."""
    path = store.path / "s.json"
    path.write_text('{"n": 1}')
    version = store.load("s").version
    path.write_text('{"n": 2}')
    with pytest.raises(persist.VersionMismatch):
        store.update("s", lambda tx: tx.data.clear(), if_version=version)
    path.write_text('{"n": 1}')
    store.update("s", lambda tx: tx.fields.update(m=1), if_version=version)
    assert store.load("s").data == {"n": 1, "m": 1}


def test_heads_leave_out_what_cannot_be_read(store: persist.Store) -> None:
    """One damaged file must not hide the others. `check` names it."""
    for name in ("a", "b", "c", "d", "e"):
        store.create(name, {"n": 0})
    (store.path / "b.json").write_bytes(b"{")
    content = (store.path / "c.json").read_bytes()
    (store.path / "c.json").write_bytes(content.replace(b'"format":3', b'"format":9'))
    (store.path / "d.json").unlink()
    (store.path / "d.json").mkdir()
    assert [head.id for head in store.heads()] == ["a", "e"]
    assert [head.id for head in store.heads(after="a", limit=2)] == [], "the page is one of ids"
    assert [problem.session_id for problem in store.check()] == ["b", "c", "d"]


def test_strange_files_in_the_directory_are_no_sessions(store: persist.Store) -> None:
    """Editors' backups, locks and left-overs are not listed."""
    store.create("s")
    for name in ("s.json~", "notes.txt", ".hidden.json", "s.json.tmp", "a b.json"):
        (store.path / name).write_text("{}")
    assert store.ids() == ["s"]


def test_compact_removes_what_crashes_have_left_behind(scratch: Path) -> None:
    """A compact removes left-overs even if there is nothing to fold. A commit to a journal leaves them.
    `check` says so.
    """
    store = persist.Store(scratch / "sessions", journal="always")
    for session_id in ("s", "t"):
        store.create(session_id, {"messages": []})
    before = everything(store.path)
    left = f"t.{'9' * 16}.journal"
    for name in ("s.json.tmp", f"s.{'2' * 16}.journal", f"s.{'9' * 16}.journal", left):
        (store.path / name).write_bytes(b"")
    problems = [problem for problem in store.check() if problem.session_id == "s"]
    assert [problem.kind for problem in problems] == ["left-over"] * 3
    assert all(f"'persist compact {store.path} s' removes it" in problem.message for problem in problems)
    assert store.compact("s") is False
    (store.path / left).unlink()
    assert everything(store.path) == before


def test_a_duplicate_keeps_the_prompt_of_another_program(store: persist.Store) -> None:
    """B3: the prompt is kept even if only the stream fields have it.
    So it is beside an owner of an earlier stream in the header.
    """
    store.create("s", {"messages": []})
    stream = store.start_stream("s", stream_id="ours")
    stream._lease.close()
    path = store.path / "s.json"
    foreign = path.read_bytes().replace(b'"active_stream_id":"ours"', b'"active_stream_id":"theirs"')
    path.write_bytes(foreign.replace(b'"pending_user_message":null', b'"pending_user_message":"the only copy"'))
    store.accept("s")
    copied = store.duplicate("s", "copy")
    assert [message["content"] for message in copied.data["messages"]] == ["the only copy"]


def test_a_directory_that_went_away_is_named(store: persist.Store) -> None:
    """A disk error of a look is a `PersistError`, from every verb that lists."""
    (store.path / ".leases").rmdir()
    store.path.rmdir()
    store.path.write_text("a file")
    for verb in (store.ids, store.check, lambda: store.exists("s"), lambda: store.load("s")):
        with pytest.raises(persist.Unreadable, match=r"sessions.* cannot be read"):
            verb()


def test_a_store_is_a_directory_not_a_way_of_spelling_it(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names, links and a later chdir lead to one store, with one lock in the process."""
    store.create("s")
    link = store.path.parent / "link"
    link.symlink_to(store.path)
    monkeypatch.chdir(store.path.parent)
    relative, linked = persist.Store("sessions"), persist.Store(link)
    monkeypatch.chdir("/")
    assert relative.path == linked.path == store.path
    relative.append("s", "messages", 1)
    assert store.head("s").revision == 2
    with store.transaction("s"), pytest.raises(persist.LockError):
        linked.append("s", "messages", 1)


def test_delete_removes_every_file_of_its_session_and_no_other(store: persist.Store) -> None:
    """A session whose id begins alike stays."""
    store.create("s", {"messages": []})
    store.create("s-2")
    store.append("s-2", "messages", 1)
    store.append("s", "messages", 1)
    store.delete("s")
    assert sorted(path.name for path in store.path.iterdir()) == [".leases", "s-2.json", "s-2.json.lock"]


NO_DIRECTORIES: dict[str, tuple[Callable[[persist.Store], Any], type[Exception]]] = {
    "NUL": (lambda store: persist.Store(f"{store.path}/a\0b"), persist.InvalidArgument),
    "a file": (lambda store: persist.Store(store.path / "s.json"), persist.InvalidArgument),
    "below a file": (lambda store: persist.Store(store.path / "s.json" / "x"), persist.Unreadable),
}


@pytest.mark.parametrize(("open_", "error"), NO_DIRECTORIES.values(), ids=NO_DIRECTORIES)
def test_a_path_that_is_no_directory_is_refused(
    open_: Callable[[persist.Store], Any], error: type[Exception], store: persist.Store
) -> None:
    store.create("s")
    before = everything(store.path)
    with pytest.raises(error):
        open_(store)
    assert everything(store.path) == before


def test_a_late_save_of_a_deleted_session_leaves_no_file(store: persist.Store) -> None:
    session = store.create("s", {"n": 0})
    store.delete("s")
    session.data["n"] = 1
    with pytest.raises(persist.SessionDeleted):
        session.save()
    with pytest.raises(persist.SessionNotFound) as caught:
        store.load("s")
    assert caught.value.path == store.path / "s.json"
    assert sorted(path.name for path in store.path.iterdir()) == [".leases"]
