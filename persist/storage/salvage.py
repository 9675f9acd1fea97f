"""What `accept` takes of a session that was edited by hand or damaged: the document as it is, and the good records."""

from __future__ import annotations

from dataclasses import dataclass
from secrets import token_hex

from persist import json_codec
from persist.errors import CorruptSession
from persist.storage import disk, document, journal, layout
from persist.storage.cache import Replica
from persist.storage.commit import Place
from persist.storage.content import Content
from persist.storage.document import NONSENSE, Header
from persist.storage.journal import Journal, Overtaken, Tail

#: No journal holds as many records: each has a hundred bytes at least.
_MOST_RECORDS = json_codec.MAX_BYTES // 100


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What is there, with the journal that the next document takes out of use, and what that document is to hold."""

    before: Replica
    header: Header
    content: Content


def salvage(place: Place, *, drop_journal: bool) -> Salvaged:
    """Read a session as `accept` takes it. A copy of each journal that is not taken whole is kept.

    Args:
        drop_journal: give the commits in the journal up, whatever they are.

    Raises:
        CorruptSession: the document is no JSON object, or its journal does not fit the edit.
    """
    paths = place.paths
    edited = document.read_edited(paths.document, place.session_id, paths.file_id)
    before = Replica(edited.header, edited.content, edited.version)
    name = edited.header.journal
    if name is None:
        return Salvaged(before, edited.header, edited.content)
    log = place.journal(name)
    try:
        fd = log.open()
    except Overtaken:
        # Nobody knows how many commits are gone. What was loaded before is of another life of the session.
        header = edited.header.but(incarnation=token_hex(16), revision=edited.header.revision + _MOST_RECORDS)
        return Salvaged(before, header, edited.content)
    try:
        return _with_records(place, log, fd, before, drop_journal=drop_journal)
    finally:
        disk.close(fd)


def _with_records(place: Place, log: Journal, fd: int, before: Replica, *, drop_journal: bool) -> Salvaged:
    header, content = before.header, before.content
    try:
        records, tail, lost = journal.read_good_records(log, fd, header)
    except CorruptSession:
        # Not even its first line is good.
        records, tail, lost = [], Tail.of(log.name), _MOST_RECORDS
    if lost:
        # A process with an old replica may know good records behind the damage. So the mark stands behind everything.
        tail.end, tail.is_torn = journal.end_of(log.path), False
    before.tail = tail
    is_edited = not _is_sound(place)
    is_fit = not is_edited or journal.only_appends(content, records)
    if is_fit and not drop_journal:
        try:
            content = journal.content_after(content, records)
            for record in records:
                header = journal.header_after(header, record)
        except NONSENSE:
            is_fit = False
    if drop_journal:
        header, lost = before.header, lost + len(records)
    elif not is_fit:
        raise _does_not_fit(place, log)
    if lost:
        _keep_copy(log)
    # No revision is used again.
    return Salvaged(before, header.but(revision=header.revision + lost), content)


def _is_sound(place: Place) -> bool:
    try:
        document.read(place.paths.document, place.session_id, place.paths.file_id)
    except CorruptSession:
        return False
    return True


def _does_not_fit(place: Place, log: Journal) -> CorruptSession:
    store, session_id = place.paths.directory, place.session_id
    reason = f"what {log.path.name} says does not fit the document as it is."
    remedy = (
        f"Undo the edit. Or undo it, fold the journal with {layout.command('compact', store, session_id)}, and edit "
        "again. "
        f"Or give the commits in the journal up with {layout.command('accept --drop-journal', store, session_id)}."
    )
    return CorruptSession(session_id=session_id, path=place.paths.document, reason=reason, remedy=remedy)


def _keep_copy(log: Journal) -> None:
    """Keep what a journal holds, durably, for somebody who can make something of it."""
    copy = layout.copy_of(log.path)
    # One of an earlier attempt may be half a copy.
    disk.unlink(copy)
    fd = disk.create(copy)
    try:
        disk.write(fd, disk.read(log.path, journal.READ_LIMIT))
        disk.sync(fd)
    finally:
        disk.close(fd)
