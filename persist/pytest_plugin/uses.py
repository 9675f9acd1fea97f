"""Uses: the yield-style fixtures that one process uses, and how each is finished when no process needs it any more.

The producer keeps the generator. It resumes the generator when every other worker is done with the fixture. A worker is
done when it has ended, or when it is ending and has torn down everything that it built on the fixture. The controller
announces who the workers are, because the kernel reports a death to it (the end of a pipe). An ending worker itself
announces what it still uses. One session holds both:

    {"live": ["gw0", "gw1"], "ending": {"gw1": ["once-…"]}, "ended": ["once-…"]}

A process that has announced its end may go on, because plugins that run a failed test again do so after its teardown.
The process then takes the announcement back. If another process is already finishing the fixture, the fixture is made
anew after that. So one transaction looks whether others need a fixture, and marks it as ended if none does.

No process waits for ever. pytest tears down in the reverse order of setting up, and a use comes after its production.
So each wait is for something that was produced later. A process that is ending announces that before it waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from persist import json_codec
from persist.pytest_plugin.errors import SharedTimeout
from persist.pytest_plugin.once import Once
from persist.pytest_plugin.run import Run, Wait
from persist.transaction import Transaction

#: The longest wait after an interrupt. xdist gives a worker some ten seconds, and half of them are gone when the worker
#: hears of it.
HURRY_S = 2.0
WORKERS = "workers"


class Use:
    """A yield-style fixture that this process uses. The process that produced the fixture also keeps its generator."""

    def __init__(self, once: Once, end_timeout_s: float) -> None:
        self.once = once
        self.end_timeout_s = end_timeout_s
        self.generator: Generator[Any, None, None] | None = None

    def start(self, make: Callable[[], Generator[Any, None, None]]) -> Any:
        """Run the fixture up to its ``yield``, and return the value. This is the factory of the value."""
        generator = make()
        try:
            value = next(generator)
        except StopIteration:
            raise ValueError("The fixture did not yield a value.") from None
        self.generator = generator
        try:
            json_codec.check(value)
        except BaseException as error:
            # No other process can get this value. So the code after the ``yield`` takes it down now.
            failed, self.generator = self._rest(), None
            if failed is not None:
                error.add_note(f"Its end failed, too: {failed!r}")
            raise
        return value

    def abandon(self) -> None:
        """Close a generator that was started but never gave the run its value."""
        if self.generator is not None:
            self.generator.close()
            self.generator = None

    def resume(self, late: BaseException | None, *, on_record: bool) -> None:
        """Run the code after the ``yield``. Then raise its error, or else `late`."""
        error = self._rest() or late
        self.generator = None
        self.once.end(error if on_record else None)
        if error is not None:
            raise error

    def _rest(self) -> BaseException | None:
        if self.generator is None:
            return None
        try:
            next(self.generator)
        except StopIteration:
            return None
        except BaseException as error:
            return error
        self.generator.close()
        return ValueError("The fixture yielded twice; a fixture yields once.")


class Uses:
    """All yield-style fixtures that this process uses.

    Attributes:
        is_ending: whether no test follows.
        is_hurried: whether the run was interrupted, so that this process and the others have little time.
    """

    def __init__(self, run: Run, *, is_alone: bool) -> None:
        self._run = run
        self._is_alone = is_alone
        self._uses: dict[str, Use] = {}
        self._has_announced = False
        self.is_ending = False
        self.is_hurried = False

    def begin(self, use: Use, make: Callable[[], Generator[Any, None, None]], timeout_s: float) -> Any:
        """Return the fixture's value. From now on this process uses it."""
        __tracebackhide__ = True
        use = self._uses.setdefault(use.once.session_id, use)
        try:
            self._go_on(use, timeout_s)
            value = use.once.value(lambda: use.start(make), timeout_s)
            if use.generator is not None:
                self._set_ended(use.once.session_id, ended=False)
            return value
        except BaseException:
            self._uses.pop(use.once.session_id, None)
            use.abandon()
            raise

    def _go_on(self, use: Use, timeout_s: float) -> None:
        """Take back that this process is ending. If another process is finishing the fixture, wait until it has."""
        __tracebackhide__ = True
        self.is_ending = False
        if self._is_alone or not self._has_announced:
            return
        self._has_announced = False

        def take_back(tx: Transaction) -> bool:
            tx.data["ending"].pop(self._run.worker, None)
            return use.once.session_id in tx.data.get("ended", [])

        wait = Wait(timeout_s)
        if self._run.store.update(WORKERS, take_back):
            reason = "another worker is finishing it, and it is made anew after that"
            facts = {"holder": "another worker", "since_s": 0.0, "remedy": "Raise timeout_s."}
            while use.once.record() is not None:
                wait.pause(SharedTimeout(key=use.once.key, reason=reason, waited_s=wait.waited_s, **facts))

    def _set_ended(self, session_id: str, *, ended: bool) -> None:
        def put(tx: Transaction) -> None:
            others = [each for each in tx.data.get("ended", []) if each != session_id]
            tx.data["ended"] = [*others, session_id] if ended else others

        if not self._is_alone:
            self._run.make(WORKERS)
            self._run.store.update(WORKERS, put)

    def release(self, use: Use) -> None:
        """Take note that pytest has torn the fixture down in this process.

        If no test follows, the fixture is finished now. In the middle of the run, pytest tears it down for another
        parameter's turn, for example. Then the fixture stays, because it may come back here, and others may use it.
        """
        if self.is_ending:
            self._end(use.once.session_id, on_record=False)

    def end(self) -> None:
        """Finish the remaining fixtures, when all tests and fixtures of this process are done.

        Errors go on record for the controller to report, because no test can report them.
        """
        self._announce()
        for session_id in reversed(list(self._uses)):
            with suppress(Exception, KeyboardInterrupt):
                self._end(session_id, on_record=True)

    def _end(self, session_id: str, *, on_record: bool) -> None:
        use = self._uses.pop(session_id, None)
        self._announce()
        if use is not None and use.generator is not None:
            use.resume(self._await_others(use), on_record=on_record)

    def _announce(self) -> None:
        if self._is_alone:
            return
        uses, self._has_announced = list(self._uses), True
        self._run.make(WORKERS)
        self._run.store.update(WORKERS, lambda tx: tx.data.setdefault("ending", {}).update({self._run.worker: uses}))

    def _await_others(self, use: Use) -> BaseException | None:
        """Wait until the others are done. Return the error that ended the wait too early, and do not raise it."""
        wait, interrupt, parent = Wait(use.end_timeout_s), None, os.getppid()
        # Without its parent, the controller, a worker has no run to wait for.
        while (others := self._others(use.once.session_id)) and os.getppid() == parent:
            if self.is_hurried:
                wait.shorten(HURRY_S)
            workers = ", ".join(others)
            reason = f"{workers} had not ended, and it was finished under them"
            remedy = "Raise end_timeout_s, or see what those workers wait for."
            facts = {"holder": workers, "since_s": 0.0, "waited_s": wait.waited_s, "remedy": remedy}
            late = SharedTimeout(key=use.once.key, reason=reason, **facts)
            try:
                wait.pause(late)
            except KeyboardInterrupt as error:
                interrupt, self.is_hurried = error, True
            except SharedTimeout:
                self._set_ended(use.once.session_id, ended=True)
                return interrupt or (None if self.is_hurried else late)
        return interrupt

    def _others(self, session_id: str) -> list[str]:
        """Return the workers that may still use the fixture. If there are none, mark the fixture as ended."""
        if self._is_alone:
            return []

        def look(tx: Transaction) -> list[str]:
            if "live" not in tx.fields:
                return ["workers that the controller has not named"]
            ending = tx.data.get("ending", {})
            others = [worker for worker in tx.data["live"] if worker != self._run.worker]
            others = [worker for worker in others if session_id in ending.get(worker, [session_id])]
            if not others:
                tx.data.setdefault("ended", []).append(session_id)
            return others

        return self._run.store.update(WORKERS, look)


def publish_live(run: Run, live: list[str]) -> None:
    """Publish which workers are alive. The controller calls this."""
    run.make(WORKERS)
    run.store.update(WORKERS, lambda tx: tx.fields.update(live=live))
