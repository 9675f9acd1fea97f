"""Workers of the chat server, each a process with a port of its own, on one directory. A test sets their pace.

Their model echoes the prompt word by word. It says as many words as the test has allowed, and then waits.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import persist
from harness.planted import PACKAGE_PARENT, environment

#: uvicorn and anyio import these when a server starts.
_IMPORTED_LATE = (
    "anyio._backends._asyncio",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)


class Pace:
    """How many words an answer may have by now. It is a file, so that all workers know it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def allow(self, words: int) -> None:
        """Let each answer have so many words."""
        before = self.path.with_suffix(".new")
        before.write_text(str(words))
        before.rename(self.path)

    @property
    def words(self) -> int:
        return int(self.path.read_text())


@dataclass
class Worker:
    """A worker that was started. It listens at `url`, the address of its page."""

    pid: int
    url: str

    def __post_init__(self) -> None:
        self._descriptor = os.pidfd_open(self.pid)  # it is not a child of this process

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].partition("/")[0])

    def send(self, signal_number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal_number)

    def wait(self) -> None:
        """Return when it is gone."""
        gone, _, _ = select.select([self._descriptor], [], [], 20.0)
        assert gone, "the worker did not end"

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.send(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End it as the end of a test does, in whatever state it is."""
        self.kill()
        os.close(self._descriptor)


class Forker:
    """A process that has imported the server, and has done nothing else. Each worker is forked from it.

    The imports take far longer than most tests do.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "harness.chat_workers"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(PACKAGE_PARENT)
        )

    def start(self, directory: Path, pace: Pace, *options: str) -> Worker:
        """Start a worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(directory), str(pace.path), *options]), file=self._process.stdin, flush=True)
        pid, _, url = self._process.stdout.readline().strip().partition(" ")
        assert pid.isdigit(), f"the worker did not start: {pid} {url}"
        return Worker(int(pid), url)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Chat:
    """Workers on one directory, with one pace."""

    directory: Path
    pace: Pace
    forker: Forker
    workers: list[Worker] = field(default_factory=list)

    def start(self, *options: str) -> Worker:
        self.workers.append(self.forker.start(self.directory, self.pace, *options))
        return self.workers[-1]

    @property
    def store(self) -> persist.Store:
        return persist.Store(self.directory, timeout_s=20.0)

    def wait_until_kept(self, session_id: str, text: str) -> None:
        """Wait until the running answer is stored as far as this text. A crash then keeps it."""
        store, deadline = self.store, time.monotonic() + 20
        while store.tail(session_id)[-1]["content"] != text:
            assert time.monotonic() < deadline, "the answer was not stored"
            time.sleep(0.01)


def main() -> None:
    """Fork a worker for each line of arguments, and write its process id and its address."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("pace", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--keep-events-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--users", action="store_true", help="a user, who is named by X-User, has the sessions USER:…")
    for module in ("persist.asgi", *_IMPORTED_LATE):
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so no worker stays as a zombie
    for line in sys.stdin:
        options = parser.parse_args(json.loads(line))
        try:
            listening = socket.create_server(("127.0.0.1", options.port))
        except OSError as error:
            print(error, flush=True)
            continue
        with listening:
            pid = os.fork()
            if not pid:
                _serve(options, listening)
                os._exit(0)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}{options.prefix}/"
        print(pid, url, flush=True)


def _serve(options: argparse.Namespace, listening: socket.socket) -> None:
    """Serve in a worker that was just forked."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.routing import Mount

    from persist.asgi import Part, Reasoning, Text, ToolInput, ToolOutput, create_app
    from persist.asgi.responder import Conversation

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with Path(os.devnull).open("r+") as nothing:
        for descriptor in (0, 1):
            os.dup2(nothing.fileno(), descriptor)
    pace = Pace(options.pace)

    async def echo(conversation: Conversation) -> AsyncIterator[Part]:
        prompt = conversation.prompt
        if prompt.startswith("think"):
            yield Reasoning(prompt)
            yield ToolInput("call", prompt, {"of": prompt})
            yield ToolOutput("call", prompt)
        for said, word in enumerate(re.findall(r"\s*\S+|\s+$", prompt)):
            while said >= pace.words:  # noqa: ASYNC110 - the test is another process
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)
            yield Text(word)

    def prefix(request: Request) -> str:
        return f"{request.headers.get('X-User')}:"

    store = persist.Store(options.directory, keep_events_bytes=options.keep_events_bytes)
    app: Any = create_app(store, echo, prefix=prefix if options.users else None, checkpoint_s=0.02)
    if options.prefix:
        app = Starlette(routes=[Mount(options.prefix, app=app)], lifespan=app.router.lifespan_context)
    uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)).run(sockets=[listening])


if __name__ == "__main__":
    main()
