"""Verdict: a store after a replay, compared with the transcripts and with the acknowledgements."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from persist.errors import PersistError
from persist.files import FileEngine
from persist.json_codec import same
from persist.storage import layout
from persist.store import Store
from persist.turn import IDLE, INTERRUPTED, Message
from replaying.conversations import TITLES, Conversation, Turn
from replaying.ledger import Ledger

Kind = Literal["lost", "doubled", "changed", "disordered", "stray", "stuck", "damaged"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: its kind, its session, and what it is."""

    kind: Kind
    session_id: str
    what: str


def compare(store: Store, played: list[Conversation], ledger: Ledger) -> list[Finding]:
    """Name every difference between the store and the conversations that were played into it.

    An empty list is the proof. It means that every message is there exactly once, in order and unchanged (interrupted
    partials are set aside). Everything that was acknowledged is there. No stream, lease or temporary file is left, and
    `Store.check` finds nothing but tool calls.
    """
    findings = [finding for conversation in played for finding in _compare_session(store, conversation, ledger)]
    if is_of_files(store):
        # Tool calls and results are as the transcript has them.
        problems = [problem for problem in store.check() if not problem.kind.endswith("-tools")]
        findings += [Finding("damaged", problem.session_id, problem.message) for problem in problems]
        left = [(name.partition(".")[0], name) for name in sorted(os.listdir(store.path / layout.LEASES))]
    else:
        left = store._backend.engine.leases()
    findings += [Finding("stuck", session_id, f"the lease {name} is left over") for session_id, name in left]
    return findings


def is_of_files(store: Store) -> bool:
    """Tell whether a store is a directory."""
    return isinstance(store._backend.engine, FileEngine)


def _compare_session(store: Store, conversation: Conversation, ledger: Ledger) -> Iterator[Finding]:
    session_id = conversation.session_id
    try:
        data = store.load(session_id).data
    except PersistError as error:
        yield Finding("lost", session_id, f"the whole session: {error}")
        return
    found = [message for message in data["messages"] if not _is_interrupted_partial(message)]
    for kind, what in (
        *_compare_messages(conversation, found, ledger),
        *_compare_looks(conversation, ledger),
        *_compare_titles(conversation, data, ledger),
        *_compare_stream_fields(data),
    ):
        yield Finding(kind, session_id, what)


def _is_interrupted_partial(message: Message) -> bool:
    return message.get(INTERRUPTED) is True and str(message.get("id")).endswith(".answer")


def _compare_messages(conversation: Conversation, found: list[Message], ledger: Ledger) -> Iterator[tuple[Kind, str]]:
    count = Counter(message.get("id") for message in found)
    there = {message.get("id"): message for message in found}
    wanted = {message["id"]: message for message in conversation.messages}
    for message_id, message in wanted.items():
        if count[message_id] == 0:
            was_told = (conversation.session_id, message_id) in ledger.messages
            yield "lost", f"message {message_id}" + (", which was acknowledged" if was_told else "")
        elif count[message_id] > 1:
            yield "doubled", f"message {message_id} stands there {count[message_id]} times"
        elif not same(there[message_id], message):
            yield "changed", f"message {message_id} is not as it was sent"
    for message_id in count.keys() - wanted.keys():
        yield "stray", f"message {message_id} was never sent"
    places = {message_id: i for i, message_id in enumerate(wanted)}
    order = [places[message["id"]] for message in found if message.get("id") in places]
    if order != sorted(order):
        yield "disordered", "the messages are not in the order of the transcript"


def _compare_looks(conversation: Conversation, ledger: Ledger) -> Iterator[tuple[Kind, str]]:
    """Name each message that was missing in a revision after it had been acknowledged, even if it is there again."""
    looks = ledger.seen.get(conversation.session_id, [])
    for i, message in enumerate(conversation.messages):
        since = ledger.messages.get((conversation.session_id, message["id"]))
        missing = [revision for revision, count in looks if since is not None and revision >= since and count <= i]
        if missing:
            yield "lost", f"message {message['id']}, acknowledged at revision {since}, was missing at {min(missing)}"


def _compare_titles(conversation: Conversation, data: dict[str, Any], ledger: Ledger) -> Iterator[tuple[Kind, str]]:
    titles = data.get(TITLES, {})
    for turn in conversation.turns:
        if _place(conversation, turn) in ledger.titles and titles.get(turn.key) != conversation.title_after(turn):
            yield "lost", f"the title of {turn.key}, which was acknowledged"
    if data.get("title") not in _possible_titles(conversation, ledger):
        yield "lost", "the title of the session is not the one that was saved last"


def _possible_titles(conversation: Conversation, ledger: Ledger) -> set[str]:
    """Return the title that was acknowledged last, and those that a worker may have saved just before it was killed."""
    acknowledged = [turn for turn in conversation.turns if _place(conversation, turn) in ledger.titles]
    last = max(acknowledged, key=lambda turn: ledger.titles[_place(conversation, turn)], default=None)
    unsure = {
        conversation.title_after(turn) for turn in conversation.turns if _place(conversation, turn) in ledger.unsure
    }
    return unsure | {conversation.title if last is None else conversation.title_after(last)}


def _place(conversation: Conversation, turn: Turn) -> tuple[str, str]:
    return conversation.session_id, turn.prompt["id"]


def _compare_stream_fields(data: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    for field, idle in IDLE.items():
        if not same(data.get(field, idle), idle):
            yield "stuck", f"{field} is still set"
