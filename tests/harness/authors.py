"""The processes that work on a store until they are killed, and the pipes by which they say what they do.

They are forked from a process that has imported everything and has no threads. So a process costs about two
milliseconds instead of a start of the interpreter.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import select
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import persist
from harness import sweeps
from harness.acknowledged import (
    ANSWER,
    FIRST,
    KEPT_EVENTS_BYTES,
    KEPT_EVENTS_S,
    NOTE,
    PROMPT,
    SECOND,
    VISIT,
    Change,
    Document,
    Figures,
    Ledger,
    Message,
    all_follow,
    event_of,
    title_of,
    titled,
)
from harness.journaling import LOAD_BYTES, Journaling, is_url

LOCK_TIMEOUT_S = 30.0
# Room for a few dozen reports. When the pipe is full, an author waits for the parent to listen. Otherwise a long look
# would let the authors write more, and so the next look would take even longer.
PIPE_BYTES = 4096
# Processes that only look leave the processor to those that write.
PAUSE_S = 0.001
# A block cannot be run anew when its lock was lost with the connection, and somebody else has committed since.
LOSSES = (persist.CommitFailed, persist.StreamLost, persist.EmitFailed)
HEADS_A_LOOK = 5
# More than a reader of a head takes at a time. The share is small, because with many such messages no session would
# stay small.
LONG, LONG_SHARE = "Once upon a time, there was a lock. " * 250, 0.01
# So many events outgrow their bound.
MANY, MANY_SHARE = 40, 0.1
WORDS = ("Why?", "Grüße, 世界 🌍.", "The stream owns the session. " * 4, '{"quoted": "text"}\n' * 3)

Role = Callable[["Author", Sequence[str]], None]


class Author:
    """The child's side: its store, and its way to report the changes that it makes."""

    def __init__(self, name: str, place: Path | str, pipe: int, seed: int, journaling: Journaling) -> None:
        self.name = name
        self.random = random.Random(f"{seed}/{name}")
        self._pipe = pipe
        self._numbers = itertools.count()
        # Two saves may count a visit at the same time, so the counts are summed.
        options = {"timeout_s": LOCK_TIMEOUT_S, "merge": {"visits": "sum"}}
        # A stream that has ended has its events for a short while, or not.
        options |= {
            "keep_events_s": self.random.choice(KEPT_EVENTS_S),
            "keep_events_bytes": self.random.choice(KEPT_EVENTS_BYTES),
        }
        self.store = journaling.drawn(self.random).open(place, **options)
        #: The errors of a verb that has changed nothing, because a server or a connection was lost.
        self.losses: tuple[type[Exception], ...] = LOSSES if is_url(place) else ()

    def new_id(self) -> str:
        return f"{self.name}-{next(self._numbers)}"

    def words(self) -> str:
        return LONG if self.random.random() < LONG_SHARE else self.random.choice(WORDS)

    def message(self, suffix: str = "") -> Message:
        message_id = self.new_id() + suffix
        return message_id, f"{message_id} {self.words()}"

    def report(self, *record: object) -> None:
        os.write(self._pipe, json.dumps(record).encode() + b"\n")

    @contextmanager
    def reporting(self, change: Change) -> Iterator[None]:
        """Report a change before the block, and its acknowledgement when the verb in the block has returned."""
        self.report("begin", *change)
        try:
            yield
        except (persist.SessionBusy, persist.CommitFailed, persist.StreamLost):
            self.report("refuse")
            raise
        self.report("acknowledge")


def as_document(message: Message) -> Document:
    """Return a message as an item of a document.

    Its role neither asks nor answers, because a prompt's answer is looked for up to the next prompt.
    """
    return {"id": message[0], "role": "tool", "content": message[1]}


def visit(data: Document, message: Message) -> None:
    """Add a message and count a visit: both or neither must be committed."""
    data["messages"].append(as_document(message))
    data["visits"] = data.get("visits", 0) + 1


# --- what they do, until they are killed ---


def write(author: Author, shared: Sequence[str]) -> None:
    """Append, extend, save, edit, update and compact, on sessions that others write to."""
    ways = (_append, _append_twice, _extend, _extend, _several, _several, _save, _edit, _update, _mark, _compact)
    while True:
        with suppress(*author.losses):
            author.random.choice(ways)(author, author.random.choice(shared))


def _append(author: Author, session_id: str) -> Message:
    message = author.message()
    with author.reporting(Change("append", session_id, (message,))):
        author.store.append(session_id, "messages", as_document(message))
    return message


def _append_twice(author: Author, session_id: str) -> None:
    """Append a message twice, as a client does that has not got its answer."""
    message = _append(author, session_id)
    with author.reporting(Change("keep", session_id)):
        author.store.append(session_id, "messages", as_document(message))


def _pair(author: Author) -> tuple[Message, Message]:
    name = author.new_id()
    return (name + FIRST, f"{name} {author.words()}"), (name + SECOND, f"{name} {author.words()}")


def _extend(author: Author, session_id: str) -> None:
    """Append a pair: both or neither. Half of the time, do it again, as a client does that has not got its answer."""
    pair, create = _pair(author), author.random.random() < 0.5
    with author.reporting(Change("extend", session_id, pair)):
        author.store.extend(session_id, "messages", [*map(as_document, pair)], create=create)
    if author.random.random() < 0.5:
        with author.reporting(Change("keep", session_id)):
            author.store.extend(session_id, "messages", [*map(as_document, pair)])


def _several(author: Author, session_id: str) -> None:
    """Commit a pair, a message with its visit, and a note: all or nothing."""
    pair, message, note = _pair(author), author.message(VISIT), author.new_id()
    create = author.random.random() < 0.5
    with author.reporting(Change("add", session_id, (*pair, message), note=note)):
        with author.store.transaction(session_id, create=create) as tx:
            tx.list("messages").extend(map(as_document, (*pair, message)))
            tx.fields["visits"] = tx.fields.get("visits", 0) + 1
            tx.fields[NOTE + author.name] = note


def _save(author: Author, session_id: str) -> None:
    session = author.store.load(session_id)
    for _ in range(author.random.randint(1, 3)):
        message = author.message(VISIT)
        visit(session.data, message)
        with author.reporting(Change("add", session_id, (message,))):
            session.save()


def _edit(author: Author, session_id: str) -> None:
    message = author.message(VISIT)
    with author.reporting(Change("add", session_id, (message,))):
        with author.store.transaction(session_id) as tx:
            visit(tx.data, message)


def _update(author: Author, session_id: str) -> None:
    message = author.message(VISIT)
    with author.reporting(Change("add", session_id, (message,))):
        author.store.update(session_id, lambda tx: visit(tx.data, message))


def _mark(author: Author, session_id: str) -> None:
    """Change the head only."""
    mark = author.new_id()
    with author.reporting(Change("mark", session_id, title=mark)):
        author.store.update(session_id, lambda tx: tx.data.setdefault("marks", {}).update({author.name: mark}))


def _compact(author: Author, session_id: str) -> None:
    with author.reporting(Change("keep", session_id)):
        author.store.compact(session_id)


def own(author: Author, shared: Sequence[str]) -> None:
    """Run one turn after the other on sessions that others write to."""
    while True:
        with suppress(persist.SessionBusy, *author.losses):
            _turn(author, author.random.choice(shared))


def _turn(author: Author, session_id: str) -> None:
    stream_id = author.new_id()
    prompt, note = author.words(), f"{stream_id} began"
    asked = {"id": stream_id + PROMPT, "role": "user", "content": prompt}
    with author.reporting(Change("start", session_id, ((stream_id + PROMPT, prompt),), note=note)):
        stream = author.store.start_stream(
            session_id, asked, stream_id=stream_id, once=True, fields={NOTE + author.name: note}
        )
    try:
        _run_turn(author, stream, asked)
    except author.losses:
        # Its end is a part of the block, or of a sweep.
        author.report("begin", *Change("fail", session_id))
        raise


def _run_turn(author: Author, stream: persist.Stream, asked: Document) -> None:
    session_id, stream_id = stream.session_id, stream.id
    answer_id = stream_id + ANSWER
    emitted = 0
    with stream:
        for step in range(author.random.randrange(6)):
            emitted = _emit(author, stream, emitted)
            way = author.random.random()
            if way < 0.1 and not author.losses:
                _ask_again(author, session_id, asked, stream_id, None)
            elif way < 0.3:
                _several_in_turn(author, stream)
            elif way < 0.7:
                text = f"partial {step}"
                with author.reporting(Change("put", session_id, ((answer_id, text),))):
                    stream.checkpoint({"role": "assistant", "content": text})
            else:
                message = author.message()
                with author.reporting(Change("insert", session_id, (message,), answer_id)):
                    stream.append(as_document(message))
        if author.random.random() < 0.8:
            note = f"{stream_id} ended"
            stream.emit(event_of(stream_id, emitted + 1, is_last=True))
            with author.reporting(Change("finish", session_id, ((answer_id, "whole"),), note=note)):
                stream.finish({"role": "assistant", "content": "whole"}, fields={NOTE + author.name: note})
            _ask_again(author, session_id, asked, None, "whole")
        elif author.losses:
            # If the stream is lost just now, others end it later.
            author.report("begin", *Change("fail", session_id))
        else:
            # The stream ends because its block is left.
            with author.reporting(Change("fail", session_id)), stream:
                pass


def _ask_again(author: Author, session_id: str, asked: Document, runs: str | None, answer: str | None) -> None:
    """Ask again, as a client does that has not got its answer.

    The store must start nothing, and must tell the client what has become of the first request.
    """
    try:
        with author.reporting(Change("keep", session_id)):
            try:
                author.store.start_stream(session_id, asked, once=True)
            except persist.AlreadyStarted as told:
                found = told.stream_id, told.answer and told.answer["content"]
                assert found == (runs, answer), f"{asked['id']} was answered with {found}"
            else:
                raise AssertionError(f"{asked['id']} was started twice")
    except persist.SessionBusy:
        # Another stream has begun since.
        assert runs is None, f"{asked['id']} runs, and another stream is said to run"


def _several_in_turn(author: Author, stream: persist.Stream) -> None:
    """Commit a pair, a message with its visit, and a note, ahead of the partial answer: all or nothing."""
    pair, message, note = _pair(author), author.message(VISIT), author.new_id()
    answer_id = stream.id + ANSWER
    with author.reporting(Change("insert", stream.session_id, (*pair, message), answer_id, note=note)):
        with stream.transaction() as tx:
            messages = tx.list("messages")
            place = messages.place_of(answer_id)
            for at, each in enumerate((*pair, message), len(messages) if place is None else place):
                messages.insert(at, as_document(each))
            tx.fields["visits"] = tx.fields.get("visits", 0) + 1
            tx.fields[NOTE + author.name] = note


def _emit(author: Author, stream: persist.Stream, emitted: int) -> int:
    """Emit two events, or so many that the oldest ones are dropped. The last one is synced, and the others with it."""
    last = emitted + (MANY if author.random.random() < MANY_SHARE else 2)
    for offset in range(emitted + 1, last + 1):
        assert stream.emit(event_of(stream.id, offset), durable=offset == last) == offset
    author.report("emitted", stream.session_id, stream.id, last, last - emitted)
    return last


def garden(author: Author, _shared: Sequence[str]) -> None:
    """Make sessions, rename them, copy them, and delete them again.

    A rename makes some sessions large and others small.
    """
    while True:
        with suppress(*author.losses):
            _garden(author)


def _garden(author: Author) -> None:
    session_id, copy_id = author.new_id(), author.new_id()
    first, title = author.message(), _title(author)
    with author.reporting(Change("create", session_id, (first,), title=title)):
        if author.random.random() < 0.5:
            author.store.create(session_id, titled({"messages": [as_document(first)]}, title))
        else:
            with author.store.transaction(session_id, create=True) as tx:
                titled(tx.data, title)["messages"] = [as_document(first)]
    second = _append(author, session_id)
    title = _rename(author, session_id)
    _compact(author, session_id)
    with author.reporting(Change("create", copy_id, (first, second), title=title)):
        author.store.duplicate(session_id, copy_id)
    _append(author, copy_id)
    for each in (session_id, copy_id):
        _delete(author, each)
    new_id, pair = author.new_id(), _pair(author)
    with author.reporting(Change("create", new_id, pair)):
        version = author.store.extend(new_id, "messages", [*map(as_document, pair)], create=True)
    _extend(author, new_id)
    with author.reporting(Change("keep", new_id)), suppress(persist.VersionMismatch):
        author.store.delete(new_id, if_version=version)
    _delete(author, new_id)


def _delete(author: Author, session_id: str) -> None:
    """Delete a session in one of three ways. Nobody else has written to it since its version was looked at."""
    version = author.store.head(session_id).version
    with author.reporting(Change("delete", session_id)):
        match author.random.randrange(3):
            case 0:
                author.store.delete(session_id)
            case 1:
                author.store.delete(session_id, if_version=version)
            case _:
                with author.store.transaction(session_id, if_version=version) as tx:
                    tx.fields["title"] = "never to be seen"
                    tx.delete()


def _rename(author: Author, session_id: str) -> str:
    session, title = author.store.load(session_id), _title(author)
    titled(session.data, title)
    with author.reporting(Change("rename", session_id, title=title)):
        session.save()
    return title


def _title(author: Author) -> str:
    return title_of(author.new_id(), author.random.choice((0, LOAD_BYTES)))


def sweep(author: Author, _shared: Sequence[str]) -> None:
    """Clear stale streams, and ask who is alive."""
    while True:
        try:
            sweeps.sweep(author.store)
        except sweeps.SweepFailed as failed:
            if not all(isinstance(each, author.losses) for each in failed.failures.values()):
                raise
        author.store.streams()
        author.report("look")
        time.sleep(PAUSE_S)


def look(author: Author, shared: Sequence[str]) -> None:
    """Load sessions and heads without a lock."""
    seen = dict.fromkeys(shared, 0)
    while True:
        for session_id in shared:
            seen[session_id] = _look_at(author.store, session_id, seen[session_id])
        for session_id in author.store.ids():
            with suppress(persist.SessionNotFound):
                author.store.load(session_id)
        author.report("look")
        time.sleep(PAUSE_S)


def follow(author: Author, _shared: Sequence[str]) -> None:
    """Follow one turn after the other, as a browser does, wherever one runs."""
    while True:
        with suppress(persist.SessionNotFound, *author.losses):
            running = [head for head in author.store.heads() if head.active_stream_id is not None]
            head = author.random.choice(running) if running else None
            if head is not None and _follow(author, head.id, str(head.active_stream_id)):
                author.report("followed")
        time.sleep(PAUSE_S)


def _follow(author: Author, session_id: str, stream_id: str) -> bool:
    """Follow a turn to its end: no event is missing, but those that were dropped before the follower came to them.

    Where the server or the connection is lost, it comes back with its cursor. Return False if the events went before
    their end was seen.
    """
    seen, was_last = 0, False
    while True:
        with suppress(*author.losses):
            try:
                with author.store.follow(session_id, stream_id, after=seen) as following:
                    for event in following:
                        assert all_follow(stream_id, [event], seen), f"{stream_id} has {event} behind {seen}"
                        seen, was_last = event.offset, event.data["is_last"]
                is_missed = following.ended == "finished" and not was_last
                assert not is_missed, f"the last events of {stream_id} behind {seen} are missing"
                return True
            except persist.EventsNotFound as told:
                if told.count is not None:
                    raise AssertionError(f"of {stream_id} an event was seen that is gone: {told}") from told
                if told.first is None:
                    return False
                seen = told.first - 1


def _look_at(store: persist.Store, session_id: str, seen: int) -> int:
    """Look at a session several times. Return the last revision.

    Revisions must never go back. The head and the document of one revision must be the same.
    """
    before, heads = store.load(session_id), [store.head(session_id) for _ in range(HEADS_A_LOOK)]
    [among_all], last = store.heads(prefix=session_id), store.tail(session_id, limit=3)
    heads.append(among_all)
    after, head = store.load(session_id), heads[-1]
    if before.revision == after.revision:
        shown = before.data["messages"][-3:]
        assert last == shown, f"{session_id} has another tail than it shows: {_ids(last)}, not {_ids(shown)}"
    revisions = [seen, before.revision, *(head.revision for head in heads), after.revision]
    assert revisions == sorted(revisions), f"revisions of {session_id} went back: {revisions}"
    for session in (before, after):
        is_same = session.revision == head.revision
        assert not is_same or _head_of(session) == (head.fields, head.counts), (
            f"{session_id} has another head than it shows"
        )
    return revisions[-1]


def _ids(messages: list[Document]) -> list[str]:
    return [message["id"] for message in messages]


def _head_of(session: persist.Session) -> tuple[Document, dict[str, int]]:
    small = {name: value for name, value in session.data.items() if not _stands_apart(name, value)}
    counts = {name: len(value) for name, value in session.data.items() if type(value) is list}
    return small, counts


def _stands_apart(name: str, value: Any) -> bool:
    """Tell whether a value stands apart: the rule of the document, spelt out once more.

    A long prompt stands apart in its stream field, too.
    """
    size_bytes = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    return name in ("messages", "tool_calls") or size_bytes > 4 * 1024


# --- the crew ---


@dataclass(frozen=True, eq=False)
class Hand:
    """One process of the crew, as the parent sees it."""

    name: str
    role: Role
    shared: tuple[str, ...]
    pid: int
    pipe: int


class Raised(NamedTuple):
    """An error that has ended a process, and its time (`time.monotonic`, which all processes of a machine share)."""

    at_s: float
    said: str


class Crew:
    """The parent's side: it starts processes, takes their reports down in the ledger, and kills them.

    Attributes:
        raised: the errors that the processes have raised.
    """

    def __init__(self, ledger: Ledger, figures: Figures, seed: int, journaling: Journaling) -> None:
        self.hands: list[Hand] = []
        self.raised: list[Raised] = []
        self._ledger = ledger
        self._figures = figures
        self._seed = seed
        self._journaling = journaling
        self._names = (f"w{number}" for number in itertools.count())
        self._selector = selectors.DefaultSelector()
        self._cut_off: dict[Hand, bytes] = {}

    def start(self, role: Role, place: Path | str, shared: tuple[str, ...]) -> Hand:
        name = next(self._names)
        ours, theirs = os.pipe()
        if sys.platform == "linux":
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with warnings.catch_warnings():
            # The parent of authors in a database has the threads of its own store, which the children do without.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            for pipe in (ours, *(hand.pipe for hand in self.hands)):
                os.close(pipe)
            _live(role, lambda: Author(name, place, theirs, self._seed, self._journaling), theirs, shared)
        os.close(theirs)
        os.set_blocking(ours, False)
        hand = Hand(name, role, shared, pid, ours)
        self.hands.append(hand)
        self._selector.register(ours, selectors.EVENT_READ, hand)
        return hand

    def listen(self, seconds: float = 0.0) -> None:
        """Take reports down for so many seconds. With 0, take only those that have arrived."""
        until = time.monotonic() + seconds
        while True:
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                self._hear(key.data)
            if time.monotonic() >= until:
                return

    def kill(self, hand: Hand) -> Change | None:
        """Kill a process with SIGKILL. Return the change that was cut off.

        When this returns, the process is gone and all its reports are taken down.
        """
        os.kill(hand.pid, signal.SIGKILL)
        os.waitpid(hand.pid, 0)
        while self._hear(hand):
            pass
        with suppress(KeyError):
            self._selector.unregister(hand.pipe)
        os.close(hand.pipe)
        self._cut_off.pop(hand, None)
        self.hands.remove(hand)
        return self._ledger.bury(hand.name)

    def kill_all(self) -> None:
        for hand in list(self.hands):
            self.kill(hand)

    def _hear(self, hand: Hand) -> bool:
        """Take down what has arrived from one process. Return False at its end."""
        try:
            content = os.read(hand.pipe, 1 << 16)
        except BlockingIOError:
            return True
        if not content:
            with suppress(KeyError):
                self._selector.unregister(hand.pipe)
            return False
        *lines, self._cut_off[hand] = (self._cut_off.get(hand, b"") + content).split(b"\n")
        for line in lines:
            self._take_down(hand, *json.loads(line))
        return True

    def _take_down(self, hand: Hand, kind: str, *record: Any) -> None:
        if kind == "begin":
            change, session_id, messages, *more = record
            messages = tuple((each[0], each[1]) for each in messages)
            self._ledger.begin(hand.name, Change(change, session_id, messages, *more))
            self._figures.begun += 1
        elif kind == "acknowledge":
            self._ledger.acknowledge(hand.name)
            self._figures.acknowledged += 1
            self._figures.worked.add(hand.role.__name__)
        elif kind == "refuse":
            self._ledger.refuse(hand.name)
        elif kind == "emitted":
            session_id, stream_id, offset, count = record
            self._ledger.emitted[session_id, stream_id] = offset
            self._figures.events += count
        elif kind == "followed":
            self._figures.followed += 1
            self._figures.worked.add(hand.role.__name__)
        elif kind == "look":
            self._figures.looks += 1
            self._figures.worked.add(hand.role.__name__)
        else:
            at_s, said = record
            self.raised.append(Raised(at_s, f"{hand.name}: {said}"))


def _live(role: Role, author: Callable[[], Author], pipe: int, shared: Sequence[str]) -> NoReturn:
    """Run the life of a child. It ends by a kill, by an error that it reports, or because its parent is gone."""
    try:
        try:
            role(author(), shared)
        except Exception as error:
            said = f"{role.__name__}: {type(error).__name__}: {error}"[:1000]
            os.write(pipe, json.dumps(["raise", time.monotonic(), said]).encode() + b"\n")
            # The parent ends this process. A parent that is gone shows as an error of the pipe.
            end_of_parent = select.poll()
            end_of_parent.register(pipe, 0)
            end_of_parent.poll()
    finally:
        os._exit(1)
