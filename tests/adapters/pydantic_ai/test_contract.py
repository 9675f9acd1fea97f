"""The documented behaviour of a `ConversationStore`, for the in-memory store of pydantic-ai and for that of `persist`.

No package of pydantic-ai has a test of a store: not the sdist and the wheel of pydantic-ai-slim 2.68.0, and not the
sdists of pydantic-ai 2.66.0 and pydantic-ai-harness 0.62.0. So the documented behaviour is spelt out here. Each test
runs against both stores, so that the in-memory store is the judge.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai.conversation_store", reason="needs pydantic-ai-slim")

from pydantic_ai import DeferredToolRequests, UserError
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
    InMemoryConversationStore,
)
from pydantic_ai.messages import (
    BinaryImage,
    FilePart,
    ImageUrl,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.usage import RequestUsage, RunUsage

from persist.adapters.pydantic_ai import PersistConversationStore


@pytest.fixture(params=["in-memory", "persist"])
def store(request: pytest.FixtureRequest, directory: Path) -> ConversationStore:
    return InMemoryConversationStore() if request.param == "in-memory" else PersistConversationStore(directory)


def request(text: str) -> ModelMessage:
    return ModelRequest(parts=[UserPromptPart(text)])


def response(text: str) -> ModelMessage:
    return ModelResponse(parts=[TextPart(text)])


def turns(*texts: str) -> list[ModelMessage]:
    return [each(text) for text in texts for each in (request, response)]


def texts(messages: list[ModelMessage]) -> list[Any]:
    return [message.parts[0].content for message in messages]  # type: ignore[union-attr]


async def saved(store: ConversationStore, *words: str, conversation_id: str = "c", **options: Any) -> Conversation:
    """Save a conversation of a turn for each word, one save for each."""
    conversation = Conversation(conversation_id=conversation_id)
    for word in words:
        conversation.messages += turns(word)
        await store.save(conversation, **options)
    return conversation


async def loaded(store: ConversationStore, conversation_id: str = "c", **options: Any) -> Conversation:
    conversation = await store.load(conversation_id, **options)
    assert conversation is not None
    return conversation


# --- save and load ---------------------------------------------------------------------------------------------------


def test_an_unknown_conversation_is_none(store: ConversationStore) -> None:
    """A conversation that nobody has saved loads as None."""

    async def run() -> None:
        assert await store.load("c") is None
        assert await store.load_entries("c") is None
        assert await store.read_record("c") is None
        assert await store.list_conversations() == []

    asyncio.run(run())


def test_a_saved_conversation_comes_back(store: ConversationStore) -> None:
    """Messages, usage and revision come back as they were saved. Each save stores the new messages only."""

    async def run() -> None:
        conversation = Conversation(conversation_id="c", messages=turns("a"), usage=RunUsage(requests=1))
        first = await store.save(conversation)
        conversation.messages += turns("b")
        conversation.usage = RunUsage(requests=2, input_tokens=7, details={"cached": 3}, cost=Decimal("0.10"))
        second = await store.save(conversation)
        assert [len(first), len(second)] == [2, 2]
        found = await loaded(store)
        assert found == conversation
        assert found.usage.cost == Decimal("0.10")
        entries = await store.load_entries("c")
        assert entries == [*first, *second]
        assert [entry.parent_id for entry in entries] == [None, *(entry.id for entry in entries[:-1])]
        assert await store.read_entry(first[1].id) == first[1]

    asyncio.run(run())


def test_a_save_without_new_messages_stores_none(store: ConversationStore) -> None:
    """It only moves the revision on."""

    async def run() -> None:
        conversation = await saved(store, "a")
        before = conversation.revision
        assert await store.save(conversation) == []
        assert conversation.revision != before
        assert await loaded(store) == conversation

    asyncio.run(run())


def test_an_empty_conversation_is_kept(store: ConversationStore) -> None:
    """A conversation without messages is a conversation."""

    async def run() -> None:
        await store.save(Conversation(conversation_id="c"))
        assert (await loaded(store)).messages == []
        assert (await loaded(store, limit=5)).messages == []

    asyncio.run(run())


def test_a_loaded_copy_is_the_callers_own(store: ConversationStore) -> None:
    """A change in a message or record that was given or returned changes nothing in the store."""

    async def run() -> None:
        conversation = await saved(store, "a")
        conversation.messages[0].parts[0].content = "changed"  # type: ignore[union-attr,misc]
        copy = await loaded(store)
        copy.messages.clear()
        copy.usage.requests = 99
        again = await loaded(store)
        assert texts(again.messages) == ["a", "a"]
        assert again.usage.requests == 0

    asyncio.run(run())


@pytest.mark.parametrize("limit", range(8))
def test_a_limit_returns_the_last_messages(store: ConversationStore, limit: int) -> None:
    """`limit` returns so many last messages, and all if there are fewer."""

    async def run() -> None:
        conversation = await saved(store, "a", "b", "c")
        expected = conversation.messages[max(0, 6 - limit) :]
        assert (await loaded(store, limit=limit)).messages == expected

    asyncio.run(run())


def test_a_window_grows_the_whole_conversation(store: ConversationStore) -> None:
    """A save of a conversation of which only the end was loaded appends to all of it."""

    async def run() -> None:
        await saved(store, "a", "b")
        window = await loaded(store, limit=1)
        window.messages += turns("c")
        assert len(await store.save(window)) == 2
        assert texts((await loaded(store)).messages) == list("aabbcc")

    asyncio.run(run())


def test_no_head_has_no_history(store: ConversationStore) -> None:
    """The history of no entry is empty. The history of an unknown entry is a LookupError."""

    async def run() -> None:
        assert await store.read_history(None) == []
        for read in (store.read_entry("nobody"), store.read_history("nobody"), store.read_history("nobody", limit=3)):
            with pytest.raises(LookupError):
                await read

    asyncio.run(run())


EVERY_PART: list[ModelMessage] = [
    ModelRequest(parts=[SystemPromptPart("Be brief."), UserPromptPart("a\u2028\U0001f642\x00")], instructions="Now."),
    ModelResponse(
        parts=[ThinkingPart("hm", signature="s"), TextPart("b"), ToolCallPart("f", {"x": [1.5, None, 2**70]}, "t1")],
        usage=RequestUsage(input_tokens=3, details={"z": 1}),
        model_name="m",
        provider_details={"nested": {"deep": [True]}},
        finish_reason="tool_call",
    ),
    ModelRequest(
        parts=[ToolReturnPart("f", {"rows": [1, "two"]}, "t1"), ToolReturnPart("f", "again", "t2", outcome="retried")]
    ),
    ModelRequest(
        parts=[
            UserPromptPart(
                [
                    "see",
                    BinaryImage(b"\x89PNG\x00\xff", media_type="image/png"),
                    ImageUrl("https://example.org/a.png"),
                ]
            )
        ]
    ),
    ModelResponse(parts=[FilePart(BinaryImage(bytes(range(256)), media_type="image/png"))], metadata={"by": "me"}),
]


def test_every_part_comes_back(store: ConversationStore) -> None:
    """Tool calls, results, thoughts, images and raw bytes come back equal."""

    async def run() -> None:
        await store.save(Conversation(conversation_id="c", messages=EVERY_PART))
        assert (await loaded(store)).messages == EVERY_PART
        assert (await loaded(store, limit=2)).messages == EVERY_PART[-2:]

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 20_000], ids=["small", "large"])
def test_deferred_tool_requests_come_back(store: ConversationStore, size: int) -> None:
    """A paused conversation keeps what it waits for, in a list of conversations, too, however large it is."""
    requests = DeferredToolRequests(
        calls=[ToolCallPart("ask", {"text": "x" * size}, "t1")],
        approvals=[ToolCallPart("pay", {"amount": 3}, "t2")],
        metadata={"t1": {"why": "unclear"}},
        _kinds={"t1": "question"},
    )

    async def run() -> None:
        conversation = Conversation(conversation_id="c", messages=turns("a"), deferred_tool_requests=requests)
        await store.save(conversation)
        found = await loaded(store)
        assert found.deferred_tool_requests == requests
        assert found.deferred_tool_requests.kind("t1") == "question"
        [listed] = await store.list_conversations()
        assert listed.deferred_tool_requests == requests
        found.deferred_tool_requests = None
        found.messages += turns("b")
        await store.save(found)
        assert (await loaded(store)).deferred_tool_requests is None

    asyncio.run(run())


# --- conflicts -------------------------------------------------------------------------------------------------------


def test_an_old_copy_is_refused(store: ConversationStore) -> None:
    """A copy that was loaded before another save is a conflict, and changes nothing."""

    async def run() -> None:
        await saved(store, "a")
        mine, theirs = await loaded(store), await loaded(store)
        theirs.messages += turns("theirs")
        await store.save(theirs)
        mine.messages += turns("mine")
        with pytest.raises(ConversationConflict) as conflict:
            await store.save(mine)
        assert conflict.value.conversation_id == "c"
        assert await loaded(store) == theirs

    asyncio.run(run())


def test_a_write_compares_the_revision(store: ConversationStore) -> None:
    """The primitive itself refuses any revision but the stored one. Neither record nor entries are left behind."""

    async def run() -> None:
        await saved(store, "a")
        record = await store.read_record("c")
        assert record is not None
        entry = ConversationEntry(parent_id=record.head_id, message=request("b"))
        after = replace(record, head_id=entry.id, revision="next")
        for expected in (None, "another"):
            with pytest.raises(ConversationConflict):
                await store.write_record(after, new_entries=[entry], expected_revision=expected)
        assert await store.read_record("c") == record
        with pytest.raises(LookupError):
            await store.read_entry(entry.id)
        await store.write_record(after, new_entries=[entry], expected_revision=record.revision)
        assert await store.read_record("c") == after
        assert await store.read_entry(entry.id) == entry

    asyncio.run(run())


def test_a_missing_conversation_has_no_revision(store: ConversationStore) -> None:
    """A write or a delete that names the revision of a conversation that is not there is a conflict."""

    async def run() -> None:
        record = ConversationRecord(conversation_id="c", head_id=None)
        with pytest.raises(ConversationConflict):
            await store.write_record(record, expected_revision=record.revision)
        with pytest.raises(ConversationConflict):
            await store.delete_record("c", expected_revision=record.revision)
        assert await store.read_record("c") is None

    asyncio.run(run())


def test_a_head_that_nobody_holds_is_refused(store: ConversationStore) -> None:
    """A record whose head was released is a conflict, for a new conversation and for a stored one.

    It fails if the session is not searched for the head.
    """

    async def run() -> None:
        fork = ConversationRecord(conversation_id="f", head_id="released", forked_from="gone", forked_at="released")
        with pytest.raises(ConversationConflict):
            await store.write_record(fork, expected_revision=None)
        assert await store.read_record("f") is None
        await saved(store, "a")
        record = await store.read_record("c")
        assert record is not None
        with pytest.raises(ConversationConflict):
            await store.write_record(replace(record, head_id="released"), expected_revision=record.revision)
        assert await store.read_record("c") == record

    asyncio.run(run())


def test_a_new_conversation_meets_one_that_exists(store: ConversationStore) -> None:
    """A conversation that was not loaded cannot take the place of a stored one."""

    async def run() -> None:
        await saved(store, "a")
        with pytest.raises(ConversationConflict):
            await store.save(Conversation(conversation_id="c", messages=turns("b")))
        assert texts((await loaded(store)).messages) == ["a", "a"]

    asyncio.run(run())


def test_a_conversation_made_anew_refuses_old_copies(store: ConversationStore) -> None:
    """A conversation that was deleted and made again has another revision. A copy from before is a conflict.

    It fails if a delete does not compare the revision.
    """

    async def run() -> None:
        old = await saved(store, "a")
        await store.delete("c")
        with pytest.raises(ConversationConflict):
            await store.save(old)
        assert await store.load("c") is None
        new = await saved(store, "b")
        assert new.revision != old.revision
        with pytest.raises(ConversationConflict):
            await store.save(old)
        with pytest.raises(ConversationConflict):
            await store.delete_record("c", expected_revision=str(old.revision))
        assert texts((await loaded(store)).messages) == ["b", "b"]

    asyncio.run(run())


# --- scopes and lists ------------------------------------------------------------------------------------------------


def test_a_scope_keeps_a_conversation_to_its_owner(store: ConversationStore) -> None:
    """Another scope neither loads, saves, deletes, branches nor forks a conversation."""

    async def run() -> None:
        conversation = await saved(store, "a", scope="ann")
        assert await store.load("c", scope="bob") is None
        await store.delete("c", scope="bob")
        with pytest.raises(ConversationConflict):
            await store.save(conversation, scope="bob")
        with pytest.raises(UserError):
            await store.branch("c", at=0, expected_revision=conversation.revision, scope="bob")
        with pytest.raises(UserError):
            await store.fork("c", source_scope="bob")
        assert await loaded(store, scope="ann") == conversation
        conversation.messages += turns("b")
        await store.save(conversation)
        assert [each.scope for each in await store.list_conversations()] == ["ann"]
        await store.delete("c", scope="ann")
        assert await store.load("c") is None

    asyncio.run(run())


def test_a_list_begins_with_the_last_save(store: ConversationStore) -> None:
    """The list has the newest save first, and shows a scope, or so many, if it is told to."""

    async def run() -> None:
        conversations = {name: await saved(store, name, conversation_id=name, scope=name[0]) for name in ("a1", "b1")}
        conversations["a2"] = await saved(store, "x", conversation_id="a2", scope="a")
        conversations["a1"].messages += turns("y")
        await store.save(conversations["a1"])

        async def listed(**options: Any) -> list[str]:
            return [each.conversation_id for each in await store.list_conversations(**options)]

        assert await listed() == ["a1", "a2", "b1"]
        assert await listed(limit=2) == ["a1", "a2"]
        assert await listed(scope="a") == ["a1", "a2"]
        assert await listed(scope="b", limit=1) == ["b1"]
        assert await listed(scope="c") == await listed(limit=0) == []

    asyncio.run(run())


@pytest.mark.parametrize("limit", [1, 5, 60, None])
def test_a_list_goes_by_the_time_in_the_record(store: ConversationStore, limit: int | None) -> None:
    """`updated_at` is the record's own, as given, and it orders the list, whatever order the writes had.

    It fails if the sessions that were committed last are taken for the newest ones.
    """
    newest = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    times = [newest - timedelta(minutes=minute) for minute in range(70)]

    async def run() -> None:
        # The newest ones first. So the writes have the opposite order.
        for number, updated_at in enumerate(times):
            record = ConversationRecord(conversation_id=f"c{number}", head_id=None, updated_at=updated_at)
            await store.write_record(record, expected_revision=None)
        assert [each.updated_at for each in await store.read_records(limit=limit)] == times[:limit]
        found = await store.read_record("c0")
        assert found is not None
        assert found.updated_at == newest.astimezone(UTC)

    asyncio.run(run())


# --- branches and forks ----------------------------------------------------------------------------------------------


def test_a_branch_can_be_left_and_taken_up_again(store: ConversationStore) -> None:
    """The history that a branch leaves stays stored, and the conversation can go back to it."""

    async def run() -> None:
        before = await saved(store, "a", "b")
        branched = await store.branch("c", at=2, expected_revision=before.revision)
        assert texts(branched.messages) == ["a", "a"]
        branched.messages += turns("other")
        await store.save(branched)
        record = await store.read_record("c")
        assert record is not None
        [left] = record.branches
        assert texts((await loaded(store)).messages) == ["a", "a", "other", "other"]
        assert texts((await loaded(store, limit=3)).messages) == ["a", "other", "other"]
        back = await store.branch("c", from_entry=left, expected_revision=branched.revision)
        assert texts(back.messages) == list("aabb")
        assert texts((await loaded(store, limit=2)).messages) == ["b", "b"]
        back.messages += turns("c")
        await store.save(back)
        assert texts((await loaded(store, limit=3)).messages) == ["b", "c", "c"]

    asyncio.run(run())


def test_a_branch_of_an_old_copy_is_refused(store: ConversationStore) -> None:
    """A branch cannot undo a turn that was saved since."""

    async def run() -> None:
        conversation = await saved(store, "a")
        old = conversation.revision
        conversation.messages += turns("b")
        await store.save(conversation)
        with pytest.raises(ConversationConflict):
            await store.branch("c", at=0, expected_revision=old)
        assert texts((await loaded(store)).messages) == list("aabb")

    asyncio.run(run())


def test_a_rewritten_history_is_a_branch(store: ConversationStore) -> None:
    """A save of a history that was rewritten, and not extended, keeps the old one as a branch."""

    async def run() -> None:
        conversation = await saved(store, "a", "b")
        rewritten = replace(conversation, messages=[*conversation.messages[:2], *turns("x")], new_message_index=None)
        assert len(await store.save(rewritten)) == 2
        assert texts((await loaded(store)).messages) == ["a", "a", "x", "x"]
        record = await store.read_record("c")
        assert record is not None
        assert texts([each.message for each in await store.read_history(record.branches[0])]) == list("aabb")
        summary = replace(rewritten, messages=turns("summary"), new_message_index=None)
        await store.save(summary)
        assert texts((await loaded(store)).messages) == ["summary"] * 2

    asyncio.run(run())


@pytest.mark.parametrize("kept", [0, 2, 3, 4, None])
def test_a_fork_shares_the_history(store: ConversationStore, kept: int | None) -> None:
    """A fork begins with the source's entries. From there on, the two go on apart."""

    async def run() -> None:
        source = await saved(store, "a", "b", scope="ann")
        source.usage = RunUsage(requests=2)
        await store.save(source)
        entries = await store.load_entries("c")
        assert entries is not None
        fork = await store.fork("c", at=kept, new_conversation_id="f")
        fork.messages += turns("fork")
        await store.save(fork)
        source.messages += turns("source")
        await store.save(source)
        expected = entries[:kept]
        forked = await store.load_entries("f")
        assert forked is not None
        assert forked[: len(expected)] == expected
        assert texts([entry.message for entry in forked[len(expected) :]]) == ["fork", "fork"]
        assert texts((await loaded(store, "c")).messages) == [*"aabb", "source", "source"]
        record = await store.read_record("f")
        assert record is not None
        assert (record.forked_from, record.scope) == ("c", "ann")
        assert record.forked_at == (expected[-1].id if expected else None)
        assert record.usage.requests == (2 if kept in (4, None) else 0)

    asyncio.run(run())


def test_a_fork_outlives_its_source(store: ConversationStore) -> None:
    """After the source is deleted, forks and forks of forks load, and entries that nobody shares are gone."""

    async def run() -> None:
        await saved(store, "a", "b")
        entries = await store.load_entries("c")
        assert entries is not None
        await store.fork("c", at=2, new_conversation_id="f")
        await store.fork("f", new_conversation_id="g")
        await store.delete("c")
        assert texts((await loaded(store, "f")).messages) == ["a", "a"]
        await store.delete("f")
        assert texts((await loaded(store, "g")).messages) == ["a", "a"]
        assert await store.read_entry(entries[0].id) == entries[0]
        assert await store.read_history(entries[1].id) == entries[:2]
        with pytest.raises(LookupError):
            await store.read_entry(entries[3].id)

    asyncio.run(run())


def test_a_fork_from_a_branch_that_was_left(store: ConversationStore) -> None:
    """A fork may begin at any entry of the source's history and of its branches, also in the middle."""

    async def run() -> None:
        before = await saved(store, "a", "b")
        entries = await store.load_entries("c")
        assert entries is not None
        await store.branch("c", at=0, expected_revision=before.revision)
        for place, entry in enumerate(entries):
            fork = await store.fork("c", from_entry=entry.id, new_conversation_id=f"f{place}")
            assert texts(fork.messages) == list("aabb")[: place + 1]
            assert texts((await loaded(store, f"f{place}")).messages) == list("aabb")[: place + 1]

    asyncio.run(run())


def test_a_fork_of_a_taken_name_is_refused(store: ConversationStore) -> None:
    """A fork does not take the place of a stored conversation."""

    async def run() -> None:
        await saved(store, "a")
        await saved(store, "b", conversation_id="f")
        with pytest.raises(ConversationConflict):
            await store.fork("c", new_conversation_id="f")
        assert texts((await loaded(store, "f")).messages) == ["b", "b"]

    asyncio.run(run())


def test_new_entries_may_continue_another_conversation(store: ConversationStore) -> None:
    """The primitive takes new entries whose parent another conversation holds."""

    async def run() -> None:
        await saved(store, "a")
        source = await store.load_entries("c")
        assert source is not None
        entry = ConversationEntry(parent_id=source[0].id, message=response("other"))
        record = ConversationRecord(conversation_id="f", head_id=entry.id)
        await store.write_record(record, new_entries=[entry], expected_revision=None)
        assert await store.load_entries("f") == [source[0], entry]

    asyncio.run(run())


def test_entries_that_are_sent_again_are_stored_once(store: ConversationStore) -> None:
    """A write with entries that the store has keeps one of each."""

    async def run() -> None:
        await saved(store, "a")
        entries = await store.load_entries("c")
        record = await store.read_record("c")
        assert entries is not None
        assert record is not None
        await store.write_record(replace(record, revision="r"), new_entries=entries, expected_revision=record.revision)
        assert await store.load_entries("c") == entries
        assert (await loaded(store, limit=1)).messages == [entries[-1].message]

    asyncio.run(run())


def test_an_entry_that_is_given_twice_is_stored_once(store: ConversationStore) -> None:
    """A write whose entries repeat each other keeps one of each."""

    async def run() -> None:
        first = ConversationEntry(parent_id=None, message=request("a"))
        second = ConversationEntry(parent_id=first.id, message=response("a"))
        record = ConversationRecord(conversation_id="c", head_id=second.id)
        await store.write_record(record, new_entries=[first, second, first, second], expected_revision=None)
        assert await store.load_entries("c") == [first, second]
        assert (await loaded(store, limit=1)).messages == [second.message]

    asyncio.run(run())


def test_a_write_that_is_sent_again_is_a_conflict(store: ConversationStore) -> None:
    """A caller that did not hear of its success sends the same write again. Nothing is stored twice."""

    async def run() -> None:
        entry = ConversationEntry(parent_id=None, message=request("a"))
        record = ConversationRecord(conversation_id="c", head_id=entry.id)
        await store.write_record(record, new_entries=[entry], expected_revision=None)
        with pytest.raises(ConversationConflict):
            await store.write_record(record, new_entries=[entry], expected_revision=None)
        assert await store.load_entries("c") == [entry]

    asyncio.run(run())


def test_a_branch_of_a_branch(store: ConversationStore) -> None:
    """A conversation leaves a branch for a second one, and that for a third. It can go back to each, and into each."""

    async def run() -> None:
        conversation = await saved(store, "a", "b")
        tips = []
        for word in "xyz":
            conversation = await store.branch(
                "c", at=len(conversation.messages) - 1, expected_revision=conversation.revision
            )
            conversation.messages += [response(word), request(word)]
            tips.append((await store.save(conversation))[-1].id)
        assert texts(conversation.messages) == [*"aabxyzz"]
        record = await store.read_record("c")
        assert record is not None
        assert len(record.branches) == 3
        back = await store.branch("c", from_entry=tips[0], expected_revision=conversation.revision)
        assert texts(back.messages) == [*"aabxx"]
        fork = await store.fork("c", from_entry=tips[1], new_conversation_id="f")
        assert texts(fork.messages) == texts((await loaded(store, "f")).messages) == [*"aabxyy"]
        again = await store.branch("c", from_entry=tips[2], expected_revision=back.revision)
        assert again.messages == (await loaded(store)).messages == conversation.messages
        assert texts((await loaded(store, limit=3)).messages) == [*"yzz"]

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["half \ud800 a pair", "\x00", "\u2028", "x" * 3_000_000], ids=["half", "nul", "u2028", "3 MB"]
)
def test_any_text_comes_back(store: ConversationStore, text: str) -> None:
    """Half a surrogate pair, control characters and long texts come back: in a message, a scope and an entry's id."""

    async def run() -> None:
        await store.save(Conversation(conversation_id="c", messages=turns(text)), scope=text)
        assert texts((await loaded(store, scope=text)).messages) == [text, text]
        assert texts((await loaded(store, limit=1)).messages) == [text]
        assert [each.scope for each in await store.list_conversations(scope=text)] == [text]
        entry = ConversationEntry(id=text, parent_id=None, message=request("a"))
        await store.write_record(
            ConversationRecord(conversation_id="d", head_id=text), new_entries=[entry], expected_revision=None
        )
        assert await store.read_history(text, limit=1) == await store.read_history(text) == [entry]

    asyncio.run(run())
