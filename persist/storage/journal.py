"""The journal of a session: the commits since its document was written, one a line. So a commit costs what it changes.

    {"persist_journal":3,"name":"0f0e…"}                                                    <- the opening
    {"crc":"5d9b7e01","after":"c1f3a2b4","revision":8,"updated_at":"…","synced":40,         <- a record (one line)
     "counts":{"messages":3},"changes":[{"in":"messages","at":2,"insert":[{"id":"m3",…}]}],"commit":"…"}
    {"crc":"77aa0123","after":"5d9b7e01","revision":9,"updated_at":"…","synced":310,        <- one that changes fields
     "counts":{"messages":3},"head":{"epoch":1,"owner":null,"fields":{"title":"Locks"}},"commit":"…"}

The file `s-42.<name>.journal` belongs to the one document whose header holds that name. The name is random hex. Each
commit adds one record, under the session's lock, and no record is ever changed. Behind the last record there may be
room for more. Room is zeros, which no record holds. To write over zeros costs the disk less than to make the file
longer.

    crc       CRC-32 of the line behind it (without the newline), seeded with that of the opening
    after     the crc of the record before, or of the opening: none can be missing
    revision  one more than before
    synced    up to which byte the writer knew the file to be durable when it wrote this
    counts    what stands apart: the number of a list's items, null for any other value
    head_at   where the last record with a head begins, 0 for the document. So a head takes two reads
    head      the fields and the stream's part of the header, whole
    changes   see `diff.Change`
    commit    the commit's id. It is the last key, so the bytes before a known end tell whether that record stands there

The bytes behind the last good record are a torn tail if a crash can have left them. Such bytes are a line without its
newline, or a line with whole sectors of zeros. Also, no good record behind them says that this place was durable. A
torn tail was never acknowledged, so the next writer folds it away. Any other bytes are damage. Damage raises an error,
and nothing is written. A line with a good crc that this version does not know comes from a newer version. It raises
`UnsupportedFormat`.

A single `?` behind the last record is a torn tail, too. A writer puts it there before it takes the journal out of use,
and after an fdatasync that failed. So a process with an old replica never appends to that journal.

A reader takes no lock, so it may see a record while it is written. It looks again before it reports damage.
"""

from __future__ import annotations

import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from persist import json_codec
from persist.errors import CorruptSession, UnsupportedFormat
from persist.storage import diff, disk, document, layout
from persist.storage.content import Content, Items, Value, items_of
from persist.storage.document import NONSENSE, Head, Header

VERSION = 3
_OPENING = b'{"persist_journal":%d,"name":"%b"}\n'
_VERSION = re.compile(rb'\{"persist_journal":(\d{1,9}),')
_PREFIX = b'{"crc":"%08x",'
_CHECKED_FROM = len(_PREFIX % 0)
_LINE = re.compile(rb'\{"crc":"([0-9a-f]{8})",')
_SYNCED = re.compile(rb'"synced":(\d{1,18})')
#: The possible bytes behind a record: another record, a lost sector, or nothing.
_BEGINNING = re.compile(rb"\{|\0+|\Z")
_SECTOR_BYTES = 512
_FIRST_READ_BYTES = 4096
#: A journal that has so many bytes gets room for as many more at a time.
ROOM_BYTES = 16 * 1024
_ENDING_BYTES = ROOM_BYTES + _FIRST_READ_BYTES
READ_LIMIT = 16 * document.READ_LIMIT
MARK = b"?"


class Overtaken(Exception):
    """The journal with this path is not there, because a fold came between the reads of the document and its journal.

    It is also raised if a commit came between two reads of the journal.
    """


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole head: the fields, and the stream's part of the header."""

    epoch: document.Natural
    owner: Mapping[str, Any] | None
    fields: msgspec.Raw


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One commit. See the grammar above. The `crc` is computed when the record is encoded."""

    crc: str
    after: str
    revision: int
    updated_at: str
    synced: int
    counts: dict[str, int | None]
    head_at: int = 0
    head: Image | None = None
    changes: tuple[diff.Change, ...] = ()
    commit: str = ""


_decoder = msgspec.json.Decoder(Record)


def opening(name: str) -> bytes:
    """Return the first line of a journal."""
    return _OPENING % (VERSION, name.encode())


def encode(record: Record, seed: int) -> bytes:
    """Return the line of a record, with the crc that is computed here."""
    try:
        rest = msgspec.json.encode(record)[_CHECKED_FROM:]
    except UnicodeEncodeError:
        # The name of a value that stands apart holds a lone surrogate, which msgspec does not write.
        values = msgspec.to_builtins(record, enc_hook=lambda raw: json_codec.decode(bytes(raw)))
        rest = json_codec.encode(values)[_CHECKED_FROM:]
    return _PREFIX % zlib.crc32(rest, seed) + rest + b"\n"


def _is_whole(line: bytes, seed: int) -> bool:
    return line[:_CHECKED_FROM] == _PREFIX % zlib.crc32(line[_CHECKED_FROM:], seed)


def _decoded(line: bytes) -> Record:
    """Return the record of a line whose crc is right.

    Raise one of `NONSENSE` for a record that this version does not know.
    """
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        # A lone surrogate, which msgspec does not read.
        values = json_codec.decode(line)
        for part in (values.get("head") or {}, *values.get("changes", ())):
            for key in {"fields", "value"} & part.keys():
                part[key] = _raw(part[key])
            if "insert" in part:
                part["insert"] = list(map(_raw, part["insert"]))
        return msgspec.convert(values, Record)


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json_codec.encode(value))


def image_of(header: Header, content: Content) -> Image:
    """Return the head for the record of a commit that changed the head."""
    members = [json_codec.encode_key(name) + value for name, value in content.fields.items()]
    return Image(header.epoch, header.owner, msgspec.Raw(b"{%b}" % b",".join(members)))


def header_after(header: Header, record: Record) -> Header:
    """Return the header after a record. Raise one of `NONSENSE` if the record makes no sense."""
    updated_at = datetime.fromisoformat(record.updated_at).astimezone(UTC)
    image = {} if record.head is None else {"epoch": record.head.epoch, "owner": record.head.owner}
    return header.but(revision=record.revision, updated_at=updated_at, commit=record.commit, **image)


def content_after(content: Content, records: list[Record]) -> Content:
    """Return the content after some records. Raise one of `NONSENSE` if one does not fit.

    Appends are collected and made as one, because most records only append.
    """
    fields, apart = content.fields, dict(content.apart)
    grown: dict[str, list[bytes]] = {}
    ends: dict[str, int] = {}
    for record in records:
        for change in record.changes:
            if change.insert and not change.remove and change.at == ends.get(change.name):
                grown[change.name] += map(bytes, change.insert)
                ends[change.name] += len(change.insert)
                continue
            _append(apart, change.name, grown.pop(change.name, []))
            diff.apply(apart, change)
            ends.pop(change.name, None)
            if isinstance(items := apart.get(change.name), Items):
                grown[change.name], ends[change.name] = [], len(items)
    for name, more in grown.items():
        _append(apart, name, more)
    images = [record.head for record in records if record.head is not None]
    if images:
        fields = document.fields_of(bytes(images[-1].fields))
    return Content(fields, apart)


def _append(apart: dict[str, Value], name: str, more: list[bytes]) -> None:
    items = apart.get(name)
    if more and isinstance(items, Items):
        apart[name] = items.spliced(len(items), 0, more)


# --- the end of a journal --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tail:
    """The end of a journal, with all facts that an append of a record needs.

    Attributes:
        name: the hex in the journal's name.
        seed: the CRC of the opening.
        after: the CRC of the last record, in hex, or that of the opening.
        commit: the last record's commit id, "" for the opening.
        end: where the last record ends.
        head_at: where the last record with a head begins, 0 for none.
        synced: up to which byte the journal is known to be durable.
        unsynced: the bytes from there to the end. The next write writes them again.
        room_end: up to which byte this process knows that the file has room.
        is_torn: whether a torn tail or a mark stands behind the end.
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

    def is_end_of(self, fd: int) -> bool | None:
        """Tell whether nothing stands behind this end of a journal. Return None if the last known record is not there.

        One read gets the record's last bytes, and one byte behind them. A zero is room, because no writer leaves a gap.
        """
        fingerprint = b'"commit":"%b"}\n' % self.commit.encode() if self.commit else opening(self.name)
        found = disk.read_at(fd, len(fingerprint) + 1, self.end - len(fingerprint))
        if found[: len(fingerprint)] != fingerprint:
            return None
        return found[len(fingerprint) :] in (b"", b"\0")


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal of one session, as a file to be read. It carries the facts that its errors name."""

    path: disk.StrPath
    session_id: str
    name: str

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Open the journal for a block of reads. Raise `Overtaken` if it is not there."""
        fd = self.open()
        try:
            yield fd
        finally:
            disk.close(fd)

    def open(self, flags: int = os.O_RDONLY) -> int:
        """Open the journal. Raise `Overtaken` if it is not there."""
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

    def read_new_records(self, fd: int, header: Header, tail: Tail) -> Iterator[Record]:
        """Yield the records behind a tail, and move the tail along.

        Raises:
            CorruptSession: the journal is damaged there.
            UnsupportedFormat: a newer version has written there.
        """
        before, revision = None, header.revision
        while True:
            start = tail.end
            content = _without_room(_read_from(fd, start))
            lines = list(_lines(content, tail.seed))
            for line, record in zip(lines, self._all_decoded(lines, start), strict=True):
                revision += 1
                if (
                    record.after != tail.after
                    or record.revision != revision
                    or record.synced > tail.end
                    or (record.head is None and record.head_at != tail.head_at)
                ):
                    raise self.damaged(tail.end, "a record in it does not follow the previous record")
                tail.synced = max(tail.synced, record.synced)
                if record.head is not None:
                    tail.head_at = tail.end
                tail.after, tail.commit = record.crc, record.commit
                tail.end += len(line) + 1
                yield record
            rest = content[tail.end - start :]
            tail.is_torn = bool(rest)
            if not rest or _is_torn(rest, tail.end, tail.seed):
                tail.unsynced = disk.read_at(fd, tail.end - tail.synced, tail.synced)
                return
            if rest == before:
                raise self.damaged(tail.end, "a record in it was altered")
            before = rest

    def _all_decoded(self, lines: list[bytes], offset: int) -> Iterator[Record]:
        try:
            yield from _decoder.decode_lines(b"\n".join(lines))
        except NONSENSE:
            for line in lines:
                yield self._decoded(line, offset)
                offset += len(line) + 1

    def _decoded(self, line: bytes, offset: int) -> Record:
        try:
            return _decoded(line)
        except NONSENSE:
            # The crc is right, so some version wrote this record. An old worker must not fold it away.
            raise self._unsupported(f"unknown (its record at byte {offset})") from None

    def _unsupported(self, found: object) -> UnsupportedFormat:
        return UnsupportedFormat(session_id=self.session_id, path=self.path, found=found, known=VERSION)

    def damaged(self, offset: int, reason: str) -> CorruptSession:
        """Return the error for a journal that no crash can have left in this state."""
        accept = layout.command("accept", os.path.dirname(self.path), self.session_id)
        facts = {"reason": f"{reason}.", "remedy": f"Take the last good state with {accept}, or restore a backup."}
        return CorruptSession(session_id=self.session_id, path=self.path, offset=offset, **facts)

    def replay(self, fd: int, header: Header, content: Content) -> tuple[Header, Content, Tail]:
        """Return the session after all records of an open journal."""
        tail = self.check_opening(fd)
        return *self.catch_up(fd, header, content, tail), tail

    def catch_up(self, fd: int, header: Header, content: Content, tail: Tail) -> tuple[Header, Content]:
        """Apply the records behind a tail, and move the tail along."""
        records = list(self.read_new_records(fd, header, tail))
        if not records:
            return header, content
        images = [record for record in records if record.head is not None]
        try:
            for record in (*images[-1:], records[-1]):
                header = header_after(header, record)
            content = content_after(content, records)
            if records[-1].counts != content.counts or not content.fields.keys().isdisjoint(content.apart):
                raise diff.DoesNotFit("counts")
        except NONSENSE:
            raise self.damaged(tail.end, "a record in it changes a value or an item that does not exist") from None
        return header, content

    # --- the head, without reading all records ---

    def read_head(self, fd: int, head: Head) -> tuple[Head, Tail]:
        """Return the head after all records, and the tail. Read only the last record and the one that holds the fields.

        The tail holds only the facts that `Tail.is_end_of` needs.
        """
        tail = self.check_opening(fd)
        line, place = self._last_line(fd, tail)
        if line is None:
            return head, tail
        record = image = self._decoded(line, place)
        tail.end, tail.commit = place + len(line) + 1, record.commit
        if record.synced > place:
            raise self.damaged(place, "a record in it does not follow the previous record")
        if record.head is None and record.head_at:
            there = _line_at(fd, record.head_at, tail.seed) if 0 < record.head_at < place else None
            image = record if there is None else self._decoded(there, record.head_at)
            if image.head is None:
                raise self.damaged(record.head_at, "there is no record with the fields at this byte")
        try:
            header, fields = head.header, head.fields
            if image.head is not None:
                header, fields = header_after(header, image), document.fields_of(bytes(image.head.fields))
            if not fields.keys().isdisjoint(record.counts):
                raise diff.DoesNotFit("fields")
            return Head(header_after(header, record), fields, record.counts), tail
        except NONSENSE:
            raise self.damaged(place, "its last record makes no sense") from None

    def last_items(self, fd: int, base: document.Ending, name: str, limit: int) -> list[bytes]:
        """Return the last items of a list that stands apart after all records. Read no more than that takes.

        `base` is the document before the records. Raise `Overtaken` if the list does not stand apart now.
        """
        tail, window = self.check_opening(fd), _ENDING_BYTES
        line, place = self._last_line(fd, tail)
        end = tail.end if line is None else place + len(line) + 1
        while True:
            start = max(tail.end, end - window)
            content = disk.read_at(fd, end - start, start)
            # The first line is cut off, unless the read begins at the first record.
            lines = content.split(b"\n")[start > tail.end : -1]
            if not all(_is_whole(line, tail.seed) for line in lines):
                raise self.damaged(start, "a record in it was altered")
            records, is_all = list(self._all_decoded(lines, start)), start == tail.end
            before = [tail.after] if is_all else [record.after for record in records[:1]]
            if [record.after for record in records] != [*before, *(record.crc for record in records)][:-1]:
                raise self.damaged(start, "a record in it does not follow the previous record")
            if records and records[-1].counts.get(name) is None:
                raise Overtaken(self.path)
            try:
                found = _last_of(records, base if is_all else None, name, limit)
            except NONSENSE:
                raise self.damaged(start, "a record in it changes a value or an item that does not exist") from None
            if found is not None:
                return found
            window *= 4

    def _last_line(self, fd: int, tail: Tail) -> tuple[bytes | None, int]:
        """Return the line of the last committed record, or None, and where it begins.

        The last whole record says up to which record the journal is durable. All records from that one on are checked,
        because a crash may have lost the records behind it.
        """
        window, before = _ENDING_BYTES, None
        while True:
            size = disk.size_of(fd)
            start = max(tail.end, size - window)
            content = _without_room(disk.read_at(fd, size - start, start))
            begin = _durable_line(content, start, tail.seed)
            if begin == 0 and start > tail.end:
                window *= 4
                continue
            line, place, end = None, start, start + begin
            for line in _lines(content[begin:], tail.seed):
                place, end = end, end + len(line) + 1
            rest = content[end - start :]
            if not rest or _is_torn(rest, end, tail.seed):
                return line, place
            if content == before:
                raise self.damaged(end, "a record in it was altered")
            before = content


def _last_of(records: list[Record], base: document.Ending | None, name: str, limit: int) -> list[bytes] | None:
    """Return the last items of a list after some records, or None if that takes data from before the records.

    Args:
        base: the document, if the records are all that follow it.
    """
    if not records and base is None:
        # One record is longer than the bytes that were read.
        return None
    changes = [change for record in records for change in record.changes if change.name == name]
    counts = records[-1].counts if records else base.head.counts if base else {}
    # `known` holds the last items. Before them stand `kept` of the old items.
    kept = before = (counts.get(name) or 0) - sum(len(change.insert) - change.remove for change in changes)
    known: list[bytes] = []
    wholes = [place for place, change in enumerate(changes) if not change.is_splice]
    for place in wholes[-1:]:
        value = changes[place].value
        items = None if isinstance(value, msgspec.UnsetType) else items_of(bytes(value))
        kept, known = 0, items.split() if isinstance(items, Items) else []
        changes = changes[place + 1 :]
    if kept < 0 or not (wholes or base is None or before == base.head.counts.get(name)):
        raise diff.DoesNotFit(name)

    def know_from(place: int) -> bool:
        nonlocal kept
        if place < kept and base is not None:
            known[:0] = base.last(name, before - place)[: kept - place]
            kept = place
        return place >= kept

    for change in changes:
        if not know_from(change.at):
            return None
        if change.at - kept + change.remove > len(known):
            raise diff.DoesNotFit(name)
        known[change.at - kept : change.at - kept + change.remove] = map(bytes, change.insert)
    if kept + len(known) != (counts.get(name) or 0):
        raise diff.DoesNotFit(name)
    return known[max(0, len(known) - limit) :] if know_from(max(0, kept + len(known) - limit)) else None


def _durable_line(content: bytes, start: int, seed: int) -> int:
    """Return where the last line begins in `content` that the last whole record of `content` knows to be durable.

    Return 0 if that place is before `content`, which stands at `start`, or if no record names it.
    """
    stop = content.rfind(b"\n")
    while (begin := content.rfind(b"\n", 0, max(0, stop)) + 1) > 0:
        if _is_whole(content[begin:stop], seed):
            durable = min(_synced_of(content[begin:stop]) - start, begin)
            return content.rfind(b"\n", 0, max(0, durable - 1)) + 1
        stop = begin - 1
    return 0


def _lines(content: bytes, seed: int) -> Iterator[bytes]:
    """Yield the whole lines at the beginning of `content`, without their newlines, as long as their crc is right."""
    return itertools.takewhile(lambda line: _is_whole(line, seed), content.split(b"\n")[:-1])


def _line_at(fd: int, position: int, seed: int) -> bytes | None:
    """Return the whole record that begins at a position, or None."""
    limit = _FIRST_READ_BYTES
    while b"\n" not in (content := disk.read_at(fd, limit, position)) and len(content) == limit:
        limit *= 4
    line, newline, _ = content.partition(b"\n")
    return line if newline and _is_whole(line, seed) else None


def is_empty(path: disk.StrPath) -> bool:
    """Tell whether a journal has no record. A fold that was cut off leaves such a journal."""
    content, (_, size, *_) = disk.read_version(path, ROOM_BYTES + _FIRST_READ_BYTES)
    return size <= len(content) and b"\n" not in _without_room(content)[:-1]


def end_of(path: disk.StrPath) -> int:
    """Return where the content of a journal ends, even if it is damaged."""
    return len(_without_room(disk.read(path, READ_LIMIT)))


def read_good_records(log: Journal, fd: int, header: Header) -> tuple[list[Record], Tail, int]:
    """Return the records up to the first damage, the tail behind them, and how many records may follow it."""
    tail, records = log.check_opening(fd), list[Record]()
    try:
        records.extend(log.read_new_records(fd, header, tail))
    except CorruptSession:
        # The mark of an accept that failed is no record.
        behind = _without_room(_read_from(fd, tail.end)).removesuffix(MARK)
        return records, tail, behind.rstrip(b"\n").count(b"\n") + 1
    return records, tail, 0


def only_appends(content: Content, records: list[Record]) -> bool:
    """Tell whether the records only add items at the ends of a content's lists."""
    counts = content.counts
    for record in records:
        if record.head is not None:
            return False
        for change in record.changes:
            if not change.is_splice or change.remove or change.at != counts.get(change.name):
                return False
            counts[change.name] = change.at + len(change.insert)
    return True


# --- bytes -----------------------------------------------------------------------------------------------------------


def _without_room(content: bytes) -> bytes:
    """Return the bytes before the zeros at the end. The code counts first, because `rstrip` looks at each byte."""
    end = content.rfind(b"\n") + 1
    return content[:end] if content.count(b"\0", end) == len(content) - end else content.rstrip(b"\0")


def _read_from(fd: int, position: int) -> bytes:
    return disk.read_at(fd, max(0, disk.size_of(fd) - position), position)


def _is_torn(rest: bytes, position: int, seed: int) -> bool:
    """Tell whether a crash can have left these bytes behind the last good record."""
    line, newline, behind = rest.partition(b"\n")
    if b"\0" not in line if newline else _is_whole_but_for_its_newline(line, seed):
        return False
    # No record holds zeros. So after a crash, zeros fill all of a sector that was appended, or nothing of it.
    start = -position % _SECTOR_BYTES
    sectors = [rest[:start], *(rest[at : at + _SECTOR_BYTES] for at in range(start, len(rest), _SECTOR_BYTES))]
    if any(b"\0" in sector and sector.strip(b"\0") for sector in sectors):
        return False
    return not any(_synced_of(each) > position for each in behind.split(b"\n")[:-1] if _is_whole(each, seed))


def _synced_of(line: bytes) -> int:
    found = _SYNCED.search(line)
    return int(found[1]) if found else 0


def _is_whole_but_for_its_newline(line: bytes, seed: int) -> bool:
    """Tell whether a line begins with a record whose newline was altered."""
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
