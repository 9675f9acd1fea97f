"""Graphs of LangGraph, and scenarios that play them on any checkpointer. Each scenario returns what a user sees.

The same scenario on two savers must return the same. Ids and times differ from run to run, so no result holds one.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, RetryPolicy, Send, interrupt

Saver = BaseCheckpointSaver[Any]
Durability = Literal["sync", "async", "exit"]


class State(TypedDict):
    """A list to which each node adds its name."""

    xs: Annotated[list[str], operator.add]


class Chat(TypedDict):
    """A list of messages."""

    messages: Annotated[list[AnyMessage], add_messages]


def extended(before: list[str], writes: Any) -> list[str]:
    """Add lists to a list."""
    return [*(before or []), *(each for write in writes for each in write)]


class Growing(TypedDict):
    """A list that is stored whole at every fourth change, and rebuilt from its changes otherwise."""

    xs: Annotated[list[str], DeltaChannel(extended, list, snapshot_frequency=4)]
    last: str


class Player:
    """Calls a graph on one thread, by its plain or its awaited methods.

    Args:
        is_async: whether each call is awaited, in a loop of its own.
    """

    def __init__(self, graph: Any, durability: Durability, *, is_async: bool = False, thread_id: Any = "t-1") -> None:
        self.graph = graph
        self.config: Any = {"configurable": {"thread_id": thread_id}}
        self._is_async = is_async
        self._durability = durability

    def invoke(self, given: Any, config: Any = None, **options: Any) -> Any:
        options |= {"durability": self._durability}
        return self._call("invoke", given, config or self.config, **options)

    def state(self, **options: Any) -> Any:
        return self._call("get_state", self.config, **options)

    def update(self, values: Any, config: Any = None, **options: Any) -> Any:
        return self._call("update_state", config or self.config, values, **options)

    def history(self) -> list[Any]:
        if not self._is_async:
            return list(self.graph.get_state_history(self.config))

        async def collect() -> list[Any]:
            return [state async for state in self.graph.aget_state_history(self.config)]

        return asyncio.run(collect())

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        if not self._is_async:
            return getattr(self.graph, name)(*arguments, **options)

        async def call() -> Any:
            return await getattr(self.graph, f"a{name}")(*arguments, **options)

        return asyncio.run(call())


def seen(player: Player) -> list[Any]:
    """Return the history of a thread without its ids: the last state first."""
    return [
        (
            _plain(state.values),
            state.next,
            state.metadata.get("source"),
            state.metadata.get("step"),
            [(each.name, str(each.error), [found.value for found in each.interrupts]) for each in state.tasks],
        )
        for state in player.history()
    ]


def namespaces(saver: Saver, thread_id: str = "t-1") -> list[Any]:
    """Return the checkpoints of all namespaces of a thread, without their ids, sorted."""
    found = []
    for each in saver.list({"configurable": {"thread_id": thread_id}}):
        ns = "|".join(part.split(":")[0] for part in each.config["configurable"]["checkpoint_ns"].split("|"))
        writes = sorted((channel, repr(_plain(value))) for _, channel, value in each.pending_writes or ())
        writes = [write for write in writes if "id='" not in write[1] and "id=" not in write[1]]
        values = sorted(_plain(each.checkpoint["channel_values"]).items())
        found.append((ns, each.metadata["step"], each.metadata.get("source"), repr(values), writes))
    return sorted(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if name != "id"}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return (type(value).__name__, value.content) if isinstance(value, (HumanMessage, AIMessage)) else value


def adder(name: str) -> Any:
    """Return a node that adds its name."""
    return lambda _state: {"xs": [name]}


def chain(*names: str) -> Any:
    """Return a graph of nodes that run one after the other."""
    builder = StateGraph(State)
    for name in names:
        builder.add_node(name, adder(name))
    for before, after in zip((START, *names), (*names, END), strict=True):
        builder.add_edge(before, after)
    return builder


# --- scenarios -------------------------------------------------------------------------------------------------------

Scenario = Callable[[Saver, Durability, bool], Any]


def talking(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """Messages of LangChain, over three turns."""

    def answer(state: Chat) -> Any:
        return {"messages": [AIMessage(f"you said {state['messages'][-1].content}", id=f"a{len(state['messages'])}")]}

    builder = StateGraph(Chat)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async)
    for number, text in enumerate(["hi", "é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "bye"]):
        player.invoke({"messages": [HumanMessage(text, id=f"h{number}")]})
    return seen(player)


def parallel(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """Nodes side by side, and as many tasks as `Send` makes."""
    builder = StateGraph(State)
    for name in "abc":
        builder.add_node(name, adder(name))
        builder.add_edge(START, name)
    builder.add_node("one", lambda given: {"xs": [f"one{given['n']:02}"]})
    builder.add_conditional_edges("a", lambda _: [Send("one", {"n": number}) for number in range(12)], ["one"])
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async)
    player.invoke({"xs": ["in"]})
    player.invoke({"xs": ["again"]})
    return seen(player)


def nested(saver: Saver, durability: Durability, is_async: bool, thread_id: Any = "t-1") -> Any:
    """A subgraph that inherits the checkpointer, and one that keeps its own history."""
    builder = chain("a")
    builder.add_node("inherits", chain("i1", "i2").compile())
    builder.add_node("keeps", chain("k1", "k2").compile(checkpointer=True))
    builder.add_edge("a", "inherits")
    builder.add_edge("inherits", "keeps")
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async, thread_id=thread_id)
    player.invoke({"xs": ["in"]})
    player.invoke({"xs": ["again"]})
    return seen(player), namespaces(saver, str(thread_id))


def nested_with_a_number(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """The same under a thread id that is no string. LangGraph gives the subgraphs configs of their own then."""
    return nested(saver, durability, is_async, thread_id=7)


def asking(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """An interrupt in the graph, one in a subgraph, and the answers."""

    def ask(_state: State) -> Any:
        return {"xs": [f"got {interrupt('which?')}"]}

    inner: Any = StateGraph(State)
    inner.add_node("ask", ask)
    inner.add_edge(START, "ask")
    builder = chain("a")
    builder.add_node("ask", ask)
    builder.add_node("sub", inner.compile())
    builder.add_edge("a", "ask")
    builder.add_edge("ask", "sub")
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async)
    player.invoke({"xs": ["in"]})
    first = seen(player)
    player.invoke(Command(resume="this"))
    second = seen(player)
    player.invoke(Command(resume="that"))
    return first, second, seen(player)


def travelling(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """Runs that begin at an old checkpoint, with and without input, and one in a subgraph."""
    builder = chain("a", "b")
    builder.add_node("sub", chain("s1", "s2").compile())
    builder.add_edge("b", "sub")
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async)
    player.invoke({"xs": ["in"]})
    old = [state.config for state in player.history() if state.next == ("b",)] or [player.history()[-1].config]
    player.invoke(None, old[0])
    first = seen(player)
    player.invoke({"xs": ["other"]}, old[0])
    return first, seen(player)


def travelling_inside(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """A subgraph that stops, an update of its state, and a run of the graph that begins at that checkpoint."""
    inner = chain("s1", "s2").compile(interrupt_before=["s2"])
    builder = chain("a")
    builder.add_node("sub", inner)
    builder.add_edge("a", "sub")
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async)
    player.invoke({"xs": ["in"]})
    inside = player.state(subgraphs=True).tasks[0].state.config
    updated = player.update({"xs": ["mine"]}, inside)
    player.invoke(None, updated)
    first = seen(player)
    player.invoke(None, inside)
    player.invoke(None)
    return first, seen(player), namespaces(saver)


def updating(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """A stop before a node, an update of the state, a fork by an update, and the rest of the run."""
    player = Player(
        chain("a", "b", "c").compile(checkpointer=saver, interrupt_before=["b"]), durability, is_async=is_async
    )
    player.invoke({"xs": ["in"]})
    stopped = player.state().config
    player.update({"xs": ["mine"]})
    player.invoke(None)
    forked = player.update({"xs": ["fork"]}, stopped)
    player.invoke(None, forked)
    return seen(player)


def working(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """The functional API, with tasks and what the call before returned."""

    @task
    def double(number: int) -> int:
        return number * 2

    @entrypoint(checkpointer=saver)
    def work(numbers: list[int], *, previous: Any = None) -> Any:
        doubled = [each.result() for each in [double(number) for number in numbers]]
        return [*(previous or []), *doubled]

    @task
    async def adouble(number: int) -> int:
        return number * 2

    @entrypoint(checkpointer=saver)
    async def awork(numbers: list[int], *, previous: Any = None) -> Any:
        return [*(previous or []), *await asyncio.gather(*[adouble(number) for number in numbers])]

    player = Player(awork if is_async else work, durability, is_async=is_async)
    return [player.invoke([1, 2, 3]), player.invoke([4]), len(seen(player)) > 0]


def retrying(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """A node that fails twice and is retried, beside one that succeeds. Then one that fails, and is run again."""
    failures = iter([ConnectionError("1"), ConnectionError("2"), None, ConnectionError("3"), None])

    def flaky(_state: State) -> Any:
        failure: ConnectionError | None = next(failures)
        if failure is not None:
            raise failure
        return {"xs": ["flaky"]}

    builder = chain("a")
    policy = RetryPolicy(max_attempts=3, initial_interval=0.001, jitter=False)
    builder.add_node("flaky", flaky, retry_policy=policy)
    builder.add_node("sound", adder("sound"))
    builder.add_node("broken", flaky)
    builder.add_edge("a", "flaky")
    builder.add_edge("a", "sound")
    builder.add_edge("flaky", "broken")
    player = Player(builder.compile(checkpointer=saver), durability, is_async=is_async)
    try:
        player.invoke({"xs": ["in"]})
    except ConnectionError as error:
        told = str(error)
    before = seen(player)
    player.invoke(None)
    return told, before, seen(player)


def growing(saver: Saver, durability: Durability, is_async: bool) -> Any:
    """A channel that is rebuilt from its writes, with a snapshot now and then."""
    player = Player(growing_graph().compile(checkpointer=saver), durability, is_async=is_async)
    for number in range(5):
        player.invoke({"xs": [f"in{number}"]})
    return player.state().values, seen(player)


def growing_graph() -> Any:
    """Return a graph with a delta channel: a list to which two nodes add."""
    builder = StateGraph(Growing)
    builder.add_node("a", lambda state: {"xs": [f"a{len(state['xs'])}"], "last": "a"})
    builder.add_node("b", lambda state: {"xs": [f"b{len(state['xs'])}"], "last": "b"})
    builder.add_edge(START, "a")
    builder.add_edge("a", "b")
    return builder


SCENARIOS: list[Scenario] = [
    talking,
    parallel,
    nested,
    nested_with_a_number,
    asking,
    travelling,
    travelling_inside,
    updating,
    working,
    retrying,
    growing,
]
