"""What a process remembers of large sessions from one operation to the next, within bounds.

It is validated under the lock, by what is read: the checksums at the beginning of the document, and the last record known of
the journal. That inode, size and time of the document are as they were proves nothing; where they are not, it is read whole. An
operation takes what is known, and gives it back when all has gone well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from persist.storage import disk
from persist.storage.change import Change
from persist.storage.index import Index, keys_of
from persist.storage.journal import Journal, Tail
from persist.storage.snapshot import Snapshot

MOST_SESSIONS = 256
MOST_INDEX_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Known:
    """A session that has a journal.

    Attributes:
        opening: the first bytes of its document, which hold the checksums.
        log: its journal.
        tail: the end of its journal, with the head that is valid there.
        version: that of its document. Where it is another one, somebody has written to it by hand.
        synced: up to which byte this process knows the journal to be durable; 0 if not even the files' names.
        room_end: up to which byte it has been given room.
        indexes: by field, what is known of the lists.
    """

    opening: bytes
    log: Journal
    tail: Tail
    version: disk.Version
    synced: int = 0
    room_end: int = 0
    indexes: dict[str, Index] = field(default_factory=dict)

    @property
    def document_bytes(self) -> int:
        return self.version[1]

    def take(self, changes: Iterable[Change]) -> None:
        """Go on behind changes; the tail has done so before."""
        wanted = keys_of(self.tail.header.owner)
        for change in changes:
            if change.field not in self.indexes:
                continue
            if change.is_items:
                self.indexes[change.field].take(change, wanted)
            else:
                del self.indexes[change.field]

    def shows(self, state: Snapshot) -> bool:
        """Whether a state is the one that is on disk."""
        tail, body = self.tail, state.body
        return tail.header == state.header and tail.small == body.small and dict(tail.counts) == dict(body.counts)

    @property
    def index_bytes(self) -> int:
        # Another thread may have taken it, and be adding to it.
        return sum(index.size_bytes for index in list(self.indexes.values()))


class KnownSessions:
    """Those that were used last, within bounds. Each step is one that no other thread can come into."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Known] = OrderedDict()

    def take(self, session_id: str) -> Known | None:
        """Hand out what is known; it is no longer here then."""
        return self._known.pop(session_id, None)

    def keep(self, session_id: str, known: Known) -> None:
        self._known[session_id] = known
        while len(self._known) > MOST_SESSIONS:
            self._drop_oldest()

    def make_room_for(self, known: Known) -> None:
        """Drop the oldest while the indexes of all would be too large together with those of one that is in use."""
        while (
            self._known
            and sum(each.index_bytes for each in list(self._known.values())) + known.index_bytes > MOST_INDEX_BYTES
        ):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        with suppress(KeyError):
            self._known.popitem(last=False)
