"""Much data as it is at one instant, while other threads may change it: looked at, compared and encoded in one call of C.

Each step is a call of C on what the steps before it have found, and all of them run in one call of C: as there is no bytecode
in between, no other thread runs. A look before the encoding, or one before and one after it, would cost less thought and prove
less: another thread may put a value there and take it away again. Values that never change (strings, numbers) are found by the
steps, and judged later.
"""

from __future__ import annotations

import gc
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, compress, filterfalse, repeat
from typing import Any

import msgspec

MAX_VALUES = 10_000_000
#: A list of so many items is looked at as a whole, not one by one.
MANY = 64
#: From so many items on, to look whether a list is as it was costs less than to encode it.
KEEP_FROM = 256
#: So many levels below the values that a look begins with. Of a message: field, part, call, arguments, and four for them.
LEVELS = 8

_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines

_KEYS = frozenset({str})
_CONTAINERS = frozenset({dict, list})
_KINDS = _CONTAINERS | {str, bool, type(None), int, float}

Step = Callable[[], object]
"""Of several, the first that returns something true has found a reason to go no further."""


class _Level:
    """What stands on one level of some data: containers, and all that they hold."""

    __slots__ = ("dicts", "keys", "kinds", "lists", "sizes", "values")

    def __init__(self) -> None:
        self.dicts: list[dict[Any, Any]] = []
        self.lists: list[list[Any]] = []
        self.sizes: list[int] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self.kinds: set[type] = set()

    # What these give is as it is when it is asked for.

    def sizes_now(self) -> Iterator[int]:
        return chain(map(len, self.dicts), map(len, self.lists))

    def keys_now(self) -> Iterator[Any]:
        return chain.from_iterable(self.dicts)

    def values_now(self) -> Iterator[Any]:
        return chain(chain.from_iterable(map(dict.values, self.dicts)), chain.from_iterable(self.lists))

    def of_kind(self, kind: type) -> Iterator[Any]:
        """Those values that are of a kind. If `kinds` is without it by then, none is looked at."""
        found = compress(self.values, map(operator.is_, map(type, self.values), repeat(kind)))
        return chain.from_iterable(compress((found,), map(self.kinds.__contains__, (kind,))))

    def and_those_of(self, other: _Level) -> _Level:
        """What stands on both; `kinds` is only for a look that is under way."""
        both = _Level()
        both.dicts, both.lists, both.sizes = (
            self.dicts + other.dicts,
            self.lists + other.lists,
            self.sizes + other.sizes,
        )
        both.keys, both.values = self.keys + other.keys, self.values + other.values
        return both


class Look:
    """What some values hold, level by level."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.levels = [_Level() for _ in range(1 + LEVELS)]
        self.steps = list(self._planned(values))

    def _planned(self, values: Iterable[Any]) -> Iterator[Step]:
        kinds_of_keys: set[type] = set()
        above = None
        for level in self.levels:
            if above is not None:
                yield partial(level.dicts.extend, above.of_kind(dict))
                yield partial(level.lists.extend, above.of_kind(list))
                yield partial(level.sizes.extend, level.sizes_now())
                # A list that contains itself ten times over has 10**8 values on the eighth level.
                yield partial(any, map(MAX_VALUES.__lt__, map(sum, (level.sizes,))))
                yield partial(level.keys.extend, level.keys_now())
                yield partial(kinds_of_keys.update, map(type, level.keys))
            yield partial(level.values.extend, values if above is None else level.values_now())
            yield partial(level.kinds.update, map(type, level.values))
            above = level
        kinds = chain.from_iterable([level.kinds for level in self.levels])
        yield partial(any, filterfalse(_KINDS.__contains__, kinds))
        yield partial(kinds_of_keys.difference, _KEYS)
        yield partial(_CONTAINERS.intersection, self.levels[-1].kinds)

    @property
    def count(self) -> int:
        """How many values there are, on all levels."""
        return sum(len(level.values) for level in self.levels)

    def has_exact_numbers(self) -> bool:
        """Tell whether no float is NaN or infinite, and no integer longer than 64 bits.

        Longer integers may be fine, but to write one out asks for pending signals, and so may let other threads run.
        """
        integers = [0, *chain.from_iterable(level.of_kind(int) for level in self.levels)]
        floats = chain.from_iterable(level.of_kind(float) for level in self.levels)
        are_short = min(integers) >= -(2**63) and max(integers) < 2**64
        return are_short and all(map(math.isfinite, floats))


def count_exact(container: Any) -> int:
    """How many values there are in a container, on all levels, if a look shows that each is JSON's own; else 0."""
    look = Look([container])
    is_exact = _run(look.steps) and look.has_exact_numbers()
    return look.count - 1 if is_exact and look.count <= MAX_VALUES else 0


def _run(steps: Iterable[Step]) -> bool:
    """Run steps in one instant. False if one of them has found a reason to go no further."""
    run = filter(None, map(operator.call, steps))
    collections = _garbage_collections()
    try:
        is_refused = bool(next(run, None))
    except (ValueError, RuntimeError):
        # A lone surrogate, an integer too long to write out; a dict that a finalizer changed.
        return False
    # Before Python 3.12, one may begin in the middle, and a finalizer let other threads run.
    return not is_refused and _garbage_collections() == collections


def _garbage_collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


class Seen:
    """What items of a list held when they were encoded, as objects.

    While all of these still stand where they stood, the items still have the lines that they had. To see that costs half of
    what it takes to encode them.
    """

    def __init__(self, levels: Sequence[_Level] = ()) -> None:
        self._levels = levels

    @property
    def count(self) -> int:
        """How many items they are."""
        return len(self._levels[0].values) if self._levels else 0

    @property
    def count_of_values(self) -> int:
        """How many values there are, on all levels."""
        return sum(len(level.values) for level in self._levels)

    def unlike(self, items: list[Any]) -> Iterator[Step]:
        """Steps that find whether a list no longer begins with these items, or one of these is not as it was."""
        for level in self._levels[:1]:
            yield partial(any, map(operator.is_not, level.values, chain(items, repeat(self))))
        for level in self._levels[1:]:
            if not level.sizes:
                return
            yield partial(any, map(operator.ne, (level.sizes,), map(list, (level.sizes_now(),))))
            yield partial(any, map(operator.is_not, level.keys, level.keys_now()))
            yield partial(any, map(operator.is_not, level.values, level.values_now()))

    def and_then(self, look: Look) -> Seen:
        """These items, and behind them those of a look."""
        if not self._levels:
            return Seen(look.levels)
        pairs = zip(self._levels, look.levels, strict=True)
        return Seen([before.and_those_of(behind) for before, behind in pairs])


class EncodedList:
    """A list, encoded one item a line: those that were seen before, those that are new, and the rest.

    The rest are those that will not be seen the next time: the last item, since it is the one that grows, token by token; or
    all, if nothing is kept for a next time.
    """

    def __init__(self, items: list[Any], before: Seen, *, is_kept: bool) -> None:
        self._before = before
        self._behind: list[Any] = []
        self._new = Look(_slices(self._behind, slice(None, -1))) if is_kept else None
        self.rest: list[Any] = []
        #: The lines of the new ones, and those of the rest; in short pieces, as one long one would take fresh memory.
        self.pieces: list[bytes] = []
        self.rest_pieces: list[bytes] = []
        self.looked: list[Step] = [
            *before.unlike(items),
            partial(self._behind.extend, _slices(items, slice(before.count, None))),
            partial(self.rest.extend, _slices(self._behind, slice(-1 if is_kept else 0, None))),
        ]
        size = max(len(items) - before.count, 1)
        if self._new is None:
            self.encoded = [_encoding(self.rest_pieces, self.rest, size)]
        else:
            self.looked += self._new.steps
            new = self._new.levels[0].values
            self.encoded = [_encoding(self.pieces, new, size), _encoding(self.rest_pieces, self.rest, 1)]

    @property
    def count(self) -> int:
        return self._before.count + len(self._behind)

    @property
    def seen(self) -> Seen:
        """What is to be seen the next time."""
        return self._before.and_then(self._new) if self._new is not None and self.pieces else self._before

    @property
    def count_of_values(self) -> int:
        """How many values there are, on all levels, but for those of the rest."""
        return self._before.count_of_values + (self._new.count if self._new is not None else 0)

    def has_exact_numbers(self) -> bool:
        return self._new is None or self._new.has_exact_numbers()


def _slices(items: list[Any], part: slice) -> Iterator[Any]:
    """A part of a list, as it is when it is asked for."""
    return chain.from_iterable(map(items.__getitem__, (part,)))


def _encoding(pieces: list[bytes], items: list[Any], size: int) -> Step:
    """The step that encodes items, `MANY` a piece; about so many are expected, and the last piece is open for more."""
    starts = range(0, size, MANY)
    cuts: Iterator[slice] = map(slice, starts, chain(starts[1:], (None,)))
    return partial(pieces.extend, filter(None, map(_encode_lines, map(items.__getitem__, cuts))))


def encode(
    data: dict[str, Any], known: Mapping[str, Any], values: Sequence[Any], lists: Sequence[EncodedList]
) -> list[bytes] | None:
    """Encode values one by one, and lists, checked, all as they are at one instant.

    Args:
        data: what other threads may change meanwhile.
        known: a copy of it, which `values` and the lists were taken from; together they are all that it holds.

    Returns:
        The encoded values. None if `data` is no longer like `known`, holds something unusual (`codec.captured` can do that, or
        says what is wrong), or no longer what was seen of a list: then nothing has become of the lists.
    """
    look, keys, there = Look(chain(values, *[each.rest for each in lists])), list[str](), list[Any]()
    encoded = list[bytes]()
    steps: list[Step] = [partial(keys.extend, data), partial(there.extend, data.values())]
    steps += [*chain.from_iterable(each.looked for each in lists), *look.steps]
    steps += [partial(encoded.extend, map(_encode, values)), *chain.from_iterable(each.encoded for each in lists)]
    if not _run(steps) or len(keys) != len(known) or not _KEYS.issuperset(map(type, keys)):
        return None
    if not all(map(operator.is_, chain(keys, there), chain(known, known.values()))):
        return None
    if look.count + len(lists) + sum(each.count_of_values for each in lists) > MAX_VALUES:
        return None
    return encoded if look.has_exact_numbers() and all(each.has_exact_numbers() for each in lists) else None
