"""A small server that speaks the OpenAI protocol on localhost, for agents that need a model.

It answers each request to ``/v1/chat/completions`` with "Answer to: " and the last prompt, whole or streamed. A prompt
that begins with "hold" gets no answer: its request stays open.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def _text(content: Any) -> str:
    """Return the text of a message's content."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


class Model:
    """The server's side of the conversations.

    Attributes:
        url: the address to give to a client, as its base URL.
        requests: the messages of each request, in order: (role, text) pairs.
    """

    def __init__(self) -> None:
        self.requests: list[list[tuple[str, str]]] = []
        self.news = threading.Condition()
        self.url = ""

    def wait_for(self, prompt: str, timeout_s: float = 30) -> list[tuple[str, str]]:
        """Wait until a request with this last prompt has come, and return its messages."""
        with self.news:
            assert self.news.wait_for(lambda: self._last(prompt) is not None, timeout_s), f"no request for {prompt!r}"
            found = self._last(prompt)
        assert found is not None
        return found

    def _last(self, prompt: str) -> list[tuple[str, str]] | None:
        return next((each for each in reversed(self.requests) if each[-1] == ("user", prompt)), None)

    def take(self, body: dict[str, Any]) -> str | None:
        """Take a request in, and return the answer, or None for none."""
        messages = [(each["role"], _text(each.get("content"))) for each in body["messages"]]
        with self.news:
            self.requests.append(messages)
            self.news.notify_all()
        prompt = messages[-1][1]
        return None if prompt.startswith("hold") else f"Answer to: {prompt}"


def _whole(answer: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "local",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def _chunks(answer: str) -> Iterator[dict[str, Any]]:
    for delta, reason in (({"role": "assistant", "content": answer}, None), ({}, "stop")):
        yield {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "local",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }


@contextmanager
def serving() -> Iterator[Model]:
    """Run the server for a block."""
    model, closing = Model(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = model.take(body)
            if answer is None:
                closing.wait()
                self.close_connection = True
                return
            if body.get("stream"):
                lines = [json.dumps(each) for each in _chunks(answer)]
                data, kind = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]), "text/event-stream"
            else:
                data, kind = json.dumps(_whole(answer)), "application/json"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data.encode())))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    model.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield model
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
