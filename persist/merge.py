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
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
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
            expected = " | ".join(get_args(Policy))
            raise WrongType(what=f"the merge policy of {field!r}", expected=expected, got=repr(policy))


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
    return _Merger(prefer, policies or {}).object((), base, mine, theirs)


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

    def settled(self, key: Any, b: Any, m: Any, t: Any) -> Any:
        """A field that has a policy, and that both sides changed."""
        policy = self.policies[key]
        if policy == "mine":
            return m
        if policy == "theirs":
            return t
        if policy == "sum" and _is_number(m) and _is_number(t) and (b is MISSING or _is_number(b)):
            # A float and an integer of hundreds of digits have no sum.
            with suppress(OverflowError):
                total = t + (m - (b or 0))
                if type(total) is int or math.isfinite(total):
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
        if len(path) == 1 and path[0] in self.policies:
            return self.settled(path[0], b, m, t)
        if type(m) is type(t) is dict and type(b) in (dict, _Missing):
            return self.object(path, b, m, t)
        if type(m) is type(t) is list and type(b) in (list, _Missing):
            return self.array(path, b, m, t)
        if same(m, t):
            return t
        return self.conflict(path, "two different values", b, m, t)

    def object(self, path: ValuePath, b: Any, m: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
        """Key by key."""
        base = {} if b is MISSING else b
        merged = {}
        # Mine first: `patch` brings the result into mine, where a new key can only come last.
        for key in (*m, *(key for key in t if key not in m)):
            three = base.get(key, MISSING), m.get(key, MISSING), t.get(key, MISSING)
            value = self.value((*path, key), *three)
            if value is not MISSING:
                merged[key] = value
        return merged

    def array(self, path: ValuePath, b: Any, m: list[Any], t: list[Any]) -> list[Any]:
        """Item by item; a contradiction that no preference settles is a conflict about the array as a whole."""
        base = [] if b is MISSING else b
        lead = same_objects(base, m, t)
        mine, theirs = _Edits(base[lead:], m[lead:]), _Edits(base[lead:], t[lead:])
        try:
            self.settle_twins(mine, theirs)
            merged = base[:lead] + self.items(path, lead, base[lead:], mine, theirs)
            _refuse_miscounted(merged, base, m, t, mine.new + theirs.new)
        except _Clash as clash:
            # Never one side's whole array, whatever is preferred: it lacks what the other has added.
            raise MergeConflict(path=path, reason=str(clash), base=b, mine=m, theirs=t) from None
        return merged

    def settle_twins(self, mine: _Edits, theirs: _Edits) -> None:
        """Where both added an item under one id: its content, in their place."""
        twins: dict[Any, Any] = {identity: item for item in theirs.all_added() if (identity := _identity(item))}
        times = Counter(map(_identity, mine.all_added() + theirs.all_added()))
        for item in mine.all_added():
            twin = twins.get(_identity(item), item)
            if same(item, twin):
                continue
            if self.prefer == "error" or times[_identity(item)] > 2:
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
        """Return the items that mine adds at a gap, none if both sides replaced the same items by equal ones."""
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
    lead = 0
    for item, *rest in zip(first, *others, strict=False):
        if any(other is not item for other in rest):
            break
        lead += 1
    return lead


class _Clash(Exception):
    """The two sides' edits of one array contradict each other."""


class _Edits:
    """The edits of one side of an array: `kept[i]` is its version of base item i (or MISSING), `added[i]` what it put
    before i.
    """

    def __init__(self, base: list[Any], side: list[Any]) -> None:
        self.kept: list[Any] = [MISSING] * len(base)
        self.added: list[list[Any]] = [[] for _ in range(len(base) + 1)]
        #: The items that stand at a new place. A moved item is among them.
        self.new: list[Any] = []
        b = s = 0
        for i, j in [*align(base, side), (len(base), len(side))]:
            old, new = base[b:i], side[s:j]
            # Equally many items without an id are edits of one another, else removed and added.
            if len(old) == len(new) and not any(map(_identity, old + new)):
                self.kept[b:i] = new
            else:
                self.added[i] += new
            self.new += new
            if i < len(base):
                self.kept[i] = side[j]
            b, s = i + 1, j + 1

    def all_added(self) -> list[Any]:
        return [item for items in self.added for item in items]

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
    """Each item's key, and how often it came before."""
    seen: defaultdict[Any, Iterator[int]] = defaultdict(count)
    return [(key, next(seen[key])) for key in map(_key, items)]


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
    #: For each pile the longest run that ends with its top: its last pair, and the run before that.
    runs: list[Any] = []
    for i, j in pairs:
        pile = bisect_left(tops, i)
        runs[pile : pile + 1] = [((i, j), runs[pile - 1] if pile else None)]
        tops[pile : pile + 1] = [i]
    rising: list[tuple[int, int]] = []
    rest = runs[-1] if runs else None
    while rest:
        last, rest = rest
        rising.append(last)
    return rising[::-1]


def count_removed(base: list[Any], side: Any) -> int:
    """How many items of an array `side` no longer has; an edited item is not a removed one."""
    return _Edits(base, side).kept.count(MISSING) if type(side) is list else len(base)
