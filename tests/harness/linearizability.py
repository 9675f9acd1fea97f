"""Checkers of concurrency histories. They are pure functions: operations go in, anomalies come out.

A history is linearizable if every operation can be given one instant between its call and its return, so that the
operations, one after another at these instants, answer just what they answered. There are two checkers, because one is
fast and one is general:

- `check_list` checks a list that is only appended to. The final list itself tells the order of the appends, and a
  read's length tells where it stands among them (the idea of Elle, Kingsbury and Alvaro, VLDB 2020). So one sweep over
  the history is enough.
- `check_object` checks any object with a sequential specification. It searches for an order, as Wing and Gong do (JPDC
  1993). It remembers the configurations it has met, as Lowe does ("Testing for linearizability", 2017). `register` and
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
    """A call of one process, the two instants around it (of one clock), and its answer."""

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
    """The content that a read of a list saw: how many items, and which.

    The items are a digest, because a million whole lists would not fit. `version` names the commit that the read saw.
    It is None if the read was not told.
    """

    length: int
    digest: int
    version: str | None = None

    @classmethod
    def of(cls, items: Iterable[str], version: str | None = None) -> Prefix:
        """Return the prefix that is all of `items`."""
        length = digest = 0
        for item in items:
            length, digest = length + 1, zlib.crc32(f"{item}\n".encode(), digest)
        return cls(length, digest, version)


#: The operations that add to the list, if they take effect.
APPENDS = ("append", "append_if", "extend")
#: The number of items of a tail, unless the list has fewer.
TAIL = 5


def check_list(history: Sequence[Operation], final: Sequence[str]) -> list[Anomaly]:
    """Check a history of a list that is only appended to, so that each commit makes it longer.

    `append(item)` and `extend((one, two))` tell the version that they made, or None. `append_if((version, item))`
    appends if the version is that one. It tells whether it did, and the version that stands then. `read()` tells a
    `Prefix`. `count()` tells the number of items and the version, `tail()` the last items, and `at()` the version.

    Args:
        final: the items of the list after the last operation.

    Returns:
        The anomalies: "lost append", "doubled append", "invented item", "split pair", "wrong items", "version of two
        commits", "commit of two versions", "append to another version", "right version refused", "reordered appends",
        "stale read", "read from the future". There are none if the history is linearizable.
    """
    places: dict[str, int] = {}
    for index, item in enumerate(final):
        places.setdefault(item, index)
    lengths = _lengths_of_versions(history, places)
    anomalies = [
        *_miscounted(history, final),
        *_wrong_items(history, final, places),
        *_split_pairs(history, places),
        *_wrong_versions(history, places),
        *_wrong_conditions(history, places, lengths),
    ]
    return anomalies + list(_against_time(_placed(history, places, lengths)))


def _added(operation: Operation) -> tuple[str, ...]:
    """Return the items that an operation adds to the list, if it takes effect."""
    match operation.kind, operation.argument, operation.result:
        case "append_if", _, (False, _):
            return ()
        case "append_if", (_, item), _:
            return (item,)
        case "append", item, _:
            return (item,)
        case "extend", (one, two), _:
            return (one, two)
    return ()


def _miscounted(history: Sequence[Operation], final: Sequence[str]) -> Iterator[Anomaly]:
    times = Counter(final)
    for item in times - Counter({item: 1 for operation in history for item in _added(operation)}):
        kind = "invented item" if times[item] == 1 else "doubled append"
        yield Anomaly(kind, f"{item!r} stands {times[item]} times in the final list")
    for operation in history:
        if operation.result is not UNKNOWN and not times.keys() >= {*_added(operation)}:
            yield Anomaly("lost append", f"{operation} is not in the final list")


def _wrong_items(history: Sequence[Operation], final: Sequence[str], places: dict[str, int]) -> Iterator[Anomaly]:
    digests = [0]
    for item in final:
        digests.append(zlib.crc32(f"{item}\n".encode(), digests[-1]))
    for operation in history:
        length = _length_seen(operation, places, {})
        is_wrong = length is not None and length > len(final)
        if operation.kind == "read" and length is not None and not is_wrong:
            is_wrong = operation.result[1] != digests[length]
        if operation.kind == "tail" and operation.result is not UNKNOWN:
            whole = final[: length or 0]
            is_wrong = length is None or tuple(operation.result) != tuple(whole[-TAIL:])
        if is_wrong:
            yield Anomaly("wrong items", f"{operation} saw what is no beginning of the final list")


def _length_seen(operation: Operation, places: dict[str, int], lengths: dict[str, int]) -> int | None:
    """Return how long the list was that a look has seen. None if the operation is no look, or does not tell it."""
    match operation.kind, operation.result:
        case (("read" | "count"), (int(length), *_)):
            return length
        case "tail", (*_, last):
            return places[last] + 1 if last in places else None
        case "tail", ():
            return 0
        case ("at", str(version)) | ("append_if", (False, str(version))):
            return lengths.get(version)
    return None


def _length_made(operation: Operation, places: dict[str, int]) -> int | None:
    """Return how long the list was just behind the items that an operation has added. None if it added nothing."""
    added = _added(operation)
    return places[added[-1]] + 1 if added and added[-1] in places else None


def _version_told(operation: Operation) -> str | None:
    match operation.kind, operation.result:
        case (("append" | "extend" | "at"), str(version)):
            return version
        case (("append_if" | "count"), (_, str(version))):
            return version
        case "read", (_, _, str(version)):
            return version
    return None


def _versions_of_lengths(history: Sequence[Operation], places: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Yield each version that was told, with the length of the list that it names."""
    for operation in history:
        version = _version_told(operation)
        length = _length_made(operation, places)
        length = _length_seen(operation, places, {}) if length is None else length
        if version is not None and length is not None:
            yield version, length


def _lengths_of_versions(history: Sequence[Operation], places: dict[str, int]) -> dict[str, int]:
    return dict(_versions_of_lengths(history, places))


def _wrong_versions(history: Sequence[Operation], places: dict[str, int]) -> Iterator[Anomaly]:
    lengths: dict[str, set[int]] = defaultdict(set)
    versions: dict[int, set[str]] = defaultdict(set)
    for version, length in _versions_of_lengths(history, places):
        lengths[version].add(length)
        versions[length].add(version)
    for version, found in lengths.items():
        if len(found) > 1:
            yield Anomaly("version of two commits", f"{version} names lists of {sorted(found)} items")
    for length, names in versions.items():
        if len(names) > 1:
            yield Anomaly("commit of two versions", f"the list of {length} items is {sorted(names)}")


def _wrong_conditions(
    history: Sequence[Operation], places: dict[str, int], lengths: dict[str, int]
) -> Iterator[Anomaly]:
    """Check that a change for a version is made to that version, and to no other.

    Check also that it is made if that version stands.
    """
    for operation in history:
        if operation.kind == "append_if":
            version, item = operation.argument
            if _added(operation) and item in places and lengths.get(version, places[item]) != places[item]:
                yield Anomaly("append to another version", str(operation))
            if operation.result == (False, version):
                yield Anomaly("right version refused", str(operation))


def _split_pairs(history: Sequence[Operation], places: dict[str, int]) -> Iterator[Anomaly]:
    """Check that the two items of a pair stand one behind the other, and that nobody sees the first one alone."""
    halves: dict[int, Operation] = {}
    for operation in history:
        if operation.kind == "extend":
            found = [places[item] for item in operation.argument if item in places]
            if operation.argument[0] in places:
                halves[found[0] + 1] = operation
            # Half of a pair that was answered is a lost append.
            is_half = len(found) == 1 and operation.result is UNKNOWN
            if is_half or (len(found) == 2 and found[1] != found[0] + 1):
                yield Anomaly("split pair", f"{operation}: its items stand at {found}")
    for operation in history:
        if (half := halves.get(_length_seen(operation, places, {}) or 0)) is not None:
            yield Anomaly("split pair", f"{operation} saw half of {half}")


def _placed(
    history: Sequence[Operation], places: dict[str, int], lengths: dict[str, int]
) -> list[tuple[int, Operation]]:
    """Return each operation with its place in the one order that the final list allows.

    Appends have odd places, and looks stand between them.
    """
    placed = []
    for operation in history:
        added, length = _added(operation), _length_seen(operation, places, lengths)
        if added and added[0] in places:
            placed.append((2 * places[added[0]] + 1, operation))
        elif length is not None:
            placed.append((2 * length, operation))
    return placed


def _against_time(placed: list[tuple[int, Operation]]) -> Iterator[Anomaly]:
    """Find the operations that stand before one which had returned when they were called. Name one witness for each."""
    placed = sorted(placed, key=lambda entry: entry[0], reverse=True)
    start = 0
    witness: Operation | None = None
    while start < len(placed):
        end = start
        while end < len(placed) and placed[end][0] == placed[start][0]:
            end += 1
        # Operations that share a place are reads of one state, so their order among themselves does not matter.
        same_place = [operation for _, operation in placed[start:end]]
        for operation in same_place:
            if witness is not None and witness.returned < operation.called:
                yield Anomaly(_name_of_inversion(operation, witness), f"{operation} stands before {witness}")
        witness = min([*same_place, *([witness] if witness else [])], key=lambda operation: operation.returned)
        start = end


def _name_of_inversion(earlier: Operation, later: Operation) -> str:
    if not _added(earlier):
        return "stale read"
    return "reordered appends" if _added(later) else "read from the future"


# --- any object with a sequential specification -----------------------------------------------------------------------

State = TypeVar("State", bound=Hashable)
#: Takes a state and an operation. Returns the state after it and the answer it must give.
Specification = Callable[[State, Operation], tuple[State, Any]]


def check_object(history: Iterable[Operation], initial: State, specification: Specification[State]) -> list[Anomaly]:
    """Search for an order of the operations that explains every answer.

    The anomaly is "not linearizable" if there is none. A configuration is the operations that are in order already, and
    the state that they leave. These are all operations before `low`, and those whose bits are set after it. The same
    configuration reached twice has the same future, so it is looked at once.
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
    """Yield the operations that may come next: called before any other that is left has returned."""
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
    """Drop the leading run of set bits, so that the window stays as small as the number of concurrent operations."""
    run = (~ordered & (ordered + 1)).bit_length() - 1
    return low + run, ordered >> run


class Versioned(NamedTuple):
    """A register: a value, the number of the write that put it there, and the version that names that write.

    The version of a write whose process was killed is None until somebody is told it. Before the first write there is
    no register.
    """

    revision: int
    version: str | None
    value: Any

    @property
    def is_there(self) -> bool:
        return self.revision > 0

    def after(self, value: Any, version: str | None) -> Versioned:
        """Return the register after the next write."""
        return Versioned(self.revision + 1, version, value)

    def named(self, version: str | None) -> Versioned:
        """Return the register with the version that somebody was told, if nobody was told one before."""
        return self if self.version is not None or not self.is_there else self._replace(version=version)


#: No register.
ABSENT = Versioned(0, None, None)


def register(state: Versioned, operation: Operation) -> tuple[Versioned, Any]:
    """Apply the specification of a register, which can be created and deleted.

    Looks tell None where there is none: `read()` tells revision, version and value, `look()` revision and version, and
    `value()` the value. `exists()` tells whether there is one.

    `write(value)` tells its version, and makes the register if there is none. `create(value)` does so only if there is
    none, and otherwise tells False. `swap((expected, value))` writes if the value is the expected one, `put((version,
    value))` if the version is that one. Both tell whether they did, and the version that stands then, or None for it.
    `delete()` tells whether there was one. `delete_if(version)` tells whether it was that one. If it was another one,
    it also tells the version that stands.
    """
    version = _version_in(operation)
    match operation.kind, operation.argument:
        case "read", _:
            seen = state.named(version)
            return seen, seen if seen.is_there else None
        case "look", _:
            seen = state.named(version)
            return seen, (seen.revision, seen.version) if seen.is_there else None
        case "value", _:
            return state, state.value
        case "exists", _:
            return state, state.is_there
        case "write", value:
            return state.after(value, version), version
        case "create", value:
            return (state, False) if state.is_there else (state.after(value, version), version)
        case ("swap" | "put") as kind, (expected, value):
            hit = state.is_there and (state.value if kind == "swap" else state.version) == expected
            after = state.after(value, version) if hit else state.named(version)
            return after, (hit, None if version is None else after.version)
        case "delete", _:
            return ABSENT, state.is_there
        case "delete_if", expected:
            hit = state.is_there and state.version == expected
            after = ABSENT if hit else state.named(version)
            return after, (hit, None if hit else after.version)
    raise ValueError(operation.kind)


def _version_in(operation: Operation) -> str | None:
    """Return the version that an operation on a register was told."""
    match operation.kind, operation.result:
        case (("read" | "look"), (_, str(version), *_)):
            return version
        case (("write" | "create"), str(version)):
            return version
        case (("swap" | "put" | "delete_if"), (_, str(version))):
            return version
    return None


def check_versions(history: Iterable[Operation]) -> list[Anomaly]:
    """Check that no version in a register's history names two writes: "version of two commits".

    Each value is written once. The check of the register's order shows whether a write has two versions.
    """
    values: dict[str, set[Any]] = defaultdict(set)
    for operation in history:
        match operation.kind, operation.argument, operation.result:
            case "read", _, (_, version, value):
                values[version].add(value)
            case (("write" | "create"), value, str(version)):
                values[version].add(value)
            case (("swap" | "put"), (_, value), (True, str(version))):
                values[version].add(value)
    return [
        Anomaly("version of two commits", f"{version} names {sorted(map(str, found))}")
        for version, found in values.items()
        if len(found) > 1
    ]


class Owned(NamedTuple):
    """The stream that owns a session, the process of that stream, and the processes that are dead."""

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
    """Apply the specification of a session's stream. The argument is a stream id.

    `read()` tells the active stream. `start` tells None, or the stream that is in the way. `held` (a transaction of the
    stream), `end` (finish or fail), `cancel` and `force` tell whether that stream owned the session. `asked` tells
    whether the stream was cancelled or has lost the session. `clear` tells whether it was the owner, and dead.
    `again((stream, first))` starts the prompt of the first stream once more, unless that stream runs. It tells what has
    become of the prompt, and the stream that runs then. `die` makes everything that this process owns stale at once.
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
        case "again" if state.is_live:
            return state, ("runs" if state.stream_id == stream_id[1] else "is busy", state.stream_id)
        case "again":
            return Owned(stream_id[0], operation.process, dead=state.dead), ("has started", stream_id[0])
        case "held":
            return state, is_owner
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
