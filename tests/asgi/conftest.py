"""Fixtures of the tests of the chat server: servers in a thread of this process, and servers as processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def client_of(directory: Path) -> Iterator[Callable[..., Any]]:
    """Provide a function that serves the test's directory in this process, and returns a client of that server."""
    from harness.chat_servers import client_of_app
    from harness.scripted import scripted

    from persist.asgi import create_app

    with ExitStack() as open_clients:

        def make(responder: Any = scripted, *, store: Any = directory, **options: Any) -> Any:
            return open_clients.enter_context(client_of_app(create_app(store, responder, **options)))

        yield make


@pytest.fixture
def client(client_of: Callable[..., Any]) -> Any:
    return client_of()


@pytest.fixture
def serve(directory: Path) -> Iterator[Callable[..., Any]]:
    """Provide a function that starts another server on the test's directory, as processes."""
    from harness.chat_servers import ChatServer

    servers: list[ChatServer] = []

    def start(*options: str, **more: Any) -> ChatServer:
        servers.append(ChatServer(directory, *options, **more))
        return servers[-1]

    yield start
    for each in servers:
        each.close()
