"""`persist` for asyncio: the same nouns and verbs, awaited.

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

There is no `transaction`, since nothing may be awaited while a lock is held: `update(id, function)` takes its place.
The function is a plain one, and runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import operator
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Self, TypedDict, TypeVar, Unpack

import persist
from persist import event_log, follow, watch
from persist.merge import Policy
from persist.storage.commit import Mode

Result = TypeVar("Result")
Twin = TypeVar("Twin")
P = ParamSpec("P")
#: Threads of a store: so many verbs may wait for disks, and so many for sessions' locks, at the same time.
QUICK_THREADS = 16
PATIENT_THREADS = 128


# --- threads ---------------------------------------------------------------------------------------------------------


class _Threads:
    """Runs verbs in threads of their own, away from the threads that the application uses.

    What may wait for a session's lock has threads apart, so that a session that somebody keeps locked holds up nobody's
    events.
    """

    _pid = 0

    async def run(
        self, function: Callable[[], Result], undo: Callable[[Result], object] | None = None, *, is_quick: bool = False
    ) -> Result:
        """Call a function in a thread, to its end, whatever becomes of the caller.

        Args:
            undo: called with the result, in a thread, if the caller was cancelled and will not get it.
            is_quick: it waits for no session's lock.
        """
        if self._pid != os.getpid():
            # At first, and in a forked child, which has none of the threads. If two loops come here at once, the work
            # of each is done, in whichever pool.
            self._quick = ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="persist")
            self._patient = ThreadPoolExecutor(PATIENT_THREADS, thread_name_prefix="persist-locks")
            # Last, because a loop that finds the number must find the pools, too.
            self._pid = os.getpid()
        done, cancellation = _News(), None
        pool, context, is_refused = self._quick if is_quick else self._patient, contextvars.copy_context(), False

        def begin() -> Result:
            if is_refused:
                raise RuntimeError("The caller was told that this would not be done.")
            return context.run(function)

        try:
            work = pool.submit(begin)
        except RuntimeError:
            # The pool has queued it, and could start no thread. The caller is told, so nothing must be done later.
            is_refused = True
            raise
        # Not a task, and no future of the loop: `asyncio.run` cancels those when it ends, and the result would be lost.
        work.add_done_callback(lambda _: done.set())
        while not work.done():
            try:
                await done.wait()
            except asyncio.CancelledError as error:
                cancellation = error
        if cancellation is None:
            return work.result()
        if undo is not None and work.exception() is None:
            try:
                await self.run(partial(undo, work.result()))
            except Exception as failure:
                # The caller that cancelled waits for the cancellation, and for nothing else.
                cancellation.add_note(f"What was obtained could not be given back: {failure}")
        raise cancellation from work.exception()


class _News:
    """An event that any thread may set, in the loop that made it; also from a signal handler."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._is_on_its_way = False
        self._loop = asyncio.get_running_loop()

    def set(self) -> None:
        """Wake the one who waits. Several calls may be one: look at what changed after `wait` has returned."""
        if not self._is_on_its_way:
            self._is_on_its_way = True
            # RuntimeError: the loop has ended, and nobody waits.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when it is set, or after some seconds; it is unset then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        self._event.clear()
        self._is_on_its_way = False


# --- the same verbs, awaited -----------------------------------------------------------------------------------------


def _hop(
    verb: Callable[Concatenate[Any, P], Result], *, is_quick: bool = False
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """Return a verb that is awaited: one hop to a thread. `is_quick`: it waits for no session's lock."""

    @functools.wraps(verb)
    async def hop(self: _Awaited[Any], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return await self._threads.run(partial(verb, self._sync, *args, **kwargs), is_quick=is_quick)

    return hop


def _loading(
    verb: Callable[Concatenate[Any, P], persist.Session], *, is_quick: bool = False
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Session]]:
    """Return a verb that is awaited, and gives a session."""
    load = _hop(verb, is_quick=is_quick)

    @functools.wraps(verb)
    async def hop(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Session:
        return Session(await load(self, *args, **kwargs), self._threads)

    return hop


def _mirrored(name: str) -> Any:
    """Return a property that reads an attribute of the twin. That never waits."""
    return property(operator.attrgetter(f"_sync.{name}"))


class _Awaited(Generic[Twin]):
    """An object of `persist` whose verbs are awaited."""

    def __init__(self, sync: Twin, threads: _Threads) -> None:
        # The twin comes first, because a stream's twin explains why it cannot be pickled.
        self._sync = sync
        self._threads = threads

    def __repr__(self) -> str:
        return repr(self._sync).replace("persist.", "persist.aio.", 1)


class Session(_Awaited[persist.Session]):
    """A session as it was loaded; `data` is a plain dict. See `persist.Session`."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The twin refuses what would be lost at the next save.
        if name in ("_sync", "_threads"):
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

    save = _hop(persist.Session.save)
    refresh = _hop(persist.Session.refresh)
    clear_stale_stream = _hop(persist.Session.clear_stale_stream)


class Stream(_Awaited[persist.Stream]):
    """A running turn that owns its session; leaving its ``async with`` without `finish` is `fail`.

    See `persist.Stream`.
    """

    id: str = _mirrored("id")
    session_id: str = _mirrored("session_id")
    epoch: int = _mirrored("epoch")

    async def emit(self, *events: Any, durable: bool = False, timeout_s: float | None = None) -> int:
        """See `persist.Stream.emit`."""
        emit = partial(self._sync.emit, *events, durable=durable, timeout_s=timeout_s)
        return await self._threads.run(emit, is_quick=self._sync._events.is_open)

    is_cancelled = _hop(persist.Stream.is_cancelled, is_quick=True)
    update = _hop(persist.Stream.update)
    checkpoint = _hop(persist.Stream.checkpoint)
    append = _hop(persist.Stream.append)
    finish = _hop(persist.Stream.finish)
    fail = _hop(persist.Stream.fail)

    async def __aenter__(self) -> Self:
        return self

    __aexit__ = _hop(persist.Stream.__exit__)


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
        return _Starting(self._started(partial(verb, self._sync, *args, **kwargs)))

    return start


class Following:
    """The events of a stream as they come: ``async for event in store.follow(…)``. See `persist.Following`.

    Await it, or enter it, to open it, and to hear what is wrong with a cursor (what `persist.Store.follow` raises);
    else its first step does that. A step that is cancelled (by a time-out, say) loses nothing: the next one goes on
    from there.
    """

    def __init__(self, store: Store, session_id: str, stream_id: str, after: int | Literal["end"]) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        #: With ``after="end"`` it is known once this is open.
        self.offset = 0 if after == "end" else after
        self._look = partial(store._sync._cursor, session_id, stream_id, after)
        self._threads = store._threads
        self._cursor: follow.Cursor | None = None
        self._pending: deque[event_log.Event] = deque()
        self._is_closed = False
        self._is_taking = False
        self._open = ExitStack()

    @property
    def ended(self) -> event_log.Ended | None:
        """How the stream has ended; None while there is more to come."""
        return None if self._pending or self._cursor is None else self._cursor.ended

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[event_log.Event]:
        return self

    async def __anext__(self) -> event_log.Event:
        # Other tasks run between two events, also where all are there already.
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
        if self._cursor is None:
            self._cursor, self._news = await self._threads.run(self._look, undo=follow.Cursor.close), _News()
            self.offset = self._cursor.after
            self._open.callback(self._cursor.close)
            self._open.enter_context(watch.waking(self._cursor.path, self._news.set))
        return self._cursor

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
        # The thread puts what it took into its place, so that nothing is lost if this task is cancelled. The file stays
        # open while the thread reads it.
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
        """As `close`; what `contextlib.aclosing` calls."""
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
    cache_bytes: int
    allow_network: bool
    create: bool


class Store(_Awaited[persist.Store]):
    """A directory of sessions; takes what `persist.Store` takes, or such a store.

    Opening it touches the disk for some milliseconds: do it before the loop serves.
    """

    def __init__(self, path: str | os.PathLike[str] | persist.Store, **options: Unpack[_Options]) -> None:
        if isinstance(path, persist.Store) and options:
            expected = "given to the persist.Store itself"
            raise persist.InvalidArgument(what="options", got="given beside it", expected=expected)
        super().__init__(path if isinstance(path, persist.Store) else persist.Store(path, **options), _Threads())

    path: Path = _mirrored("path")

    def close(self) -> None:
        """Refuse further verbs with `StoreClosed`; streams that run go on until they end."""
        self._sync.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.close()

    load = _loading(persist.Store.load, is_quick=True)
    head = _hop(persist.Store.head, is_quick=True)
    heads = _hop(_heads, is_quick=True)
    tail = _hop(persist.Store.tail, is_quick=True)
    exists = _hop(persist.Store.exists, is_quick=True)
    ids = _hop(persist.Store.ids, is_quick=True)
    create = _loading(persist.Store.create)
    duplicate = _loading(persist.Store.duplicate)
    delete = _hop(persist.Store.delete)
    update = _hop(persist.Store.update)
    append = _hop(persist.Store.append)
    extend = _hop(persist.Store.extend)

    start_stream = _starting(persist.Store.start_stream)

    async def _started(self, start: Callable[[], persist.Stream]) -> Stream:
        stream = await self._threads.run(start, undo=lambda stream: stream.__exit__(None, None, None))
        return Stream(stream, self._threads)

    def follow(self, session_id: str, stream_id: str, *, after: int | Literal["end"] = 0) -> Following:
        """See `persist.Store.follow`. Use it as ``async for event in store.follow(…)``; await it to open it at once."""
        return Following(self, session_id, stream_id, after)

    events = _hop(persist.Store.events, is_quick=True)
    cancel = _hop(persist.Store.cancel)
    stream = _hop(persist.Store.stream)
    streams = _hop(persist.Store.streams)
    clear_stale_streams = _hop(persist.Store.clear_stale_streams)
    check = _hop(persist.Store.check)
    compact = _hop(persist.Store.compact)
    accept = _loading(persist.Store.accept)
