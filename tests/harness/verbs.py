"""Every verb on the session "s", each as one call, for tests that put something hostile in its way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import persist
from harness.sweeps import sweep

DEADLINE_S = 20.0
#: A verb is given the store, and a `Session` that was loaded while all was well.
Verb = Callable[[persist.Store, persist.Session], object]


def _edit(store: persist.Store, _session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.data["more"] = 1


def _transaction(store: persist.Store, _session: persist.Session) -> None:
    with store.transaction("s", create=True) as tx:
        tx.fields["more"] = 1
        tx.list("messages").extend([{"id": "m9"}, {"id": "m10"}])


def _transaction_that_deletes(store: persist.Store, _session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.delete()


def _save(_store: persist.Store, session: persist.Session) -> None:
    session.data["more"] = 1
    session.save()


def _turn(store: persist.Store, _session: persist.Session) -> None:
    with store.start_stream("s", {"role": "user", "content": "So?"}, stream_id="t2") as stream:
        stream.checkpoint({"role": "assistant", "content": "S"})
        with stream.transaction() as tx:
            tx.list("messages").append({"id": "m9"})
        stream.finish(fields={"tokens": 5})


def _once(store: persist.Store, _session: persist.Session) -> None:
    prompt = {"id": "p9", "role": "user", "content": "So?"}
    with store.start_stream("s", prompt, stream_id="t2", once=True, create=True, fields={"model": "m"}) as stream:
        with suppress(persist.AlreadyStarted):
            store.start_stream("s", prompt, stream_id="t3", once=True)
        stream.finish()


VERBS: dict[str, Verb] = {
    "load": lambda store, _: store.load("s").data,
    "head": lambda store, _: dict(store.head("s").fields),
    "heads": lambda store, _: [(dict(head.fields), head.counts) for head in store.heads()],
    "tail": lambda store, _: store.tail("s"),
    "stream": lambda store, _: store.stream("s"),
    "streams": lambda store, _: store.streams(),
    "check": lambda store, _: store.check(),
    "refresh": lambda _, session: session.refresh(),
    "save": _save,
    "edit": _edit,
    "transaction": _transaction,
    "transaction that deletes": _transaction_that_deletes,
    "extend": lambda store, _: store.extend("s", "messages", [{"id": "m9"}, {"id": "m10"}], create=True),
    "append": lambda store, _: store.append("s", "messages", {"id": "m9"}),
    "duplicate": lambda store, _: store.duplicate("s", "copy").data,
    "a turn": _turn,
    "a turn once": _once,
    "cancel": lambda store, _: store.cancel("s", "t1"),
    "clear": lambda _, session: session.clear_stale_stream(),
    "sweep": lambda store, _: sweep(store, every_session=True),
    "accept": lambda store, _: store.accept("s").data,
    "replace": lambda store, session: store.replace("s", {"messages": []}, if_version=session.version),
    "delete": lambda store, _: store.delete("s"),
    "delete of a version": lambda store, session: store.delete("s", if_version=session.version),
    "delete by force": lambda store, _: store.delete("s", force=True),
    "create": lambda store, _: store.create("s"),
}


def within_deadline(step: Callable[[], object]) -> object:
    """Run a step in a thread of its own, and return or raise what it does.

    A step that hangs must fail the test, not stop it.
    """
    outcome: list[tuple[object, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((step(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert outcome, f"no answer within {DEADLINE_S} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
