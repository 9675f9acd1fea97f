"""Leases: a stream's proof, for as long as it runs, that its process lives.

A lease is a small file under `.leases/`, locked by the process that runs the stream. The kernel frees the lock when
that process ends, however it ends. So a lease that can be locked belongs to a dead stream, and a lease that cannot be
locked belongs to a live one. Nothing here is guessed from age, pid or time stamps (hermes-webui #653, #3808, #4492).

Leases are created, tried and removed only under their session's lock. Without that lock, two probes of a dead lease
could meet, and each would take the other for the owner (measured: 3-42 % of the time).
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

import msgspec

from persist.storage import disk
from persist.storage.held import HeldFile, try_hold

#: How a stream has ended. "died" means that its process was gone. "deleted" means that its session was removed.
#: "unknown" means that nobody noted the end, because the disk was full or the process was killed in that instant.
Ended = Literal["finished", "failed", "cancelled", "died", "deleted", "unknown"]


class End(msgspec.Struct, frozen=True):
    """The end of a stream, which a commit makes.

    Attributes:
        stream_id: the stream's id. Another program may have put any value into the document.
        is_forced: whether the owner may be alive. It emits without the lock, so its events end before the commit.
    """

    stream_id: Any
    how: Ended
    is_forced: bool = False


#: The held lease of a stream that this process runs. After `close` its file stays, as the lease of a dead stream.
Lease = HeldFile


def take(path: str, description: bytes, mode: int = disk.PRIVATE) -> Lease | None:
    """Create and lock a lease. Return None if a lease of that name is held.

    On return the lease's name is durable, so that a sweep after a power cut finds the lease's session.
    """
    with probe(path) as is_dead:
        if not is_dead:
            return None
        disk.unlink(path)
    held = None
    try:
        held = try_hold(path, create=True, exclusive=True, mode=mode)
        if held is None:
            return None
        disk.write(held.fd, description)
        disk.sync_directory(os.path.dirname(path))
        return held
    except BaseException as error:
        if not isinstance(error, FileExistsError):
            with contextlib.suppress(OSError):
                disk.unlink(path)
        if held is not None:
            held.close()
        raise


class Probe:
    """The answer whether a lease's stream is dead. The lease of a dead stream is held until the end of the block.

    So the answer stays true while the caller acts on it.
    """

    __slots__ = ("_held", "is_dead")

    def __init__(self, *, is_dead: bool, held: HeldFile | None = None) -> None:
        self.is_dead = is_dead
        self._held = held

    def __enter__(self) -> bool:
        return self.is_dead

    def __exit__(self, *_error: object) -> None:
        if self._held is not None:
            self._held.close()


def probe(path: str) -> Probe:
    """Try to lock a lease. A missing lease counts as dead, and is not created."""
    try:
        held = try_hold(path, create=False)
    except FileNotFoundError:
        return Probe(is_dead=True)
    return Probe(is_dead=held is not None, held=held)
