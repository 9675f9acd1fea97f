"""LangGraph's own conformance suite for checkpointers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph.checkpoint.conformance", reason="needs langgraph-checkpoint-conformance")

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate

import persist
from persist.adapters.langgraph import PersistSaver


@pytest.mark.parametrize("journal", ["auto", "always", "never"])
def test_it_has_every_capability_of_the_suite(tmp_path: Path, journal: Any) -> None:
    """All 8 capabilities are there, base and extended, and all 81 tests pass. None is skipped."""
    made: list[BaseCheckpointSaver[Any]] = []

    @checkpointer_test(name="PersistSaver")
    async def saver() -> AsyncGenerator[BaseCheckpointSaver[Any], None]:
        made.append(PersistSaver(persist.Store(tmp_path / str(len(made)), journal=journal)))
        yield made[-1]

    report = asyncio.run(validate(saver))
    assert {name: result.failures for name, result in report.results.items() if result.failures} == {}
    assert report.passed_all()
    assert len(made) == len(report.results) == 8
    assert sum(result.tests_passed for result in report.results.values()) == 81
