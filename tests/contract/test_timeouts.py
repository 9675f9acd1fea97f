"""Every verb that waits for a lock takes a timeout of its own, and refuses one that is no number of seconds."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from actors import eventually
from conftest import ActorFactory
from harness.contents import everything_in, reopened

import persist
from persist.storage import lock

KINDS = ("auto", "postgres")
WAITING: dict[str, Callable[[persist.Store, persist.Session, persist.Stream], object]] = {
    "create": lambda store, session, stream: store.create("s", timeout_s=0),
    "duplicate": lambda store, session, stream: store.duplicate("other", "s", timeout_s=0),
    "delete": lambda store, session, stream: store.delete("s", timeout_s=0),
    "transaction": lambda store, session, stream: store.transaction("s", timeout_s=0).__enter__(),
    "update": lambda store, session, stream: store.update("s", lambda tx: None, timeout_s=0),
    "append": lambda store, session, stream: store.append("s", "log", 1, timeout_s=0),
    "extend": lambda store, session, stream: store.extend("s", "log", [1], timeout_s=0),
    "replace": lambda store, session, stream: store.replace("s", {}, timeout_s=0),
    "repair": lambda store, session, stream: store.repair("s", timeout_s=0),
    "start_stream": lambda store, session, stream: store.start_stream("s", timeout_s=0),
    "cancel": lambda store, session, stream: store.cancel("s", "t", timeout_s=0),
    "stream": lambda store, session, stream: store.stream("s", timeout_s=0),
    "compact": lambda store, session, stream: store.compact("s", timeout_s=0),
    "accept": lambda store, session, stream: store.accept("s", timeout_s=0),
    "save": lambda store, session, stream: session.save(timeout_s=0),
    "clear_stale_stream": lambda store, session, stream: session.clear_stale_stream(timeout_s=0),
    "checkpoint": lambda store, session, stream: stream.checkpoint({"content": "x"}, timeout_s=0),
    "stream.append": lambda store, session, stream: stream.append({"content": "x"}, timeout_s=0),
    "stream.transaction": lambda store, session, stream: stream.transaction(timeout_s=0).__enter__(),
    "stream.update": lambda store, session, stream: stream.update(lambda tx: None, timeout_s=0),
    "emit": lambda store, session, stream: stream.emit(1, timeout_s=0),
    "finish": lambda store, session, stream: stream.finish(timeout_s=0),
    "fail": lambda store, session, stream: stream.fail(timeout_s=0),
}


def test_every_verb_that_waits_takes_a_timeout(store: persist.Store, kind: str) -> None:
    """A timeout of 0 is now or never, whatever the store's own timeout is.
    After the error each verb can be repeated.
    """
    store = reopened(store, timeout_s=1000.0)
    store.create("s", {"messages": []})
    store.create("other")
    with store.start_stream("s") as stream:
        session = store.load("s")
        before = everything_in(store)
        caught: dict[str, list[persist.LockTimeout]] = {}

        def wait() -> None:
            for name, verb in WAITING.items():
                if name == "emit" and kind == "postgres":
                    # It needs no lock there.
                    caught["emit"] = []
                    continue
                with pytest.raises(persist.LockTimeout) as error:
                    verb(store, session, stream)
                caught.setdefault(name, []).append(error.value)
            assert store.streams(timeout_s=0) == [], "the stream of a locked session is left out"
            assert type(store.clear_stale_streams(timeout_s=0).failures["s"]) is persist.LockTimeout
            if kind != "postgres":
                copied = store.backup(store.path.parent / "copy", timeout_s=0)
                assert type(copied.failures["s"]) is persist.LockTimeout
            caught["sweep"] = []

        with store.transaction("s"):
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(60)
        assert caught.keys() == {*WAITING, "sweep"}
        assert {error.timeout_s for errors in caught.values() for error in errors} == {0.0}
        assert everything_in(store) == before
        stream.checkpoint({"content": "x"}, timeout_s=0)
        stream.finish(timeout_s=0)
    session.data["n"] = 1
    session.save(timeout_s=0)


def test_the_list_of_waiting_verbs_is_complete() -> None:
    """Each verb that takes a timeout is in the list, so the tests see that it heeds it."""
    takes_timeout = {
        f"{prefix}{name}"
        for prefix, kind in (("", persist.Store), ("", persist.Session), ("stream.", persist.Stream))
        for name, verb in vars(kind).items()
        if not name.startswith("_") and callable(verb) and "timeout_s" in inspect.signature(verb).parameters
    }
    mine = {name.removeprefix("stream.") for name in WAITING} | {"streams", "clear_stale_streams", "backup"}
    assert {name.removeprefix("stream.") for name in takes_timeout} == mine
    assert len(takes_timeout) == len(WAITING) + 3


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, "5", True, [1]], ids=repr)
@pytest.mark.parametrize("name", WAITING)
def test_a_timeout_is_a_number_of_seconds(wrong: Any, name: str, store: persist.Store) -> None:
    """A wrong timeout is an `InvalidArgument`.
    A NaN would wait for ever, and a text would be a bare `TypeError` of the clock.
    """
    store.create("s", {"messages": []})
    store.create("other")
    with store.start_stream("s") as stream:
        session = store.load("s")
        before = everything_in(store)
        verb = WAITING[name]
        with pytest.raises(persist.InvalidArgument, match=r"timeout_s is .* a number of seconds from 0 up"):
            verb(*(_Waiting(each, wrong) for each in (store, session, stream)))  # type: ignore[arg-type]
        assert everything_in(store) == before


class _Waiting:
    """Proxy that calls the methods of an object with another `timeout_s`."""

    def __init__(self, target: object, timeout_s: Any) -> None:
        self._target, self._timeout_s = target, timeout_s

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: getattr(self._target, name)(
            *arguments, **options | {"timeout_s": self._timeout_s}
        )


def test_timeout_names_the_process_that_all_threads_wait_for(
    store: persist.Store, actor: ActorFactory, kind: str
) -> None:
    """A thread behind one that itself waits for another process names that process, and not the thread before it.

    Without `has_lock` in `Hold.describe_holder`, the thread is named: "this process (pid 7), thread 'first'".
    """
    store.create("s", {"messages": []})
    holder = actor()
    holder.do("block = store.transaction('s'); block.__enter__(); None")
    named = r"persist .* \(server process [0-9]+\), since" if kind == "postgres" else f"pid {holder.pid} "
    with ThreadPoolExecutor(1, thread_name_prefix="first") as threads:
        first = threads.submit(store.append, "s", "messages", {"id": "m1"})
        eventually(lambda: bool(lock._queues))
        with pytest.raises(persist.LockTimeout, match=named):
            store.append("s", "messages", {"id": "m2"}, timeout_s=0)
        holder.do("block.__exit__(None, None, None)")
        first.result()
    assert store.tail("s") == [{"id": "m1"}]
