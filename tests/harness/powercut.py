"""Power cuts: writers on a real file system of their own, whose power is cut in mid-commit.

The kernel's own shutdown call cuts the power. A sparse image behind a loop device is mounted in a private mount
namespace. `FS_IOC_SHUTDOWN` without a flush of the log stops the file system at once. Everything that had not reached
the image by then is gone, as after a power cut, and mounting it again recovers by the journal. Then the harness
compares every session with the acknowledgements that came over a pipe *after* the verb had returned.

The harness does not show one thing: a device that loses or reorders what it has acknowledged itself.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from harness.acknowledged import Figures
from harness.authors import Role, garden, own, sweep, write
from harness.faults import quick_directory
from harness.runs import INTERRUPTED, Plan, Run, arguments_of
from harness.watch import Watch

WRITERS: tuple[Role, ...] = (write, own, garden)
MOST_OTHERS = 2
LONGEST_WORK_S = 0.02
# The first author to write to a directory makes it, and its name, too, must survive.
CUTS_A_DIRECTORY = 12
NOTHING_RUN = 2

BLOCK_BYTES = 4096
_BLOCKS = {"ext4": ("-b", str(BLOCK_BYTES)), "xfs": ("-b", f"size={BLOCK_BYTES}")}
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 1 << 14, 1 << 18, 2
_FS_IOC_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LO_FLAGS_AUTOCLEAR = 0x4C82, 0x4C0A, 4
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A kind of file system, with its mount options and the least that its mkfs asks for."""

    kind: str
    options: str
    megabytes: int


FILE_SYSTEMS = {
    "ext4": FileSystem("ext4", "", 64),
    # By default ext4 flushes a file that is renamed over another, which hides a missing fsync.
    "ext4-noauto": FileSystem("ext4", "noauto_da_alloc", 64),
    "xfs": FileSystem("xfs", "", 320),
}


class Refused(Exception):
    """Raised when this machine does not allow power cuts. The message says what was refused, and by what error."""


class NotRecovered(Exception):
    """Raised when the file system could not be mounted again after a cut. The message says by what error."""


class Disk:
    """A file system on an image that can lose its power."""

    def __init__(self, file_system: FileSystem, image: Path, mount_point: Path) -> None:
        self.mount_point = mount_point
        self._file_system = file_system
        self._image = image
        self._is_mounted = False

    def mount(self) -> None:
        """Mount the image by a new device.

        The cache of a device must not outlive a power cut, nor hide its damage.
        """
        kind, options = self._file_system.kind.encode(), self._file_system.options.encode()
        with _loop_device(self._image) as device:
            call("mount", device.encode(), bytes(self.mount_point), kind, 0, options)
        self._is_mounted = True

    def cut(self) -> None:
        """Cut the power: from here on nothing more reaches the image."""
        fd = os.open(self.mount_point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(fd)

    def recover(self) -> None:
        """Mount it anew, as after a reboot."""
        try:
            self._unmount(0)
            self.mount()
        except OSError as error:
            raise NotRecovered(f"could not be mounted again after a cut: {error}") from None

    def close(self) -> None:
        """Unmount it if it is mounted: after a failed `recover` it may be either.

        A process that still uses the mount keeps it until that process ends.
        """
        if self._is_mounted:
            self._unmount(_MNT_DETACH)

    def _unmount(self, flags: int) -> None:
        call("umount2", bytes(self.mount_point), flags)
        self._is_mounted = False


def call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _run(*command: str) -> None:
    try:
        # A bare environment often lacks the directories of the administrator's programs.
        environment = os.environ | {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise Refused(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise Refused(f"{' '.join(command)}: {error.stderr.strip()}") from None


def enter_private_namespace() -> None:
    """Enter a mount namespace that only this process and its children see.

    Everything that is mounted from here on goes with the last of them.
    """
    if sys.platform != "linux":
        raise Refused("FS_IOC_SHUTDOWN and mount namespaces are Linux only")
    if os.geteuid() != 0:
        raise Refused("it takes root to mount a file system")
    try:
        call("unshare", _CLONE_NEWNS)
        call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    except OSError as error:
        raise Refused(error.strerror) from None


@contextmanager
def _loop_device(image: Path) -> Iterator[str]:
    """Open a device for the block. It lasts until it is neither open nor mounted any more."""
    with open("/dev/loop-control", "r+b", buffering=0) as control, image.open("r+b") as file:
        # The kernel's struct loop_config: fd, block_size, and far behind them lo_flags.
        config = struct.pack("II52xI240x", file.fileno(), 0, _LO_FLAGS_AUTOCLEAR)
        while True:
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            with open(device, "r+b", buffering=0) as opened:
                try:
                    fcntl.ioctl(opened, _LOOP_CONFIGURE, config)
                except OSError as error:
                    # Another process has taken this device.
                    if error.errno == errno.EBUSY:
                        continue
                    raise
                yield device
                return


@contextmanager
def disk_of(file_system: FileSystem, image: Path | None = None) -> Iterator[Disk]:
    """Mount a new file system for the block. However this process ends, no device and no mount is left.

    Args:
        image: a file to make it in, as large as it is to be.
    """
    with ExitStack() as undo:
        # In memory a flush of the image costs nothing.
        scratch = undo.enter_context(quick_directory())
        mount_point = scratch / "mounted"
        mount_point.mkdir()
        if image is None:
            image = scratch / "image"
            with image.open("wb") as file:
                file.truncate(file_system.megabytes << 20)
        _run(f"mkfs.{file_system.kind}", "-q", *_BLOCKS[file_system.kind], str(image))
        try:
            disk = Disk(file_system, image, mount_point)
            disk.mount()
        except OSError as error:
            raise Refused(str(error)) from None
        undo.callback(disk.close)
        yield disk


class PowerCuts(Run):
    """One run on one disk. `run` returns its figures."""

    crashes = "cuts"

    def __init__(self, disk: Disk, plan: Plan) -> None:
        super().__init__(plan)
        self._disk = disk

    def run(self) -> Figures:
        number = 0
        while not self._is_over():
            directory = self._disk.mount_point / f"sessions-{number}"
            self._cut_often(Watch(directory, self.figures, replace(self._plan, seed=self._plan.seed + number)))
            # None of this may become durable with a commit to the next directory.
            shutil.rmtree(directory)
            os.sync()
            number += 1
        return self.figures

    def _cut_often(self, watch: Watch) -> None:
        """Cut the power several times over one directory.

        The first author makes the directory. The later authors find what the cuts have left.
        """
        watch.start(garden)
        self._cut(watch)
        for _ in range(CUTS_A_DIRECTORY - 1):
            if self._is_over():
                break
            watch.share()
            watch.start(self._random.choice(WRITERS))
            for role in self._random.choices((*WRITERS, sweep), k=self._random.randint(0, MOST_OTHERS)):
                watch.start(role)
            self._cut(watch)
        if self._is_over() and self.figures.is_sound:
            self._require_work(watch)
        watch.settle()

    def _cut(self, watch: Watch) -> None:
        """Cut the power in mid-commit, recover, and look."""
        watch.await_commit()
        watch.crew.listen(self._random.uniform(0, LONGEST_WORK_S))
        cut_at_s = time.monotonic()
        self._disk.cut()
        # A real power cut stops the processes, too. Here they live on for a moment, as after an I/O error that shuts
        # the file system down. Every verb may raise then, and an acknowledgement counts all the same.
        watch.crew.kill_all()
        self.figures.crashes += 1
        watch.blame(until_s=cut_at_s)
        self._disk.recover()
        watch.open()
        watch.look()
        # Otherwise the next authors find what the cut has left, and the next cut hits it.
        if self._random.random() < 0.5:
            watch.settle()
        watch.retire()
        self._tell()

    def _require_work(self, watch: Watch) -> None:
        watch.share()
        watch.require_work_of((*WRITERS, sweep))
        watch.crew.kill_all()
        watch.blame()
        watch.look()


def run_on(name: str, plan: Plan) -> int:
    """Run on one kind of file system and print the figures.

    Return the exit status, which is `NOTHING_RUN` if the machine does not allow power cuts.
    """
    try:
        with disk_of(FILE_SYSTEMS[name]) as disk:
            return _run_and_tell(name, PowerCuts(disk, plan))
    except Refused as refused:
        print(f"{name}: skipped: {refused}", flush=True)
        return NOTHING_RUN


def _run_and_tell(name: str, cuts: PowerCuts) -> int:
    try:
        cuts.run()
    except NotRecovered as failure:
        print(f"{name}: {failure}", flush=True)
        cuts.tell_result(f"{name}: ")
        return 1
    return cuts.tell_result(f"{name}: ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/powercut", description=__doc__, allow_abbrev=False)
    parser.add_argument("--filesystem", choices=[*FILE_SYSTEMS, "all"], default="all", help="each gets so many cuts")
    options, plan = arguments_of(parser, arguments, PowerCuts.crashes)
    try:
        enter_private_namespace()
    except Refused as refused:
        print(f"skipped: {refused}")
        return NOTHING_RUN
    statuses = set()
    for name in FILE_SYSTEMS if options.filesystem == "all" else [options.filesystem]:
        statuses.add(run_on(name, plan))
        if plan.is_interrupted():
            statuses.add(INTERRUPTED)
            break
    return next(status for status in (1, INTERRUPTED, 0, NOTHING_RUN) if status in statuses)


if __name__ == "__main__":
    sys.exit(main())
