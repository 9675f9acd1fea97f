"""Tool calls without a result, and results without a call, in the shapes that providers give to a conversation.

A turn that breaks off between a tool call and its result leaves a conversation that its provider refuses for ever
(HAZARDS F7). Four shapes are known, in which a call and its result stand like this:

    shape         the call                                        its result
    chat          "tool_calls": [{"id": …}] of a message          {"role": "tool", "tool_call_id": …}
    responses     {"type": "function_call", "call_id": …}         {"type": "function_call_output", "call_id": …}
    anthropic     {"type": "tool_use", "id": …} in the content    {"type": "tool_result", "tool_use_id": …}
    pydantic      {"part_kind": "tool-call", "tool_call_id": …}   {"part_kind": "tool-return" | "retry-prompt", …}

Where a result must stand (the providers' published rules):

    chat          right behind the message of its call, before any message that is no result
    responses     anywhere behind its call
    anthropic     in the next turn of the user, to which neighbouring user messages belong together
    pydantic      in the next request, to which neighbouring requests belong together

All functions are pure, but `repair`, which changes the list that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from persist.turn import INTERRUPTED

Shape = Literal["chat", "responses", "anthropic", "pydantic"]
Message = dict[str, Any]

#: The content of a synthetic result.
NOT_ANSWERED = "This tool call was interrupted, and it has no result."
#: It is added where the arguments of a call broke off, too. They follow.
BROKEN_ARGUMENTS = " Its arguments broke off: "

#: Items of the Responses API that the client must answer -> the items that do so.
_RESPONSES = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
    "computer_call": "computer_call_output",
    "local_shell_call": "local_shell_call_output",
    "shell_call": "shell_call_output",
    "apply_patch_call": "apply_patch_call_output",
}
_OUTPUTS = frozenset(_RESPONSES.values())
_RETURNS = ("tool-return", "retry-prompt")


@dataclass(frozen=True, slots=True)
class ToolCallFault:
    """A tool call without a result, or a result without a call.

    Attributes:
        kind: ``"unanswered"`` for a call whose result is missing where the provider wants it. ``"orphaned"`` for a
            result that no call has asked for, or that stands where the provider does not take it.
        call_id: the id of the call, as its provider gave it. Empty if the call broke off before it had one.
        place: the index of the message.
    """

    kind: Literal["unanswered", "orphaned"]
    call_id: str
    place: int


#: Shape -> the key of a call's id, and the key of its arguments.
_KEYS: dict[Shape, tuple[str, str]] = {
    "chat": ("id", "arguments"),
    "responses": ("call_id", "arguments"),
    "anthropic": ("id", "input"),
    "pydantic": ("tool_call_id", "args"),
}


@dataclass(frozen=True, slots=True)
class _Call:
    """A call in a message. `part` is the dict of the call itself."""

    shape: Shape
    part: Message

    @property
    def call_id(self) -> str:
        """The id of the call. It is empty if the call broke off before it had one."""
        return _text(self.part.get(_KEYS[self.shape][0]))


def may_have_calls(encoded: bytes) -> bool:
    """Tell whether an encoded message may hold a call or a result. Most have neither, and need not be decoded."""
    return b"tool" in encoded or b"_call" in encoded


# --- what stands in a message ----------------------------------------------------------------------------------------


def _dicts(value: Any) -> Iterator[Message]:
    """Yield the dicts of a list, or nothing for any other value."""
    if type(value) is list:
        yield from (each for each in value if type(each) is dict)


def _text(value: Any) -> str:
    return value if type(value) is str else ""


def _calls(message: Any) -> list[_Call]:
    """Return the calls in a message that the client has to answer."""
    if type(message) is not dict:
        return []
    if _text(message.get("type")) in _RESPONSES:
        return [_Call("responses", message)]
    if message.get("kind") == "response":
        return [
            _Call("pydantic", part) for part in _dicts(message.get("parts")) if part.get("part_kind") == "tool-call"
        ]
    if message.get("role") != "assistant":
        return []
    chat = [_Call("chat", call) for call in _dicts(message.get("tool_calls"))]
    blocks = [block for block in _dicts(message.get("content")) if block.get("type") == "tool_use"]
    return chat or [_Call("anthropic", block) for block in blocks]


def _result_parts(message: Any) -> list[tuple[str, Message]]:
    """Return the results in a message: the id of the call, and the dict of the result. It may be the message itself."""
    if type(message) is not dict:
        return []
    if _text(message.get("type")) in _OUTPUTS:
        return [(_text(message.get("call_id")), message)]
    if message.get("kind") == "request":
        # A retry prompt without a tool is about the whole answer.
        parts = [part for part in _dicts(message.get("parts")) if part.get("part_kind") in _RETURNS]
        return [(_text(part.get("tool_call_id")), part) for part in parts if part.get("tool_name") is not None]
    if message.get("role") == "tool":
        # SWE-agent names several. Ollama names none, and the results stand in the order of the calls.
        several = message.get("tool_call_ids")
        ids = several if type(several) is list else [message.get("tool_call_id")]
        return [(_text(each), message) for each in ids]
    if message.get("role") == "user":
        blocks = [block for block in _dicts(message.get("content")) if block.get("type") == "tool_result"]
        return [(_text(block.get("tool_use_id")), block) for block in blocks]
    return []


def _results(message: Any) -> list[str]:
    """Return the ids of the calls that a message answers."""
    return [call_id for call_id, _ in _result_parts(message)]


def _is_in_window(shape: Shape, message: Any) -> bool:
    """Tell whether a message behind a call may stand before, or among, the results of that call."""
    if shape == "responses":
        return True
    if type(message) is not dict:
        return False
    if shape == "chat":
        return message.get("role") == "tool"
    return message.get("role") == "user" if shape == "anthropic" else message.get("kind") == "request"


def _window(messages: Sequence[Any], place: int, shape: Shape) -> Iterator[tuple[int, Any]]:
    """Yield the messages behind a call that may hold its result, with their places."""
    for at in range(place + 1, len(messages)):
        if not _is_in_window(shape, messages[at]):
            return
        yield at, messages[at]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def faults(messages: Sequence[Any]) -> list[ToolCallFault]:
    """Return the calls without a result, and the results without a call, in the order of their messages."""
    found = []
    taken: set[tuple[int, str]] = set()
    for place, message in enumerate(messages):
        unanswered = _unanswered(messages, place, taken)
        found += [ToolCallFault("unanswered", call.call_id, place) for call in unanswered]
        # A result that names no call may be of any shape, also of one that needs no call.
        orphaned = [call_id for call_id in _results(message) if call_id and (place, call_id) not in taken]
        found += [ToolCallFault("orphaned", call_id, place) for call_id in orphaned]
    return found


def _unanswered(messages: Sequence[Any], place: int, taken: set[tuple[int, str]]) -> list[_Call]:
    """Return the calls of a message that have no result. The results of the others are added to `taken`."""
    missing = []
    for call in _calls(messages[place]):
        result = _result_of(messages, place, call, taken)
        if result is None:
            missing.append(call)
        else:
            taken.add(result)
    return missing


def _result_of(messages: Sequence[Any], place: int, call: _Call, taken: set[tuple[int, str]]) -> tuple[int, str] | None:
    """Return the place of the message that answers a call, with the id that it names. Each result answers one call."""
    nameless = None
    for at, message in _window(messages, place, call.shape):
        for call_id in _results(message):
            if (at, call_id) not in taken:
                if call_id and call_id == call.call_id:
                    return at, call_id
                if not call_id and call.shape == "chat":
                    nameless = nameless or (at, call_id)
    return nameless


# --- the repair ------------------------------------------------------------------------------------------------------


def repair(messages: MutableSequence[Any], start: int = 0) -> int:
    """Give each call that has no result one in its own shape, right behind the call, marked ``interrupted``.

    A real result that stands too far behind its call is moved there. Arguments that broke off become an empty object,
    because a provider refuses half of one. Their text goes into the result. A second repair changes nothing.

    Args:
        start: look at the messages from this place on only.

    Returns:
        How many calls were answered.
    """
    count, place = 0, start
    while place < len(messages):
        missing = _unanswered(messages, place, set())
        if missing:
            for number, call in enumerate(missing):
                if not call.call_id:
                    call.part[_KEYS[call.shape][0]] = f"interrupted_{place}_{number}"
            at = place + 1
            if missing[0].shape == "chat":
                at = _end_of_results(messages, at, {call.call_id for call in _calls(messages[place])} | {""})
            # In the other shapes the new results come first, because the text of the user must come behind all results.
            for answer in reversed(_answers(messages, place, at, missing)):
                messages.insert(at, answer)
            count += len(missing)
        place += 1
    return count


def _end_of_results(messages: Sequence[Any], at: int, ids: set[str]) -> int:
    """Return the place behind the results of calls that stand from a place on."""
    while at < len(messages) and ids.intersection(_results(messages[at])):
        at += 1
    return at


def _answers(messages: MutableSequence[Any], place: int, at: int, calls: Sequence[_Call]) -> list[Message]:
    """Return the messages that answer the calls of a message. They go to the place `at`."""
    shape = calls[0].shape
    parts = [_taken_late(messages, at, call) or _synthetic(call) for call in calls]
    if shape == "anthropic":
        parts = [{"role": "user", "content": parts, INTERRUPTED: True}]
    if shape == "pydantic":
        parts = [{"kind": "request", "parts": parts, INTERRUPTED: True}]
    own_id = messages[place].get("id")
    if own_id is None or shape == "responses":
        return parts
    # With ids of their own they merge, and a retry finds them.
    return [
        part if part.get("id") is not None else {"id": f"{own_id}.result.{number}", **part}
        for number, part in enumerate(parts)
    ]


def _synthetic(call: _Call) -> Message:
    """Return a result for a call, in its shape."""
    text = NOT_ANSWERED + _mend_arguments(call)
    if call.shape == "chat":
        return {"role": "tool", "tool_call_id": call.call_id, "content": text, INTERRUPTED: True}
    if call.shape == "responses":
        kind = _RESPONSES[call.part["type"]]
        return {"type": kind, "call_id": call.call_id, "output": text, INTERRUPTED: True}
    if call.shape == "anthropic":
        return {"type": "tool_result", "tool_use_id": call.call_id, "is_error": True, "content": text}
    return {
        "part_kind": "tool-return",
        "tool_name": _text(call.part.get("tool_name")),
        "tool_call_id": call.call_id,
        "content": text,
        "timestamp": datetime.now(UTC).isoformat(),
    }


def _taken_late(messages: MutableSequence[Any], at: int, call: _Call) -> Message | None:
    """Take the result of a call out of the list, if it stands behind messages of others. None if there is none."""
    for place in range(at, len(messages)):
        message = messages[place]
        if any(each.call_id == call.call_id for each in _calls(message)):
            # From here on the id belongs to another call.
            return None
        for call_id, part in _result_parts(message):
            if call_id == call.call_id:
                holder = message.get("content") if call.shape == "anthropic" else message.get("parts")
                if part is message or holder == [part]:
                    messages.pop(place)
                else:
                    holder[:] = [each for each in holder if each is not part]
                return part
    return None


def _mend_arguments(call: _Call) -> str:
    """Put an empty object in place of arguments that broke off. Return what the result has to say of that."""
    key = _KEYS[call.shape][1]
    holder = call.part.get("function") if call.shape == "chat" else call.part
    if type(holder) is not dict or _text(call.part.get("type")) in _RESPONSES.keys() - {"function_call"}:
        return ""
    value = holder.get(key)
    may_be_text = call.shape != "anthropic"
    if type(value) is dict or (may_be_text and (value is None or (type(value) is str and _is_object(value)))):
        return ""
    holder[key] = "{}" if may_be_text else {}
    return f"{BROKEN_ARGUMENTS}{value}" if value else ""


def _is_object(text: str) -> bool:
    try:
        return type(json.loads(text)) is dict
    except ValueError:
        return False
