"""The commit protocol of a whole document: in every instant the old one or the new one stands there, durably.

Write a temporary file, sync it, rename it over the document, sync the directory. A document that has a journal comes with a
new, empty one, which is made and synced before. Its name is made durable before the rename: else a power cut could leave a
document whose journal is missing. The journal of the document that was replaced is removed last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from persist.storage import disk, journal, snapshot
from persist.storage.body import Body
from persist.storage.layout import Layout
from persist.storage.snapshot import Header, Snapshot


class SyncFailed(Exception):
    """An fsync failed."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


class Attempt:
    """A commit of a whole document, to be run until it succeeds.

    Attributes:
        is_visible: whether a rename was done, in this run or an earlier one.
        snapshot, version, opening: what was written, the file's version, and its first bytes.
    """

    def __init__(self, layout: Layout, session_id: str, header: Header, body: Body) -> None:
        self._layout = layout
        self._session_id = session_id
        self._paths = layout.session(session_id)
        self._header = header
        self._body = body
        self._before = header
        self.is_visible = False
        self.version: disk.Version = (0, 0, 0)
        self.opening = b""
        self.snapshot = Snapshot(header, body, "")

    def run(self) -> None:
        """Write, sync, rename, sync: on return the document is durable and visible."""
        # Now, while nothing is visible: without a free descriptor after the rename, nobody would know its outcome.
        directory = disk.open_directory(self._layout.directory)
        try:
            self._publish(directory)
            try:
                disk.sync_directory(self._layout.directory, directory)
            except OSError as error:
                raise SyncFailed(error) from error
        finally:
            disk.close_directory(directory)
        self._remove_old_journals()

    def _publish(self, directory: int) -> None:
        """Up to the rename. Each run makes a journal of its own: readers may have that of an earlier one open."""
        if self._header.is_journaled:
            self._header = self._with_free_generation()
        content, checksum = snapshot.to_bytes(self._header, self._body)
        self.snapshot = Snapshot(self._header, self._body, checksum)
        self.opening = content[: snapshot.OPENING_BYTES]
        made = [self._paths.temp]
        try:
            if self._header.is_journaled:
                made.append(self._journal(self._header.generation))
                _write_new(made[-1], journal.opening(self._header.generation, checksum))
                _sync_directory(self._layout.directory, directory)
            self.version = _write_new(self._paths.temp, content)
        except BaseException:
            _remove(made)
            raise
        try:
            disk.replace(self._paths.temp, self._paths.document)
        except OSError:
            # Of nothing else it is known that the rename was not done: then the journal is that of the document.
            _remove(made)
            raise
        self.is_visible = True

    def _with_free_generation(self) -> Header:
        """With the next generation whose name is free. What bears one before that is a crash's, or another document's."""
        generation, since = self._header.generation + 1, self._header.since
        while disk.exists(path := self._journal(generation)):
            generation += 1
            since = since if journal.is_empty(path) else generation
        return self._header.but(generation=generation, since=since or generation)

    def _journal(self, generation: int) -> Path:
        return self._layout.journal(self._session_id, generation)

    def _remove_old_journals(self) -> None:
        """That of the document before, and what cut-off runs have left; nothing that may be another document's."""
        last, before = self._header.generation, self._before
        for generation in range(max(1, before.generation - 3), last + (not self._header.is_journaled)):
            path = self._journal(generation)
            with contextlib.suppress(OSError):
                if before.since <= generation <= before.generation or journal.is_empty(path):
                    disk.unlink(path)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            disk.unlink(path)


def _sync_directory(path: Path, opened: int) -> None:
    try:
        disk.sync_directory(path, opened)
    except OSError as error:
        raise SyncFailed(error) from error


def _write_new(path: Path, content: bytes) -> disk.Version:
    fd = _create(path)
    try:
        disk.write(fd, content)
        try:
            disk.sync(fd)
        except OSError as error:
            raise SyncFailed(error) from error
        return disk.version_of(fd)
    finally:
        disk.close(fd)


def _create(path: Path) -> int:
    try:
        return disk.create(path)
    except FileExistsError:
        # We hold the lock, so its writer is dead.
        disk.unlink(path)
        return disk.create(path)
