"""The events of a stream: their order, their end, and what a stream's commit has to do with them."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness.chats import ANSWER, PROMPT

import persist


def heard(following: persist.Following) -> list[Any]:
    return [event.data for event in following]


def ended_with(store: persist.Store, code: str) -> int:
    """Run some code in another process, which has `store`, and return its exit status."""
    opening = f"import os, signal, persist\nstore = persist.Store({store._at!r}, **{dict(store._options)!r})\n"
    return subprocess.run([sys.executable, "-P", "-c", opening + code], check=False, timeout=60).returncode


def test_followers_hear_all_events_and_the_end(store: persist.Store, session: persist.Session) -> None:
    stream = store.start_stream("s", PROMPT)
    with ThreadPoolExecutor(5) as pool:
        listeners = [pool.submit(heard, store.follow("s", stream.id)) for _ in range(5)]
        for number in range(300):
            assert stream.emit(number) == number + 1
        stream.finish(ANSWER)
        assert [each.result() for each in listeners] == [list(range(300))] * 5
    late = store.follow("s", stream.id, after=290)
    assert heard(late) == list(range(290, 300))
    assert (late.ended, late.offset) == ("finished", 300)
    assert heard(store.follow("s", stream.id, after="end")) == []


@pytest.mark.parametrize(
    "verb",
    [
        "stream.checkpoint({'role': 'assistant', 'content': 'ab'})",
        "stream.append({'role': 'tool', 'content': 'ab'})",
        "stream.update(lambda tx: tx.fields.update(n=1))",
        "stream.finish({'role': 'assistant', 'content': 'ab'})",
        "stream.fail()",
        "stream.emit('c', durable=True)",
    ],
)
def test_commit_of_a_stream_never_knows_more_than_its_events(
    store: persist.Store, session: persist.Session, verb: str
) -> None:
    """A process is killed behind a commit of its stream. The events that it emitted before the commit are all there.

    PostgreSQL gets events in batches, and here the next one would come in a minute. Without the batch in
    `Transaction._write`, they are lost.
    """
    code = f"""
if not os.path.isdir({str(store._at)!r}):
    from persist.postgres import emitter
    emitter.BATCH_S = 60.0
stream = store.start_stream("s", stream_id="t")
stream.emit("a"); stream.emit("b")
{verb}
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert ended_with(store, code) == -signal.SIGKILL
    assert [event.data for event in store.events("s", "t")][:2] == ["a", "b"]


def test_events_of_a_process_that_exits_are_written(store: persist.Store, session: persist.Session) -> None:
    """A process that comes to its end writes the events that wait. Without `_close_all` in `events`, they are lost."""
    code = f"""
if not os.path.isdir({str(store._at)!r}):
    from persist.postgres import emitter
    emitter.BATCH_S = 60.0
stream = store.start_stream("s", stream_id="t")
stream.emit("a"); stream.emit("b")
globals()["kept"] = stream
"""
    assert ended_with(store, code) == 0
    assert [event.data for event in store.events("s", "t")] == ["a", "b"]


def test_follower_of_a_deleted_session_ends(store: persist.Store, session: persist.Session) -> None:
    stream = store.start_stream("s", PROMPT)
    stream.emit("a", durable=True)
    following, begun = store.follow("s", stream.id), threading.Event()

    def hear() -> list[Any]:
        found = [next(following).data]
        begun.set()
        return found + heard(following)

    with ThreadPoolExecutor(1) as pool:
        listener = pool.submit(hear)
        assert begun.wait(20)
        store.delete("s", force=True)
        assert listener.result(20) == ["a"]
    assert following.ended == "deleted"
    stream._close()


def test_stream_id_that_is_used_again_begins_anew(store: persist.Store, session: persist.Session) -> None:
    """Events of the first stream of that id are not mixed with those of the second one."""
    for data in (["a", "b", "c"], ["d"]):
        with store.start_stream("s", stream_id="t") as stream:
            stream.emit(*data, durable=True)
            stream.finish()
        assert [(event.offset, event.data) for event in store.events("s", "t")] == list(enumerate(data, 1))


def test_texts_of_any_kind_come_back(make_store: Any) -> None:
    """No quote, backslash, NUL, percent sign or half of a surrogate pair means anything on the way."""
    store = make_store()
    odd = "a'b\"c\\d\\0%(id)s$1;--{schema}\x00é\U0001f600"
    for name in (odd, odd[::-1], "'", "\\", "\\'", "x\\u0000"):
        message = {"id": name, "content": name, name: [name, "\ud800", -0.0]}
        data = {name: name, "k" + name: [message] * 20, "t" + name: name * 2000}
        store.create(name, {**data, "messages": [message]})
        store.append(name, "messages", {"id": name + "2", "content": name})
        store.append(name, "messages", {"id": name + "2", "content": name})
        assert store.load(name).data == {**data, "messages": [message, {"id": name + "2", "content": name}]}
        assert store.update(name, lambda tx, name=name: tx.list("messages").find(name)["content"]) == name
    assert len(store.ids()) == 6


def test_events_that_outgrow_their_bound_lose_the_oldest(make_store: Any) -> None:
    """At least half of the bound is left, without gaps, to the last event. A cursor before that is told so."""
    store = make_store(keep_events_bytes=4096)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", PROMPT)
    for number in range(1, 1001):
        stream.emit({"n": number}, durable=number % 100 == 0)
    with pytest.raises(persist.EventsNotFound) as caught:
        store.follow("s", stream.id)
    first = caught.value.first
    assert first is not None
    assert 500 < first < 950
    left = store.events("s", stream.id, after=first - 1)
    assert [(event.offset, event.data["n"]) for event in left] == [(number, number) for number in range(first, 1001)]
    stream.finish()


def test_end_removes_the_events_of_streams_whose_time_is_over(make_store: Any) -> None:
    """Nobody has to sweep, because each end removes up to two streams that ended long ago."""
    kept, expiring = make_store(), make_store(keep_events_s=0.001)
    kept.create("s", {"messages": []})
    for name in ("a", "b"):
        with kept.start_stream("s", stream_id=name) as stream:
            stream.emit(name, durable=True)
            stream.finish()
    assert [event.data for event in kept.events("s", "a")] == ["a"]
    deadline = time.monotonic() + 30
    for number in itertools.count():
        with expiring.start_stream("s", stream_id=f"c{number}") as stream:
            stream.emit(number, durable=True)
            stream.finish()
        try:
            kept.events("s", "a")
        except persist.EventsNotFound:
            return
        assert time.monotonic() < deadline
