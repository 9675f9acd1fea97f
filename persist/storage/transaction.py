"""The transaction *is* the lock: whatever needs a session's lock is a method of what only the lock gives.

    with files.transaction("s-42") as tx:
        snapshot = tx.read()
        tx.commit(snapshot.header.next(), Body.of(data))

A commit of a small session writes the document anew (see `publish`). That of a large one appends a record to its journal (see
`journal`) and syncs that, until the journal has outgrown the document and is folded into it. Only then is it acknowledged.
Readers need no lock: they see the old revision or the new one.

After a failed fsync the kernel may have dropped the data and still show it (fsync then even answers OK: measured), so the
file is never synced again or trusted: the whole document is written once more, to a new inode. If that fails too, and the
commit had become visible, nobody knows what a power cut would leave: `CommitUnknown`, and no further write to that session.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

from persist import codec
from persist.errors import (
    CommitFailed,
    CommitUnknown,
    CorruptSession,
    LockNotHeld,
    NestedLock,
    PersistError,
    SessionNotFound,
    Translating,
)
from persist.storage import change, disk, journal, layout, lease, lock, snapshot
from persist.storage.body import Body
from persist.storage.change import Change
from persist.storage.directory import SessionDirectory, is_left_over
from persist.storage.events import Ended
from persist.storage.held import HeldFile
from persist.storage.index import Index, keys_of
from persist.storage.journal import Journal, Overtaken, Tail
from persist.storage.known import Known
from persist.storage.lease import Lease
from persist.storage.publish import Attempt, SyncFailed
from persist.storage.snapshot import Header, HeadSnapshot, Snapshot

Found = TypeVar("Found")
#: A session enters journal mode above the first size, and leaves it at a fold below the second.
ENTER_BYTES, LEAVE_BYTES = 64 * 1024, 32 * 1024
#: A journal is folded when it is larger than its document, but not before this.
FOLD_AT_LEAST_BYTES = 64 * 1024
#: No journal holds as many: a record has a hundred bytes at least.
MOST_RECORDS = codec.MAX_BYTES // 100
#: How often a reader whose journal has vanished starts over before it takes the lock.
READ_ATTEMPTS = 3
READ_ATTEMPTS_IN_A_LOCK, READ_PAUSE_S = 20, 0.001


class Transaction:
    """What may be done while a session's lock is held. After the block, every method raises `LockNotHeld`."""

    def __init__(self, files: SessionFiles, session_id: str, held: HeldFile) -> None:
        self.session_id = session_id
        self._files = files
        self._layout = files.layout
        self._paths = files.layout.session(session_id)
        self._held: HeldFile | None = held
        self._is_there = False
        #: What the document is, if it was read.
        self._found: Snapshot | None = None
        #: The journal, if the session has one, and what is known of it; while a write is under way nothing is.
        self._fd = -1
        self._known: Known | None = None
        #: The changes of all its records, if it was read from the beginning.
        self._changes: list[Change] | None = None
        #: Whether the last commit became visible, also if an exception came after that.
        self.is_published = False

    @property
    def _has_lock(self) -> bool:
        held = self._held
        return held is not None and held.is_held

    def _require_lock(self) -> None:
        if not self._has_lock:
            raise LockNotHeld(session_id=self.session_id)

    def end(self) -> None:
        """End the transaction; a lock file without a session is removed by its last holder."""
        self._close_journal()
        if self._known is not None:
            self._files.known.keep(self.session_id, self._known)
        if self._has_lock and not self._is_there:
            # Nothing that goes wrong here may hide what the verb has to say.
            with contextlib.suppress(OSError):
                if not disk.exists(self._paths.document):
                    disk.unlink(self._paths.lock)
        self._held = None

    def _close_journal(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # What was synced stays so, whatever becomes of the descriptor.
            with contextlib.suppress(OSError):
                disk.close(fd)

    # --- reading ---

    def exists(self) -> bool:
        self._require_lock()
        with self._refusals():
            return disk.exists(self._paths.document)

    def read(self, known: Snapshot | None = None) -> Snapshot:
        """Read the committed document. If the session has a journal that ends with what is `known`, that is it."""
        self._require_lock()
        here = self.look() if known is not None and known.identity and known.header.is_journaled else None
        if known is not None and here is not None and here.shows(known):
            # Somebody may have folded it since: that is no commit, but another journal.
            self._found = replace(known, header=here.tail.header)
        else:
            self._found = self.alone(self._files.read_now)
        self._is_there = True
        return self._found

    def read_again(self, headers: Collection[Header]) -> Snapshot:
        """Read a revision that has one of these headers, in the transaction or after it.

        Raises:
            CommitFailed: it was replaced, in the transaction.
            LockNotHeld: the transaction has ended, and the session has moved on.
        """
        found = self._read_beside_its_commit()
        if found.header not in headers:
            raise self._replaced() if self._has_lock else LockNotHeld(session_id=self.session_id)
        if self._has_lock:
            self._found = found
        return found

    def _read_beside_its_commit(self) -> Snapshot:
        """Read, while another thread may be at the commit, which may be a fold, and the end of the transaction."""
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(Overtaken):
                return self._files.read_now(self.session_id)
        return self.alone(self._files.read_now) if self._has_lock else self._files.read(self.session_id)

    def shows(self, header: Header) -> bool | None:
        """Tell whether a commit that was cut off is there, durable or not; None if there is no looking."""
        with contextlib.suppress(PersistError, OSError):
            return self.read_head().header == header
        return None

    def read_head(self) -> HeadSnapshot:
        """Read the committed header and small fields."""
        self._require_lock()
        found = self.alone(self._files.read_head_now)
        self._is_there = True
        return found

    def alone(self, look: Callable[[str], Found]) -> Found:
        """Look at the session's files while nobody can change them: a journal that is not there is missing."""
        try:
            return look(self.session_id)
        except Overtaken:
            raise self._journal_missing() from None

    def _journal_missing(self) -> CorruptSession:
        name = "its journal"
        with contextlib.suppress(PersistError, OSError):
            generation = snapshot.read_head(self._paths.document, self.session_id).header.generation
            name = self._layout.journal(self.session_id, generation).name
        reason = f"{name}, which it names, is missing, or is that of another document."
        remedy = (
            f"Restore both from a backup; or take the document without the commits that stood there, with "
            f"'persist accept {self._layout.directory} {self.session_id}'."
        )
        return CorruptSession(session_id=self.session_id, path=self._paths.document, reason=reason, remedy=remedy)

    def look(self) -> Known | None:
        """What is known of the session without reading all of it, up to date; None if it has no journal.

        Raises: as `read`.
        """
        self._require_lock()
        if self._known is not None and self._fd < 0:
            # Written a moment ago, in this transaction; its journal is not open yet.
            self._forget()
        if self._known is None:
            with self._files.looking_at(self.session_id) as path:
                start, version = disk.read_start(path, snapshot.OPENING_BYTES)
                self._is_there = True
                if snapshot.is_journaled(start):
                    self._known = self.alone(lambda _: self._look(start, version))
        return self._known

    def look_again(self) -> None:
        """Take nothing for known, before a commit: the caller's own code has run since, for a while perhaps."""
        self._require_lock()
        self._close_journal()
        self._forget()

    def _forget(self) -> None:
        """Give back what is known, to be looked at again."""
        if self._known is not None:
            self._files.known.keep(self.session_id, self._known)
            self._known = None

    def _look(self, start: bytes, version: disk.Version) -> Known:
        known, behind = self._files.known.take(self.session_id), None
        self._close_journal()
        if known is not None and known.opening == start:
            if known.version != version:
                snapshot.read(self._paths.document, self.session_id)  # raises if it was edited
                known.version = version
            self._fd = known.log.open(os.O_RDWR)
            behind = known.log.first_behind(self._fd, known.tail)
        if known is None or behind is None:
            known = self._first_look(start, version)
            self._close_journal()
            self._fd = known.log.open(os.O_RDWR)
            known.log.check_opening(self._fd, known.tail)
        elif behind in journal.NOTHING:
            # Who knows it has seen all that is behind it: only a power cut leaves zeros before something.
            return known
        is_first = not known.tail.last
        changes: list[Change] = []
        for record in known.log.follow(self._fd, known.tail):
            try:
                known.take(record.changes)
            except snapshot.NONSENSE:
                raise known.log.damaged(known.tail.last, "a record in it makes no sense") from None
            changes += record.changes
        self._changes = changes if is_first else None
        return known

    def _first_look(self, start: bytes, version: disk.Version) -> Known:
        head = snapshot.read_head(self._paths.document, self.session_id)
        return Known(start, self._files.journal(self.session_id, head.header.generation), Tail.of(head), version)

    def index(self, field: str) -> Index:
        """What is known of a list's items. The first time, the session is read for it."""
        known = self.look()
        assert known is not None, "only a session with a journal has an index"
        if field not in known.indexes:
            wanted = keys_of(known.tail.header.owner)
            index = self._index_by_changes(known, field, wanted)
            known.indexes[field] = index or _index_of(self._found or self.read(), field, wanted)
            self._files.known.make_room_for(known)
        return known.indexes[field]

    def _index_by_changes(self, known: Known, field: str, wanted: frozenset[bytes]) -> Index | None:
        """That of the document, moved on by all changes since: so they need not be applied to it. None where that cannot be."""
        changes = [change for change in self._changes or () if change.field == field]
        if self._changes is None or self._found is not None or not all(change.is_items for change in changes):
            return None
        with self._files.looking_at(self.session_id) as path:
            document = snapshot.read(path, self.session_id)
        if document.checksum != known.tail.checksum:
            return None
        index, count = _index_of(document, field, wanted), document.body.counts.get(field, 0)
        # What makes no sense cannot be applied either; that tells what is wrong.
        with contextlib.suppress(*snapshot.NONSENSE):
            for change in changes:
                count = change.count_after(count)
                index.take(change, wanted)
            return index if count == known.tail.counts.get(field) else None
        return None

    def salvage(self) -> Snapshot:
        """Read a session that is damaged or was edited by hand: the document as it is, and of its journal what is good.

        Of each journal that is not taken whole, a copy is kept.

        Raises:
            CorruptSession: the document is not JSON, or what the journal says does not fit it any more.
        """
        self._require_lock()
        with self._refusals():
            edited = snapshot.read_edited(self._paths.document, self.session_id)
            log = self._files.journal(self.session_id, edited.header.generation)
            found, is_whole = self._salvaged(edited, log) if edited.header.is_journaled else (edited, False)
            for path, generation in self._journals():
                if not (is_whole and path == log.path) and not is_left_over(path, generation, edited.header):
                    self._files.journal(self.session_id, generation).keep_copy()
            return found

    def _salvaged(self, edited: Snapshot, log: Journal) -> tuple[Snapshot, bool]:
        """A session whose document names a journal, and whether all of that counts."""
        try:
            found, lost = log.salvage(edited, is_edited=not self._is_sound())
        except Overtaken:
            # Nobody knows how many commits are gone: what was loaded before is of another life of the session.
            header = edited.header.but(incarnation=token_hex(16), revision=edited.header.revision + MOST_RECORDS)
            return replace(edited, header=header), False
        # No revision is used again.
        return replace(found, header=found.header.but(revision=found.header.revision + lost)), not lost

    def _is_sound(self) -> bool:
        try:
            snapshot.read(self._paths.document, self.session_id)
        except CorruptSession:
            return False
        return True

    # --- writing ---

    def commit(self, header: Header, body: Body) -> Snapshot:
        """Write a revision; durable and visible on return.

        Raises:
            CommitFailed: the disk refused; the old revision stands.
            CommitUnknown: it is visible, but may not survive a power cut.
        """
        self._require_lock()
        self.require_known()
        found = self._found
        if found is None or not found.header.is_journaled:
            return self._write(header, body)
        changes = change.between(found.body, body)
        return replace(
            found, header=self._record(found.header, header, body.small, body.counts, changes, body), body=body
        )

    def record(
        self, before: Header, header: Header, small: bytes, counts: Mapping[str, int], changes: tuple[Change, ...]
    ) -> Header:
        """Commit changes on top of the revision of a header; as `commit`. `small` and `counts` are those after them."""
        self._require_lock()
        self.require_known()
        return self._record(before, header, small, counts, changes, None)

    def _record(
        self,
        before: Header,
        header: Header,
        small: bytes,
        counts: Mapping[str, int],
        changes: tuple[Change, ...],
        body: Body | None,
    ) -> Header:
        known = self._known_before(before)
        if self._must_fold(known) or not self._is_settled(known):
            try:
                header = self._write(header, body or self._whole(header, small, changes)).header
            except CommitFailed as error:
                known = self._known_where_it_is_full(known, before, error)
            else:
                self._go_on_with_indexes(known, changes)
                return header
        record = known.tail.record(header, small, counts, changes, known.synced)
        line = journal.encode(record, known.tail.seed)
        if known.document_bytes + known.tail.end + len(line) > codec.MAX_BYTES:
            # It may be too large as a whole: then it is refused, and nothing is written.
            self._whole(header, small, changes).check_size()
        # From here to the end, nothing is known.
        self._known, self._changes, self._found = None, None, self._found if body is not None else None
        end = known.tail.end
        with self._refusals():
            self._make_room(known, len(line))
            self._write_line(line, end)
        self.is_published = True
        try:
            disk.sync_data(self._fd)
        except OSError as error:
            self._spoil_journal(end + len(line))
            self._write_anew(header, small, changes, body, error)
            return header
        known.tail.go_on(line, record, header, small)
        known.take(changes)
        known.synced = known.tail.end
        self._known = known
        return header

    def _known_before(self, before: Header) -> Known:
        """What is known of the session; an error if it is not at the commit of that header any more."""
        known = self.look()
        if known is None or known.tail.header != before:
            raise self._replaced()
        return known

    def _replaced(self) -> PersistError:
        reason = "it was replaced, while its lock was held, by somebody who did not hold that"
        return self._failure(CommitFailed, reason, None)

    def _known_where_it_is_full(self, known: Known, before: Header, error: CommitFailed) -> Known:
        """Where the disk has no room for a fold, it may have some for a record; else the error."""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error.__cause__, disk.SyncFailed)
        if not is_full or self._files.mode == "never" or not known.synced:
            raise error
        self._files.known.keep(self.session_id, known)
        known = self._known_before(before)
        if known.tail.is_torn:
            raise error
        return known

    def _write_line(self, line: bytes, end: int) -> None:
        try:
            disk.write_at(self._fd, line, end)
        except OSError:
            # So that the next commit need not fold a torn tail away, for which a full disk has no room.
            with contextlib.suppress(OSError):
                disk.truncate(self._fd, end)
            raise

    def _make_room(self, known: Known, size_bytes: int) -> None:
        """See to it that a record does not make the journal longer: to write over zeros costs the disk less."""
        room = self._files.room_bytes
        end = known.tail.end + size_bytes
        if end <= known.room_end or not size_bytes <= room <= known.tail.end:
            return
        # Another process may have done so.
        known.room_end = disk.size_of(self._fd)
        if end > known.room_end:
            # On a full disk there may still be room for the record itself.
            with contextlib.suppress(OSError):
                disk.write_at(self._fd, bytes(room), known.tail.end)
                known.room_end = known.tail.end + room

    def _must_fold(self, known: Known) -> bool:
        """Whether the next commit writes the whole document: a torn tail is never appended to."""
        limit = self._files.fold_bytes
        if limit is None:
            limit = max(FOLD_AT_LEAST_BYTES, known.document_bytes)
        return self._files.mode == "never" or known.tail.is_torn or known.tail.end > limit

    def _is_settled(self, known: Known) -> bool:
        """Make durable what this process has not seen to yet: the writer may have died before it did. Tell whether it is."""
        try:
            if not known.synced:
                self._sync_known(known)
        except OSError:
            return False
        return True

    def _sync_known(self, known: Known) -> None:
        """Make the journal durable, and the first time its name, and the document."""
        disk.sync_data(self._fd)
        if not known.synced:
            disk.sync_file(self._paths.document)
            disk.sync_directory(self._layout.directory)
        known.synced = known.tail.end

    def _whole(self, header: Header, small: bytes, changes: tuple[Change, ...]) -> Body:
        """The body that a commit makes, whether or not it shows already."""
        found = self._found or self.read()
        return found.body if found.header == header else change.applied(found.body, small, changes)

    def _write_anew(
        self, header: Header, small: bytes, changes: tuple[Change, ...], body: Body | None, error: OSError
    ) -> None:
        """After a failed fsync of a record: the whole document, to a new inode."""
        self._files.unknown[self.session_id] = _reason(error)
        try:
            self._write(header, body or self._whole(header, small, changes))
        except PersistError as failed:
            raise self._failure(CommitUnknown, _reason(error), error.errno) from failed
        self._files.unknown.pop(self.session_id, None)

    def _spoil_journal(self, end: int) -> None:
        """Leave a torn tail. Another process must not append to what may be lost below: whoever finds it folds."""
        with contextlib.suppress(OSError):
            disk.write_at(self._fd, b"?", end)

    def _go_on_with_indexes(self, before: Known, changes: tuple[Change, ...]) -> None:
        """After a fold, what is known of the lists is still so."""
        known, self._known = self._known, None
        if known is not None:
            known.indexes = before.indexes
            known.take(changes)
            # Last: one that was cut off in between is not kept.
            self._known = known

    def compact(self, *, alone: bool = False) -> bool:
        """Fold the journal into the document; durable on return. Tell whether there was anything to fold.

        `alone` leaves the session without a journal until its next commit. What crashes have left behind is removed.
        """
        self._require_lock()
        self.require_known()
        is_folded = self._fold(alone=alone)
        _remove_leftover(self._paths.temp)
        with contextlib.suppress(PersistError, OSError):
            header = self.read_head().header
            for path, generation in self._journals():
                if is_left_over(path, generation, header):
                    _remove_leftover(path)
        return is_folded

    def _fold(self, *, alone: bool) -> bool:
        known = self.look()
        if known is None:
            return False
        is_empty = known.tail.last == 0 and not known.tail.is_torn
        found = self.read()
        if is_empty and not alone and self._has_journal(found.header, found.body):
            return False
        self._write(found.header, found.body, alone=alone)
        self._go_on_with_indexes(known, ())
        return True

    def _has_journal(self, header: Header, body: Body) -> bool:
        """Whether the session is to have a journal from its next document on."""
        limit = LEAVE_BYTES if header.is_journaled else ENTER_BYTES
        return self._files.mode == "always" or (self._files.mode == "auto" and body.size_bytes > limit)

    def _write(self, header: Header, body: Body, *, alone: bool = False) -> Snapshot:
        """Write the whole document; `alone`, without a journal."""
        body.check_size()
        self._known = self._changes = None
        self._close_journal()
        header = header.but(is_journaled=not alone and self._has_journal(header, body))
        attempt = Attempt(self._layout, self.session_id, header, body)
        self._publish(attempt)
        self._is_there = True
        self._found = written = attempt.snapshot
        if written.header.is_journaled:
            tail = Tail.of(HeadSnapshot(written.header, body.small, body.counts, written.checksum))
            log = self._files.journal(self.session_id, written.header.generation)
            self._known = Known(attempt.opening, log, tail, attempt.version, tail.end)
        return written

    def confirm(self) -> None:
        """Make durable what was read: its writer may have died between its write and its sync."""
        self._require_lock()
        self.require_known()
        known = self.look()
        try:
            if known is None:
                disk.sync_file(self._paths.document)
                disk.sync_directory(self._layout.directory)
            elif known.synced < known.tail.end:
                self._sync_known(known)
        except OSError as error:
            self._write_confirmed(error)

    def _write_confirmed(self, error: OSError) -> None:
        """After a failed fsync, what the kernel still shows of a file proves nothing: write what was checked before."""
        is_failed_sync = isinstance(error, disk.SyncFailed)
        if is_failed_sync:
            self._files.unknown[self.session_id] = _reason(error)
            if self._known is not None:
                self._spoil_journal(self._known.tail.end)
        try:
            found = self._found or self.read()
            self._write(found.header, found.body)
        except CommitFailed as failed:
            if is_failed_sync:
                raise self._failure(CommitUnknown, failed.reason, failed.errno) from failed
            raise
        self._files.unknown.pop(self.session_id, None)

    def delete(self) -> None:
        """Remove the session; durable on return. The document goes first: what is left after a crash is no session."""
        self._require_lock()
        self.require_known()
        self._is_there = False
        with self._refusals():
            # First, so that nothing is emitted behind what a follower takes for the end.
            self._files.events.fence_session(self.session_id)
        with self._refusals():
            # While it can still be refused: a journal that is left behind holds all that was said.
            journals = self._journals(copies=True)
            directory = disk.open_directory(self._layout.directory)
        try:
            with self._refusals():
                disk.unlink(self._paths.document)
            disk.sync_directory(self._layout.directory, directory)
        except CommitFailed:
            raise
        except OSError as error:
            self._files.unknown[self.session_id] = _reason(error)
            raise self._failure(CommitUnknown, _reason(error), error.errno) from error
        finally:
            disk.close_directory(directory)
        self._known = None
        _remove_leftover(self._paths.temp)
        for path, _ in journals:
            _remove_leftover(path)
        with contextlib.suppress(OSError):
            for session_id, stream_id in self._files.leases():
                if session_id == self.session_id:
                    self.remove_lease(stream_id)
        with contextlib.suppress(OSError):
            self._files.events.remove_session(self.session_id)

    def _journals(self, *, copies: bool = False) -> list[tuple[Path, int]]:
        """Those that bear the session's name, with their generations; `copies` of damaged ones, too."""
        found = {name: layout.journal_of(name, copies=copies) for name in disk.names(self._layout.directory)}
        mine = {name: what[1] for name, what in found.items() if what and what[0] == self.session_id}
        return [(self._layout.directory / name, generation) for name, generation in mine.items()]

    def _publish(self, attempt: Attempt) -> None:
        try:
            with self._refusals():
                attempt.run()
        except SyncFailed as failed:
            self._publish_anew(attempt, failed)
        finally:
            self.is_published = self.is_published or attempt.is_visible

    def _publish_anew(self, attempt: Attempt, failed: SyncFailed) -> None:
        """After a failed fsync: once more, to a new inode. If that fails too, a visible commit is of unknown durability."""
        if attempt.is_visible:
            self._files.unknown[self.session_id] = _reason(failed.cause)
        try:
            attempt.run()
        except (OSError, SyncFailed) as error:
            cause = error.cause if isinstance(error, SyncFailed) else error
            if attempt.is_visible:
                self._files.unknown[self.session_id] = _reason(cause)
            kind = CommitUnknown if attempt.is_visible else CommitFailed
            raise self._failure(kind, _reason(cause), cause.errno) from cause
        self._files.unknown.pop(self.session_id, None)

    def require_known(self) -> None:
        """After a `CommitUnknown` nothing more is written, and nothing acknowledged."""
        reason = self._files.unknown.get(self.session_id)
        if reason is not None:
            raise self._failure(CommitUnknown, reason, None)

    def _refusals(self) -> Translating[None]:
        """The disk's own errors, before anything has changed, as `CommitFailed`."""
        return Translating(self._refuse, None)

    def _refuse(self, error: BaseException) -> None:
        if isinstance(error, OSError) and not isinstance(error, PersistError):
            raise self._failure(CommitFailed, _reason(error), error.errno) from error

    def _failure(self, kind: type[PersistError], reason: str, errno: int | None) -> PersistError:
        return kind(session_id=self.session_id, path=self._paths.document, reason=reason, errno=errno)

    # --- leases of this session's streams ---

    def take_lease(self, stream_id: str, description: bytes) -> Lease | None:
        """Create and lock the lease of a new stream; None if one of that id is alive."""
        self._require_lock()
        with self._refusals():
            disk.make_directory(self._layout.leases)
            disk.check_directory(self._layout.leases)
            return lease.take(self._layout.lease(self.session_id, stream_id), description)

    @contextmanager
    def holding_lease_if_dead(self, stream_id: object) -> Iterator[bool]:
        """Try a stream's lease for a block; yield True if the stream is dead. An impossible id was never alive."""
        self._require_lock()
        if not layout.is_stream_id(stream_id):
            yield True
            return
        with self._refusals():
            disk.check_directory(self._layout.leases)
            probe = lease.probe(self._layout.lease(self.session_id, str(stream_id)))
        try:
            yield probe.is_dead
        finally:
            probe.close()

    # --- events of this session's streams ---

    def make_events(self, stream_id: str) -> None:
        """Make the file of a stream's events, so that whoever ends the stream finds where to say it."""
        self._require_lock()
        with self._refusals():
            self._files.events.make(self._files.events.path(self.session_id, stream_id))

    def forget_events(self, stream_id: str) -> None:
        """Remove the events of an earlier stream of that id."""
        self._require_lock()
        with self._refusals():
            self._files.events.remove(self.session_id, stream_id)

    def fence_events(self, stream_id: object, ended: Ended) -> None:
        """End a stream's events before its session is taken away: on return, what it still emits lands nowhere."""
        self._require_lock()
        if layout.is_stream_id(stream_id):
            with self._refusals():
                self._files.events.fence(self.session_id, str(stream_id), ended)

    def end_events(self, stream_id: object, ended: Ended) -> None:
        """End the events of a stream that has ended. If the disk refuses, those who follow find out by the document."""
        self._require_lock()
        if layout.is_stream_id(stream_id):
            with contextlib.suppress(OSError):
                self._files.events.end(self.session_id, str(stream_id), ended)

    def remove_lease(self, stream_id: object) -> None:
        """Remove a stream's lease file, whoever holds it."""
        self._require_lock()
        if layout.is_stream_id(stream_id):
            _remove_leftover(self._layout.lease(self.session_id, str(stream_id)))


def _index_of(found: Snapshot, field: str, wanted: frozenset[bytes]) -> Index:
    try:
        return Index(found.body, field, wanted)
    except snapshot.NONSENSE:
        found.body.data()  # raises, and tells which file it is
        raise


def _remove_leftover(path: Path) -> None:
    """Remove what no longer counts. If the disk refuses, it stays as a left-over, which a sweep or `check` finds."""
    with contextlib.suppress(OSError):
        disk.unlink(path)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


class SessionFiles(SessionDirectory):
    """The sessions of one directory, as files, and the way to change them: a transaction."""

    def read(self, session_id: str, *, decode: bool = False) -> Snapshot:
        """Read the committed document. Takes no lock: some committed revision, never half of one."""
        return self._not_overtaken(session_id, partial(self.read_now, decode=decode))

    def read_head(self, session_id: str) -> HeadSnapshot:
        """Read the committed header and small fields. Takes no lock."""
        return self._not_overtaken(session_id, self.read_head_now)

    def _not_overtaken(self, session_id: str, look: Callable[[str], Found]) -> Found:
        """Start over when a fold comes between document and journal; if it is always so, keep everybody out."""
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(Overtaken):
                return look(session_id)
        try:
            with self.transaction(session_id) as tx:
                return tx.alone(look)
        except NestedLock:
            # Within the block of another session's lock, all that can be done is to try for longer.
            for _ in range(READ_ATTEMPTS_IN_A_LOCK):
                time.sleep(READ_PAUSE_S)
                with contextlib.suppress(Overtaken):
                    return look(session_id)
            raise

    # --- under the session's lock ---

    @contextmanager
    def transaction(
        self, session_id: str, *, may_be_missing: bool = False, lock_timeout_s: float | None = None
    ) -> Iterator[Transaction]:
        """Hold the session's lock for a block.

        A session that is not there raises `SessionNotFound`, and no lock file is left for it.

        Raises:
            LockTimeout, NestedLock: see `lock.hold`.
            CommitUnknown: an earlier commit of this store ended so.
        """
        with self.looking_at(session_id) as path:
            if not may_be_missing and not disk.exists(path):
                raise SessionNotFound(session_id=session_id, path=path)
        timeout_s = self.lock_timeout_s if lock_timeout_s is None else lock_timeout_s
        with lock.hold(self.layout.session(session_id).lock, session_id, timeout_s) as held:
            tx = Transaction(self, session_id, held)
            try:
                # Looked at again by the verb's own read: the session may have gone while we waited.
                yield tx
            finally:
                tx.end()
