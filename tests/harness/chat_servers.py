"""Chat servers as processes, and the Server-Sent Events that they send."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
import uvicorn
from actors import eventually

from harness.pages import ROOT
from persist.asgi.serving import address_of, listen

DEADLINE_S = 60.0
SCRIPTED = "harness.scripted:scripted"


@dataclass(frozen=True, slots=True)
class Sent:
    """A Server-Sent Event, its data as JSON."""

    event: str
    data: Any
    id: str = ""


class _Reading:
    """Lines of a response, as they add up to events. Comments and events without data are left out."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def event_of(self, line: str) -> Sent | None:
        """Take a line, and return the event that it completes."""
        name, _, value = line.rstrip("\r\n").partition(":")
        if name:
            self._fields[name] = value.removeprefix(" ")
            return None
        if line.strip():
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        data = fields["data"]
        return Sent(fields.get("event", ""), data if data == "[DONE]" else json.loads(data), fields.get("id", ""))


def events_in(lines: Iterable[str]) -> Iterator[Sent]:
    """Yield the events of a response, line by line."""
    reading = _Reading()
    yield from filter(None, map(reading.event_of, lines))


async def events_in_async(lines: AsyncIterable[str]) -> AsyncIterator[Sent]:
    """Yield the events of a response, line by line, as they come."""
    reading = _Reading()
    async for line in lines:
        event = reading.event_of(line)
        if event is not None:
            yield event


@contextmanager
def client_of_app(app: Any) -> Iterator[httpx.Client]:
    """Serve an app in a thread of this process, and yield a client of it."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with httpx.Client(base_url=address_of(listening, "127.0.0.1"), timeout=DEADLINE_S) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listening.close()
        assert not thread.is_alive(), "the server did not end"


class ChatServer:
    """`persist serve` as a process, on a port of its own."""

    def __init__(
        self,
        place: Path | str,
        *options: str,
        workers: int = 1,
        responder: str = SCRIPTED,
        stderr: IO[str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "persist", "serve", str(place), "--port", "0", "--workers", str(workers)]
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        self.process = subprocess.Popen(
            [*command, "--responder", responder, *options],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        assert ready, "the server printed no address"
        self.url = self.process.stdout.readline().strip()
        assert urlsplit(self.url).hostname == "127.0.0.1", self.url

    def workers(self) -> list[int]:
        """Return the process ids of the workers that are there now."""
        return children_of(self.process.pid, "spawn_main")

    def end(self) -> int:
        """Ask the server to end, and return its exit status."""
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End the server and its workers, whatever they do."""
        close_server(self)


def children_of(parent: int, word: str) -> list[int]:
    """Return the process ids of a process's children, of those with a word in their command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = entry.read_text().partition(" (")
            command = (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(rest.rpartition(")")[2].split()[1]) == parent and word.encode() in command:
            found.append(int(pid))
    return sorted(found)


def close_server(server: Any) -> None:
    """Kill a server and its workers."""
    workers = server.workers()
    server.process.kill()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait(DEADLINE_S)
    if server.process.stdout is not None:
        server.process.stdout.close()


def kill(worker: int) -> None:
    """Kill a worker, and return when it is over. The kernel needs a moment for that."""
    os.kill(worker, signal.SIGKILL)
    state = Path(f"/proc/{worker}/stat")
    eventually(lambda: not state.exists() or state.read_text().rpartition(") ")[2][0] in "ZX")
