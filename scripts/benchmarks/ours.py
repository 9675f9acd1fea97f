"""persist among its peers: `append`, and the other verbs that commit."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import persist
from benchmarks.peers import Peer
from benchmarks.workload import SESSION, Message, new_message, open_store
from persist.storage.commit import Mode

APPEND = "persist: store.append()"
ALWAYS = 'persist: store.append(), journal="always"'
SAVE = "persist: session.save() after one appended message"
FIELD = "persist: store.transaction() of one small field"
TURN = "persist: store.transaction() of two messages and a field"
CLEAR = "persist: session.clear_stale_stream()"

PROMPT = {"role": "user", "content": "Why?"}


class Append(Peer):
    name = APPEND
    way = 'append, journal="auto": up to 64 KiB the file is replaced, above it is journaled'
    journal: ClassVar[Mode] = "auto"

    def prepare(self, data: dict[str, Any]) -> None:
        self._store = open_store(self.directory, self.journal)
        self._store.create(SESSION, data)

    def append(self, message: Message) -> None:
        self._store.append(SESSION, "messages", message)

    def load(self) -> persist.Session:
        return self._store.load(SESSION)

    def head(self) -> persist.Head:
        return self._store.head(SESSION)


class AppendAlways(Append):
    name = ALWAYS
    way = 'append, journal="always": every session is journaled'
    journal = "always"
    most = (10, 10)
    too_slow = 'above 64 KiB it is the same as "auto"'


class Verb(Append):
    """Another verb than `append`. The large sizes are for the full run."""

    most = (100_000, 10_000)
    too_slow = "the full run measures it"


class StreamAppend(Verb):
    name = "persist: stream.append()"
    way = "a fenced append to the running turn"

    def prepare(self, data: dict[str, Any]) -> None:
        super().prepare(data)
        self._stream = self._store.start_stream(SESSION, PROMPT)

    def append(self, message: Message) -> None:
        self._stream.append(message)

    def close(self) -> None:
        self._stream.fail()


class StreamCheckpoint(StreamAppend):
    name = "persist: stream.checkpoint()"
    way = "the partial answer is replaced by a message of 430 bytes"

    def append(self, message: Message) -> None:
        self._stream.checkpoint({"role": "assistant", "content": message["content"]})


class StreamFinish(Verb):
    name = "persist: stream.finish()"
    way = "the answer and the end of the turn; its start is not timed"

    def before(self) -> None:
        self._stream = self._store.start_stream(SESSION, PROMPT)

    def append(self, message: Message) -> None:
        self._stream.finish({"role": "assistant", "content": message["content"]})


class Save(Verb):
    name = SAVE
    way = 'session.data["messages"].append(…), save(); the session stays loaded'

    def prepare(self, data: dict[str, Any]) -> None:
        super().prepare(data)
        self._session = self._store.load(SESSION)

    def append(self, message: Message) -> None:
        self._session.data["messages"].append(message)
        self._session.save()


class SaveMeetingAnother(Save):
    name = "persist: session.save() that meets a commit"
    way = "as that, after somebody else has appended; both are kept"

    def before(self) -> None:
        self._store.append(SESSION, "messages", new_message())


class ChangeField(Verb):
    name = FIELD
    way = 'tx.fields["draft"] = …'

    def append(self, message: Message) -> None:
        with self._store.transaction(SESSION) as tx:
            tx.fields["draft"] = message["id"]


class AppendTurn(Verb):
    name = TURN
    way = "prompt, answer and a count of both in one commit"

    def append(self, message: Message) -> None:
        with self._store.transaction(SESSION) as tx:
            tx.list("messages").extend([message, {**message, "id": f"{message['id']}.answer", "role": "assistant"}])
            tx.fields["count"] = len(tx.list("messages"))


class ClearStale(Verb):
    name = CLEAR
    way = "the stream of a dead owner is cleared; its start and the load are not timed"

    def before(self) -> None:
        stream = self._store.start_stream(SESSION, PROMPT)
        self._session = self._store.load(SESSION)
        with warnings.catch_warnings():
            # A stream that is dropped gives its lease up and changes nothing else, as if its process had died.
            warnings.simplefilter("ignore", ResourceWarning)
            del stream

    def append(self, message: Message) -> None:
        if not self._session.clear_stale_stream():
            raise AssertionError("The stream was not stale.")


APPENDS: tuple[type[Peer], ...] = (Append, AppendAlways)
VERBS: tuple[type[Peer], ...] = (
    StreamAppend,
    StreamCheckpoint,
    StreamFinish,
    Save,
    SaveMeetingAnother,
    ChangeField,
    AppendTurn,
    ClearStale,
)
