"""Files of another version: each verb refuses them by name, and nothing on disk changes.

During a rolling upgrade an old worker reads what a newer one writes. It must never fold that away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ActorFactory
from harness.journals import Record, journal_of, parted, record_of, sealed

import persist

DATA: dict[str, Any] = {"title": "t", "messages": [{"id": "m1", "content": "hi"}]}


def save(store: persist.Store, session: persist.Session) -> None:
    session.data["title"] = "File locks"
    session.save()


def edit(store: persist.Store, _session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "File locks"


Verb = Callable[[persist.Store, persist.Session], object]
#: None of these verbs may write. Only a delete by force removes the session.
VERBS: dict[str, Verb] = {
    "load": lambda store, _: store.load("s"),
    "head": lambda store, _: store.head("s"),
    "tail": lambda store, _: store.tail("s"),
    "refresh": lambda _, session: session.refresh(),
    "append": lambda store, _: store.append("s", "messages", {"id": "new"}),
    "append of what is there": lambda store, _: store.append("s", "messages", DATA["messages"][0]),
    "extend": lambda store, _: store.extend("s", "messages", [{"id": "new"}, {"id": "newer"}], create=True),
    "save": save,
    "save of nothing": lambda _, session: session.save(),
    "transaction": edit,
    "fold": lambda store, _: store.compact("s"),
    "leave": lambda store, _: store.compact("s", alone=True),
    "append without a journal": lambda store, _: persist.Store(store.path, journal="never").append("s", "messages", 1),
    "start_stream": lambda store, _: store.start_stream("s"),
    "duplicate": lambda store, _: store.duplicate("s", "copy"),
    "accept": lambda store, _: store.accept("s"),
    "accept without the journal": lambda store, _: store.accept("s", drop_journal=True),
    "start once": lambda store, _: store.start_stream("s", {"id": "p", "content": "?"}, once=True, create=True),
    "delete": lambda store, _: store.delete("s"),
    "delete of a version": lambda store, session: store.delete("s", if_version=session.version),
}


#: These verbs use the store of their object, which may know the journal.
OF_A_SESSION = ("refresh", "save", "save of nothing")


def files(store: persist.Store) -> dict[str, bytes]:
    """Return all files of sessions, but for their locks."""
    return {path.name: path.read_bytes() for path in store.path.iterdir() if path.is_file() and path.suffix != ".lock"}


# --- records ----------------------------------------------------------------------------------------------------------

#: Each entry is what a newer version may write into a record. None stands for a key that it leaves out.
NEWER: dict[str, Record] = {
    "an unknown field": {"later": 1},
    "an unknown kind of change": {"changes": [{"in": "messages", "mark": {"at": 0}}]},
    "a change with more to it": {"changes": [{"in": "messages", "at": 1, "insert": [1], "where": "end"}]},
    "a change without a name": {"changes": [{"at": 1, "insert": [1]}]},
    "changes of another form": {"changes": {"messages": [1]}},
    "a head with more to it": {"head": {"epoch": 1, "owner": None, "fields": {}, "tags": []}},
    "a head without an epoch": {"head": {"owner": None, "fields": {}}},
    "counts of another form": {"counts": [["messages", 1]]},
    "a revision of another form": {"revision": "two"},
    "no counts": {"counts": None},
    "no commit": {"updated_at": None},
    "no place of what is durable": {"synced": None},
}


def newer_journal(store: persist.Store, what: Record, *, torn: bytes = b"") -> None:
    """Append a record as a newer version does, with the right crc.

    `torn` is what that version leaves unsynced after it.
    """
    path = journal_of(store)
    opening, lines = parted(path.read_bytes())
    records = [record_of(line) for line in lines]
    record = records[-1] | {"revision": records[-1]["revision"] + 1, "synced": len(opening), "changes": []} | what
    path.write_bytes(
        sealed(opening, [*records, {key: record[key] for key in record if record[key] is not None}]) + torn
    )


def staged(directory: Path) -> tuple[persist.Store, persist.Session]:
    store = persist.Store(directory, journal="always")
    store.create("s", DATA)
    store.append("s", "messages", {"id": "m2"})
    return store, store.load("s")


@pytest.mark.parametrize("torn", [b"", b"?", b'{"crc":"0000'], ids=["whole", "marked", "torn"])
@pytest.mark.parametrize("what", NEWER.values(), ids=NEWER)
def test_record_of_a_newer_version_is_no_torn_tail(directory: Path, what: Record, torn: bytes) -> None:
    """A record of a newer version is no torn tail: its crc is right, so its commit was acknowledged.

    A warm process and a cold one refuse it alike. Fails if a record that does not decode is taken for torn, or for
    damaged.
    """
    store, session = staged(directory)
    newer_journal(store, what, torn=torn)
    before = files(store)
    for name, verb in VERBS.items():
        for each in (store, persist.Store(directory, journal="always")):
            with pytest.raises(persist.UnsupportedFormat) as caught:
                verb(each, session)
            assert caught.value.path == journal_of(store), name
            assert files(store) == before, name
    assert [problem.kind for problem in store.check()] == ["unsupported"]
    store.delete("s", force=True)
    assert files(store) == {}


def test_journal_of_a_newer_version_is_refused(directory: Path) -> None:
    """A journal of a newer version, which its first line names, is refused.

    Fails if another first line is taken for damage, which an accept drops.
    """
    store, session = staged(directory)
    path = journal_of(store)
    path.write_bytes(path.read_bytes().replace(b'"persist_journal":3', b'"persist_journal":4', 1))
    before = files(store)
    for name, verb in VERBS.items():
        cold = persist.Store(directory, journal="always")
        if name not in OF_A_SESSION:
            with pytest.raises(persist.UnsupportedFormat, match="format 4, and this version knows 3"):
                verb(cold, session)
        assert files(store) == before, name


# --- documents --------------------------------------------------------------------------------------------------------

#: The first edition wrote these documents, or a later one may write them.
OTHERS: dict[str, tuple[int, bytes]] = {
    "first edition": (
        1,
        b'{"_persist":{"format":1,"checksum":"%b","head_checksum":"%b","head_bytes":12,"revision":3},\n'
        b'"title":"t",\n"messages":[\n{"id":"m1"}\n]\n}\n' % (b"0" * 32, b"1" * 32),
    ),
    "first edition with a journal": (
        2,
        b'{"_persist":{"format":2,"checksum":"%b","head_checksum":"%b","head_bytes":12,"revision":3,'
        b'"is_journaled":true,"generation":7},\n"title":"t",\n"messages":[\n{"id":"m1"}\n]\n}\n'
        % (b"0" * 32, b"1" * 32),
    ),
    "a later one": (4, b'{"_persist":{"format":4,"anything":{"else":[1,2]}},\n"title":"t"\n}\n'),
    "a later one that is no JSON": (4, b'{"_persist":{"format":4,"codec":"zstd"}}\n\x28\xb5\x2f\xfd\x00\xff'),
    "a much later one": (123456789, b'{"_persist":{"format":123456789}}\n'),
}


#: A later format need not be JSON after its first line. No editor can format that.
LAID_OUT = [(name, False) for name in OTHERS] + [(name, True) for name in OTHERS if "no JSON" not in name]


@pytest.mark.parametrize(("name", "is_laid_out"), LAID_OUT)
def test_document_of_another_format_is_refused_and_left_alone(directory: Path, name: str, is_laid_out: bool) -> None:
    """A document of another format is refused and left alone, and so is its journal.

    Fails if an accept takes it for an edit, or a writer for another program's document.
    """
    known, content = OTHERS[name]
    if is_laid_out:
        content = json.dumps(json.loads(content), indent=2).encode()
    store, session = staged(directory)
    (directory / "s.json").write_bytes(content)
    (directory / "s.7.journal").write_bytes(b'{"persist_journal":1,"generation":7,"snapshot":"%b"}\n' % (b"0" * 32))
    before = files(store)
    for verb_name, verb in VERBS.items():
        for each in (store, persist.Store(directory)):
            with pytest.raises(persist.UnsupportedFormat) as caught:
                verb(each, session)
            assert (caught.value.found, caught.value.known, caught.value.path) == (known, 3, directory / "s.json")
            assert files(store) == before, verb_name
    assert [problem.kind for problem in store.check() if problem.path.suffix == ".json"] == ["unsupported"]
    with pytest.raises(persist.SessionExists):
        store.create("s", DATA)
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert files(store) == before


#: A worker of a later release reads documents of format 3 and 4, and writes 4.
LATER = """
import re
from persist.storage import document
document.FORMAT = 4
document._SHAPE = re.compile(document._SHAPE.pattern.replace(b'"format":3', b'"format":[34]'))
"""


def test_old_and_new_workers_go_on_side_by_side(store: persist.Store, actor: ActorFactory) -> None:
    """In a rolling upgrade the old worker loses one session after the other, but nobody's message is lost.

    Fails if the old worker takes an unknown format for damage, for a torn tail, or for a missing session.
    """
    old, new = actor(), actor()
    new.do(LATER)
    for session_id in ("shared", "later"):
        store.create(session_id, {"messages": []})
    for number in range(5):
        old.do(f"store.append('shared', 'messages', {{'id': 'old-{number}'}})")
        new.do(f"store.append('later', 'messages', {{'id': 'new-{number}'}})")
        before = (store.path / "later.json").read_bytes()
        with pytest.raises(persist.UnsupportedFormat, match="has format 4, and this version knows 3"):
            old.do(f"store.append('later', 'messages', {{'id': 'old-{number}'}})")
        assert (store.path / "later.json").read_bytes() == before
    new.do("store.append('shared', 'messages', {'id': 'new'})")
    with pytest.raises(persist.UnsupportedFormat):
        old.do("store.append('shared', 'messages', {'id': 'late'})")
    old.do("store.create('own', {'messages': [{'id': 'm'}]}); None")
    assert old.do("[each.kind for each in store.check()]") == ["unsupported"] * 2
    assert old.do("store.clear_stale_streams()") == persist.Sweep([], {})
    told = {name: new.do(f"[each['id'] for each in store.load({name!r}).data['messages']]") for name in store.ids()}
    assert told["shared"] == [*(f"old-{number}" for number in range(5)), "new"]
    assert told["later"] == [f"new-{number}" for number in range(5)]
    assert told["own"] == ["m"]
