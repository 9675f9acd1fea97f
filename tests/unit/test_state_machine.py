"""The whole API against a model: a plain dict for each session, and a few lines that say what each verb does to it.

Hypothesis draws the steps. Each step is done to the store and to the model, whose answers and errors must agree. After
each step, every session must read as the model says. Several `Session` objects of different ages, with unsaved edits,
stay in play. So do streams that are live, cancelled, fenced off or dropped.

The model knows how edits of different fields merge, and whose value a preference or a policy takes. It knows that
messages appended on both sides are both kept, theirs first. `test_merge` tests how other arrays merge, so no object
changes ``tags`` and ``log``.

The model knows no version, but it knows when two must be equal. Each commit has a version of its own, which every verb
reports alike. No other commit ever has it, of this session or of another.

The ids have awkward characters. Values and lists cross the size above which they become parts.

The machine fails with any of these faults in the package:

- A transaction ignores ``touch=False``.
- An interrupted partial is not marked.
- A save does not move the merge base.
- `duplicate` keeps the partial.
- `cancel` ends whatever stream is active.
- ``sum`` adds the base twice.
- `extend` takes ``id`` for every key.
- A stale ``if_version`` is not checked.
- A start with ``once=True`` does not look for the answer.
- A message of `Stream.transaction` stays behind the partial.
- The fields of a `finish` are a commit of their own.
- A version is the revision.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from harness.files import file_engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import persist
from persist import MISSING
from persist.storage import layout
from persist.storage.commit import Mode
from persist.storage.content import APART_BYTES, encoded
from persist.turn import IDLE

Data = dict[str, Any]

#: One id has every kind of awkward character, and one is so long that its file's name holds a hash.
IDS = ("one", "_t/w o:é%\n.json", "three" * 60)
FIELDS = ("title", "topic")
#: A value above 4 KiB is a part, and leaves the head.
LARGE = "z" * (APART_BYTES - 1)

session_ids = st.sampled_from(IDS)
#: Few values, so that both sides often choose the same one. None removes the field.
edits = st.tuples(st.sampled_from(FIELDS), st.sampled_from(["x", "y", "z", LARGE, None]))
visits = st.integers(0, 2)
picks = st.integers(0, 11)
preferences = st.sampled_from(["error", "mine", "theirs"])
#: The ways in which a block changes its session.
places = st.sampled_from(["fields", "lists", "data", "all"])
#: Items with and without a key, equal ones, and others of the same key. A few of them make the list a part.
ITEMS: list[Any] = [
    {"call": "a", "n": 0},
    {"call": "a", "n": 0},
    {"call": "a", "n": 1},
    {"call": "a", "n": 1},
    {"call": 1},
    {"call": "1"},
    {"call": True},
    {"call": None, "n": 1},
    {"id": "a", "call": "b"},
    {"id": "a", "call": "c"},
    {"call": "large", "content": "y" * 1500},
    "text",
    5,
]
#: The end of a block that does such a thing.
ENDED = {
    "leave": "no error",
    "look": "no error",
    "edit partial": "no error",
    "raise": "BodyFailed",
    "stream field": "InvalidArgument",
    "remove partial": "SessionBusy",
    "delete": "SessionBusy",
    "stale": "VersionMismatch",
}


class Conflict(Exception):
    """The model's own conflict."""


class BodyFailed(Exception):
    """The error that the body of a transaction raises."""


def merged(base: Data, mine: Data, theirs: Data, *, prefer: str = "error") -> Data:
    """Return the data that a save must make of three versions."""
    result = copy.deepcopy(theirs)
    for name in (*FIELDS, "visits"):
        b, m, t = (side.get(name, MISSING) for side in (base, mine, theirs))
        if m == b or (m == t and name != "visits"):
            value = t
        elif t == b:
            value = m
        elif name == "visits":
            value = t + m - (b or 0)
        elif prefer == "error":
            raise Conflict
        else:
            value = m if prefer == "mine" else t
        put(result, name, value)
    known = {message["id"] for message in base.get("messages", [])}
    added = [message for message in mine.get("messages", []) if message["id"] not in known]
    if added:
        result.setdefault("messages", []).extend(added)
    return result


def as_text(value: Any) -> str:
    """Return a text that tells ``1``, ``True`` and ``"1"`` apart, but not the order of keys."""
    return json.dumps(value, sort_keys=True)


def extended(there: list[Any], items: list[Any], key: str | None) -> list[Any]:
    """Return the list that an extend must make."""

    def id_of(item: Any) -> str | None:
        value = item.get(key) if type(item) is dict else None
        return as_text(value) if type(value) in (str, int) else None

    fresh: list[Any] = []
    for item in items:
        own = None if key is None else id_of(item)
        twins = [each for each in (*there, *fresh) if own is not None and id_of(each) == own]
        if not twins:
            fresh.append(item)
        elif as_text(twins[-1]) != as_text(item):
            raise Conflict
    return [*there, *fresh]


def answer_to(messages: list[Data], prompt_id: str, partial_id: str | None) -> tuple[bool, Data | None]:
    """Tell whether a prompt's turn has finished, and return its answer.

    The answer is the message that names the prompt, or the last answer before the next prompt. A partial is no answer.
    Nor is a message of a turn that was interrupted.
    """
    ids = [message["id"] for message in messages]
    if prompt_id not in ids:
        return False, None
    prompt = messages[ids.index(prompt_id)]
    for message in reversed(messages):
        if message.get("answers") == prompt_id:
            return True, None if message is prompt else message
    answer = None
    for message in messages[ids.index(prompt_id) + 1 :]:
        if message["role"] == "user":
            break
        is_answer = message["role"] == "assistant" and not message.get("interrupted")
        answer = message if is_answer and message["id"] != partial_id else answer
    return (False, None) if answer is None or prompt.get("interrupted") else (True, answer)


def add_visits(data: MutableMapping[str, Any], visits: int) -> None:
    data["visits"] = data.get("visits", 0) + visits


def put(data: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Set a field, or remove it."""
    if value is MISSING or value is None:
        data.pop(name, None)
    else:
        data[name] = value


def without_stream_fields(data: Data) -> Data:
    return {name: value for name, value in data.items() if name not in IDLE}


@dataclass(eq=False)
class ModelStream:
    """A stream, with the real one while this process runs it."""

    id: str
    session: ModelSession
    prompt: Data | None
    real: persist.Stream | None
    once: bool = False
    answer_id: str | None = None
    is_cancelled: bool = False

    @property
    def is_owner(self) -> bool:
        return self.session.stream is self and not self.session.is_deleted

    def mark_interrupted(self, data: Data | None = None) -> None:
        own = {self.prompt["id"] if self.prompt else None, self.answer_id}
        for message in (self.session.data if data is None else data).get("messages", []):
            if message["id"] in own:
                message["interrupted"] = True

    def put_answer(self, content: str) -> None:
        answer = {"id": f"{self.id}.answer", "role": "assistant", "content": content}
        messages = self.session.data.setdefault("messages", [])
        place = self.place_of_answer()
        messages[place : place + 1] = [answer]
        self.answer_id = answer["id"]

    def mark_answer(self) -> None:
        """Mark the answer of a turn with ``once=True`` with its prompt's id. Without an answer, mark the prompt."""
        if self.once and self.prompt is not None:
            own = self.answer_id or self.prompt["id"]
            next(each for each in self.session.data["messages"] if each["id"] == own)["answers"] = self.prompt["id"]

    def place_of_answer(self) -> int:
        """Return the place of the partial, or the end."""
        ids = [message["id"] for message in self.session.data.get("messages", [])]
        return ids.index(self.answer_id) if self.answer_id in ids else len(ids)


@dataclass(eq=False)
class ModelSession:
    """A committed session. `updated_at` is None until the next look, if a commit may have moved it.

    `versions` holds the versions of its revisions, as far as they were seen.
    A session has revision 0 until it is created.
    """

    data: Data
    revision: int = 1
    versions: dict[int, str] = field(default_factory=dict)
    stream: ModelStream | None = None
    updated_at: datetime | None = None
    is_deleted: bool = False

    @property
    def has_live_stream(self) -> bool:
        return self.stream is not None and self.stream.real is not None

    def committed(self, *, touch: bool = True) -> None:
        self.revision += 1
        if touch:
            self.updated_at = None

    @property
    def version(self) -> str:
        return self.versions[self.revision]

    def replace(self, data: Data, *, touch: bool = True) -> None:
        """Commit new data, unless it is the same."""
        if as_text(data) != as_text(self.data) or not self.revision:
            self.data = copy.deepcopy(data)
            self.committed(touch=touch)

    def take_away(self) -> None:
        assert self.stream is not None
        self.stream.mark_interrupted()
        self.stream = None


@dataclass(eq=False)
class ModelLoaded:
    """A `Session` object: its merge base, and the data that it holds now."""

    real: persist.Session
    session: ModelSession
    base: Data = field(default_factory=dict)
    data: Data = field(default_factory=dict)
    stream_id: str | None = None

    def take(self, data: Data | None = None) -> None:
        """Take the committed state as the merge base. The object then holds `data`, or that state."""
        self.base = copy.deepcopy(self.session.data)
        self.data = copy.deepcopy(self.base if data is None else data)
        self.stream_id = self.session.stream.id if self.session.stream else None

    def assert_agrees(self) -> None:
        assert without_stream_fields(self.real.data) == self.data
        assert self.real.active_stream_id == self.stream_id


class SessionMachine(RuleBasedStateMachine):
    """Every verb, in any order."""

    parent: ClassVar[Path]
    journal: ClassVar[Mode] = "auto"

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory(dir=self.parent)
        self.store = persist.Store(self.scratch.name, merge={"visits": "sum"}, journal=self.journal)
        file_engine(self.store).options.verifies_folds = True
        self.sessions: dict[str, ModelSession] = {}
        self.loaded: list[ModelLoaded] = []
        self.streams: list[ModelStream] = []
        #: The session and revision of each version.
        self.versions: dict[str, tuple[ModelSession, int]] = {}
        self.counter = self.looks = 0

    def teardown(self) -> None:
        for stream in self.streams:
            self.leave(stream)
        self.scratch.cleanup()

    def fresh(self, what: str) -> str:
        self.counter += 1
        return f"{what}-{self.counter}"

    def message(self, role: str | None = None) -> Data:
        name = self.fresh("m")
        return {"id": name, "role": role or ("user", "assistant", "tool")[self.counter % 3], "content": "hi"}

    def note(self, session: ModelSession, version: str | None, revision: int | None = None) -> None:
        """Check a version that a verb reports: the revision had no other version before, and no other commit has it."""
        revision = session.revision if revision is None else revision
        assert version is not None
        assert self.versions.setdefault(version, (session, revision)) == (session, revision)
        assert session.versions.setdefault(revision, version) == version

    def stale_version(self, session: ModelSession, pick: int) -> str:
        """Return a version that was one once, of this session or of another, or that never was one."""
        known = [version for version in self.versions if version != session.version]
        return [*known[-6:], "", str(session.revision), session.version[:-1]][pick % (min(6, len(known)) + 3)]

    def pick_session(self, pick: int) -> tuple[str, ModelSession]:
        names = sorted(self.sessions)
        return names[pick % len(names)], self.sessions[names[pick % len(names)]]

    # --- sessions ---

    @initialize()
    def begin_with_two(self) -> None:
        for session_id in IDS[:2]:
            self.create(session_id, "x")
        self.start(0, "prompt")

    @rule(session_id=session_ids, title=st.sampled_from(["x", "y"]))
    def create_one(self, session_id: str, title: str) -> None:
        if session_id not in self.sessions:
            self.assert_missing(session_id)
        self.create(session_id, title)

    def create(self, session_id: str, title: str) -> None:
        data: Data = {"title": title, "visits": 0, "tags": [], "messages": [self.message()]}
        if session_id in self.sessions:
            with pytest.raises(persist.SessionExists):
                self.store.create(session_id, data)
            return
        self.sessions[session_id] = ModelSession(copy.deepcopy(data))
        self.keep(self.store.create(session_id, data), session_id)

    @rule(
        session_id=session_ids,
        how=st.sampled_from(["append", "extend", "nothing", "update", "transaction", "raise", "named", "start"]),
        change=edits,
    )
    def write_first(self, session_id: str, how: str, change: tuple[str, Any]) -> None:
        """Write first: this creates a session where there is none, and works as usual where there is one."""
        missing = [each for each in IDS if each not in self.sessions]
        session_id = (missing or [session_id])[-1]
        session = self.sessions.get(session_id) or ModelSession({}, revision=0)
        is_new = session_id not in self.sessions
        if how == "named":
            # A caller that names a version has seen a session.
            version = self.stale_version(session, 0) if session.revision else "gone"
            with pytest.raises(persist.SessionNotFound if is_new else persist.VersionMismatch):
                self.store.update(session_id, lambda tx: put(tx.fields, *change), create=True, if_version=version)
        elif how == "raise":
            with pytest.raises(BodyFailed), self.store.transaction(session_id, create=True) as tx:
                assert (tx.version is None) is is_new
                put(tx.fields, *change)
                raise BodyFailed
        elif how == "start":
            self.start_on(session_id, session, "prompt", create=True)
        else:
            self.write_first_of(session_id, session, how, change)
        if session.revision:
            self.sessions[session_id] = session
        else:
            self.assert_missing(session_id)

    def write_first_of(self, session_id: str, session: ModelSession, how: str, change: tuple[str, Any]) -> None:
        expected, message = copy.deepcopy(session.data), self.message()
        if how == "append":
            version = self.store.append(session_id, "messages", dict(message), create=True)
            expected.setdefault("messages", []).append(message)
        elif how == "extend":
            items = ["text", dict(message)][: self.counter % 3]
            version = self.store.extend(session_id, "log", items, create=True)
            if items:
                expected.setdefault("log", []).extend(items)
        elif how == "nothing":
            self.store.update(session_id, lambda tx: None, create=True)
            version = self.store.head(session_id).version
        elif how == "update":
            self.store.update(session_id, lambda tx: put(tx.data, *change), create=True)
            version = self.store.head(session_id).version
            put(expected, *change)
        else:
            with self.store.transaction(session_id, create=True) as tx:
                assert tx.version == (session.version if session.revision else None)
                put(tx.fields, *change)
                tx.list("messages").append(dict(message))
            assert tx.version is not None
            version = tx.version
            put(expected, *change)
            expected.setdefault("messages", []).append(message)
        session.replace(expected)
        self.note(session, version)

    def keep(self, real: persist.Session, session_id: str) -> None:
        loaded = ModelLoaded(real, self.sessions[session_id])
        loaded.take()
        loaded.assert_agrees()
        self.loaded.append(loaded)
        # Keep a few objects of different ages. The oldest but one goes, so that one object stays very old.
        del self.loaded[1:-5]

    @rule(pick=picks)
    def load_one(self, pick: int) -> None:
        self.load(pick)

    def load(self, pick: int) -> None:
        session_id, _ = self.pick_session(pick)
        self.keep(self.store.load(session_id), session_id)

    def assert_missing(self, session_id: str) -> None:
        verbs: list[Callable[[], object]] = [
            lambda: self.store.load(session_id),
            lambda: self.store.head(session_id),
            lambda: self.store.tail(session_id),
            lambda: self.store.delete(session_id),
            lambda: self.store.delete(session_id, force=True, if_version="x"),
            lambda: self.store.duplicate(session_id, "copy"),
            lambda: self.store.append(session_id, "messages", 1),
            lambda: self.store.extend(session_id, "messages", [1], key=None),
            lambda: self.store.update(session_id, lambda tx: None),
            lambda: self.store.update(session_id, lambda tx: None, create=True, if_version="x"),
            lambda: self.store.transaction(session_id).__enter__(),
            lambda: self.store.start_stream(session_id),
            lambda: self.store.start_stream(session_id, {"id": "p"}, once=True, fields={"topic": "x"}),
            lambda: self.store.stream(session_id),
            lambda: self.store.cancel(session_id, "s"),
            lambda: self.store.accept(session_id),
        ]
        for verb in verbs:
            with pytest.raises(persist.SessionNotFound):
                verb()

    @rule(pick=picks)
    def duplicate(self, pick: int) -> None:
        """Duplicate to a free id. If no id is free, delete the copy again."""
        session_id, original = self.pick_session(pick)
        with pytest.raises(persist.SessionExists):
            self.store.duplicate(session_id, session_id)
        data = copy.deepcopy(original.data)
        if original.stream is not None and "messages" in data:
            data["messages"] = [message for message in data["messages"] if message["id"] != original.stream.answer_id]
        new_id = next((each for each in IDS if each not in self.sessions), "copy")
        self.sessions[new_id] = ModelSession(data)
        self.keep(self.store.duplicate(session_id, new_id), new_id)
        if new_id not in IDS:
            self.store.delete(new_id)
            self.sessions.pop(new_id).is_deleted = True

    @rule(
        pick=picks,
        how=st.sampled_from(["delete", "right version", "stale version", "transaction", "update", "raise"]),
        force=st.booleans(),
        anew=st.booleans(),
    )
    def delete(self, pick: int, how: str, force: bool, anew: bool) -> None:
        """Delete a session, and perhaps create another one of the same id. Few sessions stay few."""
        session_id, session = self.pick_session(pick)
        if how == "stale version":
            with pytest.raises(persist.VersionMismatch):
                self.store.delete(session_id, force=force, if_version=self.stale_version(session, pick))
            return
        is_verb = how in ("delete", "right version")

        def leave(tx: persist.Transaction) -> str:
            tx.fields["title"] = "late"
            tx.list("messages").append({"id": "late"})
            tx.delete()
            for use in (lambda: tx.fields, lambda: tx.data, lambda: tx.list("log"), tx.delete):
                with pytest.raises(persist.InvalidArgument, match="left after its delete"):
                    use()
            if how == "raise":
                raise BodyFailed
            return "gone"

        def remove() -> None:
            if is_verb:
                version = session.version if how == "right version" else None
                self.store.delete(session_id, force=force, if_version=version)
            elif how == "update":
                assert self.store.update(session_id, leave, if_version=session.version) == "gone"
            else:
                with self.store.transaction(session_id) as tx:
                    leave(tx)
                assert tx.is_deleted

        if session.has_live_stream and not (force and is_verb):
            with pytest.raises(persist.SessionBusy):
                remove()
            return
        if how == "raise":
            with pytest.raises(BodyFailed):
                remove()
            return
        remove()
        self.sessions.pop(session_id).is_deleted = True
        if anew or not self.sessions:
            self.create(session_id, "y")

    @rule(pick=picks, named=st.sampled_from([None, "right", "stale"]), touch=st.booleans(), where=places)
    def update(self, pick: int, named: str | None, touch: bool, where: str) -> None:
        """Update by a function, which is called once with the committed state.
        It is not called if it names another version.
        """
        session_id, session = self.pick_session(pick)
        tag, calls = self.fresh("tag"), list[str | None]()

        def retag(tx: persist.Transaction) -> int:
            calls.append(tx.version)
            if where == "lists":
                tx.list("tags").append(tag)
                del tx.list("tags")[:-3]
                return len(tx.list("tags"))
            fields = tx.data if where == "data" else tx.fields
            fields["tags"] = [*fields.get("tags", [])[-2:], tag]
            return len(fields["tags"])

        if named == "stale":
            with pytest.raises(persist.VersionMismatch) as caught:
                self.store.update(session_id, retag, if_version=self.stale_version(session, pick))
            assert (caught.value.theirs, calls) == (session.version, [])
            return
        expected = copy.deepcopy(session.data)
        expected["tags"] = [*expected.get("tags", [])[-2:], tag]
        version = None if named is None else session.version
        assert self.store.update(session_id, retag, if_version=version, touch=touch) == len(expected["tags"])
        assert calls == [session.version]
        session.replace(expected, touch=touch)

    @rule(pick=picks, how=st.sampled_from(["new dict", "generator", "a list as a message", "items that are none"]))
    def refused(self, pick: int, how: str) -> None:
        """Try a call that was surely meant in another way: it is an `InvalidArgument`, and no commit."""
        session_id, session = self.pick_session(pick)
        verbs: dict[str, Callable[[], object]] = {
            "new dict": lambda: self.store.update(session_id, lambda tx: {**tx.data, "title": "lost"}),
            "generator": lambda: self.store.update(session_id, lambda tx: (tx.data.popitem() for _ in "x")),
            "a list as a message": lambda: self.store.append(session_id, "messages", [self.message()]),
            "items that are none": lambda: self.store.extend(session_id, "messages", self.message()),
        }
        if how == "new dict" and not self.store.load(session_id).data:
            # The dict has no key of the document, so it may be any result.
            assert verbs[how]() is not None
        else:
            with pytest.raises(persist.InvalidArgument):
                verbs[how]()
        assert self.store.head(session_id).version == session.version

    @rule(pick=picks, touch=st.booleans(), how=st.sampled_from(["new", "again", "other content", "without a key"]))
    def append(self, pick: int, touch: bool, how: str) -> None:
        session_id, session = self.pick_session(pick)
        messages = session.data.get("messages", [])
        item = self.message() if how in ("new", "without a key") or not messages else messages[pick % len(messages)]
        item = copy.deepcopy(item)
        if how == "other content" and messages:
            item["content"] += "!"
            with pytest.raises(persist.MergeConflict):
                self.store.append(session_id, "messages", item)
            return
        expected = copy.deepcopy(session.data)
        expected["messages"] = extended(messages, [item], "id")
        key = None if how == "without a key" else "id"
        version = self.store.append(session_id, "messages", item, key=key, touch=touch)
        session.replace(expected, touch=touch)
        self.note(session, version)

    @rule(
        pick=picks,
        items=st.lists(st.sampled_from(ITEMS), max_size=4),
        key=st.sampled_from(["id", "call", "call", None]),
        touch=st.booleans(),
    )
    def extend(self, pick: int, items: list[Any], key: str | None, touch: bool) -> None:
        """Add items in one commit, each once by its key, or none of them."""
        session_id, session = self.pick_session(pick)
        expected = copy.deepcopy(session.data)
        try:
            added = extended(expected.get("log", []), items, key)
        except Conflict:
            with pytest.raises(persist.MergeConflict):
                self.store.extend(session_id, "log", items, key=key)
            return
        if added or "log" in expected:
            expected["log"] = added
        for _ in range(1 if key is None else 2):
            version = self.store.extend(session_id, "log", iter(copy.deepcopy(items)), key=key, touch=touch)
            if all(type(item) is dict and type(item.get(key)) in (str, int) for item in items):
                # Such an extend may be repeated.
                continue
            break
        session.replace(expected, touch=touch)
        self.note(session, version)

    @rule(pick=picks, count=st.integers(1, 12), is_start=st.booleans())
    def trim(self, pick: int, count: int, is_start: bool) -> None:
        """Shorten a list below the size above which it is a part. An empty list stays."""
        session_id, session = self.pick_session(pick)
        expected = copy.deepcopy(session.data)
        part = slice(None, count) if is_start else slice(-count, None)
        del expected.get("log", [])[part]
        with self.store.transaction(session_id, if_version=session.version) as tx:
            del tx.list("log")[part]
        session.replace(expected)
        self.note(session, tx.version)

    @rule(
        pick=picks,
        change=edits,
        visits=visits,
        touch=st.booleans(),
        where=places,
        named=st.booleans(),
        how=st.sampled_from(["leave", "leave", "raise", "stream field", "remove partial", "stale"]),
    )
    def transaction(
        self, pick: int, change: tuple[str, Any], visits: int, touch: bool, where: str, named: bool, how: str
    ) -> None:
        """Change fields, lists and the whole data in a block, which is one commit or none."""
        session_id, session = self.pick_session(pick)
        expected = copy.deepcopy(session.data)
        stream, version = session.stream, session.version if named or how == "stale" else None
        if how == "remove partial" and (stream is None or stream.real is None):
            how = "leave"
        if how == "remove partial" and stream is not None:
            self.put_partial(stream, "Well", anew=False)
            expected, version = copy.deepcopy(session.data), None
        if how == "stale":
            version = self.stale_version(session, pick)
        ended, committed = "no error", None
        try:
            with self.store.transaction(session_id, touch=touch, if_version=version) as tx:
                assert tx.version == self.store.head(session_id).version
                self.change_in_block(tx, expected, change, visits, where)
                if how == "stream field":
                    (tx.data if where == "data" else tx.fields)["active_stream_id"] = "mine"
                if how == "remove partial":
                    assert stream is not None
                    self.remove_message(tx, stream.answer_id, where)
                if how == "raise":
                    raise BodyFailed
            committed = tx.version
        except (BodyFailed, persist.InvalidArgument, persist.SessionBusy, persist.VersionMismatch) as error:
            ended = type(error).__name__
        assert ended == ENDED[how]
        if how == "leave":
            session.replace(expected, touch=touch)
            self.note(session, committed)

    def change_in_block(
        self, tx: persist.Transaction, expected: Data, change: tuple[str, Any], visits: int, where: str
    ) -> None:
        """Change a transaction, and the plain dict that it must equal afterwards."""
        tag, message = self.fresh("tag"), self.message()
        if where in ("fields", "all"):
            for each in (tx.fields, expected):
                put(each, *change)
                add_visits(each, visits)
        if where in ("lists", "all"):
            for tags in (tx.list("tags"), expected.setdefault("tags", [])):
                tags.insert(0, tag)
                del tags[3:]
            tx.list("messages").append(dict(message))
            expected.setdefault("messages", []).append(dict(message))
            first = expected["messages"][0]
            assert tx.list("messages").find(first["id"]) == first
            assert tx.list("messages").place_of(first["id"]) == 0
        if where in ("data", "all"):
            for data in (tx.data, expected):
                add_visits(data, visits)
                for last in data.get("messages", [])[-1:]:
                    last["seen"] = visits
        assert without_stream_fields(tx._copy.content.decode()) == expected

    def remove_message(self, tx: persist.Transaction, message_id: str | None, where: str) -> None:
        messages = tx.data["messages"] if where == "data" else tx.list("messages")
        del messages[next(at for at, message in enumerate(messages) if message["id"] == message_id)]

    @rule(pick=picks)
    def compact(self, pick: int) -> None:
        """Compact a session, which is no commit. A second compact finds nothing to do."""
        session_id, _ = self.pick_session(pick)
        self.store.compact(session_id)
        assert self.store.compact(session_id) is False

    @rule(pick=picks, touch=st.booleans(), change=edits, is_whole=st.booleans())
    def update_fields(self, pick: int, touch: bool, change: tuple[str, Any], is_whole: bool) -> None:
        """Return a value from the function that it was handed, which is no new dict."""
        session_id, session = self.pick_session(pick)

        def put_change(tx: persist.Transaction) -> Any:
            fields = tx.data if is_whole else tx.fields
            put(fields, *change)
            return fields if is_whole else "nowhere" in fields

        expected = copy.deepcopy(session.data)
        put(expected, *change)
        found = self.store.update(session_id, put_change, touch=touch)
        assert without_stream_fields(found) == expected if is_whole else found is False
        session.replace(expected, touch=touch)

    @rule(pick=picks, title=st.sampled_from(["by hand", "x"]))
    def edit_by_hand_and_accept(self, pick: int, title: str) -> None:
        session_id, session = self.pick_session(pick)
        path = self.store.path / f"{layout.name_of(session_id)}.json"
        # The records of a journal would come on top of an edit.
        self.store.compact(session_id)
        document = json.loads(path.read_bytes())
        document["title"] = title
        path.write_text(json.dumps(document, indent=1))
        with pytest.raises(persist.CorruptSession):
            self.store.load(session_id)
        assert session_id in [problem.session_id for problem in self.store.check() if problem.kind == "corrupt"]
        self.store.accept(session_id)
        session.data["title"] = title
        session.committed()
        assert self.store.accept(session_id).revision == session.revision

    # --- objects ---

    def pick_loaded(self, pick: int) -> ModelLoaded:
        return self.loaded[pick % len(self.loaded)]

    @precondition(lambda self: self.loaded)
    @rule(pick=picks, change=edits, visits=visits, appends=st.booleans())
    def change_one(self, pick: int, change: tuple[str, Any], visits: int, appends: bool) -> None:
        self.change(self.pick_loaded(pick), change, visits, appends)

    def change(self, loaded: ModelLoaded, change: tuple[str, Any], visits: int, appends: bool) -> None:
        message = self.message()
        for data in (loaded.real.data, loaded.data):
            put(data, *change)
            add_visits(data, visits)
            if appends:
                data.setdefault("messages", []).append(dict(message))

    @precondition(lambda self: self.loaded)
    @rule(pick=picks, change=edits, visits=visits, touch=st.booleans(), prefer=preferences)
    def change_and_save(
        self, pick: int, change: tuple[str, Any], visits: int, touch: bool, prefer: Literal["error", "mine", "theirs"]
    ) -> None:
        loaded = self.pick_loaded(pick)
        self.change(loaded, change, visits, appends=bool(visits))
        self.save(loaded, touch, prefer)

    @precondition(lambda self: self.loaded)
    @rule(pick=picks, touch=st.booleans(), prefer=preferences)
    def save_one(self, pick: int, touch: bool, prefer: Literal["error", "mine", "theirs"]) -> None:
        self.save(self.pick_loaded(pick), touch, prefer)

    def save(self, loaded: ModelLoaded, touch: bool, prefer: Literal["error", "mine", "theirs"]) -> None:
        session, data, messages = loaded.session, loaded.real.data, loaded.real.data.get("messages")
        self.assert_stream_fields_refused(loaded)
        try:
            result = merged(loaded.base, loaded.data, session.data, prefer=prefer)
        except Conflict:
            result = None
        if session.is_deleted or result is None:
            with pytest.raises(persist.SessionDeleted if session.is_deleted else persist.MergeConflict):
                loaded.real.save(touch=touch, on_conflict=prefer)
        else:
            version = loaded.real.save(touch=touch, on_conflict=prefer)
            if result == session.data and loaded.data != loaded.base and loaded.real.revision == session.revision + 1:
                # This object may have changed only the order of the fields, which is a commit, too.
                session.committed(touch=touch)
            session.replace(result, touch=touch)
            loaded.take()
            assert loaded.real.revision == session.revision
            assert version == loaded.real.version
            self.note(session, version)
        loaded.assert_agrees()
        assert loaded.real.data is data
        assert messages is None or loaded.real.data["messages"] is messages

    def assert_stream_fields_refused(self, loaded: ModelLoaded) -> None:
        data = loaded.real.data
        before = data.get("active_stream_id", MISSING)
        data["active_stream_id"] = "mine"
        with pytest.raises(persist.SessionDeleted if loaded.session.is_deleted else persist.InvalidArgument):
            loaded.real.save()
        if before is MISSING:
            del data["active_stream_id"]
        else:
            data["active_stream_id"] = before

    @precondition(lambda self: self.loaded)
    @rule(pick=picks)
    def refresh(self, pick: int) -> None:
        self.refresh_of(self.pick_loaded(pick))

    def refresh_of(self, loaded: ModelLoaded) -> None:
        try:
            result = merged(loaded.base, loaded.data, loaded.session.data)
        except Conflict:
            result = None
        if loaded.session.is_deleted or result is None:
            with pytest.raises(persist.SessionDeleted if loaded.session.is_deleted else persist.MergeConflict):
                loaded.real.refresh()
        else:
            loaded.real.refresh()
            loaded.take(result)
            assert loaded.real.revision == loaded.session.revision
        loaded.assert_agrees()

    @precondition(lambda self: self.loaded)
    @rule(pick=picks, theirs=edits, mine=edits, visits=visits, prefer=preferences, is_refresh=st.booleans())
    def save_what_was_overtaken(
        self,
        pick: int,
        theirs: tuple[str, Any],
        mine: tuple[str, Any],
        visits: int,
        prefer: Literal["error", "mine", "theirs"],
        is_refresh: bool,
    ) -> None:
        """Commit by another writer between the edit of an object and its save."""
        loaded = self.pick_loaded(pick)
        self.change(loaded, mine, visits, appends=bool(visits))
        if not loaded.session.is_deleted:
            self.commit_fields(loaded.session, theirs, visits)
        if is_refresh:
            self.refresh_of(loaded)
        self.save(loaded, True, prefer)

    def commit_fields(self, session: ModelSession, change: tuple[str, Any], visits: int) -> None:
        expected = copy.deepcopy(session.data)
        with self.store.transaction(self.id_of(session)) as tx:
            for fields in (tx.fields, expected):
                put(fields, *change)
                add_visits(fields, visits)
        session.replace(expected)

    @precondition(lambda self: self.loaded)
    @rule(
        pick=picks,
        change=edits,
        theirs=edits,
        how=st.sampled_from(["as it is", "fresh", "of a stream that dies", "overtaken"]),
    )
    def clear_stale_stream(self, pick: int, change: tuple[str, Any], theirs: tuple[str, Any], how: str) -> None:
        loaded = self.pick_loaded(pick)
        if how != "as it is":
            self.load(pick)
            loaded = self.loaded[-1]
            self.change(loaded, change, 1, appends=True)
        stream = loaded.session.stream
        if how == "overtaken":
            self.commit_fields(loaded.session, theirs, 0)
        if how in ("of a stream that dies", "overtaken") and stream is not None and stream.real is not None:
            self.drop(stream)
        session = loaded.session
        is_same = session.stream is not None and session.stream.id == loaded.stream_id
        if session.is_deleted or not is_same or session.has_live_stream:
            assert loaded.real.clear_stale_stream() is False
            return
        assert loaded.real.clear_stale_stream() is True
        session.take_away()
        session.committed(touch=False)
        try:
            loaded.take(merged(loaded.base, loaded.data, session.data))
        except Conflict:
            # The unsaved edit stays, so the next save reports the conflict. Only the stream is gone.
            loaded.stream_id = None
        loaded.assert_agrees()

    # --- streams ---

    @rule(
        pick=picks,
        has_partial=st.booleans(),
        how=st.sampled_from(["prompt", "no prompt", "interrupted", "answered", "running"]),
        once=st.booleans(),
        topic=st.sampled_from([None, "x", LARGE]),
    )
    def start_stream(self, pick: int, how: str, has_partial: bool, once: bool, topic: str | None) -> None:
        session_id, session = self.pick_session(pick)
        if how == "running":
            running = [stream.session for stream in self.running() if stream.is_owner and stream.prompt is not None]
            session = (running or [session])[-1]
            session_id = self.id_of(session)
        if how == "answered" and not session.has_live_stream and self.prompt_for(session, how) is None:
            turn = self.start_on(session_id, session, "prompt", once=once)
            assert turn is not None
            self.end(turn, "finish", None)
        stream = self.start_on(session_id, session, how, once=once and how != "no prompt", topic=topic)
        if stream is not None and has_partial:
            self.put_partial(stream, "Well")

    def start(self, pick: int, how: str) -> None:
        self.start_on(*self.pick_session(pick), how)

    def prompt_for(self, session: ModelSession, how: str) -> Data | None:
        """Return a prompt of the session that is interrupted, answered or running, or None for a new one."""
        messages, stream = session.data.get("messages", []), session.stream
        partial_id = stream.answer_id if stream else None
        known: dict[str, list[Data]] = {
            "interrupted": [message for message in messages if message.get("interrupted")],
            "answered": [
                message
                for message in messages
                if message["role"] == "user" and answer_to(messages, message["id"], partial_id)[0]
            ],
            "running": [
                message for message in messages if stream and stream.prompt and message["id"] == stream.prompt["id"]
            ],
        }
        for message in known.get(how, [])[:1]:
            # The prompt as it was sent.
            return {name: value for name, value in message.items() if name not in ("interrupted", "answers")}
        return None

    def start_on(
        self,
        session_id: str,
        session: ModelSession,
        how: str,
        *,
        create: bool = False,
        once: bool = False,
        topic: str | None = None,
    ) -> ModelStream | None:
        prompt, running = self.prompt_for(session, how), session.stream
        if prompt is None and how != "no prompt":
            prompt = self.message("user")
        options: Any = {"create": create, "once": once, "fields": None if topic is None else {"topic": topic}}

        def start(**more: Any) -> persist.Stream:
            return self.store.start_stream(session_id, copy.deepcopy(prompt), **options | more)

        is_live = running is not None and running.real is not None
        if once and prompt is not None:
            facts: tuple[str | None, Data | None] | None = None
            if running is not None and running.prompt is not None and prompt["id"] == running.prompt["id"]:
                facts = (running.id, None) if is_live else None
            else:
                partial_id = running.answer_id if running else None
                has_finished, answer = answer_to(session.data.get("messages", []), prompt["id"], partial_id)
                facts = (None, answer) if has_finished else None
            if facts is not None:
                with pytest.raises(persist.AlreadyStarted) as caught:
                    start()
                assert (caught.value.stream_id, caught.value.answer) == facts
                return None
        if is_live:
            with pytest.raises(persist.SessionBusy):
                start()
            return None
        # A stale stream is cleared on the way, in the same commit or not at all.
        data = copy.deepcopy(session.data)
        if running is not None:
            running.mark_interrupted(data)
        for name in IDLE:
            with pytest.raises(persist.InvalidArgument):
                start(fields={"topic": "lost", name: "x"})
        real = start()
        session.data, session.stream = data, ModelStream(real.id, session, prompt, real, once)
        self.streams.append(session.stream)
        put(data, "topic", data.get("topic") if topic is None else topic)
        known = [message for message in data.get("messages", []) if prompt and message["id"] == prompt["id"]]
        for message in known:
            message.pop("interrupted", None)
            message.pop("answers", None)
        if prompt is not None and not known:
            data.setdefault("messages", []).append(prompt)
        session.committed()
        return session.stream

    def running(self) -> list[ModelStream]:
        """Return the streams that this process runs. Some have lost their sessions."""
        return [stream for stream in self.streams if stream.real is not None]

    def pick_running(self, pick: int) -> ModelStream:
        """Return a stream that this process runs. Start one if there is none."""
        streams = self.running()
        if not streams:
            self.start(pick, "prompt")
            streams = self.running()
        return streams[pick % len(streams)]

    def lost(self, stream: ModelStream) -> bool:
        """Tell whether the stream has lost its session. If so, every verb must say so, and the turn is over."""
        assert stream.real is not None
        if stream.is_owner:
            return False
        real = stream.real
        message = {"content": "?"}
        verbs: list[Callable[[], object]] = [
            lambda: real.checkpoint(message),
            lambda: real.append(message),
            lambda: real.transaction().__enter__(),
            lambda: real.update(lambda tx: pytest.fail("the function was called")),
            lambda: real.finish(fields={"topic": "lost"}),
            real.finish,
            real.fail,
        ]
        for verb in verbs:
            with pytest.raises(persist.StreamLost):
                verb()
        assert real.is_cancelled()
        self.leave(stream)
        return True

    def leave(self, stream: ModelStream) -> None:
        real, stream.real = stream.real, None
        if real is not None:
            with real:
                pass

    @rule(pick=picks, content=st.sampled_from(["so far", "so far so good"]))
    def checkpoint(self, pick: int, content: str) -> None:
        stream = self.pick_running(pick)
        if not self.lost(stream):
            self.put_partial(stream, content)

    def put_partial(self, stream: ModelStream, content: str, *, anew: bool = True) -> None:
        assert stream.real is not None
        if stream.answer_id is not None and not anew:
            return
        before = copy.deepcopy(stream.session.data)
        stream.real.checkpoint({"role": "assistant", "content": content})
        stream.put_answer(content)
        if stream.session.data != before:
            stream.session.committed()

    @rule(pick=picks)
    def append_to_turn(self, pick: int) -> None:
        stream = self.pick_running(pick)
        if self.lost(stream):
            return
        assert stream.real is not None
        message = self.message()
        stream.real.append(message)
        stream.session.data.setdefault("messages", []).insert(stream.place_of_answer(), message)
        stream.session.committed()

    @rule(
        pick=picks,
        change=edits,
        visits=visits,
        where=places,
        how=st.sampled_from(["leave", "leave", "look", "edit partial", "raise", "remove partial", "delete"]),
        is_update=st.booleans(),
    )
    def transaction_of_stream(
        self, pick: int, change: tuple[str, Any], visits: int, where: str, how: str, is_update: bool
    ) -> None:
        """Run the owner's own block.
        Messages that it adds at the end go before the partial, as by an append of the stream.
        """
        stream = self.pick_running(pick)
        if self.lost(stream):
            return
        real, session = stream.real, stream.session
        assert real is not None
        if how in ("edit partial", "remove partial"):
            self.put_partial(stream, "Well", anew=False)
        expected, before = copy.deepcopy(session.data), self.store.head(self.id_of(session)).version
        at, has_partial = stream.place_of_answer(), stream.answer_id is not None
        is_last = has_partial and at == len(expected["messages"]) - 1
        seen: list[str | None] = []

        def use(tx: persist.Transaction) -> str:
            seen.append(tx.version)
            if how != "look":
                self.change_in_block(tx, expected, change, visits, where)
            if how == "edit partial":
                for messages in (tx.data["messages"] if where == "data" else tx.list("messages"), expected["messages"]):
                    messages[at]["note"] = "mine"
            if how == "remove partial":
                self.remove_message(tx, stream.answer_id, where)
            if how == "delete":
                tx.delete()
            if how == "raise":
                raise BodyFailed
            return "done"

        ended = "no error"
        try:
            if is_update:
                assert real.update(use) == "done"
                seen.append(None)
            else:
                with real.transaction() as tx:
                    use(tx)
                seen.append(tx.version)
        except (BodyFailed, persist.SessionBusy) as error:
            ended = type(error).__name__
        assert seen[0] == before
        assert ended == ENDED[how]
        if ended == "no error":
            if is_last:
                expected["messages"].append(expected["messages"].pop(at))
            session.replace(expected)
            self.note(session, seen[1] or self.store.head(self.id_of(session)).version)

    def id_of(self, session: ModelSession) -> str:
        return next(session_id for session_id, each in self.sessions.items() if each is session)

    @rule(
        pick=picks,
        how=st.sampled_from(["finish", "finish as it is", "fail", "leave", "reserved field"]),
        topic=st.sampled_from([None, "x", LARGE]),
    )
    def end_stream(self, pick: int, how: str, topic: str | None) -> None:
        stream = self.pick_running(pick)
        if self.lost(stream):
            return
        if how == "reserved field":
            assert stream.real is not None
            for name in (*IDLE, "_persist", "messages"):
                with pytest.raises(persist.InvalidArgument):
                    stream.real.finish({"content": "lost"}, fields={"topic": "lost", name: None})
            return
        self.end(stream, how, topic)

    def end(self, stream: ModelStream, how: str, topic: str | None) -> None:
        real, stream.real = stream.real, None
        assert real is not None
        fields = None if topic is None else {"topic": topic}
        with real:
            if how == "finish":
                real.finish({"role": "assistant", "content": "all"}, fields=fields)
            elif how == "finish as it is":
                real.finish(fields=fields)
            elif how == "fail":
                real.fail()
        with pytest.raises(persist.StreamLost):
            real.checkpoint({"content": "late"})
        if how == "finish":
            stream.put_answer("all")
        if how in ("fail", "leave"):
            stream.mark_interrupted()
        else:
            stream.mark_answer()
            put(stream.session.data, "topic", topic or stream.session.data.get("topic"))
        stream.session.stream = None
        stream.session.committed()

    @rule(pick=picks)
    def drop_stream(self, pick: int) -> None:
        self.drop(self.pick_running(pick))

    def drop(self, stream: ModelStream) -> None:
        """Make the owner forget the stream, which is dead then, as if its process were."""
        assert stream.real is not None
        known = weakref.ref(stream.real)
        with pytest.warns(ResourceWarning):
            stream.real = None
            if known() is not None:
                # An error that was raised through the stream still refers to it.
                gc.collect()

    @precondition(lambda self: any(session.stream for session in self.sessions.values()))
    @rule(pick=picks, how=st.sampled_from(["ask", "ask twice", "force", "force and look", "another"]))
    def cancel(self, pick: int, how: str) -> None:
        active = [
            (session_id, session.stream) for session_id, session in sorted(self.sessions.items()) if session.stream
        ]
        session_id, stream = active[pick % len(active)]
        if how == "another":
            others = [known.id for known in self.streams if known is not stream] or ["nobody"]
            for force in (False, True):
                assert self.store.cancel(session_id, others[-1], force=force) is False
            return
        assert self.store.cancel(session_id, stream.id, force=how.startswith("force")) is True
        if how.startswith("force") or stream.real is None:
            stream.session.take_away()
            stream.session.committed(touch=False)
        elif not stream.is_cancelled:
            stream.is_cancelled = True
            stream.session.committed(touch=False)
        if how == "ask twice":
            assert self.store.cancel(session_id, stream.id) is (stream.real is not None)
        if how == "force and look" and stream.real is not None:
            assert self.lost(stream)

    @rule(every_session=st.booleans())
    def clear_stale_streams(self, every_session: bool) -> None:
        stale = sorted(
            (session_id, session.stream.id)
            for session_id, session in self.sessions.items()
            if session.stream is not None and not session.has_live_stream
        )
        cleared = self.store.clear_stale_streams(every_session=every_session)
        assert cleared == persist.Sweep([persist.ClearedStream(*each) for each in stale], {})
        for session_id, _ in stale:
            self.sessions[session_id].take_away()
            self.sessions[session_id].committed(touch=False)

    # --- what always holds ---

    @invariant()
    def every_session_reads_as_the_model_says(self) -> None:
        self.looks += 1
        names = sorted(self.sessions)
        heads = {head.id: head for head in self.store.heads()}
        assert self.store.ids() == list(heads) == names
        prefix = ("o", "one", "_t/w o:", "three" * 60, "ones", "none")[self.looks % 6]
        own = [name for name in names if name.startswith(prefix)]
        assert self.store.ids(prefix=prefix) == [head.id for head in self.store.heads(prefix=prefix)] == own
        assert [head.id for head in self.store.heads(after=names[0], limit=1)] == names[1:2]
        for session_id in IDS:
            assert self.store.exists(session_id) == (session_id in self.sessions)
        for session_id, session in self.sessions.items():
            real = self.store.load(session_id)
            assert as_text(without_stream_fields(real.data)) == as_text(session.data)
            assert real.revision == session.revision
            self.note(session, real.version)
            assert real.active_stream_id == (session.stream.id if session.stream else None)
            assert (real.data.get("pending_started_at") is not None) == (session.stream is not None)
            prompt = session.stream.prompt if session.stream else None
            assert real.data.get("pending_user_message") == (prompt["content"] if prompt else None)
            session.updated_at = session.updated_at or real.updated_at
            assert real.updated_at == session.updated_at
            self.assert_head_agrees(heads[session_id], real)
            self.assert_tail_agrees(real)
        for loaded in self.loaded:
            self.note(loaded.session, loaded.real.version, loaded.real.revision)

    def assert_head_agrees(self, head: persist.Head, real: persist.Session) -> None:
        assert head == self.store.head(real.id)
        content = encoded(real.data)
        assert head.fields == {name: value for name, value in real.data.items() if name in content.fields}
        for name in content.apart:
            with pytest.raises(KeyError, match="not part of a head"):
                head.fields.get(name)
        assert head.counts == {name: len(value) for name, value in real.data.items() if type(value) is list}
        shown = (head.version, head.revision, head.created_at, head.updated_at, head.active_stream_id)
        assert shown == (real.version, real.revision, real.created_at, real.updated_at, real.active_stream_id)

    def assert_tail_agrees(self, real: persist.Session) -> None:
        """Check one limit and one list at a time, and all of them in a row of steps."""
        limit = (0, 1, 2, 5, 20)[self.looks % 5]
        name = ("messages", "log", "messages", "log", "tags", "none", "title")[self.looks % 7]
        value = real.data.get(name, [])
        if type(value) is list:
            tail = self.store.tail(real.id, limit=limit, field=name)
            assert as_text(tail) == as_text(value[max(0, len(value) - limit) :])
        else:
            with pytest.raises(persist.InvalidArgument):
                self.store.tail(real.id, limit=limit, field=name)

    @invariant()
    def every_stream_is_known(self) -> None:
        streams = {session.stream.id: session.stream for session in self.sessions.values() if session.stream}
        shown = {info.stream_id: (info.is_live, info.is_cancelled) for info in self.store.streams()}
        assert shown == {stream.id: (stream.real is not None, stream.is_cancelled) for stream in streams.values()}
        for stream in streams.values():
            if stream.real is not None:
                assert stream.real.is_cancelled() == stream.is_cancelled
        stale = sorted(
            session_id
            for session_id, session in self.sessions.items()
            if session.stream and not session.has_live_stream
        )
        # `check` reads every session whole.
        if self.looks % 3 == 0:
            problems = [(problem.session_id, problem.kind) for problem in self.store.check()]
            assert problems == [(each, "stale") for each in stale]


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_every_verb_does_what_the_model_says(scratch: Path, mode: Mode) -> None:
    """The answers, errors and documents are the model's, whatever the order of the verbs, in both modes."""

    class Machine(SessionMachine):
        parent = scratch
        journal = mode

    # 40 runs of up to 40 steps each. With `--hypothesis-profile=search` they are 800.
    runs = settings().max_examples * 2 // 5
    run_state_machine_as_test(Machine, settings=settings(max_examples=runs, stateful_step_count=40, deadline=None))
