"""Stores with a journal for each session, and stores without journals. Each store has a short chat."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.chats import HELLO

import persist


@pytest.fixture(params=["never", "always"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> persist.Store:
    return persist.Store(tmp_path / "sessions", journal=request.param, timeout_s=20.0)


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s", {"title": "New chat", "messages": [HELLO]})
