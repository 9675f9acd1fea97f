"""The events of streams: rows that the one owner of a stream numbers, and the readers that are told of them.

**Writing.** `emit` gives an event its number and puts it into a buffer. A thread writes the buffers of all streams of
this process, every 25 ms, in one message. Each write is fenced by the stream's row: nothing is written to a stream that
has ended, or by a process whose lease is over. A commit of the stream writes the events that wait together with its
message. So nobody finds a message that knows more than the events, whatever dies in between.
The same thread drops the oldest events of a stream that has too many, and the events of streams whose time is over.

**Reading.** One thread a process fetches the news of all streams that are followed here, once for all their followers.
NOTIFY wakes it, and is a hint only. The thread also asks the server in short intervals, because pgbouncer and a lost
connection swallow hints. A follower that is behind, or whose news are late, asks the server itself.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from persist import json_codec
from persist.engine import Ended, Event, Fenced
from persist.errors import EmitFailed, PersistError, nested
from persist.log import log
from persist.postgres.connections import (
    Connection,
    Connections,
    Own,
    Place,
    Row,
    at_end_of_children,
    is_direct,
    text_of,
)
from persist.postgres.heartbeat import HeldLease
from persist.storage.clock import now_s

if TYPE_CHECKING:
    from persist.postgres.engine import PostgresEngine

#: How long the events of a process are gathered, before they are written together.
BATCH_S = 0.025
#: How often a process asks for news, where hints are heard and where they are not.
POLL_S, POLL_WITHOUT_HINTS_S = 0.25, 0.05
#: The pause after a failure, before the server is asked again.
_RETRY_S = 0.2
#: The end of a process waits for so long for events that are being written.
_END_S = 5.0
#: So many events are read at a time.
_PAGE = 1000
#: How many expired streams an end removes.
_MOST_REMOVED = 2
#: So many events of a stream are kept for its followers, up to so many bytes.
_MOST_KEPT, _MOST_KEPT_BYTES = 1000, 1024 * 1024


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
        if self._pid != os.getpid():
            # The events are the parent's.
            return
        self._engine.writers.pop((self.session_id, self.stream_id), None)
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
        self._guard = threading.Lock()
        self._dirty: dict[RemoteWriter, None] = {}
        self._wake = threading.Event()
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
                self._thread.start()
                at_end_of_children(_close_all, priority=1)
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

    def wait(self) -> threading.Event:
        """Return the event for which the thread waits."""
        return self._wake

    def close(self) -> None:
        """Write what waits, at the end of the process."""
        if self._pid == os.getpid():
            # A thread that the end of the interpreter has stopped inside never leaves.
            if self._round.acquire(timeout=_END_S):
                self._round.release()
            self.write_all()
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
                writers, self._dirty = list(self._dirty), {}
            # A commit of a stream writes the stream's events itself. The others do not wait for it.
            taken = [writer for writer in writers if writer.writing.acquire(blocking=False)]
            later, failure = [writer for writer in writers if writer not in taken], None
            try:
                if taken:
                    self._own.run(lambda connection: write(self._connections, connection, taken))
                    self._failing_since = None
            except (PersistError, psycopg.Error) as error:
                log.debug("%s: events wait for the server: %s", self._connections.place, error)
                later, failure = writers, str(error)
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


# --- reading ---------------------------------------------------------------------------------------------------------


class Feed:
    """The news of one stream, for its followers in this process. It is used under `guard`, which is its listener's.

    Attributes:
        key: the session's id and the stream's.
        after: the offset before the first event that is kept. None before the first answer of the server.
        fetched: the offset of the last event that was fetched.
        first: the offset of the first event that the server has, and `last` that of its last one.
        ended: how the stream has ended. If it has not, `is_alive` tells whether it runs.
        is_gone: whether the server does not have the stream any more.
        asked_at: the time at which the server was asked last.
    """

    def __init__(self, key: tuple[str, str], guard: Any) -> None:
        self.key = key
        self.guard = guard
        self.pid = os.getpid()
        self.after: int | None = None
        self.fetched = self.last = 0
        self.first = 1
        self.ended: Ended | None = None
        self.is_alive, self.is_gone = True, False
        self.asked_at = 0.0
        self.wakes: tuple[Callable[[], None], ...] = ()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._bytes = 0

    @property
    def is_fresh(self) -> bool:
        """Whether the server was asked lately."""
        return now_s() - self.asked_at <= 2 * POLL_S

    def add(self, place: int, event: bytes) -> None:
        """Keep the next event, and drop the oldest ones. A slow follower asks the server for them."""
        if place != self.fetched + 1:
            # The events in between were dropped. A follower that lacks them is told so by the server.
            self._kept.clear()
            self.after, self._bytes = place - 1, 0
        self._kept.append((place, event))
        self.fetched = place
        self._bytes += len(event)
        while len(self._kept) > _MOST_KEPT or (self._bytes > _MOST_KEPT_BYTES and len(self._kept) > 1):
            self.after, dropped = self._kept.popleft()
            self._bytes -= len(dropped)

    def behind(self, count: int) -> list[tuple[int, bytes]] | None:
        """Return the kept events behind an offset. None if the server has to be asked."""
        if self.after is None or count < self.after or self.is_gone or not self.is_fresh:
            return None
        # A follower that keeps up wants only the last ones.
        found = list(itertools.takewhile(lambda each: each[0] > count, reversed(self._kept)))
        found.reverse()
        return found


class RemoteReader:
    """The reader of one stream's events from an offset on."""

    def __init__(self, engine: PostgresEngine, session_id: str, stream_id: str, after: int) -> None:
        self._engine = engine
        self._key = session_id, stream_id
        self.place: str = Place(f"{engine.where(session_id)}, events of {stream_id}")
        writer = engine.writers.get(self._key)
        if writer is not None and not writer.is_fenced:
            # The owner's process sees what it has emitted.
            with contextlib.suppress(PersistError, Fenced):
                writer.flush()
        rows = engine.run("find_stream", id=text_of(session_id), stream_id=stream_id)
        if not rows:
            raise FileNotFoundError(errno.ENOENT, "there are no such events", self.place)
        self.number: int = rows[0][0]
        self.first: int = rows[0][1]
        self._last: int = rows[0][2]
        self._session: int = rows[0][4]
        self.ended: Ended | None = None
        # Events before `after` are passed over unread.
        self.count = max(min(after, self._last), self.first - 1)
        self.is_overtaken = after < self.first - 1
        self._has_news = True
        #: The news of this process, while this reader waits for them.
        self._feed: Feed | None = None
        #: The time before which the news may lack something that this reader has to see.
        self._asks_until = 0.0

    def size(self) -> int:
        """Return the offset of the last event, as the server has told it last."""
        return self._last

    @property
    def has_more(self) -> bool:
        """Whether somebody has told of events that were not read yet."""
        return self._has_news

    def read(self, until: int | None = None) -> list[Event]:
        """Return the events that came since the last call."""
        if self.ended is not None or (until is not None and self.count >= until):
            return []
        found = self.read_cached() if until is None else None
        return self._ask(until) if found is None else found

    def read_cached(self) -> list[Event] | None:
        """Read as `read` does, from the news of this process. None if the server has to be asked."""
        if self.ended is not None:
            return []
        feed = self._feed
        if feed is None or feed.pid != os.getpid():
            return None
        self._has_news = False
        with feed.guard:
            found = None if feed.asked_at < self._asks_until else feed.behind(self.count)
            last, ended = feed.last, feed.ended
        return None if found is None else self._taken(found, last, ended)

    def _ask(self, until: int | None) -> list[Event]:
        self._has_news = False
        limits = {"until": 2**62 if until is None else until, "limit": _PAGE}
        rows = self._engine.run("events", stream=self.number, after=self.count, **limits)
        if not rows:
            if self._engine.run("has_number", session=self._session)[0][0]:
                raise FileNotFoundError(errno.ENOENT, "the events are gone", self.place)
            self.ended = "deleted"
            return []
        self.first, last, ended = rows[0][:3]
        self.is_overtaken = self.is_overtaken or self.first - 1 > self.count
        events = [(row[3], row[4]) for row in rows if row[3] is not None]
        return self._taken(events, last, None if ended is None else ended.decode())

    def _taken(self, events: list[tuple[int, bytes]], last: int, ended: Ended | None) -> list[Event]:
        self._last = max(self._last, last)
        found = [Event(place, json_codec.decode(event)) for place, event in events]
        if found:
            self.count = found[-1].offset
            self._has_news = self.count < last or ended is not None
        elif ended is not None and self.count >= last:
            self.ended = ended
        return found

    def begin_here(self) -> None:
        """Ask only for the events behind the last one that is there."""
        self.count = max(self.count, self._last)

    def look_again(self) -> None:
        """Let the next read ask the server, unless it was asked since."""
        self._has_news, self._asks_until = True, now_s()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` during a block, whenever any process has emitted."""

        def tell() -> None:
            self._has_news = True
            wake()

        with self._engine.listener.following(self.number, self._key, tell) as feed:
            # Events that came before this moment may have been told to nobody here.
            self._feed, self._asks_until = feed, now_s()
            try:
                yield
            finally:
                self._feed = None

    def close(self) -> None:
        """Do nothing, because nothing is kept open."""


class Listener:
    """The thread that fetches the news of all streams that are followed in this process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._own = Own(connections)
        # Re-entrant, because the garbage collector may end a dropped wait in the thread that is inside just now.
        self._guard = threading.RLock()
        self._feeds: dict[int, Feed] = {}
        self._by_key: dict[tuple[str, str], Feed] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def following(self, number: int, key: tuple[str, str], wake: Callable[[], None]) -> Iterator[Feed]:
        """Call `wake` during a block, when a stream has news. Yield these news."""
        try:
            with self._guard:
                feed = self._feeds.setdefault(number, Feed(key, self._guard))
                self._by_key[key] = feed
                feed.wakes = (*feed.wakes, wake)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._listen, name="persist-listen", daemon=True)
                    self._thread.start()
            yield feed
        finally:
            # At the end of the interpreter nobody waits, and a thread that was stopped inside never leaves the guard.
            if not sys.is_finalizing():
                with self._guard:
                    feed.wakes = tuple(each for each in feed.wakes if each is not wake)
                    if not feed.wakes:
                        self._feeds.pop(number, None)
                        if self._by_key.get(key) is feed:
                            del self._by_key[key]

    def knows_alive(self, session_id: str, stream_id: str) -> bool:
        """Tell whether there are fresh news that say that a stream runs."""
        with self._guard:
            feed = self._by_key.get((session_id, stream_id))
            return feed is not None and feed.is_alive and feed.is_fresh

    def _listen(self) -> None:
        listening, poll_at, poll_s = None, 0.0, POLL_S
        while True:
            with self._guard:
                if not self._feeds:
                    self._thread = None
                    self._own.close()
                    return
            try:
                connection = self._own.get()
                if listening is not connection:
                    connection.execute(f"LISTEN {self._connections.channel}")
                    listening, poll_at = connection, 0.0
                    # A pooler may swallow the hints.
                    poll_s = POLL_S if is_direct(connection) else POLL_WITHOUT_HINTS_S
                hinted = set[int]()
                for hint in connection.notifies(timeout=max(0.0, poll_at - now_s()), stop_after=1):
                    hinted.update(int(each) for each in hint.payload.split(",") if each.isdecimal() and len(each) < 20)
                if hinted:
                    poll_s = POLL_S
                if now_s() < poll_at:
                    self._fetch(connection, hinted)
                    continue
                if self._fetch(connection, None) - hinted and poll_at:
                    # There are news, and nobody has told of them.
                    poll_s = POLL_WITHOUT_HINTS_S
                poll_at = now_s() + poll_s
            except (PersistError, psycopg.Error) as error:
                log.debug("%s: the listener lost its connection: %s", self._connections.place, error)
                time.sleep(_RETRY_S)

    def _fetch(self, connection: Connection, numbers: set[int] | None) -> set[int]:
        """Fetch the news of streams, or of all. Wake their followers. Return the streams that have news."""
        with self._guard:
            asked = {number: feed for number, feed in self._feeds.items() if numbers is None or number in numbers}
        fresh = set[int]()
        while asked:
            places = [None if feed.after is None else feed.fetched for feed in asked.values()]
            reached, asked_at = {number: feed.fetched for number, feed in asked.items()}, now_s()
            rows = self._connections.query(connection, "news", streams=list(asked), after=places, limit=_PAGE)
            with self._guard:
                news = self._take(asked, rows, asked_at)
            for feed in news:
                for wake in feed.wakes:
                    wake()
            fresh |= {number for number, feed in asked.items() if feed in news}
            # Only a page comes at a time.
            asked = {number: feed for number, feed in asked.items() if reached[number] < feed.fetched < feed.last}
        return fresh

    @staticmethod
    def _take(asked: dict[int, Feed], rows: list[Row], asked_at: float) -> list[Feed]:
        """Note the server's answer, and return the streams that have news."""
        before = {number: (feed.after is None, feed.last, feed.ended, feed.is_gone) for number, feed in asked.items()}
        for feed in asked.values():
            feed.asked_at, feed.is_gone = asked_at, True
        for number, last, ended, is_alive, place, event in rows:
            feed = asked[number]
            feed.last, feed.ended = last, None if ended is None else ended.decode()
            feed.is_alive, feed.is_gone = is_alive, False
            if feed.after is None:
                feed.after = feed.fetched = last
            elif place is not None:
                feed.add(place, event)
        return [
            feed
            for number, feed in asked.items()
            if before[number] != (feed.after is None, feed.last, feed.ended, feed.is_gone)
        ]
