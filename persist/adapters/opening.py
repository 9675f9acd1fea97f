"""How an adapter gets its store."""

from __future__ import annotations

import os

import persist
import persist.aio
from persist.errors import InvalidArgument

AnyStore = persist.aio.Store | persist.Store | str | os.PathLike[str]


def opened(store: AnyStore) -> persist.aio.Store:
    """Return the store that an adapter was given, or the store of a directory.

    Raises:
        InvalidArgument: it is neither.
    """
    if isinstance(store, persist.aio.Store):
        return store
    if isinstance(store, (persist.Store, str, os.PathLike)):
        return persist.aio.Store(store)
    raise InvalidArgument(
        what="store", expected="a persist.aio.Store, a persist.Store or a path", got=type(store).__name__
    )
