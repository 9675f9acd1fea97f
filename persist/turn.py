"""Turns: the changes that a turn of the model makes. The functions change only the working copy that they are given.

A turn in `messages` is the prompt, then the messages that the stream appends, then its one partial answer. Each
checkpoint replaces the partial answer, and the finish completes it. Nothing here removes a prompt.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from persist import json_codec
from persist.errors import id_taken
from persist.json_codec import same
from persist.storage.content import Content, Id, Items
from persist.working_copy import WorkingCopy, WorkingList

Message = dict[str, Any]
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
#: The key by which an answer names its prompt, if its turn was started with `once`.
ANSWERS = "answers"


def active_stream(fields: Mapping[str, Any]) -> Any:
    """Return the stream that a document names, or None. Another program may have written anything there."""
    return fields.get(ACTIVE) or None


def leave_out(document: WorkingCopy, answer_id: Id | None) -> None:
    """Take a running turn out of a copy: the stream fields, and the partial answer of the original's stream."""
    for field in IDLE:
        document.fields.pop(field, None)
    if answer_id is not None and document.has_list(MESSAGES):
        messages = document.list(MESSAGES)
        while (place := messages.place_of(answer_id)) is not None:
            del messages[place]


def add_once(
    messages: WorkingList,
    lines: Sequence[bytes],
    ids: Sequence[Id | None],
    *,
    key: str | None = "id",
    before: int | None = None,
    field: str = MESSAGES,
) -> None:
    """Add encoded items to a list, except those that it has already.

    An item with the same `key` and other content is a `MergeConflict`.

    Args:
        ids: the value of the `key` of each item.
        before: the place of the item before which they go. None adds them at the end.
    """
    fresh: list[bytes] = []
    own: dict[Id, int] = {}
    for line, identity in zip(lines, ids, strict=True):
        if identity is None or key is None:
            fresh.append(line)
        elif identity in own:
            at = own[identity]
            _require_same(json_codec.decode(fresh[at]), json_codec.decode(line), (field, len(messages) + at), key)
        elif (place := messages.place_of(identity, key)) is not None:
            _require_same(messages.peek(place), json_codec.decode(line), (field, place), key)
        else:
            own[identity] = len(fresh)
            fresh.append(line)
    if fresh:
        messages.put_json(before, fresh)


def _require_same(there: Message, item: Message, path: tuple[str | int, ...], key: str = "id") -> None:
    if not same(there, item):
        raise id_taken(path, key=key, mine=item, theirs=there)


def with_id(message: Message, default: str) -> Message:
    """Return the message, with `default` as its id, in first place, if it has none."""
    if message.get("id") is not None:
        return message
    return {"id": default} | {key: value for key, value in message.items() if key != "id"}


def put_prompt(messages: WorkingList, prompt: Message) -> None:
    """Add the prompt of a turn, or take up again the one that an interrupted turn has left."""
    place = messages.place_of(prompt["id"])
    if place is None:
        messages.append(prompt)
        return
    there = messages[place]
    _require_same_prompt(there, prompt, place)
    for key in (INTERRUPTED, ANSWERS):
        there.pop(key, None)


def put_answer(messages: WorkingList, answer: Message, current_id: Id | None) -> Id | None:
    """Put the answer in the place of the turn's partial, or at the end. There is never a second one.

    If an interrupted turn has left an answer of the same id, the answer takes its place, as a prompt does. The answer
    of a finished turn stays that turn's.

    Returns:
        The id of the turn's own answer, or None if an earlier turn has given it.
    """
    place = messages.place_of(current_id)
    twin = messages.place_of(answer["id"])
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


def has(content: Content, message_id: Id | None) -> bool:
    """Tell whether a content has a message of that id."""
    messages = content.apart.get(MESSAGES)
    return isinstance(messages, Items) and message_id is not None and messages.find(message_id) is not None


def has_twin(content: Content, message_id: Id | None) -> bool:
    """Tell whether a content has more than one message of that id."""
    messages = content.apart.get(MESSAGES)
    return isinstance(messages, Items) and message_id is not None and messages.is_repeated(message_id)


def is_last(messages: WorkingList, answer_id: Id | None) -> bool:
    """Tell whether a turn's partial answer is the last message."""
    return answer_id is not None and messages.place_of(answer_id) == len(messages) - 1


def put_last(messages: WorkingList, answer_id: Id | None) -> None:
    """Put a turn's partial answer behind the messages that were added since."""
    place = messages.place_of(answer_id)
    if place is not None and place < len(messages) - 1:
        messages.append(messages.pop(place))


def answer_to(messages: WorkingList, prompt: Message, partial_id: Id | None = None) -> tuple[bool, Message | None]:
    """Tell whether the turn of a prompt has finished, and return the message that answers it, if there is one.

    The answer of a turn that was started with `once` names its prompt. If a prompt names itself, its turn has finished
    without an answer. Otherwise the answer is the last one before the next prompt. `partial_id` is the id of the
    partial answer of a turn that has not finished. That answer does not count.

    Raises:
        MergeConflict: another message has the prompt's id.
    """
    place = messages.place_of(prompt["id"])
    if place is None:
        return False, None
    there = messages.peek(place)
    _require_same_prompt(there, prompt, place)
    linked = messages.place_of(prompt["id"], ANSWERS)
    if linked is not None:
        return True, None if linked == place else messages.peek(linked)
    rest = itertools.takewhile(lambda message: not _has_role(message, "user"), messages[place + 1 :])
    answers = [each for each in rest if _has_role(each, "assistant") and not each.get(INTERRUPTED)]
    found = [each for each in answers if partial_id is None or not same(each.get("id"), partial_id)]
    return (True, found[-1]) if found and not there.get(INTERRUPTED) else (False, None)


def _require_same_prompt(there: Message, prompt: Message, place: int) -> None:
    ignored = {INTERRUPTED: prompt.get(INTERRUPTED, False), ANSWERS: prompt.get(ANSWERS)}
    _require_same({**there, **ignored}, {**prompt, **ignored}, (MESSAGES, place))


def mark_answer(messages: WorkingList, answer_id: Id | None, prompt_id: Id | None) -> None:
    """Name the prompt in a turn's answer. Name it in the prompt itself if the turn has finished without an answer."""
    place = next((at for each in (answer_id, prompt_id) if (at := messages.place_of(each)) is not None), None)
    if place is not None:
        messages[place][ANSWERS] = prompt_id


def _has_role(message: Any, role: str) -> bool:
    return type(message) is dict and message.get("role") == role


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
    document.set_fields({field: list(idle) if type(idle) is list else idle for field, idle in IDLE.items()})


def interrupt(document: WorkingCopy, prompt_id: Id | None, answer_id: Id | None) -> None:
    """End a turn that has no answer. Prompt and partial stay, marked once.

    A turn can be ended even if somebody has made another value of `messages`. A value that is no list has nothing to
    mark.
    """
    if document.has_list(MESSAGES):
        messages = document.list(MESSAGES)
        for message_id in (prompt_id, answer_id):
            place = messages.place_of(message_id)
            if place is not None:
                messages[place][INTERRUPTED] = True
    end(document)


def interrupt_foreign(document: WorkingCopy) -> None:
    """End a turn that another program started. Only the stream fields tell of such a turn.

    The prompt in these fields may be its only copy (hermes-webui #1471). It is not added again if it is among the
    messages already, since the last answer or in the turn that the last answer ended.
    """
    fields = document.fields
    content = fields.get("pending_user_message")
    if content and document.has_list(MESSAGES):
        messages = document.list(MESSAGES)
        told = {INTERRUPTED: True}
        if fields.get("pending_attachments"):
            told["attachments"] = fields["pending_attachments"]
        place, is_answered = _find_pending(messages, content)
        if place is None:
            prompt_id = f"{fields.get(ACTIVE)}.prompt"
            is_known = not fields.get(ACTIVE) or messages.place_of(prompt_id) is not None
            named = {} if is_known else {"id": prompt_id}
            messages.append({**named, "role": "user", "content": content, **told})
        elif not is_answered:
            prompt = messages[place]
            prompt.update({**told, **prompt, INTERRUPTED: True})
    end(document)


def _find_pending(messages: WorkingList, content: Any) -> tuple[int | None, bool]:
    """Return the place of a pending prompt, and whether the last answer stands behind it."""
    is_answered, has_ended = False, False
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if _has_role(message, "user"):
            if same(message.get("content"), content):
                return place, is_answered
            has_ended = is_answered
        elif has_ended:
            break
        elif _has_role(message, "assistant"):
            is_answered = True
    return None, False
