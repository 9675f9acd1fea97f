"""Half an emoji: two halves side by side are joined when they are written. A lone half is kept and can be shown.

A model's tokens may cut an emoji in two. A caller that joins the tokens has both halves in one text.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from cli.conftest import json_of, runner_of

import persist
import persist.aio
from persist import json_codec
from persist.cli.commands import persist as command

HIGH, LOW = "\ud83d", "\ude00"
#: The caller's text -> the file's text.
TEXTS = {
    HIGH + LOW: "😀",
    f"so {HIGH}{LOW}!": "so 😀!",
    "\ud83c\uddf3\ud83c\uddf1": "🇳🇱",
    HIGH + HIGH + LOW: f"{HIGH}😀",
    HIGH + LOW + LOW: f"😀{LOW}",
    "\udbff\udfff😀": "\U0010ffff😀",
    f"é{HIGH}{LOW}\ud800": "é😀\ud800",
    f"{LOW}{HIGH}{LOW}{HIGH}": f"{LOW}😀{HIGH}",
}
LONE = [HIGH, LOW, f"😀{HIGH}", f"{LOW}{HIGH}", f"{HIGH} {LOW}", f"{HIGH}😀{LOW}"]

each_text = pytest.mark.parametrize(("given", "kept"), TEXTS.items(), ids=map(ascii, TEXTS))


def document(text: str) -> dict[str, Any]:
    return {
        "title": text,
        text: {text: [text, {"deep": text}]},
        "messages": [{"id": text, "role": "user", "content": text}, {"id": "m2", "content": [text]}],
    }


# --- the document -----------------------------------------------------------------------------------------------------


@each_text
@pytest.mark.parametrize("count", [0, 400], ids=["small", "journaled"])
def test_halves_are_joined_in_the_file_and_stay_in_the_object(
    given: str, kept: str, count: int, store: persist.Store
) -> None:
    """HAZARDS F14: the file has the joined character. The next saves see neither a change nor a conflict."""
    more = [{"id": f"n{number}", "content": "x" * 300} for number in range(count)]
    store.create("s", {"messages": more})
    session = store.load("s")
    session.data.update({**document(given), "messages": [*more, *document(given)["messages"]]})
    version = session.save()
    assert store.load("s").data == {**document(kept), "messages": [*more, *document(kept)["messages"]]}
    assert session.data["title"] == given
    assert given in session.data
    assert session.data["messages"][-2]["id"] == given
    for _ in range(2):
        assert session.save() == version
        session.refresh()
    assert (session.data["title"], session.revision) == (given, 2)
    assert store.check() == []


@each_text
def test_others_commits_merge_beside_halves(given: str, kept: str, store: persist.Store) -> None:
    """Commits of others come into the object.
    A text that both sides have, in either form, is no conflict, and keeps its key.
    """
    session = store.create("s", document(given))
    session.data.clear()
    session.data.update(document(given))
    for number in range(3):
        store.append("s", "messages", {"id": f"o{number}", "content": "other"})
        with store.transaction("s") as tx:
            tx.fields["count"] = number
            tx.fields[given][kept].append(number)
        session.data["messages"].append({"id": f"m{number + 3}", "content": given})
        session.data["own"] = given * (number + 1)
        session.save()
        session.refresh()
    there = store.load("s").data
    assert there["own"] == json_codec.joined(given * 3)
    assert [message["id"] for message in there["messages"]] == [kept, "m2", "o0", "m3", "o1", "m4", "o2", "m5"]
    assert there[kept][kept][2:] == [0, 1, 2]
    assert [key for key in session.data if key in (given, kept)] == [given]
    assert json_codec.decode(json_codec.encode(session.data)) == there
    assert session.save() == store.head("s").version


@each_text
def test_the_same_edit_in_halves_and_whole_is_no_conflict(given: str, kept: str, store: persist.Store) -> None:
    """Two workers write one text, and one of them writes it in halves. That is no conflict."""
    store.create("s", {"title": "old", "messages": [{"id": "m1", "role": "user", "content": "old"}]})
    one, other = store.load("s"), store.load("s")
    for session, text in ((one, given), (other, kept)):
        session.data["title"] = session.data["messages"][0]["content"] = text
        session.data[text] = 1
    one.save()
    assert other.save() == one.version
    assert other.revision == 2


def test_another_order_of_keys_beside_halves_is_no_change(store: persist.Store) -> None:
    """Another order of keys is no change. Fails if the caller's value is compared with the file's as it is."""
    session = store.create("s", {"meta": {"a": HIGH + LOW, "b": "é"}, "messages": [{"id": "m", "content": HIGH + LOW}]})
    session.data["meta"] = {"b": "é", "a": HIGH + LOW}
    session.data["messages"][0] = {"content": HIGH + LOW, "id": "m"}
    session.save()
    assert session.revision == 1


@pytest.mark.parametrize(
    "data",
    [
        {HIGH + LOW: 1, "😀": 2},
        {"deep": [{"😀": 1, HIGH + LOW: 2}]},
        {HIGH + LOW + "😀": 1, "😀" + HIGH + LOW: 2},
        {"messages": [{"meta": {f"a{HIGH}{LOW}": 1, "a😀": 1}}]},
    ],
    ids=["at the top", "deep", "both in halves", "in a message"],
)
def test_two_keys_that_become_one_are_refused(data: dict[str, Any], store: persist.Store) -> None:
    """Two keys that would become one are refused, because one of their values would be lost."""
    with pytest.raises(persist.NotJSON, match="two of its keys become the same"):
        store.create("s", data)
    assert store.ids() == []


# --- verbs ------------------------------------------------------------------------------------------------------------


@each_text
def test_an_append_in_halves_is_idempotent_by_its_key(given: str, kept: str, store: persist.Store) -> None:
    """A retry may come in halves or whole, under whatever key: the item is added once."""
    store.create("s", {"messages": []})
    versions = {
        store.append("s", "messages", {"id": text, "content": other})
        for text, other in itertools.product((given, kept), repeat=2)
    }
    items = [{"uuid": text, "content": text} for text in (given, kept)]
    versions |= {store.extend("s", kept, items, key="uuid"), store.extend("s", given, items[:1], key="uuid")}
    assert len(versions) == 2
    assert store.load("s").data == {
        "messages": [{"id": kept, "content": kept}],
        kept: [{"uuid": kept, "content": kept}],
    }
    with pytest.raises(persist.MergeConflict):
        store.append("s", "messages", {"id": given, "content": "other"})


@each_text
def test_a_block_finds_by_either_form(given: str, kept: str, store: persist.Store) -> None:
    """Either form finds a field, a list, or a value that `find` looks for, also among what the block has added."""
    store.create("s", document(given))
    with store.transaction("s") as tx:
        assert tx.fields[given] is tx.fields[kept]
        assert (given in tx.fields, kept in tx.fields) == (True, True)
        tx.list("messages").append({"id": f"new {given}", "content": 1})
        for text in (given, kept):
            assert tx.list("messages").find(text)["content"] == kept
            assert tx.list("messages").find(f"new {text}")["content"] == 1
        tx.list(f"list {given}").append(1)
        tx.list(f"list {kept}").append(2)
        tx.fields[f"field {given}"] = 1
        tx.fields[f"field {kept}"] = 2
        del tx.fields[given]
    there = store.load("s").data
    assert there[f"list {kept}"] == [1, 2] == store.tail("s", field=f"list {given}")
    assert there[f"field {kept}"] == 2 == store.head("s").fields[f"field {given}"]
    assert {given, kept}.isdisjoint(there)
    assert store.head("s").fields.get(f"field {given}") == 2


def test_a_merge_policy_is_found_by_either_form(store: persist.Store) -> None:
    """The name in `Store(merge=…)` may be in halves, too."""
    summing = persist.Store(store.path, merge={HIGH + LOW: "sum"})
    summing.create("s", {"😀": 1})
    one, other = summing.load("s"), summing.load("s")
    one.data["😀"], other.data["😀"] = 3, 5
    one.save()
    other.save()
    assert summing.load("s").data == {"😀": 7}


@each_text
def test_a_turn_in_halves(given: str, kept: str, store: persist.Store) -> None:
    """HAZARDS F14: a turn joins the halves in its prompt, events, partial answer and answer. A second start of the
    prompt, in the other form, starts nothing.
    """
    prompt = {"id": given, "role": "user", "content": given}
    with store.start_stream("s", prompt, create=True, once=True, fields={given: given}) as stream:
        with pytest.raises(persist.AlreadyStarted):
            store.start_stream("s", {**prompt, "content": kept}, once=True)
        for part in given:
            stream.emit(part, {part: part})
        stream.emit(given, {given: given})
        text = ""
        for part in given:
            text += part
            stream.checkpoint({"id": f"a {text}", "role": "assistant", "content": text})
        stream.append({"id": f"t {given}", "role": "tool", "content": given})
        stream.append({"id": f"t {kept}", "role": "tool", "content": kept})
        stream.finish({"id": f"a {given}", "role": "assistant", "content": given}, fields={f"f {given}": given})
    events = [event.data for event in store.events("s", stream.id)]
    assert events[0::2][: len(given)] == list(given)
    assert "".join(events[0::2][: len(given)]) == given
    assert events[-2:] == [kept, {kept: kept}]
    with pytest.raises(persist.AlreadyStarted) as caught:
        store.start_stream("s", {**prompt, "id": kept}, once=True)
    assert caught.value.answer["content"] == kept
    there = store.load("s").data
    assert [message["content"] for message in there["messages"]] == [kept] * 3
    assert (there[kept], there[f"f {kept}"]) == (kept, kept)
    assert store.check() == []


@each_text
def test_an_asynchronous_save_in_halves(given: str, kept: str, store: persist.Store) -> None:
    """An asynchronous save joins halves, too: `persist.aio` encodes in another place than `Session.save` does."""

    async def main() -> None:
        astore = persist.aio.Store(store)
        session = await astore.create("s", document(given))
        session.data["title"] = f"new {given}"
        await asyncio.gather(session.save(), astore.append("s", "messages", {"id": "o"}))
        await session.save()
        await session.refresh()
        assert session.data["title"] == f"new {given}"
        assert session.revision == 3

    asyncio.run(main())
    assert store.load("s").data["title"] == f"new {kept}"


@pytest.mark.parametrize("text", LONE, ids=map(ascii, LONE))
@pytest.mark.parametrize("count", [0, 400], ids=["small", "journaled"])
def test_a_lone_half_is_kept(text: str, count: int, store: persist.Store) -> None:
    """A lone half is neither replaced nor lost, because it may be joined to its other half later."""
    more = [{"id": f"n{number}", "content": "x" * 300} for number in range(count)]
    session = store.create("s", {"messages": [*more, *document(text)["messages"]], "title": text, text: text})
    session.save()
    store.append("s", "messages", {"id": text, "role": "user", "content": text})
    assert store.load("s").data == session.data
    assert session.revision == 1


# --- the command line -------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "ls": lambda path: ("ls", path),
    "ls --json": lambda path: ("ls", path, "--json"),
    "show": lambda path: ("show", path, "s"),
    "show --json": lambda path: ("show", path, "s", "--json"),
    "streams": lambda path: ("streams", path),
    "streams --json": lambda path: ("streams", path, "--json"),
    "check": lambda path: ("check", path),
    "check --json": lambda path: ("check", path, "--json"),
    "compact": lambda path: ("compact", path, "s"),
    "accept": lambda path: ("accept", path, "s"),
    "clear-stale": lambda path: ("clear-stale", path, "--every-session"),
    "clear-stale --json": lambda path: ("clear-stale", path, "--every-session", "--json"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("text", LONE, ids=map(ascii, LONE))
def test_every_command_can_show_a_lone_half(
    arguments: Callable[[str], tuple[str, ...]], text: str, store: persist.Store
) -> None:
    """HAZARDS F14: every command shows a text that the store keeps, in whatever encoding.
    So it does for another program's stream.
    """
    document = json_codec.encode(
        {
            "title": text,
            "active_stream_id": text,
            "pending_user_message": text,
            text: text,
            "messages": [{"id": text, "role": text, "content": text, text: {text: text}}],
        }
    )
    (store.path / "s.json").write_bytes(document)
    result = runner_of(command)(*arguments(str(store.path)))
    assert result.exit_code in (0, 1), result.output
    result.stdout.encode("utf-8")
    if arguments("")[-1] == "--json":
        found = json_of(result)
        if arguments("")[0] == "show":
            assert found["data"]["messages"][0]["content"] == text
    elif arguments("")[0] in ("ls", "show"):
        assert text.encode(errors="backslashreplace").decode() in result.stdout
