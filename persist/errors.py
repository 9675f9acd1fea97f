"""Every error of `persist`: what happened, which file, what to do.

An error carries its facts as attributes and survives pickling, so that a worker process can hand it to its
parent. Its message never holds the content of a document; ids, field names, paths and numbers are all it says.

    PersistError
    ├── SessionNotFound (KeyError)      SessionExists        SessionDeleted      StoreClosed
    ├── InvalidSessionId (ValueError)   InvalidStreamId (ValueError)
    ├── NotJSON (ValueError)            WrongType (TypeError)
    ├── ReservedField (ValueError)      MessagesRemoved
    ├── MergeConflict                   VersionMismatch, IdTaken (MergeConflicts)
    ├── SessionBusy                     AlreadyStarted       StreamLost      SweepIncomplete
    ├── LockTimeout (TimeoutError)      NestedLock (RuntimeError)       LockNotHeld (RuntimeError)
    ├── CorruptSession                  UnsupportedFormat    UnsafeFile (OSError)   Unreadable (OSError)
    ├── CommitFailed (OSError)          CommitUnknown (OSError)
    ├── EventsNotFound (KeyError)       CursorAhead (ValueError)   EmitFailed (OSError)
    └── UnsupportedFileSystem (OSError)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Value = TypeVar("Value")

#: Where a value stands in a document: keys and list positions from the top, for example ``("messages", 3, "content")``.
ValuePath = tuple["str | int", ...]


def show_path(path: Sequence[str | int]) -> str:
    """Write a path into a document as Python would: ``data['messages'][3]``; a very deep one by its two ends."""
    steps = [f"[{step!r}]" for step in path]
    return "data" + "".join(steps if len(steps) <= 10 else [*steps[:4], "…", *steps[-2:]])


class Translating(Generic[Value]):
    """A block of which some errors become others. A generator's block (contextlib) would cost five times as much.

    Args:
        translate: raises another error in the place of one, or returns.
        value: what the block is given.
    """

    __slots__ = ("_translate", "_value")

    def __init__(self, translate: Callable[[BaseException], None], value: Value) -> None:
        self._translate = translate
        self._value = value

    def __enter__(self) -> Value:
        return self._value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._translate(error)


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
    be left out stand in `defaults`.
    """

    template = "{reason}"
    defaults: ClassVar[Mapping[str, Any]] = {}

    # The facts of all errors. An error has the ones that it was made with.
    session_id: str
    stream_id: str
    path: Path
    reason: str
    remedy: str
    errno: int | None
    field: str
    where: str
    what: str
    expected: str
    got: str
    found: object
    wanted: str
    known: int
    base: Any
    mine: Any
    theirs: Any
    owner: Owner | None
    holder: str
    held: str
    timeout_s: float
    waited_s: float
    count: int
    version: str
    offset: int | None
    after: int
    cleared: list[Any]
    failures: dict[str, Exception]
    file_system: str

    def __init__(self, **facts: Any) -> None:
        facts = {**self.defaults, **facts}
        if type(facts.get("path")) is str:
            facts["path"] = Path(facts["path"])
        super().__init__(self.template.format(**facts))
        self._facts: Mapping[str, Any] = facts
        # After the base's own __init__: OSError's would set errno back to None.
        for name, value in facts.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, and OSError two numbers.
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._facts), ()


class SessionNotFound(PersistError, KeyError):
    """There is no such session. Create it with `Store.create`."""

    template = (
        "No session {session_id!r}: {path} does not exist. store.ids() lists the sessions; store.create() makes one."
    )


class SessionExists(PersistError):
    """`create` or `duplicate` met a session of that id. Load it, or choose another id."""

    template = "Session {session_id!r} exists already: {path}. Load it with store.load(), or choose another id."


class SessionDeleted(PersistError):
    """The object's session was deleted, re-created or replaced since it was loaded: its save would revive a ghost."""

    template = (
        "Session {session_id!r} was deleted or replaced since it was loaded ({path}); nothing was saved. "
        "Load it again, or make a new one with store.create()."
    )


class StoreClosed(PersistError, RuntimeError):
    """A verb was used on a store after its `close`."""

    template = "The store {path} is closed. Open a new persist.Store."


class InvalidSessionId(PersistError, ValueError):
    """A session id that is no text of 1 to 512 characters, or that a file system takes for another one."""

    template = "{session_id!r} is not a session id: {reason}"


class InvalidStreamId(PersistError, ValueError):
    """A stream id that is malformed, or that this session has used before."""

    template = "{stream_id!r} is not a usable stream id: {reason}"


class NotJSON(PersistError, ValueError):
    """A value that JSON cannot give back exactly as it was. Nothing was written."""

    template = "{where} cannot be kept as JSON: {reason}"
    path: ValuePath  # type: ignore[assignment]

    def __init__(self, **facts: Any) -> None:
        super().__init__(**{"where": show_path(facts["path"]), **facts})


class WrongType(PersistError, TypeError):
    """An argument, or a field of the document, has a type that the verb cannot work with."""

    template = "{what} is {got}, but must be {expected}."


class ReservedField(PersistError, ValueError):
    """A field that belongs to the stream verbs, or to `persist` itself, was changed by hand."""

    template = "Field {field!r} belongs to persist; nothing was written. {remedy}"


class MergeConflict(PersistError):
    """Two writers changed the same place in different ways. Nothing was written.

    `base`, `mine` and `theirs` are the three values at `path`; `persist.MISSING` stands for "not there".
    They are attributes only: the message never shows them.
    """

    template = (
        "Session {session_id!r}: {where} was changed both here and on disk ({reason}); nothing was written. {remedy}"
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "remedy": "Call session.refresh() after setting your edit aside, or save(on_conflict='mine' or 'theirs')."
    }
    path: ValuePath  # type: ignore[assignment]

    def __init__(self, **facts: Any) -> None:
        super().__init__(**{"where": show_path(facts["path"]), "session_id": "", **facts})

    def in_session(self, session_id: str) -> MergeConflict:
        """Return the same conflict with the session named."""
        return type(self)(**{**self._facts, "session_id": session_id})


def conflicts_in(session_id: str) -> Translating[None]:
    """Name the session in a `MergeConflict` of the block: the pure functions below do not know it."""

    def name_session(error: BaseException) -> None:
        if isinstance(error, MergeConflict):
            raise error.in_session(session_id) from None

    return Translating(name_session, None)


class IdTaken(MergeConflict):
    """A message was to be added whose ``id`` another message has. Nothing was written."""

    template = (
        "Session {session_id!r}: {where} has the same {key}, and other content; nothing was written. "
        "Give the new one an {key} of its own, or send the same content again."
    )

    defaults: ClassVar = {"key": "id"}


class VersionMismatch(MergeConflict):
    """An edit named the version it had seen (`if_version=`), and the session has another one. Nothing was written."""

    template = (
        "Session {session_id!r} is at version {theirs}, not at {mine}, which the edit was made for; "
        "nothing was written. Load the session, look again, and repeat the edit."
    )


class SessionBusy(PersistError):
    """A live stream owns the session. Wait for it, `cancel` it, or take the session with `cancel(force=True)`."""

    template = (
        "Session {session_id!r} is busy: stream {stream_id} is run by {owner} and still alive ({path} is locked). "
        "{why}Wait for it, or end it with store.cancel()."
    )

    defaults: ClassVar = {"why": ""}


class AlreadyStarted(PersistError):
    """A start that was to be once met its own prompt (`start_stream(once=True)`): running, or answered.

    `stream_id` is the stream that runs it, or None; `answer` is the message that answers it, or None.
    """

    template = "Session {session_id!r} has that prompt already, and {what}; nothing was started. {remedy}"

    stream_id: str | None  # type: ignore[assignment]
    answer: Any


class StreamLost(PersistError):
    """This stream no longer owns its session; what it tried to write was not written."""

    template = "Stream {stream_id} no longer owns session {session_id!r} ({reason}); nothing was written. End the turn."


class SweepIncomplete(PersistError):
    """A sweep cleared what it could; some sessions could not be looked at.

    `cleared` lists what was cleared; `failures` maps a session id to its error, and ``"*"`` to that of the events'
    directory.
    """

    template = "Cleared {count} stale streams, but could not look at {names}. Mend those sessions and sweep again."

    def __init__(self, **facts: Any) -> None:
        reasons = (f"{name!r} ({str(error).rstrip('.')})" for name, error in facts["failures"].items())
        super().__init__(**{**facts, "count": len(facts["cleared"]), "names": "; ".join(reasons)})


class LockTimeout(PersistError, TimeoutError):
    """The session's lock was not free in time. Nothing was written."""

    template = (
        "Could not lock session {session_id!r} within {timeout_s:g} s: {path} is held by {holder}. "
        "Wait for longer (timeout_s), or {remedy}."
    )

    defaults: ClassVar = {"remedy": "end that process"}


class NestedLock(PersistError, RuntimeError):
    """A thread that holds a session's lock asked for a second one: that could deadlock, so it is refused.

    So is a verb of an object in the middle of a `save` or `refresh` of the same one: in a signal handler, or a
    finaliser.
    """

    template = (
        "This thread holds the lock of session {held!r} and asked for that of {session_id!r}. "
        "Leave the transaction() or update() first; in a signal handler or a finaliser, try again later."
    )


class LockNotHeld(PersistError, RuntimeError):
    """Something of a transaction was used after its block, or in a forked child. This call did nothing."""

    template = (
        "The lock of session {session_id!r} is not held here any more: the block has ended, and nothing was written by "
        "this call. Begin a new transaction for what is still to be done."
    )


class MessagesRemoved(PersistError):
    """A `save` would remove committed messages while a stream is running. Nothing was written."""

    template = (
        "save() would remove {count} of the committed messages of session {session_id!r} while stream {stream_id} is "
        "active; nothing was written. If it is meant, use store.transaction(id, if_version={version!r})."
    )


class CorruptSession(PersistError):
    """The file is not a document that can be trusted. It was not changed.

    `offset` is the position of the first bad byte, where one is known.
    """

    template = "Session {session_id!r} is damaged: {path}{at} {reason} {remedy}"

    def __init__(self, **facts: Any) -> None:
        offset = facts.setdefault("offset", None)
        facts["remedy"] = facts.get("remedy") or "Mend the file by hand or restore it from a backup."
        super().__init__(**{**facts, "at": f", byte {offset}:" if offset is not None else ":"})


class UnsupportedFormat(PersistError):
    """The file has a format that this version does not read: of a newer `persist`, or of its first edition (1 and 2).

    It was not changed.
    """

    template = (
        "Session {session_id!r}: {path} has format {found}, and this version knows {known}. "
        "Use the version that wrote it."
    )


class UnsafeFile(PersistError, OSError):
    """A name of the store is a symbolic link, a directory, a FIFO or a device. It was not followed."""

    template = "{path} is {found}, where persist keeps {wanted}; it was not touched. Move it away."

    defaults: ClassVar = {"wanted": "a plain file"}


class Unreadable(PersistError, OSError):
    """The disk, or its permissions, refused a look. Nothing was changed."""

    template = "{path} cannot be read: {reason}. Nothing was changed; mend that and retry."

    defaults: ClassVar = {"errno": None}

    @classmethod
    def because(cls, path: Path | str, error: OSError) -> Unreadable:
        """From what the system said."""
        return cls(path=path, reason=error.strerror or type(error).__name__, errno=error.errno)


class CommitFailed(PersistError, OSError):
    """The disk refused the commit before anything became visible: the old revision stands."""

    template = "Session {session_id!r} was not saved: {reason} at {path}. The old revision stands; mend that and retry."


class CommitUnknown(PersistError, OSError):
    """The disk failed while a commit was being made durable: it may or may not survive a power cut.

    The store takes no further write to this session; open a new one after looking at the disk.
    """

    template = (
        "Session {session_id!r}: it is unknown whether the last commit is durable ({reason} at {path}). "
        "This store refuses further writes to it: look at the disk, then open a new persist.Store."
    )


class EventsNotFound(PersistError, KeyError):
    """There are no events of that stream: it never ran, it ended without an event, or its events have expired.

    Or its file has dropped the oldest ones, and the cursor stands before `first`, which is then the offset of the first
    one that is left. Else `first` is None.
    """

    template = "No events of stream {stream_id!r} of session {session_id!r}{where}: {reason} {remedy}"

    first: int | None

    def __init__(self, **facts: Any) -> None:
        first = facts.setdefault("first", None)
        if first is None:
            facts |= {"where": "", "reason": _NO_EVENTS.format(**facts), "remedy": "Load the session instead."}
        else:
            facts |= {"where": " right behind the cursor", "reason": _EVENTS_DROPPED.format(**facts)}
            facts["remedy"] = f"Load the session instead, and follow the rest (after={first - 1} or 'end')."
        super().__init__(**facts)


_NO_EVENTS = (
    "{path} does not exist. It never ran here, ended without an event, or its events have expired "
    "(Store(keep_events_s=…))."
)
_EVENTS_DROPPED = "{path} begins at event {first}, because it has outgrown Store(keep_events_bytes=…)."


class CursorAhead(PersistError, ValueError):
    """A cursor beyond the stream's last event: it is another stream's, or a power cut took the events it has seen."""

    template = (
        "Stream {stream_id!r} of session {session_id!r} has {count} events, and the cursor is at {after}. "
        "Follow it from the start (after=0)."
    )


class EmitFailed(PersistError, OSError):
    """The disk refused events, or to make them durable. Those that were emitted before stand; the stream goes on."""

    template = (
        "Events of stream {stream_id!r} were not all emitted, or not made durable: {reason} at {path}. Mend that; "
        "store.events() tells which ones stand, before you emit the others again."
    )


class UnsupportedFileSystem(PersistError, OSError):
    """The directory is on a network file system, whose locks do not hold."""

    template = (
        "{path} is on {file_system}, where file locks and fsync cannot be trusted. Use a local disk, "
        "or pass allow_network=True and lose the guarantees."
    )
