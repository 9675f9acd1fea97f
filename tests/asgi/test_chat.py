"""The AI SDK's UI message stream: its exact chunks, resumed from the start, stopped, and sent twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx
from actors import eventually
from harness.chat_servers import events_in
from harness.scripted import scripted

import persist
from persist.asgi import create_app


def body_of(text: str, message_id: str = "m1", **fields: Any) -> dict[str, Any]:
    message = {"id": message_id, "role": "user", "parts": [{"type": "text", "text": text}]}
    return {"id": "c", "message": message, **fields}


def chunks_in(response: Any) -> list[Any]:
    """Return the chunks of a response, which must end with the mark of the end."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, last = [each.data for each in events_in(response.text.splitlines(keepends=True))]
    assert last == "[DONE]"
    return chunks


def test_an_answer_is_a_stream_of_chunks(client: Any) -> None:
    """The whole protocol of one answer: thoughts, text, a tool, more text."""
    chunks = chunks_in(client.post("/api/chat", json=body_of("?hm a b @look c")))
    (answer,) = [m["id"] for m in client.get("/api/sessions/c").json()["messages"] if m["role"] == "assistant"]
    assert chunks == [
        {"type": "start", "messageId": answer},
        {"type": "start-step"},
        {"type": "reasoning-start", "id": "1"},
        {"type": "reasoning-delta", "id": "1", "delta": "hm"},
        {"type": "reasoning-end", "id": "1"},
        {"type": "text-start", "id": "2"},
        {"type": "text-delta", "id": "2", "delta": "a "},
        {"type": "text-delta", "id": "2", "delta": "b "},
        {"type": "text-end", "id": "2"},
        {"type": "tool-input-available", "toolCallId": "call-3", "toolName": "look", "input": {"place": 3}},
        {"type": "tool-output-available", "toolCallId": "call-3", "output": {"found": "look"}},
        {"type": "text-start", "id": "3"},
        {"type": "text-delta", "id": "3", "delta": "c "},
        {"type": "text-end", "id": "3"},
        {"type": "finish-step"},
        {"type": "finish"},
    ]


def test_a_running_answer_is_resumed_from_its_start(client: Any, tmp_path: Path) -> None:
    """A client that comes back gets every chunk again, and then the rest. Without an answer there is no content."""
    gate = tmp_path / "gate"
    with client.stream("POST", "/api/chat", json=body_of(f"a <{gate} b")) as response:
        events = events_in(response.iter_lines())
        sent = [next(events).data for _ in range(4)]
        assert sent[-1]["delta"] == "a "
        resumed = client.stream("GET", "/api/chat/c/stream")
        with resumed as other:
            assert other.headers["x-vercel-ai-ui-message-stream"] == "v1"
            again = events_in(other.iter_lines())
            assert [next(again).data for _ in range(4)] == sent
            gate.touch()
            assert [each.data for each in again] == [each.data for each in events]
    response = client.get("/api/chat/c/stream")
    assert (response.status_code, response.content) == (204, b"")


def test_a_message_that_is_sent_twice_is_answered_once(client_of: Any, directory: Path) -> None:
    """The second response tells the same answer, also when its events have expired."""
    client = client_of(store=persist.Store(directory, keep_events_s=0))
    first = chunks_in(client.post("/api/chat", json=body_of("?hm a @look b")))
    assert chunks_in(client.post("/api/chat", json=body_of("other", "m2")))[-1] == {"type": "finish"}
    again = chunks_in(client.post("/api/chat", json=body_of("?hm a @look b")))
    assert again == first
    messages = client.get("/api/sessions/c").json()["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2


def test_a_stop_that_names_a_stream_of_before_stops_nothing(client: Any) -> None:
    """A page that has slept cannot stop a later answer. The right name, or none, stops the answer that runs."""
    chunks_in(client.post("/api/chat", json=body_of("a")))
    for place, name in enumerate((None, "right")):
        with client.stream("POST", "/api/chat", json=body_of("a ~", f"m{place + 2}")) as response:
            events = events_in(response.iter_lines())
            stream_id = next(events).data["messageId"].removesuffix(".answer")
            assert client.post("/api/chat/c/stop", json={"activeStreamId": "before"}).json() == {"stopped": False}
            assert client.get("/api/sessions/c").json()["stream"]["stream_id"] == stream_id
            named = {} if name is None else {"activeStreamId": stream_id}
            assert client.post("/api/chat/c/stop", json=named).json() == {"stopped": True}
            assert [each.data for each in events][-2:] == [{"type": "abort"}, "[DONE]"]
    assert client.post("/api/chat/c/stop").json() == {"stopped": False}


def test_a_failure_is_one_chunk(client: Any) -> None:
    """A failed answer has one error, and no finish."""
    chunks = chunks_in(client.post("/api/chat", json=body_of("a !broken")))
    assert [each["type"] for each in chunks] == ["start", "start-step", "text-start", "text-delta", "text-end", "error"]
    assert chunks[-1]["errorText"] == "broken"


def test_a_busy_chat_is_refused(client: Any) -> None:
    with client.stream("POST", "/api/chat", json=body_of("a ~")):
        response = client.post("/api/chat", json=body_of("b", "m2"))
        assert (response.status_code, response.json()["error"]["code"]) == (409, "busy")
        client.post("/api/chat/c/stop")


def test_all_messages_may_be_sent(client: Any) -> None:
    """Only the last message of a whole conversation counts, and parts that are no text are kept."""
    file = {"type": "file", "mediaType": "text/plain", "url": "data:,x"}
    last = {"id": "m9", "role": "user", "parts": [{"type": "text", "text": "a"}, file]}
    messages = [{"id": "m8", "role": "user", "parts": [{"type": "text", "text": "not kept"}]}, last]
    chunks_in(client.post("/api/chat", json={"id": "c", "messages": messages, "trigger": "submit-message"}))
    prompt, answer = client.get("/api/sessions/c").json()["messages"]
    assert (prompt["content"], prompt["parts"], answer["content"]) == ("a", last["parts"], "a ")


@pytest.mark.parametrize(
    ("kept", "last"),
    [({}, "The server that gave"), ({"stopped": True}, None), ({"error": "The model is away."}, "The model is away.")],
)
def test_a_partial_answer_without_events_says_how_it_ended(
    client: Any, store: persist.Store, kept: dict[str, Any], last: str | None
) -> None:
    """The stored answer tells whether its worker died, a user stopped it, or it failed."""
    fields = {"turn": {"prompt": "m1", "stream_id": "t"}}
    prompt = {"id": "m1", "role": "user", "content": "a"}
    with store.start_stream("c", prompt, create=True, stream_id="t", fields=fields) as stream:
        stream.checkpoint({"id": "t.answer", "role": "assistant", "content": "so far", **kept})
    chunks = chunks_in(client.post("/api/chat", json=body_of("a")))
    assert [each["delta"] for each in chunks if "delta" in each] == ["so far"]
    end = chunks[-1]
    assert end["type"] == ("abort" if last is None else "error")
    assert end.get("errorText", "").startswith(last or "")


def test_an_answer_is_regenerated(client: Any) -> None:
    """A regenerated answer takes the place of the one before. A prompt that never came is simply answered."""
    messages = [{"id": "m1", "role": "user", "parts": [{"type": "text", "text": "a"}]}]
    body = {"id": "c", "messages": messages, "trigger": "regenerate-message"}
    first = chunks_in(client.post("/api/chat", json=body))
    second = chunks_in(client.post("/api/chat", json=body))
    assert first[0]["messageId"] != second[0]["messageId"]
    assert [m["id"] for m in client.get("/api/sessions/c").json()["messages"]] == ["m1", second[0]["messageId"]]


def test_dropped_events_are_told_by_the_stored_answer(client_of: Any, directory: Path, tmp_path: Path) -> None:
    """If a long answer has outgrown its events, a resumed stream begins with the stored part, and has no gap."""
    from persist.asgi import Text

    gate, words = tmp_path / "gate", [f"word-{n:04} " for n in range(300)]

    async def talk(_conversation: Any) -> Any:
        import asyncio

        for word in words:
            yield Text(word)
        while not gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        yield Text("end")

    client = client_of(talk, store=persist.Store(directory, keep_events_bytes=4096), checkpoint_s=0.0)
    with client.stream("POST", "/api/chat", json=body_of("talk")) as response:
        next(response.iter_lines())
        eventually(lambda: client.get("/api/sessions/c").json()["messages"][-1]["content"] == "".join(words))
        with client.stream("GET", "/api/chat/c/stream") as resumed:
            gate.touch()
            chunks = [each.data for each in events_in(resumed.iter_lines())]
    deltas = [each["delta"] for each in chunks[:-1] if each["type"] == "text-delta"]
    assert len(deltas) < len(words)
    assert "".join(deltas) == "".join(words) + "end"


def test_a_head_of_a_stream_ends_at_once(directory: Path) -> None:
    """HEAD tells the headers of a running stream, and follows nothing. Fails without the case for sse-starlette 3.5."""

    async def ask() -> list[httpx.Response]:
        app = create_app(directory, scripted)
        options: dict[str, Any] = {"transport": httpx.ASGITransport(app), "base_url": "http://127.0.0.1"}
        async with app.router.lifespan_context(app), httpx.AsyncClient(**options) as client:
            body = {"message": {"id": "m1", "content": "a ~"}}
            stream_id = (await client.post("/api/sessions/c/turns", json=body)).json()["stream_id"]
            paths = ("/api/chat/c/stream", f"/api/sessions/c/streams/{stream_id}/events")
            return [await asyncio.wait_for(client.head(path), 10.0) for path in paths]

    for response in asyncio.run(ask()):
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("body", [{"content": "foreign"}, {"content": [{"type": "text", "text": "foreign"}, {}]}])
def test_a_message_that_another_program_has_answered_is_told_so(
    client: Any, store: persist.Store, body: dict[str, Any]
) -> None:
    """Its answer names no stream, and stands behind it. Fails if an answer is found only by its stream."""
    prompt = {"id": "m1", "role": "user", "content": "a"}
    store.create("c", {"messages": [prompt, {"id": "a1", "role": "assistant", **body}]})
    chunks = chunks_in(client.post("/api/chat", json=body_of("a")))
    assert chunks[0]["messageId"] == "a1"
    assert [each["delta"] for each in chunks if "delta" in each] == ["foreign"]
    assert chunks[-1] == {"type": "finish"}


def test_a_failed_retry_without_events_tells_the_answer_that_stayed(client_of: Any, directory: Path) -> None:
    """The stored answer stands for a stream that said nothing."""
    from persist.asgi import Error, Text

    calls = iter(["good"])

    async def answer(_conversation: Any) -> Any:
        text = next(calls, None)
        yield Error("away") if text is None else Text(text)

    client = client_of(answer, store=persist.Store(directory, keep_events_s=0))
    first = chunks_in(client.post("/api/chat", json=body_of("a")))
    assert chunks_in(client.post("/api/chat", json=body_of("a", trigger="regenerate-message")))[-1]["type"] == "error"
    chunks_in(client.post("/api/chat", json=body_of("b", "m2")))
    assert chunks_in(client.post("/api/chat", json=body_of("a"))) == first


@pytest.mark.parametrize("value", ["1e400", "[" * 196 + "]" * 196], ids=["infinite", "deep"])
def test_a_message_that_cannot_be_kept_makes_no_chat(client: Any, store: persist.Store, value: str) -> None:
    """It is refused before its session is made. Fails if only the store checks it."""
    parts = '[{"type": "text", "text": "a"}, {"type": "data", "data": ' + value + "}]"
    content = '{"id": "c", "message": {"id": "m1", "parts": ' + parts + "}}"
    response = client.post("/api/chat", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_argument")
    assert store.ids() == []
