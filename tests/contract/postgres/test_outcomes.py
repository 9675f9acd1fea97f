"""The outcome of a commit whose connection, or whose server, was lost: known, or said to be unknown."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from harness.cutting import COMMIT, Relay

import persist

pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
import psycopg
from harness.remote import engine_of

from persist.postgres.engine import PostgresEngine
from persist.postgres.transaction import Transaction

USER = {"role": "user", "content": "Why?"}


def overtaking(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something in another thread before a transaction that lost its connection takes its lock again."""
    really = Transaction._lock_again

    def late(self: Transaction, deadline: float) -> Any:
        self._held.close()
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        return really(self, deadline)

    monkeypatch.setattr(Transaction, "_lock_again", late)


@pytest.mark.parametrize("is_delivered", [True, False])
def test_connection_cut_in_a_commit_doubles_nothing(
    cut: persist.Store, store: persist.Store, relay: Relay, is_delivered: bool
) -> None:
    """A commit whose answer was lost is looked up.

    Without `_has_happened`, the verb fails although it is committed.
    """
    cut.append("s", "messages", {"id": "m1"})
    relay.cut_behind, relay.cut_before = (COMMIT, None) if is_delivered else (None, COMMIT)
    cut.append("s", "messages", {"content": "without an id"}, key=None)
    assert relay.cuts == 1
    assert store.load("s").data["messages"] == [{"id": "m0"}, {"id": "m1"}, {"content": "without an id"}]
    assert store.load("s").revision == 3


def test_commit_is_known_under_the_commits_of_others(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row holds the ids of its last commits.

    Without them, the verb raises CommitFailed for a commit that stands.
    """

    def overtake() -> None:
        for number in range(3):
            store.append("s", "messages", {"id": f"other-{number}"})

    cut.append("s", "messages", {"id": "m1"})
    # The turns of threads are by the name of the place.
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, overtake)
    relay.cut_behind = COMMIT
    cut.append("s", "messages", {"id": "m2"})
    assert relay.cuts == 1
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1", "m2", "other-0", "other-1", "other-2"]


@pytest.mark.parametrize("where", ["cut_behind", "cut_before"])
def test_server_that_stays_away_in_a_commit_is_unknown(
    cut: persist.Store, store: persist.Store, relay: Relay, where: str
) -> None:
    """Nobody can tell what became of a COMMIT if the server cannot be asked."""
    relay.refuse_after_cut = True
    setattr(relay, where, COMMIT)
    with pytest.raises(persist.CommitUnknown):
        cut.append("s", "messages", {"id": "m1"}, timeout_s=1.0)
    relay.refuses = False
    cut.append("s", "messages", {"id": "m1"})
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1"]


@pytest.mark.parametrize("is_delivered", [True, False])
def test_commit_is_known_under_any_number_of_commits_of_others(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch, is_delivered: bool
) -> None:
    """If the row does not go back so far, the server knows the transaction.

    Without `_became`, the verb raises CommitUnknown in both cases.
    """
    for number in range(40):
        cut.update("s", lambda tx, number=number: tx.fields.update(n=number))  # type: ignore[misc]
    # The turns of threads are by the name of the place.
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, lambda: [store.update("s", lambda tx: tx.fields.update(n=-1)) for _ in range(40)])
    relay.cut_behind, relay.cut_before = (COMMIT, None) if is_delivered else (None, COMMIT)
    if is_delivered:
        cut.append("s", "messages", {"id": "m1"})
    else:
        with pytest.raises(persist.CommitFailed):
            cut.append("s", "messages", {"id": "m1"})
    assert relay.cuts == 1
    assert [each["id"] for each in store.tail("s")] == ["m0", "m1"][: 1 + is_delivered]


def test_commit_that_did_not_happen_is_not_unknown_behind_a_few_others(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids of the last commits go back to the one that was read, so nothing is missing among them.

    Without the look for that one, the server is asked, which may be a replica that never saw the transaction.
    """
    for number in range(40):
        cut.update("s", lambda tx, number=number: tx.fields.update(n=number))  # type: ignore[misc]
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, lambda: store.append("s", "messages", {"id": "other"}))
    monkeypatch.setattr(Transaction, "_became", lambda *_: None)
    relay.cut_before = COMMIT
    with pytest.raises(persist.CommitFailed):
        cut.append("s", "messages", {"id": "m1"})
    assert [each["id"] for each in store.tail("s")] == ["m0", "other"]


def test_number_that_was_given_again_after_a_crash_proves_nothing(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crashed server forgets the numbers of transactions that have written nothing, and others get them.

    Without the comparison of the times in `_became`, the create is acknowledged, and nothing is there. The server's own
    crash is in test_lost_machines.py. Here the number is that of another transaction.
    """
    really = PostgresEngine.lock_row
    with psycopg.connect(engine_of(store).connections.conninfo) as other:
        [number] = other.execute("SELECT pg_current_xact_id()::text").fetchone() or [""]

    def reused(self: PostgresEngine, *args: Any) -> Any:
        row, _ = really(self, *args)
        return row, f"{number} before the crash".encode()

    monkeypatch.setattr(PostgresEngine, "lock_row", reused)
    relay.cut_before = COMMIT
    cut.create("new", {"n": 1})
    assert relay.cuts == 1
    assert store.load("new").data == {"n": 1}


@pytest.mark.parametrize("session_id", ["s", "new"])
def test_commit_is_known_although_the_session_was_deleted_since(
    cut: persist.Store, store: persist.Store, relay: Relay, monkeypatch: pytest.MonkeyPatch, session_id: str
) -> None:
    """A session that was written and then deleted by somebody else is not made again.

    Without `_became`, the append raises CommitFailed for what was committed, and the new session comes back.
    """
    cut.append("s", "messages", {"id": "m1"})
    store._backend.engine.place = "another way to the same place"
    overtaking(monkeypatch, lambda: store.delete(session_id))
    relay.cut_behind = COMMIT
    cut.append(session_id, "messages", {"id": "m2"}, create=True)
    assert relay.cuts == 1
    assert not store.exists(session_id)
