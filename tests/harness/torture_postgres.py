"""Torture of the sessions in a database: killed processes, cut connections, ended server processes, and restarts.

Half of the processes reach the server through a relay, which cuts a connection at a COMMIT: before it, or behind it, so
that its answer is lost.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import urllib.parse
from collections import Counter
from collections.abc import Iterator

import psycopg

from harness import planted
from harness.postgres import Server, databases
from harness.runs import Plan
from harness.torture import Torture

#: How often each thing is done. A restart takes seconds.
WEIGHTS = {"killed": 12, "cut before": 4, "cut behind": 4, "ended": 4, "restarted": 2}
MOST_ENDED = 3


class Relay:
    """A relay to a server, in a process of its own."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        command = [*planted.PYTHON, "-m", "harness.cutting", str(parts.port)]
        environment = planted.environment(planted.PACKAGE_PARENT)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        user = f"{parts.username}@" if parts.username else ""
        self.url = urllib.parse.urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{port}"))

    def cut(self, where: str) -> None:
        """Cut a connection "before" or "behind" its next COMMIT."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{where}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class PostgresTorture(Torture):
    """A run on one database. `did` counts what was done to whom."""

    crashes = "crashes"

    def __init__(self, url: str, workers: int, plan: Plan, relay: Relay, server: Server | None) -> None:
        super().__init__(url, workers, plan, (url, relay.url))
        self.did: Counter[str] = Counter()
        self._url, self._relay, self._server = url, relay, server
        self._weights = {name: weight for name, weight in WEIGHTS.items() if server is not None or name != "restarted"}

    def _disturb(self) -> None:
        [what] = self._random.choices(list(self._weights), list(self._weights.values()))
        self.did[what] += 1
        if what == "killed":
            super()._disturb()
            return
        if what == "restarted":
            assert self._server is not None
            self._server.restart()
        elif what == "ended":
            self._end_server_processes()
        else:
            self._relay.cut(what.removeprefix("cut "))
        self.figures.crashes += 1
        self._watch.blame()
        self._watch.look()

    def _end_server_processes(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() LIMIT %s) AS chosen",
                [self._random.randint(1, MOST_ENDED)],
            )


@contextlib.contextmanager
def _place(url: str) -> Iterator[tuple[str, Server | None]]:
    if url:
        with databases(url) as make:
            yield make(), None
        return
    server = Server()
    try:
        server.start()
        yield server.url, server
    finally:
        server.remove()


def run(url: str, workers: int, plan: Plan) -> int:
    """Run, print the figures, and return the exit status."""
    # The pools tell of each connection that was ended, and all of these are meant.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    with _place(url) as (place, server), contextlib.closing(Relay(place)) as relay:
        print(f"{workers} processes, {place}", flush=True)
        torture = PostgresTorture(place, workers, plan, relay, server)
        torture.run()
        print(", ".join(f"{count} {what}" for what, count in sorted(torture.did.items())), flush=True)
        return torture.tell_result()
