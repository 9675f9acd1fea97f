"""The journal of a large session: the commits since its snapshot, one a line, so that a commit costs what it changes.

    {"persist_journal":1,"generation":3,"snapshot":"0f0e…"}                                <- the opening
    {"crc":"5d9b7e01","after":"c1f3a2b4","revision":8,"updated_at":"…","commit":"…",       <- a record (one line)
     "counts":{"messages":3},"synced":55,"head_at":0,
     "changes":[{"in":"messages","at":2,"insert":[{"id":"m3","role":"user","content":"hi"}]}]}
    {"crc":"77aa0123","after":"5d9b7e01","revision":9,"updated_at":"…","commit":"…",       <- a record that changes the head
     "counts":{"messages":3},"synced":310,"head":{"stream":{"epoch":1,"owner":null},"fields":{"title":"Locks"}}}

The file `s-42.<generation>.journal` belongs to the one snapshot whose header names that generation and whose checksum stands
in its opening. Records are only ever added, under the session's lock: one a commit, one write, one fdatasync. Behind the last
one there may be room for more: zeros, which no record holds, and which take the disk less time to write over than to add to.

    crc       CRC-32 of the line behind it (without the newline), seeded with that of the opening: each line stands for itself
    after     the crc of the record before, or of the opening: none can be missing
    revision  one more than before
    synced    up to which byte the writer knew the file to be durable when it wrote this
    head_at   where the last record with a head begins; 0 is the snapshot. So a head takes two reads, whatever came between
    head      the small fields and the stream's part of the header, whole
    changes   see `change`

What does not check out at the end of the file is a torn tail if a crash can have made it: a line that breaks off, or whose lost
sectors are zeros. It was never acknowledged; the next writer folds it away. Anything else is damage: a whole line that was
altered, or a bad line before something that a later writer knew to be durable. Damage is told, and nothing is written.
A reader, which takes no lock, may see a record while it is written: it looks again before it tells of damage.
Readers refuse unknown versions of the opening.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from persist import codec
from persist.errors import CorruptSession, UnsupportedFormat
from persist.storage import change, disk, layout, snapshot
from persist.storage.body import small_of
from persist.storage.change import Bulk, Change, DoesNotFit, apply_to_data
from persist.storage.snapshot import Header, HeadSnapshot, Snapshot

VERSION = 1
_OPENING = b'{"persist_journal":%d,"generation":%d,"snapshot":"%b"}\n'
_VERSION = re.compile(rb'\{"persist_journal":(\d{1,9}),')
_PREFIX = b'{"crc":"%08x",'
_CHECKED_FROM = len(_PREFIX % 0)
_LINE = re.compile(rb'\{"crc":"([0-9a-f]{8})",')
#: What may stand behind a record: another one, a lost sector, or nothing.
_BEGINNING = re.compile(rb"\{|\0+|\Z")
_SECTOR_BYTES = 512
_FIRST_READ_BYTES = 4096
#: A journal of so many bytes gets room for as many more at a time.
ROOM_BYTES = 16 * 1024
READ_LIMIT = 16 * snapshot.READ_LIMIT


class Overtaken(Exception):
    """The journal is not the one that the snapshot names, or is not there: a fold came between reading the two."""


class Image(msgspec.Struct, frozen=True):
    """A whole head: what `snapshot.stream_values` gives, and the small fields, each as the JSON of an object.

    As JSON, since only `codec` can encode all that may be in them.
    """

    stream: msgspec.Raw
    fields: msgspec.Raw


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One commit. See the grammar."""

    after: str
    revision: int
    updated_at: str
    commit: str
    counts: dict[str, int]
    synced: int
    head_at: int = 0
    head: Image | None = None
    changes: tuple[Change, ...] = ()


def opening(generation: int, checksum: str) -> bytes:
    """The first line of the journal of a snapshot."""
    return _OPENING % (VERSION, generation, checksum.encode())


# --- a line ----------------------------------------------------------------------------------------------------------------


def encode(record: Record, seed: int) -> bytes:
    """The line of a record."""
    rest = msgspec.json.encode(record)[1:]
    return _PREFIX % zlib.crc32(rest, seed) + rest + b"\n"


_decode_record = msgspec.json.Decoder(Record).decode


def _crc_of(line: bytes) -> str:
    return line[len(b'{"crc":"') :][:8].decode()


def _is_whole(line: bytes, seed: int) -> bool:
    shape = _LINE.match(line)
    return shape is not None and zlib.crc32(memoryview(line)[_CHECKED_FROM:], seed) == int(shape[1], 16)


def _decoded(line: bytes) -> Record:
    """The record of a line whose CRC is right. Raises one of `NONSENSE` for what somebody has sealed on purpose."""
    try:
        return _decode_record(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # A lone surrogate, which msgspec does not read.
        values = codec.decode(line)
        changes = tuple(map(change.from_plain, values.pop("changes", ())))
        head = values.pop("head", None)
        image = None if head is None else Image(*(msgspec.Raw(codec.encode(head[key])) for key in ("stream", "fields")))
        return msgspec.structs.replace(msgspec.convert(values, Record), changes=changes, head=image)


NONSENSE = (*snapshot.NONSENSE, msgspec.DecodeError, msgspec.ValidationError)


# --- what a journal says ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tail:
    """The end of a journal: where it is, and the head that is valid there. All that it takes to append a record.

    Attributes:
        header, small, counts: the session's head after the last record.
        checksum: that of the snapshot.
        seed: the CRC of the opening.
        after: that of the last record, in hex; `last` is where it begins, and `end` where it ends.
        head_at: where the record with the last full head begins.
        is_torn: whether something stands behind the end that a crash has left.
    """

    header: Header
    small: bytes
    counts: Mapping[str, int]
    checksum: str
    seed: int
    after: str
    last: int
    end: int
    head_at: int = 0
    is_torn: bool = False

    @classmethod
    def of(cls, head: HeadSnapshot) -> Tail:
        """The end of a journal that has no record yet."""
        line = opening(head.header.generation, head.checksum)
        seed = zlib.crc32(line)
        return cls(head.header, head.small, head.counts, head.checksum, seed, f"{seed:08x}", 0, len(line))

    def record(
        self, header: Header, small: bytes, counts: Mapping[str, int], changes: tuple[Change, ...], synced: int
    ) -> Record:
        """The record of the next commit."""
        before = self.header
        is_same_stream = (header.epoch, header.owner, header.extra) == (before.epoch, before.owner, before.extra)
        is_same_head = is_same_stream and small == self.small
        return Record(
            after=self.after,
            revision=header.revision,
            updated_at=header.updated_at.isoformat(),
            commit=header.commit,
            counts=dict(counts),
            synced=synced,
            head_at=self.head_at if is_same_head else 0,
            head=None if is_same_head else _image(header, small),
            changes=changes,
        )

    def take(self, line: bytes, record: Record) -> None:
        """Go on behind a record; raises `DoesNotFit` if it does not follow."""
        if record.after != self.after or record.revision != self.header.revision + 1:
            raise DoesNotFit("revision")
        if record.head is None and record.head_at != self.head_at:
            raise DoesNotFit("head_at")
        self.go_on(line, record, *_head_after(self.header, self.small, record))

    def go_on(self, line: bytes, record: Record, header: Header, small: bytes) -> None:
        """Go on behind a record of which it is known that it follows, and which head it makes."""
        self.header, self.small, self.counts = header, small, record.counts
        self.after = _crc_of(line)
        self.last, self.end = self.end, self.end + len(line)
        if record.head is not None:
            self.head_at = self.last


def _image(header: Header, small: bytes) -> Image:
    stream = codec.encode(snapshot.stream_values(header))
    return Image(msgspec.Raw(stream), msgspec.Raw(b"{" + small.replace(b",\n", b",") + b"}"))


def _head_after(header: Header, small: bytes, record: Record) -> tuple[Header, bytes]:
    header = header.but(revision=record.revision, updated_at=snapshot.time_of(record.updated_at), commit=record.commit)
    if record.head is None:
        return header, small
    stream, fields = (codec.decode(bytes(raw)) for raw in (record.head.stream, record.head.fields))
    return snapshot.with_stream_values(header, stream), small_of(fields)


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal of one session, as a file to be read; carries what its errors name."""

    path: Path
    session_id: str

    def open(self, flags: int = os.O_RDONLY) -> int:
        """Open it; raise `Overtaken` if it is not there."""
        try:
            return disk.open_unseen(self.path, flags)
        except FileNotFoundError:
            raise Overtaken from None

    def check_opening(self, fd: int, tail: Tail) -> None:
        """Raise `Overtaken` if this is the journal of another snapshot, and `UnsupportedFormat` if it is a newer one."""
        expected = opening(tail.header.generation, tail.checksum)
        found = self._read_at(fd, len(expected), 0)
        if found == expected:
            return
        disk.require_plain(fd, self.path)
        version = _VERSION.match(found)
        if version is not None and int(version[1]) != VERSION:
            raise UnsupportedFormat(session_id=self.session_id, path=self.path, found=int(version[1]), known=VERSION)
        raise Overtaken

    def _read_at(self, fd: int, limit: int, position: int) -> bytes:
        try:
            return disk.read_at(fd, limit, position)
        except OSError:
            disk.require_plain(fd, self.path)
            raise

    def first_behind(self, fd: int, tail: Tail) -> bytes | None:
        """The first byte behind a tail; None if the last line of the tail does not stand where it says, and whole."""
        line = b'{"crc":"%b",' % tail.after.encode() if tail.last else opening(tail.header.generation, tail.checksum)
        if self._read_at(fd, len(line), tail.last) != line:
            return None
        around = disk.read_at(fd, 2, tail.end - 1)
        return around[1:] if around[:1] == b"\n" else None

    def follow(self, fd: int, tail: Tail) -> Iterator[Record]:
        """Read what stands behind a tail, which moves along.

        Raises:
            CorruptSession: it is damaged there.
        """
        before = None
        while True:
            content = _without_room(_read_from(fd, tail.end))
            start = tail.end
            yield from self._records(content, tail)
            rest = content[tail.end - start :]
            tail.is_torn = bool(rest)
            if not rest or _is_torn(rest, tail.end, tail.seed):
                return
            if rest == before:
                raise self.damaged(tail.end, "a record in it was altered")
            before = rest

    def _records(self, content: bytes, tail: Tail) -> Iterator[Record]:
        """The whole records at the beginning of what stands behind a tail, which moves along."""
        start = tail.end
        while (stop := content.find(b"\n", tail.end - start)) >= 0:
            line = content[tail.end - start : stop + 1]
            if not _is_whole(line[:-1], tail.seed):
                break
            try:
                record = _decoded(line)
                tail.take(line, record)
            except NONSENSE:
                raise self.damaged(tail.end, "a record in it does not follow the one before") from None
            yield record

    def damaged(self, offset: int, reason: str) -> CorruptSession:
        """The error of a journal that no crash can have left like that."""
        remedy = (
            f"Take the last good state with 'persist accept {self.path.parent} {self.session_id}', or restore a backup."
        )
        return CorruptSession(
            session_id=self.session_id, path=self.path, reason=f"{reason}.", offset=offset, remedy=remedy
        )

    def replay(self, found: Snapshot) -> Snapshot:
        """The session as it is after all that the journal holds. Takes no lock.

        Raises:
            Overtaken: a fold has come between.
            CorruptSession, UnsupportedFormat: it cannot be trusted.
        """
        tail = Tail.of(HeadSnapshot(found.header, found.body.small, found.body.counts, found.checksum))
        fd = self.open()
        try:
            self.check_opening(fd, tail)
            records = list(self.follow(fd, tail))
        finally:
            disk.close(fd)
        if not records:
            return found
        bulk, decoded = Bulk(found.body), found.body.decoded
        for record in records:
            self._apply(bulk, record, tail)
        for data in decoded:
            for record in records:
                for each in record.changes:
                    apply_to_data(data, each)
        body = replace(bulk.body(tail.small), source=(self.session_id, self.path), decoded=decoded)
        if body.counts != tail.counts:
            raise self.damaged(tail.last, "it does not hold as many items as it says")
        return Snapshot(tail.header, body, found.checksum)

    def salvage(self, edited: Snapshot, *, is_edited: bool) -> tuple[Snapshot, int]:
        """As `replay`, up to what is damaged; tell how many records there are, at most, from there on.

        On a document that was edited by hand nothing is guessed: its journal may only have added items at the ends of lists.
        """
        tail = Tail.of(HeadSnapshot(edited.header, edited.body.small, edited.body.counts, edited.checksum))
        records: list[Record] = []
        lost = 0
        fd = self.open()
        try:
            self.check_opening(fd, tail)
            records.extend(self.follow(fd, tail))
        except CorruptSession:
            lost = _without_room(_read_from(fd, tail.end)).rstrip(b"\n").count(b"\n") + 1
        finally:
            disk.close(fd)
        bulk = Bulk(edited.body)
        for record in records:
            self._apply_to_edited(bulk, record, is_edited=is_edited)
        return Snapshot(tail.header, bulk.body(tail.small), edited.checksum), lost

    def _apply_to_edited(self, bulk: Bulk, record: Record, *, is_edited: bool) -> None:
        try:
            if is_edited and record.head is not None:
                raise DoesNotFit("head")
            for each in record.changes:
                if is_edited and not (each.is_items and not each.remove and each.at == bulk.counts.get(each.field, 0)):
                    raise DoesNotFit(each.field)
                bulk.apply(each)
        except NONSENSE:
            reason = f"what {self.path.name} says does not fit the document as it is."
            store = self.path.parent
            remedy = (
                f"Undo the edit, fold the journal with 'persist compact {store} {self.session_id}', and edit again; or move "
                f"{self.path} away, and with it the commits in it, and accept the document as it is."
            )
            document = self.path.with_name(f"{self.session_id}.json")
            raise CorruptSession(session_id=self.session_id, path=document, reason=reason, remedy=remedy) from None

    def keep_copy(self) -> None:
        """Keep what a damaged journal holds, durably, for those who can make something of it."""
        copy = layout.copy_of(self.path)
        # One of an earlier attempt may be half a copy.
        disk.unlink(copy)
        fd = disk.create(copy)
        try:
            disk.write(fd, disk.read(self.path, READ_LIMIT))
            disk.sync(fd)
        finally:
            disk.close(fd)

    def _apply(self, bulk: Bulk, record: Record, tail: Tail) -> None:
        try:
            for each in record.changes:
                bulk.apply(each)
        except NONSENSE:
            raise self.damaged(tail.last, "a record in it changes what is not there") from None

    def head(self, head: HeadSnapshot) -> HeadSnapshot:
        """The head after all that the journal holds, from its last record and the one with the head. Takes no lock."""
        tail = Tail.of(head)
        fd = self.open()
        try:
            self.check_opening(fd, tail)
            line = self._last_line(fd, tail)
            if line is None:
                return head
            record = _decoded(line)
            at = record.head_at
            if record.head is None and at:
                with_head = _decoded(_line_at(fd, at, tail.seed))
                if with_head.head is None:
                    raise DoesNotFit("head_at")
                header, small = _head_after(head.header, head.small, with_head)
            else:
                header, small = head.header, head.small
            header, small = _head_after(header, small, record)
        except NONSENSE:
            raise self.damaged(tail.end, "its last record makes no sense") from None
        finally:
            disk.close(fd)
        return HeadSnapshot(header, small, record.counts, head.checksum)

    def _last_line(self, fd: int, tail: Tail) -> bytes | None:
        """The last committed record, looked for from the end; None if there is none. Behind it, nothing may be damaged."""
        window, before = ROOM_BYTES + _FIRST_READ_BYTES, None
        while True:
            size = disk.size_of(fd)
            start = max(tail.end, size - window)
            content = _without_room(disk.read_at(fd, size - start, start))
            try:
                return self._last_in(content, start, tail)
            except _BeginsBefore:
                window *= 4
            except CorruptSession:
                if content == before:
                    raise
                before = content

    def _last_in(self, content: bytes, start: int, tail: Tail) -> bytes | None:
        good: bytes | None = content
        while good is not None:
            line, end = _last_whole(good, tail.seed, is_all=start == tail.end)
            if end < len(content) and not _is_torn(content[end:], start + end, tail.seed):
                raise self.damaged(start + end, "a record in it was altered")
            good = None if line is None else _before_a_lost_one(content[:end], line, start, tail)
        return line


def is_empty(path: Path) -> bool:
    """Whether a journal has no record: a fold that was cut off has left it."""
    content, (_, size, _) = disk.read_start(path, ROOM_BYTES + _FIRST_READ_BYTES)
    return size <= len(content) and b"\n" not in _without_room(content)[:-1]


#: What stands behind the last record where nothing stands: nothing, or room for more.
NOTHING = (b"", b"\0")


def _without_room(content: bytes) -> bytes:
    """What stands before the zeros at the end; found in two passes of C. `rstrip` looks at each one."""
    window = max(0, len(content) - 2 * ROOM_BYTES)
    start = content.find(b"\0", window)
    is_room = start >= 0 and (start > window or window == 0) and content[start:] == bytes(len(content) - start)
    return content[:start] if is_room else content.rstrip(b"\0")


def _read_from(fd: int, position: int) -> bytes:
    # Nearly always it is some records: a large buffer, which the system has to find first, would cost more than they do.
    pieces = [disk.read_at(fd, 4 * ROOM_BYTES, position)]
    while pieces[-1]:
        position += len(pieces[-1])
        pieces.append(disk.read_at(fd, 1024 * 1024, position) if len(pieces[-1]) >= 4 * ROOM_BYTES else b"")
    return b"".join(pieces)


class _BeginsBefore(Exception):
    """What is looked for begins before what was read."""


def _last_whole(content: bytes, seed: int, *, is_all: bool) -> tuple[bytes | None, int]:
    """The last whole record, and where it ends; None if there is none."""
    stop = content.rfind(b"\n")
    while stop >= 0:
        begin = content.rfind(b"\n", 0, stop) + 1
        if (begin or is_all) and _is_whole(content[begin:stop], seed):
            return content[begin:stop], stop + 1
        stop = begin - 1
    if not is_all:
        raise _BeginsBefore
    return None, 0


def _before_a_lost_one(content: bytes, line: bytes, start: int, tail: Tail) -> bytes | None:
    """What stands before a record that was lost in front of the last one; None if none was.

    Two writers may have been cut off one after the other, and a power cut have kept the second record only.
    """
    begin = len(content) - len(line) - 1
    record = _decoded(line)
    durable = max(record.synced, tail.end)
    while start + begin > durable:
        before = content.rfind(b"\n", 0, begin - 1) + 1
        if before == 0 and start > tail.end:
            raise _BeginsBefore
        line = content[before : begin - 1]
        if not _is_whole(line, tail.seed) or _crc_of(line) != record.after:
            return content[:before]
        record, begin = _decoded(line), before
        durable = max(record.synced, durable)
    return None


def _line_at(fd: int, position: int, seed: int) -> bytes:
    """The record that begins at a position. Raises `ValueError` if none does."""
    limit = _FIRST_READ_BYTES
    while True:
        content = disk.read_at(fd, limit, position)
        line, newline, _ = content.partition(b"\n")
        if newline and _is_whole(line, seed):
            return line
        if newline or len(content) < limit:
            raise ValueError(position)
        limit *= 4


def _is_torn(rest: bytes, position: int, seed: int) -> bool:
    """Whether a crash can have left this behind the last good record: a write that was never acknowledged."""
    line, newline, behind = rest.partition(b"\n")
    if newline and b"\0" not in line:
        return False
    if not newline and _is_whole_but_for_its_newline(line, seed):
        return False
    if not _has_lost_whole_sectors(rest, position):
        return False
    later = (_decoded_or_none(each, seed) for each in behind.split(b"\n")[:-1])
    return not any(record is not None and record.synced > position for record in later)


def _is_whole_but_for_its_newline(line: bytes, seed: int) -> bool:
    """Whether it begins with a record whose newline was altered."""
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


def _decoded_or_none(line: bytes, seed: int) -> Record | None:
    try:
        return _decoded(line) if _is_whole(line, seed) else None
    except NONSENSE:
        return None


def _has_lost_whole_sectors(rest: bytes, position: int) -> bool:
    """Whether zeros, which no record holds, fill all of a sector that was appended, or nothing of it."""
    start = -position % _SECTOR_BYTES
    sectors = [rest[:start], *(rest[at : at + _SECTOR_BYTES] for at in range(start, len(rest), _SECTOR_BYTES))]
    return all(b"\0" not in sector or not sector.strip(b"\0") for sector in sectors)
