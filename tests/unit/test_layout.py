"""Every file name of a store, and which ids names can be made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist.errors import InvalidSessionId, InvalidStreamId
from persist.storage import layout
from persist.storage.layout import Layout, check_session_id, check_stream_id

GOOD = ["a", "Z", "0", "s-42", "S_42", "a" * 128, "0-_", "con1", "xcon", "com", "com10", "lpt", "nul-1"]
BAD = [
    "",
    "a" * 129,
    "a\n",
    "\na",
    "a\x00",
    "-a",
    "_a",
    ".",
    "..",
    "../a",
    "a/b",
    "a\\b",
    "a.b",
    "a b",
    "a:b",
    "é",
    "\u0661",  # an Arabic digit, which \d would take
    "\uff11",  # a full-width one
    "\u212a",  # the Kelvin sign, which case folding makes a k
    "a\u0301",
    "\ud800",
    None,
    5,
    True,
    b"s-42",
    ["s-42"],
    Path("s-42"),
]
DEVICES = ["con", "CON", "Prn", "aux", "NUL", "com0", "COM1", "com9", "lpt0", "LPT9"]


@pytest.mark.parametrize("good", GOOD)
def test_a_plain_id_names_sessions_and_streams(good: str) -> None:
    """Letters, digits, ``_`` and ``-``: up to 128 for a session, 64 for a stream, whose lease names both."""
    assert check_session_id(good) == good
    assert check_stream_id(good[:64]) == good[:64]


@pytest.mark.parametrize("bad", BAD, ids=ascii)
def test_anything_else_names_nothing(bad: object) -> None:
    """The whole id must match: no trailing newline, no path, no letter or digit beyond ASCII, no other type."""
    with pytest.raises(InvalidSessionId, match="an id is 1 to 128 of A-Z") as session:
        check_session_id(bad)
    with pytest.raises(InvalidStreamId, match="a stream id is 1 to 64 of A-Z") as stream:
        check_stream_id(bad)
    assert session.value.session_id is bad
    assert stream.value.stream_id is bad


@pytest.mark.parametrize("device", DEVICES)
def test_a_windows_device_names_no_session(device: str) -> None:
    """``con.json`` opens the console there, whatever the case of the letters."""
    with pytest.raises(InvalidSessionId, match="no Windows device name"):
        check_session_id(device)


@given(st.text())
def test_an_accepted_id_is_one_plain_file_name(session_id: str) -> None:
    """Whatever passes stays inside the directory, and its file name leads back to it."""
    try:
        check_session_id(session_id)
    except InvalidSessionId:
        return
    path = Layout(Path("/store")).session(session_id).document
    assert path.parent == Path("/store")
    assert layout.session_of_document(path.name) == session_id


def test_names_are_as_documented() -> None:
    """The five names of the docstring's table."""
    here = Layout(Path("/store"))
    paths = here.session("s-42")
    assert paths.document == Path("/store/s-42.json")
    assert paths.lock == Path("/store/s-42.json.lock")
    assert paths.temp == Path("/store/s-42.json.tmp")
    assert here.leases == Path("/store/.leases")
    assert here.lease("s-42", "t1") == Path("/store/.leases/s-42.t1")


@pytest.mark.parametrize(
    "name",
    [
        "s-42.json.lock",
        "s-42.json.tmp",
        "s-42",
        ".json",
        "-a.json",
        "a.b.json",
        "a.json\n",
        "a.JSON",
        ".leases",
        "a.json~",
    ],
)
def test_other_files_in_the_directory_are_no_sessions(name: str) -> None:
    """Locks, temporary files, backups of editors and strange names do not turn up as sessions."""
    assert layout.session_of_document(name) is None


@pytest.mark.parametrize(
    ("name", "session_id"),
    [
        ("a.json.lock", "a"),
        ("a.json.tmp", "a"),
        ("a.json", None),
        ("a.lock", None),
        (".json.tmp", None),
        ("a b.json.tmp", None),
        ("con.json.lock", None),
    ],
)
def test_a_leftover_names_its_session(name: str, session_id: str | None) -> None:
    """Locks and temporary files are told from foreign ones."""
    assert layout.session_of_leftover(name) == session_id


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("a.b", ("a", "b")),
        ("a-1.b_2", ("a-1", "b_2")),
        ("a", None),
        ("a.", None),
        (".b", None),
        ("a.b.c", None),
        ("con.b", None),
        ("a." + "b" * 65, None),
        ("a.b\n", None),
    ],
)
def test_a_lease_names_its_session_and_stream(name: str, stream: tuple[str, str] | None) -> None:
    """Ids hold no dot, so the name parts in one way only."""
    assert layout.stream_of(name) == stream
