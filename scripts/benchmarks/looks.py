"""The cost of a look: the head of a session, and opening a store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

import persist
from benchmarks import peers
from benchmarks.measure import Action, Effort, interleaved
from benchmarks.tables import Findings, at_most, compared
from benchmarks.workload import SESSION, conversation, new_message, open_store

MESSAGES = 1_000
_HEAD = "SELECT title, draft FROM sessions WHERE id = ?"
_COUNT = "SELECT count(*) FROM messages WHERE session = ?"


def heads(directory: Path, effort: Effort) -> Findings:
    """Measure a look at the small fields of a session and the number of its messages, without the messages.

    For a cold look, a store or a connection is opened. A warm look uses one that has looked before.
    """
    store, path = open_store(directory / "store"), directory / "sessions.db"
    data = conversation(MESSAGES)
    store.create(SESSION, data)
    store.append(SESSION, "messages", new_message())
    connection = peers.connect(path, "FULL")
    connection.execute("CREATE TABLE sessions (id TEXT PRIMARY KEY, title TEXT, draft TEXT)")
    connection.execute("INSERT INTO sessions VALUES (?, ?, ?)", (SESSION, data["title"], str(data["draft"])))
    rows = [(SESSION, msgspec.json.encode(each).decode()) for each in data["messages"]]
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(peers.INSERT, rows)
    connection.execute("COMMIT")

    def cold_sqlite() -> None:
        with closing(sqlite3.connect(path)) as fresh:
            _head_in(fresh)

    names = "SQLite, warm", "SQLite, cold", "store.head(), warm", "store.head(), cold"
    looks: list[Callable[[], object]] = [
        lambda: _head_in(connection),
        cold_sqlite,
        lambda: store.head(SESSION),
        lambda: persist.Store(store.path).head(SESSION),
    ]
    seconds = interleaved({name: Action(look) for name, look in zip(names, looks, strict=True)}, effort)
    connection.close()
    warm, cold = (seconds[ours] / seconds[theirs] for theirs, ours in zip(names[:2], names[2:], strict=True))
    targets = [at_most("head(), cold, to SQLite's", 1.2, cold), at_most("head(), warm, to SQLite's", 0.5, warm)]
    return Findings([compared(f"The head of {MESSAGES:,} messages and SQLite's", seconds, names[0])], targets)


def _head_in(connection: sqlite3.Connection) -> object:
    return connection.execute(_HEAD, (SESSION,)).fetchone(), connection.execute(_COUNT, (SESSION,)).fetchone()


def openings(directory: Path, effort: Effort) -> Findings:
    """Measure how a store that exists is opened."""
    path = open_store(directory / "store").path
    base, database = "sqlite3.connect() and its two PRAGMAs", directory / "sessions.db"
    peers.connect(database, "FULL").close()
    actions = {
        "persist.Store()": Action(lambda: persist.Store(path)),
        base: Action(lambda: peers.connect(database, "FULL").close()),
    }
    seconds = interleaved(actions, effort)
    target = at_most("opening a store that exists", 60, seconds["persist.Store()"] * 1e6, "µs")
    return Findings([compared("Opening a store that exists", seconds, base)], [target])
