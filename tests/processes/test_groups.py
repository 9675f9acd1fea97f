"""A store that a group of users shares: each user can use what the others write.

Each user is a child of this process, which must be root for that.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import runner_of

import persist
from persist.cli.commands import persist as command

#: The users, each with a group of their own, and the group that they share.
ANNA, BEN, OTHER, GROUP = 4001, 4002, 4003, 4100
LARGE = [{"id": f"m{number}", "role": "user", "content": "x" * 400} for number in range(300)]

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be several users of one group"
)


@pytest.fixture
def base() -> Iterator[Path]:
    """Make a directory that all users can reach, and that an administrator has given to the group."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    os.chown(path, ANNA, GROUP)
    path.chmod(0o2775)
    yield path
    shutil.rmtree(path)


def as_user(user: int, work: Callable[[], object], *, umask: int = 0o022) -> str:
    """Do some work in a child that is a user of the group (but for `OTHER`). Return its traceback, or an empty text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        told = ""
        try:
            os.umask(umask)
            os.setgroups([] if user == OTHER else [GROUP])
            os.setegid(user)
            os.seteuid(user)
            work()
        except BaseException:
            told = traceback.format_exc()
        finally:
            os.write(writing, told.encode()[-60_000:])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


def modes(path: Path) -> dict[str, int]:
    found = [path, *path.rglob("*")]
    return {str(each.relative_to(path)): stat.S_IMODE(each.lstat().st_mode) for each in found}


def talk(path: Path, name: str, **options: Any) -> None:
    """Make and use every kind of file."""
    store = persist.Store(path, keep_events_bytes=4096, **options)
    for session_id, messages in (("small", []), ("large", LARGE)):
        if not store.exists(session_id):
            store.create(session_id, {"messages": messages})
        store.append(session_id, "messages", {"id": f"{name} appends", "role": "user"})
        session = store.load(session_id)
        session.data["title"] = name
        session.save()
        with store.start_stream(session_id, {"id": name, "role": "user", "content": "?"}, stream_id=name) as stream:
            for _ in range(100):
                stream.emit({"token": "x" * 100})
            stream.checkpoint({"role": "assistant", "content": "par"})
            stream.finish({"role": "assistant", "content": "partial"})
        assert store.events(session_id, name, after=99)
    store.start_stream("small", {"id": f"{name} 2", "role": "user", "content": "?"}, stream_id=f"dead-{name}")
    store.create(f"damaged-{name}", {"messages": LARGE})
    store.append(f"damaged-{name}", "messages", {"id": "1"})
    store.append(f"damaged-{name}", "messages", {"id": "2"})
    (journal,) = path.glob(f"damaged-{name}.*.journal")
    journal.write_bytes(journal.read_bytes().replace(b'"id":"2"', b'"id":"3"'))
    store.accept(f"damaged-{name}")
    store.compact("large")
    assert store.check() != [], "the stream of this process is alive, and its copy of a journal is kept"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077], ids=oct)
@pytest.mark.parametrize(("mode", "directory_mode"), [(0o660, 0o2770), (0o640, 0o2750), (0o600, 0o700)])
def test_every_file_has_the_mode_whatever_the_umask(base: Path, umask: int, mode: int, directory_mode: int) -> None:
    """Every file has the mode that the store was given, whatever the umask.

    The files are documents, locks, journals and their copies, leases, events, and the temporary files that became some
    of them.
    """
    path = base / "a" / "chats"
    assert as_user(ANNA, lambda: talk(path, "anna", mode=mode), umask=umask) == ""
    found = modes(base / "a")
    directories = {name for name in found if (base / "a" / name).is_dir()}
    kinds = (".json", ".lock", ".journal", ".damaged", ".leases", ".events")
    assert all(any(kind in name for name in found) for kind in kinds)
    # The administrator's directory passes its setgid bit on.
    assert {found[name] | 0o2000 for name in directories} == {directory_mode | 0o2000}
    assert {name: oct(found[name]) for name in found.keys() - directories if found[name] != mode} == {}
    assert mode == 0o600 or {each.stat().st_gid for each in path.rglob("*")} == {GROUP}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_users_of_a_group_share_a_store(base: Path, umask: int) -> None:
    """Each user goes on with the other's sessions, clears the other's dead streams, and repairs what is left behind.

    Fails if the mode is left to the umask, or if files get the user's own group.
    """
    path = base / "chats"
    for name, user in (("anna", ANNA), ("ben", BEN), ("anna2", ANNA)):
        assert as_user(user, partial(talk, path, name, mode=0o660), umask=umask) == ""
    assert as_user(BEN, lambda: persist.Store(path, mode=0o660).clear_stale_streams(), umask=umask) == ""
    assert as_user(BEN, lambda: persist.Store(path, mode=0o660).delete("large"), umask=umask) == ""
    assert {name for name, mode in modes(path).items() if mode not in (0o660, 0o2770)} == set()
    assert "ermission denied" in as_user(OTHER, lambda: persist.Store(path, create=False).load("small"))


def test_readers_of_a_group_read(base: Path) -> None:
    """With 0640 the owner writes, and the group only reads."""
    path = base / "chats"
    assert as_user(ANNA, lambda: talk(path, "anna", mode=0o640), umask=0o077) == ""
    assert as_user(BEN, lambda: persist.Store(path, mode=0o640, create=False).load("large")) == ""
    refused = as_user(BEN, lambda: persist.Store(path, mode=0o640, create=False).append("small", "messages", {}))
    assert "LockError" in refused
    assert "Permission denied" in refused


def look_as_a_reader(path: Path, stream_id: str) -> None:
    """Look at a session whose stream runs. Nothing may be said of it that is not so."""
    store = persist.Store(path, mode=0o640, create=False)
    assert store.check() == []
    following = store.follow("busy", stream_id)
    assert [next(following).data for _ in range(2)] == [1, 2]
    for look in (store.streams, lambda: store.stream("busy")):
        with pytest.raises(persist.LockError, match="may not be taken here: Permission denied") as caught:
            look()
        assert caught.value.kind == "refused"


def test_readers_of_a_group_are_told_nothing_false(base: Path) -> None:
    """Whether a stream lives can be known under the lock only, which a reader may not take.

    Fails if that is taken for a damage of the session, or for a session without a stream.
    """
    path = base / "chats"

    def run_a_turn() -> None:
        store = persist.Store(path, mode=0o640)
        store.create("busy", {"messages": []})
        with store.start_stream("busy") as stream:
            stream.emit(1, 2)
            (base / "stream").write_text(stream.id)
            deadline = time.monotonic() + 60
            while not (base / "done").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)

    told: list[str] = []
    owner = threading.Thread(target=lambda: told.append(as_user(ANNA, run_a_turn, umask=0o022)))
    owner.start()
    try:
        deadline = time.monotonic() + 60
        while not (base / "stream").exists() or not (base / "stream").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert as_user(BEN, partial(look_as_a_reader, path, (base / "stream").read_text())) == ""
    finally:
        (base / "done").touch()
        owner.join()
    assert told == [""]


def test_a_directory_that_keeps_the_group_out_is_refused(base: Path) -> None:
    """The store refuses such a directory when it opens.

    Otherwise the first member of the group would fail in the middle of a verb.
    """
    path = base / "chats"
    assert as_user(ANNA, lambda: persist.Store(path).create("s")) == ""
    told = as_user(ANNA, lambda: persist.Store(path, mode=0o660))
    assert "InvalidArgument" in told
    assert "chmod 2770" in told
    for each in (path, path / ".leases"):
        each.chmod(0o770)
    assert as_user(ANNA, lambda: persist.Store(path, mode=0o660).create("t")) == ""


def test_a_directory_without_setgid_gives_its_group_all_the_same(base: Path) -> None:
    """A file gets the group of its directory, which need not be the user's own."""
    path = base / "chats"
    path.mkdir()
    os.chown(path, ANNA, GROUP)
    path.chmod(0o770)
    assert as_user(ANNA, lambda: talk(path, "anna", mode=0o660), umask=0o077) == ""
    assert as_user(BEN, lambda: talk(path, "ben", mode=0o660), umask=0o077) == ""
    assert {each.stat().st_gid for each in path.rglob("*")} == {GROUP}


@pytest.mark.parametrize("user", [BEN, ANNA, 0], ids=["ben", "anna", "root"])
def test_the_commands_go_by_the_directorys_mode(base: Path, user: int) -> None:
    """The other users can use what a command has written, also if root ran it."""
    path = base / "chats"
    assert as_user(ANNA, lambda: talk(path, "anna", mode=0o660)) == ""
    (base / "new.json").write_text('{"messages": []}', encoding="utf-8")

    def mend() -> None:
        run = runner_of(command)
        (path / "small.json").write_bytes(b"")
        for words in (("replace", path, "small", base / "new.json"), ("compact", path, "large"), ("clear-stale", path)):
            done = run(*words)
            assert done.exit_code == 0, done.output

    if user:
        assert as_user(user, mend, umask=0o077) == ""
    else:
        mend()
    assert {name for name, mode in modes(path).items() if mode not in (0o660, 0o2770)} == set()
    for each in (ANNA, BEN):
        assert as_user(each, lambda: persist.Store(path, mode=0o660).append("small", "messages", {"a": 1})) == ""


@pytest.mark.parametrize("mode", [0, 0o400, 0o666, 0o644, 0o700, 0o770, -1, "660", True, None, 660])
def test_another_mode_is_refused(directory: Path, mode: Any) -> None:
    """A mode that gives others access is refused, because a chat is private to the group. So is 660 in decimal."""
    with pytest.raises(persist.InvalidArgument, match="mode is"):
        persist.Store(directory, mode=mode)
    assert not directory.exists()
