"""The same for sessions with a journal: records, folds, entering and leaving it; of a size that can be enumerated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import persist
from harness.crash_scenarios import (
    ANSWER,
    AUTO,
    MESSAGE,
    Mode,
    Scenario,
    changed,
    changed_on_both_sides,
    edited_by_hand,
    running,
    stale,
    start_and_die,
)

ANOTHER = {"id": "m4", "role": "user", "content": "another"}
__all__ = ["ALWAYS", "ANOTHER", "AUTO", "ENDLESS", "FOLDING", "JOURNALED", "LEAVING", "NEVER"]
ALWAYS, ENDLESS, NEVER = Mode("always"), Mode("always", math.inf), Mode("never")
#: A journal gets room for more almost at once.
ROOMY = Mode("always", room_bytes=640)
#: A fold at every commit; and one that finds a document which is too small for a journal.
FOLDING, LEAVING = Mode("always", 1), Mode("auto", 1)


def journaled(name: str, *what: Any, **options: Any) -> Scenario:
    return Scenario(f"journal: {name}", *what, **{"mode": ALWAYS} | options)


def append(store: persist.Store, _subject: object = None) -> None:
    store.append("s-1", "messages", MESSAGE)


def append_another(store: persist.Store, _subject: object = None) -> None:
    store.append("s-1", "messages", ANOTHER)


def append_and_fold(store: persist.Store) -> None:
    FOLDING.set(store)
    append(store)


def recorded(store: persist.Store) -> None:
    """A journal that is not empty."""
    store.append("s-1", "messages", {"id": "m2", "content": "recorded"})


def folded(store: persist.Store) -> None:
    """One whose generation is not the first."""
    recorded(store)
    store.compact("s-1")
    store.append("s-1", "messages", {"id": "m2b", "content": "recorded"})


def recorded_and_edited_by_hand(store: persist.Store) -> None:
    recorded(store)
    edited_by_hand(store)


def recorded_and_damaged(store: persist.Store) -> None:
    recorded(store)
    append_another(store)
    path = store.path / "s-1.1.journal"
    path.write_bytes(path.read_bytes().replace(b"another", b"altered"))


def change_a_small_field(store: persist.Store, _subject: object = None) -> None:
    store.update("s-1", lambda data: data.update(title="t" * 400))


def cancel(store: persist.Store, stream: persist.Stream) -> None:
    store.cancel("s-1", stream.id)


def compact(store: persist.Store, _subject: object = None) -> Any:
    return store.compact("s-1")


RECORDS = [
    journaled("create", lambda store, _: store.create("s-2", {"title": "new"})),
    journaled("append", append, recorded),
    journaled("first record of a journal", append),
    journaled("first append of a process", append, recorded, is_cold=True),
    journaled("append, never folded", append, folded, mode=ENDLESS),
    journaled("save", lambda _, session: session.save(), changed),
    journaled("first save of a process", lambda _, session: session.save(), changed, is_cold=True),
    journaled("save that merges", lambda _, session: session.save(), changed_on_both_sides),
    journaled("update", lambda store, _: store.update("s-1", lambda data: data.update(n=1)), recorded),
    journaled("update of a small field", change_a_small_field, recorded),
    journaled("start", lambda store, _: start_and_die(store), recorded),
    journaled("start over a stale stream", lambda store, _: start_and_die(store), stale),
    journaled("checkpoint", lambda _, stream: stream.checkpoint({"role": "assistant", "content": "Becau"}), running),
    journaled("stream.append", lambda _, stream: stream.append(MESSAGE), running),
    journaled("finish", lambda _, stream: stream.finish(ANSWER), running),
    journaled("fail", lambda _, stream: stream.fail(), running),
    journaled("cancel", cancel, running),
    journaled("cancel by force", lambda store, stream: store.cancel("s-1", stream.id, force=True), running),
    journaled("clear", lambda _, session: session.clear_stale_stream(), stale),
    journaled("first clear of a process", lambda _, session: session.clear_stale_stream(), stale, is_cold=True),
    journaled("sweep", lambda store, _: store.clear_stale_streams(), stale),
    journaled("duplicate", lambda store, _: store.duplicate("s-1", "s-2"), recorded),
    journaled("delete", lambda store, _: store.delete("s-1"), recorded),
    journaled("delete with a stale stream", lambda store, _: store.delete("s-1"), stale),
]
FOLDS = [
    journaled("compact", compact, recorded),
    journaled("first compact of a process", compact, folded, is_cold=True),
    journaled("append that folds", append, folded, mode=FOLDING, prepared=ENDLESS),
    journaled("append that folds an empty journal", append, mode=FOLDING),
    journaled("save that merges and folds", lambda _, session: session.save(), changed_on_both_sides, mode=FOLDING),
    journaled("start that folds", lambda store, _: start_and_die(store), recorded, mode=FOLDING, prepared=ENDLESS),
    journaled("finish that folds", lambda _, stream: stream.finish(ANSWER), running, mode=FOLDING, prepared=ENDLESS),
    journaled("sweep that folds", lambda store, _: store.clear_stale_streams(), stale, mode=FOLDING, prepared=ENDLESS),
    journaled("append that enters", append, mode=ALWAYS, prepared=NEVER),
    journaled("append that leaves", append, folded, mode=NEVER, prepared=ALWAYS),
    journaled("append that folds and leaves", append, recorded, mode=LEAVING, prepared=ALWAYS),
    journaled("compact that leaves", compact, recorded, mode=NEVER, prepared=ALWAYS),
    journaled("accept after an edit by hand", lambda store, _: store.accept("s-1"), recorded_and_edited_by_hand),
    journaled("accept of a damaged journal", lambda store, _: store.accept("s-1"), recorded_and_damaged),
]
#: Another process was killed when its record could be read, or the document that its fold had written.
KILLED = [
    journaled("append of what a killed writer recorded", append, recorded, append),
    journaled("append of what a killed writer recorded, cold", append, recorded, append, is_cold=True),
    journaled("append after what a killed writer recorded", append_another, recorded, append),
    journaled("append after what a killed writer recorded, cold", append_another, recorded, append, is_cold=True),
    journaled("save of what a killed writer recorded", lambda store, _: store.load("s-1").save(), recorded, append),
    journaled(
        "cancel of what a killed writer left cancelled",
        cancel,
        running,
        lambda store: store.cancel("s-1", store.load("s-1").active_stream_id or ""),
    ),
    journaled("compact of what a killed writer recorded", compact, recorded, append),
    journaled("append of what a killed writer folded", append, recorded, append_and_fold),
    journaled("append after a killed fold", append, recorded, compact),
    journaled("append after what a killed writer folded", append_another, recorded, append_and_fold),
    journaled("append after a killed writer has entered", append_another, interrupted=append, prepared=NEVER),
    journaled("fold after a killed fold", append, recorded, compact, mode=FOLDING, prepared=ENDLESS),
]


def after_more(prepare: Callable[[persist.Store], Any]) -> Callable[[persist.Store], Any]:
    """So that the journal is long enough to get room. The record of a killed writer lies in two sectors, then."""

    def prepared(store: persist.Store) -> Any:
        for number in range(3):
            store.append("s-1", "messages", {"id": f"r{number}", "content": "m" * 100})
        return prepare(store)

    return prepared


def with_room(scenario: Scenario) -> Scenario:
    """The same, into the room that a journal has, or beyond it."""
    name = scenario.name.replace("journal:", "room:")
    content = {"title": "t", "messages": [{"id": "m1", "content": "hi"}]}
    return replace(scenario, name=name, content=content, prepare=after_more(scenario.prepare), mode=ROOMY)


ROOM = [with_room(each) for each in (*RECORDS, *FOLDS, *KILLED) if each.mode == ALWAYS and each.prepared is None]
JOURNALED = [*RECORDS, *FOLDS, *KILLED, *ROOM]
