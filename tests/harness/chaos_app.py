"""The app of `scripts/chaos --gunicorn`: it is loaded before the workers are forked."""

from __future__ import annotations

import os

from harness.scripted import scripted
from persist.asgi import create_app

app = create_app(os.environ["PERSIST_CHAOS"], scripted)
