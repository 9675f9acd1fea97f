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
    anthropic     at the front of the user's next turn. Neighbouring messages of one role are one turn
    pydantic      at the front of the next requests, in the same way

A call and a result belong together only if they have one shape. Everything else is left alone: tools that the provider
runs itself, other shapes, and a tool message that names no call behind a call that has an id.

A synthetic result is marked ``interrupted``. As soon as the real one is there, the synthetic one goes.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from persist.turn import INTERRUPTED

Shape = Literal["chat", "responses", "anthropic", "pydantic"]
Message = dict[str, Any]

#: The content of a synthetic result.
NOT_ANSWERED = "This tool call was interrupted, and it has no result."
#: It is added where the arguments of a call broke off, too. They follow.
BROKEN_ARGUMENTS = " Its arguments broke off: "

#: Shapes in which neighbouring messages are one turn -> the key that tells whose, the model's value and the user's.
_SIDES: dict[Shape, tuple[str, str, str]] = {
    "anthropic": ("role", "assistant", "user"),
    "pydantic": ("kind", "response", "request"),
}
#: The roles that a provider may know.
_ROLES = ("user", "assistant", "tool", "system", "developer", "function")
#: Items of the Responses API -> the items that answer them. Other kinds need more than a text for an answer.
_RESPONSES = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}
#: Shape -> the key of a call's id, the key of its arguments, and the key of the list that holds results.
_KEYS: dict[Shape, tuple[str, str, str]] = {
    "chat": ("id", "arguments", ""),
    "responses": ("call_id", "arguments", ""),
    "anthropic": ("id", "input", "content"),
    "pydantic": ("tool_call_id", "args", "parts"),
}


@dataclass(frozen=True, slots=True)
class ToolCallFault:
    """A tool call without a result, or a result without a call.

    Attributes:
        kind: ``"unanswered"`` for a call that has no result. ``"misplaced"`` for a result that stands where its
            provider does not take it, or that a real one has made needless. `repair` mends both. ``"orphaned"`` for a
            result that no call has asked for.
        call_id: the id of the call, as its provider gave it. Empty if the call broke off before it had one.
        place: the index of the message.
        is_pending: whether an unanswered call stands at the end of a turn that did not break off. It may wait for a
            person, so it is no fault yet.
    """

    kind: Literal["unanswered", "misplaced", "orphaned"]
    call_id: str
    place: int
    is_pending: bool = False


def may_have_calls(encoded: bytes) -> bool:
    """Tell whether an encoded message may hold a call or a result. Most have neither, and need not be decoded."""
    return b"tool" in encoded or b"_call" in encoded


# --- what stands in a message ----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Call:
    """A call: the dict of the call itself, and the index of its message."""

    shape: Shape
    part: Message
    place: int

    @property
    def call_id(self) -> str:
        """The id of the call. It is empty if the call broke off before it had one."""
        return _text(self.part.get(_KEYS[self.shape][0]))


@dataclass(slots=True, eq=False)
class _Result:
    """A result: the dict of the result itself, which may be the message, and the index of its message.

    `is_first` tells whether it stands in front of everything in its message that is no result.
    """

    shape: Shape
    part: Message
    place: int
    call_id: str
    is_synthetic: bool
    is_first: bool = True


@dataclass(slots=True)
class _Turn:
    """The calls of one turn of the model. Their results begin at `end`, and have to stand before `stop`."""

    shape: Shape
    calls: list[_Call]
    end: int
    stop: int


def _text(value: Any) -> str:
    return value if type(value) is str else ""


def _dicts(value: Any) -> Iterator[Message]:
    """Yield the dicts of a list, or nothing for any other value."""
    if type(value) is list:
        yield from (each for each in value if type(each) is dict)


def _is(message: Any, key: str, value: str) -> bool:
    return type(message) is dict and message.get(key) == value


def _calls(message: Any, place: int) -> list[_Call]:
    """Return the calls in a message that the client has to answer."""
    if type(message) is not dict:
        return []
    if _text(message.get("type")) in _RESPONSES:
        # A message with a role is of a page, or of another shape.
        return [] if "role" in message else [_Call("responses", message, place)]
    if message.get("kind") == "response":
        return [
            _Call("pydantic", part, place)
            for part in _dicts(message.get("parts"))
            if _is(part, "part_kind", "tool-call")
        ]
    if message.get("role") != "assistant":
        return []
    calls = [each for each in _dicts(message.get("tool_calls")) if _is_chat_call(each)]
    if calls:
        return [_Call("chat", call, place) for call in calls]
    return [
        _Call("anthropic", block, place) for block in _dicts(message.get("content")) if _is(block, "type", "tool_use")
    ]


def _is_chat_call(call: Message) -> bool:
    return type(call.get("function")) is dict or call.get("type") == "function"


def _results(message: Any, place: int) -> list[_Result]:
    """Return the results in a message."""
    if type(message) is not dict:
        return []
    is_ours = message.get(INTERRUPTED) is True
    if _text(message.get("type")) in _RESPONSES.values():
        return [_Result("responses", message, place, _text(message.get("call_id")), is_ours)]
    if message.get("role") == "tool":
        # SWE-agent names several. Ollama names none, and its results stand in the order of the calls.
        several = message.get("tool_call_ids")
        ids = several if type(several) is list else [message.get("tool_call_id")]
        return [_Result("chat", message, place, _text(each), is_ours) for each in ids]
    if message.get("kind") == "request":
        return _result_parts("pydantic", message, place, is_ours)
    return _result_parts("anthropic", message, place, is_ours) if message.get("role") == "user" else []


def _result_parts(shape: Shape, message: Message, place: int, is_ours: bool) -> list[_Result]:
    found, is_first = [], True
    content = message.get(_KEYS[shape][2])
    for part in content if type(content) is list else []:
        call_id = _text(part.get("tool_use_id") or part.get("tool_call_id")) if type(part) is dict else ""
        is_result = _is(part, "type", "tool_result")
        if shape == "pydantic":
            # A retry prompt without an id is about the whole answer.
            is_result = call_id != "" and part.get("part_kind") in ("tool-return", "retry-prompt")
        if is_result:
            found.append(_Result(shape, part, place, call_id, is_ours, is_first))
        else:
            is_first = False
    return found


def _turns(messages: Sequence[Any]) -> Iterator[_Turn]:
    """Yield the turns of the model that have calls, in their order."""
    place = 0
    while place < len(messages):
        calls = _calls(messages[place], place)
        end = place + 1
        if calls and calls[0].shape in _SIDES:
            key, mine, theirs = _SIDES[calls[0].shape]
            while end < len(messages) and _is(messages[end], key, mine):
                calls += [call for call in _calls(messages[end], end) if call.shape == calls[0].shape]
                end += 1
            stop = _behind_all(messages, end, key, theirs)
        elif calls and calls[0].shape == "responses":
            stop = len(messages)
        else:
            stop = _behind_all(messages, end, "role", "tool")
        if calls:
            yield _Turn(calls[0].shape, calls, end, stop)
        place = end


def _behind_all(messages: Sequence[Any], place: int, key: str, value: str) -> int:
    """Return the place behind the messages from a place on that have a value."""
    while place < len(messages) and (_is(messages[place], key, value) or _is_unseen(messages[place])):
        place += 1
    return place


def _is_unseen(message: Any) -> bool:
    """Tell whether a message is for a page only: no provider knows its role, so a server leaves it out."""
    role = message.get("role") if type(message) is dict else None
    return type(role) is str and role not in _ROLES


# --- which belong together -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """The faults in the calls and the results of a list of messages.

    Attributes:
        unanswered: calls without a result, with their turn.
        misplaced: calls whose real result stands where it is not taken, with that result and their turn.
        superseded: synthetic results that are not needed any more.
        orphaned: results that no call has asked for.
    """

    unanswered: list[tuple[_Call, _Turn]] = field(default_factory=list)
    misplaced: list[tuple[_Call, _Result, _Turn]] = field(default_factory=list)
    superseded: list[_Result] = field(default_factory=list)
    orphaned: list[_Result] = field(default_factory=list)


class _Results:
    """The results of a list of messages, by their place and by the id of their call. Each answers one call."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self.all = [result for place, message in enumerate(messages) for result in _results(message, place)]
        self._by_place: dict[int, list[_Result]] = defaultdict(list)
        self._by_call: dict[tuple[Shape, str], list[_Result]] = defaultdict(list)
        for result in self.all:
            self._by_place[result.place].append(result)
            self._by_call[result.shape, result.call_id].append(result)
        self._taken: set[int] = set()

    def take(self, result: _Result) -> None:
        self._taken.add(id(result))

    def is_free(self, result: _Result) -> bool:
        return id(result) not in self._taken

    def of(self, call: _Call) -> list[_Result]:
        """Return the free results that name a call, wherever they stand."""
        return list(filter(self.is_free, self._by_call[call.shape, call.call_id]))

    def near(self, call: _Call, turn: _Turn) -> list[_Result]:
        """Return the free results of a call that may stand in the window of its turn."""
        if turn.shape == "responses":
            return self.of(call)
        return [each for each in self.behind(turn) if each.call_id == call.call_id and self.is_free(each)]

    def behind(self, turn: _Turn) -> list[_Result]:
        """Return the results in the window of a turn."""
        found = [result for place in range(turn.end, turn.stop) for result in self._by_place[place]]
        return [result for result in found if result.shape == turn.shape]


def _look(messages: Sequence[Any]) -> _Found:
    """Match calls with results."""
    found, results, turns = _Found(), _Results(messages), list(_turns(messages))
    uses = Counter((call.shape, call.call_id) for turn in turns for call in turn.calls)
    for turn in turns:
        if turn.shape == "chat" and _names_calls_in_its_own_way(turn, results):
            continue
        for call in turn.calls:
            there = [each for each in results.near(call, turn) if _is_taken_at(messages, each, turn)]
            real = [result for result in there if not result.is_synthetic]
            # An id that several calls have tells nothing about a result that stands elsewhere.
            is_unique = call.call_id != "" and uses[call.shape, call.call_id] == 1
            elsewhere = [each for each in results.of(call) if not each.is_synthetic] if is_unique else []
            if not real and elsewhere:
                results.take(elsewhere[0])
                found.misplaced.append((call, elsewhere[0], turn))
            elif there:
                results.take((real or there)[0])
            else:
                found.unanswered.append((call, turn))
    for result in filter(results.is_free, results.all):
        if result.call_id:
            (found.superseded if result.is_synthetic else found.orphaned).append(result)
    return found


def _names_calls_in_its_own_way(turn: _Turn, results: _Results) -> bool:
    """Tell whether the calls of a turn have ids that its results do not name. Such results are left alone."""
    window = results.behind(turn)
    is_so = any(not result.call_id for result in window) and any(call.call_id for call in turn.calls)
    for result in window if is_so else []:
        results.take(result)
    return is_so


def _is_taken_at(messages: Sequence[Any], result: _Result, turn: _Turn) -> bool:
    """Tell whether a provider takes a result at its place: in the window, and in front of all that is no result."""
    if not turn.end <= result.place < turn.stop:
        return False
    if turn.shape in ("chat", "responses"):
        return True
    before = range(turn.end, result.place)
    return result.is_first and all(_is_results_only(messages[place], turn.shape) for place in before)


def _is_results_only(message: Any, shape: Shape) -> bool:
    """Tell whether a message holds results and nothing else."""
    content = message.get(_KEYS[shape][2]) if type(message) is dict else None
    return _is_unseen(message) or (type(content) is list and len(_results(message, 0)) == len(content))


def faults(messages: Sequence[Any]) -> list[ToolCallFault]:
    """Return what is wrong with the tool calls of a conversation, in the order of the messages."""
    found = _look(messages)
    told = [
        ToolCallFault("unanswered", call.call_id, call.place, _is_pending(messages, turn))
        for call, turn in found.unanswered
    ]
    told += [ToolCallFault("misplaced", call.call_id, result.place) for call, result, _ in found.misplaced]
    told += [ToolCallFault("misplaced", result.call_id, result.place) for result in found.superseded]
    told += [ToolCallFault("orphaned", result.call_id, result.place) for result in found.orphaned]
    return sorted(told, key=lambda fault: fault.place)


def _is_pending(messages: Sequence[Any], turn: _Turn) -> bool:
    """Tell whether a turn is the last one, and has not broken off."""
    if any(not _calls(message, 0) and not _results(message, 0) for message in messages[turn.end :]):
        return False
    for message in reversed(messages):
        if type(message) is dict:
            if message.get(INTERRUPTED) is True:
                return False
            if message.get("role") == "user" and not _results(message, 0):
                break
    return True


# --- the repair ------------------------------------------------------------------------------------------------------


def repair(messages: MutableSequence[Any], start: int = 0) -> int:
    """Give each call that has no result a synthetic one, in its own shape and marked ``interrupted``.

    A real result that stands where its provider does not take it is moved to its call. A synthetic result that is not
    needed any more goes. Arguments that broke off become an empty object, because a provider refuses half of one, and
    the result tells their text. A second repair changes nothing.

    Args:
        start: look at the messages from this place on only.

    Returns:
        How many calls were given a result.
    """
    items = messages[start:]
    found = _look(items)
    added: dict[int, list[Message]] = defaultdict(list)
    removed: set[int] = set()
    for turn, unanswered, moved in _by_turn(found):
        _name(unanswered)
        for place, answers in _answers(items, turn, unanswered, moved, removed).items():
            added[place] += answers
    _remove_superseded(items, found.superseded, removed)
    _apply(messages, start, added, removed)
    return len(found.unanswered) + len(found.misplaced)


def drop_superseded(messages: MutableSequence[Any], start: int = 0) -> None:
    """Remove the synthetic results that a later turn has made needless."""
    items = messages[start:]
    removed: set[int] = set()
    _remove_superseded(items, _look(items).superseded, removed)
    _apply(messages, start, {}, removed)


def _by_turn(found: _Found) -> Iterator[tuple[_Turn, list[_Call], list[_Result]]]:
    """Yield each turn with its unanswered calls, and with the results that are to be moved to it."""
    turns: dict[int, tuple[_Turn, list[_Call], list[_Result]]] = {}
    for call, turn in found.unanswered:
        turns.setdefault(id(turn), (turn, [], []))[1].append(call)
    for _, result, turn in found.misplaced:
        turns.setdefault(id(turn), (turn, [], []))[2].append(result)
    yield from turns.values()


def _name(calls: Sequence[_Call]) -> None:
    """Complete the calls that broke off before they had an id or a name."""
    for number, call in enumerate(calls):
        if not call.call_id:
            call.part[_KEYS[call.shape][0]] = f"interrupted_{call.place}_{number}"
        named = call.part
        if call.shape == "chat":
            if type(named.get("function")) is not dict:
                named["function"] = {"arguments": "{}"}
            named = named["function"]
        key = "tool_name" if call.shape == "pydantic" else "name"
        if not _text(named.get(key)):
            named[key] = "interrupted"


def _answers(
    items: Sequence[Any], turn: _Turn, calls: Sequence[_Call], moved: Sequence[_Result], removed: set[int]
) -> dict[int, list[Message]]:
    """Return the messages to add for a turn, by their place. A result that moves is taken from its old place."""
    whole: list[Message] = []
    parts: list[Message] = []
    moving = {id(result.part) for result in moved}
    for result in moved:
        if result.place in removed:
            continue
        if all(id(part) in moving for part in _parts(items[result.place], result)):
            # With all that stands beside the results: an id, a time, a cost.
            removed.add(result.place)
            whole.append(items[result.place])
        else:
            _take_part(items[result.place], result)
            parts.append(result.part)
    mine = {call.place: _text(items[call.place].get("id")) for call in calls}
    if turn.shape in ("chat", "responses"):
        at = _behind_results(items, turn) if turn.shape == "chat" else _behind_calls(items, turn.end)
        return {at: whole + [_with_id(_synthetic(call), call, mine) for call in calls]}
    answers = whole
    if parts:
        answers = [*answers, _holder(turn.shape, parts)]
    if calls:
        ours = {**_holder(turn.shape, [_synthetic(call) for call in calls]), INTERRUPTED: True}
        answers = [*answers, _with_id(ours, calls[0], mine)]
    return {turn.end: answers}


def _parts(message: Message, result: _Result) -> list[Any]:
    """Return all that a message with a result holds. The result may be the message itself."""
    return [message] if result.part is message else list(message[_KEYS[result.shape][2]])


def _take_part(message: Message, result: _Result) -> None:
    content = message[_KEYS[result.shape][2]]
    content[:] = [part for part in content if part is not result.part]


def _holder(shape: Shape, parts: list[Message]) -> Message:
    return {"role": "user", "content": parts} if shape == "anthropic" else {"kind": "request", "parts": parts}


def _behind_results(items: Sequence[Any], turn: _Turn) -> int:
    """Return the place behind the results of a turn that stand right behind it."""
    ids, at = {call.call_id for call in turn.calls} | {""}, turn.end
    while at < turn.stop and any(result.call_id in ids for result in _results(items[at], at)):
        at += 1
    return at


def _behind_calls(items: Sequence[Any], at: int) -> int:
    """Return the place behind the calls that stand together with one."""
    while at < len(items) and any(call.shape == "responses" for call in _calls(items[at], at)):
        at += 1
    return at


def _with_id(answer: Message, call: _Call, own_ids: dict[int, str]) -> Message:
    """Give an answer an id, if the message of its call has one. Then it merges, and a retry finds it."""
    own_id = own_ids[call.place]
    return {"id": f"{own_id}.result.{call.call_id}", **answer} if own_id and call.shape != "responses" else answer


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
    named = {"tool_name": _text(call.part.get("tool_name")), "tool_call_id": call.call_id}
    return {"part_kind": "tool-return", **named, "content": text, "timestamp": datetime.now(UTC).isoformat()}


def _mend_arguments(call: _Call) -> str:
    """Put an empty object in place of arguments that broke off. Return what the result has to say of that."""
    key = _KEYS[call.shape][1]
    holder = call.part.get("function") if call.shape == "chat" else call.part
    if type(holder) is not dict or call.part.get("type") == "custom_tool_call":
        return ""
    value = holder.get(key)
    may_be_text = call.shape != "anthropic"
    if type(value) is dict or (may_be_text and type(value) is str and _is_object(value)):
        return ""
    if value is None and call.shape == "pydantic":
        return ""
    holder[key] = "{}" if may_be_text else {}
    return f"{BROKEN_ARGUMENTS}{value}" if value else ""


def _is_object(text: str) -> bool:
    try:
        return type(json.loads(text)) is dict
    except (ValueError, RecursionError):
        return False


def _remove_superseded(items: Sequence[Any], superseded: Sequence[_Result], removed: set[int]) -> None:
    """Take synthetic results out of their messages. A message that held nothing else is to be removed."""
    for result in superseded:
        key = _KEYS[result.shape][2]
        if key:
            _take_part(items[result.place], result)
        if not key or not items[result.place][key]:
            removed.add(result.place)


def _apply(messages: MutableSequence[Any], start: int, added: dict[int, list[Message]], removed: set[int]) -> None:
    """Add and remove messages. The last place comes first, so that the others stay right."""
    for place in sorted(added.keys() | removed, reverse=True):
        if place in removed:
            del messages[start + place]
        for answer in reversed(added.get(place, [])):
            messages.insert(start + place, answer)
