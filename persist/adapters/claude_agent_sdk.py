"""The `SessionStore` of the Claude Agent SDK.

    from claude_agent_sdk import ClaudeAgentOptions, query
    from persist.adapters.claude_agent_sdk import PersistSessionStore

    options = ClaudeAgentOptions(session_store=PersistSessionStore("var/claude"))
    async for message in query(prompt="Hello", options=options):
        ...

Each transcript is a session of its own. Its id is the parts of the SDK's key, joined with ``/``:

    <project_key>/<session_id>                              the main transcript
    <project_key>/<session_id>/subagents/agent-<id>         the transcript of a subagent: the subpath comes last

In a project key and in a session id, ``%25`` stands for ``%``, and ``%2F`` for ``/``. So no two keys have one id, and
the sessions of a project have a prefix of their own. The file name encodes the id once more. A transcript holds:

    messages    the entries, exactly as the SDK gave them
    summary     only of a main transcript: the `data` of the SDK's summary of all entries, folded in the same commit

Give the adapter a directory of its own, because it takes every session there for a transcript.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from persist.adapters.opening import AnyStore, opened
from persist.errors import (
    CorruptSession,
    InvalidArgument,
    LockError,
    LockTimeout,
    SessionNotFound,
    Unreadable,
    UnsupportedFormat,
    shown,
)
from persist.transaction import Transaction

if TYPE_CHECKING:
    from claude_agent_sdk import (
        SessionKey,
        SessionListSubkeysKey,
        SessionStoreEntry,
        SessionStoreListEntry,
        SessionSummaryEntry,
    )

    from persist.head import Head

    Fold = Callable[[SessionSummaryEntry | None, SessionKey, list[SessionStoreEntry]], SessionSummaryEntry]

ENTRIES = "messages"
SUMMARY = "summary"


class PersistSessionStore:
    """A `claude_agent_sdk.SessionStore` with all of its methods.

    Args:
        store: a store, or the path of its directory. Keep its `timeout_s` below the 60 seconds that the SDK waits for
            an append. It runs on asyncio only.

    Raises:
        InvalidArgument: `store` is neither. Or a method got a key with an empty part, or one that makes an id of more
            than 512 characters. Then nothing was written.

    Concurrency: any number of tasks and processes may append to one transcript. Each append is one commit, and a reader
    sees all of it or nothing.
    """

    def __init__(self, store: AnyStore) -> None:
        self._store = opened(store)

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Add entries to a transcript, in one commit. Durable and visible on return.

        An entry is skipped if the transcript has one with the same ``uuid``, whatever else it holds. So a caller may
        repeat the call after an error. Entries without a ``uuid`` are added each time. A call that is cancelled writes
        all, or nothing, and nothing later.

        Raises:
            InvalidArgument, NotJSON: the key or an entry cannot be kept. Nothing was written.
            LockError: another writer held the transcript for too long. Nothing was written, so repeat it. It is no
                `TimeoutError`, because the SDK drops a batch after a `TimeoutError`, and repeats it after other errors.
            ImportError: the Claude Agent SDK, which summarises main transcripts, is not installed.
            CommitFailed, CommitUnknown, CorruptSession: see the errors.
        """
        session_id = _session_id(key)
        _require_entries(entries)
        if not entries:
            return
        # The SDK takes long to import. Nobody should wait for that with the lock held.
        fold = _imported_fold() if key.get("subpath") is None else None

        def add(tx: Transaction) -> None:
            fresh = _without_known(tx, entries)
            tx.list(ENTRIES).extend(fresh)
            if fresh and fold is not None:
                tx.fields[SUMMARY] = _folded(tx.fields.get(SUMMARY), fold, key, fresh)

        try:
            await self._store.update(session_id, add, create=True)
        except LockTimeout as error:
            raise LockError(kind="timeout", session_id=session_id, reason=str(error)) from error

    async def load(self, key: SessionKey) -> list[SessionStoreEntry] | None:
        """Return the entries of a transcript, in their order, or None if there is none. Takes no lock.

        Raises:
            CorruptSession, UnsupportedFormat, Unreadable: the file cannot be trusted. It was not changed.
        """
        try:
            session = await self._store.load(_session_id(key))
        except SessionNotFound:
            return None
        entries: list[SessionStoreEntry] = session.data.get(ENTRIES, [])
        return entries

    async def list_sessions(self, project_key: str) -> list[SessionStoreListEntry]:
        """Return the id of each main transcript of a project, and when it was last committed.

        That time is in milliseconds since the epoch, by the clock of this machine. A transcript that cannot be read is
        left out, and `persist.Store.check` names it. It costs a look at the head of each transcript, also of subagents.
        """
        heads = await self._main_heads(project_key)
        return [{"session_id": name, "mtime": _milliseconds(head.updated_at)} for name, head in heads]

    async def list_session_summaries(self, project_key: str) -> list[SessionSummaryEntry]:
        """Return the summary of each main transcript of a project. Its `mtime` is the one of `list_sessions`.

        It reads heads only, unless a summary is larger than 4 KiB.
        """
        found: list[SessionSummaryEntry] = []
        for name, head in await self._main_heads(project_key):
            # A large summary is read on its own, and the session may be gone by then.
            with suppress(SessionNotFound, CorruptSession, UnsupportedFormat, Unreadable):
                data, updated_at = await self._summary(head)
                if data is not None:
                    found.append({"session_id": name, "mtime": _milliseconds(updated_at), "data": data})
        return found

    async def delete(self, key: SessionKey) -> None:
        """Delete a transcript, and with a main transcript those of its subagents. Durable on return.

        A key that was never written is no error. Each transcript is a commit of its own, and the main one is the last.
        So a crash may leave the main transcript with some of its subagents: delete it again. It never leaves a subagent
        without its main transcript. An append during the delete may begin a new transcript. So end the agent first.

        Raises:
            LockTimeout: a writer held one of the transcripts for too long. Delete it again.
            CorruptSession: one of them is damaged. The error names its id for `persist.Store.delete(id, force=True)`.
        """
        session_id = _session_id(key)
        subagents = [] if key.get("subpath") is not None else await self._store.ids(prefix=f"{session_id}/")
        for each in [*subagents, session_id]:
            with suppress(SessionNotFound):
                await self._store.delete(each)

    async def list_subkeys(self, key: SessionListSubkeysKey) -> list[str]:
        """Return the subpaths of a session's transcripts, sorted."""
        prefix = _session_id({"project_key": key["project_key"], "session_id": key["session_id"]}) + "/"
        return [each.removeprefix(prefix) for each in await self._store.ids(prefix=prefix)]

    async def _main_heads(self, project_key: str) -> list[tuple[str, Head]]:
        """Return the SDK's id and the head of each main transcript of a project."""
        prefix = _escaped("project_key", project_key) + "/"
        heads = await self._store.heads(prefix=prefix)
        named = [(head.id.removeprefix(prefix), head) for head in heads]
        return [(unquote(name), head) for name, head in named if "/" not in name]

    async def _summary(self, head: Head) -> tuple[dict[str, Any] | None, datetime]:
        """Return the data of a summary, and when it was committed."""
        try:
            return head.fields.get(SUMMARY), head.updated_at
        except KeyError:
            # It is too large for a head. The view may be of a later commit.
            view = await self._store.view(head.id)
            return view.fields.get(SUMMARY), view.updated_at


def _session_id(key: SessionKey) -> str:
    """Return the id of the session that holds a transcript."""
    if not isinstance(key, Mapping):
        raise InvalidArgument(what="a session key", expected="a dict", got=type(key).__name__)
    parts = [_escaped(name, key.get(name)) for name in ("project_key", "session_id")]
    subpath = key.get("subpath")
    if subpath is not None:
        # It comes last, so its own slashes are no danger.
        _escaped("subpath", subpath)
        parts.append(subpath)
    return "/".join(parts)


def _escaped(name: str, part: object) -> str:
    """Return a part of a key without a slash."""
    if type(part) is not str or not part:
        raise InvalidArgument(what=f"{name!r} of a session key", expected="a text that is not empty", got=shown(part))
    return part.replace("%", "%25").replace("/", "%2F")


def _require_entries(entries: object) -> None:
    expected = "a list of plain dicts"
    if type(entries) is not list:
        raise InvalidArgument(what="entries", expected=expected, got=type(entries).__name__)
    for entry in entries:
        if type(entry) is not dict:
            raise InvalidArgument(what="entries", expected=expected, got=f"a list with a {type(entry).__name__}")


def _without_known(tx: Transaction, entries: list[SessionStoreEntry]) -> list[SessionStoreEntry]:
    """Return the entries that a transcript does not have yet, by their uuid."""
    there = tx.list(ENTRIES)
    fresh, own = [], set()
    for entry in entries:
        uuid = entry.get("uuid")
        if type(uuid) is str:
            if uuid in own or there.place_of(uuid, key="uuid") is not None:
                continue
            own.add(uuid)
        fresh.append(entry)
    return fresh


def _folded(before: Any, fold: Fold, key: SessionKey, entries: list[SessionStoreEntry]) -> dict[str, Any]:
    """Return the data of a summary, with more entries folded into it."""
    # The fold only hands the time on. The true one is the commit's.
    summary: SessionSummaryEntry | None = None
    if before is not None:
        summary = {"session_id": key["session_id"], "mtime": 0, "data": before}
    data: dict[str, Any] = fold(summary, key, entries)["data"]
    return data


def _imported_fold() -> Fold:
    try:
        from claude_agent_sdk import fold_session_summary
    except ImportError as error:
        told = "A main transcript needs fold_session_summary of the Claude Agent SDK, and nothing was written."
        raise ImportError(
            f"{told} Install it: pip install 'claude-agent-sdk>=0.2'.", name="claude_agent_sdk"
        ) from error
    fold: Fold = fold_session_summary
    return fold


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
