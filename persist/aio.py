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

import functools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, Self, TypedDict, TypeVar, Unpack

import anyio
import anyio.lowlevel

import persist
from persist.errors import WrongType
from persist.event_log import Ended, Event
from persist.follow import Cursor
from persist.hops import News, Threads
from persist.merge import Policy
from persist.storage.commit import Mode
from persist.turn import Message
from persist.watch import waking

Result = TypeVar("Result")
P = ParamSpec("P")


def _hop(
    verb: Callable[Concatenate[Any, P], Result], *, is_quick: bool = False
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """Return a verb that is awaited: one hop to a thread. `is_quick`: it waits for no session's lock."""

    @functools.wraps(verb)
    async def hop(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        result: Result = await self._threads.run(lambda: verb(self._sync, *args, **kwargs), is_quick=is_quick)
        return result

    return hop


def _loading(
    verb: Callable[Concatenate[Any, P], persist.Session], *, is_quick: bool = False
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Session]]:
    """Return a verb that is awaited, and gives a session."""

    @functools.wraps(verb)
    async def hop(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Session:
        found = await self._threads.run(lambda: verb(self._sync, *args, **kwargs), is_quick=is_quick)
        return Session(self._threads, found)

    return hop


class Session:
    """A session as it was loaded; `data` is a plain dict. See `persist.Session`."""

    def __init__(self, threads: Threads, session: persist.Session) -> None:
        self._threads = threads
        self._sync = session

    def __repr__(self) -> str:
        return repr(self._sync).replace("persist.", "persist.aio.", 1)

    @property
    def id(self) -> str:
        return self._sync.id

    @property
    def data(self) -> dict[str, Any]:
        return self._sync.data

    @property
    def revision(self) -> int:
        return self._sync.revision

    @property
    def created_at(self) -> datetime:
        return self._sync.created_at

    @property
    def updated_at(self) -> datetime:
        return self._sync.updated_at

    @property
    def active_stream_id(self) -> str | None:
        return self._sync.active_stream_id

    save = _hop(persist.Session.save)
    refresh = _hop(persist.Session.refresh)
    clear_stale_stream = _hop(persist.Session.clear_stale_stream)


class Stream:
    """A running turn that owns its session; leaving its ``async with`` without `finish` is `fail`.

    See `persist.Stream`.
    """

    def __init__(self, threads: Threads, stream: persist.Stream) -> None:
        self._threads = threads
        self._sync = stream

    def __repr__(self) -> str:
        return repr(self._sync).replace("persist.", "persist.aio.", 1)

    def __reduce__(self) -> NoReturn:
        self._sync.__reduce__()

    @property
    def id(self) -> str:
        return self._sync.id

    @property
    def session_id(self) -> str:
        return self._sync.session_id

    @property
    def epoch(self) -> int:
        return self._sync.epoch

    async def is_cancelled(self) -> bool:
        """See `persist.Stream.cancelled`, which cannot be awaited under that name."""
        return await self._threads.run(lambda: self._sync.cancelled, is_quick=True)

    async def emit(self, *events: Any, durable: bool = False) -> int:
        """See `persist.Stream.emit`."""
        is_quick = self._sync._events.is_open
        return await self._threads.run(lambda: self._sync.emit(*events, durable=durable), is_quick=is_quick)

    checkpoint = _hop(persist.Stream.checkpoint)
    append = _hop(persist.Stream.append)
    finish = _hop(persist.Stream.finish)
    fail = _hop(persist.Stream.fail)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._threads.run(lambda: self._sync.__exit__(kind, error, trace))


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
        self._sync = path if isinstance(path, persist.Store) else persist.Store(path, **options)
        self._threads = Threads()

    def __repr__(self) -> str:
        return repr(self._sync).replace("persist.", "persist.aio.", 1)

    @property
    def path(self) -> Path:
        return self._sync.path

    def close(self) -> None:
        """Refuse further verbs with `StoreClosed`; streams that run go on until they end."""
        self._sync.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    load = _loading(persist.Store.load, is_quick=True)
    head = _hop(persist.Store.head, is_quick=True)
    exists = _hop(persist.Store.exists, is_quick=True)
    ids = _hop(persist.Store.ids, is_quick=True)
    create = _loading(persist.Store.create)
    duplicate = _loading(persist.Store.duplicate)
    delete = _hop(persist.Store.delete)
    update = _hop(persist.Store.update)
    append = _hop(persist.Store.append)

    def start_stream(
        self, session_id: str, message: Message | None = None, *, stream_id: str | None = None
    ) -> _Starting:
        """See `persist.Store.start_stream`. Use it as ``async with store.start_stream(…) as stream``, or await it."""
        return _Starting(self._started(lambda: self._sync.start_stream(session_id, message, stream_id=stream_id)))

    async def _started(self, start: Callable[[], persist.Stream]) -> Stream:
        return Stream(
            self._threads, await self._threads.run(start, undo=lambda stream: stream.__exit__(None, None, None))
        )

    def follow(self, session_id: str, stream_id: str, *, after: int = 0) -> Following:
        """See `persist.Store.follow`. Use it as ``async for event in store.follow(…)``; await it to open it at once."""
        return Following(
            self._threads, lambda: self._sync._cursor(session_id, stream_id, after), session_id, stream_id, after
        )

    events = _hop(persist.Store.events, is_quick=True)
    cancel = _hop(persist.Store.cancel)
    stream = _hop(persist.Store.stream)
    streams = _hop(persist.Store.streams)
    clear_stale_streams = _hop(persist.Store.clear_stale_streams)
    check = _hop(persist.Store.check)
    compact = _hop(persist.Store.compact)
    accept = _loading(persist.Store.accept)
