"""Streams across processes: one owner, and the kernel tells whether it lives."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from actors import Actor
from conftest import ActorFactory

import persist

START = "stream = store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}); stream.id"


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "Streams", "messages": []})


def contents(store: persist.Store) -> list[tuple[str, bool]]:
    return [(m["content"], m.get("interrupted", False)) for m in store.load("s-1").data["messages"]]


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


def test_another_process_clears_after_kill(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A7: the kernel shows a death, the first process that looks clears the stream, and prompt and partial stay."""
    owner, other = actor(), actor()
    owner.do(START)
    owner.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    assert other.do("store.load('s-1').clear_stale_stream()") is False
    owner.kill()
    assert other.do("store.load('s-1').clear_stale_stream()") is True
    assert contents(store) == [("Why?", True), ("Be", True)]


def test_another_process_takes_over_after_kill(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A7: a start after a kill needs no sweep before it."""
    owner, other = actor(), actor()
    first = owner.do(START)
    owner.kill()
    assert other.do(START) not in (None, first)
    assert contents(store) == [("Why?", True), ("Why?", False)]


def test_paused_owner_is_alive(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A7: SIGSTOP proves nothing: 3 processes ask 100 times each, and the stream is there when its owner goes on."""
    owner, askers = actor(), [actor() for _ in range(3)]
    owner.do(START)
    os.kill(owner.pid, signal.SIGSTOP)
    for each in askers:
        each.start(
            "[bool(store.clear_stale_streams().cleared) or store.load('s-1').clear_stale_stream() for _ in range(50)]"
            " + [not info.is_live for _ in range(50) for info in store.streams()]"
        )
    assert [any(each.result()) for each in askers] == [False] * 3
    os.kill(owner.pid, signal.SIGCONT)
    owner.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")
    assert contents(store) == [("Why?", False), ("Because.", False)]


def test_idle_owner_is_alive_whatever_its_files_look_like(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A7: neither age nor content of a lease counts: one that is a year old and empty belongs to a live stream."""
    owner = actor()
    stream_id = owner.do(START)
    lease = directory / ".leases" / f"s-1.{stream_id}"
    os.truncate(lease, 0)
    for path in (lease, directory / "s-1.json"):
        os.utime(path, (1, 1))
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert store.load("s-1").clear_stale_stream() is False
    owner.do("stream.finish()")


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


def test_cancel_of_a_dead_stream_clears_it(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A cancel of a dead stream frees the session at once, because no owner is left to see the request."""
    owner = actor()
    stream_id = owner.do(START)
    owner.kill()
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
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """Leaving the block without `finish` means `fail`: everything is kept and marked, and the lease is gone."""
    with pytest.raises(ZeroDivisionError), store.start_stream("s-1", {"role": "user", "content": "Why?"}) as stream:
        stream.checkpoint({"role": "assistant", "content": "Be"})
        _ = 1 / 0
    assert contents(store) == [("Why?", True), ("Be", True)]
    assert list((directory / ".leases").iterdir()) == []


def test_lease_is_given_up_even_if_the_last_commit_fails(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """The exit raises if the turn cannot be marked, because its file is unreadable.

    The stream is dead all the same.
    """
    with pytest.raises(persist.CorruptSession), store.start_stream("s-1") as stream:
        whole = (directory / "s-1.json").read_bytes()
        (directory / "s-1.json").write_bytes(whole[:-5])
    (directory / "s-1.json").write_bytes(whole)
    assert [info.is_live for info in store.streams()] == [False]
    assert [c.stream_id for c in store.clear_stale_streams().cleared] == [stream.id]


def test_dropped_stream_is_stale_and_warns(store: persist.Store, session: persist.Session) -> None:
    """A dropped stream releases its lease with a ResourceWarning, because only the Stream object holds it."""
    stream = store.start_stream("s-1")
    with pytest.warns(ResourceWarning, match=stream.id):
        del stream
        gc.collect()
    assert [info.is_live for info in store.streams()] == [False]
    assert len(store.clear_stale_streams().cleared) == 1


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
    store: persist.Store, session: persist.Session, actor: ActorFactory
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
    owner.kill()
    try:
        assert store.load("s-1").clear_stale_stream() is True
    finally:
        os.kill(child, signal.SIGKILL)


def test_sweep_removes_leases_that_lead_nowhere(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """A sweep removes the lease of a deleted session, or of a stream that has ended, and does not report it."""
    for name in ("gone.abc", "s-1.abc", "not a lease"):
        (directory / ".leases" / name).write_bytes(b"{}")
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert [path.name for path in (directory / ".leases").iterdir()] == ["not a lease"]
    assert not (directory / "gone.json.lock").exists()


def test_sweep_goes_on_past_a_damaged_session(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A sweep goes on past a damaged session, and returns what it cleared and what it could not clear."""
    store.create("s-0", {"messages": []})
    owner = actor()
    for session_id in ("s-0", "s-1"):
        owner.do(f"stream_{session_id[-1]} = store.start_stream({session_id!r})")
    owner.kill()
    (directory / "s-0.json").write_bytes(b"{")
    sweep = store.clear_stale_streams()
    assert [cleared.session_id for cleared in sweep.cleared] == ["s-1"]
    assert list(sweep.failures) == ["s-0"]
    assert type(sweep.failures["s-0"]) is persist.CorruptSession


def test_damaged_session_hides_no_other_streams(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """`streams` lists the streams of the other sessions, and `check` names the damage."""
    store.create("s-0", {"messages": []})
    with store.start_stream("s-0") as other, store.start_stream("s-1") as stream:
        whole = (directory / "s-0.json").read_bytes()
        (directory / "s-0.json").write_bytes(b"?" + whole)
        assert [info.stream_id for info in store.streams()] == [stream.id]
        assert [(problem.session_id, problem.kind) for problem in store.check()] == [("s-0", "corrupt")]
        (directory / "s-0.json").write_bytes(whole)
        stream.finish()
        other.finish()


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


def test_sweep_of_every_session_finds_streams_without_a_lease(store: persist.Store, directory: Path) -> None:
    """Adoption: a stream that an old server left behind has no lease. Its prompt is kept, and is cleared once."""
    (directory / "old.json").write_text(
        '{"title": "Old", "updated_at": 12.5, "active_stream_id": "a/b", "pending_user_message": "Hello?",'
        ' "pending_attachments": ["x"], "pending_started_at": 3, "messages": [{"role": "user", "content": "first"}]}'
    )
    assert store.clear_stale_streams() == persist.Sweep([], {})
    cleared = store.clear_stale_streams(every_session=True).cleared
    assert [(c.session_id, c.stream_id) for c in cleared] == [("old", "a/b")]
    assert store.clear_stale_streams(every_session=True) == persist.Sweep([], {})
    data = store.load("old").data
    assert data["updated_at"] == 12.5
    assert data["messages"][1:] == [
        {"id": "a/b.prompt", "role": "user", "content": "Hello?", "interrupted": True, "attachments": ["x"]}
    ]


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


def test_delete_of_a_busy_session_needs_force(store: persist.Store, session: persist.Session, directory: Path) -> None:
    """A live stream protects its session. A forced delete removes the session and its lease, and the stream is told."""
    with store.start_stream("s-1") as stream:
        with pytest.raises(persist.SessionBusy):
            store.delete("s-1")
        store.delete("s-1", force=True)
        with pytest.raises(persist.StreamLost):
            stream.checkpoint({"role": "assistant", "content": "late"})
    assert sorted(path.name for path in directory.rglob("*")) == [".leases"]
