"""The OpenAPI document of all routes, written by hand, so that it says what a client must know and nothing else."""

from __future__ import annotations

from typing import Any

import persist

Schema = dict[str, Any]


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _body(schema: Schema, *, required: bool = True, example: Any = None) -> Schema:
    media: Schema = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"required": required, "content": {"application/json": media}}


def _parameter(name: str, schema: Schema, *, where: str = "query", description: str = "", **more: Any) -> Schema:
    known = {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}
    return {**known, **more}


_ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,128}$"}
_STREAM_ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"}
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_TITLE: Schema = {"type": "string", "maxLength": 200}
_OFFSET: Schema = {"type": "string", "pattern": "^[0-9]{1,15}$"}
#: The schema is that of one event of the stream.
_EVENTS: Schema = {"text/event-stream": {"schema": _object(("data",), id=_OFFSET, event=_TEXT, data=_TEXT)}}


def _count(least: int = 0, most: int | None = None) -> Schema:
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_SESSION = _parameter("session_id", _ID, where="path", example="s-42")
_STREAM = _parameter("stream_id", _STREAM_ID, where="path")
_SCHEMAS: Schema = {
    "Error": _object(
        ("error",),
        error=_object(("code", "message"), code=_TEXT, message=_TEXT),
        owner=_object(("stream_id",), stream_id=_TEXT, pid=_count(), host=_TEXT, since=_TEXT),
    ),
    "Row": _object(
        ("id", "title", "updated_at", "messages", "live", "stream_id"),
        id=_TEXT,
        title=_TEXT,
        updated_at={"type": "string", "format": "date-time"},
        messages=_count(),
        live=_FLAG,
        stream_id=_or_null(_TEXT),
    ),
    "Message": _object(
        ("id", "role", "content"),
        id={"type": ["string", "integer", "null"]},
        role=_TEXT,
        content=_TEXT,
        parts={"type": "array", "items": {}},
        html={**_TEXT, "description": "Rendered Markdown of a whole answer."},
        partial={**_FLAG, "description": "The answer has not come to its end, or not yet."},
        stopped={**_FLAG, "description": "The partial answer was stopped by a user."},
        error={**_TEXT, "description": "The reason for which the answer failed."},
    ),
    "Session": _object(
        ("id", "title", "version", "total", "first", "messages", "stream"),
        id=_TEXT,
        title=_TEXT,
        version=_TEXT,
        total=_count(),
        first={**_count(), "description": "The index of the first message here."},
        messages={"type": "array", "items": _ref("Message")},
        stream=_or_null(
            _object(
                ("stream_id", "live", "after"),
                stream_id=_TEXT,
                live=_FLAG,
                after={**_count(), "description": "The event behind which the stored partial answer goes on."},
            )
        ),
    ),
    "Started": _object(("stream_id", "message_id"), stream_id=_or_null(_TEXT), message_id=_TEXT, repeated=_FLAG),
    "Stopped": _object(("stopped",), stopped=_FLAG),
    "Prompt": _object(("id", "content"), id=_ID, content={"type": "string", "minLength": 1}),
    "UIMessage": _object(
        ("id", "parts"),
        id=_ID,
        role={"type": "string", "enum": ["user"]},
        parts={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ("type", "text"), type={"type": "string", "const": "text"}, text={"type": "string", "minLength": 1}
            ),
        },
    ),
}
_REFUSALS = {
    "400": "The request is malformed.",
    "403": "The page is of another origin.",
    "404": "There is no such session.",
    "409": "The session is busy, or has other content.",
    "413": "The body is too large.",
    "421": "The server is not known by the host of the request.",
    "503": "The session is in use, or cannot be used just now.",
}


def _operation(summary: str, answers: Schema, *parameters: Schema, refuses: str, body: Schema | None = None) -> Schema:
    refusals = {status: _json(_REFUSALS[status], _ref("Error")) for status in [*refuses.split(), "421", "503"]}
    found: Schema = {"summary": summary, "parameters": list(parameters), "responses": {**answers, **refusals}}
    return found if body is None else {**found, "requestBody": body}


def _streamed(description: str) -> Schema:
    return {"description": description, "content": _EVENTS}


_STARTS = {"201": _json("The turn runs.", _ref("Started"))}
_REPEATED = {"200": _json("The turn had been started before.", _ref("Started"))}
_PROMPT = {"id": "m-1", "content": "What time is it?"}
_UI_PROMPT = {"id": "m-2", "role": "user", "parts": [{"type": "text", "text": "What time is it?"}]}
_ONE = "/api/sessions/{session_id}"
DOCUMENT: Schema = {
    "openapi": "3.1.0",
    "info": {"title": "persist", "version": persist.__version__, "description": "Chat sessions and their turns."},
    # The app may be mounted under any prefix.
    "servers": [{"url": "."}],
    "paths": {
        "/api/sessions": {
            "get": _operation(
                "List the sessions that were updated last",
                {
                    "200": _json(
                        "A page of sessions.",
                        _object(
                            ("sessions", "cursor", "new_id"),
                            sessions={"type": "array", "items": _ref("Row")},
                            cursor={**_or_null(_TEXT), "description": "The `before` of the next page."},
                            new_id={**_ID, "description": "An id for a new session. Each answer has another one."},
                        ),
                    )
                },
                _parameter("limit", _count(1, 200)),
                _parameter("before", _TEXT, description="The cursor of the page before."),
                refuses="400",
            ),
            "post": _operation(
                "Create a session",
                {"201": _json("The session.", _ref("Row"))},
                body=_body(_object(id=_ID, title=_TITLE), required=False),
                refuses="400 403 404 409 413",
            ),
        },
        _ONE: {
            "get": _operation(
                "Read the last messages of a session, or those before an index",
                {"200": _json("The session.", _ref("Session"))},
                _SESSION,
                _parameter("limit", _count(1, 1000)),
                _parameter("before", _count(0, 10**15 - 1)),
                refuses="400 404",
            ),
            "patch": _operation(
                "Give a session a title",
                {"200": _json("The session.", _ref("Row"))},
                _SESSION,
                body=_body(_object(("title",), title=_TITLE)),
                refuses="400 403 404 413",
            ),
            "delete": _operation(
                "Delete a session",
                {"204": {"description": "It is gone."}},
                _SESSION,
                _parameter("force", _count(0, 1), description="1 stops its turn first."),
                refuses="400 403 404 409",
            ),
        },
        f"{_ONE}/turns": {
            "post": _operation(
                "Start the turn of a message, once for each id of a message",
                {**_STARTS, **_REPEATED},
                _SESSION,
                body=_body(_object(("message",), message=_ref("Prompt")), example={"message": _PROMPT}),
                refuses="400 403 404 409 413",
            )
        },
        f"{_ONE}/retry": {
            "post": _operation(
                "Answer the last message again, or only if it is still the one that is named",
                _STARTS,
                _SESSION,
                body=_body(_object(message_id=_ID), required=False),
                refuses="400 403 404 409 413",
            )
        },
        f"{_ONE}/streams/{{stream_id}}/stop": {
            "post": _operation(
                "Stop a turn",
                {"200": _json("Whether it was running.", _ref("Stopped"))},
                _SESSION,
                _STREAM,
                refuses="400 403 404",
            )
        },
        f"{_ONE}/streams/{{stream_id}}/events": {
            "get": _operation(
                "Follow a turn: events `part`, at last `end`, or `expired` if the cursor has no events any more",
                {"200": _streamed("Server-Sent Events, as they come.")},
                _SESSION,
                _STREAM,
                _parameter("after", _count(0, 10**15 - 1), description="The id of the last event that was seen."),
                _parameter("Last-Event-ID", _OFFSET, where="header", description="As `after`."),
                refuses="400 404",
            )
        },
        "/api/chat": {
            "post": _operation(
                "Send a message in the form of the AI SDK, and get its UI message stream",
                {"200": _streamed("The UI message stream.")},
                body=_body(
                    _object(
                        ("id",),
                        id=_ID,
                        message={**_ref("UIMessage"), "description": "It goes before `messages`."},
                        messages={"type": "array", "items": _ref("UIMessage"), "minItems": 1},
                        trigger={"type": "string", "enum": ["submit-message", "regenerate-message"]},
                    )
                    | {"anyOf": [{"required": ["message"]}, {"required": ["messages"]}]},
                    example={"id": "s-42", "message": _UI_PROMPT},
                ),
                refuses="400 403 404 409 413",
            )
        },
        "/api/chat/{session_id}/stream": {
            "get": _operation(
                "Resume the running answer from its start",
                {"200": _streamed("The UI message stream."), "204": {"description": "No turn runs."}},
                _SESSION,
                refuses="400 404",
            )
        },
        "/api/chat/{session_id}/stop": {
            "post": _operation(
                "Stop the running answer, unless another one runs by now",
                {"200": _json("Whether it was running.", _ref("Stopped"))},
                _SESSION,
                body=_body(_object(activeStreamId=_TEXT), required=False),
                refuses="400 403 404 413",
            )
        },
        "/healthz": {
            "get": _operation("Tell whether the store can be read", {"200": _json("It can.", _object())}, refuses="")
        },
    },
    "components": {"schemas": _SCHEMAS},
}
