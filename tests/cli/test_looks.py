"""Long looks: lists and conversations are printed as they are read, and Ctrl-C ends a long command."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Run, json_of

import persist
from persist import json_codec
from persist.cli import commands, output, progress
from persist.maintenance import Step
from persist.storage.content import Items

# -P: the package is the one that the tests import, not the one in the directory in which they run.
COMMAND = [sys.executable, "-P", "-W", "error", "-m", "persist"]
DEADLINE_S = 60
MESSAGES = [{"id": f"m{n}", "role": "user", "content": f"message {n} " * 40} for n in range(3000)]


@pytest.fixture
def talk(store: persist.Store) -> persist.Store:
    """Make a session of 1.5 MB, with a journal."""
    store.create("s-42", {"title": "Talk", "messages": MESSAGES})
    store.append("s-42", "messages", {"id": "last", "role": "user", "content": "the end"})
    return store


# --- show ---


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_show_begins_before_it_has_decoded_the_session(
    talk: persist.Store, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """The first message is printed when one is decoded, so a session of 100 MB starts at once.

    Fails if `Items` are split or decoded whole, or if `show` goes back to `Store.load`.
    """
    decoded = 0
    real = json_codec.decode

    def counting(text: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return real(text)

    monkeypatch.setattr(commands, "decode", counting)
    found = talk._open().engine.read("s-42")
    facts = {"revision": 2}
    show = commands._json_of_session if as_json else commands._conversation
    pieces, seen = show("s-42", facts, found), ""
    while "message 0 message 0" not in seen:
        seen += next(pieces)
    assert decoded <= 3
    rest = seen + "".join(pieces)
    assert ("the end" in rest, decoded > len(MESSAGES)) == (True, True)


DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"messages": []},
    {"messages": [1, "two\nlines", None, [], {}, [[]], {"a": {"b": [1, {"c": []}]}}]},
    {"title": "é\u2028\ud800", "messages": {"no": "list"}, "tool_calls": [{"name": "look", "arguments": [1.5, -0.0]}]},
    {"apart": ["y" * 100] * 100, "also": "x" * 5000, "n": 10**30, "nested": {"k": ["v" * 5000]}, "messages": [{}]},
]


@pytest.mark.parametrize("data", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_json_that_is_printed_as_it_comes_is_the_same(run: Run, store: persist.Store, data: dict[str, Any]) -> None:
    """The JSON is byte by byte that of `json.dumps` with ``indent=2``, also with separate lists and with a journal."""
    log = persist.Store(store.path, journal="always")
    session = log.create("s-42", data)
    if isinstance(data.get("messages"), list):
        log.append("s-42", "messages", {"id": "last"})
        session.refresh()
    facts = {"version": session.version, "revision": session.revision}
    facts |= {"created_at": session.created_at.isoformat()}
    facts |= {"updated_at": session.updated_at.isoformat(), "active_stream_id": None}
    shown = {"id": "s-42", **facts, "data": session.data}
    assert run("show", store.path, "s-42", "--json").stdout == json.dumps(shown, indent=2) + "\n"


def test_json_of_ls_is_the_same(run: Run, store: persist.Store) -> None:
    """The JSON of `ls` is that of `json.dumps`, also without sessions, and with one that cannot be read."""
    assert run("ls", store.path, "--json").stdout == "[]\n"
    for session_id, title in (("a", "\x1b\u2028é"), ("user:7/b", None), ("c", {"no": "text"})):
        store.create(session_id, {"title": title, "messages": [1, 2]})
    (store.path / "d.json").write_text("{")
    text = run("ls", store.path, "--json").stdout
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    assert [(each["id"], each["title"], each["messages"]) for each in json.loads(text)] == [
        ("a", "\x1b\u2028é", 2),
        ("c", None, 2),
        ("d", None, None),
        ("user:7/b", None, 2),
    ]


def test_item_that_somebody_has_sealed_is_an_error_behind_those_before_it(
    talk: persist.Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that is not JSON is an error after the items before it: exit status 3, and the file is named."""
    items_of: Callable[[Any], Iterator[bytes]] = Items.__iter__

    def spoilt(self: Any) -> Iterator[bytes]:
        yield from items_of(self)
        yield b"{half"

    monkeypatch.setattr(Items, "__iter__", spoilt)
    result = run("show", talk.path, "s-42")
    assert (result.exit_code, "the end" in result.stdout, "s-42.json" in result.stderr) == (3, True, True)


def test_each_character_that_steers_is_escaped() -> None:
    """Every character that steers a terminal is escaped, in all of Unicode.

    These are control characters, separators of lines, halves of pairs and marks that reorder.
    """
    steers = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    for character in map(chr, range(sys.maxunicode + 1)):
        is_harmless = character not in steers and unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
        assert (output.printable(character) == character) == is_harmless, ascii(character)
        assert output.printable(character, keep=character) == character


# --- a reader that leaves ---


def lines_until_enough(*words: object) -> tuple[int, str]:
    """Run a command, read a few bytes and leave. Return its exit status and its standard error."""
    with subprocess.Popen([*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        said = process.stderr.read().decode()
        return process.wait(DEADLINE_S), said


@pytest.mark.parametrize("words", [("show", "s-42"), ("show", "s-42", "--json"), ("ls",), ("ls", "--json"), ("check",)])
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "colours"])
def test_reader_that_has_seen_enough_is_no_failure(
    talk: persist.Store, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], terminal: bool
) -> None:
    """`persist … | head` ends quietly with 0. Fails if rich prints, which exits with 1."""
    for number in range(300):
        (talk.path / f"n{number}.json").write_text('{"title": "' + "t" * 500 + '"}')
        (talk.path / f"n{number}.jsonl").touch()
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert lines_until_enough(words[0], talk.path, *words[1:]) == (0, "")


def test_reader_that_leaves_does_not_hide_problems(store: persist.Store) -> None:
    """`check` exits with the status of what it found, even if its reader leaves."""
    for number in range(2000):
        (store.path / f"n{number}.json").write_text("{")
    assert lines_until_enough("check", store.path) == (1, "")
    assert lines_until_enough("ls", store.path)[1] == ""


# --- a pager ---


PAGER = """
import pathlib, sys
pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read(%s))
"""


def on_terminal(*words: object, **environment: str) -> tuple[int, str]:
    """Run a command on a terminal, and return its exit status and all that it showed."""
    mine, its = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", **environment}
    variables.pop("LESS", None)
    process = subprocess.Popen([*COMMAND, *map(str, words)], stdin=its, stdout=its, stderr=its, env=variables)
    os.close(its)
    shown = b""
    # A Linux terminal gives EIO when the other side has ended.
    try:
        while more := os.read(mine, 65536):
            shown += more
    except OSError:
        pass
    os.close(mine)
    return process.wait(DEADLINE_S), shown.decode()


@pytest.mark.parametrize("words", [("show", "s-42"), ("show", "s-42", "--json")])
@pytest.mark.parametrize("limit", ["", "100"], ids=["all", "quits-early"])
def test_show_pages_on_a_terminal(talk: persist.Store, tmp_path: Path, words: tuple[str, ...], limit: str) -> None:
    """`show` pages through $PAGER, as `git log` does.

    A pager that quits ends the command, with 0. Fails without the pager.
    """
    pager, paged = tmp_path / "pager.py", tmp_path / "paged"
    pager.write_text(PAGER % limit)
    status, shown = on_terminal(words[0], talk.path, *words[1:], PAGER=f"{sys.executable} {pager} {paged}")
    assert (status, shown) == (0, "")
    text = paged.read_text()
    assert ("the end" in text) == (not limit)
    assert text.startswith("{" if "--json" in words else "Talk")


def test_pipe_gets_the_stream(talk: persist.Store, tmp_path: Path) -> None:
    """A pipe gets the output without a pager."""
    done = subprocess.run(
        [*COMMAND, "show", str(talk.path), "s-42"],
        env=os.environ | {"PAGER": f"touch {tmp_path / 'paged'}"},
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout.endswith(b"user  last\nthe end\n")
    assert not (tmp_path / "paged").exists()


def test_long_table_on_a_terminal_is_printed_as_it_comes(run: Run, store: persist.Store) -> None:
    """The columns of a table with more rows than are drawn still stand below each other."""
    for number in range(output._MOST_DRAWN + 50):
        (store.path / f"n{number:03}.json").write_text(json.dumps({"title": "日本" if number % 2 else "[red]"}))
    lines = run("ls", store.path, FORCE_COLOR="1").stdout.splitlines()
    assert len(lines) == output._MOST_DRAWN + 51
    assert lines[0].split() == ["id", "title", "revision", "messages", "updated", "stream"]
    assert {line.index("none") for line in lines[1::2]} == {lines[0].index("stream")}


# --- progress and Ctrl-C ---


class Terminal:
    """A standard error that is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def three(interrupted_at: int = -1) -> Iterator[Step[int]]:
    for number in range(1, 4):
        if number == interrupted_at:
            raise KeyboardInterrupt
        yield Step(number, 3, number)


def test_progress_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long command shows its progress on a terminal, and removes it at its end. A log file gets none of it."""
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    assert list(progress.Watched(three(), "checked")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.Watched(three(), "checked")) == [1, 2, 3]
    assert "\r2 of 3 sessions checked" in terminal.text
    assert terminal.text.endswith("\r\x1b[K")


def test_second_ctrl_c_ends_at_once() -> None:
    """The steps before the interrupt are still known."""
    steps = progress.Watched(three(interrupted_at=3), "checked")
    assert list(steps) == [1, 2]
    assert (steps.was_stopped, str(steps)) == (True, "2 of 3 sessions checked")


#: SIGINT comes in the middle of the command's third session.
INTERRUPTED = """
import os, signal, sys
from persist import maintenance, store
from persist.cli import commands
from persist.storage import transaction

signal.signal(signal.SIGINT, signal.default_int_handler)
real, count = transaction.Locked.__enter__, 0

def enter(self):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return real(self)

transaction.Locked.__enter__ = enter
commands.persist()
"""


def interrupted(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error", "-c", INTERRUPTED, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


LONG: list[tuple[tuple[str, ...], str]] = [
    (("check",), "3 of 9 sessions checked. Nothing was changed."),
    (("clear-stale", "--every-session"), "3 of 9 sessions looked at. 3 streams were cleared."),
    (("accept", *(f"n{number}" for number in range(9))), "sessions accepted or named."),
    (("backup", "COPY"), "3 of 9 sessions copied or found unchanged. The finished copies are whole."),
]


@pytest.mark.parametrize("option", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(("words", "said"), LONG, ids=lambda each: each[0])
def test_ctrl_c_ends_between_two_sessions(
    run: Run, store: persist.Store, tmp_path: Path, words: tuple[str, ...], said: str, option: tuple[str, ...]
) -> None:
    """After Ctrl-C the exit status is 130, finished work is told and stays, and the command can be started again.

    Fails if Ctrl-C raises in the middle of a session, because then it is unknown what was done.
    """
    words = tuple(str(tmp_path / "copy") if word == "COPY" else word for word in words)
    for number in range(9):
        (store.path / f"n{number}.json").write_text('{"active_stream_id": "x", "messages": []}')
    done = interrupted(words[0], store.path, *words[1:], *option)
    assert (done.returncode, said in done.stderr) == (130, True), done.stderr
    assert done.stderr.startswith("Stopped: ")
    cleared = sum(store.head(session_id).active_stream_id is None for session_id in store.ids())
    assert cleared == (3 if words[0] == "clear-stale" else 0)
    assert all(store.load(session_id).data["messages"] == [] for session_id in store.ids())
    again = run(words[0], store.path, *words[1:])
    assert again.exit_code == (1 if words[0] == "check" else 0)


def test_accept_takes_several_and_names_those_that_it_cannot(run: Run, store: persist.Store) -> None:
    """`accept` takes the other sessions if one cannot be accepted, and the exit status is 3."""
    for session_id in ("a", "b", "c", "d"):
        store.create(session_id, {"title": "before", "messages": []})
    for session_id in ("a", "c", "d"):
        path = store.path / f"{session_id}.json"
        path.write_text(path.read_text().replace("before", "behind") if session_id != "c" else "{")
    result = run("accept", store.path, "a", "b", "c", "d")
    assert (result.exit_code, "Session 'c' is damaged" in result.stderr) == (3, True)
    assert result.stdout.splitlines()[0].startswith("a is accepted at revision 2.")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["a", "b", "d"]
    shown = json_of(run("accept", store.path, "a", "c", "--json"))
    assert [(each["id"], each.get("was_sound")) for each in shown] == [("a", True), ("c", None)]
