"""The body of a document: a session's data as bytes, one small field or one item of a list a line.

It is canonical: the same data always has the same body, byte for byte. So "was anything changed" is a comparison of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persist import codec, instant
from persist.errors import CorruptSession, NotJSON, ReservedField, WrongType
from persist.storage.lines import Lines, Settled
from persist.instant import EncodedList

#: The first key of a document, which is no data.
HEADER = "_persist"
#: The fields that stand behind the small ones.
BULK = ("messages", "tool_calls")


@dataclass(frozen=True, slots=True)
class Body:
    """A session's data as bytes, parted into small fields and bulk. Equal data has equal bodies.

    Attributes:
        small: the small fields, as `small_of` gives them.
        bulk: the others that are there: lists as lines, anything else as its JSON.
        source: session id and file that it was read from, for the error of a body that cannot be decoded.
        decoded: the bulk as objects, if it was decoded while its checksum was computed: for the first who asks, as nobody may
            share them.
    """

    small: bytes
    bulk: Mapping[str, Lines | bytes]
    source: tuple[str, Path] | None = field(default=None, compare=False)
    decoded: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, data: Any, like: Body | None = None) -> Body:
        """Encode a session's data; `like` is an earlier body of the same objects, which need not be encoded again.

        Raises:
            NotJSON: a value has no exact JSON form; its path is named.
            WrongType: `data` is not a dict.
            ReservedField: it has a field that is called like the header.
        """
        if type(data) is not dict:
            raise WrongType(what="a session's data", expected="a plain dict", got=type(data).__name__)
        body = cls._at_once(data, like) or cls._of_copy(codec.captured(data))
        body.check_size()
        return body

    def check_size(self) -> None:
        """Raise `NotJSON` if it would be too large to be read back."""
        if self.size_bytes > codec.MAX_BYTES:
            raise NotJSON(path=(), reason=f"it would take more than {codec.MAX_BYTES:,} bytes")

    @classmethod
    def _at_once(cls, data: dict[str, Any], like: Body | None) -> Body | None:
        """Encode much data without copying it first; None for little of it, and for what is unusual."""
        known = data.copy()
        lists = {key: known[key] for key in BULK if type(known.get(key)) is list}
        longest = max(map(len, lists.values()), default=0)
        if HEADER in known or longest < instant.MANY:
            return None
        before = {key: like.bulk.get(key) if like else None for key in lists}
        settled = {key: each.settled if isinstance(each, Lines) else Settled() for key, each in before.items()}
        is_kept = like is not None and longest >= instant.KEEP_FROM
        found = cls._encoded(data, known, lists, settled, is_kept=is_kept)
        if found is None and any(each.lines for each in settled.values()):
            found = cls._encoded(data, known, lists, dict.fromkeys(lists, Settled()), is_kept=is_kept)
        return found

    @classmethod
    def _encoded(
        cls,
        data: dict[str, Any],
        known: dict[str, Any],
        lists: Mapping[str, list[Any]],
        settled: Mapping[str, Settled],
        *,
        is_kept: bool,
    ) -> Body | None:
        encoded = {key: EncodedList(items, settled[key].seen, is_kept=is_kept) for key, items in lists.items()}
        single = {key: value for key, value in known.items() if key not in lists}
        values = instant.encode(data, known, list(single.values()), list(encoded.values()))
        if values is None:
            return None
        lines = {key: Lines.encoded(each, settled[key], is_kept=is_kept) for key, each in encoded.items()}
        return cls._of_parts(known, dict(zip(single, values, strict=True)), lines)

    @classmethod
    def _of_copy(cls, data: dict[str, Any]) -> Body:
        """Encode data that nobody else has, one value after the other."""
        if HEADER in data:
            raise ReservedField(field=HEADER, remedy="Choose another name for the field.")
        lists = {key: Lines.of(_encoded_items(key, data[key])) for key in BULK if type(data.get(key)) is list}
        values = {key: codec.encode(value, (key,)) for key, value in data.items() if key not in lists}
        return cls._of_parts(data, values, lists)

    @classmethod
    def _of_parts(cls, keys: Iterable[str], values: Mapping[str, bytes], lists: Mapping[str, Lines]) -> Body:
        small = b",\n".join([_line(key, values[key]) for key in keys if key not in BULK])
        return cls(
            small, {key: lists[key] if key in lists else values[key] for key in BULK if key in lists or key in values}
        )

    @classmethod
    def in_document(
        cls,
        content: bytes,
        start: int,
        end: int,
        counts: Mapping[str, int],
        source: tuple[str, Path],
        decoded: list[dict[str, Any]],
    ) -> Body:
        """That of a document whose head stands from `start` to `end`, and its bulk behind that. The bulk is not copied.

        Raises `ValueError` if head and bulk are not parted as a body's.
        """
        head, bulk = content[start:end], _bulk_in(content, end, counts)
        body = cls(head.removesuffix(b"\n").removesuffix(b","), bulk, source, decoded)
        if body.head != head:
            raise ValueError("head")
        return body

    @property
    def head(self) -> bytes:
        """The small fields, as they stand in a document."""
        return self.small and self.small + (b",\n" if self.bulk else b"\n")

    def bulk_in_document(self) -> list[bytes | memoryview]:
        """The bulk, as it stands in a document, in pieces."""
        pieces: list[bytes | memoryview] = []
        for name, value in self.bulk.items():
            pieces.append(b'%b"%b":' % (b",\n" if pieces else b"", name.encode()))
            pieces += value.in_document() if isinstance(value, Lines) else [value]
        return [*pieces, b"\n}\n" if pieces else b"}\n"]

    @property
    def counts(self) -> dict[str, int]:
        """How many items each list has."""
        return {name: value.count for name, value in self.bulk.items() if isinstance(value, Lines)}

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes in a document."""
        values = [value.size_bytes if isinstance(value, Lines) else len(value) for value in self.bulk.values()]
        names = sum(len(b',\n"":') + len(name) for name in self.bulk)
        return len(self.head) + sum(values) + names + (len(b"\n}\n") - len(b",\n") if self.bulk else len(b"}\n"))

    @property
    def is_empty(self) -> bool:
        return not self.small and not self.bulk

    def data(self) -> dict[str, Any]:
        """A fresh copy of the data."""
        try:
            bulk = self.decoded.pop()
        except IndexError:
            bulk = {
                name: self._decode(value.json() if isinstance(value, Lines) else value)
                for name, value in self.bulk.items()
            }
        if any(type(bulk[name]) is not list or len(bulk[name]) != count for name, count in self.counts.items()):
            raise self._mislabelled()
        return self.fields() | bulk

    def check_lines(self) -> None:
        """Raise `CorruptSession` unless its lists have one item a line: it may be that somebody sealed something else."""
        if not all(value.is_counted for value in self.bulk.values() if isinstance(value, Lines)):
            raise self._mislabelled()

    def fields(self) -> dict[str, Any]:
        """A fresh copy of the small fields."""
        fields = self._decode(b"{" + self.small + b"}")
        if type(fields) is dict and fields.keys().isdisjoint(BULK):
            return fields
        raise self._mislabelled()

    def _decode(self, encoded: bytes) -> Any:
        """Its checksum vouches for it, so this fails only on what somebody has sealed on purpose."""
        try:
            return codec.decode(encoded)
        except (ValueError, RecursionError):
            raise self._mislabelled() from None

    def _mislabelled(self) -> CorruptSession:
        session_id, path = self.source or ("", Path())
        reason = "its checksum matches, but it is no JSON object, or is not parted as its header says."
        return CorruptSession(session_id=session_id, path=path, reason=reason)


def _bulk_in(content: bytes, start: int, counts: Mapping[str, int]) -> dict[str, Lines | bytes]:
    """The bulk of a document, which begins there. A list that is not empty has one item a line."""
    found: dict[str, Lines | bytes] = {}
    end = len(content) - len(b"\n}\n")
    for name in reversed(BULK):
        mark = b'"%b":' % name.encode()
        place = start
        if not content.startswith(mark, place):
            # No line of a list begins like a field. The last field's is the last line, or it opens the last list.
            line = b"\n" + mark + b"[\n" if counts.get(name) else b"\n"
            place = content.rfind(line, start, max(end, start)) + 1
        if place and content.startswith(mark, place, max(end, place)):
            found[name] = _value_in(content, place + len(mark), end, counts.get(name))
            end = place - len(b",\n")
            if not content.startswith(b",\n", end):
                raise ValueError("comma")
    if counts.keys() != {name for name, value in found.items() if isinstance(value, Lines)}:
        raise ValueError("counts")
    if end != (start - len(b",\n") if found else start - 1) or not content.endswith(b"\n}\n"):
        raise ValueError("bulk")
    return {name: found[name] for name in BULK if name in found}


def _value_in(content: bytes, start: int, end: int, count: int | None) -> Lines | bytes:
    """One field of the bulk; a list if it has a count."""
    if not count:
        value = content[start:end]
        if (value != b"[]") if count == 0 else value.startswith(b"["):
            raise ValueError("count")
        return value if count is None else Lines(0)
    if not (content.startswith(b"[\n", start) and content.startswith(b"\n]", end - 2)):
        raise ValueError("list")
    return Lines.in_text(content, start + 2, end - 2, count)


def small_of(data: Mapping[str, Any]) -> bytes:
    """The small fields of a session's data, one a line."""
    return b",\n".join([_line(key, codec.encode(value, (key,))) for key, value in data.items() if key not in BULK])


def _encoded_items(key: str, items: list[Any]) -> list[bytes]:
    return [codec.encode(item, (key, index)) for index, item in enumerate(items)]


def _line(key: str, value: bytes) -> bytes:
    return codec.encode(key, (key,)) + b":" + value
