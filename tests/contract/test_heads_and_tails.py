"""Heads hold the small fields and refuse the others, tails exist only of lists, and one damaged file hides no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.chats import HELLO

import persist


def test_head_refuses_what_it_does_not_hold(store: persist.Store) -> None:
    """A head refuses a value that it does not hold. None would be a lie, because the session has the value."""
    store.create("s", {"title": "t", "small": [1, 2], "large": "x" * 5000, "rows": ["y" * 900] * 9})
    store.update("s", lambda tx: tx.fields.update(later="z" * 6000))
    head = store.head("s")
    assert dict(head.fields) == {"title": "t", "small": [1, 2]}
    assert (len(head.fields), "title" in head.fields, "none" in head.fields) == (2, True, False)
    assert head.counts == {"small": 2, "rows": 9}
    for name in ("large", "rows", "later"):
        with pytest.raises(KeyError, match=r"store\.load"):
            head.fields[name]
        with pytest.raises(KeyError, match=r"store\.tail"):
            head.fields.get(name, "default")
    assert head.fields.get("none", "default") == "default"
    with pytest.raises(KeyError):
        head.fields["none"]


def test_heads_are_those_of_a_page_and_hide_nothing_behind_damage(store: persist.Store, files: Path) -> None:
    for name in ("a/1", "a/2", "a/3", "b/1"):
        store.create(name, {"title": name})
    (files / "a%2F2.json").write_text("{")
    assert [head.id for head in store.heads()] == ["a/1", "a/3", "b/1"]
    assert [head.id for head in store.heads(prefix="a/", after="a/1")] == ["a/3"]
    assert [head.fields["title"] for head in store.heads(prefix="a/", limit=1)] == ["a/1"]
    assert store.ids(prefix="a/", after="a/1", limit=1) == ["a/2"]
    assert store.ids(prefix="c") == []
    wrong: list[dict[str, Any]] = [{"prefix": None}, {"prefix": 1}, {"after": 1}, {"limit": -1}, {"limit": True}]
    for options in wrong:
        with pytest.raises(persist.InvalidArgument):
            store.ids(**options)


@pytest.mark.parametrize("field", ["title", "meta", "large"])
def test_tail_is_that_of_a_list(store: persist.Store, field: str) -> None:
    store.create("s", {"title": "t", "meta": {}, "large": "x" * 5000, "small": [1, 2, 3], "messages": [HELLO]})
    with pytest.raises(persist.InvalidArgument, match="a list"):
        store.tail("s", field=field)
    assert store.tail("s", field="small", limit=2) == [2, 3]
    assert store.tail("s", field="none") == []
    assert store.tail("s") == [HELLO]
    assert store.tail("s", limit=0) == []
    assert store.tail("s", limit=2**63) == [HELLO]
    with pytest.raises(persist.SessionNotFound):
        store.tail("nobody")
