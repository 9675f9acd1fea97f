"""A large session is changed without reading it; what comes of that is what comes of reading it all.

They fail, for example, if an id that an index may hold is taken for one that is there, if a place is not moved by an insertion
before it, if the marks of an interrupted turn are left out, or if a refused verb leaves a trace in what is known.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from harness.worlds import World

import persist

STEPS = 60


def stores(directory: Path, number: int, fold_bytes: float | None) -> list[persist.Store]:
    made = [persist.Store(directory, journal="always") for _ in range(number)]
    for store in made:
        store._files.fold_bytes = fold_bytes
    return made


@pytest.mark.parametrize("number", [1, 2], ids=["one store", "two stores"])
@pytest.mark.parametrize("fold_bytes", [None, 1, 3000, math.inf])
def test_unread_and_read_come_to_the_same(scratch: Path, fold_bytes: float | None, number: int) -> None:
    """The same random verbs on sessions with and without a journal: the same answers, errors, documents, heads and streams.

    With folds at their normal time, at every commit, now and then, and never; and with two stores that take turns, so that
    what one knows is outdated at every step.
    """
    for seed in range(5):
        journaled = World(stores(scratch / f"{seed}-always", number, fold_bytes), seed)
        whole = World([persist.Store(scratch / f"{seed}-never", journal="never") for _ in range(number)], seed)
        try:
            for step in range(STEPS):
                assert journaled.step() == whole.step(), (seed, step)
                assert journaled.state() == whole.state(), (seed, step)
        finally:
            journaled.close()
            whole.close()
