"""The guards of the routes: who may see a session, which pages may write, and how large a body may be."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx

import persist
from persist.asgi import create_app, echo

#: Each request that names a session.
REQUESTS = [
    ("POST", "/api/sessions", {"id": "{id}"}),
    ("GET", "/api/sessions/{id}", None),
    ("PATCH", "/api/sessions/{id}", {"title": "x"}),
    ("DELETE", "/api/sessions/{id}", None),
    ("DELETE", "/api/sessions/{id}?force=1", None),
    ("POST", "/api/sessions/{id}/turns", {"message": {"id": "m", "content": "x"}}),
    ("POST", "/api/sessions/{id}/retry", None),
    ("POST", "/api/sessions/{id}/streams/t/stop", None),
    ("GET", "/api/sessions/{id}/streams/t/events", None),
    ("POST", "/api/chat", {"id": "{id}", "message": {"id": "m", "content": "x"}}),
    ("GET", "/api/chat/{id}/stream", None),
    ("POST", "/api/chat/{id}/stop", None),
]


def asked(client: Any, session_id: str, method: str, path: str, body: Any) -> tuple[int, str]:
    body = {**body, "id": session_id} if body and "id" in body else body
    response = client.request(method, path.replace("{id}", session_id), json=body)
    return response.status_code, response.text


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_foreign_session_answers_like_an_unknown_one(
    client_of: Any, store: persist.Store, method: str, path: str, body: Any, is_awaited: bool
) -> None:
    """Nobody can tell a session that is refused from one that does not exist, and nothing is made or changed."""
    store.create("foreign", {"messages": [{"id": "m", "role": "user", "content": "secret"}]})
    version = store.load("foreign").version

    def judge(_request: Any, session_id: str) -> bool:
        return session_id == "mine"

    async def judge_later(request: Any, session_id: str) -> bool:
        await asyncio.sleep(0)
        return judge(request, session_id)

    client = client_of(authorize=judge_later if is_awaited else judge)
    found = {session_id: asked(client, session_id, method, path, body) for session_id in ("foreign", "unknown")}
    assert found["foreign"] == found["unknown"]
    # A chat of the AI SDK that is new has no stream, and that is no error.
    assert found["foreign"][0] == (204 if path.endswith("/stream") else 404)
    assert store.ids() == ["foreign"]
    assert store.load("foreign").version == version


def test_a_list_shows_only_own_sessions(client_of: Any, store: persist.Store) -> None:
    """Pages are filled although foreign sessions stand between, and the request's headers tell the user."""
    for place in range(40):
        store.create(f"{'ann' if place % 10 == 0 else 'bob'}-{place}")
    client = client_of(authorize=lambda request, session_id: session_id.startswith(request.headers["x-user"]))
    first = client.get("/api/sessions?limit=3", headers={"X-User": "ann"}).json()
    rest = client.get(f"/api/sessions?before={first['cursor']}", headers={"X-User": "ann"}).json()
    assert [len(page["sessions"]) for page in (first, rest)] == [3, 1]
    assert {row["id"] for page in (first, rest) for row in page["sessions"]} == {"ann-0", "ann-10", "ann-20", "ann-30"}


def test_a_list_of_foreign_sessions_ends_its_request(client_of: Any, store: persist.Store) -> None:
    """A request looks at 20 pages of the store at most. Fails without a bound on pages, which may be of one session."""
    for place in range(25):
        store.create(f"bob-{place}")
    asked_for: list[str] = []

    def judge(_request: Any, session_id: str) -> bool:
        asked_for.append(session_id)
        return False

    client = client_of(authorize=judge)
    first = client.get("/api/sessions?limit=1").json()
    assert (first["sessions"], first["cursor"] is None, len(asked_for)) == ([], False, 20)
    rest = client.get(f"/api/sessions?limit=1&before={first['cursor']}").json()
    assert (rest["sessions"], rest["cursor"], sorted(asked_for)) == ([], None, sorted(store.ids()))


def _user_of(request: Any) -> str:
    return f"{request.headers['x-user']}:"


def test_each_user_has_the_sessions_of_a_prefix(client_of: Any, store: persist.Store) -> None:
    """A list names an id that its user may take, another one each time, and so does a session without an id.

    It fails if new ids lack the prefix, or if a list or a route shows a session of another one.
    """
    client = client_of(prefix=_user_of)
    for user, other in (("ann", "bob"), ("bob", "ann")):
        client.headers["X-User"] = user
        listed = [client.get("/api/sessions").json()["new_id"] for _ in range(2)]
        assert client.post("/api/sessions", json={"id": listed[0]}).status_code == 201
        assert client.post("/api/sessions").status_code == 201
        prompt = {"message": {"id": "m", "content": "x"}}
        assert client.post(f"/api/sessions/{listed[1]}/turns", json=prompt).status_code == 201
        rows = client.get("/api/sessions").json()["sessions"]
        assert {row["id"] for row in rows} == set(store.ids(prefix=f"{user}:"))
        for foreign in store.ids(prefix=f"{other}:") or [f"{other}:new"]:
            assert client.get(f"/api/sessions/{foreign}").status_code == 404
            assert client.post(f"/api/sessions/{foreign}/turns", json=prompt).status_code == 404
        assert client.post("/api/sessions", json={"id": f"{other}:new"}).status_code == 404
    assert [each[:4] for each in store.ids()] == ["ann:"] * 3 + ["bob:"] * 3


def test_the_cursor_of_a_list_names_no_session_of_another_prefix(client_of: Any, store: persist.Store) -> None:
    """It fails if the list goes through all sessions, and only leaves the foreign ones out."""
    for n in range(5):
        store.create(f"ann:{n}")
        store.create(f"bob:{n}")
    before: str | None = ""
    client, found = client_of(prefix=_user_of), list[str]()
    client.headers["X-User"] = "ann"
    while before is not None:
        page = client.get("/api/sessions", params={"limit": 1, **({"before": before} if before else {})}).json()
        assert "bob" not in str(page)
        found += [row["id"] for row in page["sessions"]]
        before = page["cursor"]
    assert sorted(found) == [f"ann:{n}" for n in range(5)]


def test_within_a_prefix_sessions_are_admitted_one_by_one(client_of: Any, store: persist.Store) -> None:
    store.create("ann:1")
    store.create("ann:secret")
    store.create("bob:1")
    client = client_of(prefix=_user_of, authorize=lambda _request, session_id: not session_id.endswith("secret"))
    client.headers["X-User"] = "ann"
    assert [row["id"] for row in client.get("/api/sessions").json()["sessions"]] == ["ann:1"]
    statuses = [client.get(f"/api/sessions/{each}").status_code for each in ("ann:1", "ann:secret", "bob:1")]
    assert statuses == [200, 404, 404]


def test_without_names_of_its_own_a_new_session_gets_a_uuid(client: Any) -> None:
    found = {client.get("/api/sessions").json()["new_id"] for _ in range(3)}
    assert len({uuid.UUID(hex=each) for each in found}) == 3


@pytest.mark.parametrize("prefix", ["ann@example.org/", "x" * 97, None, 3])
def test_a_malformed_prefix_is_a_fault_of_the_server(
    client_of: Any, caplog: pytest.LogCaptureFixture, prefix: Any
) -> None:
    """Nothing is created, and the log names the function and what it returned."""
    client = client_of(prefix=lambda _request: prefix)
    for response in (client.get("/api/sessions"), client.post("/api/sessions")):
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert [("`prefix`" in each.message, str(prefix)[:20] in each.message) for each in caplog.records] == [
        (True, True)
    ] * 2


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 201),
        ("http://{host}", 201),
        ("https://{host}", 201),
        ("https://chat.example.org", 201),
        ("https://CHAT.example.org", 201),
        ("https://evil.example.org", 403),
        ("https://chat.example.org.evil.org", 403),
        ("http://chat.example.org", 403),
        ("null", 403),
        ("http://[", 403),
        ("", 403),
    ],
)
def test_a_page_of_another_origin_cannot_write(client_of: Any, origin: str | None, status: int) -> None:
    """A write needs an origin of the server's own, or one that is allowed. A look needs none."""
    client = client_of(allowed_origins=["https://chat.example.org/"])
    headers = {} if origin is None else {"Origin": origin.format(host=client.base_url.netloc.decode())}
    response = client.post("/api/sessions", headers=headers)
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "foreign_origin"
        assert client.delete("/api/sessions/x", headers=headers).status_code == 403
    assert len(client.get("/api/sessions", headers=headers).json()["sessions"]) == (status == 201)


def test_another_name_of_the_machine_is_refused(client_of: Any) -> None:
    """A name that an attacker points at this machine reaches nothing, if the names of the server are told."""
    client = client_of(allowed_hosts=["localhost", "127.0.0.1", "::1"])
    for host, status in {
        "evil.org": 421,
        "evil.org:80": 421,
        "LOCALHOST:80": 200,
        "[::1]:80": 200,
        "": 421,
        "[": 421,
    }.items():
        assert client.get("/api/sessions", headers={"Host": host}).status_code == status, host


def test_a_refused_name_is_logged_once(client_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the address and the option that admits it. Names that clients make up do not fill the log."""
    client = client_of(allowed_hosts=["127.0.0.1"])
    for _ in range(2):
        assert client.get("/healthz", headers={"Host": "chat.example.org"}).status_code == 421
        assert client.post("/api/sessions", headers={"Origin": "https://page.example.org"}).status_code == 403
    first, second = (each.message for each in caplog.records)
    for message, words in (
        (first, ("'https://chat.example.org'", "allowed_hosts")),
        (second, ("'https://page.example.org'", "allowed_origins")),
    ):
        assert "--origin" in message
        assert all(word in message for word in words)
    for place in range(100):
        client.get("/healthz", headers={"Host": f"{place}.example.org"})
    assert len(caplog.records) == 20


def test_a_body_is_bounded(client_of: Any) -> None:
    """A body above the bound is refused, with its length and in chunks without one. One at the bound is read."""
    client = client_of(max_body_bytes=1000)

    def chunks(count: int) -> Iterator[bytes]:
        yield b'{"title": "'
        for _ in range(count):
            yield b"x" * 50
        yield b'"}'

    assert client.post("/api/sessions", content=chunks(3)).status_code == 201
    for body in (chunks(20), b'{"title": "%s"}' % (b"x" * 1000)):
        response = client.post("/api/sessions", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    exact = b'{"id": "%s"}'
    assert client.post("/api/sessions", content=(exact % b"exact").ljust(1000)).status_code == 201
    assert client.post("/api/sessions", content=(exact % b"more").ljust(1001)).status_code == 413


def test_a_client_that_leaves_in_its_body_is_no_failure(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that ends in the middle of a body makes nothing and logs no error."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
        leaving.sendall(b'POST /api/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"title"')
    assert client.get("/api/sessions").json()["sessions"] == []
    assert caplog.records == []


@pytest.mark.parametrize("path", ["/api/sessions", "/nothing", "/api/sessions/a%20b", "/healthz"])
def test_each_answer_has_the_headers_of_safety(client: Any, path: str) -> None:
    response = client.get(path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-store"


def test_a_fault_of_the_server_tells_nothing(client_of: Any) -> None:
    """An exception in the hook is status 500, in the shape of all refusals, without its text."""

    def judge(_request: Any, _session_id: str) -> bool:
        raise RuntimeError("a secret")

    response = client_of(authorize=judge).get("/api/sessions/s")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "secret" not in response.text


def test_a_wrong_store_is_refused() -> None:
    with pytest.raises(persist.InvalidArgument, match="store"):
        create_app(7, lambda _: None)  # type: ignore[arg-type,return-value]


def test_the_app_may_be_mounted(directory: Any) -> None:
    """Below a prefix all routes work, the errors keep their shape, and the lifespan is the outer app's to run."""
    fastapi = pytest.importorskip("fastapi")
    from harness.chat_servers import client_of_app
    from harness.scripted import scripted

    chat = create_app(directory, scripted)
    outer = fastapi.FastAPI(lifespan=chat.router.lifespan_context)
    outer.mount("/chat", chat)
    with client_of_app(outer) as client:
        assert client.get("/chat/healthz").json() == {"status": "ok"}
        assert client.get("/chat/api/sessions/missing").json()["error"]["code"] == "not_found"
        assert client.get("/chat/openapi.json").json()["servers"] == [{"url": "."}]
        started = client.post("/chat/api/sessions/s/turns", json={"message": {"id": "m", "content": "a ~"}})
        assert started.status_code == 201
    # The lifespan has ended the turn.
    session = persist.Store(directory).load("s")
    assert session.active_stream_id is None
    assert session.data["messages"][-1]["error"] == "The server was stopped in the middle of this answer."
    assert httpx.__version__


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_origins": ["chat.example.org"]},
        {"allowed_origins": ["https://chat.example.org/chat"]},
        {"allowed_origins": "*"},
        {"heartbeat_s": 0},
        {"sweep_s": -1.0},
        {"max_body_bytes": 0},
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    """Nothing is made then, and no page waits for an answer that an origin can never get."""
    with pytest.raises(persist.InvalidArgument):
        create_app(tmp_path / "s", echo, **options)
    assert not (tmp_path / "s").exists()
