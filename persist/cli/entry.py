"""The entry point `persist`: the commands, or the news that what they need is not installed."""

from __future__ import annotations

import sys

USAGE_ERROR = 2
_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line and exit."""
    try:
        from persist.cli.commands import persist
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        print(
            f"persist: the command line needs {package}: pip install '.[cli]', in a checkout of persist",
            file=sys.stderr,
        )
        raise SystemExit(USAGE_ERROR) from None
    persist()
