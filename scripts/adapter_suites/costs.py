"""The common parts of the adapters' cost scripts: they time calls in turns, and print rows with targets."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Timed calls of each kind.
ROUNDS = 300
#: Calls of each kind before those.
WARM_UP = 20

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        what: what was measured.
        value: the figure.
        unit: "ms", or "x" for a ratio.
        target: the figure must not be larger. None makes no demand.
    """

    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def is_missed(self) -> bool:
        """Whether the figure is larger than its target."""
        return self.target is not None and self.value > self.target


async def milliseconds(calls: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median time of each call.

    The calls run in turns, in an order drawn anew each round, so that other work of the machine hits all alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    chance = random.Random(1)
    for number in range(WARM_UP + rounds):
        for name, call in chance.sample(list(calls.items()), len(calls)):
            start = time.perf_counter()
            await call()
            if number >= WARM_UP:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a directory to measure in. ``--directory`` names the place for it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--directory", type=Path, help="where to measure; by default the temporary directory")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().directory) as place:
        yield Path(place)


def report(title: str, rows: list[Row]) -> None:
    """Print the rows.

    Raises:
        SystemExit: a target is missed, and the program was started with ``--check``. The status is 1.
    """
    print(f"== {title} (load average {os.getloadavg()[0]:.1f})")
    for row in rows:
        target = "" if row.target is None else f", target {row.target:g} {row.unit}"
        print(f"{row.what:<72} {row.value:8.3f} {row.unit}{target}{'  MISSED' if row.is_missed else ''}")
    if "--check" in sys.argv[1:] and any(row.is_missed for row in rows):
        raise SystemExit(1)
