"""The runs of graphs, and which of them may write to a thread.

- The first write of a run is accepted if nothing was written to the thread since the run began to read it.
- It puts the run's token into the session. Each later write is accepted as long as that token stands there.
- Other writes (`update_state` outside of a run, `delete_for_runs`) are accepted, and put another token there.
- A write that is not accepted raises `SupersededRun`, and changes nothing. A deleted thread stays deleted.

So a run that was stopped, and that another process has taken over, ends with an error when it comes back. Subgraphs
belong to the run of their graph. A graph that a node invokes with a `thread_id` of its own is a run of its own.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from langchain_core.runnables import RunnableConfig

from persist.adapters.langgraph.items import RUN
from persist.errors import PersistError
from persist.transaction import Transaction

#: A directory, and the id of a thread in it.
Thread = tuple[str, str]

# LangGraph puts the first key into each config of a run, and the second one into each config of a task. It shows no
# user the keys with this prefix, so our own key has it, too.
_RUNTIME, _TASK, _OUR_RUN = "__pregel_runtime", "__pregel_task_id", "__pregel_persist_run"


class SupersededRun(PersistError):
    """Another run, or an update, has written to the thread since this run read it. Its write was not made.

    Start a new run, which reads the thread again.
    """

    template = "This run of thread {session_id!r} is superseded: {reason}. Nothing was written."
    remedy = "Start a new run. It reads the thread again: graph.invoke(None, config) goes on where the thread stands."


class Run:
    """A run of a graph on one thread: the version that it began with, and the token of its writes.

    The run's first read puts it into the config. LangGraph passes the config on to each write, and that keeps the run
    alive.
    """

    __slots__ = ("__weakref__", "_control", "_has_written", "_token", "_version", "thread")

    def __init__(self, thread: Thread, control: object, version: str | None) -> None:
        self.thread = thread
        # It is held, so that its `id` in `_RUNS` is no other object's.
        self._control = control
        self._version = version
        self._token = secrets.token_hex(8)
        self._has_written = False

    def admit(self, tx: Transaction) -> None:
        """Sign a transaction with the run's token. Raise `SupersededRun` if others have written meanwhile."""
        if tx.fields.get(RUN) != self._token:
            # A missing thread has no version. So it may have been written by this run, and deleted since.
            if self._has_written or tx.version != self._version:
                reason = "the thread was deleted" if tx.version is None else "another run or an update has written"
                raise SupersededRun(session_id=self.thread[1], reason=reason)
            tx.fields[RUN] = self._token
        self._has_written = True


#: The runs of this process, by the `id` of their control and their thread. LangGraph makes a control for each run, and
#: hands it to the subgraphs. Two runs may have one control, if the caller gives it. Each call is one step of a dict, so
#: no lock is needed.
_RUNS: WeakValueDictionary[tuple[int, Thread], Run] = WeakValueDictionary()


def begin(config: RunnableConfig, thread: Thread, version: str | None) -> None:
    """Begin a run with its first read. Do nothing for a later read, and outside of runs.

    Args:
        version: the version that was read. None if there is no such thread.
    """
    keys = config["configurable"]
    if _RUNTIME in keys:
        control = getattr(keys[_RUNTIME], "control", None)
        run = _run_of(keys, thread) or Run(thread, control, version)
        keys[_OUR_RUN] = run
        if control is not None:
            _RUNS[id(control), thread] = run


def admission(config: RunnableConfig, thread: Thread) -> Callable[[Transaction], None]:
    """Return a function that signs a transaction of the config's run, or refuses it."""
    run = _run_of(config["configurable"], thread)
    if run is not None:
        return run.admit
    if _RUNTIME in config["configurable"]:
        warnings.warn(
            "This version of LangGraph passes no run on to PersistSaver, so superseded runs are not refused.",
            RuntimeWarning,
            stacklevel=2,
        )
    return sign_anew


def sign_anew(tx: Transaction) -> None:
    """Sign a transaction that belongs to no run."""
    tx.fields[RUN] = secrets.token_hex(8)


def _run_of(keys: dict[str, Any], thread: Thread) -> Run | None:
    """Return the run that a config belongs to. None outside of a run, and before the first read of the run."""
    run: Run | None = keys.get(_OUR_RUN)
    if run is not None and run.thread == thread:
        return run
    # The configs of tasks come from the config of their graph. But that is not the config of the graph's reads if the
    # thread's id is no string, or if the graph begins at a checkpoint of a subgraph.
    control = getattr(keys.get(_RUNTIME), "control", None)
    return _RUNS.get((id(control), thread)) if _TASK in keys and control is not None else None
