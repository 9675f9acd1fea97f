"""The reading of the events of streams, for followers in this process.

One thread a process fetches the news of all streams that are followed here, once for all their followers. NOTIFY wakes
it, and is a hint only. The thread also asks the server in short intervals, because pgbouncer and a lost connection
swallow hints. A follower that is behind, or whose news are late, asks the server itself.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg

from persist import json_codec
from persist.engine import Ended, Event, Fenced
from persist.errors import PersistError
from persist.log import log
from persist.postgres.connections import (
    Connection,
    Connections,
    Own,
    Place,
    Row,
    is_direct,
    text_of,
    try_start,
)
from persist.storage.clock import now_s

if TYPE_CHECKING:
    from persist.postgres.engine import PostgresEngine

#: How often a process asks for news, where hints are heard and where they are not.
POLL_S, POLL_WITHOUT_HINTS_S = 0.25, 0.05
#: The pause after a failure, before the server is asked again.
_RETRY_S = 0.2
#: So many events are read at a time.
_PAGE = 1000
#: So many events of a stream are kept for its followers, up to so many bytes.
_MOST_KEPT, _MOST_KEPT_BYTES = 1000, 1024 * 1024


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
        writer = engine.writer_of(*self._key)
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
                    if not try_start(self._thread):
                        # The follower asks the server itself, now and then.
                        self._thread = None
            yield feed
        finally:
            # At the end of the interpreter nobody waits, and a thread that was stopped inside never leaves the guard.
            # Neither does one that a forked child lacks.
            if not sys.is_finalizing() and feed.pid == os.getpid():
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
            # A copy, because the garbage collector may end a dropped wait at any moment.
            feeds = self._feeds.copy()
        asked = {number: feed for number, feed in feeds.items() if numbers is None or number in numbers}
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
