"""Child: one process of a replay, as its supervisor sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from replaying.reports import Report, parse

_STDERR_SHOWN_CHARS = 4000
_READ_BYTES = 65536
_SCRIPTS = Path(__file__).resolve().parent.parent


class Child:
    """A process that runs a module of this package, its reports, and the turn that it is in.

    Attributes:
        heard_at: when its last report came, on the monotonic clock.
        last_start: the report of the last turn that it has started.
        is_in_turn: whether it is still in that turn.
    """

    def __init__(self, name: str, module: str, arguments: list[str], scratch: Path) -> None:
        self.name = name
        self._errors: IO[str] = (scratch / f"{name}.stderr").open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"replaying.{module}", *arguments],
            env=os.environ | {"PYTHONPATH": _python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # An interrupt from the terminal must reach the supervisor alone, because the supervisor ends its children
            # itself.
            start_new_session=True,
        )
        self._unread = b""
        self.heard_at = time.monotonic()
        self.last_start: Report | None = None
        self.is_in_turn = False

    def fileno(self) -> int:
        """Return the pipe of its reports, for a selector."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def read(self) -> list[Report] | None:
        """Wait for reports and return them. Return None when the process has ended and all its reports were read."""
        received = os.read(self.fileno(), _READ_BYTES)
        if not received:
            return None
        # A read may end inside a line. The rest comes with the next read.
        *lines, self._unread = (self._unread + received).split(b"\n")
        reports = [parse(line) for line in lines]
        for report in reports:
            self._note(report)
        return reports

    def _note(self, report: Report) -> None:
        self.heard_at = time.monotonic()
        if report.verb == "start":
            self.last_start, self.is_in_turn = report, True
        elif report.verb == "finish":
            self.is_in_turn = False

    def ask_to_end(self) -> None:
        """Close its standard input. The sweeper ends at that."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        """Send it SIGKILL. Its last reports must still be read."""
        self.process.send_signal(signal.SIGKILL)

    def bury(self) -> tuple[int, str]:
        """Wait for its end. Return its exit status, and what it wrote to its standard error."""
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        with self._errors:
            self._errors.seek(0)
            return status, self._errors.read()[-_STDERR_SHOWN_CHARS:].strip()


def _python_path() -> str:
    """Return the path where the child finds this package, because the package is not installed."""
    inherited = os.environ.get("PYTHONPATH")
    return str(_SCRIPTS) if not inherited else f"{inherited}{os.pathsep}{_SCRIPTS}"
