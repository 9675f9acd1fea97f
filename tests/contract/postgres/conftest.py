"""Stores on PostgreSQL, and a relay to its server, for what only this engine has to prove."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness.cutting import Relay, relaying

import persist

#: Open a store through the relay.
Through = Callable[..., persist.Store]


@pytest.fixture
def schema() -> str:
    """Return the name of a schema that is not there yet. It goes with the database of the worker."""
    return f"s_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def store(postgres_url: str, schema: str) -> persist.Store:
    return persist.Store(postgres_url, schema=schema, timeout_s=20.0)


@pytest.fixture
def relay(postgres_url: str) -> Iterator[Relay]:
    with relaying(int(postgres_url.rsplit(":", 1)[1].split("/", maxsplit=1)[0])) as found:
        yield found


@pytest.fixture
def through(relay: Relay, postgres_url: str, schema: str) -> Through:
    """Return a function that opens a store whose connections go through the relay."""
    host, _, rest = postgres_url.rpartition(":")

    def make(**options: Any) -> persist.Store:
        return persist.Store(f"{host}:{relay.port}/{rest.split('/')[1]}", schema=schema, **options)

    return make


@pytest.fixture
def cut(store: persist.Store, through: Through) -> persist.Store:
    """Return a store behind the relay. It shares its sessions with `store`."""
    store.create("s", {"n": 0, "messages": [{"id": "m0"}]})
    return through(timeout_s=5.0)


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """End the processes of a test."""
    # Not at the top, because a module skips without the extra, and a conftest cannot.
    from harness.remote import end_all

    yield
    end_all()
