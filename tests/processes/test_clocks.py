"""Time-outs and silences under freezegun and time-machine pass in real time (HAZARDS F16).

The frozen process is an actor, so pytest's own clock goes on.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager

import freezegun
import pytest
import time_machine
from conftest import ActorFactory
from harness.turns import START

import persist
from persist.pytest_plugin.run import Wait

#: These tools stop or move the clocks of an actor.
TOOLS = {
    "freezegun": "freezegun.freeze_time('2001-01-01', real_asyncio=True)",
    "freezegun in the future": "freezegun.freeze_time('2101-01-01', real_asyncio=True)",
    "freezegun in leaps": "freezegun.freeze_time('2001-01-01', real_asyncio=True, auto_tick_seconds=3600)",
    "time-machine": "time_machine.travel('2001-01-01', tick=False)",
    "time-machine in the future": "time_machine.travel('2101-01-01', tick=False)",
}
tools = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"messages": []})


def under(tool: str, code: str) -> str:
    """Return code that an actor runs while its clocks are frozen.

    The last line of the given code is an expression. The actor returns its value.
    """
    *lines, result = code.strip().splitlines()
    body = "\n".join(f"    {line}" for line in lines)
    return f"import freezegun, time, time_machine\nwith {tool}:\n{body}\n{result}"


@tools
def test_lock_timeout_comes_in_real_time(
    store: persist.Store, session: persist.Session, actor: ActorFactory, tool: str
) -> None:
    """The time-out of a session that another process holds comes after its time, and not before.

    Fails with `time.monotonic` in `lock`: under freezegun it never comes, and in leaps it comes at once.
    """
    code = """
start, error = time.clock_gettime(time.CLOCK_MONOTONIC), None
try:
    store.append('s-1', 'messages', {'content': 'x'}, timeout_s=0.3)
except persist.LockTimeout as raised:
    error = raised
took_s = time.clock_gettime(time.CLOCK_MONOTONIC) - start
error and error.waited_s, took_s
"""
    waiter = actor()
    with store.transaction("s-1"):
        waited_s, took_s = waiter.do(under(tool, code))
    assert 0.3 <= waited_s <= took_s


@tools
def test_follower_notices_a_dead_owner(
    store: persist.Store, session: persist.Session, actor: ActorFactory, tool: str
) -> None:
    """A follower gets the events, notices the owner's death, and ends.

    Fails with `time.monotonic` in `follow`: under freezegun no silence is ever long enough.
    """
    owner, follower = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1)")
    code = f"""
followed = store.follow('s-1', {stream_id!r})
seen = [event.data for event in followed]
seen, followed.ended
"""
    follower.start(under(tool, code))
    owner.do("stream.emit(2)")
    owner.kill()
    assert follower.result() == ([1, 2], "died")


@tools
def test_asyncio_follower_notices_a_dead_owner(
    store: persist.Store, session: persist.Session, actor: ActorFactory, tool: str
) -> None:
    """A follower in an event loop gets the events, notices the owner's death, and ends.

    The loop has a clock of its own, which freezegun leaves alone with `real_asyncio`. Fails with `time.monotonic` in
    `follow`: the loop is told again and again that nothing is due.
    """
    owner, follower = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1)")
    code = f"""
import asyncio, persist.aio
async def follow():
    followed = persist.aio.Store(store).follow('s-1', {stream_id!r})
    return [event.data async for event in followed], followed.ended
result = asyncio.run(follow())
result
"""
    follower.start(under(tool, code))
    owner.do("stream.emit(2)")
    owner.kill()
    assert follower.result() == ([1, 2], "died")


CONVERSATION = """
store.create('s-1', {'title': 'a', 'messages': []})
mine, theirs = store.load('s-1'), store.load('s-1')
mine.data['title'] = 'b'
theirs.data['messages'].append({'id': 'm1', 'role': 'user', 'content': 'x'})
mine.save(); theirs.save()
store.append('s-1', 'messages', {'id': 'm2', 'role': 'user', 'content': 'y'})
store.extend('s-1', 'messages', [{'id': f'n{n}', 'role': 'user', 'content': 'z' * 999} for n in range(100)])
store.append('s-1', 'messages', {'id': 'm3', 'role': 'user', 'content': 'in the journal'})
with store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}) as stream:
    stream.emit(1)
    stream.emit(2, durable=True)
    stream.checkpoint({'role': 'assistant', 'content': 'Be'})
    stream.finish({'role': 'assistant', 'content': 'Because.'})
followed = store.follow('s-1', stream.id)
seen = [event.data for event in followed]
swept = store.clear_stale_streams()
head = store.head('s-1')
again = store.load('s-1')
again.data['title'] = 'c'
again.save()
store.compact('s-1', alone=True)
still = [event.data for event in store.events('s-1', stream.id)]
problems = store.check()
"""


@tools
def test_whole_conversation(store: persist.Store, actor: ActorFactory, tool: str) -> None:
    """Every verb of a conversation gives its usual result, also in an event loop.

    The documents bear the frozen time, because a test that freezes the clock wants that. Fails under freezegun if a
    document's times are not written as text, because its `datetime` is a subclass.
    """
    code = f"""{CONVERSATION}
plain = seen, followed.ended, swept, head.fields['title'], head.updated_at.year, still, problems
import asyncio, persist.aio
async def converse():
    aio = persist.aio.Store(store)
    await aio.append('s-1', 'messages', {{'id': 'a1', 'role': 'user', 'content': 'y'}})
    async with aio.start_stream('s-1', {{'role': 'user', 'content': 'And?'}}) as stream:
        await stream.emit(1)
        await stream.finish({{'role': 'assistant', 'content': 'So.'}})
    return [event.data async for event in aio.follow('s-1', stream.id)]
in_a_loop = asyncio.run(converse())
plain, in_a_loop, store.tail('s-1', limit=1)[0]['content']
"""
    plain, in_a_loop, last = actor().do(under(tool, code))
    assert plain == ([1, 2], "finished", persist.Sweep([], {}), "b", 2101 if "2101" in tool else 2001, [1, 2], [])
    assert (in_a_loop, last) == ([1], "So.")
    # Another process, whose clock is right, finds no problem.
    assert store.check() == []
    store.append("s-1", "messages", {"id": "m9", "role": "user", "content": "later"})
    assert store.load("s-1").data["title"] == "c"


@tools
def test_events_expire_by_the_clock_that_stamps_files(
    store: persist.Store, session: persist.Session, actor: ActorFactory, tool: str
) -> None:
    """A frozen clock keeps events neither shorter nor longer, and does not change the time of a file.

    Fails if the age is computed from `time.time` alone: in the future young events are removed, and in the past old
    ones stay.
    """
    with store.start_stream("s-1") as stream:
        stream.emit("young")
        stream.finish()
    young = store.path / ".events" / f"s-1.{stream.id}"
    old = young.with_name("s-1.old")
    old.write_bytes(young.read_bytes())
    before = young.stat().st_mtime_ns
    os.utime(old, (time.time() - 301,) * 2)
    actor().do(under(tool, "store.clear_stale_streams()\nNone"))
    assert (young.exists(), old.exists()) == (True, False)
    assert young.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(freezegun.freeze_time("2001-01-01"), id="freezegun"),
        pytest.param(time_machine.travel("2001-01-01", tick=False), id="time-machine"),
    ],
)
def test_waits_of_the_pytest_plugin_end(tool: AbstractContextManager[object]) -> None:
    """A test that freezes the clock waits for a shared fixture no longer than the given time.

    Fails with `time.monotonic` in the plugin's `run`.
    """
    with tool:
        wait = Wait(0.1)
        with pytest.raises(TimeoutError, match="late"):
            # 200 pauses take at least four seconds.
            for _ in range(200):
                wait.pause(TimeoutError("late"))
        assert wait.waited_s >= 0.1
