"""A real client: the npm package `ai` in Node, whose chat and transport are what ``useChat`` is made of."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import servers
from harness.chat_workers import Chat, Worker

HERE = Path(__file__).parent / "ai_sdk"

#: The state of a client's chat: its status, its error and its messages.
State = dict[str, Any]


class Client:
    """A process of Node with a chat of the AI SDK."""

    def __init__(self, worker: Worker, *command: str) -> None:
        arguments = [str(HERE / "client.mjs"), str(servers.AI_SDK), worker.url, "chat", *command]
        self.process = subprocess.Popen(["node", *arguments], stdout=subprocess.PIPE, text=True)
        self.states: list[State] = []

    def __iter__(self) -> Iterator[State]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.states.append(json.loads(line))
            yield self.states[-1]

    def until(self, text: str) -> State:
        """Read until the answer has this text."""
        return next(state for state in self if text_of(answer_in(state)) == text)

    def end(self) -> State:
        """Read to the end, and return the last state."""
        for _ in self:
            pass
        assert self.process.wait() == 0
        return self.states[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def answer_in(state: State) -> dict[str, Any]:
    """Return the last message of the assistant, or an empty one."""
    found = [message for message in state["messages"] if message["role"] == "assistant"]
    return found[-1] if found else {"parts": []}


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def words(count: int) -> str:
    return " ".join(f"word{number}" for number in range(count))


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    """Provide a function that starts a client of a worker."""
    if shutil.which("node") is None or not servers.has_ai_sdk(HERE):
        servers.missing("Node with its package ai")
    clients: list[Client] = []

    def start(worker: Worker, *command: str) -> Client:
        clients.append(Client(worker, *command))
        return clients[-1]

    yield start
    for each in clients:
        each.close()


def stop(worker: Worker, **body: str) -> bool:
    """Stop the answer as a page does."""
    answer = httpx.post(f"{worker.url}api/chat/chat/stop", json=body)
    return bool(answer.raise_for_status().json()["stopped"])


def test_a_message_is_sent_and_answered(chat: Chat, client: Callable[..., Client]) -> None:
    """The answer grows word by word in the SDK's message. The stored answer has the same id and text."""
    sent = client(chat.workers[0], "send", words(30))
    state = sent.end()
    assert (state["status"], text_of(answer_in(state))) == ("ready", words(30))
    assert all(words(30).startswith(text_of(answer_in(state))) for state in sent.states)
    stored = chat.store.tail("chat")
    assert [(each["id"], each["content"]) for each in stored] == [(each["id"], words(30)) for each in state["messages"]]
    nothing_runs = client(chat.workers[1], "resume").end()
    assert (nothing_runs["status"], text_of(answer_in(nothing_runs))) == ("ready", words(30))


def test_a_new_chat_resumes_nothing(chat: Chat, client: Callable[..., Client]) -> None:
    """A page with `resume` asks for the stream of a chat that has no message yet. Fails with status 404: an error."""
    state = client(chat.workers[0], "resume").end()
    assert (state["status"], state["error"], state["messages"]) == ("ready", None, [])
    assert chat.store.ids() == []


def test_thoughts_and_tools_arrive(chat: Chat, client: Callable[..., Client]) -> None:
    """Reasoning and the use of a tool are parts of the SDK's message. A page that loads the chat gets them, too."""
    sent = client(chat.workers[0], "send", "think-twice").end()
    parts = answer_in(sent)["parts"]
    assert [part["type"] for part in parts] == ["step-start", "reasoning", "tool-think-twice", "text"]
    assert parts[2]["state"] == "output-available"
    assert (parts[2]["input"], parts[2]["output"]) == ({"of": "think-twice"}, "think-twice")
    loaded = answer_in(client(chat.workers[1], "resume").end())
    assert [part["type"] for part in loaded["parts"]] == ["reasoning", "tool-think-twice", "text"]
    assert all(parts[2][key] == value for key, value in loaded["parts"][1].items())


def test_a_second_process_resumes_in_mid_stream(chat: Chat, client: Callable[..., Client]) -> None:
    """A client that comes in mid-answer, at another worker, has its words without gap or repeat, and then the rest."""
    chat.pace.allow(20)
    first = client(chat.workers[0], "send", words(60))
    first.until(words(20))
    second = client(chat.workers[1], "resume")
    second.until(words(20))
    first.process.kill()
    chat.pace.allow(40)
    second.until(words(40))
    third = client(chat.workers[1], "resume")
    third.until(words(40))
    chat.pace.allow(1000)
    for each in (second, third):
        state = each.end()
        assert (state["status"], text_of(answer_in(state))) == ("ready", words(60))
        assert [message["role"] for message in state["messages"]] == ["user", "assistant"]
        assert all(words(60).startswith(text_of(answer_in(state))) for state in each.states)
    assert chat.store.tail("chat")[-1]["content"] == words(60)


def test_a_stop_at_another_worker(chat: Chat, client: Callable[..., Client]) -> None:
    """A stop ends the stream of every client, and its words are kept. A stop that names another stream does nothing."""
    chat.pace.allow(20)
    first = client(chat.workers[0], "send", words(60))
    first.until(words(20))
    second = client(chat.workers[1], "resume")
    second.until(words(20))
    assert not stop(chat.workers[1], activeStreamId="an-earlier-one")
    stream = chat.store.stream("chat")
    assert stream is not None
    assert stop(chat.workers[1], activeStreamId=stream.stream_id)
    for each in (first, second):
        state = each.end()
        assert (state["status"], text_of(answer_in(state))) == ("ready", words(20))
    assert not stop(chat.workers[1])
    assert chat.store.tail("chat")[-1]["content"] == words(20)


def test_an_answer_is_given_again(chat: Chat, client: Callable[..., Client]) -> None:
    """The SDK's `regenerate` puts a new answer into the place of the old one."""
    before = client(chat.workers[0], "send", "Once more").end()
    after = client(chat.workers[1], "regenerate").end()
    assert [message["role"] for message in after["messages"]] == ["user", "assistant"]
    assert text_of(answer_in(after)) == "Once more"
    assert answer_in(after)["id"] != answer_in(before)["id"]
    assert [message["id"] for message in chat.store.tail("chat")] == [message["id"] for message in after["messages"]]


def test_a_worker_dies_under_a_client(chat: Chat, client: Callable[..., Client]) -> None:
    """After `kill -9` a client has an error, and the next one loads what was kept."""
    chat.pace.allow(20)
    first = client(chat.workers[0], "send", words(60))
    first.until(words(20))
    chat.wait_until_kept("chat", words(20))
    chat.workers[0].kill()
    assert first.end()["status"] == "error"
    state = client(chat.workers[1], "resume").end()
    assert (state["status"], text_of(answer_in(state))) == ("ready", words(20))
