"""`repair`, `check` and `Store(answer_tool_calls=True)`: a conversation that a provider refuses is named and mended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import json_of, runner_of
from conftest import ActorFactory
from harness.chats import everything
from harness.providers import SHAPES
from harness.sweeps import sweep

import persist
import persist.aio
from persist.cli.commands import persist as command

shapes = pytest.mark.parametrize("shape", list(SHAPES))
PROMPT = {"id": "p", "role": "user", "content": "Look."}
CALL = {
    "id": "c",
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


def broken(shape: str) -> list[dict[str, Any]]:
    """A turn that broke off between its two calls and their results."""
    messages = SHAPES[shape][0](0, 2)
    return messages[:4] if shape == "responses" else messages[:2]


def kinds(store: persist.Store) -> list[tuple[str, str]]:
    return [(problem.session_id, problem.kind) for problem in store.check()]


@shapes
def test_repair_is_one_commit_and_is_done_once(store: persist.Store, shape: str) -> None:
    """The provider accepts the repaired conversation. A second repair commits nothing."""
    store.create("s", {"title": "t", "messages": [*broken(shape), SHAPES[shape][2]]})
    assert kinds(store) == [("s", "unanswered-tools")]
    before = store.head("s").revision
    assert store.repair("s") == 2
    assert store.head("s").revision == before + 1
    SHAPES[shape][1](store.load("s").data["messages"])
    assert store.load("s").data["title"] == "t"
    assert kinds(store) == []
    version = store.head("s").version
    assert store.repair("s") == 0
    assert store.head("s").version == version


@shapes
def test_sound_conversation_is_left_alone(store: persist.Store, shape: str) -> None:
    """Neither named nor written."""
    store.create("s", {"messages": SHAPES[shape][0](0, 3)})
    before = everything(store.path)
    assert store.check() == []
    assert store.repair("s") == 0
    assert store.load("s").data["messages"] == SHAPES[shape][0](0, 3)
    assert {name: each for name, each in everything(store.path).items() if name.endswith(".json")} == {
        name: each for name, each in before.items() if name.endswith(".json")
    }


def test_results_without_a_call_are_named(store: persist.Store) -> None:
    """A truncation took the call. Nobody knows what it was, so a repair leaves the result alone."""
    store.create("s", {"messages": [PROMPT, {"role": "tool", "tool_call_id": "call_9", "content": "x"}]})
    (problem,) = store.check()
    assert problem.kind == "orphaned-tools"
    assert "call_9" in problem.message
    assert store.repair("s") == 0


def test_live_turn_is_left_alone(store: persist.Store) -> None:
    """It may still answer. It is no problem, and a repair is refused."""
    store.create("s", {"messages": []})
    with store.start_stream("s", PROMPT) as stream:
        stream.append(CALL)
        assert store.check() == []
        with pytest.raises(persist.SessionBusy, match="may still answer"):
            store.repair("s")
        stream.append({"id": "r", "role": "tool", "tool_call_id": "call_1", "content": "found"})
        stream.finish({"role": "assistant", "content": "Here."})
    assert store.check() == []


def test_retry_leaves_no_synthetic_result_behind(store: persist.Store) -> None:
    """The turn is run again, and its answer takes the place of the partial one that had the call.

    Fails if nothing takes the synthetic result away: it would be a result without a call.
    """
    mine = persist.Store(store.path, answer_tool_calls=True)
    mine.create("s", {"messages": []})
    with mine.start_stream("s", PROMPT) as stream:
        stream.checkpoint(CALL)
    assert len(mine.tail("s")) == 3
    with mine.start_stream("s", PROMPT) as stream:
        stream.finish({"id": "c", "role": "assistant", "content": "Here."})
    assert [message["id"] for message in mine.tail("s")] == ["p", "c"]
    assert mine.check() == []


def test_stream_without_a_prompt_leaves_earlier_calls_alone(store: persist.Store) -> None:
    """They may wait for a person."""
    mine = persist.Store(store.path, answer_tool_calls=True)
    mine.create("s", {"messages": [PROMPT, CALL]})
    mine.start_stream("s").fail()
    assert mine.load("s").data["messages"] == [PROMPT, CALL]
    assert mine.check() == []


def test_real_result_that_comes_after_a_repair_is_taken_in(store: persist.Store) -> None:
    """The order in which they came does not matter. Nothing real is ever removed."""
    store.create("s", {"messages": [PROMPT, CALL, {"role": "user", "content": "?"}]})
    store.repair("s")
    store.append("s", "messages", {"id": "r", "role": "tool", "tool_call_id": "call_1", "content": "found"})
    assert kinds(store) == [("s", "misplaced-tools")]
    assert store.repair("s") == 1
    found = store.load("s").data["messages"]
    assert [message.get("content") for message in found] == ["Look.", None, "found", "?"]
    assert kinds(store) == []


def test_process_that_was_killed_between_call_and_result(store: persist.Store, actor: ActorFactory) -> None:
    """The next process's sweep answers the call. The user can go on (HAZARDS F7)."""
    store.create("s", {"messages": []})
    owner = actor()
    owner.do(f"stream = store.start_stream('s', {PROMPT!r})")
    owner.do(f"stream.append({CALL!r})")
    owner.kill()
    mine = persist.Store(store.path, answer_tool_calls=True)
    assert len(sweep(mine)) == 1
    SHAPES["chat"][1](mine.load("s").data["messages"])
    assert mine.check() == []


def test_repair_of_asyncio_and_of_the_command(store: persist.Store, tmp_path: Path) -> None:
    """The same, awaited and by hand."""
    for name in ("a", "b", "c"):
        store.create(name, {"messages": [*broken("chat"), {"role": "user", "content": "?"}]})

    async def repair() -> int:
        return await persist.aio.Store(store).repair("a")

    assert asyncio.run(repair()) == 2
    run = runner_of(command)
    done = run("check", store.path)
    assert (done.exit_code, done.stdout.count("persist repair")) == (1, 2)
    assert json_of(run("repair", store.path, "b", "--json")) == {"id": "b", "answered": 2}
    assert "c: 2 tool calls answered." in run("repair", store.path, "c").stdout
    assert run("check", store.path).exit_code == 0
