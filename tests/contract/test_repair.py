"""`repair` and `Store(answer_tool_calls=True)` on each engine: a conversation that a provider refuses is mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from actors import Actor
from conftest import ActorFactory
from harness.contents import everything_in, reopened
from harness.providers import SHAPES
from harness.sweeps import sweep

import persist
from persist.tool_calls import faults

KINDS = ("auto", "postgres")


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


def test_store_keeps_the_option_in_another_process(store: persist.Store) -> None:
    """A store that is handed over is opened there with the same options."""
    mine = reopened(store, answer_tool_calls=True)
    make, arguments = mine.__reduce__()
    assert make(*arguments)._backend.answer_tool_calls is True


@pytest.mark.parametrize("shape", list(SHAPES))
def test_repair_is_one_commit_and_is_done_once(store: persist.Store, shape: str) -> None:
    """The provider accepts the repaired conversation. A second repair writes nothing."""
    session = store.create("s", {"title": "t", "messages": [*broken(shape), SHAPES[shape][2]]})
    assert store.repair("s") == 2
    assert store.head("s").revision == session.revision + 1
    SHAPES[shape][1](store.load("s").data["messages"])
    before = everything_in(store)
    assert store.repair("s") == 0
    assert everything_in(store) == before
