"""JSON exactly, and ids of all kinds, on each engine: what goes in comes out type for type."""

from __future__ import annotations

import math
import random
import string
from typing import Any

import pytest
from harness.contents import committed, everything_in

import persist

LARGE = "x" * 5000
VALUES: dict[str, Any] = {
    "large integers": [2**63, -(2**63) - 1, 2**200, -(10**400)],
    "small integers": [0, -1, 2**53 + 1],
    "floats": [0.0, -0.0, 1.0, 1e308, -5e-324, 0.1 + 0.2, 1e-7],
    "texts": ["", "\0", "a\0b", "\\u0000", "\\0", "\\", '"', "\n\r\t\x7f", "é", "日本", "😀", "\u2028", "e\u0301"],
    "surrogates": ["\ud800", "a\udfffb", {"\ud800": "\udc00"}, ["\udc00\ud800"]],
    "empty": [None, True, False, [], {}, [[]], [{}]],
    "keys": [{"": 1, "\0": 2, "b": 3, "a": 4, "\\": 5, "é": 6, '"': 7, "id": None}],
    "nested": [[[[[{"a": [{"b": [1.0, -0.0, None]}]}]]]]],
    "large": [LARGE, [LARGE, "\0", 2**70], {"\0": LARGE}],
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_values_come_out_as_they_went_in(store: persist.Store, values: list[Any]) -> None:
    """Small fields, values that stand apart and items keep types, signs, digits, NULs and the order of keys."""
    apart = [values, LARGE, LARGE]
    store.create("s", {"field": values, "apart": apart, "messages": values, "alone": {"a": values, "b": [LARGE] * 9}})
    store.extend("s", "messages", values, key=None)
    for value in values:
        store.extend("s", "messages", [value], key=None)
    with store.transaction("s") as tx:
        tx.fields["set"] = values
        tx.list("apart")[0] = values
        tx.list("messages").append(values)
    expected: dict[str, Any] = {"field": values, "apart": apart, "messages": [*values * 3, values]}
    expected |= {"alone": {"a": values, "b": [LARGE] * 9}, "set": values}
    for found in (store.load("s").data, committed(store)):
        assert {name: repr(value) for name, value in found.items()} == {
            name: repr(value) for name, value in expected.items()
        }
    assert repr(store.tail("s", limit=len(values) + 1)) == repr([*values, values])
    assert repr(list(store.view("s").list("messages"))) == repr(expected["messages"])


@pytest.mark.parametrize("value", [math.nan, math.inf, (1,), b"x", {1: 2}])
@pytest.mark.parametrize("size", ["", LARGE])
def test_what_is_no_json_is_refused(store: persist.Store, value: Any, size: str) -> None:
    """Wherever it stands, nothing is written."""
    store.create("s", {"messages": [{"id": "m1"}], "apart": [LARGE, LARGE]})
    before = everything_in(store)
    item = {"a": size, "b": value}
    for verb in (
        lambda: store.create("t", item),
        lambda: store.append("s", "messages", item),
        lambda: store.extend("s", "apart", [1, item]),
        lambda: store.update("s", lambda tx: tx.fields.update(item)),
        lambda: store.start_stream("s", {"role": "user", "content": item}),
    ):
        with pytest.raises(persist.NotJSON):
            verb()
    assert everything_in(store) == before


def test_events_are_json_exactly(store: persist.Store) -> None:
    """An event comes out as it went in, for its process and for another one."""
    store.create("s")
    given = [value for values in VALUES.values() for value in values]
    with store.start_stream("s") as stream:
        stream.emit(*given)
        stream.finish()
    assert repr([event.data for event in store.events("s", stream.id)]) == repr(given)


IDS = ["a", "A", "a b", "user:7/chat", "..", "/", "con", "\0", "a\0", "\\", "\\0", "\\\\0", "%", "%41", "_", "'; --"]
IDS += ["é", "e\u0301", "日本", "😀", "\n", " ", "x" * 512, "ß" * 512, "😀" * 512, "-", "{schema}", "%s", "%(id)s"]


def test_ids_of_all_kinds_name_sessions_of_their_own(store: persist.Store) -> None:
    """Each id is a session, and no two meet, in every verb that takes or returns ids."""
    for number, session_id in enumerate(IDS):
        store.create(session_id, {"n": number, "messages": []})
    assert store.ids() == sorted(IDS)
    for number, session_id in enumerate(IDS):
        assert store.head(session_id).fields["n"] == number
        store.append(session_id, "messages", {"id": session_id})
        with store.start_stream(session_id, {"id": "p", "role": "user", "content": session_id}) as stream:
            assert [info.session_id for info in store.streams()] == [session_id]
            stream.emit(session_id)
            stream.finish()
        assert [event.data for event in store.events(session_id, stream.id)] == [session_id]
        assert store.load(session_id).data["messages"][1]["content"] == session_id
    assert {head.id for head in store.recent(limit=100)} == {*IDS}
    for session_id in IDS:
        store.delete(session_id)
    assert store.ids() == []


FIELDS = ["", "a\0b", "\\", "\\0", "é", "😀", "%s", "%(list)s", "'", '"', "x" * 300]


def test_names_of_fields_of_all_kinds(store: persist.Store) -> None:
    """A list may have any name, and so may a value that stands apart."""
    store.create("s", {name: [LARGE, name] for name in FIELDS})
    for name in FIELDS:
        store.append("s", name, {"id": name})
    assert committed(store) == {name: [LARGE, name, {"id": name}] for name in FIELDS}
    assert [store.tail("s", field=name, limit=1) for name in FIELDS] == [[{"id": name}] for name in FIELDS]
    store.create("t", {name: {"a": LARGE} for name in FIELDS})
    store.update("t", lambda tx: tx.fields.update({name: {"b": LARGE} for name in FIELDS}))
    assert committed(store, "t") == {name: {"b": LARGE} for name in FIELDS}


LONG = "".join(random.Random(5).choices(string.ascii_letters, k=9000))


def test_long_ids_are_ids(store: persist.Store) -> None:
    """Items are found by ids that no index can hold, and a retry adds nothing."""
    ids: list[str | int] = [LONG, LONG + "é", "\ud800" + LONG, int("7" * 4000)]
    for each in [*ids, *ids]:
        store.append("s", "messages", {"id": each}, create=True)
    store.extend("s", "messages", [{"id": each} for each in [*ids, LONG[:5000]]])
    assert [item["id"] for item in store.tail("s")] == [*ids, LONG[:5000]]
    with store.transaction("s") as tx:
        assert [tx.list("messages").find(each) for each in ids] == [{"id": each} for each in ids]
        assert tx.list("messages").find(LONG[:-1]) is None
    with pytest.raises(persist.MergeConflict):
        store.append("s", "messages", {"id": LONG, "content": "another"})


@pytest.mark.parametrize("value", [LARGE, [LARGE] * 3])
def test_long_name_of_a_large_value_is_kept_or_refused(store: persist.Store, kind: str, value: Any) -> None:
    """A database refuses a name that no index can hold, and says so. Nothing is written."""
    store.create("s", {LONG: [], LONG[:1000]: value})
    if kind in ("never", "always"):
        store.update("s", lambda tx: tx.fields.update({LONG: value}))
        assert store.load("s").data[LONG] == value
        return
    with pytest.raises(persist.InvalidArgument, match=r"9,000 bytes; it must be at most 1,000 bytes"):
        store.update("s", lambda tx: tx.fields.update({LONG: value}))
    with pytest.raises(persist.InvalidArgument, match="9,000 bytes"):
        store.create("other", {LONG: value})
    assert store.load("s").data == {LONG: [], LONG[:1000]: value}
    assert store.ids() == ["s"]
