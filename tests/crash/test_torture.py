"""kill -9 at random instants loses nothing. The torture sees the loss if a mechanism is taken out."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from harness.planted import (
    FIELDS_THROWN_AWAY,
    HANGS,
    NOT_WRITTEN,
    PACKAGE_PARENT,
    PYTHON,
    STREAMS_HANG,
    Mutation,
    environment,
    run_harness,
    write_mutated_package,
)
from harness.runs import INTERRUPTED

DEADLINE_S = 120

NO_LOCK = (
    "storage/held.py",
    "import lock_descriptor, unlock_descriptor\n",
    "import unlock_descriptor\n\ndef lock_descriptor(fd, *, blocking):\n    return True\n",
)
NOT_IDEMPOTENT = (
    "turn.py",
    "elif (place := messages.place_of(identity, key)) is not None:\n",
    "elif (place := None) is not None:\n",
)
ONE_BY_ONE = (
    "store.py",
    "        return self._add(session_id, field, _encoded_items(field, items), key, create, touch, timeout_s)\n",
    "        for line in _encoded_items(field, items):\n"
    "            version = self._add(session_id, field, [line], key, create, touch, timeout_s)\n"
    "        return version\n",
)
# The values that stand apart are in a commit of their own, before the fields.
COMMIT_IN_TWO = (
    "storage/transaction.py",
    "        after = commit.commit(self, before, header, content, changes or (), self._fd)\n",
    "        if before is not None:\n"
    "            half = Content(before.content.fields, content.apart)\n"
    "            before = commit.commit(self, before, header, half, changes or (), self._fd)\n"
    "            header, changes = header.next(), ()\n"
    "        after = commit.commit(self, before, header, content, changes or (), self._fd)\n",
)
ANY_VERSION = ("store.py", "            if if_version is not None:\n", "            if False:\n")
CREATES_ANEW = ("working_copy.py", "        if create and not tx.exists():\n", "        if create:\n")
NOT_ONCE = (
    "streams.py",
    "                _refuse_started(tx, copy, prompt, live_id=None if is_dead else stale_id)\n",
    "                pass\n",
)
IN_PLACE = (
    "storage/commit.py",
    "            disk.replace(paths.temp, paths.document)\n",
    "            open(paths.document, 'wb').close()\n"
    "            open(paths.document, 'wb').write(open(paths.temp, 'rb').read())\n"
    "            disk.unlink(paths.temp)\n",
)
TEMPS_OF_THEIR_OWN = (
    "storage/layout.py",
    'f"{document}{TEMP}"',
    'f"{document}.{os.getpid()}{TEMP}"',
)
NO_LEASE = ("streams.py", "            if not is_dead:\n                return False\n", "")
OLD_TITLE = (
    "session.py",
    "            merged = merge_contents(base.content, mine, there.content, self._policies, prefer)\n",
    "            merged = merge_contents(base.content, mine, there.content, self._policies, prefer)\n"
    "            from persist.storage.content import placed\n"
    "            merged = placed((dict(merged) | {name: value for name, value in mine if name == 'title'}).items())\n",
)
UNCOUNTED = ("merge.py", "total = t + (m - (b or 0))", "total = max(t, m)")
UNMARKED = ("turn.py", "messages[place][INTERRUPTED] = True", "pass")
NOT_MIRRORED = ("turn.py", '["pending_user_message"] = prompt.get("content")', '["pending_user_message"] = ""')
ONE_MORE_DROPPED = ("event_log.py", "(first[1], tail[start:])", "(first[1], tail[end + 1 :])")
LAST_ONES_ONLY = ("follow.py", "_pending.extend(self._cursor.take())", "_pending.extend(self._cursor.take()[-2:])")
NO_MARK = ("storage/transaction.py", "                held.touch()\n", "                pass\n")

# Mutations of journals.
TRUSTS_ITS_END = (
    "storage/journal.py",
    '        return found[len(fingerprint) :] in (b"", b"\\0")\n',
    "        return True\n",
)
TRUSTS_ITS_REPLICA = (
    "storage/transaction.py",
    "                found = self._caught_up(kept) if kept is not None and kept.version == version else None\n",
    "                found = kept\n",
)
OLD_JOURNAL_GOES_FIRST = (
    "storage/commit.py",
    "            written = write_new(paths.temp, document.to_bytes(header, content), place.options.file_mode)\n",
    "            _remove(map(paths.journal, journals))\n"
    "            written = write_new(paths.temp, document.to_bytes(header, content), place.options.file_mode)\n",
)
HEAD_IS_LEFT_OUT = (
    "storage/commit.py",
    "is_same_fields = content.fields is before.content.fields or content.fields == before.content.fields\n",
    "is_same_fields = True\n",
)


def torture(kills: int, package_parent: Path, scratch: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = (f"--kills={kills}", "--seed=1", f"--directory={scratch}", *more)
    return run_harness("torture", options, package_parent, DEADLINE_S)


@pytest.mark.parametrize(
    ("journal", "fold", "passed"),
    [
        pytest.param("mixed", "mixed", {"entered", "left"}, id="each-in-its-way"),
        pytest.param("auto", "normal", {"entered", "left"}, id="large-sessions-have-journals"),
        pytest.param("always", "normal", {"entered"}, id="all-have-journals"),
        pytest.param("always", "1", {"entered"}, id="all-are-folded-at-each-commit"),
    ],
)
def test_nothing_acknowledged_is_lost_torn_or_doubled_by_kills(
    tmp_path: Path, journal: str, fold: str, passed: set[str]
) -> None:
    """After each kill every acknowledged item is there once, in its writer's order. At the end no file is stray."""
    done = torture(30, PACKAGE_PARENT, tmp_path, f"--journal={journal}", f"--fold={fold}")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {
        name: int(count) for count, name in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1].replace(",", ""))
    }
    assert figures["kills"] == 30
    assert {name for name in ("entered", "left") if figures[name]} == passed


@pytest.mark.parametrize(
    ("mutation", "kills", "verdicts"),
    [
        # Writers that meet in one temporary file also publish halves of it, and take it away from each other.
        pytest.param(NO_LOCK, 150, {"lost", "torn", "raised"}, id="no-lock"),
        pytest.param(NOT_WRITTEN, 150, {"lost"}, id="acknowledged-and-not-written"),
        pytest.param(NOT_IDEMPOTENT, 150, {"doubled"}, id="append-is-not-idempotent"),
        pytest.param(ONE_BY_ONE, 150, {"torn"}, id="pair-in-two-commits"),
        # The lost finding is a visit whose message is there.
        pytest.param(COMMIT_IN_TWO, 150, {"torn", "lost"}, id="transaction-in-two-commits"),
        pytest.param(ANY_VERSION, 150, {"lost"}, id="delete-of-any-version"),
        pytest.param(CREATES_ANEW, 150, {"lost"}, id="create-where-a-session-is"),
        # The client that was to be told the answer raises. The lost finding is overwritten by the second start.
        pytest.param(NOT_ONCE, 300, {"raised", "lost", "torn"}, id="answered-prompt-is-started-again"),
        # The reader of a half raises.
        pytest.param(IN_PLACE, 150, {"torn", "raised"}, id="written-in-place"),
        pytest.param(TEMPS_OF_THEIR_OWN, 100, {"stray"}, id="temps-that-nobody-removes"),
        # The owner raises StreamLost. The lost finding is the stream that the document must show.
        pytest.param(NO_LEASE, 150, {"raised", "lost"}, id="live-streams-are-cleared"),
        # The finding is torn where a title goes together with a change that nobody has acknowledged yet.
        pytest.param(FIELDS_THROWN_AWAY, 40, {"lost", "torn"}, id="a-save-drops-small-fields"),
        pytest.param(OLD_TITLE, 150, {"lost"}, id="a-save-brings-an-old-title-back"),
        pytest.param(UNCOUNTED, 150, {"lost"}, id="one-of-two-visits-is-not-counted"),
        # The finding is torn where others had to mark the turn of a dead process.
        pytest.param(UNMARKED, 40, {"lost", "torn"}, id="no-mark-on-an-interrupted-turn"),
        pytest.param(NO_MARK, 80, {"misplaced"}, id="commits-leave-the-time-of-the-lock-alone"),
        pytest.param(NOT_MIRRORED, 40, {"lost"}, id="a-prompt-missing-from-the-stream-fields"),
        pytest.param(ONE_MORE_DROPPED, 150, {"lost"}, id="one-more-event-is-dropped-than-is-told"),
        # The follower raises.
        pytest.param(LAST_ONES_ONLY, 150, {"raised"}, id="a-follower-that-is-behind-passes-events-over"),
    ],
)
def test_the_torture_sees_a_planted_bug(tmp_path: Path, mutation: Mutation, kills: int, verdicts: set[str]) -> None:
    """With one mechanism taken out of a copy of the package, the torture ends with that verdict."""
    write_mutated_package(mutation, tmp_path)
    done = torture(kills, tmp_path, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert found & verdicts, done.stdout


@pytest.mark.parametrize(
    ("mutation", "fold", "verdicts"),
    [
        # A record is written over, or two records stand behind the same one. The next process finds damage.
        pytest.param(TRUSTS_ITS_END, "normal", {"lost", "torn", "raised"}, id="does-not-look-behind-the-end-it-knows"),
        pytest.param(TRUSTS_ITS_REPLICA, "1", {"lost", "torn", "raised"}, id="does-not-look-at-the-files"),
        pytest.param(OLD_JOURNAL_GOES_FIRST, "1", {"torn", "raised"}, id="the-old-journal-goes-before-the-rename"),
        # A fold raises, because it compares the replica with the files.
        pytest.param(HEAD_IS_LEFT_OUT, "normal", {"lost", "raised"}, id="small-fields-missing-from-a-record"),
    ],
)
def test_the_torture_sees_a_bug_planted_in_the_journal(
    tmp_path: Path, mutation: Mutation, fold: str, verdicts: set[str]
) -> None:
    """With every session journaled and one mechanism taken out, the torture ends with that verdict."""
    write_mutated_package(mutation, tmp_path)
    done = torture(150, tmp_path, tmp_path, "--journal=always", f"--fold={fold}")
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert found & verdicts, done.stdout


@pytest.mark.parametrize(
    ("mutation", "patience_s", "verdict"),
    [
        pytest.param(HANGS, 1, "idle: no commit for 1 s", id="every-verb-hangs"),
        # Without a turn there is none to follow.
        pytest.param(STREAMS_HANG, 2, "idle: ['follow', 'own'] have done nothing", id="one-role-hangs"),
    ],
)
def test_a_run_in_which_too_little_is_done_does_not_pass(
    tmp_path: Path, mutation: Mutation, patience_s: int, verdict: str
) -> None:
    """Each kill follows a commit, and each kind of process gets something done.

    Otherwise the run would pass, because a change that was never acknowledged cannot be lost.
    """
    write_mutated_package(mutation, tmp_path)
    done = torture(20, tmp_path, tmp_path, f"--patience={patience_s}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert verdict in done.stdout


def test_an_interrupted_run_does_not_pass(tmp_path: Path) -> None:
    """Ctrl-C ends the run with its figures, and with the status of a program that SIGINT has ended."""
    command = [*PYTHON, "-m", "harness.torture", f"--directory={tmp_path}"]
    with subprocess.Popen(command, env=environment(PACKAGE_PARENT), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        # From its first line on, the run takes Ctrl-C as a request to end.
        said = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        said += running.communicate(timeout=DEADLINE_S)[0]
    assert running.returncode == INTERRUPTED, said
    assert said.rstrip().endswith("; interrupted")
    assert "0 idle" in said
