"""Pages of the documentation as programs: their blocks of code, and how they are run.

The blocks of a page run in order, in one directory that is empty at first:

- ``python`` runs in one process, in one namespace. A block whose first line is ``# name.py`` is written to that file
  and runs only if another block uses it.
- ``sh`` runs in a shell, with the commands of the environment on its path.
- ``text`` behind one of these is what it prints (see `is_printed`).
- ``console`` is for a person and does not run: an installation, say, or servers with ports of their own.
- ``json`` shows a file, and ``js`` a part of one.
- ``nginx`` and ``caddy`` are settings of these proxies, ``ini`` is a service of systemd, and ``sql`` is for the owner
  of a database. They have tests of their own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
KINDS = ("python", "sh", "text", "console", "json", "js", "nginx", "caddy", "ini", "sql")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w-]+\.(?:py|ini|toml))\n")
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code. `line` is where it begins, and `printed` is the text below it."""

    line: int
    kind: str
    code: str
    printed: str

    @property
    def file_name(self) -> str | None:
        """The file that the block is, if it is one."""
        found = _FILE.match(self.code)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page, each with the text block right below it."""
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    blocks = []
    for this, following in itertools.zip_longest(found, found[1:]):
        is_below = following is not None and following[1] == "text" and not text[this.end() : following.start()].strip()
        printed = following[2] if is_below and following is not None and this[1] in ("python", "sh") else ""
        blocks.append(Block(text.count("\n", 0, this.start()) + 1, this[1], this[2], printed))
    return blocks


def file_of(page: Path, name: str) -> str:
    """Return the one file of that name in a page."""
    (code,) = (block.code for block in blocks_of(page) if block.file_name == name)
    return code


def is_printed(shown: str, printed: str) -> bool:
    """Tell whether a page shows what was printed.

    An ellipsis stands for anything on its line. On a line of its own it stands for any lines.
    """
    lines = [
        r"(?:.*\n)*" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in shown.splitlines()
    ]
    return re.fullmatch("".join(lines), printed) is not None


def play(page: Path, directory: Path, **variables: str) -> list[str]:
    """Run the blocks of a page in a directory, with environment variables that the page names.

    Return what went wrong, by the lines of the page.
    """
    blocks = json.dumps([asdict(block) for block in blocks_of(page)])
    command = [sys.executable, "-P", "-W", "error", "-m", "harness.pages", blocks]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(directory)} | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        return [f"{page.name}: {done.stderr}"]
    faults: list[str] = json.loads(done.stdout)
    return [f"{page.name}:{fault}" for fault in faults]


def _faults(blocks: list[Block]) -> Iterator[str]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.file_name is not None:
            Path(block.file_name).write_text(block.code, encoding="utf-8")
            continue
        if block.kind == "python":
            status, printed = _run_python(block, namespace)
        elif block.kind == "sh":
            status, printed = _run_shell(block)
        else:
            continue
        if status:
            yield f"{block.line}: failed:\n{printed}"
        elif not is_printed(block.printed, printed):
            yield f"{block.line}: printed\n{printed}where the page shows\n{block.printed}"


def _run_python(block: Block, namespace: dict[str, Any]) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(block.code, f"<line {block.line}>", "exec", dont_inherit=True), namespace)
        except Exception:
            return 1, traceback.format_exc()
    return 0, printed.getvalue()


def _run_shell(block: Block) -> tuple[int, str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-e", "-c", block.code], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(_faults([Block(**each) for each in json.loads(sys.argv[1])]))))
