"""The cost of a verb on PostgreSQL: its messages to the server. Each is a round trip, so they must not grow unseen."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg

from persist.postgres import connections, listener

MESSAGES = [{"id": f"m{number}", "content": str(number)} for number in range(300)]


@pytest.fixture(params=["direct", "behind a pooler"])
def store(postgres_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> persist.Store:
    if request.param != "direct":
        # Statements are not prepared there, so all of them are sent as text.
        for module in (connections, listener):
            monkeypatch.setattr(module, "is_direct", lambda _connection: False)
    return persist.Store(postgres_url, schema=f"s_{uuid.uuid4().hex[:12]}", timeout_s=20.0)


@contextmanager
def counting(of_main_thread: bool = True) -> Iterator[list[bytes]]:
    """Yield the messages that this thread sends to servers in a block, or that all other threads send."""
    sent, real, own = list[bytes](), psycopg.Connection.execute, threading.get_ident()

    def execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        if (threading.get_ident() == own) is of_main_thread:
            sent.append(query)
        return real(self, query, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(psycopg.Connection, "execute", execute)
        yield sent


def test_a_verb_costs_two_messages(store: persist.Store) -> None:
    """The first one locks and looks, and the second one writes and commits. A look without the lock is one message."""
    store.create("s", {"title": "t", "messages": MESSAGES})
    session = store.create("own", {"title": "t", "messages": MESSAGES})
    session.data["title"] = "u"
    stream = store.start_stream("other", {"role": "user", "content": "q"}, create=True)
    started = list[persist.Stream]()

    def answer(content: str) -> dict[str, Any]:
        return {"role": "assistant", "content": content}

    def edit(tx: persist.Transaction) -> None:
        tx.fields["title"] = "v"

    verbs: dict[str, tuple[int, Callable[[], object]]] = {
        "create": (2, lambda: store.create("new", {"title": "t", "messages": MESSAGES})),
        "append": (2, lambda: store.append("s", "messages", {"id": "a1"})),
        "append without an id": (2, lambda: store.append("s", "messages", {"role": "user"})),
        "append again": (1, lambda: store.append("s", "messages", {"id": "a1"})),
        "extend": (2, lambda: store.extend("s", "messages", [{"id": f"e{number}"} for number in range(300)])),
        "update": (2, lambda: store.update("s", edit)),
        "save": (2, session.save),
        "load": (1, lambda: store.load("s").data),
        "head": (1, lambda: store.head("s")),
        "tail": (1, lambda: store.tail("s")),
        "start_stream": (2, lambda: started.append(store.start_stream("new", {"role": "user"}))),
        "checkpoint": (2, lambda: stream.checkpoint(answer("a"))),
        "checkpoint again": (2, lambda: stream.checkpoint(answer("ab"))),
        "stream.append": (2, lambda: stream.append({"role": "tool", "content": "t"})),
        "finish": (2, lambda: stream.finish(answer("abc"))),
        "delete": (2, lambda: store.delete("s")),
    }
    for prepare in (lambda: store.head("s"), lambda: store.append("s", "messages", {"id": "warm"})):
        prepare()
    costs = {}
    for name, (_, verb) in verbs.items():
        with counting() as sent:
            verb()
        costs[name] = len(sent)
    started[0].fail()
    assert costs == {name: cost for name, (cost, _) in verbs.items()}


def data_of(following: persist.Following) -> list[Any]:
    return [event.data for event in following]


def test_followers_of_one_process_share_the_news(store: persist.Store) -> None:
    """Twenty followers hear of a hundred batches, and the server is asked once for all of them.

    Without the feed, each follower asks for each batch: 2,000 messages.
    """
    store.create("s", {"messages": []})
    stream = store.start_stream("s")
    followings = [store.follow("s", stream.id) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool, counting(of_main_thread=False) as sent:
        heard = [pool.submit(data_of, following) for following in followings]
        for number in range(100):
            stream.emit(number, durable=True)
        stream.finish()
        assert [one.result() for one in heard] == [list(range(100))] * 20
    assert len(sent) < 1000
