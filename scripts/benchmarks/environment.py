"""The benchmark's own virtual environment: persist, the peers and matplotlib.

This module needs only the standard library.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "var" / "bench-venv"
GROUP = "bench"
OLDEST = (3, 11)


def is_inside() -> bool:
    """Tell whether this Python is the environment's own."""
    return Path(sys.prefix).resolve() == PLACE.resolve()


def python() -> Path:
    """Return the environment's interpreter. Set the environment up if it is missing or stale."""
    if sys.version_info < OLDEST:
        sys.exit(f"persist needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.")
    stamp, wanted = PLACE / ".set-up-for", _wanted()
    if not stamp.is_file() or stamp.read_text() != wanted:
        _set_up()
        stamp.write_text(wanted)
    return PLACE / "bin" / "python"


def peers() -> list[str]:
    """Return the requirements of all peers. Their only list is a dependency group of pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [str(requirement) for requirement in project["dependency-groups"][GROUP]]


def _wanted() -> str:
    above_the_tools = (ROOT / "pyproject.toml").read_text().split("\n[tool", 1)[0]
    return f"{sys.version}\n{ROOT}\n{above_the_tools}"


def _set_up() -> None:
    print(f"Setting up {PLACE} …", file=sys.stderr, flush=True)
    try:
        venv.create(PLACE, clear=True, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit("No virtual environment could be made. On Debian or Ubuntu: apt-get install python3-venv")
    subprocess.run([*_pip(), "--editable", str(ROOT)], check=True)
    if _install(*peers()):
        return
    # One peer that cannot be installed must not keep the others away.
    for requirement in peers():
        if not _install(requirement):
            print(f"{requirement} could not be installed: it will be skipped.", file=sys.stderr, flush=True)
    print(f"To try again, remove {PLACE}.", file=sys.stderr, flush=True)


def _pip() -> list[str]:
    return [str(PLACE / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _install(*requirements: str) -> bool:
    return subprocess.run([*_pip(), *requirements], check=False).returncode == 0
