"""Changes: what a commit does to the bulk of a session, item by item; and how two bodies are compared without decoding them.

A body is canonical and has one item a line, so that lines can stand for items: equal lines are equal items. Positions count
items, and are those of the moment when the change is applied, after the changes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from persist import codec
from persist.files.body import BULK, PIECE_BYTES, Body
from persist.merge import align

_SEPARATOR = b",\n"
#: Where more than this differs between the first change and the last one, the lines between them are compared, too.
_ONE_SPLICE_BYTES = 16 * 1024


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change of one bulk field. Exactly one of these: items removed and inserted; an item marked; the field set or dropped.

    Attributes:
        field: its name.
        at: the position of the first item that is changed.
        remove: how many items go from there.
        insert: the items that come in their place, each as its JSON.
        mark: fields that are set in the item at `at`, as the JSON of an object.
        value: what the field is from now on, as its JSON.
        is_dropped: the field is no longer there.
    """

    field: str = msgspec.field(name="in")
    at: int = 0
    remove: int = 0
    insert: tuple[msgspec.Raw, ...] = ()
    mark: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    is_dropped: bool = msgspec.field(default=False, name="drop")

    @property
    def is_items(self) -> bool:
        """Whether it changes items of a list, and not the field as a whole."""
        return not self.is_dropped and isinstance(self.value, msgspec.UnsetType)

    def count_after(self, count: int) -> int:
        """How many items a list has after a change of its items; raises `DoesNotFit` if that cannot be."""
        if not 0 <= self.at <= self.at + self.remove <= count:
            raise DoesNotFit(self.field)
        return count + len(self.insert) - self.remove


def from_plain(values: dict[str, Any]) -> Change:
    """The change of its decoded JSON; raises `ValueError` or `TypeError` if it is none."""
    kept = {key: values[key] for key in ("in", "at", "remove", "drop") if key in values}
    raw: dict[str, Any] = {key: msgspec.Raw(codec.encode(values[key])) for key in ("mark", "value") if key in values}
    insert = tuple(msgspec.Raw(codec.encode(item)) for item in values.get("insert", ()))
    return msgspec.structs.replace(msgspec.convert(kept, Change), insert=insert, **raw)


def inserted(field: str, at: int, *items: bytes, remove: int = 0) -> Change:
    """Items put before the one at a position, in the place of some from there on."""
    return Change(field, at, remove, tuple(map(msgspec.Raw, items)))


def marked(field: str, at: int, fields: dict[str, Any]) -> Change:
    """Fields set in an item."""
    return Change(field, at, mark=msgspec.Raw(codec.encode(fields)))


# --- applying --------------------------------------------------------------------------------------------------------------


class DoesNotFit(ValueError):
    """A change names what is not there."""


class Bulk:
    """The bulk of a body, to be changed."""

    def __init__(self, body: Body) -> None:
        bulk = memoryview(body.text)
        self._fields: dict[str, _Lines | bytes] = {}
        for name, (start, end) in body.ranges().items():
            count = body.counts.get(name)
            # Between the brackets, each with its end of a line.
            self._fields[name] = bytes(bulk[start:end]) if count is None else _Lines(bulk[start + 2 : end - 2], count)

    def apply(self, change: Change) -> None:
        """Make a change; raise `DoesNotFit` if that cannot be."""
        if change.field not in BULK:
            raise DoesNotFit(change.field)
        if change.is_dropped:
            self._fields.pop(change.field, None)
        elif not isinstance(change.value, msgspec.UnsetType):
            value = bytes(change.value)
            self._fields[change.field] = _Lines.of(value) if value.startswith(b"[") else value
        else:
            lines = self._fields.setdefault(change.field, _Lines(memoryview(b""), 0))
            if isinstance(lines, bytes):
                raise DoesNotFit(change.field)
            lines.apply(change)

    @property
    def counts(self) -> dict[str, int]:
        """How many items each list has."""
        return {name: len(lines) for name, lines in self._fields.items() if isinstance(lines, _Lines)}

    def body(self, small: bytes) -> Body:
        """The whole, with these small fields."""
        pieces: dict[str, list[bytes | memoryview]] = {
            name: [lines] if isinstance(lines, bytes) else lines.pieces() for name, lines in self._fields.items()
        }
        return Body.assembled(small, pieces, self.counts)


def apply_to_data(data: dict[str, Any], change: Change) -> None:
    """Make in decoded data a change that a `Bulk` has taken."""
    if change.is_dropped:
        data.pop(change.field, None)
    elif not isinstance(change.value, msgspec.UnsetType):
        data[change.field] = codec.decode(bytes(change.value))
    elif not isinstance(change.mark, msgspec.UnsetType):
        data[change.field][change.at].update(codec.decode(bytes(change.mark)))
    else:
        items = data.setdefault(change.field, [])
        items[change.at : change.at + change.remove] = [codec.decode(bytes(item)) for item in change.insert]


class _Lines:
    """The items of a list. Nearly all changes are made at its end: what stands before that is left in one piece."""

    def __init__(self, front: memoryview, count: int) -> None:
        self._front = front
        self._count = count
        self._back: list[bytes] = []

    @classmethod
    def of(cls, value: bytes) -> _Lines:
        """A list whose JSON need not have one item a line."""
        lines = cls(memoryview(b""), 0)
        lines._back = [codec.encode(item) for item in codec.decode(value)]
        return lines

    def __len__(self) -> int:
        return self._count + len(self._back)

    def apply(self, change: Change) -> None:
        change.count_after(len(self))
        if change.at < self._count:
            self._back[:0] = bytes(self._front).split(_SEPARATOR)
            self._count = 0
        place = change.at - self._count
        if isinstance(change.mark, msgspec.UnsetType):
            self._back[place : place + change.remove] = map(bytes, change.insert)
        else:
            self._back[place : place + 1] = [_with_mark(self._back[place : place + 1], change.mark)]

    def pieces(self) -> list[bytes | memoryview]:
        """What its JSON consists of."""
        if not len(self):
            return [b"[]"]
        back = _SEPARATOR.join(self._back)
        if not self._count:
            return [b"[\n", back, b"\n]"]
        return [b"[\n", self._front, _SEPARATOR if back else b"", back, b"\n]"]


def _with_mark(found: list[bytes], mark: msgspec.Raw) -> bytes:
    item = codec.decode(found[0]) if found else None
    if type(item) is not dict:
        raise DoesNotFit("mark")
    return codec.encode(item | codec.decode(bytes(mark)))


def applied(body: Body, small: bytes, changes: Iterable[Change]) -> Body:
    """The body with other small fields, and its bulk changed."""
    bulk = Bulk(body)
    for change in changes:
        bulk.apply(change)
    return bulk.body(small)


# --- comparing -------------------------------------------------------------------------------------------------------------


def between(before: Body, after: Body) -> tuple[Change, ...]:
    """The changes that make one body's bulk the other's. Costs two passes of memcmp, and then what the change weighs."""
    if before.has_bulk_of(after):
        return ()
    old, new = before.ranges(), after.ranges()
    changes: list[Change] = []
    for name in BULK:
        if name in new and name in old and name in before.counts and name in after.counts:
            changes += _splices(name, _Items(before, name, *old[name]), _Items(after, name, *new[name]))
        elif name not in new:
            changes += [Change(name, is_dropped=True)] if name in old else []
        elif name not in old or before.text[slice(*old[name])] != after.text[slice(*new[name])]:
            value = after.text[slice(*new[name])]
            changes.append(Change(name, value=msgspec.Raw(value.replace(b"\n", b"") if name in after.counts else value)))
    return tuple(changes)


class _Items:
    """The items of a list, where they stand in a text. Positions count from the first one's beginning; nothing is copied."""

    def __init__(self, body: Body, name: str, start: int, end: int) -> None:
        self.count = body.counts[name]
        self._text = body.text
        self._start = start + 2 if self.count else start
        self.size = end - 2 - self._start if self.count else 0

    def text(self, start: int, end: int) -> bytes:
        return self._text[self._start + start : self._start + end]

    def has(self, text: bytes, at: int) -> bool:
        return at + len(text) <= self.size and self._text.startswith(text, self._start + at)

    def line_at(self, position: int) -> int:
        """Where the line begins that a position is in."""
        return max(self._text.rfind(b"\n", self._start, self._start + position) + 1 - self._start, 0)

    def line_from(self, position: int) -> int:
        """Where the first line begins at or behind a position."""
        if position == 0 or self._text.startswith(b"\n", self._start + position - 1):
            return position
        found = self._text.find(b"\n", self._start + position, self._start + self.size)
        return self.size if found < 0 else found + 1 - self._start

    def place(self, position: int) -> int:
        """How many items stand before a line."""
        if position >= self.size:
            return self.count
        if position < self.size // 2:
            return self._text.count(b"\n", self._start, self._start + position)
        return self.count - 1 - self._text.count(b"\n", self._start + position, self._start + self.size)

    def lines(self, start: int, end: int) -> list[bytes]:
        text = self.text(start, end).removesuffix(_SEPARATOR)
        return text.split(_SEPARATOR) if text else []


def _splices(field: str, old: _Items, new: _Items) -> Iterator[Change]:
    """From the last one to the first, so that the positions of those to come stay as they are."""
    start = _first_difference(old, new)
    end = _common_end(old, new, start)
    removed, added = old.lines(start, old.size - end), new.lines(start, new.size - end)
    first = old.place(start)
    if not removed and not added:
        return
    if sum(map(len, removed)) <= _ONE_SPLICE_BYTES or not added:
        yield inserted(field, first, *added, remove=len(removed))
        return
    i, j = len(removed), len(added)
    for p, q in [*reversed(align(removed, added)), (-1, -1)]:
        if i - p > 1 or j - q > 1:
            yield inserted(field, first + p + 1, *added[q + 1 : j], remove=i - p - 1)
        i, j = p, q


def _first_difference(old: _Items, new: _Items) -> int:
    """Where the first line begins that is not the same; behind the separator, if one list is the beginning of the other."""
    same = _same_bytes(min(old.size, new.size), lambda at, size: new.has(old.text(at, at + size), at))
    for one, other in ((old, new), (new, old)):
        if same == one.size and (other.has(_SEPARATOR, same) or same == other.size or not same):
            return same + len(_SEPARATOR) if 0 < same < other.size else same
    return old.line_at(same)


def _common_end(old: _Items, new: _Items, start: int) -> int:
    """How many bytes behind `start` are the same at the end, in whole lines of both."""
    rest = min(old.size, new.size) - start
    if rest <= 0:
        return 0

    def has(at: int, size: int) -> bool:
        return new.has(old.text(old.size - at - size, old.size - at), new.size - at - size)

    same = _same_bytes(rest, has)
    return max(min(items.size - items.line_from(items.size - same) for items in (old, new)), 0)


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
