"""Every error says what happened, which session or file, and what to do. None of them shows what a document holds.

The public API raises each class here, as users meet it. A class without a case fails the first test.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import persist
from persist import errors, json_codec, translating
from persist.storage import disk, file_system

CANARY = "c" + "anary" * 3  # Put together, so that no line of this file shows it in a traceback.


@dataclass(frozen=True)
class Scene:
    """A store with one session, ``s``, that holds the canary everywhere."""

    store: persist.Store
    monkeypatch: pytest.MonkeyPatch
    document: Path
    lock: Path

    def load(self) -> persist.Session:
        return self.store.load("s")

    def put(self, content: bytes) -> None:
        self.document.write_bytes(content)

    def damage(self, before: bytes, after: bytes) -> None:
        self.put(self.document.read_bytes().replace(before, after))

    def fail(self, function: str, code: int) -> None:
        """Make one step of the disk fail, for good."""

        def broken(*_arguments: Any) -> None:
            raise OSError(code, os.strerror(code))

        self.monkeypatch.setattr(disk, function, broken)


@pytest.fixture
def scene(store: persist.Store, monkeypatch: pytest.MonkeyPatch) -> Scene:
    store.create("s", {"title": CANARY, "messages": [{"id": "m1", "content": CANARY}], "n": 0})
    return Scene(store, monkeypatch, store.path / "s.json", store.path / "s.json.lock")


# --- one way to each error --------------------------------------------------------------------------------------------


def session_deleted(scene: Scene) -> None:
    session = scene.load()
    scene.store.delete("s")
    session.save()


def store_closed(scene: Scene) -> None:
    scene.store.close()
    scene.load()


def not_json(scene: Scene) -> None:
    session = scene.load()
    session.data["messages"][0]["parts"] = [{CANARY}]
    session.save()


def too_large(scene: Scene) -> None:
    scene.monkeypatch.setattr(json_codec, "MAX_BYTES", 1000)
    scene.store.append("s", "messages", CANARY * 100)


def reserved_field(scene: Scene) -> None:
    session = scene.load()
    session.data["pending_user_message"] = CANARY
    session.save()


def merge_conflict(scene: Scene) -> None:
    one, two = scene.load(), scene.load()
    one.data["messages"][0]["content"] += "1"
    two.data["messages"][0]["content"] += "2"
    one.save()
    two.save()


def session_busy(scene: Scene) -> None:
    with scene.store.start_stream("s", {"content": CANARY}, stream_id="t1"):
        scene.store.start_stream("s", {"content": CANARY})


def already_started(scene: Scene) -> None:
    prompt = {"id": "p", "content": CANARY}
    with scene.store.start_stream("s", prompt, stream_id="t1", once=True):
        scene.store.start_stream("s", prompt, once=True)


def already_answered(scene: Scene) -> None:
    prompt = {"id": "p", "role": "user", "content": CANARY}
    scene.store.start_stream("s", prompt, once=True).finish({"role": "assistant", "content": CANARY + "x"})
    scene.store.start_stream("s", prompt, once=True)


def cursor_ahead(scene: Scene) -> None:
    with scene.store.start_stream("s", stream_id="t1") as stream:
        stream.emit(CANARY)
        scene.store.follow("s", "t1", after=5)


def emit_failed(scene: Scene) -> None:
    with scene.store.start_stream("s", stream_id="t1") as stream:
        stream.emit(CANARY)
        with scene.monkeypatch.context() as patched:
            Scene(scene.store, patched, scene.document, scene.lock).fail("write", errno.ENOSPC)
            stream.emit(CANARY)


def stream_lost(scene: Scene) -> None:
    with scene.store.start_stream("s", {"content": CANARY}, stream_id="t1") as stream:
        scene.store.cancel("s", "t1", force=True)
        stream.finish({"content": CANARY})


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[None]:
    """Hold the lock by the kernel's own call, as another program would."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_timeout(scene: Scene) -> None:
    with locked_elsewhere(scene.lock):
        persist.Store(scene.store.path, timeout_s=0.01).append("s", "messages", CANARY)


def nested_lock(scene: Scene) -> None:
    with scene.store.transaction("s"):
        scene.store.create("other", {"title": CANARY})


def lock_not_held(scene: Scene) -> None:
    with scene.store._backend.engine.transaction("s") as tx:
        pass
    tx.read()


def messages_removed(scene: Scene) -> None:
    session = scene.load()
    session.data["messages"].clear()
    with scene.store.start_stream("s", stream_id="t1"):
        session.save()


def corrupt_session(scene: Scene) -> None:
    scene.put(scene.document.read_bytes()[:-4])
    scene.load()


def unsupported_format(scene: Scene) -> None:
    scene.damage(b'"format":3', b'"format":7')
    scene.load()


def unsafe_file(scene: Scene) -> None:
    target = scene.document.rename(scene.document.with_name("target"))
    scene.document.symlink_to(target)
    scene.load()


def unreadable(scene: Scene) -> None:
    scene.fail("read_version", errno.EACCES)
    scene.store.load("s")


def unavailable(_scene: Scene) -> None:
    pytest.importorskip("psycopg_pool", reason="the extra postgres is not installed")
    connections = import_module("persist.postgres.connections")
    connections.Connections("postgresql://ann:secret@127.0.0.1:1/chats", "persist").take(0.0)


def commit_failed(scene: Scene) -> None:
    scene.fail("write", errno.ENOSPC)
    scene.store.append("s", "messages", CANARY)


def commit_unknown(scene: Scene) -> None:
    scene.fail("sync_directory", errno.EIO)
    scene.store.append("s", "messages", CANARY)


def unsupported_file_system(scene: Scene) -> None:
    table = scene.store.path.parent / "mountinfo"
    table.write_text("36 25 0:32 / / rw - nfs4 server:/x rw\n")
    scene.monkeypatch.setattr(file_system, "MOUNTS", table)
    scene.monkeypatch.setattr(file_system, "_judged", {})
    persist.Store(scene.store.path)


@dataclass(frozen=True)
class Case:
    """A case: how an error comes about, what its message must contain, its facts, and the builtin that catches it, too.

    In `says` and `facts` a ``Path`` is relative to the store.
    """

    provoke: Callable[[Scene], object]
    says: tuple[str | Path, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    builtin: type[Exception] = Exception


DOCUMENT, LOCK, LEASE, EVENTS = Path("s.json"), Path("s.json.lock"), Path(".leases/s.t1"), Path(".events")

CASES: dict[type[persist.PersistError], tuple[Case, ...]] = {
    errors.SessionNotFound: (
        Case(
            lambda scene: scene.store.load("gone"),
            ("No session 'gone'", Path("gone.json"), "store.create()"),
            {"session_id": "gone", "path": Path("gone.json")},
            KeyError,
        ),
    ),
    errors.SessionExists: (
        Case(
            lambda scene: scene.store.create("s", {"title": CANARY}),
            ("'s' exists already", DOCUMENT, "store.load()"),
            {"session_id": "s", "path": DOCUMENT},
        ),
    ),
    errors.SessionDeleted: (
        Case(
            session_deleted,
            ("'s' was deleted or replaced", DOCUMENT, "nothing was saved", "Load it again"),
            {"session_id": "s", "path": DOCUMENT},
        ),
    ),
    errors.StoreClosed: (Case(store_closed, (Path(), "is closed", "Open a new"), {"path": Path()}, RuntimeError),),
    errors.InvalidArgument: (
        Case(
            lambda scene: scene.store.create("", {"title": CANARY}),
            ("a session id is ''", "must be a string of 1 to 512 characters"),
            {"session_id": "", "what": "a session id", "got": "''"},
            ValueError,
        ),
        Case(
            lambda scene: scene.store.start_stream("s", {"content": CANARY}, stream_id="-"),
            ("a stream id is '-'", "must be 1 to 64 of A-Z"),
            {"stream_id": "-"},
        ),
        Case(
            lambda scene: scene.store.append("s", "title", CANARY),
            ("field 'title' of the document is str; it must be a list",),
            {"what": "field 'title' of the document", "got": "str", "expected": "a list"},
        ),
        Case(
            reserved_field,
            ("'pending_user_message' is persist's own", "nothing was written", "Use store.start_stream()"),
            {"field": "pending_user_message"},
        ),
        Case(
            unsupported_file_system,
            (Path(), "is on nfs4", "Use a local disk", "unsafe_filesystem=True"),
            {"path": Path()},
        ),
    ),
    errors.NotJSON: (
        Case(
            not_json,
            ("data['messages'][0]['parts'][0]", "cannot be kept as JSON", "convert it with sorted()"),
            {"path": ("messages", 0, "parts", 0), "where": "data['messages'][0]['parts'][0]"},
            ValueError,
        ),
    ),
    errors.TooLarge: (
        Case(
            too_large, ("more than 1,000 bytes", "nothing was written", "store.create()"), {"limit": 1000}, ValueError
        ),
    ),
    errors.MergeConflict: (
        Case(
            merge_conflict,
            ("'s'", "data['messages'][0]['content']", "two different values", "nothing was written", ".refresh()"),
            {
                "session_id": "s",
                "path": ("messages", 0, "content"),
                "where": "data['messages'][0]['content']",
                "reason": "two different values",
                "base": CANARY,
                "mine": CANARY + "2",
                "theirs": CANARY + "1",
            },
        ),
        Case(
            lambda scene: scene.store.append("s", "messages", {"id": "m1", "content": CANARY + "2"}),
            ("Session 's'", "data['messages'][0]", "same id", "nothing was written"),
            {"session_id": "s", "path": ("messages", 0)},
        ),
        Case(
            messages_removed,
            ("'s'", "lose 1 committed messages", "stream t1", "nothing was written", "(id, if_version='"),
            {"session_id": "s", "stream_id": "t1", "count": 1},
        ),
    ),
    errors.VersionMismatch: (
        Case(
            lambda scene: scene.store.update("s", lambda tx: tx.data.clear(), if_version="v9"),
            ("'s' is at version ", ", not at v9, which", "nothing was written", "Look again"),
            {"session_id": "s", "mine": "v9", "path": ("_persist", "commit")},
            errors.MergeConflict,
        ),
    ),
    errors.LockError: (
        Case(
            nested_lock,
            ("holds the lock of session 's'", "lock of session 'other'", "Leave the transaction() or update() first"),
            {"session_id": "other", "held": "s", "kind": "nested"},
            RuntimeError,
        ),
        Case(
            lock_not_held,
            ("The lock of session 's' is not held", "nothing was written", "Begin a new transaction()"),
            {"session_id": "s", "kind": "not held"},
        ),
    ),
    errors.LockTimeout: (
        Case(
            lock_timeout,
            (
                "Could not lock session 's' within 0.01 s",
                LOCK,
                f"is held by pid {os.getpid()} (",
                "Wait for longer (timeout_s)",
            ),
            {"session_id": "s", "path": LOCK, "timeout_s": 0.01, "kind": "timeout"},
            TimeoutError,
        ),
    ),
    errors.SessionBusy: (
        Case(
            session_busy,
            ("'s' is busy", "stream t1", f"pid {os.getpid()}", "alive", LEASE, "store.cancel()"),
            {"session_id": "s", "stream_id": "t1", "path": LEASE},
        ),
    ),
    errors.AlreadyStarted: (
        Case(
            already_started,
            ("'s' has that prompt already", "stream t1 runs it", "nothing was started", "store.follow()"),
            {"session_id": "s", "stream_id": "t1", "answer": None},
        ),
    ),
    errors.StreamLost: (
        Case(
            stream_lost,
            ("Stream t1 no longer owns session 's'", "cancelled by force", "nothing was written", "End the turn"),
            {"session_id": "s", "stream_id": "t1"},
        ),
    ),
    errors.EventsNotFound: (
        Case(
            lambda scene: scene.store.follow("s", "t9"),
            ("Stream 't9' of session 's'", str(EVENTS / "s.t9"), "does not exist", "Load the session"),
            {"session_id": "s", "stream_id": "t9", "path": EVENTS / "s.t9", "count": None},
            KeyError,
        ),
        Case(
            cursor_ahead,
            ("'t1' of session 's'", "has 1 events", "cursor is at 5", "after=0"),
            {"session_id": "s", "stream_id": "t1", "after": 5, "count": 1},
        ),
    ),
    errors.EmitFailed: (
        Case(
            emit_failed,
            ("stream 't1'", str(EVENTS / "s.t1"), "No space left", "store.events()"),
            {"stream_id": "t1", "path": EVENTS / "s.t1", "errno": errno.ENOSPC},
            OSError,
        ),
    ),
    errors.Unavailable: (
        Case(
            unavailable,
            ("postgresql://", "127.0.0.1:1/chats", "is not available", "refused", "Nothing was changed", "retry"),
            {"errno": None},
            OSError,
        ),
    ),
    errors.Unreadable: (
        Case(
            unreadable,
            (DOCUMENT, "cannot be read", os.strerror(errno.EACCES), "Nothing was changed", "retry"),
            {"path": DOCUMENT, "reason": os.strerror(errno.EACCES), "errno": errno.EACCES},
            OSError,
        ),
        Case(
            unsafe_file,
            (DOCUMENT, "is a symbolic link", "Nothing was changed", "Move it away"),
            {"path": DOCUMENT, "found": "a symbolic link", "errno": None},
        ),
    ),
    errors.CorruptSession: (
        Case(
            corrupt_session,
            ("'s' is damaged", DOCUMENT, ", byte ", "cut off", "Restore it from a backup", "store.accept()"),
            {"session_id": "s", "path": DOCUMENT},
        ),
    ),
    errors.UnsupportedFormat: (
        Case(
            unsupported_format,
            ("'s'", DOCUMENT, "format 7", "knows 3", "the version of persist that wrote it"),
            {"session_id": "s", "path": DOCUMENT, "found": 7, "known": 3},
        ),
    ),
    errors.CommitFailed: (
        Case(
            commit_failed,
            ("'s' was not saved", os.strerror(errno.ENOSPC), DOCUMENT, "The old revision stands", "retry"),
            {"session_id": "s", "path": DOCUMENT, "reason": os.strerror(errno.ENOSPC), "errno": errno.ENOSPC},
            OSError,
        ),
    ),
    errors.CommitUnknown: (
        Case(
            commit_unknown,
            (
                "'s'",
                "unknown whether the last commit is durable",
                os.strerror(errno.EIO),
                DOCUMENT,
                "open a new persist.Store()",
            ),
            {"session_id": "s", "path": DOCUMENT, "reason": os.strerror(errno.EIO), "errno": errno.EIO},
            OSError,
        ),
    ),
}


def every_error() -> list[type[persist.PersistError]]:
    """Return all classes below `PersistError` in its module, however deep.
    The errors of test runs have tests of their own.
    """
    found: list[type[persist.PersistError]] = []
    pending = [persist.PersistError]
    while pending:
        below = pending.pop().__subclasses__()
        found += below
        pending += below
    public = [kind for kind in found if kind.__module__ == errors.__name__ and not kind.__name__.startswith("_")]
    return sorted(public, key=lambda kind: kind.__name__)


def raised(scene: Scene, kind: type[persist.PersistError], case: int = 0) -> Any:
    """Return the error as the library raises it, with its traceback."""
    with pytest.raises(kind) as caught:
        CASES[kind][case].provoke(scene)
    assert type(caught.value) is kind
    return caught.value


each_error = pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
each_case = pytest.mark.parametrize(
    ("kind", "case"),
    [pytest.param(kind, case, id=f"{kind.__name__}-{case}") for kind in CASES for case in range(len(CASES[kind]))],
)


def test_there_are_about_twenty_classes_and_each_has_a_case() -> None:
    """Errors that a caller handles alike are one class, so there are few classes. Each class has a case."""
    assert set(every_error()) == set(CASES)
    assert len(CASES) <= 22


@each_case
def test_an_error_says_what_happened_where_and_what_to_do(
    kind: type[persist.PersistError], case: int, scene: Scene
) -> None:
    """The message alone is enough to act on. `str` shows it, whatever the builtin base would show."""
    message = str(raised(scene, kind, case))
    for fragment in CASES[kind][case].says:
        wanted = str(scene.store.path / fragment) if isinstance(fragment, Path) else fragment
        assert wanted in message
    assert message == message.strip()
    assert "\n" not in message


#: A verb of the API, as a call or as a command, or an instruction for the file or the value.
A_VERB = re.compile(r"\w+\(|persist [a-z]+|retry|the version of persist|an id of its own|Leave it|leave it out")


@each_case
def test_a_remedy_names_a_verb(kind: type[persist.PersistError], case: int, scene: Scene) -> None:
    """The remedy names the next call. For a wrong argument, `expected` is the remedy."""
    error = raised(scene, kind, case)
    assert str(error).endswith(error.remedy)
    assert A_VERB.search(error.remedy) or (kind is errors.InvalidArgument and error.expected)


@each_case
def test_an_error_carries_its_facts_as_attributes(kind: type[persist.PersistError], case: int, scene: Scene) -> None:
    """A program need not read the message, because the facts are attributes."""
    error = raised(scene, kind, case)
    for name, value in CASES[kind][case].facts.items():
        assert getattr(error, name) == (scene.store.path / value if isinstance(value, Path) else value), name


@each_error
def test_an_error_is_caught_by_its_builtin_too(kind: type[persist.PersistError]) -> None:
    """``except TimeoutError`` and the like work, and every error is a `PersistError`."""
    assert issubclass(kind, CASES[kind][0].builtin)
    assert issubclass(kind, persist.PersistError)


@each_case
def test_an_error_survives_pickling(kind: type[persist.PersistError], case: int, scene: Scene) -> None:
    """A worker can hand an error to its parent: type, message and every attribute stay the same."""
    error = raised(scene, kind, case)
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert copied.args == error.args
    assert repr(vars(copied)) == repr(vars(error))
    for name in CASES[kind][case].facts:
        assert getattr(copied, name) == getattr(error, name)


@each_case
def test_an_error_never_shows_what_a_document_holds(kind: type[persist.PersistError], case: int, scene: Scene) -> None:
    """Message, repr, arguments and the traceback for a log, causes included, show no content of a document."""
    assert_silent(raised(scene, kind, case))


@pytest.mark.parametrize("name", ["x" * 1_000_000, "\ud800" * 1_000_000, 10**4000])
def test_a_huge_wrong_argument_makes_no_huge_message(store: persist.Store, name: Any) -> None:
    """A megabyte that came as an id must not fill a log. An attribute has the whole of it."""
    with pytest.raises(persist.InvalidArgument) as caught:
        store.load(name)
    assert len(str(caught.value)) < 300
    assert caught.value.session_id is name


@each_error
def test_an_error_is_documented(kind: type[persist.PersistError]) -> None:
    """Each error has a docstring of its own and its place in the module's tree."""
    assert kind.__doc__ != persist.PersistError.__doc__
    assert kind.__name__ in (errors.__doc__ or "")


def assert_silent(error: BaseException) -> None:
    shown = [str(error), repr(error), repr(error.args), *getattr(error, "__notes__", [])]
    shown += traceback.format_exception(error)
    assert not [text for text in shown if CANARY.lower() in text.lower()]


# --- more places where content could slip out -------------------------------------------------------------------------


def two_edits(
    first: Callable[[dict[str, Any]], Any], second: Callable[[dict[str, Any]], Any]
) -> Callable[[Scene], object]:
    def provoke(scene: Scene) -> None:
        session = scene.load()
        with scene.store.transaction("s") as tx:
            first(tx.data)
        second(session.data)
        session.save()

    return provoke


def file_of(content: bytes) -> Callable[[Scene], object]:
    def provoke(scene: Scene) -> object:
        scene.put(content)
        return scene.load()

    return provoke


def of_value(value: Any) -> Callable[[Scene], object]:
    return lambda scene: scene.store.append("s", "messages", {"id": CANARY, "content": [CANARY, value]})


def turn(scene: Scene) -> None:
    with scene.store.start_stream("s", {"content": CANARY}) as stream:
        stream.checkpoint({"id": "m1", "content": CANARY + "other"})


def remove_partial(scene: Scene) -> None:
    with scene.store.start_stream("s", {"content": CANARY}) as stream:
        stream.checkpoint({"content": CANARY})
        with scene.store.transaction("s") as tx:
            tx.list("messages").pop()


def replace_list(scene: Scene) -> None:
    with scene.store.transaction("s") as tx:
        items = tx.list("messages")
        tx.data["messages"] = [CANARY]
        items.append(CANARY)


SECRET = CANARY.encode()

LEAKS: dict[str, Callable[[Scene], object]] = {
    "a message's twin": lambda scene: scene.store.append("s", "messages", {"id": "m1", "content": CANARY + "x"}),
    "an answer's twin": turn,
    "a prompt's twin": lambda scene: scene.store.start_stream("s", {"id": "m1", "content": CANARY + "x"}),
    "two titles": two_edits(lambda data: data.update(title=CANARY + "1"), lambda data: data.update(title=CANARY + "2")),
    "append against truncation": two_edits(
        lambda data: data["messages"].clear(), lambda data: data["messages"].append(CANARY)
    ),
    "a list against a text": two_edits(lambda data: data.update(n=CANARY), lambda data: data.update(n=[CANARY])),
    "a prompt that is answered": already_answered,
    "a partial answer that is removed": remove_partial,
    "a new dict": lambda scene: scene.store.update("s", lambda tx: {**tx.data, "title": CANARY + "x"}),
    "a list that was replaced": replace_list,
    "a list as a message": lambda scene: scene.store.append("s", "messages", [CANARY]),
    "two items of one key": lambda scene: scene.store.extend(
        "s", "log", [{"k": CANARY}, {"k": CANARY, "a": 1}], key="k"
    ),
    "items that are a text": lambda scene: scene.store.extend("s", "log", CANARY),
    "a tail of what is no list": lambda scene: scene.store.tail("s", field="title"),
    "fields that are none": lambda scene: scene.store.start_stream("s", fields=[CANARY]),  # type: ignore[arg-type]
    "bytes": of_value(CANARY.encode()),
    "a tuple": of_value((CANARY,)),
    "a key that is no text": of_value({(CANARY,): 1}),
    "two keys that are one": of_value({CANARY + "\ud83d\ude00": 1, CANARY + "😀": 2}),
    "a subclass of str": of_value(type("Text", (str,), {})(CANARY)),
    "a document cut off": file_of(b'{"a":"' + SECRET),
    "a document with bad UTF-8": file_of(b'{"a":"' + SECRET + b"\xff" + SECRET + b'"}'),
    "a document with a raw newline": file_of(b'{"a":"' + SECRET + b"\n" + SECRET + b'"}'),
    "a document that is a text": file_of(b'"' + SECRET + b'"'),
    "a document with a key twice": file_of(b'{"' + SECRET + b'":1,"' + SECRET + b'":2}'),
    "a document with a number too large": file_of(b'{"' + SECRET + b'":1e400}'),
    "a document too deep": file_of(b'{"a":' + (b'{"' + SECRET + b'":') * 300 + b"1" + b"}" * 301),
    "a document with something behind it": file_of(b'{"a":1}' + SECRET),
    "a document with a strange header": file_of(b'{"_persist":{"format":"' + SECRET + b'"},"a":"' + SECRET + b'"}'),
}


@pytest.mark.parametrize("provoke", LEAKS.values(), ids=LEAKS)
def test_no_way_to_an_error_shows_what_a_document_holds(provoke: Callable[[Scene], object], scene: Scene) -> None:
    """Each case refuses something right beside content. The error shows only the place."""
    with pytest.raises(persist.PersistError) as caught:
        provoke(scene)
    assert_silent(caught.value)


def test_what_check_reports_shows_no_content(scene: Scene) -> None:
    """A report of damage shows no content, because more people read it than the document."""
    scene.damage(SECRET, SECRET.upper())
    [problem] = scene.store.check()
    assert CANARY.lower() not in repr(problem).lower()


def test_the_canary_would_be_seen(scene: Scene) -> None:
    """The check above catches an error that shows content, in its message or in its cause."""
    with pytest.raises(AssertionError):
        assert_silent(ValueError(CANARY))
    quiet = ValueError("quiet")
    quiet.__cause__ = ValueError(CANARY)
    with pytest.raises(AssertionError):
        assert_silent(quiet)


# --- what the errors share --------------------------------------------------------------------------------------------


def test_a_path_is_shown_as_python_would_write_it() -> None:
    """A path can be pasted behind the name of the data."""
    assert errors.show_path(()) == "data"
    assert errors.show_path(("messages", 3, "it's")) == """data['messages'][3]["it's"]"""


def test_a_conflict_is_named_by_its_session() -> None:
    """The pure functions do not know the session, so their caller adds its name to every kind of conflict."""
    conflict = errors.MergeConflict(path=("a",), reason="r", base=1, mine=2, theirs=persist.MISSING)
    with pytest.raises(errors.MergeConflict, match="'s-42'") as caught, translating.conflicts_in("s-42"):
        raise conflict
    assert caught.value.session_id == "s-42"
    assert (caught.value.base, caught.value.mine, caught.value.theirs) == (1, 2, persist.MISSING)


def test_an_owner_introduces_itself() -> None:
    """An owner shows pid, command, host and start time: all that a person needs to find the process."""
    owner = persist.Owner(812, "web1", "uvicorn", "2026-01-01T00:00:00+00:00")
    assert str(owner) == "pid 812 (uvicorn) on web1 since 2026-01-01T00:00:00+00:00"
    assert pickle.loads(pickle.dumps(owner)) == owner


def test_a_busy_session_names_its_owner(scene: Scene) -> None:
    """`SessionBusy.owner` is the process that runs the stream."""
    busy: persist.SessionBusy = raised(scene, errors.SessionBusy)
    assert busy.owner is not None
    assert busy.owner.pid == os.getpid()


def test_a_refusal_names_the_version_that_is_there(scene: Scene) -> None:
    """The error has the current version, so that the caller can compare it with the version that it has seen."""
    mismatch: persist.VersionMismatch = raised(scene, errors.VersionMismatch)
    assert mismatch.theirs == scene.load().version
    removed: persist.MergeConflict = raised(scene, errors.MergeConflict, 2)
    assert removed.version != scene.load().version, "the stream has failed since"
    assert f"(id, if_version={removed.version!r})" in str(removed)


def test_what_a_refusal_says_to_do_about_removed_messages_works(scene: Scene) -> None:
    """The remedy works: the caller names the version of the error, as long as nobody has written since."""
    session = scene.load()
    session.data["messages"].clear()
    with scene.store.start_stream("s", stream_id="t1"):
        with pytest.raises(persist.MergeConflict) as caught:
            session.save()
        with scene.store.transaction("s", if_version=caught.value.version) as tx:
            tx.list("messages").clear()
        with pytest.raises(persist.VersionMismatch):
            scene.store.update("s", lambda tx: tx.data.clear(), if_version=caught.value.version)
    assert scene.load().data["messages"] == []


def test_a_prompt_that_is_answered_comes_with_its_answer(scene: Scene) -> None:
    """`AlreadyStarted.answer` is the message. No stream runs the prompt, and the error says so."""
    with pytest.raises(persist.AlreadyStarted, match="its turn has finished") as caught:
        already_answered(scene)
    assert caught.value.stream_id is None
    assert caught.value.answer == scene.load().data["messages"][-1]


def test_an_unknown_commit_stops_all_further_writes_of_its_session(scene: Scene) -> None:
    """Any further write of the session raises the same error. Another session of the store goes on."""
    raised(scene, errors.CommitUnknown)
    scene.monkeypatch.undo()
    with pytest.raises(persist.CommitUnknown):
        scene.store.append("s", "messages", 1)
    scene.store.create("other")
    persist.Store(scene.store.path).append("s", "messages", 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.delete("s", force="false"),
        lambda store: store.cancel("s", "x", force=0),
        lambda store: store.compact("s", alone="yes"),
        lambda store: store.append("s", "log", 1, touch=None),
        lambda store: store.append("s", "log", 1, create="no"),
        lambda store: store.extend("s", "log", [1], touch=None),
        lambda store: store.extend("s", "log", [1], create=1),
        lambda store: store.update("s", lambda tx: tx.data.clear(), touch=1),
        lambda store: store.update("s", lambda tx: tx.data.clear(), create="yes"),
        lambda store: store.transaction("s", touch="no").__enter__(),
        lambda store: store.transaction("s", create=0).__enter__(),
        lambda store: store.start_stream("s", {"id": "p"}, once="no"),
        lambda store: store.start_stream("s", {"id": "p"}, create=None),
        lambda store: store.accept("s", drop_journal="no"),
        lambda store: store.clear_stale_streams(every_session=1),
        lambda store: store.load("s").save(touch="no"),
        lambda store: emit(store, durable="no"),
    ],
)
def test_option_that_is_neither_true_nor_false_is_refused(
    tmp_path: Path, call: Callable[[persist.Store], object]
) -> None:
    """A "false" from a query string is a true value in Python, so it is refused: it must not delete a session."""
    store = persist.Store(tmp_path)
    store.create("s", {"messages": [], "log": []})
    with pytest.raises(persist.InvalidArgument, match="must be True or False"):
        call(store)
    found = store.load("s").data
    assert (found["messages"], found["log"]) == ([], [])


def emit(store: persist.Store, **options: Any) -> None:
    with store.start_stream("s") as stream:
        stream.emit("x", **options)
