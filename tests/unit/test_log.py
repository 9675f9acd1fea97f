"""The library logs rare events by ids, and never logs what a document holds.

Each case fails if its line is not logged, or is logged at another level.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.files import file_engine

import persist
from persist.storage import disk, lock

CANARY = "canary-51c7"


@dataclass
class Scene:
    """A store that keeps journals, and a session with the canary in every place."""

    store: persist.Store
    monkeypatch: pytest.MonkeyPatch
    caplog: pytest.LogCaptureFixture

    def other(self) -> persist.Store:
        return persist.Store(self.store.path, journal="always")

    def add(self, store: persist.Store | None = None) -> None:
        (store or self.store).append("s", "messages", {"content": CANARY})

    def journal(self) -> Path:
        return next(self.store.path.glob("s.*.journal"))

    def fail(self, function: str, code: int) -> None:
        def broken(*_arguments: Any) -> None:
            raise OSError(code, os.strerror(code))

        self.monkeypatch.setattr(disk, function, broken)


@pytest.fixture
def scene(directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Scene:
    store = persist.Store(directory, journal="always")
    store.create("s", {"title": CANARY, "messages": [{"id": "m1", "content": CANARY}]})
    scene = Scene(store, monkeypatch, caplog)
    scene.add()
    caplog.set_level(logging.DEBUG, logger="persist")
    return scene


def fold(scene: Scene) -> None:
    scene.store.compact("s")


def fold_of_a_large_journal(scene: Scene) -> None:
    file_engine(scene.store).options.fold_bytes = 1
    scene.add()


def catch_up(scene: Scene) -> None:
    scene.add(scene.other())
    scene.add()


def wait_for_a_thread(scene: Scene) -> None:
    scene.monkeypatch.setattr(lock, "LONG_WAIT_S", 0.001)
    with scene.store.transaction("s"):
        waiter = threading.Thread(target=scene.add)
        waiter.start()
        time.sleep(0.05)
    waiter.join()


def wait_in_vain(scene: Scene) -> None:
    with scene.store.transaction("s"):
        waiter = threading.Thread(target=refused, args=(scene,))
        waiter.start()
        waiter.join()


def refused(scene: Scene) -> None:
    with pytest.raises(persist.LockTimeout):
        scene.store.append("s", "messages", {"content": CANARY}, timeout_s=0.01)


def stale_stream(scene: Scene) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        scene.store.start_stream("s", {"content": CANARY}, stream_id="t1")
    scene.store.clear_stale_streams()


def stream_of_another_program(scene: Scene) -> None:
    (scene.store.path / "old.json").write_text(f'{{"active_stream_id": "{CANARY} {CANARY}", "messages": []}}')
    scene.store.clear_stale_streams(every_session=True)


def torn_tail(scene: Scene) -> None:
    path = scene.journal()
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b'{"crc":"' + CANARY.encode())
    scene.add(scene.other())


def disk_that_refuses(scene: Scene) -> None:
    scene.fail("write_at", errno.ENOSPC)
    with pytest.raises(persist.CommitFailed):
        scene.add()


def lock_that_cannot_be_opened(scene: Scene) -> None:
    scene.fail("open_known", errno.EMFILE)
    with pytest.raises(persist.CommitFailed):
        scene.add()


def events_that_are_refused(scene: Scene) -> None:
    with scene.store.start_stream("s", stream_id="t1") as stream:
        stream.emit(CANARY)
        with scene.monkeypatch.context() as patched:
            Scene(scene.store, patched, scene.caplog).fail("write", errno.ENOSPC)
            with pytest.raises(persist.EmitFailed):
                stream.emit(CANARY)


def unknown_outcome(scene: Scene) -> None:
    scene.fail("sync_data", errno.EIO)
    scene.fail("sync", errno.EIO)
    with pytest.raises(persist.CommitUnknown):
        scene.add()


def older_journal(scene: Scene) -> None:
    before = scene.journal().read_bytes()
    scene.add()
    scene.journal().write_bytes(before)
    scene.add()


CASES: dict[str, tuple[Callable[[Scene], None], int, str]] = {
    "fold": (fold, logging.DEBUG, "Session 's': folded a journal of "),
    "fold of a large journal": (fold_of_a_large_journal, logging.DEBUG, "Session 's': folded a journal of "),
    "catch-up": (catch_up, logging.DEBUG, "Session 's': caught up with its journal, at byte "),
    "long wait": (wait_for_a_thread, logging.DEBUG, "Session 's': waited 0."),
    "wait in vain": (wait_in_vain, logging.DEBUG, "Session 's': waited in vain for its lock"),
    "stale stream": (stale_stream, logging.INFO, "Session 's': its stream t1 was cleared, which had died"),
    "foreign stream": (stream_of_another_program, logging.INFO, "Session 'old': its stream of another program was "),
    "torn tail": (torn_tail, logging.INFO, "Session 's': folded a torn tail away, at byte "),
    "full disk": (disk_that_refuses, logging.WARNING, "Session 's': the disk refused at "),
    "no descriptor": (lock_that_cannot_be_opened, logging.WARNING, "Session 's': the disk refused at "),
    "refused events": (events_that_are_refused, logging.WARNING, "Stream t1: the disk refused at "),
    "unknown outcome": (unknown_outcome, logging.WARNING, "Session 's': it is unknown whether its last commit"),
    "older journal": (older_journal, logging.WARNING, "Session 's': its journal is older than what was read"),
}


@pytest.mark.parametrize(("provoke", "level", "beginning"), CASES.values(), ids=CASES)
def test_what_is_rare_is_logged(scene: Scene, provoke: Callable[[Scene], None], level: int, beginning: str) -> None:
    """A rare event is logged at its level, by its ids, under the one name ``persist``, and without any content."""
    provoke(scene)
    found = [record for record in scene.caplog.records if record.getMessage().startswith(beginning)]
    assert [(record.name, record.levelno) for record in found[:1]] == [("persist", level)]
    assert CANARY not in scene.caplog.text


def test_what_is_usual_is_not_logged(scene: Scene) -> None:
    """Usual work is not logged: a server that logs at DEBUG gets no line for each commit."""
    store = scene.store
    session = store.load("s")
    session.data["title"] = "other"
    session.save()
    with store.start_stream("s", {"content": CANARY}) as stream:
        stream.emit(CANARY)
        stream.checkpoint({"content": CANARY})
        stream.finish({"content": CANARY})
    with store.transaction("s") as tx:
        tx.fields["title"] = CANARY
    store.heads()
    store.tail("s")
    assert scene.caplog.records == []


def test_a_program_without_logging_sees_nothing(tmp_path: Path) -> None:
    """A warning of the library prints no line on standard error. Fails without the handler that does nothing."""
    program = (
        "import sys, os, persist, persist.storage.disk as disk\n"
        "store = persist.Store(sys.argv[1])\n"
        "store.create('s')\n"
        "def broken(*_): raise OSError(28, 'No space left')\n"
        "disk.write = broken\n"
        "try: store.append('s', 'log', 1)\n"
        "except persist.CommitFailed: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")
