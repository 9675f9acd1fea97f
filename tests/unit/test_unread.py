"""Sessions with a journal give the same results as sessions without one, whatever the verbs.

The tests fail, for example, if a replica keeps an id that is gone, or if a splice lands where an earlier one moved.
They fail if an old value sees a later append, or if a refused verb leaves a trace in what a store knows.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from harness.files import file_engine
from harness.worlds import World

import persist

STEPS = 60


def stores(directory: Path, number: int, fold_bytes: float | None) -> list[persist.Store]:
    made = [persist.Store(directory, journal="always") for _ in range(number)]
    for store in made:
        file_engine(store).options.fold_bytes = fold_bytes
        file_engine(store).options.verifies_folds = True
    return made


@pytest.mark.parametrize("number", [1, 2], ids=["one store", "two stores"])
@pytest.mark.parametrize("fold_bytes", [None, 1, 3000, math.inf])
def test_journal_and_no_journal_come_to_the_same(scratch: Path, fold_bytes: float | None, number: int) -> None:
    """The same random verbs on both kinds give the same answers, errors, documents, heads and streams.

    The folds come at their normal time, at every commit, now and then, and never. Two stores take turns, so that each
    store's replica is outdated at every step. Each fold compares the replica with a replay from disk.
    """
    for seed in range(6):
        journaled = World(stores(scratch / f"{seed}-always", number, fold_bytes), seed)
        whole = World([persist.Store(scratch / f"{seed}-never", journal="never") for _ in range(number)], seed)
        try:
            for step in range(STEPS):
                assert journaled.step() == whole.step(), (seed, step)
                assert journaled.state() == whole.state(), (seed, step)
        finally:
            journaled.close()
            whole.close()
