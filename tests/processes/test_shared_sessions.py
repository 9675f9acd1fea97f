"""One Session object in several hands: threads that share it, exceptions that cut its verbs off, and what others
commit.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from actors import DEADLINE_S
from conftest import ActorFactory

import persist
from persist import merge
from persist import session as session_module
from persist.storage import disk


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "Shared", "n": 0, "messages": [{"id": "m1", "role": "user", "content": "hi"}]})


def contents(store: persist.Store) -> list[str]:
    return [message["content"] for message in store.load("s-1").data["messages"]]


def in_threads(*works: Callable[[], None]) -> None:
    """Run them at once, from a barrier; an exception of one is raised here."""
    barrier, errors = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[], None]) -> None:
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
    """A1 (#1533) by other means: whatever a save prefers at conflicts, stream fields come from the disk."""
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
    """A policy could say "mine" for ever; so there is none for them."""
    with pytest.raises(persist.ReservedField):
        persist.Store(store.path, merge={"active_stream_id": "mine"})


def test_save_that_prefers_mine_keeps_the_running_turn(store: persist.Store, session: persist.Session) -> None:
    """B2, B3: a truncation that others made, and a turn that runs on it, are not undone by preferring mine."""
    session.data["messages"].append({"id": "note", "content": "note"})
    store.update("s-1", lambda data: data["messages"].clear(), if_revision=1)
    with store.start_stream("s-1", {"role": "user", "content": "Why?"}) as stream:
        session.save(on_conflict="mine")
        stream.finish({"role": "assistant", "content": "Because."})
    assert contents(store) == ["Why?", "note", "Because."]


def test_messages_cannot_be_made_something_else_in_a_turn(store: persist.Store) -> None:
    """A turn can always be ended: `messages` stays a list while it runs, and even if it does not."""
    session = store.create("s-2", {"messages": []})
    stream = store.start_stream("s-2")
    session.refresh()
    session.data["messages"] = "oops"
    with pytest.raises(persist.WrongType):
        session.save()
    with store.edit("s-2") as data:
        data["messages"] = "oops"
    stream.fail()
    assert store.load("s-2").active_stream_id is None


def test_stale_id_cannot_be_taken_again(store: persist.Store) -> None:
    """A stream that took the id of the dead one would remove its own lease, and two could live."""
    (store.path / "s-3.json").write_text('{"messages": [], "active_stream_id": "X", "pending_user_message": null}')
    with pytest.raises(persist.InvalidStreamId):
        store.start_stream("s-3", stream_id="X")
    with store.start_stream("s-3", stream_id="Y") as stream:
        assert store.load("s-3").clear_stale_stream() is False
        stream.finish()


def test_owner_of_an_older_epoch_is_fenced_off_though_its_id_is_used_again(
    store: persist.Store, session: persist.Session
) -> None:
    """A5: ids may be brought by the caller and repeat; the epoch does not. Fails with the epoch not compared."""
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
    """A3: after another writer has edited one of the places, a save without an edit writes nothing."""
    shared = {"id": "m2", "content": "a"}
    session.data["messages"].append(shared)
    session.data["first"] = shared
    session.save()
    store.update("s-1", lambda data: data["messages"][1].update(content="edited by another"))
    session.data["title"] = "t"
    session.save()
    revision = session.revision
    session.save()
    assert session.revision == store.load("s-1").revision == revision
    assert contents(store) == ["hi", "edited by another"]
    assert store.load("s-1").data["first"] == {"id": "m2", "content": "a"}


def test_clear_keeps_unsaved_edits(store: persist.Store, session: persist.Session) -> None:
    """A clear brings the committed state into memory, and unsaved edits with it; one that contradicts it too."""
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


def test_clear_shows_the_stream_gone_even_beside_a_contradiction(
    store: persist.Store, session: persist.Session
) -> None:
    """The stream fields are from the disk; the edit that contradicts the clear is reported by the next save."""
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


@pytest.mark.parametrize("step", ["create", "write", "sync", "replace", "sync_directory"])
def test_save_that_was_cut_off_can_be_repeated(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Ctrl-C at any step of a save, and the same save again: what was appended without an id stands there once."""
    session.data["messages"].append({"content": "no id"})

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(disk, step, interrupt)
        session.save()
    session.save()
    assert contents(store) == ["hi", "no id"]
    assert session.revision == 2
    session.refresh()
    assert [message["content"] for message in session.data["messages"]] == ["hi", "no id"]


@pytest.mark.parametrize("verb", ["save", "refresh", "clear"])
def test_save_that_was_cut_off_is_recognised_under_later_commits(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Ctrl-C after the rename, then a commit of somebody else, then the same object again: nothing is doubled."""
    if verb == "clear":
        stream = store.start_stream("s-1")
        stream._lease.close()
        session.refresh()
    session.data["messages"].append({"content": "no id"})

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(disk, "sync_directory", interrupt)
        session.save()
    store.update("s-1", lambda data: data.update(title="on top"))
    {"save": session.save, "refresh": session.refresh, "clear": session.clear_stale_stream}[verb]()
    session.save()
    assert contents(store) == ["hi", "no id"]
    assert session.data["title"] == store.load("s-1").data["title"] == "on top"


def interrupt_behind(patched: pytest.MonkeyPatch, step: str, *more: str) -> None:
    """Ctrl-C comes while a step is with the disk, and what was asked of it is done.

    Then while the next one is, and so on.
    """
    real = getattr(disk, step)

    def cut(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        if more:
            interrupt_behind(patched, *more)
        raise KeyboardInterrupt

    patched.setattr(disk, step, cut)


@pytest.mark.parametrize(
    ("journal", "step"),
    [("never", "replace"), ("never", "sync_directory"), ("always", "write_at"), ("always", "sync_data")],
)
def test_save_that_was_cut_off_behind_a_step_is_recognised(
    directory: Path, monkeypatch: pytest.MonkeyPatch, journal: Any, step: str
) -> None:
    """Ctrl-C, a commit of somebody else, and the same save again: it counts once.

    Fails without the look at what is there.
    """
    store = persist.Store(directory, journal=journal, merge={"n": "sum"})
    session = store.create("s-1", {"n": 5, "messages": []})
    session.data["n"] += 1
    session.data["messages"].append({"content": "no id"})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_behind(patched, step)
        session.save()
    other = store.load("s-1")
    other.data["messages"].append({"content": "theirs"})
    other.save()
    session.save()
    assert store.load("s-1").data == session.data == {"n": 6, "messages": [{"content": "no id"}, {"content": "theirs"}]}


@pytest.mark.parametrize(("journal", "step"), [("never", "replace"), ("always", "write_at")])
def test_save_of_which_nobody_can_tell_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, journal: Any, step: str
) -> None:
    """A second Ctrl-C, in the look at what is there: the object is not saved over the commits of others.

    Alone, it is.
    """
    store = persist.Store(directory, journal=journal)
    sessions = [store.create(f"s-{number}", {"messages": []}) for number in (1, 2)]
    for session in sessions:
        session.data["messages"].append({"content": "no id"})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            interrupt_behind(patched, step, "read")
            session.save()
    store.append("s-2", "messages", {"content": "theirs"})
    with pytest.raises(persist.MergeConflict, match="nobody can tell"):
        sessions[1].save()
    sessions[0].save()
    assert contents(store) == ["no id"]
    assert [each["content"] for each in store.load("s-2").data["messages"]] == ["no id", "theirs"]


def test_edit_made_while_a_save_merges_contradicts_what_it_brings(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's title comes with a save, and another thread sets one meanwhile: the next save says so."""
    store.update("s-1", lambda data: data.update(title="theirs"))
    session.data["messages"].append({"id": "mine", "content": "mine"})
    real = disk.replace

    def set_meanwhile(*arguments: Any) -> None:
        real(*arguments)
        session.data["title"] = "meanwhile"

    with monkeypatch.context() as patched:
        patched.setattr(disk, "replace", set_meanwhile)
        session.save()
    with pytest.raises(persist.MergeConflict):
        session.save()
    assert (session.data["title"], store.load("s-1").data["title"]) == ("meanwhile", "theirs")
    assert contents(store) == ["hi", "mine"]


def test_refresh_keeps_nobody_from_the_lock(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads for `refresh`, for however long, does not hold up another's save of the same object.

    Fails when the file is read inside the object's guard: where folds follow one another it waits for the lock there,
    which the saver holds, while that waits for the guard.
    """
    is_reading, go_on = threading.Event(), threading.Event()
    real = disk.read

    def slow(*arguments: Any) -> bytes:
        if threading.current_thread().name == "refresher" and not is_reading.is_set():
            is_reading.set()
            assert go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(disk, "read", slow)
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
    """The retry finds its own commit visible, and may not trust that it was synced."""
    session.data["title"] = "mine"

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(disk, "sync_directory", interrupt)
        session.save()
    synced: list[Path] = []
    real = disk.sync_directory

    def sync_directory(path: Path, *opened: int) -> None:
        synced.append(path)
        real(path, *opened)

    monkeypatch.setattr(disk, "sync_directory", sync_directory)
    session.save()
    assert synced == [store.path]


def test_equal_commit_of_another_is_not_taken_for_ones_own(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that the disk refused, then the very same change by another object, then the save again: both count."""
    adding = persist.Store(store.path, merge={"n": "sum"})
    mine, theirs = adding.load("s-1"), adding.load("s-1")
    for each in (mine, theirs):
        each.data["n"] += 1
        each.data["messages"].append({"content": "no id"})

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(persist.CommitFailed):
        patched.setattr(disk, "replace", full)
        mine.save(touch=False)
    theirs.save(touch=False)
    mine.save(touch=False)
    assert store.load("s-1").data["n"] == 2
    assert contents(store) == ["hi", "no id", "no id"]


class Interrupting:
    """Raises KeyboardInterrupt at one line of the modules where an object's memory is brought up to date."""

    def __init__(self, place: int) -> None:
        self.left = place

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(("persist/session.py", "persist/merge.py")):
            return None
        if event in ("line", "return"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


# One that comes while a generator is closed goes to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", ["save", "refresh", "clear"])
def test_interrupt_at_any_line_doubles_nothing(verb: str, scratch: Path) -> None:
    """Ctrl-C wherever it hits, then a commit of somebody else: when the verb is called again, what was appended without
    an id, here or there, stands there once."""
    place = 0
    while True:
        place += 1
        store = persist.Store(scratch / f"{place}")
        store.create("s-1", {"messages": [{"content": "hi"}]})
        stream = store.start_stream("s-1")
        stream._lease.close()
        session = store.load("s-1")
        store.append("s-1", "messages", {"content": "theirs"})
        session.data["title"] = "mine"
        session.data["messages"].append({"content": "mine"})
        call = {"save": session.save, "refresh": session.refresh, "clear": session.clear_stale_stream}[verb]
        interrupting = Interrupting(place)
        before = sys.gettrace()
        try:
            sys.settrace(interrupting)
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        store.append("s-1", "messages", {"content": "later"})
        call()
        session.refresh()
        session.save()
        assert sorted(contents(store)) == ["hi", "later", "mine", "theirs"], f"after line {place}"
        assert session.data == store.load("s-1").data
        assert session.data["title"] == "mine"
        shutil.rmtree(store.path)
        if interrupting.left > 0:
            break
    assert place > 50


def test_session_made_anew_is_not_cleared_by_an_old_object(store: persist.Store) -> None:
    """C1: the same id, and even the same stream id, of another incarnation are another session."""
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
    """A save that merged, and then a refresh: nothing of it is taken for new."""
    store.update("s-1", lambda data: data.update(tags=["t"]))
    session.data["messages"].append({"content": "mine"})
    session.save()
    session.refresh()
    session.save()
    assert session.data["tags"] == ["t"]
    assert contents(store) == ["hi", "mine"]


def test_lack_of_descriptors_is_no_unknown_commit(session: persist.Session, actor: ActorFactory) -> None:
    """A burst of connections between the rename and the sync: the commit ends well,
    or is refused before it is visible.
    """
    other = actor()
    other.do(
        """
import resource
from persist.storage import disk
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
    assert other.do("store.append('s-1', 'messages', {'content': 'no descriptor left'})") == 2
    other.do("disk.replace = real\nfor fd in eaten: os.close(fd)")
    assert other.do("store.append('s-1', 'messages', {'content': 'some again'})") == 3


def test_nothing_is_acknowledged_after_an_unknown_commit(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After CommitUnknown this store neither writes nor confirms that session; a new store may look again."""

    def broken(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    item = {"id": "m2", "content": "unknown"}
    with monkeypatch.context() as patched:
        patched.setattr(disk, "sync_directory", broken)
        with pytest.raises(persist.CommitUnknown):
            store.append("s-1", "messages", item)
    for verb in (
        lambda: store.append("s-1", "messages", item),
        lambda: store.update("s-1", lambda data: None),
        lambda: store.delete("s-1"),
        session.save,
    ):
        with pytest.raises(persist.CommitUnknown):
            verb()
    assert persist.Store(store.path).append("s-1", "messages", item) == 2


def test_failed_sync_of_what_was_found_is_not_tried_again(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync may say OK with the data gone: what cannot be written anew is of unknown durability from
    then on.
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
    assert persist.Store(store.path).append("s-1", "messages", item) == 2


@pytest.mark.parametrize("verb", ["save", "refresh and save"])
def test_what_others_committed_is_made_durable_before_it_is_acknowledged(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A save that finds its state on disk already syncs it: its writer may have died before it could."""
    session.save()
    store.append("s-1", "messages", {"id": "m2", "content": "theirs"})
    synced: list[Path] = []
    real = disk.sync_file

    def sync_file(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(disk, "sync_file", sync_file)
    if verb.startswith("refresh"):
        session.refresh()
    session.save()
    assert synced == [store.path / "s-1.json"]
    session.save()
    assert len(synced) == 1


def test_failed_removal_of_a_stale_lease_does_not_lock_the_session(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the claim is committed the stream exists: a left-over lease of its predecessor is no reason to lose it."""
    stale = store.start_stream("s-1")
    stale._lease.close()
    real = disk.unlink

    def refuse(path: Path) -> bool:
        if path.name.endswith(stale.id):
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "unlink", refuse)
        stream = store.start_stream("s-1")
    stream.finish()
    assert store.clear_stale_streams() == []
    assert list((store.path / ".leases").iterdir()) == []


# --- threads ----------------------------------------------------------------------------------------------------------


def test_items_appended_while_a_save_runs_are_saved_by_the_next(store: persist.Store, session: persist.Session) -> None:
    """Threads share one object: one saves without rest, one appends, another process's commits come in between."""
    done = threading.Event()

    def saver() -> None:
        while not done.is_set():
            session.save()

    def appender() -> None:
        try:
            for n in range(300):
                session.data["messages"].append({"id": f"mine-{n}", "content": "x"})
                if n % 10 == 0:
                    store.append("s-1", "messages", {"id": f"theirs-{n}", "content": "y"})
        finally:
            done.set()

    in_threads(saver, appender)
    session.save()
    ids = Counter(message["id"] for message in store.load("s-1").data["messages"])
    expected = {"m1"} | {f"mine-{n}" for n in range(300)} | {f"theirs-{n}" for n in range(0, 300, 10)}
    assert ids == Counter(expected)


def test_fields_set_while_a_save_merges_do_not_disturb_it(store: persist.Store, session: persist.Session) -> None:
    """New keys appear in `data` all the time while saves merge what others commit."""
    done = threading.Event()

    def setter() -> None:
        n = 0
        while not done.is_set():
            n += 1
            session.data[f"new-{n % 500}"] = n
            if n % 500 == 0:
                for key in [key for key in list(session.data) if key.startswith("new-")]:
                    del session.data[key]

    def saver() -> None:
        try:
            for n in range(60):
                store.update("s-1", lambda data, n=n: data.update(theirs=n))  # type: ignore[misc]
                session.save(on_conflict="mine")
        finally:
            done.set()

    in_threads(setter, saver)
    session.save(on_conflict="mine")
    assert store.load("s-1").data["theirs"] == 59


def test_what_is_saved_is_one_state_of_the_data(store: persist.Store, session: persist.Session) -> None:
    """A list that another thread turns round and round is committed as it was at one instant: no item twice, none
    missing.
    """
    ring, done = session.data["messages"], threading.Event()
    ring[:] = [{"id": n} for n in range(1000)]
    session.save()

    def turner() -> None:
        while not done.is_set():
            ring.insert(0, ring.pop())

    def saver() -> None:
        try:
            for n in range(80):
                session.data["n"] = n
                session.save()
                ids = [item["id"] for item in store.load("s-1").data["messages"]]
                sizes.add((len(ids), len(set(ids))))
        finally:
            done.set()

    sizes: set[tuple[int, int]] = set()
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        in_threads(turner, saver)
    finally:
        sys.setswitchinterval(switching)
    # 999: seen between the taking out and the putting in.
    assert sizes <= {(999, 999), (1000, 1000)}


def test_refresh_beside_save_doubles_nothing(store: persist.Store, session: persist.Session) -> None:
    """Two threads, one object: one refreshes, one appends without an id and saves."""
    done = threading.Event()

    def refresher() -> None:
        while not done.is_set():
            session.refresh()

    def saver() -> None:
        try:
            for n in range(150):
                session.data["messages"].append({"content": str(n)})
                session.save()
        finally:
            done.set()

    in_threads(refresher, saver)
    assert contents(store) == ["hi", *map(str, range(150))]


@pytest.mark.parametrize("verb", ["save", "refresh"])
@pytest.mark.parametrize("inner", ["save", "refresh", "clear_stale_stream"])
def test_verb_in_the_middle_of_one_is_refused(
    verb: str, inner: str, store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal handler does it, or a finaliser: the outer one would go on with a base that is no longer that of
    `data`.

    Fails (messages are doubled) if the thread that is inside comes in once more.
    """
    store.append("s-1", "messages", {"content": "other"})
    session.data["messages"].append({"content": "mine"})
    real, tried = session_module._merge_data, list[bool]()

    def merge_data(*args: Any) -> dict[str, Any]:
        merged = real(*args)
        if not tried:
            tried.append(True)
            with pytest.raises(persist.NestedLock):
                getattr(session, inner)()
        return merged

    monkeypatch.setattr(session_module, "_merge_data", merge_data)
    getattr(session, verb)()
    session.save()
    assert tried
    assert contents(store) == ["hi", "other", "mine"]


# --- threads and forks ------------------------------------------------------------------------------------------------


def test_field_set_while_a_save_merges_stays(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread sets what the disk has changed, too, in the instant before it is brought in: its value stays.

    Fails if what was merged is put over it without a look.
    """
    store.update("s-1", lambda data: data.update(title="theirs"))
    session.data["n"] = 1
    real = merge.patch

    def patch(target: dict[str, Any], known: dict[str, Any], wanted: dict[str, Any]) -> None:
        target["title"] = "set meanwhile"
        real(target, known, wanted)

    with monkeypatch.context() as patched:
        patched.setattr(session_module, "patch", patch)
        session.save()
    assert session.data["title"] == "set meanwhile"
    session.save()
    assert store.load("s-1").data["title"] == "set meanwhile"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX only")
def test_child_forked_while_another_thread_is_inside_gets_an_error(session: persist.Session) -> None:
    """What a thread that the child does not have left half done is refused, and nobody waits for that thread.

    Fails (the child is ended by its alarm) if the child waits for the lock that it inherited.
    """
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
        try:
            session.refresh()
        except persist.LockNotHeld:
            os._exit(0)
        os._exit(1)
    leave.set()
    thread.join(DEADLINE_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    session.refresh()
