"""Streams across processes, on each engine: one owner, its death, its end, and the fence behind it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable

import pytest
from actors import Actor, eventually
from conftest import ActorFactory
from harness.contents import everything_in
from harness.turns import START, contents

import persist

KINDS = ("auto", "postgres")
Kill = Callable[[Actor], None]


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "Streams", "messages": []})


def test_dropped_stream_is_stale_and_warns(store: persist.Store, session: persist.Session) -> None:
    """A dropped stream releases its lease with a ResourceWarning, because only the Stream object holds it."""
    stream = store.start_stream("s-1")
    with pytest.warns(ResourceWarning, match=stream.id):
        del stream
        gc.collect()
    eventually(lambda: [info.is_live for info in store.streams()] == [False])
    assert len(store.clear_stale_streams().cleared) == 1


def test_one_of_two_processes_wins_forty_times(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A11: two processes start a stream at a barrier, 40 rounds: each has one winner, and the loser is told who won.

    Fails without the lock, and if liveness is known only in the process that asks.
    """
    actors = [actor(), actor()]
    for _ in range(40):
        for each in actors:
            each.start(START)
        winners: list[tuple[Actor, str]] = []
        losses: list[persist.SessionBusy] = []
        for each in actors:
            try:
                winners.append((each, each.result()))
            except persist.SessionBusy as busy:
                losses.append(busy)
        [(winner, stream_id)], [loss] = winners, losses
        assert loss.stream_id == stream_id
        assert loss.owner is not None
        assert loss.owner.pid == winner.pid
        assert str(winner.pid) in str(loss)
        winner.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")
    messages = store.load("s-1").data["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 40


def test_another_process_clears_after_kill(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill
) -> None:
    """A7: once a death is known, the first process that looks clears the stream, and prompt and partial stay."""
    owner, other = actor(), actor()
    owner.do(START)
    owner.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    assert other.do("store.load('s-1').clear_stale_stream()") is False
    kill(owner)
    assert other.do("store.load('s-1').clear_stale_stream()") is True
    assert contents(store) == [("Why?", True), ("Be", True)]


def test_another_process_takes_over_after_kill(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill
) -> None:
    """A7: a start after a kill needs no sweep before it."""
    owner, other = actor(), actor()
    first = owner.do(START)
    kill(owner)
    assert other.do(START) not in (None, first)
    assert contents(store) == [("Why?", True), ("Why?", False)]


def test_cancel_reaches_the_owner_in_another_process(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A cancel is a durable request that the owner sees. The turn ends as the owner ends it."""
    owner, other = actor(), actor()
    stream_id = owner.do(START)
    assert owner.do("stream.is_cancelled()") is False
    assert other.do(f"store.cancel('s-1', {stream_id!r})") is True
    assert other.do(f"store.cancel('s-1', {stream_id!r})") is True
    assert owner.do("stream.is_cancelled()") is True
    assert store.streams()[0].is_cancelled
    owner.do("stream.fail()")
    assert contents(store) == [("Why?", True)]
    assert other.do(f"store.cancel('s-1', {stream_id!r})") is False


def test_forced_cancel_fences_the_owner_off(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A5, A6: after a forced cancel every write of the old owner is refused, also once a new stream runs.

    Fails without the fence.
    """
    owner, other = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    assert other.do(f"store.cancel('s-1', {stream_id!r}, force=True)") is True
    assert contents(store) == [("Why?", True), ("Be", True)]
    new_id = other.do(START)
    before = store.load("s-1")
    for write in (
        "stream.checkpoint({'role': 'assistant', 'content': 'late'})",
        "stream.append({'role': 'tool', 'content': 'late'})",
        "stream.update(lambda tx: tx.fields.update(late=1))",
        "stream.finish({'role': 'assistant', 'content': 'late'}, fields={'late': 1})",
        "stream.fail()",
    ):
        with pytest.raises(persist.StreamLost):
            owner.do(write)
    assert owner.do("stream.is_cancelled()") is True
    after = store.load("s-1")
    assert (after.revision, after.active_stream_id) == (before.revision, new_id)
    # The old owner's end must not take the new stream's lease with it.
    owner.kill()
    assert store.clear_stale_streams() == persist.Sweep([], {})
    other.do("stream.finish()")


def test_owner_of_an_earlier_incarnation_is_fenced_off(store: persist.Store) -> None:
    """C1: a session made anew under the same id is another one, even if its stream has the same id and epoch."""
    store.create("s-2", {"messages": []})
    first = store.start_stream("s-2", stream_id="run")
    store.delete("s-2", force=True)
    store.create("s-2", {"messages": []})
    with store.start_stream("s-2", stream_id="run") as second:
        assert first.epoch == second.epoch
        for verb in (first.checkpoint, first.append, first.finish):
            with pytest.raises(persist.StreamLost, match="made anew"):
                verb({"role": "assistant", "content": "late"})
        second.finish({"role": "assistant", "content": "mine"})
    assert [message["content"] for message in store.load("s-2").data["messages"]] == ["mine"]
    first._close()


def test_cancel_of_another_stream_changes_nothing(store: persist.Store, session: persist.Session) -> None:
    """A cancel of a stream that is not the current one changes nothing."""
    with store.start_stream("s-1") as stream:
        before = store.load("s-1").revision
        assert store.cancel("s-1", "another") is False
        assert store.cancel("s-1", "another", force=True) is False
        assert store.load("s-1").revision == before
        assert not stream.is_cancelled()
        stream.finish()


def test_cancel_of_a_dead_stream_clears_it(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill
) -> None:
    """A cancel of a dead stream frees the session at once, because no owner is left to see the request."""
    owner = actor()
    stream_id = owner.do(START)
    kill(owner)
    assert store.cancel("s-1", stream_id) is True
    assert store.load("s-1").active_stream_id is None


def test_turn_ends_with_all_its_messages_in_order(store: persist.Store, session: persist.Session) -> None:
    """A turn stores its prompt, its appended messages and its answer, in this order.

    The pending fields mirror the prompt while the turn runs.
    """
    prompt = {"id": "m1", "role": "user", "content": "Why?", "attachments": ["a.png"]}
    with store.start_stream("s-1", prompt) as stream:
        data = store.load("s-1").data
        assert (data["pending_user_message"], data["pending_attachments"]) == ("Why?", ["a.png"])
        stream.checkpoint({"role": "assistant", "content": "Be"})
        stream.append({"id": "t1", "role": "tool", "content": "looked"})
        stream.append({"id": "t1", "role": "tool", "content": "looked"})
        stream.checkpoint({"role": "assistant", "content": "Becau"})
        assert [m["content"] for m in store.load("s-1").data["messages"]] == ["Why?", "looked", "Becau"]
        stream.finish({"id": "m2", "role": "assistant", "content": "Because."})
    data = store.load("s-1").data
    assert [m["id"] for m in data["messages"]] == ["m1", "t1", "m2"]
    assert [data[f] for f in ("active_stream_id", "pending_user_message", "pending_attachments")] == [None, None, []]


def test_finish_without_message_keeps_the_last_checkpoint(store: persist.Store, session: persist.Session) -> None:
    """The last checkpoint is the answer if `finish` gives none, and it is not marked."""
    with store.start_stream("s-1", {"role": "user", "content": "Why?"}) as stream:
        stream.checkpoint({"role": "assistant", "content": "Because."})
        stream.finish()
    assert contents(store) == [("Why?", False), ("Because.", False)]


def test_interrupted_prompt_is_taken_up_again(store: persist.Store, session: persist.Session) -> None:
    """A prompt with a known id is the same prompt, so it is not doubled, and its mark is removed."""
    prompt = {"id": "m1", "role": "user", "content": "Why?"}
    with store.start_stream("s-1", prompt):
        pass
    assert contents(store) == [("Why?", True)]
    with store.start_stream("s-1", prompt) as stream:
        assert contents(store) == [("Why?", False)]
        stream.finish({"role": "assistant", "content": "Because."})
    with pytest.raises(persist.MergeConflict):
        store.start_stream("s-1", {"id": "m1", "role": "user", "content": "Something else?"})


def test_exception_in_the_turn_marks_it_interrupted_and_travels_on(
    store: persist.Store, session: persist.Session
) -> None:
    """Leaving the block without `finish` means `fail`: everything is kept and marked, and the session is free."""
    with pytest.raises(ZeroDivisionError), store.start_stream("s-1", {"role": "user", "content": "Why?"}) as stream:
        stream.checkpoint({"role": "assistant", "content": "Be"})
        _ = 1 / 0
    assert contents(store) == [("Why?", True), ("Be", True)]
    assert store.streams() == []


def test_verb_after_the_end_names_the_reasons_that_there_may_be(
    store: persist.Store, session: persist.Session, kind: str
) -> None:
    """`StreamLost` speaks of a server that did not renew the lease only where there is a server."""
    with store.start_stream("s-1") as stream:
        stream.finish()
    for verb in (lambda: stream.emit(1), stream.finish):
        with pytest.raises(persist.StreamLost, match=r"it has ended, .*this is a forked child") as lost:
            verb()
        assert ("or the server did not renew its lease in time" in str(lost.value)) == (kind == "postgres")


def test_forked_child_neither_owns_nor_ends_the_stream(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """In a forked child every verb raises StreamLost, and leaving the block does nothing.

    The parent keeps the lease.
    """
    owner = actor()
    code = """
with store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}) as stream:
    child = os.fork()
    if child == 0:
        verdict = 1
        try:
            with stream:
                try:
                    stream.checkpoint({'role': 'assistant', 'content': 'from the child'})
                except persist.StreamLost:
                    verdict = 7 if stream.is_cancelled() and store.load('s-1').clear_stale_stream() is False else 2
        finally:
            os._exit(verdict)
    child_said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    still_owned = store.load('s-1').clear_stale_stream() is False
    stream.finish({'role': 'assistant', 'content': 'Because.'})
child_said, still_owned
"""
    assert owner.do(code) == (7, True)
    assert contents(store) == [("Why?", False), ("Because.", False)]


def test_lease_ends_with_its_process_although_a_forked_child_lives_on(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill
) -> None:
    """A forked child that outlives the owner does not keep the dead stream alive."""
    owner = actor()
    owner.do(START)
    code = """
import time
ready, here = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(here, b'!')
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
pid
"""
    child = owner.do(code)
    kill(owner)
    try:
        assert store.load("s-1").clear_stale_stream() is True
    finally:
        os.kill(child, signal.SIGKILL)


def test_answer_of_an_interrupted_turn_is_taken_up_again(store: persist.Store, session: persist.Session) -> None:
    """A retry continues an interrupted answer with an id of its own, and gets no conflict."""
    prompt = {"id": "m1", "role": "user", "content": "Why?"}
    with store.start_stream("s-1", prompt) as stream:
        stream.checkpoint({"id": "m2", "role": "assistant", "content": "Be"})
    with store.start_stream("s-1", prompt) as stream:
        stream.checkpoint({"id": "m2", "role": "assistant", "content": "Becau"})
        stream.append({"role": "tool", "content": "looked"})
        stream.finish({"id": "m2", "role": "assistant", "content": "Because."})
    assert contents(store) == [("Why?", False), ("looked", False), ("Because.", False)]
    with pytest.raises(persist.MergeConflict), store.start_stream("s-1") as stream:
        stream.finish({"id": "m2", "role": "assistant", "content": "Something else."})


def test_own_stream_id_is_used_once(store: persist.Store, session: persist.Session) -> None:
    """A server may bring its own stream ids. An id that was used before is refused, because it would mix two turns."""
    with store.start_stream("s-1", {"role": "user", "content": "Why?"}, stream_id="run-1") as stream:
        with pytest.raises(persist.SessionBusy):
            store.start_stream("s-1", stream_id="run-1")
        stream.finish({"role": "assistant", "content": "Because."})
    for bad in ("run-1", "../x", "", "a.b"):
        with pytest.raises(persist.InvalidArgument):
            store.start_stream("s-1", stream_id=bad)
    assert store.load("s-1").active_stream_id is None


def test_delete_of_a_busy_session_needs_force(store: persist.Store, session: persist.Session) -> None:
    """A live stream protects its session. A forced delete removes the session and its lease, and the stream is told."""
    store.delete("s-1")
    nothing = everything_in(store)
    store.create("s-1")
    with store.start_stream("s-1") as stream:
        with pytest.raises(persist.SessionBusy):
            store.delete("s-1")
        store.delete("s-1", force=True)
        with pytest.raises(persist.StreamLost):
            stream.checkpoint({"role": "assistant", "content": "late"})
    assert everything_in(store) == nothing
