"""The common parts of the long runs: the types of their arguments, and a run of many crashes on a store."""

from __future__ import annotations

import argparse
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import persist
from harness.acknowledged import Figures
from harness.journaling import Journaling, add_journaling, journaling_of

SECONDS_A_LINE = 10.0
MOST_FINDINGS_SHOWN = 20
# A shell reports this status for a program that SIGINT has ended.
INTERRUPTED = 130


# --- arguments --------------------------------------------------------------------------------------------------------

# A run that counts nothing would pass without having looked. That is a mistake in its arguments, not a result.


def positive(text: str) -> int:
    """Parse a number of things, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def not_negative(text: str) -> int:
    """Parse a number of things that may also be left out."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def duration(text: str) -> float:
    """Parse a time that is longer than none."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return number


def share(text: str) -> float:
    """Parse a part of a whole."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return number


def existing_directory(text: str) -> Path:
    """Parse a directory to work in. It is not made, because a misspelt name would put gigabytes in a strange place."""
    directory = Path(text)
    if not directory.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {text!r}")
    return directory


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """The number of crashes, and the settings of a run.

    `keep_going` counts all faults instead of ending at the first. `patience_s` is how long a healthy store may take, at
    the worst, to commit anything at all.
    """

    crashes: int = 10_000
    seed: int = 0
    keep_going: bool = False
    patience_s: float = 30.0
    journaling: Journaling = field(default_factory=Journaling)
    is_interrupted: Callable[[], bool] = lambda: False


class Run:
    """The common parts of the runs. A subclass makes the crashes.

    Attributes:
        crashes: the word for the crashes in what the run prints.
    """

    crashes: str

    def __init__(self, plan: Plan) -> None:
        self.figures = Figures()
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._started = self._last_line = time.monotonic()

    def _is_over(self) -> bool:
        is_broken = not (self.figures.is_sound or self._plan.keep_going) or self.figures.idle > 0
        return self.figures.crashes >= self._plan.crashes or is_broken or self._plan.is_interrupted()

    def _tell(self) -> None:
        """Print the figures, if it is time for it."""
        if time.monotonic() - self._last_line > SECONDS_A_LINE:
            self._last_line = time.monotonic()
            print(self.figures.shown(self.crashes), flush=True)

    def tell_result(self, prefix: str = "") -> int:
        """Print the findings and the figures. Return the exit status. A run that was cut short has not passed."""
        for finding in self.figures.findings[:MOST_FINDINGS_SHOWN]:
            print(f"{prefix}{finding}")
        is_interrupted = self._plan.is_interrupted()
        end = "; interrupted" if is_interrupted else ""
        print(f"{prefix}{self.figures.shown(self.crashes)}; {time.monotonic() - self._started:.0f} s{end}", flush=True)
        if not self.figures.is_sound:
            return 1
        return INTERRUPTED if is_interrupted else 0


def arguments_of(
    parser: argparse.ArgumentParser, given: list[str] | None, crashes: str
) -> tuple[argparse.Namespace, Plan]:
    """Parse a command line, to which the options of every run are added. Print the seed.

    Ctrl-C ends the run from here on.
    """
    parser.add_argument(f"--{crashes}", type=positive, default=Plan().crashes, help="how many; default %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time; it is printed")
    parser.add_argument("--keep-going", action="store_true", help="count all faults instead of ending at the first")
    parser.add_argument(
        "--patience",
        type=duration,
        metavar="SECONDS",
        default=Plan().patience_s,
        help="a run in which nothing is committed for so long has failed; default %(default)g",
    )
    add_journaling(parser)
    options = parser.parse_args(given)
    is_interrupted = ask_on_interrupt()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}, persist from {Path(persist.__file__).parent}", flush=True)
    journaling = journaling_of(options)
    return options, Plan(
        getattr(options, crashes), seed, options.keep_going, options.patience, journaling, is_interrupted
    )


def ask_on_interrupt() -> Callable[[], bool]:
    """Make Ctrl-C do only one thing from here on: the returned function says True.

    So a run ends after the crash at hand, with its figures.
    """
    asked = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: asked.set())
    return asked.is_set
