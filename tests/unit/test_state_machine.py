"""The whole API against a model: a plain dict for each session, and a few lines that say what each verb does to it.

Hypothesis draws the steps. Each is done to the store and to the model, whose answers and errors must agree; after each,
every session must read as the model says. Several `Session` objects of different ages, with unsaved edits, stay in
play, and so do streams that are live, cancelled, fenced off or dropped.

The model knows how edits of different fields merge, whose value a preference or a policy takes, and that messages
appended on both sides are both kept, theirs first. How other arrays merge is for `test_merge`: only `update` changes
``tags``.

The ids have awkward characters, and a value crosses the size above which it stands apart.

It can fail, and does with any of these in the package: `edit` ignores ``touch=False``; an interrupted partial is not
marked; a save does not move the merge base; `duplicate` keeps the partial; `cancel` ends whatever stream is active;
``sum`` adds the base twice.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
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

#: One of them has every kind of awkward character, and one is so long that its file's name holds a hash.
IDS = ("one", "_t/w o:é%\n.json", "three" * 60)
FIELDS = ("title", "topic")
#: Above 4 KiB a value stands apart, and leaves the head.
LARGE = "z" * (APART_BYTES - 1)

session_ids = st.sampled_from(IDS)
#: Few values, so that both sides often choose the same one; None takes the field away.
edits = st.tuples(st.sampled_from(FIELDS), st.sampled_from(["x", "y", "z", LARGE, None]))
visits = st.integers(0, 2)
picks = st.integers(0, 11)
preferences = st.sampled_from(["error", "mine", "theirs"])


class Conflict(Exception):
    """The model's own."""


class BodyFailed(Exception):
    """What the body of an `edit` raises."""


def merged(base: Data, mine: Data, theirs: Data, *, prefer: str = "error", sums: bool = True) -> Data:
    """What a save must make of three versions."""
    result = copy.deepcopy(theirs)
    for name in (*FIELDS, "visits"):
        b, m, t = (side.get(name, MISSING) for side in (base, mine, theirs))
        if m == b or (m == t and not (sums and name == "visits")):
            value = t
        elif t == b:
            value = m
        elif sums and name == "visits":
            value = t + m - b
        elif prefer == "error":
            raise Conflict
        else:
            value = m if prefer == "mine" else t
        put(result, name, value)
    known = {message["id"] for message in base["messages"]}
    result["messages"] += [message for message in mine["messages"] if message["id"] not in known]
    return result


def put(data: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Set a field, or take it away."""
    if value is MISSING or value is None:
        data.pop(name, None)
    else:
        data[name] = value


def without_stream_fields(data: Data) -> Data:
    return {name: value for name, value in data.items() if name not in IDLE}


@dataclass(eq=False)
class ModelStream:
    """A stream, and the real one while this process runs it."""

    id: str
    session: ModelSession
    prompt: Data | None
    real: persist.Stream | None
    answer_id: str | None = None
    is_cancelled: bool = False

    @property
    def is_owner(self) -> bool:
        return self.session.stream is self and not self.session.is_deleted

    def mark_interrupted(self) -> None:
        own = {self.prompt["id"] if self.prompt else None, self.answer_id}
        for message in self.session.data["messages"]:
            if message["id"] in own:
                message["interrupted"] = True

    def put_answer(self, content: str) -> None:
        answer = {"id": f"{self.id}.answer", "content": content}
        messages = self.session.data["messages"]
        place = self.place_of_answer()
        messages[place : place + 1] = [answer]
        self.answer_id = answer["id"]

    def place_of_answer(self) -> int:
        """Where the partial stands, or the end."""
        ids = [message["id"] for message in self.session.data["messages"]]
        return ids.index(self.answer_id) if self.answer_id in ids else len(ids)


@dataclass(eq=False)
class ModelSession:
    """A committed session. `updated_at` is None until the next look, if a commit may have moved it."""

    data: Data
    revision: int = 1
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

    def replace(self, data: Data, *, touch: bool = True) -> None:
        """Commit new data, unless it is the same."""
        if data != self.data:
            self.data = copy.deepcopy(data)
            self.committed(touch=touch)

    def take_away(self) -> None:
        assert self.stream is not None
        self.stream.mark_interrupted()
        self.stream = None


@dataclass(eq=False)
class ModelLoaded:
    """A `Session` object: what it was based on, and what it holds now."""

    real: persist.Session
    session: ModelSession
    base: Data = field(default_factory=dict)
    data: Data = field(default_factory=dict)
    stream_id: str | None = None

    def take(self, data: Data | None = None) -> None:
        """Base it on the committed state; it then holds `data`, or that state too."""
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
        self.store._backend.files.options.verifies_folds = True
        self.sessions: dict[str, ModelSession] = {}
        self.loaded: list[ModelLoaded] = []
        self.streams: list[ModelStream] = []
        self.counter = 0

    def teardown(self) -> None:
        for stream in self.streams:
            self.leave(stream)
        self.scratch.cleanup()

    def fresh(self, what: str) -> str:
        self.counter += 1
        return f"{what}-{self.counter}"

    def message(self) -> Data:
        return {"id": self.fresh("m"), "content": "hi"}

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

    def keep(self, real: persist.Session, session_id: str) -> None:
        loaded = ModelLoaded(real, self.sessions[session_id])
        loaded.take()
        loaded.assert_agrees()
        self.loaded.append(loaded)
        # A few objects of different ages: the oldest but one goes, so that one stays very old.
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
            lambda: self.store.delete(session_id),
            lambda: self.store.duplicate(session_id, "copy"),
            lambda: self.store.append(session_id, "messages", 1),
            lambda: self.store.update(session_id, lambda tx: None),
            lambda: self.store.start_stream(session_id),
            lambda: self.store.cancel(session_id, "s"),
            lambda: self.store.accept(session_id),
        ]
        for verb in verbs:
            with pytest.raises(persist.SessionNotFound):
                verb()

    @rule(pick=picks)
    def duplicate(self, pick: int) -> None:
        """To a free id; if there is none, the copy goes again."""
        session_id, original = self.pick_session(pick)
        with pytest.raises(persist.SessionExists):
            self.store.duplicate(session_id, session_id)
        data = copy.deepcopy(original.data)
        if original.stream is not None:
            data["messages"] = [message for message in data["messages"] if message["id"] != original.stream.answer_id]
        new_id = next((each for each in IDS if each not in self.sessions), "copy")
        self.sessions[new_id] = ModelSession(data)
        self.keep(self.store.duplicate(session_id, new_id), new_id)
        if new_id not in IDS:
            self.store.delete(new_id)
            self.sessions.pop(new_id).is_deleted = True

    @rule(pick=picks, force=st.booleans(), anew=st.booleans())
    def delete(self, pick: int, force: bool, anew: bool) -> None:
        """And perhaps create another one of the same id; few sessions stay few."""
        session_id, session = self.pick_session(pick)
        if session.has_live_stream and not force:
            with pytest.raises(persist.SessionBusy):
                self.store.delete(session_id)
            return
        self.store.delete(session_id, force=force)
        self.sessions.pop(session_id).is_deleted = True
        if anew or not self.sessions:
            self.create(session_id, "y")

    @rule(
        pick=picks,
        change=edits,
        visits=visits,
        touch=st.booleans(),
        how=st.sampled_from(["leave", "raise", "stream field"]),
    )
    def edit(self, pick: int, change: tuple[str, Any], visits: int, touch: bool, how: str) -> None:
        session_id, session = self.pick_session(pick)
        expected = copy.deepcopy(session.data)
        if how == "leave":
            with self.store.transaction(session_id, touch=touch) as tx:
                data = tx.data
                for each in (data, expected):
                    put(each, *change)
                    each["visits"] += visits
            session.replace(expected, touch=touch)
            return
        with pytest.raises((BodyFailed, persist.ReservedField)):
            with self.store.transaction(session_id) as tx:
                data = tx.data
                put(data, *change)
                data["active_stream_id"] = "mine"
                if how == "raise":
                    raise BodyFailed

    @rule(pick=picks, back=st.sampled_from([None, 0, 1]), touch=st.booleans())
    def update(self, pick: int, back: int | None, touch: bool) -> None:
        session_id, session = self.pick_session(pick)
        tag = self.fresh("tag")

        def retag(data: Data) -> int:
            data["tags"] = [*data["tags"][-2:], tag]
            return len(data["tags"])

        if back == 1:
            with pytest.raises(persist.VersionMismatch):
                self.store.update(session_id, retag, if_revision=session.revision - 1)
            return
        expected = copy.deepcopy(session.data)
        named = None if back is None else session.revision
        assert self.store.update(session_id, retag, if_revision=named, touch=touch) == retag(expected)
        session.replace(expected, touch=touch)

    @rule(pick=picks, touch=st.booleans(), how=st.sampled_from(["new", "again", "other content"]))
    def append(self, pick: int, touch: bool, how: str) -> None:
        session_id, session = self.pick_session(pick)
        messages = session.data["messages"]
        item = self.message() if how == "new" else copy.deepcopy(messages[pick % len(messages)])
        if how == "other content":
            item["content"] += "!"
            with pytest.raises(persist.MergeConflict):
                self.store.append(session_id, "messages", item)
            return
        expected = copy.deepcopy(session.data)
        if item not in messages:
            expected["messages"].append(item)
        revision = self.store.append(session_id, "messages", item, touch=touch)
        session.replace(expected, touch=touch)
        assert revision == session.revision

    @rule(
        pick=picks,
        change=edits,
        visits=visits,
        touch=st.booleans(),
        where=st.sampled_from(["fields", "lists", "data", "all"]),
        how=st.sampled_from(["leave", "raise", "stream field"]),
    )
    def transaction(self, pick: int, change: tuple[str, Any], visits: int, touch: bool, where: str, how: str) -> None:
        """A block that changes fields, lists and the whole data, and is one commit or none."""
        session_id, session = self.pick_session(pick)
        expected = copy.deepcopy(session.data)
        tag, message = self.fresh("tag"), self.message()
        ended = "no error"
        try:
            with self.store.transaction(session_id, touch=touch) as tx:
                if where in ("fields", "all"):
                    for each in (tx.fields, expected):
                        put(each, *change)
                        each["visits"] += visits
                if where in ("lists", "all"):
                    for tags in (tx.list("tags"), expected["tags"]):
                        tags.insert(0, tag)
                        del tags[3:]
                    tx.list("messages").append(dict(message))
                    expected["messages"].append(dict(message))
                    assert tx.list("messages").find(expected["messages"][0]["id"]) == 0
                if where in ("data", "all"):
                    for data in (tx.data, expected):
                        data["visits"] += visits
                        data["messages"][-1]["seen"] = visits
                assert without_stream_fields(tx.content.decode()) == expected
                if how == "stream field":
                    tx.fields["active_stream_id"] = "mine"
                if how == "raise":
                    raise BodyFailed
        except (BodyFailed, persist.ReservedField) as error:
            ended = type(error).__name__
        assert ended == {"leave": "no error", "raise": "BodyFailed", "stream field": "ReservedField"}[how]
        if how == "leave":
            session.replace(expected, touch=touch)

    @rule(pick=picks)
    def compact(self, pick: int) -> None:
        """It is no commit; a second one finds nothing to do."""
        session_id, _ = self.pick_session(pick)
        self.store.compact(session_id)
        assert self.store.compact(session_id) is False

    @rule(pick=picks, touch=st.booleans(), change=edits, back=st.sampled_from([None, 0, 1]))
    def update_head(self, pick: int, touch: bool, change: tuple[str, Any], back: int | None) -> None:
        session_id, session = self.pick_session(pick)

        def put_change(data: Data) -> bool:
            put(data, *change)
            return "nowhere" in data

        named = None if back is None else session.revision - back
        if back == 1:
            with pytest.raises(persist.VersionMismatch):
                self.store.update(session_id, put_change, if_revision=named)
            return
        expected = copy.deepcopy(session.data)
        put(expected, *change)
        assert self.store.update(session_id, put_change, if_revision=named, touch=touch) is False
        session.replace(expected, touch=touch)

    @rule(pick=picks, title=st.sampled_from(["by hand", "x"]))
    def edit_by_hand_and_accept(self, pick: int, title: str) -> None:
        session_id, session = self.pick_session(pick)
        path = self.store.path / f"{layout.name_of(session_id)}.json"
        # What stands in a journal comes on top of an edit.
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
            data["visits"] += visits
            if appends:
                data["messages"].append(dict(message))

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
        session, data, messages = loaded.session, loaded.real.data, loaded.real.data["messages"]
        self.assert_stream_fields_refused(loaded)
        try:
            result = merged(loaded.base, loaded.data, session.data, prefer=prefer)
        except Conflict:
            result = None
        if session.is_deleted or result is None:
            with pytest.raises(persist.SessionDeleted if session.is_deleted else persist.MergeConflict):
                loaded.real.save(touch=touch, on_conflict=prefer)
        else:
            loaded.real.save(touch=touch, on_conflict=prefer)
            if result == session.data and loaded.data != loaded.base and loaded.real.revision == session.revision + 1:
                # Mine may have changed nothing but the order of the fields: that is a commit too.
                session.committed(touch=touch)
            session.replace(result, touch=touch)
            loaded.take()
            assert loaded.real.revision == session.revision
        loaded.assert_agrees()
        assert loaded.real.data is data
        assert loaded.real.data["messages"] is messages

    def assert_stream_fields_refused(self, loaded: ModelLoaded) -> None:
        data = loaded.real.data
        before = data.get("active_stream_id", MISSING)
        data["active_stream_id"] = "mine"
        with pytest.raises(persist.SessionDeleted if loaded.session.is_deleted else persist.ReservedField):
            loaded.real.save()
        if before is MISSING:
            del data["active_stream_id"]
        else:
            data["active_stream_id"] = before

    @precondition(lambda self: self.loaded)
    @rule(pick=picks)
    def refresh(self, pick: int) -> None:
        loaded = self.pick_loaded(pick)
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
    @rule(pick=picks, change=edits, is_fresh=st.booleans())
    def clear_stale_stream(self, pick: int, change: tuple[str, Any], is_fresh: bool) -> None:
        loaded = self.pick_loaded(pick)
        if is_fresh:
            self.load(pick)
            loaded = self.loaded[-1]
            self.change(loaded, change, 1, appends=True)
        session = loaded.session
        is_same = session.stream is not None and session.stream.id == loaded.stream_id
        if session.is_deleted or not is_same or session.has_live_stream:
            assert loaded.real.clear_stale_stream() is False
            return
        assert loaded.real.clear_stale_stream() is True
        session.take_away()
        session.committed(touch=False)
        try:
            loaded.take(merged(loaded.base, loaded.data, session.data, sums=False))
        except Conflict:
            # The unsaved edit stays for the next save to report; only the stream is gone.
            loaded.stream_id = None
        loaded.assert_agrees()

    # --- streams ---

    @rule(pick=picks, has_partial=st.booleans(), how=st.sampled_from(["prompt", "no prompt", "again"]))
    def start_stream(self, pick: int, how: str, has_partial: bool) -> None:
        stream = self.start(pick, how)
        if stream is not None and has_partial:
            self.put_partial(stream, "Well")

    def start(self, pick: int, how: str) -> ModelStream | None:
        session_id, session = self.pick_session(pick)
        prompt = None if how == "no prompt" else self.message()
        if session.has_live_stream:
            with pytest.raises(persist.SessionBusy):
                self.store.start_stream(session_id, prompt)
            return None
        left = [message for message in session.data["messages"] if message.get("interrupted")]
        if how == "again" and left:
            prompt = {"id": left[0]["id"], "content": left[0]["content"]}
        real = self.store.start_stream(session_id, None if prompt is None else dict(prompt))
        if session.stream is not None:
            session.take_away()
        session.stream = ModelStream(real.id, session, prompt, real)
        self.streams.append(session.stream)
        known = [message for message in session.data["messages"] if prompt and message["id"] == prompt["id"]]
        for message in known:
            message.pop("interrupted", None)
        if prompt is not None and not known:
            session.data["messages"].append(prompt)
        session.committed()
        return session.stream

    def running(self) -> list[ModelStream]:
        """The streams that this process runs; some have lost their sessions."""
        return [stream for stream in self.streams if stream.real is not None]

    def pick_running(self, pick: int) -> ModelStream:
        streams = self.running()
        return streams[pick % len(streams)]

    def lost(self, stream: ModelStream) -> bool:
        """Whether the stream has lost its session; if so, every verb must say so, and the turn is over."""
        assert stream.real is not None
        if stream.is_owner:
            return False
        real = stream.real
        message = {"content": "?"}
        verbs: list[Callable[[], object]] = [
            lambda: real.checkpoint(message),
            lambda: real.append(message),
            real.finish,
            real.fail,
        ]
        for verb in verbs:
            with pytest.raises(persist.StreamLost):
                verb()
        assert real.cancelled
        self.leave(stream)
        return True

    def leave(self, stream: ModelStream) -> None:
        real, stream.real = stream.real, None
        if real is not None:
            with real:
                pass

    @precondition(lambda self: self.running())
    @rule(pick=picks, content=st.sampled_from(["so far", "so far so good"]))
    def checkpoint(self, pick: int, content: str) -> None:
        stream = self.pick_running(pick)
        if not self.lost(stream):
            self.put_partial(stream, content)

    def put_partial(self, stream: ModelStream, content: str) -> None:
        assert stream.real is not None
        before = copy.deepcopy(stream.session.data)
        stream.real.checkpoint({"content": content})
        stream.put_answer(content)
        if stream.session.data != before:
            stream.session.committed()

    @precondition(lambda self: self.running())
    @rule(pick=picks)
    def append_to_turn(self, pick: int) -> None:
        stream = self.pick_running(pick)
        if self.lost(stream):
            return
        assert stream.real is not None
        message = self.message()
        stream.real.append(message)
        stream.session.data["messages"].insert(stream.place_of_answer(), message)
        stream.session.committed()

    @precondition(lambda self: self.running())
    @rule(pick=picks, how=st.sampled_from(["finish", "finish as it is", "fail", "leave"]))
    def end_stream(self, pick: int, how: str) -> None:
        stream = self.pick_running(pick)
        if self.lost(stream):
            return
        real, stream.real = stream.real, None
        assert real is not None
        with real:
            if how == "finish":
                real.finish({"content": "all"})
            elif how == "finish as it is":
                real.finish()
            elif how == "fail":
                real.fail()
        with pytest.raises(persist.StreamLost):
            real.checkpoint({"content": "late"})
        if how == "finish":
            stream.put_answer("all")
        if how in ("fail", "leave"):
            stream.mark_interrupted()
        stream.session.stream = None
        stream.session.committed()

    @precondition(lambda self: self.running())
    @rule(pick=picks)
    def drop_stream(self, pick: int) -> None:
        """Its owner forgets it: the stream is dead, as if its process were."""
        stream = self.pick_running(pick)
        with pytest.warns(ResourceWarning):
            stream.real = None
            # An error that was raised through it may still refer to it.
            gc.collect()

    @precondition(lambda self: any(session.stream for session in self.sessions.values()))
    @rule(pick=picks, how=st.sampled_from(["ask", "ask twice", "force", "another"]))
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
        assert self.store.cancel(session_id, stream.id, force=how == "force") is True
        if how == "force" or stream.real is None:
            stream.session.take_away()
            stream.session.committed(touch=False)
        elif not stream.is_cancelled:
            stream.is_cancelled = True
            stream.session.committed(touch=False)
        if how == "ask twice":
            assert self.store.cancel(session_id, stream.id) is (stream.real is not None)

    @rule(every_session=st.booleans())
    def clear_stale_streams(self, every_session: bool) -> None:
        stale = sorted(
            (session_id, session.stream.id)
            for session_id, session in self.sessions.items()
            if session.stream is not None and not session.has_live_stream
        )
        cleared = self.store.clear_stale_streams(every_session=every_session)
        assert [(each.session_id, each.stream_id) for each in cleared] == stale
        for session_id, _ in stale:
            self.sessions[session_id].take_away()
            self.sessions[session_id].committed(touch=False)

    # --- what always holds ---

    @invariant()
    def every_session_reads_as_the_model_says(self) -> None:
        assert self.store.ids() == sorted(self.sessions)
        for session_id in IDS:
            assert self.store.exists(session_id) == (session_id in self.sessions)
        for session_id, session in self.sessions.items():
            real = self.store.load(session_id)
            assert without_stream_fields(real.data) == session.data
            assert real.revision == session.revision
            assert real.active_stream_id == (session.stream.id if session.stream else None)
            assert (real.data.get("pending_started_at") is not None) == (session.stream is not None)
            prompt = session.stream.prompt if session.stream else None
            assert real.data.get("pending_user_message") == (prompt["content"] if prompt else None)
            session.updated_at = session.updated_at or real.updated_at
            assert real.updated_at == session.updated_at
            self.assert_head_agrees(real)

    def assert_head_agrees(self, real: persist.Session) -> None:
        head = self.store.head(real.id)
        assert head.fields == {name: value for name, value in real.data.items() if name in encoded(real.data).fields}
        assert head.counts == {"messages": len(real.data["messages"])}
        shown = (head.revision, head.created_at, head.updated_at, head.active_stream_id)
        assert shown == (real.revision, real.created_at, real.updated_at, real.active_stream_id)

    @invariant()
    def every_stream_is_known(self) -> None:
        streams = {session.stream.id: session.stream for session in self.sessions.values() if session.stream}
        shown = {info.stream_id: (info.is_live, info.is_cancelled) for info in self.store.streams()}
        assert shown == {stream.id: (stream.real is not None, stream.is_cancelled) for stream in streams.values()}
        for stream in streams.values():
            if stream.real is not None:
                assert stream.real.cancelled == stream.is_cancelled
        stale = sorted(
            session_id
            for session_id, session in self.sessions.items()
            if session.stream and not session.has_live_stream
        )
        assert [(problem.session_id, problem.kind) for problem in self.store.check()] == [
            (each, "stale") for each in stale
        ]


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_every_verb_does_what_the_model_says(scratch: Path, mode: Mode) -> None:
    """Whatever the order of the verbs, without a journal and with one: the answers, errors and documents are the
    model's.
    """

    class Machine(SessionMachine):
        parent = scratch
        journal = mode

    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))
