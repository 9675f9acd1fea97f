"""Maintenance: the search for damage, stale streams and left-over files in a directory of sessions.

The first look at a session takes no lock. It may meet a commit, a delete or a fold of a live server half-way. So a
session that looks wrong is looked at again, under its lock, and that look decides (HAZARDS F11).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from persist import errors, json_codec, streams, tool_calls, turn
from persist.engine import Engine, Transaction, decoding
from persist.files import FileEngine, FileTransaction
from persist.storage import disk, layout
from persist.storage.content import Content, Items
from persist.storage.directory import SessionDirectory, is_left_over
from persist.storage.document import Header
from persist.working_copy import WorkingCopy

Found = TypeVar("Found")
#: The order of the problems of a store. The problems of documents come first, and foreign files come last.
_ORDER = ("left-over", "orphaned", "foreign")
#: So many ids of tool calls are shown.
_MOST_IDS = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem that `Store.check` has found.

    `kind` is "corrupt", "unsupported", "unreadable", "locked", "stale", "unanswered-tools", "misplaced-tools",
    "orphaned-tools",
    "left-over", "orphaned" or "foreign". A foreign
    file is not of `persist`, and no fault of the store. Its `session_id` is its name, without ".json".
    """

    session_id: str
    kind: str
    path: Path
    message: str


@dataclass(frozen=True, slots=True)
class Step(Generic[Found]):
    """A step of a look at many sessions. `done` of `total` are done, and `found` is the result of the last one."""

    done: int
    total: int
    found: Found


@dataclass(slots=True)
class _Files:
    """The files that bear a session's name, as the directory was listed. `journals` holds file names with their hex."""

    has_document: bool = False
    has_lock: bool = False
    has_temp: bool = False
    journals: list[tuple[str, str]] = field(default_factory=list)


def check(backend: streams.Backend) -> list[Problem]:
    """Return the problems of a store. See `Store.check`."""
    return in_order(problem for step in checking(backend) for problem in step.found)


def in_order(problems: Iterator[Problem]) -> list[Problem]:
    """Sort problems: those of documents by their sessions, then left-over files, orphaned journals, foreign files."""
    return sorted(
        problems,
        key=lambda each: (_ORDER.index(each.kind) + 1 if each.kind in _ORDER else 0, each.session_id, each.path),
    )


def checking(backend: streams.Backend) -> Iterator[Step[list[Problem]]]:
    """Check one session after the other. The last step has the foreign files, if the store has files."""
    if not isinstance(backend.engine, FileEngine):
        yield from _checking_sessions(backend.engine)
        return
    files = backend.engine
    sessions, foreign = _listed(files)
    # The streams in a backup are as they were committed. They end when it is put back.
    has_streams = not disk.exists(files.layout.backup)
    for done, (name, its) in enumerate(sorted(sessions.items()), 1):
        yield Step(done, len(sessions), list(_problems(files, name, its, has_streams=has_streams)))
    yield Step(len(sessions), len(sessions), [_foreign(files, name) for name in sorted(foreign)])


def _checking_sessions(engine: Engine) -> Iterator[Step[list[Problem]]]:
    """Check the sessions of a store that has nothing beside them: no files that a crash may leave."""
    session_ids = engine.session_ids()
    for done, session_id in enumerate(session_ids, 1):
        yield Step(done, len(session_ids), list(_problems_of(engine, session_id)))


def _problems_of(engine: Engine, session_id: str) -> Iterator[Problem]:
    place = engine.where(session_id)
    try:
        found = engine.read(session_id)
        with decoding(session_id, place):
            found.content.decode()
        if turn.active_stream(WorkingCopy(found).fields) is not None or _tool_call_faults(found.content):
            with engine.transaction(session_id) as tx:
                yield from _of_turns(engine, tx, has_streams=True)
    except errors.SessionNotFound:
        # It was deleted since the listing.
        return
    except errors.LockTimeout as error:
        yield Problem(session_id, "locked", _path(place), str(error))
    except (errors.PersistError, OSError) as error:
        yield _of_document(session_id, _path(place), error)


def _path(place: str) -> Path:
    """Return the place of a session for a problem: a path, or the name of a place in a database as it is."""
    return Path(place) if type(place) is str else place  # type: ignore[return-value]


def _listed(files: SessionDirectory) -> tuple[dict[str, _Files], list[str]]:
    """Return the files of each session's name, and the names of the files that are not of `persist`."""
    sessions: dict[str, _Files] = {}
    foreign = []
    for file_name in files.names():
        if (name := layout.name_of_document(file_name)) is not None:
            sessions.setdefault(name, _Files()).has_document = True
        elif (left := layout.name_of_leftover(file_name)) is not None:
            its = sessions.setdefault(left[0], _Files())
            its.has_temp, its.has_lock = its.has_temp or left[1], its.has_lock or not left[1]
        elif (journal := layout.journal_of(file_name)) is not None:
            sessions.setdefault(journal[0], _Files()).journals.append((file_name, journal[1]))
        elif layout.is_foreign(file_name):
            foreign.append(file_name)
    return sessions, foreign


def _problems(files: FileEngine, name: str, its: _Files, *, has_streams: bool) -> Iterator[Problem]:
    """Yield the problems of a session. If it looks wrong at first, it is looked at again under the lock."""
    first = session_id = files.id_of(name)
    suspicion: Exception | None = None
    if session_id is not None and its.has_document:
        try:
            found = files.read(session_id)
            is_odd = its.has_lock and not disk.is_plain(files.layout.named(name, None).lock)
            has_stream = has_streams and turn.active_stream(WorkingCopy(found).fields) is not None
            is_suspect = is_odd or its.has_temp or has_stream or bool(_tool_call_faults(found.content))
            if not is_suspect and all(journal == found.header.journal for _, journal in its.journals):
                return
        except (errors.PersistError, OSError) as error:
            suspicion = error
    if session_id is None:
        session_id = name
    document = Path(files.layout.named(name, None).document)
    try:
        if isinstance(suspicion, errors.LockTimeout):
            # The first look has waited for the lock already.
            raise suspicion
        with files.transaction_on(name, first) as tx:
            yield from _judged(files, tx, name, first, its, has_streams=has_streams)
    except errors.LockTimeout as error:
        yield Problem(session_id, "locked", document, str(error))
    except errors.LockError as error:
        # A user who may only read sees streams and left-overs, and cannot judge them. Damage is told.
        if suspicion is not None:
            yield _of_document(session_id, document, suspicion)
        elif not its.has_document and (its.has_temp or its.journals):
            yield Problem(session_id, "locked", document, str(error))
    except (errors.PersistError, OSError) as error:
        # The disk refuses the lock, in a store that can only be read, say. A lone lock file is no problem.
        if its.has_document or its.has_temp or its.journals:
            yield _of_document(session_id, document, suspicion or error)


def _judged(
    files: FileEngine, tx: FileTransaction, name: str, session_id: str | None, its: _Files, *, has_streams: bool
) -> Iterator[Problem]:
    """Yield the problems of a session whose lock is held. So no commit, fold or delete is under way."""
    paths, header = tx.paths, None
    has_document = tx.exists()
    if has_document:
        if session_id is None and (session_id := files.id_of(name)) is not None:
            # The session was created between the two looks. It is whole, because its header names its id.
            return
        if session_id is None:
            what = f"{paths.document} holds no session id that fits the hash in its name. "
            what += "Restore it from a backup, or move it away."
            yield Problem(name, "corrupt", Path(paths.document), what)
        else:
            try:
                header = tx.undisturbed(files.read_now).header
                yield from _of_turns(files, tx, has_streams=has_streams)
            except errors.SessionNotFound:
                # A program that heeds no lock has removed it just now.
                has_document = False
            except (errors.PersistError, OSError) as error:
                yield _of_document(session_id, Path(paths.document), error)
    shown = session_id or name
    if its.has_temp and disk.exists(paths.temp):
        temp = Path(paths.temp)
        if disk.is_plain(temp):
            yield _left_over(files, shown, temp, has_document=has_document)
        else:
            yield Problem(shown, "unreadable", temp, str(errors.unsafe(temp, "something else")))
    for file_name, journal in its.journals:
        path = Path(paths.directory, file_name)
        if has_document and (header is None or header.journal == journal):
            # A document that cannot be read may name this journal, and that problem is told already.
            continue
        with contextlib.suppress(FileNotFoundError):
            yield _journal(files, shown, path, journal, header, has_document=has_document)
    # A lock file without a session is no problem. It holds nothing, and it is gone when this lock is given up.


def _tool_call_faults(content: Content) -> list[tool_calls.ToolCallFault]:
    """Return what is wrong with the tool calls of a session. Messages without any are not decoded."""
    messages = content.apart.get(turn.MESSAGES)
    if not isinstance(messages, Items) or not any(map(tool_calls.may_have_calls, messages)):
        return []
    found = tool_calls.faults(list(map(json_codec.decode, messages)))
    return [fault for fault in found if not fault.is_pending]


def _of_turns(engine: Engine, tx: Transaction, *, has_streams: bool) -> Iterator[Problem]:
    """Tell what turns have left in a session. A live one is still at work."""
    info = streams.look_at(tx)
    if info is not None and info.is_live:
        return
    if info is not None and has_streams:
        yield _stale(engine, tx, info)
    yield from _unmatched(engine, tx)


def _unmatched(engine: Engine, tx: Transaction) -> Iterator[Problem]:
    """Name the tool calls without a result, and the results without a call, in a problem each."""
    faults = _tool_call_faults(tx.read().content)
    repair = layout.command("repair", engine.place, tx.session_id)
    texts = {
        "unanswered": f"tool calls have no result, so a provider may refuse the conversation. {repair} answers them.",
        "misplaced": f"results of tools stand where a provider does not take them. {repair} moves or removes them.",
        "orphaned": "results of tools have no call before them. Remove them with store.transaction().",
    }
    for kind, text in texts.items():
        ids = [fault.call_id or "without an id" for fault in faults if fault.kind == kind]
        if ids:
            some = ", ".join(ids[:_MOST_IDS]) + (", …" if len(ids) > _MOST_IDS else "")
            message = f"Session {tx.session_id!r}: {len(ids)} {text} ({some})"
            yield Problem(tx.session_id, f"{kind}-tools", _path(tx.place), message)


def _stale(engine: Engine, tx: Transaction, info: streams.StreamInfo) -> Problem:
    # A sweep looks at the leases, and another program's streams have none.
    options = [] if (tx.session_id, info.stream_id) in engine.leases() else ["--every-session"]
    remedy = f"Clear it with {layout.command('clear-stale', engine.place, *options)}."
    message = f"Stream {info.stream_id} of session {tx.session_id!r} is dead. {remedy}"
    return Problem(tx.session_id, "stale", _path(tx.place), message)


def _of_document(session_id: str, path: Path, error: Exception) -> Problem:
    if isinstance(error, errors.CorruptSession):
        return Problem(session_id, "corrupt", path, str(error))
    return Problem(
        session_id, "unsupported" if isinstance(error, errors.UnsupportedFormat) else "unreadable", path, str(error)
    )


def _left_over(files: SessionDirectory, session_id: str, path: Path, *, has_document: bool) -> Problem:
    remedy = f"the next commit to {session_id!r} removes or uses it"
    if has_document:
        # A commit that only adds to a journal does not remove it.
        remedy = f"{layout.command('compact', files.layout.directory, session_id)} removes it"
    return Problem(session_id, "left-over", path, f"{path} is left over from a crash, and harmless; {remedy}.")


def _journal(
    files: SessionDirectory, session_id: str, path: Path, name: str, header: Header | None, *, has_document: bool
) -> Problem:
    """Return the problem of a journal that no document names. Raise `FileNotFoundError` if it is gone."""
    disk.version_of(path)
    try:
        is_harmless = is_left_over(path, name, header)
    except errors.Unreadable as error:
        return Problem(session_id, "unreadable", path, str(error))
    if is_harmless:
        return _left_over(files, session_id, path, has_document=has_document)
    what = f"{path} holds commits of another {layout.name_of(session_id)}.json than is there. "
    what += "Put that file back, or remove the journal and its commits."
    return Problem(session_id, "orphaned", path, what)


def _foreign(files: SessionDirectory, file_name: str) -> Problem:
    path = Path(files.layout.directory, file_name)
    what = f"{path} is not of persist, which leaves it alone."
    stem = file_name.removesuffix(layout.DOCUMENT)
    if stem != file_name:
        what = f"{path} is no session, since {stem!r} names none: persist leaves it alone. "
        what += f"For a session of that id its name is {_name_for(stem)}."
    return Problem(stem, "foreign", path, what)


def _name_for(session_id: str) -> str:
    try:
        return f"{layout.name_of(layout.check_session_id(session_id))}{layout.DOCUMENT}"
    except errors.InvalidArgument:
        return "another one"
