"""Other processes on the sessions of a PostgreSQL server, and what tests look at inside the engine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psycopg

import persist
from persist.postgres.engine import PostgresEngine

_started: list[subprocess.Popen[str]] = []


def engine_of(store: persist.Store) -> PostgresEngine:
    """Return the engine of a store on PostgreSQL."""
    engine = store._backend.engine
    assert isinstance(engine, PostgresEngine)
    return engine


def run(code: str, url: str, schema: str, **options: Any) -> subprocess.Popen[str]:
    """Start another process on the same sessions. Its code has `store`."""
    opening = f"import persist, sys, time\nstore = persist.Store({url!r}, schema={schema!r}, **{options!r})\n"
    # -P: the package of the test, wherever it runs.
    command = [sys.executable, "-P", "-c", opening + code]
    _started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    return _started[-1]


def end_all() -> None:
    """Kill the processes that were started."""
    while _started:
        with _started.pop() as each:
            each.kill()


def end_connections(url: str) -> None:
    """Let the server end all other connections to a database."""
    with psycopg.connect(url, autocommit=True) as connection:
        others = "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity {others}")


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process has printed."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    """Let a process go on that waits for a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
