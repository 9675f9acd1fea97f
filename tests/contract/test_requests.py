"""Requests that are sent twice, and changes that depend on a version, between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from actors import Actor
from conftest import ActorFactory

import persist

KINDS = ("auto", "postgres")
PROMPT = {"id": "p1", "role": "user", "content": "Why?"}
ANSWER = {"id": "a1", "role": "assistant", "content": "Because."}
#: Answer a request as a server does: with the started stream, the running one, or the stored answer.
ONCE = f"""
try:
    stream = store.start_stream('s-1', {PROMPT!r}, once=True, create=True, fields={{'model': 'm'}})
    said = ['started', stream.id]
except persist.AlreadyStarted as told:
    said = ['runs', told.stream_id] if told.stream_id else ['answered', told.answer]
said
"""


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "Requests", "messages": [{"id": "m1", "content": "hi"}]})


def ids(store: persist.Store) -> list[str]:
    return [message["id"] for message in store.load("s-1").data["messages"]]


# --- once -------------------------------------------------------------------------------------------------------------


def test_request_that_is_sent_to_three_processes_starts_one_turn(store: persist.Store, actor: ActorFactory) -> None:
    """Of three processes that get one request at once, one starts the turn, and the others are told its stream.

    The session does not exist before. Once the prompt is answered, each process is told the answer. Fails if a running
    prompt, or an answered one, is not looked for.
    """
    actors = [actor() for _ in range(3)]
    for number in range(10):
        for each in actors:
            each.start(ONCE)
        answers = [each.result() for each in actors]
        [stream_id] = [stream_id for kind, stream_id in answers if kind == "started"]
        assert sorted(answers) == [["runs", stream_id], ["runs", stream_id], ["started", stream_id]]
        assert store.load("s-1").data["messages"] == [PROMPT]
        assert store.head("s-1").fields["model"] == "m"
        [owner] = [each for each, (kind, _) in zip(actors, answers, strict=True) if kind == "started"]
        owner.do(f"stream.finish({ANSWER!r}, fields={{'tokens': {number}}})")
        assert [each.do(ONCE) for each in actors] == [["answered", ANSWER | {"answers": "p1"}]] * 3
        assert (ids(store), store.head("s-1").fields["tokens"]) == (["p1", "a1"], number)
        store.delete("s-1")


def test_request_whose_server_has_died_is_taken_up_again(
    store: persist.Store, session: persist.Session, actor: ActorFactory, kill: Callable[[Actor], None]
) -> None:
    """An interrupted prompt has no answer, so the next process that gets it runs it. The prompt is stored once."""
    victim, other = actor(), actor()
    victim.do(ONCE)
    victim.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    kill(victim)
    assert store.load("s-1").clear_stale_stream()
    # A message that another writer appends is not the answer.
    store.append("s-1", "messages", {"id": "sorry", "role": "assistant", "content": "That was interrupted."})
    assert other.do(ONCE)[0] == "started"
    other.do(f"stream.finish({ANSWER!r})")
    assert other.do(ONCE) == ["answered", ANSWER | {"answers": "p1"}]
    assert ids(store).count("p1") == 1


def test_refused_start_sets_no_field(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A refused start sets no field, because the fields belong to the commit that claims the session."""
    owner, other = actor(), actor()
    owner.do("stream = store.start_stream('s-1', {'role': 'user', 'content': 'Who?'}); stream.id")
    version = store.head("s-1").version
    with pytest.raises(persist.SessionBusy):
        other.do(ONCE)
    assert store.head("s-1").version == version
    assert "model" not in store.head("s-1").fields


# --- a version --------------------------------------------------------------------------------------------------------


def test_delete_of_a_version_spares_what_was_written_since(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A clean-up that has seen an idle session does not remove a message that came in between."""
    other = actor()
    seen = store.head("s-1").version
    written = other.do("store.append('s-1', 'messages', {'id': 'm2', 'content': 'wait'})")
    with pytest.raises(persist.VersionMismatch) as caught:
        store.delete("s-1", if_version=seen)
    assert (caught.value.mine, caught.value.theirs) == (seen, written)
    assert ids(store) == ["m1", "m2"]
    store.delete("s-1", if_version=written)
    assert not store.exists("s-1")


def test_version_of_a_session_names_none_that_was_made_anew(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A version names no session that was made anew, even with the same id, content and revision."""
    other, seen = actor(), store.head("s-1")
    other.do(f"store.delete('s-1')\nstore.create('s-1', {session.data!r}) and None")
    assert (store.head("s-1").revision, store.load("s-1").data) == (seen.revision, session.data)
    with pytest.raises(persist.VersionMismatch):
        store.delete("s-1", if_version=seen.version)
    with pytest.raises(persist.VersionMismatch), store.transaction("s-1", if_version=seen.version):
        raise AssertionError("the block was entered")
    assert ids(store) == ["m1"]


def test_version_of_a_session_that_is_gone_creates_none(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A version together with `create=True` creates no session, because a version names a write after the first."""
    seen = session.version
    actor().do("store.delete('s-1')")
    with pytest.raises(persist.SessionNotFound), store.transaction("s-1", if_version=seen, create=True):
        raise AssertionError("the block was entered")
    assert store.ids() == []


# --- create -----------------------------------------------------------------------------------------------------------

FIRST_WRITES = {
    "extend": "store.extend('s-1', 'messages', [{'id': name + '.1'}, {'id': name + '.2'}], create=True)",
    "append": "[store.append('s-1', 'messages', {'id': f'{name}.{n}'}, create=True) for n in (1, 2)][-1]",
    "transaction": "with store.transaction('s-1', create=True) as tx:\n"
    "    tx.list('messages').extend([{'id': name + '.1'}, {'id': name + '.2'}])",
    "update": "store.update('s-1', lambda tx: tx.list('messages').extend([{'id': name + '.1'}, {'id': name + '.2'}]),"
    " create=True)",
}


@pytest.mark.parametrize("first_write", FIRST_WRITES.values(), ids=FIRST_WRITES)
def test_first_writes_of_four_processes_are_all_kept(
    store: persist.Store, actor: ActorFactory, first_write: str
) -> None:
    """Of four first writes at once, to a session that does not exist, one creates it and all are kept.

    Fails if a session that exists is made anew.
    """
    actors = [actor() for _ in range(4)]
    for number, each in enumerate(actors):
        each.do(f"name = 'w{number}'")
    for _ in range(10):
        for each in actors:
            each.start(first_write)
        for each in actors:
            each.result()
        assert sorted(ids(store)) == [f"w{number}.{half}" for number in range(4) for half in (1, 2)]
        assert store.head("s-1").revision == (8 if "append" in first_write else 4)
        store.delete("s-1")


# --- a transaction and a stream ---------------------------------------------------------------------------------------

CHANGE = "with stream.transaction() as tx:\n    tx.list('messages').append({'id': 'n', 'role': 'tool'})"
START = f"stream = store.start_stream('s-1', {PROMPT!r}); stream.id"


@pytest.mark.parametrize(
    "end",
    [
        "store.cancel('s-1', {0!r}, force=True)",
        "store.delete('s-1', force=True)",
        "store.delete('s-1', force=True); store.create('s-1', {{'messages': []}}) and None",
    ],
    ids=["cancelled", "deleted", "made anew"],
)
def test_transaction_of_a_stream_that_has_lost_its_session_is_not_entered(
    store: persist.Store, session: persist.Session, actor: ActorFactory, end: str
) -> None:
    """The fence is compared under the same lock under which the block would write."""
    owner, other = actor(), actor()
    stream_id = owner.do(START)
    owner.do(CHANGE)
    other.do(end.format(stream_id))
    version = store.head("s-1").version if store.exists("s-1") else None
    with pytest.raises(persist.StreamLost):
        owner.do("with stream.transaction() as tx: entered = True")
    assert owner.do("'entered' in globals()") is False
    with pytest.raises(persist.StreamLost):
        owner.do("stream.update(lambda tx: tx.fields.update(n=1))")
    assert version == (store.head("s-1").version if store.exists("s-1") else None)


def test_transaction_of_a_stream_puts_its_messages_before_the_partial_answer(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A stream's transaction puts its messages before the partial, as `append` does. Fails if they stay at the end."""
    owner = actor()
    owner.do(START)
    owner.do("stream.checkpoint({'id': 'a1', 'role': 'assistant', 'content': 'Be'})")
    owner.do(CHANGE)
    assert ids(store) == ["m1", "p1", "n", "a1"]
    owner.do(f"stream.finish({ANSWER!r})")
    assert ids(store) == ["m1", "p1", "n", "a1"]


@pytest.mark.parametrize("removal", ["del tx.list('messages')[-1]", "tx.delete()", "tx.data['messages'].clear()"])
def test_removal_of_what_a_live_stream_is_about_to_complete_is_refused(
    store: persist.Store, session: persist.Session, actor: ActorFactory, removal: str, kill: Callable[[Actor], None]
) -> None:
    """The partial answer of a live stream, and its session, cannot be removed. Once the owner is dead they can."""
    owner, other = actor(), actor()
    owner.do(START)
    owner.do("stream.checkpoint({'id': 'a1', 'role': 'assistant', 'content': 'Be'})")
    version = store.head("s-1").version
    remove = f"with store.transaction('s-1') as tx:\n    {removal}"
    with pytest.raises(persist.SessionBusy):
        other.do(remove)
    assert (store.head("s-1").version, ids(store)) == (version, ["m1", "p1", "a1"])
    kill(owner)
    other.do(remove)
    found: Any = ids(store) if store.exists("s-1") else None
    assert found in (None, [], ["m1", "p1"])


def test_pair_that_two_processes_add_is_there_once(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A pair that two processes add at once is stored once, and each gets the version that holds the pair."""
    actors = [actor(), actor()]
    pair = [{"id": "u", "role": "user", "content": "?"}, {"id": "a", "role": "assistant", "content": "!"}]
    for number in range(10):
        wanted = [each | {"id": f"{each['id']}{number}"} for each in pair]
        for each in actors:
            each.start(f"store.extend('s-1', 'messages', {wanted!r})")
        assert {each.result() for each in actors} == {store.head("s-1").version}
        assert store.tail("s-1", limit=2) == wanted
    assert len(ids(store)) == 21
    assert store.head("s-1").revision == 11
