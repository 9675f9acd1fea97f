"""Turns: what a turn of the model changes. Pure functions: they change the working copy that they are given.

A turn in `messages`: the prompt, then what the stream appends, then its one partial answer, which each checkpoint
replaces and the finish completes. Nothing here removes a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from persist.errors import IdTaken
from persist.json_codec import same
from persist.working_copy import WorkingCopy, WorkingList

Message = dict[str, Any]
MessageId = str | int

ACTIVE = "active_stream_id"
#: The fields of a document that belong to the stream verbs, with their values while no stream is active.
IDLE: dict[str, Any] = {
    ACTIVE: None,
    "pending_user_message": None,
    "pending_attachments": [],
    "pending_started_at": None,
}
MESSAGES = "messages"
INTERRUPTED = "interrupted"


def active_stream(fields: Mapping[str, Any]) -> Any:
    """Return the stream that a document names, or None. Another program may have written anything there."""
    return fields.get(ACTIVE) or None


def leave_out(document: WorkingCopy, answer_id: MessageId | None) -> None:
    """Take a running turn out of a copy: the stream fields, and the partial answer of the original's stream."""
    for field in IDLE:
        document.fields.pop(field, None)
    if answer_id is not None and document.has_list(MESSAGES):
        messages = document.list(MESSAGES)
        while (place := messages.find(answer_id)) is not None:
            del messages[place]


def append_once(messages: WorkingList, item: Any, *, before: int | None = None, field: str = MESSAGES) -> None:
    """Add an item unless one of its id is there. The same id with other content is `IdTaken`."""
    place = messages.find(item.get("id")) if type(item) is dict else None
    if place is None:
        messages.insert(len(messages) if before is None else before, item)
    else:
        _require_same(messages[place], item, (field, place))


def _require_same(there: Message, item: Message, path: tuple[str | int, ...]) -> None:
    if not same(there, item):
        raise IdTaken(path=path, reason="its id is taken by other content", base=None, mine=item, theirs=there)


def with_id(message: Message, default: str) -> Message:
    """Return the message, with `default` as its id, in first place, if it has none."""
    if message.get("id") is not None:
        return message
    return {"id": default} | {key: value for key, value in message.items() if key != "id"}


def put_prompt(messages: WorkingList, prompt: Message) -> None:
    """Add the prompt of a turn, or take up again the one that an interrupted turn has left."""
    place = messages.find(prompt["id"])
    if place is None:
        messages.append(prompt)
        return
    there = messages[place]
    ignored = {INTERRUPTED: prompt.get(INTERRUPTED, False)}
    _require_same({**there, **ignored}, {**prompt, **ignored}, (MESSAGES, place))
    there.pop(INTERRUPTED, None)


def put_answer(messages: WorkingList, answer: Message, current_id: MessageId | None) -> MessageId | None:
    """Put the answer where the turn's partial stands, or at the end. There is never a second one.

    An answer whose id an interrupted turn has left takes that one's place, as a prompt does. A finished turn's answer
    stays that turn's.

    Returns:
        The id of the turn's own answer, None if an earlier turn has given it.
    """
    place = messages.find(current_id)
    twin = messages.find(answer["id"])
    if twin is not None and twin != place:
        there = messages[twin]
        if not there.get(INTERRUPTED) or there.get("role") != answer.get("role"):
            # An interrupted answer may be given anew. A prompt is never written over.
            _require_same(there, answer, (MESSAGES, twin))
        is_own = bool(there.get(INTERRUPTED))
        messages[twin] = answer
        if place is not None:
            del messages[place]
        return answer["id"] if is_own else None
    if place is None:
        messages.append(answer)
    else:
        messages[place] = answer
    return answer["id"]  # type: ignore[no-any-return]


def begin(document: WorkingCopy, stream_id: str, prompt: Message | None) -> None:
    """Put the prompt into `messages`, and mirror it in the stream fields."""
    end(document)
    fields = document.fields
    fields[ACTIVE] = stream_id
    fields["pending_started_at"] = time.time()
    if prompt is not None:
        put_prompt(document.list(MESSAGES), prompt)
        fields["pending_user_message"] = prompt.get("content")
        fields["pending_attachments"] = prompt.get("attachments", [])


def end(document: WorkingCopy) -> None:
    """Reset the stream fields."""
    fields = document.fields
    for field, idle in IDLE.items():
        fields[field] = list(idle) if type(idle) is list else idle


def interrupt(document: WorkingCopy, prompt_id: MessageId | None, answer_id: MessageId | None) -> None:
    """End a turn that has no answer: prompt and partial stay, marked once.

    A turn can be ended whatever somebody has made of `messages`: what is no list has nothing to mark.
    """
    if document.has_list(MESSAGES):
        messages = document.list(MESSAGES)
        for message_id in (prompt_id, answer_id):
            place = messages.find(message_id)
            if place is not None:
                messages[place][INTERRUPTED] = True
    end(document)


def interrupt_foreign(document: WorkingCopy) -> None:
    """End a turn that another program started, of which only the stream fields tell."""
    fields = document.fields
    content = fields.get("pending_user_message")
    if content and document.has_list(MESSAGES):
        # It may be the prompt's only copy (hermes-webui #1471).
        told = {INTERRUPTED: True}
        if fields.get("pending_attachments"):
            told["attachments"] = fields["pending_attachments"]
        messages = document.list(MESSAGES)
        last = messages[-1] if messages else None
        if type(last) is dict and last.get("role") == "user" and same(last.get("content"), content):
            last.update({**told, **last, INTERRUPTED: True})
        else:
            prompt_id = f"{fields.get(ACTIVE)}.prompt"
            named = {"id": prompt_id} if messages.find(prompt_id) is None else {}
            messages.append({**named, "role": "user", "content": content, **told})
    end(document)
