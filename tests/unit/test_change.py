"""Changes: what is found between two bodies makes one into the other, and weighs what was changed.

They fail without their mechanisms: the looks for the line that a difference is in, the order from the last splice to the
first, the alignment of distant edits, and each refusal of `Bulk.apply`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persist import codec
from persist.files import change, lines
from persist.files.body import BULK, Body
from persist.files.change import Bulk, Change, DoesNotFit, applied, between, inserted, marked

Document = dict[str, Any]

# Strings that stand for something in a document, that msgspec does not read, or that begin or end alike.
words = st.sampled_from(["", "x", "y", "é", "\ud800", "tool_calls", '"tool_calls":', "a\nb", "],\n", "\\", "x" * 40, "\u2028"])
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
        patch.setattr(codec, "MANY", many)
        patch.setattr(lines, "PIECE_BYTES", piece_bytes)
        patch.setattr(change, "_ONE_SPLICE_BYTES", one_splice_bytes)
        assert_inverse(*pair)


@given(edits(), st.sampled_from([1, 2, 3]))
def test_a_body_like_another_is_the_same_as_one_of_its_own(pair: tuple[Document, Document], many: int) -> None:
    """Whatever lines it takes over from an earlier state, it is the body of the later one."""
    before, after = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "MANY", many)
        for like in forms(before):
            found = Body.of(after, like)
            assert found == Body.of(after)
            assert joined(found) == joined(Body.of(after))


@given(lists, lists, lists, st.sampled_from([1, 2, 3]))
def test_a_list_that_changes_length_is_encoded_as_it_is_in_the_end(
    like: list[Any], early: list[Any], late: list[Any], many: int
) -> None:
    """Another thread may add to a list, or take from it, until the instant in which it is encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "MANY", many)
        plain = [[codec.encode(item).replace(b"\\ud800", b"?") + b"\n" for item in items] for items in (like, late)]
        pieces = [b"".join(plain[0][at : at + many]) for at in range(0, len(plain[0]), many)]
        items, wanted = [codec.decode(item) for item in [*map(codec.encode, early)]], b"".join(plain[1])
        found = codec._new_lines(items, pieces)
        items[:] = [codec.decode(line) for line in plain[1]]
        assert b"".join(codec._whole_pieces(len(items), list(found), pieces)) == wanted


def test_a_body_shares_what_is_the_same(large: list[Document]) -> None:
    """Of an earlier state, all pieces but the last are the same objects: new memory for them would cost as much as encoding."""
    before = Body.of({"messages": large})
    after = Body.of({"messages": [*large, message(2000)]}, before)
    old, new = before.bulk["messages"], after.bulk["messages"]
    assert isinstance(old, lines.Lines)
    assert isinstance(new, lines.Lines)
    assert len(old.encoded) > 10
    assert all(mine is its for mine, its in zip(old.encoded[:-1], new.encoded, strict=False))


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
