"""Several processes save one conversation of pydantic-ai, and are killed on the way."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai.conversation_store", reason="needs pydantic-ai-slim")

from actors import eventually
from conftest import ActorFactory
from harness.killed_workers import NAMES, WORKERS, all_worked
from harness.turnstiles import is_waited_for
from pydantic_ai.conversation import Conversation
from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, UserPromptPart

import persist
from persist.adapters.pydantic_ai import PersistConversationStore

BATCHES, KILLS = 100, 2

PREPARE = """
import asyncio
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationConflict, ConversationEntry, ConversationRecord
from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, UserPromptPart
from persist.adapters.pydantic_ai import PersistConversationStore

adapter = PersistConversationStore(store)

def turn(text):
    return [ModelRequest(parts=[UserPromptPart(text)]), ModelResponse(parts=[TextPart(text)])]

async def save(text):
    conversation = await adapter.load("c", limit=2) or Conversation(conversation_id="c")
    conversation.messages += turn(text)
    await adapter.save(conversation)
"""


async def save(directory: Path, text: str) -> None:
    """Append a turn to the conversation, in this process."""
    store = PersistConversationStore(directory)
    conversation = await store.load("c") or Conversation(conversation_id="c")
    conversation.messages += [ModelRequest(parts=[UserPromptPart(text)]), ModelResponse(parts=[TextPart(text)])]
    await store.save(conversation)


async def words(directory: Path, conversation_id: str = "c") -> list[str]:
    """Return the text of each turn of a conversation, and require that its request and its response stand together."""
    conversation = await PersistConversationStore(directory).load(conversation_id)
    messages = [] if conversation is None else conversation.messages
    texts: list[Any] = [message.parts[0].content for message in messages]  # type: ignore[union-attr]
    assert texts[::2] == texts[1::2]
    return texts[::2]


#: Saves the batches of one worker, behind those that are there. It prints each batch whose save has returned.
WORKER = """
import sys, persist
store = persist.Store(sys.argv[1], timeout_s=60)
name, batches = sys.argv[2], int(sys.argv[3])
{prepare}
async def work():
    conversation = await adapter.load("c")
    texts = [each.parts[0].content for each in conversation.messages] if conversation else []
    for number in range(sum(text.startswith(name) for text in texts) // 2, batches):
        while True:
            try:
                await save(f"{name}-{number}")
                break
            except ConversationConflict:
                pass
        print(number, flush=True)

asyncio.run(work())
"""


def test_killed_workers_lose_double_and_split_nothing(directory: Path) -> None:
    """4 processes save 100 batches of two entries each to one conversation, and are killed on the way.

    After a conflict a worker loads the end again. After a kill it starts again, and looks at what is there. Each batch
    is there once and whole, and each worker's batches keep their order.

    It fails if the revision is not compared, and if it is compared before the transaction.
    """
    printed = all_worked(directory, code=WORKER.replace("{prepare}", PREPARE), steps=BATCHES, kills=KILLS)
    found = asyncio.run(words(directory))
    assert Counter(found) == Counter(f"{name}-{number}" for name in NAMES for number in range(BATCHES))
    for name in NAMES:
        assert [each for each in found if each.startswith(name)] == [f"{name}-{number}" for number in range(BATCHES)]
        assert printed[name] <= set(range(BATCHES))
    store = persist.Store(directory)
    # No commit but those of the batches, and no entry that a lost save has left.
    assert store.head("c").revision == WORKERS * BATCHES
    assert store.head("c").counts["messages"] == 2 * WORKERS * BATCHES
    assert {problem.kind for problem in store.check()} <= {"left-over"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a process waits for a lock")
@pytest.mark.parametrize("is_new", [True, False], ids=["created", "continued"])
def test_one_of_two_writers_wins(actor: ActorFactory, directory: Path, is_new: bool) -> None:
    """Two processes write a record for one revision, or create one conversation, at the same time. One gets a conflict.

    It fails if the revision is not compared, and if it is compared before the transaction.
    """
    mine = PersistConversationStore(directory)
    expected = None
    if not is_new:
        conversation = Conversation(conversation_id="c")
        asyncio.run(mine.save(conversation))
        expected = conversation.revision
    write = f"""
async def write(name):
    entry = ConversationEntry(parent_id=None, message=turn(name)[0])
    record = ConversationRecord(conversation_id="c", head_id=entry.id, revision=name)
    await adapter.write_record(record, new_entries=[entry], expected_revision={expected!r})
"""
    first, second = actor(), actor()
    for process in (first, second):
        process.do(PREPARE + write)
    # The first process holds the lock, and has compared the revision.
    first.start_and_pause("asyncio.run(write('first'))", "replace")
    second.start("asyncio.run(write('second'))")
    # The second process has done all that comes before the lock. Now it waits.
    eventually(lambda: is_waited_for(directory / "c.json.lock"))
    first.go()
    first.result()
    with pytest.raises(Exception, match="was saved or deleted since") as conflict:
        second.result()
    assert type(conflict.value).__name__ == "ConversationConflict"
    record = asyncio.run(mine.read_record("c"))
    assert record is not None
    assert record.revision == "first"
    assert persist.Store(directory).head("c").counts["messages"] == 1


@pytest.mark.parametrize("step", ["write", "replace"])
@pytest.mark.parametrize("is_new", [True, False], ids=["first-save", "later-save"])
def test_a_save_that_is_killed_is_absent(actor: ActorFactory, directory: Path, step: str, is_new: bool) -> None:
    """A process that is killed before its save is visible leaves nothing of it. The next save goes on.

    It fails if the record is not written in the commit of the entries.
    """
    before = [] if is_new else ["a"]
    for word in before:
        asyncio.run(save(directory, word))
    victim = actor()
    victim.do(PREPARE)
    victim.start_and_pause("asyncio.run(save('b'))", step)
    victim.kill()
    assert asyncio.run(words(directory)) == before
    asyncio.run(save(directory, "b"))
    assert asyncio.run(words(directory)) == [*before, "b"]


def test_a_fork_that_is_killed_is_whole_or_absent(actor: ActorFactory, directory: Path) -> None:
    """A process that is killed while it writes a fork leaves none. Afterwards the fork can be made."""
    asyncio.run(save(directory, "a"))
    fork = f"{PREPARE}\nasyncio.run(adapter.fork('c', new_conversation_id='f')).messages[0].parts[0].content"
    victim = actor()
    victim.start_and_pause(fork, "replace")
    victim.kill()
    assert asyncio.run(PersistConversationStore(directory).load("f")) is None
    assert actor().do(fork) == "a"
    assert asyncio.run(words(directory, "f")) == ["a"]


def test_deletes_saves_and_forks_agree(actor: ActorFactory, directory: Path, tmp_path: Path) -> None:
    """One process saves and deletes a conversation, and others fork it. Each fork has a history that was there once."""
    source, *forkers = [actor(timeout_s=60.0) for _ in range(3)]
    stop = tmp_path / "stop"
    source.do(PREPARE)
    source.start(f"""
async def churn():
    number = 0
    while not os.path.exists({str(stop)!r}):
        for word in "abc":
            await save(f"{{number}}{{word}}")
        await adapter.delete("c")
        number += 1
asyncio.run(churn())
""")
    for name, forker in enumerate(forkers):
        forker.do(PREPARE)
        forker.start(f"""
async def fork():
    from pydantic_ai import UserError
    made = []
    while len(made) < 30:
        try:
            fork = await adapter.fork("c", new_conversation_id=f"{name}-{{len(made)}}")
        except UserError:  # the conversation is not there, or this is a conflict
            continue
        made.append((fork.conversation_id, [each.parts[0].content for each in fork.messages]))
    return made
asyncio.run(fork())
""")
    made = dict(itertools.chain.from_iterable(forker.result() for forker in forkers))
    stop.touch()
    source.result()
    for conversation_id, texts in made.items():
        found = asyncio.run(words(directory, conversation_id))
        assert found == texts[::2]
        number = found[0][:-1]
        assert found == [f"{number}{word}" for word in "abc"][: len(found)]
    assert persist.Store(directory).ids() == sorted(made)
    assert persist.Store(directory).check() == []
