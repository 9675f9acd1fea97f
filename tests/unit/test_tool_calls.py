"""Tool calls without a result: found and answered in the shape of each provider (HAZARDS F7)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness.providers import SHAPES, Message, Refused
from hypothesis import given
from hypothesis import strategies as st

from persist import tool_calls
from persist.tool_calls import faults, repair

shapes = pytest.mark.parametrize("shape", list(SHAPES))
SAMPLES = sorted((Path(__file__).parents[2] / "scripts" / "replaying" / "samples").glob("*.json"))


def is_accepted(shape: str, messages: list[Message]) -> bool:
    try:
        SHAPES[shape][1](messages)
    except Refused:
        return False
    return True


def conversation(shape: str) -> list[Message]:
    """Three turns, with one, two and three parallel calls."""
    turn = SHAPES[shape][0]
    return [message for number in range(3) for message in turn(number, number + 1)]


def assert_repaired(shape: str, messages: list[Message]) -> None:
    """The conversation was refused, and is accepted after a repair. A second repair changes nothing."""
    assert not is_accepted(shape, messages)
    assert faults(messages)
    assert repair(messages) > 0
    SHAPES[shape][1](messages)
    assert faults(messages) == []
    again = copy.deepcopy(messages)
    assert repair(again) == 0
    assert again == messages


@shapes
def test_sound_conversation_is_left_alone(shape: str) -> None:
    """The provider accepts it, nothing is named, and a repair changes nothing."""
    messages = conversation(shape)
    SHAPES[shape][1](messages)
    before = copy.deepcopy(messages)
    assert faults(messages) == []
    assert repair(messages) == 0
    assert messages == before


@shapes
@pytest.mark.parametrize("goes_on", [False, True], ids=["ends", "goes on"])
def test_turn_that_was_cut_off_anywhere_is_repaired(shape: str, goes_on: bool) -> None:
    """A process died behind each message: between call and result, and when some of the parallel calls were answered.

    The user may have gone on meanwhile.
    """
    whole, prompt = conversation(shape), SHAPES[shape][2]
    cut = 0
    for length in range(1, len(whole)):
        messages = copy.deepcopy(whole[:length])
        if goes_on:
            messages.append(copy.deepcopy(prompt))
        if not is_accepted(shape, messages):
            assert_repaired(shape, messages)
            cut += 1
    # In two of the shapes all results of a turn are one message.
    assert cut == (6 if shape in ("chat", "responses") else 3) + (3 if shape == "responses" else 0)


@shapes
def test_some_of_the_parallel_calls_were_answered(shape: str) -> None:
    """Each subset of the results is missing, also where they stand together in one message."""
    turn, _, prompt = SHAPES[shape]
    for missing in range(1, 8):
        messages = turn(0, 3)
        lost = {place for place in range(3) if missing & (1 << place)}
        _drop_results(shape, messages, lost)
        messages[-1:] = [copy.deepcopy(prompt)]
        assert_repaired(shape, messages)


def _drop_results(shape: str, messages: list[Message], lost: set[int]) -> None:
    key = {"anthropic": "content", "pydantic": "parts"}.get(shape)
    if key is None:
        results = [message for message in messages if tool_calls._results(message, 0)]
        messages[:] = [each for each in messages if each not in [results[place] for place in lost]]
        return
    (holder,) = [message for message in messages if tool_calls._results(message, 0)]
    holder[key] = [part for place, part in enumerate(holder[key]) if place not in lost]
    if not holder[key]:
        messages.remove(holder)


#: Shape -> how the arguments of the first call break off in the middle.
BROKEN: dict[str, Any] = {
    "chat": lambda messages: messages[1]["tool_calls"][0]["function"].update(arguments='{"path": "b'),
    "responses": lambda messages: messages[2].update(arguments='{"path": "b'),
    "anthropic": lambda messages: messages[1]["content"][1].update(input='{"path": "b'),
    "pydantic": lambda messages: messages[1]["parts"][1].update(args='{"path": "b'),
}
#: Shape -> how the first call breaks off before it has an id.
NAMELESS: dict[str, Any] = {
    "chat": lambda messages: messages[1]["tool_calls"][0].pop("id"),
    "responses": lambda messages: messages[2].update(call_id=""),
    "anthropic": lambda messages: messages[1]["content"][1].update(id=None),
    "pydantic": lambda messages: messages[1]["parts"][1].pop("tool_call_id"),
}


@shapes
@pytest.mark.parametrize("how", [BROKEN, NAMELESS], ids=["arguments", "id"])
def test_call_that_was_streamed_in_part_is_repaired(shape: str, how: dict[str, Any]) -> None:
    """A provider refuses half of the arguments, and a call without an id. The text of the arguments is kept."""
    messages = SHAPES[shape][0](0, 2)
    messages = messages[:4] if shape == "responses" else messages[:2]
    how[shape](messages)
    assert_repaired(shape, messages)
    assert ('"path\\": \\"b' in json.dumps(messages).replace("\\\\", "\\")) is (how is BROKEN)


@shapes
def test_results_are_marked(shape: str) -> None:
    """A page that shows the conversation can tell a synthetic result from a real one."""
    messages = SHAPES[shape][0](0, 1)
    before = 3 if shape == "responses" else 2
    del messages[before:]
    repair(messages)
    (result,) = messages[before:]
    assert result["interrupted"] is True
    assert tool_calls.NOT_ANSWERED in json.dumps(result)


@pytest.mark.parametrize("shape", ["chat", "anthropic", "pydantic"])
@pytest.mark.parametrize("with_answer", [True, False], ids=["the model went on", "the user spoke"])
def test_result_that_comes_late_is_moved_to_its_call(shape: str, *, with_answer: bool) -> None:
    """The user said something while the tool ran. The real result is kept, and stands where the provider wants it.

    Its message moves whole, with all that stands beside the result.
    """
    turn, _, prompt = SHAPES[shape]
    messages = turn(0, 2)
    for message in messages[2:-1]:
        message.update(id=f"real {messages.index(message)}", cost=1)
    wait = {"kind": "response", "parts": []} if shape == "pydantic" else {"role": "assistant", "content": "Wait."}
    messages[2:2] = [copy.deepcopy(prompt), *([wait] if with_answer else [])]
    before = sorted(map(str, messages))
    assert {fault.kind for fault in faults(messages)} == {"misplaced"}
    assert_repaired(shape, messages)
    assert sorted(map(str, messages)) == before


@pytest.mark.parametrize("shape", ["anthropic", "pydantic"])
def test_result_behind_the_text_of_its_message_comes_first(shape: str) -> None:
    """Only the result moves. The text stays in its message."""
    messages = SHAPES[shape][0](0, 1)
    key = {"anthropic": "content", "pydantic": "parts"}[shape]
    text = {"type": "text", "text": "Hm."} if shape == "anthropic" else {"part_kind": "user-prompt", "content": "Hm."}
    messages[2][key].insert(0, text)
    assert_repaired(shape, messages)
    assert messages[3][key] == [text]
    assert "interrupted" not in str(messages)


@shapes
def test_real_result_takes_the_place_of_a_synthetic_one(shape: str) -> None:
    """The result came after the repair. The next repair takes it in, and the synthetic one goes."""
    whole = SHAPES[shape][0](0, 2)
    length = 4 if shape == "responses" else 2
    messages = copy.deepcopy(whole[:length])
    repair(messages)
    messages += copy.deepcopy(whole[length:-1])
    if shape != "chat":
        assert not is_accepted(shape, messages)
    assert {fault.kind for fault in faults(messages)} == {"misplaced"}
    repair(messages)
    assert messages == whole[:-1]
    assert faults(messages) == []


@shapes
def test_synthetic_result_without_its_call_goes(shape: str) -> None:
    """A retry gave the answer anew, without the call."""
    messages = SHAPES[shape][0](0, 1)[: 3 if shape == "responses" else 2]
    repair(messages)
    messages = [message for message in messages if not tool_calls._calls(message, 0)]
    assert [fault.kind for fault in faults(messages)] == ["misplaced"]
    tool_calls.drop_superseded(messages)
    assert faults(messages) == []
    assert "interrupted" not in str(messages)


@pytest.mark.parametrize("shape", ["anthropic", "pydantic"])
def test_turn_of_several_messages_is_one(shape: str) -> None:
    """Neighbouring messages of the model are one turn. Their results stand behind the last one."""
    one, two = SHAPES[shape][0](0, 1), SHAPES[shape][0](1, 1)
    messages = [one[0], one[1], two[1], one[2], two[2]]
    SHAPES[shape][1](messages)
    before = copy.deepcopy(messages)
    assert (faults(messages), repair(messages)) == ([], 0)
    assert messages == before
    del messages[3]
    assert_repaired(shape, messages)


def test_call_that_may_wait_for_a_person_is_pending() -> None:
    """A call at the end of a turn that did not break off is no fault yet. The next message of the user makes it one."""
    messages = SHAPES["chat"][0](0, 1)[:2]
    assert [fault.is_pending for fault in faults(messages)] == [True]
    broken_off = [{**messages[0], "interrupted": True}, messages[1]]
    assert [fault.is_pending for fault in faults(broken_off)] == [False]
    assert [fault.is_pending for fault in faults([*messages, {"role": "user", "content": "?"}])] == [False]


FOREIGN: dict[str, list[Message]] = {
    "a result that names its call in another way": [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "a"}]},
    ],
    "a result of another shape": [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]},
        {"role": "tool", "content": "free text"},
    ],
    "tools that the provider runs": [
        {"type": "web_search_call", "id": "ws_1"},
        {"type": "computer_call", "call_id": "c"},
        {"type": "local_shell_call", "id": "l"},
        {"role": "assistant", "content": [{"type": "server_tool_use", "id": "srvtoolu_1"}]},
    ],
    "a line of a page": [{"type": "function_call", "role": "event", "name": "f"}],
    "a note of a page between call and result": [
        SHAPES["chat"][0](0, 1)[1],
        {"role": "progress", "content": "50 %"},
        SHAPES["chat"][0](0, 1)[2],
        *SHAPES["anthropic"][0](1, 1)[:2],
        {"role": "progress", "content": "50 %"},
        SHAPES["anthropic"][0](1, 1)[2],
    ],
    "a retry prompt with an id only": [
        {
            "kind": "response",
            "parts": [{"part_kind": "tool-call", "tool_name": "f", "args": "{}", "tool_call_id": "a"}],
        },
        {"kind": "request", "parts": [{"part_kind": "retry-prompt", "content": "again", "tool_call_id": "a"}]},
    ],
}


@pytest.mark.parametrize("messages", list(FOREIGN.values()), ids=list(FOREIGN))
def test_other_shapes_are_left_alone(messages: list[Message]) -> None:
    """Neither named nor changed."""
    before = copy.deepcopy(messages)
    assert [fault for fault in faults(messages) if not fault.is_pending] == []
    assert repair(messages) == 0
    assert messages == before


def test_shapes_are_not_mixed() -> None:
    """An app that changed its provider: a result of one shape answers no call of another."""
    messages = [
        SHAPES["chat"][0](0, 1)[1],
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_0_0"}]},
    ]
    assert [fault.kind for fault in faults(messages)] == ["unanswered", "orphaned"]
    assert repair(messages) == 1
    assert repair(messages) == 0
    assert len(messages) == 3


def test_arguments_that_nest_deeply_are_broken_ones() -> None:
    """A model that has lost its way says a bracket again and again. Fails with an error of recursion."""
    call = {"id": "a", "function": {"name": "f", "arguments": '{"a":' + "[" * 100_000}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    assert repair(messages) == 1
    assert call["function"] == {"name": "f", "arguments": "{}"}


@shapes
def test_repair_looks_at_each_message_a_few_times(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of broken calls hold the session's lock for a moment only. Fails if each call looks to the end."""
    looks = 0

    def counting(real: Callable[[Any, int], list[Any]]) -> Callable[[Any, int], list[Any]]:
        def count(message: Any, place: int) -> list[Any]:
            nonlocal looks
            looks += 1
            return real(message, place)

        return count

    for name in ("_calls", "_results"):
        monkeypatch.setattr(tool_calls, name, counting(getattr(tool_calls, name)))
    length = 3 if shape == "responses" else 2
    messages = [message for number in range(1000) for message in SHAPES[shape][0](number, 1)[:length]]
    assert repair(messages) == 1000
    assert looks < 10 * len(messages)


@shapes
def test_results_without_a_call_are_named_and_left_alone(shape: str) -> None:
    """After a truncation the call is gone. Nobody knows what it was."""
    messages = SHAPES[shape][0](0, 2)
    messages = [message for message in messages if not tool_calls._calls(message, 0)]
    before = copy.deepcopy(messages)
    assert [fault.kind for fault in faults(messages)] == ["orphaned", "orphaned"]
    assert repair(messages) == 0
    assert messages == before


def test_ids_that_are_used_again_are_told_apart() -> None:
    """Some servers call the first call of each turn "call_0"."""
    messages = [*SHAPES["chat"][0](0, 1), *SHAPES["chat"][0](0, 1)]
    assert faults(messages) == []
    del messages[-2]
    assert_repaired("chat", messages)
    assert len(messages) == 8


def test_results_that_name_no_call_answer_in_order() -> None:
    """Ollama's calls have no ids, and neither have its results. SWE-agent's results name several calls."""
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    asked: Message = {"role": "assistant", "content": "", "tool_calls": [call, copy.deepcopy(call)]}
    told = {"role": "tool", "content": "found"}
    assert faults([asked, told, told]) == []
    assert repair([asked, told, told]) == 0
    half = [copy.deepcopy(asked), told, {"role": "user", "content": "?"}]
    assert repair(half) == 1
    assert [message["role"] for message in half] == ["assistant", "tool", "tool", "user"]
    assert faults(half) == []
    assert faults([told]) == []
    named = [
        {
            "role": "assistant",
            "tool_calls": [{"id": name, "function": {"name": "f", "arguments": "{}"}} for name in "ab"],
        },
        {"role": "tool", "content": "found", "tool_call_ids": ["a", "b"]},
    ]
    assert faults(named) == []
    assert repair(named) == 0


def test_start_spares_what_stands_before() -> None:
    """A turn that breaks off answers its own calls, and not those of an earlier one."""
    messages = [*SHAPES["chat"][0](0, 1)[:2], *SHAPES["chat"][0](1, 1)[:2]]
    assert repair(messages, 2) == 1
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "tool"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
calls = st.fixed_dictionaries({}, optional={"id": anything, "function": anything, "type": anything, "input": anything})
parts = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["tool_use", "tool_result", "text"]) | anything,
        "part_kind": st.sampled_from(["tool-call", "tool-return", "retry-prompt"]) | anything,
        "id": st.sampled_from(["a", "b"]) | anything,
        "tool_use_id": st.sampled_from(["a", "b"]) | anything,
        "tool_call_id": st.sampled_from(["a", "b"]) | anything,
        "tool_name": anything,
        "args": anything,
        "input": anything,
    },
)
messages_of_anybody = st.lists(
    anything
    | st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "tool", "system"]) | anything,
            "kind": st.sampled_from(["request", "response"]) | anything,
            "type": st.sampled_from(["function_call", "function_call_output", "computer_call"]) | anything,
            "id": anything,
            "call_id": st.sampled_from(["a", "b"]) | anything,
            "tool_call_id": st.sampled_from(["a", "b"]) | anything,
            "tool_calls": st.lists(calls, max_size=3) | anything,
            "content": st.lists(parts, max_size=3) | anything,
            "parts": st.lists(parts, max_size=3) | anything,
            "arguments": anything,
        },
    ),
    max_size=6,
)


@given(messages_of_anybody)
def test_any_messages_can_be_looked_at_and_repaired(messages: list[Any]) -> None:
    """Hostile JSON raises nothing. After one repair no call is unanswered, and another repair changes nothing."""
    faults(messages)
    repair(messages)
    assert [fault for fault in faults(messages) if fault.kind == "unanswered"] == []
    before = copy.deepcopy(messages)
    assert repair(messages) == 0
    assert messages == before


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_sample_conversations_are_sound(sample: Path) -> None:
    """Real conversations are left alone."""
    messages = json.loads(sample.read_text(encoding="utf-8"))["messages"]
    with suppress(KeyError):
        assert is_accepted("chat", messages)
    assert faults(messages) == []
    assert repair(messages) == 0
