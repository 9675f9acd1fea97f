"""`persist` for asyncio and trio: the same nouns and verbs, awaited. Needs the extra `aio` (anyio).

    store = persist.aio.Store("var/sessions")

    async with store.start_stream("s-42", {"role": "user", "content": "Why?"}) as stream:
        async for token in answer():
            await stream.emit({"token": token})
        await stream.finish({"role": "assistant", "content": "Because."})

    async for event in store.follow("s-42", stream_id, after=17):
        ...

Each verb is one hop to a thread, so that the loop never waits for a disk or a lock. A verb that has begun is carried to its
end, also if the task that awaits it is cancelled: the cancellation comes through after that, so nothing is written behind the
back of a task that believes it has stopped. What a cancelled `start_stream` obtained is failed before.

There is no `edit`, since nothing may be awaited while a lock is held: `update(id, function)` takes its place.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

import persist
from persist import following
from persist.errors import WrongType
from persist.files.events import Ended, Event, waking
from persist.merge import Preference
from persist.session import Head
from persist.store import ClearedStream, Problem
from persist.streams import StreamInfo
from persist.turn import Message

Result = TypeVar("Result")
#: Threads of a store: so many verbs may wait for locks and disks at the same time.
THREADS = 32


# --- hops ------------------------------------------------------------------------------------------------------------------


class _Threads:
    """Runs verbs in threads of their own, away from those that the application hops to."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="persist")
        self._limiter = anyio.CapacityLimiter(THREADS)

    async def run(self, function: Callable[[], Result], undo: Callable[[Result], object] | None = None) -> Result:
        """Call a function in a thread, to its end, whatever becomes of the caller.

        Args:
            undo: called with the result, in a thread, if the caller was cancelled and will not get it.
        """
        with anyio.CancelScope(shield=True):
            result, cancellation = await self._finish(function)
        try:
            if cancellation is not None:
                raise cancellation
            if undo is not None:
                await anyio.lowlevel.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            if undo is not None:
                with anyio.CancelScope(shield=True):
                    await self._finish(lambda: undo(result))
            raise
        return result

    async def _finish(self, function: Callable[[], Result]) -> tuple[Result, BaseException | None]:
        """Its result, and what cancelled the caller in the meantime."""
        if not _is_asyncio():
            return await anyio.to_thread.run_sync(function, limiter=self._limiter), None
        call = contextvars.copy_context().run
        # Not a task: `asyncio.run` cancels all tasks when it ends, and then the result would be lost.
        work = asyncio.get_running_loop().run_in_executor(self._executor, call, function)
        cancellation: BaseException | None = None
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError as error:
                # A task's own cancel() does not heed anyio's shield.
                cancellation = error
        if cancellation is not None and work.exception() is not None:
            raise cancellation from work.exception()
        return work.result(), cancellation

    def close(self) -> None:
        """Let the threads go when they have done what they have begun."""
        self._executor.shutdown(wait=False)


def _is_asyncio() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


class _News:
    """An event that any thread may set, in the loop that made it."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        if _is_asyncio():
            self._soon: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        else:
            import trio

            self._soon = trio.lowlevel.current_trio_token().run_sync_soon

    def set(self) -> None:
        # RuntimeError, and trio's RunFinishedError, which is one: the loop has ended, and nobody waits.
        with suppress(RuntimeError):
            self._soon(self._set)

    def _set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when it is set, or after some seconds; it is unset then."""
        with anyio.move_on_after(timeout_s):
            await self._event.wait()
        self._event = anyio.Event()


# --- the nouns -------------------------------------------------------------------------------------------------------------


class Session:
    """A session as it was loaded; `data` is a plain dict. See `persist.Session`."""

    def __init__(self, threads: _Threads, session: persist.Session) -> None:
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
    """A running turn that owns its session; leaving its ``async with`` without `finish` is `fail`. See `persist.Stream`."""

    def __init__(self, threads: _Threads, stream: persist.Stream) -> None:
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
        return await self._threads.run(lambda: self._stream.cancelled)

    async def emit(self, *events: Any, durable: bool = False) -> int:
        """See `persist.Stream.emit`."""
        return await self._threads.run(lambda: self._stream.emit(*events, durable=durable))

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


class _Starting:
    """A stream that is about to be started: await it, or enter it."""

    def __init__(self, threads: _Threads, start: Callable[[], persist.Stream]) -> None:
        self._threads = threads
        self._start = start
        self._stream: Stream | None = None

    def __await__(self) -> Generator[Any, Any, Stream]:
        return self._started().__await__()

    async def _started(self) -> Stream:
        return Stream(self._threads, await self._threads.run(self._start, undo=lambda stream: stream.fail()))

    async def __aenter__(self) -> Stream:
        self._stream = await self._started()
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        await self._stream.__aexit__(kind, error, trace)


class Following:
    """The events of a stream as they come: ``async for event in store.follow(…)``. See `persist.Following`.

    Await it, or enter it, to open it, and to hear what is wrong with a cursor (what `persist.Store.follow` raises); else its
    first step does that. A step that is cancelled (by a time-out, say) loses nothing: the next one goes on from there.
    """

    def __init__(
        self, threads: _Threads, opened: Callable[[], following.Cursor], session_id: str, stream_id: str, after: int
    ) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.offset = after
        self._threads = threads
        self._opened = opened
        self._begun: tuple[following.Cursor, _News] | None = None
        self._pending: deque[Event] = deque()
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
        cursor, news = self._begun or await self._begin()
        while not self._pending:
            if cursor.ended is not None:
                self.close()
                raise StopAsyncIteration
            if not cursor.is_due:
                await news.wait(following.POLL_S)
            elif (found := cursor.take_cached()) is not None:
                self._pending.extend(found)
            else:
                # In the thread to the end, so that nothing is lost if the task that asked is gone.
                await self._threads.run(lambda: self._pending.extend(cursor.take()))
        event = self._pending.popleft()
        self.offset = event.offset
        return event

    async def _begin(self) -> tuple[following.Cursor, _News]:
        cursor = await self._threads.run(self._opened, undo=lambda cursor: cursor.close())
        news = _News()
        self._open.callback(cursor.close)
        self._open.enter_context(waking(cursor.path, news.set))
        self._begun = cursor, news
        return self._begun

    def close(self) -> None:
        """Stop following."""
        self._open.close()

    async def aclose(self) -> None:
        """As `close`; what `contextlib.aclosing` calls."""
        self.close()


class Store:
    """A directory of sessions; takes what `persist.Store` takes, or such a store.

    Opening it touches the disk for some milliseconds: do it before the loop serves.
    """

    def __init__(self, path: str | os.PathLike[str] | persist.Store, **options: Any) -> None:
        if isinstance(path, persist.Store) and options:
            raise WrongType(what="options", expected="given to the persist.Store itself", got="given beside it")
        self._store = path if isinstance(path, persist.Store) else persist.Store(path, **options)
        self._threads = _Threads()

    def __repr__(self) -> str:
        return repr(self._store).replace("persist.", "persist.aio.", 1)

    @property
    def path(self) -> Path:
        return self._store.path

    def close(self) -> None:
        """Refuse further verbs; what has begun is carried to its end."""
        self._store.close()
        self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def load(self, session_id: str) -> Session:
        """See `persist.Store.load`."""
        return Session(self._threads, await self._threads.run(lambda: self._store.load(session_id)))

    async def head(self, session_id: str) -> Head:
        """See `persist.Store.head`."""
        return await self._threads.run(lambda: self._store.head(session_id))

    async def exists(self, session_id: str) -> bool:
        """See `persist.Store.exists`."""
        return await self._threads.run(lambda: self._store.exists(session_id))

    async def ids(self, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """See `persist.Store.ids`."""
        return await self._threads.run(lambda: self._store.ids(after=after, limit=limit))

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
        return await self._threads.run(lambda: self._store.update(session_id, function, if_revision=if_revision, touch=touch))

    async def append(self, session_id: str, field: str, item: Any, *, touch: bool = True) -> int:
        """See `persist.Store.append`."""
        return await self._threads.run(lambda: self._store.append(session_id, field, item, touch=touch))

    def start_stream(self, session_id: str, message: Message | None = None, *, stream_id: str | None = None) -> _Starting:
        """See `persist.Store.start_stream`. Use it as ``async with store.start_stream(…) as stream``, or await it."""
        return _Starting(self._threads, lambda: self._store.start_stream(session_id, message, stream_id=stream_id))

    def follow(self, session_id: str, stream_id: str, *, after: int = 0) -> Following:
        """See `persist.Store.follow`. Use it as ``async for event in store.follow(…)``; await it to open it at once."""
        return Following(self._threads, lambda: self._store._cursor(session_id, stream_id, after), session_id, stream_id, after)

    async def events(self, session_id: str, stream_id: str, *, after: int = 0) -> list[Event]:
        """See `persist.Store.events`."""
        return await self._threads.run(lambda: self._store.events(session_id, stream_id, after=after))

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

    async def accept(self, session_id: str) -> Session:
        """See `persist.Store.accept`."""
        return Session(self._threads, await self._threads.run(lambda: self._store.accept(session_id)))
