"""kill -9 at random instants loses nothing; and the torture sees what is lost when a mechanism is out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness.planted import PACKAGE_PARENT, Mutation, run_harness, write_mutated_package

DEADLINE_S = 120

NO_LOCK = (
    "files/lock.py",
    "import lock_descriptor, unlock_descriptor\n",
    "import unlock_descriptor\n\ndef lock_descriptor(fd, *, blocking):\n    return True\n",
)
NOT_WRITTEN = (
    "store.py",
    "    return tx.commit(found.header.next(touch=touch), body).header.revision\n",
    "    return tx.commit(found.header.next(), body).header.revision if found.header.revision % 5 else 1\n",
)
NOT_IDEMPOTENT = ("turn.py", "    if place is None:\n        messages.insert", "    if True:\n        messages.insert")
IN_PLACE = (
    "files/transaction.py",
    "disk.replace(self._temp, self._path)",
    "self._path.write_bytes(b''), self._path.write_bytes(self._temp.read_bytes()), disk.unlink(self._temp)",
)
TEMPS_OF_THEIR_OWN = ("files/layout.py", 'f"{name}{_TEMP}")', "f\"{name}.{__import__('os').getpid()}{_TEMP}\")")
NO_LEASE = ("streams.py", "            if not is_dead:\n                return False\n", "")


def torture(kills: int, package_parent: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    options = (f"--kills={kills}", "--seed=1", f"--directory={scratch}")
    return run_harness("torture", options, package_parent, DEADLINE_S)


def test_nothing_acknowledged_is_lost_torn_or_doubled_by_150_kills(tmp_path: Path) -> None:
    """After each kill every acknowledged item is there once, in its writer's order; at the end no file is stray."""
    done = torture(150, PACKAGE_PARENT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 kills" in done.stdout


@pytest.mark.parametrize(
    ("mutation", "kills", "verdicts"),
    [
        # Writers that meet in one temporary file also publish halves of it, and take it away from each other.
        pytest.param(NO_LOCK, 150, {"lost", "torn", "raised"}, id="no-lock"),
        pytest.param(NOT_WRITTEN, 150, {"lost"}, id="acknowledged-and-not-written"),
        pytest.param(NOT_IDEMPOTENT, 150, {"doubled"}, id="append-is-not-idempotent"),
        # Raised by the reader of a half.
        pytest.param(IN_PLACE, 150, {"torn", "raised"}, id="written-in-place"),
        pytest.param(TEMPS_OF_THEIR_OWN, 40, {"stray"}, id="temps-that-nobody-removes"),
        # Raised by the owner, as StreamLost.
        pytest.param(NO_LEASE, 150, {"raised"}, id="live-streams-are-cleared"),
    ],
)
def test_the_torture_sees_a_planted_bug(tmp_path: Path, mutation: Mutation, kills: int, verdicts: set[str]) -> None:
    """With one mechanism taken out of a copy of the package, the torture ends with that verdict."""
    write_mutated_package(mutation, tmp_path)
    done = torture(kills, tmp_path, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert found & verdicts, done.stdout
