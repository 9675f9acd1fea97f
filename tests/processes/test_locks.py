"""The session lock: which threads and processes it excludes, for how long, and what a fork or a delete does to it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from weakref import ref

import pytest
from actors import DEADLINE_S, Actor, eventually
from conftest import ActorFactory
from filelock import FileLock, Timeout, lock_descriptor
from harness.faults import descriptors
from harness.turnstiles import is_waited_for

import persist
from persist.storage import held, lock, turnstile


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"messages": []})


def revision_at(directory: Path, version: str) -> int:
    """Return the revision of the session, which must be at the version that a verb has returned."""
    head = persist.Store(directory).head("s-1")
    assert head.version == version
    return head.revision


def test_timeout_names_the_process_that_holds_the_lock(
    directory: Path, session: persist.Session, actor: ActorFactory
) -> None:
    """E2: the error names the holder, the file and the time, and nothing was written."""
    holder = actor()
    holder.start_and_pause("store.append('s-1', 'log', 1)", "create")
    impatient = persist.Store(directory, timeout_s=0.1)
    with pytest.raises(persist.LockTimeout) as caught:
        impatient.append("s-1", "log", 2)
    error = caught.value
    assert (error.session_id, error.path, error.timeout_s) == ("s-1", directory / "s-1.json.lock", 0.1)
    assert error.waited_s >= 0.1
    if sys.platform == "linux":
        assert error.holder.startswith(f"pid {holder.pid} (")
    assert error.holder in str(error)
    holder.go()
    holder.result()
    assert persist.Store(directory).load("s-1").data["log"] == [1]


def test_timeout_names_the_thread_of_this_process(directory: Path, session: persist.Session) -> None:
    """E2: between threads the holder is a thread of this process, by name."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with persist.Store(directory).transaction("s-1"):
            inside.set()
            assert leave.wait(DEADLINE_S)

    thread = threading.Thread(target=hold, name="title-writer")
    thread.start()
    assert inside.wait(DEADLINE_S)
    with pytest.raises(persist.LockTimeout, match="title-writer"):
        persist.Store(directory, timeout_s=0.05).append("s-1", "log", 2)
    leave.set()
    thread.join(DEADLINE_S)


@pytest.fixture
def hold(tmp_path: Path) -> Callable[[float], lock.Hold]:
    """Return a function that makes a hold of one and the same lock, with a time-out in seconds."""
    return lambda timeout_s: lock.Hold(str(tmp_path / "s-1.json.lock"), "s-1", timeout_s)


HoldFactory = Callable[[float], lock.Hold]


@pytest.mark.usefixtures("switching")
def test_waiters_are_served_in_their_order(hold: HoldFactory) -> None:
    """Five threads that queue up in a known order get the lock in that order: first in, first out."""
    first = hold(0)
    first.acquire()
    served: list[int] = []
    threads = []
    for n in range(5):

        def wait(n: int = n) -> None:
            mine = hold(DEADLINE_S)
            mine.acquire()
            served.append(n)
            mine.release()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        eventually(lambda n=n: len(lock._queues[first.path]) > n + 1)  # type: ignore[misc]
    first.release()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert served == [0, 1, 2, 3, 4]
    assert first.path not in lock._queues


def in_another_thread(function: Callable[[], object]) -> None:
    """Call a function in a thread of its own, and wait for it, because a thread has one hold at a time."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(DEADLINE_S)


def refused(late: lock.Hold) -> None:
    with pytest.raises(persist.LockTimeout):
        late.acquire()


def test_waiter_that_gives_up_leaves_the_queue(hold: HoldFactory) -> None:
    """A waiter that times out neither takes nor blocks the lock, and the next one gets it."""
    first = hold(0)
    first.acquire()
    in_another_thread(lambda: refused(hold(0.01)))
    first.release()
    in_another_thread(lambda: hold(0).acquire())


def test_lock_handed_to_a_waiter_that_gave_up_is_passed_on(hold: HoldFactory) -> None:
    """A lock that is handed over just as its waiter times out passes to the next waiter."""
    first, late, last = hold(0), hold(0), hold(DEADLINE_S)
    first.acquire()
    served: list[held.HeldFile] = []
    waiting = threading.Thread(target=lambda: served.append(last.acquire()))

    class Crossing:
        """A lock in the place of `late.given`, which is given in the instant in which the wait is over."""

        def __init__(self) -> None:
            self.is_taken = False

        def acquire(self, timeout: float = -1) -> bool:
            if self.is_taken:
                waiting.start()
                eventually(lambda: len(lock._queues[first.path]) == 3)
                first.release()
            self.is_taken = True
            return timeout < 0

        def locked(self) -> bool:
            return self.is_taken

        def release(self) -> None:
            """Accept the lock too late."""

    late.given = Crossing()  # type: ignore[assignment]
    in_another_thread(lambda: refused(late))
    waiting.join(DEADLINE_S)
    assert len(served) == 1


def test_releasing_twice_is_releasing_once(hold: HoldFactory) -> None:
    """A second release does not free the lock that another thread has taken since.

    The exception of a signal may come anywhere.
    """
    first, second = hold(0), hold(0)
    first.acquire()
    first.release()
    in_another_thread(second.acquire)
    first.release()
    refused(hold(0))


def waiting_behind(first: lock.Hold, waiter: lock.Hold) -> threading.Thread:
    """Return a thread in which a hold waits for another one."""
    thread = threading.Thread(target=waiter.acquire)
    thread.start()
    eventually(lambda: len(lock._queues[first.path]) == 2)
    return thread


def test_place_that_was_given_up_by_halves_is_given_up(hold: HoldFactory) -> None:
    """A release that a signal cut between its two steps is completed by the next attempt, which wakes the waiter."""
    first, second = hold(0), hold(DEADLINE_S)
    first.acquire()
    thread = waiting_behind(first, second)
    lock._queues[first.path].remove(first._me)
    first.release()
    thread.join(DEADLINE_S)
    assert second._file is not None
    second.release()
    assert first.path not in lock._queues


def test_hold_that_was_cut_off_before_it_waits_disturbs_nobody(hold: HoldFactory) -> None:
    """A hold that has a place in the queue, but was cut off before its wait, does not make the verb before it fail."""
    first, cut_off = hold(0), hold(0)
    first.acquire()
    lock._queues[first.path].append(cut_off._me)
    first.release()
    lock._queues.clear()


def test_hold_that_is_gone_has_given_up_its_place(hold: HoldFactory) -> None:
    """A hold whose finaliser never ran loses its place, and the threads behind it go on."""
    first, second, third = hold(0), hold(DEADLINE_S), hold(DEADLINE_S)
    first.acquire()
    thread = waiting_behind(first, second)
    assert first._file is not None
    first._file.close()
    # The place looks as if the finaliser had failed, because the reference in it is dead.
    lock._queues[first.path][0] = ref(hold(0))
    another = threading.Thread(target=third.acquire)
    another.start()
    thread.join(DEADLINE_S)
    assert second._file is not None
    second.release()
    another.join(DEADLINE_S)
    assert third._file is not None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give numbers in another way")
def test_thread_that_got_the_number_of_an_ended_one_holds_nothing(store: persist.Store) -> None:
    """A block may be entered in a thread that ends, and left later. Fails if threads are told apart by `get_ident`."""
    for name in ("a", "b"):
        store.create(name, {"log": []})
    block = store.transaction("a")
    entering = threading.Thread(target=block.__enter__)
    entering.start()
    entering.join(DEADLINE_S)
    numbers: set[int | None] = set()
    for number in range(200):
        thread = threading.Thread(target=store.append, args=("b", "log", number))
        thread.start()
        numbers.add(thread.ident)
        thread.join(DEADLINE_S)
        if entering.ident in numbers:
            break
    assert store.load("b").data["log"] == list(range(number + 1))
    assert block.__exit__(None, None, None) is not True


def test_sessions_do_not_wait_for_each_other(directory: Path, store: persist.Store, actor: ActorFactory) -> None:
    """E2: there is no global lock: while one session is held in mid-commit, another can be written at once."""
    store.create("s-1", {})
    store.create("s-2", {})
    holder = actor()
    holder.start_and_pause("store.append('s-1', 'log', 1)", "create")
    persist.Store(directory, timeout_s=0.0).append("s-2", "log", 1)
    holder.go()
    holder.result()


@pytest.mark.parametrize("other", ["s-1", "s-2"])
def test_second_lock_in_one_thread_is_refused(store: persist.Store, session: persist.Session, other: str) -> None:
    """E2: one thread holds one session's lock. A second one is an error at once, not a deadlock."""
    store.create("s-2", {})
    with store.transaction("s-1") as tx:
        tx.fields["kept"] = True
        with pytest.raises(persist.LockError):
            store.append(other, "log", 1)
        assert store.load(other).id == other
        assert store.head(other).id == other
    assert store.load("s-1").data["kept"] is True


def test_lock_excludes_users_of_filelock(store: persist.Store, session: persist.Session, directory: Path) -> None:
    """Another program may take the same lock with filelock itself."""
    with store.transaction("s-1"), pytest.raises(Timeout):
        FileLock(directory / "s-1.json.lock", timeout=0, fallback_to_soft=False).acquire()
    with FileLock(directory / "s-1.json.lock", fallback_to_soft=False), pytest.raises(persist.LockTimeout):
        persist.Store(directory, timeout_s=0.05).append("s-1", "log", 1)


def test_child_forked_inside_an_edit_holds_nothing(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A forked child neither has its parent's lock nor releases it, and waits like any other process."""
    other = actor(timeout_s=0.05)
    code = """
with store.transaction('s-1') as tx:
    data = tx.data
    child = os.fork()
    if child == 0:
        try:
            store.append('s-1', 'log', 'while the parent holds it')
        except persist.LockTimeout:
            os._exit(7)
        finally:
            os._exit(1)
    data['child_said'] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    other.do(code)
    assert store.load("s-1").data == {"messages": [], "child_said": 7}


def test_block_left_in_a_forked_child_writes_nothing(
    actor: ActorFactory, store: persist.Store, session: persist.Session
) -> None:
    """A forked child that leaves the block in which it was forked is refused, and the parent's edit is committed."""
    other = actor()
    code = """
status = None
try:
    with store.transaction('s-1') as tx:
        data = tx.data
        child = os.fork()
        data['by'] = 'child' if child == 0 else 'parent'
except persist.LockError:
    os._exit(7)
finally:
    if child == 0:
        os._exit(1)
os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert other.do(code) == 7
    assert store.load("s-1").data["by"] == "parent"


def test_lock_of_a_forked_parent_is_free_when_it_leaves(
    directory: Path, session: persist.Session, actor: ActorFactory
) -> None:
    """A forked child that lives on does not keep the lock that its parent held at the fork."""
    other = actor()
    code = """
import time
with store.transaction('s-1') as tx:
    tx.fields['n'] = 1
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
child
"""
    child = other.do(code)
    try:
        persist.Store(directory, timeout_s=0.0).append("s-1", "log", 1)
    finally:
        os.kill(child, signal.SIGKILL)


def test_descriptor_number_may_be_another_files_in_the_child(actor: ActorFactory, session: persist.Session) -> None:
    """A forked child neither unlocks nor closes a file that it has opened since under the same descriptor number."""
    other = actor()
    code = """
from persist.storage.held import try_hold
held = try_hold(store.path / 'any', create=True)
child = os.fork()
if child == 0:
    try:
        reused = os.open(os.devnull, os.O_RDONLY)
        assert reused == held.fd
        held.close()
        os.fstat(reused)
        os._exit(7)
    finally:
        os._exit(1)
os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert other.do(code) == 7


def test_methods_of_a_finished_transaction_are_refused(store: persist.Store, session: persist.Session) -> None:
    """The methods of a transaction are refused outside its block, because the transaction is the lock."""
    with store._backend.engine.transaction("s-1") as tx:
        found = tx.read()
    for use in (
        tx.read,
        tx.exists,
        tx.delete,
        tx.confirm,
        tx.head,
        tx.compact,
        tx.accept,
        lambda: tx.commit(found.header, found.content),
    ):
        with pytest.raises(persist.LockError):
            use()


def test_missing_session_leaves_no_lock_file(store: persist.Store, directory: Path) -> None:
    """A verb on a session that does not exist leaves no file behind."""
    for verb in (
        lambda: store.append("nobody", "log", 1),
        lambda: store.delete("nobody"),
        lambda: store.start_stream("nobody"),
        lambda: store.cancel("nobody", "x"),
        lambda: store.update("nobody", lambda tx: None),
    ):
        with pytest.raises(persist.SessionNotFound):
            verb()
    assert [path.name for path in directory.iterdir()] == [".leases"]


def test_waiters_of_a_deleted_session_agree_on_the_next_lock(
    store: persist.Store, directory: Path, actor: ActorFactory
) -> None:
    """3 processes that create, edit and delete one id agree on its lock, because an unlinked lock file guards no name.

    Each create is answered by exactly one delete, and nothing is left over. Fails without the look at the name.
    """
    actors = [actor(timeout_s=60.0) for _ in range(3)]
    work = """
counts = [0, 0]
for n in range(150):
    try:
        store.create('s-9', {'n': 0}); counts[0] += 1
    except persist.SessionExists:
        pass
    try:
        with store.transaction('s-9') as tx:
            data = tx.data
            before = data['n']; data['n'] = before + 1
    except persist.SessionNotFound:
        pass
    try:
        store.delete('s-9'); counts[1] += 1
    except persist.SessionNotFound:
        pass
counts
"""
    for each in actors:
        each.start(work)
    counts = [each.result() for each in actors]
    assert sum(created for created, _ in counts) == sum(deleted for _, deleted in counts)
    assert sum(created for created, _ in counts) > 0
    assert [path.name for path in directory.iterdir()] == [".leases"]


def test_lock_is_free_after_kill(
    store: persist.Store, session: persist.Session, actor: ActorFactory, directory: Path
) -> None:
    """A writer that is killed in mid-commit holds nothing, and the next commit removes its temporary file."""
    victim = actor()
    victim.start_and_pause("store.append('s-1', 'log', 1)", "replace")
    victim.kill()
    assert (directory / "s-1.json.tmp").exists()
    assert [problem.kind for problem in store.check()] == ["left-over"]
    persist.Store(directory, timeout_s=1.0).append("s-1", "log", 2)
    assert store.load("s-1").data["log"] == [2]
    assert not (directory / "s-1.json.tmp").exists()
    assert store.check() == []


def test_subprocess_does_not_inherit_the_lock(store: persist.Store, session: persist.Session, directory: Path) -> None:
    """A program started inside an edit does not keep the session locked, because descriptors are close-on-exec."""
    with store.transaction("s-1") as tx:
        tx.fields["n"] = 1
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    persist.Store(directory, timeout_s=0.0).append("s-1", "log", 1)
    program.communicate(b"\n", timeout=DEADLINE_S)


def test_edit_that_is_left_in_another_thread_frees_the_first(
    store: persist.Store, session: persist.Session, directory: Path
) -> None:
    """A block may be entered in one thread and left in another, as synchronous dependencies of web frameworks are."""
    block = store.transaction("s-1")
    block.__enter__().fields["n"] = 1
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join(DEADLINE_S)
    assert revision_at(directory, store.append("s-1", "log", 1)) == 3
    assert store.load("s-1").data["n"] == 1


def test_signal_handler_that_uses_the_store_gets_an_error(actor: ActorFactory, session: persist.Session) -> None:
    """E2: a signal handler in the middle of a verb gets LockError, never a hang.

    It cannot wait for its own thread.
    """
    other = actor(timeout_s=5.0)
    code = """
import signal
answers = []
def handler(*_):
    try:
        store.append('s-1', 'log', 'handler')
        answers.append('written')
    except persist.LockError:
        answers.append('refused')
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for n in range(300):
    store.update('s-1', lambda tx: tx.data.update(n=n))
signal.setitimer(signal.ITIMER_REAL, 0, 0)
len(answers) > 0 and set(answers) <= {'written', 'refused'}
"""
    assert other.do(code) is True


def test_interrupts_leak_no_lock(actor: ActorFactory, session: persist.Session, directory: Path) -> None:
    """Exceptions that a signal handler raises anywhere in a verb leave no lock and no queue behind.

    If one hits the interpreter's own exit from a block, the block is ended when it is collected.
    """
    other = actor(timeout_s=5.0)
    code = """
import gc, signal
class Late(Exception): pass
def handler(*_):
    raise Late
interrupted = 0
signal.signal(signal.SIGALRM, handler)
for n in range(500):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00005 + n % 97 * 0.00001)
        store.update('s-1', lambda tx: tx.data.update(n=n))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        interrupted += 1
        gc.collect()
    except persist.CommitUnknown:
        store = persist.Store(store.path)
signal.setitimer(signal.ITIMER_REAL, 0)
store.update('s-1', lambda tx: tx.data.update(n='end'))
interrupted
"""
    assert other.do(code) > 0
    assert revision_at(directory, persist.Store(directory, timeout_s=1.0).append("s-1", "log", 1)) > 1


def test_hard_link_to_the_lock_file_admits_nobody_else(
    store: persist.Store, session: persist.Session, directory: Path, actor: ActorFactory
) -> None:
    """A process that locks a removed lock file holds nothing, even if a hard link keeps the file alive.

    A backup made of hard links (`cp -al`) does so. Fails if a lock counts as held while its file has any link left.
    """
    backup = directory / "backup"
    backup.mkdir()
    os.link(directory / "s-1.json.lock", backup / "s-1.json.lock")
    late = actor()
    # The process has locked the file, and is about to see whether it still bears its name.
    late.start_and_pause("with store.transaction('s-1') as tx: tx.fields['late'] = 1", "bears_name")
    (directory / "s-1.json.lock").unlink()
    with store.transaction("s-1") as tx:
        late.go()
        # The process gets time to do wrong. The document proves that it did not.
        late._connection.poll(0.5)
        tx.fields["n"] = 1
    late.result()
    found = store.load("s-1").data
    assert (found["n"], found["late"]) == (1, 1)


def test_signal_handler_inside_the_table_gets_an_error(store: persist.Store, session: persist.Session) -> None:
    """A signal handler that comes while its thread opens or closes a lock may not wait.

    Every other thread would wait for it.
    """
    with held.table, pytest.raises(persist.LockError):
        store.append("s-1", "messages", {"id": "m2"})
    store.append("s-1", "messages", {"id": "m2"})


def test_fork_goes_on_after_a_descriptor_that_somebody_closed(store: persist.Store, session: persist.Session) -> None:
    """A child can lock after a fork, even if one of the inherited descriptors is closed already."""
    closed = os.dup(0)
    os.close(closed)
    held._descriptors.add(closed)
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(int(DEADLINE_S))
            thread = threading.Thread(target=lambda: store.append("s-1", "messages", {"id": "of the child"}))
            thread.start()
            thread.join(DEADLINE_S)
            os._exit(thread.is_alive())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        held._descriptors.discard(closed)


# --- the turnstile ----------------------------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such a turnstile")


@pytest.fixture
def locked(directory: Path, session: persist.Session, actor: ActorFactory) -> Actor:
    """Return another process, which holds the lock of the session until the test lets it go."""
    holder = actor()
    holder.start_and_pause("store.append('s-1', 'log', 'holder')", "create")
    return holder


def in_turnstile(waiter: Actor, path: Path) -> None:
    """Let a process wait for the session. Return when it is in the turnstile."""
    waiter.start("store.append('s-1', 'log', 'waiter')")
    eventually(lambda: is_waited_for(path))


@linux_only
def test_turnstile_holds_one_and_is_free_with_its_descriptor(tmp_path: Path) -> None:
    """Of two that come at once, one enters the turnstile.

    It does not block itself, and a close leaves the turnstile.
    """
    path = tmp_path / "x.lock"
    one, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        assert not turnstile.is_taken(one)
        assert (turnstile.take(one), turnstile.take(other)) == (True, False)
        assert (turnstile.is_taken(one), turnstile.is_taken(other)) == (False, True)
        # A process in the turnstile excludes nobody from the lock.
        assert lock_descriptor(other, blocking=False)
        turnstile.leave(one)
        assert turnstile.take(other)
    finally:
        os.close(other)
        assert not turnstile.is_taken(one)
        os.close(one)


@linux_only
@pytest.mark.usefixtures("switching")
def test_lock_is_left_to_who_waits_for_it(
    store: persist.Store, session: persist.Session, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that comes to a free lock leaves it to the one in the turnstile, so that no process starves.

    Fails without the look at the turnstile. A caller with a time-out of 0 takes a free lock.
    """
    asked: list[int] = []
    take = turnstile.take

    def counted(fd: int) -> bool:
        asked.append(fd)
        return take(fd)

    monkeypatch.setattr(lock, "PATIENCE_S", 1000.0)
    monkeypatch.setattr(turnstile, "take", counted)
    fd = os.open(directory / "s-1.json.lock", os.O_RDWR)
    assert take(fd)
    assert revision_at(directory, persist.Store(directory, timeout_s=0.0).append("s-1", "log", 1)) == 2
    waiting = threading.Thread(target=lambda: store.append("s-1", "log", 2))
    waiting.start()
    eventually(lambda: len(asked) > 20)
    assert store.head("s-1").revision == 2
    os.close(fd)
    waiting.join(DEADLINE_S)
    assert store.load("s-1").data["log"] == [1, 2]


@linux_only
def test_process_in_the_turnstile_is_next(
    locked: Actor, store: persist.Store, directory: Path, actor: ActorFactory
) -> None:
    """The process in the turnstile gets the lock next, however many come.

    Fails if all waiting processes poll the lock.
    """
    first, *crowd = [actor() for _ in range(6)]
    for waiter in (first, *crowd):
        # The holder holds the lock for long. The crowd must not think that the turnstile has stopped moving.
        waiter.do("from persist.storage import lock; lock.PATIENCE_S = 1000.0")
    in_turnstile(first, directory / "s-1.json.lock")
    looks = "looks = []; take = lock.turnstile.take; lock.turnstile.take = lambda fd: looks.append(1) or take(fd)"
    for waiter in crowd:
        waiter.do(looks)
        waiter.start("store.append('s-1', 'log', 'crowd'), len(looks) > 1")
    # The crowd gets time to get in line. The document proves the order.
    assert not first._connection.poll(0.2)
    locked.go()
    locked.result(), first.result()
    answers = [waiter.result() for waiter in crowd]
    assert store.load("s-1").data["log"] == ["holder", "waiter", *["crowd"] * 5]
    # Each process of the crowd has made a commit of its own.
    assert (store.head("s-1").revision, len({version for version, _ in answers})) == (8, 5)
    assert any(has_waited for _, has_waited in answers)


@linux_only
def test_waiter_lets_go_of_a_lock_file_that_was_removed(locked: Actor, directory: Path, actor: ActorFactory) -> None:
    """A waiter whose lock file was removed lets go of it, so that others who wait for it find out, too.

    It waits for the new file of that name. Fails if it keeps its locks on the old file while it waits.
    """
    path = directory / "s-1.json.lock"
    old = os.open(path, os.O_RDWR)
    try:
        waiter = actor()
        in_turnstile(waiter, path)
        # The new file appears in one step, because the waiter might otherwise make it first.
        new = held.try_hold(directory / "new.lock", create=True)
        assert new is not None
        (directory / "new.lock").replace(path)
        locked.go()
        locked.result()
        eventually(lambda: is_waited_for(path))
        eventually(lambda: lock_descriptor(old, blocking=False))
        assert not turnstile.is_taken(old)
        assert not waiter._connection.poll()
        new.close()
        assert revision_at(directory, waiter.result()) == 3
    finally:
        os.close(old)


def state_of(task: Path) -> str:
    """Return the state of a thread in the kernel's table."""
    return task.joinpath("stat").read_text().rpartition(") ")[2][0]


@linux_only
def test_waiter_that_is_stopped_stops_nobody(locked: Actor, directory: Path, actor: ActorFactory) -> None:
    """A stopped process in the turnstile is overtaken after a moment.

    It may be in a paused container or a debugger. Fails without `PATIENCE_S`.
    """
    stopped = actor()
    in_turnstile(stopped, directory / "s-1.json.lock")
    stopped.process.send_signal(signal.SIGSTOP)
    # All its threads must have stopped. One that still runs might take the lock, and stop with it.
    eventually(lambda: all(state_of(task) == "T" for task in Path(f"/proc/{stopped.process.pid}/task").iterdir()))
    locked.go()
    locked.result()
    behind = actor(timeout_s=DEADLINE_S)
    behind.start("store.append('s-1', 'log', 'behind')")
    assert behind._connection.poll(DEADLINE_S / 2), "it waits until its time is over"
    assert revision_at(directory, behind.result()) == 3
    stopped.process.send_signal(signal.SIGCONT)
    assert revision_at(directory, stopped.result()) == 4


@linux_only
def test_waiter_that_is_killed_leaves_the_turnstile(locked: Actor, directory: Path, actor: ActorFactory) -> None:
    """The kernel frees the turnstile of a process that is killed."""
    killed = actor()
    in_turnstile(killed, directory / "s-1.json.lock")
    killed.kill()
    assert not is_waited_for(directory / "s-1.json.lock")
    locked.go()
    locked.result()
    assert revision_at(directory, persist.Store(directory, timeout_s=0.0).append("s-1", "log", 1)) == 3


@linux_only
def test_exception_in_the_turnstile_leaves_it(
    locked: Actor, store: persist.Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right after the step into the turnstile leaves neither the turnstile taken nor a descriptor open."""
    take = turnstile.take

    def interrupted(fd: int) -> bool:
        assert take(fd)
        raise KeyboardInterrupt

    before = descriptors(collect=True)
    with monkeypatch.context() as patch:
        patch.setattr(turnstile, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append("s-1", "log", 1)
    assert not is_waited_for(directory / "s-1.json.lock")
    assert descriptors() == before
    locked.go()
    locked.result()
    assert revision_at(directory, persist.Store(directory, timeout_s=0.0).append("s-1", "log", 1)) == 3


@linux_only
@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"], ids=["fork", "fork that Python does not see"])
def test_waiter_that_gave_up_keeps_nothing(locked: Actor, directory: Path, actor: ActorFactory, fork: str) -> None:
    """A child that was forked while its parent was in the turnstile has no part in it, whatever it has closed.

    Fails if a waiter that gives up closes the descriptor without leaving first, because the child may have a copy.
    """
    waiter = actor(timeout_s=1.0)
    code = """
import ctypes, threading, time, warnings
from persist.storage import turnstile
# Python 3.12 says at a fork that there is a thread: here, it is the one that is meant.
warnings.simplefilter('ignore', DeprecationWarning)
before = len(os.listdir('/proc/self/fd'))
errors = []
def wait():
    try:
        store.append('s-1', 'log', 1)
    except persist.LockTimeout as error:
        errors.append(error)
waiting = threading.Thread(target=wait)
waiting.start()
fd = os.open(store.path / 's-1.json.lock', os.O_RDWR)
while not turnstile.is_taken(fd):
    time.sleep(0.001)
child = FORK()
if child == 0:
    time.sleep(60)
    os._exit(0)
waiting.join()
os.close(fd)
child, len(errors), len(os.listdir('/proc/self/fd')) - before
"""
    child, timed_out, more_descriptors = waiter.do(code.replace("FORK", fork))
    try:
        assert (timed_out, more_descriptors) == (1, 0)
        assert not is_waited_for(directory / "s-1.json.lock")
        locked.go()
        locked.result()
        assert revision_at(directory, waiter.do("store.append('s-1', 'log', 2)")) == 3
        assert revision_at(directory, persist.Store(directory, timeout_s=0.0).append("s-1", "log", 3)) == 4
    finally:
        os.kill(child, signal.SIGKILL)


@linux_only
def test_who_waits_where_the_kernel_has_no_such_locks_polls(
    store: persist.Store, session: persist.Session, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without such locks costs only the order of the waiters.

    A waiter looks at the lock until it is free or time is over.
    """
    asked: list[int] = []

    def refuse(fd: int, *_arguments: object) -> None:
        asked.append(fd)
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with FileLock(directory / "s-1.json.lock", fallback_to_soft=False):
        with pytest.raises(persist.LockTimeout):
            persist.Store(directory, timeout_s=0.1).append("s-1", "log", 1)
        waiting = threading.Thread(target=lambda: store.append("s-1", "log", 2))
        asked.clear()
        waiting.start()
        eventually(lambda: bool(asked))
    waiting.join(DEADLINE_S)
    assert store.load("s-1").data["log"] == [2]
