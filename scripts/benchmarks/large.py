"""The cost of large sessions: the last of many messages, small changes beside two lists of 8 MB, many such sessions."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import msgspec

import persist
from benchmarks import bare
from benchmarks.measure import Action, Effort, interleaved
from benchmarks.tables import Findings, Table, at_most, compared, shown
from benchmarks.workload import SESSION, Message, conversation, message, new_message, open_store
from persist.storage import disk

MESSAGES, JOURNALED = 10_000, 1_000
#: The sizes of the sessions whose tail is read.
TAILED = (10_000, 100_000)
#: As large as a message of the workload.
RECORD = b"x" * 419 + b"\n"
LIST_BYTES = 8 * 1024 * 1024
#: A number of sessions that does not quite fill the cache of a store, and the size of each.
SESSIONS, SESSION_BYTES = 65, 512 * 1024


def last_message(directory: Path, effort: Effort) -> Findings:
    """Load a session and read its last message, against one decoding of the same bytes."""
    base, actions = "msgspec.json.decode of the same bytes", {}
    names = {count: f"store.load(), {count:,} in the journal" for count in (0, JOURNALED)}
    limits = {names[0]: 1.2, names[JOURNALED]: 1.5}
    for count, name in names.items():
        store = _of_size(directory / str(count), MESSAGES, count)
        actions[name] = Action(partial(_last_of, store))
    content = msgspec.json.encode(store.load(SESSION).data)
    actions[base] = Action(lambda: msgspec.json.decode(content)["messages"][-1])
    seconds = interleaved(actions, effort)
    targets = [
        at_most(f"the last of {MESSAGES:,} by {name}, to one decoding", limits[name], seconds[name] / seconds[base])
        for name in names.values()
    ]
    return Findings([compared(f"The last of {MESSAGES:,} messages", seconds, base)], targets)


def _of_size(directory: Path, messages: int, journaled: int) -> persist.Store:
    """Return a store with a session of so many messages. The last ones are in the journal, a record each."""
    store = open_store(directory)
    store.create(SESSION, conversation(messages - journaled))
    for number in range(messages - journaled, messages):
        store.append(SESSION, "messages", message(number))
    return store


def tails(directory: Path, effort: Effort) -> Findings:
    """Measure how the last 20 messages of sessions of two sizes are read."""
    actions = {}
    for size in TAILED:
        for count in (0, JOURNALED):
            store = _of_size(directory / f"{size}-{count}", size, count)
            actions[f"store.tail() of {size:,}, {count:,} in the journal"] = Action(partial(store.tail, SESSION))
    base = "limit: open + read of 4 KiB + close"
    actions[base] = Action(partial(disk.read, directory / f"{TAILED[0]}-0" / f"{SESSION}.json", 4096))
    seconds = interleaved(actions, effort)
    targets = [at_most(name, 0.3, value * 1e3, "ms") for name, value in seconds.items() if name != base]
    return Findings([compared("The last 20 messages", seconds, base)], targets)


def _last_of(store: persist.Store) -> Message:
    found: Message = store.load(SESSION).data["messages"][-1]
    return found


def beside(directory: Path, effort: Effort) -> Findings:
    """Measure a head and small changes of a session with 8 MB of messages and 8 MB of another list of messages."""
    store = open_store(directory)
    count = LIST_BYTES // len(msgspec.json.encode(message(LIST_BYTES)))
    data = conversation(count)
    store.create(SESSION, data | {"context_messages": data["messages"]})
    titles, fd = itertools.count(), bare.open_appending(directory / "bare")
    base, head = f"bare: write of {len(RECORD)} bytes + fdatasync", "store.head()"
    seconds = interleaved(
        {
            base: Action(lambda: bare.append(fd, RECORD)),
            head: Action(lambda: store.head(SESSION)),
            "store.append()": Action(lambda: store.append(SESSION, "messages", new_message())),
            "store.transaction() of the title": Action(lambda: _rename(store, f"Chat {next(titles)}")),
        },
        effort,
    )
    rows = [
        (name, shown(value), f"{(value - seconds[base]) * 1e3:+.3f} ms" if name != base else "")
        for name, value in seconds.items()
    ]
    table = Table("Beside 8 MB of messages and 8 MB of another list", ("median", "minus the bare write"), rows)
    return Findings([table], [at_most("head() beside two lists of 8 MB", 0.2, seconds[head] * 1e3, "ms")])


def _rename(store: persist.Store, title: str) -> None:
    with store.transaction(SESSION) as tx:
        tx.fields["title"] = title


def rotation(directory: Path, effort: Effort) -> Findings:
    """Measure an append to one session of 0.5 MB, and to many such sessions in rotation."""
    store = open_store(directory)
    data = conversation(SESSION_BYTES // len(msgspec.json.encode(message(SESSION_BYTES))))
    names = [f"s-{number}" for number in range(SESSIONS)]
    for name in [SESSION, *names]:
        store.create(name, data)
        store.append(name, "messages", new_message())
    turns, one = itertools.cycle(names), "one session"
    many = f"{SESSIONS} sessions in rotation"
    actions = {
        one: Action(lambda: store.append(SESSION, "messages", new_message())),
        many: Action(lambda: store.append(next(turns), "messages", new_message())),
    }
    seconds = interleaved(actions, effort)
    table = compared(f"store.append() to sessions of {SESSION_BYTES // 1024} KiB", seconds, one)
    return Findings([table], [at_most(f"append() to {many}, to one", 2.0, seconds[many] / seconds[one])])
