"""The code that many chat servers have: read the JSON file, change the dict, write the file.

It writes a temporary file and renames it, so that no reader ever sees half a document. That does not help against a
second writer.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

Document = dict[str, Any]


def load(path: Path) -> Document:
    """Read a conversation."""
    with path.open(encoding="utf-8") as file:
        document: Document = json.load(file)
    return document


def save(path: Path, document: Document, *, durable: bool = False) -> None:
    """Replace a conversation. `durable` waits for the disk."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(document, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class Server:
    """A server process with a registry of the streams that it runs, and the function that this project began with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: set[str] = set()
        self._lock = threading.Lock()

    def start_stream(self) -> None:
        """Begin a turn."""
        stream_id = uuid.uuid4().hex
        with self._lock:
            self.live.add(stream_id)
        document = load(self.path)
        document["active_stream_id"] = stream_id
        save(self.path, document)

    def clear_stale_stream(self) -> None:
        """Clear the stream of a server that has died.

        The look and the write are two steps. A stream that starts between them is cleared, although it lives.
        """
        document = load(self.path)
        with self._lock:
            is_live = document["active_stream_id"] in self.live
        if not is_live:
            document["active_stream_id"] = None
            save(self.path, document)
