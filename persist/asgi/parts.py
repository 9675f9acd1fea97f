"""The parts of an answer: what a responder yields, what followers see, and how the parts add up to a stored message.

A stored message keeps its text in ``content``, with a blank line between texts that something else has parted. If there
is more than text, ``parts`` has everything, in the form of the AI SDK's UI messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persist import json_codec

Event = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's text."""

    text: str

    def event(self) -> Event:
        return {"type": "text", "text": self.text}


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str

    def event(self) -> Event:
        return {"type": "reasoning", "text": self.text}


@dataclass(frozen=True, slots=True)
class ToolInput:
    """A call of a tool. `id` is the call's, and `input` is any JSON value."""

    id: str
    name: str
    input: Any

    def event(self) -> Event:
        return {"type": "tool-input", "id": self.id, "name": self.name, "input": self.input}


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """The result of the call with that id. `output` is any JSON value."""

    id: str
    output: Any

    def event(self) -> Event:
        return {"type": "tool-output", "id": self.id, "output": self.output}


@dataclass(frozen=True, slots=True)
class Error:
    """The end of an answer that failed. The user sees the text, and what was said before is kept."""

    text: str

    def event(self) -> Event:
        return {"type": "error", "text": self.text}


Part = Text | Reasoning | ToolInput | ToolOutput | Error

#: The class of a part, by the type of its event. The other keys of the event are the fields of the part.
_KINDS: dict[str, type[Part]] = {
    "text": Text,
    "reasoning": Reasoning,
    "tool-input": ToolInput,
    "tool-output": ToolOutput,
    "error": Error,
}
#: Where a part stands in a session. So a part that is nested too deep for the session is refused by itself.
_PLACE = ("messages", 0, "parts", 0)


def copied(part: Any) -> Part:
    """Return a copy of what a responder has yielded. Nobody else can change it, and it can be told and stored.

    Raises:
        TypeError: it is no part, or a text of it is none.
        NotJSON: a value of it cannot be kept.
    """
    if not isinstance(part, Part):
        raise TypeError(f"A responder yields parts (persist.asgi.Text, …), and this one yielded a {type(part)}.")
    fields = json_codec.decode(json_codec.encode_exact(part.event(), _PLACE))
    for name, value in fields.items():
        if name not in ("input", "output") and type(value) is not str:
            raise TypeError(f"{name} of a {type(part).__name__} must be a text, and is a {type(value).__name__}.")
    return _KINDS[fields.pop("type")](**fields)


class Answer:
    """An answer while it comes: the sum of its parts.

    Attributes:
        id: the id of the message.
        error: the text of the error that ended it, or None.
    """

    def __init__(self, message_id: str) -> None:
        self.id = message_id
        self.error: str | None = None
        self._parts: list[dict[str, Any]] = []
        # A long answer comes in many pieces, which are joined only when somebody asks.
        self._pieces: list[str] = []

    @property
    def is_silent(self) -> bool:
        """Whether it has said nothing. An error says nothing."""
        return not self._parts

    def add(self, part: Part) -> None:
        """Add a part.

        Raises:
            ValueError: it is the output of no call, or of a call that has its output.
        """
        if isinstance(part, (Text, Reasoning)):
            kind = "text" if isinstance(part, Text) else "reasoning"
            if not self._parts or self._parts[-1]["type"] != kind:
                self._join()
                self._parts.append({"type": kind, "text": ""})
            self._pieces.append(part.text)
        elif isinstance(part, ToolInput):
            self._join()
            called = {"toolCallId": part.id, "state": "input-available", "input": part.input}
            self._parts.append({"type": f"tool-{part.name}", **called})
        elif isinstance(part, ToolOutput):
            # A model may number its calls anew in each step, so that an id comes again.
            calls = [each for each in self._parts if each.get("toolCallId") == part.id and "output" not in each]
            if not calls:
                raise ValueError("A ToolOutput needs a ToolInput of the same id before it, one for each output.")
            calls[-1].update(state="output-available", output=part.output)
        else:
            self.error = part.text

    def _join(self) -> None:
        if self._pieces:
            self._parts[-1]["text"] += "".join(self._pieces)
            self._pieces.clear()

    def message(self) -> Message:
        """Return the message as it is stored."""
        self._join()
        text = "\n\n".join(each["text"] for each in self._parts if each["type"] == "text")
        message: Message = {"id": self.id, "role": "assistant", "content": text}
        if any(each["type"] != "text" for each in self._parts):
            message["parts"] = [dict(each) for each in self._parts]
        if self.error is not None:
            message["error"] = self.error
        return message


def events_of(message: Message) -> Iterator[Event]:
    """Yield the events that tell a stored message: fewer and longer ones than its turn has emitted.

    Another program may have stored it. Then the parts of other kinds are left out.
    """
    content = message.get("content")
    parts = message.get("parts") or (content if isinstance(content, list) else [{"type": "text", "text": content}])
    for part in parts if isinstance(parts, list) else []:
        match part:
            case {"type": "text" | "reasoning" as kind, "text": str(text)}:
                yield {"type": kind, "text": text}
            case {"type": str(kind), "toolCallId": str(call), "input": value} if kind.startswith("tool-"):
                yield ToolInput(call, kind.removeprefix("tool-"), value).event()
                if "output" in part:
                    yield ToolOutput(call, part["output"]).event()
    if message.get("error"):
        yield Error(str(message["error"])).event()
