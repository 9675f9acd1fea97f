"""A stream's events as Server-Sent Events, from any worker, until the stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

import persist.aio

#: How a turn has ended, by the word of `persist`. Any other word means that its worker is gone, or its session.
_HOW = {"finished": "finished", "cancelled": "stopped", "failed": "failed"}
#: A client that takes nothing for so long is let go. It may come back with its cursor.
SEND_TIMEOUT_S = 60.0
#: How soon a browser connects again.
_RETRY_MS = 1000
#: How long a server that was told to end lets its followers read on, in seconds. Half a second may go before it, and
#: `persist serve` cuts connections after 5.
_GRACE_S = 3.0


def how_ended(following: persist.aio.Following) -> str:
    """Return how a stream has ended: finished, stopped, failed or lost."""
    return _HOW.get(following.ended or "", "lost")


def _beat() -> ServerSentEvent:
    return ServerSentEvent(comment="alive", sep="\n")


class EventStream(EventSourceResponse):
    """A response that tells events until they end or the client leaves. Then it closes the following, if any.

    If the server is told to end, it lets the turns of this worker be ended first, and so its client learns how the turn
    has ended. A client that follows another worker's turn gets a whole response without that, and connects again.

    Args:
        close_turns: ends the turns of this worker.
        farewell: the last events for a client that this server cannot serve to the end.
    """

    def __init__(
        self,
        events: AsyncIterator[ServerSentEvent],
        following: persist.aio.Following | None,
        *,
        heartbeat_s: float,
        close_turns: Callable[[], Awaitable[None]],
        headers: dict[str, str] | None = None,
        farewell: Sequence[ServerSentEvent] = (),
    ) -> None:
        self._following, self._close_turns, self._farewell = following, close_turns, farewell
        self._server_ends = anyio.Event()
        ending: dict[str, Any] = {"shutdown_event": self._server_ends, "shutdown_grace_period": _GRACE_S}
        options: dict[str, Any] = {"ping": heartbeat_s, "send_timeout": SEND_TIMEOUT_S, "sep": "\n", **ending}
        headers = {"Cache-Control": "no-cache", **(headers or {})}
        super().__init__(events, headers=headers, ping_message_factory=_beat, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_whole = False

        async def watched(message: Message) -> None:
            nonlocal is_whole
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        closing = asyncio.create_task(self._close_turns_with_server())
        # Not in the generator, because one that was never begun has no end either.
        try:
            if scope["method"] == "HEAD":  # sse-starlette below 3.6 would follow the stream to its end
                await Response(headers=dict(self.headers))(scope, receive, send)
                return
            with suppress(SendTimeoutError):
                await super().__call__(scope, receive, watched)
                if self._server_ends.is_set() and not is_whole:
                    last = b"".join(each.encode() for each in self._farewell)
                    await send({"type": "http.response.body", "body": last})
        finally:
            closing.cancel()
            if self._following is not None:
                self._following.close()

    async def _close_turns_with_server(self) -> None:
        await self._server_ends.wait()
        await self._close_turns()


def told(data: Any, *, event: str | None = None, id: int | None = None) -> ServerSentEvent:
    """Return a Server-Sent Event whose data is JSON in ASCII."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return ServerSentEvent(text, event=event, id=None if id is None else str(id), sep="\n")


async def parts(following: persist.aio.Following) -> AsyncIterator[ServerSentEvent]:
    """Yield the parts of a stream, and at last how it ended."""
    yield ServerSentEvent(retry=_RETRY_MS, sep="\n")
    try:
        async for event in following:
            yield told(event.data, event="part", id=event.offset)
    except persist.EventsNotFound:
        # The client was so slow that its next event was dropped.
        yield expired_event(following.stream_id)
        return
    message_id = f"{following.stream_id}.answer"
    yield told({"how": how_ended(following), "message_id": message_id}, event="end", id=following.offset)


async def expired(stream_id: str) -> AsyncIterator[ServerSentEvent]:
    """Yield the only event for a cursor that has expired."""
    yield expired_event(stream_id)


def expired_event(stream_id: str) -> ServerSentEvent:
    """Return the event that tells a client to load the session."""
    return told({"stream_id": stream_id}, event="expired")
