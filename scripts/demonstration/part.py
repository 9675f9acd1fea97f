"""The parts of the demonstration: their arguments and their results."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Child processes are started anew, so that they share nothing with this one but the files.
CONTEXT = multiprocessing.get_context("spawn")

#: A function that is told how much of a part is done, from 0 to 1.
Progress = Callable[[float], None]

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One part that has been run.

    Attributes:
        title: the thing that was tried.
        ways: the ways in which it was tried. They are the heads of the columns.
        rows: each figure that was counted or measured, as text for each way.
        figures: the same as numbers.
        broken: each promise of `persist` that did not hold.
    """

    title: str
    ways: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    figures: dict[str, Any]
    broken: list[str]


#: The column of the naive code.
NAIVE = "read, change, write"
OURS = "persist"
