"""`persist` keeps each conversation of a chat or agent server in one JSON file, safely for threads and processes.

    import persist

    store = persist.Store("var/sessions")
    session = store.create("s-42", {"title": "New chat", "messages": []})

The names below are loaded at their first use, so that ``import persist`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persist import errors as errors
    from persist.errors import CommitFailed as CommitFailed
    from persist.errors import CommitUnknown as CommitUnknown
    from persist.errors import CorruptSession as CorruptSession
    from persist.errors import CursorAhead as CursorAhead
    from persist.errors import EmitFailed as EmitFailed
    from persist.errors import EventsNotFound as EventsNotFound
    from persist.errors import IdTaken as IdTaken
    from persist.errors import InvalidSessionId as InvalidSessionId
    from persist.errors import InvalidStreamId as InvalidStreamId
    from persist.errors import LockNotHeld as LockNotHeld
    from persist.errors import LockTimeout as LockTimeout
    from persist.errors import MergeConflict as MergeConflict
    from persist.errors import MessagesRemoved as MessagesRemoved
    from persist.errors import NestedLock as NestedLock
    from persist.errors import NotJSON as NotJSON
    from persist.errors import Owner as Owner
    from persist.errors import PersistError as PersistError
    from persist.errors import ReservedField as ReservedField
    from persist.errors import RevisionMismatch as RevisionMismatch
    from persist.errors import SessionBusy as SessionBusy
    from persist.errors import SessionDeleted as SessionDeleted
    from persist.errors import SessionExists as SessionExists
    from persist.errors import SessionNotFound as SessionNotFound
    from persist.errors import StoreClosed as StoreClosed
    from persist.errors import StreamLost as StreamLost
    from persist.errors import SweepIncomplete as SweepIncomplete
    from persist.errors import Unreadable as Unreadable
    from persist.errors import UnsafeFile as UnsafeFile
    from persist.errors import UnsupportedFileSystem as UnsupportedFileSystem
    from persist.errors import UnsupportedFormat as UnsupportedFormat
    from persist.errors import WrongType as WrongType
    from persist.event_log import Event as Event
    from persist.follow import Following as Following
    from persist.maintenance import Problem as Problem
    from persist.merge import MISSING as MISSING
    from persist.pytest_plugin.errors import FactoryFailed as FactoryFailed
    from persist.pytest_plugin.errors import KeyCycle as KeyCycle
    from persist.pytest_plugin.errors import KeyTaken as KeyTaken
    from persist.pytest_plugin.errors import NamedLockNested as NamedLockNested
    from persist.pytest_plugin.errors import NamedLockTimeout as NamedLockTimeout
    from persist.pytest_plugin.errors import NotShared as NotShared
    from persist.pytest_plugin.errors import OthersRunning as OthersRunning
    from persist.pytest_plugin.errors import ProducerTimeout as ProducerTimeout
    from persist.session import Head as Head
    from persist.session import Session as Session
    from persist.store import ClearedStream as ClearedStream
    from persist.store import Store as Store
    from persist.streams import Stream as Stream
    from persist.streams import StreamInfo as StreamInfo

_HOMES = {
    "errors": (
        "CommitFailed CommitUnknown CorruptSession CursorAhead EmitFailed EventsNotFound IdTaken InvalidSessionId "
        "InvalidStreamId LockNotHeld LockTimeout MergeConflict MessagesRemoved NestedLock NotJSON Owner PersistError "
        "ReservedField RevisionMismatch SessionBusy SessionDeleted SessionExists SessionNotFound StoreClosed "
        "StreamLost SweepIncomplete Unreadable UnsafeFile UnsupportedFileSystem UnsupportedFormat WrongType"
    ),
    "event_log": "Event",
    "follow": "Following",
    "merge": "MISSING",
    "session": "Head Session",
    "maintenance": "Problem",
    "store": "ClearedStream Store",
    "streams": "Stream StreamInfo",
    "pytest_plugin.errors": (
        "FactoryFailed KeyCycle KeyTaken NamedLockNested NamedLockTimeout NotShared OthersRunning ProducerTimeout"
    ),
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


def __dir__() -> list[str]:
    return [*globals(), *__all__]
