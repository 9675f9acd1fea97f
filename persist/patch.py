"""Bring a result into live objects, in place.

Callers hold references into a document (``messages = session.data["messages"]``). After a patch they still hold the
document's own objects.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from persist.json_codec import same
from persist.merge import align, label, same_objects


def patch(target: dict[str, Any], known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make `target` equal to `wanted` in place, keeping every object whose counterpart is still there.

    Args:
        target: the document.
        known: a copy of it as it is now. Parts that are to stay may be shared with `wanted`.
        wanted: what it shall be. Parts of it become parts of `target`.
    """
    _Patch(target).object(target, known, wanted)


def _shared_in(document: Any) -> set[int]:
    """The ids of the objects and arrays that stand at more than one place of a document."""
    seen: set[int] = set()
    shared: set[int] = set()
    level = [document]
    while level:
        # A level at a time, because a call for each message of a long session would hold an event loop up.
        fresh = dict(zip(map(id, level), level, strict=True))
        if len(fresh) < len(level):
            shared |= {each for each, times in Counter(map(id, level)).items() if times > 1}
        again = seen & fresh.keys()
        shared |= again
        for each in again:
            del fresh[each]
        seen |= fresh.keys()
        level = [
            child
            for item in fresh.values()
            for child in (item.values() if type(item) is dict else item)
            if type(child) in (dict, list)
        ]
    return shared


class _Patch:
    """One patch.

    An object that stands at two places of the target is not changed in place: the other place is not meant.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        self._shared = _shared_in(target)

    def value(self, target: Any, known: Any, wanted: Any) -> Any:
        """Return the value for the place of `target`: `target` itself, changed in place, if that can be."""
        if same(known, wanted):
            return target
        if id(target) in self._shared or not type(target) is type(known) is type(wanted) in (dict, list):
            return wanted
        if not known.keys() <= target.keys() if type(target) is dict else len(target) < len(known):
            # The caller's value has the same JSON and is another one, with numbers as keys, say.
            return wanted
        change = self.object if type(target) is dict else self.array
        change(target, known, wanted)
        return target

    def object(self, target: dict[str, Any], known: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Key by key."""
        for key in known.keys() - wanted.keys():
            del target[key]
        for key, value in wanted.items():
            target[key] = self.value(target[key], known[key], value) if key in known else value

    def array(self, target: list[Any], known: list[Any], wanted: list[Any]) -> None:
        """Slice by slice, between the items that stay."""
        # From the end to the front, so that the places before the one being changed stay valid.
        i, j = len(known), len(wanted)
        lead = same_objects(known, wanted)
        pairs = align(*(list(map(label, items[lead:])) for items in (known, wanted)))
        for p, q in reversed([(lead + p, lead + q) for p, q in pairs]):
            target[p + 1 : i] = wanted[q + 1 : j]
            target[p] = self.value(target[p], known[p], wanted[q])
            i, j = p, q
        target[lead:i] = wanted[lead:j]
