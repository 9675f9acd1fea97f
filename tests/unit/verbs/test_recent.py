"""`recent` gives the sessions that were updated last, by the times of their lock files and without an index."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli.conftest import json_of, runner_of
from harness.acknowledged import misplaced
from harness.files import file_engine
from unit.test_costs import counted

import persist
import persist.aio
from persist.cli.commands import persist as command
from persist.storage import disk

NAMES = ["a", "user:7/b", "long " * 50, "con", "日本"]


def date(store: persist.Store, session_id: str, age_s: float) -> Path:
    """Give a session's lock file a time, as if its last commit was so long ago."""
    lock = Path(file_engine(store).layout.session(session_id).lock)
    then = time.time_ns() - int(age_s * 1e9)
    os.utime(lock, ns=(then, then))
    return lock


@pytest.fixture
def aged(store: persist.Store) -> persist.Store:
    """Sessions that were last written 10, 20, 30, 40 and 50 seconds ago."""
    for name in reversed(NAMES):
        store.create(name, {"title": name, "messages": []})
    for number, name in enumerate(NAMES, 1):
        date(store, name, number * 10)
    return store


def ids(page: persist.Recent) -> list[str]:
    return [head.id for head in page]


def test_last_updated_session_comes_first(aged: persist.Store) -> None:
    """A commit of any verb brings a session to the top. `touch=False` and a look move nothing."""
    assert ids(aged.recent()) == NAMES
    aged.append("con", "messages", {"id": "m"})
    assert ids(aged.recent()) == ["con", "a", "user:7/b", "long " * 50, "日本"]
    aged.append("日本", "messages", {"id": "m"}, touch=False)
    aged.load("日本")
    aged.stream("日本")
    assert ids(aged.recent(limit=2)) == ["con", "a"]
    aged.start_stream("user:7/b").finish()
    assert ids(aged.recent(limit=2)) == ["user:7/b", "con"]
    session = aged.load("日本")
    session.data["title"] = "new"
    session.save()
    assert ids(aged.recent())[0] == "日本"


def test_pages_show_each_session_once(aged: persist.Store) -> None:
    """The cursor of a page leads to the next one, also if something was updated meanwhile."""
    first = aged.recent(limit=2)
    assert (len(first), first.cursor is not None) == (2, True)
    aged.append("日本", "messages", {"id": "m"})
    second = aged.recent(limit=2, before=first.cursor)
    assert ids(first) + ids(second) == NAMES[:4]
    assert second.cursor is None
    assert ids(aged.recent())[0] == "日本"


def test_limits_prefixes_and_cursors(aged: persist.Store) -> None:
    """The arguments are those of a list, and a cursor that is none is refused."""
    assert ids(aged.recent(prefix="user:7/")) == ["user:7/b"]
    assert ids(aged.recent(limit=5)) == NAMES
    assert aged.recent(limit=5).cursor is None
    for cursor in ("", "x", "12", "12-_index", "--1-a", "1" * 40 + "-a", 3):
        with pytest.raises(persist.InvalidArgument):
            aged.recent(before=cursor)  # type: ignore[arg-type]
    for limit in (None, 0, -1):
        with pytest.raises(persist.InvalidArgument):
            aged.recent(limit=limit)  # type: ignore[arg-type]


def test_time_before_the_epoch_has_a_cursor(aged: persist.Store) -> None:
    """A clock that was never set."""
    for name in NAMES:
        date(aged, name, time.time() + 5 + NAMES.index(name))
    page = aged.recent(limit=2)
    assert ids(page) + ids(aged.recent(before=page.cursor)) == NAMES


def test_look_at_a_restored_session_moves_nothing(aged: persist.Store, tmp_path: Path) -> None:
    """A restored store has no lock files. The copies have the times of their sessions, and a new lock file takes them.

    Fails if a lock file that a mere look creates has the time of now.
    """
    for name in reversed(NAMES):
        aged.append(name, "messages", {"id": "m"})
        time.sleep(0.01)
    aged.backup(tmp_path / "copies")
    (tmp_path / "copies" / ".backup").unlink()
    restored = persist.Store(tmp_path / "copies")
    assert ids(restored.recent()) == NAMES
    restored.stream("日本")
    restored.append("con", "messages", {"id": "n"}, touch=False)
    restored.backup(tmp_path / "again")
    assert [session_id for _, session_id in restored._backend.engine.recent(None)] == NAMES
    restored.append("日本", "messages", {"id": "n"})
    assert ids(restored.recent())[0] == "日本"


def test_heads_tell_the_order_within_a_second(store: persist.Store) -> None:
    """A session is marked at most once a second. Within a page the order is exact all the same."""
    for name in ("a", "b", "c"):
        store.create(name)
    for name in ("c", "a", "b", "a"):
        store.append(name, "log", 1)
    assert ids(store.recent()) == ["a", "b", "c"]


def test_mark_is_made_once_a_second(aged: persist.Store) -> None:
    """A younger time is left alone, whatever commits. One in the future is a wrong one."""
    lock = date(aged, "a", 0.4)
    before = lock.stat().st_mtime_ns
    aged.append("a", "messages", {"id": "1"})
    assert lock.stat().st_mtime_ns == before
    date(aged, "a", -60)
    aged.append("a", "messages", {"id": "2"})
    assert lock.stat().st_mtime_ns < time.time_ns()


def test_mark_is_no_condition_of_a_commit(aged: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses it keeps nobody from committing."""

    def refuse(_file: object) -> None:
        raise OSError(errno.EPERM, "no time")

    monkeypatch.setattr(disk, "touch", refuse)
    aged.append("a", "messages", {"id": "m"})
    assert aged.tail("a") == [{"id": "m"}]


def test_killed_process_leaves_no_session_that_looks_older(
    aged: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark comes before the commit. Fails if it comes after: a process may die in between."""

    def die(_fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "sync", die)
    monkeypatch.setattr(disk, "sync_data", die)
    with pytest.raises(KeyboardInterrupt):
        aged.append("con", "messages", {"id": "m"})
    assert next(aged._backend.engine.recent(None))[1] == "con"


def test_nothing_is_hidden(aged: persist.Store, tmp_path: Path) -> None:
    """Files without a lock file are there, too: a copy that was put back, another program's, a whole backup."""
    (aged.path / "other.json").write_text("{}")
    (aged.path / "_index.json").write_text("{}")
    (aged.path / "a.json.lock").unlink()
    assert sorted(ids(aged.recent())) == sorted([*NAMES, "other"])
    aged.backup(tmp_path / "copies")
    assert sorted(ids(persist.Store(tmp_path / "copies").recent())) == sorted([*NAMES, "other"])


def test_deleted_and_damaged_sessions_are_left_out(aged: persist.Store) -> None:
    """No ghost is shown, and one bad file hides no other."""
    aged.delete("a")
    (aged.path / "a.json.lock").touch()
    (aged.path / "%63on.json").write_bytes(b"")
    assert ids(aged.recent()) == ["user:7/b", "long " * 50, "日本"]


def test_directory_that_is_gone_is_an_error(aged: persist.Store) -> None:
    """An empty list would look like a store without sessions (HAZARDS F18)."""
    aged.path.rename(aged.path.with_name("elsewhere"))
    with pytest.raises(persist.Unreadable):
        aged.recent()


def test_only_lock_files_are_looked_at(aged: persist.Store) -> None:
    """A look at a journal's times makes its next sync dearer. Fails if every entry is asked for its status."""
    persist.Store(aged.path, journal="always").append("a", "messages", {"id": "m"})
    _, calls = counted(lambda: list(file_engine(aged).marks()))
    assert "lstat" not in calls
    assert calls.count("stat") <= 1


def test_recent_of_asyncio_and_of_the_command(aged: persist.Store) -> None:
    """The same list, awaited and printed."""

    async def recent() -> list[str]:
        return ids(await persist.aio.Store(aged).recent(limit=2))

    assert asyncio.run(recent()) == NAMES[:2]
    run = runner_of(command)
    assert [each["id"] for each in json_of(run("ls", aged.path, "--recent", "--json"))] == NAMES
    assert [each["id"] for each in json_of(run("ls", aged.path, "--recent", "--limit", 3, "--json"))] == NAMES[:3]
    assert [each["id"] for each in json_of(run("ls", aged.path, "--limit", 2, "--json"))] == sorted(NAMES)[:2]


def test_the_harness_notices_a_mark_that_is_too_old(aged: persist.Store) -> None:
    """The check of the long runs can fail."""
    assert datetime.now(UTC)
    assert len(list(misplaced(aged))) == len(NAMES)
    for name in NAMES:
        date(aged, name, 0)
    assert list(misplaced(aged)) == []
