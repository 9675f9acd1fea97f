"""Hops: how a task of an event loop has work done in a thread, and is woken by one. On asyncio and on trio."""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import anyio
import anyio.lowlevel

Result = TypeVar("Result")
#: Threads of a store: so many verbs may wait for disks, and so many for sessions' locks, at the same time.
QUICK_THREADS = 16
PATIENT_THREADS = 128


class Threads:
    """Runs verbs in threads of their own, away from those that the application hops to.

    What may wait for a session's lock has threads apart, so that a session that somebody keeps locked holds up nobody's
    events.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._quick = ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="persist")
        self._patient = ThreadPoolExecutor(PATIENT_THREADS, thread_name_prefix="persist-locks")

    async def run(
        self, function: Callable[[], Result], undo: Callable[[Result], object] | None = None, *, is_quick: bool = False
    ) -> Result:
        """Call a function in a thread, to its end, whatever becomes of the caller.

        Args:
            undo: called with the result, in a thread, if the caller was cancelled and will not get it.
            is_quick: it waits for no session's lock.
        """
        result, cancellation = await self._finish(function, is_quick=is_quick)
        cancelled = anyio.get_cancelled_exc_class()
        try:
            if cancellation is not None:
                raise cancellation
            if undo is not None:
                await anyio.lowlevel.checkpoint_if_cancelled()
        except cancelled as error:
            if undo is not None:
                await self._undo(partial(undo, result), error)
            raise
        return result

    async def _undo(self, undo: Callable[[], object], error: BaseException) -> None:
        try:
            await self._finish(undo)
        except Exception as failure:
            # Whoever cancelled waits for the cancellation, and for nothing else.
            error.add_note(f"What was obtained could not be given back: {failure}")

    async def _finish(
        self, function: Callable[[], Result], *, is_quick: bool = False
    ) -> tuple[Result, BaseException | None]:
        """Its result, and what cancelled the caller in the meantime."""
        if self._pid != os.getpid():
            # A forked child has none of the threads.
            self._start()
        done, context = News(), contextvars.copy_context()
        work = (self._quick if is_quick else self._patient).submit(context.run, function)
        # Not a task, and no future of the loop: `asyncio.run` cancels those when it ends, and the result would be lost.
        work.add_done_callback(lambda _: done.set())
        cancellation: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not work.done():
                try:
                    await done.wait()
                except asyncio.CancelledError as error:
                    # A task's own cancel() does not heed anyio's shield.
                    cancellation = error
        if cancellation is not None and work.exception() is not None:
            raise cancellation from work.exception()
        return work.result(), cancellation


def _is_asyncio() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


class News:
    """An event that any thread may set, in the loop that made it; also from a signal handler."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._is_on_its_way = False
        if _is_asyncio():
            self._soon: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        else:
            import trio

            self._soon = trio.lowlevel.current_trio_token().run_sync_soon

    def set(self) -> None:
        """Wake the one who waits; once, however often it is called."""
        if not self._is_on_its_way:
            self._is_on_its_way = True
            # RuntimeError, and trio's RunFinishedError, which is one: the loop has ended, and nobody waits.
            with suppress(RuntimeError):
                self._soon(self._set)

    def _set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float = math.inf) -> None:
        """Return when it is set, or after some seconds; it is unset then."""
        with anyio.move_on_after(timeout_s):
            await self._event.wait()
        self._event, self._is_on_its_way = anyio.Event(), False
