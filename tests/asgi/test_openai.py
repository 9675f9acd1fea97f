"""The responder `openai`: what it asks an endpoint, and how it tells the endpoint's answer and its failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

from harness.chat_servers import client_of_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from persist.asgi import Conversation, Error, OpenAI, Part, Reasoning, Text, ToolInput

PROMPT = {"id": "m1", "role": "user", "content": "Why?"}
Endpoint = Callable[..., str]


@pytest.fixture
def asked() -> list[tuple[Any, Any]]:
    """The requests that the endpoint got: the header of the key, and the body."""
    return []


@pytest.fixture
def endpoint(asked: list[tuple[Any, Any]]) -> Iterator[Endpoint]:
    """Provide a function that serves an endpoint, which answers with these lines, and returns its address."""
    with ExitStack() as open_clients:

        def make(*lines: object, status: int = 200, breaks_off: bool = False) -> str:
            async def said() -> AsyncIterator[str]:
                for line in lines:
                    yield f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n"
                if breaks_off:
                    raise ConnectionResetError

            async def answer(request: Request) -> Response:
                asked.append((request.headers.get("authorization"), await request.json()))
                return StreamingResponse(said(), status, media_type="text/event-stream")

            app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
            return str(open_clients.enter_context(client_of_app(app)).base_url) + "/v1"

        yield make


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def parts_of(responder: OpenAI, *messages: dict[str, Any]) -> list[Part]:
    async def collect() -> list[Part]:
        return [part async for part in responder(Conversation("s", "t", list(messages or (PROMPT,)), {}))]

    return asyncio.run(collect())


def test_an_answer_is_told_as_it_comes(endpoint: Endpoint) -> None:
    """Thoughts and texts are parts of their own. A chunk without a choice is none."""
    usage, role = {"choices": [], "usage": {"total_tokens": 3}}, delta(role="assistant", content="")
    url = endpoint(role, delta(reasoning_content="Hm."), delta(content="Be"), delta(content="cause."), usage, "[DONE]")
    assert parts_of(OpenAI(url, model="m")) == [Reasoning("Hm."), Text("Be"), Text("cause.")]


def test_only_a_newline_ends_a_line(endpoint: Endpoint) -> None:
    """Some servers escape nothing. It fails if a line ends where Python's `splitlines` would end it."""
    said = "a\u2028b\u2029c\x85d\x0be"
    url = endpoint(json.dumps(delta(content=said), ensure_ascii=False), "[DONE]")
    assert parts_of(OpenAI(url, model="m")) == [Text(said)]


@pytest.mark.parametrize(
    ("line", "error"),
    [("x", "no JSON"), ({"object": "error", "message": "out of memory"}, "reported an error")],
    ids=["no-json", "error"],
)
def test_an_answer_with_a_line_that_is_no_part_has_failed(endpoint: Endpoint, line: object, error: str) -> None:
    """It fails if a line that cannot be read is passed over."""
    said, part, *_ = parts_of(OpenAI(endpoint(delta(content="Be"), line, "[DONE]"), model="m"))
    assert said == Text("Be")
    assert isinstance(part, Error)
    assert error in part.text


def test_the_pieces_of_tool_calls_are_joined(endpoint: Endpoint) -> None:
    """Two calls that come in pieces are two parts. Arguments that are no JSON are told as they are."""
    pieces = [
        {"index": 0, "id": "c0", "function": {"name": "look", "arguments": ""}},
        {"index": 1, "id": "c1", "function": {"name": "guess", "arguments": "{"}},
        {"index": 0, "function": {"arguments": '{"at": '}},
        {"index": 0, "function": {"arguments": "7}"}},
    ]
    url = endpoint(*(delta(tool_calls=[piece]) for piece in pieces), "[DONE]")
    assert parts_of(OpenAI(url, model="m")) == [ToolInput("c0", "look", {"at": 7}), ToolInput("c1", "guess", "{")]


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, None),
        ("[DONE]", None),
        (None, "broke off"),
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}, "limit of length"),
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": "content_filter"}]}, "content filter"),
    ],
    ids=["stop", "done", "end-of-file", "length", "content-filter"],
)
def test_an_answer_that_is_cut_off_is_not_whole(endpoint: Endpoint, last: object, error: str | None) -> None:
    """Only a model that says that it has ended has ended. Half a call of a tool is not told."""
    call = {"index": 0, "id": "c0", "function": {"name": "look", "arguments": '{"at": 7}'}}
    lines = [delta(content="Be"), delta(tool_calls=[call]), *([] if last is None else [last])]
    said, *rest = parts_of(OpenAI(endpoint(*lines), model="m"))
    assert said == Text("Be")
    (part,) = rest
    if error is None:
        assert part == ToolInput("c0", "look", {"at": 7})
    else:
        assert isinstance(part, Error)
        assert error in part.text


def test_the_environment_names_the_endpoint(
    endpoint: Endpoint, asked: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Address, key and model come from the environment, unless they are given."""
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint(delta(content="a"), "[DONE]") + "/")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_MODEL", "small")
    for responder in (OpenAI(), OpenAI(api_key="mine", model="large")):
        assert parts_of(responder) == [Text("a")]
    body = {"messages": [{"role": "user", "content": "Why?"}], "stream": True}
    assert asked == [("Bearer secret", {"model": "small", **body}), ("Bearer mine", {"model": "large", **body})]


def test_only_texts_are_sent(endpoint: Endpoint, asked: list[tuple[Any, Any]]) -> None:
    """Messages of other programs, and answers without a text, do not spoil the conversation for good."""
    odd: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "x"},
        {"role": "assistant", "tool_calls": []},
    ]
    parts_of(OpenAI(endpoint("[DONE]"), model="m"), {"role": "system", "content": "Be brief."}, *odd, PROMPT)
    ((_, body),) = asked
    assert [(each["role"], each["content"]) for each in body["messages"]] == [("system", "Be brief."), ("user", "Why?")]


def test_a_failure_is_told_without_a_secret(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal, an endpoint that is not there, one that breaks off and one that reports an error end the answer."""
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    (missing,) = parts_of(OpenAI("http://127.0.0.1:9/v1"))
    (refused,) = parts_of(OpenAI(endpoint(status=500), "secret", "m"))
    (away,) = parts_of(OpenAI("http://127.0.0.1:9/v1", "secret", "m"))
    said, broken = parts_of(OpenAI(endpoint(delta(content="a"), breaks_off=True), "secret", "m"))
    reported, *_ = parts_of(OpenAI(endpoint({"error": {"message": "secret"}}), "secret", "m"))
    assert said == Text("a")
    for part, word in {
        missing: "OPENAI_MODEL",
        refused: "500",
        away: "reached",
        broken: "broke off",
        reported: "error",
    }.items():
        assert isinstance(part, Error)
        assert word in part.text
        assert "secret" not in part.text


@pytest.mark.parametrize(("status", "word"), [(401, "key"), (403, "key"), (404, "no such model")])
def test_a_refusal_is_told_in_words(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, status: int, word: str
) -> None:
    """The user learns what kind of mistake it is. The log has the address and the endpoint's words, without the key."""
    url = endpoint("your key secret is wrong", "x" * 1000, status=status)
    (part,) = parts_of(OpenAI(url, "secret", "m"))
    assert isinstance(part, Error)
    assert word in part.text
    (record,) = [each for each in caplog.records if each.name == "persist"]
    for told in (f"{url}/chat/completions", str(status), "your key … is wrong"):
        assert told in record.message
    assert "secret" not in record.message
    assert 400 < len(record.message) < 700
