"""Waiting in `persist.aio`: one thread a session, time-outs in time, no write for a task that has left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from actors import DEADLINE_S, Actor
from conftest import ActorFactory
from harness.loops import in_loop, lag_of

import persist
import persist.aio
from persist.storage import lock
from persist.storage.content import encoded

#: A busy machine may spoil a measurement, so one good round of these is enough.
ROUNDS = 5


@pytest.fixture
def aio(store: persist.Store) -> Iterator[persist.aio.Store]:
    for session_id in ("s-1", "s-2"):
        store.create(session_id, {"messages": []})
    opened = persist.aio.Store(persist.Store(store.path, timeout_s=20.0))
    yield opened
    opened.close()


@pytest.fixture
def holder(aio: persist.aio.Store, actor: ActorFactory) -> Actor:
    """Return a process that is stopped while it holds the session s-1, like a paused container."""
    holder = actor()
    holder.do("block = store.transaction('s-1'); block.__enter__(); None")
    os.kill(holder.pid, signal.SIGSTOP)
    return holder


def let_go(holder: Actor) -> None:
    os.kill(holder.pid, signal.SIGCONT)
    holder.do("block.__exit__(None, None, None)")


def contents(store: persist.Store, session_id: str = "s-1") -> list[Any]:
    return [message["content"] for message in store.load(session_id).data["messages"]]


def session_threads() -> int:
    return sum(thread.name.startswith("persist-session") for thread in threading.enumerate())


async def seconds_of(work: Awaitable[Any]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def append(aio: persist.aio.Store, session_id: str = "s-2") -> None:
    await aio.append(session_id, "messages", {"content": "x"})


async def appends_beside(aio: persist.aio.Store, work: Coroutine[Any, Any, Any]) -> tuple[float, float]:
    """Append to s-2 while some work goes on.

    Return the limit in seconds, and the longest that 99 of 100 appends took. The limit is 10 times the median of idle
    appends, or at least 20 ms.
    """
    limit_s = max(0.02, 10 * median([await seconds_of(append(aio)) for _ in range(100)]))
    task, beside = asyncio.create_task(work), []
    while not task.done():
        beside.append(await seconds_of(append(aio)))
    await task
    return limit_s, sorted(beside)[len(beside) * 99 // 100]


# --- others go on -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("holder")
@in_loop
async def test_hundreds_that_wait_for_one_session_hold_up_no_other(aio: persist.aio.Store) -> None:
    """600 tasks wait for a session that a stopped process holds, and another session's appends stay quick.

    The tasks take one thread, and each gets its time-out in time. Fails if each call waits in a thread of its own: all
    threads are taken, and the other session waits until the first time-out.
    """

    async def wait() -> float:
        start = time.perf_counter()
        with pytest.raises(persist.LockTimeout):
            await aio.append("s-1", "messages", {"content": "late"}, timeout_s=1.0)
        return time.perf_counter() - start

    for _ in range(ROUNDS):
        waits: list[float] = []

        async def wait_all(waits: list[float] = waits) -> None:
            waits += await asyncio.gather(*(wait() for _ in range(600)))

        before = session_threads()
        limit_s, beside_s = await appends_beside(aio, wait_all())
        assert session_threads() - before <= 2
        assert min(waits) >= 1.0
        if beside_s <= limit_s and max(waits) <= 1.3:
            return
    pytest.fail(f"an append took {beside_s:.3f} s beside them, and a time-out {max(waits):.3f} s")


@in_loop
async def test_burst_on_one_session_holds_up_no_other(scratch: Path) -> None:
    """3,000 appends to one session at once leave another session's appends quick, and all arrive in their order.

    Fails if each call waits in a thread of its own: 128 threads fight for one session, and the other calls wait behind
    them.
    """
    aio = persist.aio.Store(scratch, timeout_s=DEADLINE_S)
    for session_id in ("s-1", "s-2"):
        await aio.create(session_id, {"messages": []})
    for n in range(1, ROUNDS + 1):

        async def burst() -> None:
            await asyncio.gather(*(aio.append("s-1", "messages", {"content": k}) for k in range(3000)))

        limit_s, beside_s = await appends_beside(aio, burst())
        assert contents(aio._sync) == [*range(3000)] * n
        if beside_s <= limit_s:
            return
    pytest.fail(f"an append took {beside_s:.3f} s beside them")


# --- time-outs --------------------------------------------------------------------------------------------------------


@in_loop
async def test_timeout_names_the_holder(aio: persist.aio.Store, holder: Actor) -> None:
    """The error names what that of the plain verb names: the time-out of the call, the file and the process."""
    for timeout_s in (0.0, 0.05):
        with pytest.raises(persist.LockTimeout, match=f"pid {holder.pid}") as caught:
            await aio.append("s-1", "messages", {"content": "late"}, timeout_s=timeout_s)
        assert caught.value.timeout_s == timeout_s <= caught.value.waited_s
        assert caught.value.path == aio.path / "s-1.json.lock"


@in_loop
async def test_long_wait_outlives_a_short_one(
    aio: persist.aio.Store, holder: Actor, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of a session waits as long as any of its calls, whichever came first, and keeps its turn.

    Fails if the thread waits only as long as the first call, because it then waits anew for each of the others.
    """
    waits: list[float] = []
    real = lock.Hold._wait_for_processes

    def counted(self: lock.Hold, start: float) -> None:
        waits.append(start)
        real(self, start)

    monkeypatch.setattr(lock.Hold, "_wait_for_processes", counted)
    tasks = [
        asyncio.create_task(aio.append("s-1", "messages", {"content": timeout_s}, timeout_s=timeout_s))
        for timeout_s in (0.05, DEADLINE_S, 0.1)
    ]
    await asyncio.wait([tasks[0], tasks[2]])
    assert not tasks[1].done()
    await asyncio.to_thread(let_go, holder)
    await tasks[1]
    assert contents(store) == [DEADLINE_S]
    assert len(waits) == 1


# --- cancellation -----------------------------------------------------------------------------------------------------


@in_loop
async def test_cancelled_wait_ends_at_once_and_writes_nothing_later(
    aio: persist.aio.Store, holder: Actor, store: persist.Store
) -> None:
    """200 calls of `wait_for(append, 0.5)` on a held session end by 0.6 s, and write nothing once it is free.

    Fails if a task that waits for its session is kept until its time-out.
    """

    async def wait() -> float:
        start = time.perf_counter()
        with pytest.raises(TimeoutError) as caught:
            await asyncio.wait_for(aio.append("s-1", "messages", {"content": "late"}), 0.5)
        assert not isinstance(caught.value, persist.LockTimeout)
        return time.perf_counter() - start

    for _ in range(ROUNDS):
        waits = await asyncio.gather(*(wait() for _ in range(200)))
        if max(waits) <= 0.6:
            break
    assert max(waits) <= 0.6
    await asyncio.to_thread(let_go, holder)
    # A late write would be made before this one.
    await aio.append("s-1", "messages", {"content": "kept"})
    assert contents(store) == ["kept"]


@in_loop
async def test_thread_whose_tasks_have_all_left_stops_waiting(
    aio: persist.aio.Store, holder: Actor, store: persist.Store
) -> None:
    """A wait that no task needs any more ends soon, even behind another thread, and does not delay the process.

    Fails if the thread waits for the time-out of calls that have left.
    """
    with ThreadPoolExecutor(1) as thread:
        # This thread waits first in this process, and the loop's thread waits behind it.
        waiting = thread.submit(lambda: store.append("s-1", "messages", {"content": "first"}))
        await asyncio.sleep(0.05)
        task = asyncio.create_task(aio.append("s-1", "messages", {"content": "late"}, timeout_s=DEADLINE_S))
        await asyncio.sleep(0.05)
        task.cancel()
        start = time.perf_counter()
        while aio._threads._pools._queues:
            await asyncio.sleep(0.01)
            assert time.perf_counter() - start < DEADLINE_S / 2
        await asyncio.to_thread(let_go, holder)
        await asyncio.wrap_future(waiting)
    assert contents(store) == ["first"]


@in_loop
async def test_block_of_a_stream_is_left_also_where_its_session_is_held(
    store: persist.Store, actor: ActorFactory
) -> None:
    """A5: the lease is given up whatever happens, so that the session is not stuck.

    The caller gets the error of the block, with a note on the failure. Fails if an exit that does not get the lock in
    time forgets the lease.
    """
    store.create("s-1", {"messages": []})
    aio, other = persist.aio.Store(persist.Store(store.path, timeout_s=0.1)), actor()
    with pytest.raises(ZeroDivisionError) as caught:
        async with aio.start_stream("s-1"):
            await asyncio.to_thread(other.do, "block = store.transaction('s-1'); block.__enter__(); None")
            raise ZeroDivisionError
    assert "could not be marked as interrupted" in caught.value.__notes__[0]
    await asyncio.to_thread(other.do, "block.__exit__(None, None, None)")
    info = store.stream("s-1")
    assert info is not None
    assert not info.is_live


@in_loop
async def test_call_that_gets_no_thread_is_refused_and_never_made(
    aio: persist.aio.Store, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that may start no more threads raises an error, and does not make the refused call later.

    Fails if the queue stays behind: the next call waits for a thread that never comes.
    """

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            await aio.append("s-1", "messages", {"content": "refused"})
        with pytest.raises(RuntimeError, match="new thread"):
            await aio.exists("s-1")
    await aio.append("s-1", "messages", {"content": "kept"})
    assert await aio.exists("s-1")
    assert contents(store) == ["kept"]


# --- saving -----------------------------------------------------------------------------------------------------------


@in_loop
async def test_save_whose_task_is_cancelled_is_taken(
    aio: persist.aio.Store, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that has begun runs to its end, and the object knows what was committed.

    Fails if a cancelled save is not applied: the next one cannot tell its own commit from another writer's.
    """
    session = await aio.load("s-1")
    session.data["messages"].append({"content": "once"})
    has_begun, may_end = threading.Event(), threading.Event()
    real = persist.Session._write

    def held_up(self: persist.Session, *arguments: Any) -> Any:
        has_begun.set()
        assert may_end.wait(DEADLINE_S)
        return real(self, *arguments)

    monkeypatch.setattr(persist.Session, "_write", held_up)
    task = asyncio.create_task(session.save())
    assert await asyncio.to_thread(has_begun.wait, DEADLINE_S)
    task.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.version == store.head("s-1").version
    await session.save()
    assert contents(store) == ["once"]
    assert session._sync._base.tried is None


@in_loop
async def test_save_of_megabytes_holds_the_loop_up_while_it_encodes(aio: persist.aio.Store) -> None:
    """A save blocks the loop for as long as encoding takes, and at most 10 ms more.

    Fails if the commit is made in the loop's thread.
    """
    session = await aio.create("s-3", {"messages": [{"id": n, "content": "lorem ipsum " * 40} for n in range(7500)]})
    for n in range(2 * ROUNDS):
        session.data["messages"][n]["content"] = "changed"
        start = time.perf_counter()
        encoded(session.data, session._sync._base.content)
        encoding_s = time.perf_counter() - start
        lag_s = await lag_of(session.save())
        if lag_s <= encoding_s + 0.01:
            return
    pytest.fail(f"the loop stood still for {lag_s:.3f} s, and encoding takes {encoding_s:.3f} s")


# --- loops ------------------------------------------------------------------------------------------------------------


async def use(aio: persist.aio.Store, session_id: str) -> None:
    """Run verbs of each kind: reads, writes, a stream and its follower, cancellation, a time-out."""
    session = await aio.create(session_id, {"messages": []})
    await asyncio.gather(*(append(aio, session_id) for _ in range(50)))
    session.data["title"] = "saved"
    await session.save()
    assert await aio.update(session_id, lambda tx: len(tx.list("messages"))) == 50
    task = asyncio.create_task(append(aio, session_id))
    task.cancel()
    await asyncio.wait([task])
    async with aio.start_stream(session_id, {"role": "user", "content": "Why?"}) as stream:
        await stream.emit("a", "b")
        following = aio.follow(session_id, stream.id)
        assert [(await anext(following)).data for _ in range(2)] == ["a", "b"]
        await stream.finish({"role": "assistant", "content": "Because."})
        assert [event async for event in following] == []
    with aio._sync.transaction(session_id), pytest.raises(persist.LockTimeout):
        await aio.append(session_id, "messages", {}, timeout_s=0.01)
    assert (await aio.head(session_id)).counts["messages"] == 52


def test_verbs_run_under_uvloop(aio: persist.aio.Store) -> None:
    """uvloop is another loop with the same promises. The test is skipped where it has no wheel (Windows)."""
    uvloop = pytest.importorskip("uvloop")
    runner: Callable[[Coroutine[Any, Any, None]], None] = uvloop.run
    for n in range(3):
        runner(use(aio, f"u-{n}"))


def test_loops_of_several_threads_and_one_after_the_other_share_a_store(aio: persist.aio.Store) -> None:
    """A store belongs to no loop: four threads call `asyncio.run` again and again, on own and shared sessions.

    Fails if one loop uses what an earlier loop left behind.
    """

    def run(thread: int) -> None:
        for n in range(5):
            asyncio.run(use(aio, f"t-{thread}-{n}"))
            asyncio.run(append(aio))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    assert contents(aio._sync) == []
    assert len(contents(aio._sync, "s-2")) == 20


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_of_a_waiting_process_has_queues_of_its_own(
    aio: persist.aio.Store, holder: Actor, store: persist.Store
) -> None:
    """A child that is forked while calls of its parent wait runs its own calls, and none of its parent's.

    Fails if the child puts its calls into a queue whose thread it does not have.
    """
    is_waiting = threading.Event()

    async def wait() -> None:
        task = asyncio.create_task(append(aio, "s-1"))
        await asyncio.sleep(0.05)
        is_waiting.set()
        await task

    with ThreadPoolExecutor(1) as thread:
        parent = thread.submit(asyncio.run, wait())
        assert is_waiting.wait(DEADLINE_S)
        child = os.fork()
        if child == 0:
            signal.alarm(int(DEADLINE_S))
            with contextlib.suppress(BaseException):
                asyncio.run(append(aio))
                asyncio.run(append(aio, "s-1"))
                os._exit(0)
            os._exit(1)
        let_go(holder)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        parent.result(DEADLINE_S)
    assert contents(store, "s-2") == ["x"]
    assert contents(store) == ["x", "x"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@in_loop
async def test_child_that_a_function_of_update_forks_runs_no_call_of_its_parent(
    aio: persist.aio.Store, store: persist.Store
) -> None:
    """The thread of a function that forks goes on in the child, where it makes none of the parent's waiting calls.

    Fails if the child serves its copy of the queue: each call is made twice.
    """
    children: list[int] = []

    def fork(_tx: persist.Transaction) -> None:
        child = os.fork()
        if child:
            children.append(child)
        else:
            # The alarm ends the child, wherever it is then.
            signal.alarm(1)

    update = asyncio.create_task(aio.update("s-1", fork))
    behind = [asyncio.create_task(append(aio, "s-1")) for _ in range(10)]
    await asyncio.gather(update, *behind)
    await asyncio.to_thread(os.waitpid, children[0], 0)
    assert contents(store) == ["x"] * 10


# --- what eyes from outside have found --------------------------------------------------------------------------------


@in_loop
async def test_a_stream_that_is_left_in_vain_is_given_up_also_by_a_cancellation(
    aio: persist.aio.Store, actor: ActorFactory
) -> None:
    """A cancellation while the stream's exit waits for a held session does not leave the session stuck.

    Fails if the exit gives up the lease only after an error, and not after a cancellation.
    """
    quick = persist.aio.Store(persist.Store(aio._sync.path, timeout_s=0.3))
    holder = actor()

    async def turn() -> None:
        async with quick.start_stream("s-1", {"role": "user", "content": "?"}) as stream:
            kept.append(stream)
            is_running.set()
            holder.do("block = store.transaction('s-1'); block.__enter__(); None")
            raise ValueError("the model refused")

    kept: list[persist.aio.Stream] = []
    is_running = asyncio.Event()
    task = asyncio.create_task(turn())
    await is_running.wait()
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, ValueError)):
        await task
    holder.do("block.__exit__(None, None, None)")
    info = await aio.stream("s-1")
    assert info is not None
    assert not info.is_live


def test_an_interrupt_leaves_no_session_without_its_thread(
    aio: persist.aio.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt between the queue and its thread cancels that call for good, and the next call is made.

    Fails if the queue stays there, and every later call of its session waits in vain.
    """
    for is_quick in (False, True):
        with monkeypatch.context() as patched:

            def interrupted(*_: Any) -> None:
                raise KeyboardInterrupt

            patched.setattr(ThreadPoolExecutor, "submit", interrupted)
            work = aio.head("s-1") if is_quick else aio.append("s-1", "messages", {"content": "interrupted"})
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(work)
        asyncio.run(aio.append("s-1", "messages", {"content": "next"}, timeout_s=2.0))
        assert asyncio.run(aio.head("s-1")).counts["messages"] == len(contents(aio._sync))
    assert contents(aio._sync) == ["next", "next"]


def test_a_save_that_another_loop_left_behind_counts_once(aio: persist.aio.Store) -> None:
    """A loop that stops in mid-save leaves the save under way, and the object's next save builds on it.

    Fails if the second save merges with what the object knew before the first one.
    """
    store = persist.aio.Store(persist.Store(aio._sync.path, merge={"tokens": "sum"}))
    asyncio.run(store.create("s-3", {"tokens": 0}))
    one, two = asyncio.new_event_loop(), asyncio.new_event_loop()
    session = one.run_until_complete(store.load("s-3"))
    session.data["tokens"] = 5
    with aio._sync.transaction("s-3"):
        left = one.create_task(session.save())
        one.call_later(0.05, one.stop)
        one.run_forever()
        further = two.create_task(session.save())
        two.run_until_complete(asyncio.sleep(0.05))
    two.run_until_complete(further)
    assert store._sync.load("s-3").data["tokens"] == 5
    one.run_until_complete(left)
    one.close()
    two.close()


def set_title(title: str, tx: persist.Transaction) -> None:
    tx.fields["title"] = title


@in_loop
async def test_a_cancelled_refresh_that_conflicts_is_cancelled(aio: persist.aio.Store) -> None:
    """The caller gets the cancellation, with the conflict as its cause. Fails if the conflict takes its place."""
    session = await aio.load("s-1")
    async with asyncio.timeout(DEADLINE_S):
        for number in range(20):
            await aio.update("s-1", partial(set_title, f"theirs {number}"))
            session.data["title"] = "mine"
            task = asyncio.create_task(session.refresh())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
