"""The Claude Agent SDK's own contracts, and its verbs that work on a session store."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("claude_agent_sdk", reason="needs claude-agent-sdk")

import claude_agent_sdk as sdk
from claude_agent_sdk.testing import run_session_store_conformance

import persist
from persist.adapters.claude_agent_sdk import PersistSessionStore

PROJECT = sdk.project_key_for_directory("/srv/shop")


def transcript(session_id: str, *texts: str, parent: str | None = None) -> list[Any]:
    """Return entries as the SDK's command line writes them: each names the one before."""
    entries = []
    for number, text in enumerate(texts):
        entry: dict[str, Any] = {"type": ("user", "assistant")[number % 2], "uuid": str(uuid.uuid4())}
        entry |= {"parentUuid": parent, "sessionId": session_id, "cwd": "/srv/shop", "isSidechain": False}
        entry |= {"timestamp": f"2026-11-30T10:00:{number:02}.000Z"}
        entry |= {"message": {"role": entry["type"], "content": text}}
        parent = entry["uuid"]
        entries.append(entry)
    return entries


@pytest.mark.parametrize("journal", ["auto", "always"])
def test_it_satisfies_every_contract_of_the_sdk(tmp_path: Path, journal: Any) -> None:
    """The 14 contracts hold. None is skipped, because the adapter has all optional methods."""
    made: list[sdk.SessionStore] = []

    def make_store() -> sdk.SessionStore:
        made.append(PersistSessionStore(persist.Store(tmp_path / str(len(made)), journal=journal)))
        return made[-1]

    asyncio.run(run_session_store_conformance(make_store))
    optional = ("list_sessions", "list_session_summaries", "delete", "list_subkeys")
    assert all(getattr(PersistSessionStore, name) is not getattr(sdk.SessionStore, name) for name in optional)
    # One is only looked at, and there is one for each contract.
    assert len(made) == 1 + 14


def test_the_verbs_of_the_sdk_work_on_it(directory: Path) -> None:
    """A session is listed, renamed, tagged, read, forked and deleted through the SDK's own functions."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        options: Any = {"session_store": store, "directory": "/srv/shop"}
        mine, agent = str(uuid.uuid4()), "agent-7"
        key: sdk.SessionKey = {"project_key": PROJECT, "session_id": mine}
        await store.append(key, transcript(mine, "Why?", "Because."))
        await store.append({**key, "subpath": f"subagents/{agent}"}, transcript(mine, "Look", "Seen"))

        await sdk.rename_session_via_store(store, mine, "A reason", directory="/srv/shop")
        await sdk.tag_session_via_store(store, mine, "done", directory="/srv/shop")
        [info] = await sdk.list_sessions_from_store(**options)
        assert (info.session_id, info.summary, info.tag) == (mine, "A reason", "done")
        assert (info.first_prompt, info.cwd) == ("Why?", "/srv/shop")
        read = await sdk.get_session_messages_from_store(store, mine, directory="/srv/shop")
        assert [message.message["content"] for message in read] == ["Why?", "Because."]
        assert await sdk.list_subagents_from_store(store, mine, directory="/srv/shop") == ["7"]

        forked = await sdk.fork_session_via_store(store, mine, directory="/srv/shop")
        assert len(await sdk.list_sessions_from_store(**options)) == 2
        await sdk.delete_session_via_store(store, mine, directory="/srv/shop")
        assert [each.session_id for each in await sdk.list_sessions_from_store(**options)] == [forked.session_id]
        assert persist.Store(directory).ids() == [f"{PROJECT}/{forked.session_id}"]

    asyncio.run(main())


def test_a_listing_never_finds_a_summary_stale(directory: Path) -> None:
    """After each append the summary has the time of the listing, so the SDK loads no transcript for a list."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        key: sdk.SessionKey = {"project_key": PROJECT, "session_id": "s"}
        for entry in transcript("s", *map(str, range(20))):
            await store.append(key, [entry])
            [listed] = await store.list_sessions(PROJECT)
            [summary] = await store.list_session_summaries(PROJECT)
            assert summary["mtime"] == listed["mtime"]

    asyncio.run(main())


def test_a_batch_outlives_a_transcript_that_is_locked_for_too_long(directory: Path) -> None:
    """The SDK repeats a batch that could not get the lock. It would drop the batch after a `TimeoutError`.

    It fails if `append` lets `persist.LockTimeout` through.
    """
    batching = pytest.importorskip("claude_agent_sdk._internal.transcript_mirror_batcher", reason="the SDK moved it")
    store = persist.Store(directory, timeout_s=0)
    session_id = f"{PROJECT}/s"
    errors: list[BaseException] = []
    holding = store.transaction(session_id, create=True)

    class Watched(PersistSessionStore):
        async def append(self, key: Any, entries: Any) -> None:
            try:
                await super().append(key, entries)
            except persist.LockError as error:
                errors.append(error)
                holding.__exit__(None, None, None)
                raise

    async def main() -> None:
        dropped: list[Any] = []

        async def drop(key: Any, error: str) -> None:
            dropped.append(error)

        batcher = batching.TranscriptMirrorBatcher(store=Watched(store), projects_dir="/projects", on_error=drop)
        holding.__enter__()
        batcher.enqueue(f"/projects/{PROJECT}/s.jsonl", transcript("s", "Why?"))
        await batcher.flush()
        assert dropped == []

    asyncio.run(main())
    [error] = errors
    assert isinstance(error, persist.LockError)
    assert not isinstance(error, TimeoutError)
    assert error.kind == "timeout"
    assert len(cast("list[Any]", store.load(session_id).data["messages"])) == 1
