"""The routes of sessions, turns and streams."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import persist.aio
from persist import turn
from persist.asgi.events import EventStream, expired, parts
from persist.asgi.exchange import (
    ID,
    Answered,
    Authorize,
    Prefix,
    Refused,
    admitted,
    checked_id,
    cursor_in,
    fields_in,
    is_admitted,
    number_in,
    stream_id_in,
    text_in,
    unknown_session,
)
from persist.asgi.markdown import html_of
from persist.asgi.turns import OFFSET, STOPPED, Started, Turns, without_earlier
from persist.errors import shown as shortened
from persist.log import log

TITLE_CHARACTERS = 200
MAX_PAGE = 1000
_LAST = 10**15 - 1
#: How many pages of the store a request for a list looks at, if it may see only few sessions. Each page costs a look at
#: every lock file.
_MOST_PAGES = 20
#: A beginning of an id. It leaves room for 32 characters.
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,96}")
#: How long a list waits for the lock of one session that names a stream.
_PATIENCE_S = 0.5


class Sessions:
    """The routes below ``api/sessions``.

    Args:
        heartbeat_s: how often a quiet stream gives a sign of life.
    """

    def __init__(
        self,
        store: persist.aio.Store,
        turns: Turns,
        *,
        authorize: Authorize | None,
        prefix: Prefix | None,
        heartbeat_s: float,
    ) -> None:
        self._store, self._turns, self._authorize, self._heartbeat_s = store, turns, authorize, heartbeat_s
        self._prefix_of: Prefix = prefix or (lambda _request: "")

    def routes(self) -> list[Route]:
        one = "/api/sessions/{session_id}"
        stream = f"{one}/streams/{{stream_id}}"
        return [
            _route("/api/sessions", GET=self.list_sessions, POST=self.create),
            _route(one, GET=self.read, PATCH=self.rename, DELETE=self.delete),
            Route(f"{one}/turns", self.start, methods=["POST"]),
            Route(f"{one}/retry", self.retry, methods=["POST"]),
            Route(f"{stream}/stop", self.stop, methods=["POST"]),
            Route(f"{stream}/events", self.events, methods=["GET"]),
        ]

    # --- sessions ---

    async def list_sessions(self, request: Request) -> Response:
        limit, before = number_in(request, "limit", 50, 1, 200), request.query_params.get("before")
        rows: list[dict[str, Any]] = []
        prefix = self._prefix(request)
        for _ in range(_MOST_PAGES):
            page = await self._store.recent(limit=limit - len(rows), before=before, prefix=prefix)
            seen = [head for head in page if await self._is_shown(request, head.id)]
            rows += [await self._row(head) for head in seen]
            before = page.cursor
            if before is None or len(rows) == limit:
                break
        return Answered({"sessions": rows, "cursor": before, "new_id": f"{prefix}{uuid.uuid4().hex}"})

    def _prefix(self, request: Request) -> str:
        """Return what the ids of this request's sessions begin with."""
        prefix = self._prefix_of(request)
        if isinstance(prefix, str) and (not prefix or _PREFIX.fullmatch(prefix)):
            return prefix
        log.error("`prefix` of the chat server returned no beginning of an id: %s", shortened(prefix))
        raise Refused(500, "internal", "The server has failed. Its log tells why.")

    async def _is_shown(self, request: Request, session_id: str) -> bool:
        return ID.fullmatch(session_id) is not None and await is_admitted(request, session_id, self._authorize)

    async def _row(self, head: persist.Head) -> dict[str, Any]:
        is_live = False
        if head.active_stream_id is not None:
            try:
                info = await self._store.stream(head.id, timeout_s=_PATIENCE_S)
                is_live = info is not None and info.is_live
            except persist.LockTimeout:
                is_live = True  # somebody works on it
            except persist.PersistError:
                pass
        title = dict(head.fields).get("title")
        return {
            "id": head.id,
            "title": title if isinstance(title, str) else "",
            "updated_at": head.updated_at.isoformat(),
            "messages": head.counts.get(turn.MESSAGES, 0),
            "live": is_live,
            "stream_id": head.active_stream_id if is_live else None,
        }

    async def create(self, request: Request) -> Response:
        fields = await fields_in(request)
        session_id = checked_id(fields["id"], "The session's id") if "id" in fields else None
        session_id = session_id or f"{self._prefix(request)}{uuid.uuid4().hex}"
        title = text_in({"title": "", **fields}, "title", most=TITLE_CHARACTERS)
        if not await is_admitted(request, session_id, self._authorize):
            raise unknown_session()
        await self._store.create(session_id, {"title": title, "messages": []})
        return Answered(await self._row(await self._store.head(session_id)), 201)

    async def read(self, request: Request) -> Response:
        session_id = await admitted(request, self._authorize)
        limit, before = number_in(request, "limit", 50, 1, MAX_PAGE), number_in(request, "before", _LAST, 0, _LAST)
        view, stream_id, is_live = await self._seen(session_id)
        messages = view.list(turn.MESSAGES)
        end = min(before, len(messages))
        first = max(0, end - limit)
        partial_id = None if stream_id is None else f"{stream_id}.answer"
        partial = messages.find(partial_id) if is_live and partial_id is not None else None
        page = messages[first:end]
        if is_live and partial is None:
            page = without_earlier(page, view.fields)
        shown = await asyncio.to_thread(_shown_all, page, partial_id)
        title = view.fields.get("title")
        body = {
            "id": session_id,
            "title": title if isinstance(title, str) else "",
            "version": view.version,
            "total": len(messages),
            "first": first,
            "messages": shown,
            "stream": None,
        }
        if is_live:
            after = partial.get(OFFSET, 0) if type(partial) is dict else 0
            body["stream"] = {"stream_id": stream_id, "live": True, "after": after}
        return Answered(body)

    async def _seen(self, session_id: str) -> tuple[persist.View, str | None, bool]:
        """Return a session, the stream that it names, and whether that stream runs."""
        dead_id = None
        while True:
            view = await self._store.view(session_id)
            stream_id = turn.active_stream(view.fields)
            if stream_id in (None, dead_id):
                return view, stream_id, False
            info = await self._store.stream(session_id)
            if info is not None and info.stream_id == stream_id:
                if info.is_live:
                    return view, info.stream_id, True
                # It may have written after the view. It writes no more, so the next view shows its last words.
                dead_id = stream_id

    async def rename(self, request: Request) -> Response:
        session_id = await admitted(request, self._authorize)
        title = text_in(await fields_in(request), "title", most=TITLE_CHARACTERS)

        def put(tx: persist.Transaction) -> None:
            tx.fields["title"] = title

        await self._store.update(session_id, put, touch=False)
        return Answered(await self._row(await self._store.head(session_id)))

    async def delete(self, request: Request) -> Response:
        session_id = await admitted(request, self._authorize)
        is_forced = number_in(request, "force", 0, 0, 1) == 1
        if is_forced:
            # First, so that the followers learn that it was stopped.
            with suppress(persist.CorruptSession, persist.UnsupportedFormat):
                info = await self._store.stream(session_id)
                if info is not None:
                    await self._store.cancel(session_id, info.stream_id, force=True)
        await self._store.delete(session_id, force=is_forced)
        return Response(status_code=204)

    # --- turns ---

    async def start(self, request: Request) -> Response:
        session_id = await admitted(request, self._authorize)
        fields = await fields_in(request)
        message = fields.pop("message", None)
        if type(message) is not dict:
            raise Refused(400, "invalid_argument", "message must be an object with an id and a content.")
        message_id = checked_id(message.get("id"), "The message's id")
        content = text_in(message, "content")
        started = await self._turns.start(session_id, {"id": message_id, "role": "user", "content": content}, fields)
        return _started(started)

    async def retry(self, request: Request) -> Response:
        session_id = await admitted(request, self._authorize)
        fields = await fields_in(request)
        prompt_id = fields.pop("message_id", None)
        return _started(await self._turns.retry(session_id, fields, prompt_id=prompt_id))

    async def stop(self, request: Request) -> Response:
        session_id, stream_id = await admitted(request, self._authorize), stream_id_in(request)
        return Answered({"stopped": await self._turns.stop(session_id, stream_id)})

    async def events(self, request: Request) -> Response:
        session_id, stream_id = await admitted(request, self._authorize), stream_id_in(request)
        after = cursor_in(request)
        try:
            following = await self._store.follow(session_id, stream_id, after=after)
        except persist.EventsNotFound:
            if not await self._store.exists(session_id):
                raise unknown_session() from None
            return self._streamed(expired(stream_id), None)
        return self._streamed(parts(following), following)

    def _streamed(self, events: AsyncIterator[ServerSentEvent], following: persist.aio.Following | None) -> Response:
        return EventStream(events, following, heartbeat_s=self._heartbeat_s, close_turns=self._turns.close)


def _route(path: str, **handlers: Callable[[Request], Awaitable[Response]]) -> Route:
    """Return one route for all methods of a path, because a refused method is told the methods of one route only."""

    async def handle(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, handle, methods=[*handlers])


def _started(started: Started) -> Response:
    body: dict[str, Any] = {"stream_id": started.stream_id, "message_id": started.message_id}
    return Answered({**body, "repeated": True}, 200) if started.is_repeated else Answered(body, 201)


# --- messages ---------------------------------------------------------------------------------------------------------


def _shown_all(messages: list[Any], partial_id: str | None) -> list[dict[str, Any]]:
    return [shown(each, partial_id) for each in messages]


def shown(message: Any, partial_id: str | None = None) -> dict[str, Any]:
    """Return a stored message for a page. `partial_id` is the id of an answer that is not whole, or not yet."""
    if type(message) is not dict:
        return {"id": None, "role": "unknown", "content": json.dumps(message)}
    role = message.get("role")
    body: dict[str, Any] = {
        "id": message.get("id"),
        "role": role if isinstance(role, str) else "unknown",
        "content": text_of(message.get("content")),
    }
    is_running = partial_id is not None and message.get("id") == partial_id
    is_partial = role == "assistant" and (bool(message.get(turn.INTERRUPTED)) or is_running)
    if is_partial:
        body["partial"] = True
        if message.get(STOPPED):
            body["stopped"] = True
    elif role == "assistant":
        body |= _html_of(body["content"])
    if isinstance(message.get("parts"), list):
        is_whole = role == "assistant" and not is_partial
        body["parts"] = [_shown_part(each, is_whole) for each in message["parts"] if type(each) is dict]
    if isinstance(message.get("error"), str):
        body["error"] = message["error"]
    return body


def _shown_part(part: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """Return a part for a page. A text of a whole answer has its own HTML, which nobody but this server makes."""
    own = {name: value for name, value in part.items() if name != "html"}
    is_rendered = is_whole and own.get("type") == "text" and isinstance(own.get("text"), str)
    return own | _html_of(own["text"]) if is_rendered else own


def _html_of(text: str) -> dict[str, str]:
    html = html_of(text)
    return {} if html is None else {"html": html}


def text_of(content: Any) -> str:
    """Return the text of a content, which other programs may keep as a list of parts."""
    if isinstance(content, str):
        return content
    pieces = content if isinstance(content, list) else []
    texts = [each.get("text") for each in pieces if type(each) is dict]
    return "".join(each for each in texts if isinstance(each, str))
