"""Tests that need a program beside Python skip without it, and the end of a run says how it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.pages import ROOT

pytest.importorskip("uvicorn", reason="the tests of the chat server need the extra server")
THE_TEST = "tests/browser/test_ai_sdk.py::test_an_answer_is_given_again"


def run(*, required: bool, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run a test that needs Node on a machine without it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={scratch / 'run'}", THE_TEST]
    env = os.environ | {"PATH": str(scratch), "PERSIST_REQUIRE_SERVERS": str(int(required))}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_missing_program_skips_its_tests(tmp_path: Path) -> None:
    """The line before the last one names the program and the script that installs it."""
    done = run(required=False, scratch=tmp_path)
    told, last = done.stdout.splitlines()[-2:]
    assert told == "1 test skipped: no Node with its package ai. `sudo scripts/install-servers` installs it"
    assert "1 skipped" in last
    assert done.returncode == 0


def test_a_required_program_fails_its_tests(tmp_path: Path) -> None:
    """With `--require-servers`, which sets the variable, nothing skips."""
    done = run(required=True, scratch=tmp_path)
    assert done.returncode == 1
    assert 'no Node with its package ai: "sudo scripts/install-servers" installs it' in done.stdout
    assert "skipped" not in done.stdout
