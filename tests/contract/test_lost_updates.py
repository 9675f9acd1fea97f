"""Many writers on one session, in threads and processes, lose nothing."""

from __future__ import annotations

import pytest
from actors import Actor
from conftest import ActorFactory

import persist

KINDS = ("auto", "postgres")
PROCESSES = 4
APPENDS = 200

BY_SAVE = """
def work(name):
    session = store.load('s-1')
    for n in range(count):
        session.data['messages'].append({'id': f'{name}-{n}', 'role': 'user', 'content': 'x' * 40})
        session.save()
"""
BY_EDIT = """
def work(name):
    for n in range(count):
        with store.transaction('s-1') as tx:
            data = tx.data
            data['messages'].append({'id': f'{name}-{n}', 'role': 'user', 'content': 'x' * 40})
            data['total'] = data.get('total', 0) + 1
"""
BY_TRANSACTION = """
def work(name):
    for n in range(count):
        with store.transaction('s-1') as tx:
            tx.list('messages').append({'id': f'{name}-{n}', 'role': 'user', 'content': 'x' * 40})
            tx.fields['total'] = tx.fields.get('total', 0) + 1
"""
BY_EXTEND = """
def work(name):
    for n in range(count):
        pair = [{'id': f'{name}-{n}', 'role': 'user', 'content': 'x' * 40}, {'id': f'{name}-{n}a', 'role': 'assistant'}]
        store.extend('s-1', 'messages', pair)
        assert store.tail('s-1', limit=400).index(pair[1]) > 0
"""
BY_APPEND = """
def work(name):
    for n in range(count):
        store.append('s-1', 'messages', {'id': f'{name}-{n}', 'role': 'user', 'content': 'x' * 40})
"""
THREADS = """
import threading
def run(name, threads):
    errors = []
    def guarded(name):
        try:
            work(name)
        except Exception as error:
            errors.append(repr(error))
    started = [threading.Thread(target=guarded, args=(f'{name}-{t}',)) for t in range(threads)]
    for thread in started: thread.start()
    for thread in started: thread.join()
    return errors
"""


def run_all(actors: list[Actor], work: str, *, threads: int, count: int) -> None:
    for each in actors:
        each.do(f"{work}\n{THREADS}\ncount = {count}")
    # Every actor is up and waits for its next line. This is the barrier.
    for each in actors:
        each.start(f"run('p{each.pid}', {threads})")
    assert [each.result() for each in actors] == [[]] * len(actors)


def assert_each_once(store: persist.Store, expected: int) -> None:
    """Require that each message is stored once, by two measures: the ids in the document, and the counted revisions."""
    session = store.load("s-1")
    messages = session.data["messages"]
    for place, message in enumerate(messages):
        # An assistant message is the second one of a pair.
        assert message["role"] == "user" or message["id"] == messages[place - 1]["id"] + "a"
    assert session.data.get("total", expected) == expected
    ids = [message["id"] for message in messages if message["role"] == "user"]
    assert len(messages) in (expected, 2 * expected)
    assert len(ids) == len(set(ids)) == expected
    assert session.revision == expected + 1
    for writer in {identity.rpartition("-")[0] for identity in ids}:
        own = [int(identity.rpartition("-")[2]) for identity in ids if identity.rpartition("-")[0] == writer]
        assert own == sorted(own)


@pytest.mark.parametrize(("threads", "switching"), [(1, None), (4, None), (4, 1e-6)], indirect=["switching"])
@pytest.mark.parametrize(
    "work",
    [BY_SAVE, BY_EDIT, BY_TRANSACTION, BY_EXTEND, BY_APPEND],
    ids=["save", "edit", "transaction", "extend", "append"],
)
@pytest.mark.usefixtures("switching")
def test_every_append_of_four_processes_is_kept(
    store: persist.Store, actor: ActorFactory, work: str, threads: int, kind: str
) -> None:
    """A11, A12: 4 processes make 200 appends each, by one and by four threads: 800 of 800 are kept, in order.

    On PostgreSQL they make 40 each.

    Fails without the lock, and with the lock only around the write.
    """
    store.create("s-1", {"title": "Busy", "messages": []})
    actors = [actor(timeout_s=60.0) for _ in range(PROCESSES)]
    appends = 40 if kind == "postgres" else APPENDS
    run_all(actors, work, threads=threads, count=appends // threads)
    assert_each_once(store, PROCESSES * appends)


def test_readers_see_only_whole_revisions_that_grow(store: persist.Store, actor: ActorFactory) -> None:
    """Loads without a lock beside a writer give committed revisions, each as long as its number says, and none torn."""
    store.create("s-1", {"messages": []})
    writer, reader = actor(), actor()
    writer.do(BY_APPEND + "\ncount = 150")
    reader.do("seen = [(0, 0)]\nrunning = True")
    writer.start("work('w')")
    reader.start(
        "while seen[-1][1] < 150:\n"
        "    session = store.load('s-1')\n"
        "    seen.append((session.revision, len(session.data['messages'])))\n"
        "    head = store.head('s-1')\n"
        "    assert head.counts['messages'] == head.revision - 1\n"
        "seen"
    )
    writer.result()
    seen = reader.result()[1:]
    assert all(revision == length + 1 for revision, length in seen)
    assert seen == sorted(seen)


STAMP = """
def look():
    global session
    session = store.load('s-1')
def stamp(n, content, prefer):
    for message in session.data['messages']:
        message['seen'] = n
    session.data['messages'].append({'role': 'user', 'content': content})
    session.save(on_conflict=prefer)
"""
ROUNDS = 70


@pytest.mark.parametrize("prefer", ["error", "mine", "theirs"])
def test_two_processes_stamp_the_same_messages_and_lose_none(
    store: persist.Store, actor: ActorFactory, prefer: str
) -> None:
    """F1: two processes that stamp all old messages alike, and append one each, lose and double nothing.

    They get no conflict, whatever is preferred. The old messages have no ids. Fails if a change that both made alike is
    taken from both sides.
    """
    store.create("s-1", {"messages": [{"role": "user", "content": "Hello"}] * 3})
    actors = {name: actor(timeout_s=60.0) for name in "pq"}
    for each in actors.values():
        each.do(STAMP)
    for n in range(ROUNDS):
        for each in actors.values():
            each.do("look()")
        # Both have the same base now, and save at once.
        for name, each in actors.items():
            each.start(f"stamp({n}, '{name} {n}', {prefer!r})")
        for each in actors.values():
            each.result()
    *old, one, other = store.load("s-1").data["messages"]
    assert all(message["seen"] == ROUNDS - 1 for message in old)
    contents = [message["content"] for message in (*old, one, other)]
    assert contents[:3] == ["Hello"] * 3
    assert sorted(contents[3:]) == sorted(f"{name} {n}" for name in actors for n in range(ROUNDS))


REPLACE = "session.data['messages'][1:] = [{'role': 'user', 'content': 'And then?'}]"


@pytest.mark.parametrize("prefer", ["mine", "theirs"])
@pytest.mark.parametrize("replaces_first", [True, False])
@pytest.mark.parametrize(
    "other",
    ["del session.data['messages'][1]", "session.data['messages'][1]['content'] += 'use'"],
    ids=["drop", "edit"],
)
def test_prompt_in_the_place_of_a_partial_is_kept(
    store: persist.Store, actor: ActorFactory, other: str, replaces_first: bool, prefer: str
) -> None:
    """F1: a prompt is kept if its process also drops the partial, and another one drops or edits the partial.

    The prompt is stored under its own role, and so is the edited partial. Fails if a preference takes one side's list,
    or if items without ids merge by position.
    """
    question, partial = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Beca"}
    store.create("s-1", {"messages": [question, partial]})
    edits = [REPLACE, other] if replaces_first else [other, REPLACE]
    actors = [actor() for _ in edits]
    for each in actors:
        each.do("session = store.load('s-1')")
    for each, edit in zip(actors, edits, strict=True):
        each.do(f"{edit}\nsession.save(on_conflict={prefer!r})")
    first, *rest = store.load("s-1").data["messages"]
    assert first == question
    edited = [] if other.startswith("del") else [{"role": "assistant", "content": "Because"}]
    assert sorted(rest, key=str) == sorted([*edited, {"role": "user", "content": "And then?"}], key=str)
