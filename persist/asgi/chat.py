"""The routes of the AI SDK: its UI message stream, for ``useChat`` with ``resume``.

A message of the user is sent to ``api/chat``, and the answer is its response. ``api/chat/{id}/stream`` tells a running
answer again from its start, from any worker. The chunks come from the events of the stream, so the same stream gives
the same chunks to everybody.

Source: "Stream Protocols" and "Chatbot Resume Streams" of the AI SDK's documentation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import persist.aio
from persist import turn
from persist.asgi.events import EventStream, how_ended, told
from persist.asgi.exchange import (
    Answered,
    Authorize,
    Refused,
    admitted,
    checked_id,
    fields_in,
    is_admitted,
    unknown_session,
)
from persist.asgi.parts import Event, Message, events_of
from persist.asgi.turns import OFFSET, STOPPED, Started, Turns, answer_to

Chunk = dict[str, Any]
_HEADERS = {"x-vercel-ai-ui-message-stream": "v1"}
_LOST = "The server that gave this answer is gone. What it had said is kept."
_ENDS = "This server ends. Load the page again to read on."
_OWN = ("id", "message", "messages", "trigger", "messageId")


class Chat:
    """The routes below ``api/chat``."""

    def __init__(
        self, store: persist.aio.Store, turns: Turns, *, authorize: Authorize | None, heartbeat_s: float
    ) -> None:
        self._store, self._turns, self._authorize, self._heartbeat_s = store, turns, authorize, heartbeat_s

    def routes(self) -> list[Route]:
        return [
            Route("/api/chat", self.send, methods=["POST"]),
            Route("/api/chat/{session_id}/stream", self.resume, methods=["GET"]),
            Route("/api/chat/{session_id}/stop", self.stop, methods=["POST"]),
        ]

    async def send(self, request: Request) -> Response:
        fields = await fields_in(request)
        session_id = checked_id(fields.get("id"), "The chat's id")
        if not await is_admitted(request, session_id, self._authorize):
            raise unknown_session()
        prompt = _prompt_of(_message_in(fields))
        extra = {name: value for name, value in fields.items() if name not in _OWN}
        if fields.get("trigger") == "regenerate-message" and await self._has(session_id, prompt):
            started = await self._turns.retry(session_id, extra, prompt_id=prompt["id"])
        else:
            started = await self._turns.start(session_id, prompt, extra)
        return await self._response_to(session_id, started)

    async def _has(self, session_id: str, prompt: Message) -> bool:
        try:
            view = await self._store.view(session_id)
        except persist.SessionNotFound:
            return False
        return view.list(turn.MESSAGES).find(prompt["id"]) is not None

    async def resume(self, request: Request) -> Response:
        session_id = checked_id(request.path_params["session_id"], "The chat's id")
        info = None
        if await is_admitted(request, session_id, self._authorize):
            # A chat is unknown here until its first message, and a page asks for its stream all the same.
            with suppress(persist.SessionNotFound):
                info = await self._store.stream(session_id)
        if info is None or not info.is_live:
            return Response(status_code=204)
        return await self._response_to(session_id, Started(info.stream_id, ""))

    async def stop(self, request: Request) -> Response:
        session_id = await admitted(request, self._authorize)
        wanted = (await fields_in(request)).get("activeStreamId")
        info = await self._store.stream(session_id)
        # A page that has slept may name a stream that has ended, while another one runs.
        if info is None or wanted not in (None, info.stream_id):
            return Answered({"stopped": False})
        return Answered({"stopped": await self._turns.stop(session_id, info.stream_id)})

    async def _response_to(self, session_id: str, started: Started) -> Response:
        """Return the response that tells a turn from its start."""
        stream_id, before = started.stream_id, list[Event]()
        following, how = None, "lost"
        message_id = f"{stream_id or started.message_id}.answer"
        with suppress(persist.EventsNotFound):
            if stream_id is not None:
                following = await self._store.follow(session_id, stream_id)
        if following is None:
            # The events have expired, or the first ones were dropped. The stored answer stands for them.
            messages = (await self._store.view(session_id)).list(turn.MESSAGES)
            answer = messages.find(message_id) or answer_to(messages, started.message_id)
            if answer is not None:
                before, how = list(events_of(answer)), _how_told(answer)
                message_id = str(answer.get("id") or message_id)
                if message_id == f"{stream_id}.answer":
                    following = await self._followed_from(session_id, str(stream_id), answer)
        events = _tell(Chunks(message_id), before, following, how)
        options: dict[str, Any] = {"heartbeat_s": self._heartbeat_s, "close_turns": self._turns.close}
        farewell = [told({"type": "error", "errorText": _ENDS}), told("[DONE]")]
        return EventStream(events, following, headers=_HEADERS, farewell=farewell, **options)

    async def _followed_from(self, session_id: str, stream_id: str, partial: Message) -> persist.aio.Following | None:
        """Follow a running stream from its stored partial answer."""
        try:
            return await self._store.follow(session_id, stream_id, after=partial[OFFSET]) if OFFSET in partial else None
        except persist.EventsNotFound:
            return None


def _how_told(answer: Message) -> str:
    """Return how the turn of a stored answer has ended, as `how_ended` says it."""
    if not answer.get(turn.INTERRUPTED):
        return "finished"
    return "failed" if "error" in answer else "stopped" if answer.get(STOPPED) else "lost"


def _message_in(fields: dict[str, Any]) -> Message:
    """Return the user's message of a request: its only message, or the last one of several."""
    message, messages = fields.get("message"), fields.get("messages")
    if message is None and isinstance(messages, list) and messages:
        message = messages[-1]
        if fields.get("trigger") == "regenerate-message":
            prompts = (each for each in reversed(messages) if type(each) is dict and each.get("role") == "user")
            message = next(prompts, message)
    if type(message) is not dict or message.get("role", "user") != "user":
        raise Refused(400, "invalid_argument", "The last message must be one of the user.")
    return message


def _prompt_of(message: Message) -> Message:
    """Return a message of the AI SDK in the form in which it is stored."""
    parts = message.get("parts")
    known = [each for each in parts if type(each) is dict] if isinstance(parts, list) else []
    texts = [each.get("text") for each in known if each.get("type") == "text"]
    text = "".join(each for each in texts if isinstance(each, str)) or message.get("content")
    if not isinstance(text, str) or not text:
        raise Refused(400, "invalid_argument", "The message must have a text.")
    prompt: Message = {"id": checked_id(message.get("id"), "The message's id"), "role": "user", "content": text}
    if any(each.get("type") != "text" for each in known):
        prompt["parts"] = known
    return prompt


class Chunks:
    """The chunks of one answer. Texts that follow one another are one block, with a start and an end."""

    def __init__(self, message_id: str) -> None:
        self._message_id = message_id
        self._open: str | None = None
        self._blocks = 0
        self._has_failed = False

    def start(self) -> list[Chunk]:
        return [{"type": "start", "messageId": self._message_id}, {"type": "start-step"}]

    def of(self, event: Event) -> list[Chunk]:
        """Return the chunks that tell an event."""
        match event:
            case {"type": "text" | "reasoning" as kind, "text": text}:
                chunks = []
                if self._open != kind:
                    chunks = self._closed()
                    self._open, self._blocks = kind, self._blocks + 1
                    chunks.append({"type": f"{kind}-start", "id": str(self._blocks)})
                return [*chunks, {"type": f"{kind}-delta", "id": str(self._blocks), "delta": text}]
            case {"type": "tool-input", "id": call, "name": name, "input": value}:
                told_call = {"toolCallId": call, "toolName": name, "input": value}
                return [*self._closed(), {"type": "tool-input-available", **told_call}]
            case {"type": "tool-output", "id": call, "output": value}:
                return [*self._closed(), {"type": "tool-output-available", "toolCallId": call, "output": value}]
            case {"type": "error", "text": text}:
                self._has_failed = True
                return [*self._closed(), {"type": "error", "errorText": text}]
        return []

    def end(self, how: str) -> list[Chunk]:
        """Return the chunks that tell how the turn has ended."""
        chunks = self._closed()
        if how == "stopped":
            chunks.append({"type": "abort"})
        elif how != "finished" and not self._has_failed:
            text = _LOST if how == "lost" else "The answer broke off. What was said is kept."
            chunks.append({"type": "error", "errorText": text})
        elif how == "finished":
            chunks += [{"type": "finish-step"}, {"type": "finish"}]
        return chunks

    def _closed(self) -> list[Chunk]:
        kind, self._open = self._open, None
        return [] if kind is None else [{"type": f"{kind}-end", "id": str(self._blocks)}]


async def _tell(
    chunks: Chunks, before: list[Event], following: persist.aio.Following | None, how: str
) -> AsyncIterator[ServerSentEvent]:
    for chunk in chunks.start():
        yield told(chunk)
    for event in before:
        for chunk in chunks.of(event):
            yield told(chunk)
    if following is not None:
        try:
            async for each in following:
                for chunk in chunks.of(each.data):
                    yield told(chunk)
            how = how_ended(following)
        except persist.EventsNotFound:
            how = "lost"  # the client was so slow that its next event was dropped
    for chunk in chunks.end(how):
        yield told(chunk)
    yield told("[DONE]")
