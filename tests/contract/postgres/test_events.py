"""The events of streams on PostgreSQL: written in batches, told by hints, and read by followers of other processes."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness.cutting import COMMIT, Relay

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
from harness.remote import engine_of, go, run, said

from persist.postgres import emitter, listener
from persist.postgres.listener import RemoteReader

USER = {"role": "user", "content": "Why?"}


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
    monkeypatch.setattr(emitter, "BATCH_S", 60.0)
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

    Without `news` in `emitter.write`, or without the notification in the statement `end_stream`, it waits for that.
    """
    monkeypatch.setattr(listener, "POLL_S", 3600.0)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER)
    following, heard = store.follow("s", stream.id), queue.Queue[Any]()

    def hear() -> None:
        for event in following:
            heard.put(event.data)

    with ThreadPoolExecutor(1) as pool:
        hearing = pool.submit(hear)
        try:
            # The follower may have read the first event itself, but not the others.
            for number in range(5):
                stream.emit(number, durable=True)
                assert heard.get(timeout=30) == number
            stream.finish()
            hearing.result(30)
        finally:
            following.close()
    assert following.ended == "finished"


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


def test_forked_child_asks_the_server_for_the_events_of_its_parent(postgres_url: str, schema: str) -> None:
    """The parent writes just when it forks, and has events that wait. The child reads and cancels all the same.

    Without the look at the process in `PostgresEngine.writer_of`, the child waits for a thread that it lacks, or gets
    `CommitFailed` for events that its parent has written since.
    """
    code = """
import os, signal, threading
store.create("s", {"messages": []})
stream = store.start_stream("s", stream_id="t")
stream.emit(1, durable=True)
inside, goes_on, told = threading.Event(), threading.Event(), os.pipe()
def write():
    with stream._events.writing:
        inside.set()
        goes_on.wait()
thread = threading.Thread(target=write)
thread.start()
inside.wait()
stream.emit(2)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    os.read(told[0], 1)
    assert [event.data for event in store.events("s", "t")] == [1, 2, 3]
    assert store.cancel("s", "t", force=True)
    os._exit(0)
goes_on.set()
thread.join()
stream.emit(3, durable=True)
os.write(told[1], b".")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
stream._close()
"""
    assert said(run(code, postgres_url, schema)) == "0"


def test_system_without_a_thread_costs_no_event_and_no_turn(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a heartbeat no stream starts. Without the other threads, events are written and read more rarely.

    Without the resets of `_thread`, the process never gets these threads, also when the system has some again.
    """
    store.create("s", {"messages": []})
    missing, really = {"persist-beat", "persist-emit", "persist-listen"}, threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name in missing:
            raise RuntimeError("can't start new thread")
        really(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(persist.Unavailable, match="no thread"):
        store.start_stream("s", USER)
    assert store.head("s").active_stream_id is None
    missing.remove("persist-beat")
    stream = store.start_stream("s", USER)
    assert engine_of(store).heartbeat._thread is not None
    assert stream.emit(1) == 1
    assert stream.emit(2, durable=True) == 2
    with store.follow("s", stream.id) as following:
        assert [next(following).data, next(following).data] == [1, 2]
    missing.clear()
    with store.follow("s", stream.id, after=2) as following:
        stream.emit(3)
        assert next(following).data == 3
        assert engine_of(store).emitter._thread is not None
        assert engine_of(store).listener._thread is not None
    stream.finish()


@pytest.mark.parametrize("ahead_of", [1, 2])
def test_events_that_expire_under_a_reader_are_not_found(
    postgres_url: str, schema: str, ahead_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that go ahead of the first read, or the second, are gone, and no error of a file system comes out.

    Without the handlers in `Cursor.__init__` and `Cursor.take_all`, FileNotFoundError does.
    """
    store = persist.Store(postgres_url, schema=schema, keep_events_s=0.0)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", USER, stream_id="t")
    stream.emit(1, durable=True)
    really, calls = RemoteReader.size, itertools.count(1)

    def late(self: RemoteReader) -> int:
        size, call = really(self), next(calls)
        if call == 1:
            # The first read stops ahead of this one.
            stream.emit(2, durable=True)
        if call == ahead_of:
            stream.finish({"role": "assistant", "content": "a"})
            store._backend.engine.tidy()
        return size

    monkeypatch.setattr(RemoteReader, "size", late)
    with pytest.raises(persist.EventsNotFound):
        store.events("s", "t")
