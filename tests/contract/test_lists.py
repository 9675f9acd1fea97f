"""The lists of a transaction are used like any list, and no change of one is lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.chats import HELLO, ids_of

import persist
from persist.transaction import Transaction


def test_what_the_whole_document_says_is_what_is_committed(store: persist.Store, session: persist.Session) -> None:
    """Once a block has asked for the whole document, that is committed.
    Values that were handed out before are part of it.
    """
    with store.transaction("s") as tx:
        messages = tx.list("messages")
        tags = tx.fields.setdefault("tags", [])
        data = tx.data
        messages.append({"id": "m2"})
        tags.append("a")
        data["title"] = "Locks"
        del data["messages"][0]
    assert store.load("s").data == {"title": "Locks", "messages": [{"id": "m2"}], "tags": ["a"]}


def test_list_that_the_block_has_replaced_takes_nothing(store: persist.Store, session: persist.Session) -> None:
    """A list that the block has replaced takes no item, because the item would be lost in silence."""
    with pytest.raises(persist.InvalidArgument, match="ask the transaction for it anew"), store.transaction("s") as tx:
        messages = tx.list("messages")
        tx.data["messages"] = []
        messages.append({"id": "m2"})
    with store.transaction("s") as tx:
        tx.data["messages"] = []
        tx.list("messages").append({"id": "m3"})
    assert ids_of(store) == ["m3"]


@pytest.mark.parametrize("look", [len, list, lambda messages: messages.find("m1"), lambda messages: messages == []])
def test_value_that_is_set_over_a_missing_list_stays(store: persist.Store, look: Callable[[Any], object]) -> None:
    """A value set over a missing list stays, whatever was asked of the list before.
    Fails if the empty list that was handed out replaces it.
    """
    with store.transaction("s", create=True) as tx:
        todo = tx.list("todo")
        look(todo)
        tx.data["todo"] = ["a"]
        tx.data["title"] = "x"
        with pytest.raises(persist.InvalidArgument, match="anew"):
            todo.append("lost")
        tx.fields["todo"].append("b")
        tx.list("todo").append("c")
    assert store.load("s").data == {"todo": ["a", "b", "c"], "title": "x"}


@pytest.mark.parametrize("replace", [lambda tx: tx.fields.update(big="text"), lambda tx: tx.fields.pop("big")])
@pytest.mark.parametrize("rows", [["y" * 900] * 9, ["y"]])
def test_list_of_a_field_that_is_gone_takes_nothing(
    store: persist.Store, rows: list[str], replace: Callable[[Transaction], object]
) -> None:
    store.create("s", {"big": rows})
    with pytest.raises(persist.InvalidArgument, match="anew"), store.transaction("s") as tx:
        big = tx.list("big")
        replace(tx)
        big.append("lost")


def test_bytes_are_no_json(store: persist.Store, session: persist.Session) -> None:
    """Bytes from a caller are refused, although the working copy keeps an item that was not read yet as bytes."""
    puts: list[Callable[[Transaction], object]] = [
        lambda tx: tx.fields.update(x=[b"{}"]),
        lambda tx: tx.data["messages"].append(b"{}"),
        lambda tx: tx.list("messages").append(b"{}"),
    ]
    for put in puts:
        with pytest.raises(persist.NotJSON), store.transaction("s") as tx:
            put(tx)
            assert tx.list("messages")[0] == HELLO
            assert "x" not in tx.fields or tx.list("x")[0] == b"{}"
    assert store.load("s").version == session.version


def test_list_is_used_as_any_list(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        messages: Any = tx.list("messages")
        plain: list[Any] = [HELLO]
        for each in (messages, plain):
            each += [1, 2, 3, 4]
            each[1:3] = ["a", "b", "c"]
            each[-1:] = []
            each.reverse()
            each[2:2] = ["d"]
        assert messages == plain
        assert (messages == [1], messages != plain, messages[::2]) == (False, False, plain[::2])
        with pytest.raises(persist.InvalidArgument, match="step"):
            messages[::2] = [1, 2, 3]
        assert repr(messages) == repr(plain)
        assert repr(tx.fields) == "{'title': 'New chat'}"
        uses: list[Callable[[], object]] = [
            lambda: messages[99],
            lambda: tx.list("none").pop(),
            lambda: messages.__delitem__(-99),
        ]
        for use in uses:
            with pytest.raises(IndexError, match="the list has"):
                use()
    assert store.load("s").data["messages"] == plain


@pytest.mark.parametrize("name", [1, None, b"messages"])
def test_list_has_a_name(store: persist.Store, session: persist.Session, name: Any) -> None:
    with pytest.raises(persist.InvalidArgument, match="a list's name"), store.transaction("s") as tx:
        tx.list(name)
