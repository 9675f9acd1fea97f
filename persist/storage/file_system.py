"""File systems: the check that a lock keeps others out, and that a sync is durable.

The kind of a file system decides, or a known property of its mount. On any other file system a probe tests whether a
lock keeps a second one out on this machine. A warning names the promises that the probe cannot test. A process judges
each device once.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Literal

from persist.errors import InvalidArgument
from persist.storage import disk, layout
from persist.storage.held import is_exclusive

MOUNTS = Path("/proc/self/mountinfo")
#: Seconds that a lock of the probe may take.
PROBE_S = 2.0

#: Local ones, on which flock and fsync hold.
_GOOD = frozenset(
    (
        *(
            "ext2",
            "ext3",
            "ext4",
            "xfs",
            "btrfs",
            "zfs",
            "f2fs",
            "jfs",
            "nilfs2",
            "reiserfs",
            "bcachefs",
            "ubifs",
            "ufs",
        ),
        *("tmpfs", "ramfs", "rootfs", "overlay", "ecryptfs", "lxfs", "wslfs", "apfs", "hfs", "ufs"),
    )
)
#: File systems of other machines, shares of a virtual machine or a container with its host, and object stores that are
#: shown as files. On some flock excludes nobody (docker/for-mac #7004, kata-containers #3408). On others it
#: excludes on one machine only, or a rename is a copy.
_BAD = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "ncpfs", "afs", "coda", "davfs", "davfs2", "webdav"),
        *("ceph", "ceph-fuse", "lustre", "gpfs", "glusterfs", "beegfs", "fhgfs", "orangefs", "pvfs2", "moosefs", "mfs"),
        *("lizardfs", "juicefs"),
        *("9p", "virtiofs", "fakeowner", "grpcfuse", "osxfs", "vboxsf", "prl_fs", "prlfs", "drvfs"),
        *("vmhgfs", "vmhgfs-fuse", "hgfs"),
        *("s3fs", "gcsfuse", "goofys", "geesefs", "rclone", "mount-s3", "mountpoint-s3", "ossfs", "cosfs"),
        *("blobfuse", "blobfuse2"),
    )
)
#: Options of cluster file systems with which a lock holds on one machine only.
_BAD_OPTIONS = frozenset({"localflocks", "local_lock=flock", "local_lock=all"})
#: Options with which fsync does less than it says.
_DOUBTFUL_OPTIONS = frozenset({"volatile", "fsync=volatile", "nobarrier", "barrier=0"})
#: Docker Desktop shows the host's directories under this path, whatever the kind of the mount.
_HOST_MARK = "/run/host_mark"

Verdict = Literal["good", "bad", "unknown"]


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table. `kind` is "ext4", "nfs4" and so on, or "unknown" without a table."""

    kind: str = "unknown"
    source: str = ""
    options: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the file system, its kind first.

        The kind of a FUSE file system may say nothing. Then its source or an option names the program behind it. WSL
        shows the drives of Windows as 9p with ``aname=drvfs``.
        """
        kind = self.kind.lower()
        told = [option.partition("=") for option in self._options]
        names = [kind, kind.partition(".")[2], *(value for name, _, value in told if name in ("aname", "subtype"))]
        if kind.startswith("fuse"):
            names.append(self.source.lower())
        if self.source.startswith(_HOST_MARK):
            names.append("fakeowner")
        return tuple(filter(None, names))

    @property
    def _options(self) -> list[str]:
        return re.split("[,;]", self.options.lower())

    @property
    def verdict(self) -> Verdict:
        """The verdict on the mount, without a probe."""
        options = {*self._options}
        if not _BAD.isdisjoint(self.names) or not _BAD_OPTIONS.isdisjoint(options):
            return "bad"
        return "good" if self.kind in _GOOD and _DOUBTFUL_OPTIONS.isdisjoint(options) else "unknown"

    def __str__(self) -> str:
        bad = [name for name in self.names[1:] if name in _BAD and name not in self.kind]
        return f"{self.kind} ({bad[0]})" if bad else self.kind


#: Device -> the reason why it is refused, or "", and whether its directories keep their inode numbers. The answers are
#: kept, because the mount table of a machine with many containers is long.
_judged: dict[int, tuple[str, bool]] = {}


def check(directory: str, device: int) -> bool:
    """Refuse a directory on a file system that is known to keep no promise, or that fails a probe.

    A file system that passes the probe causes a `RuntimeWarning`, because the probe cannot see other machines. Without
    a mount table, as on macOS and Windows, nothing is known of any file system, and none causes a warning.

    Args:
        device: the directory's device.

    Returns:
        Whether a directory keeps its inode number as long as it is there. An overlay may give it another one, and so
        may FUSE (Documentation/filesystems/overlayfs.rst).

    Raises:
        InvalidArgument: it is refused.
    """
    known = _judged.get(device)
    if known is not None:
        refusal, is_stable = known
    else:
        mount = mount_of(directory)
        verdict, tried = mount.verdict, ""
        if verdict == "unknown":
            tried = probe(directory)
            refusal = "" if tried in ("passed", "not tried") else f"on {mount}, {tried}"
            if not refusal and mount.kind != "unknown":
                _warn(directory, mount, is_tried=tried == "passed")
        else:
            refusal = f"on {mount}" if verdict == "bad" else ""
        is_stable = mount.kind == "unknown" or (mount.kind in _GOOD and mount.kind != "overlay")
        # This comes after the warning, because a warning may be raised as an error.
        if tried != "not tried":
            _judged[device] = refusal, is_stable
    if refusal:
        remedy = "Use a local disk, or pass unsafe_filesystem=True and lose the guarantees."
        facts = {"got": refusal, "expected": "on a file system whose locks and fsync hold"}
        raise InvalidArgument(what=f"the store {directory}", path=directory, remedy=remedy, **facts)
    return is_stable


def _warn(directory: str, mount: Mount, *, is_tried: bool) -> None:
    found = "A lock there keeps out others of this machine" if is_tried else "Its locks could not be tried"
    text = (
        f"{directory} is on {mount}. {found}. persist cannot know whether locks hold between machines, and whether "
        "fsync holds. If they do, say so with unsafe_filesystem=True."
    )
    # The warning names the line of the caller, whose call may have come by way of `persist.aio`.
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "persist":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def probe(directory: str) -> str:
    """Try with two descriptors of one file whether a lock keeps a second one out.

    Returns:
        "passed", "not tried" if no file can be made, or what is wrong.
    """
    path = layout.probe_of(directory, token_hex(8))
    try:
        disk.close(disk.create(path))
    except OSError:
        return "not tried"
    answers: list[str] = []
    try:
        # The probe runs in a thread, because a server that is gone may never answer, and no lock can be interrupted.
        thread = threading.Thread(target=_try, args=(path, answers), name="persist-probe", daemon=True)
        thread.start()
        thread.join(PROBE_S)
        return answers[0] if answers else f"whose locks do not answer within {PROBE_S:g} s"
    finally:
        disk.remove_quietly(path)


def _try(path: str, answers: list[str]) -> None:
    try:
        answer = {True: "passed", False: "where a lock does not keep a second one out", None: "which gives no lock"}
        answers.append(answer[is_exclusive(path)])
    except OSError as error:
        answers.append(f"where no lock can be tried: {error.strerror}")


def mount_of(directory: disk.StrPath) -> Mount:
    """Return the mount that holds a directory, from the kernel's table. Its kind is "unknown" if there is no table.

    Source: proc_pid_mountinfo(5).
    """
    try:
        table = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return Mount()
    number = disk.identity_of(directory)[0]
    device = f"{os.major(number)}:{os.minor(number)}"
    here = os.path.realpath(directory)
    best, found = (False, -1), Mount()
    for line in table:
        before, _, after = line.partition(" - ")
        _, _, numbers, _, escaped = before.split(" ")[:5]
        point = _unescaped(escaped)
        if (here + "/").startswith(point.rstrip("/") + "/"):
            # A mount may be hidden under a later one on a directory above it. The device tells, but not on btrfs,
            # whose subvolumes have devices that the table does not know. A later line covers an earlier one.
            rank = numbers == device, len(point)
            if rank >= best:
                kind, source, options = (*map(_unescaped, after.split(" ")), "", "")[:3]
                best, found = rank, Mount(kind, source, options)
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), text)
