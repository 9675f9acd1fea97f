"""pgbouncer in transaction mode: what needs no session of the server works behind it, too.

A selection of the other tests here also goes through it. See conftest.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from actors import Actor, eventually
from harness.chats import PROMPT

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg

StartActor = Callable[..., Actor]
ANSWER = {"role": "assistant", "content": "a"}


@pytest.fixture
def options() -> dict[str, Any]:
    return {"schema": f"s_{uuid.uuid4().hex[:12]}", "timeout_s": 20.0}


@pytest.fixture
def store(bouncer_url: str, options: dict[str, Any]) -> persist.Store:
    store = persist.Store(bouncer_url, **options)
    store.create("s", {"n": 0, "messages": []})
    return store


@pytest.fixture
def actor(bouncer_url: str, options: dict[str, Any]) -> Iterator[StartActor]:
    """Provide a function that starts another process behind the same pgbouncer. All of them are gone after the test."""
    actors: list[Actor] = []

    def start(**more: Any) -> Actor:
        actors.append(Actor(bouncer_url, **options, **more))
        return actors[-1]

    yield start
    for each in actors:
        each.close()


def test_updates_of_several_processes_are_all_kept(store: persist.Store, actor: StartActor) -> None:
    """A transaction keeps one connection of the server from its lock to its commit."""
    actors = [actor() for _ in range(4)]
    code = """
for number in range(30):
    with store.transaction("s") as tx:
        tx.fields["n"] += 1
    store.append("s", "messages", {"id": f"{os.getpid()} {number}"})
"""
    for each in actors:
        each.start(code)
    for each in actors:
        each.result()
    data = store.load("s").data
    assert data["n"] == 120
    assert len({each["id"] for each in data["messages"]}) == len(data["messages"]) == 120


def test_follower_gets_each_event_although_no_hint_comes(store: persist.Store, actor: StartActor) -> None:
    """NOTIFY does not come through. A follower asks, and has each event before the next one is written.

    Without the polling of `Listener`, the test never ends.
    """
    owner = actor()
    owner.do(f"stream = store.start_stream('s', {PROMPT!r}, stream_id='t')")
    following = store.follow("s", "t")
    for number in range(20):
        owner.do(f"stream.emit({number})")
        assert next(following).data == number
    owner.do(f"stream.finish({ANSWER!r})")
    assert list(following) == []
    assert following.ended == "finished"


def test_stream_of_a_killed_process_is_taken_over(store: persist.Store, actor: StartActor) -> None:
    """The heartbeat and the fence need no session of the server."""
    owner = actor(lease_s=1.0)
    owner.do(f"stream = store.start_stream('s', {PROMPT!r}, stream_id='t'); stream.emit(1, durable=True)")
    with pytest.raises(persist.SessionBusy):
        store.start_stream("s", {"role": "user", "content": "Why?"})
    owner.kill()
    eventually(lambda: not is_live(store))
    with store.start_stream("s", {"role": "user", "content": "Why?"}) as stream:
        stream.finish(ANSWER)
    assert [each.data for each in store.events("s", "t")] == [1]


def test_live_stream_outlasts_its_lease(store: persist.Store, actor: StartActor) -> None:
    owner = actor(lease_s=1.0)
    owner.do(f"stream = store.start_stream('s', {PROMPT!r})")
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        assert is_live(store)
        time.sleep(0.1)
    owner.do(f"stream.finish({ANSWER!r})")


def is_live(store: persist.Store) -> bool:
    info = store.stream("s")
    assert info is not None
    return info.is_live


def test_timeout_ends_with_its_transaction(store: persist.Store, actor: StartActor, bouncer_url: str) -> None:
    """Settings are those of one transaction, so none of them meets the next client of the connection.

    With SET in the place of SET LOCAL, a setting is another one.
    """
    owner = actor()
    owner.do("block = store.transaction('s'); tx = block.__enter__()")
    with pytest.raises(persist.LockTimeout):
        store.append("s", "messages", {"id": "m1"}, timeout_s=0.05)
    owner.do("block.__exit__(None, None, None)")
    with store.start_stream("s", PROMPT) as stream:
        stream.emit(1)
        stream.finish(ANSWER)
    clients = [psycopg.connect(bouncer_url, autocommit=True, prepare_threshold=None) for _ in range(4)]
    for client in clients:
        # Each has a connection of its own while its transaction is open.
        client.execute("BEGIN")
    for client in clients:
        for name, value in SETTINGS.items():
            assert client.execute(f"SHOW {name}").fetchall() == [(value,)]
        assert client.execute("SELECT count(*) FROM pg_prepared_statements").fetchall() == [(0,)]
        client.close()


SETTINGS = {"lock_timeout": "0", "idle_in_transaction_session_timeout": "0", "synchronous_commit": "on"}


def test_no_lock_is_left_when_nobody_works(store: persist.Store, postgres_url: str) -> None:
    """Locks are those of one transaction. A lock of the session would stay with the connection."""
    store.append("new", "messages", {"id": "m1"}, create=True)
    with store.start_stream("s", PROMPT) as stream:
        stream.finish(ANSWER)
    store.delete("new")
    with psycopg.connect(postgres_url, autocommit=True) as direct:
        mine = "locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        assert direct.execute(f"SELECT count(*) FROM pg_locks WHERE {mine}").fetchall() == [(0,)]


def test_workers_that_start_at_once_migrate_once(bouncer_url: str, actor: StartActor, options: dict[str, Any]) -> None:
    actors = [actor() for _ in range(4)]
    at_once = f"persist.Store({bouncer_url!r}, schema={options['schema'] + 'x'!r})"
    for each in actors:
        each.start(f"other = {at_once}; other.append('s', 'messages', {{'id': os.getpid()}}, create=True)")
    for each in actors:
        each.result()
    there = persist.Store(bouncer_url, schema=options["schema"] + "x").tail("s")
    assert {item["id"] for item in there} == {each.pid for each in actors}
