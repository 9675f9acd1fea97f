"""Real test runs, as users start them: a project of a few files, and pytest in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

PLUGIN = "persist.pytest_plugin"
TIMEOUT_S = 60.0

#: Every project can note what happens, in any process. A note is one line and one write. `when` waits for the notes of
#: others.
JOURNAL = """
    import os, time
    def note(*words):
        fd = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
        os.close(fd)
    def noted():
        try:
            with open(os.environ["JOURNAL"]) as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []
    def worker():
        return os.environ.get("PYTEST_XDIST_WORKER", "main")
    def when(word, times=1):
        deadline = time.monotonic() + 30
        while sum(word in line for line in noted()) < times:
            assert time.monotonic() < deadline, (word, noted())
            time.sleep(0.01)
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The output of a run, its notes, and the files that it left in the directory for temporary files."""

    status: int
    printed: str
    journal: list[str]
    kept: list[Path]

    def times(self, word: str) -> int:
        return sum(word in line for line in self.journal)

    def counts(self, **expected: int) -> bool:
        """Tell whether the last line has so many ``passed``, ``failed``, ``errors``, ``skipped``.

        A count that is not named must be zero.
        """
        last = [line for line in self.printed.splitlines() if re.search(r" in [\d.:]+s", line)][-1]
        found = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last)}
        return found == {word.rstrip("s"): number for word, number in expected.items()}


class Project:
    """A directory with tests, and the runs of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._journal = directory / "journal"
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.write("journal_of", JOURNAL)

    def write(self, name: str, text: str) -> None:
        path = self.directory / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))

    def start(
        self, *arguments: str, autoload: bool = False, plugin: str = PLUGIN, **environment: str
    ) -> subprocess.Popen[str]:
        """Start pytest on the project, with this plugin, and with xdist if the arguments ask for it.

        Other installed plugins are not loaded.

        Args:
            autoload: load the installed plugins instead.
        """
        self._journal.unlink(missing_ok=True)
        xdist = ["-p", "xdist.plugin"] if any(argument.startswith("-n") for argument in arguments) else []
        plugins = [] if autoload else ["-p", plugin, *xdist]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            "--rootdir=.",
            *plugins,
            *arguments,
        ]
        here = Path(__file__).parents[2]
        paths = [str(self.directory), *filter(None, [os.environ.get("PYTHONPATH")]), str(here)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "JOURNAL": str(self._journal),
            "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "" if autoload else "1",
        }
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env=kept | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, *arguments: str, interrupt_at: str = "", by: signal.Signals = signal.SIGINT, **options: Any
    ) -> Outcome:
        """Run pytest on the project to the end.

        If `interrupt_at` is given, send a signal to the process that was started when somebody has noted that word.
        """
        # An interrupt in the middle of an import leaves the module's file for the garbage collector. Python itself does
        # so.
        tolerated = ("-W", "ignore::pytest.PytestUnraisableExceptionWarning") if interrupt_at else ()
        with self.start(*arguments, *tolerated, **options) as process:
            if interrupt_at:
                self._await(interrupt_at)
                process.send_signal(by)
            try:
                printed, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Outcome(process.returncode, printed, self.noted(), sorted(self.temporary.glob("persist-*")))

    def noted(self) -> list[str]:
        return self._journal.read_text().splitlines() if self._journal.exists() else []

    def _await(self, word: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not any(word in line for line in self.noted()):
            assert time.monotonic() < deadline, word
            time.sleep(0.01)
