"""The transaction *is* the lock: whatever needs a session's lock is a method of what only the lock gives.

    with files.transaction("s-42") as tx:
        snapshot = tx.read()
        tx.commit(snapshot.header.next(), Body.of(data))

A commit: write a temporary file, sync it, rename it over the document, sync the directory; only then is it acknowledged.
Readers need no lock: the rename gives them the old revision or the new one.

After a failed fsync the kernel may have dropped the data and still show it (fsync then even answers OK: measured), so the
file is never synced again or trusted: the whole snapshot is written once more, to a new inode. If that fails too, and the
rename had been done, nobody knows what a power cut would leave: `CommitUnknown`, and no further write to that session.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persist.errors import CommitFailed, CommitUnknown, InvalidSessionId, LockNotHeld, PersistError, SessionNotFound, Unreadable
from persist.files import disk, layout, lease, lock, snapshot
from persist.files.events import Ended, EventFiles
from persist.files.layout import Layout, SessionPaths
from persist.files.lease import Lease
from persist.files.snapshot import Body, Header, HeadSnapshot, Snapshot


class SessionFiles:
    """The sessions of one directory, as files."""

    def __init__(
        self,
        directory: Path,
        *,
        lock_timeout_s: float,
        keep_events_s: float = 300.0,
        allow_network: bool = False,
        create: bool = True,
    ) -> None:
        # The real path: two names of one directory must share their in-process locks, and a chdir must not move the store.
        self.layout = Layout(Path(os.path.realpath(directory)))
        self.lock_timeout_s = lock_timeout_s
        self.events = EventFiles(self.layout, keep_events_s)
        self.unknown: dict[str, str] = {}
        try:
            if create:
                self._make_directories()
            disk.check_file_system(self.layout.directory, allow_network=allow_network)
            self._ignores_case = disk.ignores_case(self.layout.directory, layout.LEASES)
        except PersistError:
            raise
        except OSError as error:
            raise Unreadable.because(self.layout.directory, error) from error

    def _make_directories(self) -> None:
        disk.make_directory(self.layout.leases)
        # Another process may have made them a moment ago: their names must not be lost under our first commit.
        disk.sync_directory(self.layout.directory)
        with contextlib.suppress(PermissionError):
            disk.sync_directory(self.layout.directory.parent)

    # --- without a lock ---

    def exists(self, session_id: str) -> bool:
        with self._looking_at(session_id) as path:
            return disk.exists(path)

    def read(self, session_id: str, *, decode: bool = False) -> Snapshot:
        """Read the committed document. Takes no lock: some committed revision, never half of one."""
        with self._looking_at(session_id) as path:
            return snapshot.read(path, session_id, decode=decode)

    def read_head(self, session_id: str) -> HeadSnapshot:
        """Read the committed header and small fields. Takes no lock."""
        with self._looking_at(session_id) as path:
            return snapshot.read_head(path, session_id)

    @contextmanager
    def _looking_at(self, session_id: str) -> Iterator[Path]:
        path = self._path(session_id)
        try:
            yield path
        except FileNotFoundError:
            raise SessionNotFound(session_id=session_id, path=path) from None
        except PersistError:
            raise
        except OSError as error:
            raise Unreadable.because(path, error) from error

    def session_ids(self) -> list[str]:
        """The ids of all sessions, sorted."""
        return sorted(filter(None, map(layout.session_of_document, self._names())))

    def leases(self) -> list[tuple[str, str]]:
        """The (session id, stream id) of all lease files, sorted; those of dead streams too."""
        try:
            disk.check_directory(self.layout.leases)
            names = disk.names(self.layout.leases)
        except PersistError:
            raise
        except OSError as error:
            raise Unreadable.because(self.layout.leases, error) from error
        return sorted(filter(None, map(layout.stream_of, names)))

    def _names(self) -> list[str]:
        try:
            return disk.names(self.layout.directory)
        except OSError as error:
            raise Unreadable.because(self.layout.directory, error) from error

    def ignored(self) -> list[Path]:
        """JSON files whose names are no session ids, sorted."""
        names = [name for name in self._names() if name.endswith(".json")]
        return sorted(self.layout.directory / name for name in names if layout.session_of_document(name) is None)

    def leftovers(self) -> list[tuple[str, Path]]:
        """Temporary files, and locks without a session: (session id, path), sorted. A commit under way shows as one."""
        found = []
        for name in self._names():
            session_id = layout.session_of_leftover(name)
            path = self.layout.directory / name
            if session_id and (path == self.layout.session(session_id).temp or not self.exists(session_id)):
                found.append((session_id, path))
        return sorted(found)

    def _path(self, session_id: str) -> Path:
        path = self.layout.session(session_id).document
        if self._ignores_case:
            for name in disk.names(self.layout.directory):
                if name != path.name and name.lower() == path.name.lower():
                    reason = f"on this file system it is the same name as {name.removesuffix('.json')!r}."
                    raise InvalidSessionId(session_id=session_id, reason=reason)
        return path

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
        with self._looking_at(session_id) as path:
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


class Transaction:
    """What may be done while a session's lock is held. After the block, every method raises `LockNotHeld`."""

    def __init__(self, files: SessionFiles, session_id: str, held: lock.HeldFile) -> None:
        self.session_id = session_id
        self._files = files
        self._layout = files.layout
        self._paths = files.layout.session(session_id)
        self._held: lock.HeldFile | None = held
        self._is_there = False
        #: Whether the last commit became visible, also if an exception came after that.
        self.is_published = False

    def _require_lock(self) -> None:
        if self._held is None or not self._held.is_held:
            raise LockNotHeld(session_id=self.session_id)

    def end(self) -> None:
        """End the transaction; a lock file without a session is removed by its last holder."""
        if self._held is not None and self._held.is_held and not self._is_there:
            # Nothing that goes wrong here may hide what the verb has to say.
            with contextlib.suppress(OSError):
                if not disk.exists(self._paths.document):
                    disk.unlink(self._paths.lock)
        self._held = None

    def exists(self) -> bool:
        self._require_lock()
        with self._refusals():
            return disk.exists(self._paths.document)

    def read(self) -> Snapshot:
        """Read the committed document."""
        self._require_lock()
        found = self._files.read(self.session_id)
        self._is_there = True
        return found

    def read_edited(self) -> tuple[Header, Body]:
        """Read a document whose checksum need not match."""
        self._require_lock()
        with self._refusals():
            return snapshot.read_edited(self._paths.document, self.session_id)

    def commit(self, header: Header, body: Body) -> Snapshot:
        """Write a revision; durable and visible on return.

        Raises:
            CommitFailed: the disk refused; the old revision stands.
            CommitUnknown: it is visible, but may not survive a power cut.
        """
        self._require_lock()
        self.require_known()
        content, checksum = snapshot.to_bytes(header, body)
        self._publish(content)
        self._is_there = True
        return Snapshot(header, body, checksum)

    def confirm(self, found: Snapshot) -> None:
        """Make durable what was read: its writer may have died between its rename and its sync."""
        self._require_lock()
        self.require_known()
        try:
            disk.sync_file(self._paths.document)
            disk.sync_directory(self._layout.directory)
        except disk.SyncFailed as error:
            # What the kernel still shows of that file proves nothing any more: write what was checked before.
            self._files.unknown[self.session_id] = _reason(error)
            try:
                self._publish(snapshot.to_bytes(found.header, found.body)[0])
            except CommitFailed as failed:
                raise self._failure(CommitUnknown, failed.reason, failed.errno) from failed
            self._files.unknown.pop(self.session_id, None)
        except OSError:
            self._publish(snapshot.to_bytes(found.header, found.body)[0])

    def delete(self) -> None:
        """Remove the session; durable on return. The document goes first: what is left after a crash is no session."""
        self._require_lock()
        self.require_known()
        self._is_there = False
        with self._refusals():
            # First, so that nothing is emitted behind what a follower takes for the end.
            self._files.events.fence_session(self.session_id)
        with self._refusals():
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
        _remove_leftover(self._paths.temp)
        with contextlib.suppress(OSError):
            for session_id, stream_id in self._files.leases():
                if session_id == self.session_id:
                    self.remove_lease(stream_id)
        with contextlib.suppress(OSError):
            self._files.events.remove_session(self.session_id)

    def _publish(self, content: bytes) -> None:
        attempt = _Attempt(self._layout.directory, self._paths, content)
        try:
            with self._refusals():
                attempt.run()
        except _SyncFailed as failed:
            self._publish_anew(attempt, failed)
        finally:
            self.is_published = attempt.is_visible

    def _publish_anew(self, attempt: _Attempt, failed: _SyncFailed) -> None:
        """After a failed fsync: once more, to a new inode. If that fails too, a visible commit is of unknown durability."""
        if attempt.is_visible:
            self._files.unknown[self.session_id] = _reason(failed.cause)
        try:
            attempt.run()
        except (OSError, _SyncFailed) as error:
            cause = error.cause if isinstance(error, _SyncFailed) else error
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

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """The disk's own errors, before anything has changed, as `CommitFailed`."""
        try:
            yield
        except PersistError:
            raise
        except OSError as error:
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


def _remove_leftover(path: Path) -> None:
    """Remove what no longer counts. If the disk refuses, it stays as a left-over, which a sweep or `check` finds."""
    with contextlib.suppress(OSError):
        disk.unlink(path)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


class _SyncFailed(Exception):
    """An fsync failed."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


class _Attempt:
    """The commit protocol. `is_visible` tells whether a rename was done, in this run or an earlier one."""

    def __init__(self, directory: Path, paths: SessionPaths, content: bytes) -> None:
        self._directory = directory
        self._temp = paths.temp
        self._path = paths.document
        self._content = content
        self.is_visible = False

    def run(self) -> None:
        """Write, sync, rename, sync: on return the content is durable and visible."""
        # Now, while nothing is visible: without a free descriptor after the rename, nobody would know its outcome.
        directory = disk.open_directory(self._directory)
        try:
            self._publish()
            try:
                disk.sync_directory(self._directory, directory)
            except OSError as error:
                raise _SyncFailed(error) from error
        finally:
            disk.close_directory(directory)

    def _publish(self) -> None:
        try:
            self._write_temp()
            disk.replace(self._temp, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.unlink(self._temp)
            raise
        self.is_visible = True

    def _write_temp(self) -> None:
        fd = self._create_temp()
        try:
            disk.write(fd, self._content)
            try:
                disk.sync(fd)
            except OSError as error:
                raise _SyncFailed(error) from error
        finally:
            disk.close(fd)

    def _create_temp(self) -> int:
        try:
            return disk.create(self._temp)
        except FileExistsError:
            # We hold the lock, so its writer is dead.
            disk.unlink(self._temp)
            return disk.create(self._temp)
