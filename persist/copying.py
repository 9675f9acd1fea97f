"""Copying: the sessions of one store into another one, on any engine: files into a database, and back.

    persist copy var/sessions postgresql://db/chats      while the servers run: most of the work
    persist copy var/sessions postgresql://db/chats      with the servers stopped: the sessions that have changed since

A copy is whole. Every value has the same JSON text, and the header has the same version, revision, epoch and times. So
a version that a client has seen names the same commit in both stores. Events are not copied.

The header of a copy names the store and the commit that it is a copy of, where the header of another session may name
its stream. A commit to the copy has an id of its own. So nobody has changed a copy as long as it names its own commit,
and only then a later copy takes its place. Nothing else is remembered. A run that was killed is repeated, and goes on.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import msgspec

from persist import errors, streams
from persist.arguments import is_url, require_flags
from persist.engine import Committed, Engine, decoding
from persist.maintenance import Step
from persist.storage.content import as_json, load
from persist.storage.document import Header
from persist.storage.layout import command
from persist.store import Store

#: The key of the mark in the header's `owner`.
_MARK = "copy_of"
#: These errors are of one session, or of the store that is copied. Any other error of the destination ends the copy.
_OF_A_SESSION = (
    errors.SessionExists,
    errors.CorruptSession,
    errors.UnsupportedFormat,
    errors.LockTimeout,
    errors.InvalidArgument,
    errors.TooLarge,
)


class CopyOf(msgspec.Struct, frozen=True):
    """The mark of a copy: the name of the store that it was copied from, and the id of the commit."""

    store: str
    commit: str


@dataclass(frozen=True, slots=True)
class Copy:
    """The result of a copy and of the comparison behind it. Each list holds session ids.

    Attributes:
        copied: the sessions that were written.
        unchanged: the sessions whose copy was of the same version already.
        gone: the copies whose session the source no longer has. They stay.
        removed: the copies whose session the source no longer has, and that were removed, because `prune` said so.
        equal: the sessions whose two documents are equal.
        behind: the sessions that have changed in the source since they were copied. Copy again.
        different: the sessions whose two documents differ, although their versions are the same. One was damaged.
        failures: the errors of the sessions that were not copied, or could not be compared, by the session's id.
    """

    copied: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the destination has every session of the source, equal, and no copy of a session that is gone."""
        return not (self.gone or self.behind or self.different or self.failures)

    def add(self, other: Copy) -> None:
        """Add the result of a further step."""
        for name in ("copied", "unchanged", "gone", "removed", "equal", "behind", "different"):
            getattr(self, name).extend(getattr(other, name))
        self.failures.update(other.failures)


def copy(source: Store, destination: Store, *, prune: bool = False, timeout_s: float | None = None) -> Copy:
    """Copy all sessions of a store into another one, and compare every document with its copy. Durable on return.

    Servers may go on in the source. Nobody should write to the destination yet. A session whose copy has the same
    version already is not written again.

    A copy that has a later revision than its session stays, because another run may have written it just now. If an
    older backup was put back in the source, delete the session in the destination first.

    Args:
        prune: remove the copies of sessions that the source no longer has. Without it they stay.
        timeout_s: seconds to wait for each lock, in the place of the stores' `timeout_s`.

    Returns:
        The sessions that were copied, and the errors of those that were not. Such an error does not keep the copy from
        the other sessions. `SessionBusy` is the error of a session whose stream is alive. `SessionExists` is the error
        of a session that the destination has on its own, or that was changed there. It is left alone.

    Raises:
        InvalidArgument: both are the same store. Or copies are to be removed, and the source has no session of them.
        Unreadable, CommitFailed, CommitUnknown: the destination refused. Repeat the copy: what is copied stands.

    Example:
        >>> import persist, tempfile
        >>> from persist.copying import copy
        >>> here, there = persist.Store(tempfile.mkdtemp()), persist.Store(tempfile.mkdtemp())
        >>> session = here.create("s-42", {"messages": [{"id": "m1", "content": "hi"}]})
        >>> copy(here, there).copied, copy(here, there).unchanged
        (['s-42'], ['s-42'])
        >>> there.load("s-42").version == session.version
        True
    """
    done, engines = Copy(), (source._open().engine, destination._open().engine)
    for step in copying(*engines, prune=prune, timeout_s=timeout_s):
        done.add(step.found)
    for step in comparing(*engines, leave_out=done.failures.keys()):
        done.add(step.found)
    return done


# --- copying ---------------------------------------------------------------------------------------------------------


def copying(
    source: Engine, destination: Engine, *, prune: bool = False, timeout_s: float | None = None
) -> Iterator[Step[Copy]]:
    """Copy one session after the other. Each step holds the result of one."""
    require_flags(prune=prune)
    if source.place == destination.place:
        what, got = "the destination of a copy", f"{destination.place}, the source itself"
        raise errors.InvalidArgument(what=what, got=got, expected="another store")
    session_ids, there = source.session_ids(), destination.session_ids()
    known = set(session_ids)
    others = [each for each in there if each not in known]
    if prune and known.isdisjoint(there) and any(_is_copy_from(source, destination, each) for each in others):
        # The disk of the source may not be mounted. Then a server may have begun a new store in its place.
        what, got = f"the store {source.place}", "without any of the sessions in the destination"
        raise errors.InvalidArgument(what=what, got=got, expected="one with some of them, to remove copies")
    total = len(session_ids) + len(others)
    for done, session_id in enumerate(session_ids, 1):
        yield Step(done, total, _copy(source, destination, session_id, timeout_s))
    for done, session_id in enumerate(others, len(session_ids) + 1):
        yield Step(done, total, _look_at_other(source, destination, session_id, timeout_s, prune=prune))


def _copy(source: Engine, destination: Engine, session_id: str, timeout_s: float | None) -> Copy:
    found = Copy()
    try:
        there = _version_in(destination, session_id)
    except _OF_A_SESSION as error:
        found.failures[session_id] = error
        return found
    try:
        if source.read_head(session_id).header.version == there:
            found.unchanged.append(session_id)
            return found
        committed = _read_at_rest(source, session_id, timeout_s)
    except errors.SessionNotFound:
        # It was deleted since the listing.
        return found
    except (errors.PersistError, OSError) as error:
        found.failures[session_id] = error
        return found
    try:
        is_new = _put(destination, session_id, committed, _name_of(source), timeout_s)
    except _OF_A_SESSION as error:
        found.failures[session_id] = error
        return found
    (found.copied if is_new else found.unchanged).append(session_id)
    return found


def _version_in(destination: Engine, session_id: str) -> str | None:
    with contextlib.suppress(errors.SessionNotFound):
        return destination.read_head(session_id).header.version
    return None


def _read_at_rest(source: Engine, session_id: str, timeout_s: float | None) -> Committed:
    """Read a session on which no stream runs, not even a dead one: only its own store knows what that has left."""
    found = source.read(session_id)
    if streams.active_in(found.content) is None:
        return found
    with source.transaction(session_id, timeout_s) as tx:
        streams.require_free(tx, " It is copied once the stream has ended.")
        stream_id = streams.active_in(tx.head())
        if stream_id is not None:
            reason = f"Session {session_id!r} is not copied: its stream {stream_id} is dead, and was not cleared."
            remedy = f"Clear it with {command('clear-stale', source.place)}, and copy again."
            raise errors.PersistError(session_id=session_id, stream_id=stream_id, reason=reason, remedy=remedy)
        found = tx.read()
        load(found.content)
        return found


def _put(destination: Engine, session_id: str, found: Committed, store: str, timeout_s: float | None) -> bool:
    """Write a copy. Tell whether it was not there already, or a later one."""
    mark = CopyOf(store, found.header.commit)
    owner = {_MARK: msgspec.to_builtins(mark)}
    header = found.header.but(journal=None, folded=None, session_id=None, owner=owner)
    with destination.transaction(session_id, timeout_s) as tx:
        if tx.exists():
            there = tx.head().header
            if there.version == header.version:
                return False
            before = _mark_of(there)
            # A store may have another name by now. Then the incarnation tells that it is the same session.
            is_same = there.incarnation == header.incarnation
            if before is None or (before.store != store and not is_same):
                remedy = "It was changed there, or is no copy of this session, and is left alone. "
                remedy += "Look at both with 'persist show', delete one of them, and copy again."
                raise errors.SessionExists(session_id=session_id, path=tx.place, remedy=remedy)
            if is_same and there.revision > header.revision:
                # Another copy has read the session later, and was faster.
                return False
        tx.put(header, found.content)
        return True


def _name_of(store: Engine) -> str:
    """Return a store's name for marks. Two machines may have directories of one name."""
    return str(store.place) if is_url(store.place) else f"{socket.gethostname()}:{store.place}"


def _mark_of(header: Header) -> CopyOf | None:
    """Return the mark of a copy that nobody has changed, or None."""
    try:
        mark = msgspec.convert((header.owner or {}).get(_MARK), CopyOf)
    except (msgspec.ValidationError, UnicodeEncodeError):
        return None
    return mark if mark.commit == header.commit else None


def _is_copy_from(source: Engine, destination: Engine, session_id: str) -> bool:
    """Tell whether a session is an unchanged copy of one that this source has, or had."""
    with contextlib.suppress(*_OF_A_SESSION, errors.SessionNotFound):
        mark = _mark_of(destination.read_head(session_id).header)
        return mark is not None and mark.store == _name_of(source)
    return False


def _look_at_other(
    source: Engine, destination: Engine, session_id: str, timeout_s: float | None, *, prune: bool
) -> Copy:
    """Look at a session that only the destination has. It may be the copy of one that was deleted."""
    found = Copy()
    try:
        # The session may have been created since the listing.
        if not _is_copy_from(source, destination, session_id) or source.exists(session_id):
            return found
        if not prune:
            found.gone.append(session_id)
            return found
        with destination.transaction(session_id, timeout_s) as tx:
            if tx.exists() and _mark_of(tx.head().header) is not None:
                tx.delete()
                found.removed.append(session_id)
    except _OF_A_SESSION as error:
        found.failures[session_id] = error
    return found


# --- comparing -------------------------------------------------------------------------------------------------------


def comparing(source: Engine, destination: Engine, *, leave_out: Collection[str] = ()) -> Iterator[Step[Copy]]:
    """Compare each document of the source with its copy, as both stores read them now. Each step holds one result.

    Two documents are equal if they have the same names in the same order, the same JSON text for each, byte for byte,
    and the same version, revision, epoch and times.
    """
    session_ids = [each for each in source.session_ids() if each not in leave_out]
    for done, session_id in enumerate(session_ids, 1):
        yield Step(done, len(session_ids), _compare(source, destination, session_id))


def _compare(source: Engine, destination: Engine, session_id: str) -> Copy:
    found = Copy()
    try:
        mine = source.read(session_id)
    except errors.SessionNotFound:
        return found
    except (errors.PersistError, OSError) as error:
        found.failures[session_id] = error
        return found
    try:
        theirs = destination.read(session_id)
        if mine.header.version != theirs.header.version:
            found.behind.append(session_id)
        elif _facts(source, session_id, mine) == _facts(destination, session_id, theirs):
            found.equal.append(session_id)
        else:
            found.different.append(session_id)
    except errors.SessionNotFound:
        found.behind.append(session_id)
    except _OF_A_SESSION as error:
        found.failures[session_id] = error
    return found


def _facts(engine: Engine, session_id: str, found: Committed) -> tuple[object, ...]:
    """Return all that two equal documents have in common."""
    header = found.header
    with decoding(session_id, engine.where(session_id)):
        text = [(name, as_json(value)) for name, value in found.content]
    return header.version, header.revision, header.epoch, header.created_at, header.updated_at, text
