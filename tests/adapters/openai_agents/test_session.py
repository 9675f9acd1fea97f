"""`PersistSession` keeps the promises of the SDK's protocol, and what the SDK's own store cannot promise."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("agents", reason="no openai-agents: scripts/test-adapters installs it")

from agents.memory import Session, SessionSettings

import persist
import persist.aio
from persist.adapters.openai_agents import PersistSession


def turn(number: int) -> list[Any]:
    """A prompt and its answer, with the placeholder id that the SDK gives to items of every turn."""
    return [
        {"role": "user", "content": f"prompt {number}"},
        {"id": "__fake_id__", "type": "message", "role": "assistant", "content": f"answer {number}"},
    ]


def test_it_fits_the_protocol_and_is_made_from_any_store(tmp_path: Path) -> None:
    store = persist.Store(tmp_path)
    for place in (store, persist.aio.Store(store), tmp_path, str(tmp_path)):
        session = PersistSession("user:7/chat", place)
        assert isinstance(session, Session)
        asyncio.run(session.add_items(turn(1)))
    assert len(store.load("user:7/chat").data["messages"]) == 8


def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    session = PersistSession("s", tmp_path)

    async def talk() -> None:
        assert await session.get_items() == []
        assert await session.pop_item() is None
        await session.clear_session()
        await session.add_items([])
        assert not persist.Store(tmp_path).exists("s")
        await session.add_items(turn(1))
        await session.add_items(turn(2))
        assert await session.get_items() == turn(1) + turn(2)
        assert await session.get_items(limit=3) == (turn(1) + turn(2))[1:]
        assert await session.get_items(limit=0) == []
        assert await session.get_items(limit=-1) == turn(1) + turn(2)
        assert await session.pop_item() == turn(2)[1]
        await session.clear_session()
        assert await session.get_items() == []

    asyncio.run(talk())


@pytest.mark.parametrize("settings", [SessionSettings(limit=2), {"limit": 2}])
def test_the_settings_bound_what_is_read(tmp_path: Path, settings: Any) -> None:
    session = PersistSession("s", tmp_path, session_settings=settings)
    asyncio.run(session.add_items(turn(1) + turn(2)))
    assert asyncio.run(session.get_items()) == turn(2)
    assert asyncio.run(session.get_items(limit=10)) == turn(1) + turn(2)


def test_other_values_of_the_session_stay(tmp_path: Path) -> None:
    store = persist.Store(tmp_path)
    store.create("s", {"title": "Locks", "messages": [{"id": "m1", "content": "mine"}]})
    session = PersistSession("s", store, field="items")
    asyncio.run(session.add_items(turn(1)))
    asyncio.run(session.clear_session())
    document = json.loads((tmp_path / "s.json").read_text())
    assert (document["title"], document["messages"]) == ("Locks", [{"id": "m1", "content": "mine"}])


def test_bad_arguments_write_nothing(tmp_path: Path) -> None:
    bad: list[tuple[Any, Any]] = [(3, tmp_path), ("s", 3)]
    for session_id, store in bad:
        with pytest.raises(persist.InvalidArgument):
            PersistSession(session_id, store)
    with pytest.raises(persist.InvalidArgument):
        asyncio.run(PersistSession("", tmp_path).add_items(turn(1)))
    session = PersistSession("s", tmp_path)
    with pytest.raises(persist.InvalidArgument, match="limit"):
        asyncio.run(session.get_items(limit=cast(Any, "3")))
    not_json: Any = {"role": "user", "content": {1, 2}}
    with pytest.raises(persist.NotJSON):
        asyncio.run(session.add_items([turn(1)[0], not_json]))
    assert persist.Store(tmp_path).ids() == []


def test_one_item_goes_to_one_caller(tmp_path: Path) -> None:
    """Without the transaction around the pop, callers get the same item. The SDK's issue #4205 is that."""

    async def talk() -> list[Any]:
        sessions = [PersistSession("s", tmp_path) for _ in range(8)]
        await sessions[0].add_items([{"role": "user", "content": str(number)} for number in range(40)])
        popped = await asyncio.gather(*(each.pop_item() for each in sessions * 5))
        assert await sessions[0].pop_item() is None
        return popped

    popped = asyncio.run(talk())
    assert sorted(int(each["content"]) for each in popped) == list(range(40))


def test_first_writes_at_once_lose_nothing(tmp_path: Path) -> None:
    """The SDK's issue #2722 lost items here."""

    async def talk() -> list[Any]:
        await asyncio.gather(*(PersistSession("s", tmp_path).add_items(turn(number)) for number in range(20)))
        return await PersistSession("s", tmp_path).get_items()

    items = asyncio.run(talk())
    pairs = list(zip(items[::2], items[1::2], strict=True))
    assert sorted(pairs, key=str) == sorted(map(tuple, map(turn, range(20))), key=str)


def test_a_cancelled_add_is_whole_or_not_there(tmp_path: Path) -> None:
    """The SDK's issues #1658 and #1745: a cancellation at any moment leaves no half of a batch."""

    async def talk() -> list[Any]:
        session = PersistSession("s", tmp_path)
        for number in range(60):
            task = asyncio.create_task(session.add_items(turn(number)))
            for _ in range(number % 6):
                await asyncio.sleep(0)
            if number % 3:
                await asyncio.sleep(0.0002 * (number % 7))
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            there = await session.get_items()
            assert len(there) % 2 == 0
            if outcome is None:
                assert there[-2:] == turn(number)
        return await session.get_items()

    items = asyncio.run(talk())
    numbers = [int(each["content"].split()[1]) for each in items[::2]]
    assert items == [item for number in numbers for item in turn(number)]
    assert len(set(numbers)) == len(numbers)
