"""The transaction *is* the lock: each operation that needs a session's lock is a method of the transaction.

Only the lock gives a transaction:

    with files.transaction("s-42") as tx:
        found = tx.read()
        tx.commit(found.header.next(), content)

Readers need no lock, because they see the old revision or the new one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from persist import json_codec
from persist.arguments import seconds
from persist.errors import CorruptSession, LockError, PersistError, not_held
from persist.log import log
from persist.storage import commit, diff, disk
from persist.storage.cache import Replica
from persist.storage.clock import file_time_ns
from persist.storage.content import Content
from persist.storage.diff import Change
from persist.storage.directory import SessionDirectory, is_left_over, missing_journal, raise_typed
from persist.storage.document import Head, Header
from persist.storage.held import HeldFile
from persist.storage.journal import Overtaken
from persist.storage.layout import SessionPaths
from persist.storage.lease import End
from persist.storage.locked import LockedBlock
from persist.storage.salvage import salvage

Found = TypeVar("Found")
#: How often a reader whose journal has vanished starts over before it takes the lock.
READ_ATTEMPTS = 3
READ_ATTEMPTS_IN_A_LOCK, READ_PAUSE_S = 20, 0.001
#: A lock file whose time is younger gets no other one.
_MARK_NS = 1_000_000_000


class Transaction(commit.Place):
    """The operations on a session whose lock is held. After the block, every method raises `LockError`."""

    def __init__(self, files: SessionFiles, paths: SessionPaths, session_id: str, held: HeldFile) -> None:
        self.session_id = session_id
        self.paths = paths
        self.place = paths.document
        self.options = files.options
        self.unknown = files.unknown
        self.is_visible = self.is_marked = False
        self._files = files
        self._held: HeldFile | None = held
        self._is_there = False
        #: The committed session, if it was read. While a write is under way it is None, so that an exception drops the
        #: replica.
        self._replica: Replica | None = None
        #: The journal of `_replica`, if it is open.
        self._fd = -1

    def require_lock(self) -> None:
        """Raise `LockError` after the block, and in a forked child."""
        if self._held is None or self._held.fd < 0 or self._held.pid != os.getpid():
            raise not_held(self.session_id)

    def end(self) -> None:
        """End the transaction. If there is no session, remove its lock file."""
        held, replica, fd, self._held, self._fd = self._held, self._replica, self._fd, None, -1
        if fd >= 0:
            try:
                disk.close(fd)
            except OSError:
                pass  # synced bytes stay durable, whatever becomes of the descriptor
        if replica is not None and replica.tail is not None:
            self._files.cache.put(self.session_id, replica)
        if not self._is_there and held is not None and held.is_held:
            # An error here must not hide the verb's own result or error.
            with contextlib.suppress(OSError):
                if not disk.exists(self.paths.document):
                    disk.unlink(self.paths.lock)

    def _forget(self) -> None:
        """Forget what was read, and close the journal."""
        fd, self._fd, self._replica = self._fd, -1, None
        if fd >= 0:
            with contextlib.suppress(OSError):
                disk.close(fd)

    # --- reading ---

    def exists(self) -> bool:
        """Tell whether the session has a document, readable or not."""
        self.require_lock()
        with self.refusals():
            if disk.exists(self.paths.document):
                return True
            self._files.require_same()
            return False

    def read(self) -> Replica:
        """Return the committed session. The caller changes it only through `commit`.

        Raises:
            SessionNotFound: there is none.
            CorruptSession, UnsupportedFormat, Unreadable: as `document.read`.
        """
        if self._held is None:
            self.require_lock()
        if self._replica is None:
            try:
                version = disk.version_of(self.paths.document)
                self._is_there = True
                kept = self._files.cache.take(self.session_id)
                found = self._caught_up(kept) if kept is not None and kept.version == version else None
                self._replica = found or self._read_anew()
            except (OSError, json_codec.Undecodable) as error:
                if isinstance(error, FileNotFoundError):
                    self._files.require_same()
                raise_typed(error, self.session_id, self.paths.document)
                raise
        return self._replica

    def _caught_up(self, kept: Replica) -> Replica | None:
        """Bring a replica up to date. Return None if its journal does not go on from it, because then it is void."""
        tail = kept.tail
        assert tail is not None
        try:
            self._fd = disk.open_unseen(self.paths.journal(tail.name), os.O_RDWR)
            is_end = tail.is_end_of(self._fd)
            if is_end is False:
                kept.header, kept.content = self.journal(tail.name).catch_up(self._fd, kept.header, kept.content, tail)
                log.debug("Session %r: caught up with its journal, at byte %d", self.session_id, tail.end)
            elif is_end is None:
                log.warning("Session %r: its journal is older than what was read of it before", self.session_id)
            if is_end is not None and not tail.is_torn:
                return kept
        except (FileNotFoundError, Overtaken, CorruptSession):
            pass
        # If something is wrong, the read of the files reports it.
        self._forget()
        return None

    def undisturbed(self, look: Callable[[str], Found]) -> Found:
        """Read the files. A journal that is not there is missing, because nobody can fold while the lock is held."""
        try:
            return look(self.session_id)
        except Overtaken as error:
            raise missing_journal(self.paths.document, self.session_id, error.args[0]) from None

    def _read_anew(self) -> Replica:
        found = self.undisturbed(self._files.read_now)
        if found.tail is not None:
            self._fd = self.journal(found.tail.name).open(os.O_RDWR)
        return found

    def head(self) -> Head:
        """Return the committed header and fields, without reading the rest if no replica is at hand."""
        self.require_lock()
        if self._replica is None and not self._files.cache.has(self.session_id):
            found = self.undisturbed(self._files.read_head_now)
            self._is_there = True
            return found
        replica = self.read()
        return Head(replica.header, replica.content.fields, replica.content.counts)

    # --- writing ---

    def require_unchanged(self) -> None:
        """Raise `CommitFailed` if another program has replaced the document since it was read.

        The other program ignores the lock. The check is for a verb in which the caller's own code has run since the
        read.
        """
        self.require_lock()
        with self.refusals():
            if self._replica is not None and disk.version_of(self.paths.document) != self._replica.version:
                self._replica = None
                raise OSError(None, "another program replaced it without the lock")

    def commit(
        self, header: Header, content: Content, changes: tuple[Change, ...] | None = None, end: End | None = None
    ) -> Replica:
        """Write a revision. It is durable and visible on return.

        Args:
            changes: the changes that turn the values that stand apart into those of `content`. If it is None, the
                values are compared.
            end: the stream that ends with this commit.

        Raises:
            CommitFailed: the disk refused. The old revision stands.
            CommitUnknown: it is visible, but may not survive a power cut.
        """
        if self._held is None or self._held.pid != os.getpid():
            self.require_lock()
        if not self._files.is_durable:
            with self.refusals():
                self._files.make_durable()
        if end is not None and end.is_forced:
            self._fence(end)
        before, self._replica = self._replica, None
        if before is not None and before.tail is not None:
            if changes is None:
                changes = diff.between(before.content, content)
            if self._fd < 0:
                with self.refusals():
                    self._fd = disk.open_unseen(self.paths.journal(before.tail.name), os.O_RDWR)
        if before is None or header.updated_at != before.header.updated_at:
            # `recent` goes by the time of the lock file. The mark comes first, because a process that is killed between
            # the two must not leave a session that looks older than it is.
            held = self._held
            if held is not None and not 0 <= file_time_ns() - held.status.st_mtime_ns < _MARK_NS:
                held.touch()
        after = commit.commit(self, before, header, content, changes or (), self._fd)
        if before is not None and before.tail is after.tail:
            self._replica = after
        else:
            self._written(before, after)
        if end is not None:
            self._end(end)
        return after

    def _fence(self, end: End) -> None:
        """End the events of a stream whose owner may be alive, before a commit."""

    def _end(self, end: End) -> None:
        """End a stream after a commit. It cannot fail, because the commit stands."""

    def _written(self, before: Replica | None, after: Replica) -> Replica:
        if before is None or before.tail is not after.tail:
            self._forget()
        self._replica, self._is_there = after, True
        return after

    def confirm(self, *, is_durable: bool = False) -> Replica:
        """Make the revision that was read durable, before a verb acknowledges it without a commit. Return it.

        `is_durable` says that the caller has made it durable before. Then only an unknown outcome counts.
        """
        self.require_lock()
        if is_durable:
            self.require_known()
            return self.read()
        if not self._files.is_durable:
            with self.refusals():
                self._files.make_durable()
        before = self.read()
        self._replica = None
        return self._written(before, commit.confirm(self, before, self._fd))

    def compact(self, *, alone: bool = False) -> bool:
        """Fold the journal into the document. Durable on return. Tell whether there was anything to fold.

        `alone` leaves the session without a journal until its next commit. Files that crashes left behind are removed.
        """
        self.require_lock()
        self.require_known()
        before = self.read()
        is_needed = before.tail is not None and (
            alone or not before.tail.is_empty or not self.options.wants_journal(before.header, before.content)
        )
        if is_needed:
            self._replica = None
            commit.verify(self, before)
            after = commit.write_document(self, before, before.header, before.content, alone=alone)
            if before.tail is not None:
                commit.tell_fold(self, before.tail)
            self._written(before, after)
        header = self.read().header
        with contextlib.suppress(PersistError, OSError):
            disk.unlink(self.paths.temp)
            for path, name in self._files.journals(self.session_id):
                if name != header.journal and is_left_over(path, name, header):
                    disk.unlink(path)
        return is_needed

    def accept(self, *, drop_journal: bool = False) -> Replica:
        """Take a session as it is after an edit by hand, or after damage. Leave a sound session alone.

        Raises:
            CorruptSession: the document is no JSON object, or its journal does not fit the edit.
        """
        self.require_lock()
        self.require_known()
        with self.refusals():
            self._files.make_durable()
        # Only the files count here, because a replica may go back to before the damage.
        self._forget()
        self._files.cache.take(self.session_id)
        try:
            self.read()
            if not drop_journal:
                return self.confirm()
        except CorruptSession:
            self._is_there = True
        self._forget()
        with self.refusals():
            before, header, content = salvage(self, drop_journal=drop_journal)
        after = commit.write_document(self, before, header.next(), content)
        return self._written(None, after)

    def put(self, header: Header, content: Content) -> Replica:
        """Write a session whole, in the place of whatever is there. Durable on return."""
        self.require_lock()
        self._forget()
        self._files.cache.take(self.session_id)
        with self.refusals():
            self._files.make_durable()
            # A look at the whole directory would make the copy of many sessions slow.
            journals = list(self._files.journals(self.session_id)) if self.exists() else []
        after = commit.replace_damaged(self, header, content, journals)
        with contextlib.suppress(OSError):
            # By it `recent` knows the order, also of copies that are older than now.
            disk.touch(self.paths.lock, int(header.updated_at.timestamp() * 1e9))
        return self._written(None, after)

    def delete(self) -> None:
        """Remove the session, also one that cannot be read. Durable on return."""
        self.require_lock()
        self._files.require_same()
        with contextlib.suppress(PersistError):
            self.read()
        before, self._replica, self._is_there = self._replica, None, False
        with self.refusals():
            # The journals are listed while the delete can still be refused. A journal that is left behind would still
            # hold the messages of the session.
            journals = [path for path, _ in self._files.journals(self.session_id, copies=True)]
        commit.delete(self, before, journals)


class SessionFiles(SessionDirectory):
    """The sessions of one directory, as files, and the way to change them: a transaction."""

    #: The kind of transaction that a hold of the lock gives.
    transactions: type[Any] = Transaction

    def read(self, session_id: str) -> Replica:
        """Read the committed session, without a lock: some committed revision, never half of one."""
        return self._not_overtaken(session_id, self.read_now)

    def read_head(self, session_id: str) -> Head:
        """Read the committed header and fields, without a lock."""
        return self._not_overtaken(session_id, self.read_head_now)

    def read_last(self, session_id: str, name: str, limit: int) -> list[Any]:
        """Read the last items of a list, without a lock."""
        try:
            return self._not_overtaken(session_id, lambda session_id: self.read_last_now(session_id, name, limit))
        except CorruptSession:
            # The end of the file was read without its checksum. The whole tells what is wrong, an edit by hand say.
            self.read(session_id)
            raise

    def _not_overtaken(self, session_id: str, look: Callable[[str], Found]) -> Found:
        """Read again when a fold comes between document and journal. If that happens each time, take the lock."""
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(Overtaken):
                return look(session_id)
        try:
            with self.transaction(session_id) as tx:
                found: Found = tx.undisturbed(look)
                return found
        except LockError:
            # Within the block of another session's lock, the reader can only try for longer.
            for _ in range(READ_ATTEMPTS_IN_A_LOCK):
                time.sleep(READ_PAUSE_S)
                with contextlib.suppress(Overtaken):
                    return look(session_id)
            raise

    def transaction(self, session_id: str, timeout_s: float | None = None, *, seeking: object = None) -> Locked:
        """Return a hold of the session's lock for a block, which gets a transaction.

        The items that the block is `seeking` are here already. If the session turns out not to be there, no lock file
        is left.

        Raises:
            InvalidArgument: an argument is not what it must be.
            LockTimeout, LockError, CommitFailed: raised on entry to the block. See `lock.Hold`.
        """
        paths = self.paths_of(session_id) if self.ignores_case else self.layout.session(session_id)
        timeout_s = self.timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        locked = Locked(paths.lock, session_id, timeout_s)
        locked.files, locked.paths, locked.place = self, paths, paths.document
        locked.tx, locked.is_new = None, False
        locked.mode = self.options.file_mode
        return locked

    def transaction_on(self, name: str, session_id: str | None, timeout_s: float | None = None) -> Locked:
        """Return a hold as `transaction` does, for the session whose files bear a name.

        The name is needed because a damaged file may not tell its session's id.
        """
        paths = self.layout.named(name, session_id)
        timeout_s = self.timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        locked = Locked(paths.lock, session_id or name, timeout_s)
        locked.files, locked.paths, locked.place = self, paths, paths.document
        locked.tx, locked.is_new = None, False
        return locked


class Locked(LockedBlock):
    """The hold of a session's lock for a block, which gets its transaction."""

    __slots__ = ("files", "is_new", "paths")
    files: SessionFiles
    is_new: bool
    paths: SessionPaths

    def before_create(self) -> None:
        """Note that the lock file is about to be created, in the directory that the store has opened."""
        self.is_new = True
        self.files.require_same()

    def __enter__(self) -> Any:
        self.tx = self.files.transactions(self.files, self.paths, self.session_id, self.acquire())
        if self.is_new:
            self._take_time_of_document()
        return self.tx

    def _take_time_of_document(self) -> None:
        """Date a new lock file as its document, which is older. Else a mere look would bring a session to the top."""
        with contextlib.suppress(OSError):
            disk.touch(self.paths.lock, int(disk.modified_at(self.paths.document) * 1e9))
