"""Faults that attackers found: each test is the report of one fault, and fails with that fault."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.files import file_engine
from msgspec import structs

import persist
import persist.aio
from persist import content_merge, json_codec, watch
from persist.storage import content, disk, lock
from persist.storage.content import ALWAYS_FIELD, Items, encoded, window
from persist.storage.transaction import Locked


@pytest.fixture
def store(tmp_path: Path) -> Iterator[persist.Store]:
    with persist.Store(tmp_path / "sessions", journal="always") as opened:
        yield opened


def ids(store: persist.Store) -> list[Any]:
    return [message.get("id") for message in store.load("s").data["messages"]]


def test_append_does_not_change_a_list_that_was_split_before() -> None:
    """A merge base shares its list with a replica. Fails if `split` hands out the list that an append extends."""
    items = Items([b"1", b"2"])
    before = items.split()
    items.spliced(2, 0, [b"3"])
    assert before == [b"1", b"2"] == items.split()


def test_append_of_another_thread_in_mid_refresh_loses_no_message(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3: a refresh compares with an unchanged merge base, even if the store's replica takes a commit meanwhile."""
    store.create("s", {"n": 0, "messages": [{"id": "m1"}, {"id": "m2"}], "tool_calls": []})
    loaded = store.load("s")
    loaded.data["n"] = 1
    loaded.save()
    persist.Store(store.path, journal="always").append("s", "messages", {"id": "theirs"})
    left = [1]

    def interrupted(before: list[bytes], after: list[bytes]) -> Any:
        if left:
            left.clear()
            thread = threading.Thread(target=store.append, args=("s", "tool_calls", {"id": "x"}))
            thread.start()
            thread.join()
        return window(before, after)

    monkeypatch.setattr(content_merge, "window", interrupted)
    loaded.refresh()
    assert not left
    loaded.data["n"] = 2
    loaded.save()
    assert ids(store) == ["m1", "m2", "theirs"]


@pytest.mark.parametrize("filler", [{f"k{n}": "v" * 30 for n in range(1100)}, {}], ids=["many-fields", "none"])
def test_stream_stays_in_the_head_beside_any_fields(store: persist.Store, filler: dict[str, str]) -> None:
    """A2: the id of the running stream is a field, however many fields there are. So the stream's guards see it."""
    store.create("s", {"messages": [{"id": "m0"}], **filler})
    with store.start_stream("s", {"id": "p", "role": "user", "content": "q"}) as stream:
        assert not stream.is_cancelled()
        assert store.head("s").active_stream_id == stream.id
        stream.emit(1)
        loaded = store.load("s")
        loaded.data["messages"].clear()
        with pytest.raises(persist.MergeConflict):
            loaded.save()
        stream.finish({"role": "assistant", "content": "a"})


def test_large_stream_id_of_another_program_is_a_field() -> None:
    """A sweep reads only heads. Fails if a value above 4 KiB always becomes a part."""
    assert ALWAYS_FIELD in encoded({ALWAYS_FIELD: "x" * 5000}).fields
    assert ALWAYS_FIELD in encoded({ALWAYS_FIELD: "x" * 2 * content.FIELDS_BYTES, "other": 1}).fields


def test_number_keys_of_the_same_json_are_replaced_by_what_others_wrote(store: persist.Store) -> None:
    """Equal JSON text means unchanged. Fails with a bare KeyError if a patch trusts the keys of the caller's dict."""
    mine = store.create("s", {"votes": {"1": "a", "z": 1}, "messages": []})
    mine.data["votes"] = {1: "a", "z": 1}
    mine.data["messages"].append({"role": "user", "content": "no id"})
    theirs = store.load("s")
    theirs.data["votes"]["z"] = 2
    theirs.save()
    mine.save()
    assert mine.data["votes"] == {"1": "a", "z": 2}
    assert store.load("s").data == mine.data
    assert len(mine.data["messages"]) == 1


def test_value_that_is_set_over_a_list_is_that_list(store: persist.Store) -> None:
    """F20: a list that a block was handed goes on with the value that the block puts in its place."""
    store.create("s", {"messages": []})
    with store.transaction("s") as tx:
        handed_out = tx.list("tags")
        tx.fields.setdefault("tags", []).append("a")
        handed_out.append("b")
    assert store.load("s").data["tags"] == ["a", "b"]


def test_answer_of_a_finished_turn_stays_that_turns(store: persist.Store) -> None:
    """A5: a checkpoint of the same answer changes nothing, and another answer under its id is refused."""
    answer = {"id": "a", "role": "assistant", "content": "done"}
    store.create("s", {"messages": []})
    with store.start_stream("s", {"id": "p", "role": "user", "content": "q"}) as stream:
        stream.finish(answer)
    with store.start_stream("s", {"id": "p2", "role": "user", "content": "q"}) as stream:
        stream.checkpoint(answer)
        with pytest.raises(persist.MergeConflict):
            stream.checkpoint({**answer, "content": "OVERWRITTEN"})
    assert answer in store.load("s").data["messages"]


def test_prompts_of_two_foreign_turns_under_one_id_share_no_id(store: persist.Store) -> None:
    """D4: another program may use its stream id twice. Fails if the recovered prompt gets an id that is taken."""
    store.create("s", {"messages": []})
    for prompt in ("one", "two"):
        data = {**store.load("s").data, ALWAYS_FIELD: "f1", "pending_user_message": prompt}
        store.delete("s")
        store.path.joinpath("s.json").write_bytes(json_codec.encode(data))
        assert store.clear_stale_streams(every_session=True).cleared
    assert ids(store) == ["f1.prompt", None]


def test_follower_that_could_start_no_thread_leaves_the_next_one_awake(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the watching thread counts as started before it runs, or if a wait that failed stays registered."""
    store.create("s", {"messages": []})
    with store.start_stream("s") as stream:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                store.follow("s", stream.id)
        assert not watch._waiting
        with store.follow("s", stream.id):
            assert "persist-events" in {thread.name for thread in threading.enumerate()}
        stream.finish({"role": "assistant", "content": "a"})


def refuse(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_events_file_that_another_program_has_locked_is_no_lost_stream(store: persist.Store) -> None:
    """Fails if an events file that cannot be locked counts as the end of the stream."""
    store.create("s", {"messages": []})
    with store.start_stream("s") as stream:
        with store.follow("s", stream.id):
            path = next(store.path.joinpath(".events").iterdir())
            with path.open("rb") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                with pytest.raises(persist.EmitFailed, match="locked"):
                    stream.emit(1)
        assert stream.emit(1) == 1
        stream.finish({"role": "assistant", "content": "a"})


def test_events_that_were_read_are_returned_although_a_close_fails(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that were read are returned. Fails with a bare OSError if a reader's close passes the disk's error on."""
    store.create("s", {"messages": []})
    with store.start_stream("s") as stream:
        stream.emit(1)
        close = disk.close

        def failing(fd: int) -> None:
            close(fd)
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(disk, "close", failing)
        assert [event.data for event in store.events("s", stream.id)] == [1]
        monkeypatch.undo()
        stream.finish({"role": "assistant", "content": "a"})


def test_verb_that_was_refused_a_thread_is_not_done_later(
    store: persist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10: a task that gets an error repeats the verb. Fails if the pool runs the first call later all the same."""
    store.create("s", {"n": 0, "messages": []})
    asynchronous = persist.aio.Store(store)

    async def count_up() -> None:
        await asynchronous.update("s", lambda tx: tx.data.update(n=tx.data["n"] + 1))

    async def run() -> None:
        begun, leave = threading.Event(), threading.Event()

        def busy(_tx: persist.Transaction) -> None:
            begun.set()
            leave.wait(20)

        store.create("slow", {"messages": []})
        slow = asyncio.create_task(asynchronous.update("slow", busy))
        assert await asyncio.to_thread(begun.wait, 20)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                await count_up()
        leave.set()
        await slow
        await count_up()

    asyncio.run(run())
    assert store.load("s").data["n"] == 1


def test_journal_of_a_document_that_was_edited_is_no_left_over(store: persist.Store) -> None:
    """`check` tells nobody to remove the journal, because `accept` takes its commits together with the edit."""
    journaled = persist.Store(store.path, journal="always")
    journaled.create("s", {"title": "t", "messages": []})
    journaled.append("s", "messages", {"id": "m1"})
    path = store.path / "s.json"
    path.write_bytes(path.read_bytes().replace(b'"title":"t"', b'"title":"u"'))
    assert [problem.kind for problem in store.check()] == ["corrupt"]
    store.accept("s")
    assert ids(store) == ["m1"]


def test_directory_that_is_gone_is_an_error_and_no_empty_store(store: persist.Store) -> None:
    """F18: a lost mount must not look like a store without sessions, nor its sessions like deleted ones."""
    store.create("s")
    shutil.rmtree(store.path)
    looks: list[Callable[[], object]] = [store.ids, lambda: list(store.heads()), store.streams, store.check]
    looks += [lambda: store.create("n"), lambda: store.append("s", "messages", {"id": "m"}, create=True)]
    for use in looks:
        with pytest.raises(persist.Unreadable, match="it is gone"):
            use()


def test_save_that_was_cut_off_names_the_one_way_out(store: persist.Store) -> None:
    """The error tells the caller to load the session. `refresh` and a preference always fail then."""
    session = store.create("s", {"n": 0, "messages": []})
    session._base = structs.replace(session._base, tried=("0" * 16, session._base.content))
    store.append("s", "messages", {"id": "m1"})
    with pytest.raises(persist.MergeConflict, match="load the session anew") as caught:
        session.save()
    assert "refresh" not in str(caught.value)


def test_hold_that_was_cut_off_while_it_was_made_is_dropped_in_silence() -> None:
    """A hold without attributes is dropped in silence: a signal's exception may come before the first one is set."""
    for kind in (lock.Hold, Locked):
        kind.__new__(kind).__del__()


def test_start_that_is_repeated_says_that_there_is_no_answer(store: persist.Store) -> None:
    """`AlreadyStarted` says so if the turn has finished without an answer."""
    store.create("s")
    prompt = {"id": "p", "role": "user", "content": "q"}
    store.start_stream("s", prompt, once=True).finish()
    with pytest.raises(persist.AlreadyStarted, match="without an answer") as caught:
        store.start_stream("s", prompt, once=True)
    assert caught.value.answer is None
    with pytest.raises(persist.InvalidArgument, match="append"):
        store.start_stream("s", fields={"messages": []})


def test_count_of_the_cache_that_a_signal_has_spoilt_stops_no_verb(store: persist.Store) -> None:
    """If the count is too high, a put drops what the cache holds and counts anew. Fails with a bare KeyError."""
    journaled = persist.Store(store.path, journal="always", cache_bytes=0)
    journaled.create("s", {"messages": []})
    cache = file_engine(journaled).cache
    cache._total_bytes = 10_000
    for number in range(3):
        journaled.append("s", "messages", {"id": f"m{number}"})
    assert (ids(store), cache._total_bytes) == (["m0", "m1", "m2"], 0)
