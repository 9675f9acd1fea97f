"""HAZARDS: the failures of real chat servers, row by row, and the rule that makes each impossible here.

Numbers after a row are issues and pull requests of nesquena/hermes-webui unless another project is named. Rows on
rotating ids (C4), event cursors (D5), indexes (E1), journals (E3) and heads (E4) belong to parts that have tests of
their own or are not yet built.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from actors import DEADLINE_S
from conftest import ActorFactory
from harness.sweeps import sweep

import persist
from persist.storage import disk

PROMPT = {"role": "user", "content": "Why?"}
START = f"stream = store.start_stream('s-1', {PROMPT!r}); stream.id"


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    return store.create("s-1", {"title": "New chat", "messages": [{"id": "m1", "role": "user", "content": "hi"}]})


def messages(store: persist.Store) -> list[dict[str, object]]:
    found: list[dict[str, object]] = store.load("s-1").data["messages"]
    return found


# --- A. Ownership and lost updates ------------------------------------------------------------------------------------


def test_a1_clear_compares_with_the_disk(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A1 (#1533): a clear is compare-and-clear on the stream id read from disk under the lock.

    See also test_seed_race.
    """
    victim, writer, reader = actor(), actor(), actor()
    victim.do(START)
    reader.do("session = store.load('s-1')")
    victim.kill()
    new = writer.do(START)
    writer.kill()
    # Both streams are dead, so only the comparison can tell that this clear was meant for the other one.
    assert reader.do("session.clear_stale_stream()") is False
    assert store.load("s-1").active_stream_id == new


@pytest.mark.usefixtures("switching")
def test_a2_nothing_of_a_turn_is_written_after_its_finish(store: persist.Store, session: persist.Session) -> None:
    """A2 (#765, #910): a checkpoint thread that outlives its turn is refused."""
    refused: list[Exception] = []
    with store.start_stream("s-1", PROMPT) as stream:
        finished = threading.Event()

        def late_checkpoint() -> None:
            assert finished.wait(DEADLINE_S)
            try:
                stream.checkpoint({"role": "assistant", "content": "late"})
            except persist.StreamLost as error:
                refused.append(error)

        thread = threading.Thread(target=late_checkpoint)
        thread.start()
        stream.finish({"role": "assistant", "content": "Because."})
        finished.set()
        thread.join(DEADLINE_S)
    assert len(refused) == 1
    assert [m["content"] for m in messages(store)] == ["hi", "Why?", "Because."]


def test_a3_save_of_an_old_object_writes_only_its_own_change(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A3 (#3987): a title writer that loaded before the turn leaves the turn's messages alone.

    Fails without the merge.
    """
    writer = actor()
    writer.do("old = store.load('s-1')")
    with store.start_stream("s-1", PROMPT) as stream:
        stream.finish({"role": "assistant", "content": "Because."})
    writer.do("old.data['title'] = 'Reasons'; old.save()")
    assert [m["content"] for m in messages(store)] == ["hi", "Why?", "Because."]
    assert store.load("s-1").data["title"] == "Reasons"


def test_a4_claim_and_liveness_appear_together(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A4 (#5053): a stream in the middle of its start is never seen as dead, at any step of its commit."""
    sweeper = actor(timeout_s=0.2)
    for step in ("create", "replace", "close"):
        starter = actor()
        starter.start_and_pause(START, step)
        sweep = sweeper.do("store.clear_stale_streams()")
        assert sweep.cleared == []
        assert set(map(type, sweep.failures.values())) <= {persist.LockTimeout}
        with pytest.raises(persist.LockTimeout):
            sweeper.do("store.load('s-1').clear_stale_stream(); store.append('s-1', 'log', 1)")
        starter.go()
        stream_id = starter.result()
        assert sweeper.do("store.clear_stale_streams()") == persist.Sweep([], {})
        assert store.load("s-1").active_stream_id == stream_id
        starter.do("stream.finish()")


def test_a5_old_worker_cannot_write_into_its_successors_turn(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A5 (#2154): every write of a stream carries its epoch. Fails without the fence."""
    old, new = actor(), actor()
    stream_id = old.do(START)
    store.cancel("s-1", stream_id, force=True)
    new.do(START)
    with pytest.raises(persist.StreamLost):
        old.do("stream.finish({'role': 'assistant', 'content': 'late'})")
    new.do("stream.finish({'role': 'assistant', 'content': 'Because.'})")
    assert "late" not in [m["content"] for m in messages(store)]


def test_a6_missing_owner_fails_closed(store: persist.Store, session: persist.Session, directory: Path) -> None:
    """A6 (#6623): a stream whose owner record is gone may not write. The epoch only grows, however the turn ends."""
    epochs = []
    for end in ("finish", "fail", "cancel"):
        with store.start_stream("s-1", stream_id=end) as stream:
            epochs.append(stream.epoch)
            if end == "cancel":
                store.cancel("s-1", stream.id, force=True)
                with pytest.raises(persist.StreamLost):
                    stream.checkpoint({"role": "assistant", "content": "late"})
            else:
                getattr(stream, end)()
    assert epochs == sorted(set(epochs))
    with store.start_stream("s-1") as stream:
        assert stream.epoch > epochs[-1]
        path = directory / "s-1.json"
        path.write_bytes(re.sub(rb'"owner":\{[^}]*\}', b'"owner":null', path.read_bytes()))
        store.accept("s-1")
        with pytest.raises(persist.StreamLost):
            stream.finish()


def test_a7_death_is_proven_by_the_kernel(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """A7 (#653, #3808, #4492): a live owner with old files is spared, and a dead one with fresh files is cleared."""
    owner = actor()
    stream_id = owner.do(START)
    lease = store.path / ".leases" / f"s-1.{stream_id}"
    os.utime(lease, (0, 0))
    assert store.clear_stale_streams() == persist.Sweep([], {})
    owner.kill()
    os.utime(lease)
    assert [cleared.stream_id for cleared in store.clear_stale_streams().cleared] == [stream_id]


def test_a8_failed_launch_keeps_no_claim(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A8 (#6869): if the claim's commit fails, the lease is given back and the session is free."""

    def no_space(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "replace", no_space)
        with pytest.raises(persist.CommitFailed, match="No space left"):
            store.start_stream("s-1", PROMPT)
    assert list((store.path / ".leases").iterdir()) == []
    with store.start_stream("s-1", PROMPT) as stream:
        stream.finish()


def test_a8_failed_body_rolls_the_turn_back_to_a_free_session(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A8 (#6869): an exception in the body ends the claim, and another process can start at once."""
    owner, other = actor(), actor()
    with pytest.raises(ZeroDivisionError):
        owner.do(f"with store.start_stream('s-1', {PROMPT!r}):\n    1 / 0")
    other.do(START)


def test_a9_destructive_edit_names_what_it_saw(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A9 (#6611): a regenerate that was decided before a concurrent send is refused, and nothing is written."""
    regenerate, send = actor(), actor()
    seen = regenerate.do("seen = store.load('s-1').version; seen")
    sent = send.do("store.append('s-1', 'messages', {'id': 'm2', 'role': 'user', 'content': 'more'})")
    with pytest.raises(persist.VersionMismatch) as caught:
        regenerate.do("store.update('s-1', lambda tx: tx.data['messages'].pop(), if_version=seen)")
    assert (caught.value.mine, caught.value.theirs) == (seen, sent)
    assert (store.head("s-1").version, store.head("s-1").revision) == (sent, 2)
    assert [m["id"] for m in messages(store)] == ["m1", "m2"]


def test_a10_loads_are_never_answered_from_an_older_cache(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A10 (#3829, #4765): after 300 commits of another process, same inode or not, a load shows the last one."""
    writer = actor()
    for n in range(30):
        writer.do(f"[store.update('s-1', lambda tx: tx.data.update(n={n} * 10 + i)) for i in range(10)]")
        os.utime(store.path / "s-1.json", (1, 1))
        assert store.load("s-1").data["n"] == store.head("s-1").fields["n"] == n * 10 + 9


def test_a11_two_processes_cannot_both_run_a_turn(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A11 (#7201): at most one stream lives across processes. See also test_streams and test_lost_updates."""
    one, two = actor(), actor()
    one.do(START)
    with pytest.raises(persist.SessionBusy) as caught:
        two.do(START)
    assert caught.value.owner is not None
    assert caught.value.owner.pid == one.pid


def test_a12_lock_spans_read_change_and_write(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """A12 (QwenPaw #4232): a second read-modify-write waits until the first, held before its write, has committed.

    Fails without the lock, and with the lock only around the write.
    """
    first, second = actor(), actor(timeout_s=0.2)
    add_one = "with store.transaction('s-1') as tx:\n    tx.fields['n'] = tx.fields.get('n', 0) + 1"
    first.start_and_pause(add_one, "create")
    try:
        second.do(add_one)
    except persist.LockTimeout:
        first.go()
        first.result()
        second.do(add_one)
    else:
        first.go()
        first.result()
    assert store.load("s-1").data["n"] == 2


# --- B. Destructive and partial writes --------------------------------------------------------------------------------


def test_b1_head_has_no_save(store: persist.Store, session: persist.Session) -> None:
    """B1 (#1558): a metadata-only object cannot be written."""
    head = store.head("s-1")
    assert "messages" not in head.fields
    assert head.counts == {"messages": 1}
    assert not any(hasattr(head, verb) for verb in ("save", "append", "transaction", "refresh", "clear_stale_stream"))


def test_b2_empty_messages_in_mid_turn_are_refused(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """B2 (#4205): a save that would remove committed messages while a stream runs is an error, and writes nothing."""
    owner = actor()
    owner.do(START)
    other = store.load("s-1")
    other.data["messages"] = []
    revision = store.load("s-1").revision
    with pytest.raises(persist.MergeConflict):
        other.save()
    assert store.load("s-1").revision == revision
    assert [m["content"] for m in messages(store)] == ["hi", "Why?"]


@pytest.mark.parametrize("end", ["stream.fail()", "store.cancel('s-1', stream.id, force=True)", None])
def test_b3_prompt_partial_and_tool_results_survive_every_end(
    store: persist.Store, session: persist.Session, actor: ActorFactory, end: str | None
) -> None:
    """B3 (#765, #1471, #893): fail, cancel and a kill keep what the turn has said so far.

    Another process clears the stream after the kill.
    """
    owner = actor()
    owner.do(START)
    assert [m["content"] for m in messages(store)] == ["hi", "Why?"]
    owner.do("stream.append({'id': 't1', 'role': 'tool', 'content': 'found'})")
    owner.do("stream.checkpoint({'role': 'assistant', 'content': 'Be'})")
    if end is None:
        owner.kill()
        assert store.load("s-1").clear_stale_stream()
    else:
        owner.do(end)
    assert [(m["content"], "interrupted" in m) for m in messages(store)] == [
        ("hi", False), ("Why?", True), ("found", False), ("Be", True)
    ]  # fmt: skip


def test_b4_replace_is_tried_again_while_a_reader_has_the_file_open(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B4 (#5196): os.replace of an open file, which Windows refuses, is retried a bounded number of times.

    After that it is a clear error.
    """
    real, refusals = os.replace, iter(range(3))

    def refuse(source: Path, target: Path) -> None:
        if next(refusals, None) is not None:
            raise PermissionError(13, "The process cannot access the file")
        real(source, target)

    monkeypatch.setattr(disk, "REPLACE_PAUSE_S", 0.0)
    monkeypatch.setattr(disk, "REPLACE_ATTEMPTS", 4)
    monkeypatch.setattr(os, "replace", refuse)
    assert store.append("s-1", "log", 1) == store.head("s-1").version
    assert store.head("s-1").revision == 2
    refusals = iter(range(100))
    with pytest.raises(persist.CommitFailed, match="cannot access"):
        store.append("s-1", "log", 2)
    assert store.load("s-1").data["log"] == [1]


def test_b5_writers_never_publish_each_others_temporary_file(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """B5 (webzfs #177, php-sdk #498): a temporary file is made exclusively, under the lock.

    A left-over file is never written to.
    """
    leftover = store.path / "s-1.json.tmp"
    leftover.write_bytes(b'{"half": ')
    inode = leftover.stat().st_ino
    with leftover.open("rb") as kept_open:
        actor().do("store.append('s-1', 'log', 1)")
        assert os.fstat(kept_open.fileno()).st_nlink == 0
    assert (store.path / "s-1.json").stat().st_ino != inode
    assert store.check() == []


def test_b6_failed_save_raises_and_changes_no_memory(
    store: persist.Store, session: persist.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B6 (code review): memory changes only after the durable write. After a failure the same save works."""
    other = store.load("s-1")
    other.data["messages"].append({"id": "m2", "role": "user", "content": "theirs"})
    other.save()
    session.data["title"] = "Mine"

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "sync", broken)
        with pytest.raises(persist.CommitFailed, match="Input/output error"):
            session.save()
    assert (session.revision, len(session.data["messages"])) == (1, 1)
    assert store.load("s-1").data["title"] == "New chat"
    session.save()
    assert (session.revision, len(session.data["messages"])) == (3, 2)


def test_b7_repairs_keep_recency_and_lists_tell_live_from_stale(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """B7 (#2157): a clear keeps updated_at. `streams()` tells which of two streams lives."""
    store.create("s-2", {"messages": []})
    live, dead = actor(), actor()
    live.do("stream = store.start_stream('s-2')")
    dead.do(START)
    dead.kill()
    assert {info.session_id: info.is_live for info in store.streams()} == {"s-1": False, "s-2": True}
    before = store.head("s-1").updated_at
    sweep(store)
    assert store.head("s-1").updated_at == before
    assert [info.session_id for info in store.streams()] == ["s-2"]


# --- C. Shrink, delete, rotate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recreate", [False, True])
def test_c1_late_save_revives_no_deleted_session(
    store: persist.Store, session: persist.Session, actor: ActorFactory, recreate: bool
) -> None:
    """C1 (#5498): a save is refused if its object's session was deleted, or deleted and made anew."""
    late, deleter = actor(), actor()
    late.do("old = store.load('s-1'); old.data['title'] = 'late'")
    deleter.do("store.delete('s-1')")
    if recreate:
        deleter.do("store.create('s-1', {'title': 'new'}) and None")
    with pytest.raises(persist.SessionDeleted):
        late.do("old.save()")
    assert store.exists("s-1") is recreate
    if recreate:
        assert store.load("s-1").data == {"title": "new"}


def test_c2_intentional_shrink_stays(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """C2 (#6911, #5570): an undo is a commit like any other, so the save of an older, longer object keeps it."""
    other = actor()
    other.do("longer = store.load('s-1')")
    store.update("s-1", lambda tx: tx.data["messages"].clear(), if_version=session.version)
    other.do("longer.data['title'] = 'Longer'; longer.save()")
    assert store.load("s-1").data == {"title": "Longer", "messages": []}
    assert store.check() == []


def test_c3_order_comes_from_revisions(store: persist.Store, session: persist.Session) -> None:
    """C3 (#2914): with the clock set back ten days a merge neither hides nor revives a message."""
    old = store.load("s-1")
    store.append("s-1", "messages", {"id": "m2", "role": "user", "content": "new"})
    header = (store.path / "s-1.json").read_bytes()
    past = re.sub(rb'"updated_at":"20', b'"updated_at":"19', header)
    (store.path / "s-1.json").write_bytes(past)
    store.accept("s-1")
    old.data["title"] = "Later"
    old.save()
    assert [m["id"] for m in messages(store)] == ["m1", "m2"]


# --- D. Duplicates and false repair -----------------------------------------------------------------------------------


def test_d1_checkpoint_replaces_the_one_partial(store: persist.Store, session: persist.Session) -> None:
    """D1 (#2592): 200 checkpoints leave one partial message."""
    with store.start_stream("s-1", PROMPT) as stream:
        for n in range(200):
            stream.checkpoint({"role": "assistant", "content": "x" * n})
        assert [m["content"] for m in messages(store)] == ["hi", "Why?", "x" * 199]
        stream.finish()


def test_d2_append_is_idempotent_by_id(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """D2 (#6568): a replay of the same messages, by two processes, adds nothing. Other content is a conflict."""
    replay = "[store.append('s-1', 'messages', {'id': f'r{n}', 'role': 'user', 'content': 'x'}) for n in range(20)]"
    actors = [actor(), actor()]
    for each in actors:
        each.start(replay)
    for each in actors:
        each.result()
    assert [m["id"] for m in messages(store)] == ["m1", *(f"r{n}" for n in range(20))]
    with pytest.raises(persist.MergeConflict):
        store.append("s-1", "messages", {"id": "r1", "role": "user", "content": "y"})


def test_d3_live_worker_is_not_declared_crashed(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """D3 (#1624): a sweeper that never rests does not mark a turn that has just started or just ended."""
    owner, sweeper = actor(), actor()
    sweeper.do("import threading\ndone = threading.Event()\ncleared = []")
    sweeper.do(
        "def sweep():\n    while not done.is_set():\n        cleared.extend(store.clear_stale_streams())\n"
        "thread = threading.Thread(target=sweep); thread.start()"
    )
    owner.do(
        "for n in range(60):\n"
        "    with store.start_stream('s-1', {'role': 'user', 'content': 'Why?'}) as stream:\n"
        "        stream.finish({'role': 'assistant', 'content': 'Because.'})"
    )
    assert sweeper.do("done.set(); thread.join(); cleared") == []
    assert [m for m in messages(store) if "interrupted" in m] == []
    assert len(messages(store)) == 121


def test_d4_recovery_is_done_once(store: persist.Store, session: persist.Session, actor: ActorFactory) -> None:
    """D4 (#4283): of four processes that find a dead stream, one clears it. A second look changes nothing."""
    owner, askers = actor(), [actor() for _ in range(4)]
    owner.do(START)
    for each in askers:
        each.do("session = store.load('s-1')")
    owner.kill()
    for each in askers:
        each.start("session.clear_stale_stream()")
    assert sorted(each.result() for each in askers) == [False, False, False, True]
    recovered, revision = messages(store), store.load("s-1").revision
    assert [(m["content"], "interrupted" in m) for m in recovered] == [("hi", False), ("Why?", True)]
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert store.load("s-1").revision == revision


# --- E. Index, locks, speed -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("switching")
def test_e2_no_wait_is_without_end_and_none_is_nameless(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """E2 (#7684, #1693): 20 threads behind a stuck writer all get an error that names it, and other sessions go on."""
    stuck = actor()
    stuck.start_and_pause("store.append('s-1', 'log', 1)", "create")
    impatient = persist.Store(store.path, timeout_s=0.3)
    errors: list[persist.LockTimeout] = []

    def wait() -> None:
        try:
            impatient.append("s-1", "log", 2)
        except persist.LockTimeout as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    impatient.create("s-2", {})
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(errors) == 20
    assert any(f"pid {stuck.pid}" in error.holder for error in errors)
    assert all(error.holder != "unknown" for error in errors)
    stuck.go()
    stuck.result()


def test_e5_save_never_pays_for_its_neighbours(
    store: persist.Store, session: persist.Session, actor: ActorFactory
) -> None:
    """E5 (measured): with 300 neighbours a save opens and lists exactly the same files as alone.

    The times are in scripts/bench.
    """
    watched = actor()
    watched.do(
        "import sys\nseen = None\n"
        "def watch(event, arguments):\n"
        "    if seen is not None and event.startswith(('open', 'os.')):\n"
        "        seen.append((event, str(arguments[0])))\n"
        "sys.addaudithook(watch)\n"
        # The first commit of a store makes the directory's own name durable, too.
        "session = store.load('s-1'); session.data['n'] = 0; session.save()"
    )
    one_save = "session.data['n'] = {n}; seen = []; session.save(); said, seen = seen, None; said"
    alone = watched.do(one_save.format(n=1))
    for n in range(300):
        (store.path / f"neighbour-{n}.json").write_bytes(b"{}")
    assert watched.do(one_save.format(n=2)) == alone
    assert any(event == "os.rename" for event, _ in alone)


def test_every_row_has_a_test() -> None:
    """A1-A12, B1-B7, C1-C3, D1-D4, E2 and E5 each have a test in this file that is named after the row."""
    rows = {f"a{n}" for n in range(1, 13)} | {f"b{n}" for n in range(1, 8)} | {f"c{n}" for n in range(1, 4)}
    rows |= {f"d{n}" for n in range(1, 5)} | {"e2", "e5"}
    tested = {match[1] for name in globals() if (match := re.match(r"test_([a-e]\d+)_", name))}
    assert tested == rows
