"""The conversations of pydantic-ai in the sessions of a store: files, refusals, the search for an entry, and forks."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai.conversation_store", reason="needs pydantic-ai-slim")

from pydantic import ValidationError
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationConflict, ConversationEntry, ConversationRecord
from pydantic_ai.messages import (
    BinaryImage,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)

import persist
import persist.aio
from persist.adapters.opening import AnyStore
from persist.adapters.pydantic_ai import PersistConversationStore


def turn(text: str) -> list[ModelMessage]:
    return [ModelRequest(parts=[UserPromptPart(text)]), ModelResponse(parts=[TextPart(text)])]


async def save(store: PersistConversationStore, *words: str, conversation_id: str = "c") -> list[ConversationEntry]:
    """Append a turn for each word, and return the entries of the whole conversation."""
    conversation = await store.load(conversation_id) or Conversation(conversation_id=conversation_id)
    for word in words:
        conversation.messages += turn(word)
    await store.save(conversation)
    entries = await store.load_entries(conversation_id)
    assert entries is not None
    return entries


async def prompts(store: PersistConversationStore, conversation_id: str = "c", limit: int | None = None) -> str:
    """Return the prompts of a conversation, as one text."""
    conversation = await store.load(conversation_id, limit=limit)
    assert conversation is not None
    parts = [part for message in conversation.messages for part in message.parts]
    return "".join(str(part.content) for part in parts if isinstance(part, UserPromptPart))


# --- the files -------------------------------------------------------------------------------------------------------


def test_a_session_holds_the_record_and_the_entries(directory: Path) -> None:
    """A message stands in the file as `ModelMessagesTypeAdapter` writes it, and the record beside it."""
    messages: list[ModelMessage] = [
        ModelRequest(parts=[UserPromptPart(["see", BinaryImage(b"\x00\xff", media_type="image/png")])]),
        ModelResponse(parts=[ToolCallPart("f", {"x": 1}, "t1")]),
        ModelRequest(parts=[ToolReturnPart("f", {"raw": b"\x00\xfe", "rate": math.nan}, "t1")]),
    ]

    async def run() -> tuple[list[ConversationEntry], ConversationRecord | None]:
        store = PersistConversationStore(directory)
        entries = await store.save(Conversation(conversation_id="c", messages=messages), scope="ann")
        return entries, await store.read_record("c")

    entries, record = asyncio.run(run())
    assert record is not None
    data = json.loads((directory / "c.json").read_text())
    assert [each["message"] for each in data["messages"]] == json.loads(ModelMessagesTypeAdapter.dump_json(messages))
    assert [(each["id"], each["parent_id"]) for each in data["messages"]] == [(e.id, e.parent_id) for e in entries]
    kept = data["pydantic_ai"]
    assert (kept["head_id"], kept["revision"], kept["scope"]) == (entries[-1].id, record.revision, "ann")
    assert "conversation_id" not in kept


def test_a_save_is_one_commit(directory: Path) -> None:
    """The entries and the record of a save are one commit, and so are those of a fork.

    It fails if the record is not written in the commit of the entries.
    """

    async def run() -> None:
        store = PersistConversationStore(directory)
        await save(store, "a", "b")
        await store.fork("c", new_conversation_id="f")
        await save(store, "c", conversation_id="f")

    asyncio.run(run())
    store = persist.Store(directory)
    assert [store.load(each).revision for each in ("c", "f")] == [1, 2]


def test_the_tools_of_persist_know_the_conversation(directory: Path) -> None:
    """`persist check` finds no fault in branches and in a call that waits. `persist repair` changes nothing."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        asks: list[ModelMessage] = [
            ModelRequest(parts=[UserPromptPart("a")]),
            ModelResponse(parts=[ToolCallPart("f", {}, "t1")]),
        ]
        answers: list[ModelMessage] = [
            ModelRequest(parts=[ToolReturnPart("f", "x", "t1")]),
            ModelResponse(parts=[TextPart("x")]),
        ]
        conversation = Conversation(conversation_id="c", messages=[*asks, *answers])
        await store.save(conversation)
        again = await store.branch("c", at=2, expected_revision=conversation.revision)
        again.messages += [ModelRequest(parts=[ToolReturnPart("f", "y", "t1")])]
        await store.save(again)
        await store.branch("c", at=2, expected_revision=again.revision)

    asyncio.run(run())
    store = persist.Store(directory)
    before = store.head("c").version
    assert store.check() == []
    assert store.repair("c") == 0
    assert store.head("c").version == before
    shown = subprocess.run(
        [sys.executable, "-m", "persist", "show", directory, "c"], capture_output=True, text=True, check=True
    )
    assert '"tool_name": "f"' in shown.stdout


def test_one_store_serves_all_kinds_of_callers(directory: Path) -> None:
    """The adapter takes a store of either kind, or a path, and nothing else. Event loops may follow each other."""
    sync = persist.Store(directory)
    kinds: list[AnyStore] = [sync, persist.aio.Store(sync), directory, str(directory)]
    for number, given in enumerate(kinds):
        store = PersistConversationStore(given)
        assert len(asyncio.run(save(store, "x"))) == 2 * (number + 1)
    with pytest.raises(persist.InvalidArgument, match="store is int"):
        PersistConversationStore(3)  # type: ignore[arg-type]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_message_that_is_no_json_is_refused(directory: Path) -> None:
    """A message that pydantic cannot write is an error, and nothing is written."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        bad = [*turn("a"), ModelRequest(parts=[ToolReturnPart("f", object(), "t1")])]
        with pytest.raises(ValueError, match="Unable to serialize"):
            await store.save(Conversation(conversation_id="c", messages=bad))
        assert await store.read_record("c") is None
        with pytest.raises(persist.InvalidArgument, match="id"):
            await store.load("")

    asyncio.run(run())
    assert persist.Store(directory).ids() == []


@pytest.mark.parametrize("conversation_id", ["", "a" * 513, "\ud800"], ids=["empty", "long", "half"])
def test_an_id_that_is_no_session_id_is_refused(directory: Path, conversation_id: str) -> None:
    """Each verb that names a conversation refuses an id that no session can have, and writes nothing."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        record = ConversationRecord(conversation_id=conversation_id, head_id=None)
        refused: list[Coroutine[Any, Any, object]] = [
            store.load(conversation_id),
            store.save(Conversation(conversation_id=conversation_id, messages=turn("a"))),
            store.write_record(record, expected_revision=None),
            store.delete_record(conversation_id, expected_revision="r"),
        ]
        for verb in refused:
            with pytest.raises(persist.InvalidArgument, match="a session id is"):
                await verb

    asyncio.run(run())
    assert list(directory.glob("*.json*")) == []


@pytest.mark.parametrize("conversation_id", ["a/b/../c", ".", "\x00", "CON", "é" * 512, "x\n"])
def test_any_other_id_is_taken(directory: Path, conversation_id: str) -> None:
    """Any other text is an id, whatever it means to a file system."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        await save(store, "a", conversation_id=conversation_id)
        assert [each.conversation_id for each in await store.list_conversations()] == [conversation_id]
        assert await prompts(PersistConversationStore(directory), conversation_id) == "a"
        await store.delete(conversation_id)

    asyncio.run(run())
    assert persist.Store(directory).ids() == []


def test_a_closed_store_refuses(directory: Path) -> None:
    """Each verb raises `StoreClosed` after the store was closed."""

    async def run() -> None:
        given = persist.aio.Store(directory)
        store = PersistConversationStore(given)
        entries = await save(store, "a")
        given.close()
        record = ConversationRecord(conversation_id="d", head_id=None)
        refused: list[Coroutine[Any, Any, object]] = [
            store.load("c"),
            store.list_conversations(),
            store.read_entry(entries[0].id),
            store.read_history(entries[-1].id),
            store.read_history(entries[-1].id, limit=1),
            store.write_record(record, expected_revision=None),
            store.delete_record("c", expected_revision="r"),
        ]
        for verb in refused:
            with pytest.raises(persist.StoreClosed):
                await verb

    asyncio.run(run())


def test_a_cancelled_save_is_whole_or_absent(directory: Path) -> None:
    """A save that is cancelled at any moment has stored its entries and the record, or nothing."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        await save(store, "-")
        for number in range(60):
            conversation = await store.load("c")
            assert conversation is not None
            before = len(conversation.messages)
            conversation.messages += turn("x")
            saving = asyncio.create_task(store.save(conversation))
            # Each step is one turn of the event loop, so that the cancellation meets each of the save's waits.
            for _ in range(number):
                await asyncio.sleep(0)
            saving.cancel()
            await asyncio.wait([saving])
            found = await store.load_entries("c")
            assert found is not None
            assert len(found) - before in ((0, 2) if saving.cancelled() else (2,))
            assert persist.Store(directory).head("c").counts["messages"] == len(found)

    asyncio.run(run())


def test_damage_is_never_written_over(directory: Path) -> None:
    """A save, a fork and a delete of a damaged conversation are errors, and its file stays as it is."""

    async def run() -> None:
        conversation = Conversation(conversation_id="c", messages=turn("abc") * 300)
        await PersistConversationStore(directory).save(conversation)
        path = directory / "c.json"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        store = PersistConversationStore(directory)
        conversation.messages += turn("d")
        refused: list[Coroutine[Any, Any, object]] = [
            store.save(conversation),
            store.fork("c", new_conversation_id="f"),
            store.delete("c"),
        ]
        for verb in refused:
            with pytest.raises(persist.CorruptSession):
                await verb
        assert path.read_bytes() == damaged

    asyncio.run(run())
    assert persist.Store(directory).ids() == ["c"]


def test_messages_of_another_program_are_left_alone(directory: Path) -> None:
    """A session that has a title takes a conversation. A session with other messages refuses one.

    It fails if a new conversation does not look for messages.
    """
    plain = persist.Store(directory)
    plain.create("c", {"title": "New chat", "messages": []})
    plain.create("other", {"messages": [{"id": "m1", "role": "user", "content": "hi"}]})
    before = plain.head("other").version

    async def run() -> None:
        store = PersistConversationStore(directory)
        assert await store.load("other") is None
        await save(store, "a")
        with pytest.raises(persist.InvalidArgument, match="another program's"):
            await save(store, "a", conversation_id="other")
        assert [each.conversation_id for each in await store.list_conversations()] == ["c"]

    asyncio.run(run())
    assert plain.head("other").version == before
    assert plain.load("c").data["title"] == "New chat"


def test_a_damaged_session_hides_no_other(directory: Path) -> None:
    """A list and a search leave out what cannot be read. To load it is an error, without any of its content.

    A list reads no messages, so it does not notice damage among them. It fails if one error ends the list.
    """

    async def run() -> None:
        store = PersistConversationStore(directory)
        for name in ("a", "b", "newer", "torn"):
            await save(store, name, conversation_id=name)
        plain = persist.Store(directory)
        with plain.transaction("newer") as tx:
            tx.fields["pydantic_ai"] |= {"format_version": 2, "scope": ["secret"]}
        plain.create("foreign", {"pydantic_ai": "mine", "messages": {"not": "a list"}})
        torn = directory / "torn.json"
        torn.write_bytes(torn.read_bytes()[:-40])
        (directory / "broken.json").write_bytes(b'{"half')
        anew = PersistConversationStore(directory)
        assert [each.conversation_id for each in await anew.list_conversations()] == ["torn", "b", "a"]
        with pytest.raises(LookupError):
            await anew.read_entry("nobody")
        with pytest.raises(persist.CorruptSession):
            await anew.load("torn")
        with pytest.raises(ValidationError) as refusal:
            await anew.load("newer")
        assert "secret" not in str(refusal.value)

    asyncio.run(run())


def test_a_history_with_a_hole_is_an_error(directory: Path) -> None:
    """A history that lost an entry, or that leads back to itself, is never returned as if it were whole.

    It fails if a missing entry ends the chain. It hangs if an entry is taken twice.
    """

    async def run() -> None:
        store = PersistConversationStore(directory)
        entries = await save(store, "a", "b", "c")
        plain = persist.Store(directory)
        with plain.transaction("c") as tx:
            lost = tx.list("messages").pop(1)
        for reading in (store, PersistConversationStore(directory)):
            with pytest.raises(LookupError, match=entries[1].id):
                await reading.load("c")
            assert await prompts(reading, limit=3) == "c"
        with plain.transaction("c") as tx:
            tx.list("messages").insert(1, {**lost, "parent_id": entries[4].id})
        with pytest.raises(LookupError):
            await store.load("c")

    asyncio.run(run())


# --- the search for an entry -----------------------------------------------------------------------------------------


class Looking(persist.aio.Store):
    """A store that counts the reads of whole sessions."""

    views = 0

    async def view(self, session_id: str) -> persist.View:
        self.views += 1
        return await super().view(session_id)


def test_a_window_reads_the_end_only(directory: Path) -> None:
    """`load` with a limit does not read the whole session. After a save of another process it may.

    It fails if the last items are taken for the end of the history without a look.
    """

    async def run() -> None:
        looking = Looking(directory)
        store = PersistConversationStore(looking)
        await save(PersistConversationStore(directory), *"abcdef")
        assert await prompts(store, limit=4) == "ef"
        assert looking.views == 0
        record = await store.read_record("c")
        assert record is not None
        await save(PersistConversationStore(directory), "g")
        found = await store.read_history(record.head_id, limit=4)
        assert [entry.id for entry in found][-1] == record.head_id
        assert len(found) == 4

    asyncio.run(run())


def test_entries_are_found_by_another_process(directory: Path) -> None:
    """A store that has never seen an entry finds it: at the end of a history, of a branch, and in the middle."""

    async def run() -> None:
        first = PersistConversationStore(directory)
        for name in ("a", "b", "d"):
            await save(first, name, conversation_id=name)
        entries = await save(first, "x", "y")
        record = await first.read_record("c")
        assert record is not None
        await first.branch("c", at=1, expected_revision=record.revision)
        await save(first, "z")
        for place, entry in enumerate(entries):
            assert await PersistConversationStore(directory).read_entry(entry.id) == entry
            assert await PersistConversationStore(directory).read_history(entry.id) == entries[: place + 1]
            found = await PersistConversationStore(directory).read_history(entry.id, limit=2)
            assert found == entries[max(0, place - 1) : place + 1]

    asyncio.run(run())


def test_the_end_of_a_history_is_looked_for_in_the_records(directory: Path) -> None:
    """The search reads the sessions whose record names the entry before all others."""

    async def run() -> None:
        first = PersistConversationStore(directory)
        for name in "abcde":
            entries = await save(first, name, conversation_id=name)
        looking = Looking(directory)
        assert await PersistConversationStore(looking).read_history(entries[-1].id) == entries
        assert looking.views == 1

    asyncio.run(run())


def test_a_memory_of_a_deleted_conversation_does_no_harm(directory: Path) -> None:
    """The store saw an entry in a conversation that was deleted since, and perhaps made anew. It finds it in a fork.

    It fails if the conversation is not asked whether it still has the entry.
    """

    async def run() -> None:
        store, other = PersistConversationStore(directory), PersistConversationStore(directory)
        entries = await save(store, "a", "b")
        await other.fork("c", new_conversation_id="f")
        await other.delete("c")
        assert await store.read_history(entries[-1].id) == entries
        # Now the store knows the fork. Its name goes to another conversation, and the entries to another fork.
        await other.fork("f", new_conversation_id="g")
        await other.delete("f")
        await save(other, "x", conversation_id="f")
        assert await store.read_history(entries[-1].id) == entries
        assert await store.read_history(entries[-1].id, limit=2) == entries[-2:]
        await other.delete("g")
        for limit in (None, 2):
            with pytest.raises(LookupError):
                await store.read_history(entries[-1].id, limit=limit)
        with pytest.raises(LookupError):
            await store.read_entry(entries[-1].id)

    asyncio.run(run())


def test_a_load_that_meets_a_delete_is_none(directory: Path) -> None:
    """A conversation that is deleted between the read of its record and of its history loads as None."""

    class Meeting(PersistConversationStore):
        async def read_record(self, conversation_id: str) -> ConversationRecord | None:
            record = await super().read_record(conversation_id)
            if persist.Store(directory).exists("c"):
                persist.Store(directory).delete("c")
            return record

    async def run() -> None:
        await save(PersistConversationStore(directory), "a")
        assert await Meeting(directory).load("c") is None

    asyncio.run(run())


# --- forks beside deletes --------------------------------------------------------------------------------------------


class Deleting(persist.aio.Store):
    """A store where another process deletes the source of a fork: before its entries are read, or after that."""

    is_armed = False
    before = True

    async def view(self, session_id: str) -> persist.View:
        if self.is_armed and self.before:
            persist.Store(self.path).delete(session_id)
        found = await super().view(session_id)
        if self.is_armed:
            persist.Store(self.path).delete(session_id)
        return found


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_fork_whose_source_is_deleted_is_whole_or_a_conflict(directory: Path, before: bool) -> None:
    """The source of a fork is deleted while the fork is written. The fork is whole, or it is a conflict and absent."""

    async def run() -> None:
        deleting = Deleting(directory)
        deleting.before = before
        store = PersistConversationStore(deleting)
        entries = await save(store, "a", "b")
        fork = ConversationRecord(conversation_id="f", head_id=entries[2].id, forked_from="c", forked_at=entries[2].id)
        deleting.is_armed = True
        if before:
            with pytest.raises(ConversationConflict):
                await store.write_record(fork, expected_revision=None)
        else:
            await store.write_record(fork, expected_revision=None)
        deleting.is_armed = False
        assert await store.load("c") is None
        assert await store.load_entries("f") == (None if before else entries[:3])

    asyncio.run(run())
    assert persist.Store(directory).check() == []


def test_a_shared_history_is_copied_once(directory: Path) -> None:
    """Two entries of one record that continue another conversation bring one copy of what they share."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        source = await save(store, "a", "b")
        ends = [ConversationEntry(parent_id=source[place].id, message=turn("x")[1]) for place in (0, 2)]
        record = ConversationRecord(conversation_id="f", head_id=ends[1].id, branches=[ends[0].id])
        await store.write_record(record, new_entries=ends, expected_revision=None)
        assert await store.load_entries("f") == [*source[:3], ends[1]]
        assert await store.read_history(ends[0].id) == [source[0], ends[0]]

    asyncio.run(run())
    ids = [each["id"] for each in persist.Store(directory).load("f").data["messages"]]
    assert len(ids) == len(set(ids)) == 5


def test_an_entry_is_stored_once(directory: Path) -> None:
    """Entries that a write repeats, or that are there already, do not stand in the session again.

    It fails if the session is not searched for them, and if the write is not.
    """

    async def run() -> None:
        store = PersistConversationStore(directory)
        entries = await save(store, "a")
        record = await store.read_record("c")
        assert record is not None
        more = [ConversationEntry(parent_id=entries[-1].id, message=message) for message in turn("b")[:1]]
        after = replace(record, head_id=more[0].id, revision="r")
        await store.write_record(after, new_entries=[*entries, *more, *more], expected_revision=record.revision)
        assert await store.load_entries("c") == [*entries, *more]

    asyncio.run(run())
    assert persist.Store(directory).head("c").counts["messages"] == 3


def test_a_large_conversation_keeps_its_cost(directory: Path) -> None:
    """In a conversation of thousands of messages, a save still adds its own bytes only."""

    async def run() -> None:
        store = PersistConversationStore(directory)
        await save(store, *map(str, range(2000)))

        def bytes_on_disk() -> int:
            return sum(path.stat().st_size for path in directory.glob("c.*journal"))

        await save(store, "x")
        before = bytes_on_disk()
        await save(store, "y")
        assert 0 < bytes_on_disk() - before < 10_000
        record = await store.read_record("c")
        assert record is not None
        await store.write_record(replace(record, revision="r"), expected_revision=record.revision)
        assert (await prompts(store)).endswith("1999xy")

    asyncio.run(run())
