"""Session: one conversation in memory, and what it was on disk when it was last loaded or saved."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NoReturn, get_args
from weakref import ref

from persist import codec, streams, turn
from persist.errors import (
    LockNotHeld,
    MergeConflict,
    MessagesRemoved,
    NestedLock,
    PersistError,
    SessionDeleted,
    SessionNotFound,
    Unreadable,
    WrongType,
    conflicts_in,
    require_flags,
)
from persist.storage.body import BULK, Body
from persist.storage.change import between, data_of, have_same_data
from persist.storage.snapshot import Header, Snapshot, StreamOwner
from persist.storage.transaction import SessionFiles, Transaction
from persist.merge import MISSING, Policy, Preference, count_removed, merge, patch, same
from persist.turn import ACTIVE

# No document on disk has it: a base that carries it is always merged, never taken for the state of the disk.
_NO_CHECKSUM = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A commit that was begun: what it would have made of the document, and the state of `data` that it saved.

    `is_published` tells whether it became visible; None while that is not known.
    """

    header: Header
    merged: Body
    mine: Body
    is_published: bool | None = None


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The data that was saved, and what the commit made of it; they share objects."""

    saved: dict[str, Any]
    committed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Known:
    """What an object knows of the disk. One value: an exception that comes at any step finds all of it old, or all of it new.

    `base` is the merge base, kept as bytes: nested edits through an alias could not change it.
    """

    base: Snapshot
    is_durable: bool
    attempt: Attempt | None = None
    #: The header after this object's stream was cleared on disk. Its body is made of the base, once somebody needs it.
    cleared: Header | None = None

    @property
    def header(self) -> Header:
        return self.cleared or self.base.header


class _Visit:
    """A verb at work on an object. One that is gone has ended, even if an exception of a signal kept it from saying so."""

    __slots__ = ("__weakref__",)


class Session:
    """One conversation, loaded. Change `data` in place, then `save`.

    Attributes:
        id: the session's id.
        data: the document, a plain dict: ``json.dumps`` works on it, and nested edits count.

    Concurrency: any number of objects, threads and processes may have one session loaded. Threads may share one `Session`:
    what is saved is one state of `data`, and fields set and items appended while a save or refresh runs stay, and are saved by
    the next save. To move or remove items of a list meanwhile, take a lock of your own.
    """

    __slots__ = ("__weakref__", "_files", "_guard", "_known", "_pid", "_policies", "_visit", "data", "id")

    def __init__(
        self,
        files: SessionFiles,
        policies: Mapping[str, Policy],
        session_id: str,
        snapshot: Snapshot,
        *,
        is_durable: bool,
    ) -> None:
        self.id = session_id
        self.data: dict[str, Any] = snapshot.body.data()
        self._files = files
        self._policies = policies
        self._known = _Known(snapshot, is_durable)
        # Guards what is known, and data, between threads that share this object. Taken inside the session's lock, never
        # around it.
        self._guard = threading.RLock()
        self._visit: ref[_Visit] | None = None
        self._pid = os.getpid()

    def __setattr__(self, name: str, value: Any) -> None:
        # `session.title = …` on an object that takes any attribute would be lost at the next save, without a word.
        if name not in self.__slots__:
            raise AttributeError(
                f"A Session has no attribute {name!r} to set; the fields of its document are session.data[…]."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<persist.Session {self.id!r} at revision {self.revision}>"

    @property
    def _base(self) -> Snapshot:
        """The merge base; asked for by one thread at a time."""
        known = self._known
        if known.cleared is not None:
            data = known.base.body.data()
            _interrupt(data, known.base.header.owner)
            self._known = known = _Known(
                replace(known.base, header=known.cleared, body=Body.of(data)), known.is_durable
            )
        return known.base

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other threads that share this object out, and this one, if it is inside: a signal handler, a finaliser."""
        if self._pid != os.getpid():
            # A forked child. A thread that it did not inherit may have been in here, and have left things half done.
            if not self._guard.acquire(blocking=False):
                raise LockNotHeld(session_id=self.id)
            self._guard, self._pid = threading.RLock(), os.getpid()
        with self._guard:
            if self._visit is not None and self._visit() is not None:
                # What is under way goes on with what it has read, and would know nothing of what comes between.
                raise NestedLock(session_id=self.id, held=self.id)
            visit = _Visit()
            self._visit = ref(visit)
            try:
                yield
            finally:
                self._visit = None

    @property
    def revision(self) -> int:
        """The revision that `data` is based on; 0 for a file that `persist` has not written yet."""
        return self._known.header.revision

    @property
    def created_at(self) -> datetime:
        """When the session was created (aware, UTC)."""
        return self._known.header.created_at

    @property
    def updated_at(self) -> datetime:
        """When it was last changed (aware, UTC); repairs and ``touch=False`` do not count."""
        return self._known.header.updated_at

    @property
    def active_stream_id(self) -> str | None:
        """The stream that owned the session when it was loaded. It may be dead: ask `clear_stale_stream`."""
        return self.data.get(ACTIVE) or None

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Session stays in its process: hand its id over, and load it there.")

    def save(self, *, touch: bool = True, on_conflict: Preference = "error") -> None:
        """Write what this object changed; what others committed meanwhile is kept, and stands in `data` afterwards.

        Durable and visible on return. If nothing was changed, nothing is written. `data` and every object in it that is
        still there stay the same objects. After an error, memory and disk are as they were before.

        Args:
            touch: False keeps `updated_at`.
            on_conflict: whose value stands where both sides changed one place: ``"mine"``, ``"theirs"``, or ``"error"``. Where
                one side removed an item beside which the other added one, both stand then.

        Raises:
            MergeConflict: both sides changed one place; `refresh` after setting your edit aside, or name a side. Both moved the
                same items of a list, or one put something else in the place of a list: name a side or not.
            SessionDeleted: the session was deleted or replaced since it was loaded; load or create it again.
            NotJSON, WrongType: a value has no exact JSON form; it is named.
            ReservedField: a stream field was changed by hand; use the stream verbs.
            MessagesRemoved: committed messages would vanish in the middle of a turn; use `Store.update`.
            LockTimeout, NestedLock, CommitFailed, CommitUnknown, CorruptSession: see the errors.

        Concurrency: holds the session's lock for read, merge and write, across threads and processes.
        """
        if on_conflict not in get_args(Preference):
            raise WrongType(what="on_conflict", expected=" | ".join(get_args(Preference)), got=repr(on_conflict))
        require_flags(touch=touch)
        try:
            with conflicts_in(self.id), self._files.transaction(self.id) as tx, self._alone():
                self._save(tx, touch, on_conflict)
        except SessionNotFound:
            raise self._deleted() from None

    def _save(self, tx: Transaction, touch: bool, prefer: Preference) -> None:
        there = self._same_incarnation(tx.read(self._base if self._known.attempt is None else None))
        self._recognise(there)
        mine = Body.of(self.data, self._base.body)
        turn.refuse_changed_stream_fields(self._base.body.fields(), mine.fields())
        merged, decoded = self._merged(mine, there, prefer)
        self._refuse_removal(there, merged)
        if merged != there.body:
            header = there.header.next(touch=touch)
            try:
                self._known = _Known(self._base, is_durable=False, attempt=Attempt(header, merged, mine))
                committed = tx.commit(header, merged)
                self._settle(is_published=True)
            except PersistError:
                self._settle(is_published=tx.is_published)
                raise
            except BaseException:
                # Cut off by a signal, it may have become visible without a word. The lock is held still: what is there is ours.
                self._settle(is_published=tx.is_published or tx.shows(header))
                raise
        else:
            committed = there
            if self._known.is_durable and there.identity == self._base.identity:
                tx.require_known()
            else:
                tx.confirm()
        self._take(committed, mine, decoded, is_durable=True)

    def _settle(self, *, is_published: bool | None) -> None:
        """Note what became of an attempt; in a new value, so that a refresh under way sees that something has happened."""
        attempt = self._known.attempt
        if attempt is not None:
            self._known = replace(self._known, attempt=replace(attempt, is_published=is_published))

    def _recognise(self, there: Snapshot) -> None:
        """Take an earlier commit of this object for its own, though an exception (Ctrl-C, say) cut its save off.

        Taken for somebody else's, what it appended without an id would be appended again.
        """
        attempt = self._known.attempt
        if attempt is None:
            return
        if attempt.is_published or (there.header, there.body) == (attempt.header, attempt.merged):
            # Others may have committed on top of it: what it wrote is the base, and the disk is merged with that.
            self._take(Snapshot(attempt.header, attempt.merged, _NO_CHECKSUM), attempt.mine, is_durable=False)
        elif attempt.is_published is None and there.identity != self._base.identity:
            # The look after it was cut off, too. To merge what may be there already would add it once more.
            reason = "a save was cut off, and nobody can tell whether it was committed: load the session anew"
            raise MergeConflict(path=(), reason=reason, base=None, mine=None, theirs=None)
        else:
            self._known = _Known(self._base, is_durable=False)

    def _merged(self, mine: Body, there: Snapshot, prefer: Preference) -> tuple[Body, _Decoded | None]:
        """What the document becomes; with what was decoded for that, if anything was."""
        if have_same_data(self._base.body, mine):
            # What others committed is patched into `data` in place: the same keys may then stand there in another order.
            return there.body, None
        if there.identity == self._base.identity:
            return mine, None
        base, ours, theirs = data_of(self._base.body, mine, there.body)
        merged = _merge_data(base, ours, theirs, self._policies, prefer)
        return Body.of(merged), _Decoded(ours, merged)

    def _refuse_removal(self, there: Snapshot, merged: Body) -> None:
        """In the middle of a turn, messages that vanish are an accident (hermes-webui #4205)."""
        stream_id = there.active_stream_id
        if stream_id is None or all(each.is_items and not each.remove for each in between(there.body, merged)):
            return
        before, after = (body.data().get(turn.MESSAGES) for body in (there.body, merged))
        if type(before) is list and type(after) is not list:
            raise WrongType(what=f"field {turn.MESSAGES!r}", expected="a list, in a turn", got=type(after).__name__)
        if type(before) is list and (count := count_removed(before, after)):
            raise MessagesRemoved(session_id=self.id, stream_id=stream_id, count=count, revision=there.header.revision)

    def _take(self, committed: Snapshot, saved: Body, decoded: _Decoded | None = None, *, is_durable: bool) -> None:
        """Bring what others committed into `data`, in place. Edits made since `saved` was captured stay.

        `decoded`: what these two hold, if that is at hand.
        """
        if committed.body == saved:
            self._known = _Known(committed, is_durable)
            return
        current = Body.of(self.data, saved)
        if decoded is not None and current == saved:
            self._show(decoded.saved, decoded.committed, _Known(committed, is_durable))
            return
        base, now, theirs = data_of(saved, current, committed.body)
        try:
            wanted = _merge_data(base, now, theirs)
        except MergeConflict:
            # An edit made meanwhile contradicts theirs: it stays, and the next save reports it.
            self._known = _Known(replace(committed, body=saved, checksum=_NO_CHECKSUM), is_durable)
        else:
            self._show(now, wanted, _Known(committed, is_durable))

    def _show(self, now: dict[str, Any], wanted: dict[str, Any], known: _Known) -> None:
        """Bring `data` from `now` to `wanted`, in place, and take `known` for what the disk holds: both or neither."""
        try:
            patch(self.data, now, wanted)
            self._known = known
        except BaseException:
            # Cut off half-way (Ctrl-C, say): what stands in `data` already would pass for an edit, and be added once more.
            patch(self.data, codec.captured(self.data), wanted)
            self._known = known
            raise

    def refresh(self) -> None:
        """Take the committed state into `data`; unsaved edits are merged in and stay unsaved. Takes no lock.

        Raises:
            MergeConflict: an unsaved edit contradicts the committed state; nothing was changed. Set it aside first.
            SessionDeleted: the session was deleted or replaced; load or create it again.
            NestedLock: a signal handler asks for it, or a finaliser, in the middle of a save or refresh of this object.
            CorruptSession: the file is damaged.
        """
        while not self._refreshed():
            # Another thread has saved meanwhile: its newer base must not come under an older state.
            pass

    def _refreshed(self) -> bool:
        """Take the committed state; False if another thread that shares this object has been quicker."""
        known = self._known
        try:
            # Outside the guard: where folds follow one another, it takes the lock.
            there = self._files.read(self.id)
        except SessionNotFound:
            raise self._deleted() from None
        with self._alone(), conflicts_in(self.id):
            if self._known is not known:
                return False
            self._recognise(self._same_incarnation(there))
            if there.identity and there.identity == self._base.identity:
                return True
            base, now, theirs = data_of(self._base.body, Body.of(self.data, self._base.body), there.body)
            wanted = _merge_data(base, now, theirs, self._policies)
            self._show(now, wanted, _Known(there, is_durable=False))
            return True

    def clear_stale_stream(self) -> bool:
        """Clear this session's stream if it is dead: the compare-and-clear of hermes-webui #1533, across processes.

        The stream that this object shows is compared with the one **on disk, under the session's lock**, and its lease is
        asked in the same hold. Prompt and partial answer stay in ``messages``, marked ``interrupted``; the stream fields
        are reset; `updated_at` is kept.

        Returns:
            True if it was cleared (durably; `data` shows it). False if there is no stream, if it is alive, or if the
            session has moved on since it was loaded.

        Raises:
            LockTimeout, NestedLock, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        with self._alone():
            # Refused in the middle of another verb, before anything is cleared.
            stream_id = self.active_stream_id
        if stream_id is None:
            return False
        try:
            cleared = streams.clear_stale(self._files, self.id, stream_id, self._known.header.incarnation)
        except SessionNotFound:
            return False
        if cleared is None:
            return False
        with self._alone():
            is_shown = self._show_cleared(cleared)
        if not is_shown:
            # Deleted since: nothing to show. Unreadable: it is cleared all the same, and the next save shows it.
            with suppress(SessionNotFound, Unreadable):
                there = self._files.read(self.id)
                with self._alone():
                    self._adopt(there)
        return True

    def _show_cleared(self, cleared: streams.Cleared) -> bool:
        """Do in memory what was done on disk, without reading it; False if this object is based on another state."""
        known, before = self._known, cleared.before
        if known.attempt or known.cleared or not known.base.identity or known.base.header != before:
            return False
        if (
            before.owner is None
            or before.owner.stream_id != self.active_stream_id
            or _has_marks(self.data, before.owner)
        ):
            return False
        after = replace(known, is_durable=True, cleared=cleared.after)
        try:
            _interrupt(self.data, before.owner)
            self._known = after
        except BaseException:
            # Cut off half-way (Ctrl-C, say): once more, it is done only once.
            _interrupt(self.data, before.owner)
            self._known = after
            raise
        return True

    def _adopt(self, committed: Snapshot) -> None:
        if committed.header.incarnation != self._base.header.incarnation:
            return
        self._recognise(committed)
        if committed.header.revision <= self._base.header.revision:
            return  # another thread has saved this object since, and taken it
        base, now, theirs = data_of(self._base.body, Body.of(self.data, self._base.body), committed.body)
        try:
            wanted, known = _merge_data(base, now, theirs), _Known(committed, is_durable=False)
        except MergeConflict:
            # An unsaved edit contradicts the committed state: show that the stream is gone, leave the rest to the next save.
            wanted = turn.with_stream_fields_of(theirs, now)
            body = Body.of(turn.with_stream_fields_of(theirs, base))
            known = replace(self._known, base=replace(self._base, body=body, checksum=_NO_CHECKSUM))
        self._show(now, wanted, known)

    def _same_incarnation(self, there: Snapshot) -> Snapshot:
        if there.header.incarnation != self._base.header.incarnation:
            raise self._deleted()
        return there

    def _deleted(self) -> SessionDeleted:
        return SessionDeleted(session_id=self.id, path=self._files.layout.session(self.id).document)


def _interrupt(data: dict[str, Any], owner: StreamOwner | None) -> None:
    if owner is not None:
        turn.interrupt(data, owner.prompt_id, owner.answer_id)


def _has_marks(data: dict[str, Any], owner: StreamOwner) -> bool:
    """Whether somebody has said of the turn's messages that they are interrupted, or that they are not."""
    messages = data.get(turn.MESSAGES)
    if type(messages) is not list:
        return False
    places = (turn.find(messages, message_id) for message_id in (owner.prompt_id, owner.answer_id))
    return any(place is not None and turn.INTERRUPTED in messages[place] for place in places)


def _merge_data(
    base: dict[str, Any],
    mine: dict[str, Any],
    theirs: dict[str, Any],
    policies: Mapping[str, Policy] | None = None,
    prefer: Preference = "error",
) -> dict[str, Any]:
    """Merge, with the stream fields from the disk whatever the caller prefers: None over a live stream is #1533 itself."""
    base, mine = (turn.with_stream_fields_of(theirs, side) for side in (base, mine))
    merged = merge(base, mine, theirs, policies, prefer=prefer)
    if prefer != "error":
        _refuse_lost_list(base, mine, theirs, merged, prefer)
    return merged


def _refuse_lost_list(
    base: dict[str, Any], mine: dict[str, Any], theirs: dict[str, Any], merged: dict[str, Any], prefer: Preference
) -> None:
    """To prefer what is no list would drop what the other side has added to it."""
    dropped = theirs if prefer == "mine" else mine
    for name in BULK:
        three = [side.get(name, MISSING) for side in (base, mine, theirs)]
        lost = dropped.get(name)
        if type(lost) is list and type(merged.get(name)) is not list and not same(lost, three[0]):
            reason = "one side has changed this list, and the other put something else in its place"
            raise MergeConflict(path=(name,), reason=reason, base=three[0], mine=three[1], theirs=three[2])


@dataclass(frozen=True, slots=True)
class Head:
    """The small fields of a session, as committed. It has no `save`: a part must never be written as the whole.

    Attributes:
        data: the small fields; ``messages`` and ``tool_calls`` are left out.
        counts: the number of items of each field that was left out.
    """

    id: str
    revision: int
    created_at: datetime
    updated_at: datetime
    active_stream_id: str | None
    data: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
