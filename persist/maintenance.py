"""Maintenance: what is damaged, stale or left over in a directory of sessions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persist import json_codec, streams
from persist.errors import CorruptSession, LockTimeout, PersistError, SessionNotFound, UnsafeFile, UnsupportedFormat
from persist.storage import document, layout
from persist.storage.content import Content
from persist.storage.directory import SessionDirectory, is_left_over
from persist.storage.document import Header
from persist.streams import Backend
from persist.turn import ACTIVE


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `Store.check` has found.

    `kind` is "corrupt", "unsupported", "unsafe", "unreadable", "locked", "stale", "left-over", "orphaned" or "ignored".
    """

    session_id: str
    kind: str
    path: Path
    message: str


def check(backend: Backend) -> list[Problem]:
    """Return what is wrong in a store. See `Store.check`."""
    files = backend.files
    problems = [problem for session_id in files.session_ids() if (problem := _problem(backend, session_id))]
    orphans = []
    for session_id, path, is_harmless in _left_behind(files):
        if not is_harmless:
            orphans.append((session_id, path))
            continue
        remedy = f"the next commit to {session_id!r} removes or uses it"
        if files.exists(session_id):
            # A commit that only adds to a journal does not.
            remedy = f"{layout.command('compact', files.layout.directory, session_id)} removes it"
        what = f"{path} is left over from a crash, and harmless; {remedy}."
        problems.append(Problem(session_id, "left-over", path, what))
    for session_id, path in orphans:
        name = files.layout.session(session_id).document.name
        what = (
            f"{path} holds commits of another {name} than is there. Put that one back, or remove the journal with them."
        )
        problems.append(Problem(session_id, "orphaned", path, what))
    for name in sorted(filter(None, map(layout.name_of_document, files.names()))):
        path = files.layout.directory / f"{name}.json"
        if files.id_of(name) is None:
            what = f"{path} holds no session id whose hash its name is. Restore it from a backup, or move it away."
            problems.append(Problem(name, "corrupt", path, what))
    for path in _ignored(files):
        what = f"{path} is no session, since {path.stem!r} names none: it is ignored. Rename it, or move it away."
        problems.append(Problem(path.stem, "ignored", path, what))
    return problems


def _ignored(files: SessionDirectory) -> list[Path]:
    """Return the JSON files whose names are those of no session, sorted."""
    names = [name for name in files.names() if name.endswith(".json") and layout.name_of_document(name) is None]
    return sorted(files.layout.directory / name for name in names)


def _left_behind(files: SessionDirectory) -> list[tuple[str, Path, bool]]:
    """Return what no document needs: (session id, path, whether it is harmless), sorted.

    A commit under way shows as one.
    """
    found: list[tuple[str, Path, bool]] = []
    names = files.names()
    for file_name in names:
        path = files.layout.directory / file_name
        left = layout.name_of_leftover(file_name)
        if left is not None:
            name, is_temp = left
            if is_temp or f"{name}.json" not in names:
                found.append((files.id_of(name) or name, path, True))
        journal = layout.journal_of(file_name)
        if journal is not None:
            session_id = files.id_of(journal[0]) or journal[0]
            if session_id == journal[0] and layout.is_hashed(session_id) and f"{session_id}.json" in names:
                # Nobody knows what the document would say of it.
                continue
            with contextlib.suppress(OSError):
                header = _header_of(files, session_id)
                if header is None or header.journal != journal[1]:
                    found.append((session_id, path, is_left_over(path, journal[1], header)))
    return sorted(found)


def _header_of(files: SessionDirectory, session_id: str) -> Header | None:
    try:
        with files.looking_at(session_id) as path:
            return document.read_head(path, session_id).header
    except PersistError:
        return None


def _problem(backend: Backend, session_id: str) -> Problem | None:
    files = backend.files
    path = files.layout.session(session_id).document
    try:
        if _active_in(files.read(session_id).content) is None:
            return None
        info = streams.look_at(backend, session_id)
        if info is None or info.is_live:
            return None
        # A sweep goes by the leases; another program's streams have none.
        option = "" if (session_id, info.stream_id) in files.leases() else " --every-session"
        remedy = f"Clear it with 'persist clear-stale {path.parent}{option}'."
        return Problem(
            session_id, "stale", path, f"Stream {info.stream_id} of session {session_id!r} is dead. {remedy}"
        )
    except CorruptSession as error:
        kind, message = "corrupt", str(error)
    except UnsupportedFormat as error:
        kind, message = "unsupported", str(error)
    except UnsafeFile as error:
        kind, message = "unsafe", str(error)
    except LockTimeout as error:
        kind, message = "locked", str(error)
    except OSError as error:
        kind, message = "unreadable", str(error)
    except SessionNotFound:
        return None
    return Problem(session_id, kind, path, message)


def _active_in(content: Content) -> Any:
    value = content.fields.get(ACTIVE)
    return None if value is None else json_codec.decode(value) or None
