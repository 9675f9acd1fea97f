"""Hostile JSON under a session's name: each verb answers with a typed error, or works.

Many of these files are *sealed*: their checksums are right, because anyone who can write the file can make them. A
checksum only guards against accidents, so the content under a right one must not bring a server down either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness.faults import quick_directory
from harness.fuzzing import seal
from harness.sweeps import SweepFailed
from harness.verbs import VERBS, within_deadline

import persist
from persist.storage import document as documents

M1 = {"id": "m1", "role": "user", "content": "Why?"}
ABSENT = object()


@pytest.fixture
def store() -> Iterator[persist.Store]:
    with quick_directory() as directory:
        yield persist.Store(directory / "sessions", timeout_s=1.0)


@pytest.fixture
def good(store: persist.Store) -> bytes:
    """Return a document with messages, and with a stream whose process is dead."""
    store.create("s", {"title": "t", "messages": [M1]})
    stream = store.start_stream("s", {"role": "user", "content": "And?"}, stream_id="t1")
    stream.checkpoint({"role": "assistant", "content": "Th"})
    stream._lease.close()
    return document(store).read_bytes()


def document(store: persist.Store) -> Path:
    return store.path / "s.json"


def with_header(content: bytes, **lies: Any) -> bytes:
    """Return the same document with another header, sealed."""
    line, _, body = content.partition(b"\n")
    header = json.loads(line.rstrip(b",") + b"}")["_persist"]
    header = {key: value for key, value in (header | lies).items() if value is not ABSENT}
    return seal(b'{"_persist":' + json.dumps(header, separators=(",", ":")).encode() + b",\n" + body)


def with_body(content: bytes, body: bytes) -> bytes:
    """Return the same header over other fields, sealed. The lengths are right."""
    nothing = {"bytes": 0, "checksum": ""}
    return seal(with_header(content.partition(b"\n")[0] + b"\n" + body, fields=nothing, parts={}), fits=True)


def with_part(content: bytes, **lies: Any) -> bytes:
    """Return the same document, sealed, with a header that lies about its messages."""
    header = json.loads(content.partition(b"\n")[0].rstrip(b",") + b"}")["_persist"]
    part = {key: value for key, value in (header["parts"]["messages"] | lies).items() if value is not ABSENT}
    return with_header(content, parts={"messages": part})


def untyped(store: persist.Store, good: bytes, hostile: bytes) -> list[str]:
    """Play every verb on the hostile file, in a new copy each, and return those that gave an untyped error."""
    found = []
    for name, verb in VERBS.items():
        document(store).write_bytes(good)
        (store.path / ".leases" / "s.t1").touch()
        session = store.load("s")
        document(store).write_bytes(hostile)
        for step in (lambda verb=verb, session=session: verb(store, session), lambda: store.load("s")):
            try:
                within_deadline(step)
            except SweepFailed as error:
                found += [
                    f"{name}: {bare!r}"
                    for bare in error.failures.values()
                    if not isinstance(bare, persist.PersistError)
                ]
            except persist.PersistError:
                pass
            except Exception as error:
                found.append(f"{name}: {error!r:.120}")
                break
        (store.path / "copy.json").unlink(missing_ok=True)
    return found


# --- headers that lie -------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (None, True, "x", "", 1.5, -1, 10**100, [], {}, ["x"], {"x": "y"}, ABSENT)
OWNER = {
    "stream_id": "t1",
    "pid": 1,
    "host": "h",
    "command": "c",
    "started_at": "x",
    "prompt_id": None,
    "answer_id": None,
}
OWNER |= {"cancelled": False}
LENGTHS: tuple[Any, ...] = (*ODD[:-1], 0, 1, 2, 50, 10_000, 2**39, 2**63 - 1, 2**63, "7", -0.0)
OWNER_LIES: tuple[Any, ...] = (None, 5, [], {"a": 1}, "../../etc")
LIES: dict[str, list[dict[str, Any]]] = {
    "fields": [{"fields": value} for value in (*ODD, {"bytes": 3}, {"checksum": "x"})],
    "fields' bytes": [{"fields": {"bytes": value, "checksum": "0" * 32}} for value in LENGTHS],
    "fields' checksum": [{"fields": {"bytes": 0, "checksum": value}} for value in ODD if value is not ABSENT],
    "parts": [{"parts": value} for value in (*ODD, {"messages": None}, {"title": {}}, {"_persist": {}})],
    "commit": [{"commit": value} for value in (*ODD, 5, "\ud800")],
    "journal": [
        {"journal": value} for value in (*ODD, "../../etc/passwd", "A" * 16, "0123456789abcdef", "\ud800" * 16)
    ],
    "folded": [{"folded": value} for value in (*ODD, "../../etc/passwd", "0123456789abcdef")],
    "id": [{"id": value} for value in (*ODD, "another", "s", 5)],
    "revision": [{"revision": value} for value in (*ODD, "7", 2**63, 2**64)],
    "incarnation": [{"incarnation": value} for value in (*ODD, 5)],
    "created_at": [
        {"created_at": value} for value in (*ODD, 5, "9999-99-99", "2026-01-01", "0001-01-01T00:00:00+23:59")
    ],
    "updated_at": [{"updated_at": value} for value in (*ODD, 5, "9999-12-31T23:59:59-23:59", "2026-01-01T00:00:00")],
    "epoch": [{"epoch": value} for value in (*ODD, 0, 2**64)],
    "owner": [{"owner": value} for value in (*ODD, 5, {**OWNER, "stream_id": "other"})],
    "owner's fields": [{"owner": {**OWNER, key: value}} for key in OWNER for value in OWNER_LIES],
    "owner's missing fields": [{"owner": {k: v for k, v in OWNER.items() if k != key}} for key in OWNER],
    "unknown keys": [{"__proto__": {"a": 1}, "extra": {}, "revision ": 7, "": None, "self": 1, "path": "/etc/passwd"}],
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_a_sealed_header_that_lies_is_answered_with_a_typed_error(
    lies: list[dict[str, Any]], store: persist.Store, good: bytes
) -> None:
    """No verb fails on a header's value of the wrong type, sign or size, or on a missing one."""
    found = [(lie, wrong) for lie in lies if (wrong := untyped(store, good, with_header(good, **lie)))]
    report(found)


@pytest.mark.parametrize("key", ["bytes", "count", "checksum"])
def test_a_sealed_part_that_lies_is_answered_with_a_typed_error(key: str, store: persist.Store, good: bytes) -> None:
    """No verb fails on a list that is shorter, longer or something else than its header says."""
    cases = [{key: value} for value in (*LENGTHS, 3, 4, ABSENT)]
    report([(lie, wrong) for lie in cases if (wrong := untyped(store, good, with_part(good, **lie)))])


def report(found: list[tuple[Any, list[str]]]) -> None:
    if found:
        pytest.fail("\n".join(f"{ascii(case)[:80]}: {'; '.join(wrong)}" for case, wrong in found), pytrace=False)


# --- bodies -----------------------------------------------------------------------------------------------------------

BODIES: dict[str, bytes] = {
    "deep lists": b'"a":' + b"[" * 100_000 + b"]" * 100_000 + b"\n}\n",
    "deep objects": b'"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n}\n",
    "deep and cut off": b'"a":' + b"[" * 100_000 + b"\n}\n",
    "a key twice": b'"a":1,\n"a":2\n}\n',
    "NaN": b'"a":NaN\n}\n',
    "Infinity": b'"a":-Infinity\n}\n',
    "a number without end": b'"a":' + b"9" * 100_000 + b"\n}\n",
    "a float without end": b'"a":1e400\n}\n',
    "not UTF-8": b'"a":"\xff\xfe"\n}\n',
    "a NUL": b'"a":"\x00"\n}\n',
    "nothing": b"}\n",
    "cut off": b'"a":{\n}\n',
    "more behind": b'"a":1\n}\n{}\n}\n',
    "a second header": b'"_persist":{"revision":7}\n}\n',
    "messages that are none": b'"messages":5\n}\n',
    "messages of all kinds": b'"messages":[1,null,[],{"id":[]},{"id":{}},{"id":null},{"id":1.5},{"id":true}]\n}\n',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "not even bytes of text": bytes(range(256)),
}
STREAM_FIELDS: tuple[Any, ...] = (
    5,
    True,
    1.5,
    [],
    {},
    "",
    "../x",
    "a.b",
    "x" * 300,
    "\ud800",
    ["t1"],
    {"id": "t1"},
    "t1\n",
)
for _value in STREAM_FIELDS:
    BODIES[f"active stream {ascii(_value)[:12]}"] = b'"active_stream_id":' + json.dumps(_value).encode() + b"\n}\n"
    BODIES[f"pending {ascii(_value)[:12]}"] = (
        b'"active_stream_id":"t1",\n"pending_user_message":%b,\n"pending_attachments":%b,\n"pending_started_at":%b\n}\n'
        % ((json.dumps(_value).encode(),) * 3)
    )


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_sealed_body_of_hostile_json_is_answered_with_a_typed_error(
    body: bytes, store: persist.Store, good: bytes
) -> None:
    """A sealed body of hostile JSON gives a typed error, or is read.

    The bodies have deep nesting, repeated keys, numbers out of range, bytes that are not text, and stream fields of any
    type.
    """
    report([("", wrong)] if (wrong := untyped(store, good, with_body(good, body))) else [])


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_hostile_json_of_another_program_is_answered_with_a_typed_error(
    body: bytes, store: persist.Store, good: bytes
) -> None:
    """The same bodies without a header, as another program would leave them, give a typed error, or are read."""
    report([("", wrong)] if (wrong := untyped(store, good, b"{" + body)) else [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_another_encoding_is_not_guessed_at(encoding: str, store: persist.Store, good: bytes) -> None:
    """JSON is UTF-8 without a mark (RFC 8259, 8.1).

    Content that is right in another encoding is refused, not translated.
    """
    content = json.dumps({"title": "Täßchen", "messages": []}, ensure_ascii=False).encode(encoding)
    document(store).write_bytes(content)
    with pytest.raises(persist.CorruptSession):
        store.load("s")
    report([("", wrong)] if (wrong := untyped(store, good, content)) else [])


@pytest.mark.parametrize(
    "key", ["__proto__", "__class__", "constructor", "__dict__", "_persist ", "_PERSIST", "checksum", "id"]
)
def test_a_key_that_means_something_elsewhere_is_data(key: str, store: persist.Store) -> None:
    """No key of a document names an attribute, a class or a file."""
    data: dict[str, Any] = {key: {"__init__": 1, "polluted": True}, "messages": [{"id": "m1", key: key}]}
    store.create("s", data)
    store.append("s", "messages", {"id": "m2"})
    assert store.load("s").data == {**data, "messages": [*data["messages"], {"id": "m2"}]}
    assert store.head("s").fields == {key: data[key]}


# --- size -------------------------------------------------------------------------------------------------------------


def test_a_sealed_document_over_the_limit_is_refused(
    store: persist.Store, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sealed document over the limit is refused by its size, so no more than the limit is ever in memory."""
    big = with_body(good, b'"a":"' + b"x" * 10_000 + b'"\n}\n')
    monkeypatch.setattr("persist.json_codec.MAX_BYTES", 2_000)
    monkeypatch.setattr(documents, "READ_LIMIT", 4_000)
    assert untyped(store, good, big) == []
    with pytest.raises(persist.CorruptSession, match="larger than 2,000 bytes"):
        store.load("s")


def test_a_file_without_end_is_read_up_to_the_limit(
    store: persist.Store, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file of a terabyte costs its owner nothing, and its reader no more than the limit.

    A head whose own bytes are whole may still be shown, because it does not read what follows.
    """
    monkeypatch.setattr(documents, "READ_LIMIT", 100_000)
    monkeypatch.setattr("persist.json_codec.MAX_BYTES", 50_000)
    for start in (good, with_header(good, fields={"bytes": 2**39, "checksum": "0" * 32}), b"", b"{"):
        document(store).write_bytes(start)
        with document(store).open("r+b") as file:
            file.truncate(2**40)
        with pytest.raises(persist.CorruptSession):
            within_deadline(lambda: store.load("s"))
        with suppress(persist.CorruptSession):
            within_deadline(lambda: store.head("s"))


# --- ids --------------------------------------------------------------------------------------------------------------

NO_IDS: tuple[Any, ...] = (
    *("", "a" * 513, "a" * 100_000, "\ud800", "s\udfff", "\ud83d\ude00"),
    *(None, 5, 1.5, True, b"s", ["s"], ("s",), {"s": 1}, object(), Path("s"), float("nan")),
)
#: Each of these is an id, and none is a path.
ODD_IDS = (
    *(".", "..", "../s", "/etc/passwd", "a/b", "a\\b", "s\x00", "s\n", "\ns", "-s", "_s", ".s", "s.json", "s.t1"),
    *("s.json.lock", "s.0123456789abcdef.journal", ".leases", ".events", "é", "ｓ", "s ", "S", "a" * 181, "😀" * 512),
    *("CON", "nul", "com1", "s\u200b", "٣", "%2e%2e", "s%2F", "~", "$HOME", "s;rm", "s*", "\u202es", "\x1b]0;x\x07"),
)
ID_VERBS: dict[str, Callable[[persist.Store, Any], object]] = {
    "load": persist.Store.load,
    "head": persist.Store.head,
    "exists": persist.Store.exists,
    "create": persist.Store.create,
    "delete": persist.Store.delete,
    "delete by force": lambda store, hostile: store.delete(hostile, force=True),
    "duplicate from": lambda store, hostile: store.duplicate(hostile, "copy"),
    "duplicate to": lambda store, hostile: store.duplicate("s", hostile),
    "tail": persist.Store.tail,
    "transaction": lambda store, hostile: store.transaction(hostile).__enter__(),
    "transaction that creates": lambda store, hostile: store.transaction(hostile, create=True).__enter__(),
    "update": lambda store, hostile: store.update(hostile, lambda tx: tx.data.clear()),
    "append": lambda store, hostile: store.append(hostile, "messages", 1),
    "append that creates": lambda store, hostile: store.append(hostile, "messages", 1, create=True),
    "extend": lambda store, hostile: store.extend(hostile, "messages", [1, 2]),
    "start_stream": persist.Store.start_stream,
    "start_stream that creates": lambda store, hostile: store.start_stream(hostile, create=True),
    "cancel": lambda store, hostile: store.cancel(hostile, "t1"),
    "stream": persist.Store.stream,
    "accept": persist.Store.accept,
}


@pytest.mark.parametrize("verb", ID_VERBS.values(), ids=ID_VERBS)
def test_what_is_no_session_id_is_refused_before_the_disk_is_touched(
    verb: Callable[[persist.Store, Any], object], store: persist.Store, good: bytes
) -> None:
    """A value that is not a text of 1 to 512 characters names no session. The verb neither makes nor removes a file."""
    before = sorted(store.path.parent.rglob("*"))
    for hostile in NO_IDS:
        with pytest.raises(persist.InvalidArgument):
            verb(store, hostile)
    assert sorted(store.path.parent.rglob("*")) == before
    assert document(store).read_bytes() == good


@pytest.mark.parametrize("odd", ODD_IDS, ids=ascii)
def test_an_odd_session_id_names_no_file_but_its_own(odd: str, store: persist.Store, good: bytes) -> None:
    """Each text is an id. It never leads out of the store, or to the files of another session."""
    there = sorted(store.path.parent.rglob("*"))
    journaling = persist.Store(store.path, journal="always")
    journaling.create(odd, {"title": odd, "messages": []})
    journaling.append(odd, "messages", M1)
    with journaling.start_stream(odd, {"role": "user", "content": "Why?"}, stream_id="t1") as stream:
        stream.emit("token")
        made = sorted(set(store.path.parent.rglob("*")) - set(there))
        assert set(store.ids()) == {"s", odd}
        assert [info.session_id for info in store.streams() if info.is_live] == [odd]
        stream.finish({"role": "assistant", "content": "So."})
    assert len(made) >= 4
    for path in made:
        assert path.parent in (store.path, store.path / ".leases", store.path / ".events")
        assert re.fullmatch(r"[A-Za-z0-9%][A-Za-z0-9_%~-]*(\.[A-Za-z0-9]+)*", path.name) or path.name == ".events"
    found = persist.Store(store.path).load(odd)
    assert (found.id, found.data["title"], len(found.data["messages"])) == (odd, odd, 3)
    assert [problem.session_id for problem in store.check()] == ["s"]
    journaling.delete(odd)
    assert {*store.path.parent.rglob("*")} - {store.path / ".events"} == {*there}
    assert document(store).read_bytes() == good


def test_a_hostile_stream_id_is_refused_or_is_no_stream(store: persist.Store, good: bytes) -> None:
    """A start with a hostile stream id raises `InvalidArgument`, and a cancel with one cancels nothing."""
    before = sorted(store.path.parent.rglob("*"))
    for hostile in (*NO_IDS, *ODD_IDS, "a" * 65):
        if hostile is not None and hostile not in ("CON", "nul", "com1", "S"):
            with pytest.raises(persist.InvalidArgument):
                store.start_stream("s", stream_id=hostile)
        assert store.cancel("s", hostile) is False
        assert store.cancel("s", hostile, force=True) is False
    assert sorted(store.path.parent.rglob("*")) == before
    assert document(store).read_bytes() == good
