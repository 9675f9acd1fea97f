"""Changes: what a commit does to the bulk of a session, item by item; and how two bodies are compared without decoding them.

A body is canonical and has one item a line, so that lines can stand for items: equal lines are equal items. Positions count
items, and are those of the moment when the change is applied, after the changes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from persist import codec
from persist.storage.body import BULK, Body
from persist.storage.lines import Lines, differing
from persist.merge import align, same

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
        self._fields = {name: _Items(value) if isinstance(value, Lines) else value for name, value in body.bulk.items()}

    def apply(self, change: Change) -> None:
        """Make a change; raise `DoesNotFit` if that cannot be."""
        if change.field not in BULK:
            raise DoesNotFit(change.field)
        if change.is_dropped:
            self._fields.pop(change.field, None)
        elif not isinstance(change.value, msgspec.UnsetType):
            value = bytes(change.value)
            self._fields[change.field] = _Items.of(value) if value.startswith(b"[") else value
        else:
            items = self._fields.setdefault(change.field, _Items(Lines(0)))
            if isinstance(items, bytes):
                raise DoesNotFit(change.field)
            items.apply(change)

    @property
    def counts(self) -> dict[str, int]:
        """How many items each list has."""
        return {name: len(items) for name, items in self._fields.items() if isinstance(items, _Items)}

    def body(self, small: bytes) -> Body:
        """The whole, with these small fields."""
        found = {name: value.lines() if isinstance(value, _Items) else value for name, value in self._fields.items()}
        return Body(small, {name: found[name] for name in BULK if name in found})


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


class _Items:
    """The items of a list. Nearly all changes are made at its end: what stands before that is left as it is."""

    def __init__(self, front: Lines) -> None:
        self._front = front
        self._back: list[bytes] = []

    @classmethod
    def of(cls, value: bytes) -> _Items:
        """A list whose JSON need not have one item a line."""
        items = cls(Lines(0))
        items._back = [codec.encode(item) for item in codec.decode(value)]
        return items

    def __len__(self) -> int:
        return self._front.count + len(self._back)

    def apply(self, change: Change) -> None:
        """Make a change of items; raise `DoesNotFit` if that cannot be."""
        change.count_after(len(self))
        if change.at < self._front.count:
            self._back[:0] = self._front.items()
            self._front = Lines(0)
        place = change.at - self._front.count
        if isinstance(change.mark, msgspec.UnsetType):
            self._back[place : place + change.remove] = map(bytes, change.insert)
        else:
            self._back[place : place + 1] = [_with_mark(self._back[place : place + 1], change.mark)]

    def lines(self) -> Lines:
        return self._front.with_more(self._back)


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
    """The changes that make one body's bulk the other's. Costs about a pass of memcmp, and then what the change weighs."""
    before.check_lines()
    after.check_lines()
    changes: list[Change] = []
    for name in BULK:
        old, new = before.bulk.get(name), after.bulk.get(name)
        if isinstance(old, Lines) and isinstance(new, Lines):
            changes += _splices(name, old, new)
        elif new is None:
            changes += [Change(name, is_dropped=True)] if old is not None else []
        elif old != new:
            value = new.json().replace(b"\n", b"") if isinstance(new, Lines) else new
            changes.append(Change(name, value=msgspec.Raw(value)))
    return tuple(changes)


def _splices(field: str, old: Lines, new: Lines) -> Iterator[Change]:
    """From the last one to the first, so that the positions of those to come stay as they are."""
    before, after = old.rests(new)
    lead, removed, added = differing(before, after)
    if not removed and not added:
        return
    first = old.count - before.count(b"\n") + lead
    if sum(map(len, removed)) <= _ONE_SPLICE_BYTES or not added:
        yield inserted(field, first, *added, remove=len(removed))
        return
    i, j = len(removed), len(added)
    for p, q in [*reversed(align(removed, added)), (-1, -1)]:
        if i - p > 1 or j - q > 1:
            yield inserted(field, first + p + 1, *added[q + 1 : j], remove=i - p - 1)
        i, j = p, q


def data_of(body: Body, *others: Body) -> list[dict[str, Any]]:
    """The data of several bodies, for those who compare and do not change it: what is the same in them are the same objects."""
    data = body.data()
    return [data, *(_data_like(body, data, other) for other in others)]


def _data_like(body: Body, data: dict[str, Any], other: Body) -> dict[str, Any]:
    bulk = {name: [*value] if type(value) is list else value for name, value in data.items() if name in BULK}
    for each in between(body, other):
        apply_to_data(bulk, each)
    fields = (
        other.fields()
        if other.small != body.small
        else {name: value for name, value in data.items() if name not in BULK}
    )
    return fields | {name: bulk[name] for name in BULK if name in bulk}


def have_same_data(one: Body, other: Body) -> bool:
    """Whether two bodies have the same data: the keys of its objects may stand in another order."""
    if one == other:
        return True
    if (
        one.size_bytes != other.size_bytes
        or one.bulk.keys() != other.bulk.keys()
        or not same(one.fields(), other.fields())
    ):
        return False
    return all(_have_same_items(value, other.bulk[name]) for name, value in one.bulk.items())


def _have_same_items(one: Lines | bytes, other: Lines | bytes) -> bool:
    if isinstance(one, bytes) or isinstance(other, bytes):
        return isinstance(one, bytes) and isinstance(other, bytes) and same(codec.decode(one), codec.decode(other))
    _, removed, added = differing(*one.rests(other))
    return len(removed) == len(added) and all(map(same, map(codec.decode, removed), map(codec.decode, added)))
