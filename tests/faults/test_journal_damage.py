"""Damaged journals: the next writer folds away what a crash can leave, and any other damage is an error.

The error writes nothing. Each test damages the files of a session whose every committed state is known. The tests fail
without their mechanisms: the CRC of a record, the rule of the altered newline, that of whole sectors, and `synced`.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness.faults import TORN, Fault, injecting, quick_directory, refusing
from harness.files import file_engine
from harness.journals import journal_of, line_of, parted, record_of, sealed, traffic
from harness.sweeps import sweep
from harness.verbs import within_deadline

import persist
from persist.storage import disk

SECTOR = 512


@dataclass
class History:
    """A session with a journal, the journal's `content`, and the session's state after each commit.

    Attributes:
        states: by revision, the data, and the end of the journal.
        room: the number of zeros that `put` writes after the content.
    """

    directory: Path
    content: bytes = b""
    states: dict[int, tuple[dict[str, Any], int]] = field(default_factory=dict)
    room: int = 0

    def store(self, mode: str = "always") -> persist.Store:
        """Return a store that knows nothing yet, like that of another process."""
        return persist.Store(self.directory, journal=mode)  # type: ignore[arg-type]

    def note(self) -> None:
        session = self.store().load("s")
        self.content = self.path.read_bytes()
        self.states[session.revision] = (session.data, len(self.content))

    @property
    def path(self) -> Path:
        return journal_of(self.store())

    def assert_committed(self, session: persist.Session) -> int:
        """Require that the session has a committed state, and return its revision."""
        assert session.revision in self.states
        assert session.data == self.states[session.revision][0]
        return session.revision

    def put(self, content: bytes, path: Path | None = None) -> None:
        (path or self.path).write_bytes(content + bytes(self.room))


@pytest.fixture(scope="module")
def history() -> Iterator[History]:
    """Make a journal of a few records.

    They are an append, a change of the head, a turn with a partial and its end, and a save in the middle.
    """
    with quick_directory() as directory:
        found = History(directory)
        store = found.store()
        store.create("s", {"title": "New chat", "messages": [{"id": "m1", "role": "user", "content": "J* hi"}]})
        found.note()
        store.append("s", "messages", {"id": "m2", "content": "é J @ *" * 3})
        found.note()
        store.update("s", lambda tx: tx.data.update(title="File locks"))
        found.note()
        with store.start_stream("s", {"role": "user", "content": "Why?"}) as stream:
            found.note()
            stream.checkpoint({"role": "assistant", "content": "Be"})
            found.note()
            stream.finish({"role": "assistant", "content": "Because."})
        found.note()
        session = store.load("s")
        session.data["messages"][0]["content"] = "edited"
        session.save()
        found.note()
        yield found


@pytest.fixture(params=[0, 3 * SECTOR], ids=["dense", "with room"])
def damaged(history: History, request: pytest.FixtureRequest) -> Iterator[History]:
    """Return the history for a test to damage, and make it whole again for the next test."""
    files = {path: path.read_bytes() for path in history.directory.glob("s.*") if path.is_file()}
    history.room = request.param
    history.put(history.content)
    yield history
    for path in history.directory.glob("s.*"):
        path.unlink()
    for path, content in files.items():
        path.write_bytes(content)


def outcome(verb: Callable[[], Any]) -> Any:
    """Return the result of a verb, or the kind of its error. Damage may lead to no other errors than these."""
    try:
        return verb()
    except (persist.CorruptSession, persist.UnsupportedFormat) as error:
        return type(error)


Verb = Callable[[persist.Store], object]


def head(store: persist.Store) -> object:
    return dict(store.head("s").fields)


def tail(store: persist.Store) -> object:
    return store.tail("s")


def load(store: persist.Store) -> object:
    return store.load("s").data


def check(store: persist.Store) -> object:
    return store.check()


def streams(store: persist.Store) -> object:
    return store.streams()


def rename(store: persist.Store) -> object:
    return store.update("s", lambda tx: tx.data.update(title="new"))


def append_new(store: persist.Store) -> object:
    return store.append("s", "messages", {"id": "new"})


def append_again(store: persist.Store) -> object:
    """Append an item that is stored already, which would be acknowledged without a commit."""
    return store.append("s", "messages", {"id": "m2", "content": "é J @ *" * 3})


def fold(store: persist.Store) -> object:
    return store.compact("s")


def start_stream(store: persist.Store) -> object:
    return store.start_stream("s")


def clear_stale(store: persist.Store) -> object:
    return sweep(store, every_session=True)


def accept(store: persist.Store) -> object:
    return store.accept("s").data


def delete(store: persist.Store) -> object:
    store.delete("s")
    return None


# --- truncation -------------------------------------------------------------------------------------------------------


def test_every_truncation_shows_a_committed_revision(damaged: History) -> None:
    """A journal that is cut off at any byte shows the state of its whole records, and load and head agree."""
    content, store = damaged.content, damaged.store()
    first_end = damaged.states[1][1]
    path = damaged.path
    for length in range(len(content) + 1):
        damaged.put(content[:length], path)
        loaded = outcome(lambda: store.load("s"))
        if length < first_end:
            # The opening is durable before the document names it, so no crash removes it.
            assert loaded is outcome(lambda: store.head("s")) is persist.CorruptSession
            continue
        expected = max(revision for revision, (_, end) in damaged.states.items() if end <= length)
        assert damaged.assert_committed(loaded) == expected
        assert store.head("s").revision == expected


def test_next_writer_folds_a_torn_tail_away(damaged: History) -> None:
    """After a cut in mid-record the next commit, of whichever verb, makes a new document.

    The journal is not truncated in place.
    """
    content, path = damaged.content, damaged.path
    document = damaged.directory / "s.json"
    before = document.read_bytes()
    ends = sorted(end for _, end in damaged.states.values())
    for end in (ends[0] + 1, ends[2] - 1, ends[3] + 40, ends[-1] - 2):
        for write in (append_new, rename, fold):
            for leftover in damaged.directory.glob("s.*.journal"):
                leftover.unlink()
            damaged.put(content[:end], path)
            document.write_bytes(before)
            store = damaged.store()
            expected = store.load("s")
            damaged.assert_committed(expected)
            write(store)
            assert not path.exists()
            found = damaged.store().load("s")
            assert found.data["messages"][: len(expected.data["messages"])] == expected.data["messages"]
            assert found.data != expected.data or found.revision == expected.revision
            assert parted(damaged.path.read_bytes())[1] == []


def test_writer_that_knows_the_session_folds_a_torn_tail_too(damaged: History) -> None:
    """A process that knows the session sees the torn tail of a dead process at its next commit, and folds it away."""
    store = damaged.store()
    store.append("s", "messages", {"id": "warm"})
    damaged.put(damaged.path.read_bytes().rstrip(b"\0") + b'{"crc":"0000')
    store.append("s", "messages", {"id": "new"})
    assert [each["id"] for each in damaged.store().load("s").data["messages"][-2:]] == ["warm", "new"]
    assert parted(damaged.path.read_bytes())[1] == []


# --- flipped bits -----------------------------------------------------------------------------------------------------


def flips(content: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each content in which one bit differs, from a place on, and that place."""
    for place in range(start, len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            yield place, bytes(flipped)


def test_no_flipped_bit_of_a_whole_journal_goes_unnoticed(damaged: History) -> None:
    """A flip of any bit of a whole journal is an error, and never shows an older or another state.

    This includes the opening, each record and each newline, also the last one. No crash flips a bit, and no flip gives
    what a crash can leave. So there is no position at all where an older revision would be shown.
    """
    content, store, path = damaged.content, damaged.store(), damaged.path
    shown = set()
    for place, flipped in flips(content):
        damaged.put(flipped, path)
        found = outcome(lambda: store.load("s"))
        if isinstance(found, persist.Session):
            shown.add(place)
        elif found is persist.UnsupportedFormat:
            assert place == content.index(b"3,"), "the version"
    assert shown == set()


def test_flipped_bit_keeps_writers_out(damaged: History) -> None:
    """Every verb raises the error, and not a byte is written, whichever verb comes first.

    One bit of each byte is tried.
    """
    content, path = damaged.content, damaged.path
    files = sorted(each.name for each in damaged.directory.iterdir())
    for place, flipped in list(flips(content))[::13]:
        damaged.put(flipped, path)
        store = damaged.store()
        for verb in (append_again, append_new, rename, fold, start_stream, delete):
            assert outcome(functools.partial(verb, store)) in (persist.CorruptSession, persist.UnsupportedFormat), place
        assert path.read_bytes() == flipped + bytes(damaged.room)
        assert sorted(each.name for each in damaged.directory.iterdir()) == files


def test_head_of_a_journal_whose_last_record_was_altered_is_told(damaged: History) -> None:
    """A head never shows an older revision than was acknowledged.

    So damage of the last record is an error for it, too.
    """
    content, store, path = damaged.content, damaged.store(), damaged.path
    last = damaged.states[max(damaged.states) - 1][1]
    # A head reads from the record before the last one on, and does not read earlier ones.
    for place, flipped in flips(content, damaged.states[max(damaged.states) - 2][1]):
        damaged.put(flipped, path)
        found = outcome(lambda: store.head("s"))
        if isinstance(found, persist.Head):
            assert place < last
            assert (found.revision, found.fields["title"]) == (max(damaged.states), "File locks")


def test_flipped_bit_of_a_torn_journal_shows_no_other_state(damaged: History) -> None:
    """With a torn tail, a flip in the tail leaves it torn or makes it damage. A flip before the tail is damage."""
    content = damaged.content
    whole = damaged.states[5][1]
    store, path = damaged.store(), damaged.path
    shown = set()
    for place, flipped in flips(content[: whole + 120]):
        damaged.put(flipped, path)
        found = outcome(lambda: store.load("s"))
        if isinstance(found, persist.Session):
            assert damaged.assert_committed(found) == 5
            shown.add(place)
    assert shown == set(range(whole, whole + 120))


def test_head_that_is_not_where_a_record_says_is_told(damaged: History) -> None:
    """A head is an error if the record at the place that the last record names has no head.

    The record there is whole. No head is made up.
    """
    opening, lines = parted(damaged.content)
    first = record_of(lines[0])
    assert "head" not in first
    damaged.put(sealed(opening, [first, first | {"revision": 3, "head_at": len(opening)}]))
    with pytest.raises(persist.CorruptSession):
        damaged.store().head("s")


def test_head_of_a_journal_that_lost_lines_is_told(damaged: History) -> None:
    """A head of a journal that lost lines is an error, and never falls back to the document's own head.

    A record there knew more to be durable than stands before it. Fails without the look at where the last record itself
    begins.
    """
    opening, lines = parted(damaged.content)
    for gone in range(len(lines) - 1):
        damaged.put(b"".join([opening, *lines[:gone], *lines[gone + 1 :]]))
        for verb in (head, load, append_new):
            with pytest.raises(persist.CorruptSession):
                verb(damaged.store())


def test_tail_of_a_journal_whose_records_do_not_follow_one_another_is_told(damaged: History) -> None:
    """No list is read from whole records of which one was lost or two have changed places.

    Fails without the look at what each record follows on.
    """
    opening, lines = parted(damaged.content)
    for place in range(len(lines) - 1):
        one, two, *behind = lines[place:]
        for rest in ([two, one, *behind], [two, *behind]):
            damaged.put(b"".join([opening, *lines[:place], *rest]))
            # A tail reads as many records as it needs, and here it needs all.
            for verb in (tail, load):
                with pytest.raises(persist.CorruptSession):
                    verb(damaged.store())


def test_head_whose_fields_stand_where_no_fields_are_is_told(damaged: History) -> None:
    """A head is an error if another whole record stands at the place of the last record with a head.

    Fails if the document's fields are shown.
    """
    opening, lines = parted(damaged.content)
    first = record_of(lines[0])
    second = first | {"revision": first["revision"] + 1, "changes": [], "head_at": len(opening)}
    damaged.put(sealed(opening, [first, second]))
    with pytest.raises(persist.CorruptSession, match="there is no record with the fields at this byte"):
        damaged.store().head("s")


def test_field_that_is_called_like_a_list_is_told(damaged: History) -> None:
    """A record with a field and a list of one name is an error, although its CRC is right.

    Neither a load nor a head picks one of them.
    """
    opening, lines = parted(damaged.content)
    *before, last = map(record_of, lines)
    last["head"] = {"epoch": 0, "owner": None, "fields": {"title": "t", "messages": [1]}}
    last.pop("head_at", None)
    damaged.put(sealed(opening, [*before, last]))
    for verb in (head, load, tail):
        with pytest.raises(persist.CorruptSession):
            verb(damaged.store())


def test_head_of_a_last_record_that_says_nothing_of_what_is_durable_comes_to_an_end(damaged: History) -> None:
    """A head is refused if its last record does not say what is durable.

    Its crc is right, so a newer version wrote it. Fails if the head looks for an older one for ever.
    """
    opening, lines = parted(damaged.content)
    last = record_of(lines[-1])
    del last["synced"]
    damaged.put(sealed(opening, [*map(record_of, lines[:-1]), last]))
    with pytest.raises(persist.UnsupportedFormat):
        within_deadline(lambda: damaged.store().head("s"))


# --- sectors ----------------------------------------------------------------------------------------------------------


def long_record(history: History, size: int) -> tuple[bytes, int]:
    """Return a journal whose last record is `size` bytes long, and where that record begins."""
    content = history.content
    opening, lines = parted(content)
    last = record_of(lines[-1])
    fitting = last | {"revision": last["revision"] + 1, "head_at": last.get("head_at", 0), "commit": ""}
    fitting["changes"] = [{"in": "messages", "at": 0, "insert": [""]}]
    fitting["counts"] = {"messages": last["counts"]["messages"] + 1}
    records = [*map(record_of, lines), fitting]
    short = len(sealed(opening, records)) - len(content)
    fitting["commit"] = "x" * (size - short)
    made = sealed(opening, records)
    assert made[: len(content)] == content
    assert len(made) == len(content) + size
    return made, len(content)


def test_lost_sectors_of_the_last_record_are_a_torn_tail(damaged: History) -> None:
    """A power cut that leaves zeros in any of the appended sectors leaves a torn tail, and the state before.

    Each sector is written whole, or not at all.
    """
    content, start = long_record(damaged, 4 * SECTOR)
    edges = [start, *range(start + -start % SECTOR, len(content), SECTOR), len(content)]
    for lost in range(1, 2 ** (len(edges) - 1)):
        spoilt = bytearray(content)
        for number, (begin, end) in enumerate(itertools.pairwise(edges)):
            if lost >> number & 1:
                spoilt[begin:end] = bytes(end - begin)
        damaged.put(bytes(spoilt))
        assert damaged.assert_committed(damaged.store().load("s")) == max(damaged.states)
        assert damaged.store().head("s").revision == max(damaged.states)


def test_newline_in_a_lost_sector_of_its_own_is_a_torn_tail(damaged: History) -> None:
    """A lost newline is a torn tail if it stands alone in a new sector, because a crash can lose that sector."""
    size = 2 * SECTOR + -len(damaged.content) % SECTOR + 1
    content, _ = long_record(damaged, size)
    assert len(content) % SECTOR == 1
    damaged.put(content[:-1] + b"\0")
    assert damaged.assert_committed(damaged.store().load("s")) == max(damaged.states)
    damaged.store().append("s", "messages", {"id": "new"})
    assert parted(damaged.path.read_bytes())[1] == []


def test_newline_in_a_sector_that_is_lost_with_the_beginning_of_another_record_is_a_torn_tail(damaged: History) -> None:
    """A lost sector with one record's newline and the start of another record is a torn tail.

    Two writers died before their syncs. Fails if a whole record is taken for altered where zeros stand in the place of
    its newline.
    """
    content, _ = long_record(damaged, 2 * SECTOR + -len(damaged.content) % SECTOR + 1)
    opening, lines = parted(content)
    records = list(map(record_of, lines))
    last = records[-1]
    counts = {"messages": last["counts"]["messages"] + 1}
    behind = last | {"revision": last["revision"] + 1, "synced": 0, "commit": "y" * 900, "counts": counts}
    both, lost = sealed(opening, [*records, behind]), len(content) - 1
    assert lost % SECTOR == 0
    damaged.put(both)
    assert damaged.store().load("s").revision == max(damaged.states) + 2
    damaged.put(both[:lost] + bytes(SECTOR) + both[lost + SECTOR :])
    assert damaged.assert_committed(damaged.store().load("s")) == max(damaged.states)
    assert damaged.store().head("s").revision == max(damaged.states)


def test_zeros_in_a_part_of_a_sector_are_damage(damaged: History) -> None:
    """Zeros in a part of a sector are damage, because a power cut loses no less than a sector."""
    content, start = long_record(damaged, 4 * SECTOR)
    first = start + -start % SECTOR
    for begin, end in ((first + 1, first + SECTOR), (first, first + SECTOR - 1), (first + 7, first + 8)):
        damaged.put(content[:begin] + bytes(end - begin) + content[end:])
        with pytest.raises(persist.CorruptSession):
            damaged.store().load("s")


def two_records(history: History, synced: int) -> tuple[bytes, int, int]:
    """Return a journal with a long record, and another one after it that says how far the file was durable."""
    content, start = long_record(history, 4 * SECTOR)
    opening, lines = parted(content)
    records = list(map(record_of, lines))
    last = records[-1] | {"revision": records[-1]["revision"] + 1, "synced": synced}
    last["counts"] = {"messages": last["counts"]["messages"] + 1}
    return sealed(opening, [*records, last]), start, len(content)


def test_lost_record_before_one_that_knew_it_durable_is_damage(damaged: History) -> None:
    """A lost record that a later one knew to be durable is damage, because it was acknowledged.

    It is never folded away. The damage is an error, and nothing is written.
    """
    _, start, end = two_records(damaged, 0)
    first = start + -start % SECTOR
    for synced in (start + 1, end):
        content, *_ = two_records(damaged, synced)
        damaged.put(content)
        assert damaged.store().load("s").revision == max(damaged.states) + 2
        spoilt = content[:first] + bytes(SECTOR) + content[first + SECTOR :]
        damaged.put(spoilt)
        for verb in (lambda: damaged.store().load("s"), lambda: damaged.store().append("s", "messages", 1)):
            with pytest.raises(persist.CorruptSession, match="persist accept"):
                verb()
        assert damaged.path.read_bytes() == spoilt + bytes(damaged.room)


def test_two_records_that_nobody_acknowledged_are_a_torn_tail(damaged: History) -> None:
    """Two records whose writers died before their syncs are a torn tail if the first one has lost sectors.

    The second record does not prove that the first one was durable.
    """
    for synced in (0, max(end for _, end in damaged.states.values())):
        content, start, _ = two_records(damaged, synced)
        first = start + -start % SECTOR
        damaged.put(content[:first] + bytes(SECTOR) + content[first + SECTOR :])
        assert damaged.assert_committed(damaged.store().load("s")) == max(damaged.states)
    store = damaged.store()
    store.append("s", "messages", {"id": "new"})
    assert store.load("s").revision == max(damaged.states) + 1
    assert parted(damaged.path.read_bytes())[1] == []


# --- nonsense, sealed -------------------------------------------------------------------------------------------------

HUGE = "9" * 30
NONSENSE: dict[str, bytes] = {
    "revision is a text": b'"revision":"8"',
    "revision is huge": b'"revision":' + HUGE.encode(),
    "revision has too many digits": b'"revision":' + b"9" * 5000,
    "revision is below zero": b'"revision":-1',
    "revision is a fraction": b'"revision":8.0',
    "time is none": b'"updated_at":"soon"',
    "time is out of range": b'"updated_at":"0001-01-01T00:00:00+14:00"',
    "time is a number": b'"updated_at":5',
    "commit is a number": b'"commit":5',
    "commit is a lone surrogate": b'"commit":"\\ud800"',
    "counts are a list": b'"counts":[1]',
    "counts are negative": b'"counts":{"messages":-1}',
    "counts are huge": b'"counts":{"messages":' + HUGE.encode() + b"}",
    "counts of something else": b'"counts":{"title":1}',
    "counts are null": b'"counts":null',
    "count of a list is null": b'"counts":{"messages":null}',
    "count is a text": b'"counts":{"messages":"2"}',
    "synced is huge": b'"synced":' + HUGE.encode(),
    "synced is a text": b'"synced":"x"',
    "head_at is below zero": b'"head_at":-5',
    "head_at is huge": b'"head_at":' + HUGE.encode(),
    "head_at is in mid-record": b'"head_at":3',
    "head is a number": b'"head":5',
    "head is empty": b'"head":{}',
    "head without fields": b'"head":{"epoch":1,"owner":null}',
    "head of a list": b'"head":{"epoch":1,"owner":null,"fields":[1]}',
    "head of a number": b'"head":{"epoch":1,"owner":null,"fields":5}',
    "head with a list of messages": b'"head":{"epoch":1,"owner":null,"fields":{"messages":[1]}}',
    "head with a header": b'"head":{"epoch":1,"owner":null,"fields":{"_persist":{}}}',
    "head with a number of no end": b'"head":{"epoch":1,"owner":null,"fields":{"a":1e400}}',
    "head with a lone surrogate": b'"head":{"epoch":1,"owner":null,"fields":{"a":"\\ud800"}}',
    "head with NaN": b'"head":{"epoch":1,"owner":null,"fields":{"a":NaN,"b":"\\ud800"}}',
    "head nested deeply": b'"head":{"epoch":1,"owner":null,"fields":{"a":' + b"[" * 9000 + b"]" * 9000 + b"}}",
    "head without epoch": b'"head":{"owner":null,"fields":{}}',
    "head with an epoch below zero": b'"head":{"epoch":-1,"owner":null,"fields":{}}',
    "head with a huge epoch": b'"head":{"epoch":' + HUGE.encode() + b',"owner":null,"fields":{}}',
    "head whose owner is a list": b'"head":{"epoch":1,"owner":[1],"fields":{}}',
    "head whose owner has no process": b'"head":{"epoch":1,"owner":{"stream_id":"a"},"fields":{}}',
    "head whose owner is of odd types": b'"head":{"epoch":1,"owner":{"stream_id":[],"pid":"x"},"fields":{}}',
    "head with something more": b'"head":{"epoch":1,"owner":null,"fields":{},"later":1}',
    "active stream that is a list": b'"head":{"epoch":1,"owner":null,"fields":{"active_stream_id":[1]}}',
    "changes are an object": b'"changes":{"in":"messages"}',
    "changes are numbers": b'"changes":[5]',
    "change without a field": b'"changes":[{"at":0}]',
    "change of a small field": b'"changes":[{"in":"title","at":0,"insert":[1]}]',
    "change behind the end": b'"changes":[{"in":"messages","at":99,"insert":[1]}]',
    "change at a huge place": b'"changes":[{"in":"messages","at":' + HUGE.encode() + b',"insert":[1]}]',
    "change below zero": b'"changes":[{"in":"messages","at":-1,"insert":[1]}]',
    "change that removes less than nothing": b'"changes":[{"in":"messages","at":1,"remove":-1}]',
    "change that inserts a text": b'"changes":[{"in":"messages","at":0,"insert":"ab"}]',
    "gone is a text": b'"changes":[{"in":"messages","gone":"x"}]',
    "gone and more": b'"changes":[{"in":"messages","gone":true,"value":1,"insert":[1]}]',
    "gone and inserted into": b'"changes":[{"in":"messages","gone":true},{"in":"messages","at":0,"insert":[1]}]',
    "change of the header": b'"changes":[{"in":"_persist","value":{}}]',
    "change with something more": b'"changes":[{"in":"messages","at":0,"insert":[1],"later":1}]',
    "head_at and no head there": b'"head_at":48',
    "synced behind itself": b'"synced":100000',
    "value nested deeply": b'"changes":[{"in":"messages","value":' + b"[" * 9000 + b"]" * 9000 + b"}]",
    "value that is a list cut off": b'"changes":[{"in":"messages","value":[}]',
    "value with a number of no end": b'"changes":[{"in":"messages","value":[1e400]}]',
    "item nested deeply": b'"changes":[{"in":"messages","at":0,"insert":[' + b"[" * 9000 + b"]" * 9000 + b"]}]",
    "item with a lone surrogate": b'"changes":[{"in":"messages","at":0,"insert":["\\ud800"]}]',
    "item with NaN": b'"changes":[{"in":"messages","at":0,"insert":[NaN]}]',
    "item with NaN and a lone surrogate": b'"changes":[{"in":"messages","at":0,"insert":[NaN,"\\ud800"]}]',
    "item with bad UTF-8": b'"changes":[{"in":"messages","at":0,"insert":["\xff"]}]',
    "item with too many digits": b'"changes":[{"in":"messages","at":0,"insert":[' + b"9" * 5000 + b"]}]",
    "item that is no end of a number": b'"changes":[{"in":"messages","at":0,"insert":[1e999]}]',
    "value with too many digits": b'"changes":[{"in":"messages","value":{"a":' + b"9" * 5000 + b"}}]",
    "head with too many digits": b'"head":{"epoch":1,"owner":null,"fields":{"a":' + b"9" * 5000 + b"}}",
    "unknown field": b'"later":[1,{"a":2}]',
}


@pytest.mark.parametrize("is_last", [True, False], ids=["last", "not last"])
@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_sealed_nonsense_gives_typed_errors_only(damaged: History, nonsense: bytes, is_last: bool) -> None:
    """A made-up record with the right CRC leads each verb to its usual answer, or to a typed error.

    No verb hangs.
    """
    opening, lines = parted(damaged.path.read_bytes())
    *before, last = lines
    key = nonsense.partition(b":")[0]
    plain = record_of(last)
    plain.pop(json.loads(key), None)
    if key == b'"head"':
        plain.pop("head_at", None)
    rest = json.dumps(plain, separators=(",", ":")).encode()[1:-1] + b"," + nonsense + b"}"
    hostile = line_of(opening, rest)
    behind = b"" if is_last else line_of(opening, json.dumps(plain | {"after": hostile[8:16].decode()}).encode()[1:])
    damaged.put(opening + b"".join(before) + hostile + behind)
    for verb in (head, tail, load, check, streams, rename, append_new, clear_stale, fold, accept, load):
        within_deadline(functools.partial(answer_or_typed_error, verb, damaged.store()))


def answer_or_typed_error(verb: Verb, store: persist.Store) -> object:
    try:
        return verb(store)
    except persist.PersistError as error:
        return error


# --- accept -----------------------------------------------------------------------------------------------------------


def test_accept_takes_the_last_good_state_and_keeps_a_copy(damaged: History) -> None:
    """An accept of a damaged journal takes the state before the damage, at a new revision.

    The damaged journal is kept beside the session.
    """
    content, path = damaged.content, damaged.path
    place = damaged.states[4][1] + 100
    spoilt = content[:place] + b"?" + content[place + 1 :]
    damaged.put(spoilt)
    store = damaged.store()
    with pytest.raises(persist.CorruptSession, match="persist accept"):
        store.load("s")
    session = store.accept("s")
    # No revision is used again.
    assert (session.data, session.revision) == (damaged.states[4][0], max(damaged.states) + 1)
    copy = path.with_name(f"{path.name}.damaged")
    assert copy.read_bytes() == spoilt + bytes(damaged.room)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    assert damaged.store().load("s").data == damaged.states[4][0]
    assert [problem.kind for problem in store.check()] in ([], ["stale"])


def test_accept_of_a_sound_session_with_a_journal_changes_nothing(damaged: History) -> None:
    """An accept of a sound session changes neither the document nor the journal."""
    before = {path: path.read_bytes() for path in damaged.directory.glob("s.*") if path.is_file()}
    assert damaged.store().accept("s").revision == max(damaged.states)
    assert {path: path.read_bytes() for path in damaged.directory.glob("s.*") if path.is_file()} == before


def edit_by_hand(history: History, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    path = history.directory / "s.json"
    document: dict[str, Any] = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document, indent=1))
    return document


def test_accept_of_an_edited_document_keeps_what_its_journal_added(tmp_path: Path) -> None:
    """An accept of a message that was edited by hand keeps the messages that the journal added after it."""
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": [{"id": "a", "content": "typo"}]})
    store.append("s", "messages", {"id": "b"})
    document = store.path / "s.json"
    document.write_bytes(document.read_bytes().replace(b"typo", b"word"))
    with pytest.raises(persist.CorruptSession, match="persist compact"):
        store.load("s")
    assert store.accept("s").data["messages"] == [{"id": "a", "content": "word"}, {"id": "b"}]
    assert not list(store.path.glob("*.damaged"))


def test_accept_of_a_document_in_which_the_places_are_others_is_refused(tmp_path: Path) -> None:
    """An accept is refused if a message was added by hand.

    The places of the journal's messages in that document are not guessed.
    """
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": [{"id": "a"}]})
    store.append("s", "messages", {"id": "b"})
    document = store.path / "s.json"
    document.write_bytes(document.read_bytes().replace(b'{"id":"a"}', b'{"id":"by hand"},\n{"id":"a"}'))
    with pytest.raises(persist.CorruptSession, match="does not fit the document as it is"):
        store.accept("s")


HEADERS: dict[str, tuple[bytes, bytes]] = {
    "a checksum": (b'"checksum":"', b'"checksum":"0'),
    "a key": (b'"epoch"', b'"apoch"'),
    "the format": (b'"format":3', b'"format":1'),
    "no header": (b'"_persist"', b'"_old"'),
}


@pytest.mark.parametrize(("old", "new"), HEADERS.values(), ids=HEADERS)
def test_accept_of_a_damaged_header_destroys_no_journal(tmp_path: Path, old: bytes, new: bytes) -> None:
    """An accept of a damaged header destroys no commit of the journal, because they are stored nowhere else.

    After the accept and the next commits the session shows them, or the journal or a copy of it still exists.
    """
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": []})
    for number in range(3):
        store.append("s", "messages", {"id": f"m{number}"})
    written = journal_of(store).read_bytes()
    document = store.path / "s.json"
    document.write_bytes(document.read_bytes().replace(old, new, 1))
    with suppress(persist.CorruptSession, persist.UnsupportedFormat):
        store.accept("s")
    with suppress(persist.CorruptSession, persist.UnsupportedFormat):
        store.append("s", "messages", {"id": "next"})
    with suppress(persist.CorruptSession, persist.UnsupportedFormat):
        found = persist.Store(tmp_path).load("s").data["messages"]
        if found == [{"id": each} for each in ("m0", "m1", "m2", "next")]:
            return
    assert written in [path.read_bytes() for path in store.path.glob("s.*journal*")]


def test_accept_that_is_refused_names_the_three_ways_out(damaged: History) -> None:
    """The error of a refused accept names three ways out, and each of them works.

    They are to undo the edit, to fold and edit again, or to give the journal up.
    """
    document, path = damaged.directory / "s.json", damaged.path
    whole, journal = document.read_bytes(), path.read_bytes()
    with pytest.raises(persist.CorruptSession) as caught:
        edit_by_hand(damaged, lambda document: document.update(title="by hand"))
        damaged.store().accept("s")
    ways = ("Undo the edit", "persist compact", "persist accept --drop-journal")
    assert all(way in str(caught.value) for way in ways)
    # 1. Undo it.
    document.write_bytes(whole)
    assert damaged.assert_committed(damaged.store().load("s")) == max(damaged.states)
    # 2. Fold, and edit again.
    damaged.store().compact("s", alone=True)
    edit_by_hand(damaged, lambda document: document.update(title="by hand"))
    assert damaged.store().accept("s").data == damaged.states[max(damaged.states)][0] | {"title": "by hand"}
    for left in damaged.directory.glob("s.*.journal"):
        left.unlink()
    # 3. Give the journal up.
    document.write_bytes(whole)
    path.write_bytes(journal)
    edit_by_hand(damaged, lambda document: document.update(title="by hand"))
    session = damaged.store().accept("s", drop_journal=True)
    assert session.data == damaged.states[1][0] | {"title": "by hand"}


@pytest.mark.parametrize("spoil", ["nothing", "edit", "damage", "first line"])
def test_journal_that_is_given_up_is_kept(damaged: History, spoil: str) -> None:
    """`accept(drop_journal=True)` takes the document, at a new revision, and keeps the journal's bytes.

    The copy is durable before the document is replaced. Fails if the journal is removed without a copy, or before it.
    """
    path, document, expected = damaged.path, damaged.directory / "s.json", dict(damaged.states[1][0])
    if spoil == "edit":
        edit_by_hand(damaged, lambda document: document.update(title="by hand"))
        expected["title"] = "by hand"
    elif spoil == "damage":
        damaged.put(damaged.content[:-30] + b"!" + damaged.content[-29:])
    elif spoil == "first line":
        damaged.put(b"!" + damaged.content[1:])
    written, copy = path.read_bytes(), path.with_name(f"{path.name}.damaged")
    with refusing() as calls:
        session = damaged.store().accept("s", drop_journal=True)
    assert (session.data, copy.read_bytes(), path.exists()) == (expected, written, False)
    assert session.revision > max(damaged.states)
    steps = [(call.name, call.path) for call in calls]
    assert steps.index(("fsync", copy)) < steps.index(("replace", document)) < steps.index(("unlink", path))
    assert ("fsync", damaged.directory) in steps[steps.index(("fsync", copy)) : steps.index(("unlink", path))]
    store = damaged.store()
    store.append("s", "messages", {"id": "next"})
    assert damaged.store().load("s").data["messages"] == [*expected["messages"], {"id": "next"}]
    assert store.check() == []


def test_mark_of_an_accept_stands_behind_all_that_a_process_may_know(damaged: History) -> None:
    """The mark of an accept stands after all that a process may know, because it may know an end after the damage.

    The disk refuses the rename, so the journal is still in use. Fails if the mark stands only after the good records.
    """
    place = damaged.states[3][1] + 60
    spoilt = damaged.content[:place] + b"!" + damaged.content[place + 1 :]
    damaged.put(spoilt)
    with injecting(Fault("replace", 1, errno.EIO, is_persistent=True)), pytest.raises(persist.CommitFailed):
        damaged.store().accept("s")
    assert damaged.path.read_bytes().rstrip(b"\0") == spoilt + b"?"
    session = damaged.store().accept("s")
    assert (session.data, session.revision) == (damaged.states[3][0], max(damaged.states) + 1)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda document: document["messages"].clear(), id="items removed"),
        pytest.param(lambda document: document["messages"].insert(0, {"id": "by hand"}), id="an item added"),
        pytest.param(lambda document: document.update(messages="none"), id="no list"),
        pytest.param(lambda document: document.pop("messages"), id="the field removed"),
        pytest.param(lambda document: document.update(title="by hand"), id="a field that the journal sets"),
        pytest.param(
            lambda document: document["messages"][0].update(meta="by hand"), id="a list that the journal changes"
        ),
    ],
)
def test_accept_of_an_edited_document_that_its_journal_does_not_fit_is_refused(
    damaged: History, change: Callable[[dict[str, Any]], object]
) -> None:
    """An accept is an error, and changes no byte, if the journal's places are no longer those of the document.

    Nothing is guessed.
    """
    edit_by_hand(damaged, change)
    before = {path: path.read_bytes() for path in damaged.directory.glob("s.*") if path.is_file()}
    with pytest.raises(persist.CorruptSession):
        damaged.store().accept("s")
    assert {path: path.read_bytes() for path in damaged.directory.glob("s.*") if path.is_file()} == before


def test_copy_of_a_damaged_journal_is_always_whole(damaged: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of the copy refuses the accept. The next accept copies the whole journal."""
    content, path = damaged.content, damaged.path
    spoilt = content[:-30] + b"?" + content[-29:]
    damaged.put(spoilt)
    real = disk.write

    def full(fd: int, content: bytes) -> None:
        real(fd, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(persist.CommitFailed):
        damaged.store().accept("s")
    monkeypatch.undo()
    damaged.store().accept("s")
    assert path.with_name(f"{path.name}.damaged").read_bytes() == spoilt + bytes(damaged.room)


# --- edits under a process that knows the session ---------------------------------------------------------------------


@pytest.mark.parametrize("verb", [append_new, append_again, rename, start_stream, fold], ids=lambda verb: verb.__name__)
def test_process_that_knows_a_session_sees_that_its_document_was_edited(damaged: History, verb: Verb) -> None:
    """A process that knows the session looks at the document before a commit if it was written to.

    Otherwise it would acknowledge commits that no process can load. Fails without the look at `kept.version`.
    """
    store = damaged.store()
    store.append("s", "messages", {"id": "warm"})
    document, before = damaged.directory / "s.json", damaged.path.read_bytes()
    edited = document.read_bytes().replace(b"J* hi", b"J* ho")
    document.write_bytes(edited)
    with pytest.raises(persist.CorruptSession):
        verb(store)
    assert (document.read_bytes(), damaged.path.read_bytes()) == (edited, before)


def test_document_that_was_only_touched_is_read_once(damaged: History) -> None:
    """A document that was only touched, by a backup tool or `touch`, is found to be sound, and is not read again."""
    store = damaged.store()
    store.append("s", "messages", {"id": "warm"})
    os.utime(damaged.directory / "s.json", ns=(1, 1))
    size = (damaged.directory / "s.json").stat().st_size
    for number, reads_all in enumerate((True, False)):
        with traffic() as counted:
            store.append("s", "messages", {"id": f"after {number}"})
        assert (counted.read >= size) is reads_all


# --- a full disk ------------------------------------------------------------------------------------------------------

FULL = (errno.ENOSPC, errno.EDQUOT)


@pytest.mark.parametrize("error", FULL, ids=errno.errorcode.get)
def test_fold_that_does_not_fit_on_the_disk_waits(tmp_path: Path, error: int) -> None:
    """A session can be written to, and its stream ended, while there is room for a record. It is folded later.

    Fails if a refused fold makes its commit fail.
    """
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": [{"id": "m1"}]})
    stream = store.start_stream("s", {"id": "p", "content": "Why?"})
    file_engine(store).options.fold_bytes = 1
    path = journal_of(store)
    # Only documents are written with `write`. Records go to a place in a file.
    with injecting(Fault("write", 1, error, is_persistent=True)) as injection:
        store.append("s", "messages", {"id": "a"})
        stream.finish({"id": "b", "content": "Because."})
        assert store.append("s", "messages", {"id": "a"}) == store.head("s").version
        assert store.head("s").revision == 4
        with pytest.raises(persist.CommitFailed):
            store.compact("s")
    assert injection.hits
    assert journal_of(store) == path
    found = persist.Store(tmp_path).load("s")
    assert [message["id"] for message in found.data["messages"]] == ["m1", "p", "a", "b"]
    assert found.active_stream_id is None
    store.append("s", "messages", {"id": "c"})
    assert journal_of(store) != path
    assert len(persist.Store(tmp_path).load("s").data["messages"]) == 5
    assert store.check() == []


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_fold_that_fails_otherwise_fails_its_commit(tmp_path: Path, error: int) -> None:
    """A fold that fails for another reason fails its commit, because a broken disk is not written to in another way."""
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": [{"id": "m1"}]})
    store.append("s", "messages", {"id": "a"})
    file_engine(store).options.fold_bytes = 1
    with injecting(Fault("write", 1, error, is_persistent=True)), pytest.raises(persist.CommitFailed):
        store.append("s", "messages", {"id": "b"})
    assert [message["id"] for message in persist.Store(tmp_path).load("s").data["messages"]] == ["m1", "a"]


def test_record_that_did_not_fit_leaves_no_torn_tail(tmp_path: Path) -> None:
    """A record that a full disk cuts off is removed again, so the next one needs no fold.

    There may be no room for a fold either. Fails if the written part of the record stays.
    """
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": [{"id": "m1"}]})
    store.append("s", "messages", {"id": "a"})
    path = journal_of(store)
    before = path.read_bytes()
    with injecting(Fault("pwrite", 1, TORN, is_persistent=False)), pytest.raises(persist.CommitFailed):
        store.append("s", "messages", {"id": "b" * 100})
    assert path.read_bytes() == before
    with injecting(Fault("write", 1, errno.ENOSPC, is_persistent=True)):
        persist.Store(tmp_path, journal="always").append("s", "messages", {"id": "c"})
    assert [message["id"] for message in store.load("s").data["messages"]] == ["m1", "a", "c"]


# --- two writers that were cut off ------------------------------------------------------------------------------------


def test_head_shows_no_record_behind_one_that_was_lost(tmp_path: Path) -> None:
    """Head and load show the state before two unacknowledged records of which a power cut kept only the second.

    Fails if a head takes the last whole record without going back to what a writer knew to be durable.
    """
    one = persist.Store(tmp_path, journal="always")
    one.create("s", {"messages": []})
    journal_path = journal_of(one)
    one.append("s", "messages", {"content": "x" * 2000})
    # The second writer is killed before its sync, too, so no record says that anything is durable.
    persist.Store(tmp_path, journal="always").append("s", "messages", {"content": "y"})
    assert [record_of(line)["synced"] for line in parted(journal_path.read_bytes())[1]] == [48, 48]
    content = bytearray(journal_path.read_bytes())
    content[1024:1536] = bytes(512)
    journal_path.write_bytes(content)
    reader = persist.Store(tmp_path)
    assert reader.load("s").revision == reader.head("s").revision == 1
    version = persist.Store(tmp_path, journal="always").append("s", "messages", {"content": "z"})
    head = reader.head("s")
    assert (head.version, head.revision) == (version, 2)


def test_journal_that_could_not_be_synced_is_appended_to_by_nobody(tmp_path: Path) -> None:
    """After a failed fsync another process writes the whole session to a new file.

    The kernel may have lost the record. Fails if the writer whose sync failed leaves no torn tail behind, because the
    other one would build on what may be lost.
    """
    one, other = (persist.Store(tmp_path, journal="always") for _ in range(2))
    one.create("s", {"messages": []})
    one.append("s", "messages", {"id": "a"})
    other.append("s", "messages", {"id": "b"})
    spoilt = journal_of(one)
    failing = Fault("fdatasync", 1, errno.EIO, is_persistent=True)
    with (
        injecting(failing),
        injecting(Fault("replace", 1, errno.EIO, is_persistent=True)),
        pytest.raises(persist.CommitUnknown),
    ):
        one.append("s", "messages", {"id": "c"})
    other.append("s", "messages", {"id": "d"})
    assert journal_of(other) != spoilt
    assert [message["id"] for message in other.load("s").data["messages"]] == ["a", "b", "c", "d"]


def test_journal_whose_document_is_away_is_left_alone(tmp_path: Path) -> None:
    """`check` names a journal without its document, and no verb removes it.

    An editor, or a backup that is being restored, may put the document back in the next instant.
    """
    store = persist.Store(tmp_path / "sessions", journal="always")
    store.create("s", {"messages": []})
    store.append("s", "messages", {"content": "kept"})
    document, away = store.path / "s.json", tmp_path / "away"
    document.rename(away)
    sweep(store, every_session=True)
    assert [problem.kind for problem in store.check()] == ["orphaned"]
    away.rename(document)
    assert store.load("s").data == {"messages": [{"content": "kept"}]}
    assert store.check() == []


def test_older_document_that_was_put_back_harms_no_newer_journal(tmp_path: Path) -> None:
    """`check` names the journal of a newer document, and the journal stays, whatever is committed to the older one.

    A delete removes all files.
    """
    store = persist.Store(tmp_path, journal="always")
    store.create("s", {"messages": []})
    old = {path: path.read_bytes() for path in store.path.glob("s.*") if path.suffix in (".json", ".journal")}
    store.append("s", "messages", {"id": "a"})
    store.compact("s")
    store.append("s", "messages", {"id": "late"})
    newer = journal_of(store)
    for path, content in old.items():
        path.write_bytes(content)
    again = persist.Store(tmp_path, journal="always")
    again.append("s", "messages", {"id": "b"})
    file_engine(again).options.fold_bytes = 1
    again.append("s", "messages", {"id": "c"})
    again.compact("s")
    assert b"late" in newer.read_bytes()
    assert "orphaned" in [problem.kind for problem in again.check()]
    (store.path / f"{newer.name}.damaged").write_bytes(b"late")
    again.delete("s")
    assert [path.name for path in store.path.iterdir() if path.is_file()] == []
