"""Fuzzing of the readers: real documents and journals, spoilt at random, and what a reader may make of each.

The oracle: a typed error, or exactly what an independent parse of the bytes gives; and an error wherever there is a
header whose checksum, computed here once more, is wrong. A document may be *sealed*: its checksums made right again, as
an attacker would, or a program that only copies the format. Then its checksum vouches for whatever its content is.

Of a journal that is not sealed, a reader shows a state that was committed, or a typed error; of one that is, no untyped
error.
"""

from __future__ import annotations

import argparse
import hashlib
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

from persist.storage.body import BULK
from persist.storage.snapshot import Header, StreamOwner

import persist
from harness.faults import quick_directory
from harness.runs import duration, existing_directory
from persist.storage import snapshot

# Spelt out here, not taken from the reader: an error in its own idea of the format must show.
_OPENING = rb'\{"_persist":\{"format":1,"checksum":"(.{32})","head_checksum":"(.{32})"'
_SHAPE = re.compile(_OPENING, re.DOTALL)
_HEAD_BYTES = re.compile(rb'"head_bytes":(-?\d{1,12})\b')
_DIGITS = 32
_AFTER = re.compile(rb'"after":"[0-9a-f]{8}"')
_CRC_BYTES = len(b'{"crc":"00000000",')

#: What a mutation likes to put somewhere.
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
        b'"head_bytes":0',
        b'"revision":7',
        b'"active_stream_id":5',
        b'"id":',
        b'"\\ud800"',
        b'"messages":[\n',
    ),
)


def originals(directory: Path) -> list[bytes]:
    """Real documents: empty, small, with messages of all kinds, with a live stream,
    and one that another program wrote.
    """
    store = persist.Store(directory / "originals")
    message = {"id": "m1", "role": "user", "content": "hi\nthere 😀", "meta": {"n": [1, -1.5e-7, None, True]}}
    store.create("empty")
    store.create("small", {"title": "Ein Täßchen", "\ud800": ["\ud800", {"a": {}}]})
    store.create(
        "whole", {"title": "t", "messages": [message, 5, []], "tool_calls": [{"id": 1}, "x"], "big": "x" * 5_000}
    )
    store.create("active", {"messages": [message]})
    stream = store.start_stream("active", {"role": "user", "content": "Why?"})
    stream.checkpoint({"role": "assistant", "content": "Be"})
    found = [(store.path / f"{session_id}.json").read_bytes() for session_id in store.ids()]
    stream.fail()
    return [*found, json.dumps({"messages": [message], "updated_at": 5}, indent=1).encode()]


def seal(content: bytes) -> bytes:
    """Make both checksums right, if the content has places for them; its header is believed, whatever it says."""
    shape = _SHAPE.match(content)
    if shape is None:
        return content
    line = content.find(b"\n") + 1
    told = _HEAD_BYTES.search(content, 0, line)
    head_end = max(0, line + (int(told[1]) if told else 0))
    content = _put(content, shape.start(2), content[shape.end() : head_end])
    return _put(content, shape.start(1), content[shape.end(1) + 1 :])


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


def _put(content: bytes, place: int, checked: bytes) -> bytes:
    return content[:place] + _digest(checked) + content[place + _DIGITS :]


def _digest(checked: bytes) -> bytes:
    return hashlib.sha256(checked).hexdigest()[:_DIGITS].encode()


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
    """Another value in the place of one: the JSON stays whole, and says something else."""
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


def mutant(dice: Dice, documents: list[bytes], seal: Callable[[bytes], bytes] = seal) -> tuple[bytes, bool]:
    """A spoilt document or journal, and whether it is sealed."""
    content = dice.choice(documents)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        content = dice.choice(MUTATIONS)(content, dice, documents)
    is_sealed = dice.random() < 0.6
    return (seal(content), True) if is_sealed else (content, False)


# --- the oracle -------------------------------------------------------------------------------------------------------

TYPED = (persist.CorruptSession, persist.UnsupportedFormat)
# `persist accept` may meet a field of the header's name, or a value that is too large.
TYPED_EDITED = (*TYPED, persist.NotJSON, persist.ReservedField)


@dataclass(frozen=True, slots=True)
class Complaint:
    """A reader, and what it answered wrong. `kind` groups what has one cause."""

    reader: str
    kind: str
    detail: str


class Oracle:
    """Judges what the readers make of a file at `path`."""

    seal = staticmethod(seal)

    def __init__(self, path: Path) -> None:
        self.path = path

    def complaint(self, content: bytes, *, is_sealed: bool = False) -> Complaint | None:
        """Put the content there and read it in every way; say what was answered wrong, or None."""
        path = self.path
        path.write_bytes(content)
        readers: dict[str, Callable[[], str | None]] = {
            "read": lambda: _of_snapshot(snapshot.read(path, "s"), content),
            "read_head": lambda: _of_head(snapshot.read_head(path, "s"), content),
            "read_edited": lambda: _of_edited(snapshot.read_edited(path, "s"), content),
        }
        for name, reader in readers.items():
            try:
                wrong = reader()
            except Exception as error:
                if isinstance(error, TYPED_EDITED if name == "read_edited" else TYPED):
                    continue
                return Complaint(name, f"untyped {type(error).__name__}", str(error)[:200])
            if wrong:
                return Complaint(name, wrong, "")
        return None


NOT_VOUCHED_FOR = "a document that its checksum does not vouch for"


def trusted(content: bytes) -> Any:
    """The data that a reader may make of it, with the header left out; None if it must refuse.

    That is what the checksum of a header vouches for; or, with no trace of a header, the strict JSON of another
    program.
    """
    shape = _SHAPE.match(content)
    if shape is not None:
        return _parsed(content, is_strict=False) if _is_whole(content, shape) else None
    data = _object(content, is_strict=True)
    return None if data is None or _bears_header(data) else data


def trusted_head(content: bytes) -> Any:
    """The small fields that a checksum vouches for, that of the head or of all, whatever stands behind them.

    Or None.
    """
    shape, line = _SHAPE.match(content), content.find(b"\n") + 1
    header = _object(content[:line].removesuffix(b"\n").removesuffix(b",") + b"}", is_strict=False)
    if shape is None or header is None:
        return None
    told = header["_persist"].get("head_bytes") if type(header["_persist"]) is dict else None
    if type(told) is not int or told < 0:
        return None
    if _digest(content[shape.end() : line + told]) != shape[2] and not _is_whole(content, shape):
        return None
    return _object(b"{" + content[line : line + told].removesuffix(b"\n").removesuffix(b",") + b"}", is_strict=False)


def _is_whole(content: bytes, shape: re.Match[bytes]) -> bool:
    return _digest(content[shape.end(1) + 1 :]) == shape[1]


def _bears_header(data: dict[str, Any]) -> bool:
    """Also one whose name was spoilt: a document of ours must not turn into another program's by a flipped bit."""
    first = next(iter(data.values()), None)
    return "_persist" in data or (type(first) is dict and {"checksum", "head_checksum", "incarnation"} <= first.keys())


def _small(data: Any) -> Any:
    return data and {key: value for key, value in data.items() if key not in BULK}


def _of_snapshot(found: snapshot.Snapshot, content: bytes) -> str | None:
    data, fields, expected = found.body.data(), found.body.fields(), trusted(content)
    if expected is None:
        return NOT_VOUCHED_FOR
    if not _same(data, expected):
        return "another document than the bytes say"
    if not _same(fields, _small(data)):
        return "small fields that are not the document's"
    return _of_header(found.header)


def _of_head(found: snapshot.HeadSnapshot, content: bytes) -> str | None:
    # Damage among the messages goes unnoticed by a head.
    expected = [fields for fields in (trusted_head(content), _small(trusted(content))) if fields is not None]
    if not expected:
        return NOT_VOUCHED_FOR
    if not any(_same(found.fields, fields) for fields in expected):
        return "other small fields than the bytes say"
    if not all(type(count) is int and count >= 0 for count in dict(found.counts).values()):
        return "counts that are none"
    return _of_header(found.header)


def _of_edited(found: snapshot.Snapshot, content: bytes) -> str | None:
    expected = _parsed(content, is_strict=True)
    if expected is None or not _same(found.body.data(), expected):
        return "another document than the bytes say"
    return _of_header(found.header)


def _of_header(header: Header) -> str | None:
    """Every verb counts on these types."""
    owner = header.owner
    numbers = (header.revision, header.epoch)
    is_right = (
        type(header.incarnation) is str
        and all(type(number) is int and number >= 0 for number in numbers)
        and header.updated_at.tzinfo is not None
        and header.created_at.tzinfo is not None
        and (owner is None or _is_owner(owner))
    )
    return None if is_right else "a header of wrong types"


def _is_owner(owner: Any) -> bool:
    ids = (owner.prompt_id, owner.answer_id)
    return (
        isinstance(owner, StreamOwner)
        and type(owner.stream_id) is str
        and type(owner.process.pid) is int
        and type(owner.is_cancelled) is bool
        and all(message_id is None or type(message_id) in (str, int) for message_id in ids)
    )


def _parsed(content: bytes, *, is_strict: bool) -> Any:
    """What the standard library says, with the header left out; None for what is no object."""
    data = _object(content, is_strict=is_strict)
    return data and {key: value for key, value in data.items() if key != "_persist"}


def _object(content: bytes, *, is_strict: bool) -> dict[str, Any] | None:
    try:
        data = json.loads(content.decode(), object_pairs_hook=_unique if is_strict else None)
    except (ValueError, RecursionError):
        return None
    return data if type(data) is dict else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


# --- journals ---------------------------------------------------------------------------------------------------------


class JournalOracle(Oracle):
    """Judges what a store makes of a session whose journal is spoilt."""

    seal = staticmethod(seal_journal)

    def __init__(self, directory: Path) -> None:
        """Make a session with a journal of some records."""
        self._directory = directory / "journaled"
        self._states: dict[int, Any] = {}
        store = self._store()
        message = {"id": "m1", "role": "user", "content": "hi\nthere 😀", "\ud800": ["\ud800", -1.5e-7, None]}
        store.create("s", {"title": "t", "messages": [message]})
        self._note(store)
        for verb in (
            lambda: store.append("s", "messages", {"id": 2, "crc": "00000000", "content": "x" * 700}),
            lambda: store.update("s", lambda data: data.update(title="Täßchen", big="y" * 600)),
            lambda: store.append("s", "tool_calls", {"id": "c1"}),
            lambda: store.update("s", lambda data: data["messages"].insert(0, [])),
            lambda: store.append("s", "messages", "\ud800"),
        ):
            verb()
            self._note(store)
        super().__init__(next(self._directory.glob("s.*.journal")))
        self.content = self.path.read_bytes()
        self._document = (self._directory / "s.json").read_bytes()

    def _store(self) -> persist.Store:
        return persist.Store(self._directory, journal="always", lock_timeout_s=0)

    def _note(self, store: persist.Store) -> None:
        session = store.load("s")
        self._states[session.revision] = session.data

    def complaint(self, content: bytes, *, is_sealed: bool = False) -> Complaint | None:
        """Put the journal beside its document, and do each verb to the session.

        Say what was answered wrong, or None.
        """
        verbs: dict[str, Callable[[persist.Store], Any]] = {
            "head": lambda store: self._of_head(store.head("s")),
            "load": lambda store: self._of_session(store.load("s")),
            "append": self._of_append,
            "accept": lambda store: self._of_accepted(store.accept("s")),
        }
        for name, verb in verbs.items():
            for path in self._directory.glob("s.*.journal*"):
                path.unlink()
            (self._directory / "s.json").write_bytes(self._document)
            self.path.write_bytes(content)
            try:
                wrong = verb(self._store())
            except Exception as error:
                if isinstance(error, (*TYPED_EDITED, persist.MergeConflict, persist.WrongType, persist.Unreadable)):
                    continue
                return Complaint(name, f"untyped {type(error).__name__}", str(error)[:200])
            if wrong and not is_sealed:
                return Complaint(name, wrong, "")
        return None

    def _is_committed(self, revision: int, data: Any) -> bool:
        return revision in self._states and _same(self._states[revision], data)

    def _of_session(self, session: persist.Session) -> str | None:
        return None if self._is_committed(session.revision, session.data) else "a state that was never committed"

    def _of_head(self, head: persist.Head) -> str | None:
        is_right = head.revision in self._states and _same(head.data, _small(self._states[head.revision]))
        return None if is_right else "a head that was never committed"

    def _of_append(self, store: persist.Store) -> str | None:
        revision = store.append("s", "messages", {"id": "new"})
        data = store.load("s").data
        return (
            None if self._is_committed(revision - 1, data | {"messages": data["messages"][:-1]}) else "a state made up"
        )

    def _of_accepted(self, session: persist.Session) -> str | None:
        # A sound session is left alone; else it is one that was committed, at a revision that nobody has had.
        is_right = any(self._is_committed(revision, session.data) for revision in range(session.revision + 1))
        return None if is_right else "a state that was never committed"


def journals(oracle: JournalOracle) -> list[bytes]:
    """Its journal, whole and in parts."""
    opening, *lines = oracle.content.splitlines(keepends=True)
    return [oracle.content, b"".join([opening, *lines[:2]]), opening]


# --- runs -------------------------------------------------------------------------------------------------------------

Kind = tuple[str, str, str]


class Tally:
    """What was tried, and an example of each kind of wrong answer."""

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
        """Print the figures; return the exit status."""
        wrong = f"{self.found.total():,} wrong answers of {len(self.found)} kinds"
        print(f"{self.tried:,} documents in {seconds:.0f} s, {wrong}")
        for kind, count in self.found.most_common():
            print(f"  {count:>8,}  {', '.join(kind)}")
        return 1 if self.found else 0


Search = Callable[[Tally, list[bytes], float, int], int]
"""Tries documents made from real ones for so many seconds, from a seed; returns the exit status."""


def at_random(tally: Tally, documents: list[bytes], seconds: float, seed: int) -> int:
    """Try mutants until the time is over; the seed of each follows from its number."""
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
        tally = Tally(Oracle(directory / "s.json"), examples)
        return search(tally, originals(directory), options.minutes * 60, options.seed)


if __name__ == "__main__":
    sys.exit(main())
