"""Bodies and cursors that are hostile: none of them is status 500, and none makes anything."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import persist

#: Values that stand in the place of a text, an id, an object or a list.
WRONG: list[Any] = [None, True, 7, 1.5, "", "\ud800", "x" * 129, "a/b", "\x00", [], {}, [[]], {"id": {}}, ["m"]]
NESTED = b"[" * 400 + b"]" * 400


@pytest.mark.parametrize("name", ["id", "content"])
@pytest.mark.parametrize("path", ["/api/sessions/s/turns", "/api/chat"])
def test_a_value_of_a_wrong_type_is_refused(client: Any, store: persist.Store, path: str, name: str) -> None:
    """Each place of a message with each wrong value is status 400. A lone surrogate is a text, and is kept."""
    for value in WRONG:
        if name == "content" and isinstance(value, str) and value:
            continue
        message = {"id": "m", "content": "x", name: value}
        response = client.post(path, content=json.dumps({"id": "s", "message": message}))
        assert response.status_code == 400, value
        response = client.post(path, content=json.dumps({"id": "s", "message": value, "messages": [value]}))
        assert response.status_code == 400, value
    assert store.ids() == []


def test_the_refusal_of_a_text_names_a_bound_that_holds(client: Any) -> None:
    """A body is bounded itself, so a message has no bound of its own in characters. A title has one."""
    refusals = {
        client.post("/api/sessions/s/turns", json={"message": {"id": "m", "content": ""}}): "that is not empty.",
        client.post("/api/sessions", json={"title": "x" * 201}): "of 0 to 200 characters.",
    }
    for response, end in refusals.items():
        assert response.json()["error"]["message"].endswith(f"must be a text {end}")


def test_half_an_emoji_is_kept(client: Any, store: persist.Store) -> None:
    """A lone surrogate in a message goes through the stream, the store and the page's view."""
    body = json.dumps({"message": {"id": "m", "content": "a\ud83d \x00 \u2028"}})
    stream_id = client.post("/api/sessions/s/turns", content=body).json()["stream_id"]
    with client.stream("GET", f"/api/sessions/s/streams/{stream_id}/events") as response:
        assert "a\\ud83d" in "".join(response.iter_text())
    assert client.get("/api/sessions/s").json()["messages"][0]["content"] == "a\ud83d \x00 \u2028"
    assert store.load("s").data["messages"][0]["content"] == "a\ud83d \x00 \u2028"


@pytest.mark.parametrize(
    ("part", "status"),
    [(b"1e999", 400), (b"9" * 5000, 400), (b"-Infinity", 400), (NESTED, 400), (b'{"a": [null, 1e300]}', 200)],
    ids=["infinity", "digits", "constant", "nested", "plain"],
)
def test_a_part_that_cannot_be_kept_is_refused(client: Any, store: persist.Store, part: bytes, status: int) -> None:
    """The AI SDK's parts are stored as they come. A number or a depth that JSON cannot hold is status 400."""
    parts = b'[{"type": "text", "text": "a"}, {"type": "file", "data": %b}]' % part
    response = client.post("/api/chat", content=b'{"id": "s", "message": {"id": "m", "parts": %b}}' % parts)
    assert response.status_code == status, response.text
    if status == 400:
        assert response.json()["error"]["code"] in ("invalid_json", "invalid_argument")
        assert [each["id"] for session in store.ids() for each in store.load(session).data["messages"]] == []


def test_a_body_of_the_default_bound_is_taken(client: Any) -> None:
    """1 MiB is a message, and one byte more is refused."""
    frame = b'{"message": {"id": "m", "content": "%b"}}'
    fit = 2**20 - len(frame % b"")
    refused = client.post("/api/sessions/s/turns", content=frame % (b"x" * (fit + 1)))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")
    assert client.post("/api/sessions/s/turns", content=frame % (b"x" * fit)).status_code == 201


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "1e3", "0x1", "1 1", "9" * 16, "²", "1,2", "%00", "null"])
def test_a_cursor_that_is_none_is_refused(client: Any, cursor: str) -> None:
    """Status 400, in the header and in the query, and the stream of a right cursor still answers."""
    stream_id = client.post("/api/sessions/s/turns", json={"message": {"id": "m", "content": "a"}}).json()["stream_id"]
    path = f"/api/sessions/s/streams/{stream_id}/events"
    assert "event: end" in client.get(path, headers={"Last-Event-ID": ""}).text
    answers = [
        client.get(path, headers={"Last-Event-ID": cursor.encode("latin-1")}),
        client.get(path, params={"after": cursor}),
    ]
    assert [each.status_code for each in answers] == [400, 400]
    assert {each.json()["error"]["code"] for each in answers} == {"invalid_argument"}
    assert "event: end" in client.get(path, headers={"Last-Event-ID": "1"}).text
