"""Events as a file: the lines that a reader takes for events, and what a writer does after each way to fail."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness.faults import SHORT, Fault, descriptors, faults, injecting
from harness.files import file_engine
from hypothesis import given
from hypothesis import strategies as st

import persist
from persist import event_log, json_codec, watch
from persist.engine import Ended, Event, Fenced
from persist.event_log import EventFiles, EventReader, EventWriter

END = b'{"end":"finished"}\n'

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def line(offset: int, data: Any) -> bytes:
    return b'{"offset":%d,"event":%b}\n' % (offset, json_codec.encode(data))


def read(path: Path, after: int = 0) -> tuple[list[Any], Ended | None]:
    """Return all that a reader finds, and check its offsets."""
    found: list[Event] = []
    with EventReader(str(path), after) as reader:
        while new := reader.read():
            found += new
        assert [event.offset for event in found] == list(range(after + 1, after + len(found) + 1))
        return [event.data for event in found], reader.ended


@pytest.fixture
def path(scratch: Path) -> Path:
    (scratch / ".events").mkdir(mode=0o700)
    return scratch / ".events" / "s-1.t-1"


@pytest.fixture
def files(scratch: Path) -> EventFiles:
    return file_engine(persist.Store(scratch)).event_files


@pytest.fixture
def writer(files: EventFiles) -> Iterator[EventWriter]:
    opened = files.writer("s-1", "t-1")
    opened.open()
    yield opened
    opened.close()


def emit(writer: EventWriter, *data: Any, durable: bool = False) -> int:
    return writer.append([json_codec.encode(each) for each in data], durable=durable)


@contextmanager
def broken_off(after_bytes: int) -> Iterator[None]:
    """Make the disk full after a number of bytes more."""
    real, left = os.write, after_bytes

    def write(fd: int, content: bytes) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, content[:left])
        left -= written
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        yield


# --- what a reader takes for an event ---------------------------------------------------------------------------------


@given(st.lists(json_values, max_size=5), st.integers(1, 90))
def test_events_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, data: list[Any], chunk_bytes: int
) -> None:
    """Any JSON comes back, read in chunks of any size.
    Fails if a reader does not keep the piece of a line at a chunk's end.
    """
    directory = tmp_path_factory.mktemp("events")
    writer = EventWriter(str(directory / "s-1.t-1"), "s-1", "t-1")
    writer.open()
    for value in data:
        emit(writer, value)
    writer.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_log, "_CHUNK_BYTES", chunk_bytes)
        assert read(directory / "s-1.t-1") == (data, None)


SAYINGS = ["Be", {"a": {"b": 1}}, [1, [2, [3]]], 'quote " brace } line \n', "Ünïcödé 🎈 \u2028", 12, None, {"": {}}]
WHOLE = b"".join(line(offset, data) for offset, data in enumerate(SAYINGS, 1)) + END


@pytest.mark.parametrize("chunk_bytes", [7, 4096])
def test_truncated_file_has_a_prefix_of_the_events(
    path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """A file that is cut at any byte has the events whose lines are whole, and never a wrong one.
    It has the end only if the end's line is whole.
    """
    monkeypatch.setattr(event_log, "_CHUNK_BYTES", chunk_bytes)
    for size in range(len(WHOLE) + 1):
        path.write_bytes(WHOLE[:size])
        lines = WHOLE[:size].count(b"\n")
        assert read(path) == (SAYINGS[:lines], "finished" if lines > len(SAYINGS) else None)


def test_stream_that_died_in_the_middle_of_a_line_is_ended(path: Path, files: EventFiles) -> None:
    """A file that is cut at any byte and ended by another process loses no event.
    It has no wrong one, and shows its end.

    Fails if the end line is appended to the torn line.
    """
    for size in range(len(WHOLE) - len(END) + 1):
        path.write_bytes(WHOLE[:size])
        files.end("s-1", "t-1", "died")
        # A line that lacks nothing but its newline counts as whole.
        whole = sum(size >= len(b"".join(WHOLE.splitlines(True)[:n])) - 1 for n in range(1, len(SAYINGS) + 1))
        assert read(path) == (SAYINGS[:whole], "died")


GARBAGE = [
    b'{"offset":2,"event":{"a":{"b":1}',
    b'{"offset":2,"event":{"a":{"b":1}}',
    b'{"offset":2,"event":"a}',
    b'{"offset":2,"event":[1}',
    b'{"offset":2,"event":1}}',
    b'{"offset":2,"event":1} ',
    b' {"offset":2,"event":1}',
    b'{"offset":2,"event":}',
    b'{"offset":2,"event":1,"event":2}',
    b'{"offset":2,"event":1}{"offset":2,"event":1}',
    b'{"offset":2,"event":"\xff"}',
    b'{"offset":2,"event":"\x00"}',
    b'{"offset":2,"event":' + b"[" * 100_000 + b"}",
    b'{"offset":1,"event":"again"}',
    b'{"offset":3,"event":"too early"}',
    b'{"offset":-2,"event":1}',
    b'{"offset":2.0,"event":1}',
    b'{"offset":"2","event":1}',
    b'{"offset":' + b"9" * 5000 + b',"event":1}',
    b'{"offset":\xd9\xa2,"event":1}',
    b'{"event":1,"offset":2}',
    b'{"end":"finished" }',
    b'{"end":"unknown"}',
    b'{"end":"finished"}\r',
    b'{"end":"fin',
    b"",
    b"null",
    b"\x00" * 4096,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("after", [0, 2])
def test_garbage_is_passed_over(path: Path, garbage: bytes, after: int) -> None:
    """A line that is no event, or not the next one, is ignored, also before the cursor, where no event is asked for.

    Fails if a line is accepted by its shape alone.
    """
    path.write_bytes(line(1, "a") + garbage + b"\n" + line(2, "b") + line(3, "c") + END)
    assert read(path, after) == (["a", "b", "c"][after:], "finished")
    path.write_bytes(line(1, "a") + garbage + b"\n")
    with EventReader(str(path), after) as reader:
        reader.read()
        assert (reader.count, reader.ended) == (1, None)


def test_events_behind_a_hole_do_not_count(path: Path) -> None:
    """The events end where a hole begins.
    The lines that a power cut left behind the hole have offsets that do not follow.
    """
    torn = line(3, "c")
    path.write_bytes(line(1, "a") + line(2, "b") + b"\x00" * len(torn) + line(4, "d") + line(5, "e"))
    assert read(path) == (["a", "b"], None)


def test_nothing_behind_the_end_line_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end line is the fence: events and other ends behind it do not count, however the file is cut into chunks."""
    path.write_bytes(line(1, "a") + END + line(2, "late") + b'{"end":"died"}\n')
    for chunk_bytes in (*range(1, 60), 4096):
        monkeypatch.setattr(event_log, "_CHUNK_BYTES", chunk_bytes)
        assert read(path) == (["a"], "finished")


def test_reader_who_comes_again_and_again_sees_each_event_once(path: Path) -> None:
    """The reader looks after each byte that the file grows by.
    It sees every event once, as soon as its line is whole.
    """
    path.touch()
    found: list[Any] = []
    with EventReader(str(path)) as reader, path.open("ab", buffering=0) as file:
        for byte in WHOLE:
            had_more = reader.has_more
            file.write(bytes([byte]))
            assert (had_more, reader.has_more) == (False, True)
            found += reader.read()
        assert [event.data for event in found] == SAYINGS
        assert [event.offset for event in found] == list(range(1, len(SAYINGS) + 1))
        assert (reader.read(), reader.ended) == ([], "finished")


def test_cursor_begins_behind_its_event(path: Path) -> None:
    """The reader skips `after` events, however many chunks that takes. At the end, and beyond it, there are none."""
    path.write_bytes(b"".join(line(n, "x" * 1000) for n in range(1, 1001)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_log, "_CHUNK_BYTES", 4096)
        assert len(read(path, 997)[0]) == 3
        assert read(path, 1000) == read(path, 1001) == ([], None)


def test_huge_event_passes(path: Path, writer: EventWriter) -> None:
    """An event of many chunks comes back, between two small ones."""
    huge = "é\n" * 4_000_000
    for value in ("a", huge, "b"):
        emit(writer, value)
    assert read(path) == (["a", huge, "b"], None)


# --- a writer whose write breaks off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [["refused"], [{"a": {"b": 1}}, [2], "3}"]], ids=["one", "several"])
def test_write_that_broke_off_costs_no_later_event(path: Path, files: EventFiles, refused: list[Any]) -> None:
    """If the disk is full at any byte of an emission, that one is refused.
    The next one is kept with the offset that it got.

    A part of the refused emission may be kept, if its lines are whole. Fails without the stock-taking. A refused line
    may lack nothing but its newline. Fails if a later newline makes an event of it, in the place of the next one.
    """
    whole = b"".join(line(offset, data) for offset, data in enumerate(refused, 2))
    for written in range(len(whole)):
        writer = files.writer("s-1", "t-1")
        writer.open()
        assert emit(writer, "before") == 1
        with broken_off(written), pytest.raises(persist.EmitFailed):
            emit(writer, *refused)
        kept = whole[:written].count(b"\n")
        assert emit(writer, "after") == kept + 2
        assert emit(writer, "later", "last") == kept + 4
        files.end("s-1", "t-1", "finished")
        assert read(path) == (["before", *refused[:kept], "after", "later", "last"], "finished")
        writer.close()
        path.unlink()


def test_write_that_breaks_off_again_and_again(path: Path, files: EventFiles) -> None:
    """Each attempt gets one byte further than the one before, until one succeeds. Only that one is kept."""
    size = len(line(1, "kept"))
    writer = files.writer("s-1", "t-1")
    writer.open()
    for written in range(size):
        with broken_off(written), pytest.raises(persist.EmitFailed):
            emit(writer, "kept")
    assert emit(writer, "kept") == 1
    assert read(path) == (["kept"], None)
    writer.close()


def test_interrupt_behind_the_write_keeps_what_was_written(path: Path, writer: EventWriter) -> None:
    """Ctrl-C after the bytes are written keeps the event, and the next one follows.

    Fails without the stock-taking.
    """
    with pytest.MonkeyPatch.context() as patch:
        real = os.write

        def interrupted(fd: int, content: bytes) -> int:
            real(fd, content)
            raise KeyboardInterrupt

        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            emit(writer, "a")
    assert emit(writer, "b") == 2
    assert read(path) == (["a", "b"], None)


# --- the fence --------------------------------------------------------------------------------------------------------


def test_fenced_writer_stays_fenced(path: Path, files: EventFiles, writer: EventWriter) -> None:
    """After the end of the stream every emission is `Fenced`: at once, later, and when the file is gone.

    Fails without the check of where the write ended. The last case fails if a missing file is reported as a disk error.
    """
    emit(writer, "a")
    files.end("s-1", "t-1", "cancelled")
    for _ in range(2):
        with pytest.raises(Fenced):
            emit(writer, "late")
    files.remove_session("s-1")
    with pytest.raises(Fenced):
        emit(writer, "late")
    assert not path.exists()


def test_fence_is_seen_after_a_write_that_broke_off(path: Path, files: EventFiles, writer: EventWriter) -> None:
    """The fence is seen although the stream is ended, or its file removed, between a failed emission and the next one.

    Fails if the stock-taking does not look for the fence.
    """
    emit(writer, "a")
    with broken_off(9), pytest.raises(persist.EmitFailed):
        emit(writer, "b")
    files.end("s-1", "t-1", "cancelled")
    with pytest.raises(Fenced):
        emit(writer, "late")
    assert read(path) == (["a"], "cancelled")
    files.remove_session("s-1")
    with pytest.raises(Fenced):
        emit(writer, "late")


def test_fence_that_came_into_the_middle_of_a_write_is_one(path: Path, writer: EventWriter) -> None:
    """An end line inside a half-written event cannot be read, but the writer that has seen it stays fenced for good.

    Fails if the writer forgets it.
    """
    emit(writer, "a")
    with path.open("ab") as file:
        file.write(b'{"offset":2,"ev{"end":"cancelled"}\n')
    for _ in range(3):
        with pytest.raises(Fenced):
            emit(writer, "late")


def test_successor_of_the_same_id_is_not_written_to(path: Path, files: EventFiles, writer: EventWriter) -> None:
    """After a failed emission, the session is created anew with a stream of the same id.
    The old writer takes no stock of the new file.
    """
    emit(writer, "a")
    with broken_off(9), pytest.raises(persist.EmitFailed):
        emit(writer, "b")
    assert writer._held is not None
    files.remove_session("s-1")
    successor = files.writer("s-1", "t-1")
    successor.open()
    # The new file is as long as the old one, so that its size does not tell them apart.
    missing = os.fstat(writer._held.fd).st_size - len(line(1, ""))
    emit(successor, new := "n" * missing)
    for _ in range(2):
        with pytest.raises(Fenced):
            emit(writer, "late")
    assert emit(successor, "newer") == 2
    assert read(path) == ([new, "newer"], None)
    successor.close()


def test_end_line_that_the_stock_taking_misses_is_a_fence(
    path: Path, files: EventFiles, writer: EventWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that ends after the stock-taking and before the write fences the write.

    Fails if the size is read after the events.
    """
    emit(writer, "a")
    with broken_off(9), pytest.raises(persist.EmitFailed):
        emit(writer, "b")
    real = EventReader.read

    def ended_behind_it(reader: EventReader) -> list[Event]:
        found = real(reader)
        if not found:
            files.end("s-1", "t-1", "cancelled")
        return found

    monkeypatch.setattr(EventReader, "read", ended_behind_it)
    with pytest.raises(Fenced):
        emit(writer, "late")
    monkeypatch.undo()
    assert read(path) == (["a"], "cancelled")


# --- what the disk refuses --------------------------------------------------------------------------------------------

CALLS = ["open", "write", "read", "fsync", "close", "mkdir", "fstat", "lstat", "stat", "flock", "any"]
MOST_PLACES = 100


@pytest.mark.parametrize("durable", [False, True], ids=["plain", "durable"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("call", CALLS)
def test_refused_emission_costs_nothing_else(scratch: Path, call: str, is_first: bool, durable: bool) -> None:
    """After any error of any kernel call, `emit` raises an error of persist or keeps its promise.
    The next emission works.

    No offset is left out, no event is there twice, and no descriptor is left open.
    """
    store = persist.Store(scratch, keep_events_s=1000.0)
    store.create("s", {"messages": []})
    place, hits = 1, 1
    while hits:
        hits = 0
        assert place < MOST_PLACES
        for fault in faults(call, place):
            before = descriptors(collect=True)
            hits += _emit_under(fault, store, is_first=is_first, durable=durable)
            assert descriptors() == before, fault
        place += 1


def _emit_under(fault: Fault, store: persist.Store, *, is_first: bool, durable: bool) -> int:
    said = [] if is_first else ["before"]
    with store.start_stream("s") as stream:
        for each in said:
            stream.emit(each)
        error = None
        with injecting(fault) as injection:
            try:
                stream.emit("tried", durable=durable)
            except (persist.PersistError, OSError) as failure:
                error = failure
        if error is None:
            said.append("tried")
        else:
            assert injection.hits, error
            assert isinstance(error, (OSError, persist.LockError) if is_first else persist.EmitFailed), fault
            assert isinstance(error, persist.PersistError), fault
        # The event was written, but not synced, so it may be in the file.
        may_stand = error is not None and durable
        stream.emit("next")
        stream.emit("last")
        found = [event.data for event in store.events("s", stream.id)]
        assert found == [*said, "next", "last"] or (may_stand and found == [*said, "tried", "next", "last"]), fault
        stream.finish()
    return injection.hits


def test_no_durable_emission_claims_success_after_a_failed_sync(store: persist.Store) -> None:
    """After a failed sync no emission promises durability.
    The kernel answers OK to the second fsync of data that it dropped.

    Fails if the writer forgets the failure. Emissions that need not be durable go on.
    """
    store.create("s", {"messages": []})
    with store.start_stream("s") as stream:
        stream.emit(1, durable=True)
        with injecting(Fault("fsync", 1, errno.EIO, is_persistent=False)), pytest.raises(persist.EmitFailed):
            stream.emit(2, durable=True)
        for n in (3, 4):
            with pytest.raises(persist.EmitFailed):
                stream.emit(n, durable=True)
        assert stream.emit(5) == 5
        stream.finish()
    assert [event.data for event in store.events("s", stream.id)] == [1, 2, 3, 4, 5]


def test_short_writes_are_completed(path: Path, writer: EventWriter) -> None:
    """The kernel takes half of each write. The writer writes the rest, and nothing fails."""
    with injecting(Fault("write", 1, SHORT, is_persistent=True)) as injection:
        assert emit(writer, "a", {"b": "c"}) == 2
    assert injection.hits > 1
    assert read(path) == (["a", {"b": "c"}], None)


# --- durability -------------------------------------------------------------------------------------------------------


def test_durable_emission_syncs_the_file_and_once_its_name(
    path: Path, writer: EventWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable emission returns when the file is synced. The first one also syncs the directories above.
    Other emissions sync nothing.

    Fails without either sync.
    """
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        synced.append(f"{name} of {os.fstat(fd).st_size} bytes" if name == path.name else name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    emit(writer, "a")
    assert synced == []
    emit(writer, "b", durable=True)
    assert synced == [f"s-1.t-1 of {2 * len(line(1, 'a'))} bytes", ".events", path.parent.parent.name]
    emit(writer, "c", durable=True)
    assert synced[3:] == [f"s-1.t-1 of {3 * len(line(1, 'a'))} bytes"]
    emit(writer, "d")
    assert len(synced) == 4


# --- waking -----------------------------------------------------------------------------------------------------------


def test_those_who_wait_are_woken_by_every_append_and_the_end(
    path: Path, files: EventFiles, writer: EventWriter
) -> None:
    """A follower in the same process is woken at once, and never by events of another file."""
    calls: list[str] = []
    me = threading.get_ident()

    def waker(name: str) -> Callable[[], None]:
        # The thread that looks at the files calls it, too.
        return lambda: calls.append(name) if threading.get_ident() == me else None

    with watch.waking(str(path), waker("a")), watch.waking(str(path), waker("b")):
        with watch.waking(str(path.with_name("s-1.t-2")), waker("another")):
            emit(writer, 1)
            assert calls == ["a", "b"]
            files.end("s-1", "t-1", "finished")
            assert calls == ["a", "b"] * 2
    with pytest.raises(Fenced):
        emit(writer, 2)
    assert calls == ["a", "b"] * 2


def test_garbage_collector_may_come_at_any_moment(path: Path) -> None:
    """The garbage collector may collect a dropped follower in any thread, even in one that is about to wait itself.

    Fails (the thread waits for itself) if the guard of the waiting followers is not re-entrant.
    """

    class Collecting(type(path)):  # type: ignore[misc]
        def __hash__(self) -> int:
            gc.collect()
            return hash(str(self))

    def wait_and_drop() -> None:
        dropped: dict[str, Any] = {"stack": ExitStack()}
        dropped["itself"] = dropped
        dropped["stack"].enter_context(watch.waking(str(path), lambda: None))
        del dropped
        with watch.waking(Collecting(path), done.set):
            pass
        done.set()

    done = threading.Event()
    threading.Thread(target=wait_and_drop, daemon=True).start()
    assert done.wait(20.0)


# --- expiry -----------------------------------------------------------------------------------------------------------


def expiring(scratch: Path, keep_s: float) -> EventFiles:
    return file_engine(persist.Store(scratch, keep_events_s=keep_s)).event_files


def test_sweep_removes_at_once_what_has_expired(scratch: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep removes expired files itself.
    A thread would end with the sweeping command, so it leaves no work to one.
    """
    removed: list[tuple[str, threading.Thread]] = []
    real = os.unlink

    def unlink(name: Path) -> None:
        real(name)
        removed.append((Path(name).name, threading.current_thread()))

    files = expiring(scratch, 1000.0)
    path.write_bytes(WHOLE)
    path.with_name("s-2.t-1").write_bytes(WHOLE)
    os.utime(path, (1, 1))
    threads = threading.active_count()
    monkeypatch.setattr(os, "unlink", unlink)
    files.sweep()
    assert removed == [(path.name, threading.current_thread())]
    assert threading.active_count() == threads


def test_events_of_a_stream_with_a_lease_do_not_expire(scratch: Path, path: Path) -> None:
    """A stream that is silent for long may still emit, so its lease keeps its events, however old they are."""
    files = expiring(scratch, 1000.0)
    path.write_bytes(WHOLE)
    os.utime(path, (1, 1))
    lease = scratch / ".leases" / path.name
    lease.touch()
    for clean_up in (files.sweep, lambda: files.forget("s-1", "t-2"), files.close):
        clean_up()
        assert path.exists()
    lease.unlink()
    files.sweep()
    assert not path.exists()


def test_start_in_the_session_removes_what_has_expired_there(scratch: Path, path: Path) -> None:
    """A session's next stream removes the expired files of this session, and no other files."""
    files = expiring(scratch, 1000.0)
    young, other = path.with_name("s-1.t-2"), path.with_name("s-2.t-1")
    for each in (path, young, other):
        each.write_bytes(WHOLE)
    for each in (path, other):
        os.utime(each, (1, 1))
    files.forget("s-1", "t-3")
    assert (path.exists(), young.exists(), other.exists()) == (False, True, True)


def test_clock_that_was_set_back_keeps_nothing_for_ever(scratch: Path, path: Path) -> None:
    """A file with a time in the future is kept after the first sweep for as long as any other file.

    Fails if its age may be negative.
    """
    path.write_bytes(WHOLE)
    os.utime(path, (2**32, 2**32))
    files = expiring(scratch, 1000.0)
    files.sweep()
    assert path.exists()
    assert abs(path.stat().st_mtime - time.time()) < 60
    os.utime(path, (path.stat().st_mtime - 1001,) * 2)
    files.sweep()
    assert not path.exists()


def test_clock_of_a_link_is_not_set(scratch: Path, path: Path) -> None:
    """The target of a link is another program's file, so its time stays as it is."""
    target = scratch / "target"
    target.write_bytes(b"")
    os.utime(target, (2**32, 2**32))
    path.symlink_to(target)
    os.utime(path, (2**32, 2**32), follow_symlinks=False)
    expiring(scratch, 1000.0).sweep()
    assert target.stat().st_mtime == 2**32
