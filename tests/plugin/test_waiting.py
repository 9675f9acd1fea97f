"""Two workers that meet: waits end with a name, cycles are refused, and a finish waits for the last use."""

from __future__ import annotations

import re
from collections.abc import Callable

from harness.projects import Project

Projects = Callable[..., Project]
BOTH = ("-n2", "--dist", "loadscope")


def test_waiting_too_long_names_who_and_how_long(project: Projects) -> None:
    """A time-out names the process that produces, or holds the lock, since when, and in which test."""
    first = """
        from journal_of import note, when
        def make():
            note("making")
            when("done waiting")
            return 1
        def test_slow(persist_once, persist_lock):
            with persist_lock("printer"):
                assert persist_once("slow", make) == 1
    """
    second = """
        import re
        import pytest, persist
        from journal_of import note, when
        import test_a

        def test_waits(persist_once, persist_lock):
            when("making")
            with pytest.raises(persist.SharedTimeout) as caught:
                persist_once("slow", test_a.make, timeout_s=0.2)
            said = r"Waited 0\\.\\d s for 'slow': gw\\d \\(pid \\d+\\) has been producing it for \\d+\\.\\d s\\."
            assert re.match(said, str(caught.value))
            with pytest.raises(persist.SharedTimeout) as caught:
                with persist_lock("printer", timeout_s=0.2):
                    pass
            said = r"for 'printer': gw\\d \\(pid \\d+\\) has held that lock for \\d+\\.\\d s, in test_a.py::test_slow"
            assert re.search(said, str(caught.value))
            note("done waiting")
            assert persist_once("slow", test_a.make) == 1
    """
    done = project(test_a=first, test_b=second).run(*BOTH)
    assert done.counts(passed=2), done.printed


def test_keys_that_wait_for_each_other_are_refused(project: Projects) -> None:
    """Two factories in two workers that ask for each other's value fail at once, without waiting for the time-out.

    Fails without the edges that `Once._await` writes.
    """
    test = """
        import pytest, persist
        from journal_of import note, when

        def test(persist_once):
            def make_a():
                note("in a"); when("in b")
                return persist_once("b", make_b)
            def make_b():
                note("in b"); when("in a")
                return persist_once("a", make_a)
            with pytest.raises(persist.FactoryFailed, match="Each of these waits for the next") as caught:
                persist_once("%s", make_%s)
            assert "'a' -> 'b' -> 'a'" in str(caught.value) or "'b' -> 'a' -> 'b'" in str(caught.value)
            note("refused")
    """
    makers = test.replace("def test(persist_once):", "def both(persist_once, first):")
    makers = makers.replace('persist_once("%s", make_%s)', 'persist_once(first, {"a": make_a, "b": make_b}[first])')
    caller = "from both import both\ndef test(persist_once):\n    both(persist_once, '{}')\n"
    done = project(both=makers, test_a=caller.format("a"), test_b=caller.format("b")).run(*BOTH)
    assert done.counts(passed=2), done.printed
    assert done.times("refused") == 2


def test_finish_waits_for_a_worker_that_has_not_used_it_yet(project: Projects) -> None:
    """The code after a ``yield`` waits for workers that come to the fixture later, and for those that never do.

    The late one comes when its producer is tearing down already. Its pause only gives a finish that does not wait the
    time to be wrong. Fails without the wait in `Uses._end`.
    """
    conftest = """
        import pytest
        from journal_of import note, worker
        from persist.pytest_plugin import shared_fixture

        @shared_fixture(end_timeout_s=30)
        def server():
            note("start server")
            yield 1
            note("stop server")

        @pytest.fixture(scope="session")
        def client(server):
            yield
            note("close client", worker())
    """
    first = """
        def test(client): pass
    """
    late = """
        import time
        from journal_of import note, when
        def test_before(): pass
        def test(request):
            when("close client")
            time.sleep(0.3)
            request.getfixturevalue("client")
            note("late use")
    """
    never = """
        from journal_of import note, when
        def test(): pass
    """
    done = project(conftest=conftest, test_a=first, test_b=late, test_c=never).run("-n3", "--dist", "loadscope")
    assert done.counts(passed=4), done.printed
    assert [line.split(" gw")[0] for line in done.journal] == [
        "start server",
        "close client",
        "late use",
        "close client",
        "stop server",
    ]


def test_finish_that_waits_too_long_names_the_others(project: Projects) -> None:
    """When `end_timeout_s` is over, the fixture is finished although others still use it, and the error names them."""
    conftest = """
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        @shared_fixture(end_timeout_s=3)
        def server():
            yield 1
            note("stop server")
    """
    first = """
        def test(server): pass
    """
    second = """
        from journal_of import note, when
        def test_before(): pass
        def test():
            when("stop server")
    """
    done = project(conftest=conftest, test_a=first, test_b=second).run(*BOTH)
    assert done.counts(passed=3, errors=1), done.printed
    assert "SharedTimeout: Waited 3." in done.printed
    assert re.search(r" gw[01] had not ended, and it was finished under them\.", done.printed)


def test_each_parameter_is_made_and_finished_once(project: Projects) -> None:
    """A parameter whose turn ends in one worker, while another worker still uses it, is finished once, at the end.

    Fails if `Uses.release` finishes it in the middle of the run.
    """
    conftest = """
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        @shared_fixture(params=["small", {"size": 2}], ids=["small", "large"])
        def server(request):
            note("start", request.param)
            yield request.param
            note("stop", request.param)
    """
    test = """
        from journal_of import note
        def test_one(server):
            note("use", server)
        def test_two(server):
            note("use", server)
    """
    done = project(conftest=conftest, test_a=test, test_b=test).run(*BOTH)
    assert done.counts(passed=8), done.printed
    for once in ("start small", "stop small", "start {'size': 2}", "stop {'size': 2}"):
        assert done.times(once) == 1, done.journal
    assert [line.split()[0] for line in done.journal][-3:] == ["use", "stop", "stop"]
