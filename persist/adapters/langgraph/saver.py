"""The checkpointer: it makes commits and views of sessions from the calls of LangGraph."""

from __future__ import annotations

import asyncio
import secrets
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    PendingWrite,
    get_checkpoint_id,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from persist import json_codec
from persist.adapters.langgraph import runs
from persist.adapters.langgraph.items import (
    CHECKPOINTS,
    VALUES,
    WRITES,
    Item,
    drop_unused_values,
    has,
    in_order,
    item_id,
    keep,
    lineage,
    put_in_order,
)
from persist.adapters.opening import AnyStore, opened
from persist.errors import InvalidArgument, NotJSON, SessionNotFound, shown
from persist.transaction import Transaction
from persist.view import View

Write = Callable[[Transaction], None]

# A value is nested in a document. This place is the deepest one, and the limit of depth counts from the top.
_DEEPEST = ("writes", 0, "writes", 0, "json")


class PersistSaver(BaseCheckpointSaver[str]):
    """A LangGraph checkpointer that keeps each thread in one JSON file, and refuses superseded runs.

    Each `put` and `put_writes` is one commit. It is durable on return, and costs what it changes. A reader takes no
    lock and sees one commit whole. All methods have an awaited form. Any number of threads, tasks and processes may
    share a directory. Give it one of its own, because `list(None)` and `delete_for_runs` go through all sessions there.

    Args:
        store: a store, or the path of its directory.
        serde: turns values into bytes. The default is LangGraph's `JsonPlusSerializer`. With an `EncryptedSerializer`
            the values, the metadata and the checkpoints are encrypted. The names of threads, tasks and channels are
            not.

    Raises:
        InvalidArgument: `store` is neither. Or a config has no usable thread id: any text of 1 to 512 characters.
        SupersededRun: by `put` and `put_writes`. See `persist.adapters.langgraph.runs`.
        LockTimeout, LockError, CommitFailed, CommitUnknown, CorruptSession: by all methods, see `persist.errors`.
    """

    def __init__(self, store: AnyStore, *, serde: SerializerProtocol | None = None) -> None:
        super().__init__(serde=serde)
        self._aio = opened(store)
        self._store = self._aio._sync
        self._place = self._store.place

    # --- reading ---

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint that a config names, or the last one of its namespace. None if there is none.

        The last checkpoint is the one that was committed last. See `items.put_in_order`.
        """
        thread_id = _thread_of(config)
        view = self._read(thread_id, config)
        item = None if view is None else _found(view, config)
        return None if view is None or item is None else self._tuple(thread_id, view, item)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Yield the checkpoints of a thread, or of all threads, the last one of each first.

        Args:
            config: the thread, and perhaps its namespace and the checkpoint. None means all threads.
            filter: values that the metadata must have.
            before: yield only checkpoints whose ids are lower than its `checkpoint_id`. Ids begin with a time.
            limit: how many to yield at most.
        """
        keys: Mapping[str, Any] = config.get("configurable", {}) if config else {}
        wanted = {"ns": keys.get("checkpoint_ns"), "checkpoint_id": keys.get("checkpoint_id") or None}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        end = get_checkpoint_id(before) if before else None
        left = -1 if limit is None else max(limit, 0)
        for thread_id in [_thread_of(config)] if config else self._store.ids():
            view = self._read(thread_id, config)
            if view is None:
                continue
            for item in reversed(view.list(CHECKPOINTS)):
                if left == 0:
                    return
                if not has(item, wanted) or (end and item["checkpoint_id"] >= end):
                    continue
                if filter and not has(self._decoded(item["metadata"]), filter):
                    continue
                left -= 1
                yield self._tuple(thread_id, view, item)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return what the ancestors of a checkpoint wrote to channels, back to the last value that was stored.

        It reads the thread once.
        """
        history: dict[str, DeltaChannelHistory] = {channel: {"writes": []} for channel in channels}
        view = self._read(_thread_of(config), config)
        item = None if view is None else _found(view, config)
        if view is None or item is None:
            return history
        tasks: dict[str, list[Item]] = {}
        for task in view.list(WRITES):
            tasks.setdefault(task["checkpoint"], []).append(task)
        unfinished = set(channels)
        _, *ancestors = lineage(item, view.list(CHECKPOINTS).find)
        for ancestor in ancestors:
            for task_id, write in reversed(in_order(tasks.get(ancestor["id"], []))):
                if write["channel"] in unfinished:
                    history[write["channel"]]["writes"].append((task_id, write["channel"], self._decoded(write)))
            for channel in unfinished & ancestor["values"].keys():
                history[channel]["seed"] = self._decoded(view.list(VALUES).find(ancestor["values"][channel]))
                unfinished.remove(channel)
            if not unfinished:
                break
        for found in history.values():
            found["writes"].reverse()
        return history

    def _read(self, thread_id: str, config: RunnableConfig | None) -> View | None:
        """Return the thread as it was last committed, or None. The first read of a run begins the run."""
        run = runs.begin(config, (self._place, thread_id)) if config else None
        try:
            if run is not None and run.has_predecessor:
                # A write of the earlier run that was admitted before is committed when the lock is free.
                self._store.update(thread_id, lambda tx: None)
            view = self._store.view(thread_id)
        except SessionNotFound:
            return None
        if run is not None:
            run.version = view.version
        return view

    def _tuple(self, thread_id: str, view: View, item: Item) -> CheckpointTuple:
        values = view.list(VALUES)
        checkpoint = self._decoded(item["checkpoint"])
        checkpoint["channel_values"] = {
            channel: self._decoded(values.find(value_id)) for channel, value_id in item["values"].items()
        }
        pending: list[PendingWrite] = [
            (task_id, write["channel"], self._decoded(write))
            for task_id, write in in_order(view.list(WRITES).find_all(item["id"], "checkpoint"))
        ]
        parent = None if item["parent"] is None else _config(thread_id, item["ns"], item["parent"])
        metadata = self._decoded(item["metadata"])
        return CheckpointTuple(
            _config(thread_id, item["ns"], item["checkpoint_id"]), checkpoint, metadata, parent, pending
        )

    # --- writing ---

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint, in one commit. The config's `checkpoint_id` names its parent.

        A value is stored unless the parent has it under the same version. A checkpoint that is put again replaces the
        one of its id.

        Returns:
            The config of the checkpoint.
        """
        write = self._put(config, checkpoint, metadata, new_versions)
        self._store.update(_thread_of(config), write, create=True)
        return _config(_thread_of(config), _ns_of(config), checkpoint["id"])

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, in one commit. The config names the checkpoint, which may come later.

        A write that is there already stays as it is. Errors, interrupts and the like are replaced.
        """
        write = self._put_writes(config, writes, task_id, task_path)
        self._store.update(_thread_of(config), write, create=True)

    # These two encode what they are given before the lock is taken, and before an awaiting task goes on.

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Write:
        admit = self._admission(config)
        ns, parent = _ns_of(config), get_checkpoint_id(config)
        versions, given = checkpoint["channel_versions"], checkpoint["channel_values"]
        bare = {name: value for name, value in checkpoint.items() if name != "channel_values"}
        encoded = json_codec.encode(
            {
                "id": item_id(ns, checkpoint["id"]),
                "ns": ns,
                "checkpoint_id": checkpoint["id"],
                "parent": parent,
                "metadata": self._encoded(get_checkpoint_metadata(config, metadata)),
                "checkpoint": self._encoded(bare),
            }
        )
        made = {channel: self._value(given[channel]) for channel in new_versions if channel in given}

        def write(tx: Transaction) -> None:
            admit(tx)
            checkpoints, values = tx.list(CHECKPOINTS), tx.list(VALUES)
            item: Item = {**json_codec.decode(encoded), "values": {}}
            place = None if parent is None else checkpoints.place_of(item_id(ns, parent))
            kept = {} if place is None else self._unchanged(checkpoints.peek(place), versions)
            for channel, value in given.items():
                if channel in made or channel not in kept:
                    value_id, line = made.get(channel) or self._value(value)
                    values.put_json(None, [line])
                else:
                    value_id = kept[channel]
                item["values"][channel] = value_id
            known, place = place is not None, checkpoints.place_of(item["id"])
            if place is None:
                put_in_order(checkpoints, item, is_next=known)
            else:
                checkpoints[place] = item
                drop_unused_values(tx)

        return write

    def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> Write:
        admit = self._admission(config)
        ns, checkpoint_id = _ns_of(config), get_checkpoint_id(config)
        if checkpoint_id is None:
            raise InvalidArgument(what="checkpoint_id", expected="given in config['configurable']", got="missing")
        item: Item = {"id": item_id(ns, checkpoint_id, task_id), "checkpoint": item_id(ns, checkpoint_id)}
        item["task"] = task_id
        item["writes"] = [
            {"idx": WRITES_IDX_MAP.get(channel, idx), "channel": channel, "path": task_path, **self._encoded(value)}
            for idx, (channel, value) in enumerate(writes)
        ]
        encoded = json_codec.encode(item)

        def write(tx: Transaction) -> None:
            admit(tx)
            tasks = tx.list(WRITES)
            place = tasks.place_of(item["id"])
            before = {} if place is None else {each["idx"]: each for each in tasks.peek(place)["writes"]}
            after, new = dict(before), json_codec.decode(encoded)
            for each in new["writes"]:
                if each["idx"] < 0 or each["idx"] not in before:
                    after[each["idx"]] = each
            new["writes"] = [*after.values()]
            if place is None:
                tasks.append(new)
            elif after != before:
                tasks[place] = new

        return write

    def _admission(self, config: RunnableConfig) -> Write:
        return runs.admission(config, (self._place, _thread_of(config)))

    def _unchanged(self, parent: Item, versions: ChannelVersions) -> dict[str, str]:
        """Return the ids of the parent's values that have the same version in a child."""
        before = self._decoded(parent["checkpoint"])["channel_versions"]
        return {
            channel: value_id
            for channel, value_id in parent["values"].items()
            if channel in before and channel in versions and before[channel] == versions[channel]
        }

    def get_next_version(self, current: str | int | None, channel: None) -> str:
        """Return a version above `current`: a number of 32 digits, a dot and 16 random digits.

        The savers of SQL databases have the same form. A number is what an older thread may have.
        """
        number = current if isinstance(current, int) else int(current.partition(".")[0]) if current else 0
        return f"{number + 1:032}.{secrets.randbelow(10**16):016}"

    # --- whole threads ---

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread. A run that still goes on cannot bring it back. A missing thread is no error."""
        with suppress(SessionNotFound):
            self._store.delete(str(thread_id))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread with all of its checkpoints and writes, in one commit.

        Raises:
            SessionNotFound: there is no such thread.
            SessionExists: there is a thread of the other id already. It was not changed. Delete it first.
        """
        self._store.duplicate(str(source_thread_id), str(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Reduce threads, each in one commit. A missing thread is no error.

        Args:
            strategy: ``"keep_latest"`` keeps the last checkpoint of each namespace. Of a thread with a `DeltaChannel`,
                it also keeps the ancestors that the channel is rebuilt from, back to its last snapshot. ``"delete"``
                deletes the threads.

        The file has its new size on return.

        Concurrency: a run that has written goes on. A run that has only read is superseded.
        """
        _require_strategy(strategy)
        for thread_id in _several("thread_ids", thread_ids):
            if strategy == "delete":
                self.delete_thread(thread_id)
                continue
            with suppress(SessionNotFound):
                self._store.update(str(thread_id), self._keep_latest)
                self._store.compact(str(thread_id))

    def _keep_latest(self, tx: Transaction) -> None:
        keep(tx, self._needed(tx.list(CHECKPOINTS)))

    def _needed(self, checkpoints: Iterable[Item]) -> set[str]:
        """Return the ids of the last checkpoints, and of the ancestors that their delta channels need."""
        items = {item["id"]: item for item in checkpoints}
        needed = set()
        for last in {item["ns"]: item for item in items.values()}.values():
            # LangGraph counts here what has happened to each delta channel since it was stored.
            unfinished = set(self._decoded(last["metadata"]).get("counters_since_delta_snapshot", ()))
            for item in lineage(last, items.get):
                needed.add(item["id"])
                unfinished -= item["values"].keys()
                if not unfinished:
                    break
        return needed

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata has one of these values as `run_id`, in all threads.

        Their writes go with them, and the values that no other checkpoint has. A thread without a checkpoint is
        deleted. A run that goes on in such a thread is superseded. A thread with a `DeltaChannel` may need what is
        deleted, see `BaseCheckpointSaver.prune`. It costs a look at each thread, and one commit for each that changes.
        """
        forget = partial(self._forget, _several("run_ids", run_ids))
        for thread_id in self._store.ids():
            with suppress(SessionNotFound):
                if self._is_touched(thread_id, run_ids):
                    self._store.update(thread_id, forget)

    def _is_doomed(self, item: Item, run_ids: Sequence[str]) -> bool:
        return self._decoded(item["metadata"]).get("run_id") in run_ids

    def _is_touched(self, thread_id: str, run_ids: Sequence[str]) -> bool:
        return any(self._is_doomed(item, run_ids) for item in self._store.view(thread_id).list(CHECKPOINTS))

    def _forget(self, run_ids: Sequence[str], tx: Transaction) -> None:
        runs.sign_anew(tx)
        keep(tx, {item["id"] for item in tx.list(CHECKPOINTS) if not self._is_doomed(item, run_ids)})

    # --- values as JSON ---

    def _encoded(self, value: Any) -> Item:
        """Return the keys that hold a value in an item."""
        # Another serializer may encrypt, so it must see everything.
        if type(self.serde) is JsonPlusSerializer:
            with suppress(NotJSON):
                json_codec.check(value, _DEEPEST)
                return {"json": value}
        kind, data = self.serde.dumps_typed(value)
        return {"type": kind, "base64": b64encode(data).decode()}

    def _decoded(self, item: Item) -> Any:
        if "json" in item:
            return item["json"]
        return self.serde.loads_typed((item["type"], b64decode(item["base64"])))

    def _value(self, value: Any) -> tuple[str, bytes]:
        """Return a new id for a value, and its encoded item."""
        value_id = secrets.token_hex(8)
        return value_id, json_codec.encode({"id": value_id, **self._encoded(value)})

    # --- the same, awaited ---

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See `get_tuple`."""
        return await asyncio.to_thread(self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """See `list`."""
        tuples = self.list(config, filter=filter, before=before, limit=limit)
        while (found := await asyncio.to_thread(next, tuples, None)) is not None:
            yield found

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """See `get_delta_channel_history`."""
        return await asyncio.to_thread(self.get_delta_channel_history, config=config, channels=channels)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """See `put`. A call that is cancelled writes all, or nothing, and nothing later."""
        write = self._put(config, checkpoint, metadata, new_versions)
        await self._aio.update(_thread_of(config), write, create=True)
        return _config(_thread_of(config), _ns_of(config), checkpoint["id"])

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """See `put_writes`. A call that is cancelled writes all, or nothing, and nothing later."""
        write = self._put_writes(config, writes, task_id, task_path)
        await self._aio.update(_thread_of(config), write, create=True)

    async def adelete_thread(self, thread_id: str) -> None:
        """See `delete_thread`, and `aput`."""
        with suppress(SessionNotFound):
            await self._aio.delete(str(thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """See `copy_thread`, and `aput`."""
        await self._aio.duplicate(str(source_thread_id), str(target_thread_id))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """See `prune`, and `aput`."""
        _require_strategy(strategy)
        for thread_id in _several("thread_ids", thread_ids):
            if strategy == "delete":
                await self.adelete_thread(thread_id)
                continue
            with suppress(SessionNotFound):
                await self._aio.update(str(thread_id), self._keep_latest)
                await self._aio.compact(str(thread_id))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """See `delete_for_runs`, and `aput`."""
        forget = partial(self._forget, _several("run_ids", run_ids))
        for thread_id in await self._aio.ids():
            with suppress(SessionNotFound):
                if await asyncio.to_thread(self._is_touched, thread_id, run_ids):
                    await self._aio.update(thread_id, forget)


def _thread_of(config: RunnableConfig) -> str:
    thread_id = config.get("configurable", {}).get("thread_id")
    if thread_id is None:
        raise InvalidArgument(what="thread_id", expected="given in config['configurable']", got="missing")
    return str(thread_id)


def _require_strategy(strategy: str) -> None:
    if strategy not in ("keep_latest", "delete"):
        raise InvalidArgument(what="strategy", expected="'keep_latest' | 'delete'", got=shown(strategy))


def _several(what: str, ids: Sequence[str]) -> Sequence[str]:
    if isinstance(ids, str):
        raise InvalidArgument(what=what, expected="a list of ids", got=shown(ids))
    return ids


def _ns_of(config: RunnableConfig) -> str:
    ns: str = config["configurable"].get("checkpoint_ns") or ""
    return ns


def _config(thread_id: str, ns: str, checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}


def _found(view: View, config: RunnableConfig) -> Item | None:
    """Return the checkpoint that a config names, or the last one of its namespace."""
    checkpoints, ns, checkpoint_id = view.list(CHECKPOINTS), _ns_of(config), get_checkpoint_id(config)
    found: Item | None = checkpoints.find(item_id(ns, checkpoint_id)) if checkpoint_id else checkpoints.find(ns, "ns")
    return found
