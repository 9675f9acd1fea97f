"""The items of a list as they stand in a document: one a line, with a comma at the end of each line but the last.

A body is canonical, so that lines can stand for items: equal lines are equal items. They are kept as they came, from a file or
from the encoder, and joined only where a text is needed: fresh memory for megabytes costs more than to encode or compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from persist.instant import EncodedList, Seen

#: What ends a line of a document; of a text that is compared, the last one, too.
SEPARATOR = b",\n"
#: About so much of a document is copied or compared at a time.
PIECE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Settled:
    """All but the last of a list's items, as objects, and their lines: those need not be encoded again."""

    seen: Seen = field(default_factory=Seen)
    lines: Sequence[bytes] = ()


class Lines:
    """The items of a list: those that stand in `text`, a document, from `start` to `end`; then those of `more`.

    The pieces of `more` are whole lines as the encoder gives them: without commas, each with a newline.
    """

    __slots__ = ("_end", "_front", "_more", "_start", "_text", "count", "settled")

    def __init__(
        self,
        count: int,
        more: Sequence[bytes] = (),
        *,
        text: bytes = b"",
        start: int = 0,
        end: int = 0,
        front: int = 0,
        settled: Settled | None = None,
    ) -> None:
        self.count = count
        self.settled = settled or Settled()
        self._text = text
        self._start = start
        self._end = end
        #: How many of them stand in the document.
        self._front = front
        self._more = more

    @classmethod
    def of(cls, items: list[bytes]) -> Lines:
        """Those of items of which each is given as its JSON."""
        return cls(len(items), [b"\n".join([*items, b""])] if items else ())

    @classmethod
    def in_text(cls, text: bytes, start: int, end: int, count: int) -> Lines:
        """Those that stand in a document, from the first one's beginning to the last one's end."""
        return cls(count, text=text, start=start, end=end, front=count)

    @classmethod
    def encoded(cls, items: EncodedList, before: Settled, *, is_kept: bool) -> Lines:
        """Those of a list that begins with what was settled before. `is_kept`: the objects are kept, for the next time."""
        lines, new = [*before.lines], b"".join(items.pieces[:1])
        if lines and new and len(lines[-1]) + len(new) < PIECE_BYTES:
            lines[-1] += new
            new = b""
        settled = [*lines, *filter(None, [new]), *items.pieces[1:]]
        return cls(
            items.count, [*settled, *items.rest_pieces], settled=Settled(items.seen, settled) if is_kept else None
        )

    def with_more(self, items: list[bytes]) -> Lines:
        """These, and behind them some more items."""
        more = [*self._more, *Lines.of(items)._more]
        return Lines(
            self.count + len(items), more, text=self._text, start=self._start, end=self._end, front=self._front
        )

    def items(self) -> list[bytes]:
        """The JSON of each item."""
        return self._behind(self._start).split(SEPARATOR)[:-1]

    def in_document(self) -> list[bytes | memoryview]:
        """The JSON of the list, in pieces."""
        if not self.count:
            return [b"[]"]
        found: list[bytes | memoryview] = [b"[\n"]
        if self._front:
            found += [memoryview(self._text)[self._start : self._end], SEPARATOR if self._more else b"\n"]
        found += map(_with_commas, self._more[:-1])
        if self._more:
            found.append(self._more[-1][:-1].replace(b"\n", SEPARATOR) + b"\n")
        return [*found, b"]"]

    def json(self) -> bytes:
        """The JSON of the list, as it stands in a document."""
        return b"".join(self.in_document())

    @property
    def is_counted(self) -> bool:
        """Whether so many of them stand in the document as it says."""
        return self._front == 0 or self._text.count(b"\n", self._start, self._end) == self._front - 1

    @property
    def size_bytes(self) -> int:
        """How many bytes its JSON takes in a document."""
        if not self.count:
            return len(b"[]")
        front = self._end - self._start + len(SEPARATOR) if self._front else 0
        more = sum(map(len, self._more)) + self.count - self._front
        return len(b"[\n]") + front + more - len(b",")

    def pieces(self) -> Iterator[bytes]:
        """Whole lines, as a document has them, some at a time."""
        at = self._start
        while at < self._end:
            stop = self._text.find(b"\n", min(at + PIECE_BYTES, self._end), self._end) + 1
            yield self._text[at:stop] if stop else self._text[at : self._end] + SEPARATOR
            at = stop or self._end
        yield from map(_with_commas, self._more)

    def _behind(self, place: int) -> bytes:
        """All lines from a place in the document on."""
        front = [self._text[place : self._end], SEPARATOR] if place < self._end else []
        return b"".join([*front, *map(_with_commas, self._more)])

    def rests(self, other: Lines) -> tuple[bytes, bytes]:
        """The lines of both without those that both begin with; some of these may still be there."""
        if not self._front and not other._front:
            both = enumerate(zip(self._more, other._more, strict=False))
            lead = next((place for place, (mine, its) in both if mine != its), min(len(self._more), len(other._more)))
            return _with_commas(b"".join(self._more[lead:])), _with_commas(b"".join(other._more[lead:]))
        if not self._front:
            its, mine = other.rests(self)
            return mine, its
        place, pieces = self._start, other.pieces()
        for piece in pieces:
            if not self._text.startswith(piece, place, self._end):
                return self._behind(place), b"".join([piece, *pieces])
            place += len(piece)
        return self._behind(place), b""

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Lines) or self.count != other.count:
            return False
        mine, its = self.rests(other)
        return mine == its

    __hash__ = None  # type: ignore[assignment]


def _with_commas(piece: bytes) -> bytes:
    return piece.replace(b"\n", SEPARATOR)


def differing(old: bytes, new: bytes) -> tuple[int, list[bytes], list[bytes]]:
    """How many lines come before the first that is not the same in two texts; and from there to the last, the items of both."""
    start = _common_start(old, new)
    tail = _common_end(old, new, start)
    removed, added = (text[start : len(text) - tail].split(SEPARATOR)[:-1] for text in (old, new))
    return old.count(b"\n", 0, start), removed, added


def _common_start(old: bytes, new: bytes) -> int:
    """How many bytes are the same at the beginning, in whole lines."""
    same = _same_bytes(min(len(old), len(new)), lambda at, size: new.startswith(old[at : at + size], at))
    return old.rfind(b"\n", 0, same) + 1


def _common_end(old: bytes, new: bytes, start: int) -> int:
    """How many bytes behind `start` are the same at the end, in whole lines of both."""

    def has(at: int, size: int) -> bool:
        return new.startswith(old[len(old) - at - size : len(old) - at], len(new) - at - size)

    same = _same_bytes(min(len(old), len(new)) - start, has)
    return min(len(text) - _line_from(text, len(text) - same) for text in (old, new))


def _line_from(text: bytes, place: int) -> int:
    """Where the first line begins at or behind a place."""
    return text.find(b"\n", place - 1) + 1 if place else 0


def _same_bytes(limit: int, has: Callable[[int, int], bool]) -> int:
    """How many bytes are the same: looked for piece by piece, and in the first piece that is not, by halves."""
    at = 0
    while at < limit and has(at, min(PIECE_BYTES, limit - at)):
        at += min(PIECE_BYTES, limit - at)
    size = min(PIECE_BYTES, limit - at)
    while size:
        size //= 2
        while size and at + size <= limit and has(at, size):
            at += size
    return at
