"""A session of the OpenAI Agents SDK.

    session = PersistSession("user:7/chat", "var/sessions")
    result = await Runner.run(agent, "Why?", session=session)

The items stand in the list ``messages`` of the session of that id, as the SDK gives them. Another list may be named.
Every other value of the session is left alone, so a server may keep a title there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from persist import errors
from persist.adapters.opening import AnyStore, not_installed, opened
from persist.arguments import require_text
from persist.transaction import Transaction

try:
    from agents.memory import SessionSettings
except ModuleNotFoundError as error:
    raise not_installed("openai-agents", error) from None

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.memory.session import _CompactionSnapshot


class PersistSession:
    """A conversation of the OpenAI Agents SDK. It fits the SDK's protocol ``Session``.

    - `add_items` is one commit. After a crash or a cancellation all of its items are there, or none.
    - `pop_item` gives an item to one caller only, whatever process asks.
    - Compaction (``OpenAIResponsesCompactionSession``) replaces items in one commit, and only if they are still there.
    - Writers of other processes lose nothing.

    Args:
        session_id: the id of the session. The first item creates it.
        store: a store, or the path of one.
        session_settings: the SDK's settings, or a dict of them. Their ``limit`` bounds `get_items`.
        field: the list that holds the items.

    Raises:
        InvalidArgument: an argument is not what it must be.
    """

    session_settings: SessionSettings | None

    def __init__(
        self,
        session_id: str,
        store: AnyStore,
        *,
        session_settings: SessionSettings | dict[str, Any] | None = None,
        field: str = "messages",
    ) -> None:
        require_text("session_id", session_id)
        require_text("field", field)
        self.session_id = session_id
        self.session_settings = SessionSettings().resolve(session_settings)
        self._store = opened(store)
        self._field = field

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """Return the items, the oldest first.

        Args:
            limit: how many items to return at most, the latest ones. Only these are read. None takes the limit of
                the settings. Without one, and with a negative one, all are returned.
        """
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        if limit is not None and type(limit) is not int:
            raise errors.InvalidArgument(what="limit", expected="a whole number, or None", got=errors.shown(limit))
        try:
            if limit is not None and limit >= 0:
                return await self._store.tail(self.session_id, limit=limit, field=self._field)
            return (await self._store.view(self.session_id)).list(self._field)[:]
        except errors.SessionNotFound:
            return []

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Add items, in one commit. They are durable on return.

        Equal items are all added, because the SDK gives items of different turns the same placeholder id.
        """
        if items:
            await self._store.extend(self.session_id, self._field, items, key=None, create=True)

    async def pop_item(self) -> TResponseInputItem | None:
        """Remove the latest item, and return it. Return None if there is none."""
        try:
            return await self._store.update(self.session_id, self._pop)
        except errors.SessionNotFound:
            return None

    def _pop(self, tx: Transaction) -> TResponseInputItem | None:
        items = tx.list(self._field)
        found: TResponseInputItem | None = items.pop() if items else None
        return found

    async def clear_session(self) -> None:
        """Remove all items. The session and its other values stay."""
        try:
            await self._store.update(self.session_id, self._clear)
        except errors.SessionNotFound:
            pass

    def _clear(self, tx: Transaction) -> None:
        del tx.list(self._field)[:]

    # --- compaction ---

    async def _get_compaction_snapshot(
        self, limit: int, *, prune_prefix: Callable[[TResponseInputItem], bool] | None = None
    ) -> _CompactionSnapshot | None:
        # The SDK's own stores have this method, too. Without it the SDK clears the session, and then adds
        # what it keeps. A crash in between would lose the conversation.
        try:
            from agents.memory.session import _CompactionSnapshot
        except ImportError:
            return None
        try:
            there = (await self._store.view(self.session_id)).list(self._field)
        except errors.SessionNotFound:
            return _CompactionSnapshot([], True, self._replace_nothing)
        items = there[max(0, len(there) - limit) :]

        async def replace_suffix(start: int, output: list[TResponseInputItem]) -> bool:
            return await self._store.update(
                self.session_id, partial(self._replace, items[start:], output, prune_prefix=prune_prefix)
            )

        return _CompactionSnapshot(items, len(items) == len(there), replace_suffix)

    @staticmethod
    async def _replace_nothing(_start: int, _output: list[TResponseInputItem]) -> bool:
        return False

    def _replace(
        self,
        expected: list[TResponseInputItem],
        output: list[TResponseInputItem],
        tx: Transaction,
        *,
        prune_prefix: Callable[[TResponseInputItem], bool] | None,
    ) -> bool:
        """Put `output` in the place of the last items, if these are still the expected ones."""
        items = tx.list(self._field)
        first = len(items) - len(expected)
        if not expected or first < 0 or items[first:] != expected:
            return False
        items[first:] = output
        if prune_prefix is not None:
            pruned = 0
            while pruned < first and prune_prefix(items.peek(pruned)):
                pruned += 1
            del items[:pruned]
        return True
