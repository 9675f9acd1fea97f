"""Fixtures of the tests of the chat server: servers in a thread of this process, and servers as processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import persist


@pytest.fixture
def place(directory: Path, request: pytest.FixtureRequest) -> Path | str:
    """Return where the servers of a test keep their sessions: in files, or with the parameter "postgres" there."""
    if getattr(request, "param", "files") == "files":
        return directory
    return f"{request.getfixturevalue('postgres_url')}?schema={request.getfixturevalue('postgres_schema')}"


@pytest.fixture
def store(place: Path | str) -> persist.Store:
    return persist.Store(place, timeout_s=20.0)


@pytest.fixture
def client_of(place: Path | str) -> Iterator[Callable[..., Any]]:
    """Provide a function that serves the test's store in this process, and returns a client of that server."""
    from harness.chat_servers import client_of_app
    from harness.scripted import scripted

    from persist.asgi import create_app

    with ExitStack() as open_clients:

        def make(responder: Any = scripted, *, store: Any = place, **options: Any) -> Any:
            return open_clients.enter_context(client_of_app(create_app(store, responder, **options)))

        yield make


@pytest.fixture
def client(client_of: Callable[..., Any]) -> Any:
    return client_of()


@pytest.fixture
def serve(place: Path | str) -> Iterator[Callable[..., Any]]:
    """Provide a function that starts another server on the test's store, as processes."""
    from harness.chat_servers import ChatServer

    servers: list[ChatServer] = []

    def start(*options: str, **more: Any) -> ChatServer:
        servers.append(ChatServer(place, *options, **more))
        return servers[-1]

    yield start
    for each in servers:
        each.close()
