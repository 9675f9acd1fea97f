"""What a turn of the model does to a session's data. Pure functions: they change the document they are given, in place.

A turn in `messages`: the prompt, then what the stream appends, then its one partial answer, which each checkpoint
replaces and the finish completes. Nothing here removes a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

from persist.errors import IdTaken, ReservedField
from persist.json_codec import same

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


class Messages(Protocol):
    """A list of a document, to be changed in place."""

    def find(self, message_id: object) -> int | None:
        """Return the place of the last item with this id, or None."""

    def insert(self, place: int, item: Any) -> None:
        """As that of a list."""

    def append(self, item: Any) -> None:
        """As that of a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int) -> Any: ...
    def __setitem__(self, place: int, item: Any) -> None: ...
    def __delitem__(self, place: int) -> None: ...


class Document(Protocol):
    """A document, to be changed in place. A `WorkingCopy` is one."""

    @property
    def fields(self) -> MutableMapping[str, Any]:
        """Its top-level values but the lists."""

    def list(self, name: str) -> Messages:
        """Return a list."""

    def has_list(self, name: str) -> bool:
        """Tell whether a value is a list, or missing."""


def active_stream(fields: Mapping[str, Any]) -> Any:
    """Return the stream that a document names, or None. Another program may have written anything there."""
    return fields.get(ACTIVE) or None


def stream_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what belongs to the stream verbs. A field that is missing is idle."""
    return {field: data.get(field, idle) for field, idle in IDLE.items()}


def refuse_changed_stream_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise `ReservedField` if an edit touched what belongs to the stream verbs."""
    for field, idle in IDLE.items():
        if not same(before.get(field, idle), after.get(field, idle)):
            verb = "Use store.start_stream(), store.cancel() or session.clear_stale_stream()."
            raise ReservedField(field=field, remedy=verb)


def leave_out(document: Document, answer_id: MessageId | None) -> None:
    """Take a running turn out of a copy: the stream fields, and the partial answer of the original's stream."""
    for field in IDLE:
        document.fields.pop(field, None)
    if answer_id is not None and document.has_list(MESSAGES):
        messages = document.list(MESSAGES)
        while (place := messages.find(answer_id)) is not None:
            del messages[place]


def append_once(messages: Messages, item: Any, *, before: int | None = None, field: str = MESSAGES) -> None:
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


def put_prompt(messages: Messages, prompt: Message) -> None:
    """Add the prompt of a turn, or take up again the one that an interrupted turn has left."""
    place = messages.find(prompt["id"])
    if place is None:
        messages.append(prompt)
        return
    there = messages[place]
    ignored = {INTERRUPTED: prompt.get(INTERRUPTED, False)}
    _require_same({**there, **ignored}, {**prompt, **ignored}, (MESSAGES, place))
    there.pop(INTERRUPTED, None)


def put_answer(messages: Messages, answer: Message, current_id: MessageId | None) -> None:
    """Put the answer where the turn's partial stands, or at the end. There is never a second one.

    An answer whose id an interrupted turn has left takes that one's place, as a prompt does.
    """
    place = messages.find(current_id)
    twin = messages.find(answer["id"])
    if twin is not None and twin != place:
        there = messages[twin]
        if not there.get(INTERRUPTED) or there.get("role") != answer.get("role"):
            # An interrupted answer may be given anew. A prompt is never written over.
            _require_same(there, answer, (MESSAGES, twin))
        messages[twin] = answer
        if place is not None:
            del messages[place]
    elif place is None:
        messages.append(answer)
    else:
        messages[place] = answer


def begin(document: Document, stream_id: str, prompt: Message | None) -> None:
    """Put the prompt into `messages`, and mirror it in the stream fields."""
    end(document)
    document.fields[ACTIVE] = stream_id
    document.fields["pending_started_at"] = time.time()
    if prompt is not None:
        put_prompt(document.list(MESSAGES), prompt)
        document.fields["pending_user_message"] = prompt.get("content")
        document.fields["pending_attachments"] = prompt.get("attachments", [])


def end(document: Document) -> None:
    """Reset the stream fields."""
    for field, idle in IDLE.items():
        document.fields[field] = list(idle) if type(idle) is list else idle


def interrupt(document: Document, prompt_id: MessageId | None, answer_id: MessageId | None) -> None:
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


def interrupt_foreign(document: Document) -> None:
    """End a turn that another program started, of which only the stream fields tell."""
    if document.fields.get("pending_user_message") and document.has_list(MESSAGES):
        _recover_foreign_prompt(document, document.list(MESSAGES))
    end(document)


def _recover_foreign_prompt(document: Document, messages: Messages) -> None:
    """Keep the prompt of a turn that another program started: `pending_user_message` may be its only copy (#1471)."""
    fields = document.fields
    content = fields["pending_user_message"]
    told = {"attachments": fields["pending_attachments"]} if fields.get("pending_attachments") else {}
    last = messages[len(messages) - 1] if len(messages) else None
    if type(last) is dict and last.get("role") == "user" and same(last.get("content"), content):
        last[INTERRUPTED] = True
        last.update({name: value for name, value in told.items() if name not in last})
    else:
        stream_id = fields.get(ACTIVE)
        messages.append({"id": f"{stream_id}.prompt", "role": "user", "content": content, INTERRUPTED: True, **told})
