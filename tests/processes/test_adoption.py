"""Files of another program: what an old server leaves behind, and what reads and repairs do to it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from actors import Actor
from conftest import ActorFactory
from harness.sweeps import sweep

import persist

OLD: dict[str, Any] = {
    "title": "Old",
    "messages": [{"role": "user", "content": "Hello?"}],
    "active_stream_id": "x1",
    "pending_user_message": "Hello?",
    "pending_attachments": ["f.png"],
    "pending_started_at": 1.5,
}
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can change owners")


def write_old(directory: Path, name: str = "old", **changes: Any) -> Path:
    path = directory / f"{name}.json"
    path.write_text(json.dumps(OLD | changes))
    return path


def test_prompt_that_stands_in_messages_already_keeps_its_attachments(store: persist.Store) -> None:
    """The attachments move from the pending fields to the prompt, once.

    The pending fields may hold the only copy of them.
    """
    write_old(store.path)
    assert len(store.clear_stale_streams(every_session=True).cleared) == 1
    assert store.load("old").data["messages"] == [
        {"role": "user", "content": "Hello?", "interrupted": True, "attachments": ["f.png"]}
    ]


def test_answered_prompt_of_the_same_words_is_not_taken_for_the_pending_one(store: persist.Store) -> None:
    """A prompt of an earlier turn is not taken for the pending prompt, even if both have the same text.

    The pending prompt is added.
    """
    answered = [
        *({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}),
        *({"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}),
    ]
    write_old(store.path, messages=answered)
    assert store.load("old").clear_stale_stream() is True
    messages = store.load("old").data["messages"]
    assert messages[:4] == answered
    assert [(m["content"], m["interrupted"]) for m in messages[4:]] == [("Hello?", True)]


def test_prompt_that_the_last_answer_has_answered_is_not_added_again(store: persist.Store) -> None:
    """The turn stays as it is if the other program was killed after the answer, before it cleared its fields."""
    answered = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    write_old(store.path, messages=answered)
    assert store.load("old").clear_stale_stream() is True
    assert store.load("old").data["messages"] == answered
    assert store.load("old").active_stream_id is None


def test_prompt_with_a_tool_result_behind_it_is_marked_and_not_added_again(store: persist.Store) -> None:
    """The pending prompt is found among all messages since the last answer. It need not be the last message."""
    answered = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    pending = [{"role": "user", "content": "Hello?"}, {"role": "tool", "content": "found"}]
    write_old(store.path, messages=[*answered, *pending])
    assert store.load("old").clear_stale_stream() is True
    marked = pending[0] | {"interrupted": True, "attachments": ["f.png"]}
    assert store.load("old").data["messages"] == [*answered, marked, pending[1]]


@pytest.mark.parametrize("value", ["", None, False, 0])
def test_empty_stream_id_is_no_stream(store: persist.Store, value: object) -> None:
    """Old servers write an empty string where there is no stream."""
    write_old(store.path, active_stream_id=value)
    session = store.load("old")
    assert session.active_stream_id is None
    assert session.clear_stale_stream() is False
    assert store.clear_stale_streams(every_session=True) == persist.Sweep([], {})
    assert store.check() == []


def test_check_names_stale_streams_without_a_lease(store: persist.Store) -> None:
    """`check` agrees with `clear_stale_streams(every_session=True)` on what is stale."""
    write_old(store.path)
    assert [(problem.session_id, problem.kind) for problem in store.check()] == [("old", "stale")]
    sweep(store, every_session=True)
    assert store.check() == []


def test_check_names_files_that_are_no_sessions(store: persist.Store) -> None:
    """`check` names a JSON file whose name is not a session id."""
    for name in ("five.v1", "_index", "with space", "con"):
        write_old(store.path, name)
    assert [(problem.session_id, problem.kind) for problem in store.check()] == [
        (name, "foreign") for name in ("_index", "con", "five.v1", "with space")
    ]


def test_looking_makes_nothing(directory: Path) -> None:
    """A store that is opened with `create=False` leaves the directory as it was."""
    directory.mkdir()
    write_old(directory)
    store = persist.Store(directory, create=False)
    assert store.load("old").revision == store.head("old").revision == 0
    assert (store.ids(), store.streams()) == (["old"], [])
    assert [path.name for path in directory.iterdir()] == ["old.json"]
    with pytest.raises(persist.InvalidArgument, match="missing"):
        persist.Store(directory / "nowhere", create=False)
    assert not (directory / "nowhere").exists()


@needs_root
def test_what_root_makes_belongs_to_the_owner_of_the_directory(store: persist.Store) -> None:
    """One repair by hand as root must not lock the server out of its own files."""
    os.chown(store.path, 12345, 12346)
    os.rmdir(store.path / ".leases")
    os.chown(write_old(store.path), 12345, 12346)
    sweep(store, every_session=True)
    with store.start_stream("old"):
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in store.path.rglob("*")}
    assert owners == {(12345, 12346)}


@needs_root
def test_one_unreadable_file_hides_no_other(scratch: Path, actor: ActorFactory) -> None:
    """`check` names a session that belongs to another user, and looks at the other sessions all the same."""
    store = persist.Store(scratch / "sessions")
    for session_id in ("a", "b"):
        store.create(session_id)
    scratch.chmod(0o755)
    for path in (store.path, *store.path.rglob("*")):
        os.chown(path, 65534, 65534)
    os.chown(store.path / "b.json", 0, 0)
    other: Actor = actor()
    other.do("os.setegid(65534); os.seteuid(65534)")
    found = other.do(f"[(p.session_id, p.kind) for p in persist.Store({str(store.path)!r}, create=False).check()]")
    assert found == [("b", "unreadable")]


def test_store_can_be_handed_to_another_process_and_the_rest_cannot(store: persist.Store) -> None:
    """A pickled store opens the same directory with the same options.

    Pickling a session or a stream is an error that says what to do instead.
    """
    session = store.create("s-1", {"messages": []})
    copy = pickle.loads(pickle.dumps(persist.Store(store.path, merge={"n": "sum"}, timeout_s=1.5)))
    assert copy.path == store.path
    assert copy.load("s-1").data == {"messages": []}
    with pytest.raises(TypeError, match="hand its id"):
        pickle.dumps(session)
    with store.start_stream("s-1") as stream, pytest.raises(TypeError, match="belongs to the process"):
        pickle.dumps(stream)


def test_async_function_is_refused_by_update(store: persist.Store) -> None:
    """An update that would only make a coroutine changes nothing, and says so."""
    store.create("s-1", {"n": 1})

    class Awaitable:
        def __await__(self) -> None:
            raise AssertionError("never awaited")

    with pytest.raises(persist.InvalidArgument, match="async"):
        store.update("s-1", lambda tx: (tx.data.update(n=2), Awaitable())[1])
    assert store.load("s-1").data == {"n": 1}
