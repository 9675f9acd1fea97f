"""The cost of a lock, and of a commit to a small session, alone and among many neighbours."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import filelock

import persist
from benchmarks import bare
from benchmarks.measure import Action, Effort, interleaved
from benchmarks.tables import Findings, Table, at_most, compared, ratio, shown
from benchmarks.workload import SESSION, conversation, new_message, open_store
from persist.storage.lock import Hold

#: Messages of a session of about 4 KB.
MESSAGES = 9


def copies(store: persist.Store, count: int) -> list[str]:
    """Put a committed session into the store under many names.

    The copies are written without an fsync for each, so all of them are synced at the end.
    """
    content = store.path.joinpath(f"{SESSION}.json").read_bytes()
    names = [f"{SESSION}-{i:05}" for i in range(count)]
    for name in names:
        store.path.joinpath(f"{name}.json").write_bytes(content)
    os.sync()
    return names


def _enter(lock: AbstractContextManager[object]) -> None:
    with lock:
        pass


def _raw_lock(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def _hold(path: str) -> None:
    hold = Hold(path, SESSION, 5.0)
    hold.acquire()
    hold.release()


def lock_cycles(directory: Path, effort: Effort) -> Findings:
    """Measure an uncontended lock and unlock."""
    ours, raw, fresh = (directory / f"{name}.lock" for name in ("ours", "raw", "fresh"))
    kept = filelock.FileLock(directory / "kept.lock")
    base, mine = "open + flock + close", "persist.storage.lock.Hold"
    actions = {
        mine: Action(lambda: _hold(str(ours))),
        base: Action(lambda: _raw_lock(raw)),
        "filelock.FileLock, kept": Action(lambda: _enter(kept)),
        "filelock.FileLock, fresh": Action(lambda: _enter(filelock.FileLock(fresh))),
    }
    seconds = interleaved(actions, effort)
    target = at_most("lock and unlock, uncontended", 14, seconds[mine] * 1e6, "µs")
    return Findings([compared("Lock and unlock, uncontended", seconds, base)], [target])


def saver(session: persist.Session) -> Action:
    """Return a save of one small changed field."""
    drafts = itertools.count(1)
    return Action(session.save, lambda: session.data.update(draft=next(drafts)))


def commits(directory: Path, effort: Effort) -> Findings:
    """Measure commits to a session of 4 KB."""
    store = open_store(directory)
    session = store.create(SESSION, conversation(MESSAGES))
    content = store.path.joinpath(f"{SESSION}.json").read_bytes()
    # Messages are appended to twenty copies in turn, so that no copy grows far from 4 KB.
    targets, peer = itertools.cycle(copies(store, 20)), store.path / "peer"
    base, save = "temp + fsync + rename + directory fsync", "session.save()"
    actions = {
        save: saver(session),
        "store.append()": Action(lambda: store.append(next(targets), "messages", new_message())),
        base: Action(lambda: bare.replace(peer, content)),
    }
    seconds = interleaved(actions, effort)
    target = at_most("save() of a session of 4 KB, to bare replace", 1.3, seconds[save] / seconds[base])
    return Findings([compared(f"A commit to a session of {len(content):,} bytes", seconds, base)], [target])


def neighbours(directory: Path, effort: Effort, count: int, runs: int) -> Findings:
    """Measure a save in a directory of its own, and in one with many other sessions.

    Measure the heads of all of these, too.
    """
    alone, crowded = open_store(directory / "alone"), open_store(directory / "crowded")
    sessions = {store.path: store.create(SESSION, conversation(MESSAGES)) for store in (alone, crowded)}
    copies(crowded, count)
    names = "save() alone", f"save() with {count:,} neighbours"
    actions = {name: saver(session) for name, session in zip(names, sessions.values(), strict=True)}
    found = [interleaved(actions, effort) for _ in range(runs)]
    quotient = median(run[names[1]] / run[names[0]] for run in found)
    seconds = [median(run[name] for run in found) for name in names]
    rows = [(names[0], shown(seconds[0]), "1.00 ×"), (names[1], shown(seconds[1]), ratio(quotient, 1.0))]
    target = at_most(f"save() with {count:,} neighbours, to alone", 1.25, quotient)
    each = median(_seconds_a_head(crowded, count + 1) for _ in range(runs))
    rows.append((f"heads() of {count + 1:,} sessions, each", shown(each), ""))
    targets = [target, at_most(f"heads() of {count + 1:,} sessions, each", 25, each * 1e6, "µs")]
    return Findings([Table(f"Neighbours (median of {runs} runs)", ("median", "to alone"), rows)], targets)


def _seconds_a_head(store: persist.Store, sessions: int) -> float:
    """Return how long each head of a whole directory takes, with its share of the listing."""
    started = time.perf_counter()
    found = sum(1 for _ in store.heads())
    seconds = time.perf_counter() - started
    if found != sessions:
        raise AssertionError(f"There are {sessions:,} sessions, and heads() has found {found:,}.")
    return seconds / sessions
