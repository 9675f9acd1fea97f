"""Streams across processes, on files: the kernel tells whether an owner lives, whatever its files look like."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from conftest import ActorFactory
from harness.turns import START, contents

import persist


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "Streams", "messages": []})


def test_paused_owner_is_alive(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A7: SIGSTOP proves nothing: 3 processes ask 100 times each, and the stream is there when its owner goes on."""
    owner, askers = actor(), [actor() for _ in range(3)]
    owner.do(START)
    os.kill(owner.pid, signal.SIGSTOP)
    for each in askers:
        each.start(
            "[bool(store.clear_stale_streams().cleared) or store.load('s-1').clear_stale_stream() for _ in range(50)]"
            " + [not info.is_live for _ in range(50) for info in store.streams()]"
        )
    assert [any(each.result()) for each in askers] == [False] * 3
    os.kill(owner.pid, signal.SIGCONT)
    owner.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")
    assert contents(store) == [("Why?", False), ("Because.", False)]


def test_idle_owner_is_alive_whatever_its_files_look_like(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A7: neither age nor content of a lease counts: one that is a year old and empty belongs to a live stream."""
    owner = actor()
    stream_id = owner.do(START)
    lease = directory / ".leases" / f"s-1.{stream_id}"
    os.truncate(lease, 0)
    for path in (lease, directory / "s-1.json"):
        os.utime(path, (1, 1))
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert store.load("s-1").clear_stale_stream() is False
    owner.do("stream.finish()")


def test_lease_is_given_up_even_if_the_last_commit_fails(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """The exit raises if the turn cannot be marked, because its file is unreadable.

    The stream is dead all the same.
    """
    with pytest.raises(persist.CorruptSession), store.start_stream("s-1") as stream:
        whole = (directory / "s-1.json").read_bytes()
        (directory / "s-1.json").write_bytes(whole[:-5])
    (directory / "s-1.json").write_bytes(whole)
    assert [info.is_live for info in store.streams()] == [False]
    assert [c.stream_id for c in store.clear_stale_streams().cleared] == [stream.id]


def test_dropped_stream_is_stale_and_warns(store: persist.Store, session: persist.Session) -> None:
    """A dropped stream releases its lease with a ResourceWarning, because only the Stream object holds it."""
    stream = store.start_stream("s-1")
    with pytest.warns(ResourceWarning, match=stream.id):
        del stream
        gc.collect()
    assert [info.is_live for info in store.streams()] == [False]
    assert len(store.clear_stale_streams().cleared) == 1


def test_sweep_removes_leases_that_lead_nowhere(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """A sweep removes the lease of a deleted session, or of a stream that has ended, and does not report it."""
    for name in ("gone.abc", "s-1.abc", "not a lease"):
        (directory / ".leases" / name).write_bytes(b"{}")
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert [path.name for path in (directory / ".leases").iterdir()] == ["not a lease"]
    assert not (directory / "gone.json.lock").exists()


def test_sweep_goes_on_past_a_damaged_session(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A sweep goes on past a damaged session, and returns what it cleared and what it could not clear."""
    store.create("s-0", {"messages": []})
    owner = actor()
    for session_id in ("s-0", "s-1"):
        owner.do(f"stream_{session_id[-1]} = store.start_stream({session_id!r})")
    owner.kill()
    (directory / "s-0.json").write_bytes(b"{")
    sweep = store.clear_stale_streams()
    assert [cleared.session_id for cleared in sweep.cleared] == ["s-1"]
    assert list(sweep.failures) == ["s-0"]
    assert type(sweep.failures["s-0"]) is persist.CorruptSession


def test_damaged_session_hides_no_other_streams(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """`streams` lists the streams of the other sessions, and `check` names the damage."""
    store.create("s-0", {"messages": []})
    with store.start_stream("s-0") as other, store.start_stream("s-1") as stream:
        whole = (directory / "s-0.json").read_bytes()
        (directory / "s-0.json").write_bytes(b"?" + whole)
        assert [info.stream_id for info in store.streams()] == [stream.id]
        assert [(problem.session_id, problem.kind) for problem in store.check()] == [("s-0", "corrupt")]
        (directory / "s-0.json").write_bytes(whole)
        stream.finish()
        other.finish()


def test_sweep_of_every_session_finds_streams_without_a_lease(store: persist.Store, directory: Path) -> None:
    """Adoption: a stream that an old server left behind has no lease. Its prompt is kept, and is cleared once."""
    (directory / "old.json").write_text(
        '{"title": "Old", "updated_at": 12.5, "active_stream_id": "a/b", "pending_user_message": "Hello?",'
        ' "pending_attachments": ["x"], "pending_started_at": 3, "messages": [{"role": "user", "content": "first"}]}'
    )
    assert store.clear_stale_streams() == persist.Sweep([], {})
    cleared = store.clear_stale_streams(every_session=True).cleared
    assert [(c.session_id, c.stream_id) for c in cleared] == [("old", "a/b")]
    assert store.clear_stale_streams(every_session=True) == persist.Sweep([], {})
    data = store.load("old").data
    assert data["updated_at"] == 12.5
    assert data["messages"][1:] == [
        {"id": "a/b.prompt", "role": "user", "content": "Hello?", "interrupted": True, "attachments": ["x"]}
    ]
