"""Workers of the chat server, each a process with a port of its own, on one directory. A test sets their pace.

Their model echoes the prompt word by word. It says as many words as the test has allowed, and then waits.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import persist
from harness.planted import PACKAGE_PARENT, environment


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
    """A worker that was started."""

    process: subprocess.Popen[str]

    @cached_property
    def url(self) -> str:
        """The address of its page. It listens there when this is known."""
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        assert url, "the worker did not start"
        return url

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].partition("/")[0])

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it as the end of a test does, in whatever state it is."""
        self.process.send_signal(signal.SIGCONT)
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def start(directory: Path, pace: Pace, *options: str) -> Worker:
    """Start a worker."""
    command = [sys.executable, "-m", "harness.chat_workers", str(directory), str(pace.path), *options]
    return Worker(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(PACKAGE_PARENT)))


@dataclass
class Chat:
    """Workers on one directory, with one pace."""

    directory: Path
    pace: Pace
    workers: list[Worker] = field(default_factory=list)

    def start(self, *options: str) -> Worker:
        self.workers.append(start(self.directory, self.pace, *options))
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
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.routing import Mount

    from persist.asgi import Part, Reasoning, Text, ToolInput, ToolOutput, create_app
    from persist.asgi.responder import Conversation

    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("pace", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--keep-events-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--users", action="store_true", help="a user, who is named by X-User, has the sessions USER:…")
    options = parser.parse_args()
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
    listening = socket.create_server(("127.0.0.1", options.port))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}{options.prefix}/", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)).run(sockets=[listening])


if __name__ == "__main__":
    main()
