"""Ways out: a session that cannot be read can be deleted and replaced, and its error says how.

A store whose directory has vanished, or is another one, says so in every verb.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import json_of, runner_of
from conftest import ActorFactory
from harness.chats import everything

import persist
from persist import errors
from persist.cli.commands import persist as command
from persist.storage import file_system

GOOD: dict[str, Any] = {"title": "t", "messages": [{"id": "m1", "role": "user", "content": "hello"}]}
NEW: dict[str, Any] = {"title": "new", "messages": [{"id": "n1", "role": "user", "content": "again"}]}
PLAIN = json.dumps(GOOD).encode()
LINES = b"".join(json.dumps(each).encode() + b"\n" for each in GOOD["messages"] * 3)

Spoil = Callable[[bytes], bytes]
#: Each entry has a way to damage a file, and the text of its error.
DAMAGE: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda _: b"", "it is empty"),
    "blank": (lambda _: b" \n\n", "it is empty"),
    "zeros": (lambda text: bytes(len(text)), "nothing but zeros"),
    "BOM": (lambda _: b"\xef\xbb\xbf" + PLAIN, "begins with a byte order mark (UTF-8)"),
    "BOM before a header": (lambda text: b"\xef\xbb\xbf" + text, "begins with a byte order mark (UTF-8)"),
    "UTF-16": (lambda _: PLAIN.decode().encode("utf-16"), "begins with a byte order mark (UTF-16)"),
    "JSONL": (lambda _: LINES, "one JSON value a line: it is JSONL"),
    "JSONL of numbers": (lambda _: b"1\n2\n", "one JSON value a line: it is JSONL"),
    "JSONL that was cut off": (lambda _: LINES + b'{"id":', "one JSON value a line: it is JSONL"),
    "JSONL behind a blank line": (lambda _: b"\n" + LINES, "one JSON value a line: it is JSONL"),
    "two documents": (lambda _: PLAIN + PLAIN, "there is more text behind its JSON value"),
    "a line of text behind it": (lambda _: PLAIN + b"\noops", "not JSON, or it was cut off"),
    "a list": (lambda _: json.dumps(GOOD["messages"]).encode(), "not an object"),
    "a text": (lambda _: b'"hello"', "not an object"),
    "cut off": (lambda text: text[:-7], "cut off"),
    "half of it": (lambda text: text[: len(text) // 2], "cut off"),
    "no JSON": (lambda _: b"<html>", "not JSON"),
    "Latin-1": (lambda _: '{"a":"é"}'.encode("latin-1"), "not UTF-8"),
    "a flipped bit": (lambda text: text.replace(b"hello", b"hellp"), "checksum does not match"),
    "edited": (lambda text: text.replace(b'"t"', b'"u"'), "checksum does not match"),
    "another header": (lambda text: text.replace(b'"revision":1', b'"revision":9'), "checksum does not match"),
    "a key twice": (lambda _: b'{"a":1,"a":2}', "an object has the same key twice"),
}
each_damage = pytest.mark.parametrize(("spoil", "told"), DAMAGE.values(), ids=DAMAGE)


@pytest.fixture(params=["auto", "always"])
def damaged(request: pytest.FixtureRequest, directory: Path) -> Callable[[Spoil], persist.Store]:
    """Return a function that damages the document of "s", in a store with journals or without them."""

    def spoil(how: Spoil) -> persist.Store:
        store = persist.Store(directory, journal=request.param)
        store.create("s", GOOD)
        path = directory / "s.json"
        path.write_bytes(how(path.read_bytes()))
        return store

    return spoil


#: A head and a tail do not read the messages, so they do not notice such damage there.
UNSEEN_BY_A_HEAD = ("cut off", "checksum does not match")
VERBS: dict[str, Callable[[persist.Store], object]] = {
    "load": lambda store: store.load("s"),
    "head": lambda store: store.head("s"),
    "tail": lambda store: store.tail("s"),
    "append": lambda store: store.append("s", "messages", {"id": "x"}, create=True),
    "update": lambda store: store.update("s", lambda tx: tx.data.clear(), create=True),
    "start_stream": lambda store: store.start_stream("s", create=True),
    "duplicate": lambda store: store.duplicate("s", "copy"),
    "delete": lambda store: store.delete("s"),
    "compact": lambda store: store.compact("s"),
    "replace of a version": lambda store: store.replace("s", NEW, if_version="v"),
}


@each_damage
def test_every_verb_says_what_is_wrong_and_names_the_ways_out(
    spoil: Spoil, told: str, damaged: Callable[[Spoil], persist.Store]
) -> None:
    """HAZARDS F15: every verb names the damage and the ways out, in the library and as commands.

    The error survives pickling unchanged.
    """
    store = damaged(spoil)
    before = (store.path / "s.json").read_bytes()
    for name, verb in VERBS.items():
        if name in ("head", "tail") and told in UNSEEN_BY_A_HEAD:
            continue
        with pytest.raises(persist.CorruptSession) as caught:
            verb(store)
        text = str(caught.value)
        assert told in text, name
        for way in ("store.replace(id, data)", "store.delete(id, force=True)", "persist replace", "persist delete"):
            assert text.count(way) == 1, name
        assert str(pickle.loads(pickle.dumps(caught.value))) == text
    assert (store.path / "s.json").read_bytes() == before


@each_damage
@pytest.mark.parametrize("is_command", [False, True], ids=["library", "command"])
def test_whatever_is_wrong_it_can_be_deleted(
    spoil: Spoil, told: str, damaged: Callable[[Spoil], persist.Store], is_command: bool
) -> None:
    """HAZARDS F15: a delete leaves no file of the session, and its id can be used again."""
    store = damaged(spoil)
    if is_command:
        refused = runner_of(command)("delete", store.path, "s")
        assert (refused.exit_code, told in refused.stderr, "--force" in refused.stderr) == (3, True, True)
        assert runner_of(command)("delete", store.path, "s", "--force").exit_code == 0
    else:
        store.delete("s", force=True)
    assert [path.name for path in store.path.iterdir()] == [".leases"]
    store.create("s", NEW)
    assert store.check() == []


@each_damage
@pytest.mark.parametrize("is_command", [False, True], ids=["library", "command"])
def test_whatever_is_wrong_it_can_be_replaced(
    spoil: Spoil, told: str, damaged: Callable[[Spoil], persist.Store], is_command: bool, tmp_path: Path
) -> None:
    """HAZARDS F15: the session begins anew. An older object is refused, and nothing is left over."""
    store = damaged(lambda text: text)
    old = store.load("s")
    (store.path / "s.json").write_bytes(spoil((store.path / "s.json").read_bytes()))
    if is_command:
        (tmp_path / "new.json").write_text(json.dumps(NEW), encoding="utf-8")
        done = runner_of(command)("replace", store.path, "s", tmp_path / "new.json", "--json")
        assert json_of(done)["version"] == store.head("s").version
    else:
        assert store.replace("s", NEW).data == NEW
    assert store.load("s").data == persist.Store(store.path).load("s").data == NEW
    assert store.check() == []
    old.data["title"] = "ghost"
    with pytest.raises(persist.SessionDeleted):
        old.save()
    store.append("s", "messages", {"id": "n2"})
    assert [each["id"] for each in persist.Store(store.path).load("s").data["messages"]] == ["n1", "n2"]


def test_a_damaged_journal_goes_with_its_session(store: persist.Store) -> None:
    """A replace removes a damaged journal, also for a process that knows it: it finds the mark, or the new document."""
    journaled, other = persist.Store(store.path, journal="always"), persist.Store(store.path, journal="always")
    journaled.create("s", GOOD)
    for number in range(3):
        other.append("s", "messages", {"id": f"x{number}", "content": "x" * 50})
    (journal,) = store.path.glob("*.journal")
    journal.write_bytes(journal.read_bytes().replace(b"x0", b"y0"))
    for name in ("0" * 16, "f" * 16):
        (store.path / f"s.{name}.journal").write_bytes(journal.read_bytes())
    fresh = persist.Store(store.path, journal="always")
    with pytest.raises(persist.CorruptSession, match=r"store\.replace"):
        fresh.load("s")
    fresh.replace("s", NEW)
    assert len(list(store.path.glob("*.journal"))) == 1
    assert not journal.exists()
    other.append("s", "messages", {"id": "n2"})
    assert [each["id"] for each in fresh.load("s").data["messages"]] == ["n1", "n2"]
    assert fresh.check() == []


@pytest.mark.parametrize("kind", ["BOM", "BOM before a header", "a flipped bit", "edited", "another header"])
def test_an_edit_by_hand_can_be_accepted(kind: str, damaged: Callable[[Spoil], persist.Store]) -> None:
    """An accept takes an edit by hand, also with the byte order mark of a text editor before strict JSON."""
    store = damaged(DAMAGE[kind][0])
    accepted = store.accept("s")
    assert [message["id"] for message in accepted.data["messages"]] == ["m1"]
    assert store.load("s").data == accepted.data
    assert not (store.path / "s.json").read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("content", [b'{"_persist":{"format":99,"checksum":"0"}}', b'{"_persist":{"format":2}}'])
def test_a_document_of_another_version_is_deleted_and_not_replaced(content: bytes, store: persist.Store) -> None:
    """A document of another version can be deleted and not replaced, because it may be whole for that version.

    The error names both ways out: to load it with that version, or to delete it.
    """
    (store.path / "s.json").write_bytes(content)
    with pytest.raises(persist.UnsupportedFormat, match=r"store\.delete\(id, force=True\)"):
        store.replace("s", NEW)
    assert (store.path / "s.json").read_bytes() == content
    store.delete("s", force=True)
    assert store.ids() == []


# --- a session that can be read ---------------------------------------------------------------------------------------


def test_a_session_that_can_be_read_is_replaced_by_its_version_only(store: persist.Store) -> None:
    """A session that can be read is replaced only by its version, because the caller must have seen what is lost."""
    session = store.create("s", GOOD)
    with pytest.raises(persist.SessionExists, match="if_version="):
        store.replace("s", NEW)
    store.append("s", "messages", {"id": "m2"})
    with pytest.raises(persist.VersionMismatch):
        store.replace("s", NEW, if_version=session.version)
    assert [each["id"] for each in store.load("s").data["messages"]] == ["m1", "m2"]
    replaced = store.replace("s", NEW, if_version=store.head("s").version)
    assert (replaced.data, replaced.revision, store.load("s").data) == (NEW, 3, NEW)
    with pytest.raises(persist.SessionNotFound):
        store.replace("gone", NEW)
    with pytest.raises(persist.NotJSON):
        store.replace("s", {"a": {1}}, if_version=replaced.version)
    with pytest.raises(persist.InvalidArgument):
        store.replace("s", {"active_stream_id": "x"}, if_version=replaced.version)
    assert store.load("s").data == NEW


@pytest.mark.parametrize("is_damaged", [False, True])
def test_nothing_is_replaced_under_a_live_stream(is_damaged: bool, store: persist.Store, actor: ActorFactory) -> None:
    """A session with a live stream in another process is not replaced.

    A damaged document does not name the stream, but its lease does. Fails without the look at the leases: the stream's
    next words would be stored nowhere.
    """
    store.create("s", GOOD)
    other = actor()
    other.do("stream = store.start_stream('s', {'id': 'p', 'role': 'user', 'content': '?'}, stream_id='t1')")
    version = None if is_damaged else store.head("s").version
    if is_damaged:
        (store.path / "s.json").write_bytes(b"")
    with pytest.raises(persist.SessionBusy, match="t1") as caught:
        store.replace("s", NEW, if_version=version)
    assert "run by None" not in str(caught.value)
    other.kill()
    assert store.replace("s", NEW, if_version=version).data == NEW
    assert (list((store.path / ".leases").iterdir()), store.check()) == ([], [])
    with store.start_stream("s", {"id": "q", "role": "user", "content": "?"}, stream_id="t2") as stream:
        stream.finish({"role": "assistant", "content": "!"})


def test_a_stream_of_before_is_fenced_off(store: persist.Store) -> None:
    """A stream that outlived its session's document, as after a restored backup, writes nothing to the new one."""
    store.create("s", GOOD)
    stream = store.start_stream("s", {"id": "p", "role": "user", "content": "?"}, stream_id="t1")
    (store.path / "s.json").write_bytes(b"")
    (store.path / ".leases" / "s.t1").unlink()
    store.replace("s", NEW)
    with pytest.raises(persist.StreamLost), stream:
        stream.finish({"role": "assistant", "content": "late"})
    assert store.load("s").data == NEW


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_refuses_a_file_that_is_no_document(store: persist.Store, tmp_path: Path) -> None:
    """The command says what is wrong with the given file, and leaves the session alone."""
    (store.path / "s.json").write_bytes(b"")
    run = runner_of(command)
    for content, told in ((b"", "is empty"), (LINES, "JSONL"), (b"[1]", "not an object"), (b"{", "cut off")):
        (tmp_path / "new.json").write_bytes(content)
        done = run("replace", store.path, "s", tmp_path / "new.json")
        assert (done.exit_code, told in done.stderr) == (3, True)
    assert (store.path / "s.json").read_bytes() == b""
    assert run("replace", store.path, "s", tmp_path / "missing.json").exit_code == 2


def test_the_command_takes_a_document_from_a_backup(store: persist.Store, tmp_path: Path) -> None:
    """The command drops the header of a document from a backup, unless a journal holds later commits.

    It drops a byte order mark, too.
    """
    store.create("s", GOOD)
    whole = (store.path / "s.json").read_bytes()
    backup = tmp_path / "backup.json"
    run = runner_of(command)
    for content in (whole, b"\xef\xbb\xbf" + whole, b"\xef\xbb\xbf" + PLAIN):
        backup.write_bytes(content)
        (store.path / "s.json").write_bytes(b"")
        assert run("replace", store.path, "s", backup).exit_code == 0
        assert store.load("s").data == GOOD
    backup.write_text(json.dumps({**GOOD, "active_stream_id": "x", "pending_user_message": "?"}))
    (store.path / "s.json").write_bytes(b"")
    assert run("replace", store.path, "s", backup).exit_code == 0
    assert store.load("s").data == GOOD
    journaled = persist.Store(store.path, journal="always")
    journaled.create("j", GOOD)
    backup.write_bytes((store.path / "j.json").read_bytes())
    refused = run("replace", store.path, "s", backup)
    assert (refused.exit_code, "journal" in refused.stderr) == (3, True)
    shown: dict[str, Any] = json_of(run("show", store.path, "j", "--json"))
    assert run("replace", store.path, "j", tmp_path / "backup.json", "--if-version", "x").exit_code == 3
    backup.write_bytes(PLAIN)
    assert run("replace", store.path, "j", backup, "--if-version", shown["version"]).exit_code == 0


def test_a_live_stream_is_deleted_by_force_only(store: persist.Store) -> None:
    """`persist delete` needs force for a live stream, and names the stream."""
    run = runner_of(command)
    with store.start_stream("s", create=True) as stream:
        refused = run("delete", store.path, "s")
        assert (refused.exit_code, stream.id in refused.stderr) == (3, True)
        assert json_of(run("delete", store.path, "s", "--force", "--json")) == {"id": "s"}
        with pytest.raises(errors.StreamLost):
            stream.checkpoint({"role": "assistant", "content": "late"})
    assert run("delete", store.path, "s").exit_code == 3


# --- the directory ----------------------------------------------------------------------------------------------------

LARGE = {"messages": [{"id": f"m{number}", "role": "user", "content": "x" * 400} for number in range(300)]}


def gone(path: Path) -> None:
    shutil.rmtree(path)


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))


def made_anew(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def empty_in_its_place(path: Path) -> None:
    moved(path)
    path.mkdir()


def a_copy_in_its_place(path: Path) -> None:
    moved(path)
    shutil.copytree(path.with_name("moved"), path)


def another_store_in_its_place(path: Path) -> None:
    moved(path)
    persist.Store(path).create("other", {})


def a_link_that_leads_elsewhere(path: Path) -> None:
    moved(path)
    path.with_name("elsewhere").mkdir()
    path.symlink_to(path.with_name("elsewhere"))


def mounted_over(path: Path) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "none", path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


LOSSES = (
    *(gone, moved, made_anew, empty_in_its_place, a_copy_in_its_place, another_store_in_its_place),
    *(a_link_that_leads_elsewhere, mounted_over),
)
LOST = r"it is gone|it is not the directory that this store opened"

LOST_VERBS: dict[str, Callable[[persist.Store, persist.Session], object]] = {
    "ids": lambda store, _: store.ids(),
    "heads": lambda store, _: list(store.heads()),
    "exists": lambda store, _: store.exists("new"),
    "load": lambda store, _: store.load("s"),
    "load of what never was": lambda store, _: store.load("never"),
    "head": lambda store, _: store.head("s"),
    "tail": lambda store, _: store.tail("s"),
    "create": lambda store, _: store.create("new"),
    "append": lambda store, _: store.append("s", "messages", {"id": "new"}),
    "append that creates": lambda store, _: store.append("new", "messages", {"id": "new"}, create=True),
    "update": lambda store, _: store.update("s", lambda tx: tx.fields.update(a=1)),
    "save": lambda _, session: session.save(),
    "refresh": lambda _, session: session.refresh(),
    "replace": lambda store, session: store.replace("s", {}, if_version=session.version),
    "duplicate": lambda store, _: store.duplicate("s", "new"),
    "delete": lambda store, _: store.delete("s"),
    "delete by force": lambda store, _: store.delete("s", force=True),
    "accept": lambda store, _: store.accept("s"),
    "compact": lambda store, _: store.compact("s"),
    "start_stream": lambda store, _: store.start_stream("s", create=True),
    "cancel": lambda store, _: store.cancel("s", "t"),
    "stream": lambda store, _: store.stream("s"),
    "streams": lambda store, _: store.streams(),
    "clear_stale_streams": lambda store, _: store.clear_stale_streams(),
    "clear_stale_streams, every one": lambda store, _: store.clear_stale_streams(every_session=True),
    "follow": lambda store, _: store.follow("s", "t"),
    "events": lambda store, _: store.events("s", "t"),
    "check": lambda store, _: store.check(),
}


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("data", [GOOD, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_a_directory_that_was_lost_is_an_error_of_every_verb(
    lose: Callable[[Path], None], data: dict[str, Any], is_known: bool, directory: Path
) -> None:
    """HAZARDS F18: a lost mount is no empty store, and nothing is written into the directory in its place.

    Fails without the look at the directory: a store that looked empty would be filled anew.
    """
    store = persist.Store(directory)
    store.create("s", data)
    with store.start_stream("s", {"id": "p", "role": "user", "content": "?"}, stream_id="t") as stream:
        stream.emit("token")
        stream.finish({"role": "assistant", "content": "!"})
    store = store if is_known else persist.Store(directory)
    session = store.load("s")
    session.data["title"] = "new"
    try:
        lose(directory)
        before = everything(directory)
        silent = [name for name, verb in LOST_VERBS.items() if not refused(verb, store, session)]
        assert silent == []
        assert everything(directory) == before
        assert not list(directory.glob("*.lock")) or lose is a_copy_in_its_place or lose is another_store_in_its_place
    finally:
        if lose is mounted_over and directory.is_mount():
            subprocess.run(["umount", directory], check=True)
    if lose is mounted_over:
        # The directory is there again.
        assert session.save() == store.head("s").version


def refused(verb: Callable[[persist.Store, persist.Session], object], store: Any, session: Any) -> bool:
    try:
        verb(store, session)
    except persist.Unreadable as error:
        return re.search(LOST, str(error)) is not None and error.path == store.path
    return False


def test_leases_that_somebody_removed_are_no_lost_directory(store: persist.Store) -> None:
    """Leases that were removed are made again, and the directory does not count as lost.

    It is the one that was opened, with its sessions.
    """
    store.create("s", GOOD)
    (store.path / ".leases").rmdir()
    assert store.ids() == ["s"]
    assert not store.exists("new")
    store.append("s", "messages", {"id": "m2"})
    with store.start_stream("s", {"id": "p", "role": "user", "content": "?"}) as stream:
        stream.finish({"role": "assistant", "content": "!"})


def test_on_an_overlay_another_inode_is_no_lost_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an overlay another inode number is no lost directory, because the overlay may have forgotten the old one.

    The device number counts.
    """
    (tmp_path / "table").write_text("36 25 0:32 / / rw - overlay overlay rw\n")
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "table")
    monkeypatch.setattr(file_system, "_judged", {})
    store = persist.Store(directory)
    store.create("s", GOOD)
    a_copy_in_its_place(directory)
    assert store.load("s").data == GOOD
    shutil.rmtree(directory)
    directory.mkdir()
    with pytest.raises(persist.Unreadable, match=LOST):
        store.ids()
