"""Failures in one worker: every worker hears of them, none repeats them, and the teardowns run all the same."""

from __future__ import annotations

from collections.abc import Callable

from harness.projects import Project

Projects = Callable[..., Project]
#: With two files and two workers, each worker runs one of them.
BOTH = ("-n2", "--dist", "loadscope")


def in_both(text: str) -> dict[str, str]:
    return {"test_a": text, "test_b": text}


def test_failing_factory_runs_once_and_is_told_everywhere(project: Projects) -> None:
    """A factory that fails runs once, and both workers get the same error, skip or failure.

    It may raise, skip, fail, or return a value that is not JSON. Fails if `Once._produce` does not record what was
    raised: then each worker runs the factory.
    """
    conftest = """
        import pytest
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        def look_up(name):
            raise LookupError(f"no host {name}")

        @shared_fixture
        def broken():
            note("make broken")
            look_up("alpha")

        @shared_fixture
        def absent():
            note("make absent")
            pytest.skip("no such service here")

        @shared_fixture
        def refused():
            note("make refused")
            pytest.fail("the service refuses", pytrace=False)

        @shared_fixture
        def expected():
            note("make expected")
            pytest.xfail("known to be broken")

        @shared_fixture
        def foreign():
            note("make foreign")
            return {"hosts": [{"seen": {1, 2}}]}

        @shared_fixture
        def never():
            note("make never")
            if False:
                yield 1
    """
    test = """
        def test_broken(broken): pass
        def test_broken_again(broken): pass
        def test_absent(absent): pass
        def test_refused(refused): pass
        def test_expected(expected): pass
        def test_foreign(foreign): pass
        def test_never(never): pass
    """
    done = project(conftest=conftest, **in_both(test)).run(*BOTH)

    assert done.counts(errors=10, skipped=2, xfailed=2), done.printed
    for name in ("broken", "absent", "refused", "expected", "foreign", "never"):
        assert done.times(f"make {name}") == 1, name
    reports = done.printed.split("ERROR at setup of test_broken")[1:]
    assert len(reports) == 4
    for report in reports:
        assert "LookupError: no host alpha" in report
        assert 'look_up("alpha")' in report
        assert "FactoryFailed: The factory of" in report
        assert "conftest.py::broken' raised LookupError in gw" in report
    assert done.printed.count("data['hosts'][0]['seen']") >= 2
    assert done.printed.count("the service refuses") >= 2
    assert done.printed.count("did not yield a value") >= 2


def test_crash_in_the_factory_is_taken_over(project: Projects) -> None:
    """The next worker makes the value if a worker dies in mid-factory, and the teardown still runs once.

    The kernel shows the death. Fails without the claim's lease, because the next worker would wait until its time is
    over. Fails without the run's end in the controller.
    """
    test = """
        import os
        from journal_of import note, noted, when, worker

        def make():
            note("make", worker())
            if sum("make" in line for line in noted()) == 1:
                when("asks", 2)
                os._exit(7)
            return worker()

        def drop(value):
            note("drop", value, worker())

        def test(persist_once):
            note("asks", worker())
            note("got", persist_once("value", make, teardown=drop, timeout_s=25))
    """
    helper = {"shared": test.replace("def test(", "def use(")}
    caller = """
        from shared import use
        def test(persist_once):
            use(persist_once)
    """
    done = project(**helper, **in_both(caller)).run(*BOTH)

    assert done.status == 1
    assert done.times("make") == 2, done.journal
    second = [line.split()[1] for line in done.journal if line.startswith("make")][1]
    assert f"got {second}" in done.journal
    assert done.journal[-1] == f"drop {second} main"
    assert done.times("drop") == 1
    assert "crashed while running" in done.printed


def test_producer_that_died_is_reported_and_teardowns_run(project: Projects) -> None:
    """The summary names a yield-style fixture whose worker died, and the teardowns run, the last made first.

    Such a fixture cannot be finished. Fails without `ending.end` in the controller.
    """
    conftest = """
        from journal_of import note, when, worker
        from persist.pytest_plugin import shared_fixture

        def drop(value):
            note("drop", value)

        @shared_fixture(teardown=drop)
        def network():
            return "network"

        @shared_fixture(teardown=drop)
        def disk(network):
            return "disk"

        @shared_fixture
        def server():
            note("start server")
            yield 1
            note("stop server")
    """
    first = """
        import os
        from journal_of import note, when
        def test(network, disk, server):
            note("made")
            when("used")
            os._exit(7)
    """
    second = """
        from journal_of import note, when
        def test(request):
            when("made")
            assert request.getfixturevalue("server") == 1
            assert request.getfixturevalue("disk") == "disk"
            note("used")
    """
    done = project(conftest=conftest, test_a=first, test_b=second).run(*BOTH, "--max-worker-restart=0")

    assert done.status not in (0, 5)
    assert done.times("start server") == 1
    assert done.times("stop server") == 0
    assert "conftest.py::server: gw" in done.printed
    assert "died before the end: what follows its yield did not run." in done.printed
    assert [line for line in done.journal if line.startswith("drop")] == ["drop disk", "drop network"]
    assert f"is kept: {done.kept[0]}" in done.printed


ENDS = """
    import pytest
    from journal_of import note, worker
    from persist.pytest_plugin import shared_fixture

    def drop(value):
        note("drop", worker())

    @shared_fixture(teardown=drop)
    def database():
        return 1

    @shared_fixture
    def server():
        note("start server")
        yield 1
        note("stop server")

    @pytest.fixture(scope="session")
    def client(server):
        yield
        note("close client", worker())
"""


def test_ends_come_once_after_the_first_failure(project: Projects) -> None:
    """With ``-x`` the teardowns run once, too, and after the worker that still ran its test."""
    first = """
        from journal_of import when
        def test(database, client):
            when("runs")
            assert False
        def test_never(): pass
    """
    second = """
        from journal_of import note, when, worker
        def test(database, client):
            note("runs")
            when("close client")
            note("still runs")
        def test_never(): pass
    """
    done = project(conftest=ENDS, test_a=first, test_b=second).run(*BOTH, "-x")

    assert done.status != 0
    ends = [line.split(" gw")[0] for line in done.journal]
    assert ends == ["start server", "runs", "close client", "still runs", "close client", "stop server", "drop main"]
    assert len(done.kept) == 1


def test_ends_come_once_after_an_interrupt(project: Projects) -> None:
    """After Ctrl-C in the process that was started, both teardowns run once, and nothing hangs.

    The interrupt reaches the controller alone, and xdist then ends its workers.
    """
    test = """
        from journal_of import note, when
        def test(database, client):
            note("runs")
            when("runs", 2)
            note("both run")
            when("never")
    """
    done = project(conftest=ENDS, **in_both(test)).run(*BOTH, interrupt_at="both run")

    assert done.status == 2, done.printed
    for once in ("start server", "stop server", "drop main"):
        assert done.times(once) == 1, (once, done.journal)
    assert done.journal[-1] == "drop main"


#: The controller imports asyncio for the run, as it does with filelock 3.30, and Ctrl-C comes in the middle of that.
INTERRUPTING = """
    import os, signal, sys

    class Interrupting:
        is_done = False

        def find_spec(self, name, path=None, target=None):
            if name == "persist.streams":
                import asyncio
            if name == "asyncio.events" and not self.is_done:
                self.is_done = True
                os.kill(os.getpid(), signal.SIGINT)

    if "PYTEST_XDIST_WORKER" not in os.environ:
        for name in [name for name in sys.modules if name.partition(".")[0] == "asyncio"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Interrupting())
"""


def test_ends_come_after_an_interrupt_in_an_import(project: Projects) -> None:
    """Ctrl-C while the controller imports what it needs for the run: both ends come.

    Fails with the import in the main thread, because it leaves asyncio half-made.
    """
    test = """
        from journal_of import when
        def test(database, client):
            when("never")
    """
    done = project(conftest=ENDS + INTERRUPTING, **in_both(test)).run(*BOTH)

    assert done.status == 2, done.printed
    assert done.times("stop server") == done.times("start server") == 1, done.printed
    assert done.journal[-1] == "drop main"


def test_ends_come_once_after_an_interrupt_without_xdist(project: Projects) -> None:
    """The only process, interrupted in a test, finishes what it has made."""
    test = """
        from journal_of import note, when
        def test(database, client):
            note("runs")
            when("never")
    """
    done = project(conftest=ENDS, test_a=test).run(interrupt_at="runs")

    assert done.status == 2, done.printed
    assert done.journal == ["start server", "runs", "close client main", "stop server", "drop main"]


def test_failing_ends_are_reported_and_the_others_run(project: Projects) -> None:
    """An error in a teardown makes the run fail and stands in the summary, and the other teardowns run.

    They are found in a test module and in two conftest files of one name, which the controller has not all imported.
    Fails without the file in `ending.function_at`.
    """
    conftest = """
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        def drop(value):
            note("drop", value, "{0}")

        @shared_fixture(teardown=drop)
        def thing_{0}():
            return 1
    """
    test = """
        from beside_{0} import MINE
        from journal_of import note
        def explode(value):
            note("explode {0}")
            raise OSError(f"cannot unmount {{value}}")
        def test(thing_{0}, persist_once):
            assert persist_once("mount {0}", list, teardown=explode) == []
    """
    files = {}
    for place in ("one", "two"):
        files[f"{place}/conftest"] = conftest.replace("{0}", place)
        files[f"{place}/beside_{place}"] = "MINE = 1"
        files[f"{place}/test_{place}"] = test.replace("{0}", place).replace("{{", "{").replace("}}", "}")
    done = project(**files).run(*BOTH)

    assert done.counts(passed=2), done.printed
    assert done.status == 1
    assert sorted(line for line in done.journal if line.startswith("drop")) == ["drop 1 one", "drop 1 two"]
    assert done.times("explode") == 2
    assert done.printed.count("OSError: cannot unmount []") == 2
    assert "mount one: its teardown test_one:explode failed." in done.printed
    assert len(done.kept) == 1
