"""A process that holds an old replica, while others take its journal out of use and are killed in the middle of that.

One process holds a replica of a session. A second one folds the journal, leaves journal mode, deletes the session or
accepts it, and is killed at one of its disk calls. A third one folds, or deletes the session and makes it anew. It may
be killed, too. Then the document bears the inode and the times that the replica knows. The harness forces this, because
chance alone would bring it about too rarely. Now the holder appends. Nothing acknowledged may be lost, and the append
must not land in a journal that is out of use.

A process is a store of its own here, because replicas belong to a store.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import persist
from harness.crash_scenarios import Mode, disk_of
from harness.crashes import Killed
from harness.files import file_engine
from harness.journal_scenarios import ENDLESS, FOLDING, NEVER
from persist.storage import disk

#: The disk calls of a process. `close` is not among them, because the kernel closes what a dead process has open.
CALLS = (
    *("open_known", "open_unseen", "open_directory", "read", "read_version", "read_at", "version_of", "exists"),
    *("write", "write_at", "truncate", "sync", "sync_data", "sync_directory", "replace", "unlink", "mkdir", "names"),
)
WRITES = ("write", "write_at")
#: The calls that change the disk. After any other call it is as it was before.
EFFECTS = (*WRITES, "truncate", "replace", "unlink", "mkdir", "open_known")


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill of a process before its disk call of that number, or in the middle of that call, if it is a write."""

    place: int
    is_halfway: bool = False


class Process:
    """A process whose disk calls are noted from one `running` on. It may be killed at one of them."""

    def __init__(self, kill: Kill | None = None) -> None:
        self.calls: list[str] = []
        self.is_dead = False
        self._kill = kill
        self._halves: set[int] = set()

    @property
    def kills(self) -> list[Kill]:
        """Every way to kill it before it has come to its end."""
        return [*map(Kill, range(len(self.calls))), *(Kill(place, is_halfway=True) for place in sorted(self._halves))]

    @property
    def kills_at_effects(self) -> list[Kill]:
        """The kills that leave different disks."""
        return [kill for kill in self.kills if self.calls[kill.place] in EFFECTS]

    def asks(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any, **options: Any) -> Any:
            place = len(self.calls)
            if self.is_dead:
                raise Killed
            self.calls.append(name)
            if name in WRITES and len(arguments[1]) > 1:
                self._halves.add(place)
            if self._kill is not None and self._kill.place == place:
                self.is_dead = True
                if self._kill.is_halfway:
                    fd, content, *position = arguments
                    real(fd, content[: len(content) // 2], *position)
                raise Killed
            return real(*arguments, **options)

        return ask


@contextmanager
def running(process: Process) -> Iterator[None]:
    """Do the block as this process. If it is killed, the block ends there, and nobody tidies up."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(disk, name, process.asks(name, getattr(disk, name)))
        with suppress(Killed):
            yield


# --- what is done -----------------------------------------------------------------------------------------------------

Verb = Callable[[persist.Store], Any]
KNOWN = ("m1", "m2", "m3")


def message(message_id: str) -> dict[str, str]:
    return {"id": message_id, "content": "said"}


def append(message_id: str) -> Verb:
    return lambda store: store.append("s-1", "messages", message(message_id))


def edit_by_hand(store: persist.Store) -> None:
    path = store.path / "s-1.json"
    path.write_bytes(path.read_bytes().replace(b'"title":"t"', b'"title":"T"'))


def damage(store: persist.Store) -> None:
    """Damage the first record, which the holder of the replica has read before."""
    _replace_in_journal(store, b'"id":"m2"', b'"id":"mx"')


def damage_the_opening(store: persist.Store) -> None:
    _replace_in_journal(store, b"persist_journal", b"persist-journal")


def _replace_in_journal(store: persist.Store, old: bytes, new: bytes) -> None:
    [path] = store.path.glob("s-1.*.journal")
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def delete_and_create(store: persist.Store) -> None:
    with suppress(persist.SessionNotFound):
        store.delete("s-1", force=True)
    store.create("s-1", {"title": "t", "messages": [message("new")]})


def fold(store: persist.Store) -> None:
    store.compact("s-1")


@dataclass(frozen=True)
class Deed:
    """An action of a process on the session.

    Attributes:
        verb: the action itself.
        mode: how the store of the process writes.
        adds: the id of a message that is acknowledged with the action.
        prepare: the change that is made to the files before.
        keeps: the known messages that the action must keep.
    """

    name: str
    verb: Verb
    mode: Mode = ENDLESS
    adds: str | None = None
    prepare: Verb = lambda store: None
    keeps: tuple[str, ...] = KNOWN

    def __str__(self) -> str:
        return self.name


#: The ways in which a journal goes out of use.
FIRST = [
    Deed("fold", fold),
    Deed("append that folds", append("a"), FOLDING, adds="a"),
    Deed("append that leaves", append("a"), NEVER, adds="a"),
    Deed("compact alone", lambda store: store.compact("s-1", alone=True)),
    Deed("delete", lambda store: store.delete("s-1")),
    Deed("delete of a damaged session", lambda store: store.delete("s-1", force=True), prepare=damage, keeps=("m1",)),
    Deed("accept of an edit", lambda store: store.accept("s-1"), prepare=edit_by_hand),
    Deed("accept of a damaged journal", lambda store: store.accept("s-1"), prepare=damage, keeps=("m1",)),
    Deed("accept of a damaged opening", lambda store: store.accept("s-1"), prepare=damage_the_opening, keeps=("m1",)),
    Deed("accept without the journal", lambda store: store.accept("s-1", drop_journal=True), keeps=("m1",)),
]
#: The actions of another process then, on the files that the first one has left.
SECOND = [
    Deed("then a fold", fold),
    Deed("then an append that folds", append("c"), FOLDING, adds="c"),
    Deed("then a delete and a create", delete_and_create),
]


@dataclass(frozen=True)
class Ending:
    """The outcome of two deeds.

    Attributes:
        first, second: the two processes that did them.
        faults: everything that is wrong after the holder's append.
    """

    first: Process
    second: Process
    faults: list[str]


def play(
    deeds: tuple[Deed, Deed],
    scratch: Path,
    kills: tuple[Kill | None, Kill | None] = (None, None),
    *,
    refuses_removal: bool = False,
) -> Ending:
    """Do two deeds in two processes, and then have the holder of an old replica append.

    Args:
        kills: where each process is killed.
        refuses_removal: the disk refuses to remove any journal.
    """
    with disk_of({}, scratch / "sessions") as path, pytest.MonkeyPatch.context() as patch:
        holder = _holder(path)
        if refuses_removal:
            patch.setattr(disk, "unlink", _keeping_journals(disk.unlink))
        look = _Look(deeds[0], holder, path)
        first, second = (look.at(deed, Process(kill)) for deed, kill in zip(deeds, kills, strict=True))
        return Ending(first, second, list(look.faults()))


def _holder(path: Path) -> persist.Store:
    """Return a store that holds a replica: of one message in the document, and of two in the journal."""
    holder = ENDLESS.open(path)
    holder.create("s-1", {"title": "t", "messages": [message("m1")]})
    for each in KNOWN[1:]:
        append(each)(holder)
    return holder


def _keeping_journals(real: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def unlink(path: Path) -> bool:
        if str(path).endswith(".journal"):
            raise OSError(errno.EACCES, "injected")
        return real(path)

    return unlink


class _Look:
    """A look at the messages that were acknowledged, and whether they are there."""

    def __init__(self, first: Deed, holder: persist.Store, path: Path) -> None:
        self._first = first
        self._holder = holder
        self._path = path
        replica = file_engine(holder).cache.take("s-1")
        assert replica is not None
        file_engine(holder).cache.put("s-1", replica)
        self._version = replica.version
        self._incarnation = replica.header.incarnation
        self._added: list[str] = []
        self._raised: list[str] = []
        first.prepare(holder)

    def at(self, deed: Deed, process: Process) -> Process:
        """Do a deed as a process of its own, and note what it acknowledges."""
        store = deed.mode.open(self._path)
        with running(process):
            if self._do(deed.name, lambda: deed.verb(store)) and deed.adds:
                self._added.append(deed.adds)
        return process

    def _do(self, name: str, what: Callable[[], Any]) -> bool:
        try:
            what()
        except persist.SessionNotFound:
            # The first deed was a delete.
            return False
        except persist.CorruptSession:
            # The session stays damaged as long as nobody has accepted it.
            if not self._is_damaged:
                raise
            return False
        except persist.PersistError as error:
            self._raised.append(f"{name}: {error}")
            return False
        return True

    def _append(self, message_id: str, store: persist.Store) -> bool:
        return self._do("append", lambda: append(message_id)(store))

    @property
    def _is_damaged(self) -> bool:
        try:
            persist.Store(self._path).load("s-1")
        except persist.CorruptSession:
            return True
        except persist.SessionNotFound:
            return False
        return False

    def faults(self) -> Iterator[str]:
        was_damaged, before, name = self._is_damaged, self._journals(), self._named()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "version_of", self._known_version(disk.version_of))
            is_added = self._append("b1", self._holder)
        # An append behind damage is given up with the damage.
        if is_added and not (was_damaged and len(self._first.keeps) < len(KNOWN)):
            self._added.append("b1")
        for each, content in self._journals().items():
            if each not in (name, self._named()) and content != before.get(each, b""):
                yield f"{each} is out of use, and was written to"
        newcomer = ENDLESS.open(self._path)
        if self._is_damaged:
            self._do("accept", lambda: newcomer.accept("s-1"))
        for message_id, store in (("d", newcomer), ("b2", self._holder)):
            if self._append(message_id, store):
                self._added.append(message_id)
        yield from self._raised
        yield from self._lost()

    def _known_version(self, real: Callable[[Any], disk.Version]) -> Callable[[Any], disk.Version]:
        """Give the document the inode and the times again that the replica knows."""

        def version_of(file: Any) -> disk.Version:
            found = real(file)
            return self._version if not isinstance(file, int) and os.path.basename(file) == "s-1.json" else found

        return version_of

    def _journals(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self._path.glob("*.journal")}

    def _named(self) -> str | None:
        """Return the journal that the document names."""
        document = self._path / "s-1.json"
        found = re.search(rb'"journal":"([0-9a-f]{16})"', document.read_bytes()) if document.exists() else None
        return f"s-1.{found[1].decode()}.journal" if found else None

    def _lost(self) -> Iterator[str]:
        try:
            found = persist.Store(self._path)._backend.engine.read("s-1")
        except persist.SessionNotFound:
            if "b1" in self._added:
                yield "acknowledged and lost: the session"
            return
        is_same = found.header.incarnation == self._incarnation
        wanted = [*(self._first.keeps if is_same else ["new"]), *(self._added if is_same else self._late())]
        ids = [each["id"] for each in found.content.decode()["messages"]]
        if missing := [each for each in wanted if ids.count(each) != 1]:
            yield f"acknowledged and lost: {missing}"

    def _late(self) -> list[str]:
        """Return the messages that were added after the session was made anew."""
        return [each for each in self._added if each in ("b1", "d", "b2")]
