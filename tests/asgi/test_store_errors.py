"""A store that refuses: a session that is locked, and a disk that is full. Both are told, and pass."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

from actors import eventually
from harness.chat_servers import Sent, client_of_app, events_in
from harness.scripted import scripted

import persist
from persist.asgi import create_app
from persist.asgi.turns import Turns

TURN = {"message": {"id": "m", "content": "a"}}


def refused(response: Any, code: str) -> None:
    """Require a refusal that tells a client to come again, and no path."""
    assert (response.status_code, response.json()["error"]["code"]) == (503, code), response.text
    assert response.headers["retry-after"] == "1"
    assert "/" not in response.json()["error"]["message"]


def followed(client: Any, stream_id: str) -> list[Sent]:
    with client.stream("GET", f"/api/sessions/s/streams/{stream_id}/events") as response:
        return list(events_in(response.iter_lines()))


def test_a_locked_session_is_refused_for_now(client_of: Any, directory: Path) -> None:
    """Each write waits for the store's time-out and not longer, other sessions go on, and later it is taken."""
    client = client_of(store=persist.Store(directory, timeout_s=0.1))
    client.post("/api/sessions", json={"id": "s"})
    writes: list[Callable[[], Any]] = [
        lambda: client.post("/api/sessions/s/turns", json=TURN),
        lambda: client.post("/api/chat", json={"id": "s", **TURN}),
        lambda: client.patch("/api/sessions/s", json={"title": "x"}),
        lambda: client.delete("/api/sessions/s"),
        lambda: client.delete("/api/sessions/s?force=1"),
    ]
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with persist.Store(directory).transaction("s"):
            held.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        for write in writes:
            refused(write(), "locked")
        assert client.get("/api/sessions").status_code == 200
        assert client.post("/api/sessions/other/turns", json=TURN).status_code == 201
    finally:
        leave.set()
        holder.join()
    assert client.post("/api/sessions/s/turns", json=TURN).status_code == 201


def test_a_locked_session_does_not_hold_up_the_list(client_of: Any, directory: Path, tmp_path: Path) -> None:
    """Its row says that it is live, because somebody works on it. Fails if the list waits for the session's lock."""
    client = client_of(store=persist.Store(directory, timeout_s=3600))
    client.post("/api/sessions/s/turns", json={"message": {"id": "m", "content": f"<{tmp_path / 'gate'}"}})
    with persist.Store(directory).transaction("s"):
        (row,) = client.get("/api/sessions").json()["sessions"]
    assert (row["id"], row["live"]) == ("s", True)


class Disk:
    """The disk of a directory, as the kernel tells it. It refuses to write to files whose paths match a pattern."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self.refused: str | None = None
        self.refusals = 0

    def require(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if self.refused is not None and path.startswith(self._directory) and re.search(self.refused, path):
            self.refusals += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(directory)
    for name in ("write", "pwrite", "writev", "pwritev"):
        real = getattr(os, name)

        def call(fd: int, *more: Any, real: Any = real) -> Any:
            disk.require(fd)
            return real(fd, *more)

        monkeypatch.setattr(os, name, call)
    yield disk
    disk.refused = None


def test_a_full_disk_is_told_and_passes(client: Any, disk: Disk) -> None:
    """Each write is status 503, reads go on, and once there is room, the same message is taken."""
    client.post("/api/sessions", json={"id": "s"})
    disk.refused = ""
    refused(client.post("/api/sessions/s/turns", json=TURN), "unavailable")
    refused(client.post("/api/sessions/new/turns", json=TURN), "unavailable")
    refused(client.post("/api/sessions", json={"id": "other"}), "unavailable")
    refused(client.patch("/api/sessions/s", json={"title": "x"}), "unavailable")
    assert client.get("/api/sessions/s").json()["messages"] == []
    assert [row["id"] for row in client.get("/api/sessions").json()["sessions"]] == ["s"]
    disk.refused = None
    stream_id = client.post("/api/sessions/s/turns", json=TURN).json()["stream_id"]
    assert followed(client, stream_id)[-1].data["how"] == "finished"


def test_what_was_said_is_kept_if_its_events_are_refused(client: Any, disk: Disk, tmp_path: Path) -> None:
    """An event that cannot be written ends the turn as failed, and the answer so far is stored with its error.

    Fails if the turn gives up with the event of the error, which cannot be written either.
    """
    gate = tmp_path / "gate"
    body = {"message": {"id": "m", "content": f"a b <{gate} c"}}
    stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
    with client.stream("GET", f"/api/sessions/s/streams/{stream_id}/events") as response:
        events = events_in(response.iter_lines())
        assert [next(events).data["text"] for _ in "ab"] == ["a ", "b "]
        disk.refused = r"/\.events/"
        gate.touch()
        assert next(events).data["how"] in ("failed", "lost")
    answer = client.get("/api/sessions/s").json()["messages"][-1]
    assert answer["content"] in ("a b ", "a b c ")
    assert (answer["partial"], answer["error"]) == (True, "The model failed to answer.")


def test_a_checkpoint_that_is_refused_does_not_end_the_turn(client_of: Any, disk: Disk, tmp_path: Path) -> None:
    """The disk is full for a while, and then the answer is stored whole. Fails if a checkpoint's error is raised."""
    client = client_of(checkpoint_s=0.0)
    gates = [tmp_path / "gate-1", tmp_path / "gate-2"]
    body = {"message": {"id": "m", "content": f"a <{gates[0]} b <{gates[1]} c"}}
    stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
    eventually(lambda: client.get("/api/sessions/s").json()["messages"][-1]["content"] == "a ")
    disk.refused = r"/s\.(json|.*journal)"
    gates[0].touch()
    eventually(lambda: disk.refusals > 0)
    disk.refused = None
    gates[1].touch()
    assert followed(client, stream_id)[-1].data["how"] == "finished"
    assert client.get("/api/sessions/s").json()["messages"][-1]["content"] == "a b c "


ENDS = [("c", "finished", "a b c ", None), ("!broken", "failed", "a b ", "broken")]


@pytest.mark.parametrize(("end", "how", "content", "error"), ENDS)
def test_an_end_that_a_full_disk_refuses_is_tried_again(
    client_of: Any, disk: Disk, tmp_path: Path, end: str, how: str, content: str, error: str | None
) -> None:
    """All that was told is stored once there is room. Fails if the end of a turn is tried once."""
    client = client_of(checkpoint_s=3600.0)
    gate = tmp_path / "gate"
    body = {"message": {"id": "m", "content": f"a b <{gate} {end}"}}
    stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
    disk.refused = r"/s\.(json|.*journal)"
    gate.touch()
    eventually(lambda: disk.refusals > 0)
    disk.refused = None
    assert followed(client, stream_id)[-1].data["how"] == how
    answer = client.get("/api/sessions/s").json()["messages"][-1]
    assert (answer["content"], answer.get("error")) == (content, error)


def test_an_end_that_meets_a_lock_is_tried_again(
    client_of: Any, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds the session for longer than the store waits, and the answer is stored after that."""
    client = client_of(store=persist.Store(directory, timeout_s=0.1))
    gate, refused, finish = tmp_path / "gate", threading.Event(), persist.aio.Stream.finish

    async def noted(*args: Any) -> None:
        try:
            await finish(*args)
        except persist.LockTimeout:
            refused.set()
            raise

    monkeypatch.setattr(persist.aio.Stream, "finish", noted)
    body = {"message": {"id": "m", "content": f"a <{gate} b"}}
    stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
    with client.stream("GET", f"/api/sessions/s/streams/{stream_id}/events") as response:
        events = events_in(response.iter_lines())
        assert next(events).data["text"] == "a "
        with persist.Store(directory).transaction("s"):
            gate.touch()
            assert refused.wait(60.0)
        assert [*events][-1].data["how"] == "finished"
    assert client.get("/api/sessions/s").json()["messages"][-1]["content"] == "a b "


def test_an_end_that_is_refused_has_time_when_the_server_ends(
    directory: Path, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: persist.Store
) -> None:
    """A disk that has room again in the last seconds of the server loses nothing. Fails if an end is cut off."""
    gate, close = tmp_path / "gate", Turns.close

    async def free_and_close(turns: Turns) -> None:
        asyncio.get_running_loop().call_later(0.5, lambda: setattr(disk, "refused", None))
        await close(turns)

    monkeypatch.setattr(Turns, "close", free_and_close)
    with client_of_app(create_app(directory, scripted, checkpoint_s=3600.0)) as client:
        client.post("/api/sessions/s/turns", json={"message": {"id": "m", "content": f"a <{gate} b"}})
        disk.refused = r"/s\.(json|.*journal)"
        gate.touch()
        eventually(lambda: disk.refusals > 0)
    answer = store.load("s").data["messages"][-1]
    assert (answer["content"], "interrupted" in answer) == ("a b ", False)


def test_a_look_that_fails_stops_nothing(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether somebody has stopped a turn cannot be read for a while. Then the turn goes on, and a stop ends it."""
    looks, look = iter(range(3)), persist.aio.Stream.is_cancelled
    failed = threading.Event()

    async def refusing(stream: persist.aio.Stream) -> bool:
        if next(looks, None) is not None:
            raise persist.Unreadable(path=tmp_path, reason="too many open files")
        failed.set()
        return await look(stream)

    monkeypatch.setattr(persist.aio.Stream, "is_cancelled", refusing)
    body = {"message": {"id": "m", "content": "a ~"}}
    stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
    assert failed.wait(60.0)
    assert client.post(f"/api/sessions/s/streams/{stream_id}/stop").json() == {"stopped": True}
    assert followed(client, stream_id)[-1].data["how"] == "stopped"


def test_a_turn_that_a_full_disk_ended_can_be_read(
    client_of: Any, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream is over, though the session cannot be told so. Fails if the session is refused with status 503."""
    monkeypatch.setattr("persist.asgi.turns.PATIENCE_S", 0.0)
    client = client_of(checkpoint_s=0.0)
    gate = tmp_path / "gate"
    body = {"message": {"id": "m", "content": f"a <{gate} b"}}
    stream_id = client.post("/api/sessions/s/turns", json=body).json()["stream_id"]
    eventually(lambda: client.get("/api/sessions/s").json()["messages"][-1]["content"] == "a ")
    disk.refused = ""
    gate.touch()
    assert followed(client, stream_id)[-1].data["how"] == "lost"
    read = client.get("/api/sessions/s").json()
    assert (read["stream"], read["messages"][-1]["content"], read["messages"][-1]["partial"]) == (None, "a ", True)
    refused(client.post("/api/sessions/s/retry"), "unavailable")
    disk.refused = None
    assert client.post("/api/sessions/s/retry").status_code == 201
