"""Every I/O error at every place: each verb, with each of its kernel calls failing, once and for good.

One rule judges them all. **An error means that nothing was written, unless it is `CommitUnknown`. No error means that
the commit is on disk.** Besides, memory stays as it was, and lock and lease are free. No descriptor and no file is left
over. The failed verb works as soon as the disk does.
"""

from __future__ import annotations

import copy
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from harness.crash_scenarios import Mode
from harness.faults import ERRORS, SHORT, SYNCS, TORN, Fault, FullDisk, descriptors, faults, injecting, quick_directory
from harness.files import file_engine
from harness.journal_scenarios import ALWAYS, AUTO, FOLDING, LEAVING, NEVER
from harness.sweeps import SweepFailed, sweep

import persist
from persist import maintenance
from persist.storage import file_system, held
from persist.storage.cache import Cache

M1 = {"id": "m1", "role": "user", "content": "Why?"}
M2 = {"id": "m2", "role": "assistant", "content": "So."}
M3 = {"id": "m3", "role": "user", "content": "Hm."}
DATA: dict[str, Any] = {"title": "New chat", "messages": [M1]}
PROMPT = {"id": "p", "role": "user", "content": "And then?"}
ANSWER = {"id": "a", "role": "assistant", "content": "Then this."}
TIMEOUT_S = 0.05
MOST_PLACES = 200
PARTIAL = (SHORT, TORN)

Run = Callable[[], object]
View = dict[str, object]


@dataclass
class Scene:
    """A store as an operation finds it, and its objects in memory."""

    store: persist.Store
    watched: list[persist.Session] = field(default_factory=list)
    held: list[persist.Stream] = field(default_factory=list)

    def session(self, **edits: Any) -> persist.Session:
        """Load the session "s", edit it in memory, and watch it."""
        session = self.store.load("s")
        session.data.update(edits)
        self.watched.append(session)
        return session

    def stream(self, session_id: str = "s", stream_id: str = "t1") -> persist.Stream:
        """Start a stream with a partial."""
        stream = self.store.start_stream(session_id, PROMPT, stream_id=stream_id)
        stream.checkpoint(ANSWER | {"content": "Th"})
        self.held.append(stream)
        return stream

    def stale(self, session_id: str = "s", stream_id: str = "t1") -> None:
        """Start a stream and free its lease, as the death of its process would."""
        self.stream(session_id, stream_id)._lease.close()

    def memory(self) -> list[tuple[int, Any]]:
        return [(session.revision, copy.deepcopy(session.data)) for session in self.watched]

    def close(self) -> None:
        for stream in self.held:
            stream._lease.close()


@dataclass(frozen=True)
class Operation:
    """A verb and the scene in which it is played. `stage` sets the scene and returns the verb."""

    name: str
    stage: Callable[[Scene], Run]
    is_look: bool = False
    #: The documentation of the verb says that it leaves out, or names, what cannot be read, instead of raising.
    is_partial: bool = False
    #: Leaving a block cannot be tried again, because the lease is given up and the session is stale.
    is_final: bool = False
    #: The way in which the store of the verb writes, and that of the store that made the session, if it differs.
    mode: Mode = AUTO
    made: Mode | None = None
    #: The store is that of a process that has never seen the session.
    is_cold: bool = False

    @property
    def is_variant(self) -> bool:
        return self.mode != AUTO or self.made is not None

    def but(self, name: str, **options: Any) -> Operation:
        return replace(self, name=f"{self.name}, {name}", **options)


OPERATIONS: dict[str, Operation] = {}


def operation(**options: bool) -> Callable[[Callable[[Scene], Run]], None]:
    def enter(stage: Callable[[Scene], Run]) -> None:
        OPERATIONS[stage.__name__] = replace(Operation(stage.__name__, stage), **options)  # type: ignore[arg-type]

    return enter


# --- the verbs that write ---------------------------------------------------------------------------------------------


@operation()
def create(scene: Scene) -> Run:
    return lambda: scene.store.create("new", DATA).data


@operation()
def save(scene: Scene) -> Run:
    return scene.session(title="File locks").save


@operation()
def save_that_merges(scene: Scene) -> Run:
    session = scene.session(title="File locks")
    scene.store.append("s", "messages", M2)
    return session.save


@operation()
def save_of_nothing(scene: Scene) -> Run:
    return scene.session().save


@operation()
def save_over_a_left_over(scene: Scene) -> Run:
    (scene.store.path / "s.json.tmp").write_bytes(b"half a docum")
    return scene.session(title="File locks").save


@operation()
def edit(scene: Scene) -> Run:
    def run() -> str | None:
        with scene.store.transaction("s") as tx:
            tx.data["title"] = "File locks"
        return tx.version

    return run


@operation()
def transaction(scene: Scene) -> Run:
    def run() -> str | None:
        with scene.store.transaction("s") as tx:
            tx.fields["title"] = "File locks"
            tx.list("messages").append(M2)
        return tx.version

    return run


@operation()
def update(scene: Scene) -> Run:
    version = scene.store.head("s").version
    return lambda: scene.store.update("s", lambda tx: tx.data.update(title="File locks"), if_version=version)


@operation()
def update_of_a_small_field(scene: Scene) -> Run:
    return lambda: scene.store.update("s", lambda tx: tx.data.update(title="File locks"))


@operation()
def append(scene: Scene) -> Run:
    return lambda: scene.store.append("s", "messages", M2)


@operation()
def append_again(scene: Scene) -> Run:
    return lambda: scene.store.append("s", "messages", M1)


@operation()
def append_that_creates(scene: Scene) -> Run:
    return lambda: scene.store.append("new", "messages", M2, create=True)


@operation()
def extend(scene: Scene) -> Run:
    return lambda: scene.store.extend("s", "messages", [M2, M3])


@operation()
def extend_again(scene: Scene) -> Run:
    scene.store.extend("s", "messages", [M2, M3])
    return lambda: scene.store.extend("s", "messages", [M2, M3])


@operation()
def extend_half_of_it_again(scene: Scene) -> Run:
    return lambda: scene.store.extend("s", "messages", [M1, M2])


@operation()
def extend_that_creates(scene: Scene) -> Run:
    return lambda: scene.store.extend("new", "messages", [M1, M2], create=True)


@operation()
def transaction_of_several_changes(scene: Scene) -> Run:
    version = scene.store.head("s").version

    def run() -> str | None:
        with scene.store.transaction("s", if_version=version, touch=False) as tx:
            tx.list("messages").extend([M2, M3])
            del tx.list("messages")[0]
            tx.list("log").append("x" * 5000)
            tx.fields["n"] = 5
            del tx.fields["title"]
        return tx.version

    return run


@operation()
def transaction_of_nothing(scene: Scene) -> Run:
    def run() -> str | None:
        with scene.store.transaction("s") as tx:
            assert len(tx.list("messages")) == 1
        return tx.version

    return run


@operation()
def transaction_that_creates(scene: Scene) -> Run:
    def run() -> str | None:
        with scene.store.transaction("new", create=True) as tx:
            tx.fields["title"] = "File locks"
            tx.list("messages").append(M1)
        return tx.version

    return run


@operation()
def delete_in_a_transaction(scene: Scene) -> Run:
    def run() -> None:
        with scene.store.transaction("s") as tx:
            tx.list("messages").append(M2)
            tx.delete()

    return run


@operation()
def delete_of_a_version(scene: Scene) -> Run:
    version = scene.store.head("s").version
    return lambda: scene.store.delete("s", if_version=version)


@operation()
def delete(scene: Scene) -> Run:
    return lambda: scene.store.delete("s")


@operation()
def delete_with_a_stale_stream(scene: Scene) -> Run:
    scene.stale()
    return lambda: scene.store.delete("s")


@operation()
def delete_by_force(scene: Scene) -> Run:
    scene.stream()
    return lambda: scene.store.delete("s", force=True)


@operation()
def duplicate(scene: Scene) -> Run:
    return lambda: scene.store.duplicate("s", "copy").data


@operation()
def accept(scene: Scene) -> Run:
    scene.store.compact("s")
    path = scene.store.path / "s.json"
    path.write_bytes(path.read_bytes().replace(b"New chat", b"Old chat"))
    return lambda: scene.store.accept("s").data


@operation()
def accept_of_a_damaged_journal(scene: Scene) -> Run:
    scene.store.append("s", "messages", M2)
    for path in scene.store.path.glob("s.*.journal"):
        path.write_bytes(path.read_bytes().replace(b"So.", b"No."))
    return lambda: scene.store.accept("s").data


@operation()
def accept_that_drops_a_journal(scene: Scene) -> Run:
    scene.store.append("s", "messages", M2)
    path = scene.store.path / "s.json"
    path.write_bytes(path.read_bytes().replace(b"New chat", b"Old chat"))
    return lambda: scene.store.accept("s", drop_journal=True).data


@operation()
def replace_of_a_version(scene: Scene) -> Run:
    scene.stale()
    version = scene.store.head("s").version
    return lambda: scene.store.replace("s", DATA, if_version=version).data


@operation()
def replace_of_a_damaged_session(scene: Scene) -> Run:
    scene.store.append("s", "messages", M2)
    path = scene.store.path / "s.json"
    path.write_bytes(path.read_bytes()[:-9])
    return lambda: scene.store.replace("s", DATA).data


@operation()
def compact(scene: Scene) -> Run:
    return lambda: scene.store.compact("s")


@operation()
def start_stream(scene: Scene) -> Run:
    return lambda: scene.held.append(scene.store.start_stream("s", PROMPT, stream_id="t2"))


@operation()
def start_over_a_stale_stream(scene: Scene) -> Run:
    scene.stale()
    message = PROMPT | {"id": "p2"}
    return lambda: scene.held.append(scene.store.start_stream("s", message, stream_id="t2"))


@operation()
def start_that_creates(scene: Scene) -> Run:
    options: dict[str, Any] = {"stream_id": "t2", "fields": {"model": "m"}, "create": True, "once": True}
    return lambda: scene.held.append(scene.store.start_stream("new", PROMPT, **options))


@operation()
def start_once_with_fields(scene: Scene) -> Run:
    options: dict[str, Any] = {"stream_id": "t2", "fields": {"title": "File locks"}, "once": True}
    return lambda: scene.held.append(scene.store.start_stream("s", PROMPT, **options))


@operation()
def start_once_of_what_a_stale_stream_has_asked(scene: Scene) -> Run:
    scene.stale()
    options: dict[str, Any] = {"stream_id": "t2", "fields": {"title": "File locks"}, "once": True}
    return lambda: scene.held.append(scene.store.start_stream("s", PROMPT, **options))


def start_again(scene: Scene) -> object:
    """Start the prompt once more.

    Return the stream id and the answer that the error tells if it runs or is answered.
    """
    try:
        scene.held.append(scene.store.start_stream("s", PROMPT, stream_id="t2", once=True))
    except persist.AlreadyStarted as told:
        return told.stream_id, told.answer
    return None


@operation()
def start_once_of_what_runs(scene: Scene) -> Run:
    scene.stream()
    return lambda: start_again(scene)


@operation()
def start_once_of_what_is_answered(scene: Scene) -> Run:
    scene.stream().finish(ANSWER)
    return lambda: start_again(scene)


@operation()
def stream_transaction(scene: Scene) -> Run:
    stream = scene.stream()

    def run() -> str | None:
        with stream.transaction() as tx:
            tx.list("messages").extend([M2, M3])
            tx.fields["title"] = "File locks"
        return tx.version

    return run


@operation()
def stream_update_of_nothing(scene: Scene) -> Run:
    stream = scene.stream()
    return lambda: stream.update(lambda tx: len(tx.list("messages")))


@operation()
def checkpoint(scene: Scene) -> Run:
    stream = scene.stream()
    return lambda: stream.checkpoint(ANSWER)


@operation()
def stream_append(scene: Scene) -> Run:
    stream = scene.stream()
    return lambda: stream.append(M2)


@operation()
def finish(scene: Scene) -> Run:
    stream = scene.stream()
    return lambda: stream.finish(ANSWER)


@operation()
def finish_with_fields(scene: Scene) -> Run:
    stream = scene.stream()
    return lambda: stream.finish(ANSWER, fields={"title": "File locks", "tokens": 5})


@operation()
def fail(scene: Scene) -> Run:
    return scene.stream().fail


@operation(is_final=True)
def leaving_the_block(scene: Scene) -> Run:
    stream = scene.stream()
    return lambda: stream.__exit__(None, None, None)


@operation()
def cancel(scene: Scene) -> Run:
    scene.stream()
    return lambda: scene.store.cancel("s", "t1")


@operation()
def cancel_again(scene: Scene) -> Run:
    scene.stream()
    scene.store.cancel("s", "t1")
    return lambda: scene.store.cancel("s", "t1")


@operation()
def cancel_by_force(scene: Scene) -> Run:
    scene.stream()
    return lambda: scene.store.cancel("s", "t1", force=True)


@operation()
def clear_stale_stream(scene: Scene) -> Run:
    scene.stale()
    return scene.session().clear_stale_stream


@operation()
def clear_stale_streams(scene: Scene) -> Run:
    scene.store.create("r", DATA)
    scene.stale("r", "t0")
    scene.stale()
    return partial(sweep, scene.store)


# --- the verbs that look ----------------------------------------------------------------------------------------------


@operation(is_look=True)
def open_store(scene: Scene) -> Run:
    return lambda: persist.Store(scene.store.path).ids()


@operation(is_look=True)
def open_new_store(scene: Scene) -> Run:
    return lambda: persist.Store(scene.store.path.parent / "another").ids()


@operation(is_look=True)
def load(scene: Scene) -> Run:
    return lambda: scene.store.load("s").data


@operation(is_look=True)
def head(scene: Scene) -> Run:
    return lambda: scene.store.head("s").fields


@operation(is_look=True, is_partial=True)
def heads(scene: Scene) -> Run:
    scene.store.create("r", DATA)
    return lambda: [(found.id, dict(found.fields), found.counts) for found in scene.store.heads()]


@operation(is_look=True)
def tail(scene: Scene) -> Run:
    scene.store.append("s", "messages", M2)
    return lambda: scene.store.tail("s", limit=1)


@operation(is_look=True)
def tail_of_a_long_list(scene: Scene) -> Run:
    scene.store.extend("s", "messages", [M2 | {"id": f"n{number}", "content": "x" * 400} for number in range(90)])
    return lambda: scene.store.tail("s", limit=60)


@operation(is_look=True)
def exists(scene: Scene) -> Run:
    return lambda: scene.store.exists("s")


@operation(is_look=True)
def ids(scene: Scene) -> Run:
    return scene.store.ids


@operation(is_look=True)
def refresh(scene: Scene) -> Run:
    session = scene.session()
    scene.store.append("s", "messages", M2)

    def run() -> object:
        session.refresh()
        return session.data

    return run


@operation(is_look=True)
def stream(scene: Scene) -> Run:
    scene.stream()
    return lambda: shown(scene.store.stream("s"))


@operation(is_look=True, is_partial=True)
def streams(scene: Scene) -> Run:
    scene.stream()
    return lambda: [shown(info) for info in scene.store.streams()]


@operation(is_look=True)
def is_cancelled(scene: Scene) -> Run:
    stream = scene.stream()
    return stream.is_cancelled


@operation(is_look=True, is_partial=True)
def check(scene: Scene) -> Run:
    scene.stale()
    return lambda: [(problem.session_id, problem.kind) for problem in scene.store.check()]


# --- the same, of sessions with a journal -----------------------------------------------------------------------------


def in_other_ways() -> Iterator[Operation]:
    """Yield the operations with records and folds, and those that enter or leave the journal."""
    whole = dict(OPERATIONS)
    for each in whole.values():
        if each.name not in ("open_store", "open_new_store", "exists", "ids"):
            yield each.but("journaled", mode=ALWAYS)
    for name in (
        "append",
        "append_again",
        "extend",
        "extend_again",
        "save",
        "transaction",
        "transaction_of_several_changes",
        "start_stream",
        "start_once_of_what_is_answered",
        "stream_transaction",
        "finish",
        "tail",
        "compact",
        "clear_stale_stream",
    ):
        yield whole[name].but("journaled, of a new process", mode=ALWAYS, is_cold=True)
    for name in (
        *("append", "extend", "transaction_of_several_changes", "save", "start_over_a_stale_stream"),
        *("stream_transaction", "checkpoint", "finish", "finish_with_fields", "clear_stale_streams"),
    ):
        yield whole[name].but("folding", mode=FOLDING)
    for name in ("append", "save"):
        yield whole[name].but("entering", mode=ALWAYS, made=NEVER)
    for name in ("append", "finish", "compact"):
        yield whole[name].but("leaving", mode=NEVER, made=ALWAYS)
    yield whole["append"].but("folding and leaving", mode=LEAVING, made=ALWAYS)


OPERATIONS |= {each.name: each for each in [*in_other_ways()]}


def shown(info: persist.StreamInfo | None) -> object:
    return info and (info.session_id, info.stream_id, info.is_live, info.is_cancelled)


# --- the trial --------------------------------------------------------------------------------------------------------


def view(store: persist.Store) -> View:
    """Return the committed state, without the parts that change from run to run.

    An unreadable document shows as its error.
    """
    return {session_id: _document(store, session_id) for session_id in store.ids()}


def _document(store: persist.Store, session_id: str) -> object:
    try:
        found = store._backend.engine.read(session_id)
    except persist.PersistError as error:
        return type(error).__name__
    header, owner = found.header, found.header.owner
    data = {**found.content.decode(), "pending_started_at": None}
    told = owner and tuple(owner.get(key) for key in ("stream_id", "answer_id", "cancelled"))
    return header.revision, header.epoch, told, data


@dataclass(frozen=True)
class Ends:
    """The two states in which a disk may be after an operation, and what the operation returns."""

    old: View
    new: View
    result: object


A_VERSION = "the version of a session"


@cache
def ends_of(operation: Operation) -> Ends:
    """Return the states and the result of the operation if nothing fails."""
    with quick_directory() as directory:
        scene, run = staged(operation, directory)
        old = view(scene.store)
        result = run()
        ends = Ends(old, view(scene.store), told(scene.store, result))
        assert type(ends.result) is not str or ends.result == A_VERSION
        scene.close()
    return ends


def told(store: persist.Store, result: object) -> object:
    """Return the result of an operation in a form that can be compared.

    Versions differ from run to run. A version is right if it is on the disk.
    """
    found = {head.version for head in store.heads()}
    return (A_VERSION if result in found else "a version of nothing") if type(result) is str else result


def staged(operation: Operation, directory: Path) -> tuple[Scene, Run]:
    made = operation.made or operation.mode
    scene = Scene(opened(made, directory / "sessions"))
    scene.store.create("s", DATA)
    if made.journal == "always":
        # The journal must not be empty.
        scene.store.update("s", lambda tx: tx.data.update(n=1))
    run = operation.stage(scene)
    set_mode(operation.mode, scene.store)
    if operation.is_cold:
        file_engine(scene.store).cache = Cache(2**20)
    return scene, run


def opened(mode: Mode, path: Path) -> persist.Store:
    store = persist.Store(path, timeout_s=TIMEOUT_S)
    set_mode(mode, store)
    return store


def set_mode(mode: Mode, store: persist.Store) -> None:
    mode.set(store)
    # The reads of the harness's own check must not fail.
    file_engine(store).options.verifies_folds = False


class Trial:
    """One operation with one fault.

    `complaints` names the wrong results. There are none if the operation does not reach the fault.
    """

    def __init__(self, operation: Operation, fault: Fault | FullDisk, directory: Path) -> None:
        self.complaints: list[str] = []
        self._operation, self._fault, self._ends = operation, fault, ends_of(operation)
        before = descriptors()
        self._scene, self._run = staged(operation, directory)
        memory, strays = self._scene.memory(), self._strays()
        self._raised, result = self._play()
        if self.is_reached:
            # A new store, like that of another process, reads what is really there.
            self._fresh = opened(operation.mode, self._scene.store.path)
            self._now = view(self._fresh)
            self._judge(result)
            self._expect(self._raised is None or self._scene.memory() == memory, "memory was changed")
            self._look_for_strays(strays)
            self._try_again()
            self._scene.close()
            # The errors only differ in their texts, so what they leave behind is looked at for one of them.
            if fault.errno == errno.EIO:
                self._use_it_again()
        self._scene.close()
        self._reclaim(descriptors() - before)

    def _play(self) -> tuple[Exception | None, object]:
        # A stream that an error dropped gives a warning. Below, the trial checks that it left no lease behind.
        with injecting(self._fault) as injection, warnings.catch_warnings(action="ignore", category=ResourceWarning):
            try:
                return None, self._run()
            except Exception as error:
                return error.with_traceback(None), None
            finally:
                self.is_reached = injection.hits > 0
                #: The calls that failed are those that would fail if the fault came once.
                self.happens_once = injection.hits <= 1 + (self._fault.errno == TORN)
                self._passed_since = injection.passed_since

    def _expect(self, is_right: bool, complaint: str) -> None:
        if not is_right:
            self.complaints.append(f"{self._operation.name}, {self._fault}: {complaint} ({self._raised!r})")

    def _judge(self, result: object) -> None:
        """Apply the rule of this module."""
        ends, raised = self._ends, self._raised
        changed = {
            session_id for session_id in ends.old | ends.new if self._now.get(session_id) != ends.old.get(session_id)
        }
        right = all(self._now.get(session_id) == ends.new.get(session_id) for session_id in changed)
        self._expect(
            right and self._now.keys() <= ends.old.keys() | ends.new.keys(), "neither the old revision nor the new"
        )
        if raised is None:
            self._expect(self._now == ends.new, "returned, and its effect is not on disk")
            # A file or directory whose sync failed is in doubt for good. Only a new file, synced and entered in its
            # directory, is not in doubt.
            is_durable = self._fault.call not in SYNCS or self._passed_since >= 2 or self._operation.is_look
            self._expect(is_durable, "returned, and it is not durable")
            is_short = self._operation.is_partial and self._fault.errno != SHORT
            self._expect(is_short or told(self._fresh, result) == ends.result, f"returned {result!r}")
            return
        self._expect(self._fault.errno != SHORT, "a short read or write is no error")
        kinds = (OSError, persist.PersistError) if self._operation.is_look else (persist.PersistError,)
        self._expect(isinstance(raised, kinds), "untyped error")
        errors = raised.failures if isinstance(raised, SweepFailed) else dict.fromkeys(changed, raised)
        sure = {cleared.session_id for cleared in getattr(raised, "cleared", [])}
        unknown = {session_id for session_id, error in errors.items() if isinstance(error, persist.CommitUnknown)}
        self._expect(changed == sure | unknown or ends.old == ends.new, "an error, and it is done all the same")
        is_unknown = isinstance(raised, persist.CommitUnknown)
        self._expect(not is_unknown or bool(changed) or ends.old == ends.new, "CommitUnknown, and nothing was done")

    def _look_for_strays(self, before: set[str]) -> None:
        """Require that no file is added, unless it could not be unlinked. Older left-overs may still be there."""
        failures = [self._raised, *getattr(self._raised, "failures", {}).values()]
        if "unlink" in self._fault.functions or any(isinstance(error, persist.CommitUnknown) for error in failures):
            return
        active = {f"{name}.{found[2][0]}" for name, found in self._now.items() if isinstance(found, tuple) and found[2]}
        strays = self._strays() - before - active
        self._expect(not strays, f"left over: {strays}")

    def _strays(self) -> set[str]:
        directory = self._scene.store.path
        left = maintenance.check(self._scene.store._backend)
        journals = {each.path.name for each in left if each.path.suffix == ".journal"}
        return journals | {path.name for pattern in ("*.tmp", ".leases/*") for path in directory.glob(pattern)}

    def _try_again(self) -> None:
        if isinstance(self._raised, persist.CommitUnknown):
            refusal = self._write(self._scene.store, self._raised.session_id)
            self._expect(isinstance(refusal, persist.CommitUnknown), f"takes writes after CommitUnknown: {refusal!r}")
        if self._raised is None or self._operation.is_final:
            self._expect(
                not self._operation.is_final or not self._scene.held[0]._lease.is_held, "the lease is still held"
            )
            return
        try:
            result = self._run()
        except Exception as error:
            still_unknown = isinstance(error, persist.CommitUnknown) and isinstance(self._raised, persist.CommitUnknown)
            is_right = still_unknown or (isinstance(error, persist.PersistError) and self._now != self._ends.old)
            self._expect(is_right, f"does not work afterwards: {error!r}")
            return
        if isinstance(self._raised, persist.CommitUnknown):
            self._expect(told(self._fresh, result) != self._ends.result, "is acknowledged after CommitUnknown")
        elif self._now == self._ends.old:
            self._expect(view(self._fresh) == self._ends.new, "the second try did something else")
            self._expect(told(self._fresh, result) == self._ends.result, f"the second try returned {result!r}")

    def _use_it_again(self) -> None:
        """Require that a new store works, and that no session is stuck, whatever has happened."""
        store = self._fresh
        failure = self._write(store, "s")
        self._expect(failure is None, f"a new store does not work: {failure!r}")
        try:
            sweep(store, every_session=True)
            for session_id in store.ids():
                store.start_stream(session_id).finish()
                store.compact(session_id)
            # A deletion that was cut off leaves its journal. `check` names it, because it cannot know that this was a
            # deletion.
            left = [
                each
                for each in store.check()
                if each.kind != "orphaned" or not self._operation.name.startswith("delete")
            ]
            self._expect(left == [], f"left over at the end: {left}")
        except (persist.PersistError, OSError) as error:
            self._expect(False, f"stuck: {error!r}")

    def _write(self, store: persist.Store, session_id: str) -> Exception | None:
        try:
            if store.exists(session_id):
                store.append(session_id, "more", 1)
            else:
                store.create(session_id, DATA)
        except Exception as error:
            return error
        return None

    def _reclaim(self, leaked: set[int]) -> None:
        self._expect(not leaked, f"{len(leaked)} descriptors leaked")
        for fd in leaked:
            held._descriptors.discard(fd)
            os.close(fd)


def trials(operation: Operation, call: str) -> Iterator[Trial]:
    """Yield one trial for each fault of a call, at each of its places that the operation reaches.

    A fault that lasts and one that comes once are the same run, if the call is never made again: one trial is for both.
    """
    happens_once = False
    for place in range(1, MOST_PLACES):
        # The lasting one comes first.
        for fault in reversed(faults(call, place)):
            if operation.is_variant and call not in SYNCS and fault.errno not in (errno.EIO, *PARTIAL):
                continue  # the other errors are covered where the session has no journal
            if happens_once and not fault.is_persistent:
                continue  # its lasting form, just before, was the same
            trial = tried(operation, fault)
            if not trial.is_reached:
                return
            happens_once = trial.happens_once
            yield trial
    raise AssertionError(f"{operation.name} does not come to an end: {call}")


def tried(operation: Operation, fault: Fault | FullDisk) -> Trial:
    with quick_directory() as directory:
        return Trial(operation, fault, directory)


@pytest.fixture(autouse=True)
def short_mount_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the trials a short mount table.

    Every trial opens stores, and reading a machine's whole table each time would take a fifth of the time.
    """
    (tmp_path / "mountinfo").write_text("36 25 0:32 / / rw - ext4 /dev/vda rw\n")
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(file_system, "_judged", {})


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_error_at_every_place_is_told_and_harms_nothing(operation: Operation) -> None:
    """Nothing is lost, torn, held or leaked, whichever call fails, once or for good."""
    # A trial is dropped as soon as it is judged, because it holds stores and sessions.
    found = [trial.complaints for call in ERRORS for trial in trials(operation, call)]
    assert found, "no fault was reached: nothing was proved"
    complaints = list(chain.from_iterable(found))
    if complaints:
        pytest.fail(f"{len(complaints)} complaints in {len(found)} trials:\n" + "\n".join(complaints), pytrace=False)


# --- a full disk ------------------------------------------------------------------------------------------------------

#: This is less than a record, and less than any other piece that is written, except the mark of one byte.
STEP_BYTES = 29
FILLING = (
    "create",
    "create, journaled",
    "append",
    "append, journaled",
    "append, journaled, of a new process",
    "append, folding",
    "append, entering",
    "append, leaving",
    "save, folding",
    "compact, journaled",
    "compact, leaving",
    "delete, journaled",
    "delete_by_force, journaled",
    "accept",
    "accept, journaled",
    "accept_of_a_damaged_journal, journaled",
    "accept_that_drops_a_journal, journaled",
    "start_stream, journaled",
    "finish, folding",
    "extend, journaled",
    "extend_that_creates",
    "transaction_of_several_changes",
    "transaction_of_several_changes, journaled",
    "start_that_creates, journaled",
    "stream_transaction, journaled",
    "finish_with_fields, folding",
)


@pytest.mark.parametrize("name", FILLING)
def test_disk_that_gets_full_at_any_byte_harms_nothing(name: str) -> None:
    """On a disk that gets full at any byte the verb is done whole, or the old revision stands.

    The same verb works as soon as there is room. Fails if written parts of a journal or a document stay behind.
    """
    found, room = list[Trial](), 0
    while not found or found[-1].is_reached:
        found.append(tried(OPERATIONS[name], FullDisk(room)))
        room += 1 if room < 3 else STEP_BYTES
    complaints = [complaint for trial in found for complaint in trial.complaints]
    if complaints:
        pytest.fail(f"{len(complaints)} complaints in {len(found)} trials:\n" + "\n".join(complaints), pytrace=False)
    assert len(found) > 1, "nothing was refused: nothing was proved"
