"""Runs that use nothing of the plugin, and the place of the state of those that do."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable

from harness.projects import PLUGIN, Project

Projects = Callable[..., Project]


def test_unused_it_imports_nothing_and_makes_nothing(project: Projects) -> None:
    """A run that uses no fixture of the plugin imports no store, no filelock and no msgspec, and leaves the disk alone.

    This holds for workers, too.
    """
    conftest = """
        import sys
        from journal_of import note, worker
        from persist.pytest_plugin import shared_fixture

        @shared_fixture
        def server():
            yield 1

        def pytest_unconfigure(config):
            found = sorted(name for name in sys.modules if name.partition(".")[0] in ("persist", "filelock", "msgspec"))
            note("modules of", worker(), *found)
    """
    test = """
        def test_one(tmp_path): pass
        def test_two(): pass
    """
    made = project(conftest=conftest, test_a=test)
    done = made.run("-n2", "-v")
    assert done.counts(passed=2), done.printed
    assert sorted(done.journal) == [
        f"modules of {each} persist persist.pytest_plugin persist.pytest_plugin.plugin"
        for each in ("gw0", "gw1", "main")
    ]
    assert done.kept == []
    assert f"persist: shared directory of this run: {made.temporary.resolve()}/persist-run-" in done.printed
    assert "persist:" not in made.run().printed


def test_import_costs_nothing_beside_pytest() -> None:
    """Loading the plugin loads only its own two modules and the package's, beside those that pytest has loaded."""
    program = """
import sys, pytest
before = set(sys.modules)
from persist.pytest_plugin import shared_fixture
print(*sorted(set(sys.modules) - before))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert found.split() == ["persist", "persist.pytest_plugin", "persist.pytest_plugin.plugin"]


def test_state_belongs_to_one_run(project: Projects) -> None:
    """Two runs with the same ``--testrunuid`` and base directory share nothing, and each makes its own value.

    The state is kept on failure.

    Fails if the run's directory is named by the uid.
    """
    test = """
        from journal_of import note
        def test(persist_once, persist_store):
            assert persist_once("value", lambda: note("make")) is None
            assert persist_store.ids() == []
            persist_store.create("s-1")
            assert False
    """
    made = project(test_a=test)
    again = ("-n1", "--testrunuid=same", f"--basetemp={made.directory / 'base'}")
    first, second = made.run(*again), made.run(*again)
    assert first.journal == second.journal == ["make"]
    assert len(second.kept) == 2
    assert f"the shared directory of this run is kept: {first.kept[0]}" in first.printed
    assert (first.kept[0] / "store" / "s-1.json").exists()
    assert first.kept[0].stat().st_mode & 0o777 == 0o700


def test_installed_plugin_registers_itself(project: Projects) -> None:
    """The plugin registers itself by the entry point of the distribution, and a user needs nothing else.

    The decorator's module may be imported before. If the distribution is not installed with the entry point, the test
    makes stand-in metadata.
    """
    made = project(
        test_a="""
        from persist.pytest_plugin import shared_fixture
        @shared_fixture
        def one():
            return 1
        def test(one): assert one == 1
        """
    )
    if not any(point.value == PLUGIN for point in importlib.metadata.entry_points(group="pytest11")):
        info = made.directory / "stand_in-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[pytest11]\npersist = {PLUGIN}\n")
        (info / "RECORD").write_text("persist/__init__.py,,\npersist/pytest_plugin/__init__.py,,\n")
    done = made.run("-n1", autoload=True)
    assert done.counts(passed=1), done.printed
