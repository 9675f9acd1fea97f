"""The adapter where the Claude Agent SDK is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ActorFactory

import persist

PREPARE = """
import asyncio, sys
sys.modules["claude_agent_sdk"] = None
from persist.adapters.claude_agent_sdk import PersistSessionStore
adapter = PersistSessionStore(store)
main = {"project_key": "p", "session_id": "s"}
"""


def test_it_needs_the_sdk_only_for_a_main_transcript(actor: ActorFactory, directory: Path) -> None:
    """It imports and reads without the SDK. An append to a main transcript names the package, and writes nothing."""
    process = actor()
    process.do(PREPARE)
    process.do("asyncio.run(adapter.append({**main, 'subpath': 'a'}, [{'type': 'x'}]))")
    with pytest.raises(ImportError, match="pip install 'claude-agent-sdk"):
        process.do("asyncio.run(adapter.append(main, [{'type': 'x'}]))")
    assert process.do("asyncio.run(adapter.load({**main, 'subpath': 'a'}))") == [{"type": "x"}]
    assert process.do("asyncio.run(adapter.list_sessions('p'))") == []
    assert persist.Store(directory).ids() == ["p/s/a"]
