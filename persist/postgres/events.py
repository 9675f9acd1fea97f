"""The events of streams: rows that the one owner of a stream numbers, and who is told of them.

**Writing.** `emit` gives an event its number and puts it into a buffer. A thread writes the buffers of all streams of
this process, every 25 ms, in one transaction. Each write is fenced by the stream's row: nothing is written to a stream
that has ended, by a process whose lease is over, or twice. The commit that ends a stream writes the rest of its events
itself, so they are there when the end is.

**Reading.** One thread a process waits for news of all streams that are followed here. NOTIFY wakes it, and is a hint
only. The thread also asks the server in short intervals, because pgbouncer and a lost connection swallow hints.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psycopg

from persist import json_codec
from persist.engine import Ended, Event, Fenced
from persist.errors import EmitFailed, PersistError
from persist.log import log
from persist.postgres.connections import Connection, Connections, Own, text_of
from persist.postgres.heartbeat import HeldLease

if TYPE_CHECKING:
    from persist.postgres.engine import PostgresEngine

#: How long the events of a process are gathered, before they are written together.
BATCH_S = 0.025
#: How often a process asks for news, with hints and without.
POLL_S, POLL_WITHOUT_HINTS_S = 0.25, 0.05
#: So many events are read at a time.
_PAGE = 1000


class RemoteWriter:
    """The writer of the events of a stream that this process runs. The threads of the process may share it."""

    is_full = False

    def __init__(self, engine: PostgresEngine, session_id: str, stream_id: str, lease: HeldLease) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.process = lease.process
        self._engine = engine
        self._guard = threading.Lock()
        #: Held while the events are written, because the writes of one stream follow each other.
        self.writing = threading.RLock()
        self._pending: list[bytes] = []
        self._count = 0
        self.number: int | None = None
        self.is_fenced = False
        self.failure: str | None = None

    @property
    def is_open(self) -> bool:
        """True, because each write is fenced. The first one needs no look at the session."""
        return True

    def open(self) -> None:
        """Do nothing."""

    def append(self, events: Sequence[bytes], *, durable: bool) -> int:
        """Number encoded events, and write them soon. With `durable`, they are durable on return."""
        with self._guard:
            if self.is_fenced:
                raise Fenced
            failure, self.failure = self.failure, None
            if failure is None:
                self._pending += events
                self._count += len(events)
            offset = self._count
        if failure is not None:
            raise self._failed(failure)
        if durable:
            self.flush()
        else:
            self._engine.emitter.schedule(self)
        return offset

    def _failed(self, reason: str) -> EmitFailed:
        facts: dict[str, Any] = {"stream_id": self.stream_id, "path": self._engine.where(self.session_id)}
        return EmitFailed(reason=reason, errno=None, **facts)

    def flush(self) -> None:
        """Write all events, durably.

        Raises:
            EmitFailed: the server cannot be reached. The events are kept, and are written later.
            Fenced: the stream has been ended.
        """
        try:
            with self.writing:
                self._engine.connections.run(self.write, self._engine.timeout_s)
        except PersistError as error:
            self._engine.emitter.schedule(self)
            raise self._failed(str(error)) from error
        if self.is_fenced:
            raise Fenced

    def pending(self) -> tuple[int, list[bytes]]:
        """Return the offset before the events that are not written yet, and these events."""
        with self._guard:
            return self._count - len(self._pending), list(self._pending)

    def written(self, count: int) -> None:
        """Note that so many events are written."""
        with self._guard:
            del self._pending[:count]

    def write(self, connection: Connection) -> int | None:
        """Write the events that wait. Return the stream's number, or None if nothing was written. `writing` is held."""
        last, events = self.pending()
        if not events or self.is_fenced:
            return None
        connections = self._engine.connections
        if self.number is None:
            found = connections.query(connection, "find_stream", id=text_of(self.session_id), stream_id=self.stream_id)
            if not found:
                self.is_fenced = True
                return None
            self.number = found[0][0]
        if not connections.query(connection, "emit", **self.values(last, events)):
            # A write whose answer was lost may stand.
            rows = connections.query(connection, "events", stream=self.number, after=0, until=0, limit=0)
            if not rows or rows[0][1] != last + len(events):
                self.is_fenced = True
                return None
        self.written(len(events))
        return self.number

    def values(self, last: int, events: list[bytes]) -> dict[str, Any]:
        """Return the values of the statement that writes events."""
        texts = [event.decode() for event in events]
        return {"stream": self.number, "last": last, "count": len(events), "events": texts, "process": self.process}

    def drop_oldest(self) -> None:
        """Do nothing."""

    def postpone(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Write what is left, if the stream has not ended."""
        self._engine.writers.pop((self.session_id, self.stream_id), None)
        if self.pending()[1] and not self.is_fenced:
            self._engine.emitter.schedule(self)


class Emitter:
    """The thread that writes the events of all streams of this process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._own = Own(connections)
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._dirty: dict[RemoteWriter, None] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def schedule(self, writer: RemoteWriter) -> None:
        """Let the thread write the events of a writer soon."""
        with self._guard:
            self._dirty[writer] = None
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_emit, args=(weakref.ref(self),), name="persist-emit", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def wait(self) -> threading.Event:
        """Return the event for which the thread waits."""
        return self._wake

    def write_all(self) -> None:
        """Write the events of all streams, in one transaction."""
        self._wake.clear()
        with self._guard:
            writers, self._dirty = list(self._dirty), {}
        with contextlib.ExitStack() as stack:
            for writer in writers:
                stack.enter_context(writer.writing)
            try:
                self._own.run(lambda connection: self._write(connection, writers))
            except (PersistError, psycopg.Error) as error:
                log.debug("%s: events wait for the server: %s", self._connections.place, error)
                for writer in writers:
                    writer.failure = str(error)
                with self._guard:
                    self._dirty |= dict.fromkeys(writers)

    def _write(self, connection: Connection, writers: list[RemoteWriter]) -> None:
        with connection.transaction():
            # A crash of the server may take them, as it may on files.
            connection.execute("SET LOCAL synchronous_commit = off")
            numbers = [number for writer in writers if (number := writer.write(connection)) is not None]
            if numbers:
                news = {"channel": self._connections.channel, "streams": ",".join(map(str, numbers[:500]))}
                self._connections.query(connection, "notify", **news)


def _emit(found: weakref.ref[Emitter]) -> None:
    pid = os.getpid()
    while (emitter := found()) is not None and os.getpid() == pid:
        wake = emitter.wait()
        del emitter
        if wake.wait(1.0):
            time.sleep(BATCH_S)
            if (emitter := found()) is not None and os.getpid() == pid:
                emitter.write_all()
                del emitter


# --- reading ---------------------------------------------------------------------------------------------------------


class RemoteReader:
    """The reader of one stream's events from an offset on."""

    def __init__(self, engine: PostgresEngine, session_id: str, stream_id: str, after: int) -> None:
        self._engine = engine
        self.place = f"{engine.where(session_id)}, events of {stream_id}"
        rows = engine.run("find_stream", id=text_of(session_id), stream_id=stream_id)
        if not rows:
            raise FileNotFoundError(errno.ENOENT, "there are no such events", self.place)
        self.number, self.first, self._last, _ = rows[0]
        self.ended: Ended | None = None
        self._after = after
        # Events before `after` are passed over unread.
        self.count = max(min(after, self._last), self.first - 1)
        self.is_overtaken = after < self.first - 1
        self._has_news = True

    def size(self) -> int:
        """Return the offset of the last event."""
        rows = self._engine.run("news", streams=[self.number])
        return int(rows[0][1]) if rows else self.count

    @property
    def has_more(self) -> bool:
        """Whether somebody has told of events that were not read yet."""
        return self._has_news

    def read(self, until: int | None = None) -> list[Event]:
        """Return the events that came since the last call."""
        if self.ended is not None or (until is not None and self.count >= until):
            return []
        self._has_news = False
        after = self.count
        limits = {"until": 2**62 if until is None else until, "limit": _PAGE}
        rows = self._engine.run("events", stream=self.number, after=after, **limits)
        if not rows:
            raise FileNotFoundError(errno.ENOENT, "the session is gone", self.place)
        self.first, self._last, ended = rows[0][:3]
        self.is_overtaken = self.is_overtaken or self.first - 1 > after
        found = [Event(row[3], json_codec.decode(row[4])) for row in rows if row[3] is not None]
        if found:
            self.count = found[-1].offset
            self._has_news = self.count < self._last or ended is not None
        elif ended is not None and self.count >= self._last:
            self.ended = ended.decode()
        return found

    def read_cached(self) -> list[Event] | None:
        """Return None, because a read waits for the server."""
        return [] if self.ended is not None else None

    def begin_here(self) -> None:
        """Ask only for the events behind the last one that is there."""
        self.count = max(self.count, self._last)

    def look_again(self) -> None:
        """Let the next read ask the server."""
        self._has_news = True

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` during a block, whenever any process has emitted."""

        def tell() -> None:
            self._has_news = True
            wake()

        with self._engine.listener.waking(self.number, self.count, tell):
            yield

    def close(self) -> None:
        """Do nothing, because nothing is kept open."""


class Listener:
    """The thread that hears of news of all streams that are followed in this process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._own = Own(connections)
        self._guard = threading.RLock()
        self._waiting: dict[int, tuple[Callable[[], None], ...]] = {}
        #: The last event of each stream, as far as it is known, and whether the stream has ended.
        self._known: dict[int, tuple[int, bool]] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def waking(self, number: int, last: int, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` during a block, when a stream has news."""
        try:
            with self._guard:
                self._waiting[number] = (*self._waiting.get(number, ()), wake)
                self._known[number] = min(self._known.get(number, (last, False)), (last, False))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._listen, name="persist-listen", daemon=True)
                    self._thread.start()
            yield
        finally:
            with self._guard:
                self._waiting[number] = tuple(each for each in self._waiting.get(number, ()) if each is not wake)
                if not self._waiting[number]:
                    del self._waiting[number]
                    self._known.pop(number, None)

    def _listen(self) -> None:
        is_listening = None
        while True:
            with self._guard:
                if not self._waiting:
                    self._thread = None
                    self._own.close()
                    return
            try:
                connection = self._own.get()
                if is_listening is not connection:
                    connection.execute(f"LISTEN {self._connections.channel}")
                    is_listening = connection
                self._poll(connection)
                for hint in connection.notifies(timeout=POLL_S, stop_after=1):
                    self._tell(int(each) for each in hint.payload.split(",") if each.isdecimal())
            except (PersistError, psycopg.Error) as error:
                log.debug("%s: the listener lost its connection: %s", self._connections.place, error)
                time.sleep(POLL_S)

    def _poll(self, connection: Connection) -> None:
        with self._guard:
            known = dict(self._known)
        rows = self._connections.query(connection, "news", streams=list(known))
        found = {row[0]: (row[1], row[2]) for row in rows}
        fresh = [number for number in known if found.get(number, (-1, True)) != known[number]]
        with self._guard:
            self._known |= {number: found.get(number, (-1, True)) for number in fresh if number in self._known}
        self._tell(fresh)

    def _tell(self, numbers: Any) -> None:
        for number in numbers:
            for wake in self._waiting.get(number, ()):
                wake()
