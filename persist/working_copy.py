"""The working copy: a document while a verb changes it, under the session's lock.

    with files.transaction("s-42") as tx:
        copy = WorkingCopy(tx.read(), tx)
        copy.list("messages").append(message)
        copy.commit(copy.header.next())

The working copy decodes only the values that it is asked for, and it records the changes. So the cost of a verb depends
only on the values that it touches. A dict or list that a caller got from the copy is encoded again at the commit. So
changes in place are committed, too. Each value is one object, whichever way it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from itertools import chain
from typing import Any, Self

import msgspec

from persist import json_codec
from persist.arguments import require_key
from persist.engine import Committed, End, Transaction
from persist.errors import InvalidArgument, reserved
from persist.storage import diff
from persist.storage.content import (
    ALWAYS_APART,
    HEADER,
    Content,
    Items,
    Value,
    as_before,
    as_id,
    decode,
    empty,
    encode_values,
    placed,
    too_large,
)
from persist.storage.document import Header, first_header

_ALWAYS_APART = frozenset(ALWAYS_APART)

#: A content, and the changes that lead to it from the committed one, in the values that stand apart.
Changed = tuple[Content, tuple[diff.Change, ...]]


class WorkingCopy:
    """A session under its lock, to be changed and committed.

    Args:
        found: the committed session.
        tx: the transaction that found it, or None for a copy that is not committed.
        is_new: nothing is committed yet, and `found` is the session's first state.

    Attributes:
        header: the header of the committed revision.
    """

    def __init__(self, found: Committed, tx: Transaction | None = None, *, is_new: bool = False) -> None:
        self.header = found.header
        self._is_new = is_new
        self._tx = tx
        self._content = found.content
        # The names of the values that may differ from the committed ones. Such a value is a list to be changed, or a
        # plain value, or it is gone. A plain value was handed out or set, and may have been changed in place since.
        self._taken: set[str] = set()
        self._lists: dict[str, WorkingList] = {}
        self._values: dict[str, Any] = {}

    @classmethod
    def of(cls, tx: Transaction, *, create: bool = False) -> Self:
        """Return a copy of the committed session. With `create`, also of a session that is about to be created.

        Raises: as `Transaction.read`.
        """
        if create and not tx.exists():
            return cls(Committed(first_header(), empty()), tx, is_new=True)
        return cls(tx.read(), tx)

    @property
    def committed(self) -> Content:
        """The content that is committed."""
        return self._content

    @property
    def version(self) -> str | None:
        """The version that is committed, or None for a session that is about to be created."""
        return None if self._is_new else self.header.version

    def next_header(self, *, touch: bool = True, **changes: Any) -> Header:
        """Return the header of the commit that comes next."""
        return self.header.but(**changes) if self._is_new else self.header.next(touch=touch, **changes)

    @property
    def fields(self) -> Fields:
        """The top-level values except ``messages`` and ``tool_calls``, as a mapping to be changed."""
        return Fields(self)

    def _untouched(self, name: str) -> Value | None:
        """Return a value that is as it was committed, or None for any other value."""
        return None if name in self._taken else self._content.get(name)

    def set_fields(self, values: Mapping[str, Any]) -> None:
        """Set fields whose values were not handed to a caller."""
        for name, value in values.items():
            self._taken.add(name)
            self._lists.pop(name, None)
            self._values[name] = value

    def require_open(self) -> None:
        """Raise `LockError` after the block, because a change would then be lost without a word."""
        if self._tx is not None:
            self._tx.require_lock()

    @property
    def data(self) -> dict[str, Any]:
        """The whole document as a plain dict, as it is by now. From its first use on, the commit takes this dict."""
        for name in self.names():
            self._plain(name)
        return self._values

    def list(self, name: str) -> WorkingList:
        """Return a top-level list, to be changed in place. The first item creates a missing list.

        Raises:
            InvalidArgument: the value is no list.
        """
        name = name if name.isascii() else json_codec.joined(name)
        found = self._lists.get(name)
        if found is not None and name not in self._values:
            return found
        if name == HEADER:
            raise reserved(HEADER, "Choose another name for the field.")
        base = None if name in self._taken else self._content.apart.get(name)
        if base is None and not self._has(name):
            base = Items([])
        if isinstance(base, Items):
            found = WorkingList(name, base, tx=self._tx, values=self._values)
        else:
            whole = self._plain(name)
            if type(whole) is not list:
                what = f"field {name!r} of the document"
                raise InvalidArgument(what=what, expected="a list", got=type(whole).__name__)
            return WorkingList(name, Items([]), whole, tx=self._tx, values=self._values)
        self._taken.add(name)
        self._lists[name] = found
        return found

    def has_list(self, name: str) -> bool:
        """Tell whether a top-level value is committed as a list, or missing."""
        value = self._content.get(name)
        return value is None or isinstance(value, Items) or value[:1] == b"["

    def has_handed_out(self, value: object) -> bool:
        """Tell whether a caller got this very object from this copy, by itself or within another one."""
        pending = [self._values, *(items.tail for items in self._lists.values())]
        while pending:
            each = pending.pop()
            if each is value:
                return True
            children = each.values() if type(each) is dict else each if type(each) is list else ()
            pending += [child for child in children if type(child) in (dict, list)]
        return False

    def _handed_out(self, name: str) -> WorkingList | None:
        """Return the list that was handed out under a name, unless the block has put another value there since."""
        if name in self._values:
            self._lists.pop(name, None)
        return self._lists.get(name)

    def _has(self, name: str) -> bool:
        if name in self._values:
            return True
        items = self._handed_out(name)
        if items is not None:
            return len(items) > 0 or items.base is self._content.get(name)
        return self._untouched(name) is not None

    def names(self) -> tuple[str, ...]:
        """Return the names of the top-level values."""
        names = dict.fromkeys((*dict(self._content), *self._values, *self._lists))
        return tuple(filter(self._has, names))

    def _plain(self, name: str) -> Any:
        """Hand out a value as a plain Python value."""
        if (value := self._untouched(name)) is not None:
            self._taken.add(name)
            self._values[name] = decode(value)
        elif self._handed_out(name) is not None:
            self._values[name] = self._lists.pop(name).whole()
        return self._values[name]

    def changed(self) -> Changed | None:
        """Return the content as it is now, and its changes in the values that stand apart.

        None if nothing was changed.

        Raises: as `encoded`, for a value that cannot be kept.
        """
        before, now, made = self._content, dict[str, Value](), dict[str, tuple[diff.Change, ...]]()
        for name, items in self._lists.items():
            if name not in self._values:
                changes, changed = items.changes()
                if items.base is before.apart.get(name):
                    made[name] = changes
                if changes or (name not in made and self._has(name)):
                    now[name] = changed
        if not self._values and self._taken == made.keys() and now.keys() <= _ALWAYS_APART:
            # No value can have moved between the fields and the values that stand apart.
            if not now:
                return None
            after = Content(before.fields, {**before.apart, **now})
            if after.size_bytes > json_codec.MAX_BYTES:
                raise too_large()
            return after, tuple(chain.from_iterable(made.values()))
        now |= encode_values(self._values, before)
        # The keys keep their order.
        values = {**before.fields, **before.apart}
        for name in self._taken:
            if name not in now and not self._has(name):
                values.pop(name, None)
        after = placed((values | now).items())
        all_changes = diff.between(before, after, made)
        return None if not all_changes and after.fields == before.fields else (after, all_changes)

    @property
    def content(self) -> Content:
        """The content as it is now."""
        changed = self.changed()
        return self._content if changed is None else changed[0]

    def commit(self, header: Header, changed: Changed | None = None, end: End | None = None) -> Committed:
        """Commit the content as it is now under the `next_header`, even if nothing was changed in it.

        `changed` is the result of the method `changed`, if the caller has it already. `end` is a stream that ends.
        """
        assert self._tx is not None
        content, changes = changed or self.changed() or (self._content, ())
        return self._tx.commit(header, content, changes, end)

    def commit_changes(self, changed: Changed | None, *, touch: bool = True) -> Committed:
        """Commit the result of the method `changed`. If that is None, make the state that was read durable."""
        assert self._tx is not None
        if self._is_new:
            return self.commit(self.header, changed)
        if changed is None:
            return self._tx.confirm()
        return self._tx.commit(self.header.next(touch=touch), *changed)


class Fields(MutableMapping[str, Any]):
    """The top-level values of a working copy, without ``messages`` and ``tool_calls``. Each is decoded on demand."""

    def __init__(self, copy: WorkingCopy) -> None:
        self._copy = copy

    def __contains__(self, name: object) -> bool:
        if type(name) is not str or name in ALWAYS_APART:
            return False
        return self._copy._has(name if name.isascii() else json_codec.joined(name))

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self._copy._plain(name if name.isascii() else json_codec.joined(name))

    def __setitem__(self, name: str, value: Any) -> None:
        if name == HEADER or name in ALWAYS_APART:
            remedy = "Choose another name for the field." if name == HEADER else f"Use list({name!r})."
            raise reserved(name, remedy)
        self._copy.require_open()
        # A name that is no string is refused later, together with the value.
        name = json_codec.joined(name) if type(name) is str and not name.isascii() else name
        self._copy._taken.add(name)
        handed_out = self._copy._lists.pop(name, None)
        if handed_out is not None:
            # The old list, which the block may still hold, becomes the new value. If that is no list, the old list
            # takes no further change.
            handed_out.become(value if type(value) is list else [])
        self._copy._values[name] = value

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._copy.require_open()
        name = json_codec.joined(name)
        handed_out = self._copy._lists.pop(name, None)
        if handed_out is not None:
            handed_out.become([])
        self._copy._values.pop(name, None)
        self._copy._taken.add(name)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __iter__(self) -> Iterator[str]:
        yield from [name for name in self._copy.names() if name not in ALWAYS_APART]

    def __len__(self) -> int:
        return sum(1 for _ in self)


class WorkingList(MutableSequence[Any]):
    """A list of a session while a block changes it: a `MutableSequence`, with `find`.

    It reads only the items that it is asked for. Such an item is written with the commit, if it was changed.
    """

    # The list keeps the first items of the committed list, and behind them a tail of its own. An entry of the tail is
    # an item's JSON as long as nobody has asked for it. After that it is a Python value. The tail may be a plain list
    # of the caller's.

    def __init__(
        self, name: str, base: Items, tail: list[Any] | None = None, *, tx: Transaction | None, values: dict[str, Any]
    ) -> None:
        self._name = name
        self._tx = tx
        self._values = values
        self.base = base
        self._kept = base.count
        self.tail: list[Any] = [] if tail is None else tail
        self._is_plain = tail is not None

    def whole(self) -> list[Any]:
        """Return all items as a plain list. From now on this working list changes that list in place."""
        self._in_tail(0)
        self.tail[:] = list(map(self._decoded, self.tail))
        self.base, self._is_plain = Items([]), True
        return self.tail

    def become(self, items: list[Any]) -> None:
        """Become a view of a plain list, which is changed in place."""
        self.base, self._kept, self.tail, self._is_plain = Items([]), 0, items, True

    def __repr__(self) -> str:
        return repr(self[:])

    def __len__(self) -> int:
        return self._kept + len(self.tail)

    def _at(self, place: int) -> int:
        """Return a place, counted from the beginning."""
        length = self._kept + len(self.tail)
        if type(place) is int and not -length <= place < length:
            raise IndexError(f"the list has {length} items")
        return range(length)[place]

    def _in_tail(self, place: int) -> int:
        """Return the place of an item in the tail. The tail grows to the front for that."""
        if place < self._kept:
            self.tail[:0] = self.base.last(self.base.count - place)[: self._kept - place]
            self._kept = place
        return place - self._kept

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        at = self._in_tail(self._at(place))
        self.tail[at] = self._decoded(self.tail[at])
        return self.tail[at]

    def __eq__(self, other: object) -> bool:
        return bool(self[:] == (other[:] if isinstance(other, WorkingList) else other))

    __hash__ = None  # type: ignore[assignment]

    def _decoded(self, item: Any) -> Any:
        """Return an entry of the tail as a Python value. In the caller's own list bytes are no JSON."""
        return json_codec.decode(item) if type(item) is bytes and not self._is_plain else item

    def peek(self, place: int) -> Any:
        """Return the item at a place, for reading only. The tail does not grow for that."""
        if place >= self._kept:
            return self._decoded(self.tail[place - self._kept])
        return json_codec.decode(self.base[place])

    def __setitem__(self, place: Any, item: Any) -> None:
        if isinstance(place, slice):
            start, _, step = place.indices(len(self))
            if step != 1:
                raise InvalidArgument(what="the slice that is set", expected="one without a step", got=f"one by {step}")
            items = list(item)
            del self[place]
            for at, each in enumerate(items, start):
                self.insert(at, each)
            return
        self._check(item, place)
        self.tail[self._in_tail(self._at(place))] = item

    def _check(self, item: Any, place: int) -> None:
        if self._tx is not None:
            self._tx.require_lock()
        if (self._is_plain or self._name in self._values) and self._values.get(self._name) is not self.tail:
            what, expected = f"this list of {self._name!r}", "the document's: ask the transaction for it anew"
            raise InvalidArgument(what=what, expected=expected, got="one that the block has replaced")
        # In the tail, bytes would pass for an item's JSON.
        if type(item) is bytes:
            json_codec.check(item, (self._name, place))

    def __delitem__(self, place: Any) -> None:
        places = range(len(self))[place] if isinstance(place, slice) else self._at(place)
        self._check(None, 0)
        for each in sorted([places] if isinstance(places, int) else places, reverse=True):
            del self.tail[self._in_tail(each)]

    def insert(self, place: int, item: Any) -> None:
        """Put an item before the one at a place."""
        place, _, _ = slice(place, None).indices(len(self))
        self._check(item, place)
        self.tail.insert(self._in_tail(place), item)

    def put_json(self, place: int | None, lines: list[bytes]) -> None:
        """Put encoded items before the one at a place, or at the end."""
        at = len(self.tail) if place is None else self._in_tail(place)
        self.tail[at:at] = map(json_codec.decode, lines) if self._is_plain else lines

    def find(self, value: str | int, key: str = "id") -> Any:
        """Return the last item whose `key` has this value, to be changed in place, or None. `1` and `"1"` differ."""
        place = self.place_of(value, key)
        return None if place is None else self[place]

    def place_of(self, value: object, key: str = "id") -> int | None:
        """Return the place of the last item whose `key` has this value, or None."""
        if key != "id":
            require_key(key, may_be_none=False)
        wanted = value if type(value) is str and value.isascii() else as_id(value)
        if wanted is None:
            return None
        for place in range(len(self.tail) - 1, -1, -1):
            if as_id(_value_of(self._decoded(self.tail[place]), key)) == wanted:
                return self._kept + place
        place_there = self.base.find(wanted, key)
        if place_there is None or place_there < self._kept:
            return place_there
        # The item that was found belongs to the tail by now, and was changed or removed there. An earlier item may have
        # the same id.
        return next(
            (
                at
                for at in range(self._kept - 1, -1, -1)
                if as_id(_value_of(json_codec.decode(self.base[at]), key)) == wanted
            ),
            None,
        )

    def changes(self) -> tuple[tuple[diff.Change, ...], Items]:
        """Return the changes that turn the committed list into this one, and the resulting list."""
        after: list[bytes] = []
        for place, item in enumerate(self.tail, self._kept):
            after.append(item if type(item) is bytes else json_codec.encode_exact(item, (self._name, place)))
        if self._kept == self.base.count:
            if not after:
                return (), self.base
            change = diff.Change(self._name, self._kept, 0, tuple(map(msgspec.Raw, after)))
            return (change,), self.base.spliced(self._kept, 0, after)
        before = self.base.last(self.base.count - self._kept)
        for at, (item, old) in enumerate(zip(self.tail, before, strict=False)):
            if type(item) is not bytes:
                after[at] = as_before(after[at], item, old)
        changes, items = tuple(diff.splices(self._name, before, after, self._kept)), self.base
        for each in changes:
            items = items.spliced(each.at, each.remove, list(map(bytes, each.insert)))
        return changes, items


def _value_of(item: Any, key: str) -> Any:
    return item.get(key) if type(item) is dict else None
