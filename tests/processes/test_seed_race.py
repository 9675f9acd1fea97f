"""The starting case, hermes-webui #1533: a clear that was decided for a dead stream must spare the stream after it.

The issue has three steps:

1. The reader finds stream X dead and decides to clear it.
2. The writer starts stream Y.
3. The reader writes ``active_stream_id = None``.

A barrier forces each order, never a sleep. `scripts/mutants` takes out the lock, the re-read and the cross-process
liveness, one at a time, and sees these tests fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from actors import DEADLINE_S, Actor
from conftest import ActorFactory

import persist
from persist.storage import disk

SHORT = {"timeout_s": 0.3}
PROMPT = {"role": "user", "content": "Why?"}


@pytest.fixture
def dead_stream(store: persist.Store, actor: ActorFactory) -> str:
    """Make session s-1, whose stream X was run by a process that has been killed. Return the stream's id."""
    store.create("s-1", {"title": "Seed", "messages": []})
    victim = actor()
    stream_id: str = victim.do("stream = store.start_stream('s-1', {'role': 'user', 'content': 'First?'}); stream.id")
    victim.kill()
    return stream_id


def start_or_wait(start: Callable[[], str], let_reader_go: Callable[[], None]) -> str:
    """Start a stream while the reader stands between its decision and its write. The lock makes the start wait."""
    try:
        stream_id = start()
    except persist.LockTimeout:
        let_reader_go()
        return start()
    let_reader_go()
    return stream_id


@pytest.mark.usefixtures("switching")
class TestTwoThreads:
    def test_clear_decided_before_a_new_stream_spares_it(self, store: persist.Store, dead_stream: str) -> None:
        """A1, two threads: a clear decided for X, and resumed after Y has started, returns False, and Y stays.

        Fails without the re-read.
        """
        looked, started = threading.Barrier(2), threading.Event()
        outcome: list[bool] = []

        def reader() -> None:
            session = store.load("s-1")
            looked.wait(DEADLINE_S)
            assert started.wait(DEADLINE_S)
            outcome.append(session.clear_stale_stream())

        thread = threading.Thread(target=reader)
        thread.start()
        looked.wait(DEADLINE_S)
        with store.start_stream("s-1", PROMPT) as stream:
            started.set()
            thread.join(DEADLINE_S)
            assert outcome == [False]
            assert store.load("s-1").active_stream_id == stream.id
            stream.finish({"role": "assistant", "content": "Because."})

    def test_stream_cannot_start_between_decision_and_write(
        self, directory: Path, store: persist.Store, dead_stream: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A1, two threads: while the clear stands between its re-read and its write, a start waits, and then stays.

        Fails without the lock.
        """
        at_write, go = threading.Event(), threading.Event()
        real = disk.create

        def pause(path: Path, *mode: int) -> int:
            if threading.current_thread().name == "reader":
                at_write.set()
                assert go.wait(DEADLINE_S)
            return real(path, *mode)

        monkeypatch.setattr(disk, "create", pause)
        outcome: list[bool] = []
        reader = threading.Thread(target=lambda: outcome.append(store.load("s-1").clear_stale_stream()), name="reader")
        reader.start()
        assert at_write.wait(DEADLINE_S)
        streams: list[persist.Stream] = []

        def start() -> str:
            streams.append(persist.Store(directory, timeout_s=SHORT["timeout_s"]).start_stream("s-1", PROMPT))
            return streams[0].id

        def let_go() -> None:
            go.set()
            reader.join(DEADLINE_S)

        stream_id = start_or_wait(start, let_go)
        assert outcome == [True]
        assert store.load("s-1").active_stream_id == stream_id
        streams[0].finish({"role": "assistant", "content": "Because."})


class TestTwoProcesses:
    def test_clear_decided_before_a_new_stream_spares_it(
        self, store: persist.Store, actor: ActorFactory, dead_stream: str
    ) -> None:
        """A1, two processes: a clear decided for X, and resumed after Y has started, returns False, and Y stays.

        Fails without the re-read.
        """
        reader, writer = actor(), actor()
        assert reader.do("session = store.load('s-1'); session.active_stream_id") == dead_stream
        stream_id = writer.do("stream = store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}); stream.id")
        assert reader.do("session.clear_stale_stream()") is False
        assert store.load("s-1").active_stream_id == stream_id
        writer.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")

    def test_stream_cannot_start_between_decision_and_write(
        self, store: persist.Store, actor: ActorFactory, dead_stream: str
    ) -> None:
        """A1, two processes: while the clear stands between its re-read and its write, a start waits, and then stays.

        Fails without the lock.
        """
        reader, writer = actor(), actor(**SHORT)
        reader.start_and_pause("store.load('s-1').clear_stale_stream()", "create")

        def start() -> str:
            return str(writer.do("stream = store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}); stream.id"))

        outcome: list[bool] = []

        def let_go() -> None:
            reader.go()
            outcome.append(reader.result())

        stream_id = start_or_wait(start, let_go)
        assert outcome == [True]
        assert store.load("s-1").active_stream_id == stream_id
        writer.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")

    def test_stream_that_lives_in_another_process_is_left_alone(
        self, store: persist.Store, actor: ActorFactory
    ) -> None:
        """A1, A11: a process that knows only the file of a stream still sees that the stream lives.

        Fails if liveness is known only in the process that asks.
        """
        store.create("s-1", {"messages": []})
        owner, reader = actor(), actor()
        stream_id = owner.do("stream = store.start_stream('s-1'); stream.id")
        assert reader.do("store.load('s-1').clear_stale_stream()") is False
        assert reader.do("store.clear_stale_streams()") == persist.Sweep([], {})
        assert store.load("s-1").active_stream_id == stream_id


class TestSeedBehaviour:
    """The five behaviours of hermes-webui's `_clear_stale_stream_state` that must not regress."""

    def test_clear_resets_every_pending_field(self, store: persist.Store, dead_stream: str) -> None:
        """A clear resets all four stream fields, in memory and on disk, and returns True."""
        session = store.load("s-1")
        assert session.data["pending_user_message"] == "First?"
        assert session.clear_stale_stream() is True
        idle: dict[str, object] = {
            "active_stream_id": None,
            "pending_user_message": None,
            "pending_attachments": [],
            "pending_started_at": None,
        }
        for data in (session.data, store.load("s-1").data):
            assert {field: data[field] for field in idle} == idle

    def test_clear_keeps_updated_at(self, store: persist.Store, dead_stream: str) -> None:
        """A clear is a repair, so the session keeps its place in a list sorted by recency."""
        before = store.load("s-1")
        session = store.load("s-1")
        assert session.clear_stale_stream() is True
        assert session.updated_at == store.load("s-1").updated_at == before.updated_at
        assert session.revision == before.revision + 1

    def test_loading_for_a_response_can_clear_first(self, store: persist.Store, dead_stream: str) -> None:
        """A server can load, clear and answer with the same object, which shows no stream and has the prompt."""
        session = store.load("s-1")
        session.clear_stale_stream()
        assert session.active_stream_id is None
        assert [(m["content"], m["interrupted"]) for m in session.data["messages"]] == [("First?", True)]
        session.data["title"] = "Shown"
        session.save()

    def test_start_over_a_stale_stream_clears_it_and_starts(self, store: persist.Store, dead_stream: str) -> None:
        """A dead stream does not block the next one, and its prompt is kept."""
        with store.start_stream("s-1", PROMPT) as stream:
            data = store.load("s-1").data
            assert data["active_stream_id"] == stream.id != dead_stream
            assert [(m["content"], m.get("interrupted")) for m in data["messages"]] == [
                ("First?", True),
                ("Why?", None),
            ]
            stream.finish({"role": "assistant", "content": "Because."})

    def test_live_stream_is_left_alone(self, store: persist.Store) -> None:
        """A stream that runs in this very process is not cleared, and nothing is written."""
        session = store.create("s-1", {"messages": []})
        with store.start_stream("s-1", PROMPT) as stream:
            session.refresh()
            assert session.clear_stale_stream() is False
            assert store.load("s-1").revision == session.revision
            assert store.load("s-1").active_stream_id == stream.id
            stream.finish()


def test_session_without_a_stream_is_not_touched(store: persist.Store, directory: Path) -> None:
    """A clear of a session without a stream returns False, and does not even open the file."""
    session = store.create("s-1", {"messages": []})
    (directory / "s-1.json").unlink()
    assert session.clear_stale_stream() is False


def test_actor_reports_what_it_raised(actor: ActorFactory) -> None:
    """An error of an actor arrives in the test with its attributes. This tests the harness itself."""
    other: Actor = actor()
    with pytest.raises(persist.SessionNotFound) as caught:
        other.do("store.load('nobody')")
    assert caught.value.session_id == "nobody"
