"""Acknowledged commits are durable, even if a sync fails after the rename, or if a dead process left them unsynced.

Every call to the kernel is real. A test refuses one of them, and looks at those that follow.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from actors import Actor
from conftest import ActorFactory
from harness.faults import Call, Refuse, refusing
from harness.files import file_engine
from harness.journals import has_journal, journal_of, parted, record_of

import persist
from persist.storage.commit import MOST_UNSYNCED_BYTES, Mode

DATA: dict[str, Any] = {"title": "New chat", "messages": [{"id": "m1", "content": "hi"}]}
M2, M3, M4 = ({"id": each, "content": each * 40} for each in ("m2", "m3", "m4"))


def ids(store: persist.Store) -> list[str]:
    """Return the ids of the messages that another process finds."""
    return [message["id"] for message in persist.Store(store.path).load("s").data["messages"]]


def is_sync_of(path: Path) -> Callable[[Call], bool]:
    return lambda call: call.name in ("fsync", "fdatasync") and call.path == path


# --- the directory's sync after the rename ----------------------------------------------------------------------------


def failing_after_rename(store: persist.Store, times: float) -> Refuse:
    """Refuse the first syncs of the directory that follow on a rename."""
    refused = list[Call]()

    def refuse(call: Call, before: list[Call]) -> int | None:
        is_renamed = any(each.name == "replace" for each in before)
        if not is_renamed or not is_sync_of(store.path)(call) or len(refused) >= times:
            return None
        refused.append(call)
        return errno.EIO

    return refuse


RENAMING: dict[str, tuple[str, Callable[[persist.Store], object], list[str]]] = {
    "create": ("never", lambda store: store.create("s", DATA), ["m1"]),
    "create with a journal": ("always", lambda store: store.create("s", DATA), ["m1"]),
    "append": ("never", lambda store: store.append("s", "messages", M2), ["m1", "m2"]),
    "fold by an append": ("folding", lambda store: store.append("s", "messages", M2), ["m1", "m2"]),
    "fold by compact": ("always", lambda store: store.compact("s", alone=True), ["m1", "m0"]),
}


def staged(directory: Path, mode: str, name: str) -> persist.Store:
    store = persist.Store(directory, journal="never" if mode == "never" else "always")
    if not name.startswith("create"):
        store.create("s", DATA)
    if name == "fold by compact":
        store.append("s", "messages", {"id": "m0"})
    if mode == "folding":
        file_engine(store).options.fold_bytes = 1
    return store


@pytest.mark.parametrize("name", RENAMING)
def test_directory_whose_sync_fails_after_the_rename_is_written_to_once_more(directory: Path, name: str) -> None:
    """If the directory's sync fails, the document is written again, to another inode, and synced.

    The commit is visible and not durable before that. Fails if the verb returns without the second try, or if it
    reports a visible commit as failed.
    """
    mode, verb, wanted = RENAMING[name]
    store = staged(directory, mode, name)
    with refusing(failing_after_rename(store, 1)) as calls:
        verb(store)
    document = store.path / "s.json"
    renames = [number for number, call in enumerate(calls) if call.name == "replace" and call.path == document]
    assert len(renames) == 2
    assert any(is_sync_of(store.path)(call) for call in calls[renames[1] :])
    assert any(is_sync_of(store.path / "s.json.tmp")(call) for call in calls[renames[0] : renames[1]])
    assert ids(store) == wanted
    has_journal(store)
    assert store.check() == []
    store.append("s", "messages", M3)
    assert ids(store) == [*wanted, "m3"]


@pytest.mark.parametrize("name", RENAMING)
def test_directory_whose_syncs_all_fail_after_the_rename_is_an_unknown_commit(directory: Path, name: str) -> None:
    """If all syncs of the directory fail, the verb raises CommitUnknown.

    The store writes and acknowledges nothing until a new one has looked. Fails if the second failure is taken for
    "nothing was written", or is forgotten.
    """
    mode, verb, wanted = RENAMING[name]
    store = staged(directory, mode, name)
    with refusing(failing_after_rename(store, float("inf"))), pytest.raises(persist.CommitUnknown):
        verb(store)
    for again in (
        lambda: store.append("s", "messages", M3),
        lambda: store.load("s").save(),
        lambda: store.compact("s"),
    ):
        with pytest.raises(persist.CommitUnknown):
            again()
    assert ids(store) == wanted
    fresh = persist.Store(store.path)
    with refusing() as calls:
        fresh.load("s").save()
    assert [call.path for call in calls if call.name == "fsync"][-2:] == [store.path / "s.json", store.path]
    fresh.append("s", "messages", M3)
    assert ids(store) == [*wanted, "m3"]


# --- what a dead process left unsynced --------------------------------------------------------------------------------

KILLED_AT_ITS_SYNC = "import signal\nos.fdatasync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"


def append_and_die(actor: Actor, item: dict[str, str]) -> None:
    """Append a record in another process, which dies in its fdatasync, so that the fate of its pages is unknown."""
    actor.start(f"{KILLED_AT_ITS_SYNC}store.append('s', 'messages', {item!r})")
    actor.process.wait(60)


def journaled(directory: Path) -> persist.Store:
    store = persist.Store(directory, journal="always")
    store.create("s", DATA)
    store.append("s", "messages", {"id": "m0"})
    return store


@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
def test_record_that_a_dead_process_did_not_sync_is_written_again_with_the_next_one(
    directory: Path, actor: ActorFactory, is_warm: bool
) -> None:
    """A record that a dead process did not sync is written again, in one write with the next record.

    An fdatasync alone proves nothing after one that failed elsewhere. Fails without `tail.unsynced` in that write.
    """
    store = journaled(directory)
    end = len(journal_of(store).read_bytes())
    append_and_die(actor(journal="always"), M2)
    left = journal_of(store).read_bytes()[end:]
    assert record_of(left)["changes"] == [{"in": "messages", "at": 2, "insert": [M2]}]
    if not is_warm:
        store = persist.Store(directory, journal="always")
    with refusing() as calls:
        store.append("s", "messages", M3)
    [written] = [call for call in calls if call.name == "pwrite"]
    start = end - (written.position or 0)
    # A process that did not write the earlier record cannot know that it is durable either.
    assert start == 0 or (not is_warm and written.position == record_of(left)["synced"])
    assert written.content[start : start + len(left)] == left
    assert record_of(written.content[start + len(left) :])["changes"] == [{"in": "messages", "at": 3, "insert": [M3]}]
    assert [call.name for call in calls if call.path == written.path] == ["pwrite", "fdatasync"]
    assert calls.index(written) < len(calls) - 1
    assert ids(store) == ["m1", "m0", "m2", "m3"]
    with refusing() as calls:
        store.append("s", "messages", M4)
    assert [
        len(parted(b"%b%b" % (parted(journal_of(store).read_bytes())[0], call.content))[1]) for call in calls[:1]
    ] == [1]


def test_much_that_a_dead_process_did_not_sync_is_folded(directory: Path, actor: ActorFactory) -> None:
    """Above 64 KiB of unsynced records a new document costs less than writing them again. Fails without the limit."""
    store = journaled(directory)
    old = journal_of(store)
    append_and_die(actor(journal="always"), M2 | {"content": "x" * MOST_UNSYNCED_BYTES})
    # This bound is so large that the size of the journal alone is no reason to fold.
    file_engine(store).options.fold_bytes = float("inf")
    with refusing() as calls:
        store.append("s", "messages", M3)
    assert [call.content for call in calls if call.name == "pwrite"] == [b"?"]
    assert [call.path.name for call in calls if call.name == "replace"] == ["s.json"]
    assert not old.exists()
    assert ids(store) == ["m1", "m0", "m2", "m3"]


# --- acknowledgements without a write ---------------------------------------------------------------------------------


def save_of_nothing(store: persist.Store) -> None:
    store.load("s").save()


def append_of_what_is_there(store: persist.Store) -> object:
    return store.append("s", "messages", M2)


def update_of_nothing(store: persist.Store) -> object:
    return store.update("s", lambda tx: None)


def transaction_of_nothing(store: persist.Store) -> object:
    with store.transaction("s") as tx:
        return len(tx.list("messages"))


def create_of_what_exists(store: persist.Store) -> object:
    with pytest.raises(persist.SessionExists):
        store.create("s", DATA)
    return None


def cancel_once_more(store: persist.Store) -> object:
    return store.cancel("s", "t1")


def accept_of_what_is_sound(store: persist.Store) -> object:
    return store.accept("s")


ACKNOWLEDGED = (
    save_of_nothing,
    append_of_what_is_there,
    update_of_nothing,
    transaction_of_nothing,
    create_of_what_exists,
    cancel_once_more,
    accept_of_what_is_sound,
)
Verb = Callable[[persist.Store], object]


@pytest.fixture(params=["journaled", "alone"])
def unsynced(request: pytest.FixtureRequest, directory: Path, actor: ActorFactory) -> persist.Store:
    """Make a session whose last commit was made by a process that died before its syncs.

    Return a new store. A cancel of the session's stream has been requested already.
    """
    mode: Mode = "always" if request.param == "journaled" else "never"
    other = actor(journal=mode)
    other.do(f"store.create('s', {DATA!r})\nstream = store.start_stream('s', stream_id='t1')")
    other.do("store.cancel('s', 't1')")
    if request.param == "journaled":
        # The stream's process lives, so a second cancel is a request again.
        append_and_die(actor(journal=mode), M2)
    else:
        dying = actor(journal=mode)
        dying.start(
            "import signal\nreal = os.fsync\n"
            "def fsync(fd):\n"
            "    os.kill(os.getpid(), signal.SIGKILL) if os.path.isdir(f'/proc/self/fd/{fd}') else real(fd)\n"
            f"store._backend.engine.make_durable()\nos.fsync = fsync\nstore.append('s', 'messages', {M2!r})"
        )
        dying.process.wait(60)
    assert ids(persist.Store(directory)) == ["m1", "m2"]
    store = persist.Store(directory, journal=mode)
    file_engine(store).make_durable()
    return store


@pytest.mark.parametrize("acknowledge", ACKNOWLEDGED, ids=lambda verb: verb.__name__)
def test_acknowledgement_without_a_write_makes_all_of_it_durable_first(
    unsynced: persist.Store, acknowledge: Verb
) -> None:
    """An acknowledgement without a write syncs the document, the directory and the unsynced part of the journal first.

    The caller takes the answer for a commit. Fails without `confirm`, and if it forgets one of the three.
    """
    store, document = unsynced, unsynced.path / "s.json"
    before = document.read_bytes()
    with refusing() as calls:
        acknowledge(store)
    syncs = [call.path for call in calls if call.name in ("fsync", "fdatasync")]
    assert syncs[:2] == [document, store.path]
    if has_journal(store):
        path = journal_of(store)
        [written] = [call for call in calls if call.name == "pwrite"]
        content = path.read_bytes().rstrip(b"\0")
        assert (written.path, written.position) == (path, len(content) - len(written.content))
        # The record that its writer did not sync is the last one.
        assert parted(content)[1][-1] in written.content
        assert syncs[2:] == [path]
        assert calls.index(written) < len(calls) - 1
    assert document.read_bytes() == before
    assert ids(store) == ["m1", "m2"]


@pytest.mark.parametrize("acknowledge", ACKNOWLEDGED, ids=lambda verb: verb.__name__)
def test_acknowledgement_is_refused_where_nothing_can_be_made_durable(
    unsynced: persist.Store, acknowledge: Verb
) -> None:
    """No verb acknowledges a commit if no sync works. Fails if an error of those syncs is ignored."""

    def refuse(call: Call, _before: list[Call]) -> int | None:
        return errno.EIO if call.name in ("fsync", "fdatasync") else None

    with refusing(refuse), pytest.raises((persist.CommitUnknown, persist.CommitFailed)):
        acknowledge(unsynced)
    with pytest.raises(persist.CommitUnknown):
        acknowledge(unsynced)
    assert ids(unsynced) == ["m1", "m2"]
    acknowledge(persist.Store(unsynced.path))


@pytest.mark.parametrize("place", [0, 1], ids=["document", "directory"])
def test_document_whose_sync_failed_is_written_anew_before_it_is_acknowledged(directory: Path, place: int) -> None:
    """A document whose fsync failed is written anew, because its inode is never trusted again.

    A file that was synced once is not synced again. Fails if the sync is only tried once more, or if the store takes
    the first one for done.
    """
    journaled(directory)
    store, document = persist.Store(directory, journal="always"), directory / "s.json"
    inode = document.stat().st_ino
    failing = [document, directory][place]

    def refuse(call: Call, before: list[Call]) -> int | None:
        return errno.EIO if is_sync_of(failing)(call) and not any(map(is_sync_of(failing), before)) else None

    with refusing(refuse) as calls:
        store.load("s").save()
    [rename] = [number for number, call in enumerate(calls) if call.name == "replace"]
    assert is_sync_of(directory)(calls[rename + 1])
    assert any(is_sync_of(directory / "s.json.tmp")(call) for call in calls[:rename])
    assert document.stat().st_ino != inode
    with refusing() as calls:
        store.load("s").save()
        store.append("s", "messages", {"id": "m0"})
    assert calls == []
