"""The cost of the verbs on PostgreSQL, beside hand-written programs that send the same statements.

Two of them are measured, each with psycopg and one connection that it keeps. The first sends one statement after the
other, as most programs do, and lets psycopg prepare them. The second puts its statements into as few messages as
possible. Neither merges, checks an argument, survives a lost connection or knows what became of a commit.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection as Pipe
from typing import Any

import msgspec
import psycopg

import persist
from benchmarks.measure import FORK, Action, Effort, interleaved
from benchmarks.tables import Findings, Table, at_least, at_most, ratio, shown
from benchmarks.workload import SESSION, conversation, message, new_message
from persist.postgres.statements import Statements

#: The number of messages in a session at the beginning.
MESSAGES = 1_000
#: So often each program runs before it is measured.
WARM_UP = 10
#: A verb must not cost more than so many times a hand-written program.
LIMIT = 1.3
FOLLOWERS, FOLLOWER_LIMIT_MS = 50, 150
PROCESSES, WAIT_LIMIT_MS, FAIRNESS = 8, 100, 0.5
#: The average pause between two tokens of a model.
PAUSE_S = 0.02
#: A child that is silent for longer hangs.
DEADLINE_S = 120.0

_encode, _decode = msgspec.json.encode, msgspec.json.decode
PROMPT = {"id": "prompt", "role": "user", "content": "Why?"}

#: The statements that read a whole session.
_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
_WHOLE = ("head", "all_items", "all_parts")
#: The columns of a session's row, as the statements `lock` and `read` give them.
_COLUMNS = (
    *("session", "incarnation", "revision", "commit", "epoch", "created_at", "updated_at", "owner", "fields", "apart"),
    *("commits", "process", "stream_id"),
)


class ByHand:
    """A hand-written program, which sends one statement after the other."""

    def __init__(self, url: str, schema: str) -> None:
        self.texts = Statements(schema).texts
        one = "(%(session)s, %(list)s, %(place)s, %(key)s, %(item)s)"
        self.texts["put_items"] = self.texts["put_items"].replace("%(rows)s", one)
        self.connection = self.connect(url)

    def connect(self, url: str) -> psycopg.Connection[Any]:
        return psycopg.connect(url, autocommit=True)

    def commit(
        self, session_id: str, change: Callable[[dict[str, Any]], dict[str, Any] | None], key: str | None = None
    ) -> None:
        """Lock a session, look for an item, and write the session's row and an item."""
        execute = self.connection.execute
        execute("BEGIN")
        execute("SET LOCAL lock_timeout = 5000")
        execute(self.texts["lock_name"], {"lock": hash(session_id)})
        row = self.row(execute(self.texts["lock"], {"id": session_id}).fetchone())
        found = []
        if key is not None:
            find = {"session": row["session"], "list": "messages", "key": _encode(key).decode(), "stop": row["count"]}
            found = execute(self.texts["items_of_key"], find).fetchall()
        item = change(row)
        execute(self.texts["update"], self.next(row, item, is_new=not found))
        if item is not None:
            execute(self.texts["put_items"], self.put(row, item, found))
        execute("COMMIT")

    def row(self, found: Any) -> dict[str, Any]:
        row = dict(zip(_COLUMNS, found, strict=True))
        row["fields"], row["apart"] = _decode(row["fields"]), _decode(row["apart"])
        row["count"] = row["apart"]["messages"][0]
        return row

    def next(self, row: dict[str, Any], item: dict[str, Any] | None, *, is_new: bool) -> dict[str, Any]:
        """Return the values of the statement that writes the session's row."""
        if item is not None:
            row["apart"]["messages"] = [row["count"] + is_new, row["apart"]["messages"][1] + len(_encode(item))]
        changed = {
            "before": row["commit"],
            "commit": uuid.uuid4().hex[:16],
            "revision": row["revision"] + 1,
            "updated_at": datetime.now(UTC),
            "fields": _encode(row["fields"]).decode(),
            "apart": _encode(row["apart"]).decode(),
            "lease": row["process"],
        }
        return row | changed

    def put(self, row: dict[str, Any], item: dict[str, Any], found: list[Any]) -> dict[str, Any]:
        """Return the values of the statement that writes an item."""
        start = found[0][0] if found else row["count"]
        facts = {"key": _encode(item["id"]).decode(), "item": _encode(item).decode()}
        return {"session": row["session"], "list": "messages", "place": start, **facts}

    def load(self, session_id: str) -> dict[str, Any]:
        """Read a session with all its items, in one snapshot."""
        execute = self.connection.execute
        execute(_SNAPSHOT)
        found = [execute(self.texts[name], {"id": session_id}).fetchall() for name in _WHOLE]
        execute("COMMIT")
        return self.data(*found)

    def data(self, heads: list[Any], items: list[Any], parts: list[Any]) -> dict[str, Any]:
        data: dict[str, Any] = _decode(heads[0][8])
        lists: dict[str, list[str]] = {}
        for name, item in items:
            if name is not None:
                own = lists[name] = []
            own.append(item)
        for name, texts in lists.items():
            data[name] = _decode(f"[{','.join(texts)}]")
        return data | {name: _decode(value) for name, value in parts}

    # --- the verbs ---

    def append(self) -> None:
        item = new_message()
        self.commit(SESSION, lambda _: item, item["id"])

    def update(self) -> None:
        def edit(row: dict[str, Any]) -> None:
            row["fields"]["draft"] += 1

        self.commit(SESSION, edit)

    def checkpoint(self, answer: dict[str, Any]) -> None:
        self.commit("turn", lambda _: answer, answer["id"])


class InBatches(ByHand):
    """A hand-written program, which puts its statements into as few messages as possible."""

    def connect(self, url: str) -> psycopg.Connection[Any]:
        return psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor, prepare_threshold=None)

    def commit(
        self, session_id: str, change: Callable[[dict[str, Any]], dict[str, Any] | None], key: str | None = None
    ) -> None:
        execute = self.connection.execute
        text = psycopg.ClientCursor(self.connection).mogrify
        looks = [
            text(self.texts["lock_name"], {"lock": hash(session_id)}),
            text(self.texts["lock"], {"id": session_id}),
        ]
        if key is not None:
            find = {"id": session_id, "list": "messages", "key": _encode(key).decode()}
            looks.append(text(self.texts["seek_one"], find))
        cursor = execute("; ".join(["BEGIN", "SET LOCAL lock_timeout = 5000", *looks]))
        for _ in range(3):
            cursor.nextset()
        row, found = self.row(cursor.fetchone()), []
        if key is not None:
            cursor.nextset()
            found = [row[1:] for row in cursor.fetchall()]
        item = change(row)
        statements = [text(self.texts["update"], self.next(row, item, is_new=not found))]
        if item is not None:
            statements.append(text(self.texts["put_items"], self.put(row, item, found)))
        execute("; ".join([*statements, "COMMIT"]))

    def load(self, session_id: str) -> dict[str, Any]:
        text = psycopg.ClientCursor(self.connection).mogrify
        statements = [_SNAPSHOT, *(text(self.texts[name], {"id": session_id}) for name in _WHOLE), "COMMIT"]
        cursor = self.connection.execute("; ".join(statements))
        return self.data(*[cursor.fetchall() for _ in cursor.results() if cursor.description is not None])


# --- one process -----------------------------------------------------------------------------------------------------


def verbs(url: str, effort: Effort) -> Findings:
    """Measure append, field update, checkpoint and load."""
    schema = f"bench_{uuid.uuid4().hex[:8]}"
    store = persist.Store(url, schema=schema, timeout_s=60.0)
    store.create(SESSION, conversation(MESSAGES))
    # A checkpoint needs a session with a running stream, whose row is the same for all of them.
    store.create("turn", conversation(MESSAGES))
    # The others grow.
    store.create("read", conversation(MESSAGES))
    stream = store.start_stream("turn", PROMPT)
    programs = {"one by one": ByHand(url, schema), "in batches": InBatches(url, schema)}
    texts = itertools.count(1)

    def answer() -> dict[str, Any]:
        # An answer that grows to 4 KB, again and again.
        return message(next(texts)) | {"id": f"{stream.id}.answer", "content": "word " * (next(texts) * 20 % 800)}

    def edit(tx: persist.Transaction) -> None:
        tx.fields["draft"] += 1

    stream.checkpoint(answer())
    ours: dict[str, Callable[[], object]] = {
        "append": lambda: store.append(SESSION, "messages", new_message()),
        "update of a field": lambda: store.update(SESSION, edit),
        "checkpoint": lambda: stream.checkpoint(answer()),
        "load": lambda: store.load("read").data,
    }
    theirs: dict[str, Callable[[ByHand], object]] = {
        "append": lambda program: program.append(),
        "update of a field": lambda program: program.update(),
        "checkpoint": lambda program: program.checkpoint(answer()),
        "load": lambda program: program.load("read"),
    }
    rows, targets = [], []
    for verb, call in ours.items():
        actions = {"persist": Action(call)}
        for name, program in programs.items():
            actions[name] = Action(lambda program=program, verb=verb: theirs[verb](program))  # type: ignore[misc]
        # The server makes its plans, and psycopg prepares statements, in the first runs.
        for action in [*actions.values()] * WARM_UP:
            action.run()
        found = interleaved(actions, effort)
        best = min(found[name] for name in programs)
        rows.append((verb, *map(shown, found.values()), ratio(found["persist"], best)))
        targets.append(at_most(f"{verb}, to the quicker hand-written program", LIMIT, found["persist"] / best))
    stream.finish()
    columns = ("persist", *programs, "to the quicker")
    note = "Medians of rounds in which each runs once. The hand-written programs send the same statements."
    return Findings([Table(f"A session of {MESSAGES:,} messages", columns, rows, [note])], targets)


# --- followers in another process ------------------------------------------------------------------------------------


def followers(url: str, tokens: int) -> Findings:
    """Measure how late an event comes to 50 followers in another process."""
    schema = f"bench_{uuid.uuid4().hex[:8]}"
    store = persist.Store(url, schema=schema, timeout_s=60.0)
    store.create(SESSION)
    here, there = FORK.Pipe()
    # The child is forked before this process has threads.
    process = FORK.Process(target=_listen, args=(url, schema, there))
    process.start()
    there.close()
    try:
        with store.start_stream(SESSION, PROMPT) as stream:
            here.send(stream.id)
            _received(here)
            for number in range(tokens):
                time.sleep(PAUSE_S * (0.5 + number * 0.618 % 1.0))
                # This clock is CLOCK_MONOTONIC, which is the same for all processes.
                stream.emit({"type": "token", "text": "because ", "at": time.monotonic()})
            stream.finish()
        late_s = sorted(_received(here))
    finally:
        process.kill()
        process.join()
    assert len(late_s) == tokens * FOLLOWERS
    p50, p99, worst = late_s[len(late_s) // 2], late_s[len(late_s) * 99 // 100], late_s[-1]
    rows = [(f"{FOLLOWERS} threads in another process", shown(p50), shown(p99), shown(worst))]
    table = Table(f"From emit to a follower, {1 / PAUSE_S:.0f} events a second", ("p50", "p99", "worst"), rows)
    return Findings([table], [at_most("emit to a follower, p99", FOLLOWER_LIMIT_MS, p99 * 1e3, "ms")])


def _listen(url: str, schema: str, pipe: Pipe) -> None:
    store = persist.Store(url, schema=schema, timeout_s=60.0)
    stream_id = pipe.recv()
    followings = [store.follow(SESSION, stream_id) for _ in range(FOLLOWERS)]

    def hear(following: persist.Following) -> list[float]:
        return [time.monotonic() - event.data["at"] for event in following]

    with ThreadPoolExecutor(FOLLOWERS) as pool:
        heard = [pool.submit(hear, following) for following in followings]
        pipe.send(True)
        pipe.send([late_s for one in heard for late_s in one.result()])


def _received(pipe: Pipe) -> Any:
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError(f"A process has said nothing for {DEADLINE_S:.0f} s.")
    return pipe.recv()


# --- several processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Crowd:
    """The figures of some processes that append to one session at once."""

    rate: float
    fairness: float
    p99_s: float
    worst_s: float


def crowd(url: str, seconds: float) -> Findings:
    """Measure 8 processes that append to one session, with persist and by hand."""
    schema = f"bench_{uuid.uuid4().hex[:8]}"
    store = persist.Store(url, schema=schema, timeout_s=60.0)
    store.create(SESSION, conversation(MESSAGES))
    found = {name: _crowd(url, schema, name, seconds) for name in ("persist", "one by one", "in batches")}
    rows = [
        (name, f"{one.rate:,.0f}/s", f"{one.fairness:.2f}", shown(one.p99_s), shown(one.worst_s))
        for name, one in found.items()
    ]
    title = f"{PROCESSES} processes append to one session"
    table = Table(title, ("together", "slowest to fastest", "p99 of the slowest", "worst"), rows)
    ours = found["persist"]
    return Findings(
        [table],
        [
            at_least(f"{title}, slowest to fastest", FAIRNESS, ours.fairness),
            at_most(f"{title}, p99 of the slowest", WAIT_LIMIT_MS, ours.p99_s * 1e3, "ms"),
        ],
    )


def _crowd(url: str, schema: str, name: str, seconds: float) -> Crowd:
    pipes = [FORK.Pipe() for _ in range(PROCESSES)]
    processes = [FORK.Process(target=_append_for, args=(there, url, schema, name, seconds)) for _here, there in pipes]
    for process in processes:
        process.start()
    try:
        for here, _there in pipes:
            _received(here)
        for here, _there in pipes:
            here.send(True)
        taken = [_received(here) for here, _there in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    counts = [len(each) for each in taken]
    p99_s = max(sorted(each)[len(each) * 99 // 100] for each in taken)
    return Crowd(sum(counts) / seconds, min(counts) / max(counts), p99_s, max(map(max, taken)))


def _append_for(pipe: Pipe, url: str, schema: str, name: str, seconds: float) -> None:
    """In a child: append once, and then append for some seconds, beginning when told."""
    if name == "persist":
        store = persist.Store(url, schema=schema, timeout_s=60.0)

        def append(item: dict[str, Any]) -> object:
            return store.append(SESSION, "messages", item)
    else:
        program = {"one by one": ByHand, "in batches": InBatches}[name](url, schema)

        def append(item: dict[str, Any]) -> object:
            program.commit(SESSION, lambda _: item, item["id"])
            return None

    def append_one() -> float:
        item, start = message(0) | {"id": uuid.uuid4().hex}, time.monotonic()
        append(item)
        return time.monotonic() - start

    append_one()
    pipe.send(True)
    pipe.recv()
    taken, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        taken.append(append_one())
    pipe.send(taken)
