"""Events across processes: followed while they are written, ended with their owner, and fenced off after it."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from actors import DEADLINE_S, eventually
from conftest import ActorFactory
from harness.faults import Fault, descriptors, injecting
from harness.sweeps import sweep
from harness.turns import START, written

import persist
from persist import follow, watch
from persist.storage import disk

#: Follow in a thread, and look after each millisecond of silence whether the owner lives. `looks` holds each answer.
LOOKING = """
import threading
from persist import files, follow
follow.LOOK_S = 0.001
looks, seen, real = [], [], files.FileEngine.how_ended
def counted(*arguments, **options):
    looks.append(real(*arguments, **options))
    return looks[-1]
files.FileEngine.how_ended = counted
followed = store.follow('s-1', {!r})
threading.Thread(target=lambda: seen.extend(event.data for event in followed), daemon=True).start()
"""


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"messages": []})


# --- followed to the end ----------------------------------------------------------------------------------------------


def test_full_disk_does_not_keep_a_session_from_being_deleted(store: persist.Store, session: persist.Session) -> None:
    """A session can be deleted on a full disk, because a delete makes room.

    Fails if the end line of its events must be written.
    """
    with store.start_stream("s-1") as stream:
        stream.emit("Be")
        with injecting(Fault("write", 1, errno.ENOSPC, is_persistent=True)):
            store.delete("s-1", force=True)
    assert not store.exists("s-1")
    assert disk.names(store.path / ".events") == []


def test_one_look_after_a_silence_is_enough() -> None:
    """A follower notices a death in less than a second, which is more than two silences long."""
    assert follow.LOOK_S + watch.POLL_S < 0.5


def test_killed_in_the_middle_of_an_emission(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """An owner that is killed with half of a line written leaves its followers the whole lines, and the end."""
    owner = actor()
    stream_id = owner.do(START)
    owner.do("stream.emit('whole')")
    owner.do("""
from persist.engine import Ended
from persist.storage import disk
real = disk.write
def half(fd, content):
    real(fd, content[:len(content) // 2])
    disk.rest_of_it()
disk.rest_of_it = lambda: None
disk.write = half
""")
    owner.start_and_pause("stream.emit('torn')", "rest_of_it")
    with store.follow("s-1", stream_id) as followed:
        owner.kill()
        assert ([event.data for event in followed], followed.ended) == (["whole"], "died")
    sweep(store)
    with store.follow("s-1", stream_id) as followed:
        assert ([event.data for event in followed], followed.ended) == (["whole"], "died")


# --- asking disturbs nobody -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "silent"])
def test_silent_owner_is_not_declared_dead(
    store: persist.Store, session: persist.Session, actor: ActorFactory, is_stopped: bool
) -> None:
    """An owner that is silent or stopped is looked at again and again, and counts as alive. Its later events are seen.

    Fails if a follower concludes death from silence.
    """
    owner, follower = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1)")
    if is_stopped:
        os.kill(owner.pid, signal.SIGSTOP)
    follower.do(LOOKING.format(stream_id))
    eventually(partial(follower.do, "len(looks) >= 20"))
    assert follower.do("seen, followed.ended") == ([1], None)
    os.kill(owner.pid, signal.SIGCONT)
    owner.do("stream.emit(2); stream.finish()")
    eventually(partial(follower.do, "followed.ended == 'finished'"))
    assert follower.do("seen") == [1, 2]


def test_looking_at_a_live_stream_disturbs_nobody(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A live stream keeps its session and its owner while 4 processes look at it again and again."""
    owner, followers = actor(), [actor() for _ in range(4)]
    stream_id = owner.do(START)
    for each in followers:
        each.do(LOOKING.format(stream_id))
    for _ in range(50):
        with pytest.raises(persist.SessionBusy, match=stream_id):
            store.start_stream("s-1")
        owner.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    for each in followers:
        eventually(partial(each.do, "len(looks) >= 20"))
        assert each.do("followed.ended, set(looks)") == (None, {None})
    owner.do("stream.finish()")


def test_looking_at_a_dead_stream_disturbs_nobody(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """The looks of 4 processes at a dead stream never delay the start of its successor, in 40 rounds.

    Fails if they look without the session's lock: each holds the dead lease for a moment, and looks like its owner.
    """
    followers = [actor() for _ in range(4)]
    for each in followers:
        each.do(
            """
import threading
from persist import follow
follow.LOOK_S = 0
asked = 0
def ask():
    global asked
    while True:
        try:
            list(store.follow('s-1', store.head('s-1').active_stream_id))
        except (persist.EventsNotFound, persist.InvalidArgument):
            continue
        asked += 1
threading.Thread(target=ask, daemon=True).start()
"""
        )
    for _ in range(40):
        stream = store.start_stream("s-1")
        stream._close()  # as its death would
        asked = followers[0].do("asked")
        eventually(partial(followers[0].do, f"asked > {asked + 1}"))


# --- the fence --------------------------------------------------------------------------------------------------------

#: If an operator removes the lease file, for example, the stream looks dead while its owner lives.
LOOKS_DEAD = "[path.unlink() for path in (store.path / '.leases').iterdir()]"
TAKE_AWAY = {
    "forced cancel": "store.cancel('s-1', 'turn-1', force=True)",
    "forced delete": "store.delete('s-1', force=True)",
    "deleted and made anew": """
store.delete('s-1', force=True)
store.create('s-1', {'messages': []})
new = store.start_stream('s-1', stream_id='turn-1')
new.emit('new')
""",
    "cleared as stale": f"{LOOKS_DEAD}; store.load('s-1').clear_stale_stream()",
    "taken over": f"{LOOKS_DEAD}; new = store.start_stream('s-1')",
}


@pytest.mark.parametrize("how", TAKE_AWAY)
def test_late_emission_lands_nowhere(
    store: persist.Store, session: persist.Session, actor: ActorFactory, how: str
) -> None:
    """The owner loses its session just before it writes an event: that event, and each later one, is stored nowhere.

    Fails without the end line, and without the look at where the write ended.
    """
    owner, other = actor(), actor()
    stream_id = owner.do("stream = store.start_stream('s-1', stream_id='turn-1'); stream.id")
    owner.do("stream.emit('before')")
    with store.follow("s-1", stream_id) as followed:
        owner.start_and_pause("stream.emit('late')", "write")
        other.do(TAKE_AWAY[how])
        owner.go()
        with pytest.raises(persist.StreamLost):
            owner.result()
        for code in ("stream.emit('later')", "stream.emit('a', 'b', durable=True)"):
            with pytest.raises(persist.StreamLost):
                owner.do(code)
        assert [event.data for event in followed] == ["before"]
    if how == "forced delete":
        with pytest.raises(persist.SessionNotFound):
            store.events("s-1", stream_id)
    else:
        assert written(store, stream_id) == (["new"] if "anew" in how else ["before"])


@pytest.mark.parametrize("is_followed", [True, False], ids=["followed", "unheard"])
@pytest.mark.parametrize("how", TAKE_AWAY)
def test_first_emission_of_a_stream_that_lost_its_session_lands_nowhere(
    store: persist.Store, session: persist.Session, actor: ActorFactory, how: str, is_followed: bool
) -> None:
    """A stream that loses its session before its first event learns this at its first emission, and makes no file.

    Fails if the file is opened without the look at who owns the session.
    """
    owner, other = actor(), actor()
    stream_id = owner.do("stream = store.start_stream('s-1', stream_id='turn-1'); stream.id")
    if is_followed:
        followed = store.follow("s-1", stream_id)
    other.do(TAKE_AWAY[how])
    for _ in range(2):
        with pytest.raises(persist.StreamLost):
            owner.do("stream.emit('late')")
    if is_followed:
        assert list(followed) == []
    if "anew" in how:
        assert written(store, stream_id) == ["new"]
    elif not is_followed:
        assert not (store.path / ".events").exists()


def test_emission_before_the_fence_counts(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """An event that is written before the end line of a forced cancel counts, even if the cancel has begun."""
    owner, other = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1)")
    other.start_and_pause(f"store.cancel('s-1', {stream_id!r}, force=True)", "write")
    assert owner.do("stream.emit(2)") == 2
    other.go()
    assert other.result() is True
    with pytest.raises(persist.StreamLost):
        owner.do("stream.emit(3)")
    assert written(store, stream_id) == [1, 2]


def test_fence_stands_before_the_session_is_free(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A forced cancel ends the events before it publishes its commit. Fails if it does so afterwards."""
    owner, other = actor(), actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1)")
    other.start_and_pause(f"store.cancel('s-1', {stream_id!r}, force=True)", "replace")
    with pytest.raises(persist.StreamLost):
        owner.do("stream.emit(2)")
    other.go()
    other.result()
    assert written(store, stream_id) == [1]


def test_first_emission_under_way_when_the_session_is_taken_away(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """The owner makes its file under the session's lock, so that a forced cancel cannot miss it.

    Whichever comes first then, an emission that is acknowledged is stored, and one that is refused is not. Fails if the
    file is made without the lock.
    """
    owner, hasty, other = actor(), actor(timeout_s=0.0), actor()
    stream_id = owner.do(START)
    owner.start_and_pause("stream.emit('first')", "make_directory")
    cancel = f"store.cancel('s-1', {stream_id!r}, force=True)"
    with pytest.raises(persist.LockTimeout):
        hasty.do(cancel)
    other.start(cancel)
    owner.go()
    try:
        acknowledged = [owner.result()]
    except persist.StreamLost:
        acknowledged = []
    assert other.result() is True
    assert written(store, stream_id) == ["first"] * len(acknowledged)
    with store.follow("s-1", stream_id) as followed:
        assert (len(list(followed)), followed.ended) == (len(acknowledged), "cancelled")


def test_id_that_is_used_again_begins_anew_over_a_file_that_was_left_behind(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A new stream with an id that was used before starts without the events of the earlier stream.

    This also holds if the delete of the session could not remove them. Fails if the file is not removed at the start of
    a stream.
    """
    other = actor()
    for n in range(3):
        with store.start_stream("s-1", stream_id="turn-1") as stream:
            with pytest.raises(persist.EventsNotFound):
                store.events("s-1", "turn-1", after=1)
            assert other.do("store.events('s-1', 'turn-1')") == []
            stream.emit(n)
            assert [event.data for event in other.do("store.events('s-1', 'turn-1')")] == [n]
            stream.finish()
        path = store.path / ".events" / "s-1.turn-1"
        left_behind = path.read_bytes()
        store.delete("s-1")
        assert not path.exists()
        path.write_bytes(left_behind)
        store.create("s-1", {"messages": []})


# --- cursors ----------------------------------------------------------------------------------------------------------


def test_stream_that_ended_without_an_event_has_none(store: persist.Store, session: persist.Session) -> None:
    """A stream that nobody emits to or follows makes no directory. A later reader gets a clear error."""
    store.start_stream("s-1").finish()
    with store.start_stream("s-1") as stream:
        pass
    sweep(store)
    assert not (store.path / ".events").exists()
    with pytest.raises(persist.EventsNotFound):
        store.follow("s-1", stream.id)
    assert not (store.path / ".events").exists()


def test_dropped_follower_leaves_nothing_open(store: persist.Store, session: persist.Session) -> None:
    """A follower leaves no descriptor and no waiter behind.

    It may be closed early, dropped in the middle, refused, or read to the end.
    """
    with store.start_stream("s-1") as stream:
        stream.emit(*range(3))
        before = descriptors(collect=True)
        store.follow("s-1", stream.id).close()
        next(store.follow("s-1", stream.id))
        store.events("s-1", stream.id)
        with store.follow("s-1", stream.id) as followed:
            next(followed)
        with pytest.raises(persist.EventsNotFound):
            store.follow("s-1", stream.id, after=4)
        assert descriptors() == before
        assert not any(path.startswith(str(store.path)) for path in watch._waiting)
        at_the_end = store.follow("s-1", stream.id)
        stream.finish()
    list(at_the_end)
    assert descriptors() < before
    assert not any(path.startswith(str(store.path)) for path in watch._waiting)


# --- one process ------------------------------------------------------------------------------------------------------


def _is_as_long_as(seen: list[Any], count: int) -> bool:
    return len(seen) == count


@pytest.mark.usefixtures("switching")
def test_follower_in_the_same_process_is_woken(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events and the end wake a follower in the same process at once, without the next look at the file.

    The test takes the looks out, and makes the silence endless.
    """
    eventually(lambda: watch._looking is None)
    monkeypatch.setattr(watch, "_look_from_now_on", lambda: None)
    monkeypatch.setattr(follow, "LOOK_S", 10 * DEADLINE_S)
    seen: list[Any] = []
    with store.start_stream("s-1") as stream:
        followed = store.follow("s-1", stream.id)
        thread = threading.Thread(target=lambda: seen.extend(event.data for event in followed), daemon=True)
        thread.start()
        for n in range(20):
            stream.emit(n)
            eventually(partial(_is_as_long_as, seen, n + 1))
        stream.finish()
    thread.join(DEADLINE_S)
    assert (seen, followed.ended) == (list(range(20)), "finished")


# --- expiry -----------------------------------------------------------------------------------------------------------


def end_turn(store: persist.Store, session_id: str, *events: object, stream_id: str | None = None) -> Path:
    """Run a turn to its end, and return the file of its events."""
    with store.start_stream(session_id, stream_id=stream_id) as stream:
        stream.emit(*events)
        stream.finish()
    return store.path / ".events" / f"{session_id}.{stream.id}"


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param("store.start_stream('s-1').fail()", id="a start in the session"),
        pytest.param("store.start_stream('s-2').finish()", id="a finish in the store"),
        pytest.param("store.clear_stale_streams()", id="a sweep"),
        pytest.param("store.close()", id="close"),
    ],
)
def test_events_go_away_some_time_after_the_end(
    store: persist.Store, session: persist.Session, actor: ActorFactory, verb: str
) -> None:
    """A start in the session, a finish in the store, a sweep and `close` remove events whose time is over.

    A reader that has them open gets all of them, and the end.
    """
    store.create("s-2", {"messages": []})
    owner = actor(keep_events_s=0)
    stream_id = owner.do(START)
    owner.do("stream.emit(1, 2)")
    with store.follow("s-1", stream_id) as followed:
        owner.do("stream.finish()")
        assert (store.path / ".events" / f"s-1.{stream_id}").exists()
        owner.do(verb)
        assert not (store.path / ".events" / f"s-1.{stream_id}").exists()
        assert ([event.data for event in followed], followed.ended) == ([1, 2], "finished")
    with pytest.raises(persist.EventsNotFound):
        store.follow("s-1", stream_id, after=2)


def test_finish_removes_two_expired_ones_at_most(directory: Path) -> None:
    """A finish removes at most two expired files of others, however many there are. The oldest ends go first."""
    store = persist.Store(directory, keep_events_s=300)
    ended = []
    for number in range(6):
        store.create(f"s-{number}", {"messages": []})
        ended.append(end_turn(store, f"s-{number}", number))
    for path in ended[:5]:
        os.utime(path, (1, 1))
    store.create("last", {"messages": []})
    for left in (4, 2, 1, 1):
        store.start_stream("last").finish()
        assert [path for path in ended if path.exists()] == ended[6 - left :]


def test_sweep_after_a_crash_removes_what_nobody_else_will(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """The next sweep after a crash of all processes ends the dead stream's events. Each sweep removes expired ones."""
    owner = actor()
    ended = owner.do("stream = store.start_stream('s-1'); stream.emit(1); stream.finish(); stream.id")
    dead = owner.do("stream = store.start_stream('s-1'); stream.emit(1); stream.id")
    owner.kill()
    os.utime(directory / ".events" / f"s-1.{ended}", (1, 1))
    sweeper = persist.Store(directory)
    sweep(sweeper)
    assert [path.name for path in (directory / ".events").iterdir()] == [f"s-1.{dead}"]
    with sweeper.follow("s-1", dead) as followed:
        assert ([event.data for event in followed], followed.ended) == ([1], "died")
    os.utime(directory / ".events" / f"s-1.{dead}", (1, 1))
    assert persist.Store(directory).clear_stale_streams() == persist.Sweep([], {})
    assert list((directory / ".events").iterdir()) == []


def test_events_of_a_live_stream_stay_however_old(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A sweep leaves the events of a running stream, even if the last event is a year old.

    Fails if the sweep goes by age only.
    """
    owner = actor()
    stream_id = owner.do(START)
    owner.do("stream.emit(1)")
    os.utime(directory / ".events" / f"s-1.{stream_id}", (1, 1))
    sweep(persist.Store(directory, keep_events_s=0))
    assert written(store, stream_id) == [1]
    assert owner.do("stream.emit(2)") == 2
    owner.do("stream.finish()")


# --- whose files ------------------------------------------------------------------------------------------------------


def test_only_the_owner_can_read_events(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """The directory is 0700 and each file 0600, whatever the umask, and whether the stream or a follower made it."""
    owner = actor()
    stream_id = owner.do("os.umask(0); stream = store.start_stream('s-1'); stream.emit(1); stream.finish(); stream.id")
    followed = owner.do("stream = store.start_stream('s-1'); store.follow('s-1', stream.id).close(); stream.id")
    made = store.path / ".events"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for each in (stream_id, followed):
        assert stat.S_IMODE((made / f"s-1.{each}").stat().st_mode) == 0o600


@pytest.mark.parametrize("is_directory", [True, False], ids=["directory", "file"])
def test_symbolic_link_is_not_followed(
    store: persist.Store, session: persist.Session, tmp_path: Path, is_directory: bool
) -> None:
    """A symbolic link at `.events`, or at a stream's file, is Unreadable for an emit, a follow or a cancel.

    Its target stays as it was. Fails if a reader, a writer or a remover does not check the directory.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "s-1.turn-1"
    target.write_bytes(b'{"offset":1,"event":"theirs"}\n')
    link = store.path / ".events"
    with store.start_stream("s-1", stream_id="turn-1") as stream:
        if is_directory:
            link.symlink_to(elsewhere)
        else:
            link.mkdir(mode=0o700)
            (link / target.name).symlink_to(target)
        refused: tuple[Callable[[], object], ...] = (
            lambda: stream.emit("mine"),
            lambda: store.follow("s-1", "turn-1"),
            lambda: store.events("s-1", "turn-1"),
            lambda: store.cancel("s-1", "turn-1", force=True),
        )
        for verb in refused:
            with pytest.raises(persist.Unreadable):
                verb()
        stream.finish()
    failures = [str(error) for error in store.clear_stale_streams().failures.values()]
    assert [r".events cannot be read: it is a symbolic link" in each for each in failures] == [True] * is_directory
    with pytest.raises(persist.Unreadable) if is_directory else nullcontext():
        store.start_stream("s-1", stream_id="turn-1").finish()
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {
        target.name: b'{"offset":1,"event":"theirs"}\n'
    }


CANARY = "canary-7f3a"


def test_no_event_appears_in_an_error(store: persist.Store, session: persist.Session) -> None:
    """No error message holds the content of an event, whatever goes wrong with it."""
    errors: list[BaseException] = []

    def refused(verb: Callable[[], object]) -> None:
        with pytest.raises(persist.PersistError) as caught:
            verb()
        errors.append(caught.value)

    with store.start_stream("s-1") as stream:
        stream.emit(CANARY)
        refused(lambda: stream.emit([CANARY, {CANARY}]))
        for call in ("write", "fsync"):
            with injecting(Fault(call, 1, errno.EIO, is_persistent=False)):
                refused(lambda: stream.emit({"text": CANARY}, durable=True))
        refused(lambda: store.follow("s-1", stream.id, after=100))
        store.cancel("s-1", stream.id, force=True)
        refused(lambda: stream.emit(CANARY))
    with store.follow("s-1", stream.id) as followed, injecting(Fault("read", 1, errno.EIO, is_persistent=True)):
        next(followed)
        errors.append(Exception(repr(followed)))
    for error in errors:
        told = f"{error!r} {error} {error.args} {error.__cause__!r}"
        assert CANARY not in told


# --- signals, forks, and what a fast writer does ----------------------------------------------------------------------


def test_child_of_a_fork_in_the_middle_of_a_registration_can_follow(
    store: persist.Store, session: persist.Session
) -> None:
    """A child can follow even if it was forked while another thread held the guard of the waiting followers.

    The child has a guard of its own. Fails (by its alarm) if not.
    """
    with store.start_stream("s-1") as stream:
        stream.emit(1)
        with watch._guard:
            child = _forked_in_a_thread(lambda: next(store.follow("s-1", stream.id)).data == 1)
        assert child() == 0


def _forked_in_a_thread(claim: Callable[[], bool]) -> Callable[[], int]:
    """Fork in another thread. The child exits with 0 if the claim holds there."""
    pids: list[int] = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(DEADLINE_S))
            os._exit(not claim())
        pids.append(pid)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join(DEADLINE_S)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])


def test_events_up_to_now_are_not_those_of_the_future(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`events` ends where the file ended when it was called, however fast the stream goes on.

    Fails if it chases the end.
    """
    with store.start_stream("s-1") as stream:
        stream.emit("first")
        real = disk.read_at

        def read_at(fd: int, limit: int, position: int) -> bytes:
            found: bytes = real(fd, limit, position)
            if stream.emit("one more") > 100:
                pytest.fail("it chases the end")
            return found

        with monkeypatch.context() as patched:
            patched.setattr(disk, "read_at", read_at)
            assert len(store.events("s-1", stream.id)) < 5
        stream.finish()


def test_deletion_ends_the_events_before_the_session_is_gone(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """An emission while its session is being deleted is refused, so no follower misses an acknowledged event."""
    owner, deleter = actor(), actor()
    stream_id = owner.do("stream = store.start_stream('s-1'); stream.emit(1); stream.id")
    deleter.start_and_pause("store.delete('s-1', force=True)", "unlink")
    with pytest.raises(persist.StreamLost):
        owner.do("stream.emit(2)")
    followed = store.follow("s-1", stream_id)
    deleter.go()
    deleter.result()
    assert ([event.data for event in followed], followed.ended) == ([1], "deleted")


def test_id_that_is_used_again_is_kept_for_its_own_time(store: persist.Store, session: persist.Session) -> None:
    """The expiry time of an earlier stream with the same id does not count for the later one."""
    keeping = persist.Store(store.path, keep_events_s=3600)
    os.utime(end_turn(keeping, "s-1", "old", stream_id="again"), (1, 1))
    path = end_turn(keeping, "s-1", "new", stream_id="again")
    end_turn(keeping, "s-1", "other")
    sweep(keeping)
    keeping.close()
    assert path.exists()
    assert written(persist.Store(store.path), "again") == ["new"]
