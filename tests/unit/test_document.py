"""The document on disk: its layout, what a reader gets from it, and that damage is never taken for a document."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import xxhash
from harness.faults import make_socket
from harness.journals import traffic
from hypothesis import given
from hypothesis import strategies as st

import persist
from persist import json_codec
from persist.storage import document as format3
from persist.storage.content import ALWAYS_APART, APART_BYTES, HEADER, Content, Items, encoded

M1 = {"id": "m1", "role": "user", "content": "hi\nthere"}
M2 = {"id": "m2", "role": "assistant", "content": "héllo 😀"}
DATA = {"messages": [M1, M2], "title": "File locks", "tool_calls": [{"z": 1, "a": [1]}], "meta": {"b": 1, "a": 2}}
TYPED = (persist.CorruptSession, persist.UnsupportedFormat)


def document(store: persist.Store, session_id: str = "s") -> Path:
    return store.path / f"{session_id}.json"


def put(store: persist.Store, content: bytes | str | dict[str, Any]) -> Path:
    """Write a document as another program would."""
    store.path.mkdir(exist_ok=True)
    path = document(store)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_document_is_as_the_format_says(store: persist.Store) -> None:
    """The header comes first, then the fields, then the parts, whatever the order in the data.
    A line has one key or message.
    """
    store.create("s", DATA)
    header, *body = document(store).read_text().split("\n")
    assert header.startswith('{"_persist":{"format":3,"checksum":"')
    assert body == [
        '"title":"File locks",',
        '"meta":{"b":1,"a":2},',
        '"messages":[',
        '{"id":"m1","role":"user","content":"hi\\nthere"},',
        '{"id":"m2","role":"assistant","content":"héllo 😀"}',
        "],",
        '"tool_calls":[',
        '{"z":1,"a":[1]}',
        "]",
        "}",
        "",
    ]


SHAPES: list[dict[str, Any]] = [
    {},
    {"title": "x"},
    {"messages": []},
    {"messages": [M1]},
    {"messages": [], "tool_calls": [], "title": ""},
    {"tool_calls": [1], "messages": [M1, M2]},
    {"messages": "not a list", "tool_calls": {"a": 1}},
    {"messages": None},
    {"": 0, '"': 1, "\n": 2, "\ud800": 3, "é": [4]},
    {"messages": ["\ud800", "\n", 1.0, None]},
    {"text": "},\n", "messages": ["]\n}\n"]},
    {"big": "x" * 10_000, "messages": [M1]},
    {"message": 1, "checksum": "a", "revision": 5},
]


@pytest.mark.parametrize("data", SHAPES, ids=lambda data: ascii(data)[:40])
def test_every_shape_is_one_json_object_and_comes_back(data: dict[str, Any], store: persist.Store) -> None:
    """The file is valid JSON for everybody, with the data beside the header. `load` and `head` agree with it."""
    store.create("s", data)
    found = json.loads(document(store).read_bytes())
    assert next(iter(found)) == "_persist"
    del found["_persist"]
    assert found == data == store.load("s").data
    apart = encoded(data).apart
    assert store.head("s").fields == {key: value for key, value in data.items() if key not in apart}


def plainly(data: dict[str, Any]) -> bytes:
    """Return the bytes behind the header, as the format has them: one value after the other."""
    content = encoded(data)

    def line(key: str) -> bytes:
        value = data[key]
        if key in content.apart and type(value) is list and value:
            return json_codec.encode(key) + b":[\n" + b",\n".join(map(json_codec.encode, value)) + b"\n]"
        return json_codec.encode(key) + b":" + json_codec.encode(value)

    lines = list(map(line, [*content.fields, *content.apart]))
    return b",\n".join(lines) + b"\n}\n" if lines else b"}\n"


texts = st.text(st.characters(codec=None, exclude_categories=())).filter(
    lambda text: json.loads(json.dumps(text)) == text
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
inner = st.recursive(
    leaves, lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3), max_leaves=8
)
MANY = 300
top_level = st.lists(inner, max_size=4).map(lambda items: items * MANY) | st.lists(inner, max_size=3) | inner
documents = st.dictionaries(st.sampled_from([*ALWAYS_APART, *"abc"]) | texts, top_level, max_size=6).filter(
    lambda data: HEADER not in data
)
LONG: list[dict[str, Any]] = [
    {"messages": [M1] * MANY},
    {"tool_calls": [1] * MANY, "title": "x", "messages": [M1, M2]},
    {"messages": [None] * MANY, "tool_calls": []},
    {"messages": "no list", "tool_calls": [{}] * MANY, "a": {"b": []}},
    {"messages": [*["x"] * MANY, "\ud800"], "\ud800": 1},
    {"messages": [*[0.0] * MANY, -0.0, True, 1, 1.0, 2**64 - 1, -(2**63)], "": None},
    {"messages": [2**64] * MANY, "tool_calls": [-(2**63) - 1, 10**4299]},
    {"messages": [[[[[[[[[[1]]]]]]]]]] * MANY},
    {"\n": "},\n", "messages": ["]\n}\n"] * MANY, "tool_calls": None},
    {"context_messages": [M1] * MANY, "big": "x" * APART_BYTES, "\ud800": ["é\ud800"] * 3000},
]


def file_of(data: dict[str, Any], **header: Any) -> bytes:
    return format3.to_bytes(format3.first_header().but(**header), encoded(data))


@given(documents)
def test_a_document_is_canonical(data: dict[str, Any]) -> None:
    """Equal data gives equal bytes behind the header, and the bytes come back as the data, fields first."""
    content = file_of(data)
    header, _, rest = content.partition(b"\n")
    assert (rest if data else b"}\n") == plainly(data)
    assert content.count(HEADER.encode()) >= 1
    values = json.loads(content)
    assert list(values)[1:] == [*encoded(data).fields, *encoded(data).apart]
    assert values.pop(HEADER) == json.loads(header.removesuffix(b",") + b"}")[HEADER]
    assert values == data


@pytest.mark.parametrize("data", [*SHAPES, *LONG], ids=lambda data: ascii(data)[:40])
def test_a_document_of_any_shape_is_canonical_and_comes_back(data: dict[str, Any], tmp_path: Path) -> None:
    """The same holds for rare shapes: lone surrogates, long integers, depth, and a large value that is no list."""
    content = file_of(data, revision=7, epoch=2, owner={"stream_id": "t"})
    assert content.partition(b"\n")[2] == plainly(data)
    (tmp_path / "s.json").write_bytes(content)
    found = format3.read(tmp_path / "s.json", "s")
    assert found.content == encoded(data)
    assert json_codec.same(found.content.decode(), data)
    assert (found.header.revision, found.header.epoch, found.header.owner) == (7, 2, {"stream_id": "t"})
    head, _ = format3.read_head(tmp_path / "s.json", "s")
    assert (head.header, head.fields, head.counts) == (found.header, found.content.fields, found.content.counts)
    assert format3.to_bytes(found.header, found.content) == content, "it is written as it was read"


def test_a_document_is_written_without_splitting_what_was_read(tmp_path: Path) -> None:
    """A list that was read and got more items is written as its one text and the items behind it."""
    messages = [{"id": f"m{number}"} for number in range(100)]
    (tmp_path / "s.json").write_bytes(file_of({"messages": messages}))
    found = format3.read(tmp_path / "s.json", "s")
    old = found.content.apart["messages"]
    assert isinstance(old, Items)
    text, _ = old.in_text()
    new = old.spliced(100, 0, [b'{"id":"new"}'])
    content = format3.to_bytes(found.header, Content({}, {"messages": new}))
    assert new.in_text()[0] is text
    assert json.loads(content)["messages"] == [*messages, {"id": "new"}]
    assert format3.to_bytes(found.header, encoded({"messages": [*messages, {"id": "new"}]})) == content


def test_a_line_holds_one_key_or_one_message(store: persist.Store) -> None:
    """Line tools work: no value breaks its line, however odd its text."""
    store.create("s", {"text": "a\nb\u2028c\rd", "messages": ["x\ny", {"k": "\n"}]})
    lines = document(store).read_bytes().split(b"\n")
    assert len(lines) == 1 + 1 + 4 + 2
    assert json.loads(lines[3].rstrip(b",")) == "x\ny"


def test_the_header_says_what_persist_knows(store: persist.Store) -> None:
    """The header has format, checksums, sizes and counts, revision, incarnation, commit, times, epoch, owner, no
    more.
    """
    before = datetime.now(UTC)
    session = store.create("s", DATA)
    content = document(store).read_bytes()
    header = json.loads(content)["_persist"]
    assert list(header) == [
        *("format", "checksum", "incarnation", "revision", "commit", "epoch", "created_at", "updated_at", "owner"),
        *("journal", "folded", "fields", "parts"),
    ]
    assert (header["format"], header["revision"], header["epoch"], header["owner"]) == (3, 1, 0, None)
    assert (header["journal"], header["folded"]) == (None, None)
    assert {name: part["count"] for name, part in header["parts"].items()} == {"messages": 2, "tool_calls": 1}
    assert (len(header["incarnation"]), len(header["commit"])) == (32, 16)
    assert datetime.fromisoformat(header["created_at"]) == session.created_at
    assert before <= session.created_at == session.updated_at <= datetime.now(UTC)
    assert session.created_at.tzinfo is not None


def test_checksums_are_those_of_the_grammar(store: persist.Store) -> None:
    """Each part has the xxh3_128 and the length of its bytes. The header has the xxh3_128 of the rest of its line."""
    store.create("s", DATA | {"notes": "x" * APART_BYTES})
    content = document(store).read_bytes()
    header = json.loads(content)["_persist"]
    line = content.partition(b"\n")[0].removesuffix(b",")
    rest = line[len(b'{"_persist":{"format":3,"checksum":""') + 32 :]
    assert header["checksum"] == xxhash.xxh3_128_hexdigest(rest)
    place = content.index(b"\n") + 1
    for name, part in (("", header["fields"]), *header["parts"].items()):
        place += len(f'"{name}":') if name else 0
        text = content[place : place + part["bytes"]]
        assert part["checksum"] == xxhash.xxh3_128_hexdigest(text)
        place += part["bytes"] + len(",\n")
    assert content[place - 2 :] == b"\n}\n"


def test_a_commit_moves_revision_and_time_and_keeps_the_rest(store: persist.Store) -> None:
    """Incarnation and creation stay, the revision grows by one, and `updated_at` does not go back."""
    store.create("s", DATA)
    one = json.loads(document(store).read_bytes())["_persist"]
    store.append("s", "messages", {"id": "m3"})
    two = json.loads(document(store).read_bytes())["_persist"]
    assert (two["revision"], two["parts"]["messages"]["count"]) == (2, 3)
    assert two["updated_at"] >= one["updated_at"]
    assert two["checksum"] != one["checksum"]
    assert two["commit"] != one["commit"]
    assert two["parts"]["messages"]["checksum"] != one["parts"]["messages"]["checksum"]
    assert two["parts"]["tool_calls"] == one["parts"]["tool_calls"]
    assert (two["incarnation"], two["created_at"]) == (one["incarnation"], one["created_at"])


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_bytes", [0, 10, 3_000, 3_400, 3_500, 3_700, 4_090, 9_000, 20_000, 32_000])
def test_the_head_is_that_of_the_whole(head_bytes: int, store: persist.Store) -> None:
    """`head` and `load` agree, whether the fields fit a first read or not."""
    sizes = [min(4_000, head_bytes - place) for place in range(0, head_bytes, 4_000)]
    fields: dict[str, Any] = {f"f{number}": "é" * (size // 2 - 5) for number, size in enumerate(sizes)}
    store.create("s", {"messages": [M1, M2], **fields})
    session, head = store.load("s"), store.head("s")
    assert head.fields == {key: value for key, value in session.data.items() if key != "messages"} == fields
    assert head.counts == {"messages": 2}
    assert (head.id, head.revision, head.created_at, head.updated_at, head.active_stream_id) == (
        session.id,
        session.revision,
        session.created_at,
        session.updated_at,
        None,
    )


def test_a_head_leaves_out_what_stands_apart(store: persist.Store) -> None:
    """HAZARDS F5: no top-level value makes a head expensive. A large value is not in the head."""
    data = {"title": "t", "notes": "x" * 5_000, "context_messages": [M1] * 100, "meta": {"k": "y" * 5_000}, "n": [1]}
    store.create("s", data)
    head = store.head("s")
    assert head.fields == {"title": "t", "n": [1]}
    assert head.counts == {"context_messages": 100, "n": 1}
    assert store.load("s").data == data


@pytest.mark.parametrize("name", ["messages", "tool_calls", "notes", "log"])
def test_a_head_never_says_that_what_stands_apart_is_missing(name: str, store: persist.Store) -> None:
    """`head.fields.get("notes")` of a large value is an error that names the way. Of a missing value it is None."""
    store.create("s", {"title": None, "messages": [], "tool_calls": {}, "notes": "x" * 5_000, "log": [1] * 5_000})
    fields = store.head("s").fields
    for look in (fields.__getitem__, fields.get, lambda name: fields.get(name, 5)):
        with pytest.raises(KeyError, match=f"'{name}' is not part of a head: use store.load\\(\\) or store.tail\\(\\)"):
            look(name)
    assert name not in list(fields)
    assert len(fields) == 1
    assert (fields["title"], fields.get("title", 5), fields.get("none"), fields.get("none", 5)) == (None, None, None, 5)
    with pytest.raises(KeyError, match=r"^'none'$"):
        fields["none"]
    assert repr(fields) == "{'title': None}"


def test_a_head_counts_every_list(store: persist.Store) -> None:
    """A head counts every list, wherever the document has it. A value that is no list has no count."""
    data = {"messages": [], "tool_calls": {}, "a": [], "b": [1], "c": [1] * 5_000, "d": "x" * 5_000, "e": {"k": [1]}}
    store.create("s", data)
    expected = {"messages": 0, "a": 0, "b": 1, "c": 5_000}
    assert store.head("s").counts == expected
    put(store, data)
    assert store.head("s").counts == expected, "also of a document that another program has written"


def test_a_head_reads_only_the_beginning_of_the_file(store: persist.Store) -> None:
    """HAZARDS E4: small fields come before large values, so a head of a large session reads no message."""
    store.create("s", {"messages": ["x" * 1_000_000], "title": "t", "notes": "y" * 1_000_000})
    with traffic() as counted:
        assert store.head("s").fields == {"title": "t"}
    # The read of its journal counts, too. The journal is empty.
    assert 0 < counted.read <= 8192


# --- the tail ---------------------------------------------------------------------------------------------------------

SIZES = [0, 1, 30, 3_000, 4_093, 4_094, 4_095, 4_096, 20_000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("before", [0, 1, 5_000])
def test_a_tail_is_the_end_of_the_list(size: int, before: int, directory: Path) -> None:
    """A tail is right wherever its list is, among other parts and behind fields or none, whatever a read cuts off."""
    store = persist.Store(directory, journal="never")
    values = [{"content": "é" * (size // 2) + "a" * (size % 2)}, ",\n", [], "x", {"id": "m1"}]
    for fields in ({}, {"title": "t"}):
        data = {"notes": "y" * before, **fields, "messages": values * 3, "log": [1] * before, "tool_calls": []}
        data = {name: value for name, value in data.items() if value or name == "tool_calls"}
        store.create("s", data)
        for name, items in data.items():
            for limit in (0, 1, 2, 4, 5, 15, 10_000):
                if type(items) is list:
                    assert store.tail("s", limit=limit, field=name) == items[max(0, len(items) - limit) :]
        assert store.tail("s") == (values * 3)[-20:]
        assert store.tail("s", field="none") == []
        store.delete("s")


def test_a_tail_reads_only_the_end_of_its_list(directory: Path) -> None:
    """The last messages of a large session cost a head and some of the bytes before the list's end."""
    store = persist.Store(directory, journal="never")
    messages = [{"id": str(number), "content": "x" * 100} for number in range(10_000)]
    store.create("s", {"title": "t", "messages": messages, "notes": "y" * 1_000_000})
    with traffic() as counted:
        assert store.tail("s", limit=5) == messages[-5:]
    assert 0 < counted.read <= 2 * 4096


@pytest.mark.parametrize("field", ["title", "notes", "meta", "tool_calls"])
def test_a_tail_of_what_is_no_list_is_refused(field: str, store: persist.Store) -> None:
    """A tail of a field, of a large value, or of `tool_calls` that is no list is refused."""
    store.create("s", {"title": "t", "notes": "x" * 5_000, "meta": {"a": [1]}, "tool_calls": {}})
    with pytest.raises(persist.InvalidArgument, match=f"field '{field}' of the document is .*; it must be a list"):
        store.tail("s", field=field)


def test_a_tail_of_a_foreign_document_is_read_whole(store: persist.Store) -> None:
    """Without a header, nothing says where the lists end. The document is strict JSON, or it is refused."""
    put(store, {"messages": [M1, M2], "log": [1] * 5_000, "title": "t"})
    assert store.tail("s", limit=1) == [M2]
    assert store.tail("s", limit=2, field="log") == [1, 1]
    with pytest.raises(persist.InvalidArgument):
        store.tail("s", field="title")
    put(store, b'{"messages":[1],"messages":[2]}')
    with pytest.raises(persist.CorruptSession, match="twice"):
        store.tail("s")
    with pytest.raises(persist.SessionNotFound):
        store.tail("none")


def test_a_head_shows_the_active_stream(store: persist.Store) -> None:
    """A head has what a list of sessions needs, without the messages."""
    store.create("s")
    with store.start_stream("s", {"role": "user", "content": "?"}) as stream:
        assert store.head("s").active_stream_id == stream.id
        assert store.head("s").counts == {"messages": 1, "pending_attachments": 0}


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(store: persist.Store) -> bytes:
    """Return a document of about a kilobyte with an owner, epoch, stream fields, messages, and letters of 2-4 bytes."""
    store.create("s", {"title": "Ein Täßchen 😀", "n": -1.5e-7, "ok": True, "messages": [M1, M2], "tool_calls": [1]})
    with store.start_stream("s", {"role": "user", "content": "Why?"}, stream_id="t1") as stream:
        content = document(store).read_bytes()
        stream.finish({"role": "assistant", "content": "So."})
    assert 700 < len(content) < 1700
    return content


def verdict(function: Callable[[], Any]) -> Any:
    """Return the document that a reader gets, or its error if that is a typed one. Another error fails the test."""
    try:
        return function()
    except TYPED as error:
        return error


@pytest.fixture
def assert_never_wrong(store: persist.Store, small: bytes) -> Callable[[bytes], None]:
    """Return a check that a load of a damaged `small` is refused, and that a head is refused or right."""
    path = put(store, small)
    right = format3.read_head(path, "s")[0]

    def check(damaged: bytes) -> None:
        put(store, damaged)
        assert isinstance(verdict(lambda: format3.read(path, "s")), TYPED)
        head = verdict(lambda: format3.read_head(path, "s")[0])
        assert isinstance(head, TYPED) or head == right

    return check


Check = Callable[[bytes], None]


def test_every_truncation_is_refused(small: bytes, assert_never_wrong: Check) -> None:
    """If any number of bytes is missing from the end, even one, no document and no wrong head comes out."""
    for length in range(len(small)):
        assert_never_wrong(small[:length])


def test_every_flipped_bit_is_refused(small: bytes, assert_never_wrong: Check) -> None:
    """No single bit of a document, header included, can change without a typed error."""
    for position in range(len(small)):
        for bit in range(8):
            damaged = bytearray(small)
            damaged[position] ^= 1 << bit
            assert_never_wrong(bytes(damaged))


@pytest.mark.parametrize("tail", [b"\n", b" ", b"}", b"\x00" * 512])
def test_bytes_behind_the_end_are_refused(small: bytes, assert_never_wrong: Check, tail: bytes) -> None:
    """The checksum covers the whole file, not only the length that a header names."""
    assert_never_wrong(small + tail)


def test_lines_that_changed_places_are_refused(small: bytes, assert_never_wrong: Check) -> None:
    """Valid JSON is not enough: the order of messages is part of the document."""
    lines = small.split(b"\n")
    for place in range(1, len(lines) - 1):
        swapped = [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]
        if swapped != lines:
            assert_never_wrong(b"\n".join(swapped))


def test_the_header_of_one_revision_does_not_fit_the_body_of_another(store: persist.Store) -> None:
    """A header and a body of two good documents make no document."""
    store.create("s", {"a": 1})
    one = document(store).read_bytes()
    store.update("s", lambda tx: tx.data.update(a=2))
    two = document(store).read_bytes()
    put(store, one.split(b"\n", 1)[0] + b"\n" + two.split(b"\n", 1)[1])
    with pytest.raises(persist.CorruptSession):
        store.load("s")
    with pytest.raises(persist.CorruptSession):
        store.head("s")


def test_a_damaged_document_is_not_written_by_any_verb(store: persist.Store, small: bytes) -> None:
    """Every writer refuses the document, too. The file stays for the person who mends it."""
    damaged = small.replace(b"hi", b"ho")
    session = store.load("s")
    put(store, damaged)
    session.data["x"] = 1
    for verb in (
        session.save,
        session.refresh,
        lambda: store.update("s", lambda tx: tx.data.clear()),
        lambda: store.update("s", lambda tx: tx.fields.clear()),
        lambda: store.extend("s", "messages", [1, 2], key=None),
        lambda: store.append("s", "messages", 1),
        lambda: store.delete("s"),
        lambda: store.duplicate("s", "copy"),
        lambda: store.start_stream("s"),
    ):
        with pytest.raises(persist.CorruptSession):
            verb()
    assert document(store).read_bytes() == damaged
    assert store.ids() == ["s"]


@pytest.mark.parametrize("found", [0, 1, 2, 4, 999])
def test_a_newer_format_is_named_and_left_alone(found: int, store: persist.Store, small: bytes) -> None:
    """A document of another format is refused and left alone, because this version does not guess."""
    other = small.replace(b'"format":3', b'"format":%d' % found)
    put(store, other)
    for look in (store.load, store.head, store.accept):
        with pytest.raises(persist.UnsupportedFormat) as caught:
            look("s")
        assert (caught.value.found, caught.value.known) == (found, 3)
    assert document(store).read_bytes() == other


@pytest.fixture
def large(store: persist.Store) -> bytes:
    """Return a document of a third of a megabyte."""
    messages = [{"id": str(n), "content": "y" * 1000} for n in range(300)]
    store.create("s", {"title": "x", "messages": messages, "meta": {"a": [1]}, "notes": "z" * 5_000})
    persist.Store(store.path, journal="never").compact("s", alone=True)
    return document(store).read_bytes()


def test_two_who_ask_for_the_data_share_no_object(store: persist.Store, large: bytes) -> None:
    """The decoded data belongs to the caller: two callers share no object."""
    content = format3.read(document(store), "s").content
    first, second = content.decode(), content.decode()
    first["messages"][0]["content"] = first["meta"]["a"] = "changed"
    assert second["messages"][0]["content"] == "y" * 1000
    assert second["meta"] == {"a": [1]}
    assert content.decode() == second


def test_damage_to_a_large_document_is_refused(store: persist.Store, large: bytes) -> None:
    """A load finds a flipped bit anywhere. A head is refused or right."""
    path = document(store)
    right = format3.read_head(path, "s")[0]
    for position in (*range(0, 1500, 7), *range(1500, len(large), 10_011), len(large) - 2):
        damaged = bytearray(large)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(TYPED):
            format3.read(path, "s")
        head = verdict(lambda: format3.read_head(path, "s")[0])
        assert isinstance(head, TYPED) or head == right


def forge(store: persist.Store, fields: dict[str, bytes], apart: dict[str, Items | bytes]) -> None:
    """Write a document whose checksums are right, but whose parts are not what they say."""
    header = format3.first_header()
    document(store).write_bytes(format3.to_bytes(header, Content(fields, apart)))


def test_an_object_with_the_count_of_a_list_is_refused(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object with as many members as a list has items is refused, because a list has its brackets."""
    with monkeypatch.context() as patch:
        patch.setattr(format3, "_text_of", lambda _: b'{"a":1}')
        forge(store, {}, {"messages": as_list(b"1", 1)})
    assert b'"count":1' in document(store).read_bytes()
    with pytest.raises(persist.CorruptSession):
        store.load("s")


def test_a_header_that_is_no_utf8_is_refused(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header is refused, also for a key that no reader asks for: the file is no JSON for other programs."""
    real = json_codec.encode

    def encode(value: Any, path: Any = ()) -> bytes:
        return bytes(real(value, path)).replace(b'"epoch"', b'"x\xff":1,"epoch"')

    with monkeypatch.context() as patch:
        patch.setattr(json_codec, "encode", encode)
        forge(store, {"title": b'"x"'}, {})
    assert b"\xff" in document(store).read_bytes()
    for look in (store.load, store.head):
        with pytest.raises(persist.CorruptSession):
            look("s")


def as_list(text: bytes, count: int) -> Items:
    return Items.in_document(memoryview(b"[\n" + text + b"\n]"), count)


@pytest.mark.parametrize("extra", [b'"title":"other"', b'"_persist":{}', b'"new":1', b'"meta":{"a":[true]}'])
def test_a_field_among_the_items_of_a_document_is_refused(extra: bytes, store: persist.Store) -> None:
    """A forger who can compute a checksum cannot make `load` and `head` show two values of one field."""
    text = b"1,\n2\n],\n" + extra + b',\n"more":[\n1'
    for count in (2, 3, 4, 5):
        forge(store, {"title": b'"x"'}, {"messages": as_list(text, count)})
        forged = document(store).read_bytes()
        assert store.head("s").fields == {"title": "x"}
        with pytest.raises(persist.CorruptSession):
            store.load("s")
        uses: list[Callable[[persist.Transaction], object]] = [
            lambda tx: list(tx.list("messages")),
            lambda tx: tx.list("messages").find("m1"),
            lambda tx: tx.data,
        ]
        for use in uses:
            with pytest.raises(persist.CorruptSession):
                store.update("s", use)
        with pytest.raises(persist.CorruptSession):
            store.append("s", "messages", {"id": "m1"})
        assert document(store).read_bytes() == forged
        # Items that nobody looked at are written as they are. No reader accepts them.
        store.append("s", "messages", 5)
        with contextlib.suppress(persist.CorruptSession):
            store.update("s", lambda tx: tx.list("messages").insert(0, 5))
        assert store.head("s").fields == {"title": "x"}
        with pytest.raises(persist.CorruptSession):
            store.load("s")


@pytest.mark.parametrize(
    "apart",
    [
        pytest.param({"messages": b"[1]"}, id="a list without a count"),
        pytest.param({"messages": as_list(b"1]x[", 1)}, id="more than a list"),
        pytest.param({"messages": as_list(b'1\n],\n"x":[\n2', 2)}, id="a field"),
        pytest.param({"title": b"1"}, id="a field that stands apart, too"),
        pytest.param({"messages": b'1,\n"messages":2'}, id="a field twice"),
        pytest.param({"messages": b'1X\n"tool_calls":2'}, id="no comma"),
        pytest.param({"messages": as_list(b"1,\n2", 3)}, id="too few items"),
        pytest.param({"messages": as_list(b"1,\n2", 1)}, id="too many items"),
    ],
)
def test_parts_that_are_not_as_their_header_says_are_refused(
    apart: dict[str, Items | bytes], store: persist.Store
) -> None:
    """A forger who can compute a checksum cannot make a reader take a part of a document for another thing."""
    forge(store, {"title": b'"x"'}, apart)
    with pytest.raises(persist.CorruptSession):
        store.load("s")


def test_checksums_do_not_stop_a_forger(store: persist.Store) -> None:
    """Checksums find damage and edits by hand, as the docs say.
    A forger with the same tools makes a document that is trusted.
    """
    forge(store, {"title": b'"forged"'}, {})
    assert store.load("s").data == {"title": "forged"}


# --- documents of other programs --------------------------------------------------------------------------------------


def test_a_document_without_a_header_is_revision_zero(store: persist.Store) -> None:
    """Another program's file is taken as it is, and reading it changes nothing."""
    path = put(store, {"messages": [M1], "title": "t", "updated_at": 5})
    content = path.read_bytes()
    session, head = store.load("s"), store.head("s")
    assert session.data == {"messages": [M1], "title": "t", "updated_at": 5}
    assert (session.revision, head.revision, head.counts) == (0, 0, {"messages": 1})
    assert session.version == head.version
    assert head.fields == {"title": "t", "updated_at": 5}
    assert session.updated_at == datetime.fromtimestamp(path.stat().st_mtime, UTC)
    session.save()
    assert path.read_bytes() == content
    assert store.check() == []


def test_a_time_that_no_calendar_has_harms_nothing(store: persist.Store) -> None:
    """A document of another program is read whatever the time of its file."""
    path = store.path / "s.json"
    path.write_bytes(b'{"title": "t"}')
    os.utime(path, (0, 10**11))
    assert store.load("s").data == {"title": "t"}
    assert store.check() == []


def test_the_first_commit_gives_it_a_header(store: persist.Store) -> None:
    """Its own `updated_at` stays data. A save of an object that was loaded before is merged as usual."""
    path = put(store, {"messages": [], "updated_at": 5, "created_at": "x"})
    one, two = store.load("s"), store.load("s")
    one.data["title"] = "t"
    two.data["messages"].append(M1)
    one.save()
    two.save()
    found = json.loads(path.read_bytes())
    assert found.pop("_persist")["revision"] == 2
    assert found == {"title": "t", "messages": [M1], "updated_at": 5, "created_at": "x"}
    assert store.load("s").revision == 2


def test_a_foreign_document_that_its_program_rewrites_is_another_one(store: persist.Store) -> None:
    """Without a header, the bytes are the incarnation: a save on top of a foreign rewrite is refused."""
    put(store, {"a": 1})
    session = store.load("s")
    put(store, {"a": 2})
    session.data["b"] = 1
    with pytest.raises(persist.SessionDeleted):
        session.save()
    assert json.loads(document(store).read_bytes()) == {"a": 2}


@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [
        (b"", "it is empty", 0),
        (b'{"a":1', "cut off", 6),
        (b"[1]", "not an object", 0),
        (b"null", "not an object", 0),
        (b'{"a":1,"a":2}', "twice", 7),
        ('{"ä":1,"ä":2}'.encode(), "twice", 8),
        (b'{"a":NaN}', "NaN", 5),
        (b"\xef\xbb\xbf{}", "byte order mark", 0),
        (b'{"a":"\xff"}', "UTF-8", 6),
        (b'{"a":' + b"[" * 100_000, "nested deeper", 204),
    ],
)
def test_a_foreign_document_that_is_not_strict_json_is_refused(
    content: bytes, reason: str, offset: int, store: persist.Store
) -> None:
    """The error names the file and the byte, and the file is left as it is."""
    path = put(store, content)
    for look in (store.load, store.head):
        with pytest.raises(persist.CorruptSession, match=reason) as caught:
            look("s")
        assert (caught.value.path, caught.value.offset) == (path, offset)
        assert f"{path}, byte {offset}:" in str(caught.value)
    assert path.read_bytes() == content


def test_a_document_that_is_too_large_is_refused_by_its_size(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is too large is damage with an offset, and does not exhaust the memory."""
    put(store, {"a": "x" * 200})
    monkeypatch.setattr("persist.json_codec.MAX_BYTES", 100)
    with pytest.raises(persist.CorruptSession, match="larger than 100 bytes") as caught:
        store.load("s")
    assert caught.value.offset == 100


# --- documents edited by hand -----------------------------------------------------------------------------------------


def edit_by_hand(store: persist.Store, before: bytes, after: bytes) -> None:
    content = document(store).read_bytes()
    assert before in content
    put(store, content.replace(before, after))


def test_an_edit_by_hand_is_refused_and_the_error_names_the_way_out(store: persist.Store) -> None:
    """An edit is refused like damage, because no program can tell them apart. A person looks first."""
    store.create("s", DATA)
    edit_by_hand(store, b"File locks", b"Locked files")
    with pytest.raises(persist.CorruptSession, match=f"'persist accept {store.path} s'") as caught:
        store.load("s")
    assert caught.value.offset is None
    [problem] = store.check()
    assert (problem.session_id, problem.kind, problem.path) == ("s", "corrupt", document(store))


def test_accept_takes_an_edited_document(store: persist.Store) -> None:
    """The document gets a new checksum and the next revision.
    It stays the same session, so older objects can still save.
    """
    older = store.create("s", DATA)
    edit_by_hand(store, b"File locks", b"Locked files")
    accepted = store.accept("s")
    assert (accepted.data["title"], accepted.revision, accepted.created_at) == ("Locked files", 2, older.created_at)
    older.data["messages"].append({"id": "m3"})
    older.save()
    assert store.load("s").data == {**DATA, "title": "Locked files", "messages": [M1, M2, {"id": "m3"}]}


def test_accept_takes_a_document_that_an_editor_has_laid_out_anew(store: persist.Store) -> None:
    """A document with new indentation and sorted keys is the same data. After `accept` it is a canonical file again."""
    store.create("s", DATA)
    put(store, json.dumps(json.loads(document(store).read_bytes()), indent=2, sort_keys=True))
    with pytest.raises(persist.CorruptSession, match="persist accept"):
        store.load("s")
    assert store.accept("s").data == DATA
    assert store.load("s").data == DATA
    assert document(store).read_bytes().startswith(b'{"_persist":{"format":3,')


@pytest.mark.parametrize("header", [None, 5, {}, {"revision": "x"}, {"created_at": 5}, []])
def test_accept_makes_a_new_header_where_there_is_no_sense_left_in_it(header: Any, store: persist.Store) -> None:
    """`accept` keeps the data. A spoilt header begins anew."""
    put(store, {"_persist": header, "a": 1})
    with pytest.raises(persist.CorruptSession, match="persist accept"):
        store.load("s")
    assert store.accept("s").data == {"a": 1}
    assert (store.load("s").data, store.load("s").revision) == ({"a": 1}, 1)


def test_accept_refuses_what_is_not_strict_json(store: persist.Store) -> None:
    """A missing bracket must be mended by hand, so `accept` leaves the file as it was."""
    store.create("s", DATA)
    content = document(store).read_bytes()[:-2]
    put(store, content)
    with pytest.raises(persist.CorruptSession) as caught:
        store.accept("s")
    assert caught.value.offset == len(content)
    assert document(store).read_bytes() == content


def test_accept_leaves_a_good_document_alone(store: persist.Store) -> None:
    """If there is nothing to accept, nothing is written."""
    store.create("s", DATA)
    before = document(store).stat().st_ino, document(store).read_bytes()
    assert store.accept("s").revision == 1
    assert (document(store).stat().st_ino, document(store).read_bytes()) == before


# --- names that are no plain files ------------------------------------------------------------------------------------


def make_link(path: Path) -> None:
    target = path.with_name("target")
    target.write_text('{"secret": 1}')
    path.symlink_to(target)


ODD: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a symbolic link": make_link,
    "a socket": make_socket,
}


@pytest.fixture
def umask_of_nothing() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize(("found", "make"), ODD.items(), ids=ODD)
def test_a_name_that_is_no_plain_file_is_refused_at_once(
    found: str, make: Callable[[Path], None], store: persist.Store
) -> None:
    """No verb hangs on a FIFO, follows a link or removes what is there. `check` names it."""
    make(document(store))
    before = os.lstat(document(store))
    verbs: list[Callable[[], Any]] = [
        lambda: store.load("s"),
        lambda: store.head("s"),
        lambda: store.update("s", lambda tx: tx.data.clear()),
        lambda: store.update("s", lambda tx: tx.fields.clear()),
        lambda: store.extend("s", "messages", [1, 2], key=None),
        lambda: store.append("s", "messages", 1),
        lambda: store.start_stream("s"),
        lambda: store.cancel("s", "t"),
        lambda: store.accept("s"),
        lambda: store.delete("s"),
        lambda: store.duplicate("s", "copy"),
    ]
    for verb in verbs:
        with pytest.raises(persist.Unreadable) as caught:
            verb()
        assert (caught.value.path, caught.value.found) == (document(store), found)
    with pytest.raises(persist.SessionExists):
        store.create("s")
    after = os.lstat(document(store))
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert [problem.kind for problem in store.check() if problem.kind != "foreign"] == ["unreadable"]


@pytest.mark.parametrize(("found", "make"), ODD.items(), ids=ODD)
@pytest.mark.parametrize("suffix", [".lock", ".tmp"])
def test_a_lock_or_temporary_name_that_is_no_plain_file_is_never_followed(
    suffix: str, found: str, make: Callable[[Path], None], store: persist.Store
) -> None:
    """A lock is refused. A left-over is removed by its own name if it can be. The target of a link is never touched."""
    session = store.create("s", {"a": 1})
    name = document(store).with_name(f"s.json{suffix}")
    name.unlink(missing_ok=True)
    make(name)
    session.data["a"] = 2
    if suffix == ".lock":
        with pytest.raises(persist.Unreadable) as caught:
            session.save()
        assert (caught.value.path, caught.value.found) == (name, found)
    else:
        with contextlib.suppress(persist.Unreadable):
            session.save()
    assert store.load("s").data == {"a": session.revision}
    target = name.with_name("target")
    assert not target.exists() or target.read_text() == '{"secret": 1}'


def test_files_are_private_whatever_the_umask(umask_of_nothing: None, directory: Path) -> None:
    """Directories have mode 0700, and files 0600: documents, locks and leases."""
    store = persist.Store(directory)
    store.create("s", DATA)
    with store.start_stream("s") as stream:
        modes = {path.relative_to(directory): stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
        expected = {Path(".leases"): 0o700, Path(f".leases/s.{stream.id}"): 0o600}
        assert modes == expected | {Path("s.json"): 0o600, Path("s.json.lock"): 0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "wrong",
    [
        {"journal": "../x"},
        {"journal": 5},
        {"folded": "0" * 15},
        {"revision": -1},
        {"revision": 2**63},
        {"epoch": "1"},
        {"owner": []},
        {"created_at": "yesterday"},
        {"incarnation": None},
        {"commit": 5},
    ],
    ids=str,
)
def test_header_that_makes_no_sense_is_refused(wrong: dict[str, Any], store: persist.Store) -> None:
    """A header without sense is refused, also if its checksum is right.
    A journal's name is hex, and never leads out of the directory.
    """
    store.create("s", DATA)
    content = document(store).read_bytes()
    line, _, rest = content.partition(b"\n")
    values = json.loads(line.removesuffix(b",") + b"}")["_persist"]
    del values["format"], values["checksum"]
    inner = b"," + json_codec.encode(values | wrong)[1:]
    sealed = b'{"_persist":{"format":3,"checksum":"%b"' % xxhash.xxh3_128_hexdigest(inner).encode()
    put(store, sealed + inner + b",\n" + rest)
    for look in (store.load, store.head, lambda each: store.append(each, "messages", 1)):
        with pytest.raises(persist.CorruptSession):
            look("s")
    put(store, sealed + b"," + json_codec.encode(values)[1:] + b",\n" + rest)
    with pytest.raises(persist.CorruptSession):
        store.load("s")


def test_header_comes_back_as_it_was(tmp_path: Path) -> None:
    """Every attribute of a header is in the document."""
    header = replace_all(format3.first_header("x" * 300))
    (tmp_path / "s.json").write_bytes(format3.to_bytes(header, encoded({"a": 1})))
    assert format3.read(tmp_path / "s.json", "s").header == header
    assert format3.read_head(tmp_path / "s.json", "s")[0].header == header


def replace_all(header: format3.Header) -> format3.Header:
    return header.but(
        revision=7, epoch=3, owner={"stream_id": "t", "pid": 5}, journal="0" * 16, folded="f" * 16, commit="c" * 16
    )
