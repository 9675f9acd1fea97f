"""The rows of a session: how they are read, and the statements that bring a change of its content into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from persist import json_codec
from persist.errors import (
    InvalidArgument,
    shown,
)
from persist.postgres.connections import Row, text_of
from persist.postgres.items import LONGEST_BYTES, key_in
from persist.storage.content import Content, Items, items_of
from persist.storage.diff import Change
from persist.storage.document import Head, Header, fields_of

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def header_of(row: Row) -> Header:
    """Return the header that a row holds in the columns behind its number."""
    incarnation, revision, commit, epoch, created_at, updated_at, owner = row[1:8]
    return Header(
        incarnation.decode(),
        revision,
        commit.decode(),
        epoch,
        time_of(created_at),
        time_of(updated_at),
        None if owner is None else json_codec.decode(owner),
        None,
        None,
    )


def apart_of(text: bytes) -> dict[str, tuple[int | None, int]]:
    """Return the number of items and the bytes of each value that stands apart."""
    return {name: (count, size) for name, (count, size) in json_codec.decode(text).items()}


def head_of(row: Row) -> Head:
    """Return the head that a row holds."""
    counts = {name: count for name, (count, _) in apart_of(row[9]).items()}
    return Head(header_of(row), fields_of(row[8]), counts)


def fields_text(content: Content) -> bytes:
    """Return the small values as the row has them."""
    return b"{%b}" % b",".join([json_codec.encode_key(name) + value for name, value in content.fields.items()])


def apart_text(content: Content) -> bytes:
    """Return what `apart_of` reads."""
    sizes = {
        name: (value.count, value.size_bytes) if isinstance(value, Items) else (None, len(value))
        for name, value in content.apart.items()
    }
    return json_codec.encode(msgspec.to_builtins(sizes))


def time_of(microseconds: int) -> datetime:
    """Return a time that a statement has read."""
    return _EPOCH + timedelta(microseconds=microseconds)


def written(time_: datetime) -> str:
    """Return a time for a statement that writes it."""
    # As text, because a test tool that freezes the clock may have put its own datetime there.
    return time_.isoformat()


def require_short(names: Iterable[str]) -> None:
    """Raise `InvalidArgument` if an index of the database cannot hold the name of a value that stands apart."""
    for name in names:
        size = len(text_of(name).encode())
        if size > LONGEST_BYTES:
            what, got = f"the name {shown(name)} of a large value", f"{size:,} bytes"
            raise InvalidArgument(what=what, got=got, expected=f"at most {LONGEST_BYTES:,} bytes in a database")


def row_operations(
    text: Callable[..., bytes], number: Any, counts: dict[str, int | None], changes: tuple[Change, ...]
) -> list[bytes]:
    """Return the statements that make the changes of the values that stand apart. `counts` follows them."""
    found: list[bytes] = []

    def put(name: str, start: int, items: list[bytes]) -> None:
        own = text_of(name)
        rows = [(number, own, place, key_in(item), item) for place, item in enumerate(items, start)]
        if len(rows) > 1:
            found.append(text("put_items", rows=rows))
        for _, _, place, key, item in rows[:1] if len(rows) == 1 else ():
            found.append(text("put_item", session=number, list=own, place=place, key=key, item=item))

    for change in changes:
        name = text_of(change.name)
        if not change.is_splice:
            if change.name in counts:
                one = "remove_part" if counts.pop(change.name) is None else "remove_list"
                key = "name" if one == "remove_part" else "list"
                found.append(text(one, session=number, **{key: name}))
            if change.is_gone:
                continue
            value = items_of(bytes(change.value))  # type: ignore[arg-type]
            if isinstance(value, Items):
                counts[change.name] = value.count
                put(change.name, 0, value.split())
            else:
                counts[change.name] = None
                found.append(text("put_part", session=number, name=name, value=value))
            continue
        count, at, insert = counts[change.name] or 0, change.at, list(map(bytes, change.insert))
        stop, by = at + change.remove, len(insert) - change.remove
        if stop < count and by:
            if change.remove:
                found.append(text("remove_items", session=number, list=name, start=at, stop=stop))
            found.append(text("move_items", session=number, list=name, start=stop, by=by))
        elif by < 0:
            found.append(text("remove_items", session=number, list=name, start=stop + by, stop=count))
        put(change.name, at, insert)
        counts[change.name] = count + by
    return found
