"""Backup: a copy of a live store, session by session, as whole documents without journals.

Each session is read under its lock, so a copy is one commit of it. The copy is written to another inode and renamed, so
at every instant the old copy or the new one is there. No file of the copy is a hard link to a file of the store,
because a journal is written in place, and a link to it would go on changing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persist import engines, errors, json_codec, streams
from persist.arguments import expanded, is_url, require_flags
from persist.files import FileEngine
from persist.maintenance import Step
from persist.storage import commit, disk, document, layout
from persist.storage.cache import Replica
from persist.storage.document import Header
from persist.storage.held import HeldFile, try_hold

FORMAT = 1
_REMEDY = "Backups of a database are PostgreSQL's own: pg_dump --schema=NAME DATABASE, say."
_MARKER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Backup:
    """The result of a backup.

    Attributes:
        path: the directory with the copies.
        copied: the sessions that were written.
        unchanged: the sessions whose copy was of the same version already.
        gone: the sessions that the store no longer has, and whose copies stay.
        removed: the sessions whose copies were removed, because the backup was asked to.
        failures: the errors of the sessions that could not be copied, by the session's id. If the name of the files
            tells no id, that name is the key. An earlier copy of such a session stays.
    """

    path: Path
    copied: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)

    def add(self, other: Backup) -> None:
        """Add the result of a further step."""
        self.copied.extend(other.copied)
        self.unchanged.extend(other.unchanged)
        self.gone.extend(other.gone)
        self.removed.extend(other.removed)
        self.failures.update(other.failures)


def backup(backend: streams.Backend, dest: str | os.PathLike[str], *, prune: bool, timeout_s: float | None) -> Backup:
    """Copy a store. See `Store.backup`."""
    done = Backup(Path(_directory(engines.require_files(backend.engine, _REMEDY), dest)))
    for step in backing_up(backend, dest, prune=prune, timeout_s=timeout_s):
        done.add(step.found)
    return done


def backing_up(
    backend: streams.Backend, dest: str | os.PathLike[str], *, prune: bool = False, timeout_s: float | None = None
) -> Generator[Step[Backup], None, None]:
    """Copy one session after the other. Each step holds the result of one.

    If the generator is closed early, every copy that was made is whole.
    """
    require_flags(prune=prune)
    files = engines.require_files(backend.engine, _REMEDY)
    directory = _directory(files, dest)
    names = sorted(filter(None, map(layout.name_of_document, files.names())))
    in_store = set(names)
    with _Copies(directory, files.layout.directory) as copies:
        gone = [name for name in copies.names if name not in in_store]
        if prune and gone and len(gone) == len(copies.names):
            # The disk of the store may not be mounted. Then a server may have begun a new store in its place.
            got, expected = "without any of the sessions that have a copy", "one with some of them, to remove copies"
            raise errors.InvalidArgument(what=f"the store {files.layout.directory}", got=got, expected=expected)
        total = len(names) + len(gone)
        for done, name in enumerate(names, 1):
            yield Step(done, total, _copy(files, copies, name, timeout_s))
        for done, name in enumerate(gone, len(names) + 1):
            found = Backup(Path(directory))
            # The session may have been created since the listing.
            if not disk.exists(files.layout.named(name, None).document):
                session_id = copies.id_of(name)
                if prune:
                    copies.remove(name, session_id)
                (found.removed if prune else found.gone).append(session_id)
            yield Step(done, total, found)


def _copy(files: FileEngine, copies: _Copies, name: str, timeout_s: float | None) -> Backup:
    """Copy a session, unless its copy has the same version."""
    found = Backup(Path(copies.directory))
    session_id = files.id_of(name)
    there = copies.version_of(name, session_id)
    try:
        copies.require_own_name(name, session_id or name)
        if there is not None and session_id is not None:
            # This needs no lock, because a head belongs to one commit.
            with contextlib.suppress(errors.CorruptSession, errors.Unreadable):
                if files.read_head(session_id).header.version == there:
                    found.unchanged.append(session_id)
                    return found
        with files.transaction_on(name, session_id, timeout_s) as tx:
            if session_id is None and tx.exists():
                # The first look at the header took no lock, so it is repeated.
                session_id = files.id_of(name)
            if session_id is None:
                if tx.exists():
                    reason = "holds no session id that fits the hash in its name."
                    raise errors.CorruptSession(session_id=name, path=tx.paths.document, reason=reason)
                return found
            known_id = session_id
            replica = tx.undisturbed(lambda _: files.read_now(known_id))
    except errors.SessionNotFound:
        # The session was deleted in between.
        return found
    except (errors.PersistError, OSError) as error:
        if isinstance(error, errors.LockError) and not isinstance(error, errors.LockTimeout):
            # This thread itself holds a session's lock.
            raise
        found.failures[session_id or name] = error
        return found
    copies.write(name, session_id, replica)
    found.copied.append(session_id)
    return found


class _Copies:
    """The directory of a backup, for a block. Only one process writes to it at a time.

    Its mark is a file that names the store. No directory without the mark is written to, because a backup removes and
    replaces the files that bear the name of a session.

    Attributes:
        names: the names of the sessions that have a copy.
    """

    def __init__(self, directory: str, source: str) -> None:
        self.directory = directory
        self.names: list[str] = []
        self._layout = layout.Layout(directory)
        self._source = source
        self._held: HeldFile | None = None
        #: The leases, by the name of their session.
        self._leases: dict[str, set[str]] = {}
        #: On a disk that ignores case, the names that are written, by their lower case. Otherwise None.
        self._folded: dict[str, str] | None = None

    def __enter__(self) -> _Copies:
        try:
            self._open()
        except errors.PersistError:
            self._close()
            raise
        except OSError as error:
            self._close()
            reason = f"The backup's directory {self.directory} cannot be used: {error.strerror}."
            remedy = "Mend that, and repeat the backup."
            raise errors.PersistError(reason=reason, remedy=remedy, path=self.directory) from error
        return self

    def _open(self) -> None:
        disk.make_directory(self.directory)
        names = disk.names(self.directory)
        if names and layout.BACKUP not in names:
            got = "one with other files, or a backup that was written to as a store"
            raise _unfit(self.directory, got, "Choose another directory.")
        marker = os.path.join(self.directory, layout.BACKUP)
        self._held = try_hold(marker, create=True)
        if self._held is None:
            reason = f"Another backup writes to {self.directory}."
            raise errors.LockError(kind="timeout", reason=reason, remedy="Wait for it, and repeat this one.")
        self._check_mark(self._held.fd, marker, is_new=not any(map(layout.name_of_document, names)))
        disk.check_directory(self._layout.leases)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(self._layout.leases)
        for name, stream_id in filter(None, map(layout.stream_of, disk.names(self._layout.leases))):
            self._leases.setdefault(name, set()).add(stream_id)
        self._folded = {} if disk.ignores_case(self.directory, layout.LEASES) else None
        for name in names:
            left = layout.name_of_leftover(name)
            if left is not None and left[1]:
                # A backup that was killed has left it.
                disk.unlink(os.path.join(self.directory, name))
        self.names = sorted(filter(None, map(layout.name_of_document, names)))

    def _check_mark(self, fd: int, path: str, *, is_new: bool) -> None:
        """Mark a new backup, and refuse one of another store."""
        try:
            found: Any = json_codec.decode(disk.read_at(fd, _MARKER_BYTES, 0))
            version, store = found["persist_backup"], found["store"]
        except document.NONSENSE:
            if not is_new:
                remedy = "Choose another directory, or remove all of this one."
                raise _unfit(self.directory, "one whose mark was damaged", remedy) from None
            content = json_codec.encode({"persist_backup": FORMAT, "store": self._source}) + b"\n"
            disk.truncate(fd, 0)
            disk.write_at(fd, content, 0)
            disk.sync(fd)
            disk.sync_directory(self.directory)
            return
        if version != FORMAT or store != self._source:
            remedy = f"Choose another directory. If the store was moved, write its path into {path}."
            raise _unfit(self.directory, f"one of {store}", remedy)

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        try:
            for directory in (self._layout.leases, self.directory):
                disk.sync_directory(directory)
        except OSError as error:
            if kind is None:
                reason = f"It is unknown whether the copies in {self.directory} are durable: {error.strerror}."
                remedy = "Look at that disk, and back up into a new directory."
                raise errors.PersistError(reason=reason, remedy=remedy, path=self.directory) from error
        finally:
            self._close()

    def _close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def id_of(self, name: str) -> str:
        """Return the session id of a copy, or the name of its files if that cannot be told."""
        if (session_id := layout.id_of(name)) is not None:
            return session_id
        with contextlib.suppress(errors.PersistError, OSError):
            found = document.read_head(self._layout.named(name, None).document, name)[0].header.session_id
            return found or name
        return name

    def version_of(self, name: str, session_id: str | None) -> str | None:
        """Return the version of a copy, or None if there is no copy, or if it cannot be read."""
        if session_id is None:
            return None
        paths = self._layout.named(name, session_id)
        try:
            return document.read_head(paths.document, session_id, paths.file_id)[0].header.version
        except (errors.PersistError, OSError, json_codec.Undecodable):
            return None

    def require_own_name(self, name: str, session_id: str) -> None:
        """Raise `InvalidArgument` if the disk of the copies takes the name for the name of another copy."""
        if self._folded is not None and self._folded.setdefault(name.lower(), name) != name:
            expected = f"another name than {self._folded[name.lower()]!r} on that disk, which heeds no case"
            what = f"the copy of session {session_id!r}"
            raise errors.InvalidArgument(what=what, got=f"called {name!r}", expected=expected)

    def write(self, name: str, session_id: str, found: Replica) -> None:
        """Write a copy, in the place of an earlier one.

        Raises:
            CommitFailed: the disk refused.
        """
        self._require_mark()
        paths = self._layout.named(name, session_id)
        text = document.to_bytes(found.header.but(journal=None, folded=None), found.content)
        stream_id = streams.active_in(found.content)
        try:
            # The lease comes before the document that needs it. By it a sweep of the restored copy finds the stream.
            leases: set[str] = set()
            if layout.is_stream_id(stream_id):
                leases.add(stream_id)
                commit.write_new(paths.lease(stream_id), _lease(found.header, session_id, stream_id))
            try:
                commit.write_new(paths.temp, text)
                # By it `recent` knows the order in a store that is restored from here.
                disk.touch(paths.temp, int(found.header.updated_at.timestamp() * 1e9))
                disk.replace(paths.temp, paths.document)
            except BaseException:
                disk.remove_quietly(paths.temp)
                raise
            self._remove_leases(paths, keep=leases)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            facts = {"path": paths.document, "reason": reason, "errno": error.errno}
            remedy = "Mend that, and back up again: what is copied stands."
            raise errors.CommitFailed(session_id=session_id, remedy=remedy, **facts) from error

    def remove(self, name: str, session_id: str) -> None:
        """Remove a copy.

        Raises:
            CommitFailed: the disk refused.
        """
        self._require_mark()
        paths = self._layout.named(name, None)
        try:
            disk.unlink(paths.document)
            self._remove_leases(paths, keep=set())
            disk.unlink(paths.lock)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise errors.CommitFailed(
                session_id=session_id, path=paths.document, reason=reason, errno=error.errno
            ) from error

    def _require_mark(self) -> None:
        """Raise `InvalidArgument` if somebody writes to this directory as to a store, which takes the mark away."""
        if self._held is None or not self._held.bears_name():
            raise _unfit(self.directory, "a backup that is in use as a store", "Back up into another directory.")

    def _remove_leases(self, paths: layout.SessionPaths, *, keep: set[str]) -> None:
        for stream_id in self._leases.get(paths.name, set()) - keep:
            disk.unlink(paths.lease(stream_id))
        self._leases[paths.name] = keep


def _lease(header: Header, session_id: str, stream_id: str) -> bytes:
    """Return the content of a lease of that stream. Nobody holds the lease, so the stream is dead."""
    owner = streams.owner_of(header, stream_id)
    facts = {} if owner is None else {"pid": owner.pid, "started_at": owner.started_at}
    return json_codec.encode({**facts, "session_id": session_id})


def _directory(files: FileEngine, dest: object) -> str:
    """Return the real path of a backup's directory, which need not exist yet."""
    if is_url(dest):
        got, remedy = "a URL", "Copy sessions into a database with 'persist copy'."
        raise errors.InvalidArgument(what="a backup's path", expected="a directory's name", got=got, remedy=remedy)
    path = os.fspath(dest) if isinstance(dest, (str, os.PathLike)) else None
    if type(path) is not str or not path or "\0" in path:
        raise errors.InvalidArgument(what="a backup's path", expected="a directory's name", got=repr(dest))
    path, store = os.path.realpath(expanded(path)), files.layout.directory
    if path == store or path.startswith(os.path.join(store, "")):
        raise _unfit(path, "the store itself, or within it", "Choose a directory beside it, or on another disk.")
    if os.path.exists(path) and not os.path.isdir(path):
        raise _unfit(path, "a file", "Choose another name.")
    return path


def _unfit(path: str, got: str, remedy: str) -> errors.InvalidArgument:
    expected = "a new directory, an empty one, or an earlier backup of this store"
    return errors.InvalidArgument(what=f"the directory {path}", got=got, expected=expected, remedy=remedy)
