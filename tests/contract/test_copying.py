"""`persist copy`: whole sessions from one store into another, files and a database, in both directions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Run, json_of, runner_of
from harness.chats import HELLO
from harness.contents import name_of

import persist
from persist.cli.commands import persist as command
from persist.copying import Copy, copy, copying

MakeEmpty = Callable[[], persist.Store]
ODD = {
    "title": "\ud800 half, \u0000 zero, \u2028 line, ünï",
    "zero": -0.0,
    "tiny": 5e-324,
    "large": 2**80,
    "order": {"b": 1, "a": {"z": [], "y": {}}},
    "notes": "x" * 5000,
    "messages": [{"id": f"m{number}", "content": "…" * number} for number in range(40)],
    "numbers": list(range(3000)),
    "map": {f"k{number}": number for number in range(2000)},
    "\udfff\\ \x00": [1.5, "\\u0000"],
}


@pytest.fixture
def run() -> Run:
    return runner_of(command)


@pytest.fixture(params=["files to files", "files to postgres", "postgres to files", "postgres to postgres"])
def empties(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MakeEmpty, MakeEmpty]:
    """Return two functions, each of which makes an empty store: of the source's kind, and of the destination's."""

    def files() -> persist.Store:
        return persist.Store(tmp_path / uuid.uuid4().hex[:8], timeout_s=20.0)

    def postgres() -> persist.Store:
        url = request.getfixturevalue("postgres_url")
        return persist.Store(url, schema=f"s_{uuid.uuid4().hex[:12]}", timeout_s=20.0)

    kinds: dict[str, MakeEmpty] = {"files": files, "postgres": postgres}
    if "postgres" in request.param:
        request.getfixturevalue("postgres_url")
    source, _, destination = request.param.split()
    return kinds[source], kinds[destination]


@pytest.fixture
def source(empties: tuple[MakeEmpty, MakeEmpty]) -> persist.Store:
    store = empties[0]()
    store.create("odd", ODD)
    store.create("empty")
    store.create("user:7/ünï", {"title": "odd id", "messages": [HELLO]})
    store.create("s", {"title": "New chat", "messages": [HELLO]})
    store.append("s", "messages", {"id": "m2", "role": "assistant", "content": "Hello"})
    return store


@pytest.fixture
def destination(empties: tuple[MakeEmpty, MakeEmpty]) -> persist.Store:
    return empties[1]()


def text_of(store: persist.Store, session_id: str) -> str:
    """Return a session as text, with the order of its keys and all that a caller sees of its commit."""
    session = store.load(session_id)
    facts = [session.version, session.revision, session.created_at.isoformat(), session.updated_at.isoformat()]
    return json.dumps([facts, session.data])


def require_equal(one: persist.Store, other: persist.Store) -> None:
    assert one.ids() == other.ids()
    for session_id in one.ids():
        assert text_of(one, session_id) == text_of(other, session_id)


# --- whole ---


def test_copy_is_whole(source: persist.Store, destination: persist.Store) -> None:
    """Data, the order of keys, version, revision and times are the same. So is the order of `recent`."""
    done = copy(source, destination)
    assert done.failures == {}
    assert done.is_complete
    assert sorted(done.copied) == sorted(done.equal) == source.ids()
    require_equal(source, destination)
    assert [each.id for each in destination.recent().heads] == [each.id for each in source.recent().heads]
    assert destination.check() == []


def test_there_and_back_every_byte_is_the_same(tmp_path: Path, postgres_url: str) -> None:
    """From files into a database and back into files: behind the header's line, each document has the same bytes."""
    here = persist.Store(tmp_path / "here", journal="never")
    middle = persist.Store(postgres_url, schema=f"s_{uuid.uuid4().hex[:12]}")
    back = persist.Store(tmp_path / "back", journal="never")
    here.create("odd", ODD)
    here.create("plain", {"title": "x", "messages": [HELLO]})
    assert copy(here, middle).is_complete
    assert copy(middle, back).is_complete
    for path in sorted((tmp_path / "here").glob("*.json")):
        bodies = [each.read_bytes().split(b"\n", 1)[1] for each in (path, tmp_path / "back" / path.name)]
        assert bodies[0] == bodies[1]
    # The first store has the same versions still, so there is nothing to do.
    assert sorted(copy(middle, here).unchanged) == ["odd", "plain"]


def test_copy_goes_on_as_the_session(source: persist.Store, destination: persist.Store) -> None:
    """A version that a client has seen before the move holds behind it, and the next stream has a higher epoch."""
    version = source.head("s").version
    copy(source, destination)
    with destination.transaction("s", if_version=version) as tx:
        tx.fields["title"] = "Moved"
    stream = destination.start_stream("s", {"role": "user", "content": "Why?"})
    stream.finish({"role": "assistant", "content": "Because."})
    assert destination.load("s").data["title"] == "Moved"
    assert destination.load("s").data["messages"][-1]["content"] == "Because."


# --- again ---


def test_second_run_copies_only_what_has_changed(source: persist.Store, destination: persist.Store) -> None:
    """Changes of every kind reach the copy: items, fields, a session that was created anew."""
    copy(source, destination)
    source.append("odd", "messages", {"id": "new"})
    with source.transaction("s") as tx:
        tx.fields["title"] = "Changed"
        del tx.list("messages")[0]
    source.delete("empty")
    source.create("empty", {"title": "another one"})
    done = copy(source, destination)
    assert sorted(done.copied) == ["empty", "odd", "s"]
    assert done.unchanged == ["user:7/ünï"]
    assert done.is_complete
    require_equal(source, destination)
    assert copy(source, destination).copied == []


def test_session_that_is_gone_is_named_and_pruned(source: persist.Store, destination: persist.Store, run: Run) -> None:
    """A deleted session would come back to life in the destination. It is told, and `--prune` removes its copy."""
    destination.create("own", {"title": "never copied"})
    copy(source, destination)
    source.delete("s")
    done = copy(source, destination)
    assert done.gone == ["s"]
    assert not done.is_complete
    result = run("copy", name_of(source), name_of(destination))
    assert result.exit_code == 1
    assert "--prune: s" in result.stderr
    result = run("copy", name_of(source), name_of(destination), "--prune", "--json")
    assert result.exit_code == 0
    assert json_of(result)["removed"] == ["s"]
    assert destination.ids() == sorted([*source.ids(), "own"])


def test_prune_of_a_store_that_is_not_there_removes_nothing(source: persist.Store, destination: persist.Store) -> None:
    """If the source has none of the copied sessions, its disk may not be mounted."""
    copy(source, destination)
    before = destination.ids()
    for session_id in source.ids():
        source.delete(session_id)
    with pytest.raises(persist.InvalidArgument, match="without any of the sessions"):
        copy(source, destination, prune=True)
    assert destination.ids() == before


# --- what is left alone ---


@pytest.mark.parametrize("change", ["own", "field", "stream", "other store"])
def test_session_that_the_destination_has_changed_is_left_alone(
    source: persist.Store,
    destination: persist.Store,
    empties: tuple[MakeEmpty, MakeEmpty],
    run: Run,
    change: str,
) -> None:
    """A session of its own, and a copy that was changed there, are refused by name. The others are copied.

    Without the comparison in `_mark_of`, the changed copy is overwritten.
    """
    if change == "own":
        destination.create("s", {"title": "its own"})
    elif change == "other store":
        other = empties[0]()
        other.create("s", {"title": "of another store"})
        copy(other, destination)
    else:
        copy(source, destination)
        if change == "field":
            destination.update("s", lambda tx: tx.fields.update(title="changed there"))
        else:
            destination.start_stream("s", {"role": "user", "content": "Why?"}).finish()
        source.append("s", "messages", {"id": "m3"})
    before = text_of(destination, "s")
    done = copy(source, destination)
    assert list(done.failures) == ["s"]
    assert isinstance(done.failures["s"], persist.SessionExists)
    assert sorted(done.equal) == sorted({*source.ids()} - {"s"})
    assert not done.is_complete
    result = run("copy", name_of(source), name_of(destination))
    assert result.exit_code == 1
    assert "'s' exists already" in result.stderr
    assert text_of(destination, "s") == before


def test_directories_of_one_name_on_two_machines_are_two_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither copy takes the place of the other, and `prune` leaves the other machine's copies alone.

    A machine that has got another name is still the source of its copies.
    """
    there, path = persist.Store(tmp_path / "there"), tmp_path / "sessions"
    monkeypatch.setattr(socket, "gethostname", lambda: "one")
    first = persist.Store(path)
    first.create("s", {"title": "of one"})
    first.create("only one")
    assert copy(first, there).is_complete
    first.update("s", lambda tx: tx.fields.update(title="of one, changed"))
    monkeypatch.setattr(socket, "gethostname", lambda: "another name")
    assert copy(first, there).copied == ["s"]
    path.rename(tmp_path / "of one")
    monkeypatch.setattr(socket, "gethostname", lambda: "two")
    second = persist.Store(path)
    second.create("s", {"title": "of two"})
    done = copy(second, there, prune=True)
    assert isinstance(done.failures["s"], persist.SessionExists)
    assert there.load("s").data["title"] == "of one, changed"
    assert there.ids() == ["only one", "s"]


def test_slow_copy_does_not_take_the_place_of_a_later_one(
    source: persist.Store, destination: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that reads a session, and writes it only when another run has copied a later commit, writes nothing."""
    begin = destination._open().engine.transaction

    def later(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        source.append("s", "messages", {"id": "m3"})
        assert "s" in copy(source, destination).copied
        return begin(*args, **options)

    only = [each for each in source.ids() if each != "s"]
    copy(source, destination)
    source.append("s", "messages", {"id": "m2.5"})
    monkeypatch.setattr(destination._open().engine, "transaction", later)
    done = copy(source, destination)
    assert done.copied == []
    assert sorted(done.unchanged) == sorted([*only, "s"])
    assert done.is_complete
    require_equal(source, destination)


def test_session_with_a_live_stream_waits_for_the_next_run(
    source: persist.Store, destination: persist.Store, run: Run
) -> None:
    """It is named, with exit status 1, and the others are copied. When the stream has ended, it is copied, too."""
    stream = source.start_stream("s", {"role": "user", "content": "Why?"})
    stream.checkpoint({"role": "assistant", "content": "Be"})
    done = copy(source, destination)
    assert isinstance(done.failures["s"], persist.SessionBusy)
    assert destination.ids() == sorted({*source.ids()} - {"s"})
    result = run("copy", name_of(source), name_of(destination))
    assert result.exit_code == 1
    assert f"stream {stream.id}" in result.stderr
    stream.finish({"role": "assistant", "content": "Because."})
    assert copy(source, destination).copied == ["s"]
    require_equal(source, destination)


def test_session_with_a_dead_stream_is_copied_once_it_is_cleared(
    source: persist.Store, destination: persist.Store
) -> None:
    """Only its own store knows what a dead stream has left. The error names the command that clears it."""
    options = {key: source._options[key] for key in ("schema",)}
    code = f"""
import os, persist
persist.Store({source._at!r}, lease_s=1.0, **{options!r}).start_stream("s", {{"role": "user", "content": "Why?"}})
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    waiting = threading.Event()
    while (info := source.stream("s")) is not None and info.is_live:
        waiting.wait(0.05)
    error = copy(source, destination).failures["s"]
    assert "persist clear-stale" in str(error)
    assert [each.session_id for each in source.clear_stale_streams().cleared] == ["s"]
    assert copy(source, destination).copied == ["s"]
    require_equal(source, destination)


def test_damaged_session_does_not_keep_the_others(source: persist.Store, destination: persist.Store) -> None:
    """A session that cannot be read is named, and the others are copied."""
    if not Path(source._at).is_dir():
        pytest.skip("this engine has no files")
    path = Path(source._at, "s.json")
    path.write_bytes(path.read_bytes().replace(b"Hello", b"Hallo"))
    done = copy(source, destination)
    assert {key: type(error) for key, error in done.failures.items()} == {"s": persist.CorruptSession}
    assert destination.ids() == sorted({*source.ids()} - {"s"})


def test_session_that_the_database_cannot_take_does_not_keep_the_others(tmp_path: Path, postgres_url: str) -> None:
    """It is named, with the limit, and the others are copied."""
    here = persist.Store(tmp_path / "here")
    there = persist.Store(postgres_url, schema=f"s_{uuid.uuid4().hex[:12]}")
    for name in ("a", "b", "c"):
        here.create(name, {"messages": [{"id": os.urandom(5000).hex(), "content": name}]})
    here.update("b", lambda tx: tx.fields.update({os.urandom(5000).hex(): "x" * 9000}))
    done = copy(here, there)
    assert sorted(done.equal) == there.ids() == ["a", "c"]
    assert list(done.failures) == ["b"]
    assert "at most 1,000 bytes" in str(done.failures["b"])


def test_store_is_not_copied_into_itself(source: persist.Store, run: Run) -> None:
    """The same directory, or the same schema, is refused."""
    with pytest.raises(persist.InvalidArgument, match="the source itself"):
        copy(source, persist.Store(source._at, schema=source._options["schema"]))
    assert run("copy", name_of(source), name_of(source)).exit_code == 3


def test_directory_with_other_files_is_no_destination(source: persist.Store, run: Run, tmp_path: Path) -> None:
    """Nothing is written among the files of somebody else."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.txt").write_text("mine")
    result = run("copy", name_of(source), tmp_path / "docs")
    assert result.exit_code == 2
    assert [each.name for each in (tmp_path / "docs").iterdir()] == ["notes.txt"]


# --- the comparison ---


@pytest.mark.parametrize("what", ["an item", "a field", "the order of keys", "a time"])
def test_comparison_finds_a_planted_difference(
    source: persist.Store, destination: persist.Store, run: Run, what: str
) -> None:
    """A document with the right version and another text is told. Without `_facts` in `_compare`, it is not."""
    copy(source, destination)
    engine = destination._open().engine
    found = engine.read("s")
    data, header = found.content.decode(), found.header
    if what == "an item":
        data["messages"][0]["content"] = "hj"
    elif what == "a field":
        data["title"] = "New chatt"
    elif what == "the order of keys":
        data["messages"][0] = dict(reversed(data["messages"][0].items()))
    else:
        header = header.but(updated_at=header.created_at)
    from persist.storage.content import encoded

    with engine.transaction("s") as tx:
        tx.put(header, encoded(data))
    done = copy(source, destination)
    assert done.different == ["s"]
    assert sorted(done.equal) == sorted({*source.ids()} - {"s"})
    result = run("copy", name_of(source), name_of(destination))
    assert result.exit_code == 1
    assert "differ from their copies" in result.stderr


# --- kills and live writers ---


def test_copy_that_was_killed_goes_on(source: persist.Store, destination: persist.Store) -> None:
    """The copies of a killed run are whole, and the next run copies the rest."""
    for number in range(30):
        source.create(f"t-{number:02}", {"title": f"{number}", "messages": [HELLO] * number})
    named = [(each._at, each._options["schema"]) for each in (source, destination)]
    code = f"""
import persist
from persist.copying import copying
stores = [persist.Store(at, schema=schema) for at, schema in {named!r}]
for step in copying(*[store._open().engine for store in stores]):
    print(step.done, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(12):
        child.stdout.readline()
    child.kill()
    child.communicate(timeout=60)
    there = destination.ids()
    assert 12 <= len(there) <= len(source.ids())
    for session_id in there:
        assert text_of(destination, session_id) == text_of(source, session_id)
    done = copy(source, destination)
    assert sorted(done.unchanged) == there
    assert sorted([*done.copied, *there]) == source.ids()
    assert done.is_complete
    require_equal(source, destination)


def test_live_writers_lose_nothing(source: persist.Store, destination: persist.Store) -> None:
    """Writers go on during the first run. Each copy is some whole commit, and the run after their end has the rest."""
    for number in range(10):
        source.create(f"t-{number}", {"n": 0, "messages": []})
    is_over, begun, failures = threading.Event(), threading.Barrier(3), list[Exception]()

    def write(which: int) -> None:
        begun.wait()
        number = 0
        try:
            while not is_over.is_set():
                number += 1
                with source.transaction(f"t-{number % 10}") as tx:
                    tx.fields["n"] += 1
                    tx.list("messages").append({"id": f"{which}-{number}"})
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for each in writers:
        each.start()
    begun.wait()
    try:
        for _ in range(3):
            done = Copy()
            for step in copying(source._open().engine, destination._open().engine):
                done.add(step.found)
            assert done.failures == {}
            for session_id in destination.ids(prefix="t-"):
                data = destination.load(session_id).data
                assert data["n"] == len(data["messages"])
    finally:
        is_over.set()
        for each in writers:
            each.join()
    assert failures == []
    assert copy(source, destination).is_complete
    require_equal(source, destination)
    assert copy(source, destination).copied == []


# --- the command ---


def test_command_copies_into_a_new_place_and_says_so(source: persist.Store, run: Run, tmp_path: Path) -> None:
    """The first run makes the destination. The exit status 0 means that every document is equal."""
    first = run("copy", name_of(source), tmp_path / "new")
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout == "4 sessions copied, 0 unchanged. 4 documents compared with their copies are equal.\n"
    second = json_of(run("copy", name_of(source), tmp_path / "new", "--json"))
    assert second["copied"] == []
    assert sorted(second["unchanged"]) == sorted(second["equal"]) == source.ids()
    require_equal(source, persist.Store(tmp_path / "new"))
