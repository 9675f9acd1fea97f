"""The journal: its grammar, what a head reads of it, which journal a document has, and readers that a fold overtakes.

The tests fail without their mechanisms. These are the check of the opening, of its version and its name, and `after`,
`revision` and `head_at` of a record. Others are the new start of a reader that was overtaken, and the lock that such a
reader takes at last.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from actors import Actor
from conftest import ActorFactory
from harness.faults import SHORT, TORN, Fault, injecting
from harness.files import file_engine
from harness.journals import chain_is_right, has_journal, journal_of, parted, record_of, sealed, traffic
from harness.sweeps import sweep

import persist
from persist.storage import commit, disk, document, journal
from persist.storage.cache import Cache, Replica
from persist.storage.commit import Mode
from persist.storage.content import encoded
from persist.storage.document import Head
from persist.storage.journal import Record, Tail

HELLO = {"id": "m1", "role": "user", "content": "hi"}


@pytest.fixture
def journaled(directory: Path) -> persist.Store:
    """Return a store whose sessions all have a journal, with one session."""
    store = persist.Store(directory, journal="always", timeout_s=20.0)
    file_engine(store).options.verifies_folds = True
    store.create("s", {"title": "New chat", "messages": [HELLO]})
    return store


def append(store: persist.Store, number: int) -> str:
    return store.append("s", "messages", {"id": f"a{number}", "content": "x" * 300})


def setting(field: str, value: Any) -> Callable[[persist.Transaction], None]:
    """Return a function for `update` that sets a field."""
    return lambda tx: tx.data.update({field: value})


# --- grammar ----------------------------------------------------------------------------------------------------------


def test_journal_is_written_as_its_grammar_says(journaled: persist.Store) -> None:
    """The opening names version and name. A record is one line, with the keys in the order of the grammar."""
    append(journaled, 1)
    journaled.update("s", lambda tx: tx.data.update(title="Locks"))
    append(journaled, 2)
    content = journal_of(journaled).read_bytes()
    opening, lines = parted(content)
    header = json.loads((journaled.path / "s.json").read_bytes())["_persist"]
    assert opening == b'{"persist_journal":3,"name":"%b"}\n' % header["journal"].encode()
    assert journal_of(journaled).name == f"s.{header['journal']}.journal"
    assert chain_is_right(content)
    added, renamed, added_again = map(json.loads, lines)
    common = ["crc", "after", "revision", "updated_at", "synced", "counts"]
    assert list(added) == [*common, "changes", "commit"]
    assert list(renamed) == [*common, "head", "commit"]
    assert list(added_again) == [*common, "head_at", "changes", "commit"]
    assert added["changes"] == [{"in": "messages", "at": 1, "insert": [{"id": "a1", "content": "x" * 300}]}]
    assert renamed["head"] == {"epoch": 0, "owner": None, "fields": {"title": "Locks"}}
    assert [each["revision"] for each in (added, renamed, added_again)] == [2, 3, 4]
    assert [each["counts"] for each in (added, renamed, added_again)] == [
        {"messages": 2},
        {"messages": 2},
        {"messages": 3},
    ]
    assert added_again["head_at"] == len(opening) + len(lines[0])
    # Each commit knew that the previous one was durable.
    assert [each["synced"] for each in (added, renamed)] == [len(opening), len(opening) + len(lines[0])]


def test_records_of_the_example_are_read(journaled: persist.Store) -> None:
    """A journal that was written by hand, by the grammar in the docstring, gives the session."""
    path = journal_of(journaled)
    opening = path.read_bytes()
    record = {"after": "", "updated_at": "2026-01-01T00:00:00+00:00", "synced": len(opening)}
    inserted = {"in": "messages", "at": 1, "insert": [{"id": "m3", "role": "user", "content": "hi"}]}
    head = {"epoch": 1, "owner": None, "fields": {"title": "Locks"}}
    path.write_bytes(
        sealed(
            opening,
            [
                record | {"revision": 2, "commit": "a", "counts": {"messages": 2}, "head_at": 0, "changes": [inserted]},
                record | {"revision": 3, "commit": "b", "counts": {"messages": 2}, "head": head},
            ],
        )
    )
    session = journaled.load("s")
    assert session.data == {"title": "Locks", "messages": [HELLO, inserted["insert"][0]]}  # type: ignore[index]
    assert session.revision == 3
    assert journaled.head("s").fields == {"title": "Locks"}


@pytest.mark.parametrize("text", ["", "a\nb", "\ud800", "é", "\u2028", '"', "\\", "\0"])
def test_any_text_is_one_line(journaled: persist.Store, text: str) -> None:
    """A record is one line without a zero byte, whatever a message or a field holds. It comes back unchanged."""
    journaled.append("s", "messages", {"id": text or 0, "content": text})
    journaled.update("s", lambda tx: tx.data.update(title=text))
    content = journal_of(journaled).read_bytes()
    assert content.count(b"\n") == 3
    assert b"\0" not in content
    assert journaled.load("s").data == {"title": text, "messages": [HELLO, {"id": text or 0, "content": text}]}
    assert journaled.head("s").fields == {"title": text}


# --- heads ------------------------------------------------------------------------------------------------------------


def shown(store: persist.Store) -> tuple[object, ...]:
    """Return the revision and the fields of a head, after a check of head and tail against the whole session."""
    head, session = store.head("s"), store.load("s")
    apart = encoded(session.data).apart
    counts = {name: len(value) for name, value in session.data.items() if type(value) is list}
    small = {name: value for name, value in session.data.items() if name not in apart}
    assert list(head.fields) == list(small), "the order of fields, too"
    assert (head.fields, head.counts) == (small, counts)
    for name in apart:
        with pytest.raises(KeyError, match="not part of a head"):
            head.fields[name]
        with pytest.raises(KeyError, match="not part of a head"):
            head.fields.get(name)
    assert head.version == session.version
    assert (head.revision, head.created_at, head.updated_at) == (
        session.revision,
        session.created_at,
        session.updated_at,
    )
    assert head.active_stream_id == session.active_stream_id
    found = store._backend.engine.read("s")
    assert store._backend.engine.read_head("s") == Head(found.header, found.content.fields, found.content.counts)
    assert_tails_are_ends(store, session.data)
    return head.revision, head.fields


def assert_tails_are_ends(store: persist.Store, data: dict[str, Any]) -> None:
    """Check that a tail is the end of its list, however long the list is, and wherever it is stored."""
    for name, value in (data | {"missing": []}).items():
        for limit in (0, 1, 2, 3, 10, 10_000):
            if type(value) is list:
                assert store.tail("s", limit=limit, field=name) == value[max(0, len(value) - limit) :]
            else:
                with pytest.raises(persist.InvalidArgument):
                    store.tail("s", limit=limit, field=name)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fold_bytes", [2000, math.inf])
def test_head_shows_what_the_whole_session_shows(journaled: persist.Store, seed: int, fold_bytes: float) -> None:
    """A head agrees with the session after any commits of any size, with and without a change of the head."""
    file_engine(journaled).options.fold_bytes = fold_bytes
    dice = random.Random(seed)
    stream: persist.Stream | None = None
    for number in range(40):
        what = dice.choice(["append", "append", "large", "cut", "rename", "long", "stream", "drop", "save"])
        if what == "append":
            append(journaled, number)
        elif what == "large":
            journaled.append("s", dice.choice(["messages", "log"]), "z" * dice.choice([5000, 25_000]))
        elif what == "cut":
            with journaled.transaction("s") as tx:
                items = tx.list(dice.choice(["messages", "log"]))
                place = dice.randrange(max(1, len(items)))
                del items[place : place + 1]
        elif what == "rename":
            journaled.update("s", setting(f"t{number % 3}", number))
        elif what == "long":
            journaled.update(
                "s", setting("long", dice.choice(["é", "é" * 2000, "é" * 5000, [number] * 3000, {"k": "x" * 5000}]))
            )
        elif what == "drop":
            journaled.update("s", lambda tx: tx.data.pop("long", None))
        elif what == "save":
            session = journaled.load("s")
            session.data["messages"].insert(0, number)
            session.data["tool_calls"] = dice.choice([[], [1], {"a": 1}])
            session.save()
        elif stream is None:
            stream = journaled.start_stream("s")
        else:
            stream.finish({"content": "y" * dice.choice([1, 9000])})
            stream = None
        shown(journaled)
    if stream is not None:
        stream.fail()
    shown(persist.Store(journaled.path))


@pytest.mark.parametrize("records", [0, 1, 500])
def test_head_reads_no_more_of_a_long_journal(journaled: persist.Store, records: int) -> None:
    """A head costs some reads of 4 KB, whatever the journal holds, also if the head changed last far back.

    One of these reads takes in the room for more.
    """
    file_engine(journaled).options.fold_bytes = math.inf
    journaled.update("s", lambda tx: tx.data.update(title="Locks"))
    for number in range(records):
        append(journaled, number)
    with traffic() as counted:
        head = journaled.head("s")
    assert head.fields == {"title": "Locks"}
    assert head.counts == {"messages": 1 + records}
    assert 0 < counted.read <= 3 * 4096 + 100 + journal.ROOM_BYTES


@pytest.mark.parametrize("records", [0, 1, 500])
def test_tail_reads_no_more_of_a_long_journal(journaled: persist.Store, records: int) -> None:
    """A tail of items that the last records added costs a head and those records.
    So does a tail of the document's items.
    """
    file_engine(journaled).options.fold_bytes = math.inf
    journaled.update("s", lambda tx: tx.data.update(notes=[f"{number}" * 100 for number in range(5000)]))
    journaled.compact("s")
    for number in range(records):
        append(journaled, number)
    expected = [HELLO, *({"id": f"a{number}", "content": "x" * 300} for number in range(records))][-10:]
    with traffic() as counted:
        assert journaled.tail("s", limit=10) == expected
    assert 0 < counted.read <= 6 * 4096 + 100 + 3 * journal.ROOM_BYTES
    if records < 2:
        with traffic() as counted:
            assert journaled.tail("s", limit=2, field="notes") == [f"{number}" * 100 for number in (4998, 4999)]
        assert 0 < counted.read <= 6 * 4096 + 100 + 3 * journal.ROOM_BYTES


def test_tail_goes_on_from_the_last_of_equal_changes(journaled: persist.Store) -> None:
    """A value may be set to the same twice. Fails if the later of two equal changes is taken for the earlier one."""
    values: list[Any] = [[], [1], {"a": 1}, [1, 2]]
    for three in itertools.product(values, repeat=3):
        for value in three:
            journaled.update("s", setting("tool_calls", value))
            assert_tails_are_ends(journaled, {"tool_calls": value})


@pytest.mark.parametrize("size_bytes", [20_000, 21_000, 100_000])
def test_tail_of_a_long_record_is_read_whole(journaled: persist.Store, size_bytes: int) -> None:
    """A record may be longer than one read. Fails if a record that the read cuts off is taken for none."""
    journaled.append("s", "messages", {"id": "long", "content": "x" * size_bytes})
    assert [message["id"] for message in journaled.tail("s", limit=1)] == ["long"]
    assert [message["id"] for message in journaled.tail("s")] == ["m1", "long"]


# --- which journal ----------------------------------------------------------------------------------------------------


def verbs(store: persist.Store) -> list[Callable[[], object]]:
    """Return the ways to read and to write the session."""
    return [
        lambda: store.load("s"),
        lambda: store.head("s"),
        lambda: store.tail("s"),
        lambda: store.append("s", "messages", 1),
        lambda: store.update("s", lambda tx: tx.data.update(title="y")),
        lambda: store.update("s", lambda tx: tx.fields.update(title="y")),
        lambda: store.start_stream("s"),
        lambda: store.compact("s"),
    ]


def assert_every_verb_raises(store: persist.Store, kind: type[Exception], match: str) -> None:
    """Check the verbs of a store that does not know the session yet, in every mode."""
    for mode in get_args(Mode):
        for verb in verbs(persist.Store(store.path, journal=mode)):
            with pytest.raises(kind, match=match):
                verb()


@pytest.mark.parametrize("version", [1, 2, 4, 99])
def test_unknown_version_is_refused_and_left_alone(journaled: persist.Store, version: int) -> None:
    """A journal of another version raises `UnsupportedFormat` for readers and writers, also on `accept`, and stays."""
    append(journaled, 1)
    path = journal_of(journaled)
    other = path.read_bytes().replace(b'"persist_journal":3', b'"persist_journal":%d' % version)
    path.write_bytes(other)
    document = (journaled.path / "s.json").read_bytes()
    assert_every_verb_raises(journaled, persist.UnsupportedFormat, f"format {version}, and this version knows 3")
    with pytest.raises(persist.UnsupportedFormat):
        journaled.accept("s")
    assert [problem.kind for problem in journaled.check()] == ["unsupported"]
    assert path.read_bytes() == other
    assert (journaled.path / "s.json").read_bytes() == document


@pytest.mark.parametrize(
    "more",
    [{"later": 1}, {"changes": [{"in": "messages", "at": 1, "insert": [1], "later": 1}]}, {"head": {"later": 1}}],
)
def test_record_that_a_newer_version_wrote_is_no_tear(journaled: persist.Store, more: dict[str, Any]) -> None:
    """A record with a right crc and an unknown key raises `UnsupportedFormat`.
    Otherwise an old worker would fold it away.
    """
    append(journaled, 1)
    append(journaled, 2)
    path = journal_of(journaled)
    opening, lines = parted(path.read_bytes())
    first, second = map(record_of, lines)
    path.write_bytes(sealed(opening, [first, second | more]))
    before = path.read_bytes()
    assert_every_verb_raises(
        journaled, persist.UnsupportedFormat, "knows 3. Load it with the version of persist that wrote it"
    )
    for verb in verbs(journaled)[3:]:
        # This store knows the records before it, and refuses, too.
        with pytest.raises(persist.UnsupportedFormat):
            verb()
    assert path.read_bytes() == before


def test_journal_of_another_name_is_not_applied(journaled: persist.Store) -> None:
    """A journal whose opening has another name than its file is as good as none: `CorruptSession`."""
    append(journaled, 1)
    path = journal_of(journaled)
    opening, lines = parted(path.read_bytes())
    other = opening.replace(opening[-19:-3], b"0" * 16)
    for records in (list(map(record_of, lines)), []):
        path.write_bytes(sealed(other, records))
        assert len(parted(path.read_bytes())[1]) == len(records)
        assert_every_verb_raises(journaled, persist.CorruptSession, "persist accept")


def test_journal_that_is_named_but_missing_is_told(journaled: persist.Store) -> None:
    """A document whose journal is gone is `CorruptSession`. The remedy takes the document as it is."""
    append(journaled, 1)
    journal_of(journaled).unlink()
    assert_every_verb_raises(
        journaled, persist.CorruptSession, r"s\.[0-9a-f]{16}\.journal, which it names, is missing.*persist accept"
    )
    assert [problem.kind for problem in journaled.check()] == ["corrupt"]
    assert journaled.accept("s").data["messages"] == [HELLO]
    append(journaled, 2)
    assert len(persist.Store(journaled.path).load("s").data["messages"]) == 2


def test_revision_that_was_lost_with_its_journal_is_not_used_again(journaled: persist.Store) -> None:
    """A decision on one state must not be applied to another state that reached the same number."""
    lost = [append(journaled, number) for number in range(1, 5)]
    revision = journaled.head("s").revision
    journal_of(journaled).unlink()
    accepted = journaled.accept("s")
    assert accepted.revision > revision
    versions = [accepted.version, *(append(journaled, number) for number in range(101, 105))]
    assert len({*lost, *versions}) == 4 + 5
    for version in (*lost, *versions[:-1]):
        with pytest.raises(persist.VersionMismatch):
            journaled.update("s", lambda tx: tx.data["messages"].pop(), if_version=version)
    journaled.update("s", lambda tx: tx.data["messages"].pop(), if_version=versions[-1])


def test_missing_journal_of_a_session_with_a_stream_is_told_by_every_look(journaled: persist.Store) -> None:
    """The damage is named, also if a verb already holds the session's lock. It hides no other session's stream."""
    journaled.create("t")
    with journaled.start_stream("t") as sound, journaled.start_stream("s") as stream:
        journal_of(journaled).unlink()
        assert [info.stream_id for info in journaled.streams()] == [sound.id]
        with pytest.raises(persist.CorruptSession):
            journaled.stream("s")
        with pytest.raises(persist.CorruptSession):
            stream.emit("token")
        with pytest.raises(persist.CorruptSession):
            journaled.events("s", stream.id)
        journaled.delete("s", force=True)


def test_left_over_journal_is_named_and_harmless(journaled: persist.Store) -> None:
    """A journal that no document names, as a crash leaves it, is shown by `check`. A compact removes it."""
    append(journaled, 1)
    left = journaled.path / f"s.{'7' * 16}.journal"
    left.write_bytes(journal.opening("7" * 16))
    assert [(problem.kind, problem.path) for problem in journaled.check()] == [("left-over", left)]
    journaled.compact("s")
    assert journaled.load("s").data["messages"][-1]["id"] == "a1"
    assert not left.exists()
    assert journaled.check() == []


def test_journal_with_commits_that_no_document_names_stays(journaled: persist.Store) -> None:
    """Somebody may have put an older document back, so the journal stays: its commits are nowhere else.
    `check` names it.
    """
    for number in range(2):
        append(journaled, number)
    left = journaled.path / f"s.{'7' * 16}.journal"
    _, lines = parted(journal_of(journaled).read_bytes())
    left.write_bytes(sealed(journal.opening("7" * 16), list(map(record_of, lines))))
    before = left.read_bytes()
    journaled.compact("s")
    append(journaled, 2)
    assert [(problem.kind, problem.path) for problem in journaled.check()] == [("orphaned", left)]
    assert left.read_bytes() == before


def test_journal_that_was_folded_is_a_left_over(journaled: persist.Store) -> None:
    """The header names the journal that was folded into the document. A crash before its removal leaves it."""
    append(journaled, 1)
    before = journal_of(journaled)
    content = before.read_bytes()
    journaled.compact("s")
    header = json.loads((journaled.path / "s.json").read_bytes())["_persist"]
    assert before.name == f"s.{header['folded']}.journal"
    before.write_bytes(content)
    assert [(problem.kind, problem.path) for problem in journaled.check()] == [("left-over", before)]
    file_engine(journaled).options.fold_bytes = 1
    append(journaled, 2)
    append(journaled, 3)
    assert not before.exists(), "the next fold removes both"


def test_symbolic_link_in_the_place_of_a_journal_is_refused(journaled: persist.Store, tmp_path: Path) -> None:
    """The target of a link is another program's file, so it is neither read nor written."""
    path = journal_of(journaled)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    assert_every_verb_raises(journaled, persist.Unreadable, "symbolic link")
    assert (tmp_path / "elsewhere").read_bytes() == before


# --- records that do not follow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"revision": 4}, id="a revision left out"),
        pytest.param({"revision": 2}, id="a revision twice"),
        pytest.param({"head_at": 5}, id="another head"),
        pytest.param({"counts": {"messages": 9}}, id="another number of items"),
        pytest.param({"counts": {"messages": 0}}, id="too few items"),
        pytest.param({"counts": {}}, id="no number of items"),
        pytest.param({"changes": [{"in": "messages", "at": 1, "remove": 9}]}, id="items that are not there"),
        pytest.param({"changes": [{"in": "messages", "value": "x"}]}, id="no list any more"),
        pytest.param({"changes": [{"in": "messages", "value": [1]}]}, id="another list"),
        pytest.param({"changes": [{"in": "messages", "gone": True}]}, id="no value any more"),
        pytest.param({"changes": [{"in": "messages", "at": 9, "insert": [1]}]}, id="a place that is not there"),
        pytest.param({"changes": [{"in": "title", "at": 0, "insert": [1]}]}, id="a field that is no list"),
    ],
)
def test_record_that_does_not_follow_is_damage(journaled: persist.Store, wrong: dict[str, Any]) -> None:
    """A load refuses a record that cannot follow the ones before, although its CRC is right."""
    append(journaled, 1)
    append(journaled, 2)
    path = journal_of(journaled)
    opening, lines = parted(path.read_bytes())
    first, second = map(record_of, lines)
    path.write_bytes(sealed(opening, [first, second]))
    assert journaled.load("s").revision == 3
    whole = journaled.load("s").data["messages"]
    path.write_bytes(sealed(opening, [first, second | wrong]))
    with pytest.raises(persist.CorruptSession, match="persist accept"):
        journaled.load("s")
    for limit in (0, 1, 3):
        if "revision" in wrong or wrong == {"counts": {}}:
            # A tail does not notice damage elsewhere. The last record alone says which lists there are.
            assert journaled.tail("s", limit=limit) == (whole[3 - limit :] if "revision" in wrong else [])
        else:
            with pytest.raises(persist.CorruptSession, match="persist accept"):
                journaled.tail("s", limit=limit)


def test_record_that_was_left_out_is_missed(journaled: persist.Store) -> None:
    """Each record names the CRC of the one before, so none can be taken out or change places."""
    for number in range(3):
        append(journaled, number)
    path = journal_of(journaled)
    opening, [one, two, three] = parted(path.read_bytes())
    for lines in ([two, three], [one, three], [two, one, three], [one, one, two, three], [one, two, two, three]):
        path.write_bytes(opening + b"".join(lines))
        with pytest.raises(persist.CorruptSession):
            persist.Store(journaled.path).load("s")
        with pytest.raises(persist.CorruptSession):
            persist.Store(journaled.path).append("s", "messages", 1)
        with pytest.raises(persist.CorruptSession):
            journaled.tail("s", limit=3)


def test_record_behind_another_one_than_it_was_written_to_is_damage(journaled: persist.Store) -> None:
    """CRC and revision are right, but the record before is another one of that revision.
    Readers and writers refuse it.
    """
    append(journaled, 1)
    append(journaled, 2)
    path = journal_of(journaled)
    opening, [first, second] = parted(path.read_bytes())
    path.write_bytes(sealed(opening, [record_of(first) | {"commit": "f" * 16}]) + second)
    for verb in verbs(persist.Store(journaled.path))[2:] + verbs(persist.Store(journaled.path))[:1]:
        with pytest.raises(persist.CorruptSession):
            verb()


def test_records_of_another_journal_do_not_check_out(journaled: persist.Store) -> None:
    """The CRC of a record is seeded with the CRC of its journal's opening, so lines of another journal are damage."""
    append(journaled, 1)
    journaled.create("t", {"title": "New chat", "messages": [HELLO]})
    journaled.append("t", "messages", {"id": "a1", "content": "x" * 300})
    ours, theirs = (journal_of(journaled, session_id) for session_id in ("s", "t"))
    ours.write_bytes(parted(ours.read_bytes())[0] + b"".join(parted(theirs.read_bytes())[1]))
    with pytest.raises(persist.CorruptSession):
        journaled.load("s")


def test_line_of_a_record_is_the_one_of_the_grammar() -> None:
    """The CRC covers the line behind it, seeded with the CRC of the opening. Defaults are left out."""
    record = Record("00000000", "0a0b0c0d", 8, "t", 55, {"messages": 3}, commit="c")
    rest = b'"after":"0a0b0c0d","revision":8,"updated_at":"t","synced":55,"counts":{"messages":3},"commit":"c"}'
    assert journal.encode(record, 7) == b'{"crc":"%08x",' % zlib.crc32(rest, 7) + rest + b"\n"


@pytest.mark.parametrize("name", ["\ud800", "é", '"', "\n"])
def test_any_name_can_stand_apart(journaled: persist.Store, name: str) -> None:
    """A part may have any name, also one that msgspec does not write. Its values can be set, spliced and dropped."""
    large = [{"id": number, "content": "é" * 50} for number in range(100)]
    journaled.update("s", setting(name, large))
    journaled.append("s", name, {"id": "new", "content": "é\ud800", "cost": 1e22})
    with journaled.transaction("s") as tx:
        del tx.list(name)[0]
    found = persist.Store(journaled.path).load("s")
    assert found.data[name] == [*large[1:], {"id": "new", "content": "é\ud800", "cost": 1e22}]
    assert journaled.head("s").counts == {"messages": 1, name: 100}
    assert journaled._backend.engine.read("s").content == encoded(found.data)
    journaled.compact("s")
    journaled.update("s", lambda tx: tx.data.pop(name) and None)
    assert journaled.load("s").data == {"title": "New chat", "messages": [HELLO]}
    content = journal_of(journaled).read_bytes()
    assert b"\0" not in content
    assert chain_is_right(content)


# --- readers that a fold overtakes ------------------------------------------------------------------------------------

FOLD = "store.compact('s')"
READERS = {
    "load": "(lambda found: [len(found.data['messages']), found.revision])(store.load('s'))",
    "head": "(lambda found: [found.counts['messages'], found.revision])(store.head('s'))",
    "tail": "[len(store.tail('s')), store.head('s').revision]",
}


@pytest.mark.parametrize("reader", READERS)
def test_reader_that_a_fold_overtakes_starts_over(journaled: persist.Store, actor: ActorFactory, reader: str) -> None:
    """A reader starts over if the journal goes between its look at the document and its look at the journal."""
    append(journaled, 1)
    other: Actor = actor(journal="always")
    # The actor pauses at its first step after it has read the document.
    other.start_and_pause(READERS[reader], "open_unseen")
    append(journaled, 2)
    journaled.compact("s")
    append(journaled, 3)
    other.go()
    assert other.result() == [4, 4]


@pytest.mark.parametrize("reader", READERS)
def test_reader_that_is_always_overtaken_takes_the_lock(
    journaled: persist.Store, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """After three attempts the reader takes the lock and reads what is committed. It reports no damage."""
    writer = persist.Store(journaled.path, journal="always", timeout_s=0.05)
    overtaken = 0
    real = journal.Journal.open

    def open_after_a_fold(log: journal.Journal, *flags: int) -> int:
        nonlocal overtaken
        monkeypatch.setattr(journal.Journal, "open", real)
        try:
            append(writer, overtaken)
            writer.compact("s")
            overtaken += 1
        except (persist.LockTimeout, persist.LockError):
            # The reader holds the lock by now.
            return real(log, *flags)
        finally:
            monkeypatch.setattr(journal.Journal, "open", open_after_a_fold)
        return real(log, *flags)

    monkeypatch.setattr(journal.Journal, "open", open_after_a_fold)
    found = getattr(journaled, reader)("s")
    monkeypatch.undo()
    assert overtaken == 3
    assert (len(found) if reader == "tail" else found.revision) == journaled.load("s").revision == 4


@pytest.mark.parametrize(
    ("wanted", "is_apart"), [(["new"], False), ("x" * 5000, True), ("new", False), (None, False)], ids=repr
)
def test_tail_that_a_commit_overtakes_is_that_of_one_commit(
    journaled: persist.Store, monkeypatch: pytest.MonkeyPatch, wanted: Any, *, is_apart: bool
) -> None:
    """A list that moves between the two looks of a tail is never shown as an empty one.

    Fails if a list that is a part in the head is searched for among records that have moved it.
    """
    journaled.update("s", setting("notes", ["old" * 3000]))
    journaled.compact("s")
    journaled.update("s", setting("notes", ["old" * 3000, "older"]))
    real = journal.Journal.read_head

    def read_head_before_a_commit(log: journal.Journal, fd: int, head: Head) -> tuple[Head, journal.Tail]:
        monkeypatch.setattr(journal.Journal, "read_head", real)
        found = real(log, fd, head)
        journaled.update("s", setting("notes", wanted))
        return found

    monkeypatch.setattr(journal.Journal, "read_head", read_head_before_a_commit)
    reader = persist.Store(journaled.path, journal="always")
    if type(wanted) is list:
        assert reader.tail("s", field="notes") == wanted
    else:
        with pytest.raises(persist.InvalidArgument, match="must be a list"):
            reader.tail("s", field="notes")
    assert ("notes" in encoded(reader.load("s").data).apart) is is_apart


def test_writer_that_waits_is_not_misled_by_a_fold(journaled: persist.Store, actor: ActorFactory) -> None:
    """A process drops what it knows of a journal that another process has folded, and appends to the new one."""
    other = actor(journal="always")
    other.do("store.append('s', 'messages', {'id': 'o1'})")
    append(journaled, 1)
    other.do(FOLD)
    append(journaled, 2)
    other.do("store.append('s', 'messages', {'id': 'o2'})")
    journaled.compact("s")
    other.do("store.append('s', 'messages', {'id': 'o3'})")
    assert [each["id"] for each in journaled.load("s").data["messages"]] == ["m1", "o1", "a1", "a2", "o2", "o3"]


# --- room for more ----------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(journaled: persist.Store) -> persist.Store:
    """Return the same store with a journal that has room for another 2 KB."""
    file_engine(journaled).options.room_bytes = 2048
    for number in range(6):
        append(journaled, number)
    content = journal_of(journaled).read_bytes()
    assert content.endswith(b"\0" * 600)
    return journaled


def test_records_are_written_into_the_room_that_a_journal_has(roomy: persist.Store) -> None:
    """The file grows by room, not by records. Behind the records are only zeros, and every writer uses that room.

    Fails if a writer adds to the end of the file, or makes room at each commit.
    """
    path, sizes = journal_of(roomy), set()
    stores = [roomy, persist.Store(roomy.path, journal="always"), persist.Store(roomy.path, journal="always")]
    for store in stores:
        file_engine(store).options.room_bytes = 2048
    for number in range(6, 40):
        append(stores[number % 3], number)
        content = path.read_bytes()
        sizes.add(len(content))
        assert len(content) - len(content.rstrip(b"\0")) <= 2048
        assert chain_is_right(content.rstrip(b"\0"))
        for store in stores:
            assert store.head("s").counts == {"messages": number + 2}
    assert 2 < len(sizes) < 34 / 2
    assert [each["id"] for each in roomy.load("s").data["messages"]] == ["m1", *(f"a{number}" for number in range(40))]
    assert roomy.compact("s") is True
    assert [each["id"] for each in roomy.load("s").data["messages"]] == ["m1", *(f"a{number}" for number in range(40))]


def test_short_journal_and_long_record_get_no_room(journaled: persist.Store) -> None:
    """Room is made where it pays: it is never more than a journal holds, or less than the record."""
    append(journaled, 1)
    assert not journal_of(journaled).read_bytes().endswith(b"\0")
    file_engine(journaled).options.room_bytes = 600
    journaled.append("s", "messages", {"id": "long", "content": "x" * 1000})
    assert not journal_of(journaled).read_bytes().endswith(b"\0")
    append(journaled, 2)
    assert journal_of(journaled).read_bytes().endswith(b"\0")


@pytest.mark.parametrize("error", [errno.ENOSPC, SHORT, TORN])
def test_record_is_written_where_the_disk_has_no_room_for_more(roomy: persist.Store, error: int) -> None:
    """On a full disk the last blocks are for records. Fails if an error in making room fails the commit."""
    path, number = journal_of(roomy), 6
    while path.read_bytes().endswith(b"\0" * 500):
        append(roomy, number)
        number += 1
    with injecting(Fault("pwrite", 1, error, is_persistent=False)) as injection:
        append(roomy, number)
    assert injection.hits
    assert [each["id"] for each in persist.Store(roomy.path).load("s").data["messages"]][-1] == f"a{number}"
    append(roomy, number + 1)
    assert persist.Store(roomy.path).load("s").data == roomy.load("s").data
    assert chain_is_right(path.read_bytes().rstrip(b"\0"))


@pytest.mark.parametrize(
    "look", [lambda store: store.load("s").revision, lambda store: store.head("s").revision], ids=["load", "head"]
)
def test_reader_that_sees_a_record_being_written_looks_again(
    roomy: persist.Store, monkeypatch: pytest.MonkeyPatch, look: Callable[[persist.Store], int]
) -> None:
    """A reader may copy the end of a record and zeros before that, while the writer writes. That is no damage.

    Fails without the second look. A record that stays so is damage.
    """
    path = journal_of(roomy)
    start = len(path.read_bytes().rstrip(b"\0"))
    append(roomy, 7)
    content = path.read_bytes()
    assert look(roomy) == 8
    torn = content[: start + 100] + bytes(50) + content[start + 150 :]
    real, path_of = disk.read_at, "/proc/self/fd/{}"

    def reading(fd: int, limit: int, position: int) -> bytes:
        found = real(fd, limit, position)
        if os.readlink(path_of.format(fd)) == str(path) and position <= start + 100 < start + 150 <= position + limit:
            path.write_bytes(content)
        return found

    path.write_bytes(torn)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "read_at", reading)
        assert look(persist.Store(roomy.path)) == 8
    assert path.read_bytes() == content
    path.write_bytes(torn)
    with pytest.raises(persist.CorruptSession):
        look(persist.Store(roomy.path))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor has open")
def test_nobody_looks_at_the_times_of_a_journal(roomy: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verb asks for the times of a journal: the next record would set new ones, and its fdatasync would take longer.

    Fails if a journal is opened like any other file.
    """
    seen: list[str] = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(what: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(os.readlink(f"/proc/self/fd/{what}") if type(what) is int else str(what))
            return real(what, *arguments, **options)

        return look

    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    append(roomy, 7)
    roomy.load("s")
    roomy.head("s")
    other = persist.Store(roomy.path, journal="always")
    append(other, 8)
    append(roomy, 9)
    assert any(name.endswith("s.json") for name in seen)
    assert not any(name.endswith(".journal") for name in seen)


# --- which sessions have one ------------------------------------------------------------------------------------------

KB = 1024


def resize(store: persist.Store, size: int) -> None:
    """Give the content of the session this many bytes, by one commit."""
    around = encoded({"messages": [""]}).size_bytes
    store.update("s", lambda tx: tx.data.update(messages=["x" * (size - around)]))


def test_auto_enters_above_64_kb_and_leaves_below_32_kb_at_a_fold(store: persist.Store) -> None:
    """A session above 64 KiB has a journal. Only a fold that finds 32 KiB or less leaves it."""
    store.create("s", {"messages": ["x"]})
    resize(store, 64 * KB)
    assert store._backend.engine.read("s").content.size_bytes == 64 * KB
    assert not has_journal(store)
    resize(store, 64 * KB + 1)
    assert has_journal(store)
    resize(store, 32 * KB)
    assert has_journal(store)
    resize(store, 32 * KB + 1)
    store.compact("s")
    assert has_journal(store)
    resize(store, 32 * KB)
    assert has_journal(store)
    store.compact("s")
    assert not has_journal(store)
    resize(store, 64 * KB)
    assert not has_journal(store)


def test_auto_folds_when_the_journal_outgrows_its_document(store: persist.Store) -> None:
    """The first commit that finds the journal larger than its document, and than 64 KiB, folds it."""
    store.create("s", {"messages": ["x" * 100_000]})
    names = set()
    for number in range(60):
        store.append("s", "messages", {"id": number, "content": "y" * 5000})
        path = journal_of(store)
        names.add(path.name)
        assert len(path.read_bytes().rstrip(b"\0")) <= (store.path / "s.json").stat().st_size + 6000
    assert 2 <= len(names) <= 4
    assert len(store.load("s").data["messages"]) == 61


def test_never_leaves_at_its_next_commit(journaled: persist.Store) -> None:
    """A store without journals reads a journal that it finds, and folds it with its own next commit."""
    version = append(journaled, 1)
    never = persist.Store(journaled.path, journal="never")
    assert never.load("s").revision == never.head("s").revision == 2
    assert has_journal(journaled)
    assert never.append("s", "messages", {"id": "a1", "content": "x" * 300}) == version
    assert never.head("s").revision == 2
    assert has_journal(journaled), "it was there already: nothing was committed"
    assert never.append("s", "messages", {"id": "n"}) == never.head("s").version != version
    assert never.head("s").revision == 3
    assert not has_journal(journaled)
    assert [each["id"] for each in journaled.load("s").data["messages"]] == ["m1", "a1", "n"]


def test_stores_of_different_modes_lose_nothing(directory: Path) -> None:
    """Modes are preferences: whatever store writes next, every item is there once, in order."""
    modes = {mode: persist.Store(directory, journal=mode) for mode in get_args(Mode)}
    modes["auto"].create("s", {"messages": ["x" * 70_000]})
    dice = random.Random(3)
    for number in range(120):
        modes[dice.choice(list(modes))].append("s", "messages", {"id": number})
    for store in modes.values():
        assert [each["id"] for each in store.load("s").data["messages"][1:]] == list(range(120))
        assert store.head("s").counts == {"messages": 121}
        assert store.check() == []


def test_compact_makes_the_document_the_session(journaled: persist.Store) -> None:
    """After a compact the file alone is the session, at the same revision and time.
    A second compact has nothing to do.
    """
    assert journaled.compact("s") is False
    append(journaled, 1)
    before = journaled.load("s")
    assert journaled.compact("s") is True
    document = json.loads((journaled.path / "s.json").read_bytes())
    del document["_persist"]
    assert document == before.data
    assert len(parted(journal_of(journaled).read_bytes())[1]) == 0
    after = journaled.load("s")
    assert (after.revision, after.updated_at, after.data) == (before.revision, before.updated_at, before.data)
    assert journaled.compact("s") is False
    # A compact is no commit, so an object that was loaded before has nothing to merge.
    before.data["title"] = "mine"
    before.save()
    assert before.revision == 3


def test_compact_of_a_small_session_leaves_journal_mode(journaled: persist.Store, store: persist.Store) -> None:
    """The journal goes even if it is empty, because the mode of the compacting store counts."""
    assert store.compact("s") is True
    assert not has_journal(journaled)
    assert store.compact("s") is False


def test_delete_removes_every_journal(journaled: persist.Store) -> None:
    """A deleted session leaves no journal, no journal that a crash left over, and no damaged copy."""
    append(journaled, 1)
    (journaled.path / f"s.{'7' * 16}.journal").write_bytes(b"")
    (journaled.path / f"s.{'8' * 16}.journal.damaged").write_bytes(b"x")
    journaled.create("s-2")
    journaled.delete("s")
    assert sorted(path.name.partition(".")[0] for path in journaled.path.glob("*.journal*")) == ["s-2"]
    assert journaled.check() == []


def test_end_of_a_new_journal_is_known_without_reading_it(journaled: persist.Store) -> None:
    """`Tail.of` describes a new journal as its file does."""
    header = document.read_head(journaled.path / "s.json", "s")[0].header
    assert header.journal is not None
    log = journal.Journal(journal_of(journaled), "s", header.journal)
    fd = log.open()
    try:
        tail = log.check_opening(fd)
        assert tail == Tail.of(header.journal)
        assert tail.is_end_of(fd) is True
        assert list(log.read_new_records(fd, header, tail)) == []
        assert tail == Tail.of(header.journal)
        assert (tail.end, tail.is_torn, tail.is_empty) == (disk.size_of(fd), False, True)
    finally:
        disk.close(fd)


def test_end_of_a_journal_is_known_by_its_last_bytes(journaled: persist.Store) -> None:
    """One read tells: nothing new, something new, or another record than the last known one."""
    append(journaled, 1)
    found = journaled._backend.engine.read("s")
    assert isinstance(found, Replica)
    assert found.tail is not None
    path = journal_of(journaled)
    log = journal.Journal(path, "s", found.tail.name)
    content = path.read_bytes().rstrip(b"\0")
    end = found.tail.end
    assert len(content) == end

    def ends(now: bytes) -> bool | None:
        path.write_bytes(now)
        fd = log.open()
        try:
            assert isinstance(found, Replica)
            assert found.tail is not None
            return found.tail.is_end_of(fd)
        finally:
            disk.close(fd)

    assert ends(content) is ends(content + bytes(50)) is True
    assert ends(content + b"?") is ends(content + b"{") is ends(content + b"\n") is False
    assert ends(content[:-1]) is ends(content[:-8] + b"g" + content[-7:]) is ends(b"") is None


# --- what is not read must come to the same ---------------------------------------------------------------------------


@pytest.fixture(params=get_args(Mode))
def any_store(request: pytest.FixtureRequest, directory: Path) -> persist.Store:
    """Return a store that keeps journals, or keeps none."""
    return persist.Store(directory, journal=request.param)


def test_prompt_of_another_program_is_kept_whole(any_store: persist.Store) -> None:
    """The prompt keeps its mark and its attachments, which are nowhere else, also if no message has been read."""
    turn = {"active_stream_id": "old", "pending_user_message": "Why?", "pending_attachments": [{"name": "a.png"}]}
    (any_store.path / "s.json").write_text(json.dumps({"messages": []} | turn))
    any_store.update("s", setting("title", "y"))
    sweep(any_store, every_session=True)
    prompt = {"id": "old.prompt", "role": "user", "content": "Why?", "interrupted": True}
    assert any_store.load("s").data["messages"] == [prompt | {"attachments": [{"name": "a.png"}]}]


def test_turn_without_messages_ends_without_them(any_store: persist.Store) -> None:
    """An object that cleared the stream shows the state on disk, and its next save can be loaded."""
    any_store.create("s", {"title": "t"})
    stream = any_store.start_stream("s", {"content": "?"})
    any_store.update("s", lambda tx: tx.data.pop("messages"))
    session = any_store.load("s")
    stream._close()
    assert session.clear_stale_stream()
    assert session.data == any_store.load("s").data
    session.data["title"] = "new"
    session.save()
    assert any_store.load("s").data == session.data
    assert "messages" not in session.data
    assert any_store.head("s").counts == {"pending_attachments": 0}


def test_of_two_messages_with_one_id_the_last_is_meant(any_store: persist.Store) -> None:
    """The last message is meant, also if the first one was changed since the stream began.
    It is not known then which is last.
    """
    twin = {"id": "p", "role": "user", "content": "q"}
    any_store.create("s", {"messages": [{"id": "m0"}, twin, {"id": "m1"}, twin, {"id": "m2"}]})
    any_store.append("s", "messages", {"id": "m3"})
    stream = any_store.start_stream("s", twin)
    any_store.update("s", lambda tx: tx.data["messages"][1].update(note=1))
    stream.fail()
    marks = [message.get("interrupted") for message in any_store.load("s").data["messages"]]
    assert marks == [None, None, None, True, None, None]


@pytest.mark.parametrize("fold_bytes", [1, math.inf])
@pytest.mark.parametrize(
    "step", ["write_at", "sync_data", "replace", "sync_directory", "put", "_version_of", "Replica"]
)
def test_append_that_was_cut_off_is_idempotent(
    journaled: persist.Store, monkeypatch: pytest.MonkeyPatch, step: str, fold_bytes: float
) -> None:
    """Ctrl-C right before or behind each step of a commit drops the replica, and the next verb reads the disk.

    Fails if a kept replica differs from the disk: the store would take the id for new, or for known.
    """
    append(journaled, 1)
    file_engine(journaled).options.fold_bytes = fold_bytes
    place: Any = {"put": Cache, "_version_of": commit, "Replica": commit}.get(step, disk)
    real = getattr(place, step)
    number = 1
    for is_behind in (False, True):

        def cut_off(*arguments: Any, is_behind: bool = is_behind, **options: Any) -> Any:
            if is_behind:
                real(*arguments, **options)
            raise KeyboardInterrupt

        number += 1
        with monkeypatch.context() as patch:
            patch.setattr(place, step, cut_off)
            try:
                append(journaled, number)
            except KeyboardInterrupt:
                pass
        append(journaled, number)
        for store in (journaled, persist.Store(journaled.path)):
            ids = [message["id"] for message in store.load("s").data["messages"]]
            assert ids == ["m1", *(f"a{each}" for each in range(1, number + 1))]
        append(journaled, number)
        assert journaled.head("s").counts == {"messages": number + 1}


def test_session_that_would_be_too_large_is_refused_before_its_fold(
    journaled: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the commit that crosses the limit is refused. The session goes on below it."""
    monkeypatch.setattr("persist.json_codec.MAX_BYTES", 3_000)
    for number in range(6):
        append(journaled, number)
    with pytest.raises(persist.TooLarge, match="more than 3,000 bytes"):
        for number in range(6, 20):
            append(journaled, number)
    journaled.update("s", setting("title", "small"))
    assert journaled.compact("s")
    assert journaled.load("s").data["title"] == "small"


# --- one file ---------------------------------------------------------------------------------------------------------


def test_session_that_was_compacted_alone_is_one_file(journaled: persist.Store, tmp_path: Path) -> None:
    """The one file can be copied under any name. The next commit makes a journal again."""
    append(journaled, 1)
    assert journaled.compact("s", alone=True)
    assert not has_journal(journaled)
    assert journaled.compact("s", alone=True) is False
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "t.json").write_bytes((journaled.path / "s.json").read_bytes())
    copy = persist.Store(tmp_path / "copy").load("t")
    assert (copy.data, copy.revision) == (journaled.load("s").data, 2)
    append(journaled, 2)
    assert has_journal(journaled)


# --- edits ------------------------------------------------------------------------------------------------------------


def test_edit_that_looks_at_the_messages_may_change_all(journaled: persist.Store) -> None:
    """One block may set small fields and set, change, make and drop lists. All of it is one commit."""
    with journaled.transaction("s") as tx:
        data = tx.data
        data["title"] = "Locks"
        data["messages"].append({"id": "m2"})
        data["tool_calls"] = [1]
        del data["messages"][0]
    found = journaled.load("s")
    assert (found.data, found.revision) == ({"title": "Locks", "messages": [{"id": "m2"}], "tool_calls": [1]}, 2)
    journaled.update("s", lambda tx: [tx.data.pop("messages"), tx.data.pop("title")])
    assert journaled.load("s").data == {"tool_calls": [1]}


def test_edit_that_only_looks_is_no_commit(journaled: persist.Store) -> None:
    """A block that only looks is no commit. Nor is one that puts back what was there."""
    with journaled.transaction("s") as tx:
        data = tx.data
        assert data["messages"] == [HELLO]
    journaled.update("s", lambda tx: tx.data["messages"].append(tx.data["messages"].pop()))
    journaled.update("s", lambda tx: tx.data.update(title="New chat"))
    assert journaled.head("s").revision == 1


def test_refused_edit_of_small_fields_writes_nothing(journaled: persist.Store) -> None:
    """An edit writes nothing if its value is no JSON, if its field is reserved, or if it names another version."""
    before = {path.name: path.read_bytes() for path in journaled.path.glob("s*")}
    refused: list[tuple[type[persist.PersistError], dict[str, Any]]] = [
        (persist.NotJSON, {"title": object()}),
        (persist.NotJSON, {"messages": [{"n": math.nan}]}),
        (persist.InvalidArgument, {"_persist": {}}),
        (persist.InvalidArgument, {"active_stream_id": "x"}),
        (persist.InvalidArgument, {"messages": [], "pending_user_message": "x"}),
    ]
    for kind, values in refused:
        with pytest.raises(kind):
            journaled.update("s", lambda tx, values=values: tx.data.update(values))  # type: ignore[misc]
        if "messages" not in values:
            with pytest.raises(kind):
                journaled.update("s", lambda tx, values=values: tx.fields.update(values))  # type: ignore[misc]
    for version in ("2", "", journaled.head("s").version[:-1], journaled.create("other").version):
        with pytest.raises(persist.VersionMismatch):
            journaled.update("s", setting("title", "x"), if_version=version)
    with pytest.raises(persist.InvalidArgument, match="a plain function"):
        journaled.update("s", lambda tx: (tx.data[key] for key in tx.data))
    assert {path.name: path.read_bytes() for path in journaled.path.glob("s*")} == before


@pytest.mark.parametrize("mode", ["never", "always"])
@pytest.mark.parametrize("has_block", [True, False], ids=["transaction", "update"])
def test_document_that_is_replaced_under_its_lock_is_an_error(directory: Path, mode: Mode, *, has_block: bool) -> None:
    """A program that heeds no lock puts a backup back while a caller's block runs. The verb raises, and writes nothing.

    Fails without `Transaction.require_unchanged`.
    """
    store = persist.Store(directory, journal=mode)
    store.create("s", {"messages": [], "title": "old"})
    backup = {path: path.read_bytes() for path in store.path.glob("s.*") if path.suffix != ".lock"}
    store.append("s", "messages", {"id": "later"})

    def put_back() -> None:
        for path, content in backup.items():
            path.write_bytes(content)

    def change(tx: persist.Transaction) -> None:
        put_back()
        tx.data["title"] = "new"

    with pytest.raises(persist.CommitFailed, match="another program replaced it"):
        if has_block:
            with store.transaction("s") as tx:
                put_back()
                tx.fields["title"] = "new"
        else:
            store.update("s", change)
    assert {path: path.read_bytes() for path in backup} == backup
    assert persist.Store(directory).load("s").data == {"messages": [], "title": "old"}
