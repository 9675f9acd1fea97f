"""The examples of the guide run, each with its framework."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness.openai_server import Model, serving
from harness.pages import ROOT, file_of

GUIDE = ROOT / "docs" / "guides" / "adapters.md"
ANSWERS = ["Answer to: Why do files tear? 2", "Answer to: Who mends them? 4"]
EXAMPLES = {
    "one_store.py": ("agents", ["['user:7/chat']"]),
    "openai_agents_chat.py": ("agents", ANSWERS),
    "pydantic_ai_chat.py": ("pydantic_ai", ANSWERS),
    "claude_agent_sdk_chat.py": ("claude_agent_sdk", ["1"]),
    "langgraph_chat.py": ("langgraph", ["You asked: Why do files tear? 2", "You asked: Who mends them? 4"]),
    "langgraph_again.py": ("langgraph", []),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_the_guide_runs(name: str, tmp_path: Path) -> None:
    """Each example prints what its conversation should hold, in a new directory."""
    framework, lines = EXAMPLES[name]
    if find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    with serving() as model:
        printed = run(file_of(GUIDE, name), tmp_path, model)
    assert printed.splitlines() == lines


def run(code: str, directory: Path, model: Model) -> str:
    """Run an example against a local model, and return what it prints."""
    given = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "none", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    environment = {**os.environ, **given, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_of_the_guide_is_run() -> None:
    """An example that is added is run, too."""
    assert len(EXAMPLES) == GUIDE.read_text(encoding="utf-8").count("```python\n")
