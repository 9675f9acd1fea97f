"""The workload: conversations of messages of about 430 bytes, and stores of persist to write them to."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import persist
from persist.storage.commit import Mode

Message = dict[str, Any]

#: The name of the session that is measured. It is the same wherever one is needed.
SESSION = "s"

_TEXT = "A commit costs what it changes, not what the session or its neighbours weigh. " * 5
_numbers = itertools.count()


def message(number: int) -> Message:
    """Return one message of a conversation."""
    return {"id": f"m{number}", "role": ("user", "assistant")[number % 2], "content": f"{number}: {_TEXT[:370]}"}


def conversation(messages: int) -> dict[str, Any]:
    """Return a session's data."""
    return {"title": "New chat", "draft": 0, "messages": [message(number) for number in range(messages)]}


def new_message() -> Message:
    """Return a message that no conversation has yet."""
    number = next(_numbers)
    return message(number) | {"id": f"new-{number}"}


def open_store(path: Path, journal: Mode = "auto") -> persist.Store:
    """Return a store whose waits are long enough for any crowd."""
    return persist.Store(path, timeout_s=60.0, journal=journal)
