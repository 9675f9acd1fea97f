"""Stores on each engine, for the promises that hold on all of them.

Each test has a schema of its own on PostgreSQL. A selection of the tests also goes through pgbouncer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actors import Actor, eventually
from conftest import ActorFactory
from harness import pgbouncer, servers
from harness.chats import HELLO

import persist

MakeStore = Callable[..., persist.Store]
#: How long a process is taken for alive after its last heartbeat. Tests with a kill wait for it on PostgreSQL.
LEASE_S = 2.0
#: The modules whose tests go through pgbouncer, too: those whose verbs need several statements, or wait.
BOUNCED = ("test_create_and_delete", "test_extend", "test_lists", "test_once", "test_stream_transaction", "test_update")
#: The kinds of stores that are in a database, with the fixtures of their URLs.
DATABASES = {"postgres": "postgres_url", "pgbouncer": "bouncer_url"}


@pytest.fixture(scope="session")
def bouncer_url(postgres_url: str) -> Iterator[str]:
    """Return the URL of this worker's database behind a pgbouncer in transaction mode."""
    if pgbouncer.program() is None:
        servers.missing("pgbouncer")
    host, _, rest = postgres_url.rpartition(":")
    port, _, name = rest.partition("/")
    with pgbouncer.bouncing(int(port)) as bouncer:
        yield f"{host}:{bouncer}/{name}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test on PostgreSQL, and on files with the journal's modes that its module names."""
    if "kind" in metafunc.fixturenames:
        kinds = getattr(metafunc.module, "KINDS", ("never", "always", "postgres"))
        is_bounced = metafunc.module.__name__.rpartition(".")[2] in BOUNCED
        metafunc.parametrize("kind", (*kinds, "pgbouncer") if is_bounced else kinds)


@pytest.fixture
def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Return where the test's store is, and the options by which any process opens it."""
    if kind not in DATABASES:
        return str(tmp_path / "sessions"), {"journal": kind}
    schema = request.getfixturevalue("postgres_schema")
    return request.getfixturevalue(DATABASES[kind]), {"schema": schema, "lease_s": LEASE_S}


@pytest.fixture
def make_store(place: tuple[str, dict[str, Any]]) -> MakeStore:
    """Return a function that opens a store: the same one at each call, with other options."""
    at, always = place

    def make(**options: Any) -> persist.Store:
        return persist.Store(at, **{"timeout_s": 20.0, **always, **options})

    return make


@pytest.fixture
def store(make_store: MakeStore) -> persist.Store:
    return make_store()


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s", {"title": "New chat", "messages": [HELLO]})


@pytest.fixture
def actor(place: tuple[str, dict[str, Any]]) -> Iterator[ActorFactory]:
    """Provide a function that starts another server process on the same sessions."""
    actors: list[Actor] = []
    at, always = place

    def start(**options: Any) -> Actor:
        actors.append(Actor(at, **{**always, **options}))
        return actors[-1]

    yield start
    for each in actors:
        each.close()


def is_owned_by(pid: int, stream: persist.StreamInfo) -> bool:
    return stream.owner is not None and stream.owner.pid == pid


@pytest.fixture
def kill(store: persist.Store, kind: str) -> Callable[[Actor], None]:
    """Return a function that kills an actor, and returns when others know of it: with files, at once."""

    def kill(actor: Actor) -> None:
        pid = actor.pid
        actor.kill()
        if kind in DATABASES:
            eventually(
                lambda: all(each.owner is None or each.owner.pid != pid or not each.is_live for each in store.streams())
            )

    return kill


@pytest.fixture
def files(store: persist.Store) -> Path:
    """Return the directory of a store of files. A test that looks there is for this engine only."""
    if not Path(store.place).is_dir():
        pytest.skip("this engine has no files")
    return store.path
