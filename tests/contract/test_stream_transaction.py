"""A running stream's own block, what it may do, and what no block may do to a running stream.

The tests fail if an edit of a stream that lost its session is written.
They fail if a turn overwrites a message of another writer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.chats import ANSWER, PROMPT, ids_of

import persist


def test_transaction_of_a_stream_puts_messages_before_the_partial(
    store: persist.Store, session: persist.Session
) -> None:
    with store.start_stream("s", PROMPT) as stream:
        stream.checkpoint(ANSWER | {"content": "Be"})
        with stream.transaction() as tx:
            tx.list("messages").append({"id": "call"})
            tx.list("messages").extend([{"id": "t1"}, {"id": "t2"}])
            tx.fields["tokens"] = 5
        assert ids_of(store) == ["m1", "p", "call", "t1", "t2", "a"]
        assert tx.version == store.head("s").version
        assert stream.update(lambda tx: tx.data["messages"].append({"id": "t3"})) is None
        assert ids_of(store) == ["m1", "p", "call", "t1", "t2", "t3", "a"]
        stream.finish(ANSWER)
    assert store.load("s").data["messages"][-1] == ANSWER


def test_transaction_of_a_stream_is_fenced(store: persist.Store, session: persist.Session) -> None:
    """A late edit of a worker that lost its session must not reach the turn of its successor."""
    stream = store.start_stream("s", PROMPT)
    store.cancel("s", stream.id, force=True)
    version = store.head("s").version
    with pytest.raises(persist.StreamLost), stream.transaction():
        raise AssertionError("the block was entered")
    with pytest.raises(persist.StreamLost):
        stream.update(lambda tx: tx.fields.update(title="late"))
    assert store.head("s").version == version
    stream._close()


@pytest.mark.parametrize("remove", [lambda messages: messages.pop(), lambda messages: messages.clear()])
def test_partial_answer_of_a_live_stream_stays(
    store: persist.Store, session: persist.Session, remove: Callable[[Any], object]
) -> None:
    with store.start_stream("s", PROMPT) as stream:
        stream.checkpoint(ANSWER)
        with pytest.raises(persist.SessionBusy):
            store.update("s", lambda tx: remove(tx.list("messages")))
        with pytest.raises(persist.SessionBusy):
            stream.update(lambda tx: remove(tx.data["messages"]))
        assert ids_of(store) == ["m1", "p", "a"]
        store.update("s", lambda tx: tx.list("messages").pop(0))
        stream.checkpoint(ANSWER | {"more": 1})
        assert ids_of(store) == ["p", "a"]
        stream._close()
    # The stream's process counts as dead now.
    store.update("s", lambda tx: remove(tx.list("messages")))
    assert "a" not in ids_of(store)


@pytest.mark.parametrize("twin", ["a", "p"])
def test_message_of_a_running_turn_has_no_twin(store: persist.Store, session: persist.Session, twin: str) -> None:
    """The id of a running turn's message is refused, because the turn's next write would overwrite the other message.
    Fails if nobody looks for the id.
    """
    other = {"id": twin, "uuid": "u", "content": "IMPORTANT"}
    with store.start_stream("s", PROMPT) as stream:
        stream.checkpoint(ANSWER)
        loaded = store.load("s")
        adds: list[Callable[[], object]] = [
            lambda: store.append("s", "messages", other, key="uuid"),
            lambda: store.append("s", "messages", other, key=None),
            lambda: store.update("s", lambda tx: tx.list("messages").append(other)),
            lambda: stream.update(lambda tx: tx.list("messages").insert(0, other)),
            lambda: loaded.data["messages"].append(other) or loaded.save(),
        ]
        for add in adds:
            with pytest.raises(persist.MergeConflict):
                add()
        assert ids_of(store) == ["m1", "p", "a"]
        # An edit of the turn's message is allowed.
        store.update("s", lambda tx: tx.list("messages").find(twin).update(seen=True))
        stream.finish(ANSWER | {"content": "whole"})
    assert ids_of(store) == ["m1", "p", "a"]
    store.append("s", "messages", other, key=None)
