"""A worker is killed in the middle of an answer. What is left of the turn, and how does the conversation go on?"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import persist
from demonstration import naive
from demonstration.part import CONTEXT, NAIVE, OURS, Part, Progress

KILLS = 20
SESSION = "killed"
_WORD_S = 0.001
_WORDS_A_CHECKPOINT = 5
#: The worker dies when its follower has seen this many words, drawn from this range.
_SEEN = (20, 60)
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The remains of one turn.

    Attributes:
        prompt, partial: whether the question, and the answer so far, are among the messages.
        resumed: whether a follower went on at another worker, and saw each word once.
        next_turn_s: seconds from the kill to the start of the next turn. None if the session stays busy.
    """

    prompt: bool
    partial: bool
    resumed: bool
    next_turn_s: float | None


def _question(number: int) -> dict[str, Any]:
    return {"id": f"question-{number}", "role": "user", "content": f"What is {number} and {number}?"}


def _words() -> Iterator[str]:
    """Yield the words of a model, as they come."""
    for number in range(1_000_000):
        time.sleep(_WORD_S)
        yield f"word{number} "


# --- load, change, write ---------------------------------------------------------------------------------------------


def _work_naively(path: Path, number: int, follower: Connection) -> None:
    """Run a turn as many servers do. The answer stays in memory until its end."""
    document = naive.load(path)
    document["active_stream_id"] = f"stream-{number}"
    document["pending_user_message"] = _question(number)["content"]
    naive.save(path, document)
    said = []
    for word in _words():
        said.append(word)
        follower.send(word)
    document["messages"] += [_question(number), {"role": "assistant", "content": "".join(said)}]
    document["active_stream_id"] = document["pending_user_message"] = None
    naive.save(path, document)


def kill_naively(directory: Path, number: int, seen: int) -> Outcome:
    """Kill a naive worker, and look at the file that another worker finds."""
    path = directory / f"{SESSION}-{number}.json"
    naive.save(path, {"messages": [], "active_stream_id": None, "pending_user_message": None})
    follower, end = CONTEXT.Pipe(duplex=False)
    worker = CONTEXT.Process(target=_work_naively, args=(path, number, end))
    worker.start()
    end.close()
    words = [follower.recv() for _ in range(seen)]
    worker.kill()
    worker.join()
    document = naive.load(path)
    contents = [message["content"] for message in document["messages"]]
    return Outcome(
        prompt=_question(number)["content"] in contents,
        partial=any(content.startswith("".join(words[:_WORDS_A_CHECKPOINT])) for content in contents),
        # The words after the last one that was seen died with the worker.
        resumed=False,
        # Nothing tells a dead stream from a live one that is slow.
        next_turn_s=None if document["active_stream_id"] else 0.0,
    )


# --- persist ---------------------------------------------------------------------------------------------------------


def _work(directory: Path, number: int, told: Connection) -> None:
    """Run a turn with `persist`. Report each promise when `persist` has made it."""
    store = persist.Store(directory)
    with store.start_stream(SESSION, _question(number)) as stream:
        told.send(("started", stream.id))
        said = ""
        for count, word in enumerate(_words(), 1):
            said += word
            offset = stream.emit({"word": word})
            if count % _WORDS_A_CHECKPOINT == 0:
                stream.checkpoint({"id": f"answer-{number}", "role": "assistant", "content": said})
                told.send(("checkpoint", said))
            told.send(("emitted", offset))
        stream.finish({"id": f"answer-{number}", "role": "assistant", "content": said})


def kill(store: persist.Store, number: int, seen: int) -> Outcome:
    """Kill a worker of `persist`, follow the rest of its words at another one, and start the next turn."""
    reports, end = CONTEXT.Pipe(duplex=False)
    worker = CONTEXT.Process(target=_work, args=(Path(store.path), number, end))
    worker.start()
    end.close()
    stream_id = reports.recv()[1]
    with store.follow(SESSION, stream_id) as following:
        # After these events the follower loses its connection.
        events = [next(following) for _ in range(seen)]
    worker.kill()
    killed_at = time.perf_counter()
    with _next_turn(store) as following_turn:
        next_turn_s = time.perf_counter() - killed_at
        following_turn.fail()
    promised = _promised(reports, worker)
    another = persist.Store(store.path)
    with another.follow(SESSION, stream_id, after=events[-1].offset) as following:
        events += following
    ended = following.ended
    messages = another.load(SESSION).data["messages"]
    partial = next((message["content"] for message in messages if message["id"] == f"answer-{number}"), "")
    offsets = [event.offset for event in events]
    return Outcome(
        prompt={**_question(number), "interrupted": True} in messages,
        partial=partial.startswith(promised["checkpoint"]),
        resumed=offsets == list(range(1, len(offsets) + 1)) and len(offsets) >= promised["emitted"] and ended == "died",
        next_turn_s=next_turn_s,
    )


def _next_turn(store: persist.Store) -> persist.Stream:
    """Start the next turn as soon as the session is free."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return store.start_stream(SESSION)
        except persist.SessionBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.0005)


def _promised(reports: Connection, worker: BaseProcess) -> dict[str, Any]:
    """Return the last report of each kind that a dead worker has sent."""
    promised: dict[str, Any] = {"checkpoint": "", "emitted": 0}
    # The worker may have died in the middle of a report.
    with suppress(EOFError, OSError):
        while True:
            promised.update([reports.recv()])
    worker.join()
    return promised


# ---------------------------------------------------------------------------------------------------------------------


def run(directory: Path, progress: Progress) -> Part:
    """Run the part in an empty directory."""
    apart = directory / "naive"
    apart.mkdir(exist_ok=True)
    store = persist.Store(directory / "persist")
    store.create(SESSION, {"title": "A worker that is killed", "messages": []})
    outcomes: tuple[list[Outcome], list[Outcome]] = [], []
    for number in range(KILLS):
        seen = random.randrange(*_SEEN)
        outcomes[0].append(kill_naively(apart, number, seen))
        outcomes[1].append(kill(store, number, seen))
        progress(number / KILLS)
    kept = {
        what: [sum(getattr(each, name) for each in way) for way in outcomes]
        for name, what in (
            ("prompt", "the question is kept"),
            ("partial", "the answer so far is kept"),
            ("resumed", "a follower resumes: no gap, no repeat"),
        )
    }
    waits = [[each.next_turn_s for each in way if each.next_turn_s is not None] for way in outcomes]
    rows = {what: (f"{naively} of {KILLS}", f"{ours} of {KILLS}") for what, (naively, ours) in kept.items()}
    rows["the next turn can start"] = (_shown(waits[0]), _shown(waits[1]))
    return Part(
        title=f"A worker is killed in the middle of an answer, {KILLS} times",
        ways=(NAIVE, OURS),
        rows=rows,
        figures={
            "kills": KILLS,
            **{what: {"naive": naively, "persist": ours} for what, (naively, ours) in kept.items()},
            "next turn after, s": {"naive": waits[0], "persist": waits[1]},
        },
        broken=[f"{what}: {ours} of {KILLS}" for what, (_, ours) in kept.items() if ours != KILLS],
    )


def _shown(waits: list[float]) -> str:
    # Nothing tells others that the turn is dead, so the session stays busy.
    return f"after {statistics.median(waits) * 1000:.0f} ms" if waits else "never: it looks busy"
