"""Streams that any worker can resume: the server of docs/guides/events.md, as uvicorn processes.

The processes share one directory. The tests have a client that loses its connection again and again, a worker that is
killed, and cursors that cannot be right. They poll the servers, with a deadline. They assert what the servers sent,
never that time has passed.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from actors import DEADLINE_S, eventually
from harness.pages import README, ROOT, file_of

import persist

#: The echo takes 100 ms a word, so it outlasts every test.
LONG_PROMPT = " ".join(f"word{i}" for i in range(100_000))


# --- a client ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A Server-Sent Event. Its id is a cursor, and it has a name only if the stream has ended."""

    id: str
    name: str
    data: str


class Followed:
    """A connection that follows a stream.

    Iterate it to its end, which must come in time, or `close` it before.
    """

    def __init__(self, port: int, path: str, cursor: str | None) -> None:
        self._deadline = time.monotonic() + DEADLINE_S
        self._connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self._connection.request("GET", path, headers={} if cursor is None else {"Last-Event-ID": cursor})
        self._response: HTTPResponse = self._connection.getresponse()
        self.status = self._response.status

    def __iter__(self) -> Iterator[Sent]:
        fields: dict[str, str] = {}
        while line := self._response.readline():
            assert time.monotonic() < self._deadline, "the stream did not end"
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            if name:
                fields[name] = value
            elif "data" in fields:
                yield Sent(fields.get("id", ""), fields.get("event", ""), fields["data"])
                fields = {}
        self.close()

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def body(self) -> Any:
        """Return the body of a refusal."""
        try:
            return json.loads(self._response.read())
        finally:
            self.close()


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int

    def request(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def start(self, prompt: str) -> str:
        """Start a turn in session "s-1"."""
        status, reply = self.request("POST", "/chat/s-1", prompt)
        assert status == 202, reply
        return str(reply["stream_id"])

    def follow(self, stream_id: str, cursor: str | None = None, *, session_id: str = "s-1") -> Followed:
        return Followed(self.port, f"/events/{session_id}/{stream_id}", cursor)

    def event_files_open(self) -> int:
        """Return how many descriptors of the server are open on events."""
        names = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            # The descriptor may be closed in between.
            with suppress(FileNotFoundError):
                names.append(link.readlink())
        return sum(name.parent.name == ".events" for name in names)

    def end(self, signal_number: int) -> None:
        self.process.send_signal(signal_number)
        self.process.wait(DEADLINE_S)


def tokens(sent: list[Sent]) -> list[Any]:
    return [json.loads(each.data) for each in sent if not each.name]


def first_of(followed: Followed, count: int) -> list[Sent]:
    """Return the next events, or fewer if the stream ends, and drop the connection."""
    found: list[Sent] = []
    for each in followed:
        found.append(each)
        if len(found) == count:
            break
    followed.close()
    return found


# --- servers ----------------------------------------------------------------------------------------------------------

Serve = Callable[..., list[Server]]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Collect the server processes of a test, and kill all of them after it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(DEADLINE_S)


def serving(log: Path, process: subprocess.Popen[bytes]) -> Server:
    """Return the server that writes this log, once its address stands there."""
    found: list[int] = []

    def answers() -> bool:
        text = log.read_text()
        assert process.poll() is None, text
        found[:] = [int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", text)]
        return bool(found)

    eventually(answers)
    return Server(process, found[0])


@pytest.fixture
def start_up(tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> Callable[[list[str], int], list[Server]]:
    def start(command: list[str], count: int) -> list[Server]:
        logs = [tmp_path / f"{len(processes) + n}.log" for n in range(count)]
        for log in logs:
            with log.open("wb") as written:
                processes.append(subprocess.Popen(command, cwd=tmp_path, stdout=written, stderr=subprocess.STDOUT))
        return [serving(log, process) for log, process in zip(logs, processes[-count:], strict=True)]

    return start


@pytest.fixture
def store(tmp_path: Path) -> persist.Store:
    return persist.Store(tmp_path / "var" / "sessions", timeout_s=20.0)


@pytest.fixture
def serve(tmp_path: Path, store: persist.Store, start_up: Callable[[list[str], int], list[Server]]) -> Serve:
    """Return a function that starts workers of the page's `app.py`, on a store with the session "s-1"."""
    store.create("s-1", {"messages": []})
    (tmp_path / "app.py").write_text(file_of(ROOT / "docs" / "guides" / "events.md", "app.py"), encoding="utf-8")
    command = [sys.executable, "-W", "error", "-m", "uvicorn", "app:app", "--port", "0", "--no-access-log"]
    return lambda count: start_up(command, count)


def test_server_of_the_readme_adds_messages(
    tmp_path: Path, store: persist.Store, start_up: Callable[[list[str], int], list[Server]]
) -> None:
    """The FastAPI example: two workers add to one session, a repeated request adds nothing, another content is 409."""
    (tmp_path / "app.py").write_text(file_of(README, "app.py"), encoding="utf-8")
    one, two = start_up([sys.executable, "-W", "error", "-m", "uvicorn", "app:app", "--port", "0"], 2)
    path, message = "/messages/user:7/chat", {"id": "m1", "role": "user", "content": "hi"}
    first = one.request("POST", path, json.dumps(message))
    assert first[0] == 200
    assert two.request("POST", path, json.dumps(message)) == first
    assert two.request("POST", path, json.dumps({**message, "content": "other"}))[0] == 409
    assert two.request("POST", path, json.dumps({**message, "id": "m2"}))[0] == 200
    assert [each["id"] for each in store.load("user:7/chat").data["messages"]] == ["m1", "m2"]


# --- the page's server ------------------------------------------------------------------------------------------------


def test_client_that_loses_its_connection_again_and_again_sees_every_event_once(
    serve: Serve, store: persist.Store
) -> None:
    """A client that follows worker A's turn through B over 20 connections gets each event once, in order, and the end.

    Fails if a worker knows only its own streams, or does not go on from `Last-Event-ID`. A dropped connection closes
    the files that it had open. Fails, too, if a follower that is cut off is kept (left to the garbage collector, as a
    rule).
    """
    a, b = serve(2)
    words = [f"word{i}" for i in range(40)]
    stream_id = a.start(" ".join(words))
    seen: list[Sent] = []
    connections = 0
    counts = cycle([1, 3, 2])
    while not seen or not seen[-1].name:
        connections += 1
        seen += first_of(b.follow(stream_id, seen[-1].id if seen else None), next(counts))
        assert tokens(seen) == words[: len(tokens(seen))]
    assert connections >= 20
    assert [each.id for each in seen[:-1]] == [str(n) for n in range(1, 41)]
    assert tokens(seen) == words
    assert seen[-1] == Sent("", "finished", "40")
    assert [event.data for event in store.events("s-1", stream_id)] == words
    assert store.load("s-1").data["messages"][-1]["content"] == " ".join(words)
    if Path("/proc/self/fd").exists():
        eventually(lambda: b.event_files_open() == 0)


@pytest.mark.parametrize("is_started_at_once", [False, True], ids=["then started again", "started again at once"])
def test_follower_is_told_that_the_worker_was_killed(
    serve: Serve, store: persist.Store, is_started_at_once: bool
) -> None:
    """After `kill -9` of A in mid-stream, B's follower gets all events and "died".

    B starts a turn, and the prompt is kept. Fails (at the deadline) if no follower looks whether the owner lives. If B
    starts at once, fails if the take-over does not end the events of the dead stream.
    """
    a, b = serve(2)
    stream_id = a.start(LONG_PROMPT)
    followed = b.follow(stream_id)
    events = iter(followed)
    seen = [next(events) for _ in range(5)]
    a.end(signal.SIGKILL)
    if is_started_at_once:
        b.start("again")
    seen += events
    followed.close()
    if not is_started_at_once:
        b.start("again")
    assert (
        tokens(seen) == [event.data for event in store.events("s-1", stream_id)] == LONG_PROMPT.split()[: len(seen) - 1]
    )
    assert seen[-1] == Sent("", "died", str(len(seen) - 1))
    prompt = store.load("s-1").data["messages"][0]
    assert (prompt["content"], prompt["interrupted"]) == (LONG_PROMPT, True)


def test_cursor_that_cannot_be_right_is_refused(serve: Serve, store: persist.Store) -> None:
    """D5: a cursor that is ahead, malformed or of another stream gets an error at once, and no stream that hangs.

    Fails without the look at the cursor before the response, because a response that has begun cannot be refused.
    """
    (server,) = serve(1)
    stream_id = server.start("one two three")
    assert len(first_of(server.follow(stream_id), 4)) == 4
    refusals = {cursor: answer(server.follow(stream_id, cursor)) for cursor in ("4", "x", "-1", "1.5", "other:1", "")}
    ahead, malformed, negative = (410, "EventsNotFound"), (400, "ValueError"), (400, "InvalidArgument")
    assert refusals == {
        "4": ahead,
        "x": malformed,
        "-1": negative,
        "1.5": malformed,
        "other:1": malformed,
        "": malformed,
    }
    assert answer(server.follow("0" * 32)) == (410, "EventsNotFound")
    assert answer(server.follow(stream_id, session_id="s-2")) == (404, "SessionNotFound")
    assert answer(server.follow(".x")) == (400, "InvalidArgument")
    assert answer(server.follow(stream_id, session_id=".x")) == (404, "SessionNotFound")
    assert answer(server.follow(stream_id, session_id="x" * 513)) == (400, "InvalidArgument")
    # A cursor at the last event is right. Only the end follows.
    assert list(server.follow(stream_id, "3")) == [Sent("", "finished", "3")]


def answer(followed: Followed) -> tuple[int, str]:
    return followed.status, followed.body()["error"]


def test_second_turn_is_refused_by_every_worker(serve: Serve, store: persist.Store) -> None:
    """A11: one live stream a session, across workers: 409 while it runs, and 404 without a session.

    Nothing is written.
    """
    a, b = serve(2)
    stream_id = a.start(LONG_PROMPT)
    refused = [worker.request("POST", "/chat/s-1", "me too") for worker in (a, b)]
    assert refused == [(409, {"error": "SessionBusy"})] * 2
    assert b.request("GET", "/events/s-2/x", None) == (404, {"error": "SessionNotFound"})
    session = store.load("s-1")
    assert (session.active_stream_id, len(session.data["messages"])) == (stream_id, 1)


def test_worker_that_is_told_to_stop_finishes_its_turn(serve: Serve, store: persist.Store) -> None:
    """A worker that gets SIGTERM finishes its turn, even without a client.

    Fails if the turn is a task that the server does not know.
    """
    (server,) = serve(1)
    stream_id = server.start("one two three four five")
    first_of(server.follow(stream_id), 1)
    server.end(signal.SIGTERM)
    with store.follow("s-1", stream_id) as following:
        assert [event.data for event in following] == ["one", "two", "three", "four", "five"]
        assert following.ended == "finished"
    assert store.load("s-1").data["messages"][-1]["content"] == "one two three four five"


@pytest.mark.parametrize(
    "halves", ["\ud83d\ude00", "\ud83c\uddf3\ud83c\uddf1", "so \ud83d\udc4d\ud83c\udffd"], ids=ascii
)
def test_an_emoji_in_two_events_is_whole_for_a_client(serve: Serve, store: persist.Store, halves: str) -> None:
    """HAZARDS F14: each token is an event of its own, and a client that joins them has the answer that was saved."""
    (server,) = serve(1)
    with store.start_stream("s-1", {"role": "user", "content": "?"}) as stream:
        for token in halves:
            stream.emit({"token": token})
        stream.finish({"id": "a", "role": "assistant", "content": halves})
    heard = "".join(event["token"] for event in tokens(list(server.follow(stream.id))))
    assert json.loads(json.dumps(heard)) == store.load("s-1").data["messages"][-1]["content"]
