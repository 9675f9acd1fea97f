"""Soak: many commits of every kind in one process; descriptors, memory and files must stay as they were."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import persist
from harness.acknowledged import stray_files
from harness.faults import descriptors

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SESSIONS = 20
KEPT_MESSAGES = 10
# Caches and the allocator's arenas fill up in the first rounds.
WARM_UP = 0.2


@dataclass(frozen=True, slots=True)
class Soaked:
    """What a soak found. `grown_bytes` is the resident memory at the end less that after the warm-up."""

    commits: int
    descriptors_before: int
    descriptors_after: int
    grown_bytes: int
    stray: list[str]
    problems: int

    @property
    def faults(self) -> list[str]:
        found = []
        if self.descriptors_after != self.descriptors_before:
            found.append(f"descriptors went from {self.descriptors_before} to {self.descriptors_after}")
        if self.grown_bytes >= 1_000_000:
            found.append(f"memory grew by {self.grown_bytes:,} bytes")
        if self.stray or self.problems:
            found.append(f"left over: {self.stray}, {self.problems} problems")
        return found


def soak(directory: Path, commits: int) -> Soaked:
    """Make at least so many commits, over sessions that come and go, and count what is left of them."""
    store = persist.Store(directory)
    before, warm, done = len(descriptors()), 0, 0
    number = 0
    while done < commits:
        done += _one_round(store, f"s-{number % SESSIONS}")
        number += 1
        if not warm and done >= commits * WARM_UP:
            warm = _resident_bytes()
    gc.collect()
    after, grown = len(descriptors()), _resident_bytes() - warm
    return Soaked(done, before, after, grown, list(stray_files(directory)), len(store.check()))


def _one_round(store: persist.Store, session_id: str) -> int:
    """Every kind of commit once, on one session; returns how many commits it made."""
    if not store.exists(session_id):
        store.create(session_id, {"messages": [], "n": 0})
        return 1
    session = store.load(session_id)
    store.append(session_id, "messages", {"role": "user", "content": "x" * 300})
    session.data["n"] += 1
    session.save()
    with store.start_stream(session_id, {"role": "user", "content": "Why?"}) as stream:
        stream.checkpoint({"role": "assistant", "content": "Be"})
        assert not stream.cancelled
        if session.data["n"] % 3:
            stream.finish({"role": "assistant", "content": "Because."})
    with store.edit(session_id) as data:
        del data["messages"][:-KEPT_MESSAGES]
    if session.data["n"] % 50 == 0:
        store.delete(session_id)
    return 6


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
