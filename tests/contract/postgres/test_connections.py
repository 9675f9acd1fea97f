"""The connections to PostgreSQL: what they depend on, what a store keeps of them, and what it says without one."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import subprocess
import sys
import threading
import urllib.parse
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from actors import eventually
from harness.cutting import Relay

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg
from harness.remote import engine_of, go, run, said

from persist.postgres import connections
from persist.postgres.connections import Connection, Connections, Own

USER = {"role": "user", "content": "Why?"}


def connections_of(url: str, name: str) -> int:
    """Return how many connections an application has."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name]).fetchone()
        return 0 if row is None else int(row[0])


def test_closed_store_has_no_connection_and_no_row(
    postgres_url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed store keeps nothing at the server. A session that was loaded from it can still be saved.

    Without `Engine.close`, connections stay until the last object of the store is gone, and nobody can drop the
    database. A stream that runs keeps its lease.
    """
    # The pool closes what was idle for long by itself.
    monkeypatch.setattr(connections, "_IDLE_S", 3600.0)
    url = f"{postgres_url}?application_name={schema}"
    store = persist.Store(url, schema=schema)
    session = store.create("s", {"n": 0})
    stream = store.start_stream("s", USER)
    stream.emit(1, durable=True)
    store.close()
    assert stream._lease.is_held
    stream.checkpoint({"role": "assistant", "content": "Because."})
    stream.finish()
    store.close()
    eventually(lambda: connections_of(postgres_url, schema) == 0)
    with psycopg.connect(postgres_url) as other:
        assert other.execute(f"SELECT count(*) FROM {schema}.processes").fetchone() == (0,)
    session.refresh()
    session.data["n"] = 1
    session.save()
    with persist.Store(url, schema=schema) as again, again.start_stream("s", USER) as stream:
        assert again.load("s").data["n"] == 1


def test_verb_that_finds_all_connections_in_use_says_so(store: persist.Store, postgres_url: str, schema: str) -> None:
    """The error names the cause, and the look for it opens no further connection."""
    store = persist.Store(f"{postgres_url}?application_name={schema}", schema=schema, timeout_s=20.0)
    entered, leave = threading.Barrier(17), threading.Event()

    def hold(number: int) -> None:
        with store.transaction(f"s-{number}", create=True):
            entered.wait()
            leave.wait(60)

    with ThreadPoolExecutor(16) as pool:
        holding = [pool.submit(hold, number) for number in range(16)]
        entered.wait()
        with pytest.raises(persist.Unavailable, match="all 16 connections of this process are in use"):
            store.append("s", "messages", {"id": "m1"}, create=True, timeout_s=0.1)
        assert connections_of(postgres_url, schema) == 16
        leave.set()
        for each in holding:
            each.result()


def test_server_that_refuses_is_not_asked_again(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A database that is missing, as a wrong password, is told at once, by one error. The log of the pool is silent.

    Without `_is_refused`, the store would try again until its time is over, which is a day here. Without the filter,
    the pool logs each try.
    """
    url = f"{postgres_url.rpartition('/')[0]}/there_is_no_such_database"
    with pytest.raises(persist.Unavailable, match="does not exist"):
        persist.Store(url, timeout_s=86_400.0)
    assert [record for record in caplog.records if record.name == "psycopg.pool"] == []


def test_end_of_a_process_is_silent(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A process that emits, follows and ends says nothing: no connection is left to the garbage collector.

    Without the closes in `Emitter.close` and in `Own.close` at the end of the interpreter, it warns of them.
    """
    code = """
store.create('s')
with store.start_stream('s') as stream:
    stream.emit(1, 2)
    following = store.follow('s', stream.id)
    next(following)
    stream.finish()
with store.start_stream('s') as late:
    late.emit(3)
"""
    opening = f"import persist\nstore = persist.Store({postgres_url!r}, schema={schema!r})\n"
    command = [sys.executable, "-P", "-W", "error", "-X", "dev", "-c", opening + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_handler_of_a_program_may_save(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A handler that was registered before the store was opened runs behind the end of the pool, and saves yet.

    Without the look at `closed` in `Connections._here`, its verb tries the closed pool until its time is over.
    """
    store.create("s", {"messages": []})
    code = f"""
import atexit
atexit.register(lambda: store.append('s', 'messages', {{'id': 'last'}}))
import persist
store = persist.Store({postgres_url!r}, schema={schema!r}, timeout_s=5.0)
assert store.load('s').data['messages'] == []
"""
    command = [sys.executable, "-P", "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert store.tail("s") == [{"id": "last"}]


def test_system_without_a_descriptor_is_a_server_that_is_away(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads survive that. Without `OSError` in `Own.get`, the heartbeat would end, and with it all turns."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Connection, "connect", refuse)
    with pytest.raises(persist.Unavailable, match="Too many open files"):
        Own(engine_of(store).connections).get()


@pytest.mark.parametrize("style", ["German", "SQL,DMY", "Postgres,MDY"])
def test_times_do_not_depend_on_the_settings_of_the_role(
    store: persist.Store, postgres_url: str, schema: str, style: str
) -> None:
    """Times are the same under each DateStyle and time zone, written and read, and so are the pages of `recent`."""
    options = f"-c DateStyle={style} -c TimeZone=Asia/Kolkata"
    other = persist.Store(f"{postgres_url}?options={urllib.parse.quote(options)}", schema=schema)
    for name in ("a", "b", "c"):
        session = other.create(name, {"messages": []})
        assert store.head(name).updated_at == other.load(name).updated_at == session.updated_at
        assert store.head(name).created_at == other.head(name).created_at == session.created_at
    with other.start_stream("b", {"role": "user", "content": "Why?"}) as stream:
        stream.emit(1)
        stream.finish()
    assert [event.data for event in other.follow("b", stream.id)] == [1]
    first = other.recent(limit=2)
    assert [head.id for head in first] == ["b", "c"]
    assert first.cursor == store.recent(limit=2).cursor
    assert [head.id for head in other.recent(limit=2, before=first.cursor)] == ["a"]


def test_connection_of_a_thread_is_closed_with_its_owner(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage may be a cycle, in which nobody knows what goes first.

    With a `__del__` of `Own` in the place of the finaliser, the connection goes first here, with a ResourceWarning.
    """
    made = [Connection.connect(postgres_url)]
    monkeypatch.setattr(Connection, "connect", lambda *_, **__: made.pop())
    own: Any = Own(Connections(postgres_url, "s"))
    closed = weakref.ref(own.get())
    own.cycle = own
    del own
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gc.collect()
    assert closed() is None
    assert [str(each.message) for each in warned] == []


def test_program_may_have_any_file_name(store: persist.Store, postgres_url: str, schema: str, tmp_path: Path) -> None:
    """A name that is not UTF-8 is shown to the server in part."""
    program = os.fsencode(tmp_path) + b"/chat\xff.py"
    with open(program, "w") as file:
        file.write(f"import persist\nstore = persist.Store({postgres_url!r}, schema={schema!r})\n")
        file.write("store.create('s').id\nstore.start_stream('s').finish()\n")
    subprocess.run([sys.executable, program], check=True, timeout=60)
    assert store.ids() == ["s"]


def test_errors_and_the_store_name_the_place_as_a_url(store: persist.Store) -> None:
    """A `Path` would lose a slash of the URL. So a database has a place, and no path."""
    assert store.place.startswith("postgresql://")
    with pytest.raises(persist.InvalidArgument, match=r"Store\.place"):
        _ = store.path
    store.create("s")
    caught: list[Any] = []
    with store.start_stream("s", {"role": "user", "content": "Why?"}) as stream:
        for verb in (
            lambda: store.start_stream("s", {"role": "user", "content": "And?"}),
            lambda: store.load("none"),
            lambda: store.create("s"),
            lambda: store.follow("s", "none"),
            lambda: store.follow("s", stream.id, after=5),
        ):
            with pytest.raises(persist.PersistError) as error:
                verb()
            caught.append(error.value)
        stream.finish()
    assert {type(each) for each in caught} == {
        *(persist.SessionBusy, persist.SessionNotFound, persist.SessionExists, persist.EventsNotFound),
    }
    for each in [*caught, *pickle.loads(pickle.dumps(caught))]:
        assert str(each.path).startswith(store.place)


PLACES = {
    "postgresql://ann:secret@db/chats": "postgresql://ann@db:7/chats?schema=p",
    "postgresql://ann@h1:1,h2:2/chats": "postgresql://ann@h1:1,h2:2/chats?schema=p",
    "postgresql://ann@h1,h2/chats": "postgresql://ann@h1,h2/chats?schema=p",
    "postgresql://ann@[::1]:6/chats": "postgresql://ann@[::1]:6/chats?schema=p",
    "postgresql:///a%2Fb?host=/run&port=6&user=a%40b": "postgresql://a%40b@%2Frun:6/a%2Fb?schema=p",
    "postgresql://": "postgresql://bob@here:7/talks?schema=p",
    "postgresql://db": "postgresql://bob@db:7/talks?schema=p",
    "postgresql://?service=sa": "postgresql:///?service=sa&schema=p",
    "postgresql://ann@?service=sb&password=secret": "postgresql://ann@/?service=sb&schema=p",
}


@pytest.mark.parametrize(("url", "place"), PLACES.items(), ids=PLACES)
def test_place_is_a_url_of_the_same_store(url: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all that tells two stores apart, also from the environment. So it can be pasted behind a command."""
    for name, value in {"USER": "bob", "HOST": "here", "PORT": "7", "DATABASE": "talks"}.items():
        monkeypatch.setenv(f"PG{name}", value)
    assert Connections(url, "p").place == place
    assert Connections(place.replace("?schema=p", "").replace("&schema=p", ""), "p").place == place


def test_start_waits_for_a_server_that_comes_back(cut: persist.Store, relay: Relay) -> None:
    """A start tries the server again until its time is over. Without the loop in `Own.run` it fails at once."""
    cut.head("s")
    relay.refuses = True
    back = threading.Timer(0.5, setattr, (relay, "refuses", False))
    back.start()
    with cut.start_stream("s", USER) as stream:
        stream.finish({"role": "assistant", "content": "a"})
    back.join()


def test_verb_waits_for_a_server_that_comes_back(cut: persist.Store, store: persist.Store, relay: Relay) -> None:
    """A verb gets its connection soon after the server is back. The pool's own pauses would be 1, 2 and 4 seconds.

    Without `reconnect_timeout` the verb fails, because its time is over before the third pause.
    """
    cut.append("s", "messages", {"id": "m1"})
    back = threading.Timer(3.5, setattr, (relay, "refuses", False))
    relay.refuse_after_cut, relay.cut_before = True, b"BEGIN"
    back.start()
    cut.append("s", "messages", {"id": "m2"})
    back.join()
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1", "m2"]


def test_workers_that_start_at_once_migrate_once(postgres_url: str, schema: str) -> None:
    """Without the lock in `migrate`, a worker fails, because a table is there already."""
    opening = f"store = persist.Store({postgres_url!r}, schema={schema + 'x'!r})"
    code = f"import persist.postgres.engine\nprint('ready', flush=True); sys.stdin.readline()\n{opening}"
    others = [run(code, postgres_url, schema) for _ in range(8)]
    assert [said(each) for each in others] == ["ready"] * 8
    for each in others:
        go(each)
    assert [each.wait(60) for each in others] == [0] * 8
