"""The processor time of an append: the time of the process, and of the kernel for it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec

from benchmarks import bare, peers
from benchmarks.tables import Findings, Table, at_most, ratio
from benchmarks.workload import SESSION, conversation, message, new_message, open_store

MESSAGES = 1_000
#: The number of commits that are timed together, because the clock of the processor time is coarse.
BLOCK = 20


def processor_time(directory: Path, rounds: int) -> Findings:
    """Measure blocks of appends in turns, to a session, to SQLite and to a bare file."""
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
