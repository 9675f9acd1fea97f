"""Blocks of which some errors become others: typed ones, or ones that know their session."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from persist.errors import MergeConflict

Value = TypeVar("Value")


class Translating(Generic[Value]):
    """A block of which some errors become others. A generator's block (contextlib) would cost five times as much.

    Args:
        translate: raises another error in the place of one, or returns.
        value: what the block is given.
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
    """Name the session in a `MergeConflict` of the block: the pure functions below do not know it."""

    def name_session(error: BaseException) -> None:
        if isinstance(error, MergeConflict):
            raise error.in_session(session_id) from None

    return Translating(name_session, None)
