"""Uses: the yield-style fixtures that one process uses, and how each is finished when nobody needs it any more.

The producer keeps the generator, and goes on with it when every other worker is done with the fixture: has ended, or is
ending and has torn down what it built on it. Who the workers are is told by the controller, to which the kernel reports
a death (the end of a pipe); what an ending worker still uses it tells itself. Both stand in one session:

    {"live": ["gw0", "gw1"], "ending": {"gw1": ["once-…"]}, "ended": ["once-…"]}

A process that said that it is ending may go on: plugins that run a failed test again do so after its teardown. It takes
its word back, and a fixture that is being finished by then is made anew after that. So the look whether others need a
fixture, and the word that it is ended, are one transaction.

Nobody waits for ever: pytest tears down in the reverse order of setting up, and a use comes after its production, so
each wait is for something produced later. A process that is ending says so before it waits.
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

#: After an interrupt xdist gives a worker some ten seconds, and half of them are gone when it hears of it.
HURRY_S = 2.0
WORKERS = "workers"


class Use:
    """A yield-style fixture as this process uses it; in the process that produced it, with its generator."""

    def __init__(self, once: Once, end_timeout_s: float) -> None:
        self.once = once
        self.end_timeout_s = end_timeout_s
        self.generator: Generator[Any, None, None] | None = None

    def start(self, make: Callable[[], Generator[Any, None, None]]) -> Any:
        """The factory of its value: go to the ``yield``."""
        generator = make()
        try:
            value = next(generator)
        except StopIteration:
            raise ValueError("The fixture did not yield a value.") from None
        self.generator = generator
        try:
            json_codec.check(value)
        except BaseException as error:
            # No other process can get it. What stands behind the ``yield`` takes it down.
            failed, self.generator = self._rest(), None
            if failed is not None:
                error.add_note(f"Its end failed, too: {failed!r}")
            raise
        return value

    def abandon(self) -> None:
        """Close what was started, and never became a value."""
        if self.generator is not None:
            self.generator.close()
            self.generator = None

    def resume(self, late: BaseException | None, *, on_record: bool) -> None:
        """Go on behind the ``yield``, to the end; then raise what went wrong there, or else `late`."""
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
    """All of them in this process.

    Attributes:
        is_ending: no test follows.
        is_hurried: the run was interrupted: the others have little time, and so have we.
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
        """Take back that this process is ending, and wait for the end of the fixture if that has begun."""
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
        """The fixture is torn down in this process.

        In the middle of the run, another parameter's turn say, it may come back here and be in use elsewhere: it stays.
        """
        if self.is_ending:
            self._end(use.once.session_id, on_record=False)

    def end(self) -> None:
        """Finish what is left when all tests and fixtures of this process are done.

        Errors go on record, for the controller to report: no test has them.
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
        """Wait until the others are done; return, and do not raise, what ended the wait too early."""
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
        """Return the workers that may still use it. If there is none, it is ended from now on."""
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
    """The controller's word on who is there."""
    run.make(WORKERS)
    run.store.update(WORKERS, lambda tx: tx.fields.update(live=live))
