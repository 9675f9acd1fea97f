"""A stale stream is cleared while a new turn starts: the race that the project began with."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import persist
from demonstration import naive
from demonstration.part import NAIVE, OURS, Part, Progress

ROUNDS = 200
SESSION = "orphan"
_PROMPT = {"role": "user", "content": "Are you there?"}
#: A conversation of some length, so that reading and writing it takes a moment.
_MESSAGES = [{"id": f"m{number}", "role": "user", "content": "hello " * 20} for number in range(200)]


def _at_once(*calls: Callable[[], object]) -> None:
    """Make several calls in threads that begin together."""
    ready = threading.Barrier(len(calls))

    def call(function: Callable[[], object]) -> None:
        ready.wait()
        try:
            function()
        except BaseException as error:
            failures.append(error)

    failures: list[BaseException] = []
    threads = [threading.Thread(target=call, args=(function,)) for function in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def orphaned_naively(directory: Path) -> bool:
    """Play one round as many servers do, and tell whether the live turn was cleared."""
    path = directory / f"{SESSION}.json"
    naive.save(path, {"active_stream_id": "of a server that has died", "messages": _MESSAGES})
    server = naive.Server(path)
    _at_once(server.clear_stale_stream, server.start_stream)
    return naive.load(path)["active_stream_id"] not in server.live


def orphaned(store: persist.Store) -> bool:
    """Play one round with `persist`."""
    _die_in_mid_turn(store)
    session, streams = store.load(SESSION), list[persist.Stream]()
    _at_once(session.clear_stale_stream, lambda: streams.append(store.start_stream(SESSION, _PROMPT)))
    is_orphaned = store.load(SESSION).active_stream_id != streams[0].id
    with streams[0]:
        if not is_orphaned:
            streams[0].finish({"role": "assistant", "content": "Yes."})
    return is_orphaned


def _die_in_mid_turn(store: persist.Store) -> None:
    """Start a turn in a process that ends at once, without a word."""
    child = os.fork()
    if child == 0:
        try:
            stream = persist.Store(store.path).start_stream(SESSION, _PROMPT)
            os._exit(0 if stream.id else 1)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("A process could not start a turn.")


def run(directory: Path, progress: Progress) -> Part:
    """Run the part in an empty directory."""
    apart = directory / "naive"
    apart.mkdir(exist_ok=True)
    store = persist.Store(directory / "persist")
    store.create(SESSION, {"messages": _MESSAGES})
    counts = [0, 0]
    for number in range(ROUNDS):
        counts[0] += orphaned_naively(apart)
        counts[1] += orphaned(store)
        progress(number / ROUNDS)
    return Part(
        title=f"A dead turn is cleared while a new turn starts, {ROUNDS} times",
        ways=(NAIVE, OURS),
        rows={f"running turns that were cleared, of {ROUNDS}": (str(counts[0]), str(counts[1]))},
        figures={"rounds": ROUNDS, "orphaned": {"naive": counts[0], "persist": counts[1]}},
        broken=[f"{counts[1]} running turns were cleared"] if counts[1] else [],
    )
