"""The lock of a session on PostgreSQL, from the read to the commit, whoever comes first or is stopped."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
from actors import eventually

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg
from harness.remote import end_connections, engine_of, go, run, said

USER = {"role": "user", "content": "Why?"}


def server_process(tx: persist.Transaction) -> int:
    """Return the server process that holds the lock of a block."""
    inner: Any = tx._copy._tx
    return int(inner._held.connection.info.backend_pid)


def test_updates_of_several_processes_are_all_kept(store: persist.Store, postgres_url: str, schema: str) -> None:
    """The lock spans read and write, across processes.

    Without FOR UPDATE in the statement `lock`, verbs raise CommitFailed, because a commit compares and swaps.
    """
    store.create("s", {"n": 0, "messages": []})
    code = """
print("ready", flush=True); sys.stdin.readline()
for number in range(40):
    with store.transaction("s") as tx:
        tx.fields["n"] += 1
    store.append("s", "messages", {"id": f"{sys.argv}{number}"}, key=None)
"""
    others = [run(code, postgres_url, schema, timeout_s=20.0) for _ in range(4)]
    assert [said(each) for each in others] == ["ready"] * 4
    for each in others:
        go(each)
    assert [each.wait(60) for each in others] == [0] * 4
    assert store.load("s").data["n"] == 160
    assert len(store.load("s").data["messages"]) == 160


def test_two_first_writes_make_one_session(store: persist.Store) -> None:
    """A name without a row is locked, too. Without the statement `lock_name`, a verb fails with a duplicate key."""
    barrier, failures = threading.Barrier(2), list[Exception]()
    other = persist.Store(store._at, **{**store._options, "timeout_s": 20.0})

    def add(which: persist.Store, number: int) -> None:
        for name in range(20):
            barrier.wait()
            try:
                # The turns of threads are by the name of the store, so the two stores have to differ in it.
                which.append(f"new-{name}", "messages", {"id": number}, create=True)
            except Exception as error:
                failures.append(error)

    other._backend.engine.place = "another way to the same place"
    threads = [threading.Thread(target=add, args=each) for each in ((store, 1), (other, 2))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []
    assert all({item["id"] for item in store.tail(f"new-{name}")} == {1, 2} for name in range(20))


def test_timeout_names_the_holder(store: persist.Store, postgres_url: str, schema: str) -> None:
    """The error names the process that holds the row."""
    store.create("s", {})
    code = "with store.transaction('s') as tx:\n    print('held', flush=True); sys.stdin.readline()\n"
    other = run(code, postgres_url, schema)
    assert said(other) == "held"
    with pytest.raises(persist.LockTimeout, match=r"persist .* \(server process [0-9]+\), since"):
        store.append("s", "messages", {"id": "m1"}, timeout_s=0.2)
    go(other)
    assert other.wait(20) == 0
    store.append("s", "messages", {"id": "m1"})


def test_row_changed_without_the_lock_is_not_overwritten(store: persist.Store, postgres_url: str, schema: str) -> None:
    """A commit compares with what was read, so nothing is overwritten when the lock was lost.

    Without the comparison in `_lock_again` and without `commit = …` in the statement `update`, it is overwritten.
    """
    store.create("s", {"n": 0})
    with pytest.raises(persist.CommitFailed), store.transaction("s") as tx:
        tx.fields["n"] = 1
        # The server ends the transaction of the block, and somebody else commits.
        connection = engine_of(store).connections
        pid = server_process(tx)
        with psycopg.connect(connection.conninfo, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", [pid])
        run("store.update('s', lambda tx: tx.fields.update(n=7))", postgres_url, schema).wait(20)
    assert store.load("s").data["n"] == 7


def test_lost_connection_before_the_commit_is_replaced(store: persist.Store) -> None:
    """A block whose connection died is committed all the same, if nobody else has committed."""
    store.create("s", {"n": 0})
    with store.transaction("s") as tx:
        tx.fields["n"] = 1
        connection = engine_of(store).connections
        pid = server_process(tx)
        with psycopg.connect(connection.conninfo, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", [pid])
    assert store.load("s").data["n"] == 1
    assert store.load("s").revision == 2


def test_block_that_cannot_lock_again_raises_a_typed_error(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """The connection of a block dies, and somebody else keeps the session. Without `refusals`, it is psycopg's."""
    store.create("s", {"messages": [{"id": "m"}]})
    mine = persist.Store(postgres_url, schema=schema, timeout_s=0.5)
    with pytest.raises(persist.Unavailable, match="lock timeout"), mine.transaction("s") as tx:
        end_connections(postgres_url)
        with psycopg.connect(postgres_url) as other:
            other.execute(f"SELECT FROM {schema}.sessions WHERE id = 's' FOR UPDATE")
            len(tx.data["messages"])


def test_level_of_isolation_is_not_the_role_s(postgres_url: str, schema: str) -> None:
    """A transaction reads what the one before has committed, whatever level the role prefers.

    Under another level, a verb that has waited for the lock is refused by the server, and has to begin again.
    """
    store = persist.Store(f"{postgres_url}?options=-c%20default_transaction_isolation%3Dserializable", schema=schema)
    store.create("s", {})
    with store.transaction("s") as tx:
        inner: Any = tx._copy._tx
        assert inner._held.connection.execute("SHOW transaction_isolation").fetchone() == (b"read committed",)


def test_wait_for_a_lock_is_not_bounded_by_the_role(postgres_url: str, schema: str) -> None:
    """A `statement_timeout` of the role, shorter than `timeout_s`, does not end the wait."""
    store = persist.Store(f"{postgres_url}?options=-c%20statement_timeout%3D2s", schema=schema)
    store.create("s", {})
    with store.transaction("s") as tx:
        inner: Any = tx._copy._tx
        assert inner._held.connection.execute("SHOW statement_timeout").fetchone() == (b"0",)


def test_lock_of_a_process_that_is_stopped_is_free_after_its_lease(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """A process that was stopped, or cut off, holds a lock no longer than its lease. Its late commit is refused.

    Without `while_idle` in `lock_row`, the append times out: the server would wait for two hours.
    """
    store.create("s", {"n": 0, "messages": []})
    code = """
try:
    with store.transaction("s") as tx:
        tx.fields["n"] = 1
        print("held", flush=True)
        sys.stdin.readline()
except persist.CommitFailed:
    print("refused", flush=True)
"""
    other = run(code, postgres_url, schema, lease_s=1.0)
    assert said(other) == "held"
    os.kill(other.pid, signal.SIGSTOP)
    store.append("s", "messages", {"id": "m1"})
    os.kill(other.pid, signal.SIGCONT)
    go(other)
    assert said(other) == "refused"
    assert store.load("s").data == {"n": 0, "messages": [{"id": "m1"}]}


def test_block_that_pauses_for_longer_than_its_lease_commits_if_nobody_else_has(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """The server ends the transaction, and the commit takes the lock again. Without the second try it fails."""
    mine = persist.Store(postgres_url, schema=schema, lease_s=1.0)
    store.create("s", {"n": 0, "messages": [{"id": "m0"}]})
    with psycopg.connect(postgres_url, autocommit=True) as other, mine.transaction("s") as tx:
        tx.fields["n"] = 1
        locks = """SELECT FROM pg_locks JOIN pg_database ON oid = database
            WHERE locktype = 'advisory' AND datname = current_database()"""
        eventually(lambda: other.execute(locks).rowcount == 0)
        assert tx.data["messages"] == [{"id": "m0"}]
    assert store.load("s").data == {"n": 1, "messages": [{"id": "m0"}]}


def test_open_block_at_the_end_of_the_interpreter_waits_for_no_stopped_thread(
    store: persist.Store, postgres_url: str, schema: str
) -> None:
    """A thread that the end has stopped inside the table of locks never leaves it. The block's finaliser knows that.

    Without the look at `is_stuck`, the process never ends.
    """
    store.create("s", {})
    code = """
import builtins, threading
from persist.storage import held
builtins.block = store.transaction('s'); block.__enter__().fields['a'] = 1
inside = threading.Event()
names = {'lock': held.table, 'inside': inside, 'forever': threading.Event()}
exec('def stop():\\n with lock:\\n  inside.set(); forever.wait()', names)
threading.Thread(target=names.pop('stop'), daemon=True).start(); inside.wait()
"""
    assert run(code, postgres_url, schema).wait(20) == 0
    assert store.load("s").data == {}
