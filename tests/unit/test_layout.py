"""Every file name of a store, and the two kinds of id that names are made of."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import persist
from persist.errors import InvalidArgument
from persist.storage import layout
from persist.storage.layout import Layout, check_session_id, check_stream_id, id_of, is_hashed, name_of

PLAIN = ["a", "Z", "0", "s-42", "S_42", "a" * 128, "a" * 180, "0-_", "con1", "xcon", "com", "com10", "lpt", "nul-1"]
#: Ids with every kind of awkward character, and the names of their files.
AWKWARD = {
    "user:7/chat": "user%3A7%2Fchat",
    "../x": "%2E%2E%2Fx",
    ".": "%2E",
    "..": "%2E%2E",
    ".hidden": "%2Ehidden",
    "a.json": "a%2Ejson",
    "a/b": "a%2Fb",
    "a\\b": "a%5Cb",
    "a b": "a%20b",
    " ": "%20",
    "a\n": "a%0A",
    "a\x00b": "a%00b",
    "a%2fb": "a%252fb",
    "a%2Fb": "a%252Fb",
    "%": "%25",
    "~": "%7E",
    "a~" + "0" * 32: "a%7E" + "0" * 32,
    "é": "%C3%A9",
    "e\u0301": "e%CC%81",
    "😀": "%F0%9F%98%80",
    "\u212a": "%E2%84%AA",  # the Kelvin sign, which case folding makes a k
    "\u0661": "%D9%A1",  # an Arabic digit
    "_index": "%5Findex",
    "-rf": "%2Drf",
    "_": "%5F",
    "con": "%63on",
    "CON": "%43ON",
    "Prn": "%50rn",
    "aux": "%61ux",
    "NUL": "%4EUL",
    "com0": "%63om0",
    "COM1": "%43OM1",
    "lpt9": "%6Cpt9",
}
WRONG: list[object] = [
    "",
    "a" * 513,
    "\ud800",
    "a\udfffb",
    "\ud83d\ude00",
    None,
    5,
    True,
    b"s-42",
    ["s-42"],
    Path("s-42"),
    {"s": 1},
]
#: Characters that names, file systems, shells and URLs give a meaning to, and others from all planes.
any_id = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) | st.text(
    st.sampled_from(string.ascii_letters + string.digits + "_-.%~/\\: \n\0é😀"), min_size=1, max_size=200
)


# --- ids and names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", PLAIN)
def test_plain_id_is_its_own_name(plain: str) -> None:
    """A name keeps letters, digits, ``_`` and ``-`` as they are. So today's ids keep their names."""
    assert check_session_id(plain) == name_of(plain) == plain
    assert id_of(plain) == plain
    assert check_stream_id(plain[:64]) == plain[:64]


@pytest.mark.parametrize(("session_id", "name"), AWKWARD.items(), ids=ascii)
def test_awkward_id_is_percent_encoded(session_id: str, name: str) -> None:
    """Every other byte, a leading ``_`` or ``-``, and the first letter of a Windows device become upper-case hex."""
    assert check_session_id(session_id) == session_id
    assert name_of(session_id) == name
    assert id_of(name) == session_id
    assert layout.is_ours(name)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: ascii(wrong)[:20])
def test_what_is_no_text_names_no_session(wrong: object) -> None:
    """An id is a string of 1 to 512 characters, and has no half of a surrogate pair."""
    with pytest.raises(InvalidArgument, match="it must be a string of 1 to 512 characters") as caught:
        check_session_id(wrong)
    assert caught.value.session_id is wrong
    with pytest.raises(InvalidArgument):
        Layout("/store").session(wrong)


@pytest.mark.parametrize("wrong", [*WRONG, "-a", "_a", "a.b", "a b", "é", "a" * 65, "a\n"], ids=lambda w: ascii(w)[:20])
def test_stream_id_is_plain(wrong: object) -> None:
    """A stream id is 1 to 64 letters, digits, ``_`` and ``-``: a name holds it as it is, behind a dot."""
    with pytest.raises(InvalidArgument, match="it must be 1 to 64 of A-Z") as caught:
        check_stream_id(wrong)
    assert caught.value.stream_id is wrong


@given(any_id)
@example("a" * 512)
@example("\U0010ffff" * 512)
@example("%" * 60)
@example("%" * 61)
def test_every_id_has_one_plain_file_name(session_id: str) -> None:
    """The name stays inside the directory, is short enough for a lease beside a stream id, and leads back to its id."""
    name = name_of(session_id)
    assert set(name) <= {*string.ascii_letters, *string.digits, *"_-%~"}
    assert name[0] not in "_-~"
    assert name.upper().rstrip("0123456789") not in ("CON", "PRN", "AUX", "NUL", "COM", "LPT") or len(name) > 4
    assert len(name) <= 180
    assert id_of(name) == (None if is_hashed(name) else session_id)
    assert layout.is_ours(name)
    paths = Layout("/store").session(session_id)
    everything: list[str] = [
        paths.document,
        paths.lock,
        paths.temp,
        paths.journal("0" * 16),
        layout.copy_of(paths.journal("0" * 16)),
    ]
    everything += [paths.lease("t" * 64), paths.events("t" * 64)]
    assert all(len(Path(path).name) <= 255 for path in everything)
    parents = {str(Path(path).parent) for path in everything}
    assert parents == {"/store", "/store/.leases", "/store/.events"}
    assert paths.file_id == (session_id if is_hashed(name) else None)


@given(any_id, any_id)
@example("a%2Fb", "a/b")
@example("_a", "%5Fa")
@example("con", "%63on")
@example("é", "e\u0301")
def test_two_ids_have_two_names(one: str, other: str) -> None:
    """No id can reach the files of another one."""
    assert (name_of(one) == name_of(other)) is (one == other)


@given(st.text(st.sampled_from("ab0_-%~2fFC3A9.")) | st.text(max_size=20))
@example("a%2fb")
@example("a%2")
@example("%41")
@example("%FF")
@example("%ED%A0%80")
@example("%5findex")
@example("c%6Fn")
def test_name_is_ours_only_if_its_decoded_id_gives_it_back(name: str) -> None:
    """A name in another spelling is another program's, so a session never has two files."""
    session_id = id_of(name)
    if session_id is not None:
        assert name_of(session_id) == name
    assert layout.is_ours(name) is (session_id is not None or is_hashed(name))


@pytest.mark.parametrize("length", [180, 181, 512])
def test_long_name_is_cut_and_has_a_hash(length: int) -> None:
    """A name above 180 bytes becomes its first 100 bytes, ``~`` and 32 hex digits. Equal beginnings give two names."""
    one, other = "a" * (length - 1) + "b", "a" * (length - 1) + "c"
    if length == 180:
        assert (name_of(one), name_of(other)) == (one, other)
        return
    assert name_of(one)[:101] == name_of(other)[:101] == "a" * 100 + "~"
    assert is_hashed(name_of(one))
    assert len(name_of(one)) == 133
    assert name_of(one) != name_of(other)
    assert id_of(name_of(one)) is None
    assert is_hashed(name_of("é" * 40))
    assert not is_hashed(name_of("é" * 30))


# --- the names of a store ---------------------------------------------------------------------------------------------


def test_names_are_as_documented() -> None:
    """The names are those in the docstring's table."""
    here = Layout("/store")
    paths = here.session("s-42")
    assert paths.document == "/store/s-42.json"
    assert paths.lock == "/store/s-42.json.lock"
    assert paths.temp == "/store/s-42.json.tmp"
    assert paths.journal("0123456789abcdef") == "/store/s-42.0123456789abcdef.journal"
    assert layout.copy_of(paths.journal("0" * 16)) == f"/store/s-42.{'0' * 16}.journal.damaged"
    assert here.leases == "/store/.leases"
    assert paths.lease("t1") == "/store/.leases/s-42.t1"
    assert paths.events("t1") == "/store/.events/s-42.t1"


FOREIGN = [
    "s-42.json.lock",
    "s-42.json.tmp",
    "s-42",
    ".json",
    "-a.json",
    "_index.json",
    "a%2fb.json",
    "a%2.json",
    "a%41.json",
    "%ED%A0%80.json",
    "a.b.json",
    "a b.json",
    "é.json",
    "con.json",
    "COM1.json",
    "a.json\n",
    "a.JSON",
    ".leases",
    "a.json~",
    f"{'a' * 181}.json",
    f"{'a' * 100}~{'0' * 31}.json",
    f"{'a' * 99}~{'0' * 32}.json",
    f"{'a' * 100}~{'F' * 32}.json",
]


@pytest.mark.parametrize("name", FOREIGN, ids=lambda name: ascii(name)[:24])
def test_other_files_in_the_directory_are_no_sessions(name: str) -> None:
    """Locks, temporary files, backups of editors and another spelling of an id are not listed as sessions."""
    assert layout.name_of_document(name) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.json.lock", ("a", False)),
        ("a.json.tmp", ("a", True)),
        ("a%20b.json.tmp", ("a%20b", True)),
        (f"{'a' * 100}~{'0' * 32}.json.lock", (f"{'a' * 100}~{'0' * 32}", False)),
        ("a.json", None),
        ("a.lock", None),
        (".json.tmp", None),
        ("a b.json.tmp", None),
        ("con.json.lock", None),
        ("a%2fb.json.lock", None),
    ],
)
def test_leftover_names_its_session(name: str, expected: tuple[str, bool] | None) -> None:
    """Locks and temporary files are told apart from foreign files."""
    assert layout.name_of_leftover(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"a.{'0' * 16}.journal", ("a", "0" * 16)),
        (f"a%2Eb.{'f' * 16}.journal", ("a%2Eb", "f" * 16)),
        (f"a.{'0' * 16}.journal.damaged", None),
        ("a.1.journal", None),
        (f"a.{'F' * 16}.journal", None),
        (f"a.{'0' * 17}.journal", None),
        (f"a.b.{'0' * 16}.journal", None),
        (f".{'0' * 16}.journal", None),
        (f"_a.{'0' * 16}.journal", None),
    ],
)
def test_journal_names_its_session(name: str, expected: tuple[str, str] | None) -> None:
    """A journal's name holds 16 hex digits. The name of a damaged copy counts only where copies are asked for."""
    assert layout.journal_of(name) == expected
    assert layout.journal_of(f"{name}.damaged") is None
    assert layout.journal_of(f"{name}.damaged", copies=True) == expected


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("a.b", ("a", "b")),
        ("a-1.b_2", ("a-1", "b_2")),
        ("a%2Eb.c", ("a%2Eb", "c")),
        ("a", None),
        ("a.", None),
        (".b", None),
        ("a.b.c", None),
        ("con.b", None),
        ("a." + "b" * 65, None),
        ("a.b\n", None),
    ],
)
def test_lease_names_its_session_and_stream(name: str, stream: tuple[str, str] | None) -> None:
    """A session's name holds no dot, so a lease's name splits in one way only."""
    assert layout.stream_of(name) == stream


# --- the names at work ------------------------------------------------------------------------------------------------

LONG = ["a" * 181, "a" * 180 + "é", "/" * 300, "\U0010ffff" * 512]


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("session_id", [*AWKWARD, *LONG], ids=lambda each: ascii(each)[:16])
def test_every_verb_takes_any_text_as_an_id(directory: Path, session_id: str, mode: Any) -> None:
    """A session, its journal, its stream and its events work under any id, and another process finds them by it."""
    store = persist.Store(directory, journal=mode)
    store.create(session_id, {"title": "t", "messages": [{"id": "m1"}]})
    store.append(session_id, "messages", {"id": "m2"})
    store.compact(session_id)
    store.append(session_id, "messages", {"id": "m3"})
    other = persist.Store(directory)
    with store.start_stream(session_id, {"content": "?"}, stream_id="t1") as stream:
        stream.emit("token")
        assert [(info.session_id, info.is_live) for info in other.streams()] == [(session_id, True)]
        assert [event.data for event in other.events(session_id, "t1")] == ["token"]
        stream.finish({"content": "!"})
    stream = store.start_stream(session_id, stream_id="t2")
    stream._close()
    assert [(problem.session_id, problem.kind) for problem in other.check()] == [(session_id, "stale")]
    assert [each.session_id for each in other.clear_stale_streams().cleared] == [session_id]
    assert other.ids() == [session_id]
    assert other.exists(session_id)
    assert other.check() == []
    assert other.head(session_id).id == other.load(session_id).id == session_id
    assert len(other.load(session_id).data["messages"]) == 5
    assert other.duplicate(session_id, "copy").data["messages"] == other.load(session_id).data["messages"]
    header = json.loads((directory / f"{name_of(session_id)}.json").read_bytes())["_persist"]
    assert header.get("id") == (session_id if is_hashed(name_of(session_id)) else None)
    other.delete("copy")
    other.delete(session_id)
    assert other.ids() == []
    assert [path for path in directory.rglob("*") if path.is_file()] == []


def test_hashed_name_with_another_sessions_document_is_damage(store: persist.Store) -> None:
    """The header keeps the id, so a file under another session's hashed name is not taken for that session."""
    one, other = "x" * 200, "x" * 201
    store.create(one, {"a": 1})
    (store.path / f"{name_of(one)}.json").rename(store.path / f"{name_of(other)}.json")
    for look in (store.load, store.head, lambda each: store.append(each, "messages", 1)):
        with pytest.raises(persist.CorruptSession):
            look(other)
    with pytest.raises(persist.SessionNotFound):
        store.load(one)


def test_hashed_name_that_another_program_wrote_is_taken(store: persist.Store) -> None:
    """A foreign document under a hashed name belongs to the id that is asked for. Its first commit stores the id."""
    session_id = "y" * 300
    path = store.path / f"{name_of(session_id)}.json"
    path.write_text('{"a": 1}')
    assert store.load(session_id).data == {"a": 1}
    assert [(problem.kind, problem.path) for problem in store.check()] == [("corrupt", path)], "nobody knows its id"
    store.append(session_id, "messages", 1)
    assert store.ids() == [session_id]
    assert store.check() == []
    assert json.loads(path.read_bytes())["_persist"]["id"] == session_id


def test_order_and_pages_go_by_the_id(store: persist.Store) -> None:
    """The order goes by the ids, not by the file names, in which an encoded character sorts elsewhere."""
    ids = ["a", "a/b", "a b", "aé", "a-b", "a_b", "A", "z" * 200, "zz", "_x", "~"]
    for session_id in ids:
        store.create(session_id)
    assert store.ids() == sorted(ids)
    pages, last = [], None
    while page := store.ids(after=last, limit=3):
        pages += page
        last = page[-1]
    assert pages == sorted(ids)
    assert store.ids(after="a/") == sorted(each for each in ids if each > "a/")


def test_foreign_files_are_named_and_left_alone(store: persist.Store) -> None:
    """`check` names documents under names that no session can have. No verb touches them."""
    for name in ("_index.json", "a%2fb.json", "con.json", "a b.json"):
        (store.path / name).write_text('{"a": 1}')
    assert store.ids() == []
    assert [(problem.kind, problem.path.name) for problem in store.check()] == [
        ("foreign", name) for name in ("_index.json", "a b.json", "a%2fb.json", "con.json")
    ]
    for session_id in ("_index", "a/b", "con", "a b", "a%2fb"):
        assert not store.exists(session_id)
        store.create(session_id, {"mine": True})
        store.delete(session_id)
    assert sorted(path.name for path in store.path.glob("*.json")) == sorted(
        ["_index.json", "a%2fb.json", "con.json", "a b.json"]
    )
    assert all(path.read_text() == '{"a": 1}' for path in store.path.glob("*.json"))


@pytest.mark.parametrize("damage", [(b'"title":"t"', b'"title":"u"'), (b'"revision"', b'"rEvision"'), (b"]", b"}")])
def test_damaged_session_under_a_hashed_name_is_not_hidden(store: persist.Store, damage: tuple[bytes, bytes]) -> None:
    """HAZARDS F17, E1: a damaged document still gives its session's id, because the hash in the name vouches for it."""
    session_id = 'quo"te\\\n' * 50
    store.create(session_id, {"title": "t", "messages": [{"id": "m1"}]})
    stream = store.start_stream(session_id, stream_id="t1")
    path = store.path / f"{name_of(session_id)}.json"
    path.write_bytes(path.read_bytes().replace(*damage))
    stream._close()
    assert store.ids() == [session_id]
    assert [(problem.session_id, problem.kind) for problem in store.check()] == [(session_id, "corrupt")]
    assert store.clear_stale_streams().failures.keys() == {session_id}
    path.unlink()
    assert store.clear_stale_streams() == persist.Sweep([], {})
    assert list((store.path / ".leases").iterdir()) == [], "the lease names the id, too"


def test_document_whose_id_is_lost_is_named_by_its_file(store: persist.Store) -> None:
    """No document is hidden: `check` names one whose id cannot be read, and gives no advice about its journal."""
    session_id = "x" * 300
    journaled = persist.Store(store.path, journal="always")
    journaled.create(session_id, {"messages": []})
    journaled.append(session_id, "messages", 1)
    path = store.path / f"{name_of(session_id)}.json"
    path.write_bytes(path.read_bytes().replace(b"xxxx", b"yyyy"))
    assert store.ids() == []
    assert [(problem.kind, problem.path) for problem in store.check()] == [("corrupt", path)]
    assert len(list(store.path.glob("*.journal"))) == 1
