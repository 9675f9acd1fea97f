"""Streams: who runs a turn of the model on a session, and what becomes of the turn when it ends.

A stream owns its session from `start` to `finish`, `fail` or the death of its process. Its claim (owner, prompt and
`active_stream_id` in the document) and the proof that it lives (its lease) become visible in one hold of the session's lock,
and every later write of the stream compares incarnation, stream id and epoch in the same hold as it writes. So there is no
instant at which a stream that is starting looks dead (hermes-webui #5053), at which a clear can hit a successor (#1533), or at
which a stream that lost its session can still write to it (#2154). What a turn does to the data is in `turn`.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from persist import codec, turn
from persist.draft import Draft, revise
from persist.errors import (
    InvalidStreamId,
    Owner,
    PersistError,
    SessionBusy,
    SessionNotFound,
    StreamLost,
    WrongType,
    conflicts_in,
    require_flags,
)
from persist.storage import layout
from persist.storage.events import Ended, Fenced
from persist.storage.lease import Lease
from persist.storage.snapshot import Header, Snapshot, StreamOwner
from persist.storage.transaction import SessionFiles, Transaction
from persist.merge import same
from persist.turn import ACTIVE, Data, Message


def start(files: SessionFiles, session_id: str, message: Message | None, stream_id: str | None = None) -> Stream:
    """Claim a session for a new stream; see `Store.start_stream`."""
    stream_id = uuid.uuid4().hex if stream_id is None else layout.check_stream_id(stream_id)
    prompt = None if message is None else turn.with_id(_checked(message), f"{stream_id}.prompt")

    def claim(draft: Draft) -> Stream:
        with tx.holding_lease_if_dead(draft.active_stream_id) as is_dead:
            if not is_dead:
                raise _busy(files, session_id, draft)
            return _claim(files, tx, draft, stream_id, prompt)

    with conflicts_in(session_id), files.transaction(session_id) as tx:
        return revise(tx, claim)


def _claim(files: SessionFiles, tx: Transaction, draft: Draft, stream_id: str, prompt: Message | None) -> Stream:
    data, header, stale_id = draft.data, draft.header, draft.active_stream_id
    messages = turn.messages_of(data)
    if any(turn.find(messages, f"{stream_id}.{part}") is not None for part in ("prompt", "answer")):
        raise InvalidStreamId(stream_id=stream_id, reason="a stream of this session had it before. Choose a new one.")
    if stream_id == stale_id:
        raise InvalidStreamId(stream_id=stream_id, reason="it is the id of the stream that died. Choose a new one.")
    if stale_id is not None:
        _interrupt(data, header)
    owner = StreamOwner(stream_id, _this_process(), None if prompt is None else prompt["id"])
    turn.begin(data, stream_id, prompt)
    draft.is_changed()  # raises what it has to, before anything is done
    tx.forget_events(stream_id)
    lease = tx.take_lease(stream_id, codec.encode({"pid": owner.process.pid, "started_at": owner.process.started_at}))
    if lease is None:
        raise InvalidStreamId(stream_id=stream_id, reason="a stream of that id is alive. Choose a new one.")
    try:
        committed = draft.commit(header.next(epoch=header.epoch + 1, owner=owner))
        stream = Stream(files, tx.session_id, committed, stream_id, lease)
    except BaseException as error:
        # A failed launch must not keep its claim (hermes-webui #6869). Where the claim may be visible all the same, the
        # lease file stays behind, unlocked: by it a sweep finds the session.
        if isinstance(error, PersistError) and not tx.is_published:
            tx.remove_lease(stream_id)
        lease.close()
        raise
    if stale_id is not None:
        tx.end_events(stale_id, "died")
        tx.remove_lease(stale_id)
    return stream


@dataclass(frozen=True, slots=True)
class Cleared:
    """A stale stream that was cleared: the session's header before and after that."""

    before: Header
    after: Header


def clear_stale(
    files: SessionFiles, session_id: str, stream_id: object, incarnation: str | None = None
) -> Cleared | None:
    """Clear `stream_id` from its session if it is still the active stream and is dead; `updated_at` is kept.

    Args:
        incarnation: that of the object which asks; a session made anew under the same id is another one.

    Returns:
        What was committed; None if another stream or none is active, or if this one is alive.
    """

    def clear(draft: Draft) -> Cleared | None:
        if draft.active_stream_id is None or not same(draft.active_stream_id, stream_id):
            return None
        if incarnation not in (None, draft.header.incarnation):
            return None
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            return Cleared(draft.header, _take_away(tx, draft, "died")) if is_dead else None

    with files.transaction(session_id) as tx:
        return revise(tx, clear)


def _take_away(tx: Transaction, draft: Draft, ended: Ended) -> Header:
    """End the active stream without its owner: dead, or overruled by a forced cancel. The epoch fences an owner off."""
    header, stream_id = draft.header, draft.active_stream_id
    _interrupt(draft.data, header)
    if ended != "died":
        # Before: an owner that lives may emit at any moment, and asks for no lock.
        tx.fence_events(stream_id, ended)
    committed = draft.commit(header.next(touch=False, epoch=header.epoch + 1, owner=None))
    tx.end_events(stream_id, ended)
    tx.remove_lease(stream_id)
    return committed


def _interrupt(data: Data, header: Header) -> None:
    owner = owner_of(header, data[ACTIVE])
    if owner is None:
        turn.interrupt_foreign(data)
    else:
        turn.interrupt(data, owner.prompt_id, owner.answer_id)


def sweep_lease(files: SessionFiles, session_id: str, stream_id: str) -> bool:
    """Clear the stream that a lease file names, or remove a left-over lease; tell whether a stream was cleared."""

    def sweep(draft: Draft | None) -> bool:
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            if not is_dead:
                return False
            if draft is not None and draft.active_stream_id == stream_id:
                _take_away(tx, draft, "died")
                return True
            tx.remove_lease(stream_id)
            return False

    with files.transaction(session_id, may_be_missing=True) as tx:
        return revise(tx, sweep) if tx.exists() else sweep(None)


def cancel(files: SessionFiles, session_id: str, stream_id: str, *, force: bool) -> bool:
    """Ask a stream to end, or end it; see `Store.cancel`."""

    def cancel(draft: Draft) -> bool:
        if draft.active_stream_id is None or not same(draft.active_stream_id, stream_id):
            return False
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            owner = owner_of(draft.header, stream_id)
            if is_dead or force or owner is None:
                _take_away(tx, draft, "died" if is_dead else "cancelled")
            elif owner.is_cancelled:
                tx.confirm()
            else:
                draft.commit(draft.header.next(touch=False, owner=replace(owner, is_cancelled=True)))
        return True

    with files.transaction(session_id) as tx:
        return revise(tx, cancel)


def delete(files: SessionFiles, session_id: str, *, force: bool) -> None:
    """Delete a session unless a live stream owns it; see `Store.delete`."""
    with files.transaction(session_id) as tx:
        if force:
            # Also a document that cannot be read.
            if not tx.exists():
                raise SessionNotFound(session_id=session_id, path=files.layout.session(session_id).document)
            tx.delete()
            return
        found = tx.read()
        with tx.holding_lease_if_dead(found.active_stream_id) as is_dead:
            if not is_dead:
                raise _busy(files, session_id, found)
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


def look_at(files: SessionFiles, session_id: str, *, lock_timeout_s: float | None = None) -> StreamInfo | None:
    """Tell whether a session's active stream is alive, under the session's lock; None if it has none."""
    with files.transaction(session_id, lock_timeout_s=lock_timeout_s) as tx:
        head = tx.read_head()
        stream_id = head.active_stream_id
        if stream_id is None:
            return None
        with tx.holding_lease_if_dead(stream_id) as is_dead:
            owner = owner_of(head.header, stream_id)
            return StreamInfo(
                session_id,
                stream_id,
                is_live=not is_dead,
                is_cancelled=owner is not None and owner.is_cancelled,
                owner=None if owner is None else owner.process,
                last_commit_at=head.header.updated_at,
            )


def _busy(files: SessionFiles, session_id: str, found: Draft | Snapshot) -> SessionBusy:
    stream_id = found.active_stream_id
    owner = owner_of(found.header, stream_id)
    path = files.layout.lease(session_id, stream_id)
    return SessionBusy(
        session_id=session_id, stream_id=stream_id, owner=None if owner is None else owner.process, path=path
    )


def owner_of(header: Header, stream_id: object) -> StreamOwner | None:
    """The header's owner, if it is the owner of that stream: another program may have put its own id into the document."""
    return header.owner if header.owner is not None and header.owner.stream_id == stream_id else None


def _checked(message: Any) -> Message:
    """A copy of it, that nobody else can change."""
    if type(message) is not dict:
        raise WrongType(what="a message", expected="a plain dict", got=type(message).__name__)
    own: Message = codec.captured(message)
    if type(own.get("id", "")) not in (str, int, type(None)):
        raise WrongType(what="a message's id", expected="a string or an integer", got=type(own["id"]).__name__)
    return own


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

    Attributes:
        id: the stream's id.
        session_id: that of the session it owns.
        epoch: its fencing token; grows with every stream of the session.

    Concurrency: each verb is one commit under the session's lock, from any thread of the process that started the
    stream. In a forked child every verb raises `StreamLost`, and leaving the block does nothing.
    """

    def __init__(self, files: SessionFiles, session_id: str, claim: Header, stream_id: str, lease: Lease) -> None:
        self.id = stream_id
        self.session_id = session_id
        self.epoch = claim.epoch
        self._files = files
        self._incarnation = claim.incarnation
        self._lease = lease
        self._events = files.events.writer(session_id, stream_id)

    def __repr__(self) -> str:
        return f"<persist.Stream {self.id} of {self.session_id!r}{'' if self._lease.is_held else ', ended'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Stream belongs to the process that started it; it cannot be handed to another.")

    @property
    def cancelled(self) -> bool:
        """Whether somebody, in any process, has asked this stream to end, or it has lost its session.

        Reads the head of the document: tens of microseconds, no lock.
        """
        try:
            head = self._files.read_head(self.session_id)
            self._require_ownership(head.header, head.active_stream_id)
        except (StreamLost, SessionNotFound):
            return True
        return head.header.owner is not None and head.header.owner.is_cancelled

    @property
    def _has_emitted(self) -> bool:
        """Whether it has emitted events, so that the next ones need no lock."""
        return self._events.is_open

    def checkpoint(self, message: Message) -> None:
        """Make the answer so far durable; it replaces the stream's one partial message.

        Args:
            message: the partial answer; without an ``id`` it is ``<stream id>.answer``.

        Raises:
            StreamLost: the session is no longer this stream's: end the turn.
            NotJSON, WrongType: the message cannot be kept.
            IdTaken: another message has its id.
            CommitFailed, CommitUnknown, LockTimeout: see the errors; the turn may go on.
        """
        answer = turn.with_id(_checked(message), f"{self.id}.answer")
        self._commit(lambda data, owner: self._answer(data, owner, answer))

    def append(self, message: Message) -> None:
        """Add a message to the turn, before its partial answer (a tool's result, say). Idempotent by its ``id``.

        Raises: as `checkpoint`.
        """
        item = _checked(message)

        def change(data: Data, owner: StreamOwner) -> StreamOwner:
            messages = turn.messages_of(data)
            turn.append_once(messages, item, before=turn.find(messages, owner.answer_id))
            return owner

        self._commit(change)

    def emit(self, *events: Any, durable: bool = False) -> int:
        """Add events for those who follow the stream (`Store.follow`), in this process and in others; they see them at once.

        Costs a few microseconds and takes no lock, but for the first time. What was emitted outlives this process.

        Args:
            events: JSON values; several in one call are one write.
            durable: return only when they would survive a power cut, too.

        Returns:
            The offset of the last one; the first event of a stream has offset 1.

        Raises:
            StreamLost: the session is no longer this stream's; the events were emitted nowhere. End the turn.
            NotJSON: an event cannot be kept; none was emitted.
            EmitFailed: the disk refused.
            LockTimeout, NestedLock, CommitFailed, Unreadable, CorruptSession: at the first event, which looks at the session.
        """
        if not events:
            raise WrongType(what="emit()", expected="called with one event or more", got="called with none")
        require_flags(durable=durable)
        encoded = [codec.encode(codec.captured(event)) for event in events]
        if not self._lease.is_held:
            raise self._lost("it has ended, or this is a forked child")
        if not self._events.is_open:
            self._open_events()
        try:
            return self._events.append(encoded, durable=durable)
        except Fenced:
            raise self._lost("it has ended, was cancelled by force, or was cleared as stale") from None

    def _open_events(self) -> None:
        try:
            with self._files.transaction(self.session_id) as tx:
                head = tx.read_head()
                self._require_ownership(head.header, head.active_stream_id)
                self._events.open()
        except SessionNotFound:
            raise self._lost("the session was deleted") from None

    def finish(self, message: Message | None = None) -> None:
        """End the turn with its answer, in one commit: the message, and the stream fields cleared.

        Args:
            message: the whole answer, in place of the partial; None keeps the last checkpoint as it is.

        Raises: as `checkpoint`.
        """
        answer = None if message is None else turn.with_id(_checked(message), f"{self.id}.answer")

        def change(data: Data, owner: StreamOwner) -> None:
            if answer is not None:
                self._answer(data, owner, answer)
            turn.end(data)

        self._commit(change, "finished")

    def fail(self) -> None:
        """End the turn without an answer: prompt and partial stay in `messages`, marked ``interrupted``.

        Raises: as `checkpoint`.
        """
        self._commit(lambda data, owner: turn.interrupt(data, owner.prompt_id, owner.answer_id), "failed")

    def _answer(self, data: Data, owner: StreamOwner, answer: Message) -> StreamOwner:
        turn.put_answer(turn.messages_of(data), answer, owner.answer_id)
        return replace(owner, answer_id=answer["id"])

    def _commit(self, change: Callable[[Data, StreamOwner], StreamOwner | None], ended: Ended = "failed") -> None:
        """Apply a change, fenced. A change that returns no owner ends the turn, and its lease in the same lock hold."""
        if not self._lease.is_held:
            raise self._lost("it has ended, or this is a forked child")

        def commit(draft: Draft) -> None:
            owner = self._require_ownership(draft.header, draft.active_stream_id)
            owner_after = change(draft.data, owner)
            if owner_after != owner or draft.is_changed():
                draft.commit(draft.header.next(owner=owner_after))
            else:
                tx.confirm()
            if owner_after is None:
                tx.end_events(self.id, "cancelled" if owner.is_cancelled and ended == "failed" else ended)
                tx.remove_lease(self.id)
                self._close()

        try:
            with conflicts_in(self.session_id), self._files.transaction(self.session_id) as tx:
                revise(tx, commit)
        except SessionNotFound:
            raise self._lost("the session was deleted") from None

    def _close(self) -> None:
        self._lease.close()
        self._events.close()

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            self._close()

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and lease.is_held:
            dropped = f"{self!r} was dropped without finish() or fail(); it is stale now."
            self._close()
            warnings.warn(dropped, ResourceWarning, stacklevel=2)
