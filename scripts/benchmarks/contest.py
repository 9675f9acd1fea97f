"""The contest: one message appended, and the whole conversation loaded, by every peer and at every size."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

import persist
from benchmarks import ours, peers
from benchmarks.measure import Action, Effort, interleaved
from benchmarks.peers import Peer
from benchmarks.tables import Findings, Table, Target, at_least, at_most, compared, ratio, shown
from benchmarks.workload import SESSION, new_message, open_store
from persist.storage import disk

ALL = (*peers.OTHERS, *ours.APPENDS, *ours.VERBS)
DECODE = "limit: msgspec.json.decode of the same bytes"
LOAD, LOAD_FRESH = ours.APPEND.replace("append", "load"), "persist: store.load(), nothing journaled"
HEAD, HEAD_FRESH = ours.APPEND.replace("append", "head"), "persist: store.head(), nothing journaled"
READ = "limit: open + read of 4 KiB + close"

#: Up to this size, messages are appended to twenty copies in turn, so that no copy grows far from its first size.
SMALL = 100
COPIES = 20


@dataclass(frozen=True, slots=True)
class Costs:
    """Median seconds at one size."""

    messages: int
    appends: dict[str, float]
    loads: dict[str, float]
    heads: dict[str, float]


class Turns:
    """The copies of one peer, to which messages are appended in turn."""

    def __init__(self, copies: list[Peer]) -> None:
        self._copies = itertools.cycle(copies)

    def before(self) -> None:
        self._peer = next(self._copies)
        self._peer.before()
        self._message = new_message()

    def run(self) -> None:
        self._peer.append(self._message)


@contextmanager
def prepared(directory: Path, messages: int, kinds: list[type[Peer]]) -> Iterator[dict[str, list[Peer]]]:
    """Yield every peer with its conversation. Close and remove them at the end.

    Peers that fail are left out, and a line is printed for each.
    """
    with ExitStack() as stack:
        found: dict[str, list[Peer]] = {}
        for number, kind in enumerate(kinds):
            places = [directory / f"{number}-{copy}" for copy in range(COPIES if messages <= SMALL else 1)]
            try:
                found[kind.name] = [stack.enter_context(_warm(kind, place, messages)) for place in places]
            except Exception as error:
                if issubclass(kind, ours.Append):
                    raise
                # Another version of the peer may fail in any way. The other peers go on.
                print(f"Skipped: {kind.name} at {messages:,} messages: {type(error).__name__}: {error}", flush=True)
        yield found


@contextmanager
def _warm(kind: type[Peer], place: Path, messages: int) -> Iterator[Peer]:
    """Yield a peer that has appended once."""
    place.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        peer = kind(place, messages)
        stack.callback(peer.close)
        peer.before()
        peer.append(new_message())
        yield peer


def costs(directory: Path, messages: int, names: list[str], effort: Effort) -> Costs:
    """Measure all peers of these names at one size.

    This needs a process of its own, because some of the peers start threads.
    """
    warnings.simplefilter("ignore")
    kinds = [kind for kind in ALL if kind.name in names]
    with prepared(directory, messages, kinds) as found:
        actions = {}
        for name, copies in found.items():
            turns = Turns(copies)
            actions[name] = Action(turns.run, turns.before, leaves_dirt=copies[0].durable != peers.YES)
        appends = interleaved(actions, effort)
        with_journal = found[ours.APPEND][0]
        assert isinstance(with_journal, ours.Append)
        fresh = open_store(directory / f"fresh-{messages}")
        fresh.create(SESSION, with_journal.load().data)
        loads = interleaved(_loads(found, with_journal, fresh), effort)
        heads = interleaved(_heads(with_journal, fresh), effort)
    return Costs(messages, appends, loads, heads)


def growth(directory: Path, sizes: tuple[int, ...], effort: Effort) -> Findings:
    """Measure `append` to sessions of all sizes in turns.

    The sizes take turns, because the disk is never the same from one minute to the next.
    """
    names = {size: f"{size:,} messages" for size in sizes if size > SMALL}
    actions = {}
    for size, name in names.items():
        place = directory / str(size)
        place.mkdir()
        turns = Turns([ours.Append(place, size)])
        actions[name] = Action(turns.run, turns.before)
    seconds = interleaved(actions, effort)
    smallest, largest = names[min(names)], names[max(names)]
    target = at_most(f"append() at {largest}, to {smallest}", 1.5, seconds[largest] / seconds[smallest])
    return Findings([compared("store.append() at all sizes, in turns", seconds, smallest)], [target])


def _loads(found: dict[str, list[Peer]], with_journal: ours.Append, fresh: persist.Store) -> dict[str, Action]:
    content = msgspec.json.encode(with_journal.load().data)
    mine = {
        DECODE: Action(partial(msgspec.json.decode, content)),
        LOAD: Action(with_journal.load),
        LOAD_FRESH: Action(partial(fresh.load, SESSION)),
    }
    return mine | {name: Action(copies[0].load) for name, copies in found.items() if _is_loaded(copies[0])}


def _heads(with_journal: ours.Append, fresh: persist.Store) -> dict[str, Action]:
    return {
        READ: Action(partial(disk.read, fresh.path / f"{SESSION}.json", 4096)),
        HEAD: Action(with_journal.head),
        HEAD_FRESH: Action(partial(fresh.head, SESSION)),
    }


def _is_loaded(peer: Peer) -> bool:
    return type(peer).load is not Peer.load and not isinstance(peer, ours.Append)


@dataclass(frozen=True, slots=True)
class Field:
    """The peers that take part at each size, and why others do not."""

    names: dict[int, list[str]]
    skipped: list[str]


def field(sizes: tuple[int, ...], is_quick: bool) -> Field:
    """Find out which peers can run.

    This needs a process of its own, because it imports them all.
    """
    warnings.simplefilter("ignore")
    skipped, present = [], []
    for kind in ALL:
        reason = peers.why_missing(kind)
        if reason is None:
            present.append(kind)
        else:
            skipped.append(f"Skipped: {kind.name}: {reason}")
    skipped += _too_slow(present, sizes, is_quick)
    return Field({size: [kind.name for kind in present if size <= kind.most[is_quick]] for size in sizes}, skipped)


def _too_slow(kinds: list[type[Peer]], sizes: tuple[int, ...], is_quick: bool) -> Iterator[str]:
    """Yield a line for all peers that are left out at the same sizes for the same reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for kind in kinds:
        left_out = ", ".join(f"{size:,}" for size in sizes if size > kind.most[is_quick])
        if left_out:
            names.setdefault((left_out, kind.too_slow), []).append(kind.name)
    for (left_out, reason), skipped in names.items():
        yield f"Skipped at {left_out} messages, as {reason}: {'; '.join(skipped)}."


def legend() -> Table:
    """Return a table of each peer's way, and whether it survives a power cut."""
    rows = [(kind.name, kind.durable, kind.way) for kind in ALL]
    return Table("How one message is appended", ("durable", "way"), rows, ends_in_prose=True)


def findings(found: Costs) -> Findings:
    """Return the tables of one size."""
    heads = compared(f"The head of {found.messages:,} messages", found.heads, READ)
    return Findings([_append_table(found), _load_table(found), heads])


def _append_table(found: Costs) -> Table:
    durable = {kind.name: kind.durable for kind in ALL}
    sqlite, limit, replace = (found.appends.get(name) for name in (peers.SQLITE, peers.LIMIT, peers.REPLACE))
    rows = [
        (name, durable[name], shown(value), ratio(value, sqlite), ratio(value, limit), ratio(value, replace))
        for name, value in sorted(found.appends.items(), key=lambda item: item[1])
    ]
    columns = ("durable", "median", "to SQLite FULL", "to write + fdatasync", "to replace")
    return Table(f"One append to {found.messages:,} messages", columns, rows)


def _load_table(found: Costs) -> Table:
    decode, sqlite = found.loads[DECODE], found.loads.get(peers.SQLITE)
    rows = [
        (name, shown(value), ratio(value, decode), ratio(value, sqlite))
        for name, value in sorted(found.loads.items(), key=lambda item: item[1])
    ]
    note = "SQLite: SELECT of all rows and json.loads of each; lmdb, FileLock and TinyDB decode with json, too."
    return Table(f"One load of {found.messages:,} messages", ("median", "to decode", "to SQLite rows"), rows, [note])


def targets(found: list[Costs]) -> list[Target]:
    """Return the targets for one append, one small change and one load."""
    at = {costs.messages: costs for costs in found}
    return [*_append_targets(at), *_change_targets(at), *_load_targets(at)]


def _quotient(values: dict[str, float], name: str, base: str) -> float | None:
    return values[name] / values[base] if name in values and base in values else None


def _append_targets(at: dict[int, Costs]) -> Iterator[Target]:
    for size, costs in sorted(at.items()):
        name, said = (ours.ALWAYS, ', journal="always"') if size <= SMALL else (ours.APPEND, "")
        what = f"append() at {size:,}{said}, to"
        yield at_most(f"{what} SQLite WAL FULL", 1.05, _quotient(costs.appends, name, peers.SQLITE))
        yield at_most(f"{what} write + fdatasync", 1.55, _quotient(costs.appends, name, peers.LIMIT))


def _change_targets(at: dict[int, Costs]) -> Iterator[Target]:
    appends = at[10_000].appends if 10_000 in at else {}
    for name, limit in ((ours.FIELD, 1.1), (ours.CLEAR, 1.4), (ours.SAVE, 10.0)):
        what = f"{name.removeprefix('persist: ')} at 10,000, to SQLite WAL FULL"
        yield at_most(what, limit, _quotient(appends, name, peers.SQLITE))
    what = f"{ours.TURN.removeprefix('persist: ')} at 10,000, to append()"
    yield at_most(what, 1.2, _quotient(appends, ours.TURN, ours.APPEND))


def _load_targets(at: dict[int, Costs]) -> Iterator[Target]:
    loads = at[10_000].loads if 10_000 in at else {}
    for name, said in ((LOAD, ""), (LOAD_FRESH, ", nothing journaled")):
        yield at_most(f"load() at 10,000{said}, to msgspec.json.decode", 1.2, _quotient(loads, name, DECODE))
        yield at_least(f"load() at 10,000{said}, SQLite rows to it", 3.0, _quotient(loads, peers.SQLITE, name))
    for size, costs in sorted(at.items()):
        for name, said in ((HEAD, ""), (HEAD_FRESH, ", nothing journaled")):
            yield at_most(f"head() at {size:,}{said}", 0.1, costs.heads[name] * 1e3, "ms")
