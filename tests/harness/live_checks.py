"""Check a store again and again while servers commit, delete and create: no check may name anything (HAZARDS F11).

Each server is a process. It saves every few milliseconds, folds journals, runs turns, and deletes sessions and creates
them anew. Everything in the store is sound, so a problem that a check names is a false word.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import persist
from harness.files import file_engine
from harness.runs import INTERRUPTED, existing_directory, positive

TESTS = Path(__file__).parents[1]
#: The last one has a file whose name holds a hash of the id.
SESSIONS = ("plain", "user:7/chat", "turns", "long " * 50)
#: The time for which a server waits after each round.
PAUSE_S = 0.002
SHOWN = 20


@dataclass
class Checked:
    """The outcome of the checks. `commits` counts the work of the servers meanwhile."""

    checks: int = 0
    commits: int = 0
    false_words: list[persist.Problem] = field(default_factory=list)


def serve(directory: str, name: str) -> None:
    """Commit without end, until the process that started this one closes its input."""
    store = persist.Store(directory, timeout_s=20, journal="always" if int(name) % 2 else "auto")
    # Each second commit folds.
    file_engine(store).options.fold_bytes = 300
    for count in itertools.count(1):
        for session_id in SESSIONS:
            _work(store, session_id, f"{name}-{count}")
        if os.get_blocking(0):
            os.set_blocking(0, False)
        with suppress(BlockingIOError):
            if not os.read(0, 1):
                break
        time.sleep(PAUSE_S)
    print(count, flush=True)


def _work(store: persist.Store, session_id: str, word: str) -> None:
    # The other servers delete the sessions, and run turns on them.
    gone = (persist.SessionNotFound, persist.SessionDeleted, persist.StreamLost)
    with suppress(*gone, persist.SessionBusy, persist.MergeConflict):
        store.append(session_id, "messages", {"id": word, "role": "user", "content": word * 20}, create=True)
        session = store.load(session_id)
        session.data["title"] = word
        session.save()
        if session_id == "turns":
            with store.start_stream(session_id, {"role": "user", "content": word}) as stream:
                stream.checkpoint({"role": "assistant", "content": word})
                stream.finish({"role": "assistant", "content": word})
        if len(session.data["messages"]) > 6:
            store.delete(session_id)


@contextmanager
def servers_on(directory: Path, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Run servers on a directory for a block, and kill them."""
    command = [sys.executable, "-m", "harness.live_checks", "--serve", str(directory)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))}
    servers = [
        subprocess.Popen(
            [*command, str(each)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for each in range(number)
    ]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()
            server.wait()
            for pipe in (server.stdin, server.stdout):
                assert pipe is not None
                pipe.close()


def check_live(directory: Path, checks: int, *, servers: int = 2, keep_going: bool = False) -> Checked:
    """Check a store `checks` times while servers work on it."""
    checked = Checked()
    store = persist.Store(directory, timeout_s=20)
    with servers_on(directory, servers) as processes:
        while not store.ids():
            time.sleep(0.01)
        while checked.checks < checks and (keep_going or not checked.false_words):
            checked.false_words += store.check()
            checked.checks += 1
        for process in processes:
            assert process.poll() is None, "a server has ended by itself"
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            assert process.stdout is not None
            checked.commits += len(SESSIONS) * int(process.stdout.read())
            assert process.wait(20) == 0
    # Sound servers leave nothing over either, once they have ended.
    checked.false_words += store.check()
    return checked


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/checks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checks", type=positive, default=20_000, help="how often to check; default 20,000")
    parser.add_argument("--servers", type=positive, default=2, help="how many processes commit meanwhile; default 2")
    parser.add_argument(
        "--directory",
        type=existing_directory,
        help="where to make the scratch store; by default the temporary directory",
    )
    parser.add_argument("--serve", nargs=2, metavar=("STORE", "NUMBER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(*options.serve)
        return 0
    try:
        with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
            checked = check_live(Path(scratch) / "sessions", options.checks, servers=options.servers, keep_going=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"checks       {checked.checks:>10,}")
    print(f"rounds       {checked.commits:>10,}")
    print(f"false words  {len(checked.false_words):>10,}")
    for problem in checked.false_words[:SHOWN]:
        print(f"FALSE: {problem.kind}: {problem.message}")
    return 1 if checked.false_words else 0


if __name__ == "__main__":
    sys.exit(main())
