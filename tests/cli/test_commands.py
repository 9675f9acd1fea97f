"""The commands that look at a store and repair it: what they print, and their exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from actors import Actor
from cli.conftest import Run, json_of
from conftest import ActorFactory

import persist
from persist.cli.output import printable

USER = {"id": "m1", "role": "user", "content": "hi"}
HOSTILE = "\x1b]0;owned\x07\x1b[2Jevil\u202eltr\nsecond line\t\ud800"


def damage(directory: Path, session_id: str) -> None:
    path = directory / f"{session_id}.json"
    path.write_bytes(path.read_bytes().replace(b'"hi"', b'"ho"'))


def leave_a_dead_stream(actor: Actor, session_id: str) -> str:
    stream_id: str = actor.do(f"stream = store.start_stream({session_id!r}, {USER!r})\nstream.id")
    actor.kill()
    return stream_id


# --- usage ---


COMMANDS = (
    ("ls",),
    ("streams",),
    ("clear-stale",),
    ("check",),
    ("show", "s-42"),
    ("accept", "s-42"),
    ("compact", "s-42"),
    ("delete", "s-42"),
    ("backup", "copy"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_missing_directory_is_a_usage_error_and_is_not_made(
    run: Run, directory: Path, command: tuple[str, ...]
) -> None:
    """A command on a store that does not exist exits with 2 and creates nothing."""
    result = run(command[0], directory, *command[1:])
    assert result.exit_code == 2
    assert f"{directory} is not a directory" in result.stderr
    assert not directory.exists()


def test_directory_that_is_no_store_is_a_usage_error_and_stays_as_it_is(run: Run, tmp_path: Path) -> None:
    """A directory without sessions and leases is not taken for a store, and gets no file."""
    (tmp_path / "notes.txt").write_text("mine")
    result = run("ls", tmp_path)
    assert result.exit_code == 2
    assert "is not a store" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_error_of_the_store_is_a_message_and_status_3(run: Run, store: persist.Store) -> None:
    """A `PersistError` is shown as its message, without a traceback, with exit status 3."""
    result = run("show", store.path, "nobody")
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: No session 'nobody'")
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_installed_command_exits_with_the_documented_status(store: persist.Store) -> None:
    """The real `persist` exits with 0 for a sound store, 1 for a damaged one, 2 for bad usage and 3 for a refusal."""
    store.create("s-42", {"messages": [USER]})
    script = "from persist.cli import main; main()"

    def status(*arguments: str) -> int:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, timeout=30, check=False
        ).returncode

    assert status("check", str(store.path)) == 0
    damage(store.path, "s-42")
    assert status("check", str(store.path)) == 1
    assert status("check", str(store.path / "nowhere")) == 2
    assert status("show", str(store.path), "s-42") == 3


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_missing_extra_is_named_with_its_remedy(missing: str) -> None:
    """Without click or rich, `persist` says what to install and exits with 2."""
    script = f"import sys; sys.modules[{missing!r}] = None; from persist.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert (
        result.stderr == f"persist: the command line needs {missing}: pip install '.[cli]', in a checkout of persist\n"
    )


def test_help_shows_examples_and_exit_status(run: Run) -> None:
    """``persist --help`` has runnable examples and the meaning of each exit status."""
    help_text = run("--help").stdout
    assert "persist clear-stale var/sessions" in help_text
    assert "3  the store refused" in help_text


# --- ls ---


def test_ls_shows_each_session_and_who_runs_on_it(run: Run, store: persist.Store, actor: ActorFactory) -> None:
    """`ls` shows title, revision and number of messages, and whether a stream is absent, live or stale."""
    for session_id in ("idle", "live", "stale"):
        store.create(
            session_id, {"title": session_id.upper(), "messages": [{"id": "m0", "role": "system", "content": ""}]}
        )
    leave_a_dead_stream(actor(), "stale")
    with store.start_stream("live", USER) as stream:
        entries = json_of(result := run("ls", store.path, "--json"))
        stream.finish()
    assert result.exit_code == 0
    assert [(entry["id"], entry["title"], entry["messages"], entry["stream"]) for entry in entries] == [
        ("idle", "IDLE", 1, "none"),
        ("live", "LIVE", 2, "live"),
        ("stale", "STALE", 2, "stale"),
    ]
    assert [entry["revision"] for entry in entries] == [1, 2, 2]


def test_ls_shows_a_stream_without_a_lease_as_stale(run: Run, tmp_path: Path) -> None:
    """An `active_stream_id` that another program has left has no lease, so it is stale (hermes-webui #2157)."""
    (tmp_path / "s-42.json").write_text('{"active_stream_id": "x", "messages": []}')
    assert [entry["stream"] for entry in json_of(run("ls", tmp_path, "--json"))] == ["stale"]


def test_ls_shows_a_damaged_session_and_goes_on(run: Run, store: persist.Store) -> None:
    """One damaged document does not hide the others. It is named, and the exit status is 1."""
    for session_id in ("a", "b", "c"):
        store.create(session_id, {"hello": "hi", "messages": []})
    damage(store.path, "b")
    result = run("ls", store.path)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["id", "a", "b", "c"]
    assert "UNREADABLE: see 'persist check'" in lines[2]


def test_ls_guesses_nothing_of_a_session_that_is_locked(run: Run, store: persist.Store) -> None:
    """The stream of a locked session is unknown, and not stale, because it may live."""
    store.create("s-42", {"messages": []})
    with store.start_stream("s-42") as stream:
        with store.transaction("s-42"):
            locked = json_of(run("ls", store.path, "--json"))
        free = json_of(run("ls", store.path, "--json"))
        stream.finish()
    assert [entry["stream"] for entry in (*locked, *free)] == ["unknown", "live"]


def test_ls_goes_on_when_a_damaged_session_has_a_stream(run: Run, store: persist.Store) -> None:
    """A damaged session whose stream cannot be looked at leaves the list readable, and its stream is not guessed."""
    for session_id in ("a", "b"):
        store.create(session_id, {"hello": "hi", "messages": []})
    with store.start_stream("a") as stream:
        with store.start_stream("b") as doomed:
            damage(store.path, "b")
            result = run("ls", store.path, "--json")
            store.delete("b", force=True)
            del doomed
        stream.finish()
    first, second = json_of(result)
    assert first["stream"] in ("live", "unknown")
    assert "damaged" in second["error"]


def test_plain_ls_has_one_line_a_session(run: Run, store: persist.Store) -> None:
    """A session is one line of cells for a pipe, with tabs between them, whatever its title holds."""
    store.create("s-42", {"title": HOSTILE, "messages": []})
    lines = run("ls", store.path).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].count("\t") == lines[0].count("\t") == 5


@pytest.mark.parametrize("terminal", [{}, {"FORCE_COLOR": "1"}], ids=["pipe", "terminal"])
@pytest.mark.parametrize("command", [("ls",), ("show", "s-42")], ids=lambda command: command[0])
def test_document_cannot_steer_the_terminal(
    run: Run, store: persist.Store, command: tuple[str, ...], terminal: dict[str, str]
) -> None:
    """Escape sequences, reordering marks and lone surrogates in a title or a message are shown as escapes."""
    message = {"id": "m1", "role": "user\x1b[5m", "content": HOSTILE, "na\x1bme": "\x9b2J"}
    store.create("s-42", {"title": HOSTILE, "messages": [message]})
    result = run(command[0], store.path, *command[1:], COLUMNS="200", **terminal)
    assert result.exit_code == 0
    for raw in ("\x1b]0;", "\x1b[2J", "\x1b[5m", "\x07", "\x9b", "\u202e"):
        assert raw not in result.stdout
    assert "\\x1b]0;owned\\x07\\x1b[2Jevil\\u202eltr" in result.stdout


def test_table_on_a_terminal_takes_no_markup_from_a_title(run: Run, store: persist.Store) -> None:
    """On a terminal `ls` draws a table, in which ``[red]`` in a title is text."""
    store.create("s-42", {"title": "[red]alarm[/red] :bomb:", "messages": []})
    drawn = run("ls", store.path, FORCE_COLOR="1", COLUMNS="200").stdout
    assert "│ [red]alarm[/red] :bomb: │" in drawn


# --- show, streams ---


def test_show_prints_messages_in_order_with_their_lines(run: Run, store: persist.Store) -> None:
    """`show` prints every message readably, with its line breaks, tool calls as JSON, and content of any type."""
    messages = [
        {"id": "m1", "role": "user", "content": "two\nlines"},
        {"id": "m2", "role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"id": "m3", "role": "assistant", "content": [{"type": "text", "text": "done"}]},
        "not even an object",
    ]
    store.create("s-42", {"title": "Hello", "messages": messages})
    text = run("show", store.path, "s-42").stdout
    wanted = [
        "Hello",
        "revision: 1",
        "user  m1",
        "two\nlines",
        'tool_calls: [{"name": "look"}]',
        '"text": "done"',
        "not even",
    ]
    places = [text.find(part) for part in wanted]
    assert -1 not in places
    assert places == sorted(places)


def test_show_counts_the_items_of_other_lists(run: Run, store: persist.Store) -> None:
    """A session without messages, as the LangGraph adapter makes them, does not look empty."""
    store.create("s-42", {"checkpoints": [{"id": n, "text": "x" * 1000} for n in range(7)], "tags": ["a"]})
    assert "checkpoints: 7 items\n" in run("show", store.path, "s-42").output


def test_an_id_that_looks_like_an_option_is_told_how_to_be_named(run: Run, store: persist.Store) -> None:
    """Claude's adapter makes such ids, from the paths of projects."""
    store.create("-srv-shop/f1d2", {"title": "Shop"})
    refused = run("show", store.path, "-srv-shop/f1d2")
    assert refused.exit_code == 2
    assert "Put -- before an id that begins with a dash." in refused.output
    assert run("show", store.path, "--", "-srv-shop/f1d2").output.startswith("Shop\n")
    assert "dash" not in run("show", store.path, "--jsn", "s-42").output


def test_show_json_is_the_whole_document(run: Run, store: persist.Store) -> None:
    """``show --json`` gives the data as it is, with revision and times beside it."""
    data = {"title": HOSTILE, "n": 10**30, "messages": [USER]}
    session = store.create("s-42", data)
    shown = json_of(run("show", store.path, "s-42", "--json"))
    assert shown == {
        "id": "s-42",
        "version": session.version,
        "revision": 1,
        "created_at": session.created_at.isoformat(),
        "updated_at": session.updated_at.isoformat(),
        "active_stream_id": None,
        "data": data,
    }


def test_streams_tells_live_asked_to_end_and_stale(run: Run, store: persist.Store, actor: ActorFactory) -> None:
    """`streams` names each stream with its owner, and tells whether it lives, was asked to end, or is stale."""
    for session_id in ("asked", "live", "stale"):
        store.create(session_id, {"messages": []})
    dead = actor()
    leave_a_dead_stream(dead, "stale")
    with store.start_stream("asked") as asked, store.start_stream("live") as live:
        store.cancel("asked", asked.id)
        plain = [line.split("\t") for line in run("streams", store.path).stdout.splitlines()]
        shown = json_of(run("streams", store.path, "--json"))
        live.finish()
    assert [cells[:3:2] for cells in plain[1:]] == [
        ["asked", "live, asked to end"],
        ["live", "live"],
        ["stale", "stale"],
    ]
    assert [(info["session_id"], info["is_live"], info["is_cancelled"]) for info in shown] == [
        ("asked", True, True),
        ("live", True, False),
        ("stale", False, False),
    ]
    assert shown[2]["owner"]["pid"] == dead.pid


# --- mending ---


def test_clear_stale_clears_the_dead_and_leaves_the_living(run: Run, store: persist.Store, actor: ActorFactory) -> None:
    """`clear-stale` names what it cleared. A live stream goes on undisturbed."""
    for session_id in ("live", "stale"):
        store.create(session_id, {"messages": []})
    stream_id = leave_a_dead_stream(actor(), "stale")
    with store.start_stream("live") as stream:
        result = run("clear-stale", store.path, "--json")
        stream.finish({"role": "assistant", "content": "still here"})
    assert result.exit_code == 0
    assert json_of(result) == {"cleared": [{"session_id": "stale", "stream_id": stream_id}], "failures": {}}
    assert store.load("stale").active_stream_id is None


def test_clear_stale_finds_foreign_streams_only_in_every_session(run: Run, tmp_path: Path) -> None:
    """A stream that another program left without a lease is found with ``--every-session``."""
    (tmp_path / "s-42.json").write_text('{"active_stream_id": "x", "messages": []}')
    assert json_of(run("clear-stale", tmp_path, "--json"))["cleared"] == []
    cleared = json_of(run("clear-stale", tmp_path, "--every-session", "--json"))["cleared"]
    assert cleared == [{"session_id": "s-42", "stream_id": "x"}]


def test_clear_stale_reports_sessions_it_could_not_look_at(run: Run, store: persist.Store, actor: ActorFactory) -> None:
    """A damaged session does not stop the sweep. The others are cleared, it is named, and the exit status is 1."""
    for session_id in ("a", "b"):
        store.create(session_id, {"messages": []})
    leave_a_dead_stream(actor(), "a")
    stream_id = leave_a_dead_stream(actor(), "b")
    damage(store.path, "a")
    result = run("clear-stale", store.path, "--json")
    assert result.exit_code == 1
    found = json_of(result)
    assert found["cleared"] == [{"session_id": "b", "stream_id": stream_id}]
    assert "Session 'a' is damaged" in found["failures"]["a"]


def test_check_names_damage_and_left_overs(run: Run, store: persist.Store) -> None:
    """`check` exits with 0 on a sound store. It exits with 1 and names each file that is damaged or left over."""
    store.create("s-42", {"messages": [USER]})
    sound = run("check", store.path)
    assert (sound.exit_code, sound.stdout) == (0, "1 sessions: no problem found.\n")
    damage(store.path, "s-42")
    (store.path / "s-42.json.tmp").write_text("half")
    result = run("check", store.path, "--json")
    assert result.exit_code == 1
    assert [(problem["kind"], problem["path"]) for problem in json_of(result)["problems"]] == [
        ("corrupt", str(store.path / "s-42.json")),
        ("left-over", str(store.path / "s-42.json.tmp")),
    ]
    assert run("check", store.path).stdout.count("\n") == 3


@pytest.mark.parametrize("name", ["_index.json", "s-42.jsonl", "s-42.json~", ".s-42.json.swp", "\x1b[2J.txt"])
def test_check_of_a_store_with_foreign_files_is_no_failure(run: Run, store: persist.Store, name: str) -> None:
    """A file that is not of persist is named once, and the exit status is 0. Beside damage it is 1."""
    store.create("s-42", {"messages": [USER]})
    (store.path / name).write_text("mine")
    result = run("check", store.path)
    assert result.exit_code == 0
    assert result.stdout.startswith("1 sessions: no problem found.\nforeign: ")
    assert result.stdout.count("foreign: ") == 1
    assert printable(name) in result.stdout
    found = json_of(run("check", store.path, "--json"))
    assert (found["problems"], [each["path"] for each in found["foreign"]]) == ([], [str(store.path / name)])
    damage(store.path, "s-42")
    for option in ((), ("--json",)):
        assert run("check", store.path, *option).exit_code == 1


def test_accept_takes_an_edit_by_hand(run: Run, store: persist.Store) -> None:
    """After `accept` the edited document is sound, with the edit in it, at the next revision."""
    store.create("s-42", {"messages": [USER]})
    damage(store.path, "s-42")
    assert run("show", store.path, "s-42").exit_code == 3
    result = run("accept", store.path, "s-42", "--json")
    assert result.exit_code == 0
    assert json_of(result) == {"id": "s-42", "revision": 2, "was_sound": False}
    assert store.load("s-42").data["messages"] == [{**USER, "content": "ho"}]


def test_accept_of_a_sound_session_says_so(run: Run, store: persist.Store) -> None:
    """`accept` of a sound session says that there was nothing to accept."""
    store.create("s-42", {"messages": [USER]})
    assert "sound, at revision 1: there was nothing to accept" in run("accept", store.path, "s-42").stdout
    assert store.load("s-42").revision == 1


def test_accept_refuses_what_is_no_json(run: Run, store: persist.Store) -> None:
    """A truncated document cannot be accepted: the exit status is 3, and the file stays as it was."""
    store.create("s-42", {"messages": [USER]})
    path = store.path / "s-42.json"
    path.write_bytes(path.read_bytes()[:-4])
    before = path.read_bytes()
    assert run("accept", store.path, "s-42").exit_code == 3
    assert path.read_bytes() == before


# --- backup ---


def test_backup_says_what_it_did(run: Run, store: persist.Store, tmp_path: Path) -> None:
    """`backup` counts the sessions that are copied, unchanged, gone and removed.

    It names a session that cannot be read, and then the exit status is 1.
    """
    copy = tmp_path / "copy"
    for session_id in ("a", "b", "\x1b[2J"):
        store.create(session_id, {"hello": "hi", "messages": []})
    result = run("backup", store.path, copy)
    assert (result.exit_code, result.stdout) == (0, "3 sessions copied, 0 unchanged.\n")
    store.delete("\x1b[2J")
    damage(store.path, "a")
    store.create("c")
    result = run("backup", store.path, copy)
    assert result.exit_code == 1
    assert result.stdout == "1 sessions copied, 1 unchanged, 1 gone from the store, whose copies stay (--prune).\n"
    assert "Session 'a' is damaged" in result.stderr
    result = run("backup", store.path, copy, "--prune", "--json")
    assert result.exit_code == 1
    found = json_of(result)
    assert "Session 'a' is damaged" in found.pop("failures")["a"]
    assert found == {"path": str(copy), "copied": [], "unchanged": ["b", "c"], "gone": [], "removed": ["\x1b[2J"]}
    assert run("check", copy).stdout == "3 sessions: no problem found.\n"
    assert run("ls", copy).exit_code == 0


@pytest.mark.parametrize("dest", ["", "sub", "../other"])
def test_backup_to_a_place_that_is_no_backup_is_refused(
    run: Run, store: persist.Store, tmp_path: Path, dest: str
) -> None:
    """A backup to the store itself, a directory in it, or one with other files is refused, and changes nothing.

    The exit status is 3.
    """
    store.create("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text("mine")
    result = run("backup", store.path, store.path / dest)
    assert (result.exit_code, "an earlier backup of this store" in result.stderr) == (3, True)
    assert (tmp_path / "other" / "a.json").read_text() == "mine"
    assert sorted(path.name for path in store.path.iterdir()) == [".leases", "a.json", "a.json.lock"]


# --- compact ---


def test_compact_folds_the_journal_and_says_so(run: Run, store: persist.Store) -> None:
    """After `compact` the file alone is the session, at its revision. If there was nothing to fold, it says so."""
    always = persist.Store(store.path, journal="always")
    always.create("s-42", {"messages": [USER] * 500 + ["x" * 70_000]})
    always.append("s-42", "messages", "last")
    before = always.load("s-42")
    assert '"last"' not in (store.path / "s-42.json").read_text()
    result = run("compact", store.path, "s-42", "--json")
    assert (result.exit_code, json_of(result)) == (0, {"id": "s-42", "was_folded": True})
    assert '"last"' in (store.path / "s-42.json").read_text()
    folded = {path.name: path.read_bytes() for path in store.path.glob("s-42*")}
    result = run("compact", store.path, "s-42")
    assert (result.exit_code, result.stdout) == (0, "s-42: there was nothing to fold.\n")
    assert {path.name: path.read_bytes() for path in store.path.glob("s-42*")} == folded
    after = store.load("s-42")
    assert (after.data, after.revision, after.updated_at) == (before.data, before.revision, before.updated_at)


def test_compact_of_a_missing_session_is_status_3(run: Run, store: persist.Store) -> None:
    """A fold of a missing or damaged session exits with 3 and folds nothing. For damage it says what to do."""
    assert run("compact", store.path, "nobody").exit_code == 3
    always = persist.Store(store.path, journal="always")
    always.create("s-42", {"messages": [USER]})
    next(store.path.glob("s-42.*.journal")).unlink()
    result = run("compact", store.path, "s-42")
    assert result.exit_code == 3
    assert "persist accept" in result.stderr


def test_accept_of_a_damaged_journal_keeps_a_copy(run: Run, store: persist.Store) -> None:
    """`accept` takes the commits before the damage. The damaged journal is kept beside the session."""
    always = persist.Store(store.path, journal="always")
    always.create("s-42", {"messages": [USER]})
    always.append("s-42", "messages", "good")
    always.append("s-42", "messages", "evil")
    [path] = store.path.glob("s-42.*.journal")
    spoilt = path.read_bytes().replace(b'"evil"', b'"live"')
    path.write_bytes(spoilt)
    assert run("show", store.path, "s-42").exit_code == 3
    result = run("accept", store.path, "s-42")
    assert result.exit_code == 0
    assert "a record in it was altered" in result.stdout
    assert store.load("s-42").data["messages"] == [USER, "good"]
    assert (store.path / f"{path.name}.damaged").read_bytes() == spoilt


@pytest.fixture
def edited(store: persist.Store) -> Path:
    """Make a session whose document was edited by hand so that its journal does not fit it. Return its journal."""
    always = persist.Store(store.path, journal="always")
    always.create("s-42", {"title": "t", "messages": [USER]})
    always.update("s-42", lambda tx: tx.data["messages"].insert(0, "first"))
    damage(store.path, "s-42")
    [path] = store.path.glob("s-42.*.journal")
    return path


def test_accept_that_would_lose_commits_names_the_ways_out(run: Run, store: persist.Store, edited: Path) -> None:
    """An accept of an edit that the journal does not fit guesses and writes nothing. The exit status is 3."""
    before = {path.name: path.read_bytes() for path in store.path.glob("s-42*")}
    result = run("accept", store.path, "s-42")
    assert result.exit_code == 3
    for way in ("Undo the edit", "persist compact", "persist accept --drop-journal"):
        assert way in result.stderr
    assert {path.name: path.read_bytes() for path in store.path.glob("s-42*")} == before


@pytest.mark.parametrize("option", [(), ("--json",)], ids=["text", "json"])
def test_accept_without_the_journal_keeps_it_aside(
    run: Run, store: persist.Store, edited: Path, option: tuple[str, ...]
) -> None:
    """`accept --drop-journal` takes the document as it is, and says where the dropped commits are kept."""
    written = edited.read_bytes()
    result = run("accept", "--drop-journal", store.path, "s-42", *option)
    assert result.exit_code == 0, result.stderr
    session = store.load("s-42")
    assert session.data == {"title": "t", "messages": [{**USER, "content": "ho"}]}
    assert session.revision > 2
    kept = store.path / f"{edited.name}.damaged"
    assert (kept.read_bytes(), edited.exists()) == (written, False)
    if option:
        assert json_of(result) == {"id": "s-42", "revision": session.revision, "was_sound": False}
    else:
        assert f"accepted at revision {session.revision}. What was wrong: its checksum does not match" in result.stdout
        assert f"Its journal was given up; a copy is kept in {kept}." in result.stdout
    assert run("check", store.path).exit_code == 0


def test_accept_without_the_journal_of_a_sound_session_says_what_it_did(run: Run, store: persist.Store) -> None:
    """A drop of the journal loses commits, so the command does not say that there was nothing to accept."""
    always = persist.Store(store.path, journal="always")
    always.create("s-42", {"messages": [USER]})
    always.append("s-42", "messages", "later")
    result = run("accept", store.path, "s-42", "--drop-journal")
    assert result.exit_code == 0
    assert "accepted at revision 3. Nothing was wrong.\nIts journal was given up; a copy is kept in" in result.stdout
    assert store.load("s-42").data["messages"] == [USER]
