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
the fields and for each part that stands apart, with its length. The format fixes every other byte. So a reader can
trust a head without the parts behind it. All checksums are xxh3_128 in hex. They find damage and edits by hand. They do
not stop a forger.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Annotated, Any

import msgspec
import xxhash

from persist import json_codec
from persist.errors import CorruptSession, UnsupportedFormat
from persist.json_codec import encode_key
from persist.storage import disk, layout
from persist.storage.content import HEADER, SEPARATOR, Content, Items, Value, encoded

#: A whole number from 0 up, of 63 bits.
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]

FORMAT = 3
_OPENING = b'{"_persist":{"format":%d,"checksum":"%b"'
_SHAPE = re.compile(rb'\{"_persist":\{"format":%d,"checksum":"([0-9a-f]{32})"' % FORMAT)
_FORMAT = re.compile(rb'\{"_persist":\{"format":(\d{1,9})[,}]')
_FIRST_READ_BYTES = 4096
# A document's own limit, and room for its header.
READ_LIMIT = json_codec.MAX_BYTES + 1024 * 1024
#: Decoding raises these for a header, a record or a part that was damaged, or that somebody sealed on purpose.
NONSENSE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError)


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The facts about a commit beside its content.

    Attributes:
        incarnation: tells a session from an earlier one of the same id.
        revision: grows by one with each commit.
        commit: tells this commit from any other.
        epoch: the fencing token. It grows with every stream and never shrinks.
        owner: the facts that the layer of the streams keeps about the running stream, as JSON values, or those of
            `copying` about the store that the session is a copy of, or None.
        journal: the hex in the name of the session's journal, or None.
        folded: the hex of the journal that was folded into this document, or None.
        session_id: the session's id, if the file's name holds a hash of it.
    """

    incarnation: str
    revision: Natural
    commit: str
    epoch: Natural
    created_at: datetime
    updated_at: datetime
    owner: Mapping[str, Any] | None
    journal: _Hex | None
    folded: _Hex | None
    session_id: str | None = msgspec.field(default=None, name="id")

    @property
    def version(self) -> str:
        """The name of this commit. No other commit has it, of this session or of another session with its id."""
        return f"{self.incarnation}.{self.commit}"

    def but(self, **changes: Any) -> Header:
        """Return the same header with some attributes changed."""
        return msgspec.structs.replace(self, **changes)

    def next(self, *, touch: bool = True, **changes: Any) -> Header:
        """Return the header of the next commit. `touch=False` keeps `updated_at`."""
        updated_at = datetime.now(UTC) if touch else self.updated_at
        facts: dict[str, Any] = {"revision": self.revision + 1, "updated_at": updated_at, "commit": os.urandom(8).hex()}
        return msgspec.structs.replace(self, **facts, **changes)


def first_header(session_id: str | None = None) -> Header:
    """Return the header of a session's first commit. It holds the id if the file's name holds a hash of the id."""
    now = datetime.now(UTC)
    return Header(token_hex(16), 1, token_hex(8), 0, now, now, None, None, None, session_id)


class _Part(msgspec.Struct, omit_defaults=True):
    """The header's facts about a part of the file. `count` is the number of a list's items."""

    size_bytes: Natural = msgspec.field(name="bytes")
    checksum: str
    count: Natural | None = None


class _Parts(msgspec.Struct):
    """The header's facts about the rest of the file."""

    fields: _Part
    parts: dict[str, _Part]


_checksum = xxhash.xxh3_128_hexdigest
#: The header's facts about the fields of a session without fields.
_NO_FIELDS = _Part(0, _checksum(b""))
_header_in = msgspec.json.Decoder(Header).decode
_parts_in = msgspec.json.Decoder(_Parts).decode
_members_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Head(msgspec.Struct, frozen=True):
    """The header and the fields of a commit, and the counts of the values that stand apart (see `Content.counts`)."""

    header: Header
    fields: Mapping[str, bytes]
    counts: Mapping[str, int | None]

    def decode_fields(self) -> dict[str, Any]:
        """Return the fields as a fresh dict."""
        return {name: json_codec.decode(value) for name, value in self.fields.items()}


class Document(msgspec.Struct, frozen=True):
    """A document as it was read."""

    header: Header
    content: Content
    version: disk.Version


# --- to bytes --------------------------------------------------------------------------------------------------------


def to_bytes(header: Header, content: Content) -> bytes:
    """Return the bytes of a document's file."""
    fields = b",\n".join([encode_key(name) + value for name, value in content.fields.items()])
    parts = _Parts(_Part(len(fields), _checksum(fields)), {})
    lines = [fields] if fields else []
    for name, value in content.apart.items():
        text = _text_of(value)
        parts.parts[name] = _Part(len(text), _checksum(text), value.count if isinstance(value, Items) else None)
        lines.append(encode_key(name) + text)
    # The times become text first, because a test tool that freezes the clock may have put its own datetime there.
    plain = header.but(created_at=header.created_at.isoformat(), updated_at=header.updated_at.isoformat())
    rest = b"," + json_codec.encode(msgspec.to_builtins(plain) | msgspec.to_builtins(parts))[1:]
    lines.insert(0, _OPENING % (FORMAT, _checksum(rest).encode()) + rest)
    lines[-1] += b"\n}\n"
    return b",\n".join(lines)


def _text_of(value: Value) -> bytes:
    if not isinstance(value, Items):
        return value
    text, items = value.in_text()
    return b"[\n%b\n]" % b",\n".join([text[2:-2], *items] if text else items) if len(value) else b"[]"


# --- from bytes ------------------------------------------------------------------------------------------------------


def read(path: disk.StrPath, session_id: str, file_id: str | None = None) -> Document:
    """Read a whole document and check it. Take no lock.

    Args:
        file_id: the id that its header must hold, because its name holds a hash of it.

    Raises:
        FileNotFoundError: there is none.
        CorruptSession, UnsupportedFormat, Unreadable: it cannot be trusted.
    """
    content, version = disk.read_version(path, READ_LIMIT)
    return _Reader(path, session_id, file_id).document(content, version)


def read_head(path: disk.StrPath, session_id: str, file_id: str | None = None) -> tuple[Head, disk.Version]:
    """Read the header and the fields of a document, and its version. Take no lock.

    The values that stand apart are neither read nor checked. A document without a header is read whole. The errors are
    the same as those of `read`.
    """
    fd, status = disk.open_known(path, os.O_RDONLY)
    try:
        found = _read_ending(fd, file_id, status.st_size)
    finally:
        disk.close(fd)
    if found is not None:
        return found.head, disk.version_in(status)
    # Only a full read tells what is wrong.
    whole = read(path, session_id, file_id)
    return Head(whole.header, whole.content.fields, whole.content.counts), whole.version


@dataclass(frozen=True, slots=True)
class Ending:
    """An open document whose head was read and checked. The ends of its lists are not checked."""

    head: Head
    _fd: int
    #: Where the fields end.
    _end: int
    _parts: _Parts

    def last(self, name: str, count: int) -> list[bytes]:
        """Return the last items of a list, or all if it has no more."""
        start, stop = _places_of(self._end, self._parts)[name]
        if stop > disk.size_of(self._fd):
            raise json_codec.Undecodable("a list is longer than the file")
        window = _FIRST_READ_BYTES
        while True:
            begin = max(start, stop - window)
            items = disk.read_at(self._fd, stop - begin, begin).split(SEPARATOR) if start < stop else []
            # The first item may be cut off.
            if begin == start or len(items) > count:
                return items[max(len(items) - count, 0) :]
            window *= 4


@contextlib.contextmanager
def ending(path: disk.StrPath, file_id: str | None) -> Iterator[Ending | None]:
    """Open a document for a block. The block gets None if the head is not sound, or is another program's."""
    fd, status = disk.open_known(path, os.O_RDONLY)
    try:
        yield _read_ending(fd, file_id, status.st_size)
    finally:
        disk.close(fd)


def _read_ending(fd: int, file_id: str | None, size_bytes: int) -> Ending | None:
    limit = _FIRST_READ_BYTES
    try:
        while True:
            content = disk.read_at(fd, min(limit, size_bytes), 0)
            end, needed = content.find(b"\n") + 1, limit * 4
            if end:
                line, parts = _checked_header(content, end)
                needed = end + parts.fields.size_bytes
                if needed <= len(content):
                    fields = _checked_fields(memoryview(content)[end:needed], parts.fields)
                    if not fields.keys().isdisjoint(parts.parts):
                        return None
                    counts = {name: part.count for name, part in parts.parts.items()}
                    return Ending(Head(_header_of_line(line, file_id), fields, counts), fd, needed, parts)
            if len(content) < limit or needed > READ_LIMIT:
                return None
            limit = needed
    except NONSENSE:
        return None


def _places_of(place: int, parts: _Parts) -> dict[str, tuple[int, int]]:
    """Return where the items of each list begin and end. The fields end at `place`, and the lists stand behind them."""
    places = {}
    # If there are no fields, the first part follows on the comma and the newline of line 1.
    place -= 0 if parts.fields.size_bytes else len(SEPARATOR)
    for name, part in parts.parts.items():
        start = place + len(SEPARATOR) + len(encode_key(name))
        place = start + part.size_bytes
        if part.count is not None:
            places[name] = (start + 2, place - 2) if part.count else (start, start)
    return places


def _checked_header(content: bytes, end: int) -> tuple[bytes, _Parts]:
    """Return the JSON of the header and its facts about the rest of the file. The header's line ends at `end`.

    Raise one of `NONSENSE` if it is no header.
    """
    shape = _SHAPE.match(content)
    line = content[: end - 1].removesuffix(b",")
    if shape is None or _checksum(memoryview(line)[shape.end() :]).encode() != shape[1]:
        raise ValueError("header")
    if not line.isascii():
        # The UTF-8 is checked here, because msgspec does not look into the keys that it passes over.
        line.decode()
    line = line[len(b'{"_persist":') :]
    try:
        return line, _parts_in(line)
    except msgspec.DecodeError:
        # A lone surrogate, which msgspec does not read.
        return line, msgspec.convert(json_codec.decode(line), _Parts)


def _checked(text: memoryview, part: _Part) -> memoryview:
    if len(text) != part.size_bytes or _checksum(text) != part.checksum:
        raise ValueError("checksum")
    return text


def _checked_fields(text: memoryview, part: _Part) -> dict[str, bytes]:
    return fields_of(b"".join([b"{", _checked(text, part), b"}"]))


def fields_of(text: bytes) -> dict[str, bytes]:
    """Return the members of a JSON object, each as its JSON. Raise one of `NONSENSE` if the text is no object."""
    # All fields are decoded now, so that no later caller meets a field that cannot be decoded.
    decoded = json_codec.decode(text)
    try:
        values = {name: bytes(value) for name, value in _members_of(text).items()}
    except (msgspec.DecodeError, RecursionError):
        # A lone surrogate, which msgspec does not read.
        values = {name: json_codec.encode(value) for name, value in decoded.items()}
    if HEADER in values:
        raise ValueError(HEADER)
    return values


def header_of(values: Any, file_id: str | None) -> Header:
    """Return the header from its values. Raise one of `NONSENSE` if they make none, or another session's."""
    return _sound(msgspec.convert(values, Header), file_id)


def _header_of_line(line: bytes, file_id: str | None) -> Header:
    try:
        return _sound(_header_in(line), file_id)
    except msgspec.DecodeError:
        return header_of(json_codec.decode(line), file_id)


def _sound(found: Header, file_id: str | None) -> Header:
    if file_id is not None and found.session_id != file_id:
        raise ValueError("id")
    if found.created_at.utcoffset() == found.updated_at.utcoffset() == timedelta(0):
        return found
    # Somebody has sealed times that are not in UTC. Times without an offset are local.
    return found.but(created_at=found.created_at.astimezone(UTC), updated_at=found.updated_at.astimezone(UTC))


class _Reader(msgspec.Struct, frozen=True):
    """A reader of one file's content. It carries the facts that its errors name."""

    path: disk.StrPath
    session_id: str
    file_id: str | None

    def document(self, content: bytes, version: disk.Version) -> Document:
        """Return the document that a file's content makes, if its checksums match."""
        if _SHAPE.match(content) is None:
            return self._foreign(content, version)
        end = content.find(b"\n") + 1
        try:
            line, parts = _checked_header(content, end)
            found = _checked_content(content, end, parts)
        except NONSENSE:
            raise self._mismatch(content) from None
        try:
            return Document(_header_of_line(line, self.file_id), found, version)
        except NONSENSE:
            raise self._corrupt("its header makes no sense, or is another session's.") from None

    def _foreign(self, content: bytes, version: disk.Version) -> Document:
        """Return a document of another program. It has revision 0 until its first commit here."""
        other = _FORMAT.match(content)
        if other is not None:
            self._require_format(int(other[1]))
        data = self.strict(content)
        values = data.get(HEADER)
        if type(values) is dict and type(values.get("format")) is int:
            # An editor has formatted it anew.
            self._require_format(values["format"])
        first = next(iter(data.values()), None)
        # One flipped bit in the name "_persist" must not turn a document of ours into another program's.
        if HEADER in data or (type(first) is dict and {"checksum", "incarnation", "parts"} <= first.keys()):
            raise self._edited(values)
        try:
            written_at = datetime.fromtimestamp(disk.modified_at(self.path), UTC)
        except (ValueError, OverflowError):
            written_at = datetime.now(UTC)  # a time that no calendar has: anybody can set a file's time
        checksum = _checksum(content)
        header = Header(checksum, 0, checksum, 0, written_at, written_at, None, None, None, self.file_id)
        return Document(header, encoded(data), version)

    def _require_format(self, found: int) -> None:
        if found != FORMAT:
            raise UnsupportedFormat(session_id=self.session_id, path=self.path, found=found, known=FORMAT)

    def strict(self, content: bytes) -> dict[str, Any]:
        """Decode a document that no checksum confirms."""
        if len(content) > json_codec.MAX_BYTES:
            raise self._corrupt(f"it is larger than {json_codec.MAX_BYTES:,} bytes.", json_codec.MAX_BYTES)
        try:
            data = json_codec.decode_strict(content)
        except json_codec.StrictError as error:
            raise self._corrupt(error.reason, error.offset) from None
        if type(data) is not dict:
            remedy = "If it is no session, move it out of the directory."
            raise self._corrupt("it is JSON, but not an object.", 0, remedy)
        return data

    def _mismatch(self, content: bytes) -> CorruptSession:
        try:
            values = self.strict(content).get(HEADER)
        except CorruptSession as worse:
            return worse
        return self._edited(values)

    def _edited(self, values: Any) -> CorruptSession:
        accept, compact = (
            layout.command(verb, os.path.dirname(self.path), self.session_id) for verb in ("accept", "compact")
        )
        remedy = f"If the edit was intended, check it, and take it with {accept}."
        if type(values) is dict and values.get("journal") is not None:
            remedy += (
                f" There are later commits in its journal: to edit all there is, undo the edit, fold them with "
                f"{compact}, and edit then."
            )
        return self._corrupt("its checksum does not match: it was edited by hand or damaged.", remedy=remedy)

    def _corrupt(self, reason: str, offset: int | None = None, remedy: str = "") -> CorruptSession:
        return CorruptSession(session_id=self.session_id, path=self.path, reason=reason, offset=offset, remedy=remedy)


def _checked_content(content: bytes, place: int, parts: _Parts) -> Content:
    """Return the content behind the header, checked byte by byte.

    Raise one of `NONSENSE` if it is not as the header says.
    """
    text = memoryview(content)
    pieces: list[tuple[str | None, bytes, _Part]] = []
    if parts.fields != _NO_FIELDS:
        pieces.append((None, b"", parts.fields))
    pieces += [(name, encode_key(name), part) for name, part in parts.parts.items()]
    fields: dict[str, bytes] = {}
    apart: dict[str, Value] = {}
    # Between two pieces stands ",\n". The first piece follows on the comma and the newline of line 1.
    place -= 2 if pieces else 1
    if not pieces and content[place - 1 : place] == b",":
        raise ValueError("separator")
    for name, key, part in pieces:
        start = place + 2 + len(key)
        if content[place:start] != b",\n" + key:
            raise ValueError("separator")
        place = start + part.size_bytes
        if name is None:
            fields = _checked_fields(text[start:place], part)
        else:
            apart[name] = _value(_checked(text[start:place], part), part.count)
    if content[place:] != b"\n}\n" or HEADER in apart or not fields.keys().isdisjoint(apart):
        raise ValueError("end")
    return Content(fields, apart)


def _value(text: memoryview, count: int | None) -> Value:
    ends = bytes(text[:2]), bytes(text[-2:])
    if count is None and ends[0][:1] != b"[":
        return bytes(text)
    is_list = ends == (b"[\n", b"\n]") if count else ends[0] == b"[]" and len(text) == 2
    # `to_bytes` never writes a list without a count. Each item takes a byte at least.
    if count is None or not is_list or count > len(text):
        raise ValueError("count")
    return Items.in_document(text, count)


def read_edited(path: disk.StrPath, session_id: str, file_id: str | None = None) -> Document:
    """Read a document whose checksums do not match, as `persist accept` takes it.

    It must be strict JSON. Its header is kept if it still makes sense. Otherwise the session begins anew.
    """
    content, version = disk.read_version(path, READ_LIMIT)
    # A text editor may have put a byte order mark there. UTF-8 does not need it.
    data = _Reader(path, session_id, file_id).strict(content.removeprefix(json_codec.BYTE_ORDER_MARK))
    values = data.pop(HEADER, None)
    found = encoded(data)
    try:
        return Document(header_of(values, file_id), found, version)
    except NONSENSE:
        now = datetime.now(UTC)
        return Document(Header(_checksum(content), 0, "", 0, now, now, None, None, None, file_id), found, version)
