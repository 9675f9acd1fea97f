"""A block is one commit or none, and `update` is its function form.

The tests fail if a block makes two commits, or if a block that raises writes.
They fail if a result that nobody writes passes in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.chats import HELLO

import persist
from persist.transaction import Transaction


def test_block_is_one_commit(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "Locks"
        tx.list("messages").extend([{"id": "m2"}, {"id": "m3"}])
        tx.list("notes").append("first")
        del tx.list("messages")[1]
        tx.list("messages").find("m1")["seen"] = True
    there = store.load("s")
    assert there.revision == session.revision + 1
    assert there.data == {"title": "Locks", "messages": [HELLO | {"seen": True}, {"id": "m3"}], "notes": ["first"]}
    assert tx.version == there.version == store.head("s").version


def test_block_that_raises_writes_nothing(store: persist.Store, session: persist.Session) -> None:
    with pytest.raises(KeyError, match="stop"), store.transaction("s") as tx:
        tx.fields["title"] = "Locks"
        tx.data["messages"].clear()
        tx.delete()
        raise KeyError("stop")
    assert store.load("s").data == session.data
    assert store.load("s").version == session.version


def test_block_that_changes_nothing_writes_nothing(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "Locks"
        tx.fields["title"] = "New chat"
        tx.list("messages").append("x")
        tx.list("messages").pop()
    assert tx.version == store.load("s").version == session.version


def test_transaction_is_over_with_its_block(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        messages, fields = tx.list("messages"), tx.fields
    uses: list[Callable[[], object]] = [
        lambda: tx.data,
        lambda: tx.fields,
        lambda: tx.list("messages"),
        tx.delete,
        lambda: messages.append(1),
        lambda: fields.update(a=1),
    ]
    for use in uses:
        with pytest.raises(persist.LockError):
            use()
    assert store.load("s").version == session.version


def test_update_returns_what_its_function_returns(store: persist.Store, session: persist.Session) -> None:
    assert store.update("s", lambda tx: tx.list("messages").pop()) == HELLO
    assert store.update("s", lambda tx: tx.fields["title"]) == "New chat"
    assert store.load("s").data["messages"] == []


@pytest.mark.parametrize(
    "function",
    [
        lambda tx: {**tx.data, "title": "Locks"},
        lambda tx: {"title": "Locks"},
        lambda tx: dict(tx.fields),
    ],
)
def test_new_dict_that_nobody_writes_is_an_error(
    store: persist.Store, session: persist.Session, function: Callable[[Transaction], Any]
) -> None:
    """A new dict that is returned without a change is an error: it would be lost in silence (adk-docs PR 1104)."""
    with pytest.raises(persist.InvalidArgument, match=r"tx\.data\.update"):
        store.update("s", function)
    assert store.load("s").version == session.version


def test_dict_that_was_handed_out_may_be_returned(store: persist.Store, session: persist.Session) -> None:
    """The function may return a dict that it was handed, or a new dict beside a change."""
    with store.transaction("s") as tx:
        tx.fields["meta"] = {"inner": {"n": 1}}
    assert store.update("s", lambda tx: tx.list("messages")[0]) == HELLO
    assert store.update("s", lambda tx: tx.fields["meta"]["inner"]) == {"n": 1}
    assert store.update("s", lambda tx: tx.data)["title"] == "New chat"
    # A dict with keys that the document does not have answers a request, and is no document.
    assert store.update("s", lambda tx: {"count": len(tx.list("messages"))}) == {"count": 1}
    assert store.update("s", lambda tx: tx.fields.update(title="Locks") or {"done": True}) == {"done": True}
    assert store.load("s").data["title"] == "Locks"
