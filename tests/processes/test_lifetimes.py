"""Ownership after every way in which a process can end, split, pause, or be told the wrong time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from actors import DEADLINE_S, eventually
from conftest import ActorFactory
from harness.turns import START, contents

import persist


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"messages": []})


# --- ends -------------------------------------------------------------------------------------------------------------

STEPS_OF_FINISH = ["create", "write", "sync", "close", "replace", "sync_directory", "unlink"]


@pytest.mark.parametrize("step", STEPS_OF_FINISH)
def test_killed_in_the_middle_of_finish(
    store: persist.Store, session: persist.Session, actor: ActorFactory, step: str
) -> None:
    """A turn that is killed at any step of its finish is whole: finished, or interrupted with its partial.

    The session is free.
    """
    owner = actor()
    owner.do(START)
    owner.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    owner.start_and_pause("stream.finish({'role': 'assistant', 'content': 'Because.'})", step)
    owner.kill()
    is_committed = STEPS_OF_FINISH.index(step) > STEPS_OF_FINISH.index("replace")
    assert [c.session_id for c in store.clear_stale_streams().cleared] == ([] if is_committed else ["s-1"])
    assert contents(store) == (
        [("Why?", False), ("Because.", False)] if is_committed else [("Why?", True), ("Be", True)]
    )
    assert store.load("s-1").active_stream_id is None
    store.append("s-1", "messages", {"content": "next"})
    assert store.check() == []
    assert list((store.path / ".leases").iterdir()) == []


def test_interrupt_in_the_middle_of_finish_frees_the_session(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """Ctrl-C inside `finish` reaches the caller, and the exit of the block ends the turn."""
    owner = actor()
    code = """
from persist.storage import disk
real = disk.replace
def interrupted(source, target):
    disk.replace = real
    raise KeyboardInterrupt
seen = None
try:
    with store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}) as stream:
        disk.replace = interrupted
        stream.finish({'role': 'assistant', 'content': 'Because.'})
except KeyboardInterrupt:
    seen = stream.id
seen is not None
"""
    assert owner.do(code) is True
    assert contents(store) == [("Why?", True)]
    assert store.check() == []
    owner.do(START)


def test_exec_gives_the_lease_up(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """After exec the stream is dead although its process id lives, because no process runs it any more."""
    owner = actor()
    owner.do(START)
    owner.start("os.execv('/bin/sleep', ['sleep', '60'])")
    eventually(lambda: store.load("s-1").clear_stale_stream())
    assert owner.process.poll() is None


def test_daemon_thread_at_exit_leaves_a_stale_stream_and_no_noise(
    store: persist.Store, session: persist.Session
) -> None:
    """A daemon thread in mid-turn neither stops nor disturbs the end of the interpreter.

    The next process takes over.
    """
    code = f"""
import persist, threading
store, ready = persist.Store({str(store.path)!r}), threading.Event()
def turn():
    with store.start_stream('s-1', {{'role': 'user', 'content': 'Why?'}}) as stream:
        while True:
            stream.checkpoint({{'role': 'assistant', 'content': 'Be'}})
            ready.set()
threading.Thread(target=turn, daemon=True).start()
ready.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with store.start_stream("s-1", {"role": "user", "content": "Again?"}) as stream:
        stream.finish()
    assert contents(store) == [("Why?", True), ("Be", True), ("Again?", False)]


# --- forks ------------------------------------------------------------------------------------------------------------


def test_preforked_workers_share_a_store(store: persist.Store, actor: ActorFactory) -> None:
    """A store that a Gunicorn master opens and uses (preload) serves four forked workers, and nothing is lost."""
    store.create("s-1", {"messages": [], "n": 0})
    master = actor(timeout_s=60.0)
    code = """
def worker(name):
    for n in range(40):
        store.append('s-1', 'messages', {'id': f'{name}-{n}', 'content': 'x'})
        with store.transaction('s-1') as tx:
            tx.data['n'] += 1
        try:
            with store.start_stream('s-1', {'role': 'user', 'content': name}) as stream:
                stream.finish({'role': 'assistant', 'content': name})
        except persist.SessionBusy:
            pass
store.append('s-1', 'messages', {'id': 'master', 'content': 'x'})
children = []
for name in range(4):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            worker(name)
            status = 0
        finally:
            os._exit(status)
    children.append(child)
[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
"""
    assert master.do(code) == [0, 0, 0, 0]
    data = store.load("s-1").data
    ids = [message["id"] for message in data["messages"] if "role" not in message]
    assert len(ids) == len(set(ids)) == 161
    assert data["n"] == 160
    assert data["active_stream_id"] is None
    assert store.check() == []


def test_fork_while_another_thread_holds_the_lock(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A child that is forked while another thread of its parent holds the lock can lock once that thread is done."""
    other = actor(timeout_s=20.0)
    code = """
import threading, warnings
warnings.simplefilter('ignore', DeprecationWarning)
inside, leave = threading.Event(), threading.Event()
def hold():
    with store.transaction('s-1') as tx:
        tx.data['by thread'] = True
        inside.set()
        leave.wait()
thread = threading.Thread(target=hold)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    status = 1
    try:
        store.append('s-1', 'log', 'child')
        status = 7
    finally:
        os._exit(status)
leave.set()
thread.join()
os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert other.do(code) == 7
    assert store.load("s-1").data == {"messages": [], "by thread": True, "log": ["child"]}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_use_stores_of_their_own(
    store: persist.Store, session: persist.Session, tmp_path: Path, method: str
) -> None:
    """Children of multiprocessing, by every start method, append beside a stream of the parent, and do not take it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing, persist, sys, warnings

def child(n):
    store = persist.Store({str(store.path)!r}, timeout_s=30)
    store.append('s-1', 'messages', {{'id': f'c{{n}}', 'content': 'child'}})
    assert store.load('s-1').clear_stale_stream() is False

if __name__ == '__main__':
    context = multiprocessing.get_context({method!r})
    store = persist.Store({str(store.path)!r}, timeout_s=30)
    with store.start_stream('s-1', {{'role': 'user', 'content': 'Why?'}}) as stream:
        children = [context.Process(target=child, args=(n,)) for n in range(3)]
        for each in children: each.start()
        for each in children: each.join()
        stream.finish()
    sys.exit(max(each.exitcode for each in children))
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(m["content"] for m in store.load("s-1").data["messages"]) == ["Why?", "child", "child", "child"]


# --- clocks and containers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [-10, 10])
def test_wrong_clock_changes_nothing_that_matters(
    store: persist.Store, session: persist.Session, actor: ActorFactory, days: int
) -> None:
    """With a clock that is ten days off, live streams stay, dead ones go, and merges and the order of messages hold."""
    wrong, right = actor(), actor()
    wrong.do(
        f"""
import datetime as real, time
from persist import streams
from persist.storage import document
class Shifted(real.datetime):
    @classmethod
    def now(cls, tz=None):
        return real.datetime.now(tz) + real.timedelta(days={days})
streams.datetime = document.datetime = Shifted
"""
    )
    old = store.load("s-1")
    right.do(START)
    assert wrong.do("store.load('s-1').clear_stale_stream()") is False
    assert wrong.do("store.clear_stale_streams()") == persist.Sweep([], {})
    wrong.do("store.append('s-1', 'messages', {'id': 'w', 'content': 'from the wrong clock'})")
    right.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")
    old.data["title"] = "merged"
    old.save()
    assert [content for content, _ in contents(store)] == ["Why?", "from the wrong clock", "Because."]
    right.do(START)
    right.kill()
    assert wrong.do("len(store.clear_stale_streams().cleared)") == 1


def _containers() -> str | None:
    """Return why no container can be made here, or None if one can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    tried = subprocess.run([*CONTAINER, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"unshare is refused: {tried.stderr.strip()}"


CONTAINER = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def test_two_containers_share_a_directory(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """The kernel's locks hold across mount and pid namespaces. A pid means nothing there, and is not used."""
    reason = _containers()
    if reason:
        pytest.skip(reason)
    owner, other = actor(prefix=CONTAINER), actor(prefix=CONTAINER, timeout_s=0.2)
    assert owner.do("os.getpid()") == other.do("os.getpid()") == 1
    stream_id = owner.do(START)
    with pytest.raises(persist.SessionBusy):
        other.do(START)
    assert other.do("store.load('s-1').clear_stale_stream()") is False
    owner.start_and_pause("store.append('s-1', 'log', 1)", "create")
    with pytest.raises(persist.LockTimeout) as caught:
        other.do("store.append('s-1', 'log', 2)")
    assert caught.value.holder in ("unknown", "a process outside this container")
    owner.go()
    owner.result()
    owner.kill()
    # The kill hits `unshare`, and the kernel ends the container after it.
    eventually(lambda: other.do("[c.stream_id for c in store.clear_stale_streams().cleared]") == [stream_id])


def test_stopped_waiter_blocks_nobody(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """SIGSTOP of a process that only waits for the lock does not block the others."""
    holder, waiter = actor(), actor(timeout_s=30.0)
    holder.start_and_pause("store.append('s-1', 'log', 1)", "create")
    waiter.start("store.append('s-1', 'log', 2)")
    os.kill(waiter.pid, signal.SIGSTOP)
    holder.go()
    holder.result()
    persist.Store(store.path, timeout_s=1.0).append("s-1", "log", 3)
    os.kill(waiter.pid, signal.SIGCONT)
    waiter.result()
    assert sorted(store.load("s-1").data["log"]) == [1, 2, 3]


# --- modes ------------------------------------------------------------------------------------------------------------


def test_files_are_private_from_their_first_instant(store: persist.Store, actor: ActorFactory) -> None:
    """Under umask 0 the directory and the leases are 0700, and every file is 0600, from its first instant.

    This includes the temporary file.
    """
    writer = actor()
    directory = store.path.parent / "private" / "sessions"
    writer.do(f"os.umask(0)\nstore = persist.Store({str(directory)!r})\nstore.create('s-1', {{'messages': []}})\n0")
    writer.do("stream = store.start_stream('s-1')")
    writer.start_and_pause("stream.checkpoint({'role': 'assistant', 'content': 'secret'})", "write")
    modes = {path.relative_to(directory).parts[0]: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert modes == {".leases": 0o700, "s-1.json": 0o600, "s-1.json.lock": 0o600, "s-1.json.tmp": 0o600}
    assert {path.stat().st_mode & 0o777 for path in (directory / ".leases").iterdir()} == {0o600}
    assert directory.stat().st_mode & 0o777 == directory.parent.stat().st_mode & 0o777 == 0o700
    writer.go()
    writer.result()
