"""Files that cannot be removed, and a journal that cannot be marked: nothing is lost, and the next verb works.

Every call to the kernel is real. A test refuses the calls that remove a file, or the one that writes the mark.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.faults import Call, FullDisk, injecting, refusing
from harness.files import file_engine
from harness.journals import has_journal, journal_of, parted

import persist
from persist.storage.journal import MARK

DATA: dict[str, Any] = {"title": "New chat", "messages": [{"id": "m1", "content": "hi"}]}
REFUSALS = (errno.EIO, errno.EACCES, errno.EROFS)


def staged(directory: Path) -> persist.Store:
    """Make a session with a journal of one record."""
    store = persist.Store(directory, journal="always")
    store.create("s", DATA)
    store.append("s", "messages", {"id": "m2"})
    return store


def ids(store: persist.Store) -> list[str]:
    """Return the ids of the messages that another process finds."""
    return [message["id"] for message in persist.Store(store.path).load("s").data["messages"]]


def files(store: persist.Store) -> dict[str, bytes]:
    """Return the contents of the session's files, but for its lock."""
    return {path.name: path.read_bytes() for path in store.path.glob("s.*") if path.suffix != ".lock"}


def fold_at_once(store: persist.Store) -> persist.Store:
    file_engine(store).options.fold_bytes = 1
    return store


# --- what cannot be removed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
def test_old_journal_that_cannot_be_removed_does_no_harm(directory: Path, error: int) -> None:
    """A fold succeeds even if the old journal cannot be removed.

    `check` names the old journal, and the next fold that may remove it does so. Fails if the error of the removal
    becomes that of the commit, or if the next fold forgets the old journal.
    """
    store = staged(directory)
    other = persist.Store(directory, journal="always")
    other.append("s", "messages", {"id": "m3"})
    old = journal_of(store)
    with refusing(lambda call, _: error if call.name == "unlink" else None) as calls:
        fold_at_once(store).append("s", "messages", {"id": "m4"})
    assert [call.path for call in calls if call.name == "unlink"] == [old]
    assert old.read_bytes().rstrip(b"\0").endswith(MARK)
    assert [(problem.kind, problem.path) for problem in store.check()] == [("left-over", old)]
    # A process that knows the old journal goes on in the new one.
    other.append("s", "messages", {"id": "m5"})
    assert ids(store) == ["m1", "m2", "m3", "m4", "m5"]
    store.append("s", "messages", {"id": "m6"})
    assert not old.exists()
    assert ids(store) == ["m1", "m2", "m3", "m4", "m5", "m6"]
    assert store.check() == []


def test_old_journal_that_nobody_could_remove_goes_with_a_compact(directory: Path) -> None:
    """`check` names the verb that removes an old journal. Fails if that verb does not remove it."""
    store = staged(directory)
    old = journal_of(store)
    with refusing(lambda call, _: errno.EIO if call.name == "unlink" else None):
        store.compact("s")
    [problem] = store.check()
    assert problem.path == old
    assert "persist compact" in problem.message
    store.compact("s")
    assert (old.exists(), store.check(), ids(store)) == (False, [], ["m1", "m2"])


@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
def test_temporary_file_that_cannot_be_removed_stops_documents_and_no_record(directory: Path, error: int) -> None:
    """A commit that needs the name of a temporary file fails with a typed error while that file stays. Others go on.

    Fails if the next document is written into the old file, or if the error is not typed.
    """
    store = staged(directory)
    temp = directory / "s.json.tmp"

    def refuse(call: Call, _before: list[Call]) -> int | None:
        is_sync = call.name == "fsync" and call.path == temp
        return error if is_sync or (call.name == "unlink" and call.path == temp) else None

    with refusing(refuse), pytest.raises(persist.CommitFailed):
        store.compact("s")
    left = temp.read_bytes()
    assert [problem.path for problem in store.check() if problem.path.suffix == ".tmp"] == [temp]
    with refusing(refuse):
        store.append("s", "messages", {"id": "m3"})
        with pytest.raises(persist.CommitFailed):
            store.compact("s")
        with pytest.raises(persist.CommitFailed):
            fold_at_once(persist.Store(directory)).append("s", "messages", 1)
    assert (temp.read_bytes(), ids(store)) == (left, ["m1", "m2", "m3"])
    store.compact("s")
    assert (temp.exists(), store.check(), ids(store)) == (False, [], ["m1", "m2", "m3"])


def test_files_of_a_deleted_session_that_cannot_be_removed_revive_nothing(directory: Path) -> None:
    """A delete removes the document first, so files that cannot be removed revive nothing.

    `check` names the files that are left, and a session of the same id begins anew.
    """
    store = staged(directory)
    old = journal_of(store)
    with refusing(lambda call, _: errno.EIO if call.name == "unlink" and call.path != store.path / "s.json" else None):
        store.delete("s")
    assert store.ids() == []
    assert [problem.path for problem in store.check() if problem.path.suffix == ".journal"] == [old]
    store.create("s", {"messages": [{"id": "new"}]})
    store.append("s", "messages", {"id": "newer"})
    assert ids(store) == ["new", "newer"]


# --- the mark that cannot be written ----------------------------------------------------------------------------------


def edited(store: persist.Store) -> None:
    document = store.path / "s.json"
    document.write_bytes(document.read_bytes().replace(b'"hi"', b'"ho"'))


def damaged(store: persist.Store) -> None:
    path = journal_of(store)
    path.write_bytes(path.read_bytes().replace(b'"m2"', b'"m?"'))


def nothing(_store: persist.Store) -> None:
    """Leave the session sound."""


def leave_by_an_append(store: persist.Store) -> object:
    return persist.Store(store.path, journal="never").append("s", "messages", {"id": "m3"})


Step = Callable[[persist.Store], object]
#: Each row has the change of the files, the verb, and the messages after it.
MARKING: dict[str, tuple[Step, Step, list[str] | None]] = {
    "fold by an append": (
        nothing,
        lambda store: fold_at_once(store).append("s", "messages", {"id": "m3"}),
        ["m1", "m2", "m3"],
    ),
    "fold by a cold append": (
        nothing,
        lambda store: fold_at_once(persist.Store(store.path, journal="always")).append("s", "messages", {"id": "m3"}),
        ["m1", "m2", "m3"],
    ),
    "fold by compact": (nothing, lambda store: store.compact("s"), ["m1", "m2"]),
    "leave by compact": (nothing, lambda store: store.compact("s", alone=True), ["m1", "m2"]),
    "leave by an append": (nothing, leave_by_an_append, ["m1", "m2", "m3"]),
    "delete": (nothing, lambda store: store.delete("s"), None),
    "delete by force": (nothing, lambda store: store.delete("s", force=True), None),
    "accept an edit": (edited, lambda store: store.accept("s"), ["m1", "m2"]),
    "accept a damaged journal": (damaged, lambda store: store.accept("s"), ["m1"]),
    "accept without the journal": (edited, lambda store: store.accept("s", drop_journal=True), ["m1"]),
}


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", MARKING)
def test_journal_that_cannot_be_marked_stays_in_use(directory: Path, name: str, error: int) -> None:
    """A journal goes out of use only with its mark, because a process may hold an old replica of it.

    Without the mark the verb fails and nothing is lost, and it works as soon as the disk does. Fails if the mark is
    left out, or if its error is ignored.
    """
    prepare, verb, after = MARKING[name]
    store = staged(directory)
    prepare(store)
    before = files(store)
    is_readable = prepare is nothing
    with refusing(lambda call, _: error if call.name == "pwrite" and call.content == MARK else None) as calls:
        with pytest.raises(persist.CommitFailed) as caught:
            verb(store)
    assert caught.value.errno == error
    assert not any(call.name in ("replace", "unlink") and call.path == store.path / "s.json" for call in calls)
    kept = {file: content for file, content in files(store).items() if not file.endswith(".damaged")}
    assert kept == before
    if is_readable:
        assert ids(store) == ["m1", "m2"]
    verb(store)
    if after is None:
        assert persist.Store(directory).ids() == []
    else:
        assert ids(store) == after


def test_mark_that_has_no_room_on_a_full_disk_lets_a_record_have_it(directory: Path) -> None:
    """A session takes a record as long as there is room for it, even if the mark of a fold has no room.

    Fails if the commit fails with the refused fold.
    """
    store = staged(directory)
    path, inode = journal_of(store), (directory / "s.json").stat().st_ino

    def refuse(call: Call, _before: list[Call]) -> int | None:
        return errno.ENOSPC if call.name == "pwrite" and call.content == MARK else None

    with refusing(refuse):
        fold_at_once(store).append("s", "messages", {"id": "m3"})
        with pytest.raises(persist.CommitFailed):
            store.compact("s")
    assert (journal_of(store), (directory / "s.json").stat().st_ino) == (path, inode)
    assert len(parted(path.read_bytes())[1]) == 2
    assert ids(store) == ["m1", "m2", "m3"]
    store.append("s", "messages", {"id": "m4"})
    assert not path.exists()
    assert has_journal(store)
    assert ids(store) == ["m1", "m2", "m3", "m4"]


@pytest.mark.parametrize("journal", ["never", "always"])
def test_full_disk_keeps_nobody_from_deleting(directory: Path, journal: Any) -> None:
    """A session can be deleted on a full disk, because a delete makes room.

    A journal needs one byte for its mark, and has it where it has room for more. Fails if a delete creates or lengthens
    a file.
    """
    store = persist.Store(directory, journal=journal)
    file_engine(store).options.room_bytes = 600
    store.create("s", DATA)
    for number in range(5):
        store.append("s", "messages", {"id": f"n{number}"})
    if journal == "always":
        assert journal_of(store).read_bytes().endswith(bytes(8))
    with injecting(FullDisk(0)) as full:
        store.delete("s")
    assert full.hits == 0
    assert persist.Store(directory).ids() == []
