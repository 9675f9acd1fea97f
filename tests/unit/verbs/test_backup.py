"""`backup` copies a live store session by session. The copies are whole documents, and a store of their own."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from harness.chats import PROMPT, everything
from harness.faults import Fault, injecting

import persist
from persist import aio
from persist.backup import backing_up
from persist.storage import disk, layout

IDS = ["s", "user:7/chat", "long " * 50, "con", "日本"]


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Return the directory for the copies, which does not exist yet."""
    return tmp_path / "above" / "copies"


@pytest.fixture
def full(store: persist.Store) -> persist.Store:
    """Return a store with sessions of every kind: small, with a journal, with a stream, and of another program."""
    log = persist.Store(store.path, journal="always")
    for number, session_id in enumerate(IDS):
        (log if number % 2 else store).create(session_id, {"title": session_id, "messages": [PROMPT]})
        store.append(session_id, "messages", {"id": "m2", "n": number})
    store.create("large", {"messages": [{"id": f"m{n}", "content": "x" * 100} for n in range(2000)]})
    store.append("large", "messages", {"id": "last"})
    (store.path / "other.json").write_text('{"title": "of another program", "n": 1.50}')
    (store.path / "_index.json").write_text("{}")
    return store


def content_of(store: persist.Store) -> dict[str, Any]:
    """Return the data and the version of each session, as a reader sees them."""
    return {each: (store.load(each).data, store.load(each).version) for each in store.ids()}


def documents(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in directory.glob("*.json")}


# --- what a copy is ---


def test_copy_is_a_store_that_check_finds_sound(full: persist.Store, copies: Path) -> None:
    """A copy has every session, at its version, without a journal, a lock or a hard link.
    It has nothing of other programs.
    """
    done = full.backup(copies)
    assert (done.path, done.copied, done.failures) == (copies, sorted(full.ids(), key=layout.name_of), {})
    copy = persist.Store(copies, create=False)
    assert content_of(copy) == content_of(full)
    assert copy.check() == []
    names = {path.name for path in copies.iterdir()}
    assert names == {*(f"{layout.name_of(each)}.json" for each in full.ids()), ".leases", ".backup"}
    assert {path.stat().st_nlink for path in copies.glob("*.json")} == {1}
    assert {path.stat().st_mode & 0o777 for path in copies.glob("*.json")} == {0o600}
    assert [copy.head(each).updated_at for each in copy.ids()] == [full.head(each).updated_at for each in full.ids()]


@pytest.mark.parametrize("session_id", [*IDS, "large", "other"], ids=ascii)
def test_only_what_changed_is_written_again(full: persist.Store, copies: Path, session_id: str) -> None:
    """A second backup brings the first one up to date. Every unchanged file keeps its inode."""
    full.backup(copies)
    before = documents(copies)
    assert full.backup(copies).copied == []
    assert documents(copies) == before
    full.update(session_id, lambda tx: tx.fields.update(title="new"))
    done = full.backup(copies)
    assert (done.copied, len(done.unchanged)) == ([session_id], len(full.ids()) - 1)
    changed = {name for name, each in documents(copies).items() if each != before[name]}
    assert changed == {f"{layout.name_of(session_id)}.json"}
    assert content_of(persist.Store(copies)) == content_of(full)


def test_copy_stays_as_it_was(full: persist.Store, copies: Path) -> None:
    """Later commits of the store do not reach the copy. They would reach a hard link of a journal."""
    full.backup(copies)
    before, kept = documents(copies), content_of(persist.Store(copies))
    for session_id in full.ids():
        full.append(session_id, "messages", {"id": "later"})
    assert documents(copies) == before
    assert content_of(persist.Store(copies)) == kept


def test_linked_files_are_no_copy(store: persist.Store, tmp_path: Path) -> None:
    """Hard links are no copy: a journal is written in place, so they follow the store until a fold spoils them."""
    log = persist.Store(store.path, journal="always")
    log.create("s", {"messages": []})
    shutil.copytree(store.path, tmp_path / "linked", copy_function=os.link)
    log.append("s", "messages", "later")
    assert persist.Store(tmp_path / "linked").load("s").data["messages"] == ["later"]


def test_backup_over_linked_files_writes_no_file_of_the_store(full: persist.Store, copies: Path) -> None:
    """Links in a backup are replaced, and never written to."""
    full.backup(copies)
    for path in copies.glob("*.json"):
        path.unlink()
        os.link(full.path / path.name, path)
    full.update("s", lambda tx: tx.fields.update(title="new"))
    full.update("large", lambda tx: tx.data.update(title="new"))
    before = everything(full.path)
    full.backup(copies)
    assert everything(full.path) == before
    assert {problem.kind for problem in full.check()} == {"foreign"}


# --- streams ---


@pytest.mark.parametrize("session_id", IDS, ids=ascii)
def test_copy_of_a_running_stream_is_dead_and_is_cleared(
    store: persist.Store, copies: Path, tmp_path: Path, session_id: str
) -> None:
    """A running stream is copied as it is committed. Put back, the stream is dead. An ordinary sweep finds it, and
    keeps prompt and partial. Fails if the copy has no lease.
    """
    store.create(session_id, {"messages": []})
    with store.start_stream(session_id, PROMPT) as stream:
        stream.checkpoint({"role": "assistant", "content": "Be"})
        store.backup(copies)
        stream.finish({"role": "assistant", "content": "Because."})
    copy = persist.Store(copies)
    assert copy.load(session_id).active_stream_id == stream.id
    assert copy.check() == [], "that is as it should be"
    shutil.copytree(copies, tmp_path / "restored", ignore=shutil.ignore_patterns(".backup"))
    restored = persist.Store(tmp_path / "restored")
    assert [problem.kind for problem in restored.check()] == ["stale"]
    assert [(each.session_id, each.stream_id) for each in restored.clear_stale_streams().cleared] == [
        (session_id, stream.id)
    ]
    assert [message["content"] for message in restored.load(session_id).data["messages"]] == ["Why?", "Be"]
    assert restored.check() == []
    assert list((tmp_path / "restored" / ".leases").iterdir()) == []
    # The session of the next backup has no stream.
    assert store.backup(copies).copied == [session_id]
    assert list((copies / ".leases").iterdir()) == []


def test_copy_is_put_back_as_a_file(full: persist.Store, copies: Path) -> None:
    """A copied document in a session's place, without a journal, puts the session back at the copy's version."""
    kept = full.load("large").version
    full.backup(copies)
    full.update("large", lambda tx: tx.data.clear())
    for path in full.path.glob("large.*"):
        path.unlink()
    shutil.copy(copies / "large.json", full.path)
    assert full.load("large").data["messages"][-1] == {"id": "last"}
    assert full.load("large").version == kept
    full.append("large", "messages", {"id": "after"}, timeout_s=1)
    assert [problem for problem in full.check() if problem.kind != "foreign"] == []


@pytest.mark.parametrize("journal", ["always", "never"])
def test_deleted_session_is_put_back_beside_stores_that_know_it(
    directory: Path, copies: Path, journal: Literal["always", "never"]
) -> None:
    """A rename of a copy to a name that is free gives each store the session of the copy, and both go on with it."""
    a, b = (persist.Store(directory, journal=journal) for _ in range(2))
    a.create("s", {"messages": [{"id": f"m{n}", "content": "x" * 100} for n in range(200)]})
    with a.start_stream("s", PROMPT | {"id": "running"}):
        a.backup(copies)
    a.append("s", "messages", {"id": "lost"})
    for each in (a, b):
        assert each.load("s").data["messages"][-1] == {"id": "lost"}
    a.delete("s")
    with pytest.raises(persist.SessionNotFound):
        b.head("s")
    shutil.copy(copies / "s.json", directory / "put-back.tmp")
    (directory / "put-back.tmp").rename(directory / "s.json")
    for each in (b, a):
        assert each.load("s").data["messages"][-1]["id"] == "running"
        info = each.stream("s")
        assert info is not None
        assert not info.is_live
    assert b.load("s").clear_stale_stream()
    for each, other in ((b, a), (a, b)):
        version = each.append("s", "messages", {"id": f"after {id(each)}"})
        assert other.load("s").version == version
    assert len(a.load("s").data["messages"]) == 203
    assert a.check() == []


# --- what is gone ---


def test_copies_of_deleted_sessions_stay_until_they_are_pruned(full: persist.Store, copies: Path) -> None:
    """A delete by mistake must not reach the copy. `prune` removes the copies of deleted sessions, and nothing else."""
    with full.start_stream("s", PROMPT | {"id": "running"}):
        full.backup(copies)
        full.delete("s", force=True)
    full.delete("long " * 50)
    assert full.backup(copies).gone == ["long " * 50, "s"]
    assert {"s", "long " * 50} < set(persist.Store(copies).ids())
    done = full.backup(copies, prune=True)
    assert (done.removed, done.gone) == (["long " * 50, "s"], [])
    assert content_of(persist.Store(copies)) == content_of(full)
    assert list((copies / ".leases").iterdir()) == []


def test_empty_store_prunes_nothing(full: persist.Store, copies: Path) -> None:
    """An empty store prunes nothing, because its disk may not be mounted (HAZARDS F18)."""
    full.backup(copies)
    before = everything(copies)
    for path in full.path.glob("*.json"):
        path.unlink()
    with pytest.raises(persist.InvalidArgument, match="without any of the sessions"):
        full.backup(copies, prune=True)
    # A server has begun a new store in the place of the one that is not mounted.
    full.create("new", {"messages": []})
    with pytest.raises(persist.InvalidArgument, match="without any of the sessions"):
        full.backup(copies, prune=True)
    full.delete("new")
    assert everything(copies) == before
    assert len(full.backup(copies).gone) == len(IDS) + 2
    shutil.rmtree(full.path)
    with pytest.raises(persist.Unreadable):
        full.backup(copies, prune=True)


# --- what cannot be read ---


def put_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


SPOILT: dict[str, Callable[[Path], object]] = {
    "damaged": lambda path: path.write_bytes(path.read_bytes().replace(b"Why?", b"Who?")),
    "no JSON": lambda path: path.write_text("{"),
    "empty": lambda path: path.write_text(""),
    "a newer format": lambda path: path.write_text('{"_persist":{"format":9,"checksum":"x"}}'),
    "a directory": put_a_directory,
    "a link": put_a_link,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("session_id", ["s", "long " * 50], ids=["plain", "hashed"])
def test_session_that_cannot_be_read_is_named_and_its_old_copy_stays(
    full: persist.Store, copies: Path, session_id: str, spoil: Callable[[Path], object]
) -> None:
    """The other sessions are copied. A damaged session does not count as gone, also with `prune`."""
    full.backup(copies)
    before = documents(copies)
    full.append(session_id, "messages", {"id": "later"})
    path = full.path / f"{layout.name_of(session_id)}.json"
    spoil(path)
    full.append("con", "messages", {"id": "later"})
    done = full.backup(copies, prune=True)
    assert (done.copied, done.removed, done.gone) == (["con"], [], [])
    assert list(done.failures) in ([session_id], [path.stem])
    assert all(isinstance(error, persist.PersistError) for error in done.failures.values())
    assert documents(copies)[path.name] == before[path.name]


def test_session_that_is_locked_for_long_is_named(full: persist.Store, copies: Path) -> None:
    """A session that another thread locks for longer than the call's timeout is named in the result. In a block of its
    own, a thread gets an error, because it may ask for no second lock.
    """
    full.backup(copies)
    full.append("s", "messages", {"id": "later"})
    has_it, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with full.transaction("s"):
            has_it.set()
            may_end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_it.wait(60)
    found = full.backup(copies, timeout_s=0).failures
    may_end.set()
    thread.join()
    assert [(each, type(error)) for each, error in found.items()] == [("s", persist.LockTimeout)]
    with full.transaction("con"), pytest.raises(persist.LockError, match="asked for"):
        full.backup(copies)
    assert full.backup(copies).copied == ["s"]


# --- where copies may go ---


def test_directory_with_other_files_is_refused(full: persist.Store, tmp_path: Path) -> None:
    """A backup into a directory with other files is refused, and nothing changes. So is one into another store or its
    copy, because their sessions would be replaced.
    """
    other = persist.Store(tmp_path / "other")
    other.create("s", {"title": "mine"})
    other.backup(tmp_path / "its copy")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    for wrong in ("other", "its copy", "home", "file"):
        with pytest.raises(persist.InvalidArgument):
            full.backup(tmp_path / wrong, prune=True)
    for inside in (full.path, full.path / "copies", full.path / "a" / "b", full.path / ".." / full.path.name):
        with pytest.raises(persist.InvalidArgument, match="the store itself"):
            full.backup(inside)
    for unusable in ("", 5, None, "a\0b", b"bytes"):
        with pytest.raises(persist.InvalidArgument, match="path"):
            full.backup(unusable)  # type: ignore[arg-type]
    assert everything(tmp_path) == before


def test_backup_in_use_as_a_store_is_refused(full: persist.Store, copies: Path) -> None:
    """A server that was pointed at the backup loses nothing to the next one.

    Fails unless the first commit takes the mark away: then the copies, and the live stream, are written over.
    """
    full.backup(copies)
    there = persist.Store(copies)
    there.create("only-there", {"messages": []})
    with there.start_stream("s", PROMPT) as stream:
        before = content_of(there)
        with pytest.raises(persist.InvalidArgument, match="was written to as a store"):
            full.backup(copies, prune=True)
        assert content_of(there) == before
        stream.finish()


def test_backup_that_becomes_a_store_is_left_alone_from_then_on(full: persist.Store, copies: Path) -> None:
    """Also by a backup that has begun before. Fails without the look at the mark before each copy."""
    full.backup(copies)
    full.append("large", "messages", {"id": "newer"})
    steps = backing_up(full._open(), copies)
    next(steps)
    there = persist.Store(copies)
    there.append("large", "messages", {"id": "there"})
    before = content_of(there)
    with pytest.raises(persist.InvalidArgument, match="in use as a store"):
        list(steps)
    assert content_of(there) == before


def test_backup_into_the_home_directory(full: persist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home directory, as for a store."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert full.backup("~/copies").path == tmp_path / "home" / "copies"
    assert persist.Store(tmp_path / "home" / "copies").exists("s")


def test_moved_store_is_told_how_to_go_on(full: persist.Store, copies: Path) -> None:
    """The copies name the store by its path, so the error of a moved store says how to change that."""
    full.backup(copies)
    moved = persist.Store(full.path.rename(full.path.with_name("moved")))
    with pytest.raises(persist.InvalidArgument, match=r"write its path into .*\.backup"):
        moved.backup(copies)
    (copies / ".backup").write_text(json.dumps({"persist_backup": 1, "store": str(moved.path)}))
    assert moved.backup(copies).copied == []


def test_two_backups_into_one_directory_are_refused(full: persist.Store, copies: Path) -> None:
    """Only one backup into a directory runs at a time, in whatever process."""
    steps = backing_up(full._open(), copies)
    next(steps)
    with pytest.raises(persist.LockError, match="Another backup"):
        full.backup(copies)
    steps.close()
    assert len(full.backup(copies).unchanged) == 1


# --- refusals and crashes ---


@pytest.mark.parametrize("step", ["create", "write", "sync", "replace"])
def test_disk_that_refuses_leaves_the_old_copies(full: persist.Store, copies: Path, step: str) -> None:
    """No partial copy gets the name of a copy, and the next backup makes up for the failed one."""
    full.backup(copies)
    before = documents(copies)
    full.append("s", "messages", {"id": "later"})

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EIO, "refused")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(persist.CommitFailed, match="back up again") as caught:
        patch.setattr(disk, step, refuse)
        full.backup(copies)
    assert (caught.value.session_id, caught.value.path) == ("s", copies / "s.json")
    assert documents(copies) == before
    assert persist.Store(copies).check() == []
    assert full.backup(copies).copied == ["s"]


def noting(done: list[tuple[str, str]], name: str, real: Callable[..., Any], *arguments: Any) -> Any:
    """Note a call with its last argument, and make it."""
    done.append((name, str(arguments[-1])))
    return real(*arguments)


def test_directory_is_synced_behind_the_last_copy(full: persist.Store, copies: Path) -> None:
    """A rename is durable only when its directory is synced.
    If that sync fails, the error says that the outcome is unknown.
    """
    done: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "sync_directory"):
            real: Callable[..., Any] = getattr(disk, name)
            patch.setattr(disk, name, partial(noting, done, name, real))
        full.backup(copies)
    assert done[-1] == ("sync_directory", str(copies))
    assert done[-2] == ("sync_directory", str(copies / ".leases"))
    with (
        injecting(Fault("fsync", 1, errno.EIO, is_persistent=True)),
        pytest.raises(persist.PersistError, match="unknown whether the copies"),
    ):
        full.backup(copies)


def test_backup_can_be_stopped_and_started_again(full: persist.Store, copies: Path) -> None:
    """A backup may be stopped after each step: its finished copies are whole, and the next backup goes on."""
    for steps_done in range(1, len(full.ids()) + 1):
        steps = backing_up(full._open(), copies)
        for _ in range(steps_done):
            step = next(steps)
        steps.close()
        assert step.total == len(full.ids())
        assert len(persist.Store(copies, create=False).ids()) == steps_done
        assert persist.Store(copies, create=False).check() == []
    assert full.backup(copies).copied == []


def test_backup_is_awaited(full: persist.Store, copies: Path) -> None:
    """`backup` can be awaited like the other verbs that look at many sessions."""
    done = asyncio.run(aio.Store(full).backup(copies, prune=True))
    assert done.copied == sorted(full.ids(), key=layout.name_of)
