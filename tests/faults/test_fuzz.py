"""The short form of `scripts/fuzz`: real documents, spoilt at random, are refused or read as what they say.

The fuzzing also notices a check that is missing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.faults import quick_directory
from harness.fuzzing import (
    NOT_VOUCHED_FOR,
    OTHER_DOCUMENT,
    OTHER_STATE,
    JournalOracle,
    Oracle,
    journals,
    mutant,
    originals,
    seal,
    seal_journal,
    trusted,
)
from harness.planted import Mutation, run_harness, write_mutated_package
from harness.verbs import within_deadline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import persist
from persist.storage import document, journal

DEADLINE_S = 60

# Derandomised, as in tests/unit, because a build must not fail by luck. scripts/fuzz looks further.
SETTINGS = settings(
    deadline=None, derandomize=True, database=None, max_examples=400, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Bench:
    documents: list[bytes]
    oracle: Oracle


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_directory() as directory:
        documents = originals(directory)
        yield Bench(documents, Oracle(directory))


def test_the_oracle_accepts_what_was_not_spoilt(bench: Bench) -> None:
    """The oracle accepts real documents, and sealing one that is right changes nothing.

    Otherwise every verdict below would be worthless.
    """
    for content in bench.documents:
        assert seal(content) == seal(content, fits=True) == content
        assert bench.oracle.complaint(content) is None


def test_the_oracle_notices_a_wrong_document(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle catches a reader that answers anything but what a document says, or that does not refuse."""
    [content] = [content for content in bench.documents if b'"title":"t"' in content and b'"big"' in content]
    spoilt = content.replace(b'"title":"t"', b'"title":"u"')
    assert spoilt != content
    assert bench.oracle.complaint(spoilt) is None
    stale = document.read(_put(bench, content), "s")
    monkeypatch.setattr(document, "read", lambda *_: stale)
    for hostile, kind in ((spoilt, NOT_VOUCHED_FOR), (seal(spoilt), OTHER_DOCUMENT)):
        found = bench.oracle.complaint(hostile)
        assert found is not None
        assert (found.reader, found.kind) == ("load", kind)


def test_a_document_of_another_program_needs_no_checksum(bench: Bench) -> None:
    """A document without a header needs no checksum, because only its content counts.

    A document with a header's name, or with a header's parts under another name, is not trusted.
    """
    foreign = b'{"title":"t","messages":[]}'
    header = b'{"checksum":"","incarnation":"","parts":{}}'
    assert trusted(foreign) == {"title": "t", "messages": []}
    assert trusted(foreign.replace(b"{", b'{"_persist":{},', 1)) is None
    assert trusted(foreign.replace(b"{", b'{"_persisu":' + header + b",", 1)) is None
    assert trusted(foreign.replace(b"{", b'{"title":"u",', 1)) is None
    assert all(trusted(content) is not None for content in bench.documents)


NO_CHECKSUM = (
    "storage/document.py",
    "len(text) != part.size_bytes or _checksum(text) != part.checksum:",
    "len(text) != part.size_bytes:",
)
NO_HEADER_CHECKSUM = (
    "storage/document.py",
    "    if shape is None or _checksum(memoryview(line)[shape.end() :]).encode() != shape[1]:\n",
    "    if shape is None:\n",
)
# The result is a damaged document that is still strict JSON.
HALF_A_CHECKSUM = (
    "storage/document.py",
    "            raise self._mismatch(content) from None\n",
    "            data = self.strict(content)\n            values, found = data.pop(HEADER, None), encoded(data)\n",
)
NO_HEAD_CHECKSUM = (
    "storage/document.py",
    "fields = _checked_fields(memoryview(content)[end:needed], parts.fields)",
    "fields = fields_of(b'{%b}' % content[end:needed])",
)


@pytest.mark.parametrize(
    ("mutation", "reader"),
    [
        pytest.param(NO_CHECKSUM, "append", id="no-checksum-of-the-parts"),
        pytest.param(NO_HEADER_CHECKSUM, "head", id="no-checksum-of-the-header"),
        pytest.param(HALF_A_CHECKSUM, "load", id="no-checksum-where-it-is-json"),
        pytest.param(NO_HEAD_CHECKSUM, "head", id="no-checksum-of-a-head"),
    ],
)
def test_the_fuzzing_sees_a_missing_check(tmp_path: Path, mutation: Mutation, reader: str) -> None:
    """With one check taken out of a copy of the package, some mutants show a document that must be refused."""
    write_mutated_package(mutation, tmp_path)
    done = run_harness("fuzzing", ["--minutes=0.07", f"--directory={tmp_path}"], tmp_path, DEADLINE_S)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"WRONG: {reader}, {NOT_VOUCHED_FOR}, damaged" in done.stdout


def _put(bench: Bench, content: bytes) -> Path:
    path = bench.oracle.path
    path.write_bytes(content)
    return path


@SETTINGS
@given(dice=st.randoms(use_true_random=False))
def test_a_spoilt_document_is_refused_or_read_as_it_is(bench: Bench, dice: random.Random) -> None:
    """A spoilt document gives a typed error, or what an independent parse of its bytes says.

    This also holds for a document that an attacker has sealed anew.
    """
    content, is_sealed = mutant(dice, bench.documents)
    assert bench.oracle.complaint(content, is_sealed=is_sealed) is None


# scripts/fuzz found each of these once: it was read as something else than its bytes say, or gave no typed error.
def fitting(content: bytes) -> bytes:
    """Seal a document with its own lengths and counts."""
    return seal(content, fits=True)


def with_fields_of(content: bytes, size: bytes) -> bytes:
    """Seal the document with another length of its fields in the header."""
    return seal(re.sub(rb'"fields":\{"bytes":\d+', b'"fields":{"bytes":' + size, content))


def with_count_of(content: bytes, count: int) -> bytes:
    """Seal the document with another number of messages in the header."""
    return seal(re.sub(rb'"count":\d+', b'"count":%d' % count, fitting(content), count=1))


def without_fields(content: bytes) -> bytes:
    return fitting(content.replace(b'"title":"t",\n', b""))


def without_checksum_of_fields(content: bytes) -> bytes:
    return seal(re.sub(rb'("fields":\{"bytes":0),"checksum":"\w+"', rb"\1", without_fields(content)))


#: Each function spoils a document with a title, lists and a large text.
FOUND: dict[str, Callable[[bytes], bytes]] = {
    "fields that end in mid-field": lambda content: with_fields_of(content, b"12"),
    "fields that hold a list": lambda content: with_fields_of(content, b"%d" % len(content.partition(b"\n")[2][:-9])),
    "fields behind the end": lambda content: with_fields_of(content, b"99999"),
    "fields of less than nothing": lambda content: with_fields_of(content, b"-9"),
    "no fields, as a fraction": lambda content: with_fields_of(without_fields(content), b"-0.0"),
    "no fields, and no checksum of them": without_checksum_of_fields,
    "a field behind the lists": lambda content: seal(content.replace(b"\n}\n", b',\n"late":1\n}\n')),
    "a field in the last list": lambda content: fitting(content.replace(b"\n}\n", b',\n"late":1\n}\n')),
    "a field once more behind the lists": lambda content: seal(content.replace(b"\n}\n", b',\n"title":"u"\n}\n')),
    "two commas behind the header": lambda content: seal(content.replace(b",\n", b",,\n", 1)),
    "two commas behind the fields": lambda content: fitting(content.replace(b',\n"messages"', b',,\n"messages"')),
    "a field called like the header": lambda content: fitting(content.replace(b'"title":"t"', b'"_persist":"t"')),
    "a part called like the header": lambda content: fitting(content.replace(b'"big":', b'"_persist":')),
    "a field called like a part": lambda content: fitting(content.replace(b'"title":"t"', b'"messages":"t"')),
    "a part called like a field": lambda content: fitting(content.replace(b'"big":', b'"title":')),
    "an empty list that hides something": lambda content: with_count_of(
        re.sub(rb'"messages":\[\n.*?\n\],\n', b'"messages":[]\n"tool_calls":[],\n', content, flags=re.DOTALL), 0
    ),
    "more items than the header says": lambda content: with_count_of(content, 2),
    "fewer items than the header says": lambda content: with_count_of(content, 4),
    "an item that is no JSON": lambda content: fitting(content.replace(b",\n5", b",\n{")),
    "an item that is no text": lambda content: fitting(content.replace(b'"role":"user"', b'"role":"\xff"', 1)),
    "a field that is no text": lambda content: fitting(content.replace(b'"title":"t"', b'"title":"\xff"')),
    "a field that is infinite": lambda content: fitting(
        content.replace(b'"title":"t"', b'"title":1e400,\n"\\ud800":1')
    ),
}


def test_a_comma_behind_the_header_of_an_empty_session_is_damage(bench: Bench) -> None:
    """A comma after the header of an empty session is damage, although no checksum covers the end of line 1.

    Fails if the reader only looks at it where fields or lists follow.
    """
    [empty] = [content for content in bench.documents if b'"parts":{}}\n}\n' in content]
    spoilt = empty.replace(b'"parts":{}}\n', b'"parts":{}},\n')
    _put(bench, spoilt)
    with pytest.raises(persist.CorruptSession):
        bench.oracle.store.load("s")
    assert bench.oracle.complaint(spoilt) is None


@pytest.mark.parametrize("spoil", FOUND.values(), ids=FOUND)
def test_a_sealed_document_that_is_not_as_it_says_is_refused(bench: Bench, spoil: Callable[[bytes], bytes]) -> None:
    """A sealed document is refused if its header lies about where a value ends, or if such a value is not JSON.

    Its checksums are right.
    """
    [whole] = [content for content in bench.documents if b'"big":' in content]
    hostile = spoil(whole)
    assert hostile not in (whole, without_fields(whole))
    assert within_deadline(lambda: bench.oracle.complaint(hostile, is_sealed=True)) is None
    _put(bench, hostile)
    with pytest.raises(persist.CorruptSession):
        bench.oracle.store.load("s")


# --- journals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journaled() -> Iterator[JournalOracle]:
    with quick_directory() as directory:
        yield JournalOracle(directory)


def test_the_oracle_of_journals_accepts_what_was_not_spoilt(journaled: JournalOracle) -> None:
    """The oracle accepts a real journal, whole and cut between records, and sealing it changes nothing."""
    for content in journals(journaled):
        assert seal_journal(content) == content
        assert journaled.complaint(content) is None


def test_the_oracle_of_journals_notices_another_state(
    journaled: JournalOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle catches a state that no record gives. The state that a sealed record gives is right."""
    content = journaled.content
    spoilt = seal_journal(content.replace("Täßchen".encode(), b"Tassen!!!"))
    assert spoilt != content
    assert journaled.complaint(spoilt, is_sealed=True) is None
    found = journaled.complaint(spoilt)
    assert found is not None
    assert (found.reader, found.kind) == ("head", "a head that was never committed")
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "replay", lambda _self, fd, header, content: (header, content, None))
        found = journaled.complaint(content)
    assert found is not None
    assert (found.reader, found.kind) == ("load", OTHER_STATE)


NO_CRC = (
    "storage/journal.py",
    "line[:_CHECKED_FROM] == _PREFIX % zlib.crc32(line[_CHECKED_FROM:], seed)",
    "_LINE.match(line) is not None",
)


def test_the_fuzzing_of_journals_sees_a_missing_check(tmp_path: Path) -> None:
    """With the CRC taken out of a copy of the package, some seconds of mutants show a state that nobody committed."""
    write_mutated_package(NO_CRC, tmp_path)
    options = ["--journals", "--minutes=0.06", f"--directory={tmp_path}"]
    done = run_harness("fuzzing", options, tmp_path, DEADLINE_S)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG: load, a state that was never committed, damaged" in done.stdout


@settings(SETTINGS, max_examples=150)
@given(dice=st.randoms(use_true_random=False))
def test_a_spoilt_journal_is_refused_or_shows_a_committed_state(journaled: JournalOracle, dice: random.Random) -> None:
    """Readers, writers and `accept` give a typed error or a committed state.

    A journal sealed anew gives no untyped error.
    """
    content, is_sealed = mutant(dice, journals(journaled), journaled.seal)
    assert journaled.complaint(content, is_sealed=is_sealed) is None


# --- sectors ----------------------------------------------------------------------------------------------------------

SECTOR = 512


@pytest.fixture
def older_and_newer(store: persist.Store) -> tuple[bytes, bytes]:
    """Return two revisions of one document, of eight sectors and some bytes."""
    store.create("s", {"title": "t", "messages": [{"id": f"m{n}", "content": "Why? " * 20} for n in range(32)]})
    path = store.path / "s.json"
    older = path.read_bytes()
    store.update("s", lambda tx: tx.data["messages"][20].update(content="So. " * 25))
    newer = path.read_bytes()
    assert len(older) == len(newer) > 8 * SECTOR
    return older, newer


def sectors(content: bytes) -> list[bytes]:
    return [content[start : start + SECTOR] for start in range(0, len(content), SECTOR)]


def sector_damage(older: bytes, newer: bytes) -> Iterator[bytes]:
    """Yield what a disk that loses, misdirects or reorders sectors leaves of `newer`."""
    own, stale = sectors(newer), sectors(older)
    for first in range(len(own)):
        for last in range(first + 1, len(own) + 1):
            yield b"".join([*own[:first], bytes(sum(map(len, own[first:last]))), *own[last:]])
            yield b"".join([*own[:first], *stale[first:last], *own[last:]])
            if last < len(own):
                yield b"".join([*own[:first], own[last], *own[first + 1 : last], own[first], *own[last + 1 :]])


def test_lost_swapped_and_outdated_sectors_are_refused(
    store: persist.Store, older_and_newer: tuple[bytes, bytes]
) -> None:
    """A document is refused if any run of its sectors is zeroed or outdated, or if any two are exchanged.

    The outdated sectors are from the revision before.
    """
    older, newer = older_and_newer
    tried = 0
    for damaged in sector_damage(older, newer):
        if damaged in (older, newer):
            continue
        tried += 1
        (store.path / "s.json").write_bytes(damaged)
        with pytest.raises(persist.CorruptSession):
            store.load("s")
    assert tried > 100
