"""Mistakes of a user, each with an answer that names it, and the behaviour of one process alone."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.projects import Project

import persist
from persist.errors import SessionBusy
from persist.pytest_plugin import ending, locks, shared_fixture
from persist.pytest_plugin.once import Once
from persist.pytest_plugin.run import Run
from persist.store import Store
from persist.streams import Stream

Projects = Callable[..., Project]


def test_mistakes_are_told(project: Projects) -> None:
    """Every mistake of this project, in one process, fails at once with its own words."""
    test = """
        import functools
        import pytest, persist
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        def one(): return 1
        def drop(value): pass
        class Box:
            def drop(self, value): pass

        def test_one_key_two_factories(persist_once):
            assert persist_once("key", one, teardown=drop) == 1
            with pytest.raises(persist.InvalidArgument, match=r"stands for factory one \\(.*:\\d+\\).*as factory"):
                persist_once("key", lambda: 1, teardown=drop)
            with pytest.raises(persist.InvalidArgument, match="for teardown .*test_a:drop in .* as teardown None"):
                persist_once("key", one)

        @pytest.mark.parametrize("teardown", [lambda value: None, Box().drop, functools.partial(drop)])
        def test_teardown_that_nobody_can_import(persist_once, teardown):
            with pytest.raises(persist.InvalidArgument, match="at the top of a module"):
                persist_once("other", one, teardown=teardown)

        def test_own_value(persist_once):
            def make(): return persist_once("self", make)
            with pytest.raises(persist.FactoryFailed, match="'self' -> 'self'"):
                persist_once("self", make)

        def test_nested(persist_once):
            assert persist_once("outer", lambda: [persist_once("inner", one)]) == [1]

        def test_nested_lock(persist_lock):
            with persist_lock("a"), persist_lock("b"):
                with pytest.raises(persist.LockError), persist_lock("a"):
                    pass
            with pytest.raises(ZeroDivisionError), persist_lock("a"):
                1 / 0
            with persist_lock("a", timeout_s=0):
                pass

        def test_two_starts(persist_counter):
            assert [persist_counter("n", start=5), persist_counter("n", start=5)] == [5, 6]
            with pytest.raises(persist.InvalidArgument, match="start 5"):
                persist_counter("n")

        @shared_fixture(params=[{1, 2}])
        def bad_parameter(): return 1
        def test_parameter(bad_parameter): pass

        @shared_fixture
        def twice():
            yield 1
            yield 2
        def test_yields_twice(twice): pass

        @shared_fixture
        def failing_end():
            yield 1
            raise OSError("cannot stop")
        def test_end(failing_end): pass
    """
    done = project(test_a=test).run()
    assert done.counts(passed=10, errors=2), done.printed
    assert "must be a JSON value, to be told in every worker" in done.printed
    assert "The fixture yielded twice" in done.printed
    assert "OSError: cannot stop" in done.printed


def test_controller_without_the_plugin_is_told(project: Projects) -> None:
    """A worker whose controller does not know the plugin says so, instead of sharing with nobody."""
    made = project(test_a="def test(persist_store): pass")
    made.write(
        "late", "import os\nif 'PYTEST_XDIST_WORKER' in os.environ:\n    pytest_plugins = ['persist.pytest_plugin']\n"
    )
    done = made.run("-n1", plugin="late")
    assert done.counts(errors=1), done.printed
    assert "NotShared: This worker shares no directory" in done.printed


def test_asynchronous_and_doubly_ended_fixtures_are_refused() -> None:
    """A fixture that cannot work is refused where it is written."""

    async def later() -> int:
        return 1

    def started() -> Any:
        yield 1

    with pytest.raises(TypeError, match=r"later is asynchronous"):
        shared_fixture(later)
    with pytest.raises(TypeError, match="not a plain function"):
        shared_fixture(classmethod(lambda cls: 1))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"started has a yield"):
        shared_fixture(teardown=print)(started)


class LateRun(Run):
    """A run for which another process produces the value in the instant before its own claim."""

    other: Callable[[], Any] | None = None

    def try_stream(self, session_id: str) -> Stream | SessionBusy:
        if self.other is not None:
            other, self.other = self.other, None
            other()
        return super().try_stream(session_id)


def test_value_made_just_before_the_claim_is_taken(scratch: Path) -> None:
    """A second look follows the claim, because another process may finish between the first look and the claim.

    Fails without that look in `Once.value`.
    """
    first, second = Run(Store(scratch / "run"), "gw0"), LateRun(Store(scratch / "run"), "gw1")
    second.other = lambda: Once(first, "key", "here").value(lambda: "first", 5.0)
    assert Once(second, "key", "here").value(lambda: "second", 5.0) == "first"


class WatchedRun(Run):
    """A run that counts how often it has asked for a claim."""

    asked = 0

    def try_stream(self, session_id: str) -> Stream | SessionBusy:
        answer = super().try_stream(session_id)
        self.asked += 1
        return answer

    def await_asking(self, times: int, unless: list[str]) -> None:
        """Wait until the run has asked so often, unless something has happened."""
        deadline = time.monotonic() + 20.0
        while self.asked < times and not unless:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_whoever_asks_meanwhile_waits(scratch: Path) -> None:
    """A process that asks while another one produces gets no claim, and then the value of the first.

    The first factory ends when the other process has asked twice. Fails if `Run.try_stream` takes a claim from its
    holder.
    """
    first, second = Run(Store(scratch / "run"), "gw0"), WatchedRun(Store(scratch / "run"), "gw1")
    made: list[str] = []
    got: list[str] = []

    def make(who: str) -> str:
        made.append(who)
        return who

    def ask() -> None:
        got.append(Once(second, "key", "here").value(lambda: make("second"), 20.0))

    other = threading.Thread(target=ask)

    def slow() -> str:
        other.start()
        second.await_asking(2, unless=made)
        return make("first")

    assert Once(first, "key", "here").value(slow, 20.0) == "first"
    other.join(20.0)
    assert (made, got) == (["first"], ["first"])


def test_named_lock_keeps_others_out(scratch: Path) -> None:
    """A process that asks for a named lock stays outside while another one holds it.

    Fails if `Run.try_stream` takes the lock from its holder.
    """
    first, second = Run(Store(scratch / "run"), "gw0"), WatchedRun(Store(scratch / "run"), "gw1")
    entered: list[str] = []

    def ask() -> None:
        with locks.hold(second, "printer", 20.0):
            entered.append("second")

    other = threading.Thread(target=ask)
    with locks.hold(first, "printer", 20.0):
        other.start()
        second.await_asking(3, unless=entered)
        assert entered == []
    other.join(20.0)
    assert entered == ["second"]


def test_numbers_are_drawn_once(scratch: Path) -> None:
    """Four threads that count at once draw 120 different numbers. Fails if a count reads and writes in two steps."""
    barrier, drawn = threading.Barrier(4, timeout=20.0), list[int]()

    def draw(worker: str) -> None:
        run = Run(Store(scratch / "run"), worker)
        barrier.wait()
        drawn.extend(run.count("number") for _ in range(30))

    threads = [threading.Thread(target=draw, args=(f"gw{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert sorted(drawn) == list(range(120))


_torn_down: list[str] = []


def tear_down(value: str) -> None:
    """Note the value, and raise an interrupt at the first of the two."""
    _torn_down.append(value)
    if _torn_down == ["second"]:
        raise KeyboardInterrupt


def test_interrupted_end_goes_on_and_repeats_nothing(scratch: Path) -> None:
    """After a second Ctrl-C, in a teardown, the next call, at the end of the process, does the rest.

    Fails without `mark_ended`.
    """
    _torn_down.clear()
    run = Run(Store(scratch / "run"), "main")
    for value in ("first", "second"):
        Once(run, value, "here", teardown=tear_down).value(functools.partial(str, value), 5.0)
    with pytest.raises(KeyboardInterrupt):
        ending.end(run)
    assert ending.end(run) == []
    assert ending.end(run) == []
    assert _torn_down == ["second", "first"]


def test_finished_value_is_made_anew(scratch: Path) -> None:
    """A worker that comes after the end, for example in place of one that crashed, does not get a finished value."""
    run = Run(Store(scratch / "run"), "gw0")
    once = Once(run, "key", "here", style="yield")
    assert once.value(lambda: "first", 5.0) == "first"
    once.end()
    assert once.value(lambda: "second", 5.0) == "second"


def test_interrupted_factory_may_run_again(scratch: Path) -> None:
    """Ctrl-C in a factory is not recorded, because it says nothing about the value, and the claim is free."""
    run = Run(Store(scratch / "run"), "gw0")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Once(run, "key", "here").value(interrupted, 5.0)
    assert Once(run, "key", "here").value(lambda: 2, 5.0) == 2


@pytest.mark.parametrize("name", [1, None, ["a"]])
def test_names_are_strings(scratch: Path, name: Any) -> None:
    """The name of a key, a lock or a counter is a string."""
    with pytest.raises(persist.InvalidArgument, match="must be a string"):
        Run(Store(scratch / "run"), "gw0").session("once", name)


def test_errors_survive_pickling() -> None:
    """Each error keeps its facts on the way to another process."""
    import pickle

    error = persist.SharedTimeout(key="k", reason="r", holder="gw0", since_s=1.5, waited_s=2.5)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
