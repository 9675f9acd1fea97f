"""Sessions over HTTP: listed, made, read, named and deleted. Each refusal has its status and its shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import persist


def told(response: Any, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    return response.json()


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = told(response, status)
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    return body


def test_a_session_is_made_listed_named_read_and_deleted(client: Any) -> None:
    """The life of a session, each step as its row tells it."""
    row = told(client.post("/api/sessions", json={"id": "s-1", "title": "First"}), 201)
    assert (row["id"], row["title"], row["messages"], row["live"], row["stream_id"]) == ("s-1", "First", 0, False, None)
    listed = told(client.get("/api/sessions"))
    assert listed.pop("new_id")
    assert listed == {"sessions": [row], "cursor": None}
    assert told(client.patch("/api/sessions/s-1", json={"title": "Renamed"})) == row | {"title": "Renamed"}
    read = told(client.get("/api/sessions/s-1"))
    assert read.pop("version")
    assert read == {"id": "s-1", "title": "Renamed", "total": 0, "first": 0, "messages": [], "stream": None}
    refused(client.post("/api/sessions", json={"id": "s-1"}), 409, "exists")
    assert client.delete("/api/sessions/s-1").status_code == 204
    refused(client.get("/api/sessions/s-1"), 404, "not_found")


def test_a_session_without_an_id_gets_one(client: Any) -> None:
    """An empty body makes a session, each time another one."""
    ids = {told(client.post("/api/sessions"), 201)["id"] for _ in range(2)}
    assert {row["id"] for row in told(client.get("/api/sessions"))["sessions"]} == ids
    assert len(ids) == 2


def test_the_list_has_pages(client: Any, store: persist.Store) -> None:
    """The pages together have each session once. A session that no path can name is left out."""
    for place in range(7):
        store.create(f"s-{place}")
    store.create("not for a path/")
    found, cursor = [], None
    while True:
        page = told(client.get("/api/sessions", params={"limit": 3} | ({"before": cursor} if cursor else {})))
        assert len(page["sessions"]) <= 3
        found += [row["id"] for row in page["sessions"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert sorted(found) == [f"s-{place}" for place in range(7)]


def test_messages_are_read_backwards(client: Any, store: persist.Store) -> None:
    """The last messages come first, and `before` leads to the earlier ones."""
    store.create("s", {"messages": [{"id": f"m{n}", "role": "user", "content": str(n)} for n in range(7)]})
    last = told(client.get("/api/sessions/s?limit=3"))
    assert (last["total"], last["first"], [m["id"] for m in last["messages"]]) == (7, 4, ["m4", "m5", "m6"])
    before = told(client.get(f"/api/sessions/s?limit=5&before={last['first']}"))
    assert (before["first"], [m["id"] for m in before["messages"]]) == (0, ["m0", "m1", "m2", "m3"])
    assert told(client.get("/api/sessions/s?before=0"))["messages"] == []
    assert told(client.get("/api/sessions/s?before=99"))["total"] == 7


def test_markdown_is_rendered_and_html_stays_text(client: Any, store: persist.Store) -> None:
    """A whole answer has HTML. Nothing in it runs, loads or leads to a script."""
    text = (
        "**bold** <script>alert(1)</script> [x](javascript:alert(1)) [y](https://example.org) ![z](https://e.org/z.png)"
    )
    store.create("s", {"messages": [{"id": "a", "role": "assistant", "content": text}]})
    (message,) = told(client.get("/api/sessions/s"))["messages"]
    html = message["html"]
    assert "<strong>bold</strong>" in html
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<img" not in html
    assert 'href="javascript' not in html
    assert '<a href="https://example.org" rel="noopener noreferrer nofollow" target="_blank">y</a>' in html


def test_each_text_of_a_whole_answer_has_its_html(client: Any, store: persist.Store) -> None:
    """A page shows texts and tools in their order. Fails if the HTML of another program's part is passed on.

    An answer without an id is whole, too.
    """
    forged = {"html": "<script>alert(1)</script>"}
    parts = [{"type": "text", "text": "*a*", **forged}, {"type": "tool-x", "input": 1, **forged}, {"type": "text"}, 7]
    messages = [{"role": role, "content": "a", "parts": parts} for role in ("assistant", "user")]
    partial = {"id": "p", "role": "assistant", "content": "a", "parts": parts, "interrupted": True}
    store.create("s", {"messages": [*messages, partial]})
    whole, *others = [each["parts"] for each in told(client.get("/api/sessions/s"))["messages"]]
    plain: list[Any] = [{"type": "text", "text": "*a*"}, {"type": "tool-x", "input": 1}, {"type": "text"}]
    assert whole == [plain[0] | {"html": "<p><em>a</em></p>\n"}, *plain[1:]]
    assert others == [plain, plain]


def test_messages_of_other_programs_are_shown(client: Any, store: persist.Store) -> None:
    """Contents in parts, messages that are none, and half an emoji give no status 500."""
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, 7]
    messages = [
        {"role": "assistant", "content": parts},
        "odd",
        {"content": None},
        {"role": "assistant", "content": "\ud83d"},
    ]
    store.create("s", {"title": {"no": "text"}, "messages": messages})
    read = told(client.get("/api/sessions/s"))
    assert [m["content"] for m in read["messages"]] == ["ab", '"odd"', "", "\ud83d"]
    assert read["title"] == ""
    store.create("s-2", {"title": "\ud83d"})
    assert {row["title"] for row in told(client.get("/api/sessions"))["sessions"]} == {"", "\ud83d"}


def test_a_damaged_session_is_refused_and_hides_no_other(client: Any, store: persist.Store) -> None:
    """Damage is no status 500, and tells no path. A forced delete removes it."""
    for name in ("good", "bad"):
        store.create(name, {"messages": [{"id": "m", "role": "user", "content": "x"}]})
    (store.path / "bad.json").write_text("{")
    body = refused(client.get("/api/sessions/bad"), 503, "unavailable")
    assert str(store.path) not in json.dumps(body)
    assert [row["id"] for row in told(client.get("/api/sessions"))["sessions"]] == ["good"]
    assert client.delete("/api/sessions/bad?force=1").status_code == 204


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/sessions/missing", None, 404, "not_found"),
        ("GET", "/api/sessions/a%20b", None, 400, "invalid_id"),
        ("GET", f"/api/sessions/{'x' * 129}", None, 400, "invalid_id"),
        ("GET", "/api/sessions?limit=0", None, 400, "invalid_argument"),
        ("GET", "/api/sessions?limit=x", None, 400, "invalid_argument"),
        ("GET", "/api/sessions?limit=%C2%B2", None, 400, "invalid_argument"),
        ("GET", "/api/sessions?before=x", None, 400, "invalid_argument"),
        ("GET", "/api/sessions/missing?before=-1", None, 400, "invalid_argument"),
        ("POST", "/api/sessions", b"{", 400, "invalid_json"),
        ("POST", "/api/sessions", b'{"title": NaN}', 400, "invalid_json"),
        ("POST", "/api/sessions", b"[" * 100_000, 400, "invalid_json"),
        ("POST", "/api/sessions", b"\xff", 400, "invalid_json"),
        ("POST", "/api/sessions", b"[]", 400, "invalid_argument"),
        ("POST", "/api/sessions", b'{"id": "../x"}', 400, "invalid_id"),
        ("POST", "/api/sessions", b'{"id": 7}', 400, "invalid_id"),
        ("POST", "/api/sessions", b'{"title": 7}', 400, "invalid_argument"),
        ("PATCH", "/api/sessions/missing", b'{"title": "x"}', 404, "not_found"),
        ("PATCH", "/api/sessions/missing", b"{}", 400, "invalid_argument"),
        ("DELETE", "/api/sessions/missing", None, 404, "not_found"),
        ("DELETE", "/api/sessions/missing?force=1", None, 404, "not_found"),
        ("DELETE", "/api/sessions/missing?force=yes", None, 400, "invalid_argument"),
        ("POST", "/api/sessions/s/turns", b"{}", 400, "invalid_argument"),
        ("POST", "/api/sessions/s/turns", b'{"message": {"id": "m"}}', 400, "invalid_argument"),
        ("POST", "/api/sessions/s/turns", b'{"message": {"id": "m", "content": ""}}', 400, "invalid_argument"),
        ("POST", "/api/sessions/s/turns", b'{"message": {"content": "x"}}', 400, "invalid_id"),
        ("POST", "/api/sessions/missing/retry", None, 404, "not_found"),
        ("POST", "/api/sessions/missing/streams/x/stop", None, 404, "not_found"),
        ("POST", "/api/sessions/missing/streams/-/stop", None, 400, "invalid_id"),
        ("GET", "/api/sessions/missing/streams/x/events", None, 404, "not_found"),
        ("GET", "/api/sessions/missing/streams/x/events?after=x", None, 400, "invalid_argument"),
        ("GET", "/api/sessions/missing/streams/x/events?after=-1", None, 400, "invalid_argument"),
        ("GET", "/api/sessions/missing/streams/x/events?after=1.5", None, 400, "invalid_argument"),
        ("GET", "/api/sessions/missing/streams/x/events?after=other:1", None, 400, "invalid_argument"),
        ("GET", f"/api/sessions/missing/streams/x/events?after={'9' * 5000}", None, 400, "invalid_argument"),
        ("POST", "/api/chat", b"{}", 400, "invalid_id"),
        ("POST", "/api/chat", b'{"id": "s"}', 400, "invalid_argument"),
        ("POST", "/api/chat", b'{"id": "s", "message": {"id": "m", "parts": []}}', 400, "invalid_argument"),
        ("POST", "/api/chat", b'{"id": "s", "messages": [{"id": "m", "role": "assistant"}]}', 400, "invalid_argument"),
        ("POST", "/api/chat/missing/stop", None, 404, "not_found"),
        ("GET", "/nothing", None, 404, "not_found"),
        ("GET", "/api/sessions/", None, 404, "not_found"),
        ("PUT", "/api/sessions", b"{}", 405, "method_not_allowed"),
    ],
)
def test_a_refusal_says_why(client: Any, method: str, path: str, body: bytes | None, status: int, code: str) -> None:
    """Each refusal is JSON, with a code for programs and a message for people, and makes nothing."""
    refused(client.request(method, path, content=body), status, code)
    assert told(client.get("/api/sessions"))["sessions"] == []


def test_health_and_document_are_there(client: Any) -> None:
    assert told(client.get("/healthz")) == {"status": "ok"}
    assert told(client.get("/openapi.json"))["openapi"] == "3.1.0"
