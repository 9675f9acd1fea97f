"""`persist` keeps each conversation of a chat or agent server in one JSON file, safely for threads and processes.

    import persist

    store = persist.Store("var/sessions")
    session = store.create("s-42", {"title": "New chat", "messages": []})

Each name below is loaded at its first use, so that ``import persist`` costs next to nothing. `__init__.pyi` holds the
types.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "backup": "Backup",
    "errors": (
        "AlreadyStarted CommitFailed CommitUnknown CorruptSession EmitFailed EventsNotFound InvalidArgument LockError "
        "LockTimeout MergeConflict NotJSON Owner PersistError SessionBusy SessionDeleted SessionExists SessionNotFound "
        "StoreClosed StreamLost TooLarge Unavailable Unreadable UnsupportedFormat VersionMismatch"
    ),
    "engine": "Event",
    "follow": "Following",
    "merge": "MISSING",
    "head": "Head Recent",
    "session": "Session",
    "maintenance": "Problem",
    "store": "ClearedStream Store Sweep",
    "streams": "Stream StreamInfo",
    "transaction": "Transaction",
    "view": "View",
    "pytest_plugin.errors": "FactoryFailed NotShared SharedTimeout",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the same names as above, once
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("persist.errors")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'persist' has no attribute {name!r}")
    value = getattr(import_module(f"persist.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


# There is no `__dir__`, because a tool that looks at every name of every loaded module (freezegun does) would load the
# whole package.
