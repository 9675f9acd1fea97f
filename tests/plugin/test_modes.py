"""The promises that hold in every mode of running tests, with one run of a small project for each mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness.projects import Project

CONFTEST = """
    import os
    import pytest
    from journal_of import note, when, worker
    from persist.pytest_plugin import shared_fixture

    WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

    @shared_fixture
    def plain(tmp_path_factory):
        when("asks plain", WORKERS)
        note("make plain")
        return {"items": [1], "place": str(tmp_path_factory.getbasetemp())}

    @shared_fixture
    def server(request, plain):
        note("start server", request.scope)
        yield {"place": plain["place"]}
        note("stop server")

    @pytest.fixture(scope="session")
    def client(server):
        yield server
        note("close client", worker())

    @pytest.fixture(scope="session", autouse=True)
    def asks():
        note("asks plain", worker())

    def drop(value):
        note("drop", value, worker())

    def make():
        when("asks once", WORKERS)
        note("make once")
        return [0]
"""
TEST = """
    import pytest
    from conftest import drop, make
    from journal_of import note, noted, worker

    @pytest.mark.parametrize("n", range(4))
    def test(n, asks, plain, client, persist_once, persist_lock, persist_counter, persist_store, tmp_persist_store):
        if f"asks once {worker()}" not in noted():
            note("asks once", worker())
        assert persist_once("value", make, teardown=drop) == [0]
        persist_once("value", make, teardown=drop).append(n)
        assert plain["items"][0] == 1
        assert client == {"place": plain["place"]}
        with persist_lock("one at a time"):
            note("in", worker())
            note("number", persist_counter("numbers", start=10))
            note("out", worker())
        if not persist_store.exists("shared") and persist_counter("who makes it") == 0:
            persist_store.create("shared", {"messages": []})
        assert tmp_persist_store.ids() == []
        tmp_persist_store.create("shared")
        note("used by", worker())
"""
MODES = {
    "without xdist": (1, []),
    "-n 0": (1, ["-n0"]),
    "-n auto": (2, ["-nauto"]),
    "load": (2, ["-n2", "--dist", "load"]),
    "loadscope": (2, ["-n2", "--dist", "loadscope"]),
    "loadgroup": (4, ["-n4", "--dist", "loadgroup"]),
    "worksteal": (2, ["-n2", "--dist", "worksteal"]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_once_and_ends_once(project: Callable[..., Project], mode: str) -> None:
    """A value is made once, however many workers ask at once, and its teardown runs once, after the last use.

    Nothing is left behind. The factory waits until every worker has asked. Fails without the wait in `Uses._end`, and
    without the end and the removal in the controller.
    """
    workers, arguments = MODES[mode]
    files = {f"test_{letter}": TEST for letter in "abcd"}
    done = project(conftest=CONFTEST, **files).run(*arguments, PYTEST_XDIST_AUTO_NUM_WORKERS="2")

    assert done.status == 0, done.printed
    assert done.counts(passed=16), done.printed
    assert {line.split()[-1] for line in done.journal if "used by" in line} == (
        {f"gw{n}" for n in range(workers)} if workers > 1 else {"main"}
    )
    for once in ("make plain", "start server session", "make once", "stop server", "drop [0]"):
        assert done.times(once) == 1, (once, done.journal)
    order = [line.split()[0] for line in done.journal if line.startswith(("used", "close", "stop", "drop"))]
    assert order[-3:] == ["close", "stop", "drop"]
    assert order.count("close") == workers
    assert done.journal[-1] == "drop [0] main", "in the process that was started"
    assert done.kept == []

    inside = [line.split() for line in done.journal if line.startswith(("in ", "out "))]
    assert [first for first, _ in inside] == ["in", "out"] * 16
    assert all(entered[1] == left[1] for entered, left in zip(inside[::2], inside[1::2], strict=True))
    numbers = [int(line.split()[1]) for line in done.journal if line.startswith("number")]
    assert sorted(numbers) == list(range(10, 26))
