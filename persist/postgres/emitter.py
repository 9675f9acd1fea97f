"""The writing of the events of streams: rows that the one owner of a stream numbers.

`emit` gives an event its number and puts it into a buffer. A thread writes the buffers of all streams of this process,
every 25 ms, in one message. Each write is fenced by the stream's row: nothing is written to a stream that has ended, or
by a process whose lease is over. A commit of the stream writes the events that wait together with its message. So
nobody finds a message that knows more than the events, whatever dies in between. The same thread drops the oldest
events of a stream that has too many, and the events of streams whose time is over.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from persist.engine import Fenced
from persist.errors import EmitFailed, PersistError, nested
from persist.log import log
from persist.postgres.connections import (
    Connection,
    Connections,
    Own,
    Row,
    at_end_of_children,
    text_of,
    try_start,
)
from persist.postgres.heartbeat import HeldLease
from persist.storage.clock import now_s
from persist.wake import Wake

if TYPE_CHECKING:
    from persist.postgres.engine import PostgresEngine

#: How long the events of a process are gathered, before they are written together.
BATCH_S = 0.025
#: The pause after a failure, before the server is asked again.
_RETRY_S = 0.2
#: How many expired streams an end removes.
_MOST_REMOVED = 2


#: `is_busy` tells whether the thread is in the middle of an emission.
_this_thread = threading.local()


class RemoteWriter:
    """The writer of the events of a stream that this process runs. The threads of the process may share it.

    Attributes:
        number: the number of the stream's row. None if the answer that told it was lost.
        writing: held while the events are written, because the writes of one stream follow each other.
    """

    is_full = False

    def __init__(self, engine: PostgresEngine, session_id: str, stream_id: str, lease: HeldLease) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.process = lease.process
        self._engine = engine
        self._pid = os.getpid()
        # Re-entrant, because the commit that ends the stream holds it, too.
        self._guard = threading.RLock()
        self.writing = threading.RLock()
        self._pending: list[bytes] = []
        self._count = 0
        self._kept = Kept(engine.keep_events_bytes)
        self.number: int | None = None
        self.is_fenced = False
        self.failure: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether this is the process that runs the stream, and no child of it."""
        return self._pid == os.getpid()

    @property
    def is_open(self) -> bool:
        """True, because each write is fenced. The first one needs no look at the session."""
        return True

    def open(self) -> None:
        """Do nothing."""

    def append(self, events: Sequence[bytes], *, durable: bool) -> int:
        """Number encoded events, and write them soon. With `durable`, they are durable on return.

        Raises:
            LockError: this thread is in the middle of an emission, or of the commit that ends a stream, and its signal
                handler emits.
        """
        with self._busy():
            with self._guard:
                if self.is_fenced:
                    raise Fenced
                failure, self.failure = self.failure, None
                if failure is None:
                    self._pending += events
                    self._count += len(events)
                    self._kept.add(self._count, sum(map(len, events)))
                offset = self._count
            if failure is not None:
                raise self._failed(failure)
            if durable:
                self.flush()
            else:
                self._engine.emitter.schedule(self)
        return offset

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """Refuse emissions of this thread's signal handlers during a block, because they would wait for the thread."""
        if getattr(_this_thread, "is_busy", False):
            raise nested(self.session_id, held=self.session_id)
        try:
            _this_thread.is_busy = True
            yield
        finally:
            _this_thread.is_busy = False

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Keep all emissions out of a block that ends the stream, so that none is acknowledged and not written."""
        with self.writing, self._guard, self._busy():
            yield

    def _failed(self, reason: str) -> EmitFailed:
        facts: dict[str, Any] = {"stream_id": self.stream_id, "path": self._engine.where(self.session_id)}
        return EmitFailed(reason=reason, errno=None, **facts)

    def flush(self) -> None:
        """Write all events, durably.

        Raises:
            EmitFailed: the server cannot be reached. The events are kept, and are written later.
            Fenced: the stream has been ended.
        """

        def write_own(connection: Connection) -> None:
            # After the connection, as in a commit. In the other order both could wait for each other.
            with self.writing:
                write(self._engine.connections, connection, [self])

        try:
            self._engine.connections.run(write_own, self._engine.timeout_s)
        except PersistError as error:
            self._engine.emitter.schedule(self)
            raise self._failed(str(error)) from error
        if self.is_fenced:
            raise Fenced

    def pending(self) -> tuple[int, list[bytes]]:
        """Return the offset before the events that are not written yet, and these events. `writing` is held."""
        with self._guard:
            return self._count - len(self._pending), list(self._pending)

    def written(self, count: int) -> None:
        """Note that so many events are written."""
        with self._guard:
            del self._pending[:count]

    def find(self, query: Callable[..., list[Row]]) -> bool:
        """Make sure that the stream's number is known. Tell whether there is such a stream."""
        if self.number is None:
            found = query("find_stream", id=text_of(self.session_id), stream_id=self.stream_id)
            self.number = found[0][0] if found else None
        return self.number is not None

    def values(self, last: int, events: list[bytes]) -> dict[str, Any]:
        """Return the values of the statement that writes events, and drops the oldest ones if there are too many."""
        with self._guard:
            first = self._kept.surplus() or 1
        own = {"stream": self.number, "process": self.process}
        return {"last": last, "count": len(events), "events": events, "first": first, **own}

    def drop_oldest(self) -> None:
        """Do nothing, because the thread that writes events drops the oldest ones."""

    def postpone(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Write what is left, if the stream has not ended."""
        if not self.is_here:
            # The events are the parent's.
            return
        if self._engine.writers.get((self.session_id, self.stream_id)) is self:
            del self._engine.writers[self.session_id, self.stream_id]
        if self.pending()[1] and not self.is_fenced:
            self._engine.emitter.schedule(self)


class Kept:
    """How many bytes the events of a stream have, counted coarsely, and which of them are too many."""

    def __init__(self, most_bytes: int | None) -> None:
        self._most_bytes = most_bytes
        self._total = self._before = 0
        #: The offset behind which, and the bytes before which, the events stand that came since.
        self._marks = deque[tuple[int, int]]()

    def add(self, count: int, size_bytes: int) -> None:
        """Note that the last event has this offset now, and so many bytes came with it."""
        self._total += size_bytes
        if self._most_bytes and self._total - (self._marks[-1][1] if self._marks else 0) >= self._most_bytes / 16:
            self._marks.append((count, self._total))

    def surplus(self) -> int | None:
        """Return the offset of the first event to be kept, if the events outgrow their bound, else None.

        The younger half of the bound is kept.
        """
        if not self._most_bytes or self._total - self._before <= self._most_bytes:
            return None
        first = None
        while self._marks and self._total - self._marks[0][1] >= self._most_bytes / 2:
            first, self._before = self._marks.popleft()
        return None if first is None else first + 1


def write(connections: Connections, connection: Connection, writers: Iterable[RemoteWriter]) -> None:
    """Write the events of streams that wait, as one message. It may be repeated. The streams' `writing` is held.

    They are durable as any commit is. After a crash of the server, a part of a stream's events would else be gone while
    its owner lives, and goes on.
    """
    batches = []
    for writer in writers:
        last, events = writer.pending()
        if events and not writer.is_fenced:
            # A stream whose row is gone was deleted together with its session.
            writer.is_fenced = not writer.find(partial(connections.query, connection))
            if not writer.is_fenced:
                batches.append((writer, last, events))
    if not batches:
        return
    statements = [b"BEGIN ISOLATION LEVEL READ COMMITTED"]
    for writer, last, events in batches:
        statements.append(connections.text(connection, "emit", **writer.values(last, events)))
    statements += [connections.news(connection, [writer.number for writer, *_ in batches]), b"COMMIT"]
    cursor = connection.execute(b";\n".join(statements))
    answers = [cursor.fetchall() for _ in cursor.results() if cursor.description is not None]
    for (writer, _, events), found in zip(batches, answers, strict=False):
        if found:
            writer.written(len(events))
        else:
            writer.is_fenced = True


class Emitter:
    """The thread that writes the events of all streams of this process."""

    def __init__(self, connections: Connections, *, keep_s: float, patience_s: float) -> None:
        self._connections = connections
        self._keep_s = keep_s
        #: Emissions wait for the server for so long, as all verbs do. After that they fail.
        self._patience_s = patience_s
        #: How many expired streams may be removed now.
        self._to_remove = 0
        self._own = Own(connections)
        self._pid = os.getpid()
        # Re-entrant, because a finaliser may close a writer in a thread that is inside.
        self._guard = threading.RLock()
        self._dirty: dict[RemoteWriter, None] = {}
        self._wake = Wake()
        self._thread: threading.Thread | None = None
        #: One round of writing is under way at a time. The end of the process waits for it.
        self._round = threading.Lock()
        #: When the server was found to be away. None if it is there.
        self._failing_since: float | None = None
        _emitters.add(self)

    def schedule(self, writer: RemoteWriter) -> None:
        """Let the thread write the events of a writer soon."""
        with self._guard:
            self._dirty[writer] = None
        self._go()

    def tidy_soon(self) -> None:
        """Let the thread remove the events of two streams whose time is over. So each end makes up for a start."""
        with self._guard:
            self._to_remove += _MOST_REMOVED
        self._go()

    def _go(self) -> None:
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_emit, args=(weakref.ref(self),), name="persist-emit", daemon=True
                )
                if try_start(self._thread):
                    at_end_of_children(_close_all, priority=1)
                else:
                    # The next commit of the stream writes its events, and the next emission tries again.
                    self._thread = None
        self._wake.set()

    def tidy(self) -> None:
        """Remove the events of streams whose time is over."""
        with self._round:
            with self._guard:
                limit, self._to_remove = self._to_remove, 0
            facts = {"keep_s": self._keep_s, "limit": limit}
            with contextlib.suppress(PersistError):
                if limit:
                    self._own.run(lambda connection: self._connections.query(connection, "remove_expired", **facts))

    def wait(self) -> Wake:
        """Return what the thread waits for."""
        return self._wake

    def close(self) -> None:
        """Write what waits, at the end of the process, when the thread has written what it was writing."""
        if self._pid == os.getpid():
            self.write_all()
            with self._round:
                with self._guard:
                    # The thread has nothing more to do.
                    self._to_remove = 0
                self._own.close()

    def rest(self) -> None:
        """Do what waits, and give the connection up. A later emission takes one again."""
        self.write_all()
        self.tidy()
        with self._round:
            self._own.close()

    def write_all(self) -> bool:
        """Write the events of all streams. Tell whether the server took them. If not, they wait for the next time."""
        self._wake.clear()
        with self._round:
            with self._guard:
                # The same dictionary, because a finaliser may add to it at any moment.
                writers, self._dirty = self._dirty, {}
            # A commit of a stream writes the stream's events itself. The others do not wait for it.
            taken = [writer for writer in writers if writer.writing.acquire(blocking=False)]
            later, failure = [writer for writer in writers if writer not in taken], None
            try:
                if taken:
                    self._own.run(lambda connection: write(self._connections, connection, taken))
                    self._failing_since = None
            except (PersistError, psycopg.Error) as error:
                log.debug("%s: events wait for the server: %s", self._connections.place, error)
                later, failure = list(writers), str(error)
                self._failing_since = self._failing_since or now_s()
            finally:
                is_told = self._failing_since is not None and now_s() - self._failing_since >= self._patience_s
                for writer in taken:
                    writer.failure = failure if is_told else None
                    writer.writing.release()
            if later:
                with self._guard:
                    self._dirty |= dict.fromkeys(later)
                self._wake.set()
        return failure is None


_emitters: weakref.WeakSet[Emitter] = weakref.WeakSet()


def _close_all() -> None:
    for each in list(_emitters):
        each.close()


# It runs before the heartbeat ends, because that module is imported, and registered, first.
atexit.register(_close_all)


def _emit(found: weakref.ref[Emitter]) -> None:
    pid = os.getpid()
    while (emitter := found()) is not None and os.getpid() == pid:
        wake = emitter.wait()
        del emitter
        if wake.wait(1.0):
            time.sleep(BATCH_S)
            if (emitter := found()) is not None and os.getpid() == pid:
                is_well = emitter.write_all()
                emitter.tidy()
                del emitter
                if not is_well:
                    time.sleep(_RETRY_S)
