"""The verdict of a replay can fail: each kind of damage to a finished store is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Played
from replaying.conversations import TITLES
from replaying.ledger import Ledger
from replaying.verdict import compare

import persist

Judge = Callable[..., list[tuple[str, str, str]]]

SESSION = "allotment-irrigation"


@pytest.fixture
def judge(played: Played, directory: Path) -> Judge:
    """Return a function that compares a copy of the played store, which the test has damaged, with what was played."""
    shutil.copytree(played.directory, directory)

    def compare_copy(ledger: Ledger = played.ledger) -> list[tuple[str, str, str]]:
        findings = compare(persist.Store(directory), played.conversations, ledger)
        return [(finding.kind, finding.session_id, finding.what) for finding in findings]

    return compare_copy


def place_of(data: dict[str, Any], message_id: str) -> int:
    return next(i for i, message in enumerate(data["messages"]) if message["id"] == message_id)


def test_undamaged_store_has_no_findings(judge: Judge) -> None:
    """A replay that went well is found clean, so the other tests fail for their damage, not for the comparison."""
    assert judge() == []


def test_dropped_message_is_lost(judge: Judge, store: persist.Store) -> None:
    """A missing message that was acknowledged is lost."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        del data["messages"][place_of(data, "m3")]
    assert judge() == [("lost", SESSION, "message m3, which was acknowledged")]


def test_message_that_was_missing_once_is_lost(judge: Judge, played: Played) -> None:
    """An acknowledged message that a worker did not find is lost.

    This holds even if it was sent again and is stored at the end.
    """
    ledger = replace(
        played.ledger, messages={(SESSION, "m9"): 20, (SESSION, "m10"): 21}, seen={SESSION: [(20, 10), (23, 10)]}
    )
    assert judge(ledger) == [("lost", SESSION, "message m10, acknowledged at revision 21, was missing at 23")]


def test_look_before_an_acknowledgement_proves_nothing(judge: Judge, played: Played) -> None:
    """A message may be missing in a revision older than the one it was acknowledged at."""
    assert judge(replace(played.ledger, messages={(SESSION, "m10"): 21}, seen={SESSION: [(20, 10), (23, 11)]})) == []


def test_message_that_stands_there_twice_is_doubled(judge: Judge, store: persist.Store) -> None:
    """The same id twice is one doubled message, even if its copies stand side by side."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        place = place_of(data, "m5")
        data["messages"].insert(place, dict(data["messages"][place]))
    assert judge() == [("doubled", SESSION, "message m5 stands there 2 times")]


def test_changed_message_is_named(judge: Judge, store: persist.Store) -> None:
    """A message with other content is not the message that was sent."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        data["messages"][place_of(data, "m5")]["content"] += "!"
    assert judge() == [("changed", SESSION, "message m5 is not as it was sent")]


def test_prompt_that_stayed_interrupted_is_named(judge: Judge, store: persist.Store) -> None:
    """A turn that was never taken up again shows by the mark on its prompt."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        data["messages"][place_of(data, "m1")]["interrupted"] = True
    assert judge() == [("changed", SESSION, "message m1 is not as it was sent")]


def test_swapped_messages_are_disordered(judge: Judge, store: persist.Store) -> None:
    """Messages in another order than that of the transcript are named, even if none is missing."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        messages, one, other = data["messages"], place_of(data, "m3"), place_of(data, "m4")
        messages[one], messages[other] = messages[other], messages[one]
    assert judge() == [("disordered", SESSION, "the messages are not in the order of the transcript")]


def test_partial_that_is_not_marked_is_a_stray(judge: Judge, store: persist.Store) -> None:
    """Only partials that are marked as interrupted are set aside. Any other message that was not sent is named."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        data["messages"].append({"id": "x.answer", "role": "assistant", "content": "half an ans", "interrupted": True})
        data["messages"].append({"id": "y.answer", "role": "assistant", "content": "half an ans"})
    assert judge() == [("stray", SESSION, "message y.answer was never sent")]


def test_acknowledged_title_of_a_turn_is_lost(judge: Judge, store: persist.Store) -> None:
    """A title that the background thread was told is saved must be stored (hermes-webui #3987 the other way round)."""
    with store.transaction(SESSION) as tx:
        data = tx.data
        del data[TITLES]["turn-2"]
    assert judge() == [("lost", SESSION, "the title of turn-2, which was acknowledged")]


def test_older_title_is_a_lost_title(judge: Judge, store: persist.Store, played: Played) -> None:
    """The title that was acknowledged last must be stored. An older one in its place means that a save was lost."""
    conversation = next(each for each in played.conversations if each.session_id == SESSION)
    with store.transaction(SESSION) as tx:
        data = tx.data
        data["title"] = conversation.title
    assert judge() == [("lost", SESSION, "the title of the session is not the one that was saved last")]


def test_title_of_a_killed_worker_may_stand(judge: Judge, store: persist.Store, played: Played) -> None:
    """A killed worker may have saved its title without being told so, and that title is no loss."""
    conversation = next(each for each in played.conversations if each.session_id == SESSION)
    turn = conversation.turns[0]
    with store.transaction(SESSION) as tx:
        data = tx.data
        data["title"] = conversation.title_after(turn)
    assert [kind for kind, _, _ in judge()] == ["lost"]
    assert judge(replace(played.ledger, unsure={(SESSION, turn.prompt["id"])})) == []


def test_stream_that_was_left_is_stuck(judge: Judge, store: persist.Store) -> None:
    """A stream that is still active after the replay is named, with its lease."""
    with store.start_stream(SESSION, stream_id="left") as stream:
        found = judge()
        stream.finish()
    kinds = {(kind, session_id) for kind, session_id, _ in found}
    assert kinds == {("stuck", SESSION)}
    assert "active_stream_id is still set" in [what for _, _, what in found]
    assert f"the lease {SESSION}.left is left over" in [what for _, _, what in found]


def test_left_over_files_are_named(judge: Judge, store: persist.Store) -> None:
    """A temporary file, or a lease of no stream, may not be left behind."""
    (store.path / f"{SESSION}.json.tmp").write_text("half")
    (store.path / ".leases" / f"{SESSION}.gone").touch()
    kinds = sorted(kind for kind, _, _ in judge())
    assert kinds == ["damaged", "stuck"]


def test_session_that_is_gone_is_lost(judge: Judge, store: persist.Store) -> None:
    """A session without a document is lost as a whole."""
    store.delete(SESSION)
    ((kind, session_id, what),) = judge()
    assert (kind, session_id) == ("lost", SESSION)
    assert what.startswith("the whole session")


def test_damaged_session_is_named(judge: Judge, store: persist.Store) -> None:
    """A document whose checksum does not match is lost as a whole, and damaged."""
    path = store.path / f"{SESSION}.json"
    path.write_bytes(path.read_bytes().replace(b"tomatoes", b"potatoes", 1))
    assert [kind for kind, _, _ in judge()] == ["lost", "damaged"]
