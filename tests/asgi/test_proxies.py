"""The proxies of the guide: its settings are run as they stand, with two workers behind them.

No script installs the proxies, because Debian's packages start a server of their own. Without them the tests skip.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx
from actors import eventually
from harness.chat_servers import DEADLINE_S, ChatServer, events_in
from harness.pages import ROOT, blocks_of

ORIGIN = "https://chat.example.org"
#: The settings of the guide go into these. The proxies listen at a socket in the test's directory.
FRAMES = {
    "nginx": """
daemon off; pid pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fast; uwsgi_temp_path u; scgi_temp_path s;
    server {{ listen unix:{socket}; {settings} }}
}}
""",
    "caddy": """
{{
    admin off
    auto_https off
}}
http://chat.example.org {{
    bind unix/{socket}
    {settings}
}}
""",
}
COMMANDS = {
    "nginx": ["nginx", "-p", ".", "-c", "proxy.conf"],
    "caddy": ["caddy", "run", "--config", "proxy.conf", "--adapter", "caddyfile"],
}


@pytest.fixture(params=sorted(FRAMES))
def proxied(request: pytest.FixtureRequest, serve: Callable[..., ChatServer], tmp_path: Path) -> Iterator[httpx.Client]:
    """Provide a client of a proxy with the guide's settings, before a server as the guide starts it."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    (settings,) = [each.code for each in blocks_of(ROOT / "docs/guides/server.md") if each.kind == name]
    assert "127.0.0.1:8000" in settings
    server = serve("--origin", ORIGIN, workers=2)
    settings = settings.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
    socket = tmp_path / "socket"
    (tmp_path / "proxy.conf").write_text(FRAMES[name].format(settings=settings, socket=socket))
    with (
        subprocess.Popen(COMMANDS[name], cwd=tmp_path) as process,
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://chat.example.org/chat/", timeout=DEADLINE_S
        ) as client,
    ):
        eventually(socket.exists)
        yield client
        process.terminate()


def test_a_proxy_passes_each_event_on_at_once(proxied: httpx.Client, tmp_path: Path) -> None:
    """An event arrives while the model still waits, and a client that comes back misses nothing.

    The page and the writes work below the prefix, and a page of another origin may not write. Fails under nginx without
    `X-Accel-Buffering`, if nginx asks by HTTP/1.0.
    """
    assert "text/html" in proxied.get("").headers["content-type"]
    gate = tmp_path / "gate"
    body = {"message": {"id": "m", "content": f"a <{gate} b c"}}
    turns = "api/sessions/s/turns"
    assert proxied.post(turns, json=body, headers={"Origin": "https://elsewhere.example"}).status_code == 403
    started = proxied.post(turns, json=body, headers={"Origin": ORIGIN})
    assert started.status_code == 201, started.text
    path = f"api/sessions/s/streams/{started.json()['stream_id']}/events"
    with proxied.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as response:
        first = next(events_in(response.iter_lines()))
    assert first.data == {"type": "text", "text": "a "}
    gate.touch()
    with proxied.stream("GET", path, headers={"Last-Event-ID": first.id}) as response:
        *rest, end = events_in(response.iter_lines())
    assert ["".join(each.data["text"] for each in rest), end.data["how"]] == ["b c ", "finished"]
