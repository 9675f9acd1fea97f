"""The engine of a store: the operations that store, sessions, streams and followers need of what keeps sessions.

    with engine.transaction("s-42", timeout_s) as tx:
        found = tx.read()
        tx.commit(found.header.next(), content, changes)

Two engines offer them. `persist.files` keeps sessions as files of one machine. `persist.postgres` keeps them in a
database for several machines. The layers above hold an `Engine`, and never ask which one it is.

A session is its `Header` and its `Content`, on every engine. A commit names the `Change`s of the large values, so that
an engine writes only these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from persist.json_codec import Undecodable
from persist.storage.cache import Committed
from persist.storage.content import Content, Id
from persist.storage.diff import Change
from persist.storage.directory import mislabelled
from persist.storage.document import Head, Header
from persist.storage.lease import End, Ended
from persist.storage.lock import Waiting
from persist.translating import Translating

__all__ = [
    "Committed",
    "End",
    "Ended",
    "Engine",
    "Event",
    "EventReader",
    "EventWriter",
    "Fenced",
    "Held",
    "Lease",
    "Seeking",
    "Transaction",
    "decoding",
]


#: The name of a list, and ids of items in it. None is no id.
Seeking = tuple[str, Sequence[Id | None]]


class Engine(Protocol):
    """The sessions of one store.

    Attributes:
        place: where the sessions are, for people: a directory, or a URL without its password.
        timeout_s: seconds that a transaction waits for its session, if the verb does not say.
    """

    place: str
    timeout_s: float

    def where(self, session_id: str) -> str:
        """Return where a session is, for people. Raise `InvalidArgument` if it is no session id."""

    def exists(self, session_id: str) -> bool:
        """Tell whether there is such a session, readable or not. Takes no lock."""

    def read(self, session_id: str) -> Committed:
        """Read the committed session, without a lock: some committed revision, never half of one."""

    def read_head(self, session_id: str) -> Head:
        """Read the committed header and fields, without a lock."""

    def read_last(self, session_id: str, name: str, limit: int) -> list[Any]:
        """Read the last items of a list, without a lock."""

    def session_ids(self) -> list[str]:
        """Return the ids of all sessions, sorted."""

    def recent(self, before: str | None) -> Iterator[tuple[str, str]]:
        """Yield a cursor and an id for each session: the last updated one first. `before` is such a cursor."""

    def leases(self) -> list[tuple[str, str]]:
        """Return the (session id, stream id) of all streams that have a lease, dead ones included."""

    def transaction(self, session_id: str, timeout_s: float | None = None, *, seeking: Seeking | None = None) -> Held:
        """Hold the session's lock for a block, which gets its transaction.

        `seeking` is what the block is about to look for. An engine may fetch it together with the lock.
        """

    def events(self, session_id: str, stream_id: str, after: int, *, create: bool = False) -> EventReader:
        """Open the events of a stream behind an offset. Raise `FileNotFoundError` if there are none.

        With `create`, begin with none, under the session's lock, for a reader that comes before the first event.
        """

    def how_ended(self, session_id: str, stream_id: str, timeout_s: float) -> Ended | None:
        """Tell how a stream has ended whose events do not say it. None if it runs. It may wait for the session's lock.

        Raises:
            SessionNotFound: there is no such session any more.
        """

    def tidy(self) -> None:
        """Remove the events whose time is over."""

    def close(self) -> None:
        """Give up what only verbs need. Streams go on. If the engine is used again, it takes what it needs again."""


class Held(Protocol):
    """The hold of a session's lock for a block, which gets the transaction.

    Attributes:
        path: the name of the lock.
        waiting: the calls for which a thread takes the lock. None for an ordinary verb.
    """

    path: str
    waiting: Waiting | None

    def __enter__(self) -> Transaction: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def describe_holder(self, waiting: Waiting) -> dict[str, str]:
        """Return the holder of the lock for which a thread waits, and a remedy, as the facts of a `LockTimeout`."""


class Mending(Protocol):
    """The operations that mend one session whose lock is held."""

    def compact(self, *, alone: bool = False) -> bool:
        """Fold what a session has beside its document. Tell whether there was anything to fold."""

    def accept(self, *, drop_journal: bool = False) -> Committed:
        """Take a session as it is after an edit by hand, or after damage. Leave a sound session alone."""

    def stream_ids(self) -> list[str]:
        """Return the ids of all streams of the session that have a lease, because a damaged session names none."""

    def put(self, header: Header, content: Content) -> Committed:
        """Write a session whole, in the place of whatever is there: a damaged one, or an older copy. Durable on return.

        The events of its streams are gone.
        """


class Transaction(Mending, Protocol):
    """The operations on one session whose lock is held. After the block each raises `LockError`.

    Attributes:
        place: where the session is, for people.
        lease: the lease of the stream that is about to commit, which must hold then. None for any other commit.
    """

    session_id: str
    place: str
    lease: Lease | None

    def require_lock(self) -> None:
        """Raise `LockError` after the block."""

    def require_unchanged(self) -> None:
        """Raise `CommitFailed` if another program, which heeds no lock, has changed the session since it was read."""

    def exists(self) -> bool:
        """Tell whether there is such a session, readable or not."""

    def read(self) -> Committed:
        """Return the committed session. The caller changes it only through `commit`."""

    def head(self) -> Head:
        """Return the committed header and fields, without reading the rest."""

    def commit(
        self, header: Header, content: Content, changes: tuple[Change, ...] | None = None, end: End | None = None
    ) -> Committed:
        """Write a revision. It is durable and visible on return.

        Args:
            changes: the changes that turn the committed values that stand apart into those of `content`. If it is None,
                the values are compared.
            end: the stream that ends with this commit: its events, and its lease.

        Raises:
            CommitFailed: the old revision stands.
            CommitUnknown: nobody knows.
        """

    def confirm(self, *, is_durable: bool = False) -> Committed:
        """Make the committed session durable, before a verb acknowledges it without a commit. Return it.

        `is_durable` says that the caller has made it durable before.
        """

    def delete(self) -> None:
        """Remove the session, with the leases and events of its streams. Durable on return."""

    def probe(self, stream_id: object) -> AbstractContextManager[bool]:
        """Tell a block whether a stream is dead. The answer stays true for the block. An impossible id is dead."""

    def where(self, stream_id: object) -> str:
        """Return where a stream's lease is, for people."""

    def begin(self, stream_id: str, started_at: str) -> tuple[Lease, EventWriter] | None:
        """Take the lease of a new stream of this process, which the next commit makes the session's.

        None if a stream of that id is alive.
        """

    def forget(self, stream_id: object) -> None:
        """Remove the lease of a stream that is not the session's: of one that did not start, or was left over."""


class Lease(Protocol):
    """The proof that a stream's process lives, as that process holds it.

    Attributes:
        is_held: whether it is proven just now, in the process that took it.
        is_dropped: whether its finaliser has given it up.
        why_not_held: the reasons that there may be why it is not held, for an error.
    """

    is_dropped: bool
    why_not_held: str

    @property
    def is_held(self) -> bool: ...

    def close(self) -> None:
        """Give the lease up. The stream is dead from now on."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream. `offset` counts from 1, without gaps. With the stream's id it makes a cursor."""

    offset: int
    data: Any


class Fenced(Exception):
    """Raised when somebody else has ended the stream. Events that were appended after that do not count."""


class EventWriter(Protocol):
    """The writer of the events of a stream that this process runs. The threads of the process may share it.

    Attributes:
        is_full: whether the oldest events are to be dropped.
    """

    is_full: bool

    @property
    def is_open(self) -> bool: ...

    def open(self) -> None:
        """Begin to write, under the session's lock."""

    def append(self, events: Sequence[bytes], *, durable: bool) -> int:
        """Append encoded events, and return the offset of the last one.

        Raises:
            EmitFailed: they were not written.
            Fenced: the stream has been ended.
        """

    def drop_oldest(self) -> None:
        """Drop the oldest events. The caller is the owner, and holds the session's lock."""

    def postpone(self) -> None:
        """Leave the oldest events for a while."""

    def close(self) -> None:
        """Stop writing."""


class EventReader(Protocol):
    """The reader of one stream's events from an offset on. It reads again and again while they are written.

    Attributes:
        count: the offset of the last event that was passed.
        first: the offset of the first event that is left.
        is_overtaken: whether an event before that was asked for.
        ended: how the stream has ended, once its end was read.
        place: where the events are, for people.
    """

    count: int
    first: int
    is_overtaken: bool
    ended: Ended | None
    place: str

    def size(self) -> int:
        """Return how far the events reach now, as a number that only `read` understands."""

    @property
    def has_more(self) -> bool:
        """Whether there is something that was not read yet. Never waits."""

    def read(self, until: int | None = None) -> list[Event]:
        """Return the events that came since the last call, or the first of them. Return none if there are none now."""

    def read_cached(self) -> list[Event] | None:
        """Read as `read` does, a little at a time. None if that would wait."""

    def begin_here(self) -> None:
        """Ask only for the events behind the passed ones."""

    def look_again(self) -> None:
        """Look whether something came that nobody has told of."""

    def waking(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `wake` during a block, whenever any process has added to the events."""

    def close(self) -> None:
        """Stop reading."""


def decoding(session_id: str, place: str) -> Translating[None]:
    """Return a block that raises `CorruptSession` for a value that somebody has sealed, and that is no JSON."""

    def raise_typed(error: BaseException) -> None:
        if isinstance(error, Undecodable):
            raise mislabelled(place, session_id) from None

    return Translating(raise_typed, None)
