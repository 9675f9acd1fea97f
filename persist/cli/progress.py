"""The progress of a command over many sessions, and Ctrl-C, which ends the command between two sessions."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

import click

from persist.maintenance import Step

Found = TypeVar("Found")
#: The exit status that a shell reports for a program that SIGINT has ended.
ENDED_BY_SIGINT = 130
#: Work that ends sooner shows no progress.
_QUIET_S = 0.5
_EVERY_S = 0.1


class Watched(Generic[Found]):
    """The steps of a look at many sessions, shown on the standard error if that is a terminal.

    The first Ctrl-C ends the steps after the current session, so the work that was done is known and whole. The second
    Ctrl-C ends the program at once.

    Args:
        steps: the steps. They are closed at the end, so that they can tidy up.
        done: the word for a session that is done, such as "checked".

    Attributes:
        was_stopped: whether Ctrl-C has ended the steps before their own end.
    """

    def __init__(self, steps: Iterator[Step[Found]], done: str) -> None:
        self.was_stopped = False
        self._steps, self._what = steps, done
        self._done = self._total = 0
        self._is_asked = False

    def __iter__(self) -> Iterator[Found]:
        before = self._watch_for_sigint()
        shows, since, is_shown = sys.stderr.isatty(), time.monotonic(), False
        due = since + _QUIET_S
        try:
            for step in self._steps:
                self._done, self._total = step.done, step.total
                yield step.found
                if self._is_asked and step.done < step.total:
                    self.was_stopped = True
                    break
                if shows and (now := time.monotonic()) >= due:
                    due, is_shown = now + _EVERY_S, True
                    click.echo(f"\r{self}", nl=False, err=True)
        except KeyboardInterrupt:
            # This is the second Ctrl-C. Nobody knows whether the current session is done.
            self.was_stopped = True
        finally:
            if is_shown:
                click.echo("\r\x1b[K", nl=False, err=True, color=True)
            try:
                getattr(self._steps, "close", lambda: None)()
            finally:
                if before is not None:
                    signal.signal(signal.SIGINT, before)

    def __str__(self) -> str:
        return f"{self._done:,} of {self._total:,} sessions {self._what}"

    def tell_stop(self, further: str) -> None:
        """Print on the standard error how much was done before Ctrl-C."""
        click.echo(f"Stopped: {self}. {further}", err=True)

    def _watch_for_sigint(self) -> Any:
        """Install a handler for Ctrl-C, and return the one before it. Return None if Ctrl-C is left alone."""
        is_main = threading.current_thread() is threading.main_thread()
        # A program that a shell starts in the background ignores Ctrl-C.
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return None

        def ask(number: int, frame: FrameType | None) -> None:
            if self._is_asked:
                signal.default_int_handler(number, frame)
            self._is_asked = True

        return signal.signal(signal.SIGINT, ask)
