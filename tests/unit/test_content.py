"""Contents: where a value is stored, how `Items` behave as values, and how ids are found in them.

The tests fail if an old value sees a later append, or if ids are handed over past the place of a change. They fail if
an id that two items have is forgotten with one of them. They fail if the place of a value depends on its history.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

import persist
from persist import json_codec
from persist.errors import NotJSON, TooLarge
from persist.storage import content
from persist.storage.content import (
    ALWAYS_APART,
    APART_BYTES,
    FIELDS_BYTES,
    HEADER,
    Items,
    Value,
    as_id,
    as_json,
    decode,
    encoded,
    placed,
)
from persist.storage.diff import between
from persist.storage.document import first_header, to_bytes
from persist.working_copy import WorkingList

#: Ids that look alike, ids with escapes, ids that msgspec does not read, values that are no ids, and ids of two items.
IDS: Sequence[Any] = (
    "a",
    "b",
    "é",
    "\ud800",
    'quote"',
    "back\\slash",
    "line\n",
    "",
    1,
    "1",
    True,
    None,
    1.5,
    [],
    2**70,
)
#: Keys that tell items apart: the usual one, and two others, which an item may have or not.
KEYS = ("id", "call", "é é")
ids = st.sampled_from(IDS)
keys = st.sampled_from(KEYS)
items = st.one_of(
    st.fixed_dictionaries(
        {"id": ids},
        optional={"content": st.sampled_from(["x", "é\ud800", "a\nb", 1e22]), "call": ids, "é é": ids},
    ),
    st.fixed_dictionaries({"call": ids}, optional={"é é": ids}),
    st.fixed_dictionaries({"content": st.just({"id": "a"}), "id": ids}),
    st.sampled_from([None, "a", 5, [], {}, {"Id": "a"}, [{"id": "a"}], '{"id":"a"}', "\ud800"]),
)
item_lists = st.lists(items, max_size=8)


def in_document(values: Sequence[Any]) -> Items:
    """Return items as a document holds them: as one text."""
    lines = b",\n".join(map(json_codec.encode, values))
    return Items.in_document(memoryview(b"[\n%b\n]" % lines if values else b"[]"), len(values))


def of(values: Sequence[Any]) -> Items:
    return Items(list(map(json_codec.encode, values)))


def last_place_of(values: Sequence[Any], wanted: Any, key: str = "id") -> int | None:
    """Return the place of the last item with an id, by the plainest way."""
    places = [
        place
        for place, item in enumerate(values)
        if type(item) is dict and key in item and type(item[key]) is type(wanted) and item[key] == wanted
    ]
    return places[-1] if places and type(wanted) in (str, int) else None


def find(of_items: Items, wanted: Any, key: str = "id") -> int | None:
    value = as_id(wanted)
    return None if value is None else of_items.find(value, key)


def assert_holds(found: Items, values: list[Any], *, with_ids: bool = True) -> None:
    """Check all that an `Items` says of itself against the plain list."""
    lines = list(map(json_codec.encode, values))
    assert len(found) == len(values)
    assert found.size_bytes == len(b"[\n%b\n]" % b",\n".join(lines) if lines else b"[]")
    if with_ids:
        for key, wanted in itertools.product(KEYS, IDS):
            assert find(found, wanted, key) == last_place_of(values, wanted, key), (key, wanted)
    for count in (0, 1, len(values)):
        assert found.last(min(count, len(values))) == lines[len(lines) - min(count, len(values)) :]
    text, behind = found.in_text()
    whole = [json_codec.encode(item) for item in json_codec.decode(text)] if text else []
    assert [*whole, *behind] == lines
    assert json_codec.same(found.decode(), values)
    assert found.size_bytes == (len(b"[\n%b\n]" % b",\n".join(lines)) if lines else 2)


# --- items as values --------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """Items, with the plain list that they equal for ever."""

    found: Items
    values: list[Any] = field(default_factory=list)


class ItemsMachine(RuleBasedStateMachine):
    """Splices of any of the values that exist, in any order. Every value stays what it was."""

    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Known] = []

    def keep(self, found: Items, values: list[Any]) -> Known:
        self.all.append(Known(found, values))
        return self.all[-1]

    @initialize(target=known, values=item_lists)
    def begin_with_a_text(self, values: list[Any]) -> Known:
        return self.keep(in_document(values), values)

    @initialize(target=known, values=item_lists)
    def begin_with_a_list(self, values: list[Any]) -> Known:
        return self.keep(of(values), values)

    @rule(target=known, one=known, more=st.lists(items, max_size=3))
    def append(self, one: Known, more: list[Any]) -> Known:
        added = one.found.spliced(len(one.found), 0, list(map(json_codec.encode, more)))
        return self.keep(added, one.values + more)

    @rule(target=known, one=known, at=st.integers(0, 20), remove=st.integers(0, 3), more=st.lists(items, max_size=2))
    def splice(self, one: Known, at: int, remove: int, more: list[Any]) -> Known:
        at = min(at, len(one.values))
        remove = min(remove, len(one.values) - at)
        spliced = one.found.spliced(at, remove, list(map(json_codec.encode, more)))
        return self.keep(spliced, one.values[:at] + more + one.values[at + remove :])

    @rule(one=known, wanted=ids, key=keys)
    def find(self, one: Known, wanted: Any, key: str) -> None:
        assert find(one.found, wanted, key) == last_place_of(one.values, wanted, key)

    @rule(one=known, at=st.integers(0, 20))
    def look_at_one(self, one: Known, at: int) -> None:
        if at < len(one.values):
            assert one.found[at] == json_codec.encode(one.values[at])
        else:
            with pytest.raises(IndexError):
                one.found[at]

    @rule(one=known, other=known)
    def compare(self, one: Known, other: Known) -> None:
        lines, others = (list(map(json_codec.encode, each.values)) for each in (one, other))
        assert (one.found == other.found) is (lines == others)

    @invariant()
    def every_value_is_what_it_was(self) -> None:
        for one in self.all[-6:]:
            assert_holds(one.found, one.values, with_ids=False)

    def teardown(self) -> None:
        for one in self.all:
            assert_holds(one.found, one.values)
            assert one.found.split() == list(map(json_codec.encode, one.values))
            assert_holds(one.found, one.values)


TestItemsAreValues = ItemsMachine.TestCase


@given(item_lists, item_lists, item_lists)
def test_two_appends_to_one_value_do_not_meet(values: list[Any], one: list[Any], other: list[Any]) -> None:
    """An append to one value does not change another value that shares its list, as a replica and a merge base do."""
    base = of(values)
    first = base.spliced(len(base), 0, list(map(json_codec.encode, one)))
    second = base.spliced(len(base), 0, list(map(json_codec.encode, other)))
    third = first.spliced(len(first), 0, list(map(json_codec.encode, other)))
    assert_holds(base, values)
    assert_holds(first, values + one)
    assert_holds(second, values + other)
    assert_holds(third, values + one + other)


def test_append_shares_the_list_and_keeps_the_text() -> None:
    """An append costs only what it adds: it splits no text, and copies no list."""
    base = in_document([{"id": f"m{number}"} for number in range(1000)])
    text, _ = base.in_text()
    added = base
    for number in range(50):
        added = added.spliced(len(added), 0, [json_codec.encode({"id": f"n{number}"})])
        assert find(added, f"n{number}") == 1000 + number
        assert find(added, "m500") == 500
    found, behind = added.in_text()
    assert found is text
    assert len(behind) == 50
    assert added._parts[2] is base._parts[2]
    assert len(base) == 1000


def test_last_items_are_cut_from_the_end_of_a_text() -> None:
    """The last items are right, also where the part that is read begins within an item, or holds too few items."""
    values = [{"id": f"m{number}", "content": "x" * 3000 * (number % 4)} for number in range(60)]
    lines = list(map(json_codec.encode, values))
    for known in (in_document(values), in_document(values[:58]).spliced(58, 0, lines[58:])):
        for count in (0, 1, 2, 3, 4, 5):
            assert known.last(count) == lines[60 - count :]
        assert known.in_text()[0]
        for count in range(6, 61):
            assert known.last(count) == lines[60 - count :]


def test_encoding_shares_no_list() -> None:
    """The encoded content has a list of its own.
    Encoding happens without the lock, too, while another thread may extend the list of the known items.
    """
    known = of([1, 2])
    content_before = content.Content({}, {"messages": known})
    found = encoded({"messages": [1, 2, 3]}, content_before).apart["messages"]
    assert isinstance(found, Items)
    assert known.spliced(2, 0, [b"4"]).split() == [b"1", b"2", b"4"]
    assert found.split() == [b"1", b"2", b"3"]
    assert found._parts[2] is not known._parts[2]


plain_items = st.sampled_from([1, 12, 1.5, "a", {"id": "a"}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, "\ud800", [1]])


# The JSON of a number may be the beginning of another number's JSON.
@example([1, 12, 12], [1, 1, 12], 0, False)
@given(st.lists(plain_items, max_size=9), st.lists(plain_items, max_size=9), st.integers(0, 9), st.booleans())
def test_blocks_compare_as_the_values_do(before: list[Any], after: list[Any], common: int, is_split: bool) -> None:
    """The encoded content is the data, in whatever form the known items are kept, and wherever a block ends."""
    behind = list(map(json_codec.encode, before[5:]))
    known = in_document(before[:5]).spliced(len(before[:5]), 0, behind)
    if is_split:
        known.split()
    data = {"messages": before[:common] + after}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(content, "_BLOCK", 2)
        found = encoded(data, content.Content({}, {"messages": known})).apart["messages"]
    assert isinstance(found, Items)
    assert json_codec.same(found.decode(), data["messages"])
    assert found.size_bytes == of(data["messages"]).size_bytes
    assert (found == known) is json_codec.same(before, data["messages"])
    assert json_codec.same(known.decode(), before)


@pytest.mark.parametrize(("at", "remove"), [(-1, 0), (0, -1), (4, 0), (3, 1), (0, 4), (4, -1)])
@pytest.mark.parametrize("make", [of, in_document])
def test_splice_of_items_that_are_not_there_is_refused(make: Any, at: int, remove: int) -> None:
    """An impossible splice is a `ValueError`, and the value stays as it is."""
    found = make([1, 2, 3])
    with pytest.raises(ValueError):
        found.spliced(at, remove, [b"5"])
    assert_holds(found, [1, 2, 3])


@pytest.mark.parametrize("text", [b"[\n1,\n2\n]", b"[\n1,\n2,\n3,\n4\n]", b"[\n1,2,\n3\n]", b"[\n1,\n[\n2],3\n]"])
def test_text_that_has_not_one_item_a_line_is_refused(text: bytes) -> None:
    """A forger who can compute a checksum cannot make a change land on another item than the intended one."""
    has_three = len(json.loads(text)) == 3
    looks: list[Callable[[Items], object]] = [
        lambda forged: forged.split(),
        lambda forged: forged[0],
        lambda forged: forged.spliced(0, 1, []),
        *([] if has_three else [lambda forged: forged.decode()]),
    ]
    for look in looks:
        with pytest.raises(ValueError):
            look(Items.in_document(memoryview(text), 3))
    if has_three:
        assert Items.in_document(memoryview(text), 3).decode() == json.loads(text)


def test_line_with_two_items_is_refused_when_it_is_used() -> None:
    """A text may have as many lines as its header says, and more items. Reading it or changing its items is refused."""
    forged = Items.in_document(memoryview(b'[\n{"id":"a"},{"id":"b"},\n2,\n3\n]'), 3)
    with pytest.raises(ValueError):
        forged.decode()
    with pytest.raises(ValueError):
        json_codec.decode(forged.split()[0])
    with pytest.raises(ValueError):
        WorkingList("messages", forged, tx=None, values={})[0]


# --- ids --------------------------------------------------------------------------------------------------------------


def test_ids_of_different_types_are_different() -> None:
    """``1``, ``"1"``, ``True`` and ``1.0`` are different. A value that is neither string nor integer is no id."""
    found = of([{"id": 1}, {"id": "1"}, {"id": True}, {"id": 1.0}, {"id": None}])
    assert [as_id(wanted) for wanted in (True, 1.0, None, ["a"], {"a": 1})] == [None] * 5
    assert [as_id(wanted) for wanted in ("a", "", 0, 2**70)] == ["a", "", 0, 2**70]
    assert (find(found, 1), find(found, "1")) == (0, 1)


@pytest.mark.parametrize("spelt", [b'{"id":"\\u0061"}', b'{"id":"a"}', b'{"\\u0069d":"a"}', b'{"x":1, "id" : "a" }'])
def test_id_is_found_however_it_is_spelt(spelt: bytes) -> None:
    """An id that another program wrote with escapes is the same id."""
    assert find(Items([b'{"id":"b"}', spelt]), "a") == 1
    assert find(Items.in_document(memoryview(b'[\n{"id":"b"},\n%b\n]' % spelt), 2), "a") == 1


@pytest.mark.parametrize("make", [of, in_document])
@pytest.mark.parametrize("length", [3, content._NEAR_END - 1, content._NEAR_END, content._NEAR_END + 3, 500])
def test_ids_are_right_after_a_change_at_any_place(make: Any, length: int) -> None:
    """Ids are right after an insertion, a removal or a replacement near either end, also if two items have one id."""
    values: list[Any] = [{"id": f"m{number}"} for number in range(length)]
    values[0] = values[length // 2] = values[-1] = {"id": "twice"}
    for at in {0, 1, 2, length // 2, length - 3, length - 2, length - 1, length} & set(range(length + 1)):
        for remove in (0, 1):
            for insert in ([], [{"id": "new"}], [{"id": "twice"}], [{"id": "m1"}, {"id": "new"}]):
                if at + remove > length:
                    continue
                before = make(values)
                assert find(before, "m1") == last_place_of(values, "m1"), "the ids are read before the change"
                after = before.spliced(at, remove, list(map(json_codec.encode, insert)))
                expected = values[:at] + insert + values[at + remove :]
                for wanted in ("new", "twice", "m1", f"m{length - 2}", f"m{length - 3}", "none"):
                    assert find(after, wanted) == last_place_of(expected, wanted), (at, remove, insert, wanted)
                    assert find(before, wanted) == last_place_of(values, wanted), (at, remove, insert, wanted)


@given(
    st.lists(items, max_size=6),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2), item_lists), max_size=6),
    st.sets(keys),
)
def test_ids_are_right_after_a_row_of_changes(
    values: list[Any], changes: list[tuple[int, int, list[Any]]], asked_for: set[str]
) -> None:
    """Each value hands its ids on to the next one, for each key that was asked for. Both values still find all ids."""
    found, history = of(values), []
    for wanted_at, wanted_remove, insert in changes:
        for key in asked_for:
            find(found, "a", key)
        history.append((found, values))
        at = min(wanted_at, len(values))
        remove = min(wanted_remove, len(values) - at)
        found = found.spliced(at, remove, list(map(json_codec.encode, insert)))
        values = values[:at] + insert + values[at + remove :]
        assert_holds(found, values)
    for old, its in history:
        assert_holds(old, its)


# --- where a value stands ---------------------------------------------------------------------------------------------


def text_of(size_bytes: int) -> str:
    """Return a text whose JSON has this size."""
    return "x" * (size_bytes - 2)


def test_value_stands_apart_above_4_kib() -> None:
    """A value of 4 KiB is a field, and a value that is one byte larger is a part, whatever type it has."""
    at, above = text_of(APART_BYTES), text_of(APART_BYTES + 1)
    found = encoded(
        {"a": at, "b": above, "c": [at[4:]], "d": [above], "e": {"k": above}, "messages": [], "tool_calls": {}}
    )
    assert found.fields.keys() == {"a", "c"}
    assert found.apart.keys() == {"b", "d", "e", *ALWAYS_APART}
    assert isinstance(found.apart["d"], Items)
    assert type(found.apart["e"]) is type(found.apart["b"]) is bytes
    assert len(found.apart["b"]) == APART_BYTES + 1
    assert found.counts == {"b": None, "d": 1, "e": None, "messages": 0, "tool_calls": None}


@pytest.mark.parametrize("count", [2, 16, 17, 400])
@pytest.mark.parametrize("above", [-2, -1, 0, 1, 2, 20, 500])
def test_list_has_one_size_whichever_form_it_has(count: int, above: int) -> None:
    """The size of a list is its JSON without newlines, as items, as one text, and as a value among the fields."""
    data = {"notes": ["x"] * (count - 1) + [text_of(APART_BYTES - 2 - 4 * (count - 1) + above)]}
    assert len(json_codec.encode(data["notes"])) == APART_BYTES + above
    anew = encoded(data)
    assert ("notes" in anew.apart) is (above > 0)
    for form in (of(data["notes"]), in_document(data["notes"]), json_codec.encode(data["notes"])):
        assert placed([("notes", form)]) == anew
    assert encoded(data, encoded({"notes": ["x"] * 2000})) == anew


def test_largest_fields_leave_while_they_are_above_32_kib() -> None:
    """The fields have at most 32 KiB. The largest field becomes a part first.
    Of two equal fields, the one with the greater name does.
    """
    exact = {f"f{number}": text_of(APART_BYTES) for number in range(FIELDS_BYTES // APART_BYTES)}
    assert encoded(exact).apart == {}
    assert encoded(exact | {"n": 1}).apart.keys() == {"f7"}
    assert encoded(exact | {"f9": text_of(4000), "f8": text_of(4000)}).apart.keys() == {"f6", "f7"}
    assert encoded(exact | {"a": text_of(4000), "f3": text_of(3000)}).apart.keys() == {"f7"}
    assert encoded(exact | {"a": 1, "f0": text_of(APART_BYTES - 1)}).apart == {}
    lists = {name: [value[2:]] for name, value in exact.items()}
    assert encoded(lists).apart == {}
    assert isinstance(encoded(lists | {"n": 1}).apart["f7"], Items)


values_of_all_sizes: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, 1, "x", [], {}, [1, {"id": "a"}]]),
    st.sampled_from([APART_BYTES - 1, APART_BYTES, APART_BYTES + 1, 3000, 4000]).map(text_of),
    st.sampled_from([1, 17, 300, 1500]).map(lambda count: list(range(count))),
    st.lists(st.sampled_from(["y" * 1300, {"id": "b"}, "\ud800"]), max_size=4),
    st.sampled_from([3000, 5000]).map(lambda size: {"k": "z" * size}),
)
fields_of_all_sizes = st.dictionaries(
    st.sampled_from([*(f"f{number}" for number in range(16)), *ALWAYS_APART, "\ud800"]),
    values_of_all_sizes,
    max_size=16,
)


@given(fields_of_all_sizes, fields_of_all_sizes)
def test_where_a_value_stands_follows_from_the_content_alone(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A process that changed a content agrees with one that reads it. Neither history nor the order of keys counts."""
    anew = encoded(after)
    for like in (encoded(before), encoded(after), None):
        for data in (after, dict(reversed(after.items()))):
            found = encoded(data, like)
            assert found == anew
            assert found.fields.keys() == anew.fields.keys()
    assert placed(anew) == placed(reversed(list(anew))) == anew
    moved: dict[str, Value] = {**dict(encoded(before)), **dict(anew)}
    assert placed(moved.items()) == encoded(before | after)


@given(fields_of_all_sizes)
def test_content_is_its_data(data: dict[str, Any]) -> None:
    """A decoded content is the data that went in. The sizes are the sizes of the JSON in a document."""
    found = encoded(data)
    assert json_codec.same(found.decode(), data)
    assert {name: decode(value) for name, value in found.fields.items()} == {name: data[name] for name in found.fields}
    assert found.counts == {name: len(data[name]) if type(data[name]) is list else None for name in found.apart}
    assert all(isinstance(value, Items) is (type(data[name]) is list) for name, value in found.apart.items())
    for name, value in found:
        assert decode(value) == data[name]
        assert as_json(value) == json_codec.encode(data[name])
        assert found.get(name) is value
    assert sum(map(len, found.fields.values())) <= FIELDS_BYTES
    document = json.loads(to_bytes(first_header(), found))
    parts = document.pop(HEADER)["parts"]
    assert document == data
    assert {name: part["bytes"] for name, part in parts.items()} == {
        name: value.size_bytes if isinstance(value, Items) else len(value) for name, value in found.apart.items()
    }


def test_content_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values of a document together have one limit, so that a document that was written can be read back."""
    monkeypatch.setattr(json_codec, "MAX_BYTES", 10_000)
    encoded({"a": text_of(3000), "b": text_of(6000)})
    with pytest.raises(TooLarge, match="more than 10,000 bytes"):
        encoded({"a": text_of(3000), "b": text_of(7000)})


# --- what need not be checked again -----------------------------------------------------------------------------------


def test_nan_in_the_place_of_null_reads_as_null() -> None:
    """Equal JSON text means unchanged. So a NaN is no error where the earlier content has null, and only there."""
    data: dict[str, Any] = {"cost": None, "messages": [{"cost": None}], "meta": {"cost": [None]}}
    like = encoded(data)
    data["cost"] = data["messages"][0]["cost"] = data["meta"]["cost"][0] = math.nan
    found = encoded(data, like)
    assert found == like
    assert found.decode() == {"cost": None, "messages": [{"cost": None}], "meta": {"cost": [None]}}
    for wrong in ({"new": math.nan}, {"cost": [math.nan]}, {"messages": [{"cost": None}, {"more": math.nan}]}):
        with pytest.raises(NotJSON):
            encoded(data | wrong, like)


@pytest.mark.parametrize(
    "wrong", [(1,), {1}, math.nan, {1: 2}, {"\ud83d\ude00": 1, "😀": 2}, b"x", 10**4300], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("place", [0, 150, 299, 300])
def test_what_json_would_change_is_refused_wherever_it_comes(wrong: Any, place: int) -> None:
    """A value that JSON would change is refused anywhere in a list: among the known items, as the last, and behind
    it.
    """
    values: list[Any] = [{"content": [number]} for number in range(300)]
    for name in ("messages", "notes"):
        data = {name: values[:]}
        for like in (encoded(data), None):
            changed = [*values[:place], {"content": [wrong]}, *values[place + 1 :]]
            with pytest.raises(NotJSON) as caught:
                encoded({name: changed}, like)
            assert caught.value.path[:2] == (name, place)


@pytest.mark.parametrize("key", [1, True, None, 1.5, ("a",), b"x"], ids=repr)
@pytest.mark.parametrize("count", [3, 300])
def test_no_key_is_taken_for_a_string(key: Any, count: int) -> None:
    """Top-level keys are checked like keys further down, however much was encoded before."""
    values = [{"id": str(number)} for number in range(count)]
    for like in (None, encoded({"messages": values})):
        with pytest.raises(NotJSON, match="only string keys"):
            encoded({"messages": values, key: 1}, like)


@pytest.mark.parametrize("key", ["title", "messages", HEADER])
def test_key_that_is_a_subclass_of_str_is_refused(key: str) -> None:
    """Such a key is equal to a string, but would come back as another type."""
    kind = type("Name", (str,), {})
    with pytest.raises((NotJSON, persist.InvalidArgument)):
        encoded({kind(key): []}, encoded({"title": [], "messages": []}))


def test_items_that_did_not_change_are_the_known_objects() -> None:
    """An append to a large list keeps the known encoded items, which are not checked or stored twice."""
    values = [{"id": f"m{number}", "content": "x" * 50} for number in range(500)]
    before = encoded({"messages": values})
    after = encoded({"messages": [*values, {"id": "new"}]}, before)
    old, new = before.apart["messages"], after.apart["messages"]
    assert isinstance(old, Items)
    assert isinstance(new, Items)
    assert all(one is other for one, other in zip(old.split(), new.split(), strict=False))
    assert encoded({"messages": values}, before).apart["messages"] is old
    assert len(between(before, after)) == 1


def test_nan_in_a_new_item_is_refused_though_its_text_stands_elsewhere() -> None:
    """A NaN reads as null only in the place of a null. Fails if the text of any known item counts as checked."""
    before = encoded({"messages": [{"a": None}, {"b": 1}]})
    with pytest.raises(NotJSON, match="NaN"):
        encoded({"messages": [{"a": None}, {"a": math.nan}, {"b": 1}]}, before)
    with pytest.raises(NotJSON, match="NaN"):
        encoded({"messages": [{"b": 1}, {"a": math.nan}]}, before)
