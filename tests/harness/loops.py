"""Event loops in tests: a test that runs in one, and how long the loop stood still."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def cancel_again_and_again(task: asyncio.Task[Any]) -> None:
    """Cancel a task in every round of the loop until it has ended, as a cancelled scope of anyio does (Starlette)."""
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


async def lag_of(work: Awaitable[Any]) -> float:
    """Return the longest time in seconds for which the loop stood still while it awaited something."""
    longest_s, is_done = 0.0, False

    async def watch() -> None:
        nonlocal longest_s
        before = time.perf_counter()
        while not is_done:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest_s, before = max(longest_s, now - before), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        await work
    finally:
        is_done = True
        await watching
    return longest_s
