"""A start that is sent twice runs once. Fields are set with the start and the end of a turn.

The tests fail if an answer is taken for the answer of another prompt, or if an interrupted prompt counts as answered.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness.chats import ANSWER, PROMPT, ids_of

import persist


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
    """Start a prompt once more, and return the answer that it already has."""
    with pytest.raises(persist.AlreadyStarted) as caught:
        store.start_stream("s", prompt, once=True)
    assert caught.value.stream_id is None
    return caught.value.answer


def test_answer_is_known_wherever_it_stands(store: persist.Store, session: persist.Session) -> None:
    """Fails if only messages behind a prompt are searched for its answer: the model would answer it again and again."""
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
    with pytest.raises(persist.MergeConflict):
        store.start_stream("s", PROMPT | {"content": "Other?"}, once=True)


def test_answer_of_another_program_is_the_last_before_the_next_prompt(store: persist.Store) -> None:
    rows = [PROMPT, {"role": "assistant", "content": "call"}, {"role": "tool"}, {"role": "assistant", "content": "42"}]
    store.create("s", {"messages": [*rows, {"role": "system"}, {"id": "p2", "role": "user"}, {"role": "system"}]})
    assert answered_once(store, PROMPT) == rows[3]
    store.start_stream("s", {"id": "p2", "role": "user"}, once=True).finish()
    # A turn that finished without an answer is not run again either.
    assert answered_once(store, {"id": "p2", "role": "user"}) is None


@pytest.mark.parametrize("is_dead", [False, True])
def test_partial_of_another_turn_is_no_answer(store: persist.Store, session: persist.Session, *, is_dead: bool) -> None:
    """A turn without a prompt runs behind the prompt. Fails if its partial is taken for the prompt's answer."""
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
    """The earlier answer counts until the turn that may give it anew has finished."""
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
    with pytest.raises(persist.InvalidArgument, match="with an id"):
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
    expected = (persist.InvalidArgument, persist.NotJSON)
    with pytest.raises(expected):
        store.start_stream("s", PROMPT, fields=fields)
    assert store.load("s").version == session.version
    with store.start_stream("s", PROMPT) as stream:
        version = store.head("s").version
        with pytest.raises(expected):
            stream.finish(fields=fields)
        assert store.head("s").version == version
        stream.finish()


def test_a_start_for_another_version_starts_nothing(store: persist.Store, session: persist.Session) -> None:
    """A caller that has looked for its prompt starts only what it has seen. Fails without the comparison."""
    seen = store.view("s").version
    store.append("s", "messages", {"id": "later", "role": "user", "content": "?"})
    with pytest.raises(persist.VersionMismatch):
        store.start_stream("s", PROMPT, if_version=seen)
    assert ids_of(store) == ["m1", "later"]
    assert store.stream("s") is None
    with store.start_stream("s", PROMPT, if_version=store.view("s").version) as stream:
        # A session that is in use says so first: its version changes all the time.
        with pytest.raises(persist.SessionBusy):
            store.start_stream("s", PROMPT | {"id": "other"}, if_version=seen)
        with pytest.raises(persist.InvalidArgument):
            store.start_stream("s", PROMPT, if_version=7)  # type: ignore[arg-type]
        stream.finish(ANSWER)
