"""`recent` on each engine: the sessions that were updated last, in pages."""

from __future__ import annotations

import time

import pytest

import persist

KINDS = ("auto", "postgres")
NAMES = ["a", "user:7/b", "long " * 50, "con", "日本"]


@pytest.fixture
def aged(store: persist.Store) -> persist.Store:
    """Sessions of which the first was written last. With files the order is exact up to one second."""
    for name in reversed(NAMES):
        store.create(name, {"messages": []})
    _wait_for_the_next_mark()
    for name in reversed(NAMES):
        store.append(name, "messages", {"id": "m"})
        _wait_for_the_next_mark()
    return store


def _wait_for_the_next_mark() -> None:
    time.sleep(1.05)


def ids(page: persist.Recent) -> list[str]:
    return [head.id for head in page]


def test_pages_show_the_last_updated_ones_first(aged: persist.Store) -> None:
    """A commit brings a session to the top. A look and ``touch=False`` move nothing. Pages show each session once."""
    assert ids(aged.recent()) == NAMES
    first = aged.recent(limit=2)
    assert ids(first) == NAMES[:2]
    aged.append("日本", "messages", {"id": "n"}, touch=False)
    aged.load("日本")
    aged.stream("日本")
    assert ids(aged.recent(limit=2, before=first.cursor)) == NAMES[2:4]
    aged.start_stream("con").finish()
    assert ids(aged.recent()) == ["con", "a", "user:7/b", "long " * 50, "日本"]
    # A session that moved to the top between two pages was on neither, and is on the next first one.
    second = aged.recent(limit=2, before=first.cursor)
    assert ids(second) == ["long " * 50, "日本"]
    aged.delete("a")
    assert ids(aged.recent()) == ["con", "user:7/b", "long " * 50, "日本"]
    assert ids(aged.recent(prefix="user:7/")) == ["user:7/b"]
    assert aged.recent(limit=4).cursor is None
    assert ids(aged.recent(limit=1, prefix="l")) == ["long " * 50]


def test_what_is_no_cursor_is_refused(store: persist.Store) -> None:
    store.create("a")
    for cursor in ("", "a", "1", "../a", 5, "2026/x", "\0", "9" * 40, "2026-13-45T10:00:00+00:00/5"):
        with pytest.raises(persist.InvalidArgument):
            store.recent(before=cursor)  # type: ignore[arg-type]
    for limit in (0, -1, True, "1", None):
        with pytest.raises(persist.InvalidArgument):
            store.recent(limit=limit)  # type: ignore[arg-type]
