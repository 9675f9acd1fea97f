"""Chaos: a chat server under load from many clients, of which a worker is killed again and again.

Each client sends messages with ids of its own making, until each is acknowledged. It follows each answer to its end,
and connects again whenever it is cut off. Then these judgements are made:

- Each message that was acknowledged is there exactly once, and has at most one answer.
- Each followed stream had no gap and no repeat, whatever was killed, and its words are those of its prompt.
- A whole answer is stored as it was told.
- No session stays busy: after the last kill, each takes another turn.
- Memory and descriptors are those of the first minute. A killed worker lives for two seconds, in which nothing can
  be compared. So one worker is spared, and it is judged, with the parent of all. The clients pause at both looks, so
  that nothing is open for them. Each client goes on in a new session after a few messages,
  because longer sessions cost more by right.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import httpx

import persist
from harness.chat_servers import ChatServer, Sent, children_of, close_server, events_in_async
from harness.pages import ROOT
from harness.runs import INTERRUPTED, duration, existing_directory, positive
from persist.asgi.serving import address_of, listen

DEADLINE_S = 120.0
SECONDS_A_LINE = 30.0
MOST_RSS = 1.2
MOST_DESCRIPTORS = 2
_SEVERAL_CLIENTS_A_SESSION = 3
#: How many messages a client sends in a session.
_MESSAGES_A_SESSION = 12


class Server(Protocol):
    """A server with workers that can be killed."""

    url: str
    process: subprocess.Popen[str]

    def workers(self) -> list[int]: ...
    def end(self) -> int: ...
    def close(self) -> None: ...


class Gunicorn:
    """The same app under gunicorn, loaded before the workers are forked."""

    def __init__(self, directory: Path, workers: int) -> None:
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths, "PERSIST_CHAOS": str(directory), "MALLOC_ARENA_MAX": "2"}
        with listen("127.0.0.1", 0) as listening:
            self.url = address_of(listening, "127.0.0.1")
            fd = listening.fileno()
            command = [sys.executable, "-m", "gunicorn", "--preload", "--log-level", "critical", "-b", f"fd://{fd}"]
            command += ["-w", str(workers), "-k", "uvicorn_worker.UvicornWorker", "harness.chaos_app:app()"]
            self.process = subprocess.Popen(command, env=environment, text=True, pass_fds=[fd])

    def workers(self) -> list[int]:
        return children_of(self.process.pid, "gunicorn")

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        close_server(self)


@dataclass
class Outcome:
    """The counts and the faults of a run. Without a fault it is a pass."""

    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)

    def require(self, claim: bool, fault: str) -> None:
        if not claim:
            self.faults.append(fault)

    def shown(self) -> str:
        counts = ", ".join(f"{what} {count:,}" for what, count in sorted(self.counts.items()))
        return f"{counts}, faults {len(self.faults)}"


@dataclass
class Load:
    """The clients and what they were promised."""

    url: str
    outcome: Outcome
    is_ending: bool = False
    #: Clients go on only while it is set, so that the server can be looked at in quiet.
    going: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0
    #: Session and message -> its text. They were acknowledged.
    acknowledged: dict[tuple[str, str], str] = field(default_factory=dict)
    #: Session and message of the answer -> its text. They were told to their end.
    finished: dict[tuple[str, str], str] = field(default_factory=dict)


def words_of(prompt: str) -> list[str]:
    """Return the words that the scripted responder says."""
    return [f"{word} " for word in prompt.split() if word[0] not in "~"]


class Client:
    """A client that talks in one session. Others may talk in the same one."""

    def __init__(self, load: Load, number: int) -> None:
        self._load, self._number, self._count = load, number, load.outcome.counts
        self._session = ""
        self._dice = random.Random(number)
        self._sent = 0

    async def run(self) -> None:
        """Send and follow, one message after the other, until the load ends."""
        while not self._load.is_ending:
            await self._load.going.wait()
            self._load.busy += 1
            try:
                async with httpx.AsyncClient(base_url=self._load.url, timeout=20.0) as http:
                    for _ in range(5):
                        if self._load.is_ending or not self._load.going.is_set():
                            break
                        await self._talk(http)
            finally:
                self._load.busy -= 1

    async def _talk(self, http: httpx.AsyncClient) -> None:
        self._session = f"s-{self._number // _SEVERAL_CLIENTS_A_SESSION}-{self._sent // _MESSAGES_A_SESSION}"
        self._sent += 1
        message_id = f"c{self._number}-{self._sent}"
        count = self._dice.randrange(1, 60)
        prompt = " ".join(f"{message_id}.{n} ~0.004" for n in range(count))
        answer = await self._insist(http, "turns", {"message": {"id": message_id, "content": prompt}})
        if answer is None:
            return
        self._load.acknowledged[self._session, message_id] = prompt
        how = await self._follow(http, answer["stream_id"], prompt)
        if how == "lost" and self._dice.random() < 0.5:
            # Somebody else may have sent a message by now. Then the retry is refused.
            again = await self._once(http, "retry", {"message_id": message_id})
            if again is not None and again.status_code == 201:
                self._count["retried"] += 1
                await self._follow(http, again.json()["stream_id"], prompt)
        if self._dice.random() < 0.2:
            body = {"message": {"id": message_id, "content": prompt}}
            again = await self._once(http, "turns", body)
            if again is not None and again.status_code in (200, 201):
                self._count["repeated"] += 1
                self._load.outcome.require(again.status_code == 200, f"{message_id} was started a second time")

    async def _once(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response | None:
        try:
            response = await http.post(f"/api/sessions/{self._session}/{path}", json=body)
        except httpx.TransportError:
            self._count["cut off"] += 1
            return None
        self._load.outcome.require(response.status_code != 500, f"status 500: {response.text}")
        return response

    async def _insist(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Send the same request until it is acknowledged. None if the load ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            response = await self._once(http, path, body)
            if response is not None and response.status_code in (200, 201):
                self._count["acknowledged"] += 1
                answer: dict[str, Any] = response.json()
                return answer
            if response is not None:
                self._count[f"status {response.status_code}"] += 1
                known = response.status_code in (409, 503)
                self._load.outcome.require(known, f"status {response.status_code}: {response.text}")
            if self._load.is_ending and response is not None:
                return None
            if time.monotonic() > deadline:
                self._load.outcome.require(False, f"{self._session}: not acknowledged within {DEADLINE_S} s")
                return None
            await asyncio.sleep(self._dice.uniform(0.01, 0.1))

    async def _follow(self, http: httpx.AsyncClient, stream_id: str, prompt: str) -> str:
        """Follow a stream to its end, through as many connections as it takes. Return how it ended."""
        outcome, expected = self._load.outcome, words_of(prompt)
        path, seen, deadline = f"/api/sessions/{self._session}/streams/{stream_id}/events", 0, time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                async for event in self._events(http, path, seen):
                    if event.event == "expired":
                        self._count["expired"] += 1
                        # Its worker was killed before it said anything.
                        said = await self._stored(http, f"{stream_id}.answer")
                        outcome.require(seen == 0 and not said, f"{stream_id}: expired behind event {seen}, {said}")
                        return "lost"
                    if event.event == "end":
                        how = str(event.data["how"])
                        self._count[how] += 1
                        if how == "finished":
                            outcome.require(seen == len(expected), f"{stream_id}: {seen} of {len(expected)} words")
                            self._load.finished[self._session, event.data["message_id"]] = "".join(expected)
                        return how
                    text = event.data.get("text") or ""
                    is_next = event.id == str(seen + 1) and seen < len(expected) and text == expected[seen]
                    is_error = event.data["type"] == "error"
                    outcome.require(is_next or is_error, f"{stream_id}: {event} behind event {seen}")
                    seen = int(event.id)
            except httpx.TransportError:
                pass
            self._count["reconnected"] += 1
            await asyncio.sleep(self._dice.uniform(0.01, 0.1))
        outcome.require(False, f"{stream_id}: no end within two minutes")
        return "lost"

    async def _stored(self, http: httpx.AsyncClient, message_id: str) -> str | None:
        """Return the text of a stored message, or None if there is no such message."""
        while True:
            try:
                response = await http.get(f"/api/sessions/{self._session}", params={"limit": 200})
            except httpx.TransportError:
                continue
            if response.status_code == 200:
                found = [each["content"] for each in response.json()["messages"] if each["id"] == message_id]
                return found[0] if found else None

    async def _events(self, http: httpx.AsyncClient, path: str, seen: int) -> AsyncIterator[Sent]:
        headers = {"Last-Event-ID": str(seen)} if seen else {}
        # Now and then the client breaks off by itself, as a browser that is reloaded.
        patience = self._dice.randrange(1, 60)
        async with http.stream("GET", path, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                self._load.outcome.require(response.status_code == 503, f"{response.status_code}: {response.text}")
                return
            async for event in events_in_async(response.aiter_lines()):
                yield event
                patience -= 1
                if not patience:
                    return


async def _telling(outcome: Outcome) -> None:
    begun = time.monotonic()
    while True:
        await asyncio.sleep(SECONDS_A_LINE)
        print(f"{time.monotonic() - begun:.0f} s: {outcome.shown()}", flush=True)


async def _killing(server: Server, spared: int, load: Load, every_s: float) -> None:
    """Kill a worker again and again, while the load goes on."""
    dice = random.Random(7)
    while True:
        await asyncio.sleep(every_s)
        if load.going.is_set():
            victims = [pid for pid in server.workers() if pid != spared]
            if victims:
                try:
                    os.kill(dice.choice(victims), signal.SIGKILL)
                    load.outcome.counts["killed"] += 1
                except ProcessLookupError:
                    pass


@dataclass(frozen=True)
class Size:
    """The memory and the descriptors of a process."""

    rss_mb: float
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Size:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (rss,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
        return cls(rss / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())))


async def _sizes(load: Load, pids: dict[str, int]) -> dict[str, Size]:
    """Let the clients pause, and return what the processes take then, once it is the same for a while."""
    load.going.clear()
    await _until(lambda: load.busy == 0, "the clients paused")
    found = [{name: Size.of(pid) for name, pid in pids.items()}]
    for _ in range(120):
        await asyncio.sleep(0.25)
        found.append({name: Size.of(pid) for name, pid in pids.items()})
        last = [[size.descriptors for size in each.values()] for each in found[-5:]]
        if len(last) == 5 and all(each == last[0] for each in last):
            break
    load.going.set()
    middle = {name: median(each[name].rss_mb for each in found[-5:]) for name in pids}
    return {name: Size(middle[name], found[-1][name].descriptors) for name in pids}


async def _until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 2 * DEADLINE_S
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in time: {what}")
        await asyncio.sleep(0.05)


@asynccontextmanager
async def _served(make: Callable[[], Server]) -> AsyncIterator[Server]:
    server = make()
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=5.0) as http:
            for _ in range(600):
                try:
                    if (await http.get("/healthz")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        yield server
    finally:
        server.close()


async def chaos(
    directory: Path,
    *,
    seconds: float,
    workers: int = 4,
    clients: int = 36,
    every_s: float = 0.5,
    is_gunicorn: bool = False,
    least: Mapping[str, int] | None = None,
    most_rss: float = MOST_RSS,
) -> Outcome:
    """Run the load against a new server for some seconds, and judge it.

    Args:
        least: counts that the load goes on for, however slow the machine is.
        most_rss: how many times the memory of the early look a process may have at the end.
    """
    outcome = Outcome()

    def make() -> Server:
        return Gunicorn(directory, workers) if is_gunicorn else ChatServer(directory, workers=workers)

    async with _served(make) as server:
        await _until(lambda: len(server.workers()) == workers, "the workers started")
        load = Load(server.url, outcome)
        load.going.set()
        spared = server.workers()[0]
        pids = {"worker": spared, "parent": server.process.pid}
        killing = asyncio.create_task(_killing(server, spared, load, every_s))
        telling = asyncio.create_task(_telling(outcome))
        talking = [asyncio.create_task(Client(load, n).run()) for n in range(clients)]
        try:
            await asyncio.sleep(early_s := min(60.0, seconds / 3))
            early = await _sizes(load, pids)
            await asyncio.sleep(seconds - early_s)
            wanted = least or {}
            await _until(lambda: all(outcome.counts[what] >= wanted[what] for what in wanted), f"counts of {wanted}")
            late = await _sizes(load, pids)
            load.is_ending = True
            killing.cancel()
            await asyncio.wait_for(asyncio.gather(*talking), 2 * DEADLINE_S)
        finally:
            for task in (killing, telling, *talking):
                task.cancel()
            await asyncio.gather(killing, telling, *talking, return_exceptions=True)
        for name in pids:
            shown = [f"{size.rss_mb:.1f} MB, {size.descriptors} descriptors" for size in (early[name], late[name])]
            outcome.figures[name] = " -> ".join(shown)
            outcome.require(late[name].rss_mb <= most_rss * early[name].rss_mb, f"memory of the {name}: {shown}")
            grown = abs(late[name].descriptors - early[name].descriptors)
            outcome.require(grown <= MOST_DESCRIPTORS, f"descriptors of the {name}: {shown}")
        await _judge_sessions(server.url, {session for session, _ in load.acknowledged}, outcome)
        status = server.end()
        outcome.require(status == 0, f"the server ended with status {status}")
    _judge_store(persist.Store(directory), load)
    return outcome


async def _judge_sessions(url: str, sessions: set[str], outcome: Outcome) -> None:
    """Require that no session stays busy: each shows no stream, and takes another turn to its end."""
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
        for session_id in sorted(sessions):
            outcome.require(await _comes_free(http, session_id), f"{session_id}: stays busy")
            body = {"message": {"id": "last", "content": "last"}}
            response = await http.post(f"/api/sessions/{session_id}/turns", json=body)
            outcome.require(response.status_code == 201, f"{session_id}: takes no turn: {response.text}")
            outcome.require(await _comes_free(http, session_id), f"{session_id}: its last turn does not end")
            outcome.counts["sessions that took a last turn"] += 1


async def _comes_free(http: httpx.AsyncClient, session_id: str) -> bool:
    for _ in range(100):
        if (await http.get(f"/api/sessions/{session_id}")).json()["stream"] is None:
            return True
        await asyncio.sleep(0.1)
    return False


def _judge_store(store: persist.Store, load: Load) -> None:
    outcome = load.outcome
    for session_id in store.ids():
        messages = store.load(session_id).data["messages"]
        ids = Counter(message["id"] for message in messages)
        outcome.require(ids.most_common(1)[0][1] == 1, f"{session_id}: a message is there twice")
        texts = {message["id"]: message["content"] for message in messages}
        roles = [message["role"] for message in messages]
        doubled = any(roles[n : n + 2] == ["assistant"] * 2 for n in range(len(roles)))
        outcome.require(not doubled, f"{session_id}: a prompt has two answers")
        for promised in (load.acknowledged, load.finished):
            for (session, message_id), text in promised.items():
                # A retry of a later time may have replaced an answer, but only one that was lost.
                if session == session_id:
                    outcome.require(texts.get(message_id) == text, f"{session_id}: {message_id} is not as promised")
    problems = [each for each in store.check() if each.kind != "foreign"]
    outcome.require(not problems, f"check: {problems[:3]}")


def main(arguments: list[str] | None = None) -> int:
    """Run `scripts/chaos`."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description="Kill the workers of a chat server under load.", allow_abbrev=False
    )
    parser.add_argument("--seconds", type=duration, default=600.0, help="how long the load lasts (default: 600)")
    parser.add_argument("--workers", type=positive, default=4, help="processes that serve (default: 4)")
    parser.add_argument("--clients", type=positive, default=36, help="clients at once (default: 36)")
    parser.add_argument("--every-s", type=duration, default=0.5, help="seconds between two kills (default: 0.5)")
    parser.add_argument("--gunicorn", action="store_true", help="serve with gunicorn --preload")
    parser.add_argument("--directory", type=existing_directory, help="where to work (default: a temporary directory)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        try:
            outcome = asyncio.run(
                chaos(
                    Path(directory) / "sessions",
                    seconds=options.seconds,
                    workers=options.workers,
                    clients=options.clients,
                    every_s=options.every_s,
                    is_gunicorn=options.gunicorn,
                )
            )
        except KeyboardInterrupt:
            return INTERRUPTED
    print(outcome.shown())
    for name, figure in outcome.figures.items():
        print(f"{name}: {figure}")
    for fault in outcome.faults[:20]:
        print(f"FAULT: {fault}")
    print("All promises held." if not outcome.faults else f"{len(outcome.faults)} faults.")
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main())
