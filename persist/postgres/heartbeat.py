"""The heartbeat: the row by which others see that this process lives, and the leases that refer to it.

One row a process, however many streams it runs. A thread renews it by the server's clock. A stream is dead when the row
of its process has expired. A row that has expired is never renewed, so a dead stream never comes back to life.

This cannot be as sure as the kernel's lock on a file: a process that was paused for longer than its lease looks dead.
So every write of a stream asks in its own statement whether the process's row is alive (see queries.sql, `update` and
`emit`). In between, the process asks only itself, so that it stops early.

A renewal that fails is lost authority. Until one succeeds again, no lease of the process counts as held. A renewal has
failed when the server did not answer for a whole beat. So a restart of the server ends no turn.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import socket
import sys
import threading
import uuid
import weakref
from functools import partial

import psycopg

from persist.errors import PersistError
from persist.log import log
from persist.postgres.connections import (
    Connection,
    Connections,
    Own,
    at_end_of_children,
    program_name,
    text_of,
    try_start,
)
from persist.storage.clock import now_s
from persist.wake import Wake

#: Numbers that no two leases of this process share.
_numbers = itertools.count()


class HeldLease:
    """The lease of one stream of this process. It is a column of the session's row, so a commit takes and frees it."""

    why_not_held = "it has ended, this is a forked child, or the server did not renew its lease in time"

    def __init__(self, heartbeat: Heartbeat, session_id: str, stream_id: str, number: int) -> None:
        self._heartbeat: Heartbeat | None = heartbeat
        self._session_id, self.stream_id, self._number = session_id, stream_id, number
        self._pid = os.getpid()
        self.process = heartbeat.id
        self.is_dropped = False

    @property
    def is_held(self) -> bool:
        """Whether the process has proven lately that it lives, as the one that took this lease."""
        heartbeat = self._heartbeat
        return heartbeat is not None and self._pid == os.getpid() and heartbeat.is_proven(self.process)

    def close(self) -> None:
        """Give the lease up. The stream is dead from now on, if it has not ended."""
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None and self._pid == os.getpid():
            heartbeat.free(self._session_id, self.stream_id, self._number)

    def __del__(self) -> None:
        if not sys.is_finalizing() and getattr(self, "_heartbeat", None) is not None and self._pid == os.getpid():
            self.close()
            self.is_dropped = True


class Heartbeat:
    """The heartbeat of this process, in one schema."""

    def __init__(self, connections: Connections, *, lease_s: float, beat_s: float) -> None:
        self._connections = connections
        self._lease_s, self._beat_s = lease_s, beat_s
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Begin as another process, because this is a forked child."""
        # Re-entrant, because a finaliser may free a lease in a thread that is inside.
        self._guard = threading.RLock()
        self.id = str(uuid.uuid4())
        #: The (session id, stream id) of the streams that this process runs -> the number of the lease.
        self._held: dict[tuple[str, str], int] = {}
        self._to_free: list[tuple[str, str, str]] = []
        self._proven_until = -1.0
        #: When the server was last asked to renew the row. Its own time of that is later.
        self._asked_at = -1.0
        self._is_failing = False
        self._wake = Wake()
        self._thread: threading.Thread | None = None
        self._own = Own(self._connections)

    def is_proven(self, process: str) -> bool:
        """Tell whether this process has proven lately that it lives, under that name."""
        return process == self.id and now_s() < self._proven_until

    def runs(self, process: object, session_id: str, stream_id: str) -> bool | None:
        """Tell whether this process runs a stream. None if the stream is another process's."""
        return (session_id, stream_id) in self._held if str(process) == self.id else None

    def lease(self, session_id: str, stream_id: str, timeout_s: float) -> HeldLease:
        """Make sure that this process has a live row, and return a lease for a new stream.

        Raises:
            Unavailable: the server cannot be reached for so many seconds.
        """
        with self._guard:
            if not self.is_proven(self.id):
                if self._proven_until < 0 or not self._own.run(self._renew, timeout_s):
                    # A row that has expired stays dead, and with it all streams that refer to it.
                    self.id = str(uuid.uuid4())
                    self._own.run(self._register, timeout_s)
                self._proven_until, self._is_failing = self._asked_at + self._lease_s, False
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_beat, args=(weakref.ref(self),), name="persist-beat", daemon=True
                )
                if not try_start(self._thread):
                    self._thread = None
                    raise self._connections.unavailable("the system has no thread for the heartbeat")
                at_end_of_children(_close_all, priority=0)
            key, number = (session_id, stream_id), next(_numbers)
            # A stream of this id that came to nothing must not free this one.
            for each in [each for each in self._to_free if each[:2] == key]:
                self._to_free.remove(each)
            self._held[key] = number
            return HeldLease(self, session_id, stream_id, number)

    def has_ended(self, session_id: str, stream_id: str) -> None:
        """Note that a commit has ended a stream, so that nothing is left to free."""
        self._held.pop((session_id, stream_id), None)

    def free(self, session_id: str, stream_id: str, number: int) -> None:
        """Free the lease of a stream that did not end. The thread tells the server, because this may be a finaliser."""
        # A later stream may have the same id.
        if self._held.get((session_id, stream_id)) == number:
            del self._held[session_id, stream_id]
            self._to_free.append((session_id, stream_id, self.id))
            self._wake.set()

    def _register(self, connection: Connection) -> None:
        own = {"host": socket.gethostname(), "pid": os.getpid(), "command": program_name()}
        facts = {**own, "lease_s": self._lease_s}
        self._asked_at = now_s()
        self._connections.query(connection, "register", process=self.id, **facts)

    def _renew(self, connection: Connection) -> bool:
        self._asked_at = now_s()
        return bool(self._connections.query(connection, "beat", process=self.id, lease_s=self._lease_s))

    def beat(self) -> None:
        """Renew the row, and free the leases that were dropped."""
        self._wake.clear()
        with self._guard:
            process = self.id
            try:
                # A process that was late has no row until its next stream.
                is_alive = self._own.run(self._renew) if self._proven_until >= 0 else None
                for each in list(self._to_free):
                    session_id, stream_id, owner = each
                    values = {"id": text_of(session_id), "stream_id": stream_id, "process": owner}
                    query = partial(self._connections.query, **values)
                    if self._own.run(lambda connection, query=query: query(connection, "free"))[0][0]:  # type: ignore[misc]
                        self._to_free.remove(each)
            except (PersistError, psycopg.Error) as error:
                if not self._is_failing:
                    log.warning("%s: the heartbeat failed: %s", self._connections.place, error)
                    # If the renewal is not made up for within a beat, others may see this process as dead soon.
                    self._proven_until = min(self._proven_until, now_s() + self._beat_s)
                self._is_failing = True
                return
            self._is_failing = False
            if is_alive:
                self._proven_until = self._asked_at + self._lease_s
            elif is_alive is not None:
                log.warning("%s: process %s was late, and its streams count as dead", self._connections.place, process)
                self._proven_until, self.id = -1.0, str(uuid.uuid4())

    def beats_here(self) -> bool:
        """Tell whether this thread is the one that beats."""
        return self._thread is threading.current_thread()

    def pause(self) -> tuple[Wake, float]:
        """Return what the thread waits for, and how long."""
        return self._wake, min(0.5, self._beat_s) if self._is_failing or self._to_free else self._beat_s

    def rest(self) -> None:
        """Give the row and the connection up, if this process runs no stream. A later stream takes them again."""
        with self._guard:
            if self._thread is None or self._held or self._to_free:
                return
            self.close()
            self._thread, self.id = None, str(uuid.uuid4())
            self._wake.set()

    def close(self) -> None:
        """Free all streams of this process at once, at its end."""
        with self._guard:
            if self._thread is not None:
                with contextlib.suppress(Exception):
                    self._own.run(lambda connection: self._connections.query(connection, "unregister", process=self.id))
                self._own.close()
                # A beat that comes later has nothing to do.
                self._proven_until, self._to_free = -1.0, []


_all: weakref.WeakSet[Heartbeat] = weakref.WeakSet()


def _beat(found: weakref.ref[Heartbeat]) -> None:
    pid = os.getpid()
    while (heartbeat := found()) is not None and os.getpid() == pid:
        wake, pause_s = heartbeat.pause()
        del heartbeat
        wake.wait(pause_s)
        if (heartbeat := found()) is not None and os.getpid() == pid:
            if not heartbeat.beats_here():
                return
            heartbeat.beat()
            del heartbeat


def _close_all() -> None:
    for each in list(_all):
        each.close()


def _forget_in_child() -> None:
    for each in list(_all):
        each.forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
