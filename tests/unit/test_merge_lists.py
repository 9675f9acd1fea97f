"""The merge of lists, tried on every small case and by properties, against an oracle that knows only promises.

The oracle counts. It neither matches nor orders items, so it shares nothing with the code that it judges.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist.errors import MergeConflict
from persist.merge import merge

Items = list[Any]
PREFERENCES = ("error", "mine", "theirs")

preferences = st.sampled_from(PREFERENCES)


def merged(base: Items, mine: Items, theirs: Items, prefer: Any = "error") -> Items | None:
    """Return the merged list, or None for a conflict."""
    try:
        result: Items = merge({"l": base}, {"l": mine}, {"l": theirs}, prefer=prefer)["l"]
    except MergeConflict:
        return None
    return result


def lists_of(letters: Iterable[Any], longest: int) -> list[Items]:
    """Return all lists over an alphabet up to a length."""
    return [list(items) for n in range(longest + 1) for items in itertools.product(letters, repeat=n)]


def first_seen_in_order(*lists: Items) -> bool:
    """Tell whether the letters come in the order of the alphabet. Any other case is one of these with other names."""
    return "abc".startswith("".join(dict.fromkeys(itertools.chain(*lists))))


# --- the oracle -------------------------------------------------------------------------------------------------------


def text(item: Any) -> str:
    return json.dumps(item, sort_keys=True)


def own_id(item: Any) -> Any:
    return item.get("id") if type(item) is dict else None


def ids_that_count(*lists: Items) -> set[Any]:
    """Return the ids that each list has at most once, always with one role."""
    counts = [Counter(map(own_id, items)) for items in lists]
    roles: dict[Any, set[str]] = {}
    for item in itertools.chain(*lists):
        roles.setdefault(own_id(item), set()).add(text(item.get("role")) if type(item) is dict else "")
    return {own for own in roles if own is not None and len(roles[own]) == 1 and max(each[own] for each in counts) == 1}


def assert_sound(base: Items, mine: Items, theirs: Items, result: Items, prefer: str = "error") -> None:
    """Check every promise about a merged list: no added item is missing, none is doubled, no text changes its role."""
    counted = ids_that_count(base, mine, theirs)
    *sides, found = (
        [text(item) for item in items if own_id(item) not in counted] for items in (base, mine, theirs, result)
    )
    b, m, t, r = map(Counter, (*sides, found))
    for each in b | m | t | r:
        one, other, change = m[each] - b[each], t[each] - b[each], r[each] - b[each]
        both = max(one + other, -b[each])
        if one > 0 < other or one < 0 > other:
            # The changes may be one change that both sides made, or two.
            assert change in range(min(one, other, both), max(one, other, both) + 1)
            assert abs(change) >= max(abs(one), abs(other))
        else:
            assert change == both
    for own in counted:
        was, ours, others = (
            next((item for item in items if own_id(item) == own), None) for items in (base, mine, theirs)
        )
        assert [item for item in result if own_id(item) == own] == merged_versions(was, ours, others, prefer)
    spoken = {speech(item) for items in (base, mine, theirs) for item in items}
    assert {speech(item) for item in result} <= spoken


def merged_versions(was: Any, ours: Any, others: Any, prefer: str) -> Items:
    """Return the items that an id must have: none, or one that takes each key from the side that changed it."""
    if was == ours or ours == others:
        return [] if others is None else [others]
    if was == others:
        return [] if ours is None else [ours]
    if None in (was, ours, others):
        # An edit against a removal, or two new items: the merge must have used the preference.
        preferred = {"mine": ours, "theirs": others}[prefer]
        return [] if preferred is None else [preferred]
    item: dict[str, Any] = {}
    for key in {**ours, **others}:
        before, mine, theirs = (each.get(key) for each in (was, ours, others))
        if mine in (before, theirs):
            value = theirs
        elif theirs == before:
            value = mine
        else:
            value = {"mine": mine, "theirs": theirs}[prefer]
        item |= {} if value is None else {key: value}
    return [item]


def speech(item: Any) -> Any:
    """Return the role and the text of a message."""
    return (text(item.get("role")), text(item.get("content"))) if type(item) is dict else item


# --- every small case -------------------------------------------------------------------------------------------------


def test_every_small_merge_of_items_without_ids_is_sound() -> None:
    """All lists of up to three items, three of a kind included, merge soundly with each preference, as all three
    versions.

    A preference changes nothing where there is no conflict, and settles most conflicts. Fails without the count at the
    end, and if a preference takes its side's whole run.
    """
    conflicts: Counter[str] = Counter()
    for base, mine, theirs in itertools.product(lists_of("abc", 3), repeat=3):
        if not first_seen_in_order(base, mine, theirs):
            continue
        unsettled, exchanged = merged(base, mine, theirs), merged(base, theirs, mine)
        assert (unsettled and sorted(unsettled)) == (exchanged and sorted(exchanged))
        if unsettled is not None:
            assert_sound(base, mine, theirs, unsettled)
        for prefer in ("mine", "theirs"):
            result = merged(base, mine, theirs, prefer)
            if unsettled is not None:
                assert result is not None
                assert sorted(result) == sorted(unsettled)
            elif result is not None:
                assert_sound(base, mine, theirs, result, prefer)
                conflicts["settled"] += 1
            else:
                conflicts["left"] += 1
    assert conflicts["settled"] > 4 * conflicts["left"]


MESSAGES = (
    {"id": "k", "role": "user", "content": "1"},
    {"id": "k", "role": "user", "content": "2"},
    {"id": "k", "role": "tool", "content": "3"},
    {"role": "user", "content": "4"},
)


def test_every_small_merge_of_messages_is_sound() -> None:
    """All lists of up to two messages merge soundly: two versions under one id, one id under another role, and no id.

    Fails if an id counts that a list has twice, or that has two roles.
    """
    for base, mine, theirs in itertools.product(lists_of(MESSAGES, 2), repeat=3):
        for prefer in PREFERENCES:
            result = merged(base, mine, theirs, prefer)
            if result is not None:
                assert_sound(base, mine, theirs, result, prefer)


PIVOT, NEW = "pivot", "new"


def test_every_small_change_of_one_side_is_kept_as_it_is() -> None:
    """If the other side has added an item elsewhere, the result is exactly both changes, whichever side comes first.

    Fails if a run that one side left alone does not become the other side's.
    """
    for base, side in itertools.product(lists_of("abc", 3), repeat=2):
        behind, before = ([PIVOT, *base], [PIVOT, *side]), ([*base, PIVOT], [*side, PIVOT])
        for was, changed, added in ((*behind, [NEW, *behind[0]]), (*before, [*before[0], NEW])):
            both = [NEW, *changed] if added[0] == NEW else [*changed, NEW]
            assert merged(was, changed, added) == merged(was, added, changed) == both


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_every_small_change_that_both_make_stands_once_before_what_each_appends(prefer: str) -> None:
    """F1: both sides change old items without ids in the same way, and each may append an item.

    Fails if the common beginning is not taken once. Where old items are equal, it also fails if only runs are compared.
    """
    for base, alike in itertools.product(lists_of("abc", 3), lists_of("abc", 4)):
        if len(alike) >= len(base):
            assert merged(base, [*alike, "m"], [*alike, "t"], prefer) == [*alike, "t", "m"]
            assert merged(base, [*alike, "m"], [*alike], prefer) == [*alike, "m"]
            assert merged(base, [*alike], [*alike, "t"], prefer) == [*alike, "t"]


# --- properties -------------------------------------------------------------------------------------------------------

ids = st.sampled_from([None, "", "0", 0, 1, "a", "b", "c"])
roles = st.sampled_from(["user", "assistant", None])


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a message with an id, without one, or with a placeholder that other messages have, too."""
    item: dict[str, Any] = {"role": draw(roles), "content": draw(st.sampled_from("xyz"))}
    own = draw(ids)
    return {key: value for key, value in {"id": own, **item}.items() if value is not None}


CHANGES: dict[str, list[Any]] = {"content": ["v", "w"], "role": ["user", "tool"], "seen": [1, 2]}


@st.composite
def edits_of(draw: st.DrawFn, items: Items, new: st.SearchStrategy[Any]) -> Items:
    """Draw the list after edits: some items removed or with another content, role or stamp, one moved, some added."""
    edited = []
    for item in items:
        what = draw(st.sampled_from(["keep", "keep", "remove", "remove", *CHANGES]))
        if what in CHANGES:
            edited.append({**item, what: draw(st.sampled_from(CHANGES[what]))})
        elif what == "keep":
            edited.append(item)
    if draw(st.booleans()) and edited:
        edited.insert(0, edited.pop())
    for item in draw(st.lists(new, max_size=2)):
        edited.insert(draw(st.sampled_from([0, len(edited) // 2, len(edited)])), item)
    return edited


@given(st.data(), preferences)
def test_any_merge_of_messages_is_sound(data: st.DataObject, prefer: str) -> None:
    """With or without ids, with ids that a list has twice, and with placeholders, nothing is lost or doubled.
    No role changes.

    Fails without the count at the end, and if an id counts that a list has twice, or that has two roles.
    """
    base = data.draw(st.lists(messages(), max_size=6))
    mine, theirs = (data.draw(edits_of(base, messages())) for _ in range(2))
    result = merged(base, mine, theirs, prefer)
    if result is not None:
        assert_sound(base, mine, theirs, result, prefer)


@given(st.data(), preferences)
def test_what_three_writers_add_is_there_once(data: st.DataObject, prefer: str) -> None:
    """Each writer saves its edits of one base on top of what the others have saved, or gets a conflict.

    An added message has an id of its own, or none, or a placeholder that other messages have, too. Fails without the
    count at the end, and if the placeholder counts.
    """
    placeholder = {"id": "0", "content": "old"}
    base = [placeholder, placeholder, *data.draw(st.lists(messages(), max_size=4))]
    numbers = itertools.count()

    def new_message(role: str | None, own: str) -> dict[str, Any]:
        content = str(next(numbers))
        item: dict[str, Any] = {"role": role, "content": content}
        return {**item, "id": own.format(content)} if own else item

    new = st.builds(new_message, roles, st.sampled_from(["", "0", "new {}"]))
    committed, added = base, list[str]()
    for _ in range(3):
        side = data.draw(edits_of(base, new))
        result = merged(base, side, committed, prefer)
        if result is not None:
            assert_sound(base, side, committed, result, prefer)
            committed = result
            added += [item["content"] for item in side if item["content"].isdigit()]
    assert sorted(item["content"] for item in committed if item["content"].isdigit()) == sorted(added)


@given(st.data(), preferences)
def test_three_writers_who_stamp_the_same_messages_lose_and_double_nothing(data: st.DataObject, prefer: str) -> None:
    """F1: three writers stamp the old messages alike, and each appends its own. No preference gives a conflict.

    Fails if a common change is taken from both sides.
    """
    base = data.draw(st.lists(messages(), max_size=6))
    stamped = [{**item, "seen": 1} for item in base]
    own = [
        [{"role": "user", "content": f"{writer}{n}"} for n in range(data.draw(st.integers(0, 2)))] for writer in "pqr"
    ]
    committed = base
    for new in own:
        result = merged(base, [*stamped, *new], committed, prefer)
        assert result is not None
        committed = result
    assert committed == [*stamped, *itertools.chain(*own)]


# --- the cases that were lost ----------------------------------------------------------------------------------------

QUESTION: dict[str, Any] = {"role": "user", "content": "Why?"}
PARTIAL: dict[str, Any] = {"role": "assistant", "content": "Beca", "partial": True}
PROMPT: dict[str, Any] = {"role": "user", "content": "And then?"}


@pytest.mark.parametrize("prefer", ["mine", "theirs"])
@pytest.mark.parametrize(
    "own", [lambda _: {}, lambda n: {"id": f"m{n}"}, lambda _: {"id": ""}], ids=["no ids", "ids", "placeholder ids"]
)
def test_prompt_beside_a_partial_that_was_dropped_or_edited_is_kept(
    own: Callable[[int], dict[str, Any]], prefer: str
) -> None:
    """F1: one side drops the partial and adds a prompt. The other side drops the partial, too, or goes on with it.

    Fails if a preference takes its side's whole list, or if items without ids merge by position.
    """
    question, partial, prompt = ({**own(n), **item} for n, item in enumerate((QUESTION, PARTIAL, PROMPT)))
    longer, tool = {**partial, "content": "Because"}, {"role": "tool", "content": "42"}
    for other in ([question], [question, longer], [question, partial, tool]):
        for mine, theirs in (([question, prompt], other), (other, [question, prompt])):
            result = merged([question, partial], mine, theirs, prefer)
            assert result is not None
            assert_sound([question, partial], mine, theirs, result, prefer)
            assert result[0] == question
            assert result.count(prompt) == 1
            assert partial not in result
