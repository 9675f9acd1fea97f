"""The commit: how a change of a session becomes durable and visible.

A commit to a session with a journal appends one record and syncs it (`append_record`). Any other commit writes the
whole document (`write_document`). So does the fold of a journal that has outgrown its document.

After a failed fsync the kernel may have dropped the data and still show it. A second fsync then answers OK (measured).
So that file is never synced or trusted again. The store writes the document once more, to another inode. If that fails
too while the commit is visible, nobody knows what a power cut would leave. The caller then gets `CommitUnknown`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import Literal

from persist.errors import CommitFailed, CommitUnknown, PersistError
from persist.log import log
from persist.storage import disk, document, journal
from persist.storage.cache import Replica
from persist.storage.content import Content, Items
from persist.storage.diff import Change
from persist.storage.document import Header
from persist.storage.journal import Tail
from persist.storage.layout import SessionPaths
from persist.translating import Translating

#: Which sessions have a journal: large ones, all, or none.
Mode = Literal["auto", "always", "never"]
#: A session gets a journal above the first size, and loses it at a fold below the second.
ENTER_BYTES, LEAVE_BYTES = 64 * 1024, 32 * 1024
#: A journal is folded when it is larger than its document, but not below this size.
FOLD_AT_LEAST_BYTES = 64 * 1024
#: A record writes at most so many unsynced bytes again. If there are more, the commit folds, because that costs less.
MOST_UNSYNCED_BYTES = 64 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True)
class Options:
    """How a store writes.

    Attributes:
        mode: which sessions have a journal.
        file_mode: the mode of new files.
        fold_bytes: a journal above this size is folded. It replaces the rule above, for tests.
        room_bytes: a journal that has so many bytes gets room for as many more at a time.
        verifies_folds: whether each fold compares the replica with a replay from disk, for tests.
    """

    mode: Mode = "auto"
    file_mode: int = disk.PRIVATE
    fold_bytes: float | None = None
    room_bytes: int = journal.ROOM_BYTES
    verifies_folds: bool = False

    def wants_journal(self, header: Header, content: Content) -> bool:
        """Tell whether the session's next document gets a journal."""
        limit = LEAVE_BYTES if header.journal else ENTER_BYTES
        return self.mode == "always" or (self.mode == "auto" and content.size_bytes > limit)


class Place:
    """The files of one session whose lock is held, and the facts that are noted about them.

    Attributes:
        unknown: session id -> the reason of its last `CommitUnknown`. All verbs of a store share it.
        is_visible: whether the last commit became visible, even if an exception came after that.
        is_marked: whether the current journal bears the mark that takes it out of use.
    """

    session_id: str
    paths: SessionPaths
    place: str
    options: Options
    unknown: dict[str, str]
    is_visible: bool
    is_marked: bool

    def journal(self, name: str) -> journal.Journal:
        """Return the session's journal of that name."""
        return journal.Journal(self.paths.journal(name), self.session_id, name)

    def refusals(self) -> Translating[None]:
        """Turn the disk's own errors in the block into `CommitFailed`, because nothing of the commit is visible yet."""
        return Translating(partial(_refuse, self), None)

    def require_known(self) -> None:
        """Raise `CommitUnknown` after a commit of unknown outcome, so that nothing more is written or acknowledged."""
        reason = self.unknown.get(self.session_id)
        if reason is not None:
            raise CommitUnknown(session_id=self.session_id, path=self.paths.document, reason=reason, errno=None)


def _refuse(place: Place, error: BaseException) -> None:
    if isinstance(error, OSError) and not isinstance(error, PersistError):
        raise _failure(place, CommitFailed, error) from error


def _failure(place: Place, kind: type[PersistError], error: OSError) -> PersistError:
    """Return a typed error with the disk's reason, and log that reason."""
    reason = error.strerror or type(error).__name__
    log.warning("Session %r: the disk refused at %s: %s", place.session_id, place.paths.document, reason)
    return kind(session_id=place.session_id, path=place.paths.document, reason=reason, errno=error.errno)


def _doubt(place: Place, error: OSError) -> None:
    """Note that nobody knows whether the last commit is durable. No verb writes until the document is written anew."""
    reason = place.unknown[place.session_id] = error.strerror or type(error).__name__
    log.warning("Session %r: it is unknown whether its last commit is durable: %s", place.session_id, reason)


def commit(
    place: Place, before: Replica | None, header: Header, content: Content, changes: tuple[Change, ...], fd: int
) -> Replica:
    """Make a commit on top of the current one. It is durable and visible on return.

    Args:
        before: the current replica, None for a new session.
        changes: the changes that turn the values that stand apart in `before` into those of `content`.
        fd: the journal, open for reading and writing, or -1 if there is none.

    Raises:
        CommitFailed: the disk refused. The old revision stands.
        CommitUnknown: the commit is visible, but may not survive a power cut.
    """
    if place.unknown:
        place.require_known()
    place.is_visible = place.is_marked = False
    if before is None or before.tail is None:
        return write_document(place, before, header, content)
    tail, options = before.tail, place.options
    # A journal that is larger than its document is folded. A record is never appended behind a torn tail.
    limit = max(FOLD_AT_LEAST_BYTES, before.version[1]) if options.fold_bytes is None else options.fold_bytes
    must_fold = options.mode == "never" or tail.is_torn or tail.end > limit or len(tail.unsynced) > MOST_UNSYNCED_BYTES
    if not must_fold and not before.is_synced:
        # If the document cannot be made durable, it is written anew below.
        with contextlib.suppress(OSError):
            _settle(place, before)
    if must_fold or not before.is_synced:
        verify(place, before)
        try:
            after = write_document(place, before, header, content)
            tell_fold(place, tail)
            return after
        except CommitFailed as error:
            # A full disk may have room for a record where it has none for a document.
            is_full = error.errno in _FULL and not isinstance(error.__cause__, disk.SyncFailed)
            if not is_full or place.is_marked or tail.is_torn or not before.is_synced or options.mode == "never":
                raise
    return append_record(place, before, header, content, changes, fd)


def tell_fold(place: Place, tail: Tail) -> None:
    """Log that a journal was folded into its document."""
    if tail.is_torn:
        log.info("Session %r: folded a torn tail away, at byte %d of its journal", place.session_id, tail.end)
    else:
        log.debug("Session %r: folded a journal of %d bytes", place.session_id, tail.end)


def _settle(place: Place, found: Replica) -> None:
    """Make the document and its name durable, once for each replica.

    The process that wrote them may have died before it did so.
    """
    if not found.is_synced:
        disk.sync_file(place.paths.document)
        disk.sync_directory(place.paths.directory)
        found.is_synced = True


def append_record(
    place: Place, before: Replica, header: Header, content: Content, changes: tuple[Change, ...], fd: int
) -> Replica:
    """Append one record to the journal, and sync it."""
    tail = before.tail
    assert tail is not None
    # 1. The line. It holds the whole head if that changed.
    old = before.header
    is_same_fields = content.fields is before.content.fields or content.fields == before.content.fields
    is_same_head = is_same_fields and header.epoch == old.epoch and header.owner == old.owner
    # The same as `Content.counts`, but inline, because on this path each call counts (see tests/unit/test_costs.py).
    counts: dict[str, int | None] = {}
    for name, value in content.apart.items():
        counts[name] = value.count if isinstance(value, Items) else None
    record = journal.Record(
        crc="00000000",
        after=tail.after,
        revision=header.revision,
        updated_at=header.updated_at.isoformat(),
        synced=tail.synced,
        counts=counts,
        head_at=tail.head_at if is_same_head else 0,
        head=None if is_same_head else journal.image_of(header, content),
        changes=changes,
        commit=header.commit,
    )
    line = journal.encode(record, tail.seed)
    # 2. Room, so that the write does not make the file longer.
    try:
        room, end = place.options.room_bytes, tail.end + len(line)
        if end > tail.room_end and len(line) <= room <= tail.end:
            # Another process may have made room.
            tail.room_end = disk.size_of(fd)
            if end > tail.room_end:
                # An error is ignored, because a full disk may still have room for the record itself.
                with contextlib.suppress(OSError):
                    disk.write_at(fd, bytes(room), tail.end)
                    tail.room_end = tail.end + room
        # 3. The unsynced bytes are written again. Their writer may have seen its fdatasync fail, and have died.
        disk.write_at(fd, tail.unsynced + line, tail.synced if tail.unsynced else tail.end)
    except OSError as error:
        # Otherwise the next commit would have to fold a torn tail away, and a full disk has no room for a fold.
        with contextlib.suppress(OSError):
            disk.truncate(fd, tail.end)
        raise _failure(place, CommitFailed, error) from error
    # 4. From here on readers see the commit.
    place.is_visible = True
    try:
        disk.sync_data(fd)
    except OSError as error:
        # Another process must not append behind bytes that may be lost. A writer that finds the mark folds.
        with contextlib.suppress(OSError):
            disk.write_at(fd, journal.MARK, end)
        place.is_marked = True
        return _write_anew(place, before, header, content, error)
    # 5. Only now does the replica move on.
    tail.after, tail.commit = line[8:16].decode(), record.commit
    if not is_same_head:
        tail.head_at = tail.end
    tail.end = tail.synced = end
    tail.unsynced = b""
    return Replica(header, content, before.version, tail, is_synced=True)


def _write_anew(place: Place, before: Replica, header: Header, content: Content, error: OSError) -> Replica:
    """Write the whole document after a failed fsync, to another inode."""
    _doubt(place, error)
    try:
        return write_document(place, before, header, content)
    except PersistError as failed:
        raise _failure(place, CommitUnknown, error) from failed


def confirm(place: Place, found: Replica, fd: int) -> Replica:
    """Make the revision that was read durable, so that a verb may acknowledge it without a commit.

    The writer may have died between its write and its sync, or its fdatasync may have failed.
    """
    place.require_known()
    tail = found.tail
    try:
        _settle(place, found)
        if tail is not None and tail.unsynced:
            disk.write_at(fd, tail.unsynced, tail.synced)
            disk.sync_data(fd)
            tail.synced, tail.unsynced = tail.end, b""
        return found
    # The bytes that the kernel still shows prove nothing. So the content that was checked before is written again.
    except disk.SyncFailed as error:
        return _write_anew(place, found, found.header, found.content, error)
    except OSError:
        return write_document(place, found, found.header, found.content)


# --- the whole document ----------------------------------------------------------------------------------------------


def write_document(
    place: Place, before: Replica | None, header: Header, content: Content, *, alone: bool = False
) -> Replica:
    """Write the whole document. At every moment the old document or the new one is there, durably.

    Args:
        before: the current replica. Its journal is taken out of use.
        alone: write the document without a journal.
    """
    mark = None if place.is_marked else _tail_to_mark(before)
    is_journaled = not alone and place.options.wants_journal(header, content)
    journals = list(filter(None, (before.header.folded, before.header.journal))) if before else []
    try:
        if len(journals) > 1 and disk.exists(left_over := place.paths.journal(journals[0])):
            # A fold that was cut off did not remove this journal. It goes before the rename, because no header names it
            # after that. The first sync is there because a power cut could bring back the document that needs this
            # journal. A new journal makes the second sync needless, because the sync of its name covers it.
            disk.sync_directory(place.paths.directory)
            _remove([left_over])
            if not is_journaled:
                disk.sync_directory(place.paths.directory)
        return _publish(place, header, content, journals, mark, is_journaled=is_journaled)
    except PersistError:
        raise
    except OSError as error:
        if not isinstance(error, disk.SyncFailed):
            raise _failure(place, CommitFailed, error) from error
        if place.is_visible:
            _doubt(place, error)
    # After a failed fsync the document is written once more, to other inodes.
    try:
        return _publish(place, header, content, journals, mark, is_journaled=is_journaled)
    except OSError as error:
        if place.is_visible:
            _doubt(place, error)
        raise _failure(place, CommitUnknown if place.is_visible else CommitFailed, error) from error


def _publish(
    place: Place, header: Header, content: Content, journals: list[str], mark: Tail | None, *, is_journaled: bool
) -> Replica:
    """Write the document once.

    `journals` names the journals that no longer count after that, the current one last.
    """
    name = token_hex(8) if is_journaled else None
    paths, made = place.paths, [place.paths.temp]
    folded = journals[-1] if journals else None
    # The header holds the id if the file's name holds a hash of it.
    header = header.but(journal=name, folded=folded, session_id=paths.file_id or header.session_id)
    # 1. The directory is opened while nothing is visible. If no descriptor were free after the rename, nobody would
    # know its outcome.
    directory = disk.open_directory(paths.directory)
    try:
        try:
            # 2. The new journal, and its name. Otherwise a power cut could leave a document without its journal.
            if name is not None:
                made.append(paths.journal(name))
                write_new(made[-1], journal.opening(name), place.options.file_mode)
                disk.sync_directory(paths.directory, directory)
            # 3. The new document, under another name.
            written = write_new(paths.temp, document.to_bytes(header, content), place.options.file_mode)
            # 4. The mark, for processes that are alive. One with an old replica finds a torn tail, even if a later step
            # fails.
            if mark is not None:
                put_mark(paths.journal(mark.name), mark.end)
                place.is_marked = True
        except BaseException:
            _remove(made)
            raise
        # 5. Readers see the new document.
        try:
            disk.replace(paths.temp, paths.document)
        except OSError:
            # Only an `OSError` proves that the rename did not happen. After anything else the document may need the
            # journal.
            _remove(made)
            raise
        place.is_visible = True
        # 6. The rename becomes durable.
        try:
            disk.sync_directory(paths.directory, directory)
        except OSError as error:
            if name is not None:
                journals.append(name)
            raise disk.SyncFailed(error.errno, error.strerror or type(error).__name__) from error
    finally:
        disk.close_directory(directory)
    # 7. The journals that no longer count go last, as far as the disk allows it.
    if journals:
        _remove(map(paths.journal, journals))
    place.unknown.pop(place.session_id, None)
    place.is_marked = False
    version = _version_of(paths.document, written)
    return Replica(header, content, version, Tail.of(name) if name else None, is_synced=True)


def _tail_to_mark(before: Replica | None) -> Tail | None:
    """Return the end of the journal that must be marked before it goes out of use, or None.

    A torn tail gets no mark, because nobody appends behind it anyway. In a sector that a power cut has left as zeros, a
    mark would look like damage, because no crash leaves half a sector.
    """
    tail = None if before is None else before.tail
    return None if tail is None or tail.is_torn else tail


def _version_of(path: str, written: disk.Version) -> disk.Version:
    """Return the version of a document after its rename, because the rename sets its ctime.

    If the document is not there any more, return a version that fits no file.
    """
    with contextlib.suppress(OSError):
        version = disk.version_of(path)
        if version[:2] == written[:2]:
            return version
    return (0, 0, 0, 0)


def write_new(path: str, text: bytes, mode: int = disk.PRIVATE) -> disk.Version:
    """Write a new file. Its content is durable on return."""
    try:
        fd = disk.create(path, mode)
    except FileExistsError:
        # The lock is held, so the writer of the old file is dead.
        disk.unlink(path)
        fd = disk.create(path, mode)
    try:
        disk.write(fd, text)
        disk.sync(fd)
        return disk.version_of(fd)
    finally:
        disk.close(fd)


def put_mark(path: str, end: int) -> None:
    """Write the mark behind a journal's end, for the processes that hold a replica of it."""
    fd = disk.open_unseen(path, os.O_RDWR)
    try:
        disk.write_at(fd, journal.MARK, end)
    finally:
        disk.close(fd)


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        disk.remove_quietly(path)


def verify(place: Place, before: Replica) -> None:
    """Compare a replica that is to be folded with a replay from disk. Only tests ask for it."""
    if before.tail is None or not place.options.verifies_folds:
        return
    found = document.read(place.paths.document, place.session_id, place.paths.file_id)
    assert found.header.journal is not None
    log = place.journal(found.header.journal)
    with log.opened() as fd:
        header, content, _ = log.replay(fd, found.header, found.content)
    if header.commit != before.header.commit or content != before.content or header.owner != before.header.owner:
        raise AssertionError(f"The replica of session {place.session_id!r} differs from its files.")


# --- the end of a session --------------------------------------------------------------------------------------------


def replace_damaged(place: Place, header: Header, content: Content, journals: Sequence[tuple[str, str]]) -> Replica:
    """Write a new document in the place of one that cannot be read. It is durable on return.

    Args:
        journals: all files that are named like a journal of the session, with the hex in their names.
    """
    place.require_known()
    place.is_visible = place.is_marked = False
    with place.refusals():
        _mark_all(path for path, _ in journals)
    # The new header names one of the journals, as if it had been folded. So if a crash leaves that journal behind, it
    # is known to be a left-over. There is seldom another one.
    before = Replica(header.but(journal=journals[-1][1] if journals else None), content, (0, 0, 0, 0))
    after = write_document(place, before, header, content)
    _remove(path for path, _ in journals)
    return after


def _mark_all(journals: Iterable[str]) -> None:
    """Write the mark behind journals whose content is unknown, as far as the disk allows it.

    A damaged session must not stay because its journal is damaged, too.
    """
    for path in journals:
        with contextlib.suppress(OSError):
            put_mark(path, journal.end_of(path))


def delete(place: Place, before: Replica | None, journals: Sequence[str]) -> None:
    """Remove a session. The removal is durable on return.

    The document goes first, because the files that a crash leaves after that are no session.

    Args:
        before: the current replica, None for a document that cannot be read.
        journals: all files that are named like a journal of the session.
    """
    place.require_known()
    paths = place.paths
    with place.refusals():
        directory = disk.open_directory(paths.directory)
        try:
            if (mark := _tail_to_mark(before)) is not None:
                put_mark(paths.journal(mark.name), mark.end)
            if before is None:
                _mark_all(journals)
            disk.unlink(paths.document)
            try:
                disk.sync_directory(paths.directory, directory)
            except OSError as error:
                _doubt(place, error)
                raise _failure(place, CommitUnknown, error) from error
        finally:
            disk.close_directory(directory)
    _remove([paths.temp, *journals])
