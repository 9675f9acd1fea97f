"""The identity of values: fixtures of one function, and of other parameters, never get each other's value."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress

import pytest
from harness.projects import Project

from persist.pytest_plugin import shared_fixture

Projects = Callable[..., Project]


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "two workers"])
def test_each_fixture_has_its_own_value(project: Projects, workers: list[str]) -> None:
    """Each fixture has its own value, if it depends on a parametrized one, or shares its function with another name.

    Fails (with the value of the other one) if the key is the function's name and its own parameter alone.
    """
    test = """
        import pytest
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        @pytest.fixture(scope="session", params=["pg", "my"])
        def backend(request): return request.param

        @pytest.fixture(scope="session")
        def between(backend): return backend

        @shared_fixture
        def database(between):
            note("make", between)
            return {"backend": between}

        @shared_fixture
        def server(between):
            yield between

        @pytest.mark.parametrize("n", range(2))
        def test_parameters(database, server, backend, n):
            assert (database["backend"], server) == (backend, backend)

        def made(name):
            @shared_fixture(name=name)
            def fixture(): return name
            return fixture

        one, two = made("one"), made("two")

        def test_names(one, two):
            assert (one, two) == ("one", "two")
    """
    done = project(test_all=test).run(*workers)

    assert done.counts(passed=5), done.printed
    assert sorted(done.journal) == ["make my", "make pg"]


@pytest.mark.parametrize("option", [["-p", "no:persist.pytest_plugin"], []], ids=["switched off", "never loaded"])
def test_plugin_that_is_not_loaded_is_named(project: Projects, option: list[str]) -> None:
    """A shared fixture without the plugin is an error that says how to load it, and not one of a missing key."""
    test = """
        from persist.pytest_plugin import shared_fixture

        @shared_fixture
        def value(): return 1

        def test(value): pass
    """
    done = project(test_a=test).run(*option, plugin="no:persist.pytest_plugin")

    assert done.status != 0
    assert "not loaded. Load it with '-p persist.pytest_plugin'" in done.printed


def test_options_of_a_shared_fixture_are_checked() -> None:
    """An option of `pytest.fixture` that a shared fixture cannot take is refused in its own words.

    The scope may be given if it is the session's.
    """
    assert shared_fixture(scope="session")(lambda: 1) is not None
    for options, words in (
        ({"scope": "module"}, "lasts for the whole run"),
        ({"tear_down": print}, "no option 'tear_down'"),
    ):
        with pytest.raises(TypeError, match=words):
            shared_fixture(**options)
    with pytest.raises(TypeError, match=r"Leave out @pytest\.fixture"):
        shared_fixture(pytest.fixture(lambda: 1))


def test_exit_in_a_teardown_is_an_error(project: Projects) -> None:
    """`pytest.exit` in a teardown is an error of the run, and does not stop the other teardowns."""
    test = """
        import pytest
        from journal_of import note

        def leave(value): pytest.exit("enough")
        def drop(value): note("drop")

        def test(persist_once):
            persist_once("first", int, teardown=drop)
            persist_once("second", int, teardown=leave)
    """
    done = project(test_a=test).run()

    assert done.status == 1, done.printed
    assert "enough" in done.printed
    assert done.journal == ["drop"]


def test_second_interrupt_tears_nothing_down_under_a_living_worker(project: Projects) -> None:
    """After Ctrl-C twice the teardowns run only when the workers' processes are gone.

    The second one cuts xdist's own end short. Fails if the controller does not look whether they are gone.
    """
    test = """
        import os, signal
        from journal_of import note, when

        def drop(value):
            # A process that is gone, and not waited for, would still be there.
            note("drop", *[pid for pid in value if os.path.exists(f"/proc/{pid}")])

        def pids():
            when("pid", 2)
            from journal_of import noted
            return [int(line.split()[1]) for line in noted() if line.startswith("pid")]

        def test(persist_once):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            note("pid", os.getpid())
            persist_once("used", pids, teardown=drop)
            note("uses")
            when("never")
    """
    made = project(test_a=test, test_b="from test_a import drop, pids, test")
    with made.start("-n2", "--dist", "loadfile") as process:
        made._await("uses")
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=1.0)
        printed, _ = process.communicate(timeout=60.0)

    assert made.noted()[-1] == "drop", printed
