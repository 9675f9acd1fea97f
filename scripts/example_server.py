#!/usr/bin/env python3
"""A small chat server on `persist` and the standard library, to copy from. Two servers may run on one directory.

    scripts/example_server.py --store var/chats --port 8080

    POST /api/session/new                                        -> {"session": {…}}
    GET  /api/session?session_id=                                -> {"session": {…}}; clears a stale stream first
    GET  /api/sessions                                           -> {"sessions": [{…}, …]}
    POST /api/chat/start          {"session_id", "message"}      -> {"stream_id"}, or 409 with the owner
    GET  /api/chat/stream/status?session_id=                     -> {"active", "stream_id", "cancelled", "owner"}
    POST /api/chat/cancel         {"session_id", "stream_id"}    -> {"cancelled"}

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
import contextlib
import json
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import persist

MAX_BODY_BYTES = 1024 * 1024

Reply = dict[str, Any]


def answer_to(prompt: str) -> Iterator[str]:
    """Give the model's answer, word by word. This model only echoes."""
    yield "You said:"
    for word in prompt.split():
        yield f" {word}"


class Chat:
    """The server without HTTP: each method answers one route.

    There is no registry of streams and no lock here. The store knows which stream runs, and whether its process lives.
    The store's answer holds for every server on the directory.
    """

    def __init__(self, store: persist.Store, *, delay_s: float) -> None:
        self._store = store
        self._delay_s = delay_s
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let every running turn fail. Its prompt and partial answer are kept, and marked as interrupted."""
        self._stopping.set()

    def new_session(self) -> Reply:
        session = self._store.create(uuid.uuid4().hex, {"title": "New chat", "messages": []})
        return {"session": _shown(session)}

    def session(self, session_id: str) -> Reply:
        session = self._store.load(session_id)
        if session.active_stream_id is not None and not session.clear_stale_stream():
            # The stream is alive, or the session moved on since it was loaded. Show what is true now.
            session.refresh()
        return {"session": _shown(session)}

    def sessions(self) -> Reply:
        # The `active_stream_id` in a head may be that of a dead stream. Only `streams()` asks whether it lives.
        live = {info.session_id: info.stream_id for info in self._store.streams() if info.is_live}
        rows = []
        for session_id in self._store.ids():
            with contextlib.suppress(persist.SessionNotFound):  # deleted since it was listed
                rows.append({**self._row(session_id), "active_stream_id": live.get(session_id)})
        return {"sessions": rows}

    def _row(self, session_id: str) -> Reply:
        try:
            head = self._store.head(session_id)
        except persist.CorruptSession as error:
            # One damaged file must not hide the others.
            return {"session_id": session_id, "error": str(error)}
        return {
            "session_id": session_id,
            "title": head.fields.get("title"),
            "message_count": head.counts.get("messages", 0),
            "updated_at": head.updated_at.isoformat(),
        }

    def start(self, session_id: str, message: str) -> Reply:
        if not message.strip():
            raise BadRequest("The message is empty.")
        with contextlib.ExitStack() as failing:
            stream = failing.enter_context(self._store.start_stream(session_id, {"role": "user", "content": message}))
            # A request's thread is a daemon and would pass that on. But the interpreter must wait for a turn at its
            # exit.
            threading.Thread(target=self._run_turn, args=(stream, message), daemon=False).start()
            # From here on the thread ends the turn. If the thread had not started, leaving this block would have failed
            # the stream.
            failing.pop_all()
        return {"stream_id": stream.id}

    def _run_turn(self, stream: persist.Stream, prompt: str) -> None:
        text = ""
        with contextlib.suppress(persist.StreamLost), stream:
            for word in answer_to(prompt):
                if self._stopping.wait(self._delay_s) or stream.is_cancelled():
                    return  # without finish(): the turn has failed
                text += word
                # Each checkpoint is a commit. With a fast model, a few times a second are enough.
                stream.checkpoint({"role": "assistant", "content": text})
            stream.finish({"role": "assistant", "content": text})

    def status(self, session_id: str) -> Reply:
        info = self._store.stream(session_id)
        if info is None or not info.is_live:
            return {"active": False, "stream_id": None, "cancelled": False, "owner": None}
        owner = info.owner and asdict(info.owner)
        return {"active": True, "stream_id": info.stream_id, "cancelled": info.is_cancelled, "owner": owner}

    def cancel(self, session_id: str, stream_id: str) -> Reply:
        return {"cancelled": self._store.cancel(session_id, stream_id)}


def _shown(session: persist.Session) -> Reply:
    return {
        **session.data,
        "session_id": session.id,
        "active_stream_id": session.active_stream_id,
        "updated_at": session.updated_at.isoformat(),
    }


class BadRequest(ValueError):
    """Raised when a request lacks something, or is not what it should be."""


class NoSuchRoute(LookupError):
    """Raised when nothing is served under this method and path."""


#: Method and path -> the method of `Chat` that answers, and the fields that it takes.
ROUTES: Mapping[str, tuple[Callable[..., Reply], Sequence[str]]] = {
    "POST /api/session/new": (Chat.new_session, ()),
    "GET /api/session": (Chat.session, ("session_id",)),
    "GET /api/sessions": (Chat.sessions, ()),
    "POST /api/chat/start": (Chat.start, ("session_id", "message")),
    "GET /api/chat/stream/status": (Chat.status, ("session_id",)),
    "POST /api/chat/cancel": (Chat.cancel, ("session_id", "stream_id")),
}

#: The first kind that fits an error gives its status. Any other error is 500.
STATUSES: Sequence[tuple[type[Exception], int]] = (
    (persist.SessionNotFound, 404),
    (NoSuchRoute, 404),
    (persist.SessionBusy, 409),
    (persist.InvalidArgument, 400),
    (persist.NotJSON, 400),
    (BadRequest, 400),
    (persist.LockTimeout, 503),
)


class ChatServer(ThreadingHTTPServer):
    """An HTTP server, a thread for each request, with the chat that answers."""

    def __init__(self, chat: Chat, port: int) -> None:
        self.chat = chat
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    """A handler that turns a request into a call of `Chat`, and the outcome into JSON."""

    server: ChatServer
    timeout = 30.0

    def do_GET(self) -> None:
        self._serve(lambda: dict(parse_qsl(urlsplit(self.path).query)))

    def do_POST(self) -> None:
        self._serve(self._body)

    def _serve(self, read_fields: Callable[[], Mapping[str, Any]]) -> None:
        try:
            self._send(200, self._answer(read_fields()))
        except ConnectionError:
            self.close_connection = True  # the client has gone, but a turn that it started goes on
        except Exception as error:
            status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
            if status == 500:
                self.log_error("%s: %s", type(error).__name__, error)
            self._send(status, _shown_error(error, status))

    def _answer(self, given: Mapping[str, Any]) -> Reply:
        route = f"{self.command} {urlsplit(self.path).path}"
        if route not in ROUTES:
            raise NoSuchRoute(f"{route} is not served here.")
        verb, names = ROUTES[route]
        for name in names:
            if type(given.get(name)) is not str:
                raise BadRequest(f"{route} needs the text field {name!r}.")
        return verb(self.server.chat, **{name: given[name] for name in names})

    def _body(self) -> Mapping[str, Any]:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise BadRequest(f"The body must have a Content-Length of at most {MAX_BODY_BYTES} bytes.")
        try:
            fields = json.loads(self.rfile.read(int(length)) or b"{}")
        except (ValueError, RecursionError) as error:
            raise BadRequest("The body is not JSON.") from error
        if type(fields) is not dict:
            raise BadRequest("The body is JSON, but not an object.")
        return fields

    def _send(self, status: int, reply: Reply) -> None:
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _shown_error(error: Exception, status: int) -> Reply:
    if isinstance(error, persist.SessionNotFound):
        # The error itself names the file, which is nobody else's business.
        return {"error": f"There is no session {error.session_id!r}."}
    if isinstance(error, persist.SessionBusy):
        return {"error": str(error), "stream_id": error.stream_id, "owner": error.owner and asdict(error.owner)}
    # An error inside the server is for the log, not for the client.
    return {"error": str(error) if status < 500 else type(error).__name__}


def _clear_what_dead_servers_left(store: persist.Store) -> None:
    # A damaged session does not keep the server from starting.
    sweep = store.clear_stale_streams()
    for error in sweep.failures.values():
        print(error, file=sys.stderr)
    for stream in sweep.cleared:
        print(f"Cleared stale stream {stream.stream_id} of session {stream.session_id}", file=sys.stderr)


def main() -> None:
    """Serve until SIGTERM or SIGINT. The running turns then fail, but they are not lost."""
    parser = argparse.ArgumentParser(description="A small chat server on persist.", allow_abbrev=False)
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
        store = persist.Store(options.store)
    except (persist.PersistError, OSError) as error:
        sys.exit(str(error))
    _clear_what_dead_servers_left(store)
    chat = Chat(store, delay_s=options.delay_s)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: sys.exit())
    try:
        listening = ChatServer(chat, options.port)
    except OSError as error:
        sys.exit(f"Cannot listen on port {options.port}: {error}")
    with listening as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        finally:
            chat.stop()


if __name__ == "__main__":
    main()
