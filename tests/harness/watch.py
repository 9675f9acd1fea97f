"""A watch over a store on which authors work and die.

It reads the store after each crash, retires the sessions that have grown, and judges the store at the end.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import persist
from harness.acknowledged import (
    FAULTS,
    Change,
    Document,
    Figures,
    Ledger,
    load_bytes_of,
    read_all,
    settle,
    settle_rows,
    title_of,
    titled,
)
from harness.authors import LOCK_TIMEOUT_S, Crew, Hand, Role, as_document
from harness.journaling import LOAD_BYTES, is_url
from harness.runs import Plan

SHARED = 3
MOST_MESSAGES = 40
# The author of the sessions that the authors share.
MADE_HERE = "shared"


class Watch:
    """A store, the crew that works on it, and the ledger of what it was promised.

    Sessions stay small, so that reading all of them after each crash is cheap. A session that has grown is replaced for
    the authors that start from then on. It is deleted when the last author that knows it is dead.
    """

    def __init__(self, place: Path | str, figures: Figures, plan: Plan, ways: Sequence[Path | str] = ()) -> None:
        """Watch the store at a place. `ways` are the names under which authors find it."""
        self.figures = figures
        self._is_remote = is_url(place)
        self.ledger = Ledger(may_lose_streams=self._is_remote)
        self.crew = Crew(self.ledger, figures, plan.seed, plan.journaling)
        self._random = random.Random(plan.seed)
        self._journaled: set[str] = set()
        self.shared: tuple[str, ...] = ()
        self._place = place
        self._ways = ways or (place,)
        self._plan = plan
        self._acknowledged_before = figures.acknowledged

    def open(self) -> None:
        """Look at the store with a new store, as a process does that has just started."""
        journaling = self._plan.journaling.drawn(self._random)
        self.store = journaling.open(self._place, timeout_s=LOCK_TIMEOUT_S, keep_events_s=0)

    def start(self, role: Role) -> Hand:
        return self.crew.start(role, self._random.choice(self._ways), self.shared)

    def share(self) -> None:
        """Make sure that there are enough sessions to share, and rename one.

        That may make it a large one, or small again.
        """
        for number in range(len(self.shared), SHARED):
            session_id = f"{MADE_HERE}-{self.figures.crashes}-{number}"
            title = title_of(session_id, self._random.choice((0, LOAD_BYTES)))
            with self._promised(Change("create", session_id, title=title)):
                self.store.create(session_id, titled({"messages": []}, title))
            self.shared += (session_id,)
        self._count_journals()
        self._rename(self.shared[self.figures.crashes % SHARED], f"{MADE_HERE}-at-{self.figures.crashes}")
        self._count_journals()

    def _rename(self, session_id: str, name: str) -> None:
        try:
            # Nobody else renames a shared session.
            title_before = self.store.head(session_id).fields.get("title")
        except persist.PersistError as error:
            self.figures.found("raised", f"head: {error}")
            return
        if type(title_before) is not str:
            self.figures.found("lost", f"the title of {session_id}")
            return
        load_bytes = load_bytes_of(title_before)
        if self._random.random() < 0.5:
            title = title_of(name, LOAD_BYTES - load_bytes)
            with self._promised(Change("rename", session_id, title=title)):
                self.store.update(session_id, lambda tx: titled(tx.data, title))
        else:
            title = title_of(name, load_bytes)
            with self._promised(Change("rename", session_id, title=title)):
                self.store.update(session_id, lambda tx: tx.data.update(title=title))
        with self._promised(Change("keep", session_id)):
            self.store.compact(session_id)

    @contextmanager
    def _promised(self, change: Change) -> Iterator[None]:
        self.ledger.begin(MADE_HERE, change)
        try:
            yield
            self.ledger.acknowledge(MADE_HERE)
        except FAULTS as error:
            self.figures.found("raised", f"{change.kind}: {error}")

    def await_commit(self) -> bool:
        """Wait until something was acknowledged since the last look.

        A crash cannot lose what nobody was promised.
        """
        has_come = self._await(lambda: self.figures.acknowledged > self._acknowledged_before)
        if not has_come:
            self.figures.found("idle", f"no commit for {self._plan.patience_s:g} s")
        return has_come

    def require_work_of(self, roles: Iterable[Role]) -> None:
        """Require that each role has done something in this run.

        A role that was always killed too early has the time for it now.
        """
        missing = {role.__name__: role for role in roles if role.__name__ not in self.figures.worked}
        for role in set(missing.values()) - {hand.role for hand in self.crew.hands}:
            self.start(role)
        if not self._await(lambda: missing.keys() <= self.figures.worked):
            idle = sorted(missing.keys() - self.figures.worked)
            self.figures.found("idle", f"{idle} have done nothing, not even in {self._plan.patience_s:g} s", len(idle))

    def _await(self, is_so: Callable[[], bool]) -> bool:
        """Listen until it is so. An error of the crew and Ctrl-C end it, too, because each has a verdict of its own."""
        until = time.monotonic() + self._plan.patience_s
        while not (is_so() or self.crew.raised or self._plan.is_interrupted()):
            if time.monotonic() >= until:
                return False
            self.crew.listen(0.001)
        return True

    def try_again(self, author: str, change: Change | None) -> None:
        """Repeat an append whose outcome nobody knows, with the same items. Then they must be there, once."""
        if change is None or change.kind not in ("append", "extend"):
            return
        try:
            self.store.extend(change.session_id, "messages", [*map(as_document, change.messages)])
            self.ledger.confirm(author, change)
        except FAULTS as error:
            self.figures.found("raised", f"an append, tried again: {error}")

    def look(self) -> None:
        """Read every session, and compare it with the changes that were acknowledged before."""
        self.crew.listen()
        self._acknowledged_before = self.figures.acknowledged
        self.ledger.forget_the_past()
        self.ledger.compare_events(self.store, dict(self.ledger.emitted), self.figures)
        found = read_all(self.store, self.ledger.session_ids, self.figures)
        # Changes that were begun while we read may show already.
        self.crew.listen()
        for session_id, document in found.items():
            self.ledger.compare(session_id, document, self.figures)
        self.shared = tuple(each for each in self.shared if _is_fit(found.get(each)))

    def _count_journals(self) -> None:
        if self._is_remote:
            return
        before = self._journaled
        self._journaled = {path.name.partition(".")[0] for path in self.store.path.glob("*.journal")}
        self.figures.entered += len(self._journaled - before)
        self.figures.left += sum(map(self.store.exists, before - self._journaled))

    def retire(self) -> None:
        """Delete the sessions that nobody works on any more."""
        living = {hand.name for hand in self.crew.hands}
        in_use = set(self.shared).union(*(hand.shared for hand in self.crew.hands))
        for session_id in set(self.ledger.session_ids) - in_use:
            if self._is_remote and session_id in {info.session_id for info in self.store.streams() if info.is_live}:
                # The lease of a killed process is not over yet.
                continue
            if self.ledger.is_gone(session_id) or not self.ledger.authors(session_id) & living:
                self.ledger.forget(session_id)
                if self.store.exists(session_id):
                    # A damaged one is a finding already.
                    self.store.delete(session_id, force=not self.figures.is_sound)

    def blame(self, until_s: float = math.inf) -> None:
        """Count the errors that the crew has raised, except those after `until_s` (`time.monotonic`)."""
        for raised in self.crew.raised:
            if raised.at_s <= until_s:
                self.figures.found("raised", raised.said)
        self.crew.raised.clear()

    def settle(self) -> None:
        """Sweep and repair as servers do, with no author alive, and look for traces."""
        settle_rows(self.store, self.figures) if self._is_remote else settle(self.store, self.figures)


def _is_fit(document: Document | None) -> bool:
    return document is not None and len(document["messages"]) < MOST_MESSAGES
