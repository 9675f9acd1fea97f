"""The cache: replicas of sessions with a journal, which a process keeps from one verb to the next, within bounds.

Each verb validates the replica under the session's lock. It compares the document's version and the bytes at the
journal's end. A verb takes the replica out, and puts it back as its last step. So an exception on the way drops it.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from persist.storage import disk
from persist.storage.content import Content, Items
from persist.storage.document import Header
from persist.storage.held import table
from persist.storage.journal import Tail

#: An item costs about so many bytes beside its JSON (measured). Its id and the id's place are included.
_BYTES_AN_ITEM = 160
#: A session costs so many bytes beside the values that stand apart. Its fields are included: most sessions have few.
_BYTES_A_SESSION = 4096


class Committed(msgspec.Struct, eq=False):
    """A session as one commit left it."""

    header: Header
    content: Content


class Replica(Committed):
    """A session as one commit left it in its files.

    Attributes:
        version: the version of the document's file.
        tail: the end of its journal, or None if it has none.
        is_synced: whether this process has made the names and the document durable. The writer may have died before.
    """

    version: disk.Version
    tail: Tail | None = None
    is_synced: bool = False


class Cache:
    """The most recently used replicas of a store's sessions.

    Each change happens under `table`, and a fork waits for that.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._replicas: OrderedDict[str, tuple[Replica, int]] = OrderedDict()
        self._total_bytes = 0

    def take(self, session_id: str) -> Replica | None:
        """Remove a session's replica from the cache, and return it. Return None if there is none."""
        with table:
            found = self._replicas.pop(session_id, None)
            if found is None:
                return None
            self._total_bytes -= found[1]
            return found[0]

    def has(self, session_id: str) -> bool:
        """Tell whether the cache has a replica of a session, valid or not."""
        return session_id in self._replicas

    def put(self, session_id: str, replica: Replica) -> None:
        """Keep a replica. Drop the least recently used ones if the cache is above its limit."""
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
                # A signal's exception may have come between two steps, and left a wrong sum.
                self._total_bytes = 0
