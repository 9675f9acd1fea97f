"""The working copy: a document while a verb changes it, under the session's lock.

    with files.transaction("s-42") as tx:
        copy = WorkingCopy(tx.read(), tx)
        copy.list("messages").append(message)
        copy.commit(copy.header.next())

It decodes what it is asked for, and it records what was changed. So a verb costs what it touches. What it handed out is
what it commits: a dict or list that a caller got from it is encoded again at the commit. Each value is one object,
whichever way it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any, overload

from persist import json_codec
from persist.errors import ReservedField, WrongType
from persist.storage import diff
from persist.storage.cache import Replica
from persist.storage.content import (
    ALWAYS_APART,
    HEADER,
    Content,
    Items,
    Value,
    as_before,
    decode,
    empty,
    encoded,
    id_key,
    placed,
)
from persist.storage.diff import Change
from persist.storage.document import Header
from persist.storage.transaction import Transaction

#: A content, and what turns the values that stand apart in the committed one into its own. None: that takes comparing.
Changed = tuple[Content, tuple[Change, ...] | None]


class WorkingCopy:
    """A session under its lock, to be changed and committed.

    Args:
        found: what is committed.
        tx: the transaction that found it, None for a copy that is not committed.

    Attributes:
        header: that of the committed revision.
        fields: the top-level values but ``messages`` and ``tool_calls``, as a mapping to be changed.
    """

    def __init__(self, found: Replica, tx: Transaction | None = None) -> None:
        self.header = found.header
        self._lists: dict[str, WorkingList] = {}
        self.fields = Fields(found.content, self._lists)
        self._tx = tx
        self._content = found.content
        self._data: dict[str, Any] | None = None

    def list(self, name: str) -> WorkingList:
        """Return a top-level list, to be changed in place. A missing one is made by the first item.

        Raises:
            WrongType: the value is no list.
        """
        found = self._lists.get(name)
        if found is None:
            if name == HEADER:
                raise ReservedField(field=HEADER, remedy="Choose another name for the field.")
            value = self.fields.committed(name)
            if name in self.fields.handed_out:
                whole = self.fields.handed_out[name]
                if type(whole) is not list:
                    raise _no_list(name, whole)
                return WorkingList.over(name, whole)
            if value is not None and not isinstance(value, Items):
                whole = json_codec.decode(value)
                if type(whole) is not list:
                    raise _no_list(name, whole)
                value = Items(list(map(json_codec.encode, whole)))
            found = self._lists[name] = WorkingList(name, Items([]) if value is None else value)
        return found

    def has_list(self, name: str) -> bool:
        """Tell whether a top-level value is a list, or missing."""
        value = self._content.get(name)
        return value is None or isinstance(value, Items) or value[:1] == b"["

    @property
    def data(self) -> dict[str, Any]:
        """The whole document as a plain dict, as it is by now. Once asked for, it is what is committed."""
        if self._data is None:
            found = dict(self.fields)
            for name in ALWAYS_APART:
                value = self._content.get(name)
                if name in self._lists:
                    if value is not None or self._lists[name]:
                        found[name] = self._lists.pop(name).whole()
                elif value is not None:
                    found[name] = decode(value)
            self._data = {name: found[name] for name in (*dict(self._content), *found) if name in found}
            self.fields.hand_out_all(self._data)
        return self._data

    def changed(self) -> Changed | None:
        """Return the content as it is now, and what was changed in the values that stand apart. None if nothing was
        changed.

        Raises: what `encoded` raises for what cannot be kept.
        """
        before = self._content
        if self._data is not None:
            for name in [name for name, items in self._lists.items() if items]:
                self._data[name] = self._lists.pop(name).whole()
            after = encoded(self._data, before)
            return None if after == before else (after, None)
        values: dict[str, Value] = dict(before)
        self.fields.write_to(values)
        splices: dict[str, list[Change]] = {}
        is_changed = self.fields.is_touched
        for name, items in self._lists.items():
            if made := items.changes():
                if items.base is before.apart.get(name):
                    splices[name] = made
                is_changed = True
                values[name] = items.after(made)
        if not is_changed:
            return None
        after = placed(values.items())
        changes = tuple(_changes(before, after, splices))
        return None if not changes and after.fields == before.fields else (after, changes)

    @property
    def content(self) -> Content:
        """The content as it is now."""
        changed = self.changed()
        return self._content if changed is None else changed[0]

    def commit(self, header: Header, changed: Changed | None = None) -> Replica:
        """Commit the content as it is now, also if nothing was changed in it.

        `changed` is that, if the caller knows it.
        """
        assert self._tx is not None
        content, changes = changed or self.changed() or (self._content, ())
        return self._tx.commit(header, content, changes)

    def commit_changes(self, changed: Changed | None, *, touch: bool = True) -> Replica:
        """Commit what `changed` returned. If that is None, make durable what was read."""
        assert self._tx is not None
        if changed is None:
            self._tx.confirm()
            return self._tx.read()
        return self._tx.commit(self.header.next(touch=touch), *changed)


def _changes(before: Content, after: Content, splices: dict[str, list[Change]]) -> Iterator[Change]:
    """Yield what a commit changes in the values that stand apart, in the words of the verbs that changed them."""
    for name in before.apart:
        if name not in after.apart:
            yield Change(name, is_gone=True)
    for name, new in after.apart.items():
        old = before.apart.get(name)
        if old is new:
            continue
        if name in splices:
            yield from splices[name]
        elif old != new:
            yield diff.whole(name, new)


def _no_list(name: str, value: Any) -> WrongType:
    return WrongType(what=f"field {name!r} of the document", expected="a list", got=type(value).__name__)


class Fields(MutableMapping[str, Any]):
    """The top-level values of a working copy but ``messages`` and ``tool_calls``, each decoded when it is asked for."""

    def __init__(self, content: Content, lists: dict[str, WorkingList]) -> None:
        self._content = content
        self._lists = lists
        #: What was handed out or set. A value may have been changed in place since.
        self.handed_out: dict[str, Any] = {}
        self._gone: set[str] = set()

    @property
    def is_touched(self) -> bool:
        """Whether anything was handed out, set or deleted."""
        return bool(self.handed_out or self._gone)

    def committed(self, name: str) -> Value | None:
        """Return a top-level value as it is committed. None if it was deleted since."""
        return None if name in self._gone else self._content.get(name)

    def hand_out_all(self, data: dict[str, Any]) -> None:
        """Read and change a plain document from now on."""
        self._content, self.handed_out, self._gone = empty(), data, set()

    def __getitem__(self, name: str) -> Any:
        if name in ALWAYS_APART:
            raise KeyError(name)
        if name not in self.handed_out:
            items, value = self._lists.get(name), None if name in self._gone else self._content.get(name)
            if value is None and not items:
                raise KeyError(name)
            if items is not None:
                del self._lists[name]
                self.handed_out[name] = items.whole()
            elif value is not None:
                self.handed_out[name] = decode(value)
        return self.handed_out[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name == HEADER:
            raise ReservedField(field=name, remedy="Choose another name for the field.")
        if name in ALWAYS_APART:
            raise ReservedField(field=name, remedy=f"Use list({name!r}).")
        self._gone.discard(name)
        self._lists.pop(name, None)
        self.handed_out[name] = value

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self.handed_out.pop(name, None)
        self._lists.pop(name, None)
        self._gone.add(name)

    def __contains__(self, name: object) -> bool:
        if type(name) is not str or name in ALWAYS_APART:
            return False
        return name in self.handed_out or self.committed(name) is not None or bool(self._lists.get(name))

    def __iter__(self) -> Iterator[str]:
        there = dict.fromkeys([*dict(self._content), *self.handed_out, *self._lists])
        yield from [name for name in there if name in self]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def write_to(self, values: dict[str, Value]) -> None:
        """Bring top-level values to the state of this mapping."""
        for name in self._gone:
            values.pop(name, None)
        if self.handed_out:
            before = Content({}, {name: values[name] for name in self.handed_out if name in values})
            after = encoded(self.handed_out, before)
            for name, value in after:
                old = values.get(name)
                values[name] = old if old is not None and old == value else value


class WorkingList(MutableSequence[Any]):
    """A list of a working copy: the items that it keeps of the committed list, and behind them a tail of its own.

    An entry of the tail is an item's JSON as long as nobody asked for it, else a Python value.
    """

    def __init__(self, name: str, base: Items) -> None:
        self._name = name
        self.base = base
        self._kept = len(base)
        self._tail: list[Any] = []

    @classmethod
    def over(cls, name: str, items: list[Any]) -> WorkingList:
        """Return a working list that changes a plain list in place."""
        found = cls(name, Items([]))
        found._tail = items
        return found

    def whole(self) -> list[Any]:
        """Return all items as a plain list, which this working list goes on to change in place."""
        self._in_tail(0)
        self._tail[:] = [json_codec.decode(item) if type(item) is bytes else item for item in self._tail]
        self.base = Items([])
        return self._tail

    def __len__(self) -> int:
        return self._kept + len(self._tail)

    def _in_tail(self, place: int) -> int:
        """Return the place of an item in the tail, which grows to the front for that."""
        if place < self._kept:
            self._tail[:0] = self.base.last(len(self.base) - place)[: self._kept - place]
            self._kept = place
        return place - self._kept

    def _place(self, place: int) -> int:
        count = len(self)
        place = place + count if place < 0 else place
        if not 0 <= place < count:
            raise IndexError(place)
        return place

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> MutableSequence[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        at = self._in_tail(self._place(place))
        if type(self._tail[at]) is bytes:
            self._tail[at] = json_codec.decode(self._tail[at])
        return self._tail[at]

    def __setitem__(self, place: Any, item: Any) -> None:
        if isinstance(place, slice):
            raise TypeError("Replace items one by one.")
        self._refuse_bytes(item, place)
        self._tail[self._in_tail(self._place(place))] = item

    def _refuse_bytes(self, item: Any, place: int) -> None:
        # In the tail they would pass for an item's JSON.
        if type(item) is bytes:
            json_codec.check(item, (self._name, place))

    def __delitem__(self, place: Any) -> None:
        if isinstance(place, slice):
            for each in sorted(range(*place.indices(len(self))), reverse=True):
                del self[each]
            return
        del self._tail[self._in_tail(self._place(place))]

    def insert(self, place: int, item: Any) -> None:
        """Put an item before the one at a place."""
        count = len(self)
        place = max(0, place + count) if place < 0 else min(place, count)
        self._refuse_bytes(item, place)
        self._tail.insert(self._in_tail(place), item)

    def find(self, message_id: object) -> int | None:
        """Return the place of the last item with this id, or None. `1` and `"1"` are two ids."""
        key = id_key(message_id)
        if key is None:
            return None
        for place in range(len(self._tail) - 1, -1, -1):
            if id_key(_id_of(self._tail[place])) == key:
                return self._kept + place
        place_there = self.base.find(key)
        if place_there is None or place_there < self._kept:
            return place_there
        # It stood in what is the tail by now. An earlier item may have the same id.
        return next((at for at in range(self._kept - 1, -1, -1) if id_key(_id_of(self.base[at])) == key), None)

    def changes(self) -> list[Change]:
        """Return what turns the committed list into this one."""
        if not self._tail and self._kept == len(self.base):
            return []
        before = self.base.last(len(self.base) - self._kept)
        after = [
            item if type(item) is bytes else json_codec.encode_exact(item, (self._name, place))
            for place, item in enumerate(self._tail, self._kept)
        ]
        for at, (item, old) in enumerate(zip(self._tail, before, strict=False)):
            if type(item) is not bytes:
                after[at] = as_before(after[at], item, old)
        return list(diff.splices(self._name, before, after, self._kept))

    def after(self, changes: list[Change]) -> Items:
        """Return the committed list after some changes."""
        items = self.base
        for change in changes:
            items = items.spliced(change.at, change.remove, list(map(bytes, change.insert)))
        return items


def _id_of(item: Any) -> Any:
    item = json_codec.decode(item) if type(item) is bytes else item
    return item.get("id") if type(item) is dict else None
