"""Blocks that turn some errors into others: into typed ones, or into ones that name their session."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from persist.errors import MergeConflict

Value = TypeVar("Value")


class Translating(Generic[Value]):
    """A block that turns some errors into others. A generator's block (contextlib) would cost five times as much.

    Args:
        translate: gets an error. It raises another one in its place, or returns.
        value: the value that the block gets.
    """

    __slots__ = ("_translate", "_value")

    def __init__(self, translate: Callable[[BaseException], None], value: Value) -> None:
        self._translate = translate
        self._value = value

    def __enter__(self) -> Value:
        return self._value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._translate(error)


def conflicts_in(session_id: str) -> Translating[None]:
    """Return a block that names the session in a `MergeConflict`, because the pure functions in it do not know it."""

    def name_session(error: BaseException) -> None:
        if isinstance(error, MergeConflict):
            raise error.in_session(session_id) from None

    return Translating(name_session, None)
