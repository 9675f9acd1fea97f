"""Turns over HTTP: started once, followed, stopped, failed and retried. The words so far are kept in each case."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("starlette", reason="the extra `server` is not installed")
pytest.importorskip("sse_starlette", reason="the extra `server` is not installed")

import httpx
from actors import eventually
from harness.chat_servers import Sent, events_in

import persist
from persist.asgi import Echo, Error, Reasoning, Text, ToolInput, ToolOutput


def start(client: Any, content: str, message_id: str = "m1", session_id: str = "s", status: int = 201) -> str:
    body = {"message": {"id": message_id, "content": content}}
    response = client.post(f"/api/sessions/{session_id}/turns", json=body)
    assert response.status_code == status, response.text
    return str(response.json()["stream_id"])


def followed(client: Any, stream_id: str, after: int = 0, session_id: str = "s") -> list[Sent]:
    """Follow a stream to its end."""
    path = f"/api/sessions/{session_id}/streams/{stream_id}/events"
    with client.stream("GET", path, headers={"Last-Event-ID": str(after)} if after else {}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events_in(response.iter_lines()))


def how(events: list[Sent]) -> str:
    assert [each.event for each in events[:-1]] == ["part"] * (len(events) - 1)
    assert events[-1].event == "end"
    return str(events[-1].data["how"])


def messages_of(client: Any, session_id: str = "s") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/api/sessions/{session_id}").json()["messages"]
    return found


def test_a_turn_is_followed_to_its_end_and_stored(client: Any) -> None:
    """The parts come as events with ids, and the answer stands behind its prompt. The prompt gives the title."""
    stream_id = start(client, "hello there", "m1")
    events = followed(client, stream_id)
    assert [(each.id, each.data["text"]) for each in events[:-1]] == [("1", "hello "), ("2", "there ")]
    assert events[-1] == Sent("end", {"how": "finished", "message_id": f"{stream_id}.answer"}, "2")
    read = client.get("/api/sessions/s").json()
    assert (read["title"], read["stream"]) == ("hello there", None)
    answer = {"id": f"{stream_id}.answer", "role": "assistant", "content": "hello there "}
    prompt = {"id": "m1", "role": "user", "content": "hello there"}
    assert read["messages"] == [prompt, answer | {"html": "<p>hello there</p>\n"}]
    # A client that lost its connection just before the end still learns it. A page that was loaded anew has no header.
    assert followed(client, stream_id, 2) == events[-1:]
    told = client.get(f"/api/sessions/s/streams/{stream_id}/events?after=1").text
    assert list(events_in(told.splitlines())) == events[1:]


@pytest.mark.parametrize("text", ["\ud83d", "😀\ud83d so", "\ude00\ud83d"], ids=ascii)
def test_half_an_emoji_is_told_and_stored(client: Any, text: str) -> None:
    """HAZARDS F14: a model that cuts an emoji in two causes no failure. Fails without JSON in ASCII."""
    body = json.dumps({"message": {"id": "m", "content": text}})
    stream_id = client.post("/api/sessions/s/turns", content=body).json()["stream_id"]
    events = followed(client, stream_id)
    assert how(events) == "finished"
    said = "".join(each.data["text"] for each in events[:-1])
    assert said == messages_of(client)[-1]["content"] == " ".join(text.split()) + " "
    chat = json.dumps({"id": "c", "message": {"id": "m", "parts": [{"type": "text", "text": text}]}})
    deltas = [each.data for each in events_in(client.post("/api/chat", content=chat).text.splitlines())]
    assert said == "".join(each["delta"] for each in deltas[:-1] if "delta" in each)


def test_all_kinds_of_parts_are_told_and_stored(client: Any) -> None:
    """Thoughts and tool calls stand in `parts`, in their order, and `content` has the text alone."""
    stream_id = start(client, "?hm ?well a @look b")
    kinds = [each.data["type"] for each in followed(client, stream_id)[:-1]]
    assert kinds == ["reasoning", "reasoning", "text", "tool-input", "tool-output", "text"]
    answer = messages_of(client)[-1]
    assert answer["content"] == "a \n\nb "
    call = {"toolCallId": "call-3", "state": "output-available", "input": {"place": 3}, "output": {"found": "look"}}
    assert answer["parts"] == [
        {"type": "reasoning", "text": "hmwell"},
        {"type": "text", "text": "a ", "html": "<p>a</p>\n"},
        {"type": "tool-look", **call},
        {"type": "text", "text": "b ", "html": "<p>b</p>\n"},
    ]


def test_the_responder_gets_the_conversation_and_the_fields_of_the_request(client_of: Any) -> None:
    """It sees the messages so far, the prompt last, without the keys of the store."""
    seen = []

    async def look(conversation: Any) -> Any:
        seen.append(conversation)
        yield Text("seen")

    client = client_of(look)
    followed(client, start(client, "one", "m1"))
    body = {"message": {"id": "m2", "content": "two"}, "model": "large"}
    followed(client, client.post("/api/sessions/s/turns", json=body).json()["stream_id"])
    last = seen[-1]
    assert [(m["role"], m["content"]) for m in last.messages] == [
        ("user", "one"),
        ("assistant", "seen"),
        ("user", "two"),
    ]
    assert (last.prompt, last.session_id, last.extra) == ("two", "s", {"model": "large"})
    assert {key for message in last.messages for key in message} == {"id", "role", "content"}


def test_a_repeated_message_starts_no_second_turn(client: Any) -> None:
    """The same id gives the same stream: while it runs, when it has ended, and behind a later turn."""
    stream_id = start(client, "a ~")
    assert start(client, "a ~", status=200) == stream_id
    assert client.post(f"/api/sessions/s/streams/{stream_id}/stop").json() == {"stopped": True}
    assert how(followed(client, stream_id)) == "stopped"
    body = {"message": {"id": "m1", "content": "a ~"}}
    again = client.post("/api/sessions/s/turns", json=body)
    assert (again.status_code, again.json()) == (200, {"stream_id": stream_id, "message_id": "m1", "repeated": True})
    second = start(client, "b", "m2")
    followed(client, second)
    followed(client, start(client, "c", "m3"))
    assert start(client, "b", "m2", status=200) == second
    other = client.post("/api/sessions/s/turns", json={"message": {"id": "m2", "content": "other"}})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    assert [m["id"] for m in messages_of(client) if m["role"] == "user"] == ["m1", "m2", "m3"]


@pytest.mark.parametrize("prompt", ["a", "a !"])
def test_twenty_at_once_start_one_turn(client_of: Any, prompt: str) -> None:
    """A message that is sent twenty times at once runs once, also if its turn fails meanwhile.

    Fails without `if_version` in `Turns.start`, because a turn that has failed would be started again.
    """
    calls = []

    async def count(conversation: Any) -> Any:
        calls.append(conversation.stream_id)
        yield Text("a")
        if "!" in conversation.prompt:
            raise RuntimeError

    client = client_of(count)
    for round_ in range(5):
        calls.clear()
        barrier = threading.Barrier(20)

        def send(_: int, barrier: threading.Barrier = barrier, round_: int = round_) -> tuple[int, Any]:
            barrier.wait()
            body = {"message": {"id": f"m{round_}", "content": prompt}}
            response = client.post("/api/sessions/s/turns", json=body)
            return response.status_code, response.json().get("stream_id")

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(send, range(20)))
        (stream_id,) = {stream_id for _, stream_id in answers}
        assert sorted(status for status, _ in answers) == [200] * 19 + [201]
        followed(client, stream_id)
        assert calls == [stream_id]
        assert len(messages_of(client)) == 2 * (round_ + 1)


def test_a_second_turn_is_refused_and_names_the_owner(client: Any) -> None:
    """Another message while a turn runs is refused, and leaves nothing behind."""
    stream_id = start(client, "a ~")
    response = client.post("/api/sessions/s/turns", json={"message": {"id": "m2", "content": "me too"}})
    assert response.status_code == 409
    body = response.json()
    assert (body["error"]["code"], body["owner"]["stream_id"]) == ("busy", stream_id)
    assert {"pid", "host", "since"} <= body["owner"].keys()
    assert client.post("/api/sessions/s/retry").json()["error"]["code"] == "busy"
    assert client.delete("/api/sessions/s").json()["error"]["code"] == "busy"
    assert [m["id"] for m in messages_of(client)][:1] == ["m1"]
    assert len([m for m in messages_of(client) if m["role"] == "user"]) == 1


def test_a_stopped_turn_keeps_what_was_said(client: Any) -> None:
    """A stop ends a silent responder, too. A second stop, and one of another stream, stop nothing."""
    stream_id = start(client, "a b ~ c")
    assert client.post("/api/sessions/s/streams/another/stop").json() == {"stopped": False}
    path = f"/api/sessions/s/streams/{stream_id}"
    with client.stream("GET", f"{path}/events") as response:
        events = events_in(response.iter_lines())
        assert [next(events).data["text"] for _ in "ab"] == ["a ", "b "]
        assert client.post(f"{path}/stop").json() == {"stopped": True}
        assert how(list(events)) == "stopped"
    assert client.post(f"{path}/stop").json() == {"stopped": False}
    prompt, answer = messages_of(client)
    assert (answer["content"], answer["partial"], "html" in answer, "partial" in prompt) == ("a b ", True, False, False)


def test_a_stopped_turn_keeps_exactly_what_was_told(client_of: Any) -> None:
    """A turn that is stopped in the middle of its words keeps no word that was told to nobody, and lacks none.

    Fails if the responder is cancelled without `_telling`, in the middle of a part.
    """

    async def talk(_conversation: Any) -> Any:
        for number in range(100_000):
            yield Text(f"{number} ")

    client = client_of(talk)
    for round_ in range(10):
        stream_id = start(client, "talk", f"m{round_}")
        assert client.post(f"/api/sessions/s/streams/{stream_id}/stop").json() == {"stopped": True}
        events = followed(client, stream_id)
        assert how(events) == "stopped"
        assert messages_of(client)[-1]["content"] == "".join(each.data["text"] for each in events[:-1])


def test_a_failure_of_the_responder_is_told_and_kept(client: Any) -> None:
    """An exception tells no detail, an `Error` tells its text, and something that is no part is a failure."""
    told = {
        "a !": "The model failed to answer.",
        "a !broken": "broken",
        "a #": "The model failed to answer.",
        "~0": "The model failed to answer.",
    }
    for place, (prompt, text) in enumerate(told.items()):
        events = followed(client, start(client, prompt, f"m{place}"))
        assert how(events) == "failed"
        assert events[-2].data == {"type": "error", "text": text}
        answer = messages_of(client)[-1]
        assert (answer["error"], answer["partial"]) == (text, True)
        assert answer["content"] == ("a " if "a" in prompt.split() else "")


def test_a_retry_takes_the_place_of_the_answer(client: Any) -> None:
    """A retry removes the failed answer, or a whole one, and answers the same prompt again."""
    followed(client, start(client, "earlier", "m0"))
    failed = start(client, "a !broken")
    followed(client, failed)
    for _ in range(2):
        response = client.post("/api/sessions/s/retry")
        assert response.status_code == 201
        stream_id = response.json()["stream_id"]
        assert how(followed(client, stream_id)) == "failed"
        messages = messages_of(client)
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2
        assert messages[-1]["id"] == f"{stream_id}.answer" != f"{failed}.answer"
        # The message's own request, sent again, is no third turn.
        assert start(client, "a !broken", status=200) == stream_id
    # Another tab may have sent a message meanwhile. Its answer is not the one that this retry is for.
    other = client.post("/api/sessions/s/retry", json={"message_id": "m0"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "changed")
    assert messages_of(client) == messages
    named = client.post("/api/sessions/s/retry", json={"message_id": "m1"})
    assert (named.status_code, named.json()["message_id"]) == (201, "m1")
    client.post("/api/sessions", json={"id": "empty"})
    assert client.post("/api/sessions/empty/retry").json()["error"]["code"] == "nothing_to_retry"


def test_a_running_turn_is_read_with_its_partial_answer(client_of: Any, tmp_path: Path) -> None:
    """A page that is loaded in the middle shows the partial answer, and goes on behind it without gap or repeat."""
    client = client_of(checkpoint_s=0.0)
    gate = tmp_path / "gate"
    stream_id = start(client, f"a b <{gate} c d")
    eventually(lambda: messages_of(client)[-1]["content"] == "a b ")
    read = client.get("/api/sessions/s").json()
    assert read["messages"][-1]["partial"] is True
    assert read["stream"] == {"stream_id": stream_id, "live": True, "after": 2}
    (row,) = client.get("/api/sessions").json()["sessions"]
    assert (row["live"], row["stream_id"]) == (True, stream_id)
    gate.touch()
    events = followed(client, stream_id, read["stream"]["after"])
    text = read["messages"][-1]["content"] + "".join(each.data["text"] for each in events[:-1])
    assert text == messages_of(client)[-1]["content"] == "a b c d "


def test_a_stream_without_events_has_expired(client: Any) -> None:
    """A cursor whose events are gone, of another stream, or behind the end says so. The session is still there."""
    stream_id = start(client, "a")
    followed(client, stream_id)
    assert [each.event for each in followed(client, "never")] == ["expired"]
    assert followed(client, stream_id, 7) == [Sent("expired", {"stream_id": stream_id})]


def test_events_expire(client_of: Any, directory: Path) -> None:
    """Events that the store no longer keeps are expired, and the stored message stands for them."""
    client = client_of(store=persist.Store(directory, keep_events_s=0))
    stream_id = start(client, "a")
    eventually(lambda: client.get("/api/sessions/s").json()["stream"] is None)
    followed(client, start(client, "b", "m2"))  # a later turn removes them
    assert [each.event for each in followed(client, stream_id)] == ["expired"]
    assert messages_of(client)[1]["content"] == "a "


def test_a_forced_delete_stops_the_turn(client: Any) -> None:
    """The followers learn that it was stopped, or that it is gone, and the session is gone."""
    stream_id = start(client, "a ~")
    with client.stream("GET", f"/api/sessions/s/streams/{stream_id}/events") as response:
        events = events_in(response.iter_lines())
        next(events)
        assert client.delete("/api/sessions/s?force=1").status_code == 204
        assert how(list(events)) in ("stopped", "lost")
    assert client.get("/api/sessions/s").status_code == 404


def test_a_quiet_stream_gives_signs_of_life(client_of: Any, tmp_path: Path) -> None:
    """Comments come while nothing is said, and are no events."""
    client = client_of(heartbeat_s=0.05)
    stream_id = start(client, f"a <{tmp_path / 'gate'} b")
    with client.stream("GET", f"/api/sessions/s/streams/{stream_id}/events") as response:
        beats = 0
        for line in response.iter_lines():
            beats += line.startswith(": alive")
            if beats == 3:
                (tmp_path / "gate").touch()
                break
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert how(followed(client, stream_id)) == "finished"


def open_things() -> tuple[int, int]:
    """Return how many tasks run in this process, and how many descriptors it has."""
    tasks = [each for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done()]
    return len(tasks), len(list(Path("/proc/self/fd").iterdir()))


def settled() -> tuple[int, int]:
    """Return what is open once it is the same twice, because a server closes things a little later."""
    seen = [(-1, -1), open_things()]

    def is_same() -> bool:
        time.sleep(0.3)
        seen.append(open_things())
        return seen[-1] == seen[-2]

    eventually(is_same)
    return seen[-1]


def test_followers_that_leave_leave_nothing_behind(client: Any) -> None:
    """No task and no descriptor stays of followers that went away. Fails if a response does not close its following."""
    stream_id = start(client, "a ~")
    path = f"/api/sessions/s/streams/{stream_id}/events"

    def follow_and_leave() -> None:
        with httpx.Client(base_url=client.base_url) as leaving, leaving.stream("GET", path) as response:
            next(events_in(response.iter_lines()))

    follow_and_leave()
    before = settled()
    for _ in range(20):
        follow_and_leave()
    eventually(lambda: all(now <= then for now, then in zip(settled(), before, strict=True)))


def test_a_follower_that_reads_nothing_is_let_go(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing is cut off, and the others go on. Fails without a time-out of sending."""
    monkeypatch.setattr("persist.asgi.events.SEND_TIMEOUT_S", 0.5)

    async def talk(_conversation: Any) -> Any:
        for _ in range(400):
            yield Text("x" * 50_000)

    client = client_of(talk)
    followed(client, start(client, "talk", "m0"))
    before = settled()
    stream_id = start(client, "talk")
    with socket.create_connection((client.base_url.host, client.base_url.port)) as lazy:
        lazy.sendall(f"GET /api/sessions/s/streams/{stream_id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        events = followed(client, stream_id)
        assert (how(events), len(events)) == ("finished", 401)
        assert settled()[0] <= before[0]


def test_echo_says_the_prompt_again(client_of: Any) -> None:
    """The built-in echo streams the words, and together they are the prompt, blanks and all."""
    client = client_of(Echo(delay_s=0.0))
    prompt = "one  two\nthree "
    events = followed(client, start(client, prompt))
    assert len(events) > 3
    assert messages_of(client)[-1]["content"] == prompt


async def _cancelled() -> AsyncIterator[Any]:
    yield Text("half ")
    pause = asyncio.ensure_future(asyncio.sleep(3600))
    asyncio.get_running_loop().call_soon(pause.cancel)
    await pause


async def _yielding(*parts: Any) -> AsyncIterator[Any]:
    for part in parts:
        yield part


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "parts",
    [
        _cancelled,
        lambda: _yielding(Text("half "), ToolInput("c", "clock", {"now": datetime.now(UTC)})),
        lambda: _yielding(Text("half "), ToolInput("c", "clock", _nested(196))),
        lambda: _yielding(Text("half "), Text(cast(Any, None))),
        lambda: _yielding(Text("half "), ToolOutput("c", 1)),
        lambda: _yielding(Text("half "), Error(cast(Any, 7))),
    ],
    ids=["cancelled", "not-json", "deep", "no-text", "no-input", "no-error"],
)
def test_a_responder_that_misbehaves_tears_no_answer(client_of: Any, parts: Any) -> None:
    """The turn has failed, and exactly what was told before is kept.

    Fails if a cancellation of the responder's own counts as its end, or if a part is added before it is checked.
    """
    client = client_of(lambda _: parts())
    events = followed(client, start(client, "a"))
    assert [each.data["text"] for each in events[:-1]] == ["half ", "The model failed to answer."]
    assert how(events) == "failed"
    answer = messages_of(client)[-1]
    assert (answer["content"], answer["error"]) == ("half ", "The model failed to answer.")
    assert (answer["partial"], "parts" in answer) == (True, False)


def test_the_deepest_part_is_stored(client_of: Any) -> None:
    """A part that is told can be stored, too, down to the last level. Fails if a part is checked by itself."""
    client = client_of(lambda _: _yielding(ToolInput("c", "clock", _nested(195))))
    assert how(followed(client, start(client, "a"))) == "finished"
    assert messages_of(client)[-1]["parts"][0]["input"] == _nested(195)


def test_a_part_that_changes_later_is_kept_as_it_was_told(client_of: Any) -> None:
    """A responder may use its values again. Fails if the answer keeps the responder's own value."""

    async def change(_conversation: Any) -> Any:
        value: dict[str, Any] = {"zone": "UTC"}
        yield ToolInput("c", "clock", value)
        value["zone"] = {1}
        yield Text("noon")

    client = client_of(change)
    events = followed(client, start(client, "a"))
    assert (how(events), events[0].data["input"]) == ("finished", {"zone": "UTC"})
    assert messages_of(client)[-1]["parts"][0]["input"] == {"zone": "UTC"}


def test_an_empty_piece_says_nothing(client_of: Any) -> None:
    """It is not told, and makes no text of its own."""
    client = client_of(lambda _: _yielding(Reasoning(""), Text("a"), Reasoning(""), Text("b")))
    events = followed(client, start(client, "a"))
    assert [each.data["text"] for each in events[:-1]] == ["a", "b"]
    assert (messages_of(client)[-1]["content"], "parts" in messages_of(client)[-1]) == ("ab", False)


def test_texts_stay_apart_and_outputs_go_to_their_calls(client_of: Any) -> None:
    """Texts around a tool are two paragraphs. A call's id may come again.

    Fails if an output goes to each call of its id.
    """
    steps = [part for n in (1, 2) for part in (ToolInput("call_0", "find", n), ToolOutput("call_0", -n))]
    client = client_of(lambda _: _yielding(Text("Look."), *steps, Text("# Found")))
    assert how(followed(client, start(client, "a"))) == "finished"
    answer = messages_of(client)[-1]
    assert answer["content"] == "Look.\n\n# Found"
    assert [(each["input"], each["output"]) for each in answer["parts"][1:3]] == [(1, -1), (2, -2)]


def test_a_prompt_without_an_id_cannot_be_answered_again(client: Any, store: persist.Store) -> None:
    """Another program may store messages without ids. Fails if an earlier prompt that has one is taken instead."""
    prompts = [{"id": "m1", "role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    answers = [{"role": "assistant", "content": text} for text in ("first", "second")]
    messages = [prompts[0], answers[0], prompts[1], answers[1]]
    store.create("s", {"messages": messages})
    refused = client.post("/api/sessions/s/retry", json={"message_id": None})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "nothing_to_retry")
    assert store.load("s").data["messages"] == messages


@pytest.mark.parametrize("is_stopped", [False, True], ids=["failed", "stopped"])
def test_an_answer_stays_if_no_new_one_comes(client_of: Any, is_stopped: bool) -> None:
    """A retry that says nothing takes nothing away. While it waits, the earlier answer is not shown.

    Fails if the earlier answer is removed before the new one says something.
    """
    calls = []

    async def answer(conversation: Any) -> Any:
        calls.append([each["content"] for each in conversation.messages])
        if len(calls) == 1:
            yield Text("good")
        elif is_stopped:
            await asyncio.sleep(3600)
        else:
            yield Error("The model is away.")

    client = client_of(answer)
    followed(client, start(client, "a"))
    before = messages_of(client)
    stream_id = client.post("/api/sessions/s/retry").json()["stream_id"]
    if is_stopped:
        assert [each["role"] for each in messages_of(client)] == ["user"]
        assert client.post(f"/api/sessions/s/streams/{stream_id}/stop").json() == {"stopped": True}
    assert how(followed(client, stream_id)) == ("stopped" if is_stopped else "failed")
    assert messages_of(client) == before
    assert calls == [["a"], ["a"]]


def test_a_new_failure_takes_the_place_of_an_old_one(client_of: Any) -> None:
    """An answer that has only failed is no answer that could stay."""
    reasons = iter(["first", "second"])
    client = client_of(lambda _: _yielding(Error(next(reasons))))
    followed(client, start(client, "a"))
    followed(client, client.post("/api/sessions/s/retry").json()["stream_id"])
    assert [each.get("error") for each in messages_of(client)] == [None, "second"]


def test_a_retry_removes_no_message_of_the_user(client: Any, store: persist.Store, tmp_path: Path) -> None:
    """A message that another program adds meanwhile stays. Fails if all behind the prompt is removed."""
    followed(client, start(client, "a"))
    store.update("s", lambda tx: tx.list("messages")[0].__setitem__("content", f"<{tmp_path / 'gate'} b"))
    stream_id = client.post("/api/sessions/s/retry").json()["stream_id"]
    store.append("s", "messages", {"id": "m2", "role": "user", "content": "and this"})
    (tmp_path / "gate").touch()
    assert how(followed(client, stream_id)) == "finished"
    assert [each["content"] for each in messages_of(client)][1:] == ["and this", "b "]


def test_an_earlier_message_gives_its_retried_answer(client: Any) -> None:
    """A message that comes late, behind a later turn, names the stream of its new answer."""
    followed(client, start(client, "a"))
    stream_id = client.post("/api/sessions/s/retry").json()["stream_id"]
    followed(client, stream_id)
    followed(client, start(client, "b", "m2"))
    assert start(client, "a", status=200) == stream_id
