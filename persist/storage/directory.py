"""A directory of sessions, as its readers see it.

Readers take no lock. They see some committed revision of each session, never half of one.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from persist import json_codec
from persist.errors import CorruptSession, InvalidArgument, PersistError, SessionNotFound, Unreadable, shown
from persist.storage import disk, document, file_system, journal, layout
from persist.storage.cache import Cache, Replica
from persist.storage.commit import Options
from persist.storage.document import Head, Header
from persist.translating import Translating

#: So many heads of sessions with a journal are kept, each with at most so many bytes of fields.
_MOST_HEADS, _KEPT_BYTES = 1024, 4096


class _KeptHead(msgspec.Struct, frozen=True, eq=False):
    """The head of a session with a journal, as it was read.

    The rule that validates a replica validates this head, too (see `cache`). The head of a document without a journal
    is not kept, because nothing in it would tell it from a later one of the same size, inode and time.
    """

    version: disk.Version
    tail: journal.Tail
    head: Head

    def is_last(self, paths: layout.SessionPaths) -> bool:
        """Tell whether nothing was committed since. If that cannot be told, the answer is False."""
        try:
            if disk.version_of(paths.document) != self.version:
                return False
            fd = disk.open_unseen(paths.journal(self.tail.name), os.O_RDONLY)
            try:
                return self.tail.is_end_of(fd) is True
            finally:
                disk.close(fd)
        except OSError:
            return False


class SessionDirectory:
    """The sessions of one directory, as files, and the reads that need no lock."""

    def __init__(
        self, path: str, options: Options, *, timeout_s: float, cache_bytes: int, unsafe_filesystem: bool, create: bool
    ) -> None:
        self.layout = layout.Layout(path)
        self.options = options
        self.timeout_s = timeout_s
        self.cache = Cache(cache_bytes)
        #: Whether this process has made the directory's own name durable, and the name of the leases' directory.
        #: Another process may have created the directories a moment ago.
        self.is_durable = self.has_durable_leases = False
        #: Session id -> its head. A head is never changed in place, so that no reader needs a lock.
        self._heads: dict[str, _KeptHead] = {}
        #: Session id -> the reason why nobody knows whether its last commit is durable.
        self.unknown: dict[str, str] = {}
        try:
            if create:
                disk.make_directory(self.layout.directory, options.file_mode)
                _require_shared(self.layout.directory, options.file_mode)
                with contextlib.suppress(FileExistsError):
                    disk.mkdir(self.layout.leases, options.file_mode)
            #: The device and the inode of the directory that was opened. On some file systems only the device counts.
            status = os.stat(self.layout.directory)
            self._identity = status.st_dev, status.st_ino
            self._has_stable_inode = not unsafe_filesystem and file_system.check(
                self.layout.directory, self._identity[0]
            )
            for each in (self.layout.directory, self.layout.leases, self.layout.events):
                _require_shared(each, options.file_mode)
            self._has_leases = create or disk.exists(self.layout.leases)
            self.ignores_case = disk.ignores_case(self.layout.directory, layout.LEASES)
        except PersistError:
            raise
        except OSError as error:
            raise Unreadable.because(self.layout.directory, error) from error

    def require_same(self, *, is_missing: bool = True) -> None:
        """Raise `Unreadable` if the directory is gone, or is not the directory that was opened.

        A lost mount leaves an empty directory behind, which must not look like a store without sessions. This check
        runs when a file is missing, and in each verb that reads files anew. A kept replica or head does not need it,
        because it is compared with the document's inode anyway.

        Args:
            is_missing: whether a file was not found in the directory.
        """
        directory = self.layout.directory
        try:
            device, inode = disk.identity_of(directory)
            is_same = device == self._identity[0] and (inode == self._identity[1] or not self._has_stable_inode)
            # A directory that was made anew may have the inode of the one before. It lacks the files of a store.
            if is_same and is_missing and self._has_leases and not disk.exists(self.layout.leases):
                is_same = bool(disk.names(directory))
        except FileNotFoundError as error:
            raise Unreadable(path=directory, reason="it is gone", errno=error.errno) from None
        except OSError as error:
            raise Unreadable.because(directory, error) from error
        if not is_same:
            reason = "it is not the directory that this store opened"
            remedy = "Mount the original one again, or put it back. To use the present one, open a new persist.Store()."
            raise Unreadable(path=directory, reason=reason, remedy=remedy)

    def make_durable(self) -> None:
        """Make the directory's own name durable, once, so that no commit in it is lost with it.

        A backup that is written to is a store from then on. It loses its mark, so that the next backup leaves it alone.
        """
        if not self.is_durable:
            if disk.unlink(self.layout.backup):
                disk.sync_directory(self.layout.directory)
            with contextlib.suppress(PermissionError):
                disk.sync_directory(os.path.dirname(self.layout.directory))
            self.is_durable = True

    def make_leases(self) -> None:
        """Make the directory of the leases. Its name is durable on return, so that a sweep finds the leases in it."""
        disk.make_directory(self.layout.leases, self.options.file_mode)
        disk.check_directory(self.layout.leases)
        if not self.has_durable_leases:
            disk.sync_directory(self.layout.directory)
            self.has_durable_leases = True

    # --- one session ---

    def exists(self, session_id: str) -> bool:
        """Tell whether there is a document of that session, readable or not."""
        with self.looking_at(session_id) as paths:
            if disk.exists(paths.document):
                return True
            self.require_same()
            return False

    def read_now(self, session_id: str) -> Replica:
        """Read the committed session. Raise `Overtaken` if the journal that the document names is not there."""
        with self.looking_at(session_id) as paths:
            self.require_same(is_missing=False)
            found = document.read(paths.document, session_id, paths.file_id)
            if (name := found.header.journal) is None:
                return Replica(found.header, found.content, found.version)
            log = journal.Journal(paths.journal(name), session_id, name)
            with log.opened() as fd:
                header, content, tail = log.replay(fd, found.header, found.content)
            return Replica(header, content, found.version, tail)

    def read_head_now(self, session_id: str) -> Head:
        """Read the committed header and fields. Raise `Overtaken` as `read_now` does."""
        kept = self._heads.get(session_id) if type(session_id) is str else None
        if kept is not None and kept.is_last(self.paths_of(session_id)):
            return kept.head
        with self.looking_at(session_id) as paths:
            self.require_same(is_missing=False)
            found, version = document.read_head(paths.document, session_id, paths.file_id)
            if (name := found.header.journal) is None:
                return found
            log = journal.Journal(paths.journal(name), session_id, name)
            with log.opened() as fd:
                head, tail = log.read_head(fd, found)
        if sum(map(len, head.fields.values())) <= _KEPT_BYTES:
            if len(self._heads) >= _MOST_HEADS:
                self._heads.clear()
            self._heads[session_id] = _KeptHead(version, tail, head)
        return head

    def read_last_now(self, session_id: str, name: str, limit: int) -> list[Any]:
        """Read the last items of a list, and no more of the files than that takes.

        It raises `Overtaken` as `read_now` does.

        Raises:
            InvalidArgument: the value is no list.
        """
        with self.looking_at(session_id) as paths:
            self.require_same(is_missing=False)
            with document.ending(paths.document, paths.file_id) as found:
                if found is None:
                    content = self.read_now(session_id).content
                    head = Head(document.first_header(), content.fields, content.counts)
                    return _last_values(head, content.last, name, limit)
                if (journal_name := found.head.header.journal) is None:
                    return _last_values(found.head, found.last, name, limit)
                log = journal.Journal(paths.journal(journal_name), session_id, journal_name)
                with log.opened() as fd:
                    return _last_values(
                        log.read_head(fd, found.head)[0], partial(log.last_items, fd, found), name, limit
                    )

    def paths_of(self, session_id: str) -> layout.SessionPaths:
        """Return the paths of a session. Refuse an id that the file system takes for another one."""
        paths = self.layout.session(session_id)
        if self.ignores_case:
            _refuse_other_case(self.layout.directory, session_id, os.path.basename(paths.document))
        return paths

    def looking_at(self, session_id: str) -> Translating[layout.SessionPaths]:
        """Give the session's paths to a block, and turn the block's errors into typed ones (see `raise_typed`)."""
        paths = self.paths_of(session_id)
        return Translating(partial(self._raise_typed, session_id=session_id, path=paths.document), paths)

    def _raise_typed(self, error: BaseException, session_id: str, path: str) -> None:
        if isinstance(error, FileNotFoundError):
            self.require_same()
        raise_typed(error, session_id, path)

    # --- all sessions ---

    def session_ids(self) -> list[str]:
        """Return the ids of all sessions, sorted."""
        names = [name.removesuffix(layout.DOCUMENT) for name in self.names() if name.endswith(layout.DOCUMENT)]
        return sorted(filter(None, map(self.id_of, names)))

    def marks(self) -> Iterator[tuple[int, str]]:
        """Yield how long ago each session was last written, with its name: the last one first.

        The number is the time in nanoseconds since the epoch, negative, so that marks sort in their order.

        The time is the lock file's, which a commit marks at most once a second. A session without a lock file (a copy
        that was put back, another program's file) has the time of its document.
        """
        try:
            times, others = disk.modified_times(self.layout.directory, f"{layout.DOCUMENT}{layout.LOCK}")
            self.require_same(is_missing=not times and not others)
            # With 50,000 sessions each step counts: no name is decoded, and a heap costs less than to sort all of them.
            # The caller decodes the names that it needs.
            heap, ending = list[tuple[int, str]](), len(layout.DOCUMENT)
            for file_name in others:
                if file_name.endswith(layout.DOCUMENT):
                    name = file_name[:-ending]
                    time_ns = times.get(name)
                    if time_ns is not None:
                        heap.append((-time_ns, name))
                    elif layout.is_name(name):
                        with contextlib.suppress(FileNotFoundError):
                            heap.append((-disk.version_of(self.layout.named(name, None).document)[2], name))
        except PersistError:
            raise
        except OSError as error:
            raise Unreadable.because(self.layout.directory, error) from error
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)

    def id_of(self, name: str) -> str | None:
        """Return the session id of a name, or None. A document or a lease holds the id of a hashed name."""
        return layout.id_of(name) or _hashed_id(os.path.join(self.layout.directory, f"{name}.json"), name)

    def leases(self) -> list[tuple[str, str]]:
        """Return the (session id, stream id) of all lease files, sorted. Dead streams are included."""
        found = filter(None, map(layout.stream_of, self.names(self.layout.leases)))
        ids = (
            (self.id_of(name) or _hashed_id(os.path.join(self.layout.leases, f"{name}.{stream_id}"), name), stream_id)
            for name, stream_id in found
        )
        return sorted((session_id, stream_id) for session_id, stream_id in ids if session_id is not None)

    def stream_ids(self, session_id: str) -> list[str]:
        """Return the ids of the streams whose leases bear a session's name, or none if the disk refuses."""
        mine = self.layout.session(session_id).name
        with contextlib.suppress(OSError):
            # `names` refuses a symbolic link. Somebody else's files stand behind it, and a delete removes the files of
            # these streams.
            found = filter(None, map(layout.stream_of, self.names(self.layout.leases)))
            return [stream_id for name, stream_id in found if name == mine]
        return []

    def names(self, directory: str | None = None) -> list[str]:
        """Return the names of all files of a directory, unsorted.

        A missing directory has none. Only the store's own directory must be there.
        """
        try:
            if directory is not None:
                disk.check_directory(directory)
            found = disk.names(directory or self.layout.directory)
            self.require_same(is_missing=not found)
            return found
        except PersistError:
            raise
        except OSError as error:
            raise Unreadable.because(directory or self.layout.directory, error) from error

    def journals(self, session_id: str, *, copies: bool = False) -> Iterator[tuple[str, str]]:
        """Yield the files that are named like a journal of a session, with the hex in their names.

        With `copies`, yield the copies of damaged journals, too.
        """
        mine = self.layout.session(session_id).name
        for file_name in disk.names(self.layout.directory):
            found = layout.journal_of(file_name, copies=copies)
            if found is not None and found[0] == mine:
                yield os.path.join(self.layout.directory, file_name), found[1]


def _require_shared(path: str, file_mode: int) -> None:
    """Raise `InvalidArgument` if a directory of a store keeps a group out that shares its files."""
    if file_mode == disk.PRIVATE or os.name != "posix" or not disk.exists(path):
        return
    wanted = disk.directory_mode(file_mode)
    found = disk.awaited_mode(path, wanted & 0o070)
    if wanted & 0o070 & ~found:
        remedy = (
            f"To share what is there: chgrp -R GROUP of the store, then chmod {wanted:o} of the directories, "
            f"and chmod {file_mode:o} of the files."
        )
        facts = {
            "got": f"of mode {found:04o}",
            "expected": f"of mode {wanted:o}, which Store(mode=0o{file_mode:o}) needs",
        }
        raise InvalidArgument(what=f"the directory {path}", path=path, remedy=remedy, **facts)


def raise_typed(error: BaseException, session_id: str, path: str) -> None:
    """Raise a typed error in the place of the disk's own error about a document.

    The same goes for a document that cannot be decoded although its checksum is right, because somebody has sealed it.
    """
    if isinstance(error, FileNotFoundError):
        raise SessionNotFound(session_id=session_id, path=path) from None
    if isinstance(error, json_codec.Undecodable):
        raise mislabelled(path, session_id) from None
    if isinstance(error, OSError) and not isinstance(error, PersistError):
        # The file that refused may be the journal.
        refused = error.filename if isinstance(error.filename, str) else path
        raise Unreadable.because(refused, error) from error


def _refuse_other_case(directory: str, session_id: str, mine: str) -> None:
    """Raise `InvalidArgument` if another file's name differs from `mine` only in upper and lower case."""
    for name in disk.names(directory):
        if name != mine and name.lower() == mine.lower():
            expected = f"another name than {name.removesuffix('.json')!r} on this file system, which heeds no case"
            raise InvalidArgument(what="a session id", got=shown(session_id), expected=expected, session_id=session_id)


def _last_values(head: Head, last: Callable[[str, int], list[bytes]], name: str, limit: int) -> list[Any]:
    """Return the last items of a list. If the list stands apart, `last` reads them."""
    if head.counts.get(name) is not None:
        return list(map(json_codec.decode, last(name, limit)))
    value = json_codec.decode(head.fields[name]) if name in head.fields else None if name in head.counts else []
    if type(value) is not list:
        got = "a value of another kind" if name in head.counts else type(value).__name__
        raise InvalidArgument(what=f"field {name!r} of the document", expected="a list", got=got)
    return value[max(0, len(value) - limit) :]


def _hashed_id(path: disk.StrPath, name: str) -> str | None:
    """Return the id whose hash a name holds, from a document or a lease, or None.

    The file need not be sound, because the hash proves the id.
    """
    if layout.is_hashed(name):
        with contextlib.suppress(PersistError, OSError):
            for found in _ID.finditer(disk.read(path, _HEADER_BYTES)):
                with contextlib.suppress(ValueError, PersistError):
                    session_id = layout.check_session_id(json_codec.decode(found[1]))
                    if layout.name_of(session_id) == name:
                        return session_id
    return None


#: An id in the header of a document, or in a lease.
_ID = re.compile(rb'"(?:session_)?id":\s*("(?:[^"\\]|\\.)*")')
#: So many bytes are searched for an id, because a header stands at the beginning.
_HEADER_BYTES = 64 * 1024


def is_left_over(path: disk.StrPath, name: str, header: Header | None) -> bool:
    """Tell whether a journal no longer counts beside a document, because it was folded into it or never used.

    Any other journal holds commits that are nowhere else. Somebody may have put an older document back, for example.
    """
    return (header is not None and header.folded == name) or journal.is_empty(path)


def mislabelled(document_path: str, session_id: str) -> CorruptSession:
    """Return the error for a document that somebody has sealed, although its parts are not as its header says."""
    reason = "its checksums match, but its header describes its lists wrongly."
    return CorruptSession(session_id=session_id, path=document_path, reason=reason)


def missing_journal(document_path: str, session_id: str, journal_path: str) -> CorruptSession:
    """Return the error for a document whose journal is missing."""
    reason = f"{os.path.basename(journal_path)}, which it names, is missing."
    accept = layout.command("accept", os.path.dirname(document_path), session_id)
    remedy = f"Restore both from a backup; or take the document without the commits that stood there, with {accept}."
    return CorruptSession(session_id=session_id, path=document_path, reason=reason, remedy=remedy)
