"""The store and its verbs. Each verb is one transaction on one session, or a look that takes no lock."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from persist import backup, engines, errors, json_codec, maintenance, streams, turn
from persist.arguments import require_flags, require_key, require_limit, require_text, require_texts, seconds
from persist.engine import Committed, Event, Seeking, decoding
from persist.engine import Transaction as Locked
from persist.follow import Cursor, Following
from persist.head import Head, Recent
from persist.merge import Policy, check_policies
from persist.session import Session
from persist.storage import commit, document
from persist.storage.content import ALWAYS_APART, HEADER, Content, empty, encoded, id_in
from persist.streams import Backend, Stream, StreamInfo
from persist.transaction import Transaction, refuse_changed_stream_fields, require_version
from persist.turn import Message
from persist.view import View
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
        failures: the errors of the sessions that it could not look at, by the session's id. ``"*"`` stands for the
            directory of the events. Remove the causes, and sweep again.
    """

    cleared: list[ClearedStream]
    failures: dict[str, Exception]


def _page(heads: list[Head], cursor: str | None) -> Recent:
    # The engine's order is exact up to a second. Within a page the heads tell the exact order.
    heads.sort(key=lambda head: head.updated_at, reverse=True)
    return Recent(heads, cursor)


class Store:
    """A directory of sessions, shared by any number of threads and processes of one machine.

    Args:
        path: the directory. A missing one is created (mode 0700). A leading ``~`` or ``~user`` is a home directory.
            Or the URL of a PostgreSQL database, for several machines: ``"postgresql://user@host/database"``.
        timeout_s: seconds that a verb waits for a session's lock before it raises `LockTimeout`. 0 tries only once.
            Every verb that waits takes a `timeout_s` of its own.
        journal: the sessions that have a journal beside their document, so that the cost of a commit depends only on
            the change. ``"auto"`` means those above 64 KiB, ``"always"`` means all, and ``"never"`` means none. It
            holds for the writes of this store. Every store reads all sessions.
        merge: top-level field -> "sum" | "max" | "mine" | "theirs". This policy tells `Session.save` how to settle a
            field that both sides changed, instead of raising `MergeConflict`. ``messages``, ``tool_calls`` and the
            stream fields cannot have a policy.
        keep_events_s: seconds that a stream's events stay after its end, for followers that come back late.
        keep_events_bytes: how large the events of a stream may grow, at least 4 KiB. Beyond that the stream drops the
            oldest events, and keeps those of the younger half. None keeps all. 64 MiB are some 800,000 tokens. An event
            that is larger than half of the limit stays until the next ones come.
        answer_tool_calls: True gives each tool call of a turn that breaks off a synthetic result, in the commit that
            ends the turn (`fail`, a forced cancel, a clear of a stale stream). Without it the provider may refuse the
            conversation. See `repair`.
        cache_bytes: how much memory the store may use for its replicas of large sessions.
        unsafe_filesystem: True accepts any file system without a check. No guarantee holds on a file system of another
            machine, nor on one that a virtual machine or a container shares with its host. With False, a file system
            that is not known is tried with a lock, and a `RuntimeWarning` tells of it.
        mode: the mode of the files that this store creates. 0o660 shares them with a group, and 0o640 lets the group
            read. The directories that it creates have 0o700, 0o2770 or 0o2750, and files get the group of their
            directory. The umask counts for nothing. Every store on the directory needs the same mode. A directory that
            exists must have its mode already.
        create: False opens a directory that must exist, and creates nothing in it until something is written. In a
            database it opens a schema that must be up to date. With True the schema is made, or brought up to date.
        schema: the schema of a database, which ``?schema=…`` in the URL names, too.
        lease_s: seconds after which a process counts as dead that a database has not heard of, 1 or more.

    Raises:
        InvalidArgument: an argument is not what it must be, or the directory is on a file system where locks or fsync
            do not hold (nfs, cifs, virtiofs, say).
        Unreadable: the disk or its permissions refused.

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
        answer_tool_calls: bool = False,
        cache_bytes: int = 64 * 1024 * 1024,
        unsafe_filesystem: bool = False,
        mode: int = 0o600,
        create: bool = True,
        schema: str = engines.SCHEMA,
        lease_s: float = 15.0,
    ) -> None:
        require_flags(unsafe_filesystem=unsafe_filesystem, create=create, answer_tool_calls=answer_tool_calls)
        if journal not in get_args(commit.Mode):
            raise errors.InvalidArgument(what="journal", expected=" | ".join(get_args(commit.Mode)), got=repr(journal))
        policies = {} if merge is None else merge
        check_policies(policies)
        for field in policies.keys() & {HEADER, *turn.IDLE, *ALWAYS_APART}:
            # A policy that takes one side of a list would drop the items that the other side has appended.
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
        lease_s = seconds("lease_s", lease_s)
        if lease_s < 1:
            raise errors.InvalidArgument(what="lease_s", expected="1 second or more", got=errors.shown(lease_s))
        require_text("schema", schema)
        kept |= {
            "schema": schema,
            "lease_s": lease_s,
            "journal": journal,
            "mode": mode,
            "keep_events_s": keep_events_s,
            "keep_events_bytes": keep_events_bytes,
        }
        self._at, engine = engines.opened(path, create=create, timeout_s=timeout_s, **kept)
        self._backend = Backend(engine, answer_tool_calls)
        self._options: dict[str, Any] = {
            "timeout_s": timeout_s,
            "merge": self._policies,
            "answer_tool_calls": answer_tool_calls,
            **kept,
        }
        self._is_closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        # For multiprocessing. The other process opens the same directory for itself.
        return functools.partial(Store, **self._options), (self._at,)

    def __repr__(self) -> str:
        return f"<persist.Store {self._backend.engine.place}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The store's directory, absolute.

        Raises:
            InvalidArgument: the store is a database. `place` names it.
        """
        return Path(engines.require_files(self._backend.engine, "Store.place names it.").place)

    @property
    def place(self) -> str:
        """Where the store is, for people: its directory, or the URL of its database without a password."""
        return str(self._backend.engine.place)

    def close(self) -> None:
        """Refuse further verbs with `StoreClosed`.

        Running streams go on, and loaded sessions can still be saved. Events that have expired are removed. On
        PostgreSQL the connections are closed, as far as no stream of this process needs them.
        """
        self._is_closed = True
        self._backend.engine.close()

    def _open(self) -> Backend:
        if self._is_closed:
            raise errors.StoreClosed(path=self._backend.engine.place)
        return self._backend

    def _locked(
        self, session_id: str, timeout_s: float | None, *, seeking: Seeking | None = None
    ) -> AbstractContextManager[Locked]:
        """Hold a session's lock for a block."""
        if self._is_closed:
            self._open()  # raises
        return self._backend.engine.transaction(session_id, timeout_s, seeking=seeking)

    def _session(self, session_id: str, found: Committed, *, is_durable: bool) -> Session:
        return Session(self._backend, self._policies, session_id, found, is_durable=is_durable)

    # --- looking ---

    def load(self, session_id: str) -> Session:
        """Return a session as it was last committed. Takes no lock and never writes.

        Raises:
            SessionNotFound: there is no such session. Create it first.
            CorruptSession, UnsupportedFormat, Unreadable: the file cannot be trusted. It was not changed.
            InvalidArgument: the id is not valid. An id is any text of 1 to 512 characters.
            Unreadable: the disk or its permissions refused.
        """
        return self._session(session_id, self._open().engine.read(session_id), is_durable=False)

    def view(self, session_id: str) -> View:
        """Return a session as it was last committed, to be read value by value. Takes no lock and never writes.

        It reads the session's files whole, as `load` does, and decodes only what is asked for. `tail` and `head` read
        less.

        Raises: as `load`.

        Example:
            >>> import persist, tempfile
            >>> store = persist.Store(tempfile.mkdtemp())
            >>> version = store.append("s-42", "messages", {"id": "m1", "content": "hi"}, create=True)
            >>> view = store.view("s-42")
            >>> view.list("messages").find("m1")["content"], view.version == version
            ('hi', True)
        """
        return View(self._open().engine.read(session_id))

    def head(self, session_id: str) -> Head:
        """Return the small fields of a session, without reading its messages. Takes no lock and never writes.

        Raises: as `load`, but damage among the messages goes unnoticed.
        """
        return Head.of(session_id, self._open().engine.read_head(session_id))

    def heads(self, *, prefix: str = "", after: str | None = None, limit: int | None = None) -> Iterator[Head]:
        """Yield the heads of sessions, in the order of their ids. See `ids` for the arguments. Takes no lock.

        Each head is read when it is asked for. A session that is gone by then, or cannot be read, is left out, because
        one damaged file must not hide the others. `check` names it.
        """
        files = self._open().engine
        for session_id in self.ids(prefix=prefix, after=after, limit=limit):
            with suppress(*_UNREADABLE):
                yield Head.of(session_id, files.read_head(session_id))

    def recent(self, *, limit: int = 50, before: str | None = None, prefix: str = "") -> Recent:
        """Return the heads of the sessions that were updated last, the last one first. Takes no lock.

        There is no index, so nothing can drift. A commit marks the time of its session's lock file, at most once a
        second, and this goes by these times. So the order is exact up to one second. A copy that was put back, a file
        of another program, and files whose times a tool has set may be misplaced. None is hidden. Commits with
        ``touch=False`` move nothing. A session that cannot be read is left out, as in `heads`.

        It costs a look at each lock file of the store, and a read of each head that it returns.

        Args:
            limit: how many heads to return at most, 1 or more.
            before: the `cursor` of the page before. None begins with the first page. A session that is updated between
                two pages goes to the top, so the later page does not show it.
            prefix: return only sessions whose ids begin with it.

        Raises:
            InvalidArgument: `before` is no cursor.
            Unreadable: the directory cannot be read.

        Example:
            >>> import persist, tempfile
            >>> store = persist.Store(tempfile.mkdtemp())
            >>> for name in ("a", "b", "c"):
            ...     session = store.create(name)
            >>> page = store.recent(limit=2)
            >>> len(page), [head.id for head in store.recent(before=page.cursor)] != []
            (2, True)
        """
        require_limit(limit, may_be_none=False)
        if limit == 0:
            raise errors.InvalidArgument(what="limit", got="0", expected="a whole number from 1 up")
        require_text("prefix", prefix)
        require_texts(before=before)
        engine = self._open().engine
        heads: list[Head] = []
        last = None
        for cursor, session_id in engine.recent(before):
            if not session_id.startswith(prefix):
                continue
            if len(heads) >= limit:
                # There is one more, or an unreadable one, which the next page leaves out.
                return _page(heads, last)
            with suppress(*_UNREADABLE):
                heads.append(Head.of(session_id, engine.read_head(session_id)))
                last = cursor
        return _page(heads, None)

    def tail(self, session_id: str, *, limit: int = 20, field: str = turn.MESSAGES) -> list[Any]:
        """Return the last items of a list, and read no more than needed. Takes no lock and never writes.

        Args:
            limit: how many items to return at most. The last item comes last.
            field: a top-level list. A missing list has no items.

        Raises:
            InvalidArgument: the field is no list.
            Otherwise as `load`, but damage among the items goes unnoticed.
        """
        require_limit(limit, may_be_none=False)
        require_text("field", field)
        return self._open().engine.read_last(session_id, json_codec.joined(field), limit)

    def exists(self, session_id: str) -> bool:
        """Tell whether there is such a session. Takes no lock."""
        return self._open().engine.exists(session_id)

    def ids(self, *, prefix: str = "", after: str | None = None, limit: int | None = None) -> list[str]:
        """Return session ids, sorted. Takes no lock.

        Args:
            prefix: return only ids that begin with it. End it with a separator.
            after: return only ids behind it. It is the last id of the page before.
            limit: how many ids to return at most.
        """
        require_text("prefix", prefix)
        require_texts(after=after)
        require_limit(limit)
        found = self._open().engine.session_ids()
        return [each for each in found if each.startswith(prefix) and (after is None or each > after)][:limit]

    # --- writing ---

    def create(self, session_id: str, data: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Session:
        """Create a session. It is durable and visible on return.

        Raises:
            SessionExists: there is one of that id. Load it, or choose another id.
            InvalidArgument, NotJSON: an argument cannot be kept. Nothing was written.
            LockTimeout, LockError, CommitFailed, CommitUnknown: see the errors.
        """
        content = encoded({} if data is None else data)
        refuse_changed_stream_fields(empty(), content)
        return self._created(session_id, content, timeout_s)

    def _created(self, session_id: str, content: Content, timeout_s: float | None) -> Session:
        with self._locked(session_id, timeout_s) as tx:
            if tx.exists():
                # A caller that repeats a create takes this error for success, because a crash may have lost the first
                # answer. So the session must be durable.
                with suppress(errors.CorruptSession, errors.UnsupportedFormat, errors.Unreadable):
                    tx.confirm()
                raise errors.SessionExists(session_id=session_id, path=tx.place)
            committed = tx.commit(document.first_header(), content)
        return self._session(session_id, committed, is_durable=True)

    def duplicate(self, session_id: str, new_id: str, *, timeout_s: float | None = None) -> Session:
        """Copy a committed session to a new id, without its stream: no stream fields, no partial answer.

        Raises: as `load` for the first id, and as `create` for the second.
        """
        engine = self._open().engine
        found = engine.read(session_id)
        with decoding(session_id, engine.where(session_id)):
            copy = WorkingCopy(found)
            stream_id = turn.active_stream(copy.fields)
            owner = streams.owner_of(found.header, stream_id)
            if owner is None and stream_id is not None:
                # It is another program's turn. Its prompt may stand in the stream fields only.
                turn.interrupt_foreign(copy)
            turn.leave_out(copy, owner.answer_id if owner else None)
            content = copy.content
        return self._created(new_id, content, timeout_s)

    def replace(
        self, session_id: str, data: dict[str, Any], *, if_version: str | None = None, timeout_s: float | None = None
    ) -> Session:
        """Replace the data of a session, which may be damaged. Durable and visible on return.

        A session that can be read keeps its history of versions. A session that cannot be read begins anew. Its old
        content is gone, and a later `save` of an object that was loaded before is refused. Copy the file first if it
        may be of use.

        Args:
            if_version: the version that the caller has seen. None replaces only a session that cannot be read.

        Raises:
            SessionNotFound: there is no such session. Create it.
            SessionExists: it can be read, and no version was named.
            VersionMismatch: it has another version.
            SessionBusy: a live stream owns it. Wait, or cancel the stream.
            UnsupportedFormat: another version of persist may read it.
            InvalidArgument, NotJSON: an argument cannot be kept. Nothing was written.
            CorruptSession: a version was named, and the session cannot be read.
            LockTimeout, LockError, CommitFailed, CommitUnknown: see the errors.
        """
        require_texts(if_version=if_version)
        content = encoded(data)
        refuse_changed_stream_fields(empty(), content)
        with self._locked(session_id, timeout_s) as tx:
            committed = streams.replace(tx, content, if_version)
        return self._session(session_id, committed, is_durable=True)

    def delete(
        self, session_id: str, *, if_version: str | None = None, force: bool = False, timeout_s: float | None = None
    ) -> None:
        """Remove a session. Durable on return. A later `save` of an object that was loaded before is refused.

        Args:
            if_version: the version that the caller has seen. A session with any other version is left alone.
            force: remove it even while a live stream owns it (the stream gets `StreamLost`), or if the file is damaged.

        Raises:
            SessionNotFound: there is no such session.
            VersionMismatch: it has another version.
            SessionBusy: a live stream owns it. Wait, cancel the stream, or use `force`.
            CorruptSession: it is damaged. Use `force`, or `replace` it.
            LockTimeout, LockError: see the errors.
        """
        require_flags(force=force)
        require_texts(if_version=if_version)
        with self._locked(session_id, timeout_s) as tx:
            if if_version is not None:
                require_version(WorkingCopy.of(tx), session_id, if_version)
            streams.delete(tx, force=force)

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
        """Change a session exactly. The lock is held from the read to the write, for the whole block.

        The changes of the block are one commit, which is durable when the block has ended. Its cost depends only on the
        change. A block that raises writes nothing. A block that changes nothing writes nothing, either. Keep the block
        short, because others wait. Messages that it removes are gone, also in the middle of a turn.

        Args:
            if_version: the version for which the edit was decided: `Session.version`, `Head.version`, or the result of
                a verb. Name it for an edit that removes something. None takes any version.
            create: begin with an empty session if there is none. It is created even if the block changes nothing. This
                is for the first write of a request. It does nothing together with `if_version`.
            touch: False keeps `updated_at`.
            timeout_s: seconds to wait for the lock, in the place of the store's `timeout_s`. 0 tries only once.

        Raises:
            SessionNotFound, LockTimeout, LockError, CorruptSession, VersionMismatch: raised before the block.
            NotJSON, InvalidArgument, SessionBusy, CommitFailed, CommitUnknown: raised after the block. Nothing was
                written, unless the error says "unknown".
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
                    streams.delete(tx)
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
            function: changes the transaction in place. If it raises, nothing is written.

        Raises:
            InvalidArgument: the function is asynchronous. Or it changed nothing and returned a new dict that has keys
                of the document, which would be lost.
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
        """Add an item to a list of the document. Durable and visible on return. See `extend`.

        Raises:
            InvalidArgument: the item is a list, which is no message. Use `extend` for several messages.
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
        """Add items to a list of the document, in one commit. Durable and visible on return.

        The verb is idempotent, so a caller may repeat it after an error. An item counts as added already if the list
        has an item with the same value of `key` and the same content. Items without that key are added each time.

        Args:
            field: a top-level field, ``"messages"`` say. A missing list is created.
            items: any JSON values.
            key: the name of the key that tells items apart. None adds all items, whatever the list holds.
            create: create an empty session first if there is none. This is for the first write of a request.
            touch: False keeps `updated_at`.
            timeout_s: seconds to wait for the lock, in the place of the store's `timeout_s`. 0 tries only once.

        Returns:
            The version that holds the items.

        Raises:
            MergeConflict: the list has an item with the same value of `key`, and other content.
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
        # The usual arguments need no check one by one.
        if type(field) is not str or field in turn.IDLE or key != "id" or create is not False or touch is not True:
            _require_list(field, key, touch, create)
        ids = [None] * len(lines) if key is None else list(map(id_in, lines, repeat(key)))
        with self._locked(session_id, timeout_s, seeking=(field, ids) if key == "id" else None) as tx:
            copy = WorkingCopy.of(tx, create=create) if create else WorkingCopy(tx.read(), tx)
            turn.add_once(copy.list(field), lines, ids, key=key, field=field)
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
        if_version: str | None = None,
        timeout_s: float | None = None,
    ) -> Stream:
        """Claim a session for a turn of the model.

        On return the claim, its lease and the prompt are durable and visible. A stale stream is cleared on the way. Use
        the result in a ``with``. Leaving the block without `finish` is `fail`.

        Args:
            message: the prompt. Without an ``id`` it gets ``<stream id>.prompt``. If its ``id`` is in ``messages``
                already, that prompt is taken up again, for example the prompt of an interrupted turn. Without `once`, a
                prompt that has its answer is taken up again, too. None starts a turn without a prompt.
            stream_id: an id of your own, never used before in this session. The default is a random one.
            fields: top-level fields to set in the same commit: the model that answers, say.
            create: begin with an empty session if there is none.
            once: start nothing for a prompt that runs already, or that has its answer. So a request may be sent twice.
                The prompt needs an ``id``. The answer gets the prompt's id as ``answers``, and is found by it again.
            if_version: the version for which the turn was decided. A session of another version is left alone.
            timeout_s: seconds to wait for the lock, in the place of the store's `timeout_s`. 0 tries only once.

        Raises:
            AlreadyStarted: with `once`, a stream runs the prompt (`stream_id`), or the prompt has an answer (`answer`).
            SessionBusy: a live stream owns the session. The error names the owner.
            VersionMismatch: the session has another version, and no live stream.
            InvalidArgument, NotJSON: an argument cannot be used.
            MergeConflict: the session has a message of that ``id``, with other content.
            SessionNotFound, LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        require_flags(create=create, once=once)
        require_texts(if_version=if_version)
        options: dict[str, Any] = {"fields": fields, "create": create, "once": once, "if_version": if_version}
        return streams.start(self._open(), session_id, message, stream_id, **options, timeout_s=timeout_s)

    def cancel(self, session_id: str, stream_id: str, *, force: bool = False, timeout_s: float | None = None) -> bool:
        """Ask a stream of any process to end. The request is durable, and the owner sees it in `Stream.is_cancelled`.

        A stream whose process is dead is cleared at once. A second request changes nothing.

        Args:
            stream_id: the stream that is meant. If it is not the session's active stream, nothing happens.
            force: take the session away now. Prompt and partial stay, marked ``interrupted``. The owner gets
                `StreamLost`. If the disk refuses then, the stream goes on, but its events have ended. Repeat the call.

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

        Iterate the result. Afterwards its `ended` tells how the stream has ended. Events of this process come at once,
        and those of other processes within some 10 ms. The death of the process that runs the stream is noticed within
        a second.

        Args:
            stream_id: a session's `active_stream_id`, say.
            after: the offset of the last event that was seen. 0 begins with the first event. ``"end"`` begins behind
                the last event that is there now. The result's `offset` is the offset of that event.

        Raises:
            EventsNotFound: the stream never ran, it ended without an event, or its events have expired. Load the
                session instead. Or the event behind `after` was dropped (`Store(keep_events_bytes=…)`). Load the
                session, and go on with ``after=error.first - 1`` or ``"end"``. A step of a slow loop may raise this,
                too. Or the stream has fewer events than `after`, because the cursor is another stream's. Begin at 0.
            InvalidArgument: the cursor is malformed.
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
        """Tell who runs the session's active stream, and whether that process lives. None if no stream is active.

        A stream that another program left without a lease shows as dead. Takes the session's lock.

        Raises: as `load`, and LockTimeout, LockError.
        """
        with self._locked(session_id, timeout_s) as tx:
            return streams.look_at(tx)

    def streams(self, *, timeout_s: float | None = None) -> list[StreamInfo]:
        """List the active streams, and for each whether it lives. Takes the lock of one session at a time.

        Only streams that were started through `persist` are listed. See `clear_stale_streams` for others. The streams
        of a session that cannot be read, or that is locked for too long, are left out. `check` names such a session.
        """
        backend, timeout_s = self._open(), None if timeout_s is None else seconds("timeout_s", timeout_s)
        found = []
        for session_id in dict.fromkeys(session_id for session_id, _ in backend.engine.leases()):
            # One damaged session must not hide the streams of the others. `check` names it.
            with suppress(*_UNREADABLE):
                with backend.engine.transaction(session_id, timeout_s) as tx:
                    found.append(streams.look_at(tx))
        return [info for info in found if info is not None]

    def clear_stale_streams(self, *, every_session: bool = False, timeout_s: float | None = None) -> Sweep:
        """Clear every stream whose process is dead. Call it at the start of a server, or now and then.

        It opens only the sessions that have a lease, however many others there are. It takes one lock at a time.
        Left-over leases are removed. Events of streams that have ended are removed when their time is over.

        Args:
            every_session: look into all sessions. This also finds streams that another program left without a lease.
            timeout_s: seconds to wait for each lock, in the place of the store's `timeout_s`.

        Returns:
            The streams that were cleared, and the errors of the sessions that could not be looked at. Such an error
            does not keep the sweep from the other sessions.
        """
        sweep = Sweep([], {})
        for step in self._sweeping(every_session=every_session, timeout_s=timeout_s):
            sweep.cleared.extend(step.found.cleared)
            sweep.failures.update(step.found.failures)
        return sweep

    def _sweeping(
        self, *, every_session: bool = False, timeout_s: float | None = None
    ) -> Iterator[maintenance.Step[Sweep]]:
        """Sweep one session after the other. Each step holds the result of one."""
        require_flags(every_session=every_session)
        backend, timeout_s = self._open(), None if timeout_s is None else seconds("timeout_s", timeout_s)
        files = backend.engine
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
            backend.engine.tidy()
        except errors.PersistError as error:
            found.failures["*"] = error
        yield maintenance.Step(total, total, found)

    # --- care ---

    def check(self) -> list[maintenance.Problem]:
        """Read every session whole, and name all that is damaged, stale, left over or foreign. No session is changed.

        Tool calls without a result, and results without a call, are named, too, unless a live stream owns the session.

        A session that looks wrong is judged under its lock, so a commit or a delete under way is no problem. The other
        sessions are not locked. A lock file without a session is removed, as with every verb. To know whether all is
        well, ignore the problems of the kind "foreign", because those files are not of `persist`.
        """
        return maintenance.check(self._open())

    def backup(
        self, dest: str | os.PathLike[str], *, prune: bool = False, timeout_s: float | None = None
    ) -> backup.Backup:
        """Copy all sessions into a directory, or bring an earlier copy up to date. The copies are durable on return.

        Each session is read under its lock, and is copied as one whole document, without a journal. So servers may go
        on. The copy is a store itself. A session whose copy has the same version already is not written again. A
        running stream is copied as it is committed. Where the copy is put back, the stream is dead, and a sweep clears
        it. Events, left-overs and foreign files are not copied.

        Args:
            dest: a new directory, an empty one, or an earlier backup of this store. It is created (mode 0700).
            prune: remove the copies of sessions that the store no longer has. Without it they stay.
            timeout_s: seconds to wait for each lock, in the place of the store's `timeout_s`.

        Returns:
            The sessions that were copied, and the errors of the sessions that could not be copied. Such an error does
            not keep the backup from the other sessions.

        Raises:
            InvalidArgument: `dest` is something else (the copy of another store, say), or it is in use as a store. Or
                copies are to be removed, and the store has none of the sessions that have a copy.
            LockError: another backup writes to it, or this thread holds a session's lock.
            CommitFailed: the disk of `dest` refused. The copies that were made stand. Remove the cause, and repeat it.
            PersistError: the disk of `dest` failed at the end, so nobody knows which copies are durable.
            Unreadable: the disk or its permissions refused.

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

    def repair(self, session_id: str, *, field: str = turn.MESSAGES, timeout_s: float | None = None) -> int:
        """Give each tool call that has no result a synthetic one, in one commit. Durable and visible on return.

        A turn that broke off between a tool call and its result leaves a conversation that its provider refuses. The
        calls of four shapes are known: OpenAI chat completions, OpenAI responses, Anthropic, pydantic-ai. Each gets a
        result in its own shape, marked ``interrupted``. A real result that stands where its provider does not take it
        is moved to its call. A synthetic result goes when the real one is there. Arguments that broke off become an
        empty object, and the result tells their text. A result without a call is left alone: `check` names it. A sound
        conversation is not changed. A call that waits for a person is answered, too, so leave such a session alone.

        Args:
            field: the list of the messages.
            timeout_s: seconds to wait for the lock, in the place of the store's `timeout_s`.

        Returns:
            How many calls were answered. A second repair answers none.

        Raises:
            SessionBusy: a live stream owns the session, and may still answer its calls.
            InvalidArgument: the field is no list.
            SessionNotFound, LockTimeout, LockError, CorruptSession, CommitFailed, CommitUnknown: see the errors.

        Example:
            >>> import persist, tempfile
            >>> store = persist.Store(tempfile.mkdtemp())
            >>> call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
            >>> session = store.create("s-42", {"messages": [{"role": "assistant", "tool_calls": [call]}]})
            >>> store.repair("s-42"), store.repair("s-42")
            (1, 0)
            >>> store.tail("s-42", limit=1)[0]["tool_call_id"]
            'call_1'
        """
        require_text("field", field)
        with self._locked(session_id, timeout_s) as tx:
            return streams.repair_tool_calls(tx, json_codec.joined(field))

    def compact(self, session_id: str, *, alone: bool = False, timeout_s: float | None = None) -> bool:
        """Fold a session's journal into its document. The session keeps its version. Left-overs of crashes are removed.

        A journal folds by itself when it has outgrown its document.

        Args:
            alone: leave no journal, so that the file alone is the session, to be edited or copied. The next commit to a
                large session makes a new journal.

        Returns:
            Whether there was anything to fold.

        Raises:
            SessionNotFound, LockTimeout, LockError, CorruptSession, CommitFailed, CommitUnknown: see the errors.
        """
        require_flags(alone=alone)
        with self._locked(session_id, timeout_s) as tx:
            return tx.compact(alone=alone)

    def accept(self, session_id: str, *, drop_journal: bool = False, timeout_s: float | None = None) -> Session:
        """Accept a document as it is after an edit by hand. It gets new checksums and the next revision.

        A session that is sound is left alone. From a damaged journal, the records before the damage are taken. A copy
        of the journal is kept beside it, with ".damaged" behind its name. If the journal is gone, nobody knows how many
        revisions were in it, so the next revision is far above them all. Before you edit a session that has a journal,
        fold it with ``compact(session_id, alone=True)``.

        Args:
            drop_journal: give up the commits in the journal. The journal is kept, with ".damaged" behind its name.

        Raises:
            CorruptSession: the document is not strict JSON, or its journal does not fit it any more. Repair it first.
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
