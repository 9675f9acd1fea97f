"""Every disk that a power cut may leave of every verb: old or new revision, and nothing else; what was acknowledged, new.

That the suite would notice: each single sync of each trace is left out, and each two neighbouring steps are swapped, and the
suite must find fault with the result. `scripts/crash-states` prints how many states there are.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from harness.crash_scenarios import MESSAGE, SCENARIOS, Scenario, faults, play
from harness.crashes import Step, Trace, record, states

import persist

by_name = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@by_name
def test_every_crash_state_is_old_or_new(scenario: Scenario, scratch: Path) -> None:
    """Nothing lost, nothing torn, nobody stuck: in every state that a power cut may leave of this verb."""
    case = play(scenario, scratch)
    assert case.trace.steps, "nothing was recorded"
    assert len(list(states(case.trace))) > 1
    assert list(faults(case, case.trace, scratch)) == []


@by_name
def test_every_sync_is_needed(scenario: Scenario, scratch: Path) -> None:
    """Leave out any single sync of the trace, and a state shows an acknowledged commit lost, a torn one or a stuck session."""
    case = play(scenario, scratch)
    # The document itself is synced only by `confirm`: its need shows with a file of another program, below.
    syncs = [i for i, step in enumerate(case.trace.steps) if step.kind.startswith("sync") and step.path != "s-1.json"]
    assert syncs
    for index in syncs:
        assert next(faults(case, case.trace.without(index), scratch, deep=False), None), (
            f"{case.trace.steps[index]} is not needed"
        )


@by_name
def test_the_order_is_needed(scenario: Scenario, scratch: Path) -> None:
    """Swap any two neighbouring steps of which one is a sync or a rename, and a state shows it; see `is_harmless`."""
    case = play(scenario, scratch)
    steps = case.trace.steps
    for index, (one, two) in enumerate(pairwise(steps)):
        if is_harmless(one, two):
            continue
        fault = next(faults(case, case.trace.swapped(index), scratch, deep=False), None)
        assert fault, f"{one} and {two} could be swapped"


@pytest.mark.parametrize("sync_kind", ["sync", "sync directory"])
def test_what_is_found_is_made_durable_before_it_is_acknowledged(scratch: Path, sync_kind: str) -> None:
    """An idempotent append to a file that another program wrote and never synced: both of its syncs are needed."""
    store = persist.Store(scratch / "recorded")
    content = b'{"messages":[{"id":"m3","role":"user","content":"more"}]}'
    (store.path / "s-1.json").write_bytes(content)
    trace = record(store.path, lambda: store.append("s-1", "messages", MESSAGE))
    other = Step("create", "s-1.json", 0)
    trace = Trace({}, (other, Step("write", "s-1.json", 0, content=content), *trace.steps))
    [place] = [index for index, step in enumerate(trace.steps) if step.kind == sync_kind]
    assert all(state["s-1.json"] == content for state, returned in states(trace) if returned)
    assert any(state.get("s-1.json") != content for state, returned in states(trace.without(place)) if returned)


def is_harmless(one: Step, two: Step) -> bool:
    """Two steps whose order cannot matter, or that cannot come in another order."""
    if "create" in (one.kind, two.kind) and one.file == two.file:
        return True  # nothing can be written to a file before it is made
    if "s-1.json" in (one.path, two.path) and "sync" in (one.kind, two.kind):
        return True  # `confirm` syncs what its writer has synced under another name
    if any(step.kind == "create" and step.path.endswith(".tmp") for step in (one, two)):
        return True  # a temporary file is nobody's document yet
    if any(step.path.endswith(".lock") for step in (one, two)):
        return True  # a lock file has no content, and a missing one is made
    if any(step.kind == "write" and step.path.startswith(".leases") for step in (one, two)):
        return True  # what a lease says is for people; what counts is its name, and the kernel's lock
    return not {"sync", "sync directory", "rename"} & {one.kind, two.kind}
