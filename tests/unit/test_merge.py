"""Three-way merge: each side's changes since the base, and nothing else.
The laws come first, then each rule by example.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from persist.errors import InvalidArgument, MergeConflict
from persist.json_codec import same
from persist.merge import MISSING, align, check_policies, count_removed, label, merge
from persist.patch import patch

Document = dict[str, Any]
CONFLICT = "conflict"

# --- documents as chat servers have them, and what people do to them --------------------------------------------------

scalars = st.sampled_from([None, True, False, 0, 1, 0.0, -0.0, 1.0, "", "a", "b"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
documents = st.dictionaries(st.sampled_from(["title", "meta", "messages", "tags"]), values, max_size=4)
words = st.sampled_from("xyz")


def message(message_id: str, content: str) -> Document:
    return {"id": message_id, "role": "user", "content": content}


@st.composite
def conversations(draw: st.DrawFn) -> Document:
    """Draw a document with a list of messages that have ids, and a list of words that have none."""
    contents = draw(st.lists(words, max_size=6))
    return {
        "title": draw(words),
        "meta": draw(st.dictionaries(st.sampled_from("abc"), words, max_size=3)),
        "messages": [message(f"m{i}", content) for i, content in enumerate(contents)],
        "words": draw(st.lists(words, max_size=6)),
    }


@st.composite
def edited_list(
    draw: st.DrawFn, items: list[Any], new_item: Callable[[st.DrawFn, int], Any], *, moves: bool = True
) -> list[Any]:
    """Draw the list after a few edits: items added, removed, replaced by another version, and moved."""
    items = copy.deepcopy(items)
    for step in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(items)))
        what = draw(st.sampled_from(["append", "insert", "remove", "change"] + ["move"] * moves))
        if what == "append":
            items.append(new_item(draw, step))
        elif what == "insert":
            items.insert(place, new_item(draw, step))
        elif place < len(items):
            item = items.pop(place)
            if what == "change":
                items.insert(place, {**item, "content": draw(words) * 2} if type(item) is dict else draw(words) * 2)
            elif what == "move":
                items.insert(draw(st.integers(0, len(items))), item)
    return items


@st.composite
def edited(draw: st.DrawFn, base: Document, side: str, *, moves: bool = True) -> Document:
    """Draw the document after edits of `side`. New messages have ids of that side.
    New words may be the same on both sides.
    """
    data = copy.deepcopy(base)
    for field in draw(st.sets(st.sampled_from(["title", "extra"]))):
        data[field] = draw(words)
    if draw(st.booleans()):
        data["meta"] = draw(st.dictionaries(st.sampled_from("abc"), words, max_size=3))

    def new_message(draw: st.DrawFn, step: int) -> Document:
        return message(f"{side}{step}", draw(words))

    data["messages"] = draw(edited_list(base["messages"], new_message, moves=moves))
    data["words"] = draw(edited_list(base["words"], lambda draw, _: draw(words), moves=moves))
    return data


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[Document, Document, Document]:
    base = draw(conversations())
    return base, draw(edited(base, "mine")), draw(edited(base, "theirs"))


def outcome(base: Document, mine: Document, theirs: Document, prefer: Any = "error") -> Any:
    try:
        return merge(base, mine, theirs, prefer=prefer)
    except MergeConflict:
        return CONFLICT


def ids(data: Document) -> list[str]:
    return [item["id"] for item in data["messages"]]


def without_order(data: Document) -> Document:
    """Return the document with its lists sorted, because two appended blocks may come in either order."""
    return {key: sorted(value, key=repr) if type(value) is list else value for key, value in data.items()}


def sharing(base: list[Any], side: list[Any]) -> list[Any]:
    """Return the side with the base's own objects where both begin alike, as two bodies of the same lines have them."""
    lead = next(
        (i for i, (one, other) in enumerate(zip(base, side, strict=False)) if not same(one, other)),
        min(len(base), len(side)),
    )
    return base[:lead] + side[lead:]


# --- the laws ---------------------------------------------------------------------------------------------------------


@given(documents, documents)
def test_merging_with_an_unchanged_side_gives_the_other_side(base: Document, side: Document) -> None:
    """merge(b, m, b) == m and merge(b, b, t) == t, type for type."""
    assert same(merge(base, side, base), side)
    assert same(merge(base, base, side), side)


@given(st.data())
def test_a_side_is_kept_whole_beside_a_change_of_something_else(data: st.DataObject) -> None:
    """The first law holds below the top: theirs touches one other key of every object, and all of mine stays."""
    base = data.draw(conversations())
    mine = data.draw(edited(base, "mine"))
    theirs = {"seen": 1, "inner": {"seen": 1, **base}}
    merged = merge({"inner": base}, {"inner": mine}, theirs)
    assert same(merged, {"seen": 1, "inner": {"seen": 1, **mine}})


@given(two_sides())
def test_what_both_sides_did_alike_is_no_conflict_where_items_have_ids(
    sides: tuple[Document, Document, Document],
) -> None:
    """merge(b, x, x) == x: two writers who made the same change have no conflict."""
    base, mine, _ = ({**data, "words": []} for data in sides)
    assert same(merge(base, mine, copy.deepcopy(mine)), mine)


@given(st.data())
def test_edits_in_different_parts_of_a_list_are_both_kept_in_place(data: st.DataObject) -> None:
    """Edits before an untouched item and behind it by the two sides are both kept exactly, whichever comes first."""

    def new(side: str) -> Callable[[st.DrawFn, int], Any]:
        return lambda draw, step: draw(words) if draw(st.booleans()) else message(f"{side}{step}", draw(words))

    items = st.lists(words, max_size=4)
    before: list[Any] = [message("m0", "x"), *data.draw(items), message("m1", "x")]
    behind: list[Any] = [*data.draw(items), message("m2", "x"), message("m3", "x")]
    pivot: list[Any] = [message("pivot", "")]
    before_mine = data.draw(edited_list(before, new("mine")))
    behind_theirs = data.draw(edited_list(behind, new("theirs")))
    base, mine, theirs = before + pivot + behind, before_mine + pivot + behind, before + pivot + behind_theirs
    both = {"list": before_mine + pivot + behind_theirs}
    assert same(merge({"list": base}, {"list": mine}, {"list": theirs}), both)
    assert same(merge({"list": base}, {"list": theirs}, {"list": mine}), both)


@given(two_sides())
def test_the_sides_can_be_exchanged_but_for_the_order_of_additions(sides: tuple[Document, Document, Document]) -> None:
    """Whichever side commits first, the same edits conflict, or the result has the same items."""
    base, mine, theirs = sides
    one, other = outcome(base, mine, theirs), outcome(base, theirs, mine)
    if CONFLICT in (one, other):
        assert one == other
    else:
        assert same(without_order(one), without_order(other))


@given(two_sides())
def test_no_message_is_lost_doubled_or_revived(sides: tuple[Document, Document, Document]) -> None:
    """The result has the ids of both sides, without those that either side removed, each once."""
    base, mine, theirs = sides
    merged = outcome(base, mine, theirs)
    assume(merged != CONFLICT)
    removed = {*ids(base)} - ({*ids(mine)} & {*ids(theirs)})
    assert sorted(ids(merged)) == sorted(({*ids(mine)} | {*ids(theirs)}) - removed)


@given(two_sides(), st.sampled_from(["mine", "theirs"]))
def test_no_message_is_lost_or_doubled_by_a_preference(sides: tuple[Document, Document, Document], prefer: Any) -> None:
    """Whichever side is preferred, the result has every id that either side added, and that both sides kept, each once.

    It has no id that both sides removed.
    """
    base, mine, theirs = sides
    merged = outcome(base, mine, theirs, prefer)
    assume(merged != CONFLICT)
    b, m, t, found = ({*ids(data)} for data in (base, mine, theirs, merged))
    assert len(ids(merged)) == len(found)
    assert ((m | t) - b) | (m & t) <= found <= m | t


@given(two_sides())
def test_no_word_is_lost_or_revived(sides: tuple[Document, Document, Document]) -> None:
    """Items without ids are kept, too. The result has a side's new word as often as that side.
    A word that a side has removed altogether is gone.
    """
    base, mine, theirs = sides
    merged = outcome(base, mine, theirs)
    assume(merged != CONFLICT)
    b, m, t, r = (Counter[str](data["words"]) for data in (base, mine, theirs, merged))
    for word in b | m | t | r:
        if not b[word]:
            assert r[word] >= max(m[word], t[word])
        elif (not m[word] and t[word] <= b[word]) or (not t[word] and m[word] <= b[word]):
            assert r[word] == 0


@given(two_sides())
def test_every_version_in_the_result_is_somebodys(sides: tuple[Document, Document, Document]) -> None:
    """Where one side left a message alone, the result has the other side's version."""
    base, mine, theirs = sides
    merged = outcome(base, mine, theirs)
    assume(merged != CONFLICT)
    was, m, t = ({item["id"]: item for item in data["messages"]} for data in (base, mine, theirs))
    for item in merged["messages"]:
        own = item["id"]
        untouched = same(was.get(own, MISSING), m.get(own, MISSING))
        assert same(item, t[own] if untouched else m[own])


@given(two_sides())
def test_objects_that_the_sides_share_change_nothing(sides: tuple[Document, Document, Document]) -> None:
    """An object that all sides share is not compared. The result is the same as with a comparison."""
    base, mine, theirs = sides
    expected = outcome(*copy.deepcopy(sides))
    for field in ("messages", "words"):
        mine[field], theirs[field] = (sharing(base[field], side[field]) for side in (mine, theirs))
    assert outcome(base, mine, theirs) == expected
    if expected is not CONFLICT:
        target = copy.deepcopy(mine)
        patch(target, mine, merge(base, mine, theirs))
        assert same(target, expected)


@given(two_sides(), st.sampled_from(["error", "mine", "theirs"]))
def test_the_arguments_of_a_merge_are_never_changed(sides: tuple[Document, Document, Document], prefer: Any) -> None:
    """A merge leaves base, mine and theirs as they are, whatever the result."""
    before = copy.deepcopy(sides)
    outcome(*sides, prefer)
    assert same(list(sides), list(before))


# --- equality ---------------------------------------------------------------------------------------------------------

LOOK_ALIKES = [True, 1, 1.0, "1", False, 0, 0.0, -0.0, None, "", [], {}, [1], [1.0], {"a": 0}, {"a": False}]


@pytest.mark.parametrize("one", LOOK_ALIKES, ids=repr)
def test_a_value_is_the_same_as_itself_only(one: Any) -> None:
    """Equality is of JSON type and value, sign of zero included, at every level."""
    for other in LOOK_ALIKES:
        assert same(one, copy.deepcopy(other)) == (one is other)
        assert same({"x": [one]}, {"x": [other]}) == (one is other)


def test_the_order_of_keys_is_no_part_of_a_value() -> None:
    """Objects that differ only in the order of their keys are the same. Lists in another order are not."""
    assert same({"a": 1, "b": [1]}, {"b": [1], "a": 1})
    assert not same([1, 2], [2, 1])


def test_a_change_of_type_is_a_change() -> None:
    """``1`` to ``True`` is an edit, and conflicts with ``1.0``."""
    assert merge({"a": 1, "b": 1}, {"a": True, "b": 1}, {"a": 1, "b": 2})["a"] is True
    with pytest.raises(MergeConflict):
        merge({"a": 1}, {"a": True}, {"a": 1.0})


def test_missing_is_one_object_everywhere() -> None:
    """`persist.MISSING` is false, is itself after pickling, and is not None."""
    assert pickle.loads(pickle.dumps(MISSING)) is MISSING
    assert not MISSING
    assert repr(MISSING) == "MISSING"


# --- objects and lists by example -------------------------------------------------------------------------------------

A, B, C = (message(name, name) for name in "ABC")
A2, A3, B2 = {**A, "content": "A2"}, {**A, "content": "A3"}, {**B, "content": "B2"}
A_SEEN = {**A, "seen": True}
X, Y = message("X", "x"), message("Y", "y")
X2, X_TOOL = {**X, "content": "x2"}, {**X, "role": "tool"}

MERGED: list[tuple[Any, ...]] = [
    ("different fields", {"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}),
    ("different keys of an object", {"o": {}}, {"o": {"m": 1}}, {"o": {"t": 1}}, {"o": {"t": 1, "m": 1}}),
    ("objects that both made", {}, {"o": {"m": 1}}, {"o": {"t": 1}}, {"o": {"t": 1, "m": 1}}),
    ("a deletion and an edit elsewhere", {"a": 0, "b": 0}, {"b": 0}, {"a": 0, "b": 1}, {"b": 1}),
    ("the same deletion", {"a": 0}, {}, {}, {}),
    ("the same value", {"a": 0}, {"a": 1}, {"a": 1}, {"a": 1}),
    ("null is a value", {"a": 0}, {"a": None}, {"a": 0}, {"a": None}),
    ("two appends", {"l": [A]}, {"l": [A, X]}, {"l": [A, Y]}, {"l": [A, Y, X]}),
    ("two appends to a new list", {}, {"l": [X]}, {"l": [Y]}, {"l": [Y, X]}),
    ("one message appended by both", {"l": [A]}, {"l": [A, X]}, {"l": [A, X]}, {"l": [A, X]}),
    ("one of them appended by both", {"l": [A]}, {"l": [A, X]}, {"l": [A, X, Y]}, {"l": [A, X, Y]}),
    ("equal words appended by both", {"l": ["a"]}, {"l": ["a", "b"]}, {"l": ["a", "b"]}, {"l": ["a", "b"]}),
    (
        "one of equal words removed in front",
        {"l": [1, 1, 1, 2, 3]},
        {"l": [1, 1, 2, 3]},
        {"l": [1, 1, 1, 2, 3, 4]},
        {"l": [1, 1, 2, 3, 4]},
    ),
    ("an append and an edit", {"l": [A, B]}, {"l": [A2, B]}, {"l": [A, B, X]}, {"l": [A2, B, X]}),
    ("an append and a removal far away", {"l": [A, B, C]}, {"l": [B, C]}, {"l": [A, B, C, X]}, {"l": [B, C, X]}),
    ("two edits of one message", {"l": [A]}, {"l": [A2]}, {"l": [A_SEEN]}, {"l": [{**A2, "seen": True}]}),
    ("the same removal", {"l": [A, B]}, {"l": [B]}, {"l": [B]}, {"l": [B]}),
    ("the same replacement", {"l": [A, B]}, {"l": [X, B]}, {"l": [X, B]}, {"l": [X, B]}),
    ("the same edit of a word", {"l": ["a", "b"]}, {"l": ["c", "b"]}, {"l": ["c", "b"]}, {"l": ["c", "b"]}),
    (
        "one message moved by both",
        {"l": [A, B, C, X, Y]},
        {"l": [B, C, A, X, Y]},
        {"l": [B, C, X, A, Y]},
        {"l": [B, C, A, X, Y]},
    ),
    ("a move and an edit of one message", {"l": [A, B, C]}, {"l": [B, C, A]}, {"l": [A2, B, C]}, {"l": [B, C, A2]}),
    ("removals of neighbours", {"l": [A, B, C]}, {"l": [B, C]}, {"l": [A, C]}, {"l": [C]}),
    ("two truncations", {"l": [A, B, C]}, {"l": [A]}, {"l": [A, B]}, {"l": [A]}),
    ("one id added at two places", {"l": [A, B]}, {"l": [X, A, B]}, {"l": [A, B, X]}, {"l": [X, A, B]}),
    ("one id added between others", {"l": []}, {"l": [Y, X]}, {"l": [X, B]}, {"l": [X, B, Y]}),
    ("one id under two roles", {"l": [A]}, {"l": [A, X]}, {"l": [A, X_TOOL]}, {"l": [A, X_TOOL, X]}),
    ("one id twice on one side", {"l": []}, {"l": [X, X2]}, {"l": [X]}, {"l": [X, X2]}),
    ("one id twice on the other", {"l": []}, {"l": [X]}, {"l": [X, X2]}, {"l": [X, X2]}),
    (
        "items without ids replaced alike, and more",
        {"l": ["a", "b"]},
        {"l": ["c", "d", "m"]},
        {"l": ["c", "d", "t"]},
        {"l": ["c", "d", "t", "m"]},
    ),
    (
        "items without ids replaced, and additions on both sides of them",
        {"l": ["a", "b"]},
        {"l": ["c", "d"]},
        {"l": ["s", "a", "b", "t"]},
        {"l": ["s", "c", "d", "t"]},
    ),
    (
        "a word edited, and added again by the other",
        {"l": ["a", "b"]},
        {"l": ["c", "d"]},
        {"l": ["a", "b", "a"]},
        {"l": ["c", "d", "a"]},
    ),
    ("a move and an edit of another", {"l": [A, B, C]}, {"l": [B, C, A]}, {"l": [A, B2, C]}, {"l": [B2, C, A]}),
    ("a message moved whole", {"l": [A, B, C]}, {"l": [C, A, B]}, {"l": [A, B, C]}, {"l": [C, A, B]}),
    ("ids of two types", {"l": []}, {"l": [{"id": 1}]}, {"l": [{"id": "1"}]}, {"l": [{"id": "1"}, {"id": 1}]}),
    (
        "an id that is null is no id",
        {"l": []},
        {"l": [{"id": None, "a": 1}]},
        {"l": [{"id": None}]},
        {"l": [{"id": None}, {"id": None, "a": 1}]},
    ),
]


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "expected"), [case[1:] for case in MERGED], ids=[case[0] for case in MERGED]
)
def test_changes_that_do_not_contradict_are_both_kept(
    base: Document, mine: Document, theirs: Document, expected: Any
) -> None:
    """Objects merge by key, lists by item. Where both sides added items, theirs come before mine."""
    assert outcome(base, mine, theirs) == expected


TWO_VALUES = "two different values"
BESIDE = "both sides changed the same items, or items side by side"
ONE_ID = "one id, two contents"
MOVED = "one side moved what the other moved or removed"

IN_O = [{"o": {"p": {"a": number}}} for number in range(3)]
FOUR, BEHIND_C, GONE = [A, B, C, X], [B, C, A, X], [B, C, X]
WORDS, THIRD, FOURTH = [1, 2, 3, 4, 5], [2, 3, 1, 4, 5], [2, 3, 4, 1, 5]

CONFLICTS: list[tuple[Any, ...]] = [
    ("two values", {"a": 0}, {"a": 1}, {"a": 2}, TWO_VALUES, ("a",), (0, 1, 2)),
    ("two new values", {}, {"a": 1}, {"a": 2}, TWO_VALUES, ("a",), (MISSING, 1, 2)),
    ("edit against deletion", {"a": 0}, {"a": 1}, {}, TWO_VALUES, ("a",), (0, 1, MISSING)),
    ("deletion against edit", {"a": 0}, {}, {"a": 2}, TWO_VALUES, ("a",), (0, MISSING, 2)),
    ("two types", {"a": 0}, {"a": []}, {"a": {}}, TWO_VALUES, ("a",), (0, [], {})),
    ("zeros of two signs", {"a": 1.0}, {"a": 0.0}, {"a": -0.0}, TWO_VALUES, ("a",), (1.0, 0.0, -0.0)),
    ("deep in an object", *IN_O, TWO_VALUES, ("o", "p", "a"), (0, 1, 2)),
    (
        "one message edited twice",
        {"l": [A]},
        {"l": [A2]},
        {"l": [A3]},
        TWO_VALUES,
        ("l", 0, "content"),
        ("A", "A2", "A3"),
    ),
    (
        "one word edited twice",
        {"l": ["a", "b"]},
        {"l": ["a", "c"]},
        {"l": ["a", "d"]},
        BESIDE,
        ("l",),
        (["a", "b"], ["a", "c"], ["a", "d"]),
    ),
    (
        "two edits of one item without id",
        {"l": [{"a": 0, "b": 0}]},
        {"l": [{"a": 1, "b": 0}]},
        {"l": [{"a": 0, "b": 1}]},
        BESIDE,
        ("l",),
        ([{"a": 0, "b": 0}], [{"a": 1, "b": 0}], [{"a": 0, "b": 1}]),
    ),
    ("a message edited and removed", {"l": [A, B]}, {"l": [A2, B]}, {"l": [B]}, TWO_VALUES, ("l", 0), (A, A2, MISSING)),
    ("a message removed and edited", {"l": [A, B]}, {"l": [A]}, {"l": [A, B2]}, TWO_VALUES, ("l", 1), (B, MISSING, B2)),
    (
        "append against truncation",
        {"l": [A, B]},
        {"l": [A, B, X]},
        {"l": [A]},
        BESIDE,
        ("l",),
        ([A, B], [A, B, X], [A]),
    ),
    ("truncation against append", {"l": [A, B]}, {"l": []}, {"l": [A, B, X]}, BESIDE, ("l",), ([A, B], [], [A, B, X])),
    ("two replacements", {"l": [A]}, {"l": [X]}, {"l": [Y]}, BESIDE, ("l",), ([A], [X], [Y])),
    ("one id, two contents", {"l": [A]}, {"l": [A, X]}, {"l": [A, X2]}, ONE_ID, ("l", 1), (MISSING, X, X2)),
    ("one id, two contents, in a new list", {}, {"l": [X]}, {"l": [X2]}, ONE_ID, ("l", 0), (MISSING, X, X2)),
    ("moved and removed", {"l": FOUR}, {"l": BEHIND_C}, {"l": GONE}, MOVED, ("l",), (FOUR, BEHIND_C, GONE)),
    ("removed and moved", {"l": FOUR}, {"l": GONE}, {"l": BEHIND_C}, MOVED, ("l",), (FOUR, GONE, BEHIND_C)),
    ("one word moved to two places", {"l": WORDS}, {"l": THIRD}, {"l": FOURTH}, MOVED, ("l",), (WORDS, THIRD, FOURTH)),
]


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "reason", "path", "three"),
    [case[1:] for case in CONFLICTS],
    ids=[case[0] for case in CONFLICTS],
)
def test_a_contradiction_is_a_conflict_that_carries_its_facts(
    base: Document,
    mine: Document,
    theirs: Document,
    reason: str,
    path: tuple[str | int, ...],
    three: tuple[Any, Any, Any],
) -> None:
    """`MergeConflict` names the place and the kind, and has the three values as attributes."""
    with pytest.raises(MergeConflict) as caught:
        merge(base, mine, theirs)
    conflict = caught.value
    assert (conflict.path, conflict.reason) == (path, reason)
    assert same([conflict.base, conflict.mine, conflict.theirs], list(three))


UNSETTLED = [case for case in CONFLICTS if case[4] == MOVED]
OF_ONE_PLACE = [case for case in CONFLICTS if case[4] != BESIDE and case not in UNSETTLED]


@pytest.mark.parametrize(
    ("base", "mine", "theirs"), [case[1:4] for case in OF_ONE_PLACE], ids=[case[0] for case in OF_ONE_PLACE]
)
def test_a_preference_settles_a_conflict_and_nothing_else(base: Document, mine: Document, theirs: Document) -> None:
    """``prefer`` puts that side at the place of the conflict. The rest is merged as usual."""
    mine, theirs = {**mine, "m": 1}, {**theirs, "t": 1}
    assert same(merge(base, mine, theirs, prefer="mine"), {**mine, "t": 1})
    assert same(merge(base, mine, theirs, prefer="theirs"), {**theirs, "m": 1})


@pytest.mark.parametrize("prefer", ["mine", "theirs"])
def test_preferred_edits_side_by_side_stand_where_they_were_made(prefer: Any) -> None:
    """Without ids, two edits of neighbours are one run. A preference takes both, and in their order."""
    base, first, second = ["a", "b", "c", "d"], ["A", "b", "C", "d"], ["a", "B", "c", "d"]
    for mine, theirs in ((first, second), (second, first)):
        merged = merge({"l": base}, {"l": mine}, {"l": theirs}, prefer=prefer)
        assert merged["l"] == ["A", "B", "C", "d"]


@pytest.mark.parametrize(
    ("mine", "theirs", "path"),
    [([B, A2], [A3, B], ("l", 1, "content")), ([A2], [X, A3, B], ("l", 0, "content")), ([A], [X, A, B2], ("l", 1))],
    ids=["moved in mine", "moved in theirs", "removed in mine"],
)
def test_a_conflict_in_an_item_names_its_place_in_mine(mine: Any, theirs: Any, path: Any) -> None:
    """The error names the item's place in mine, whatever was moved.
    An item that mine has removed is at its old place.
    """
    with pytest.raises(MergeConflict) as caught:
        merge({"l": [A, B]}, {"l": mine}, {"l": theirs})
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "if_mine", "if_theirs"),
    [
        ([A, B], [A, B, X], [A], [A, X], [A, X]),
        ([A, B], [], [A, B, X], [X], [X]),
        ([A], [X], [Y], [X, Y], [Y, X]),
        ([A, B, C], [A, B, C, X], [A, Y], [A, X, Y], [A, Y, X]),
        ([A, B], [A2, B, X], [A, Y], [A2, Y, X], [A2, Y, X]),
        ([A, B], [A, B2, X], [A], [A, B2, X], [A, X]),
        (["a", "b"], ["a", "m"], ["a", "t"], ["a", "m", "t"], ["a", "t", "m"]),
    ],
)
def test_a_preference_drops_nothing_that_was_added(
    base: Any, mine: Any, theirs: Any, if_mine: Any, if_theirs: Any
) -> None:
    """An item that one side adds beside a removed one is kept. At a conflict, the preferred side's items come first.

    The result is never one side's whole list, which lacks the other's items.
    """
    assert merge({"l": base}, {"l": mine}, {"l": theirs}, prefer="mine") == {"l": if_mine}
    assert merge({"l": base}, {"l": mine}, {"l": theirs}, prefer="theirs") == {"l": if_theirs}


@pytest.mark.parametrize("prefer", ["mine", "theirs"])
@pytest.mark.parametrize("case", UNSETTLED, ids=lambda case: case[0])
def test_some_conflicts_no_preference_settles(case: tuple[Any, ...], prefer: Any) -> None:
    """Some conflicts stay in spite of a preference, because one side alone would drop what the other has added."""
    with pytest.raises(MergeConflict, match=case[4]):
        merge(*case[1:4], prefer=prefer)


def test_a_preference_keeps_what_does_not_conflict_in_one_message() -> None:
    """A conflict in one key of a message does not drop the other side's other keys."""
    mine, theirs = {"l": [{**A2, "seen": 1}]}, {"l": [{**A3, "read": 1}]}
    assert merge({"l": [A]}, mine, theirs, prefer="mine") == {"l": [{**A2, "seen": 1, "read": 1}]}
    assert merge({"l": [A]}, mine, theirs, prefer="theirs") == {"l": [{**A3, "seen": 1, "read": 1}]}


def test_the_greatest_depth_is_merged_and_patched() -> None:
    """A document at the codec's limit of nesting does not exhaust the stack."""

    def deep(leaf: str) -> Document:
        value: Any = {"leaf": leaf}
        for level in range(197):
            value = [value] if level % 2 else {"k": value, leaf: 1}
        return {"top": value}

    base, mine, theirs = deep("b"), deep("b"), deep("b")
    mine["mine"], theirs["top"]["theirs"] = 1, 1
    innermost = mine["top"]
    while "leaf" not in innermost:
        innermost = innermost["k"] if type(innermost) is dict else innermost[0]
    innermost["leaf"] = "m"
    merged = merge(base, mine, theirs)
    patch(theirs, copy.deepcopy(theirs), merged)
    assert same(theirs, merged)
    assert merged["top"]["theirs"] == merged["mine"] == 1


# --- policies ---------------------------------------------------------------------------------------------------------

SETTLED = [
    ("sum", 10, 13, 12, 15),
    ("sum", 10, 7, 12, 9),
    ("sum", MISSING, 3, 2, 5),
    ("sum", 1, 1.5, 2, 2.5),
    ("sum", 10, 11, 11, 12),
    ("sum", 0, 10**400, 1, 10**400 + 1),
    ("max", 1, 5, 3, 5),
    ("max", 1, 3, 5, 5),
    ("max", 9, 2, 1, 2),
    ("max", MISSING, 2, 2.5, 2.5),
    ("max", "2026-01-01", "2026-03-01", "2026-02-01", "2026-03-01"),
    ("max", None, "b", "a", "b"),
    ("max", 0, 10**400, 1.5, 10**400),
    ("mine", 0, 1, 2, 1),
    ("mine", [A], [A, X], [A, Y], [A, X]),
    ("mine", 0, MISSING, 2, MISSING),
    ("mine", 0, {"a": 1}, None, {"a": 1}),
    ("theirs", 0, 1, 2, 2),
    ("theirs", 0, 1, MISSING, MISSING),
    ("theirs", MISSING, "x", 2, 2),
]


def short(value: Any) -> str:
    return repr(value)[:20]


def field(value: Any) -> Document:
    return {} if value is MISSING else {"f": value}


@pytest.mark.parametrize(("policy", "base", "mine", "theirs", "expected"), SETTLED, ids=short)
def test_a_policy_settles_its_field(policy: Any, base: Any, mine: Any, theirs: Any, expected: Any) -> None:
    """``sum`` adds both changes, ``max`` keeps the greater value, ``mine`` and ``theirs`` take that side."""
    assert same(merge(field(base), field(mine), field(theirs), {"f": policy}), field(expected))


NO_POLICY_HELPS = [
    ("sum", 1, "2", 3),
    ("sum", "1", 2, 3),
    ("sum", 1, 2, None),
    ("sum", 1, True, 3),
    ("sum", 1, MISSING, 3),
    ("sum", 0.0, 1.7e308, 1.7e308),
    ("sum", 0, 10**400, 1.5),
    ("max", 1, "2", 3),
    ("max", 1, None, 3),
    ("max", 1, True, 3),
    ("max", [1], [2], [3]),
    ("max", 1, MISSING, 3),
]


@pytest.mark.parametrize(("policy", "base", "mine", "theirs"), NO_POLICY_HELPS, ids=short)
def test_a_policy_that_cannot_combine_the_values_is_a_conflict(policy: Any, base: Any, mine: Any, theirs: Any) -> None:
    """Wrong types and sums beyond a float are a `MergeConflict` with the three values, or follow ``prefer``."""
    with pytest.raises(MergeConflict, match=f"policy '{policy}' cannot combine") as caught:
        merge(field(base), field(mine), field(theirs), {"f": policy})
    conflict = caught.value
    assert conflict.path == ("f",)
    assert same([conflict.base, conflict.mine, conflict.theirs], [base, mine, theirs])
    assert same(merge(field(base), field(mine), field(theirs), {"f": policy}, prefer="mine"), field(mine))


@pytest.mark.parametrize("policy", ["sum", "max", "mine", "theirs"])
@pytest.mark.parametrize("changed", [5, -5, "text", None, [1], MISSING])
def test_a_policy_is_asked_only_where_both_sides_changed(policy: Any, changed: Any) -> None:
    """A change of one side alone is taken as it is, whatever its type."""
    base = {"f": 1, "other": 0}
    one, other = {**field(changed), "other": 0}, {"f": 1, "other": 1}
    expected = {**field(changed), "other": 1}
    assert same(merge(base, one, other, {"f": policy}), expected)
    assert same(merge(base, other, one, {"f": policy}), expected)


def test_a_policy_is_for_a_field_of_the_top() -> None:
    """A key of that name further down is merged like any other."""
    with pytest.raises(MergeConflict):
        merge({"o": {"f": 0}}, {"o": {"f": 1}}, {"o": {"f": 2}}, {"f": "sum"})


@pytest.mark.parametrize("policy", ["average", "", None, 1, ["sum"]])
def test_an_unknown_policy_is_refused_at_once(policy: Any) -> None:
    """A misspelt policy is refused when the store is opened, not at the first conflict."""
    with pytest.raises(InvalidArgument, match=r"the merge policy of 'f' is .* must be sum \| max"):
        check_policies({"f": policy})


# --- patch ------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_patched_document_equals_what_was_wanted(data: st.DataObject) -> None:
    """The target becomes the wanted document, whatever the edits, moves included."""
    target = data.draw(conversations())
    wanted = data.draw(edited(target, "mine"))
    before = copy.deepcopy(wanted)
    patch(target, copy.deepcopy(target), wanted)
    assert same(target, wanted)
    assert same(wanted, before)


@given(documents, documents)
def test_any_document_can_be_patched_into_any_other(target: Document, wanted: Document) -> None:
    """A document can be patched also where types change, lists shrink and keys go."""
    patch(target, copy.deepcopy(target), wanted)
    assert same(target, wanted)


@given(st.data())
def test_patching_keeps_the_callers_objects(data: st.DataObject) -> None:
    """The list stays the same object. Each message that stays is the same dict, edited or not."""
    target = data.draw(conversations())
    messages, by_id = target["messages"], {item["id"]: item for item in target["messages"]}
    patch(target, copy.deepcopy(target), data.draw(edited(target, "mine", moves=False)))
    assert target["messages"] is messages
    assert all(by_id.get(item["id"], item) is item for item in messages)


def test_patching_edits_items_without_ids_in_place_where_they_stand_still() -> None:
    """An object beside items that come and go stays the caller's own."""
    kept = {"content": "kept"}
    target = {"l": [{"content": "gone"}, kept]}
    patch(target, copy.deepcopy(target), {"l": [{"content": "new"}, {"content": "kept"}, {"content": "later"}]})
    assert target["l"][1] is kept


def test_object_at_two_places_is_not_changed_at_both() -> None:
    """An edit of one place must not appear at the other place, which nobody has edited."""
    shared = {"content": "a"}
    target: Document = {"first": shared, "l": [shared]}
    patch(target, copy.deepcopy(target), {"first": {"content": "a"}, "l": [{"content": "edited"}]})
    assert target == {"first": {"content": "a"}, "l": [{"content": "edited"}]}


@pytest.mark.parametrize(
    ("mine", "theirs"), [(["x", 2, 3], [1, "x", 3]), (["x", 2, 3], [1, 2, 3])], ids=["both moved", "moved and removed"]
)
def test_move_that_looks_like_an_edit_neither_doubles_nor_revives(mine: list[Any], theirs: list[Any]) -> None:
    """An item without an id that was moved to another's place counts as moved."""
    with pytest.raises(MergeConflict):
        merge({"l": [1, 2, 3, "x"]}, {"l": mine}, {"l": theirs})


def test_what_another_thread_has_added_meanwhile_stays() -> None:
    """A patch keeps items that were appended and fields that were set since the copy of the target was taken."""
    target: Document = {"l": ["a", "b"], "d": {}}
    known = copy.deepcopy(target)
    target["l"].append("late")
    target["d"]["late"] = 1
    target["late"] = 2
    patch(target, known, {"l": ["x", "a", "b", "c"], "d": {"theirs": 1}})
    assert target == {"l": ["x", "a", "b", "c", "late"], "d": {"late": 1, "theirs": 1}, "late": 2}


# --- alignment --------------------------------------------------------------------------------------------------------


@given(st.lists(words, max_size=12), st.lists(words, max_size=12))
def test_an_alignment_is_a_rising_run_of_equal_items(base: list[str], side: list[str]) -> None:
    """Each pair has equal labels, and positions rise on both sides."""
    pairs = align(base, side)
    assert all(base[i] == side[j] for i, j in pairs)
    assert all(one[0] < two[0] and one[1] < two[1] for one, two in itertools.pairwise(pairs))


@given(st.data())
def test_a_subsequence_is_aligned_whole(data: st.DataObject) -> None:
    """If items have ids and one side only removed some, every remaining item is matched."""
    base = [message(f"m{i}", "") for i in range(data.draw(st.integers(0, 12)))]
    side = [item for item in base if data.draw(st.booleans())]
    assert len(align(*labels(base, side))) == len(side)


SHAPES: dict[str, Callable[[int], tuple[list[Any], list[Any]]]] = {
    "equal items": lambda n: (["a"] * n, ["a"] * n),
    "equal items, one more in front": lambda n: (["a"] * n, ["b"] + ["a"] * n),
    "equal items, one replaced in the middle": lambda n: (["a"] * n, ["a"] * (n // 2) + ["b"] + ["a"] * (n // 2 - 1)),
    "equal items between other ends": lambda n: (["x"] + ["a"] * n + ["x"], ["y"] + ["a"] * (n // 2) + ["y"]),
    "two items in turn, shifted": lambda n: (["a", "b"] * (n // 2), ["b", "a"] * (n // 2)),
    "messages, reversed": lambda n: (ordered := [message(str(i), "") for i in range(n)], ordered[::-1]),
    "messages, all others": lambda n: (
        [message(str(i), "") for i in range(n)],
        [message(f"n{i}", "") for i in range(n)],
    ),
}


def labels(*lists: list[Any]) -> list[list[Any]]:
    return [list(map(label, items)) for items in lists]


def calls_of(function: Callable[[], Any]) -> int:
    """Return the number of calls of Python and C functions. No busy machine can change this measure of work."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_work_of_an_alignment_grows_with_the_list_not_with_its_square(
    shape: Callable[[int], tuple[Any, Any]],
) -> None:
    """Twice the items take at most 2.5 times the calls, also if all items are equal."""
    small, large = (calls_of(partial(align, *labels(*shape(n)))) for n in (500, 1000))
    assert large <= 2.5 * small


@pytest.mark.parametrize("where", [0, 0.5, 0.999])
@pytest.mark.parametrize("has_ids", [True, False])
def test_the_work_of_a_merge_grows_with_the_list_not_with_its_square(where: float, has_ids: bool) -> None:
    """One side changes one message, and the other appends. Twice the messages take at most 2.5 times the calls."""

    def work(length: int) -> int:
        base: list[Any] = [message(f"m{n}", str(n)) if has_ids else str(n) for n in range(length)]
        place = int(where * length)
        mine, theirs = [*base[:place], message("X", "x"), *base[place + 1 :]], [*base, message("Y", "y")]
        return calls_of(partial(merge, {"l": base}, {"l": mine}, {"l": theirs}, prefer="mine"))

    assert work(2000) <= 2.5 * work(1000)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twenty_thousand_items_are_merged_and_patched(shape: Callable[[int], tuple[Any, Any]]) -> None:
    """A conversation of many equal items takes one merge and one patch, not a minute.

    hermes-webui #2592 had 2,048 equal rows.
    """
    base, side = shape(20_000)
    merged = merge({"l": base, "a": 0}, {"l": side, "a": 0}, {"l": base, "a": 1})
    target = {"l": list(base), "a": 0}
    patch(target, copy.deepcopy(target), merged)
    assert target == {"l": side, "a": 1}


@pytest.mark.parametrize(
    ("base", "side", "removed"),
    [
        ([A, B], [A, B], 0),
        ([A, B], [A2, B], 0),
        ([A, B], [A, B, X], 0),
        ([A, B], [B], 1),
        ([A, B], [X, Y], 2),
        ([A, B], [B, A], 0),
        ([A, B], [B, {**A, "role": "tool"}], 1),
        ([A, A2], [A, A3], 0),
        ([A, A2], [A], 1),
        (["a", "b"], ["b", "a"], 0),
        (["a", "b", "c"], ["x", "b"], 1),
        ([A, B], [], 2),
        ([A, B], None, 2),
        ([A, B], MISSING, 2),
        (["a", "b"], ["a", "c"], 0),
        (["a", "a"], ["a"], 1),
    ],
)
def test_removed_items_are_counted(base: list[Any], side: Any, removed: int) -> None:
    """An edited item does not count as removed, nor does a moved one.
    If there is no list at all, every item is removed.
    """
    assert count_removed(base, side) == removed
