"""Run: the store in which the processes of one test run meet.

Each shared thing is a session of this store, and the session's id is made of the thing's name. A process that produces
a value or holds a named lock runs a stream of that session. So at most one process does this at a time, and all others
can see which one. The kernel tells when that process is dead. The streams' ids begin with the worker's name, so that
messages can name the worker.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from persist.errors import InvalidArgument, SessionBusy, SessionExists, SessionNotFound
from persist.storage.clock import now_s
from persist.store import Store
from persist.streams import Stream
from persist.transaction import Transaction

_POLL_S = (0.02, 0.05)

Data = dict[str, Any]


class Run:
    """One process's view of the things that its test run shares.

    Args:
        store: belongs to this run alone.
        worker: the name of this process, such as "gw0".
    """

    def __init__(self, store: Store, worker: str) -> None:
        self.store = store
        self.worker = worker
        self.held = Held()

    def session(self, kind: str, name: str, **facts: Any) -> str:
        """Return the id of the session for a named thing. Make the session with these facts if it is new.

        Raises:
            InvalidArgument: the session is there, with other facts.
        """
        if type(name) is not str:
            raise InvalidArgument(what=f"a name in {kind!r}", got=type(name).__name__, expected="a string")
        session_id = f"{kind}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:40]}"
        facts = {"name": name} | facts
        found = self._made(session_id, facts)
        differing = [key for key, value in facts.items() if found.get(key) != value]
        if differing:
            first, second = (", ".join(_shown(key, side.get(key)) for key in differing) for side in (found, facts))
            expected = f"another one: it stands for {first} in this test run, and is asked for as {second}"
            raise InvalidArgument(what=f"the key {name!r}", got="taken", expected=expected)
        return session_id

    def _made(self, session_id: str, facts: Data) -> Data:
        with suppress(SessionNotFound):
            return dict(self.store.head(session_id).fields)
        self.make(session_id, facts)
        return dict(self.store.head(session_id).fields)

    def make(self, session_id: str, facts: Data | None = None) -> None:
        """Make a session unless it is there."""
        if not self.store.exists(session_id):
            with suppress(SessionExists):
                self.store.create(session_id, facts)

    def try_stream(self, session_id: str) -> Stream | SessionBusy:
        """Claim a session for this process, or return the error that names its present holder."""
        try:
            return self.store.start_stream(session_id, stream_id=f"{self.worker}-{os.urandom(4).hex()}")
        except SessionBusy as busy:
            return busy

    def count(self, name: str, start: int = 0) -> int:
        """Return a number that no other call of this run gets. The numbers go up from `start`."""
        if type(start) is not int:
            raise TypeError(f"A counter starts at an integer, not at {start!r}.")
        session_id = self.session("count", name, start=start)

        def take(tx: Transaction) -> int:
            number: int = tx.fields.get("next", start)
            tx.fields["next"] = number + 1
            return number

        return self.store.update(session_id, take)

    def sessions(self, kind: str) -> list[tuple[str, Data]]:
        """Return the sessions of one kind, each as (id, data)."""
        return [(each, self.store.load(each).data) for each in self.store.ids(prefix=f"{kind}-")]


def _shown(what: str, fact: Any) -> str:
    return f"{what} {fact['module']}:{fact['qualname']}" if isinstance(fact, dict) else f"{what} {fact}"


class Held(threading.local):
    """The sessions that the current thread produces or holds just now: session id -> stream id, outermost first."""

    def __init__(self) -> None:
        self.streams: dict[str, str] = {}


class Wait:
    """A wait that polls, with a deadline."""

    def __init__(self, timeout_s: float) -> None:
        self._start = now_s()
        self._deadline = self._start + timeout_s

    @property
    def waited_s(self) -> float:
        return now_s() - self._start

    def shorten(self, timeout_s: float) -> None:
        """Wait no longer than `timeout_s` from now on."""
        self._deadline = min(self._deadline, now_s() + timeout_s)

    def pause(self, late: Exception | Callable[[], Exception]) -> None:
        """Sleep for a moment. If the time is over, raise `late`, or the error that it makes."""
        __tracebackhide__ = True
        if now_s() >= self._deadline:
            raise late if isinstance(late, Exception) else late()
        time.sleep(random.uniform(*_POLL_S))


def describe(busy: SessionBusy) -> tuple[str, float]:
    """Return the process whose stream is in the way, and how many seconds it has run: ("gw0 (pid 812)", 3.2)."""
    worker = busy.stream_id.rpartition("-")[0]
    if busy.owner is None:
        return worker, 0.0
    since = datetime.now(UTC) - datetime.fromisoformat(busy.owner.started_at)
    return f"{worker} (pid {busy.owner.pid})", max(0.0, since.total_seconds())
