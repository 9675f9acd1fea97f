"""Turns of an actor on the session "s-1", and what is left of them: the messages, and the events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import persist

#: Start a stream, and return its id.
START = "stream = store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}); stream.id"
#: Follow to the end, and return the events and how the stream ended.
FOLLOW = "following = store.follow('s-1', {!r}); [(event.offset, event.data) for event in following], following.ended"


def contents(store: persist.Store) -> list[tuple[str, bool]]:
    """Return the text of each message, and whether its turn was interrupted."""
    return [(m["content"], m.get("interrupted", False)) for m in store.load("s-1").data["messages"]]


def written(store: persist.Store, stream_id: str) -> list[Any]:
    """Return the events of a stream, and check their offsets."""
    found = store.events("s-1", stream_id)
    assert [event.offset for event in found] == list(range(1, len(found) + 1))
    return [event.data for event in found]


def numbered(data: list[Any]) -> list[tuple[int, Any]]:
    """Return events with their offsets."""
    return list(enumerate(data, 1))


def event_files(store: persist.Store) -> list[Path]:
    """Return the files of all events. A database has none."""
    directory = Path(store.place) / ".events"
    return sorted(directory.iterdir()) if directory.is_dir() else []
