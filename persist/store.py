"""Store: the verbs. Each is one transaction on one session, or a look that takes no lock."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from persist import errors, json_codec, maintenance, streams, turn
from persist.event_log import Event, EventFiles
from persist.follow import Cursor, Following
from persist.merge import Policy, check_policies
from persist.session import Head, Session, refuse_changed_stream_fields
from persist.storage import cache, commit, document
from persist.storage.content import ALWAYS_APART, HEADER, Content, empty, encoded
from persist.storage.transaction import SessionFiles
from persist.streams import Backend, Stream, StreamInfo
from persist.turn import Message
from persist.working_copy import WorkingCopy

Result = TypeVar("Result")
_UNREADABLE = (errors.SessionNotFound, errors.CorruptSession, errors.UnsupportedFormat, errors.LockTimeout, OSError)


@dataclass(frozen=True, slots=True)
class ClearedStream:
    """A stale stream that a sweep has cleared."""

    session_id: str
    stream_id: str


class Store:
    """A directory of sessions, shared by any number of threads and processes of one machine.

    Args:
        path: the directory; made (mode 0700) if it is missing.
        lock_timeout_s: seconds that a verb waits for a session's lock before it raises `LockTimeout`.
        journal: which sessions have a journal beside their document, so that a commit costs what it changes:
            ``"auto"``, those above 64 KiB; ``"always"``, all; ``"never"``, none. It is for what this store writes:
            every store reads all.
        merge: top-level field -> "sum" | "max" | "mine" | "theirs": how `Session.save` settles a field that both sides
            changed, instead of raising `MergeConflict`. Not for ``messages`` and ``tool_calls``, nor for the stream
            fields.
        keep_events_s: seconds that a stream's events stay after its end, for those who come back late.
        cache_bytes: how much memory the store may use for what it knows of large sessions.
        allow_network: True accepts a network file system, where no guarantee holds.
        create: False opens a directory that must be there, and makes nothing in it until something is written.

    Raises:
        WrongType, ReservedField: an argument is not what it must be.
        Unreadable: the disk, or its permissions, refused.
        UnsupportedFileSystem: the directory is on nfs, cifs, 9p or ceph.

    Example:
        >>> import persist, tempfile
        >>> store = persist.Store(tempfile.mkdtemp())
        >>> session = store.create("s-42", {"title": "New chat", "messages": []})
        >>> a, b = store.load("s-42"), store.load("s-42")
        >>> a.data["title"] = "File locks"
        >>> b.data["messages"].append({"id": "m1", "role": "user", "content": "hi"})
        >>> a.save(); b.save()
        >>> store.load("s-42").data
        {'title': 'File locks', 'messages': [{'id': 'm1', 'role': 'user', 'content': 'hi'}]}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lock_timeout_s: float = 5.0,
        journal: commit.Mode = "auto",
        merge: Mapping[str, Policy] | None = None,
        keep_events_s: float = 300.0,
        cache_bytes: int = 64 * 1024 * 1024,
        allow_network: bool = False,
        create: bool = True,
    ) -> None:
        errors.require_flags(allow_network=allow_network, create=create)
        directory = _directory(path, create=create)
        if journal not in get_args(commit.Mode):
            raise errors.WrongType(what="journal", expected=" | ".join(get_args(commit.Mode)), got=repr(journal))
        policies = {} if merge is None else merge
        check_policies(policies)
        for field in policies.keys() & {HEADER, *turn.IDLE, *ALWAYS_APART}:
            # To take one side of a list would drop what the other has appended.
            raise errors.ReservedField(field=field, remedy="It has a rule of its own: leave it out of merge.")
        self._policies = dict(policies)
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise errors.WrongType(what="cache_bytes", expected="a number of bytes from 0 up", got=repr(cache_bytes))
        kept: dict[str, Any] = {"cache_bytes": cache_bytes, "allow_network": allow_network}
        timeout_s = _seconds("lock_timeout_s", lock_timeout_s)
        files = SessionFiles(directory, commit.Options(journal), timeout_s=timeout_s, create=create, **kept)
        self._backend = Backend(files, EventFiles(files, _seconds("keep_events_s", keep_events_s)))
        self._options: dict[str, Any] = {
            "lock_timeout_s": lock_timeout_s,
            "journal": journal,
            "merge": self._policies,
            "keep_events_s": keep_events_s,
            **kept,
        }
        self._is_closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        # For multiprocessing: the other process opens the same directory for itself.
        return functools.partial(Store, **self._options), (self.path,)

    def __repr__(self) -> str:
        return f"<persist.Store {self.path}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The store's directory, absolute."""
        return self._backend.files.layout.directory

    def close(self) -> None:
        """Refuse further verbs with `StoreClosed`. Streams that run go on, and sessions that are loaded can still be
        saved.

        Events that have expired are removed.
        """
        self._is_closed = True
        self._backend.events.close()

    def _open(self) -> Backend:
        if self._is_closed:
            raise errors.StoreClosed(path=self.path)
        return self._backend

    def _session(self, session_id: str, found: cache.Replica, *, is_durable: bool) -> Session:
        return Session(self._backend, self._policies, session_id, found, is_durable=is_durable)

    # --- looking ---

    def load(self, session_id: str) -> Session:
        """Return a session as it was last committed. Takes no lock and never writes.

        Raises:
            SessionNotFound: create it first.
            CorruptSession, UnsupportedFormat, UnsafeFile: the file cannot be trusted; it was not changed.
            InvalidSessionId: an id is any text of 1 to 512 characters.
            Unreadable: the disk, or its permissions, refused.
        """
        return self._session(session_id, self._open().files.read(session_id), is_durable=False)

    def head(self, session_id: str) -> Head:
        """Return the small fields of a session, without reading its messages. Takes no lock and never writes.

        Raises: as `load`, but damage among the messages goes unnoticed.
        """
        found = self._open().files.read_head(session_id)
        header, data = found.header, found.decode_fields()
        times = header.created_at, header.updated_at
        return Head(session_id, header.revision, *times, turn.active_stream(data), data, found.counts)

    def exists(self, session_id: str) -> bool:
        """Tell whether there is such a session. Takes no lock."""
        return self._open().files.exists(session_id)

    def ids(self, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """Return session ids, sorted; a page of them with `after` (the last id of the page before) and `limit`.

        No lock.
        """
        found = self._open().files.session_ids()
        if limit is not None and (type(limit) is not int or limit < 0):
            raise errors.WrongType(what="limit", expected="a whole number from 0 up, or None", got=repr(limit))
        if after is not None:
            if type(after) is not str:
                raise errors.WrongType(what="after", expected="a session id, or None", got=repr(after))
            found = [session_id for session_id in found if session_id > after]
        return found[:limit]

    # --- writing ---

    def create(self, session_id: str, data: dict[str, Any] | None = None) -> Session:
        """Make a session. Durable and visible on return.

        Raises:
            SessionExists: load it, or choose another id.
            InvalidSessionId, NotJSON, WrongType, ReservedField: an argument cannot be kept; nothing was written.
            LockTimeout, NestedLock, CommitFailed, CommitUnknown: see the errors.
        """
        files = self._open().files
        data = {} if data is None else data
        content = encoded(data)
        refuse_changed_stream_fields(empty(), content)
        return self._created(files, session_id, content)

    def _created(self, files: SessionFiles, session_id: str, content: Content) -> Session:
        with files.transaction(session_id, may_be_missing=True) as tx:
            if tx.exists():
                # A caller that asks again takes this for success. The first answer may have been lost in a crash.
                with suppress(errors.CorruptSession, errors.UnsupportedFormat, errors.UnsafeFile, errors.Unreadable):
                    tx.confirm()
                raise errors.SessionExists(session_id=session_id, path=tx.paths.document)
            committed = tx.commit(document.first_header(session_id if tx.paths.file_id else None), content)
        return self._session(session_id, committed, is_durable=True)

    def duplicate(self, session_id: str, new_id: str) -> Session:
        """Copy a committed session to a new id, without its stream: no stream fields, no partial answer.

        Raises: as `load` for the first, as `create` for the second.
        """
        files = self._open().files
        found = files.read(session_id)
        with files.looking_at(session_id):
            copy = WorkingCopy(found)
            stream_id = turn.active_stream(copy.fields)
            owner = streams.owner_of(found.header, stream_id)
            if owner is None and stream_id is not None:
                # Another program's turn: its prompt may stand in the stream fields only.
                turn.interrupt_foreign(copy)
            turn.leave_out(copy, owner.answer_id if owner else None)
            content = copy.content
        return self._created(files, new_id, content)

    def delete(self, session_id: str, *, force: bool = False) -> None:
        """Remove a session; durable on return. A later `save` of an object that was loaded before is refused.

        Args:
            force: also while a live stream owns it (the stream gets `StreamLost`), and also if the file is damaged.

        Raises:
            SessionNotFound: there is none.
            SessionBusy: a live stream owns it; wait, cancel it, or force.
            LockTimeout, NestedLock, CorruptSession: see the errors.
        """
        errors.require_flags(force=force)
        streams.delete(self._open(), session_id, force=force)

    @contextmanager
    def edit(self, session_id: str, *, touch: bool = True) -> Iterator[dict[str, Any]]:
        """Change a session exactly: the lock is held from the read to the write, for the whole block.

        Yields the committed data; what the block leaves in it is committed, durably, when the block ends. A block that
        raises writes nothing, and one that changes nothing writes nothing. Keep it short: others wait. Change the dict
        in
        place: another one that is bound to the same name is not seen. Messages that the block removes are removed, also
        in the middle of a turn.

        It costs the whole session: all of it is decoded, and encoded again. `append` and `transaction` cost what they
        touch.

        Args:
            touch: False keeps `updated_at`.

        Raises:
            SessionNotFound, LockTimeout, NestedLock, CorruptSession: before the block.
            NotJSON, ReservedField, CommitFailed, CommitUnknown: after it; nothing was written, unless it says
                "unknown".
        """
        with self.transaction(session_id, touch=touch) as copy:
            yield copy.data

    @contextmanager
    def transaction(self, session_id: str, *, touch: bool = True) -> Iterator[WorkingCopy]:
        """As `edit`, but the block gets a working copy, which reads what it is asked for: the commit costs what it
        changes.

        ``tx.fields`` is a mapping of the top-level values but ``messages`` and ``tool_calls``. ``tx.list(name)`` is a
        list.

        Args, Raises: as `edit`.
        """
        errors.require_flags(touch=touch)
        with self._open().files.transaction(session_id) as tx:
            found = tx.read()
            copy = WorkingCopy(found, tx)
            yield copy
            changed = copy.changed()
            if changed is not None:
                refuse_changed_stream_fields(found.content, changed[0])
            tx.require_unchanged()
            copy.commit_changes(changed, touch=touch)

    def update(
        self,
        session_id: str,
        function: Callable[[dict[str, Any]], Result],
        *,
        if_revision: int | None = None,
        touch: bool = True,
    ) -> Result:
        """Call `function` on the committed data under the lock, commit what it left there, and return its result.

        Args:
            function: changes the data in place; if it raises, nothing is written.
            if_revision: the revision that the edit was decided on. Name it for an edit that removes something.
            touch: False keeps `updated_at`.

        Raises:
            RevisionMismatch (a `MergeConflict`): the session is at another revision; nothing was written.
            Otherwise as `edit`.
        """
        if not callable(function):
            raise errors.WrongType(what="function", expected="callable", got=type(function).__name__)
        if if_revision is not None and type(if_revision) is not int:
            raise errors.WrongType(what="if_revision", expected="a revision, or None", got=type(if_revision).__name__)
        with self.transaction(session_id, touch=touch) as copy:
            if if_revision is not None and copy.header.revision != if_revision:
                path, reason = (HEADER, "revision"), "the session has moved on"
                facts = {"base": if_revision, "mine": if_revision, "theirs": copy.header.revision}
                raise errors.RevisionMismatch(session_id=session_id, path=path, reason=reason, **facts)
            result = function(copy.data)
            if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
                # Its body has not run, or not to the end.
                raise errors.WrongType(what="function", expected="a plain function", got="an async one or a generator")
        return result

    def append(self, session_id: str, field: str, item: Any, *, touch: bool = True) -> int:
        """Add an item to a list of the document; durable and visible on return. Idempotent by the item's ``id``.

        An item whose ``id`` stands there with the same content is taken as appended already. A missing list is made.

        Args:
            field: a top-level field, ``"messages"`` say.
            item: any JSON value.

        Returns:
            The revision that holds the item.

        Raises:
            IdTaken: an item of that ``id`` is there, with other content.
            NotJSON, WrongType, ReservedField: the item or the field cannot be used.
            SessionNotFound, LockTimeout, NestedLock, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        if type(field) is not str:
            raise errors.WrongType(what="field", expected="a string", got=type(field).__name__)
        if field in turn.IDLE:
            raise errors.ReservedField(field=field, remedy="Use store.start_stream().")
        errors.require_flags(touch=touch)
        json_codec.check(item, (field,))
        with self._open().files.transaction(session_id) as tx:
            copy = WorkingCopy(tx.read(), tx)
            turn.append_once(copy.list(field), item, field=field)
            return copy.commit_changes(copy.changed(), touch=touch).header.revision

    # --- streams ---

    def start_stream(self, session_id: str, message: Message | None = None, *, stream_id: str | None = None) -> Stream:
        """Claim a session for a turn of the model. On return the claim, its liveness and the prompt are durable and
        visible.

        A stale stream is cleared on the way. Use the result in a ``with``: leaving it without `finish` is `fail`.

        Args:
            message: the prompt; without an ``id`` it gets ``<stream id>.prompt``. One whose ``id`` is in ``messages``
                already is taken up again: that of a turn that was interrupted, say. One that has its answer, too: where
                a request may be sent twice, look before. None starts a turn without a prompt.
            stream_id: an id of your own, never used before in this session; by default a random one.

        Raises:
            SessionBusy: a live stream owns the session; it names the owner.
            InvalidStreamId, NotJSON, WrongType: an argument cannot be used.
            IdTaken: a message of that ``id`` is there, with other content.
            SessionNotFound, LockTimeout, NestedLock, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        return streams.start(self._open(), session_id, message, stream_id)

    def cancel(self, session_id: str, stream_id: str, *, force: bool = False) -> bool:
        """Ask a stream, of whatever process, to end. The request is durable; the owner sees `Stream.cancelled`.

        A stream whose process is dead is cleared at once. Asking twice is asking once.

        Args:
            stream_id: the stream that is meant; if it is not the session's active one, nothing happens.
            force: take the session away now: prompt and partial stay, marked ``interrupted``; the owner gets
                `StreamLost`.
                If the disk refuses then, the stream goes on, but its events have ended: repeat it.

        Returns:
            True if that stream was the active one.

        Raises:
            SessionNotFound, LockTimeout, NestedLock, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        errors.require_flags(force=force)
        return streams.cancel(self._open(), session_id, stream_id, force=force)

    def follow(self, session_id: str, stream_id: str, *, after: int = 0) -> Following:
        """Follow a stream's events as they come, from any process, until it ends.

        Iterate the result; its `ended` then tells how the stream has ended. Events of this process come at once, those
        of others within some 10 ms. The death of the process that runs the stream is noticed within a second.

        Args:
            stream_id: a session's `active_stream_id`, say.
            after: the offset of the last event that was seen; 0 begins with the first.

        Raises:
            EventsNotFound: it never ran, it ended without an event, or its events have expired; load the session
                instead.
            CursorAhead: the stream has fewer events than `after`: the cursor is another stream's. Begin at 0.
            InvalidStreamId, WrongType: a malformed cursor.
            SessionNotFound, LockTimeout, CorruptSession: see the errors.
        """
        return Following(self._cursor(session_id, stream_id, after))

    def _cursor(self, session_id: str, stream_id: str, after: int = 0) -> Cursor:
        """Return the cursor for `follow` and its asynchronous twin."""
        return Cursor(self._open(), session_id, stream_id, after)

    def events(self, session_id: str, stream_id: str, *, after: int = 0) -> list[Event]:
        """Return the events that a stream has emitted until now, beginning behind `after`.

        Raises: as `follow`.
        """
        return self._cursor(session_id, stream_id, after).take_all()

    def stream(self, session_id: str) -> StreamInfo | None:
        """Tell who runs the session's active stream, and whether that process lives; None if no stream is active.

        A stream that another program left, without a lease, shows as dead. Takes the session's lock.

        Raises: as `load`; LockTimeout, NestedLock.
        """
        return streams.look_at(self._open(), session_id)

    def streams(self) -> list[StreamInfo]:
        """List the active streams, and for each whether it lives. Takes the lock of one session at a time.

        Only streams that were started through `persist` are listed; see `clear_stale_streams` for others. The streams
        of a session that cannot be read, or is locked for too long, are left out: `check` names it.
        """
        backend = self._open()
        found = []
        for session_id in dict.fromkeys(session_id for session_id, _ in backend.files.leases()):
            # One damaged session must not hide the streams of the others; `check` names it.
            with suppress(*_UNREADABLE):
                found.append(streams.look_at(backend, session_id))
        return [info for info in found if info is not None]

    def clear_stale_streams(self, *, every_session: bool = False) -> list[ClearedStream]:
        """Clear every stream whose process is dead; for the start of a server, or now and then.

        Opens only the sessions that have a lease, however many others there are; one lock at a time. Left-over leases
        are removed, and events of streams that have ended go away when their time is over.

        Args:
            every_session: look into all sessions: also finds streams that another program left without a lease.

        Raises:
            SweepIncomplete: some sessions could not be looked at; what was cleared is in it.
        """
        errors.require_flags(every_session=every_session)
        backend = self._open()
        files = backend.files
        cleared: list[ClearedStream] = []
        failures: dict[str, Exception] = {}
        for session_id, stream_id in files.leases():
            try:
                if streams.sweep_lease(backend, session_id, stream_id):
                    cleared.append(ClearedStream(session_id, stream_id))
            except (errors.PersistError, OSError) as error:
                failures[session_id] = error
        for session_id in files.session_ids() if every_session else []:
            try:
                active = streams.active_in(files.read_head(session_id))
                if active is not None and streams.clear_stale(backend, session_id, active) is not None:
                    cleared.append(ClearedStream(session_id, str(active)))
            except (errors.PersistError, OSError) as error:
                failures[session_id] = error
        try:
            backend.events.sweep()
        except errors.PersistError as error:
            failures["*"] = error
        if failures:
            raise errors.SweepIncomplete(cleared=cleared, failures=failures)
        return cleared

    # --- care ---

    def check(self) -> list[maintenance.Problem]:
        """Read every session whole, and name what is damaged, stale, left over or no session. Changes nothing.

        Takes the lock only of sessions that name a stream. While others write, a commit under way may show as a
        left-over.
        """
        return maintenance.check(self._open())

    def compact(self, session_id: str, *, alone: bool = False) -> bool:
        """Fold a session's journal into its document; it stays at its revision. What crashes have left of it is
        removed.

        That happens by itself when a journal has outgrown its document.

        Args:
            alone: leave no journal, so that the file alone is the session, to be edited or copied. The next commit to a
                large one makes a new journal.

        Returns:
            Whether there was anything to fold.

        Raises:
            SessionNotFound, LockTimeout, NestedLock, CorruptSession, CommitFailed, CommitUnknown: see the errors.
        """
        errors.require_flags(alone=alone)
        with self._open().files.transaction(session_id) as tx:
            return tx.compact(alone=alone)

    def accept(self, session_id: str, *, drop_journal: bool = False) -> Session:
        """Take a document as it is after an edit by hand: it gets new checksums and the next revision.

        A session that is sound is left alone. Of a journal that is damaged, what stands before the damage is taken; a
        copy of it is kept beside it, with ".damaged" behind its name. Where the journal is gone, nobody knows how many
        revisions were in it: the next one is far above them all. Before you edit a session that has a journal, fold it
        with ``compact(session_id, alone=True)``.

        Args:
            drop_journal: give the commits in the journal up. It is kept, with ".damaged" behind its name.

        Raises:
            CorruptSession: it is not strict JSON, or what its journal says does not fit it any more; mend it first.
            Otherwise as `edit`.
        """
        errors.require_flags(drop_journal=drop_journal)
        with self._open().files.transaction(session_id) as tx:
            committed = tx.accept(drop_journal=drop_journal)
        return self._session(session_id, committed, is_durable=True)


def _directory(path: object, *, create: bool) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or "\0" in str(path):
        raise errors.WrongType(what="a store's path", expected="a directory's name", got=repr(path))
    directory = Path(path)
    try:
        found = "a directory" if directory.is_dir() else "a file" if directory.exists() else "missing"
    except OSError as error:
        raise errors.Unreadable.because(directory, error) from error
    if found == "a file" or (found == "missing" and not create):
        raise errors.WrongType(what=f"the store {directory}", expected="a directory that is there", got=found)
    return directory


def _seconds(what: str, value: object) -> float:
    if type(value) in (int, float) and math.isfinite(value) and value >= 0:  # type: ignore[arg-type,operator]
        return float(value)  # type: ignore[arg-type]
    raise errors.WrongType(what=what, expected="a number of seconds from 0 up", got=repr(value))
