"""The first write of a request creates a session, and a block may delete one.

The tests fail if a block that raises leaves something behind, or if a delete hits a live stream.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness.chats import HELLO, ids_of

import persist


def files_in(store: persist.Store) -> list[str]:
    """Return the names of the files of a store, if it has files."""
    directory = Path(store.place)
    return [each.name for each in directory.iterdir() if each.is_file()] if directory.is_dir() else []


def test_place_of_files_is_their_directory(store: persist.Store, files: Path) -> None:
    assert store.place == str(store.path) == str(files)


def test_create_begins_with_an_empty_session(store: persist.Store) -> None:
    with store.transaction("s", create=True) as tx:
        version: str | None = tx.version
        assert version is None
        assert tx.data == {}
        tx.list("messages").append(HELLO)
    there = store.load("s")
    assert (there.revision, there.data) == (1, {"messages": [HELLO]})
    assert tx.version == there.version
    # A second write goes on with the session that is there.
    assert store.append("s", "messages", HELLO, create=True) == there.version


@pytest.mark.parametrize("session_id", ["s", "user:7/chat", "x" * 300])
def test_create_of_every_verb(store: persist.Store, session_id: str) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: store.append(session_id, "messages", HELLO, create=True),
        lambda: store.extend(session_id, "messages", [HELLO], create=True),
        lambda: store.update(session_id, lambda tx: tx.list("messages").append(HELLO), create=True),
        lambda: store.start_stream(session_id, HELLO, create=True).finish(),
    ]
    for verb in verbs:
        verb()
        assert ids_of(store, session_id) == ["m1"]
        assert store.ids() == [session_id]
        store.delete(session_id)


def test_create_that_fails_makes_nothing(store: persist.Store) -> None:
    with pytest.raises(persist.NotJSON), store.transaction("s", create=True) as tx:
        tx.fields["a"] = {1, 2}
    with pytest.raises(persist.NotJSON):
        store.append("s", "messages", {1}, create=True)
    with pytest.raises(persist.SessionNotFound):
        store.update("s", lambda tx: None, create=True, if_version="some")
    assert store.ids() == []
    assert files_in(store) == []


def test_delete_takes_effect_at_the_end_of_the_block(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "dropped"
        tx.delete()
        assert store.exists("s")
        with pytest.raises(persist.InvalidArgument, match="delete"):
            tx.list("messages")
    assert not store.exists("s")
    assert files_in(store) == []


def test_delete_in_a_block_spares_a_live_stream(store: persist.Store, session: persist.Session) -> None:
    with store.start_stream("s", HELLO) as stream:
        with pytest.raises(persist.SessionBusy), store.transaction("s") as tx:
            tx.delete()
        with pytest.raises(persist.SessionBusy), stream.transaction() as tx:
            tx.delete()
        stream.finish()
    store.update("s", lambda tx: tx.delete())
    assert store.ids() == []
