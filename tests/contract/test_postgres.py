"""The proofs that only the PostgreSQL engine needs: locks, fences and unknown outcomes over a broken network."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from actors import eventually
from harness.cutting import COMMIT, Relay, relaying

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg
from harness.remote import end_all, engine_of, go, run, said

from persist.postgres import events
from persist.postgres.connections import Connection, Connections, Own
from persist.postgres.engine import PostgresEngine
from persist.postgres.events import RemoteReader
from persist.postgres.transaction import Transaction

USER = {"role": "user", "content": "Why?"}


@pytest.fixture
def schema() -> str:
    return f"s_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def store(postgres_url: str, schema: str) -> persist.Store:
    return persist.Store(postgres_url, schema=schema, timeout_s=20.0)


@pytest.fixture
def relay(postgres_url: str) -> Iterator[Relay]:
    with relaying(int(postgres_url.rsplit(":", 1)[1].split("/", maxsplit=1)[0])) as found:
        yield found


@pytest.fixture
def cut(store: persist.Store, relay: Relay, postgres_url: str, schema: str) -> persist.Store:
    """Return a store whose connections go through the relay. It shares its sessions with `store`."""
    store.create("s", {"n": 0, "messages": [{"id": "m0"}]})
    host, _, rest = postgres_url.rpartition(":")
    return persist.Store(f"{host}:{relay.port}/{rest.split('/')[1]}", schema=schema, timeout_s=5.0)


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """End the processes of a test."""
    yield
    end_all()


def server_process(tx: persist.Transaction) -> int:
    """Return the server process that holds the lock of a block."""
    inner: Any = tx._copy._tx
    return int(inner._held.connection.info.backend_pid)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_updates_of_several_processes_are_all_kept(store: persist.Store, postgres_url: str, schema: str) -> None:
    """The lock spans read and write, across processes.

    Without FOR UPDATE in the statement `lock`, verbs raise CommitFailed, because a commit compares and swaps.
    """
    store.create("s", {"n": 0, "messages": []})
    code = """
print("ready", flush=True); sys.stdin.readline()
for number in range(40):
    with store.transaction("s") as tx:
        tx.fields["n"] += 1
    store.append("s", "messages", {"id": f"{sys.argv}{number}"}, key=None)
"""
    others = [run(code, postgres_url, schema, timeout_s=20.0) for _ in range(4)]
    assert [said(each) for each in others] == ["ready"] * 4
    for each in others:
        go(each)
    assert [each.wait(60) for each in others] == [0] * 4
    assert store.load("s").data["n"] == 160
    assert len(store.load("s").data["messages"]) == 160


def test_two_first_writes_make_one_session(store: persist.Store) -> None:
    """A name without a row is locked, too. Without the statement `lock_name`, a verb fails with a duplicate key."""
    barrier, failures = threading.Barrier(2), list[Exception]()
    other = persist.Store(store._at, **{**store._options, "timeout_s": 20.0})

    def add(which: persist.Store, number: int) -> None:
        for name in range(20):
            barrier.wait()
            try:
                # The turns of threads are by the name of the store, so the two stores have to differ in it.
                which.append(f"new-{name}", "messages", {"id": number}, create=True)
            except Exception as error:
                failures.append(error)

    other._backend.engine.place = "another way to the same place"
    threads = [threading.Thread(target=add, args=each) for each in ((store, 1), (other, 2))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []
    assert all({item["id"] for item in store.tail(f"new-{name}")} == {1, 2} for name in range(20))


def test_timeout_names_the_holder(store: persist.Store, postgres_url: str, schema: str) -> None:
    """The error names the process that holds the row."""
    store.create("s", {})
    code = "with store.transaction('s') as tx:\n    print('held', flush=True); sys.stdin.readline()\n"
    other = run(code, postgres_url, schema)
    assert said(other) == "held"
    with pytest.raises(persist.LockTimeout, match=r"persist .* \(server process [0-9]+\), since"):
        store.append("s", "messages", {"id": "m1"}, timeout_s=0.2)
    go(other)
    assert other.wait(20) == 0
    store.append("s", "messages", {"id": "m1"})


def test_row_changed_without_the_lock_is_not_overwritten(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A commit compares with what was read, so nothing is overwritten when the lock was lost.

    Without the comparison in `_lock_again` and without `commit = …` in the statement `update`, it is overwritten.
    """
    store.create("s", {"n": 0})
    with pytest.raises(persist.CommitFailed), store.transaction("s") as tx:
        tx.fields["n"] = 1
        # The server ends the transaction of the block, and somebody else commits.
        connection = engine_of(store).connections
        pid = server_process(tx)
        with psycopg.connect(connection.conninfo, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", [pid])
        run("store.update('s', lambda tx: tx.fields.update(n=7))", postgres_url, schema).wait(20)
    assert store.load("s").data["n"] == 7


def test_lost_connection_before_the_commit_is_replaced(store: persist.Store) -> None:
    """A block whose connection died is committed all the same, if nobody else has committed."""
    store.create("s", {"n": 0})
    with store.transaction("s") as tx:
        tx.fields["n"] = 1
        connection = engine_of(store).connections
        pid = server_process(tx)
        with psycopg.connect(connection.conninfo, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", [pid])
    assert store.load("s").data["n"] == 1
    assert store.load("s").revision == 2


def test_level_of_isolation_is_not_the_role_s(postgres_url: str, schema: str) -> None:
    """A transaction reads what the one before has committed, whatever level the role prefers.

    Under another level, a verb that has waited for the lock is refused by the server, and has to begin again.
    """
    store = persist.Store(f"{postgres_url}?options=-c%20default_transaction_isolation%3Dserializable", schema=schema)
    store.create("s", {})
    with store.transaction("s") as tx:
        inner: Any = tx._copy._tx
        assert inner._held.connection.execute("SHOW transaction_isolation").fetchone() == (b"read committed",)


# --- connections ------------------------------------------------------------------------------------------------------


def connections_of(url: str, name: str) -> int:
    """Return how many connections an application has."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name]).fetchone()
        return 0 if row is None else int(row[0])


def test_closed_store_has_no_connection_and_no_row(postgres_url: str, schema: str) -> None:
    """A closed store keeps nothing at the server. A session that was loaded from it can still be saved.

    Without `Engine.close`, connections stay until the last object of the store is gone, and nobody can drop the
    database. A stream that runs keeps its lease.
    """
    url = f"{postgres_url}?application_name={schema}"
    store = persist.Store(url, schema=schema)
    session = store.create("s", {"n": 0})
    stream = store.start_stream("s", USER)
    stream.emit(1, durable=True)
    store.close()
    assert stream._lease.is_held
    stream.checkpoint({"role": "assistant", "content": "Because."})
    stream.finish()
    store.close()
    eventually(lambda: connections_of(postgres_url, schema) == 0)
    with psycopg.connect(postgres_url) as other:
        assert other.execute(f"SELECT count(*) FROM {schema}.processes").fetchone() == (0,)
    session.refresh()
    session.data["n"] = 1
    session.save()
    with persist.Store(url, schema=schema) as again, again.start_stream("s", USER) as stream:
        assert again.load("s").data["n"] == 1


def test_verb_that_finds_all_connections_in_use_says_so(store: persist.Store, postgres_url: str, schema: str) -> None:
    """The error names the cause, and the look for it opens no further connection."""
    store = persist.Store(f"{postgres_url}?application_name={schema}", schema=schema, timeout_s=20.0)
    entered, leave = threading.Barrier(17), threading.Event()

    def hold(number: int) -> None:
        with store.transaction(f"s-{number}", create=True):
            entered.wait()
            leave.wait(60)

    with ThreadPoolExecutor(16) as pool:
        holding = [pool.submit(hold, number) for number in range(16)]
        entered.wait()
        with pytest.raises(persist.Unavailable, match="all 16 connections of this process are in use"):
            store.append("s", "messages", {"id": "m1"}, create=True, timeout_s=0.1)
        assert connections_of(postgres_url, schema) == 16
        leave.set()
        for each in holding:
            each.result()


def test_server_that_refuses_is_not_asked_again(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A database that is missing, as a wrong password, is told at once, by one error. The log of the pool is silent.

    Without `_is_refused`, the store would try again until its time is over, which is a day here. Without the filter,
    the pool logs each try.
    """
    url = f"{postgres_url.rpartition('/')[0]}/there_is_no_such_database"
    with pytest.raises(persist.Unavailable, match="does not exist"):
        persist.Store(url, timeout_s=86_400.0)
    assert [record for record in caplog.records if record.name == "psycopg.pool"] == []


def test_end_of_a_process_is_silent(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A process that emits, follows and ends says nothing: no connection is left to the garbage collector.

    Without the closes in `Emitter.close` and in `Own.close` at the end of the interpreter, it warns of them.
    """
    code = """
store.create('s')
with store.start_stream('s') as stream:
    stream.emit(1, 2)
    following = store.follow('s', stream.id)
    next(following)
    stream.finish()
with store.start_stream('s') as late:
    late.emit(3)
"""
    opening = f"import persist\nstore = persist.Store({postgres_url!r}, schema={schema!r})\n"
    command = [sys.executable, "-P", "-W", "error", "-X", "dev", "-c", opening + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_wait_for_a_lock_is_not_bounded_by_the_role(postgres_url: str, schema: str) -> None:
    """A `statement_timeout` of the role, shorter than `timeout_s`, does not end the wait."""
    store = persist.Store(f"{postgres_url}?options=-c%20statement_timeout%3D2s", schema=schema)
    store.create("s", {})
    with store.transaction("s") as tx:
        inner: Any = tx._copy._tx
        assert inner._held.connection.execute("SHOW statement_timeout").fetchone() == (b"0",)


@pytest.mark.parametrize("style", ["German", "SQL,DMY", "Postgres,MDY"])
def test_times_do_not_depend_on_the_settings_of_the_role(
    store: persist.Store, postgres_url: str, schema: str, style: str
) -> None:
    """Times are the same under each DateStyle and time zone, written and read, and so are the pages of `recent`."""
    options = f"-c DateStyle={style} -c TimeZone=Asia/Kolkata"
    other = persist.Store(f"{postgres_url}?options={urllib.parse.quote(options)}", schema=schema)
    for name in ("a", "b", "c"):
        session = other.create(name, {"messages": []})
        assert store.head(name).updated_at == other.load(name).updated_at == session.updated_at
        assert store.head(name).created_at == other.head(name).created_at == session.created_at
    with other.start_stream("b", {"role": "user", "content": "Why?"}) as stream:
        stream.emit(1)
        stream.finish()
    assert [event.data for event in other.follow("b", stream.id)] == [1]
    first = other.recent(limit=2)
    assert [head.id for head in first] == ["b", "c"]
    assert first.cursor == store.recent(limit=2).cursor
    assert [head.id for head in other.recent(limit=2, before=first.cursor)] == ["a"]


# --- unknown outcomes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_delivered", [True, False])
def test_connection_cut_in_a_commit_doubles_nothing(
    cut: persist.Store, store: persist.Store, relay: Relay, is_delivered: bool
) -> None:
    """A commit whose answer was lost is looked up.

    Without `_has_happened`, the verb fails although it is committed.
    """
    cut.append("s", "messages", {"id": "m1"})
    relay.cut_behind, relay.cut_before = (COMMIT, None) if is_delivered else (None, COMMIT)
    cut.append("s", "messages", {"content": "without an id"}, key=None)
    assert relay.cuts == 1
    assert store.load("s").data["messages"] == [{"id": "m0"}, {"id": "m1"}, {"content": "without an id"}]
    assert store.load("s").revision == 3


def test_commit_is_known_under_the_commits_of_others(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row holds the ids of its last commits.

    Without them, the verb raises CommitFailed for a commit that stands.
    """
    really = Transaction._lock_again

    def overtake() -> None:
        for number in range(3):
            store.append("s", "messages", {"id": f"other-{number}"})

    def late(self: Transaction, deadline: float) -> Any:
        self._held.close()
        thread = threading.Thread(target=overtake)
        thread.start()
        thread.join()
        return really(self, deadline)

    cut.append("s", "messages", {"id": "m1"})
    # The turns of threads are by the name of the place.
    store._backend.engine.place = "another way to the same place"
    monkeypatch.setattr(Transaction, "_lock_again", late)
    relay.cut_behind = COMMIT
    cut.append("s", "messages", {"id": "m2"})
    assert relay.cuts == 1
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1", "m2", "other-0", "other-1", "other-2"]


@pytest.mark.parametrize("where", ["cut_behind", "cut_before"])
def test_server_that_stays_away_in_a_commit_is_unknown(
    cut: persist.Store, store: persist.Store, relay: Relay, where: str
) -> None:
    """Nobody can tell what became of a COMMIT if the server cannot be asked."""
    relay.refuse_after_cut = True
    setattr(relay, where, COMMIT)
    with pytest.raises(persist.CommitUnknown):
        cut.append("s", "messages", {"id": "m1"}, timeout_s=1.0)
    relay.refuses = False
    cut.append("s", "messages", {"id": "m1"})
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1"]


# --- leases and fences ------------------------------------------------------------------------------------------------


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


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_hints", [True, False])
def test_events_of_another_process_are_followed_to_their_end(
    store: persist.Store, postgres_url: str, schema: str, has_hints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event comes once, in order, with hints and without."""
    if not has_hints:
        monkeypatch.setattr(engine_of(store).connections, "channel", "persist_nobody")
    store.create("s", {"messages": []})
    code = """
with store.start_stream("s", stream_id="t") as stream:
    print("started", flush=True); sys.stdin.readline()
    for number in range(200):
        stream.emit({"n": number}); time.sleep(0.002)
    stream.finish({"role": "assistant", "content": "a"})
"""
    other = run(code, postgres_url, schema)
    assert said(other) == "started"
    following = store.follow("s", "t")
    go(other)
    assert [event.data["n"] for event in following] == list(range(200))
    assert following.ended == "finished"
    assert other.wait(20) == 0
    assert [event.offset for event in store.follow("s", "t", after=150)] == list(range(151, 201))
    with pytest.raises(persist.EventsNotFound):
        store.follow("s", "t", after=201)


@pytest.mark.parametrize("where", ["cut_behind", "cut_before"])
def test_batch_whose_answer_was_lost_is_written_once(
    cut: persist.Store, store: persist.Store, relay: Relay, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events whose write has an unknown outcome are written again, together with those that came since.

    Without `BETWEEN` in the statement `emit`, the stream counts as fenced. Without `DO NOTHING`, its events are stuck.
    """
    monkeypatch.setattr(events, "BATCH_S", 60.0)
    stream = cut.start_stream("s", USER)
    relay.refuse_after_cut = True
    setattr(relay, where, COMMIT)
    cut._backend.engine.timeout_s = 0.5
    with pytest.raises(persist.EmitFailed):
        stream.emit(1, durable=True)
    relay.refuses = False
    cut._backend.engine.timeout_s = 20.0
    assert [event.data for event in store.events("s", stream.id)] == ([1] if where == "cut_behind" else [])
    stream.emit(2)
    assert stream.emit(3, durable=True) == 3
    stream.finish()
    assert [(event.offset, event.data) for event in store.events("s", stream.id)] == [(1, 1), (2, 2), (3, 3)]


def test_events_that_waited_for_the_server_are_written(cut: persist.Store, store: persist.Store, relay: Relay) -> None:
    """The server is away when a batch is due. The batch is written when the server is back, without another event.

    Without the second wake in `Emitter.write_all`, it waits for the next event.
    """
    stream = cut.start_stream("s", USER)
    stream.emit(0, durable=True)
    relay.refuse_after_cut, relay.cut_before = True, b"WITH owned"
    stream.emit(1)
    deadline = time.monotonic() + 30
    while not relay.cuts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    relay.refuses = False
    while [event.data for event in store.events("s", stream.id)] != [0, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stream.finish()


def test_hints_alone_carry_events_and_their_end(
    store: persist.Store, postgres_url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower hears of everything by NOTIFY. Here the next poll would come in an hour.

    Without `news` in `events.write`, or without the notification in the statement `end_stream`, it waits for that.
    """
    monkeypatch.setattr(events, "POLL_S", 3600.0)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    following, heard = store.follow("s", stream.id), queue.Queue[Any]()

    def hear() -> None:
        for event in following:
            heard.put(event.data)

    with ThreadPoolExecutor(1) as pool:
        listener = pool.submit(hear)
        try:
            # The follower may have read the first event itself, but not the others.
            for number in range(5):
                stream.emit(number, durable=True)
                assert heard.get(timeout=30) == number
            stream.finish()
            listener.result(30)
        finally:
            following.close()
    assert following.ended == "finished"


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


def test_sweep_removes_the_rows_of_processes_that_died_long_ago(store: persist.Store) -> None:
    """A process that is killed leaves its row. Without the statement in `PostgresEngine.tidy` they pile up."""
    connections = engine_of(store).connections
    with psycopg.connect(connections.conninfo, autocommit=True) as other:
        for died in ("2 days", "1 minute"):
            other.execute(
                f"INSERT INTO {connections.schema}.processes (id, host, pid, command, expires_at) "
                "VALUES (%s, %s, 1, 'test', clock_timestamp() - %s::interval)",
                [uuid.uuid4(), died, died],
            )
        store.clear_stale_streams()
        assert other.execute(f"SELECT host FROM {connections.schema}.processes").fetchall() == [("1 minute",)]


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


def test_connection_of_a_thread_is_closed_with_its_owner(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage may be a cycle, in which nobody knows what goes first.

    With a `__del__` of `Own` in the place of the finaliser, the connection goes first here, with a ResourceWarning.
    """
    made = [Connection.connect(postgres_url)]
    monkeypatch.setattr(Connection, "connect", lambda *_, **__: made.pop())
    own: Any = Own(Connections(postgres_url, "s"))
    closed = weakref.ref(own.get())
    own.cycle = own
    del own
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gc.collect()
    assert closed() is None
    assert [str(each.message) for each in warned] == []


# --- the schema -------------------------------------------------------------------------------------------------------


def test_workers_that_start_at_once_migrate_once(postgres_url: str, schema: str) -> None:
    """Without the lock in `migrate`, a worker fails, because a table is there already."""
    opening = f"store = persist.Store({postgres_url!r}, schema={schema + 'x'!r})"
    code = f"import persist.postgres.engine\nprint('ready', flush=True); sys.stdin.readline()\n{opening}"
    others = [run(code, postgres_url, schema) for _ in range(8)]
    assert [said(each) for each in others] == ["ready"] * 8
    for each in others:
        go(each)
    assert [each.wait(60) for each in others] == [0] * 8


# --- servers and processes that are lost ------------------------------------------------------------------------------


def test_lock_of_a_process_that_is_stopped_is_free_after_its_lease(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """A process that was stopped, or cut off, holds a lock no longer than its lease. Its late commit is refused.

    Without `while_idle` in `lock_row`, the append times out: the server would wait for two hours.
    """
    store.create("s", {"n": 0, "messages": []})
    code = """
try:
    with store.transaction("s") as tx:
        tx.fields["n"] = 1
        print("held", flush=True)
        sys.stdin.readline()
except persist.CommitFailed:
    print("refused", flush=True)
"""
    other = run(code, postgres_url, schema, lease_s=1.0)
    assert said(other) == "held"
    os.kill(other.pid, signal.SIGSTOP)
    store.append("s", "messages", {"id": "m1"})
    os.kill(other.pid, signal.SIGCONT)
    go(other)
    assert said(other) == "refused"
    assert store.load("s").data == {"n": 0, "messages": [{"id": "m1"}]}


def test_block_that_pauses_for_longer_than_its_lease_commits_if_nobody_else_has(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """The server ends the transaction, and the commit takes the lock again. Without the second try it fails."""
    mine = persist.Store(postgres_url, schema=schema, lease_s=1.0)
    store.create("s", {"n": 0, "messages": [{"id": "m0"}]})
    with psycopg.connect(postgres_url, autocommit=True) as other, mine.transaction("s") as tx:
        tx.fields["n"] = 1
        locks = """SELECT FROM pg_locks JOIN pg_database ON oid = database
            WHERE locktype = 'advisory' AND datname = current_database()"""
        eventually(lambda: other.execute(locks).rowcount == 0)
        assert tx.data["messages"] == [{"id": "m0"}]
    assert store.load("s").data == {"n": 1, "messages": [{"id": "m0"}]}


def test_program_may_have_any_file_name(store: persist.Store, postgres_url: str, schema: str, tmp_path: Path) -> None:
    """A name that is not UTF-8 is shown to the server in part."""
    program = os.fsencode(tmp_path) + b"/chat\xff.py"
    with open(program, "w") as file:
        file.write(f"import persist\nstore = persist.Store({postgres_url!r}, schema={schema!r})\n")
        file.write("store.create('s').id\nstore.start_stream('s').finish()\n")
    subprocess.run([sys.executable, program], check=True, timeout=60)
    assert store.ids() == ["s"]


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


def test_errors_and_the_store_name_the_place_as_a_url(store: persist.Store) -> None:
    """A `Path` would lose a slash of the URL. So a database has a place, and no path."""
    assert store.place.startswith("postgresql://")
    with pytest.raises(persist.InvalidArgument, match=r"Store\.place"):
        _ = store.path
    store.create("s")
    caught: list[Any] = []
    with store.start_stream("s", {"role": "user", "content": "Why?"}) as stream:
        for verb in (
            lambda: store.start_stream("s", {"role": "user", "content": "And?"}),
            lambda: store.load("none"),
            lambda: store.create("s"),
            lambda: store.follow("s", "none"),
            lambda: store.follow("s", stream.id, after=5),
        ):
            with pytest.raises(persist.PersistError) as error:
                verb()
            caught.append(error.value)
        stream.finish()
    assert {type(each) for each in caught} == {
        *(persist.SessionBusy, persist.SessionNotFound, persist.SessionExists, persist.EventsNotFound),
    }
    for each in [*caught, *pickle.loads(pickle.dumps(caught))]:
        assert str(each.path).startswith(store.place)


PLACES = {
    "postgresql://ann:secret@db/chats": "postgresql://ann@db:7/chats?schema=p",
    "postgresql://ann@h1:1,h2:2/chats": "postgresql://ann@h1:1,h2:2/chats?schema=p",
    "postgresql://ann@h1,h2/chats": "postgresql://ann@h1,h2/chats?schema=p",
    "postgresql://ann@[::1]:6/chats": "postgresql://ann@[::1]:6/chats?schema=p",
    "postgresql:///a%2Fb?host=/run&port=6&user=a%40b": "postgresql://a%40b@%2Frun:6/a%2Fb?schema=p",
    "postgresql://": "postgresql://bob@here:7/talks?schema=p",
    "postgresql://db": "postgresql://bob@db:7/talks?schema=p",
    "postgresql://?service=sa": "postgresql:///?service=sa&schema=p",
    "postgresql://ann@?service=sb&password=secret": "postgresql://ann@/?service=sb&schema=p",
}


@pytest.mark.parametrize(("url", "place"), PLACES.items(), ids=PLACES)
def test_place_is_a_url_of_the_same_store(url: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all that tells two stores apart, also from the environment. So it can be pasted behind a command."""
    for name, value in {"USER": "bob", "HOST": "here", "PORT": "7", "DATABASE": "talks"}.items():
        monkeypatch.setenv(f"PG{name}", value)
    assert Connections(url, "p").place == place
    assert Connections(place.replace("?schema=p", "").replace("&schema=p", ""), "p").place == place


def overtaking(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something in another thread before a transaction that lost its connection takes its lock again."""
    really = Transaction._lock_again

    def late(self: Transaction, deadline: float) -> Any:
        self._held.close()
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        return really(self, deadline)

    monkeypatch.setattr(Transaction, "_lock_again", late)


@pytest.mark.parametrize("is_delivered", [True, False])
def test_commit_is_known_under_any_number_of_commits_of_others(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch, is_delivered: bool
) -> None:
    """If the row does not go back so far, the server knows the transaction.

    Without `_became`, the verb raises CommitUnknown in both cases.
    """
    for number in range(40):
        cut.update("s", lambda tx, number=number: tx.fields.update(n=number))  # type: ignore[misc]
    # The turns of threads are by the name of the place.
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, lambda: [store.update("s", lambda tx: tx.fields.update(n=-1)) for _ in range(40)])
    relay.cut_behind, relay.cut_before = (COMMIT, None) if is_delivered else (None, COMMIT)
    if is_delivered:
        cut.append("s", "messages", {"id": "m1"})
    else:
        with pytest.raises(persist.CommitFailed):
            cut.append("s", "messages", {"id": "m1"})
    assert relay.cuts == 1
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1"][: 1 + is_delivered]


def test_commit_that_did_not_happen_is_not_unknown_behind_a_few_others(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids of the last commits go back to the one that was read, so nothing is missing among them.

    Without the look for that one, the server is asked, which may be a replica that never saw the transaction.
    """
    for number in range(40):
        cut.update("s", lambda tx, number=number: tx.fields.update(n=number))  # type: ignore[misc]
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, lambda: store.append("s", "messages", {"id": "other"}))
    monkeypatch.setattr(Transaction, "_became", lambda *_: None)
    relay.cut_before = COMMIT
    with pytest.raises(persist.CommitFailed):
        cut.append("s", "messages", {"id": "m1"})
    assert [each["id"] for each in store.tail("s")] == ["m0", "other"]


def test_number_that_was_given_again_after_a_crash_proves_nothing(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crashed server forgets the numbers of transactions that have written nothing, and others get them.

    Without the comparison of the times in `_became`, the create is acknowledged, and nothing is there. The server's own
    crash is in test_lost_machines.py. Here the number is that of another transaction.
    """
    really = PostgresEngine.lock_row
    with psycopg.connect(engine_of(store).connections.conninfo) as other:
        [number] = other.execute("SELECT pg_current_xact_id()::text").fetchone() or [""]

    def reused(self: PostgresEngine, *args: Any) -> Any:
        row, _ = really(self, *args)
        return row, f"{number} before the crash".encode()

    monkeypatch.setattr(PostgresEngine, "lock_row", reused)
    relay.cut_before = COMMIT
    cut.create("new", {"n": 1})
    assert relay.cuts == 1
    assert store.load("new").data == {"n": 1}


@pytest.mark.parametrize("session_id", ["s", "new"])
def test_commit_is_known_although_the_session_was_deleted_since(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch, session_id: str
) -> None:
    """A session that was written and then deleted by somebody else is not made again.

    Without `_became`, the append raises CommitFailed for what was committed, and the new session comes back.
    """
    cut.append("s", "messages", {"id": "m1"})
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, lambda: store.delete(session_id))
    relay.cut_behind = COMMIT
    cut.append(session_id, "messages", {"id": "m2"}, create=True)
    assert relay.cuts == 1
    assert not store.exists(session_id)


def test_start_waits_for_a_server_that_comes_back(cut: persist.Store, relay: Relay) -> None:
    """A start tries the server again until its time is over. Without the loop in `Own.run` it fails at once."""
    cut.head("s")
    relay.refuses = True
    back = threading.Timer(0.5, setattr, (relay, "refuses", False))
    back.start()
    with cut.start_stream("s", USER) as stream:
        stream.finish({"role": "assistant", "content": "a"})
    back.join()


def test_verb_waits_for_a_server_that_comes_back(cut: persist.Store, store: persist.Store, relay: Relay) -> None:
    """A verb gets its connection soon after the server is back. The pool's own pauses would be 1, 2 and 4 seconds.

    Without `reconnect_timeout` the verb fails, because its time is over before the third pause.
    """
    cut.append("s", "messages", {"id": "m1"})
    back = threading.Timer(3.5, setattr, (relay, "refuses", False))
    relay.refuse_after_cut, relay.cut_before = True, b"BEGIN"
    back.start()
    cut.append("s", "messages", {"id": "m2"})
    back.join()
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1", "m2"]


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
        with psycopg.connect(postgres_url, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        heartbeat.beat()
        eventually(lambda: not heartbeat.is_proven(heartbeat.id))
        with pytest.raises(persist.StreamLost):
            stream.checkpoint({"role": "assistant", "content": "late"})
    relay.refuses = False
    heartbeat.beat()
    info = store.stream("s")
    assert info is not None
    assert not info.is_live


def test_forked_child_that_leaves_a_block_emits_nothing(postgres_url: str, schema: str) -> None:
    """The events that wait are the parent's. Without the look at the process in `RemoteWriter.close`, both write."""
    code = """
import os
store.create("s", {"messages": []})
stream = store.start_stream("s")
with stream._events.writing:
    stream.emit({"n": 1})
    pid = os.fork()
    if pid == 0:
        stream.__exit__(None, None, None)
        os._exit(len(store._backend.engine.emitter._dirty))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
stream.finish()
"""
    assert said(run(code, postgres_url, schema)) == "0"


def test_events_that_expire_under_a_reader_are_not_found(
    postgres_url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that go between the look for them and the first read are gone, and no error of a file system comes out.

    Without the handler in `Cursor.__init__`, FileNotFoundError does.
    """
    store = persist.Store(postgres_url, schema=schema, keep_events_s=0.0)
    store.create("s", {"messages": []})
    with store.start_stream("s", USER, stream_id="t") as stream:
        stream.emit(1, durable=True)
        stream.finish({"role": "assistant", "content": "a"})
    really = RemoteReader.size

    def late(self: RemoteReader) -> int:
        store._backend.engine.tidy()
        return really(self)

    monkeypatch.setattr(RemoteReader, "size", late)
    with pytest.raises(persist.EventsNotFound):
        store.events("s", "t")
