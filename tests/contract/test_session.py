"""Session and Store in one process: what each verb does and refuses, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contract.conftest import MakeStore
from harness.contents import committed, everything_in, reopened
from harness.sweeps import sweep

import persist

KINDS = ("auto", "postgres")
Verb = Callable[[persist.Store], Any]
HI = {"id": "m1", "role": "user", "content": "hi"}
HELLO = {"id": "m2", "role": "assistant", "content": "hello"}


@pytest.fixture
def session(store: persist.Store) -> persist.Session:
    """Return a session of two messages at revision 1."""
    return store.create("s", {"title": "t", "n": 0, "messages": [dict(HI), dict(HELLO)]})


# --- save -------------------------------------------------------------------------------------------------------------


def test_a_created_session_is_on_disk_as_given(store: persist.Store) -> None:
    """A new session is durable and visible on return. Later changes of its data leave the caller's own dict alone."""
    given: dict[str, Any] = {"title": "t", "messages": [HI]}
    session = store.create("s", given)
    session.data["messages"].append(HELLO)
    assert given == {"title": "t", "messages": [HI]} == committed(store)
    assert (session.id, session.revision) == ("s", 1)


def test_references_into_the_data_stay_good_after_a_save(session: persist.Session, store: persist.Store) -> None:
    """``msgs = s.data["messages"]; s.save(); msgs.append(x); s.save()`` keeps x."""
    messages, first = session.data["messages"], session.data["messages"][0]
    session.data["title"] = "new"
    session.save()
    messages.append({"id": "m3"})
    first["seen"] = True
    session.save()
    assert committed(store)["messages"] == [{**HI, "seen": True}, HELLO, {"id": "m3"}]


def test_references_stay_good_when_others_changed_the_session(session: persist.Session, store: persist.Store) -> None:
    """After a save that brings in the commits of others, the caller's list and messages are still the session's."""
    messages, first = session.data["messages"], session.data["messages"][0]
    store.update("s", lambda tx: tx.data["messages"][0].update(seen=True))
    store.append("s", "messages", {"id": "m3"})
    session.data["title"] = "new"
    session.save()
    assert session.data["messages"] is messages
    assert messages[0] is first
    assert messages == [{**HI, "seen": True}, HELLO, {"id": "m3"}]


def test_two_objects_edits_are_both_kept(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS A3: `save` writes what this object changed, never its whole old document."""
    older = store.load("s")
    session.data["messages"].append({"id": "m3"})
    session.save()
    older.data["title"] = "from an older object"
    older.save()
    assert committed(store) == {"title": "from an older object", "n": 0, "messages": [HI, HELLO, {"id": "m3"}]}
    assert (older.data, older.revision) == (committed(store), 3)


def test_a_deletion_is_a_change_like_any_other(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS C2: an intentional removal is kept, and an older object's save never undoes it."""
    older = store.load("s")
    del session.data["title"]
    session.data["messages"].clear()
    session.save()
    older.data["n"] = 1
    older.save()
    assert committed(store) == {"n": 1, "messages": []} == older.data


def test_a_save_that_changes_nothing_writes_nothing(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS E3: the file stays the same file, and the revision stays."""
    before = everything_in(store)
    session.save()
    store.load("s").save()
    with store.transaction("s") as tx:
        data = tx.data
        data["title"] = "t"
    with store.transaction("s") as tx:
        tx.fields["title"] = "t"
        tx.list("messages").append(tx.list("messages").pop())
    assert tx.version == session.version
    store.update("s", lambda tx: None)
    assert session.save() == session.version
    assert store.append("s", "messages", HELLO) == session.version
    assert store.extend("s", "messages", [HELLO, HI]) == session.version
    assert store.extend("s", "messages", []) == session.version
    assert everything_in(store) == before
    assert session.revision == store.head("s").revision == 1


def test_a_save_after_a_merge_that_changes_nothing_writes_nothing(
    session: persist.Session, store: persist.Store
) -> None:
    """HAZARDS E3: changes that a merge brought in, new keys and their order included, are no edit of this object."""
    other = store.load("s")
    session.data["mine"] = 1
    session.data["messages"][0]["mine"] = 1
    other.data["theirs"] = 1
    other.data["messages"][0]["theirs"] = 1
    other.save()
    session.save()
    before = everything_in(store)
    session.save()
    assert everything_in(store) == before
    assert session.revision == 3


def test_a_save_after_a_refresh_that_changes_nothing_writes_nothing(
    session: persist.Session, store: persist.Store
) -> None:
    """HAZARDS E3: a refresh is no edit either, wherever the committed state has its new keys."""
    store.update(
        "s", lambda tx: tx.data.update({"messages": tx.data.pop("messages"), "title": tx.data.pop("title"), "new": 1})
    )
    before = everything_in(store)
    session.refresh()
    session.save()
    assert everything_in(store) == before


def test_touch_false_keeps_the_time(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS B7: a repair does not move a session to the top of the list, but it is a commit."""
    created = session.updated_at
    session.data["n"] = 1
    session.save(touch=False)
    store.update("s", lambda tx: tx.data.update(n=2), touch=False)
    with store.transaction("s", touch=False) as tx:
        data = tx.data
        data["n"] = 3
    store.append("s", "messages", 4, touch=False)
    store.extend("s", "messages", [5, 6], touch=False)
    assert store.head("s").revision == 6
    assert store.load("s").updated_at == store.head("s").updated_at == created
    for verb in (
        lambda: store.append("s", "messages", 7),
        lambda: store.extend("s", "messages", [8]),
        lambda: store.update("s", lambda tx: tx.fields.update(n=4)),
    ):
        before = store.head("s").updated_at
        verb()
        assert store.head("s").updated_at > before


def test_a_failed_save_leaves_memory_and_disk_as_they_were(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS B6: the error names a value deep inside that is not JSON. The next save, without it, writes the rest."""
    session.data["title"] = "new"
    session.data["messages"][1]["parts"] = [{"at": {1}}]
    memory, disk = copy.deepcopy(session.data), everything_in(store)
    with pytest.raises(persist.NotJSON) as caught:
        session.save()
    assert caught.value.path == ("messages", 1, "parts", 0, "at")
    assert (session.data, everything_in(store), session.revision) == (memory, disk, 1)
    session.data["messages"][1]["parts"] = []
    session.save()
    assert committed(store) == session.data


# --- conflicts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def contested(session: persist.Session, store: persist.Store) -> persist.Session:
    """Return a session whose unsaved title contradicts the one on disk, with other changes on both sides."""
    store.update("s", lambda tx: tx.data.update(title="theirs", theirs=1))
    session.data.update(title="mine", mine=1)
    return session


def test_a_contradiction_is_refused_whole(contested: persist.Session, store: persist.Store) -> None:
    """`MergeConflict` names session, place and values. Neither memory nor disk has changed."""
    memory, disk = copy.deepcopy(contested.data), everything_in(store)
    for verb in (contested.save, contested.refresh):
        with pytest.raises(persist.MergeConflict, match=r"session\.refresh\(\)") as caught:
            verb()
        conflict = caught.value
        assert (conflict.session_id, conflict.path) == ("s", ("title",))
        assert (conflict.base, conflict.mine, conflict.theirs) == ("t", "mine", "theirs")
        assert (contested.data, everything_in(store), contested.revision) == (memory, disk, 1)


@pytest.mark.parametrize("side", ["mine", "theirs"])
def test_on_conflict_takes_one_side_at_the_contradiction_only(
    side: Any, contested: persist.Session, store: persist.Store
) -> None:
    """A preference keeps the other changes of both sides."""
    contested.save(on_conflict=side)
    assert (
        committed(store) == {"title": side, "n": 0, "messages": [HI, HELLO], "theirs": 1, "mine": 1} == contested.data
    )


@pytest.mark.parametrize("instead", [None, "none", "gone"])
@pytest.mark.parametrize("side", ["mine", "theirs"])
def test_on_conflict_never_drops_what_was_appended(
    side: Any, instead: Any, session: persist.Session, store: persist.Store
) -> None:
    """If one side replaced or removed the messages, no preference writes that over a message that came meanwhile.

    Fails (the message is gone) if the preference is asked.
    """

    def empty(data: dict[str, Any]) -> None:
        data.pop("messages") if instead == "gone" else data.update(messages=instead)

    added = {"id": "new", "role": "user", "content": "acknowledged"}
    if side == "mine":
        empty(session.data)
        store.append("s", "messages", added)
    else:
        session.data["messages"].append(added)
        store.update("s", lambda tx: empty(tx.data))
    before = everything_in(store)
    with pytest.raises(persist.MergeConflict, match="messages"):
        session.save(on_conflict=side)
    assert everything_in(store) == before


def test_on_conflict_leaves_what_only_one_side_removed(session: persist.Session, store: persist.Store) -> None:
    """A removal that only one side made is no conflict."""
    del session.data["messages"]
    store.update("s", lambda tx: tx.data.update(title="theirs"))
    session.save(on_conflict="mine")
    assert committed(store) == {"title": "theirs", "n": 0}


def test_setting_the_edit_aside_is_the_way_out(contested: persist.Session, store: persist.Store) -> None:
    """The remedy in the error works."""
    contested.data["title"] = "t"
    contested.refresh()
    assert (contested.data["title"], contested.data["mine"]) == ("theirs", 1)
    contested.data["title"] = "mine after all"
    contested.save()
    assert (committed(store)["title"], contested.revision) == ("mine after all", 3)


def test_policies_of_the_store_settle_their_fields(make_store: MakeStore) -> None:
    """`Store(merge=…)` settles each field by its own rule: tokens add up, and the later time stays."""
    store = make_store(merge={"tokens": "sum", "seen_at": "max", "draft": "mine", "owner": "theirs"})
    store.create("s", {"tokens": 10, "seen_at": "b", "draft": "", "owner": ""})
    one, two = store.load("s"), store.load("s")
    one.data.update(tokens=15, seen_at="d", draft="one", owner="one")
    two.data.update(tokens=12, seen_at="c", draft="two", owner="two")
    one.save()
    two.save()
    assert committed(store) == {"tokens": 17, "seen_at": "d", "draft": "two", "owner": "one"} == two.data
    two.save()
    assert committed(store)["tokens"] == 17


def test_a_policy_counts_every_save_once(make_store: MakeStore) -> None:
    """A save after a merge adds only what was counted since."""
    store = make_store(merge={"n": "sum"})
    store.create("s", {"n": 0})
    objects = [store.load("s") for _ in range(3)]
    for _ in range(4):
        for each in objects:
            each.data["n"] += 1
        for each in objects:
            each.save()
    assert committed(store) == {"n": 12}


# --- refresh ----------------------------------------------------------------------------------------------------------


def test_refresh_takes_the_committed_state_and_keeps_unsaved_edits(
    session: persist.Session, store: persist.Store
) -> None:
    """Edits stay unsaved, in the caller's own objects, and the next save writes them."""
    messages = session.data["messages"]
    store.append("s", "messages", {"id": "m3"})
    session.data["title"] = "mine"
    before = everything_in(store)
    session.refresh()
    assert session.data == {"title": "mine", "n": 0, "messages": [HI, HELLO, {"id": "m3"}]}
    assert session.data["messages"] is messages
    assert (everything_in(store), session.revision) == (before, 2)
    session.save()
    assert (committed(store), session.revision) == (session.data, 3)


def test_a_value_that_is_no_json_is_refused_by_refresh_and_save(session: persist.Session, store: persist.Store) -> None:
    """A value that is no JSON cannot be compared, so both verbs refuse it. Memory and disk stay as they are."""
    store.update("s", lambda tx: tx.data.update(theirs=1))
    session.data["draft"] = {1, 2}
    for verb in (session.refresh, session.save):
        with pytest.raises(persist.NotJSON, match="draft"):
            verb()
    assert session.data["draft"] == {1, 2}
    assert "theirs" not in session.data


# --- deleted and made anew --------------------------------------------------------------------------------------------


def test_a_late_save_of_a_deleted_session_is_refused(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS C1: a deleted session does not come back, whether the object changed or not, and no file is left."""
    store.delete("s")
    nothing = everything_in(store)
    for verb in (session.save, session.refresh):
        with pytest.raises(persist.SessionDeleted):
            verb()
    session.data["title"] = "ghost"
    with pytest.raises(persist.SessionDeleted):
        session.save()
    assert not store.exists("s")
    assert everything_in(store) == nothing


def test_a_late_save_into_a_session_of_the_same_id_is_refused(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS C1: the new session is another one, even if it begins with the same data."""
    store.delete("s")
    store.create("s", copy.deepcopy(session.data))
    before = everything_in(store)
    session.data["title"] = "ghost"
    for verb in (session.save, session.refresh):
        with pytest.raises(persist.SessionDeleted):
            verb()
    assert everything_in(store) == before


# --- reserved fields --------------------------------------------------------------------------------------------------

STREAM_FIELDS = ["active_stream_id", "pending_user_message", "pending_attachments", "pending_started_at"]


@pytest.mark.parametrize("field", STREAM_FIELDS)
def test_stream_fields_are_changed_by_the_stream_verbs_only(
    field: str, session: persist.Session, store: persist.Store
) -> None:
    """`InvalidArgument` names the field and the verb to use, whichever verb tried to change it."""
    before = everything_in(store)
    session.data[field] = "x"
    attempts: list[Callable[[], Any]] = [
        session.save,
        lambda: store.update("s", lambda tx: tx.data.update({field: "x"})),
        lambda: store.update("s", lambda tx: tx.fields.update({field: "x"})),
        lambda: store.update("s", lambda tx: tx.list(field).append("x")),
        lambda: store.update("s2", lambda tx: tx.fields.update({field: "x"}), create=True),
        lambda: store.create("s2", {field: "x"}),
        lambda: store.append("s", field, "x"),
        lambda: store.append("s2", field, "x", create=True),
        lambda: store.extend("s", field, ["x"]),
    ]
    for attempt in attempts:
        with pytest.raises(persist.InvalidArgument, match="start_stream") as caught:
            attempt()
        assert caught.value.field == field
    verbs: list[Callable[[], Any]] = [
        lambda: store.start_stream("s", fields={field: "x"}),
        lambda: store.start_stream("s2", fields={field: "x"}, create=True),
    ]
    for verb in verbs:
        with pytest.raises(persist.InvalidArgument) as caught:
            verb()
        assert caught.value.field == field
    assert everything_in(store) == before
    with store.start_stream("s") as stream:
        with pytest.raises(persist.InvalidArgument):
            stream.finish(fields={field: "x"})
        with pytest.raises(persist.InvalidArgument):
            stream.update(lambda tx: tx.fields.update({field: "x"}))
        assert store.load("s").active_stream_id == stream.id, "it goes on"


def test_stream_fields_that_say_nothing_are_no_change(store: persist.Store) -> None:
    """Data with the idle fields, as other servers write them, is accepted."""
    idle: dict[str, Any] = {
        "active_stream_id": None,
        "pending_user_message": None,
        "pending_attachments": [],
        "pending_started_at": None,
    }
    session = store.create("s", dict(idle))
    session.data.clear()
    session.save()
    session.data.update(idle)
    session.save()
    assert store.load("s").active_stream_id is None


def test_the_headers_name_is_no_field(session: persist.Session, store: persist.Store) -> None:
    """`_persist` is refused at the top, and is an ordinary key further down."""
    before = everything_in(store)
    session.data["_persist"] = {}
    attempts: list[Callable[[], Any]] = [
        session.save,
        lambda: store.create("s2", {"_persist": 1}),
        lambda: store.append("s", "_persist", 1),
        lambda: store.extend("s", "_persist", [1]),
        lambda: store.update("s", lambda tx: tx.data.update(_persist=1)),
        lambda: store.update("s", lambda tx: tx.fields.update(_persist=1)),
        lambda: store.start_stream("s", fields={"_persist": 1}),
    ]
    for attempt in attempts:
        with pytest.raises(persist.InvalidArgument, match="'_persist'"):
            attempt()
    assert everything_in(store) == before
    store.update("s", lambda tx: tx.data.update(meta={"_persist": 1}))
    assert store.load("s").data["meta"] == {"_persist": 1}


# --- transaction and update -------------------------------------------------------------------------------------------


class Oops(Exception):
    pass


def test_an_edit_commits_what_its_block_leaves(session: persist.Session, store: persist.Store) -> None:
    """Read, change and write of a block are one step, and nothing comes between them."""
    with store.transaction("s") as tx:
        data = tx.data
        data["n"] += 1
        data["messages"].pop()
    assert committed(store) == {"title": "t", "n": 1, "messages": [HI]}


def test_an_edit_that_raises_writes_nothing(session: persist.Session, store: persist.Store) -> None:
    """A block that raises writes nothing, whatever it has changed.
    The error comes out as it is, and the lock is free again.
    """
    before = everything_in(store)

    def fail(tx: persist.Transaction) -> None:
        tx.list("messages").clear()
        tx.fields["n"] = 5
        tx.data.clear()
        raise Oops

    with pytest.raises(Oops), store.transaction("s") as tx:
        fail(tx)
    with pytest.raises(Oops):
        store.update("s", fail)
    with pytest.raises(Oops):
        store.update("new", fail, create=True)
    assert everything_in(store) == before
    store.append("s", "messages", {"id": "m3"})


def test_an_update_returns_what_its_function_returns(session: persist.Session, store: persist.Store) -> None:
    """`update` returns the function's result, for example the popped message."""
    assert store.update("s", lambda tx: tx.data["messages"].pop()) == HELLO
    assert committed(store)["messages"] == [HI]


def test_an_update_names_the_version_that_it_saw(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS A9: a destructive edit of an older state is a clean conflict, and its function is not called."""
    version = store.append("s", "messages", {"id": "m3"})
    before = everything_in(store)
    calls: list[Any] = []
    with pytest.raises(persist.VersionMismatch, match=f"at version {version}, not at {session.version}") as caught:
        store.update("s", calls.append, if_version=session.version)
    assert (caught.value.mine, caught.value.theirs) == (session.version, version)
    assert isinstance(caught.value, persist.MergeConflict)
    with pytest.raises(persist.VersionMismatch):
        store.delete("s", if_version=session.version)
    for wrong in ("", "1", version.upper(), version + " ", version.split(".")[0], version.split(".")[1]):
        with pytest.raises(persist.VersionMismatch):
            store.update("s", calls.append, if_version=wrong)
    assert (calls, everything_in(store)) == ([], before)
    assert store.update("s", lambda tx: tx.data["messages"].pop(), if_version=version) == {"id": "m3"}
    store.delete("s", if_version=store.head("s").version)
    assert not store.exists("s")


def test_a_version_is_that_of_one_commit(session: persist.Session, store: persist.Store) -> None:
    """Every verb that writes makes a new version. All verbs that report it agree, and it is never used again."""
    seen = [session.version]

    def assert_new(version: str | None) -> None:
        assert version == store.load("s").version == store.head("s").version
        assert version not in seen
        seen.append(version)

    assert_new(store.append("s", "log", 1))
    assert_new(store.extend("s", "log", [2, 3]))
    with store.transaction("s") as tx:
        assert tx.version == seen[-1]
        tx.fields["n"] = 1
        assert tx.version == seen[-1]
    assert_new(tx.version)
    session.data["title"] = "u"
    assert_new(session.save())
    assert session.version == seen[-1]
    store.update("s", lambda tx: tx.fields.update(title="t"))
    store.update("s", lambda tx: tx.fields.update(title="u"))
    assert_new(store.load("s").version)
    store.compact("s", alone=True)
    assert store.head("s").version == seen[-1], "a fold is no commit"
    assert reopened(store).load("s").version == seen[-1]
    with store.start_stream("s") as stream:
        assert_new(store.head("s").version)
        with stream.transaction() as tx:
            tx.fields["n"] = 2
        assert_new(tx.version)
    assert_new(store.head("s").version)
    copied = store.duplicate("s", "copy")
    assert copied.version not in seen
    assert copied.version == store.head("copy").version
    store.delete("s")
    assert store.create("s", copied.data).version not in [*seen, copied.version], "it is another session"


def test_a_version_that_was_seen_holds_across_a_fold_and_processes(
    session: persist.Session, store: persist.Store
) -> None:
    """A reader of the version may write with it, also through another store."""
    version = store.append("s", "log", 1)
    store.compact("s", alone=True)
    other = reopened(store, journal="never")
    other.update("s", lambda tx: tx.fields.update(n=1), if_version=version)
    with pytest.raises(persist.VersionMismatch):
        store.update("s", lambda tx: tx.fields.update(n=2), if_version=version)
    assert committed(store)["n"] == 1


def test_a_lock_inside_a_lock_is_refused(session: persist.Session, store: persist.Store) -> None:
    """A second session, or the same one again, is `LockError` instead of a deadlock. The outer block still commits."""
    store.create("other")
    session.data["title"] = "new"
    with store.transaction("s") as tx:
        data = tx.data
        data["n"] = 1
        for verb, wanted in NESTED:
            with pytest.raises(persist.LockError) as caught:
                verb(store)
            assert (caught.value.held, caught.value.session_id) == ("s", wanted)
        with pytest.raises(persist.LockError):
            session.save()
        assert store.load("s").data["n"] == 0
    assert committed(store)["n"] == 1
    session.save()


NESTED: list[tuple[Verb, str]] = [
    (lambda store: store.append("s", "messages", 1), "s"),
    (lambda store: store.append("other", "messages", 1), "other"),
    (lambda store: store.update("other", lambda tx: tx.data.clear()), "other"),
    (lambda store: store.extend("other", "messages", [1]), "other"),
    (lambda store: store.append("new", "messages", 1, create=True), "new"),
    (lambda store: store.transaction("other").__enter__(), "other"),
    (lambda store: store.stream("other"), "other"),
    (lambda store: store.create("new"), "new"),
    (lambda store: store.delete("other"), "other"),
    (lambda store: store.duplicate("s", "copy"), "copy"),
    (lambda store: store.start_stream("other"), "other"),
    (lambda store: reopened(store).append("s", "messages", 1), "s"),
]


def test_another_thread_waits_for_the_lock_and_says_who_holds_it(
    session: persist.Session, make_store: MakeStore
) -> None:
    """`timeout_s` bounds the wait. Afterwards the lock can be taken as usual."""
    impatient = make_store(timeout_s=0.05)
    caught: list[persist.LockTimeout] = []

    def wait() -> None:
        with pytest.raises(persist.LockTimeout) as error:
            impatient.append("s", "messages", 1)
        caught.append(error.value)

    with impatient.transaction("s") as tx:
        data = tx.data
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(20)
        data["n"] = 1
    [timeout] = caught
    assert timeout.timeout_s == 0.05 <= timeout.waited_s
    assert "this process" in timeout.holder
    impatient.append("s", "messages", 1)
    assert impatient.head("s").revision == 3


# --- append -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["title", "messages", "pending_user_message"])
def test_a_field_set_beside_the_data_is_refused(session: persist.Session, name: str) -> None:
    """`session.title = …; session.save()`, as users of such servers write, must not be lost in silence."""
    with pytest.raises(AttributeError, match=rf"'{name}' to set.*session\.data"):
        setattr(session, name, "x")


def test_an_append_is_idempotent_by_id(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS D2: the same item again is a no-op, whatever the order of its keys. Other content is a conflict."""
    item = {"id": "m3", "role": "tool", "content": "x"}
    version = store.append("s", "messages", item)
    assert (version, store.head("s").revision) == (store.head("s").version, 2)
    before = everything_in(store)
    assert store.append("s", "messages", dict(reversed(item.items()))) == version
    with pytest.raises(persist.MergeConflict, match=r"'s'.*has the same id") as caught:
        store.append("s", "messages", {**item, "content": "y"})
    assert caught.value.path == ("messages", 2)
    assert (caught.value.mine["content"], caught.value.theirs["content"]) == ("y", "x")
    assert everything_in(store) == before


@pytest.mark.parametrize("item", ["text", 5, None, ["a"], {}, {"content": "no id"}, {"id": None}])
@pytest.mark.parametrize("field", ["messages", "log"])
def test_an_item_without_an_id_is_appended_each_time(
    field: str, item: Any, session: persist.Session, store: persist.Store
) -> None:
    """An item without an id is added each time, because nothing shows a repetition."""
    one = store.extend("s", field, [item])
    two = store.extend("s", field, [item])
    assert (one != two, store.head("s").revision) == (True, 3)
    assert committed(store)[field][-2:] == [item, item]
    store.extend("s", field, [item, item])
    assert committed(store)[field][-4:] == [item] * 4
    if type(item) is not list or field == "log":
        store.append("s", field, item)
        assert committed(store)[field][-5:] == [item] * 5


@pytest.mark.parametrize("field", ["messages", "tool_calls"])
def test_a_list_is_no_message(field: str, session: persist.Session, store: persist.Store) -> None:
    """``append(id, "messages", [m1, m2])`` means two messages. As one message, no server could read it."""
    before = everything_in(store)
    for wrong in ([], [HI], [{"id": "m3"}, {"id": "m4"}]):
        with pytest.raises(persist.InvalidArgument, match=r"must be one message: use extend\(\) for several"):
            store.append("s", field, wrong)
    assert everything_in(store) == before
    store.extend("s", field, [{"id": "m3"}, {"id": "m4"}])
    assert committed(store)[field][-2:] == [{"id": "m3"}, {"id": "m4"}]


# --- extend -----------------------------------------------------------------------------------------------------------


def test_an_extend_is_one_commit(session: persist.Session, store: persist.Store) -> None:
    """An extend adds all items, in their order, or none of them."""
    version = store.extend("s", "messages", [{"id": "m3"}, "text", {"id": "m4"}])
    assert (store.head("s").version, store.head("s").revision) == (version, 2)
    assert committed(store)["messages"] == [HI, HELLO, {"id": "m3"}, "text", {"id": "m4"}]
    before = everything_in(store)
    for wrong, error in (
        ([{"id": "m5"}, {"id": "m1", "content": "other"}], persist.MergeConflict),
        ([{"id": "m5"}, {"a": math.nan}], persist.NotJSON),
        ([{"id": "m5"}, {"id": "m5", "content": "other"}], persist.MergeConflict),
    ):
        with pytest.raises(error):
            store.extend("s", "messages", wrong)
    assert everything_in(store) == before


def test_an_extend_may_be_repeated_after_any_of_its_items(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS D2: an item that is there counts as added. Only the others are added, each once."""
    items: list[Any] = [{"id": f"n{number}", "content": "x"} for number in range(4)]
    store.append("s", "messages", items[1])
    store.extend("s", "messages", items)
    assert [message["id"] for message in committed(store)["messages"]] == ["m1", "m2", "n1", "n0", "n2", "n3"]
    before = everything_in(store)
    store.extend("s", "messages", items)
    store.extend("s", "messages", [*items, *map(dict, reversed(items))])
    assert everything_in(store) == before
    store.extend("s", "messages", [{"id": "twice"}, {"id": "twice"}])
    assert [message["id"] for message in committed(store)["messages"]][-2:] == ["n3", "twice"]


def test_a_key_tells_items_apart(session: persist.Session, store: persist.Store) -> None:
    """Another key than ``id`` tells items apart, whatever ``id`` they have.
    An item without that key is added each time.
    """
    one, two = {"call": "c1", "id": "x", "n": 1}, {"call": "c2", "id": "x", "n": 2}
    version = store.extend("s", "calls", [one, two], key="call")
    assert store.append("s", "calls", one, key="call") == version
    assert store.extend("s", "calls", [two, one], key="call") == version
    with pytest.raises(persist.MergeConflict, match=r"data\['calls'\]\[0\] has the same call") as caught:
        store.extend("s", "calls", [{"call": "c3"}, {**one, "n": 5}], key="call")
    assert caught.value.path == ("calls", 0)
    with pytest.raises(persist.MergeConflict):
        store.append("s", "calls", one)
    assert committed(store)["calls"] == [one, two]
    store.extend("s", "calls", [{"id": "y"}, {"id": "y"}, "text", "text"], key="call")
    assert committed(store)["calls"] == [one, two, {"id": "y"}, {"id": "y"}, "text", "text"]


def test_without_a_key_all_items_are_added(session: persist.Session, store: persist.Store) -> None:
    """All items are added, also the same item once more, and others of the same id."""
    store.extend("s", "messages", [HI, {**HI, "content": "other"}, HI], key=None)
    store.append("s", "messages", HI, key=None)
    assert committed(store)["messages"] == [HI, HELLO, HI, {**HI, "content": "other"}, HI, HI]
    with pytest.raises(persist.MergeConflict):
        store.append("s", "messages", {**HI, "content": "third"})


@pytest.mark.parametrize("wrong", ["text", b"bytes", {"id": "m3"}, None, 5])
def test_what_is_not_several_items_is_refused(wrong: Any, session: persist.Session, store: persist.Store) -> None:
    """A message in place of a list would be its keys, and a text its letters, so both are refused."""
    before = everything_in(store)
    with pytest.raises(persist.InvalidArgument, match="must be several items, in a list"):
        store.extend("s", "messages", wrong)
    assert everything_in(store) == before


def test_items_may_come_from_anywhere(session: persist.Session, store: persist.Store) -> None:
    """Items of an iterator are read before the lock is taken. Later changes of them do not reach the session."""
    item: dict[str, Any] = {"id": "m3"}

    def some() -> Iterator[Any]:
        assert store.append("s", "log", 1), "no lock is held"
        yield item
        yield {"id": "m4"}

    store.extend("s", "messages", some())
    item["late"] = True
    store.extend("s", "messages", ({"id": "m5"},))
    assert committed(store)["messages"] == [HI, HELLO, {"id": "m3"}, {"id": "m4"}, {"id": "m5"}]


@pytest.mark.parametrize(("one", "two"), [(1, "1"), (1, True), (0, False)])
def test_ids_of_different_types_are_different(
    one: Any, two: Any, session: persist.Session, store: persist.Store
) -> None:
    """``1``, ``"1"`` and ``True`` are three ids."""
    store.append("s", "messages", {"id": one, "a": 1})
    store.append("s", "messages", {"id": two, "a": 2})
    assert len(committed(store)["messages"]) == 4


def test_an_append_makes_a_missing_list_and_no_other(session: persist.Session, store: persist.Store) -> None:
    """An append creates a missing list.
    A field that is no list is an `InvalidArgument` with its name, and nothing is written.
    """
    store.append("s", "notes", "n")
    assert committed(store)["notes"] == ["n"]
    before = everything_in(store)
    with pytest.raises(persist.InvalidArgument, match="field 'title' of the document is str; it must be a list"):
        store.append("s", "title", "x")
    assert everything_in(store) == before


# --- looking, copying, closing ----------------------------------------------------------------------------------------


def test_ids_are_paged_in_order(store: persist.Store) -> None:
    """All pages together have every session once, although some come and go between."""
    for name in ("b", "a", "C", "a-1", "a_1", "0"):
        store.create(name)
    assert store.ids() == sorted(["b", "a", "C", "a-1", "a_1", "0"])
    pages, last = [], None
    while page := store.ids(after=last, limit=2):
        pages += page
        last = page[-1]
        store.delete(last)
    assert pages == sorted(["b", "a", "C", "a-1", "a_1", "0"])
    assert store.ids(limit=0) == []
    assert store.ids(after="zzz") == []
    assert store.ids(after="\n") == store.ids()


@pytest.mark.parametrize("prefix", ["", "a", "a-", "a-1", "é", "b", "x" * 300, "%", "\n"])
def test_ids_with_a_prefix_are_those_that_begin_with_it(prefix: str, store: persist.Store) -> None:
    """Only the id must begin with the prefix, in the pages, too. The file's name does not count."""
    names = ["a", "a-1", "a-10", "a-2", "A", "é", "é1", "b%", "%", "x" * 300, "x" * 300 + "y", "x" * 299, "c\n"]
    for name in names:
        store.create(name, {"name": name})
    expected = sorted(name for name in names if name.startswith(prefix))
    assert store.ids(prefix=prefix) == expected
    assert [head.id for head in store.heads(prefix=prefix)] == expected
    assert [head.fields["name"] for head in store.heads(prefix=prefix)] == expected
    pages, last = [], None
    while page := store.ids(prefix=prefix, after=last, limit=2):
        assert [head.id for head in store.heads(prefix=prefix, after=last, limit=2)] == page
        assert len(page) <= 2
        pages += page
        last = page[-1]
    assert pages == expected


def test_heads_are_read_when_they_are_asked_for(store: persist.Store) -> None:
    """A head shows the commits up to its own read. A session that is deleted by then is left out. No lock is taken."""
    for name in ("a", "b", "c", "d"):
        store.create(name, {"n": 0})
    with store.transaction("b"):
        heads = store.heads()
        assert next(heads).id == "a"
        assert next(heads).fields == {"n": 0}, "also of a session that is locked"
    store.update("c", lambda tx: tx.fields.update(n=1))
    store.delete("d")
    store.create("e")
    assert [(head.id, head.fields, head.version) for head in heads] == [("c", {"n": 1}, store.head("c").version)]


def test_exists_tells_whether_there_is_such_a_session(session: persist.Session, store: persist.Store) -> None:
    """`exists` tells the truth, and leaves no trace of the question."""
    before = everything_in(store)
    assert store.exists("s")
    assert not store.exists("t")
    assert everything_in(store) == before


MISSING_VERBS: list[Verb] = [
    lambda store: store.load("missing"),
    lambda store: store.head("missing"),
    lambda store: store.tail("missing"),
    lambda store: store.tail("missing", limit=0, field="log"),
    lambda store: store.delete("missing"),
    lambda store: store.delete("missing", if_version="x"),
    lambda store: store.delete("missing", force=True),
    lambda store: store.update("missing", lambda tx: tx.data.clear()),
    lambda store: store.update("missing", lambda tx: tx.data.clear(), create=True, if_version="x"),
    lambda store: store.transaction("missing").__enter__(),
    lambda store: store.transaction("missing", create=True, if_version="x").__enter__(),
    lambda store: store.append("missing", "messages", 1),
    lambda store: store.extend("missing", "messages", []),
    lambda store: store.stream("missing"),
    lambda store: store.compact("missing"),
    lambda store: store.duplicate("missing", "copy"),
    lambda store: store.start_stream("missing"),
    lambda store: store.cancel("missing", "t"),
    lambda store: store.accept("missing"),
]


@pytest.mark.parametrize("verb", MISSING_VERBS)
def test_a_session_that_is_not_there_is_named_and_not_made(verb: Verb, store: persist.Store) -> None:
    """`SessionNotFound` is a KeyError, too, and says where the session would be. No session appears."""
    before = everything_in(store)
    with pytest.raises(persist.SessionNotFound) as caught:
        verb(store)
    assert isinstance(caught.value, KeyError)
    assert (caught.value.session_id, "missing" in str(caught.value.path)) == ("missing", True)
    assert everything_in(store) == before


def test_create_never_overwrites(session: persist.Session, store: persist.Store) -> None:
    """A session of that id is `SessionExists`, from `create` and `duplicate` alike."""
    store.create("other")
    before = everything_in(store)
    verbs: list[Verb] = [
        lambda store: store.create("s", {}),
        lambda store: store.duplicate("other", "s"),
        lambda store: store.duplicate("s", "s"),
    ]
    for verb in verbs:
        with pytest.raises(persist.SessionExists):
            verb(store)
    assert everything_in(store) == before


def test_a_duplicate_is_a_session_of_its_own(session: persist.Session, store: persist.Store) -> None:
    """A duplicate has the same data at revision 1, and no bond with the original."""
    store.update("s", lambda tx: tx.data.update(n=5))
    copied = store.duplicate("s", "copy")
    assert (copied.id, copied.revision, copied.data) == ("copy", 1, committed(store))
    store.delete("s")
    copied.data["n"] = 6
    copied.save()
    assert committed(store, "copy")["n"] == 6


def test_a_duplicate_of_a_session_in_mid_turn_has_no_stream(session: persist.Session, store: persist.Store) -> None:
    """A duplicate has the prompt and tool results, but neither stream fields nor the partial answer.
    The stream goes on.
    """
    with store.start_stream("s", {"id": "p", "role": "user", "content": "?"}) as stream:
        stream.append({"id": "tool", "role": "tool"})
        stream.checkpoint({"role": "assistant", "content": "part"})
        copied = store.duplicate("s", "copy")
        assert copied.data["messages"] == [
            HI,
            HELLO,
            {"id": "p", "role": "user", "content": "?"},
            {"id": "tool", "role": "tool"},
        ]
        assert not copied.data.keys() & {*STREAM_FIELDS}
        store.start_stream("copy").fail()
        stream.finish({"role": "assistant", "content": "all"})
    assert committed(store)["messages"][-1]["content"] == "all"


def test_an_answer_never_takes_a_prompts_place(store: persist.Store) -> None:
    """B3: an answer that has the id of an interrupted prompt is refused, and the prompt stays."""
    store.create("s", {"messages": []})
    prompt = {"id": "m7", "role": "user", "content": "Why?"}
    with store.start_stream("s", prompt):
        pass
    with store.start_stream("s") as stream, pytest.raises(persist.MergeConflict):
        stream.finish({"id": "m7", "role": "assistant", "content": "Because."})
    assert store.load("s").data["messages"] == [{**prompt, "interrupted": True}]


def test_a_head_cannot_be_saved(session: persist.Session, store: persist.Store) -> None:
    """HAZARDS B1: a part has no way to be written as the whole."""
    head = store.head("s")
    assert not hasattr(head, "save")
    with pytest.raises(AttributeError):
        head.fields = {}  # type: ignore[misc]
    with pytest.raises(persist.InvalidArgument):
        store.create("copy", head)  # type: ignore[arg-type]


CLOSED_VERBS: list[Verb] = [
    lambda store: store.load("s"),
    lambda store: store.head("s"),
    lambda store: store.exists("s"),
    lambda store: store.ids(),
    lambda store: list(store.heads()),
    lambda store: store.tail("s"),
    lambda store: store.recent(),
    lambda store: store.view("s"),
    lambda store: store.repair("s"),
    lambda store: store.create("new"),
    lambda store: store.duplicate("s", "copy"),
    lambda store: store.replace("s", {}),
    lambda store: store.delete("s"),
    lambda store: store.transaction("s").__enter__(),
    lambda store: store.update("s", lambda tx: tx.data.clear()),
    lambda store: store.append("s", "messages", 1),
    lambda store: store.extend("s", "messages", [1]),
    lambda store: store.start_stream("s"),
    lambda store: store.cancel("s", "t"),
    lambda store: store.follow("s", "t"),
    lambda store: store.events("s", "t"),
    lambda store: store.stream("s"),
    lambda store: store.streams(),
    sweep,
    lambda store: store.check(),
    lambda store: store.accept("s"),
    lambda store: store.compact("s"),
    lambda store: store.backup("copy"),
]


def test_a_closed_store_takes_no_verb(session: persist.Session, store: persist.Store) -> None:
    """Every verb of a closed store is `StoreClosed`. A store may be closed twice, or by ``with``."""
    with store:
        pass
    store.close()
    before = everything_in(store)
    for verb in CLOSED_VERBS:
        with pytest.raises(persist.StoreClosed, match=re.escape(store._backend.engine.place)):
            verb(store)
    assert everything_in(store) == before


def test_the_list_of_closed_verbs_is_complete(store: persist.Store) -> None:
    """A verb that is added later must be refused on a closed store, too."""
    public = {name for name in vars(persist.Store) if not name.startswith("_")} - {"path", "place", "close"}
    assert len(public) == len(CLOSED_VERBS)


# --- arguments that cannot be -----------------------------------------------------------------------------------------

BAD_IDS: list[Any] = ["", "a" * 513, "\ud800", "s\udfff", "\ud83d\ude00", None, 5, ["s"], b"s", {"s": 1}]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: ascii(bad)[:12])
def test_no_verb_takes_a_bad_session_id(bad: Any, session: persist.Session, store: persist.Store) -> None:
    """Each bad id is an `InvalidArgument`, and no file appears or disappears."""
    before = everything_in(store)
    verbs: list[Callable[[], Any]] = [
        lambda: store.load(bad),
        lambda: store.head(bad),
        lambda: store.tail(bad),
        lambda: store.exists(bad),
        lambda: store.create(bad),
        lambda: store.duplicate(bad, "copy"),
        lambda: store.duplicate("s", bad),
        lambda: store.delete(bad),
        lambda: store.delete(bad, force=True),
        lambda: store.transaction(bad).__enter__(),
        lambda: store.transaction(bad, create=True).__enter__(),
        lambda: store.update(bad, lambda tx: tx.data.clear()),
        lambda: store.append(bad, "messages", 1),
        lambda: store.append(bad, "messages", 1, create=True),
        lambda: store.extend(bad, "messages", [1]),
        lambda: store.stream(bad),
        lambda: store.compact(bad),
        lambda: store.start_stream(bad),
        lambda: store.start_stream(bad, create=True),
        lambda: store.cancel(bad, "t"),
        lambda: store.accept(bad),
    ]
    for verb in verbs:
        with pytest.raises(persist.InvalidArgument):
            verb()
    assert everything_in(store) == before


def no_json(store: persist.Store) -> None:
    with store.transaction("s") as tx:
        data = tx.data
        data["messages"][0]["at"] = math.nan


def no_json_in_a_list(store: persist.Store) -> None:
    with store.transaction("s") as tx:
        tx.list("messages")[0]["at"] = math.nan


def no_json_in_a_field(store: persist.Store) -> None:
    with store.transaction("s") as tx:
        tx.fields["n"] = ()


def generator(tx: persist.Transaction) -> Iterator[None]:
    tx.data["n"] = 1
    yield


def clear(tx: persist.Transaction) -> None:
    tx.data.clear()


def no_dict(store: persist.Store) -> None:
    session = store.load("s")
    session.data = []  # type: ignore[assignment]
    session.save()


BAD_ARGUMENTS: dict[str, tuple[Verb, type[Exception]]] = {
    "create: a list": (lambda store: store.create("new", []), persist.InvalidArgument),  # type: ignore[arg-type]
    "create: a text": (lambda store: store.create("new", "{}"), persist.InvalidArgument),  # type: ignore[arg-type]
    "create: NaN": (lambda store: store.create("new", {"a": math.nan}), persist.NotJSON),
    "create: a key": (lambda store: store.create("new", {1: 1}), persist.NotJSON),  # type: ignore[dict-item]
    "transaction: NaN": (no_json_in_a_list, persist.NotJSON),
    "transaction: a field": (no_json_in_a_field, persist.NotJSON),
    "transaction: NaN in the data": (no_json, persist.NotJSON),
    "save: a list": (no_dict, persist.InvalidArgument),
    "save: on_conflict": (lambda store: store.load("s").save(on_conflict="ours"), persist.InvalidArgument),  # type: ignore[arg-type]
    "save: on_conflict list": (lambda store: store.load("s").save(on_conflict=[]), persist.InvalidArgument),  # type: ignore[arg-type]
    "update: tuple": (lambda store: store.update("s", lambda tx: tx.data.update(a=())), persist.NotJSON),
    "update: no function": (lambda store: store.update("s", 5), persist.InvalidArgument),  # type: ignore[arg-type]
    "update: if_version": (lambda store: store.update("s", clear, if_version=1), persist.InvalidArgument),  # type: ignore[arg-type]
    "update: another if_version": (lambda store: store.update("s", clear, if_version="1"), persist.VersionMismatch),
    "delete: if_version": (lambda store: store.delete("s", if_version=1), persist.InvalidArgument),  # type: ignore[arg-type]
    "delete: another if_version": (lambda store: store.delete("s", if_version="1"), persist.VersionMismatch),
    "update: a new dict": (lambda store: store.update("s", lambda tx: {"n": 1}), persist.InvalidArgument),
    "update: a list's name": (lambda store: store.update("s", lambda tx: tx.list(5)), persist.InvalidArgument),  # type: ignore[arg-type]
    "update: a generator": (lambda store: store.update("s", generator), persist.InvalidArgument),
    "append: field": (lambda store: store.append("s", 5, 1), persist.InvalidArgument),  # type: ignore[arg-type]
    "append: no field": (lambda store: store.append("s", None, 1), persist.InvalidArgument),  # type: ignore[arg-type]
    "append: bytes": (lambda store: store.append("s", "messages", b"x"), persist.NotJSON),
    "append: key": (lambda store: store.append("s", "log", 1, key=5), persist.InvalidArgument),  # type: ignore[arg-type]
    "extend: field": (lambda store: store.extend("s", 5, [1]), persist.InvalidArgument),  # type: ignore[arg-type]
    "extend: no field": (lambda store: store.extend("s", None, [1]), persist.InvalidArgument),  # type: ignore[arg-type]
    "extend: bytes": (lambda store: store.extend("s", "messages", [1, b"x"]), persist.NotJSON),
    "extend: a quote in the key": (lambda store: store.extend("s", "log", [1], key='a"b'), persist.InvalidArgument),
    "extend: an empty key": (lambda store: store.extend("s", "log", [1], key=""), persist.InvalidArgument),
    "extend: a surrogate key": (lambda store: store.extend("s", "log", [1], key="\ud800"), persist.InvalidArgument),
    "tail: limit": (lambda store: store.tail("s", limit=-1), persist.InvalidArgument),
    "tail: no limit": (lambda store: store.tail("s", limit=None), persist.InvalidArgument),  # type: ignore[arg-type]
    "tail: limit bool": (lambda store: store.tail("s", limit=True), persist.InvalidArgument),
    "tail: field": (lambda store: store.tail("s", field=5), persist.InvalidArgument),  # type: ignore[arg-type]
    "tail: no field": (lambda store: store.tail("s", field=None), persist.InvalidArgument),  # type: ignore[arg-type]
    "tail: a text": (lambda store: store.tail("s", field="title"), persist.InvalidArgument),
    "heads: limit": (lambda store: list(store.heads(limit=-1)), persist.InvalidArgument),
    "heads: prefix": (lambda store: list(store.heads(prefix=5)), persist.InvalidArgument),  # type: ignore[arg-type]
    "heads: after": (lambda store: list(store.heads(after=5)), persist.InvalidArgument),  # type: ignore[arg-type]
    "ids: prefix": (lambda store: store.ids(prefix=5), persist.InvalidArgument),  # type: ignore[arg-type]
    "ids: limit": (lambda store: store.ids(limit=-1), persist.InvalidArgument),
    "ids: limit text": (lambda store: store.ids(limit="1"), persist.InvalidArgument),  # type: ignore[arg-type]
    "ids: limit bool": (lambda store: store.ids(limit=True), persist.InvalidArgument),
    "ids: after": (lambda store: store.ids(after=5), persist.InvalidArgument),  # type: ignore[arg-type]
    "start: message": (lambda store: store.start_stream("s", "hi"), persist.InvalidArgument),  # type: ignore[arg-type]
    "start: message id": (lambda store: store.start_stream("s", {"id": 1.5}), persist.InvalidArgument),
    "start: NaN": (lambda store: store.start_stream("s", {"content": math.nan}), persist.NotJSON),
    "start: once without an id": (lambda store: store.start_stream("s", {}, once=True), persist.InvalidArgument),
    "start: once without a prompt": (lambda store: store.start_stream("s", once=True), persist.InvalidArgument),
    "start: fields": (lambda store: store.start_stream("s", fields=[1]), persist.InvalidArgument),  # type: ignore[arg-type]
    "start: fields NaN": (lambda store: store.start_stream("s", fields={"n": math.nan}), persist.NotJSON),
    "start: fields 5": (lambda store: store.start_stream("s", fields={5: 1}), persist.NotJSON),  # type: ignore[dict-item]
    "start: messages": (lambda store: store.start_stream("s", fields={"messages": []}), persist.InvalidArgument),
    "start: stream_id": (lambda store: store.start_stream("s", stream_id="../t"), persist.InvalidArgument),
    "start: stream_id 5": (lambda store: store.start_stream("s", stream_id=5), persist.InvalidArgument),  # type: ignore[arg-type]
    "store: path": (lambda store: persist.Store(5), persist.InvalidArgument),  # type: ignore[arg-type]
    "store: bytes": (lambda store: persist.Store(b"x"), persist.InvalidArgument),  # type: ignore[arg-type]
    "store: empty": (lambda store: persist.Store(""), persist.InvalidArgument),
    "store: timeout": (lambda store: reopened(store, timeout_s=-1), persist.InvalidArgument),
    "store: timeout NaN": (lambda store: reopened(store, timeout_s=math.nan), persist.InvalidArgument),
    "store: timeout text": (lambda store: reopened(store, timeout_s="5"), persist.InvalidArgument),
    "store: timeout bool": (lambda store: reopened(store, timeout_s=True), persist.InvalidArgument),
    "store: lease": (lambda store: reopened(store, lease_s=0.9), persist.InvalidArgument),
    "store: create": (lambda store: reopened(store, create="false"), persist.InvalidArgument),
    "store: network": (lambda store: reopened(store, unsafe_filesystem=1), persist.InvalidArgument),
    "store: policy of 1": (lambda store: reopened(store, merge={1: "sum"}), persist.InvalidArgument),
    "store: policy of messages": (
        lambda store: reopened(store, merge={"messages": "mine"}),
        persist.InvalidArgument,
    ),
    "store: policy of _persist": (
        lambda store: reopened(store, merge={"_persist": "mine"}),
        persist.InvalidArgument,
    ),
    "store: policy": (lambda store: reopened(store, merge={"n": "add"}), persist.InvalidArgument),
    "store: policies": (lambda store: reopened(store, merge=["n"]), persist.InvalidArgument),
}


@pytest.mark.parametrize(("verb", "error"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_a_typed_error_and_changes_nothing(
    verb: Verb, error: type[Exception], session: persist.Session, store: persist.Store
) -> None:
    """No verb writes half of its work, and every failure has a type of its own."""
    before = everything_in(store)
    with pytest.raises(error):
        verb(store)
    assert everything_in(store) == before
    store.append("s", "messages", {"id": "m3"})


@pytest.mark.parametrize("stream_id", ["../t", "", None, 5, ["t"]])
def test_cancelling_what_no_stream_is_called_is_a_no_op(
    stream_id: Any, session: persist.Session, store: persist.Store
) -> None:
    """For any other name than the current stream's, `cancel` returns False and writes nothing."""
    before = everything_in(store)
    assert store.cancel("s", stream_id) is False
    assert store.cancel("s", stream_id, force=True) is False
    assert everything_in(store) == before
