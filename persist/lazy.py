"""Lazy data: a dict some of whose values are read when somebody looks at them.

Of a large session, `edit` and `update` hand it out: its small fields are there, its lists are read once they are asked for.
From then on it is a dict like any other, and the lists are its own. So a change of a title costs no more than the title.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

Data = dict[str, Any]


class _Unread:
    """In the place of a value that has not been read. Only C code that goes past the methods of a dict can come upon it (orjson
    and msgspec do); it can make nothing of it, and says so: give it ``dict(data)``.
    """

    def __repr__(self) -> str:
        return "<not read>"


_UNREAD = _Unread()


class LazyData(Data):
    """A dict of which some keys are late: what they hold, and whether they are there, is found out when it matters.

    Args:
        known: the other keys.
        late: those.
        read: returns those of them that are there, with their values. What it raises goes to whoever has asked, and all is as
            before.
    """

    __slots__ = ("_late", "_lock", "_read")

    def __init__(self, known: Data, late: Collection[str], read: Callable[[], Data]) -> None:
        super().__init__(known | dict.fromkeys(late, _UNREAD))
        self._late = frozenset(late)
        self._read = read
        # Another thread's lists must not take the place of those that the first one has changed.
        self._lock = threading.RLock()

    def fill(self) -> None:
        """Read what is late, unless that was done."""
        with self._lock:
            found = self._read()
            # While that was done, a signal handler may have come here.
            if self._late:
                dict.update(self, found)
                for key in self._late - found.keys():
                    dict.pop(self, key, None)
                self._late, self._read = frozenset(), dict

    def known(self) -> tuple[Data, bool]:
        """What is there without reading, in a dict of its own; and whether that is all."""
        with self._lock:
            return {key: value for key, value in list(dict.items(self)) if key not in self._late}, not self._late

    def update(self, *others: Any, **values: Any) -> None:
        """As that of a dict."""
        new = dict(*others, **values)
        if not self._late.isdisjoint(new):
            self.fill()
        dict.update(self, new)

    def __ior__(self, other: Any) -> LazyData:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[type[Data], tuple[Data]]:
        """Copied or pickled, it is a plain dict."""
        return dict, (self.copy(),)


def _filled_for_its_key(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def filled(self: LazyData, key: Any, *more: Any) -> Any:
        if type(key) is not str or key in self._late:
            self.fill()
        return method(self, key, *more)

    return filled


def _filled(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def filled(self: LazyData, *others: Any) -> Any:
        for each in (self, *others):
            if isinstance(each, LazyData):
                each.fill()
        return method(self, *others)

    return filled


#: The methods of a dict that are about one key; and those that are about all.
BY_KEY = ("__contains__", "__delitem__", "__getitem__", "__setitem__", "get", "pop", "setdefault")
_OPERATORS = ("__eq__", "__iter__", "__len__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__")
OF_ALL = (*_OPERATORS, "clear", "copy", "items", "keys", "popitem", "values")
for _name in BY_KEY:
    setattr(LazyData, _name, _filled_for_its_key(_name))
for _name in OF_ALL:
    setattr(LazyData, _name, _filled(_name))
