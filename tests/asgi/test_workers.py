"""Several workers on one store, as processes: followed, stopped and resumed through another one, killed, ended.

Each server here has one worker and a port of its own, so that a test can choose the worker that it asks.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx
from actors import Actor, eventually
from harness.chat_servers import DEADLINE_S, ChatServer, Sent, events_in, kill
from harness.pages import ROOT

import persist
from persist.asgi import Echo, OpenAI, create_app
from persist.asgi.serving import responder_named

#: On files and on PostgreSQL. There nobody knows of a killed worker for 15 seconds, so the tests with a kill are not.
both = pytest.mark.parametrize("place", ["files", "postgres"], indirect=True)
LONG = " ".join(f"word{n} ~0.001" for n in range(300))


@pytest.fixture
def two(serve: Callable[..., ChatServer]) -> tuple[ChatServer, ChatServer]:
    with ThreadPoolExecutor(2) as pool:  # both import the package at the same time
        first, second = (pool.submit(serve) for _ in range(2))
        return first.result(), second.result()


def start(server: ChatServer, content: str, message_id: str = "m1") -> str:
    body = {"message": {"id": message_id, "content": content}}
    response = httpx.post(f"{server.url}/api/sessions/s/turns", json=body, timeout=DEADLINE_S)
    assert response.status_code == 201, response.text
    return str(response.json()["stream_id"])


def read(server: ChatServer) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/api/sessions/s", timeout=DEADLINE_S)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def follow(server: ChatServer, stream_id: str, after: str = "", most: int | None = None) -> list[Sent]:
    """Follow a stream to its end, or break off after some events."""
    headers = {"Last-Event-ID": after} if after else {}
    path = f"{server.url}/api/sessions/s/streams/{stream_id}/events"
    found: list[Sent] = []
    with httpx.stream("GET", path, headers=headers, timeout=DEADLINE_S) as response:
        for event in events_in(response.iter_lines()):
            found.append(event)
            if len(found) == most:
                break
    return found


@both
def test_a_cut_connection_goes_on_at_another_worker(two: tuple[ChatServer, ChatServer]) -> None:
    """A client that is cut off again and again, and lands on the other worker each time, misses and repeats nothing."""
    stream_id = start(two[0], LONG)
    seen: list[Sent] = []
    for server in cycle(two):
        seen += follow(server, stream_id, seen[-1].id if seen else "", most=23)
        if seen[-1].event == "end":
            break
    assert [each.id for each in seen[:-1]] == [str(n) for n in range(1, 301)]
    assert "".join(each.data["text"] for each in seen[:-1]) == "".join(f"word{n} " for n in range(300))
    assert seen[-1].data["how"] == "finished"


@both
def test_a_turn_is_known_and_stopped_at_another_worker(two: tuple[ChatServer, ChatServer]) -> None:
    """The other worker shows the turn as live, refuses another one, knows a repeated message, and stops it."""
    a, b = two
    stream_id = start(a, "a ~")
    assert read(b)["stream"]["live"] is True
    path = f"{b.url}/api/sessions/s"
    busy = httpx.post(f"{path}/turns", json={"message": {"id": "m2", "content": "x"}}).json()
    assert busy["owner"]["pid"] in a.workers()
    again = httpx.post(f"{path}/turns", json={"message": {"id": "m1", "content": "a ~"}})
    assert (again.status_code, again.json()["stream_id"]) == (200, stream_id)
    assert httpx.post(f"{path}/streams/{stream_id}/stop").json() == {"stopped": True}
    seen = follow(b, stream_id)
    assert seen[-1].data["how"] == "stopped"
    assert follow(a, stream_id) == seen
    assert read(b)["stream"] is None


def test_a_killed_worker_leaves_its_part_and_a_retry_answers_at_the_other(
    two: tuple[ChatServer, ChatServer], store: persist.Store
) -> None:
    """After kill -9 a follower learns that the turn is lost, any reader sees a partial answer, and a retry runs."""
    a, b = two
    stream_id = start(a, "one two ~")
    eventually(lambda: len(store.tail("s")) == 2)  # the first checkpoint
    (worker,) = a.workers()
    a.process.send_signal(signal.SIGSTOP)  # no new worker sweeps here
    kill(worker)
    assert read(b)["stream"] is None
    assert follow(b, stream_id)[-1].data["how"] == "lost"
    prompt, partial = read(b)["messages"]
    assert (partial["partial"], partial["content"]) == (True, "one two ")
    again = httpx.post(f"{b.url}/api/sessions/s/turns", json={"message": {"id": "m1", "content": prompt["content"]}})
    assert (again.status_code, again.json()["stream_id"]) == (200, stream_id)
    retried = httpx.post(f"{b.url}/api/sessions/s/retry")
    assert retried.status_code == 201
    assert [m["id"] for m in read(b)["messages"] if m["role"] == "user"] == ["m1"]
    assert httpx.post(f"{b.url}/api/sessions/s/streams/{retried.json()['stream_id']}/stop").json() == {"stopped": True}


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
def test_a_lost_machine_is_told_and_its_turn_is_retried(client_of: Callable[..., httpx.Client], place: str) -> None:
    """A follower learns after the lease that the turn is lost, and a retry answers the same prompt."""
    client = client_of(store=persist.Store(place, lease_s=1.0))
    other = Actor(place, lease_s=1.0)
    prompt = {"id": "m1", "role": "user", "content": "one"}
    other.do(f"stream = store.start_stream('s', {prompt!r}, create=True)")
    path = f"/api/sessions/s/streams/{other.do('stream.id')}/events"
    with client.stream("GET", path) as response:
        other.kill()
        assert [each.data["how"] for each in events_in(response.iter_lines())] == ["lost"]
    retried = client.post("/api/sessions/s/retry")
    assert retried.status_code == 201
    with client.stream("GET", f"/api/sessions/s/streams/{retried.json()['stream_id']}/events") as response:
        *_, end = events_in(response.iter_lines())
    assert end.data["how"] == "finished"
    assert [(each["role"], each["content"]) for each in client.get("/api/sessions/s").json()["messages"]] == [
        ("user", "one"),
        ("assistant", "one "),
    ]


def test_a_new_turn_starts_over_a_dead_one(two: tuple[ChatServer, ChatServer]) -> None:
    """Nobody need look first: a new message is answered although the worker of the turn before was killed."""
    a, b = two
    start(a, "a ~")
    (worker,) = a.workers()
    a.process.send_signal(signal.SIGSTOP)
    kill(worker)
    assert follow(b, start(b, "b", "m2"))[-1].data["how"] == "finished"
    assert [m["content"] for m in read(b)["messages"] if m["role"] == "user"] == ["a ~", "b"]


def test_a_worker_that_starts_clears_what_a_killed_one_left(
    serve: Callable[..., ChatServer], store: persist.Store
) -> None:
    """The sweep at the start needs no reader."""
    server = serve()
    start(server, "a ~")
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: store.load("s").active_stream_id is None)
    eventually(lambda: httpx.get(f"{server.url}/healthz", timeout=DEADLINE_S).status_code == 200)


@both
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_keeps_what_was_said(
    serve: Callable[..., ChatServer], store: persist.Store, signal_number: signal.Signals, tmp_path: Path
) -> None:
    """Turns end, their followers learn how, no worker stays, the exit status is 0, and nothing is wrong in the log."""
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        server = serve(workers=2, stderr=stderr)
    stream_id = start(server, "a b ~")
    with httpx.stream("GET", f"{server.url}/api/sessions/s/streams/{stream_id}/events", timeout=DEADLINE_S) as response:
        events = events_in(response.iter_lines())
        assert [next(events).data["text"] for _ in "ab"] == ["a ", "b "]
        workers = server.workers()
        assert len(workers) == 2
        server.process.send_signal(signal_number)
        assert [each.data["how"] for each in events] == ["failed"]
    assert server.process.wait(DEADLINE_S) == 0
    assert "ASGI" not in log.read_text()
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    session = store.load("s")
    assert session.active_stream_id is None
    answer = session.data["messages"][-1]
    assert (answer["content"], answer["interrupted"]) == ("a b ", True)


@pytest.mark.parametrize("path", ["api/sessions/s/streams/{}/events", "api/chat/s/stream"])
def test_a_follower_is_let_go_by_a_server_that_ends(two: tuple[ChatServer, ChatServer], path: str) -> None:
    """A turn of another server goes on. Its follower gets a whole response, and no word that the turn has ended."""
    a, b = two
    stream_id = start(a, "a ~")
    with httpx.stream("GET", f"{b.url}/{path.format(stream_id)}", timeout=DEADLINE_S) as response:
        events = events_in(response.iter_lines())
        eventually(lambda: "a " in str(next(events).data))
        b.process.terminate()
        told = [each.event or each.data for each in events]
    assert told in ([], [{"type": "error", "errorText": "This server ends. Load the page again to read on."}, "[DONE]"])
    assert bool(told) == path.startswith("api/chat")
    assert read(a)["stream"]["live"] is True


def test_workers_end_with_their_parent(serve: Callable[..., ChatServer]) -> None:
    """A parent that is killed leaves no worker that would hold the port."""
    server = serve(workers=2)
    assert httpx.get(f"{server.url}/healthz", timeout=DEADLINE_S).status_code == 200
    eventually(lambda: len(server.workers()) == 2)
    workers = server.workers()
    server.process.kill()
    server.process.wait(DEADLINE_S)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_server_writes_what_went_wrong(serve: Callable[..., ChatServer], tmp_path: Path) -> None:
    """Its standard error has the traceback of a responder, with the session, and a line for a worker that died."""
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        server = serve(stderr=stderr)
    assert follow(server, start(server, "!"))[-1].data["how"] == "failed"
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: f"Worker {worker} died with status -9" in log.read_text())
    told = log.read_text()
    assert "Session 's': the answer broke off" in told
    assert "RuntimeError: The script says so." in told


def refusal(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "persist", "serve", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_server_that_cannot_serve_says_why(serve: Callable[..., ChatServer], tmp_path: Path) -> None:
    """A taken port, an unknown responder, and a file in the directory's place are refused in one line."""
    taken = serve().url.rpartition(":")[2]
    for arguments, words in {
        (tmp_path / "a", "--port", taken): "cannot be listened at",
        (tmp_path / "b", "--port", 0, "--responder", "nothing"): "module:name of a responder",
        (tmp_path / "b", "--port", 0, "--responder", "no_such_module:answer"): "has no module no_such_module",
        (tmp_path / "c", "--port", 0, "--host", "192.0.2.1"): "cannot be listened at",
        (tmp_path / "d", "--port", 0, "--origin", "chat.example.org"): "https://chat.example.org",
        (__file__, "--port", 0): "directory",
    }.items():
        status, said = refusal(*arguments)
        assert status == 3
        assert words in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (None, "answering:answer", "{directory} has no module answering"),
        ("import no_such_thing", "answering:answer", "No module named 'no_such_thing'"),
        ("from os import no_such_name", "answering:answer", "cannot import name 'no_such_name'"),
        ("async def anser(conversation): yield", "answering:answer", "answering has no answer"),
        ("def answer(:", "answering:answer", "line 1 of {directory}/answering.py"),
        ("1 / 0", "answering:answer", "ZeroDivisionError"),
        ("async def answer(conversation): return []", "answering:answer", "async generator function"),
        ("def answer(conversation): yield", "answering:answer", "async generator function"),
        ("answer = 7", "answering:answer", "async generator function"),
        ("class answer:\n  async def __call__(self, c): yield", "answering:answer", "async generator function"),
        ("class A:\n  async def __call__(self, c): pass\nanswer = A()", "answering:answer", "async generator function"),
        (None, "openai", "OPENAI_MODEL"),
    ],
)
def test_a_responder_that_cannot_answer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, name: str, words: str
) -> None:
    """The message names the real reason, before anything is served."""
    if code is not None:
        (tmp_path / "answering.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "answering", raising=False)
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(persist.InvalidArgument, match=re.escape(words.format(directory=tmp_path))):
        responder_named(name)


def test_an_address_of_a_model_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_MODEL", "small")
    monkeypatch.setenv("OPENAI_BASE_URL", "127.0.0.1:11434/v1")
    with pytest.raises(persist.InvalidArgument, match=r"OPENAI_BASE_URL is '127\.0\.0\.1:11434/v1'"):
        responder_named("openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:11434/v1")
    assert responder_named("openai") == OpenAI()


def test_what_returns_an_async_iterator_may_answer(tmp_path: Path) -> None:
    """A plain function, an object with an async generator as its call, and a part of one of these are no mistakes."""
    for responder in (lambda conversation: aiter(Echo()(conversation)), Echo(), partial(Echo.__call__, Echo())):
        assert create_app(tmp_path, responder)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ((), 421, "Only this machine can reach the server"),
        (("--host", "0.0.0.0"), 200, "Warning: 0.0.0.0 can be reached from other machines"),
    ],
    ids=["this-machine", "other-machines"],
)
def test_a_server_says_who_can_reach_it(tmp_path: Path, options: tuple[str, ...], status: int, words: str) -> None:
    """It binds this machine and knows no other name, unless it is told otherwise. Then it warns."""
    command = [sys.executable, "-m", "persist", "serve", str(tmp_path / "s"), "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address, _, port = process.stdout.readline().strip().rpartition(":")
    assert address == f"http://{options[1] if options else '127.0.0.1'}"
    response = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"Host": "chat.lan"}, timeout=DEADLINE_S)
    assert response.status_code == status
    process.terminate()
    _, said = process.communicate(timeout=DEADLINE_S)
    assert said.startswith(words)
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
@pytest.mark.parametrize(("given", "taken"), [(None, "2"), ("4", "4")])
def test_workers_keep_freed_memory_together(
    serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch, given: str | None, taken: str
) -> None:
    """The C library of a worker gets few arenas for its many threads, unless the user says how many."""
    if given is None:
        monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    else:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    server = serve()
    eventually(lambda: len(server.workers()) == 1)
    (worker,) = server.workers()
    assert f"MALLOC_ARENA_MAX={taken}".encode() in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
def test_workers_open_as_many_files_as_they_may(serve: Callable[..., ChatServer]) -> None:
    """With the usual limit of 1,024, some 500 followers would break off the turns of others."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        server = serve()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    eventually(lambda: len(server.workers()) == 1)
    (worker,) = server.workers()

    def limits() -> list[str]:
        lines = Path(f"/proc/{worker}/limits").read_text().splitlines()
        return next(line for line in lines if line.startswith("Max open files")).split()[3:5]

    eventually(lambda: len({*limits()}) == 1)
