"""The published rules of providers for tool calls in a conversation, as validators, and conversations in their shapes.

Each validator is written from the provider's documentation and from its errors, apart from `persist.tool_calls`. It
looks at a conversation as the provider gets it. Keys that are not the provider's (an id, a mark) are not its concern.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

Message = dict[str, Any]


class Refused(Exception):
    """The provider would refuse the conversation."""


def _require(is_so: bool, reason: str) -> None:
    if not is_so:
        raise Refused(reason)


def _require_object(text: Any) -> None:
    try:
        _require(type(json.loads(text)) is dict, "arguments are no object")
    except (ValueError, TypeError):
        raise Refused("arguments are no JSON") from None


def chat(messages: list[Message]) -> None:
    """OpenAI chat completions: the tool messages of all calls follow an assistant message, and nothing else does.

    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'."
    """
    open_ids: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            _require(message["tool_call_id"] in open_ids, "a tool message answers no call")
            open_ids.remove(message["tool_call_id"])
            continue
        _require(not open_ids, "a call has no tool message")
        for call in message.get("tool_calls") or []:
            _require(bool(call.get("id")), "a call has no id")
            _require_object(call["function"]["arguments"])
            open_ids.add(call["id"])
    _require(not open_ids, "a call has no tool message at the end")


def responses(items: list[Message]) -> None:
    """OpenAI responses: each call has an output behind it, and each output a call before it.

    "No tool output found for function call", "No tool call found for function call output".
    """
    calls: list[str] = []
    outputs: list[str] = []
    for item in items:
        kind = item.get("type", "")
        if kind.endswith("_call"):
            _require(bool(item.get("call_id")), "a call has no id")
            if kind == "function_call":
                _require_object(item["arguments"])
            calls.append(item["call_id"])
        elif kind.endswith("_call_output"):
            _require(item["call_id"] in calls, "an output has no call")
            outputs.append(item["call_id"])
    _require(sorted(calls) == sorted(outputs), "a call has no output")


def anthropic(messages: list[Message]) -> None:
    """Anthropic: the user's next turn begins with a result for each call, and holds no other result.

    Neighbouring messages of one role are one turn. "Each tool_use block must have a corresponding tool_result block in
    the next message." "Messages following tool_use blocks must begin with a matching number of tool_result blocks."
    """
    asked: list[str] = []
    for role, group in groupby(messages, key=lambda message: message["role"]):
        blocks = [block for message in group for block in _blocks(message["content"])]
        if role == "user":
            results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
            _require(sorted(results) == sorted(asked), "the results are not those of the calls")
            first = [block["type"] for block in blocks[: len(results)]]
            _require(set(first) <= {"tool_result"}, "a result stands behind something else")
            asked = []
        else:
            _require(not asked, "a call has no result")
            calls = [block for block in blocks if block["type"] == "tool_use"]
            _require(all(call.get("id") for call in calls), "a call has no id")
            _require(all(type(call.get("input")) is dict for call in calls), "an input is no object")
            asked = [call["id"] for call in calls]
    _require(not asked, "a call has no result at the end")


def _blocks(content: Any) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def pydantic(messages: list[Message]) -> None:
    """pydantic-ai: the requests behind a response return all its calls, before any prompt of the user."""
    asked: list[str] = []
    for kind, group in groupby(messages, key=lambda message: message["kind"]):
        parts = [part for message in group for part in message["parts"]]
        if kind == "request":
            is_return = [part["part_kind"] in ("tool-return", "retry-prompt") and "tool_name" in part for part in parts]
            returned = [part["tool_call_id"] for part, is_one in zip(parts, is_return, strict=True) if is_one]
            _require(sorted(returned) == sorted(asked), "the returns are not those of the calls")
            _require(is_return == sorted(is_return, reverse=True), "a return stands behind a prompt")
            asked = []
        else:
            _require(not asked, "a call has no return")
            calls = [part for part in parts if part["part_kind"] == "tool-call"]
            for call in calls:
                _require(bool(call.get("tool_call_id")), "a call has no id")
                if isinstance(call["args"], str):
                    _require_object(call["args"])
            asked = [call["tool_call_id"] for call in calls]
    _require(not asked, "a call has no return at the end")


# --- sound conversations ---------------------------------------------------------------------------------------------


def chat_turn(number: int, calls: int) -> list[Message]:
    """Return a turn with parallel calls: the prompt, the calls, a result for each, and the answer."""
    ids = [f"call_{number}_{each}" for each in range(calls)]
    asked = [{"id": each, "type": "function", "function": {"name": "f", "arguments": '{"path": "a"}'}} for each in ids]
    return [
        {"id": f"p{number}", "role": "user", "content": "Look."},
        {"id": f"c{number}", "role": "assistant", "content": None, "tool_calls": asked},
        *({"role": "tool", "tool_call_id": each, "content": "found"} for each in ids),
        {"role": "assistant", "content": "Here it is."},
    ]


def responses_turn(number: int, calls: int) -> list[Message]:
    """Return the same turn as items of the Responses API. The last call is a custom one."""
    ids = [f"call_{number}_{each}" for each in range(calls)]
    kinds = ["function_call"] * (calls - 1) + ["custom_tool_call"]
    asked = [
        {
            "type": kind,
            "call_id": each,
            "name": "f",
            **({"arguments": "{}"} if kind == "function_call" else {"input": "x"}),
        }
        for kind, each in zip(kinds, ids, strict=True)
    ]
    told = [
        {"type": f"{kind}_output", "call_id": each, "output": "found"} for kind, each in zip(kinds, ids, strict=True)
    ]
    return [
        {"type": "message", "role": "user", "content": "Look."},
        {"type": "reasoning", "id": f"rs_{number}", "summary": []},
        *asked,
        *told,
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Here it is."}]},
    ]


def anthropic_turn(number: int, calls: int) -> list[Message]:
    """Return the same turn with the calls among other parts of the content."""
    ids = [f"toolu_{number}_{each}" for each in range(calls)]
    return [
        {"id": f"p{number}", "role": "user", "content": "Look."},
        {
            "id": f"c{number}",
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I shall look."},
                *({"type": "tool_use", "id": each, "name": "f", "input": {"path": "a"}} for each in ids),
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": each, "content": "found"} for each in ids]},
        {"role": "assistant", "content": [{"type": "text", "text": "Here it is."}]},
    ]


def pydantic_turn(number: int, calls: int) -> list[Message]:
    """Return the same turn as pydantic-ai's messages."""
    ids = [f"pyd_{number}_{each}" for each in range(calls)]
    return [
        {"kind": "request", "parts": [{"part_kind": "user-prompt", "content": "Look."}]},
        {
            "kind": "response",
            "parts": [
                {"part_kind": "text", "content": "I shall look."},
                *({"part_kind": "tool-call", "tool_name": "f", "args": "{}", "tool_call_id": each} for each in ids),
            ],
        },
        {
            "kind": "request",
            "parts": [
                {"part_kind": "tool-return", "tool_name": "f", "content": "found", "tool_call_id": each} for each in ids
            ],
        },
        {"kind": "response", "parts": [{"part_kind": "text", "content": "Here it is."}]},
    ]


Turn = Callable[[int, int], list[Message]]
Validator = Callable[[list[Message]], None]

#: Shape -> a turn of it, its validator, and a prompt of the user.
SHAPES: dict[str, tuple[Turn, Validator, Message]] = {
    "chat": (chat_turn, chat, {"role": "user", "content": "Go on."}),
    "responses": (responses_turn, responses, {"type": "message", "role": "user", "content": "Go on."}),
    "anthropic": (anthropic_turn, anthropic, {"role": "user", "content": "Go on."}),
    "pydantic": (
        pydantic_turn,
        pydantic,
        {"kind": "request", "parts": [{"part_kind": "user-prompt", "content": "Go on."}]},
    ),
}
