"""The named statements of queries.sql, with their values in the text.

A text is bytes from its parts to the socket: most of it is JSON that is kept as bytes. Values are never bound, so that
one message to the server holds as many statements as a verb has. Most verbs cost two round trips.

The statements of the usual verbs are prepared on a connection that nobody stands in. pgbouncer gives each transaction
another connection, so behind it their whole text is sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg import pq, sql

_FILE = Path(__file__).parent / "queries.sql"
_VALUE = re.compile(r"%\((\w+)\)s")

#: A value of a statement: a text is a string or its UTF-8, a tuple is a row, and a list of tuples are several rows.
Value = Any


#: The statements of the usual verbs.
_USUAL = (
    "lock_name",
    "lock",
    "seek_one",
    "seek",
    "items_of_key",
    "update",
    "put_item",
    "head",
    "last",
    "all_items",
    "all_parts",
)


def _names(text: str) -> list[str]:
    """Return the names of a statement's values, each once."""
    return list(dict.fromkeys(_VALUE.findall(text)))


class Raw(bytes):
    """An expression of SQL, in the place of a value."""

    __slots__ = ()


class Statements:
    """The statements, for one schema."""

    def __init__(self, schema: str) -> None:
        quoted = sql.Identifier(schema).as_string(None)
        #: The text of each statement, with `%(name)s` for a value, as psycopg takes it.
        self.texts: dict[str, str] = {}
        for part in re.split(r"^-- name: ", _FILE.read_text(), flags=re.MULTILINE)[1:]:
            name, _, text = part.partition("\n")
            text = re.sub(r"^ *--.*\n", "", text, flags=re.MULTILINE).strip()
            self.texts[name.strip()] = text.replace("{schema}", quoted)
        #: The message that prepares the usual statements. An earlier try may have prepared some of them.
        self.preparation = b";\n".join([b"DEALLOCATE ALL", *map(self._prepare, _USUAL)])
        self._prepared = {name: _names(self.texts[name]) for name in _USUAL}
        # A text, the name of a value, a text, and so on.
        self._parts = {
            name: [part if at % 2 else part.encode() for at, part in enumerate(_VALUE.split(text))]
            for name, text in self.texts.items()
        }

    def _prepare(self, name: str) -> bytes:
        names = _names(self.texts[name])
        text = _VALUE.sub(lambda value: f"${names.index(value[1]) + 1}", self.texts[name])
        return f"PREPARE persist_{name} AS {text}".encode()

    def text(self, pgconn: pq.abc.PGconn, name: str, values: dict[str, Value], *, is_prepared: bool) -> bytes:
        """Return a statement with its values. `is_prepared` tells whether the connection has the `preparation`."""
        quote = pq.Escaping(pgconn).escape_literal
        if is_prepared and name in self._prepared:
            own = [literal(values[each], quote) for each in self._prepared[name]]
            return b"EXECUTE persist_%b (%b)" % (name.encode(), b", ".join(own))
        return b"".join(
            [part if type(part) is bytes else literal(values[part], quote) for part in self._parts[name]]  # type: ignore[index]
        )


def literal(value: Value, quote: Callable[[bytes], bytes]) -> bytes:
    """Return a value as an expression of SQL. `quote` is libpq's, which knows the settings of its connection."""
    kind = type(value)
    if kind is bytes:
        return quote(value)
    if kind is str:
        return quote(value.encode())
    if value is None:
        return b"NULL"
    if kind is int:
        return b"%d" % value
    if kind is UUID:
        return b"'%b'" % str(value).encode()
    if kind is float:
        return repr(value).encode()
    if kind is Raw:
        return bytes(value)
    if kind is tuple:
        return b"(%b)" % b", ".join([literal(each, quote) for each in value])
    if kind is list and value and type(value[0]) is tuple:
        return b", ".join([literal(each, quote) for each in value])
    if kind is list:
        return b"ARRAY[%b]" % b", ".join([literal(each, quote) for each in value])
    raise TypeError(kind.__name__)
