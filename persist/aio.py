"""`persist` for asyncio: the same nouns and verbs, awaited.

    store = persist.aio.Store("var/sessions")

    async with store.start_stream("s-42", {"role": "user", "content": "Why?"}) as stream:
        async for token in answer():
            await stream.emit({"token": token})
        await stream.finish({"role": "assistant", "content": "Because."})

    async for event in store.follow("s-42", stream_id, after=17):
        ...

Each verb is one hop to a thread, so that the loop never waits for a disk or a lock. The calls that wait for a session
are in a queue, and one thread waits for all of them (see `calls`). So hundreds of tasks that wait for one session do
not block any other session.

If a task is cancelled while its call waits, the task ends at once, and nothing is written later. A call that has begun
runs to its end, and the cancellation is raised after that. So nothing is written after a task believes that it has
stopped. The stream that a cancelled `start_stream` obtained is failed before. Leaving a stream's ``async with`` is
carried out in any case, within the store's `timeout_s`.

A verb's arguments belong to the verb until it returns. `Session.save` is the exception. It writes `data` as it was when
it was called, so tasks may edit `data` meanwhile. The next save writes such an edit.

There is no `transaction`, because nothing may be awaited while a lock is held. `update(id, function)` takes its place.
The function is a plain one, and runs in a thread.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import operator
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Self, TypedDict, TypeVar, Unpack, cast

import persist
from persist import engine, follow, streams
from persist.calls import Threads
from persist.engine import Committed
from persist.merge import Policy, Preference
from persist.session import Overtaken, require_save_options
from persist.storage.commit import Mode
from persist.translating import conflicts_in

Result = TypeVar("Result")
Twin = TypeVar("Twin")
P = ParamSpec("P")


# --- the same verbs, awaited -----------------------------------------------------------------------------------------


def _reading(verb: Callable[Concatenate[Any, P], Result]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """Return the awaited form of a verb that waits for no session."""

    @functools.wraps(verb)
    async def hop(self: _Awaited[Any], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        result: Result = await self._threads.run(partial(verb, self._sync, *args, **kwargs), is_quick=True)
        return result

    return hop


def _looking(verb: Callable[Concatenate[Any, P], Result]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """Return the awaited form of a verb that waits for sessions of its own choice."""

    @functools.wraps(verb)
    async def hop(self: _Awaited[Any], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        result: Result = await self._threads.run(partial(verb, self._sync, *args, **kwargs))
        return result

    return hop


def _writing(
    verb: Callable[Concatenate[Any, P], Result], *, at: int = 0
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """Return the awaited form of a verb that waits for one session.

    Of a store's verb, the argument at the place `at` is the session's id.
    """
    *_, name = list(inspect.signature(verb).parameters)[: at + 2]

    @functools.wraps(verb)
    async def hop(self: _Awaited[Any], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        session_id = self._session_id or (args[at] if len(args) > at else kwargs.get(name))
        timeout_s: Any = kwargs.get("timeout_s")
        call = partial(verb, self._sync, *args, **kwargs)
        result: Result = await self._threads.run(call, session_id, timeout_s=timeout_s)
        return result

    return hop


def _giving_session(
    hop: Callable[Concatenate[Any, P], Coroutine[Any, Any, persist.Session]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Session]]:
    """Return an awaited verb whose result is a session."""

    @functools.wraps(hop)
    async def give(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Session:
        return Session(await hop(self, *args, **kwargs), self._threads)

    return give


def _mirrored(name: str) -> Any:
    """Return a property that reads an attribute of the twin. That never waits."""
    return property(operator.attrgetter(f"_sync.{name}"))


class _Awaited(Generic[Twin]):
    """An object of `persist` whose verbs are awaited."""

    def __init__(self, sync: Twin, threads: Threads, session_id: str | None = None) -> None:
        # The twin comes first, because a stream's twin explains why it cannot be pickled.
        self._sync = sync
        self._threads = threads
        self._session_id = session_id

    def __repr__(self) -> str:
        return repr(self._sync).replace("persist.", "persist.aio.", 1)


class Session(_Awaited[persist.Session]):
    """A session as it was loaded. `data` is a plain dict. See `persist.Session`.

    Tasks may edit `data` at any time, because only the loop's thread reads and changes it. `save` writes the state that
    it found when it began, and the next save writes a later edit. The verbs of one object run one after the other.
    """

    def __init__(self, sync: persist.Session, threads: Threads) -> None:
        super().__init__(sync, threads, sync.id)
        self._turn = asyncio.Lock()
        self._turn_in: asyncio.AbstractEventLoop | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # The twin refuses an attribute that would be lost at the next save.
        if name in ("_sync", "_threads", "_session_id", "_turn", "_turn_in"):
            super().__setattr__(name, value)
        else:
            setattr(self._sync, name, value)

    id: str = _mirrored("id")
    data: dict[str, Any] = _mirrored("data")
    version: str = _mirrored("version")
    revision: int = _mirrored("revision")
    created_at: datetime = _mirrored("created_at")
    updated_at: datetime = _mirrored("updated_at")
    active_stream_id: str | None = _mirrored("active_stream_id")

    async def save(
        self, *, touch: bool = True, on_conflict: Preference = "error", timeout_s: float | None = None
    ) -> str:
        """See `persist.Session.save`. It writes `data` as it is now, whatever tasks change in it meanwhile."""
        require_save_options(touch, on_conflict)
        session, timeout_s = self._sync, self._threads.timeout_s(timeout_s)
        async with self._alone(timeout_s) as waited_s:
            while True:
                await self._find_cut_off()
                base, mine = session._base, session._encode()
                with suppress(Overtaken):
                    await self._threads.run(
                        partial(session._write_apart, base, mine, touch, on_conflict, timeout_s),
                        session.id,
                        timeout_s=timeout_s,
                        waited_s=waited_s,
                        apply=session._take_written,
                    )
                    return session.version

    async def refresh(self) -> None:
        """See `persist.Session.refresh`."""
        async with self._alone(None):
            await self._read(self._sync._refresh)

    async def clear_stale_stream(self, *, timeout_s: float | None = None) -> bool:
        """See `persist.Session.clear_stale_stream`."""
        session, timeout_s = self._sync, self._threads.timeout_s(timeout_s)

        def show(cleared: streams.Cleared | None) -> bool:
            with suppress(persist.Unreadable):
                if cleared is not None:
                    session._show_cleared(cleared)
            return cleared is not None

        async with self._alone(timeout_s) as waited_s:
            await self._find_cut_off()
            clear = partial(session._clear, session.active_stream_id, timeout_s)
            options: dict[str, Any] = {"timeout_s": timeout_s, "waited_s": waited_s}
            is_cleared: bool = await self._threads.run(clear, session.id, apply=show, **options)
            return is_cleared

    async def _find_cut_off(self) -> None:
        """Learn the outcome of a save that was cut off, because that changes `data`."""
        if self._sync._base.tried is not None:
            await self._read(self._sync._recognise)

    async def _read(self, show: Callable[[Committed], None]) -> None:
        """Read the session in a thread, and show it in the loop's thread."""
        session = self._sync

        def bring(there: Committed) -> None:
            with session._decoding(), conflicts_in(session.id):
                show(there)

        await self._threads.run(session._read_apart, apply=bring, is_quick=True)

    @asynccontextmanager
    async def _alone(self, timeout_s: float | None) -> AsyncIterator[float]:
        """Wait until no other verb of this object runs. Give the block the seconds that this took."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        if self._turn_in is not loop:
            # A lock of asyncio belongs to the loop in which a task has waited for it.
            self._turn, self._turn_in = asyncio.Lock(), loop
        # Another loop may put its own lock there meanwhile.
        turn = self._turn
        try:
            async with asyncio.timeout(timeout_s):
                await turn.acquire()
        except TimeoutError:
            facts: dict[str, Any] = {"path": self._sync._backend.engine.where(self.id)}
            facts |= {
                "holder": "another verb of the same object",
                "remedy": "Wait for that verb first: await its save().",
            }
            facts |= {"timeout_s": timeout_s, "waited_s": loop.time() - since}
            raise persist.LockTimeout(session_id=self.id, **facts) from None
        try:
            yield loop.time() - since
        finally:
            turn.release()


class Stream(_Awaited[persist.Stream]):
    """A running turn that owns its session. Leaving its ``async with`` without `finish` is `fail`.

    See `persist.Stream`.
    """

    id: str = _mirrored("id")
    session_id: str = _mirrored("session_id")
    epoch: int = _mirrored("epoch")

    def __init__(self, sync: persist.Stream, threads: Threads) -> None:
        super().__init__(sync, threads, sync.session_id)

    async def emit(self, *events: Any, durable: bool = False, timeout_s: float | None = None) -> int:
        """See `persist.Stream.emit`."""
        # The first emission looks at the session, and may wait for it.
        is_quick = self._sync._events.is_open
        emit = partial(self._sync.emit, *events, durable=durable, timeout_s=timeout_s)
        session_id = None if is_quick else self.session_id
        offset: int = await self._threads.run(emit, session_id, timeout_s=timeout_s, is_quick=is_quick)
        return offset

    is_cancelled = _reading(persist.Stream.is_cancelled)
    update = _writing(persist.Stream.update)
    checkpoint = _writing(persist.Stream.checkpoint)
    append = _writing(persist.Stream.append)
    finish = _writing(persist.Stream.finish)
    fail = _writing(persist.Stream.fail)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave = partial(self._sync.__exit__, kind, error, trace)
        try:
            await self._threads.run(leave, self.session_id, is_cleaning_up=True)
        except BaseException as failure:
            # The session was not free in time, so the twin does not know that its block was left. The exception may be
            # a cancellation, too. The lease is given up in any case, and that waits for nobody.
            self._sync._close()
            if error is None or not isinstance(failure, Exception):
                raise
            error.add_note(f"Stream {self.id} could not be marked as interrupted either: {failure}")


class _Starting(Coroutine[Any, Any, Stream]):
    """A stream that is about to be started: a coroutine that can also be entered."""

    def __init__(self, start: Coroutine[Any, Any, Stream]) -> None:
        self._start = start

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

    async def __aexit__(self, *error: Any) -> None:
        await self._stream.__aexit__(*error)


def _starting(
    verb: Callable[Concatenate[Any, P], persist.Stream],
) -> Callable[Concatenate[Any, P], _Starting]:
    """Return a verb whose result is awaited, or entered: ``async with store.start_stream(…) as stream``."""

    @functools.wraps(verb)
    def start(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> _Starting:
        session_id, timeout_s = args[0] if args else kwargs.get("session_id"), kwargs.get("timeout_s")
        return _Starting(self._started(session_id, timeout_s, partial(verb, self._sync, *args, **kwargs)))

    return start


class _News:
    """An event of the loop that made it. Any thread may set it, also from a signal handler."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._is_on_its_way = False
        self._loop = asyncio.get_running_loop()

    def set(self) -> None:
        """Wake the waiter. Several calls may wake it only once, so it must look for changes after `wait`."""
        if not self._is_on_its_way:
            self._is_on_its_way = True
            # RuntimeError: the loop has ended, and nobody waits.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when the event is set, or after some seconds. Then the event is unset."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        self._event.clear()
        self._is_on_its_way = False


class Following:
    """The events of a stream as they come: ``async for event in store.follow(…)``. See `persist.Following`.

    Await it or enter it to open it. Then it raises the errors of `persist.Store.follow`, for a wrong cursor say.
    Otherwise its first step opens it. A step that is cancelled (by a time-out, say) loses nothing, because the next
    step goes on from there.
    """

    def __init__(self, store: Store, session_id: str, stream_id: str, after: int | Literal["end"]) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        #: With ``after="end"`` the offset is known once this is open.
        self.offset = 0 if after == "end" else after
        self._look = partial(store._sync._cursor, session_id, stream_id, after)
        self._threads = store._threads
        self._cursor: follow.Cursor | None = None
        self._pending: deque[engine.Event] = deque()
        self._is_closed = False
        self._is_taking = False
        self._open = ExitStack()

    @property
    def ended(self) -> engine.Ended | None:
        """How the stream has ended, or None while there is more to come."""
        return None if self._pending or self._cursor is None else self._cursor.ended

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        try:
            await self._opened()
        except BaseException:
            # Nobody will close it.
            self._open.close()
            self._cursor = None
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[engine.Event]:
        return self

    async def __anext__(self) -> engine.Event:
        # Other tasks run between two events, even if all events are there already.
        await asyncio.sleep(0)
        if not self._pending and not self._is_closed:
            await self._wait(await self._opened())
        if not self._pending:
            self.close()
            raise StopAsyncIteration
        event = self._pending.popleft()
        self.offset = event.offset
        return event

    async def _opened(self) -> follow.Cursor:
        # Also a step that is cancelled opens it. Time-outs that are shorter than that would else keep it from opening.
        return self._cursor or cast(follow.Cursor, await self._threads.run(self._look, apply=self._begin))

    def _begin(self, cursor: follow.Cursor) -> follow.Cursor:
        self._cursor, self._news, self.offset = cursor, _News(), cursor.after
        self._open.callback(cursor.close)
        self._open.enter_context(cursor.waking(self._news.set))
        if self._is_closed:
            self._open.close()
        return cursor

    async def _wait(self, cursor: follow.Cursor) -> None:
        """Return when there is an event, or there will be none."""
        while not (self._pending or self._is_closed or cursor.ended):
            if not cursor.is_due:
                await self._news.wait(cursor.quiet_left_s)
            elif (found := cursor.take_cached()) is not None:
                self._pending.extend(found)
                await asyncio.sleep(0)
            else:
                await self._take(cursor)

    async def _take(self, cursor: follow.Cursor) -> None:
        # The thread itself stores the events that it took, so that nothing is lost if this task is cancelled. The file
        # stays open while the thread reads it.
        self._is_taking = True
        try:
            await self._threads.run(lambda: self._pending.extend(cursor.take()), is_quick=not cursor.is_quiet)
        finally:
            self._is_taking = False
            if self._is_closed:
                self._open.close()

    def close(self) -> None:
        """Stop following."""
        self._is_closed = True
        if not self._is_taking:
            self._open.close()

    async def aclose(self) -> None:
        """Stop following, as `close` does. `contextlib.aclosing` calls this."""
        self.close()


def _heads(
    store: persist.Store, *, prefix: str = "", after: str | None = None, limit: int | None = None
) -> list[persist.Head]:
    """Return the heads of sessions. See `persist.Store.heads`."""
    return list(store.heads(prefix=prefix, after=after, limit=limit))


class _Options(TypedDict, total=False):
    """The options of `persist.Store`."""

    timeout_s: float
    journal: Mode
    merge: Mapping[str, Policy] | None
    keep_events_s: float
    keep_events_bytes: int | None
    answer_tool_calls: bool
    cache_bytes: int
    unsafe_filesystem: bool
    mode: int
    create: bool


class Store(_Awaited[persist.Store]):
    """A store of sessions. It takes the arguments of `persist.Store`, or such a store.

    Opening it touches the disk for some milliseconds. On PostgreSQL it connects, and waits for a server that is away.
    So open it before the loop serves, or in a thread: ``await asyncio.to_thread(persist.aio.Store, url)``.
    """

    def __init__(self, path: str | os.PathLike[str] | persist.Store, **options: Unpack[_Options]) -> None:
        if isinstance(path, persist.Store) and options:
            expected = "given to the persist.Store itself"
            raise persist.InvalidArgument(what="options", got="given beside it", expected=expected)
        store = path if isinstance(path, persist.Store) else persist.Store(path, **options)
        super().__init__(store, Threads(store._backend.engine))

    path: Path = _mirrored("path")
    place: str = _mirrored("place")

    def close(self) -> None:
        """Refuse further verbs with `StoreClosed`. Running streams go on until they end."""
        self._sync.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.close()

    load = _giving_session(_reading(persist.Store.load))
    view = _reading(persist.Store.view)
    head = _reading(persist.Store.head)
    heads = _reading(_heads)
    recent = _reading(persist.Store.recent)
    tail = _reading(persist.Store.tail)
    exists = _reading(persist.Store.exists)
    ids = _reading(persist.Store.ids)
    create = _giving_session(_writing(persist.Store.create))
    duplicate = _giving_session(_writing(persist.Store.duplicate, at=1))
    replace = _giving_session(_writing(persist.Store.replace))
    delete = _writing(persist.Store.delete)
    update = _writing(persist.Store.update)
    append = _writing(persist.Store.append)
    extend = _writing(persist.Store.extend)
    repair = _writing(persist.Store.repair)

    start_stream = _starting(persist.Store.start_stream)

    async def _started(self, session_id: object, timeout_s: Any, start: Callable[[], persist.Stream]) -> Stream:
        def undo(stream: persist.Stream) -> Coroutine[Any, Any, None]:
            return Stream(stream, self._threads).__aexit__(None, None, None)

        stream = await self._threads.run(start, session_id, timeout_s=timeout_s, undo=undo)
        return Stream(stream, self._threads)

    def follow(self, session_id: str, stream_id: str, *, after: int | Literal["end"] = 0) -> Following:
        """See `persist.Store.follow`. Use it as ``async for event in store.follow(…)``. Await it to open it at once."""
        return Following(self, session_id, stream_id, after)

    events = _looking(persist.Store.events)
    cancel = _writing(persist.Store.cancel)
    stream = _writing(persist.Store.stream)
    streams = _looking(persist.Store.streams)
    clear_stale_streams = _looking(persist.Store.clear_stale_streams)
    check = _looking(persist.Store.check)
    backup = _looking(persist.Store.backup)
    compact = _writing(persist.Store.compact)
    accept = _giving_session(_writing(persist.Store.accept))
