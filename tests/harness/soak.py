"""Soak: many commits of every kind in one process. Descriptors, memory and files must stay as they were.

At the end every session must hold what was committed to it, and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import persist
from harness.acknowledged import stray_files
from harness.faults import descriptors
from harness.journaling import LOAD_BYTES, Journaling, add_journaling, journaling_of, load_of
from harness.runs import existing_directory, positive

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SESSIONS = 20
KEPT_MESSAGES = 10
# Caches and the allocator's arenas fill up first. That takes until each store has met each session, large and small.
# With this bound some large sessions leave the cache again.
CACHE_BYTES = 512 * 1024
WARM_UP, WARM_UP_COMMITS, MOST_WARM_UP = 0.2, 12_000, 0.6


@dataclass(frozen=True, slots=True)
class Soaked:
    """The findings of a soak. `grown_bytes` is the resident memory at the end less that after the warm-up.

    `wrong` names the sessions that do not hold what was committed to them.
    """

    commits: int
    descriptors_before: int
    descriptors_after: int
    grown_bytes: int
    stray: list[str]
    problems: int
    wrong: list[str]

    @property
    def faults(self) -> list[str]:
        found = []
        if self.descriptors_after != self.descriptors_before:
            found.append(f"descriptors went from {self.descriptors_before} to {self.descriptors_after}")
        if self.grown_bytes >= 1_000_000:
            found.append(f"memory grew by {self.grown_bytes:,} bytes")
        if self.stray or self.problems:
            found.append(f"left over: {self.stray}, {self.problems} problems")
        if self.wrong:
            found.append(f"not what was committed: {self.wrong}")
        return found


@dataclass(slots=True)
class Expected:
    """The content that a session must hold."""

    n: int = 0
    load_bytes: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)

    def is_shown_by(self, data: dict[str, Any]) -> bool:
        shown = (
            data["n"],
            data["messages"],
            data["tool_calls"],
            data.get("active_stream_id"),
            data.get("pending_user_message"),
        )
        return shown == (self.n, self.messages, load_of(self.load_bytes), None, None)


def soak(directory: Path, commits: int, journaling: Journaling) -> Soaked:
    """Make at least so many commits, over sessions that come and go, and look at what is left of them.

    The stores fill in what `journaling` leaves open: there is one store for each way, and they take turns.
    """
    stores = [each.open(directory, cache_bytes=CACHE_BYTES) for each in journaling.all()]
    # Objects that others in this process have dropped must not be closed while we count.
    gc.collect()
    before, warm, done = len(descriptors()), 0, 0
    expected: dict[str, Expected] = {}
    warm_up = max(commits * WARM_UP, min(commits * MOST_WARM_UP, WARM_UP_COMMITS))
    number = 0
    while done < commits:
        # Each session meets each store.
        store = stores[(number % SESSIONS + number // SESSIONS) % len(stores)]
        done += _one_round(store, f"s-{number % SESSIONS}", f"r{number}", expected)
        number += 1
        if not warm and done >= warm_up:
            warm = _resident_bytes()
    gc.collect()
    after, grown = len(descriptors()), _resident_bytes() - warm
    wrong = list(_wrong_sessions(stores[0], expected))
    return Soaked(done, before, after, grown, list(stray_files(directory)), len(stores[0].check()), wrong)


def _wrong_sessions(store: persist.Store, expected: dict[str, Expected]) -> Iterator[str]:
    found = store.ids()
    yield from sorted(expected.keys() ^ set(found))
    for session_id in expected.keys() & set(found):
        if not expected[session_id].is_shown_by(store.load(session_id).data):
            yield session_id


def _one_round(store: persist.Store, session_id: str, name: str, expected: dict[str, Expected]) -> int:
    """Make every kind of commit once, on one session. Return the number of commits."""
    if session_id not in expected:
        with store.transaction(session_id, create=True) as tx:
            tx.data.update({"messages": [], "tool_calls": [], "n": 0})
        expected[session_id] = Expected()
        return 1
    there = expected[session_id]
    session = store.load(session_id)
    message = {"id": name, "role": "user", "content": f"{name} " * 100}
    store.append(session_id, "messages", message)
    pair = [{"id": f"{name}-{half}", "role": "user", "content": name} for half in (1, 2)]
    # The second one finds the pair, and makes no commit.
    for _ in range(2):
        store.extend(session_id, "messages", pair)
    store.tail(session_id, limit=3)
    session.data["n"] += 1
    session.save()
    store.update(session_id, _count)
    there.n += 2
    turn = _turn(store, session_id, name, is_finished=there.n % 6 != 0)
    there.messages = [*there.messages, message, *pair, *turn][-KEPT_MESSAGES:]
    with store.transaction(session_id) as tx:
        data = tx.data
        del data["messages"][:-KEPT_MESSAGES]
        if there.n % 14 == 0:
            # A small session becomes a large one, and a large one small.
            there.load_bytes = LOAD_BYTES - there.load_bytes
            data["tool_calls"] = load_of(there.load_bytes)
    if there.n % 10 == 0:
        store.compact(session_id)
    if there.n % 100 == 0:
        assert len([*store.heads()]) == len(expected)
        store.delete(session_id, if_version=store.head(session_id).version)
        del expected[session_id]
    return 9


def _count(tx: persist.Transaction) -> None:
    tx.data["n"] += 1


def _turn(store: persist.Store, session_id: str, name: str, *, is_finished: bool) -> list[dict[str, Any]]:
    """Run one turn. Return the messages that it must leave."""
    prompt, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"{name} Be"}
    tool = {"id": f"{name}-tool", "role": "tool", "content": name}
    with store.start_stream(session_id, prompt, stream_id=f"{name}-t") as stream:
        stream.checkpoint(answer)
        with stream.transaction() as tx:
            tx.list("messages").append(tool)
            tx.fields["running"] = name
        assert not stream.is_cancelled()
        if is_finished:
            answer["content"] += "cause."
            stream.finish(answer, fields={"finished": name})
    mark = {} if is_finished else {"interrupted": True}
    return [{"id": f"{name}-t.prompt", **prompt, **mark}, tool, {"id": f"{name}-t.answer", **answer, **mark}]


def _resident_bytes() -> int:
    gc.collect()
    # Memory that large documents have left free must not count, because it is chance how much of it the allocator
    # keeps.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--commits", type=positive, default=100_000, help="at least so many; default 100,000")
    parser.add_argument(
        "--directory",
        type=existing_directory,
        help="where to make the scratch store; by default the temporary directory",
    )
    add_journaling(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        soaked = soak(Path(scratch) / "sessions", options.commits, journaling_of(options))
    print(f"commits                {soaked.commits:>12,}")
    print(f"descriptors            {soaked.descriptors_before:>6} -> {soaked.descriptors_after}")
    print(f"memory after warm-up   {soaked.grown_bytes / 1024:>+12,.0f} KiB")
    print(f"stray files            {len(soaked.stray):>12}")
    print(f"wrong sessions         {len(soaked.wrong):>12}")
    for fault in soaked.faults:
        print(f"FAULT: {fault}")
    return 1 if soaked.faults else 0


if __name__ == "__main__":
    sys.exit(main())
