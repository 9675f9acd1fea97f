"""`repair`, `check` and `Store(answer_tool_calls=True)`: a conversation that a provider refuses is named and mended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from actors import Actor
from cli.conftest import json_of, runner_of
from conftest import ActorFactory
from harness.contents import everything_in, name_of, reopened
from harness.providers import SHAPES
from harness.sweeps import sweep

import persist
import persist.aio
from persist.cli.commands import persist as command
from persist.tool_calls import faults

KINDS = ("auto", "postgres")
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


def test_arguments_are_checked(store: persist.Store) -> None:
    """Nothing is written for a session that is not there, or for a field that is no list."""
    store.create("s", {"title": "t", "items": broken("responses")})
    for call, kind in (
        (lambda: store.repair("x"), persist.SessionNotFound),
        (lambda: store.repair("s", field="title"), persist.InvalidArgument),
        (lambda: reopened(store, answer_tool_calls="yes"), persist.InvalidArgument),
    ):
        with pytest.raises(kind):
            call()
    assert store.repair("s", field="items") == 2


def fail(store: persist.Store, stream: persist.Stream) -> None:
    stream.fail()


def cancel(store: persist.Store, stream: persist.Stream) -> None:
    with stream:
        store.cancel("s", stream.id, force=True)


def clear(store: persist.Store, stream: persist.Stream) -> None:
    stream._lease.close()
    assert store.load("s").clear_stale_stream()


def sweep_all(store: persist.Store, stream: persist.Stream) -> None:
    stream._lease.close()
    assert len(sweep(store)) == 1


def start_again(store: persist.Store, stream: persist.Stream) -> None:
    stream._lease.close()
    store.start_stream("s", {"id": "p2", "role": "user", "content": "?"}).finish()


@pytest.mark.parametrize("end", [fail, cancel, clear, sweep_all, start_again], ids=lambda end: end.__name__)
@pytest.mark.parametrize("answers", [True, False], ids=["answers", "leaves"])
def test_turn_that_breaks_off_answers_its_calls(
    store: persist.Store, end: Callable[[persist.Store, persist.Stream], None], *, answers: bool
) -> None:
    """In the commit that ends the turn, however it ends. Without the option the calls stay as they are.

    An earlier turn's calls are left alone.
    """
    mine = reopened(store, answer_tool_calls=answers)
    mine.create("s", {"messages": [{**CALL, "id": "old"}]})
    stream = mine.start_stream("s", PROMPT)
    stream.append(CALL)
    end(mine, stream)
    found = mine.load("s").data["messages"]
    assert [fault.place for fault in faults(found)] == ([0] if answers else [0, 2])
    assert [message["id"] for message in found if message.get("role") == "tool"] == (
        ["c.result.call_1"] if answers else []
    )


def test_process_that_was_killed_between_call_and_result(
    store: persist.Store, actor: ActorFactory, kill: Callable[[Actor], None]
) -> None:
    """The next process's sweep answers the call. The user can go on (HAZARDS F7)."""
    store.create("s", {"messages": []})
    owner = actor()
    owner.do(f"stream = store.start_stream('s', {PROMPT!r})")
    owner.do(f"stream.append({CALL!r})")
    kill(owner)
    mine = reopened(store, answer_tool_calls=True)
    assert len(sweep(mine)) == 1
    SHAPES["chat"][1](mine.load("s").data["messages"])
    assert mine.check() == []


def test_store_keeps_the_option_in_another_process(store: persist.Store) -> None:
    """A store that is handed over is opened there with the same options."""
    mine = reopened(store, answer_tool_calls=True)
    make, arguments = mine.__reduce__()
    assert make(*arguments)._backend.answer_tool_calls is True


@shapes
def test_repair_is_one_commit_and_is_done_once(store: persist.Store, shape: str) -> None:
    """The provider accepts the repaired conversation. A second repair writes nothing."""
    session = store.create("s", {"title": "t", "messages": [*broken(shape), SHAPES[shape][2]]})
    assert kinds(store) == [("s", "unanswered-tools")]
    assert store.repair("s") == 2
    assert store.head("s").revision == session.revision + 1
    SHAPES[shape][1](store.load("s").data["messages"])
    assert store.load("s").data["title"] == "t"
    assert kinds(store) == []
    before = everything_in(store)
    assert store.repair("s") == 0
    assert everything_in(store) == before


@shapes
def test_sound_conversation_is_left_alone(store: persist.Store, shape: str) -> None:
    """Neither named nor written."""
    store.create("s", {"messages": SHAPES[shape][0](0, 3)})
    before = everything_in(store)
    assert store.check() == []
    assert store.repair("s") == 0
    assert store.load("s").data["messages"] == SHAPES[shape][0](0, 3)
    assert everything_in(store) == before


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
    mine = reopened(store, answer_tool_calls=True)
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
    mine = reopened(store, answer_tool_calls=True)
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


def test_repair_of_asyncio_and_of_the_command(store: persist.Store) -> None:
    """The same, awaited and by hand."""
    for name in ("a", "b", "c"):
        store.create(name, {"messages": [*broken("chat"), {"role": "user", "content": "?"}]})

    async def repair() -> int:
        return await persist.aio.Store(store).repair("a")

    assert asyncio.run(repair()) == 2
    run, name = runner_of(command), name_of(store)
    done = run("check", name)
    assert (done.exit_code, done.stdout.count("persist repair")) == (1, 2)
    assert json_of(run("repair", name, "b", "--json")) == {"id": "b", "answered": 2}
    assert "c: 2 tool calls answered." in run("repair", name, "c").stdout
    assert run("check", name).exit_code == 0
