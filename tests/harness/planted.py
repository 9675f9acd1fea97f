"""Harnesses run as processes of their own, on the package as it is or on a copy with one mechanism taken out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import persist

TESTS = Path(__file__).parent.parent
PACKAGE_PARENT = Path(persist.__file__).parent.parent

# -P: the working directory must not come before the package that is to be tested.
PYTHON = (sys.executable, "-P", "-W", "error")

Mutation = tuple[str, str, str]
"""A file of the package, a piece of its text, and what to put there."""


# A bug that both the torture and the power cuts must notice.
FIELDS_THROWN_AWAY = (
    "session.py",
    "        mine = encoded(self.data, self._base.content)\n",
    "        kept = {key: value for key, value in self.data.items() if key not in ('title', 'visits')}\n"
    "        mine = encoded(kept, self._base.content)\n",
)
# A bug that both the torture and the soak must notice.
NOT_WRITTEN = (
    "store.py",
    "            return copy.commit_changes(changed, touch=touch).header.version\n",
    "            if copy.header.revision % 4 == 3:\n"
    "                return copy.header.version\n"
    "            return copy.commit_changes(changed, touch=touch).header.version\n",
)
# A bug that hangs in the children only, so that the harness's own calls go well.
HANGS = (
    "storage/lock.py",
    "\n\ndef describe_process(",
    "\n\ndef hang(_hold):\n    time.sleep(3600)\n\n"
    "\nos.register_at_fork(after_in_child=lambda: setattr(Hold, 'acquire', hang))\n"
    "\n\ndef describe_process(",
)
STREAMS_HANG = (
    "streams.py",
    "stream_id = uuid.uuid4().hex if",
    "__import__('time').sleep(3600)\n    stream_id = uuid.uuid4().hex if",
)


def write_mutated_package(mutation: Mutation, parent: Path) -> None:
    """Write a copy of the package, with its text changed, under `parent`."""
    file, old, new = mutation
    shutil.copytree(PACKAGE_PARENT / "persist", parent / "persist", ignore=shutil.ignore_patterns("__pycache__"))
    source = parent / "persist" / file
    text = source.read_text()
    assert old in text, f"{file} no longer has the text {old!r}"
    source.write_text(text.replace(old, new))


def environment(package_parent: Path) -> dict[str, str]:
    """Return the environment of a harness process that is to use the package under `package_parent`."""
    return os.environ | {"PYTHONPATH": f"{package_parent}{os.pathsep}{TESTS}", "PYTHONDONTWRITEBYTECODE": "1"}


def run_harness(
    name: str, options: Iterable[str], package_parent: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run ``harness.<name>`` in a process of its own, on the package under `package_parent`.

    A harness forks, which a process with threads must not do.
    """
    command = [*PYTHON, "-m", f"harness.{name}", *options]
    return subprocess.run(
        command, env=environment(package_parent), capture_output=True, text=True, timeout=timeout_s, check=False
    )
