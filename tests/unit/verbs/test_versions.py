"""Versions: no two commits share one, and an edit that names an old one writes nothing.

The tests fail if a version of an earlier session is used again by a new one, or after a copy was put back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from harness.chats import HELLO, ids_of

import persist


def test_every_commit_has_a_version_of_its_own(store: persist.Store) -> None:
    """Each commit has its own version, also a checkpoint, a cancel mark and an accept. A fold keeps the version."""
    session = store.create("s", {"title": "t" * 100, "messages": []})
    seen = [session.version]
    seen.append(store.append("s", "messages", HELLO))
    session.refresh()
    session.data["title"] = "Locks"
    seen.append(session.save())
    stream = store.start_stream("s", {"id": "p", "role": "user"})
    seen.append(store.head("s").version)
    stream.checkpoint({"role": "assistant", "content": "a"})
    seen.append(store.head("s").version)
    store.cancel("s", stream.id)
    seen.append(store.head("s").version)
    stream.finish({"role": "assistant", "content": "a"})
    seen.append(store.head("s").version)
    store.compact("s")
    assert store.head("s").version == seen[-1]
    path = store.path / "s.json"
    store.compact("s", alone=True)
    path.write_text(path.read_text().replace("Locks", "Lokcs"))
    seen.append(store.accept("s").version)
    assert len(set(seen)) == len(seen) == 8


def refused(store: persist.Store, version: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: store.update("s", lambda tx: tx.data.clear(), if_version=version),
        lambda: store.update("s", lambda tx: tx.delete(), if_version=version),
        lambda: store.delete("s", if_version=version),
        lambda: store.delete("s", if_version=version, force=True),
    ]
    before = store.load("s")
    for use in uses:
        with pytest.raises(persist.VersionMismatch) as caught:
            use()
        assert isinstance(caught.value, persist.MergeConflict)
        assert (caught.value.mine, caught.value.theirs) == (version, before.version)
    assert store.load("s").version == before.version


def test_session_made_anew_has_no_version_of_the_old_one(store: persist.Store, session: persist.Session) -> None:
    """A request that saw the old session must not clear the new one (hermes-studio #2638)."""
    store.delete("s")
    store.create("s", session.data)
    refused(store, session.version)
    store.update("s", lambda tx: tx.list("messages").clear(), if_version=store.head("s").version)
    assert ids_of(store) == []


def test_copy_that_was_put_back_has_the_version_of_the_copy(store: persist.Store, session: persist.Session) -> None:
    store.compact("s", alone=True)
    copied = store.path.parent / "copy.json"
    shutil.copy(store.path / "s.json", copied)
    later = store.append("s", "messages", {"id": "m2"})
    store.delete("s")
    shutil.copy(copied, store.path / "s.json")
    refused(store, later)
    store.update("s", lambda tx: tx.list("messages").clear(), if_version=session.version)
    assert ids_of(store) == []


def test_version_of_another_programs_file_is_that_of_its_content(store: persist.Store) -> None:
    path = store.path / "s.json"
    path.write_text('{"title": "a"}')
    first = store.load("s").version
    assert store.head("s").version == first
    path.write_text('{"title": "b"}')
    refused(store, first)
    path.write_text('{"title": "a"}')
    store.update("s", lambda tx: tx.fields.update(title="c"), if_version=first)
    assert store.load("s").data == {"title": "c"}
