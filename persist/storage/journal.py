"""The journal of a session: the commits since its document was written, one a line. So a commit costs what it changes.

    {"persist_journal":3,"name":"0f0e…"}                                                    <- the opening
    {"crc":"5d9b7e01","after":"c1f3a2b4","revision":8,"updated_at":"…","synced":40,         <- a record (one line)
     "counts":{"messages":3},"changes":[{"in":"messages","at":2,"insert":[{"id":"m3",…}]}],"commit":"…"}
    {"crc":"77aa0123","after":"5d9b7e01","revision":9,"updated_at":"…","synced":310,        <- one that changes fields
     "counts":{"messages":3},"head":{"epoch":1,"owner":null,"fields":{"title":"Locks"}},"commit":"…"}

The file `s-42.<name>.journal` belongs to the one document whose header holds that name, which is random hex. Records
are only ever added, under the session's lock: one a commit. Behind the last one there may be room for more. That is
zeros, which no record holds, and which cost the disk less to write over than to add to.

    crc       CRC-32 of the line behind it (without the newline), seeded with that of the opening
    after     the crc of the record before, or of the opening: none can be missing
    revision  one more than before
    synced    up to which byte the writer knew the file to be durable when it wrote this
    head_at   where the last record with a head begins, 0 for the document. So a head takes two reads
    head      the fields and the stream's part of the header, whole
    changes   see `diff.Change`
    commit    the commit's id. It is the last key, so the bytes before a known end tell whether that record stands there

What does not check out at the end of the file is a torn tail if a crash can have left it: a line without its newline,
or one with whole sectors of zeros, while no good record behind it says that this place was durable. It was never
acknowledged, so the next writer folds it away. Anything else is damage. Damage is told, and nothing is written. A
line with a good crc that this version does not know is of a newer version: `UnsupportedFormat`.

A single `?` behind the last record is a torn tail, too. A writer puts it there before it takes the journal out of use,
and after an fdatasync that failed, so that a process with an old replica never appends to it.

A reader takes no lock, so it may see a record while it is written. It looks again before it tells of damage.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from persist import json_codec
from persist.errors import CorruptSession, UnsupportedFormat
from persist.storage import diff, disk, document, layout
from persist.storage.content import Content, Items, Value
from persist.storage.diff import Change, DoesNotFit
from persist.storage.document import NONSENSE, Head, Header

VERSION = 3
_OPENING = b'{"persist_journal":%d,"name":"%b"}\n'
_VERSION = re.compile(rb'\{"persist_journal":(\d{1,9}),')
_PREFIX = b'{"crc":"%08x",'
_CHECKED_FROM = len(_PREFIX % 0)
_LINE = re.compile(rb'\{"crc":"([0-9a-f]{8})",')
#: What may stand behind a record: another one, a lost sector, or nothing.
_BEGINNING = re.compile(rb"\{|\0+|\Z")
_SECTOR_BYTES = 512
_FIRST_READ_BYTES = 4096
#: So many bytes before a known end hold the last record's commit id.
FINGERPRINT_BYTES = 64
#: A journal of so many bytes gets room for as many more at a time.
ROOM_BYTES = 16 * 1024
READ_LIMIT = 16 * document.READ_LIMIT
MARK = b"?"


class Overtaken(Exception):
    """The journal is not there: a fold came between the reads of the document and of its journal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole head: the fields, and the stream's part of the header.

    As JSON, because only `json_codec` reads all of it.
    """

    epoch: int
    owner: msgspec.Raw
    fields: msgspec.Raw


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One commit. See the grammar. Its `crc` is computed when it is encoded."""

    crc: str
    after: str
    revision: int
    updated_at: str
    synced: int
    counts: dict[str, int]
    head_at: int = 0
    head: Image | None = None
    changes: tuple[Change, ...] = ()
    commit: str = msgspec.field(default="", name="commit")


_decode_record = msgspec.json.Decoder(Record).decode


def opening(name: str) -> bytes:
    """Return the first line of a journal."""
    return _OPENING % (VERSION, name.encode())


def encode(record: Record, seed: int) -> bytes:
    """Return the line of a record, whose crc is computed here."""
    try:
        rest = msgspec.json.encode(record)[_CHECKED_FROM:]
    except UnicodeEncodeError:
        # The name of a value that stands apart holds a lone surrogate, which msgspec does not write.
        rest = json_codec.encode(_plain(record))[_CHECKED_FROM:]
    return _PREFIX % zlib.crc32(rest, seed) + rest + b"\n"


def _plain(value: Any) -> Any:
    """Return a part of a record as JSON values, without what has its default. The inverse of `_decoded`."""
    if isinstance(value, msgspec.Struct):
        fields = [field for field in msgspec.structs.fields(value) if getattr(value, field.name) != field.default]
        return {field.encode_name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return json_codec.decode(bytes(value)) if isinstance(value, msgspec.Raw) else value


def _is_whole(line: bytes | memoryview, seed: int) -> bool:
    shape = _LINE.match(line)
    return shape is not None and zlib.crc32(memoryview(line)[_CHECKED_FROM:], seed) == int(shape[1], 16)


def _decoded(line: bytes) -> Record:
    """Return the record of a line whose crc is right.

    Raise one of `NONSENSE` for one that this version does not know.
    """
    try:
        return _decode_record(line)
    except msgspec.DecodeError:
        # A lone surrogate, which msgspec does not read.
        values = json_codec.decode(line)
        changes = tuple(map(_change_of, values.pop("changes", ())))
        head = values.pop("head", None)
        if head is not None:
            raw = {key: msgspec.Raw(json_codec.encode(head.pop(key))) for key in ("owner", "fields")}
            head = msgspec.convert(head | raw, Image)
        return msgspec.structs.replace(msgspec.convert(values, Record), changes=changes, head=head)


def _change_of(values: dict[str, Any]) -> Change:
    kept = {key: value for key, value in values.items() if key not in ("insert", "value")}
    raw: dict[str, Any] = {"value": msgspec.Raw(json_codec.encode(values["value"]))} if "value" in values else {}
    insert = tuple(msgspec.Raw(json_codec.encode(item)) for item in values.get("insert", ()))
    return msgspec.structs.replace(msgspec.convert(kept, Change), insert=insert, **raw)


def image_of(header: Header, content: Content) -> Image:
    """Return the head that a record holds when a commit changed it."""
    members = [json_codec.encode(name, (name,)) + b":" + value for name, value in content.fields.items()]
    return Image(header.epoch, msgspec.Raw(json_codec.encode(header.owner)), msgspec.Raw(b"{%b}" % b",".join(members)))


def header_after(header: Header, record: Record) -> Header:
    """Return the header after a record. Raise one of `NONSENSE` if the record makes no sense."""
    changes: dict[str, Any] = {
        "revision": record.revision,
        "updated_at": document.time_of(record.updated_at),
        "commit": record.commit,
    }
    if record.head is not None:
        owner = json_codec.decode(bytes(record.head.owner))
        if owner is not None and type(owner) is not dict:
            raise ValueError("owner")
        changes |= {"epoch": document.natural(record.head.epoch), "owner": owner}
    return header.but(**changes)


def content_after(content: Content, records: list[Record]) -> Content:
    """Return the content after some records. Raise one of `NONSENSE` if one does not fit.

    Appends are collected, and made as one: most records do nothing else.
    """
    fields, apart = content.fields, dict(content.apart)
    grown: dict[str, list[bytes]] = {}
    for record in records:
        if record.head is not None:
            fields = document.fields_of(bytes(record.head.fields))
        for change in record.changes:
            items, more = apart.get(change.name), grown.get(change.name, [])
            is_append = change.is_splice and not change.remove and isinstance(items, Items)
            if is_append and change.at == len(items) + len(more):  # type: ignore[arg-type]
                more.extend(map(bytes, change.insert))
                grown[change.name] = more
                continue
            _append(apart, grown, change.name)
            diff.apply(apart, change)
    for name in list(grown):
        _append(apart, grown, name)
    return Content(fields, apart)


def _append(apart: dict[str, Value], grown: dict[str, list[bytes]], name: str) -> None:
    items, more = apart.get(name), grown.pop(name, None)
    if more and isinstance(items, Items):
        apart[name] = items.spliced(len(items), 0, more)


# --- the end of a journal --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tail:
    """Where a journal ends, and all that it takes to append a record.

    Attributes:
        name: the hex in the journal's name.
        seed: the CRC of the opening.
        after: that of the last record, in hex.
        commit: the last record's commit id, "" for the opening.
        end: where the last record ends.
        head_at: where the last record with a head begins, 0 for none.
        synced: up to which byte the journal is known to be durable.
        unsynced: the bytes from there to the end. The next write writes them again.
        room_end: up to which byte this process knows that the file has room.
        is_torn: whether something stands behind the end that a crash has left, or a mark.
    """

    name: str
    seed: int
    after: str
    end: int
    commit: str = ""
    head_at: int = 0
    synced: int = 0
    unsynced: bytes = b""
    room_end: int = 0
    is_torn: bool = False

    @classmethod
    def of(cls, name: str) -> Tail:
        """Return the end of a journal that has no record yet."""
        line = opening(name)
        seed = zlib.crc32(line)
        return cls(name, seed, f"{seed:08x}", len(line), synced=len(line))

    @property
    def is_empty(self) -> bool:
        """Whether the journal has no record, and nothing behind its opening."""
        return not self.commit and not self.is_torn

    @property
    def fingerprint(self) -> bytes:
        """What stands right before the end."""
        return b'"commit":"%b"}\n' % self.commit.encode() if self.commit else opening(self.name)

    def advance(self, line: bytes, record: Record) -> None:
        """Go on behind a record."""
        if record.head is not None:
            self.head_at = self.end
        self.after, self.commit = line[8:16].decode(), record.commit
        self.end += len(line)


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal of one session, as a file to be read. Carries what its errors name."""

    path: Path
    session_id: str
    name: str

    def open(self, flags: int = os.O_RDONLY) -> int:
        """Open it. Raise `Overtaken` if it is not there."""
        try:
            return disk.open_unseen(self.path, flags)
        except FileNotFoundError:
            raise Overtaken(self.path) from None

    def check_opening(self, fd: int) -> Tail:
        """Return the end of the opening. Raise an error if another file bears the journal's name."""
        expected = opening(self.name)
        try:
            found = disk.read_at(fd, len(expected), 0)
        except OSError:
            disk.require_plain(fd, self.path)
            raise
        if found != expected:
            disk.require_plain(fd, self.path)
            version = _VERSION.match(found)
            if version is not None and int(version[1]) != VERSION:
                raise self._unsupported(int(version[1]))
            raise self.damaged(0, "its first line was altered")
        return Tail.of(self.name)

    def ends_at(self, fd: int, tail: Tail) -> bool | None:
        """Tell whether nothing stands behind a known end. None if the last known record does not stand before it.

        One read: the record's last bytes, and one byte behind them. Zeros are room, because no writer leaves a gap.
        """
        fingerprint = tail.fingerprint
        found = disk.read_at(fd, len(fingerprint) + 1, tail.end - len(fingerprint))
        if found[: len(fingerprint)] != fingerprint:
            return None
        return found[len(fingerprint) :] in (b"", b"\0")

    def read_new_records(self, fd: int, header: Header, tail: Tail) -> Iterator[Record]:
        """Read the records behind a tail, which moves along.

        Raises:
            CorruptSession: the journal is damaged there.
            UnsupportedFormat: a newer version has written there.
        """
        before, revision = None, header.revision
        while True:
            start = tail.end
            content = _without_room(_read_from(fd, start))
            for line in _lines(content, tail.seed):
                record = self._decoded(line, tail.end)
                revision += 1
                if (
                    record.after != tail.after
                    or record.revision != revision
                    or record.synced > tail.end
                    or (record.head is None and record.head_at != tail.head_at)
                ):
                    raise self.damaged(tail.end, "a record in it does not follow the one before")
                tail.synced = max(tail.synced, record.synced)
                tail.advance(line, record)
                yield record
            rest = content[tail.end - start :]
            tail.is_torn = bool(rest)
            if not rest or _is_torn(rest, tail.end, tail.seed):
                tail.unsynced = _read_exactly(fd, tail.synced, tail.end)
                return
            if rest == before:
                raise self.damaged(tail.end, "a record in it was altered")
            before = rest

    def _decoded(self, line: bytes, offset: int) -> Record:
        try:
            return _decoded(line)
        except NONSENSE:
            # The crc is right, so this is what somebody wrote. An old worker must not fold it away.
            raise self._unsupported(f"unknown (its record at byte {offset})") from None

    def _unsupported(self, found: object) -> UnsupportedFormat:
        return UnsupportedFormat(session_id=self.session_id, path=self.path, found=found, known=VERSION)

    def damaged(self, offset: int, reason: str) -> CorruptSession:
        """Return the error of a journal that no crash can have left like that."""
        accept = layout.command("accept", self.path.parent, self.session_id)
        remedy = f"Take the last good state with {accept}, or restore a backup."
        return CorruptSession(
            session_id=self.session_id, path=self.path, reason=f"{reason}.", offset=offset, remedy=remedy
        )

    def replay(self, fd: int, header: Header, content: Content) -> tuple[Header, Content, Tail]:
        """Return the session after all records of an open journal."""
        tail = self.check_opening(fd)
        return *self.catch_up(fd, header, content, tail), tail

    def catch_up(self, fd: int, header: Header, content: Content, tail: Tail) -> tuple[Header, Content]:
        """Apply the records behind a tail, which moves along."""
        records = list(self.read_new_records(fd, header, tail))
        if not records:
            return header, content
        images = [record for record in records if record.head is not None]
        try:
            for record in (*images[-1:], records[-1]):
                header = header_after(header, record)
            content = content_after(content, records)
            if records[-1].counts != content.counts:
                raise DoesNotFit("counts")
        except NONSENSE:
            raise self.damaged(tail.end, "a record in it changes what is not there") from None
        return header, content

    # --- the head, without reading all records ---

    def read_head(self, fd: int, head: Head) -> Head:
        """Return the head after all records, from the last one and the one that holds the fields."""
        tail = self.check_opening(fd)
        line = self._last_line(fd, tail)
        if line is None:
            return head
        record = self._decoded(line, tail.end)
        image = record
        if record.head is None and record.head_at:
            there = _line_at(fd, record.head_at, tail.seed)
            image = record if there is None else self._decoded(there, record.head_at)
            if image.head is None:
                raise self.damaged(record.head_at, "the record with the fields does not stand there")
        try:
            header = header_after(head.header, image) if image.head is not None else head.header
            fields = document.fields_of(bytes(image.head.fields)) if image.head is not None else head.fields
            return Head(header_after(header, record), fields, record.counts)
        except NONSENSE:
            raise self.damaged(tail.end, "its last record makes no sense") from None

    def _last_line(self, fd: int, tail: Tail) -> bytes | None:
        """Return the last committed record, or None. Checks all from where that record says the file was durable."""
        window, before = ROOM_BYTES + _FIRST_READ_BYTES, None
        while True:
            size = disk.size_of(fd)
            start = max(tail.end, size - window)
            content = _without_room(disk.read_at(fd, size - start, start))
            last = _last_whole(content, start, tail)
            if last is not None and last[1] > last[0]:
                raise self.damaged(last[0], "a record in it does not follow the one before")
            # From the record that ends there on: what follows may have been lost, and then that record is the last one.
            begin = None if last is None else _line_before(content, last[1] - start, is_all=start == tail.end)
            if begin is None and start > tail.end:
                window *= 4
                continue
            # All is in `content`. A last record that does not say how far the file was durable is an unknown one.
            begin = begin or 0
            line, end = None, start + begin
            for whole in _lines(content[begin:], tail.seed):
                line, end = whole[:-1], end + len(whole)
            rest = content[end - start :]
            if not rest or _is_torn(rest, end, tail.seed):
                return line
            if content == before:
                raise self.damaged(end, "a record in it was altered")
            before = content


def _last_whole(content: bytes, start: int, tail: Tail) -> tuple[int, int] | None:
    """Return where the last whole record begins, and up to where it says that the journal was durable.

    None if none is in `content`, or if it does not say that.
    """
    stop = content.rfind(b"\n")
    while stop >= 0:
        begin = content.rfind(b"\n", 0, stop) + 1
        line = content[begin:stop]
        if (begin or start == tail.end) and _is_whole(line, tail.seed):
            synced = re.search(rb'"synced":(\d{1,18})', line)
            return (start + begin, max(tail.end, int(synced[1]))) if synced else None
        stop = begin - 1
    return (tail.end, tail.end) if start == tail.end else None


def _line_before(content: bytes, stop: int, *, is_all: bool) -> int | None:
    """Return where the line begins that ends at a place. None if that is before `content`, unless `content` is all."""
    if stop <= 0:
        return 0 if is_all and stop == 0 else None
    begin = content.rfind(b"\n", 0, stop - 1) + 1
    return begin if begin or is_all else None


def _lines(content: bytes, seed: int) -> Iterator[bytes]:
    """Yield the whole lines at the beginning of `content`, each with its newline, as long as their crc is right."""
    start = 0
    while (stop := content.find(b"\n", start)) >= 0:
        line = content[start:stop]
        if not _is_whole(line, seed):
            return
        yield content[start : stop + 1]
        start = stop + 1


def _line_at(fd: int, position: int, seed: int) -> bytes | None:
    """Return the whole record that begins at a position, or None."""
    if not 0 < position < disk.size_of(fd):
        return None
    limit = _FIRST_READ_BYTES
    while True:
        content = disk.read_at(fd, limit, position)
        line, newline, _ = content.partition(b"\n")
        if newline:
            return line if _is_whole(line, seed) else None
        if len(content) < limit:
            return None
        limit *= 4


def is_empty(path: Path) -> bool:
    """Tell whether a journal has no record: a fold that was cut off left it."""
    content, (_, size, *_) = disk.read_version(path, ROOM_BYTES + _FIRST_READ_BYTES)
    return size <= len(content) and b"\n" not in _without_room(content)[:-1]


def end_of(path: Path) -> int:
    """Return where the content of a journal ends, whatever it is."""
    return len(_without_room(disk.read(path, READ_LIMIT)))


def read_good_records(log: Journal, fd: int, header: Header) -> tuple[list[Record], Tail, int]:
    """Return the records up to the first damage, where they end, and how many may stand from there on."""
    tail, records = log.check_opening(fd), list[Record]()
    try:
        records.extend(log.read_new_records(fd, header, tail))
    except CorruptSession:
        # The mark of an accept that failed is no record.
        behind = _without_room(_read_from(fd, tail.end)).removesuffix(MARK)
        return records, tail, behind.rstrip(b"\n").count(b"\n") + 1
    return records, tail, 0


def only_appends(content: Content, records: list[Record]) -> bool:
    """Tell whether all that records do to a content is to add items at the ends of lists."""
    counts = content.counts
    for record in records:
        if record.head is not None:
            return False
        for change in record.changes:
            if not change.is_splice or change.remove or change.at != counts.get(change.name, -1):
                return False
            counts[change.name] += len(change.insert)
    return True


# --- bytes -----------------------------------------------------------------------------------------------------------


def _without_room(content: bytes) -> bytes:
    """Return what stands before the zeros at the end. `rstrip` alone looks at each byte in turn."""
    window = max(0, len(content) - 2 * ROOM_BYTES)
    start = content.find(b"\0", window)
    is_room = start >= 0 and (start > window or window == 0) and content[start:] == bytes(len(content) - start)
    return content[:start] if is_room else content.rstrip(b"\0")


def _read_from(fd: int, position: int) -> bytes:
    # Mostly some records stand there. A large buffer would cost more than they do.
    pieces = [disk.read_at(fd, 4 * ROOM_BYTES, position)]
    while pieces[-1]:
        position += len(pieces[-1])
        pieces.append(disk.read_at(fd, 1024 * 1024, position) if len(pieces[-1]) >= 4 * ROOM_BYTES else b"")
    return b"".join(pieces)


def _read_exactly(fd: int, start: int, end: int) -> bytes:
    return disk.read_at(fd, end - start, start) if end > start else b""


def _is_torn(rest: bytes, position: int, seed: int) -> bool:
    """Tell whether a crash can have left this behind the last good record."""
    line, newline, behind = rest.partition(b"\n")
    if newline and b"\0" not in line:
        return False
    if not newline and _is_whole_but_for_its_newline(line, seed):
        return False
    if not _has_lost_whole_sectors(rest, position):
        return False
    whole = [each for each in behind.split(b"\n")[:-1] if _is_whole(each, seed)]
    return not any(_synced_of(each) > position for each in whole)


def _synced_of(line: bytes) -> int:
    found = re.search(rb'"synced":(\d{1,18})', line)
    return int(found[1]) if found else 0


def _is_whole_but_for_its_newline(line: bytes, seed: int) -> bool:
    """Tell whether it begins with a record whose newline was altered."""
    shape = _LINE.match(line)
    if shape is None:
        return False
    crc, done = seed, _CHECKED_FROM
    for found in _BEGINNING.finditer(line, done + 1):
        end = found.start() - 1
        crc, done = zlib.crc32(line[done:end], crc), end
        if crc == int(shape[1], 16):
            return True
    return False


def _has_lost_whole_sectors(rest: bytes, position: int) -> bool:
    """Tell whether zeros, which no record holds, fill all of a sector that was appended, or nothing of it."""
    start = -position % _SECTOR_BYTES
    sectors = [rest[:start], *(rest[at : at + _SECTOR_BYTES] for at in range(start, len(rest), _SECTOR_BYTES))]
    return all(b"\0" not in sector or not sector.strip(b"\0") for sector in sectors)
