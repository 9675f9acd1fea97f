"""Crash states: the disks that a power cut may leave of a verb, enumerated (in the manner of ALICE, OSDI 2014).

`record` runs a verb for real and writes down its steps: files and directories made, bytes written, files and
directories synced, names moved and removed. `states` gives every disk that a cut after any of the steps may leave,
under the promises of POSIX and no others:

- A name that was made, moved or removed survives for certain only after its directory was synced. Until then each such
  step survives or not, whatever became of the others. A rename survives as a whole.
- Where the name of a directory is lost, everything that was made in it is lost, synced or not.
- Written bytes survive for certain only after the file was synced. Until then each sector of 512 bytes has its new
  content, or zeros, or the file is shorter. A file that was cut off has its old length or the new one.
- A sync that failed makes nothing durable, and the kernel forgets what it should have written. A later sync makes
  durable what was written after the failed one, and nothing else.
- Synced content stays.

A file of n unsynced sectors may be left in 2**n ways. Up to `MOST_SECTORS` sectors, all ways are enumerated. Above
that, the extreme ways and a sample stand for them. They are the same ones each time, and `is_sampled` says so.

A real file system reorders less. So a protocol that holds here holds there.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import pytest

from persist.storage import disk
from persist.storage.journal import MARK

SECTOR_BYTES = 512
#: A file of more unsynced sectors than this is sampled, because 64 ways are quickly opened, and 2**20 are not.
MOST_SECTORS = 6
SAMPLE_SIZE = 64
SAMPLE_SEED = 1

#: The content of a file. None stands for a directory.
Content = bytes | None
#: A disk: the content under each name. The name is a path below the recorded directory. A directory comes before the
#: files in it.
Disk = dict[str, Content]


@dataclass(frozen=True)
class Step:
    """One step of a protocol. `file` tells files apart that bear the same name, one after another.

    A write goes to `position`, or to the end. A file is cut off at `position`.
    """

    kind: str
    path: str
    file: int = -1
    target: str = ""
    content: bytes = field(default=b"", repr=False)
    position: int | None = None

    @property
    def directory(self) -> str:
        return str(PurePath(self.path).parent)

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + (f" to {self.target}" if self.target else "")


@dataclass(frozen=True)
class Trace:
    """The durable content of a disk, and the steps that were taken from there."""

    before: Disk
    steps: tuple[Step, ...]

    def without(self, index: int) -> Trace:
        return Trace(self.before, self.steps[:index] + self.steps[index + 1 :])

    def swapped(self, index: int) -> Trace:
        one, two = self.steps[index : index + 2]
        return Trace(self.before, (*self.steps[:index], two, one, *self.steps[index + 2 :]))


# --- recording --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Raised where the writer is killed."""


class Recorder:
    """A recorder of what the functions of `persist.storage.disk` do below a directory, while they do it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []
        self._file_of: dict[str, int] = {path: number for number, path in enumerate(read_disk(root))}
        self._next = itertools.count(len(self._file_of))
        self._open: dict[int, tuple[str, int]] = {}
        self._kills = self._fails_sync = self._is_killed = False

    def kill(self, writer: Callable[[], Any], *, fails_sync: bool = False) -> None:
        """Run a writer that is killed when its commit has just become visible, and is not durable yet.

        Args:
            fails_sync: kill it when the sync of its record has failed.
        """
        count = len(self.steps)
        self._kills, self._fails_sync = True, fails_sync
        with suppress(Killed):
            writer()
        if not self._is_killed:
            # The commit became visible at no step, or the writer has nothing to do.
            del self.steps[count:]
        self._kills = self._fails_sync = self._is_killed = False

    def _is_visible(self, step: Step) -> bool:
        """Tell whether a commit shows from this step on.

        That is the rename of a document, or a record in a journal that was there before.
        """
        made = {each.file for each in self.steps if each.kind == "create"}
        is_record = step.kind == "write" and step.path.endswith(".journal") and step.file not in made
        # Neither room for more nor a mark is a commit.
        return step.kind == "rename" or (is_record and step.content.strip(b"\0") not in (b"", MARK))

    def _note(self, step: Step) -> None:
        if self._is_killed:
            # A killed process leaves everything as it is. So the clean-up on the way out of here does not count.
            return
        self.steps.append(step)
        is_end = step.kind == "failed sync" if self._fails_sync else self._is_visible(step)
        if self._kills and is_end:
            self._is_killed = True
            raise Killed

    def install(self, patch: pytest.MonkeyPatch) -> None:
        files = ("open_known", "open_unseen", "write", "write_at", "truncate", "sync", "close")
        for name in (*files, "mkdir", "sync_directory", "replace", "unlink"):
            patch.setattr(disk, name, getattr(self, name)(getattr(disk, name)))
        # For a file that is only appended to, it makes as much durable as `sync`.
        patch.setattr(disk, "sync_data", self.sync_data(disk.sync_data))

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def open_known(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_known(path: Path, flags: int, *more: Any, **options: Any) -> Any:
            name, is_new = self._name(path), not os.path.lexists(path)
            answer = real(path, flags, *more, **options)
            if is_new:
                self._file_of[name] = next(self._next)
                self._note(Step("create", name, self._file_of[name]))
            self._open[answer if type(answer) is int else answer[0]] = (name, self._file_of[name])
            return answer

        return open_known

    open_unseen = open_known

    def _file(self, fd: int) -> tuple[str, int]:
        """Return the name and the number of an open file.

        A file that was opened before the recording has the name that the system knows.
        """
        if fd not in self._open:
            name = self._name(Path(f"/proc/self/fd/{fd}").readlink())
            self._open[fd] = (name, self._file_of[name])
        return self._open[fd]

    def write(self, real: Callable[..., None]) -> Callable[..., None]:
        def write(fd: int, content: bytes) -> None:
            real(fd, content)
            self._note(Step("write", *self._file(fd), content=bytes(content)))

        return write

    def write_at(self, real: Callable[..., None]) -> Callable[..., None]:
        def write_at(fd: int, content: bytes, position: int) -> None:
            real(fd, content, position)
            self._note(Step("write", *self._file(fd), content=bytes(content), position=position))

        return write_at

    def sync(self, real: Callable[..., None]) -> Callable[..., None]:
        def sync(fd: int) -> None:
            real(fd)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                self._note(Step("sync", *self._file(fd)))

        return sync

    def sync_data(self, real: Callable[..., None]) -> Callable[..., None]:
        sync = self.sync(real)

        def sync_data(fd: int) -> None:
            if self._fails_sync:
                self._note(Step("failed sync", *self._file(fd)))
                raise disk.SyncFailed(errno.EIO, "injected")
            sync(fd)

        return sync_data

    def truncate(self, real: Callable[..., None]) -> Callable[..., None]:
        def truncate(fd: int, size: int) -> None:
            real(fd, size)
            self._note(Step("truncate", *self._file(fd), position=size))

        return truncate

    def close(self, real: Callable[..., None]) -> Callable[..., None]:
        def close(fd: int) -> None:
            real(fd)
            self._open.pop(fd, None)

        return close

    def mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def mkdir(path: Path, *mode: int) -> None:
            real(path, *mode)
            self._note(Step("mkdir", self._name(path), next(self._next)))

        return mkdir

    def sync_directory(self, real: Callable[..., None]) -> Callable[..., None]:
        def sync_directory(path: Path, opened: int | None = None) -> None:
            known = dict(self._open)
            # A directory's descriptor may have the number of a file that lock.py has closed by itself.
            self._open.clear()
            real(path, opened)
            self._open.update(known)
            self._note(Step("sync directory", str(PurePath(self._name(path)) / "*")))

        return sync_directory

    def replace(self, real: Callable[..., None]) -> Callable[..., None]:
        def replace(source: Path, target: Path) -> None:
            real(source, target)
            file = self._file_of.pop(self._name(source))
            if self._name(target) in self._file_of:
                # The system, too, gives this name to an open file that has lost its own.
                self._file_of[f"{self._name(target)} (deleted)"] = self._file_of[self._name(target)]
            self._file_of[self._name(target)] = file
            self._note(Step("rename", self._name(source), file, self._name(target)))

        return replace

    def unlink(self, real: Callable[..., bool]) -> Callable[..., bool]:
        def unlink(path: Path) -> bool:
            was_there = real(path)
            if was_there:
                self._note(Step("unlink", self._name(path), self._file_of.pop(self._name(path))))
            return was_there

        return unlink


@contextmanager
def recording(root: Path) -> Iterator[Recorder]:
    """Record the steps of the block."""
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        yield recorder


def record(root: Path, verb: Callable[[], Any]) -> Trace:
    """Run a verb and return its trace. Everything that is on the disk now counts as durable."""
    before = read_disk(root)
    with recording(root) as recorder:
        verb()
    return Trace(before, tuple(recorder.steps))


def read_disk(root: Path) -> Disk:
    # Here and below: plain names and unbuffered files, because thousands of states are written and read.
    return dict(_entries(str(root), ""))


def _entries(directory: str, above: str) -> Iterator[tuple[str, Content]]:
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield above + entry.name, None
            yield from _entries(entry.path, f"{above}{entry.name}/")
        else:
            with open(entry.path, "rb", buffering=0) as file:
                yield above + entry.name, file.readall()


def write_disk(root: Path, state: Disk) -> None:
    root.mkdir(parents=True)
    for name, content in sorted(state.items()):
        if content is None:
            os.mkdir(f"{root}/{name}")
        else:
            with open(f"{root}/{name}", "wb", buffering=0) as file:
                file.write(content)


# --- enumerating ------------------------------------------------------------------------------------------------------


def states(trace: Trace) -> Iterator[tuple[Disk, bool]]:
    """Yield every disk that a cut may leave, once each, and whether the verb had returned by then.

    The verb returns at the end of the trace. A disk that may be left before and after its return counts as after.
    """
    seen: dict[frozenset[tuple[str, Content]], bool] = {}
    for cut in range(len(trace.steps), -1, -1):
        for state in _after(trace, cut):
            seen.setdefault(frozenset(state.items()), cut == len(trace.steps))
    for state_items, returned in seen.items():
        yield dict(state_items), returned


def is_sampled(trace: Trace) -> bool:
    """Tell whether some file's unsynced sectors are too many for all their ways to be enumerated."""
    written: Counter[int] = Counter()
    for step in trace.steps:
        written[step.file] += len(step.content)
    return any(size > MOST_SECTORS * SECTOR_BYTES for size in written.values())


def _after(trace: Trace, cut: int) -> Iterator[Disk]:
    """Yield the disks that a cut after `cut` steps may leave."""
    steps = trace.steps[:cut]
    durable, written = _files_after(trace.before, steps)
    for names in _names_after(trace.before, steps):
        choices = [_contents(durable[file], written[file]) for file in names.values()]
        for contents in itertools.product(*choices):
            yield dict(zip(names, contents, strict=True))


def written_to(file: int, trace: Trace) -> Content:
    """Return the content of a file at the end of a trace, as long as the power stays on."""
    return _files_after(trace.before, trace.steps)[1][file]


def _files_after(before: Disk, steps: Iterable[Step]) -> tuple[dict[int, Content], dict[int, Content]]:
    """Return the content that each file holds for certain, and the content that was written to it."""
    durable = dict(enumerate(before.values()))
    written = dict(durable)
    # The sectors that a failed sync has given up, until they are written again.
    given_up: dict[int, set[int]] = {}
    for step in steps:
        if step.kind in ("create", "mkdir"):
            durable[step.file] = written[step.file] = b"" if step.kind == "create" else None
        elif step.kind in ("write", "truncate"):
            content = written[step.file] or b""
            written[step.file] = _with(content, step)
            start = len(content) if step.position is None else step.position
            given_up.get(step.file, set()).difference_update(_sectors(start, start + len(step.content)))
        elif step.kind == "sync":
            durable[step.file] = _synced(durable[step.file], written[step.file], given_up.get(step.file, set()))
        elif step.kind == "failed sync":
            given_up[step.file] = _differing_sectors(durable[step.file] or b"", written[step.file] or b"")
    return durable, written


def _sectors(start: int, stop: int) -> range:
    return range(start // SECTOR_BYTES, -(-stop // SECTOR_BYTES))


def _differing_sectors(one: bytes, other: bytes) -> set[int]:
    return {
        number
        for number in _sectors(0, max(len(one), len(other)))
        if one[number * SECTOR_BYTES :][:SECTOR_BYTES] != other[number * SECTOR_BYTES :][:SECTOR_BYTES]
    }


def _synced(durable: Content, written: Content, given_up: set[int]) -> Content:
    """Return the content that a file holds for certain after a sync: all writes that the kernel has not forgotten."""
    if durable is None or written is None or not given_up:
        return written
    content = bytearray(written)
    for number in given_up:
        at = number * SECTOR_BYTES
        length = len(content[at : at + SECTOR_BYTES])
        content[at : at + length] = durable[at : at + length].ljust(length, b"\0")
    return bytes(content)


def _with(content: bytes, step: Step) -> bytes:
    """Return the content of a file after a write, or after it was cut off."""
    position = len(content) if step.position is None else step.position
    if step.kind == "truncate":
        return content[:position].ljust(position, b"\0")
    return content[:position].ljust(position, b"\0") + step.content + content[position + len(step.content) :]


def _names_after(before: Disk, steps: Iterable[Step]) -> Iterator[dict[str, int]]:
    """Yield the names that may be left, and the file that each stands for.

    There is one dictionary for each choice of steps that survive.
    """
    certain = {name: number for number, name in enumerate(before)}
    pending: list[Step] = []
    for step in steps:
        if step.kind == "sync directory":
            for each in [each for each in pending if each.directory == step.directory]:
                _apply(each, certain)
                pending.remove(each)
        elif step.kind in ("create", "mkdir", "rename", "unlink"):
            pending.append(step)
    for survives in itertools.product((False, True), repeat=len(pending)):
        names = dict(certain)
        for step in itertools.compress(pending, survives):
            _apply(step, names)
        yield _reachable(names)


def _reachable(names: dict[str, int]) -> dict[str, int]:
    """Leave out the names in a directory whose own name is lost."""
    return {
        name: file for name, file in names.items() if all(str(above) in names for above in PurePath(name).parents[:-1])
    }


def _apply(step: Step, entries: dict[str, int]) -> None:
    if step.kind in ("create", "mkdir"):
        entries[step.path] = step.file
    else:
        if entries.get(step.path) == step.file:
            del entries[step.path]
        if step.kind == "rename":
            entries[step.target] = step.file


def _contents(durable: Content, written: Content) -> list[Content]:
    """Return each content that a file may have after writes that were not synced.

    Durable bytes stay, also in a sector whose new content is lost.
    """
    if durable == written or written is None or durable is None:
        return [written]
    places = range(0, len(written), SECTOR_BYTES)
    new = [written[at : at + SECTOR_BYTES] for at in places]
    old = [durable[at : at + SECTOR_BYTES].ljust(len(sector), b"\0") for at, sector in zip(places, new, strict=True)]
    changed = [number for number, sector in enumerate(new) if sector != old[number]]
    torn = []
    for pattern in _patterns(len(changed)):
        lost = set(itertools.compress(changed, (not kept for kept in pattern)))
        torn.append(b"".join(old[number] if number in lost else sector for number, sector in enumerate(new)))
    shorter = [written[:at] for at in places if at >= len(durable)]
    # The file was cut off, and its new length is lost.
    longer = [each + durable[len(written) :] for each in torn if len(durable) > len(written)]
    return list(dict.fromkeys([durable, *torn, *shorter, *longer]))


#: For each sector of a file, whether it was kept.
Pattern = tuple[bool, ...]


def _patterns(sectors: int) -> Iterable[Pattern]:
    """Return every way to keep some sectors and lose the others.

    Of many sectors, return the extreme ways and a sample.
    """
    if sectors <= MOST_SECTORS:
        return itertools.product((True, False), repeat=sectors)
    chance = random.Random(SAMPLE_SEED)
    sample = [tuple(chance.random() < 0.5 for _ in range(sectors)) for _ in range(SAMPLE_SIZE)]
    return dict.fromkeys([*_extreme_patterns(sectors), *sample])


def _extreme_patterns(sectors: int) -> Iterator[Pattern]:
    """Yield these ways: all kept, all lost, each single one lost, each single one kept, each prefix kept."""
    for place in range(sectors):
        yield tuple(each != place for each in range(sectors))
        yield tuple(each == place for each in range(sectors))
        yield tuple(each < place for each in range(sectors))
    yield (True,) * sectors
