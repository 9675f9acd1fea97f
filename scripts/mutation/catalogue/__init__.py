"""All mutants, a module for each area of the package.

A new mutant needs four things: a name that reads well behind "without", the function that holds the mechanism, the
smallest edit that takes the mechanism out, and a test that fails then. Prefer an edit that quotes little of the source,
because it outlives a rewording. `scripts/mutants --check` tells whether the edit applies. `scripts/mutants NAME` tells
whether the test notices.
"""

from __future__ import annotations

from mutation.catalogue import (
    aio,
    commit,
    content,
    events,
    journal,
    locks,
    merge,
    plugin,
    postgres,
    sessions,
    storage,
    streams,
)

MUTANTS = (
    *locks.MUTANTS,
    *streams.MUTANTS,
    *storage.MUTANTS,
    *content.MUTANTS,
    *journal.MUTANTS,
    *commit.MUTANTS,
    *sessions.MUTANTS,
    *merge.MUTANTS,
    *events.MUTANTS,
    *aio.MUTANTS,
    *postgres.MUTANTS,
    *plugin.MUTANTS,
)
