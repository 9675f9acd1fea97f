"""Real graphs on `PersistSaver`: what a user sees is what LangGraph's own saver in memory shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph.checkpoint.memory", reason="needs langgraph")

from harness.adapters.graphs import SCENARIOS, Durability, Scenario
from langgraph.checkpoint.memory import InMemorySaver

from persist.adapters.langgraph import PersistSaver


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "awaited"])
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_graph_shows_what_it_shows_in_memory(
    scratch: Path, scenario: Scenario, durability: Durability, is_async: bool
) -> None:
    """States, histories, interrupts and the checkpoints of subgraphs are the same. No run is refused."""
    wanted: Any = scenario(InMemorySaver(), durability, is_async)
    assert scenario(PersistSaver(scratch), durability, is_async) == wanted
