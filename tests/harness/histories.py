"""Concurrency histories: threads of several processes work on a few sessions, and each operation is recorded.

Some processes are killed. Run as a program, this module is one of the processes. Each call of a process, and the answer
that it was given, goes line by line into a file for each thread. So the record outlives the process, and an operation
without an answer is one whose outcome is unknown. The instants are of CLOCK_MONOTONIC, which the processes of a machine
share.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import persist
from harness import planted
from harness.journaling import LEASE_S, LOAD_BYTES, MIXED, Journaling, is_url, load_of
from harness.linearizability import (
    TAIL,
    UNKNOWN,
    Anomaly,
    Operation,
    Owned,
    Prefix,
    Versioned,
    check_list,
    check_object,
    check_versions,
    ownership,
    register,
)
from persist.storage.commit import Mode

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
# A server process may go on with what a killed process has sent. It notices the lost connection at its next answer.
SERVER_LATE_S = 2.0
KINDS = ("list", "register", "owner", "life")


@dataclass(frozen=True, slots=True)
class Plan:
    """The amount of work in one round.

    All threads walk through the groups (a session of each kind) at about the same time.
    """

    operations: int = 20_000
    processes: int = 3
    threads: int = 2
    kills: int = 6
    groups: int = 20
    reads: float = 0.8
    seed: int = 1533
    journal: Mode | Literal["mixed"] = MIXED
    fold: str = MIXED

    @property
    def journaling(self) -> Journaling:
        return Journaling(self.journal, self.fold)

    @property
    def operations_of_a_thread(self) -> int:
        return self.operations // (self.processes * self.threads)

    @property
    def session_ids(self) -> list[str]:
        return [f"{kind}-{group}" for kind in KINDS for group in range(self.groups)]


@dataclass(slots=True)
class Report:
    """The counts of a run, and the answers that no order of its operations explains."""

    operations: int = 0
    kills: int = 0
    unknown: int = 0
    seconds: float = 0.0
    anomalies: list[tuple[str, Anomaly]] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Add the counts of another round."""
        self.operations += other.operations
        self.kills += other.kills
        self.unknown += other.unknown
        self.seconds += other.seconds
        self.anomalies += other.anomalies

    @property
    def kinds(self) -> set[str]:
        """The kinds of anomalies, with the kind of session that had them."""
        return {f"{session_id.partition('-')[0]}: {anomaly.kind}" for session_id, anomaly in self.anomalies}


# --- in a worker process ----------------------------------------------------------------------------------------------


class Record:
    """One thread's operations, as lines of a file: the call before it is made, the answer after it is known."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def __call__(self, session_id: str, kind: str, argument: Any, action: Callable[[], Any]) -> Any:
        """Do an action. Write down the call, its instants, and its answer or its error. The error is raised again."""
        self._write(time.monotonic_ns(), session_id, kind, argument)
        try:
            result = action()
        except persist.PersistError as error:
            self._write(time.monotonic_ns(), "raised", repr(error))
            raise
        self._write(time.monotonic_ns(), "told", result)
        return result

    def _write(self, *line: Any) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")


class Client:
    """One thread of a server process: it draws operations, and records them."""

    def __init__(self, store: persist.Store, record: Record, name: str, seed: str) -> None:
        self._store = store
        self._record = record
        self._name = name
        self._random = random.Random(seed)
        self._count = 0
        self._group = -1
        self._loaded: dict[str, persist.Session] = {}
        self._stream: persist.Stream | None = None
        self._prompt: dict[str, str] = {}

    def work(self, first: int, plan: Plan) -> None:
        """Do the operations from number `first` to the plan's last."""
        for number in range(first, plan.operations_of_a_thread):
            self._enter(number * plan.groups // plan.operations_of_a_thread)
            kind = self._random.choice(KINDS)
            actions = READS if self._random.random() < plan.reads else WRITES
            # The record holds what an operation raised, and the thread goes on.
            with suppress(persist.PersistError):
                self._random.choice(actions[kind])(self, f"{kind}-{self._group}")
        self._enter(-1)

    def _enter(self, group: int) -> None:
        if group != self._group:
            if self._stream is not None:
                with suppress(persist.PersistError):
                    self.end(self._stream.session_id)
            self._loaded.clear()
            self._group = group

    def _new(self) -> str:
        self._count += 1
        return f"{self._name}-{self._count}"

    def _load(self, session_id: str, shown: Callable[[persist.Session], Any]) -> persist.Session:
        """Load a session. The record tells what it showed."""
        loaded: list[persist.Session] = []

        def load() -> Any:
            loaded.append(self._store.load(session_id))
            return shown(loaded[0])

        self._record(session_id, "read", None, load)
        return loaded[0]

    def _earlier(self, session_id: str) -> persist.Session:
        """Return a list that this thread has had for a while, so that its revision is an old one."""
        if session_id not in self._loaded:
            self._loaded[session_id] = self.load_list(session_id)
        return self._loaded[session_id]

    # lists

    def load_list(self, session_id: str) -> persist.Session:
        return self._load(session_id, _items)

    def refresh_list(self, session_id: str) -> None:
        session = self._earlier(session_id)

        def refresh() -> Prefix:
            session.refresh()
            return _items(session)

        self._record(session_id, "read", None, refresh)

    def count_list(self, session_id: str) -> None:
        self._record(session_id, "count", None, lambda: self._counted(session_id))

    def _counted(self, session_id: str) -> tuple[int, str]:
        head = self._store.head(session_id)
        return head.counts["messages"], head.version

    def tail_list(self, session_id: str) -> None:
        def last() -> list[str]:
            return [message["id"] for message in self._store.tail(session_id, limit=TAIL)]

        self._record(session_id, "tail", None, last)

    def compact_list(self, session_id: str) -> None:
        """Fold a list. A fold keeps the version."""
        self._compact(session_id, "count", lambda: self._counted(session_id))

    def _compact(self, session_id: str, kind: str, look: Callable[[], Any]) -> None:
        """Fold a session. A fold shows nothing, and must change nothing of what is seen after it."""

        def fold() -> Any:
            self._store.compact(session_id)
            return look()

        self._record(session_id, kind, None, fold)

    def append_by_append(self, session_id: str) -> None:
        item = self._new()

        def append() -> str:
            return self._store.append(session_id, "messages", {"id": item})

        self._record(session_id, "append", item, append)

    def extend(self, session_id: str) -> None:
        """Append a pair. Half of the time, do it again, as a client does that has not got its answer."""
        pair = self._new(), self._new()

        def extend() -> str:
            return self._store.extend(session_id, "messages", [{"id": item} for item in pair])

        self._record(session_id, "extend", pair, extend)
        if self._random.random() < 0.5:
            self._record(session_id, "at", None, extend)

    def look_by_transaction(self, session_id: str) -> None:
        """Ask for the version by a transaction that changes nothing."""

        def look() -> str | None:
            with self._store.transaction(session_id) as tx:
                pass
            return tx.version

        self._record(session_id, "at", None, look)

    def append_if(self, session_id: str) -> None:
        version, item = self._earlier_version(session_id), self._new()

        def append() -> tuple[bool, str | None]:
            try:
                with self._store.transaction(session_id, if_version=version) as tx:
                    tx.list("messages").append({"id": item})
                return True, tx.version
            except persist.VersionMismatch as mismatch:
                return False, mismatch.theirs

        self._record(session_id, "append_if", (version, item), append)

    def _earlier_version(self, session_id: str) -> str:
        """Return the current version, mostly. Else return that of an object which this thread has had for a while."""
        if self._random.random() < 0.7:
            return str(self._record(session_id, "count", None, lambda: self._counted(session_id))[1])
        return self._earlier(session_id).version

    def append_by_edit(self, session_id: str) -> None:
        item = self._new()

        def edit() -> str | None:
            with self._store.transaction(session_id) as tx:
                tx.data["messages"].append({"id": item})
            return tx.version

        self._record(session_id, "append", item, edit)

    def append_by_transaction(self, session_id: str) -> None:
        item = self._new()

        def append() -> str | None:
            with self._store.transaction(session_id) as tx:
                tx.list("messages").append({"id": item})
            return tx.version

        self._record(session_id, "append", item, append)

    def append_by_save(self, session_id: str) -> None:
        session, item = self._earlier(session_id), self._new()
        session.data["messages"].append({"id": item})

        def save() -> Prefix:
            version = session.save()
            return _items(session)._replace(version=version)

        self._record(session_id, "append", item, save)

    # registers

    def load_register(self, session_id: str) -> persist.Session:
        return self._load(session_id, _value)

    def head_register(self, session_id: str) -> Versioned:
        seen: Versioned = self._record(session_id, "read", None, lambda: _value(self._store.head(session_id)))
        return seen

    def write(self, session_id: str) -> None:
        """Write a value and a load, which makes the session a large one or a small one."""
        value, load = self._new(), self._load_drawn()

        def edit() -> str | None:
            with self._store.transaction(session_id) as tx:
                tx.data.update(value=value, tool_calls=load)
            return tx.version

        self._record(session_id, "write", value, edit)

    def _load_drawn(self) -> list[dict[str, str]]:
        return load_of(self._random.choice((0, LOAD_BYTES)))

    def write_head(self, session_id: str) -> None:
        value = self._new()

        def update(tx: persist.Transaction) -> persist.Transaction:
            tx.fields["value"] = value
            return tx

        self._record(session_id, "write", value, lambda: self._store.update(session_id, update).version)

    def compact_register(self, session_id: str) -> None:
        self._compact(session_id, "read", lambda: _value(self._store.head(session_id)))

    def swap_by_update(self, session_id: str) -> None:
        expected, value = self.load_register(session_id).data["value"], self._new()

        def swap(tx: persist.Transaction) -> bool:
            if tx.data["value"] != expected:
                return False
            tx.data["value"] = value
            return True

        def update() -> tuple[bool, None]:
            return self._store.update(session_id, swap), None

        self._record(session_id, "swap", (expected, value), update)

    def swap_by_transaction(self, session_id: str) -> None:
        expected, value = self.head_register(session_id).value, self._new()

        def swap() -> tuple[bool, str | None]:
            with self._store.transaction(session_id) as tx:
                is_hit = tx.fields["value"] == expected
                if is_hit:
                    tx.fields["value"] = value
            # Where nothing was written, it is the version that was read.
            return is_hit, tx.version

        self._record(session_id, "swap", (expected, value), swap)

    def swap_by_save(self, session_id: str) -> None:
        session, value = self.load_register(session_id), self._new()
        expected, session.data["value"] = session.data["value"], value

        def save() -> tuple[bool, str | None]:
            try:
                return True, session.save()
            except persist.MergeConflict:
                return False, None

        self._record(session_id, "swap", (expected, value), save)

    def put(self, session_id: str) -> None:
        version, value = self.head_register(session_id).version, self._new()

        def put(tx: persist.Transaction) -> persist.Transaction:
            tx.fields["value"] = value
            return tx

        def update() -> tuple[bool, str | None]:
            try:
                return True, self._store.update(session_id, put, if_version=version).version
            except persist.VersionMismatch as mismatch:
                return False, mismatch.theirs

        self._record(session_id, "put", (version, value), update)

    # owners

    def load_owner(self, session_id: str) -> persist.Session:
        return self._load(session_id, _owner)

    def head_owner(self, session_id: str) -> None:
        self._record(session_id, "read", None, lambda: _owner(self._store.head(session_id)))

    def ask_owner(self, session_id: str) -> None:
        stream = self._stream
        if stream is None:
            self.head_owner(session_id)
        else:
            self._record(session_id, "asked", stream.id, stream.is_cancelled)

    def start(self, session_id: str) -> None:
        if self._stream is not None:
            self.end(session_id)
        stream_id, is_once = self._new(), self._random.random() < 0.5
        prompt = {"id": f"{stream_id}?", "role": "user", "content": "?"}

        def start() -> str | None:
            try:
                self._stream = self._begin(session_id, stream_id, prompt, once=is_once)
            except persist.SessionBusy as busy:
                return busy.stream_id
            return None

        self._record(session_id, "start", stream_id, start)
        self._prompt = prompt

    def _begin(self, session_id: str, stream_id: str, prompt: dict[str, str], *, once: bool) -> persist.Stream:
        """Start a stream. The field is set with the claim."""
        options: dict[str, Any] = {"fields": {"owner": stream_id}, "once": once, "create": once}
        return self._store.start_stream(session_id, prompt, stream_id=stream_id, **options)

    def start_again(self, session_id: str) -> None:
        """Start a prompt again, as a client does that has not got its answer.

        If its stream was taken away, the prompt is started anew.
        """
        first, stream_id = self._stream, self._new()
        if first is None:
            self.start(session_id)
            return

        def start() -> tuple[str, str | None]:
            try:
                self._stream = self._begin(session_id, stream_id, self._prompt, once=True)
            except persist.AlreadyStarted as started:
                return "runs", started.stream_id
            except persist.SessionBusy as busy:
                return "is busy", busy.stream_id
            return "has started", stream_id

        self._record(session_id, "again", (stream_id, first.id), start)
        if self._stream is not first:
            # The first stream gives its lease up.
            with first:
                pass

    def hold(self, session_id: str) -> None:
        stream = self._stream
        if stream is None:
            self.start(session_id)
            return

        def change() -> bool:
            try:
                with stream.transaction() as tx:
                    tx.fields["held"] = stream.id
            except persist.StreamLost:
                return False
            return True

        self._record(session_id, "held", stream.id, change)

    def end(self, session_id: str) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            self.start(session_id)
            return
        end = self._random.choice((stream.fail, partial(stream.finish, fields={"owner": None})))

        def leave() -> bool:
            try:
                # The block gives up the lease, also if the stream has lost its session.
                with stream:
                    end()
            except persist.StreamLost:
                return False
            return True

        self._record(session_id, "end", stream.id, leave)

    def cancel(self, session_id: str) -> None:
        active = self.load_owner(session_id).active_stream_id
        if active is not None:
            self._record(session_id, "cancel", active, lambda: self._store.cancel(session_id, active))

    def take_away(self, session_id: str) -> None:
        active = self.load_owner(session_id).active_stream_id
        if active is not None:
            self._record(session_id, "force", active, lambda: self._store.cancel(session_id, active, force=True))

    def clear(self, session_id: str) -> None:
        session = self.load_owner(session_id)
        if session.active_stream_id is not None:
            self._record(session_id, "clear", session.active_stream_id, session.clear_stale_stream)

    # lives

    def load_life(self, session_id: str) -> str | None:
        """Load a session. Return its version, or None if there is no session."""

        def load() -> Versioned | None:
            try:
                return _last(self._store.load(session_id))
            except persist.SessionNotFound:
                return None

        seen = self._record(session_id, "read", None, load)
        return None if seen is None else str(seen.version)

    def head_life(self, session_id: str) -> None:
        def look() -> tuple[int, str] | None:
            try:
                head = self._store.head(session_id)
            except persist.SessionNotFound:
                return None
            return head.revision, head.version

        self._record(session_id, "look", None, look)

    def heads_life(self, session_id: str) -> None:
        def look() -> tuple[int, str] | None:
            found = [head for head in self._store.heads(prefix=session_id) if head.id == session_id]
            return (found[0].revision, found[0].version) if found else None

        self._record(session_id, "look", None, look)

    def tail_life(self, session_id: str) -> None:
        def last() -> str | None:
            try:
                return _id_of_last(self._store.tail(session_id, limit=1))
            except persist.SessionNotFound:
                return None

        self._record(session_id, "value", None, last)

    def exists_life(self, session_id: str) -> None:
        self._record(session_id, "exists", None, lambda: self._store.exists(session_id))

    def ids_life(self, session_id: str) -> None:
        self._record(session_id, "exists", None, lambda: session_id in self._store.ids(prefix=session_id))

    def create_life(self, session_id: str) -> None:
        value = self._new()

        def create() -> str | bool:
            try:
                return self._store.create(session_id, {"messages": [{"id": value}]}).version
            except persist.SessionExists:
                return False

        self._record(session_id, "create", value, create)

    def write_by_extend(self, session_id: str) -> None:
        value = self._new()
        items = [{"id": f"{value}-before"}, {"id": value}]
        self._record(session_id, "write", value, lambda: self._store.extend(session_id, "messages", items, create=True))

    def write_by_append(self, session_id: str) -> None:
        value = self._new()
        append = partial(self._store.append, session_id, "messages", {"id": value}, create=True)
        self._record(session_id, "write", value, append)

    def write_by_transaction(self, session_id: str) -> None:
        value = self._new()

        def write() -> str | None:
            with self._store.transaction(session_id, create=True) as tx:
                tx.list("messages").append({"id": value})
            return tx.version

        self._record(session_id, "write", value, write)

    def put_life(self, session_id: str) -> None:
        version, value = self.load_life(session_id), self._new()
        if version is None:
            self.create_life(session_id)
            return

        def put() -> tuple[bool, str | None]:
            try:
                with self._store.transaction(session_id, if_version=version, create=True) as tx:
                    tx.list("messages").append({"id": value})
                return True, tx.version
            except persist.VersionMismatch as mismatch:
                return False, mismatch.theirs
            except persist.SessionNotFound:
                return False, None

        self._record(session_id, "put", (version, value), put)

    def delete_life(self, session_id: str) -> None:
        is_block = self._random.random() < 0.5

        def delete() -> bool:
            try:
                if is_block:
                    with self._store.transaction(session_id) as tx:
                        tx.list("messages").append({"id": "never to be seen"})
                        tx.delete()
                else:
                    self._store.delete(session_id)
            except persist.SessionNotFound:
                return False
            return True

        self._record(session_id, "delete", None, delete)

    def delete_what_was_seen(self, session_id: str) -> None:
        version = self.load_life(session_id)
        if version is None:
            self.create_life(session_id)
            return

        def delete() -> tuple[bool, str | None]:
            try:
                self._store.delete(session_id, if_version=version)
            except persist.VersionMismatch as mismatch:
                return False, mismatch.theirs
            except persist.SessionNotFound:
                return False, None
            return True, None

        self._record(session_id, "delete_if", version, delete)

    def compact_life(self, session_id: str) -> None:
        """Fold a session. A fold keeps the version."""

        def fold() -> tuple[int, str] | None:
            try:
                self._store.compact(session_id)
                head = self._store.head(session_id)
            except persist.SessionNotFound:
                return None
            return head.revision, head.version

        self._record(session_id, "look", None, fold)


def _items(session: persist.Session) -> Prefix:
    return Prefix.of((message["id"] for message in session.data["messages"]), session.version)


def _owner(seen: persist.Session | persist.Head) -> str | None:
    """Return the active stream. The field that it has set with its claim must name it, too."""
    data = seen.data if isinstance(seen, persist.Session) else seen.fields
    active = seen.active_stream_id
    return active if active is None or data.get("owner") == active else f"{active}, and the field {data.get('owner')}"


def _last(session: persist.Session) -> Versioned:
    return Versioned(session.revision, session.version, _id_of_last(session.data["messages"]))


def _id_of_last(messages: list[dict[str, str]]) -> str:
    return messages[-1]["id"] if messages else ""


def _value(seen: persist.Session | persist.Head) -> Versioned:
    data = seen.data if isinstance(seen, persist.Session) else seen.fields
    return Versioned(seen.revision, seen.version, data["value"])


Action = Callable[[Client, str], object]
READS: dict[str, list[Action]] = {
    "list": [Client.load_list, Client.refresh_list, Client.count_list, Client.tail_list, Client.look_by_transaction],
    "register": [Client.load_register, Client.head_register],
    "owner": [Client.load_owner, Client.head_owner, Client.ask_owner],
    "life": [
        *(Client.load_life, Client.head_life, Client.heads_life),
        *(Client.tail_life, Client.exists_life, Client.ids_life),
    ],
}
WRITES: dict[str, list[Action]] = {
    "list": [
        Client.append_by_append,
        Client.append_by_edit,
        Client.append_by_transaction,
        Client.append_by_save,
        Client.append_if,
        Client.extend,
        Client.extend,
        Client.compact_list,
    ],
    "register": [
        Client.write,
        Client.write_head,
        Client.swap_by_update,
        Client.swap_by_transaction,
        Client.swap_by_save,
        Client.put,
        Client.compact_register,
    ],
    "owner": [
        *(Client.start, Client.start_again, Client.hold, Client.end),
        *(Client.cancel, Client.take_away, Client.clear),
    ],
    "life": [
        *(Client.create_life, Client.write_by_extend, Client.write_by_append, Client.write_by_transaction),
        *(Client.put_life, Client.delete_life, Client.delete_what_was_seen, Client.compact_life),
    ],
}


def _work(directory: Path, place: str, number: int, starts: list[int], plan: Plan) -> None:
    journaling = plan.journaling.drawn(random.Random(f"{plan.seed} {number}"))
    store = journaling.open(place, timeout_s=DEADLINE_S)
    barrier = threading.Barrier(len(starts) + 1)
    failures: list[BaseException] = []

    def work(index: int, first: int) -> None:
        name = f"p{number}t{index}"
        client = Client(store, Record(_record_path(directory, number, index)), name, f"{plan.seed} {name}")
        barrier.wait()
        try:
            client.work(first, plan)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(starts)]
    for thread in threads:
        thread.start()
    # The records are open, so the parent sees that this process is ready. The parent ends the input of this process to
    # let it go.
    sys.stdin.read()
    barrier.wait()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _record_path(directory: Path, number: int, index: int) -> Path:
    return directory / "records" / f"{number}-{index}"


# --- in the process that leads ----------------------------------------------------------------------------------------


class _Worker:
    """One process of a round. `starts` are the numbers of the operations that its threads begin with."""

    def __init__(self, directory: Path, place: str, number: int, starts: list[int], plan: Plan, package: Path) -> None:
        self.number = number
        self.starts = starts
        self._late_ns = int(SERVER_LATE_S * 1e9) if is_url(place) else 0
        self.died: tuple[int, int] | None = None
        self.records = [_record_path(directory, number, index) for index in range(len(starts))]
        options = json.dumps([str(directory), place, number, starts, asdict(plan)])
        command = [*planted.PYTHON, __file__, options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=planted.environment(package))

    @property
    def is_ready(self) -> bool:
        return all(record.exists() for record in self.records)

    @property
    def is_running(self) -> bool:
        """Whether it is still at work. A process that failed fails the run."""
        status = self.process.poll()
        assert status in (None, 0), f"worker {self.number} ended with status {status}; what it says stands above"
        return status is None

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        """Make sure that the process is gone."""
        self.go()
        self.process.kill()
        self.process.wait()

    def written_bytes(self) -> int:
        return sum(record.stat().st_size for record in self.records if record.exists())

    def kill(self) -> None:
        """Kill the process with SIGKILL, and note the instants before and after.

        The process died between the two. An operation that it had begun has taken effect by the second one, or never.
        Where a server does the work, that is a while later.
        """
        called = time.monotonic_ns()
        self.process.kill()
        self.process.wait()
        self.died = called, time.monotonic_ns() + self._late_ns

    def calls(self) -> list[int]:
        """Return how far each thread has come."""
        return [first + len(list(_calls(path))) for first, path in zip(self.starts, self.records, strict=True)]

    def operations(self) -> Iterator[tuple[str, Operation]]:
        """Yield each operation that the process called, with its session.

        An operation that was not answered has an unknown outcome.
        """
        gone = self.died[1] if self.died else time.monotonic_ns()
        for path in self.records:
            for called, session_id, kind, argument, answer in _calls(path):
                returned, how, result = answer or (gone, "unknown", None)
                operation = Operation(self.number, kind, _tuple(argument), called, returned)
                if how == "raised":
                    yield session_id, replace(operation, kind="raised", argument=(kind, result))
                if how == "told":
                    # The state that a save has brought into memory is told below.
                    made = result[2] if kind == "append" and type(result) is list else result
                    operation = replace(operation, result=_tuple(made))
                yield session_id, operation
                if how == "told" and kind == "append" and type(result) is list:
                    # A save brings the committed state into memory, so it is a read as well.
                    yield session_id, replace(operation, kind="read", result=_tuple(result))


def _calls(path: Path) -> Iterator[tuple[int, str, str, Any, Any]]:
    """Yield the calls of a record, each with its answer or None.

    A kill may have torn the last line. Such a line counts as not written.
    """
    lines = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    is_answer = [line[1] in ("told", "raised") for line in lines] + [False]
    for index, line in enumerate(lines):
        if not is_answer[index]:
            yield (*line, lines[index + 1] if is_answer[index + 1] else None)


def _tuple(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


class _Round:
    """One round: fresh sessions, the processes that work on them, and the kills."""

    def __init__(self, directory: Path, place: str, plan: Plan, package: Path) -> None:
        self._directory, self._place, self._plan, self._package = directory, place, plan, package
        self._random = random.Random(plan.seed)
        # A server answers slower than a directory in memory.
        self._deadline = time.monotonic() + DEADLINE_S * (5 if is_url(place) else 1)
        self._workers: list[_Worker] = []
        self._kills = self._planned_kills()
        (directory / "records").mkdir(parents=True)

    def _planned_kills(self) -> list[list[int]]:
        """Return, for each place of a worker, after how many bytes of records its processes are killed.

        The last kill comes first.
        """
        plan = self._plan
        kills: list[list[int]] = [[] for _ in range(plan.processes)]
        # An operation writes about 100 bytes. So these kills come early enough to be reached.
        least = plan.operations_of_a_thread * plan.threads * 80
        for number in range(plan.kills):
            place = kills[number % plan.processes]
            place.append(self._random.randrange(1, max(2, least * plan.processes // plan.kills)))
        return kills

    def _start(self, starts: list[int]) -> _Worker:
        worker = _Worker(self._directory, self._place, len(self._workers), starts, self._plan, self._package)
        self._workers.append(worker)
        return worker

    def run(self) -> list[_Worker]:
        """Let the processes work until all is done. Return them, the killed ones too."""
        try:
            places = [self._start([0] * self._plan.threads) for _ in range(self._plan.processes)]
            while not all(worker.is_ready and worker.is_running for worker in places):
                self._pause()
            for worker in places:
                worker.go()
            while any(worker.is_running for worker in places):
                places = [self._kill_if_due(*each) for each in zip(places, self._kills, strict=True)]
                self._pause()
            return self._workers
        finally:
            for worker in self._workers:
                worker.close()

    def _kill_if_due(self, worker: _Worker, kills: list[int]) -> _Worker:
        """Kill a worker if it has come so far. Return the worker that is in its place then."""
        if not kills or worker.written_bytes() < kills[-1] or not worker.is_running:
            return worker
        kills.pop()
        worker.kill()
        successor = self._start(worker.calls())
        successor.go()
        return successor

    def _pause(self) -> None:
        assert time.monotonic() < self._deadline, "a round did not end in time"
        time.sleep(0.001)


def run_round(directory: Path, plan: Plan, *, package: Path = ROOT, url: str | None = None) -> Report:
    """Run one round on fresh sessions in `directory`, and check its history.

    Args:
        package: the directory that holds the package `persist` which the processes use.
        url: a database with an empty schema, which holds the sessions instead.
    """
    started = time.monotonic()
    place = url or str(directory / "sessions")
    store = plan.journaling.drawn(random.Random(plan.seed)).open(place)
    for session_id in plan.session_ids:
        # Every other session is large.
        load = load_of(int(session_id.rpartition("-")[2]) % 2 * LOAD_BYTES)
        store.create(session_id, {"messages": [], "value": None, "tool_calls": load})
    workers = _Round(directory, place, plan, package).run()
    histories: dict[str, list[Operation]] = defaultdict(list)
    for worker in workers:
        for session_id, operation in worker.operations():
            histories[session_id].append(operation)
    report = Report(kills=sum(worker.died is not None for worker in workers))
    # A file's lease ends with its process, and a lease in a database a while later.
    lease_ns = int(LEASE_S * 1e9) if url else 0
    dead = [(worker.number, *worker.died) for worker in workers if worker.died]
    deaths = [Operation(number, "die", None, called, gone + lease_ns, None) for number, called, gone in dead]
    for session_id, history in histories.items():
        asked = [operation for operation in history if operation.kind != "raised"]
        report.operations += len(asked)
        report.unknown += sum(operation.result is UNKNOWN for operation in asked)
        raised = [Anomaly("raised", str(operation)) for operation in history if operation.kind == "raised"]
        try:
            anomalies = raised + check_session(session_id, _found(store, session_id), asked, deaths)
        except persist.CorruptSession as damage:
            anomalies = [*raised, Anomaly("damaged", str(damage))]
        report.anomalies += [(session_id, anomaly) for anomaly in anomalies]
    report.seconds = time.monotonic() - started
    return report


def _found(store: persist.Store, session_id: str) -> persist.Session | None:
    try:
        return store.load(session_id)
    except persist.SessionNotFound:
        return None


def check_session(
    session_id: str, final: persist.Session | None, history: list[Operation], deaths: list[Operation]
) -> list[Anomaly]:
    """Check the history of one session, given how it stands at the end."""

    def last_read(result: Any) -> Operation:
        now = time.monotonic_ns()
        return Operation(-1, "read", None, now, now, result)

    kind = session_id.partition("-")[0]
    if kind == "life":
        history = [*history, last_read(None if final is None else _last(final))]
        return check_versions(history) + check_object(history, Versioned(1, None, ""), register)
    if final is None:
        return [Anomaly("lost", f"{session_id} is not there")]
    match kind:
        case "list":
            items = [message["id"] for message in final.data["messages"]]
            return check_list([*history, last_read(_items(final))], items)
        case "register":
            history = [*history, last_read(_value(final))]
            return check_versions(history) + check_object(history, Versioned(1, None, None), register)
        case _:
            return check_object([*history, *deaths, last_read(_owner(final))], Owned(), ownership)


if __name__ == "__main__":
    _directory, _place, _number, _starts, _plan = json.loads(sys.argv[1])
    _work(Path(_directory), _place, _number, _starts, Plan(**_plan))
