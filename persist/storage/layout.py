"""Every file name of a store, and the two kinds of id that names are made of. A directory holds:

    var/sessions/
      s-42.json                      the document
      s-42.json.lock                 the session's lock. A locked file that is replaced would let a second holder in
      s-42.json.tmp                  only inside a commit. Found later under the lock it is a left-over
      s-42.<16 hex>.journal          the commits since the document was written, if the session is large
      s-42.<16 hex>.journal.damaged  a journal that `persist accept` could not take whole
      .probe.<16 hex>                for an instant, while a file system that is not known is tried
      .backup                        only in a backup: which store it is of
      .leases/s-42.<stream id>       locked by the process that runs the stream
      .events/s-42.<stream id>       the stream's events, one a line
      .events/s-42.<stream id>.tmp   only while its oldest events are dropped

A session id is any text. Its file name percent-encodes everything but letters, digits, `_` and `-`, so that a name
holds no dot. A file belongs to `persist` only if decoding its name and encoding it again gives the same name.

No other module of the project spells a file name out.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from dataclasses import dataclass
from functools import lru_cache, partial
from urllib.parse import quote, unquote_to_bytes

from persist.errors import InvalidArgument, shown

LEASES = ".leases"
EVENTS = ".events"
#: This file marks a directory of copies, and names the store that was copied.
BACKUP = ".backup"
DOCUMENT = ".json"
LOCK = ".lock"
TEMP = ".tmp"
_DAMAGED = ".damaged"
_JOURNAL = re.compile(r"(?P<name>[^.]+)\.(?P<journal>[0-9a-f]{16})\.journal")
MAX_ID = 512
# File names end at 255 bytes, and a lease's name holds a stream id, too.
_MAX_NAME = 180
_HASHED = re.compile(r"[A-Za-z0-9_%-]{100}~[0-9a-f]{32}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ENCODED = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+")
# Windows opens a device under these names, whatever the extension.
_DEVICES = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])")
_STREAM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_STREAM_RULE = "1 to 64 of A-Z a-z 0-9 _ -, and begin with a letter or digit"
_RULE = f"a string of 1 to {MAX_ID} characters, without half of a surrogate pair"


def check_session_id(session_id: object) -> str:
    """Return `session_id` if it can name a session, else raise `InvalidArgument`."""
    if type(session_id) is not str:
        raise InvalidArgument(what="a session id", got=type(session_id).__name__, expected=_RULE, session_id=session_id)
    if not 0 < len(session_id) <= MAX_ID or (not session_id.isascii() and _SURROGATE.search(session_id)):
        raise InvalidArgument(what="a session id", got=shown(session_id), expected=_RULE, session_id=session_id)
    return session_id


def command(words: str, *names: str) -> str:
    """Return a `persist` command line for an error's text. Quote a name that a shell or a terminal would misread."""
    quoted = [shlex.quote(each if each.isprintable() else ascii(each)[1:-1]) for each in names]
    return f"'persist {words} {' '.join(quoted)}'"


def _is_plain(name: str) -> bool:
    """Tell whether a session's files bear its id unchanged."""
    return bool(_PLAIN.fullmatch(name)) and len(name) <= _MAX_NAME and not _DEVICES.fullmatch(name)


def name_of(session_id: str) -> str:
    """Return the name that a session's files begin with."""
    if _is_plain(session_id):
        return session_id
    name = quote(session_id, safe="").replace(".", "%2E").replace("~", "%7E")
    if name[0] in "_-" or _DEVICES.fullmatch(session_id):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[:100]}~{hashlib.blake2b(session_id.encode(), digest_size=16).hexdigest()}"


def is_hashed(name: str) -> bool:
    """Tell whether a name holds a hash of the session's id. The document's header then holds the id."""
    return _HASHED.fullmatch(name) is not None


def id_of(name: str) -> str | None:
    """Return the session id of a file's name, or None for a hashed name and for a name that is not of `persist`."""
    if _is_plain(name):
        return name
    if _ENCODED.fullmatch(name) is None:
        return None
    try:
        session_id = unquote_to_bytes(name).decode()
        return session_id if name_of(check_session_id(session_id)) == name else None
    except (UnicodeDecodeError, InvalidArgument):
        return None


def is_ours(name: str) -> bool:
    """Tell whether a session's files can begin with this name."""
    return is_hashed(name) or id_of(name) is not None


def check_stream_id(stream_id: object) -> str:
    """Return `stream_id` if it can name a stream, else raise `InvalidArgument`."""
    if is_stream_id(stream_id):
        return str(stream_id)
    got = shown(stream_id) if isinstance(stream_id, str) else type(stream_id).__name__
    raise InvalidArgument(what="a stream id", got=got, expected=_STREAM_RULE, stream_id=stream_id)


def is_stream_id(stream_id: object) -> bool:
    """Tell whether a value can name a stream. Other programs may have written anything into `active_stream_id`."""
    return isinstance(stream_id, str) and _STREAM_ID.fullmatch(stream_id) is not None


@dataclass(frozen=True, slots=True)
class SessionPaths:
    """The paths of one session's files. `file_id` is its id, if the files' name holds a hash of it, else None."""

    directory: str
    name: str
    file_id: str | None
    document: str
    lock: str
    temp: str
    leases: str
    _events: str

    @classmethod
    def of(cls, directory: str, session_id: str) -> SessionPaths:
        """Return the paths of a session in a directory."""
        name = name_of(check_session_id(session_id))
        return cls.named(directory, name, session_id if is_hashed(name) else None)

    @classmethod
    def named(cls, directory: str, name: str, file_id: str | None) -> SessionPaths:
        """Return the paths of the session whose files bear a name."""
        # `os.path.join` is not used, because it would take most of the time of a list of 50,000 sessions.
        inside = directory if directory.endswith(os.sep) else f"{directory}{os.sep}"
        document, leases, events = f"{inside}{name}{DOCUMENT}", f"{inside}{LEASES}", f"{inside}{EVENTS}{os.sep}{name}."
        return cls(directory, name, file_id, document, f"{document}{LOCK}", f"{document}{TEMP}", leases, events)

    def journal(self, journal: str) -> str:
        return f"{self.document.removesuffix(DOCUMENT)}.{journal}.journal"

    def lease(self, stream_id: str) -> str:
        return f"{self.leases}{os.sep}{self.name}.{stream_id}"

    def events(self, stream_id: str) -> str:
        return self._events + stream_id


class Layout:
    """The paths of one store directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.leases = os.path.join(directory, LEASES)
        self.events = os.path.join(directory, EVENTS)
        self.backup = os.path.join(directory, BACKUP)
        self._session = lru_cache(maxsize=1024, typed=True)(partial(SessionPaths.of, directory))

    def session(self, session_id: str) -> SessionPaths:
        """Return the paths of a session. They are cached, because servers come back to the same sessions."""
        try:
            return self._session(session_id)
        except TypeError:
            # A value that is no string may not be hashable.
            check_session_id(session_id)
            raise

    def named(self, name: str, session_id: str | None) -> SessionPaths:
        """Return the paths of the session whose files bear a name. Its id may be unknown."""
        return SessionPaths.named(self.directory, name, session_id if is_hashed(name) else None)


def copy_of(journal: str) -> str:
    """Return the path where a damaged journal is kept when it is replaced."""
    return f"{journal}{_DAMAGED}"


def probe_of(directory: str, name: str) -> str:
    """Return the path of a file on which a lock is tried. It belongs to no session."""
    return os.path.join(directory, f".probe.{name}")


def temp_of(events: str) -> str:
    """Return the path where the events that a file keeps are put together, before they get the file's name."""
    return f"{events}{TEMP}"


def is_name(name: str) -> bool:
    """Tell whether a session's files may bear that name."""
    return name_of_document(f"{name}{DOCUMENT}") is not None


def name_of_document(file_name: str) -> str | None:
    """Return the name of the session whose document has this file name, or None."""
    name = file_name.removesuffix(DOCUMENT)
    return name if name != file_name and is_ours(name) else None


def name_of_leftover(file_name: str) -> tuple[str, bool] | None:
    """Return the name of the session whose lock or temporary file this is, or None.

    The name comes with the answer whether the file is the temporary one.
    """
    for suffix in (f"{DOCUMENT}{LOCK}", f"{DOCUMENT}{TEMP}"):
        name = file_name.removesuffix(suffix)
        if name != file_name and is_ours(name):
            return name, suffix.endswith(TEMP)
    return None


def journal_of(file_name: str, *, copies: bool = False) -> tuple[str, str] | None:
    """Return the session's name and the journal's hex of a file name, or None.

    With `copies`, the copies of damaged journals count, too.
    """
    shape = _JOURNAL.fullmatch(file_name.removesuffix(_DAMAGED) if copies else file_name)
    return (shape["name"], shape["journal"]) if shape and is_ours(shape["name"]) else None


def is_foreign(file_name: str) -> bool:
    """Tell whether a file in a store's directory does not belong to `persist`."""
    if file_name in (LEASES, EVENTS, BACKUP):
        return False
    found = name_of_document(file_name) or name_of_leftover(file_name) or journal_of(file_name, copies=True)
    return found is None


def stream_of(file_name: str) -> tuple[str, str] | None:
    """Return the (session's name, stream id) of a lease's or an events file's name, or None.

    The first dot separates the two.
    """
    name, _, stream_id = file_name.partition(".")
    return (name, stream_id) if is_ours(name) and is_stream_id(stream_id) else None
