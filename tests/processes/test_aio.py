"""`persist.aio`: the same verbs, an event loop that never blocks, and cancellation that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from actors import DEADLINE_S
from conftest import ActorFactory
from harness.loops import cancel_again_and_again, in_loop

import persist
import persist.aio
from persist.calls import Call
from persist.storage import disk

PROMPT = {"id": "p1", "role": "user", "content": "Why?"}
ANSWER = {"id": "a1", "role": "assistant", "content": "Because."}


@pytest.fixture
def aio(store: persist.Store) -> Iterator[persist.aio.Store]:
    store.create("s-1", {"title": "Async", "messages": []})
    opened = persist.aio.Store(persist.Store(store.path, timeout_s=20.0))
    yield opened
    opened.close()


class Gate:
    """A gate that blocks one step of the disk until it is opened.

    `reached` is set when a caller waits at the gate.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.reached, self.is_open = threading.Event(), threading.Event()
        real = getattr(disk, step)

        def held_up(*arguments: Any) -> Any:
            self.reached.set()
            assert self.is_open.wait(DEADLINE_S)
            return real(*arguments)

        monkeypatch.setattr(disk, step, held_up)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, DEADLINE_S)


def contents(store: persist.Store) -> list[str]:
    return [message["content"] for message in store.load("s-1").data["messages"]]


# --- the verbs --------------------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Return the parameters of a method, without `self`."""
    _, *found = inspect.signature(function).parameters.values()
    return [(each.name, each.kind, each.default) for each in found]


@pytest.mark.parametrize("kind", ["Store", "Session", "Stream"])
def test_every_verb_is_there_with_the_same_arguments(kind: str) -> None:
    """The asyncio classes have the same nouns and verbs, with the same arguments.

    Only `transaction` is missing, because nothing may be awaited under a lock.
    """
    plain, mirror = getattr(persist, kind), getattr(persist.aio, kind)
    for name, member in vars(plain).items():
        if name.startswith("_") or name == "transaction":
            continue
        assert hasattr(mirror, name), name
        if inspect.isfunction(member):
            assert parameters(member) == parameters(getattr(mirror, name)), name


@in_loop
async def test_large_sessions_cost_what_changes(aio: persist.aio.Store) -> None:
    """`update` and `compact` do what their twins do. A verb of a large session appends to its journal."""
    await aio.create("s-2", {"title": "Async", "messages": ["x" * 70_000]})
    document = (aio.path / "s-2.json").read_bytes()
    assert await aio.update("s-2", lambda tx: tx.data.update(title="Large") or tx.data["title"]) == "Large"
    await aio.append("s-2", "messages", PROMPT)
    assert (aio.path / "s-2.json").read_bytes() == document
    assert (await aio.head("s-2")).fields == {"title": "Large"}
    assert await aio.compact("s-2") is True
    assert await aio.compact("s-2") is False
    assert (aio.path / "s-2.json").read_bytes() != document
    assert (await aio.load("s-2")).data == {"title": "Large", "messages": ["x" * 70_000, PROMPT]}


@in_loop
async def test_stale_stream_is_cleared(aio: persist.aio.Store, actor: ActorFactory) -> None:
    """A7: the stream of a dead process is stale, and is cleared."""
    owner = actor()
    owner.do("stream = store.start_stream('s-1')")
    session = await aio.load("s-1")
    assert not await session.clear_stale_stream()
    owner.kill()
    assert await session.clear_stale_stream()


# --- the loop ---------------------------------------------------------------------------------------------------------


@in_loop
async def test_loop_runs_on_while_a_verb_waits(aio: persist.aio.Store, actor: ActorFactory) -> None:
    """A lock that another process holds blocks the task that needs it, and no other task.

    Fails if the verb runs in the loop itself, because then nothing happens until the lock is free.
    """
    other = actor()
    other.start_and_pause("store.append('s-1', 'messages', {'content': 'theirs'})", "replace")
    ticks = 0
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(aio.append("s-1", "messages", {"content": "mine"}))
        for _ in range(50):
            await asyncio.sleep(0.002)
            ticks += 1
        assert other.process.poll() is None
        other.go()
    await asyncio.to_thread(other.result)
    assert ticks == 50
    assert [message["content"] for message in (await aio.load("s-1")).data["messages"]] == ["theirs", "mine"]


# --- cancellation -----------------------------------------------------------------------------------------------------


@in_loop
async def test_write_survives_the_cancellation_of_its_task(
    aio: persist.aio.Store, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verb that has begun runs to its end. Only then is its task cancelled.

    Fails if the task does not wait for its thread.
    """
    gate = Gate(monkeypatch, "replace")
    task = asyncio.create_task(aio.append("s-1", "messages", {"content": "kept"}))
    await gate.wait()
    task.cancel()
    # The loop makes some rounds before the disk step may go on.
    await asyncio.sleep(0.05)
    assert not task.done(), "cancelled while its thread was still writing"
    gate.is_open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert contents(store) == ["kept"]


@in_loop
async def test_cancelled_start_fails_the_stream_that_it_obtained(
    aio: persist.aio.Store, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A8: a stream whose start is cancelled does not own the session. The prompt stays, marked.

    Fails without the undo: the session is busy until the stream is collected, and no caller knows of the stream.
    """
    gate = Gate(monkeypatch, "replace")
    task = asyncio.create_task(aio.start_stream("s-1", PROMPT))
    await gate.wait()
    task.cancel()
    gate.is_open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.stream("s-1") is None
    assert store.load("s-1").data["messages"] == [{**PROMPT, "interrupted": True}]
    assert list((store.path / ".leases").iterdir()) == []


@in_loop
async def test_cancellation_again_and_again_waits_for_the_write(
    aio: persist.aio.Store, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that has begun runs to its end, however often its task is cancelled.

    Fails if a call that has begun lets its task go.
    """
    gate = Gate(monkeypatch, "replace")
    task = asyncio.create_task(aio.append("s-1", "messages", {"content": "kept"}))
    await gate.wait()
    cancelling = asyncio.create_task(cancel_again_and_again(task))
    await asyncio.sleep(0.05)
    assert not task.done()
    gate.is_open.set()
    await cancelling
    assert task.cancelled()
    assert contents(store) == ["kept"]


@in_loop
async def test_failure_of_a_cancelled_write_is_not_lost(
    aio: persist.aio.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled caller gets the cancellation, with the error of the verb as its cause."""
    gate = Gate(monkeypatch, "version_of")
    task = asyncio.create_task(aio.append("missing", "messages", {"content": "kept"}))
    await gate.wait()
    task.cancel()
    gate.is_open.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, persist.SessionNotFound)


def test_end_of_the_loop_waits_for_a_write(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of a stream that `asyncio.run` cancels at its end fails the stream, and its write is kept."""
    store.create("s-1", {"messages": []})
    gate = Gate(monkeypatch, "replace")

    async def serve() -> None:
        aio = persist.aio.Store(store)

        async def start() -> None:
            await aio.start_stream("s-1", PROMPT)

        task = asyncio.create_task(start())
        await gate.wait()
        threading.Timer(0.05, gate.is_open.set).start()
        assert not task.done()

    asyncio.run(serve())
    assert store.stream("s-1") is None
    assert store.load("s-1").data["messages"] == [{**PROMPT, "interrupted": True}]


@types.coroutine
def cancelled_at(step: int, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, bool]:
    """Drive a coroutine, cancel it at its n-th suspension, and tell whether it got that far."""
    try:
        waited_for = work.send(None)
        while True:
            step -= 1
            if step == 0:
                waited_for = work.throw(asyncio.CancelledError())
            else:
                try:
                    value = yield waited_for
                except BaseException as error:
                    waited_for = work.throw(error)
                else:
                    waited_for = work.send(value)
    except (StopIteration, asyncio.CancelledError):
        return step <= 0


@in_loop
async def test_cancellation_at_every_await_loses_nothing_and_leaks_no_lease(scratch: Path) -> None:
    """A turn loses nothing and leaks no lease if it is cancelled at its n-th suspension, for every n.

    The turn has events, a follower, checkpoints and an answer.
    """
    step = 0
    came_so_far = True
    while came_so_far:
        step += 1
        store = persist.Store(scratch / f"{step}")
        store.create("s-1", {"messages": []})
        aio = persist.aio.Store(store)
        acknowledged: list[str] = []

        async def turn(aio: persist.aio.Store = aio, acknowledged: list[str] = acknowledged) -> None:
            async with aio.start_stream("s-1", PROMPT) as stream:
                acknowledged.append("p1")
                await stream.emit({"token": "Be"})
                await stream.checkpoint({"id": "a1", "role": "assistant", "content": "Be"})
                acknowledged.append("a1")
                await aio.append("s-1", "messages", {"id": "m1", "content": "beside"})
                acknowledged.append("m1")
                async for _ in aio.follow("s-1", stream.id):
                    await stream.finish(ANSWER)

        came_so_far = await cancelled_at(step, turn())
        found = [message["id"] for message in store.load("s-1").data["messages"]]
        assert set(acknowledged) <= set(found), f"at {step}"
        assert len(found) == len(set(found)), f"at {step}"
        assert store.stream("s-1") is None, f"at {step}"
        assert list((store.path / ".leases").iterdir()) == [], f"at {step}"
        aio.close()
    assert step > 7


# --- following --------------------------------------------------------------------------------------------------------


@in_loop
async def test_death_of_the_owner_ends_the_loop(aio: persist.aio.Store, actor: ActorFactory) -> None:
    """The follower gets the events that were emitted, and then ends with "died"."""
    owner = actor()
    stream_id = owner.do("stream = store.start_stream('s-1'); stream.emit('last words'); stream.id")
    following = aio.follow("s-1", stream_id)
    assert (await anext(following)).data == "last words"
    owner.kill()
    with pytest.raises(StopAsyncIteration):
        await anext(following)
    assert following.ended == "died"


@in_loop
async def test_dropped_follower_leaves_no_descriptor(aio: persist.aio.Store) -> None:
    """A caller that leaves the `async for` early need not close the follower."""
    if sys.platform != "linux":
        pytest.skip("descriptors are counted on Linux only")
    async with aio.start_stream("s-1") as stream:
        await stream.emit(*range(10))
        # Followers that earlier tests have dropped must not be counted.
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            async for _event in aio.follow("s-1", stream.id):
                break
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before


# --- threads, forks and loops -----------------------------------------------------------------------------------------


@in_loop
async def test_cancellation_comes_through_when_the_undo_fails(
    aio: persist.aio.Store, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller gets the cancellation also when the undo fails, because another thread holds the session.

    The stream is then stale, not alive.
    """
    gate = Gate(monkeypatch, "replace")
    impatient = persist.aio.Store(persist.Store(store.path, timeout_s=0.01))
    caught: list[BaseException] = []

    async def start() -> None:
        try:
            await impatient.start_stream("s-1", PROMPT)
        except BaseException as error:
            caught.append(error)
            raise

    real = persist.Stream.__exit__

    def refused(self: persist.Stream, *error: Any) -> None:
        with store.transaction("s-1"):
            thread = threading.Thread(target=lambda: _suppressed(lambda: real(self, *error)))
            thread.start()
            thread.join(DEADLINE_S)
        raise persist.StoreClosed(path=store.path)

    monkeypatch.setattr(persist.Stream, "__exit__", refused)
    task = asyncio.create_task(start())
    await gate.wait()
    task.cancel()
    gate.is_open.set()
    await asyncio.wait([task])
    assert isinstance(caught[0], asyncio.CancelledError)
    info = store.stream("s-1")
    assert info is None or not info.is_live


def _suppressed(call: Callable[[], object]) -> None:
    with contextlib.suppress(persist.PersistError):
        call()


@in_loop
async def test_the_thread_of_a_call_keeps_no_result(aio: persist.aio.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a verb is the caller's alone. It goes when the caller drops it, and not in a thread later.

    The thread of the verb has told its task of the result, and is held up there. Fails if the call remembers it.
    """
    is_open, real = threading.Event(), Call.end

    def held_up(call: Call) -> None:
        real(call)
        assert is_open.wait(DEADLINE_S)

    monkeypatch.setattr(Call, "end", held_up)
    try:
        found = await aio.load("s-1")
        kept = ref(found._sync)
        del found
        gc.collect()
        assert kept() is None
    finally:
        is_open.set()
