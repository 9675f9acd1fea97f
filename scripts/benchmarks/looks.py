"""Heads and openings, the processor time of an append, and many sessions in turn."""

from __future__ import annotations

import itertools
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import msgspec

import persist
from benchmarks import bare, peers
from benchmarks.measure import Action, Effort, interleaved
from benchmarks.tables import Findings, Table, at_most, compared, ratio
from benchmarks.workload import SESSION, conversation, message, new_message, open_store

MESSAGES = 1_000
#: So many commits are timed together: the clock of the processor time is coarse.
BLOCK = 20
#: As many as do not quite fill the cache of a store, and how large each is.
SESSIONS, SESSION_BYTES = 65, 512 * 1024
_HEAD = "SELECT title, draft FROM sessions WHERE id = ?"
_COUNT = "SELECT count(*) FROM messages WHERE session = ?"


def heads(directory: Path, effort: Effort) -> Findings:
    """The small fields of a session and the number of its messages, without the messages.

    Cold: by a store, or a connection, that is opened for it. Warm: by one that has looked before.
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
    """Opening a store that exists."""
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


def processor_time(directory: Path, rounds: int) -> Findings:
    """The processor time of an append, of the process and of the kernel for it."""
    store = open_store(directory / "store")
    store.create(SESSION, conversation(MESSAGES))
    connection, fd = peers.connect(directory / "sessions.db", "FULL"), bare.open_appending(directory / "bare")
    for number in range(MESSAGES):
        peers.insert(connection, SESSION, message(number))
    ours = "store.append()"
    actions: dict[str, Callable[[], object]] = {
        peers.LIMIT: lambda: bare.append(fd, msgspec.json.encode(new_message())),
        peers.SQLITE: lambda: peers.insert(connection, SESSION, new_message()),
        ours: lambda: store.append(SESSION, "messages", new_message()),
    }
    found: dict[str, list[float]] = {name: [] for name in actions}
    shuffle = random.Random(1533).shuffle
    for _ in range(rounds):
        order = list(actions)
        shuffle(order)
        for name in order:
            started = time.process_time()
            for _ in range(BLOCK):
                actions[name]()
            found[name].append((time.process_time() - started) / BLOCK)
    connection.close()
    seconds = {name: median(values) for name, values in found.items()}
    rows = [(name, f"{value * 1e6:.1f} µs", ratio(value, seconds[peers.SQLITE])) for name, value in seconds.items()]
    target = at_most("processor time of append(), to SQLite's", 1.15, seconds[ours] / seconds[peers.SQLITE])
    table = Table(f"Processor time of an append to {MESSAGES:,} messages", ("median", "to SQLite FULL"), rows)
    return Findings([table], [target])


def rotation(directory: Path, effort: Effort) -> Findings:
    """An append to one session of 0.5 MB, and to many of them in rotation."""
    store = open_store(directory)
    data = conversation(SESSION_BYTES // len(msgspec.json.encode(message(SESSION_BYTES))))
    names = [f"s-{number}" for number in range(SESSIONS)]
    for name in [SESSION, *names]:
        store.create(name, data)
        store.append(name, "messages", new_message())
    turns, one = itertools.cycle(names), "one session"
    many = f"{SESSIONS} sessions in rotation"
    actions = {
        one: Action(lambda: store.append(SESSION, "messages", new_message())),
        many: Action(lambda: store.append(next(turns), "messages", new_message())),
    }
    seconds = interleaved(actions, effort)
    table = compared(f"store.append() to sessions of {SESSION_BYTES // 1024} KiB", seconds, one)
    return Findings([table], [at_most(f"append() to {many}, to one", 2.0, seconds[many] / seconds[one])])
