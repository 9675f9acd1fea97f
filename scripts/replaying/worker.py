"""Worker: a server process that plays turns into the store until no conversation has an open one.

    python -m replaying.worker STORE CONVERSATIONS SEED

The worker is killed at any instant. It keeps nothing in memory that matters, because it decides from the documents
alone what comes next. Several workers meet on a session. One of them gets the stream, and the others get `SessionBusy`.
While a turn runs, a thread of the same worker sets the title. It uses a `Session` that was loaded before the turn, as
chat servers do in the background (hermes-webui #3987).

Imports stay light, because a replacement must be there in an instant.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from persist import json_codec
from persist.errors import MergeConflict, SessionBusy, SessionExists
from persist.session import Session
from persist.store import Store
from persist.streams import Stream
from persist.turn import Message
from replaying.conversations import TITLES, Conversation, Turn
from replaying.reports import Report

Result = TypeVar("Result")

WORDS_PER_CHECKPOINT = 12
# Workers choose among this many unfinished sessions, the first ones. They are few, so that workers meet often.
SESSIONS_IN_PLAY = 8
LOCK_TIMEOUT_S = 30.0
# How long a killed worker counts as alive, where the kernel cannot tell.
LEASE_S = 2.0
_LONGEST_BACKOFF_S = 0.02


def play(store: Store, conversations: list[Conversation], rng: random.Random) -> None:
    """Play open turns, in a random order of sessions, until every conversation is complete."""
    unfinished = list(conversations)
    while unfinished:
        conversation = rng.choice(unfinished[:SESSIONS_IN_PLAY])
        session = _load_or_create(store, conversation)
        Report("seen", session.id, revision=session.revision, count=conversation.count_in(session.data)).send()
        if rng.random() < 0.5:
            _clear_as_a_server_does(session)
        turn = conversation.open_turn(session.data)
        if turn is None:
            unfinished.remove(conversation)
            continue
        try:
            Play(store, session, conversation, turn).run()
        except SessionBusy:
            Report("busy", session.id).send()
            time.sleep(rng.uniform(0, _LONGEST_BACKOFF_S))


def _load_or_create(store: Store, conversation: Conversation) -> Session:
    session_id = conversation.session_id
    if not store.exists(session_id):
        fields = {"title": conversation.title, TITLES: {}, "messages": []}
        # Another worker may be quicker.
        with suppress(SessionExists):
            _timed(store, "create", session_id, None, partial(store.create, session_id, fields))
    session = store.load(session_id)
    for message in conversation.opening[conversation.count_in(session.data) :]:
        _timed(store, "append", session_id, message["id"], partial(store.append, session_id, "messages", message))
        session.refresh()
    return session


def _clear_as_a_server_does(session: Session) -> None:
    """Clear a dead stream of a session, as a server does when it loads the session for a response.

    Otherwise the next start clears it.
    """
    stream_id = session.active_stream_id
    if session.clear_stale_stream():
        Report("cleared", session.id, stream_id).send()


def _timed(
    store: Store,
    verb: str,
    session_id: str,
    item: str | None,
    commit: Callable[[], Result],
    stream_id: str | None = None,
) -> Result:
    started = time.perf_counter()
    result = commit()
    took_s = time.perf_counter() - started
    # It may be a later revision than that of the commit, but never an earlier one.
    revision = 0 if item is None else store.head(session_id).revision
    Report(verb, session_id, item, stream_id, took_s, revision).send()
    return result


class Play:
    """One turn of a conversation, played as a live stream."""

    def __init__(self, store: Store, session: Session, conversation: Conversation, turn: Turn) -> None:
        self._store = store
        self._session = session
        self._conversation = conversation
        self._turn = turn

    def run(self) -> None:
        """Play the turn to its end.

        Raises:
            SessionBusy: another worker plays this session just now.
        """
        started = time.perf_counter()
        with self._store.start_stream(self._session.id, self._turn.prompt) as stream:
            took_s = time.perf_counter() - started
            revision = self._store.head(self._session.id).revision
            Report("start", self._session.id, self._turn.prompt["id"], stream.id, took_s, revision).send()
            if self._session.active_stream_id is not None:
                Report("taken-over", self._session.id, self._session.active_stream_id).send()
            title = TitleThread(self._store, self._session, self._turn, self._conversation.title_after(self._turn))
            title.start()
            self._stream_replies(stream)
        title.join_or_raise()

    def _stream_replies(self, stream: Stream) -> None:
        for message in self._turn.steps:
            self._commit(stream, "append", message["id"], partial(stream.append, message))
        answer = self._turn.answer
        if answer is not None and not self._type_out(stream, answer):
            return
        self._commit(stream, "finish", None if answer is None else answer["id"], partial(stream.finish, answer))

    def _type_out(self, stream: Stream, answer: Message) -> bool:
        """Checkpoint the answer as it grows. Return False if somebody has cancelled the stream."""
        content = answer.get("content")
        words = re.findall(r"\s*\S+", content) if isinstance(content, str) else []
        for count in range(WORDS_PER_CHECKPOINT, len(words), WORDS_PER_CHECKPOINT):
            if stream.is_cancelled():
                return False
            so_far = {"role": "assistant", "content": "".join(words[:count])}
            self._commit(stream, "checkpoint", None, partial(stream.checkpoint, so_far))
        return True

    def _commit(self, stream: Stream, verb: str, item: str | None, commit: Callable[[], None]) -> None:
        _timed(self._store, verb, self._session.id, item, commit, stream.id)


class TitleThread(threading.Thread):
    """A thread that sets the title in the middle of a turn, through an object that was loaded before the turn."""

    def __init__(self, store: Store, session: Session, turn: Turn, title: str) -> None:
        super().__init__(name=f"title of {session.id}", daemon=True)
        self._store = store
        self._session = session
        self._turn = turn
        self._title = title
        self._error: BaseException | None = None

    def run(self) -> None:
        """Save until the title is there. An error is kept for `join_or_raise`."""
        try:
            while not self._try_to_save():
                self._session = self._store.load(self._session.id)
        except BaseException as error:  # `join_or_raise` raises it
            self._error = error

    def _try_to_save(self) -> bool:
        session, seen = self._session, self._session.revision
        session.data["title"] = self._title
        session.data[TITLES][self._turn.key] = self._title
        started = time.perf_counter()
        try:
            session.save()
        except MergeConflict:
            Report("conflict", session.id).send()
            return False
        took_s = time.perf_counter() - started
        if session.data["title"] != self._title:
            # The object had this title already, so the save was no edit, and a later turn's title is there. The next
            # save is an edit.
            return False
        has_merged = session.revision > seen + 1
        Report(
            "title", session.id, self._turn.prompt["id"], None, took_s, session.revision, has_merged=has_merged
        ).send()
        return True

    def join_or_raise(self) -> None:
        """Wait for the title. Raise an error of the thread here."""
        self.join()
        if self._error is not None:
            raise self._error


def main(place: str, conversations: str, seed: str) -> None:
    """Play, with the arguments of the command line."""
    listed = json_codec.decode(Path(conversations).read_bytes())
    play(
        Store(place, timeout_s=LOCK_TIMEOUT_S, lease_s=LEASE_S),
        [Conversation(session_id, title, tuple(messages)) for session_id, title, messages in listed],
        random.Random(seed),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
