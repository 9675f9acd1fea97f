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
    kind: str
    worker: str
    traceback: str


class KeyTaken(PersistError, ValueError):
    """One key is used for two things. Each thing that is shared needs a key of its own."""

    template = (
        "{key!r} stands for {first} in this test run, and is asked for as {second}. Choose another key for one of them."
    )
    key: str
    first: str
    second: str


class KeyCycle(PersistError, RuntimeError):
    """A factory asks, directly or through others, for the value that it is to produce."""

    template = (
        "Each of these waits for the next, so that none would ever be produced: {chain}. Let one do without the other."
    )
    chain: str


class ProducerTimeout(PersistError, TimeoutError):
    """Somebody else was still producing the value when the time was over."""

    template = (
        "Waited {waited_s:.1f} s for {key!r}: {producer} has been producing it for {since_s:.1f} s. "
        "Raise timeout_s, or see what its factory waits for."
    )
    key: str
    producer: str
    since_s: float
    waited_s: float


class NamedLockTimeout(PersistError, TimeoutError):
    """Another test held the named lock for too long."""

    template = (
        "Waited {waited_s:.1f} s for the lock {name!r}: {holder} has held it for {since_s:.1f} s{where}. "
        "Raise timeout_s, or leave the block of that test sooner."
    )
    name: str
    holder: str
    since_s: float
    waited_s: float
    where: str


class NamedLockNested(PersistError, RuntimeError):
    """A thread asked for a named lock that it holds: it would wait for itself."""

    template = "This thread holds the lock {name!r} already. Leave its block first."
    name: str


class OthersRunning(PersistError, TimeoutError):
    """A shared fixture was finished although other workers had not ended."""

    template = (
        "Waited {waited_s:.1f} s for {workers} to be done with {key!r}, then finished it under them. "
        "Raise end_timeout_s, or see what those workers wait for."
    )
    key: str
    workers: str
    waited_s: float


class NotShared(PersistError, RuntimeError):
    """This worker cannot reach what the others share."""

    template = (
        "This worker shares no directory with the others: it runs on another machine, or its controller has not loaded "
        "the plugin. Load it with '-p persist.pytest_plugin', in addopts say, and not in a conftest.py of a "
        "subdirectory."
    )
