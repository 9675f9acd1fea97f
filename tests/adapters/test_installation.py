"""How an adapter gets its store, and what it says without its framework."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.pages import ROOT

import persist
import persist.aio
from persist.adapters import opening
from persist.adapters.opening import opened

ADAPTERS = {"openai_agents": "agents", "pydantic_ai": "pydantic_ai", "langgraph": "langgraph"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_without_its_framework_says_what_to_install(adapter: str) -> None:
    """The package has another name than the module that is missing."""
    code = f"import sys; sys.modules[{ADAPTERS[adapter]!r}] = None; import persist.adapters.{adapter}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert f"pip install '.[{adapter.replace('_', '-')}]'" in done.stderr


def test_adapters_of_one_path_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server makes an adapter for each conversation. A store for each would cost a cache and threads.

    It fails if each path makes a store of its own, or if a store is kept that nobody uses any more.
    """
    monkeypatch.chdir(tmp_path)
    first = opened(tmp_path / "chats")
    assert opened("chats") is first is opened(str(tmp_path / "chats"))
    assert opened(tmp_path / "others") is not first
    given = persist.Store(tmp_path / "chats")
    assert opened(given) is not first
    assert opened(persist.aio.Store(given)) is not first
    path = os.path.realpath(first.path)
    del first
    gc.collect()
    assert path not in opening._STORES


@pytest.mark.parametrize("store", [3, None, b"chats"])
def test_what_is_no_store_is_refused(store: object) -> None:
    with pytest.raises(persist.InvalidArgument, match="a path"):
        opened(store)  # type: ignore[arg-type]
