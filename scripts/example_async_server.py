#!/usr/bin/env python3
"""A small asynchronous chat server on `persist.aio` and Starlette, to copy from.

Any number of servers may run on one directory.

    scripts/example_async_server.py --store var/chats --port 8080

    POST /chat/{session_id}   (the prompt)    -> 202 {"stream_id"}, or 409 with that of the turn that runs;
                                                 makes the session
    GET  /events/{session_id}/{stream_id}     -> Server-Sent Events, those behind `Last-Event-ID` or `?after=`
    POST /cancel/{session_id}/{stream_id}     -> {"cancelled"}
    GET  /session/{session_id}                -> the session; clears a stale stream first

The first line that the server prints is its address. It knows no users, so keep it on 127.0.0.1.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__" and importlib.util.find_spec("persist") is None:
    # In a checkout any Python can start this, because it goes on in the project's own environment. Leave this block out
    # of a copy.
    root = Path(__file__).resolve().parent.parent
    subprocess.run([root / "scripts" / "setup-venv"], check=True)
    os.execl(root / ".venv/bin/python", root / ".venv/bin/python", __file__, *sys.argv[1:])

import argparse
import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import persist.aio

STATUSES: dict[Any, int] = {
    persist.SessionNotFound: 404,
    persist.EventsNotFound: 410,
    persist.SessionBusy: 409,
    persist.InvalidArgument: 400,
    persist.LockTimeout: 503,
}


class AsciiJSON(JSONResponse):
    """A response as JSON in ASCII, because half an emoji has no UTF-8, and a model may have cut one in two."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Chat:
    """The routes, and the turns of this process.

    The store knows which stream lives. Its answer holds for all processes.
    """

    def __init__(self, store: persist.aio.Store, delay_s: float) -> None:
        self._store, self._delay_s = store, delay_s
        self._turns: set[asyncio.Task[None]] = set()  # the loop itself keeps no reference to a task

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Clear the streams of dead servers, and end the turns when the server ends.

        The prompt and the partial answer of a turn are kept, and marked as interrupted.
        """
        await self._store.clear_stale_streams()
        yield
        for turn in self._turns:
            turn.cancel()
        await asyncio.gather(*self._turns, return_exceptions=True)

    async def session(self, request: Request) -> AsciiJSON:
        session = await self._store.load(request.path_params["session_id"])
        if session.active_stream_id is not None and not await session.clear_stale_stream():
            await session.refresh()  # it is alive, or the session moved on since it was loaded
        return AsciiJSON(session.data)

    async def chat(self, request: Request) -> AsciiJSON:
        session_id, prompt = request.path_params["session_id"], (await request.body()).decode("utf-8", "replace")
        with suppress(persist.SessionExists):
            await self._store.create(session_id, {"messages": []})
        stream = await self._store.start_stream(session_id, {"role": "user", "content": prompt})
        turn = asyncio.create_task(self._run_turn(stream, prompt))
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)
        return AsciiJSON({"stream_id": stream.id}, 202)

    async def _run_turn(self, stream: persist.aio.Stream, prompt: str) -> None:
        words = ["You said:", *prompt.split()]  # this model only echoes
        with suppress(persist.StreamLost):  # the session was deleted, or taken away: the turn is over
            async with stream:
                for count, word in enumerate(words, 1):
                    await asyncio.sleep(self._delay_s)
                    if await stream.is_cancelled():
                        return  # without finish(): prompt and partial answer are kept, marked as interrupted
                    await stream.emit({"token": word})
                    if count % 20 == 0:  # if this process is killed, the session lacks the words after it
                        await stream.checkpoint({"role": "assistant", "content": " ".join(words[:count])})
                await stream.finish({"role": "assistant", "content": " ".join(words)})

    async def events(self, request: Request) -> EventSourceResponse:
        # The events are opened here, so that an error in the cursor is raised before the response begins.
        following = await self._store.follow(**request.path_params, after=offset_in(request))
        return EventSourceResponse(told(following), ping=5)  # a sign of life for proxies

    async def cancel(self, request: Request) -> AsciiJSON:
        return AsciiJSON({"cancelled": await self._store.cancel(**request.path_params)})


async def told(following: persist.aio.Following) -> AsyncIterator[dict[str, Any]]:
    async with following:
        async for event in following:
            yield {"id": f"{following.stream_id}:{event.offset}", "data": json.dumps(event.data)}
        yield {"event": following.ended, "data": following.offset}


def offset_in(request: Request) -> int:
    # A browser sends the header when it reconnects. It cannot send the header when the page was loaded anew.
    cursor = request.headers.get("Last-Event-ID", request.query_params.get("after", "0"))
    offset = cursor.removeprefix(f"{request.path_params['stream_id']}:")
    if not re.fullmatch("[0-9]{1,18}", offset):
        raise HTTPException(400, "The cursor is malformed, or of another stream.")
    return int(offset)


async def refuse(_request: Request, error: Exception) -> AsciiJSON:
    # The reply leaves out the error's text, because it names files.
    running = {"stream_id": error.stream_id} if isinstance(error, persist.SessionBusy) else {}
    return AsciiJSON({"error": type(error).__name__, **running}, STATUSES[type(error)])


def main() -> None:
    parser = argparse.ArgumentParser(description="A small asynchronous chat server on persist.", allow_abbrev=False)
    parser.add_argument(
        "--store", "--directory", type=Path, required=True, help="directory of the sessions; made if it is missing"
    )
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes any free port")
    parser.add_argument("--delay-s", type=float, default=0.05, help="seconds that the model takes for a word")
    options = parser.parse_args()
    if not 0 <= options.port <= 65_535:
        parser.error("argument --port: must be from 0 to 65535")
    if not 0 <= options.delay_s <= threading.TIMEOUT_MAX:
        parser.error("argument --delay-s: must be at least 0")
    try:
        chat = Chat(persist.aio.Store(options.store), options.delay_s)
    except (persist.PersistError, OSError) as error:
        sys.exit(str(error))
    try:
        listening = socket.create_server(("127.0.0.1", options.port))
    except OSError as error:
        sys.exit(f"Cannot listen on port {options.port}: {error}")
    routes = [Route("/session/{session_id}", chat.session), Route("/chat/{session_id}", chat.chat, methods=["POST"])]
    of_stream = "/{session_id}/{stream_id}"
    routes += [Route("/events" + of_stream, chat.events), Route("/cancel" + of_stream, chat.cancel, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(STATUSES, refuse), lifespan=chat.lifespan)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
