"""Measuring in turns: each round runs every action once, in an order drawn anew.

So other work of the machine hits all actions alike. Ratios within one run can be trusted where times cannot.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, TypeVar

# Children are forked, not spawned, because a child must start within a round. No process with threads forks: see
# `apart`.
FORK = multiprocessing.get_context("fork")

Result = TypeVar("Result")


#: The fewest runs of a slow action, unless the time is over.
LEAST = 5
#: A child that has sent its result and does not end within this time has a thread that hangs.
END_S = 30.0


def nothing() -> None:
    """Do nothing. An action without preparations does this before it."""


@dataclass(frozen=True, slots=True)
class Action:
    """An action that is timed, and the work before and after it, which is not.

    `before` comes before each run. If a run leaves dirt (`leaves_dirt`), the disk is synced after it.
    """

    run: Callable[[], object]
    before: Callable[[], object] = nothing
    leaves_dirt: bool = False


@dataclass(frozen=True, slots=True)
class Effort:
    """The effort of a measurement.

    Attributes:
        rounds: the most runs of one action.
        share_s: seconds for one action in all. A slow action sits out some rounds, evenly, but runs `LEAST` times.
        limit_s: seconds after which no round begins.
    """

    rounds: int
    share_s: float
    limit_s: float


def interleaved(actions: dict[str, Action], effort: Effort) -> dict[str, float]:
    """Return the median seconds of each action."""
    strides = {name: _stride(action, effort) for name, action in actions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    shuffle = random.Random(1533).shuffle
    deadline = time.monotonic() + effort.limit_s
    gc.collect()
    # The objects that others keep in memory must not make everybody's garbage collections long.
    gc.freeze()
    for turn in range(effort.rounds):
        if turn and time.monotonic() > deadline:
            break
        order = [name for name in actions if turn % strides[name] == 0]
        shuffle(order)
        for name in order:
            seconds[name].append(_timed(actions[name]))
    gc.unfreeze()
    return {name: median(values) for name, values in seconds.items()}


def _timed(action: Action) -> float:
    action.before()
    started = time.perf_counter()
    result = action.run()
    taken = time.perf_counter() - started
    # Freeing the result is not part of reading it.
    del result
    if action.leaves_dirt:
        # The next action must not pay for it with its own sync.
        os.sync()
    return taken


def _stride(action: Action, effort: Effort) -> int:
    """Return the number of rounds from one run of an action to the next.

    The action is tried once, which also warms it up. The number is a power of two. So the slow actions run in the same
    rounds, and only there spoil the processor's caches for the quick ones.
    """
    started = time.perf_counter()
    _timed(action)
    cost = time.perf_counter() - started
    wanted = min(effort.rounds // LEAST, effort.rounds * cost / effort.share_s)
    return 1 << max(0, round(math.log2(max(1.0, wanted))))


def apart(measure: Callable[..., Result], *arguments: Any) -> Result:
    """Measure in a process of its own, so that its leftover threads and memory are in no later measurement."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send_result, args=(there, measure, arguments))
    process.start()
    there.close()
    try:
        result: Result = here.recv()
    except BaseException as error:
        process.terminate()
        if isinstance(error, EOFError):
            raise RuntimeError(f"{measure.__name__} has failed: see above.") from None
        raise
    finally:
        process.join(END_S)
        process.kill()
        process.join()
        here.close()
    return result


def _send_result(connection: Connection, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C is for the parent, which then sends SIGTERM. So the children of this process are ended, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    connection.send(measure(*arguments))
