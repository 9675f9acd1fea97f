"""Several processes that append durably side by side: how much they do in all, and which of them goes short."""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import msgspec

from benchmarks import bare, peers
from benchmarks.measure import FORK
from benchmarks.tables import Findings, Table, at_least, at_most
from benchmarks.workload import Message, conversation, new_message, open_store

#: The number of messages in a session at the beginning.
MESSAGES = 1_000
#: The number of processes that the targets are for.
MANY = 8
#: No process may be silent for longer.
DEADLINE_S = 90.0

Commit = Callable[[Message], object]

OWN_BARE = "own files: write + fdatasync"
OWN_PERSIST = "own sessions: persist"
OWN_SQLITE = "own sessions: one SQLite database"
ONE_BARE = "one file: flock + write + fdatasync"
ONE_PERSIST = "one session: persist"
ONE_SQLITE = "one session: SQLite"
ONE_NAIVE = "one session: FileLock + json + replace"


@dataclass(frozen=True, slots=True)
class Crowd:
    """The figures of some processes that append at once.

    They are the commits a second, the slowest process's share of the fastest's, and the worst waits.
    """

    name: str
    processes: int
    rate: float
    fairness: float
    p99_s: float
    longest_s: float


def own_bare(directory: Path, number: int) -> Commit:
    fd = bare.open_appending(directory / f"records-{number}")
    return lambda message: bare.append(fd, msgspec.json.encode(message))


def one_bare(directory: Path, _number: int) -> Commit:
    fd = bare.open_appending(directory / "records")

    def commit(message: Message) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        bare.append(fd, msgspec.json.encode(message))
        fcntl.flock(fd, fcntl.LOCK_UN)

    return commit


def in_sqlite(directory: Path, session: str) -> Commit:
    connection = peers.connect(directory / "sessions.db", "FULL")

    def commit(message: Message) -> None:
        try:
            peers.insert(connection, session, message)
        except sqlite3.OperationalError as error:
            # The call starved for the whole time-out. It counts as one long wait.
            print(f"SQLite: {error}", flush=True)

    return commit


def in_persist(directory: Path, session: str) -> Commit:
    store = open_store(directory / "store")
    return lambda message: store.append(session, "messages", message)


def one_naive(directory: Path, _number: int) -> Commit:
    return peers.NaiveFile.opened(directory).append


#: How a process of each crowd commits.
CROWDS: dict[str, Callable[[Path, int], Commit]] = {
    OWN_BARE: own_bare,
    OWN_PERSIST: lambda directory, number: in_persist(directory, f"s-{number}"),
    OWN_SQLITE: lambda directory, number: in_sqlite(directory, f"s-{number}"),
    ONE_BARE: one_bare,
    ONE_PERSIST: lambda directory, _number: in_persist(directory, "s-0"),
    ONE_SQLITE: lambda directory, _number: in_sqlite(directory, "s-0"),
    ONE_NAIVE: one_naive,
}


def prepare(directory: Path, most: int) -> None:
    """Make the conversations to which the processes append. They are left as they grow."""
    data = conversation(MESSAGES)
    store, database = open_store(directory / "store"), peers.connect(directory / "sessions.db", "FULL")
    for number in range(most):
        store.create(f"s-{number}", data)
        rows = [(f"s-{number}", msgspec.json.encode(message).decode()) for message in data["messages"]]
        database.execute("BEGIN IMMEDIATE")
        database.executemany(peers.INSERT, rows)
        database.execute("COMMIT")
    database.close()
    peers.NaiveFile(directory, MESSAGES)


def append_for(connection: Connection, directory: Path, name: str, number: int, seconds: float) -> None:
    """In a child: append once, and then append for some seconds, beginning when told.

    Send how long each call took.
    """
    commit = CROWDS[name](directory, number)
    # Each process counts its own ids, but here no two may be the same.
    prefix = f"{os.getpid()}-{time.monotonic_ns()}"

    def commit_one() -> None:
        message = new_message()
        commit(message | {"id": f"{prefix}-{message['id']}"})

    # Another table shows the cost of the first append.
    commit_one()
    connection.send(True)
    connection.recv()
    taken, before = [], time.monotonic()
    end = before + seconds
    while before < end:
        commit_one()
        after = time.monotonic()
        taken.append(after - before)
        before = after
    connection.send(taken)


@contextmanager
def children(directory: Path, name: str, count: int, seconds: float) -> Iterator[list[Connection]]:
    """Run a number of processes that append, and yield the connections to them.

    A process that has not ended is killed at the end of the block.
    """
    pipes = [FORK.Pipe() for _ in range(count)]
    processes = [
        FORK.Process(target=append_for, args=(there, directory, name, number, seconds))
        for number, (_here, there) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield [here for here, _there in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pair in pipes:
            for end in pair:
                end.close()


def received(connection: Connection) -> list[float]:
    if not connection.poll(DEADLINE_S):
        raise TimeoutError(f"A process has said nothing for {DEADLINE_S:.0f} s.")
    found: list[float] = connection.recv()
    return found


def crowd(directory: Path, name: str, count: int, seconds: float) -> Crowd:
    """Let a number of processes append at once."""
    with children(directory, name, count, seconds) as connections:
        for connection in connections:
            received(connection)
        for connection in connections:
            connection.send(True)
        taken = [received(connection) for connection in connections]
    calls = [len(each) for each in taken]
    p99_s = max(sorted(each)[len(each) * 99 // 100] for each in taken)
    return Crowd(name, count, sum(calls) / seconds, min(calls) / max(calls), p99_s, max(map(max, taken)))


def measure(directory: Path, counts: tuple[int, ...], rounds: int, seconds: float) -> list[Crowd]:
    """Measure every crowd at every size, in an order drawn anew each round. Return the medians."""
    prepare(directory, max(counts))
    each = [(name, count) for name in CROWDS for count in counts]
    found: dict[tuple[str, int], list[Crowd]] = {key: [] for key in each}
    shuffle = random.Random(1533).shuffle
    for _ in range(rounds):
        order = list(each)
        shuffle(order)
        for name, count in order:
            found[name, count].append(crowd(directory, name, count, seconds))
    return [_middle(crowds) for crowds in found.values()]


def _middle(crowds: list[Crowd]) -> Crowd:
    figures = [
        median(values) for values in zip(*((c.rate, c.fairness, c.p99_s, c.longest_s) for c in crowds), strict=True)
    ]
    return Crowd(crowds[0].name, crowds[0].processes, *figures)


def findings(crowds: list[Crowd]) -> Findings:
    """Return the table, and the targets for most processes at once."""
    counts = sorted({crowd.processes for crowd in crowds})
    at = {(crowd.name, crowd.processes): crowd for crowd in crowds}
    rows = [(name, *(_shown(at[name, count]) for count in counts)) for name in CROWDS]
    columns = tuple(f"{count} process{'es' if count > 1 else ''}" for count in counts)
    note = (
        "Durable commits a second in all; the slowest process's share of the fastest's; the worst process's p99; "
        "the longest."
    )
    many = {name: at[name, MANY] for name in CROWDS}
    one, own, most = many[ONE_PERSIST], many[OWN_PERSIST], at[ONE_PERSIST, counts[-1]]
    who = f"{MANY} processes"
    targets = [
        at_least(f"{who} on one session, to flock + write + fdatasync", 0.4, one.rate / many[ONE_BARE].rate),
        at_least(f"{who} on one session, the slowest to the fastest", 0.5, one.fairness),
        at_most(f"{who} on one session, p99 of a call", 50, one.p99_s * 1e3, "ms"),
        at_least(f"{who} on sessions of their own, to bare loops", 0.55, own.rate / many[OWN_BARE].rate),
        at_least(f"{who} on sessions of their own, to one SQLite", 2.0, own.rate / many[OWN_SQLITE].rate),
    ]
    if most.processes > MANY:
        what = f"{most.processes} processes on one session, the slowest to the fastest"
        targets.append(at_least(what, 0.5, most.fairness))
    return Findings([Table("Several processes, appending to 1,000 messages", columns, rows, [note])], targets)


def _shown(crowd: Crowd) -> str:
    alone = f"{crowd.rate:,.0f}/s"
    waits = f"p99 {crowd.p99_s * 1e3:.1f} ms, ≤ {crowd.longest_s * 1e3:.0f} ms"
    return f"{alone}, {waits}" if crowd.processes == 1 else f"{alone}, {crowd.fairness:.2f}, {waits}"
