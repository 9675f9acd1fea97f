"""Leases by a heartbeat row, and the fences of a turn: nobody who is late writes anything."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid

import pytest
from actors import eventually
from harness.cutting import COMMIT, Relay

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg
from harness.remote import end_connections, engine_of, go, run, said

USER = {"role": "user", "content": "Why?"}


def test_stream_of_a_killed_process_is_taken_over_after_its_lease(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """Until the lease is over the session is busy. Then the next start takes it."""
    store.create("s", {"messages": []})
    code = "s = store.start_stream('s', {'role': 'user', 'content': 'q'})\nprint(s.id, flush=True); time.sleep(60)"
    other = run(code, postgres_url, schema, lease_s=1.0)
    assert said(other)
    other.kill()
    other.wait()
    with pytest.raises(persist.SessionBusy):
        store.start_stream("s", USER)
    deadline = time.monotonic() + 30
    while (info := store.stream("s")) is not None and info.is_live:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with store.start_stream("s", USER) as stream:
        stream.finish({"role": "assistant", "content": "a"})
    assert [each.get("interrupted") for each in store.load("s").data["messages"]] == [True, None, None]


def test_paused_process_writes_nothing_after_its_lease(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A process that was stopped for longer than its lease is refused: every verb, and every event.

    Three protections stand behind each other here: its own clock, the owner in the row, and the server's clock. The
    other tests take the last two out one by one.
    """
    store.create("s", {"messages": []})
    code = """
stream = store.start_stream("s", {"role": "user", "content": "q"}, stream_id="old")
stream.emit({"n": 1}, durable=True)
print("started", flush=True)
sys.stdin.readline()
for verb in (lambda: stream.checkpoint({"role": "assistant", "content": "late"}),
             lambda: stream.emit({"n": 2}, durable=True), lambda: stream.finish({"role": "assistant", "content": "x"})):
    try:
        verb()
        print("written", flush=True)
    except persist.StreamLost:
        print("lost", flush=True)
"""
    other = run(code, postgres_url, schema, lease_s=1.0)
    assert said(other) == "started"
    os.kill(other.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    stream = None
    while stream is None:
        assert time.monotonic() < deadline
        try:
            stream = store.start_stream("s", USER, stream_id="new")
        except persist.SessionBusy:
            time.sleep(0.05)
    os.kill(other.pid, signal.SIGCONT)
    go(other)
    assert [said(other) for _ in range(3)] == ["lost"] * 3
    assert other.wait(20) == 0
    stream.finish({"role": "assistant", "content": "a"})
    assert [each.get("content") for each in store.load("s").data["messages"]] == ["q", "Why?", "a"]
    assert [each.data for each in store.events("s", "old")] == [{"n": 1}]


def test_process_that_is_late_writes_nothing_even_if_it_believes_in_itself(store: persist.Store) -> None:
    """The server checks the lease in the statement of each write.

    Without `expires_at` in the statements `update` and `emit`, the writes of an expired process are made.
    """
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    stream.emit({"n": 1}, durable=True)
    engine = engine_of(store)
    with psycopg.connect(engine.connections.conninfo, autocommit=True) as other:
        other.execute(f"UPDATE {engine.connections.schema}.processes SET expires_at = clock_timestamp()")
    with pytest.raises(persist.StreamLost):
        stream.checkpoint({"role": "assistant", "content": "late"})
    with pytest.raises(persist.StreamLost):
        stream.emit({"n": 2}, durable=True)
    assert [each.get("content") for each in store.load("s").data["messages"]] == ["Why?"]
    assert [each.data for each in store.events("s", stream.id)] == [{"n": 1}]
    stream._close()


def test_clean_exit_frees_the_session_at_once(store: persist.Store, postgres_url: str, schema: str) -> None:
    store.create("s", {"messages": []})
    code = "stream = store.start_stream('s')\nprint('started', flush=True)\nimport os; globals()['kept'] = stream"
    other = run(code, postgres_url, schema, lease_s=600.0)
    assert said(other) == "started"
    assert other.wait(20) == 0
    info = store.stream("s")
    assert info is not None
    assert not info.is_live


def test_beat_behind_the_end_of_a_process_does_nothing(store: persist.Store, caplog: pytest.LogCaptureFixture) -> None:
    """The thread may be about to beat when the process ends. It connects no more, and warns of nothing.

    Without the reset in `Heartbeat.close`, it says that its row is gone, and leaves a connection open.
    """
    store.create("s", {"messages": []})
    stream, heartbeat = store.start_stream("s", USER), engine_of(store).heartbeat
    heartbeat.close()
    heartbeat.beat()
    assert heartbeat._own._connection is None
    assert caplog.text == ""
    with pytest.raises(persist.StreamLost):
        stream.finish()
    stream._close()


def test_start_that_failed_does_not_free_the_next_one(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start fails while the server is away, and is tried again with its id. The beat frees nothing of the second.

    Without the removal from `_to_free` in `Heartbeat.lease`, the running turn counts as dead.
    """
    relay.refuse_after_cut, relay.cut_before = True, COMMIT
    cut._backend.engine.timeout_s = 0.5
    # The thread does not free it at once.
    monkeypatch.setattr(engine_of(cut).heartbeat._wake, "set", lambda: None)
    with pytest.raises(persist.PersistError):
        cut.start_stream("s", USER, stream_id="t", timeout_s=0.5)
    assert ("s", "t") not in engine_of(cut).writers
    relay.refuses = False
    with cut.start_stream("s", USER, stream_id="t", timeout_s=20.0) as stream:
        engine_of(cut).heartbeat.beat()
        info = store.stream("s")
        assert info is not None
        assert info.is_live
        stream.finish()


def test_end_of_an_old_block_leaves_the_next_stream_of_its_id_alone(store: persist.Store) -> None:
    """A stream is cancelled by force and started anew with its id. Then the block of the first one is left.

    Without the numbers of leases, the second one loses its lease. Without the look in `RemoteWriter.close`, it loses
    its writer.
    """
    store.create("s", {"messages": []})
    first = store.start_stream("s", stream_id="t")
    assert store.cancel("s", "t", force=True)
    with store.start_stream("s", stream_id="t") as second:
        first._close()
        engine_of(store).heartbeat.beat()
        info = store.stream("s")
        assert info is not None
        assert info.is_live
        assert engine_of(store).writers["s", "t"] is second._events
        second.finish()


def test_forced_cancel_fences_a_live_owner(store: persist.Store) -> None:
    """Behind a forced cancel the owner emits nothing and writes nothing, although its lease is alive.

    Without `ended IS NULL` in the statement `emit`, the event is there. Without the owner's comparison in
    `Stream._require_ownership`, the checkpoint is.
    """
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    stream.emit({"n": 1}, durable=True)
    assert persist.Store(store._at, **store._options).cancel("s", stream.id, force=True)
    with pytest.raises(persist.StreamLost):
        stream.emit({"n": 2}, durable=True)
    with pytest.raises(persist.StreamLost):
        stream.checkpoint({"role": "assistant", "content": "late"})
    following = store.follow("s", stream.id)
    assert [event.data for event in following] == [{"n": 1}]
    assert following.ended == "cancelled"
    assert [each["content"] for each in store.tail("s")] == ["Why?"]
    stream._close()


def test_sweep_removes_the_rows_of_processes_that_are_long_dead(store: persist.Store, schema: str) -> None:
    """A process that was killed leaves a row. The rows of the living, and of the newly dead, stay."""
    ids = [str(uuid.uuid4()) for _ in range(3)]
    with psycopg.connect(engine_of(store).connections.conninfo, autocommit=True) as connection:
        for name, age in zip(ids, ("2 days", "1 hour", "-1 hour"), strict=True):
            row = f"INSERT INTO {schema}.processes VALUES (%s, 'host', 1, 'chat.py', now(), now() - %s::interval)"
            connection.execute(row.encode(), [name, age])
        store.clear_stale_streams()
        left = connection.execute(f"SELECT id::text FROM {schema}.processes".encode()).fetchall()
    assert {name for [name] in left} == {*ids[1:]}


def test_sweep_finds_a_stream_that_was_dropped_in_a_live_process(store: persist.Store) -> None:
    """Its session names no process any more. With `process IS NOT NULL` in the statement `leases`, nobody finds it."""
    stream = store.start_stream("s", USER, create=True)
    stream._close()
    heartbeat, waiting = engine_of(store).heartbeat, threading.Event()
    for _ in range(400):
        if not heartbeat._to_free:
            break
        waiting.wait(0.05)
    assert heartbeat._to_free == []
    assert [each.stream_id for each in store.streams()] == [stream.id]
    assert [each.stream_id for each in store.clear_stale_streams().cleared] == [stream.id]
    assert store.clear_stale_streams().cleared == []


def test_late_writes_do_not_reach_the_turn_of_a_successor(store: persist.Store) -> None:
    """The owner stands in the row that is locked, so a turn that was taken away writes nothing into the next one.

    Its process is alive for the server. Without the comparison in `Stream._require_ownership`, the writes are made.
    """
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    stream.checkpoint({"role": "assistant", "content": "early"})
    other = persist.Store(store._at, **store._options)
    other.cancel("s", stream.id, force=True)
    with other.start_stream("s", USER) as successor:
        for verb in (stream.checkpoint, stream.append, stream.finish):
            with pytest.raises(persist.StreamLost):
                verb({"role": "assistant", "content": "late"})
        successor.finish({"role": "assistant", "content": "a"})
    assert [each["content"] for each in store.tail("s")] == ["Why?", "early", "Why?", "a"]
    stream._close()


def test_block_that_ends_while_the_server_is_away_frees_its_session(
    cut: persist.Store, store: persist.Store, relay: Relay, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that has lost its authority for a while gives its lease up for good when its block is left.

    Without the close in `Stream.__exit__`, the session is busy for as long as the process lives.
    """
    heartbeat = engine_of(cut).heartbeat
    monkeypatch.setattr(heartbeat, "_beat_s", 0.2)
    with cut.start_stream("s", USER) as stream:
        relay.refuses = True
        end_connections(postgres_url)
        heartbeat.beat()
        eventually(lambda: not heartbeat.is_proven(heartbeat.id))
        with pytest.raises(persist.StreamLost):
            stream.checkpoint({"role": "assistant", "content": "late"})
    relay.refuses = False
    heartbeat.beat()
    info = store.stream("s")
    assert info is not None
    assert not info.is_live
