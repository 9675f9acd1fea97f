"""The content of a session: its top-level values, each as encoded JSON.

Small values are the *fields*. They stand together at the start of a document, so that a reader of a head needs nothing
else. The other values stand *apart*. A list that stands apart is kept as `Items`, and each item is encoded separately.

The place of a value depends on the values alone. So a process that applied a record agrees with a process that replays
it. The same data has the same content, up to the order of its keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import compress, count, repeat
from typing import Any

import msgspec

from persist import json_codec
from persist.errors import InvalidArgument, NotJSON, TooLarge, ValuePath, reserved

#: The first key of a document. It is no data.
HEADER = "_persist"
#: The lists that always stand apart, however small they are.
ALWAYS_APART = ("messages", "tool_calls")
#: The layer above reads this value in each head, so it is always a field.
ALWAYS_FIELD = "active_stream_id"
#: A larger value stands apart.
APART_BYTES = 4 * 1024
#: All fields together have at most so many bytes. Above that the largest ones stand apart, too.
FIELDS_BYTES = 32 * 1024
SEPARATOR = b",\n"
#: A change within so many items of a list's end brings the places of the ids up to date. After any other change they
#: are made anew.
_NEAR_END = 64


#: A value by which items are found. `1` and `"1"` differ.
Id = str | int


def as_id(value: object) -> Id | None:
    """Return a value if items can be found by it, else None. True is no id."""
    if type(value) is str:
        return value if value.isascii() else json_codec.joined(value)
    return value if type(value) is int else None


@cache
def _id_readers(key: str) -> tuple[Callable[[bytes], Any], Callable[[bytes | memoryview], list[Any]]]:
    """Return two decoders for the value of a key: for one item, and for each item of a list."""
    kind = msgspec.defstruct("_Keyed", [("value", Any, msgspec.field(name=key, default=None))])
    return msgspec.json.Decoder(kind).decode, msgspec.json.Decoder(list[kind]).decode  # type: ignore[valid-type]


def id_in(item: bytes, key: str) -> Id | None:
    """Return the value of an item's key if items can be found by it (see `as_id`), else None."""
    try:
        value = _id_readers(key)[0](item).value
        return value if type(value) is str else as_id(value)
    except (msgspec.DecodeError, RecursionError):
        # The item is no object, or it holds a lone surrogate, which msgspec does not read.
        decoded = json_codec.decode(item)
        return as_id(decoded.get(key)) if type(decoded) is dict else None


class _Places:
    """The places of items by the value of a key.

    `found` holds the last place of each value. `repeated` holds the values that stand more than once.
    """

    __slots__ = ("found", "repeated")

    def __init__(self, ids: list[Any]) -> None:
        self.found: dict[Id, int] = {}
        self.repeated: set[Id] = set()
        if {str, int}.issuperset(map(type, ids)):
            self.found = dict(zip(ids, range(len(ids)), strict=True))
        if len(self.found) < len(ids):
            self.found.clear()
            self.put(ids, 0)

    def put(self, ids: Iterable[Any], start: int) -> None:
        """Add the places of ids. The first id stands at `start`."""
        for place, value in enumerate(ids, start):
            if type(value) is str or type(value) is int:
                if value in self.found:
                    self.repeated.add(value)
                self.found[value] = place


_NO_TEXT = memoryview(b"")
#: So many bytes at the end of a text are searched for the last items, before the whole text is split.
_ENDING_BYTES = 32 * 1024


class Items:
    """The encoded items of a list, as a value: a change makes other `Items`, and this one stays as it is.

    The items that were read from a document stay one text, until a caller needs them one by one. Behind the text stands
    a list. The first `length` entries of the list belong to this value. An append extends the list in place, because no
    older value looks beyond its own length. So a replica and a merge base share their common items.

    Change a value only under its session's lock, because an append looks at the list before it extends it.
    """

    __slots__ = ("_parts", "_places", "count", "size_bytes")

    def __init__(
        self,
        items: list[bytes],
        *,
        text: memoryview = _NO_TEXT,
        text_count: int = 0,
        length: int | None = None,
        size_bytes: int | None = None,
    ) -> None:
        if length is None:
            length = len(items)
        #: One attribute, so that a thread that splits the text replaces all four values in one step.
        self._parts = (text, text_count, items, length)
        #: The name of a key -> the places of the items by its value.
        self._places: dict[str, _Places] = {}
        self.count = text_count + length
        #: The length of its JSON in a document, brackets and newlines included.
        self.size_bytes = (len(text) or 2) + _bytes_of(items) if size_bytes is None else size_bytes

    @classmethod
    def in_document(cls, text: memoryview, count: int) -> Items:
        """Return the items of a list as it stands in a document, brackets included. The text is not copied."""
        return cls([], text=text, text_count=count) if count else cls([])

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[bytes]:
        """Yield the items. The text is not split first, so that the items of 100 MB begin at once."""
        text, text_count, items, length = self._parts
        if text_count:
            whole, start = bytes(text[2:-2]), 0
            for _ in range(text_count - 1):
                end = whole.find(SEPARATOR, start)
                if end < 0:
                    raise json_codec.Undecodable("a list has another number of items than its header says")
                yield whole[start:end]
                start = end + len(SEPARATOR)
            yield whole[start:]
        yield from items[:length]

    def __getitem__(self, place: int) -> bytes:
        _, text_count, items, length = self._parts
        if not 0 <= place < text_count + length:
            raise IndexError(place)
        return items[place - text_count] if place >= text_count else self.split()[place]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Items) or len(self) != len(other) or self.size_bytes != other.size_bytes:
            return False
        _, mine, others = self.behind_common_text(other)
        return mine == others

    __hash__ = None  # type: ignore[assignment]

    def load(self) -> None:
        """Do nothing, because the items are here. An engine may keep them elsewhere until a verb needs them."""

    def split(self) -> list[bytes]:
        """Return all items in a new list, because another thread may extend the shared list at any time."""
        text, text_count, items, length = self._parts
        if text_count:
            split = bytes(text[2:-2]).split(SEPARATOR)
            if len(split) != text_count:
                raise json_codec.Undecodable("a list has another number of items than its header says")
            items = [*split, *items[:length]]
            length = len(items)
            self._parts = (_NO_TEXT, 0, items, length)
        return items[:length]

    def last(self, count: int) -> list[bytes]:
        """Return the last items. If they stand behind the text or at its end, do not split the text."""
        text, _, items, length = self._parts
        if count <= length:
            return items[length - count : length]
        # The first piece is left out, because it may be cut off.
        ending = bytes(text[2:-2][-_ENDING_BYTES:]).split(SEPARATOR)[1:]
        if count <= len(ending) + length:
            return ending[len(ending) + length - count :] + items[:length]
        return self.split()[len(self) - count :]

    def behind_common_text(self, other: Items) -> tuple[int, list[bytes], list[bytes]]:
        """Return how many items the lists share as one text, and the other items of both lists."""
        text, text_count, items, length = self._parts
        other_text, _, other_items, other_length = other._parts
        if text is other_text:
            return text_count, items[:length], other_items[:other_length]
        return 0, self.split(), other.split()

    def in_text(self) -> tuple[memoryview, list[bytes]]:
        """Return the text that is not split, brackets included, and the items behind it."""
        text, _, items, length = self._parts
        return text, items[:length]

    def spliced(self, at: int, remove: int, insert: list[bytes], *, in_place: bool = True) -> Items:
        """Return these items with `insert` in the place of `remove` items, from the place `at` on.

        Args:
            in_place: whether an append may extend the shared list. The caller must hold the session's lock for that.

        Raises:
            ValueError: there are no such items.
        """
        if not 0 <= at <= at + remove <= self.count:
            raise ValueError(at)
        text, text_count, items, length = self._parts
        if at < text_count:
            items = self.split()
            text, text_count, items, length = self._parts
        size_bytes = self.size_bytes + sum(map(len, insert)) + len(SEPARATOR) * len(insert)
        is_append = at == self.count
        if is_append and in_place and len(items) == length:
            items += insert
        else:
            start = at - text_count
            size_bytes -= _bytes_of(items[start : start + remove])
            items = items[:start] + insert + items[start + remove : length]
        length += len(insert) - remove
        after = Items(items, text=text, text_count=text_count, length=length, size_bytes=size_bytes)
        if in_place and self._places:
            if is_append:
                after._places, self._places = self._places, {}
                for key, places in after._places.items():
                    places.put(map(id_in, insert, repeat(key)), at)
            else:
                self._hand_over_places(after, at)
        return after

    # --- ids ---

    def find(self, value: Id, key: str = "id") -> int | None:
        """Return the place of the last item whose key has this value (see `as_id`), or None."""
        places = self._places.get(key) or self._placed(key)
        return places.found.get(value)

    def is_repeated(self, value: Id, key: str = "id") -> bool:
        """Tell whether more than one item has this value."""
        return value in self._placed(key).repeated

    def ids(self, key: str = "id") -> list[Any]:
        """Return the value of each item's key. It may be any JSON value, and is None where an item has none."""
        text, _, items, length = self._parts
        try:
            ids = [item.value for item in _id_readers(key)[1](text)] if text else []
        except (msgspec.DecodeError, RecursionError):
            ids = [id_in(item, key) for item in bytes(text[2:-2]).split(SEPARATOR)]
        return [*ids, *(id_in(item, key) for item in items[:length])]

    def _placed(self, key: str) -> _Places:
        if key not in self._places:
            self._places[key] = _Places(self.ids(key))
        return self._places[key]

    def _hand_over_places(self, after: Items, at: int) -> None:
        """Hand the places over to the changed value, if that costs no more than the change itself.

        This value reads its places anew when it needs them. `at` is where the change begins.
        """
        handed_over, self._places = self._places, {}
        if self.count - at > _NEAR_END:
            return
        for key, places in handed_over.items():
            gone = {id_in(item, key) for item in self.last(self.count - at)} - {None}
            # Otherwise another item has one of these ids, and nobody knows its place.
            if places.repeated.isdisjoint(gone):
                for each in gone:
                    places.found.pop(each, None)  # type: ignore[arg-type]
                places.put(map(id_in, after.last(after.count - at), repeat(key)), at)
                after._places[key] = places

    # --- data ---

    def decode(self) -> list[Any]:
        """Return the items as a fresh list of Python values."""
        text, text_count, items, length = self._parts
        found: list[Any] = json_codec.decode(text) if text_count else []
        if len(found) != text_count:
            raise json_codec.Undecodable("a list has another number of items than its header says")
        if length:
            found += json_codec.decode(b"[%b]" % b",".join(items[:length]))
        return found


def _bytes_of(items: list[bytes]) -> int:
    return sum(map(len, items)) + len(SEPARATOR) * len(items)


#: A top-level value: its JSON, or the items of a list that stands apart.
Value = bytes | Items


class Content(msgspec.Struct, frozen=True):
    """A session's top-level values: the fields, and the values that stand apart. See `placed`."""

    fields: Mapping[str, bytes]
    apart: Mapping[str, Value]

    @property
    def counts(self) -> dict[str, int | None]:
        """The values that stand apart, by name: the number of items of a list, None for any other value."""
        counts: dict[str, int | None] = {}
        for name, value in self.apart.items():
            counts[name] = value.count if isinstance(value, Items) else None
        return counts

    @property
    def size_bytes(self) -> int:
        """The size of the values, which is about the size of a document that holds them."""
        total = 0
        for values in (self.fields, self.apart):
            for name, value in values.items():
                total += len(name) + 5 + (value.size_bytes if isinstance(value, Items) else len(value))
        return total

    def __iter__(self) -> Iterator[tuple[str, Value]]:
        yield from self.fields.items()
        yield from self.apart.items()

    def get(self, name: str) -> Value | None:
        """Return a top-level value, wherever it stands."""
        return self.fields.get(name) or self.apart.get(name)

    def last(self, name: str, count: int) -> list[bytes]:
        """Return the last items of a list that stands apart, or all if it has no more."""
        items = self.apart[name]
        return items.last(min(count, len(items))) if isinstance(items, Items) else []

    def decode(self) -> dict[str, Any]:
        """Return the session's data as a fresh dict."""
        return {name: decode(value) for name, value in self}


def _json_bytes(value: Items) -> int:
    """Return the length of `as_json`, so that a list has the same size in both forms."""
    return max(2, value.size_bytes - value.count - 1)


def decode(value: Value) -> Any:
    """Return a top-level value as a fresh Python value."""
    return value.decode() if isinstance(value, Items) else json_codec.decode(value)


def as_json(value: Value) -> bytes:
    """Return a top-level value as one piece of JSON without newlines."""
    return b"[" + b",".join(value.split()) + b"]" if isinstance(value, Items) else value


def load(content: Content) -> None:
    """Hold all items of a content here, so that it may be asked after its session's lock is given up."""
    for value in content.apart.values():
        # Not asked of ordinary items, because each call counts (see tests/unit/test_costs.py).
        if isinstance(value, Items) and type(value) is not Items:
            value.load()


def empty() -> Content:
    """Return the content of a session without a value."""
    return Content({}, {})


def placed(values: Iterable[tuple[str, Value]]) -> Content:
    """Return the content that these values make. Decide for each value whether it is a field or stands apart.

    Raises:
        TooLarge: they would make a document that is too large to be read back.
    """
    fields: dict[str, bytes] = {}
    apart: dict[str, Value] = {}
    for name, value in values:
        size_bytes = _json_bytes(value) if isinstance(value, Items) else len(value)
        if name in ALWAYS_APART or (size_bytes > APART_BYTES and name != ALWAYS_FIELD):
            apart[name] = items_of(value) if isinstance(value, bytes) else value
        else:
            fields[name] = value if isinstance(value, bytes) else as_json(value)
    total = sum(map(len, fields.values()))
    if total > FIELDS_BYTES:
        movable = sorted(fields.keys() - {ALWAYS_FIELD}, key=lambda name: (len(fields[name]), name))
        while total > FIELDS_BYTES and movable:
            largest = movable.pop()
            total -= len(fields[largest])
            apart[largest] = items_of(fields.pop(largest))
    content = Content(fields, apart)
    if content.size_bytes > json_codec.MAX_BYTES:
        raise too_large()
    return content


def too_large() -> TooLarge:
    """Return the error for values that make a document which is too large to be read back."""
    return TooLarge(limit=json_codec.MAX_BYTES)


def items_of(value: bytes) -> Value:
    """Return a value as it stands apart: a list becomes `Items`, and any other value stays as it is."""
    return Items(list(map(json_codec.encode, json_codec.decode(value)))) if value[:1] == b"[" else value


def encoded(data: Any, like: Content | None = None) -> Content:
    """Encode a session's data.

    Args:
        like: a content that is mostly the same. See `encode_values`.

    Raises:
        NotJSON: a value has no exact JSON form. The error names its path.
        InvalidArgument: `data` is no dict.
        InvalidArgument: `data` has a field that is called like the header.
    """
    if type(data) is not dict:
        raise InvalidArgument(what="a session's data", expected="a plain dict", got=type(data).__name__)
    return placed(encode_values(data, like or empty()))


def encode_values(data: dict[str, Any], known: Content) -> Iterator[tuple[str, Value]]:
    """Encode top-level values.

    If a value's JSON equals the known JSON, the value was checked when the known JSON was made. So only the other
    values are checked here. A value that holds the same data as before in another order of keys keeps its JSON.
    """
    if HEADER in data:
        raise reserved(HEADER, "Choose another name for the field.")
    halves: set[str] = set()
    for key, value in data.items():
        if type(key) is not str:
            raise NotJSON(path=(), reason=f"a key is {type(key).__name__}, and JSON has only string keys")
        name = key if key.isascii() else json_codec.joined(key)
        if name != key:
            if name in data or name in halves:
                raise json_codec.twins(())
            halves.add(name)
        before = known.fields.get(name) or known.apart.get(name)
        if type(value) is list and (name in ALWAYS_APART or isinstance(before, Items) or len(value) > _FEW):
            yield name, _encoded_items(name, value, before)
        else:
            yield name, _encoded_value(value, before if isinstance(before, bytes) else None, (name,))


#: A list with more items is encoded item by item, because it may stand apart.
_FEW = 16


def _encoded_value(value: Any, before: bytes | None, path: ValuePath) -> bytes:
    if type(value) in json_codec.PLAIN:
        return json_codec.encode(value, path)
    found = json_codec.encode_unchecked(value)
    if found is not None and found == before:
        return found
    return as_before(json_codec.encode_exact(value, path), value, before)


def as_before(found: bytes, value: Any, before: bytes | None) -> bytes:
    """Return `before` if `found` differs from it only in the order of keys, else `found`.

    `found` is the JSON of `value`, and `before` is the JSON that was known before.
    """
    if before is None or len(found) != len(before) or found == before:
        return found
    there = json_codec.decode(before)
    # A caller's value may hold both halves of a surrogate pair, where the file has the character.
    is_same = json_codec.same(there, value) or (
        not found.isascii() and json_codec.same(there, json_codec.decode(found))
    )
    return before if is_same else found


def _encoded_items(name: str, items: list[Any], before: Value | None) -> Items:
    known = items_of(before) if isinstance(before, bytes) else before
    known = known if isinstance(known, Items) else Items([])
    at = _unchanged(known, items)
    old, found = known.last(len(known) - at), json_codec.encode_all_unchecked(items[at:])
    if found == old:
        return known
    if found is None:
        # Some item needs another encoder, or no encoder takes it.
        first, removed, count = 0, len(old), len(items) - at
    else:
        first, gone, added = window(old, found)
        removed, count = len(gone), len(added)
    fresh = [
        _encoded_value(item, old[place] if place < len(old) else None, (name, at + place))
        for place, item in enumerate(items[at + first : at + first + count], first)
    ]
    return known.spliced(at + first, removed, fresh, in_place=False)


#: So many items are encoded and compared at a time. All at once would take memory that the kernel has to clear first.
_BLOCK = 128


def _unchanged(known: Items, items: list[Any]) -> int:
    """Return how many items at the beginning still have their known JSON, counted in whole blocks."""
    text, behind = known.in_text()
    in_text = len(known) - len(behind)
    place, offset = 0, 2
    while place < min(len(items), len(known)):
        stop = min(place + _BLOCK, in_text) if place < in_text else place + _BLOCK
        lines = json_codec.encode_lines_unchecked(items[place:stop])
        block = b"" if lines is None else lines[:-1].replace(b"\n", SEPARATOR)
        if place < in_text:
            block += SEPARATOR if stop < in_text else b"\n]"
            there, offset = bytes(text[offset : offset + len(block)]), offset + len(block)
        else:
            there = SEPARATOR.join(behind[place - in_text : stop - in_text])
        if lines is None or there != block:
            break
        place = min(stop, len(items))
    return place


def window(before: list[bytes], after: list[bytes]) -> tuple[int, list[bytes], list[bytes]]:
    """Return how many items are equal at the beginning, and both lists' items between the equal beginning and end."""
    shorter = min(len(before), len(after))
    if before[:shorter] == after[:shorter]:
        return shorter, before[shorter:], after[shorter:]
    first = next(compress(count(), map(operator.ne, before, after)), shorter)
    rest = shorter - first
    tail = next(compress(count(), map(operator.ne, reversed(before), reversed(after))), rest)
    tail = min(tail, rest)
    return first, before[first : len(before) - tail], after[first : len(after) - tail]
