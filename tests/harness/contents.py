"""All that a store holds, on any engine, to see that a verb has written nothing, and a session as others see it."""

from __future__ import annotations

import copy
from typing import Any

import persist
from harness.chats import everything

#: The heartbeat goes on while nothing is written.
_TABLES = ("sessions", "items", "parts", "streams", "events")


def everything_in(store: persist.Store) -> object:
    """Return every file with its inode and bytes, or every row with the transaction that wrote it."""
    if not _is_postgres(store):
        return everything(store.path)
    import psycopg

    schema = store._options["schema"]
    with psycopg.connect(store._at, autocommit=True) as connection:
        queries = {each: f'SELECT xmin, * FROM "{schema}".{each} ORDER BY 2, 3, 4' for each in _TABLES}
        return {each: connection.execute(query.encode()).fetchall() for each, query in queries.items()}


def committed(store: persist.Store, session_id: str = "s") -> dict[str, Any]:
    """Return the data of a session, as another process reads it."""
    return reopened(store).load(session_id).data


def reopened(store: persist.Store, **options: Any) -> persist.Store:
    """Return another store on the same sessions, with other options."""
    return persist.Store(store._at, **{**copy.copy(store._options), **options})


def name_of(store: persist.Store) -> str:
    """Return the name of a store as a command takes it."""
    return f"{store._at}?schema={store._options['schema']}" if _is_postgres(store) else str(store._at)


def _is_postgres(store: persist.Store) -> bool:
    return store._at.startswith("postgresql:")
