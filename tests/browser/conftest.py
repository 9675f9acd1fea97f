"""Fixtures of the browser tests: workers on one directory, and Chromium on their page.

Each tab is judged at the end of its test: no errors on its console, and no request to elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import servers
from harness.chat_workers import Chat, Forker, Pace

#: The page's timers run five times as fast as a user's, because the tests would wait for them.
_FASTER = "const wait = setTimeout; globalThis.setTimeout = (act, wait_ms) => wait(act, wait_ms / 5);"


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Provide the process of which all workers are forked."""
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture
def chat(tmp_path: Path, forker: Forker) -> Iterator[Chat]:
    """Provide two workers. Their model says all at once unless the test sets its pace."""
    chat = Chat(tmp_path / "chats", Pace(tmp_path / "pace"), forker)
    chat.pace.allow(10**9)
    try:
        chat.start()
        chat.start()
        yield chat
    finally:
        for worker in chat.workers:
            worker.close()


# Of a module and not of the session, because Playwright leaves a loop in this thread while it runs.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Provide a running Chromium."""
    if shutil.which(servers.CHROMIUM) is None:
        servers.missing("Chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=servers.CHROMIUM, args=servers.CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Provide a function that opens the page of a worker in a browser of its own, as on another device.

    `errors` is a pattern of the lines on the console that this test causes. All other lines fail the test.
    """
    from harness.chat_page import Tab

    tabs: list[Tab] = []

    def open_tab(url: str, *, errors: str | None = None, **options: Any) -> Tab:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(20_000)
        context.add_init_script(_FASTER)
        tabs.append(Tab(context.new_page(), url, errors))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.page.unroute_all(behavior="ignoreErrors")
        tab.page.context.close()
    assert [fault for tab in tabs for fault in tab.faults] == []
