"""Conversations: how a transcript is divided into turns, and which turn a document leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from replaying.conversations import Conversation, read, samples

ROLES = ("system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "user", "user", "assistant")


@pytest.fixture
def conversation() -> Conversation:
    messages = [{"role": role, "content": str(i), "id": "theirs"} for i, role in enumerate(ROLES)]
    return Conversation.of("s-42", {"title": "T", "messages": messages})


def document(conversation: Conversation, count: int, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [dict(message) for message in conversation.messages[:count]],
        "active_stream_id": None,
        **fields,
    }


def test_turns_cover_the_transcript(conversation: Conversation) -> None:
    """Opening, prompts and replies are the whole transcript, in its order. Message i has the id ``m<i>``."""
    played = list(conversation.opening)
    for turn in conversation.turns:
        played += [turn.prompt, *turn.steps] + ([turn.answer] if turn.answer else [])
    assert played == list(conversation.messages)
    assert [message["id"] for message in played] == [f"m{i}" for i in range(len(ROLES))]


def test_only_an_assistant_message_at_the_end_is_streamed(conversation: Conversation) -> None:
    """A turn that ends with a tool's output, or with its prompt, has no answer."""
    assert [turn.answer["id"] if turn.answer else None for turn in conversation.turns] == ["m4", None, None, "m10"]


@pytest.mark.parametrize(("count", "number"), [(1, 1), (2, 1), (4, 1), (5, 2), (7, 2), (8, 3), (9, 4), (11, None)])
def test_open_turn_is_the_first_that_lacks_a_message(
    conversation: Conversation, count: int, number: int | None
) -> None:
    """The document alone decides which turn comes next."""
    turn = conversation.open_turn(document(conversation, count))
    assert (turn.number if turn else None) == number


def test_interrupted_turn_is_open_again(conversation: Conversation) -> None:
    """A turn that was interrupted before its end is taken up again, even if all its messages are stored."""
    data = document(conversation, 8)
    data["messages"][5]["interrupted"] = True
    turn = conversation.open_turn(data)
    assert turn is not None
    assert turn.number == 2


def test_turn_of_an_active_stream_is_open(conversation: Conversation) -> None:
    """The last turn that was begun is open while its stream is active, even if all its messages are stored."""
    turn = conversation.open_turn(document(conversation, len(ROLES), active_stream_id="x"))
    assert turn is not None
    assert turn.number == 4


def test_rounds_never_share_a_session(tmp_path: Path) -> None:
    """No round of one file plays into the session of another file, whatever the files are called."""
    for name in ("a", "a-r2", "a b", "a-b", "-", "Ω"):
        (tmp_path / f"{name}.json").write_text('{"messages": []}')
    ids = [each.in_round(number).session_id for number in (1, 2, 3) for each in read(tmp_path)]
    assert len(set(ids)) == 18


def test_samples_have_what_real_conversations_have() -> None:
    """The samples hold all that real conversations hold.

    They have tool calls, a turn that ends with a tool, several scripts, emoji, control characters and long text.
    """
    messages = [message for conversation in samples() for message in conversation.messages]
    text = "".join(str(message["content"]) for message in messages)
    assert any(message.get("tool_calls") for message in messages)
    assert any(turn.answer is None for conversation in samples() for turn in conversation.turns)
    assert {"é", "茶", "국", "ع", "ש", "ह", "👩", "\u0000", "\u2028"} <= {*text}
    assert max(len(str(message["content"])) for message in messages) > 3000
