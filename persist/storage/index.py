"""What is known of a list without reading it: which ids its items have, and where those stand that a stream works on.

An id is known by the JSON of it, so that `1` and `"1"` are two. Kept in 8 bytes an item: of an id that is not in the index, no
item is there; of one that is in it, there may be one, and only the document tells.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

import msgspec

from persist import codec
from persist.storage.body import Body
from persist.storage.change import Change
from persist.storage.lines import SEPARATOR, Lines
from persist.storage.snapshot import StreamOwner

_MOST_RECENT = 4096


class _WithId(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw()


_ids_of = msgspec.json.Decoder(list[_WithId]).decode
_id_of = msgspec.json.Decoder(_WithId).decode


def key_of(message_id: object) -> bytes | None:
    """What an index knows an id by; None for what is no id."""
    return codec.encode(message_id) if type(message_id) in (str, int) else None


def keys_of(owner: StreamOwner | None) -> frozenset[bytes]:
    """The ids that a stream works on: those of its prompt and of its answer."""
    if owner is None:
        return frozenset()
    return frozenset(key for key in map(key_of, (owner.prompt_id, owner.answer_id)) if key is not None)


def _key_in(item: bytes) -> bytes | None:
    """The id of an item, by its JSON."""
    try:
        raw = bytes(_id_of(item).id)
    except msgspec.DecodeError:
        # No object, or one that msgspec does not read.
        raw = b"\\"
    if raw[:1] == b'"' and b"\\" not in raw:
        return raw
    plain = codec.decode(item) if raw else None
    return key_of(plain.get("id")) if type(plain) is dict else None


class Index:
    """The ids of a list's items, and the places of those that are asked for."""

    def __init__(self, body: Body, field: str, wanted: frozenset[bytes]) -> None:
        self.places: dict[bytes, int] = {}
        self._recent: set[int] = set()
        self._settled = array("q", sorted(self._scan(body, field, wanted)))

    def _scan(self, body: Body, field: str, wanted: frozenset[bytes]) -> list[int]:
        hashes: list[int] = []
        count, lines = 0, body.bulk.get(field)
        for keys in map(_keys_in, lines.pieces() if isinstance(lines, Lines) else ()):
            hashes += map(hash, filter(None, keys))
            if wanted:
                self.places |= {
                    key: place for place, key in enumerate(keys, count) if key is not None and key in wanted
                }
            count += len(keys)
        return hashes

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory."""
        return 8 * len(self._settled) + 128 * len(self._recent)

    def may_hold(self, key: bytes) -> bool:
        """Whether some item may have this id."""
        number = hash(key)
        place = bisect_left(self._settled, number)
        return number in self._recent or (place < len(self._settled) and self._settled[place] == number)

    def certain(self, keys: frozenset[bytes]) -> frozenset[bytes]:
        """Those of which it is known where they stand, or that they do not: another one may stand somewhere of the others."""
        return frozenset(key for key in keys if key in self.places or not self.may_hold(key))

    def take(self, change: Change, wanted: frozenset[bytes]) -> None:
        """Go on behind a change of the list's items."""
        keys = [_key_in(bytes(item)) for item in change.insert]
        wanted = wanted and self.certain(wanted)
        self._recent.update(hash(key) for key in keys if key is not None)
        if len(self._recent) > _MOST_RECENT:
            self._settled = array("q", sorted({*self._settled, *self._recent}))
            self._recent = set()
        self.places = moved(self.places, change, keys, wanted) if wanted else {}


def moved(
    places: dict[bytes, int], change: Change, keys: list[bytes | None], wanted: frozenset[bytes]
) -> dict[bytes, int]:
    """Where the items stand after a change that has inserted items of these ids; of others than the wanted ones, nothing."""
    behind, grown = change.at + change.remove, len(change.insert) - change.remove
    if not isinstance(change.mark, msgspec.UnsetType):
        return places
    after = {
        key: place + grown if place >= behind else place
        for key, place in places.items()
        if key in wanted and not change.at <= place < behind
    }
    for place, key in enumerate(keys, change.at):
        if key is not None and key in wanted:
            # As one looks for an id from the end: the last one counts.
            after[key] = max(place, after.get(key, place))
    return after


def _keys_in(lines: bytes) -> list[bytes | None]:
    """The ids of items."""
    items = lines.removesuffix(SEPARATOR)
    try:
        raws = [bytes(item.id) for item in _ids_of(b"[" + items + b"]")]
    except msgspec.DecodeError:
        return [_key_in(line) for line in items.split(SEPARATOR)]
    if {raw[:1] for raw in raws} == {b'"'} and b"\\" not in b"".join(raws):
        return list(raws)
    return [_key_in(line) for line in items.split(SEPARATOR)]
