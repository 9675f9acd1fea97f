"""Changes that a commit makes to the values that stand apart, and the comparison of contents without decoding them.

Positions count items. A position holds for the moment when its change is applied, after the changes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from persist.merge import align
from persist.storage.content import Content, Items, Value, as_json, items_of, window

#: If more bytes than this were removed, the items between the first and the last difference are compared, too.
_ONE_SPLICE_BYTES = 16 * 1024


class Change(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One change of one value that stands apart: it replaces items, or sets the value, or takes the value away.

    Attributes:
        name: the value's name.
        at: the place of the first item that is changed.
        remove: how many items go from there.
        insert: the items that come in their place, each as its JSON.
        value: the new value as a whole, as its JSON.
        is_gone: the value no longer stands apart.
    """

    name: str = msgspec.field(name="in")
    at: int = 0
    remove: int = 0
    insert: tuple[msgspec.Raw, ...] = ()
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    is_gone: bool = msgspec.field(default=False, name="gone")

    @property
    def is_splice(self) -> bool:
        """Whether it replaces items of a list, and not the value as a whole."""
        return not self.is_gone and isinstance(self.value, msgspec.UnsetType)


class DoesNotFit(ValueError):
    """A change names a list or items that are not there."""


def splice(name: str, at: int, remove: int, insert: Iterable[bytes]) -> Change:
    """Return the change that replaces items of a list."""
    return Change(name, at, remove, tuple(map(msgspec.Raw, insert)))


def apply(apart: dict[str, Value], change: Change) -> None:
    """Apply a change to the values that stand apart. Raise `DoesNotFit` if it does not fit them."""
    if change.is_gone:
        apart.pop(change.name, None)
    elif not isinstance(change.value, msgspec.UnsetType):
        apart[change.name] = items_of(bytes(change.value))
    else:
        items = apart.get(change.name)
        if not isinstance(items, Items):
            raise DoesNotFit(change.name)
        try:
            apart[change.name] = items.spliced(change.at, change.remove, list(map(bytes, change.insert)))
        except ValueError:
            raise DoesNotFit(change.name) from None


def between(
    before: Content, after: Content, known: Mapping[str, tuple[Change, ...]] = MappingProxyType({})
) -> tuple[Change, ...]:
    """Return the changes that turn the values that stand apart in one content into those of the other.

    `known` holds the changes of some lists, by name. Those lists are not compared.
    """
    changes: list[Change] = [Change(name, is_gone=True) for name in before.apart if name not in after.apart]
    for name, new in after.apart.items():
        old = before.apart.get(name)
        if old is new:
            continue
        if name in known:
            changes += known[name]
        elif isinstance(old, Items) and isinstance(new, Items):
            shared, before_items, after_items = old.behind_common_text(new)
            changes += splices(name, before_items, after_items, shared)
        elif old != new:
            changes.append(whole(name, new))
    return tuple(changes)


def splices(name: str, before: list[bytes], after: list[bytes], offset: int = 0) -> Iterator[Change]:
    """Yield the splices that turn one list into the other. The last one comes first, so that no place moves.

    Args:
        offset: the place in the whole list where both `before` and `after` begin.
    """
    first, removed, added = window(before, after)
    first += offset
    if not removed and not added:
        return
    if sum(map(len, removed)) <= _ONE_SPLICE_BYTES or not added:
        yield splice(name, first, len(removed), added)
        return
    i, j = len(removed), len(added)
    for p, q in [*reversed(align(removed, added)), (-1, -1)]:
        if i - p > 1 or j - q > 1:
            yield splice(name, first + p + 1, i - p - 1, added[q + 1 : j])
        i, j = p, q


def whole(name: str, value: Value) -> Change:
    """Return the change that sets a value."""
    return Change(name, value=msgspec.Raw(as_json(value)))
