"""The README and the pages of docs/: their code runs, their links lead somewhere, and they keep within their bounds."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.pages import KINDS, PAGES, README, ROOT, blocks_of, is_printed, play

import persist
import persist.aio
from persist.pytest_plugin import plugin

names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
MAPS = (ROOT / "tests/README.md", ROOT / "scripts/README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md")


@names
def test_code_of_a_page_runs_and_prints_what_the_page_shows(
    tmp_path: Path, page: Path, request: pytest.FixtureRequest
) -> None:
    """Every block runs as it stands, in order, and prints the text below it."""
    needs_server = "DATABASE_URL" in page.read_text(encoding="utf-8")
    given = {"DATABASE_URL": request.getfixturevalue("postgres_url")} if needs_server else {}
    assert play(page, tmp_path, **given) == []


@names
def test_blocks_of_a_page_are_of_a_kind_that_is_known(page: Path) -> None:
    """A block without a language, or with another one, would never run."""
    assert {block.kind for block in blocks_of(page)} <= {*KINDS}


def test_wrong_output_is_noticed(tmp_path: Path) -> None:
    """The test above can fail: by an error, by other output, and by a command that fails."""
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n\n```sh\nfalse\n```\n")
    assert [fault.partition("\n")[0] for fault in play(page, tmp_path)] == ["page.md:5: printed", "page.md:13: failed:"]
    assert is_printed("a … c\n…\nd\n", "a b c\n1\n2\nd\n")
    assert not is_printed("a … c\n", "a b d\n")
    assert not is_printed("a\n…\n", "b\na\n")


def test_installations_name_what_is_there() -> None:
    """A block for a person names only scripts, extras and commands that exist."""
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for block in blocks_of(page):
            if block.kind == "console":
                for script in re.findall(r"scripts/[\w-]+", block.code):
                    assert os.access(ROOT / script, os.X_OK), (page, script)
                for extra in re.findall(r"\[(\w+)\]'", block.code):
                    assert extra in extras, (page, extra)


# --- links -----------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *MAPS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A link names a file that is there, and a heading in it."""
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        leads_to = (page.parent / target).resolve() if target else page
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors_of(leads_to), f"{target}#{anchor}"


def test_every_page_can_be_found() -> None:
    """The README links every page, and every folder with a map."""
    linked = set(re.findall(r"\]\(([^)#:]+)", README.read_text(encoding="utf-8")))
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= linked
    assert {"tests/README.md", "scripts/README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"} <= linked


@pytest.mark.parametrize("page", [*PAGES, *MAPS], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """A path of the source tree in a page is one of the tree."""
    for name in re.findall(r"`((?:persist|tests|scripts|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    """The README has at most 150 lines, and shows code before line 60."""
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert text.split("```python")[0].count("\n") < 60


def test_prose_keeps_its_rules() -> None:
    """The mean sentence of the pages has at most 15 words, and there are few semicolons."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "prose"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def public() -> list[tuple[str, object]]:
    """The public names: what the package and its modules hand out, with the verbs of each class."""
    found: list[tuple[str, object]] = []
    found += [(f"persist.{name}", getattr(persist, name)) for name in persist.__all__]
    own = inspect.getmembers(persist.aio, lambda member: getattr(member, "__module__", "") == "persist.aio")
    found += [(f"persist.aio.{name}", member) for name, member in own if not name.startswith("_")]
    fixtures = (
        "shared_fixture",
        "persist_once",
        "persist_lock",
        "persist_counter",
        "persist_store",
        "tmp_persist_store",
    )
    found += [(f"persist.pytest_plugin.{name}", getattr(plugin, name)) for name in fixtures]
    for name, value in list(found):
        if inspect.isclass(value):
            verbs = [(verb, member) for verb, member in vars(value).items() if not verb.startswith("_")]
            found += [(f"{name}.{verb}", member) for verb, member in verbs if callable(member) or _is_property(member)]
    return found


def _is_property(member: object) -> bool:
    return isinstance(member, property)


@pytest.mark.parametrize(("name", "value"), public(), ids=[name for name, _ in public()])
def test_public_names_have_docstrings(name: str, value: object) -> None:
    """Each public name says what it is or does."""
    if name != "persist.MISSING":
        assert inspect.getdoc(value), name


def test_public_names_are_many() -> None:
    """The test above looks at something."""
    assert len(public()) > 100


@names
def test_page_has_no_placeholder(page: Path) -> None:
    """A word in capitals alone on its line stands for text that nobody has filled in."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.findall(r"^[A-Z]{4,}$", text, re.MULTILINE) == []
