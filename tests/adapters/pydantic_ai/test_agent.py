"""An agent of pydantic-ai runs a conversation through the store, and another process goes on with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai.conversation_store", reason="needs pydantic-ai-slim")

from pydantic_ai import Agent, DeferredToolRequests
from pydantic_ai.conversation import Conversation
from pydantic_ai.exceptions import CallDeferred
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

import persist
from persist.adapters.pydantic_ai import PersistConversationStore

#: Runs a turn for each prompt, and tells the usage of the whole conversation after each.
AGENT = """
import asyncio, sys
from pydantic_ai import Agent
from pydantic_ai.conversation import Conversation
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from persist.adapters.pydantic_ai import PersistConversationStore

url, directory, *prompts = sys.argv[1:]

async def talk():
    agent = Agent(OpenAIChatModel("local", provider=OpenAIProvider(base_url=url, api_key="none")))
    store = PersistConversationStore(directory)
    for prompt in prompts:
        conversation = await store.load("c") or Conversation(conversation_id="c")
        result = await agent.run(prompt, conversation=conversation)
        await store.save(result)
        print(result.output, result.conversation.usage.requests, flush=True)

asyncio.run(talk())
"""


def test_a_conversation_goes_on_after_a_kill_in_mid_turn(directory: Path, model: Any) -> None:
    """The first process dies while the model answers. The second one goes on with all that had been saved."""
    pytest.importorskip("openai", reason="no openai: scripts/test-adapters installs it")
    command = [sys.executable, "-c", AGENT, model.url, str(directory)]
    with subprocess.Popen([*command, "one", "hold two"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        model.wait_for("hold two")
        first.kill()
        assert first.stdout.read() == "Answer to: one 1\n"
    second = subprocess.run([*command, "three", "four"], stdout=subprocess.PIPE, check=True, timeout=60, text=True)
    assert second.stdout == "Answer to: three 2\nAnswer to: four 3\n"
    expected = [("user", "one"), ("assistant", "Answer to: one"), ("user", "three")]
    assert model.wait_for("three") == expected
    assert model.wait_for("four") == [*expected, ("assistant", "Answer to: three"), ("user", "four")]
    assert persist.Store(directory).head("c").revision == 3


def test_a_run_with_tools_comes_back(directory: Path) -> None:
    """The calls of a tool, their results and the answer load as they were saved, and the run can be continued."""
    agent = Agent(TestModel())

    @agent.tool_plain
    def look(place: str) -> dict[str, object]:
        return {"place": place, "rows": [1, None, 2.5]}

    async def run() -> None:
        store = PersistConversationStore(directory)
        result = await agent.run("look", conversation=Conversation(conversation_id="c"))
        await store.save(result)
        found = await PersistConversationStore(directory).load("c")
        assert found == result.conversation
        again = await agent.run("again", conversation=found)
        assert len(await store.save(again)) == len(again.new_messages())
        assert await store.load("c") == again.conversation

    asyncio.run(run())


def test_a_paused_run_is_answered_in_another_store(directory: Path) -> None:
    """A run that waits for a tool's result is loaded elsewhere, gets the result, and ends."""

    def model(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        last = messages[-1].parts[-1]
        if isinstance(last, ToolReturnPart):
            return ModelResponse(parts=[TextPart(f"it is {last.content}")])
        assert isinstance(last, UserPromptPart)
        return ModelResponse(parts=[ToolCallPart("slow", {}, "t1")])

    agent = Agent(FunctionModel(model), output_type=[str, DeferredToolRequests])

    @agent.tool_plain
    def slow() -> str:
        raise CallDeferred

    async def run() -> None:
        result = await agent.run("when?", conversation=Conversation(conversation_id="c"))
        await PersistConversationStore(directory).save(result)
        store = PersistConversationStore(directory)
        waiting = await store.load("c")
        assert waiting is not None
        requests = waiting.deferred_tool_requests
        assert requests is not None
        answered = await agent.run(
            conversation=waiting, deferred_tool_results=requests.build_results(calls={"t1": "noon"})
        )
        assert answered.output == "it is noon"
        await store.save(answered)
        done = await PersistConversationStore(directory).load("c")
        assert done is not None
        assert done == answered.conversation
        assert done.deferred_tool_requests is None

    asyncio.run(run())
