"""The outcome of the one run of a factory, as a record that every process can read and act on.

A record is a message of the key's session. The commit that ends the producer's stream writes it. So a value never
exists without the end of its production, nor the end without a value.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest

from persist.pytest_plugin.errors import FactoryFailed

Record = dict[str, Any]

VALUE, ENDED = "value", "ended"
#: The exceptions that a factory may end with, besides a value or an error. An expected failure is also a failure, so it
#: comes first.
_VERDICTS: dict[str, tuple[type[BaseException], Callable[..., Any]]] = {
    "skip": (pytest.skip.Exception, pytest.skip),
    "xfail": (pytest.xfail.Exception, pytest.xfail),
    "fail": (pytest.fail.Exception, pytest.fail),
}
_OURS = "persist.pytest_plugin."
#: These end the process or the run, and say nothing about the value. So the next process may try.
NO_OUTCOME = (KeyboardInterrupt, GeneratorExit, pytest.exit.Exception)


def of_error(error: BaseException, worker: str) -> Record:
    """Return the record of a factory that raised."""
    for kind, (exception, _) in _VERDICTS.items():
        if isinstance(error, exception):
            return {"kind": kind, "worker": worker, "reason": str(getattr(error, "msg", error))}
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return {"kind": "error", "worker": worker, "error": name, "traceback": text_of(error)}


def text_of(error: BaseException) -> str:
    """Return an error's traceback as Python prints it, without the frames of this package that called the function."""
    trace = error.__traceback__
    while (
        trace is not None
        and trace.tb_next is not None
        and trace.tb_frame.f_globals.get("__name__", "").startswith(_OURS)
    ):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def result(record: Record, key: str, cause: BaseException | None) -> Any:
    """Return the value that a record holds, or raise the outcome that it records."""
    __tracebackhide__ = True
    kind = record["kind"]
    if kind == VALUE:
        return record["value"]
    if kind in _VERDICTS:
        if cause is not None:
            raise cause
        _VERDICTS[kind][1](record["reason"])
    facts = {"kind": record["error"], "worker": record["worker"], "traceback": record["traceback"]}
    raise FactoryFailed(key=key, **facts) from cause
