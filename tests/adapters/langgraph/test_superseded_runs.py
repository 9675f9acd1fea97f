"""A run that others have overtaken is refused, and the thread shows the others' steps alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph.graph", reason="needs langgraph")

from actors import eventually
from conftest import ActorFactory
from harness.adapters.graphs import Durability, State, adder, chain
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import RunControl
from langgraph.types import interrupt

import persist
from persist.adapters.langgraph import PersistSaver, SupersededRun

CONFIG: Any = {"configurable": {"thread_id": "t-1"}}
DURABILITIES = ["sync", "async", "exit"]


def with_node(node: Any, saver: PersistSaver) -> Any:
    """Return a graph of the node "before", the given node and the node "after"."""
    builder = StateGraph(State)
    builder.add_node("before", adder("before"))
    builder.add_node("node", node)
    builder.add_node("after", adder("after"))
    for edge in ((START, "before"), ("before", "node"), ("node", "after"), ("after", END)):
        builder.add_edge(*edge)
    return builder.compile(checkpointer=saver)


def assert_one_chain(saver: PersistSaver) -> None:
    """Check that each checkpoint of the thread has the one before as its parent."""
    found = list(saver.list({"configurable": {"thread_id": "t-1", "checkpoint_ns": ""}}))
    for child, parent in zip(found, [*found[1:], None], strict=True):
        assert child.parent_config == (parent and parent.config)


# --- two processes ---------------------------------------------------------------------------------------------------

RUN = """
import asyncio, sys
from pathlib import Path
from harness.adapters.graphs import Player, State, adder, chain
from langgraph.graph import START, END, StateGraph
from persist.adapters.langgraph import PersistSaver

def waits(state):
    Path({reached!r}).touch()
    Path({gate!r}).read_text()
    return {{"xs": ["stopped"]}}

def goes_on(state):
    return {{"xs": ["other"]}}

inner = StateGraph(State)
inner.add_node("node", {node})
inner.add_edge(START, "node")
builder = chain("a")
builder.add_node("work", inner.compile() if {is_nested} else {node})
builder.add_edge("a", "work")
builder.add_node("after", adder("after"))
builder.add_edge("work", "after")
player = Player(builder.compile(checkpointer=PersistSaver(store)), {durability!r}, is_async={is_async})
player.invoke({given!r})["xs"]
"""


def stop_between_commits(process: subprocess.Popen[bytes], store: persist.Store) -> None:
    """Stop a process at a moment when it holds no lock and has written something."""
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with suppress(persist.LockTimeout, persist.SessionNotFound), store.transaction("t-1", timeout_s=0) as tx:
            if tx.list("checkpoints"):
                return
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("way", ["plain-graph", "awaited-subgraph"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_stopped_process_that_was_taken_over_is_refused(
    actor: ActorFactory, directory: Path, tmp_path: Path, durability: str, way: str
) -> None:
    """One process is stopped in the middle of a node. Another one takes the thread over, and finishes the run.

    The first one comes back, and its late writes are refused. The thread shows the second run alone: no write of the
    first one after the take-over, and one chain of checkpoints.

    It fails if `Run.admit` lets every run pass.
    """
    reached, gate = tmp_path / "reached", tmp_path / "gate"
    os.mkfifo(gate)
    names: dict[str, Any] = {"reached": str(reached), "gate": str(gate), "durability": durability}
    names |= {"is_async": way == "awaited-subgraph", "is_nested": way == "awaited-subgraph"}
    saver, store = PersistSaver(directory), persist.Store(directory)
    if durability == "exit":
        chain("a").compile(checkpointer=saver).invoke({"xs": ["before"]}, CONFIG)
    first, second = actor(), actor()
    first.start(RUN.format(node="waits", given={"xs": ["in"]}, **names))
    eventually(reached.exists)
    stop_between_commits(first.process, store)
    # With "exit" nothing of the first run is stored yet, so there is nothing to go on from.
    given = {"xs": ["anew"]} if durability == "exit" else None
    assert second.do(RUN.format(node="goes_on", given=given, **names))[-2:] == ["other", "after"]
    version = store.view("t-1").version

    first.process.send_signal(signal.SIGCONT)
    gate.write_text("go")
    with pytest.raises(SupersededRun, match="'t-1'") as error:
        first.result()
    assert error.value.session_id == "t-1"
    assert store.view("t-1").version == version
    assert_one_chain(saver)
    for each in saver.list(CONFIG):
        assert "stopped" not in repr((each.checkpoint["channel_values"], each.pending_writes))


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["controls-of-their-own", "one-control"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_of_two_threads_that_run_one_thread_one_is_refused(
    directory: Path, durability: Durability, shared: bool
) -> None:
    """Both are in the middle of their runs at the same time. One of them finishes, and the other one is told.

    It fails if a run is known by its control only, or if `Run.admit` lets every run pass.
    """
    barrier, control = threading.Barrier(2), RunControl()
    ended: list[Any] = []

    def node(_state: State) -> Any:
        # A run that is refused before its node breaks the barrier.
        with suppress(threading.BrokenBarrierError):
            barrier.wait(60)
        return {"xs": ["node"]}

    graph = with_node(node, PersistSaver(directory))

    def run(name: str) -> None:
        options: Any = {"control": control} if shared else {}
        try:
            ended.append(graph.invoke({"xs": [name]}, CONFIG, durability=durability, **options)["xs"])
        except Exception as error:
            barrier.abort()
            ended.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [finished] = [each for each in ended if isinstance(each, list)]
    assert [type(each) for each in ended if not isinstance(each, list)] == [SupersededRun]
    assert graph.get_state(CONFIG).values["xs"] == finished


@pytest.mark.parametrize("durability", ["sync", "exit"])
def test_a_superseded_run_says_whether_its_input_is_in_the_thread(directory: Path, durability: Durability) -> None:
    """With that a server knows whether it may send the same input again: no prompt is lost, and none is doubled.

    It fails if `SupersededRun.has_written` is always True, or always False.
    """
    saver = PersistSaver(directory)

    def node(state: State) -> Any:
        if "quick" not in state["xs"]:
            outside(lambda: graph.invoke({"xs": ["quick"]}, CONFIG, durability="sync"))
        return {"xs": ["node"]}

    graph = with_node(node, saver)
    with pytest.raises(SupersededRun) as error:
        graph.invoke({"xs": ["slow"]}, CONFIG, durability=durability)
    there = graph.get_state(CONFIG).values["xs"]
    assert error.value.has_written is ("slow" in there) is (durability != "exit")
    assert ("same input" in str(error.value)) is not error.value.has_written
    assert "quick" in there


@pytest.mark.parametrize("durability", DURABILITIES)
def test_of_two_tasks_that_run_one_thread_one_is_refused(directory: Path, durability: Durability) -> None:
    """The same with tasks of one loop."""

    async def work() -> None:
        barrier = asyncio.Barrier(2)

        async def node(_state: State) -> Any:
            with suppress(asyncio.BrokenBarrierError):
                await asyncio.wait_for(barrier.wait(), 60)
            return {"xs": ["node"]}

        graph = with_node(node, PersistSaver(directory))

        async def run(name: str) -> Any:
            try:
                return await graph.ainvoke({"xs": [name]}, CONFIG, durability=durability)
            except Exception as error:
                await barrier.abort()
                return error

        ended = await asyncio.gather(run("one"), run("two"))
        [finished] = [each for each in ended if isinstance(each, dict)]
        assert [type(each) for each in ended if not isinstance(each, dict)] == [SupersededRun]
        assert (await graph.aget_state(CONFIG)).values == finished

    asyncio.run(work())


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_run_beside_an_update_is_refused(directory: Path, durability: Durability) -> None:
    """An update of the state in the middle of a run is kept. The run does not write over it."""
    saver = PersistSaver(directory)
    chain("a").compile(checkpointer=saver).invoke({"xs": ["first"]}, CONFIG)

    def node(_state: State) -> Any:
        outside(lambda: graph.update_state(CONFIG, {"xs": ["update"]}, as_node="after"))
        return {"xs": ["node"]}

    graph = with_node(node, saver)
    with pytest.raises(SupersededRun):
        graph.invoke({"xs": ["in"]}, CONFIG, durability=durability)
    assert graph.get_state(CONFIG).values["xs"][-1] == "update"


def outside(call: Callable[[], Any]) -> Any:
    """Call a function outside of the run that this node belongs to, as another request of the server does."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


@pytest.mark.parametrize(
    ("durability", "is_new"),
    # With "exit" nothing of a run is stored before its end. So a new thread is not there to be deleted.
    [
        (durability, is_new)
        for durability in DURABILITIES
        for is_new in (True, False)
        if durability != "exit" or not is_new
    ],
)
@pytest.mark.parametrize("way", ["delete", "prune", "runs"])
def test_a_run_cannot_bring_a_deleted_thread_back(
    directory: Path, durability: Durability, is_new: bool, way: str
) -> None:
    """The thread is deleted in the middle of a run. The late writes are refused, and the thread stays deleted.

    It fails for a new thread if `Run` forgets that it has written.
    """
    saver = PersistSaver(directory)
    config: Any = {**CONFIG, "metadata": {"run_id": "r-1"}}
    if not is_new:
        chain("a").compile(checkpointer=saver).invoke({"xs": ["first"]}, {**CONFIG, "metadata": {"run_id": "r-0"}})
    ways: dict[str, Callable[[], None]] = {
        "delete": lambda: saver.delete_thread("t-1"),
        "prune": lambda: saver.prune(["t-1"], strategy="delete"),
        "runs": lambda: saver.delete_for_runs(["r-0", "r-1"]),
    }

    def node(_state: State) -> Any:
        # All checkpoints of the steps before are there by now.
        eventually(lambda: len(list(saver.list(CONFIG))) == 3 * (not is_new) + 3 * (durability != "exit"))
        ways[way]()
        return {"xs": ["node"]}

    graph = with_node(node, saver)
    with pytest.raises(SupersededRun):
        graph.invoke({"xs": ["in"]}, config, durability=durability)
    assert persist.Store(directory).ids() == []


@pytest.mark.parametrize("durability", DURABILITIES)
def test_of_two_runs_the_one_that_began_later_goes_on(directory: Path, durability: Durability) -> None:
    """A user stops an answer, and sends the next message. A late write of the stopped run does not stop the next one.

    The first run waits in its node, and writes while the second one is between its first read and its first write. It
    fails if a run goes on after a later one of its process has begun.
    """
    saver = PersistSaver(directory)
    in_first, may_write, has_ended = threading.Event(), threading.Event(), threading.Event()
    ended: list[Any] = []

    def first(_state: State) -> Any:
        in_first.set()
        assert may_write.wait(60)
        return {"xs": ["first"]}

    def second(_state: State) -> Any:
        may_write.set()
        assert has_ended.wait(60)
        return {"xs": ["second"]}

    def run() -> None:
        try:
            ended.append(with_node(first, saver).invoke({"xs": ["one"]}, CONFIG, durability=durability))
        except Exception as error:
            ended.append(error)
        has_ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert in_first.wait(60)
    # With "exit" the second run has written nothing when the first one ends.
    found = with_node(second, saver).invoke({"xs": ["two"]}, CONFIG, durability="exit")["xs"]
    thread.join()
    assert [type(each) for each in ended] == [SupersededRun]
    assert found[-4:] == ["two", "before", "second", "after"]
    assert chain("a").compile(checkpointer=saver).get_state(CONFIG).values["xs"] == found
    assert_one_chain(saver)


def test_a_write_that_is_under_way_when_a_run_begins_is_read_by_it(directory: Path) -> None:
    """An earlier run is about to commit. The later one reads what that commits, so its own writes are no surprise.

    It fails if the first read of a run does not wait for the lock when there is an earlier run.
    """
    saver, store = PersistSaver(directory), persist.Store(directory)
    in_first, may_end, is_locked = threading.Event(), threading.Event(), threading.Event()

    def first(_state: State) -> Any:
        in_first.set()
        assert may_end.wait(60)
        return {"xs": ["first"]}

    def run() -> None:
        with suppress(SupersededRun):
            with_node(first, saver).invoke({"xs": ["one"]}, CONFIG, durability="sync")

    def commit(tx: persist.Transaction) -> None:
        is_locked.set()
        time.sleep(0.5)  # for as long as a read without the lock takes
        tx.fields["title"] = "written by the earlier run"

    threads = [threading.Thread(target=run), threading.Thread(target=store.update, args=("t-1", commit))]
    threads[0].start()
    assert in_first.wait(60)
    threads[1].start()
    assert is_locked.wait(60)
    assert chain("a").compile(checkpointer=saver).invoke({"xs": ["two"]}, CONFIG)["xs"][-2:] == ["two", "a"]
    may_end.set()
    for thread in threads:
        thread.join()


def test_a_look_renews_no_run(directory: Path) -> None:
    """The node of a superseded run looks at the thread's state in every way there is. It is refused all the same."""
    saver = PersistSaver(directory)

    def node(_state: State, config: RunnableConfig) -> Any:
        outside(lambda: chain("a").compile(checkpointer=saver).invoke({"xs": ["other"]}, CONFIG))
        for each in (CONFIG, config):
            graph.get_state(each)
            list(graph.get_state_history(each))
            saver.get_tuple(each)
        return {"xs": ["node"]}

    graph = with_node(node, saver)
    with pytest.raises(SupersededRun):
        graph.invoke({"xs": ["in"]}, CONFIG, durability="sync")
    assert graph.get_state(CONFIG).values["xs"][-2:] == ["other", "a"]


def test_a_subgraph_renews_no_run(directory: Path) -> None:
    """The run is superseded before its subgraph begins to read. The subgraph's writes are refused, too."""
    saver = PersistSaver(directory)

    def take_over(_state: State) -> Any:
        outside(lambda: chain("a").compile(checkpointer=saver).invoke({"xs": ["other"]}, config))
        return {"xs": ["node"]}

    for thread_id, checkpointer in (("t-1", None), ("t-2", True), (3, None)):
        config: Any = {"configurable": {"thread_id": thread_id}}
        builder: Any = StateGraph(State)
        builder.add_node("take over", take_over)
        builder.add_node("sub", chain("s1", "s2").compile(checkpointer=checkpointer))
        builder.add_edge(START, "take over")
        builder.add_edge("take over", "sub")
        graph = builder.compile(checkpointer=saver)
        with pytest.raises(SupersededRun):
            graph.invoke({"xs": ["in"]}, config, durability="sync")
        assert {each.config["configurable"]["checkpoint_ns"] for each in saver.list(config)} == {""}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_superseded_run_is_not_told_that_it_waits_for_an_answer(directory: Path, durability: Durability) -> None:
    """The run is superseded, and its node asks a person. LangGraph hides that exception, but not the refusal."""
    saver = PersistSaver(directory)

    def node(_state: State) -> Any:
        outside(lambda: graph.update_state(CONFIG, {"xs": ["update"]}, as_node="after"))
        return {"xs": [interrupt("which?")]}

    graph = with_node(node, saver)
    chain("a").compile(checkpointer=saver).invoke({"xs": ["first"]}, CONFIG)
    with pytest.raises(SupersededRun):
        graph.invoke({"xs": ["in"]}, CONFIG, durability=durability)
    assert graph.get_state(CONFIG).interrupts == ()
    assert graph.get_state(CONFIG).values["xs"][-1] == "update"
