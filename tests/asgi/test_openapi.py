"""The OpenAPI document: schemathesis makes requests of it, and the server answers each as the document says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

from harness.pages import ROOT

import persist
from persist.asgi import Echo

BUDGET_S, DEADLINE_S = 20, 120.0
#: The document cannot say which texts are cursors of a list, and the server ignores fields that it does not need.
LEFT_OUT = "positive_data_acceptance,negative_data_rejection"


def test_a_route_lists_only_what_it_may_answer(client_of: Any) -> None:
    """A look has no conflict, and the health of the server has no session. The example of a turn starts one."""
    client = client_of(Echo(delay_s=0.0))
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/healthz"]["get"]["responses"]) == {"200", "421", "503"}
    assert set(paths["/api/sessions/{session_id}"]["get"]["responses"]) == {"200", "400", "404", "421", "503"}
    for path in ("/api/sessions/{session_id}/turns", "/api/chat"):
        post = paths[path]["post"]
        assert {"403", "409", "413"} < set(post["responses"])
        example = post["requestBody"]["content"]["application/json"]["example"]
        response = client.post(path.replace("{session_id}", "s"), json=example)
        assert f"{response.status_code}" in post["responses"]
        assert response.is_success


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_requests_of_the_document_get_the_answers_of_the_document(
    client_of: Any, store: persist.Store, tmp_path: Path
) -> None:
    """Requests made for 20 s, sound and unsound ones, get no status 500, and no status or body that is not documented.

    The session of the document's examples is there, so that its turns are started, stopped and retried. It stays.
    """

    def stays(request: Any, session_id: str) -> bool:
        return (request.method, session_id) != ("DELETE", "s-42")

    store.create("s-42", {"messages": [{"id": "m", "role": "user", "content": "What now?"}]})
    url = str(client_of(Echo(delay_s=0.0), authorize=stays).base_url)
    # It runs as a process of its own, because it brings a plugin of pytest with it.
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--url", url]
    options = ["--max-time", str(BUDGET_S), "--request-timeout", "20", "--exclude-checks", LEFT_OUT, "--seed", "1"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(store.load("s-42").data["messages"]) > 2


def test_the_package_without_its_extra_says_what_to_install() -> None:
    """An import without Starlette is an error with the command that installs it."""
    code = "import sys; sys.modules['starlette'] = None; import persist.asgi"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert "ModuleNotFoundError" in done.stderr
    assert "pip install '.[server]'" in done.stderr
