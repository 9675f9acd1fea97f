"""Streams: who runs a turn of the model on a session, and what becomes of the turn when it ends.

A stream owns its session from `start` to `finish`, `fail` or the death of its process. Its claim (owner, prompt and
`active_stream_id` in the document) and the proof that it lives (its lease) become visible in one hold of the session's lock,
and every later write of the stream compares incarnation, stream id and epoch in the same hold as it writes. So there is no
instant at which a stream that is starting looks dead (hermes-webui #5053), at which a clear can hit a successor (#1533), or at
which a stream that lost its session can still write to it (#2154).

A turn in `messages`: the prompt, then what the stream appends, then its one partial answer, which `checkpoint` replaces
and `finish` completes. The prompt is durable before `start` returns and nothing here ever removes it.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from persist import codec
from persist.errors import (
    CommitFailed,
    InvalidStreamId,
    MergeConflict,
    Owner,
    PersistError,
    ReservedField,
    SessionBusy,
    SessionNotFound,
    StreamLost,
    WrongType,
    conflicts_in,
)
from persist.files import layout
from persist.files.lease import Lease
from persist.files.snapshot import ACTIVE, Body, Header, Snapshot, StreamOwner
from persist.files.transaction import SessionFiles, Transaction
from persist.merge import same

#: The fields of a document that belong to the stream verbs, with their values while no stream is active.
IDLE: dict[str, Any] = {
    ACTIVE: None,
    "pending_user_message": None,
    "pending_attachments": [],
    "pending_started_at": None,
}
MESSAGES = "messages"
INTERRUPTED = "interrupted"

Message = dict[str, Any]


# --- the document's side: pure changes to data ---------------------------------------------------------------------------


def refuse_changed_stream_fields(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise `ReservedField` if an edit touched what belongs to the stream verbs."""
    for field, idle in IDLE.items():
        if not same(before.get(field, idle), after.get(field, idle)):
            verb = "Use store.start_stream(), store.cancel() or session.clear_stale_stream()."
            raise ReservedField(field=field, remedy=verb)


def without_stream(data: dict[str, Any], owner: StreamOwner | None) -> dict[str, Any]:
    """The data of a copy: no stream fields, and no partial answer of a stream that runs on the original."""
    kept = {key: value for key, value in data.items() if key not in IDLE}
    if owner is not None and owner.answer_id is not None:
        kept[MESSAGES] = [message for message in messages_of(kept) if not _has_id(message, owner.answer_id)]
    return kept


def messages_of(data: dict[str, Any], field: str = MESSAGES) -> list[Any]:
    """The list under `field`, made if it is missing."""
    messages = data.setdefault(field, [])
    if type(messages) is not list:
        raise WrongType(what=f"field {field!r} of the document", expected="a list", got=type(messages).__name__)
    return messages


def append_once(messages: list[Any], item: Any, *, before: int | None = None, field: str = MESSAGES) -> None:
    """Add an item unless one of its id is there; the same id with other content is a `MergeConflict`."""
    place = _find(messages, item.get("id")) if type(item) is dict else None
    if place is None:
        messages.insert(len(messages) if before is None else before, item)
    else:
        _require_same(messages[place], item, (field, place))


def _require_same(there: Message, item: Message, path: tuple[str | int, ...]) -> None:
    if not same(there, item):
        raise MergeConflict(path=path, reason="its id is taken by other content", base=None, mine=item, theirs=there)


def _has_id(message: Any, message_id: object) -> bool:
    return type(message) is dict and "id" in message and same(message["id"], message_id)


def _find(messages: list[Any], message_id: object) -> int | None:
    """The place of the message with this id, looked for from the end."""
    if message_id is None:
        return None
    return next((i for i in range(len(messages) - 1, -1, -1) if _has_id(messages[i], message_id)), None)


def _with_id(message: Message, default: str) -> Message:
    if message.get("id") is not None:
        return message
    return {"id": default} | {key: value for key, value in message.items() if key != "id"}


def _put_prompt(messages: list[Any], prompt: Message) -> None:
    """Add the prompt of a turn, or take up again the one that an interrupted turn has left."""
    place = _find(messages, prompt["id"])
    if place is None:
        messages.append(prompt)
        return
    there = messages[place]
    ignored = {INTERRUPTED: prompt.get(INTERRUPTED, False)}
    _require_same({**there, **ignored}, {**prompt, **ignored}, (MESSAGES, place))
    there.pop(INTERRUPTED, None)


def _put_answer(messages: list[Any], answer: Message, current_id: object) -> None:
    """Put the answer where the turn's partial stands, or at the end; there is never a second one."""
    place = _find(messages, current_id)
    twin = _find(messages, answer["id"])
    if twin is not None and twin != place:
        _require_same(messages[twin], answer, (MESSAGES, twin))
        if place is not None:
            del messages[place]
    elif place is None:
        messages.append(answer)
    else:
        messages[place] = answer


def _end_turn(data: dict[str, Any]) -> None:
    data.update({field: list(idle) if type(idle) is list else idle for field, idle in IDLE.items()})


def _interrupt_turn(data: dict[str, Any], owner: StreamOwner | None) -> None:
    """End a turn that has no answer: prompt and partial stay, marked once."""
    messages = messages_of(data)
    if owner is None:
        _recover_foreign_prompt(data, messages)
    else:
        for message_id in (owner.prompt_id, owner.answer_id):
            place = _find(messages, message_id)
            if place is not None:
                messages[place][INTERRUPTED] = True
    _end_turn(data)


def _recover_foreign_prompt(data: dict[str, Any], messages: list[Any]) -> None:
    """Keep the prompt of a turn that another program started: `pending_user_message` may be its only copy (#1471)."""
    content = data.get("pending_user_message")
    if not content:
        return
    last = messages[-1] if messages else None
    if type(last) is dict and last.get("role") == "user" and same(last.get("content"), content):
        last[INTERRUPTED] = True
        return
    prompt = {"id": f"{data.get(ACTIVE)}.prompt", "role": "user", "content": content, INTERRUPTED: True}
    if data.get("pending_attachments"):
        prompt["attachments"] = data["pending_attachments"]
    if _find(messages, prompt["id"]) is None:
        messages.append(prompt)


# --- the verbs -----------------------------------------------------------------------------------------------------------


def start(files: SessionFiles, session_id: str, message: Message | None, stream_id: str | None = None) -> Stream:
    """Claim a session for a new stream; see `Store.start_stream`."""
    stream_id = uuid.uuid4().hex if stream_id is None else layout.check_stream_id(stream_id)
    prompt = None if message is None else _with_id(_checked(message), f"{stream_id}.prompt")
    with conflicts_in(session_id), files.transaction(session_id) as tx:
        snapshot = tx.read()
        with tx.holding_lease_if_dead(snapshot.active_stream_id) as is_dead:
            if not is_dead:
                raise _busy(files, session_id, snapshot)
            return _claim(files, tx, snapshot, stream_id, prompt)


def _claim(files: SessionFiles, tx: Transaction, snapshot: Snapshot, stream_id: str, prompt: Message | None) -> Stream:
    data, header = snapshot.body.data(), snapshot.header
    messages = messages_of(data)
    if any(_has_id(m, f"{stream_id}.{part}") for m in messages for part in ("prompt", "answer")):
        raise InvalidStreamId(stream_id=stream_id, reason="a stream of this session had it before. Choose a new one.")
    stale_id = data.get(ACTIVE)
    if stale_id is not None:
        _interrupt_turn(data, _owner_of(header, stale_id))
    owner = StreamOwner(stream_id, _this_process(), None if prompt is None else prompt["id"])
    _begin_turn(data, stream_id, prompt)
    body = Body.of(data)
    lease = tx.take_lease(stream_id, codec.encode({"pid": owner.process.pid, "started_at": owner.process.started_at}))
    if lease is None:
        raise InvalidStreamId(stream_id=stream_id, reason="a stream of that id is alive. Choose a new one.")
    try:
        committed = tx.commit(header.next(epoch=header.epoch + 1, owner=owner), body)
    except BaseException as error:
        # A failed launch must not keep its claim (hermes-webui #6869). Where the claim may be visible all the same, the
        # lease file stays behind, unlocked: by it a sweep finds the session.
        if isinstance(error, CommitFailed):
            tx.remove_lease(stream_id)
        lease.close()
        raise
    if stale_id is not None:
        tx.remove_lease(stale_id)
    return Stream(files, tx.session_id, committed, stream_id, lease)


def _begin_turn(data: dict[str, Any], stream_id: str, prompt: Message | None) -> None:
    _end_turn(data)
    data[ACTIVE] = stream_id
    data["pending_started_at"] = time.time()
    if prompt is not None:
        _put_prompt(messages_of(data), prompt)
        data["pending_user_message"] = prompt.get("content")
        data["pending_attachments"] = prompt.get("attachments", [])


def clear_stale(files: SessionFiles, session_id: str, stream_id: object) -> Snapshot | None:
    """Clear `stream_id` from its session if it is still the active stream and is dead.

    Returns:
        What was committed; None if another stream or none is active, or if this one is alive. Its `updated_at` is kept.
    """
    with files.transaction(session_id) as tx:
        snapshot = tx.read()
        if snapshot.active_stream_id is None or not same(snapshot.active_stream_id, stream_id):
            return None
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            return _take_away(tx, snapshot) if is_dead else None


def _take_away(tx: Transaction, snapshot: Snapshot) -> Snapshot:
    """End the active stream without its owner: dead, or overruled by a forced cancel. The epoch fences an owner off."""
    data, header = snapshot.body.data(), snapshot.header
    stream_id = data[ACTIVE]
    _interrupt_turn(data, _owner_of(header, stream_id))
    committed = tx.commit(header.next(touch=False, epoch=header.epoch + 1, owner=None), Body.of(data))
    tx.remove_lease(stream_id)
    return committed


def sweep_lease(files: SessionFiles, session_id: str, stream_id: str) -> bool:
    """Clear the stream that a lease file names, or remove a left-over lease; tell whether a stream was cleared."""
    with files.transaction(session_id, may_be_missing=True) as tx:
        snapshot = tx.read() if tx.exists() else None
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            if not is_dead:
                return False
            if snapshot is not None and snapshot.active_stream_id == stream_id:
                _take_away(tx, snapshot)
                return True
            tx.remove_lease(stream_id)
            return False


def cancel(files: SessionFiles, session_id: str, stream_id: str, *, force: bool) -> bool:
    """Ask a stream to end, or end it; see `Store.cancel`."""
    with files.transaction(session_id) as tx:
        snapshot = tx.read()
        if snapshot.active_stream_id is None or not same(snapshot.active_stream_id, stream_id):
            return False
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            owner = _owner_of(snapshot.header, stream_id)
            if is_dead or force or owner is None:
                _take_away(tx, snapshot)
            elif owner.is_cancelled:
                tx.confirm()
            else:
                tx.commit(snapshot.header.next(touch=False, owner=replace(owner, is_cancelled=True)), snapshot.body)
        return True


def delete(files: SessionFiles, session_id: str, *, force: bool) -> None:
    """Delete a session unless a live stream owns it; see `Store.delete`."""
    with files.transaction(session_id) as tx:
        if force:
            # Also a document that cannot be read.
            tx.delete()
            return
        snapshot = tx.read()
        with tx.holding_lease_if_dead(snapshot.active_stream_id) as is_dead:
            if not is_dead:
                raise _busy(files, session_id, snapshot)
            tx.delete()


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a session's active stream. `last_commit_at` is when the session was last written to."""

    session_id: str
    stream_id: str
    is_live: bool
    is_cancelled: bool
    owner: Owner | None
    last_commit_at: datetime


def look_at(files: SessionFiles, session_id: str, stream_id: str) -> StreamInfo | None:
    """Tell whether a stream is alive, under its session's lock; None if it is not the session's active one."""
    try:
        with files.transaction(session_id) as tx:
            head = files.read_head(session_id)
            if head.fields.get(ACTIVE) != stream_id:
                return None
            with tx.holding_lease_if_dead(stream_id) as is_dead:
                owner = _owner_of(head.header, stream_id)
                return StreamInfo(
                    session_id,
                    stream_id,
                    is_live=not is_dead,
                    is_cancelled=owner is not None and owner.is_cancelled,
                    owner=None if owner is None else owner.process,
                    last_commit_at=head.header.updated_at,
                )
    except SessionNotFound:
        return None


def _busy(files: SessionFiles, session_id: str, snapshot: Snapshot) -> SessionBusy:
    stream_id = snapshot.active_stream_id
    owner = _owner_of(snapshot.header, stream_id)
    path = files.layout.lease(session_id, stream_id)
    return SessionBusy(session_id=session_id, stream_id=stream_id, owner=None if owner is None else owner.process, path=path)


def _owner_of(header: Header, stream_id: object) -> StreamOwner | None:
    """The owner, if it is the owner of that stream: another program may have put its own id into the document."""
    return header.owner if header.owner is not None and header.owner.stream_id == stream_id else None


def _checked(message: Any) -> Message:
    if type(message) is not dict:
        raise WrongType(what="a message", expected="a plain dict", got=type(message).__name__)
    codec.check(message)
    if type(message.get("id", "")) not in (str, int, type(None)):
        raise WrongType(what="a message's id", expected="a string or an integer", got=type(message["id"]).__name__)
    return message


def _this_process() -> Owner:
    return Owner(os.getpid(), socket.gethostname(), _command(), datetime.now(UTC).isoformat())


@functools.cache
def _command() -> str:
    return Path(sys.argv[0] or sys.executable).name if sys.argv else "python"


class Stream:
    """A running turn that owns its session; made by `Store.start_stream`, best used as a context manager.

    Leaving the block without `finish` is `fail`. Leaving it always gives the lease up, so that the session is never stuck.
    Every verb raises `StreamLost` once the session belongs to somebody else (a forced cancel, a delete), or the stream has
    ended.

    Concurrency: each verb is one commit under the session's lock, from any thread of the process that started the
    stream. In a forked child every verb raises `StreamLost`, and leaving the block does nothing.
    """

    def __init__(self, files: SessionFiles, session_id: str, claim: Snapshot, stream_id: str, lease: Lease) -> None:
        self.id = stream_id
        self.session_id = session_id
        self.epoch = claim.header.epoch
        self._files = files
        self._incarnation = claim.header.incarnation
        self._lease = lease

    def __repr__(self) -> str:
        return f"<persist.Stream {self.id} of {self.session_id!r}{'' if self._lease.is_held else ', ended'}>"

    @property
    def cancelled(self) -> bool:
        """Whether somebody, in any process, has asked this stream to end, or it has lost its session.

        Reads the head of the document: tens of microseconds, no lock.
        """
        try:
            head = self._files.read_head(self.session_id)
            self._require_ownership(head.header, head.fields.get(ACTIVE))
        except (StreamLost, SessionNotFound):
            return True
        return head.header.owner is not None and head.header.owner.is_cancelled

    def checkpoint(self, message: Message) -> None:
        """Make the answer so far durable; it replaces the stream's one partial message.

        Args:
            message: the partial answer; without an ``id`` it is ``<stream id>.answer``.

        Raises:
            StreamLost: the session is no longer this stream's: end the turn.
            NotJSON, WrongType: the message cannot be kept.
            MergeConflict: another message has its id.
            CommitFailed, CommitUnknown, LockTimeout: see the errors; the turn may go on.
        """
        answer = _with_id(_checked(message), f"{self.id}.answer")
        self._commit(lambda data, owner: self._answer(data, owner, answer))

    def append(self, message: Message) -> None:
        """Add a message to the turn, before its partial answer (a tool's result, say). Idempotent by its ``id``.

        Raises: as `checkpoint`.
        """
        item = _checked(message)

        def change(data: dict[str, Any], owner: StreamOwner) -> StreamOwner:
            messages = messages_of(data)
            append_once(messages, item, before=_find(messages, owner.answer_id))
            return owner

        self._commit(change)

    def finish(self, message: Message | None = None) -> None:
        """End the turn with its answer, in one commit: the message, and the stream fields cleared.

        Args:
            message: the whole answer, in place of the partial; None keeps the last checkpoint as it is.

        Raises: as `checkpoint`.
        """
        answer = None if message is None else _with_id(_checked(message), f"{self.id}.answer")

        def change(data: dict[str, Any], owner: StreamOwner) -> None:
            if answer is not None:
                self._answer(data, owner, answer)
            _end_turn(data)

        self._commit(change)

    def fail(self) -> None:
        """End the turn without an answer: prompt and partial stay in `messages`, marked ``interrupted``.

        Raises: as `checkpoint`.
        """
        self._commit(_interrupt_turn)

    def _answer(self, data: dict[str, Any], owner: StreamOwner, answer: Message) -> StreamOwner:
        _put_answer(messages_of(data), answer, owner.answer_id)
        return replace(owner, answer_id=answer["id"])

    def _commit(self, change: Callable[[dict[str, Any], StreamOwner], StreamOwner | None]) -> None:
        """Apply a change, fenced. A change that returns no owner ends the turn, and its lease in the same lock hold."""
        if not self._lease.is_held:
            raise self._lost("it has ended, or this is a forked child")
        try:
            with conflicts_in(self.session_id), self._files.transaction(self.session_id) as tx:
                snapshot = tx.read()
                owner = self._require_ownership(snapshot.header, snapshot.active_stream_id)
                data = snapshot.body.data()
                owner_after = change(data, owner)
                body = Body.of(data)
                if owner_after == owner and body == snapshot.body:
                    tx.confirm()
                else:
                    tx.commit(snapshot.header.next(owner=owner_after), body)
                if owner_after is None:
                    tx.remove_lease(self.id)
                    self._lease.close()
        except SessionNotFound:
            raise self._lost("the session was deleted") from None

    def _require_ownership(self, header: Header, active_stream_id: object) -> StreamOwner:
        """The fence: compared in the same lock hold as the write that follows."""
        owner = header.owner
        if header.incarnation != self._incarnation:
            raise self._lost("the session was deleted and made anew")
        if owner is None or owner.stream_id != self.id or active_stream_id != self.id or header.epoch != self.epoch:
            raise self._lost("it has ended, was cancelled by force, or was cleared as stale")
        if not self._lease.is_held:
            raise self._lost("it has ended, or this is a forked child")
        return owner

    def _lost(self, reason: str) -> StreamLost:
        return StreamLost(session_id=self.session_id, stream_id=self.id, reason=reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._lease.is_held:
            return
        try:
            self.fail()
        except StreamLost:
            # Whoever took the session has marked the turn as interrupted already.
            pass
        except (PersistError, OSError) as failure:
            if error is None:
                raise
            error.add_note(f"Stream {self.id} could not be marked as interrupted either: {failure}")
        finally:
            self._lease.close()

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and lease.is_held:
            dropped = f"{self!r} was dropped without finish() or fail(); it is stale now."
            lease.close()
            warnings.warn(dropped, ResourceWarning, stacklevel=2)
