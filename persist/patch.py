"""The patch, which brings a result into live objects, in place.

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
        known: a copy of `target` as it is now. It may share the parts that stay with `wanted`.
        wanted: the new state. Parts of it become parts of `target`.
    """
    _Patch(target).object(target, known, wanted)


def _shared_in(document: Any) -> set[int]:
    """Return the ids of the objects and arrays that stand at more than one place of a document."""
    seen: set[int] = set()
    shared: set[int] = set()
    level = [document]
    while level:
        # One level at a time, because a call for each message of a long session would block an event loop.
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
    """One patch of one document.

    It does not change an object in place that stands at two places of the target, because the other place must stay.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        self._shared = _shared_in(target)

    def value(self, target: Any, known: Any, wanted: Any) -> Any:
        """Return the value for the place of `target`. It is `target` itself, changed in place, if that is possible."""
        if same(known, wanted):
            return target
        if id(target) in self._shared or not type(target) is type(known) is type(wanted) in (dict, list):
            return wanted
        if not known.keys() <= target.keys() if type(target) is dict else len(target) < len(known):
            # The caller's value has the same JSON but is another Python value, with numbers as keys, say.
            return wanted
        change = self.object if type(target) is dict else self.array
        change(target, known, wanted)
        return target

    def object(self, target: dict[str, Any], known: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Patch an object key by key."""
        for key in known.keys() - wanted.keys():
            del target[key]
        for key, value in wanted.items():
            target[key] = self.value(target[key], known[key], value) if key in known else value

    def array(self, target: list[Any], known: list[Any], wanted: list[Any]) -> None:
        """Patch an array slice by slice, between the items that stay."""
        # From the end to the front, so that the places before the one being changed stay valid.
        i, j = len(known), len(wanted)
        lead = same_objects(known, wanted)
        pairs = align(*(list(map(label, items[lead:])) for items in (known, wanted)))
        for p, q in reversed([(lead + p, lead + q) for p, q in pairs]):
            target[p + 1 : i] = wanted[q + 1 : j]
            target[p] = self.value(target[p], known[p], wanted[q])
            i, j = p, q
        target[lead:i] = wanted[lead:j]
