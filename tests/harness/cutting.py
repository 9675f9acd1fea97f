"""A relay between a client and a PostgreSQL server that cuts a connection at a chosen message.

    python -m harness.cutting PORT

As a program it prints its port, and cuts one connection at the COMMIT that comes next, for each line of its input:
"before" does not deliver it, and "behind" does not deliver its answer.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

#: The message that commits ends so. A level of isolation has the word, too.
COMMIT = b"COMMIT\0"


@dataclass
class Relay:
    """The relay of one test.

    Attributes:
        cut_before: a text. A message of a client that holds it is not delivered, and its connection is cut.
        cut_behind: a text. A message of a client that holds it is delivered, and the answer is cut off.
        cuts: how many connections were cut.
        refuses: whether new connections are refused, too.
    """

    port: int
    cut_before: bytes | None = None
    cut_behind: bytes | None = None
    cuts: int = 0
    refuses: bool = False
    refuse_after_cut: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def relaying(server_port: int) -> Iterator[Relay]:
    """Run a relay to a server of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    relay = Relay(listening.getsockname()[1])

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            if relay.refuses:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", server_port))
            except OSError:
                # The server is just being restarted.
                client.close()
                continue
            is_answered = threading.Event()
            is_answered.set()
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=copy, args=(*pair, is_answered), daemon=True).start()

    def copy(source: socket.socket, target: socket.socket, from_client: bool, is_answered: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                if from_client and relay.cut_before is not None and relay.cut_before in content:
                    with relay.guard:
                        relay.cut_before = None
                        relay.cuts += 1
                        relay.refuses = relay.refuse_after_cut
                    break
                if from_client and relay.cut_behind is not None and relay.cut_behind in content:
                    with relay.guard:
                        relay.cut_behind = None
                        relay.cuts += 1
                        relay.refuses = relay.refuse_after_cut
                    is_answered.clear()
                    target.sendall(content)
                    continue
                if not from_client and not is_answered.is_set():
                    # The server has answered, and the client never hears of it.
                    break
                target.sendall(content)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield relay
    finally:
        relay.refuses = True
        listening.close()


def main(port: str) -> None:
    """Relay to a port until the input ends."""
    with relaying(int(port)) as relay:
        print(relay.port, flush=True)
        for line in sys.stdin:
            setattr(relay, f"cut_{line.strip()}", COMMIT)


if __name__ == "__main__":
    main(*sys.argv[1:])
