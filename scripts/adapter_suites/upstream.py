"""Run the frameworks' own session tests, unmodified, on `persist`. ``scripts/test-adapters`` calls this.

The tests come from the sdist of the version that is installed. A pytest plugin beside this file puts the adapter in the
place of the framework's own store, and names the cases that cannot hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Suite:
    """A framework's tests.

    Attributes:
        distribution: the name of the package whose sdist holds them.
        plugin: the module beside this file that puts the adapter in.
        files: the test files.
    """

    distribution: str
    plugin: str
    files: tuple[str, ...]


SUITES = (
    Suite(
        "openai-agents",
        "openai_agents_upstream",
        (
            "tests/memory/test_session.py",
            "tests/memory/test_session_limit.py",
            "tests/memory/test_compaction_model_visibility.py",
            "tests/memory/test_compaction_suffix.py",
            "tests/memory/test_openai_responses_compaction_session.py",
            "tests/memory/test_session_context_wrapper.py",
            "tests/memory/test_session_persistence_sanitize.py",
            "tests/extensions/memory/test_async_sqlite_session.py",
            "tests/test_hitl_session_scenario.py",
            "tests/test_soft_cancel.py",
        ),
    ),
)


def unpacked(distribution: str, cache: Path) -> Path:
    """Return the directory of a package's sources, which are downloaded at the first call."""
    wanted = f"{distribution}=={version(distribution)}"
    place = cache / wanted
    if not place.is_dir():
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", distribution]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", cache, wanted], check=True)
        (archive,) = cache.glob(f"{distribution.replace('-', '_')}-{version(distribution)}.tar.gz")
        with tarfile.open(archive) as files:
            # Python 3.11.3 and older have no filters. A later one sets the attribute, and an older one ignores it.
            files.extraction_filter = getattr(tarfile, "data_filter", None)
            files.extractall(place)
    (sources,) = place.iterdir()
    return sources


def run(suite: Suite, cache: Path) -> bool:
    """Run one framework's tests. Tell whether all that should hold does hold."""
    print(f"== {suite.distribution} {version(suite.distribution)}: its own session tests, on persist", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-p", suite.plugin, "-p", "no:cacheprovider", "-q", "-n", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""}
    sources = unpacked(suite.distribution, cache)
    return subprocess.run([*pytest, *suite.files], cwd=sources, env=environment, check=False).returncode == 0


def main() -> int:
    cache = Path(sys.prefix) / "sources"
    cache.mkdir(exist_ok=True)
    held = [run(suite, cache) for suite in SUITES]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
