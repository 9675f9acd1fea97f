"""Checkers of concurrency histories. Pure functions: a history of operations goes in, anomalies come out.

A history is linearizable if every operation can be given one instant between its call and its return, so that the
operations, one after another at these instants, answer just what they answered. Two checkers, because one is fast and
one is general:

- `check_list`: a list that is only appended to. The final list itself tells the order of the appends, and a read's
  length tells where it stands among them (the idea of Elle, Kingsbury and Alvaro, VLDB 2020), so one sweep over the
  history is enough.
- `check_object`: any object with a sequential specification. It searches for an order, as Wing and Gong do (JPDC 1993),
  and remembers the configurations it has met, as Lowe does ("Testing for linearizability", 2017); `register` and
  `ownership` are such specifications.

The outcome of an operation whose process was killed is `UNKNOWN`: it took effect before the process was gone, or never.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()


@dataclass(frozen=True, slots=True)
class Operation:
    """What one process asked, between which two instants (of one clock), and what it was told."""

    process: int
    kind: str
    argument: Any
    called: float
    returned: float = math.inf
    result: Any = UNKNOWN

    def __str__(self) -> str:
        call = f"{self.kind}({self.argument!r}) -> {self.result!r}"
        return f"{call} by process {self.process}, {self.called}..{self.returned}"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something that no order of the operations explains."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


# --- a list that is only appended to ----------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """What a read of a list saw: how many items, and which. A digest, because a million whole lists would not fit."""

    length: int
    digest: int

    @classmethod
    def of(cls, items: Iterable[str]) -> Prefix:
        """The prefix that is all of `items`."""
        seen = cls(0, 0)
        for item in items:
            seen = cls(seen.length + 1, zlib.crc32(f"{item}\n".encode(), seen.digest))
        return seen


def check_list(history: Sequence[Operation], final: Sequence[str]) -> list[Anomaly]:
    """Check a history of appends (argument: the item), reads (result: a `Prefix`) and counts (result: a number).

    Args:
        final: the items of the list after the last operation.

    Returns:
        What is wrong: "lost append", "doubled append", "invented item", "wrong items", "reordered appends",
        "stale read", "read from the future"; nothing if the history is linearizable.
    """
    anomalies = [*_miscounted(history, final), *_wrong_items(history, final)]
    return anomalies + list(_against_time(_placed(history, final)))


def _miscounted(history: Sequence[Operation], final: Sequence[str]) -> Iterator[Anomaly]:
    times = Counter(final)
    appends = [operation for operation in history if operation.kind == "append"]
    for item in times - Counter({operation.argument: 1 for operation in appends}):
        kind = "invented item" if times[item] == 1 else "doubled append"
        yield Anomaly(kind, f"{item!r} stands {times[item]} times in the final list")
    for operation in appends:
        if operation.result is not UNKNOWN and operation.argument not in times:
            yield Anomaly("lost append", f"{operation} is not in the final list")


def _wrong_items(history: Sequence[Operation], final: Sequence[str]) -> Iterator[Anomaly]:
    digests = [0]
    for item in final:
        digests.append(zlib.crc32(f"{item}\n".encode(), digests[-1]))
    for operation in history:
        if operation.kind == "append" or operation.result is UNKNOWN:
            continue
        length = _length_seen(operation)
        if length > len(final) or (operation.kind == "read" and operation.result[1] != digests[length]):
            yield Anomaly("wrong items", f"{operation} saw what is no beginning of the final list")


def _length_seen(operation: Operation) -> int:
    return int(operation.result[0] if operation.kind == "read" else operation.result)


def _placed(history: Sequence[Operation], final: Sequence[str]) -> list[tuple[int, Operation]]:
    """Each operation with its place in the one order that the final list allows: reads between the appends, which are
    odd.
    """
    places: dict[str, int] = {}
    for index, item in enumerate(final):
        places.setdefault(item, 2 * index + 1)
    placed = []
    for operation in history:
        if operation.kind == "append":
            if operation.argument in places:
                placed.append((places[operation.argument], operation))
        elif operation.result is not UNKNOWN:
            placed.append((2 * _length_seen(operation), operation))
    return placed


def _against_time(placed: list[tuple[int, Operation]]) -> Iterator[Anomaly]:
    """The operations that stand before one which had returned when they were called: for each, one witness."""
    placed = sorted(placed, key=lambda entry: entry[0], reverse=True)
    start = 0
    witness: Operation | None = None
    while start < len(placed):
        end = start
        while end < len(placed) and placed[end][0] == placed[start][0]:
            end += 1
        # Those that share a place are reads of one state: their order among themselves does not matter.
        same_place = [operation for _, operation in placed[start:end]]
        for operation in same_place:
            if witness is not None and witness.returned < operation.called:
                yield Anomaly(_name_of_inversion(operation, witness), f"{operation} stands before {witness}")
        witness = min([*same_place, *([witness] if witness else [])], key=lambda operation: operation.returned)
        start = end


def _name_of_inversion(earlier: Operation, later: Operation) -> str:
    if earlier.kind != "append":
        return "stale read"
    return "reordered appends" if later.kind == "append" else "read from the future"


# --- any object with a sequential specification -----------------------------------------------------------------------

State = TypeVar("State", bound=Hashable)
#: From a state and an operation to the state after it and the answer it must give.
Specification = Callable[[State, Operation], tuple[State, Any]]


def check_object(history: Iterable[Operation], initial: State, specification: Specification[State]) -> list[Anomaly]:
    """Search for an order of the operations that explains every answer; "not linearizable" if there is none.

    A configuration is what was put in order already (all operations before `low`, and those whose bits are set after
    it) and the state that they leave. The same configuration reached twice has the same future, so it is looked at
    once.
    """
    operations = sorted(history, key=lambda operation: operation.called)
    start = (0, 0, initial)
    met, to_visit, furthest = {start}, [start], 0
    while to_visit:
        low, ordered, state = to_visit.pop()
        furthest = max(furthest, low)
        if low == len(operations):
            return []
        for index in _next(operations, low, ordered):
            for after in _states_after(state, operations[index], specification):
                configuration = (*_advance(low, ordered | 1 << (index - low)), after)
                if configuration not in met:
                    met.add(configuration)
                    to_visit.append(configuration)
    return [
        Anomaly("not linearizable", f"no order of the first {furthest + 1} operations explains {operations[furthest]}")
    ]


def _next(operations: Sequence[Operation], low: int, ordered: int) -> Iterator[int]:
    """The operations that may come next: called before any other that is left has returned."""
    earliest_return = math.inf
    for index in range(low, len(operations)):
        if not ordered >> (index - low) & 1:
            operation = operations[index]
            if operation.called > earliest_return:
                return
            earliest_return = min(earliest_return, operation.returned)
            yield index


def _states_after(state: State, operation: Operation, specification: Specification[State]) -> set[State]:
    after, answer = specification(state, operation)
    if operation.result is UNKNOWN:
        return {state, after}
    return {after} if answer == operation.result else set()


def _advance(low: int, ordered: int) -> tuple[int, int]:
    """Drop the leading run of set bits: the window then stays as small as the number of concurrent operations."""
    run = (~ordered & (ordered + 1)).bit_length() - 1
    return low + run, ordered >> run


class Versioned(NamedTuple):
    """A register: a value, the number of the write that put it there, and the version by which that write is named.

    The version of a write whose process was killed is None until somebody is told it.
    """

    revision: int
    version: str | None
    value: Any

    def after(self, value: Any, version: str | None) -> Versioned:
        """The register after the next write."""
        return Versioned(self.revision + 1, version, value)

    def named(self, version: str | None) -> Versioned:
        """The same, by the version that somebody was told, if nobody was told one before."""
        return self if self.version is not None else self._replace(version=version)


def register(state: Versioned, operation: Operation) -> tuple[Versioned, Any]:
    """The specification of a register.

    `read()` tells revision, version and value; `write(value)` tells its version; `swap((expected, value))` writes if
    the value is the expected one; `put((version, value))` writes if the version is that one. Both tell whether they
    did, and the version that stands then, or None for it.
    """
    is_known = operation.result is not UNKNOWN
    match operation.kind, operation.argument:
        case "read", _:
            seen = state.named(operation.result[1] if is_known else None)
            return seen, seen
        case "write", value:
            version = operation.result if is_known else None
            return state.after(value, version), version
        case ("swap" | "put") as kind, (expected, value):
            told = operation.result[1] if is_known else None
            hit = (state.value if kind == "swap" else state.version) == expected
            after = state.after(value, told) if hit else state.named(told)
            return after, (hit, None if told is None else after.version)
    raise ValueError(operation.kind)


def check_versions(history: Iterable[Operation]) -> list[Anomaly]:
    """Check of a register's history that no version names two writes: "version of two commits".

    That no write has two versions is a matter of the register's order. Each value is written once.
    """
    values: dict[str, set[Any]] = defaultdict(set)
    for operation in history:
        match operation.kind, operation.argument, operation.result:
            case "read", _, (_, version, value):
                values[version].add(value)
            case "write", value, str(version):
                values[version].add(value)
            case "swap" | "put", (_, value), (True, str(version)):
                values[version].add(value)
    return [
        Anomaly("version of two commits", f"{version} names {sorted(map(str, found))}")
        for version, found in values.items()
        if len(found) > 1
    ]


class Owned(NamedTuple):
    """Which stream owns a session, whose it is, and which processes are dead."""

    stream_id: str | None = None
    process: int | None = None
    is_cancelled: bool = False
    dead: frozenset[int] = frozenset()

    @property
    def is_live(self) -> bool:
        return self.stream_id is not None and self.process not in self.dead

    def freed(self) -> Owned:
        return Owned(dead=self.dead)


def ownership(state: Owned, operation: Operation) -> tuple[Owned, Any]:
    """The specification of a session's stream; the argument is a stream id.

    `read()` tells the active stream; `start` tells None, or the stream that is in the way; `end` (finish or fail),
    `cancel` and `force` tell whether that stream owned the session; `asked` tells whether it was cancelled or has lost
    the session; `clear` tells whether it was the owner, and dead. `die`: all at once, what this process owns is stale.
    """
    stream_id = operation.argument
    is_owner = stream_id is not None and state.stream_id == stream_id
    match operation.kind:
        case "read":
            return state, state.stream_id
        case "start" if state.is_live:
            return state, state.stream_id
        case "start":
            return Owned(stream_id, operation.process, dead=state.dead), None
        case "end" | "force":
            return (state.freed() if is_owner else state), is_owner
        case "asked":
            return state, not is_owner or state.is_cancelled
        case "cancel":
            cancelled = state._replace(is_cancelled=True) if state.is_live else state.freed()
            return (cancelled if is_owner else state), is_owner
        case "clear":
            is_stale = is_owner and not state.is_live
            return (state.freed() if is_stale else state), is_stale
        case "die":
            return state._replace(dead=state.dead | {operation.process}), None
    raise ValueError(operation.kind)
