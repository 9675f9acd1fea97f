"""A short chat, with which the tests of the verbs begin, and a view of all files, to see that nothing was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import persist

HELLO = {"id": "m1", "role": "user", "content": "hello"}
PROMPT = {"id": "p", "role": "user", "content": "Why?"}
ANSWER = {"id": "a", "role": "assistant", "content": "Because."}


def ids_of(store: persist.Store, session_id: str = "s") -> list[Any]:
    """Return the ids of the messages of a session."""
    return [message.get("id") for message in store.load(session_id).data["messages"]]


def everything(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below a directory with its inode and bytes, to see whether anything was written.

    Locks are left out, because they hold no data.
    """
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(directory)): (path.stat().st_ino, path.read_bytes()) for path in files}
