"""Several processes share one session, and are killed at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("agents", reason="no openai-agents: scripts/test-adapters installs it")

from harness.killed_workers import all_worked

from persist.adapters.openai_agents import PersistSession

BATCHES, KILLS = 100, 2

#: Adds the batches of one worker, behind those that are there. It prints each batch that is acknowledged.
WORKER = """
import asyncio, sys
from persist.adapters.openai_agents import PersistSession

async def work(directory, name, batches):
    session = PersistSession("s", directory)
    mine = [item for item in await session.get_items() if item["content"].startswith(f"{name} ")]
    for number in range(len(mine) // 2, batches):
        pair = [{"role": role, "content": f"{name} {number} {role}"} for role in ("user", "assistant")]
        await session.add_items(pair)
        print(number, flush=True)

asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def test_killed_workers_lose_double_and_split_nothing(tmp_path: Path) -> None:
    """Without the lock around `add_items` pairs of two workers mix, and items are lost.

    A worker that is killed starts again, looks at what is there, and goes on with the next batch.
    """
    acknowledged = all_worked(tmp_path, code=WORKER, steps=BATCHES, kills=KILLS)
    items: list[Any] = asyncio.run(PersistSession("s", tmp_path).get_items())
    seen: list[Any] = [item["content"].split() for item in items]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert (first[:2], first[2], second[2]) == (second[:2], "user", "assistant")
    for name, numbers in acknowledged.items():
        there = [int(number) for worker, number, role in seen if worker == name and role == "user"]
        assert there == list(range(BATCHES))
        assert numbers <= set(there)


AGENT = """
import asyncio, sys
from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from persist.adapters.openai_agents import PersistSession

set_tracing_disabled(True)
url, directory, *prompts = sys.argv[1:]

async def talk():
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    agent = Agent(name="a", model=OpenAIChatCompletionsModel("local", client))
    session = PersistSession("s", directory)
    for prompt in prompts:
        result = await Runner.run(agent, prompt, session=session)
        print(result.final_output, flush=True)

asyncio.run(talk())
"""


def test_a_conversation_goes_on_after_a_kill_in_mid_turn(tmp_path: Path, model: Any) -> None:
    """The first process dies while the model answers. The second one goes on with all that had been said."""
    command = [sys.executable, "-c", AGENT, model.url, str(tmp_path)]
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    first = subprocess.Popen([*command, "one", "hold two"], env=environment)
    model.wait_for("hold two")
    first.kill()
    first.wait()
    subprocess.run([*command, "three"], env=environment, check=True, timeout=60)
    said = model.wait_for("three")
    assert [each for each in said if each[1] != "hold two"] == [
        ("user", "one"),
        ("assistant", "Answer to: one"),
        ("user", "three"),
    ]
    document = json.loads((tmp_path / "s.json").read_text())
    assert [item["role"] for item in document["messages"]][-2:] == ["user", "assistant"]
