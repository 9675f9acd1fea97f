"""The proofs of the events on PostgreSQL: whatever refuses a write of them, what was emitted is there, once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from actors import eventually
from contract.postgres.conftest import Through
from harness.cutting import Relay

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg
from harness.postgres import Server
from harness.remote import end_connections, engine_of, run, said

from persist.postgres.listener import RemoteReader

USER = {"role": "user", "content": "Why?"}


@pytest.fixture
def store(store: persist.Store) -> persist.Store:
    store.create("s", {"messages": []})
    return store


def in_database(url: str, schema: str) -> int:
    """Return how many events there are."""
    with psycopg.connect(url) as connection:
        row = connection.execute(f"SELECT count(*) FROM {schema}.events").fetchone()
        return 0 if row is None else int(row[0])


def test_error_in_a_write_of_events_does_not_stop_the_next_ones(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """The server refuses one write, as a time-out of the role or a deadlock does. The events come with the next one.

    Without the rollback in `Own.run`, every later write finds a transaction that has failed.
    """
    stream = store.start_stream("s", USER)
    stream.emit(1, durable=True)
    with psycopg.connect(postgres_url, autocommit=True) as other, psycopg.connect(postgres_url) as locking:
        locking.execute(f"LOCK TABLE {schema}.events IN ACCESS EXCLUSIVE MODE")
        stream.emit(2)
        waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ %s"
        eventually(lambda: other.execute(waiting, [schema]).fetchall() == [(True,)])
        locking.rollback()
    stream.emit(3)
    eventually(lambda: in_database(postgres_url, schema) == 3)
    stream.finish()
    assert [event.data for event in store.events("s", stream.id)] == [1, 2, 3]


def test_dropping_the_oldest_events_waits_for_no_session(postgres_url: str, schema: str) -> None:
    """Events that outgrow their bound are dropped while somebody holds the session's lock, and others come.

    If they are dropped by a second update of the stream's row in one transaction, the server looks at the session's
    row, too, and all events of this process wait for its lock.
    """
    store = persist.Store(postgres_url, schema=schema, keep_events_bytes=4_096)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    with psycopg.connect(postgres_url) as locking:
        locking.execute(f"SELECT FROM {schema}.sessions FOR UPDATE")
        for number in range(10):
            last = stream.emit(*("x" * 200 for _ in range(10)))
            assert last == 10 * (number + 1)
            eventually(lambda: not engine_of(store).writers["s", stream.id].pending()[1])
    assert 0 < in_database(postgres_url, schema) < 100
    stream.finish()


def test_more_streams_than_connections_do_not_wait_for_each_other(postgres_url: str, schema: str) -> None:
    """Twenty streams commit and emit durably at once, and the process has sixteen connections.

    If an emission keeps the stream's commits out while it waits for a connection, all sixteen may belong to commits
    that wait for such emissions. Then these fail when their time is over.
    """
    store = persist.Store(postgres_url, schema=schema, timeout_s=5.0)
    streams = []
    for number in range(20):
        store.create(f"s-{number}", {"messages": []})
        streams.append(store.start_stream(f"s-{number}", USER))

    def checkpoint(stream: persist.Stream) -> None:
        for number in range(15):
            stream.checkpoint({"role": "assistant", "content": str(number)})

    def emit(stream: persist.Stream) -> None:
        for number in range(15):
            stream.emit(number, durable=True)

    with ThreadPoolExecutor(40) as pool:
        for each in [pool.submit(work, stream) for stream in streams for work in (checkpoint, emit)]:
            each.result()
    for stream in streams:
        stream.finish()
        assert [event.data for event in store.events(stream.session_id, stream.id)] == list(range(15))


def test_crash_of_the_server_takes_no_event_that_was_seen(postgres_url: str) -> None:
    """The server crashes, and the process that emits lives on: its stream has all its events, and goes on.

    With `synchronous_commit = off` in the write of events, the last ones are gone, and the stream counts as lost.
    """
    # A server of its own, where there is one at all.
    server = Server()
    server.start()
    try:
        store = persist.Store(server.url, timeout_s=20.0)
        store.create("s", {"messages": []})
        with store.start_stream("s", USER) as stream:
            following = store.follow("s", stream.id)
            for number in range(1, 40):
                stream.emit(number)
                assert next(following).data == number
            server.restart("immediate")
            stream.emit(40, durable=True)
            assert next(following).data == 40
            stream.finish()
        assert [event.data for event in store.events("s", stream.id)] == list(range(1, 41))
    finally:
        server.remove()


def test_message_is_not_stored_without_its_events(
    postgres_url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that ends in the middle of a commit, which has proven it, does not part the message from its events.

    With the statement `emit` in the place of `emit_within`, the message is committed, and its events are not.
    """
    store = persist.Store(postgres_url, schema=schema, lease_s=1.0, timeout_s=20.0)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    stream.emit(1, durable=True)
    writer = engine_of(store).writers["s", stream.id]
    # No further renewal, and no write before the commit's own.
    monkeypatch.setattr(engine_of(store).heartbeat, "beat", lambda: None)
    monkeypatch.setattr(engine_of(store).emitter, "schedule", lambda _: None)
    stream.emit(2)
    assert writer.pending()[1]
    with psycopg.connect(postgres_url) as locking, ThreadPoolExecutor(1) as pool:
        locking.execute(f"LOCK TABLE {schema}.items IN SHARE MODE")
        finishing = pool.submit(stream.finish, {"role": "assistant", "content": "1 2"})
        expired = f"SELECT expires_at < clock_timestamp() FROM {schema}.processes"
        eventually(lambda: locking.execute(expired).fetchall() == [(True,)])
        locking.rollback()
        finishing.result()
    assert store.tail("s")[-1]["content"] == "1 2"
    assert [event.data for event in store.events("s", stream.id)] == [1, 2]


def test_server_that_is_away_for_a_moment_ends_no_turn(
    through: Through, store: persist.Store, relay: Relay, postgres_url: str, schema: str
) -> None:
    """While the server restarts, events wait, and the turn keeps its lease. Nothing is lost, and nothing fails.

    If a writer tells its first failure, the next `emit` raises EmitFailed. If one failed renewal is lost authority, the
    `checkpoint` raises StreamLost.
    """
    cut = through(timeout_s=20.0)
    emitter, heartbeat = engine_of(cut).emitter, engine_of(cut).heartbeat
    with cut.start_stream("s", USER) as stream:
        stream.emit(0, durable=True)
        relay.refuses = True
        end_connections(postgres_url)
        stream.emit(1)
        heartbeat.beat()
        eventually(lambda: emitter._failing_since is not None)
        stream.emit(2)
        relay.refuses = False
        stream.checkpoint({"role": "assistant", "content": "0 1 2"})
        stream.emit(3)
        stream.finish()
    assert [event.data for event in store.events("s", stream.id)] == [0, 1, 2, 3]


def test_server_that_stays_away_fails_an_emission(
    through: Through, store: persist.Store, relay: Relay, postgres_url: str, schema: str
) -> None:
    """When the server was away for longer than `timeout_s`, the owner is told. The events are kept all the same."""
    cut = through(timeout_s=0.5)
    stream = cut.start_stream("s", USER)
    stream.emit(0, durable=True)
    relay.refuses = True
    end_connections(postgres_url)
    stream.emit(1)
    eventually(lambda: engine_of(cut).writers["s", stream.id].failure is not None)
    with pytest.raises(persist.EmitFailed):
        stream.emit(2)
    relay.refuses = False
    eventually(lambda: in_database(postgres_url, schema) == 2)
    stream.emit(3)
    stream.finish()
    assert [event.data for event in store.events("s", stream.id)] == [0, 1, 3]


def test_look_at_the_server_accepts_no_older_news(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that asks how a stream has ended first reads what came before that, not news from before the question.

    Without the time in `look_again`, a follower behind a pooler may miss the last events, and end with "unknown".
    """
    stream = store.start_stream("s", USER)
    stream.emit(1, durable=True)
    reader = engine_of(store).events("s", stream.id, 0)
    assert isinstance(reader, RemoteReader)
    assert [event.data for event in reader.read()] == [1]
    with reader.waking(lambda: None):
        eventually(lambda: reader.read_cached() is not None)
        feed = reader._feed
        assert feed is not None
        asked_at = feed.asked_at
        reader.look_again()
        with feed.guard:
            # The news that come next were asked for before the look.
            monkeypatch.setattr(feed, "asked_at", asked_at)
            assert reader.read_cached() is None
    stream.finish()


def test_clean_exit_writes_the_last_events(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A process that ends while its thread is writing, here because it has to connect first, waits for that.

    Without `write_all` in `Emitter.close`, it gives its row up first, and the server takes the events no more.
    """
    code = """
import threading
from persist.postgres import connections
really = connections.Own.get
inside = threading.Event()
def late(self):
    if threading.current_thread().name == 'persist-emit':
        inside.set()
        time.sleep(0.3)
    return really(self)
stream = store.start_stream('s', stream_id='t')
connections.Own.get = late
stream.emit(1)
inside.wait()
"""
    assert run(code, postgres_url, schema).wait(20) == 0
    assert [event.data for event in store.events("s", "t")] == [1]


def test_stream_may_be_dropped_wherever_its_threads_are(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A garbage stream with events that wait is collected at each line of an emission, a round of writing, and a beat.

    The collector may run in any thread at any line. With a lock that is not re-entrant in `Emitter`, or an Event in
    the place of `Wake`, the thread waits for itself, and no event of the process is written any more.
    """
    code = """
import faulthandler, gc, threading, warnings
faulthandler.dump_traceback_later(60, exit=True)
warnings.simplefilter('ignore', ResourceWarning)
from persist.postgres import emitter
emitter.BATCH_S = 3600.0
engine, own = store._backend.engine, store.start_stream('s')
engine.emitter._round.acquire()  # The thread itself writes nothing meanwhile.
files = ('emitter.py', 'heartbeat.py', 'wake.py', 'threading.py')
box = []
def at_line(wanted):
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == 'line':
            seen += 1
            if seen == wanted and box:
                box.clear()
                gc.collect()
        return trace
    return trace
def work():
    own.emit(1)
    engine.emitter._round.release()
    engine.emitter.write_all()
    engine.heartbeat.beat()
    engine.emitter._round.acquire()
gc.disable()
line = 0
while not box:
    line += 1
    store.create(f's{line}', {'messages': []})
    dropped = [store.start_stream(f's{line}')]
    dropped[0].emit(1)
    dropped.append(dropped)
    box.append(dropped)
    del dropped
    sys.settrace(at_line(line))
    work()
    sys.settrace(None)
box.clear()
print(line, flush=True)
engine.emitter._round.release()
own.finish()
"""
    assert int(said(run(code, postgres_url, schema))) > 30


def test_nothing_is_tidied_behind_the_end_of_a_process(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may be about to remove expired events when the process ends. It connects no more.

    Without the reset in `Emitter.close`, it leaves a connection open.
    """
    emitter = engine_of(store).emitter
    monkeypatch.setattr(emitter, "_go", lambda: None)
    emitter.tidy_soon()
    emitter.close()
    emitter.tidy()
    assert emitter._own._connection is None


def test_child_of_multiprocessing_ends_cleanly(store: persist.Store, postgres_url: str, schema: str) -> None:
    """Such a child ends past `atexit`, and yet frees its streams at once, and writes its last events.

    Without `at_end_of_children`, others wait for the lease.
    """
    code = """
import multiprocessing
def turn():
    # It is kept, because a stream that is dropped gives its lease up.
    kept.append(persist.Store(*at, **options).start_stream('s', stream_id='t'))
    kept[0].emit(1)
    time.sleep(0.05)
kept = []
at, options = [store._at], store._options
child = multiprocessing.get_context('fork').Process(target=turn)
child.start(); child.join()
sys.exit(child.exitcode)
"""
    assert run(code, postgres_url, schema).wait(20) == 0
    info = store.stream("s")
    assert info is not None
    assert not info.is_live
    assert [event.data for event in store.events("s", "t")] == [1]
