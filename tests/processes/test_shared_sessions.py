"""One Session object: exceptions that cut its verbs off, threads whose verbs meet, and commits of others.

An object is for one thread at a time. Its save and its refresh exclude each other, and no more is promised.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from actors import DEADLINE_S
from conftest import ActorFactory

import persist
from persist import content_merge
from persist import session as session_module
from persist.storage import disk
from persist.storage.commit import Mode
from persist.storage.content import Content


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "Shared", "n": 0, "messages": [{"id": "m1", "role": "user", "content": "hi"}]})


def contents(store: persist.Store) -> list[str]:
    return [message["content"] for message in store.load("s-1").data["messages"]]


def in_threads(*works: Callable[[], object]) -> None:
    """Run functions at once, from a barrier. Raise the first exception of one here."""
    barrier, errors = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[], object]) -> None:
        try:
            barrier.wait(DEADLINE_S)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    if errors:
        raise errors[0]


# --- stream fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer", ["error", "mine"])
def test_save_never_writes_none_over_a_live_stream(store: persist.Store, session: persist.Session, prefer: Any) -> None:
    """A1 (#1533) by other means: a save takes the stream fields from the disk, whatever it prefers at conflicts."""
    session.data["active_stream_id"] = None
    session.data["title"] = "mine"
    with store.start_stream("s-1") as stream:
        session.save(on_conflict=prefer)
        info = store.stream("s-1")
        assert info is not None
        assert (info.stream_id, info.is_live) == (stream.id, True)
        assert session.active_stream_id == stream.id
        stream.finish()
    assert store.load("s-1").data["title"] == "mine"


def test_stream_fields_take_no_merge_policy(store: persist.Store) -> None:
    """A merge policy for a stream field is refused, because it could say "mine" for ever."""
    with pytest.raises(persist.InvalidArgument):
        persist.Store(store.path, merge={"active_stream_id": "mine"})


def test_save_that_prefers_mine_keeps_the_running_turn(store: persist.Store, session: persist.Session) -> None:
    """B2, B3: a save that prefers "mine" undoes neither another writer's truncation nor the turn that runs on it."""
    session.data["messages"].append({"id": "note", "content": "note"})
    store.update("s-1", lambda tx: tx.data["messages"].clear(), if_version=session.version)
    with store.start_stream("s-1", {"role": "user", "content": "Why?"}) as stream:
        session.save(on_conflict="mine")
        stream.finish({"role": "assistant", "content": "Because."})
    assert contents(store) == ["Why?", "note", "Because."]


def test_messages_cannot_be_made_something_else_in_a_turn(store: persist.Store) -> None:
    """A turn can always be ended, because `messages` stays a list while it runs, and even if it does not."""
    session = store.create("s-2", {"messages": []})
    stream = store.start_stream("s-2")
    session.refresh()
    session.data["messages"] = "oops"
    with pytest.raises(persist.InvalidArgument):
        session.save()
    with store.transaction("s-2") as tx:
        tx.data["messages"] = "oops"
    stream.fail()
    assert store.load("s-2").active_stream_id is None


def test_stale_id_cannot_be_taken_again(store: persist.Store) -> None:
    """The id of a stale stream cannot be taken again.

    A stream that took it would remove its own lease, and two streams could live.
    """
    (store.path / "s-3.json").write_text('{"messages": [], "active_stream_id": "X", "pending_user_message": null}')
    with pytest.raises(persist.InvalidArgument):
        store.start_stream("s-3", stream_id="X")
    with store.start_stream("s-3", stream_id="Y") as stream:
        assert store.load("s-3").clear_stale_stream() is False
        stream.finish()


def test_owner_of_an_older_epoch_is_fenced_off_though_its_id_is_used_again(
    store: persist.Store, session: persist.Session
) -> None:
    """A5: the caller may bring stream ids, which may repeat, but the epoch never does.

    Fails if the epoch is not compared.
    """
    old = store.start_stream("s-1", {"id": "p1", "content": "1"}, stream_id="run")
    store.cancel("s-1", "run", force=True)
    with store.start_stream("s-1", {"id": "p2", "content": "2"}, stream_id="run") as new:
        with pytest.raises(persist.StreamLost):
            old.finish({"id": "late", "content": "late"})
        new.finish({"id": "a2", "content": "answer"})
    with old:
        pass
    assert contents(store) == ["hi", "1", "2", "answer"]


# --- aliases and merging ----------------------------------------------------------------------------------------------


def test_object_that_stands_at_two_places_reverts_nobody(store: persist.Store, session: persist.Session) -> None:
    """A3: an object that stands at two places in `data` reverts no edit of another writer.

    After another writer has edited one of the places, a save without an edit writes nothing.
    """
    shared = {"id": "m2", "content": "a"}
    session.data["messages"].append(shared)
    session.data["first"] = shared
    session.save()
    store.update("s-1", lambda tx: tx.data["messages"][1].update(content="edited by another"))
    session.data["title"] = "t"
    session.save()
    revision = session.revision
    session.save()
    assert session.revision == store.load("s-1").revision == revision
    assert contents(store) == ["hi", "edited by another"]
    assert store.load("s-1").data["first"] == {"id": "m2", "content": "a"}


def test_clear_keeps_unsaved_edits(store: persist.Store, session: persist.Session) -> None:
    """A clear brings the committed state into memory and keeps unsaved edits, even one that contradicts the clear."""
    stream = store.start_stream("s-1", {"id": "p", "content": "Why?"})
    session.refresh()
    stream._lease.close()
    other = store.load("s-1")
    session.data["title"] = "unsaved"
    other.data["messages"][1]["interrupted"] = "mine"
    assert session.clear_stale_stream() is True
    assert (session.data["title"], session.active_stream_id) == ("unsaved", None)
    session.save()
    assert store.load("s-1").data["title"] == "unsaved"
    assert other.clear_stale_stream() is False


def test_mixed_base_is_not_taken_for_the_content_of_its_commit(tmp_path: Path) -> None:
    """A save does not find its changes against the mixed base that a clear leaves beside a contradicting edit.

    That base is of two commits, and an older copy of the session may have been put back since. Fails if the changes are
    found against it, because the record would not fit the files.
    """
    store = persist.Store(tmp_path / "sessions", journal="always")
    store.create("s", {"messages": [{"id": "m1"}]})
    stream = store.start_stream("s", {"id": "p", "content": "Why?"})
    session = store.load("s")
    shutil.copytree(store.path, tmp_path / "copy")
    stream._lease.close()
    session.data["messages"][1]["interrupted"] = "mine"
    assert session.clear_stale_stream() is True
    for path in store.path.glob("s.*"):
        path.unlink()
    for path in (tmp_path / "copy").glob("s.*"):
        shutil.copy(path, store.path)
    session.data["messages"].append({"id": "m2"})
    session.save()
    there = persist.Store(store.path).load("s")
    assert there.data == store.load("s").data == session.data
    assert [message["id"] for message in there.data["messages"]] == ["m1", "p", "m2"]
    assert there.data["messages"][1]["interrupted"] == "mine"
    assert there.active_stream_id == stream.id


def test_clear_shows_what_it_changed_and_looks_at_nothing_else(store: persist.Store, session: persist.Session) -> None:
    """A clear shows only what it changed, and so costs only that.

    Fails if all of `data` is encoded to show it, because the set in it is refused.
    """
    stream = store.start_stream("s-1", {"id": "p", "content": "Why?"})
    session.refresh()
    stream._lease.close()
    first, prompt = session.data["messages"][0], session.data["messages"][-1]
    session.data["pinned"] = prompt
    session.data["draft"] = {1, 2}
    assert session.clear_stale_stream() is True
    assert (session.active_stream_id, session.data["pending_user_message"]) == (None, None)
    assert session.data["messages"][0] is first
    assert session.data["messages"][-1] == {"id": "p", "content": "Why?", "interrupted": True}
    # The clear does not change an object of `data` at a place that it did not mean.
    assert session.data["pinned"] == {"id": "p", "content": "Why?"}
    del session.data["draft"], session.data["pinned"]
    assert session.data == store.load("s-1").data
    revision = session.revision
    session.save()
    assert session.revision == store.load("s-1").revision == revision


def test_clear_shows_the_stream_gone_even_beside_a_contradiction(
    store: persist.Store, session: persist.Session
) -> None:
    """A clear takes the stream fields from the disk. The next save reports an edit that contradicts the clear."""
    stream = store.start_stream("s-1", {"id": "p", "content": "Why?"})
    session.refresh()
    stream._lease.close()
    session.data["messages"][1]["interrupted"] = "mine"
    assert session.clear_stale_stream() is True
    assert session.active_stream_id is None
    assert session.data["messages"][1]["interrupted"] == "mine"
    with pytest.raises(persist.MergeConflict):
        session.save()


# --- exceptions -------------------------------------------------------------------------------------------------------


def interrupt(*_arguments: object, **_named: object) -> None:
    raise KeyboardInterrupt


def interrupt_behind(patched: pytest.MonkeyPatch, step: str) -> None:
    """Make Ctrl-C come while a step is with the disk, which still carries out the step."""
    real = getattr(disk, step)

    def cut(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        raise KeyboardInterrupt

    patched.setattr(disk, step, cut)


def cut_off(session: persist.Session, step: str, *, is_done: bool) -> None:
    """Save, and make Ctrl-C come at a step of the disk, or after it."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if is_done:
            interrupt_behind(patched, step)
        else:
            patched.setattr(disk, step, interrupt)
        session.save()


STEPS = [
    *[("never", step) for step in ("create", "write", "sync", "replace", "sync_directory")],
    *[("always", step) for step in ("write_at", "sync_data")],
]
#: After these steps the commit is visible.
IS_VISIBLE = {("never", "replace"), ("never", "sync_directory"), ("always", "write_at"), ("always", "sync_data")}
VERBS: dict[str, Callable[[persist.Session], object]] = {
    "save": persist.Session.save,
    "refresh": persist.Session.refresh,
    "clear": persist.Session.clear_stale_stream,
}


@pytest.fixture(params=["never", "always"])
def journal(request: pytest.FixtureRequest) -> Mode:
    found: Mode = request.param
    return found


def appending(directory: Path, journal: Mode) -> persist.Session:
    """Return an object of a session with a dead stream, whose edit counts twice if it is made twice."""
    store = persist.Store(directory, journal=journal, merge={"n": "sum"})
    store.create("s-1", {"n": 5, "messages": [{"content": "hi"}]})
    stream = store.start_stream("s-1")
    stream._lease.close()
    session = store.load("s-1")
    session.data["n"] += 1
    session.data["messages"].append({"content": "no id"})
    return session


@pytest.mark.parametrize("is_done", [False, True], ids=["at", "behind"])
@pytest.mark.parametrize(("journal", "step"), STEPS)
@pytest.mark.parametrize("verb", list(VERBS))
def test_save_that_was_cut_off_counts_once(
    directory: Path, journal: Mode, step: str, verb: str, *, is_done: bool
) -> None:
    """An edit counts once after Ctrl-C at any step of its save, any next verb, and the same save again.

    The disk is at the old revision or at the new one, and the lock is free. Fails if the object does not look for its
    own commit.
    """
    session = appending(directory, journal)
    cut_off(session, step, is_done=is_done)
    impatient = persist.Store(directory, journal=journal, timeout_s=0.0)
    there = impatient.load("s-1")
    if is_done and (journal, step) in IS_VISIBLE:
        assert (there.revision, there.data["n"]) == (session.revision + 1, 6)
    assert (there.revision - session.revision, there.data["n"]) in ((0, 5), (1, 6))
    VERBS[verb](session)
    assert [each["content"] for each in session.data["messages"]] == ["hi", "no id"]
    session.save()
    impatient.append("s-1", "log", "the lock is free")
    session.save()
    for data in (session.data, persist.Store(directory).load("s-1").data):
        assert (data["n"], [each["content"] for each in data["messages"]]) == (6, ["hi", "no id"])
        assert data["log"] == ["the lock is free"]
        assert (data["active_stream_id"] is None) is (verb == "clear")


@pytest.mark.parametrize("is_done", [False, True], ids=["at", "behind"])
@pytest.mark.parametrize(("journal", "step"), STEPS)
@pytest.mark.parametrize("verb", list(VERBS))
def test_save_that_was_cut_off_under_the_commit_of_another_is_told(
    directory: Path, journal: Mode, step: str, verb: str, *, is_done: bool
) -> None:
    """Every verb says to load anew, and writes nothing, if another commit hides whether the cut-off save was made.

    Fails if the object takes what it finds for its base, or merges its edit into it again.
    """
    session = appending(directory, journal)
    stream_id = session.active_stream_id
    cut_off(session, step, is_done=is_done)
    other = persist.Store(directory, journal=journal, timeout_s=0.0)
    other.append("s-1", "messages", {"content": "theirs"})
    before = other.load("s-1")
    for call in (VERBS[verb], *VERBS.values()):
        with pytest.raises(persist.MergeConflict, match="load the session anew"):
            call(session)
    after = other.load("s-1")
    assert (after.revision, after.data) == (before.revision, before.data)
    is_there = is_done and (journal, step) in IS_VISIBLE
    assert [each["content"] for each in after.data["messages"]] in (
        [["hi", "no id", "theirs"]] if is_there else [["hi", "theirs"], ["hi", "no id", "theirs"]]
    )
    anew = other.load("s-1")
    assert anew.active_stream_id == stream_id
    assert anew.clear_stale_stream() is True


def test_edits_made_after_a_save_was_cut_off_are_saved_by_the_next(directory: Path, journal: Mode) -> None:
    """The object tells its cut-off save from later edits: it stores the first once, and saves the others."""
    session = appending(directory, journal)
    cut_off(session, "replace" if journal == "never" else "sync_data", is_done=True)
    session.data["messages"].append({"content": "since"})
    session.data["n"] += 1
    session.save()
    assert session.data == persist.Store(directory).load("s-1").data
    assert session.data["n"] == 7
    assert [each["content"] for each in session.data["messages"]] == ["hi", "no id", "since"]


def test_save_that_was_refused_may_be_repeated_under_the_commit_of_another(
    directory: Path, journal: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`CommitFailed` says that nothing was written. So the same save merges, even if another commit has come since."""
    session = appending(directory, journal)
    with monkeypatch.context() as patched, pytest.raises(persist.CommitFailed):
        patched.setattr(disk, "write_at" if journal == "always" else "write", full_disk)
        session.save()
    persist.Store(directory, journal=journal).append("s-1", "messages", {"content": "theirs"})
    session.save()
    found = persist.Store(directory).load("s-1").data
    assert found["n"] == 6
    assert sorted(each["content"] for each in found["messages"]) == ["hi", "no id", "theirs"]


def full_disk(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")


def edit_behind(patched: pytest.MonkeyPatch, step: str, edit: Callable[[], object]) -> None:
    """Edit in the middle of a save, after it has encoded its content, like another task of an event loop."""
    real = getattr(disk, step)

    def edited(*arguments: Any) -> None:
        real(*arguments)
        edit()

    patched.setattr(disk, step, edited)


def test_edit_behind_the_encoding_is_dirty_for_the_next_save(
    directory: Path, journal: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save writes what it has encoded, and the next save stores any later edit."""
    session = appending(directory, journal)
    other = persist.Store(directory, journal=journal)
    other.append("s-1", "messages", {"content": "theirs"})

    def edit() -> None:
        session.data["messages"].append({"content": "late"})
        session.data["title"] = "late"

    with monkeypatch.context() as patched:
        edit_behind(patched, "replace" if journal == "never" else "sync_data", edit)
        session.save()
    there = other.load("s-1").data
    assert sorted(each["content"] for each in there["messages"]) == ["hi", "no id", "theirs"]
    assert "title" not in there
    assert session.data["title"] == "late"
    session.save()
    there = other.load("s-1").data
    assert there == session.data
    assert sorted(each["content"] for each in there["messages"]) == ["hi", "late", "no id", "theirs"]


def test_edit_made_while_a_save_merges_contradicts_what_it_brings(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save reports a conflict if a save brings another writer's title while another task sets one."""
    store.update("s-1", lambda tx: tx.data.update(title="theirs"))
    session.data["messages"].append({"id": "mine", "content": "mine"})
    with monkeypatch.context() as patched:
        edit_behind(patched, "replace", lambda: session.data.update(title="meanwhile"))
        session.save()
    with pytest.raises(persist.MergeConflict):
        session.save()
    assert (session.data["title"], store.load("s-1").data["title"]) == ("meanwhile", "theirs")
    assert contents(store) == ["hi", "mine"]


def test_refresh_keeps_nobody_from_the_lock(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads for `refresh`, however long, does not delay another thread's save of the same object.

    Fails if the file is read inside the object's guard. Where folds follow one another, the reader waits there for the
    lock, which the saver holds while it waits for the guard.
    """
    is_reading, go_on = threading.Event(), threading.Event()
    real = disk.read_version

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name == "refresher" and not is_reading.is_set():
            is_reading.set()
            assert go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(disk, "read_version", slow)
    refresher = threading.Thread(target=session.refresh, name="refresher")
    refresher.start()
    assert is_reading.wait(20)
    session.data["title"] = "mine"
    saver = threading.Thread(target=session.save)
    saver.start()
    saver.join(10)
    has_saved = not saver.is_alive()
    go_on.set()
    for thread in (refresher, saver):
        thread.join(20)
    assert has_saved
    assert (session.revision, session.data["title"]) == (2, "mine")


def test_save_that_was_cut_off_is_made_durable_before_it_is_acknowledged(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retry finds its own commit visible, and syncs it, because it cannot trust that it was synced."""
    session.data["title"] = "mine"
    cut_off(session, "sync_directory", is_done=False)
    synced: list[str] = []
    real = disk.sync_directory

    def sync_directory(path: str, *opened: int) -> None:
        synced.append(path)
        real(path, *opened)

    monkeypatch.setattr(disk, "sync_directory", sync_directory)
    session.save()
    assert synced == [str(store.path)]


def test_equal_commit_of_another_is_not_taken_for_ones_own(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both changes count if the disk refuses a save, another object makes the same change, and the save is repeated.

    Equal items without ids that both append are one item, though.
    """
    adding = persist.Store(store.path, merge={"n": "sum"})
    mine, theirs = adding.load("s-1"), adding.load("s-1")
    for each in (mine, theirs):
        each.data["n"] += 1
        each.data["messages"].append({"content": "no id"})

    with monkeypatch.context() as patched, pytest.raises(persist.CommitFailed):
        patched.setattr(disk, "replace", full_disk)
        mine.save(touch=False)
    theirs.save(touch=False)
    mine.save(touch=False)
    assert store.load("s-1").data["n"] == 2
    assert contents(store) == ["hi", "no id"]


class Interrupting:
    """A tracer that raises KeyboardInterrupt at one line of the modules below."""

    def __init__(self, place: int) -> None:
        self.left = place

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(INTERRUPTED):
            return None
        if event in ("line", "return"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


#: The other modules are pure, or have `with table` in them. There a tracer can raise right before a block's exit, where
#: no signal comes through. `test_interrupts_leak_no_lock` sends signals there.
INTERRUPTED = tuple(
    f"persist/{name}.py"
    for name in ("session", "patch", "streams", "working_copy", "storage/transaction", "storage/commit")
)


def interrupted(call: Callable[[], object], place: int) -> bool:
    """Call a function, and make Ctrl-C come at the line of that number. Return whether there was one."""
    interrupting = Interrupting(place)
    before = sys.gettrace()
    try:
        sys.settrace(interrupting)
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupting.left <= 0


def told_to_load_anew(
    store: persist.Store, session: persist.Session, verb: Callable[[persist.Session], object]
) -> persist.Session | None:
    """Call a verb again.

    If the object says that its save cannot be known, load anew, as it says, and return the new one.
    """
    try:
        verb(session)
        session.refresh()
        session.save()
    except persist.MergeConflict as conflict:
        if "load the session anew" not in str(conflict):
            raise
        anew = store.load("s-1")
        if "mine" not in contents(store):
            anew.data["title"] = "mine"
            anew.data["messages"].append({"content": "mine"})
            anew.save()
        return anew
    return None


# An interrupt while a generator is closed reaches no caller.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "another-commits"])
@pytest.mark.parametrize("verb", list(VERBS))
def test_interrupt_at_any_line_doubles_nothing(verb: str, scratch: Path, *, is_alone: bool) -> None:
    """An item without an id is stored once after Ctrl-C at any line of a verb and a second call of that verb.

    After a commit of another writer the object may say that the outcome is unknown, and that it must be loaded anew.
    """
    place, is_told = 0, False
    while True:
        place += 1
        directory = scratch / f"{place}"
        store = persist.Store(directory, timeout_s=0.0)
        store.create("s-1", {"messages": [{"content": "hi"}], "notes": ["a", "b", "c"]})
        stream = store.start_stream("s-1")
        stream._lease.close()
        session = store.load("s-1")
        store.append("s-1", "messages", {"content": "theirs"})
        # A move is shown in two steps. Between them the item stands there twice.
        store.update("s-1", lambda tx: tx.list("notes").append(tx.list("notes").pop(0)))
        session.data["title"] = "mine"
        session.data["messages"].append({"content": "mine"})
        is_over = not interrupted(partial(VERBS[verb], session), place)
        expected = ["hi", "mine", "theirs"]
        # The next call takes the lock, or fails at once.
        store.stream("s-1")
        if not is_alone:
            store.append("s-1", "messages", {"content": "later"})
            expected = ["hi", "later", "mine", "theirs"]
        if (anew := told_to_load_anew(store, session, VERBS[verb])) is not None:
            is_told, session = True, anew
        assert sorted(contents(store)) == expected, f"after line {place}"
        assert session.data == store.load("s-1").data
        assert (session.data["title"], session.data["notes"]) == ("mine", ["b", "c", "a"])
        shutil.rmtree(directory)
        if is_over:
            break
    assert place > 200
    assert is_told is (verb == "save")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_at_any_line_of_a_finish_leaves_one_answer(scratch: Path) -> None:
    """After Ctrl-C at any line of `finish`, and `finish` again, the answer is stored once.

    The second call may also say that the stream has ended. Either way the next turn can start once the block is left.
    """
    prompt, answer = {"id": "p", "role": "user", "content": "?"}, {"id": "a", "role": "assistant", "content": "!"}
    place, is_over, lost = 0, False, 0
    while not is_over:
        place += 1
        store = persist.Store(scratch / f"{place}", timeout_s=0.0)
        store.create("s-1", {"messages": []})
        stream = store.start_stream("s-1", prompt)
        stream.checkpoint({**answer, "content": "…"})
        is_over = not interrupted(partial(stream.finish, answer), place)
        with stream, contextlib.suppress(persist.StreamLost):
            stream.finish(answer)
            lost -= 1
        lost += 1
        for each in (store, persist.Store(store.path)):
            assert each.load("s-1").data["messages"] == [prompt, answer], f"after line {place}"
            assert each.load("s-1").active_stream_id is None
        store.start_stream("s-1").finish()
        shutil.rmtree(store.path)
    assert place > 100
    assert 1 < lost < place


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_streaming", [False, True], ids=["store", "stream"])
def test_interrupt_at_any_line_of_a_transaction_is_all_or_nothing(scratch: Path, *, is_streaming: bool) -> None:
    """After Ctrl-C at any line of a transaction all changes of the block are stored, or none, and the lock is free."""

    def change(tx: persist.Transaction) -> None:
        tx.fields["title"] = "mine"
        tx.list("messages").append({"content": "mine"})
        tx.data["log"] = ["mine"]

    place, is_over, kept = 0, False, 0
    while not is_over:
        place += 1
        store = persist.Store(scratch / f"{place}", timeout_s=0.0)
        before = store.create("s-1", {"title": "", "messages": [], "log": []}).data
        stream = store.start_stream("s-1")
        verb = partial(stream.update, change) if is_streaming else partial(store.update, "s-1", change)
        is_over = not interrupted(verb, place)
        data = store.load("s-1").data
        assert data == persist.Store(store.path).load("s-1").data, f"after line {place}"
        found = data["title"], data["messages"], data["log"]
        assert found in (("", [], []), ("mine", [{"content": "mine"}], ["mine"])), f"after line {place}"
        kept += data["title"] != before["title"]
        store.append("s-1", "log", "free")
        stream.finish()
        shutil.rmtree(store.path)
    assert place > 100
    assert 1 < kept < place


def test_session_made_anew_is_not_cleared_by_an_old_object(store: persist.Store) -> None:
    """C1: a session of another incarnation is another session, even with the same id and the same stream id."""
    old = store.create("s-2", {"messages": []})
    first = store.start_stream("s-2", stream_id="run")
    old.refresh()
    store.delete("s-2", force=True)
    store.create("s-2", {"messages": []})
    second = store.start_stream("s-2", stream_id="run")
    for stream in (first, second):
        stream._lease.close()
    assert old.clear_stale_stream() is False
    assert store.load("s-2").active_stream_id == "run"


def test_saved_state_is_absorbed_once(store: persist.Store, session: persist.Session) -> None:
    """A refresh after a save that merged takes nothing of that save for new."""
    store.update("s-1", lambda tx: tx.data.update(tags=["t"]))
    session.data["messages"].append({"content": "mine"})
    session.save()
    session.refresh()
    session.save()
    assert session.data["tags"] == ["t"]
    assert contents(store) == ["hi", "mine"]


def test_lack_of_descriptors_is_no_unknown_commit(
    session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A commit that lacks descriptors between the rename and the sync ends well, or is refused before it is visible.

    A burst of connections may take all descriptors.
    """
    other = actor()
    other.do(
        """
import resource
from persist.storage import disk
from persist.storage.commit import Mode
from persist.storage.content import Content
real, eaten = disk.replace, []
def replace(source, target):
    real(source, target)
    try:
        while True:
            eaten.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
disk.replace = replace
"""
    )
    version = other.do("store.append('s-1', 'messages', {'content': 'no descriptor left'})")
    head = persist.Store(directory).head("s-1")
    assert (head.version, head.revision) == (version, 2)
    other.do("disk.replace = real\nfor fd in eaten: os.close(fd)")
    version = other.do("store.append('s-1', 'messages', {'content': 'some again'})")
    head = persist.Store(directory).head("s-1")
    assert (head.version, head.revision) == (version, 3)


def test_nothing_is_acknowledged_after_an_unknown_commit(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After CommitUnknown this store neither writes nor confirms that session. A new store may look again."""

    def broken(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    item = {"id": "m2", "content": "unknown"}
    with monkeypatch.context() as patched:
        patched.setattr(disk, "sync_directory", broken)
        with pytest.raises(persist.CommitUnknown):
            store.append("s-1", "messages", item)
    for verb in (
        lambda: store.append("s-1", "messages", item),
        lambda: store.update("s-1", lambda tx: None),
        lambda: store.delete("s-1"),
        session.save,
    ):
        with pytest.raises(persist.CommitUnknown):
            verb()
    assert persist.Store(store.path).append("s-1", "messages", item) == store.head("s-1").version
    assert store.head("s-1").revision == 2


def test_failed_sync_of_what_was_found_is_not_tried_again(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit whose sync failed, and that cannot be written anew, stays of unknown durability.

    A second fsync may say OK with the data gone.
    """
    item = {"id": "m2", "content": "visible"}
    store.append("s-1", "messages", item)

    def no_space(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    def broken(fd: int) -> None:
        raise disk.SyncFailed(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "sync", broken)
        patched.setattr(disk, "replace", no_space)
        with pytest.raises(persist.CommitUnknown):
            store.append("s-1", "messages", item)
    with pytest.raises(persist.CommitUnknown):
        store.append("s-1", "messages", item)
    assert persist.Store(store.path).append("s-1", "messages", item) == store.head("s-1").version
    assert store.head("s-1").revision == 2


@pytest.mark.parametrize("verb", ["save", "refresh and save"])
def test_what_others_committed_is_made_durable_before_it_is_acknowledged(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A save that finds its state on disk already syncs it, because its writer may have died before it could."""
    session.save()
    store.append("s-1", "messages", {"id": "m2", "content": "theirs"})
    synced: list[str] = []
    real = disk.sync_file

    def sync_file(path: str) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(disk, "sync_file", sync_file)
    if verb.startswith("refresh"):
        session.refresh()
    session.save()
    assert synced == [str(store.path / "s-1.json")]
    session.save()
    assert len(synced) == 1


def test_failed_removal_of_a_stale_lease_does_not_lock_the_session(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream exists once its claim is committed, even if the lease of its predecessor cannot be removed."""
    stale = store.start_stream("s-1")
    stale._lease.close()
    real = disk.unlink

    def refuse(path: str) -> bool:
        if str(path).endswith(stale.id):
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "unlink", refuse)
        stream = store.start_stream("s-1")
    stream.finish()
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert list((store.path / ".leases").iterdir()) == []


# --- threads, signal handlers and forks -------------------------------------------------------------------------------


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("others", [("refresh",), ("save",), ("refresh", "save", "refresh")], ids="-".join)
def test_save_and_refresh_of_one_object_exclude_each_other(
    store: persist.Store, session: persist.Session, others: tuple[str, ...]
) -> None:
    """Threads save and refresh one object at once, while others commit. An item without an id counts once.

    Fails without the object's guard.
    """
    for n in range(40):
        # The edits come between the verbs, because the object is for one thread at a time.
        session.data["messages"].append({"content": f"mine-{n}"})
        session.data["n"] += 1
        in_threads(
            session.save,
            *[getattr(session, verb) for verb in others],
            partial(store.append, "s-1", "messages", {"content": f"theirs-{n}"}),
        )
    session.refresh()
    session.save()
    assert session.data == store.load("s-1").data
    assert session.data["n"] == 40
    expected = ["hi", *(f"{whose}-{n}" for n in range(40) for whose in ("mine", "theirs"))]
    assert sorted(contents(store)) == sorted(expected)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(("first", "second"), [("save", "refresh"), ("refresh", "save"), ("refresh", "refresh")])
def test_verb_waits_for_the_one_that_is_inside(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """The second thread begins when the first one has ended. Fails without the object's guard."""
    store.append("s-1", "messages", {"content": "theirs"})
    session.data["messages"].append({"content": "mine"})
    inside, go_on, steps = threading.Event(), threading.Event(), list[str]()
    real = content_merge.merge_contents

    def slow(*arguments: Any) -> Content:
        name = threading.current_thread().name
        steps.append(f"{name} begins")
        if name == "first":
            inside.set()
            assert go_on.wait(DEADLINE_S)
        merged = real(*arguments)
        steps.append(f"{name} ends")
        return merged

    monkeypatch.setattr(session_module, "merge_contents", slow)
    threads = [
        threading.Thread(target=getattr(session, verb), name=name)
        for verb, name in ((first, "first"), (second, "second"))
    ]
    threads[0].start()
    assert inside.wait(DEADLINE_S)
    threads[1].start()
    # The second thread gets time to do wrong. The steps prove that it did not.
    threads[1].join(0.1)
    go_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert steps[:2] == ["first begins", "first ends"]
    session.save()
    assert contents(store) == ["hi", "theirs", "mine"]
    assert session.data == store.load("s-1").data


@pytest.mark.usefixtures("switching")
def test_objects_of_their_own_lose_nothing_in_threads(store: persist.Store, session: persist.Session) -> None:
    """A3, A12: threads that each save an object of their own, and one that appends, lose nothing.

    All items are stored once, in their writer's order.
    """

    def saver(name: str) -> None:
        own = store.load("s-1")
        for n in range(40):
            own.data["messages"].append({"content": f"{name}-{n}"})
            own.data[name] = n
            own.save()

    def appender() -> None:
        for n in range(40):
            store.append("s-1", "messages", {"content": f"c-{n}"})

    in_threads(partial(saver, "a"), partial(saver, "b"), appender)
    found = contents(store)
    for name in "abc":
        assert [each for each in found if each.startswith(f"{name}-")] == [f"{name}-{n}" for n in range(40)]
    assert len(found) == 121
    there = store.load("s-1").data
    assert (there["a"], there["b"]) == (39, 39)


@pytest.mark.parametrize("verb", ["save", "refresh"])
@pytest.mark.parametrize("inner", ["save", "refresh", "clear_stale_stream"])
def test_verb_in_the_middle_of_one_is_refused(
    verb: str, inner: str, store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verb in the middle of another verb of the object is refused, as in a signal handler or a finaliser.

    The outer verb would go on with a base that is no longer that of `data`. Fails (messages are doubled) if the thread
    that is inside comes in once more.
    """
    store.append("s-1", "messages", {"content": "other"})
    session.data["messages"].append({"content": "mine"})
    real, tried = content_merge.merge_contents, list[bool]()

    def merge_contents(*arguments: Any) -> Content:
        merged = real(*arguments)
        if not tried:
            tried.append(True)
            with pytest.raises(persist.LockError):
                getattr(session, inner)()
        return merged

    monkeypatch.setattr(session_module, "merge_contents", merge_contents)
    getattr(session, verb)()
    session.save()
    assert tried
    assert contents(store) == ["hi", "other", "mine"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX only")
# Python 3.12 warns at a fork that there is another thread, which is wanted here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("verb", ["save", "refresh"])
def test_child_forked_while_another_thread_is_inside_waits_for_nobody(
    verb: str, store: persist.Store, session: persist.Session
) -> None:
    """E2: a forked child does not wait for a thread of its parent, and treats that thread's verb as cut off.

    Fails (its alarm ends the child) if the child waits for the lock that it inherited.
    """
    session.data["messages"].append({"content": "mine"})
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with session._alone():
            inside.set()
            leave.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(DEADLINE_S)
    child = os.fork()
    if child == 0:
        signal.alarm(int(DEADLINE_S))
        getattr(session, verb)()
        session.save()
        os._exit(session.data != persist.Store(store.path).load("s-1").data)
    leave.set()
    thread.join(DEADLINE_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(store) == ["hi", "mine"]
    session.data["messages"].pop()
    session.refresh()
    assert [each["content"] for each in session.data["messages"]] == ["hi", "mine"]
