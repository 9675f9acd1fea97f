"""How a request is read, and how an answer or a refusal is written, for all routes.

Each refusal has the body ``{"error": {"code", "message"}}``, and some have further facts beside the error. No message
holds a path, because a message of `persist` may.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler

import persist
from persist.log import log

ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
STREAM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OFFSET = re.compile(r"[0-9]{1,15}")

#: Tells whether a request may see a session. A refused session answers like an unknown one.
Authorize = Callable[[Request, str], bool | Awaitable[bool]]
#: Returns what the ids of the sessions begin with that a request may see: ``ann:``, for example.
Prefix = Callable[[Request], str]


class Refused(Exception):
    """A request that is answered with an error. `facts` stand beside the error in the body."""

    def __init__(self, status: int, code: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.facts = status, code, message, facts

    def response(self) -> Response:
        body = {"error": {"code": self.code, "message": self.message}, **self.facts}
        return Answered(body, self.status, {"Retry-After": "1"} if self.status == 503 else None)


class Answered(JSONResponse):
    """A response as JSON in ASCII, because half an emoji has no UTF-8, and a model may have cut one in two."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


# --- reading a request ------------------------------------------------------------------------------------------------


async def admitted(request: Request, authorize: Authorize | None) -> str:
    """Return the session's id of a request's path, if this request may see that session.

    Raises:
        Refused: the id is malformed, or the session is refused.
    """
    session_id = checked_id(request.path_params["session_id"], "The session's id")
    if not await is_admitted(request, session_id, authorize):
        raise unknown_session()
    return session_id


async def is_admitted(request: Request, session_id: str, authorize: Authorize | None) -> bool:
    """Tell whether a request may see a session."""
    verdict = True if authorize is None else authorize(request, session_id)
    return bool(await verdict if inspect.isawaitable(verdict) else verdict)


def within(prefix: Prefix | None, authorize: Authorize | None) -> Authorize | None:
    """Return what admits a request to the sessions of its prefix that `authorize` admits it to."""
    if prefix is None:
        return authorize

    async def admits(request: Request, session_id: str) -> bool:
        return session_id.startswith(prefix(request)) and await is_admitted(request, session_id, authorize)

    return admits


def unknown_session() -> Refused:
    """Return the refusal of a session that does not exist, or that this request may not see."""
    return Refused(404, "not_found", "There is no such session.")


def checked_id(value: object, what: str) -> str:
    """Return an id that is well-formed."""
    if isinstance(value, str) and ID.fullmatch(value):
        return value
    raise Refused(400, "invalid_id", f"{what} must be 1 to 128 letters, digits or any of _ . : -")


def stream_id_in(request: Request) -> str:
    """Return the stream's id of a request's path."""
    stream_id = str(request.path_params["stream_id"])
    if STREAM_ID.fullmatch(stream_id):
        return stream_id
    raise Refused(400, "invalid_id", "The stream's id is malformed.")


def number_in(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Return a whole number of the query."""
    value = request.query_params.get(name)
    if value is None:
        return default
    if not _OFFSET.fullmatch(value) or not value.isascii() or not least <= int(value) <= most:
        raise Refused(400, "invalid_argument", f"{name} must be a whole number from {least} to {most}.")
    return int(value)


def cursor_in(request: Request) -> int:
    """Return the offset of the last event that the client has seen.

    A browser sends the header when it reconnects. The query is for a page that was loaded anew.
    """
    value = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not _OFFSET.fullmatch(value) or not value.isascii():
        raise Refused(400, "invalid_argument", "The cursor must be the id of an event.")
    return int(value)


async def fields_in(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request's body. An empty body is an empty object."""
    body = await request.body()
    try:
        value = json.loads(body, parse_constant=_refuse_constant) if body else {}
    except (ValueError, RecursionError):
        raise Refused(400, "invalid_json", "The body must be JSON.") from None
    if type(value) is not dict:
        raise Refused(400, "invalid_argument", "The body must be a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def text_in(fields: dict[str, Any], name: str, *, most: int | None = None) -> str:
    """Return a text of a body, of so many characters at most. Without a bound it may not be empty."""
    value = fields.get(name)
    if isinstance(value, str) and (len(value) <= most if most is not None else value):
        return value
    bounds = "that is not empty" if most is None else f"of 0 to {most} characters"
    raise Refused(400, "invalid_argument", f"{name} must be a text {bounds}.")


# --- refusals ---------------------------------------------------------------------------------------------------------

_REFUSALS: dict[type[Exception], tuple[int, str, str]] = {
    persist.SessionExists: (409, "exists", "There is a session of that id."),
    persist.MergeConflict: (409, "conflict", "The session has other content under that id."),
    persist.InvalidArgument: (400, "invalid_argument", "A value of the request cannot be used."),
    persist.NotJSON: (400, "invalid_argument", "A value of the request cannot be kept."),
    persist.TooLarge: (413, "too_large", "The session would become too large."),
    persist.LockTimeout: (503, "locked", "The session is in use. Try again."),
}


def _refusal_of(error: persist.PersistError) -> Refused:
    if isinstance(error, persist.SessionNotFound):
        return unknown_session()
    if isinstance(error, persist.SessionBusy):
        owner: dict[str, Any] = {"stream_id": error.stream_id}
        if error.owner is not None:
            owner |= {"pid": error.owner.pid, "host": error.owner.host, "since": error.owner.started_at}
        return Refused(409, "busy", "Another turn of the session runs.", owner=owner)
    for kind, (status, code, message) in _REFUSALS.items():
        if isinstance(error, kind):
            return Refused(status, code, message)
    log.error("A request was refused: %s", error)
    return Refused(503, "unavailable", "The session cannot be used just now. The server's log tells why.")


def refuse(_request: Request, error: Exception) -> Response:
    """Answer a request that an error has ended."""
    if isinstance(error, persist.PersistError):
        error = _refusal_of(error)
    if isinstance(error, Refused):
        return error.response()
    if isinstance(error, ClientDisconnect):
        return Refused(400, "disconnected", "The client has left.").response()
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        response = Refused(error.status_code, code, error.detail).response()
        response.headers.update(error.headers or {})
        return response
    return Refused(500, "internal", "The server has failed. Its log tells why.").response()


#: The handlers of an app.
HANDLERS: dict[Any, ExceptionHandler] = dict.fromkeys(
    (persist.PersistError, Refused, ClientDisconnect, HTTPException, Exception), refuse
)
