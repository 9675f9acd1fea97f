"""The engine: the sessions of one schema of a database."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

from persist import errors, json_codec
from persist.arguments import seconds
from persist.engine import Committed, Ended, Seeking, decoding
from persist.postgres import migrate
from persist.postgres.connections import Connection, Connections, Place, Row, name_of, text_of
from persist.postgres.emitter import Emitter, RemoteWriter
from persist.postgres.heartbeat import Heartbeat, HeldLease
from persist.postgres.items import Sought
from persist.postgres.listener import Listener, RemoteReader
from persist.postgres.rows import apart_of, head_of, header_of, time_of
from persist.postgres.transaction import Held
from persist.storage.content import Content, Items, Value
from persist.storage.document import Head, fields_of
from persist.storage.layout import check_session_id
from persist.translating import Translating

_CURSOR = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}\+00:00)/([0-9]{1,18})")
#: The largest number of the server.
_LARGEST = 2**63 - 1
#: So many sessions are asked for at a time.
_PAGE = 200
_making = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_making._at_fork_reinit)  # type: ignore[attr-defined]


class PostgresEngine:
    """The sessions of one schema, with their streams and events."""

    def __init__(
        self,
        url: str,
        *,
        schema: str,
        create: bool,
        timeout_s: float,
        keep_events_s: float,
        keep_events_bytes: int | None,
        lease_s: float,
    ) -> None:
        self.connections = Connections(url, schema, idle_s=lease_s)
        self.place: str = self.connections.place
        self.timeout_s = timeout_s
        self._keep_events_s = keep_events_s
        self.keep_events_bytes = keep_events_bytes
        self.heartbeat = Heartbeat(self.connections, lease_s=lease_s, beat_s=lease_s / 3)
        self.writers: dict[tuple[str, str], RemoteWriter] = {}
        self._pid = -1
        migrate.require_newest(self.connections, create=create, timeout_s=max(timeout_s, 5.0))

    def where(self, session_id: str) -> str:
        """Return where a session is, for errors."""
        return Place(f"{self.place}#{check_session_id(session_id)}")

    @property
    def emitter(self) -> Emitter:
        """The thread that writes the events of this process."""
        self._require_process()
        return self._emitter

    @property
    def listener(self) -> Listener:
        """The thread that hears of the events that are followed in this process."""
        self._require_process()
        return self._listener

    def _require_process(self) -> None:
        if self._pid == os.getpid():
            return
        with _making:
            if self._pid != os.getpid():
                # A forked child has none of the threads.
                self._emitter = Emitter(self.connections, keep_s=self._keep_events_s, patience_s=self.timeout_s)
                self._listener = Listener(self.connections)
                self._pid = os.getpid()

    def run(self, statement: str, /, **values: Any) -> list[Row]:
        return self.connections.run(
            lambda connection: self.connections.query(connection, statement, **values), self.timeout_s
        )

    def reading(self, session_id: str) -> Translating[None]:
        """Return a block that raises `CorruptSession` for a row that makes no sense."""
        return decoding(session_id, self.where(session_id))

    # --- one session ---

    def exists(self, session_id: str) -> bool:
        """Tell whether there is such a session."""
        self.where(session_id)
        return bool(self.run("exists", id=text_of(session_id))[0][0])

    def _rows(self, statement: str, session_id: str, /, **values: Any) -> list[Row]:
        place = self.where(session_id)
        rows = self.run(statement, id=text_of(session_id), **values)
        if not rows:
            raise errors.SessionNotFound(session_id=session_id, path=place)
        return rows

    def read(self, session_id: str) -> Committed:
        """Read the committed session: its row, its items and its other values in one snapshot, by one message."""
        place = self.where(session_id)
        row, items, parts = self.connections.run(partial(self._read, session_id), self.timeout_s)
        if row is None:
            raise errors.SessionNotFound(session_id=session_id, path=place)
        with self.reading(session_id):
            lists, own = dict[bytes, list[bytes]](), list[bytes]()
            for name, item in items:
                if name is not None:
                    own = lists[name] = []
                own.append(item)
            values: dict[bytes, Value] = dict(parts) | {name: Items(items) for name, items in lists.items()}
            apart: dict[str, Value] = {}
            for name, (count, _) in apart_of(row[9]).items():
                value = values.get(text_of(name).encode(), Items([]))
                if (value.count if isinstance(value, Items) else None) != count:
                    raise json_codec.Undecodable("a session's values are not those that its row tells of")
                apart[name] = value
            return Committed(header_of(row), Content(fields_of(row[8]), apart))

    def _read(self, session_id: str, connection: Connection) -> tuple[Row | None, list[Row], list[Row]]:
        text = partial(self.connections.text, connection, id=text_of(session_id))
        statements = (
            b"BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
            text("head"),
            text("all_items"),
            text("all_parts"),
        )
        cursor = connection.execute(b";\n".join((*statements, b"COMMIT")))
        heads, items, parts = [cursor.fetchall() for _ in cursor.results() if cursor.description is not None]
        return heads[0] if heads else None, items, parts

    def read_head(self, session_id: str) -> Head:
        """Read the committed header and fields."""
        row = self._rows("head", session_id)[0]
        with self.reading(session_id):
            return head_of(row)

    def read_last(self, session_id: str, name: str, limit: int) -> list[Any]:
        """Read the last items of a list."""
        rows = self._rows("last", session_id, list=text_of(name), limit=min(limit, _LARGEST))
        with self.reading(session_id):
            fields, apart = fields_of(rows[0][0]), apart_of(rows[0][1])
            if name in apart and apart[name][0] is not None:
                return [json_codec.decode(row[2]) for row in reversed(rows) if row[2] is not None]
            value = json_codec.decode(fields[name]) if name in fields else None if name in apart else []
        if type(value) is not list:
            got = "a value of another kind" if name in apart else type(value).__name__
            raise errors.InvalidArgument(what=f"field {name!r} of the document", expected="a list", got=got)
        return value[max(0, len(value) - limit) :]

    # --- all sessions ---

    def session_ids(self) -> list[str]:
        """Return the ids of all sessions, sorted."""
        return sorted(name_of(row[0]) for row in self.run("ids"))

    def recent(self, before: str | None) -> Iterator[tuple[str, str]]:
        """Yield a cursor and an id for each session, the last updated one first, from behind a cursor on."""
        return self._recent((None, None) if before is None else _place_of(before))

    def _recent(self, place: tuple[str | None, int | None]) -> Iterator[tuple[str, str]]:
        while True:
            rows = self.run("recent", before=place[0], number=place[1], limit=_PAGE)
            for session_id, updated_at, number in rows:
                place = time_of(updated_at).isoformat(), number
                yield f"{place[0]}/{number}", name_of(session_id)
            if len(rows) < _PAGE:
                return

    def leases(self) -> list[tuple[str, str]]:
        """Return the (session id, stream id) of all streams that a session names, dead ones included."""
        return sorted((name_of(row[0]), row[1].decode()) for row in self.run("leases"))

    # --- the lock ---

    def transaction(self, session_id: str, timeout_s: float | None = None, *, seeking: Seeking | None = None) -> Held:
        """Return a hold of the session's lock for a block, which gets a transaction.

        Items that the block is `seeking` come with the lock.
        """
        timeout_s = self.timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        return Held(self, session_id, timeout_s, Sought.of(seeking))

    def lock_row(
        self, connection: Connection, session_id: str, timeout_s: float, sought: Sought | None = None
    ) -> tuple[Row | None, bytes]:
        """Begin a transaction, lock a session, and return its row, and the server's number of the transaction.

        The row is None if there is none. Then its name is locked.

        Raises:
            psycopg.Error: LockNotAvailable after `timeout_s`, for example.
        """
        text = partial(self.connections.text, connection, id=text_of(session_id))
        statements = [
            # Under another level, which a role may prefer, those who have waited for the lock would see the past.
            b"BEGIN ISOLATION LEVEL READ COMMITTED",
            b"SET LOCAL lock_timeout = %d" % max(1, round(timeout_s * 1000)),
            # A role may have a shorter one than the verb may wait for the lock.
            b"SET LOCAL statement_timeout = 0",
            self.connections.while_idle,
            text("lock_name", lock=self._lock_of(session_id)),
            text("lock"),
        ]
        if sought is not None:
            keys = list(sought.values)
            one = ("seek_one", {"key": keys[0]}) if len(keys) == 1 else ("seek", {"keys": keys})
            statements.append(text(one[0], list=text_of(sought.name), **one[1]))
        cursor = connection.execute(b";\n".join(statements))
        name, row, *found = (each.fetchall() for each in cursor.results() if each.description is not None)
        if sought is not None:
            [sought.rows] = found
        return (row[0] if row else None), name[0][1]

    def _lock_of(self, session_id: str) -> int:
        """Return the number of the lock of a session's name."""
        name = f"{self.connections.schema} {text_of(session_id)}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big", signed=True)

    def holder(self, connection: Connection, session_id: str) -> str:
        """Name the process that holds a session's lock."""
        facts = {"id": text_of(session_id), "lock": self._lock_of(session_id)}
        rows = self.connections.query(connection, "holder", **facts)
        if not rows:
            return "unknown"
        pid, name, since = rows[0]
        if name is None or since is None:
            # The server tells these facts only to the role that runs the transaction.
            return f"server process {pid}"
        return f"{name.decode()!r} (server process {pid}), since {since.decode()} UTC"

    # --- streams and their events ---

    def begin(self, session_id: str, stream_id: str) -> tuple[HeldLease, RemoteWriter]:
        """Return the lease and the writer of a new stream of this process."""
        lease = self.heartbeat.lease(session_id, stream_id, self.timeout_s)
        writer = self.writers[session_id, stream_id] = RemoteWriter(self, session_id, stream_id, lease)
        return lease, writer

    def writer_of(self, session_id: str, stream_id: str) -> RemoteWriter | None:
        """Return the writer of a stream that this process runs."""
        writer = self.writers.get((session_id, stream_id))
        # In a forked child it is the parent's, and a thread that the child lacks may hold its locks.
        return writer if writer is not None and writer.is_here else None

    def events(self, session_id: str, stream_id: str, after: int, *, create: bool = False) -> RemoteReader:
        """Open the events of a stream behind an offset. Raise `FileNotFoundError` if there are none."""
        return RemoteReader(self, session_id, stream_id, after)

    def how_ended(self, session_id: str, stream_id: str, timeout_s: float) -> Ended | None:
        """Tell how a stream has ended whose events do not say it. None if it runs. No lock is needed for that.

        A commit that ends a stream notes this in the same transaction, and a dead process never comes back.
        """
        if self.listener.knows_alive(session_id, stream_id):
            return None
        is_active, is_alive = self._rows("runs", session_id, stream_id=stream_id)[0]
        return "unknown" if not is_active else None if is_alive else "died"

    def tidy(self) -> None:
        """Remove the events whose time is over, and the rows of processes that died long ago."""
        self.run("remove_expired", keep_s=self._keep_events_s, limit=10_000)
        self.run("remove_dead_processes")

    def close(self) -> None:
        """Close the connections, and give up the row of this process, if none of its streams runs."""
        if self._pid == os.getpid():
            self._emitter.rest()
        self.heartbeat.rest()
        self.connections.close()


def _place_of(cursor: str) -> tuple[str, int]:
    """Return the time and the number in a cursor."""
    found = _CURSOR.fullmatch(cursor)
    with contextlib.suppress(ValueError):
        if found is not None:
            return datetime.fromisoformat(found[1]).isoformat(), int(found[2])
    expected = "the cursor of a page, or None"
    raise errors.InvalidArgument(what="before", got=errors.shown(cursor), expected=expected)
