"""Concurrent operations of several processes, some of them killed, have an order that explains every answer.

The long form is `scripts/histories`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.histories import ROOT, Plan, run_round

from persist.storage.commit import Mode


def broken_package(parent: Path, file: str, bug: str) -> Path:
    """Write a copy of the package with a bug appended to one module. Return its directory."""
    shutil.copytree(ROOT / "persist", parent / "persist", ignore=shutil.ignore_patterns("__pycache__"))
    with (parent / "persist" / file).open("a") as module:
        module.write(bug)
    return parent


def is_seen(expected: set[str], scratch: Path, package: Path, journal: Mode) -> bool:
    """Tell whether one of up to five rounds on a broken package shows an anomaly of these kinds.

    Chance decides what a round shows. Without the bug none shows an anomaly (`test_every_history_is_linearizable`).
    """
    for number in range(5):
        directory = scratch / f"round-{number}"
        directory.mkdir()
        plan = Plan(operations=1_800, groups=2, kills=0, reads=0.5, journal=journal, seed=1533 + number)
        if expected & run_round(directory, plan, package=package).kinds:
            return True
    return False


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
    """All operations on lists, registers, owners and lives have one order that explains them.

    They are 2,000 operations of 3 processes with 2 threads each, and there are 6 kills.
    """
    report = run_round(scratch, Plan(operations=2_000, groups=4, kills=6, journal=journal, fold=fold))
    assert report.anomalies == []
    assert report.operations >= 2_000
    assert report.kills == 6


# Every transaction locks a file of its own, so neither threads nor processes exclude each other any more.
LOCK_OUT = """
_acquire = Hold.acquire

def acquire(self):
    self.path = os.path.join(os.path.dirname(self.path), f"{os.urandom(8).hex()}.lock")
    return _acquire(self)

Hold.acquire = acquire
"""
OLD_CACHE = """
_seen = {}

def _load(self, session_id):
    found = _seen.setdefault(session_id, self._open().engine.read(session_id))
    return self._session(session_id, found, is_durable=False)

Store.load = _load
"""
EARLY_ANSWER = """
import threading
_append = Store.append

def _append_soon(self, *arguments, **options):
    threading.Timer(0.002, _append, (self, *arguments), options).start()
    return "soon"

Store.append = _append_soon
"""
ONE_BY_ONE = """
_extend = Store.extend

def _extend_one_by_one(self, session_id, field, items, **options):
    return [_extend(self, session_id, field, [item], **options) for item in items][-1]

Store.extend = _extend_one_by_one
"""
# No verb compares versions any more.
ANY_VERSION = """
require_version = lambda *_: None
"""
SHORT_TAIL = """
_tail = Store.tail
Store.tail = lambda *arguments, **options: _tail(*arguments, **options)[:-1]
"""
CREATES_ANEW = """
def _of(cls, tx, *, create=False):
    return cls(Committed(first_header(), empty()), tx, is_new=True) if create else cls(tx.read(), tx)

WorkingCopy.of = classmethod(_of)
"""
KEEPS_WHAT_IT_DELETES = """
_delete = streams.delete

def _delete_or_not(tx, *, force=False):
    if tx.read().header.revision % 3:
        _delete(tx, force=force)

streams.delete = _delete_or_not
"""
NOT_ONCE = """
_refuse_started = lambda *_, **__: None
"""
NO_FENCE = """
Stream._require_ownership = lambda self, header, active: StreamOwner(self.id, 0, '', '', '')
"""
FIELDS_LEFT_OUT = """
_set_fields = lambda copy, fields: None
"""
NO_VERSION = """
_update = Store.update
Store.update = lambda self, session_id, function, if_version=None: _update(self, session_id, function)
"""
# Two commits can share a version, because it comes from half of the revision.
VERSION_OF_THE_TIME = """
Header.version = property(lambda self: f"{self.incarnation}.{self.revision // 2}")
"""
# The save writes an old object without a merge.
NO_MERGE = """
def merge_contents(base, mine, *others):
    return mine
"""
NO_LIVENESS = """
from contextlib import contextmanager
_probe = FileTransaction.probe

@contextmanager
def _probe_in_vain(self, stream_id):
    with _probe(self, stream_id):
        yield True

FileTransaction.probe = _probe_in_vain
"""


@pytest.mark.parametrize(
    ("file", "bug", "expected"),
    [
        pytest.param("storage/lock.py", LOCK_OUT, {"list: lost append", "register: not linearizable"}, id="lock-out"),
        pytest.param("store.py", OLD_CACHE, {"list: stale read"}, id="load-from-an-old-cache"),
        pytest.param("store.py", EARLY_ANSWER, {"list: stale read"}, id="append-answered-before-it-is-written"),
        pytest.param("store.py", NO_VERSION, {"register: not linearizable"}, id="if-version-ignored"),
        pytest.param(
            "storage/document.py",
            VERSION_OF_THE_TIME,
            {"register: version of two commits", "list: version of two commits", "life: version of two commits"},
            id="version-that-two-commits-share",
        ),
        pytest.param("store.py", ONE_BY_ONE, {"list: split pair"}, id="pair-in-two-commits"),
        pytest.param("store.py", ANY_VERSION, {"list: append to another version"}, id="append-to-any-version"),
        pytest.param("store.py", ANY_VERSION, {"life: not linearizable"}, id="delete-of-any-version"),
        pytest.param("store.py", SHORT_TAIL, {"list: stale read"}, id="tail-without-the-last-item"),
        pytest.param("working_copy.py", CREATES_ANEW, {"life: not linearizable"}, id="create-where-a-session-is"),
        pytest.param("store.py", KEEPS_WHAT_IT_DELETES, {"life: not linearizable"}, id="delete-that-does-nothing"),
        pytest.param("streams.py", NOT_ONCE, {"owner: not linearizable"}, id="running-prompt-is-not-recognised"),
        pytest.param("streams.py", NO_FENCE, {"owner: not linearizable"}, id="lost-stream-goes-on"),
        pytest.param("streams.py", FIELDS_LEFT_OUT, {"owner: not linearizable"}, id="start-without-its-fields"),
        pytest.param("session.py", NO_MERGE, {"list: lost append"}, id="an-old-object-written-as-it-is"),
        pytest.param("files.py", NO_LIVENESS, {"owner: not linearizable"}, id="live-streams-taken-for-dead"),
    ],
)
def test_a_planted_bug_is_caught(scratch: Path, file: str, bug: str, expected: set[str]) -> None:
    """A package with a bug shows an anomaly that this bug causes, so the proof can fail."""
    package = broken_package(scratch / "broken", file, bug)
    assert is_seen(expected, scratch, package, journal="never")


# Bugs of journals.
TRUSTS_ITS_END = """
from persist.storage.journal import Tail
Tail.is_end_of = lambda self, fd: True
# The look at each fold would notice it first.
commit.verify = lambda *_: None
"""
OVERTAKEN_IS_EMPTY = """
def _read_now(self, session_id):
    import time
    with self.looking_at(session_id) as paths:
        found = document.read(paths.document, session_id, paths.file_id)
        name = found.header.journal
        if name is None:
            return Replica(found.header, found.content, found.version)
        # Held open for a moment: else few folds come between.
        time.sleep(0.001)
        log = journal.Journal(paths.journal(name), session_id, name)
        try:
            fd = log.open()
        except journal.Overtaken:
            return Replica(found.header, found.content, found.version)
        try:
            header, content, tail = log.replay(fd, found.header, found.content)
            return Replica(header, content, found.version, tail)
        finally:
            disk.close(fd)

SessionDirectory.read_now = _read_now
"""


@pytest.mark.parametrize(
    ("file", "bug", "expected"),
    [
        pytest.param(
            "storage/transaction.py",
            TRUSTS_ITS_END,
            {"list: reordered appends", "list: wrong items", "list: lost append"},
            id="does-not-look-behind-the-end-it-knows",
        ),
        pytest.param(
            "storage/directory.py",
            OVERTAKEN_IS_EMPTY,
            {"list: stale read", "register: not linearizable"},
            id="a-load-overtaken-by-a-fold",
        ),
    ],
)
def test_a_bug_planted_in_the_journal_is_caught(scratch: Path, file: str, bug: str, expected: set[str]) -> None:
    """A bug in the journal shows its anomaly, with every session journaled, by stores that fold at different times."""
    package = broken_package(scratch / "broken", file, bug)
    assert is_seen(expected, scratch, package, journal="always")
