"""`check` beside servers that commit, delete and create: it names nothing that is sound (HAZARDS F11)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ActorFactory
from harness.live_checks import SESSIONS, check_live

import persist

CHECKS = 400


def test_live_servers_are_no_problem(scratch: Path) -> None:
    """Two servers save, fold, run turns, delete and create anew. No check names anything. `scripts/checks` is the
    long form.

    Without the lock 11 % of the checks name something: judge by the listing alone (`disk.exists(paths.temp)` out), or
    leave the look for a journal that is gone out (`disk.version_of(path)`), and this fails.
    """
    checked = check_live(scratch / "sessions", CHECKS)
    assert checked.false_words == []
    assert (checked.checks, checked.commits > 4 * len(SESSIONS)) == (CHECKS, True)


@pytest.mark.parametrize("session_id", ["s-1", "user:7/chat", "long " * 50, "é"])
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_session_in_the_middle_of_a_commit_is_locked(
    store: persist.Store, actor: ActorFactory, step: str, session_id: str
) -> None:
    """Its temporary file and its journals are nobody's left-overs while its writer lives. If the lock is not free in
    time, that is what the check says.

    Fails if what is found is judged without the lock.
    """
    store.create(session_id, {"messages": []})
    writer = actor(journal="always")
    writer.do(f"store.append({session_id!r}, 'messages', 1)")
    writer.do("store._backend.files.options.fold_bytes = 1")
    writer.start_and_pause(f"store.append({session_id!r}, 'messages', 2)", step)
    impatient = persist.Store(store.path, timeout_s=0.05)
    assert [(problem.session_id, problem.kind) for problem in impatient.check()] == [(session_id, "locked")]
    writer.go()
    writer.result()
    assert store.check() == []
