"""Every file name of a store, and the two kinds of id that names are made of. A directory holds:

    var/sessions/
      s-42.json                    the document (snapshot)
      s-42.json.lock               the session's lock; a sidecar, since os.replace() of a locked file lets a second holder in
      s-42.json.tmp                only inside a commit; found later under the lock it is a left-over
      s-42.<generation>.journal    the commits since the snapshot, if the session is large; ".damaged" behind it: a copy, kept
      .leases/s-42.<stream id>     locked by the process that runs the stream
      .events/s-42.<stream id>     the stream's events, one a line

Nothing else in the project spells a file name out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from persist.errors import InvalidSessionId, InvalidStreamId

LEASES = ".leases"
EVENTS = ".events"
_DOCUMENT = ".json"
_LOCK = ".lock"
_TEMP = ".tmp"
_DAMAGED = ".damaged"
_JOURNAL = re.compile(r"(?P<session>[^.]+)\.(?P<generation>[1-9][0-9]{0,17})\.journal")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
# Windows opens a device under these names, whatever the extension.
_DEVICES = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])")
# A lease's name holds both ids, and file names end at 255 bytes.
_MAX_STREAM_ID = 64
_STREAM_RULE = "a stream id is 1 to 64 of A-Z a-z 0-9 _ -, and begins with a letter or digit."
_RULE = "an id is 1 to 128 of A-Z a-z 0-9 _ -, begins with a letter or digit, and is no Windows device name."


def check_session_id(session_id: object) -> str:
    """Return `session_id` if it can name a session, else raise `InvalidSessionId`."""
    if isinstance(session_id, str) and _is_session_id(session_id):
        return session_id
    raise InvalidSessionId(session_id=session_id, reason=_type_hint(session_id) + _RULE)


def _type_hint(name: object) -> str:
    return "" if isinstance(name, str) else f"it is no string, but {type(name).__name__}; "


def _is_session_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None and _DEVICES.fullmatch(name) is None


def check_stream_id(stream_id: object) -> str:
    """Return `stream_id` if it can name a stream, else raise `InvalidStreamId`."""
    if is_stream_id(stream_id):
        return str(stream_id)
    raise InvalidStreamId(stream_id=stream_id, reason=_type_hint(stream_id) + _STREAM_RULE)


def is_stream_id(stream_id: object) -> bool:
    """Tell whether it can name a stream. Other programs may have written anything into `active_stream_id`."""
    return isinstance(stream_id, str) and _ID.fullmatch(stream_id) is not None and len(stream_id) <= _MAX_STREAM_ID


@dataclass(frozen=True, slots=True)
class SessionPaths:
    """The files of one session."""

    document: Path
    lock: Path
    temp: Path


class Layout:
    """The paths of one store directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.leases = directory / LEASES
        self.events = directory / EVENTS
        # Three Path objects cost more than taking the lock does (20 µs); servers come back to the same sessions.
        self._session = lru_cache(maxsize=1024)(self._paths)

    def session(self, session_id: str) -> SessionPaths:
        # What is no string may have no hash.
        return self._session(session_id if type(session_id) is str else check_session_id(session_id))

    def _paths(self, session_id: str) -> SessionPaths:
        name = f"{check_session_id(session_id)}{_DOCUMENT}"
        return SessionPaths(self.directory / name, self.directory / f"{name}{_LOCK}", self.directory / f"{name}{_TEMP}")

    def journal(self, session_id: str, generation: int) -> Path:
        return self.directory / f"{check_session_id(session_id)}.{generation}.journal"

    def lease(self, session_id: str, stream_id: str) -> Path:
        return self.leases / f"{session_id}.{stream_id}"

    def events_of(self, session_id: str, stream_id: str) -> Path:
        return self.events / f"{check_session_id(session_id)}.{check_stream_id(stream_id)}"


def copy_of(journal: Path) -> Path:
    """Where a damaged journal is kept, when it is replaced."""
    return journal.with_name(f"{journal.name}{_DAMAGED}")


def session_of_document(name: str) -> str | None:
    """The session whose document has this file name, or None."""
    stem = name.removesuffix(_DOCUMENT)
    return stem if stem != name and _is_session_id(stem) else None


def session_of_leftover(name: str) -> str | None:
    """The session whose lock or temporary file has this name, or None."""
    for suffix in (f"{_DOCUMENT}{_LOCK}", f"{_DOCUMENT}{_TEMP}"):
        if name.endswith(suffix) and _is_session_id(name.removesuffix(suffix)):
            return name.removesuffix(suffix)
    return None


def journal_of(name: str, *, copies: bool = False) -> tuple[str, int] | None:
    """The session and the generation of the journal that has this file name, or None. `copies` of damaged ones count, too."""
    shape = _JOURNAL.fullmatch(name.removesuffix(_DAMAGED) if copies else name)
    return (shape["session"], int(shape["generation"])) if shape and _is_session_id(shape["session"]) else None


def stream_of(name: str) -> tuple[str, str] | None:
    """The (session id, stream id) of a lease's or an events file's name, or None. Ids hold no dot: the first one parts them."""
    session_id, _, stream_id = name.partition(".")
    return (session_id, stream_id) if _is_session_id(session_id) and is_stream_id(stream_id) else None
