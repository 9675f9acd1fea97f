"""Changes: what a commit does to the bulk of a session, item by item; and how two bodies are compared without decoding them.

A body is canonical and has one item a line, so that lines can stand for items: equal lines are equal items. Positions count
items, and are those of the moment when the change is applied, after the changes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from persist import codec
from persist.files.snapshot import BULK, Body
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
        self._fields: dict[str, _Lines | bytes] = {}
        for name, value in body.parts().items():
            self._fields[name] = _Lines(value, body.counts[name]) if name in body.counts else value

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
            lines = self._fields.setdefault(change.field, _Lines(b"[]", 0))
            if isinstance(lines, bytes):
                raise DoesNotFit(change.field)
            lines.apply(change)

    @property
    def counts(self) -> dict[str, int]:
        """How many items each list has."""
        return {name: len(lines) for name, lines in self._fields.items() if isinstance(lines, _Lines)}

    def body(self, small: bytes) -> Body:
        """The whole, with these small fields."""
        values = {name: lines if isinstance(lines, bytes) else lines.value() for name, lines in self._fields.items()}
        return Body.assembled(small, values, self.counts)


class _Lines:
    """The items of a list. Nearly all changes are made at its end: what stands before that is left in one piece."""

    def __init__(self, value: bytes, count: int) -> None:
        self._front = value[2:-2] if count else b""
        self._count = count
        self._back: list[bytes] = []

    @classmethod
    def of(cls, value: bytes) -> _Lines:
        """A list whose JSON need not have one item a line."""
        lines = cls(b"[]", 0)
        lines._back = [codec.encode(item) for item in codec.decode(value)]
        return lines

    def __len__(self) -> int:
        return self._count + len(self._back)

    def apply(self, change: Change) -> None:
        if not 0 <= change.at <= change.at + change.remove <= len(self):
            raise DoesNotFit(change.field)
        if change.at < self._count:
            self._back[:0] = self._front.split(_SEPARATOR)
            self._front, self._count = b"", 0
        place = change.at - self._count
        if isinstance(change.mark, msgspec.UnsetType):
            self._back[place : place + change.remove] = map(bytes, change.insert)
        else:
            self._back[place : place + 1] = [_with_mark(self._back[place : place + 1], change.mark)]

    def value(self) -> bytes:
        lines = ([self._front] if self._count else []) + self._back
        return b"[\n" + _SEPARATOR.join(lines) + b"\n]" if lines else b"[]"


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
    """The changes that make one body's bulk the other's. Costs some passes of memcmp, and then what the change weighs."""
    if before.bulk == after.bulk:
        return ()
    old, new = before.parts(), after.parts()
    changes: list[Change] = []
    for name in BULK:
        if old.get(name) == new.get(name):
            continue
        if name not in new:
            changes.append(Change(name, is_dropped=True))
        elif name in before.counts and name in after.counts:
            changes += _splices(name, _Region(old[name], before.counts[name]), _Region(new[name], after.counts[name]))
        else:
            changes.append(Change(name, value=msgspec.Raw(_on_one_line(new[name], name in after.counts))))
    return tuple(changes)


def _on_one_line(value: bytes, is_list: bool) -> bytes:
    return value.replace(b"\n", b"") if is_list else value


class _Region:
    """The items of a list, each with a separator behind it."""

    def __init__(self, value: bytes, count: int) -> None:
        self.lines = value[2:-2] + _SEPARATOR if count else b""
        self.count = count

    def place(self, position: int) -> int:
        """How many items stand before a position. Counted from the nearer end."""
        if position > len(self.lines) // 2:
            return self.count - self.lines.count(b"\n", position)
        return self.lines.count(b"\n", 0, position)


def _splices(field: str, old: _Region, new: _Region) -> Iterator[Change]:
    """From the last one to the first, so that the positions of those to come stay as they are."""
    start = old.lines.rfind(b"\n", 0, _common(old.lines, new.lines)) + 1
    end = _common_end(old.lines[start:], new.lines[start:])
    removed, added = (_split(region.lines[start : len(region.lines) - end]) for region in (old, new))
    first = old.place(start)
    if sum(map(len, removed)) <= _ONE_SPLICE_BYTES or not added:
        yield inserted(field, first, *added, remove=len(removed))
        return
    i, j = len(removed), len(added)
    for p, q in [*reversed(align(removed, added)), (-1, -1)]:
        if i - p > 1 or j - q > 1:
            yield inserted(field, first + p + 1, *added[q + 1 : j], remove=i - p - 1)
        i, j = p, q


def _split(lines: bytes) -> list[bytes]:
    return lines.removesuffix(_SEPARATOR).split(_SEPARATOR) if lines else []


def _common(one: bytes, other: bytes) -> int:
    """How many bytes two strings begin alike."""
    return _longest(min(len(one), len(other)), lambda low, high: one[low:high] == other[low:high])


def _common_end(one: bytes, other: bytes) -> int:
    """How many bytes two strings end alike, in whole lines of both."""

    def same(low: int, high: int) -> bool:
        return one[len(one) - high : len(one) - low] == other[len(other) - high : len(other) - low]

    size = _longest(min(len(one), len(other)), same)
    if all(size == len(lines) or lines[len(lines) - size - 1 : len(lines) - size] == b"\n" for lines in (one, other)):
        return size
    # The line in which they begin to differ is not the same.
    return len(one) - 1 - one.find(b"\n", len(one) - size) if size else 0


def _longest(limit: int, same: Callable[[int, int], bool]) -> int:
    """The largest number up to which all is the same: bisected, so that each byte is compared about twice, by memcmp."""
    if same(0, limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same(low, middle) else (low, middle)
    return low
