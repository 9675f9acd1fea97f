"""The cache: a process keeps replicas of sessions with a journal from one verb to the next, within bounds.

A replica is validated under the session's lock, each time, by the document's version and by the bytes at its journal's
end. A verb takes the replica out, and puts it back as its last step. So an exception on the way drops it.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from persist.storage import disk
from persist.storage.content import Content, Items
from persist.storage.document import Header
from persist.storage.held import table
from persist.storage.journal import Tail

#: About what an item costs beside its bytes, its id and the place of that included (measured).
_BYTES_AN_ITEM = 160
#: The fields included, of which most sessions have few.
_BYTES_A_SESSION = 4096


class Replica(msgspec.Struct, eq=False):
    """A session as one commit left it.

    Attributes:
        header, content: of that commit.
        version: that of the document.
        tail: the end of its journal, or None if it has none.
        is_synced: whether this process has made the names and the document durable. The writer may have died before.
    """

    header: Header
    content: Content
    version: disk.Version
    tail: Tail | None = None
    is_synced: bool = False


class Cache:
    """The replicas of a store's sessions that were used last.

    Its steps happen under `table`, which a fork waits for.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._replicas: OrderedDict[str, tuple[Replica, int]] = OrderedDict()
        self._total_bytes = 0

    def take(self, session_id: str) -> Replica | None:
        """Hand out a replica, which leaves the cache."""
        with table:
            found = self._replicas.pop(session_id, None)
            if found is None:
                return None
            self._total_bytes -= found[1]
            return found[0]

    def has(self, session_id: str) -> bool:
        """Tell whether there is a replica, valid or not."""
        return session_id in self._replicas

    def put(self, session_id: str, replica: Replica) -> None:
        """Keep a replica, and drop those that were used longest ago."""
        cost = _BYTES_A_SESSION
        for value in replica.content.apart.values():
            cost += value.size_bytes + _BYTES_AN_ITEM * value.count if isinstance(value, Items) else len(value)
        with table:
            _, freed = self._replicas.pop(session_id, (None, 0))
            self._replicas[session_id] = replica, cost
            self._total_bytes += cost - freed
            while self._total_bytes > self._limit_bytes and self._replicas:
                _, (_, freed) = self._replicas.popitem(last=False)
                self._total_bytes -= freed
            if not self._replicas:
                # An exception of a signal may have come between two steps.
                self._total_bytes = 0
