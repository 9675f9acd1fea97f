"""The session: one conversation in memory, and its state on disk at the last load or save."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn, get_args

import msgspec
from msgspec import structs

from persist import errors, json_codec, streams, turn
from persist.arguments import require_flags
from persist.content_merge import decode_like, merge_contents, with_stream_fields_of
from persist.engine import Committed, Transaction, decoding
from persist.merge import Policy, Preference, count_removed
from persist.patch import patch
from persist.storage import diff
from persist.storage.content import Content, Items, decode, encoded, load
from persist.storage.document import Header
from persist.streams import Backend
from persist.transaction import refuse_changed_stream_fields
from persist.translating import Translating, conflicts_in

_PREFERENCES = get_args(Preference)


class _Base(msgspec.Struct, frozen=True, eq=False):
    """The state of the disk that an object knows.

    It is one value, so that an exception leaves all of it old, or all of it new.

    Attributes:
        header: the header of the commit that `data` is based on.
        content: the merge base.
        is_durable: whether this object has made that commit durable.
        is_whole: whether the merge base is the content of that commit. It is not, while an edit contradicts a later
            commit.
        tried: the id of a commit that was begun and whose end was not seen, with the content that was to be saved.
    """

    header: Header
    content: Content
    is_durable: bool
    is_whole: bool = True
    tried: tuple[str, Content] | None = None


class _Written(msgspec.Struct, frozen=True, eq=False):
    """A save that another thread has written.

    Attributes:
        committed: the session after the save.
        mine: the state of `data` that was saved.
        changes: the changes that others have committed before, in the values that stand apart.
    """

    committed: Committed
    mine: Content
    changes: tuple[diff.Change, ...]


class Overtaken(Exception):
    """Raised when the content that was encoded for a save is based on a state that the object has left."""


class _Alone:
    """A block for one thread at a time. Dropping it leaves it, because Ctrl-C may come between any two steps."""

    __slots__ = ("_guard",)

    def __init__(self, guard: threading.RLock) -> None:
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.acquire()

    def __exit__(self, *_error: object) -> None:
        # No thread enters twice, so a guard that this thread owns is this block's.
        if self._guard._is_owned():  # type: ignore[attr-defined]
            self._guard.release()

    __del__ = __exit__


class Session:
    """A loaded conversation. Change `data` in place, then call `save`.

    Attributes:
        id: the session's id.
        data: the document as a plain dict. ``json.dumps`` works on it, and nested edits count.

    Concurrency: any number of objects, threads and processes may have one session loaded. One object is for one thread
    at a time, like a database session. `save` and `refresh` of one object exclude each other. A save writes the
    state of `data` that it has encoded, and the next save writes a later edit.
    """

    __slots__ = ("__weakref__", "_backend", "_base", "_guard", "_pid", "_policies", "data", "id")

    def __init__(
        self, backend: Backend, policies: Mapping[str, Policy], session_id: str, found: Committed, *, is_durable: bool
    ) -> None:
        self.id = session_id
        with decoding(session_id, backend.engine.where(session_id)):
            self.data: dict[str, Any] = found.content.decode()
        self._backend = backend
        self._policies = policies
        self._base = _Base(found.header, found.content, is_durable)
        # The guard is taken inside the session's lock, never around it. It knows its thread, so that a signal handler
        # gets an error instead of waiting for the thread that it interrupted.
        self._guard = threading.RLock()
        self._pid = os.getpid()

    def __setattr__(self, name: str, value: Any) -> None:
        # If the object took any attribute, `session.title = …` would be lost at the next save, without a word.
        if name not in self.__slots__:
            raise AttributeError(
                f"A Session has no attribute {name!r} to set; the fields of its document are session.data[…]."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<persist.Session {self.id!r} at revision {self.revision}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Session stays in its process: hand its id over, and load it there.")

    def _alone(self) -> _Alone:
        """Return a block that keeps the verbs of other threads out of this object.

        Raises:
            LockError: this thread is inside already, and its signal handler or a finaliser asks again.
        """
        if self._pid != os.getpid():
            # Another thread may have been inside when this child was forked. That thread does not exist here, so its
            # verb counts as one that was cut off.
            self._guard, self._pid = threading.RLock(), os.getpid()
        if self._guard._is_owned():  # type: ignore[attr-defined]
            raise errors.nested(self.id, held=self.id)
        return _Alone(self._guard)

    @property
    def revision(self) -> int:
        """The revision that `data` is based on, or 0 for a file that `persist` has not written yet."""
        return self._base.header.revision

    @property
    def version(self) -> str:
        """The version that `data` is based on, for ``if_version=``: an opaque string that no other commit has."""
        return self._base.header.version

    @property
    def created_at(self) -> datetime:
        """The time when the session was created (aware, UTC)."""
        return self._base.header.created_at

    @property
    def updated_at(self) -> datetime:
        """The time of the last change (aware, UTC). Repairs and changes with ``touch=False`` do not count."""
        return self._base.header.updated_at

    @property
    def active_stream_id(self) -> str | None:
        """The stream that owned the session when it was loaded. It may be dead: ask `clear_stale_stream`."""
        return self.data.get(turn.ACTIVE) or None

    # --- saving ---

    def save(self, *, touch: bool = True, on_conflict: Preference = "error", timeout_s: float | None = None) -> str:
        """Write the changes of this object, and keep the commits that others made meanwhile.

        Afterwards `data` shows the changes of others, too. The commit is durable and visible on return. If nothing was
        changed, nothing is written. `data` and every object in it that is still there stay the same objects. After an
        error, memory and disk are as they were before.

        Args:
            touch: False keeps `updated_at`.
            on_conflict: the side whose value stands if both sides changed one place: ``"mine"`` or ``"theirs"``.
                ``"error"`` raises. With a side, two cases are no conflict, and both changes stand. In the first case,
                one side removed an item, and the other side added one beside it. In the second case, both sides edited
                an item that has no id of its own.
            timeout_s: seconds to wait for the session's lock, in the place of the store's `timeout_s`.

        Returns:
            The version that `data` is based on now.

        Raises:
            MergeConflict: both sides changed one place. Put `base` back, `refresh`, and edit anew, or name a side. Two
                cases raise it even if a side is named. Both sides moved the same items of a list, or one side put
                something else in the place of a list.
            SessionDeleted: the session was deleted or replaced since it was loaded. Load or create it again.
            NotJSON, InvalidArgument: a value has no exact JSON form. The error names it.
            InvalidArgument: a stream field was changed by hand. Use the stream verbs.
            MergeConflict: committed messages would vanish in the middle of a turn. Use `Store.transaction`.
            LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: see the errors.

        Concurrency: holds the session's lock for read, merge and write, across threads and processes.
        """
        require_save_options(touch, on_conflict)
        try:
            with self._backend.engine.transaction(self.id, timeout_s) as tx, self._alone():
                self._recognise(tx.read())
                mine = self._encode()
                self._take(self._write(tx, mine, touch, on_conflict), mine, is_durable=True)
                return self.version
        except errors.SessionNotFound:
            raise self._deleted() from None

    def _encode(self) -> Content:
        """Encode `data` as it is now. A save writes this state."""
        mine = encoded(self.data, self._base.content)
        refuse_changed_stream_fields(self._base.content, mine)
        return mine

    def _write_apart(self, base: _Base, mine: Content, touch: bool, prefer: Preference, timeout_s: float) -> _Written:
        """Do the part of a save that another thread may do for an event loop. It does not touch `data`.

        Before that, the loop's thread encodes `mine` on the same base. Afterwards it shows the result with
        `_take_written`.

        Raises:
            Overtaken: a save of this object by another loop came between.
        """
        try:
            with self._backend.engine.transaction(self.id, timeout_s) as tx:
                if self._base is not base:
                    raise Overtaken
                self._refuse_other(tx.read())
                committed = self._write(tx, mine, touch, prefer)
                changes = diff.between(mine, committed.content)
                return _Written(committed, mine, changes)
        except errors.SessionNotFound:
            raise self._deleted() from None

    def _take_written(self, written: _Written) -> None:
        """Bring the earlier commits of others into `data`, after another thread has written a save."""
        committed, mine, changes = written.committed, written.mine, written.changes
        is_added = committed.content.fields == mine.fields and all(
            each.is_splice and not each.remove for each in changes
        )
        # Added items need no look at the rest, which would block the loop.
        if not (is_added and changes and self._show_changes(mine, committed, changes)):
            self._take(committed, mine, is_durable=True)

    def _write(self, tx: Transaction, mine: Content, touch: bool, prefer: Preference) -> Committed:
        """Commit the changes that `mine` made to the merge base, and return the committed session.

        It does not touch `data`.
        """
        there, base = tx.read(), self._base
        is_current = base.is_whole and there.header.commit == base.header.commit
        if is_current:
            there, merged = Committed(there.header, base.content), mine
        elif mine == base.content:
            load(there.content)
            merged = there.content
        else:
            # The object shows the result after the lock is given up.
            load(there.content)
            merged = merge_contents(base.content, mine, there.content, self._policies, prefer)
        if merged != there.content:
            # This object's base shares the unchanged values with `mine`, so they need no comparison.
            changes = diff.between(base.content if is_current else there.content, merged)
            self._refuse_removal(there, merged, changes)
            streams.refuse_twins(there.header, there.content, merged)
            header = there.header.next(touch=touch)
            self._base = structs.replace(base, is_durable=False, tried=(header.commit, mine))
            try:
                committed = tx.commit(header, merged, changes)
            except errors.CommitFailed:
                self._base = structs.replace(base, is_durable=False)
                raise
        else:
            tx.confirm(is_durable=base.is_durable and is_current)
            committed = there
        return committed

    def _refuse_other(self, there: Committed) -> None:
        """Refuse another session of the same id."""
        if there.header.incarnation != self._base.header.incarnation:
            raise self._deleted()

    def _recognise(self, there: Committed) -> None:
        """Refuse another session of the same id, and learn the outcome of a save that was cut off.

        The items that such a save appended without an id must not be appended again.
        """
        self._refuse_other(there)
        base = self._base
        if base.tried is None:
            return
        commit_id, mine = base.tried
        if there.header.commit == commit_id:
            load(there.content)
            self._take(there, mine, is_durable=False)
        elif there.header.commit == base.header.commit:
            self._base = structs.replace(base, tried=None)
        else:
            clash = "was being saved when that was cut off, and nobody can tell whether it was committed"
            remedy = "This object cannot be used any more: load the session anew, and look."
            raise errors.MergeConflict(path=(), reason="a save was cut off", clash=clash, remedy=remedy)

    def _refuse_removal(self, there: Committed, merged: Content, changes: tuple[diff.Change, ...]) -> None:
        """Refuse to remove messages in the middle of a turn, because there it is an accident (hermes-webui #4205)."""
        stream_id = streams.active_in(there.content)
        if stream_id is None or all(each.is_splice and not each.remove for each in changes):
            return
        before, after = (
            None if (value := content.get(turn.MESSAGES)) is None else decode(value)
            for content in (there.content, merged)
        )
        if type(before) is list and type(after) is not list:
            what, expected = f"field {turn.MESSAGES!r}", "a list, in a turn"
            raise errors.InvalidArgument(what=what, expected=expected, got=type(after).__name__)
        if type(before) is list and (count := count_removed(before, after)):
            clash = f"would lose {count} committed messages by this save, while stream {stream_id} is active"
            version = there.header.version
            remedy = f"If it is meant, use store.transaction(id, if_version={version!r})."
            facts = {"stream_id": stream_id, "count": count, "version": version, "clash": clash, "remedy": remedy}
            reason = "a turn is running"
            raise errors.MergeConflict(path=(turn.MESSAGES,), reason=reason, session_id=self.id, **facts)

    # --- taking what others committed ---

    def _take(self, committed: Committed, mine: Content, *, is_durable: bool) -> None:
        """Bring the commits of others into `data`, in place.

        `mine` is the state of `data` that was compared with the committed one.
        """
        if committed.content == mine:
            self._base = _Base(committed.header, committed.content, is_durable)
            return
        try:
            # Edits that another task of an event loop has made since stay.
            self._merge_in(committed, mine, is_durable=is_durable)
        except errors.PersistError:
            # Such an edit contradicts the commits of others, or it is no JSON. It stays, and the next save reports it.
            self._base = structs.replace(self._base, content=mine, is_whole=False, tried=None)

    def _merge_in(self, there: Committed, base: Content, *, is_durable: bool) -> None:
        """Bring the differences between `base` and the committed state into `data`."""
        current = encoded(self.data, base)
        wanted = merge_contents(base, current, there.content, self._policies, "error")
        self._show(current, wanted, _Base(there.header, there.content, is_durable))

    def _show(self, current: Content, wanted: Content, known: _Base) -> None:
        """Change `data` in place, from the current state to the wanted one. Then it is based on `known`."""
        try:
            self._patch(current, wanted)
            self._base = known
        except BaseException:
            # After Ctrl-C the rest is shown, too. Else the next verb would take the part that was shown for an edit.
            self._patch(encoded(self.data, current), wanted)
            self._base = known
            raise

    def _patch(self, current: Content, wanted: Content) -> None:
        now: dict[str, Any] = {}
        then: dict[str, Any] = {}
        # A caller's key may hold both halves of a surrogate pair. It stays that key.
        own = {json_codec.joined(name): name for name in self.data}
        for name in dict.fromkeys(name for name, _ in (*current, *wanted)):
            one, other = current.get(name), wanted.get(name)
            if one != other:
                key = own.get(name, name)
                now |= {} if one is None else {key: decode(one)}
                then |= {} if other is None else {key: decode_like(one, now.get(key), other)}
        stay = {name: value for name, value in self.data.items() if name not in now}
        patch(self.data, stay | now, stay | then)

    def refresh(self) -> None:
        """Bring the committed state into `data`. Unsaved edits are merged in and stay unsaved. Takes no lock.

        Raises:
            MergeConflict: an unsaved edit contradicts the committed state. Nothing was changed. Set the edit aside
                first.
            SessionDeleted: the session was deleted or replaced. Load or create it again.
            LockError: a signal handler or a finaliser asks for it in the middle of a save or refresh of this object.
            CorruptSession: the file is damaged.
        """
        while True:
            before = self._base
            # Outside the guard, because the read takes the session's lock where folds follow one another.
            there = self._read()
            with self._decoding(), self._alone(), conflicts_in(self.id):
                if self._base is before:
                    self._refresh(there)
                    return

    def _refresh(self, there: Committed) -> None:
        """Bring the state that was read into `data`, in place."""
        self._recognise(there)
        if there.header.commit != self._base.header.commit:
            self._merge_in(there, self._base.content, is_durable=False)

    def _read_apart(self) -> Committed:
        """Do the part of a refresh that another thread may do for an event loop. It does not touch `data`."""
        there, base = self._read(), self._base
        if there.header.commit != base.header.commit:
            _split(base.content, there.content)
        return there

    def _read(self) -> Committed:
        try:
            return self._backend.engine.read(self.id)
        except errors.SessionNotFound:
            raise self._deleted() from None

    # --- the stale stream ---

    def clear_stale_stream(self, *, timeout_s: float | None = None) -> bool:
        """Clear this session's stream if it is dead: the compare-and-clear of hermes-webui #1533, across processes.

        The stream that this object shows is compared with the one **on disk, under the session's lock**. Its lease is
        tried in the same hold of the lock. Prompt and partial answer stay in ``messages``, marked ``interrupted``. The
        stream fields are reset, and `updated_at` is kept.

        Args:
            timeout_s: seconds to wait for the session's lock, in the place of the store's `timeout_s`.

        Returns:
            True if the stream was cleared. The clear is durable, and `data` shows it. A message that was marked is a
            new object there. False if there is no stream, if it is alive, or if the session has moved on since it was
            loaded.

        Raises:
            LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        # A call in the middle of another verb is refused here, before anything is cleared.
        self._alone()
        if self._base.tried is not None:
            # The outcome of a save that was cut off can be seen only before the clear.
            there = self._read()
            with self._alone():
                self._recognise(there)
        stream_id = self.active_stream_id
        cleared = self._clear(stream_id, timeout_s)
        if cleared is not None:
            try:
                with self._alone():
                    self._show_cleared(cleared)
            except errors.Unreadable:
                pass  # it is cleared, and the next verb meets the disk again
        return cleared is not None

    def _clear(self, stream_id: str | None, timeout_s: float | None) -> streams.Cleared | None:
        """Commit the clear of a stream, if it is dead. It does not touch `data`."""
        if stream_id is None:
            return None
        incarnation = self._base.header.incarnation
        try:
            return streams.clear_stale(
                self._backend, self.id, stream_id, incarnation, is_whole=True, timeout_s=timeout_s
            )
        except errors.SessionNotFound:
            return None

    def _show_cleared(self, cleared: streams.Cleared) -> None:
        """Bring a committed clear into `data`. An unsaved edit that contradicts it stays, but not in stream fields."""
        there = cleared.after
        self._recognise(there)
        is_shown = False
        try:
            is_base = self._base.is_whole and self._base.header.commit == cleared.before.header.commit
            is_shown = is_base and self._show_changes(self._base.content, cleared.after, cleared.changes)
        finally:
            # Also after Ctrl-C, because the next verb would take a half-shown clear for an edit.
            if not is_shown:
                self._show_merged(there)

    def _show_changes(self, base: Content, after: Committed, changes: tuple[diff.Change, ...]) -> bool:
        """Bring a commit on top of `base` into `data`, without a look at the rest of `data`.

        Args:
            base: the content of `data` without unsaved edits.
            changes: the changes from `base` to `after`, in the values that stand apart.

        Returns:
            Whether that was done. It is not done if an unsaved edit has touched a value that the commit changed.
        """
        wanted, data = after.content, self.data
        names = [name for name in {**base.fields, **wanted.fields} if base.fields.get(name) != wanted.fields.get(name)]
        for name in names:
            if (json_codec.encode_unchecked(data[name]) if name in data else None) != base.fields.get(name):
                return False
        slices = []
        for change in changes:
            items, live, stop = base.get(change.name), data.get(change.name), change.at + change.remove
            if not (change.is_splice and isinstance(items, Items) and type(live) is list and len(live) == len(items)):
                return False
            old, new = items.last(len(items) - change.at)[: change.remove], list(map(bytes, change.insert))
            if json_codec.encode_all_unchecked(live[change.at : stop]) != old:
                return False
            # A changed message becomes another object, because this one may stand elsewhere in `data`, too.
            shown = [
                live[change.at + at] if old[at : at + 1] == [item] else json_codec.decode(item)
                for at, item in enumerate(new)
            ]
            slices.append((live, slice(change.at, stop), shown))
        for live, place, shown in slices:
            live[place] = shown
        for name in names:
            data.pop(name, None)
        data |= {name: json_codec.decode(wanted.fields[name]) for name in names if name in wanted.fields}
        self._base = _Base(after.header, wanted, is_durable=True)
        return True

    def _show_merged(self, there: Committed) -> None:
        base = self._base
        try:
            self._merge_in(there, base.content, is_durable=True)
        except errors.MergeConflict:
            current = encoded(self.data, base.content)
            content = with_stream_fields_of(there.content, base.content)
            known = structs.replace(base, content=content, is_whole=False)
            self._show(current, with_stream_fields_of(there.content, current), known)
        except errors.PersistError:
            # An edit is no JSON. It stays, and the next save reports it.
            for name in turn.IDLE:
                self.data.pop(name, None)
                if (value := there.content.get(name)) is not None:
                    self.data[name] = decode(value)
            content = with_stream_fields_of(there.content, base.content)
            self._base = structs.replace(base, content=content, is_whole=False, tried=None)

    def _deleted(self) -> errors.SessionDeleted:
        return errors.SessionDeleted(session_id=self.id, path=self._backend.engine.where(self.id))

    def _decoding(self) -> Translating[None]:
        return decoding(self.id, self._backend.engine.where(self.id))


def require_save_options(touch: bool, on_conflict: Preference) -> None:
    """Raise `InvalidArgument` for invalid options of a save."""
    if on_conflict not in _PREFERENCES:
        got = errors.shown(on_conflict)
        raise errors.InvalidArgument(what="on_conflict", got=got, expected=" | ".join(_PREFERENCES))
    require_flags(touch=touch)


def _split(*contents: Content) -> None:
    """Split the lists of contents into their items, because a comparison needs the items."""
    for content in contents:
        for value in content.apart.values():
            if isinstance(value, Items):
                value.split()
