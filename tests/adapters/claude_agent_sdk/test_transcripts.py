"""Keys, entries, summaries and deletes, and the shape of all this on the disk."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("claude_agent_sdk", reason="needs claude-agent-sdk")

from actors import Actor
from claude_agent_sdk import SessionKey, fold_session_summary

import persist
import persist.aio
from persist.adapters.claude_agent_sdk import PersistSessionStore
from persist.adapters.opening import AnyStore

MAIN: SessionKey = {"project_key": "-srv-shop", "session_id": "s-1"}
AGENT: SessionKey = {**MAIN, "subpath": "subagents/agent-1"}


def named(session_id: str) -> SessionKey:
    return {"project_key": MAIN["project_key"], "session_id": session_id}


def agent(subpath: str) -> SessionKey:
    return {**MAIN, "subpath": subpath}


def entry(uuid: str | None = None, **values: Any) -> Any:
    return {"type": "x", **({} if uuid is None else {"uuid": uuid}), **values}


def data_of(summaries: list[Any]) -> dict[str, Any]:
    return {each["session_id"]: each["data"] for each in summaries}


# --- keys ---

ODD = ["a", "a/b", "a%2Fb", "a%252Fb", "%", "/", "//", " ", ".", "..", "a\nb", "ü", "日本", "~x", "CON", "a\0b", "A"]


def test_no_two_keys_share_a_transcript(directory: Path) -> None:
    """Keys of odd characters are told apart, and each comes back from the lists as it was given."""
    keys: list[SessionKey] = [{"project_key": project, "session_id": name} for project in ODD[:8] for name in ODD]
    keys += [{"project_key": "a", "session_id": name, "subpath": path} for name in ODD[:7] for path in ODD]

    async def main() -> None:
        store = PersistSessionStore(persist.Store(directory))
        for key in keys:
            await store.append(key, [entry(of=key)])
        for key in keys:
            assert await store.load(key) == [entry(of=key)]
        for project in ODD[:8]:
            assert sorted(each["session_id"] for each in await store.list_sessions(project)) == sorted(ODD)
            assert sorted(data_of(await store.list_session_summaries(project))) == sorted(ODD)
        for name in ODD[:7]:
            assert sorted(await store.list_subkeys({"project_key": "a", "session_id": name})) == sorted(ODD)

    asyncio.run(main())
    assert len(persist.Store(directory).ids()) == len(keys)


@pytest.mark.parametrize(
    "key",
    [
        {"project_key": "p"},
        {"session_id": "s"},
        {"project_key": "", "session_id": "s"},
        {"project_key": "p", "session_id": ""},
        {"project_key": "p", "session_id": 7},
        {"project_key": "p", "session_id": "s", "subpath": ""},
        {"project_key": "p", "session_id": "s" * 511},
        {"project_key": "p", "session_id": "\ud800"},
        "p/s",
    ],
)
def test_a_key_that_names_no_transcript_is_refused(directory: Path, key: Any) -> None:
    """A malformed key, or one that is too long, is an `InvalidArgument`, and nothing is written."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        for call in (store.append(key, [entry()]), store.load(key), store.delete(key)):
            with pytest.raises(persist.InvalidArgument):
                await call

    asyncio.run(main())
    assert persist.Store(directory).ids() == []


def test_the_longest_key_is_kept(directory: Path) -> None:
    """A key of 512 characters, which no file name could hold, is listed like any other."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        name = "s" * 510
        await store.append({"project_key": "p", "session_id": name}, [entry()])
        assert [each["session_id"] for each in await store.list_sessions("p")] == [name]

    asyncio.run(main())


# --- entries ---


def test_an_entry_is_kept_once_by_its_uuid(directory: Path) -> None:
    """A repeated uuid is skipped, in one batch and in another, also with other content. The first one stays."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        await store.append(MAIN, [entry("a", n=1), entry("b", n=2), entry("a", n=3)])
        await store.append(MAIN, [entry("b", n=4), entry("c", n=5), entry(n=6)])
        await store.append(MAIN, [entry("c", n=5), entry(n=6)])
        loaded = await store.load(MAIN)
        assert loaded == [entry("a", n=1), entry("b", n=2), entry("c", n=5), entry(n=6), entry(n=6)]

    asyncio.run(main())


def test_a_repeated_batch_changes_nothing(directory: Path) -> None:
    """A batch whose entries are all there is no new commit, and folds nothing twice."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        batch = [entry("a", customTitle="One"), entry("b")]
        await store.append(MAIN, batch)
        await store.append(MAIN, [entry("c", customTitle="Two")])
        before, version = (
            await store.list_session_summaries("-srv-shop"),
            persist.Store(directory).head("-srv-shop/s-1"),
        )
        await store.append(MAIN, batch)
        assert await store.list_session_summaries("-srv-shop") == before
        assert persist.Store(directory).head("-srv-shop/s-1") == version

    asyncio.run(main())


def test_a_batch_folds_its_new_entries_only(directory: Path) -> None:
    """An entry that is sent again does not overwrite what later entries have put into the summary."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        first, second, third = entry("a", customTitle="One"), entry("b", customTitle="Two"), entry("c")
        await store.append(MAIN, [first])
        await store.append(MAIN, [second])
        await store.append(MAIN, [first, third])
        folded = fold_session_summary(None, MAIN, [first, second, third])["data"]
        assert data_of(await store.list_session_summaries("-srv-shop")) == {"s-1": folded}

    asyncio.run(main())


def test_entries_come_back_exactly(directory: Path) -> None:
    """Numbers, texts and nested values come back equal and of the same type, also from another store."""
    values: list[Any] = [
        0,
        -0.0,
        1.0,
        2**70,
        True,
        None,
        "",
        "\0",
        "\ud83d",
        "é\u2028",
        [],
        {},
        {"": {"id": [1, {"uuid": "x"}]}},
    ]
    batch = [entry(str(place), id="same", role="user", value=value) for place, value in enumerate(values)]

    async def main() -> Any:
        await PersistSessionStore(directory).append(MAIN, batch)
        return await PersistSessionStore(directory).load(MAIN)

    loaded = asyncio.run(main())
    assert [*map(repr, loaded)] == [*map(repr, batch)]


@pytest.mark.parametrize("entries", [[entry("a"), "text"], [entry("a"), entry(value={1})], entry("a"), "ab"])
def test_a_batch_with_a_bad_entry_is_refused_whole(directory: Path, entries: Any) -> None:
    """A batch that cannot be kept is an error, and no entry of it is written."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        with pytest.raises((persist.InvalidArgument, persist.NotJSON)):
            await store.append(MAIN, entries)
        assert await store.load(MAIN) is None

    asyncio.run(main())


def test_an_empty_batch_makes_no_transcript(directory: Path) -> None:
    """Nothing is written for no entries, so the key counts as never written."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        await store.append(MAIN, [])
        assert await store.load(MAIN) is None

    asyncio.run(main())


def test_a_cancelled_append_is_not_written_later(directory: Path) -> None:
    """A call that is given up while it waits for another writer leaves nothing behind."""
    store = persist.Store(directory, timeout_s=60.0)
    holding = store.transaction("-srv-shop/s-1", create=True)

    async def main() -> None:
        adapter = PersistSessionStore(store)
        holding.__enter__()
        waiting = asyncio.create_task(adapter.append(MAIN, [entry("a")]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        holding.__exit__(None, None, None)
        # The calls for one session have one queue, so this one would come after the other.
        await adapter.append(MAIN, [entry("b")])
        assert await adapter.load(MAIN) == [entry("b")]

    asyncio.run(main())


# --- summaries ---


def test_a_summary_too_large_for_a_head_is_listed(directory: Path) -> None:
    """A summary above 4 KiB is whole in the list, has the time of the listing, and may shrink again."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        small = named("s-0")
        await store.append(small, [entry(customTitle="small")])
        for title in ("Once upon a time. " * 500, "short"):
            await store.append(MAIN, [entry(customTitle=title)])
            assert {name: data["custom_title"] for name, data in data_of(await list_all(store)).items()} == {
                "s-0": "small",
                "s-1": title,
            }
            listed = {each["session_id"]: each["mtime"] for each in await store.list_sessions("-srv-shop")}
            assert {each["session_id"]: each["mtime"] for each in await list_all(store)} == listed

    async def list_all(store: PersistSessionStore) -> list[Any]:
        found: list[Any] = await store.list_session_summaries("-srv-shop")
        return found

    asyncio.run(main())


def test_the_lock_is_held_while_a_summary_is_folded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process cannot write to a transcript between the read of its summary and the commit of the next one.

    It fails if the summary is read and folded before the transaction.
    """
    writer = Actor(directory)
    answers: list[str] = []

    def fold(before: Any, key: Any, entries: Any) -> Any:
        code = "store.append('-srv-shop/s-1', 'messages', {'type': 'x', 'uuid': 'other'}, key='uuid', timeout_s=0)"
        try:
            writer.do(code)
            answers.append("written")
        except persist.LockTimeout:
            answers.append("refused")
        return fold_session_summary(before, key, entries)

    async def main() -> None:
        store = PersistSessionStore(directory)
        await store.append(MAIN, [entry("a", customTitle="One")])
        monkeypatch.setattr("claude_agent_sdk.fold_session_summary", fold)
        await store.append(MAIN, [entry("b", aiTitle="Two")])
        assert data_of(await store.list_session_summaries("-srv-shop"))["s-1"]["custom_title"] == "One"

    try:
        asyncio.run(main())
    finally:
        writer.close()
    assert answers == ["refused"]


def test_a_damaged_transcript_hides_no_other(directory: Path) -> None:
    """Lists leave a transcript out that cannot be read. To load it is an error, and deletes name the way out."""
    file = directory / "%2Dsrv-shop%2Fs-1.json"

    async def main() -> None:
        store = PersistSessionStore(directory)
        for name in ("s-1", "s-2"):
            await store.append(named(name), [entry(customTitle=name)])
        file.write_text("{")
        assert [each["session_id"] for each in await store.list_sessions("-srv-shop")] == ["s-2"]
        assert list(data_of(await store.list_session_summaries("-srv-shop"))) == ["s-2"]
        with pytest.raises(persist.CorruptSession):
            await store.load(MAIN)
        with pytest.raises(persist.CorruptSession, match="force=True"):
            await store.delete(MAIN)
        persist.Store(directory).delete("-srv-shop/s-1", force=True)
        assert await store.load(MAIN) is None

    asyncio.run(main())


# --- deletes ---


#: It deletes a transcript in a process that is killed just before it removes its n-th file.
DELETE = """
import asyncio
from persist.adapters.claude_agent_sdk import PersistSessionStore
from persist.storage import disk

def unlink(path, remove=disk.unlink):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
    return remove(path)

disk.unlink = unlink
asyncio.run(PersistSessionStore(store).delete({"project_key": "-srv-shop", "session_id": "s-1"}))
"""


def test_a_main_transcript_is_deleted_last(directory: Path) -> None:
    """A delete that is killed at any file leaves no subagent without its main transcript. A second delete ends it.

    It fails if the main transcript goes first: then subagents are left that no list shows.
    """
    store = PersistSessionStore(directory)
    found = []

    async def fill() -> None:
        for each in (MAIN, AGENT, agent("subagents/agent-2")):
            await store.append(each, [entry()])

    async def finish() -> None:
        agents, is_there = await store.list_subkeys(MAIN), await store.load(MAIN) is not None
        assert is_there or not agents
        found.append((is_there, len(agents)))
        await store.delete(MAIN)

    for files in range(1, 20):
        asyncio.run(fill())
        deleter = Actor(directory)
        deleter.start(f"left = {files}\n{DELETE}\n'survived'")
        try:
            assert deleter.result() == "survived"
            break
        except EOFError:
            asyncio.run(finish())
        finally:
            deleter.close()
        assert persist.Store(directory).ids() == []
    else:
        pytest.fail("the delete removes more files than this test knows of")
    assert {*found} >= {(True, 2), (True, 1), (True, 0)}
    assert persist.Store(directory).ids() == []


def test_a_subagent_is_deleted_alone(directory: Path) -> None:
    """A key with a subpath deletes that transcript only, also where another id begins with its id."""

    async def main() -> None:
        store = PersistSessionStore(directory)
        for path in ("subagents/agent-1", "subagents/agent-12", "subagents/agent-1/x"):
            await store.append(agent(path), [entry()])
        await store.append(named("s-12"), [entry()])
        await store.delete(AGENT)
        assert await store.list_subkeys(MAIN) == ["subagents/agent-1/x", "subagents/agent-12"]
        await store.delete(MAIN)
        assert persist.Store(directory).ids() == ["-srv-shop/s-12"]

    asyncio.run(main())


# --- the disk, and the SDK ---


def test_a_transcript_is_plain_json(directory: Path) -> None:
    """`json` reads the entries and the summary of a file, and the file name shows the key."""
    batch = [entry("a", customTitle="One"), entry("b", message={"role": "user", "content": "Grüße"})]

    async def main() -> None:
        store = PersistSessionStore(directory)
        await store.append(MAIN, batch)
        await store.append(AGENT, batch)

    asyncio.run(main())
    found = json.loads((directory / "%2Dsrv-shop%2Fs-1.json").read_text("utf-8"))
    assert list(found) == ["_persist", "summary", "messages"]
    assert found["messages"] == batch
    assert found["summary"] == fold_session_summary(None, MAIN, batch)["data"]
    found = json.loads((directory / "%2Dsrv-shop%2Fs-1%2Fsubagents%2Fagent-1.json").read_text("utf-8"))
    assert list(found) == ["_persist", "messages"]


def test_any_store_will_do(directory: Path) -> None:
    """The adapter takes a path, a store, or a store for asyncio, and refuses anything else."""

    async def main() -> None:
        stores: list[AnyStore] = [directory, str(directory), persist.Store(directory), persist.aio.Store(directory)]
        for number, store in enumerate(stores):
            adapter = PersistSessionStore(store)
            await adapter.append(MAIN, [entry(n=number)])
            assert await adapter.load(MAIN) == [entry(n=each) for each in range(number + 1)]
        with pytest.raises(persist.InvalidArgument):
            PersistSessionStore(7)  # type: ignore[arg-type]

    asyncio.run(main())
