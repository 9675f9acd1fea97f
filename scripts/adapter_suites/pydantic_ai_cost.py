"""Measure what the conversation store of pydantic-ai costs on `persist`.

    python scripts/adapter_suites/pydantic_ai_cost.py [--check] [--directory DIR]

pydantic-ai has no durable `ConversationStore` of its own. So a conversation of 10,000 messages is compared with one of
10, and with the least that a durable store can do in SQLite. If pydantic-ai-harness is installed, the script measures
its `SqliteConversationStore`, too. That one fits another protocol, and writes the whole conversation each time.
"""

from __future__ import annotations

import asyncio
import importlib
import sqlite3
from collections import deque
from dataclasses import replace
from pathlib import Path

from costs import ROUNDS, WARM_UP, Call, Row, milliseconds, report, scratch
from pydantic import TypeAdapter
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationEntry, ConversationRecord
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, UserPromptPart

from persist.adapters.pydantic_ai import PersistConversationStore

FEW, MANY = 10, 10_000
GROWTH_X, LAST_20_MS = 1.2, 1.0
TEXT = "How do I lock a file so that another process cannot change it? " * 5


def turns(count: int) -> list[ModelMessage]:
    """Return so many turns, of two messages each."""
    return [
        each
        for _ in range(count)
        for each in (ModelRequest(parts=[UserPromptPart(TEXT)]), ModelResponse(parts=[TextPart(TEXT)]))
    ]


async def adding(store: PersistConversationStore, messages: int, *, is_growing: bool) -> Call:
    """Return a call that adds an entry to a conversation of so many messages.

    Each call has a conversation of its own, or all of them add to one.
    """
    count = 1 if is_growing else WARM_UP + ROUNDS
    for number in range(count):
        await store.save(Conversation(conversation_id=f"{messages}-{number}", messages=turns(messages // 2)))
    waiting = deque([await store.read_record(f"{messages}-{number}") for number in range(count)])

    async def add() -> None:
        record = waiting.popleft()
        assert record is not None
        entry = ConversationEntry(parent_id=record.head_id, message=turns(1)[0])
        after = replace(record, head_id=entry.id, revision=entry.id)
        await store.write_record(after, new_entries=[entry], expected_revision=record.revision)
        waiting.append(after)

    return add


def sqlite_adding(path: Path) -> Call:
    """Return a call that adds an entry, and compares and swaps the record, in one commit of SQLite."""
    entries, records = TypeAdapter(ConversationEntry), TypeAdapter(ConversationRecord)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.executescript(
        "PRAGMA journal_mode=WAL; CREATE TABLE entries (id TEXT PRIMARY KEY, conversation TEXT, json TEXT);"
        "CREATE TABLE records (id TEXT PRIMARY KEY, revision TEXT, json TEXT);"
        "INSERT INTO records VALUES ('c', '', '');"
    )
    record = ConversationRecord(conversation_id="c", head_id=None, revision="")

    def write(after: ConversationRecord, entry: ConversationEntry) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO entries VALUES (?, 'c', ?)", (entry.id, entries.dump_json(entry).decode()))
        swap = "UPDATE records SET revision = ?, json = ? WHERE id = 'c' AND revision = ?"
        done = connection.execute(swap, (after.revision, records.dump_json(after).decode(), record.revision))
        assert done.rowcount == 1
        connection.execute("COMMIT")

    async def add() -> None:
        nonlocal record
        entry = ConversationEntry(parent_id=record.head_id, message=turns(1)[0])
        after = replace(record, head_id=entry.id, revision=entry.id)
        await asyncio.to_thread(write, after, entry)
        record = after

    return add


async def harness_adding(path: Path) -> Call | None:
    """Return a call that adds a message with the store of pydantic-ai-harness. None if that is not installed."""
    try:
        module = importlib.import_module("pydantic_ai_harness.step_persistence.conversations")
    except ImportError:
        return None
    store, messages = module.SqliteConversationStore(database=path), turns(MANY // 2)
    summary = await store.save(summary=module.ConversationSummary(workspace="w"), messages=messages)

    async def add() -> None:
        nonlocal summary
        messages.append(turns(1)[0])
        summary = await store.save(summary=summary, messages=messages)

    return add


async def measured(directory: Path) -> list[Row]:
    """Return the rows."""
    store = PersistConversationStore(directory / "conversations")
    few, many = f"add an entry to {FEW}", f"add an entry to {MANY:,}"
    calls = {few: await adding(store, FEW, is_growing=False), many: await adding(store, MANY, is_growing=True)}
    calls["add an entry in bare SQLite"] = sqlite_adding(directory / "bare.sqlite")
    figures, name = await milliseconds(calls), f"{MANY}-0"
    figures |= await milliseconds({f"load the last 20 of {MANY:,}": lambda: store.load(name, limit=20)})
    record = await store.read_record(name)
    assert record is not None
    history = f"read_history, the last 20 of {MANY:,}"
    figures |= await milliseconds({history: lambda: store.read_history(record.head_id, limit=20)})
    harness = await harness_adding(directory / "harness.sqlite")
    if harness is not None:
        figures |= await milliseconds({f"add a message to {MANY:,} with pydantic-ai-harness": harness}, rounds=10)
    rows = [Row(what, figure, "ms", LAST_20_MS if what == history else None) for what, figure in figures.items()]
    return [*rows, Row(f"{many}, to {FEW}", figures[many] / figures[few], "x", GROWTH_X)]


def main() -> None:
    """Measure, and print the rows."""
    with scratch() as directory:
        report("pydantic-ai", asyncio.run(measured(directory)))


if __name__ == "__main__":
    main()
