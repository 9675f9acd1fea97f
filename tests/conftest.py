"""Fixtures of all tests: a directory for sessions, a store on it, and actors on the same directory.

An actor is another process. One PostgreSQL server serves all workers of a run, and each worker has a database of its
own.
"""

from __future__ import annotations

import gc
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actors import Actor
from harness import servers
from harness.faults import quick_directory
from harness.postgres import Server, can_run

import persist
from persist.pytest_plugin import shared_fixture

ActorFactory = Callable[..., Actor]

# A shell that starts the tests in the background makes them ignore Ctrl-C. All processes that the tests start inherit
# that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep the collector from walking the modules and the tests again and again, because they stay to the end."""
    gc.collect()
    gc.freeze()


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


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def stop_server(running: dict[str, Any]) -> None:
    """Stop the server, in whichever process ends last."""
    Server(running["directory"], running["port"]).remove()


@shared_fixture(teardown=stop_server)
def postgres_server() -> dict[str, Any]:
    """Start one real server for all workers of the run. No test cuts its power."""
    server = Server(fsync=False)
    server.start()
    return {"directory": str(server.directory), "port": server.port}


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a database for this worker.

    A test has a schema of its own in it (`postgres_schema`). Those that play the pages have the default one.
    """
    pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
    if not can_run():
        servers.missing("PostgreSQL")
    import psycopg

    running = request.getfixturevalue("postgres_server")
    server, name = Server(running["directory"], running["port"]), f"worker_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url_of(name)


@pytest.fixture
def postgres_schema(postgres_url: str) -> Iterator[str]:
    """Return the name of a schema that is not there yet, and is gone after the test."""
    import psycopg

    schema = f"s_{uuid.uuid4().hex[:12]}"
    yield schema
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
