"""Sweeper: a server process that clears stale streams all the time, until its standard input ends.

python -m replaying.sweeper STORE
"""

from __future__ import annotations

import select
import sys

from persist.store import Store
from replaying.reports import Report
from replaying.worker import LOCK_TIMEOUT_S

INTERVAL_S = 0.02


def sweep(store: Store) -> None:
    """Clear the streams that are stale now, and report them."""
    for cleared in store.clear_stale_streams().cleared:
        Report("cleared", cleared.session_id, cleared.stream_id).send()


def main(place: str) -> None:
    """Sweep until the supervisor closes the pipe, or is gone."""
    store = Store(place, timeout_s=LOCK_TIMEOUT_S)
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        sweep(store)


if __name__ == "__main__":
    main(*sys.argv[1:])
