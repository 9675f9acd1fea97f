"""Fixtures of all tests: a directory for sessions, a store on it, and actors on the same directory.

An actor is another process.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actors import Actor
from harness import servers
from harness.faults import quick_directory

import persist

ActorFactory = Callable[..., Actor]

# A shell that starts the tests in the background makes them ignore Ctrl-C. All processes that the tests start inherit
# that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end how to run the tests that were skipped because a program is missing."""
    for line in servers.told(str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield a directory in memory where there is one.

    It is for tests of order, and for tests of what survives in a model. They do not test the disk.
    """
    with quick_directory() as directory:
        yield directory


@pytest.fixture
def store(directory: Path) -> persist.Store:
    return persist.Store(directory, timeout_s=20.0)


@pytest.fixture(params=[None, 1e-6], ids=["as-always", "switching-all-the-time"])
def switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with threads twice: as always, and with the interpreter switching between them as often as it can.

    The actors that the test starts do so, too.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param or before)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def actor(directory: Path) -> Iterator[ActorFactory]:
    """Provide a function that starts another server process on the same directory.

    All of these processes are gone after the test.
    """
    actors: list[Actor] = []

    def start(**options: Any) -> Actor:
        actors.append(Actor(directory, **options))
        return actors[-1]

    yield start
    for each in actors:
        each.close()
