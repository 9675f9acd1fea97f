"""Power cuts on real file systems lose nothing that was acknowledged; and the harness sees what is lost with a step left out.

Skipped, with the reason, where this machine does not let a file system be made, mounted and shut down.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness.planted import PACKAGE_PARENT, Mutation, run_harness, write_mutated_package
from harness.powercut import NOTHING_RUN

DEADLINE_S = 120

NO_FILE_SYNC = ("files/transaction.py", "                disk.sync(fd)\n", "                pass\n")
NO_DIRECTORY_SYNC = (
    "files/transaction.py",
    "                disk.sync_directory(self._directory, directory)\n",
    "                pass\n",
)
NO_SYNC_OF_A_DELETE = (
    "files/transaction.py",
    "            disk.sync_directory(self._layout.directory, directory)\n",
    "            pass\n",
)
NO_SECOND_LOOK = ("files/disk.py", "            os.fstat(fd)\n", "")


def powercut(file_system: str, cuts: int, package_parent: Path) -> subprocess.CompletedProcess[str]:
    options = (f"--filesystem={file_system}", f"--cuts={cuts}", "--seed=1")
    done = run_harness("powercut", options, package_parent, DEADLINE_S)
    if done.returncode == NOTHING_RUN and "skipped: " in done.stdout:
        pytest.skip(done.stdout.partition("skipped: ")[2].strip())
    return done


@pytest.mark.parametrize("file_system", ["ext4", "ext4-noauto", "xfs"])
def test_no_acknowledged_commit_is_lost_by_a_power_cut(file_system: str) -> None:
    """After each cut and recovery every acknowledged commit is there, every document is whole, and nothing is stuck."""
    done = powercut(file_system, 14, PACKAGE_PARENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{file_system}: 14 cuts" in done.stdout


@pytest.mark.parametrize(
    ("file_system", "mutation", "verdicts"),
    [
        pytest.param("ext4-noauto", NO_FILE_SYNC, {"torn"}, id="no-file-sync"),
        pytest.param("ext4-noauto", NO_DIRECTORY_SYNC, {"lost"}, id="no-directory-sync"),
        # A session that comes back.
        pytest.param("ext4-noauto", NO_SYNC_OF_A_DELETE, {"torn"}, id="no-sync-of-a-delete"),
        # Torn: a delete that was acknowledged.
        pytest.param("xfs", NO_SECOND_LOOK, {"lost", "torn"}, id="believes-an-xfs-that-is-shut-down"),
    ],
)
def test_the_power_cuts_see_a_missing_step(tmp_path: Path, file_system: str, mutation: Mutation, verdicts: set[str]) -> None:
    """With one step of a commit taken out of a copy of the package, a few cuts show the damage."""
    write_mutated_package(mutation, tmp_path)
    done = powercut(file_system, 300, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line.split(": ")[1] for line in done.stdout.splitlines() if line.count(": ") > 1}
    assert found & verdicts, done.stdout
