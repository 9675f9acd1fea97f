"""Salvage: `accept` takes the document as it is, and the good records of its journal."""

from __future__ import annotations

import os
from secrets import token_hex

from persist import json_codec
from persist.errors import CorruptSession
from persist.storage import disk, document, journal, layout
from persist.storage.cache import Replica
from persist.storage.commit import Place, write_new
from persist.storage.content import Content
from persist.storage.document import NONSENSE, Header

#: No journal holds so many records, because each record has at least a hundred bytes.
_MOST_RECORDS = json_codec.MAX_BYTES // 100


def salvage(place: Place, *, drop_journal: bool) -> tuple[Replica, Header, Content]:
    """Read a session as `accept` takes it. Keep a copy of a journal that is not taken whole.

    Returns:
        The present replica, and the header and the content for the next document. That document takes the replica's
        journal out of use.

    Args:
        drop_journal: give up the commits in the journal, whatever they are.

    Raises:
        CorruptSession: the document is no JSON object, or its journal does not fit the edit.
    """
    paths = place.paths
    edited = document.read_edited(paths.document, place.session_id, paths.file_id)
    before = Replica(edited.header, edited.content, edited.version)
    name = edited.header.journal
    if name is None:
        return before, edited.header, edited.content
    log = place.journal(name)
    try:
        with log.opened() as fd:
            return _with_records(place, log, fd, before, drop_journal=drop_journal)
    except journal.Overtaken:
        # Nobody knows how many commits are gone. So objects that were loaded before belong to another incarnation.
        header = edited.header.but(incarnation=token_hex(16), revision=edited.header.revision + _MOST_RECORDS)
        return before, header, edited.content


def _with_records(
    place: Place, log: journal.Journal, fd: int, before: Replica, *, drop_journal: bool
) -> tuple[Replica, Header, Content]:
    header, content = before.header, before.content
    try:
        records, tail, lost = journal.read_good_records(log, fd, header)
    except CorruptSession:
        # Not even its first line is good.
        records, tail, lost = [], journal.Tail.of(log.name), _MOST_RECORDS
    if lost:
        # A process with an old replica may know good records behind the damage. So the mark stands behind everything.
        tail.end, tail.is_torn = journal.end_of(log.path), False
    before.tail = tail
    try:
        document.read(place.paths.document, place.session_id, place.paths.file_id)
        is_fit = True
    except CorruptSession:
        # The document was edited. Then only appends are sure to fit it.
        is_fit = journal.only_appends(content, records)
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
        compact, accept = (
            layout.command(words, place.paths.directory, place.session_id)
            for words in ("compact", "accept --drop-journal")
        )
        reason = f"what {os.path.basename(log.path)} says does not fit the document as it is."
        remedy = (
            f"Undo the edit. Or undo it, fold the journal with {compact}, and edit again. "
            f"Or give the commits in the journal up with {accept}."
        )
        raise CorruptSession(session_id=place.session_id, path=place.paths.document, reason=reason, remedy=remedy)
    if lost:
        # The copy is for somebody who can make use of it. A copy of an earlier attempt is replaced, because it may be
        # half a copy.
        copy = disk.read(log.path, journal.READ_LIMIT)
        write_new(layout.copy_of(str(log.path)), copy, place.options.file_mode)
    # The revisions of lost records are skipped, so that no revision is used again.
    return before, header.but(revision=header.revision + lost), content
