"""The items of a list that stay in the database until a verb needs them.

A working copy counts a list, looks for an item by its id, and adds items to the end. None of that needs the items
themselves. So a commit costs what it changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from persist import json_codec
from persist.engine import Seeking
from persist.postgres.connections import Row
from persist.storage.content import SEPARATOR, Id, Items, as_id, id_in

#: Runs a named statement in the transaction that has locked the session.
Query = Callable[..., list[Row]]


#: An entry of an index has 2,700 bytes at most. The name of a list and a key stand in one.
LONGEST_BYTES = 1_000


def key_of(value: Id) -> bytes:
    """Return the key of the rows whose items have this id: its JSON, or a hash, which begins as no JSON."""
    text = json_codec.encode(value)
    return text if len(text) <= LONGEST_BYTES else b"#" + hashlib.sha256(text).hexdigest().encode()


def key_in(item: bytes) -> bytes | None:
    """Return the key of an item's row, or None."""
    value = id_in(item, "id")
    return None if value is None else key_of(value)


class Sought:
    """The items that a block is about to look for, which come with the session's lock.

    Attributes:
        name: the list's name.
        values: the ids that are looked for, by their keys.
        rows: the key, the place and the item of each that was found, the last ones first. None before the lock.
    """

    __slots__ = ("name", "rows", "values")

    def __init__(self, name: str, values: dict[bytes, Id]) -> None:
        self.name = name
        self.values = values
        self.rows: list[Row] | None = None

    @classmethod
    def of(cls, seeking: Seeking | None) -> Sought | None:
        """Return what a block seeks, or None if it is nothing."""
        if seeking is None:
            return None
        name, ids = seeking
        values = {key_of(value): value for each in ids if (value := as_id(each)) is not None}
        return cls(name if name.isascii() else json_codec.joined(name), values) if values else None


class RemoteItems(Items):
    """The first items of a committed list, which are rows, and a tail of new ones behind them.

    They may be asked only while the session's lock is held. `load` makes them a value that stays.
    """

    __slots__ = ("_found", "_known", "_query", "_rows", "_tail")

    def __init__(
        self,
        query: Query,
        rows: int,
        size_bytes: int,
        tail: list[bytes] | None = None,
        known: dict[int, bytes] | None = None,
    ) -> None:
        # The base's own state is made when a method of the base asks for it. See `__getattr__`.
        self._query = query
        self._rows = rows
        self._tail = [] if tail is None else tail
        #: Rows that were asked for, by their places. They cannot change while the session is locked.
        self._known: dict[int, bytes] = {} if known is None else known
        #: The places of the rows with an id, as `_rows_of` has found them.
        self._found: dict[Id, list[int]] = {}
        self._places = {}
        self.count = rows + len(self._tail)
        self.size_bytes = size_bytes

    def __getattr__(self, name: str) -> Any:
        if name != "_parts":
            raise AttributeError(name)
        items = [*self._from(0), *self._tail]
        self._parts = (memoryview(b""), 0, items, len(items))
        return self._parts

    @property
    def _is_loaded(self) -> bool:
        try:
            object.__getattribute__(self, "_parts")
        except AttributeError:
            return False
        return True

    def _from(self, start: int) -> list[bytes]:
        """Return the items that are rows, from a place on."""
        places = range(start, self._rows)
        if len(places) > len(self._known) or not all(map(self._known.__contains__, places)):
            found = [row[0] for row in self._query("items", start=start, stop=self._rows)]
            if len(found) != len(places):
                raise json_codec.Undecodable("a list has another number of items than its session says")
            if start:
                self._known.update(zip(places, found, strict=True))
            return found
        return [self._known[place] for place in places]

    def load(self) -> None:
        """Hold the items themselves, so that they can be asked after the lock is given up."""
        assert self._parts is not None

    def __getitem__(self, place: int) -> bytes:
        if self._is_loaded or not 0 <= place < self.count:
            return super().__getitem__(place)
        if place >= self._rows:
            return self._tail[place - self._rows]
        if place not in self._known:
            self._known[place] = self._query("items", start=place, stop=place + 1)[0][0]
        return self._known[place]

    def last(self, count: int) -> list[bytes]:
        """Return the last items."""
        if self._is_loaded:
            return super().last(count)
        if count <= len(self._tail):
            return self._tail[len(self._tail) - count :]
        return self._from(self.count - count) + self._tail

    def spliced(self, at: int, remove: int, insert: list[bytes], *, in_place: bool = True) -> Items:
        """Return these items with `insert` in the place of `remove` items, from the place `at` on."""
        if self._is_loaded:
            return super().spliced(at, remove, insert, in_place=False)
        if not 0 <= at <= at + remove <= self.count:
            raise ValueError(at)
        rows = min(at, self._rows)
        tail = [*self._from(rows), *self._tail]
        gone = tail[at - rows : at - rows + remove]
        tail[at - rows : at - rows + remove] = insert
        size_bytes = self.size_bytes + _bytes_of(insert) - _bytes_of(gone)
        return RemoteItems(self._query, rows, size_bytes, tail, self._known)

    def find(self, value: Id, key: str = "id") -> int | None:
        """Return the place of the last item whose key has this value, or None."""
        if self._is_loaded:
            return super().find(value, key)
        found = self._places_of(value, key)
        return found[0] if found else None

    def is_repeated(self, value: Id, key: str = "id") -> bool:
        """Tell whether more than one item has this value."""
        return super().is_repeated(value, key) if self._is_loaded else len(self._places_of(value, key)) > 1

    def _places_of(self, value: Id, key: str) -> list[int]:
        """Return the places of the items whose key has this value, the last ones first. At least two, if there are."""
        own = range(len(self._tail) - 1, -1, -1)
        places = [self._rows + at for at in own if _is(id_in(self._tail[at], key), value)]
        if len(places) > 1 or not self._rows:
            return places
        if key == "id":
            return [*places, *self._rows_of(value)]
        text = json_codec.encode(value).decode()
        # An item may hold the same text in another encoding, if it is not ASCII.
        rows = self._query("items_with", value=text if text.isascii() else "", stop=self._rows)
        return [*places, *(place for place, item in rows if _is(id_in(item, key), value))]

    def take(self, sought: Sought) -> None:
        """Take the items that came with the lock."""
        if sought.rows is not None:
            self._found = {value: [] for value in sought.values.values()}
            for key, place, item in sought.rows:
                self._found[sought.values[key]].append(place)
                self._known[place] = item

    def _rows_of(self, value: Id) -> list[int]:
        if value not in self._found:
            rows = self._query("items_of_key", key=key_of(value), stop=self._rows)
            self._known.update(rows)
            self._found[value] = [place for place, _ in rows]
        return self._found[value]


def _is(one: Id | None, other: Id) -> bool:
    return type(one) is type(other) and one == other


def _bytes_of(items: list[bytes]) -> int:
    return sum(map(len, items)) + len(SEPARATOR) * len(items)
