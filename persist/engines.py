"""The choice of a store's engine. Only this module knows that there are several."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from persist import errors
from persist.arguments import expanded, is_url
from persist.engine import Engine
from persist.files import FileEngine
from persist.storage import commit
from persist.storage.layout import LEASES

#: The schema of a store whose URL and options name none.
SCHEMA = "persist"
_SCHEMA_IN_URL = re.compile(r"([?&])schema=([^&]*)(&?)")
#: A longer name would be cut off by the server, and two of them could become one.
_SCHEMA_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")
#: A URL, also one that has lost a slash in a `Path`, or the other form in which libpq is told of a database.
_OTHER_PLACE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|(.*\s)?(host|dbname|password|service)\s*=", re.DOTALL)
_PASSWORDS = (
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/+[^:@/\s]*):\S*@"), r"\1:***@"),
    (re.compile(r"(password\s*=\s*)('[^']*'|[^&\s')]*)", re.IGNORECASE), r"\1***"),
)


def without_passwords(text: str) -> str:
    """Return a text without the passwords of the URLs in it.

    >>> without_passwords("No command 'postgresql://ann:secret@db/chats'.")
    "No command 'postgresql://ann:***@db/chats'."
    """
    for password, rest in _PASSWORDS:
        text = password.sub(rest, text)
    return text


def _directory(path: object, *, create: bool) -> str:
    """Return the real path of a store's directory, which need not exist yet.

    It is the real path, because two names of one directory must share their in-process locks, and because a chdir must
    not move the store.
    """
    directory = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if type(directory) is not str or not directory or "\0" in directory:
        raise errors.InvalidArgument(what="a store's path", expected="a directory's name", got=repr(path))
    _refuse_other_place(directory)
    name, directory = directory, os.path.realpath(expanded(directory))
    try:
        found = "a directory" if stat.S_ISDIR(os.stat(directory).st_mode) else "a file"
    except (FileNotFoundError, NotADirectoryError):
        found = "missing"
    except OSError as error:
        raise errors.Unreadable.because(directory, error) from error
    if found == "a file" or (found == "missing" and not create):
        raise errors.InvalidArgument(what=f"the store {name}", expected="a directory that is there", got=found)
    return directory


def _refuse_other_place(name: str) -> None:
    """Refuse what means a database to other programs, because a directory of that name would be made instead."""
    if _OTHER_PLACE.match(name):
        # It is not shown, because it may hold a password.
        expected = "a directory, or postgresql://user@host/database as a string, not as a Path"
        raise errors.InvalidArgument(what="a store's path", got="a URL of another kind", expected=expected)


def opened(
    path: str | os.PathLike[str],
    *,
    create: bool,
    timeout_s: float,
    journal: commit.Mode,
    mode: int,
    cache_bytes: int,
    unsafe_filesystem: bool,
    keep_events_s: float,
    keep_events_bytes: int | None,
    schema: str,
    lease_s: float,
) -> tuple[str, Engine]:
    """Open the engine of a store. See `Store`. Return its absolute name, too, by which another process opens it."""
    if is_url(path):
        url, schema = _parted(path, schema)
        engine: Engine = _postgres("engine").PostgresEngine(
            url,
            schema=schema,
            create=create,
            timeout_s=timeout_s,
            keep_events_s=keep_events_s,
            keep_events_bytes=keep_events_bytes,
            lease_s=lease_s,
        )
        return path, engine
    directory = _directory(path, create=create)
    engine = FileEngine(
        directory,
        commit.Options(journal, mode),
        timeout_s=timeout_s,
        create=create,
        cache_bytes=cache_bytes,
        unsafe_filesystem=unsafe_filesystem,
        keep_events_s=keep_events_s,
        keep_events_bytes=keep_events_bytes,
    )
    return directory, engine


# --- a database ---


def _postgres(module: str) -> Any:
    """Import a module of the engine on PostgreSQL, which needs packages of its own."""
    try:
        return import_module(f"persist.postgres.{module}")
    except ImportError as error:
        remedy = "Install them: pip install '.[postgres]', in a checkout of persist."
        reason = f"A store on PostgreSQL needs psycopg and psycopg_pool ({error})."
        raise errors.PersistError(reason=reason, remedy=remedy) from error


def _parted(url: str, schema: str) -> tuple[str, str]:
    """Return a URL without its ``schema=…``, which libpq does not know, and the name of the schema."""
    found = _SCHEMA_IN_URL.search(url)
    if found is not None:
        url = url[: found.start()] + (found[1] if found[3] else "") + url[found.end() :]
        named = unquote(found[2])
        if schema not in (SCHEMA, named):
            raise errors.InvalidArgument(what="schema", got=repr(schema), expected=f"{named!r}, as in the URL")
        schema = named
    if _SCHEMA_NAME.fullmatch(schema) is None:
        expected = "1 to 63 ASCII letters, digits, '_', '-' or '$', beginning with a letter or '_'"
        raise errors.InvalidArgument(what="schema", got=errors.shown(schema), expected=expected)
    return url, schema


@dataclass(frozen=True, slots=True)
class Migrated:
    """The result of `migrate`: the place of the store, the version of its schema, and the migrations that were run."""

    place: str
    version: int
    ran: list[str]


def migrate(url: str, *, schema: str = SCHEMA, timeout_s: float = 60.0) -> Migrated:
    """Make the schema of a store, or bring it up to date. Any number of processes may do this at once.

    Args:
        schema: the schema's name, which ``?schema=…`` in the URL names, too.
        timeout_s: seconds to wait for a connection. The migrations may take longer.

    Raises:
        InvalidArgument: it is no URL of a database, or the encoding of the database is not UTF-8.
        UnsupportedFormat: a newer version of persist has migrated the schema.
        Unavailable: the server refused, or cannot be reached.
    """
    if not is_url(url):
        got, remedy = "no URL of a database", "A directory needs no migration."
        expected = "postgresql://user@host/database"
        raise errors.InvalidArgument(what="the store", got=got, expected=expected, remedy=remedy)
    url, schema = _parted(url, schema)
    connections = _postgres("connections").Connections(url, schema)
    module = _postgres("migrate")
    ran = module.migrate(connections, timeout_s=timeout_s)
    return Migrated(str(connections.place), module.NEWEST, ran)


# --- for the command line ---


def options_there(name: str) -> dict[str, Any]:
    """Return the options of `Store` for a store that must be there already, because a look makes none.

    Raises:
        InvalidArgument: there is a directory of another kind, or none.
    """
    if is_url(name):
        return {"create": False}
    _refuse_other_place(name)
    path, expected = Path(expanded(name)), "the directory of a store"
    if not path.is_dir():
        raise errors.InvalidArgument(what=str(path), got="not a directory", expected=expected)
    if not (path / LEASES).is_dir() and not any(path.glob("*.json")):
        got = f"not a store, with neither sessions (*.json) nor {LEASES}"
        raise errors.InvalidArgument(what=str(path), got=got, expected=expected)
    return {"create": False, "mode": _mode_in(path)}


def options_to_write(name: str) -> dict[str, Any]:
    """Return the options of `Store` for a store that may be new: an empty directory, none, or an empty database.

    Raises:
        InvalidArgument: there is a directory of another kind.
    """
    if is_url(name):
        return {}
    path = Path(expanded(name))
    return options_there(name) | {"create": True} if path.exists() and not _is_empty(path) else {}


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _mode_in(directory: Path) -> int:
    """Return the mode of a store's files (`Store(mode=…)`).

    The mode of the directory shows whether a group shares the store.
    """
    mode = directory.stat().st_mode
    if not mode & stat.S_ISGID or mode & 0o050 != 0o050:
        return 0o600
    return 0o660 if mode & 0o020 else 0o640


def require_files(engine: Engine, remedy: str) -> FileEngine:
    """Return the engine of files, for work that only a directory needs.

    Raises:
        InvalidArgument: it is another one. The remedy says what is done there instead.
    """
    if not isinstance(engine, FileEngine):
        what, got = f"the store {engine.place}", "a database"
        raise errors.InvalidArgument(what=what, got=got, expected="a directory", remedy=remedy)
    return engine
