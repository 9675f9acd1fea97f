"""Worlds: the same random verbs done to stores of different kinds, which must answer alike and hold alike.

Everything that is drawn comes from a world's own dice. Two worlds with the same seed do the same steps as long as they
are in the same state. Once they are not, they are compared, and differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import persist
from harness.sweeps import sweep
from persist.storage.content import ALWAYS_APART, encoded
from persist.turn import IDLE

Data = dict[str, Any]
#: Ids that are two and look like one, ids that msgspec does not read, and values that are no ids.
IDS = ("a", "b", "é", "\ud800", 1, "1", 1.0, True, None, "one.answer", "one.prompt", "two.answer", "long" * 30)
CONTENTS = ("x", "y", "é\n", "\ud800", {"crc": "00000000"}, "z" * 2000)
STREAMS = ("one", "two", "three")
#: Values above 4 KiB, which stand apart: a text, a short list of large items, and a long one of small items.
LARGE: tuple[Any, ...] = ("long" * 1100, ["é" * 3000, {"id": "a"}], list(range(1500)))


class World:
    """A session "s" of some stores on one directory, the streams and objects that are in play, and dice."""

    def __init__(self, stores: Sequence[persist.Store], seed: int) -> None:
        self._stores = stores
        self._dice = random.Random(seed)
        self._streams: list[persist.Stream] = []
        self._objects: list[persist.Session] = []
        # A verb that stands here twice is done more often.
        self._verbs: tuple[Callable[[], Any], ...] = (
            *(self._append, self._append, self._append, self._start, self._start, self._checkpoint, self._checkpoint),
            *(self._extend, self._extend, self._append_to_turn, self._transaction_of_turn, self._transaction_of_turn),
            *(self._end, self._drop, self._cancel, self._clear_stale, self._sweep),
            *(
                self._update,
                self._transaction,
                self._transaction,
                self._update_fields,
                self._update_fields,
                self._load,
                self._change_and_save,
                self._change_and_save,
            ),
            *(self._compact, self._make_anew),
        )
        self._store.create("s", self._new_data())

    @property
    def _store(self) -> persist.Store:
        return self._dice.choice(self._stores)

    def step(self) -> tuple[str, Any]:
        """Do one verb. Return its name, and what came of it."""
        verb = self._dice.choice(self._verbs)
        try:
            return verb.__name__, verb()
        except persist.VersionMismatch as error:
            # Each world draws its versions by chance.
            return verb.__name__, (type(error), error.path)
        except persist.MergeConflict as error:
            return verb.__name__, (type(error), error.path, error.mine, error.theirs)
        except persist.PersistError as error:
            return verb.__name__, type(error)

    def close(self) -> None:
        for stream in self._streams:
            stream._close()

    # --- verbs ---

    def _new_data(self) -> Data:
        messages = [self._item() for _ in range(self._dice.choice([0, 3, 30]))]
        lists: Data = self._dice.choice([{}, {"messages": messages}, {"messages": messages, "tool_calls": [1]}])
        return {"title": "New chat", "tags": ["t"]} | lists

    def _item(self) -> Any:
        kind = self._dice.random()
        if kind < 0.1:
            return self._dice.choice(["text", 5, None, [1], {}, {"tool_calls": [1]}])
        return self._message() | ({"id": self._dice.choice(IDS)} if kind < 0.8 else {"id": self._dice.getrandbits(60)})

    def _message(self) -> Data:
        return {"role": self._dice.choice(["user", "assistant"]), "content": self._dice.choice(CONTENTS)}

    def _append(self) -> Any:
        field = self._dice.choice(["messages", "messages", "messages", "tool_calls", "tags", "title", "new"])
        return self._at(self._store.append("s", field, self._item(), touch=self._dice.random() < 0.7))

    def _at(self, version: str | None) -> int:
        """Return the revision that has this version, which a verb has returned just now."""
        head = self._store.head("s")
        assert head.version == version
        return head.revision

    def _extend(self) -> Any:
        field = self._dice.choice(["messages", "messages", "tool_calls", "tags", "title", "new"])
        items, key = [self._item() for _ in range(self._dice.randint(0, 3))], self._dice.choice(["id", "id", None])
        return self._at(self._store.extend("s", field, items, key=key, create=self._dice.random() < 0.3))

    def _start(self) -> Any:
        prompt = None if self._dice.random() < 0.2 else self._message()
        if prompt is not None and self._dice.random() < 0.5:
            prompt["id"] = self._dice.choice(IDS)
        name = self._dice.choice(STREAMS) + str(self._dice.choice(["", self._dice.getrandbits(20)]))
        fields = self._dice.choice([None, {}, {"model": name, "n": 1}, {"title": "long" * 1100}])
        once = self._dice.random() < 0.3
        try:
            self._streams.append(self._store.start_stream("s", prompt, stream_id=name, fields=fields, once=once))
        except persist.AlreadyStarted as started:
            return started.stream_id, started.answer
        return name

    def _stream(self) -> persist.Stream:
        # Mostly the stream that owns the session. Older streams have lost it.
        return self._dice.choice([*self._streams[:-1], *self._streams[-1:] * 4])

    def _answer(self) -> Data:
        return self._message() | ({"id": self._dice.choice(IDS)} if self._dice.random() < 0.3 else {})

    def _checkpoint(self) -> Any:
        # A checkpoint that repeats the last one is no commit.
        more = self._dice.choice([{}, {"n": self._dice.random()}])
        return self._stream().checkpoint(self._answer() | more) if self._streams else None

    def _append_to_turn(self) -> Any:
        return self._stream().append(self._answer()) if self._streams else None

    def _transaction_of_turn(self) -> Any:
        if not self._streams:
            return None
        with self._stream().transaction() as tx:
            answers = [self._step_of(tx) for _ in range(self._dice.randint(0, 4))]
        return answers, self._at(tx.version)

    def _end(self) -> Any:
        if not self._streams:
            return None
        stream, how = self._stream(), self._dice.randrange(3)
        if how == 0:
            return stream.finish(self._answer(), fields=self._dice.choice([None, {"tokens": 5}, {"tags": ["t"]}]))
        return stream.finish() if how == 1 else stream.fail()

    def _drop(self) -> Any:
        """Drop a stream, as if its process died."""
        if self._streams:
            self._streams.pop()._close()

    def _cancel(self) -> Any:
        active = self._store.head("s").active_stream_id
        stream_id = active if active and self._dice.random() < 0.9 else "nobody"
        return self._store.cancel("s", stream_id, force=self._dice.random() < 0.3)

    def _clear_stale(self) -> Any:
        return self._store.load("s").clear_stale_stream()

    def _sweep(self) -> Any:
        return sweep(self._store, every_session=self._dice.random() < 0.5)

    def _update(self) -> Any:
        def change(tx: persist.Transaction) -> Any:
            data = tx.data
            messages = data.get("messages")
            what = self._dice.random()
            if what < 0.1:
                data["messages"] = self._dice.choice(["no list", {"a": 1}, []])
            elif what < 0.2:
                data.pop(self._dice.choice(ALWAYS_APART), None)
            elif type(messages) is not list:
                data["messages"] = [self._item()]
            elif what < 0.5 and messages:
                del messages[self._dice.randrange(len(messages))]
            else:
                messages.insert(self._dice.randint(0, len(messages)), self._item())
            return len(data)

        return self._store.update("s", change, touch=self._dice.random() < 0.7)

    def _update_fields(self) -> Any:
        def change(tx: persist.Transaction) -> Any:
            data = tx.data
            field = self._dice.choice(
                ["title", "é\ud800", "n", "n", "messages", "active_stream_id", "pending_user_message"]
            )
            value = self._dice.choice(["x", None, 5, [1, {"a": "\ud800"}], "long" * 1000, *LARGE])
            if self._dice.random() < 0.2:
                return data.pop(field, None) is None
            data[field] = value
            return self._dice.choice(
                [None, "messages" in data, sorted(map(ascii, data)), {**data, "pending_started_at": 0}]
            )

        if_version = self._store.head("s").version if self._dice.random() < 0.8 else "another one"
        return self._store.update("s", change, if_version=self._dice.choice([None, if_version]))

    def _transaction(self) -> Any:
        """Do some steps on a working copy, which reads only what it is asked for."""
        with self._store.transaction("s", touch=self._dice.random() < 0.7) as tx:
            answers = [self._step_of(tx) for _ in range(self._dice.randint(0, 4))]
            if self._dice.random() < 0.1:
                raise persist.InvalidArgument(what="a block", expected="to end", got="one that raises")
        return answers, self._at(tx.version)

    def _step_of(self, tx: persist.Transaction) -> Any:
        what = self._dice.random()
        if what < 0.4:
            field = self._dice.choice(["title", "tags", "n", "é\ud800", "large"])
            if self._dice.random() < 0.3:
                return tx.fields.pop(field, None)
            tx.fields[field] = self._dice.choice(["x", 5, [1], *LARGE])
            return sorted(map(ascii, tx.fields))
        items = tx.list(self._dice.choice(["messages", "messages", "tool_calls", "large", "new"]))
        place = self._dice.randrange(len(items)) if len(items) else None
        if place is None or what < 0.55:
            return items.insert(self._dice.randint(0, len(items)), self._item())
        if what < 0.7:
            return items.pop(place)
        if what < 0.8:
            items[place] = self._item()
            return None
        if what < 0.9 and type(items[place]) is dict:
            items[place]["seen"] = self._dice.random()
        wanted = self._dice.choice(IDS)
        # A value that is no id finds nothing.
        return items[place], items.find(wanted), items.place_of(wanted)  # type: ignore[arg-type]

    def _load(self) -> Any:
        del self._objects[:-3]
        self._objects.append(self._store.load("s"))

    def _change_and_save(self) -> Any:
        if not self._objects:
            return None
        session = self._dice.choice(self._objects)
        messages = session.data.setdefault("messages", [])
        if type(messages) is list:
            messages.append(self._item())
        if self._dice.random() < 0.5:
            session.data["title"] = self._dice.choice("xyz")
        version = session.save(on_conflict=self._dice.choice(["error", "mine", "theirs"]))
        assert version == session.version
        return session.revision

    def _compact(self) -> Any:
        # The answer is left out, because the worlds differ in whether there was anything to fold.
        self._store.compact("s")

    def _make_anew(self) -> Any:
        if self._dice.random() < 0.8:
            return None
        version = self._store.head("s").version if self._dice.random() < 0.8 else "another one"
        force, is_free = self._dice.random() < 0.5, self._dice.random() < 0.7
        self._store.delete("s", force=force, if_version=self._dice.choice([None, version]))
        if is_free:
            self._store.create("s", self._new_data())
        else:
            with self._store.transaction("s", create=True) as tx:
                tx.data.update(self._new_data())
        return "made anew"

    # --- state ---

    def state(self) -> object:
        """Return all that a session says of itself, except times and what is drawn by chance elsewhere."""
        shown = [self._shown(store) for store in self._stores]
        assert all(each == shown[0] for each in shown)
        return shown[0]

    def _shown(self, store: persist.Store) -> object:
        session, head = store.load("s"), store.head("s")
        found = store._backend.engine.read("s")
        assert found.content == encoded(session.data), "the replayed content is that of the data"
        assert head.fields == {name: value for name, value in session.data.items() if name not in found.content.apart}
        assert list(head.fields) == list(found.content.fields)
        assert head.counts == {name: len(value) for name, value in session.data.items() if type(value) is list}
        assert (head.version, head.revision, head.updated_at) == (
            *(session.version, session.revision, session.updated_at),
        )
        for name, value in session.data.items():
            if type(value) is list:
                count = len(value) if len(value) < 100 else 7
                assert store.tail("s", field=name, limit=count) == value[len(value) - count :]
        header = found.header
        owner = header.owner and [header.owner[name] for name in ("stream_id", "prompt_id", "answer_id", "cancelled")]
        streams = [(info.stream_id, info.is_live, info.is_cancelled) for info in store.streams()]
        fields = [
            (name, value if name != "pending_started_at" else value is None) for name, value in session.data.items()
        ]
        # The order in which the stream fields came does not matter.
        stream_fields = sorted(pair for pair in fields if pair[0] in IDLE and pair[0] != "pending_attachments")
        # Top-level keys have no order, because a replay finds the values that stand apart in another order than their
        # writer.
        plain = sorted((pair for pair in fields if pair[0] not in IDLE), key=lambda pair: pair[0])
        attachments = session.data.get("pending_attachments")
        return plain, stream_fields, attachments, session.revision, head.counts, header.epoch, owner, streams
