"""The working copy: the values that it hands out are committed, and a verb costs only what it touches.

The tests fail if a value that was changed in place is not checked again. They fail if only the committed list is
searched for an id, or if an append splits or decodes the committed items.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.files import file_engine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import persist
from persist import json_codec
from persist.storage.cache import Replica
from persist.storage.content import ALWAYS_APART, APART_BYTES, Items, encoded
from persist.storage.diff import Change, apply
from persist.storage.document import first_header
from persist.working_copy import WorkingCopy, WorkingList

Data = dict[str, Any]
HELLO = {"id": "m1", "role": "user", "content": "hi"}
LARGE = "x" * (APART_BYTES + 1)


def copy_of(data: Data) -> WorkingCopy:
    """Return a working copy that is not committed."""
    return WorkingCopy(Replica(first_header(), encoded(data), (0, 0, 0, 0)))


def in_document(values: list[Any]) -> Items:
    lines = b",\n".join(map(json_codec.encode, values))
    return Items.in_document(memoryview(b"[\n%b\n]" % lines if values else b"[]"), len(values))


def assert_changed_to(found: WorkingCopy, before: Data, after: Data) -> None:
    """Check the content, and that its changes turn the committed one into it, as a journal's replay does."""
    assert json_codec.same(found.content.decode(), after)
    changed = found.changed()
    if changed is None:
        assert json_codec.same(before, after)
        return
    now, changes = changed
    assert now == encoded(after)
    assert not json_codec.same(before, after), "what comes to the same is no change"
    if changes is not None:
        apart = dict(encoded(before).apart)
        for change in changes:
            apply(apart, change)
        assert apart == now.apart
        assert all(change.name in {*encoded(before).apart, *now.apart} for change in changes)


# --- the list ---------------------------------------------------------------------------------------------------------

ids = st.sampled_from(["a", "b", "c", "\ud800", 1, "1", True, None, 1.5])
keys = st.sampled_from(["id", "call", "content"])
items: st.SearchStrategy[Any] = st.one_of(
    st.fixed_dictionaries({"id": ids}, optional={"content": st.sampled_from(["x", "y", "a"]), "call": ids}),
    st.fixed_dictionaries({"call": ids}),
    st.sampled_from([None, "a", 5, [], {}]),
)


def plain_find(values: list[Any], wanted: Any, key: str = "id") -> int | None:
    """Return the place of the last item with an id, by the plainest way."""
    if type(wanted) not in (str, int):
        return None
    places = [
        place
        for place, item in enumerate(values)
        if type(item) is dict and key in item and type(item[key]) is type(wanted) and item[key] == wanted
    ]
    return places[-1] if places else None


class ListMachine(RuleBasedStateMachine):
    """Every method of a working list, beside the plain list that it must equal."""

    @initialize(values=st.lists(items, max_size=8), is_text=st.booleans())
    def begin(self, values: list[Any], is_text: bool) -> None:
        # The lists go through JSON because Hypothesis may draw one object for two items.
        self.committed, self.plain = (json_codec.decode(json_codec.encode(values)) for _ in range(2))
        self.base = in_document(values) if is_text else Items(list(map(json_codec.encode, values)))
        self.list = WorkingList("messages", self.base, tx=None, values={})
        self.handed_out: list[tuple[Data, Data]] = []

    @rule(item=items)
    def append(self, item: Any) -> None:
        self.list.append(copy.deepcopy(item))
        self.plain.append(copy.deepcopy(item))

    @rule(place=st.integers(-10, 10), item=items)
    def insert(self, place: int, item: Any) -> None:
        self.list.insert(place, copy.deepcopy(item))
        self.plain.insert(place, copy.deepcopy(item))

    @rule(place=st.integers(-10, 10), item=items)
    def put(self, place: int, item: Any) -> None:
        self.both(lambda each: each.__setitem__(place, copy.deepcopy(item)))

    @rule(place=st.integers(-10, 10))
    def pop(self, place: int) -> None:
        self.both(lambda each: each.pop(place))

    @rule(place=st.integers(-10, 10))
    def delete(self, place: int) -> None:
        self.both(lambda each: each.__delitem__(place))

    @rule(start=st.integers(-5, 10), stop=st.integers(-5, 10), step=st.sampled_from([1, 2, -1]))
    def delete_slice(self, start: int, stop: int, step: int) -> None:
        self.both(lambda each: each.__delitem__(slice(start, stop, step)))

    @rule(start=st.integers(-5, 10), stop=st.integers(-5, 10), step=st.sampled_from([1, 2, -1]))
    def look_at_slice(self, start: int, stop: int, step: int) -> None:
        self.both(lambda each: list(each[start:stop:step]))

    @rule(place=st.integers(-10, 10))
    def hand_out(self, place: int) -> None:
        found = self.both(lambda each: each[place])
        if type(found) is dict:
            self.handed_out.append((self.list[place], self.plain[place]))

    @rule(pick=st.integers(0, 5), wanted=ids, key=keys)
    def change_what_was_handed_out(self, pick: int, wanted: Any, key: str) -> None:
        if self.handed_out:
            for each in self.handed_out[pick % len(self.handed_out)]:
                each[key] = wanted

    @rule(wanted=ids, key=keys)
    def place_of(self, wanted: Any, key: str) -> None:
        assert self.list.place_of(wanted, key) == plain_find(self.plain, wanted, key)

    @rule(wanted=ids, key=keys)
    def find(self, wanted: Any, key: str) -> None:
        place = plain_find(self.plain, wanted, key)
        found = self.list.find(wanted, key)
        if place is None:
            assert found is None
        else:
            assert json_codec.same(found, self.plain[place])
            assert self.list[place] is found, "to be changed in place"
            self.handed_out.append((found, self.plain[place]))

    def both(self, use: Callable[[Any], Any]) -> Any:
        """Use both lists. They must agree, also in an `IndexError`."""
        answers: list[Any] = []
        for each in (self.list, self.plain):
            try:
                answers.append(use(each))
            except IndexError:
                answers.append(IndexError)
        assert json_codec.same(*answers) if type(answers[0]) is not type else answers[0] is answers[1]
        return answers[0]

    @invariant()
    def changes_make_the_list(self) -> None:
        if not hasattr(self, "list"):
            return
        assert len(self.list) == len(self.plain)
        changes, after = self.list.changes()
        # An item that differs from the committed one only in the order of its keys keeps the committed JSON.
        assert json_codec.same(after.decode(), self.plain)
        assert after.size_bytes == Items(list(map(json_codec.encode, self.plain))).size_bytes
        if not changes:
            assert after == self.base
        assert self.base == Items(list(map(json_codec.encode, self.committed))), "what is committed stays as it is"


TestWorkingListIsAList = ListMachine.TestCase


@pytest.mark.parametrize("length", [10, 500])
def test_append_does_not_split_the_text(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append, or a find of any id, neither decodes nor splits the committed text."""
    base = in_document([{"id": f"m{number}"} for number in range(length)])
    text, _ = base.in_text()
    working = WorkingList("messages", base, tx=None, values={})
    monkeypatch.setattr(Items, "split", lambda _: pytest.fail("the text was split"))
    monkeypatch.setattr(Items, "decode", lambda _: pytest.fail("the text was decoded"))
    assert working.place_of("m3") == 3
    assert working.find("new") is None
    working.append({"id": "new"})
    working.append({"id": "newer"})
    assert working.find("new") == {"id": "new"}
    assert working.place_of("new") == length
    changes, after = working.changes()
    assert [(change.at, change.remove, len(change.insert)) for change in changes] == [(length, 0, 2)]
    assert after.in_text()[0] is text
    assert after.find("newer") == length + 1


def noting_decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Note all that is decoded from now on."""
    decoded: list[bytes] = []
    real = json_codec.decode

    def decode(encoded: bytes) -> Any:
        decoded.append(bytes(encoded))
        return real(encoded)

    monkeypatch.setattr(json_codec, "decode", decode)
    return decoded


def test_what_stands_behind_a_change_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An insert before the end, as of a tool's result before the partial answer, decodes no neighbour."""
    values = [{"id": f"m{number}"} for number in range(100)]
    working = WorkingList("messages", Items(list(map(json_codec.encode, values))), tx=None, values={})
    decoded = noting_decoded(monkeypatch)
    working.insert(97, {"id": "tool"})
    [change], _ = working.changes()
    assert (change.at, change.remove, list(map(bytes, change.insert))) == (97, 0, [b'{"id":"tool"}'])
    assert decoded == []
    assert working[99] == {"id": "m98"}
    assert decoded == [b'{"id":"m98"}']


# --- the fields and the document --------------------------------------------------------------------------------------

names = st.sampled_from(["title", "tags", "notes", "\ud800"])
values = st.one_of(
    st.sampled_from([None, "x", 5, [], [1], {"a": 1}, LARGE, [LARGE], {"a": LARGE}, list(range(3000))]),
    st.lists(items, max_size=3),
)


class CopyMachine(RuleBasedStateMachine):
    """Fields, lists and the data of one working copy, in any order, beside a plain dict.

    A name may be used in several ways. A value that was handed out in one way is seen in the others.
    """

    @initialize(data=st.dictionaries(names | st.sampled_from(["log", *ALWAYS_APART]), values, max_size=4))
    def begin(self, data: Data) -> None:
        self.before = {
            name: value if type(value) is list or name not in ("log", *ALWAYS_APART) else [value]
            for name, value in json_codec.decode(json_codec.encode(data)).items()
        }
        self.plain = copy.deepcopy(self.before)
        self.copy = copy_of(self.before)
        self.dropped: set[str] = set()

    @rule(name=names, value=values)
    def set_field(self, name: str, value: Any) -> None:
        self.copy.fields[name] = copy.deepcopy(value)
        self.plain[name] = copy.deepcopy(value)

    @rule(name=names)
    def drop_field(self, name: str) -> None:
        assert json_codec.same(self.copy.fields.pop(name, "none"), self.plain.pop(name, "none"))
        self.dropped.add(name)

    @rule(name=names)
    def look(self, name: str) -> None:
        assert json_codec.same(self.copy.fields.get(name, "none"), self.plain.get(name, "none"))
        assert (name in self.copy.fields) is (name in self.plain)

    @rule(name=names)
    def change_field_in_place(self, name: str) -> None:
        for each in (self.copy.fields, self.plain):
            value = each.get(name)
            if type(value) is list:
                value.append("more")
            elif type(value) is dict:
                value["more"] = 1

    @rule(name=names | st.sampled_from(["log", *ALWAYS_APART]), item=items | st.just(LARGE))
    def append(self, name: str, item: Any) -> None:
        if type(self.plain.get(name, [])) is not list:
            with pytest.raises(persist.InvalidArgument):
                self.copy.list(name)
            return
        self.copy.list(name).append(copy.deepcopy(item))
        self.plain.setdefault(name, []).append(copy.deepcopy(item))

    @rule()
    def ask_for_data(self) -> None:
        assert json_codec.same(self.copy.data, self.plain)

    @rule(name=names | st.sampled_from(["log", *ALWAYS_APART]), value=values)
    def change_data(self, name: str, value: Any) -> None:
        data = self.copy.data
        if name in ("log", *ALWAYS_APART) and type(value) is not list:
            data.pop(name, None)
            self.plain.pop(name, None)
            self.dropped.add(name)
            return
        data[name], self.plain[name] = copy.deepcopy(value), copy.deepcopy(value)

    @rule(name=names | st.sampled_from(["log", *ALWAYS_APART]))
    def pop(self, name: str) -> None:
        if self.plain.get(name) and type(self.plain[name]) is list:
            assert json_codec.same(self.copy.list(name).pop(), self.plain[name].pop())
            if not self.plain[name] and name not in self.copy.content.decode():
                # The first item makes a missing list.
                assert name not in self.before or name in self.dropped
                del self.plain[name]

    @invariant()
    def content_is_the_plain_dict(self) -> None:
        if hasattr(self, "copy"):
            assert_changed_to(self.copy, self.before, self.plain)
            assert sorted(self.copy.fields) == sorted(name for name in self.plain if name not in ALWAYS_APART)
            assert len(self.copy.fields) == len(list(self.copy.fields))


TestWorkingCopyIsADocument = CopyMachine.TestCase


def test_what_was_handed_out_is_what_is_committed(store: persist.Store) -> None:
    """A dict or list that a caller got and changed in place is committed as it is at the end of the block."""
    store.create("s", {"meta": {"a": [1]}, "notes": ["n"] * 3000, "messages": [HELLO, {"id": "m2"}]})
    with store.transaction("s") as tx:
        meta, notes, messages = tx.fields["meta"], tx.fields["notes"], tx.list("messages")
        first = messages.find("m1")
        messages.append({"id": "m3"})
        last = messages[2]
        meta["a"].append(2)
        notes[1500] = "changed"
        first["seen"] = True
        last["content"] = "late"
        new: Data = {}
        tx.fields["new"] = new
        new["k"] = 1
    expected = {
        "meta": {"a": [1, 2]},
        "notes": ["n"] * 1500 + ["changed"] + ["n"] * 1499,
        "messages": [{**HELLO, "seen": True}, {"id": "m2"}, {"id": "m3", "content": "late"}],
        "new": {"k": 1},
    }
    assert (store.load("s").data, store.load("s").revision) == (expected, 2)


def test_data_once_asked_for_is_what_is_committed(store: persist.Store) -> None:
    """`tx.data` is the whole document as a plain dict, with the changes made before it was asked for.
    Later changes of it are committed.
    """
    store.create("s", {"title": "t", "messages": [HELLO]})
    with store.transaction("s") as tx:
        tx.fields["title"] = "new"
        tx.list("messages").append({"id": "m2"})
        data = tx.data
        assert data == {"title": "new", "messages": [HELLO, {"id": "m2"}]}
        data["n"] = 1
        del data["messages"][0]
    assert store.load("s").data == {"title": "new", "messages": [{"id": "m2"}], "n": 1}


def test_value_that_is_asked_for_in_two_ways_is_one_value(store: persist.Store) -> None:
    """A list among the fields, as a working list, and in the data is the same list: no edit of it is lost."""
    store.create("s", {"log": [{"n": 1}], "messages": [HELLO]})
    with store.transaction("s") as tx:
        item = tx.list("log")[0]
        tx.fields["log"].append("by the field")
        tx.list("log").append("by the list")
        data = tx.data
        message = tx.list("messages")[0]
        tx.list("messages").append("by the list")
        data["log"].append("by the data")
        tx.fields["title"] = "late"
        tx.list("new").append("new")
        item["n"] = 2
        message["seen"] = True
    log = [{"n": 2}, "by the field", "by the list", "by the data"]
    messages = [{**HELLO, "seen": True}, "by the list"]
    assert store.load("s").data == {"log": log, "messages": messages, "title": "late", "new": ["new"]}


@pytest.mark.parametrize("mode", ["always", "never"])
def test_list_that_was_deleted_begins_anew(directory: Path, mode: Any) -> None:
    """A list that replaces a deleted one has none of the old items."""
    store = persist.Store(directory, journal=mode)
    for old, new in itertools.product(([1, 2], list(range(3000))), ("new", LARGE)):
        store.create("s", {"log": old})
        with store.transaction("s") as tx:
            del tx.fields["log"]
            assert list(tx.list("log")) == []
            assert "log" not in tx.fields
            tx.list("log").append(new)
            assert "log" in tx.fields
        assert persist.Store(directory).load("s").data == {"log": [new]}
        store.delete("s")


@pytest.mark.parametrize("wrong", [b"x", b'{"id":"m9"}', b""])
def test_bytes_are_no_item(wrong: bytes, store: persist.Store) -> None:
    """Bytes are refused at once, and never pass for the JSON of an item. Otherwise they would damage the document."""
    store.create("s", {"messages": [HELLO]})
    uses: list[Callable[[persist.Transaction], object]] = [
        lambda tx: tx.list("messages").append(wrong),
        lambda tx: tx.list("messages").insert(0, wrong),
        lambda tx: tx.list("messages").__setitem__(0, wrong),
        lambda tx: tx.list("new").extend([wrong]),
        lambda tx: tx.list("messages")[0].update(a=wrong),
        lambda tx: tx.data["messages"].append(wrong),
    ]
    for use in uses:
        with pytest.raises(persist.NotJSON), store.transaction("s") as tx:
            use(tx)
    assert store.load("s").data == {"messages": [HELLO]}


def test_copy_that_was_only_looked_at_is_no_commit(store: persist.Store) -> None:
    """A block that changes nothing is no commit.
    Nor is a block that puts everything back, or changes only the order of keys.
    """
    store.create("s", {"meta": {"a": 1, "b": 2}, "messages": [HELLO]})
    with store.transaction("s") as tx:
        assert dict(tx.fields) == {"meta": {"a": 1, "b": 2}}
        assert list(tx.list("messages")) == [HELLO]
        tx.list("messages").append(tx.list("messages").pop())
        tx.list("missing").extend([])
        tx.fields["meta"] = {"b": 2, "a": 1}
        tx.fields["new"] = 1
        del tx.fields["new"]
        tx.list("messages")[0] = dict(reversed(HELLO.items()))
    assert store.head("s").revision == 1


def test_block_that_raises_writes_nothing(store: persist.Store) -> None:
    """A block that raises writes nothing, whatever it has changed by then."""
    store.create("s", {"messages": [HELLO]})
    with pytest.raises(LookupError), store.transaction("s") as tx:
        tx.fields["n"] = 1
        tx.list("messages").clear()
        raise LookupError
    assert (store.load("s").data, store.head("s").revision) == ({"messages": [HELLO]}, 1)


def test_names_that_belong_to_others_are_refused(store: persist.Store) -> None:
    """The header, the two lists and the stream fields are refused as fields, because each has its own verb."""
    store.create("s", {"title": "t", "messages": [HELLO]})
    for name in ("_persist", *ALWAYS_APART):
        with pytest.raises(persist.InvalidArgument), store.transaction("s") as tx:
            tx.fields[name] = []
        with store.transaction("s") as tx:
            assert name not in tx.fields
            assert name not in list(tx.fields)
            with pytest.raises(KeyError):
                tx.fields[name]
            with pytest.raises(KeyError):
                del tx.fields[name]
    with pytest.raises(persist.InvalidArgument), store.transaction("s") as tx:
        tx.list("_persist")
    with pytest.raises(persist.InvalidArgument, match="'title' of the document is str"), store.transaction("s") as tx:
        tx.list("title")
    with pytest.raises(persist.InvalidArgument, match="start_stream"), store.transaction("s") as tx:
        tx.fields["active_stream_id"] = "mine"
    assert store.head("s").revision == 1


@pytest.mark.parametrize(
    "wrong", [(1,), {1}, float("nan"), {1: 2}, {"\ud83d\ude00": 1, "😀": 2}], ids=lambda value: type(value).__name__
)
def test_what_json_would_change_is_refused_with_its_place(wrong: Any, store: persist.Store) -> None:
    """The error names an item by its place in the list, and a field by its name. Nothing is written."""
    store.create("s", {"title": "t", "messages": [HELLO] * 3})
    uses: list[tuple[Callable[[persist.Transaction], object], tuple[Any, ...]]] = [
        (lambda tx: tx.list("messages").append({"a": [wrong]}), ("messages", 3)),
        (lambda tx: tx.list("messages")[1].update(a=wrong), ("messages", 1)),
        (lambda tx: tx.fields.update(new={"a": wrong}), ("new",)),
        (lambda tx: tx.data["messages"][2].update(a=wrong), ("messages", 2)),
    ]
    for use, path in uses:
        with pytest.raises(persist.NotJSON) as caught, store.transaction("s") as tx:
            use(tx)
        assert caught.value.path[: len(path)] == path
    assert store.head("s").revision == 1


# --- what a verb costs ------------------------------------------------------------------------------------------------


def changes_of(use: Callable[[WorkingCopy], object], data: Data) -> tuple[Change, ...]:
    working = copy_of(data)
    use(working)
    changed = working.changed()
    assert changed is not None
    assert changed[1] is not None
    return changed[1]


def test_changes_are_those_that_the_verb_made() -> None:
    """A commit writes only the verb's changes, in the verb's own terms, wherever the values are stored."""
    data = {"title": "t", "notes": LARGE, "log": ["x" * 100] * 100, "messages": [HELLO] * 50}
    assert changes_of(lambda tx: tx.fields.update(title="u"), data) == ()
    [append] = changes_of(lambda tx: tx.list("log").append(1), data)
    assert (append.name, append.at, append.remove, list(map(bytes, append.insert))) == ("log", 100, 0, [b"1"])
    [gone] = changes_of(lambda tx: tx.fields.pop("notes"), data)
    assert (gone.name, gone.is_gone) == ("notes", True)
    [shrunk] = changes_of(lambda tx: tx.fields.update(notes="n"), data)
    assert (shrunk.name, shrunk.is_gone) == ("notes", True)
    [grown] = changes_of(lambda tx: tx.fields.update(title=LARGE), data)
    assert (grown.name, bytes(grown.value)) == ("title", json_codec.encode(LARGE))  # type: ignore[arg-type]
    [popped] = changes_of(lambda tx: tx.list("messages").pop(), data)
    assert (popped.name, popped.at, popped.remove, popped.insert) == ("messages", 49, 1, ())


def test_field_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of one value decodes only that value, so a large neighbour costs nothing."""
    working = copy_of({"title": "t", "meta": {"a": 1}, "notes": LARGE, "messages": [HELLO] * 50})
    decoded = noting_decoded(monkeypatch)
    assert working.fields["title"] == "t"
    assert "notes" in working.fields
    assert len(working.fields) == 3
    assert working.list("messages").place_of("m1") == 49
    assert decoded == [b'"t"']


def test_value_that_crosses_4_kib_moves_both_ways_in_a_journal(directory: Path) -> None:
    """A value leaves the fields and comes back, as a text and as a list. A replay agrees each time."""
    store = persist.Store(directory, journal="always")
    file_engine(store).options.verifies_folds = True
    store.create("s", {"title": "t", "messages": [HELLO]})
    for value in (LARGE, "x", [LARGE], ["x"], {"a": LARGE}, LARGE[:-3], LARGE[:-2], [1] * 3000, [1], None):
        with store.transaction("s") as tx:
            tx.fields["value"] = value
        other = persist.Store(directory, journal="always")
        assert other.load("s").data == {"title": "t", "messages": [HELLO], "value": value}
        is_apart = len(json_codec.encode(value)) > APART_BYTES
        assert ("value" in other.head("s").fields) is not is_apart
        assert other.head("s").counts.get("value") == (len(value) if type(value) is list else None)
    log = [{"n": number, "text": "y" * 200} for number in range(40)]
    for item in log:
        store.append("s", "log", item)
    with store.transaction("s") as tx:
        assert list(tx.list("log")) == log
        del tx.list("log")[5:]
    assert persist.Store(directory).head("s").fields["log"] == log[:5]
    assert store.compact("s")
    assert persist.Store(directory).load("s").data["log"] == log[:5]


def test_damage_is_told_to_every_writer(directory: Path) -> None:
    """Every writer gets the error, even if its verb touches no damaged value. A commit on top would seal the damage."""
    store = persist.Store(directory, journal="always")
    store.create("s", {"title": "t", "messages": [HELLO]})
    path = directory / "s.json"
    path.write_bytes(path.read_bytes().replace(b'"hi"', b'"ho"'))
    for each in (store, persist.Store(directory)):
        with pytest.raises(persist.CorruptSession), each.transaction("s") as tx:
            tx.fields["title"] = "u"
        with pytest.raises(persist.CorruptSession):
            each.append("s", "log", 1)


@given(st.lists(items, max_size=6), st.lists(items, max_size=3))
def test_find_after_edits_is_that_of_the_list(base: list[Any], more: list[Any]) -> None:
    """An id is found behind the committed items, among them, and where two items have it."""
    working = WorkingList("messages", in_document(base), tx=None, values={})
    for item in more:
        working.insert(len(working) // 2, item)
    plain = [*working]
    for key, wanted in itertools.product(("id", "call", "content"), ("a", "b", "\ud800", 1, "1", True, None, 1.5)):
        place = plain_find(plain, wanted, key)
        assert working.place_of(wanted, key) == place
        assert working.find(wanted, key) is (None if place is None else plain[place])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda tx, items: items.append(HELLO),
        lambda tx, items: items.__setitem__(0, HELLO),
        lambda tx, items: items.__delitem__(0),
        lambda tx, items: tx.fields.__setitem__("title", "late"),
        lambda tx, items: tx.fields.__delitem__("title"),
        lambda tx, items: tx.list("other").append(HELLO),
    ],
    ids=["append", "set", "delete", "field", "field-gone", "other-list"],
)
def test_change_after_the_block_is_refused(
    change: Callable[[persist.Transaction, WorkingList], None], tmp_path: Path
) -> None:
    """F20: a change that would be lost is an error. Fails if a copy does not check that its lock is held."""
    store = persist.Store(tmp_path / "sessions")
    store.create("s", {"messages": [HELLO], "title": "t"})
    with store.transaction("s") as tx:
        items = tx.list("messages")
    with pytest.raises(persist.LockError):
        change(tx, items)
    assert store.load("s").data == {"messages": [HELLO], "title": "t"}
