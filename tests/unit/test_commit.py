"""Traces of a commit for other processes: marks for processes with an old replica, and durable records.

Without the marks, a process whose replica fits the document by chance would lose commits. Such a chance is real,
because the kernel reuses an inode number at once. Also, two changes within one tick of its clock have one time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from harness.files import file_engine
from harness.journals import journal_of, parted

import persist
from persist.storage import disk


@pytest.fixture
def one(directory: Path) -> persist.Store:
    """Return a process with a replica of a session that has three records in its journal."""
    store = opened(directory)
    store.create("s", {"messages": []})
    for number in range(1, 4):
        append(store, f"a{number}")
    return store


@pytest.fixture
def other(one: persist.Store) -> persist.Store:
    """Return another process, which knows nothing yet."""
    return opened(one.path)


def opened(directory: Path) -> persist.Store:
    store = persist.Store(directory, journal="always", timeout_s=20.0)
    file_engine(store).options.fold_bytes = math.inf
    return store


def append(store: persist.Store, message_id: str) -> None:
    store.append("s", "messages", {"id": message_id, "content": "x" * 100})


def ids(store: persist.Store) -> list[str]:
    return [message["id"] for message in opened(store.path).load("s").data["messages"]]


def fold(store: persist.Store) -> list[str]:
    store.compact("s")
    return ["a1", "a2", "a3"]


def leaving(store: persist.Store) -> list[str]:
    store.compact("s", alone=True)
    return ["a1", "a2", "a3"]


def accept(store: persist.Store) -> list[str]:
    store.accept("s", drop_journal=True)
    return []


def accept_of_damage(store: persist.Store) -> list[str]:
    path = journal_of(store)
    path.write_bytes(path.read_bytes().replace(b'"id":"a2"', b'"id":"a?"'))
    store.accept("s")
    return ["a1"]


def delete(store: persist.Store) -> list[str]:
    store.delete("s")
    store.create("s", {"messages": []})
    return []


OUT_OF_USE: list[Callable[[persist.Store], list[str]]] = [fold, leaving, accept, accept_of_damage, delete]


@pytest.mark.parametrize("verb", OUT_OF_USE, ids=lambda verb: verb.__name__)
def test_mark_keeps_an_old_replica_from_a_journal_out_of_use(
    one: persist.Store, other: persist.Store, tmp_path: Path, verb: Callable[[persist.Store], list[str]]
) -> None:
    """A process whose replica fits a later document by chance meets a mark, drops the replica and loses no commit."""
    old = journal_of(one)
    os.link(old, tmp_path / "kept")
    left = verb(other)
    append(other, "b")
    # A crash before the last step leaves the old journal.
    os.link(tmp_path / "kept", old)
    replica = file_engine(one).cache.take("s")
    assert replica is not None
    replica.version = disk.version_of(one.path / "s.json")
    file_engine(one).cache.put("s", replica)
    append(one, "c")
    assert ids(one) == [*left, "b", "c"]


def test_edit_that_keeps_size_and_time_is_seen(one: persist.Store) -> None:
    """A tool may set a file's time back. The time of its last status change still reveals the edit."""
    document = one.path / "s.json"
    times = document.stat()
    document.write_bytes(document.read_bytes().replace(b'"messages":[]', b'"messages":{}'))
    os.utime(document, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (document.stat().st_size, document.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    with pytest.raises(persist.CorruptSession):
        append(one, "b")


def test_accept_goes_by_the_files_and_not_by_a_replica(one: persist.Store) -> None:
    """The store may know good records that were damaged since.
    It drops them, because no other process could load them.
    """
    assert accept_of_damage(one) == ["a1"]
    assert ids(one) == ["a1"]


@contextmanager
def writes_to_journals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, bytes]]]:
    """Note the writes at a place of a file, and the syncs of data, for a block."""
    seen: list[tuple[str, int, bytes]] = []
    write_at, sync_data = disk.write_at, disk.sync_data

    def write(fd: int, content: bytes, position: int) -> None:
        seen.append(("write", position, bytes(content)))
        write_at(fd, content, position)

    def sync(fd: int) -> None:
        seen.append(("sync", 0, b""))
        sync_data(fd)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_at", write)
        patch.setattr(disk, "sync_data", sync)
        yield seen


def test_records_that_nobody_is_known_to_have_synced_are_written_again(
    one: persist.Store, other: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last record is written again with the next one, because its writer may have seen its fdatasync fail.
    The kernel may have dropped the pages then.
    """
    content = journal_of(one).read_bytes()
    last = parted(content)[1][-1]
    with writes_to_journals(monkeypatch) as seen:
        append(other, "b")
    record = parted(journal_of(one).read_bytes())[1][-1]
    assert seen == [("write", len(content) - len(last), last + record), ("sync", 0, b"")]
    with writes_to_journals(monkeypatch) as seen:
        append(other, "c")
    record = parted(journal_of(one).read_bytes())[1][-1]
    assert [content for _, _, content in seen] == [record, b""], "what it has synced itself is not written again"


def test_record_that_is_confirmed_is_written_again_and_synced(
    one: persist.Store, other: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append of a known id writes and syncs the record again, because another process may have failed to sync it."""
    content = journal_of(one).read_bytes()
    last = parted(content)[1][-1]
    with writes_to_journals(monkeypatch) as seen:
        append(other, "a3")
    assert seen == [("write", len(content) - len(last), last), ("sync", 0, b"")]
    assert journal_of(one).read_bytes() == content
    with writes_to_journals(monkeypatch) as seen:
        append(other, "a3")
    assert seen == []


def test_much_that_nobody_synced_is_folded_and_not_written_again(one: persist.Store, other: persist.Store) -> None:
    """A record above 64 KiB of another process costs a fold, which writes it to a new file."""
    before = journal_of(one)
    one.append("s", "messages", {"id": "long", "content": "x" * 70_000})
    assert journal_of(one) == before
    append(other, "b")
    assert journal_of(one) != before
    append(one, "c")
    assert ids(one) == ["a1", "a2", "a3", "long", "b", "c"]


def create_again(store: persist.Store) -> None:
    with pytest.raises(persist.SessionExists):
        store.create("s", {})


def look(store: persist.Store) -> None:
    with store.transaction("s") as tx:
        assert tx.list("messages")
    assert tx.version == store.head("s").version


def start_again(store: persist.Store) -> None:
    with pytest.raises(persist.AlreadyStarted):
        store.start_stream("s", PROMPT, once=True)


PROMPT = {"id": "p", "role": "user", "content": "?"}
ACKNOWLEDGED: dict[str, Callable[[persist.Store], object]] = {
    "append of a known id": lambda store: append(store, "a3"),
    "extend by known ids": lambda store: store.extend("s", "messages", store.load("s").data["messages"][1:]),
    "transaction that only looks": look,
    "start of what runs": start_again,
    "create": create_again,
    "cancel": lambda store: store.cancel("s", "run"),
    "save": lambda store: store.load("s").save(),
    "update": lambda store: store.update("s", lambda tx: None),
}


@contextmanager
def syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note the syncs of documents, directories and records, for a block."""
    seen: list[str] = []

    def noting(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def sync(*arguments: Any) -> None:
            seen.append(name)
            real(*arguments)

        return sync

    with monkeypatch.context() as patch:
        for name in ("sync_file", "sync_directory", "sync_data"):
            patch.setattr(disk, name, noting(name, getattr(disk, name)))
        yield seen


#: The sync of the store's own name, then the syncs of what the session's writer may have left.
SYNCS = ["sync_directory", "sync_file", "sync_directory", "sync_data"]


@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("verb", ACKNOWLEDGED)
def test_what_is_acknowledged_without_a_commit_is_made_durable(
    one: persist.Store, monkeypatch: pytest.MonkeyPatch, verb: str, mode: Literal["always", "never"]
) -> None:
    """A verb without a commit syncs all that the writer has written, because the writer may have died before its syncs.
    The store's own name is synced once.
    """
    owner = persist.Store(one.path, journal=mode)
    with owner.start_stream("s", PROMPT, stream_id="run"):
        owner.cancel("s", "run")
        revision, other = one.head("s").revision, persist.Store(one.path, journal=mode)
        with syncs(monkeypatch) as seen:
            ACKNOWLEDGED[verb](other)
        assert one.head("s").revision == revision
        assert seen == SYNCS[: 4 if mode == "always" else 3]


def test_accept_makes_the_name_of_the_store_durable(one: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accept` syncs the store's own name, because another process may just have made the directory.
    It takes another way to the disk than a commit.
    """
    path = one.path / "s.json"
    path.write_bytes(path.read_bytes().replace(b'"messages":', b'"edited":1,\n"messages":'))
    synced: list[str] = []
    real = disk.sync_directory

    def sync_directory(path: str, opened: int | None = None) -> None:
        synced.append(path)
        real(path, opened)

    monkeypatch.setattr(disk, "sync_directory", sync_directory)
    persist.Store(one.path).accept("s")
    assert synced[0] == str(one.path.parent)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_answer_that_a_start_acknowledges_is_made_durable(
    one: persist.Store, monkeypatch: pytest.MonkeyPatch, mode: Literal["always", "never"]
) -> None:
    """`AlreadyStarted` shows an answer only after a sync: a power cut must not take back what a client has seen."""
    owner = persist.Store(one.path, journal=mode)
    owner.start_stream("s", PROMPT).finish({"role": "assistant", "content": "!"})
    revision, other = one.head("s").revision, persist.Store(one.path, journal=mode)
    with syncs(monkeypatch) as seen:
        start_again(other)
    assert one.head("s").revision == revision
    assert seen == SYNCS[: 4 if mode == "always" else 3]
