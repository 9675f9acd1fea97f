"""A real PostgreSQL server for tests, in a scratch directory. It refuses root, so root runs it as the user postgres."""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MISSING = "there is no PostgreSQL here: sudo scripts/install-servers installs it"


def programs() -> Path | None:
    """Return the directory of the server's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    return None if initdb is None else Path(initdb).resolve().parent


def can_run() -> bool:
    """Tell whether a server can be run here. It refuses root, so root needs the user postgres."""
    if programs() is None:
        return False
    try:
        return os.getuid() != 0 or bool(pwd.getpwnam("postgres"))
    except KeyError:
        return False


class Server:
    """A server on a free port of this machine, with trust for everybody on it.

    `addresses` are further addresses on which it listens, and `network` has the clients that may use them. Without
    `fsync` it makes a new schema sooner, and survives its own crashes, but no power cut.
    """

    def __init__(
        self,
        directory: str | None = None,
        port: int = 0,
        *,
        addresses: Sequence[str] = (),
        network: str = "",
        fsync: bool = True,
    ) -> None:
        self._addresses, self._network, self._fsync = addresses, network, fsync
        self.directory = Path(directory or tempfile.mkdtemp(prefix="persist-postgres-"))
        self.port = port or free_port()

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run(self, program: str, *args: object) -> None:
        found = programs()
        assert found is not None
        facts: dict[str, object] = {"user": "postgres", "group": "postgres", "extra_groups": []}
        facts = facts if os.getuid() == 0 else {}
        with (self.directory / f"{program}.out").open("ab") as output:
            subprocess.run(
                [found / program, *map(str, args)],
                check=True,
                stdout=output,
                stderr=output,
                cwd="/",
                **facts,  # type: ignore[call-overload]
            )

    def start(self) -> None:
        """Make the cluster if it is missing, and start the server. It answers on return."""
        if not self._data.exists():
            if os.getuid() == 0:
                user = pwd.getpwnam("postgres")
                os.chown(self.directory, user.pw_uid, user.pw_gid)
            self.directory.chmod(0o700)
            self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
            if self._network:
                with (self._data / "pg_hba.conf").open("a") as clients:
                    clients.write(f"host all all {self._network} trust\n")
        listening = ",".join(("127.0.0.1", *self._addresses))
        options = f"-p {self.port} -c listen_addresses={listening} -c unix_socket_directories={self.directory}"
        options += " -c max_connections=200 -c shared_buffers=64MB -c logging_collector=off"
        options += "" if self._fsync else " -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-w", "-t", 60, "-l", self.directory / "log", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server. "immediate" is a crash."""
        self._run("pg_ctl", "-D", self._data, "-w", "-t", 60, "-m", mode, "stop")

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start the server."""
        self.stop(mode)
        self.start()

    def remove(self) -> None:
        """Stop the server, and remove all that it has."""
        try:
            self.stop()
        except subprocess.CalledProcessError:
            self._kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _kill(self) -> None:
        try:
            pid = int((self._data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGQUIT)
        except (OSError, ValueError, IndexError):
            return
        deadline = time.monotonic() + 10
        while (self._data / "postmaster.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)


def add_postgres(parser: argparse.ArgumentParser) -> None:
    """Add the option --postgres. Its value is None without it, and "" for a server of the run's own."""
    told = "keep the sessions in PostgreSQL: on a scratch server, or in new databases on the server of this URL"
    parser.add_argument("--postgres", metavar="URL", nargs="?", const="", help=told)


@contextlib.contextmanager
def databases(url: str) -> Iterator[Callable[[], str]]:
    """Yield a function that makes an empty database and returns its URL. Without a URL, a scratch server has it."""
    import psycopg

    if not url and not can_run():
        raise SystemExit(MISSING)
    server = Server() if not url else None
    made: list[str] = []

    def make() -> str:
        name = f"persist_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        made.append(name)
        parts = urllib.parse.urlsplit(url)
        return urllib.parse.urlunsplit(parts._replace(path=f"/{name}"))

    try:
        if server is not None:
            server.start()
            url = server.url
        yield make
        if server is None:
            with psycopg.connect(url, autocommit=True) as connection:
                for name in made:
                    connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        if server is not None:
            server.remove()


def free_port() -> int:
    """Return a port that nobody uses just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
