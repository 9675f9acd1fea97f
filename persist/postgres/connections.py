"""The connections to the server: a pool for each process, and the errors in the words of persist."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import psycopg
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, TransactionStatus
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from persist.errors import InvalidArgument, PersistError, Unavailable
from persist.log import log
from persist.postgres.statements import Statements
from persist.storage.clock import now_s

Result = TypeVar("Result")
Row = tuple[Any, ...]

#: How many connections a process uses at most.
MOST_CONNECTIONS = 16
#: The pause before a verb asks a server again that did not answer. It doubles up to the second number.
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
#: So often a server that cannot be reached is tried again for a connection. The pool itself would double its pauses.
_TRY_S = 0.25
#: The pool closes a connection that nobody has needed for so long.
_IDLE_S = 30.0
#: The server says so when another try would have the same answer. In another language, it is tried again.
_FINAL = ("password authentication failed", "no password supplied", "no pg_hba.conf entry", "does not exist", "invalid")


class _Utf8(Loader):
    """Text as the bytes that the server sent. Most of it is JSON, which is kept as bytes."""

    def load(self, data: Any) -> bytes:
        return bytes(data)


class Connection(psycopg.Connection[Row]):
    """A connection to the server.

    Attributes:
        is_prepared: whether the usual statements are prepared on it. None if nobody has tried that yet.
        home: the pool that it comes from.
    """

    is_prepared: bool | None = None
    home: ConnectionPool[Connection] | None = None

    @classmethod
    def connect(  # type: ignore[override]  # the base names each option
        cls, conninfo: str = "", *, failures: deque[psycopg.Error] | None = None, **options: Any
    ) -> Self:
        """Connect. A failure is noted in `failures`, too, because a pool tells it only to its log."""
        try:
            return super().connect(conninfo, **options)
        except psycopg.Error as error:
            if failures is not None:
                failures.append(error)
            raise


class _OfOurPools(logging.Filter):
    """Leaves each try of our pools out of the log, because the verb that waits tells its failure once."""

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        return _POOL not in arguments and not any(isinstance(each, Connection) for each in arguments)


_POOL = "persist"
logging.getLogger("psycopg.pool").addFilter(_OfOurPools())


def is_direct(connection: Connection) -> bool:
    """Tell whether no pooler stands between this process and the server.

    A pooler greets a client in the server's name, but with a process number of its own.
    """
    [[pid]] = connection.execute("SELECT pg_backend_pid()").fetchall()
    return bool(pid == connection.info.backend_pid)


def is_dead(error: psycopg.Error, connection: Connection) -> bool:
    """Tell whether an error means that the transaction is gone, through no fault of its statements."""
    again = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
    return connection.broken or connection.closed or isinstance(error, again)


def reason_of(error: BaseException) -> str:
    """Return what the server said, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def text_of(name: str) -> str:
    """Return a name or an id as text of the server, which holds neither a NUL nor half of a surrogate pair."""
    if "\0" in name or "\\" in name or not name.isascii():
        name = name.replace("\\", "\\\\").replace("\0", "\\0")
        name = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", name)
    return name


def name_of(text: bytes) -> str:
    """Return the name that `text_of` has written."""
    name = text.decode()
    if "\\" not in name:
        return name
    parts = {"\\\\": "\\", "\\0": "\0"}
    return re.sub(r"\\(?:\\|0|u[0-9a-f]{4})", lambda one: parts.get(one[0]) or chr(int(one[0][2:], 16)), name)


def program_name() -> str:
    """Return the name of this program, which need not be UTF-8, as text of the server."""
    command = Path(sys.argv[0] or sys.executable).name if sys.argv else "python"
    return os.fsencode(command).decode(errors="replace")


class Place(str):
    """The place of a store or a session, for errors. They take any other text for a path, which would lose a slash."""

    __slots__ = ()


def _parts_of(url: str) -> dict[str, Any]:
    """Return the parts of a URL.

    Raises:
        InvalidArgument: it is malformed. The message of libpq is left out, because it may show a part of the password.
    """
    try:
        parts = conninfo_to_dict(url)
        is_sound = str(parts.get("port", "0")).replace(",", "0").isdigit() and "@" not in str(parts.get("host", ""))
    except psycopg.ProgrammingError:
        is_sound = False
    if not is_sound:
        expected = "postgresql://user:password@host:port/database, with %40 for an @ in a part, and %2F for a /"
        raise InvalidArgument(what="the URL of the store", got="malformed", expected=expected)
    return parts


def _place_of(parts: dict[str, Any], schema: str) -> Place:
    """Return a URL by which the same program finds the store again. A password never stands in it."""
    # A file tells what a service stands for, and a service comes before the environment.
    defaults = [] if "service" in parts else Conninfo.get_defaults()
    known = {each.keyword.decode(): each.val.decode(errors="replace") for each in defaults if each.val} | parts
    user, name, service = (quote(str(known.get(each) or ""), safe="") for each in ("user", "dbname", "service"))
    hosts = str(known.get("host") or known.get("hostaddr") or "").split(",")
    ports = str(known.get("port") or "").split(",")
    named = [
        (f"[{host}]" if ":" in host else quote(host, safe="")) + (f":{port}" if port else "")
        for host, port in zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False)
    ]
    options = f"service={service}&" if service else ""
    return Place(f"postgresql://{user and user + '@'}{','.join(named)}/{name}?{options}schema={schema}")


class Connections:
    """The connections of this process to one database."""

    def __init__(self, url: str, schema: str, *, idle_s: float = 15.0) -> None:
        parts: dict[str, Any] = _parts_of(url)
        parts.setdefault("application_name", f"persist {socket.gethostname()} {program_name()}"[:63])
        # The last one is in milliseconds. Without it a statement on a dead link waits for a quarter of an hour.
        alive = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
        for name, value in alive.items():
            parts.setdefault(name, value)
        parts.setdefault("connect_timeout", 5)
        # Texts are sent as the bytes that they are kept as.
        parts["client_encoding"] = "UTF8"
        self.conninfo = make_conninfo(**parts)
        self.place = _place_of(parts, schema)
        self.schema = schema
        #: The channel of the hints that there are events.
        self.channel = f"persist_{hashlib.blake2b(schema.encode(), digest_size=8).hexdigest()}"
        self.statements = Statements(schema)
        #: Ends a transaction whose process is cut off, or stopped. It would hold its locks for as long as its
        #: connection seems to live to the server, which is two hours.
        self.while_idle = b"SET LOCAL idle_in_transaction_session_timeout = %d" % max(1, round(idle_s * 1000))
        self._guard = threading.Lock()
        self._pid = -1
        self._pool: ConnectionPool[Connection] | None = None
        #: The last failure to connect, until the next success.
        self._failures = deque[psycopg.Error](maxlen=1)

    def _here(self) -> ConnectionPool[Connection]:
        if self._pid != os.getpid():
            # A forked child must not speak on the connections of its parent, nor wait for a lock of its threads.
            self._guard = threading.Lock()
        with self._guard:
            # The end of the interpreter closes the pool, and exit handlers of the program may come after that.
            if self._pid != os.getpid() or self._pool is None or self._pool.closed:
                self._pool, self._pid = self._new_pool(), os.getpid()
                weakref.finalize(self, _close, self._pool, self._pid)
            return self._pool

    def _new_pool(self) -> ConnectionPool[Connection]:
        kwargs = {
            "autocommit": True,
            "cursor_factory": psycopg.ClientCursor,
            "prepare_threshold": None,
            "failures": self._failures,
        }
        return ConnectionPool(
            self.conninfo,
            min_size=0,
            max_size=MOST_CONNECTIONS,
            connection_class=Connection,
            kwargs=kwargs,
            configure=configure,
            open=True,
            reconnect_timeout=0.0,
            max_idle=_IDLE_S,
            name=_POOL,
        )

    def take(self, deadline: float) -> Connection:
        """Return a connection that works, as far as anybody knows. Give it back with `give`.

        Raises:
            Unavailable: there is none until the deadline.
        """
        while True:
            try:
                pool = self._here()
                connection = pool.getconn(timeout=max(0.05, min(_TRY_S, deadline - now_s())))
                break
            except (PoolTimeout, PoolClosed, psycopg.Error) as error:
                if now_s() >= deadline or self._is_refused(error):
                    raise self.unavailable(self._why(error)) from error
        connection.home = pool
        self._failures.clear()
        if connection.is_prepared is None:
            self._prepare(connection)
        return connection

    def _is_refused(self, error: Exception) -> bool:
        """Tell whether another try would have the same answer."""
        if isinstance(error, PoolTimeout):
            return bool(self._failures) and any(each in str(self._failures[-1]) for each in _FINAL)
        # Another thread may have closed the store just now.
        return not isinstance(error, PoolClosed)

    def _prepare(self, connection: Connection) -> None:
        """Prepare the usual statements, unless the next transaction may get another connection of a pooler's."""
        try:
            is_prepared = is_direct(connection)
            if is_prepared:
                connection.execute(self.statements.preparation)
            connection.is_prepared = is_prepared
        except psycopg.Error as error:
            # The schema is about to be made, or the connection has died. Its first statement will tell.
            log.debug("%s: nothing is prepared: %s", self.place, reason_of(error))
        except BaseException:
            self.give(connection)
            raise

    def _why(self, error: Exception) -> str:
        if not isinstance(error, PoolTimeout):
            return reason_of(error)
        # The pool does not say why it has none.
        failures = list(self._failures)
        return reason_of(failures[-1]) if failures else f"all {MOST_CONNECTIONS} connections of this process are in use"

    def give(self, connection: Connection) -> None:
        """Give a connection back. A transaction that was not committed is rolled back."""
        pool = connection.home
        if pool is None or self._pid != os.getpid():
            return
        try:
            if not connection.closed and connection.info.transaction_status != TransactionStatus.IDLE:
                connection.rollback()
        except psycopg.Error:
            connection.close()
        except BaseException:
            # A signal handler has raised. The pool counts a connection until it comes back.
            connection.close()
            raise
        finally:
            pool.putconn(connection)

    def close(self) -> None:
        """Close the connections that nobody uses, and the others when they are given back. A later use connects."""
        with self._guard:
            pool, self._pool = self._pool, None
        if pool is not None:
            _close(pool, self._pid)

    def unavailable(self, reason: str) -> Unavailable:
        return Unavailable(path=self.place, reason=reason)

    def run(self, work: Callable[[Connection], Result], timeout_s: float) -> Result:
        """Do work that may be done twice. A connection that is dead is replaced until the time is over.

        Raises:
            Unavailable: the server refused, or cannot be reached.
        """
        deadline, pause_s = now_s() + timeout_s, _PAUSE_S
        while True:
            connection = self.take(deadline)
            try:
                return work(connection)
            except psycopg.Error as error:
                if not is_dead(error, connection) or now_s() + pause_s > deadline:
                    raise self.unavailable(reason_of(error)) from error
                log.debug("%s: a connection died, and the statement is repeated: %s", self.place, reason_of(error))
            finally:
                self.give(connection)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def query(self, connection: Connection, statement: str, /, **values: Any) -> list[Row]:
        """Run a named statement, and return its rows."""
        cursor = connection.execute(self.text(connection, statement, **values))
        return cursor.fetchall() if cursor.description is not None else []

    def text(self, connection: Connection, statement: str, /, **values: Any) -> bytes:
        """Return a named statement with its values, to be sent together with others."""
        return self.statements.text(connection.pgconn, statement, values, is_prepared=connection.is_prepared is True)

    def news(self, connection: Connection, streams: list[int | None]) -> bytes:
        """Return the statement that tells the processes that follow these streams, when the transaction commits."""
        # A notification has at most 8,000 bytes. The others are found by polling.
        return self.text(connection, "notify", channel=self.channel, streams=",".join(map(str, streams[:400])))


def try_start(thread: threading.Thread) -> bool:
    """Start a thread. Return False if the system has none left."""
    try:
        thread.start()
    except RuntimeError as error:
        log.warning("%s: %s", thread.name, error)
        return False
    return True


def at_end_of_children(close: Callable[[], object], priority: int) -> None:
    """Call a function at the end of a child of multiprocessing, which ends past `atexit`. High priorities are first."""
    if (util := sys.modules.get("multiprocessing.util")) is not None:
        util.Finalize(None, close, exitpriority=priority)


def configure(connection: Connection) -> None:
    """Prepare a new connection."""
    connection.adapters.register_loader("text", _Utf8)


def _close(pool: ConnectionPool[Connection], pid: int) -> None:
    if pid == os.getpid():
        with contextlib.suppress(Exception):
            pool.close(timeout=1.0)


@contextlib.contextmanager
def refusals(place: str) -> Iterator[None]:
    """Turn the server's errors in a block into `Unavailable`."""
    try:
        yield
    except PersistError:
        raise
    except psycopg.Error as error:
        raise Unavailable(path=place, reason=reason_of(error)) from error


class Own:
    """A connection that one thread keeps for itself, apart from the pool. So it never waits for the verbs."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._connection: Connection | None = None
        self._closing: weakref.finalize[..., Own] | None = None
        self._pid = os.getpid()

    def get(self) -> Connection:
        """Return the connection. It is made anew if it has died."""
        if self._connection is None or self._connection.closed:
            try:
                made = Connection.connect(
                    self._connections.conninfo,
                    autocommit=True,
                    cursor_factory=psycopg.ClientCursor,
                    prepare_threshold=None,
                )
            except (psycopg.Error, OSError) as error:
                raise self._connections.unavailable(reason_of(error)) from error
            configure(made)
            self.close()
            self._connection = made
            # A `__del__` could come too late, because garbage may be a cycle.
            self._closing = weakref.finalize(self, _close_own, made, self._pid)
            self._closing.atexit = False
        return self._connection

    def run(self, work: Callable[[Connection], Result], timeout_s: float = 0.0) -> Result:
        """Do work that may be done twice. If the connection had died in the meantime, it is done on a new one.

        A server that cannot be reached is tried again until the time is over.
        """
        deadline, pause_s, is_first = now_s() + timeout_s, _PAUSE_S, True
        while True:
            connection = None
            try:
                connection = self.get()
                return work(connection)
            except psycopg.Error as error:
                may_go_on = (is_first or now_s() < deadline) and is_dead(error, connection) if connection else False
                if connection is not None and not connection.closed:
                    # The next statement must not find a transaction that has failed.
                    with contextlib.suppress(psycopg.Error):
                        connection.rollback()
                if not may_go_on:
                    raise self._connections.unavailable(reason_of(error)) from error
            except PersistError:
                if now_s() + pause_s > deadline:
                    raise
            if not is_first:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            is_first = False

    def close(self) -> None:
        """Close the connection. In a forked child it is the parent's, and stays open."""
        closing, self._closing, self._connection = self._closing, None, None
        # Calling `closing` does nothing at the end of the interpreter.
        if closing is not None and (found := closing.detach()) is not None:
            _, close, arguments, _ = found
            close(*arguments)


def _close_own(connection: Connection, pid: int) -> None:
    if pid == os.getpid():
        connection.close()
