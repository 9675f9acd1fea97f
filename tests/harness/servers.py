"""The programs that some tests need beside Python, and the skip or the failure without one."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

_REASON = 'no {}: "sudo scripts/install-servers" installs it'
_MISSING = re.compile(_REASON.format("(.+)").replace("(.+)", "([^:]+)"))

CHROMIUM = "/usr/bin/chromium"
#: As root it has no sandbox, and it would ask its maker's servers for updates.
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Where `scripts/install-servers` puts the npm package `ai`. It is not in the repository, because it has 25 MB.
AI_SDK = Path("/var/cache/persist-tests/ai_sdk")


def has_ai_sdk(wanted: Path) -> bool:
    """Tell whether the npm package `ai` is installed as the lock file in a folder wants it."""
    try:
        return (AI_SDK / ".installed").read_bytes() == (wanted / "package-lock.json").read_bytes()
    except FileNotFoundError:
        return False


def missing(name: str) -> NoReturn:
    """Skip a test because a program is missing. With PERSIST_REQUIRE_SERVERS=1 the test fails."""
    reason = _REASON.format(name)
    if os.environ.get("PERSIST_REQUIRE_SERVERS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def told(reasons: Iterable[str]) -> list[str]:
    """Return a line for each program that was missing, from the reasons for which tests were skipped."""
    found = Counter(match[1] for reason in reasons if (match := _MISSING.search(reason)))
    return [
        f"{count} test{'s' if count > 1 else ''} skipped: no {name}. `sudo scripts/install-servers` installs it"
        for name, count in found.items()
    ]
