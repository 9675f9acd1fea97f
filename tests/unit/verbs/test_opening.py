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
    assert runner_of(command)("ls", path).exit_code == 3
    assert list(Path.cwd().iterdir()) == []
    assert persist.Store(f"./{path}").path == Path.cwd() / path


@pytest.mark.parametrize("path", ["chats/~", "a~", "./~", "x/~root/y"])
def test_a_tilde_elsewhere_is_a_name(home: Path, path: str) -> None:
    """Only a leading tilde is a home."""
    assert persist.Store(path).path == Path.cwd() / path


def test_path_that_was_made_from_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `Path` loses a slash of a URL, and would be a directory called "postgresql:". The error shows no password."""
    monkeypatch.chdir(tmp_path)
    for place in (Path("postgresql://ann:secret@localhost/chats"), "postgres:/ann:secret@localhost"):
        with pytest.raises(persist.InvalidArgument, match="a URL as a string") as caught:
            persist.Store(place)
        assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
