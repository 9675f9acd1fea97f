"""The errors of `persist`. Each says what happened, to which file, and what to do.

An error carries its facts as attributes and survives pickling, so that a worker process can hand it to its
parent. Its message never holds the content of a document. It holds only ids, field names, paths and numbers.

    PersistError
    ├── SessionNotFound (KeyError)     SessionExists                  SessionDeleted     StoreClosed (RuntimeError)
    ├── InvalidArgument (ValueError)   NotJSON (ValueError)           TooLarge (ValueError)
    ├── MergeConflict                  VersionMismatch (MergeConflict)
    ├── LockError (RuntimeError)       LockTimeout (LockError, TimeoutError)
    ├── SessionBusy                    AlreadyStarted                 StreamLost
    ├── EventsNotFound (KeyError)      EmitFailed (OSError)
    ├── Unreadable (OSError)           Unavailable (Unreadable)
    ├── CorruptSession                 UnsupportedFormat
    └── CommitFailed (OSError)         CommitUnknown (OSError)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The place of a value in a document: keys and list positions from the top, ``("messages", 3, "content")`` for example.
ValuePath = tuple["str | int", ...]


def show_path(path: Sequence[str | int]) -> str:
    """Return a path in a document as Python code: ``data['messages'][3]``. A very deep path shows only its two ends."""
    steps = [f"[{step!r}]" for step in path]
    return "data" + "".join(steps if len(steps) <= 10 else [*steps[:4], "…", *steps[-2:]])


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that runs a stream, as it described itself when it started the stream."""

    pid: int
    host: str
    command: str
    started_at: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command}) on {self.host} since {self.started_at}"


class PersistError(Exception):
    """The base of every error that `persist` raises on purpose.

    A subclass takes its facts as keywords. Each becomes an attribute and fills its place in `template`. Facts that may
    be left out have a value in `defaults`. The message says what happened (`template`), and then what to do (`remedy`).
    """

    template = "{reason}"
    defaults: ClassVar[Mapping[str, Any]] = {}

    # The facts of all errors. An error has only the ones that it was made with.
    session_id: str
    stream_id: str
    path: Path
    reason: str
    remedy: str = ""
    errno: int | None
    field: str
    where: str
    what: str
    expected: str
    got: str
    found: object
    known: int
    base: Any
    mine: Any
    theirs: Any
    owner: Owner | None
    holder: str
    held: str
    kind: str
    timeout_s: float
    waited_s: float
    count: int | None
    version: str
    offset: int | None
    after: int

    def __init__(self, **facts: Any) -> None:
        facts = {**self.defaults, **facts}
        if type(facts.get("path")) is str:
            facts["path"] = Path(facts["path"])
        # A remedy that was given is no template, because it may hold braces, of a path say.
        facts["remedy"] = facts.get("remedy") or type(self).remedy.format(**facts)
        super().__init__(f"{self.template.format(**facts)} {facts['remedy']}".strip())
        self._facts: Mapping[str, Any] = facts
        # After the base's own __init__, because OSError's sets errno back to None.
        for name, value in facts.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, and OSError two numbers.
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._facts), ()


# --- what was asked for ----------------------------------------------------------------------------------------------


class SessionNotFound(PersistError, KeyError):
    """There is no such session. Create it with `Store.create`."""

    template = "No session {session_id!r}: {path} does not exist."
    remedy = "store.ids() or 'persist ls' lists the sessions; store.create() makes one."


class SessionExists(PersistError):
    """Raised when `create` or `duplicate` meets a session of that id, or `replace` meets one that can be read.

    Load it, or choose another id.
    """

    template = "Session {session_id!r} exists already: {path}."
    remedy = "Look at it with store.load() or 'persist show', or choose another id."


class SessionDeleted(PersistError):
    """The object's session was deleted, re-created or replaced since it was loaded. A save would revive it."""

    template = "Session {session_id!r} was deleted or replaced since it was loaded ({path}); nothing was saved."
    remedy = "Load it again, or make a new one with store.create()."


class StoreClosed(PersistError, RuntimeError):
    """A verb was used on a store after its `close`."""

    template = "The store {path} is closed."
    remedy = "Open a new persist.Store()."


class InvalidArgument(PersistError, ValueError):
    """The verb cannot work with an argument, an id, or a field of the document. Nothing was done.

    It is also raised for a field that belongs to `persist` itself (`field` names it), and for a directory on a file
    system where locks do not hold.
    """

    template = "{what} is {got}; it must be {expected}."


def shown(value: object) -> str:
    """Return a value for a message, as Python would write it. The middle of a long one is left out."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-20:]}"


def reserved(field: str, remedy: str) -> InvalidArgument:
    """Return the error for a field that was set by hand, but belongs to the stream verbs or to `persist`."""
    facts = {"got": "persist's own", "expected": "left alone, and nothing was written"}
    return InvalidArgument(what=f"field {shown(field)}", field=field, remedy=remedy, **facts)


class NotJSON(PersistError, ValueError):
    """A value that JSON cannot give back exactly as it was. Nothing was written."""

    template = "{where} cannot be kept as JSON: {reason}"
    remedy = "Nothing was written. Correct the value, and repeat the verb: save(), say."
    path: ValuePath  # type: ignore[assignment]

    def __init__(self, **facts: Any) -> None:
        super().__init__(**{"where": show_path(facts["path"]), **facts, "reason": facts["reason"].rstrip(".") + "."})


class TooLarge(PersistError, ValueError):
    """The session would be too large to be read back. Nothing was written."""

    template = "The session would take more than {limit:,} bytes; nothing was written."
    remedy = "Remove a part of it, or continue in a new session: store.create()."
    limit: int


# --- other writers ---------------------------------------------------------------------------------------------------


class MergeConflict(PersistError):
    """Two writers changed the same place in different ways, or a change does not fit the committed state.

    Nothing was written. `base`, `mine` and `theirs` are the three values at `path`. `persist.MISSING` stands for "not
    there". They are attributes only, and the message never shows them.
    """

    template = "Session {session_id!r}: {where} {clash}; nothing was written."
    remedy = (
        "Put the error's `base` back at its `path` in session.data, session.refresh(), and make the edit anew; or "
        "save(on_conflict='mine' or 'theirs')."
    )
    path: ValuePath  # type: ignore[assignment]

    def __init__(self, **facts: Any) -> None:
        none = {"session_id": "", "base": None, "mine": None, "theirs": None}
        clash = f"was changed both here and on disk ({facts['reason']})"
        super().__init__(**{"where": show_path(facts["path"]), "clash": clash, **none, **facts})

    def in_session(self, session_id: str) -> MergeConflict:
        """Return the same conflict with the session named."""
        return type(self)(**{**self._facts, "session_id": session_id})


def id_taken(path: ValuePath, *, key: str, mine: Any, theirs: Any) -> MergeConflict:
    """Return the conflict of a new item with one that has the same id and other content."""
    remedy = f"Give the new one an {key} of its own, or repeat the verb with the same content."
    told = {"clash": f"has the same {key}, and other content", "reason": f"its {key} is taken by other content"}
    return MergeConflict(path=path, mine=mine, theirs=theirs, remedy=remedy, **told)


class VersionMismatch(MergeConflict):
    """The session has another version than the one that the edit named (`if_version=`). Nothing was written."""

    template = (
        "Session {session_id!r} is at version {theirs}, not at {mine}, which the edit was made for; "
        "nothing was written."
    )
    remedy = "Look again with store.load() or 'persist show', and repeat the edit."


class LockError(PersistError, RuntimeError):
    """A session's lock cannot be had, or is not held any more. Nothing was written by this call.

    Attributes:
        kind: ``"nested"`` if this thread holds a session's lock and asked for a second one, which could deadlock. Also
            if a signal handler or a finaliser called a verb of an object in the middle of its `save` or `refresh`.
            ``"not held"`` if something of a transaction was used after its block, or in a forked child.
            ``"timeout"``: see `LockTimeout`. ``"refused"`` if this user may read the store but not lock its sessions.
    """


def nested(session_id: str, held: str) -> LockError:
    """Return the error for a thread that asked for a lock while it holds another one."""
    reason = f"This thread holds the lock of session {held!r} and asked for the lock of session {session_id!r}."
    remedy = "Leave the transaction() or update() first; in a signal handler or a finaliser, try again later."
    return LockError(kind="nested", session_id=session_id, held=held, reason=reason, remedy=remedy)


def refused(session_id: str, path: str, error: OSError) -> LockError:
    """Return the error for a user who may not take a lock."""
    reason = f"The lock of session {session_id!r} may not be taken here: {error.strerror} at {path}."
    remedy = "Run this as the owner of the store, or as a user of the group that writes to it."
    facts = {"path": path, "errno": error.errno}
    return LockError(kind="refused", session_id=session_id, reason=reason, remedy=remedy, **facts)


def not_held(session_id: str) -> LockError:
    """Return the error for a use after the lock was given up."""
    reason = f"The lock of session {session_id!r} is not held here any more: the block has ended"
    remedy = "Begin a new transaction() for what is still to be done."
    reason += ", and nothing was written by this call."
    return LockError(kind="not held", session_id=session_id, reason=reason, remedy=remedy)


class LockTimeout(LockError, TimeoutError):
    """The session's lock was not free in time. Nothing was written."""

    template = "Could not lock session {session_id!r} within {timeout_s:g} s: {path} is held by {holder}."
    remedy = "Wait for longer (timeout_s), or end that process, and retry."
    defaults: ClassVar = {"kind": "timeout"}


# --- streams and their events ----------------------------------------------------------------------------------------


class SessionBusy(PersistError):
    """A live stream owns the session. Wait for it, `cancel` it, or take the session with `cancel(force=True)`."""

    template = (
        "Session {session_id!r} is busy: stream {stream_id} is run by {run_by} and still alive ({path} is locked).{why}"
    )
    remedy = "Wait for it, or ask it to end with store.cancel(); cancel(force=True) takes the session from it."
    defaults: ClassVar = {"why": ""}

    def __init__(self, **facts: Any) -> None:
        super().__init__(**{**facts, "run_by": facts["owner"] or "an unknown process"})


class AlreadyStarted(PersistError):
    """The prompt of `start_stream(once=True)` runs already, or has its answer.

    `stream_id` is the stream that runs the prompt, or None. `answer` is the message that answers it, or None.
    """

    template = "Session {session_id!r} has that prompt already, and {what}; nothing was started."
    stream_id: str | None  # type: ignore[assignment]
    answer: Any


class StreamLost(PersistError):
    """This stream no longer owns its session. The write that it tried was not made."""

    template = "Stream {stream_id} no longer owns session {session_id!r} ({reason}); nothing was written."
    remedy = "End the turn: store.load() shows what was kept of it."


class EventsNotFound(PersistError, KeyError):
    """There are no such events. The stream never ran, its events have expired, or the cursor points outside of them.

    Attributes:
        count: the number of events, if the cursor is behind the last one. Then it is another stream's cursor, or a
            power cut took the events that it has seen. Otherwise None.
        first: the offset of the first event that is left, if the cursor is before it. Otherwise None.
    """

    template = "Stream {stream_id!r} of session {session_id!r} has no such events: {reason}"
    defaults: ClassVar = {"count": None, "first": None, "after": None}
    first: int | None

    def __init__(self, **facts: Any) -> None:
        told = "{path} does not exist: it never ran, ended without an event, or they expired (Store(keep_events_s=…))."
        remedy = "Load the session instead: store.load()."
        if facts.get("first") is not None:
            told = "{path} begins at event {first}, because it has outgrown Store(keep_events_bytes=…)."
            remedy = f"Load the session instead, and follow() the rest (after={facts['first'] - 1} or 'end')."
        elif facts.get("count") is not None:
            told, remedy = (
                "it has {count} events, and the cursor is at {after}.",
                "Call follow(after=0), from the start.",
            )
        super().__init__(**{"reason": told.format(**facts), "remedy": remedy, **facts})


class EmitFailed(PersistError, OSError):
    """The disk refused events, or refused to make them durable. Earlier events stand, and the stream goes on."""

    template = "Events of stream {stream_id!r} were not all emitted, or not made durable: {reason} at {path}."
    remedy = "Remove the cause. store.events() shows the events that stand. Then emit() the others again."


# --- files and disks -------------------------------------------------------------------------------------------------


class Unreadable(PersistError, OSError):
    """The disk or its permissions refused a look, or a name in the store is not the plain file that it must be.

    Nothing was changed, and no symbolic link was followed.
    """

    template = "{path} cannot be read: {reason}. Nothing was changed."
    remedy = "Mend that and retry."
    defaults: ClassVar = {"errno": None}

    @classmethod
    def because(cls, path: Path | str, error: OSError) -> Unreadable:
        """Return the error that stands for an error of the system."""
        return cls(path=path, reason=error.strerror or type(error).__name__, errno=error.errno)


class Unavailable(Unreadable):
    """The server of a store on PostgreSQL refused, or cannot be reached. Nothing was changed, and a retry may help."""

    template = "{path} is not available: {reason}. Nothing was changed."
    remedy = "Look at the server, and retry."


def unsafe(path: Path | str, found: str, wanted: str = "a plain file") -> Unreadable:
    """Return the error for a name that is a symbolic link, a directory, a FIFO or a device."""
    reason = f"it is {found}, where persist keeps {wanted}"
    return Unreadable(path=path, reason=reason, remedy="Move it away, and retry.", found=found)


class CorruptSession(PersistError):
    """The file is not a document that can be trusted. It was not changed.

    `offset` is the position of the first bad byte, if it is known.
    """

    template = "Session {session_id!r} is damaged: {path}{at} {reason}"
    remedy = "Restore it from a backup, or mend the file by hand and take it with store.accept() or 'persist accept'."
    #: These ways work for every kind of damage.
    ways_out = (
        "To give it up: store.replace(id, data) or 'persist replace' puts another document there, "
        "and store.delete(id, force=True) or 'persist delete --force' removes it."
    )

    def __init__(self, **facts: Any) -> None:
        offset = facts.setdefault("offset", None)
        remedy = facts.get("remedy") or self.remedy
        if not remedy.endswith(self.ways_out):
            remedy = f"{remedy} {self.ways_out}"
        at = f", byte {offset}:" if offset is not None else ":"
        super().__init__(**{**facts, "remedy": remedy, "at": at})


class UnsupportedFormat(PersistError):
    """The file, or the schema of a database, has a format that this version does not read.

    It is the format of a newer `persist`, or of its first edition (1 and 2). Nothing was changed.
    """

    template = "{whose}{path} has format {found}, and this version knows {known}."
    remedy = (
        "Load it with the version of persist that wrote it. store.delete(id, force=True) or 'persist delete --force' "
        "removes it."
    )

    def __init__(self, **facts: Any) -> None:
        whose = f"Session {facts['session_id']!r}: " if "session_id" in facts else ""
        super().__init__(**{"whose": whose, **facts})


class CommitFailed(PersistError, OSError):
    """The disk refused the commit before anything became visible. The old revision stands."""

    template = "Session {session_id!r} was not saved: {reason} at {path}. The old revision stands."
    remedy = "Mend that and retry; store.load() shows what is there."


class CommitUnknown(PersistError, OSError):
    """The disk failed while a commit was being made durable. The commit may or may not survive a power cut.

    The store takes no further write to this session. Look at the disk, and then open a new store.
    On PostgreSQL, the server was lost in a commit, and did not come back in time. Nothing is refused there.
    """

    template = "Session {session_id!r}: it is unknown whether the last commit is durable ({reason} at {path}).{refusal}"
    remedy = "Look at the disk, then open a new persist.Store()."
    defaults: ClassVar = {"refusal": " This store refuses further writes to it."}
