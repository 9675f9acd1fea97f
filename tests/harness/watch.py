"""Watching a store on which authors work and die: read it after each crash, retire what has grown, judge it at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import persist
from harness.acknowledged import Change, Figures, Ledger, read_all, settle
from harness.authors import LOCK_TIMEOUT_S, Crew, Hand, Role, as_document

SHARED = 3
MOST_MESSAGES = 40
# The author of the sessions that the authors share.
MADE_HERE = "shared"


class Watch:
    """A store directory, the crew that works on it, and the ledger of what it was promised.

    Sessions stay small, so that reading all of them after each crash is cheap: one that has grown is replaced for the authors
    that start from then on, and deleted when the last author that knows it is dead.
    """

    def __init__(self, directory: Path, figures: Figures, seed: int) -> None:
        self.figures = figures
        self.ledger = Ledger()
        self.crew = Crew(self.ledger, figures, seed)
        self.shared: tuple[str, ...] = ()
        self._directory = directory

    def open(self) -> None:
        """Look at the directory with a new store, as a process does that has just started."""
        self.store = persist.Store(self._directory, lock_timeout_s=LOCK_TIMEOUT_S)

    def start(self, role: Role) -> Hand:
        return self.crew.start(role, self._directory, self.shared)

    def share(self) -> None:
        """See to it that there are enough sessions to share."""
        missing = [f"{MADE_HERE}-{self.figures.crashes}-{number}" for number in range(len(self.shared), SHARED)]
        for session_id in missing:
            self.ledger.begin(MADE_HERE, Change("create", session_id))
            self.store.create(session_id, {"title": "New chat", "messages": []})
            self.ledger.acknowledge(MADE_HERE)
        self.shared += tuple(missing)

    def try_again(self, author: str, change: Change | None) -> None:
        """Do once more, with the same item, an append whose outcome nobody knows: then it must be there, once."""
        if change is None or change.kind != "append":
            return
        try:
            self.store.append(change.session_id, "messages", as_document(change.messages[0]))
            self.ledger.confirm(author, change)
        except persist.PersistError as error:
            self.figures.found("raised", f"an append, tried again: {error}")

    def look(self) -> None:
        """Read every session, and hold it against what was acknowledged before."""
        self.crew.listen()
        self.ledger.forget_the_past()
        found = read_all(self.store, self.ledger.session_ids, self.figures)
        # What was begun while we read may show already.
        self.crew.listen()
        for session_id, messages in found.items():
            self.ledger.compare(session_id, messages, self.figures)
        self.shared = tuple(each for each in self.shared if _is_fit(found.get(each)))

    def retire(self) -> None:
        """Delete the sessions that nobody works on any more."""
        living = {hand.name for hand in self.crew.hands}
        in_use = set(self.shared).union(*(hand.shared for hand in self.crew.hands))
        for session_id in set(self.ledger.session_ids) - in_use:
            if self.ledger.is_gone(session_id) or not self.ledger.authors(session_id) & living:
                self.ledger.forget(session_id)
                if self.store.exists(session_id):
                    # A damaged one is a finding already.
                    self.store.delete(session_id, force=not self.figures.is_sound)

    def blame(self) -> None:
        """What the crew has raised until now has no excuse."""
        for error in self.crew.raised:
            self.figures.found("raised", error)
        self.crew.raised.clear()

    def settle(self) -> None:
        """With no author alive: sweep and repair as servers do, and look for traces."""
        settle(self.store, self.figures)


def _is_fit(messages: list[Any] | None) -> bool:
    return messages is not None and len(messages) < MOST_MESSAGES
