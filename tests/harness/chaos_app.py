"""The app of `scripts/chaos --gunicorn`: it is loaded before the workers are forked."""

from __future__ import annotations

import os

from starlette.applications import Starlette

from harness.scripted import scripted
from persist.asgi import create_app


def app() -> Starlette:
    """Return the app of the directory that the environment names."""
    return create_app(os.environ["PERSIST_CHAOS"], scripted)
