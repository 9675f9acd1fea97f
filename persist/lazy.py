"""Lazy data: a dict some of whose values are read when somebody looks at them.

Of a large session, `edit` and `update` hand it out: its small fields are there, its lists are read once they are asked for.
From then on it is a dict like any other, and the lists are its own. So a change of a title costs no more than the title.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial, wraps
from itertools import compress, repeat
from typing import Any

Data = dict[str, Any]


class _Unread:
    """In the place of a value that has not been read. Only C code that goes past the methods of a dict can come upon it (orjson
    and msgspec do); it can make nothing of it, and says so, also if it is told to make a string of what it does not know.
    """

    def __repr__(self) -> str:
        raise TypeError(
            "A value that has not been read: to code that goes past the methods of a dict, give dict(data)."
        )


_UNREAD = _Unread()


class LazyData(Data):
    """A dict of which some keys are late: what they hold, and whether they are there, is found out when it matters.

    Args:
        known: the other keys.
        late: those.
        read: returns those of them that are there, with their values. What it raises goes to whoever has asked, and all is as
            before. Where several come at once, it may be called for each; they all get what the first one is given.
    """

    __slots__ = ("_late", "_read")

    # All may be left out, as code that makes a dict of the same kind does.
    def __init__(self, known: Any = (), late: Collection[str] = (), read: Callable[[], Data] = dict) -> None:
        super().__init__(known)
        self._late = late
        self._read = read
        dict.update(self, dict.fromkeys(late, _UNREAD))

    # A thread may come at any time, and so may a signal handler of this one. So what is late is marked in the dict itself, and
    # every step is one call of C.

    def fill(self) -> None:
        """Read what is late, unless that was done."""
        if not any(self._unread(self._late)):
            return
        found = self._read()
        missing = [key for key in self._late if key not in found]
        list(map(partial(dict.pop, self), compress(missing, self._unread(missing))))
        dict.update(self, compress(found.items(), self._unread(found)))
        self._late, self._read = (), dict

    def _unread(self, keys: Iterable[str]) -> Iterator[bool]:
        """Of each key whether it is late, as it is when it is asked for."""
        return map(operator.is_, map(partial(dict.get, self), keys), repeat(_UNREAD))

    def known(self) -> tuple[Data, bool]:
        """What is there without reading, in a dict of its own; and whether that is all."""
        items = list(dict.items(self))
        known = {key: value for key, value in items if value is not _UNREAD}
        return known, len(known) == len(items)

    def update(self, /, *others: Any, **values: Any) -> None:
        """As that of a dict."""
        new = dict(*others, **values)
        if any(self._unread(new)):
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
    def filled(self: LazyData, key: Any, /, *more: Any) -> Any:
        # One that cannot be a key is refused by the method.
        if type(key) is not str or dict.get(self, key) is _UNREAD:
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
