"""Several processes append to one transcript, and are killed on the way."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("claude_agent_sdk", reason="needs claude-agent-sdk")

from actors import Actor, eventually
from claude_agent_sdk import SessionKey, fold_session_summary
from conftest import ActorFactory

import persist
from persist.adapters.claude_agent_sdk import PersistSessionStore

KEY: SessionKey = {"project_key": "-srv-shop", "session_id": "s-1"}
AUTHORS, WORKERS, KILLS, ENTRIES, STEP, BATCH = 2, 4, 3, 150, 3, 5

# Two workers send the entries of each author, as a retry does whose first call is still under way. A batch overlaps the
# one before. Each field of the summary is set by one entry only, so a summary that was folded from an old one shows.
PREPARE = f"""
import asyncio
import claude_agent_sdk
from persist.adapters.claude_agent_sdk import PersistSessionStore

FIELDS = {{(0, 40): "customTitle", (0, 75): "aiTitle", (0, 110): "lastPrompt"}}
FIELDS |= {{(1, 55): "summary", (1, 95): "gitBranch"}}

def entry(author, number):
    made = {{"type": "user", "uuid": f"{{author}}-{{number}}", "cwd": f"/{{author}}"}}
    return made | ({{FIELDS[author, number]: "set"}} if (author, number) in FIELDS else {{}})

async def work(author):
    adapter = PersistSessionStore(store)
    for start in range(0, {ENTRIES}, {STEP}):
        batch = [entry(author, number) for number in range(start, min(start + {BATCH}, {ENTRIES}))]
        await adapter.append({KEY!r}, batch)
"""


def test_killed_writers_lose_and_double_nothing(actor: ActorFactory, directory: Path) -> None:
    """4 processes append batches. 3 are killed, and others send all of their batches again. Each entry is there once.

    The entries of an author keep their order, and the summary is the fold of all entries as they stand.

    It fails if the summary is read before the transaction, and if known entries are looked for before it.
    """
    store = persist.Store(directory)
    session_id = "-srv-shop/s-1"

    def count() -> int:
        return store.head(session_id).counts["messages"] if store.exists(session_id) else 0

    prepared = [actor(timeout_s=60.0) for _ in range(WORKERS + KILLS)]
    for each in prepared:
        each.start(PREPARE)
    for each in prepared:
        each.result()
    working: list[tuple[int, Actor]] = []

    def begin(author: int) -> None:
        process = prepared.pop()
        process.start(f"asyncio.run(work({author}))")
        working.append((author, process))

    for worker in range(WORKERS):
        begin(worker % AUTHORS)
    for share in range(1, KILLS + 1):
        # The kill comes somewhere in the midst of an append.
        eventually(lambda least=share * 60: count() >= least)  # type: ignore[misc]
        author, process = working.pop(0)
        process.kill()
        begin(author)
    for _, process in working:
        process.result()

    async def look() -> tuple[Any, Any]:
        adapter = PersistSessionStore(store)
        return await adapter.load(KEY), await adapter.list_session_summaries("-srv-shop")

    entries, [summary] = asyncio.run(look())
    found = Counter(each["uuid"] for each in entries)
    assert found == Counter(f"{author}-{number}" for author in range(AUTHORS) for number in range(ENTRIES))
    for author in range(AUTHORS):
        numbers = [int(each["uuid"].split("-")[1]) for each in entries if each["uuid"].startswith(f"{author}-")]
        assert numbers == [*range(ENTRIES)]
    assert summary["data"] == fold_session_summary(None, KEY, entries)["data"]
    assert len(summary["data"]) >= 5
    assert store.check() == []
