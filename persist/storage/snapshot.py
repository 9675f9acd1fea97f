"""The document on disk: how a session's data and its header become bytes, and how bytes are read back and trusted.

    {"_persist":{"format":1,"checksum":"…","head_checksum":"…","head_bytes":49,"revision":7,…},     <- line 1: the header
    "title":"File locks",                                                                          <- the head:
    "active_stream_id":null,                                                                       <-   small fields
    "messages":[                                                                                   <- the bulk:
    {"id":"m1","role":"user","content":"hi"},                                                      <-   one item a line
    {"id":"m2","role":"assistant","content":"hello"}
    ]
    }

The whole file is one JSON object. `checksum` covers every byte after its own closing quote; `head_checksum` every byte
after its own up to the end of the head (`head_bytes` counts the bytes of the head, line 1 left out), so that a head can be
trusted without reading the bulk. Both are the first 128 bits of SHA-256, in hex; they stand at fixed places.

The *body* is everything below line 1; see `body`.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import msgspec

from persist import codec
from persist.errors import CorruptSession, NotJSON, Owner, UnsupportedFormat
from persist.storage import disk
from persist.storage.body import BULK, HEADER, Body
from persist.turn import ACTIVE

Kind = TypeVar("Kind")

#: Format 1 is the whole session; format 2 has a journal beside it, which a reader that does not know of it would overlook.
WHOLE, JOURNALED = 1, 2

_OPENING = b'{"_persist":{"format":%d,"checksum":"'
_MIDDLE = b',"head_checksum":"'
_DIGITS = 32
_CHECKED_FROM = len(_OPENING % WHOLE) + _DIGITS + 1
_HEAD_CHECKED_FROM = _CHECKED_FROM + len(_MIDDLE) + _DIGITS + 1
_SHAPE = re.compile(
    rb'\{"_persist":\{"format":([12]),"checksum":"([0-9a-f]{32})"' + re.escape(_MIDDLE) + b'([0-9a-f]{32})"'
)
#: So many bytes of a document hold its checksums: they tell it from any other.
OPENING_BYTES = _HEAD_CHECKED_FROM
_FORMAT = re.compile(rb'\{"_persist":\{"format":(\d{1,9})[,}]')
_FIRST_READ_BYTES = 4096
# From here on, a thread costs less than it saves.
_LARGE_BYTES = 256 * 1024
# A document's own limit, and room for its header.
READ_LIMIT = codec.MAX_BYTES + 1024 * 1024


@dataclass(frozen=True, slots=True)
class StreamOwner:
    """Who runs the session's current stream, and which two messages are that stream's own."""

    stream_id: str
    process: Owner
    prompt_id: str | int | None = None
    answer_id: str | int | None = None
    is_cancelled: bool = False


class Header(msgspec.Struct, frozen=True, eq=False):
    """What `persist` knows of a committed document beside its data.

    `incarnation` tells a session from an earlier one of the same id. `epoch` is the fencing token: it grows with every
    stream and never shrinks. Keys of a header that this version does not know are kept in `extra`.
    """

    incarnation: str
    revision: int
    created_at: datetime
    updated_at: datetime
    epoch: int = 0
    owner: StreamOwner | None = None
    #: Tells this commit from any other of the same content.
    commit: str = ""
    extra: Mapping[str, Any] = msgspec.field(default_factory=dict)
    #: The number of the last journal that the session has had; and whether it has it still.
    generation: int = 0
    is_journaled: bool = False
    #: From this number on, the journals were this document's own; those before may be another's, which was put back, say.
    since: int = 0

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same commit: to fold a journal is none."""
        return self is other or (isinstance(other, Header) and self._of_commit() == other._of_commit())

    def __ne__(self, other: object) -> bool:
        # That of msgspec tells objects apart.
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def _of_commit(self) -> tuple[Any, ...]:
        stream = self.epoch, self.owner, self.extra
        return self.incarnation, self.revision, self.created_at, self.updated_at, self.commit, stream

    def but(self, **changes: Any) -> Header:
        """The same with some attributes changed."""
        return msgspec.structs.replace(self, **changes)

    @classmethod
    def first(cls) -> Header:
        """The header of a session's first commit."""
        now = datetime.now(UTC)
        return cls(token_hex(16), 1, now, now, commit=token_hex(8))

    def next(self, *, touch: bool = True, **changes: Any) -> Header:
        """The header of the next commit; `touch=False` keeps `updated_at`."""
        updated_at = datetime.now(UTC) if touch else self.updated_at
        return self.but(revision=self.revision + 1, updated_at=updated_at, commit=token_hex(8), **changes)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One committed revision. The checksum tells it from every other."""

    header: Header
    body: Body
    checksum: str

    @property
    def identity(self) -> str:
        """What no other committed state of the session has, whichever file it stands in; "" for what is in no file."""
        return self.checksum and (self.header.commit or self.checksum)

    @property
    def active_stream_id(self) -> Any:
        """The stream that the document names, or None; anything else has been written by another program."""
        return self.body.fields().get(ACTIVE) or None


@dataclass(frozen=True, slots=True)
class HeadSnapshot:
    """The header and the small fields of one committed revision. `checksum` is that of the file."""

    header: Header
    small: bytes
    counts: Mapping[str, int]
    #: Taken as it stands there: a head is vouched for by a checksum of its own.
    checksum: str = field(compare=False)

    @property
    def fields(self) -> dict[str, Any]:
        """A fresh copy of the small fields."""
        return Body(self.small, {}).fields()

    @property
    def active_stream_id(self) -> Any:
        """As `Snapshot.active_stream_id`."""
        return self.fields.get(ACTIVE) or None


# --- to bytes ----------------------------------------------------------------------------------------------------------


def to_bytes(header: Header, body: Body) -> tuple[bytes, str]:
    """Return the file's content, and its checksum."""
    line = b'"' + _header_rest(header, body) + (b"\n" if body.is_empty else b",\n")
    head_checksum = _digest(line[1:], body.head)
    checked = _MIDDLE + head_checksum + line + body.head
    bulk = body.bulk_in_document()
    checksum = _digest(checked, *bulk)
    opening = _OPENING % (JOURNALED if header.is_journaled else WHOLE)
    return b"".join([opening, checksum, b'"', checked, *bulk]), checksum.decode()


def _digest(*pieces: bytes | memoryview) -> bytes:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()[:_DIGITS].encode()


def _digest_beside(pieces: memoryview) -> Callable[[], bytes]:
    """Begin to digest in another thread; what is returned waits for the digest. SHA-256 lets the other threads run."""
    digests: list[bytes] = []
    thread = threading.Thread(target=lambda: digests.append(_digest(pieces)), name="persist-digest", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # too many threads, or the interpreter ends
        return lambda: _digest(pieces)

    def digest() -> bytes:
        thread.join()
        # A signal handler may have forked: in the child, the thread has ended without a word.
        return digests[0] if digests else _digest(pieces)

    return digest


def _header_rest(header: Header, body: Body) -> bytes:
    values = {
        "head_bytes": len(body.head),
        "counts": dict(body.counts),
        "revision": header.revision,
        "incarnation": header.incarnation,
        "created_at": header.created_at.isoformat(),
        "updated_at": header.updated_at.isoformat(),
        "commit": header.commit,
        **(_journal_fields(header) if header.generation else {}),
        **stream_values(header),
    }
    return b"," + codec.encode(values)[1:]


def _journal_fields(header: Header) -> dict[str, Any]:
    return {"generation": header.generation, "since": header.since, "is_journaled": header.is_journaled}


def stream_values(header: Header) -> dict[str, Any]:
    """What of a header changes seldom: the stream's part, and what this version does not know. JSON values."""
    return {"epoch": header.epoch, "owner": header.owner and _owner_fields(header.owner), **header.extra}


def with_stream_values(header: Header, values: Mapping[str, Any]) -> Header:
    """The header with what `stream_values` has given; raises one of `NONSENSE` for anything else."""
    owner = None if values["owner"] is None else _owner(_of(dict, values["owner"]))
    extra = {key: value for key, value in values.items() if key not in _KNOWN}
    return header.but(epoch=_natural(values["epoch"]), owner=owner, extra=extra)


def _owner_fields(owner: StreamOwner) -> dict[str, Any]:
    process = owner.process
    return {
        "stream_id": owner.stream_id,
        "pid": process.pid,
        "host": process.host,
        "command": process.command,
        "started_at": process.started_at,
        "prompt_id": owner.prompt_id,
        "answer_id": owner.answer_id,
        "cancelled": owner.is_cancelled,
    }


# --- from bytes --------------------------------------------------------------------------------------------------------


def read(path: Path, session_id: str, *, decode: bool = False) -> Snapshot:
    """Read one committed revision, whole and checked. Takes no lock.

    `decode` is for who wants all of the data at once: of a large document, the bulk is decoded while it is checked.

    Raises:
        FileNotFoundError: there is none.
        CorruptSession, UnsupportedFormat, UnsafeFile: it cannot be trusted.
    """
    content = disk.read(path, READ_LIMIT)
    return _Reader(path, session_id).snapshot(content, decode=decode and len(content) >= _LARGE_BYTES)


def is_journaled(start: bytes) -> bool:
    """Tell of the first bytes of a document whether it has a journal."""
    shape = _SHAPE.match(start)
    return shape is not None and int(shape[1]) == JOURNALED


def read_head(path: Path, session_id: str) -> HeadSnapshot:
    """Read the header and the small fields of one committed revision; the bulk is neither read nor checked.

    A document without a header has to be read whole. Takes no lock; raises as `read` does.
    """
    return _quick_head(path) or _head_of(read(path, session_id))


def _head_of(snapshot: Snapshot) -> HeadSnapshot:
    snapshot.body.fields()  # raises if they are none
    return HeadSnapshot(snapshot.header, snapshot.body.small, snapshot.body.counts, snapshot.checksum)


def _quick_head(path: Path) -> HeadSnapshot | None:
    """The head from the file's first bytes; None where it takes a full read to know, or to say what is wrong."""
    limit = _FIRST_READ_BYTES
    while True:
        content = disk.read(path, limit)
        shape, end = _SHAPE.match(content), content.find(b"\n")
        if shape is None:
            return None
        try:
            values = _header_values(content, end) if end >= 0 else None
            needed = limit * 4 if values is None else end + 1 + _natural(values["head_bytes"])
        except NONSENSE:
            return None
        if values is not None and needed <= len(content):
            return _checked_head(content[:needed], end, values, shape)
        if len(content) < limit or needed > READ_LIMIT:
            return None
        limit = needed


def _checked_head(content: bytes, end: int, values: dict[str, Any], shape: re.Match[bytes]) -> HeadSnapshot | None:
    if _digest(memoryview(content)[_HEAD_CHECKED_FROM:]) != shape[3]:
        return None
    try:
        small = content[end + 1 :].removesuffix(b"\n").removesuffix(b",")
        Body(small, {}).fields()
        return HeadSnapshot(_header(values, int(shape[1])), small, _counts(values), shape[2].decode())
    except (*NONSENSE, CorruptSession):
        return None


#: What a header raises that was damaged, or made up by somebody who can seal it.
NONSENSE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def _header_values(content: bytes, end: int) -> dict[str, Any]:
    values: dict[str, Any] = codec.decode(content[len(b'{"_persist":') : end].removesuffix(b","))
    return values


_KNOWN = frozenset(
    {"format", "checksum", "head_checksum", "head_bytes", "counts", "revision", "incarnation"}
) | frozenset({"created_at", "updated_at", "epoch", "owner", "commit", "generation", "since", "is_journaled"})


def _header(values: Mapping[str, Any], version: int) -> Header:
    """The header of its JSON; raises one of `NONSENSE` if it is none."""
    # No checksum covers the version: a bit of it must not hide the journal.
    if values.get("is_journaled", False) is not (version == JOURNALED):
        raise ValueError(version)
    header = Header(
        incarnation=_of(str, values["incarnation"]),
        revision=_natural(values["revision"]),
        created_at=time_of(values["created_at"]),
        updated_at=time_of(values["updated_at"]),
        commit=_of(str, values.get("commit", "")),
        generation=_natural(values.get("generation", 0)),
        since=_natural(values.get("since", 0)),
        is_journaled=version == JOURNALED,
    )
    return with_stream_values(header, values)


def _owner(values: Mapping[str, Any]) -> StreamOwner:
    texts = (_of(str, values[key]) for key in ("host", "command", "started_at"))
    return StreamOwner(
        stream_id=_of(str, values["stream_id"]),
        process=Owner(_of(int, values["pid"]), *texts),
        prompt_id=_message_id(values["prompt_id"]),
        answer_id=_message_id(values["answer_id"]),
        is_cancelled=_of(bool, values["cancelled"]),
    )


def _of(kind: type[Kind], value: Any) -> Kind:
    if type(value) is not kind:
        raise TypeError(value)
    return value


def _natural(value: Any) -> int:
    if _of(int, value) < 0 or value >= 2**63:
        raise ValueError(value)
    return _of(int, value)


def time_of(value: Any) -> datetime:
    """A header's time."""
    return datetime.fromisoformat(_of(str, value)).astimezone(UTC)


def _message_id(value: Any) -> str | int | None:
    if value is not None and type(value) not in (str, int):
        raise TypeError(value)
    return value  # type: ignore[no-any-return]


def _counts(values: Mapping[str, Any]) -> Mapping[str, int]:
    return {_of(str, key): _natural(count) for key, count in _of(dict, values["counts"]).items()}


def _decoded_bulk(content: bytes) -> list[dict[str, Any]]:
    """The bulk of what may be damaged, if it can be decoded as one with the rest: without a copy of the bulk in braces.

    No small field may stand in the bulk: there it would hide the one of the head, which is decoded alone to compare them.
    """
    try:
        end = content.index(b"\n")
        start = end + 1 + _natural(_header_values(content, end)["head_bytes"])
        if start > len(content) // 4:
            return []
        whole = _of(dict, codec.decode(content))
        bulk = {key: whole.pop(key) for key in list(whole) if key in BULK}
        head = codec.decode(content[:start].removesuffix(b"\n").removesuffix(b",") + b"}")
        return [bulk] if codec.encode(whole) == codec.encode(head) else []
    except (*NONSENSE, NotJSON):
        return []


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one file's content; carries what its errors name."""

    path: Path
    session_id: str

    def snapshot(self, content: bytes, *, decode: bool = False) -> Snapshot:
        """The committed revision that the content is, if its checksum vouches for it."""
        shape = _SHAPE.match(content)
        if shape is None:
            return self._foreign(content)
        checked = memoryview(content)[_CHECKED_FROM:]
        digest = _digest_beside(checked) if decode else partial(_digest, checked)
        # Whatever this gives or refuses, it counts for nothing until the checksum has been compared.
        decoded = _decoded_bulk(content) if decode else []
        checksum = digest()
        if checksum != shape[2]:
            raise self._mismatch(content)
        try:
            end = content.index(b"\n")
            values = _header_values(content, end)
            header, counts = _header(values, int(shape[1])), _counts(values)
            bulk = end + 1 + _natural(values["head_bytes"])
        except NONSENSE:
            raise self._corrupt("its header makes no sense, although its checksum matches.") from None
        try:
            body = Body.in_document(content, end + 1, bulk, counts, (self.session_id, self.path), decoded)
            if content[end - 1 : end] != (b"}" if body.is_empty else b","):
                raise ValueError("comma")
        except ValueError:
            raise self._corrupt("its header does not say where its bulk begins.") from None
        return Snapshot(header, body, checksum.decode())

    def _foreign(self, content: bytes) -> Snapshot:
        """A document of another program: revision 0 until its first commit here."""
        newer = _FORMAT.match(content)
        if newer is not None and int(newer[1]) not in (WHOLE, JOURNALED):
            raise UnsupportedFormat(session_id=self.session_id, path=self.path, found=int(newer[1]), known=JOURNALED)
        data = self.strict(content)
        if HEADER in data or _looks_like_header(next(iter(data.values()), None)):
            raise self._edited()
        checksum = _digest(content).decode()
        written_at = self._written_at()
        return Snapshot(Header(checksum, 0, written_at, written_at), Body.of(data), checksum)

    def _written_at(self) -> datetime:
        try:
            return datetime.fromtimestamp(disk.modified_at(self.path), UTC)
        except (ValueError, OverflowError):
            return datetime.now(UTC)  # a time that no calendar has: anybody can set a file's time

    def strict(self, content: bytes) -> dict[str, Any]:
        """Decode a document that no checksum vouches for."""
        if len(content) > codec.MAX_BYTES:
            raise self._corrupt(f"it is larger than {codec.MAX_BYTES:,} bytes.", codec.MAX_BYTES)
        try:
            data = codec.decode_strict(content)
        except codec.StrictError as error:
            raise self._corrupt(error.reason, error.offset) from None
        if type(data) is not dict:
            raise self._corrupt("it is JSON, but not an object.", 0, "If it is no session, move it out of the store.")
        return data

    def _mismatch(self, content: bytes) -> CorruptSession:
        try:
            self.strict(content)
        except CorruptSession as worse:
            return worse
        return self._edited(has_journal=is_journaled(content))

    def _edited(self, *, has_journal: bool = False) -> CorruptSession:
        directory = self.path.parent
        remedy = f"If the edit was meant, look at it and take it with 'persist accept {directory} {self.session_id}'."
        if has_journal:
            remedy += (
                f" There are later commits in its journal: to edit all there is, undo the edit, fold them with "
                f"'persist compact {directory} {self.session_id}', and edit then."
            )
        return self._corrupt("its checksum does not match: it was edited by hand or damaged.", remedy=remedy)

    def _corrupt(self, reason: str, offset: int | None = None, remedy: str = "") -> CorruptSession:
        return CorruptSession(session_id=self.session_id, path=self.path, reason=reason, offset=offset, remedy=remedy)


def _looks_like_header(value: Any) -> bool:
    # One flipped bit in the name "_persist" must not turn a document of ours into another program's.
    return type(value) is dict and {"checksum", "head_checksum", "incarnation"} <= value.keys()


def read_edited(path: Path, session_id: str) -> Snapshot:
    """Read a document whose checksum does not match, as `persist accept` takes it.

    It must be strict JSON. What is left of its header, and the checksum in it, is kept if it makes sense; else it begins anew.
    """
    content = disk.read(path, READ_LIMIT)
    data = _Reader(path, session_id).strict(content)
    values = data.pop(HEADER, None)
    body = Body.of(data)
    try:
        return Snapshot(_header(values, values.get("format", WHOLE)), body, _of(str, values["checksum"]))
    except NONSENSE:
        now = datetime.now(UTC)
        checksum = _digest(content).decode()
        return Snapshot(Header(checksum, 0, now, now), body, checksum)
