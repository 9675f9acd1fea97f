"""One more durable message in a long conversation."""

from __future__ import annotations

import json
import sqlite3
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import persist
from demonstration import naive
from demonstration.part import NAIVE, OURS, Message, Part, Progress

LENGTH = 10_000
ROUNDS, TIMES = 3, 15
SESSION = "long"
_SQLITE = "SQLite"


def _message(number: int) -> Message:
    return {"id": f"m{number}", "role": "user", "content": f"{number}: " + "some words of a question " * 10}


def run(directory: Path, progress: Progress) -> Part:
    """Run the part in an empty directory."""
    apart = directory / "naive"
    apart.mkdir(exist_ok=True)
    path = apart / f"{SESSION}.json"
    conversation = [_message(number) for number in range(LENGTH)]
    naive.save(path, {"messages": conversation})
    store = persist.Store(directory / "persist")
    store.create(SESSION, {"title": "A long conversation", "messages": conversation})

    def add_naively(message: Message) -> None:
        document = naive.load(path)
        document["messages"].append(message)
        naive.save(path, document, durable=True)

    with closing(sqlite3.connect(apart / "sqlite.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE messages (session TEXT, number INTEGER PRIMARY KEY, message TEXT)")
        insert = "INSERT INTO messages (session, message) VALUES (?, ?)"
        database.execute("BEGIN")
        database.executemany(insert, ((SESSION, json.dumps(message)) for message in conversation))
        database.execute("COMMIT")
        ways: dict[str, Callable[[Message], object]] = {
            NAIVE: add_naively,
            _SQLITE: lambda message: database.execute(insert, (SESSION, json.dumps(message))),
            OURS: lambda message: store.append(SESSION, "messages", message),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        # The ways run in turns, because a disk is not always equally fast.
        for round_number in range(ROUNDS):
            for name, way in ways.items():
                for number in range(TIMES):
                    message = _message(LENGTH + round_number * TIMES + number)
                    started = time.perf_counter()
                    way(message)
                    seconds[name].append(time.perf_counter() - started)
            progress(round_number / ROUNDS)
    count, medians = ROUNDS * TIMES, {name: statistics.median(each) for name, each in seconds.items()}
    is_whole = store.load(SESSION).data["messages"] == [_message(number) for number in range(LENGTH + count)]
    return Part(
        title=f"One more message in a conversation of {LENGTH:,}, and wait until it is on the disk",
        ways=tuple(ways),
        rows={f"milliseconds, median of {count}": tuple(f"{median * 1000:.2f}" for median in medians.values())},
        figures={"messages": LENGTH, "median s": medians},
        broken=[] if is_whole else ["the conversation is not what was written"],
    )
