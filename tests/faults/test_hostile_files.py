"""Hostile names: the file under a name of the store need not be the one that `persist` put there.

A store's directory is private (0700), so only its owner and root can plant anything. But a directory that was unpacked,
shared or restored may hold links. A server must neither hang on them nor reach through them.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actors import Actor
from harness.faults import make_socket, quick_directory
from harness.journals import journal_of
from harness.verbs import VERBS, Verb, within_deadline

import persist

NOBODY = 65534
SECRET = '{"secret":1,"messages":[]}'
AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def base() -> Iterator[Path]:
    with quick_directory() as directory:
        yield directory


class Victims:
    """Files and directories outside the store. `state` returns every trace that a change would leave on them."""

    def __init__(self, base: Path) -> None:
        self._base = base / "outside"
        self.directory = self._base / "directory"
        self.file = self._base / "file"
        self.directory.mkdir(parents=True)
        self.file.write_text(SECRET)
        # A sweep takes these names for those of leases.
        for name in ("resolv.conf", "s.t1", "s.t2"):
            (self.directory / name).write_text("needed")

    def state(self) -> dict[str, tuple[object, ...]]:
        return {str(path): self._state(path) for path in sorted(self._base.rglob("*"))}

    def _state(self, path: Path) -> tuple[object, ...]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        # A directory's time shows what was made and removed in it. A file's link count may fall, because it is not
        # content.
        return status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, content


def plant_socket(path: Path, _victims: Victims) -> None:
    make_socket(path)


def plant_directory(path: Path, _victims: Victims) -> None:
    path.mkdir()
    (path / "inside").write_text("kept")


def plant_device(path: Path, _victims: Victims) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device")


KINDS: dict[str, Callable[[Path, Victims], None]] = {
    "link to a file": lambda path, victims: path.symlink_to(victims.file),
    "link to a directory": lambda path, victims: path.symlink_to(victims.directory),
    "dangling link": lambda path, victims: path.symlink_to(victims.file.with_name("nowhere")),
    "link to itself": lambda path, _: path.symlink_to(path),
    "hard link": lambda path, victims: path.hardlink_to(victims.file),
    "FIFO": lambda path, _: os.mkfifo(path),
    "socket": plant_socket,
    "directory": plant_directory,
    "device": plant_device,
}
JOURNAL = "s.<journal>"
NAMES = (
    "s.json",
    "s.json.lock",
    "s.json.tmp",
    JOURNAL,
    f"{JOURNAL}.damaged",
    ".leases/s.t1",
    ".leases/s.t2",
    ".leases",
    ".events/s.t1",
    ".events",
)
#: A hard link to a file that grows in place cannot be told from the file itself. A backup may hold one.
APPENDED = (JOURNAL, ".events/s.t1")
PLANTED = [(name, kind) for name in NAMES for kind in KINDS if kind != "hard link" or name not in APPENDED]


def play(verb: Verb, name: str, kind: str, base: Path) -> None:
    """Play a verb on a store in which one name is planted, and judge what it did."""
    victims = Victims(base)
    is_journaled = name.startswith(JOURNAL)
    store = persist.Store(base / "sessions", timeout_s=1.0, journal="always" if is_journaled else "auto")
    store.create("s", {"title": "t", "messages": []})
    if is_journaled:
        name = name.replace(JOURNAL, journal_of(store).name)
    stream = store.start_stream("s", {"role": "user", "content": "Why?"}, stream_id="t1")
    stream._lease.close()
    session = store.load("s")
    planted = store.path / name
    planted.parent.mkdir(exist_ok=True)
    if planted.is_dir():
        shutil.rmtree(planted)
    planted.unlink(missing_ok=True)
    KINDS[kind](planted, victims)
    before = victims.state()
    result: object = None
    try:
        result = within_deadline(lambda: verb(store, session))
    except persist.PersistError:
        pass
    except OSError as error:
        if str(store.path) not in str(error):
            raise
    assert kind == "hard link" or "secret" not in repr(result), "it has read what a link points at"
    assert victims.state() == before, "what a link points at was touched"
    assert kind != "directory" or (planted / "inside").read_text() == "kept"


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_what_is_planted_under_a_name_is_refused_or_replaced_and_never_reached_through(name: str, kind: str) -> None:
    """Every verb answers at once. It does not read, write, truncate or unlink a link's target, or change its owner."""
    wrong = []
    for verb_name, verb in VERBS.items():
        with quick_directory() as base:
            try:
                play(verb, name, kind, base)
            except AssertionError as error:
                wrong.append(f"{verb_name}: {str(error).splitlines()[0]}")
            except Exception as error:
                wrong.append(f"{verb_name}: untyped {error!r}")
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


# --- the store's directory itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "hard link", "link to a file", "link to itself"])
def test_what_is_no_directory_is_no_store(kind: str, base: Path) -> None:
    """Opening a path that is not a directory is an error that names it, at once, and makes nothing."""
    victims = Victims(base)
    KINDS[kind](base / "sessions", victims)
    before = victims.state()
    with pytest.raises((persist.PersistError, OSError), match="sessions"):
        within_deadline(lambda: persist.Store(base / "sessions"))
    assert victims.state() == before


def test_a_link_to_a_store_is_that_store(base: Path) -> None:
    """The store follows only the link that the caller named, and both names share locks."""
    there = persist.Store(base / "there")
    there.create("s")
    (base / "here").symlink_to(base / "there")
    here = persist.Store(base / "here")
    assert (here.path, here.ids()) == (there.path, ["s"])
    with there.transaction("s"), pytest.raises(persist.LockError):
        here.append("s", "messages", 1)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_store_in_a_world_writable_directory_is_private_itself(mode: int, base: Path) -> None:
    """Other users cannot look or reach into a store in a world-writable directory.

    They can move it away if the parent has no sticky bit. Then every verb is an error. A new store that they put in its
    place is another one, and no older object saves into its sessions.
    """
    parent = base / "shared"
    parent.mkdir()
    parent.chmod(mode)
    store = persist.Store(parent / "sessions")
    session = store.create("s", {"a": 1})
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    store.path.rename(parent / "moved")
    with pytest.raises(persist.Unreadable):
        store.load("s")
    session.data["a"] = 2
    with pytest.raises(persist.Unreadable):
        session.save()
    with pytest.raises(persist.Unreadable):
        store.ids()
    persist.Store(parent / "sessions").create("s", {"a": "theirs"})
    with pytest.raises((persist.Unreadable, persist.SessionDeleted)):
        session.save()
    assert persist.Store(parent / "moved").load("s").data == {"a": 1}


# --- foreign owners ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(base: Path) -> Iterator[Actor]:
    """Start a process as root, and make it nobody, with a store that is nobody's.

    Root holds its session "s".
    """
    base.chmod(0o755)
    directory = base / "sessions"
    store = persist.Store(directory)
    store.create("s", {"messages": []})
    stream = store.start_stream("s", stream_id="t1")
    stream._lease.close()
    for path in (directory, *directory.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    actor = Actor(directory, timeout_s=1.0)
    # A module that is imported late must be imported while its files can be read.
    actor.do("store.load('s'); store.check(); store.create('warm'); store.start_stream('warm').finish()")
    for path in (directory, *directory.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    actor.do(f"session = store.load('s'); os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})")
    yield actor
    actor.close()


SWEEP = "for error in store.clear_stale_streams().failures.values(): raise error"
FOREIGN = {
    "s.json": (
        "store.load('s')",
        "store.head('s')",
        "store.append('s', 'm', 1)",
        "store.start_stream('s')",
        "store.delete('s')",
    ),
    "s.json.lock": (
        "store.append('s', 'm', 1)",
        "store.start_stream('s')",
        "store.delete('s')",
        "session.clear_stale_stream()",
    ),
    ".leases/s.t1": ("store.start_stream('s')", "session.clear_stale_stream()", SWEEP),
    ".leases": ("store.start_stream('s')", "session.clear_stale_stream()", SWEEP),
    ".": (
        "store.load('s')",
        "store.create('new')",
        "store.append('s', 'm', 1)",
        "store.ids()",
        "persist.Store(store.path)",
    ),
}


@AS_ROOT
@pytest.mark.skipif(sys.platform != "linux", reason="an actor hands a descriptor over, and changes its user")
@pytest.mark.parametrize("name", FOREIGN)
def test_what_belongs_to_another_user_is_an_error_that_names_it(name: str, nobody: Actor, base: Path) -> None:
    """The error names a file of another user, so that the operator can correct its owner.

    It is no traceback from deep inside.
    """
    path = base / "sessions" / name
    os.chown(path, 0, 0)
    before = (base / "sessions/s.json").read_bytes()
    for code in FOREIGN[name]:
        with pytest.raises((persist.PersistError, OSError), match="sessions") as caught:
            nobody.do(code)
        names = (str(path), path.name, str(base / "sessions"))
        assert any(each in str(caught.value) for each in names), f"{code}: {caught.value!r}"
        assert (base / "sessions/s.json").read_bytes() == before
    os.chown(path, NOBODY, NOBODY)
    nobody.do("store.start_stream('s').finish()")
    assert persist.Store(base / "sessions").check() == []


@AS_ROOT
@pytest.mark.parametrize("name", ["s.json", "s.json.lock", "s.json.tmp", ".leases/s.t1", ".leases/s.t2"])
@pytest.mark.parametrize("kind", ["hard link", "link to a file"])
def test_root_gives_nothing_away_in_a_directory_of_another_user(name: str, kind: str) -> None:
    """No verb that root runs may give a file of root's to another user.

    The owner of the directory could plant a link to such a file.
    """
    for verb_name, verb in VERBS.items():
        with quick_directory() as base:
            (base / "sessions").mkdir()
            os.chown(base / "sessions", NOBODY, NOBODY)
            try:
                play(verb, name, kind, base)
            except AssertionError as error:
                pytest.fail(f"{verb_name}: {error}", pytrace=False)
