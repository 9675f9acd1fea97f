"""Direct calls of `PersistSaver`: what stands on the disk, and odd arguments."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import threading
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph.checkpoint.base", reason="needs langgraph")

from harness.adapters.graphs import Player, chain, growing_graph
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.base import CipherProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED
from langgraph.runtime import Runtime
from langgraph.types import Send

import persist
import persist.aio
from persist.adapters.langgraph import PersistSaver, SupersededRun


def config(thread_id: Any = "t-1", ns: Any = "", checkpoint_id: str | None = None) -> Any:
    keys = {"thread_id": thread_id, "checkpoint_ns": ns}
    return {"configurable": keys if checkpoint_id is None else {**keys, "checkpoint_id": checkpoint_id}}


def checkpoint(checkpoint_id: str, values: dict[str, Any], versions: dict[str, Any] | None = None) -> Any:
    """Return a checkpoint whose channels all have the version "1", unless others are given."""
    versions = dict.fromkeys(values, "1") if versions is None else versions
    found = {"v": 4, "id": checkpoint_id, "ts": "2026-11-30T10:00:00+00:00", "channel_values": values}
    return {**found, "channel_versions": versions, "versions_seen": {}, "updated_channels": None}


def put(saver: PersistSaver, at: Any, checkpoint_id: str, values: dict[str, Any], **metadata: Any) -> Any:
    """Put a checkpoint all of whose values are new."""
    given: Any = {"source": "loop", "step": 0, **metadata}
    return saver.put(at, checkpoint(checkpoint_id, values), given, dict.fromkeys(values, "1"))


def document(directory: Path, thread_id: str = "t-1") -> Any:
    return persist.Store(directory).load(thread_id).data


# --- what stands on the disk -----------------------------------------------------------------------------------------


def test_a_thread_is_one_session_of_plain_json(directory: Path) -> None:
    """The document has the shape that `persist.adapters.langgraph.items` describes."""
    saver = PersistSaver(directory)
    saver.put_writes(put(saver, config(), "c-1", {"n": 1, "xs": ["a"]}), [("n", 2)], "task-1", "path")
    found = document(directory)
    assert found.keys() == {"run", "checkpoints", "values", "writes"}
    [item], [n, xs] = found["checkpoints"], found["values"]
    assert {name: item[name] for name in ("id", "ns", "checkpoint_id", "parent", "values")} == {
        "id": "|c-1",
        "ns": "",
        "checkpoint_id": "c-1",
        "parent": None,
        "values": {"n": n["id"], "xs": xs["id"]},
    }
    assert item["metadata"] == {"json": {"source": "loop", "step": 0}}
    assert "channel_values" not in item["checkpoint"]["json"]
    assert (n["json"], xs["json"]) == (1, ["a"])
    writes = [{"idx": 0, "channel": "n", "path": "path", "json": 2}]
    assert found["writes"] == [{"id": "|c-1|task-1", "checkpoint": "|c-1", "task": "task-1", "writes": writes}]


def test_a_channel_that_did_not_change_has_its_parents_value(directory: Path) -> None:
    """The same version is the same value. Another version, or a parent that is gone, costs a copy."""
    saver = PersistSaver(directory)
    first = put(saver, config(), "c-1", {"big": "x" * 100, "n": 1})
    second = checkpoint("c-2", {"big": "x" * 100, "n": 2}, {"big": "1", "n": "2"})
    saver.put(first, second, {}, {"n": "2"})
    assert [value["json"] for value in document(directory)["values"]] == ["x" * 100, 1, 2]
    saver.put(config(checkpoint_id="unknown"), checkpoint("c-3", {"big": "y"}), {}, {})
    saver.put(first, checkpoint("c-4", {"n": 3}, {"n": "3"}), {}, {})
    assert [value["json"] for value in document(directory)["values"]] == ["x" * 100, 1, 2, "y", 3]
    assert [each.checkpoint["channel_values"] for each in saver.list(config())] == [
        {"n": 3},
        {"big": "y"},
        {"big": "x" * 100, "n": 2},
        {"big": "x" * 100, "n": 1},
    ]


def test_a_checkpoint_that_is_put_again_replaces_the_one_of_its_id(directory: Path) -> None:
    """No value of the first one is left, except what another checkpoint has."""
    saver = PersistSaver(directory)
    first = put(saver, config(), "c-1", {"n": 1, "shared": 0})
    saver.put(first, checkpoint("c-2", {"shared": 0}), {}, {})
    put(saver, config(), "c-1", {"n": 2})
    assert [value["json"] for value in document(directory)["values"]] == [0, 2]
    assert [each.checkpoint["channel_values"] for each in saver.list(config())] == [{"shared": 0}, {"n": 2}]


def nested(depth: int) -> Any:
    """Return lists within lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


#: Values that JSON gives back exactly, and values that LangGraph's serializer has to encode.
PLAIN = ["é 😀 \0", "\ud800", -0.0, 2**70, [{"a": [None, True, 1.5]}], {}, nested(195)]
OTHERS: list[Any] = [(1, (2,)), {1, 2}, b"\xff", {1: "a"}, [math.inf], OrderedDict(a=1)]
OTHERS += [datetime(2026, 11, 30, tzinfo=UTC), Send("node", {"a": 1}), nested(196)]


@pytest.mark.parametrize("value", PLAIN + OTHERS, ids=lambda value: repr(value)[:20])
def test_a_value_comes_back_as_langgraph_gives_it_back(directory: Path, value: Any) -> None:
    """As a channel, and as a write. Its document can be folded and checked.

    It fails for the deepest value if the depth is not counted from the top of the document.
    """
    saver, serde = PersistSaver(directory), JsonPlusSerializer()
    saver.put_writes(put(saver, config(), "c-1", {"k": value}), [("k", value)], "task-1")
    persist.Store(directory).compact("t-1", alone=True)
    assert persist.Store(directory).check() == []
    is_plain = any(value is each for each in PLAIN)
    assert [("json" in item) for item in document(directory)["values"]] == [is_plain]
    wanted = value if is_plain else serde.loads_typed(serde.dumps_typed(value))
    found = saver.get_tuple(config())
    assert found is not None
    assert found.pending_writes is not None
    for back in (found.checkpoint["channel_values"]["k"], found.pending_writes[0][2]):
        assert (type(back), repr(back), back) == (type(wanted), repr(wanted), wanted)


class Reversing(CipherProtocol):
    """A cipher for tests: it turns the bytes around."""

    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "reversing", plaintext[::-1]

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        assert ciphername == "reversing"
        return ciphertext[::-1]


def test_an_encrypted_thread_shows_no_value(directory: Path) -> None:
    """Values, writes and metadata pass through the cipher. So filters and deletions look through it, too."""
    saver = PersistSaver(directory, serde=EncryptedSerializer(Reversing()))
    at = put(saver, config(), "c-1", {"k": "secret-value"}, run_id="secret-run")
    saver.put_writes(at, [("k", "secret-write")], "task-1")
    assert "secret" not in json.dumps(document(directory))
    [found] = saver.list(config(), filter={"run_id": "secret-run"})
    assert found.checkpoint["channel_values"] == {"k": "secret-value"}
    assert found.pending_writes == [("task-1", "k", "secret-write")]
    saver.delete_for_runs(["secret-run"])
    assert persist.Store(directory).ids() == []


class Unknown:
    """A class that msgpack does not know."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return Unknown, ()


def test_a_value_that_nothing_encodes_is_refused(directory: Path) -> None:
    """The commit is whole or not there. With pickle as a fall-back the value is kept."""
    saver = PersistSaver(directory)
    first = put(saver, config(), "c-1", {"k": 1})
    before = document(directory)
    with pytest.raises(TypeError):
        saver.put_writes(first, [("k", 2), ("k", Unknown())], "task-1")
    assert document(directory) == before
    pickling = PersistSaver(directory, serde=JsonPlusSerializer(pickle_fallback=True))
    pickling.put_writes(first, [("k", Unknown())], "task-1")
    found = pickling.get_tuple(config())
    assert found is not None
    assert found.pending_writes == [("task-1", "k", Unknown())]


def test_a_value_is_stored_as_it_was_at_the_call(directory: Path) -> None:
    """A caller that awaits a put may change its list at once.

    It fails if the writes are encoded in the transaction.
    """
    saver = PersistSaver(directory)

    async def work() -> None:
        value = ["before"]
        given = checkpoint("c-1", {"k": value})
        tasks = [
            asyncio.ensure_future(saver.aput(config(), given, {"source": "loop"}, {"k": "1"})),
            asyncio.ensure_future(saver.aput_writes(config(checkpoint_id="c-1"), [("k", value)], "task-1")),
        ]
        # Both have begun, and wait for their commits.
        await asyncio.sleep(0)
        value.append("after")
        await asyncio.gather(*tasks)

    asyncio.run(work())
    found = saver.get_tuple(config())
    assert found is not None
    assert found.checkpoint["channel_values"] == {"k": ["before"]}
    assert found.pending_writes == [("task-1", "k", ["before"])]


# --- names -----------------------------------------------------------------------------------------------------------


def test_no_two_names_have_one_item(directory: Path) -> None:
    """Namespaces, checkpoints and tasks may have any characters, also those of the items' ids."""
    saver = PersistSaver(directory)
    parts = ["", "|", "a|b", "a", "b", "%7C", "%", "é", "a:1|b:2"]
    for ns in parts:
        for checkpoint_id in parts[1:]:
            at = put(saver, config(ns=ns), checkpoint_id, {"k": [ns, checkpoint_id]})
            for task in parts:
                saver.put_writes(at, [("w", [ns, checkpoint_id, task])], task)
    found = list(saver.list({"configurable": {"thread_id": "t-1"}}))
    assert len(found) == 72
    for each in found:
        keys = each.config["configurable"]
        name = [keys["checkpoint_ns"], keys["checkpoint_id"]]
        assert each.checkpoint["channel_values"]["k"] == name
        assert sorted(each.pending_writes or ()) == sorted((task, "w", [*name, task]) for task in parts)
        assert saver.get_tuple(each.config) == each


@pytest.mark.parametrize("thread_id", ["../x", "a/b", "x" * 512, "\0", "CON", "..", " ", "😀", 0, 7, "a\nb"])
def test_any_text_is_a_thread_id(directory: Path, thread_id: Any) -> None:
    """A number counts as its digits, as LangGraph has it."""
    saver = PersistSaver(directory)
    put(saver, config(thread_id), "c-1", {"k": 1})
    assert [each.config for each in saver.list(None)] == [config(str(thread_id), "", "c-1")]
    assert saver.get_tuple(config(thread_id)) == saver.get_tuple(config(str(thread_id)))
    saver.copy_thread(thread_id, "copy")
    saver.delete_thread(thread_id)
    assert persist.Store(directory).ids() == ["copy"]


@pytest.mark.parametrize("thread_id", [None, "", "x" * 513, "\ud800"])
def test_another_thread_id_is_refused(directory: Path, thread_id: Any) -> None:
    """Reads and writes refuse it alike, and nothing is written."""
    saver = PersistSaver(directory)
    for call in (
        lambda: saver.get_tuple(config(thread_id)),
        lambda: list(saver.list(config(thread_id))),
        lambda: put(saver, config(thread_id), "c-1", {}),
        lambda: saver.put_writes(config(thread_id, "", "c-1"), [], "task-1"),
    ):
        with pytest.raises(persist.InvalidArgument):
            call()
    bad: Any
    for bad in ({"tags": []}, {"configurable": {}}):
        with pytest.raises(persist.InvalidArgument):
            put(saver, bad, "c-1", {})
        with pytest.raises(persist.InvalidArgument):
            list(saver.list(bad))
    assert persist.Store(directory).ids() == []


def test_writes_name_their_checkpoint(directory: Path) -> None:
    """Without the id of a checkpoint they are refused."""
    with pytest.raises(persist.InvalidArgument, match="checkpoint_id"):
        PersistSaver(directory).put_writes(config(), [("k", 1)], "task-1")


def test_it_is_made_from_a_store_or_a_path(directory: Path) -> None:
    """All see the same threads. Anything else is refused."""
    stores: list[Any] = [directory, str(directory), persist.Store(directory), persist.aio.Store(directory)]
    for number, store in enumerate(stores):
        put(PersistSaver(store), config(str(number)), "c-1", {"k": 1})
    assert persist.Store(directory).ids() == ["0", "1", "2", "3"]
    with pytest.raises(persist.InvalidArgument, match="store"):
        PersistSaver(7)  # type: ignore[arg-type]


# --- writes of tasks -------------------------------------------------------------------------------------------------


def test_a_write_that_is_repeated_stays_and_a_special_one_is_replaced(directory: Path) -> None:
    """A step that is played again changes nothing, whatever it wrote. Its errors and interrupts are the new ones."""
    saver = PersistSaver(directory)
    at = put(saver, config(), "c-1", {})
    saver.put_writes(at, [("a", 1), ("a", 2), (INTERRUPT, "i1"), (RESUME, "r1"), (ERROR, "e1")], "task-1", "p")
    saver.put_writes(at, [("a", 3), ("a", 4), (INTERRUPT, "i2"), ("b", 5)], "task-1", "p")
    saver.put_writes(at, [(SCHEDULED, "s1"), (SCHEDULED, "s2")], "task-1", "p")
    found = saver.get_tuple(config())
    assert found is not None
    assert found.pending_writes == [
        ("task-1", RESUME, "r1"),
        ("task-1", INTERRUPT, "i2"),
        ("task-1", SCHEDULED, "s2"),
        ("task-1", ERROR, "e1"),
        ("task-1", "a", 1),
        ("task-1", "a", 2),
        ("task-1", "b", 5),
    ]
    saver.put_writes(at, [("a", 9)], "task-1", "p")
    assert saver.get_tuple(config()) == found


def test_writes_come_in_the_order_of_their_paths(directory: Path) -> None:
    """The path counts before the task, and the task before the place."""
    saver = PersistSaver(directory)
    at = put(saver, config(), "c-1", {})
    saver.put_writes(at, [("k", 3), ("k", 4)], "a", "path-2")
    saver.put_writes(at, [("k", 2)], "c", "path-1")
    saver.put_writes(at, [("k", 1)], "b", "path-1")
    found = saver.get_tuple(config())
    assert found is not None
    assert [value for _, _, value in found.pending_writes or ()] == [1, 2, 3, 4]


# --- whole threads ---------------------------------------------------------------------------------------------------


def test_pruning_keeps_what_the_last_state_is_made_of(scratch: Path) -> None:
    """A delta channel is rebuilt from the ancestors back to its snapshot. All others go, with values and writes.

    It fails if only the last checkpoint is kept, because the channel is empty then.
    """
    saver = PersistSaver(scratch)
    player = Player(growing_graph().compile(checkpointer=saver), "sync")
    for number in range(5):
        player.invoke({"xs": [f"in{number}"]})
    before, count = player.state(), len(list(saver.list(player.config)))
    saver.prune(["t-1", "unknown"])
    kept = list(saver.list(player.config))
    assert (count, len(kept)) == (20, 5)
    assert player.state() == before
    found = document(scratch)
    assert {value["id"] for value in found["values"]} == {
        value_id for item in found["checkpoints"] for value_id in item["values"].values()
    }
    assert {task["checkpoint"] for task in found["writes"]} <= {item["id"] for item in found["checkpoints"]}
    assert player.invoke({"xs": ["next"]})["xs"][: len(before.values["xs"])] == before.values["xs"]
    with pytest.raises(persist.InvalidArgument, match="strategy"):
        saver.prune(["t-1"], strategy="all")


def test_a_copy_goes_its_own_way(scratch: Path) -> None:
    """The copy has the whole history. Neither thread sees what the other one does later. No thread is overwritten."""
    saver = PersistSaver(scratch)
    graph = chain("a", "b").compile(checkpointer=saver)
    first, second = Player(graph, "sync"), Player(graph, "sync", thread_id="t-2")
    first.invoke({"xs": ["in"]})
    saver.copy_thread("t-1", "t-2")
    assert [each.values for each in second.history()] == [each.values for each in first.history()]
    second.invoke({"xs": ["other"]})
    assert first.state().values["xs"] == ["in", "a", "b"]
    assert second.state().values["xs"] == ["in", "a", "b", "other", "a", "b"]
    with pytest.raises(persist.SessionExists):
        saver.copy_thread("t-1", "t-2")
    with pytest.raises(persist.SessionNotFound):
        saver.copy_thread("unknown", "t-3")


def test_a_checkpoint_that_is_its_own_ancestor_ends_every_walk(directory: Path) -> None:
    """A put may name as parent what it is itself."""
    saver = PersistSaver(directory)
    at = put(saver, config(checkpoint_id="c-1"), "c-1", {}, counters_since_delta_snapshot={"xs": [1, 1]})
    assert saver.get_delta_channel_history(config=at, channels=["xs"]) == {"xs": {"writes": []}}
    saver.prune(["t-1"])
    assert [each.config for each in saver.list(config())] == [at]


def test_lists_are_filtered_and_limited(directory: Path) -> None:
    """Each argument narrows the list. The last checkpoint comes first."""
    saver = PersistSaver(directory)
    for thread_id in ("t-1", "t-2"):
        at = config(thread_id)
        for number in range(4):
            at = put(saver, at, f"c-{number}", {}, step=number, source="loop" if number % 2 else "update")

    def listed(*arguments: Any, **options: Any) -> list[str]:
        found = [each.config["configurable"] for each in saver.list(*arguments, **options)]
        return [f"{keys['thread_id']}/{keys['checkpoint_id']}" for keys in found]

    assert listed(None, limit=5) == ["t-1/c-3", "t-1/c-2", "t-1/c-1", "t-1/c-0", "t-2/c-3"]
    assert listed(config(), before=config(checkpoint_id="c-2")) == ["t-1/c-1", "t-1/c-0"]
    assert listed(None, filter={"source": "loop", "step": 1}) == ["t-1/c-1", "t-2/c-1"]
    assert listed(config(checkpoint_id="c-2")) == ["t-1/c-2"]
    assert listed(config(), limit=0) == listed(config("unknown")) == listed(config(ns="other")) == []


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_passed_on_is_told(directory: Path) -> None:
    """If LangGraph gave the writes another config than the reads, no run would be refused. A warning says so."""
    saver = PersistSaver(directory)
    at = config()
    at["configurable"]["__pregel_runtime"] = Runtime()
    with pytest.warns(RuntimeWarning, match="superseded runs are not refused"):
        put(saver, at, "c-1", {})


def test_the_error_of_a_superseded_run_says_what_to_do() -> None:
    """It names the thread and the remedy, and can be pickled (the tests with processes do so)."""
    error = SupersededRun(session_id="t-1", reason="the thread was deleted", remedy="Run it again.", has_written=True)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert str(each).startswith("This run of thread 't-1' is superseded: the thread was deleted.")
        assert (each.remedy, each.has_written) == ("Run it again.", True)


def test_prune_gives_the_room_back(directory: Path) -> None:
    """The file of a long thread is small again when `prune` returns.

    It fails if `prune` leaves what it removed in the document, and only adds to the journal.
    """
    saver = PersistSaver(directory)
    graph = chain("a").compile(checkpointer=saver)
    for _ in range(20):
        graph.invoke({"xs": ["x" * 2000]}, config())
    before = sum(path.stat().st_size for path in directory.glob("t-1.*"))
    expected = graph.get_state(config()).values
    saver.prune(["t-1"])
    after = sum(path.stat().st_size for path in directory.glob("t-1.*"))
    assert after < before / 5
    assert graph.get_state(config()).values == expected


@pytest.mark.parametrize("call", ["prune", "delete_for_runs"])
def test_a_text_is_no_list_of_ids(directory: Path, call: str) -> None:
    """Its letters would be taken for ids."""
    saver = PersistSaver(directory)
    put(saver, config(), "c-1", {})
    with pytest.raises(persist.InvalidArgument, match="'t-1'"):
        getattr(saver, call)("t-1")
    assert saver.get_tuple(config()) is not None


@pytest.mark.parametrize("order", ["first to last", "last to first"])
def test_a_thread_that_is_copied_from_another_saver_has_the_same_last_state(directory: Path, order: str) -> None:
    """`list` of a saver gives the last checkpoint first, and a loop over it puts them in that order.

    It fails if a checkpoint without its parent is added at the end.
    """
    old, new = InMemorySaver(), PersistSaver(directory)
    graph = chain("a", "b").compile(checkpointer=old)
    for n in range(3):
        graph.invoke({"xs": [f"in{n}"]}, config())
    found = list(old.list(config()))
    for each in found if order == "last to first" else reversed(found):
        parent: Any = each.parent_config or {"configurable": {"thread_id": "t-1", "checkpoint_ns": ""}}
        new.put(parent, each.checkpoint, each.metadata, each.checkpoint["channel_versions"])
    copied = chain("a", "b").compile(checkpointer=new)
    assert copied.get_state(config()).values == graph.get_state(config()).values
    assert [each.config for each in new.list(config())] == [each.config for each in found]
    new.prune(["t-1"])
    assert copied.get_state(config()).values == graph.get_state(config()).values


def test_a_child_is_the_last_checkpoint_although_the_clock_was_set_back(directory: Path) -> None:
    """Ids begin with a time. It fails if the checkpoints are sorted by their ids alone."""
    saver = PersistSaver(directory)
    put(saver, config(), "c-5", {})
    put(saver, {"configurable": {**config()["configurable"], "checkpoint_id": "c-5"}}, "c-3", {})
    assert next(saver.list(config())).checkpoint["id"] == "c-3"


@pytest.mark.parametrize("call", ["adelete_thread", "aprune"])
def test_a_cancelled_call_changes_nothing_later(directory: Path, call: str) -> None:
    """It waits for the lock of the thread when it is cancelled. When the lock is free, nothing happens.

    It fails if the call runs in a thread that goes on after the cancellation.
    """
    saver, store = PersistSaver(directory), persist.Store(directory)
    put(saver, config(), "c-1", {})
    put(saver, config(), "c-2", {})
    is_locked, may_end = threading.Event(), threading.Event()

    def hold(_tx: persist.Transaction) -> None:
        is_locked.set()
        assert may_end.wait(60)

    holder = threading.Thread(target=store.update, args=("t-1", hold))
    holder.start()
    assert is_locked.wait(60)

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await getattr(saver, call)("t-1" if call == "adelete_thread" else ["t-1"])
        may_end.set()
        holder.join()
        # A thread that goes on would have ended by then.
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(cancelled())
    assert [each.checkpoint["id"] for each in saver.list(config())] == ["c-2", "c-1"]
