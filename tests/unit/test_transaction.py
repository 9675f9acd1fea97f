"""Transactions, versions and the verbs that they carry.

They fail if a block makes two commits or none, if a version is used again, if a deleted session is revived, if a retry
doubles an item, or if a block's edit is dropped without a word.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import persist
from persist import json_codec
from persist.transaction import Transaction

HELLO = {"id": "m1", "role": "user", "content": "hello"}


@pytest.fixture(params=["never", "always"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> persist.Store:
    return persist.Store(tmp_path / "sessions", journal=request.param, timeout_s=20.0)


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s", {"title": "New chat", "messages": [HELLO]})


def ids_of(store: persist.Store, session_id: str = "s") -> list[Any]:
    return [message.get("id") for message in store.load(session_id).data["messages"]]


# --- one commit -------------------------------------------------------------------------------------------------------


def test_block_is_one_commit(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "Locks"
        tx.list("messages").extend([{"id": "m2"}, {"id": "m3"}])
        tx.list("notes").append("first")
        del tx.list("messages")[1]
        tx.list("messages").find("m1")["seen"] = True
    there = store.load("s")
    assert there.revision == session.revision + 1
    assert there.data == {"title": "Locks", "messages": [HELLO | {"seen": True}, {"id": "m3"}], "notes": ["first"]}
    assert tx.version == there.version == store.head("s").version


def test_block_that_raises_writes_nothing(store: persist.Store, session: persist.Session) -> None:
    with pytest.raises(KeyError, match="stop"), store.transaction("s") as tx:
        tx.fields["title"] = "Locks"
        tx.data["messages"].clear()
        tx.delete()
        raise KeyError("stop")
    assert store.load("s").data == session.data
    assert store.load("s").version == session.version


def test_block_that_changes_nothing_writes_nothing(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "Locks"
        tx.fields["title"] = "New chat"
        tx.list("messages").append("x")
        tx.list("messages").pop()
    assert tx.version == store.load("s").version == session.version


def test_what_the_whole_document_says_is_what_is_committed(store: persist.Store, session: persist.Session) -> None:
    """Once it was asked for; whatever was handed out before goes on as part of it."""
    with store.transaction("s") as tx:
        messages = tx.list("messages")
        tags = tx.fields.setdefault("tags", [])
        data = tx.data
        messages.append({"id": "m2"})
        tags.append("a")
        data["title"] = "Locks"
        del data["messages"][0]
    assert store.load("s").data == {"title": "Locks", "messages": [{"id": "m2"}], "tags": ["a"]}


def test_list_that_the_block_has_replaced_takes_nothing(store: persist.Store, session: persist.Session) -> None:
    """What it took would be lost without a word."""
    with pytest.raises(persist.WrongType, match="ask the transaction for it anew"), store.transaction("s") as tx:
        messages = tx.list("messages")
        tx.data["messages"] = []
        messages.append({"id": "m2"})
    with store.transaction("s") as tx:
        tx.data["messages"] = []
        tx.list("messages").append({"id": "m3"})
    assert ids_of(store) == ["m3"]


@pytest.mark.parametrize("look", [len, list, lambda messages: messages.find("m1"), lambda messages: messages == []])
def test_value_that_is_set_over_a_missing_list_stays(store: persist.Store, look: Callable[[Any], object]) -> None:
    """Whatever was asked of the list before. Fails where the empty list that was handed out takes its place."""
    with store.transaction("s", create=True) as tx:
        todo = tx.list("todo")
        look(todo)
        tx.data["todo"] = ["a"]
        tx.data["title"] = "x"
        with pytest.raises(persist.WrongType, match="anew"):
            todo.append("lost")
        tx.fields["todo"].append("b")
        tx.list("todo").append("c")
    assert store.load("s").data == {"todo": ["a", "b", "c"], "title": "x"}


@pytest.mark.parametrize("replace", [lambda tx: tx.fields.update(big="text"), lambda tx: tx.fields.pop("big")])
@pytest.mark.parametrize("rows", [["y" * 900] * 9, ["y"]])
def test_list_of_a_field_that_is_gone_takes_nothing(
    store: persist.Store, rows: list[str], replace: Callable[[Transaction], object]
) -> None:
    store.create("s", {"big": rows})
    with pytest.raises(persist.WrongType, match="anew"), store.transaction("s") as tx:
        big = tx.list("big")
        replace(tx)
        big.append("lost")


def test_bytes_are_no_json(store: persist.Store, session: persist.Session) -> None:
    """An item of the working copy that was not read yet is kept as bytes; what a caller puts there is not."""
    puts: list[Callable[[Transaction], object]] = [
        lambda tx: tx.fields.update(x=[b"{}"]),
        lambda tx: tx.data["messages"].append(b"{}"),
        lambda tx: tx.list("messages").append(b"{}"),
    ]
    for put in puts:
        with pytest.raises(persist.NotJSON), store.transaction("s") as tx:
            put(tx)
            assert tx.list("messages")[0] == HELLO
            assert "x" not in tx.fields or tx.list("x")[0] == b"{}"
    assert store.load("s").version == session.version


def test_list_is_used_as_any_list(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        messages: Any = tx.list("messages")
        plain: list[Any] = [HELLO]
        for each in (messages, plain):
            each += [1, 2, 3, 4]
            each[1:3] = ["a", "b", "c"]
            each[-1:] = []
            each.reverse()
            each[2:2] = ["d"]
        assert messages == plain
        assert (messages == [1], messages != plain, messages[::2]) == (False, False, plain[::2])
        with pytest.raises(persist.WrongType, match="step"):
            messages[::2] = [1, 2, 3]
        assert repr(messages) == repr(plain)
        assert repr(tx.fields) == "{'title': 'New chat'}"
        uses: list[Callable[[], object]] = [
            lambda: messages[99],
            lambda: tx.list("none").pop(),
            lambda: messages.__delitem__(-99),
        ]
        for use in uses:
            with pytest.raises(IndexError, match="the list has"):
                use()
    assert store.load("s").data["messages"] == plain


@pytest.mark.parametrize("name", [1, None, b"messages"])
def test_list_has_a_name(store: persist.Store, session: persist.Session, name: Any) -> None:
    with pytest.raises(persist.WrongType, match="a list's name"), store.transaction("s") as tx:
        tx.list(name)


def test_transaction_is_over_with_its_block(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        messages, fields = tx.list("messages"), tx.fields
    uses: list[Callable[[], object]] = [
        lambda: tx.data,
        lambda: tx.fields,
        lambda: tx.list("messages"),
        tx.delete,
        lambda: messages.append(1),
        lambda: fields.update(a=1),
    ]
    for use in uses:
        with pytest.raises(persist.LockNotHeld):
            use()
    assert store.load("s").version == session.version


# --- update -----------------------------------------------------------------------------------------------------------


def test_update_returns_what_its_function_returns(store: persist.Store, session: persist.Session) -> None:
    assert store.update("s", lambda tx: tx.list("messages").pop()) == HELLO
    assert store.update("s", lambda tx: tx.fields["title"]) == "New chat"
    assert store.load("s").data["messages"] == []


@pytest.mark.parametrize(
    "function",
    [
        lambda tx: {**tx.data, "title": "Locks"},
        lambda tx: {"title": "Locks"},
        lambda tx: dict(tx.fields),
    ],
)
def test_new_dict_that_nobody_writes_is_an_error(
    store: persist.Store, session: persist.Session, function: Callable[[Transaction], Any]
) -> None:
    """It would be lost without a word (adk-docs PR 1104)."""
    with pytest.raises(persist.WrongType, match=r"tx\.data\.update"):
        store.update("s", function)
    assert store.load("s").version == session.version


def test_dict_that_was_handed_out_may_be_returned(store: persist.Store, session: persist.Session) -> None:
    """So may a new one beside a change."""
    with store.transaction("s") as tx:
        tx.fields["meta"] = {"inner": {"n": 1}}
    assert store.update("s", lambda tx: tx.list("messages")[0]) == HELLO
    assert store.update("s", lambda tx: tx.fields["meta"]["inner"]) == {"n": 1}
    assert store.update("s", lambda tx: tx.data)["title"] == "New chat"
    # One with other keys answers a request, and is no document.
    assert store.update("s", lambda tx: {"count": len(tx.list("messages"))}) == {"count": 1}
    assert store.update("s", lambda tx: tx.fields.update(title="Locks") or {"done": True}) == {"done": True}
    assert store.load("s").data["title"] == "Locks"


# --- versions ---------------------------------------------------------------------------------------------------------


def test_every_commit_has_a_version_of_its_own(store: persist.Store) -> None:
    """Also a checkpoint, a cancel mark and an accept. A fold keeps it."""
    session = store.create("s", {"title": "t" * 100, "messages": []})
    seen = [session.version]
    seen.append(store.append("s", "messages", HELLO))
    session.refresh()
    session.data["title"] = "Locks"
    seen.append(session.save())
    stream = store.start_stream("s", {"id": "p", "role": "user"})
    seen.append(store.head("s").version)
    stream.checkpoint({"role": "assistant", "content": "a"})
    seen.append(store.head("s").version)
    store.cancel("s", stream.id)
    seen.append(store.head("s").version)
    stream.finish({"role": "assistant", "content": "a"})
    seen.append(store.head("s").version)
    store.compact("s")
    assert store.head("s").version == seen[-1]
    path = store.path / "s.json"
    store.compact("s", alone=True)
    path.write_text(path.read_text().replace("Locks", "Lokcs"))
    seen.append(store.accept("s").version)
    assert len(set(seen)) == len(seen) == 8


def refused(store: persist.Store, version: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: store.update("s", lambda tx: tx.data.clear(), if_version=version),
        lambda: store.update("s", lambda tx: tx.delete(), if_version=version),
        lambda: store.delete("s", if_version=version),
        lambda: store.delete("s", if_version=version, force=True),
    ]
    before = store.load("s")
    for use in uses:
        with pytest.raises(persist.VersionMismatch) as caught:
            use()
        assert isinstance(caught.value, persist.MergeConflict)
        assert (caught.value.mine, caught.value.theirs) == (version, before.version)
    assert store.load("s").version == before.version


def test_session_made_anew_has_no_version_of_the_old_one(store: persist.Store, session: persist.Session) -> None:
    """A request that saw the old one must not clear the new one (hermes-studio #2638)."""
    store.delete("s")
    store.create("s", session.data)
    refused(store, session.version)
    store.update("s", lambda tx: tx.list("messages").clear(), if_version=store.head("s").version)
    assert ids_of(store) == []


def test_copy_that_was_put_back_has_the_version_of_the_copy(store: persist.Store, session: persist.Session) -> None:
    store.compact("s", alone=True)
    copied = store.path.parent / "copy.json"
    shutil.copy(store.path / "s.json", copied)
    later = store.append("s", "messages", {"id": "m2"})
    store.delete("s")
    shutil.copy(copied, store.path / "s.json")
    refused(store, later)
    store.update("s", lambda tx: tx.list("messages").clear(), if_version=session.version)
    assert ids_of(store) == []


def test_version_of_another_programs_file_is_that_of_its_content(store: persist.Store) -> None:
    path = store.path / "s.json"
    path.write_text('{"title": "a"}')
    first = store.load("s").version
    assert store.head("s").version == first
    path.write_text('{"title": "b"}')
    refused(store, first)
    path.write_text('{"title": "a"}')
    store.update("s", lambda tx: tx.fields.update(title="c"), if_version=first)
    assert store.load("s").data == {"title": "c"}


# --- create and delete ------------------------------------------------------------------------------------------------


def test_create_begins_with_an_empty_session(store: persist.Store) -> None:
    with store.transaction("s", create=True) as tx:
        version: str | None = tx.version
        assert version is None
        assert tx.data == {}
        tx.list("messages").append(HELLO)
    there = store.load("s")
    assert (there.revision, there.data) == (1, {"messages": [HELLO]})
    assert tx.version == there.version
    # And it goes on with what is there.
    assert store.append("s", "messages", HELLO, create=True) == there.version


@pytest.mark.parametrize("session_id", ["s", "user:7/chat", "x" * 300])
def test_create_of_every_verb(store: persist.Store, session_id: str) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: store.append(session_id, "messages", HELLO, create=True),
        lambda: store.extend(session_id, "messages", [HELLO], create=True),
        lambda: store.update(session_id, lambda tx: tx.list("messages").append(HELLO), create=True),
        lambda: store.start_stream(session_id, HELLO, create=True).finish(),
    ]
    for verb in verbs:
        verb()
        assert ids_of(store, session_id) == ["m1"]
        assert store.ids() == [session_id]
        store.delete(session_id)


def test_create_that_fails_makes_nothing(store: persist.Store) -> None:
    with pytest.raises(persist.NotJSON), store.transaction("s", create=True) as tx:
        tx.fields["a"] = {1, 2}
    with pytest.raises(persist.NotJSON):
        store.append("s", "messages", {1}, create=True)
    with pytest.raises(persist.SessionNotFound):
        store.update("s", lambda tx: None, create=True, if_version="some")
    assert store.ids() == []
    assert sorted(path.name for path in store.path.iterdir() if path.is_file()) == []


def test_delete_takes_effect_at_the_end_of_the_block(store: persist.Store, session: persist.Session) -> None:
    with store.transaction("s") as tx:
        tx.fields["title"] = "dropped"
        tx.delete()
        assert store.exists("s")
        with pytest.raises(persist.WrongType, match="delete"):
            tx.list("messages")
    assert not store.exists("s")
    assert [path.name for path in store.path.iterdir() if path.is_file()] == []


def test_delete_in_a_block_spares_a_live_stream(store: persist.Store, session: persist.Session) -> None:
    with store.start_stream("s", HELLO) as stream:
        with pytest.raises(persist.SessionBusy), store.transaction("s") as tx:
            tx.delete()
        with pytest.raises(persist.SessionBusy), stream.transaction() as tx:
            tx.delete()
        stream.finish()
    store.update("s", lambda tx: tx.delete())
    assert store.ids() == []


# --- extend -----------------------------------------------------------------------------------------------------------


def test_extend_is_one_commit_and_may_be_repeated(store: persist.Store, session: persist.Session) -> None:
    batch = [{"id": "m2", "n": 1}, {"id": "m3"}]
    version = store.extend("s", "messages", batch)
    assert (store.load("s").revision, ids_of(store)) == (session.revision + 1, ["m1", "m2", "m3"])
    assert store.extend("s", "messages", batch) == version
    store.extend("s", "messages", [batch[1], {"id": "m4"}, {"id": "m4"}])
    assert ids_of(store) == ["m1", "m2", "m3", "m4"]
    assert store.extend("s", "messages", []) == store.load("s").version


def test_repeated_extend_reads_no_more_than_the_first(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry of a large batch must not hold the lock for seconds. Fails where each item of it is compared with all."""
    batch = [{"id": f"m{number}", "content": "x"} for number in range(400)]
    version = store.extend("s", "messages", batch, create=True)
    count, decode = [], json_codec.decode

    def counted(encoded: Any) -> Any:
        count.append(1)
        return decode(encoded)

    monkeypatch.setattr(json_codec, "decode", counted)
    assert store.extend("s", "messages", batch) == version
    assert len(count) < 3 * len(batch)


@pytest.mark.parametrize("item", [{"id": "m1"}, {"id": "m2", "n": 2}])
def test_taken_id_is_an_error_and_adds_nothing(store: persist.Store, session: persist.Session, item: Any) -> None:
    with pytest.raises(persist.IdTaken):
        store.extend("s", "messages", [{"id": "m2", "n": 1}, item])
    assert ids_of(store) == ["m1"]


def test_any_key_tells_items_apart(store: persist.Store, session: persist.Session) -> None:
    """Each key for itself, whatever was asked for before."""
    store.extend("s", "messages", [{"uuid": "a", "id": ""}, {"uuid": "b", "id": ""}], key="uuid")
    store.extend("s", "messages", [{"uuid": "b", "id": ""}, {"uuid": "c", "id": ""}], key="uuid")
    assert [message.get("uuid") for message in store.load("s").data["messages"]] == [None, "a", "b", "c"]
    with pytest.raises(persist.IdTaken):
        store.append("s", "messages", {"uuid": "a", "id": "other"}, key="uuid")
    with store.transaction("s") as tx:
        assert tx.list("messages").find("b", key="uuid") == {"uuid": "b", "id": ""}
        assert tx.list("messages").find("none", key="uuid") is None
        assert tx.list("messages").find("m1") == HELLO
    store.append("s", "messages", HELLO)
    assert len(ids_of(store)) == 4


def test_items_without_the_key_are_added_each_time(store: persist.Store, session: persist.Session) -> None:
    """And all of them where no key counts: the ids of some programs are place-holders."""
    for _ in range(2):
        store.extend("s", "messages", [{"n": 1}, {"id": None}, "text", ["list"], True], key="id")
    assert len(ids_of_anything(store)) == 11
    for _ in range(2):
        store.append("s", "messages", HELLO, key=None)
    assert len(ids_of_anything(store)) == 13


def ids_of_anything(store: persist.Store) -> list[Any]:
    messages: list[Any] = store.load("s").data["messages"]
    return messages


@pytest.mark.parametrize("items", ["text", b"bytes", {"id": "m2"}, 7, None])
def test_items_are_several(store: persist.Store, session: persist.Session, items: Any) -> None:
    with pytest.raises(persist.WrongType, match="several items"):
        store.extend("s", "messages", items)
    assert store.load("s").version == session.version


@pytest.mark.parametrize("key", ["", 'quote"', "back\\slash", "line\n", 1, b"id"])
def test_key_is_the_name_of_a_key(store: persist.Store, session: persist.Session, key: Any) -> None:
    with pytest.raises(persist.WrongType, match="key"):
        store.append("s", "messages", HELLO, key=key)


@pytest.mark.parametrize("field", ["messages", "tool_calls"])
def test_list_is_no_message(store: persist.Store, session: persist.Session, field: str) -> None:
    """Whoever appends several at once means `extend`. In another list, a list may well be an item."""
    with pytest.raises(persist.WrongType, match="extend"):
        store.append("s", field, [HELLO])
    assert store.load("s").version == session.version
    store.append("s", "pairs", [1, 2])
    assert store.load("s").data["pairs"] == [[1, 2]]


# --- time-outs --------------------------------------------------------------------------------------------------------


@contextmanager
def locked_elsewhere(store: persist.Store, session_id: str) -> Iterator[None]:
    """Another thread holds the session's lock for the block."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction(session_id):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


VERBS: dict[str, Callable[[persist.Store, persist.Session, persist.Stream], object]] = {
    "append": lambda store, _, __: store.append("s", "messages", 1, timeout_s=0),
    "extend": lambda store, _, __: store.extend("s", "messages", [1], timeout_s=0),
    "update": lambda store, _, __: store.update("s", lambda tx: None, timeout_s=0),
    "transaction": lambda store, _, __: store.transaction("s", timeout_s=0).__enter__(),
    "delete": lambda store, _, __: store.delete("s", timeout_s=0),
    "create": lambda store, _, __: store.create("s", timeout_s=0),
    "duplicate": lambda store, _, __: store.duplicate("other", "s", timeout_s=0),
    "start": lambda store, _, __: store.start_stream("s", timeout_s=0),
    "cancel": lambda store, _, __: store.cancel("s", "x", timeout_s=0),
    "stream": lambda store, _, __: store.stream("s", timeout_s=0),
    "compact": lambda store, _, __: store.compact("s", timeout_s=0),
    "accept": lambda store, _, __: store.accept("s", timeout_s=0),
    "save": lambda _, session, __: session.save(timeout_s=0),
    "clear": lambda _, session, __: session.clear_stale_stream(timeout_s=0),
    "checkpoint": lambda _, __, stream: stream.checkpoint(HELLO, timeout_s=0),
    "stream.append": lambda _, __, stream: stream.append(HELLO, timeout_s=0),
    "stream.transaction": lambda _, __, stream: stream.transaction(timeout_s=0).__enter__(),
    "stream.update": lambda _, __, stream: stream.update(lambda tx: None, timeout_s=0),
    "emit": lambda _, __, stream: stream.emit(1, timeout_s=0),
    "finish": lambda _, __, stream: stream.finish(timeout_s=0),
    "fail": lambda _, __, stream: stream.fail(timeout_s=0),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_waits_takes_a_time(store: persist.Store, session: persist.Session, verb: str) -> None:
    """0 is now or never. Fails by its length where the store's 20 seconds are waited for."""
    store.create("other", {})
    with store.start_stream("s", HELLO) as stream:
        session.refresh()
        session.data["title"] = "unsaved"
        with locked_elsewhere(store, "s"), pytest.raises(persist.LockTimeout) as caught:
            VERBS[verb](store, session, stream)
        assert caught.value.timeout_s == 0
        stream.finish()


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("inf"), "1", None, True])
def test_time_is_a_number_of_seconds(store: persist.Store, session: persist.Session, timeout_s: Any) -> None:
    if timeout_s is None:
        store.append("s", "messages", {"id": "m2"}, timeout_s=None)
    else:
        with pytest.raises(persist.WrongType, match="timeout_s"):
            store.append("s", "messages", {"id": "m2"}, timeout_s=timeout_s)


# --- streams ----------------------------------------------------------------------------------------------------------

PROMPT = {"id": "p", "role": "user", "content": "Why?"}
ANSWER = {"id": "a", "role": "assistant", "content": "Because."}


def test_once_names_the_stream_that_runs_the_prompt(store: persist.Store, session: persist.Session) -> None:
    with store.start_stream("s", PROMPT, once=True) as stream:
        with pytest.raises(persist.AlreadyStarted) as caught:
            store.start_stream("s", PROMPT, once=True)
        assert (caught.value.stream_id, caught.value.answer) == (stream.id, None)
        with pytest.raises(persist.SessionBusy):
            store.start_stream("s", PROMPT | {"id": "other"}, once=True)
        with pytest.raises(persist.SessionBusy):
            store.start_stream("s", PROMPT)
        stream.finish(ANSWER)


def test_once_hands_out_the_answer(store: persist.Store, session: persist.Session) -> None:
    """A start that was sent twice after a lost response must not answer twice (hermes-webui #7435)."""
    with store.start_stream("s", PROMPT, once=True) as stream:
        stream.append({"id": "t", "role": "tool", "content": "42"})
        stream.finish(ANSWER)
    version = store.append("s", "messages", {"id": "later", "role": "user"})
    with pytest.raises(persist.AlreadyStarted) as caught:
        store.start_stream("s", PROMPT, once=True)
    assert (caught.value.stream_id, caught.value.answer) == (None, ANSWER | {"answers": "p"})
    assert store.load("s").version == version


def answered_once(store: persist.Store, prompt: dict[str, Any]) -> Any:
    """Start a prompt once more, and return the answer that it has already."""
    with pytest.raises(persist.AlreadyStarted) as caught:
        store.start_stream("s", prompt, once=True)
    assert caught.value.stream_id is None
    return caught.value.answer


def test_answer_is_known_wherever_it_stands(store: persist.Store, session: persist.Session) -> None:
    """Fails where it is looked for behind its prompt only: the model would answer the prompt again and again."""
    other = PROMPT | {"id": "p2", "content": "And?"}
    store.start_stream("s", PROMPT).fail()
    store.start_stream("s", other, once=True).finish(ANSWER | {"id": "a2"})
    store.start_stream("s", PROMPT, once=True).finish(ANSWER)
    assert ids_of(store) == ["m1", "p", "p2", "a2", "a"]
    # A turn without a prompt that broke off, a note, and a tool's result in the user's role.
    bare = store.start_stream("s")
    bare.checkpoint({"role": "assistant", "content": "x"})
    bare.fail()
    store.append("s", "messages", {"role": "system", "content": "note"})
    third = PROMPT | {"id": "p3"}
    with store.start_stream("s", third, once=True) as stream:
        stream.append({"role": "assistant", "content": "call"})
        stream.append({"role": "user", "content": "result"})
        stream.checkpoint(ANSWER | {"id": "a3"})
        assert answered_once(store, PROMPT) == ANSWER | {"answers": "p"}
        stream.finish()
    assert answered_once(store, PROMPT)["id"] == "a"
    assert answered_once(store, other)["id"] == "a2"
    assert answered_once(store, third)["id"] == "a3"
    with pytest.raises(persist.IdTaken):
        store.start_stream("s", PROMPT | {"content": "Other?"}, once=True)


def test_answer_of_another_program_is_the_last_before_the_next_prompt(store: persist.Store) -> None:
    rows = [PROMPT, {"role": "assistant", "content": "call"}, {"role": "tool"}, {"role": "assistant", "content": "42"}]
    store.create("s", {"messages": [*rows, {"role": "system"}, {"id": "p2", "role": "user"}, {"role": "system"}]})
    assert answered_once(store, PROMPT) == rows[3]
    store.start_stream("s", {"id": "p2", "role": "user"}, once=True).finish()
    # A turn that has finished without an answer is not run again either.
    assert answered_once(store, {"id": "p2", "role": "user"}) is None


@pytest.mark.parametrize("is_dead", [False, True])
def test_partial_of_another_turn_is_no_answer(store: persist.Store, session: persist.Session, *, is_dead: bool) -> None:
    """A turn without a prompt runs behind the prompt. Fails if what it has said so far is taken for the answer."""
    store.append("s", "messages", PROMPT)
    with store.start_stream("s") as bare:
        bare.checkpoint({"role": "assistant", "content": "So far"})
        if is_dead:
            bare._close()
            store.start_stream("s", PROMPT, once=True).finish(ANSWER)
            assert answered_once(store, PROMPT) == ANSWER | {"answers": "p"}
            return
        with pytest.raises(persist.SessionBusy):
            store.start_stream("s", PROMPT, once=True)
        bare.finish()
    assert answered_once(store, PROMPT)["content"] == "So far"


def test_answer_before_a_partial_of_another_turn_is_the_answer(store: persist.Store, session: persist.Session) -> None:
    """It is given anew, say: until that has finished, the earlier one stands."""
    store.start_stream("s", PROMPT).finish(ANSWER)
    with store.start_stream("s") as bare:
        bare.checkpoint({"role": "assistant", "content": "So far"})
        assert answered_once(store, PROMPT) == ANSWER
        bare.finish()
    assert answered_once(store, PROMPT)["content"] == "So far"


@pytest.mark.parametrize("end", ["fail", "die"])
def test_once_takes_an_interrupted_prompt_up_again(store: persist.Store, session: persist.Session, end: str) -> None:
    stream = store.start_stream("s", PROMPT, once=True)
    stream.append({"id": "call", "role": "assistant"})
    stream.checkpoint(ANSWER | {"content": "Be"})
    stream.fail() if end == "fail" else stream._close()
    with store.start_stream("s", PROMPT, once=True) as again:
        again.finish(ANSWER)
    assert ids_of(store) == ["m1", "p", "call", "a"]
    assert store.load("s").data["messages"][3] == ANSWER | {"answers": "p"}


@pytest.mark.parametrize("prompt", [None, {"role": "user"}, {"id": None, "role": "user"}])
def test_once_needs_an_id(store: persist.Store, session: persist.Session, prompt: Any) -> None:
    with pytest.raises(persist.WrongType, match="with an id"):
        store.start_stream("s", prompt, once=True)
    assert store.load("s").version == session.version


def test_fields_are_set_with_the_start_and_the_end(store: persist.Store, session: persist.Session) -> None:
    with store.start_stream("s", PROMPT, fields={"model": "x"}) as stream:
        assert store.head("s").fields["model"] == "x"
        assert store.load("s").revision == session.revision + 1
        stream.finish(ANSWER, fields={"tokens": 812})
    there = store.load("s")
    assert (there.data["tokens"], there.revision) == (812, session.revision + 2)


@pytest.mark.parametrize("fields", [{"active_stream_id": "x"}, {"messages": []}, {"_persist": 1}, {"a": {1}}, [1], "a"])
def test_fields_that_cannot_be_set_start_and_end_nothing(
    store: persist.Store, session: persist.Session, fields: Any
) -> None:
    expected = (persist.ReservedField, persist.WrongType, persist.NotJSON)
    with pytest.raises(expected):
        store.start_stream("s", PROMPT, fields=fields)
    assert store.load("s").version == session.version
    with store.start_stream("s", PROMPT) as stream:
        version = store.head("s").version
        with pytest.raises(expected):
            stream.finish(fields=fields)
        assert store.head("s").version == version
        stream.finish()


def test_transaction_of_a_stream_puts_messages_before_the_partial(
    store: persist.Store, session: persist.Session
) -> None:
    with store.start_stream("s", PROMPT) as stream:
        stream.checkpoint(ANSWER | {"content": "Be"})
        with stream.transaction() as tx:
            tx.list("messages").append({"id": "call"})
            tx.list("messages").extend([{"id": "t1"}, {"id": "t2"}])
            tx.fields["tokens"] = 5
        assert ids_of(store) == ["m1", "p", "call", "t1", "t2", "a"]
        assert tx.version == store.head("s").version
        assert stream.update(lambda tx: tx.data["messages"].append({"id": "t3"})) is None
        assert ids_of(store) == ["m1", "p", "call", "t1", "t2", "t3", "a"]
        stream.finish(ANSWER)
    assert store.load("s").data["messages"][-1] == ANSWER


def test_transaction_of_a_stream_is_fenced(store: persist.Store, session: persist.Session) -> None:
    """A late edit of a worker that lost its session must not reach its successor's turn."""
    stream = store.start_stream("s", PROMPT)
    store.cancel("s", stream.id, force=True)
    version = store.head("s").version
    with pytest.raises(persist.StreamLost), stream.transaction():
        raise AssertionError("the block was entered")
    with pytest.raises(persist.StreamLost):
        stream.update(lambda tx: tx.fields.update(title="late"))
    assert store.head("s").version == version
    stream._close()


@pytest.mark.parametrize("remove", [lambda messages: messages.pop(), lambda messages: messages.clear()])
def test_partial_answer_of_a_live_stream_stays(
    store: persist.Store, session: persist.Session, remove: Callable[[Any], object]
) -> None:
    with store.start_stream("s", PROMPT) as stream:
        stream.checkpoint(ANSWER)
        with pytest.raises(persist.SessionBusy):
            store.update("s", lambda tx: remove(tx.list("messages")))
        with pytest.raises(persist.SessionBusy):
            stream.update(lambda tx: remove(tx.data["messages"]))
        assert ids_of(store) == ["m1", "p", "a"]
        store.update("s", lambda tx: tx.list("messages").pop(0))
        stream.checkpoint(ANSWER | {"more": 1})
        assert ids_of(store) == ["p", "a"]
        stream._close()
    # Its process is dead by now.
    store.update("s", lambda tx: remove(tx.list("messages")))
    assert "a" not in ids_of(store)


@pytest.mark.parametrize("twin", ["a", "p"])
def test_message_of_a_running_turn_has_no_twin(store: persist.Store, session: persist.Session, twin: str) -> None:
    """The turn's next write would go over the other one. Fails where nobody looks for the id."""
    other = {"id": twin, "uuid": "u", "content": "IMPORTANT"}
    with store.start_stream("s", PROMPT) as stream:
        stream.checkpoint(ANSWER)
        loaded = store.load("s")
        adds: list[Callable[[], object]] = [
            lambda: store.append("s", "messages", other, key="uuid"),
            lambda: store.append("s", "messages", other, key=None),
            lambda: store.update("s", lambda tx: tx.list("messages").append(other)),
            lambda: stream.update(lambda tx: tx.list("messages").insert(0, other)),
            lambda: loaded.data["messages"].append(other) or loaded.save(),
        ]
        for add in adds:
            with pytest.raises(persist.MergeConflict):
                add()
        assert ids_of(store) == ["m1", "p", "a"]
        # It may be edited.
        store.update("s", lambda tx: tx.list("messages").find(twin).update(seen=True))
        stream.finish(ANSWER | {"content": "whole"})
    assert ids_of(store) == ["m1", "p", "a"]
    store.append("s", "messages", other, key=None)


# --- the prompt of another program ------------------------------------------------------------------------------------


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # It is the last message, or stands before others since the last answer.
        ([user("q")], [user("q", interrupted=True)]),
        ([user("a"), answer("b"), user("q"), TOOL], [user("a"), answer("b"), user("q", interrupted=True), TOOL]),
        ([user("q"), user("more")], [user("q", interrupted=True), user("more")]),
        # It is answered: it stands in the turn that the last answer ended.
        ([user("q"), answer("b")], [user("q"), answer("b")]),
        ([user("q"), answer("call"), TOOL, answer("b")], [user("q"), answer("call"), TOOL, answer("b")]),
        ([user("q"), user("and"), answer("b"), TOOL], [user("q"), user("and"), answer("b"), TOOL]),
        # It stands nowhere there: it is its only copy.
        ([], [user("q", id="old.prompt", interrupted=True)]),
        (
            [user("q"), answer("b"), user("c"), answer("d")],
            [user("q"), answer("b"), user("c"), answer("d"), user("q", id="old.prompt", interrupted=True)],
        ),
    ],
)
def test_pending_prompt_is_recovered_once(
    store: persist.Store, messages: list[Any], expected: list[Any], runs: int
) -> None:
    """Fails where it is looked for in the last message only (hermes-webui #6366, #7682)."""
    pending = {"active_stream_id": "old", "pending_user_message": "q"}
    path = store.path / "s.json"
    path.write_text(json.dumps({"messages": messages} | pending))
    for _ in range(runs):
        assert len(store.clear_stale_streams(every_session=True)) == 1
        # The old server names the same prompt again.
        left = store.load("s").data
        assert left["messages"] == expected
        assert left["active_stream_id"] is None
        store.delete("s")
        path.write_text(json.dumps({"messages": left["messages"]} | pending))


@pytest.mark.parametrize("active", [{}, {"active_stream_id": None}, {"active_stream_id": ""}])
def test_pending_prompt_without_a_stream_is_kept_by_the_next_turn(store: persist.Store, active: Any) -> None:
    """An old server was stopped before it had a stream. Fails where the start resets the fields without a look."""
    path = store.path / "s.json"
    path.write_text(json.dumps({"messages": [], "pending_user_message": "q"} | active))
    with store.start_stream("s", PROMPT) as stream:
        stream.finish(ANSWER)
    assert store.load("s").data["messages"] == [user("q", interrupted=True), PROMPT, ANSWER]


# --- heads and tails --------------------------------------------------------------------------------------------------


def test_head_refuses_what_it_does_not_hold(store: persist.Store) -> None:
    """None would be a lie: the value is there, and only the head does not hold it."""
    store.create("s", {"title": "t", "small": [1, 2], "large": "x" * 5000, "rows": ["y" * 900] * 9})
    store.update("s", lambda tx: tx.fields.update(later="z" * 6000))
    head = store.head("s")
    assert dict(head.fields) == {"title": "t", "small": [1, 2]}
    assert (len(head.fields), "title" in head.fields, "none" in head.fields) == (2, True, False)
    assert head.counts == {"small": 2, "rows": 9}
    for name in ("large", "rows", "later"):
        with pytest.raises(KeyError, match=r"store\.load"):
            head.fields[name]
        with pytest.raises(KeyError, match=r"store\.tail"):
            head.fields.get(name, "default")
    assert head.fields.get("none", "default") == "default"
    with pytest.raises(KeyError):
        head.fields["none"]


def test_heads_are_those_of_a_page_and_hide_nothing_behind_damage(store: persist.Store) -> None:
    for name in ("a/1", "a/2", "a/3", "b/1"):
        store.create(name, {"title": name})
    (store.path / "a%2F2.json").write_text("{")
    assert [head.id for head in store.heads()] == ["a/1", "a/3", "b/1"]
    assert [head.id for head in store.heads(prefix="a/", after="a/1")] == ["a/3"]
    assert [head.fields["title"] for head in store.heads(prefix="a/", limit=1)] == ["a/1"]
    assert store.ids(prefix="a/", after="a/1", limit=1) == ["a/2"]
    assert store.ids(prefix="c") == []
    wrong: list[dict[str, Any]] = [{"prefix": None}, {"prefix": 1}, {"after": 1}, {"limit": -1}, {"limit": True}]
    for options in wrong:
        with pytest.raises(persist.WrongType):
            store.ids(**options)


@pytest.mark.parametrize("field", ["title", "meta", "large"])
def test_tail_is_that_of_a_list(store: persist.Store, field: str) -> None:
    store.create("s", {"title": "t", "meta": {}, "large": "x" * 5000, "small": [1, 2, 3], "messages": [HELLO]})
    with pytest.raises(persist.WrongType, match="a list"):
        store.tail("s", field=field)
    assert store.tail("s", field="small", limit=2) == [2, 3]
    assert store.tail("s", field="none") == []
    assert store.tail("s") == [HELLO]
    assert store.tail("s", limit=0) == []
    with pytest.raises(persist.SessionNotFound):
        store.tail("nobody")
