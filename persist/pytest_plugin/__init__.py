"""The pytest plugin: the things that the processes of one test run share.

    from persist.pytest_plugin import shared_fixture

The hooks and fixtures are in `persist.pytest_plugin.plugin`, which needs pytest. This module does not import pytest,
because ``import persist`` finds the plugin's errors below it. PYTEST_DONT_REWRITE: a conftest.py may import it before
pytest registers it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persist.pytest_plugin.plugin import PersistCounter as PersistCounter
    from persist.pytest_plugin.plugin import PersistLock as PersistLock
    from persist.pytest_plugin.plugin import PersistOnce as PersistOnce
    from persist.pytest_plugin.plugin import shared_fixture as shared_fixture

#: pytest loads these when it registers this module.
pytest_plugins = ("persist.pytest_plugin.plugin",)


def __getattr__(name: str) -> Any:
    if name != "shared_fixture":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from persist.pytest_plugin.plugin import shared_fixture

    return shared_fixture
