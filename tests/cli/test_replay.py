"""`scripts/replay`: the main job end to end, and its own failures."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from cli.conftest import Run, json_of
from replaying import outcome
from replaying.conversations import TITLES, Conversation, samples
from replaying.reports import parse
from replaying.supervise import Plan
from replaying.worker import TitleThread

import persist

TALK = Conversation.of(
    "talk",
    {"title": "Talk", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
)


def test_replay_survives_kills_without_a_loss(replay: Run, directory: Path) -> None:
    """A replay of the samples, with two workers and three kills, loses, doubles and blocks nothing.

    The documents are the transcripts.
    """
    result = replay("--workers", 2, "--kills", 3, "--store", directory, "--seed", 7, "--json")
    found = json_of(result)
    assert (result.exit_code, found["findings"], found["failures"]) == (0, [], [])
    assert found["kills"] == 3
    assert found["is_clean"] is True
    assert found["commits"] >= found["messages"] > 0
    assert found["commit_p99_ms"] >= found["commit_p50_ms"] > 0
    store = persist.Store(directory)
    for conversation in samples():
        messages = store.load(conversation.session_id).data["messages"]
        whole = [message for message in messages if not str(message["id"]).endswith(".answer")]
        assert whole == list(conversation.messages)


def test_more_kills_than_turns_are_spread_over_rounds(tmp_path: Path) -> None:
    """Kills that one conversation cannot take are made in further rounds, under new session ids."""
    result = outcome.replay(Plan([TALK], tmp_path, workers=1, kills=3, seed=1))
    assert result.is_clean
    assert result.kills == 3
    assert result.sessions == result.rounds > 1
    assert persist.Store(tmp_path).exists("talk-r2")


def test_plain_output_names_every_figure(replay: Run, tmp_path: Path) -> None:
    """Without a terminal the figures are plain lines.

    The temporary store of a clean run is gone, and no bar is drawn.
    """
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    result = replay(path, "--workers", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    figures = dict(line.strip().rsplit(maxsplit=1) for line in result.stdout.splitlines()[1:])
    assert {"turns", "commits/s", "kills survived", "stale streams cleared", "conflicts merged", "lost", "doubled"} <= {
        *figures
    }
    assert (figures["turns"], figures["lost"], figures["doubled"]) == ("1", "0", "0")


def test_directory_of_transcripts_is_read_and_other_files_are_skipped(replay: Run, tmp_path: Path) -> None:
    """Only ``*.json`` files of a directory are played. A file's name becomes a session id."""
    transcripts = tmp_path / "transcripts"
    transcripts.mkdir()
    (transcripts / "SOURCES.md").write_text("not JSON")
    (transcripts / "über uns.json").write_text(
        json.dumps({"title": "Us", "messages": [{"role": "user", "content": "?"}]})
    )
    assert replay(transcripts, "--workers", 1, "--store", tmp_path / "store").exit_code == 0
    assert persist.Store(tmp_path / "store").ids() == ["s1--ber-uns"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON: byte 1"),
        (b"[]", "is no transcript"),
        (b'{"messages": 1}', "is no transcript"),
        (b'{"messages": [{"content": ""}]}', "messages[0] must be an object with a 'role'"),
        (b'{"messages": [{"role": "user", "n": NaN}]}', "is not JSON"),
    ],
)
def test_bad_transcript_is_a_usage_error(replay: Run, tmp_path: Path, content: bytes, reason: str) -> None:
    """A *.json file that is not a transcript gives status 2, and the error names the file and what is wrong.

    Nothing is played.
    """
    (tmp_path / "bad.json").write_bytes(content)
    result = replay(tmp_path, "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert str(tmp_path / "bad.json") in result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "store").exists()


def test_replay_takes_no_store_that_is_in_use(replay: Run, store: persist.Store) -> None:
    """A replay plays only into a new or empty directory, because it must not mix with real sessions."""
    store.create("s-42")
    result = replay("--store", store.path)
    assert result.exit_code == 2
    assert "must be new, or an empty directory" in result.stderr


def test_kills_without_a_turn_are_a_usage_error(replay: Run, tmp_path: Path) -> None:
    """Without a user message there is no turn to kill in, and the replay says so instead of going on for ever."""
    path = tmp_path / "only-system.json"
    path.write_text('{"messages": [{"role": "system", "content": "Be kind."}]}')
    assert replay(path, "--kills", 1).exit_code == 2


def test_title_is_saved_after_a_conflict(store: persist.Store, capfd: pytest.CaptureFixture[str]) -> None:
    """A title that another writer has changed meanwhile is a conflict.

    The thread loads the session again, and reports both.
    """
    loaded = store.create("talk", {"title": "Talk", TITLES: {}, "messages": []})
    with store.transaction("talk") as tx:
        data = tx.data
        data["title"] = "Another"
    thread = TitleThread(store, loaded, TALK.turns[0], "Talk (1 of 1)")
    thread.start()
    thread.join_or_raise()
    reports = [parse(line) for line in capfd.readouterr().out.encode().splitlines()]
    assert [(report.verb, report.revision) for report in reports] == [("conflict", 0), ("title", 3)]
    assert store.load("talk").data["title"] == "Talk (1 of 1)"


def test_title_is_merged_with_what_was_committed_since(store: persist.Store, capfd: pytest.CaptureFixture[str]) -> None:
    """A save through an object from before other commits keeps them, and counts as merged (hermes-webui #3987)."""
    loaded = store.create("talk", {"title": "Talk", TITLES: {}, "messages": []})
    store.append("talk", "messages", TALK.messages[0])
    thread = TitleThread(store, loaded, TALK.turns[0], "Talk (1 of 1)")
    thread.start()
    thread.join_or_raise()
    (report,) = [parse(line) for line in capfd.readouterr().out.encode().splitlines()]
    assert (report.verb, report.item, report.has_merged) == ("title", "m0", True)
    data = store.load("talk").data
    assert (data["title"], data["messages"]) == ("Talk (1 of 1)", [TALK.messages[0]])


def test_title_that_was_no_edit_is_saved_again(store: persist.Store, capfd: pytest.CaptureFixture[str]) -> None:
    """A title that the object had already is not an edit.

    A title that is reported as saved must be stored all the same.
    """
    loaded = store.create("talk", {"title": "Talk (1 of 1)", TITLES: {"turn-1": "Talk (1 of 1)"}, "messages": []})
    with store.transaction("talk") as tx:
        data = tx.data
        data["title"] = "A later one"
    thread = TitleThread(store, loaded, TALK.turns[0], "Talk (1 of 1)")
    thread.start()
    thread.join_or_raise()
    (report,) = [parse(line) for line in capfd.readouterr().out.encode().splitlines()]
    assert (report.verb, report.revision) == ("title", 3)
    assert store.load("talk").data["title"] == "Talk (1 of 1)"


def test_worker_that_ends_by_itself_is_a_failure_with_its_reason(store: persist.Store) -> None:
    """A worker that dies of an error is named with its standard error, and the outcome is not clean."""
    store.create("talk", {"messages": []})
    (store.path / "talk.json").write_text("{")
    result = outcome.replay(Plan([TALK], store.path, workers=1))
    assert not result.is_clean
    assert "CorruptSession" in result.failures[0]
    assert {finding.kind for finding in result.findings} == {"lost", "damaged"}


def test_session_that_stays_busy_is_noticed(store: persist.Store) -> None:
    """A stream that never ends does not hang the replay, which fails after `timeout_s` and names the stuck session."""
    store.create("talk", {"title": "Talk", TITLES: {}, "messages": []})
    with store.start_stream("talk") as stream:
        result = outcome.replay(Plan([TALK], store.path, workers=2, timeout_s=1.0))
        stream.finish()
    assert len(result.failures) == 2
    assert "found nothing that it could commit for 1 s" in result.failures[0]
    assert ("stuck", "talk") in {(finding.kind, finding.session_id) for finding in result.findings}


def test_worker_that_hangs_is_noticed(store: persist.Store) -> None:
    """A worker that waits for a lock for ever is ended after `timeout_s`, and is a failure."""
    store.create("talk", {"title": "Talk", TITLES: {}, "messages": []})
    is_held, may_go = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with store.transaction("talk"):
            is_held.set()
            may_go.wait(20)

    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    assert is_held.wait(20)
    result = outcome.replay(Plan([TALK], store.path, workers=1, timeout_s=1.0))
    may_go.set()
    holder.join(20)
    assert "worker-2" in result.failures[0]
    assert not result.is_clean
