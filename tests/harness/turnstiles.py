"""A look at the turnstile of a lock file."""

from __future__ import annotations

import os
from pathlib import Path

from persist.storage import turnstile


def is_waited_for(path: Path) -> bool:
    """Tell whether a process waits for a lock. Only Linux tells."""
    fd = os.open(path, os.O_RDWR)
    try:
        return turnstile.is_taken(fd)
    finally:
        os.close(fd)
