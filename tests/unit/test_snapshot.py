"""The document on disk: what stands in it, what is read back, and that damage is never taken for a document."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persist.storage.body import BULK, HEADER, Body
from persist.storage.lines import Lines

import persist
from persist import codec, instant
from persist.errors import NotJSON
from persist.storage import snapshot

M1 = {"id": "m1", "role": "user", "content": "hi\nthere"}
M2 = {"id": "m2", "role": "assistant", "content": "héllo 😀"}
DATA = {"messages": [M1, M2], "title": "File locks", "tool_calls": [{"z": 1, "a": [1]}], "meta": {"b": 1, "a": 2}}
TYPED = (persist.CorruptSession, persist.UnsupportedFormat)


def document(store: persist.Store, session_id: str = "s") -> Path:
    return store.path / f"{session_id}.json"


def put(store: persist.Store, content: bytes | str | dict[str, Any]) -> Path:
    """Put a document there as another program would."""
    store.path.mkdir(exist_ok=True)
    path = document(store)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what is written ---------------------------------------------------------------------------------------------------


def test_the_document_is_as_the_format_says(store: persist.Store) -> None:
    """Header first, one key a line, small fields before bulk whatever the order in the data, one message a line."""
    store.create("s", DATA)
    header, *body = document(store).read_text().split("\n")
    assert header.startswith('{"_persist":{"format":1,"checksum":"')
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
    """The file is valid JSON for everybody, with the data beside the header; `load` and `head` agree with it."""
    store.create("s", data)
    found = json.loads(document(store).read_bytes())
    assert next(iter(found)) == "_persist"
    del found["_persist"]
    assert found == data == store.load("s").data
    small = {key: value for key, value in data.items() if key not in BULK}
    assert store.head("s").data == small


def plainly(data: dict[str, Any]) -> tuple[bytes, bytes, dict[str, int]]:
    """Head, bulk and counts as the format has them, one value after the other."""

    def line(key: str, value: Any) -> bytes:
        return codec.encode(key) + b":" + codec.encode(value)

    def lines(key: str, value: Any) -> bytes:
        if type(value) is not list or not value:
            return line(key, value)
        return codec.encode(key) + b":[\n" + b",\n".join(codec.encode(item) for item in value) + b"\n]"

    small = [line(key, value) for key, value in data.items() if key not in BULK]
    bulk = [lines(key, data[key]) for key in BULK if key in data]
    counts = {key: len(data[key]) for key in BULK if type(data.get(key)) is list}
    head = b",\n".join(small) + (b",\n" if bulk else b"\n") if small else b""
    return head, b",\n".join(bulk) + b"\n}\n" if bulk else b"}\n", counts


texts = st.text(st.characters(codec=None, exclude_categories=())).filter(
    lambda text: json.loads(json.dumps(text)) == text
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
inner = st.recursive(
    leaves, lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3), max_leaves=8
)
bulk_fields = st.lists(inner, max_size=4).map(lambda items: items * instant.MANY) | st.lists(inner, max_size=3) | inner
documents = st.dictionaries(st.sampled_from([*BULK, *"abc"]) | texts, bulk_fields, max_size=6).filter(
    lambda data: HEADER not in data
)
LONG: list[dict[str, Any]] = [
    {"messages": [M1] * instant.MANY},
    {"tool_calls": [1] * instant.MANY, "title": "x", "messages": [M1, M2]},
    {"messages": [None] * instant.MANY, "tool_calls": []},
    {"messages": "no list", "tool_calls": [{}] * instant.MANY, "a": {"b": []}},
    {"messages": [*["x"] * instant.MANY, "\ud800"], "\ud800": 1},
    {"messages": [*[0.0] * instant.MANY, -0.0, True, 1, 1.0, 2**64 - 1, -(2**63)], "": None},
    {"messages": [2**64] * instant.MANY, "tool_calls": [-(2**63) - 1, 10**4299]},
    {"messages": [[[[[[[[[[1]]]]]]]]]] * instant.MANY},
    {"\n": "},\n", "messages": ["]\n}\n"] * instant.MANY, "tool_calls": None},
]


@given(documents)
def test_a_body_is_canonical_however_it_was_encoded(data: dict[str, Any]) -> None:
    """Much data is encoded in another way than little, and unusual data in another than usual: nobody sees it in the bytes."""
    body = Body.of(data)
    assert (body.head, b"".join(body.bulk_in_document()), body.counts) == plainly(data)
    assert body.size_bytes == sum(map(len, plainly(data)[:2]))
    assert list(body.data()) == [*(key for key in data if key not in BULK), *(k for k in BULK if k in data)]


@pytest.mark.parametrize("data", [*SHAPES, *LONG], ids=lambda data: ascii(data)[:40])
def test_a_body_of_any_shape_is_canonical(data: dict[str, Any]) -> None:
    """The same for what hypothesis seldom meets: lone surrogates, long integers, depth, bulk that is no list."""
    body = Body.of(data)
    assert (body.head, b"".join(body.bulk_in_document()), body.counts) == plainly(data)
    assert body.data() == data


@pytest.mark.parametrize(
    "wrong",
    [(1,), {1}, b"x", float("nan"), {1: 2}, Path("x"), 10**4300, "\ud83d\ude00"],
    ids=lambda v: type(v).__name__,
)
def test_a_body_of_many_messages_is_as_strict_as_one_of_few(wrong: Any) -> None:
    """What JSON would change is named by its path behind any number of good messages, and in a small field beside them."""
    for data, path in (
        ({"messages": [M1] * instant.MANY + [{"content": wrong}]}, ("messages", instant.MANY)),
        ({"messages": [M1] * instant.MANY, "meta": [wrong]}, ("meta",)),
    ):
        with pytest.raises(NotJSON) as caught:
            Body.of(data)
        assert caught.value.path[: len(path)] == path


def test_a_body_of_many_messages_may_not_have_a_field_like_the_header() -> None:
    """It would take the header's place."""
    with pytest.raises(persist.ReservedField):
        Body.of({"_persist": {}, "messages": [M1] * instant.MANY})


@contextlib.contextmanager
def beside(turn: Callable[[], object]) -> Iterator[None]:
    """Run something again and again in another thread, which the interpreter switches to as often as it can."""
    begun, done = threading.Barrier(2), threading.Event()

    def run() -> None:
        begun.wait(10)
        while not done.is_set():
            turn()

    thread, switching = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        begun.wait(10)
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(switching)


def test_a_body_is_one_state_across_its_messages() -> None:
    """Tokens that another thread moves between messages, three levels down: none is seen twice, at most one is on its way.

    Fails if the items are encoded one by one, each as it is by then.
    """
    boxes: list[list[int]] = [[] for _ in range(200)]
    boxes[0] += range(500)
    data = {"messages": [{"content": [{"tokens": box}]} for box in boxes]}

    def move() -> None:
        # Both ways through the document: an encoding that takes its time sees a token twice, or nowhere.
        for source, target in itertools.chain(itertools.pairwise(boxes), itertools.pairwise(reversed(boxes))):
            for _ in range(len(source)):
                target.append(source.pop())

    with beside(move):
        bodies = [Body.of(data) for _ in range(60)]
    seen = [[n for item in body.data()["messages"] for n in item["content"][0]["tokens"]] for body in bodies]
    assert {(len(tokens), len(set(tokens))) for tokens in seen} <= {(499, 499), (500, 500)}


def test_what_json_would_change_is_not_saved_however_short_it_is_there() -> None:
    """NaN, put there and taken back by another thread: a body has the number, or is refused; never the null that NaN becomes.

    Fails if the values are checked at one instant and encoded at another.
    """
    message: dict[str, Any] = {"cost": 1.0}
    data = {"messages": [*[M1] * instant.MANY, message]}

    def flip() -> None:
        # A loop: the interpreter switches threads where it jumps back, with either value in place.
        for message["cost"] in (float("nan"), 1.0):
            pass

    bodies = []
    with beside(flip):
        for _ in range(1500):
            with contextlib.suppress(NotJSON):
                bodies.append(Body.of(data))
    assert {body.data()["messages"][-1]["cost"] for body in bodies} <= {1.0}


def test_a_line_holds_one_key_or_one_message(store: persist.Store) -> None:
    """Line tools work: no value, however odd its text, breaks its line."""
    store.create("s", {"text": "a\nb\u2028c\rd", "messages": ["x\ny", {"k": "\n"}]})
    lines = document(store).read_bytes().split(b"\n")
    assert len(lines) == 1 + 1 + 4 + 2
    assert json.loads(lines[3].rstrip(b",")) == "x\ny"


def test_the_header_says_what_persist_knows(store: persist.Store) -> None:
    """Format, both checksums, sizes, revision, incarnation, times, epoch and owner."""
    before = datetime.now(UTC)
    session = store.create("s", DATA)
    header = json.loads(document(store).read_bytes())["_persist"]
    assert list(header)[:3] == ["format", "checksum", "head_checksum"]
    assert (header["format"], header["revision"], header["epoch"], header["owner"]) == (1, 1, 0, None)
    assert header["counts"] == {"messages": 2, "tool_calls": 1}
    assert len(header["incarnation"]) == len(header["checksum"]) == len(header["head_checksum"]) == 32
    assert datetime.fromisoformat(header["created_at"]) == session.created_at
    assert before <= session.created_at == session.updated_at <= datetime.now(UTC)
    assert session.created_at.tzinfo is not None


def test_a_commit_moves_revision_and_time_and_keeps_the_rest(store: persist.Store) -> None:
    """Incarnation and creation stay, the revision grows by one, `updated_at` does not go back."""
    store.create("s", DATA)
    one = json.loads(document(store).read_bytes())["_persist"]
    store.append("s", "messages", {"id": "m3"})
    two = json.loads(document(store).read_bytes())["_persist"]
    assert (two["revision"], two["counts"]["messages"]) == (2, 3)
    assert two["updated_at"] >= one["updated_at"]
    assert two["checksum"] != one["checksum"]
    assert two["head_checksum"] != one["head_checksum"]
    assert (two["incarnation"], two["created_at"]) == (one["incarnation"], one["created_at"])


def test_unknown_keys_of_a_header_are_kept(store: persist.Store) -> None:
    """A newer version's notes survive the commits of this one, in every kind of commit."""
    now = datetime.now(UTC)
    header = snapshot.Header("i" * 32, 5, now, now, extra={"journal": None, "later": {"b": [1], "a": 2}})
    content, _ = snapshot.to_bytes(header, Body.of({"a": 1}))
    put(store, content)
    session = store.load("s")
    session.data["a"] = 2
    session.save()
    store.append("s", "messages", M1)
    with store.start_stream("s") as stream:
        stream.finish({"role": "assistant", "content": "x"})
    found = json.loads(document(store).read_bytes())["_persist"]
    assert found["revision"] == 9
    assert list(found.items())[-2:] == [("journal", None), ("later", {"b": [1], "a": 2})]


# --- the head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_bytes", [0, 10, 3_000, 3_500, 3_700, 3_800, 4_096, 5_000, 20_000, 300_000])
def test_the_head_is_that_of_the_whole(head_bytes: int, store: persist.Store) -> None:
    """`head` and `load` agree, whether the small fields fit a first read or not."""
    fields = {"title": "é" * (head_bytes // 2), "n": 1} if head_bytes else {}
    store.create("s", {"messages": [M1, M2], **fields})
    session, head = store.load("s"), store.head("s")
    assert head.data == {key: value for key, value in session.data.items() if key != "messages"} == fields
    assert head.counts == {"messages": 2}
    assert (head.id, head.revision, head.created_at, head.updated_at, head.active_stream_id) == (
        session.id,
        session.revision,
        session.created_at,
        session.updated_at,
        None,
    )


def test_a_head_reads_only_the_beginning_of_the_file(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """HAZARDS E4: small fields stand before bulk; a head of a large session reads no message."""
    store.create("s", {"messages": ["x" * 1_000_000], "title": "t"})
    whole, sizes = os.read, []

    def read(fd: int, size: int) -> bytes:
        content = whole(fd, size)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(os, "read", read)
    assert store.head("s").data == {"title": "t"}
    assert sum(sizes) <= 8192


def test_a_head_shows_the_active_stream(store: persist.Store) -> None:
    """What a list of sessions needs, without the messages."""
    store.create("s")
    with store.start_stream("s", {"role": "user", "content": "?"}) as stream:
        assert store.head("s").active_stream_id == stream.id
        assert store.head("s").counts == {"messages": 1}


# --- damage ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(store: persist.Store) -> bytes:
    """A document of about a kilobyte with everything in it: owner, epoch, stream fields, messages, letters of 2-4 bytes."""
    store.create("s", {"title": "Ein Täßchen 😀", "n": -1.5e-7, "ok": True, "messages": [M1, M2], "tool_calls": [1]})
    with store.start_stream("s", {"role": "user", "content": "Why?"}, stream_id="t1") as stream:
        content = document(store).read_bytes()
        stream.finish({"role": "assistant", "content": "So."})
    assert 700 < len(content) < 1500
    return content


def verdict(function: Callable[[], Any]) -> Any:
    """What a reader makes of a file: its error if it is a typed one, or the document. Another error fails the test."""
    try:
        return function()
    except TYPED as error:
        return error


@pytest.fixture
def assert_never_wrong(store: persist.Store, small: bytes) -> Callable[[bytes], None]:
    """Check that a load of a damaged `small` is refused, and that a head is refused or right."""
    path = put(store, small)
    right = snapshot.read_head(path, "s")

    def check(damaged: bytes) -> None:
        put(store, damaged)
        assert isinstance(verdict(lambda: snapshot.read(path, "s")), TYPED)
        head = verdict(lambda: snapshot.read_head(path, "s"))
        assert isinstance(head, TYPED) or head == right

    return check


Check = Callable[[bytes], None]


def test_every_truncation_is_refused(small: bytes, assert_never_wrong: Check) -> None:
    """However many bytes are missing from the end, one included, no document and no wrong head comes out."""
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
    """The checksum covers the whole file, not what a header says of its length."""
    assert_never_wrong(small + tail)


def test_lines_that_changed_places_are_refused(small: bytes, assert_never_wrong: Check) -> None:
    """Valid JSON is not enough: the order of messages is part of the document."""
    lines = small.split(b"\n")
    for place in range(1, len(lines) - 1):
        swapped = [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]
        if swapped != lines:
            assert_never_wrong(b"\n".join(swapped))


def test_the_header_of_one_revision_does_not_fit_the_body_of_another(store: persist.Store) -> None:
    """Two halves of two good documents make no document."""
    store.create("s", {"a": 1})
    one = document(store).read_bytes()
    store.update("s", lambda data: data.update(a=2))
    two = document(store).read_bytes()
    put(store, one.split(b"\n", 1)[0] + b"\n" + two.split(b"\n", 1)[1])
    with pytest.raises(persist.CorruptSession):
        store.load("s")
    with pytest.raises(persist.CorruptSession):
        store.head("s")


def test_a_damaged_document_is_not_written_by_any_verb(store: persist.Store, small: bytes) -> None:
    """Every writer refuses it too; the file stays for whoever mends it."""
    damaged = small.replace(b"hi", b"ho")
    session = store.load("s")
    put(store, damaged)
    session.data["x"] = 1
    for verb in (
        session.save,
        session.refresh,
        lambda: store.update("s", dict.clear),
        lambda: store.append("s", "messages", 1),
        lambda: store.delete("s"),
        lambda: store.duplicate("s", "copy"),
        lambda: store.start_stream("s"),
    ):
        with pytest.raises(persist.CorruptSession):
            verb()
    assert document(store).read_bytes() == damaged
    assert store.ids() == ["s"]


@pytest.mark.parametrize("found", [0, 3, 999])
def test_a_newer_format_is_named_and_left_alone(found: int, store: persist.Store, small: bytes) -> None:
    """This version does not guess at another's document."""
    other = small.replace(b'"format":1', b'"format":%d' % found)
    put(store, other)
    for look in (store.load, store.head, store.accept):
        with pytest.raises(persist.UnsupportedFormat) as caught:
            look("s")
        assert (caught.value.found, caught.value.known) == (found, 2)
    assert document(store).read_bytes() == other


@pytest.fixture
def large(store: persist.Store) -> bytes:
    """A document that is decoded while its checksum is computed."""
    messages = [{"id": str(n), "content": "y" * 1000} for n in range(300)]
    store.create("s", {"title": "x", "messages": messages, "meta": {"a": [1]}})
    content = document(store).read_bytes()
    assert len(content) > snapshot._LARGE_BYTES
    return content


def test_a_large_document_is_loaded_as_a_small_one_is(store: persist.Store, large: bytes) -> None:
    """Decoded early or late, the data is the same, in the same order."""
    path = document(store)
    early, late = snapshot.read(path, "s", decode=True), snapshot.read(path, "s")
    assert early.body.decoded
    assert not late.body.decoded
    assert early == late
    assert json.dumps(early.body.data()) == json.dumps(late.body.data())


def test_two_who_ask_for_the_data_share_no_object(store: persist.Store, large: bytes) -> None:
    """What was decoded early is given away once."""
    body = snapshot.read(document(store), "s", decode=True).body
    first, second = body.data(), body.data()
    first["messages"][0]["content"] = first["meta"]["a"] = "changed"
    assert second["messages"][0]["content"] == "y" * 1000
    assert second["meta"] == {"a": [1]}
    assert body.data() == second


def test_damage_to_a_large_document_is_refused(store: persist.Store, large: bytes) -> None:
    """Bytes that were decoded before they were checked come to nothing, and the error is the one of the checksum."""
    path = document(store)
    for position in (*range(0, 400, 7), *range(400, len(large), 20_011), len(large) - 2):
        damaged = bytearray(large)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(TYPED) as early:
            snapshot.read(path, "s", decode=True)
        with pytest.raises(TYPED) as late:
            snapshot.read(path, "s")
        assert str(early.value) == str(late.value)


@pytest.mark.parametrize("extra", [b'"title":"other"', b'"_persist":{}', b'"new":1', b'"meta":{"a":[true]}'])
def test_a_small_field_among_the_bulk_of_a_large_document_is_refused(
    extra: bytes, store: persist.Store, large: bytes
) -> None:
    """Somebody who can compute a checksum cannot have `load` and `head` show two values of one field."""
    path = document(store)
    found = snapshot.read(path, "s")
    header = found.header.but(is_journaled=False)
    lines = found.body.bulk["messages"]
    assert isinstance(lines, Lines)
    items = b",\n".join(lines.items()) + b"\n],\n" + extra + b',\n"more":[\n1'
    bulk = {"messages": Lines.in_text(items, 0, len(items), lines.count)}
    forged = replace(found.body, bulk=bulk)
    path.write_bytes(snapshot.to_bytes(header, forged)[0])
    with pytest.raises(persist.CorruptSession, match="not parted"):
        store.load("s")


@pytest.mark.parametrize(
    "bulk",
    [
        pytest.param({"messages": b"[1]"}, id="a list without a count"),
        pytest.param({"messages": Lines.in_text(b"1]x[", 0, 4, 1)}, id="more than a list"),
        pytest.param({"messages": Lines.in_text(b'1\n],\n"x":[\n2', 0, 13, 2)}, id="a small field"),
        pytest.param({"tool_calls": b"1", "messages": b"2"}, id="in another order"),
        pytest.param({"title": b"1"}, id="no bulk field"),
        pytest.param({"messages": b'1,\n"messages":2'}, id="a field twice"),
        pytest.param({"messages": b'1X\n"tool_calls":2'}, id="no comma"),
        pytest.param({"messages": Lines.in_text(b"1,\n2", 0, 4, 3)}, id="too few items"),
        pytest.param({"messages": Lines.in_text(b"1,\n2", 0, 4, 1)}, id="too many items"),
    ],
)
def test_bulk_that_is_not_as_its_header_says_is_refused(bulk: dict[str, Lines | bytes], store: persist.Store) -> None:
    """Somebody who can compute a checksum cannot have us take the lines of a document for what they are not."""
    store.create("s", {"title": "x"})
    header = snapshot.read(document(store), "s").header
    document(store).write_bytes(snapshot.to_bytes(header, Body(b'"title":"x"', bulk))[0])
    with pytest.raises(persist.CorruptSession):
        store.load("s")


def test_a_large_document_is_loaded_where_no_thread_can_be_started(
    store: persist.Store, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of threads, or while the interpreter ends, it only takes longer; damage is still found."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert store.load("s").data["title"] == "x"
    document(store).write_bytes(large.replace(b"yyy", b"zzz", 1))
    with pytest.raises(persist.CorruptSession, match="checksum"):
        store.load("s")


# --- documents of other programs -------------------------------------------------------------------------------------------


def test_a_document_without_a_header_is_revision_zero(store: persist.Store) -> None:
    """Another program's file is taken as it is, and looking at it changes nothing."""
    path = put(store, {"messages": [M1], "title": "t", "updated_at": 5})
    content = path.read_bytes()
    session, head = store.load("s"), store.head("s")
    assert session.data == {"messages": [M1], "title": "t", "updated_at": 5}
    assert (session.revision, head.revision, head.counts) == (0, 0, {"messages": 1})
    assert head.data == {"title": "t", "updated_at": 5}
    assert session.updated_at == datetime.fromtimestamp(path.stat().st_mtime, UTC)
    session.save()
    assert path.read_bytes() == content
    assert store.check() == []


def test_a_time_that_no_calendar_has_harms_nothing(store: persist.Store) -> None:
    """Anybody may give a file any time: a document of another program is read all the same."""
    path = store.path / "s.json"
    path.write_bytes(b'{"title": "t"}')
    os.utime(path, (0, 10**11))
    assert store.load("s").data == {"title": "t"}
    assert store.check() == []


def test_the_first_commit_gives_it_a_header(store: persist.Store) -> None:
    """Its own `updated_at` stays data; a save over an object loaded before is merged as ever."""
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
        (b"", "cut off", 0),
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
    """The error names the file and the byte; the file is left as it is."""
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
    """Oversize is damage with an offset, not an exhausted memory."""
    put(store, {"a": "x" * 200})
    monkeypatch.setattr("persist.codec.MAX_BYTES", 100)
    with pytest.raises(persist.CorruptSession, match="larger than 100 bytes") as caught:
        store.load("s")
    assert caught.value.offset == 100


# --- documents edited by hand -----------------------------------------------------------------------------------------------


def edit_by_hand(store: persist.Store, before: bytes, after: bytes) -> None:
    content = document(store).read_bytes()
    assert before in content
    put(store, content.replace(before, after))


def test_an_edit_by_hand_is_refused_and_the_error_names_the_way_out(store: persist.Store) -> None:
    """Nobody can tell an edit from damage, so a person looks first."""
    store.create("s", DATA)
    edit_by_hand(store, b"File locks", b"Locked files")
    with pytest.raises(persist.CorruptSession, match=f"'persist accept {store.path} s'") as caught:
        store.load("s")
    assert caught.value.offset is None
    [problem] = store.check()
    assert (problem.session_id, problem.kind, problem.path) == ("s", "corrupt", document(store))


def test_accept_takes_an_edited_document(store: persist.Store) -> None:
    """It gets a new checksum and the next revision, and stays the same session: older objects can still save."""
    older = store.create("s", DATA)
    edit_by_hand(store, b"File locks", b"Locked files")
    accepted = store.accept("s")
    assert (accepted.data["title"], accepted.revision, accepted.created_at) == ("Locked files", 2, older.created_at)
    older.data["messages"].append({"id": "m3"})
    older.save()
    assert store.load("s").data == {**DATA, "title": "Locked files", "messages": [M1, M2, {"id": "m3"}]}


def test_accept_takes_a_document_that_an_editor_has_laid_out_anew(store: persist.Store) -> None:
    """Indented, keys sorted: it is the same data, and a canonical file again afterwards."""
    store.create("s", DATA)
    put(store, json.dumps(json.loads(document(store).read_bytes()), indent=2, sort_keys=True))
    with pytest.raises(persist.CorruptSession, match="persist accept"):
        store.load("s")
    assert store.accept("s").data == DATA
    assert store.load("s").data == DATA
    assert document(store).read_bytes().startswith(b'{"_persist":{"format":1,')


@pytest.mark.parametrize("header", [None, 5, {}, {"revision": "x"}, {"created_at": 5}, []])
def test_accept_makes_a_new_header_where_there_is_no_sense_left_in_it(header: Any, store: persist.Store) -> None:
    """The data counts; a header that was spoilt begins anew."""
    put(store, {"_persist": header, "a": 1})
    with pytest.raises(persist.CorruptSession, match="persist accept"):
        store.load("s")
    assert store.accept("s").data == {"a": 1}
    assert (store.load("s").data, store.load("s").revision) == ({"a": 1}, 1)


def test_accept_refuses_what_is_not_strict_json(store: persist.Store) -> None:
    """A missing bracket is mended by hand; the file is as it was."""
    store.create("s", DATA)
    content = document(store).read_bytes()[:-2]
    put(store, content)
    with pytest.raises(persist.CorruptSession) as caught:
        store.accept("s")
    assert caught.value.offset == len(content)
    assert document(store).read_bytes() == content


def test_accept_leaves_a_good_document_alone(store: persist.Store) -> None:
    """Nothing to accept, nothing written."""
    store.create("s", DATA)
    before = document(store).stat().st_ino, document(store).read_bytes()
    assert store.accept("s").revision == 1
    assert (document(store).stat().st_ino, document(store).read_bytes()) == before


# --- names that are no plain files --------------------------------------------------------------------------------------------


def make_link(path: Path) -> None:
    target = path.with_name("target")
    target.write_text('{"secret": 1}')
    path.symlink_to(target)


def make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


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
    """No verb hangs on a FIFO, follows a link or removes what stands there; `check` names it."""
    make(document(store))
    before = os.lstat(document(store))
    verbs: list[Callable[[], Any]] = [
        lambda: store.load("s"),
        lambda: store.head("s"),
        lambda: store.update("s", dict.clear),
        lambda: store.append("s", "messages", 1),
        lambda: store.start_stream("s"),
        lambda: store.cancel("s", "t"),
        lambda: store.accept("s"),
        lambda: store.delete("s"),
        lambda: store.duplicate("s", "copy"),
    ]
    for verb in verbs:
        with pytest.raises(persist.UnsafeFile) as caught:
            verb()
        assert (caught.value.path, caught.value.found) == (document(store), found)
    with pytest.raises(persist.SessionExists):
        store.create("s")
    after = os.lstat(document(store))
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert [problem.kind for problem in store.check()] == ["unsafe"]


@pytest.mark.parametrize(("found", "make"), ODD.items(), ids=ODD)
@pytest.mark.parametrize("suffix", [".lock", ".tmp"])
def test_a_lock_or_temporary_name_that_is_no_plain_file_is_never_followed(
    suffix: str, found: str, make: Callable[[Path], None], store: persist.Store
) -> None:
    """A lock is refused, a left-over removed by its own name if it can be; what a link points at is never touched."""
    session = store.create("s", {"a": 1})
    name = document(store).with_name(f"s.json{suffix}")
    name.unlink(missing_ok=True)
    make(name)
    session.data["a"] = 2
    if suffix == ".lock":
        with pytest.raises(persist.UnsafeFile) as caught:
            session.save()
        assert (caught.value.path, caught.value.found) == (name, found)
    else:
        with contextlib.suppress(persist.UnsafeFile):
            session.save()
    assert store.load("s").data == {"a": session.revision}
    target = name.with_name("target")
    assert not target.exists() or target.read_text() == '{"secret": 1}'


def test_files_are_private_whatever_the_umask(umask_of_nothing: None, directory: Path) -> None:
    """Directories 0700, files 0600: documents, locks and leases."""
    store = persist.Store(directory)
    store.create("s", DATA)
    with store.start_stream("s") as stream:
        modes = {path.relative_to(directory): stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
        expected = {Path(".leases"): 0o700, Path(f".leases/s.{stream.id}"): 0o600}
        assert modes == expected | {Path("s.json"): 0o600, Path("s.json.lock"): 0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_header_of_a_folded_session_is_the_same() -> None:
    """To fold a journal is no commit: `==` and `!=` heed only what a commit changes."""
    header = snapshot.Header.first()
    folded = header.but(generation=4, since=2, is_journaled=True)
    assert header == folded
    assert not header != folded  # noqa: SIM202 - the operator is what is tested
    for change in (
        {"revision": 2},
        {"epoch": 1},
        {"extra": {"later": 1}},
        {"commit": "other"},
        {"incarnation": "other"},
    ):
        assert header != header.but(**change)
        assert not header == header.but(**change)  # noqa: SIM201
