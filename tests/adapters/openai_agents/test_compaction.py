"""Compaction replaces items in one commit, and only while they are still there.

The whole flow is tested by the SDK's own tests (see ``scripts/adapter_suites``).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("agents", reason="no openai-agents: scripts/test-adapters installs it")

import persist
from persist.adapters.openai_agents import PersistSession

ITEMS: list[Any] = [{"role": "user", "content": str(number)} for number in range(6)]
SUMMARY: list[Any] = [{"role": "assistant", "content": "in short"}]


@pytest.fixture
def session(tmp_path: Path) -> PersistSession:
    found = PersistSession("s", persist.Store(tmp_path))
    asyncio.run(found.add_items(ITEMS))
    return found


async def replaced(session: PersistSession, limit: int, start: int, *, meanwhile: Any = None, **options: Any) -> bool:
    """Take a snapshot of the last `limit` items, and replace them from `start` on by the summary."""
    snapshot = await session._get_compaction_snapshot(limit, **options)
    assert snapshot is not None
    assert snapshot.items == ITEMS[-limit:]
    assert snapshot.complete is (limit >= len(ITEMS))
    if meanwhile is not None:
        await meanwhile()
    return await snapshot.replace_suffix(start, SUMMARY)


def test_a_suffix_is_replaced_in_one_commit(session: PersistSession, tmp_path: Path) -> None:
    store = persist.Store(tmp_path)
    before = store.load("s").revision
    assert asyncio.run(replaced(session, 4, 1))
    assert asyncio.run(session.get_items()) == ITEMS[:3] + SUMMARY
    assert store.load("s").revision == before + 1


def test_expired_items_before_it_go_in_the_same_commit(session: PersistSession) -> None:
    assert asyncio.run(replaced(session, 3, 0, prune_prefix=lambda item: item["content"] < "2"))
    assert asyncio.run(session.get_items()) == [ITEMS[2], *SUMMARY]


def test_nothing_is_replaced_after_another_write(session: PersistSession) -> None:
    """Without the comparison under the lock, the item that came meanwhile would be lost."""
    late: list[Any] = [{"role": "user", "content": "late"}]
    assert not asyncio.run(replaced(session, 6, 2, meanwhile=lambda: session.add_items(late)))
    assert asyncio.run(session.get_items()) == ITEMS + late


def test_nothing_is_replaced_by_an_empty_snapshot(session: PersistSession, tmp_path: Path) -> None:
    assert not asyncio.run(replaced(session, 6, 6))
    empty = PersistSession("none", tmp_path)

    async def of_nothing() -> bool:
        snapshot = await empty._get_compaction_snapshot(5)
        assert snapshot is not None
        assert snapshot.complete
        return await snapshot.replace_suffix(0, SUMMARY)

    assert not asyncio.run(of_nothing())
    assert asyncio.run(session.get_items()) == ITEMS
