"""A named lock between the tests of all workers. Its holder may die, and may hold it as long as it likes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from persist.errors import LockError, SessionBusy
from persist.pytest_plugin.errors import SharedTimeout
from persist.pytest_plugin.run import Run, Wait, describe
from persist.streams import Stream

_TEST = "test"


@contextmanager
def hold(run: Run, name: str, timeout_s: float) -> Iterator[None]:
    """Hold the lock `name` for a block.

    It is a stream's lease and not a session's lock. So a test may hold it for minutes, and use other verbs meanwhile.
    """
    __tracebackhide__ = True
    session_id = run.session("lock", name)
    if session_id in run.held.streams:
        reason, remedy = f"This thread holds the lock {name!r} already.", "Leave its block first."
        raise LockError(kind="nested", held=name, reason=reason, remedy=remedy)
    with _acquired(run, session_id, name, timeout_s) as stream:
        run.held.streams[session_id] = stream.id
        try:
            with run.store.transaction(session_id) as tx:
                tx.fields[_TEST] = os.environ.get("PYTEST_CURRENT_TEST", "")
            yield
        finally:
            del run.held.streams[session_id]


def _acquired(run: Run, session_id: str, name: str, timeout_s: float) -> Stream:
    __tracebackhide__ = True
    wait = Wait(timeout_s)
    while isinstance(stream := run.try_stream(session_id), SessionBusy):
        busy = stream

        def timed_out(busy: SessionBusy = busy) -> SharedTimeout:
            holder, since_s = describe(busy)
            test = run.store.head(session_id).fields.get(_TEST, "")
            where = f", in {test}" if test else ""
            reason = f"{holder} has held that lock for {since_s:.1f} s{where}"
            remedy = "Raise timeout_s, or leave the block of that test sooner."
            facts = {"holder": holder, "since_s": since_s, "waited_s": wait.waited_s, "remedy": remedy}
            return SharedTimeout(key=name, reason=reason, **facts)

        wait.pause(timed_out)
    return stream
