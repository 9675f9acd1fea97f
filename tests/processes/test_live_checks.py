"""`check` and `backup` beside servers that commit, delete and create.

`check` names nothing that is sound (HAZARDS F11), and `backup` copies nothing that is not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from actors import eventually
from conftest import ActorFactory
from harness.live_checks import SESSIONS, check_live, servers_on

import persist

CHECKS = 400


def test_live_servers_are_no_problem(scratch: Path) -> None:
    """No check names anything while two servers save, fold, run turns, delete and create anew.

    `scripts/checks` is the long form. Without the lock 11 % of the checks name something. The test fails if the check
    judges by the listing alone (without `disk.exists(paths.temp)`). It also fails without the look for a journal that
    is gone (`disk.version_of(path)`).
    """
    checked = check_live(scratch / "sessions", CHECKS)
    assert checked.false_words == []
    assert (checked.checks, checked.commits > 4 * len(SESSIONS)) == (CHECKS, True)


@pytest.mark.parametrize("session_id", ["s-1", "user:7/chat", "long " * 50, "é"])
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_session_in_the_middle_of_a_commit_is_locked(
    store: persist.Store, actor: ActorFactory, step: str, session_id: str
) -> None:
    """The temporary file and the journals of a living writer are not left-overs.

    If the lock does not become free in time, the check names the session as locked. Fails if the check judges the files
    without the lock.
    """
    store.create(session_id, {"messages": []})
    writer = actor(journal="always")
    writer.do(f"store.append({session_id!r}, 'messages', 1)")
    writer.do("store._backend.engine.options.fold_bytes = 1")
    writer.start_and_pause(f"store.append({session_id!r}, 'messages', 2)", step)
    impatient = persist.Store(store.path, timeout_s=0.05)
    assert [(problem.session_id, problem.kind) for problem in impatient.check()] == [(session_id, "locked")]
    writer.go()
    writer.result()
    assert store.check() == []


@pytest.mark.parametrize("prune", [False, True], ids=["keep", "prune"])
def test_backup_of_live_servers_is_sound(directory: Path, tmp_path: Path, prune: bool) -> None:
    """Every backup is sound, whatever the servers do: each copy is whole, and is a commit that was made."""
    store, copy = persist.Store(directory, timeout_s=20), tmp_path / "copy"
    # The servers delete their sessions now and then. If all that have a copy were gone at once, it would not be pruned.
    store.create("kept")
    copied = 0
    with servers_on(directory, 2):
        eventually(lambda: len(store.ids()) == len(SESSIONS) + 1)
        for _ in range(20):
            done = store.backup(copy, prune=prune)
            copied += len(done.copied)
            assert done.failures == {}
            assert persist.Store(copy, create=False).check() == []
            assert not list(copy.glob("*.journal"))
    assert copied > len(SESSIONS) + 1, "the servers went on meanwhile"


@pytest.mark.parametrize("step", ["create", "write", "sync", "replace"])
def test_backup_that_is_killed_leaves_a_sound_copy(
    store: persist.Store, actor: ActorFactory, tmp_path: Path, step: str
) -> None:
    """The backup after a killed one removes what it left behind, and goes on."""
    for session_id in ("a", "b"):
        store.create(session_id, {"messages": []})
    copy = tmp_path / "copy"
    store.backup(copy)
    for session_id in ("a", "b", "new"):
        store.append(session_id, "messages", {"id": "later"}, create=True)
    victim = actor()
    victim.start_and_pause(f"store.backup({str(copy)!r})", step)
    victim.kill()
    assert {problem.kind for problem in persist.Store(copy, create=False).check()} <= {"left-over"}
    done = store.backup(copy)
    assert done.copied == ["a", "b", "new"]
    assert persist.Store(copy, create=False).check() == []
