"""Changes: what is found between two bodies makes one into the other, and weighs what was changed.

They fail without their mechanisms: the looks for the line that a difference is in, the order from the last splice to the
first, the alignment of distant edits, and each refusal of `Bulk.apply`.
"""

from __future__ import annotations

import copy
import enum
import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from persist.storage.body import BULK, Body
from persist.storage.change import Bulk, Change, DoesNotFit, applied, between, data_of, have_same_data, inserted, marked

from persist import codec, instant
from persist.errors import CorruptSession, NotJSON
from persist.json_codec import same
from persist.storage import change, lines

Document = dict[str, Any]

# Strings that stand for something in a document, that msgspec does not read, or that begin or end alike.
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
bulks = st.one_of(lists, lists, words, st.sampled_from([None, 5, {}, {"a": 1}, {"messages": []}]))


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """With and without small fields, and each bulk field missing, a list, or something else."""
    document: Document = {"title": draw(words)} if draw(st.booleans()) else {}
    return document | {name: draw(bulks) for name in BULK if draw(st.booleans())}


@st.composite
def edits(draw: st.DrawFn) -> tuple[Document, Document]:
    """A document, and another one or the same after some edits of its lists."""
    before = draw(documents())
    if draw(st.integers(0, 3)) == 0:
        return before, draw(documents())
    after = copy.deepcopy(before)
    for value in after.values():
        for _ in range(draw(st.integers(0, 3)) if type(value) is list else 0):
            place = draw(st.integers(0, len(value)))
            value[place : place + draw(st.integers(0, 2))] = draw(st.lists(items, max_size=2))
    return before, after


def written(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """As they come back from a journal."""
    encoded = msgspec.json.encode(changes)
    assert b"\n" not in encoded, "a record is one line"
    try:
        return msgspec.json.decode(encoded, type=tuple[Change, ...])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return tuple(map(change.from_plain, codec.decode(encoded)))


def weight(changes: tuple[Change, ...]) -> int:
    return len(msgspec.json.encode(changes))


def forms(data: Document) -> list[Body]:
    """A body as it is encoded, as it is read from a document, and as that is with items added by a journal."""
    encoded = Body.of(data)
    content = b'{"_persist":{},\n' + encoded.head + b"".join(encoded.bulk_in_document())
    start = len(b'{"_persist":{},\n')
    read = Body.in_document(content, start, start + len(encoded.head), encoded.counts, ("s", Path()), [])
    shorter = {name: value[:-1] if type(value) is list else value for name, value in data.items()}
    added = [inserted(name, len(data[name]) - 1, codec.encode(data[name][-1])) for name in read.counts if data[name]]
    return [encoded, read, applied(Body.of(shorter), encoded.small, added), applied(read, encoded.small, [])]


def assert_inverse(before: Document, after: Document) -> None:
    changes = written(between(Body.of(before), Body.of(after)))
    for old in forms(before):
        for new in forms(after):
            assert written(between(old, new)) == changes, "whatever form the bodies have"
            found = applied(old, new.small, changes)
            assert found == new
            assert found.counts == new.counts
            assert found.data() == after
            assert found.size_bytes == new.size_bytes == len(new.head + b"".join(new.bulk_in_document()))
            assert bool(changes) == (joined(old) != joined(new)) == (old.bulk != new.bulk)
    data = copy.deepcopy(before)
    for each in changes:
        change.apply_to_data(data, each)
    expected = {name: value for name, value in after.items() if name in BULK}
    assert {name: value for name, value in data.items() if name in BULK} == expected, "as decoded data, too"


def joined(body: Body) -> bytes:
    return b"".join(body.bulk_in_document())


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
def test_what_is_between_two_documents_makes_one_the_other(pair: tuple[Document, Document]) -> None:
    """`applied` is the inverse of `between`, for documents of any shape, also when the changes come back from disk."""
    before, after = pair
    assert_inverse(before, after)
    assert_inverse(after, before)


@given(edits(), st.sampled_from([1, 2, 7, 64]), st.sampled_from([0, 40]), st.sampled_from([1, 2, 3]))
def test_what_is_compared_in_pieces_is_what_is_compared_at_once(
    pair: tuple[Document, Document], piece_bytes: int, one_splice_bytes: int, many: int
) -> None:
    """Also where pieces end in mid-line, and where distant edits are told apart however small they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instant, "MANY", many)
        patch.setattr(lines, "PIECE_BYTES", piece_bytes)
        patch.setattr(change, "_ONE_SPLICE_BYTES", one_splice_bytes)
        assert_inverse(*pair)


@given(edits())
def test_data_of_several_bodies_shares_what_is_the_same(pair: tuple[Document, Document]) -> None:
    """Each is the data of its body, whatever their forms; and an item that is the same at the beginning is one object."""
    before, after = pair
    for old in forms(before):
        for new in forms(after):
            first, second, third = data_of(old, new, old)
            assert (first, second, third) == (before, after, before)
            assert list(second) == list(Body.of(after).data())
            for name in old.counts:
                assert all(
                    one is other
                    for one, other in zip(first[name], third[name], strict=True)
                    if type(one) in (dict, list)
                )


def reordered(value: Any) -> Any:
    """The same data with the keys of its objects in another order."""
    if type(value) is dict:
        return {key: reordered(value[key]) for key in reversed(value)}
    return [*map(reordered, value)] if type(value) is list else value


@given(edits())
@example(({"messages": [{"a": 1, "b": 2}]}, {"messages": [{"a": 1, "b": 3}]}))
@example(({"messages": [1, 2]}, {"messages": [True, 2]}))
@example(({"messages": "ab"}, {"messages": "ba"}))
@example(({"a": 1, "b": 2}, {"a": 2, "b": 1}))
def test_bodies_have_the_same_data_whatever_the_order_of_keys(pair: tuple[Document, Document]) -> None:
    """That is all in which bodies of the same data may differ."""
    before, after = pair
    for old in forms(before):
        assert have_same_data(old, Body.of(reordered(before)))
        for new in forms(reordered(after)):
            assert have_same_data(old, new) == same(before, after)


# --- what need not be encoded again ------------------------------------------------------------------------------------------


@given(st.lists(edits(), min_size=1, max_size=4), st.sampled_from([1, 2, 3]), st.randoms())
def test_a_body_like_another_is_the_same_as_one_of_its_own(
    pairs: list[tuple[Document, Document]], many: int, random: Random
) -> None:
    """Whatever is taken over from earlier states of the same objects, it is the body of the last one."""
    data: Document = {}
    like = Body.of(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instant, "MANY", many)
        patch.setattr(instant, "KEEP_FROM", many)
        for state in itertools.chain.from_iterable(pairs):
            become(data, copy.deepcopy(state), random)
            like = Body.of(data, like)
            # One object may stand in two places: then that is another state.
            alone = Body.of(copy.deepcopy(data))
            assert like == alone
            assert joined(like) == joined(alone)


def become(value: Any, wanted: Any, random: Random) -> None:
    """Make a container another one in place; what is equal, and some of the containers, stay the same objects."""
    kept = dict(value.items()) if type(value) is dict else dict(enumerate(value))
    made = dict(wanted.items()) if type(wanted) is dict else dict(enumerate(wanted))
    for key, new in made.items():
        old = kept.get(key)
        if type(old) is type(new) and (Body.of({"x": old}) == Body.of({"x": new})):
            made[key] = old
        elif type(old) is type(new) and type(new) in (dict, list) and random.random() < 0.7:
            become(old, new, random)
            made[key] = old
    if type(value) is dict:
        value.clear()
        value.update(made)
    else:
        value[:] = made.values()


CHANGES: list[Callable[[list[Any]], object]] = [
    lambda items: items[-2].update(new=1),
    lambda items: items[2].update(parts=items[2]["parts"] + ["new"]),
    lambda items: items[2]["parts"][3].insert(0, items[2]["parts"][2].pop()),
    lambda items: items.append({"id": "new"}),
    lambda items: items.pop(),
    lambda items: items.clear(),
    lambda items: items.insert(0, {"id": "new"}),
    lambda items: items.__delitem__(1),
    lambda items: items.__setitem__(slice(None), items[1:] + items[:1]),
    lambda items: items.__setitem__(1, dict(items[1], id="other")),
    lambda items: items[0].update(content="other"),
    lambda items: items[0].update(new=1),
    lambda items: items[0].pop("content"),
    lambda items: (
        items[0].__setitem__("content", items[0].pop("content")) or items[0].__setitem__("id", items[0].pop("id"))
    ),
    lambda items: items[1].update(n=True),
    lambda items: items[1].update(n=1.0),
    lambda items: items[2]["parts"].append("new"),
    lambda items: items[2]["parts"].reverse(),
    lambda items: items[2]["parts"][1].update(deep=[2]),
    lambda items: items[2]["parts"][1]["deep"].append(2),
    lambda items: items[2]["parts"][1].update({"x": items[2]["parts"][1].pop("deep")}),
    lambda items: items[2]["parts"].insert(0, items[1].pop("n")),
    lambda items: items[-1].update(content="grows"),
]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("change_items", CHANGES)
def test_whatever_changes_in_a_list_is_seen(
    change_items: Callable[[list[Any]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items, keys, their order, values and their types, on every level, in items that were encoded before."""
    monkeypatch.setattr(instant, "MANY", 2)
    monkeypatch.setattr(instant, "KEEP_FROM", 2)
    items: list[Any] = [
        {"id": "a", "content": "x"},
        {"id": "b", "n": 1},
        {"id": "c", "parts": ["text", {"deep": [1]}, ["a", "b"], ["c"], None]},
        {"id": "d", "content": "y"},
        {"id": "e", "content": "z"},
    ]
    data = {"messages": items}
    like = Body.of(data, Body.of({}))
    assert Body.of(data, like) == like
    change_items(items)
    found, alone = Body.of(data, like), Body.of(copy.deepcopy(data))
    assert found == alone
    assert joined(found) == joined(alone) != joined(like)


@pytest.mark.parametrize(
    "wrong", [(1,), {1}, float("nan"), {1: 2}, "\ud83d\ude00"], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("place", [0, 299, 300])
def test_what_json_would_change_is_refused_wherever_it_comes(wrong: Any, place: int) -> None:
    """Also in a list of which the most has been encoded before: in what was seen, in its last item, and behind that."""
    items: list[Any] = [{"content": [None]} for _ in range(300)]
    data = {"messages": items}
    like = Body.of(data, Body.of({}))
    items[place:] = [*items[place:], {"content": [wrong]}] if place == 300 else items[place:]
    items[place]["content"] = [wrong]
    with pytest.raises(NotJSON):
        Body.of(data, like)


@pytest.mark.parametrize(
    "forged", [lines.Lines.in_text(b"1,2,\n3", 0, 6, 3), lines.Lines.in_text(b"1,\n[\n2]", 0, 7, 2)]
)
def test_a_list_that_has_not_one_item_a_line_is_not_compared(forged: lines.Lines) -> None:
    """Somebody who can compute a checksum cannot have a change land on another item than was meant."""
    body, other = Body(b"", {"messages": forged}), Body.of({"messages": [5]})
    for pair in ((body, other), (other, body)):
        with pytest.raises(CorruptSession):
            between(*pair)


class Name(enum.StrEnum):
    """Keys that are equal to strings, and are none."""

    TITLE = "title"
    MESSAGES = "messages"
    HEADER = "_persist"


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("count", [3, 64, 300])
@pytest.mark.parametrize("key", [1, True, None, 1.5, ("a",), b"x", *Name], ids=repr)
def test_no_key_is_taken_for_a_string(key: Any, count: int) -> None:
    """The keys of the data itself are looked at as those in it are, however much of it is encoded at once."""
    items = [{"id": str(n)} for n in range(count)]
    like = Body.of({"messages": items}, Body.of({}))
    for before in (None, like):
        for data in ({key: 1, "messages": items}, {"title": "x", "messages": items, key: 1}, {key: items}):
            if not all(type(each) is str for each in data):
                with pytest.raises(NotJSON, match="only string keys"):
                    Body.of(data, before)


@pytest.mark.usefixtures("no_collection")
def test_what_is_seen_is_encoded_once(large: list[Document]) -> None:
    """Of an earlier state, all lines but the last few are the same objects: they were not encoded again."""
    data = {"messages": large[:]}
    before = Body.of(data, Body.of({}))
    for number in range(200):
        data["messages"].append({"id": f"more {number}"})
        after = Body.of(data, before)
        old, new = before.bulk["messages"], after.bulk["messages"]
        assert isinstance(old, lines.Lines)
        assert isinstance(new, lines.Lines)
        assert len(new.settled.lines) == len(old.settled.lines), "short pieces are joined"
        assert new.settled.seen.count == len(large) + number
        assert all(mine is its for mine, its in zip(old.settled.lines[:-1], new.settled.lines, strict=False))
        before = after
    assert after == Body.of(copy.deepcopy(data))


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_list_that_changes_length_is_encoded_as_it_is_in_the_end(large: list[Document], is_kept: bool) -> None:
    """Another thread may add to a list, or take from it, until the instant in which it is encoded."""
    for size in (0, 1, 63, 64, 65, 128, 500, 1000):
        items = large[:300]
        encoded = instant.EncodedList(items, instant.Seen(), is_kept=is_kept)
        items[:] = large[:size]
        data: Document = {}
        assert instant.encode(data, data, [], [encoded]) == []
        found = lines.Lines.encoded(encoded, lines.Settled(), is_kept=is_kept)
        assert found == Body.of({"messages": items}).bulk["messages"]


def message(number: int) -> Document:
    return {"id": f"m{number}", "role": "user", "content": f"{number} " * 50}


@pytest.fixture(scope="module")
def large() -> list[Document]:
    """2,000 messages, about half a megabyte."""
    return [message(number) for number in range(2000)]


def between_lists(before: list[Any], after: list[Any]) -> tuple[Change, ...]:
    assert_inverse({"messages": before}, {"messages": after})
    return between(Body.of({"messages": before}), Body.of({"messages": after}))


def test_append_weighs_what_is_appended(large: list[Document]) -> None:
    """An item at the end of a large list is one insertion of that item, and nothing else."""
    item = {"id": "new", "content": "hi"}
    assert between_lists(large, [*large, item]) == (inserted("messages", len(large), codec.encode(item)),)


def test_distant_edits_weigh_what_they_changed(large: list[Document]) -> None:
    """Items changed, added and removed all over a large list cost these items, not what stands between them."""
    after = copy.deepcopy(large)
    after[3]["content"] = "changed"
    after.insert(700, {"id": "added"})
    del after[1200]
    after[1990]["content"] = "changed"
    changes = between_lists(large, after)
    assert len(changes) == 4
    assert weight(changes) < 500


def test_distant_edits_of_items_without_ids_weigh_what_they_changed() -> None:
    """Also where items can only be told by what they are."""
    before = [f"line {number} {'.' * 60}" for number in range(2000)]
    after = before[:]
    after[5], after[1000], after[1995] = "one", "two", "three"
    assert weight(between_lists(before, after)) < 400


def test_edits_of_both_fields_are_told_apart(large: list[Document]) -> None:
    """Each field has its own changes, also where the items of both are the same."""
    old, new = ({"messages": large, "tool_calls": calls} for calls in (large, [*large, 1]))
    assert between(Body.of(old), Body.of(new)) == (inserted("tool_calls", len(large), b"1"),)


# --- what cannot be applied -------------------------------------------------------------------------------------------

LIST = Body.of({"messages": [{"id": "a"}, "b"], "tool_calls": {"a": 1}})


@pytest.mark.parametrize(
    "impossible",
    [
        pytest.param(inserted("messages", 3, b"1"), id="behind the end"),
        pytest.param(inserted("messages", 1, b"1", remove=2), id="removes more than there is"),
        pytest.param(inserted("messages", -1, b"1"), id="before the beginning"),
        pytest.param(inserted("messages", 1, b"1", remove=-1), id="removes less than nothing"),
        pytest.param(inserted("tool_calls", 0, b"1"), id="an item of what is no list"),
        pytest.param(inserted("title", 0, b"1"), id="a small field"),
        pytest.param(inserted("_persist", 0, b"1"), id="the header"),
        pytest.param(marked("messages", 1, {"interrupted": True}), id="a mark on what is no object"),
        pytest.param(marked("messages", 2, {"interrupted": True}), id="a mark behind the end"),
        pytest.param(Change("title", value=msgspec.Raw(b"1")), id="a small field set"),
        pytest.param(Change("title", is_dropped=True), id="a small field dropped"),
    ],
)
def test_change_of_what_is_not_there_does_not_fit(impossible: Change) -> None:
    """A change that names a place or a field that is not there is refused, and nothing is made up."""
    bulk = Bulk(LIST)
    with pytest.raises(DoesNotFit):
        bulk.apply(impossible)
    assert bulk.body(LIST.small) == LIST


def test_mark_sets_fields_of_one_item() -> None:
    """A mark sets its fields in the item at its place, whatever else that holds, and in no other."""
    assert applied(LIST, b"", [marked("messages", 0, {"interrupted": True})]).data() == {
        "messages": [{"id": "a", "interrupted": True}, "b"],
        "tool_calls": {"a": 1},
    }


def test_items_make_a_list_that_is_missing() -> None:
    """The first item of a field that is not there makes the list."""
    assert applied(Body.of({}), b"", [inserted("messages", 0, b"1")]) == Body.of({"messages": [1]})
