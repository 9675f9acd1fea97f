"""File systems: which ones the store trusts, which ones it refuses, and what a probe finds out about the others."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.conftest import runner_of
from unit.test_costs import counted

import persist
import persist.aio
from persist.cli.commands import persist as command
from persist.storage import disk, file_system, held
from persist.storage.file_system import Mount, mount_of

# --- the mount table --------------------------------------------------------------------------------------------------


def mount(
    point: str,
    kind: str,
    *,
    fields: str = "shared:1",
    source: str = "source",
    options: str = "rw",
    device: str = "0:9999",
) -> str:
    return f"36 25 {device} / {point} rw,relatime {fields} - {kind} {source} {options}"


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put lines in place of the kernel's mount table."""

    def use(*lines: str) -> None:
        table = tmp_path / "mountinfo"
        table.write_text("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(file_system, "MOUNTS", table)
        monkeypatch.setattr(file_system, "_judged", {})

    return use


Mounts = Callable[..., None]


def kind_of(path: str | Path) -> str:
    """The kind of the mount of a directory, which need not be there."""
    with pytest.MonkeyPatch.context() as patched:
        if not Path(path).exists():
            patched.setattr(disk, "identity_of", lambda _path: (0, 0))
        return mount_of(Path(path)).kind


def test_a_mount_that_is_hidden_holds_nothing(mounts: Mounts, tmp_path: Path) -> None:
    """Under a later mount on a directory above it a mount is out of reach. The device tells which one holds a path.

    Fails by the longest mount point alone, which takes the hidden one.
    """
    inner = tmp_path / "inner"
    inner.mkdir()
    number = inner.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    hidden, covering = mount(str(inner), "ext4"), mount(str(tmp_path), "nfs4", device=device)
    mounts(mount("/", "ext4"), hidden, covering)
    assert mount_of(inner).kind == "nfs4"
    mounts(mount("/", "ext4"), mount(str(tmp_path), "btrfs"), mount(str(inner), "btrfs"))
    assert mount_of(inner).kind == "btrfs"


def test_the_longest_mount_point_holds_the_directory(mounts: Mounts) -> None:
    """A mount further down covers the one above, in any order of the table. A similar name beside it does not."""
    mounts(mount("/mnt/a/b", "xfs"), mount("/", "ext4"), mount("/mnt/a", "nfs4"), mount("/mnt/a/bc", "tmpfs"))
    assert kind_of("/mnt/a/b") == "xfs"
    assert kind_of("/mnt/a/b/deep/er") == "xfs"
    assert kind_of("/mnt/a/other") == "nfs4"
    assert kind_of("/mnt/a/bcd") == "nfs4"
    assert kind_of("/mnt") == "ext4"
    assert kind_of("/") == "ext4"


def test_a_later_mount_covers_an_earlier_one_at_the_same_place(mounts: Mounts) -> None:
    """The later of two mounts at one place counts, because the earlier one is out of reach."""
    mounts(mount("/", "ext4"), mount("/mnt/a", "ext4"), mount("/mnt/a", "nfs"))
    assert kind_of("/mnt/a/x") == "nfs"


def test_a_mount_points_escapes_are_read(mounts: Mounts) -> None:
    """The table's octal numbers are read as characters: the kernel writes space, tab, newline and backslash so."""
    mounts(mount("/", "ext4"), mount(r"/mnt/a\040b", "cifs"), mount(r"/mnt/c\011d\012e\134f", "ceph"))
    assert kind_of("/mnt/a b/x") == "cifs"
    assert kind_of("/mnt/c\td\ne\\f/x") == "ceph"


def test_an_escaped_backslash_is_read_once(mounts: Mounts) -> None:
    """A name that looks like an escape stays what it is."""
    mounts(mount("/", "ext4"), mount(r"/mnt/a\134040b", "nfs"))
    assert kind_of(r"/mnt/a\040b/x") == "nfs"


@pytest.mark.parametrize("fields", ["", "shared:1 master:2", "shared:1 propagate_from:3"])
def test_any_number_of_optional_fields_may_stand_before_the_kind(mounts: Mounts, fields: str) -> None:
    """The kind follows the lone hyphen, wherever that is (proc_pid_mountinfo(5))."""
    mounts(mount("/", "btrfs", fields=fields).replace("  ", " "))
    assert kind_of("/srv") == "btrfs"


def test_a_symbolic_link_leads_to_the_file_system_of_its_target(mounts: Mounts, tmp_path: Path) -> None:
    """A link has the file system of its target. The link's own place says nothing."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    mounts(mount("/", "ext4"), mount(str(tmp_path / "far"), "nfs"))
    assert kind_of(tmp_path / "near") == "nfs"


# --- what is known ----------------------------------------------------------------------------------------------------

GOOD = [
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "nilfs2", "bcachefs", "tmpfs", "ramfs", "rootfs"),
    *("lxfs", "wslfs", "ecryptfs"),
]


@pytest.mark.parametrize("kind", GOOD)
def test_a_local_file_system_is_accepted_in_silence(kind: str, mounts: Mounts, directory: Path) -> None:
    """A local file system gets no warning and no probe. A probe would cost a thread and two more files."""
    mounts(mount("/", kind))
    threads: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "Thread", lambda **options: threads.append(options["name"]))
        persist.Store(directory)
    assert threads == []


def test_an_overlay_of_a_container_is_accepted_in_silence(mounts: Mounts, directory: Path) -> None:
    """An overlay gets no warning, because it is the root of most containers."""
    mounts(mount("/", "overlay", source="overlay", options="rw,lowerdir=/l1:/l2,upperdir=/u,workdir=/w,xino=off"))
    persist.Store(directory)


BAD = {
    **{kind: (mount("/", kind), kind) for kind in ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs")},
    **{kind: (mount("/", kind), kind) for kind in ("virtiofs", "fakeowner", "vboxsf", "prl_fs", "beegfs", "orangefs")},
    **{kind: (mount("/", kind), kind) for kind in ("drvfs", "afs", "vmhgfs", "fuse.grpcfuse", "fuse.osxfs")},
    "VMware by FUSE": (mount("/", "fuse.vmhgfs-fuse"), "fuse.vmhgfs-fuse"),
    "GlusterFS by FUSE": (mount("/", "fuse.glusterfs", source="host:/volume"), "fuse.glusterfs"),
    "an object store": (mount("/", "fuse.s3fs", source="s3fs"), "fuse.s3fs"),
    "FUSE, by its source": (mount("/", "fuse", source="gcsfuse"), "fuse (gcsfuse)"),
    "FUSE, by an option": (mount("/", "fuse", source="bucket", options="rw,subtype=rclone"), "fuse (rclone)"),
    "WSL 2": (mount("/", "9p", source=r"C:\134", options=r"rw,aname=drvfs;path=C:\134;uid=1000"), "9p (drvfs)"),
    "WSL 2 by virtiofs": (mount("/", "virtiofs", source="drvfsC"), "virtiofs"),
    "Docker Desktop": (mount("/", "fakeowner", source="/run/host_mark/Users"), "fakeowner"),
    "Docker Desktop, by its source": (mount("/", "shinyfs", source="/run/host_mark/Users"), "shinyfs (fakeowner)"),
    "OCFS2 with local locks": (mount("/", "ocfs2", options="rw,localflocks,heartbeat=local"), "ocfs2"),
    "GFS2 with local locks": (mount("/", "gfs2", options="rw,localflocks"), "gfs2"),
    "a cluster of tomorrow": (mount("/", "newfs", options="rw,local_lock=flock"), "newfs"),
}


@pytest.mark.parametrize(("line", "named"), BAD.values(), ids=BAD)
def test_a_file_system_whose_locks_do_not_hold_is_refused(
    line: str, named: str, mounts: Mounts, directory: Path
) -> None:
    """HAZARDS F8: a file system is refused by its kind, or by other signs of its mount.
    `unsafe_filesystem=True` accepts it, on the caller's own word.
    """
    mounts(line)
    with pytest.raises(persist.InvalidArgument) as caught:
        persist.Store(directory)
    assert f"on {named};" in str(caught.value)
    assert "unsafe_filesystem=True" in caught.value.remedy
    assert caught.value.path == directory
    store = persist.Store(directory, unsafe_filesystem=True)
    store.create("s", {"a": 1})
    assert store.load("s").data == {"a": 1}
    with pytest.raises(persist.InvalidArgument, match="on "):
        persist.Store(directory)


def test_the_command_line_can_be_told_that_a_file_system_is_unsafe(mounts: Mounts, store: persist.Store) -> None:
    """HAZARDS F15: a store that was opened with `unsafe_filesystem=True` can be looked at with the commands, too."""
    store.create("s", {"title": "hello"})
    mounts(mount("/", "virtiofs"))
    run = runner_of(command)
    refused = run("ls", store.path)
    assert (refused.exit_code, "is on virtiofs" in refused.stderr) == (3, True)
    assert "hello" in run("--unsafe-filesystem", "ls", store.path).stdout


# --- what is not known ------------------------------------------------------------------------------------------------

UNKNOWN = {
    "FUSE": mount("/", "fuse"),
    "sshfs": mount("/", "fuse.sshfs", source="host:/srv"),
    "ntfs-3g": mount("/", "fuseblk", source="/dev/sda1"),
    "rootless overlay": mount("/", "fuse.fuse-overlayfs", source="fuse-overlayfs"),
    "a cluster": mount("/", "ocfs2", options="rw,heartbeat=local"),
    "vfat": mount("/", "vfat", source="/dev/sdb1"),
    "a kind of tomorrow": mount("/", "shinyfs"),
    "an overlay without syncs": mount("/", "overlay", options="rw,upperdir=/u,volatile"),
    "an overlay without syncs, newer": mount("/", "overlay", options="rw,upperdir=/u,fsync=volatile"),
    "a disk without barriers": mount("/", "ext4", options="rw,nobarrier"),
}


@pytest.mark.parametrize("line", UNKNOWN.values(), ids=UNKNOWN)
def test_what_a_probe_cannot_see_is_one_warning(line: str, mounts: Mounts, directory: Path) -> None:
    """HAZARDS F8: a file system that passes the probe gets one warning a device. It names the caller's line."""
    mounts(line)
    with pytest.warns(
        RuntimeWarning, match=r"A lock there keeps out others of this machine.*unsafe_filesystem"
    ) as caught:
        persist.Store(directory)
    assert [warning.filename for warning in caught] == [__file__]
    # No second warning comes: it would be an error here.
    persist.Store(directory)
    persist.Store(directory / "another")
    assert {path.name for path in directory.iterdir()} == {".leases", "another"}


def test_a_warning_that_is_an_error_is_one_at_each_opening(mounts: Mounts, directory: Path) -> None:
    """A store that `-W error` refused once is refused again, not accepted in silence."""
    mounts(mount("/", "fuse"))
    for _ in range(3):
        with pytest.raises(RuntimeWarning, match="is on fuse"):
            persist.Store(directory)


def test_the_warning_of_an_asynchronous_store_names_the_callers_line(mounts: Mounts, directory: Path) -> None:
    """The warning names the caller's own file, also through `persist.aio`."""
    mounts(mount("/", "fuse.sshfs"))
    with pytest.warns(RuntimeWarning, match=r"is on fuse\.sshfs") as caught:
        persist.aio.Store(directory)
    assert [warning.filename for warning in caught] == [__file__]


def test_the_callers_own_word_is_not_tried(mounts: Mounts, directory: Path) -> None:
    """`unsafe_filesystem=True` gives no warning and makes no probe."""
    mounts(mount("/", "fuse"))
    persist.Store(directory, unsafe_filesystem=True)


class Locks:
    """Locks of a file system, which give the probe's first and second lock a set answer."""

    def __init__(self, *answers: bool | OSError | float) -> None:
        self.answers = iter(answers)
        self.held_table: list[bool] = []
        self.may_end = threading.Event()

    def __call__(self, fd: int, *, blocking: bool) -> bool:
        assert not blocking, "a lock that waits could wait for ever"
        self.held_table.append(held.table._is_owned())  # type: ignore[attr-defined]
        answer = next(self.answers, False)
        if isinstance(answer, OSError):
            raise answer
        if isinstance(answer, float):
            self.may_end.wait(answer)
        return bool(answer)


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Locks]]:
    made: list[Locks] = []

    def use(*answers: bool | OSError | float) -> Locks:
        made.append(Locks(*answers))
        monkeypatch.setattr(held, "lock_descriptor", made[-1])
        monkeypatch.setattr(file_system, "PROBE_S", 0.2)
        return made[-1]

    yield use
    for each in made:
        each.may_end.set()
    for thread in threading.enumerate():
        if thread.name == "persist-probe":
            thread.join(10)


FAILING = {
    "both are given": ((True, True), "where a lock does not keep a second one out"),
    "none is given": ((False,), "which gives no lock"),
    "no locks at all": ((OSError(errno.ENOSYS, "not implemented"),), "which gives no lock"),
    "no locks left": ((OSError(errno.ENOLCK, "no locks available"),), "which gives no lock"),
    "the second is an error": ((True, OSError(errno.EIO, "input/output error")), "which gives no lock"),
    "no answer to the first": ((60.0,), "whose locks do not answer within 0.2 s"),
    "no answer to the second": ((True, 60.0), "whose locks do not answer within 0.2 s"),
}


@pytest.mark.parametrize(("answers", "told"), FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("kind", ["fuse", "shinyfs"])
def test_a_file_system_that_fails_the_probe_is_refused(
    answers: tuple[bool | OSError | float, ...],
    told: str,
    kind: str,
    mounts: Mounts,
    locks: Callable[..., Locks],
    directory: Path,
) -> None:
    """HAZARDS F8: of two descriptors of one file, the second lock must be refused at once.

    The test fails without the probe, and without either of its two locks.
    """
    mounts(mount("/", kind))
    probe = locks(*answers)
    for _ in range(2):  # the second refusal comes from memory: a server that hangs is asked once
        with pytest.raises(persist.InvalidArgument) as caught:
            persist.Store(directory)
        assert f"is on {kind}, {told};" in str(caught.value)
    assert not any(probe.held_table), "others could neither open nor close a lock while the probe waits"
    assert {path.name for path in directory.iterdir()} == {".leases"}


def test_where_no_file_can_be_made_the_locks_are_not_tried(
    mounts: Mounts, store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader without permission to write gets a warning, and the next opening tries again."""
    store.create("s", {"a": 1})
    mounts(mount("/", "fuse"))
    with monkeypatch.context() as patch:
        refused = PermissionError(errno.EACCES, "permission denied")
        patch.setattr(disk, "create", lambda path: (_ for _ in ()).throw(refused))
        with pytest.warns(RuntimeWarning, match="Its locks could not be tried"):
            assert persist.Store(store.path, create=False).load("s").data == {"a": 1}
    with pytest.warns(RuntimeWarning, match="A lock there keeps out others"):
        persist.Store(store.path)


@pytest.mark.parametrize("is_empty", [False, True])
def test_without_a_mount_table_the_probe_alone_decides(
    is_empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: Callable[..., Locks]
) -> None:
    """Without a mount table (not Linux, or a bare container), the probe accepts in silence or refuses."""
    if is_empty:
        (tmp_path / "table").touch()
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "table")
    monkeypatch.setattr(file_system, "_judged", {})
    assert kind_of(tmp_path) == "unknown"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        persist.Store(tmp_path / "sessions").create("s")
    monkeypatch.setattr(file_system, "_judged", {})
    locks(True, True)
    with pytest.raises(persist.InvalidArgument, match="on unknown, where a lock does not keep"):
        persist.Store(tmp_path / "sessions")


def test_a_device_is_judged_once(mounts: Mounts, store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second opening reads neither the mount table nor a lock, and costs what it did."""
    mounts(mount("/", "ext4"))
    persist.Store(store.path)
    monkeypatch.setattr(file_system, "MOUNTS", Path("/nowhere"))
    functions, calls = counted(lambda: persist.Store(store.path))
    assert functions <= 80, "some of them are of the path's depth"
    assert "open" not in calls


def test_a_mount_is_named_by_its_kind_and_by_what_it_is_known_for() -> None:
    """The message names the kind or the source, whichever decided."""
    assert str(Mount("ext4")) == "ext4"
    assert str(Mount("fuse.sshfs", "host:/srv")) == "fuse.sshfs"
    assert str(Mount("fuse", "s3fs")) == "fuse (s3fs)"
    assert str(Mount("9p", "C:\\", "rw,aname=drvfs;path=C:\\")) == "9p (drvfs)"
