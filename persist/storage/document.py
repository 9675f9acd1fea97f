"""The document: how a session's content and its header become a file, and how a file is read back and trusted.

    {"_persist":{"format":3,"checksum":"…","incarnation":"…","revision":7,…,"parts":{…}},    <- line 1: the header
    "title":"File locks",                                                                 <- the fields
    "active_stream_id":null,
    "messages":[                                                                          <- what stands apart
    {"id":"m1","role":"user","content":"hi"},                                             <-   one item a line
    {"id":"m2","role":"assistant","content":"hello"}
    ],
    "notes":"…"
    }

The whole file is one JSON object. The header's `checksum` covers the rest of line 1. The header holds a checksum for
the fields and for each part that stands apart, with its length. Every other byte is known. So a head can be trusted
without the parts behind it. All checksums are xxh3_128 in hex. They find damage and edits by hand. They do not stop a
forger.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import msgspec
import xxhash

from persist import json_codec
from persist.errors import CorruptSession, UnsupportedFormat
from persist.storage import disk, layout
from persist.storage.content import HEADER, Content, Items, Value, encoded

Kind = TypeVar("Kind")

FORMAT = 3
_OPENING = b'{"_persist":{"format":%d,"checksum":"%b"'
_SHAPE = re.compile(rb'\{"_persist":\{"format":%d,"checksum":"([0-9a-f]{32})"' % FORMAT)
_FORMAT = re.compile(rb'\{"_persist":\{"format":(\d{1,9})[,}]')
_FIRST_READ_BYTES = 4096
# A document's own limit, and room for its header.
READ_LIMIT = json_codec.MAX_BYTES + 1024 * 1024
#: What decoding raises for a header, a record or a part that was damaged, or that somebody sealed on purpose.
NONSENSE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError)


class Header(msgspec.Struct, frozen=True):
    """What `persist` knows of a commit beside the content.

    Attributes:
        incarnation: tells a session from an earlier one of the same id.
        revision: grows by one with each commit.
        commit: tells this commit from any other.
        epoch: the fencing token. It grows with every stream and never shrinks.
        owner: what the layer of the streams keeps about the running stream, as JSON values, or None.
        journal: the hex in the name of the session's journal, or None.
        folded: that of the journal which was folded into this document, or None.
        session_id: the session's id, if the file's name holds a hash of it.
    """

    incarnation: str
    revision: int
    created_at: datetime
    updated_at: datetime
    commit: str = ""
    epoch: int = 0
    owner: Mapping[str, Any] | None = None
    journal: str | None = None
    folded: str | None = None
    session_id: str | None = None

    def but(self, **changes: Any) -> Header:
        """Return the same header with some attributes changed."""
        return msgspec.structs.replace(self, **changes)

    def next(self, *, touch: bool = True, **changes: Any) -> Header:
        """Return the header of the next commit. `touch=False` keeps `updated_at`."""
        updated_at = datetime.now(UTC) if touch else self.updated_at
        return self.but(revision=self.revision + 1, updated_at=updated_at, commit=token_hex(8), **changes)


def first_header(session_id: str | None = None) -> Header:
    """Return the header of a session's first commit. Its id is named if the file's name holds a hash of it."""
    now = datetime.now(UTC)
    return Header(token_hex(16), 1, now, now, token_hex(8), session_id=session_id)


@dataclass(frozen=True, slots=True)
class Head:
    """The header and the fields of a commit, and how many items the lists have that stand apart."""

    header: Header
    fields: Mapping[str, bytes]
    counts: Mapping[str, int]

    def decode_fields(self) -> dict[str, Any]:
        """Return the fields as a fresh dict."""
        return {name: json_codec.decode(value) for name, value in self.fields.items()}


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it was read."""

    header: Header
    content: Content
    version: disk.Version


# --- to bytes --------------------------------------------------------------------------------------------------------


def to_bytes(header: Header, content: Content) -> bytes:
    """Return the file's content."""
    fields = _fields_text(content.fields)
    parts = {name: _part_text(value) for name, value in content.apart.items()}
    rest = b"," + json_codec.encode(_header_values(header, content, fields, parts))[1:]
    opening = _OPENING % (FORMAT, _checksum(rest))
    segments = [fields] if fields else []
    segments += [_key(name) + text for name, text in parts.items()]
    return b"".join(
        [opening, rest, b",\n" if segments else b"\n", b",\n".join(segments), b"\n}\n" if segments else b"}\n"]
    )


def _fields_text(fields: Mapping[str, bytes]) -> bytes:
    return b",\n".join([_key(name) + value for name, value in fields.items()])


def _key(name: str) -> bytes:
    return json_codec.encode(name, (name,)) + b":"


def _part_text(value: Value) -> bytes:
    if not isinstance(value, Items):
        return value
    text, items = value.in_text()
    if not len(value):
        return b"[]"
    joined = b",\n".join(items)
    if not text:
        return b"[\n%b\n]" % joined
    return b"".join([text[:-2], b",\n", joined, b"\n]"]) if items else bytes(text)


def _checksum(text: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_hexdigest(text).encode()


def _header_values(header: Header, content: Content, fields: bytes, parts: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "incarnation": header.incarnation,
        "revision": header.revision,
        "commit": header.commit,
        "epoch": header.epoch,
        "created_at": header.created_at.isoformat(),
        "updated_at": header.updated_at.isoformat(),
        "owner": header.owner,
        "journal": header.journal,
        "folded": header.folded,
        **({"id": header.session_id} if header.session_id is not None else {}),
        "fields": {"bytes": len(fields), "checksum": _checksum(fields).decode()},
        "parts": {
            name: {
                "bytes": len(text),
                "checksum": _checksum(text).decode(),
                **({"count": len(value)} if isinstance(value := content.apart[name], Items) else {}),
            }
            for name, text in parts.items()
        },
    }


# --- from bytes ------------------------------------------------------------------------------------------------------


def read(path: Path, session_id: str, file_id: str | None = None) -> Document:
    """Read a whole document and check it. Takes no lock.

    Args:
        file_id: the id that its header must hold, because its name holds a hash of it.

    Raises:
        FileNotFoundError: there is none.
        CorruptSession, UnsupportedFormat, UnsafeFile: it cannot be trusted.
    """
    content, version = disk.read_version(path, READ_LIMIT)
    return _Reader(path, session_id, file_id).document(content, version)


def read_head(path: Path, session_id: str, file_id: str | None = None) -> Head:
    """Read the header and the fields of a document. What stands apart is neither read nor checked.

    A document without a header is read whole. Takes no lock, and raises as `read` does.
    """
    head = _quick_head(path, file_id)
    if head is not None:
        return head
    found = read(path, session_id, file_id)
    return Head(found.header, found.content.fields, found.content.counts)


def _quick_head(path: Path, file_id: str | None) -> Head | None:
    """Return the head from the file's first bytes. None where only a full read tells what is wrong."""
    limit = _FIRST_READ_BYTES
    while True:
        content = disk.read(path, limit)
        end = content.find(b"\n")
        try:
            values = _checked_header(content, end) if end >= 0 else None
            needed = limit * 4 if values is None else end + 1 + natural(values["fields"]["bytes"])
            if values is not None and needed <= len(content):
                fields = _checked(memoryview(content)[end + 1 : needed], values["fields"])
                return Head(header_of(values, file_id), fields_of(b"".join([b"{", fields, b"}"])), _counts(values))
        except NONSENSE:
            return None
        if len(content) < limit or needed > READ_LIMIT:
            return None
        limit = needed


def _checked_header(content: bytes, end: int) -> dict[str, Any]:
    """Return the values of the header line that ends there. Raise one of `NONSENSE` if it is none."""
    shape = _SHAPE.match(content)
    line = content[:end].removesuffix(b",")
    if shape is None or _checksum(memoryview(line)[shape.end() :]) != shape[1]:
        raise ValueError("header")
    return _of(dict, json_codec.decode(line[len(b'{"_persist":') :]))


def _checked(text: memoryview, part: Mapping[str, Any]) -> memoryview:
    if len(text) != natural(part["bytes"]) or _checksum(text).decode() != part["checksum"]:
        raise ValueError("checksum")
    return text


def fields_of(text: bytes) -> dict[str, bytes]:
    """Return the members of a JSON object, each as its JSON. Raise one of `NONSENSE` if it is none."""
    # Decoded at once, so that nobody who asks for a field later meets what cannot be decoded.
    values = _of(dict, json_codec.decode(text))
    if HEADER in values:
        raise ValueError(HEADER)
    try:
        return {name: bytes(raw) for name, raw in _raw_members(text).items()}
    except msgspec.DecodeError:
        # A lone surrogate, which msgspec does not read.
        return {name: json_codec.encode(value) for name, value in values.items()}


_raw_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _counts(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: natural(part["count"]) for name, part in values["parts"].items() if "count" in part}


def header_of(values: Mapping[str, Any], file_id: str | None) -> Header:
    """Return the header of its JSON. Raise one of `NONSENSE` if it is none, or if it is another session's."""
    found = Header(
        incarnation=_of(str, values["incarnation"]),
        revision=natural(values["revision"]),
        created_at=time_of(values["created_at"]),
        updated_at=time_of(values["updated_at"]),
        commit=_of(str, values["commit"]),
        epoch=natural(values["epoch"]),
        owner=None if values["owner"] is None else _of(dict, values["owner"]),
        journal=_hex_or_none(values["journal"]),
        folded=_hex_or_none(values["folded"]),
        session_id=values.get("id"),
    )
    if file_id is not None and found.session_id != file_id:
        raise ValueError("id")
    return found


def _hex_or_none(value: Any) -> str | None:
    if value is not None and re.fullmatch("[0-9a-f]{16}", _of(str, value)) is None:
        raise ValueError(value)
    return value  # type: ignore[no-any-return]


def _of(kind: type[Kind], value: Any) -> Kind:
    if type(value) is not kind:
        raise TypeError(value)
    return value


def natural(value: Any) -> int:
    """Return a whole number from 0 up. Raise one of `NONSENSE` for anything else."""
    if _of(int, value) < 0 or value >= 2**63:
        raise ValueError(value)
    return _of(int, value)


def time_of(value: Any) -> datetime:
    """Return a header's time."""
    return datetime.fromisoformat(_of(str, value)).astimezone(UTC)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one file's content. Carries what its errors name."""

    path: Path
    session_id: str
    file_id: str | None

    def document(self, content: bytes, version: disk.Version) -> Document:
        """Return the document that the content is, if its checksums vouch for it."""
        if _SHAPE.match(content) is None:
            return self._foreign(content, version)
        end = content.find(b"\n")
        try:
            values = _checked_header(content, end)
            found = self._content(content, end + 1, values)
        except NONSENSE:
            raise self._mismatch(content) from None
        try:
            header = header_of(values, self.file_id)
        except NONSENSE:
            raise self._corrupt("its header makes no sense, or is another session's.") from None
        return Document(header, found, version)

    def _content(self, content: bytes, place: int, values: Mapping[str, Any]) -> Content:
        """Return what stands behind the header, checked byte by byte.

        Raise one of `NONSENSE` if it is not as the header says.
        """
        text = memoryview(content)
        parts = _of(dict, values["parts"])
        segments: dict[str | None, tuple[bytes, Mapping[str, Any]]] = {None: (b"", values["fields"])}
        segments |= {name: (_key(name), part) for name, part in parts.items()}
        if not natural(values["fields"]["bytes"]):
            _checked(text[:0], values["fields"])
            del segments[None]
        fields: dict[str, bytes] = {}
        apart: dict[str, Value] = {}
        # Between two segments stands ",\n". The first one follows on the comma and the newline of line 1.
        place -= 2 if segments else 1
        for name, (key, part) in segments.items():
            if bytes(text[place : place + 2 + len(key)]) != b",\n" + key:
                raise ValueError("separator")
            start = place + 2 + len(key)
            place = start + natural(part["bytes"])
            piece = _checked(text[start:place], part)
            if name is None:
                fields = fields_of(b"".join([b"{", piece, b"}"]))
            else:
                apart[name] = _part(piece, part)
        if bytes(text[place : place + 4]) != b"\n}\n" or HEADER in apart or not fields.keys().isdisjoint(apart):
            raise ValueError("end")
        return Content(fields, apart)

    def _foreign(self, content: bytes, version: disk.Version) -> Document:
        """Return a document of another program: revision 0 until its first commit here."""
        other = _FORMAT.match(content)
        if other is not None:
            self._require_format(int(other[1]))
        data = self.strict(content)
        values = data.get(HEADER)
        if type(values) is dict and type(values.get("format")) is int:
            # An editor has laid it out anew.
            self._require_format(values["format"])
        if HEADER in data or _looks_like_header(next(iter(data.values()), None)):
            raise self._edited()
        checksum, written_at = _checksum(content).decode(), self._written_at()
        header = Header(checksum, 0, written_at, written_at, commit=checksum, session_id=self.file_id)
        return Document(header, encoded(data), version)

    def _require_format(self, found: int) -> None:
        if found != FORMAT:
            raise UnsupportedFormat(session_id=self.session_id, path=self.path, found=found, known=FORMAT)

    def _written_at(self) -> datetime:
        try:
            return datetime.fromtimestamp(disk.modified_at(self.path), UTC)
        except (ValueError, OverflowError):
            return datetime.now(UTC)  # a time that no calendar has: anybody can set a file's time

    def strict(self, content: bytes) -> dict[str, Any]:
        """Decode a document that no checksum vouches for."""
        if len(content) > json_codec.MAX_BYTES:
            raise self._corrupt(f"it is larger than {json_codec.MAX_BYTES:,} bytes.", json_codec.MAX_BYTES)
        try:
            data = json_codec.decode_strict(content)
        except json_codec.StrictError as error:
            raise self._corrupt(error.reason, error.offset) from None
        if type(data) is not dict:
            raise self._corrupt("it is JSON, but not an object.", 0, "If it is no session, move it out of the store.")
        return data

    def _mismatch(self, content: bytes) -> CorruptSession:
        try:
            data = self.strict(content)
        except CorruptSession as worse:
            return worse
        values = data.get(HEADER)
        return self._edited(has_journal=type(values) is dict and values.get("journal") is not None)

    def _edited(self, *, has_journal: bool = False) -> CorruptSession:
        accept, compact = (layout.command(verb, self.path.parent, self.session_id) for verb in ("accept", "compact"))
        remedy = f"If the edit was meant, look at it and take it with {accept}."
        if has_journal:
            remedy += (
                f" There are later commits in its journal: to edit all there is, undo the edit, fold them with "
                f"{compact}, and edit then."
            )
        return self._corrupt("its checksum does not match: it was edited by hand or damaged.", remedy=remedy)

    def _corrupt(self, reason: str, offset: int | None = None, remedy: str = "") -> CorruptSession:
        return CorruptSession(session_id=self.session_id, path=self.path, reason=reason, offset=offset, remedy=remedy)


def _part(text: memoryview, part: Mapping[str, Any]) -> Value:
    if "count" not in part:
        if bytes(text[:1]) == b"[":
            raise ValueError("a list without a count")
        return bytes(text)
    count = natural(part["count"])
    is_list = bytes(text[:2]) == b"[\n" and bytes(text[-2:]) == b"\n]" if count else bytes(text) == b"[]"
    if not is_list:
        raise ValueError("count")
    return Items.in_document(text, count)


def _looks_like_header(value: Any) -> bool:
    # One flipped bit in the name "_persist" must not turn a document of ours into another program's.
    return type(value) is dict and {"checksum", "incarnation", "parts"} <= value.keys()


def read_edited(path: Path, session_id: str, file_id: str | None = None) -> Document:
    """Read a document whose checksums do not match, as `persist accept` takes it.

    It must be strict JSON. What is left of its header is kept if it makes sense. Else the session begins anew.
    """
    content, version = disk.read_version(path, READ_LIMIT)
    data = _Reader(path, session_id, file_id).strict(content)
    values = data.pop(HEADER, None)
    found = encoded(data)
    try:
        return Document(header_of(values, file_id), found, version)
    except NONSENSE:
        now = datetime.now(UTC)
        return Document(Header(_checksum(content).decode(), 0, now, now, session_id=file_id), found, version)
