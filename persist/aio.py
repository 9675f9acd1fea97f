"""`persist` for asyncio and trio: the same nouns and verbs, awaited. Needs the extra `aio` (anyio).

    store = persist.aio.Store("var/sessions")

    async with store.start_stream("s-42", {"role": "user", "content": "Why?"}) as stream:
        async for token in answer():
            await stream.emit({"token": token})
        await stream.finish({"role": "assistant", "content": "Because."})

    async for event in store.follow("s-42", stream_id, after=17):
        ...

Each verb is one hop to a thread, so that the loop never waits for a disk or a lock. A verb that has begun is carried to
its end, also if the task that awaits it is cancelled: the cancellation comes through after that, so nothing is written
behind the back of a task that believes it has stopped. What a cancelled `start_stream` obtained is failed before.

There is no `edit`, since nothing may be awaited while a lock is held: `update(id, function)` takes its place.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypedDict, TypeVar, Unpack

import anyio
import anyio.lowlevel

import persist
from persist.errors import WrongType
from persist.event_log import Ended, Event
from persist.follow import Cursor
from persist.hops import News, Threads
from persist.maintenance import Problem
from persist.merge import Policy, Preference
from persist.session import Head
from persist.storage.commit import Mode
from persist.store import ClearedStream
from persist.streams import StreamInfo
from persist.turn import Message
from persist.watch import waking

Result = TypeVar("Result")


class Session:
    """A session as it was loaded; `data` is a plain dict. See `persist.Session`."""

    def __init__(self, threads: Threads, session: persist.Session) -> None:
        self._threads = threads
        self._session = session

    def __repr__(self) -> str:
        return repr(self._session).replace("persist.", "persist.aio.", 1)

    @property
    def id(self) -> str:
        return self._session.id

    @property
    def data(self) -> dict[str, Any]:
        return self._session.data

    @property
    def revision(self) -> int:
        return self._session.revision

    @property
    def created_at(self) -> datetime:
        return self._session.created_at

    @property
    def updated_at(self) -> datetime:
        return self._session.updated_at

    @property
    def active_stream_id(self) -> str | None:
        return self._session.active_stream_id

    async def save(self, *, touch: bool = True, on_conflict: Preference = "error") -> None:
        """See `persist.Session.save`."""
        await self._threads.run(lambda: self._session.save(touch=touch, on_conflict=on_conflict))

    async def refresh(self) -> None:
        """See `persist.Session.refresh`."""
        await self._threads.run(self._session.refresh)

    async def clear_stale_stream(self) -> bool:
        """See `persist.Session.clear_stale_stream`."""
        return await self._threads.run(self._session.clear_stale_stream)


class Stream:
    """A running turn that owns its session; leaving its ``async with`` without `finish` is `fail`.

    See `persist.Stream`.
    """

    def __init__(self, threads: Threads, stream: persist.Stream) -> None:
        self._threads = threads
        self._stream = stream

    def __repr__(self) -> str:
        return repr(self._stream).replace("persist.", "persist.aio.", 1)

    def __reduce__(self) -> NoReturn:
        self._stream.__reduce__()

    @property
    def id(self) -> str:
        return self._stream.id

    @property
    def session_id(self) -> str:
        return self._stream.session_id

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    async def is_cancelled(self) -> bool:
        """See `persist.Stream.cancelled`, which cannot be awaited under that name."""
        return await self._threads.run(lambda: self._stream.cancelled, is_quick=True)

    async def emit(self, *events: Any, durable: bool = False) -> int:
        """See `persist.Stream.emit`."""
        is_quick = self._stream._has_emitted
        return await self._threads.run(lambda: self._stream.emit(*events, durable=durable), is_quick=is_quick)

    async def checkpoint(self, message: Message) -> None:
        """See `persist.Stream.checkpoint`."""
        await self._threads.run(lambda: self._stream.checkpoint(message))

    async def append(self, message: Message) -> None:
        """See `persist.Stream.append`."""
        await self._threads.run(lambda: self._stream.append(message))

    async def finish(self, message: Message | None = None) -> None:
        """See `persist.Stream.finish`."""
        await self._threads.run(lambda: self._stream.finish(message))

    async def fail(self) -> None:
        """See `persist.Stream.fail`."""
        await self._threads.run(self._stream.fail)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._threads.run(lambda: self._stream.__exit__(kind, error, trace))


class _Starting(Coroutine[Any, Any, Stream]):
    """A stream that is about to be started: a coroutine that can also be entered."""

    def __init__(self, start: Coroutine[Any, Any, Stream]) -> None:
        self._start = start
        self._stream: Stream | None = None

    def __await__(self) -> Generator[Any, Any, Stream]:
        return self._start.__await__()

    def send(self, value: Any) -> Any:
        return self._start.send(value)

    def throw(self, *error: Any) -> Any:
        return self._start.throw(*error)

    def close(self) -> None:
        self._start.close()

    async def __aenter__(self) -> Stream:
        self._stream = await self._start
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        await self._stream.__aexit__(kind, error, trace)


class Following:
    """The events of a stream as they come: ``async for event in store.follow(…)``. See `persist.Following`.

    Await it, or enter it, to open it, and to hear what is wrong with a cursor (what `persist.Store.follow` raises);
    else its first step does that. A step that is cancelled (by a time-out, say) loses nothing: the next one goes on
    from there.
    """

    def __init__(
        self, threads: Threads, opened: Callable[[], Cursor], session_id: str, stream_id: str, after: int
    ) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.offset = after
        self._threads = threads
        self._opened = opened
        self._begun: tuple[Cursor, News] | None = None
        self._pending: deque[Event] = deque()
        self._is_closed = False
        self._is_taking = False
        self._open = ExitStack()

    @property
    def ended(self) -> Ended | None:
        """How the stream has ended; None while there is more to come."""
        return None if self._pending or self._begun is None else self._begun[0].ended

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        if self._begun is None:
            await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        await anyio.lowlevel.checkpoint()
        if not self._pending and not self._is_closed:
            await self._wait()
        if not self._pending:
            self.close()
            raise StopAsyncIteration
        event = self._pending.popleft()
        self.offset = event.offset
        return event

    async def _wait(self) -> None:
        """Return when there is an event, or there will be none."""
        cursor, news = self._begun or await self._begin()
        while not (self._pending or self._is_closed or cursor.ended):
            if not cursor.is_due:
                await news.wait(cursor.quiet_left_s)
            elif (found := cursor.take_cached()) is not None:
                self._pending.extend(found)
                await anyio.lowlevel.checkpoint()
            else:
                await self._take(cursor)

    async def _take(self, cursor: Cursor) -> None:
        # In the thread to the end, so that nothing is lost if the task that asked is gone; closed by another, only
        # after that.
        self._is_taking = True
        try:
            await self._threads.run(lambda: self._pending.extend(cursor.take()), is_quick=not cursor.is_quiet)
        finally:
            self._is_taking = False
            if self._is_closed:
                self._open.close()

    async def _begin(self) -> tuple[Cursor, News]:
        cursor = await self._threads.run(self._opened, undo=lambda cursor: cursor.close())
        news = News()
        self._open.callback(cursor.close)
        self._open.enter_context(waking(cursor.path, news.set))
        self._begun = cursor, news
        return self._begun

    def close(self) -> None:
        """Stop following."""
        self._is_closed = True
        if not self._is_taking:
            self._open.close()

    async def aclose(self) -> None:
        """As `close`; what `contextlib.aclosing` calls."""
        self.close()


class _Options(TypedDict, total=False):
    """Those of `persist.Store`."""

    lock_timeout_s: float
    journal: Mode
    merge: Mapping[str, Policy] | None
    keep_events_s: float
    cache_bytes: int
    allow_network: bool
    create: bool


class Store:
    """A directory of sessions; takes what `persist.Store` takes, or such a store.

    Opening it touches the disk for some milliseconds: do it before the loop serves.
    """

    def __init__(self, path: str | os.PathLike[str] | persist.Store, **options: Unpack[_Options]) -> None:
        if isinstance(path, persist.Store) and options:
            raise WrongType(what="options", expected="given to the persist.Store itself", got="given beside it")
        self._store = path if isinstance(path, persist.Store) else persist.Store(path, **options)
        self._threads = Threads()

    def __repr__(self) -> str:
        return repr(self._store).replace("persist.", "persist.aio.", 1)

    @property
    def path(self) -> Path:
        return self._store.path

    def close(self) -> None:
        """Refuse further verbs with `StoreClosed`; streams that run go on until they end."""
        self._store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def load(self, session_id: str) -> Session:
        """See `persist.Store.load`."""
        return Session(self._threads, await self._threads.run(lambda: self._store.load(session_id), is_quick=True))

    async def head(self, session_id: str) -> Head:
        """See `persist.Store.head`."""
        return await self._threads.run(lambda: self._store.head(session_id), is_quick=True)

    async def exists(self, session_id: str) -> bool:
        """See `persist.Store.exists`."""
        return await self._threads.run(lambda: self._store.exists(session_id), is_quick=True)

    async def ids(self, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """See `persist.Store.ids`."""
        return await self._threads.run(lambda: self._store.ids(after=after, limit=limit), is_quick=True)

    async def create(self, session_id: str, data: dict[str, Any] | None = None) -> Session:
        """See `persist.Store.create`."""
        return Session(self._threads, await self._threads.run(lambda: self._store.create(session_id, data)))

    async def duplicate(self, session_id: str, new_id: str) -> Session:
        """See `persist.Store.duplicate`."""
        return Session(self._threads, await self._threads.run(lambda: self._store.duplicate(session_id, new_id)))

    async def delete(self, session_id: str, *, force: bool = False) -> None:
        """See `persist.Store.delete`."""
        await self._threads.run(lambda: self._store.delete(session_id, force=force))

    async def update(
        self,
        session_id: str,
        function: Callable[[dict[str, Any]], Result],
        *,
        if_revision: int | None = None,
        touch: bool = True,
    ) -> Result:
        """See `persist.Store.update`."""
        options: dict[str, Any] = {"if_revision": if_revision, "touch": touch}
        return await self._threads.run(lambda: self._store.update(session_id, function, **options))

    async def append(self, session_id: str, field: str, item: Any, *, touch: bool = True) -> int:
        """See `persist.Store.append`."""
        return await self._threads.run(lambda: self._store.append(session_id, field, item, touch=touch))

    def start_stream(
        self, session_id: str, message: Message | None = None, *, stream_id: str | None = None
    ) -> _Starting:
        """See `persist.Store.start_stream`. Use it as ``async with store.start_stream(…) as stream``, or await it."""
        return _Starting(self._started(lambda: self._store.start_stream(session_id, message, stream_id=stream_id)))

    async def _started(self, start: Callable[[], persist.Stream]) -> Stream:
        return Stream(
            self._threads, await self._threads.run(start, undo=lambda stream: stream.__exit__(None, None, None))
        )

    def follow(self, session_id: str, stream_id: str, *, after: int = 0) -> Following:
        """See `persist.Store.follow`. Use it as ``async for event in store.follow(…)``; await it to open it at once."""
        return Following(
            self._threads, lambda: self._store._cursor(session_id, stream_id, after), session_id, stream_id, after
        )

    async def events(self, session_id: str, stream_id: str, *, after: int = 0) -> list[Event]:
        """See `persist.Store.events`."""
        return await self._threads.run(lambda: self._store.events(session_id, stream_id, after=after), is_quick=True)

    async def cancel(self, session_id: str, stream_id: str, *, force: bool = False) -> bool:
        """See `persist.Store.cancel`."""
        return await self._threads.run(lambda: self._store.cancel(session_id, stream_id, force=force))

    async def stream(self, session_id: str) -> StreamInfo | None:
        """See `persist.Store.stream`."""
        return await self._threads.run(lambda: self._store.stream(session_id))

    async def streams(self) -> list[StreamInfo]:
        """See `persist.Store.streams`."""
        return await self._threads.run(self._store.streams)

    async def clear_stale_streams(self, *, every_session: bool = False) -> list[ClearedStream]:
        """See `persist.Store.clear_stale_streams`."""
        return await self._threads.run(lambda: self._store.clear_stale_streams(every_session=every_session))

    async def check(self) -> list[Problem]:
        """See `persist.Store.check`."""
        return await self._threads.run(self._store.check)

    async def compact(self, session_id: str, *, alone: bool = False) -> bool:
        """See `persist.Store.compact`."""
        return await self._threads.run(lambda: self._store.compact(session_id, alone=alone))

    async def accept(self, session_id: str, *, drop_journal: bool = False) -> Session:
        """See `persist.Store.accept`."""
        accepted = await self._threads.run(lambda: self._store.accept(session_id, drop_journal=drop_journal))
        return Session(self._threads, accepted)
