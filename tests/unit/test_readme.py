"""The examples of the README and of docs/: each Python block runs in an empty directory, in order.

It prints what the page shows under it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return the Python blocks that can be run as they stand, each with the text that is shown under it."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    return [(code, shown) for code, shown in blocks if "import persist" in code]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_examples_print_what_the_page_says(tmp_path: Path, page: Path) -> None:
    """Every example runs as it stands, and prints what is shown under it."""
    for code, shown in blocks_of(page):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, "", shown)


def test_readme_has_examples_to_run() -> None:
    """The README has examples, so the test above looks at something."""
    assert len(blocks_of(README)) >= 2


def test_first_example_comes_early() -> None:
    """A reader sees code before line 30."""
    before = README.read_text(encoding="utf-8").split("```python")[0]
    assert before.count("\n") < 30


def test_readme_is_short_and_leads_to_every_page() -> None:
    """The README has at most 200 lines, and links each page of docs/."""
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert set(re.findall(r"\((docs/[^)#]+)", text)) == {f"docs/{page.name}" for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """A link to another page names a file that is there."""
    for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("name", ["scripts/run", "scripts/test", "scripts/mutants", "scripts/bench"])
def test_scripts_that_the_documentation_names_exist(name: str) -> None:
    """Each script that the README and its pages name can be run."""
    assert any(name in page.read_text(encoding="utf-8") for page in (README, *PAGES))
    assert (ROOT / name).stat().st_mode & 0o111
