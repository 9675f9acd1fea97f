"""What can be seen of a directory of sessions without a lock: some committed revision of each, never half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from persist.errors import InvalidSessionId, PersistError, SessionNotFound, Translating, Unreadable
from persist.storage import disk, journal, layout, snapshot
from persist.storage.events import EventFiles
from persist.storage.journal import ROOM_BYTES, Journal
from persist.storage.known import KnownSessions
from persist.storage.layout import Layout
from persist.storage.snapshot import Header, HeadSnapshot, Snapshot

#: Which sessions have a journal: large ones, all, or none.
Mode = Literal["auto", "always", "never"]


class SessionDirectory:
    """The sessions of one directory, as files, and what can be seen of them without a lock."""

    #: In the place of `FOLD_AT_LEAST_BYTES` and the document's size, for those who try a store out.
    fold_bytes: float | None = None
    #: A journal of so many bytes gets room for as many more at a time.
    room_bytes: int = ROOM_BYTES

    def __init__(
        self,
        directory: Path,
        *,
        lock_timeout_s: float,
        journal: Mode = "auto",
        keep_events_s: float = 300.0,
        allow_network: bool = False,
        create: bool = True,
    ) -> None:
        # The real path: two names of one directory must share their in-process locks, and a chdir must not move the store.
        self.layout = Layout(Path(os.path.realpath(directory)))
        self.lock_timeout_s = lock_timeout_s
        self.mode = journal
        self.known = KnownSessions()
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

    def exists(self, session_id: str) -> bool:
        with self.looking_at(session_id) as path:
            return disk.exists(path)

    def read_now(self, session_id: str, *, decode: bool = False) -> Snapshot:
        """As `read`, but raise `Overtaken` if the journal is not there that the document names."""
        with self.looking_at(session_id) as path:
            found = snapshot.read(path, session_id, decode=decode)
            if not found.header.is_journaled:
                return found
            return self.journal(session_id, found.header.generation).replay(found)

    def read_head_now(self, session_id: str) -> HeadSnapshot:
        """As `read_head`, but raise `Overtaken` if the journal is not there that the document names."""
        with self.looking_at(session_id) as path:
            found = snapshot.read_head(path, session_id)
            if not found.header.is_journaled:
                return found
            return self.journal(session_id, found.header.generation).head(found)

    def journal(self, session_id: str, generation: int) -> Journal:
        return Journal(self.layout.journal(session_id, generation), session_id)

    def looking_at(self, session_id: str) -> Translating[Path]:
        """Give the document's path to a block, and turn the disk's own errors in it into typed ones."""
        path = self._path(session_id)

        def type_error(error: BaseException) -> None:
            if isinstance(error, FileNotFoundError):
                raise SessionNotFound(session_id=session_id, path=path) from None
            if isinstance(error, OSError) and not isinstance(error, PersistError):
                raise Unreadable.because(path, error) from error

        return Translating(type_error, path)

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
        """What crashes have left, and no longer counts: temporary files, journals that were folded, locks without a session.

        (session id, path), sorted. A commit under way shows as one.
        """
        found = []
        for name in self._names():
            session_id = layout.session_of_leftover(name)
            path = self.layout.directory / name
            if session_id and (path == self.layout.session(session_id).temp or not self.exists(session_id)):
                found.append((session_id, path))
        return sorted(found + [(session_id, path) for session_id, path, is_harmless in self._unnamed() if is_harmless])

    def orphans(self) -> list[tuple[str, Path]]:
        """Journals that hold commits of a document which is not there: (session id, path), sorted."""
        return [(session_id, path) for session_id, path, is_harmless in self._unnamed() if not is_harmless]

    def _unnamed(self) -> list[tuple[str, Path, bool]]:
        """Journals that no document names, sorted, and whether they no longer count."""
        found = []
        for session_id, generation in filter(None, map(layout.journal_of, sorted(self._names()))):
            path = self.layout.journal(session_id, generation)
            with contextlib.suppress(OSError):
                header = self._header_of(session_id)
                if header is None or not header.is_journaled or header.generation != generation:
                    found.append((session_id, path, is_left_over(path, generation, header)))
        return found

    def _header_of(self, session_id: str) -> Header | None:
        try:
            with self.looking_at(session_id) as path:
                return snapshot.read_head(path, session_id).header
        except PersistError:
            return None

    def _path(self, session_id: str) -> Path:
        path = self.layout.session(session_id).document
        if self._ignores_case:
            for name in disk.names(self.layout.directory):
                if name != path.name and name.lower() == path.name.lower():
                    reason = f"on this file system it is the same name as {name.removesuffix('.json')!r}."
                    raise InvalidSessionId(session_id=session_id, reason=reason)
        return path


def is_left_over(path: Path, generation: int, header: Header | None) -> bool:
    """Tell of a journal whether it no longer counts beside a document: it was folded into it, or never used.

    One that came after the document holds commits which are nowhere else: somebody has put an older document back, say.
    """
    if header is not None and header.since <= generation <= header.generation:
        return generation < header.generation or not header.is_journaled
    return journal.is_empty(path)
