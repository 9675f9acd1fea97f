"""The schema's migrations: numbered files that are run in their order, each once, in one transaction.

Any number of workers may start at once. One of them migrates, and the others wait for it, because the migrations are
run under a lock of the database.
"""

from __future__ import annotations

from pathlib import Path

from psycopg import sql

from persist.errors import InvalidArgument
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


def require_newest(connections: Connections, *, create: bool, timeout_s: float) -> None:
    """Bring the schema up to date, or refuse one that is not.

    Raises:
        InvalidArgument: a newer version of persist has migrated it. Or it is not there, and must not be created.
    """
    found = connections.run(lambda connection: version_of(connection, connections.schema), timeout_s)
    if found < NEWEST and create:
        found = connections.run(lambda connection: migrate(connection, connections.schema), timeout_s)
    if found != NEWEST:
        expected = f"at version {NEWEST}: run 'persist migrate'" if found < NEWEST else "used by a newer persist"
        got = f"at version {found}" if found else "missing"
        raise InvalidArgument(what=f"the schema of {connections.place}", got=got, expected=expected)


def migrate(connection: Connection, schema: str) -> int:
    """Run the migrations that a schema lacks, and return its version."""
    name = sql.Identifier(schema).as_string(connection)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('persist migrate ' || %s, 0))", [schema])
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {name}")
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
                found = number
    return found
