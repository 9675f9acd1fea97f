"""The example server, as adopters run it: several real server processes on one directory, killed and asked over HTTP.

The tests poll the servers' own answers, with a deadline. They assert state, never that time has passed.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from persist import Store

SCRIPT = Path(__file__).parents[2] / "scripts" / "example_server.py"
DEADLINE_S = 30.0
# The echo takes 20 ms a word, so it outlasts every test.
LONG_PROMPT = " ".join(f"word{i}" for i in range(10_000))

Found = TypeVar("Found")


def until(look: Callable[[], Found | None], wanted: str) -> Found:
    """Look again and again until the look returns something."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {wanted}"
        time.sleep(0.01)
    return found


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    host: str
    port: int

    def request(self, method: str, path: str, body: str | None = None) -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection(self.host, self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def get(self, path: str) -> dict[str, Any]:
        status, reply = self.request("GET", path)
        assert status == 200, reply
        return reply

    def post(self, path: str, **fields: str) -> dict[str, Any]:
        status, reply = self.request("POST", path, json.dumps(fields))
        assert status == 200, reply
        return reply

    def session(self, session_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.get(f"/api/session?session_id={session_id}")["session"]
        return shown

    def status(self, session_id: str) -> dict[str, Any]:
        return self.get(f"/api/chat/stream/status?session_id={session_id}")

    def listed(self, session_id: str) -> dict[str, Any]:
        rows = self.get("/api/sessions")["sessions"]
        row: dict[str, Any] = next(row for row in rows if row["session_id"] == session_id)
        return row

    def start(self, session_id: str, message: str) -> str:
        return str(self.post("/api/chat/start", session_id=session_id, message=message)["stream_id"])

    def begin_long_turn(self) -> tuple[str, str]:
        """Start a turn in a new session, and return (session id, stream id) once a part of its answer is durable."""
        session_id = self.post("/api/session/new")["session"]["session_id"]
        stream_id = self.start(session_id, LONG_PROMPT)
        until(lambda: partial_of(self.session(session_id)), "a part of the answer")
        return session_id, stream_id

    def end(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(DEADLINE_S)


def partial_of(session: dict[str, Any]) -> str | None:
    return next((str(m["content"]) for m in session["messages"] if m["role"] == "assistant"), None)


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
    assert ready, "the server printed no address"
    return process.stdout.readline().strip()


@pytest.fixture
def serve(directory: Path) -> Iterator[Callable[[], Server]]:
    """Start a server process on the test's one store directory."""
    processes: list[subprocess.Popen[str]] = []

    def start() -> Server:
        command = [sys.executable, str(SCRIPT), "--store", str(directory), "--port", "0", "--delay-s", "0.02"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        url = urlsplit(address_of(process))
        assert url.hostname == "127.0.0.1"
        assert url.port is not None
        return Server(process, url.hostname, url.port)

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def test_a_finished_answer_is_whole_and_leaves_the_session_idle(serve: Callable[[], Server]) -> None:
    """A turn leaves its prompt and its answer, once each, and no stream fields."""
    server = serve()
    session_id = server.post("/api/session/new")["session"]["session_id"]
    stream_id = server.start(session_id, "hello there")
    until(lambda: not server.status(session_id)["active"], "the end of the turn")
    session = server.session(session_id)
    assert session["messages"] == [
        {"id": f"{stream_id}.prompt", "role": "user", "content": "hello there"},
        {"id": f"{stream_id}.answer", "role": "assistant", "content": "You said: hello there"},
    ]
    assert (session["active_stream_id"], session["pending_user_message"], session["pending_started_at"]) == (
        None,
        None,
        None,
    )


def test_a_stream_of_one_server_is_running_for_the_other(serve: Callable[[], Server]) -> None:
    """A11: the second server sees the first one's turn and refuses a second one, naming the owner."""
    a, b = serve(), serve()
    session_id, stream_id = a.begin_long_turn()
    status = b.status(session_id)
    assert (status["active"], status["stream_id"], status["owner"]["pid"]) == (True, stream_id, a.process.pid)
    assert b.listed(session_id)["active_stream_id"] == stream_id
    body = json.dumps({"session_id": session_id, "message": "me too"})
    code, reply = b.request("POST", "/api/chat/start", body)
    assert (code, reply["stream_id"], reply["owner"]["pid"]) == (409, stream_id, a.process.pid)
    assert "me too" not in [message["content"] for message in b.session(session_id)["messages"]]


def test_loading_a_session_leaves_a_live_stream_alone(serve: Callable[[], Server]) -> None:
    """A7: a load through another server clears no live stream, and the turn goes on."""
    a, b = serve(), serve()
    session_id, stream_id = a.begin_long_turn()
    before = partial_of(b.session(session_id)) or ""

    def grown() -> dict[str, Any] | None:
        session = b.session(session_id)
        assert session["active_stream_id"] == stream_id
        return session if len(partial_of(session) or "") > len(before) else None

    session = until(grown, "more of the answer")
    assert not any(message.get("interrupted") for message in session["messages"])


def test_a_cancel_through_the_other_server_ends_the_turn(serve: Callable[[], Server]) -> None:
    """A cancel reaches the owner in another process, which ends its turn and keeps prompt and partial."""
    a, b = serve(), serve()
    session_id, stream_id = a.begin_long_turn()
    assert b.post("/api/chat/cancel", session_id=session_id, stream_id="another")["cancelled"] is False
    assert b.post("/api/chat/cancel", session_id=session_id, stream_id=stream_id)["cancelled"] is True
    until(lambda: not b.status(session_id)["active"], "the end of the cancelled turn")
    assert a.process.poll() is None
    session = b.session(session_id)
    assert [(m["role"], m["interrupted"]) for m in session["messages"]] == [("user", True), ("assistant", True)]
    assert session["messages"][0]["content"] == LONG_PROMPT
    assert a.start(session_id, "again") != stream_id


def test_a_load_through_the_other_server_clears_what_a_killed_one_left(
    serve: Callable[[], Server], store: Store
) -> None:
    """#1533, B3, B7: after kill -9 a load clears the stream, loses no text and keeps `updated_at`.

    A new turn can start then.
    """
    a, b = serve(), serve()
    session_id, stream_id = a.begin_long_turn()
    a.end(signal.SIGKILL)
    before = store.load(session_id)
    assert before.active_stream_id == stream_id
    assert b.listed(session_id)["active_stream_id"] is None
    assert store.load(session_id).revision == before.revision, "a list repairs nothing"

    session = b.session(session_id)
    assert session["active_stream_id"] is None
    assert session["updated_at"] == before.updated_at.isoformat()
    assert session["messages"] == [{**message, "interrupted": True} for message in before.data["messages"]]
    assert [message["role"] for message in session["messages"]] == ["user", "assistant"]
    assert b.start(session_id, "again") != stream_id
    assert b.status(session_id)["owner"]["pid"] == b.process.pid


def test_a_start_takes_over_from_a_killed_server(serve: Callable[[], Server]) -> None:
    """A start over a stale stream clears it and starts, without a load before."""
    a, b = serve(), serve()
    session_id, stream_id = a.begin_long_turn()
    a.end(signal.SIGKILL)
    again = b.start(session_id, LONG_PROMPT)
    session = b.session(session_id)
    assert session["active_stream_id"] == again != stream_id
    assert [(m["content"], m.get("interrupted", False)) for m in session["messages"] if m["role"] == "user"] == [
        (LONG_PROMPT, True),
        (LONG_PROMPT, False),
    ]


def test_a_server_that_starts_clears_what_a_killed_one_left(serve: Callable[[], Server], store: Store) -> None:
    """A server sweeps at its start, before it serves the first request."""
    a = serve()
    session_id, _ = a.begin_long_turn()
    a.end(signal.SIGKILL)
    serve()
    session = store.load(session_id)
    assert session.active_stream_id is None
    assert all(message["interrupted"] for message in session.data["messages"])


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_ends_its_turns(
    serve: Callable[[], Server], store: Store, signal_number: signal.Signals
) -> None:
    """A server that is stopped fails its turns before it exits, so nothing is left to be cleared."""
    server = serve()
    session_id, _ = server.begin_long_turn()
    assert server.end(signal_number) == 0
    session = store.load(session_id)
    assert (session.active_stream_id, store.streams()) == (None, [])
    assert all(message["interrupted"] for message in session.data["messages"])


@pytest.mark.parametrize("text", ["\ud83d", "😀\ud83d !", "\ude00\ud83d"], ids=ascii)
def test_half_an_emoji_is_answered(serve: Callable[[], Server], store: Store, text: str) -> None:
    """HAZARDS F14: a lone surrogate in a session gives no status 500, in any answer that shows it."""
    server = serve()
    store.create("s", {"title": text, text: text, "messages": [{"id": "m", "role": "user", "content": text}]})
    server.start("s", f"so {text}")
    until(lambda: server.session("s")["active_stream_id"] is None, "the end of the turn")
    shown = server.session("s")
    assert [message["content"] for message in shown["messages"]] == [text, f"so {text}", f"You said: so {text}"]
    assert shown[text] == server.listed("s")["title"] == text


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/session?session_id=missing", None, 404),
        ("GET", "/api/chat/stream/status?session_id=missing", None, 404),
        ("POST", "/api/chat/start", '{"session_id": "missing", "message": "hi"}', 404),
        ("POST", "/api/chat/cancel", '{"session_id": "missing", "stream_id": "s"}', 404),
        ("GET", "/api/nothing", None, 404),
        ("GET", "/api/session/new", None, 404),
        ("GET", "/api/session", None, 400),
        ("GET", "/api/session?session_id=../etc", None, 404),
        ("GET", f"/api/session?session_id={'x' * 513}", None, 400),
        ("POST", "/api/chat/start", '{"session_id": "missing"}', 400),
        ("POST", "/api/chat/start", '{"session_id": "missing", "message": 7}', 400),
        ("POST", "/api/chat/start", "not JSON", 400),
        ("POST", "/api/chat/start", "[]", 400),
    ],
)
def test_a_refused_request_says_why(
    serve: Callable[[], Server], method: str, path: str, body: str | None, status: int
) -> None:
    """An error is JSON with a reason, and has a status that fits it."""
    code, reply = serve().request(method, path, body)
    assert code == status
    assert reply["error"]


@pytest.mark.parametrize(
    "wrong",
    [(), ("--port", 70_000), ("--port", -1), ("--delay-s", -1), ("--delay-s", "nan"), ("--store",), ("--sto", "x")],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, wrong: tuple[object, ...]) -> None:
    """The server refuses them with its usage and a reason, and makes nothing."""
    arguments = ("--store", tmp_path / "chats", *wrong) if wrong and wrong[0] not in ("--store", "--sto") else wrong
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
    assert f"{SCRIPT.name}: error: " in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
