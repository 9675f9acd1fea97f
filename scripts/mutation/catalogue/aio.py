"""Mutants of the API for event loops."""

from __future__ import annotations

from mutation.catalogue.suites import AIO
from mutation.edits import drop_handler, drop_keyword
from mutation.mutant import Mutant

MUTANTS = (
    Mutant(
        "aio: the wait for a cancelled write",
        "aio.py",
        "_Threads.run",
        drop_handler("asyncio.CancelledError"),
        AIO,
        "native_cancellation",
    ),
    Mutant(
        "aio: the end of the stream of a cancelled start",
        "aio.py",
        "Store._started",
        drop_keyword("self._threads.run", "undo"),
        AIO,
        "cancelled_start",
    ),
)
