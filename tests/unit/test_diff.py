"""Changes: the changes between two contents turn one into the other, and weigh as much as the edit.

The tests fail without their mechanisms: the search for equal beginnings and ends, and the order from the last splice to
the first. Others are the alignment of distant edits, and each refusal of `apply`.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persist import json_codec
from persist.storage import diff, journal
from persist.storage.content import ALWAYS_APART, APART_BYTES, Content, Items, Value, encoded
from persist.storage.diff import Change, DoesNotFit, between, splice, whole
from persist.storage.journal import Record

Document = dict[str, Any]

# Strings with a meaning in a document, strings that msgspec does not read, and strings that begin or end alike.
words = st.sampled_from(
    ["", "x", "y", "é", "\ud800", "tool_calls", '"tool_calls":', "a\nb", "],\n", "\\", "x" * 40, "\u2028"]
)
items: st.SearchStrategy[Any] = st.one_of(
    words,
    st.sampled_from([None, 0, 1.5, True, [], {}, [1, 2], {"tool_calls": [1]}, {"a": {}}]),
    st.fixed_dictionaries({"id": st.sampled_from("abcdef"), "content": words}),
    st.fixed_dictionaries({"id": st.integers(0, 9), "content": st.sampled_from(["z" * 10, "z" * 3000])}),
)
lists = st.lists(items, max_size=12)
values = st.one_of(
    lists, lists, words, st.sampled_from([None, 5, {}, {"a": 1}, "w" * APART_BYTES, ["v" * APART_BYTES]])
)
names = st.sampled_from([*ALWAYS_APART, "context_messages", "notes", "title", "\ud800"])
documents = st.dictionaries(names, values, max_size=5)


@st.composite
def edits(draw: st.DrawFn) -> tuple[Document, Document]:
    """Draw a document, and another one or the same one after some edits of its lists."""
    before = draw(documents)
    if draw(st.integers(0, 3)) == 0:
        return before, draw(documents)
    after = copy.deepcopy(before)
    for value in after.values():
        for _ in range(draw(st.integers(0, 3)) if type(value) is list else 0):
            place = draw(st.integers(0, len(value)))
            value[place : place + draw(st.integers(0, 2))] = draw(st.lists(items, max_size=2))
    return before, after


def as_record(changes: tuple[Change, ...]) -> Record:
    return Record("00000000", "00000000", 2, "2026-01-01T00:00:00+00:00", 0, {}, changes=changes, commit="c")


def written(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """Return the changes as they come back from a journal."""
    line = journal.encode(as_record(changes), 0)
    assert line.count(b"\n") == 1, "a record is one line"
    return journal._decoded(line[:-1]).changes


def weight(changes: tuple[Change, ...]) -> int:
    return len(journal.encode(as_record(changes), 0))


def from_document(content: Content) -> Content:
    """Return the same content with its lists as a document holds them: as texts that were not split."""

    def text_of(value: Value) -> Value:
        if not isinstance(value, Items) or not len(value):
            return value
        return Items.in_document(memoryview(b"[\n" + b",\n".join(value.split()) + b"\n]"), len(value))

    return Content(content.fields, {name: text_of(value) for name, value in content.apart.items()})


def after_changes(before: Content, after: Content, changes: tuple[Change, ...]) -> Content:
    apart = dict(before.apart)
    for change in changes:
        diff.apply(apart, change)
    return Content(after.fields, apart)


def assert_inverse(before: Document, after: Document) -> None:
    changes = written(between(encoded(before), encoded(after)))
    for old in (encoded(before), from_document(encoded(before))):
        for new in (encoded(after), from_document(encoded(after))):
            assert written(between(old, new)) == changes, "whatever form the lists have"
            found = after_changes(old, new, changes)
            assert found == new
            assert found.counts == new.counts
            assert found.decode() == after
            assert found.size_bytes == new.size_bytes
            assert bool(changes) == (old.apart != new.apart)
            assert old == encoded(before), "the content before stays as it is"


@given(edits())
@example(({}, {"messages": []}))
@example(({"messages": []}, {}))
@example(({"messages": []}, {"messages": [1]}))
@example(({"messages": [1]}, {"messages": []}))
@example(({"messages": ["x"]}, {"messages": "x"}))
@example(({"messages": {"a": [1]}, "tool_calls": [1]}, {"messages": [{"a": [1]}], "tool_calls": [1, 1]}))
@example(({"messages": ["tool_calls", 1]}, {"messages": ["tool_calls"], "tool_calls": ["messages"]}))
@example(({"messages": ["a\ud800", "b"]}, {"messages": ["a\ud800", "b\ud800"]}))
@example(({"messages": [1, 1, 1]}, {"messages": [1, 1]}))
@example(({"messages": [1, 11]}, {"messages": [11]}))
@example(({"messages": [11, 1]}, {"messages": [11, 11]}))
@example(({"notes": "w" * APART_BYTES}, {"notes": "w"}))
@example(({"notes": ["w" * APART_BYTES]}, {"notes": ["w"]}))
@example(({"\ud800": []}, {"\ud800": ["w" * APART_BYTES]}))
def test_what_is_between_two_documents_makes_one_the_other(pair: tuple[Document, Document]) -> None:
    """`apply` is the inverse of `between`, for documents of any shape, also when the changes come back from disk."""
    before, after = pair
    assert_inverse(before, after)
    assert_inverse(after, before)


@given(edits(), st.sampled_from([0, 40]))
def test_distant_edits_that_are_told_apart_come_to_the_same(
    pair: tuple[Document, Document], one_splice_bytes: int
) -> None:
    """Aligned splices lead to the same content also for small lists.
    Without the patch, only large lists are aligned.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "_ONE_SPLICE_BYTES", one_splice_bytes)
        assert_inverse(*pair)


def reordered(value: Any) -> Any:
    """Return the same data with the keys of its objects in another order."""
    if type(value) is dict:
        return {key: reordered(value[key]) for key in reversed(value)}
    return [*map(reordered, value)] if type(value) is list else value


@given(edits())
@example(({"messages": [{"a": 1, "b": 2}]}, {"messages": [{"a": 1, "b": 3}]}))
@example(({"messages": [1, 2]}, {"messages": [True, 2]}))
@example(({"messages": "ab"}, {"messages": "ba"}))
@example(({"a": 1, "b": 2}, {"a": 2, "b": 1}))
@example(({"messages": [{"a": 1, "b": 2}, {"b": 2, "a": 1}]}, {}))
@example(({"title": [{"a": 1, "b": 2}] * 20}, {"title": [{"a": 1, "b": 2}] * 19}))
@example(({"a": {"x": 1, "y": 0.0}}, {"a": {"x": 1, "y": -0.0}}))
def test_another_order_of_keys_is_no_change(pair: tuple[Document, Document]) -> None:
    """Contents are equal exactly if their data is equal by type and value, whatever the order of the keys."""
    before, after = pair
    old = encoded(before)
    assert encoded(reordered(before), old) == old
    assert between(old, encoded(reordered(before), old)) == ()
    assert (encoded(reordered(after), old) == old) is json_codec.same(before, after)


@given(edits())
def test_content_like_another_is_the_same_as_one_of_its_own(pair: tuple[Document, Document]) -> None:
    """The content equals the data, whatever JSON is taken over from an earlier state."""
    before, after = pair
    for like in (encoded(before), from_document(encoded(before))):
        found = encoded(after, like)
        assert json_codec.same(found.decode(), after)
        assert after_changes(like, found, between(like, found)) == found
        assert encoded(after, found) == found


# --- what a change weighs ---------------------------------------------------------------------------------------------


def message(number: int) -> Document:
    return {"id": f"m{number}", "role": "user", "content": f"{number} " * 50}


@pytest.fixture(scope="module")
def large() -> list[Document]:
    """Return 2,000 messages, about half a megabyte."""
    return [message(number) for number in range(2000)]


def between_lists(before: list[Any], after: list[Any]) -> tuple[Change, ...]:
    assert_inverse({"messages": before}, {"messages": after})
    return between(encoded({"messages": before}), encoded({"messages": after}))


def test_append_weighs_what_is_appended(large: list[Document]) -> None:
    """An item at the end of a large list is one insertion of that item, and nothing else."""
    item = {"id": "new", "content": "hi"}
    expected = splice("messages", len(large), 0, [json_codec.encode(item)])
    assert between_lists(large, [*large, item]) == (expected,)


def test_distant_edits_weigh_what_they_changed(large: list[Document]) -> None:
    """Changed, added and removed items of a large list cost only these items, not the items between them."""
    after = copy.deepcopy(large)
    after[3]["content"] = "changed"
    after.insert(700, {"id": "added"})
    del after[1200]
    after[1990]["content"] = "changed"
    changes = between_lists(large, after)
    assert len(changes) == 4
    assert weight(changes) < 600


def test_distant_edits_of_items_without_ids_weigh_what_they_changed() -> None:
    """Distant edits cost only the changed items, also where items have no id and are told apart by their content."""
    before = [f"line {number} {'.' * 60}" for number in range(2000)]
    after = before[:]
    after[5], after[1000], after[1995] = "one", "two", "three"
    assert weight(between_lists(before, after)) < 500


def test_edits_of_both_lists_are_told_apart(large: list[Document]) -> None:
    """Each value has its own changes, also where two values have the same items."""
    old, new = ({"messages": large, "tool_calls": calls} for calls in (large, [*large, 1]))
    assert between(encoded(old), encoded(new)) == (splice("tool_calls", len(large), 0, [b"1"]),)


# --- what cannot be applied -------------------------------------------------------------------------------------------

LIST = encoded({"messages": [{"id": "a"}, "b"], "tool_calls": {"a": 1}, "title": "t"})


@pytest.mark.parametrize(
    "impossible",
    [
        pytest.param(splice("messages", 3, 0, [b"1"]), id="behind the end"),
        pytest.param(splice("messages", 1, 2, [b"1"]), id="removes more than there is"),
        pytest.param(splice("messages", -1, 0, [b"1"]), id="before the beginning"),
        pytest.param(splice("messages", 1, -1, [b"1"]), id="removes less than nothing"),
        pytest.param(splice("tool_calls", 0, 0, [b"1"]), id="an item of what is no list"),
        pytest.param(splice("title", 0, 0, [b"1"]), id="a field"),
        pytest.param(splice("_persist", 0, 0, [b"1"]), id="the header"),
        pytest.param(splice("gone", 0, 0, [b"1"]), id="what is missing"),
    ],
)
def test_change_of_what_is_not_there_does_not_fit(impossible: Change) -> None:
    """A change that names a missing place or value is refused, and nothing is made up."""
    apart = dict(LIST.apart)
    with pytest.raises(DoesNotFit):
        diff.apply(apart, impossible)
    assert apart == LIST.apart


def test_change_sets_a_value_and_takes_it_away() -> None:
    """A value that is set as a whole may be a list. Its items can be spliced then."""
    apart = dict(LIST.apart)
    diff.apply(apart, whole("tool_calls", b'[1,{"a":"x,\\ny"}]'))
    diff.apply(apart, splice("tool_calls", 1, 1, [b"2", b"3"]))
    assert apart["tool_calls"] == Items([b"1", b"2", b"3"])
    diff.apply(apart, Change("tool_calls", is_gone=True))
    assert apart.keys() == {"messages"}


def test_change_with_a_key_that_is_not_known_is_refused() -> None:
    """A key that a newer version adds to a change is refused, because an old worker would fold it away."""
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(b'{"in":"messages","at":0,"later":1}', type=Change)
