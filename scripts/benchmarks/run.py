"""The whole benchmark: it runs every part in a process of its own.

It prints the tables of a part when the part ends, and all targets at the end.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import persist
from benchmarks import contest, large, looks, plots, processes, processor, resources, small, stale
from benchmarks.measure import Effort, apart
from benchmarks.tables import Findings, Target, print_table, print_targets
from persist.storage.file_system import mount_of


@dataclass(frozen=True, slots=True)
class Plan:
    """The amounts that are measured."""

    contest: Effort
    counts: tuple[int, ...]
    rounds: int
    seconds: float
    locks: Effort
    commits: Effort
    neighbours: int
    neighbour_runs: int
    neighbour_effort: Effort
    stale: int
    take_overs: int
    patience_s: float
    blocks: int
    sizes: tuple[int, ...] = (10, 1_000, 10_000, 100_000)


FULL = Plan(
    contest=Effort(rounds=320, share_s=3.0, limit_s=150.0),
    counts=(1, 2, 4, 8, 16),
    rounds=3,
    seconds=2.0,
    locks=Effort(rounds=3000, share_s=5.0, limit_s=20.0),
    commits=Effort(rounds=500, share_s=5.0, limit_s=20.0),
    neighbours=20_000,
    neighbour_runs=5,
    neighbour_effort=Effort(rounds=60, share_s=5.0, limit_s=10.0),
    stale=100,
    take_overs=40,
    patience_s=60.0,
    blocks=200,
)
QUICK = Plan(
    contest=Effort(rounds=120, share_s=0.5, limit_s=4.0),
    counts=(1, 8),
    rounds=2,
    seconds=1.0,
    locks=Effort(rounds=500, share_s=1.0, limit_s=2.0),
    commits=Effort(rounds=60, share_s=1.0, limit_s=2.0),
    neighbours=1_000,
    neighbour_runs=5,
    neighbour_effort=Effort(rounds=15, share_s=1.0, limit_s=1.0),
    stale=20,
    take_overs=8,
    patience_s=4.0,
    blocks=50,
)


def run(directory: Path, plots_to: Path, *, is_quick: bool) -> int:
    """Measure all in a directory, print the tables, draw the plots, and return how many targets were missed."""
    plan, started = QUICK if is_quick else FULL, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as scratch:
        print(f"persist {persist.__version__}, Python {sys.version.split()[0]}, on {mount_of(directory)}", end="")
        print(f", {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
        targets = _measure(Path(scratch), plan, plots_to, is_quick=is_quick)
    missed = print_targets(targets)
    print(f"Took {time.monotonic() - started:.0f} s.")
    return missed


def _measure(scratch: Path, plan: Plan, plots_to: Path, *, is_quick: bool) -> list[Target]:
    field = apart(contest.field, plan.sizes, is_quick)
    print("\n".join(field.skipped), flush=True)
    print_table(contest.legend())
    costs = []
    for size in plan.sizes:
        costs.append(apart(contest.costs, _place(scratch, f"contest-{size}"), size, field.names[size], plan.contest))
        _tell(contest.findings(costs[-1]))
    targets = contest.targets(costs)
    crowds = apart(processes.measure, _place(scratch, "processes"), plan.counts, plan.rounds, plan.seconds)
    targets += _tell(processes.findings(crowds))
    for part, arguments in _others(plan).items():
        targets += _tell(apart(part, _place(scratch, part.__name__), *arguments))
    for path in apart(plots.draw, plots_to, costs, crowds):
        print(path)
    return targets


def _others(plan: Plan) -> dict[Callable[..., Findings], tuple[Any, ...]]:
    return {
        contest.growth: (plan.sizes, plan.contest),
        resources.findings: (plan.sizes, plan.patience_s),
        large.last_message: (plan.commits,),
        large.tails: (plan.commits,),
        large.beside: (plan.commits,),
        looks.heads: (plan.commits,),
        looks.openings: (plan.commits,),
        processor.processor_time: (plan.blocks,),
        large.rotation: (plan.commits,),
        small.lock_cycles: (plan.locks,),
        small.commits: (plan.commits,),
        small.neighbours: (plan.neighbour_effort, plan.neighbours, plan.neighbour_runs),
        stale.sweep: (plan.neighbours, plan.stale),
        stale.take_overs: (plan.take_overs,),
    }


def _place(scratch: Path, name: str) -> Path:
    place = scratch / name
    place.mkdir()
    return place


def _tell(findings: Findings) -> list[Target]:
    for table in findings.tables:
        print_table(table)
    return findings.targets
