"""Requests that meet: turns and retries at two workers, and stops and deletes in the instant in which a turn ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx
from actors import eventually
from harness.chat_servers import DEADLINE_S, ChatServer, events_in

import persist


def at_once(requests: list[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    """Send requests at the same time, and return their responses in the same order."""
    barrier = threading.Barrier(len(requests))

    def send(request: Callable[[], httpx.Response]) -> httpx.Response:
        barrier.wait()
        return request()

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def ended(client: httpx.Client, session_id: str, stream_id: str) -> str:
    """Follow a stream, and return how it has ended."""
    with client.stream("GET", f"/api/sessions/{session_id}/streams/{stream_id}/events") as response:
        *_, last = events_in(response.iter_lines())
    return str(last.data.get("how", last.event))


def test_workers_that_start_turns_at_once_start_one(serve: Callable[..., ChatServer], store: persist.Store) -> None:
    """The same message at two workers is one turn. Of two messages one is refused, and leaves nothing behind.

    Fails without `if_version` and `once` in `Turns.start`, because the second request would then be refused as busy.
    """
    servers = [serve(), serve()]
    with (
        httpx.Client(base_url=servers[0].url, timeout=DEADLINE_S) as a,
        httpx.Client(base_url=servers[1].url, timeout=DEADLINE_S) as b,
    ):

        def turn(client: httpx.Client, session_id: str, message_id: str, text: str) -> Callable[[], httpx.Response]:
            body = {"message": {"id": message_id, "content": text}}
            return partial(client.post, f"/api/sessions/{session_id}/turns", json=body)

        for n in range(15):
            same, other = f"same-{n}", f"other-{n}"
            text = "a" if n % 2 else "a !"
            answers = at_once([turn(client, same, "m", text) for client in (a, b, a, b)])
            assert sorted(each.status_code for each in answers) == [200, 200, 200, 201]
            (stream_id,) = {each.json()["stream_id"] for each in answers}
            ended(a, same, stream_id)
            answers = at_once([turn(a, other, "m-a", "a ~"), turn(b, other, "m-b", "b ~")])
            assert sorted(each.status_code for each in answers) == [201, 409]
            won, lost = sorted(answers, key=lambda each: each.status_code)
            assert lost.json()["owner"]["stream_id"] == won.json()["stream_id"]
            assert a.post(f"/api/sessions/{other}/retry").json()["error"]["code"] == "busy"
            stop = f"/api/sessions/{other}/streams/{won.json()['stream_id']}/stop"
            stops = at_once([partial(client.post, stop) for client in (a, b)])
            assert {each.status_code for each in stops} == {200}
            assert ended(b, other, won.json()["stream_id"]) == "stopped"
            retries = at_once([partial(client.post, f"/api/sessions/{other}/retry") for client in (a, b)])
            assert sorted(each.status_code for each in retries) == [201, 409]
            a.delete(f"/api/sessions/{other}?force=1")
    for n in range(15):
        messages = store.load(f"same-{n}").data["messages"]
        assert [each["role"] for each in messages] == ["user", "assistant"]


def test_a_stop_in_the_instant_of_the_end_breaks_nothing(client: Any) -> None:
    """The turn ends once, as it says. A whole answer is stored whole, and the session takes the next turn."""
    ways: Counter[str] = Counter()
    for n in range(40):
        body = {"message": {"id": f"m{n}", "content": f"a b ~{n % 8 / 100} c"}}
        stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
        path = f"/api/sessions/s/streams/{stream_id}/stop"
        answers = at_once([partial(client.post, path)] * 2)
        assert {each.status_code for each in answers} == {200}
        how = ended(client, "s", stream_id)
        ways[how] += 1
        messages = client.get("/api/sessions/s").json()["messages"]
        if how == "finished":
            assert (messages[-1]["content"], "partial" in messages[-1]) == ("a b c ", False)
        else:
            assert how == "stopped"
            assert messages[-1].get("partial") or messages[-1]["role"] == "user"
            assert "a b c ".startswith(messages[-1]["content"]) or messages[-1]["role"] == "user"
    roles = [each["role"] for each in client.get("/api/sessions/s?limit=1000").json()["messages"]]
    assert roles.count("user") == 40
    assert "assistant assistant" not in " ".join(roles)


def test_a_forced_delete_in_the_instant_of_the_end_breaks_nothing(client: Any, store: persist.Store) -> None:
    """The session is gone, whatever its turn was doing, and a new one of that id is not the old turn's."""
    for n in range(20):
        body = {"message": {"id": "m", "content": f"a ~{n % 5 / 100} b"}}
        started = client.post("/api/sessions/s/turns", json=body)
        assert started.status_code == 201
        answers = at_once(
            [
                lambda: client.delete("/api/sessions/s?force=1"),
                lambda: client.get("/api/sessions/s"),
                lambda: client.post("/api/sessions/s/retry"),
                lambda: client.get("/api/sessions"),
            ]
        )
        assert answers[0].status_code == 204
        assert answers[1].status_code in (200, 404)
        assert answers[2].status_code in (201, 404, 409)
        assert answers[3].status_code == 200
        # A retry that came first was stopped with the session.
        eventually(lambda: client.delete("/api/sessions/s?force=1").status_code == 404)
        assert client.post("/api/sessions", json={"id": "s", "title": "new"}).status_code == 201
        assert ended(client, "s", started.json()["stream_id"]) in ("stopped", "lost", "finished", "expired")
        assert store.load("s").data == {"title": "new", "messages": []}
        assert client.delete("/api/sessions/s").status_code == 204
