"""Head: the small fields of a session, as committed, without the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from persist import json_codec, turn
from persist.storage import document


class HeadFields(Mapping[str, Any]):
    """The fields of a head, without the values that stand apart. Asking for such a value raises a clear `KeyError`."""

    __slots__ = ("_apart", "_fields")

    def __init__(self, fields: Mapping[str, Any], apart: Collection[str]) -> None:
        self._fields = fields
        self._apart = apart

    def __getitem__(self, name: str) -> Any:
        name = json_codec.joined(name) if type(name) is str else name
        if name in self._apart:
            raise KeyError(f"{name!r} is not part of a head: use store.load() or store.tail(), which is for lists.")
        return self._fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` if the session has none of that name."""
        name = json_codec.joined(name) if type(name) is str else name
        return self[name] if name in self._fields or name in self._apart else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return repr(dict(self._fields))


@dataclass(frozen=True, slots=True)
class Head:
    """The small fields of a session, as committed. It has no `save`, because a part must never replace the whole.

    Attributes:
        version: an opaque string that no other commit has.
        fields: the small fields. Values that stand apart are left out: ``messages``, ``tool_calls``, and large values.
        counts: the number of items of every list.
    """

    id: str
    version: str
    revision: int
    created_at: datetime
    updated_at: datetime
    active_stream_id: str | None
    fields: Mapping[str, Any]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, session_id: str, found: document.Head) -> Head:
        """Return the head of a session, from the header and fields that storage has read."""
        header, fields = found.header, found.decode_fields()
        counts = {name: len(value) for name, value in fields.items() if type(value) is list}
        counts |= {name: count for name, count in found.counts.items() if count is not None}
        return cls(
            session_id,
            header.version,
            header.revision,
            header.created_at,
            header.updated_at,
            turn.active_stream(fields),
            HeadFields(fields, found.counts),
            counts,
        )


@dataclass(frozen=True, slots=True)
class Recent:
    """A page of sessions, most recently updated first. Iterate it: it yields the heads.

    Attributes:
        heads: the heads of the page.
        cursor: the argument `before` of the next page. None if there is no further session.
    """

    heads: list[Head]
    cursor: str | None

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)
