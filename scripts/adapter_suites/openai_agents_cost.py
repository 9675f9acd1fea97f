"""Measure what the session of the OpenAI Agents SDK costs on `persist`, beside the SDK's own ``SQLiteSession``.

    python scripts/adapter_suites/openai_agents_cost.py [--check] [--directory DIR]

Both are durable: the SDK's class leaves SQLite at its default, which syncs each commit.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from agents import SQLiteSession
from costs import Row, milliseconds, report, scratch

from persist.adapters.openai_agents import PersistSession

ITEMS = 10_000
ADD_X, LAST_20_MS = 1.1, 1.0
ITEM: Any = {"role": "user", "content": "How do I lock a file so that another process cannot change it? " * 5}


async def measured(directory: Path) -> list[Row]:
    """Return the rows for a session of 10,000 items."""
    sessions: dict[str, Any] = {
        "persist": PersistSession("s", directory / "sessions"),
        "SQLite": SQLiteSession("s", directory / "sessions.sqlite"),
    }
    for session in sessions.values():
        await session.add_items([ITEM] * ITEMS)
    add = await milliseconds({name: partial(each.add_items, [ITEM]) for name, each in sessions.items()})
    last = await milliseconds({name: partial(each.get_items, 20) for name, each in sessions.items()})
    rows = [Row(f"add an item to {ITEMS:,}, {name}", figure, "ms") for name, figure in add.items()]
    rows.append(Row("add an item, to the SDK's SQLiteSession", add["persist"] / add["SQLite"], "x", ADD_X))
    rows.append(Row(f"the last 20 of {ITEMS:,} items, persist", last["persist"], "ms", LAST_20_MS))
    rows.append(Row(f"the last 20 of {ITEMS:,} items, SQLite", last["SQLite"], "ms"))
    return rows


def main() -> None:
    """Measure, and print the rows."""
    with scratch() as directory:
        report("OpenAI Agents", asyncio.run(measured(directory)))


if __name__ == "__main__":
    main()
