"""The shared part of the adapters: how each gets its store, and its framework."""

from __future__ import annotations

import os
from weakref import WeakValueDictionary

import persist
import persist.aio
from persist.arguments import expanded, is_url
from persist.errors import InvalidArgument

AnyStore = persist.aio.Store | persist.Store | str | os.PathLike[str]

#: The stores that were made from a path. A server makes an object for each conversation, and each store has a cache and
#: a thread.
_STORES: WeakValueDictionary[str, persist.aio.Store] = WeakValueDictionary()


def opened(store: AnyStore) -> persist.aio.Store:
    """Return the store that an adapter was given, or that of a directory or URL. Adapters of one place share a store.

    Raises:
        InvalidArgument: it is neither.
    """
    if isinstance(store, persist.aio.Store):
        return store
    if isinstance(store, persist.Store):
        return persist.aio.Store(store)
    if isinstance(store, (str, os.PathLike)):
        path = store if is_url(store) else os.path.realpath(expanded(os.fspath(store)))
        return _STORES.get(path) or _STORES.setdefault(path, persist.aio.Store(store))
    raise InvalidArgument(
        what="store", expected="a persist.aio.Store, a persist.Store, a path or a URL", got=type(store).__name__
    )


def not_installed(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error for an import of an adapter without its framework."""
    remedy = f"This adapter needs it: pip install '.[{extra}]', in a checkout of persist"
    return ModuleNotFoundError(f"{error}. {remedy}", name=error.name)
