"""The runs of graphs, and which of them may write to a thread.

- The first write of a run is accepted if nothing was written to the thread since the run began to read it.
- It puts the run's token into the session. Each later write is accepted as long as that token stands there.
- Other writes (`update_state` outside of a run, `delete_for_runs`) are accepted, and put another token there.
- When a run begins, the earlier runs of this process on the thread are over, because a run that was cancelled may still
  write in the background. A run of another process takes the thread over with its first write.
- A write that is not accepted raises `SupersededRun`, and changes nothing. A deleted thread stays deleted.

So a run that was stopped, and that another process has taken over, ends with an error when it comes back. Subgraphs
belong to the run of their graph. A graph that a node invokes with a `thread_id` of its own is a run of its own.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
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
    """Another run, or an update, has written to the thread since this run read it. This write was not made.

    Attributes:
        has_written: whether earlier writes of the run were made. They stay in the thread, its input among them. If it
            is False, the thread has nothing of this run, so it can be run again with the same input.
    """

    template = "This run of thread {session_id!r} is superseded: {reason}. This write was not made."
    defaults: ClassVar[Mapping[str, Any]] = {"has_written": False}
    has_written: bool


_UNTOUCHED = "The thread has nothing of this run. Run it again with the same input."
_TOUCHED = "Its input and its earlier steps stay in the thread. Look at graph.get_state(config) before you go on."
_DELETED = "To begin the thread anew, run the graph again with the same input."


class Run:
    """A run of a graph on one thread: the version that it began with, and the token of its writes.

    The run's first read puts it into the config. LangGraph passes the config on to each write, and that keeps the run
    alive.
    """

    __slots__ = ("__weakref__", "_control", "_has_written", "_token", "has_predecessor", "thread", "version")

    def __init__(self, thread: Thread, control: object) -> None:
        self.thread = thread
        #: Whether an earlier run of this process may be about to write.
        self.has_predecessor = thread in _LAST
        #: The version of the thread that the run began with. None if there was no such thread.
        self.version: str | None = None
        # It is held, so that its `id` in `_RUNS` is no other object's.
        self._control = control
        self._token = secrets.token_hex(8)
        self._has_written = False

    def admit(self, tx: Transaction) -> None:
        """Sign a transaction with the run's token. Raise `SupersededRun` if others have written meanwhile."""
        if _LAST.get(self.thread) is not self:
            raise self._superseded("a later run of this process has begun")
        if tx.fields.get(RUN) != self._token:
            # A missing thread has no version. So it may have been written by this run, and deleted since.
            if self._has_written or tx.version != self.version:
                if tx.version is None:
                    raise self._superseded("the thread was deleted", _DELETED)
                raise self._superseded("another run or an update has written")
            tx.fields[RUN] = self._token
        self._has_written = True

    def _superseded(self, reason: str, remedy: str | None = None) -> SupersededRun:
        remedy = remedy or (_TOUCHED if self._has_written else _UNTOUCHED)
        return SupersededRun(session_id=self.thread[1], reason=reason, remedy=remedy, has_written=self._has_written)


#: The runs of this process, by the `id` of their control and their thread. LangGraph makes a control for each run, and
#: hands it to the subgraphs. Two runs may have one control, if the caller gives it. Each call is one step of a dict, so
#: no lock is needed.
_RUNS: WeakValueDictionary[tuple[int, Thread], Run] = WeakValueDictionary()
#: The run of this process that began last on a thread.
_LAST: WeakValueDictionary[Thread, Run] = WeakValueDictionary()


def begin(config: RunnableConfig, thread: Thread) -> Run | None:
    """Begin a run just before its first read, and return it. Return None for a later read, and outside of runs."""
    keys = config["configurable"]
    if _RUNTIME not in keys:
        return None
    control = getattr(keys[_RUNTIME], "control", None)
    run = _run_of(keys, thread)
    is_new = run is None
    if run is None:
        run = _LAST[thread] = Run(thread, control)
    keys[_OUR_RUN] = run
    if control is not None:
        _RUNS[id(control), thread] = run
    return run if is_new else None


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
