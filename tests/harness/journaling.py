"""The way the stores of a harness write: which sessions get a journal, and when it is folded.

Both are preferences of the writer. So the stores of one run may differ, and each takes over what another has left.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import persist
from harness.files import file_engine
from persist.storage.commit import ENTER_BYTES, Mode
from persist.storage.journal import ROOM_BYTES

MIXED: Final = "mixed"
MODES: tuple[Mode, ...] = get_args(Mode)
FOLDS: dict[str, float | None] = {"normal": None, "1": 1, "never": math.inf}
"""When a journal is folded: at its normal size, at every commit, or never."""

ROOM_BYTES_OF = {"normal": 1024, "1": ROOM_BYTES, "never": ROOM_BYTES}
"""When it gets room for more: soon, or at its normal size, which a journal comes to that is never folded."""

LOAD_BYTES = ENTER_BYTES + 4096
"""With so much a session is a large one, whatever else it holds; without, a small one."""


LEASE_S = 2.0
"""How long a killed process counts as alive, where the kernel cannot tell."""


def is_url(place: Path | str) -> bool:
    """Tell whether a store is in a database."""
    return "://" in str(place)


@dataclass(frozen=True, slots=True)
class Journaling:
    """A preference: one of `MODES` and one of `FOLDS`. "mixed" lets each store draw its own."""

    mode: Mode | Literal["mixed"] = MIXED
    fold: str = MIXED

    def drawn(self, random: random.Random) -> Journaling:
        """Return a preference with nothing left open."""
        mode = random.choice(MODES) if self.mode == MIXED else self.mode
        fold = random.choice(list(FOLDS)) if self.fold == MIXED else self.fold
        return Journaling(mode, fold)

    def open(self, place: Path | str, **options: Any) -> persist.Store:
        """Open a store that writes in this way. Nothing may be left open in the preference.

        A store in a database (`place` is its URL) has no journals, and leases that a test can wait for.
        """
        if self.mode == MIXED:
            raise ValueError("draw first")
        if is_url(place):
            return persist.Store(place, **{"lease_s": LEASE_S, **options})
        store = persist.Store(place, journal=self.mode, **options)
        written = file_engine(store).options
        written.fold_bytes = FOLDS[self.fold]
        # Journals are short here, so none would get room at its normal size.
        written.room_bytes = ROOM_BYTES_OF[self.fold]
        written.verifies_folds = True
        return store

    def all(self) -> list[Journaling]:
        """Return each preference that may be drawn."""
        modes = MODES if self.mode == MIXED else (self.mode,)
        folds = FOLDS if self.fold == MIXED else [self.fold]
        return [Journaling(mode, fold) for mode in modes for fold in folds]


def add_journaling(parser: argparse.ArgumentParser) -> None:
    """Add the options --journal and --fold."""
    each = "'mixed' lets each store draw its own; default mixed"
    parser.add_argument(
        "--journal", choices=[*MODES, MIXED], default=MIXED, help=f"which sessions get a journal; {each}"
    )
    parser.add_argument(
        "--fold", choices=[*FOLDS, MIXED], default=MIXED, help=f"when it is folded; 1 is always; {each}"
    )


def journaling_of(options: argparse.Namespace) -> Journaling:
    """Return the preference that the options of `add_journaling` ask for."""
    return Journaling(options.journal, options.fold)


def load_of(size_bytes: int) -> list[dict[str, str]]:
    """Return the `tool_calls` of a session that is to carry so many bytes."""
    return [{"output": "x" * size_bytes}] if size_bytes else []
