"""The cost of one step of a LangGraph thread, with `PersistSaver` and with `SqliteSaver`, side by side.

A step is two calls of LangGraph's loop: one `put_writes` of a task, and one `put` of the next checkpoint. The graph has
a small state: a counter, the last message, and a text of 1,000 characters that never changes. Both savers make each
call durable before they return: `persist` always does, and SQLite runs with ``synchronous=FULL``.
"""

from __future__ import annotations

import sqlite3
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costs import Row, report, scratch
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.sqlite import SqliteSaver

from persist.adapters.langgraph import PersistSaver


@dataclass(frozen=True)
class Cost:
    """The medians of one saver, in seconds.

    Attributes:
        first_s: a put among the first steps, from the second one on.
        last_s: a put among the last steps.
        writes_s: a put_writes among the last steps.
        read_s: a get_tuple of the last checkpoint.
        bytes: the size of all files.
    """

    first_s: float
    last_s: float
    writes_s: float
    read_s: float
    bytes: int


@contextmanager
def persist_saver(directory: Path) -> Iterator[PersistSaver]:
    yield PersistSaver(directory / "threads")


@contextmanager
def sqlite_saver(directory: Path) -> Iterator[SqliteSaver]:
    with closing(sqlite3.connect(directory / "threads.sqlite", check_same_thread=False)) as connection:
        saver = SqliteSaver(connection)
        saver.setup()
        # In WAL mode the default of some builds is NORMAL, which may lose commits in a power cut.
        connection.execute("PRAGMA synchronous=FULL")
        yield saver


def _steps(saver: BaseCheckpointSaver[Any], steps: int, message_chars: int) -> Iterator[tuple[float, float]]:
    """Play the steps of a thread. Yield the seconds of each put_writes and of each put."""
    config: Any = {"configurable": {"thread_id": "t-1", "checkpoint_ns": ""}}
    checkpoint = empty_checkpoint()
    config = saver.put(config, checkpoint, {"source": "input", "step": -1, "parents": {}}, {})
    versions: dict[str, Any] = {}
    for step in range(steps):
        message = {"id": f"m{step}", "role": "user", "content": "x" * message_chars}
        began = time.perf_counter()
        saver.put_writes(config, [("count", step), ("last", message)], f"task-{step}", "~__pregel_pull, node")
        wrote = time.perf_counter()
        new = {name: saver.get_next_version(versions.get(name), None) for name in ("count", "last")}
        versions = {**versions, **new}
        if "fixed" not in versions:
            new["fixed"] = versions["fixed"] = saver.get_next_version(None, None)
        checkpoint = {
            **checkpoint,
            "id": str(uuid6(clock_seq=step)),
            "channel_values": {"count": step, "last": message, "fixed": "y" * 1000},
            "channel_versions": versions,
            "versions_seen": {"node": versions},
        }
        config = saver.put(config, checkpoint, {"source": "loop", "step": step, "parents": {}}, new)
        yield wrote - began, time.perf_counter() - wrote


def measure(directory: Path, kind: str, *, steps: int = 400, message_chars: int = 200) -> Cost:
    """Measure one saver in a new directory: "persist" or "sqlite"."""
    directory.mkdir()
    with {"persist": persist_saver, "sqlite": sqlite_saver}[kind](directory) as saver:
        times = list(_steps(saver, steps, message_chars))
        reads = []
        for _ in range(20):
            began = time.perf_counter()
            assert saver.get_tuple({"configurable": {"thread_id": "t-1", "checkpoint_ns": ""}}) is not None
            reads.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    edge = max(5, steps // 20)
    return Cost(
        first_s=statistics.median(put for _, put in times[1 : edge + 1]),
        last_s=statistics.median(put for _, put in times[-edge:]),
        writes_s=statistics.median(write for write, _ in times[-edge:]),
        read_s=statistics.median(reads),
        bytes=size,
    )


def main() -> None:
    """Print the costs."""
    with scratch() as directory:
        ours, theirs = (measure(directory / kind, kind) for kind in ("persist", "sqlite"))
    report(
        "LangGraph",
        [
            Row("a put after 400 steps, to one of the first", ours.last_s / ours.first_s, "x", 2),
            Row("the same with SqliteSaver", theirs.last_s / theirs.first_s, "x"),
            Row("a put after 400 steps, to SqliteSaver's", ours.last_s / theirs.last_s, "x"),
            Row("a put_writes after 400 steps, to SqliteSaver's", ours.writes_s / theirs.writes_s, "x"),
            Row("a get_tuple after 400 steps", ours.read_s * 1e3, "ms"),
            Row("a get_tuple after 400 steps, to SqliteSaver's", ours.read_s / theirs.read_s, "x"),
            Row("the files after 400 steps, to SqliteSaver's", ours.bytes / theirs.bytes, "x"),
        ],
    )


if __name__ == "__main__":
    main()
