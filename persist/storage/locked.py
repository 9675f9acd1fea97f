"""The hold of a session's lock for a block, which gets a transaction. It ends in the same way on every engine."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from persist import json_codec
from persist.errors import MergeConflict
from persist.storage import lock
from persist.storage.directory import mislabelled
from persist.storage.held import is_stuck


class LockedBlock(lock.Hold):
    """The hold of a session's lock for a block. An engine says how the block gets its transaction.

    Attributes:
        place: where the session is, for errors.
        tx: the transaction, or None before the block.
    """

    __slots__ = ("place", "tx")
    place: str
    tx: Any

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.is_finalizing() and is_stuck():
            # The block belongs to a generator that nobody has ended.
            return
        try:
            if self.tx is not None:
                self.tx.end()
        finally:
            self.release()
        if isinstance(error, json_codec.Undecodable):
            # Somebody has sealed text that is no JSON, and the verb has come to it.
            raise mislabelled(self.place, self.session_id) from None
        if isinstance(error, MergeConflict) and not error.session_id:
            # The pure functions that found the conflict do not know the session. A conflict that names a session came
            # from the caller's own block, maybe from another session.
            raise error.in_session(self.session_id) from None

    def __del__(self) -> None:
        # A signal's exception may have kept `__exit__` from running.
        if getattr(self, "thread", 0):
            self.__exit__(None, None, None)
