"""The promises that writers were given, and the check that the documents keep them.

An author is one process that writes. Every message has its author's name in its id, and so have a session's title and
its stream. The content that an author has in a session is a `State`. Each of its verbs is a `Change` that leads from
one state to the next. An author reports a change before it calls the verb, and reports the acknowledgement after the
verb has returned. So at any time a document must show, for each author, the state that was acknowledged last, or a
later one that was begun. It must show nothing else. The stream of a dead author may have been ended for it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import persist
from harness.journaling import LEASE_S, load_of
from harness.sweeps import sweep

#: The errors that no verb may raise here. A fold raises `AssertionError` if its replica differs from its files.
FAULTS = (persist.PersistError, AssertionError)
#: How long the events of a stream are kept after its end, and how large they may grow. Each author has one of each.
KEPT_EVENTS_S, KEPT_EVENTS_BYTES = (0, 2), (None, 4096)
#: How much is left at the least when the oldest events are dropped.
LEAST_EVENTS_BYTES = 1024
Document = dict[str, Any]
Message = tuple[str, str]
"""Its id and its content."""

PROMPT, ANSWER, VISIT = ".prompt", ".answer", ".visit"
"""How ids end: of a stream's two messages, and of a message that was committed together with a visit."""
FIRST, SECOND = ".first", ".second"
"""How the ids of a pair end, which is committed at once, one behind the other."""
NOTE = "note of "
"""How the fields begin that authors set with their other changes. The author's name follows."""
_PENDING: Document = {"pending_user_message": None, "pending_attachments": [], "pending_started_at": None}


class Kept(NamedTuple):
    """A message as it stands in a document."""

    id: str
    content: str
    is_interrupted: bool = False


class Shown(NamedTuple):
    """The content that one author has in a session.

    `messages` are in the session's order. `title` is the title that this author has given the session. `stream` is the
    stream that runs there (its id and its prompt). `mark` is the value that this author has set in the head. `note` is
    the value that it has set there with another change.
    """

    messages: tuple[Kept, ...] = ()
    title: str | None = None
    stream: Message | None = None
    mark: str | None = None
    note: str | None = None


State = Shown | None
"""None: there is no such session."""
IN_TURN = ("put", "insert", "finish")
"""The changes that only the owner of a stream makes."""


class Change(NamedTuple):
    """The effect of a verb on its author's state.

    `kind` is "create" (a session with these messages and this title), "append" (may be tried again), "add", "insert"
    (ahead of the message with the id `ahead_of`, if it is there), "put" (in the place of the message with this id, or
    at the end), "start" (a stream, with this prompt), "finish" (the stream, with this answer), "fail" (the stream),
    "rename" (the session, to this title), "mark" (the session's head, with this title), "keep" (nothing changes) or
    "delete". Each may set a `note`, too.
    """

    kind: str
    session_id: str
    messages: tuple[Message, ...] = ()
    ahead_of: str = ""
    title: str | None = None
    note: str | None = None


def after(state: State, change: Change) -> State:
    """Return the state that a change leads to."""
    if change.kind == "delete":
        return None
    shown = state or Shown()
    shown = shown._replace(messages=_with(shown.messages, change), note=change.note or shown.note)
    match change.kind:
        case "create" | "rename":
            return shown._replace(title=change.title)
        case "mark":
            return shown._replace(mark=change.title)
        case "start":
            [(prompt_id, content)] = change.messages
            return shown._replace(stream=(prompt_id.removesuffix(PROMPT), content))
        case "finish":
            return shown._replace(stream=None)
        case "fail":
            return interrupted(shown)
    return shown


def _with(before: tuple[Kept, ...], change: Change) -> tuple[Kept, ...]:
    messages = list(before)
    for message in change.messages:
        ids = [each.id for each in messages]
        if change.kind == "insert" and change.ahead_of in ids:
            messages.insert(ids.index(change.ahead_of), Kept(*message))
        elif change.kind in ("put", "finish") and message[0] in ids:
            messages[ids.index(message[0])] = Kept(*message)
        else:
            messages.append(Kept(*message))
    return tuple(messages)


def interrupted(state: State) -> State:
    """Return the state after its stream has ended without its answer: prompt and partial answer stay, marked."""
    if state is None or state.stream is None:
        return state
    own = (state.stream[0] + PROMPT, state.stream[0] + ANSWER)
    messages = (each._replace(is_interrupted=True) if each.id in own else each for each in state.messages)
    return state._replace(messages=tuple(messages), stream=None)


def author_of(message_id: str) -> str:
    """Return the author whose name an id begins with: ids are ``<author>-<number>…``."""
    return message_id.partition("-")[0]


def title_of(name: str, load_bytes: int) -> str:
    """Return a title that tells how many bytes its session carries. The two are only committed together."""
    return f"{name}+{load_bytes}"


def load_bytes_of(title: str) -> int:
    """Return how many bytes a session with this title carries."""
    return int(title.rpartition("+")[2])


def titled(data: Document, title: str) -> Document:
    """Give a document this title, and as many bytes to carry as the title tells."""
    data.update(title=title, tool_calls=load_of(load_bytes_of(title)))
    return data


@dataclass
class Figures:
    """The counts of a run.

    Everything from `lost` on is a broken promise, except `idle`, which is a run that shows nothing. `entered` counts
    how often a session was seen to have a journal that had none before. `left` counts the opposite. `followed` counts
    the streams that somebody has followed to their end. `worked` names the roles that have brought something to its
    end.
    """

    crashes: int = 0
    begun: int = 0
    acknowledged: int = 0
    events: int = 0
    followed: int = 0
    looks: int = 0
    entered: int = 0
    left: int = 0
    lost: int = 0
    torn: int = 0
    doubled: int = 0
    stuck: int = 0
    stray: int = 0
    misplaced: int = 0
    raised: int = 0
    idle: int = 0
    worked: set[str] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not self.findings

    def found(self, kind: str, what: str, count: int = 1) -> None:
        """Count a broken promise of the kind "lost", "torn", "doubled", "stuck", "stray", "misplaced", "raised" or
        "idle".
        """
        setattr(self, kind, getattr(self, kind) + count)
        self.findings.append(f"{kind}: {what}")

    def shown(self, crashes: str) -> str:
        """Return the counts in one line. `crashes` is the word of this harness for its crashes."""
        names = ("begun", "acknowledged", "events", "followed", "looks", "entered", "left")
        faults = ("lost", "torn", "doubled", "stuck", "stray", "misplaced", "raised", "idle")
        return ", ".join(
            [f"{self.crashes:,} {crashes}", *(f"{getattr(self, name):,} {name}" for name in names + faults)]
        )


@dataclass
class History:
    """An author's states in one session, beginning with the one that was acknowledged before the last look."""

    states: list[State]
    promised: int = 0

    def forget_the_past(self) -> None:
        del self.states[: self.promised]
        self.promised = 0

    def go_on_from(self, state: State, change: Change | None = None) -> None:
        """Accept the state that was found as the truth."""
        self.states = [state] if change is None else [state, after(state, change)]
        self.promised = 0


class Ledger:
    """The changes that every author has begun, and those that were acknowledged, for each watched session."""

    def __init__(self, *, may_lose_streams: bool = False) -> None:
        #: Whether the stream of a process that lives may be ended for it, because its lease was over.
        self.may_lose_streams = may_lose_streams
        #: The changes of turns that were acknowledged after others had ended the turn.
        self.faults: list[str] = []
        #: The offset of the last event that each stream has emitted, by session and stream.
        self.emitted: dict[tuple[str, str], int] = {}
        self._histories: defaultdict[str, dict[str, History]] = defaultdict(dict)
        self._pending: dict[str, Change] = {}
        self._dead: set[str] = set()
        self._visits_missing: Counter[str] = Counter()

    @property
    def session_ids(self) -> list[str]:
        return list(self._histories)

    def authors(self, session_id: str) -> set[str]:
        return set(self._histories[session_id])

    def begin(self, author: str, change: Change) -> None:
        first = History([None if change.kind == "create" else Shown()])
        history = self._histories[change.session_id].setdefault(author, first)
        history.states.append(after(history.states[-1], change))
        self._pending[author] = change

    def acknowledge(self, author: str) -> None:
        change = self._pending.pop(author)
        history = self._histories[change.session_id][author]
        before = history.states[-2] if len(history.states) > 1 else None
        if change.kind in IN_TURN and before is not None and before.stream is None:
            self.faults.append(f"{change.session_id}, {author}: {change.kind} by a stream that others had ended")
        history.promised = len(history.states) - 1

    def refuse(self, author: str) -> None:
        """Undo the begun change, because the verb raised an error that says that nothing was written."""
        states = self._histories[self._pending.pop(author).session_id][author].states
        # A look has dropped the state before the change only if the change was there.
        assert len(states) > 1, "a refused change was seen"
        states.pop()

    def bury(self, author: str) -> Change | None:
        """Note that the author is dead. Return the change whose outcome nobody knows.

        The next look shows that outcome.
        """
        self._dead.add(author)
        return self._pending.pop(author, None)

    def confirm(self, author: str, change: Change) -> None:
        """Acknowledge the last change of a dead author, because it was tried again and has succeeded."""
        self._pending[author] = change
        self.acknowledge(author)

    def forget_the_past(self) -> None:
        """Require that all later reads show the changes that are acknowledged by now."""
        for by_author in self._histories.values():
            for history in by_author.values():
                history.forget_the_past()

    def is_gone(self, session_id: str) -> bool:
        """Tell whether all authors of a session know that it is deleted."""
        return all(history.states == [None] for history in self._histories[session_id].values())

    def forget(self, session_id: str) -> None:
        """Stop watching a session."""
        del self._histories[session_id]
        del self._visits_missing[session_id]

    def compare_events(self, store: persist.Store, emitted: dict[tuple[str, str], int], figures: Figures) -> None:
        """Check that every event that was emitted by then is there, once, in order, but for the oldest ones of many.

        This holds until the stream has ended and its events are gone.
        """
        for (session_id, stream_id), offset in emitted.items():
            try:
                found = _events_of(store, session_id, stream_id)
            except persist.PersistError:
                continue  # a damaged document, which is a finding of its own
            if found is None:
                self.emitted.pop((session_id, stream_id), None)
                continue
            last, size_bytes = (found[-1].offset, sum(map(_size_bytes, found))) if found else (0, 0)
            is_whole = not found or found[0].offset == 1
            if last < offset or not (is_whole or size_bytes >= LEAST_EVENTS_BYTES):
                figures.found("lost", f"{session_id}, {stream_id}: {len(found)} events up to {last} of {offset}")
            elif not all_follow(stream_id, found):
                figures.found("torn", f"{session_id}, {stream_id}: other events than were emitted")

    def compare(self, session_id: str, document: Document | None, figures: Figures) -> None:
        """Compare the document that was read with the promises. The state that is found of a dead author is final."""
        found = {} if document is None else shown_by_author(document)
        for what in self.faults:
            figures.found("doubled", what)
        self.faults.clear()
        if document is not None:
            self._compare_whole(session_id, document, figures)
        for author, history in self._histories[session_id].items():
            state = None if document is None else found.get(author, Shown())
            may_be_cut = author in self._dead or self.may_lose_streams
            allowed = [*history.states, *map(interrupted, history.states)] if may_be_cut else history.states
            if state in allowed and state not in history.states:
                # Others have ended the stream. Its owner can change nothing in it from now on.
                pending = None if state == interrupted(history.states[-1]) else self._pending_in(session_id, author)
                history.go_on_from(state, pending)
            if state not in allowed:
                _name_fault(figures, f"{session_id}, {author}", allowed, state)
                # Go on from the state that was found, so that a fault is counted once.
                history.go_on_from(state, self._pending_in(session_id, author))
            if author in self._dead:
                history.go_on_from(state)

    def _compare_whole(self, session_id: str, document: Document, figures: Figures) -> None:
        """Check what must hold for all authors together.

        Each id is there once. Changes that are committed together stand together. Nothing remains of an ended stream.
        """
        ids = [message["id"] for message in document["messages"]]
        twice = [each for each, count in Counter(ids).items() if count > 1]
        if twice:
            figures.found("doubled", f"{session_id}: {twice}", len(twice))
        _compare_pairs(ids, session_id, figures)
        missing = sum(each.endswith(VISIT) for each in ids) - document.get("visits", 0)
        if missing != self._visits_missing[session_id]:
            self._visits_missing[session_id] = missing
            figures.found(
                "lost" if missing > 0 else "torn", f"{session_id}: {missing} visits are missing", abs(missing) or 1
            )
        if (title := document.get("title")) and document.get("tool_calls", []) != load_of(load_bytes_of(title)):
            figures.found("torn", f"{session_id}: it does not carry what its title {title} says")
        remains = {key for key, idle in _PENDING.items() if document.get(key, idle) != idle}
        if remains and document["active_stream_id"] is None:
            figures.found("torn", f"{session_id}: no stream, but {sorted(remains)}")

    def _pending_in(self, session_id: str, author: str) -> Change | None:
        change = self._pending.get(author)
        return change if change is not None and change.session_id == session_id else None


def _compare_pairs(ids: list[str], session_id: str, figures: Figures) -> None:
    """Check that no pair is split, neither by a kill nor by the commits of others."""
    for one, two in itertools.pairwise([None, *ids, None]):
        wanted = one.removesuffix(FIRST) + SECOND if one is not None and one.endswith(FIRST) else None
        found = two if two is not None and two.endswith(SECOND) else None
        if found != wanted:
            figures.found("torn", f"{session_id}: a pair is split: {one}, {two}")


def event_of(stream_id: str, offset: int, *, is_last: bool = False) -> Document:
    """Return what a stream emits at an offset."""
    return {"of": stream_id, "offset": offset, "is_last": is_last, "text": "x" * (offset % 3 * 200)}


def all_follow(stream_id: str, events: Sequence[persist.Event], after: int | None = None) -> bool:
    """Tell whether events are those that a stream has emitted, without a gap, and behind an offset if there is one."""
    first = events[0].offset if events and after is None else (after or 0) + 1
    return all(
        (event.offset, event.data) == (offset, event_of(stream_id, offset, is_last=event.data.get("is_last")))
        for offset, event in enumerate(events, first)
    )


def _size_bytes(event: persist.Event) -> int:
    return len(json.dumps(event.data))


def _events_of(store: persist.Store, session_id: str, stream_id: str) -> list[persist.Event] | None:
    """Return the events of a stream, or None if they are gone because it has ended. The document tells of the end."""
    after = 0
    while True:
        try:
            return store.events(session_id, stream_id, after=after)
        except (persist.EventsNotFound, persist.SessionNotFound) as told:
            first = getattr(told, "first", None)
            if first is None:
                is_active = store.exists(session_id) and store.load(session_id).active_stream_id == stream_id
                return [] if is_active else None
            # The oldest ones were dropped.
            after = first - 1


def shown_by_author(document: Document) -> dict[str, Shown]:
    """Return the content that each author has in a document. Authors who have left nothing in it are missing."""
    messages: defaultdict[str, list[Kept]] = defaultdict(list)
    for message in document["messages"]:
        kept = Kept(message["id"], message["content"], message.get("interrupted", False))
        messages[author_of(kept.id)].append(kept)
    found = {author: Shown(tuple(kept)) for author, kept in messages.items()}
    if title := document.get("title"):
        maker = author_of(title)
        found[maker] = found.get(maker, Shown())._replace(title=title)
    for author, mark in document.get("marks", {}).items():
        found[author] = found.get(author, Shown())._replace(mark=mark)
    for name in (each for each in document if each.startswith(NOTE)):
        author = name.removeprefix(NOTE)
        found[author] = found.get(author, Shown())._replace(note=document[name])
    if stream_id := document.get("active_stream_id"):
        owner = author_of(stream_id)
        found[owner] = found.get(owner, Shown())._replace(stream=(stream_id, str(document.get("pending_user_message"))))
    return found


def _name_fault(figures: Figures, where: str, allowed: list[State], found: State) -> None:
    promised = allowed[0]
    missing = set(promised.messages if promised else ()) - set(found.messages if found else ())
    older = (
        []
        if found is None
        else [f"{name} is {now}" for name, now in _fields(found) if now not in _values(allowed, name)]
    )
    if promised is not None and (missing or older or found is None):
        what = f"{where}: acknowledged, and not there: {sorted(missing)[:5]} {', '.join(older)}"
        figures.found("lost", what, max(1, len(missing) + len(older)))
    else:
        figures.found("torn", f"{where}: no state that was ever committed: {found}")


def _fields(shown: Shown) -> list[tuple[str, object]]:
    return [("title", shown.title), ("stream", shown.stream), ("mark", shown.mark), ("note", shown.note)]


def _values(states: list[State], name: str) -> list[object]:
    return [getattr(state, name) for state in states if state is not None]


def read_all(store: persist.Store, session_ids: Iterable[str], figures: Figures) -> dict[str, Document | None]:
    """Return the documents of sessions, each read whole and by its head, or None for a missing session.

    Damage is a finding.
    """
    found: dict[str, Document | None] = {}
    for session_id in session_ids:
        try:
            found[session_id] = store.load(session_id).data
            store.head(session_id)
        except persist.SessionNotFound:
            found.setdefault(session_id, None)
        except persist.PersistError as error:
            found.pop(session_id, None)
            figures.found("torn", str(error))
    return found


def settle_rows(store: persist.Store, figures: Figures) -> None:
    """Do what servers do after a crash, where the sessions are rows. Then no trace may be left."""
    try:
        until = time.monotonic() + 10 * LEASE_S
        while any(info.is_live for info in store.streams()) and time.monotonic() < until:
            time.sleep(0.1)
        sweep(store)
        for session_id in store.ids():
            if store.head(session_id).active_stream_id is not None:
                figures.found("stuck", f"{session_id} has an active stream after a sweep")
            store.update(session_id, _mark_as_settled, timeout_s=5.0)
    except FAULTS as error:
        figures.found("stuck", str(error))
    for name in stray_rows(store):
        figures.found("stray", name)


#: The faults of rows at rest: a session's id or a process, and a text.
_STRAY_ROWS = """
SELECT id, 'has a lease and no stream' FROM {schema}.sessions WHERE process IS NOT NULL AND owner IS NULL
UNION ALL
SELECT s.id, 'does not run its stream ' || t.stream_id || ', which has not ended' FROM {schema}.streams t
JOIN {schema}.sessions s ON s.number = t.session WHERE t.ended IS NULL AND s.stream_id IS DISTINCT FROM t.stream_id
UNION ALL
SELECT s.id, 'has gaps in the list ' || list FROM {schema}.items i JOIN {schema}.sessions s ON s.number = i.session
GROUP BY s.id, list HAVING min(place) <> 0 OR max(place) <> count(*) - 1
UNION ALL
SELECT s.id, 'has ' || count(i.place) || ' items in ' || a.key || ', and says ' || (a.value ->> 0)
FROM {schema}.sessions s CROSS JOIN LATERAL json_each(s.apart::json) a
LEFT JOIN {schema}.items i ON i.session = s.number AND i.list = a.key
WHERE a.value ->> 0 IS NOT NULL GROUP BY s.id, a.key, a.value ->> 0 HAVING count(i.place) <> (a.value ->> 0)::bigint
UNION ALL
SELECT pid::text, 'is a server process with an open transaction: ' || left(query, 80) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - interval '1 s'
"""


def stray_rows(store: persist.Store) -> Iterator[str]:
    """Yield what no verb may leave in the database of a store at rest."""
    import psycopg

    connections = store._backend.engine.connections  # type: ignore[attr-defined]
    with psycopg.connect(connections.conninfo) as connection:
        for name, what in connection.execute(_STRAY_ROWS.replace("{schema}", connections.schema)).fetchall():
            yield f"{name} {what}"


def settle(store: persist.Store, figures: Figures) -> None:
    """Do what servers do after a crash: sweep, and repeat the verbs that were cut off. Then no trace may be left."""
    try:
        sweep(store)
        for problem in store.check():
            # A journal without a document comes from a delete that was cut off.
            if problem.kind == "left-over" or not store.exists(problem.session_id):
                _try_again(store, problem.session_id)
        for session_id in store.ids():
            if store.head(session_id).active_stream_id is not None:
                figures.found("stuck", f"{session_id} has an active stream after a sweep")
    except FAULTS as error:
        figures.found("stuck", str(error))
    for problem in store.check():
        figures.found("stuck", problem.message)
    for name in stray_files(store.path):
        figures.found("stray", name)


#: How much older than the last commit a mark may be, and the tick of the clock that stamps files.
MARK_NS = 1_000_000_000 + 20_000_000


def misplaced(store: persist.Store) -> Iterator[str]:
    """Yield what `recent` hides, makes up or places too late, compared with a full scan. No author may be alive."""
    ids, cursor = [], None
    while True:
        page = store.recent(limit=7, before=cursor)
        ids += [head.id for head in page]
        if (cursor := page.cursor) is None:
            break
    if sorted(ids) != store.ids():
        yield f"recent shows {sorted(ids)} of {store.ids()}"
    for cursor, session_id in store._backend.engine.recent(None):
        negative_ns = -int(cursor.partition("-")[0])
        updated_ns = int(store.head(session_id).updated_at.timestamp() * 1e9)
        if -negative_ns < updated_ns - MARK_NS:
            yield f"{session_id} was updated {(updated_ns + negative_ns) / 1e9:.3f} s after its mark"


def _try_again(store: persist.Store, session_id: str) -> None:
    """Commit to the session again, which removes the left-overs of any verb that was cut off there."""
    if store.exists(session_id):
        store.update(session_id, _mark_as_settled)
        store.compact(session_id)
    else:
        with store.transaction(session_id, create=True) as tx:
            tx.list("messages").append({"id": "settled"})
        store.delete(session_id, if_version=tx.version)


def _mark_as_settled(tx: persist.Transaction) -> None:
    """Make a change that belongs to no author."""
    data = tx.data
    data["settled"] = data.get("settled", 0) + 1


def stray_files(directory: Path) -> Iterable[str]:
    """Yield every name in a store at rest that is neither a document nor the lock or the journal of one."""
    names = {path.name for path in directory.iterdir()}
    documents = {name for name in names if name.endswith(".json")}
    known = documents | {f"{name}.lock" for name in documents} | {".leases", ".events"}
    yield from sorted(names - known - set(_journals_named(directory, documents)))
    yield from sorted(str(path.relative_to(directory)) for path in directory.glob(".*/*"))


def _journals_named(directory: Path, documents: Iterable[str]) -> Iterator[str]:
    for name in documents:
        # Damage is a finding of its own.
        with suppress(ValueError):
            header = json.loads((directory / name).read_bytes())["_persist"]
            if header["journal"] is not None:
                yield f"{name.removesuffix('.json')}.{header['journal']}.journal"
