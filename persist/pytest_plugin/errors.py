"""The errors between the processes of a test run. Each names the process and how long it took."""

from __future__ import annotations

from persist.errors import PersistError


class FactoryFailed(PersistError):
    """Raised in every process that asks for a value whose factory has raised. The factory ran once."""

    template = (
        "The factory of {key!r} raised {kind} in {worker}. It ran once and is not run again in this test run. "
        "What it said there:\n\n{traceback}"
    )
    key: str
    worker: str
    traceback: str


class SharedTimeout(PersistError, TimeoutError):
    """Raised when another test or worker keeps a thing for longer than this one can wait.

    Attributes:
        key: the key of a shared value, or the name of a lock.
        holder: the process that produces or holds it. For a shared fixture that was finished, the workers that had not
            ended.
        since_s: for how many seconds the holder had it by then, or 0 where that is not known.
        waited_s: how many seconds this process has waited.
    """

    template = "Waited {waited_s:.1f} s for {key!r}: {reason}."
    key: str
    since_s: float


class NotShared(PersistError, RuntimeError):
    """Raised when this worker cannot reach the directory that the others share, or cannot use it."""

    template = "This worker shares no directory with the others: {reason}."
