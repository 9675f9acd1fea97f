"""The bytes that a commit to a large session costs, and the limits of what a process believes without looking.

These tests fail without their mechanisms: the replica, the looks at the document's version and at the journal's end
(`Journal.ends_at`), the ids that a splice hands over, the bounds of `Cache`.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from conftest import ActorFactory
from harness.files import file_engine
from harness.journals import Traffic, has_journal, journal_of, parted, traffic
from harness.sweeps import sweep

import persist
from persist.storage.cache import Cache, Replica
from persist.storage.content import Items, encoded
from persist.storage.document import first_header
from persist.storage.journal import Tail

KB = 1024
#: The bytes that a commit of a few hundred bytes may read and write, at any size of the session.
MOST_READ, MOST_WRITTEN = 16 * KB, 4 * KB


def message(number: int) -> dict[str, Any]:
    return {"id": f"m{number}", "role": "user", "content": f"{number} ".ljust(480, "x")}


def small(number: int) -> dict[str, Any]:
    return {"id": f"new-{number}", "role": "user", "content": "hi"}


@pytest.fixture
def large(store: persist.Store) -> persist.Store:
    """Return a store with a session of a megabyte, of 2,000 messages."""
    store.create("s", {"title": "New chat", "messages": [message(number) for number in range(2000)]})
    assert has_journal(store)
    return store


def measured(verb: Callable[[], object]) -> Traffic:
    with traffic() as counted:
        verb()
    return counted


def assert_costs_the_change(verb: Callable[[], object]) -> None:
    counted = measured(verb)
    assert 0 < counted.written < MOST_WRITTEN
    assert counted.read < MOST_READ


def rename(store: persist.Store, title: str) -> None:
    with store.transaction("s") as tx:
        tx.data["title"] = title


def retitle(store: persist.Store, title: str) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = title


def titled(title: str) -> Callable[[persist.Transaction], None]:
    return lambda tx: tx.data.update(title=title)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_commit_to_a_large_session_reads_and_writes_the_change(large: persist.Store) -> None:
    """No verb reads or writes the document of a large session once the process has read it.

    A change of a session of a megabyte costs some KB at most.
    """
    large.append("s", "messages", small(0))  # reads the ids
    assert_costs_the_change(lambda: large.append("s", "messages", small(1)))
    assert_costs_the_change(lambda: large.append("s", "messages", {"content": "without an id"}))
    assert_costs_the_change(lambda: large.update("s", titled("Locks")))
    assert_costs_the_change(lambda: retitle(large, "Leases"))
    assert_costs_the_change(lambda: rename(large, "File locks"))
    streams = []
    assert_costs_the_change(lambda: streams.append(large.start_stream("s", small(2))))
    [stream] = streams
    for number in range(3):
        assert_costs_the_change(partial(stream.checkpoint, {"role": "assistant", "content": f"so far {number}"}))
        assert_costs_the_change(partial(stream.append, small(3 + number)))
    assert_costs_the_change(lambda: large.cancel("s", stream.id))
    assert_costs_the_change(lambda: stream.finish({"role": "assistant", "content": "all"}))
    found = large.load("s").data
    assert found["title"] == "File locks"
    ids = [each.get("id") for each in found["messages"][2000:]]
    assert ids == ["new-0", "new-1", None, "new-2", "new-3", "new-4", "new-5", f"{stream.id}.answer"]
    assert found["messages"][-1]["content"] == "all"


def test_end_of_a_turn_by_others_reads_and_writes_the_change(large: persist.Store) -> None:
    """A fail, a forced cancel, a stale clear and a sweep mark prompt and partial without reading the document."""
    large.append("s", "messages", small(0))

    def begun() -> persist.Stream:
        stream = large.start_stream("s", {"role": "user", "content": "Why?"})
        stream.checkpoint({"role": "assistant", "content": "so far"})
        return stream

    assert_costs_the_change(begun().fail)
    stream = begun()
    assert_costs_the_change(lambda: large.cancel("s", stream.id, force=True))
    stream._close()
    session = large.load("s")
    begun()._close()
    session.refresh()
    session.data["title"] = "unsaved"
    assert_costs_the_change(session.clear_stale_stream)
    assert session.data == large.load("s").data | {"title": "unsaved"}
    session.save()
    assert (session.data, session.revision) == (large.load("s").data, large.head("s").revision)
    begun()._close()
    assert_costs_the_change(lambda: sweep(large))
    turns = large.load("s").data["messages"][2001:]
    assert [(each["role"], each["interrupted"]) for each in turns] == [("user", True), ("assistant", True)] * 4


def test_commits_of_others_are_followed_by_reading_them_only(large: persist.Store, actor: ActorFactory) -> None:
    """A process reads the commits of other processes from the journal, and does not read the document."""
    other = actor()
    large.append("s", "messages", small(0))
    for number in range(1, 9, 2):
        other.do(f"store.append('s', 'messages', {small(number)!r})")
        assert_costs_the_change(partial(large.append, "s", "messages", small(number + 1)))
    with pytest.raises(persist.MergeConflict):
        large.append("s", "messages", small(7) | {"content": "another"})
    assert [each["id"] for each in large.load("s").data["messages"][2000:]] == [f"new-{number}" for number in range(9)]


def test_save_writes_the_change(large: persist.Store) -> None:
    """A save writes an edited message, an appended one and a field, and reads no more of a session that it knows."""
    session = large.load("s")
    session.data["messages"].append(small(0))
    session.save()
    session.data["messages"][700]["content"] = "edited"
    session.data["messages"].append(small(1))
    session.data["title"] = "File locks"
    assert_costs_the_change(session.save)
    assert large.load("s").data == session.data


def test_save_of_distant_edits_writes_them_only(large: persist.Store) -> None:
    """A save of edits at both ends of a megabyte does not write the text between them."""
    session = large.load("s")
    for place in (0, 1000, 1999):
        session.data["messages"][place]["content"] = "edited"
    assert measured(session.save).written < MOST_WRITTEN
    assert large.load("s").data == session.data


def test_many_appends_cost_little_on_average_folds_included(store: persist.Store) -> None:
    """Over 1,000 appends of 400 bytes to 400 KB, the bytes written are a few times the bytes appended."""
    store.create("s", {"messages": [message(number) for number in range(800)]})
    store.append("s", "messages", small(0))
    with traffic() as counted:
        for number in range(1000):
            store.append("s", "messages", {"id": number, "content": "x" * 370})
    assert counted.written / 1000 < 3 * KB
    assert counted.read / 1000 < 4 * KB
    assert store.head("s").counts == {"messages": 1801}


def test_no_large_value_makes_another_one_dear(store: persist.Store) -> None:
    """F5: each verb costs its change, even if other large values stand beside `messages`.

    Beside a megabyte of `messages` stand one of other messages and one of text.
    """
    context = [message(number) for number in range(2000)]
    store.create("s", {"title": "New chat", "messages": context, "context_messages": context, "notes": "x" * 2**20})
    store.append("s", "messages", small(0))
    store.append("s", "context_messages", small(0))
    assert_costs_the_change(lambda: store.append("s", "messages", small(1)))
    assert_costs_the_change(lambda: store.append("s", "context_messages", small(1)))
    assert_costs_the_change(lambda: retitle(store, "Locks"))
    streams = []
    assert_costs_the_change(lambda: streams.append(store.start_stream("s", small(2))))
    assert_costs_the_change(lambda: streams[0].checkpoint({"role": "assistant", "content": "so far"}))
    assert_costs_the_change(streams[0].finish)
    for each in (store, persist.Store(store.path)):
        assert measured(partial(each.head, "s")).read < MOST_READ
        head = each.head("s")
        assert (head.fields["title"], head.counts) == (
            "Locks",
            {"messages": 2004, "context_messages": 2002, "pending_attachments": 0},
        )


@pytest.mark.parametrize("kibibytes", [1, 60, 300])
def test_tail_behind_a_large_record_is_that_of_the_list(large: persist.Store, kibibytes: int) -> None:
    """A tail is right even if the last record is larger than its first read, and does not concern the list.

    Fails if a part of a record is taken for a journal in which nothing has happened.
    """
    large.append("s", "messages", small(0))
    with large.transaction("s") as tx:
        tx.fields["notes"] = "n" * 1024 * kibibytes
    assert large.tail("s", limit=2) == [message(1999), small(0)]
    large.append("s", "messages", small(1) | {"content": "c" * 1024 * kibibytes})
    assert [each["id"] for each in large.tail("s", limit=3)] == ["m1999", "new-0", "new-1"]
    assert large.tail("s", field="missing") == []


def test_asking_whether_a_stream_was_cancelled_reads_a_head(large: persist.Store) -> None:
    """`is_cancelled`, which a server calls for every token, reads some KB of a megabyte."""
    with large.start_stream("s") as stream:
        assert measured(stream.is_cancelled).read < MOST_READ
        stream.finish()


# --- what is known ----------------------------------------------------------------------------------------------------


def test_session_made_anew_by_another_process_is_not_taken_for_the_known_one(
    large: persist.Store, actor: ActorFactory
) -> None:
    """A process does not apply its replica to a session that was made anew, with the same id and as many records."""
    large.append("s", "messages", small(0))
    name = journal_of(large).name
    other = actor()
    other.do(
        "store.delete('s')\n"
        f"store.create('s', {{'messages': [{{'id': 'other', 'content': 'y' * 70_000}}]}})\n"
        f"store.append('s', 'messages', {small(1)!r})"
    )
    assert journal_of(large).name != name
    large.append("s", "messages", small(0))
    assert [each["id"] for each in large.load("s").data["messages"]] == ["other", "new-1", "new-0"]


@pytest.mark.parametrize("pattern", ["s.*", "s.*.journal"], ids=["both files", "the journal alone"])
def test_journal_that_was_restored_from_a_backup_is_looked_at_anew(large: persist.Store, pattern: str) -> None:
    """A commit after a restore from a backup goes on from the restored files, not from the replica."""
    large.append("s", "messages", small(0))
    backup = {path: path.read_bytes() for path in large.path.glob(pattern) if path.is_file()}
    large.append("s", "messages", small(1))
    large.append("s", "messages", small(2))
    for path, content in backup.items():
        path.write_bytes(content)
    large.append("s", "messages", small(1))
    assert [each["id"] for each in large.load("s").data["messages"][2000:]] == ["new-0", "new-1"]
    assert persist.Store(large.path).load("s").revision == 3


def test_edit_by_hand_is_told_by_whoever_reads_the_document(large: persist.Store) -> None:
    """A verb that reads the whole document refuses one that was edited by hand.

    If a small field was edited, a first look refuses it, too. A process that knows the session reads the whole document
    after it was written to.
    """
    large.append("s", "messages", small(0))
    path = large.path / "s.json"
    path.write_bytes(path.read_bytes().replace(b'"content":"7 x', b'"content":"8 x'))
    large.head("s")
    appending = partial(large.append, field="messages", item=small(1))
    for reader in (appending, large.load, persist.Store(large.path).compact, large.compact, appending):
        with pytest.raises(persist.CorruptSession, match="persist accept"):
            reader("s")
    accepted = large.accept("s").data["messages"]
    assert accepted[7]["content"].startswith("8 x")
    assert [each["id"] for each in accepted[2000:]] == ["new-0"]
    path.write_bytes(path.read_bytes().replace(b'"title":"New chat"', b'"title":"Old chat"'))
    for cold in (persist.Store(large.path).head, persist.Store(large.path).start_stream):
        with pytest.raises(persist.CorruptSession):
            cold("s")


def test_document_that_was_written_anew_by_hand_is_told_at_once(large: persist.Store) -> None:
    """A document that an editor has formatted is refused by every verb, because its first bytes differ."""
    large.append("s", "messages", small(0))
    path = large.path / "s.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    before = journal_of(large).read_bytes()
    with pytest.raises(persist.CorruptSession):
        large.append("s", "messages", small(1))
    with pytest.raises(persist.CorruptSession):
        large.head("s")
    assert journal_of(large).read_bytes() == before


def test_refused_verb_leaves_no_trace_in_what_is_known(large: persist.Store) -> None:
    """A refused item, an edit that raises and a version that has moved on leave the replica as it was."""
    first_version = large.head("s").version
    large.append("s", "messages", small(0))

    def failing(tx: persist.Transaction) -> None:
        tx.fields["title"] = "lost"
        raise ValueError

    for refused in (
        lambda: large.append("s", "messages", small(0) | {"content": "another"}),
        lambda: large.append("s", "messages", {"id": "bad", "content": object()}),
        lambda: large.append("s", "title", 1),
        lambda: large.update("s", failing),
        lambda: large.update("s", titled("lost"), if_version=first_version),
        lambda: large.update("s", lambda tx: tx.data.update(messages=[object()])),
        lambda: large.start_stream("s", small(0) | {"content": "another"}),
    ):
        with pytest.raises((persist.PersistError, ValueError)):
            refused()
    large.append("s", "messages", small(1))
    assert large.head("s").revision == 3
    assert large.load("s").data["title"] == "New chat"
    assert [each["id"] for each in large.load("s").data["messages"][2000:]] == ["new-0", "new-1"]


def test_evicted_knowledge_is_slower_and_never_wrong(store: persist.Store) -> None:
    """Random appends to five sessions are all stored, each once, in a cache with room for two replicas."""
    always = persist.Store(store.path, journal="always", cache_bytes=4096)
    file_engine(always).options.verifies_folds = True
    cache, evicted = file_engine(always).cache, 0
    names = [f"s{number}" for number in range(5)]
    for name in names:
        always.create(name, {"messages": []})
    dice, there = random.Random(7), {name: list[int]() for name in names}
    for _ in range(150):
        name, number = dice.choice(names), dice.randrange(40)
        evicted += not cache.has(name)
        always.append(name, "messages", {"id": number, "content": str(number)})
        if number not in there[name]:
            there[name].append(number)
        assert cache._total_bytes == sum(cost for _, cost in cache._replicas.values()) <= 4096
    assert evicted > 50
    for name in names:
        assert [each["id"] for each in always.load(name).data["messages"]] == there[name]


def replica(count: int) -> Replica:
    """Return a replica of a session of `count` small messages."""
    content = encoded({"messages": [{"id": f"m{number}", "content": "x" * 40} for number in range(count)]})
    return Replica(first_header(None), content, (0, 0, 0, 0), Tail.of("0" * 16))


def cost_bytes(replicas: list[Replica]) -> int:
    """Return the bytes that a cache counts for these replicas."""
    cache = Cache(2**40)
    for number, each in enumerate(replicas):
        cache.put(f"{number}", each)
    return cache._total_bytes


def test_sessions_that_were_used_last_stay_within_the_bound() -> None:
    """The cache drops the replica that was used longest ago, and never keeps more than its bound.

    It does not hold a replica that it has handed out.
    """
    cache = Cache(3 * cost_bytes([replica(100)]))
    for number in range(5):
        cache.put(f"{number}", replica(100))
    assert list(cache._replicas) == ["2", "3", "4"]
    found = cache.take("2")
    assert found is not None
    assert cache.take("2") is None
    cache.put("2", found)
    cache.put("5", replica(100))
    assert list(cache._replicas) == ["4", "2", "5"]
    cache.put("2", replica(200))
    assert list(cache._replicas) == ["5", "2"]
    cache.put("too large", replica(400))
    assert (list(cache._replicas), cache._total_bytes) == ([], 0)


@pytest.mark.parametrize("count", [1, 10_000])
def test_bound_of_the_cache_is_about_that_of_the_memory(count: int) -> None:
    """The bound counts the memory of small messages and of their ids, which is more than that of their JSON."""
    tracemalloc.start()
    try:
        kept = [replica(count) for _ in range(10_000 // count)]
        for each in kept:
            items = each.content.apart["messages"]
            assert isinstance(items, Items)
            assert items.find("m0") == 0
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1.25 * cost_bytes(kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_and_parent_go_on_from_the_same_knowledge(actor: ActorFactory, large: persist.Store) -> None:
    """Parent and child go on from the same replica after a fork.

    They append in turn, and each sees the other's appends.
    """
    server = actor()
    server.do(f"store.append('s', 'messages', {small(0)!r})")
    ids = server.do(
        "here, there = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        os.read(here, 1)\n"
        "        store.append('s', 'messages', {'id': 'child', 'content': 'hi'})\n"
        "        store.append('s', 'messages', {'id': 'parent', 'content': 'hi'})\n"
        "        os._exit(0)\n"
        "    finally:\n"
        "        os._exit(1)\n"
        "store.append('s', 'messages', {'id': 'parent', 'content': 'hi'})\n"
        "os.write(there, b'.')\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "store.append('s', 'messages', {'id': 'child', 'content': 'hi'})\n"
        "store.append('s', 'messages', {'id': 'late', 'content': 'hi'})\n"
        "[status, [each['id'] for each in store.load('s').data['messages'][2000:]]]"
    )
    assert ids == [0, ["new-0", "parent", "child", "late"]]


def test_processes_that_take_turns_lose_nothing_through_folds(store: persist.Store, actor: ActorFactory) -> None:
    """Three processes append, rename and fold in random order, each with a store of another mode, and lose nothing."""
    store.create("s", {"messages": ["x" * 70_000]})
    modes = ("auto", "always", "never")
    servers = [actor(journal=mode) for mode in modes]
    for server in servers:
        server.do("store._backend.engine.options.verifies_folds = True")
    dice = random.Random(11)
    for number in range(90):
        server = dice.choice(servers)
        server.do(f"store.append('s', 'messages', {{'id': {number}}})")
        if dice.random() < 0.2:
            dice.choice(servers).do("store.compact('s')")
        if dice.random() < 0.2:
            dice.choice(servers).do(f"store.update('s', lambda tx: tx.data.update(title={number}))")
    assert [each["id"] for each in store.load("s").data["messages"][1:]] == list(range(90))
    assert store.check() == []


def test_fold_leaves_what_is_known_of_the_lists(large: persist.Store) -> None:
    """An append after a fold need not read the ids again."""
    large.append("s", "messages", small(0))
    large.compact("s")
    assert parted(journal_of(large).read_bytes())[1] == []
    assert_costs_the_change(lambda: large.append("s", "messages", small(1)))
    with pytest.raises(persist.MergeConflict):
        large.append("s", "messages", small(0) | {"content": "another"})
