"""The schema of a store in a database: it is made once, brought up to date, and refused if it is too new or too old."""

from __future__ import annotations

import pickle
import subprocess
import sys
import urllib.parse
import uuid

import pytest
from cli.conftest import Run, json_of, runner_of
from harness.pages import ROOT, blocks_of

import persist
from persist import engines
from persist.cli.commands import persist as command

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg


@pytest.fixture
def run() -> Run:
    return runner_of(command)


@pytest.fixture
def url(postgres_url: str) -> str:
    """Return the URL of a schema that is not there."""
    return f"{postgres_url}?schema=s_{uuid.uuid4().hex[:12]}"


def execute(url: str, statement: str) -> None:
    """Run a statement. {schema} stands for the schema of the URL."""
    database, schema = url.split("?schema=")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement.replace("{schema}", schema).encode())


def test_migrate_makes_the_schema_once_and_says_so(run: Run, url: str) -> None:
    """The first run makes the schema, and the second one finds nothing to do."""
    first, second = json_of(run("migrate", url, "--json")), json_of(run("migrate", url, "--json"))
    assert first["ran"][0] == "0001_sessions"
    assert second["ran"] == []
    assert first["version"] == second["version"] == len(first["ran"])
    assert "there was nothing to do" in run("migrate", url).stdout
    persist.Store(url, create=False).create("s")


@pytest.mark.parametrize("level", [r"read\ committed", "serializable"])
def test_many_workers_migrate_at_once(url: str, level: str) -> None:
    """Every migration is run by one of them, and all end well, whatever level the role prefers.

    Without the advisory lock, some fail.
    """
    url += "&options=" + urllib.parse.quote(f"-c default_transaction_isolation={level}")
    code = """
import sys
import persist.postgres.engine
from persist import engines
print("ready", flush=True)
sys.stdin.readline()
print(len(engines.migrate(sys.argv[1]).ran), flush=True)
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for each in workers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in workers:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    counts = [int(each.communicate(timeout=60)[0]) for each in workers]
    assert [each.returncode for each in workers] == [0] * 6
    assert sorted(counts) == [0] * 5 + [engines.migrate(url).version]


def test_store_that_must_not_make_the_schema_says_how_to(run: Run, url: str) -> None:
    """With `create=False`, a missing schema is refused. A command makes none, either."""
    with pytest.raises(persist.InvalidArgument, match=r"is missing; it must be at version \d+: run 'persist migrate"):
        persist.Store(url, create=False)
    result = run("ls", url)
    assert result.exit_code == 3
    assert "persist migrate" in result.stderr
    assert len(engines.migrate(url).ran) > 0


def test_too_old_schema_is_refused_or_brought_up_to_date(url: str) -> None:
    """A schema without the last migration is too old for `create=False`. An ordinary store runs what is missing."""
    execute(url, "CREATE SCHEMA {schema}")
    execute(url, "CREATE TABLE {schema}.migrations (version integer PRIMARY KEY, at timestamptz DEFAULT now())")
    with pytest.raises(persist.InvalidArgument, match="persist migrate"):
        persist.Store(url, create=False)
    persist.Store(url).create("s")
    assert persist.Store(url, create=False).ids() == ["s"]


@pytest.mark.parametrize("create", [True, False])
def test_too_new_schema_is_an_unsupported_format(run: Run, url: str, create: bool) -> None:
    """A schema of a newer persist is left alone by stores and by `migrate`."""
    engines.migrate(url)
    execute(url, "INSERT INTO {schema}.migrations VALUES (999)")
    with pytest.raises(persist.UnsupportedFormat, match="has format 999") as caught:
        persist.Store(url, create=create)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert str(again).startswith("postgresql://")
    result = run("migrate", url)
    assert result.exit_code == 3
    assert "has format 999" in result.stderr


def test_user_without_the_right_to_make_a_schema_migrates_one_that_is_there(url: str) -> None:
    """A schema that an administrator has made for the user is enough."""
    user = f"u_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE ROLE {user} LOGIN")
    execute(url, f"CREATE SCHEMA {{schema}} AUTHORIZATION {user}")
    own = url.replace("postgres@", f"{user}@")
    assert len(engines.migrate(own).ran) > 0
    persist.Store(own).create("s")
    execute(url, f"REVOKE CREATE ON SCHEMA {{schema}} FROM {user}")
    assert persist.Store(own).ids() == ["s"]


def test_rights_of_the_guide_are_enough_for_a_role_that_only_uses_the_tables(url: str) -> None:
    """With the statements of docs/guides/postgres.md a role opens the store and runs every kind of statement.

    It needs no right to make anything. Without the line of the sequences, a create is refused. Without the last two
    lines, so is a table of a later migration.
    """
    [rights] = [block.code for block in blocks_of(ROOT / "docs/guides/postgres.md") if block.kind == "sql"]
    role = f"u_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE ROLE {role} LOGIN")
    engines.migrate(url)
    execute(url, rights.replace("SCHEMA persist", "SCHEMA {schema}").replace("TO chat", f"TO {role}"))
    own = url.replace("postgres@", f"{role}@")
    store = persist.Store(own)
    with store.start_stream("s", {"role": "user", "content": "Why?"}, create=True) as stream:
        stream.emit(1, durable=True)
        stream.checkpoint({"role": "assistant", "content": "Be"})
        stream.finish({"role": "assistant", "content": "Because."}, fields={"text": "x" * 5000})
    assert [event.data for event in store.events("s", stream.id)] == [1]
    store.update("s", lambda tx: (tx.list("messages").pop(0), tx.fields.pop("text")))
    assert [each["content"] for each in persist.Store(own, create=False).tail("s")] == ["Because."]
    assert store.clear_stale_streams().failures == {}
    store.delete("s")
    execute(url, "CREATE TABLE {schema}.later (number bigserial, x int)")
    execute(own, "INSERT INTO {schema}.later (x) VALUES (1)")


def test_user_without_the_right_to_make_a_schema_is_told_who_has_it(url: str) -> None:
    """The error names the command that the owner of the database runs."""
    user = f"u_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE ROLE {user} LOGIN")
    with pytest.raises(persist.Unreadable, match=r"permission denied .* owner .* 'persist migrate URL'"):
        persist.Store(url.replace("postgres@", f"{user}@"))


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_database_of_another_encoding_is_refused(run: Run, url: str, encoding: str) -> None:
    """Such a database cannot keep every text. Stores and `migrate` write nothing there."""
    name = f"worker_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    other = f"{url.rpartition('/')[0]}/{name}?schema=chats"
    for create in (True, False):
        with pytest.raises(persist.InvalidArgument, match=f"is {encoding}; it must be UTF8"):
            persist.Store(other, create=create)
    assert run("migrate", other).exit_code == 3
    with psycopg.connect(other.partition("?")[0]) as connection:
        assert connection.execute("SELECT FROM pg_namespace WHERE nspname = 'chats'").fetchall() == []


def test_directory_needs_no_migration(run: Run) -> None:
    """`migrate` of a directory is refused."""
    result = run("migrate", "var/sessions")
    assert result.exit_code == 3
    assert "A directory needs no migration" in result.stderr
