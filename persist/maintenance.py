"""Maintenance: what is damaged, stale or left over in a directory of sessions."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from persist import errors, streams, turn
from persist.storage import document, layout
from persist.storage.directory import SessionDirectory, is_left_over
from persist.working_copy import WorkingCopy


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `Store.check` has found.

    `kind` is "corrupt", "unsupported", "unreadable", "locked", "stale", "left-over", "orphaned" or "ignored".
    """

    session_id: str
    kind: str
    path: Path
    message: str


def check(backend: streams.Backend) -> list[Problem]:
    """Return what is wrong in a store. See `Store.check`."""
    files = backend.files
    problems = [problem for session_id in files.session_ids() if (problem := _problem(backend, session_id))]
    for session_id, path, is_harmless in _left_behind(files):
        if is_harmless:
            remedy = f"the next commit to {session_id!r} removes or uses it"
            if files.exists(session_id):
                # A commit that only adds to a journal does not.
                remedy = f"{layout.command('compact', files.layout.directory, session_id)} removes it"
            kind, what = "left-over", f"is left over from a crash, and harmless; {remedy}."
        else:
            name = os.path.basename(files.layout.session(session_id).document)
            kind, what = "orphaned", f"holds commits of another {name} than is there. Put that one back, or remove the "
            what += "journal with them."
        problems.append(Problem(session_id, kind, path, f"{path} {what}"))
    for path in sorted(Path(files.layout.directory, name) for name in files.names() if name.endswith(".json")):
        document_name = layout.name_of_document(path.name)
        if document_name is None:
            remedy = f"For a session of that id its name is {_name_for(path.stem)}. Rename it, or move it away."
            what = f"{path} is no session, since {path.stem!r} names none: it is ignored. {remedy}"
            problems.append(Problem(path.stem, "ignored", path, what))
        elif files.id_of(document_name) is None:
            what = f"{path} holds no session id whose hash its name is. Restore it from a backup, or move it away."
            problems.append(Problem(document_name, "corrupt", path, what))
    return problems


def _left_behind(files: SessionDirectory) -> list[tuple[str, Path, bool]]:
    """Return what no document needs: (session id, path, whether it is harmless), sorted.

    A commit under way shows as one.
    """
    found: list[tuple[str, Path, bool]] = []
    names = files.names()
    for file_name in names:
        path = Path(files.layout.directory, file_name)
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
            header = None
            try:
                with files.looking_at(session_id) as paths:
                    header = document.read_head(paths.document, session_id)[0].header
            except errors.SessionNotFound:
                pass
            except errors.PersistError:
                # The document may name it, and the problem that it has is told already.
                continue
            with contextlib.suppress(OSError):
                if header is None or header.journal != journal[1]:
                    found.append((session_id, path, is_left_over(path, journal[1], header)))
    return sorted(found, key=lambda each: (not each[2], each))


def _problem(backend: streams.Backend, session_id: str) -> Problem | None:
    files = backend.files
    path = files.layout.session(session_id).document
    try:
        active = turn.active_stream(WorkingCopy(files.read(session_id)).fields)
        if active is None:
            return None
        with files.transaction(session_id) as tx:
            info = streams.look_at(tx)
        if info is None or info.is_live:
            return None
        # A sweep goes by the leases; another program's streams have none.
        option = "" if (session_id, info.stream_id) in files.leases() else " --every-session"
        remedy = f"Clear it with 'persist clear-stale {files.layout.directory}{option}'."
        kind, message = "stale", f"Stream {info.stream_id} of session {session_id!r} is dead. {remedy}"
    except errors.CorruptSession as error:
        kind, message = "corrupt", str(error)
    except errors.UnsupportedFormat as error:
        kind, message = "unsupported", str(error)
    except errors.LockTimeout as error:
        kind, message = "locked", str(error)
    except OSError as error:
        kind, message = "unreadable", str(error)
    except errors.SessionNotFound:
        return None
    return Problem(session_id, kind, Path(path), message)


def _name_for(session_id: str) -> str:
    try:
        return f"{layout.name_of(layout.check_session_id(session_id))}.json"
    except errors.InvalidArgument:
        return "another one"
