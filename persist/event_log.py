"""The events of a running stream. Any process can read them while they are written.

    {"offset":1,"event":{"type":"token","text":"Be"}}
    {"offset":2,"event":{"type":"token","text":"cause."}}
    {"end":"finished"}

Each stream has one file, `.events/<session id>.<stream id>`, which is only ever appended to. The stream creates it with
its first event, unless a reader that waits for that event has created it before. A reader takes a whole line with the
next offset for an event. It passes over everything else: a line that a crash has torn, or bytes that a power cut left
behind a hole. So offsets have no gaps.

The end line is the fence. The process that ends the stream appends it, under the session's lock. Nothing behind it
counts. Appends do not mix (O_APPEND). After each append the writer looks at its position in the file. If that is
further on than its own bytes reach, somebody else has ended the stream. So a write needs no lock and no look at the
document, except for the first one.

Each emission is one write to the kernel and is not batched in memory. It takes some microseconds. Readers see its
events at once, also after `kill -9`. It is not synced, so a power cut may take the last events, except with
`durable=True`.

A file that outgrows `Store(keep_events_bytes=…)` loses its oldest events. Under the session's lock, where nobody else
can end the stream, the writer puts the younger half into a new file. Then it gives that file the name, and marks the
old file:

    {"first":501}                                    the new file's first line
    {"offset":501,"event":{"type":"token"}}
    {"moved":true}                                   the old file's last line

A reader of the old file has every event up to the mark, and goes on in the new file. A writer that is killed before the
mark has emitted nothing to the new file. If the disk refuses the mark, a reader sees after a silence that its file has
lost the name.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from persist import errors, json_codec, watch
from persist.engine import Ended, Event, Fenced
from persist.log import log
from persist.storage import disk, layout
from persist.storage.directory import SessionDirectory
from persist.storage.held import HeldFile, try_hold

_LINE = re.compile(rb'\{"offset":(\d{1,18}),"event":(.+)\}', re.DOTALL)
_END = re.compile(rb'\{"end":"(finished|failed|cancelled|died|deleted)"\}')
_FIRST = re.compile(rb'\{"first":(\d{1,18})\}')
_MOVED = b'{"moved":true}'
_LONGEST_FIRST = _LONGEST_END = 64
_CHUNK_BYTES = 256 * 1024
#: How much an event loop may read at a time. That takes less than a millisecond.
_CACHED_CHUNK_BYTES = 32 * 1024
_MOST_PIECES = 8


# --- writing ---------------------------------------------------------------------------------------------------------


class EventWriter:
    """The writer of the events of a stream that this process runs. The threads of the process may share it.

    The file is open and locked from `open` on. Nobody asks for that lock. It comes with `HeldFile`, which takes care of
    the descriptor in forks and at the end.
    """

    def __init__(
        self, path: str, session_id: str, stream_id: str, most_bytes: float = math.inf, mode: int = disk.PRIVATE
    ) -> None:
        #: Whether the oldest events are to be dropped.
        self.is_full = False
        self._most_bytes = self._full_at_bytes = most_bytes
        self._path = path
        self._mode = mode
        self._session_id = session_id
        self._stream_id = stream_id
        # Re-entrant, because a signal handler that emits while its own thread does must get an error, and not wait for
        # ever.
        self._guard = threading.RLock()
        self._is_busy = False
        self._held: HeldFile | None = None
        self._count = 0
        self._end = 0
        #: Whether a write broke off, so that the end of the file is not known.
        self._is_torn = False
        self._is_name_durable = False
        #: Whether events were emitted that a power cut must not take.
        self._has_durable = False
        self._sync_error: OSError | None = None

    @property
    def is_open(self) -> bool:
        return self._held is not None

    def open(self) -> None:
        """Create the file or open it, under the session's lock.

        A process that takes the session away must find the file, because it puts the end line there.
        """
        with self._writing():
            if self._held is None:
                directory = Path(self._path).parent
                disk.make_directory(directory, self._mode)
                disk.check_directory(directory)
                self._held = try_hold(self._path, create=True, append=True, mode=self._mode)
                if self._held is None:
                    raise BlockingIOError(errno.EWOULDBLOCK, "another program has locked it")

    def append(self, events: Sequence[bytes], *, durable: bool) -> int:
        """Append encoded events, and return the offset of the last one.

        Raises:
            EmitFailed: the disk refused.
            Fenced: the stream has been ended.
            LockError: this thread is in the middle of an append, and its signal handler asks again.
        """
        with self._writing():
            if self._held is None or not self._held.is_held:
                raise Fenced
            fd, mark = self._held.fd, b""
            if self._is_torn:
                self._take_stock(fd)
                # Not only a newline, because a line that lacks nothing else would then become an event, in the place of
                # the next one.
                mark = b"?\n"
            lines = [b'{"offset":%d,"event":%b}\n' % line for line in enumerate(events, self._count + 1)]
            written = b"".join([mark, *lines])
            self._is_torn = True
            disk.write(fd, written)
            self._end += len(written)
            if os.lseek(fd, 0, os.SEEK_CUR) != self._end:
                self._held.close()
                raise Fenced
            self._count += len(events)
            self._is_torn = False
            self.is_full = self._end > self._full_at_bytes
            if durable:
                self._sync(fd)
            offset = self._count
        watch.wake(self._path)
        return offset

    def close(self) -> None:
        """Close the file."""
        with self._guard:
            if self._held is not None:
                self._held.close()

    def drop_oldest(self) -> None:
        """Drop all events but the younger half of the bound. The caller is the owner, and holds the session's lock.

        A line that is longer than the half stays until there are younger ones.

        Raises:
            EmitFailed: the disk refused. The file is as it was.
            LockError: see `append`.
        """
        with self._writing():
            old = self._held
            if not self.is_full or self._is_torn or old is None or not old.is_held:
                return
            half = int(self._most_bytes) // 2
            tail = disk.read_at(old.fd, half, self._end - half)
            start, first = tail.find(b"\n") + 1, None
            while start and start < len(tail) and first is None:
                end = tail.find(b"\n", start)
                first = _LINE.fullmatch(tail, start, end)
                start = start if first else end + 1
            if first is None:
                self.postpone()
                return
            temp, content = layout.temp_of(self._path), b'{"first":%b}\n%b' % (first[1], tail[start:])
            disk.unlink(temp)
            new = try_hold(temp, create=True, exclusive=True, append=True, mode=self._mode)
            if new is None:
                raise BlockingIOError(errno.EWOULDBLOCK, "another program has locked it")
            try:
                disk.write(new.fd, content)
                if self._has_durable:
                    disk.sync(new.fd)
                disk.replace(temp, self._path)
            finally:
                # The disk tells whether the rename happened, because a signal's exception may have come behind it.
                new.path = self._path
                if new.bears_name():
                    self._held, self._end, self._is_name_durable = new, len(content), False
                    self._full_at_bytes, self.is_full = self._most_bytes, False
                    with contextlib.suppress(OSError):
                        disk.write(old.fd, _MOVED + b"\n")
                    old.close()
                else:
                    new.close()
                    disk.remove_quietly(temp)
        watch.wake(self._path)

    def postpone(self) -> None:
        """Let the file grow for a while before its oldest events are to be dropped again."""
        with self._guard:
            self._full_at_bytes, self.is_full = self._end + self._most_bytes / 8, False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep other threads out of a block, and turn the disk's own errors into `EmitFailed`."""
        with self._guard:
            if self._is_busy:
                raise errors.nested(self._session_id, held=self._session_id)
            self._is_busy = True
            try:
                yield
            except errors.PersistError:
                raise
            except OSError as error:
                reason = error.strerror or type(error).__name__
                log.warning("Stream %s: the disk refused at %s: %s", self._stream_id, self._path, reason)
                raise errors.EmitFailed(
                    stream_id=self._stream_id, path=self._path, reason=reason, errno=error.errno
                ) from error
            finally:
                self._is_busy = False

    def _take_stock(self, fd: int) -> None:
        """Count the events in the file again after a write that broke off.

        Some events of that write may be there, and the last line may be torn.
        """
        try:
            with EventReader(self._path) as reader:
                # The size comes before the events, so that the next write notices an end line that comes behind them.
                self._end = reader.size()
                while reader.read():
                    pass
                # Another file may bear the name by now.
                if reader.ended is not None or not os.path.sameopenfile(reader._fd, fd):
                    raise Fenced
                self._count = reader.count
        except FileNotFoundError:
            raise Fenced from None

    def _sync(self, fd: int) -> None:
        if self._sync_error is not None:
            # After a failed fsync a second one may answer OK for data that is lost (measured).
            raise self._sync_error
        try:
            disk.sync(fd)
            if not self._is_name_durable:
                directory = Path(self._path).parent
                disk.sync_directory(directory)
                # Another process may have made that directory an instant ago, and not have synced its name.
                disk.sync_directory(directory.parent)
                self._is_name_durable = True
            self._has_durable = True
            # A file system that is shut down in this very instant may have answered OK (ext4, measured). An open tells,
            # because such a file system opens nothing.
            disk.close(disk.open_plain(self._path, os.O_RDONLY))
        except FileNotFoundError:
            raise Fenced from None
        except OSError as error:
            self._sync_error = error
            raise


# --- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(path: disk.StrPath) -> Iterator[None]:
    """Turn the disk's own errors in a block into `Unreadable`, except for a missing file."""
    try:
        yield
    except (errors.PersistError, FileNotFoundError):
        raise
    except OSError as error:
        raise errors.Unreadable.because(path, error) from error


class EventReader:
    """The reader of one stream's events from an offset on. It reads again and again while they are written.

    `count` is the offset of the last event that was passed. `ended` tells how the stream has ended, once its end line
    was read. `first` is the offset of the first event that is left. `is_overtaken` tells whether an event before that
    was asked for.
    """

    def __init__(self, path: str, after: int = 0) -> None:
        self.count = 0
        self.first = 1
        self.is_overtaken = False
        self._is_moved = False
        self._is_at_first_line = True
        self.ended: Ended | None = None
        self._path = path
        self._after = after
        self._position = 0
        self._torn: list[bytes] = []
        self._fd = -1  # for `close`, if it cannot be opened
        self.place = path
        with _reading(path):
            disk.check_directory(os.path.dirname(path))
            self._fd = disk.open_plain(path, os.O_RDONLY)

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # The events that were read stay valid, even if the close fails.
            with contextlib.suppress(OSError):
                disk.close(fd)

    def size(self) -> int:
        """Return the size of the file now, in bytes."""
        return os.fstat(self._fd).st_size

    @property
    def has_more(self) -> bool:
        """Whether there are bytes that were not read yet. Never waits for the disk."""
        return self._is_moved or self.size() > self._position

    def begin_here(self) -> None:
        """Ask only for the events behind the passed ones."""
        self._after = self.count

    def waking(self, wake: watch.Wake) -> contextlib.AbstractContextManager[None]:
        """Call `wake` during a block, whenever any process has appended to the file."""
        return watch.waking(self._path, wake)

    def look_again(self) -> None:
        """Learn whether another file bears the name, because the mark that says so may be missing."""
        with _reading(self._path), contextlib.suppress(FileNotFoundError):
            self._is_moved = disk.version_of(self._path)[0] != os.fstat(self._fd).st_ino

    def _move(self) -> None:
        """Go on in the file that bears the name by now, if it is the successor of this one.

        After a power cut a marked file may still bear the name. A file without the line ``{"first":…}`` belongs to
        another stream.
        """
        with _reading(self._path):
            fd = disk.open_plain(self._path, os.O_RDONLY)
            try:
                is_successor = not os.path.sameopenfile(fd, self._fd) and _FIRST.match(
                    disk.read_at(fd, _LONGEST_FIRST, 0)
                )
                if is_successor:
                    self._fd, fd = fd, self._fd
                    self._position, self._torn, self._is_at_first_line = 0, [], True
                self._is_moved = False
            finally:
                disk.close(fd)

    def read(self, until: int | None = None) -> list[Event]:
        """Return the events that came since the last call, or the first of them. Return none if there are none now.

        Args:
            until: the place in the file up to which to look for the first one.
        """
        found: list[Event] = []
        while not found and self.ended is None and (until is None or self._position < until):
            if self._is_moved and until is None:
                self._move()
            with _reading(self._path):
                chunk = disk.read_at(self._fd, _CHUNK_BYTES, self._position)
            if not chunk:
                break
            found = self._feed(chunk)
        return found

    def read_cached(self) -> list[Event] | None:
        """Read as `read` does, a little at a time. None if that would wait for the disk, or for a large event."""
        if self.ended is not None:
            return []
        if self._is_moved or len(self._torn) > _MOST_PIECES:
            return None
        chunk = disk.read_cached(self._fd, _CACHED_CHUNK_BYTES, self._position)
        return None if chunk is None else self._feed(chunk)

    def _feed(self, chunk: bytes) -> list[Event]:
        self._position += len(chunk)
        self._torn.append(chunk)
        if b"\n" not in chunk:
            return []
        *lines, rest = b"".join(self._torn).split(b"\n")
        self._torn = [rest]
        if self._is_at_first_line:
            self._is_at_first_line = False
            self._take_first(lines[0])
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take_first(self, line: bytes) -> None:
        """Learn from a file's first line whether it has dropped events."""
        shape = _FIRST.fullmatch(line)
        if shape is not None:
            self.first = int(shape[1])
            self.is_overtaken = self.is_overtaken or self.first - 1 > max(self.count, self._after)
            self.count = max(self.count, self.first - 1)

    def _take(self, line: bytes) -> Event | None:
        """Return the event of a line, if it counts and is asked for."""
        if self.ended is not None:
            return None
        shape = _LINE.fullmatch(line)
        if shape is None:
            end = _END.fullmatch(line)
            if end is not None:
                self.ended = end[1].decode()  # type: ignore[assignment]
            self._is_moved = self._is_moved or line == _MOVED
            return None
        if int(shape[1]) != self.count + 1:
            return None
        try:
            # Decoded even if it is not asked for, because a torn line may have the shape of a whole one.
            event = Event(self.count + 1, json_codec.decode(shape[2]))
        except (ValueError, RecursionError):
            return None
        self.count += 1
        return event if self.count > self._after else None


# --- all streams of a store ------------------------------------------------------------------------------------------


#: How many ended streams are remembered, so that a later finish removes their events. A sweep finds all others.
_MOST_REMEMBERED = 1024
#: How many expired files one finish removes.
_MOST_REMOVED = 2


class EventFiles:
    """The events of all streams of one store. It creates, ends and removes their files.

    No thread waits for their expiry. A start removes the expired files of its session, a finish removes up to two in
    the store, and a sweep and `close` remove all.
    """

    def __init__(self, files: SessionDirectory, keep_s: float, keep_bytes: int | None = None) -> None:
        self._files = files
        self._keep_s = keep_s
        self._keep_bytes = math.inf if keep_bytes is None else keep_bytes
        #: The files of streams that ended here, in the order of their ends.
        self._ended: deque[str] = deque(maxlen=_MOST_REMEMBERED)

    def path(self, session_id: str, stream_id: str) -> str:
        """Return the path of the events of a stream, if it has any."""
        return self._files.layout.session(session_id).events(layout.check_stream_id(stream_id))

    def writer(self, session_id: str, stream_id: str) -> EventWriter:
        """Return a writer for the process that runs the stream. It creates nothing before the first event."""
        path, mode = self.path(session_id, stream_id), self._files.options.file_mode
        return EventWriter(path, session_id, stream_id, self._keep_bytes, mode)

    # The methods below are called under the session's lock.

    def make(self, session_id: str, stream_id: str) -> None:
        """Create an empty file, for a reader that comes before the first event."""
        path = self.path(session_id, stream_id)
        mode = self._files.options.file_mode
        disk.make_directory(self._files.layout.events, mode)
        disk.check_directory(self._files.layout.events)
        disk.close(disk.open_plain(path, os.O_RDWR | os.O_CREAT, mode))

    def fence(self, session_id: str, stream_id: str, ended: Ended) -> str | None:
        """Append the end line, if the stream has a file of events and no end line yet. Return the path of that file.

        After that, events that the stream still emits count nowhere.
        """
        path = self._files.layout.session(session_id).events(stream_id)
        if not disk.exists(path):
            return None
        _append_end(path, ended)
        return path

    def end(self, session_id: str, stream_id: str, ended: Ended) -> None:
        """End the events of a stream that has ended. If the disk refuses, the document tells a follower of the end."""
        try:
            path = self.fence(session_id, stream_id, ended)
            if path is not None:
                self._ended.append(path)
        except OSError:
            pass
        if self._ended:
            self._remove_ended(_MOST_REMOVED)

    def forget(self, session_id: str, stream_id: str) -> None:
        """Remove the events of an earlier stream of that id, and the expired events of that session."""
        disk.check_directory(self._files.layout.events)
        disk.unlink(self.path(session_id, stream_id))
        for path in self._paths(session_id):
            with contextlib.suppress(OSError):
                self._remove_expired(path)

    def fence_session(self, session_id: str) -> None:
        """End the events of all streams of a session that is about to be deleted.

        A full disk must not prevent the deletion.
        """
        for path in self._paths(session_id):
            with contextlib.suppress(OSError):
                _append_end(path, "deleted")

    def remove_session(self, session_id: str) -> None:
        """Remove the events of all streams of a deleted session. Files that the disk refuses stay until a sweep."""
        with contextlib.suppress(OSError):
            for path in self._paths(session_id):
                disk.remove_quietly(path)

    def sweep(self) -> None:
        """Remove all expired events."""
        for path in self._paths():
            with contextlib.suppress(OSError):
                self._remove_expired(path)

    def close(self) -> None:
        """Remove the expired events of the streams that ended here."""
        self._remove_ended(_MOST_REMEMBERED)

    def _remove_ended(self, most: int) -> None:
        """Remove the expired events of the streams that ended first."""
        # IndexError: none is left.
        with contextlib.suppress(IndexError, OSError):
            for _ in range(most):
                path = self._ended.popleft()
                if not self._remove_expired(path):
                    self._ended.appendleft(path)
                    break

    def _remove_expired(self, path: str) -> bool:
        """Remove a stream's events if they have expired. Tell whether they are gone."""
        if disk.exists(os.path.join(self._files.layout.leases, os.path.basename(path).removesuffix(layout.TEMP))):
            return False
        try:
            modified_at = disk.modified_at(path)
        except FileNotFoundError:
            return True
        age_s = time.time() - modified_at
        if not 0 <= age_s < self._keep_s:
            # A test tool may have moved the clock of this process. The file bears a time of the kernel's clock.
            age_s = disk.kernel_time(self._files.layout.events) - modified_at
        if age_s < 0:
            # The clock was set back. From now on the file ages like any other file. Else it would stay for ever.
            disk.set_modified_now(path)
        if age_s < self._keep_s:
            return False
        disk.unlink(path)
        return True

    def _paths(self, session_id: str | None = None) -> list[str]:
        """Return the events files of a session, or of all sessions, and the temporary files that a crash has left."""
        # A session's name has no dot. A busy server has thousands of files here, and most of them are not looked at.
        beginning = "" if session_id is None else f"{self._files.layout.session(session_id).name}."
        directory = self._files.layout.events
        with _reading(directory):
            disk.check_directory(directory)
            found = [name for name in disk.names(directory) if name.startswith(beginning)]
        return [os.path.join(directory, name) for name in found if layout.stream_of(name.removesuffix(layout.TEMP))]


def _append_end(path: str, ended: Ended) -> None:
    """Append the end line, if there is none, and wake the followers."""
    disk.check_directory(os.path.dirname(path))
    fd = disk.open_plain(path, os.O_RDWR | os.O_APPEND)
    try:
        size = os.fstat(fd).st_size
        *_, line, rest = [b"", *disk.read_at(fd, _LONGEST_END, max(0, size - _LONGEST_END)).split(b"\n")]
        if rest or not _END.fullmatch(line):
            disk.write(fd, b"\n" * bool(rest) + b'{"end":"%b"}\n' % ended.encode())
    finally:
        disk.close(fd)
    watch.wake(path)
