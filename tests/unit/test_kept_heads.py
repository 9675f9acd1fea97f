"""A store keeps the heads of sessions with a journal, and checks the files before it returns one again.

Each case fails if a kept head is returned without a look at the changed file: the document, or the journal's end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.files import file_engine

import persist
from persist.storage import disk


@pytest.fixture
def other(store: persist.Store) -> persist.Store:
    """Return another store of the same directory, as in another process."""
    return persist.Store(store.path, journal="always")


@pytest.fixture
def reader(other: persist.Store) -> persist.Store:
    """Return a store that has read the head of a session with a record in its journal."""
    other.create("s", {"title": "first", "messages": [{"id": "m1"}]})
    other.append("s", "messages", {"id": "m2"})
    reader = persist.Store(other.path)
    reader.head("s")
    return reader


def journal_of(store: persist.Store) -> Path:
    return next(store.path.glob("s.*.journal"))


def set_title(store: persist.Store) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "other"


def create_anew(store: persist.Store) -> None:
    store.delete("s")
    store.create("s", {"title": "third", "messages": []})


def edit_by_hand(store: persist.Store) -> None:
    document = store.path / "s.json"
    document.write_bytes(document.read_bytes().replace(b"first", b"other"))


def cut_journal_off(store: persist.Store) -> None:
    os.truncate(journal_of(store), journal_of(store).stat().st_size // 2)


def answer(look: Callable[[], Any]) -> object:
    try:
        return look()
    except (persist.PersistError, OSError) as error:
        return type(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.append("s", "messages", {"id": "m3"}),
        lambda store: store.compact("s"),
        lambda store: store.delete("s"),
        lambda store: journal_of(store).unlink(),
        set_title,
        create_anew,
        edit_by_hand,
        cut_journal_off,
    ],
    ids=["append", "fold", "delete", "lost-journal", "field", "made-anew", "edit-by-hand", "cut-journal"],
)
def test_a_kept_head_is_given_only_while_it_is_the_last_one(
    reader: persist.Store, other: persist.Store, change: Callable[[persist.Store], object]
) -> None:
    """A store answers like one that is opened anew, whatever another process has done."""
    before = reader.head("s")
    change(other)
    found = answer(lambda: reader.head("s"))
    assert found == answer(lambda: persist.Store(other.path).head("s"))
    assert found != before or journal_of(other).stat().st_size < 100, "the case changes what a head shows"


def test_a_kept_head_costs_one_look_at_each_file(reader: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second head does not open the document again, and reads only the journal's end. Fails if nothing is kept."""
    read = list[int]()
    real = disk.read_at

    def noting(fd: int, limit: int, position: int) -> bytes:
        read.append(limit)
        return real(fd, limit, position)

    monkeypatch.setattr(disk, "read_at", noting)
    monkeypatch.setattr(disk, "open_known", lambda *_: pytest.fail("opened again"))
    assert reader.head("s").counts == {"messages": 2}
    assert len(read) == 1
    assert read[0] < 64


def test_what_is_kept_is_bounded(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with many fields are read each time, and the number of the others has a limit."""
    monkeypatch.setattr("persist.storage.directory._MOST_HEADS", 3)
    journaled = persist.Store(store.path, journal="always")
    for number in range(8):
        journaled.create(f"s{number}", {"title": "t"})
        journaled.append(f"s{number}", "messages", {"id": "m"})
        journaled.head(f"s{number}")
    journaled.create("large", {f"f{number}": "x" * 500 for number in range(20)})
    journaled.head("large")
    kept = file_engine(journaled)._heads
    assert 0 < len(kept) <= 3
    assert "large" not in kept
