"""Each adapter keeps a short conversation on PostgreSQL. It is given the URL of the store, or the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import persist
import persist.aio
from persist.adapters.opening import opened


@pytest.fixture
def store(postgres_url: str, postgres_schema: str) -> persist.Store:
    return persist.Store(postgres_url, schema=postgres_schema)


def test_adapters_of_one_url_share_a_store(postgres_url: str, postgres_schema: str) -> None:
    """A URL is taken as it stands, and leads to one store."""
    url = f"{postgres_url}?schema={postgres_schema}"
    first = opened(url)
    assert opened(url) is first
    name = postgres_url.rsplit("/", 1)[1]
    assert name in repr(first)


def test_openai_agents(store: persist.Store) -> None:
    pytest.importorskip("agents", reason="no openai-agents: scripts/test-adapters installs it")
    from persist.adapters.openai_agents import PersistSession

    async def talk() -> None:
        session, again = PersistSession("user:7/chat", store), PersistSession("user:7/chat", persist.aio.Store(store))
        items: list[Any] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because.\0"}]
        await session.add_items(items)
        assert await again.get_items() == items
        assert await again.get_items(limit=1) == items[1:]
        popped = await asyncio.gather(session.pop_item(), again.pop_item(), session.pop_item())
        assert sorted(popped, key=str) == sorted([*items, None], key=str)
        await again.add_items(items)
        await session.clear_session()
        assert await again.get_items() == []

    asyncio.run(talk())


def test_pydantic_ai(store: persist.Store) -> None:
    pytest.importorskip("pydantic_ai.conversation_store", reason="needs pydantic-ai-slim")
    from pydantic_ai import Agent
    from pydantic_ai.conversation import Conversation
    from pydantic_ai.models.test import TestModel

    from persist.adapters.pydantic_ai import PersistConversationStore

    async def talk() -> None:
        agent, conversations = Agent(TestModel(custom_output_text="Because.")), PersistConversationStore(store)
        for turn in range(1, 4):
            conversation = await conversations.load("c") or Conversation(conversation_id="c")
            result = await agent.run(f"Why? {turn}", conversation=conversation)
            await conversations.save(result)
            there = await PersistConversationStore(store).load("c")
            assert there is not None
            assert there.usage.requests == turn
            assert there.messages == result.conversation.messages

    asyncio.run(talk())


def test_claude_agent_sdk(store: persist.Store) -> None:
    """The SDK's contracts hold. Each begins with an empty store."""
    pytest.importorskip("claude_agent_sdk", reason="needs claude-agent-sdk")
    from claude_agent_sdk.testing import run_session_store_conformance

    from persist.adapters.claude_agent_sdk import PersistSessionStore

    def make_store() -> Any:
        for session_id in store.ids():
            store.delete(session_id)
        return PersistSessionStore(store)

    asyncio.run(run_session_store_conformance(make_store))


def test_claude_agent_sdk_without_the_sdk(store: persist.Store) -> None:
    """The transcript of a subagent needs no SDK. It is one session, and is read back as it was."""
    from persist.adapters.claude_agent_sdk import PersistSessionStore

    adapter, key, entries = PersistSessionStore(store), {"project_key": "p", "session_id": "s", "subpath": "a"}, []
    for number in range(3):
        entry: dict[str, Any] = {"type": "user", "uuid": f"u{number}", "message": {"role": "user", "content": "Why?"}}
        asyncio.run(adapter.append(key, [entry]))
        entries.append(entry)
    assert asyncio.run(PersistSessionStore(store).load(key)) == entries
    assert store.ids() == ["p/s/a"]


def test_langgraph(store: persist.Store) -> None:
    """Real graphs show what they show on LangGraph's own saver in memory."""
    pytest.importorskip("langgraph.checkpoint.memory", reason="needs langgraph")
    from harness.adapters.graphs import SCENARIOS
    from langgraph.checkpoint.memory import InMemorySaver

    from persist.adapters.langgraph import PersistSaver

    for number, scenario in enumerate(SCENARIOS):
        wanted: Any = scenario(InMemorySaver(), "async", bool(number % 2))
        assert scenario(PersistSaver(store), "async", bool(number % 2)) == wanted, scenario.__name__
        for session_id in store.ids():
            store.delete(session_id)


def test_langgraph_conformance(store: persist.Store) -> None:
    """All 81 tests of LangGraph's own suite pass."""
    pytest.importorskip("langgraph.checkpoint.conformance", reason="needs langgraph-checkpoint-conformance")
    from langgraph.checkpoint.conformance import checkpointer_test, validate

    from persist.adapters.langgraph import PersistSaver

    @checkpointer_test(name="PersistSaver")
    async def saver() -> AsyncGenerator[Any, None]:
        for session_id in store.ids():
            store.delete(session_id)
        yield PersistSaver(store)

    report = asyncio.run(validate(saver))
    assert {name: result.failures for name, result in report.results.items() if result.failures} == {}
    assert sum(result.tests_passed for result in report.results.values()) == 81
