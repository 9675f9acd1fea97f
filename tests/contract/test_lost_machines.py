"""Machines, processes, connections and servers that are lost at any moment. PostgreSQL loses and doubles nothing then.

The long forms are `scripts/torture --postgres`, `scripts/histories --postgres`, `scripts/replay --postgres` and
`scripts/partitions`.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from harness import partitions, planted
from harness.histories import ROOT, Plan, run_round
from harness.partitions import Takeovers, take_over, two_actors

DEADLINE_S = 180
ROUNDS = 3


@pytest.fixture
def server(postgres_url: str) -> None:
    """Skip without PostgreSQL. These tests have servers of their own, because they crash them."""


def test_nothing_acknowledged_is_lost_torn_or_doubled(server: None) -> None:
    """Kills, connections that are cut in a COMMIT, ended server processes, and restarts: every promise is kept.

    Without `_has_happened` in `Transaction._settle`, it finds a refused commit that stands.
    """
    done = planted.run_harness(
        "torture", ["--postgres", "--kills=10", "--seed=44"], planted.PACKAGE_PARENT, timeout_s=DEADLINE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [crashes] = re.findall(r"(\d+) crashes", done.stdout.splitlines()[-1])
    assert crashes == "10"
    # The seed draws each of them once at least.
    assert all(what in done.stdout for what in ("killed", "cut before", "cut behind", "ended", "restarted"))


def test_every_history_is_linearizable(scratch: Path, postgres_url: str, postgres_schema: str) -> None:
    """The operations of 3 processes with 2 threads each have one order that explains them, with 3 kills.

    Without the locks in the statements `lock` and `lock_name`, a list loses appends, or verbs raise CommitFailed.
    """
    url = f"{postgres_url}?schema={postgres_schema}"
    report = run_round(scratch, Plan(operations=1_000, groups=2, kills=3), url=url)
    assert report.anomalies == []
    assert report.kills == 3


def test_replay_with_kills_is_clean(server: None) -> None:
    """Conversations come out as they were played, although workers were killed in their turns."""
    command = [*planted.PYTHON, "-c", "from replaying.command import replay; replay()"]
    command += ["--postgres", "--kills=3", "--seed=5", "--json"]
    scripts = f"{planted.environment(planted.PACKAGE_PARENT)['PYTHONPATH']}{os.pathsep}{ROOT / 'scripts'}"
    environment = planted.environment(planted.PACKAGE_PARENT) | {"PYTHONPATH": scripts}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["is_clean"], verdict["lost"], verdict["doubled"], verdict["kills"]) == (True, 0, 0, 3)


def play(*, is_stopped: bool) -> Takeovers:
    """Play a few rounds in which the two take turns."""
    found, dice = Takeovers(), random.Random(1)
    with two_actors(is_stopped=is_stopped) as (store, actors, places):
        for number in range(ROUNDS):
            mine, other = number % 2, 1 - number % 2
            take_over(store, actors[mine], actors[other], places[mine], dice.uniform(0, 0.3), found)
    return found


def test_owner_on_a_machine_that_is_cut_off_is_refused_when_it_joins_again(server: None) -> None:
    """Two namespaces are two machines. The other one takes over after the lease, and there is never a second writer.

    Without `while_idle` in `lock_row`, the take-over waits for a lock that is never free. It skips, with the reason,
    where the kernel allows no namespaces, in CI too.
    """
    reason = partitions.why_not()
    if reason is not None:
        pytest.skip(reason)
    assert play(is_stopped=False).findings == []


def test_owner_that_was_stopped_for_longer_than_its_lease_is_refused(server: None) -> None:
    """The same with SIGSTOP."""
    assert play(is_stopped=True).findings == []
