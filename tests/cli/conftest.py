"""Fixtures that the tests of the command line share: ways to run it, and a replay that was played to its end once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click import Command
from click.testing import CliRunner, Result
from replaying.command import replay as replay_command
from replaying.conversations import Conversation, samples
from replaying.ledger import Ledger
from replaying.supervise import Plan, Supervisor

from persist.cli.commands import persist

Run = Callable[..., Result]


def runner_of(command: Command) -> Run:
    """Return a function that runs a command with these arguments, with an output that is not a terminal."""

    def run_command(*arguments: object, **environment: str) -> Result:
        return CliRunner(env={"FORCE_COLOR": None, **environment}).invoke(
            command, [str(argument) for argument in arguments]
        )

    return run_command


@pytest.fixture
def run() -> Run:
    """Return a function that runs `persist`."""
    return runner_of(persist)


@pytest.fixture
def replay() -> Run:
    """Return a function that runs `scripts/replay`."""
    return runner_of(replay_command)


def json_of(result: Result) -> Any:
    return json.loads(result.stdout)


@dataclass(frozen=True)
class Played:
    """A replay's store, the conversations that were played into it, and the ledger of what was acknowledged."""

    directory: Path
    conversations: list[Conversation]
    ledger: Ledger


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Play the sample conversations, once for all tests.

    There are no kills, so every commit was acknowledged. Tests damage copies of the store.
    """
    directory = tmp_path_factory.mktemp("replay") / "store"
    directory.mkdir()
    plan = Plan(samples(), directory, workers=2, seed=1)
    supervisor = Supervisor(plan, tmp_path_factory.mktemp("scratch"), lambda _: None)
    supervisor.run()
    assert supervisor.failures == []
    return Played(directory, supervisor.played, supervisor.ledger)
