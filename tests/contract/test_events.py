"""Events across processes, on each engine: followed while they are written, and ended with their owner.

An emission that is durable is there for every process on return. Another one may take a moment on PostgreSQL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from actors import DEADLINE_S, Actor, eventually
from conftest import ActorFactory
from contract.conftest import MakeStore
from harness.contents import everything_in
from harness.faults import descriptors
from harness.sweeps import sweep
from harness.turns import FOLLOW, START, event_files, numbered, written

import persist
from persist import follow
from persist.engine import Ended

KINDS = ("auto", "postgres")
Kill = Callable[[Actor], None]


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"messages": []})


@pytest.mark.usefixtures("switching")
def test_followers_see_every_event_of_many_threads_once(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """Followers see every event once, at the offset that `emit` returned.

    4 threads emit 200 times each, also several events at once, and 2 processes follow. Fails without the writer's
    guard, and if a reader does not keep a torn line.
    """
    followers = [actor(), actor()]
    barrier = threading.Barrier(4)
    told: dict[int, list[str]] = {}
    with store.start_stream("s-1") as stream:
        for each in followers:
            each.start(FOLLOW.format(stream.id))

        def emit(thread: int) -> None:
            barrier.wait(DEADLINE_S)
            for n in range(200):
                data = [f"{thread}.{n}.{part}" for part in range(1 + n % 3)]
                told[stream.emit(*data)] = data

        threads = [threading.Thread(target=emit, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        stream.finish()
    expected = [data for offset in sorted(told) for data in told[offset]]
    assert len(expected) == 4 * sum(1 + n % 3 for n in range(200))
    for each in followers:
        assert each.result() == (numbered(expected), "finished")


ENDS: dict[str, tuple[str, Ended]] = {
    "finish": ("stream.finish({'role': 'assistant', 'content': 'Because.'})", "finished"),
    "fail": ("stream.fail()", "failed"),
    "leaving": ("with stream: pass", "failed"),
    "cancel": ("store.cancel('s-1', stream.id)\nwith stream: pass", "cancelled"),
    "finish in spite of a cancel": ("store.cancel('s-1', stream.id); stream.finish()", "finished"),
    "forced cancel": ("store.cancel('s-1', stream.id, force=True)", "cancelled"),
    "forced delete": ("store.delete('s-1', force=True)", "deleted"),
}


@pytest.mark.parametrize("end", ENDS)
def test_follower_is_told_how_the_stream_ended(
    store: persist.Store, session: persist.Session, actor: ActorFactory, end: str, kind: str
) -> None:
    """Every end of a stream ends its followers and tells them how it ended, also if there were no events.

    The followers come before the first event. On PostgreSQL a delete takes the events away that were not read yet.
    """
    owner = actor()
    code, ended = ENDS[end]
    for data in ([], ["Be", "cause."]):
        if not store.exists("s-1"):
            store.create("s-1", {"messages": []})
        with store.follow("s-1", owner.do(START)) as followed:
            owner.do(f"[stream.emit(each) for each in {data}]")
            owner.do(code)
            found = [(event.offset, event.data) for event in followed]
            assert found == numbered(data) or (end == "forced delete" and kind == "postgres" and found == [])
            assert followed.ended == ended
            assert next(followed, None) is None


def test_cleared_stream_has_died(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill
) -> None:
    """Every verb that finds the stream dead says so to its followers. In files it says so before any of them asks."""
    clearing: tuple[Callable[[str], object], ...] = (
        lambda _: sweep(store),
        lambda _: store.load("s-1").clear_stale_stream(),
        lambda stream_id: store.cancel("s-1", stream_id),
        lambda stream_id: store.cancel("s-1", stream_id, force=True),
        lambda _: store.start_stream("s-1").finish(),
    )
    for clear in clearing:
        owner = actor()
        stream_id = owner.do(START)
        owner.do("stream.emit('Be', durable=True)")
        kill(owner)
        clear(stream_id)
        assert all(path.read_bytes().endswith(b'{"end":"died"}\n') for path in event_files(store))
        with store.follow("s-1", stream_id) as followed:
            assert ([event.data for event in followed], followed.ended) == (["Be"], "died")


def test_killed_owner_is_noticed(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill, kind: str
) -> None:
    """After kill -9 each follower gets all the events and "died", and the session can start a new stream.

    Fails without the look at the lease. With files it fails, too, if emitted events are kept in memory for a while.
    """
    durable = "n == 999" if kind == "postgres" else "False"
    follower = actor()
    for _ in range(3):
        owner = actor()
        stream_id = owner.do(START)
        follower.start(FOLLOW.format(stream_id))
        assert owner.do(f"[stream.emit(n, durable={durable}) for n in range(1000)][-1]") == 1000
        kill(owner)
        assert follower.result() == (numbered(list(range(1000))), "died")
        assert written(store, stream_id) == list(range(1000))
        store.start_stream("s-1").finish()


def test_what_was_written_before_the_look_comes_first(
    store: persist.Store, session: persist.Session, actor: ActorFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower gets the last event when the owner emits it and finishes just before the follower's look at the lease.

    Fails if the answer of that look counts alone.
    """
    owner = actor()
    stream_id = owner.do(START)
    real = follow.Cursor._ended_unsaid

    def ask(cursor: follow.Cursor) -> Ended | None:
        # The look has no lock yet, so the owner can finish.
        owner.do("stream.emit('last'); stream.finish()")
        return real(cursor)

    monkeypatch.setattr(follow.Cursor, "_ended_unsaid", ask)
    with store.follow("s-1", stream_id) as followed:
        assert ([event.data for event in followed], followed.ended) == (["last"], "finished")


TAKE_AWAY = {
    "forced cancel": "store.cancel('s-1', 'turn-1', force=True)",
    "forced delete": "store.delete('s-1', force=True)",
    "deleted and made anew": """
store.delete('s-1', force=True)
store.create('s-1', {'messages': []})
new = store.start_stream('s-1', stream_id='turn-1')
new.emit('new', durable=True)
""",
}


@pytest.mark.parametrize("how", TAKE_AWAY)
@pytest.mark.parametrize("before", [[], ["before"]])
def test_emission_of_a_stream_that_lost_its_session_lands_nowhere(
    store: persist.Store, session: persist.Session, actor: ActorFactory, how: str, before: list[str]
) -> None:
    """A stream that lost its session learns it at a durable emission, and none of its late events is stored."""
    owner, other = actor(), actor()
    owner.do("stream = store.start_stream('s-1', stream_id='turn-1'); stream.id")
    owner.do(f"[stream.emit(each, durable=True) for each in {before}]")
    followed = store.follow("s-1", "turn-1")
    other.do(TAKE_AWAY[how])
    for _ in range(2):
        with pytest.raises(persist.StreamLost):
            owner.do("stream.emit('late', durable=True)")
        with pytest.raises(persist.StreamLost):
            owner.do("stream.emit('later')")
    assert [event.data for event in followed] == before
    if "anew" in how:
        assert written(store, "turn-1") == ["new"]


@pytest.mark.usefixtures("switching")
def test_emission_beside_finish(store: persist.Store, session: persist.Session) -> None:
    """A thread emits while another one finishes, 20 times: acknowledged events are stored, and refused ones are not."""
    for _ in range(20):
        barrier = threading.Barrier(2)
        acknowledged: list[int] = []
        stream = store.start_stream("s-1")

        def emit(
            stream: persist.Stream = stream, barrier: threading.Barrier = barrier, to: list[int] = acknowledged
        ) -> None:
            barrier.wait(DEADLINE_S)
            while True:
                try:
                    to.append(stream.emit(len(to) + 1))
                except persist.StreamLost:
                    return

        thread = threading.Thread(target=emit)
        thread.start()
        barrier.wait(DEADLINE_S)
        stream.finish()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        try:
            assert written(store, stream.id) == acknowledged
        except persist.EventsNotFound:
            assert acknowledged == []


def test_forked_child_emits_nothing(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """`emit` raises StreamLost in a forked child. The parent goes on. Fails without the look at the process id."""
    owner = actor()
    code = """
stream.emit('before')
child = os.fork()
if child == 0:
    verdict = 1
    try:
        stream.emit('from the child')
    except persist.StreamLost:
        verdict = 7
    finally:
        os._exit(verdict)
child_said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
stream.emit('after', durable=True)
child_said
"""
    stream_id = owner.do(START)
    assert owner.do(code) == 7
    assert written(store, stream_id) == ["before", "after"]


def test_id_that_is_used_again_begins_anew(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A new stream with an id that was used before starts without the events of the earlier stream.

    The owner itself finds each event at once, and another process finds a durable one.
    """
    other = actor()
    for n in range(3):
        with store.start_stream("s-1", stream_id="turn-1") as stream:
            with pytest.raises(persist.EventsNotFound):
                store.events("s-1", "turn-1", after=1)
            assert other.do("store.events('s-1', 'turn-1')") == []
            stream.emit(n)
            assert written(store, "turn-1") == [n]
            assert stream.emit("durable", durable=True) == 2
            assert [event.data for event in other.do("store.events('s-1', 'turn-1')")] == [n, "durable"]
            assert written(store, "turn-1") == [n, "durable"]
            stream.finish()
        store.delete("s-1")
        store.create("s-1", {"messages": []})


def test_cursor_that_cannot_be_right_is_refused_at_once(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """`follow` and `events` refuse a wrong cursor with an error that names it.

    The cursor may be ahead, of a wrong type, malformed, or of another session or stream. No file is left open.
    """
    store.create("s-2", {"messages": []})
    owner = actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1, 2, durable=True)")
    cases: list[tuple[tuple[Any, Any, Any], type[Exception]]] = [
        (("s-1", stream_id, 3), persist.EventsNotFound),
        (("s-1", stream_id, 2**70), persist.EventsNotFound),
        (("s-2", stream_id, 0), persist.EventsNotFound),
        (("s-1", "another", 0), persist.EventsNotFound),
        *[((missing, stream_id, 0), persist.SessionNotFound) for missing in ("s-3", "../s", "a.b")],
        *[(("s-1", stream_id, after), persist.InvalidArgument) for after in (-1, True, None, 1.0, "1", "")],
        *[
            (("s-1", wrong, 0), persist.InvalidArgument)
            for wrong in ("", "../s-1", "a.b", "x" * 65, None, 7, "a\0", f"{stream_id}\n")
        ],
        *[((wrong, stream_id, 0), persist.InvalidArgument) for wrong in ("", "x" * 513, "\ud800", None, 7)],
    ]
    before, open_before = everything_in(store), descriptors(collect=True)
    look: Callable[..., object]
    for look in (store.follow, store.events):
        for (session_id, of_stream, after), error in cases:
            with pytest.raises(error):
                look(session_id, of_stream, after=after)
    # A database has no files, but connections.
    assert not event_files(store) or descriptors() == open_before
    assert everything_in(store) == before
    owner.do("stream.finish()")
    with pytest.raises(persist.EventsNotFound) as caught:
        store.follow("s-1", stream_id, after=3)
    assert (caught.value.after, caught.value.count) == (3, 2)


def test_cursor_at_the_last_event_waits_for_the_next(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A follower at the last event waits for the next one, and ends if the stream has ended."""
    owner, follower = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1, 2, durable=True)")
    follower.start(f"following = store.follow('s-1', {stream_id!r}, after=2); next(following)")
    owner.do("stream.emit(3)")
    assert follower.result() == persist.Event(3, 3)
    owner.do("stream.finish()")
    followed = store.follow("s-1", stream_id, after=3)
    assert (list(followed), followed.ended) == ([], "finished")


@pytest.mark.usefixtures("switching")
def test_follower_may_come_and_go(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Kill
) -> None:
    """A client misses nothing if it loses its connection after each event and returns to any process.

    It returns with its cursor.
    """
    owner, workers = actor(), [actor(), actor()]
    stream_id = owner.do(START)
    owner.do(
        "import threading\n"
        "thread = threading.Thread(target=lambda: [stream.emit(n) for n in range(40)])\n"
        "thread.start()"
    )
    seen: list[Any] = []
    while len(seen) < 40:
        code = (
            f"with store.follow('s-1', {stream_id!r}, after={len(seen)}) as f: event = next(f)\n"
            "(event.offset, event.data)"
        )
        seen.append(workers[len(seen) % 2].do(code))
    assert seen == numbered(list(range(40)))
    kill(owner)
    after_death = f"f = store.follow('s-1', {stream_id!r}, after=40); list(f), f.ended"
    assert workers[0].do(after_death) == ([], "died")


def test_loop_that_was_left_goes_on_where_it_was(store: persist.Store, session: persist.Session) -> None:
    """A follower can be iterated again after a `break` and loses nothing. A closed follower gives no more events."""
    with store.start_stream("s-1") as stream:
        stream.emit(*range(10))
        followed = store.follow("s-1", stream.id)
        seen = []
        for event in followed:
            seen.append(event.data)
            if event.data == 4:
                break
        assert (followed.offset, followed.ended) == (5, None)
        stream.emit(10)
        stream.finish()
    seen += [event.data for event in followed]
    assert (seen, followed.offset, followed.ended) == (list(range(11)), 11, "finished")
    closed = store.follow("s-1", stream.id)
    closed.close()
    assert (list(closed), closed.ended) == ([], None)


def test_lock_that_is_held_for_long_ends_no_follower(
    make_store: MakeStore, session: persist.Session, actor: ActorFactory
) -> None:
    """A follower that cannot look whether the owner lives, because the session is locked, tries again.

    Fails if it concludes that the stream has ended.
    """
    owner, holder = actor(), actor()
    stream_id = owner.do(START)
    follower = make_store(timeout_s=0.0)
    with follower.follow("s-1", stream_id) as followed:
        holder.do("held = store.transaction('s-1'); held.__enter__(); None")
        with pytest.raises(persist.LockTimeout):
            follower.stream("s-1")
        looks: list[object] = []
        real = follow.Cursor._ended_unsaid

        def counted(cursor: follow.Cursor) -> Ended | None:
            looks.append(cursor)
            return real(cursor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(follow, "LOOK_S", 0.001)
            patch.setattr(follow.Cursor, "_ended_unsaid", counted)
            thread = threading.Thread(target=lambda: next(followed), daemon=True)
            thread.start()
            eventually(lambda: len(looks) > 10)
            assert thread.is_alive()
            holder.do("held.__exit__(None, None, None)")
            owner.do("stream.emit(1)")
            thread.join(DEADLINE_S)
        assert (followed.offset, followed.ended) == (1, None)


def test_event_that_is_no_json_is_refused_with_all_beside_it(store: persist.Store, session: persist.Session) -> None:
    """A value that is not JSON raises NotJSON, and no event of that call is emitted.

    The stream goes on at the next offset. Fails if each event is written by itself.
    """
    with store.start_stream("s-1") as stream:
        for wrong in ({1, 2}, {1: 2}, float("nan"), (1,), b"x", {"a": [object()]}):
            with pytest.raises(persist.NotJSON):
                stream.emit("before", wrong, "behind")
        with pytest.raises(persist.InvalidArgument):
            stream.emit()
        assert event_files(store) == []
        assert stream.emit("fine") == 1
        with pytest.raises(persist.NotJSON):
            stream.emit({1, 2})
        assert stream.emit("too", "three") == 3
        stream.finish()
    assert written(store, stream.id) == ["fine", "too", "three"]


def test_signal_handler_may_emit_while_others_follow(actor: ActorFactory, session: persist.Session) -> None:
    """A signal handler that emits while threads of its process follow may be refused, but no thread waits for ever."""
    owner = actor()
    seen = owner.do(
        """
import signal, threading
stream = store.start_stream("s-1")
stream.emit(0)
followers = [store.follow("s-1", stream.id) for _ in range(2)]
counts = [0, 0]
def count(place):
    for _ in followers[place]:
        counts[place] += 1
threads = [threading.Thread(target=count, args=(place,)) for place in range(2)]
for thread in threads: thread.start()
emitted = 1
def handler(*_):
    global emitted
    try:
        stream.emit("handler"); emitted += 1
    except persist.LockError:
        pass
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for n in range(3000):
    stream.emit(n); emitted += 1
signal.setitimer(signal.ITIMER_REAL, 0)
stream.finish()
for thread in threads: thread.join()
len(store.events("s-1", stream.id)), counts
"""
    )
    assert seen[1] == [seen[0]] * 2


def test_child_reads_with_a_cursor_of_its_own(store: persist.Store, session: persist.Session) -> None:
    """A follower that is open when the process forks gives every event to the parent, and every event to the child.

    Fails if they share a position.
    """
    with store.start_stream("s-1") as stream:
        for n in range(300):
            stream.emit(*[f"{n} {m} {'x' * 1000}" for m in range(10)])
        followed = store.follow("s-1", stream.id)
        stream.finish()
    child = os.fork()
    if child == 0:
        os._exit([event.offset for event in followed] != list(range(1, 3001)))
    assert [event.offset for event in followed] == list(range(1, 3001))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- expiry -----------------------------------------------------------------------------------------------------------


def end_turn(store: persist.Store, session_id: str, *events: object, stream_id: str | None = None) -> str:
    """Run a turn to its end, and return its id."""
    with store.start_stream(session_id, stream_id=stream_id) as stream:
        stream.emit(*events)
        stream.finish()
    return stream.id


def test_events_are_kept_as_long_as_was_said(
    store: persist.Store, session: persist.Session, make_store: MakeStore, kind: str
) -> None:
    """Neither a later stream nor a sweep removes events before their time. A sweep removes them after it."""
    ids = [end_turn(store, "s-1", number) for number in range(2)]
    sweep(store)
    assert [written(store, each) for each in ids] == [[0], [1]]
    assert len(event_files(store)) == (0 if kind == "postgres" else 2)
    sweep(make_store(keep_events_s=0))
    assert event_files(store) == []
    for each in ids:
        with pytest.raises(persist.EventsNotFound):
            store.follow("s-1", each)


def test_time_of_an_earlier_stream_takes_no_events_of_a_live_one(make_store: MakeStore) -> None:
    """The expiry of an earlier stream leaves the events of a running stream with the same id, in a session made anew.

    Fails if a finish, a sweep or `close` removes what has the name by then.
    """
    store = make_store(keep_events_s=0)
    for session_id in ("s-1", "s-2"):
        store.create(session_id, {"messages": []})
    end_turn(store, "s-1", "old", stream_id="turn-1")
    store.delete("s-1")
    store.create("s-1", {"messages": []})
    with store.start_stream("s-1", stream_id="turn-1") as stream:
        stream.emit("new", durable=True)
        end_turn(store, "s-2", "other")
        sweep(store)
        store.close()
        assert written(make_store(), "turn-1") == ["new"]
        stream.finish()
    sweep(make_store(keep_events_s=0))
    with pytest.raises(persist.EventsNotFound):
        make_store().events("s-1", "turn-1")
    assert event_files(store) == []
