"""A short chat, which the tests of the verbs begin with."""

from __future__ import annotations

from typing import Any

import persist

HELLO = {"id": "m1", "role": "user", "content": "hello"}
PROMPT = {"id": "p", "role": "user", "content": "Why?"}
ANSWER = {"id": "a", "role": "assistant", "content": "Because."}


def ids_of(store: persist.Store, session_id: str = "s") -> list[Any]:
    """Return the ids of the messages of a session."""
    return [message.get("id") for message in store.load(session_id).data["messages"]]
