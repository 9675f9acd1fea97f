"""Three-way merge of JSON values: what each side changed since the base, and nothing else. Pure functions, no I/O.

- Objects merge key by key, recursively; a deletion is a change like any other.
- Arrays merge item by item. Items are the same when they carry the same ``id``; without one, when they have the same
  value, and what is left over between two matches is paired by position if both sides have equally many.
  Two appends are both kept, theirs first. Adding next to items that the other side removed is a conflict; with a
  preference, both the removal and what was added stand: to settle one place drops nothing elsewhere.
- Anything else: changed on one side wins; changed on both to different values is a conflict.

Equality is of JSON type and value: ``True``, ``1`` and ``1.0`` differ, and so do ``0.0`` and ``-0.0``.

A conflict raises `MergeConflict`, unless `prefer` says whose value to take. A policy settles one top-level field in its
own way: ``sum`` adds both changes, ``max`` keeps the greater, ``mine`` and ``theirs`` take that side.

The laws (tested as properties): ``merge(b, m, b) == m``; ``merge(b, b, t) == t``; edits that do not overlap commute,
but for the order of two appended blocks; nothing that a side added is lost; nothing that a side removed comes back.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from persist.errors import MergeConflict, ValuePath, WrongType
from persist.json_codec import same

Policy = Literal["sum", "max", "mine", "theirs"]
Preference = Literal["error", "mine", "theirs"]


class _Missing:
    """Stands for "no such key" where None is a value."""

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


def check_policies(policies: object) -> None:
    """Raise `WrongType` unless `policies` maps fields to some of the four policies."""
    if not isinstance(policies, Mapping):
        raise WrongType(what="merge", expected="a mapping of fields to policies", got=type(policies).__name__)
    for field, policy in policies.items():
        if type(field) is not str:
            raise WrongType(what="a field of merge", expected="a string", got=repr(field))
        if policy not in get_args(Policy):
            raise WrongType(
                what=f"the merge policy of {field!r}", expected=" | ".join(get_args(Policy)), got=repr(policy)
            )


def merge(
    base: dict[str, Any],
    mine: dict[str, Any],
    theirs: dict[str, Any],
    policies: Mapping[str, Policy] | None = None,
    *,
    prefer: Preference = "error",
) -> dict[str, Any]:
    """Return `theirs` with the changes that `mine` made to `base`.

    The result shares structure with its arguments; none of them is changed.

    Args:
        policies: top-level field -> policy, asked when both sides changed that field.
        prefer: whose value stands at a conflict; ``"error"`` raises.

    Raises:
        MergeConflict: both sides changed one place in different ways, and `prefer` is ``"error"``; or, whatever it is,
            one side moved items of an array that the other moved or removed.
    """
    merger = _Merger(prefer, policies or {})
    return merger.document(base, mine, theirs)


def _keys(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    # Mine first: `patch` brings the result into mine, where a new key can only come last.
    return [*mine, *(key for key in theirs if key not in mine)]


def _sum(theirs: float, mine: float, base: float) -> float | None:
    try:
        total = theirs + (mine - base)
    except OverflowError:
        # A float and an integer of hundreds of digits.
        return None
    return total if type(total) is int or math.isfinite(total) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


class _Merger:
    """One merge: it carries the caller's wishes down the recursion. `b`, `m`, `t` are base, mine and theirs."""

    def __init__(self, prefer: Preference, policies: Mapping[str, Policy]) -> None:
        self.prefer = prefer
        self.policies = policies

    def conflict(self, path: ValuePath, reason: str, b: Any, m: Any, t: Any) -> Any:
        if self.prefer == "error":
            raise MergeConflict(path=path, reason=reason, base=b, mine=m, theirs=t)
        return m if self.prefer == "mine" else t

    def document(self, b: dict[str, Any], m: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
        """The top level, where policies hold."""
        merged = {}
        for key in _keys(m, t):
            three = b.get(key, MISSING), m.get(key, MISSING), t.get(key, MISSING)
            value = self.settled(key, *three) if key in self.policies else self.value((key,), *three)
            if value is not MISSING:
                merged[key] = value
        return merged

    def settled(self, key: str, b: Any, m: Any, t: Any) -> Any:
        """A field that has a policy. It is asked only where both sides changed the field."""
        policy = self.policies[key]
        if same(b, m) or same(b, t):
            return self.value((key,), b, m, t)
        if policy == "mine":
            return m
        if policy == "theirs":
            return t
        if policy == "sum" and _is_number(m) and _is_number(t) and (b is MISSING or _is_number(b)):
            total = _sum(t, m, b or 0)
            if total is not None:
                return total
        if policy == "max" and (type(m) is type(t) is str or (_is_number(m) and _is_number(t))):
            return max(m, t)
        return self.conflict((key,), f"policy {policy!r} cannot combine these values", b, m, t)

    def value(self, path: ValuePath, b: Any, m: Any, t: Any) -> Any:
        """Any place of a document; MISSING stands for "not there", on either way."""
        if same(b, m):
            return t
        if same(b, t):
            return m
        if type(m) is type(t) is dict and type(b) in (dict, _Missing):
            return self.object(path, b, m, t)
        if type(m) is type(t) is list and type(b) in (list, _Missing):
            return self.array(path, b, m, t)
        if same(m, t):
            return t
        return self.conflict(path, "two different values", b, m, t)

    def object(
        self, path: ValuePath, b: dict[str, Any] | _Missing, m: dict[str, Any], t: dict[str, Any]
    ) -> dict[str, Any]:
        """Key by key."""
        base = {} if isinstance(b, _Missing) else b
        merged = {}
        for key in _keys(m, t):
            value = self.value((*path, key), base.get(key, MISSING), m.get(key, MISSING), t.get(key, MISSING))
            if value is not MISSING:
                merged[key] = value
        return merged

    def array(self, path: ValuePath, b: list[Any] | _Missing, m: list[Any], t: list[Any]) -> Any:
        """Item by item; a contradiction that no preference settles is a conflict about the array as a whole."""
        base = [] if isinstance(b, _Missing) else b
        lead = same_objects(base, m, t)
        mine, theirs = _Edits(base[lead:], m[lead:]), _Edits(base[lead:], t[lead:])
        try:
            self.settle_twins(mine, theirs)
            merged = base[:lead] + self.items(path, lead, base[lead:], mine, theirs)
            _refuse_miscounted(merged, base, m, t, mine.all_new() + theirs.all_new())
        except _Clash as clash:
            # Never one side's whole array, whatever is preferred: it lacks what the other has added.
            raise MergeConflict(path=path, reason=clash.reason, base=b, mine=m, theirs=t) from None
        return merged

    def settle_twins(self, mine: _Edits, theirs: _Edits) -> None:
        """Where both added an item under one id: its content, in their place."""
        twins = {identity: item for item in theirs.all_added() if (identity := _identity(item))}
        times = Counter(map(_identity, mine.all_added() + theirs.all_added()))
        for item in mine.all_added():
            identity = _identity(item)
            twin = twins.get(identity, item) if identity else item
            if same(item, twin):
                continue
            if self.prefer == "error" or times[identity] > 2:
                raise _Clash("one id, two contents")
            if self.prefer == "mine":
                theirs.added = [[item if each is twin else each for each in items] for items in theirs.added]

    def items(self, path: ValuePath, lead: int, base: list[Any], mine: _Edits, theirs: _Edits) -> list[Any]:
        """Walk along the base: what was added before each item, theirs first, then the item as both sides left it.

        So many items as `lead` says come before the base, on both sides.
        """
        twins = {identity for item in theirs.all_added() if (identity := _identity(item))}
        merged: list[Any] = []
        for gap in range(len(base) + 1):
            merged += theirs.added[gap]
            merged += [item for item in self.added_beside(mine, theirs, gap) if _identity(item) not in twins]
            if gap < len(base):
                item = self.value((*path, lead + gap), base[gap], mine.kept[gap], theirs.kept[gap])
                if item is not MISSING:
                    merged.append(item)
        return merged

    def added_beside(self, mine: _Edits, theirs: _Edits, gap: int) -> list[Any]:
        """What mine adds at a gap; nothing if both sides put the same in the place of what both removed."""
        ours, others = mine.added[gap], theirs.added[gap]
        if not ((ours and theirs.removed_beside(gap)) or (others and mine.removed_beside(gap))):
            return ours
        if same(ours, others) and mine.removed_beside(gap) and theirs.removed_beside(gap):
            return []
        if self.prefer == "error":
            raise _Clash("one side added where the other removed")
        return ours


def same_objects(first: list[Any], *others: list[Any]) -> int:
    """How many objects stand at the beginning of all lists: they need not be compared."""
    differing = (
        place for place, items in enumerate(zip(first, *others, strict=False)) if any(x is not items[0] for x in items)
    )
    return next(differing, min(map(len, (first, *others))))


class _Clash(Exception):
    """The two sides' edits of one array contradict each other."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Edits:
    """What one side did to an array: `kept[i]` is its version of base item i (or MISSING), `added[i]` what it put
    before i.
    """

    def __init__(self, base: list[Any], side: list[Any]) -> None:
        self.kept: list[Any] = [MISSING] * len(base)
        self.added: list[list[Any]] = [[] for _ in range(len(base) + 1)]
        self._replacing: list[Any] = []
        b = s = 0
        for i, j in [*align(base, side), (len(base), len(side))]:
            self._gap(base[b:i], side[s:j], b)
            if i < len(base):
                self.kept[i] = side[j]
            b, s = i + 1, j + 1

    def _gap(self, base: list[Any], side: list[Any], start: int) -> None:
        """Between two matches: equally many items without an id are edits of one another, else removed and added."""
        if len(base) == len(side) and not any(map(_identity, base)) and not any(map(_identity, side)):
            self.kept[start : start + len(base)] = side
            self._replacing += side
        else:
            self.added[start + len(base)] += side

    def all_added(self) -> list[Any]:
        return [item for items in self.added for item in items]

    def all_new(self) -> list[Any]:
        """What stands where it did not stand before; a moved item is among it."""
        return self.all_added() + self._replacing

    def removed_beside(self, gap: int) -> bool:
        return any(kept is MISSING for kept in self.kept[max(gap - 1, 0) : gap + 1])


def _identity(item: Any) -> tuple[str, type, Any] | None:
    """An item's own id, or None. The type keeps ``1`` and ``"1"`` apart, the word an item's id from a bare value."""
    if type(item) is dict:
        own = item.get("id")
        if type(own) in (str, int):
            return "id", type(own), own
    return None


def _refuse_miscounted(merged: list[Any], b: list[Any], m: list[Any], t: list[Any], added: list[Any]) -> None:
    """A moved item reads as removed here and added there: moved twice it would double, moved and removed it would
    return.
    """
    if not added:
        return
    before = Counter(map(_key, b))
    moved = {key for key in map(_key, added) if key in before}
    if not moved:
        return
    now, mine, theirs = (Counter(map(_key, items)) for items in (merged, m, t))
    for key in moved:
        if now[key] != max(mine[key] + theirs[key] - before[key], 0) and not now[key] == mine[key] == theirs[key]:
            raise _Clash("one side moved what the other moved or removed")


def align(base: list[Any], side: list[Any]) -> list[tuple[int, int]]:
    """Match the items of two arrays: pairs of positions, rising in both.

    Equal beginnings and ends first (nearly every change is an append), then the longest rising run of items that both
    sides have. The n-th occurrence of a key matches the n-th only, so keys are unique and the run is found in
    O(n log n); a general diff takes quadratic time on repeated items.
    """
    low, end = 0, min(len(base), len(side))
    while low < end and _matches(base[low], side[low]):
        low += 1
    tail = 0
    while tail < end - low and _matches(base[-1 - tail], side[-1 - tail]):
        tail += 1
    places = {key: i for i, key in enumerate(_keyed(base[low : len(base) - tail]), low)}
    common = [(places[key], j) for j, key in enumerate(_keyed(side[low : len(side) - tail]), low) if key in places]
    ends = [(len(base) - k, len(side) - k) for k in range(tail, 0, -1)]
    return [(i, i) for i in range(low)] + _longest_rising(common) + ends


def _matches(one: Any, other: Any) -> bool:
    if one is other:
        return True
    identity = _identity(one)
    return identity == _identity(other) if identity else same(one, other)


def _keyed(items: list[Any]) -> list[tuple[Any, int]]:
    seen: Counter[Any] = Counter()
    keys = []
    for item in items:
        key = _key(item)
        keys.append((key, seen[key]))
        seen[key] += 1
    return keys


def _key(item: Any) -> Any:
    return _identity(item) or _frozen(item)


def _frozen(value: Any) -> Any:
    """A hashable form that is equal exactly where `same` is."""
    if type(value) is dict:
        return dict, frozenset((key, _frozen(item)) for key, item in value.items())
    if type(value) is list:
        return list, tuple(map(_frozen, value))
    return type(value), repr(value) if type(value) is float else value


def _longest_rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of pairs whose first members rise (the second ones rise already): patience sorting."""
    tops: list[int] = []
    piles: list[int] = []
    before: list[int] = []
    for index, (i, _) in enumerate(pairs):
        pile = bisect_left(tops, i)
        before.append(piles[pile - 1] if pile else -1)
        if pile == len(tops):
            tops.append(i)
            piles.append(index)
        else:
            tops[pile], piles[pile] = i, index
    run: list[tuple[int, int]] = []
    index = piles[-1] if piles else -1
    while index >= 0:
        run.append(pairs[index])
        index = before[index]
    return run[::-1]


def count_removed(base: list[Any], side: Any) -> int:
    """How many items of an array `side` no longer has; an edited item is not a removed one."""
    return _Edits(base, side).kept.count(MISSING) if type(side) is list else len(base)
