"""The choice of a store's engine. Only this module knows that there are several."""

from __future__ import annotations

import os
import stat

from persist import errors
from persist.arguments import expanded
from persist.engine import Engine
from persist.files import FileEngine
from persist.storage import commit


def _directory(path: object, *, create: bool) -> str:
    """Return the real path of a store's directory, which need not exist yet.

    It is the real path, because two names of one directory must share their in-process locks, and because a chdir must
    not move the store.
    """
    directory = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if type(directory) is not str or not directory or "\0" in directory:
        raise errors.InvalidArgument(what="a store's path", expected="a directory's name", got=repr(path))
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
    if isinstance(path, str) and path.startswith(("postgresql://", "postgres://")):
        from persist.postgres.engine import PostgresEngine

        return path, PostgresEngine(
            path, schema=schema, create=create, timeout_s=timeout_s, keep_events_s=keep_events_s, lease_s=lease_s
        )
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
