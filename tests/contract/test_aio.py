"""`persist.aio` on each engine: the same verbs, and cancellation that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from actors import DEADLINE_S, Actor
from conftest import ActorFactory
from harness.contents import reopened
from harness.loops import cancel_again_and_again, in_loop

import persist
import persist.aio
from persist.calls import QUICK_THREADS

KINDS = ("auto", "postgres")
Kill = Callable[[Actor], None]


PROMPT = {"id": "p1", "role": "user", "content": "Why?"}


ANSWER = {"id": "a1", "role": "assistant", "content": "Because."}


@pytest.fixture
def aio(store: persist.Store) -> Iterator[persist.aio.Store]:
    store.create("s-1", {"title": "Async", "messages": []})
    opened = persist.aio.Store(reopened(store))
    yield opened
    opened.close()


def contents(store: persist.Store) -> list[Any]:
    return [message["content"] for message in store.load("s-1").data["messages"]]


@in_loop
async def test_verbs_do_what_their_twins_do(aio: persist.aio.Store, store: persist.Store) -> None:
    """Create, load, change, save, append, update, look, duplicate, delete."""
    session = await aio.create("s-2", {"messages": []})
    session.data["title"] = "mine"
    await aio.append("s-2", "messages", PROMPT)
    assert await session.save() == session.version
    assert (session.revision, session.data) == (3, {"title": "mine", "messages": [PROMPT]})
    assert await aio.update("s-2", lambda tx: tx.data["messages"].pop(), if_version=session.version) == PROMPT
    assert (await aio.head("s-2")).fields["title"] == "mine"
    await (await aio.load("s-2")).refresh()
    await aio.duplicate("s-2", "s-3")
    assert await aio.ids() == ["s-1", "s-2", "s-3"]
    await aio.delete("s-3")
    assert not await aio.exists("s-3")
    assert await aio.check() == []
    assert (await aio.accept("s-2")).revision == 4
    with pytest.raises(persist.SessionNotFound):
        await aio.load("s-3")
    with pytest.raises(persist.InvalidArgument):
        persist.aio.Store(store, timeout_s=1.0)


@in_loop
async def test_turn_from_prompt_to_answer(aio: persist.aio.Store, store: persist.Store) -> None:
    """A stream as a context manager: one owner, checkpoints, and the answer."""
    async with aio.start_stream("s-1", PROMPT) as stream:
        assert (await aio.stream("s-1")).stream_id == stream.id  # type: ignore[union-attr]
        with pytest.raises(persist.SessionBusy):
            await aio.start_stream("s-1")
        assert not await stream.is_cancelled()
        await stream.emit({"token": "Be"}, {"token": "cause."}, durable=True)
        await stream.checkpoint({"id": "a1", "role": "assistant", "content": "Be"})
        await stream.append({"id": "t1", "role": "tool", "content": "x"})
        await aio.cancel("s-1", stream.id)
        assert await stream.is_cancelled()
        await stream.finish(ANSWER)
    assert contents(store) == ["Why?", "x", "Because."]
    assert [event.data["token"] for event in await aio.events("s-1", stream.id)] == ["Be", "cause."]
    assert await aio.streams() == []


@in_loop
async def test_start_is_a_coroutine(aio: persist.aio.Store, store: persist.Store) -> None:
    """`start_stream` returns a coroutine, which `asyncio.create_task` accepts, and it starts one stream."""
    starting = aio.start_stream("s-1", PROMPT)
    assert isinstance(starting, Coroutine)
    starting.close()
    assert store.head("s-1").active_stream_id is None
    stream = await asyncio.create_task(aio.start_stream("s-1", PROMPT))
    assert store.head("s-1").active_stream_id == stream.id
    await stream.finish(ANSWER)


@in_loop
async def test_turn_that_raises_is_marked(aio: persist.aio.Store, store: persist.Store) -> None:
    """B3: leaving the block without `finish` means `fail`. The prompt stays, marked, and the session is free."""
    with pytest.raises(ZeroDivisionError):
        async with aio.start_stream("s-1", PROMPT):
            raise ZeroDivisionError
    assert store.load("s-1").data["messages"] == [{**PROMPT, "interrupted": True}]
    stream = await aio.start_stream("s-1")
    await stream.fail()
    assert await aio.clear_stale_streams() == persist.Sweep([], {})


@in_loop
async def test_stale_stream_is_cleared(aio: persist.aio.Store, actor: ActorFactory, kill: Kill) -> None:
    """A7: the stream of a dead process is stale, and is cleared."""
    owner = actor()
    owner.do("stream = store.start_stream('s-1')")
    session = await aio.load("s-1")
    assert not await session.clear_stale_stream()
    await asyncio.to_thread(kill, owner)
    assert await session.clear_stale_stream()


@in_loop
async def test_many_tasks_on_one_session_lose_nothing(aio: persist.aio.Store, store: persist.Store) -> None:
    """A12: 100 read-modify-writes at once, in one loop, and none is lost."""

    async def visit() -> None:
        await aio.update("s-1", lambda tx: tx.data.update(visits=tx.data.get("visits", 0) + 1))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(100):
            tasks.create_task(visit())
    assert store.load("s-1").data["visits"] == 100


@in_loop
async def test_cancelled_turn_is_marked_also_if_it_is_cancelled_again_and_again(
    aio: persist.aio.Store, store: persist.Store
) -> None:
    """Leaving the stream's block is carried out, even if its task is cancelled in every round of the loop.

    A request that ends is cancelled in that way. Fails if the task leaves while the exit of the block waits: the prompt
    is not marked.
    """
    is_running = asyncio.Event()

    async def turn() -> None:
        async with aio.start_stream("s-1", PROMPT):
            is_running.set()
            await asyncio.sleep(DEADLINE_S)

    task = asyncio.create_task(turn())
    await is_running.wait()
    with store.transaction("s-1"):
        cancelling = asyncio.create_task(cancel_again_and_again(task))
        await asyncio.sleep(0.05)
        assert not task.done()
    await cancelling
    assert store.stream("s-1") is None
    assert store.load("s-1").data["messages"] == [{**PROMPT, "interrupted": True}]


@in_loop
async def test_follower_in_the_loop_sees_every_event_of_another_process(
    aio: persist.aio.Store, actor: ActorFactory
) -> None:
    """A follower gets the events in order, once, without gaps, to the end of the stream."""
    owner = actor()
    stream_id = owner.do("stream = store.start_stream('s-1'); stream.id")
    owner.start("for n in range(2000): stream.emit(n)\nstream.finish()")
    async with aio.follow("s-1", stream_id) as following:
        found = [(event.offset, event.data) async for event in following]
    assert found == [(n + 1, n) for n in range(2000)]
    assert (following.ended, following.offset) == ("finished", 2000)
    await asyncio.to_thread(owner.result)


@in_loop
async def test_follower_that_times_out_again_and_again_loses_nothing(aio: persist.aio.Store) -> None:
    """A step of a follower that is cancelled loses no event, because the next step hands out what it has read.

    The time-out of a heartbeat cancels steps in this way.
    """
    async with aio.start_stream("s-1") as stream, asyncio.TaskGroup() as tasks:

        async def emit() -> None:
            for n in range(200):
                await stream.emit(n)
            await stream.finish()

        tasks.create_task(emit())
        following, found = aio.follow("s-1", stream.id), []
        while following.ended is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    event = await anext(following, None)
                    found += [] if event is None else [event.data]
    assert found == list(range(200))


@in_loop
async def test_follower_whose_steps_are_all_cancelled_opens(
    aio: persist.aio.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a follower takes longer than the time-out of each step. It opens, and a later step has the first event.

    Without `apply` in `Following._opened`, each step opens it anew. An `await` that is cancelled leaves it closed.
    """
    really = aio._sync._cursor

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return really(*arguments)

    monkeypatch.setattr(aio._sync, "_cursor", slow)
    async with aio.start_stream("s-1") as stream:
        await stream.emit(1)
        following, event = aio.follow("s-1", stream.id), None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await following
        assert following._cursor is None
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    event = await anext(following)
                    break
        assert event == persist.Event(1, 1)
        following.close()
        await stream.finish()


@in_loop
async def test_death_of_the_owner_ends_the_loop(aio: persist.aio.Store, actor: ActorFactory, kill: Kill) -> None:
    """The follower gets the events that were emitted, and then ends with "died"."""
    owner = actor()
    stream_id = owner.do("stream = store.start_stream('s-1'); stream.emit('last words', durable=True); stream.id")
    following = aio.follow("s-1", stream_id)
    assert (await anext(following)).data == "last words"
    await asyncio.to_thread(kill, owner)
    with pytest.raises(StopAsyncIteration):
        await anext(following)
    assert following.ended == "died"


@in_loop
async def test_bad_cursor_is_answered_at_the_first_step(aio: persist.aio.Store) -> None:
    """D5: a bad cursor is a clear error, never a hang."""
    async with aio.start_stream("s-1") as stream:
        await stream.emit(1)
        for bad, error in (((stream.id, 7), persist.EventsNotFound), (("none", 0), persist.EventsNotFound)):
            with pytest.raises(error):
                await anext(aio.follow("s-1", bad[0], after=bad[1]))
            with pytest.raises(error):
                await aio.follow("s-1", bad[0], after=bad[1])


def test_follower_of_a_loop_that_has_ended_disturbs_no_emitter(store: persist.Store) -> None:
    """A stream goes on after the loops of its followers have ended."""
    store.create("s-1")
    with store.start_stream("s-1") as stream:
        stream.emit("first")
        aio = persist.aio.Store(store)
        following = aio.follow("s-1", stream.id)

        async def look() -> None:
            await anext(following)

        asyncio.run(look())
        assert stream.emit("second") == 2
        following.close()
        stream.finish()


@in_loop
async def test_streams_end_after_the_store_is_closed(aio: persist.aio.Store, store: persist.Store) -> None:
    """Closing the store lets the running turns go on until they end, and refuses new verbs.

    A server that stops closes its store in this way.
    """
    stream = await aio.start_stream("s-1", PROMPT)
    aio.close()
    with pytest.raises(persist.StoreClosed):
        await aio.load("s-1")
    await stream.emit(1)
    await stream.finish(ANSWER)
    assert contents(store) == ["Why?", "Because."]


@in_loop
async def test_locked_session_holds_up_no_events_of_others(aio: persist.aio.Store, store: persist.Store) -> None:
    """A stream goes on while more verbs than there are quick threads wait for another session.

    Fails if all verbs share the threads.
    """
    await aio.create("s-2", {"messages": []})
    async with aio.start_stream("s-2") as stream, asyncio.TaskGroup() as tasks:
        await stream.emit(0)
        with store.transaction("s-1"):
            for n in range(2 * QUICK_THREADS):
                tasks.create_task(aio.append("s-1", "messages", {"content": str(n)}))
            for n in range(20):
                await stream.emit(n)
            assert len(await aio.events("s-2", stream.id)) == 21
        await stream.finish()
    assert len(contents(store)) == 2 * QUICK_THREADS


@in_loop
async def test_closed_follower_stops(aio: persist.aio.Store) -> None:
    """A follower that is closed ends its loop.

    It may be closed before its first step, between two steps, or by another task while a step waits.
    """
    async with aio.start_stream("s-1") as stream:
        await stream.emit(1, 2)
        unopened, between, waiting_one = (aio.follow("s-1", stream.id, after=after) for after in (0, 0, 2))
        unopened.close()
        assert [event async for event in unopened] == []
        await anext(between)
        between.close()
        assert [event.data async for event in between] == [2]
        async with asyncio.TaskGroup() as tasks:

            async def close() -> None:
                await asyncio.sleep(0.02)
                waiting_one.close()

            tasks.create_task(close())
            assert [event async for event in waiting_one] == []


def test_loops_in_two_threads_share_a_store(store: persist.Store) -> None:
    """A store belongs to no loop: two loops use it at once, each with many tasks, and a third one after them."""
    store.create("s-1", {"n": 0})
    aio = persist.aio.Store(store)

    async def count() -> None:
        await aio.update("s-1", lambda tx: tx.data.update(n=tx.data["n"] + 1))

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(50):
                tasks.create_task(count())

    threads = [threading.Thread(target=lambda: asyncio.run(serve())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    asyncio.run(serve())
    assert store.load("s-1").data["n"] == 150


def test_forked_worker_has_threads_of_its_own(store: persist.Store) -> None:
    """A forked child of a pre-fork server gets threads of its own, because the parent's threads are not in the child.

    Fails (by its alarm) if the threads are shared.
    """
    store.create("s-1", {"messages": []})
    aio = persist.aio.Store(store)

    async def use() -> None:
        await aio.append("s-1", "messages", {"content": "x"})
        await aio.load("s-1")

    asyncio.run(use())
    child = os.fork()
    if child == 0:
        signal.alarm(int(DEADLINE_S))
        asyncio.run(use())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(store) == ["x", "x"]


@in_loop
async def test_large_event_passes(aio: persist.aio.Store) -> None:
    """An event of several megabytes is read in a thread, and in one piece."""
    async with aio.start_stream("s-1") as stream:
        large = "x" * 3_000_000
        await stream.emit("before", large, "after")
        await stream.finish()
    assert [event.data async for event in aio.follow("s-1", stream.id)] == ["before", large, "after"]


@in_loop
async def test_timeout_names_the_holder(aio: persist.aio.Store, actor: ActorFactory, kind: str) -> None:
    """The error names the time-out of the call and the process that holds the session."""
    holder = actor()
    holder.do("block = store.transaction('s-1'); block.__enter__(); None")
    named = r"persist .* \(server process [0-9]+\), since" if kind == "postgres" else f"pid {holder.pid}"
    for timeout_s in (0.0, 0.05):
        with pytest.raises(persist.LockTimeout, match=named) as caught:
            await aio.append("s-1", "messages", {"content": "late"}, timeout_s=timeout_s)
        assert caught.value.timeout_s == timeout_s <= caught.value.waited_s
    await asyncio.to_thread(holder.do, "block.__exit__(None, None, None)")
    assert (await aio.load("s-1")).data["messages"] == []


@in_loop
async def test_cancelled_wait_writes_nothing_later(aio: persist.aio.Store, actor: ActorFactory) -> None:
    """200 calls on a held session are cancelled while they wait, and write nothing once it is free."""
    holder = actor()
    holder.do("block = store.transaction('s-1'); block.__enter__(); None")
    tasks = [asyncio.create_task(aio.append("s-1", "messages", {"content": "late"})) for _ in range(200)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    await asyncio.to_thread(holder.do, "block.__exit__(None, None, None)")
    # A late write would be made before this one.
    await aio.append("s-1", "messages", {"content": "kept"})
    assert [message["content"] for message in (await aio.load("s-1")).data["messages"]] == ["kept"]


@in_loop
async def test_waiting_behind_a_call_of_the_same_loop_counts(aio: persist.aio.Store, store: persist.Store) -> None:
    """The time-out of a call behind a slow `update` begins when the call is made, and the error names the thread.

    Fails if the time-out begins when the call has a thread.
    """
    has_begun, may_end = threading.Event(), threading.Event()

    def slow(_tx: persist.Transaction) -> None:
        has_begun.set()
        assert may_end.wait(DEADLINE_S)

    task = asyncio.create_task(aio.update("s-1", slow))
    assert await asyncio.to_thread(has_begun.wait, DEADLINE_S)
    for timeout_s in (0.0, 0.05):
        with pytest.raises(persist.LockTimeout, match="thread 'persist-session"):
            await aio.append("s-1", "messages", {"content": "late"}, timeout_s=timeout_s)
    may_end.set()
    await task
    assert contents(store) == []


@in_loop
async def test_now_or_never_takes_a_free_session(aio: persist.aio.Store, store: persist.Store) -> None:
    """A time-out of 0 means one try, however long the call waits for a thread.

    Fails if a call times out before it tried to take its session.
    """
    for n in range(100):
        await aio.append("s-1", "messages", {"content": n}, timeout_s=0)
    assert contents(store) == list(range(100))


@in_loop
async def test_cancellation_at_any_moment_leaves_nothing_to_be_written(
    aio: persist.aio.Store, actor: ActorFactory, store: persist.Store
) -> None:
    """A cancelled task finds its item on the disk at once, or the item never comes.

    Fails if a call that has begun lets its task go, or if a call that has not begun is run later.
    """
    other = actor()
    other.start("for n in range(400): store.append('s-1', 'messages', {'content': 'theirs'})")
    returned: set[int] = set()
    found_at_cancellation: dict[int, bool] = {}

    async def write(n: int) -> None:
        try:
            await aio.append("s-1", "messages", {"content": n})
            returned.add(n)
        except asyncio.CancelledError:
            found_at_cancellation[n] = n in contents(store)
            raise

    chance = random.Random(7)
    for start in range(0, 300, 30):
        tasks = [asyncio.create_task(write(n)) for n in range(start, start + 30)]
        for task in chance.sample(tasks, 20):
            await asyncio.sleep(chance.uniform(0, 0.002))
            task.cancel()
        await asyncio.wait(tasks)
    await asyncio.to_thread(other.result)
    assert returned
    assert found_at_cancellation
    written = contents(store)
    assert returned <= set(written)
    assert {n: n in written for n in found_at_cancellation} == found_at_cancellation
    assert len([n for n in written if n != "theirs"]) == len({n for n in written if n != "theirs"})


@in_loop
async def test_save_writes_what_it_found_when_it_was_called(aio: persist.aio.Store, store: persist.Store) -> None:
    """An edit during a save's wait belongs to the next save, because no other thread reads `data`.

    Fails if the save encodes when it has the lock.
    """
    session = await aio.load("s-1")
    session.data["title"] = "first"
    with store.transaction("s-1"):
        task = asyncio.create_task(session.save())
        await asyncio.sleep(0.05)
        session.data["title"] = "second"
        session.data["messages"].append({"content": "later"})
    assert await task == session.version == store.head("s-1").version
    assert store.load("s-1").data == {"messages": [], "title": "first"}
    assert session.data == {"messages": [{"content": "later"}], "title": "second"}
    await session.save()
    assert store.load("s-1").data == session.data


@in_loop
async def test_saves_of_one_object_follow_one_another(aio: persist.aio.Store, store: persist.Store) -> None:
    """Two tasks save one object at once: each edit is stored once, and none contradicts the one before.

    Fails if the second save encodes before the first one is applied: its own earlier edit looks like another writer's.
    """
    session = await aio.load("s-1")
    for n in range(20):
        with store.transaction("s-1"):
            tasks = []
            for edit in range(3):
                session.data["title"] = f"{n}-{edit}"
                session.data["messages"].append({"content": 3 * n + edit})
                tasks += [asyncio.create_task(session.save()), asyncio.create_task(session.refresh())]
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert store.load("s-1").data == session.data
    assert contents(store) == list(range(60))


@in_loop
async def test_waiting_for_a_save_of_the_same_object_counts(aio: persist.aio.Store, store: persist.Store) -> None:
    """The time-out of a save behind another save of its object begins when it is called.

    Fails if the time-out begins with the encoding.
    """
    session = await aio.load("s-1")
    session.data["title"] = "x"
    with store.transaction("s-1"):
        first = asyncio.create_task(session.save())
        await asyncio.sleep(0)
        with pytest.raises(persist.LockTimeout, match="another verb of the same object"):
            await session.save(timeout_s=0.05)
        assert not first.done()
    await first


@in_loop
async def test_save_brings_in_what_others_committed(aio: persist.aio.Store, store: persist.Store) -> None:
    """A save brings the items and changes of other writers into `data`, into the objects that tasks hold.

    An edit that came while the save was written stays in `data`, and the next save stores it. Fails if a change of
    another writer replaces the message that a task holds.
    """
    store.append("s-1", "messages", {"id": "m1", "content": "first"})
    session = await aio.load("s-1")
    messages, first = session.data["messages"], session.data["messages"][0]
    for n in range(10):
        store.append("s-1", "messages", {"id": f"t{n}", "content": "theirs"})
        if n % 2:
            store.update("s-1", lambda tx: tx.data["messages"][0].update(seen=tx.version))
        session.data["title"] = f"title {n}"
        with store.transaction("s-1"):
            task = asyncio.create_task(session.save())
            await asyncio.sleep(0)
            session.data["edited"] = n
        await task
        saved = store.load("s-1").data
        assert session.data == {**saved, "edited": n}
        assert session.data["messages"] is messages
        assert messages[0] is first
        assert saved["title"] == f"title {n}"
        assert [message["id"] for message in messages] == ["m1", *(f"t{k}" for k in range(n + 1))]
    await session.save()
    assert store.load("s-1").data == session.data


def test_object_is_used_in_one_loop_after_the_other(aio: persist.aio.Store, store: persist.Store) -> None:
    """A session that was loaded in one loop is saved in the next one, also by tasks that wait for one another.

    Fails if the object keeps a lock of the first loop.
    """
    session = asyncio.run(aio.load("s-1"))

    async def save_often() -> None:
        await asyncio.gather(*(session.save() for _ in range(5)))

    for n in range(3):
        session.data["n"] = n
        asyncio.run(save_often())
    assert store.load("s-1").data["n"] == 2


@pytest.mark.parametrize("verb", ["save", "clear_stale_stream"])
@in_loop
async def test_an_edit_that_is_no_json_is_for_the_next_save(aio: persist.aio.Store, verb: str) -> None:
    """`data` may change while a verb runs. An edit that is not JSON is refused by the next save, not by this one.

    Fails if the verb says "nothing was written" of what it has committed.
    """
    session, other = await aio.load("s-1"), await aio.load("s-1")
    if verb == "clear_stale_stream":
        stream = await aio.start_stream("s-1", {"role": "user", "content": "?"})
        stream._sync._close()
        session = await aio.load("s-1")
    other.data["theirs"] = 1
    await other.refresh()
    await other.save()
    session.data["mine"] = 1
    call = asyncio.create_task(getattr(session, verb)())
    await asyncio.sleep(0)
    session.data["when"] = {1}
    await call
    assert session.active_stream_id is None
    with pytest.raises(persist.NotJSON):
        await session.save()
    del session.data["when"]
    await session.save()
    there = (await aio.load("s-1")).data
    assert (there["mine"], there["theirs"]) == (1, 1)
    assert session.data == there
