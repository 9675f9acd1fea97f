"""Opening a store: which directory a path names."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from cli.conftest import runner_of

import persist
import persist.aio
from persist.cli.commands import persist as command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("below", ["chats", "a/b/c", "~", "x~y", "with space"])
def test_a_tilde_is_the_home_directory(home: Path, below: str) -> None:
    """HAZARDS F18: a leading tilde is the home, for text and `Path`, sync and async, and for the commands.
    Nothing is made elsewhere.
    """
    store = persist.Store(f"~/{below}")
    store.create("s", {"title": "at home"})
    assert store.path == home / below
    assert persist.Store(Path("~") / below, create=False).ids() == ["s"]
    assert persist.aio.Store(f"~/{below}").path == home / below
    assert "at home" in runner_of(command)("ls", f"~/{below}").stdout
    assert list(Path.cwd().iterdir()) == []


def test_a_user_and_a_tilde_are_that_users_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~user`` is the home that the system's table of users names."""
    entry = pwd.getpwuid(0)
    other = pwd.struct_passwd((*entry[:5], str(home / "other"), entry[6]))
    monkeypatch.setattr(pwd, "getpwnam", {"other": other}.__getitem__)
    assert persist.Store("~other/chats").path == home / "other" / "chats"


@pytest.mark.parametrize("path", ["~nobody-has-this-name", "~nobody-has-this-name/chats", "~no one/x"])
def test_an_unknown_home_is_refused(home: Path, path: str) -> None:
    """A directory whose name begins with a tilde is never made by accident. With ``./`` before it, it is made."""
    with pytest.raises(persist.InvalidArgument, match=r"put \./ before it"):
        persist.Store(path)
    # As for any argument that names no store.
    assert runner_of(command)("ls", path).exit_code == 2
    assert list(Path.cwd().iterdir()) == []
    assert persist.Store(f"./{path}").path == Path.cwd() / path


@pytest.mark.parametrize("path", ["chats/~", "a~", "./~", "x/~root/y"])
def test_a_tilde_elsewhere_is_a_name(home: Path, path: str) -> None:
    """Only a leading tilde is a home."""
    assert persist.Store(path).path == Path.cwd() / path


@pytest.mark.parametrize(
    "place",
    [
        Path("postgresql://ann:secret@localhost/chats"),
        "postgres:/ann:secret@localhost",
        "postgresql+psycopg://ann:secret@localhost/chats",
        "POSTGRESQL://ann:secret@localhost/chats",
        "mysql://localhost/chats?user=ann&password=secret",
        "host=localhost dbname=chats password = 'secret'",
    ],
)
def test_url_that_names_no_store_is_refused(place: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a directory called "postgresql+psycopg:", on each machine another one. No error shows the password.

    A `Path` loses a slash of a URL.
    """
    monkeypatch.chdir(tmp_path)
    for opened in (persist.Store, persist.aio.Store):
        with pytest.raises(persist.InvalidArgument, match="as a string, not as a Path") as caught:
            opened(place)
        assert "secret" not in str(caught.value)
    for arguments in (
        ["ls", place],
        ["serve", place],
        ["copy", place, "there"],
        ["show", place, "s"],
        [place],
        ["ls", "-x", place],
    ):
        result = runner_of(command)(*arguments)
        assert result.exit_code in (2, 3)
        assert "secret" not in result.output
    assert list(tmp_path.iterdir()) == []
