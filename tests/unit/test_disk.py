"""Every byte that goes to disk: which files are opened, and how writes are completed."""

from __future__ import annotations

import errno
import gc
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import persist
from persist.storage import disk

# --- names that are not plain files -----------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Return one of each kind of name that is no plain file."""
    kinds = {name: tmp_path / name for name in ("link", "dangling", "directory", "fifo", "socket")}
    (tmp_path / "target").write_bytes(b"target")
    kinds["link"].symlink_to(tmp_path / "target")
    kinds["dangling"].symlink_to(tmp_path / "nowhere")
    kinds["directory"].mkdir()
    os.mkfifo(kinds["fifo"])
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's path has at most 107 bytes, so bind by a short relative name.
        before = Path.cwd()
        os.chdir(tmp_path)
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
        yield kinds


FOUND = {
    "link": "a symbolic link",
    "dangling": "a symbolic link",
    "directory": "a directory",
    "fifo": "a FIFO",
    "socket": "a socket",
}


@pytest.mark.parametrize(("kind", "found"), FOUND.items())
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT], ids=["read", "write", "create"])
def test_only_a_plain_file_is_opened(kind: str, found: str, flags: int, odd: dict[str, Path]) -> None:
    """Anything but a plain file is `Unreadable` at once: a FIFO cannot block the opener, and a link is not followed."""
    with pytest.raises(persist.Unreadable) as caught:
        disk.open_plain(odd[kind], flags)
    assert (caught.value.path, caught.value.found) == (odd[kind], found)
    assert not (odd[kind].parent / "nowhere").exists()


def test_a_device_is_not_opened() -> None:
    """``/dev/null`` is no document, and is refused."""
    with pytest.raises(persist.Unreadable, match="/dev/null cannot be read: it is a device"):
        disk.read(Path("/dev/null"), 10)


def test_a_refused_name_leaks_no_descriptor(odd: dict[str, Path]) -> None:
    """A name that was opened only to look at it is closed again."""
    gc.collect()  # or the collector could close what earlier tests have dropped
    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    for kind in ("directory", "fifo"):
        with pytest.raises(persist.Unreadable):
            disk.open_plain(odd[kind], os.O_RDONLY)
    assert len(before) in (0, len(os.listdir("/proc/self/fd")))


def test_a_created_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    """A new file has mode 0600, and a new directory 0700, from the first instant."""
    before = os.umask(0)
    try:
        os.close(disk.create(tmp_path / "file"))
        disk.make_directory(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]


MADE, THERE = os.O_RDWR | os.O_CREAT, os.O_RDWR


@pytest.mark.parametrize(
    ("mode", "flags", "is_waited_for"),
    [(0o660, MADE, True), (0o640, THERE, True), (0o600, MADE, True), (0o600, THERE, False)],
)
def test_a_file_that_another_user_is_about_to_share_is_waited_for(
    mode: int, flags: int, is_waited_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the open and the chmod of its maker it has that one's umask.

    In a private store only root makes files for another user, and only such as are made on demand.
    """
    (tmp_path / "x").touch()
    opened, refusals = os.open, iter([PermissionError(errno.EACCES, "not yet")] * 3)

    def shared_soon(path: Path, flags: int, mode: int) -> int:
        if (refusal := next(refusals, None)) is not None:
            raise refusal
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", shared_soon)
    if is_waited_for:
        os.close(disk.open_plain(tmp_path / "x", flags, mode))
        refusals = iter([PermissionError(errno.EACCES, "never")] * 100_000)
    with pytest.raises(PermissionError):
        disk.open_plain(tmp_path / "x", flags, mode)


def test_a_directory_that_another_user_is_about_to_share_is_waited_for(tmp_path: Path) -> None:
    """Fails with one look: two servers that open a new store at the same time met that in 109 of 600 trials."""
    path = tmp_path / "d"
    path.mkdir(mode=0o700)
    sharing = threading.Timer(0.02, path.chmod, [0o2770])
    sharing.start()
    assert disk.awaited_mode(path, 0o070) == 0o2770
    sharing.join()
    path.chmod(0o700)
    assert disk.awaited_mode(path, 0o070) == 0o700


@pytest.mark.parametrize("kind", FOUND)
def test_a_file_is_never_created_over_anything(kind: str, odd: dict[str, Path]) -> None:
    """`create` succeeds only if the name was free. A dangling link is not free."""
    with pytest.raises(OSError):
        disk.create(odd[kind])
    assert not (odd[kind].parent / "nowhere").exists()


def test_a_file_that_others_make_and_remove_is_made_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is missing, then there, then gone is no error, but a reason to try again."""
    path, opened = tmp_path / "x", os.open
    answers = iter([FileNotFoundError(errno.ENOENT, "gone"), FileExistsError(errno.EEXIST, "there")])

    def race(path: Path, flags: int, mode: int) -> int:
        if (answer := next(answers, None)) is not None:
            raise answer
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", race)
    os.close(disk.open_plain(path, os.O_RDWR | os.O_CREAT))
    assert path.exists()


def test_a_directory_is_not_unlinked(tmp_path: Path) -> None:
    """A directory in the place of a document is named in the error, and stays."""
    (tmp_path / "s.json").mkdir()
    with pytest.raises(persist.Unreadable, match="is a directory"):
        disk.unlink(tmp_path / "s.json")
    assert (tmp_path / "s.json").is_dir()


# --- whole reads and whole writes -------------------------------------------------------------------------------------


def test_a_short_write_is_completed(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document is whole, although the kernel takes seven bytes at a time."""
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: whole(fd, bytes(content[:7])))
    store.create("s", {"text": "äöü😀" * 100})
    assert store.load("s").data == {"text": "äöü😀" * 100}


def test_a_short_read_is_completed(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document is whole, although the kernel gives seven bytes at a time. No read passes its limit."""
    store.create("s", {"text": "äöü😀" * 100})
    whole = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: whole(fd, min(size, 7)))
    assert store.load("s").data == {"text": "äöü😀" * 100}
    assert len(disk.read(store.path / "s.json", 100)) == 100


# --- replace ----------------------------------------------------------------------------------------------------------


class Busy:
    """An `os.replace` that a reader's open file blocks a number of times, as on Windows."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.calls = 0
        self._replace = os.replace

    def __call__(self, source: Path, target: Path) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise PermissionError(errno.EACCES, "a reader has it open")
        self._replace(source, target)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Busy]:
    def block(times: int) -> Busy:
        replace = Busy(times)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(disk, "REPLACE_ATTEMPTS", 4)
        monkeypatch.setattr(disk, "REPLACE_PAUSE_S", 0.0)
        return replace

    return block


def test_a_reader_that_has_the_file_open_is_waited_for(store: persist.Store, busy: Callable[[int], Busy]) -> None:
    """HAZARDS B4: Windows refuses to replace an open file. The store tries again, because readers are quick."""
    session = store.create("s", {"a": 1})
    replace = busy(3)
    session.data["a"] = 2
    session.save()
    assert replace.calls == 4
    assert store.load("s").data == {"a": 2}


def test_the_waiting_has_an_end(store: persist.Store, busy: Callable[[int], Busy]) -> None:
    """HAZARDS B4: after the last attempt comes a clear error. The old revision stands, and nothing is left over."""
    session = store.create("s", {"a": 1})
    replace = busy(100)
    session.data["a"] = 2
    with pytest.raises(persist.CommitFailed, match="a reader has it open") as caught:
        session.save()
    assert replace.calls == 4
    assert caught.value.errno == errno.EACCES
    assert (store.load("s").data, session.revision) == ({"a": 1}, 1)
    assert store.check() == []


def test_another_error_is_not_tried_again(store: persist.Store, tmp_path: Path, busy: Callable[[int], Busy]) -> None:
    """Only a busy reader goes away while the store waits, so any other error is raised at once."""
    replace = busy(0)
    with pytest.raises(FileNotFoundError):
        disk.replace(tmp_path / "missing", tmp_path / "target")
    assert replace.calls == 1
