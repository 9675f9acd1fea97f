"""The transaction: what a block may do with its session, that it is one commit or none, and that no change is lost.

The tests fail if a session is made before its block has ended. They fail if a delete is done within the block or beside
a live stream. They fail if a value that a block was handed can be changed when nobody would write the change. They fail
if a stream's own block puts a message behind its partial answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness.contents import reopened

import persist
from persist.working_copy import WorkingList

HI = {"id": "m1", "role": "user", "content": "hi"}
HELLO = {"id": "m2", "role": "assistant", "content": "hello"}

Use = Callable[[persist.Transaction], object]
Edit = Callable[[persist.Transaction, WorkingList], object]


class Oops(Exception):
    pass


@pytest.fixture
def store(make_store: Callable[..., persist.Store]) -> persist.Store:
    """Return a store with one session of two messages, with a journal and without one, and on PostgreSQL."""
    made = make_store(timeout_s=5.0)
    made.create("s", {"title": "t", "n": 0, "log": [1], "messages": [dict(HI), dict(HELLO)]})
    return made


def files_of(store: persist.Store, session_id: str) -> list[str]:
    found = [path.name for path in Path(store.place).rglob("*") if path.is_file()]
    return sorted(name for name in found if name.startswith(session_id))


# --- one commit -------------------------------------------------------------------------------------------------------


def test_block_is_one_commit_of_all_that_it_changed(store: persist.Store) -> None:
    """Nobody sees the changes before the block has ended. The block's version is the version of the commit."""
    version = store.head("s").version
    with store.transaction("s") as tx:
        tx.fields["title"] = "u"
        tx.list("messages").append({"id": "m3"})
        tx.list("new").append(1)
        assert tx.version == version
        assert (store.load("s").data["title"], store.head("s").version) == ("t", version)
    session = store.load("s")
    assert (session.revision, session.version) == (2, tx.version)
    messages = [HI, HELLO, {"id": "m3"}]
    assert session.data == {"title": "u", "n": 0, "log": [1], "messages": messages, "new": [1]}


def test_representation_shows_no_content(store: persist.Store) -> None:
    """A transaction's representation shows no content, because it may go to a log.
    It stays the same after the block.
    """
    with store.transaction("s") as tx:
        assert repr(tx) == f"<persist.Transaction at version {tx.version}>"
    assert repr(tx) == f"<persist.Transaction at version {tx.version}>"


def test_attribute_that_there_is_none_of_cannot_be_set(store: persist.Store) -> None:
    """``tx.title = …`` and ``tx.data = {…}`` are errors, because they would be lost in silence."""
    for name in ("title", "data", "fields"):
        with pytest.raises(AttributeError), store.transaction("s") as tx:
            setattr(tx, name, {})
    assert store.head("s").revision == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda tx: tx.fields,
        lambda tx: tx.list("messages"),
        lambda tx: tx.list("none"),
        lambda tx: tx.data,
        lambda tx: tx.delete(),
    ],
    ids=["fields", "list", "missing list", "data", "delete"],
)
def test_transaction_is_refused_after_its_block(use: Use, store: persist.Store) -> None:
    """A use after the block is an error, because nobody would write the change. So is one after a block that raised."""
    with store.transaction("s") as tx:
        pass
    with pytest.raises(persist.LockError):
        use(tx)
    with pytest.raises(Oops), store.transaction("s") as failed:
        raise Oops
    with pytest.raises(persist.LockError):
        use(failed)
    assert store.head("s").revision == 1


@pytest.mark.parametrize(
    "error",
    [
        Oops(),
        KeyError("k"),
        OSError(5, "of the block"),
        FileNotFoundError("of the block"),
        TimeoutError("of the block"),
        KeyboardInterrupt(),
        persist.SessionNotFound(session_id="other", path=Path("other")),
        persist.SessionNotFound(session_id="s", path=Path("elsewhere")),
        persist.MergeConflict(session_id="other", path=("a",), reason="r", base=1, mine=2, theirs=3),
        persist.SessionDeleted(session_id="other", path=Path("other")),
        persist.StreamLost(session_id="other", stream_id="t", reason="r"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_a_block_comes_out_as_it_is(error: BaseException, store: persist.Store) -> None:
    """A block's error comes out as it is.
    So does an error of another session's verb, because it says nothing about this one.
    """

    def fail(tx: persist.Transaction) -> None:
        tx.fields["n"] = 1
        raise error

    with store.start_stream("s", {"content": "?"}) as stream:
        version = store.head("s").version
        for update in (lambda use: store.update("s", use), stream.update):
            with pytest.raises(type(error)) as caught:
                update(fail)
            assert caught.value is error
        assert store.head("s").version == version
        stream.finish()


def test_conflict_of_another_session_is_named_as_that(store: persist.Store) -> None:
    """A conflict of another session names that session. A block may refresh one, because a refresh takes no lock."""
    store.create("other", {"n": 0})
    session = store.load("other")
    session.data["n"] = 1
    store.update("other", lambda tx: tx.fields.update(n=2))
    with pytest.raises(persist.MergeConflict, match="Session 'other'") as caught:
        store.update("s", lambda tx: session.refresh())
    assert caught.value.session_id == "other"


# --- what was handed out ----------------------------------------------------------------------------------------------


def delete_and_set(tx: persist.Transaction) -> None:
    del tx.fields["log"]
    tx.fields["log"] = [2]


def delete_and_append(tx: persist.Transaction) -> None:
    del tx.fields["log"]
    tx.list("log").append(2)


REPLACED: dict[str, Use] = {
    "a field was deleted": lambda tx: tx.fields.__delitem__("log"),
    "a field was popped": lambda tx: tx.fields.pop("log"),
    "a field was set to a text": lambda tx: tx.fields.__setitem__("log", "text"),
    "a field was deleted and set": delete_and_set,
    "a field was deleted and made anew": delete_and_append,
    "the data was cleared": lambda tx: tx.data.clear(),
    "the data has another list": lambda tx: tx.data.__setitem__("log", [2]),
    "the data has a text": lambda tx: tx.data.__setitem__("log", "text"),
}
EDITS: dict[str, Edit] = {
    "append": lambda tx, items: items.append("late"),
    "insert": lambda tx, items: items.insert(0, "late"),
    "extend": lambda tx, items: items.extend(["late"]),
    "set": lambda tx, items: items.__setitem__(0, "late"),
    "delete": lambda tx, items: items.__delitem__(0),
    "pop": lambda tx, items: items.pop(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("size", [1, 3000], ids=["a field", "apart"])
def test_list_that_the_block_has_replaced_takes_no_change(size: int, how: str, edit: str, store: persist.Store) -> None:
    """F20: a change of a replaced list is an error, because nobody would write it.
    The size of the list does not matter, and the block writes nothing.
    """
    log = list(range(size))
    store.update("s", lambda tx: tx.fields.update(log=log, messages_seen=1))
    with pytest.raises((persist.InvalidArgument, IndexError)) as caught, store.transaction("s") as tx:
        items = tx.list("log")
        assert len(items) == size
        REPLACED[how](tx)
        EDITS[edit](tx, items)
    if not isinstance(caught.value, IndexError):
        assert "is one that the block has replaced; it must be the document's" in str(caught.value)
    assert (store.load("s").data["log"], store.head("s").revision) == (log, 2)


@pytest.mark.parametrize("size", [1, 3000], ids=["a field", "apart"])
def test_list_that_is_asked_for_anew_is_the_new_one(size: int, store: persist.Store) -> None:
    """The remedy in the error works: a list that is asked for anew is the new one."""
    store.update("s", lambda tx: tx.fields.update(log=list(range(size))))
    uses: list[Use] = [lambda tx: tx.fields.update(log=["new"]), lambda tx: tx.data.update(log=["new"])]
    for use in uses:
        with store.transaction("s") as tx:
            tx.list("log").append("old")
            use(tx)
            tx.list("log").append("newer")
        assert store.load("s").data["log"] == ["new", "newer"]


def test_missing_list_that_became_a_field_takes_no_change(store: persist.Store) -> None:
    """A missing list that became a field takes no change, also if it was empty when it was asked for."""
    with pytest.raises(persist.InvalidArgument, match="'new' is one that the block has replaced"):
        with store.transaction("s") as tx:
            items = tx.list("new")
            tx.fields["new"] = "text"
            items.append(1)
    with store.transaction("s") as tx:
        items = tx.list("new")
        tx.fields["new"] = [1]
        items.append(2)
    assert store.load("s").data["new"] == [1, 2]


@pytest.mark.parametrize("key", ['a"b', "a\\b", "a\nb", "\ud800", "", 5, None, ["x"], b"id", True], ids=repr)
def test_key_that_items_cannot_be_found_by_is_refused(key: Any, store: persist.Store) -> None:
    """`find` refuses the same keys as `extend`, whether there are items or not."""
    for name in ("messages", "log", "none"):
        with pytest.raises(persist.InvalidArgument, match="must be the name of a key, without quotes and backslashes"):
            store.update("s", lambda tx, name=name: tx.list(name).find("x", key))  # type: ignore[misc]


def test_item_is_found_by_any_other_key(store: persist.Store) -> None:
    """`find` returns the last item with the value, to be changed in place."""
    for key in ("é", "a'b", "a b", "1", "true"):
        items = [{key: "v", "n": 1}, {key: "v", "n": 2}, {key: 1}, {"id": "v"}]
        store.update("s", lambda tx, items=items: tx.fields.update(log=items))  # type: ignore[misc]
        with store.transaction("s") as tx:
            found = tx.list("log").find("v", key)
            assert found == {key: "v", "n": 2}
            assert tx.list("log").place_of(1, key) == 2
            assert tx.list("log").find("1", key) is None
            found["n"] = 3
        assert store.load("s").data["log"][1] == {key: "v", "n": 3}


# --- create -----------------------------------------------------------------------------------------------------------


def test_session_is_made_when_its_block_has_ended(store: persist.Store) -> None:
    """A block creates its session in one commit, at revision 1. Before that, nobody sees a version or a session."""
    with store.transaction("new", create=True) as tx:
        seen = [tx.version]
        assert (dict(tx.fields), list(tx.list("messages"))) == ({}, [])
        tx.fields["title"] = "t"
        tx.list("messages").append(HI)
        seen.append(tx.version)
        assert not store.exists("new")
    assert seen == [None, None]
    session = store.load("new")
    assert (session.revision, session.version, session.data) == (1, tx.version, {"title": "t", "messages": [HI]})


FIRST_WRITES: dict[str, tuple[Callable[[persist.Store], object], dict[str, Any]]] = {
    "transaction": (lambda store: store.transaction("new", create=True).__enter__(), {}),
    "update": (lambda store: store.update("new", lambda tx: tx.fields.update(n=1), create=True), {"n": 1}),
    "update of nothing": (lambda store: store.update("new", lambda tx: None, create=True), {}),
    "append": (lambda store: store.append("new", "messages", HI, create=True), {"messages": [HI]}),
    "extend": (lambda store: store.extend("new", "log", [1, 2], create=True), {"log": [1, 2]}),
    "extend by nothing": (lambda store: store.extend("new", "log", [], create=True), {}),
}


@pytest.mark.parametrize("name", [name for name in FIRST_WRITES if name != "transaction"])
def test_first_write_makes_the_session(name: str, store: persist.Store) -> None:
    """A first write creates the session, also if it writes nothing else: the caller may load it then.
    A second write finds it.
    """
    verb, expected = FIRST_WRITES[name]
    verb(store)
    first = store.load("new")
    assert (first.data, first.revision) == (expected, 1)
    verb(store)
    assert store.load("new").created_at == first.created_at
    assert reopened(store).check() == []


def test_first_write_begins_a_stream(store: persist.Store) -> None:
    """The session, its prompt, its fields and the claim are one commit."""
    with store.start_stream("new", HI, create=True, fields={"model": "m"}) as stream:
        session = store.load("new")
        assert (session.revision, session.active_stream_id) == (1, stream.id)
        assert (session.data["messages"], session.data["model"]) == ([HI], "m")
        with pytest.raises(persist.SessionBusy):
            store.start_stream("new", HELLO, create=True)
        stream.finish(HELLO)
    assert store.load("new").data["messages"] == [HI, HELLO]


@pytest.mark.parametrize(
    "fail",
    [
        lambda store: store.update("new", lambda tx: 1 / 0, create=True),
        lambda store: store.update("new", lambda tx: tx.fields.update(a=()), create=True),
        lambda store: store.append("new", "messages", b"x", create=True),
        lambda store: store.extend("new", "messages", [HI, {**HI, "content": "other"}], create=True),
        lambda store: store.start_stream("new", {"content": ()}, create=True),
        lambda store: store.start_stream("new", HI, create=True, fields={"a": ()}),
        lambda store: store.start_stream("new", {"content": "?"}, create=True, once=True),
        lambda store: store.update("new", lambda tx: None, create=True, if_version="seen"),
    ],
)
def test_first_write_that_fails_makes_nothing(fail: Callable[[persist.Store], object], store: persist.Store) -> None:
    """A first write that fails leaves no document, no journal, no lease and no lock file."""
    with pytest.raises((persist.PersistError, ZeroDivisionError)):
        fail(store)
    assert not store.exists("new")
    assert files_of(store, "new") == []
    assert store._backend.engine.leases() == []
    store.create("new")


# --- delete -----------------------------------------------------------------------------------------------------------


def test_delete_is_done_when_the_block_has_ended(store: persist.Store) -> None:
    """A delete takes effect when the block has ended, whatever else the block has changed."""
    session = store.load("s")
    with store.transaction("s") as tx:
        tx.fields["title"] = "u"
        tx.delete()
        assert store.load("s").data["title"] == "t"
    assert tx.is_deleted
    assert not store.exists("s")
    assert files_of(store, "s.") == []
    session.data["title"] = "ghost"
    with pytest.raises(persist.SessionDeleted):
        session.save()
    store.create("s")
    assert store.load("s").data == {}


def test_update_may_delete(store: persist.Store) -> None:
    """A function of `update` may look at the session and delete it. Its result is returned."""

    def take(tx: persist.Transaction) -> dict[str, Any]:
        title = tx.fields["title"]
        tx.delete()
        return {"title": title}

    assert store.update("s", take) == {"title": "t"}, "a delete is a change: the dict is no lost one"
    assert not store.exists("s")


@pytest.mark.parametrize(
    "use", [lambda tx: tx.fields, lambda tx: tx.list("log"), lambda tx: tx.data, lambda tx: tx.delete()]
)
def test_deleted_transaction_is_used_for_nothing_else(use: Use, store: persist.Store) -> None:
    """A change after the delete would be lost. So it is an error, and the delete does not happen either."""
    with pytest.raises(persist.InvalidArgument, match=r"left after its delete\(\)"), store.transaction("s") as tx:
        tx.delete()
        use(tx)
    assert store.load("s").revision == 1


def test_block_that_fails_behind_its_delete_keeps_the_session(store: persist.Store) -> None:
    """A block that raises after its delete keeps the session, like every block that raises."""
    with pytest.raises(Oops), store.transaction("s") as tx:
        tx.delete()
        raise Oops
    assert store.load("s").revision == 1


def test_session_with_a_live_stream_is_not_deleted_by_a_block(store: persist.Store) -> None:
    """The error comes at the delete, so that the block can go on without it. A dead stream prevents no delete."""
    with store.start_stream("s", {"id": "p", "content": "?"}) as stream:
        version = store.head("s").version
        with pytest.raises(persist.SessionBusy) as caught, store.transaction("s") as tx:
            tx.fields["title"] = "u"
            tx.delete()
        assert (caught.value.stream_id, store.head("s").version) == (stream.id, version)
        with store.transaction("s") as tx:
            with pytest.raises(persist.SessionBusy):
                tx.delete()
            assert not tx.is_deleted
            tx.fields["title"] = "u"
        assert store.load("s").data["title"] == "u"
        with pytest.raises(persist.SessionBusy), stream.transaction() as tx:
            tx.delete()
        stream._lease.close()
        store.update("s", lambda tx: tx.delete())
    assert not store.exists("s")
    assert store._backend.engine.leases() == []


# --- in the middle of a turn ------------------------------------------------------------------------------------------


def test_block_may_remove_messages_but_not_the_partial_answer(store: persist.Store) -> None:
    """A block may remove any message, also the prompt, but not a live stream's partial: it would be written again."""
    removing: list[Use] = [
        lambda tx: tx.list("messages").pop(),
        lambda tx: tx.list("messages").clear(),
        lambda tx: tx.data.update(messages=[HI]),
        lambda tx: tx.data.pop("messages"),
        lambda tx: tx.data.update(messages="gone"),
        lambda tx: tx.list("messages").find("t1.answer").update(id="other"),
    ]
    with store.start_stream("s", {"id": "p", "role": "user", "content": "?"}, stream_id="t1") as stream:
        store.update("s", lambda tx: tx.list("messages").pop(0))
        stream.checkpoint({"role": "assistant", "content": "Well"})
        before = store.load("s")
        for use in removing:
            with pytest.raises(persist.SessionBusy):
                store.update("s", use)
            # The stream's own block looks for the partial in the messages, which may be no list any more.
            with pytest.raises((persist.SessionBusy, persist.InvalidArgument)):
                stream.update(use)
            assert store.head("s").version == before.version
        store.update("s", lambda tx: tx.list("messages").__delitem__(slice(0, 2)))
        store.update("s", lambda tx: tx.list("messages").find("t1.answer").update(note=1))
        assert [message["id"] for message in store.load("s").data["messages"]] == ["t1.answer"]
        assert store.load("s").data["messages"][0]["note"] == 1
        stream._lease.close()
    store.update("s", lambda tx: tx.list("messages").clear())
    assert store.load("s").data["messages"] == []


def test_own_block_of_a_stream_puts_messages_before_the_partial(store: persist.Store) -> None:
    """A stream's own block adds messages before the partial, like `append`.
    If the partial was not the last message, they stay behind it.
    """
    with store.start_stream("s", {"id": "p", "role": "user", "content": "?"}, stream_id="t1") as stream:
        with stream.transaction() as tx:
            tx.list("messages").append({"id": "first"})
        stream.checkpoint({"role": "assistant", "content": "Well"})
        with stream.transaction() as tx:
            tx.list("messages").extend([{"id": "tool-1"}, {"id": "tool-2"}])
            tx.list("messages").insert(0, {"id": "begin"})
            tx.fields["n"] = 1
        assert store.head("s").version == tx.version
        stream.update(lambda tx: tx.data["messages"].append({"id": "tool-3"}))
        expected = ["begin", "m1", "m2", "p", "first", "tool-1", "tool-2", "tool-3", "t1.answer"]
        assert [message["id"] for message in store.load("s").data["messages"]] == expected
        assert store.load("s").data["n"] == 1
        # Another writer's message: now the partial is in the middle.
        store.append("s", "messages", {"id": "aside"})
        stream.update(lambda tx: tx.list("messages").append({"id": "late"}))
        stream.append({"id": "tool-4"})
        stream.finish({"role": "assistant", "content": "So."})
    expected[-1:] = ["tool-4", "t1.answer", "aside", "late"]
    assert [message["id"] for message in store.load("s").data["messages"]] == expected


def test_own_block_of_a_stream_is_one_commit_or_none(store: persist.Store) -> None:
    """A block that changes nothing writes nothing.
    A block that raises writes nothing either, and the stream goes on.
    """
    with store.start_stream("s", {"id": "p", "content": "?"}) as stream:
        stream.checkpoint({"content": "Well"})
        version = store.head("s").version
        with stream.transaction() as tx:
            assert tx.list("messages")[-1]["content"] == "Well"
        assert tx.version == version
        assert stream.update(lambda tx: len(tx.list("messages"))) == 4
        with pytest.raises(Oops), stream.transaction() as tx:
            tx.list("messages").append({"id": "lost"})
            raise Oops
        with pytest.raises(persist.InvalidArgument), stream.transaction() as tx:
            tx.fields["active_stream_id"] = None
        with pytest.raises(persist.InvalidArgument, match="returned a new dict"):
            stream.update(lambda tx: {"n": 1})
        assert store.head("s").version == version
        stream.finish({"content": "So."}, fields={"n": 5, "tokens": {"in": 1}})
    data = store.load("s").data
    assert (data["n"], data["tokens"], data["messages"][-1]["content"]) == (5, {"in": 1}, "So.")
    assert store.load("s").revision == 4, "start, checkpoint and finish"


def test_own_block_of_a_stream_that_lost_its_session_is_not_entered(store: persist.Store) -> None:
    """The block is not entered and its function is not called, however the stream lost its session."""

    def make_anew(_stream: persist.Stream) -> None:
        store.delete("s", force=True)
        store.create("s", {"messages": []})

    losses: list[Callable[[persist.Stream], object]] = [
        lambda stream: store.cancel("s", stream.id, force=True),
        lambda stream: stream.finish(),
        lambda stream: stream.fail(),
        make_anew,
        lambda stream: store.delete("s", force=True),
    ]
    for lose in losses:
        calls: list[object] = []
        with store.start_stream("s", {"content": "?"}) as stream:
            lose(stream)
            with pytest.raises(persist.StreamLost), stream.transaction() as tx:
                calls.append(tx)
            with pytest.raises(persist.StreamLost):
                stream.update(calls.append)
        assert calls == []


# --- update -----------------------------------------------------------------------------------------------------------


async def coroutine(tx: persist.Transaction) -> None:
    tx.fields["n"] = 1


@pytest.mark.parametrize(
    "function",
    [
        lambda tx: {"title": "u"},
        lambda tx: {**tx.data, "title": "u"},
        lambda tx: dict(tx.fields, title="u"),
        lambda tx: {"messages": tx.list("messages")[:1]},
    ],
)
def test_function_that_returns_what_it_was_to_write_is_refused(
    function: Callable[[persist.Transaction], object], store: persist.Store
) -> None:
    """F20: ``lambda data: {**data, "title": "u"}`` is refused. It looks like a change, but it has changed nothing."""
    with pytest.raises(persist.InvalidArgument, match="one that changes the transaction in place"):
        store.update("s", function)
    assert store.head("s").revision == 1


def test_result_of_a_function_is_whatever_it_returns(store: persist.Store) -> None:
    """A function may return a value that it was handed, at any depth, a new dict beside a change, and any other
    value.
    """
    store.update("s", lambda tx: tx.fields.update(meta={"a": [{"b": 1}]}))
    results: list[tuple[Callable[[persist.Transaction], object], object]] = [
        (lambda tx: tx.fields["meta"], {"a": [{"b": 1}]}),
        (lambda tx: tx.fields["meta"]["a"][0], {"b": 1}),
        (lambda tx: tx.data["meta"]["a"][0], {"b": 1}),
        (lambda tx: tx.list("messages")[0], HI),
        (lambda tx: tx.list("messages").find("m2"), HELLO),
        (lambda tx: tx.data["messages"][1], HELLO),
        (lambda tx: [1], [1]),
        (lambda tx: None, None),
        (lambda tx: tx.list("messages").find("none"), None),
    ]
    for function, expected in results:
        assert store.update("s", function) == expected
    assert store.head("s").revision == 2
    assert store.update("s", lambda tx: (tx.fields.update(n=1), {"n": 1})[1]) == {"n": 1}
    assert (store.head("s").revision, store.load("s").data["n"]) == (3, 1)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_function_whose_body_has_not_run_is_refused(store: persist.Store) -> None:
    """An async function or a generator is refused. A value that is no function is refused before anything else."""

    def generator(tx: persist.Transaction) -> Any:
        tx.fields["n"] = 1
        yield

    functions: list[Any] = [coroutine, generator, lambda tx: (each for each in "x"), partial(coroutine)]
    for wrong in functions:
        with pytest.raises(persist.InvalidArgument, match="must be a plain function"):
            store.update("s", wrong)
    others: list[Any] = [None, 5, "clear", {}]
    for nothing in others:
        with pytest.raises(persist.InvalidArgument, match="must be callable"):
            store.update("s", nothing)
    assert store.head("s").revision == 1
