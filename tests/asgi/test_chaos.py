"""The short form of `scripts/chaos`: workers are killed under load, and the clients keep what they were promised."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

from harness.chaos import chaos

#: The run goes on until so much has happened.
LEAST = {"killed": 4, "finished": 20, "reconnected": 20}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")


@pytest.mark.parametrize(("seconds", "is_gunicorn"), [(30.0, False), (8.0, True)], ids=["uvicorn", "gunicorn"])
def test_killed_workers_break_no_promise(scratch: Path, seconds: float, is_gunicorn: bool) -> None:
    """No message is lost or doubled, no stream has a gap, no session stays busy, and no descriptor is left open.

    Caches still fill up in this short time, so the bound of the memory is a wide one.
    """
    if is_gunicorn:
        pytest.importorskip("gunicorn", reason="gunicorn is not installed")
        pytest.importorskip("uvicorn_worker", reason="uvicorn-worker is not installed")
    outcome = asyncio.run(
        chaos(scratch / "s", seconds=seconds, clients=24, is_gunicorn=is_gunicorn, least=LEAST, most_rss=1.5)
    )
    assert outcome.faults == []
