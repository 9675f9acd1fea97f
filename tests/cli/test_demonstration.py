"""`scripts/run` shows real runs, and says so if `persist` does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from demonstration import command, crowd, naive
from demonstration.part import NAIVE, OURS, Part
from harness.planted import PYTHON, environment, write_mutated_package

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def test_demonstration_holds(tmp_path: Path) -> None:
    """In all four parts, run as a person runs them, `persist` keeps everything, and the files are there for a look."""
    directory = tmp_path / "files"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "run", "--json", "--directory", directory],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["held"] is True
    assert [part["broken"] for part in found["parts"]] == [[], [], [], []]
    added, orphaned, kills, _ = (part["figures"] for part in found["parts"])
    assert added["kept"]["persist"] == added["added"] == 800
    assert added["kept"]["naive"] < 800
    assert orphaned["orphaned"]["persist"] == 0
    for what in ("the question is kept", "the answer so far is kept", "a follower resumes: no gap, no repeat"):
        assert kills[what] == {"naive": 0, "persist": 20}
    assert len(kills["next turn after, s"]["persist"]) == 20
    messages = json.loads((directory / "persist" / "killed.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 20


#: Each row has the part, the mechanism that is taken out of the package, and the words of the part.
PLANTED = [
    (
        "crowd",
        "storage/held.py",
        "lock_descriptor(self.fd, blocking=False)",
        "True",
        "messages were lost",
    ),
    (
        "orphan",
        "streams.py",
        "if not _is_same(active, stream_id) or incarnation",
        "if incarnation",
        "running turns were cleared",
    ),
    (
        "killed",
        "streams.py",
        "            self._commit(copy, owner, answer_id)\n\n    def append(",
        "            pass\n\n    def append(",
        "the answer so far is kept: 0 of 20",
    ),
]


@pytest.mark.parametrize(("part", "file", "old", "new", "words"), PLANTED, ids=[case[0] for case in PLANTED])
def test_part_notices_what_is_taken_out(tmp_path: Path, part: str, file: str, old: str, new: str, words: str) -> None:
    """A part on a copy of the package with one mechanism taken out says what did not hold."""
    write_mutated_package((file, old, new), tmp_path)
    code = (
        f"from demonstration import {part} as part; from pathlib import Path; import json\n"
        "if __name__ == '__main__':\n"
        f"    print(json.dumps(part.run(Path({str(tmp_path)!r}), lambda share: None).broken))\n"
    )
    script = tmp_path / "one_part.py"
    script.write_text(code)
    env = environment(tmp_path)
    env["PYTHONPATH"] += f":{ROOT / 'scripts'}"
    done = subprocess.run(
        [*PYTHON, script], env=env, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert words in "".join(json.loads(done.stdout))


def failing(_directory: Path, _progress: object) -> Part:
    return Part("A part", (NAIVE, OURS), {"kept of 800": ("3", "799")}, {}, ["1 of 800 messages were lost"])


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_promise_that_did_not_hold_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """One broken promise in one part makes the status 1, and the output names it."""
    monkeypatch.setattr(command, "PARTS", (failing,))
    result = CliRunner().invoke(command.run, [*options, "--directory", str(tmp_path / "files")])
    assert result.exit_code == command.BROKEN
    assert "1 of 800 messages were lost" in result.stdout
    assert "lost nothing" not in result.stdout


def test_directory_with_files_is_refused(tmp_path: Path) -> None:
    """A directory with files is refused, because the demonstration does not mix its files with others."""
    (tmp_path / "mine").write_text("")
    result = CliRunner().invoke(command.run, ["--directory", str(tmp_path)])
    assert result.exit_code == 2
    assert "must be new, or an empty directory" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_naive_code_loses_what_it_is_said_to_lose(tmp_path: Path) -> None:
    """The naive code loses a message of another process, and orphans a live turn, by the order of three calls."""
    path = tmp_path / f"{crowd.SESSION}.json"
    naive.save(path, {"messages": [], "active_stream_id": "dead"})
    stale = naive.load(path)
    crowd.add_naively(tmp_path, {"id": "theirs"})
    naive.save(path, {**stale, "messages": [{"id": "mine"}]})
    assert [message["id"] for message in naive.load(path)["messages"]] == ["mine"]
    server = naive.Server(path)

    class Starting(set[str]):
        def __contains__(self, _name: object) -> bool:
            server.live = set()
            server._lock.release()
            server.start_stream()
            server._lock.acquire()
            return False

    server.live = Starting()
    server.clear_stale_stream()
    assert naive.load(path)["active_stream_id"] is None
    assert len(server.live) == 1
