"""A real pgbouncer in transaction mode, in front of a PostgreSQL server of this machine.

Each transaction of a client gets any connection to the server. So nothing of a session may be relied on: no prepared
statement, no LISTEN, no SET, no session-level lock.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.postgres import free_port

#: Few enough that the transactions of one client hop between them.
SERVER_CONNECTIONS = 12
DEADLINE_S = 30.0
_SETTINGS = """
[databases]
* = host=127.0.0.1 port={server} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {connections}
max_client_conn = 500
server_round_robin = 1
logfile = {directory}/log
pidfile = {directory}/pid
"""


def program() -> str | None:
    """Return the program, or None. Debian has it where only root looks."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextlib.contextmanager
def bouncing(server_port: int) -> Iterator[int]:
    """Run a pgbouncer in front of the server at a port, and yield its own port."""
    found = program()
    assert found is not None
    with tempfile.TemporaryDirectory(prefix="persist-pgbouncer-") as scratch:
        facts: dict[str, Any] = {}
        if os.getuid() == 0:
            # It refuses root.
            user = pwd.getpwnam("postgres")
            os.chown(scratch, user.pw_uid, user.pw_gid)
            facts = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        port, settings = free_port(), Path(scratch, "pgbouncer.ini")
        facts_of = {"server": server_port, "port": port, "directory": scratch, "connections": SERVER_CONNECTIONS}
        settings.write_text(_SETTINGS.format(**facts_of) + _without_prepared_statements(found))
        settings.chmod(0o644)
        with Path(scratch, "out").open("wb") as output:
            process = subprocess.Popen([found, "-q", settings], stdout=output, stderr=output, cwd="/", **facts)
        try:
            _await(process, port, Path(scratch))
            yield port
        finally:
            process.kill()
            process.wait()


def _without_prepared_statements(found: str) -> str:
    """Return the setting that refuses prepared statements. Before version 1.21 pgbouncer knows none."""
    version = subprocess.run([found, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    is_new = tuple(map(int, version.split(".")[:2])) >= (1, 21)
    return "max_prepared_statements = 0\n" if is_new else ""


def _await(process: subprocess.Popen[bytes], port: int, scratch: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        is_late = time.monotonic() > deadline
        assert process.poll() is None, (scratch / "out").read_text()
        assert not is_late, f"pgbouncer did not answer within {DEADLINE_S} s"
        time.sleep(0.02)
