"""Several processes add messages to one conversation at the same time."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import persist
from demonstration import naive
from demonstration.part import CONTEXT, NAIVE, OURS, Message, Part, Progress

PROCESSES = 4
MESSAGES = 200
SESSION = "crowd"
_PATIENCE_S = 60.0


def add_naively(directory: Path, message: Message) -> None:
    """Add a message as many servers do."""
    path = directory / f"{SESSION}.json"
    document = naive.load(path)
    document["messages"].append(message)
    naive.save(path, document)


def add(directory: Path, message: Message) -> None:
    """Add a message with `persist`. Only the save is another one."""
    session = persist.Store(directory, timeout_s=_PATIENCE_S).load(SESSION)
    session.data["messages"].append(message)
    session.save()


def _writer(directory: Path, way: Callable[[Path, Message], None], name: int, ready: Barrier) -> None:
    ready.wait()
    for number in range(MESSAGES):
        way(directory, {"id": f"{name}-{number}", "role": "user", "content": "hello"})


def _crowd(directory: Path, way: Callable[[Path, Message], None]) -> tuple[int, int]:
    """Let all processes write. Return how many messages are there afterwards, and how many processes failed."""
    ready = CONTEXT.Barrier(PROCESSES)
    writers = [CONTEXT.Process(target=_writer, args=(directory, way, name, ready)) for name in range(PROCESSES)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    # Both files are plain JSON. A small session of persist has no other file.
    kept = {message["id"] for message in naive.load(directory / f"{SESSION}.json")["messages"]}
    return len(kept), sum(bool(writer.exitcode) for writer in writers)


def run(directory: Path, progress: Progress) -> Part:
    """Run the part in an empty directory."""
    apart, ours = directory / "naive", directory / "persist"
    apart.mkdir(exist_ok=True)
    naive.save(apart / f"{SESSION}.json", {"messages": []})
    persist.Store(ours).create(SESSION, {"messages": []})
    kept_naively, _ = _crowd(apart, add_naively)
    progress(0.5)
    kept, failed = _crowd(ours, add)
    total = PROCESSES * MESSAGES
    broken = {f"{total - kept} of {total} messages were lost": kept != total, f"{failed} processes failed": failed}
    return Part(
        title=f"{PROCESSES} processes add {MESSAGES} messages each to one conversation",
        ways=(NAIVE, OURS),
        rows={f"messages kept of {total}": (str(kept_naively), str(kept))},
        figures={"added": total, "kept": {"naive": kept_naively, "persist": kept}},
        broken=[what for what, is_so in broken.items() if is_so],
    )
