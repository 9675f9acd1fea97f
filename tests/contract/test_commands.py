"""The commands take a store's URL in the place of its directory, and do the same on every engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cli.conftest import Run, json_of, runner_of
from contract.conftest import MakeStore
from harness.chats import HELLO

import persist
from persist.cli.commands import persist as command

PASSWORD = "s3cret-word"
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def name_of(store: persist.Store) -> str:
    """Return the name of a store as a command takes it. The server trusts everybody, whatever the password is."""
    if Path(store._at).is_dir():
        return str(store._at)
    return f"{store._at.replace('postgres@', f'postgres:{PASSWORD}@')}?schema={store._options['schema']}"


@pytest.fixture
def run() -> Run:
    """Return a function that runs `persist`, and sees to it that no output holds the password."""
    inner = runner_of(command)

    def checked(*arguments: object, **environment: str) -> object:
        result = inner(*arguments, **environment)
        assert PASSWORD not in result.output
        return result

    return checked  # type: ignore[return-value]


def test_looks_tell_the_same_on_every_engine(store: persist.Store, run: Run) -> None:
    """`ls`, `ls --recent`, `show`, `streams` and `check` take a URL."""
    store.create("s-1", {"title": "First", "messages": [HELLO]})
    store.create("s-2", {"title": "Second", "messages": []})
    stream = store.start_stream("s-2", {"role": "user", "content": "Why?"})
    name = name_of(store)
    shown = [(each["id"], each["title"], each["stream"]) for each in json_of(run("ls", name, "--json"))]
    assert shown == [("s-1", "First", "none"), ("s-2", "Second", "live")]
    assert [each["id"] for each in json_of(run("ls", name, "--recent", "--limit", 1, "--json"))] == ["s-2"]
    assert json_of(run("show", name, "s-1", "--json"))["data"] == store.load("s-1").data
    assert [each["stream_id"] for each in json_of(run("streams", name, "--json"))] == [stream.id]
    assert run("check", name).stdout == "2 sessions: no problem found.\n"
    stream.finish()


def test_check_and_the_mending_commands_find_what_a_dead_process_left(
    store: persist.Store, make_store: MakeStore, run: Run
) -> None:
    """A stream of a killed process is stale, and `clear-stale` clears it. Its tool call is answered by `repair`.

    The command of the advice can be pasted.
    """
    options = {key: value for key, value in store._options.items() if key in ("schema", "journal")}
    code = f"""
import os, persist
store = persist.Store({store._at!r}, lease_s=1.0, **{options!r})
stream = store.start_stream("s", {{"role": "user", "content": "When?"}}, create=True)
stream.append({{"id": "m2", "role": "assistant", "tool_calls": [{CALL!r}]}})
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    name = name_of(store)
    wait_until_dead(store, "s")
    [problem] = json_of(run("check", name, "--json"))["problems"]
    assert problem["kind"] == "stale"
    advice = re.search("'persist (clear-stale .*)'", problem["message"])
    assert advice is not None
    assert [each["session_id"] for each in json_of(run(*shlex.split(advice[1]), "--json"))["cleared"]] == ["s"]
    assert [each["kind"] for each in json_of(run("check", name, "--json"))["problems"]] == ["unanswered-tools"]
    assert json_of(run("repair", name, "s", "--json")) == {"id": "s", "answered": 1}
    result = run("check", name)
    assert (result.exit_code, result.stdout) == (0, "1 sessions: no problem found.\n")


def wait_until_dead(store: persist.Store, session_id: str) -> None:
    waiting = threading.Event()
    for _ in range(400):
        info = store.stream(session_id)
        assert info is not None
        if not info.is_live:
            return
        waiting.wait(0.05)
    raise AssertionError("the stream of a dead process lives")


def test_changing_commands_take_a_url(store: persist.Store, run: Run, tmp_path: Path) -> None:
    """`accept`, `compact`, `replace` and `delete` work on every engine, or say that there is nothing to do."""
    store.create("s", {"title": "First", "messages": [HELLO]})
    name, version = name_of(store), store.head("s").version
    (tmp_path / "new.json").write_text(json.dumps({"title": "Second", "messages": []}))
    assert "there was nothing to accept" in run("accept", name, "s").stdout
    assert run("compact", name, "s").exit_code == 0
    refused = run("replace", name, "s", tmp_path / "new.json")
    assert refused.exit_code == 3
    assert "--if-version" in refused.stderr
    assert run("replace", name, "s", tmp_path / "new.json", "--if-version", version).exit_code == 0
    assert store.load("s").data == {"title": "Second", "messages": []}
    assert run("delete", name, "s").exit_code == 0
    assert store.ids() == []
    result = run("show", name, "s")
    assert result.exit_code == 3
    assert "No session 's'" in result.stderr


def test_damage_in_a_database_is_told_by_check(store: persist.Store, postgres_only: str, run: Run) -> None:
    """`check` reads every session whole, and names the one that a hand has spoilt."""
    import psycopg

    for session_id in ("good", "spoilt"):
        store.create(session_id, {"messages": [HELLO]})
    schema = store._options["schema"]
    with psycopg.connect(postgres_only, autocommit=True) as connection:
        connection.execute(
            f"UPDATE {schema}.items SET item = 'no json' FROM {schema}.sessions"
            " WHERE number = session AND id = 'spoilt'"
        )
    result = run("check", name_of(store), "--json")
    assert result.exit_code == 1
    assert [(each["session_id"], each["kind"]) for each in json_of(result)["problems"]] == [("spoilt", "corrupt")]


@pytest.fixture
def postgres_only(store: persist.Store, request: pytest.FixtureRequest) -> str:
    """Return the URL of the database. The test is for this engine only."""
    if Path(store._at).is_dir():
        pytest.skip("this engine has files")
    return str(request.getfixturevalue("postgres_url"))


def test_backup_of_a_database_is_refused_with_the_way_to_make_one(
    store: persist.Store, postgres_only: str, run: Run, tmp_path: Path
) -> None:
    """`backup` names pg_dump, for the library with a typed error, and makes nothing."""
    result = run("backup", name_of(store), tmp_path / "copy")
    assert result.exit_code == 3
    assert "pg_dump" in result.stderr
    with pytest.raises(persist.InvalidArgument, match="pg_dump"):
        store.backup(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_backup_into_a_url_is_refused(files: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup is a directory. No directory of the name ``postgresql:`` is made."""
    monkeypatch.chdir(tmp_path)
    result = run("backup", files, f"postgresql://ann:{PASSWORD}@db/chats")
    assert result.exit_code == 3
    assert "persist copy" in result.stderr
    assert not list(tmp_path.glob("postgresql*"))


# --- URLs ---


def test_schema_in_the_url_is_the_option(store: persist.Store, postgres_only: str) -> None:
    """``?schema=`` and ``Store(schema=…)`` name the same thing. Two different names are refused."""
    schema = store._options["schema"]
    store.create("s")
    for url in (f"{postgres_only}?schema={schema}", f"{postgres_only}?schema={schema}&connect_timeout=3"):
        assert persist.Store(url, create=False).ids() == ["s"]
        assert persist.Store(url, create=False, schema=schema).ids() == ["s"]
    with pytest.raises(persist.InvalidArgument, match="as in the URL"):
        persist.Store(f"{postgres_only}?schema={schema}", schema="another")
    for wrong in ("", "x" * 64, "a\0b", "7th", 'a"b', "a'b", "a b", "a%(id)sb", "schöma"):
        with pytest.raises(persist.InvalidArgument, match="1 to 63 ASCII letters"):
            persist.Store(postgres_only, schema=wrong)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{PASSWORD}%zz@db/chats",
        f"postgresql://ann:{PASSWORD}/x@db/chats",
        f"postgresql://ann:x@{PASSWORD}@db/chats",
        f"postgresql://ann:{PASSWORD}@db/chats?nonsense=1",
    ],
)
def test_malformed_url_is_a_typed_error_without_the_password(run: Run, url: str) -> None:
    """The message of libpq is left out, because it would show a part of the password."""
    pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
    with pytest.raises(persist.InvalidArgument, match="malformed") as caught:
        persist.Store(url)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None
    result = run("ls", url)
    assert result.exit_code == 3
    assert "malformed" in result.stderr


@pytest.mark.parametrize(
    "words",
    [("ls", "{url}", "{url}"), ("{url}",), ("show", "{url}"), ("ls", "{url}", "--limit", "{url}")],
    ids=["one too many", "no command", "no id", "no number"],
)
def test_usage_error_shows_no_password(run: Run, postgres_url: str, words: tuple[str, ...]) -> None:
    """A URL in the wrong place is shown without its password."""
    url = postgres_url.replace("postgres@", f"postgres:{PASSWORD}@")
    result = run(*(word.format(url=url) for word in words))
    assert result.exit_code in (2, 3)


def test_server_that_does_not_answer_is_named_without_the_password(run: Run) -> None:
    """The message names host, port and database."""
    pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
    result = run("ls", f"postgresql://ann:{PASSWORD}@127.0.0.1:1/chats?connect_timeout=1")
    assert result.exit_code == 3
    assert "postgresql://ann@127.0.0.1:1/chats?schema=persist is not available" in result.stderr


def test_missing_package_is_named(tmp_path: Path) -> None:
    """Without psycopg, a URL is a typed error that says what to install."""
    code = """
import sys
sys.modules["psycopg"] = None
import persist
try:
    persist.Store("postgresql://db/chats")
except persist.PersistError as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}, timeout=60
    ).stdout
    assert "pip install '.[postgres]'" in told
