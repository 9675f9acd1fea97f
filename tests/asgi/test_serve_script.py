"""The script that starts the server, which sets the environment up and chooses who answers, and the guide's service."""

from __future__ import annotations

import configparser
import os
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx
from harness.chat_servers import DEADLINE_S
from harness.pages import ROOT, blocks_of

from persist.asgi import serving
from persist.cli.commands import serve

SETUP = '#!/bin/sh\nmkdir -p "$(dirname "$0")/../.venv"\nmv "$(dirname "$0")/../made" "$(dirname "$0")/../.venv/bin"\n'
PERSIST = f'#!/bin/sh\nexec "{sys.executable}" -m persist "$@"\n'


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy of the script in a checkout whose environment is missing until its `setup-venv` has run."""
    for name, content in {"scripts/setup-venv": SETUP, "made/persist": PERSIST}.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        path.chmod(0o755)
    return Path(shutil.copy(ROOT / "scripts/serve", tmp_path / "checkout/scripts/serve"))


@pytest.fixture
def started(script: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    environment |= {"PYTHONPATH": str(ROOT), "OPENAI_MODEL": "none"}
    # The model's server is never asked, because the option wins over the environment.
    command = [str(script), "--port", "0", "--responder", "echo"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


def test_the_script_serves_on_a_fresh_machine(started: subprocess.Popen[str], tmp_path: Path) -> None:
    """Its first line is the address, a prompt sent there is answered, and SIGTERM ends it with exit status 0."""
    assert started.stdout is not None
    assert select.select([started.stdout], [], [], DEADLINE_S)[0], "no address was printed"
    address = started.stdout.readline().strip()
    message = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "well"}]}
    response = httpx.post(f"{address}/api/chat", json={"id": "c", "message": message}, timeout=DEADLINE_S)
    assert '"delta":"well"' in response.text
    assert (tmp_path / "var" / "sessions" / "c.json").exists()
    started.terminate()
    assert started.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    ("model", "options"), [(None, "serve -h"), ("", "serve -h"), ("llama", "serve --responder openai -h")]
)
def test_the_environment_chooses_who_answers(script: Path, model: str | None, options: str) -> None:
    """A model that is named in the environment is asked, unless an option says otherwise."""
    (script.parents[1] / "made" / "persist").write_text('#!/bin/sh\necho "$@"\n')
    environment = {"PATH": os.environ["PATH"]} | ({} if model is None else {"OPENAI_MODEL": model})
    done = subprocess.run([script, "-h"], env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{options}\n"


def test_the_service_of_the_guide_starts_the_server() -> None:
    """Its command is one that `persist` takes, and systemd waits as long as the server waits for its workers."""
    (unit,) = [each.code for each in blocks_of(ROOT / "docs/guides/server.md") if each.kind == "ini"]
    settings = configparser.ConfigParser()
    settings.optionxform = str  # type: ignore[assignment,method-assign]
    settings.read_string(unit)
    program, verb, *arguments = shlex.split(settings["Service"]["ExecStart"])
    assert (Path(program).name, verb) == ("persist", "serve")
    options = serve.make_context(verb, arguments).params
    assert (options["workers"], options["origins"]) == (4, ("https://chat.example.org",))
    assert float(settings["Service"]["TimeoutStopSec"]) >= serving._PATIENCE_S
