"""The README is run: each of its Python blocks, in order, in an empty directory, and what they print is compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README.read_text(encoding="utf-8"), re.DOTALL)


def test_examples_print_what_the_readme_says(tmp_path: Path) -> None:
    """Every example runs as it stands, and prints what is shown under it."""
    runnable = [(code, shown) for code, shown in BLOCKS if "import persist" in code]
    assert len(runnable) >= 2
    for code, shown in runnable:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, "", shown)


def test_first_example_comes_early() -> None:
    """A reader sees code before line 30."""
    before = README.read_text(encoding="utf-8").split("```python")[0]
    assert before.count("\n") < 30


@pytest.mark.parametrize("name", ["scripts/run", "scripts/test", "scripts/mutants", "scripts/bench"])
def test_scripts_that_the_readme_names_exist(name: str) -> None:
    """What the README tells to run can be run."""
    assert name in README.read_text(encoding="utf-8")
    assert (README.parent / name).stat().st_mode & 0o111
