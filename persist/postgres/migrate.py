"""The schema's migrations: numbered files that are run in their order, each once, in one transaction.

Any number of workers may start at once. One of them migrates, and the others wait for it, because the migrations are
run under a lock of the database.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import psycopg
from psycopg import sql

from persist.errors import InvalidArgument, Unavailable, UnsupportedFormat
from persist.postgres.connections import Connection, Connections

_FILES = sorted((Path(__file__).parent / "migrations").glob("[0-9]*.sql"))
#: The version of the schema that this version of persist needs.
NEWEST = int(_FILES[-1].name.partition("_")[0])


def version_of(connection: Connection, schema: str) -> int:
    """Return the version of a schema, 0 if there is none."""
    table = sql.Identifier(schema, "migrations").as_string(connection)
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [table]).fetchone()
    if row is None or not row[0]:
        return 0
    row = connection.execute(f"SELECT coalesce(max(version), 0) FROM {table}").fetchone()  # noqa: S608 - it is quoted
    return 0 if row is None else int(row[0])


def _version(connections: Connections, timeout_s: float) -> int:
    """Return the version of the schema, if this version of persist can use it.

    Raises:
        InvalidArgument: the database has another encoding.
        UnsupportedFormat: a newer version of persist has migrated the schema.
    """

    def look(connection: Connection) -> tuple[str | None, int]:
        return connection.info.parameter_status("server_encoding"), version_of(connection, connections.schema)

    encoding, found = connections.run(look, timeout_s)
    if encoding != "UTF8":
        what, remedy = f"the encoding of {connections.place}", "Make one with ENCODING 'UTF8' TEMPLATE template0."
        raise InvalidArgument(what=what, got=encoding, expected="UTF8", remedy=remedy)
    if found > NEWEST:
        remedy = "Use the version of persist that migrated it, or a newer one."
        raise UnsupportedFormat(path=connections.place, found=found, known=NEWEST, remedy=remedy)
    return found


def require_newest(connections: Connections, *, create: bool, timeout_s: float) -> None:
    """Bring the schema up to date, or refuse one that is not.

    Raises:
        InvalidArgument: it is missing or too old, and must not be changed. Or the database has another encoding.
        UnsupportedFormat: a newer version of persist has migrated it.
    """
    if create:
        migrate(connections, timeout_s=timeout_s)
        return
    found = _version(connections, timeout_s)
    if found < NEWEST:
        expected = f"at version {NEWEST}: run 'persist migrate URL'"
        got = f"at version {found}" if found else "missing"
        raise InvalidArgument(what=f"the schema of {connections.place}", got=got, expected=expected)


def migrate(connections: Connections, *, timeout_s: float) -> list[str]:
    """Run the migrations that the schema lacks, and return their names. The schema is made if it is missing.

    Raises:
        InvalidArgument: the database has another encoding.
        UnsupportedFormat: a newer version of persist has migrated it.
        Unavailable: the user may not do that.
    """
    if _version(connections, timeout_s) == NEWEST:
        # A user who may not change an up-to-date schema can use it all the same.
        return []
    try:
        return connections.run(partial(_migrate, connections.schema), timeout_s)
    except Unavailable as error:
        if isinstance(error.__cause__, psycopg.errors.InsufficientPrivilege):
            remedy = "Let the owner of the database run 'persist migrate URL'."
            raise Unavailable(path=error.path, reason=error.reason, remedy=remedy) from error
        raise


def _migrate(schema: str, connection: Connection) -> list[str]:
    name, ran = sql.Identifier(schema).as_string(connection), list[str]()
    with connection.transaction():
        # Under another level, which a role may prefer, those who have waited for the lock would see the past.
        connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        # Nobody waits for a process that was cut off in here.
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = '30s'")
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('persist migrate ' || %s, 0))", [schema])
        # IF NOT EXISTS would ask for the right to make a schema, even if it is there. And it may answer from what this
        # connection knew before the lock.
        if not connection.execute("SELECT FROM pg_namespace WHERE nspname = %s", [schema]).fetchall():
            connection.execute(f"CREATE SCHEMA {name}")
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {name}.migrations "
            "(version integer PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        found = version_of(connection, schema)
        for path in _FILES:
            number = int(path.name.partition("_")[0])
            if number > found:
                connection.execute(path.read_text().replace("{schema}", name).encode())
                connection.execute(f"INSERT INTO {name}.migrations (version) VALUES (%s)", [number])  # noqa: S608
                ran.append(path.stem)
    return ran
