"""The view: a committed revision of a session, to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, overload

from persist import json_codec
from persist.arguments import require_key, require_text
from persist.engine import Committed
from persist.errors import InvalidArgument
from persist.storage.content import ALWAYS_APART, Content, Items, as_id, decode


class View:
    """A session as one commit left it. `Store.view` hands it out.

    It decodes only the values that it is asked for, each time anew. So a change in such a value changes nothing here,
    and later commits change nothing here, either.

    Attributes:
        version: the version of that commit.
    """

    __slots__ = ("_content", "_header", "version")

    def __init__(self, found: Committed) -> None:
        self._content: Content = found.content
        self._header = found.header
        self.version: str = found.header.version

    def __repr__(self) -> str:
        return f"<persist.View at version {self.version}>"

    @property
    def created_at(self) -> datetime:
        """When the session was created, in UTC."""
        return self._header.created_at

    @property
    def updated_at(self) -> datetime:
        """When the session was last committed, in UTC."""
        return self._header.updated_at

    @property
    def fields(self) -> Mapping[str, Any]:
        """Every top-level value except ``messages`` and ``tool_calls``."""
        return _Fields(self._content)

    def list(self, name: str) -> ViewedList:
        """Return a top-level list. A missing list has no items.

        Raises:
            InvalidArgument: the value is no list.
        """
        require_text("a list's name", name)
        value = self._content.get(json_codec.joined(name))
        if isinstance(value, Items):
            return ViewedList(value)
        items = [] if value is None else decode(value)
        if type(items) is not list:
            what = f"field {name!r} of the document"
            raise InvalidArgument(what=what, expected="a list", got=type(items).__name__)
        return ViewedList(Items(list(map(json_codec.encode, items))))

    @property
    def data(self) -> dict[str, Any]:
        """The whole document, as a fresh dict."""
        return self._content.decode()


class _Fields(Mapping[str, Any]):
    """The fields of a view."""

    def __init__(self, content: Content) -> None:
        self._content = content

    def __getitem__(self, name: str) -> Any:
        value = self._content.get(json_codec.joined(name)) if type(name) is str and name not in ALWAYS_APART else None
        if value is None:
            raise KeyError(name)
        return decode(value)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._content if name not in ALWAYS_APART)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class ViewedList(Sequence[Any]):
    """A list of a view: a `Sequence`, with `find` and `find_all`. It decodes only the items that it is asked for."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __len__(self) -> int:
        return self._items.count

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: Any) -> Any:
        count = self._items.count
        if isinstance(place, slice):
            places = range(*place.indices(count))
            if not places:
                return []
            if len(places) == count and places.step == 1:
                return self._items.decode()
            first = min(places[0], places[-1])
            found = self._items.last(count - first)
            return [json_codec.decode(found[each - first]) for each in places]
        at = range(count)[place]
        return json_codec.decode(self._items.last(count - at)[0])

    def __iter__(self) -> Iterator[Any]:
        return map(json_codec.decode, self._items)

    def __repr__(self) -> str:
        return f"<a list of {len(self)} items>"

    def find(self, value: str | int, key: str = "id") -> Any:
        """Return the last item whose `key` has this value, or None. `1` and `"1"` differ."""
        require_key(key, may_be_none=False)
        wanted = as_id(value)
        place = None if wanted is None else self._items.find(wanted, key)
        return None if place is None else self[place]

    def find_all(self, value: str | int, key: str = "id") -> list[Any]:
        """Return all items whose `key` has this value, in their order. `1` and `"1"` differ."""
        require_key(key, may_be_none=False)
        wanted = as_id(value)
        if wanted is None:
            return []
        ids = self._items.ids(key)
        return [self[place] for place, each in enumerate(ids) if type(each) is type(wanted) and each == wanted]
