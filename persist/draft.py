"""Drafts: a session's data while a verb changes it, under the lock; of a large session without reading it.

    def change(draft):
        turn.append_once(turn.messages_of(draft.data), item)
        draft.commit(draft.header.next())

    revise(tx, change)

A draft's `data` is the document. Of a session with a journal, its lists stand there unread (`turn.Items`): how many items
there are is known, and which ids they have. A change that needs more than that raises `Unread`, and is made again on the whole
document. So it must touch nothing but the draft before its commit.

What a caller of `edit` or `update` does is done once: it gets a draft whose lists are read as soon as they are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, TypeVar

from persist import codec
from persist.errors import ReservedField
from persist.storage import change, index
from persist.storage.body import BULK, HEADER, Body, small_of
from persist.storage.change import Change
from persist.storage.known import Known
from persist.storage.snapshot import Header, Snapshot
from persist.storage.transaction import Transaction
from persist.lazy import LazyData
from persist.turn import ACTIVE, Data, Items, MessageId, Messages, Unread, messages_of

Result = TypeVar("Result")


class Draft(Protocol):
    """A session under its lock, to be changed and committed."""

    @property
    def header(self) -> Header:
        """That of the committed revision."""

    @property
    def active_stream_id(self) -> Any:
        """The stream that the committed revision names, or None."""

    @property
    def data(self) -> Data:
        """The document, to be changed in place."""

    def items(self, field: str) -> Messages:
        """A list of the document, to be changed in place; made if it is missing."""

    def is_changed(self) -> bool:
        """Tell whether the data, as it is now, differs from the committed revision. That is what is committed, then.

        Whatever was done to a list that has not been read counts as a difference.

        Raises: what cannot be kept.
        """

    def commit(self, header: Header) -> Header:
        """Commit the data; as `Transaction.commit`."""


def revise(tx: Transaction, change: Callable[[Draft], Result]) -> Result:
    """Make a change: on what is known of the session if that will do, else on the whole document."""
    known = tx.look()
    if known is not None:
        try:
            return change(_Sparse(tx, known))
        except Unread:
            pass
    return change(_Whole(tx))


def exact(tx: Transaction) -> Draft:
    """A draft for whoever may look at all of the document, and often looks at little of it."""
    known = tx.look()
    return _Whole(tx) if known is None else _Late(tx, known)


class _Whole:
    """The document, read whole."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._found = tx.read()
        self._body: Body | None = None
        self.header = self._found.header
        self.active_stream_id = self._found.active_stream_id
        self.data: Data = self._found.body.data()

    def items(self, field: str) -> Messages:
        return messages_of(self.data, field)

    def is_changed(self) -> bool:
        self._body = Body.of(self.data)
        return self._body != self._found.body

    def commit(self, header: Header) -> Header:
        return self._tx.commit(header, self._body or Body.of(self.data)).header


class _Late:
    """The small fields, and lists that are read when they are looked at."""

    def __init__(self, tx: Transaction, known: Known) -> None:
        self._tx = tx
        self._small, self._counts = known.tail.small, dict(known.tail.counts)
        self._found: Snapshot | None = None
        self._taken: Body | bytes = b""
        fields = Body(self._small, {}).fields()
        self.header = known.tail.header
        self._headers = [self.header]
        self.active_stream_id = fields.get(ACTIVE) or None
        self.data = LazyData(fields, BULK, self._read)

    def items(self, field: str) -> Messages:
        return messages_of(self.data, field)

    def _read(self) -> Data:
        # Also while the block's small fields are being committed, or after the block: the lists are the same then.
        self._found = found = self._tx.read_again(self._headers)
        return {name: value for name, value in found.body.data().items() if name in BULK}

    def _take(self) -> Body | bytes:
        """The data as it is now; if nobody has looked at its lists, the small fields alone."""
        known, is_all = self.data.known()
        return Body.of(known) if is_all else _small_of(known)

    def is_changed(self) -> bool:
        self._taken = self._take()
        if isinstance(self._taken, bytes) or self._found is None:
            return self._taken != self._small
        return self._taken != self._found.body

    def commit(self, header: Header) -> Header:
        taken = self._taken or self._take()
        self._tx.look_again()
        self._headers.append(header)
        if isinstance(taken, Body):
            return self._tx.commit(header, taken).header
        return self._tx.record(self.header, header, taken, self._counts, ())


class _Sparse:
    """The small fields, decoded when they are asked for, and lists that have not been read."""

    def __init__(self, tx: Transaction, known: Known) -> None:
        self._tx = tx
        self._known = known
        self.header = known.tail.header
        self._lists = {name: _UnreadItems(tx, known, name) for name in BULK}
        self._taken: tuple[bytes, tuple[Change, ...]] | None = None

    @cached_property
    def _fields(self) -> Data:
        """The small fields of the committed revision."""
        return Body(self._known.tail.small, {}).fields()

    @cached_property
    def active_stream_id(self) -> Any:
        return self._fields.get(ACTIVE) or None

    @cached_property
    def data(self) -> Data:
        return self._fields | self._lists

    def items(self, field: str) -> Messages:
        # Whoever adds to a list need not have the small fields decoded.
        return (
            self._lists[field]
            if field in self._lists and "data" not in self.__dict__
            else messages_of(self.data, field)
        )

    def _take(self) -> tuple[bytes, tuple[Change, ...]]:
        """The small fields and the changes of the lists, as they are now."""
        small = self._small() if "data" in self.__dict__ else self._known.tail.small
        return small, tuple(each for items in self._lists.values() for each in items.changes)

    def _small(self) -> bytes:
        if any(self.data.get(name) is not items for name, items in self._lists.items()):
            raise Unread
        return _small_of(self.data)

    def is_changed(self) -> bool:
        self._taken = small, changes = self._take()
        return bool(changes) or small != self._known.tail.small

    def commit(self, header: Header) -> Header:
        small, changes = self._taken or self._take()
        counts = {name: items.count for name, items in self._lists.items() if items.count is not None}
        return self._tx.record(self.header, header, small, counts, changes)


def _small_of(data: Data) -> bytes:
    """The small fields of data that a caller has changed."""
    if HEADER in data:
        raise ReservedField(field=HEADER, remedy="Choose another name for the field.")
    return small_of(codec.captured({key: value for key, value in data.items() if key not in BULK}))


class _UnreadItems(Items):
    """A list of which the items' number and ids are known. Notes down what is done to it."""

    def __init__(self, tx: Transaction, known: Known, field: str) -> None:
        #: None if the field is missing, or no list: that is not known.
        self.count = known.tail.counts.get(field)
        self._tx = tx
        self._field = field
        self._owner = known.tail.header.owner
        #: Each change, with the ids of what it inserts.
        self._noted: list[tuple[Change, list[bytes | None]]] = []

    @property
    def changes(self) -> list[Change]:
        return [change for change, _ in self._noted]

    def __len__(self) -> int:
        if self.count is None:
            raise Unread
        return self.count

    def find(self, message_id: MessageId) -> int | None:
        key = index.key_of(message_id)
        if key is None or self.count is None:
            raise Unread
        known = self._tx.index(self._field)
        if not known.may_hold(key) and not any(key in keys for _, keys in self._noted):
            return None
        places, wanted = known.places, known.certain(index.keys_of(self._owner) | {key})
        for noted, keys in self._noted:
            places = index.moved(places, noted, keys, wanted)
        if key not in places:
            raise Unread
        return places[key]

    def insert(self, place: int, item: Any) -> None:
        self._note(place, 0, item)

    def __setitem__(self, place: int, item: Any) -> None:
        self._note(place, 1, item)

    def __delitem__(self, place: int) -> None:
        self._note(place, 1)

    def __getitem__(self, place: int) -> Any:
        raise Unread

    def mark(self, place: int, field: str, value: Any) -> None:
        self._noted.append((change.marked(self._field, place, {field: value}), []))

    def _note(self, place: int, remove: int, *items: Any) -> None:
        if not 0 <= place <= place + remove <= len(self):
            raise Unread
        # The verbs have captured it.
        path = (self._field, place)
        encoded = [codec.encode(item, path) for item in items]
        keys = [index.key_of(item.get("id")) if type(item) is dict else None for item in items]
        self._noted.append((change.inserted(self._field, place, *encoded, remove=remove), keys))
        self.count = len(self) + len(items) - remove
