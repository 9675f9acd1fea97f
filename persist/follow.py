"""The following of a stream: its events as they come, in any process, until it ends, however it ends.

A cursor is a stream's id and the offset of the last event that was seen. A client that lost its connection comes back
with its cursor, to any worker. It misses nothing, and sees nothing twice. A cursor that cannot be right gets an error
at once.

A waiting follower is woken when something was emitted. Only after a silence does it ask whether the owner lives.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Literal, Self

from persist import errors, streams
from persist.engine import Ended, Event, EventReader
from persist.storage import layout
from persist.storage.clock import now_s
from persist.wake import Wake

#: The silence after which a follower asks whether the owner lives, and the pause before it asks again.
LOOK_S = 0.4
#: How long that question may wait for the session's lock. Events that come meanwhile wait with it. It doubles each time
#: that it was too short, because a follower that waits for less time than those before it take never has its turn.
LOOK_TIMEOUT_S, LAST_LOOK_TIMEOUT_S = 0.02, 0.64


class Cursor:
    """A place in the events of one stream.

    `take` returns the new events. `ended` tells how the stream has ended, once all events were taken.
    """

    def __init__(self, backend: streams.Backend, session_id: str, stream_id: str, after: int | Literal["end"]) -> None:
        if after != "end" and (type(after) is not int or after < 0):
            expected = "the offset of an event, from 0 up, or 'end'"
            raise errors.InvalidArgument(what="after", got=errors.shown(after), expected=expected)
        self.session_id = layout.check_session_id(session_id)
        self.stream_id = layout.check_stream_id(stream_id)
        self.after = sys.maxsize if after == "end" else after
        self.ended: Ended | None = None
        self._backend = backend
        self._look_timeout_s = LOOK_TIMEOUT_S
        self._reader = self._open()
        self._place = self._reader.place
        try:
            self._first = self._reader.read(until=self._reader.size())
        except FileNotFoundError:
            # Their time was over just now.
            raise self._not_found() from None
        if after == "end":
            self._reader.begin_here()
            self.after = self._reader.count
        if self._reader.is_overtaken or self._reader.count < self.after:
            self._reader.close()
            self._require_kept()
            raise self._not_found(after=self.after, count=self._reader.count)
        self._hush()

    def _open(self) -> EventReader:
        engine = self._backend.engine
        with suppress(FileNotFoundError):
            return engine.events(self.session_id, self.stream_id, self.after)
        with engine.transaction(self.session_id) as tx:
            # The stream may be about to emit its first event.
            is_active = streams.active_in(tx.head()) == self.stream_id
            try:
                return engine.events(self.session_id, self.stream_id, self.after, create=is_active)
            except FileNotFoundError as error:
                self._place = error.filename
                raise self._not_found() from None

    def _not_found(self, **facts: int) -> errors.EventsNotFound:
        named = {"session_id": self.session_id, "stream_id": self.stream_id, "path": self._place}
        return errors.EventsNotFound(**named, **facts)

    def _require_kept(self) -> None:
        """Raise `EventsNotFound` if events were dropped before they were read."""
        if self._reader.is_overtaken:
            raise self._not_found(first=self._reader.first)

    def close(self) -> None:
        """Stop reading."""
        self._reader.close()

    def waking(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `wake` during a block, whenever any process has emitted."""
        return self._reader.waking(wake)

    @property
    def is_due(self) -> bool:
        """Whether `take` has something to do. Never waits for the disk."""
        return bool(self._first) or self._reader.has_more or self._reader.ended is not None or self.is_quiet

    @property
    def quiet_left_s(self) -> float:
        """The seconds in which there is nothing to do, if nothing is written."""
        return max(0.0, self._look_at - now_s()) + 0.001

    @property
    def is_quiet(self) -> bool:
        """Whether it is time to ask if the stream's owner lives."""
        return now_s() > self._look_at

    def _hush(self, share: float = 1.0) -> None:
        """Begin a silence, or a share of one. No two have the same length, so that not all followers ask at once."""
        self._look_at = now_s() + share * LOOK_S * random.uniform(0.75, 1.0)

    def take(self) -> list[Event]:
        """Return the new events. There are none if none came yet, or if the stream has ended."""
        # The question comes first, so that events that the owner wrote before it are read.
        unsaid = None
        if self.is_quiet and not self._reader.has_more:
            unsaid = self._ended_unsaid()
            self._reader.look_again()
        try:
            found, self._first = self._first or self._reader.read(), []
        except FileNotFoundError:
            # The events were moved to another file, and that file is gone already.
            raise self._not_found() from None
        return self._taken(found, unsaid)

    def take_cached(self) -> list[Event] | None:
        """Take as `take` does, for an event loop. None if that would wait for the disk or for a lock."""
        if self._first or self.is_quiet:
            return None
        found = self._reader.read_cached()
        return None if found is None else self._taken(found)

    def _taken(self, found: list[Event], unsaid: Ended | None = None) -> list[Event]:
        self._require_kept()
        if found:
            self._hush()
        else:
            self.ended = self._reader.ended or unsaid
        return found

    def take_all(self) -> list[Event]:
        """Return all events that are written by now, and close the cursor. It does not ask whether the owner lives."""
        found, until = self._first, self._reader.size()
        try:
            # Only up to the size that the file has now, because a fast stream could be followed for ever.
            while new := self._reader.read(until):
                found += new
        except FileNotFoundError:
            raise self._not_found() from None
        finally:
            self.close()
        return found

    def _ended_unsaid(self) -> Ended | None:
        """Ask how a stream without an end line has ended. None if it goes on."""
        self._hush()
        try:
            ended = self._backend.engine.how_ended(self.session_id, self.stream_id, self._look_timeout_s)
            self._look_timeout_s = LOOK_TIMEOUT_S
            return ended
        except (errors.LockError, errors.CommitFailed, errors.Unreadable) as error:
            if isinstance(error, errors.LockError) and error.kind not in ("timeout", "refused"):
                raise
            # Somebody works on the session, there is no descriptor left just now, or this user may only read. So it
            # asks again soon.
            self._look_timeout_s = min(self._look_timeout_s * 2, LAST_LOOK_TIMEOUT_S)
            self._hush(0.5)
            return None
        except errors.SessionNotFound:
            return "deleted"


class Following:
    """The events of a stream as they come, made by `Store.follow`. A loop over it ends with the stream.

    After the loop, `ended` tells how: ``"finished"``, ``"failed"``, ``"cancelled"``, ``"died"`` (its process is gone,
    noticed within a second), ``"deleted"``, or ``"unknown"`` (the end line was lost, with a full disk say). `offset` is
    the offset of the last event that was handed out. With it and the stream's id, anybody can go on from here. A loop
    that is so slow that its next event was dropped (`Store(keep_events_bytes=…)`) gets `EventsNotFound`.

    It is not for several threads at once. Leave a loop early with `close`, or use it in a ``with``.
    """

    def __init__(self, cursor: Cursor) -> None:
        self.session_id = cursor.session_id
        self.stream_id = cursor.stream_id
        self.offset = cursor.after
        self._cursor = cursor
        self._pending: deque[Event] = deque()
        self._news = Wake()
        self._is_closed = False
        self._open = ExitStack()
        self._open.callback(cursor.close)
        self._open.enter_context(cursor.waking(self._news.set))

    def __repr__(self) -> str:
        ended = self.ended and f", {self.ended}"
        return f"<persist.Following {self.stream_id} of {self.session_id!r} at {self.offset}{ended}>"

    @property
    def ended(self) -> Ended | None:
        """How the stream has ended, or None while there is more to come."""
        return None if self._pending else self._cursor.ended

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._pending:
            if self._is_closed or self._cursor.ended is not None:
                self.close()
                raise StopIteration
            self._news.clear()
            self._pending.extend(self._cursor.take())
            if not self._pending and self._cursor.ended is None:
                self._news.wait(self._cursor.quiet_left_s)
        event = self._pending.popleft()
        self.offset = event.offset
        return event

    def close(self) -> None:
        """Stop following."""
        self._is_closed = True
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
