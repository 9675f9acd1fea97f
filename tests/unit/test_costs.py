"""The cost of a warm verb: its Python functions and system calls are counted, so that they cannot grow unseen.

The count takes all calls of Python functions, also in the standard library and in filelock, and all system calls but
`getpid`. Each resumption of a generator counts as a call, too. Python 3.11 counts a comprehension as a function, and
later versions do not.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import persist
from persist.storage import transaction

#: The modules whose functions are system calls, and the functions among them that are none or cost next to nothing.
KERNEL = {"posix", "nt", "fcntl"}
NO_CALLS = {"getpid", "fspath"}
#: So many appends that the journal has room for more.
WARM_UP = 60


def message(number: int) -> dict[str, Any]:
    return {"id": f"m{number}", "role": "user", "content": "x" * 370}


@pytest.fixture
def large(store: persist.Store) -> persist.Store:
    """Return a store with a session that has a journal with room in it."""
    store.create("s", {"title": "t", "draft": 0, "messages": [message(number) for number in range(400)]})
    for number in range(WARM_UP):
        store.append("s", "messages", message(1_000 + number))
    return store


def counted(verb: Callable[[], object]) -> tuple[int, list[str]]:
    """Return how many Python functions a verb runs, and which system calls it makes."""
    functions, calls = 0, list[str]()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal functions
        if event == "call":
            functions += 1
        elif event == "c_call" and argument.__module__ in KERNEL and argument.__name__ not in NO_CALLS:
            calls.append(argument.__name__)

    gc.collect()
    gc.disable()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        verb()
    finally:
        sys.setprofile(before)
        gc.enable()
    # The lambda of the test does not count as a function of the verb.
    return functions - 1, calls


@pytest.fixture(autouse=True)
def no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the time of lock files alone. A commit sets it once a second, so the counts would depend on time."""
    monkeypatch.setattr(transaction, "_MARK_NS", 2**62)


def test_a_warm_append_runs_sixty_functions_and_fifteen_system_calls(large: persist.Store) -> None:
    """The fast path keeps its limits: lock, look, write, sync, and nothing twice."""
    item = message(5_000)
    functions, calls = counted(lambda: large.append("s", "messages", item))
    assert functions <= 60
    assert len(calls) <= 15


def verbs(store: persist.Store) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each warm verb of a large session, with the name of its row below."""
    numbers = iter(range(6_000, 7_000))

    def field() -> None:
        with store.transaction("s") as tx:
            tx.fields["draft"] = next(numbers)

    yield "extend by two", lambda: store.extend("s", "messages", [message(next(numbers)), message(next(numbers))])
    yield "append of a known id", lambda: store.append("s", "messages", message(1))
    yield "a field by transaction", field
    stream = store.start_stream("s", {"role": "user", "content": "q"})
    stream.checkpoint({"role": "assistant", "content": "a"})
    yield "stream.checkpoint", lambda: stream.checkpoint({"role": "assistant", "content": "more"})
    yield "stream.append", lambda: stream.append(message(next(numbers)))
    yield "stream.finish", lambda: stream.finish({"role": "assistant", "content": "all"})
    failing = store.start_stream("s", {"role": "user", "content": "q"})
    yield "stream.fail", failing.fail
    stale = store.start_stream("s", {"role": "user", "content": "q"})
    session = store.load("s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del stale
    yield "clear_stale_stream", session.clear_stale_stream
    store.head("s")
    yield "head", lambda: store.head("s")


#: Functions and system calls of a warm verb. Lower them when they fall, and raise them only with a reason.
LIMITS = {
    "extend by two": (70, 15),
    "append of a known id": (70, 12),
    "a field by transaction": (93, 16),
    "stream.checkpoint": (108, 15),
    "stream.append": (94, 15),
    "stream.finish": (132, 20),
    "stream.fail": (128, 20),
    # Two functions more since the part that another thread may do is a function of its own, for event loops.
    "clear_stale_stream": (184, 25),
    "head": (33, 4),
}


def test_no_warm_verb_runs_more_than_it_did(large: persist.Store) -> None:
    """Each verb stays within its row. A verb that needs more is slower for everybody, so the commit says why."""
    found = {name: counted(verb) for name, verb in verbs(large)}
    assert found.keys() == LIMITS.keys()
    costs = {name: (functions, len(calls)) for name, (functions, calls) in found.items()}
    over = {name: each for name, each in costs.items() if each[0] > LIMITS[name][0] or each[1] > LIMITS[name][1]}
    assert over == {}, f"over the limits: {over}"


def test_a_small_session_is_read_compared_and_written_once(store: persist.Store) -> None:
    """A save of a small session makes one read, one write, one rename and two syncs. It does nothing twice."""
    store.create("s", {"title": "t", "messages": [message(number) for number in range(8)]})
    session = store.load("s")
    session.save()

    def save() -> None:
        session.data["messages"].append(message(9))
        session.save()

    functions, calls = counted(save)
    assert functions <= 165
    assert len(calls) <= 30
    assert [calls.count(name) for name in ("read", "write", "replace", "fsync")] == [1, 1, 1, 2]


def test_a_start_does_not_look_at_the_events_of_other_sessions(store: persist.Store) -> None:
    """A busy server keeps the events of thousands of streams for five minutes. They cost a start no function."""
    costs = []
    for count in (1, 100):
        for number in range(count):
            with store.start_stream(f"other-{number}", create=True) as stream:
                stream.emit(1)
        store.create(f"s-{count}")
        costs.append(counted(lambda session_id=f"s-{count}": store.start_stream(session_id).finish())[0])  # type: ignore[misc]
    assert costs[0] == costs[1]
