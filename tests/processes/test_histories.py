"""Histories of concurrent operations of several processes, some of them killed, have an order that explains them.

The long form is `scripts/histories`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.histories import ROOT, Plan, run_round

Swaps = tuple[tuple[str, str], ...]


def broken_package(parent: Path, file: str, swaps: Swaps) -> Path:
    """A copy of the package with pieces of one file's text replaced; returns the directory that holds it."""
    shutil.copytree(ROOT / "persist", parent / "persist", ignore=shutil.ignore_patterns("__pycache__"))
    path = parent / "persist" / file
    text = path.read_text()
    for old, new in swaps:
        assert old in text, f"{file} no longer has the text {old!r}"
        text = text.replace(old, new)
    path.write_text(text)
    return parent


@pytest.mark.parametrize(
    ("journal", "fold"),
    [
        pytest.param("mixed", "mixed", id="each-in-its-way"),
        pytest.param("auto", "normal", id="large-sessions-have-journals"),
        pytest.param("always", "normal", id="all-have-journals"),
        pytest.param("always", "1", id="all-are-folded-at-each-commit"),
    ],
)
def test_every_history_is_linearizable(scratch: Path, journal: Any, fold: str) -> None:
    """Lists, registers and owners: 2,000 operations of 3 processes with 2 threads each, 6 kills, and an order for all
    of it.
    """
    report = run_round(scratch, Plan(operations=2_000, groups=4, kills=6, journal=journal, fold=fold))
    assert report.anomalies == []
    assert report.operations >= 2_000
    assert report.kills == 6


# Every transaction locks a file of its own: neither threads nor processes exclude each other any more.
LOCK_OUT = (
    (
        "lock.hold(self.layout.session(session_id).lock,",
        "lock.hold(self.layout.session(f'{session_id}-{os.urandom(8).hex()}').lock,",
    ),
)
OLD_CACHE = (
    (
        "self._open_files().read(session_id, decode=True), is_durable=False)",
        "_SEEN.setdefault(session_id, self._open_files().read(session_id, decode=True)), is_durable=False)",
    ),
    ("Result = TypeVar", "_SEEN: dict[str, Snapshot] = {}\nResult = TypeVar"),
)
EARLY_ANSWER = (
    (
        "    def append(self,",
        "    def append(self, *arguments: Any) -> int:\n"
        "        import threading\n"
        "        threading.Timer(0.002, self._append, arguments).start()\n"
        "        return 0\n\n"
        "    def _append(self,",
    ),
)
NO_REVISION = (("if if_revision is not None and draft.header.revision != if_revision:", "if False:"),)
NO_LIVENESS = (("            yield probe.is_dead\n", "            yield True\n"),)


@pytest.mark.parametrize(
    ("file", "swaps", "expected"),
    [
        pytest.param(
            "files/transaction.py", LOCK_OUT, {"list: lost append", "register: not linearizable"}, id="lock-out"
        ),
        pytest.param("store.py", OLD_CACHE, {"list: stale read"}, id="load-from-an-old-cache"),
        pytest.param("store.py", EARLY_ANSWER, {"list: stale read"}, id="append-answered-before-it-is-written"),
        pytest.param("store.py", NO_REVISION, {"register: not linearizable"}, id="if-revision-ignored"),
        pytest.param(
            "files/transaction.py", NO_LIVENESS, {"owner: not linearizable"}, id="live-streams-taken-for-dead"
        ),
    ],
)
def test_a_planted_bug_is_caught(scratch: Path, file: str, swaps: Swaps, expected: set[str]) -> None:
    """The proof can fail: a package with a bug shows an anomaly that this bug causes."""
    package = broken_package(scratch / "broken", file, swaps)
    report = run_round(scratch, Plan(operations=1_800, groups=2, kills=0, reads=0.5, journal="never"), package=package)
    assert expected & report.kinds


# Of journals.
TRUSTS_ITS_END = (("follow(self._fd, known.tail):", "follow(self._fd, known.tail) if not known.synced else ():"),)
OVERTAKEN_IS_EMPTY = (
    (
        "            return self.journal(session_id, found.header.generation).replay(found)\n",
        # Held open for a moment: else few folds come between.
        "            __import__('time').sleep(0.001)\n"
        "            from persist.storage.journal import Overtaken\n"
        "            with contextlib.suppress(Overtaken):\n"
        "                return self.journal(session_id, found.header.generation).replay(found)\n"
        "            return found\n",
    ),
)


@pytest.mark.parametrize(
    ("file", "swaps", "expected"),
    [
        pytest.param(
            "files/transaction.py",
            TRUSTS_ITS_END,
            {"list: reordered appends", "list: wrong items"},
            id="does-not-look-behind-the-end-it-knows",
        ),
        pytest.param(
            "files/directory.py",
            OVERTAKEN_IS_EMPTY,
            {"list: stale read", "register: not linearizable"},
            id="a-load-overtaken-by-a-fold",
        ),
    ],
)
def test_a_bug_planted_in_the_journal_is_caught(scratch: Path, file: str, swaps: Swaps, expected: set[str]) -> None:
    """With every session journaled, by stores that fold at different times; as above."""
    package = broken_package(scratch / "broken", file, swaps)
    report = run_round(scratch, Plan(operations=1_800, groups=2, kills=0, reads=0.5, journal="always"), package=package)
    assert expected & report.kinds
