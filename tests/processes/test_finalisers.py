"""Objects that are dropped, in mid-run and at the end of the interpreter: what they print, and what they wait for.

Each case is a process of its own with `-W error -X dev`, where a warning in a finaliser becomes "Exception ignored".
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from actors import DEADLINE_S

import persist

BEGIN = """
import asyncio, builtins, gc, os, sys, threading, time, types
import persist, persist.aio
from persist import watch
from persist.storage import held
store = persist.Store({!r})
for n in range(6):
    store.create(f's-{{n}}', {{'messages': [{{'id': f'm{{n}}', 'content': 'SECRET' * 200}} for n in range(n * 100)]}})
def started(n):
    stream = store.start_stream(f's-{{n}}', {{'role': 'user', 'content': 'SECRET'}})
    stream.emit('SECRET')
    return stream
def stop_inside(lock):
    # A thread that the end of the interpreter stops inside a lock. It keeps no name of this module alive.
    inside = threading.Event()
    names = {{'lock': lock, 'inside': inside, 'forever': threading.Event()}}
    exec('def stop():\\n with lock:\\n  inside.set(); forever.wait()', names)
    threading.Thread(target=names.pop('stop'), daemon=True).start()
    inside.wait()
def open_files():
    gc.collect()
    return len(os.listdir('/proc/self/fd'))
before = open_files() if os.path.exists('/proc/self/fd') else None
"""


def run(
    store: persist.Store, code: str, options: tuple[str, ...] = ("-W", "error", "-X", "dev")
) -> tuple[str, list[str]]:
    """Run code in a process, and return what it wrote to stderr and the words that it wrote to stdout."""
    # -P: the package is the one under test, not the one in the current directory (`scripts/mutants`).
    command = [sys.executable, "-P", *options, "-c", BEGIN.format(str(store.path)) + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout.split()


AT_EXIT = {
    "a stream in a module": "stream = started(1)",
    "a stream that outlives all modules": "builtins.stream = started(1)",
    "a stream in a cycle": "box = [started(1)]; box.append(box)",
    "a stream in a traceback": """
try:
    stream = started(1); raise ValueError
except ValueError as error:
    kept = error
""",
    "a follower": "builtins.stream = started(1); followed = store.follow('s-1', stream.id); next(followed)",
    "a session and a store": "session = store.load('s-5'); session.data['title'] = 'x'",
    "an open transaction": "block = store.transaction('s-5'); block.__enter__().fields['a'] = 1",
    "an open transaction that outlives all modules": """
builtins.block = store.transaction('s-5'); block.__enter__().fields['a'] = 1
""",
    "threads that ended": """
kept = []
threads = [threading.Thread(target=lambda n=n: kept.append(started(n))) for n in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    "a daemon thread that waits for a lock": """
holding = threading.Event()
def hold():
    with store.transaction('s-1'):
        holding.set(); threading.Event().wait()
threading.Thread(target=hold, daemon=True).start(); holding.wait()
threading.Thread(target=store.append, args=('s-1', 'messages', {'id': 'x'}), daemon=True).start()
builtins.stream = started(2)
""",
    "a daemon thread that follows": """
builtins.stream, seen = started(2), threading.Event()
threading.Thread(target=lambda: [seen.set() for _ in store.follow('s-2', stream.id)], daemon=True).start(); seen.wait()
""",
    "a daemon thread that was stopped inside the table": "builtins.stream = started(1); stop_inside(held.table)",
    "an open transaction, and such a thread": """
builtins.block = store.transaction('s-5'); block.__enter__().fields['a'] = 1
stop_inside(held.table)
""",
    "a daemon thread that was stopped inside the watcher's guard": """
with started(1) as stream:
    builtins.followed = store.follow('s-1', stream.id); next(followed)
    stream.finish()
del stream
stop_inside(watch._guard)
""",
    "what an event loop has left": """
async def main():
    stream = await persist.aio.Store(store).start_stream('s-1')
    await stream.emit(1)
    followed = persist.aio.Store(store).follow('s-1', stream.id)
    await anext(followed)
    return stream, followed
builtins.kept = asyncio.run(main())
""",
}


@pytest.mark.parametrize("code", AT_EXIT.values(), ids=AT_EXIT)
def test_the_end_of_the_interpreter_is_silent(store: persist.Store, code: str) -> None:
    """The interpreter ends without a word, whatever objects are left, and waits for no stopped thread.

    The finalisers ask `sys.is_finalizing`. Without that a stream warns, and the process never ends if a daemon thread
    was stopped inside a lock.
    """
    assert run(store, code) == ("", [])


IN_MID_RUN = {
    "by its last name": "stream = started(1); ids = [stream.id]; del stream",
    "in a cycle": "stream = started(1); ids = [stream.id]; box = [stream]; box.append(box); del stream, box",
    "with its frame": """
ids = []
def turn():
    stream = started(1)
    ids.append(stream.id)
    raise ValueError
try: turn()
except ValueError as error: error.again = error
""",
    "by threads": """
ids = []
threads = [threading.Thread(target=lambda n=n: ids.append(started(n).id)) for n in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    "by an event loop": f"""
async def main():
    stream = await persist.aio.Store(store).start_stream('s-1')
    await stream.emit(1)
    return [stream.id]
ids = asyncio.run(main())
# The thread of the last verb may let go of the stream a moment later.
until = time.monotonic() + {DEADLINE_S / 2}
while before is not None and open_files() != before and time.monotonic() < until:
    time.sleep(0.01)
""",
}


@pytest.mark.parametrize("code", IN_MID_RUN.values(), ids=IN_MID_RUN)
def test_a_dropped_stream_is_one_warning(store: persist.Store, code: str) -> None:
    """Each dropped stream gives one warning, which names its session and holds no content. Its descriptors are closed.

    In a cycle the finaliser of the lease may run first. Fails there if the stream asks only whether its lease is held.
    """
    code = f"""
sys.unraisablehook = lambda found: os.write(2, f'{{type(found.exc_value).__name__}}: {{found.exc_value}}\\n'.encode())
{code}
after = open_files() if before is not None else None
assert after == before, (before, after)
print(*ids)
"""
    said, ids = run(store, code)
    told = re.sub(r"(session 's-)\d", r"\1N", said).splitlines()
    warning = "ResourceWarning: Stream {} of session 's-N' was dropped without finish() or fail(). It is stale now."
    assert sorted(told) == sorted(map(warning.format, ids))


def test_nothing_is_said_of_a_stream_that_ended_or_of_a_copy(store: persist.Store) -> None:
    """A stream that was finished, failed, lost or left with its block gives no warning when it is dropped.

    A forked child that drops its copy of a stream gives none either.
    """
    code = """
started(1).finish()
started(1).fail()
with started(1): pass
lost = started(1)
store.cancel('s-1', lost.id, force=True)
try: lost.finish()
except persist.StreamLost: lost.__exit__(None, None, None)
del lost
stream = started(2)
child = os.fork() if hasattr(os, 'fork') else None
if child == 0:
    del stream
    gc.collect()
    os._exit(0)
assert child is None or os.waitpid(child, 0)[1] == 0
stream.finish()
"""
    assert run(store, code) == ("", [])


def test_without_options_a_dropped_stream_is_silent_too(store: persist.Store) -> None:
    """Python ignores a `ResourceWarning` by default, that of a dropped stream like that of a file."""
    assert run(store, "stream = started(1); del stream", ()) == ("", [])


def test_the_pytest_plugin_leaves_nothing_to_say(tmp_path: Path) -> None:
    """A pytest run that fails leaves no warning of a finaliser.

    Its factory fails, and its tests fail while they hold a lock, in two workers.
    """
    (tmp_path / "test_project.py").write_text("""
import pytest
def make(): raise ValueError
@pytest.mark.parametrize("n", range(4))
def test_fails(n, persist_lock, persist_once, persist_counter):
    with persist_lock("printer"):
        persist_counter("c")
        persist_once("key", make)
def test_passes(persist_store, persist_lock):
    with persist_lock("printer"): pass
""")
    options = ["-W", "error", "-X", "dev", "-m", "pytest", "-q", "-n2", "-W", "error", "-p", "no:cacheprovider"]
    command = [sys.executable, *options, "test_project.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert "4 failed, 1 passed" in done.stdout
    assert done.stderr == ""
    assert not re.search("ResourceWarning|Unraisable|Exception ignored", done.stdout)
