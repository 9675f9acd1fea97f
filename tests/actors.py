"""Actors: real server processes that a test leads step by step.

An actor runs the code that it is sent, in a process of its own with a `Store` of its own. It sends back the value of
the last expression, or the exception. A test can make an actor pause just before it does one thing to the disk, so that
a race has one known order instead of a lucky one. An actor is never mocked.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, cast

# Far above the time that any step takes on an idle machine, because a busy machine must not look like a bug.
DEADLINE_S = 120.0


def eventually(claim: Callable[[], bool]) -> None:
    """Return when a claim about the state has become true. Fail if it has not within the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline, "it did not become true"


class Actor:
    """A process with ``store`` (a `persist.Store`) and ``persist`` in reach of the code it runs."""

    def __init__(self, place: Path | str, *, prefix: Sequence[str] = (), **store_options: Any) -> None:
        """Start the process on the store there. `prefix` is a command that starts commands, such as ``unshare``."""
        here, there = Pipe()
        self._connection = here
        command = [
            *prefix,
            sys.executable,
            "-W",
            "error",
            __file__,
            str(there.fileno()),
            str(place),
            repr(store_options),
            repr(sys.getswitchinterval()),
        ]
        self.process = subprocess.Popen(command, pass_fds=[there.fileno()])
        there.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, code: str) -> None:
        """Send code. `result` returns its value."""
        self._connection.send(code)

    def result(self) -> Any:
        """Return the value of the code's last expression, or raise its exception here."""
        kind, value = self._receive()
        if kind == "raised":
            raise value
        assert kind == "value", f"expected the end of the code, and it is {kind} at {value}"
        return value

    def do(self, code: str) -> Any:
        self.start(code)
        return self.result()

    def start_and_pause(self, code: str, step: str) -> None:
        """Send code, and return when the actor is about to do `step`, a function of `persist.storage.disk`.

        `go` lets the actor do the step.
        """
        self.do(f"pause_at({step!r})")
        self.start(code)
        assert self._receive() == ("paused", step)

    def go(self) -> None:
        self._connection.send("go")

    def _receive(self) -> tuple[str, Any]:
        assert self._connection.poll(DEADLINE_S), f"actor {self.pid} did not answer within {DEADLINE_S} s"
        return cast("tuple[str, Any]", self._connection.recv())

    def kill(self) -> None:
        """Kill the process with SIGKILL, and return when it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        self._connection.close()


def _run(code: str, names: dict[str, Any]) -> Any:
    tree = ast.parse(code)
    *statements, last = tree.body
    exec(compile(ast.Module(statements, []), "<actor>", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "<actor>", "eval"), names)
    exec(compile(ast.Module([last], []), "<actor>", "exec"), names)
    return None


def _pausing(connection: Connection[Any, Any]) -> Callable[[str], None]:
    from persist.storage import disk

    def pause_at(step: str) -> None:
        real = getattr(disk, step)

        def paused(*arguments: Any) -> Any:
            setattr(disk, step, real)
            connection.send(("paused", step))
            assert connection.recv() == "go"
            return real(*arguments)

        setattr(disk, step, paused)

    return pause_at


def _main(descriptor: str, place: str, options: str, switch_interval_s: str) -> None:
    import persist

    # Switch threads as often as the test does.
    sys.setswitchinterval(float(switch_interval_s))
    connection: Connection[Any, Any] = Connection(int(descriptor))
    store = persist.Store(place, **ast.literal_eval(options))
    names: dict[str, Any] = {"persist": persist, "store": store, "os": os, "pause_at": _pausing(connection)}
    while True:
        try:
            code = connection.recv()
        except EOFError:
            return
        try:
            answer = ("value", _run(code, names))
        except Exception as error:
            answer = ("raised", error)
        connection.send(answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
