"""Power cuts on real file systems lose nothing that was acknowledged. The harness sees the loss if a step is left out.

The tests are skipped, with the reason, where this machine does not let a file system be made, mounted and shut down.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from harness.acknowledged import Figures
from harness.authors import Raised
from harness.planted import (
    FIELDS_THROWN_AWAY,
    HANGS,
    PACKAGE_PARENT,
    PYTHON,
    STREAMS_HANG,
    Mutation,
    environment,
    run_harness,
    write_mutated_package,
)
from harness.powercut import NOTHING_RUN
from harness.runs import INTERRUPTED, Plan
from harness.watch import Watch

DEADLINE_S = 120

NO_FILE_SYNC = ("storage/commit.py", "        disk.sync(fd)\n", "")
NO_DIRECTORY_SYNC = (
    "storage/commit.py",
    "        # 6. The rename becomes durable.\n"
    "        try:\n"
    "            disk.sync_directory(paths.directory, directory)\n",
    "        try:\n            pass\n",
)
NO_SYNC_OF_A_DELETE = (
    "storage/commit.py",
    "            disk.unlink(paths.document)\n"
    "            try:\n"
    "                disk.sync_directory(paths.directory, directory)\n",
    "            disk.unlink(paths.document)\n            try:\n                pass\n",
)
NO_SECOND_LOOK = ("storage/disk.py", "            os.fstat(fd)\n", "")
# Mutations of journals.
NO_SYNC_OF_A_RECORD = ("storage/disk.py", "        os.fdatasync(fd)\n", "")
NOT_WRITTEN_AGAIN = (
    "storage/commit.py",
    "        disk.write_at(fd, tail.unsynced + line, tail.synced if tail.unsynced else tail.end)\n",
    "        disk.write_at(fd, line, tail.end)\n",
)
NO_SECOND_LOOK_AT_A_RECORD = ("storage/disk.py", "        os.pread(fd, 1, 0)\n", "")
RAISES = (
    "streams.py",
    "    stream_id = uuid.uuid4().hex if",
    "    if os.urandom(1)[0] < 64:\n        raise RuntimeError('planted')\n    stream_id = uuid.uuid4().hex if",
)


def powercut(file_system: str, cuts: int, package_parent: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = (f"--filesystem={file_system}", f"--cuts={cuts}", "--seed=1", *more)
    done = run_harness("powercut", options, package_parent, DEADLINE_S)
    if done.returncode == NOTHING_RUN and "skipped: " in done.stdout:
        pytest.skip(done.stdout.partition("skipped: ")[2].strip())
    return done


@pytest.mark.parametrize(
    ("file_system", "journal", "fold"),
    [
        ("ext4", "always", "normal"),
        ("ext4", "auto", "normal"),
        ("ext4-noauto", "always", "1"),
        ("ext4-noauto", "never", "normal"),
        ("xfs", "mixed", "mixed"),
        ("xfs", "always", "normal"),
    ],
)
def test_no_acknowledged_commit_is_lost_by_a_power_cut(file_system: str, journal: str, fold: str) -> None:
    """After each cut and recovery every acknowledged commit is there, every document is whole, and nothing is stuck."""
    done = powercut(file_system, 14, PACKAGE_PARENT, f"--journal={journal}", f"--fold={fold}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{file_system}: 14 cuts" in done.stdout


@pytest.mark.parametrize(
    ("file_system", "journal", "mutation", "verdicts"),
    [
        pytest.param("ext4-noauto", "never", NO_FILE_SYNC, {"torn"}, id="no-file-sync"),
        pytest.param("ext4-noauto", "never", NO_DIRECTORY_SYNC, {"lost"}, id="no-directory-sync"),
        # Here a torn finding is a session that comes back.
        pytest.param("ext4-noauto", "never", NO_SYNC_OF_A_DELETE, {"torn"}, id="no-sync-of-a-delete"),
        # Here a torn finding is a delete that was acknowledged.
        pytest.param("xfs", "never", NO_SECOND_LOOK, {"lost", "torn"}, id="believes-an-xfs-that-is-shut-down"),
        pytest.param("ext4", "mixed", FIELDS_THROWN_AWAY, {"lost"}, id="a-save-drops-small-fields"),
        pytest.param("ext4", "always", NO_SYNC_OF_A_RECORD, {"lost"}, id="no-sync-of-a-record"),
        pytest.param("ext4", "always", NO_SECOND_LOOK_AT_A_RECORD, {"lost"}, id="believes-an-ext4-that-is-shut-down"),
    ],
)
def test_the_power_cuts_see_a_missing_step(
    tmp_path: Path, file_system: str, journal: str, mutation: Mutation, verdicts: set[str]
) -> None:
    """With one step of a commit taken out of a copy of the package, a few cuts show the damage."""
    write_mutated_package(mutation, tmp_path)
    done = powercut(file_system, 300, tmp_path, f"--journal={journal}", "--fold=normal")
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line.split(": ")[1] for line in done.stdout.splitlines() if line.count(": ") > 1}
    assert found & verdicts, done.stdout


@pytest.mark.parametrize("options", [[], ["--warm"]], ids=["cold", "warm"])
def test_an_acknowledged_append_covers_a_record_whose_sync_failed(options: list[str]) -> None:
    """Nothing is lost of a record that the kernel has dropped after its writer was killed.

    The next append makes both records durable.
    """
    done = failed_sync(PACKAGE_PARENT, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "both are there\n"


@pytest.mark.parametrize("options", [[], ["--warm"]], ids=["cold", "warm"])
def test_the_power_cut_sees_a_record_that_is_synced_and_not_written_again(tmp_path: Path, options: list[str]) -> None:
    """With a sync alone, the record that the kernel has dropped is lost, and with it the acknowledged one."""
    write_mutated_package(NOT_WRITTEN_AGAIN, tmp_path)
    done = failed_sync(tmp_path, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith(("lost: ", "torn: "))


def failed_sync(package_parent: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = run_harness("failed_sync", options, package_parent, DEADLINE_S)
    if done.returncode == NOTHING_RUN and done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.removeprefix("skipped: ").strip())
    return done


@pytest.mark.parametrize(
    ("mutation", "cuts", "patience_s", "verdict"),
    [
        # The first author imports the package anew. The authors that hang come after it.
        pytest.param(HANGS, 2, 1, "idle: no commit for 1 s", id="every-verb-hangs"),
        pytest.param(STREAMS_HANG, 1, 2, "idle: ['own'] have done nothing", id="one-role-hangs"),
    ],
)
def test_a_run_in_which_too_little_is_done_does_not_pass(
    tmp_path: Path, mutation: Mutation, cuts: int, patience_s: int, verdict: str
) -> None:
    """A cut follows a commit, and each kind of process gets something done, even if only after the last cut."""
    write_mutated_package(mutation, tmp_path)
    done = powercut("ext4", cuts, tmp_path, f"--patience={patience_s}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert verdict in done.stdout


def test_what_was_raised_before_a_cut_counts_and_what_came_of_it_does_not(tmp_path: Path) -> None:
    """An error before a cut counts, also if it was heard of only after the cut: it tells when it was raised."""
    watch = Watch(tmp_path, Figures(), Plan())
    watch.crew.raised += [Raised(1.0, "an error"), Raised(3.0, "the disk is gone")]
    watch.blame(until_s=2.0)
    assert watch.figures.findings == ["raised: an error"]
    assert watch.crew.raised == []


def test_the_power_cuts_see_an_error_that_no_cut_has_caused(tmp_path: Path) -> None:
    """A verb that fails now and then, with a disk that has its power, is a finding."""
    write_mutated_package(RAISES, tmp_path)
    done = powercut("ext4", 50, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "raised: " in done.stdout
    assert "RuntimeError: planted" in done.stdout


def test_an_interrupted_run_does_not_pass() -> None:
    """Ctrl-C ends the run with the figures of the file system at hand, and no other one is begun."""
    command = [*PYTHON, "-m", "harness.powercut"]
    with subprocess.Popen(command, env=environment(PACKAGE_PARENT), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        # From its first line on, the run takes Ctrl-C as a request to end.
        said = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        said += running.communicate(timeout=DEADLINE_S)[0]
    if "skipped: " in said:
        pytest.skip(said.partition("skipped: ")[2].strip())
    assert running.returncode == INTERRUPTED, said
    assert said.rstrip().endswith("; interrupted")
    assert said.count(" cuts, ") == 1
