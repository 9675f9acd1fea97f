"""Store: the verbs. Each is one transaction on one session, or a look that takes no lock."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from persist import backup, errors, json_codec, maintenance, streams, turn
from persist.arguments import expanded, require_flags, require_key, require_limit, require_text, require_texts, seconds
from persist.event_log import Event, EventFiles
from persist.follow import Cursor, Following
from persist.head import Head
from persist.merge import Policy, check_policies
from persist.session import Session
from persist.storage import cache, commit, document
from persist.storage.content import ALWAYS_APART, HEADER, Content, empty, encoded
from persist.storage.transaction import Locked, SessionFiles
from persist.streams import Backend, Stream, StreamInfo
from persist.transaction import Transaction, refuse_changed_stream_fields, require_version
from persist.turn import Message
from persist.working_copy import WorkingCopy

Result = TypeVar("Result")
_MODES = (0o600, 0o640, 0o660)
_UNREADABLE = (errors.SessionNotFound, errors.CorruptSession, errors.UnsupportedFormat, errors.LockTimeout, OSError)


@dataclass(frozen=True, slots=True)
class ClearedStream:
    """A stale stream that a sweep has cleared."""

    session_id: str
    stream_id: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        cleared: the streams that it has cleared.
        failures: of each session that it could not look at, the error, by the session's id; ``"*"`` for the directory
            of the events. Mend those, and sweep again.
    """

    cleared: list[ClearedStream]
    failures: dict[str, Exception]


class Store:
    """A directory of sessions, shared by any number of threads and processes of one machine.

    Args:
        path: the directory; made (mode 0700) if it is missing. A leading ``~`` or ``~user`` is a home directory.
        timeout_s: seconds that a verb waits for a session's lock before it raises `LockTimeout`; 0 is now or never.
            Every verb that waits takes a `timeout_s` of its own.
        journal: which sessions have a journal beside their document, so that a commit costs what it changes:
            ``"auto"``, those above 64 KiB; ``"always"``, all; ``"never"``, none. It is for what this store writes:
            every store reads all.
        merge: top-level field -> "sum" | "max" | "mine" | "theirs": how `Session.save` settles a field that both sides
            changed, instead of raising `MergeConflict`. Not for ``messages`` and ``tool_calls``, nor for the stream
            fields.
        keep_events_s: seconds that a stream's events stay after its end, for those who come back late.
        keep_events_bytes: how large the events of a stream may grow, at least 4 KiB. Beyond that it drops the oldest
            ones, and keeps those of the younger half. None keeps all. 64 MiB are some 800,000 tokens. An event that is
            larger than half of it stays until the next ones come.
        cache_bytes: how much memory the store may use for what it knows of large sessions.
        unsafe_filesystem: True accepts any file system without a look. On one of another machine, or that a virtual
            machine or a container shares with its host, no guarantee holds. One that is not known is tried with a lock,
            and a `RuntimeWarning` tells of it.
        mode: that of the files that this store makes. 0o660 shares them with a group, and 0o640 lets the group read.
            Directories that it makes have 0o700, 0o2770 or 0o2750, and files get the group of their directory. The
            umask counts for nothing. Every store on the directory needs the same one. A directory that is there must
            have its mode already.
        create: False opens a directory that must be there, and makes nothing in it until something is written.

    Raises:
        InvalidArgument: an argument is not what it must be.
        Unreadable: the disk, or its permissions, refused.
        InvalidArgument: the directory is on a file system where locks or fsync do not hold: nfs, cifs, virtiofs, say.

    Example:
        >>> import persist, tempfile
        >>> store = persist.Store(tempfile.mkdtemp())
        >>> session = store.create("s-42", {"title": "New chat", "messages": []})
        >>> a, b = store.load("s-42"), store.load("s-42")
        >>> a.data["title"] = "File locks"
        >>> b.data["messages"].append({"id": "m1", "role": "user", "content": "hi"})
        >>> versions = a.save(), b.save()
        >>> store.load("s-42").data
        {'title': 'File locks', 'messages': [{'id': 'm1', 'role': 'user', 'content': 'hi'}]}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout_s: float = 5.0,
        journal: commit.Mode = "auto",
        merge: Mapping[str, Policy] | None = None,
        keep_events_s: float = 300.0,
        keep_events_bytes: int | None = 64 * 1024 * 1024,
        cache_bytes: int = 64 * 1024 * 1024,
        unsafe_filesystem: bool = False,
        mode: int = 0o600,
        create: bool = True,
    ) -> None:
        require_flags(unsafe_filesystem=unsafe_filesystem, create=create)
        directory = _directory(path, create=create)
        if journal not in get_args(commit.Mode):
            raise errors.InvalidArgument(what="journal", expected=" | ".join(get_args(commit.Mode)), got=repr(journal))
        policies = {} if merge is None else merge
        check_policies(policies)
        for field in policies.keys() & {HEADER, *turn.IDLE, *ALWAYS_APART}:
            # To take one side of a list would drop what the other has appended.
            raise errors.reserved(field, "It has a rule of its own: leave it out of Store(merge=…).")
        self._policies = {json_codec.joined(field): policy for field, policy in policies.items()}
        if type(cache_bytes) is not int or cache_bytes < 0:
            expected = "a number of bytes from 0 up"
            raise errors.InvalidArgument(what="cache_bytes", got=repr(cache_bytes), expected=expected)
        if keep_events_bytes is not None and (type(keep_events_bytes) is not int or keep_events_bytes < 4096):
            expected = "a number of bytes from 4096 up, or None"
            raise errors.InvalidArgument(what="keep_events_bytes", got=repr(keep_events_bytes), expected=expected)
        if type(mode) is not int or mode not in _MODES:
            expected = " | ".join(map("0o{:o}".format, _MODES))
            got = f"0o{mode:o}" if type(mode) is int else repr(mode)
            raise errors.InvalidArgument(what="mode", got=got, expected=expected)
        kept: dict[str, Any] = {"cache_bytes": cache_bytes, "unsafe_filesystem": unsafe_filesystem}
        timeout_s, keep_events_s = seconds("timeout_s", timeout_s), seconds("keep_events_s", keep_events_s)
        files = SessionFiles(directory, commit.Options(journal, mode), timeout_s=timeout_s, create=create, **kept)
        self._backend = Backend(files, EventFiles(files, keep_events_s, keep_events_bytes))
        self._options: dict[str, Any] = {
            "timeout_s": timeout_s,
            "journal": journal,
            "merge": self._policies,
            "keep_events_s": keep_events_s,
            "keep_events_bytes": keep_events_bytes,
            "mode": mode,
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
        return Path(self._backend.files.layout.directory)

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

    def _locked(self, session_id: str, timeout_s: float | None) -> Locked:
        """Hold a session's lock for a block."""
        if self._is_closed:
            self._open()  # raises
        return self._backend.files.transaction(session_id, timeout_s)

    def _session(self, session_id: str, found: cache.Replica, *, is_durable: bool) -> Session:
        return Session(self._backend, self._policies, session_id, found, is_durable=is_durable)

    # --- looking ---

    def load(self, session_id: str) -> Session:
        """Return a session as it was last committed. Takes no lock and never writes.

        Raises:
            SessionNotFound: create it first.
            CorruptSession, UnsupportedFormat, Unreadable: the file cannot be trusted; it was not changed.
            InvalidArgument: an id is any text of 1 to 512 characters.
            Unreadable: the disk, or its permissions, refused.
        """
        return self._session(session_id, self._open().files.read(session_id), is_durable=False)

    def head(self, session_id: str) -> Head:
        """Return the small fields of a session, without reading its messages. Takes no lock and never writes.

        Raises: as `load`, but damage among the messages goes unnoticed.
        """
        return Head.of(session_id, self._open().files.read_head(session_id))

    def heads(self, *, prefix: str = "", after: str | None = None, limit: int | None = None) -> Iterator[Head]:
        """Yield the heads of sessions, by their ids; see `ids` for the arguments. Takes no lock.

        Each is read when it is asked for. A session that is gone by then, or cannot be read, is left out: one damaged
        file must not hide the others. `check` names it.
        """
        files = self._open().files
        for session_id in self.ids(prefix=prefix, after=after, limit=limit):
            with suppress(*_UNREADABLE):
                yield Head.of(session_id, files.read_head(session_id))

    def tail(self, session_id: str, *, limit: int = 20, field: str = turn.MESSAGES) -> list[Any]:
        """Return the last items of a list, and read no more than that takes. Takes no lock and never writes.

        Args:
            limit: at most so many, the last one last.
            field: a top-level list. One that is missing has no items.

        Raises:
            InvalidArgument: the field is no list.
            Otherwise as `load`, but damage among the items goes unnoticed.
        """
        require_limit(limit, may_be_none=False)
        require_text("field", field)
        return self._open().files.read_last(session_id, json_codec.joined(field), limit)

    def exists(self, session_id: str) -> bool:
        """Tell whether there is such a session. Takes no lock."""
        return self._open().files.exists(session_id)

    def ids(self, *, prefix: str = "", after: str | None = None, limit: int | None = None) -> list[str]:
        """Return session ids, sorted. Takes no lock.

        Args:
            prefix: only those that begin with it: end it with a separator.
            after: only those behind it: the last id of the page before.
            limit: at most so many.
        """
        require_text("prefix", prefix)
        require_texts(after=after)
        require_limit(limit)
        found = self._open().files.session_ids()
        return [each for each in found if each.startswith(prefix) and (after is None or each > after)][:limit]

    # --- writing ---

    def create(self, session_id: str, data: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Session:
        """Make a session. Durable and visible on return.

        Raises:
            SessionExists: load it, or choose another id.
            InvalidArgument, NotJSON: an argument cannot be kept; nothing was written.
            LockTimeout, LockError, CommitFailed, CommitUnknown: see the errors.
        """
        content = encoded({} if data is None else data)
        refuse_changed_stream_fields(empty(), content)
        return self._created(session_id, content, timeout_s)

    def _created(self, session_id: str, content: Content, timeout_s: float | None) -> Session:
        with self._locked(session_id, timeout_s) as tx:
            if tx.exists():
                # A caller that asks again takes this for success. The first answer may have been lost in a crash.
                with suppress(errors.CorruptSession, errors.UnsupportedFormat, errors.Unreadable):
                    tx.confirm()
                raise errors.SessionExists(session_id=session_id, path=tx.paths.document)
            committed = tx.commit(document.first_header(session_id if tx.paths.file_id else None), content)
        return self._session(session_id, committed, is_durable=True)

    def duplicate(self, session_id: str, new_id: str, *, timeout_s: float | None = None) -> Session:
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
        return self._created(new_id, content, timeout_s)

    def replace(
        self, session_id: str, data: dict[str, Any], *, if_version: str | None = None, timeout_s: float | None = None
    ) -> Session:
        """Put other data in the place of a session's, which may be damaged. Durable and visible on return.

        A session that can be read keeps its history of versions. One that cannot be read begins anew, and what stood
        there is gone: copy the file first if it may be of use. A later `save` of an object that was loaded before is
        refused.

        Args:
            if_version: the version that the caller has seen. None replaces only a session that cannot be read.

        Raises:
            SessionNotFound: create it.
            SessionExists: it can be read, and no version was named.
            VersionMismatch: it has another version.
            SessionBusy: a live stream owns it; wait, or cancel it.
            UnsupportedFormat: another version of persist may read it.
            InvalidArgument, NotJSON: an argument cannot be kept; nothing was written.
            CorruptSession: a version was named, and the session cannot be read.
            LockTimeout, LockError, CommitFailed, CommitUnknown: see the errors.
        """
        require_texts(if_version=if_version)
        content = encoded(data)
        refuse_changed_stream_fields(empty(), content)
        with self._locked(session_id, timeout_s) as tx:
            committed = streams.replace(self._backend, tx, content, if_version)
        return self._session(session_id, committed, is_durable=True)

    def delete(
        self, session_id: str, *, if_version: str | None = None, force: bool = False, timeout_s: float | None = None
    ) -> None:
        """Remove a session; durable on return. A later `save` of an object that was loaded before is refused.

        Args:
            if_version: the version that the caller has seen: any other one is left alone.
            force: also while a live stream owns it (the stream gets `StreamLost`), and also if the file is damaged.

        Raises:
            SessionNotFound: there is none.
            VersionMismatch: it has another version.
            SessionBusy: a live stream owns it; wait, cancel it, or force.
            CorruptSession: it is damaged: force, or `replace` it.
            LockTimeout, LockError: see the errors.
        """
        require_flags(force=force)
        require_texts(if_version=if_version)
        with self._locked(session_id, timeout_s) as tx:
            if if_version is not None:
                require_version(WorkingCopy.of(tx), session_id, if_version)
            streams.delete(self._backend, tx, force=force)

    @contextmanager
    def transaction(
        self,
        session_id: str,
        *,
        if_version: str | None = None,
        create: bool = False,
        touch: bool = True,
        timeout_s: float | None = None,
    ) -> Iterator[Transaction]:
        """Change a session exactly: the lock is held from the read to the write, for the whole block.

        What the block changes is one commit, durable when the block has ended. It costs what it changes. A block that
        raises writes nothing, and so does one that changes nothing. Keep it short: others wait. Messages that it
        removes are removed, also in the middle of a turn.

        Args:
            if_version: the version that the edit was decided on: `Session.version`, `Head.version`, or what a verb has
                returned. Name it for an edit that removes something. None takes any.
            create: begin with an empty session where there is none, which is made also if the block changes nothing.
                It is for the first write of a request, and not beside `if_version`.
            touch: False keeps `updated_at`.
            timeout_s: how long to wait for the lock, in the place of the store's; 0 is now or never.

        Raises:
            SessionNotFound, LockTimeout, LockError, CorruptSession, VersionMismatch: before the block.
            NotJSON, InvalidArgument, SessionBusy, CommitFailed, CommitUnknown: after it; nothing was written, unless it
                says "unknown".
        """
        require_flags(touch=touch, create=create)
        require_texts(if_version=if_version)
        is_new = create and if_version is None
        with self._locked(session_id, timeout_s) as tx:
            copy = WorkingCopy.of(tx, create=is_new)
            require_version(copy, session_id, if_version)
            block = Transaction(copy, lambda: streams.require_free(tx))
            yield block
            if block.is_deleted:
                if copy.version is not None:
                    streams.delete(self._backend, tx)
            else:
                block.version = copy.commit_changes(streams.checked(tx, copy), touch=touch).header.version

    def update(
        self,
        session_id: str,
        function: Callable[[Transaction], Result],
        *,
        if_version: str | None = None,
        create: bool = False,
        touch: bool = True,
        timeout_s: float | None = None,
    ) -> Result:
        """Call a function in a `transaction`, commit what it changed, and return its result.

        Args:
            function: changes the transaction in place; if it raises, nothing is written.

        Raises:
            InvalidArgument: the function is asynchronous, or it changed nothing and returned a new dict that has keys
                of the document: it would be lost.
            Otherwise as `transaction`.
        """
        options: dict[str, Any] = {"if_version": if_version, "create": create, "touch": touch, "timeout_s": timeout_s}
        with self.transaction(session_id, **options) as tx:
            return tx.result_of(function)

    def append(
        self,
        session_id: str,
        field: str,
        item: Any,
        *,
        key: str | None = "id",
        create: bool = False,
        touch: bool = True,
        timeout_s: float | None = None,
    ) -> str:
        """Add an item to a list of the document; durable and visible on return. See `extend`.

        Raises:
            InvalidArgument: a list is no message: use `extend` for several.
            Otherwise as `extend`.
        """
        if type(item) is list and field in ALWAYS_APART:
            expected = "one message: use extend() for several"
            raise errors.InvalidArgument(what=f"an item of {field!r}", expected=expected, got="a list")
        return self._add(session_id, field, [json_codec.encode_exact(item, (field,))], key, create, touch, timeout_s)

    def extend(
        self,
        session_id: str,
        field: str,
        items: Iterable[Any],
        *,
        key: str | None = "id",
        create: bool = False,
        touch: bool = True,
        timeout_s: float | None = None,
    ) -> str:
        """Add items to a list of the document, in one commit; durable and visible on return.

        It is idempotent: an item whose `key` has the value that an item there has, with the same content, is taken as
        added already. So a caller may repeat it after an error. Items without that key are added each time.

        Args:
            field: a top-level field, ``"messages"`` say. A missing list is made.
            items: any JSON values.
            key: the name of the key that tells items apart. None adds all of them, whatever is there.
            create: make an empty session first where there is none. It is for the first write of a request.
            touch: False keeps `updated_at`.
            timeout_s: how long to wait for the lock, in the place of the store's; 0 is now or never.

        Returns:
            The version that holds the items.

        Raises:
            MergeConflict: an item of that key is there, with other content.
            NotJSON, InvalidArgument: an item or the field cannot be used.
            SessionNotFound, LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        return self._add(session_id, field, _encoded_items(field, items), key, create, touch, timeout_s)

    def _add(
        self,
        session_id: str,
        field: str,
        lines: list[bytes],
        key: str | None,
        create: bool,
        touch: bool,
        timeout_s: float | None,
    ) -> str:
        # The arguments of most callers need no look one by one.
        if type(field) is not str or field in turn.IDLE or key != "id" or create is not False or touch is not True:
            _require_list(field, key, touch, create)
        with self._locked(session_id, timeout_s) as tx:
            copy = WorkingCopy.of(tx, create=create) if create else WorkingCopy(tx.read(), tx)
            turn.add_once(copy.list(field), lines, key=key, field=field)
            changed = copy.changed()
            if changed is not None and key != "id":
                streams.refuse_twins(copy.header, copy.committed, changed[0])
            return copy.commit_changes(changed, touch=touch).header.version

    # --- streams ---

    def start_stream(
        self,
        session_id: str,
        message: Message | None = None,
        *,
        stream_id: str | None = None,
        fields: Mapping[str, Any] | None = None,
        create: bool = False,
        once: bool = False,
        timeout_s: float | None = None,
    ) -> Stream:
        """Claim a session for a turn of the model. On return the claim, its liveness and the prompt are durable and
        visible.

        A stale stream is cleared on the way. Use the result in a ``with``: leaving it without `finish` is `fail`.

        Args:
            message: the prompt; without an ``id`` it gets ``<stream id>.prompt``. One whose ``id`` is in ``messages``
                already is taken up again: that of a turn that was interrupted, say. One that has its answer, too, but
                for `once`. None starts a turn without a prompt.
            stream_id: an id of your own, never used before in this session; by default a random one.
            fields: top-level fields to set in the same commit: the model that answers, say.
            create: begin with an empty session where there is none.
            once: start nothing for a prompt that runs, or that has its answer. The prompt needs an ``id``. So a request
                may be sent twice. The answer gets the prompt's id as ``answers``, by which it is found again.
            timeout_s: how long to wait for the lock, in the place of the store's; 0 is now or never.

        Raises:
            AlreadyStarted: with `once`: its `stream_id` runs the prompt, or its `answer` is there.
            SessionBusy: a live stream owns the session; it names the owner.
            InvalidArgument, NotJSON: an argument cannot be used.
            MergeConflict: a message of that ``id`` is there, with other content.
            SessionNotFound, LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        require_flags(create=create, once=once)
        options: dict[str, Any] = {"fields": fields, "create": create, "once": once, "timeout_s": timeout_s}
        return streams.start(self._open(), session_id, message, stream_id, **options)

    def cancel(self, session_id: str, stream_id: str, *, force: bool = False, timeout_s: float | None = None) -> bool:
        """Ask a stream, of whatever process, to end. The request is durable; the owner sees `Stream.is_cancelled`.

        A stream whose process is dead is cleared at once. Asking twice is asking once.

        Args:
            stream_id: the stream that is meant; if it is not the session's active one, nothing happens.
            force: take the session away now: prompt and partial stay, marked ``interrupted``; the owner gets
                `StreamLost`.
                If the disk refuses then, the stream goes on, but its events have ended: repeat it.

        Returns:
            True if that stream was the active one.

        Raises:
            SessionNotFound, LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        require_flags(force=force)
        with self._locked(session_id, timeout_s) as tx:
            return streams.cancel(self._backend, tx, stream_id, force=force)

    def follow(self, session_id: str, stream_id: str, *, after: int | Literal["end"] = 0) -> Following:
        """Follow a stream's events as they come, from any process, until it ends.

        Iterate the result; its `ended` then tells how the stream has ended. Events of this process come at once, those
        of others within some 10 ms. The death of the process that runs the stream is noticed within a second.

        Args:
            stream_id: a session's `active_stream_id`, say.
            after: the offset of the last event that was seen; 0 begins with the first. ``"end"`` begins behind the last
                one that is there now, whose offset is then the result's `offset`.

        Raises:
            EventsNotFound: it never ran, it ended without an event, or its events have expired; load the session
                instead. Or the event behind `after` was dropped (`Store(keep_events_bytes=…)`): load the session, and
                go on with ``after=error.first - 1`` or ``"end"``. A step of a slow loop may raise it, too. Or the
                stream has fewer events than `after`: the cursor is another stream's. Begin at 0.
            InvalidArgument: a malformed cursor.
            SessionNotFound, LockTimeout, CorruptSession: see the errors.
        """
        return Following(self._cursor(session_id, stream_id, after))

    def _cursor(self, session_id: str, stream_id: str, after: int | Literal["end"] = 0) -> Cursor:
        """Return the cursor for `follow` and its asynchronous twin."""
        return Cursor(self._open(), session_id, stream_id, after)

    def events(self, session_id: str, stream_id: str, *, after: int = 0) -> list[Event]:
        """Return the events that a stream has emitted until now, beginning behind `after`.

        Raises: as `follow`.
        """
        return self._cursor(session_id, stream_id, after).take_all()

    def stream(self, session_id: str, *, timeout_s: float | None = None) -> StreamInfo | None:
        """Tell who runs the session's active stream, and whether that process lives; None if no stream is active.

        A stream that another program left, without a lease, shows as dead. Takes the session's lock.

        Raises: as `load`; LockTimeout, LockError.
        """
        with self._locked(session_id, timeout_s) as tx:
            return streams.look_at(tx)

    def streams(self, *, timeout_s: float | None = None) -> list[StreamInfo]:
        """List the active streams, and for each whether it lives. Takes the lock of one session at a time.

        Only streams that were started through `persist` are listed; see `clear_stale_streams` for others. The streams
        of a session that cannot be read, or is locked for too long, are left out: `check` names it.
        """
        backend, timeout_s = self._open(), None if timeout_s is None else seconds("timeout_s", timeout_s)
        found = []
        for session_id in dict.fromkeys(session_id for session_id, _ in backend.files.leases()):
            # One damaged session must not hide the streams of the others; `check` names it.
            with suppress(*_UNREADABLE):
                with backend.files.transaction(session_id, timeout_s) as tx:
                    found.append(streams.look_at(tx))
        return [info for info in found if info is not None]

    def clear_stale_streams(self, *, every_session: bool = False, timeout_s: float | None = None) -> Sweep:
        """Clear every stream whose process is dead; for the start of a server, or now and then.

        Opens only the sessions that have a lease, however many others there are; one lock at a time. Left-over leases
        are removed, and events of streams that have ended go away when their time is over.

        Args:
            every_session: look into all sessions: also finds streams that another program left without a lease.
            timeout_s: how long to wait for each lock, in the place of the store's.

        Returns:
            What it cleared, and the errors of the sessions that it could not look at: one of these keeps it from no
            other one.
        """
        sweep = Sweep([], {})
        for step in self._sweeping(every_session=every_session, timeout_s=timeout_s):
            sweep.cleared.extend(step.found.cleared)
            sweep.failures.update(step.found.failures)
        return sweep

    def _sweeping(
        self, *, every_session: bool = False, timeout_s: float | None = None
    ) -> Iterator[maintenance.Step[Sweep]]:
        """Sweep one session after the other: each step is what has come of one."""
        require_flags(every_session=every_session)
        backend, timeout_s = self._open(), None if timeout_s is None else seconds("timeout_s", timeout_s)
        files = backend.files
        leases, others = files.leases(), files.session_ids() if every_session else []
        total = len(leases) + len(others)
        for done, (session_id, stream_id) in enumerate(leases, 1):
            found = Sweep([], {})
            try:
                if streams.sweep_lease(backend, session_id, stream_id, timeout_s=timeout_s):
                    found.cleared.append(ClearedStream(session_id, stream_id))
            except (errors.PersistError, OSError) as error:
                found.failures[session_id] = error
            yield maintenance.Step(done, total, found)
        for done, session_id in enumerate(others, len(leases) + 1):
            found = Sweep([], {})
            try:
                active = streams.active_in(files.read_head(session_id))
                is_active = active is not None
                if is_active and streams.clear_stale(backend, session_id, active, timeout_s=timeout_s) is not None:
                    found.cleared.append(ClearedStream(session_id, str(active)))
            except (errors.PersistError, OSError) as error:
                found.failures[session_id] = error
            yield maintenance.Step(done, total, found)
        found = Sweep([], {})
        try:
            backend.events.sweep()
        except errors.PersistError as error:
            found.failures["*"] = error
        yield maintenance.Step(total, total, found)

    # --- care ---

    def check(self) -> list[maintenance.Problem]:
        """Read every session whole, and name what is damaged, stale, left over or foreign. No session is changed.

        What looks wrong is judged under its session's lock, so nothing of a commit or a delete under way is named. The
        lock of any other session is not taken. A lock file without a session goes, as with every verb. Whoever wants to
        know whether all is well leaves the problems of the kind "foreign" out: files that are not of `persist`.
        """
        return maintenance.check(self._open())

    def backup(
        self, dest: str | os.PathLike[str], *, prune: bool = False, timeout_s: float | None = None
    ) -> backup.Backup:
        """Copy all sessions into a directory, or bring an earlier copy up to date. The copies are durable on return.

        Each session is read under its lock, and is copied as one whole document, without a journal. So servers may go
        on. The copy is a store itself. What has the same version there already is not written again. A running stream
        is copied as it is committed: where the copy is put back, the stream is dead, and a sweep clears it. Events,
        left-overs and foreign files are not copied.

        Args:
            dest: a new directory, an empty one, or an earlier backup of this store. It is made (mode 0700).
            prune: remove the copies of sessions that the store has no more. Without it they stay.
            timeout_s: how long to wait for each lock, in the place of the store's.

        Returns:
            What was copied, and the errors of the sessions that could not be: one of these keeps it from no other one.

        Raises:
            InvalidArgument: `dest` is something else, the copy of another store, say, or is in use as a store. Or the
                store is empty, and copies are to be removed.
            LockError: another backup writes to it, or this thread holds a session's lock.
            CommitFailed: the disk of `dest` refused. What is copied stands: mend that, and repeat it.
            PersistError: that disk failed at the end, so nobody knows what is durable there.
            Unreadable: the disk, or its permissions, refused.

        Example:
            >>> import persist, tempfile
            >>> store = persist.Store(tempfile.mkdtemp())
            >>> session = store.create("s-42", {"messages": []})
            >>> copies = tempfile.mkdtemp()
            >>> store.backup(copies).copied, store.backup(copies).unchanged
            (['s-42'], ['s-42'])
            >>> persist.Store(copies).load("s-42").data
            {'messages': []}
        """
        return backup.backup(self._open(), dest, prune=prune, timeout_s=timeout_s)

    def compact(self, session_id: str, *, alone: bool = False, timeout_s: float | None = None) -> bool:
        """Fold a session's journal into its document; it keeps its version. What crashes have left of it is removed.

        That happens by itself when a journal has outgrown its document.

        Args:
            alone: leave no journal, so that the file alone is the session, to be edited or copied. The next commit to a
                large one makes a new journal.

        Returns:
            Whether there was anything to fold.

        Raises:
            SessionNotFound, LockTimeout, LockError, CorruptSession, CommitFailed, CommitUnknown: see the errors.
        """
        require_flags(alone=alone)
        with self._locked(session_id, timeout_s) as tx:
            return tx.compact(alone=alone)

    def accept(self, session_id: str, *, drop_journal: bool = False, timeout_s: float | None = None) -> Session:
        """Take a document as it is after an edit by hand: it gets new checksums and the next revision.

        A session that is sound is left alone. Of a journal that is damaged, what stands before the damage is taken; a
        copy of it is kept beside it, with ".damaged" behind its name. Where the journal is gone, nobody knows how many
        revisions were in it: the next one is far above them all. Before you edit a session that has a journal, fold it
        with ``compact(session_id, alone=True)``.

        Args:
            drop_journal: give the commits in the journal up. It is kept, with ".damaged" behind its name.

        Raises:
            CorruptSession: it is not strict JSON, or what its journal says does not fit it any more; mend it first.
            Otherwise as `transaction`.
        """
        require_flags(drop_journal=drop_journal)
        with self._locked(session_id, timeout_s) as tx:
            committed = tx.accept(drop_journal=drop_journal)
        return self._session(session_id, committed, is_durable=True)


def _require_list(field: object, key: object, touch: object, create: object) -> None:
    require_text("field", field)
    require_flags(touch=touch, create=create)
    require_key(key)
    if field in turn.IDLE:
        raise errors.reserved(str(field), "Use store.start_stream().")


def _encoded_items(field: str, items: Iterable[Any]) -> list[bytes]:
    if type(items) is not list:
        if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
            raise errors.InvalidArgument(what="items", expected="several items, in a list", got=type(items).__name__)
        items = list(items)
    lines = []
    for place, item in enumerate(items):
        lines.append(json_codec.encode_exact(item, (field, place) if len(items) > 1 else (field,)))
    return lines


def _directory(path: object, *, create: bool) -> str:
    """Return the real path of a store's directory, which need not be there yet.

    The real one: two names of one directory must share their in-process locks, and a chdir must not move the store.
    """
    directory = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if type(directory) is not str or not directory or "\0" in directory:
        raise errors.InvalidArgument(what="a store's path", expected="a directory's name", got=repr(path))
    name, directory = directory, os.path.realpath(expanded(directory))
    try:
        found = "a directory" if stat.S_ISDIR(os.stat(directory).st_mode) else "a file"
    except (FileNotFoundError, NotADirectoryError):
        found = "missing"
    except OSError as error:
        raise errors.Unreadable.because(directory, error) from error
    if found == "a file" or (found == "missing" and not create):
        raise errors.InvalidArgument(what=f"the store {name}", expected="a directory that is there", got=found)
    return directory
