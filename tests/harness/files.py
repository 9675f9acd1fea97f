"""The engine of a store of files, with all that tests look at in it."""

from __future__ import annotations

import persist
from persist.files import FileEngine


def file_engine(store: persist.Store) -> FileEngine:
    """Return the engine of a store of files."""
    engine = store._backend.engine
    assert isinstance(engine, FileEngine)
    return engine
