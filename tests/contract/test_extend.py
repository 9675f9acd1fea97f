"""Several items are one commit, which may be repeated.

The tests fail if a retry doubles an item, if it costs more than the first time, or if a key is forgotten.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness.chats import HELLO, ids_of

import persist
from persist import json_codec


def test_extend_is_one_commit_and_may_be_repeated(store: persist.Store, session: persist.Session) -> None:
    batch = [{"id": "m2", "n": 1}, {"id": "m3"}]
    version = store.extend("s", "messages", batch)
    assert (store.load("s").revision, ids_of(store)) == (session.revision + 1, ["m1", "m2", "m3"])
    assert store.extend("s", "messages", batch) == version
    store.extend("s", "messages", [batch[1], {"id": "m4"}, {"id": "m4"}])
    assert ids_of(store) == ["m1", "m2", "m3", "m4"]
    assert store.extend("s", "messages", []) == store.load("s").version


def test_repeated_extend_reads_no_more_than_the_first(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry of a large batch must not hold the lock for seconds. Fails if each item of it is compared with all."""
    batch = [{"id": f"m{number}", "content": "x"} for number in range(400)]
    version = store.extend("s", "messages", batch, create=True)
    count, decode = [], json_codec.decode

    def counted(encoded: Any) -> Any:
        count.append(1)
        return decode(encoded)

    monkeypatch.setattr(json_codec, "decode", counted)
    assert store.extend("s", "messages", batch) == version
    assert len(count) < 3 * len(batch)


@pytest.mark.parametrize("item", [{"id": "m1"}, {"id": "m2", "n": 2}])
def test_taken_id_is_an_error_and_adds_nothing(store: persist.Store, session: persist.Session, item: Any) -> None:
    with pytest.raises(persist.MergeConflict):
        store.extend("s", "messages", [{"id": "m2", "n": 1}, item])
    assert ids_of(store) == ["m1"]


def test_any_key_tells_items_apart(store: persist.Store, session: persist.Session) -> None:
    """Each key counts for itself, whatever key was asked for before."""
    store.extend("s", "messages", [{"uuid": "a", "id": ""}, {"uuid": "b", "id": ""}], key="uuid")
    store.extend("s", "messages", [{"uuid": "b", "id": ""}, {"uuid": "c", "id": ""}], key="uuid")
    assert [message.get("uuid") for message in store.load("s").data["messages"]] == [None, "a", "b", "c"]
    with pytest.raises(persist.MergeConflict):
        store.append("s", "messages", {"uuid": "a", "id": "other"}, key="uuid")
    with store.transaction("s") as tx:
        assert tx.list("messages").find("b", key="uuid") == {"uuid": "b", "id": ""}
        assert tx.list("messages").find("none", key="uuid") is None
        assert tx.list("messages").find("m1") == HELLO
    store.append("s", "messages", HELLO)
    assert len(ids_of(store)) == 4


def test_items_without_the_key_are_added_each_time(store: persist.Store, session: persist.Session) -> None:
    """Items without the key are added each time.
    So are all items if no key counts: the ids of some programs are place-holders.
    """
    for _ in range(2):
        store.extend("s", "messages", [{"n": 1}, {"id": None}, "text", ["list"], True], key="id")
    assert len(ids_of_anything(store)) == 11
    for _ in range(2):
        store.append("s", "messages", HELLO, key=None)
    assert len(ids_of_anything(store)) == 13


def ids_of_anything(store: persist.Store) -> list[Any]:
    messages: list[Any] = store.load("s").data["messages"]
    return messages


@pytest.mark.parametrize("items", ["text", b"bytes", {"id": "m2"}, 7, None])
def test_items_are_several(store: persist.Store, session: persist.Session, items: Any) -> None:
    with pytest.raises(persist.InvalidArgument, match="several items"):
        store.extend("s", "messages", items)
    assert store.load("s").version == session.version


@pytest.mark.parametrize("key", ["", 'quote"', "back\\slash", "line\n", 1, b"id"])
def test_key_is_the_name_of_a_key(store: persist.Store, session: persist.Session, key: Any) -> None:
    with pytest.raises(persist.InvalidArgument, match="key"):
        store.append("s", "messages", HELLO, key=key)


@pytest.mark.parametrize("field", ["messages", "tool_calls"])
def test_list_is_no_message(store: persist.Store, session: persist.Session, field: str) -> None:
    """A list is no message: a caller who appends several at once means `extend`.
    In another list, a list may be an item.
    """
    with pytest.raises(persist.InvalidArgument, match="extend"):
        store.append("s", field, [HELLO])
    assert store.load("s").version == session.version
    store.append("s", "pairs", [1, 2])
    assert store.load("s").data["pairs"] == [[1, 2]]
