"""`view` shows one committed revision, and decodes only what it is asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import persist
import persist.aio
from persist import json_codec

LONG = [{"id": f"m{n}", "role": "user", "content": "x" * 900, "turn": n % 3} for n in range(100)]


@pytest.fixture(params=["field", "apart", "journal"])
def seen(store: persist.Store, request: pytest.FixtureRequest) -> tuple[persist.Store, list[dict[str, Any]]]:
    """A session whose list ``steps`` is a field, stands apart, or goes on in a journal, and that list."""
    few: list[dict[str, Any]] = [{"id": "m0", "turn": 0}, {"id": "m1"}]
    steps = [*(few if request.param == "field" else LONG)]
    store.create("s", {"title": "Café", "messages": LONG[:2], "steps": steps, "big": "y" * 5000})
    if request.param == "journal":
        steps.append({"id": "last", "turn": 1})
        store.append("s", "steps", steps[-1])
    return store, steps


def test_a_view_shows_every_value(seen: tuple[persist.Store, list[dict[str, Any]]]) -> None:
    store, steps = seen
    view, loaded = store.view("s"), store.load("s")
    assert view.data == loaded.data
    assert (view.version, view.created_at, view.updated_at) == (loaded.version, loaded.created_at, loaded.updated_at)
    assert dict(view.fields) == {name: loaded.data[name] for name in loaded.data if name != "messages"}
    assert len(view.fields) == 3
    assert "messages" not in view.fields
    assert "none" not in view.fields
    found = view.list("steps")
    assert list(found) == steps
    assert len(found) == len(steps)
    for place in (slice(None), slice(-3, None), slice(1, 50, 7), slice(None, None, -2), slice(9, 2)):
        assert found[place] == steps[place]
    assert found[0] == steps[0]
    assert found[-1] == steps[-1]
    with pytest.raises(IndexError):
        found[len(steps)]
    assert list(reversed(found)) == steps[::-1]
    assert list(view.list("missing")) == []
    assert view.list("missing").find("m0") is None


def test_items_are_found_by_any_key(seen: tuple[persist.Store, list[dict[str, Any]]]) -> None:
    store, steps = seen
    found = store.view("s").list("steps")
    assert found.find("m1") == steps[1]
    assert found.find("none") is None
    for turn in (0, 1, 2, "1"):
        expected = [each for each in steps if each.get("turn") == turn]
        assert found.find_all(turn, "turn") == expected
        assert found.find(turn, "turn") == (expected[-1] if expected else None)
    assert found.find_all(True, "turn") == []


def test_a_view_stays_as_it_was(store: persist.Store) -> None:
    """Neither a change in a value that it gave nor a later commit reaches it."""
    store.create("s", {"tags": ["a"], "messages": LONG})
    store.append("s", "messages", {"id": "more"})
    view = store.view("s")
    view.fields["tags"].append("b")
    view.list("messages")[0]["content"] = "changed"
    store.append("s", "messages", {"id": "later"})
    store.delete("s")
    assert view.fields["tags"] == ["a"]
    assert view.list("messages")[0] == LONG[0]
    assert view.list("messages")[-1] == {"id": "more"}


def test_a_view_decodes_no_more_than_it_is_asked_for(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("s", {"messages": LONG, "big": ["z" * 5000]})
    view, decode, decoded = store.view("s"), json_codec.decode, list[int]()

    def counting(text: bytes) -> Any:
        decoded.append(len(text))
        return decode(text)

    monkeypatch.setattr(json_codec, "decode", counting)
    assert view.list("messages").find("m50") == LONG[50]
    assert view.list("messages")[-1] == LONG[-1]
    assert sum(decoded) < 2500


def test_bad_arguments_and_sessions(store: persist.Store) -> None:
    store.create("s", {"title": "t", "messages": []})
    with pytest.raises(persist.SessionNotFound):
        store.view("none")
    with pytest.raises(persist.InvalidArgument, match="must be a list"):
        store.view("s").list("title")
    with pytest.raises(persist.InvalidArgument):
        store.view("s").list(3)  # type: ignore[arg-type]
    with pytest.raises(persist.InvalidArgument):
        store.view("s").list("messages").find("a", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        store.view("s").fields["title"] = "new"  # type: ignore[index]


def test_a_view_is_awaited(store: persist.Store) -> None:
    store.create("s", {"title": "t", "messages": LONG})
    view = asyncio.run(persist.aio.Store(store).view("s"))
    assert view.fields["title"] == "t"
    assert len(view.list("messages")) == len(LONG)
