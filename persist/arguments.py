"""Arguments: the checks of a caller's values. A typed error says what is wrong before the verb does anything."""

from __future__ import annotations

import math
import os
from typing import TypeGuard

from persist.errors import InvalidArgument, shown


def is_url(place: object) -> TypeGuard[str]:
    """Tell whether a store's place is the URL of a database."""
    return isinstance(place, str) and place.startswith(("postgresql://", "postgres://"))


def require_flags(**flags: object) -> None:
    """Raise `InvalidArgument` for an option that is neither True nor False.

    Without this check, a "false" from a query string would count as true.
    """
    for name, value in flags.items():
        if type(value) is not bool:
            raise InvalidArgument(what=name, expected="True or False", got=shown(value))


def require_texts(**texts: object) -> None:
    """Raise `InvalidArgument` for a value that is neither a string nor None."""
    for name, value in texts.items():
        if value is not None and type(value) is not str:
            raise InvalidArgument(what=name, expected="a string, or None", got=type(value).__name__)


def require_text(what: str, value: object) -> None:
    """Raise `InvalidArgument` for a value that is no string."""
    if type(value) is not str:
        raise InvalidArgument(what=what, expected="a string", got=type(value).__name__)


def require_limit(limit: object, *, may_be_none: bool = True) -> None:
    """Raise `InvalidArgument` for a value that is neither a whole number from 0 up nor None."""
    if not (limit is None and may_be_none) and (type(limit) is not int or limit < 0):
        expected = "a whole number from 0 up" + (", or None" if may_be_none else "")
        raise InvalidArgument(what="limit", expected=expected, got=shown(limit))


def require_key(key: object, *, may_be_none: bool = True) -> None:
    """Raise `InvalidArgument` for a value that is neither the name of a key nor None."""
    if key is None and may_be_none:
        return
    if not (type(key) is str and key and key.isprintable() and not {'"', "\\"} & {*key}):
        expected = "the name of a key, without quotes and backslashes" + (", or None" if may_be_none else "")
        raise InvalidArgument(what="key", expected=expected, got=shown(key))


def expanded(path: str) -> str:
    """Return a path with the home directory in the place of a leading ``~`` or ``~user``, as a shell does.

    Raises:
        InvalidArgument: the home directory is unknown. For a directory of that name, write ``./~user``.
    """
    found = os.path.expanduser(path) if path.startswith("~") else path
    if found.startswith("~"):
        remedy = "For a directory of that name put ./ before it."
        raise InvalidArgument(
            what="a path", got=shown(path), expected="below a home directory that is known", remedy=remedy
        )
    return found


def seconds(what: str, value: object) -> float:
    """Return a number of seconds as a float."""
    if type(value) in (int, float) and math.isfinite(value) and value >= 0:  # type: ignore[arg-type,operator]
        return float(value)  # type: ignore[arg-type]
    raise InvalidArgument(what=what, expected="a number of seconds from 0 up", got=shown(value))
