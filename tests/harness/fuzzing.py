"""Fuzzing of the readers: real documents and journals, spoilt at random, and what a reader may make of each.

The oracle accepts a typed error, or exactly what an independent parse of the bytes gives. It must be an error wherever
a checksum, computed here once more, is wrong. A document or a journal may be *sealed*: its checksums are made right
again, as an attacker would make them, or a program that only copies the format. Then the bytes count, whatever they
say.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

import persist
from harness.faults import quick_directory
from harness.files import file_engine
from harness.runs import duration, existing_directory
from persist.storage import document
from persist.storage.document import Header

# Spelt out here, not taken from the reader, because an error in the reader's own idea of the format must show.
_SHAPE = re.compile(rb'\{"_persist":\{"format":3,"checksum":"([0-9a-f]{32})"')
_HEADER_FROM = len(b'{"_persist":')
_PART = re.compile(rb'("(?:[^"\\]|\\.)*"):\{"bytes":(\d{1,12}),"checksum":"([^"]*)"(?:,"count":(\d{1,12}))?\}')
_AFTER = re.compile(rb'"after":"[0-9a-f]{8}"')
_CRC = re.compile(rb'\{"crc":"([0-9a-f]{8})",')
_CRC_BYTES = len(b'{"crc":"00000000",')
_APART = ("messages", "tool_calls")
_APART_BYTES = 4096

#: The texts that a mutation puts somewhere.
TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\n",
        b"\\",
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"[" * 2_000,
    ),
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1e400",
        b"-0.0",
        b"NaN",
        b"Infinity",
        b"9" * 30,
        b"9" * 5_000,
        b'""',
        b"{}",
        b"[]",
    ),
    *(
        b'"_persist":{},',
        b'"bytes":0',
        b'"count":1',
        b'"parts":{},',
        b'"journal":"0123456789abcdef"',
        b'"insert":[1]',
        b'"gone":true',
        b'"revision":7',
        b'"active_stream_id":5',
        b'"id":',
        b'"\\ud800"',
        b'"messages":[\n',
    ),
)


def originals(directory: Path) -> list[bytes]:
    """Return real documents.

    They are: an empty one, a small one, some with values of all kinds that stand apart, one with a live stream, one
    with a journal, and one that another program wrote.
    """
    store = persist.Store(directory / "originals")
    message = {"id": "m1", "role": "user", "content": "hi\nthere 😀", "meta": {"n": [1, -1.5e-7, None, True]}}
    store.create("empty")
    store.create("small", {"title": "Ein Täßchen", "\ud800": ["\ud800", {"a": {}}]})
    store.create("bulk", {"messages": [message, message | {"id": "m2"}], "tool_calls": []})
    store.create(
        "whole",
        {
            "title": "t",
            "messages": [message, 5, []],
            "tool_calls": [{"id": 1}, "x"],
            "big": "x" * 5_000,
            "notes": ["y" * 900] * 5,
        },
    )
    store.create("active", {"messages": [message]})
    stream = store.start_stream("active", {"role": "user", "content": "Why?"})
    stream.checkpoint({"role": "assistant", "content": "Be"})
    persist.Store(store.path, journal="always").create("journaled", {"title": "t", "messages": [message]})
    found = [(store.path / f"{session_id}.json").read_bytes() for session_id in store.ids()]
    stream.fail()
    return [*found, json.dumps({"messages": [message], "updated_at": 5}, indent=1).encode()]


def seal(content: bytes, *, fits: bool = False) -> bytes:
    """Make all checksums of a document right, if it has places for them.

    Args:
        fits: make the lengths and the counts right, too. Otherwise the header is believed, whatever it says.
    """
    shape, end = _SHAPE.match(content), content.find(b"\n")
    if shape is None or end < 0:
        return content
    line = _with_parts_sealed(content[:end], content[end + 1 :], fits=fits)
    return (
        line[: shape.start(1)]
        + _checksum(line.removesuffix(b",")[shape.end() :])
        + line[shape.end(1) :]
        + content[end:]
    )


def _with_parts_sealed(line: bytes, body: bytes, *, fits: bool) -> bytes:
    parts = list(_PART.finditer(line))
    keys = [b"" if number == 0 else part[1] + b":" for number, part in enumerate(parts)]
    pieces, done, place = [], 0, 0
    for number, part in enumerate(parts):
        start = place + len(keys[number])
        size = int(part[2])
        if fits and number == 0 and body.startswith(keys[1] if len(keys) > 1 else b"}\n"):
            size = 0
        elif fits:
            behind = [b",\n" + key for key in keys[number + 1 :]] + [b"\n}\n"]
            stops = [stop for each in behind if (stop := body.find(each, max(0, start - 2))) >= 0]
            size = max(0, min(stops, default=len(body)) - start)
        text = body[start : start + size]
        count = text.count(b"\n") - 1 if fits and text[:2] == b"[\n" else 0 if fits else int(part[4] or 0)
        sealed = b'%b:{"bytes":%d,"checksum":"%b"' % (part[1], size, _checksum(text))
        pieces += [line[done : part.start()], sealed, b"" if part[4] is None else b',"count":%d' % count, b"}"]
        done = part.end()
        # Fields of no bytes stand nowhere, so nothing separates them from the next part.
        place = start + size + (2 if size or number else 0)
    return b"".join([*pieces, line[done:]])


def seal_journal(content: bytes) -> bytes:
    """Make the CRC of every line of a journal right, and let each follow the one before."""
    opening, *lines = content.split(b"\n")
    seed = zlib.crc32(opening + b"\n")
    after, sealed = b"%08x" % seed, [opening]
    for line in lines:
        rest = _AFTER.sub(b'"after":"%b"' % after, line[_CRC_BYTES:], count=1)
        after = b"%08x" % zlib.crc32(rest, seed)
        sealed.append(b'{"crc":"%b",' % after + rest if line else b"")
    return b"\n".join(sealed)


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(text).encode()


# --- mutations --------------------------------------------------------------------------------------------------------

Dice = random.Random
Mutation = Callable[[bytes, Dice, list[bytes]], bytes]


def _cut(content: bytes, dice: Dice) -> tuple[int, int]:
    start = dice.randrange(len(content) + 1)
    return start, min(len(content), start + dice.choice((0, 1, 2, 8, 64, 512)))


def insert(content: bytes, dice: Dice, _others: list[bytes]) -> bytes:
    start, _ = _cut(content, dice)
    return content[:start] + dice.choice(TOKENS) + content[start:]


def delete(content: bytes, dice: Dice, _others: list[bytes]) -> bytes:
    start, end = _cut(content, dice)
    return content[:start] + content[end:]


def overwrite(content: bytes, dice: Dice, _others: list[bytes]) -> bytes:
    start, end = _cut(content, dice)
    return content[:start] + dice.randbytes(end - start) + content[end:]


def replace_value(content: bytes, dice: Dice, _others: list[bytes]) -> bytes:
    """Put another value in the place of one. Some of them are no JSON."""
    values = list(re.finditer(rb'(?<=[:\[,])("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|null|true|false|\{\}|\[\])', content))
    if not values:
        return content
    value = dice.choice(values)
    return content[: value.start()] + dice.choice(TOKENS) + content[value.end() :]


def splice(content: bytes, dice: Dice, others: list[bytes]) -> bytes:
    other = dice.choice(others)
    return content[: _cut(content, dice)[0]] + other[_cut(other, dice)[0] :]


def lines(content: bytes, dice: Dice, others: list[bytes]) -> bytes:
    """Duplicate, remove, swap or borrow lines."""
    own, foreign = content.split(b"\n"), dice.choice(others).split(b"\n")
    place, other = dice.randrange(len(own)), dice.randrange(len(own))
    match dice.randrange(4):
        case 0:
            own.insert(other, own[place])
        case 1:
            del own[place]
        case 2:
            own[place], own[other] = own[other], own[place]
        case _:
            own[place] = dice.choice(foreign)
    return b"\n".join(own)


MUTATIONS: tuple[Mutation, ...] = (insert, delete, overwrite, replace_value, splice, lines)


Seal = Callable[[bytes, Dice], bytes]


def seal_somehow(content: bytes, dice: Dice) -> bytes:
    """Seal a document with the lengths that its header tells, or with its real lengths."""
    return seal(content, fits=dice.random() < 0.7)


def mutant(dice: Dice, documents: list[bytes], seal: Seal = seal_somehow) -> tuple[bytes, bool]:
    """Return a spoilt document or journal, and whether it is sealed. Most are."""
    content = dice.choice(documents)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        content = dice.choice(MUTATIONS)(content, dice, documents)
    is_sealed = dice.random() < 0.6
    return (seal(content, dice), True) if is_sealed else (content, False)


# --- the oracle -------------------------------------------------------------------------------------------------------

TYPED = (persist.CorruptSession, persist.UnsupportedFormat)
# `persist accept` may meet a field of the header's name, or a value that is too large.
TYPED_EDITED = (*TYPED, persist.NotJSON, persist.InvalidArgument)
# A writer may meet a message that has the id of the new one, or messages that are no list.
TYPED_WRITING = (*TYPED_EDITED, persist.MergeConflict, persist.InvalidArgument)
NEW = {"id": "new", "content": "?"}
#: The number of items that are read from the end of a list.
TAIL = 2
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Complaint:
    """A reader, and its wrong answer. `kind` groups the answers that have one cause."""

    reader: str
    kind: str
    detail: str


class Oracle:
    """A judge of what a store and its readers make of a document."""

    seal: Seal = staticmethod(seal_somehow)

    def __init__(self, directory: Path) -> None:
        self.store = persist.Store(directory / "spoilt", timeout_s=0)
        self.path = self.store.path / "s.json"

    def complaint(self, content: bytes, *, is_sealed: bool = False) -> Complaint | None:
        """Put the content there and read it in every way. Return what was answered wrong, or None."""
        store, path = self.store, self.path
        readers: dict[str, tuple[Callable[[], str | None], tuple[type[Exception], ...]]] = {
            "read": (lambda: _of_header(document.read(path, "s").header), TYPED),
            "load": (lambda: _of_data(store.load("s").data, content), TYPED),
            "head": (lambda: _of_head(store.head("s"), content), TYPED),
            "tail": (
                lambda: _of_tail(store.tail("s", limit=TAIL), content, is_sealed=is_sealed),
                (*TYPED, persist.InvalidArgument),
            ),
            "stream": (lambda: _nothing(store.stream("s")), TYPED),
            "read_edited": (lambda: _of_edited(document.read_edited(path, "s"), content), TYPED_EDITED),
            "append": (lambda: _of_append(store, content, is_sealed=is_sealed), TYPED_WRITING),
        }
        for name, (reader, typed) in readers.items():
            path.write_bytes(content)
            try:
                wrong = reader()
            except Exception as error:
                if isinstance(error, typed):
                    continue
                return Complaint(name, f"untyped {type(error).__name__}", str(error)[:200])
            finally:
                for left in self.store.path.glob("s.*.journal"):
                    left.unlink()
            if wrong:
                return Complaint(name, wrong, "")
        return None


NOT_VOUCHED_FOR = "a document that its checksum does not vouch for"
OTHER_DOCUMENT = "another document than the bytes say"


def trusted(content: bytes) -> Answer | None:
    """Return the data that a reader may make of the content, with the header left out. None if it must refuse.

    All checksums vouch for that data. Content with no trace of a header is the strict JSON of another program.
    """
    header = _header_of(content)
    if header is not None:
        return _parsed(content, is_strict=False) if _are_parts_whole(content, header) else None
    data = _object(content, is_strict=True)
    return None if _SHAPE.match(content) or data is None or _bears_header(data) else data


def trusted_head(content: bytes) -> Answer | None:
    """Return the fields that the checksums of header and fields vouch for, or None.

    The content behind the fields does not matter.
    """
    header = _header_of(content)
    if header is None:
        data = trusted(content)
        return None if data is None else _small(data)
    text = _segment(content, content.find(b"\n") + 1, header["fields"])
    return None if text is None else _parsed(b"{" + text + b"}", is_strict=False)


def _header_of(content: bytes) -> Answer | None:
    """Return the header, if its own checksum is right."""
    shape, line = _SHAPE.match(content), content.partition(b"\n")[0].removesuffix(b",")
    if shape is None or _checksum(line[shape.end() :]) != shape[1]:
        return None
    header = _object(line[_HEADER_FROM:], is_strict=False)
    return header if header is not None and {"fields", "parts"} <= header.keys() else None


def _are_parts_whole(content: bytes, header: Answer) -> bool:
    place = content.find(b"\n") + 1
    try:
        text = _segment(content, place, header["fields"])
        is_right = text is not None
        place += len(text or b"") + (2 if text else 0)
        for name, part in header["parts"].items():
            start = place + len(_dumped(name)) + 1
            text = _segment(content, start, part)
            is_right = is_right and text is not None
            place = start + len(text or b"") + 2
        return is_right
    except (AttributeError, TypeError, UnicodeEncodeError):
        return False


def _segment(content: bytes, start: int, part: Any) -> bytes | None:
    """Return the text of a part, if it is as long as the header says, and its checksum is right."""
    size = part.get("bytes") if type(part) is dict else None
    if type(size) is not int or size < 0:
        return None
    text = content[start : start + size]
    return text if len(text) == size and _checksum(text).decode() == part.get("checksum") else None


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _bears_header(data: Answer) -> bool:
    """Tell whether data bears a header, also one whose name was spoilt.

    A document of ours must not turn into another program's by a flipped bit.
    """
    first = next(iter(data.values()), None)
    return "_persist" in data or (type(first) is dict and {"checksum", "incarnation", "parts"} <= first.keys())


def _small(data: Answer) -> Answer:
    """Return the values of another program's document that a head shows."""
    return {
        name: value
        for name, value in data.items()
        if name not in _APART and len(json.dumps(value, separators=(",", ":"))) <= _APART_BYTES
    }


def _of_data(data: Answer, content: bytes) -> str | None:
    expected = trusted(content)
    if expected is None:
        return NOT_VOUCHED_FOR
    return None if same(data, expected) else OTHER_DOCUMENT


def _of_head(found: persist.Head, content: bytes) -> str | None:
    # A head does not notice damage of the values that stand apart.
    expected = trusted_head(content)
    if expected is None:
        return NOT_VOUCHED_FOR
    if not same(dict(found.fields), expected):
        return "other fields than the bytes say"
    is_right = all(type(count) is int and count >= 0 for count in found.counts.values())
    return None if is_right else "counts that are none"


def _of_tail(found: list[Any], content: bytes, *, is_sealed: bool) -> str | None:
    if is_sealed:
        # A tail does not notice what is forged elsewhere.
        return None
    if trusted_head(content) is None:
        return NOT_VOUCHED_FOR
    # The checksum of a list is that of the whole list. So a tail does not notice damage of it.
    expected = trusted(content)
    return None if expected is None or same(found, expected.get("messages", [])[-TAIL:]) else OTHER_DOCUMENT


def _of_edited(found: document.Document, content: bytes) -> str | None:
    expected = _parsed(content, is_strict=True)
    if expected is None or not same(found.content.decode(), expected):
        return OTHER_DOCUMENT
    return _of_header(found.header)


def _of_append(store: persist.Store, content: bytes, *, is_sealed: bool) -> str | None:
    store.append("s", "messages", NEW)
    expected = trusted(content)
    if expected is None:
        # An append does not read everything that somebody has sealed. A load does, before the append and after it.
        try:
            store.load("s")
        except persist.CorruptSession:
            return None if is_sealed else NOT_VOUCHED_FOR
        return NOT_VOUCHED_FOR
    messages = expected.get("messages", [])
    wanted = messages if any(same(each, NEW) for each in messages) else [*messages, NEW]
    return None if same(store.load("s").data, expected | {"messages": wanted}) else "a commit on another document"


def _nothing(_answer: object) -> None:
    return None


def _of_header(header: Header) -> str | None:
    """Check the types of a header, because every verb counts on them."""
    is_right = (
        type(header.incarnation) is str
        and type(header.commit) is str
        and all(type(number) is int and number >= 0 for number in (header.revision, header.epoch))
        and header.updated_at.tzinfo is not None
        and header.created_at.tzinfo is not None
        and all(
            name is None or (type(name) is str and re.fullmatch("[0-9a-f]{16}", name))
            for name in (header.journal, header.folded)
        )
        and (header.owner is None or type(header.owner) is dict)
    )
    return None if is_right else "a header of wrong types"


def _parsed(content: bytes, *, is_strict: bool) -> Answer | None:
    """Return what the standard library parses, with the header left out. None for content that is no object."""
    data = _object(content, is_strict=is_strict)
    return None if data is None else {key: value for key, value in data.items() if key != "_persist"}


def _object(content: bytes, *, is_strict: bool) -> Answer | None:
    try:
        data = json.loads(content.decode(), object_pairs_hook=_unique if is_strict else None)
    except (ValueError, RecursionError):
        return None
    return data if type(data) is dict else None


def _unique(pairs: list[tuple[str, Any]]) -> Answer:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


# --- journals ---------------------------------------------------------------------------------------------------------

_RECORD = {"crc", "after", "revision", "updated_at", "synced", "counts", "head_at", "head", "changes", "commit"}
_CHANGE = {"in", "at", "remove", "insert", "value", "gone"}


@dataclass(frozen=True, slots=True)
class State:
    """A session after some records."""

    revision: int
    fields: Answer
    apart: Answer

    @property
    def data(self) -> Answer:
        return self.fields | self.apart

    def after(self, record: Answer) -> State:
        """Return the state after the changes of a record. Raise `ValueError` if they cannot be made."""
        head = record.get("head")
        fields, apart = self.fields if head is None else head["fields"], dict(self.apart)
        for change in record.get("changes", []):
            if not change.keys() <= _CHANGE:
                raise ValueError("an unknown change")
            name, at, remove = change["in"], change.get("at", 0), change.get("remove", 0)
            if change.get("gone", False):
                apart.pop(name, None)
            elif "value" in change:
                apart[name] = change["value"]
            else:
                items = apart[name]
                if not 0 <= at <= at + remove <= len(items):
                    raise ValueError("a change of what is not there")
                apart[name] = [*items[:at], *change.get("insert", []), *items[at + remove :]]
        return State(record["revision"], fields, apart)


@dataclass(frozen=True, slots=True)
class Replay:
    """The reading of a journal by an independent reader: the state after the records that follow one another.

    Attributes:
        heads: the fields that the document or any record says there are.
        last: the last record whose CRC is right, wherever it stands. None if there is none.
        is_whole: false if a record with the right CRC follows on the state, and makes no sense there.
    """

    state: State
    heads: tuple[Answer, ...]
    last: Answer | None
    is_whole: bool


def replay(content: bytes, state: State) -> Replay:
    """Apply the records of a journal, one after the other, up to the first one that does not fit."""
    opening, newline, rest = content.partition(b"\n")
    seed = zlib.crc32(opening + newline)
    heads = [state.fields]
    after, is_next, is_whole, last = f"{seed:08x}", True, True, None
    for line in rest.split(b"\n")[:-1]:
        crc = _CRC.match(line)
        if crc is None or int(crc[1], 16) != zlib.crc32(line[_CRC_BYTES:], seed):
            is_next = False
            continue
        try:
            # Bytes that cannot be decoded may be gone by the last record. If they are not, no reader may show them.
            record = json.loads(line.decode(errors="replace"), strict=False, parse_int=_int)
            last = record
            if record.get("head"):
                heads.append(record["head"]["fields"])
            if not is_next or not is_whole:
                continue
            if record["after"] != after or record["revision"] != state.revision + 1 or not record.keys() <= _RECORD:
                raise ValueError("a record that does not follow")
            state, after = state.after(record), crc[1].decode()
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            is_whole = is_whole and not is_next
    return Replay(state, tuple(heads), last, is_whole)


def _int(literal: str) -> int | str:
    """Decode an integer. An integer of too many digits becomes a text, which no reader shows in its place."""
    return int(literal) if len(literal) <= sys.get_int_max_str_digits() else literal


class JournalOracle(Oracle):
    """A judge of what a store makes of a session whose journal is spoilt."""

    seal: Seal = staticmethod(lambda content, _dice: seal_journal(content))

    def __init__(self, directory: Path) -> None:
        """Make a session with a journal of some records."""
        super().__init__(directory)
        self._directory = self.store.path
        store = self._store()
        message = {"id": "m1", "role": "user", "content": "hi\nthere 😀", "\ud800": ["\ud800", -1.5e-7, None]}
        created = store.create("s", {"title": "t", "messages": [message]})
        self._created = State(1, {"title": "t"}, {"messages": [message]})
        assert same(created.data, self._created.data)
        for verb in (
            lambda: store.append("s", "messages", {"id": 2, "crc": "00000000", "content": "x" * 700}),
            lambda: store.update("s", lambda tx: tx.data.update(title="Täßchen", big="y" * 600)),
            lambda: store.append("s", "tool_calls", {"id": "c1"}),
            lambda: store.update("s", lambda tx: tx.data["messages"].insert(0, [])),
            lambda: store.update("s", lambda tx: tx.data.update(big="y" * 6000, notes=["z" * 900] * 5)),
            lambda: store.append("s", "notes", "last"),
            lambda: store.update("s", lambda tx: tx.data.pop("big")),
            lambda: store.append("s", "messages", "\ud800"),
        ):
            verb()
        self.path = next(self._directory.glob("s.*.journal"))
        self.content = self.path.read_bytes()
        self._document = (self._directory / "s.json").read_bytes()
        opening, *lines = self.content.splitlines(keepends=True)
        self._states = [
            replay(b"".join([opening, *lines[:count]]), self._created).state for count in range(len(lines) + 1)
        ]
        assert same(self._store().load("s").data, self._states[-1].data)

    def _store(self) -> persist.Store:
        """Return a store that has never seen the session."""
        store = persist.Store(self._directory, journal="always", timeout_s=0)
        file_engine(store).options.verifies_folds = True
        return store

    def complaint(self, content: bytes, *, is_sealed: bool = False) -> Complaint | None:
        """Put the journal beside its document, and do each verb to the session.

        Return what was answered wrong, or None.
        """
        expected = replay(content, self._created)
        verbs: dict[str, Callable[[persist.Store], str | None]] = {
            "head": lambda store: self._of_head(store.head("s"), expected, is_sealed=is_sealed),
            "tail": lambda store: self._of_tail(store.tail("s", limit=TAIL), expected, is_sealed=is_sealed),
            "load": lambda store: self._of_session(store.load("s"), expected),
            "append": lambda store: self._of_append(store, expected),
            "fold": lambda store: self._of_fold(store, expected),
            "accept": lambda store: self._of_accepted(store.accept("s"), expected, is_sealed=is_sealed),
            "drop": lambda store: self._of_dropped(store.accept("s", drop_journal=True)),
        }
        for name, verb in verbs.items():
            for path in self._directory.glob("s.*.journal*"):
                path.unlink()
            (self._directory / "s.json").write_bytes(self._document)
            self.path.write_bytes(content)
            try:
                wrong = verb(self._store())
            except Exception as error:
                if isinstance(error, (*TYPED_WRITING, persist.Unreadable)):
                    continue
                return Complaint(name, f"untyped {type(error).__name__}", str(error)[:200])
            if wrong:
                return Complaint(name, wrong, "")
        return None

    def _of_session(self, session: persist.Session, expected: Replay) -> str | None:
        state = expected.state
        is_right = expected.is_whole and session.revision == state.revision and same(session.data, state.data)
        return None if is_right else OTHER_STATE

    def _of_head(self, head: persist.Head, expected: Replay, *, is_sealed: bool) -> str | None:
        """Check a head. It reads the last record, and the record that the last one names for the fields.

        Damage before these records goes unnoticed.
        """
        last = self._created.revision if expected.last is None else expected.last["revision"]
        if not is_sealed:
            is_right = head.revision in (last, expected.state.revision) and any(
                head.revision == state.revision and same(dict(head.fields), state.fields) for state in self._states
            )
            return None if is_right else "a head that was never committed"
        is_right = head.revision == last
        is_right &= any(same(dict(head.fields), each) for each in expected.heads)
        return None if is_right else "a head that no record says"

    def _of_tail(self, found: list[Any], expected: Replay, *, is_sealed: bool) -> str | None:
        """Check a tail. It reads as many of the last records as it needs. Damage before them goes unnoticed."""
        if is_sealed:
            return None
        last = self._created.revision if expected.last is None else expected.last["revision"]
        is_right = any(
            state.revision in (last, expected.state.revision) and same(found, state.apart.get("messages", [])[-TAIL:])
            for state in self._states
        )
        return None if is_right else "a tail that was never committed"

    def _of_append(self, store: persist.Store, expected: Replay) -> str | None:
        version = store.append("s", "messages", NEW)
        head = store.head("s")
        state = expected.state
        wanted = state.data | {"messages": [*state.apart.get("messages", []), NEW]}
        is_right = expected.is_whole and (head.version, head.revision) == (version, state.revision + 1)
        return None if is_right and same(self._store().load("s").data, wanted) else "a state made up"

    def _of_fold(self, store: persist.Store, expected: Replay) -> str | None:
        store.compact("s", alone=True)
        return self._of_session(self._store().load("s"), expected)

    def _of_accepted(self, session: persist.Session, expected: Replay, *, is_sealed: bool) -> str | None:
        # An accepted session holds what stands before the first damage. In a sealed journal that may be content that no
        # reader could take either.
        is_right = is_sealed or same(session.data, expected.state.data)
        is_right = is_right and same(self._store().load("s").data, session.data)
        return None if is_right else OTHER_STATE

    def _of_dropped(self, session: persist.Session) -> str | None:
        is_right = same(session.data, self._created.data) and same(self._store().load("s").data, session.data)
        return None if is_right else OTHER_STATE


OTHER_STATE = "a state that was never committed"


def journals(oracle: JournalOracle) -> list[bytes]:
    """Return the oracle's journal, whole and in parts."""
    opening, *lines = oracle.content.splitlines(keepends=True)
    return [oracle.content, b"".join([opening, *lines[:2]]), opening]


# --- runs -------------------------------------------------------------------------------------------------------------

Kind = tuple[str, str, str]


class Tally:
    """The number of contents that were tried, and an example of each kind of wrong answer."""

    def __init__(self, oracle: Oracle, examples: Path) -> None:
        self.tried = 0
        self.found: Counter[Kind] = Counter()
        self.oracle = oracle
        self._examples = examples

    def judge(self, content: bytes, *, is_sealed: bool) -> None:
        self.tried += 1
        complaint = self.oracle.complaint(content, is_sealed=is_sealed)
        if complaint is not None:
            self._enter(complaint, content, is_sealed)

    def _enter(self, complaint: Complaint, content: bytes, is_sealed: bool) -> None:
        kind = (complaint.reader, complaint.kind, "sealed" if is_sealed else "damaged")
        self.found[kind] += 1
        if self.found[kind] == 1:
            self._examples.mkdir(exist_ok=True)
            example = self._examples / f"{len(self.found)}.json"
            example.write_bytes(content)
            print(f"WRONG: {', '.join(kind)}: {complaint.detail}\n       {example}", flush=True)

    def report(self, seconds: float) -> int:
        """Print the figures. Return the exit status."""
        wrong = f"{self.found.total():,} wrong answers of {len(self.found)} kinds"
        print(f"{self.tried:,} documents in {seconds:.0f} s, {wrong}")
        for kind, count in self.found.most_common():
            print(f"  {count:>8,}  {', '.join(kind)}")
        return 1 if self.found else 0


Search = Callable[[Tally, list[bytes], float, int], int]
"""Tries documents made from real ones for so many seconds, from a seed; returns the exit status."""


def at_random(tally: Tally, documents: list[bytes], seconds: float, seed: int) -> int:
    """Try mutants until the time is over. The seed of each follows from its number."""
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        content, is_sealed = mutant(random.Random(seed + tally.tried), documents, tally.oracle.seal)
        tally.judge(content, is_sealed=is_sealed)
    return tally.report(time.monotonic() - started)


def main(arguments: list[str] | None = None, search: Search = at_random) -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=duration, default=3.0, help="how long; default %(default)g")
    parser.add_argument("--seed", type=int, default=1533, help="the same seed tries the same mutants")
    parser.add_argument(
        "--directory",
        type=existing_directory,
        help="where wrong answers' files are kept (default: one in the system's temporary directory)",
    )
    parser.add_argument("--journals", action="store_true", help="spoil journals instead of documents")
    options = parser.parse_args(arguments)
    examples = options.directory or Path(tempfile.gettempdir()) / f"persist-fuzz-{os.getpid()}"
    with quick_directory() as directory:
        if options.journals:
            of_journals = JournalOracle(directory)
            return search(Tally(of_journals, examples), journals(of_journals), options.minutes * 60, options.seed)
        tally = Tally(Oracle(directory), examples)
        return search(tally, originals(directory), options.minutes * 60, options.seed)


if __name__ == "__main__":
    sys.exit(main())
