"""Tails: the last items of a list, read from the ends of the files, are the last items of the whole session.

The tests fail if a splice before the end is taken for an append. They fail if an item that a window cuts off is
returned, or if a list that was set anew is searched for in the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness.faults import quick_directory
from hypothesis import given
from hypothesis import strategies as st

import persist
from persist.storage import disk, document, journal

LIMITS = (0, 1, 2, 5, 100)


def item(number: int) -> dict[str, Any]:
    return {"id": f"m{number}", "content": "x" * (number * 37 % 300)}


def assert_tails(store: persist.Store) -> None:
    whole = store.load("s").data.get("messages", [])
    for limit in LIMITS:
        assert store.tail("s", limit=limit) == whole[max(0, len(whole) - limit) :], limit


steps = st.lists(
    st.tuples(
        st.sampled_from(["extend", "insert", "remove", "replace", "set", "drop", "field", "compact", "alone"]),
        st.integers(0, 40),
        st.integers(1, 12),
    ),
    max_size=12,
)


@given(st.integers(0, 40), steps)
def test_tail_is_that_of_the_whole(count: int, steps: list[tuple[str, int, int]]) -> None:
    with quick_directory() as directory, pytest.MonkeyPatch.context() as patched:
        # Small windows, so that a few items fill one.
        patched.setattr(journal, "_ENDING_BYTES", 256)
        patched.setattr(document, "_FIRST_READ_BYTES", 512)
        store = persist.Store(directory, journal="always")
        store.create("s", {"messages": list(map(item, range(count)))})
        for number, (step, place, many) in enumerate(steps):
            fresh = [item(1000 + 50 * number + each) for each in range(many)]
            take(store, step, place, fresh)
            assert_tails(store)


def take(store: persist.Store, step: str, place: int, fresh: list[Any]) -> None:
    if step in ("compact", "alone"):
        store.compact("s", alone=step == "alone")
        return
    with store.transaction("s") as tx:
        messages = tx.list("messages")
        match step:
            case "extend":
                messages.extend(fresh)
            case "insert":
                for each in fresh:
                    messages.insert(place, each)
            case "remove":
                del messages[place : place + len(fresh)]
            case "replace":
                for at in range(place, min(len(messages), place + len(fresh))):
                    messages[at] = fresh[at - place]
            case "set":
                tx.data["messages"] = fresh
            case "drop":
                tx.data.pop("messages", None)
            case _:
                tx.fields["title"] = fresh[0]["content"]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note how many bytes each read of the block returns."""
    sizes: list[int] = []
    read_at, read = disk.read_at, disk.read_version

    def reading_at(fd: int, limit: int, position: int) -> bytes:
        found = read_at(fd, limit, position)
        sizes.append(len(found))
        return found

    def reading(path: Path, limit: int) -> tuple[bytes, disk.Version]:
        found = read(path, limit)
        sizes.append(len(found[0]))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(disk, "read_at", reading_at)
        patched.setattr(disk, "read_version", reading)
        yield sizes


@pytest.mark.parametrize("appended", [0, 5, 500])
def test_tail_reads_what_it_returns(store: persist.Store, monkeypatch: pytest.MonkeyPatch, appended: int) -> None:
    """A tail reads neither the whole session, which has a megabyte here, nor its journal.
    Fails if the session is loaded.
    """
    store.create("s", {"messages": [{"id": f"m{number}", "content": "x" * 500} for number in range(2000)]})
    for number in range(appended):
        store.append("s", "messages", {"id": f"n{number}", "content": "x" * 200})
    with counted(monkeypatch) as sizes:
        found = store.tail("s", limit=20)
    assert [each["id"] for each in found] == [each["id"] for each in store.load("s").data["messages"][-20:]]
    assert sum(sizes) < 120_000
    assert store.tail("s", limit=10**9) == store.load("s").data["messages"]
