"""What a turn of the model does to a session's data.

Pure functions: they change the data that they are given, in place.

A turn in `messages`: the prompt, then what the stream appends, then its one partial answer, which each checkpoint
replaces and the finish completes. Nothing here removes a prompt.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any

from persist.errors import IdTaken, ReservedField, WrongType
from persist.merge import same

Data = dict[str, Any]
Message = dict[str, Any]
MessageId = str | int

ACTIVE = "active_stream_id"
#: The fields of a document that belong to the stream verbs, with their values while no stream is active.
IDLE: Data = {
    ACTIVE: None,
    "pending_user_message": None,
    "pending_attachments": [],
    "pending_started_at": None,
}
MESSAGES = "messages"
INTERRUPTED = "interrupted"


class Unread(Exception):
    """What is asked of a list that has not been read takes reading it."""


class Items(ABC):
    """A list of the document that has not been read, in the place of the list. What it cannot tell raises `Unread`."""

    @abstractmethod
    def find(self, message_id: MessageId) -> int | None:
        """The place of the last item of this id; None if there is none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def insert(self, place: int, item: Any) -> None:
        """As that of a list."""

    @abstractmethod
    def mark(self, place: int, field: str, value: Any) -> None:
        """Set a field of the item at a place."""

    @abstractmethod
    def __setitem__(self, place: int, item: Any) -> None: ...

    @abstractmethod
    def __getitem__(self, place: int) -> Any: ...

    @abstractmethod
    def __delitem__(self, place: int) -> None: ...

    def append(self, item: Any) -> None:
        """As that of a list."""
        self.insert(len(self), item)


Messages = list[Any] | Items


def stream_fields(data: Data) -> Data:
    """A copy of what belongs to the stream verbs."""
    return deepcopy({field: data[field] for field in IDLE if field in data})


def refuse_changed_stream_fields(before: Data, after: Data) -> None:
    """Raise `ReservedField` if an edit touched what belongs to the stream verbs."""
    for field, idle in IDLE.items():
        if not same(before.get(field, idle), after.get(field, idle)):
            verb = "Use store.start_stream(), store.cancel() or session.clear_stale_stream()."
            raise ReservedField(field=field, remedy=verb)


def with_stream_fields_of(theirs: Data, data: Data) -> Data:
    """The same data, but with the stream fields as they are, or are missing, in `theirs`."""
    kept = {
        key: theirs.get(key) if key in IDLE else value
        for key, value in data.items()
        if key not in IDLE or key in theirs
    }
    return kept | {key: theirs[key] for key in IDLE if key in theirs}


def without_turn(data: Data, answer_id: MessageId | None) -> Data:
    """The data of a copy: no stream fields, and no partial answer of a stream that runs on the original."""
    kept = {key: value for key, value in data.items() if key not in IDLE}
    if answer_id is not None:
        kept[MESSAGES] = [message for message in kept.get(MESSAGES, []) if not has_id(message, answer_id)]
    return kept


def messages_of(data: Data, field: str = MESSAGES) -> Messages:
    """The list under `field`, made if it is missing."""
    messages = data.setdefault(field, [])
    if not _is_list(messages):
        raise WrongType(what=f"field {field!r} of the document", expected="a list", got=type(messages).__name__)
    return messages  # type: ignore[no-any-return]


def _is_list(value: Any) -> bool:
    return type(value) is list or isinstance(value, Items)


def append_once(messages: Messages, item: Any, *, before: int | None = None, field: str = MESSAGES) -> None:
    """Add an item unless one of its id is there; the same id with other content is `IdTaken`."""
    place = find(messages, item.get("id")) if type(item) is dict else None
    if place is None:
        messages.insert(len(messages) if before is None else before, item)
    else:
        _require_same(messages[place], item, (field, place))


def _require_same(there: Message, item: Message, path: tuple[str | int, ...]) -> None:
    if not same(there, item):
        raise IdTaken(path=path, reason="its id is taken by other content", base=None, mine=item, theirs=there)


def has_id(message: Any, message_id: object) -> bool:
    """Tell whether a message has this id; `1` and `"1"` are two ids."""
    return type(message) is dict and "id" in message and same(message["id"], message_id)


def find(messages: Messages, message_id: MessageId | None) -> int | None:
    """The place of the message with this id, looked for from the end."""
    if message_id is None:
        return None
    if isinstance(messages, Items):
        return messages.find(message_id)
    return next((i for i in range(len(messages) - 1, -1, -1) if has_id(messages[i], message_id)), None)


def with_id(message: Message, default: str) -> Message:
    """The message, with `default` as its id, in first place, if it has none."""
    if message.get("id") is not None:
        return message
    return {"id": default} | {key: value for key, value in message.items() if key != "id"}


def put_prompt(messages: Messages, prompt: Message) -> None:
    """Add the prompt of a turn, or take up again the one that an interrupted turn has left."""
    place = find(messages, prompt["id"])
    if place is None:
        messages.append(prompt)
        return
    there = messages[place]
    ignored = {INTERRUPTED: prompt.get(INTERRUPTED, False)}
    _require_same({**there, **ignored}, {**prompt, **ignored}, (MESSAGES, place))
    there.pop(INTERRUPTED, None)


def put_answer(messages: Messages, answer: Message, current_id: MessageId | None) -> None:
    """Put the answer where the turn's partial stands, or at the end; there is never a second one.

    An answer whose id an interrupted turn has left takes that one's place, as a prompt does.
    """
    place = find(messages, current_id)
    twin = find(messages, answer["id"])
    if twin is not None and twin != place:
        if not messages[twin].get(INTERRUPTED) or messages[twin].get("role") != answer.get("role"):
            # An interrupted answer may be given anew; a prompt is never written over.
            _require_same(messages[twin], answer, (MESSAGES, twin))
        messages[twin] = answer
        if place is not None:
            del messages[place]
    elif place is None:
        messages.append(answer)
    else:
        messages[place] = answer


def begin(data: Data, stream_id: str, prompt: Message | None) -> None:
    """Put the prompt into `messages`, and mirror it in the stream fields."""
    end(data)
    data[ACTIVE] = stream_id
    data["pending_started_at"] = time.time()
    if prompt is not None:
        put_prompt(messages_of(data), prompt)
        data["pending_user_message"] = prompt.get("content")
        data["pending_attachments"] = prompt.get("attachments", [])


def end(data: Data) -> None:
    """Reset the stream fields."""
    data.update({field: list(idle) if type(idle) is list else idle for field, idle in IDLE.items()})


def interrupt(data: Data, prompt_id: MessageId | None, answer_id: MessageId | None) -> None:
    """End a turn that has no answer: prompt and partial stay, marked once.

    A turn can be ended whatever somebody has made of `messages`: what is no list has nothing to mark.
    """
    messages = data.get(MESSAGES)
    if messages is not None and _is_list(messages):
        for message_id in (prompt_id, answer_id):
            place = find(messages, message_id)
            if place is not None:
                _mark(messages, place)
    end(data)


def _mark(messages: Messages, place: int) -> None:
    if isinstance(messages, Items):
        messages.mark(place, INTERRUPTED, True)
    else:
        messages[place][INTERRUPTED] = True


def interrupt_foreign(data: Data) -> None:
    """End a turn that another program started, of which only the stream fields tell."""
    if data.get("pending_user_message") and _is_list(data.get(MESSAGES, [])):
        _recover_foreign_prompt(data, messages_of(data))
    end(data)


def _recover_foreign_prompt(data: Data, messages: Messages) -> None:
    """Keep the prompt of a turn that another program started: `pending_user_message` may be its only copy (#1471)."""
    content = data["pending_user_message"]
    told = {"attachments": data["pending_attachments"]} if data.get("pending_attachments") else {}
    last = messages[-1] if len(messages) else None
    if type(last) is dict and last.get("role") == "user" and same(last.get("content"), content):
        last[INTERRUPTED] = True
        last.update({name: value for name, value in told.items() if name not in last})
    else:
        messages.append(
            {"id": f"{data.get(ACTIVE)}.prompt", "role": "user", "content": content, INTERRUPTED: True, **told}
        )
