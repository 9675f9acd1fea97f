"""Supervise: start the server processes of a replay, kill some of them in the middle of a turn, and replace them.

In each round, every conversation is played into a session of its own. One round is enough for a few kills. While kills
are left, the next round begins, with the same conversations under new session ids.
"""

from __future__ import annotations

import random
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from persist import json_codec
from replaying.child import Child
from replaying.conversations import Conversation
from replaying.ledger import Ledger
from replaying.reports import COMMITS, Report

# A turn is killed with this chance at most, because conversations must also come to their end.
_MOST_KILLED = 0.5
_FIRST_GUESS_OF_A_TURN_S = 0.02
_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a replay: the conversations, and the store into which they are played: a directory, or a URL.

    `timeout_s` is how long a worker may be silent, and how long the store may be without a commit.
    """

    conversations: list[Conversation]
    place: Path | str
    workers: int = 4
    kills: int = 0
    seed: int = 0
    timeout_s: float = 30.0


class Progress(NamedTuple):
    """How far a replay is: its round, the turns of that round, and the kills since the start."""

    round_number: int
    turns_done: int
    turns: int
    kills: int


@dataclass(frozen=True, slots=True)
class PlannedKill:
    """A worker that is killed at a time, if it is still in the same turn."""

    at: float
    worker: Child
    start: Report


class Supervisor:
    """The supervisor, which plays rounds until all kills are done.

    Attributes:
        ledger: the reports of all processes.
        played: the conversations of all rounds.
        failures: the processes that ended by themselves or hung, with what they wrote to their standard error.
    """

    def __init__(self, plan: Plan, scratch: Path, on_progress: Callable[[Progress], None]) -> None:
        self.ledger = Ledger()
        self.played: list[Conversation] = []
        self.failures: list[str] = []
        self.rounds = 0
        self._plan = plan
        self._scratch = scratch
        self._on_progress = on_progress
        self._rng = random.Random(plan.seed)
        self._selector = selectors.DefaultSelector()
        self._workers: set[Child] = set()
        self._names_given = 0
        self._turns = 0
        self._turns_done: set[tuple[str, str | None]] = set()
        self._turn_began: dict[Child, float] = {}
        self._turn_s = _FIRST_GUESS_OF_A_TURN_S
        self._committed_at = time.monotonic()
        self._planned: PlannedKill | None = None

    def run(self) -> None:
        """Play at least one round. On return no process is left."""
        try:
            sweeper = self._start("sweeper", str(self._plan.place))
            while self.rounds == 0 or (self._kills_left and not self.failures):
                self._play_round()
            sweeper.ask_to_end()
            deadline = time.monotonic() + self._plan.timeout_s
            while self._selector.get_map() and time.monotonic() < deadline:
                self._listen()
        finally:
            self._end_all()

    @property
    def _kills_left(self) -> int:
        return self._plan.kills - len(self.ledger.killed)

    # --- a round ---

    def _play_round(self) -> None:
        self.rounds += 1
        conversations = [conversation.in_round(self.rounds) for conversation in self._plan.conversations]
        self.played += conversations
        self._score().write_bytes(json_codec.encode([list(astuple(conversation)) for conversation in conversations]))
        self._turns = sum(len(conversation.turns) for conversation in conversations)
        self._turns_done.clear()
        self._committed_at = time.monotonic()
        for _ in range(self._plan.workers):
            self._start_worker()
        while self._workers:
            self._listen()
            self._kill_if_due()
            self._fail_if_hung()

    def _score(self) -> Path:
        return self._scratch / f"round-{self.rounds}.json"

    def _start_worker(self) -> None:
        seed = f"{self._plan.seed}/{self._names_given}"
        self._workers.add(self._start("worker", str(self._plan.place), str(self._score()), seed))

    def _start(self, module: str, *arguments: str) -> Child:
        self._names_given += 1
        child = Child(f"{module}-{self._names_given}", module, list(arguments), self._scratch)
        self._selector.register(child, selectors.EVENT_READ)
        return child

    # --- what the processes say ---

    def _listen(self) -> None:
        wait_s = _TICK_S if self._planned is None else min(max(self._planned.at - time.monotonic(), 0.0), _TICK_S)
        for key, _ in self._selector.select(wait_s):
            child = key.fileobj
            assert isinstance(child, Child)
            reports = child.read()
            if reports is None:
                self._bury(child)
            else:
                self._take(child, reports)
        self._on_progress(Progress(self.rounds, len(self._turns_done), self._turns, len(self.ledger.killed)))

    def _take(self, child: Child, reports: list[Report]) -> None:
        for report in reports:
            self.ledger.take(report)
            if report.verb in COMMITS:
                self._committed_at = time.monotonic()
            if report.verb == "start":
                self._turn_began[child] = time.monotonic()
                self._plan_kill(child, report)
            elif report.verb == "finish":
                self._end_turn(child)

    def _end_turn(self, child: Child) -> None:
        assert child.last_start is not None
        self._turns_done.add((child.last_start.session_id, child.last_start.item))
        took_s = time.monotonic() - self._turn_began.pop(child)
        self._turn_s += (took_s - self._turn_s) / 20

    def _bury(self, child: Child, *, was_killed: bool = False) -> str:
        self._selector.unregister(child)
        self._workers.discard(child)
        self._turn_began.pop(child, None)
        status, errors = child.bury()
        if status != 0 and not (was_killed and status == -signal.SIGKILL):
            self.failures.append(f"{child.name} ended by itself with status {status}:\n{errors}")
        return errors

    # --- kills ---

    def _plan_kill(self, worker: Child, start: Report) -> None:
        """Plan to kill the turn that has begun, at a random instant of it, or let it live.

        The kills are spread evenly over the turns that are left.
        """
        turns_left = max(self._turns - len(self._turns_done), 1)
        chance = min(self._kills_left / turns_left, _MOST_KILLED)
        if self._planned is None and self._rng.random() < chance:
            self._planned = PlannedKill(time.monotonic() + self._rng.uniform(0, self._turn_s), worker, start)

    def _kill_if_due(self) -> None:
        planned = self._planned
        if planned is None or time.monotonic() < planned.at:
            return
        self._planned = None
        worker = planned.worker
        if worker in self._workers and worker.is_in_turn and worker.last_start is planned.start:
            self._kill(worker, planned.start)

    def _kill(self, worker: Child, start: Report) -> None:
        worker.kill()
        while (reports := worker.read()) is not None:
            self._take(worker, reports)
        # The worker may have ended the turn, or begun another one, before the signal came.
        assert worker.last_start is not None
        for turn in (start, worker.last_start):
            self.ledger.unsure.add((turn.session_id, turn.item or ""))
        if worker.is_in_turn and worker.last_start.stream_id is not None:
            self.ledger.killed.add(worker.last_start.stream_id)
        self._bury(worker, was_killed=True)
        if worker.process.returncode == -signal.SIGKILL:
            self._start_worker()

    # --- failures ---

    def _fail_if_hung(self) -> None:
        now, timeout_s = time.monotonic(), self._plan.timeout_s
        is_stuck = now - self._committed_at > timeout_s
        for worker in list(self._workers):
            if is_stuck or now - worker.heard_at > timeout_s:
                worker.kill()
                errors = self._bury(worker, was_killed=True)
                what = "found nothing that it could commit" if is_stuck else "said nothing"
                self.failures.append(f"{worker.name} {what} for {timeout_s:g} s and was ended:\n{errors}")

    def _end_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            child = key.fileobj
            assert isinstance(child, Child)
            child.kill()
            self._bury(child, was_killed=True)
            self.failures.append(f"{child.name} did not end by itself, and was ended.")
        self._selector.close()
