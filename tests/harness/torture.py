"""kill -9 at random instants: writers, stream owners, gardeners, sweepers and readers on one store, killed and replaced.

After each kill every session is read and held against what was acknowledged over a pipe *after* the verb had returned; an
append that was cut off is tried again. At the end nothing may be left but documents and their locks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from harness.acknowledged import Figures
from harness.authors import Hand, garden, look, own, sweep, write
from harness.runs import Plan, Run, arguments_of, existing_directory, positive
from harness.watch import Watch

ROLES = (write, own, garden, write, own, sweep, look, write)
LONGEST_PAUSE_S = 0.02
HUNG_AFTER_S = 60.0


class Torture(Run):
    """One run among so many processes; `run` returns its figures."""

    crashes = "kills"

    def __init__(self, directory: Path, workers: int, plan: Plan) -> None:
        super().__init__(plan)
        self._workers = workers
        self._watch = Watch(directory, self.figures, plan.seed)
        self._last_progress = (time.monotonic(), 0)

    def run(self) -> Figures:
        watch, crew = self._watch, self._watch.crew
        watch.open()
        watch.share()
        try:
            for number in range(self._workers):
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workers", type=positive, default=len(ROLES), help="processes at a time; default %(default)s")
    parser.add_argument("--directory", type=existing_directory, help="where to make the store; it is removed if all is well")
    options, plan = arguments_of(parser, arguments, Torture.crashes)
    parent = tempfile.mkdtemp(prefix="persist-torture-", dir=options.directory)
    print(f"{options.workers} processes, {parent}", flush=True)
    torture = Torture(Path(parent, "sessions"), options.workers, plan)
    is_sound = torture.run().is_sound
    torture.tell_result()
    if not is_sound:
        return 1
    shutil.rmtree(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
