"""The commands that look at a store and mend it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from persist import __version__
from persist.cli.output import console, print_json, print_table, printable, tolerate_any_terminal
from persist.errors import CorruptSession, PersistError, SessionNotFound
from persist.storage.layout import LEASES, journal_of, name_of
from persist.store import Store
from persist.streams import StreamInfo

PROBLEMS_FOUND = 1
STORE_ERROR = 3
# As a shell reports a program that SIGPIPE has ended.
ENDED_BY_SIGPIPE = 141
_TITLE_SHOWN = 60

_EPILOG = """\b
Exit status:
  0  all is well
  1  problems were found: damaged sessions, left-overs
  2  the command line is wrong
  3  the store refused; its reason is on the standard error

\b
Examples:
  persist ls var/sessions
  persist show var/sessions s-42
  persist clear-stale var/sessions
  persist check var/sessions --json | jq '.problems[].path'
"""


class StoreFailure(click.ClickException):
    """A refusal of the store: its message, without a traceback, and exit status 3."""

    exit_code = STORE_ERROR


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn a `PersistError` or `OSError` into a `StoreFailure`, and a closed pipe into the exit status of SIGPIPE."""
    tolerate_any_terminal()
    try:
        yield
    except BrokenPipeError:
        # The reader has seen enough (`persist ls … | head`). Else Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(ENDED_BY_SIGPIPE) from None
    except (PersistError, OSError) as error:
        raise StoreFailure(printable(str(error), keep="\n")) from error


class StoreGroup(click.Group):
    """Commands whose `PersistError` or `OSError` becomes a message."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with errors_as_messages():
            return super().invoke(ctx)


def _open_store(_ctx: click.Context, _argument: click.Parameter, path: Path) -> Store:
    """Open a store that is there already: `Store` would make its directory, and looking at one must never do that."""
    if not path.is_dir():
        raise click.BadParameter(f"{printable(str(path))} is not a directory.")
    if not (path / LEASES).is_dir() and not any(path.glob("*.json")):
        raise click.BadParameter(
            f"{printable(str(path))} is not a store: it has neither sessions (*.json) nor {LEASES}."
        )
    return Store(path, create=False)


store_argument = click.argument("store", type=click.Path(path_type=Path), callback=_open_store)
session_argument = click.argument("session_id", metavar="ID")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(cls=StoreGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="persist")
def persist() -> None:
    """Look at a store of chat sessions, and mend it."""


# --- looking ---


@dataclass(frozen=True, slots=True)
class Entry:
    """A session in the list. `stream` is "none", "live", "stale", or "unknown" if a session could not be asked."""

    id: str
    title: str | None = None
    revision: int | None = None
    messages: int | None = None
    updated_at: str | None = None
    stream: str = "none"
    error: str | None = None

    def row(self) -> tuple[object, ...]:
        if self.error is not None:
            return self.id, f"UNREADABLE: {self.error}", "", "", "", ""
        return self.id, _clipped(self.title or ""), self.revision, self.messages, self.updated_at, self.stream


@persist.command(epilog="Example: persist ls var/sessions --json | jq -r '.[] | select(.stream == \"stale\") | .id'")
@store_argument
@json_option
@click.pass_context
def ls(ctx: click.Context, store: Store, as_json: bool) -> None:
    """List the sessions.

    Each with its stream: none, live, stale (its process is dead), or unknown (its lock was not to be had). A session
    that cannot be read is shown with its error, and the exit status is 1. Damage among the messages is found by
    `check`.
    """
    entries = [entry for session_id in store.ids() if (entry := _entry(store, session_id)) is not None]
    if as_json:
        print_json([asdict(entry) for entry in entries])
    else:
        print_table(("id", "title", "revision", "messages", "updated", "stream"), [entry.row() for entry in entries])
    if any(entry.error for entry in entries):
        ctx.exit(PROBLEMS_FOUND)


def _clipped(title: str) -> str:
    return title if len(title) <= _TITLE_SHOWN else f"{title[: _TITLE_SHOWN - 1]}…"


def _entry(store: Store, session_id: str) -> Entry | None:
    try:
        head = store.head(session_id)
    except SessionNotFound:
        return None
    except (PersistError, OSError) as error:
        return Entry(session_id, error=str(error))
    # A title that is too large for a head is not shown.
    title = dict(head.fields).get("title")
    return Entry(
        session_id,
        title if isinstance(title, str) else None,
        head.revision,
        head.counts.get("messages", 0),
        _time(head.updated_at),
        "none" if head.active_stream_id is None else _state(store, session_id),
    )


def _state(store: Store, session_id: str) -> str:
    """How it stands with a session's stream now; it may have ended since."""
    try:
        info = store.stream(session_id)
    except (PersistError, OSError):
        # A locked session must not hide the others, and what is not known is not guessed.
        return "unknown"
    if info is None:
        return "none"
    return "live" if info.is_live else "stale"


@persist.command(epilog="Example: persist show var/sessions s-42 --json | jq .data.messages[-1]")
@store_argument
@session_argument
@json_option
def show(store: Store, session_id: str, as_json: bool) -> None:
    """Print a conversation. Control characters in it are escaped."""
    session = store.load(session_id)
    facts = {"revision": session.revision, "created_at": session.created_at.isoformat()}
    facts |= {"updated_at": session.updated_at.isoformat(), "active_stream_id": session.active_stream_id}
    if as_json:
        print_json({"id": session.id, **facts, "data": session.data})
        return
    out = console()
    title = session.data.get("title")
    out.print(Text(printable(title if isinstance(title, str) else session.id), style="bold"))
    for name, value in facts.items():
        out.print(Text(f"{name}: {printable(str(value))}", style="dim"))
    messages = session.data.get("messages")
    for message in messages if isinstance(messages, list) else []:
        out.print(_message(message))


def _message(message: Any) -> Text:
    if not isinstance(message, dict):
        return Text("\n" + _plain(message))
    text = Text(f"\n{_plain(message.get('role'))}", style="bold")
    text.append(f"  {_plain(message.get('id'))}\n", style="dim not bold")
    text.append(_plain(message.get("content"), keep="\n\t"), style="not bold")
    for key, value in message.items():
        if key not in ("role", "id", "content"):
            text.append(f"\n{printable(key)}: {_plain(value)}", style="dim not bold")
    return text


def _plain(value: Any, *, keep: str = "") -> str:
    if value is None:
        return ""
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), keep=keep)


@persist.command(epilog="Example: persist streams var/sessions")
@store_argument
@json_option
def streams(store: Store, as_json: bool) -> None:
    """List the active streams.

    Each with its owner, and whether it lives. A live stream without a recent commit may hang: `persist` cannot tell,
    and leaves it alone.
    """
    found = store.streams()
    if as_json:
        print_json([asdict(info) | {"last_commit_at": info.last_commit_at.isoformat()} for info in found])
        return
    rows = [
        (info.session_id, info.stream_id, _life(info), info.owner or "unknown", _time(info.last_commit_at))
        for info in found
    ]
    print_table(("session", "stream", "state", "owner", "last commit"), rows)


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _life(info: StreamInfo) -> str:
    if not info.is_live:
        return "stale"
    return "live, asked to end" if info.is_cancelled else "live"


@persist.command(epilog="Example: persist check var/sessions || mail -s 'damaged sessions' ops")
@store_argument
@json_option
@click.pass_context
def check(ctx: click.Context, store: Store, as_json: bool) -> None:
    """Name what is damaged, stale or left over.

    Reads every session whole, and changes none. What looks wrong is judged under its session's lock, so a server that
    is running is no problem. If there is anything wrong, the exit status is 1. Files that are not of persist are named,
    and are no problem either.
    """
    found = store.check()
    foreign = [each for each in found if each.kind == "foreign"]
    problems = [each for each in found if each.kind != "foreign"]
    if as_json:
        shown = {"problems": problems, "foreign": foreign}
        print_json({key: [asdict(each) | {"path": str(each.path)} for each in those] for key, those in shown.items()})
        ctx.exit(PROBLEMS_FOUND if problems else 0)
    if problems:
        print_table(("session", "problem", "what"), [(p.session_id, p.kind, p.message) for p in problems])
    else:
        click.echo(f"{len(store.ids())} sessions: no problem found.")
    for each in foreign:
        click.echo(f"foreign: {printable(each.message)}")
    if problems:
        ctx.exit(PROBLEMS_FOUND)


# --- mending ---


@persist.command("clear-stale", epilog="Example: persist clear-stale var/sessions --every-session")
@store_argument
@click.option(
    "--every-session", is_flag=True, help="Look into all sessions, also for streams that another program has left."
)
@json_option
@click.pass_context
def clear_stale(ctx: click.Context, store: Store, every_session: bool, as_json: bool) -> None:
    """Clear the streams whose process is dead.

    Prompt and partial answer are kept; live streams are left alone. Sessions that cannot be looked at are named, and
    the exit status is 1.
    """
    sweep = store.clear_stale_streams(every_session=every_session)
    cleared, failures = sweep.cleared, sweep.failures
    if as_json:
        reasons = {session_id: str(error) for session_id, error in failures.items()}
        print_json({"cleared": [asdict(each) for each in cleared], "failures": reasons})
    else:
        if cleared:
            print_table(("session", "cleared stream"), [(each.session_id, each.stream_id) for each in cleared])
        else:
            click.echo(
                "No dead stream found." + ("" if every_session else " Those of other programs: --every-session.")
            )
        for error in failures.values():
            click.echo(f"Error: {printable(str(error))}", err=True)
    if failures:
        ctx.exit(PROBLEMS_FOUND)


@persist.command(epilog="Example: persist compact var/sessions s-42")
@store_argument
@session_argument
@json_option
def compact(store: Store, session_id: str, as_json: bool) -> None:
    """Fold a session's journal into its document.

    Then the file alone is the session, until its next commit: do it before you edit or copy it.
    """
    was_folded = store.compact(session_id, alone=True)
    if as_json:
        print_json({"id": session_id, "was_folded": was_folded})
    else:
        done = "the journal was folded" if was_folded else "there was nothing to fold"
        click.echo(f"{printable(session_id)}: {done}.")


@persist.command(epilog="Example: persist accept var/sessions s-42")
@store_argument
@session_argument
@click.option("--drop-journal", is_flag=True, help="Give the commits in the journal up; it is kept as *.damaged.")
@json_option
def accept(store: Store, session_id: str, drop_journal: bool, as_json: bool) -> None:
    """Take a document that was edited by hand.

    It gets new checksums. One that is sound is left alone. Of a journal that cannot be taken whole, a copy is kept.
    """
    trouble = _trouble(store, session_id)
    kept_before = _damaged_journals(store, session_id)
    session = store.accept(session_id, drop_journal=drop_journal)
    kept = sorted(_damaged_journals(store, session_id) - kept_before)
    if as_json:
        print_json({"id": session.id, "revision": session.revision, "was_sound": trouble is None})
        return
    shown = printable(session.id)
    if trouble is None and not drop_journal:
        click.echo(f"{shown} is sound, at revision {session.revision}: there was nothing to accept.")
        return
    wrong = "Nothing was wrong." if trouble is None else f"What was wrong: {trouble.reason}"
    click.echo(f"{shown} is accepted at revision {session.revision}. {wrong}")
    for path in kept:
        what = "Its journal was given up" if drop_journal else "Not all of its journal could be taken"
        click.echo(f"{what}; a copy is kept in {path}.")


def _damaged_journals(store: Store, session_id: str) -> set[Path]:
    names = (path.name for path in store.path.iterdir())
    mine = {name for name in names if (found := journal_of(name, copies=True)) and found[0] == name_of(session_id)}
    return {store.path / name for name in mine if journal_of(name) is None}


def _trouble(store: Store, session_id: str) -> CorruptSession | None:
    try:
        store.load(session_id)
    except CorruptSession as error:
        return error
    return None
