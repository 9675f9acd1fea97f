"""kill -9 at random instants: processes of every role on one store are killed and replaced.

The roles are writers, stream owners, gardeners, sweepers, readers and followers. After each kill the harness reads
every session and compares it with the acknowledgements that came over a pipe *after* the verb had returned. An append
that was cut off is tried again. At the end nothing may be left but documents and their locks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.acknowledged import Figures, misplaced
from harness.authors import Hand, follow, garden, look, own, sweep, write
from harness.postgres import add_postgres
from harness.runs import Plan, Run, arguments_of, existing_directory, positive
from harness.watch import Watch
from persist.files import FileEngine

ROLES = (write, own, garden, write, own, sweep, look, follow, write)
LONGEST_PAUSE_S = 0.02
# The share of kills after which the parent forgets all that it knows of the sessions. From then on it may write in
# another way.
ANEW = 0.1


class Torture(Run):
    """One run among so many processes. `run` returns its figures."""

    crashes = "kills"

    def __init__(self, place: Path | str, workers: int, plan: Plan, ways: Sequence[str] = ()) -> None:
        super().__init__(plan)
        self._roles = [ROLES[number % len(ROLES)] for number in range(workers)]
        self._watch = Watch(place, self.figures, plan, ways)

    def run(self) -> Figures:
        watch, crew = self._watch, self._watch.crew
        watch.open()
        watch.share()
        try:
            for role in self._roles:
                watch.start(role)
            while not self._is_over() and watch.await_commit():
                crew.listen(self._random.uniform(0, LONGEST_PAUSE_S))
                self._disturb()
                self._tell()
            if self.figures.is_sound:
                watch.require_work_of(self._roles)
        finally:
            crew.kill_all()
        watch.blame()
        watch.look()
        watch.settle()
        if self.figures.is_sound and isinstance(watch.store._backend.engine, FileEngine):
            for what in misplaced(watch.store):
                self.figures.found("misplaced", what)
        watch.look()
        return self.figures

    def _disturb(self) -> None:
        self._replace(self._random.choice(self._watch.crew.hands))

    def _replace(self, victim: Hand) -> None:
        """Kill a process, look at the store, and start another one."""
        watch = self._watch
        change = watch.crew.kill(victim)
        self.figures.crashes += 1
        watch.blame()
        watch.try_again(victim.name, change)
        watch.look()
        watch.share()
        watch.retire()
        watch.start(victim.role)
        if self._random.random() < ANEW:
            watch.open()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workers", type=positive, default=len(ROLES), help="processes at a time; default %(default)s")
    parser.add_argument(
        "--directory", type=existing_directory, help="where to make the store; it is removed if all is well"
    )
    add_postgres(parser)
    options, plan = arguments_of(parser, arguments, Torture.crashes)
    if options.postgres is not None:
        from harness.torture_postgres import run

        return run(options.postgres, options.workers, plan)
    parent = tempfile.mkdtemp(prefix="persist-torture-", dir=options.directory)
    print(f"{options.workers} processes, {parent}", flush=True)
    torture = Torture(Path(parent, "sessions"), options.workers, plan)
    if torture.run().is_sound:
        shutil.rmtree(parent)
    return torture.tell_result()


if __name__ == "__main__":
    sys.exit(main())
