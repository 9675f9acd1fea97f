"""Interference of other plugins, disks and supervisors: tests that run again, directories without locks, SIGTERM.

It may make a fixture fail, but never the run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.projects import Project

Projects = Callable[..., Project]
BOTH = ("-n2", "--dist=loadfile")


# --- tests that run again after their teardown -----------------------------------------------------------------------

#: flaky and pytest-rerunfailures do it in this way: they repeat the whole protocol of a failed test, with its teardown.
RERUNS = """
    from _pytest.runner import runtestprotocol
    from journal_of import note

    def pytest_runtest_protocol(item, nextitem):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if any(report.failed for report in reports):
            note("again")
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        return True
"""
SERVER = """
    import pathlib, time
    from journal_of import note, when
    from persist.pytest_plugin import shared_fixture

    @shared_fixture
    def server():
        pathlib.Path("alive").touch()
        note("start server")
        yield 1
        {before_stop}
        pathlib.Path("alive").unlink()
        note("stop server")
"""


@pytest.mark.parametrize(
    "before_stop", ["when('again'); time.sleep(0.5)", "pass"], ids=["while it is finished", "after it was finished"]
)
def test_a_test_that_runs_again_after_the_last_teardown_has_its_fixture(project: Projects, before_stop: str) -> None:
    """F12 (box/flaky #128): a test that runs again after the last teardown has its fixture, as it was or made anew.

    The worker said that it was ending, and takes it back. Fails without `Uses._go_on`: the server is stopped under the
    second run.
    """
    producer = """
        from journal_of import note, when
        def test_reports(server):
            pass  # so that the controller hears of the fixture, and says who is there
        def test_producer(server):
            note("produced")
            when("first run")
    """
    flaky = """
        import pathlib, time
        from journal_of import note, noted, when
        def test_flaky(request):
            when("start server")
            request.getfixturevalue("server")
            if "again" not in noted():
                when("produced")
                note("first run")
                assert False
            time.sleep(1.0)
            assert pathlib.Path("alive").exists(), "the server was stopped under this test"
    """
    conftest = RERUNS + SERVER.format(before_stop=before_stop)
    done = project(conftest=conftest, test_a=producer, test_b=flaky).run(*BOTH)
    assert done.counts(passed=3), done.printed
    assert done.times("start server") == done.times("stop server")
    assert done.kept == []


def test_a_test_that_runs_again_without_xdist_has_its_fixture(project: Projects) -> None:
    """The only process makes the fixture anew for a test that runs again."""
    flaky = """
        import pathlib
        from journal_of import noted
        def test_flaky(server):
            assert pathlib.Path("alive").exists()
            assert "again" in noted()
    """
    done = project(conftest=RERUNS + SERVER.format(before_stop="pass"), test_a=flaky).run()
    assert done.counts(passed=1), done.printed
    assert done.times("start server") == done.times("stop server") == 2


# --- a directory of no use -------------------------------------------------------------------------------------------

#: The temporary directory is on a network disk, in every process of the run.
NETWORK = """
    import os, pathlib
    from persist.storage import file_system
    table = pathlib.Path(os.environ["JOURNAL"] + ".mounts")
    lines = ["1 0 0:1 / / rw - ext4 /dev/x rw", f"2 1 0:2 / {os.environ['TMPDIR']} rw - nfs4 server:/x rw"]
    table.write_text("".join(line + os.linesep for line in lines))
    file_system.MOUNTS = table
"""
USERS = """
    def test_of_ours(persist_lock, persist_store):
        with persist_lock("printer"): pass
    def test_of_its_own(): pass
"""


@pytest.mark.parametrize("workers", [(), BOTH], ids=["alone", "xdist"])
def test_a_directory_without_locks_fails_the_tests_that_use_it(project: Projects, workers: tuple[str, ...]) -> None:
    """F13 (dask PR 1543): the run goes on in a directory without locks, and the message says how to name another one.

    Fails if the controller opens the directory and does not handle the error.
    """
    done = project(conftest=NETWORK, test_a=USERS, test_b=USERS).run(*workers)
    assert done.counts(passed=2, errors=2), done.printed
    assert done.status == 1, done.printed
    assert "PERSIST_TEST_DIR" in done.printed
    assert "nfs4" in done.printed
    assert "INTERNALERROR" not in done.printed


@pytest.mark.parametrize("workers", [(), BOTH], ids=["alone", "xdist"])
@pytest.mark.parametrize("way", ["environment", "ini"])
def test_another_directory_can_be_named(project: Projects, workers: tuple[str, ...], way: str) -> None:
    """The environment or the ini file can name another directory, as the message says."""
    made = project(conftest=NETWORK, test_a=USERS)
    local = made.directory / "local disk"
    local.mkdir()
    if way == "ini":
        (made.directory / "pytest.ini").write_text(f"[pytest]\npersist_test_dir = {local}\n")
        done = made.run(*workers)
    else:
        done = made.run(*workers, PERSIST_TEST_DIR=str(local))
    assert done.counts(passed=2), done.printed
    assert done.kept == []


@pytest.mark.parametrize("directory", ["missing/below", "a-file"])
def test_a_named_directory_that_cannot_be_made_fails_the_tests_alone(project: Projects, directory: str) -> None:
    """A named directory that cannot be made fails only the tests that use it, with the reason.

    It may be below a file, for example.
    """
    made = project(test_a=USERS)
    (made.directory / "a-file").touch()
    (made.directory / "missing").touch()
    done = made.run(PERSIST_TEST_DIR=str(made.directory / directory))
    assert done.counts(passed=1, errors=1), done.printed
    assert "PERSIST_TEST_DIR" in done.printed


# --- values that no other process can get ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["{1, 2}", "float('nan')", "object()", "b'x'"])
def test_a_value_that_is_no_json_is_refused_and_torn_down(project: Projects, value: str) -> None:
    """A value that is not JSON is refused, and its teardown runs at once, because no other process could run it.

    Fails if the value is only refused.
    """
    conftest = f"""
        from journal_of import note
        from persist.pytest_plugin import shared_fixture

        def drop(value):
            note("drop", type(value).__name__)

        @shared_fixture(teardown=drop)
        def database():
            return {value}

        @shared_fixture
        def server():
            note("start server")
            yield {value}
            note("stop server")
    """
    test = """
        def test_database(database): pass
        def test_server(server): pass
        def test_once(persist_once):
            from conftest import drop
            persist_once("key", lambda: {1}, teardown=drop)
    """
    done = project(conftest=conftest, test_a=test).run("--import-mode=prepend")
    assert done.counts(errors=2, failed=1), done.printed
    kind = type(eval(value)).__name__
    assert done.journal == [f"drop {kind}", "start server", "stop server", "drop set"]
    assert "cannot be kept as JSON" in done.printed


# --- what is kept, and the end by a supervisor -----------------------------------------------------------------------


def test_directories_of_failed_runs_are_kept_three_at_most(project: Projects) -> None:
    """Only the directories of the last three failed runs are kept. Fails without `keep`.

    Directories of others, or of a run without an end, are left alone.
    """
    test = """
        def test(persist_store):
            persist_store.create("s")
            assert False
    """
    made = project(test_a=test)
    unfinished = made.temporary / "persist-run-of-a-run-that-goes-on"
    unfinished.mkdir()
    kept: list[Path] = []
    for _ in range(5):
        done = made.run()
        kept += [path for path in done.kept if path not in kept and path != unfinished]
        assert len(done.kept) <= 4
    assert len(kept) == 5
    assert set(made.temporary.glob("persist-*")) == {unfinished, *kept[-3:]}
    assert made.run("--deselect=test_a.py::test").kept == sorted([unfinished, *kept[-3:]])


ENDS = """
    from journal_of import note
    from persist.pytest_plugin import shared_fixture

    def drop(value):
        note("drop")

    @shared_fixture(teardown=drop)
    def database():
        return 1
"""
WAITS = """
    import os, signal, time
    from journal_of import note, when

    def handles_signals(pid):
        (mask,) = (line.split()[1] for line in open(f"/proc/{pid}/status") if line.startswith("SigCgt"))
        return all(int(mask, 16) >> number - 1 & 1 for number in (signal.SIGTERM, signal.SIGHUP))

    def test_before(database): note("before")
    def test_waits(database):
        # The report of the test before reaches the process that was started. Then it handles the signals.
        pid = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        deadline = time.monotonic() + 30
        while not handles_signals(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        note("waits")
        when("never")
"""


@pytest.fixture
def hangup() -> Iterator[None]:
    """Let SIGHUP end processes, also if `nohup` has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [(), ("-n1",)], ids=["alone", "xdist"])
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP], ids=lambda by: by.name)
def test_signals_run_the_teardowns(
    project: Projects, hangup: None, workers: tuple[str, ...], by: signal.Signals
) -> None:
    """As a supervisor, a CI or a closed terminal ends a run.

    Fails without `end_on_signals`: the process is gone at once.
    """
    done = project(conftest=ENDS, test_a=WAITS).run(*workers, interrupt_at="waits", by=by)
    assert done.journal[-1] == "drop", done.printed
    assert done.status == 128 + by, done.printed
    assert by.name in done.printed


def test_sigterm_is_left_to_a_run_that_shares_nothing(project: Projects) -> None:
    """SIGTERM ends a run that shares nothing as it ends any process.

    Fails if the handler is set before the run shares a value.
    """
    test = """
        import signal
        from journal_of import note, when
        def test_waits():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            note("waits")
            when("never")
    """
    done = project(test_a=test).run(interrupt_at="waits", by=signal.SIGTERM)
    assert done.status == -signal.SIGTERM, done.printed
    assert done.kept == []
