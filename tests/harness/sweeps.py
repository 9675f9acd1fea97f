"""A sweep that has to look at every session: a session that it could not look at is an error here."""

from __future__ import annotations

from typing import Any

import persist


class SweepFailed(persist.PersistError):
    """Raised when a sweep could not look at some sessions."""

    template = "Cleared {cleared}, and could not look at {failures}."
    cleared: list[persist.ClearedStream]
    failures: dict[str, Exception]


def sweep(store: persist.Store, **options: Any) -> list[persist.ClearedStream]:
    """Clear stale streams. Raise `SweepFailed` if a session could not be looked at."""
    found = store.clear_stale_streams(**options)
    if found.failures:
        raise SweepFailed(cleared=found.cleared, failures=found.failures)
    return found.cleared
