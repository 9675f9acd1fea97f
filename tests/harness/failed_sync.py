"""A record whose fdatasync failed on a real file system, the next process's append, and then a power cut.

The image of an ext4 file system lies in a tmpfs that is full. The harness takes away a page of the image that the
record goes to. So the kernel gets an I/O error there, reports it to fdatasync, and drops what it should have written.
The writer is killed. Then there is room again, and another process appends. Its append is acknowledged, so both records
must be there after the power cut. They are there because a process that appends behind a record that it did not sync
itself writes that record again.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import persist
from harness.crash_scenarios import Mode
from harness.faults import quick_directory
from harness.files import file_engine
from harness.powercut import (
    BLOCK_BYTES,
    FILE_SYSTEMS,
    NOTHING_RUN,
    Refused,
    call,
    disk_of,
    enter_private_namespace,
)
from persist.storage import disk
from persist.storage.cache import Replica

_FIBMAP, _KEEP_SIZE_AND_PUNCH_HOLE, _MNT_DETACH = 1, 3, 2
#: The journal gets room at this size, and no record makes the file longer after that.
MODE = Mode("always", float("inf"), room_bytes=8 * BLOCK_BYTES)
#: The room of the tmpfs that is not for the image.
SPARE_BYTES = 1 << 20
DONE, NOT_FAILED = 0, 3


@contextmanager
def tmpfs_of(size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of a given size for the block."""
    with quick_directory() as scratch:
        call("mount", b"none", bytes(scratch), b"tmpfs", 0, f"size={size_bytes}".encode())
        try:
            yield scratch
        finally:
            call("umount2", bytes(scratch), _MNT_DETACH)


class FullDisk:
    """The tmpfs, without room for the pages of the image that were taken away."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._filler = image.with_name("filler")

    def take_away(self, blocks: list[int]) -> None:
        """Take blocks away from the image, and give their room to another file."""
        with self._image.open("r+b") as file:
            for block in blocks:
                punch(file.fileno(), block * BLOCK_BYTES)
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(BLOCK_BYTES)) == BLOCK_BYTES:
                pass

    def give_back(self) -> None:
        """Make room again."""
        self._filler.unlink()


def punch(fd: int, position: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    offset, length = ctypes.c_int64(position), ctypes.c_int64(BLOCK_BYTES)
    if libc.fallocate64(fd, _KEEP_SIZE_AND_PUNCH_HOLE, offset, length) != 0:
        raise Refused(f"fallocate: {os.strerror(ctypes.get_errno())}")


def block_of(path: Path, position: int) -> int:
    """Return the block of the file system that holds a place of a file."""
    with path.open("rb") as file:
        asked = struct.pack("i", position // BLOCK_BYTES)
        [block] = struct.unpack("i", fcntl.ioctl(file, _FIBMAP, asked))
    assert block, "a hole"
    return int(block)


def append(store: persist.Store, message_id: str, size_bytes: int) -> None:
    store.append("s", "messages", {"id": message_id, "content": "x" * size_bytes})


def replica_of(store: persist.Store) -> Replica:
    cache = file_engine(store).cache
    replica = cache.take("s")
    assert replica is not None
    cache.put("s", replica)
    return replica


def with_room(store: persist.Store) -> int:
    """Make a journal whose next record begins near the end of a block of its room. Return where it begins."""
    store.create("s", {"messages": []})
    number = 0
    while True:
        tail = replica_of(store).tail
        assert tail is not None
        left = BLOCK_BYTES - tail.end % BLOCK_BYTES
        if tail.end > MODE.room_bytes and tail.room_end - tail.end > 5 * BLOCK_BYTES and left < 300:
            return tail.end
        append(store, f"m{number}", 10)
        number += 1


def in_a_child(what: Callable[[], None]) -> int:
    """Do something in a process of its own. Return its exit status, or less than 0 if a signal has ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            what()
            os._exit(DONE)
        finally:
            os._exit(NOT_FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def append_and_die(path: Path) -> None:
    """Append a record that fills a block, and be killed when its fdatasync has failed."""
    real = disk.sync_data

    def sync_data(fd: int) -> None:
        try:
            real(fd)
        except disk.SyncFailed:
            os.kill(os.getpid(), signal.SIGKILL)

    disk.sync_data = sync_data
    append(MODE.open(path), "unsynced", 2 * BLOCK_BYTES)
    os._exit(NOT_FAILED)


def run(*, is_warm: bool) -> str | None:
    """Play the scenario once. Return what is wrong, or None."""
    file_system = FILE_SYSTEMS["ext4"]
    size_bytes = file_system.megabytes << 20
    with tmpfs_of(size_bytes + SPARE_BYTES) as scratch:
        image = scratch / "image"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        with disk_of(file_system, image) as device:
            # Allocate the blocks again that mkfs has discarded.
            with image.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            path, full = device.mount_point / "sessions", FullDisk(image)
            writer = MODE.open(path)
            start = with_room(writer)
            os.sync()
            [journal] = path.glob("s.*.journal")
            # Take whole blocks of the record, behind the one in which it begins, because the older bytes there must
            # stay.
            first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
            full.take_away([block_of(journal, first)])
            status = in_a_child(lambda: append_and_die(path))
            full.give_back()
            if status != -signal.SIGKILL:
                raise Refused("the fdatasync did not fail")
            other = writer if is_warm else MODE.open(path)
            append(other, "acknowledged", 10)
            device.cut()
            device.recover()
            return _fault(path)


def _fault(path: Path) -> str | None:
    try:
        found = {message["id"] for message in persist.Store(path).load("s").data["messages"]}
    except persist.PersistError as error:
        return f"torn: {error}"
    missing = {"unsynced", "acknowledged"} - found
    return f"lost: {sorted(missing)}" if missing else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="harness.failed_sync", description=__doc__, allow_abbrev=False)
    parser.add_argument("--warm", action="store_true", help="the second process has known the session before")
    options = parser.parse_args(arguments)
    try:
        enter_private_namespace()
        fault = run(is_warm=options.warm)
    except (Refused, OSError) as refused:
        print(f"skipped: {refused}")
        return NOTHING_RUN
    print(fault or "both are there")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
