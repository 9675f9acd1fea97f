"""How soon the stream of a dead process is cleared, by a sweep and by a process that waits for it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import persist
from benchmarks.measure import FORK, apart
from benchmarks.small import MESSAGES, copies
from benchmarks.tables import Findings, Table, Target, at_most, shown
from benchmarks.workload import SESSION, conversation, open_store

DEADLINE_S = 60.0


def _own(directory: Path, session_ids: list[str], ready: Connection) -> None:
    """In a child: start a stream on each session, say so, and wait to be killed."""
    store = open_store(directory)
    _streams = [store.start_stream(session_id, {"role": "user", "content": "Why?"}) for session_id in session_ids]
    ready.send(True)
    signal.pause()


@contextmanager
def _owner_of(store: persist.Store, session_ids: list[str]) -> Iterator[BaseProcess]:
    """Yield a process that owns a stream on each session.

    The end of the block kills it, if it is still alive.
    """
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_own, args=(store.path, session_ids, there))
    process.start()
    there.close()
    try:
        if not here.poll(DEADLINE_S):
            raise TimeoutError(f"The streams have not started within {DEADLINE_S:.0f} s.")
        here.recv()
        yield process
    finally:
        process.kill()
        process.join()


def _sweep_and_count(directory: Path) -> tuple[float, int, set[str]]:
    """In a child: sweep, while the interpreter's audit events tell which session files are opened."""
    opened: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".json"):
            opened.add(Path(arguments[0]).stem)

    store = open_store(directory)
    sys.addaudithook(note)
    started = time.perf_counter()
    cleared = store.clear_stale_streams().cleared
    return time.perf_counter() - started, len(cleared), opened


def sweep(directory: Path, neighbours: int, count: int) -> Findings:
    """Measure `clear_stale_streams` over many sessions, a few of which are stale."""
    store = open_store(directory)
    store.create(SESSION, conversation(MESSAGES))
    session_ids = copies(store, neighbours)
    stale = session_ids[:: len(session_ids) // count]
    with _owner_of(store, stale):
        pass
    seconds, cleared, opened = apart(_sweep_and_count, store.path)
    rows = [
        ("clear_stale_streams()", shown(seconds)),
        ("streams cleared", str(cleared)),
        ("session files opened", str(len(opened))),
    ]
    targets = [
        Target("streams cleared by a sweep", str(len(stale)), str(cleared), cleared == len(stale)),
        Target("session files opened by it", f"those {len(stale)}", str(len(opened)), opened == set(stale)),
    ]
    title = f"A sweep over {len(session_ids) + 1:,} sessions, {len(stale)} of them stale"
    return Findings([Table(title, ("",), rows)], targets)


def _take_over_s(store: persist.Store, *, after_wait: bool) -> float:
    """Return the seconds until the stream of a killed owner is cleared here.

    They begin at the kill -9 of the owner, or at the return of the wait for its end.
    """
    with _owner_of(store, [SESSION]) as process:
        session = store.load(SESSION)
        started = time.perf_counter()
        process.kill()
        if after_wait:
            process.join()
            started = time.perf_counter()
        while not session.clear_stale_stream():
            if time.perf_counter() - started > DEADLINE_S:
                raise TimeoutError("The stream of a killed process stays alive.")
        return time.perf_counter() - started


def take_overs(directory: Path, rounds: int) -> Findings:
    """Measure how soon another process can clear the stream of one that was killed."""
    store = open_store(directory)
    store.create(SESSION, conversation(MESSAGES))
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for after_wait, seconds in found.items():
            seconds.append(_take_over_s(store, after_wait=after_wait))
    names = {False: "from the kill", True: "from waitpid's return"}
    middle = {names[after_wait]: median(seconds) for after_wait, seconds in found.items()}
    targets = [at_most(f"take-over after kill -9, {name}", 20, seconds * 1e3, "ms") for name, seconds in middle.items()]
    rows = [(name, shown(seconds)) for name, seconds in middle.items()]
    return Findings([Table(f"clear_stale_stream() after kill -9, {rounds} rounds each", ("median",), rows)], targets)
