"""The arguments of the scripts follow one rule.

A script refuses at once an argument that is misspelt or missing, or that leaves nothing to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from harness.planted import PYTHON, environment

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
#: For a script that hangs. The longest one takes 14 s of processor time.
TIMEOUT_S = 120
ALL = sorted(path for path in SCRIPTS.iterdir() if path.is_file() and path.suffix != ".md")
IN_PYTHON = [path.name for path in ALL if path.read_text().startswith("#!/usr/bin/env python3\n")]
#: The scripts that work in a directory of the user's choice.
IN_A_DIRECTORY = ("torture", "soak", "bench", "bench-server", "chaos", "histories", "fuzz")

# A script under any other Python switches to the project's own environment, and makes it if it is missing.
needs_the_environment = pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="scripts run in the project's own environment"
)


def run(scratch: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an empty directory that is its temporary directory, too."""
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments],
        cwd=scratch,
        env=os.environ | {"TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@needs_the_environment
@pytest.mark.parametrize("name", IN_PYTHON)
def test_help_tells_the_usage_and_does_nothing(tmp_path: Path, name: str) -> None:
    """`--help` prints the usage of a script and does nothing else."""
    done = run(tmp_path, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()
    assert list(tmp_path.iterdir()) == []


def test_help_of_the_tests_needs_no_environment(tmp_path: Path) -> None:
    """`scripts/test --help` prints its own usage and sets nothing up. The test runs a copy, which could not."""
    copy = tmp_path / "scripts" / "test"
    copy.parent.mkdir()
    shutil.copy(SCRIPTS / "test", copy)
    done = subprocess.run([copy, "--help"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: scripts/test" in done.stdout


def assert_refused(done: subprocess.CompletedProcess[str], option: str, scratch: Path) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "usage: " in done.stderr.lower()
    assert option in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(scratch.iterdir()) == []


@needs_the_environment
@pytest.mark.parametrize("name", IN_PYTHON)
def test_a_shortened_option_is_refused(tmp_path: Path, name: str) -> None:
    """A misspelt option is never taken for another one, nor ignored."""
    required = {"example_server.py": "--store=sessions"}.get(name)
    assert_refused(run(tmp_path, name, *filter(None, [required]), "--hel"), "--hel", tmp_path)


@needs_the_environment
@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("torture", "--kills", "0"),
        ("torture", "--kills", "-3"),
        ("torture", "--workers", "0"),
        ("powercut", "--cuts", "0"),
        ("soak", "--commits", "0"),
        ("histories", "--operations", "0"),
        ("histories", "--processes", "0"),
        ("histories", "--threads", "0"),
        ("histories", "--kills", "-1"),
        ("histories", "--reads", "1.5"),
        *(
            (name, option, "sometimes")
            for name in ("torture", "powercut", "histories", "soak")
            for option in ("--journal", "--fold")
        ),
        ("chaos", "--seconds", "0"),
        ("chaos", "--clients", "0"),
        ("bench-server", "--followers", "0"),
        ("fuzz", "--minutes", "0"),
        ("fuzz", "--minutes", "-1"),
        ("fuzz", "--minutes", "nan"),
        *((name, "--directory", "missing") for name in IN_A_DIRECTORY),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(tmp_path: Path, name: str, option: str, value: str) -> None:
    """A run that would look at nothing is no pass. A mistyped directory is not made."""
    assert_refused(run(tmp_path, name, option, value), option, tmp_path)


@needs_the_environment
@pytest.mark.parametrize(("option", "value"), [("--port", "-1"), ("--port", "65536"), ("--delay-s", "-1")])
def test_the_example_server_refuses_the_same_way(tmp_path: Path, option: str, value: str) -> None:
    """The example server refuses in the same way, although it shares no code: it is there to be copied."""
    assert_refused(run(tmp_path, "example_server.py", "--store=sessions", option, value), option, tmp_path)


def test_the_example_server_finds_the_environment(tmp_path: Path) -> None:
    """The server goes on in the environment of its checkout if a Python without the package starts it."""
    checkout = {
        "scripts/example_server.py": (SCRIPTS / "example_server.py").read_text(),
        "scripts/setup-venv": "#!/bin/sh\n",
        ".venv/bin/python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
    }
    for name, content in checkout.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    # -S leaves the installed packages out.
    command = [sys.executable, "-I", "-S", str(tmp_path / "scripts/example_server.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


# The kernel's part, played: the second mount fails, and a file system that is not mounted cannot be unmounted.
FAILING_MOUNT = """
import contextlib, sys
from harness import powercut
calls = []

def call(name, *arguments):
    is_mounted = bool(calls) and calls[-1] == "mount"
    if name == "umount2" and not is_mounted or name == "mount" and calls:
        raise OSError(5, f"{name}: Input/output error")
    calls.append(name)

powercut.call, powercut._run = call, lambda *command: None
powercut._loop_device = lambda image: contextlib.nullcontext("/dev/loop0")
powercut.enter_private_namespace = powercut.Disk.cut = lambda *_: None
sys.exit(powercut.main(["--cuts=3", "--filesystem=ext4", "--seed=1"]))
"""


def test_powercut_ends_with_one_message_if_the_file_system_stays_away() -> None:
    """A mount that fails in mid-run is reported with the figures until then. The clean-up adds no error of its own."""
    done = subprocess.run(
        [*PYTHON, "-c", FAILING_MOUNT],
        env=environment(ROOT),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    _seed, message, figures = done.stdout.splitlines()
    assert message == "ext4: could not be mounted again after a cut: [Errno 5] mount: Input/output error"
    assert figures.startswith("ext4: 1 cuts, ")


@needs_the_environment
def test_every_mutant_applies(tmp_path: Path) -> None:
    """A change of the package that leaves a mutant behind is reported at once, not only when the mutants run next."""
    done = run(tmp_path, "mutants", "--check")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert list(tmp_path.iterdir()) == []


def test_scripts_can_be_run_as_they_are() -> None:
    """Each script is executable."""
    assert len(ALL) > len(IN_PYTHON) > 0
    assert [path.name for path in ALL if not path.stat().st_mode & 0o111] == []


def test_scripts_without_a_suffix_are_checked_for_style() -> None:
    """Each script without a suffix is listed for Ruff, which checks it only then."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    bare = {f"scripts/{name}" for name in IN_PYTHON if not name.endswith(".py")}
    assert bare == set(settings["extend-include"])
