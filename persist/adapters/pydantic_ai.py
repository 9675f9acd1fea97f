"""The `ConversationStore` of pydantic-ai.

    from pydantic_ai.conversation import Conversation
    from persist.adapters.pydantic_ai import PersistConversationStore

    store = PersistConversationStore("var/conversations")
    conversation = await store.load("c-42") or Conversation(conversation_id="c-42")
    result = await agent.run("Why?", conversation=conversation)
    await store.save(result)

A conversation is a session, and the id of the one is the id of the other. The session holds:

    pydantic_ai    the record, without the conversation's id: head_id, revision, usage, scope, branches, …
    messages       the entries in the order in which they were stored: id, parent_id, message, kind

Both are JSON as pydantic writes it, and bytes are base64. So a message comes back as from `ModelMessagesTypeAdapter`.
The history of a record is the chain of entries that ends with its `head_id`. An entry never changes. A fork gets a copy
of the entries that it shares, with their ids. So each session is whole: another conversation may be deleted, and the
messages of a deleted conversation are gone, except where a fork has kept them.

The message stands in an entry, and not in its place. So `persist repair` leaves it alone. It would take the branches of
a conversation for one history, and pydantic-ai mends a history itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from persist.adapters.opening import AnyStore, not_installed, opened
from persist.errors import CorruptSession, InvalidArgument, SessionNotFound, Unreadable, UnsupportedFormat
from persist.head import Head
from persist.transaction import Transaction
from persist.turn import MESSAGES
from persist.view import ViewedList

try:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic_ai.conversation_store import (
        ConversationConflict,
        ConversationEntry,
        ConversationRecord,
        ConversationStore,
    )
except ModuleNotFoundError as error:
    raise not_installed("pydantic-ai", error) from None

#: The field that holds the record.
RECORD = "pydantic_ai"

# Lists, because a dataclass takes no configuration. A message must not appear in an error.
_JSON = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", hide_input_in_errors=True)
_RECORDS = TypeAdapter(list[ConversationRecord], config=_JSON)
_ENTRIES = TypeAdapter(list[ConversationEntry], config=_JSON)

#: How many sessions a list with a limit looks at first. If these do not settle it, it looks at four times as many.
_FIRST_LOOK = 50
#: `Store.recent` goes by times that are up to a second old. This is generous.
_UNORDERED = timedelta(seconds=2)
#: For so many entries the store remembers where it saw them.
_MOST_HOMES = 100_000

#: The errors of a session that must not hide the others. It is gone, damaged or another program's.
_UNREADABLE = (SessionNotFound, CorruptSession, UnsupportedFormat, Unreadable, InvalidArgument)

#: An entry or a record as JSON.
Stored = dict[str, Any]


class PersistConversationStore(ConversationStore):
    """Conversations in the sessions of a store. Any number of threads, loops and processes may share them.

    A save is one commit: the new entries and the record, durable when it returns, or `ConversationConflict` and nothing
    written. Of several saves that continue one revision, one succeeds. A save costs what it adds. A fork costs the
    history that it shares. `load` with a limit reads little more than it returns. A list reads the heads of sessions,
    and no messages. Sessions of other programs are not listed.

    A conversation's id is a session's id: any text of 1 to 512 characters. A verb that waits for a session's lock
    raises `persist.LockTimeout`, and any verb may raise the errors of `persist.Store.load`.

    Args:
        store: the store, or its directory.
    """

    def __init__(self, store: AnyStore) -> None:
        self._store = opened(store)
        # Entry -> a conversation where it was seen, because an entry's id does not tell. It may be wrong by now, so the
        # conversation is asked. Each use is one operation of the dict.
        self._homes: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<PersistConversationStore {self._store.place}>"

    # --- records ---

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        """Return the record of a conversation, or None if there is no such conversation.

        Raises:
            pydantic.ValidationError: another version of pydantic-ai has written the record.
        """
        try:
            return await self._record_in(await self._store.head(conversation_id))
        except SessionNotFound:
            return None

    async def read_records(self, *, scope: str | None = None, limit: int | None = None) -> Sequence[ConversationRecord]:
        """Return the records, newest `updated_at` first. A record that cannot be read is left out.

        With a limit, a record whose `updated_at` is later than its commit may be missing.
        """
        if limit == 0:
            return []
        look = sys.maxsize if limit is None else max(limit, _FIRST_LOOK)
        while True:
            page = await self._store.recent(limit=look)
            records = []
            for head in page:
                # A ValueError is pydantic's error.
                with suppress(*_UNREADABLE, ValueError):
                    record = await self._record_in(head)
                    if record is not None and (scope is None or record.scope == scope):
                        records.append(record)
            records.sort(key=lambda record: record.updated_at, reverse=True)
            if page.cursor is None:
                return records[:limit]
            # No session behind the page was committed later than this, so none was saved later.
            settled = page.heads[-1].updated_at + _UNORDERED
            if limit is not None and len(records) >= limit and records[limit - 1].updated_at >= settled:
                return records[:limit]
            look *= 4

    async def _record_in(self, head: Head) -> ConversationRecord | None:
        """Return the record in a session, or None if the session is another program's.

        Raises:
            SessionNotFound: the record is too large for a head, and the session was deleted since.
        """
        try:
            stored = head.fields.get(RECORD)
        except KeyError:
            view = await self._store.view(head.id)
            stored = view.fields.get(RECORD)
        if not isinstance(stored, dict):
            return None
        [record] = _RECORDS.validate_python([{**stored, "conversation_id": head.id}])
        self._remember(head.id, record.head_id, *record.branches)
        return record

    def _remember(self, conversation_id: str, *entry_ids: str | None) -> None:
        if len(self._homes) > _MOST_HOMES:
            self._homes.clear()
        for entry_id in entry_ids:
            if entry_id is not None:
                self._homes[entry_id] = conversation_id

    async def write_record(
        self,
        record: ConversationRecord,
        *,
        new_entries: Sequence[ConversationEntry] = (),
        expected_revision: str | None,
    ) -> None:
        """Store a record and its new entries in one commit. They are durable on return.

        The entries that they continue are copied from another conversation if they are not in this one. They may be
        deleted there at the same time. Then this is a conflict, or the copy is whole.

        Raises:
            ConversationConflict: the stored revision is not `expected_revision`, or no conversation holds an entry that
                the record or a new entry names. Nothing was written. Load the conversation again.
            pydantic_core.PydanticSerializationError: a message cannot be kept as JSON. Nothing was written.
            InvalidArgument: the session has messages of another program.
        """
        conversation_id = record.conversation_id
        [stored] = _RECORDS.dump_python([record], mode="json")
        del stored["conversation_id"]
        entries: list[Stored] = _ENTRIES.dump_python(list(new_entries), mode="json")
        continued = {record.head_id, *(entry.parent_id for entry in new_entries)} - {entry.id for entry in new_entries}
        shared: dict[str, Stored] = {}

        def write(tx: Transaction) -> None:
            _require_revision(tx, conversation_id, expected_revision)
            messages = tx.list(MESSAGES)
            if expected_revision is None and messages:
                expected = "one without messages, or a conversation of pydantic-ai"
                raise InvalidArgument(what=f"session {conversation_id!r}", got="another program's", expected=expected)
            missing = [
                each for each in continued - shared.keys() if each is not None and messages.place_of(each) is None
            ]
            if missing:
                raise _Elsewhere(missing)
            given = shared | {entry["id"]: entry for entry in entries}
            # Find all places before the list grows, because a search among its new items costs more with each.
            messages.extend([entry for entry in given.values() if messages.place_of(entry["id"]) is None])
            tx.fields[RECORD] = stored

        while True:
            try:
                await self._store.update(conversation_id, write, create=expected_revision is None)
                return self._remember(conversation_id, record.head_id)
            except SessionNotFound:
                raise ConversationConflict(conversation_id) from None
            except _Elsewhere as elsewhere:
                missing = elsewhere.entries
            # A thread holds one session's lock at a time, so the entries are read between two transactions.
            try:
                for each in missing:
                    shared |= {entry["id"]: entry for entry in _chain(await self._items_with(each), each)}
            except LookupError:
                raise ConversationConflict(conversation_id) from None

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        """Remove a conversation with all its entries. Durable on return. Its forks keep their copies.

        Raises:
            ConversationConflict: no record with `expected_revision` is stored.
            SessionBusy: a stream of `persist` owns the session.
        """

        def delete(tx: Transaction) -> None:
            _require_revision(tx, conversation_id, expected_revision)
            tx.delete()

        try:
            await self._store.update(conversation_id, delete)
        except SessionNotFound:
            raise ConversationConflict(conversation_id) from None

    # --- entries ---

    async def read_entry(self, entry_id: str) -> ConversationEntry:
        """Return an entry.

        An entry that ends no history and no branch is searched in all sessions. Read a history where you can.

        Raises:
            LookupError: no conversation holds it.
        """
        [entry] = _entries(await self._items_with(entry_id), entry_id, 1)
        return entry

    async def read_history(self, head_id: str | None, *, limit: int | None = None) -> list[ConversationEntry]:
        """Return the entries up to `head_id`, the first one first, or only the last `limit` of them.

        Raises:
            LookupError: no conversation holds them.
            pydantic.ValidationError: another version of pydantic-ai has written them.
        """
        if head_id is None or limit == 0:
            return []
        home = self._homes.get(head_id)
        if limit is not None and home is not None:
            # After a branch or another save, the last items may be others.
            with suppress(LookupError):
                return _entries(await self._store.tail(home, limit=limit), head_id, limit)
        items = await self._items_with(head_id)
        # In a thread, because pydantic takes 30 ms for 1,000 messages.
        return await asyncio.to_thread(_entries, items, head_id, limit)

    async def _items_with(self, entry_id: str) -> Sequence[Any]:
        """Return the items of a conversation that holds an entry.

        Raises:
            LookupError: there is none.
        """
        # The search is in a thread, because it takes up to 80 ms for 10,000 entries.
        home = self._homes.get(entry_id)
        if home is not None:
            with suppress(SessionNotFound):
                items = await self._items_of(home)
                if await asyncio.to_thread(items.find, entry_id) is not None:
                    return items
        heads = await self._store.heads()
        for head in sorted(heads, key=lambda head: not _ends_with(head, entry_id)):
            with suppress(*_UNREADABLE):
                items = await self._items_of(head.id)
                if await asyncio.to_thread(items.find, entry_id) is not None:
                    self._remember(head.id, entry_id)
                    return items
        raise LookupError(f"No conversation in {self._store.place} holds the entry {entry_id!r}.")

    async def _items_of(self, conversation_id: str) -> ViewedList:
        view = await self._store.view(conversation_id)
        return view.list(MESSAGES)


class _Elsewhere(Exception):
    """Entries that a record continues are not in its session."""

    def __init__(self, entries: list[str]) -> None:
        super().__init__(entries)
        self.entries = entries


def _require_revision(tx: Transaction, conversation_id: str, expected: str | None) -> None:
    """Raise `ConversationConflict` unless the record has a revision. None expects that there is no record."""
    stored = tx.fields.get(RECORD)
    if (None if stored is None else stored["revision"]) != expected:
        raise ConversationConflict(conversation_id)


def _ends_with(head: Head, entry_id: str) -> bool:
    """Tell whether the record in a session names an entry as the end of its history or of a branch."""
    if RECORD not in head.fields:
        return False
    stored = head.fields[RECORD]
    return isinstance(stored, dict) and entry_id in (stored.get("head_id"), *stored.get("branches", ()))


def _chain(items: Iterable[Any], entry_id: str | None, limit: int | None = None) -> list[Stored]:
    """Return the stored entries up to an entry, the first one first, or only the last `limit` of them.

    Raises:
        LookupError: the items do not hold all of them.
    """
    # The ids alone tell an entry from what another program has put beside it.
    stored = {item["id"]: item for item in items if isinstance(item, dict) and type(item.get("id")) is str}
    chain: list[Stored] = []
    while entry_id is not None and (limit is None or len(chain) < limit):
        # Each entry is taken once, so a damaged chain that leads back to itself ends, too.
        entry = stored.pop(entry_id, None)
        if entry is None or "parent_id" not in entry:
            raise LookupError(f"The history is not whole: its entry {entry_id!r} is missing.")
        chain.append(entry)
        entry_id = entry["parent_id"]
    chain.reverse()
    return chain


def _entries(items: Iterable[Any], entry_id: str, limit: int | None = None) -> list[ConversationEntry]:
    """Return the entries of a chain. See `_chain`."""
    return _ENTRIES.validate_python(_chain(items, entry_id, limit))
