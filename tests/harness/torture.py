"""kill -9 at random instants: writers, stream owners, gardeners, sweepers and readers on one store, killed and replaced.

After each kill every session is read and held against what was acknowledged over a pipe *after* the verb had returned; an
append that was cut off is tried again. At the end nothing may be left but documents and their locks.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import persist
from harness.acknowledged import Figures
from harness.authors import Hand, garden, look, own, sweep, write
from harness.watch import Watch, ask_on_interrupt

ROLES = (write, own, garden, write, own, sweep, look, write)
LONGEST_PAUSE_S = 0.02
HUNG_AFTER_S = 60.0
SECONDS_A_LINE = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How often to kill, among how many processes. `keep_going` counts all faults instead of ending at the first."""

    directory: Path
    kills: int = 10_000
    workers: int = len(ROLES)
    seed: int = 0
    keep_going: bool = False
    is_interrupted: Callable[[], bool] = lambda: False


class Torture:
    """One run; `run` returns its figures."""

    def __init__(self, plan: Plan) -> None:
        self.figures = Figures()
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._watch = Watch(plan.directory, self.figures, plan.seed)
        self._last_progress = (time.monotonic(), 0)
        self._last_line = time.monotonic()

    def run(self) -> Figures:
        watch, crew = self._watch, self._watch.crew
        watch.open()
        watch.share()
        try:
            for number in range(self._plan.workers):
                watch.start(ROLES[number % len(ROLES)])
            while not self._is_over():
                crew.listen(self._random.uniform(0, LONGEST_PAUSE_S))
                self._replace(self._random.choice(crew.hands))
                self._end_if_hung()
                self._tell()
        finally:
            crew.kill_all()
        watch.blame()
        watch.look()
        watch.settle()
        watch.look()
        return self.figures

    def _is_over(self) -> bool:
        is_broken = not (self.figures.is_sound or self._plan.keep_going)
        return self.figures.crashes >= self._plan.kills or is_broken or self._plan.is_interrupted()

    def _replace(self, victim: Hand) -> None:
        watch = self._watch
        change = watch.crew.kill(victim)
        self.figures.crashes += 1
        watch.blame()
        watch.try_again(victim.name, change)
        watch.look()
        watch.share()
        watch.retire()
        watch.start(victim.role)

    def _end_if_hung(self) -> None:
        now, before = time.monotonic(), self._last_progress
        if self.figures.acknowledged > before[1]:
            self._last_progress = (now, self.figures.acknowledged)
        elif now - before[0] > HUNG_AFTER_S:
            self.figures.found("stuck", f"no commit for {HUNG_AFTER_S:g} s")

    def _tell(self) -> None:
        if time.monotonic() - self._last_line > SECONDS_A_LINE:
            self._last_line = time.monotonic()
            print(self.figures.shown("kills"), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=len(ROLES))
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time; it is printed")
    parser.add_argument("--directory", type=Path, default=None, help="where to make the store; it is removed if all is well")
    parser.add_argument("--keep-going", action="store_true", help="count all faults instead of ending at the first")
    options = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    parent = tempfile.mkdtemp(prefix="persist-torture-", dir=options.directory)
    print(f"seed {seed}, {options.workers} processes, {parent}, persist from {Path(persist.__file__).parent}", flush=True)
    plan = Plan(Path(parent, "sessions"), options.kills, options.workers, seed, options.keep_going, ask_on_interrupt())
    started = time.monotonic()
    figures = Torture(plan).run()
    for finding in figures.findings[:20]:
        print(finding)
    print(f"{figures.shown('kills')}; {time.monotonic() - started:.0f} s")
    if not figures.is_sound:
        return 1
    shutil.rmtree(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
