"""Several processes share one thread, and are killed at any moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph.graph", reason="no langgraph: scripts/test-adapters installs it")

from harness.killed_workers import NAMES, WORKERS, all_worked

from persist.adapters.langgraph import PersistSaver

KILLS = 1
CONFIG: Any = {"configurable": {"thread_id": "t-1"}}
AT_C1: Any = {"configurable": {"thread_id": "t-1", "checkpoint_ns": "", "checkpoint_id": "c-1"}}

#: Stores the writes of tasks, a pair each, and prints each task that is acknowledged. Every other task is one of all
#: workers. After a kill the worker begins anew, because LangGraph repeats the writes of a step.
WRITER = """
import sys
from persist.adapters.langgraph import PersistSaver

saver, name = PersistSaver(sys.argv[1]), sys.argv[2]
config = {"configurable": {"thread_id": "t-1", "checkpoint_ns": "", "checkpoint_id": "c-1"}}
for number in range(int(sys.argv[3])):
    task = f"{name if number % 2 else 'all'}-{number}"
    saver.put_writes(config, [("one", [task, number]), ("two", {"task": task, "number": number})], task)
    print(number, flush=True)
"""

#: Takes the turns of one worker, a prompt and an answer each. A run that is superseded is repeated. After a kill it
#: looks at what is there.
TALKER = """
import operator, random, sys, time
from typing import Annotated, TypedDict
from langgraph.graph import END, START, StateGraph
from persist.adapters.langgraph import PersistSaver, SupersededRun

class State(TypedDict):
    said: Annotated[list[str], operator.add]

def answer(state):
    return {"said": [state["said"][-1].replace("prompt", "answer")]}

builder = StateGraph(State)
builder.add_node("answer", answer)
builder.add_edge(START, "answer")
builder.add_edge("answer", END)
graph, name = builder.compile(checkpointer=PersistSaver(sys.argv[1])), sys.argv[2]
config = {"configurable": {"thread_id": "t-1"}}
chance = random.Random(name)
for number in range(int(sys.argv[3])):
    prompt = f"{name} {number} prompt"
    while prompt not in graph.get_state(config).values.get("said", ()):
        try:
            graph.invoke({"said": [prompt]}, config, durability="exit")
        except SupersededRun:
            time.sleep(chance.uniform(0, 0.05))
    print(number, flush=True)
"""


def test_killed_writers_lose_double_and_split_nothing(tmp_path: Path) -> None:
    """4 processes store the writes of 100 tasks each, on one checkpoint that comes later. All are there, once each.

    It fails if `put_writes` looks for the task before its transaction, because tasks of all workers are doubled then.
    """
    steps = 100
    printed = all_worked(tmp_path, code=WRITER, steps=steps, kills=KILLS)
    assert printed == {name: set(range(steps)) for name in NAMES}
    saver = PersistSaver(tmp_path)
    empty: dict[str, Any] = {"channel_values": {}, "channel_versions": {}, "versions_seen": {}}
    checkpoint: Any = {"v": 4, "id": "c-1", "ts": "2026-11-30T10:00:00+00:00", **empty}
    saver.put({"configurable": {"thread_id": "t-1", "checkpoint_ns": ""}}, checkpoint, {}, {})
    found = saver.get_tuple(AT_C1)
    assert found is not None
    wanted: list[Any] = []
    for number in range(steps):
        for name in NAMES if number % 2 else ["all"]:
            task = f"{name}-{number}"
            wanted += [(task, "one", [task, number]), (task, "two", {"task": task, "number": number})]
    assert found.pending_writes == sorted(wanted, key=lambda write: write[:2])


def test_killed_talkers_lose_double_and_split_nothing(tmp_path: Path) -> None:
    """4 processes take 10 turns each on one thread. A process whose run is superseded repeats it.

    It fails if `Run.admit` lets every run pass, because turns are lost then.
    """
    turns = 10
    printed = all_worked(tmp_path, code=TALKER, steps=turns, kills=KILLS)
    assert printed == {name: set(range(turns)) for name in NAMES}
    found = PersistSaver(tmp_path).get_tuple(CONFIG)
    assert found is not None
    said = [each.split() for each in found.checkpoint["channel_values"]["said"]]
    for prompt, answer in zip(said[::2], said[1::2], strict=True):
        assert (prompt[:2], prompt[2], answer[2]) == (answer[:2], "prompt", "answer")
    for worker in range(WORKERS):
        assert [int(number) for name, number, kind in said if (name, kind) == (f"w{worker}", "prompt")] == [
            *range(turns)
        ]


AGENT = """
import sys
from langchain_core.messages import AIMessage, convert_to_openai_messages
from langgraph.graph import START, MessagesState, StateGraph
from openai import OpenAI
from persist.adapters.langgraph import PersistSaver

url, directory, *prompts = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none", max_retries=0)

def model(state):
    messages = convert_to_openai_messages(state["messages"])
    answer = client.chat.completions.create(model="local", messages=messages)
    return {"messages": [AIMessage(answer.choices[0].message.content)]}

builder = StateGraph(MessagesState)
builder.add_node("model", model)
builder.add_edge(START, "model")
graph = builder.compile(checkpointer=PersistSaver(directory))
for prompt in prompts:
    graph.invoke({"messages": [("user", prompt)]}, {"configurable": {"thread_id": "t-1"}}, durability="sync")
"""


def test_a_conversation_goes_on_after_a_kill_in_mid_turn(tmp_path: Path, model: Any) -> None:
    """The first process dies while the model answers. The second one goes on with all that had been said."""
    pytest.importorskip("openai", reason="no openai: scripts/test-adapters installs it")
    command = [sys.executable, "-c", AGENT, model.url, str(tmp_path)]
    first = subprocess.Popen([*command, "one", "hold two"])
    model.wait_for("hold two")
    first.kill()
    first.wait()
    subprocess.run([*command, "three"], check=True, timeout=60)
    said = [("user", "one"), ("assistant", "Answer to: one"), ("user", "hold two"), ("user", "three")]
    assert model.wait_for("three") == said
    found = PersistSaver(tmp_path).get_tuple(CONFIG)
    assert found is not None
    texts = [message.content for message in found.checkpoint["channel_values"]["messages"]]
    assert texts == [*(text for _, text in said), "Answer to: three"]
