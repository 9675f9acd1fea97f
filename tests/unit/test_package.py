"""The installed package: what an import costs, which names it has, and what it depends on."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import pytest

import persist

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def modules_after(code: str) -> set[str]:
    """Return the names of all modules that a fresh interpreter has loaded after some code."""
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_an_import_loads_nothing_that_it_does_not_need() -> None:
    """``import persist`` costs next to nothing: it loads no dependency and none of the package's large modules."""
    heavy = {
        "filelock",
        "msgspec",
        "persist.store",
        "persist.session",
        "persist.streams",
        "persist.errors",
        "persist.storage",
    }
    assert not heavy & modules_after("import persist")


def test_a_store_loads_nothing_of_the_chat_server() -> None:
    """Neither the package nor a store, also an asynchronous one, loads what the extra `server` brings."""
    found = modules_after("import persist, persist.aio, persist.cli.commands\npersist.Store, persist.aio.Store")
    assert {"persist.store", "persist.aio"} <= found
    assert not {"persist.asgi", "starlette", "sse_starlette", "uvicorn", "httpx", "markdown_it"} & found


def test_the_pure_ground_floor_loads_no_filelock() -> None:
    """Codec, merge, patch and errors work without a lock, and touch no disk."""
    assert not {"filelock", "persist.storage"} & modules_after(
        "import persist.json_codec, persist.merge, persist.patch, persist.errors"
    )


def test_a_name_is_loaded_at_its_first_use() -> None:
    """The lazy names load the modules that the first test does not find."""
    assert {"filelock", "msgspec", "persist.store"} <= modules_after("import persist\npersist.Store")


def test_an_error_of_the_plugin_needs_no_pytest() -> None:
    """A program without pytest can name the plugin's errors."""
    found = modules_after("import persist\npersist.NotShared")
    assert "persist.pytest_plugin.errors" in found
    assert not {"pytest", "persist.pytest_plugin.plugin"} & found


def test_every_public_name_resolves() -> None:
    """Each name in ``persist.__all__`` exists, and stays the same object."""
    for name in persist.__all__:
        assert getattr(persist, name) is getattr(persist, name)


def test_a_tool_that_looks_at_every_name_loads_nothing() -> None:
    """A look at every name loads nothing. freezegun does that in each process of a test run with the plugin loaded.
    Fails if `dir` lists lazy names.
    """
    look = "import sys, persist, persist.pytest_plugin\n"
    look += "[getattr(module, name, None) for module in [*sys.modules.values()] for name in dir(module)]"
    loaded = {name for name in modules_after(look) if name.startswith("persist")}
    assert loaded == {"persist", "persist.pytest_plugin"}


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Fails if a test, a script or a document slips in, or a module is left out."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=PROJECT.parent, check=True, capture_output=True)
    [wheel] = tmp_path.iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(PROJECT.parent).as_posix()
        for path in (PROJECT.parent / "persist").rglob("*")
        if path.suffix in (".py", ".pyi", ".sql") or path.name == "py.typed" or path.parent.name == "page"
    }
    info = f"persist_sessions-{persist.__version__}.dist-info"
    about = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == package | about
    assert {"persist/__init__.pyi", "persist/py.typed", "persist/store.py"} <= names


def test_the_command_names_an_intruder(tmp_path: Path) -> None:
    """The error names another distribution that installs into the package `persist`. A user can uninstall it then."""
    shutil.copytree(Path(persist.__file__).parent, tmp_path / "persist")
    (tmp_path / "persist" / "store.py").write_text("class Save: pass\n")
    info = tmp_path / "savegames-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: savegames\nVersion: 1.0\n")
    (info / "RECORD").write_text("persist/store.py,,\n")
    command = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import persist.cli as c; c.main()",
    ]
    done = subprocess.run([*command, str(tmp_path), "ls"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "savegames has put files of its own into the package persist" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_of_the_errors_is_there_from_the_start() -> None:
    """``help(persist.errors)`` needs no import of its own."""
    assert "persist.errors" in modules_after("import persist\npersist.errors")


def test_every_error_is_public() -> None:
    """A caller can import every error from the top of the package."""
    errors = {persist.PersistError}
    while more := {sub for error in errors for sub in error.__subclasses__()} - errors:
        errors |= more
    own = {error.__name__ for error in errors if error.__module__.startswith("persist.")}
    assert {name for name in own if not name.startswith("_")} <= set(persist.__all__)


def test_a_wrong_name_is_an_attribute_error() -> None:
    """A misspelt name is named in the error, and ``hasattr`` works."""
    assert not hasattr(persist, "Stroe")
    with pytest.raises(AttributeError, match="'persist' has no attribute 'Stroe'"):
        persist.Stroe  # type: ignore[attr-defined]  # noqa: B018


def test_star_import_gives_the_public_names() -> None:
    """``from persist import *`` finds what `__all__` promises."""
    found: dict[str, object] = {}
    exec("from persist import *", found)
    assert set(persist.__all__) <= found.keys()


def test_types_are_shipped() -> None:
    """Type checkers of users read the package's annotations."""
    assert resources.files(persist).joinpath("py.typed").is_file()


def test_the_version_is_written_once() -> None:
    """The installed version is the version that the package gives of itself."""
    assert importlib.metadata.version("persist-sessions") == persist.__version__


def floor(requirement: str) -> tuple[int, ...]:
    _, _, version = requirement.partition(">=")
    return tuple(map(int, version.split(",")[0].split(".")))


@pytest.mark.skipif(not PROJECT.exists(), reason="needs the source tree: pyproject.toml is not installed")
def test_the_floor_excludes_filelocks_known_holes() -> None:
    """CVE-2025-68146 and CVE-2026-22701 (symbolic links at lock files) are fixed in filelock 3.20.1 and 3.20.3."""
    dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    [filelock] = [requirement for requirement in dependencies if requirement.startswith("filelock")]
    assert floor(filelock) >= (3, 20, 3)
