"""The verbs that are played for each crash state, and the checks of what must hold after a reboot.

A fresh store opens each state. No process is left, so every stream is dead. The store must show the old or the new
document. A sweep must free the session. The next writes must work and clean up. The sweep's own crash states are
checked in their turn.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import persist
from harness.crashes import Disk, Trace, read_disk, recording, states, write_disk
from harness.files import file_engine
from harness.sweeps import sweep
from persist.event_log import EventReader, EventWriter
from persist.storage import disk
from persist.storage.cache import Cache
from persist.storage.commit import Mode as Journal
from persist.storage.journal import MARK, ROOM_BYTES

PROMPT = {"id": "p1", "role": "user", "content": "Why?"}
ANSWER = {"id": "a1", "role": "assistant", "content": "Because."}

CACHE_BYTES = 1024 * 1024
#: About 20 sectors.
LARGE = {"title": "large", "messages": [{"id": f"large {number}", "content": "x" * 470} for number in range(20)]}

Prepare = Callable[[persist.Store], Any]
Verb = Callable[[persist.Store, Any], Any]


@dataclass(frozen=True)
class Mode:
    """The way a store writes: which sessions have a journal, how large it may grow, and when it gets room for more."""

    journal: Journal = "auto"
    fold_bytes: float | None = None
    room_bytes: int = ROOM_BYTES

    def open(self, path: Path) -> persist.Store:
        store = persist.Store(path)
        self.set(store)
        return store

    def set(self, store: persist.Store) -> None:
        options = file_engine(store).options
        options.mode, options.fold_bytes, options.room_bytes = self.journal, self.fold_bytes, self.room_bytes
        options.verifies_folds = True


AUTO = Mode()


@dataclass(frozen=True)
class Scenario:
    """A verb, and the state that it needs. `verb` receives the result of `prepare`.

    Attributes:
        interrupted: the commit of another process, which was killed when the commit had just become visible.
        fails_sync: that process was killed when the sync of its record had failed.
        is_cold: the verb's process has never seen the session.
        mode: how the verb's store writes.
        prepared: how the stores before it write, if that is another way.
    """

    name: str
    verb: Verb
    prepare: Prepare = lambda store: None
    interrupted: Callable[[persist.Store], Any] = lambda store: None
    fails_sync: bool = False
    content: dict[str, Any] = field(
        default_factory=lambda: {"title": "t" * 600, "messages": [{"id": "m1", "content": "hi"}]}
    )
    is_cold: bool = False
    mode: Mode = AUTO
    prepared: Mode | None = None

    def play(self, scratch: Path) -> Case:
        store = (self.prepared or self.mode).open(scratch / "recorded")
        store.create("s-1", self.content)
        subject = self.prepare(store)
        self.mode.set(store)
        if self.is_cold:
            file_engine(store).cache = Cache(CACHE_BYTES)
        another = self.mode.open(store.path)
        old, before = documents(store), read_disk(store.path)
        with recording(store.path) as recorder:
            recorder.kill(lambda: self.interrupted(another), fails_sync=self.fails_sync)
            between = documents(another)
            self.verb(store, subject)
        kept = _copies(store)
        trace = Trace(before, tuple(recorder.steps))
        case = Case(trace, old, documents(store), between=between, kept=kept, mode=self.mode)
        if isinstance(subject, persist.Stream):
            subject._lease.close()
        shutil.rmtree(store.path)
        return case


@dataclass(frozen=True)
class Opening:
    """A use of a store whose directories are missing, or were made an instant ago and not synced.

    Both functions receive the path of the store, which ends in "var/sessions". Everything that `prepare` leaves there
    is durable.
    """

    name: str
    verb: Callable[[Path], Any]
    prepare: Callable[[Path], Any]

    def play(self, scratch: Path) -> Case:
        root = scratch / "recorded"
        root.mkdir()
        path = root / "var" / "sessions"
        self.prepare(path)
        old, before = documents_in(path), read_disk(root)
        with recording(root) as recorder:
            self.verb(path)
        case = Case(Trace(before, tuple(recorder.steps)), old, documents_in(path), place="var/sessions")
        shutil.rmtree(root)
        return case


def start_and_die(store: persist.Store, session_id: str = "s-1", **options: Any) -> None:
    stream = store.start_stream(session_id, PROMPT, **options)
    stream._lease.close()


def running(store: persist.Store) -> persist.Stream:
    stream = store.start_stream("s-1", PROMPT)
    stream.checkpoint({"role": "assistant", "content": "Be"})
    return stream


def emitting(store: persist.Store) -> persist.Stream:
    stream = running(store)
    stream.emit("a", durable=True)
    return stream


def emitting_too_much(store: persist.Store) -> persist.Stream:
    """Return a stream whose durable events have outgrown a bound of 4 KiB."""
    stream = running(store)
    stream.emit(*[f"{number:0100}" for number in range(60)], durable=True)
    assert isinstance(stream._events, EventWriter)
    stream._events._most_bytes, stream._events.is_full = 4096, True
    return stream


def emit_where_another_process_makes_the_directory(store: persist.Store, stream: persist.Stream) -> None:
    """Emit an event when another process has made `.events`, and is just about to sync the store's directory."""
    disk.mkdir(store.path / ".events")
    stream.emit("a", durable=True)


def stale(store: persist.Store) -> persist.Session:
    stream = running(store)
    stream._lease.close()
    return store.load("s-1")


def changed(store: persist.Store) -> persist.Session:
    session = store.load("s-1")
    session.data["title"] = "changed"
    return session


def changed_on_both_sides(store: persist.Store) -> persist.Session:
    session = changed(store)
    store.append("s-1", "messages", {"id": "m2", "content": "theirs"})
    return session


def edited_by_hand(store: persist.Store) -> None:
    path = store.path / "s-1.json"
    path.write_bytes(path.read_bytes().replace(b'"hi"', b'"HI"'))


def foreign(store: persist.Store) -> None:
    (store.path / "s-1.json").write_bytes(b'{"title": "foreign", "messages": [{"id": "m1", "content": "hi"}]}')


def create_again(store: persist.Store, _subject: object = None) -> None:
    """Create a session as a client does that has not got its answer: the session's existence is success."""
    with suppress(persist.SessionExists):
        store.create("s-2", {"title": "new"})


def duplicate_again(store: persist.Store, _subject: object = None) -> None:
    with suppress(persist.SessionExists):
        store.duplicate("s-1", "s-2")


def left_over_temp(store: persist.Store) -> persist.Session:
    (store.path / "s-1.json.tmp").write_bytes(b"left over")
    return changed(store)


def nothing(path: Path) -> None:
    """Make neither the directory nor the one above it."""


def directory_above(path: Path) -> None:
    path.parent.mkdir()


def documents_of_another_program(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "s-1.json").write_bytes(b'{"messages": [{"id": "m1", "content": "hi"}]}')


def create_first(path: Path) -> None:
    persist.Store(path).create("s-2", {"title": "new"})


def create_where_another_process_makes_the_directory_above(path: Path) -> None:
    """Create a session when another process has made the directory above.

    That process is just about to sync the directory above that one.
    """
    disk.mkdir(path.parent)
    create_first(path)


def create_where_another_process_makes_the_directory(path: Path) -> None:
    """Create a session when another process has made the directory.

    That process is just about to sync the directory above.
    """
    disk.mkdir(path)
    create_first(path)


def first_start(path: Path) -> None:
    """Start a stream where nothing of the store is there but the documents."""
    start_and_die(persist.Store(path, create=False))


def start_where_another_process_makes_the_leases(path: Path) -> None:
    """Start a stream when another process has made `.leases`, and is just about to sync the store's directory."""
    disk.mkdir(path / ".leases")
    start_and_die(persist.Store(path))


MESSAGE = {"id": "m3", "role": "user", "content": "more"}
PAIR = [MESSAGE, {"id": "m5", "role": "assistant", "content": "enough"}]


def extend(store: persist.Store, _subject: object = None) -> None:
    store.extend("s-1", "messages", PAIR)


def half_extended(store: persist.Store) -> None:
    store.append("s-1", "messages", MESSAGE)


def extend_and_create(store: persist.Store, _subject: object = None) -> None:
    store.extend("s-2", "messages", PAIR, create=True)


def change_much(store: persist.Store, _subject: object = None) -> None:
    """Make several changes at several places, in one commit."""
    with store.transaction("s-1") as tx:
        tx.list("messages").extend(PAIR)
        del tx.list("messages")[0]
        tx.list("tool_calls").append({"id": "c1"})
        tx.fields["n"] = 1
        del tx.fields["title"]


def change_and_create(store: persist.Store, _subject: object = None) -> None:
    with store.transaction("s-2", create=True) as tx:
        tx.fields["title"] = "new"
        tx.list("messages").extend(PAIR)


def change_nothing(store: persist.Store, _subject: object = None) -> None:
    """Change nothing in a transaction. The commit that it reads is acknowledged all the same."""
    with store.transaction("s-1") as tx:
        assert tx.list("messages")[-1]


def change_and_delete(store: persist.Store, _subject: object = None) -> None:
    with store.transaction("s-1") as tx:
        tx.fields["title"] = "gone"
        tx.delete()


def delete_what_was_seen(store: persist.Store, version: str) -> None:
    store.delete("s-1", if_version=version)


def seen(store: persist.Store) -> str:
    """Return the version of a session, which a client has seen."""
    return store.head("s-1").version


def seen_and_stale(store: persist.Store) -> str:
    return stale(store).version


def start_with_fields(store: persist.Store, _subject: object = None) -> None:
    start_and_die(store, fields={"model": "m", "title": "asked"}, once=True)


def start_and_create(store: persist.Store, _subject: object = None) -> None:
    start_and_die(store, "s-2", fields={"model": "m"}, create=True, once=True)


def asked(store: persist.Store) -> None:
    """Append the prompt without its answer."""
    store.append("s-1", "messages", PROMPT)


def answer(store: persist.Store) -> None:
    store.append("s-1", "messages", ANSWER)


def start_what_is_answered(store: persist.Store, _subject: object = None) -> None:
    """Start an answered prompt again. The client is told the answer, so the answer must stay."""
    with suppress(persist.AlreadyStarted):
        start_and_die(store, once=True)


def change_turn(_store: persist.Store, stream: persist.Stream) -> None:
    with stream.transaction() as tx:
        tx.list("messages").extend(PAIR)
        tx.fields["n"] = 1


def finish_with_fields(_store: persist.Store, stream: persist.Stream) -> None:
    stream.finish(ANSWER, fields={"tokens": 5, "title": "answered"})


SCENARIOS: list[Scenario | Opening] = [
    Scenario("create", lambda store, _: store.create("s-2", {"title": "new"})),
    Scenario("duplicate", lambda store, _: store.duplicate("s-1", "s-2")),
    Scenario("save", lambda _, session: session.save(), changed),
    Scenario("save that merges", lambda _, session: session.save(), changed_on_both_sides),
    Scenario("save over a left-over", lambda _, session: session.save(), left_over_temp),
    Scenario("append", lambda store, _: store.append("s-1", "messages", MESSAGE)),
    Scenario("append to a large document", lambda store, _: store.append("s-1", "messages", MESSAGE), content=LARGE),
    Scenario("first commit to a foreign document", lambda store, _: store.append("s-1", "messages", MESSAGE), foreign),
    Scenario("update", lambda store, _: store.update("s-1", lambda tx: tx.data.update(n=1))),
    Scenario("extend", extend),
    Scenario("extend of which one is there", extend, half_extended),
    Scenario("extend that creates", extend_and_create),
    Scenario("extend of a foreign document", extend, foreign),
    Scenario("transaction of several changes", change_much),
    Scenario("transaction that creates", change_and_create),
    Scenario("transaction that deletes", change_and_delete),
    Scenario("transaction that deletes, with a stale stream", change_and_delete, stale),
    Scenario("accept", lambda store, _: store.accept("s-1"), edited_by_hand),
    Scenario("delete", lambda store, _: store.delete("s-1")),
    Scenario("delete with a stale stream", lambda store, _: store.delete("s-1"), stale),
    Scenario("delete of a version", delete_what_was_seen, seen),
    Scenario("delete of a version with a stale stream", delete_what_was_seen, seen_and_stale),
    Scenario("start", lambda store, _: start_and_die(store)),
    Scenario("start over a stale stream", lambda store, _: start_and_die(store), stale),
    Scenario("start once, with fields", start_with_fields),
    Scenario("start once, of what a stale stream has asked", start_with_fields, stale),
    Scenario("start that creates", start_and_create),
    Scenario("stream.transaction", change_turn, running),
    Scenario("stream.transaction after events", change_turn, emitting),
    Scenario("finish with fields", finish_with_fields, running),
    Scenario("checkpoint", lambda _, stream: stream.checkpoint({"role": "assistant", "content": "Becau"}), running),
    Scenario("stream.append", lambda _, stream: stream.append(MESSAGE), running),
    Scenario("first durable event", lambda _, stream: stream.emit("a", durable=True), running),
    Scenario("first durable event, .events not yet synced", emit_where_another_process_makes_the_directory, running),
    Scenario("durable event", lambda _, stream: stream.emit("b", durable=True), emitting),
    Scenario("drop of the oldest events", lambda _, stream: stream._drop_oldest_events(), emitting_too_much),
    Scenario("finish after events", lambda _, stream: stream.finish(ANSWER), emitting),
    Scenario("finish", lambda _, stream: stream.finish(ANSWER), running),
    Scenario("fail", lambda _, stream: stream.fail(), running),
    Scenario("cancel", lambda store, stream: store.cancel("s-1", stream.id), running),
    Scenario("cancel by force", lambda store, stream: store.cancel("s-1", stream.id, force=True), running),
    Scenario("clear", lambda _, session: session.clear_stale_stream(), stale),
    Scenario(
        "append of what a killed writer left visible",
        lambda store, _: store.append("s-1", "messages", MESSAGE),
        interrupted=lambda store: store.append("s-1", "messages", MESSAGE),
    ),
    Scenario(
        "save of what a killed writer left visible",
        lambda store, _: store.load("s-1").save(),
        interrupted=lambda store: store.append("s-1", "messages", MESSAGE),
    ),
    Scenario(
        "cancel of what a killed writer left cancelled",
        lambda store, stream: store.cancel("s-1", stream.id),
        running,
        interrupted=lambda store: store.cancel("s-1", store.load("s-1").active_stream_id or ""),
    ),
    Scenario("create of what a killed writer left visible", create_again, interrupted=create_again),
    Scenario("extend of what a killed writer left visible", extend, interrupted=extend),
    Scenario("extend of what a killed writer left created", extend_and_create, interrupted=extend_and_create),
    Scenario("transaction of nothing of what a killed writer left visible", change_nothing, interrupted=extend),
    Scenario("start once of what a killed writer left answered", start_what_is_answered, asked, interrupted=answer),
    Scenario(
        "duplicate of what a killed writer left visible",
        duplicate_again,
        interrupted=duplicate_again,
    ),
    Scenario(
        "accept of what a killed writer left accepted",
        lambda store, _: store.accept("s-1"),
        edited_by_hand,
        interrupted=lambda store: store.accept("s-1"),
    ),
    Scenario("sweep", lambda store, _: sweep(store), stale),
    Opening("create in a new store", create_first, nothing),
    Opening("create, directory above not yet synced", create_where_another_process_makes_the_directory_above, nothing),
    Opening("create, directory not yet synced", create_where_another_process_makes_the_directory, directory_above),
    Opening("first start", first_start, documents_of_another_program),
    Opening(
        "start, .leases not yet synced", start_where_another_process_makes_the_leases, documents_of_another_program
    ),
]


# --- from a scenario to its trace -------------------------------------------------------------------------------------


#: The view of each session: its data and whether its stream was asked to end, or the bytes of a file that is damaged.
Documents = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """The steps of a scenario on the disk, with the documents before and after them.

    The store is at `place` on that disk. `between` holds the documents that a killed writer has left visible, and that
    nobody acknowledged. `kept` holds copies of damaged files. A copy must be there before its original is replaced.
    """

    trace: Trace
    old: Documents
    new: Documents
    between: Documents | None = None
    kept: Disk = field(default_factory=dict)
    place: str = "."
    mode: Mode = AUTO


def documents_in(path: Path) -> Documents:
    return documents(persist.Store(path, create=False)) if path.is_dir() else {}


def documents(store: persist.Store) -> Documents:
    return {session_id: _document(store, session_id) for session_id in store.ids()}


def _document(store: persist.Store, session_id: str) -> Any:
    try:
        found = store._backend.engine.read(session_id)
    except persist.CorruptSession:
        return _damaged(store, session_id)
    owner = found.header.owner
    shown = {"cancelled": owner is not None and owner["cancelled"], "events": events_of(store, session_id)}
    return found.content.decode() | shown


def _damaged(store: persist.Store, session_id: str) -> bytes:
    """Return the bytes of a session that cannot be read: the document, and the journal that it names."""
    content = (store.path / f"{session_id}.json").read_bytes()
    named = re.search(rb'"journal":"([0-9a-f]{16})"', content.partition(b"\n")[0])
    journal = store.path / f"{session_id}.{named[1].decode()}.journal" if named else None
    return content + (_unmarked(journal.read_bytes()) if journal is not None and journal.exists() else b"")


def _unmarked(journal: bytes) -> bytes:
    """Return a journal without its room and its mark, which say nothing of what the session holds."""
    return journal.rstrip(b"\0").removesuffix(MARK)


def _copies(store: persist.Store) -> Disk:
    """Return the copies of damaged journals, unmarked. The copy of a second attempt may hold the mark of the first."""
    found = {name: content for name, content in read_disk(store.path).items() if name.endswith(".damaged")}
    return {name: _unmarked(content or b"") for name, content in found.items()}


def events_of(store: persist.Store, session_id: str) -> list[Any]:
    """Return the last events of all streams of a session. The oldest may be dropped, or not yet.

    The end of a stream is not durable in its file. It is not needed there, because the document tells it.
    """
    paths = sorted(path for path in (store.path / ".events").glob(f"{session_id}.*") if path.suffix != ".tmp")
    found = []
    for path in paths:
        with EventReader(str(path)) as reader:
            found += [event.data for event in reader.read()]
    return found[-10:]


# --- the check of one state -------------------------------------------------------------------------------------------


def faults(case: Case, trace: Trace, scratch: Path, *, deep: bool = True) -> Iterator[str]:
    """Yield what is wrong with the crash states of a trace: nothing, if the protocol is right."""
    for state, returned in states(trace):
        with disk_of(state, scratch / "state") as root:
            yield from _faults_of(case, root, returned, deep=deep)


class Sound:
    """The crash states of a case's own trace, against which the states of a spoilt trace are held."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._returned = {frozenset(state.items()): returned for state, returned in states(case.trace)}

    def faults(self, trace: Trace, scratch: Path) -> Iterator[str]:
        """Yield what is wrong with the states that a spoilt trace adds.

        A state of the case's own trace is left out, if no more is asked of it here than there: its verdict is that of
        `faults` on the own trace. So what is found is due to the spoiling alone.
        """
        for state, returned in states(trace):
            known = self._returned.get(frozenset(state.items()))
            # After the return only the new documents are right, and before it they are right, too.
            if known is not None and known >= returned:
                continue
            with disk_of(state, scratch / "state") as root:
                yield from _faults_of(self._case, root, returned, deep=False)


@contextmanager
def disk_of(state: Disk, root: Path) -> Iterator[Path]:
    """Write a state out for the block."""
    write_disk(root, state)
    try:
        yield root
    finally:
        shutil.rmtree(root)


def _faults_of(case: Case, root: Path, returned: bool, *, deep: bool) -> Iterator[str]:
    store = case.mode.open(root / case.place)
    found = documents(store)
    if fault := next(_outcome_faults(case, found, returned), None):
        yield fault
        return
    try:
        if any(isinstance(document, bytes) for document in found.values()):
            # The document was edited by hand or damaged, and is still as it was.
            found = _accepted(store)
            yield from _outcome_faults(case, found, returned=True)
        if found == case.new and not case.kept.items() <= _copies(store).items():
            yield "no copy was kept of what was damaged"
        yield from _recovery_faults(case, store, found, deep=deep)
        yield from _next_write_faults(store, was_deleted="s-1" not in found)
    except persist.PersistError as error:
        yield f"recovery failed: {error}"


def _accepted(store: persist.Store) -> Documents:
    for session_id in store.ids():
        store.accept(session_id)
    return documents(store)


def _outcome_faults(case: Case, found: Documents, returned: bool) -> Iterator[str]:
    """Check that the documents are old or new, and nothing else. An acknowledged change must be new."""
    if found != case.new and (returned or found not in (case.old, case.between)):
        yield f"acknowledged and lost: {found}" if returned else f"neither old nor new: {found}"


def _recovery_faults(case: Case, store: persist.Store, found: Documents, *, deep: bool) -> Iterator[str]:
    """Check that the sweep frees every session, once, keeps every message, and is crash-safe itself."""
    before = read_disk(store.path)
    with recording(store.path) as recorder:
        sweep(store)
    swept = documents(store)
    for session_id, data in swept.items():
        if data.get("active_stream_id") is not None:
            yield f"{session_id} is stuck"
        if _plain(data) != _plain(found[session_id]):
            yield f"the sweep changed messages of {session_id}"
    if sweep(store) or documents(store) != swept:
        yield "the sweep is not idempotent"
    if deep and any(step.kind in ("write", "rename") for step in recorder.steps):
        recovery = Trace(before, tuple(recorder.steps))
        yield from _sweep_faults(Case(recovery, found, swept, mode=case.mode), store.path.parent / "deeper")


def _sweep_faults(case: Case, scratch: Path) -> Iterator[str]:
    """Check the states that a cut in the middle of the sweep leaves.

    Writes from there on are checked where the sweep is the verb.
    """
    for state, returned in states(case.trace):
        with disk_of(state, scratch) as root:
            store = case.mode.open(root)
            yield from _outcome_faults(case, documents(store), returned)
            sweep(store)
            if documents(store) != case.new:
                yield "the sweep did not go on"


def _plain(data: Any) -> list[Any]:
    return [
        {key: value for key, value in message.items() if key != "interrupted"} for message in data.get("messages", [])
    ]


def _next_write_faults(store: persist.Store, *, was_deleted: bool) -> Iterator[str]:
    """Check that the next writes work and leave nothing over, whatever was left.

    There is one exception: the journal of a session whose deletion was cut off. `check` reports it, because nobody
    knows that it comes from a deletion.
    """
    if was_deleted:
        for path in [each.path for each in store.check() if each.kind == "orphaned" and each.session_id == "s-1"]:
            path.unlink()
    for session_id in ("s-1", "s-2"):
        if not store.exists(session_id):
            store.create(session_id)
        store.append(session_id, "messages", {"id": "next", "content": "next"})
        with store.start_stream(session_id, {"id": "next prompt", "role": "user", "content": "next"}) as stream:
            stream.finish()
    if problems := [problem for problem in store.check() if not _waits_for_fold(store, problem)]:
        yield f"left over: {problems}"
    yield from _fold_faults(store)
    if leases := [path.name for path in (store.path / ".leases").iterdir()]:
        yield f"leases left over: {leases}"


def _waits_for_fold(store: persist.Store, problem: persist.Problem) -> bool:
    """Tell whether a problem is a left-over of a fold that was cut off. Such a left-over is harmless.

    A commit that only appends a record does not look for it.
    """
    is_journaled = store._backend.engine.read(problem.session_id).header.journal is not None
    return problem.kind == "left-over" and (is_journaled or problem.path.suffix == ".journal")


def _fold_faults(store: persist.Store) -> Iterator[str]:
    """Check that a fold changes nothing that is seen, and leaves nothing over."""
    before = documents(store)
    for session_id in before:
        store.compact(session_id)
    if documents(store) != before or documents(persist.Store(store.path)) != before:
        yield "the fold changed a document"
    if problems := store.check():
        yield f"left over after a fold: {problems}"
