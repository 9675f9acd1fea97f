"""The bytes of sessions in PostgreSQL, and the times of verbs in a store of many sessions."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import psycopg

import persist
from benchmarks.measure import Action, Effort, interleaved
from benchmarks.tables import Findings, Table, shown
from benchmarks.workload import SESSION, Message, conversation, new_message

#: The lengths of the messages whose bytes are counted, in characters.
LENGTHS = (60, 400, 2_000)
#: So many messages and sessions are counted.
COUNTED = 2_000
_TABLES = ("sessions", "items", "parts")
_DOCUMENTS = Path(__file__).resolve().parent.parent.parent / "docs"
#: Sessions of the same content, under other names.
_COPIES = """
INSERT INTO {0}.sessions (id, incarnation, revision, commit, commits, epoch, created_at, updated_at, fields, apart)
SELECT 'copy-' || n, incarnation, revision, commit, commits, epoch, created_at, updated_at - n * interval '1 s', fields,
    apart
FROM {0}.sessions, generate_series(1, {1}) n WHERE id = '{2}';
INSERT INTO {0}.items (session, list, place, key, item)
SELECT c.number, i.list, i.place, i.key, i.item
FROM {0}.sessions s JOIN {0}.items i ON i.session = s.number, {0}.sessions c WHERE s.id = '{2}' AND c.id <> s.id;
ANALYZE {0}.sessions; ANALYZE {0}.items
"""


def sizes(url: str, sessions: int, effort: Effort) -> Findings:
    """Count the bytes of messages and sessions, and measure verbs among so many sessions."""
    return Findings([_bytes(url), _times(url, sessions, effort)])


def _new_schema() -> str:
    return f"s_{uuid.uuid4().hex[:12]}"


def _bytes(url: str) -> Table:
    schema = _new_schema()
    store = persist.Store(url, schema=schema)
    text = " ".join(path.read_text() for path in sorted(_DOCUMENTS.rglob("*.md")))
    rows = []
    with psycopg.connect(url, autocommit=True) as connection:

        def added(write: Callable[[], object]) -> str:
            before = _size(connection, schema)
            write()
            return f"{(_size(connection, schema) - before) / COUNTED:,.0f}"

        for length in LENGTHS:
            starts = random.Random(length).choices(range(len(text) - length), k=COUNTED)
            messages: list[Message] = [
                {"id": uuid.uuid4().hex, "role": "user", "content": text[start : start + length]} for start in starts
            ]
            as_json = sum(len(persist.json_codec.encode(message)) for message in messages) / COUNTED
            session_id = f"of-{length}"
            store.create(session_id)
            found = added(lambda: store.extend(session_id, "messages", messages))  # noqa: B023 - it is called here
            rows.append((f"a message of {length:,} characters", f"{as_json:,.0f}", found))
        ids = [uuid.uuid4().hex for _ in range(COUNTED)]
        rows.append(("a session", "-", added(lambda: [store.create(each, {"title": "New chat"}) for each in ids])))
        connection.execute(f"DROP SCHEMA {schema} CASCADE")
    return Table("Bytes in tables and indexes", ("as JSON", "in PostgreSQL"), rows)


def _size(connection: psycopg.Connection[tuple[int]], schema: str) -> int:
    sizes = " + ".join(f"pg_total_relation_size('{schema}.{table}')" for table in _TABLES)
    row = connection.execute(f"SELECT {sizes}").fetchone()
    return 0 if row is None else row[0]


def _times(url: str, sessions: int, effort: Effort) -> Table:
    stores = {}
    for count in (1, sessions):
        schema = _new_schema()
        store = stores[count] = persist.Store(url, schema=schema)
        store.create(SESSION, conversation(10))
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(_COPIES.format(schema, count - 1, SESSION).encode())
    verbs: dict[str, Callable[[persist.Store], object]] = {
        "head": lambda store: store.head(SESSION),
        "recent(limit=20)": lambda store: list(itertools.islice(store.recent(limit=20), 20)),
        "append, durable": lambda store: store.append(SESSION, "messages", new_message()),
        "ids": lambda store: store.ids(),
    }
    actions = {
        f"{name} {count}": Action(lambda store=store, verb=verb: verb(store))  # type: ignore[misc]
        for name, verb in verbs.items()
        for count, store in stores.items()
    }
    found = interleaved(actions, effort)
    rows = [(name, *(shown(found[f"{name} {count}"]) for count in stores)) for name in verbs]
    return Table("Among so many sessions", ("1", f"{sessions:,}"), rows)
