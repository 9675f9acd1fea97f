"""Responders: what answers a prompt. A responder is one async generator of parts. Two are built in."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from persist.asgi.parts import Error, Message, Part, Reasoning, Text, ToolInput
from persist.errors import InvalidArgument, shown
from persist.log import log


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to be answered.

    Attributes:
        session_id: the session.
        stream_id: the turn. No other turn has this id.
        messages: the conversation so far, as it is stored. The last message is the prompt. They are copies.
        extra: the further fields of the request.
    """

    session_id: str
    stream_id: str
    messages: list[Message]
    extra: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """The text of the prompt."""
        return str(self.messages[-1]["content"])


#: The roles whose messages an endpoint takes without further keys.
_ROLES = ("system", "developer", "user", "assistant")
#: The reasons for which a model ends in the middle of its answer, and what the user is told.
_CUT_OFF = {
    "length": "The answer was cut off, because it reached the model's limit of length.",
    "content_filter": "The answer was cut off by the content filter of the model's server.",
}
#: An async generator function, say. It is cancelled when the turn is stopped.
Responder = Callable[[Conversation], AsyncIterator[Part]]
_OPENAI = "https://api.openai.com/v1"
#: The user is told this if the endpoint refuses. Its own words go to the log.
_REFUSALS = {
    401: "The model's server refused the key of this server.",
    403: "The model's server refused the key of this server.",
    404: "The model's server knows no such address, or no such model.",
}
_LOGGED_CHARACTERS = 500


def checked_responder(responder: Responder) -> Responder:
    """Return a responder, if it may be one. A function that returns an async iterator may.

    Raises:
        InvalidArgument: no call of it can give an async iterator.
    """
    if inspect.isclass(responder):
        is_one = hasattr(responder, "__aiter__")
    else:
        others = (inspect.iscoroutinefunction, inspect.isgeneratorfunction)
        is_one = callable(responder) and not any(
            is_other(each) for is_other in others for each in (responder, type(responder).__call__)
        )
    if is_one:
        return responder
    raise InvalidArgument(
        what="responder", expected="an async generator function: async def, with yield", got=shown(responder)
    )


@dataclass(frozen=True, slots=True)
class Echo:
    """A responder that says the prompt again, word by word.

    Args:
        delay_s: seconds before each word.
    """

    delay_s: float = 0.05

    async def __call__(self, conversation: Conversation) -> AsyncIterator[Part]:
        for word in re.findall(r"\s*\S+|\s+$", conversation.prompt):
            await asyncio.sleep(self.delay_s)
            yield Text(word)


@dataclass(frozen=True, slots=True)
class OpenAI:
    """A responder that asks an endpoint of the form of OpenAI's ``/chat/completions``.

    It sends the texts of the conversation. It tells the model's calls of tools, and runs none.

    Args:
        base_url: as ``https://api.openai.com/v1``. None takes `OPENAI_BASE_URL`, or else that address.
        api_key: None takes `OPENAI_API_KEY`. An endpoint on this machine may need none.
        model: None takes `OPENAI_MODEL`.
        silence_s: seconds without a byte after which the answer has failed.
    """

    base_url: str | None = None
    api_key: str | None = None
    model: str | None = None
    silence_s: float = 120.0

    def checked(self) -> OpenAI:
        """Return this responder, if it has a model and an address.

        Raises:
            InvalidArgument: it has none.
        """
        if not (self.model or os.environ.get("OPENAI_MODEL")):
            raise InvalidArgument(what="OPENAI_MODEL", expected="the name of a model", got="nothing")
        base_url = self.base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI
        if not base_url.lower().startswith(("http://", "https://")):
            raise InvalidArgument(
                what="OPENAI_BASE_URL", expected="an address as http://127.0.0.1:11434/v1", got=shown(base_url)
            )
        return self

    async def __call__(self, conversation: Conversation) -> AsyncIterator[Part]:
        base_url = self.base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI
        key, model = self.api_key or os.environ.get("OPENAI_API_KEY"), self.model or os.environ.get("OPENAI_MODEL")
        if not model:
            yield Error("The server has no model: set OPENAI_MODEL.")
            return
        body = {"model": model, "messages": _texts_in(conversation.messages), "stream": True}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url, timeout = f"{base_url.rstrip('/')}/chat/completions", httpx.Timeout(self.silence_s, connect=10.0)
        reading = _Reading()
        try:
            async with httpx.AsyncClient(timeout=timeout) as client:
                async with client.stream("POST", url, json=body, headers=headers) as response:
                    if response.status_code != httpx.codes.OK:
                        status, said = response.status_code, (await _beginning_of(response)).replace(key or "\0", "…")
                        log.error("The model's server %r answered with status %s: %s", response.url, status, said)
                        yield Error(_REFUSALS.get(status, f"The model's server answered with status {status}."))
                        return
                    async for line in _lines_of(response):
                        for part in reading.parts_in(line):
                            yield part
        except httpx.HTTPError as error:
            yield Error(f"The model's server cannot be reached, or broke off ({type(error).__name__}).")
            return
        for part in reading.last_parts():
            yield part


async def _lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines of a body. They end at a newline, and not at U+2028, as httpx's own do."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


async def _beginning_of(response: httpx.Response) -> str:
    """Return the first characters of a body."""
    text = ""
    async for piece in response.aiter_text():
        text += piece
        if len(text) >= _LOGGED_CHARACTERS:
            break
    return text[:_LOGGED_CHARACTERS]


def _texts_in(messages: list[Message]) -> list[Message]:
    """Return the messages that have a text, without keys that an endpoint may refuse."""
    told = (each for each in messages if each.get("role") in _ROLES and each.get("content"))
    return [{"role": each["role"], "content": each["content"]} for each in told]


class _Reading:
    """The endpoint's stream as it is read: the pieces of tool calls, and whether and why the model has ended."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[str, str]] = {}
        self._is_whole, self._reason = False, ""

    def parts_in(self, line: str) -> list[Part]:
        """Return the parts in a line."""
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:"):
            return []
        if data == "[DONE]":
            self._is_whole = True
            return []
        try:
            chunk = json.loads(data)
        except ValueError:
            return [Error("The model's server sent something that is no JSON.")]
        try:
            if chunk.get("error") or chunk.get("object") == "error":
                return [Error("The model's server reported an error.")]
            choice = chunk["choices"][0]
            delta = choice.get("delta") or {}
        except (LookupError, AttributeError, TypeError):
            # The last chunk may tell the tokens only, and have no choice.
            return []
        if choice.get("finish_reason"):
            self._is_whole, self._reason = True, str(choice["finish_reason"])
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        found: list[Part] = [Reasoning(thought)] if isinstance(thought, str) else []
        if delta.get("content"):
            found.append(Text(delta["content"]))
        for piece in delta.get("tool_calls") or ():
            call = self._calls.setdefault(piece.get("index", len(self._calls)), {"id": "", "name": "", "arguments": ""})
            function = piece.get("function") or {}
            call["id"] = call["id"] or piece.get("id") or ""
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""
        return found

    def last_parts(self) -> Iterator[Part]:
        """Yield the parts behind the last line: the calls of tools, or why the answer is not whole."""
        if not self._is_whole:
            yield Error("The model's server broke off in the middle of the answer.")
        elif self._reason in _CUT_OFF:
            yield Error(_CUT_OFF[self._reason])
        else:
            for call in self._calls.values():
                yield ToolInput(call["id"], call["name"], _decoded(call["arguments"]))


def _decoded(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


echo: Responder = Echo()
openai: Responder = OpenAI()
