"""The errors between the processes of a test run. Each names the process and how long it took."""

from __future__ import annotations

from persist.errors import PersistError


class FactoryFailed(PersistError):
    """The factory raised, in whichever process came first. It ran once; everybody who asks for its value gets this."""

    template = (
        "The factory of {key!r} raised {kind} in {worker}. It ran once and is not run again in this test run. "
        "What it said there:\n\n{traceback}"
    )
    key: str
    worker: str
    traceback: str


class SharedTimeout(PersistError, TimeoutError):
    """Another test, or another worker, kept what this one waited for, for too long.

    Attributes:
        key: the key of a shared value, or the name of a lock.
        holder: who produces or holds it; of a shared fixture that was finished, the workers that had not ended.
        since_s: for how many seconds by then, 0 where that is not known.
        waited_s: how many seconds this process has waited.
    """

    template = "Waited {waited_s:.1f} s for {key!r}: {reason}."
    key: str
    since_s: float


class NotShared(PersistError, RuntimeError):
    """This worker cannot reach what the others share, or the directory for that is of no use."""

    template = "This worker shares no directory with the others: {reason}."
