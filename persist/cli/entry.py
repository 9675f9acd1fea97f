"""The entry point `persist`: it runs the commands, or says how to mend the installation."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions

USAGE_ERROR = 2
_NEEDED = ("click", "rich")
_OWN = "persist-sessions"


def main() -> None:
    """Run the command line and exit."""
    try:
        from persist.cli.commands import persist
    except (ImportError, AttributeError) as error:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        others = sorted({*packages_distributions().get("persist", [])} - {_OWN})
        if package in _NEEDED:
            news = f"the command line needs {package}: pip install '.[cli]', in a checkout of persist"
        elif others:
            names = ", ".join(others)
            news = (
                f"{names} has put files of its own into the package persist, too: uninstall it, then install this anew"
            )
        else:
            raise
        print(f"persist: {news}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    persist()
