"""Bring a result into live objects, in place.

Callers hold references into a document (``messages = session.data["messages"]``). After a patch they still hold the
document's own objects.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from persist.json_codec import same
from persist.merge import align, same_objects


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
        found = dict(zip(map(id, level), level, strict=True))
        if len(found) < len(level):
            shared |= {identity for identity, count in Counter(map(id, level)).items() if count > 1}
        shared |= seen & found.keys()
        new = [item for identity, item in found.items() if identity not in seen]
        seen |= found.keys()
        level = [
            each
            for item in new
            for each in (item.values() if type(item) is dict else item)
            if type(each) in (dict, list)
        ]
    return shared


class _Patch:
    """One patch.

    An object that stands at two places of the target is not changed in place: the other place is not meant.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        self._shared = _shared_in(target)

    def value(self, target: Any, known: Any, wanted: Any) -> Any:
        """What shall stand where `target` stands: `target` itself, changed in place, if that can be."""
        if same(known, wanted):
            return target
        if id(target) not in self._shared:
            if type(target) is type(known) is type(wanted) is dict:
                self.object(target, known, wanted)
                return target
            if type(target) is type(known) is type(wanted) is list:
                self.array(target, known, wanted)
                return target
        return wanted

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
        for p, q in reversed(align(known, wanted)):
            target[p + 1 : i] = wanted[q + 1 : j]
            if p < lead:
                return
            target[p] = self.value(target[p], known[p], wanted[q])
            i, j = p, q
        target[:i] = wanted[:j]
