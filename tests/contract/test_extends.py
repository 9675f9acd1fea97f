"""Several items in one commit, by several processes: no batch is split or lost, and a retry doubles none.

These tests fail without the lock, if a batch is several commits, or if a retry does not look for the key.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import ActorFactory

import persist

KINDS = ("auto", "postgres")
PROCESSES, EXTENDS = 4, 100

WORK = """
def work(name, key, first, count):
    for n in range(first, count):
        pair = [{'n': f'{name}-{n}', 'half': half, 'uuid': f'{name}-{n}-{half}'} for half in (1, 2)]
        store.extend('s-1', 'messages', pair, key=key)
        tell(n)

def tell(n):
    # In one step: a kill must not leave half of a number.
    path.with_suffix('.new').write_text(str(n))
    path.with_suffix('.new').replace(path)
"""


def assert_pairs(store: persist.Store, expected: int) -> None:
    """Require that each pair is stored once, with its second half directly after its first."""
    messages = store.load("s-1").data["messages"]
    firsts, seconds = messages[::2], messages[1::2]
    assert [first["n"] for first in firsts] == [second["n"] for second in seconds]
    assert {first["half"] for first in firsts} == {1}
    assert {second["half"] for second in seconds} == {2}
    assert set(Counter(first["n"] for first in firsts).values()) == {1}
    assert len(firsts) == expected


@pytest.mark.parametrize("key", ["uuid", None])
def test_no_pair_is_split(store: persist.Store, actor: ActorFactory, tmp_path: Path, key: str | None) -> None:
    """4 processes x 100 extends of two items give 400 pairs, none of them split."""
    store.create("s-1", {"messages": []})
    actors = [actor(timeout_s=60.0) for _ in range(PROCESSES)]
    for number, each in enumerate(actors):
        each.do(f"import pathlib\npath = pathlib.Path({str(tmp_path / f'done-{number}')!r})\n{WORK}")
    for number, each in enumerate(actors):
        each.start(f"work('p{number}', {key!r}, 0, {EXTENDS})")
    for each in actors:
        each.result()
    assert_pairs(store, PROCESSES * EXTENDS)


def test_retry_after_a_kill_doubles_none(store: persist.Store, actor: ActorFactory, tmp_path: Path) -> None:
    """A retry after a kill doubles no pair.

    Each process is killed again and again, and the next one repeats from the last pair that was not acknowledged.
    """
    dice = random.Random(15)
    store.create("s-1", {"messages": []})
    for number in range(PROCESSES):
        (tmp_path / f"done-{number}").write_text("-1")
    kills = 0
    for _ in range(6):
        actors = [actor(timeout_s=60.0) for _ in range(PROCESSES)]
        for number, each in enumerate(actors):
            path = tmp_path / f"done-{number}"
            each.do(f"import pathlib\npath = pathlib.Path({str(path)!r})\n{WORK}")
            each.start(f"work('p{number}', 'uuid', {int(path.read_text()) + 1}, {EXTENDS})")
        for each in dice.sample(actors, k=3):
            if each.process.poll() is None:
                kills += not each._connection.poll(dice.uniform(0.005, 0.06))
                each.kill()
        for each in actors:
            each.close()
    for number in range(PROCESSES):
        path = tmp_path / f"done-{number}"
        last = actor(timeout_s=60.0)
        last.do(f"import pathlib\npath = pathlib.Path({str(path)!r})\n{WORK}")
        last.do(f"work('p{number}', 'uuid', {int(path.read_text()) + 1}, {EXTENDS})")
    assert kills > 3
    assert_pairs(store, PROCESSES * EXTENDS)
