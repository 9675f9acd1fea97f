"""The merge of contents: three contents become one, and only the values that both sides changed are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persist.errors import MergeConflict
from persist.merge import MISSING, Policy, Preference, merge
from persist.storage.content import ALWAYS_APART, Content, Items, Value, decode, empty, encode_values, placed, window
from persist.turn import IDLE


def with_stream_fields_of(theirs: Content, content: Content) -> Content:
    """Return the content with the stream fields of `theirs`. A stream field that `theirs` lacks is left out."""
    kept = [(name, value) for name, value in content if name not in IDLE]
    return placed([*kept, *((name, value) for name, value in theirs if name in IDLE)])


def merge_contents(
    base: Content, mine: Content, theirs: Content, policies: Mapping[str, Policy], prefer: Preference
) -> Content:
    """Merge three contents. Only values that both sides changed are decoded.

    The result has the stream fields of the disk, whatever the caller prefers, because None over a live stream is #1533
    itself.
    """
    base, mine = (with_stream_fields_of(theirs, side) for side in (base, mine))
    merged: dict[str, Value] = {}
    disputed: list[str] = []
    for name in {name: None for name, _ in (*mine, *theirs)}:
        b, m, t = (side.get(name) for side in (base, mine, theirs))
        if b not in (m, t):
            disputed.append(name)
        elif (kept := t if m == b else m) is not None:
            merged[name] = kept
    if disputed:
        before = _decoded(base, disputed, empty(), {})
        ours, others = (_decoded(side, disputed, base, before) for side in (mine, theirs))
        found = merge(before, ours, others, policies, prefer=prefer)
        dropped, three = others if prefer == "mine" else ours, {"base": before, "mine": ours, "theirs": others}
        for name in ALWAYS_APART:
            # If the preferred value is no list, it would drop the items that the other side has added.
            if type(dropped.get(name)) is list and type(found.get(name)) is not list:
                reason = "one side changed this list, and the other side replaced it by another value"
                values = {side: data.get(name, MISSING) for side, data in three.items()}
                raise MergeConflict(path=(name,), reason=reason, **values)
        merged |= encode_values(found, theirs)
    return placed(merged.items())


def _decoded(content: Content, names: list[str], like: Content, decoded: dict[str, Any]) -> dict[str, Any]:
    """Decode some values. Items that `like` has, too, reuse the objects of `decoded`, so that they compare fast."""
    found = {name: value for name in names if (value := content.get(name)) is not None}
    return {name: decode_like(like.get(name), decoded.get(name), value) for name, value in found.items()}


def decode_like(first: Value | None, decoded: Any, value: Value) -> Any:
    """Decode a value.

    In a list, the items that it shares with the beginning and the end of `first` reuse the objects of `decoded`.
    """
    if not isinstance(first, Items) or not isinstance(value, Items):
        return decode(value)
    at, removed, added = window(first.split(), value.split())
    return [*decoded[:at], *Items(added).decode(), *decoded[at + len(removed) :]]
