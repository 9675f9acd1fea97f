"""Turns as pure functions: what happens to a prompt that another program left, and where added items go.

The tests fail if a pending prompt is added beside itself, or if it is taken for an older one of the same words. They
fail if the items of one call are not compared with one another.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import persist
from persist import json_codec, turn
from persist.storage.cache import Replica
from persist.storage.content import encoded, id_in
from persist.storage.document import first_header
from persist.working_copy import WorkingCopy

Data = dict[str, Any]
PENDING = "Why?"


def copy_of(data: Data) -> WorkingCopy:
    return WorkingCopy(Replica(first_header(), encoded(data), (0, 0, 0, 0)))


# --- a prompt that another program left -------------------------------------------------------------------------------


def user(content: Any = PENDING, **more: Any) -> Data:
    return {"role": "user", "content": content, **more}


def answer(content: str = "So.", **more: Any) -> Data:
    return {"role": "assistant", "content": content, **more}


TOOL, SYSTEM = {"role": "tool", "content": PENDING}, {"role": "system", "content": PENDING}


def interrupted(messages: Any, pending: Any = PENDING, **more: Any) -> Data:
    """Return a document after the end of a turn that only its stream fields tell of."""
    fields = {"active_stream_id": "old", "pending_user_message": pending, "pending_started_at": 1.5, **more}
    document = copy_of(fields | ({} if messages is None else {"messages": copy.deepcopy(messages)}))
    turn.interrupt_foreign(document)
    data = document.content.decode()
    assert {name: data.pop(name) for name in turn.IDLE} == turn.IDLE
    return data


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        pytest.param([user()], 0, id="last"),
        pytest.param([user("Hello"), answer(), user()], 2, id="last of several"),
        pytest.param([user(), TOOL], 0, id="before a tool's result"),
        pytest.param([user(), TOOL, SYSTEM, "text", None, {}], 0, id="before what is no answer"),
        pytest.param([user(), user("And?")], 0, id="before another prompt"),
        pytest.param([user("And?"), user()], 1, id="behind another prompt"),
        pytest.param([answer(), user(), user("And?"), TOOL], 1, id="since the last answer"),
        pytest.param([user(), answer(), user()], 2, id="the later one of two"),
    ],
)
def test_pending_prompt_that_has_no_answer_is_marked(messages: list[Any], place: int) -> None:
    """A pending prompt among the messages since the last answer is not added again, and is marked once."""
    expected = copy.deepcopy(messages)
    expected[place]["interrupted"] = True
    assert interrupted(messages) == {"messages": expected}


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([user(), answer()], id="by the last message"),
        pytest.param([user(), TOOL, answer()], id="with a tool's result"),
        pytest.param([user(), answer(), TOOL, SYSTEM], id="with something behind the answer"),
        pytest.param([user(), answer(), answer()], id="twice"),
        pytest.param([user(), user("And?"), answer()], id="with another prompt"),
        pytest.param([user(), answer(), user("Next")], id="before a later prompt"),
    ],
)
def test_pending_prompt_that_is_answered_is_left_alone(messages: list[Any]) -> None:
    """The program died between its answer and the end of its turn: nothing is missing, and nothing was interrupted."""
    assert interrupted(messages) == {"messages": messages}


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([], id="no message"),
        pytest.param(None, id="no list yet"),
        pytest.param([user("And?")], id="another prompt"),
        pytest.param([TOOL, SYSTEM], id="of another role"),
        pytest.param([user(), answer(), user("Next"), answer()], id="an answered one of the same words"),
        pytest.param([user(), answer(), user("Next"), TOOL, answer(), TOOL], id="one of the turn before the last"),
        pytest.param([user(), answer(), user("1"), user("2"), answer()], id="one behind two prompts"),
        pytest.param([user([PENDING])], id="of another type"),
        pytest.param([PENDING, None, 5], id="what is no message"),
    ],
)
def test_pending_prompt_that_stands_nowhere_is_added(messages: list[Any] | None) -> None:
    """A prompt that only the field has is added (hermes-webui #1471).
    An older prompt of the same words is another one.
    """
    added = {"id": "old.prompt", "role": "user", "content": PENDING, "interrupted": True}
    assert interrupted(messages) == {"messages": [*(messages or []), added]}


@pytest.mark.parametrize("content", [[{"type": "text", "text": "hi"}], {"a": 1}, 5, True])
def test_pending_prompt_may_be_any_content(content: Any) -> None:
    """A pending prompt is compared as JSON: ``True`` is not ``1``."""
    assert interrupted([user(content)], content)["messages"] == [user(content, interrupted=True)]
    other = {True: 1, 5: 5.0}.get(content, [content]) if not isinstance(content, (list, dict)) else [content]
    assert len(interrupted([user(other)], content)["messages"]) == 2


@pytest.mark.parametrize("pending", [None, "", 0, [], {}])
def test_nothing_pending_adds_nothing(pending: Any) -> None:
    """If nothing is pending, the turn ends and nothing is added."""
    assert interrupted([answer()], pending) == {"messages": [answer()]}


@pytest.mark.parametrize("messages", ["text", {"a": 1}, 5])
def test_turn_ends_whatever_somebody_has_made_of_the_messages(messages: Any) -> None:
    """The turn ends. A value that is no list has nothing to mark, and stays as it is."""
    assert interrupted(messages) == {"messages": messages}


def test_attachments_move_to_the_prompt_once() -> None:
    """Attachments that only the fields have move to the prompt. A prompt that has attachments keeps its own."""
    files = ["a.png"]
    [marked] = interrupted([user()], pending_attachments=files)["messages"]
    assert marked == user(interrupted=True, attachments=files)
    [marked] = interrupted([user(attachments=["b.png"])], pending_attachments=files)["messages"]
    assert marked == user(interrupted=True, attachments=["b.png"])
    [added] = interrupted([], pending_attachments=files)["messages"]
    assert added == {"id": "old.prompt", **user(interrupted=True, attachments=files)}


def test_id_that_is_taken_is_not_given_again() -> None:
    """The added prompt gets no id that is taken: everybody would take two messages of one id for one."""
    found = interrupted([{"id": "old.prompt", "role": "user", "content": "And?"}])["messages"]
    assert found[1] == user(interrupted=True)


# --- items that are added once ----------------------------------------------------------------------------------------


def added(there: list[Any], items: list[Any], **options: Any) -> list[Any]:
    document = copy_of({"messages": there})
    lines = list(map(json_codec.encode, items))
    ids = [id_in(line, options.get("key", "id")) for line in lines]
    turn.add_once(document.list("messages"), lines, ids, **options)
    found: list[Any] = document.content.decode()["messages"]
    return found


def test_items_are_compared_with_one_another_too() -> None:
    """The same item twice is added once. For two different items of one id, the error names the place of the first."""
    a, b = {"id": "a"}, {"id": "b"}
    assert added([], [a, b, dict(a), b]) == [a, b]
    for there, items, place in (
        ([a], [b, {"id": "a", "x": 1}], 0),
        ([a], [b, {"id": "c"}, {"id": "b", "x": 1}], 1),
        ([a], [b, {"id": "c"}, {"id": "c", "x": 1}], 2),
        ([], ["text", {}, {"id": "c"}, {"id": "c", "x": 1}], 2),
    ):
        with pytest.raises(persist.MergeConflict) as caught:
            added(there, items)
        assert caught.value.path == ("messages", place)


def test_items_are_added_where_they_belong() -> None:
    """Items are added in their order, before a given place of the list."""
    assert added([1, 2], ["x", "y"], before=1) == [1, "x", "y", 2]
    assert added([1, 2], ["x", "y"], before=0) == ["x", "y", 1, 2]
    assert added([1, {"id": "a"}], [{"id": "a"}, "y"], before=1) == [1, "y", {"id": "a"}]


ids = st.sampled_from(["a", "b", 1, "1", True, None, 1.5])
items_of_keys = st.one_of(
    st.fixed_dictionaries({}, optional={"id": ids, "call": ids, "n": st.integers(0, 1)}), st.sampled_from(["a", 1, []])
)


@given(
    st.lists(items_of_keys, max_size=5), st.lists(items_of_keys, max_size=5), st.sampled_from(["id", "call", "n", None])
)
def test_what_is_added_is_what_was_missing(there: list[Any], items: list[Any], key: str | None) -> None:
    """An item is known if the last item of its key is the same, and refused if that one differs.
    A plain loop judges.
    """
    expected, is_refused = list(there), False
    for item in items:
        value = item.get(key) if type(item) is dict else None
        twins = [
            each
            for each in expected
            if type(each) is dict and type(each.get(key)) is type(value) in (str, int) and each[key] == value
        ]
        if key is None or not twins:
            expected.append(item)
        elif repr(sorted(twins[-1].items())) != repr(sorted(item.items())):
            is_refused = True
    if is_refused:
        with pytest.raises(persist.MergeConflict):
            added(there, items, key=key)
    else:
        assert repr(list(map(_sorted, added(there, items, key=key)))) == repr(list(map(_sorted, expected)))


def _sorted(item: Any) -> Any:
    return sorted(item.items(), key=repr) if type(item) is dict else item
