"""The three-way merge of JSON values. It makes the changes of both sides since the base, and nothing else.

All functions are pure, without I/O.

- Objects merge key by key, recursively. A deletion is a change like any other.
- Arrays merge item by item:

  1. An ``id`` counts only if no array has it twice and the items' ``role`` agrees. Such an item merges key by key,
     wherever it stands. Two new items of one id that differ are a conflict.
  2. Any other item is a single value. It is never merged inside, and never taken for an edit of another item.
  3. The items that both sides keep cut the arrays into runs. If one side left a run alone, the other side's run stands.
  4. Both sides may begin and end a run alike, with at least as many items as the run had. Then these items stand once.
     The items that only one side has stand between them, theirs first. So two appends are both kept. Equal items
     without ids that both sides append stand once.
  5. If one side put as many items in the place of a run, and the other side only added items around the run, both
     changes stand.
  6. If both sides only removed items, both removals stand. Any other run is a conflict. With a preference, edits of
     different items of a run stand where they were made. Otherwise the preferred side's run stands, without the items
     that the other side removed. The items that the other side added follow.
  7. At last every item is counted. Its number must be the one that both changes make. So it is a conflict, whatever the
     preference, if one side moved an item and the other side moved or removed it.

- For any other value, a change on one side wins. Changes on both sides to different values are a conflict.

Two values are equal if their JSON types and values are equal. ``True``, ``1`` and ``1.0`` differ, and so do ``0.0`` and
``-0.0``.

A conflict raises `MergeConflict`, unless `prefer` says whose value to take. A policy settles one top-level field in its
own way: ``sum`` adds both changes, ``max`` keeps the greater, ``mine`` and ``theirs`` take that side.

The laws, which are tested as properties:

- ``merge(b, m, b) == m`` and ``merge(b, b, t) == t``.
- Edits that do not overlap commute, except for the order of two appended blocks.
- Nothing that a side added is lost or doubled.
- Nothing that a side removed comes back.
- No text comes under another item's ``role``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, pairwise, takewhile
from operator import eq, is_
from typing import Any, Final, Literal, get_args

from persist.errors import InvalidArgument, MergeConflict, ValuePath
from persist.json_codec import canonical, same

Policy = Literal["sum", "max", "mine", "theirs"]
Preference = Literal["error", "mine", "theirs"]


class _Missing:
    """The value that stands for "no such key", because None is a value of its own."""

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


def check_policies(policies: object) -> None:
    """Raise `InvalidArgument` unless `policies` maps fields to the known policies."""
    if not isinstance(policies, Mapping):
        raise InvalidArgument(what="merge", expected="a mapping of fields to policies", got=type(policies).__name__)
    for field, policy in policies.items():
        if type(field) is not str:
            raise InvalidArgument(what="a field of merge", expected="a string", got=repr(field))
        if policy not in get_args(Policy):
            expected = " | ".join(get_args(Policy))
            raise InvalidArgument(what=f"the merge policy of {field!r}", expected=expected, got=repr(policy))


def merge(
    base: dict[str, Any],
    mine: dict[str, Any],
    theirs: dict[str, Any],
    policies: Mapping[str, Policy] | None = None,
    *,
    prefer: Preference = "error",
) -> dict[str, Any]:
    """Return `theirs` with the changes that `mine` made to `base`.

    The result shares structure with the arguments. None of them is changed.

    Args:
        policies: top-level field -> policy. A policy counts when both sides changed its field.
        prefer: the side whose value stands at a conflict. ``"error"`` raises.

    Raises:
        MergeConflict: both sides changed one place in different ways, and `prefer` is ``"error"``. Or, whatever
            `prefer` is, one side moved items of an array that the other side moved or removed.
    """
    return _Merger(prefer, policies or {}).object((), base, mine, theirs)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


class _Merger:
    """One merge. It carries the caller's wishes down the recursion. `b`, `m` and `t` are base, mine and theirs."""

    def __init__(self, prefer: Preference, policies: Mapping[str, Policy]) -> None:
        self.prefer = prefer
        self.policies = policies

    def conflict(self, path: ValuePath, reason: str, b: Any, m: Any, t: Any) -> Any:
        if self.prefer == "error":
            raise MergeConflict(path=path, reason=reason, base=b, mine=m, theirs=t)
        return m if self.prefer == "mine" else t

    def settled(self, key: Any, b: Any, m: Any, t: Any) -> Any:
        """Settle a field that has a policy, and that both sides changed."""
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
        """Merge any place of a document. `MISSING` stands for "not there", as an argument and as the result."""
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
        """Merge objects key by key."""
        base = {} if b is MISSING else b
        merged = {}
        # Mine first, because `patch` brings the result into mine, where a new key can only come last.
        for key in (*m, *(key for key in t if key not in m)):
            three = base.get(key, MISSING), m.get(key, MISSING), t.get(key, MISSING)
            value = self.value((*path, key), *three)
            if value is not MISSING:
                merged[key] = value
        return merged

    def array(self, path: ValuePath, b: Any, m: list[Any], t: list[Any]) -> list[Any]:
        """Merge arrays item by item: first the versions of each id, then the order of all items."""
        lists = ([] if b is MISSING else b), m, t
        lead = same_objects(*lists)
        rests = [items[lead:] for items in lists]
        labels = _labels(*rests, before=m[:lead])
        was, ours, others = (dict(zip(names, items, strict=True)) for names, items in zip(labels, rests, strict=True))
        # A conflict names the item's place in mine if it has one, because that is where the caller finds it.
        places = {name: at for names in (labels[2], labels[0], labels[1]) for name, at in zip(names, count(lead))}
        items = was | ours | others
        for name in items:
            versions = was.get(name, MISSING), ours.get(name, MISSING), others.get(name, MISSING)
            if type(name) is not bytes and not versions[0] is versions[1] is versions[2]:
                items[name] = self.item((*path, places[name]), *versions)
                if MISSING in versions and items[name] is not MISSING:
                    # An edit that stands against a removal counts as an addition.
                    was.pop(name, None)
        labels[0] = [name for name in labels[0] if name in was]
        try:
            return m[:lead] + [items[name] for name in _merge_labels(*labels, prefer=self.prefer)]
        except _Clash as clash:
            # No preference takes one side's whole array, because it lacks the items that the other side has added.
            raise MergeConflict(path=path, reason=str(clash), base=b, mine=m, theirs=t) from None

    def item(self, path: ValuePath, b: Any, m: Any, t: Any) -> Any:
        """Merge an item that has an id. Two new items are never mixed, because neither side has seen the other's."""
        if b is MISSING and MISSING not in (m, t) and not same(m, t):
            return self.conflict(path, "one id, two contents", b, m, t)
        return self.value(path, b, m, t)


class _Clash(Exception):
    """The two sides' edits of one array contradict each other."""


#: The label by which items are compared: an item's id, or its JSON as bytes.
Label = str | int | bytes


def same_objects(first: list[Any], *others: list[Any]) -> int:
    """Count the objects at the beginning that are the same in all lists. They need no comparison."""
    return min(sum(takewhile(bool, map(is_, first, other))) for other in others)


def label(item: Any) -> Label:
    """Return the label of an item: its id, or its JSON if it has none."""
    own = _id(item)
    return canonical(item) if own is None else own


def _id(item: Any) -> str | int | None:
    own = item.get("id") if type(item) is dict else None
    return own if type(own) in (str, int) else None


def _labels(*lists: list[Any], before: Iterable[Any] = ()) -> list[list[Label]]:
    """Label the items of arrays. An id counts only if no array has it twice and the role agrees in all of them.

    Args:
        before: items that stand in front of each array.
    """
    objects = {id(item): item for items in lists for item in items}
    known = {key: label(item) for key, item in objects.items()}
    labels = [[known[id(item)] for item in items] for items in lists]
    in_front = set(map(_id, before))
    doubtful = {name for names in labels for name, n in Counter(names).items() if n > 1 or name in in_front}
    roles: dict[Label, Any] = {}
    for key, item in objects.items():
        if type(name := known[key]) is not bytes:
            role = item.get("role", MISSING)
            if not same(role, roles.setdefault(name, role)):
                doubtful.add(name)
    return [
        [canonical(item) if name in doubtful else name for name, item in zip(names, items, strict=True)]
        for names, items in zip(labels, lists, strict=True)
    ]


def _merge_labels(base: list[Label], mine: list[Label], theirs: list[Label], *, prefer: Preference) -> list[Label]:
    """Merge the runs between the items that both sides keep, and count every item at the end."""
    lead, tail = _ends(mine, theirs)
    rests = {*mine[lead : len(mine) - tail], *theirs[lead : len(theirs) - tail]}
    kept = []
    # If both sides changed the whole base alike and then added items, all is one run. Else equal items could match
    # wrongly.
    if lead + tail < len(base) or not rests.isdisjoint(base):
        in_mine, in_theirs = dict(align(base, mine)), dict(align(base, theirs))
        kept = [(i, j, in_theirs[i]) for i, j in in_mine.items() if i in in_theirs]
    merged: list[Label] = []
    before, ours, others, now = (Counter[Label]() for _ in range(4))
    for (i, j, k), (p, q, r) in pairwise([(-1, -1, -1), *kept, (len(base), len(mine), len(theirs))]):
        run = base[i + 1 : p], mine[j + 1 : q], theirs[k + 1 : r]
        if any(run):
            for name in _merge_run(*run, prefer):
                # An item that has an id stands once, at the first place that a side gave it.
                if type(name) is bytes or name not in now:
                    merged.append(name)
                    now[name] += 1
            for counts, names in zip((before, ours, others), run, strict=True):
                counts.update(names)
        merged += base[p : p + 1]
    for name in before | ours | others:
        changes = ours[name] - before[name], others[name] - before[name]
        both = max(sum(changes), -before[name])
        # Two additions may be the same one, and so may two removals. An addition and a removal both count.
        least = both if min(changes) < 0 < max(changes) else max(changes, key=abs)
        if not min(least, both) <= now[name] - before[name] <= max(least, both):
            raise _Clash("one side moved what the other moved or removed")
    return merged


def _merge_run(base: list[Label], mine: list[Label], theirs: list[Label], prefer: Preference) -> list[Label]:
    """Merge the run between two items that both sides keep."""
    if mine == base:
        return theirs
    if theirs in (base, mine):
        return mine
    # Both sides put the same items in the place of the base. The items that only one side has stand between them.
    lead, tail = _ends(mine, theirs)
    if lead + tail >= len(base):
        return theirs[: len(theirs) - tail] + mine[lead:]
    # One side put as many items in the place of the base, and the other side only added items around it.
    for side, other in ((mine, theirs), (theirs, mine)):
        for at in range(len(other) - len(base) + 1):
            if len(side) == len(base) and other[at : at + len(base)] == base:
                return other[:at] + side + other[at + len(base) :]
    edits = list(zip(base, mine, theirs, strict=False))
    if prefer != "error" and len(base) == len(mine) == len(theirs) and all(b in (m, t) for b, m, t in edits):
        return [t if m == b else m for b, m, t in edits]
    side, other = (mine, theirs) if prefer == "mine" else (theirs, mine)
    was, one, two = Counter(base), Counter(side), Counter(other)
    if prefer == "error" and not one | two <= was:
        raise _Clash("both sides changed the same items, or items side by side")
    left, added = one - ((was & one) - two), two - (was | one)
    return [
        name for names, counts in ((side, left), (other, added)) for name, n in _numbered(names) if n < counts[name]
    ]


def _ends(one: Sequence[Label], other: Sequence[Label]) -> tuple[int, int]:
    """Count the items that two lists share at the beginning, and the items that their rests share at the end."""
    lead = sum(takewhile(bool, map(eq, one, other)))
    return lead, sum(takewhile(bool, map(eq, reversed(one[lead:]), reversed(other[lead:]))))


def align(base: Sequence[Label], side: Sequence[Label]) -> list[tuple[int, int]]:
    """Match the labels of two arrays. Return pairs of positions, which rise in both.

    Equal beginnings and ends match first, because nearly every change is an append. Then comes the longest rising run
    of labels that both sides have. The n-th occurrence of a label matches only the n-th one. So labels are unique, and
    the run is found in O(n log n). A general diff takes quadratic time on repeated items.
    """
    lead, tail = _ends(base, side)
    places = {name: i for i, name in enumerate(_numbered(base[lead : len(base) - tail]), lead)}
    common = [
        (places[name], j) for j, name in enumerate(_numbered(side[lead : len(side) - tail]), lead) if name in places
    ]
    ends = [(len(base) - k, len(side) - k) for k in range(tail, 0, -1)]
    return [(i, i) for i in range(lead)] + _longest_rising(common) + ends


def _numbered(labels: Sequence[Label]) -> list[tuple[Label, int]]:
    """Return each label with the number of its earlier occurrences."""
    seen: defaultdict[Label, Iterator[int]] = defaultdict(count)
    return [(name, next(seen[name])) for name in labels]


def _longest_rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest run of pairs whose first members rise, by patience sorting. The second ones rise already."""
    tops: list[int] = []
    #: For each pile, the longest run that ends with its top: the last pair of that run, and the run before it.
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
    """Count the items of an array that `side` no longer has. An edited or moved one is still there."""
    if type(side) is not list:
        return len(base)
    before, after = _labels(base, side)
    gone = Counter(before) - Counter(after)
    removed = i = j = 0
    for p, q in [*align(before, after), (len(before), len(after))]:
        old, new = before[i:p], after[j:q]
        # Equally many items without an id are edits of one another.
        if len(old) != len(new) or any(type(name) is not bytes for name in old + new):
            removed += (gone & Counter(old)).total()
        i, j = p + 1, q + 1
    return removed
