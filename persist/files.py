"""The file engine: the sessions of one directory, the leases of their streams, and the events of these streams.

`storage` has the sessions and the leases, and `event_log` has the events. This module puts them together, as the engine
that the layers above know (see `engine`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from persist import errors, json_codec
from persist.engine import Lease
from persist.event_log import EventFiles, EventReader, EventWriter
from persist.storage import disk, layout
from persist.storage.cache import Replica
from persist.storage.commit import Options
from persist.storage.content import ALWAYS_FIELD, Content
from persist.storage.document import Header
from persist.storage.lease import End, Ended, Probe, probe, take
from persist.storage.transaction import SessionFiles, Transaction

#: How long ago a session was last written, and the name of its files. See `SessionDirectory.marks`.
_CURSOR = re.compile(r"(-?[0-9]{1,20})-([\x21-\x7e]+)")


class FileTransaction(Transaction):
    """The operations on a session whose lock is held, with those on its streams."""

    _files: FileEngine
    #: The stream that is about to commit. The kernel's lock on a lease cannot be lost, so nothing is asked of it.
    lease: Lease | None = None

    def probe(self, stream_id: object) -> Probe:
        """Try a stream's lease for a block, which learns whether the stream is dead. An impossible id is dead."""
        self.require_lock()
        if not layout.is_stream_id(stream_id):
            return Probe(is_dead=True)
        with self.refusals():
            disk.check_directory(self.paths.leases)
            return probe(self.paths.lease(str(stream_id)))

    def begin(self, stream_id: str, started_at: str) -> tuple[Lease, EventWriter] | None:
        """Take the lease of a new stream of this process. None if a stream of that id is alive."""
        path = self.paths.lease(stream_id)
        description = {"pid": os.getpid(), "started_at": started_at, "session_id": self.session_id}
        events = self._files.event_files
        with self.refusals():
            events.forget(self.session_id, stream_id)
            self._files.make_leases()
            taken = take(path, json_codec.encode(description), self.options.file_mode)
        return None if taken is None else (taken, events.writer(self.session_id, stream_id))

    def forget(self, stream_id: object) -> None:
        """Remove the lease of a stream that is not the session's. If the disk refuses, a sweep finds it.

        If the commit that was to make it the session's may be visible all the same, the lease file stays, so that a
        sweep finds the session by it.
        """
        self.require_lock()
        if layout.is_stream_id(stream_id) and not self.is_visible:
            disk.remove_quietly(self.paths.lease(str(stream_id)))

    def where(self, stream_id: object) -> str:
        """Return the path of a stream's lease, for errors."""
        return self.paths.lease(str(stream_id))

    def _fence(self, end: End) -> None:
        if layout.is_stream_id(end.stream_id):
            with self.refusals():
                self._files.event_files.fence(self.session_id, end.stream_id, end.how)

    def _end(self, end: End) -> None:
        if layout.is_stream_id(end.stream_id):
            self._files.event_files.end(self.session_id, end.stream_id, end.how)
            disk.remove_quietly(self.paths.lease(end.stream_id))

    def delete(self) -> None:
        """Remove the session, also one that cannot be read, with all that its streams have left. Durable on return."""
        stream_ids = self._fence_all()
        super().delete()
        self._remove_all(stream_ids)

    def put(self, header: Header, content: Content) -> Replica:
        """Write a session whole, in the place of whatever is there. Durable on return."""
        stream_ids = self._fence_all()
        after = super().put(header, content)
        self._remove_all(stream_ids)
        return after

    def stream_ids(self) -> list[str]:
        """Return the ids of all streams of the session that have a lease."""
        return self._files.stream_ids(self.session_id)

    def _fence_all(self) -> list[str]:
        self.require_known()
        with self.refusals():
            # First, so that nothing is emitted behind the place that a follower takes for the end.
            self._files.event_files.fence_session(self.session_id)
        return self.stream_ids()

    def _remove_all(self, stream_ids: list[str]) -> None:
        for stream_id in stream_ids:
            disk.remove_quietly(self.paths.lease(stream_id))
        self._files.event_files.remove_session(self.session_id)


class FileEngine(SessionFiles):
    """The sessions of one directory, with their streams and events."""

    transactions = FileTransaction

    def __init__(
        self, directory: str, options: Options, *, keep_events_s: float, keep_events_bytes: int | None, **kept: Any
    ) -> None:
        super().__init__(directory, options, **kept)
        self.place = self.layout.directory
        self.event_files = EventFiles(self, keep_events_s, keep_events_bytes)

    def where(self, session_id: str) -> str:
        """Return the path of a session's document, for errors."""
        return self.layout.session(session_id).document

    def recent(self, before: str | None) -> Iterator[tuple[str, str]]:
        """Yield a cursor and an id for each session, the last updated one first, from behind a cursor on."""
        place = None
        if before is not None:
            found = _CURSOR.fullmatch(before)
            if found is None or not layout.is_name(found[2]):
                expected = "the cursor of a page, or None"
                raise errors.InvalidArgument(what="before", got=errors.shown(before), expected=expected)
            place = -int(found[1]), found[2]
        return self._recent(place)

    def _recent(self, place: tuple[int, str] | None) -> Iterator[tuple[str, str]]:
        for mark in self.marks():
            is_wanted = (place is None or mark > place) and layout.is_name(mark[1])
            session_id = self.id_of(mark[1]) if is_wanted else None
            if session_id is not None:
                yield f"{-mark[0]}-{mark[1]}", session_id

    def events(self, session_id: str, stream_id: str, after: int, *, create: bool = False) -> EventReader:
        """Open the events of a stream behind an offset. Raise `FileNotFoundError` if there are none.

        With `create`, begin an empty file, under the session's lock. The process that ends the stream must find a file
        for the end line.
        """
        path = self.event_files.path(session_id, stream_id)
        self.require_same()
        if create:
            try:
                self.event_files.make(session_id, stream_id)
            except errors.PersistError:
                raise
            except OSError as error:
                reason = error.strerror or type(error).__name__
                facts: dict[str, Any] = {"path": path, "reason": reason, "errno": error.errno}
                raise errors.CommitFailed(session_id=session_id, **facts) from error
        return EventReader(path, after)

    def how_ended(self, session_id: str, stream_id: str, timeout_s: float) -> Ended | None:
        """Tell how a stream has ended whose events do not say it. None if it runs."""
        with self.transaction(session_id, timeout_s) as tx:
            active = tx.head().fields.get(ALWAYS_FIELD)
            if active is None or json_codec.decode(active) != stream_id:
                return "unknown"
            with tx.probe(stream_id) as is_dead:
                return "died" if is_dead else None

    def tidy(self) -> None:
        """Remove the events whose time is over."""
        self.event_files.sweep()

    def close(self) -> None:
        """Remove the events whose time is over, of streams that ended in this process."""
        self.event_files.close()
