"""What all tests share: a directory for sessions, a store on it, and actors (other processes) on the same directory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actors import Actor

import persist

ActorFactory = Callable[..., Actor]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for tests of what survives in a model, or of order, not of the disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def store(directory: Path) -> persist.Store:
    return persist.Store(directory, lock_timeout_s=20.0)


@pytest.fixture
def actor(directory: Path) -> Iterator[ActorFactory]:
    """Start another server process on the same directory; all of them are gone after the test."""
    actors: list[Actor] = []

    def start(**options: Any) -> Actor:
        actors.append(Actor(directory, **options))
        return actors[-1]

    yield start
    for each in actors:
        each.close()
