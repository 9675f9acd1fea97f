"""Crash scenarios of sessions with a journal: records, folds, entering and leaving it.

They are of a size that can be enumerated.
"""

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
    answer,
    asked,
    change_and_create,
    change_and_delete,
    change_much,
    change_nothing,
    change_turn,
    changed,
    changed_on_both_sides,
    create_again,
    delete_what_was_seen,
    edited_by_hand,
    extend,
    extend_and_create,
    finish_with_fields,
    half_extended,
    running,
    seen_and_stale,
    stale,
    start_and_create,
    start_and_die,
    start_what_is_answered,
    start_with_fields,
)
from harness.sweeps import sweep

ANOTHER = {"id": "m4", "role": "user", "content": "another"}
__all__ = ["ALWAYS", "ANOTHER", "AUTO", "ENDLESS", "FOLDING", "JOURNALED", "LEAVING", "NEVER"]
ALWAYS, ENDLESS, NEVER = Mode("always"), Mode("always", math.inf), Mode("never")
#: A journal gets room for more almost at once.
ROOMY = Mode("always", room_bytes=640)
#: `FOLDING` folds at every commit. So does `LEAVING`, which finds a document that is too small for a journal.
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


def extend_and_fold(store: persist.Store) -> None:
    FOLDING.set(store)
    extend(store)


def recorded_and_seen(store: persist.Store) -> str:
    recorded(store)
    return store.head("s-1").version


def recorded_and_asked(store: persist.Store) -> None:
    recorded(store)
    asked(store)


def recorded(store: persist.Store) -> None:
    """Append a record, so that the journal is not empty."""
    store.append("s-1", "messages", {"id": "m2", "content": "recorded"})


def folded(store: persist.Store) -> None:
    """Make a journal that has followed on another one."""
    recorded(store)
    store.compact("s-1")
    store.append("s-1", "messages", {"id": "m2b", "content": "recorded"})


def recorded_and_edited_by_hand(store: persist.Store) -> None:
    recorded(store)
    edited_by_hand(store)


def recorded_and_damaged(store: persist.Store) -> None:
    recorded(store)
    append_another(store)
    [path] = store.path.glob("s-1.*.journal")
    path.write_bytes(path.read_bytes().replace(b"another", b"altered"))


def change_a_small_field(store: persist.Store, _subject: object = None) -> None:
    store.update("s-1", lambda tx: tx.data.update(title="t" * 400))


#: A value of the size of `NEARLY` stands among the fields. A value that is larger by `MORE` stands apart.
NEARLY, MORE = "n" * 4000, "n" * 200


def noted(store: persist.Store) -> None:
    """Add a value among the fields that nearly stands apart, and a list."""
    recorded(store)
    store.update("s-1", lambda tx: tx.data.update(notes=NEARLY, log=[NEARLY]))


def long_noted(store: persist.Store) -> None:
    """Let both of them stand apart."""
    noted(store)
    note_more(store)
    log_more(store)


def note_more(store: persist.Store, _subject: object = None) -> None:
    store.update("s-1", lambda tx: tx.data.update(notes=NEARLY + MORE))


def note_less(store: persist.Store, _subject: object = None) -> None:
    store.update("s-1", lambda tx: tx.data.update(notes=NEARLY))


def log_more(store: persist.Store, _subject: object = None) -> None:
    store.append("s-1", "log", MORE)


def log_less(store: persist.Store, _subject: object = None) -> None:
    with store.transaction("s-1") as tx:
        tx.list("log").pop()


def noted_and_back(store: persist.Store) -> None:
    """Let a value come to stand apart, and go back among the fields."""
    long_noted(store)
    note_less(store)


def forget_notes(store: persist.Store, _subject: object = None) -> None:
    store.update("s-1", lambda tx: [tx.data.pop(name) for name in ("notes", "log")])


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
    journaled("update", lambda store, _: store.update("s-1", lambda tx: tx.data.update(n=1)), recorded),
    journaled("update of a small field", change_a_small_field, recorded),
    journaled("extend", extend, recorded),
    journaled("first extend of a process", extend, recorded, is_cold=True),
    journaled("extend of which one is there", extend, half_extended),
    journaled("extend that creates", extend_and_create),
    journaled("transaction of several changes", change_much, recorded),
    journaled("first transaction of a process", change_much, recorded, is_cold=True),
    journaled("transaction that creates", change_and_create),
    journaled("transaction that deletes", change_and_delete, recorded),
    journaled("transaction that deletes, with a stale stream", change_and_delete, stale),
    journaled("start", lambda store, _: start_and_die(store), recorded),
    journaled("start once, with fields", start_with_fields, recorded),
    journaled("start once, of what a stale stream has asked", start_with_fields, stale),
    journaled("start that creates", start_and_create),
    journaled("stream.transaction", change_turn, running),
    journaled("first stream.transaction of a process", change_turn, running, is_cold=True),
    journaled("finish with fields", finish_with_fields, running),
    journaled("start over a stale stream", lambda store, _: start_and_die(store), stale),
    journaled("checkpoint", lambda _, stream: stream.checkpoint({"role": "assistant", "content": "Becau"}), running),
    journaled("stream.append", lambda _, stream: stream.append(MESSAGE), running),
    journaled("finish", lambda _, stream: stream.finish(ANSWER), running),
    journaled("fail", lambda _, stream: stream.fail(), running),
    journaled("cancel", cancel, running),
    journaled("cancel by force", lambda store, stream: store.cancel("s-1", stream.id, force=True), running),
    journaled("clear", lambda _, session: session.clear_stale_stream(), stale),
    journaled("first clear of a process", lambda _, session: session.clear_stale_stream(), stale, is_cold=True),
    journaled("sweep", lambda store, _: sweep(store), stale),
    journaled("duplicate", lambda store, _: store.duplicate("s-1", "s-2"), recorded),
    journaled("delete", lambda store, _: store.delete("s-1"), recorded),
    journaled("delete with a stale stream", lambda store, _: store.delete("s-1"), stale),
    journaled("delete of a version", delete_what_was_seen, recorded_and_seen),
    journaled("delete of a version with a stale stream", delete_what_was_seen, seen_and_stale),
]
#: A value comes to stand apart when it is larger than 4 KiB, and goes back among the fields.
CROSSINGS = [
    journaled("value that comes to stand apart", note_more, noted),
    journaled("value that goes back", note_less, long_noted),
    journaled("list that comes to stand apart", log_more, noted),
    journaled("list that comes to stand apart, cold", log_more, noted, is_cold=True),
    journaled("list that goes back", log_less, long_noted),
    journaled("values that stood apart and go", forget_notes, long_noted),
    journaled("value that comes to stand apart in a fold", note_more, noted, mode=FOLDING, prepared=ENDLESS),
    journaled("value that goes back in a fold", note_less, long_noted, mode=FOLDING, prepared=ENDLESS),
    journaled("compact of what has come and gone", compact, noted_and_back),
]
FOLDS = [
    journaled("compact", compact, recorded),
    journaled("first compact of a process", compact, folded, is_cold=True),
    journaled("append that folds", append, folded, mode=FOLDING, prepared=ENDLESS),
    journaled("append that folds an empty journal", append, mode=FOLDING),
    journaled("save that merges and folds", lambda _, session: session.save(), changed_on_both_sides, mode=FOLDING),
    journaled("start that folds", lambda store, _: start_and_die(store), recorded, mode=FOLDING, prepared=ENDLESS),
    journaled("finish that folds", lambda _, stream: stream.finish(ANSWER), running, mode=FOLDING, prepared=ENDLESS),
    journaled("sweep that folds", lambda store, _: sweep(store), stale, mode=FOLDING, prepared=ENDLESS),
    journaled("extend that folds", extend, recorded, mode=FOLDING, prepared=ENDLESS),
    journaled("transaction of several changes that folds", change_much, recorded, mode=FOLDING, prepared=ENDLESS),
    journaled("stream.transaction that folds", change_turn, running, mode=FOLDING, prepared=ENDLESS),
    journaled("finish with fields that folds", finish_with_fields, running, mode=FOLDING, prepared=ENDLESS),
    journaled("transaction of several changes that leaves", change_much, recorded, mode=NEVER, prepared=ALWAYS),
    journaled("append that enters", append, mode=ALWAYS, prepared=NEVER),
    journaled("append that leaves", append, folded, mode=NEVER, prepared=ALWAYS),
    journaled("append that folds and leaves", append, recorded, mode=LEAVING, prepared=ALWAYS),
    journaled("compact that leaves", compact, recorded, mode=NEVER, prepared=ALWAYS),
    journaled("accept after an edit by hand", lambda store, _: store.accept("s-1"), recorded_and_edited_by_hand),
    journaled("accept of a damaged journal", lambda store, _: store.accept("s-1"), recorded_and_damaged),
]
#: Another process was killed when its record could be read, or when the document that its fold had written could be
#: read.
KILLED = [
    journaled("append of what a killed writer recorded", append, recorded, append),
    journaled("append of what a killed writer recorded, cold", append, recorded, append, is_cold=True),
    journaled("append after what a killed writer recorded", append_another, recorded, append),
    journaled("append after what a killed writer recorded, cold", append_another, recorded, append, is_cold=True),
    journaled("save of what a killed writer recorded", lambda store, _: store.load("s-1").save(), recorded, append),
    journaled("extend of what a killed writer recorded", extend, recorded, extend),
    journaled("extend of what a killed writer recorded, cold", extend, recorded, extend, is_cold=True),
    journaled("extend of which a killed writer recorded one", extend, recorded, append),
    journaled("transaction of nothing of what a killed writer recorded", change_nothing, recorded, extend),
    journaled("start once of what a killed writer recorded", start_what_is_answered, recorded_and_asked, answer),
    journaled("extend of what a killed writer folded", extend, recorded, extend_and_fold),
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
    journaled("first append of a process after a killed fold", append, recorded, compact, is_cold=True),
    journaled(
        "first append of a process, of what a killed writer folded", append, recorded, append_and_fold, is_cold=True
    ),
    journaled(
        "save of what a killed writer folded", lambda store, _: store.load("s-1").save(), recorded, append_and_fold
    ),
    journaled("leaving after a killed fold", append, recorded, compact, mode=NEVER, prepared=ENDLESS),
    journaled("create of what a killed writer created", create_again, recorded, create_again),
    journaled("extend of what a killed writer created", extend_and_create, recorded, extend_and_create),
]
#: Another process saw the sync of its record fail, and was killed before it could do anything about it.
UNSYNCED = [
    replace(each, name=f"{each.name}, its sync failed", fails_sync=True)
    for each in KILLED
    if "recorded" in each.name or "cancelled" in each.name
]


def after_more(prepare: Callable[[persist.Store], Any]) -> Callable[[persist.Store], Any]:
    """Append so much before `prepare` that the journal is long enough to get room.

    The record of a killed writer then lies in two sectors.
    """

    def prepared(store: persist.Store) -> Any:
        for number in range(3):
            store.append("s-1", "messages", {"id": f"r{number}", "content": "m" * 100})
        return prepare(store)

    return prepared


def with_room(scenario: Scenario) -> Scenario:
    """Return the same scenario, with records that go into the room of a journal, or beyond it."""
    name = scenario.name.replace("journal:", "room:")
    content = {"title": "t", "messages": [{"id": "m1", "content": "hi"}]}
    return replace(scenario, name=name, content=content, prepare=after_more(scenario.prepare), mode=ROOMY)


PLAIN = [*RECORDS, *FOLDS, *KILLED, *UNSYNCED]
ROOM = [with_room(each) for each in PLAIN if each.mode == ALWAYS and each.prepared is None]
JOURNALED = [*PLAIN, *CROSSINGS, *ROOM]
