"""The transaction: the lock of a session's row, and the operations under it.

    in-process turn -> BEGIN; the locks; SELECT -> the verb reads what it needs -> UPDATE; row operations; COMMIT

Each arrow is one message to the server, and most verbs read nothing more. The threads of a process take turns first
(see `lock.Hold`), so one connection waits for a session, however many threads do. The locks span read, merge and write.
`commit` ends them: what a block does behind its commit needs no lock.

A commit compares and swaps: its UPDATE names the incarnation and the commit that were read, and fails if it finds
nothing. So even a transaction that has lost its connection, and with it the locks, overwrites nothing.

**Unknown outcomes.** A connection may die between COMMIT and its answer. Then the session's row tells on another
connection what became of it, because it holds the ids of its last commits. Its lock waits for a server process that is
still about to end. If others have committed too often since, or have deleted the session, the server tells what became
of the transaction.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from persist import json_codec
from persist.engine import Committed, End, EventWriter, Lease
from persist.errors import (
    CommitFailed,
    CommitUnknown,
    PersistError,
    SessionNotFound,
    StreamLost,
    not_held,
)
from persist.log import log
from persist.postgres.connections import Connection, Place, Row, is_dead, reason_of, refusals, text_of
from persist.postgres.emitter import RemoteWriter
from persist.postgres.items import RemoteItems, Sought
from persist.postgres.rows import (
    apart_of,
    apart_text,
    fields_text,
    head_of,
    require_short,
    row_operations,
    written,
)
from persist.postgres.statements import Raw
from persist.storage import diff
from persist.storage.clock import now_s
from persist.storage.content import Content, Value
from persist.storage.diff import Change
from persist.storage.document import Head, Header
from persist.storage.layout import is_stream_id
from persist.storage.lease import Probe
from persist.storage.locked import LockedBlock

if TYPE_CHECKING:
    from persist.postgres.engine import PostgresEngine

#: A row holds the ids of so many commits.
_COMMITS_KEPT = 32
#: A thread that waits for several calls (of an event loop) looks so often whether some have left.
_SLICE_S = 0.5
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


# --- the lock --------------------------------------------------------------------------------------------------------


class _Row:
    """The place of a session's row lock in a `Hold`: a connection whose transaction has the lock."""

    fd = -1

    def __init__(self, *_: object, **__: object) -> None:
        self.connection: Connection | None = None
        self.give: Callable[[Connection], None] | None = None
        self.row: Row | None = None
        #: The server's number of the transaction that has the lock.
        self.transaction = b""

    def close(self) -> None:
        """Give the lock up. Changes that were not committed are gone."""
        connection, self.connection = self.connection, None
        if connection is not None and self.give is not None:
            self.give(connection)


class Held(LockedBlock):
    """The hold of a session's lock for a block, which gets its transaction."""

    __slots__ = ("engine", "sought")
    held = _Row
    _file: Any

    def __init__(self, engine: PostgresEngine, session_id: str, timeout_s: float, sought: Sought | None) -> None:
        super().__init__(engine.where(session_id), session_id, timeout_s)
        self.engine = engine
        self.sought = sought
        self.place, self.tx = self.path, None

    @staticmethod
    def is_taken(_fd: int) -> bool:
        # The server keeps the order of those who wait.
        return True

    def _wait_for_processes(self, start: float) -> None:
        connections, pause_s = self.engine.connections, _PAUSE_S
        while True:
            # Not `_deadline`, because the call of an event loop must not expire before its first try has an answer.
            deadline = start + self.timeout_s if self.waiting is None else self.waiting.deadline
            connection = connections.take(max(deadline, now_s() + 0.05))
            self._file.connection, self._file.give = connection, connections.give
            left_s = deadline - now_s()
            try:
                wait_s = left_s if self.waiting is None else min(left_s, _SLICE_S)
                found = self.engine.lock_row(connection, self.session_id, wait_s, self.sought)
                self._file.row, self._file.transaction = found
                return
            except psycopg.errors.LockNotAvailable:
                if now_s() >= self._deadline(start):
                    raise self._timeout(start, holder=self._holder(connection)) from None
                self._file.close()
            except psycopg.Error as error:
                if not is_dead(error, connection) or now_s() + pause_s > self._deadline(start):
                    raise connections.unavailable(reason_of(error)) from error
                self._file.close()
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _holder(self, connection: Connection) -> str:
        try:
            connection.rollback()
            return self.engine.holder(connection, self.session_id)
        except psycopg.Error:
            return "unknown"

    def _other_process(self) -> str:
        try:
            work = partial(self.engine.holder, session_id=self.session_id)
            return self.engine.connections.run(work, 0.2)
        except PersistError:
            return "unknown"

    def __enter__(self) -> Transaction:
        held = self.acquire()
        tx = self.tx = Transaction(self.engine, self.session_id, held, self.timeout_s, self.sought)
        return tx


# --- under the lock --------------------------------------------------------------------------------------------------


class Transaction:
    """The operations on a session whose row is locked. After the block, every method raises `LockError`."""

    def __init__(
        self, engine: PostgresEngine, session_id: str, held: Any, timeout_s: float, sought: Sought | None = None
    ) -> None:
        self.session_id = session_id
        self.place = engine.where(session_id)
        self._engine = engine
        self._held: Any = held
        self._row: Row | None = held.row
        self._sought = sought
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._committed: Committed | None = None
        self._head: Head | None = None
        #: The stream that this process begins with the next commit.
        self._begun: str | None = None
        #: The lease that must hold when a stream commits.
        self.lease: Any = None

    def require_lock(self) -> None:
        """Raise `LockError` after the block, and in a forked child."""
        if self._held is None or self._pid != os.getpid():
            raise not_held(self.session_id)

    def require_unchanged(self) -> None:
        """Return, because the server lets nobody change a locked row."""

    def end(self) -> None:
        """End the transaction."""
        self._held = None

    def where(self, stream_id: object) -> str:
        """Return where a stream's lease is, for errors."""
        return Place(f"{self.place}, stream {stream_id}")

    def _query(self, statement: str, /, **values: Any) -> list[Row]:
        self.require_lock()
        connection = self._held.connection
        try:
            return self._engine.connections.query(connection, statement, **values)
        except psycopg.Error as error:
            if not is_dead(error, connection):
                raise self._engine.connections.unavailable(reason_of(error)) from error
            # Nothing is written yet. So the lock may be had again, if the session is still the same.
            with refusals(self._engine.place):
                self._lock_again(now_s() + self._timeout_s)
                return self._engine.connections.query(self._held.connection, statement, **values)

    def _lock_again(self, deadline: float) -> Row | None:
        """Lock the row on another connection, after the first one has died.

        Raises:
            CommitFailed: somebody has committed in between.
            psycopg.Error, PersistError: no connection could be had until the deadline.
        """
        before, pause_s = self._row, _PAUSE_S
        while True:
            self._held.close()
            connection = self._engine.connections.take(deadline)
            self._held.connection, self._held.give = connection, self._engine.connections.give
            try:
                found = self._engine.lock_row(connection, self.session_id, max(0.05, deadline - now_s()))
                self._row, self._held.transaction = found
                break
            except psycopg.Error as error:
                if not is_dead(error, connection) or now_s() + pause_s > deadline:
                    raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        log.debug("Session %r: its connection died, and it was locked on another one", self.session_id)
        if _commit_in(before) != _commit_in(self._row):
            raise self._failed("the connection was lost, and somebody else has committed since")
        return self._row

    def _failed(self, reason: str) -> CommitFailed:
        return CommitFailed(session_id=self.session_id, path=self.place, reason=reason, errno=None)

    def _unknown(self, reason: str) -> CommitUnknown:
        remedy = "Load the session, and look, or repeat the verb: with the same ids nothing is doubled."
        facts: dict[str, Any] = {"path": self.place, "reason": reason, "errno": None, "refusal": "", "remedy": remedy}
        return CommitUnknown(session_id=self.session_id, **facts)

    # --- reading ---

    def exists(self) -> bool:
        """Tell whether there is such a session."""
        self.require_lock()
        return self._row is not None

    def _there(self) -> Row:
        self.require_lock()
        if self._row is None:
            raise SessionNotFound(session_id=self.session_id, path=self.place)
        return self._row

    def head(self) -> Head:
        """Return the committed header and fields."""
        row = self._there()
        if self._head is None:
            with self._engine.reading(self.session_id):
                self._head = head_of(row)
        return self._head

    def read(self) -> Committed:
        """Return the committed session. Its lists stay in the database, until somebody asks for their items."""
        self.require_lock()
        if self._committed is None:
            head, row = self.head(), self._there()
            number, apart = row[0], dict[str, Value]()
            sizes = apart_of(row[9])
            values: dict[bytes, bytes] | None = None
            for name, (count, size_bytes) in sizes.items():
                if count is not None:
                    query = partial(self._query, session=number, list=text_of(name))
                    items = apart[name] = RemoteItems(query, count, size_bytes)
                    if self._sought is not None and self._sought.name == name:
                        items.take(self._sought)
                else:
                    values = values or dict(self._query("parts", session=number))
                    apart[name] = values[text_of(name).encode()]
            self._committed = Committed(head.header, Content(head.fields, apart))
        return self._committed

    def confirm(self, *, is_durable: bool = False) -> Committed:
        """Return the committed session. The server shows no commit that is not durable."""
        return self.read()

    # --- writing ---

    def commit(
        self, header: Header, content: Content, changes: tuple[Change, ...] | None = None, end: End | None = None
    ) -> Committed:
        """Write a revision. It is durable and visible on return.

        Raises:
            CommitFailed: the server refused, or was lost before the commit. The old revision stands.
            CommitUnknown: the server was lost in the commit, and did not come back in time.
            InvalidArgument: the name of a large value is too long.
        """
        self.require_lock()
        require_short(content.apart)
        before = self._row
        if before is not None and changes is None:
            changes = diff.between(self.read().content, content)
        if before is not None and before[1].decode() != header.incarnation:
            changes = None
        stream_id = end.stream_id if end is not None else "" if self.lease is None else self.lease.stream_id
        writer = self._engine.writer_of(self.session_id, stream_id)
        with contextlib.nullcontext() if writer is None else writer.writing if end is None else writer.ending():
            # The events of the stream that wait are a part of its commit. So what is stored never knows more than they.
            last, events = (0, []) if writer is None or writer.is_fenced else writer.pending()
            batch = None
            if writer is not None and events and writer.find(self._query):
                batch = writer, last, events
            self._settle(
                lambda connection: self._write(connection, before, header, content, changes, end, batch),
                header.commit,
            )
            if writer is not None:
                writer.written(len(events))
                writer.is_fenced = writer.is_fenced or end is not None
        if end is not None:
            self._engine.heartbeat.has_ended(self.session_id, str(end.stream_id))
            self._engine.emitter.tidy_soon()
        self._committed = Committed(header, content)
        self._head = None
        self._begun = None
        return self._committed

    def _settle(self, write: Callable[[Connection], None], commit: str | None) -> None:
        """Write and commit. If the connection dies, find out on another one what became of that, and go on.

        Args:
            write: makes the changes, and commits them. It may run twice, because it runs again only if the first time
                has come to nothing.
            commit: the id of the commit, or None for a delete.
        """
        deadline, before = now_s() + max(self._timeout_s, 1.0), self._row
        # Whether the row has to be locked anew. And the number of the transaction whose COMMIT has no answer.
        is_sent, sent, reason = False, b"", ""
        while True:
            connection = self._held.connection
            try:
                if is_sent or connection is None or connection.closed:
                    self._row = before
                    if self._stands(before, commit, sent, deadline):
                        return
                    connection = self._held.connection
                is_sent, sent = True, self._held.transaction
                write(connection)
                return
            except psycopg.errors.DivisionByZero as error:
                self._require_lease()
                reason = "somebody else has committed since it was read, although the row was locked"
                raise self._failed(reason) from error
            except psycopg.Error as error:
                reason = reason_of(error)
                if connection is None or not is_dead(error, connection):
                    raise self._failed(reason) from error
                if connection.closed:
                    log.debug("Session %r: the connection died in a commit: %s", self.session_id, reason)
                else:
                    connection.rollback()
                    sent = b""
                failure: Exception = error
            except PersistError as error:
                if isinstance(error, (CommitFailed, CommitUnknown, StreamLost)):
                    raise
                failure = error
            if now_s() > deadline or isinstance(failure, PersistError):
                raise (self._unknown if sent else self._failed)(reason or str(failure)) from failure
            time.sleep(_PAUSE_S)

    def _require_lease(self) -> None:
        """Raise `StreamLost` if the process of the stream that commits was not heard of in time."""
        if self.lease is not None and not self._engine.run("is_alive", process=self.lease.process)[0][0]:
            reason = "its process was not heard of for longer than its lease"
            raise StreamLost(session_id=self.session_id, stream_id=self.lease.stream_id, reason=reason)

    def _stands(self, before: Row | None, commit: str | None, sent: bytes, deadline: float) -> bool:
        """Lock the row again. Tell whether the transaction stands that was sent, if one was.

        Raises:
            CommitFailed: it does not, and somebody else has committed since.
            CommitUnknown: nobody knows.
        """
        try:
            self._lock_again(deadline)
        except CommitFailed:
            if sent and self._has_happened(before, commit, sent):
                return True
            raise
        # A session that it has created may be deleted already.
        return bool(before is None and sent and self._became(sent))

    def _became(self, sent: bytes) -> bool | None:
        """Ask the server whether it has committed a transaction. None if it does not know."""
        number, _, since = sent.decode().partition(" ")
        became, now = self._engine.run("became", transaction=number)[0]
        if became == b"committed" and now.decode() != since:
            # The server has crashed, and this may be another transaction.
            return None
        return None if became is None else bool(became == b"committed")

    def _has_happened(self, before: Row | None, commit: str | None, sent: bytes) -> bool:
        """Tell whether a commit of this transaction stands, from the row as it was locked again.

        Raises:
            CommitUnknown: the row does not go back so far, and the server does not know.
        """
        row, reason = self._row, ""
        is_other = row is None or before is None or row[1] != before[1]
        if commit is None:
            # For a delete it does not matter who has removed the session.
            return is_other
        text = "" if row is None else row[10].decode()
        commits = [text[at : at + 16] for at in range(0, len(text), 16)]
        if commit in commits:
            return True
        if is_other:
            reason = "the connection was lost, and the session was deleted since"
        elif len(commits) >= _COMMITS_KEPT and _commit_in(before) not in commits:
            reason = "the connection was lost, and many others have committed since"
        # The row does not tell any more. The server does, unless it is another one since, which would not know.
        has_happened = self._became(sent) if reason else False
        if has_happened is None:
            raise self._unknown(reason)
        return has_happened

    def _write(
        self,
        connection: Connection,
        before: Row | None,
        header: Header,
        content: Content,
        changes: tuple[Change, ...] | None,
        end: End | None,
        batch: tuple[RemoteWriter, int, list[bytes]] | None,
    ) -> None:
        """Send all changes of a commit, and the commit, as one message.

        Raises:
            psycopg.errors.DivisionByZero: they do not fit the row any more, and nothing was written.
        """
        text = partial(self._engine.connections.text, connection)
        owner = header.owner
        stream_id = None if owner is None else owner.get("stream_id")
        begins = stream_id is not None and stream_id == self._begun
        process = None
        if stream_id is not None:
            process = self._engine.heartbeat.id if begins else before[11] if before else None
        values: dict[str, Any] = {
            "id": text_of(self.session_id),
            "incarnation": header.incarnation,
            "revision": header.revision,
            "commit": header.commit,
            "epoch": header.epoch,
            "created_at": written(header.created_at),
            "updated_at": written(header.updated_at),
            "owner": None if owner is None else json_codec.encode(dict(owner)),
            "process": None if process is None else str(process),
            "stream_id": stream_id,
            "fields": fields_text(content),
            "apart": apart_text(content),
        }
        statements: list[bytes] = []
        if before is not None and changes is None:
            # The session begins anew.
            statements.append(text("delete", session=before[0], incarnation=before[1], before=before[3]))
            before = None
        if before is None:
            statements.append(text("create", **values))
            number: Any = Raw(text("created"))
            counts: dict[str, int | None] = {}
            changes = tuple(diff.whole(name, value) for name, value in content.apart.items())
        else:
            number = before[0]
            counts = {name: count for name, (count, _) in apart_of(before[9]).items()}
            lease = None if self.lease is None else self.lease.process
            statements.append(text("update", session=number, before=before[3], lease=lease, **values))
        statements += row_operations(text, number, counts, changes or ())
        if batch is not None:
            writer = batch[0]
            statements.append(text("emit_within", **writer.values(*batch[1:])))
            statements.append(self._engine.connections.news(connection, [writer.number]))
        if end is not None and is_stream_id(end.stream_id):
            facts = {"stream_id": end.stream_id, "ended": end.how, "channel": self._engine.connections.channel}
            statements.append(text("end_stream", session=number, **facts))
        if begins:
            statements.append(text("begin_stream", session=number, stream_id=stream_id))
        cursor = connection.execute(b";\n".join([*statements, b"COMMIT"]))
        if begins:
            # The last answer but one, which is COMMIT's.
            *_, [number] = [cursor.fetchall()[0] for _ in cursor.results() if cursor.description is not None]
            self._engine.writers[self.session_id, str(stream_id)].number = number

    def delete(self) -> None:
        """Remove the session, with the leases and events of its streams. Durable on return."""
        row = self._there()
        values = {"session": row[0], "incarnation": row[1], "before": row[3]}

        def write(connection: Connection) -> None:
            connection.execute(self._engine.connections.text(connection, "delete", **values) + b"; COMMIT")

        self._settle(write, None)
        self._row = self._committed = self._head = None

    # --- streams ---

    def probe(self, stream_id: object) -> Probe:
        """Tell a block whether a stream is dead. A dead process never comes back, so the answer stays true."""
        self.require_lock()
        row = self._row
        if row is None or not is_stream_id(stream_id) or row[11] is None or row[12] != str(stream_id).encode():
            return Probe(is_dead=True)
        # Of its own streams this process knows more than the server.
        runs = self._engine.heartbeat.runs(row[11], self.session_id, str(stream_id))
        if runs is False:
            return Probe(is_dead=True)
        return Probe(is_dead=not self._query("is_alive", process=row[11])[0][0])

    def begin(self, stream_id: str, started_at: str) -> tuple[Lease, EventWriter] | None:
        """Prepare the lease of a new stream of this process, which the next commit makes the session's."""
        self.require_lock()
        self._begun = stream_id
        lease, writer = self._engine.begin(self.session_id, stream_id)
        self.lease = lease
        return lease, writer

    def forget(self, stream_id: object) -> None:
        """Do nothing, because a lease is a part of its session's row."""

    # --- mending ---

    def compact(self, *, alone: bool = False) -> bool:
        """Return False, because there is nothing to fold."""
        self._there()
        return False

    def accept(self, *, drop_journal: bool = False) -> Committed:
        """Return the committed session. There is no edit by hand to accept, because it needs no checksum."""
        found = self.read()
        with self._engine.reading(self.session_id):
            found.content.decode()
        return found

    def stream_ids(self) -> list[str]:
        """Return the ids of all streams of the session that have a lease."""
        return [] if self._row is None or self._row[12] is None else [self._row[12].decode()]

    def put(self, header: Header, content: Content) -> Committed:
        """Write a session whole, in the place of whatever is there. Durable on return."""
        # Only a later commit of the same session can be compared. A damaged one cannot be read.
        is_later = self._row is not None and self._row[1].decode() == header.incarnation
        return self.commit(header, content, None if is_later else ())


def _commit_in(row: Row | None) -> str | None:
    return None if row is None else row[3].decode()
