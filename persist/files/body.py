"""The body of a document: a session's data as bytes, one small field or one item of a list a line.

It is canonical: the same data always has the same body, byte for byte. So "was anything changed" is a comparison of bytes, and
a line of a list stands for an item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persist import codec
from persist.errors import CorruptSession, NotJSON, ReservedField, WrongType

#: The first key of a document, which is no data.
HEADER = "_persist"
#: The fields that stand behind the small ones.
BULK = ("messages", "tool_calls")
#: So much is compared at a time: to copy much more takes fresh memory, which costs more than to compare it.
PIECE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A session's data as bytes, parted into small fields and bulk. Equal data has equal bodies.

    The bulk is `text` from `start` on: what was read from a file is not copied out of it.
    """

    head: bytes
    text: bytes
    counts: Mapping[str, int]
    #: Session id and file that it was read from, for the error of a body that cannot be decoded.
    source: tuple[str, Path] | None = None
    #: The bulk as objects, if it was decoded while its checksum was computed: for the first who asks, as nobody may share them.
    decoded: list[dict[str, Any]] = field(default_factory=list, repr=False)
    start: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Body) and self.head == other.head and self.has_bulk_of(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def bulk(self) -> bytes:
        return self.text[self.start :] if self.start else self.text

    def has_bulk_of(self, other: Body) -> bool:
        """Whether the bulk of both is the same, byte for byte."""
        if len(self.text) - self.start != len(other.text) - other.start:
            return False
        places = range(0, len(self.text) - self.start, PIECE_BYTES)
        return all(
            other.text.startswith(self.text[self.start + at : self.start + at + PIECE_BYTES], other.start + at) for at in places
        )

    @classmethod
    def of(cls, data: Any) -> Body:
        """Encode a session's data.

        Raises:
            NotJSON: a value has no exact JSON form; its path is named.
            WrongType: `data` is not a dict.
            ReservedField: it has a field that is called like the header.
        """
        if type(data) is not dict:
            raise WrongType(what="a session's data", expected="a plain dict", got=type(data).__name__)
        body = cls._at_once(data) or cls._of_copy(codec.captured(data))
        body.check_size()
        return body

    def check_size(self) -> None:
        """Raise `NotJSON` if it would be too large to be read back."""
        if self.size > codec.MAX_BYTES:
            raise NotJSON(path=(), reason=f"it would take more than {codec.MAX_BYTES:,} bytes")

    @classmethod
    def assembled(cls, small: bytes, bulk: Mapping[str, list[bytes | memoryview]], counts: Mapping[str, int]) -> Body:
        """The body of small fields, as `small` has them, and of bulk fields, each as pieces of its JSON."""
        names = [name for name in BULK if name in bulk]
        head = small + (b",\n" if names else b"\n") if small else b""
        pieces: list[bytes | memoryview] = []
        for name in names:
            pieces += [b'%b"%b":' % (b",\n" if pieces else b"", name.encode()), *bulk[name]]
        # One join: to copy megabytes once more may cost as much as to encode them.
        return cls(head, b"".join([*pieces, b"\n}\n"]) if pieces else b"}\n", counts)

    @property
    def small(self) -> bytes:
        """The small fields, whatever follows them."""
        return self.head.removesuffix(b"\n").removesuffix(b",")

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Where in the text the JSON of each bulk field stands. A list that is not empty has one item a line."""
        found = {}
        end = len(self.text) - len(b"\n}\n")
        for name in reversed(BULK):
            mark = b'"%b":' % name.encode()
            place = self.start
            if not self.text.startswith(mark, place):
                # No line of a list begins like a field. The last field's is the last line, or it opens the last list.
                line = b"\n" + mark + b"[\n" if self.counts.get(name) else b"\n"
                place = max(self.text.rfind(line, self.start, max(end, self.start)) + 1, self.start)
            if self.text.startswith(mark, place, max(end, place)):
                found[name] = place + len(mark), end
                end = place - len(b",\n")
        return found

    @classmethod
    def _at_once(cls, data: dict[str, Any]) -> Body | None:
        """Encode much data without copying it first; None for little of it, and for what is unusual."""
        known = data.copy()
        lists = {key: known[key] for key in BULK if type(known.get(key)) is list}
        if HEADER in known or max(map(len, lists.values()), default=0) < codec.MANY:
            return None
        single = {key: value for key, value in known.items() if key not in lists}
        encoded = codec.encode_at_once(data, known, [single.values(), *lists.values()])
        if encoded is None:
            return None
        values, items = dict(zip(single, encoded[0], strict=True)), dict(zip(lists, encoded[1:], strict=True))
        return cls._joined(known, values, items)

    @classmethod
    def _of_copy(cls, data: dict[str, Any]) -> Body:
        """Encode data that nobody else has, one value after the other."""
        if HEADER in data:
            raise ReservedField(field=HEADER, remedy="Choose another name for the field.")
        items = {key: _encoded_items(key, data[key]) for key in BULK if type(data.get(key)) is list}
        values = {key: codec.encode(value, (key,)) for key, value in data.items() if key not in items}
        return cls._joined(list(data), values, items)

    @classmethod
    def _joined(cls, keys: Iterable[str], values: Mapping[str, bytes], items: Mapping[str, list[bytes]]) -> Body:
        """Put the fields together: those of `values` are encoded whole, those of `items` item by item."""
        counts = {key: len(found) for key, found in items.items()}
        small = [_line(key, values[key]) for key in keys if key not in BULK]
        # One join: to copy megabytes once more may cost as much as to encode them.
        bulk = [
            piece
            for key in BULK
            if key in values or key in items
            for piece in (_lines(key, items[key]) if key in items else [_line(key, values[key])])
        ]
        if not bulk:
            return cls(b",\n".join(small) + b"\n" if small else b"", b"}\n", counts)
        bulk[-1] += b"\n}\n"
        return cls(b"".join(line + b",\n" for line in small), b",\n".join(bulk), counts)

    @property
    def size(self) -> int:
        return len(self.head) + len(self.text) - self.start

    @property
    def is_empty(self) -> bool:
        return not self.head and self.has_no_bulk

    @property
    def has_no_bulk(self) -> bool:
        return len(self.text) - self.start == len(b"}\n")

    def data(self) -> dict[str, Any]:
        """A fresh copy of the data."""
        try:
            bulk = self.decoded.pop()
        except IndexError:
            bulk = self._decode(b"{" + self.bulk)
        if not bulk.keys() <= frozenset(BULK):
            raise self._mislabelled()
        return self.fields() | bulk

    def fields(self) -> dict[str, Any]:
        """A fresh copy of the small fields."""
        fields = self._decode(b"{" + self.small + b"}")
        if not fields.keys().isdisjoint(BULK):
            raise self._mislabelled()
        return fields

    def _decode(self, encoded: bytes) -> dict[str, Any]:
        """Its checksum vouches for it, so this fails only on what somebody has sealed on purpose."""
        try:
            decoded = codec.decode(encoded)
        except (ValueError, RecursionError):
            decoded = None
        if type(decoded) is dict:
            return decoded
        raise self._corrupt("its checksum matches, but it is no JSON object.")

    def _mislabelled(self) -> CorruptSession:
        return self._corrupt("its checksum matches, but its small fields and its bulk are not parted as its header says.")

    def _corrupt(self, reason: str) -> CorruptSession:
        session_id, path = self.source or ("", Path())
        return CorruptSession(session_id=session_id, path=path, reason=reason)


def small_of(data: Mapping[str, Any]) -> bytes:
    """The small fields of a session's data, one a line."""
    return b",\n".join([_line(key, codec.encode(value, (key,))) for key, value in data.items() if key not in BULK])


def _encoded_items(key: str, items: list[Any]) -> list[bytes]:
    return [codec.encode(item, (key, index)) for index, item in enumerate(items)]


def _line(key: str, value: bytes) -> bytes:
    return codec.encode(key, (key,)) + b":" + value


def _lines(key: str, items: list[bytes]) -> list[bytes]:
    """A bulk field, in pieces that belong on both sides of a comma and the end of a line."""
    if not items:
        return [_line(key, b"[]")]
    first, *others = items
    lines = [_line(key, b"[\n" + first), *others]
    lines[-1] += b"\n]"
    return lines
