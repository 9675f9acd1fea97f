"""Outcome: a plan is played, the store is compared with what was played, and the result is put into figures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from persist.store import Store
from replaying.ledger import Ledger
from replaying.supervise import Plan, Progress, Supervisor
from replaying.verdict import Finding, compare, is_of_files
from replaying.worker import LEASE_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of a replay. `findings` are the faults in the store, `failures` the processes that failed and how."""

    rounds: int
    sessions: int
    turns: int
    messages: int
    commits: int
    playing_s: float
    commits_per_s: float
    commit_p50_ms: float
    commit_p99_ms: float
    kills: int
    stale_cleared: int
    merged: int
    conflicts: int
    busy: int
    findings: list[Finding] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return sum(finding.kind == "lost" for finding in self.findings)

    @property
    def doubled(self) -> int:
        return sum(finding.kind == "doubled" for finding in self.findings)

    @property
    def is_clean(self) -> bool:
        return not self.findings and not self.failures


def replay(plan: Plan, on_progress: Callable[[Progress], None] = lambda _: None) -> Outcome:
    """Play the plan to its end and compare the store with what was played.

    The store must be empty or new.
    """
    store = Store(plan.place, timeout_s=plan.timeout_s)
    with tempfile.TemporaryDirectory(prefix="persist-replay-") as scratch:
        supervisor = Supervisor(plan, Path(scratch), on_progress)
        started = time.monotonic()
        supervisor.run()
        playing_s = time.monotonic() - started
    return _judge(store, supervisor, playing_s)


def _judge(store: Store, supervisor: Supervisor, playing_s: float) -> Outcome:
    ledger, played = supervisor.ledger, supervisor.played
    _sweep(store, ledger)
    if is_of_files(store):
        _commit_over_left_overs(store)
    return Outcome(
        rounds=supervisor.rounds,
        sessions=len(played),
        turns=sum(len(conversation.turns) for conversation in played),
        messages=sum(len(conversation.messages) for conversation in played),
        commits=len(ledger.commits_s),
        playing_s=playing_s,
        commits_per_s=len(ledger.commits_s) / playing_s,
        commit_p50_ms=ledger.commit_ms(0.5),
        commit_p99_ms=ledger.commit_ms(0.99),
        kills=len(ledger.killed),
        stale_cleared=ledger.stale_cleared,
        merged=ledger.merged,
        conflicts=ledger.conflicts,
        busy=ledger.busy,
        findings=compare(store, played, ledger),
        failures=supervisor.failures,
    )


def _sweep(store: Store, ledger: Ledger) -> None:
    """Clear the streams of the workers that were killed last. In a database their leases have to run out first.

    The failures of this sweep are left out, because the comparison names each damaged session.
    """
    deadline = time.monotonic() + 2 * LEASE_S
    while True:
        ledger.cleared.update(cleared.stream_id for cleared in store.clear_stale_streams().cleared)
        if is_of_files(store) or not store.streams() or time.monotonic() > deadline:
            return
        time.sleep(0.1)


def _commit_over_left_overs(store: Store) -> None:
    """Commit to each session that has a left-over temporary file, because its next commit removes the file.

    A kill inside a session's last commit leaves such a file.
    """
    for problem in store.check():
        if problem.kind == "left-over" and store.exists(problem.session_id):
            store.update(problem.session_id, lambda tx: tx.data.update(has_left_over=True))
