"""A prompt that another program left in the stream fields is recovered once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness.chats import ANSWER, PROMPT

import persist


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # The prompt is the last message, or is followed by others since the last answer.
        ([user("q")], [user("q", interrupted=True)]),
        ([user("a"), answer("b"), user("q"), TOOL], [user("a"), answer("b"), user("q", interrupted=True), TOOL]),
        ([user("q"), user("more")], [user("q", interrupted=True), user("more")]),
        # The prompt is answered: it is part of the turn that the last answer ended.
        ([user("q"), answer("b")], [user("q"), answer("b")]),
        ([user("q"), answer("call"), TOOL, answer("b")], [user("q"), answer("call"), TOOL, answer("b")]),
        ([user("q"), user("and"), answer("b"), TOOL], [user("q"), user("and"), answer("b"), TOOL]),
        # The prompt is in no message there, so the field is its only copy.
        ([], [user("q", id="old.prompt", interrupted=True)]),
        (
            [user("q"), answer("b"), user("c"), answer("d")],
            [user("q"), answer("b"), user("c"), answer("d"), user("q", id="old.prompt", interrupted=True)],
        ),
    ],
)
def test_pending_prompt_is_recovered_once(
    store: persist.Store, messages: list[Any], expected: list[Any], runs: int
) -> None:
    """A pending prompt is recovered once.
    Fails if only the last message is searched for it (hermes-webui #6366, #7682).
    """
    pending = {"active_stream_id": "old", "pending_user_message": "q"}
    path = store.path / "s.json"
    path.write_text(json.dumps({"messages": messages} | pending))
    for _ in range(runs):
        assert len(store.clear_stale_streams(every_session=True).cleared) == 1
        # The old server names the same prompt again.
        left = store.load("s").data
        assert left["messages"] == expected
        assert left["active_stream_id"] is None
        store.delete("s")
        path.write_text(json.dumps({"messages": left["messages"]} | pending))


@pytest.mark.parametrize("active", [{}, {"active_stream_id": None}, {"active_stream_id": ""}])
def test_pending_prompt_without_a_stream_is_kept_by_the_next_turn(store: persist.Store, active: Any) -> None:
    """A prompt without a stream is kept: an old server was stopped before it had one.
    Fails if the start resets the fields without a look.
    """
    path = store.path / "s.json"
    path.write_text(json.dumps({"messages": [], "pending_user_message": "q"} | active))
    with store.start_stream("s", PROMPT) as stream:
        stream.finish(ANSWER)
    assert store.load("s").data["messages"] == [user("q", interrupted=True), PROMPT, ANSWER]
