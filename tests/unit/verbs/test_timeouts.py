"""Every verb that waits for a lock takes a time of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from harness.chats import HELLO

import persist


@contextmanager
def locked_elsewhere(store: persist.Store, session_id: str) -> Iterator[None]:
    """Another thread holds the session's lock for the block."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction(session_id):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


VERBS: dict[str, Callable[[persist.Store, persist.Session, persist.Stream], object]] = {
    "append": lambda store, _, __: store.append("s", "messages", 1, timeout_s=0),
    "extend": lambda store, _, __: store.extend("s", "messages", [1], timeout_s=0),
    "update": lambda store, _, __: store.update("s", lambda tx: None, timeout_s=0),
    "transaction": lambda store, _, __: store.transaction("s", timeout_s=0).__enter__(),
    "delete": lambda store, _, __: store.delete("s", timeout_s=0),
    "create": lambda store, _, __: store.create("s", timeout_s=0),
    "duplicate": lambda store, _, __: store.duplicate("other", "s", timeout_s=0),
    "start": lambda store, _, __: store.start_stream("s", timeout_s=0),
    "cancel": lambda store, _, __: store.cancel("s", "x", timeout_s=0),
    "stream": lambda store, _, __: store.stream("s", timeout_s=0),
    "compact": lambda store, _, __: store.compact("s", timeout_s=0),
    "accept": lambda store, _, __: store.accept("s", timeout_s=0),
    "save": lambda _, session, __: session.save(timeout_s=0),
    "clear": lambda _, session, __: session.clear_stale_stream(timeout_s=0),
    "checkpoint": lambda _, __, stream: stream.checkpoint(HELLO, timeout_s=0),
    "stream.append": lambda _, __, stream: stream.append(HELLO, timeout_s=0),
    "stream.transaction": lambda _, __, stream: stream.transaction(timeout_s=0).__enter__(),
    "stream.update": lambda _, __, stream: stream.update(lambda tx: None, timeout_s=0),
    "emit": lambda _, __, stream: stream.emit(1, timeout_s=0),
    "finish": lambda _, __, stream: stream.finish(timeout_s=0),
    "fail": lambda _, __, stream: stream.fail(timeout_s=0),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_waits_takes_a_time(store: persist.Store, session: persist.Session, verb: str) -> None:
    """0 is now or never. Fails by its length where the store's 20 seconds are waited for."""
    store.create("other", {})
    with store.start_stream("s", HELLO) as stream:
        session.refresh()
        session.data["title"] = "unsaved"
        with locked_elsewhere(store, "s"), pytest.raises(persist.LockTimeout) as caught:
            VERBS[verb](store, session, stream)
        assert caught.value.timeout_s == 0
        stream.finish()


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("inf"), "1", None, True])
def test_time_is_a_number_of_seconds(store: persist.Store, session: persist.Session, timeout_s: Any) -> None:
    if timeout_s is None:
        store.append("s", "messages", {"id": "m2"}, timeout_s=None)
    else:
        with pytest.raises(persist.WrongType, match="timeout_s"):
            store.append("s", "messages", {"id": "m2"}, timeout_s=timeout_s)
