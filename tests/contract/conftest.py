"""Stores on each engine, for the promises that hold on all of them.

One PostgreSQL server serves all workers of a run, and each worker has a database of its own. Each test has a schema.
A selection of the tests also goes through pgbouncer.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import pgbouncer, servers
from harness.chats import HELLO
from harness.postgres import Server, can_run

import persist
from persist.pytest_plugin import shared_fixture

MakeStore = Callable[..., persist.Store]


#: The modules whose tests go through pgbouncer, too: those whose verbs need several statements, or wait.
BOUNCED = ("test_create_and_delete", "test_extend", "test_lists", "test_once", "test_stream_transaction", "test_update")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of other modules out that would go through pgbouncer."""
    items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("make_store") == "pgbouncer" and item.path.stem not in BOUNCED


def stop_server(running: dict[str, Any]) -> None:
    """Stop the server, in whichever process ends last."""
    Server(running["directory"], running["port"]).remove()


@shared_fixture(teardown=stop_server)
def postgres_server() -> dict[str, Any]:
    """Start one real server for all workers of the run."""
    server = Server()
    server.start()
    return {"directory": str(server.directory), "port": server.port}


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a database for this worker."""
    pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
    if not can_run():
        servers.missing("PostgreSQL")
    import psycopg

    running = request.getfixturevalue("postgres_server")
    server, name = Server(running["directory"], running["port"]), f"worker_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url_of(name)


@pytest.fixture(scope="session")
def bouncer_url(postgres_url: str) -> Iterator[str]:
    """Return the URL of this worker's database behind a pgbouncer in transaction mode."""
    if pgbouncer.program() is None:
        servers.missing("pgbouncer")
    host, _, rest = postgres_url.rpartition(":")
    port, _, name = rest.partition("/")
    with pgbouncer.bouncing(int(port)) as bouncer:
        yield f"{host}:{bouncer}/{name}"


@pytest.fixture(params=["never", "always", "postgres", "pgbouncer"])
def make_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    """Return a function that opens a store: the same one at each call, with other options."""
    if request.param in ("postgres", "pgbouncer"):
        name = "postgres_url" if request.param == "postgres" else "bouncer_url"
        url, schema = request.getfixturevalue(name), f"s_{uuid.uuid4().hex[:12]}"
        at, always = url, {"schema": schema}
    else:
        at, always = str(tmp_path / "sessions"), {"journal": request.param}

    def make(**options: Any) -> persist.Store:
        return persist.Store(at, **{"timeout_s": 20.0, **always, **options})

    yield make
    if request.param in ("postgres", "pgbouncer"):
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@pytest.fixture
def store(make_store: MakeStore) -> persist.Store:
    return make_store()


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s", {"title": "New chat", "messages": [HELLO]})


@pytest.fixture
def files(store: persist.Store) -> Path:
    """Return the directory of a store of files. A test that looks there is for this engine only."""
    if not Path(store.path).is_dir():
        pytest.skip("this engine has no files")
    return store.path
