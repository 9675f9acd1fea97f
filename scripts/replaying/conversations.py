"""Conversations: transcripts from files, parted into turns, and the turn that is open in a document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from persist import json_codec
from persist.turn import ACTIVE, INTERRUPTED, Message

#: The field where a document keeps the title that each turn has set, under `Turn.key`.
TITLES = "titles"


class BadTranscript(ValueError):
    """Raised when a file does not hold a conversation. The message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, and the messages that follow it up to the next prompt."""

    number: int
    prompt: Message
    replies: tuple[Message, ...]

    @property
    def key(self) -> str:
        return f"turn-{self.number}"

    @property
    def steps(self) -> tuple[Message, ...]:
        """The replies that are appended whole: all but the answer."""
        return self.replies if self.answer is None else self.replies[:-1]

    @property
    def answer(self) -> Message | None:
        """The message that ends the turn and is streamed. None if the turn ends with a tool's output, for example."""
        last = self.replies[-1] if self.replies else {}
        return last if last.get("role") == "assistant" else None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A transcript to be played into the session `session_id`. Message number i has the id ``m<i>``."""

    session_id: str
    title: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, session_id: str, transcript: Mapping[str, Any]) -> Conversation:
        """Return a transcript as a conversation.

        A transcript is ``{"title": …, "messages": [{"role": …, "content": …}, …]}``. Other keys are ignored.
        """
        messages = tuple(_with_id(i, message) for i, message in enumerate(transcript["messages"]))
        return cls(session_id, str(transcript.get("title", session_id)), messages)

    def in_round(self, number: int) -> Conversation:
        """Return the conversation under another session id, because every round plays into sessions of its own."""
        return self if number == 1 else replace(self, session_id=f"{self.session_id}-r{number}")

    @property
    def opening(self) -> tuple[Message, ...]:
        """The messages before the first prompt: system messages."""
        return self.messages[: self._prompt_places()[0]]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns, in their order."""
        places = self._prompt_places()
        return tuple(
            Turn(number, self.messages[start], self.messages[start + 1 : end])
            for number, (start, end) in enumerate(pairwise(places), 1)
        )

    def _prompt_places(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"] + [len(self.messages)]

    def title_after(self, turn: Turn) -> str:
        """Return the title that the turn gives to the session."""
        return f"{self.title} ({turn.number} of {len(self.turns)})"

    def count_in(self, data: Mapping[str, Any]) -> int:
        """Return how many of the messages a document has, from the first on without a gap."""
        there = {message["id"] for message in data["messages"]}
        return next((i for i, message in enumerate(self.messages) if message["id"] not in there), len(self.messages))

    def open_turn(self, data: Mapping[str, Any]) -> Turn | None:
        """Return the turn that comes next according to a committed document, or None if all are done.

        A turn is open if it lacks a message or was interrupted. While a stream is active, the last turn that was begun
        is open, too. All its messages may be there, but it has not been finished.
        """
        there = {message["id"]: message for message in data["messages"]}
        begun = None
        for turn in self.turns:
            prompt = there.get(turn.prompt["id"])
            if prompt is None or prompt.get(INTERRUPTED) or not all(reply["id"] in there for reply in turn.replies):
                return turn
            begun = turn
        return begun if data.get(ACTIVE) is not None else None


def _with_id(i: int, message: Message) -> Message:
    # Both keys get their meaning from the replay itself.
    return {"id": f"m{i}"} | {key: value for key, value in message.items() if key not in ("id", INTERRUPTED)}


def samples() -> list[Conversation]:
    """Return the conversations that come with the package."""
    return read(Path(__file__).parent / "samples")


def read(path: Path) -> list[Conversation]:
    """Read the transcript `path`, or all ``*.json`` files of the directory `path`, in the order of their names.

    Raises:
        BadTranscript: a file is not a transcript, or there is none.
    """
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise BadTranscript(f"{path} has no *.json file.")
    names = _session_ids(paths)
    return [Conversation.of(name, _read_transcript(path)) for name, path in zip(names, paths, strict=True)]


def _session_ids(paths: list[Path]) -> Iterator[str]:
    """Yield a session id for each file: its name, in the characters that an id may have."""
    taken: set[str] = set()
    for number, path in enumerate(paths, 1):
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:100]
        # The id must not be the name of another conversation's second round.
        plain = re.sub(r"(-r\d+)$", r"\1_", plain)
        is_usable = plain not in taken and plain[:1].isalnum()
        taken.add(name := plain if is_usable else f"s{number}-{plain}")
        yield name


def _read_transcript(path: Path) -> dict[str, Any]:
    try:
        transcript = json_codec.decode_strict(path.read_bytes())
    except json_codec.StrictError as error:
        raise BadTranscript(f"{path} is not JSON: byte {error.offset}: {error.reason}") from None
    except OSError as error:
        raise BadTranscript(f"{path} cannot be read: {error.strerror}.") from None
    messages = transcript.get("messages") if type(transcript) is dict else None
    if type(messages) is not list:
        raise BadTranscript(f'{path} is no transcript: it must be {{"title": …, "messages": […]}}.')
    for i, message in enumerate(messages):
        if type(message) is not dict or type(message.get("role")) is not str:
            raise BadTranscript(f"{path}: messages[{i}] must be an object with a 'role'.")
    return cast(dict[str, Any], transcript)
