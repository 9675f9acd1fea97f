"""Once: a value that one process of the run produces, and every process gets.

    persist_once("database", make_database, teardown=drop_database)

The first process claims the key's session and runs the factory. The others poll until the session holds a record. If
the first process dies, its claim becomes free, and the next process takes over.

Each process looks for the record before the claim and after it. The first look avoids a needless claim. The second
look decides, because another process may have finished in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from persist import json_codec
from persist.errors import InvalidArgument, LockError, SessionBusy
from persist.pytest_plugin import outcome
from persist.pytest_plugin.errors import SharedTimeout
from persist.pytest_plugin.outcome import ENDED, VALUE, Record
from persist.pytest_plugin.run import Run, Wait, describe
from persist.streams import Stream

Function = Callable[..., Any]
KIND = "once"
_WAITS_FOR = "waits_for"
_NOWHERE = ModuleType("nowhere")


def origin_of(function: Function) -> str:
    """Return a function's origin, the same text in every process: "make_database (tests/conftest.py:12)"."""
    plain = getattr(function, "func", function)
    code = getattr(getattr(plain, "__func__", plain), "__code__", None)
    name = getattr(plain, "__qualname__", type(plain).__qualname__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else f"{name} of {plain.__module__}"


def address_of(teardown: Function | None) -> Record | None:
    """Return the address where another process finds a teardown, which must be an importable function.

    Raises:
        InvalidArgument: it is a lambda, a local function, a method or a partial, which only this process has.
    """
    if teardown is None:
        return None
    module, qualname = getattr(teardown, "__module__", None) or "", getattr(teardown, "__qualname__", "")
    # Its own globals are searched, too, because of several conftest files of one name only one is in sys.modules.
    for namespace in (vars(sys.modules.get(module, _NOWHERE)), getattr(teardown, "__globals__", {})):
        if module != "__main__" and _found_in(namespace, qualname) is teardown:
            return {"module": module, "qualname": qualname, "file": namespace.get("__file__")}
    expected = "a function at the top of a module: another process imports it, at the end of the run"
    raise InvalidArgument(what="teardown", expected=expected, got=repr(teardown))


def _found_in(namespace: Mapping[str, Any], qualname: str) -> Any:
    first, *others = qualname.split(".")
    found = namespace.get(first)
    for name in others:
        found = getattr(found, name, None)
    return found


class Once:
    """One key of a run.

    Args:
        origin: where the factory comes from. Another origin under the same key raises `InvalidArgument`.
        style: "value", or "yield" if the producer has something to finish at the end.
    """

    def __init__(
        self, run: Run, key: str, origin: str, *, teardown: Function | None = None, style: str = "value"
    ) -> None:
        self.run = run
        self.key = key
        self._teardown = teardown
        facts = {"factory": origin, "teardown": address_of(teardown), "style": style}
        self.session_id = run.session(KIND, key, **facts)

    def value(self, factory: Callable[[], Any], timeout_s: float) -> Any:
        """Return a fresh copy of the value. Produce the value if no process has."""
        __tracebackhide__ = True
        wait, cause = Wait(timeout_s), None
        while (record := self.record()) is None:
            stream = self.run.try_stream(self.session_id)
            if isinstance(stream, SessionBusy):
                self._await(stream, wait)
                continue
            with stream:
                if self.record() is None:
                    cause = self._produce(stream, factory)
        return outcome.result(record, self.key, cause)

    def record(self) -> Record | None:
        """Return the outcome of the factory's run.

        Return None if it has not run, or if its value was finished since.
        """
        records = self.run.store.load(self.session_id).data.get("messages", [])
        return None if not records or records[-1]["kind"] == ENDED else dict(records[-1])

    def _produce(self, stream: Stream, factory: Callable[[], Any]) -> BaseException | None:
        producing = self.run.held.streams
        producing[self.session_id] = stream.id
        try:
            value = factory()
            self._require_json(value)
        except outcome.NO_OUTCOME:
            raise
        except BaseException as error:
            stream.finish(outcome.of_error(error, self.run.worker))
            return error
        finally:
            del producing[self.session_id]
        # The numbers tell in which order the values were made. This number is drawn late, because the values that this
        # factory asked for come before its own.
        number = self.run.count("made")
        stream.finish({"kind": VALUE, "worker": self.run.worker, "number": number, "value": value})
        return None

    def _require_json(self, value: Any) -> None:
        """Refuse a value that no other process can get, and tear it down, because no other process will."""
        try:
            json_codec.check(value)
        except BaseException as error:
            if self._teardown is not None:
                try:
                    self._teardown(value)
                except Exception as failed:
                    error.add_note(f"Its teardown failed, too: {failed!r}")
            raise

    def end(self, error: BaseException | None = None) -> None:
        """Record that the value is finished. A process that comes later makes it anew."""
        mark_ended(self.run, self.session_id, error)

    # --- waiting ---

    def _await(self, busy: SessionBusy, wait: Wait) -> None:
        __tracebackhide__ = True
        producing = self.run.held.streams
        if producing:
            # The processes that wait for this one read the edge. It is written before the look, so that of two
            # processes that wait for each other one sees the other's edge.
            mine, stream_id = next(reversed(producing.items()))
            edge = f"{stream_id} {self.session_id}"
            self.run.store.update(mine, lambda tx: tx.fields.update({_WAITS_FOR: edge}))
            self._refuse_cycle(list(producing))

        def timed_out() -> SharedTimeout:
            producer, since_s = describe(busy)
            reason = f"{producer} has been producing it for {since_s:.1f} s"
            remedy = "Raise timeout_s, or see what its factory waits for."
            facts = {"holder": producer, "since_s": since_s, "waited_s": wait.waited_s, "remedy": remedy}
            return SharedTimeout(key=self.key, reason=reason, **facts)

        wait.pause(timed_out)

    def _refuse_cycle(self, producing: list[str]) -> None:
        chain = producing[-1:]
        while (following := self._waits_for(chain[-1])) is not None:
            if following in producing:
                cycle = [*producing[producing.index(following) :], *chain[1:], following]
                names = " -> ".join(repr(self.run.store.head(each).fields["name"]) for each in cycle)
                reason = f"Each of these waits for the next, so that none would ever be produced: {names}."
                remedy = "Let one do without the other."
                raise LockError(kind="nested", held=names, reason=reason, remedy=remedy)
            if following in chain:
                return  # a cycle of others, who report it
            chain.append(following)

    def _waits_for(self, session_id: str) -> str | None:
        head = self.run.store.head(session_id)
        stream_id, _, following = head.fields.get(_WAITS_FOR, "").partition(" ")
        return following if stream_id and stream_id == head.active_stream_id else None


def mark_ended(run: Run, session_id: str, error: BaseException | None = None) -> None:
    """Record that the value of a key is finished, and the error of its end if there was one."""
    said = None if error is None else outcome.text_of(error)
    number = len(run.store.load(session_id).data["messages"])
    run.store.append(session_id, "messages", {"id": f"ended-{number}", "kind": ENDED, "error": said})
