"""Streams: the ownership of a session by a running turn of the model, and the end of the turn.

A stream owns its session from `start` to `finish`, `fail` or the death of its process. Its claim (owner, prompt and
`active_stream_id` in the document) and the proof that it lives (its lease) become visible in one hold of the session's
lock. Every later write of the stream compares incarnation, stream id and epoch, in the same hold in which it writes.
So at no instant can one of these happen:

- A stream that is starting looks dead (hermes-webui #5053).
- A clear hits a successor (#1533).
- A stream that lost its session still writes to it (#2154).

The module `turn` has the changes that a turn makes to the data.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import msgspec

from persist import errors, json_codec, tool_calls, turn
from persist.arguments import require_flags, seconds
from persist.engine import Committed, End, Ended, Engine, EventWriter, Fenced, Lease, Transaction, decoding
from persist.log import log
from persist.storage import layout
from persist.storage.content import ALWAYS_APART, Content, Id, as_id, load
from persist.storage.diff import Change
from persist.storage.document import Head, Header, first_header
from persist.transaction import Transaction as Block
from persist.transaction import refuse_changed_stream_fields, require_version
from persist.working_copy import Changed, WorkingCopy, WorkingList

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Backend:
    """The engine of a store, and the options that its streams heed."""

    engine: Engine
    #: Whether a turn that breaks off leaves a synthetic result for each tool call that has none.
    answer_tool_calls: bool = False


# --- the owner in the header -----------------------------------------------------------------------------------------


class StreamOwner(msgspec.Struct, frozen=True):
    """The owner of a session's current stream, with that stream's two messages. The header holds it as JSON."""

    stream_id: str
    pid: int
    host: str
    command: str
    started_at: str
    prompt_id: str | int | None = None
    answer_id: str | int | None = None
    cancelled: bool = False
    once: bool = False

    @property
    def process(self) -> errors.Owner:
        return errors.Owner(self.pid, self.host, self.command, self.started_at)

    def to_header(self, **changes: Any) -> dict[str, Any]:
        """Return the owner as JSON values, with some attributes changed."""
        return msgspec.to_builtins(msgspec.structs.replace(self, **changes))  # type: ignore[no-any-return]


def owner_of(header: Header, stream_id: object) -> StreamOwner | None:
    """Return the header's owner, if it owns that stream. Another program may have put its own id into the document."""
    try:
        owner = msgspec.convert(header.owner, StreamOwner)
    except (msgspec.ValidationError, UnicodeEncodeError):
        # msgspec cannot name a key that holds a lone surrogate.
        return None
    return owner if owner.stream_id == stream_id else None


# --- starting --------------------------------------------------------------------------------------------------------


def start(
    backend: Backend,
    session_id: str,
    message: turn.Message | None,
    stream_id: str | None = None,
    *,
    fields: Mapping[str, Any] | None = None,
    create: bool = False,
    once: bool = False,
    if_version: str | None = None,
    timeout_s: float | None = None,
) -> Stream:
    """Claim a session for a new stream. See `Store.start_stream`."""
    stream_id = uuid.uuid4().hex if stream_id is None else layout.check_stream_id(stream_id)
    prompt = None if message is None else turn.with_id(_checked(message), f"{stream_id}.prompt")
    if once and (message is None or message.get("id") is None):
        what = "the prompt of start_stream(once=True)"
        raise errors.InvalidArgument(what=what, got="without an id", expected="one with an id")
    used = f"{stream_id}.prompt", f"{stream_id}.answer"
    seeking = turn.MESSAGES, used if prompt is None or prompt["id"] in used else (*used, prompt["id"])
    with backend.engine.transaction(session_id, timeout_s, seeking=seeking) as tx:
        copy = WorkingCopy.of(tx, create=create)
        stale_id = active_in(copy.committed)
        with tx.probe(stale_id) as is_dead:
            if once and prompt is not None:
                _refuse_started(tx, copy, prompt, live_id=None if is_dead else stale_id)
            if not is_dead:
                raise _busy(tx, copy.header, stale_id)
            require_version(copy, session_id, if_version)
            messages = copy.list(turn.MESSAGES)
            if any(messages.place_of(each) is not None for each in used):
                raise _unusable(stream_id, "a stream of this session had it before")
            if stream_id == stale_id:
                raise _unusable(stream_id, "it is the id of the stream that died")
            if stale_id is not None or copy.fields.get("pending_user_message"):
                # Also without a stream, because the fields that a stopped old server left may hold the prompt's only
                # copy.
                _interrupt(backend, copy, stale_id)
            _set_fields(copy, fields)
            turn.begin(copy, stream_id, prompt)
            changed = copy.changed()  # raises its errors before anything is done
            command = Path(sys.argv[0] or sys.executable).name if sys.argv else "python"
            process = os.getpid(), socket.gethostname(), command, datetime.now(UTC).isoformat()
            owner = StreamOwner(stream_id, *process, None if prompt is None else prompt["id"], once=once)
            begun = tx.begin(stream_id, owner.started_at)
            if begun is None:
                raise _unusable(stream_id, "a stream of that id is alive")
            end = None if stale_id is None else End(stale_id, "died")
            try:
                header = copy.next_header(epoch=copy.header.epoch + 1, owner=owner.to_header())
                return Stream(backend, session_id, copy.commit(header, changed, end).header, stream_id, *begun)
            except BaseException as error:
                # A failed launch must not keep its claim (hermes-webui #6869).
                if isinstance(error, errors.PersistError):
                    tx.forget(stream_id)
                for each in begun:
                    each.close()
                raise


def _set_fields(copy: WorkingCopy, fields: Mapping[str, Any] | None) -> None:
    """Set top-level fields in the commit of a stream's verb."""
    if fields is not None and not isinstance(fields, Mapping):
        raise errors.InvalidArgument(what="fields", expected="a mapping of top-level fields", got=type(fields).__name__)
    for name, value in (fields or {}).items():
        if name in turn.IDLE:
            raise errors.reserved(name, "The stream verbs set it: store.start_stream().")
        if name in ALWAYS_APART:
            raise errors.reserved(name, "Add to it with append(), or in a transaction().")
        copy.fields[name] = value


def _refuse_started(tx: Transaction, copy: WorkingCopy, prompt: turn.Message, *, live_id: str | None) -> None:
    """Raise `AlreadyStarted` if a live stream runs this prompt, or if the prompt has its answer.

    `live_id` is the live stream of the session. A dead stream of this prompt has no answer, because a partial answer
    does not count.
    """
    owner = owner_of(copy.header, active_in(copy.committed))
    partial_id = None if owner is None else owner.answer_id
    has_finished, answer = turn.answer_to(copy.list(turn.MESSAGES), prompt, partial_id)
    is_own = owner is not None and json_codec.same(owner.prompt_id, prompt["id"])
    facts: dict[str, Any]
    if is_own and live_id is not None:
        what = f"stream {live_id} runs it"
        remedy = "Follow that stream with store.follow()."
        facts = {"stream_id": live_id, "answer": None, "what": what, "remedy": remedy}
    elif has_finished and not is_own:
        remedy = "Its `answer` is an attribute of this error; store.load() shows it, too."
        remedy = remedy if answer is not None else "It finished without an answer: store.load() shows it."
        facts = {"stream_id": None, "answer": answer, "what": "its turn has finished", "remedy": remedy}
    else:
        return
    tx.confirm()
    raise errors.AlreadyStarted(session_id=tx.session_id, **facts)


def _unusable(stream_id: str, reason: str) -> errors.InvalidArgument:
    expected = f"a new one: {reason}"
    return errors.InvalidArgument(what="a stream id", got=repr(stream_id), expected=expected, stream_id=stream_id)


# --- ending a stream without its owner -------------------------------------------------------------------------------


class Cleared(msgspec.Struct, frozen=True, eq=False):
    """A clear that was committed.

    Attributes:
        before, after: the session before and after the clear.
        changes: the changes from `before` to `after`, in the values that stand apart.
    """

    before: Committed
    after: Committed
    changes: tuple[Change, ...]


def clear_stale(
    backend: Backend,
    session_id: str,
    stream_id: object,
    incarnation: str | None = None,
    *,
    is_whole: bool = False,
    timeout_s: float | None = None,
) -> Cleared | None:
    """Clear `stream_id` from its session if it is still the active stream and is dead. `updated_at` is kept.

    Args:
        incarnation: the incarnation that the asking object knows. A session that was created anew under the same id
            has another one.
        is_whole: whether the caller needs all items of the lists, before and after the clear.

    Returns:
        The committed clear. None if another stream or none is active, or if this one is alive.
    """
    with backend.engine.transaction(session_id, timeout_s) as tx:
        copy = WorkingCopy(tx.read(), tx)
        active = active_in(copy.committed)
        if not _is_same(active, stream_id) or incarnation not in (None, copy.header.incarnation):
            return None
        with tx.probe(stream_id) as is_dead:
            if is_dead and is_whole:
                load(copy.committed)
            return _take_away(backend, tx, copy, active, "died") if is_dead else None


def _is_same(active: Any, stream_id: object) -> bool:
    return active is not None and json_codec.same(active, stream_id)


def _take_away(backend: Backend, tx: Transaction, copy: WorkingCopy, stream_id: Any, ended: Ended) -> Cleared:
    """End the active stream without its owner, which is dead, or overruled by a forced cancel.

    The new epoch fences off an owner that lives.
    """
    before = tx.read()
    _interrupt(backend, copy, stream_id)
    changed = copy.changed() or (before.content, ())
    header = before.header.next(touch=False, epoch=before.header.epoch + 1, owner=None)
    after = copy.commit(header, changed, End(stream_id, ended, is_forced=ended != "died"))
    shown = stream_id if layout.is_stream_id(stream_id) else "of another program"
    log.info("Session %r: its stream %s was cleared, which had %s", tx.session_id, shown, ended)
    return Cleared(before, after, changed[1])


def _interrupt(backend: Backend, copy: WorkingCopy, stream_id: Any) -> None:
    owner = owner_of(copy.header, stream_id)
    if owner is None:
        turn.interrupt_foreign(copy)
    else:
        turn.interrupt(copy, owner.prompt_id, owner.answer_id)
    if backend.answer_tool_calls:
        _settle_tool_calls(copy, None if owner is None else owner.prompt_id, tool_calls.repair)


def _settle_tool_calls(copy: WorkingCopy, prompt_id: Id | None, settle: Callable[[WorkingList, int], object]) -> None:
    """Settle the tool calls of a turn that ends. The calls before its prompt are left alone: they may be pending."""
    if copy.has_list(turn.MESSAGES):
        messages = copy.list(turn.MESSAGES)
        place = messages.place_of(prompt_id)
        if place is not None:
            settle(messages, place)


def repair_tool_calls(tx: Transaction, field: str) -> int:
    """Answer the tool calls without a result. See `Store.repair`."""
    require_free(tx, " A running turn may still answer its calls.")
    copy = WorkingCopy(tx.read(), tx)
    count = tool_calls.repair(copy.list(field))
    copy.commit_changes(copy.changed())
    return count


def sweep_lease(backend: Backend, session_id: str, stream_id: str, *, timeout_s: float | None) -> bool:
    """Clear the stream that a lease file names, or remove a left-over lease. Tell whether a stream was cleared."""
    with backend.engine.transaction(session_id, timeout_s) as tx:
        copy = WorkingCopy(tx.read(), tx) if tx.exists() else None
        with tx.probe(stream_id) as is_dead:
            if not is_dead:
                return False
            if copy is not None and active_in(copy.committed) == stream_id:
                _take_away(backend, tx, copy, stream_id, "died")
                return True
            tx.forget(stream_id)
            return False


def cancel(backend: Backend, tx: Transaction, stream_id: str, *, force: bool) -> bool:
    """Ask a stream to end, or end it. See `Store.cancel`."""
    copy = WorkingCopy(tx.read(), tx)
    if not _is_same(active_in(copy.committed), stream_id):
        return False
    with tx.probe(stream_id) as is_dead:
        owner = owner_of(copy.header, stream_id)
        if is_dead or force or owner is None:
            _take_away(backend, tx, copy, stream_id, "died" if is_dead else "cancelled")
        elif owner.cancelled:
            tx.confirm()
        else:
            copy.commit(copy.header.next(touch=False, owner=owner.to_header(cancelled=True)))
    return True


def delete(tx: Transaction, *, force: bool = False) -> None:
    """Delete a session unless a live stream owns it. See `Store.delete`."""
    if not tx.exists():
        raise errors.SessionNotFound(session_id=tx.session_id, path=tx.place)
    if not force:
        # With `force`, a document that cannot be read is deleted, too.
        require_free(tx)
    tx.delete()


def replace(tx: Transaction, content: Content, if_version: str | None) -> Committed:
    """Replace the content of a session. See `Store.replace`."""
    try:
        before = tx.read()
        with decoding(tx.session_id, tx.place):
            # Somebody may have sealed a value that is no JSON.
            before.content.decode()
    except errors.CorruptSession:
        if if_version is not None:
            # Nobody knows the version of a damaged session.
            raise
        return _replace_damaged(tx, content)
    if if_version is None:
        remedy = "It can be read: name the version that you have seen, with if_version= or --if-version."
        raise errors.SessionExists(session_id=tx.session_id, path=tx.place, remedy=remedy)
    require_version(WorkingCopy(before, tx), tx.session_id, if_version)
    require_free(tx)
    stale_id = active_in(before.content)
    epoch = before.header.epoch + (stale_id is not None)
    end = None if stale_id is None else End(stale_id, "died")
    return tx.commit(before.header.next(epoch=epoch, owner=None), content, end=end)


def _replace_damaged(tx: Transaction, content: Content) -> Committed:
    """Begin a session anew. Its document does not tell whether a stream runs, so all its leases are tried."""
    for stream_id in tx.stream_ids():
        with tx.probe(stream_id) as is_dead:
            if not is_dead:
                raise _busy(tx, first_header(), stream_id)
    return tx.put(first_header(), content)


def require_free(tx: Transaction, why: str = "") -> None:
    """Raise `SessionBusy` if a live stream owns the session. Under the lock no stream can start."""
    if not tx.exists():
        return
    active = active_in(tx.read().content)
    with tx.probe(active) as is_dead:
        if not is_dead:
            raise _busy(tx, tx.read().header, active, why)


def checked(tx: Transaction, copy: WorkingCopy) -> Changed | None:
    """Return the changes of a block. It may change everything except the fields that belong to the stream verbs.

    Raises:
        InvalidArgument: it has changed a stream field.
        SessionBusy: it has removed the partial answer of a live stream.
        MergeConflict: see `refuse_twins`.
    """
    changed = copy.changed()
    if changed is not None:
        before, after = copy.committed, changed[0]
        refuse_changed_stream_fields(before, after)
        owner = refuse_twins(copy.header, before, after)
        gone = owner is not None and turn.has(before, owner.answer_id) and not turn.has(after, owner.answer_id)
        if gone:
            require_free(tx, " The block would remove the stream's partial answer.")
        # The block is the caller's own code. Another program may have replaced the document while it ran.
        tx.require_unchanged()
    return changed


def refuse_twins(header: Header, before: Content, after: Content) -> StreamOwner | None:
    """Refuse a second message with the id of the running turn's prompt or partial answer.

    The next write of the turn would hit that message.

    Returns:
        The owner of the turn, or None if no turn runs.

    Raises:
        MergeConflict: there is such a message in `after`, and none in `before`.
    """
    active = active_in(before)
    owner = None if active is None else owner_of(header, active)
    for own in () if owner is None else (owner.prompt_id, owner.answer_id):
        if turn.has_twin(after, own) and not turn.has_twin(before, own):
            told = {
                "reason": "a running turn has a message of this id",
                "clash": "would have a second message with an id of the running turn",
                "remedy": "Give the new one an id of its own.",
            }
            raise errors.MergeConflict(path=(turn.MESSAGES,), mine=own, theirs=own, **told)
    return owner


# --- looking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """The state of a session's active stream. `last_commit_at` is the session's `updated_at`."""

    session_id: str
    stream_id: str
    is_live: bool
    is_cancelled: bool
    owner: errors.Owner | None
    last_commit_at: datetime


def look_at(tx: Transaction) -> StreamInfo | None:
    """Return the state of a session's active stream, or None if it has none."""
    head = tx.head()
    stream_id = active_in(head)
    if stream_id is None:
        return None
    with tx.probe(stream_id) as is_dead:
        owner = owner_of(head.header, stream_id)
        process, is_cancelled = (None, False) if owner is None else (owner.process, owner.cancelled)
        return StreamInfo(tx.session_id, stream_id, not is_dead, is_cancelled, process, head.header.updated_at)


def active_in(head: Head | Content) -> Any:
    """Return the id of the stream that a session's fields name, or None."""
    value = head.fields.get(turn.ACTIVE)
    return None if value is None else json_codec.decode(value) or None


def _busy(tx: Transaction, header: Header, stream_id: Any, why: str = "") -> errors.SessionBusy:
    owner = owner_of(header, stream_id)
    process, path = None if owner is None else owner.process, tx.where(stream_id)
    return errors.SessionBusy(session_id=tx.session_id, stream_id=stream_id, owner=process, path=path, why=why)


def _checked(message: Any) -> turn.Message:
    """Return a copy of a message that nobody else can change. Raise an error for an invalid message."""
    if type(message) is not dict:
        raise errors.InvalidArgument(what="a message", expected="a plain dict", got=type(message).__name__)
    own: turn.Message = json_codec.decode(json_codec.encode_exact(message))
    if type(own.get("id", "")) not in (str, int, type(None)):
        got = type(own["id"]).__name__
        raise errors.InvalidArgument(what="a message's id", got=got, expected="a string or an integer")
    return own


class Stream:
    """A running turn that owns its session, made by `Store.start_stream`. It is best used as a context manager.

    Leaving the block without `finish` is `fail`. Leaving it always gives up the lease, so that the session is never
    stuck. Every verb raises `StreamLost` once the session belongs to somebody else (a forced cancel, a delete), or once
    the stream has ended.

    A stream that is dropped without an end is stale, and says so in a `ResourceWarning`, once. At the end of the
    interpreter it says nothing. The kernel gives up the lease, and the next start or sweep marks the turn as
    interrupted.

    Attributes:
        id: the stream's id.
        session_id: the id of the session that it owns.
        epoch: its fencing token, which grows with every stream of the session.

    Concurrency: each verb is one commit under the session's lock, from any thread of the process that started the
    stream. In a forked child every verb raises `StreamLost`, and leaving the block does nothing.
    """

    def __init__(
        self, backend: Backend, session_id: str, claim: Header, stream_id: str, lease: Lease, events: EventWriter
    ) -> None:
        self.id = stream_id
        self.session_id = session_id
        self.epoch = claim.epoch
        self._backend = backend
        self._incarnation = claim.incarnation
        self._lease = lease
        self._events = events

    def __repr__(self) -> str:
        return f"<persist.Stream {self.id} of {self.session_id!r}{'' if self._lease.is_held else ', ended'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Stream belongs to the process that started it; it cannot be handed to another.")

    def is_cancelled(self) -> bool:
        """Tell whether somebody, in any process, has asked this stream to end, or whether it has lost its session.

        It reads the head of the document, which takes tens of microseconds and no lock.
        """
        try:
            head = self._backend.engine.read_head(self.session_id)
            return self._require_ownership(head.header, active_in(head)).cancelled
        except (errors.StreamLost, errors.SessionNotFound):
            return True

    def checkpoint(self, message: turn.Message, *, timeout_s: float | None = None) -> None:
        """Make the answer so far durable. It replaces the stream's one partial message.

        Args:
            message: the partial answer. Without an ``id`` it gets ``<stream id>.answer``.
            timeout_s: seconds to wait for the session's lock, in the place of the store's `timeout_s`.

        Raises:
            StreamLost: the session is no longer this stream's. End the turn.
            NotJSON, InvalidArgument: the message cannot be kept.
            MergeConflict: another message has its id.
            CommitFailed, CommitUnknown, LockTimeout: see the errors. The turn may go on.
        """
        answer = turn.with_id(_checked(message), f"{self.id}.answer")
        with self._owned(timeout_s, answer["id"]) as (_, copy, owner):
            answer_id = turn.put_answer(copy.list(turn.MESSAGES), answer, owner.answer_id)
            self._commit(copy, owner, answer_id)

    def append(self, message: turn.Message, *, timeout_s: float | None = None) -> None:
        """Add a message to the turn, before its partial answer (a tool's result, say). Idempotent by its ``id``.

        Raises: as `checkpoint`.
        """
        own = _checked(message)
        message_id = as_id(own.get("id"))
        with self._owned(timeout_s, message_id, f"{self.id}.answer") as (_, copy, owner):
            messages = copy.list(turn.MESSAGES)
            turn.add_once(messages, [json_codec.encode(own)], [message_id], before=messages.place_of(owner.answer_id))
            self._commit(copy, owner, owner.answer_id)

    @contextmanager
    def transaction(self, *, timeout_s: float | None = None) -> Iterator[Block]:
        """Change the session in one commit, as `Store.transaction` does, while it is this stream's.

        Messages that are added at the end go before the partial answer, as `append` puts them.

        Raises:
            StreamLost: the session is no longer this stream's. The block is not entered.
            SessionBusy: the block removes the partial answer, or the session.
            Otherwise as `Store.transaction`.
        """
        with self._owned(timeout_s) as (tx, copy, owner):
            block = Block(copy, lambda: require_free(tx))
            answer_id = owner.answer_id
            is_last = answer_id is not None and turn.is_last(copy.list(turn.MESSAGES), answer_id)
            yield block
            if is_last:
                turn.put_last(copy.list(turn.MESSAGES), answer_id)
            block.version = copy.commit_changes(checked(tx, copy)).header.version

    def update(self, function: Callable[[Block], Result], *, timeout_s: float | None = None) -> Result:
        """Call a function in a `transaction` of this stream, and return its result. See `Store.update`."""
        with self.transaction(timeout_s=timeout_s) as block:
            return block.result_of(function)

    def emit(self, *events: Any, durable: bool = False, timeout_s: float | None = None) -> int:
        """Add events for the followers of the stream (`Store.follow`), in this process and in others.

        The followers see the events at once. A call costs a few microseconds and takes no lock, except for the first
        call. The events outlive this process. On PostgreSQL they are written some 25 ms later. Each time that they
        outgrow `Store(keep_events_bytes=…)`, an emission drops the oldest ones, under the lock.

        Args:
            events: JSON values. Several values in one call are one write.
            durable: return only when the events would survive a power cut, too.
            timeout_s: seconds that the first call may wait for the session's lock, in the place of the store's
                `timeout_s`.

        Returns:
            The offset of the last event. The first event of a stream has offset 1.

        Raises:
            StreamLost: the session is no longer this stream's. The events were emitted nowhere. End the turn.
            NotJSON: an event cannot be kept. No event was emitted.
            EmitFailed: the disk refused.
            LockTimeout, LockError, CommitFailed, Unreadable, CorruptSession: at the first event, which looks at the
                session.
        """
        if not events:
            expected = "called with one event or more"
            raise errors.InvalidArgument(what="emit()", got="called with none", expected=expected)
        require_flags(durable=durable)
        if timeout_s is not None:
            seconds("timeout_s", timeout_s)
        encoded = list(map(json_codec.encode_exact, events))
        if not self._lease.is_held:
            raise self._lost(self._lease.why_not_held)
        try:
            if not self._events.is_open:
                with self._backend.engine.transaction(self.session_id, timeout_s) as tx:
                    head = tx.head()
                    self._require_ownership(head.header, active_in(head))
                    self._events.open()
            offset = self._events.append(encoded, durable=durable)
        except errors.SessionNotFound:
            raise self._lost("the session was deleted") from None
        except Fenced:
            raise self._lost("it has ended, was cancelled by force, or was cleared as stale") from None
        if self._events.is_full:
            self._drop_oldest_events()
        return offset

    def _drop_oldest_events(self) -> None:
        """Keep the events within their bound, if nobody holds the session just now.

        The emitted events stand. So a failure here is no error, and a later emission tries again.
        """
        try:
            with self._backend.engine.transaction(self.session_id, 0) as tx:
                head = tx.head()
                # Under the lock nobody else can end the stream. So no end line goes to the file that loses its name.
                self._require_ownership(head.header, active_in(head))
                self._events.drop_oldest()
        except errors.PersistError:
            self._events.postpone()

    def finish(
        self,
        message: turn.Message | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """End the turn with its answer, in one commit: the message, and the stream fields cleared.

        Args:
            message: the whole answer, in the place of the partial. None keeps the last checkpoint as it is.
            fields: top-level fields to set in the same commit: the tokens that it took, say.

        Raises: as `checkpoint`.
        """
        answer = None if message is None else turn.with_id(_checked(message), f"{self.id}.answer")
        with self._owned(timeout_s, *([] if answer is None else [answer["id"]])) as (_, copy, owner):
            answer_id = owner.answer_id
            if answer is not None:
                answer_id = turn.put_answer(copy.list(turn.MESSAGES), answer, owner.answer_id)
            if owner.once:
                turn.mark_answer(copy.list(turn.MESSAGES), answer_id, owner.prompt_id)
            if self._backend.answer_tool_calls:
                # An earlier try of this turn may have left some.
                _settle_tool_calls(copy, owner.prompt_id, tool_calls.drop_superseded)
            _set_fields(copy, fields)
            turn.end(copy)
            self._end(copy, "finished")

    def fail(self, *, timeout_s: float | None = None) -> None:
        """End the turn without an answer. Prompt and partial stay in `messages`, marked ``interrupted``.

        Raises: as `checkpoint`.
        """
        with self._owned(timeout_s) as (_, copy, owner):
            turn.interrupt(copy, owner.prompt_id, owner.answer_id)
            if self._backend.answer_tool_calls:
                _settle_tool_calls(copy, owner.prompt_id, tool_calls.repair)
            self._end(copy, "cancelled" if owner.cancelled else "failed")

    @contextmanager
    def _owned(
        self, timeout_s: float | None, *message_ids: Id | None
    ) -> Iterator[tuple[Transaction, WorkingCopy, StreamOwner]]:
        """Hold the session's lock for a block, and give it a working copy, if the session is still this stream's.

        The block is about to look for messages with these ids.
        """
        seeking = turn.MESSAGES, message_ids
        if not self._lease.is_held:
            raise self._lost(self._lease.why_not_held)
        is_inside = False
        try:
            with self._backend.engine.transaction(self.session_id, timeout_s, seeking=seeking) as tx:
                copy = WorkingCopy(tx.read(), tx)
                owner = self._require_ownership(copy.header, active_in(copy.committed))
                tx.lease = self._lease
                is_inside = True
                yield tx, copy, owner
        except errors.SessionNotFound:
            if is_inside:
                # The error comes from the caller's own block, which has looked for another session.
                raise
            raise self._lost("the session was deleted") from None

    def _commit(self, copy: WorkingCopy, owner: StreamOwner, answer_id: Id | None) -> None:
        """Commit the changes. If there are none, make the committed state durable."""
        changed = copy.changed()
        if changed is None and answer_id == owner.answer_id:
            copy.commit_changes(None)
        else:
            copy.commit(copy.header.next(owner=owner.to_header(answer_id=answer_id)), changed)

    def _end(self, copy: WorkingCopy, ended: Ended) -> None:
        """Commit the end of the turn, and give up the lease in the same hold of the lock."""
        copy.commit(copy.header.next(owner=None), end=End(self.id, ended))
        self._lease.close()
        self._events.close()

    def _close(self) -> None:
        self._lease.close()
        self._events.close()

    def _require_ownership(self, header: Header, active_stream_id: object) -> StreamOwner:
        """Return the owner, or raise `StreamLost`. A write makes this check, the fence, in its own hold of the lock."""
        if header.incarnation != self._incarnation:
            raise self._lost("the session was deleted and made anew")
        owner = owner_of(header, self.id)
        if owner is None or active_stream_id != self.id or header.epoch != self.epoch:
            raise self._lost("it has ended, was cancelled by force, or was cleared as stale")
        if not self._lease.is_held:
            raise self._lost(self._lease.why_not_held)
        return owner

    def _lost(self, reason: str) -> errors.StreamLost:
        return errors.StreamLost(session_id=self.session_id, stream_id=self.id, reason=reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lease.is_held:
            # The stream has ended, or has lost its authority for a while. It must not come back to life.
            self._close()
            return
        try:
            self.fail()
        except errors.StreamLost:
            # The process that took the session has marked the turn as interrupted already.
            pass
        except (errors.PersistError, OSError) as failure:
            if error is None:
                raise
            error.add_note(f"Stream {self.id} could not be marked as interrupted either: {failure}")
        finally:
            self._close()

    def __del__(self, _is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        lease = None if _is_ending() else getattr(self, "_lease", None)
        if lease is not None and (lease.is_held or lease.is_dropped):
            self._close()
            dropped = f"Stream {self.id} of session {self.session_id!r} was dropped without finish() or fail()"
            warnings.warn(f"{dropped}. It is stale now.", ResourceWarning, stacklevel=2, source=self)
