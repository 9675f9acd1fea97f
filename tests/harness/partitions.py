"""Two machines and a database: the owner of a turn is cut off in mid-stream, and the other machine takes over.

A machine is a network namespace of this one, with a link of its own to the server. In each round one actor runs a turn
and writes all the time. Its link goes down at a random instant, or its process is stopped. The other actor starts a
turn as soon as it can, which is after the lease. Then the first one goes on. It must be refused, and nothing that it
writes may show.

It needs root, `ip` (iproute2), and a kernel that allows namespaces.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from actors import Actor

import persist
from harness.postgres import Server
from harness.runs import not_negative, positive

LEASE_S = 1.0
#: A round is cut off after this time at most, from the start of its turn.
LONGEST_TURN_S = 0.3
PATIENCE_S = 60.0

WRITE = """
import threading, time
log, stream = [], store.start_stream({session!r}, {{"role": "user", "content": "a"}}, stream_id={stream!r})

def write():
    number = 0
    while True:
        number += 1
        begun = time.monotonic()
        try:
            stream.emit(number, durable=number % 2 == 0)
            stream.checkpoint({{"role": "assistant", "content": str(number)}})
        except persist.StreamLost as lost:
            log.append((number, begun, None))
            return
        except persist.PersistError as error:
            # The turn may go on.
            continue
        log.append((number, begun, time.monotonic()))

thread = threading.Thread(target=write, daemon=True)
thread.start()
"""
GO_ON = """
thread.join({patience_s})
try:
    stream.checkpoint({{"role": "assistant", "content": "late"}})
    refused = False
except persist.StreamLost:
    refused = True
with stream:
    pass
thread.is_alive(), refused, log
"""
TAKE_OVER = """
import time
until = time.monotonic() + {patience_s}
while True:
    try:
        stream = store.start_stream({session!r}, {{"role": "user", "content": "b"}}, stream_id={stream!r})
        break
    except (persist.SessionBusy, persist.LockTimeout):
        if time.monotonic() > until:
            raise
        time.sleep(0.01)
since = time.monotonic()
stream.checkpoint({{"role": "assistant", "content": "1"}})
since, store.load({session!r}).data["messages"], [event.data for event in store.events({session!r}, {other!r})]
"""
FINISH = """
stream.emit("b", durable=True)
stream.finish({"role": "assistant", "content": "2"})
"""


def why_not() -> str | None:
    """Return the reason why there can be no second machine here, or None."""
    if os.getuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no program ip (apt-get install iproute2)"
    try:
        _ip("netns", "add", f"persist-{os.getpid()}-try")
        _ip("netns", "del", f"persist-{os.getpid()}-try")
    except subprocess.CalledProcessError as refused:
        return f"the kernel refuses network namespaces: {refused.stderr.strip()}"
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Machine:
    """A network namespace with one link. `server` is the server's address on that link."""

    name: str
    link: str
    server: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return "ip", "netns", "exec", self.name

    def cut(self) -> None:
        """Take the link down: packets in both directions are lost."""
        _ip("link", "set", self.link, "down")

    def join(self) -> None:
        """Take the link up again."""
        _ip("link", "set", self.link, "up")


@contextmanager
def machines(count: int = 2) -> Iterator[tuple[list[Machine], str]]:
    """Make machines, and remove them. Also yields the network that they are in."""
    number, made = os.getpid(), list[Machine]()
    network = f"10.{random.randrange(64, 192)}.{random.randrange(256)}"
    try:
        for index in range(count):
            name, link, inner = f"persist-{number}-{index}", f"pt{number}n{index}", f"pt{number}m{index}"
            ours, theirs = f"{network}.{4 * index + 1}", f"{network}.{4 * index + 2}"
            _ip("netns", "add", name)
            made.append(Machine(name, link, ours))
            _ip("link", "add", link, "type", "veth", "peer", "name", inner, "netns", name)
            _ip("addr", "add", f"{ours}/30", "dev", link)
            _ip("link", "set", link, "up")
            _ip("-n", name, "addr", "add", f"{theirs}/30", "dev", inner)
            _ip("-n", name, "link", "set", inner, "up")
        yield made, f"{network}.0/24"
    finally:
        for each in made:
            _ip("netns", "del", each.name)


@dataclass
class Takeovers:
    """The counts of a run. `findings` are broken promises, a double writer among them."""

    rounds: int = 0
    writes: int = 0
    longest_s: float = 0.0
    #: How often the server has refused a write that was under way when the link went down, or the process was stopped.
    refused_by_server: int = 0
    findings: list[str] = field(default_factory=list)

    def shown(self) -> str:
        """Return the counts in one line."""
        return (
            f"{self.rounds} rounds, {self.writes:,} writes, taken over after {self.longest_s:.2f} s at the latest, "
            f"{self.refused_by_server} refused by the server, {len(self.findings)} findings"
        )


def take_over(
    store: persist.Store, owner: Actor, other: Actor, machine: Machine | None, delay_s: float, found: Takeovers
) -> None:
    """Play one round: `owner` is cut off, or stopped if it has no machine of its own, and `other` takes over."""
    session_id, name = f"s-{found.rounds}", f"t-{found.rounds}"
    store.create(session_id, {"messages": []})
    owner.do(WRITE.format(session=session_id, stream=name))
    time.sleep(delay_s)
    cut_at = time.monotonic()
    if machine is None:
        os.kill(owner.pid, signal.SIGSTOP)
    else:
        machine.cut()
    takes = {"session": session_id, "stream": f"{name}-b", "other": name, "patience_s": PATIENCE_S}
    since, messages, events = other.do(TAKE_OVER.format(**takes))
    if machine is None:
        os.kill(owner.pid, signal.SIGCONT)
    else:
        machine.join()
    is_alive, is_refused, log = owner.do(GO_ON.format(patience_s=PATIENCE_S))
    other.do(FINISH)
    found.rounds += 1
    found.writes += len(log) - 1
    found.longest_s = max(found.longest_s, since - cut_at)
    found.findings += [f"{session_id}: {what}" for what in _judge(store, session_id, name, since, messages, log)]
    if is_alive or not is_refused or not log or log[-1][2] is not None:
        found.findings.append(f"{session_id}: the owner was not refused: {log[-1:]}")
    elif log[-1][1] < since:
        found.refused_by_server += 1
    if [event.data for event in store.events(session_id, name)] != events:
        found.findings.append(f"{session_id}: events were emitted behind the take-over")
    if events != [*range(1, len(events) + 1)]:
        found.findings.append(f"{session_id}: other events than were emitted: {events}")
    durable = max((number for number, _, ended in log if ended is not None and number % 2 == 0), default=0)
    if len(events) < durable:
        found.findings.append(f"{session_id}: {len(events)} events of {durable}")


def _judge(
    store: persist.Store,
    session_id: str,
    name: str,
    since: float,
    at_take_over: list[dict[str, object]],
    log: list[tuple[int, float, float | None]],
) -> Iterator[str]:
    """Yield what is wrong in the messages of a round."""
    messages = store.load(session_id).data["messages"]
    shown = [(each["id"], each["content"], each.get("interrupted", False)) for each in messages]
    late = [number for number, begun, ended in log if ended is not None and begun > since]
    if late:
        yield f"two writers: {late} were written behind the take-over"
    last = max((number for number, _, ended in log if ended is not None), default=0)
    mine = [each for each in shown if each[0].startswith(f"{name}.")]
    if mine != [(each["id"], each["content"], True) for each in at_take_over[: len(mine)]]:
        yield f"two writers: {mine} is not what the take-over found: {at_take_over}"
    if last and (len(mine) < 2 or int(mine[1][1]) < last):
        yield f"lost: {last} was acknowledged, and it has {mine}"
    if [each[1:] for each in shown[len(mine) :]] != [("b", False), ("2", False)]:
        yield f"the second turn is not there: {shown}"


@contextmanager
def two_actors(*, is_stopped: bool) -> Iterator[tuple[persist.Store, list[Actor], list[Machine | None]]]:
    """Start a server and two actors, each on a machine of its own, unless they are only stopped."""
    with machines(0 if is_stopped else 2) as (made, network):
        server = Server(addresses=[each.server for each in made], network=network)
        actors: list[Actor] = []
        try:
            server.start()
            store = persist.Store(server.url, timeout_s=20.0)
            places: list[Machine | None] = [*made] or [None, None]
            for machine in places:
                url = server.url if machine is None else server.url.replace("127.0.0.1", machine.server)
                prefix = () if machine is None else machine.prefix
                actors.append(Actor(url, prefix=prefix, lease_s=LEASE_S, timeout_s=5.0))
            yield store, actors, places
        finally:
            for each in actors:
                each.close()
            server.remove()


def run(rounds: int, seed: int, *, is_stopped: bool) -> Takeovers:
    """Play rounds in which the two take turns."""
    found, dice = Takeovers(), random.Random(seed)
    with two_actors(is_stopped=is_stopped) as (store, actors, places):
        for number in range(rounds):
            mine, other = number % 2, 1 - number % 2
            take_over(store, actors[mine], actors[other], places[mine], dice.uniform(0, LONGEST_TURN_S), found)
            if (number + 1) % 10 == 0:
                print(found.shown(), flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/partitions", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=positive, default=100, help="default %(default)s")
    parser.add_argument("--stop", action="store_true", help="stop the process (SIGSTOP) instead of cutting its link")
    parser.add_argument("--seed", type=not_negative, default=0)
    options = parser.parse_args(arguments)
    reason = None if options.stop else why_not()
    if reason is not None:
        parser.error(reason)
    found = run(options.rounds, options.seed, is_stopped=options.stop)
    for finding in found.findings:
        print(finding)
    print(found.shown())
    return 1 if found.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
