"""A stream whose events outgrow their bound: which events are dropped, who is told, and what a crash leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ActorFactory
from harness.faults import descriptors
from harness.files import file_engine
from harness.sweeps import sweep
from harness.turns import START

import persist
import persist.aio
from persist.event_log import EventReader, EventWriter
from persist.storage import disk

BOUND = 4096


@pytest.fixture
def store(directory: Path) -> persist.Store:
    return persist.Store(directory, timeout_s=20.0, keep_events_bytes=BOUND)


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"messages": []})


@pytest.fixture
def stream(store: persist.Store, session: persist.Session) -> Iterator[persist.Stream]:
    with store.start_stream("s-1") as started:
        yield started


def file_of(store: persist.Store, stream_id: str) -> Path:
    return store.path / ".events" / f"s-1.{stream_id}"


def first_of(store: persist.Store, stream_id: str) -> int:
    """Return the offset of the first event that is left."""
    with EventReader(str(file_of(store, stream_id))) as reader:
        reader.read()
        return reader.first


def overgrow(stream: persist.Stream, start: int = 1, count: int = 300) -> int:
    """Emit so many events that the oldest are dropped several times, and return the last. Event n is n."""
    for number in range(start, start + count):
        assert stream.emit(number) == number
    return start + count - 1


# --- what is dropped --------------------------------------------------------------------------------------------------


def test_events_that_outgrow_their_bound_lose_the_oldest(store: persist.Store, stream: persist.Stream) -> None:
    """The file stays within its bound plus one event.

    At least half of the bound is left, without gaps, to the last event. Fails if nothing is dropped, or if a new file's
    offsets begin at 1 again.
    """
    path, sizes = file_of(store, stream.id), []
    for number in range(1, 501):
        stream.emit(number)
        sizes.append(path.stat().st_size)
    first = first_of(store, stream.id)
    assert first > 100
    assert max(sizes) <= BOUND
    assert min(sizes[-300:]) > BOUND // 2 - 64
    assert [(event.offset, event.data) for event in store.events("s-1", stream.id, after=first - 1)] == [
        (number, number) for number in range(first, 501)
    ]
    stream.finish()
    with store.follow("s-1", stream.id, after=490) as followed:
        assert ([event.data for event in followed], followed.ended) == (list(range(491, 501)), "finished")
    assert list(path.parent.iterdir()) == [path]


def test_no_bound_keeps_all(directory: Path, session: persist.Session) -> None:
    """None keeps every event. The default keeps all these events, too, because it is far above the size of a turn."""
    for store in (persist.Store(directory, keep_events_bytes=None), persist.Store(directory)):
        with store.start_stream("s-1") as stream:
            overgrow(stream)
            assert len(store.events("s-1", stream.id)) == 300


def test_event_above_the_bound_stays_until_the_next_come(store: persist.Store, stream: persist.Stream) -> None:
    """An event that is larger than the bound can be read, and does not take the place of other events for ever."""
    stream.emit("x" * 3 * BOUND)
    assert len(store.events("s-1", stream.id)) == 1
    assert not stream._events.is_full, "each emission would try again"
    assert overgrow(stream, 2) == 301
    assert file_of(store, stream.id).stat().st_size <= BOUND
    assert store.events("s-1", stream.id, after=300)[0].data == 301


@pytest.mark.parametrize("wrong", [0, -1, 4095, 1e6, "1", True])
def test_bound_that_is_none_is_refused(directory: Path, wrong: Any) -> None:
    """A bound of less than a page is refused, because it cannot be kept."""
    with pytest.raises(persist.InvalidArgument):
        persist.Store(directory, keep_events_bytes=wrong)


def test_bound_goes_with_a_store_that_is_handed_on(store: persist.Store, stream: persist.Stream) -> None:
    """A pickled store and an asyncio store keep the bound."""
    again = pickle.loads(pickle.dumps(store))
    assert file_engine(again).event_files._keep_bytes == BOUND
    assert file_engine(persist.aio.Store(store.path, keep_events_bytes=BOUND)._sync).event_files._keep_bytes == BOUND


# --- who is told ------------------------------------------------------------------------------------------------------


def test_cursor_before_the_first_event_is_told_where_it_is(store: persist.Store, stream: persist.Stream) -> None:
    """A cursor before the first event is an error that names the first offset, with which the reader goes on.

    This holds for `follow` and for `events`. Fails if such a cursor gets the events that are left, as if nothing was
    missing.
    """
    overgrow(stream)
    first = first_of(store, stream.id)
    before = descriptors(collect=True)
    for after in (0, 1, first - 2):
        for look in (store.follow, store.events):
            with pytest.raises(
                persist.EventsNotFound, match=rf"begins at event {first}, .*after={first - 1} or"
            ) as caught:
                look("s-1", stream.id, after=after)
            again = pickle.loads(pickle.dumps(caught.value))
            assert (again.first, str(again)) == (first, str(caught.value))
    assert descriptors() == before
    with store.follow("s-1", stream.id, after=first - 1) as followed:
        assert next(followed) == persist.Event(first, first)
    with pytest.raises(persist.EventsNotFound):
        store.follow("s-1", stream.id, after=301)
    with pytest.raises(persist.EventsNotFound) as missing:
        store.follow("s-1", "another")
    assert missing.value.first is None


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_follower_goes_on_in_the_new_file(
    store: persist.Store, stream: persist.Stream, actor: ActorFactory, is_elsewhere: bool
) -> None:
    """A follower that keeps up sees each event once, however often its file is replaced.

    Fails if a follower stays with the file that it has opened.
    """
    # The follower in the other process never looks at the name, so the mark in the old file has to tell it.
    code = "from persist import follow; follow.LOOK_S = 1000; f = store.follow('s-1', {!r}); f.offset"
    follower = actor() if is_elsewhere else None
    followed = None if follower else store.follow("s-1", stream.id)
    if follower:
        follower.do(code.format(stream.id))
    seen: list[int] = []
    for start in range(1, 400, 40):
        overgrow(stream, start, 40)
        if follower:
            seen += follower.do("[next(f).data for _ in range(40)]")
        elif followed:
            seen += [next(followed).data for _ in range(40)]
    stream.finish()
    assert seen == list(range(1, 401))
    assert first_of(store, stream.id) > 200
    ended = follower.do("list(f), f.ended") if follower else (list(followed or ()), followed and followed.ended)
    assert ended == ([], "finished")


def test_follower_that_is_overtaken_is_told(store: persist.Store, stream: persist.Stream) -> None:
    """A follower that is too slow gets the events of its file, and then the error at each further step.

    Fails if it goes on with the first event that is left, with a gap.
    """
    followed = store.follow("s-1", stream.id)
    stream.emit(1)
    assert next(followed).data == 1
    overgrow(stream, 2)
    first = first_of(store, stream.id)
    stream.finish()
    for _ in range(2):
        with pytest.raises(persist.EventsNotFound) as caught:
            for event in followed:
                assert event.data == event.offset
        assert caught.value.first == first
    assert 1 < followed.offset < first - 1
    followed.close()


def test_overtaken_follower_of_an_event_loop_is_told(store: persist.Store, stream: persist.Stream) -> None:
    """A slow follower in an event loop gets the events of its file, and then the error.

    The loop does not open the new file itself.
    """

    async def follow() -> tuple[int, int | None]:
        followed = persist.aio.Store(store).follow("s-1", stream.id)
        stream.emit(1)
        assert (await anext(followed)).data == 1
        overgrow(stream, 2)
        with pytest.raises(persist.EventsNotFound) as caught:
            while event := await asyncio.wait_for(anext(followed), 20):
                assert event.data == event.offset
        followed.close()
        kept_up = persist.aio.Store(store).follow("s-1", stream.id, after="end")
        async with kept_up:
            assert kept_up.offset == 301
            for start in range(302, 602, 30):
                overgrow(stream, start, 30)
                assert [(await anext(kept_up)).data for _ in range(30)] == list(range(start, start + 30))
        return followed.offset, caught.value.first

    offset, first = asyncio.run(follow())
    assert first is not None
    assert 1 < offset < first - 1


# --- after="end" ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 300])
def test_follow_from_the_end(store: persist.Store, stream: persist.Stream, count: int) -> None:
    """`after="end"` begins after the last event, even if there is none yet, or if the oldest are gone.

    Fails if the follower gets earlier events, too.
    """
    overgrow(stream, count=count)
    with store.follow("s-1", stream.id, after="end") as followed:
        assert followed.offset == count
        assert stream.emit("new") == count + 1
        assert next(followed) == persist.Event(count + 1, "new")
        stream.finish()
        assert (list(followed), followed.ended) == ([], "finished")
    at_the_end = store.follow("s-1", stream.id, after="end")
    assert (at_the_end.offset, list(at_the_end), at_the_end.ended) == (count + 1, [], "finished")


# --- the fence, and the lock ------------------------------------------------------------------------------------------


def test_stream_is_not_ended_while_its_file_is_replaced(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """Another process that takes the session away waits for the new file, and writes its end line there.

    Fails if the file is replaced without the session's lock. Then the end line goes to the old file, and a stream that
    has lost its session emits on.
    """
    owner = actor(keep_events_bytes=BOUND)
    stream_id = owner.do(START)
    owner.start_and_pause("for n in range(1, 301): stream.emit(n)", "replace")
    with pytest.raises(persist.LockTimeout):
        store.cancel("s-1", stream_id, force=True, timeout_s=0.2)
    owner.go()
    owner.result()
    assert store.cancel("s-1", stream_id, force=True)
    with pytest.raises(persist.StreamLost):
        owner.do("stream.emit('late')")
    with store.follow("s-1", stream_id, after="end") as followed:
        assert (list(followed), followed.ended) == ([], "cancelled")


def test_fenced_stream_replaces_nothing(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A stream that lost its session between an emission and the replacement leaves the file alone.

    Fails without the look at the owner under the lock: the end line is dropped with the old file.
    """
    owner = actor(keep_events_bytes=BOUND)
    stream_id = owner.do(START)
    owner.do("stream._drop_oldest_events, real = lambda: None, stream._drop_oldest_events")
    owner.do("for n in range(1, 301): stream.emit(n)")
    store.cancel("s-1", stream_id, force=True)
    before = file_of(store, stream_id).read_bytes()
    owner.do("real()")
    assert file_of(store, stream_id).read_bytes() == before


def test_emission_does_not_wait_for_the_lock(store: persist.Store, stream: persist.Stream, actor: ActorFactory) -> None:
    """The file grows while another process holds the session's lock, and shrinks later.

    Fails if the emission waits for the lock, or if the stream never tries again to shrink the file.
    """
    other = actor()
    stream.emit(0)
    other.do("block = store.transaction('s-1'); block.__enter__(); None")
    started = time.monotonic()
    for number in range(300):
        stream.emit(number)
        assert time.monotonic() - started < 15.0
    assert file_of(store, stream.id).stat().st_size > BOUND
    assert len(store.events("s-1", stream.id)) == 301
    other.do("block.__exit__(None, None, None)")
    for number in range(300):
        stream.emit(number)
    assert file_of(store, stream.id).stat().st_size <= BOUND


# --- crashes, and disks that refuse -----------------------------------------------------------------------------------

KILLED_AFTER = """
import signal
from persist.storage import disk
real = disk.{0}
def killed(*arguments):
    real(*arguments)
    if {1}:
        os.kill(os.getpid(), signal.SIGKILL)
disk.{0} = killed
for n in range(1, 301): stream.emit(n)
"""


@pytest.mark.parametrize(
    ("step", "when"),
    [("write", "b'first' in arguments[1]"), ("replace", "True"), ("write", "b'moved' in arguments[1]")],
    ids=["after the new file", "after the rename", "after the mark"],
)
def test_killed_while_the_oldest_are_dropped(
    store: persist.Store, session: persist.Session, actor: ActorFactory, step: str, when: str
) -> None:
    """A kill during the replacement costs no follower an event, and the kept events can be read.

    The next sweeps leave no file. Fails if the new file gets its name before it is whole.
    """
    owner = actor(keep_events_bytes=BOUND)
    stream_id = owner.do(START)
    owner.do("stream.emit(0)")
    with store.follow("s-1", stream_id) as followed:
        owner.start(KILLED_AFTER.format(step, when))
        owner.process.wait(60)
        seen = [event.data for event in followed]
        assert (seen, followed.ended) == (list(range(len(seen))), "died")
    path = file_of(store, stream_id)
    first = first_of(store, stream_id)
    assert (first > 1) == (step == "replace" or "moved" in when)
    assert [event.data for event in store.events("s-1", stream_id, after=first - 1)] == seen[first - 1 :]
    assert len(seen) > 50
    sweep(persist.Store(store.path, keep_events_s=0))
    for each in path.parent.iterdir():
        os.utime(each, (1, 1))
    sweep(persist.Store(store.path))
    assert list(path.parent.iterdir()) == []


def test_follower_finds_the_new_file_without_the_mark(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A follower looks at the file's name after a silence, and misses nothing if the disk refuses the mark.

    Fails without that look: the follower waits until the stream ends.
    """
    owner, follower = actor(keep_events_bytes=BOUND), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(0)")
    follower.do(f"f = store.follow('s-1', {stream_id!r}); next(f).data")
    code = """
import errno
from persist.storage import disk
real, path = disk.write, stream._events._path
def refused(fd, content):
    if b'moved' in content:
        raise OSError(errno.ENOSPC, 'full')
    real(fd, content)
disk.write, before, n = refused, os.stat(path).st_ino, 0
while os.stat(path).st_ino == before:
    n += 1
    stream.emit(n)
n += 1
stream.emit(n)
"""
    last = owner.do(code) - 1
    assert follower.do(f"[next(f).data for _ in range({last})]") == list(range(1, last + 1))


@contextmanager
def refusing(step: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    refused: list[int] = []
    real = getattr(disk, step)

    def refuse(*arguments: Any) -> Any:
        if step != "write" or b'"first"' in arguments[1]:
            refused.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(disk, step, refuse)
        yield refused


@pytest.mark.parametrize("step", ["write", "replace", "sync"])
def test_disk_that_refuses_to_drop_costs_no_event(
    store: persist.Store, stream: persist.Stream, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A disk that refuses the new file costs no event: the emission counts, and nothing is left behind.

    The disk is full, or the name cannot be replaced. The stream tries again now and then, not with each emission.
    """
    stream.emit(0, durable=True)
    path = file_of(store, stream.id)
    with refusing(step, monkeypatch) as refused:
        for number in range(1, 301):
            assert stream.emit(number) == number + 1
    assert 2 <= len(refused) < 30
    assert list(path.parent.iterdir()) == [path]
    assert [event.data for event in store.events("s-1", stream.id)] == list(range(301))
    for number in range(301, 601):
        assert stream.emit(number) == number + 1
    assert path.stat().st_size <= BOUND
    first = first_of(store, stream.id)
    assert [event.offset for event in store.events("s-1", stream.id, after=first - 1)] == list(range(first, 602))


def test_interrupt_behind_the_rename_loses_no_event(
    store: persist.Store, stream: persist.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt between the rename and the mark leaves the writer in the file that bears the name.

    Fails if the writer changes files only when nothing was raised, because nobody reads the old file.
    """
    real = disk.replace

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            overgrow(stream)
    assert isinstance(stream._events, EventWriter)
    assert stream._events._held is not None
    assert os.fstat(stream._events._held.fd).st_ino == file_of(store, stream.id).stat().st_ino
    number = stream.emit("next")
    assert store.events("s-1", stream.id, after=number - 1) == [persist.Event(number, "next")]


def test_marked_file_that_kept_its_name_is_read_on(store: persist.Store, stream: persist.Stream) -> None:
    """A reader of a file with the mark, which still bears the name, waits for its end and finds it.

    A power cut may keep the mark and lose the rename. Fails if a mark alone makes a reader open the name again: it
    would do so for ever.
    """
    last = overgrow(stream)
    path = file_of(store, stream.id)
    stream._lease.close()
    with path.open("ab") as file:
        file.write(b'{"moved":true}\n')
    with store.follow("s-1", stream.id, after=last - 1) as followed:
        assert next(followed).data == last
        assert followed._cursor.take() == []
        sweep(store)
        assert (list(followed), followed.ended) == ([], "died")
