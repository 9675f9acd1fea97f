"""The commands that look at a store and mend it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from persist import __version__, engines, maintenance, turn
from persist.backup import Backup, backing_up
from persist.cli.output import (
    Style,
    forget_output,
    json_list,
    json_record,
    json_value,
    page,
    print_json,
    print_pieces,
    print_table,
    printable,
    styles,
    tolerate_any_terminal,
)
from persist.cli.progress import ENDED_BY_SIGINT, Watched
from persist.copying import Copy, comparing, copying
from persist.errors import CorruptSession, InvalidArgument, PersistError, SessionNotFound
from persist.json_codec import BYTE_ORDER_MARK, StrictError, Undecodable, decode, decode_strict
from persist.storage.cache import Committed
from persist.storage.content import HEADER, Items
from persist.storage.content import decode as decode_value
from persist.storage.directory import mislabelled
from persist.storage.layout import journal_of, name_of
from persist.store import ClearedStream, Store
from persist.streams import StreamInfo, active_in

PROBLEMS_FOUND = 1
STORE_ERROR = 3
#: The key of a command's exit status in the context's `meta`. The status holds also if the reader of the output leaves
#: before the end.
_STATUS = "persist.status"
_TITLE_SHOWN = 60
#: So many sessions of one kind are named.
_MOST_NAMED = 10
#: A long text is made printable in pieces of this length.
_PIECE_CHARACTERS = 64 * 1024

_EPILOG = """\b
Exit status:
  0  all is well
  1  problems were found: damaged sessions, left-overs
  2  the command line is wrong
  3  the store refused (the reason is on the standard error)
  130  Ctrl-C: the work done so far is kept

\b
Examples:
  persist ls var/sessions
  persist show var/sessions s-42
  persist clear-stale var/sessions
  persist check var/sessions --json | jq '.problems[].path'
  persist backup var/sessions /backup/sessions
  persist ls 'postgresql://chat@db/chats?schema=persist'
"""


class StoreFailure(click.ClickException):
    """A refusal by the store. It ends with its message, without a traceback, and with exit status 3."""

    exit_code = STORE_ERROR


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn a `PersistError` or `OSError` into a `StoreFailure`, and Ctrl-C into an exit status."""
    tolerate_any_terminal()
    try:
        yield
    except BrokenPipeError:
        # The reader has seen enough (`persist ls … | head`), and that is no failure.
        forget_output()
        raise SystemExit(click.get_current_context().meta.get(_STATUS, 0)) from None
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        raise SystemExit(ENDED_BY_SIGINT) from None
    except click.ClickException as error:
        # A URL in the wrong place is shown as any other word.
        error.message = engines.without_passwords(error.message)  # type: ignore[misc]
        raise
    except (PersistError, OSError) as error:
        raise StoreFailure(printable(engines.without_passwords(str(error)), keep="\n")) from error


class StoreGroup(click.Group):
    """Commands whose `PersistError` or `OSError` becomes a message."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            with errors_as_messages():
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            if error.option_name.startswith("--"):
                raise
            told = f"{error.message} Put -- before an id that begins with a dash."
            raise click.NoSuchOption(error.option_name, told, ctx=error.ctx) from None


def _leave(ctx: click.Context) -> None:
    """End a command with the exit status that it has come to."""
    ctx.exit(ctx.meta.get(_STATUS, 0))


def _leave_stopped(ctx: click.Context, steps: Watched[Any], further: str) -> None:
    steps.tell_stop(further)
    ctx.exit(ENDED_BY_SIGINT)


def _open_store(ctx: click.Context, _argument: click.Parameter, name: str) -> Store:
    """Open a store that exists.

    A look must never make the directory, as `Store` does by default.
    """
    return _opened(ctx, name, engines.options_there)


def _opened(ctx: click.Context, name: str, options_of: Callable[[str], dict[str, Any]]) -> Store:
    try:
        options = options_of(name)
    except InvalidArgument as error:
        raise click.BadParameter(printable(str(error))) from None
    return Store(name, unsafe_filesystem=bool(ctx.find_root().params.get("unsafe_filesystem")), **options)


store_argument = click.argument("store", callback=_open_store)
session_argument = click.argument("session_id", metavar="ID")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(cls=StoreGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="persist")
@click.option("--unsafe-filesystem", is_flag=True, help="Accept any file system, even one where locks do not work.")
def persist(unsafe_filesystem: bool) -> None:
    """Look at a store of chat sessions, and mend it.

    STORE is a directory, or a URL: postgresql://user@host/database?schema=persist. Leave the password to PGPASSWORD or
    ~/.pgpass, because other users of the machine see a command's words.
    """


# --- looking ---


@dataclass(frozen=True, slots=True)
class Entry:
    """A session in the list.

    `stream` is "none", "live", "stale", or "unknown" if the state of the stream could not be read.
    """

    id: str
    title: str | None = None
    revision: int | None = None
    messages: int | None = None
    updated_at: str | None = None
    stream: str = "none"
    error: str | None = None

    def row(self) -> tuple[object, ...]:
        if self.error is not None:
            return self.id, "UNREADABLE: see 'persist check'", "", "", "", ""
        return self.id, _clipped(self.title or ""), self.revision, self.messages, self.updated_at, self.stream


_ENTRY = tuple(each.name for each in fields(Entry))


@persist.command(epilog="Example: persist ls var/sessions --json | jq -r '.[] | select(.stream == \"stale\") | .id'")
@store_argument
@click.option("--recent", is_flag=True, help="List the sessions that were updated last first.")
@click.option("--limit", type=click.IntRange(0), help="List so many sessions at most.")
@json_option
@click.pass_context
def ls(ctx: click.Context, store: Store, recent: bool, limit: int | None, as_json: bool) -> None:
    """List the sessions, in the order of their ids.

    Each row shows the state of the session's stream: none, live, stale (its process is dead), or unknown (its lock
    could not be taken). A session that cannot be read is shown with its error, and the exit status is then 1. `check`
    finds damage among the messages.
    """
    ids: Iterable[str] = (session_id for _, session_id in store._open().engine.recent(None)) if recent else store.ids()
    entries = itertools.islice(_entries(ctx, store, ids), limit)
    if as_json:
        print_pieces(_json_entries(entries))
    else:
        print_table(("id", "title", "revision", "messages", "updated", "stream"), (entry.row() for entry in entries))
    _leave(ctx)


def _entries(ctx: click.Context, store: Store, ids: Iterable[str]) -> Iterator[Entry]:
    for session_id in ids:
        entry = _entry(store, session_id)
        if entry is not None:
            if entry.error is not None:
                ctx.meta[_STATUS] = PROBLEMS_FOUND
            yield entry


def _json_entries(entries: Iterator[Entry]) -> Iterator[str]:
    before = "[\n  "
    for entry in entries:
        yield before + json_record({name: getattr(entry, name) for name in _ENTRY}, 2)
        before = ",\n  "
    yield "\n]\n" if before[0] == "," else "[]\n"


def _clipped(title: str) -> str:
    return title if len(title) <= _TITLE_SHOWN else f"{title[: _TITLE_SHOWN - 1]}…"


def _entry(store: Store, session_id: str) -> Entry | None:
    try:
        # Not a `Head`, because a `Head` decodes all fields. With 50,000 sessions the user would notice that.
        head = store._open().engine.read_head(session_id)
    except SessionNotFound:
        return None
    except (PersistError, OSError) as error:
        return Entry(session_id, error=str(error))
    # A title that is too large for a head is not shown.
    title = decode(head.fields["title"]) if "title" in head.fields else None
    messages = head.counts.get(turn.MESSAGES, 0)
    return Entry(
        session_id,
        title if isinstance(title, str) else None,
        head.header.revision,
        messages if messages is not None else 0,
        _time(head.header.updated_at),
        "none" if active_in(head) is None else _state(store, session_id),
    )


def _state(store: Store, session_id: str) -> str:
    """Return the state of a session's stream now. The stream may have ended since the head was read."""
    try:
        info = store.stream(session_id)
    except (PersistError, OSError):
        # A locked session must not hide the others. The command does not guess a state that it does not know.
        return "unknown"
    if info is None:
        return "none"
    return "live" if info.is_live else "stale"


@persist.command(epilog="Example: persist show var/sessions s-42 --json | jq .data.messages[-1]")
@store_argument
@session_argument
@json_option
def show(store: Store, session_id: str, as_json: bool) -> None:
    """Print a conversation. Control characters in it are escaped.

    On a terminal a pager shows it: $PAGER, or less. A large conversation is printed while it is decoded.
    """
    engine = store._open().engine
    found = engine.read(session_id)
    facts = {
        "revision": found.header.revision,
        "created_at": found.header.created_at.isoformat(),
        "updated_at": found.header.updated_at.isoformat(),
        "active_stream_id": active_in(found.content),
    }
    try:
        named = {"version": found.header.version, **facts}
        page(_json_of_session(session_id, named, found) if as_json else _conversation(session_id, facts, found))
    except Undecodable:
        # The checksums match, but a part of the document is not JSON. The error comes only at that part, after the
        # items before it are printed.
        raise mislabelled(engine.where(session_id), session_id) from None


def _json_of_session(session_id: str, facts: dict[str, Any], found: Committed) -> Iterator[str]:
    """Yield the JSON of a session piece by piece. A list that is kept apart comes item by item."""
    yield "{"
    for name, value in {"id": session_id, **facts}.items():
        yield f"\n  {json.dumps(name)}: {json_value(value, 2)},"
    before = '\n  "data": {'
    for field, content in found.content:
        yield f"{before}\n    {json.dumps(field)}: "
        before = ","
        if isinstance(content, Items):
            yield from json_list(map(decode, content), 4)
        else:
            yield json_value(decode_value(content), 4)
    yield "\n  }\n}\n" if before == "," else f"{before}}}\n}}\n"


def _conversation(session_id: str, facts: dict[str, Any], found: Committed) -> Iterator[str]:
    style = styles()
    title = found.content.fields.get("title")
    shown = None if title is None else decode(title)
    yield style(printable(shown if isinstance(shown, str) else session_id), bold=True) + "\n"
    for name, value in facts.items():
        yield style(f"{name}: {printable(str(value))}", dim=True) + "\n"
    for name, count in found.content.counts.items():
        if count and name != turn.MESSAGES:
            yield style(f"{printable(name)}: {count} items", dim=True) + "\n"
    messages = found.content.apart.get(turn.MESSAGES)
    if isinstance(messages, Items):
        for message in messages:
            yield from _message(decode(message), style)


def _message(message: Any, style: Style) -> Iterator[str]:
    yield "\n"
    if isinstance(message, dict):
        yield style(_plain(message.get("role")), bold=True)
        yield style(f"  {_plain(message.get('id'))}", dim=True) + "\n"
        yield from _pieces(message.get("content"), keep="\n\t")
        for key, value in message.items():
            if key not in ("role", "id", "content"):
                yield style(f"\n{printable(key)}: {_plain(value)}", dim=True)
    else:
        yield from _pieces(message)
    yield "\n"


def _pieces(value: Any, *, keep: str = "") -> Iterator[str]:
    text = _text(value)
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield printable(text[start : start + _PIECE_CHARACTERS], keep=keep)


def _plain(value: Any) -> str:
    return printable(_text(value))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@persist.command(epilog="Example: persist streams var/sessions")
@store_argument
@json_option
def streams(store: Store, as_json: bool) -> None:
    """List the active streams.

    Each row shows the stream's owner, and whether the stream lives. A live stream without a recent commit may hang.
    `persist` cannot tell, and leaves it alone.
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
    """Name everything that is damaged, stale or left over.

    The command reads every session whole, and changes none. It looks at a suspect session again under the session's
    lock, so a running server is no problem. If anything is wrong, the exit status is 1. Files that are not of persist
    are named, but they are no problem.
    """
    steps = Watched(maintenance.checking(store._open()), "checked")
    found = maintenance.in_order(problem for problems in steps for problem in problems)
    foreign = [each for each in found if each.kind == "foreign"]
    problems = [each for each in found if each.kind != "foreign"]
    ctx.meta[_STATUS] = ENDED_BY_SIGINT if steps.was_stopped else PROBLEMS_FOUND if problems else 0
    if as_json:
        shown = {"problems": problems, "foreign": foreign}
        print_json({key: [asdict(each) | {"path": str(each.path)} for each in those] for key, those in shown.items()})
    elif problems:
        print_table(("session", "problem", "what"), [(p.session_id, p.kind, p.message) for p in problems])
    elif not steps.was_stopped:
        click.echo(f"{len(store.ids())} sessions: no problem found.")
    if not as_json:
        print_pieces(f"foreign: {printable(each.message)}\n" for each in foreign)
    if steps.was_stopped:
        _leave_stopped(ctx, steps, "Nothing was changed. Start it again to look at all.")
    _leave(ctx)


# --- copies ---


@persist.command(epilog="Example: persist backup var/sessions /backup/sessions")
@store_argument
@click.argument("dest")
@click.option("--prune", is_flag=True, help="Remove the copies of sessions that are no longer in the store.")
@json_option
@click.pass_context
def backup(ctx: click.Context, store: Store, dest: str, prune: bool, as_json: bool) -> None:
    """Copy all sessions into DEST, while servers go on.

    DEST is a new directory, or an earlier backup of this store. In an earlier backup, only the changes are written.
    Each session is copied whole, under its lock, without a journal. If a session cannot be read, the command names it
    and copies the others, and the exit status is 1. Without --prune, the copies of sessions that are gone from the
    store stay.
    """
    steps = Watched(backing_up(store._open(), dest, prune=prune), "copied or found unchanged")
    done = Backup(Path(dest))
    for each in steps:
        done.add(each)
    failures = done.failures
    ctx.meta[_STATUS] = ENDED_BY_SIGINT if steps.was_stopped else PROBLEMS_FOUND if failures else 0
    if as_json:
        reasons = {session_id: str(error) for session_id, error in failures.items()}
        print_json(asdict(dataclasses.replace(done, failures={})) | {"path": str(done.path), "failures": reasons})
    else:
        shown = f"{len(done.copied):,} sessions copied, {len(done.unchanged):,} unchanged"
        shown += f", {len(done.removed):,} removed" if done.removed else ""
        shown += f", {len(done.gone):,} gone from the store, whose copies stay (--prune)" if done.gone else ""
        click.echo(f"{shown}.")
        for error in failures.values():
            click.echo(f"Error: {printable(str(error))}", err=True)
    if steps.was_stopped:
        _leave_stopped(ctx, steps, "The finished copies are whole. Start it again for the rest.")
    _leave(ctx)


def _open_destination(ctx: click.Context, _argument: click.Parameter, name: str) -> Store:
    """Open a store that may be new. A directory with other files is no store."""
    return _opened(ctx, name, engines.options_to_write)


@persist.command(epilog="Example: persist copy var/sessions 'postgresql://chat@db/chats'")
@click.argument("source", metavar="SRC", callback=_open_store)
@click.argument("destination", metavar="DST", callback=_open_destination)
@click.option("--prune", is_flag=True, help="Remove the copies of sessions that are no longer in SRC.")
@json_option
@click.pass_context
def copy(ctx: click.Context, source: Store, destination: Store, prune: bool, as_json: bool) -> None:
    """Copy all sessions of SRC into DST, and compare them.

    Each is a directory or a URL. DST may be new. Run it while the servers go on, and once more with the servers
    stopped: then it copies what has changed. It can be stopped and started again at any time. A session with a live
    stream is named, and left for the next run. A session that DST has on its own, or that was changed there, is named
    and left alone. The exit status is 0 only if DST has every session of SRC, with equal text.
    """
    engine, other = source._open().engine, destination._open().engine
    done = Copy()
    steps = Watched(copying(engine, other, prune=prune), "copied or found unchanged")
    for each in steps:
        done.add(each)
    if not steps.was_stopped:
        steps = Watched(comparing(engine, other, leave_out=done.failures.keys()), "compared")
        for each in steps:
            done.add(each)
    ctx.meta[_STATUS] = ENDED_BY_SIGINT if steps.was_stopped else 0 if done.is_complete else PROBLEMS_FOUND
    if as_json:
        reasons = {session_id: str(error) for session_id, error in done.failures.items()}
        print_json(asdict(dataclasses.replace(done, failures={})) | {"failures": reasons})
    else:
        _tell_copy(done)
    if steps.was_stopped:
        _leave_stopped(ctx, steps, "What is copied stands. Start it again for the rest.")
    _leave(ctx)


def _tell_copy(done: Copy) -> None:
    shown = f"{len(done.copied):,} sessions copied, {len(done.unchanged):,} unchanged"
    shown += f", {len(done.removed):,} removed" if done.removed else ""
    click.echo(f"{shown}. {len(done.equal):,} documents compared with their copies are equal.")
    for session_ids, what in (
        (done.behind, "have changed since they were copied. Copy again, with the servers stopped"),
        (done.gone, "are gone from SRC, and their copies stay. Remove them with --prune"),
        (done.different, "differ from their copies, although the versions are the same. Delete those, and copy again"),
    ):
        if session_ids:
            some = ", ".join(map(printable, session_ids[:_MOST_NAMED])) + (", …" if session_ids[_MOST_NAMED:] else "")
            click.echo(f"{len(session_ids):,} sessions {what}: {some}", err=True)
    for error in done.failures.values():
        click.echo(f"Error: {printable(engines.without_passwords(str(error)))}", err=True)


@persist.command(epilog="Example: persist migrate 'postgresql://chat@db/chats?schema=persist'")
@click.argument("url")
@json_option
def migrate(url: str, as_json: bool) -> None:
    """Make the schema of a store in a database, or bring it up to date.

    Run it before the servers start. Several may run it at once: one migrates, and the others wait for it.
    """
    done = engines.migrate(url)
    if as_json:
        print_json(asdict(done))
        return
    for name in done.ran:
        click.echo(f"{name} is done.")
    told = "" if done.ran else ": there was nothing to do"
    click.echo(f"{printable(done.place)} is at version {done.version}{told}.")


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

    The prompt and the partial answer are kept. Live streams are left alone. If a session cannot be looked at, the
    command names it, and the exit status is 1.
    """
    steps = Watched(store._sweeping(every_session=every_session), "looked at")
    cleared, failures = list[ClearedStream](), dict[str, Exception]()
    for done in steps:
        cleared += done.cleared
        failures |= done.failures
    ctx.meta[_STATUS] = ENDED_BY_SIGINT if steps.was_stopped else PROBLEMS_FOUND if failures else 0
    if as_json:
        reasons = {session_id: str(error) for session_id, error in failures.items()}
        print_json({"cleared": [asdict(each) for each in cleared], "failures": reasons})
    else:
        if cleared:
            print_table(("session", "cleared stream"), [(each.session_id, each.stream_id) for each in cleared])
        elif not steps.was_stopped:
            click.echo(
                "No dead stream found." + ("" if every_session else " Those of other programs: --every-session.")
            )
        for error in failures.values():
            click.echo(f"Error: {printable(str(error))}", err=True)
    if steps.was_stopped:
        _leave_stopped(ctx, steps, f"{len(cleared):,} streams were cleared. Start it again for the rest.")
    _leave(ctx)


@persist.command(epilog="Example: persist compact var/sessions s-42")
@store_argument
@session_argument
@json_option
def compact(store: Store, session_id: str, as_json: bool) -> None:
    """Fold a session's journal into its document.

    After that, the document alone is the session, until the next commit. Do this before you edit or copy the file.
    """
    was_folded = store.compact(session_id, alone=True)
    if as_json:
        print_json({"id": session_id, "was_folded": was_folded})
    else:
        done = "the journal was folded" if was_folded else "there was nothing to fold"
        click.echo(f"{printable(session_id)}: {done}.")


@persist.command(epilog="Example: persist repair var/sessions s-42")
@store_argument
@session_argument
@json_option
def repair(store: Store, session_id: str, as_json: bool) -> None:
    """Answer the tool calls that have no result.

    A turn that broke off between a tool call and its result leaves a conversation that its provider refuses. Each such
    call gets a synthetic result, marked as interrupted. A session whose stream is alive is left alone.
    """
    count = store.repair(session_id)
    if as_json:
        print_json({"id": session_id, "answered": count})
    else:
        click.echo(f"{printable(session_id)}: {count} tool calls answered.")


@persist.command(epilog="Example: persist accept var/sessions s-42")
@store_argument
@click.argument("session_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--drop-journal", is_flag=True, help="Give up the commits in the journal. It is kept as *.damaged.")
@json_option
@click.pass_context
def accept(ctx: click.Context, store: Store, session_ids: tuple[str, ...], drop_journal: bool, as_json: bool) -> None:
    """Accept documents that were edited by hand.

    Each document gets new checksums. A sound document is left alone. If a journal cannot be taken whole, a copy of it
    is kept. If you name several sessions and one cannot be accepted, the command names it and accepts the others, and
    the exit status is 3. With --json, several sessions are printed as a list.
    """
    if len(session_ids) == 1:
        taken = _accept(store, session_ids[0], drop_journal=drop_journal)
        if as_json:
            print_json(taken.as_json())
        else:
            print_pieces(f"{line}\n" for line in taken.lines())
        return
    steps = Watched(_accepting(store, session_ids, drop_journal=drop_journal), "accepted or named")
    shown: list[dict[str, Any]] = []
    for done in steps:
        if isinstance(done, Accepted):
            shown.append(done.as_json())
            if not as_json:
                print_pieces(f"{line}\n" for line in done.lines())
        else:
            shown.append({"id": done[0], "error": str(done[1])})
            ctx.meta[_STATUS] = STORE_ERROR
            click.echo(f"Error: {printable(str(done[1]))}", err=True)
    if as_json:
        print_json(shown)
    if steps.was_stopped:
        _leave_stopped(ctx, steps, "Start it again for the rest: those that are sound are left alone.")
    _leave(ctx)


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted session, and the copies that were kept of its journal."""

    id: str
    revision: int
    trouble: CorruptSession | None
    kept: list[Path]
    drop_journal: bool

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "revision": self.revision, "was_sound": self.trouble is None}

    def lines(self) -> Iterator[str]:
        shown = printable(self.id)
        if self.trouble is None and not self.drop_journal:
            yield f"{shown} is sound, at revision {self.revision}: there was nothing to accept."
            return
        wrong = "Nothing was wrong." if self.trouble is None else f"What was wrong: {self.trouble.reason}"
        yield f"{shown} is accepted at revision {self.revision}. {wrong}"
        for path in self.kept:
            what = "Its journal was given up" if self.drop_journal else "Not all of its journal could be taken"
            yield f"{what}; a copy is kept in {path}."


def _accept(store: Store, session_id: str, *, drop_journal: bool) -> Accepted:
    trouble = _trouble(store, session_id)
    kept_before = _damaged_journals(store, session_id)
    session = store.accept(session_id, drop_journal=drop_journal)
    kept = sorted(_damaged_journals(store, session_id) - kept_before)
    return Accepted(session.id, session.revision, trouble, kept, drop_journal)


def _accepting(
    store: Store, session_ids: tuple[str, ...], *, drop_journal: bool
) -> Iterator[maintenance.Step[Accepted | tuple[str, Exception]]]:
    for done, session_id in enumerate(session_ids, 1):
        found: Accepted | tuple[str, Exception]
        try:
            found = _accept(store, session_id, drop_journal=drop_journal)
        except (PersistError, OSError) as error:
            found = session_id, error
        yield maintenance.Step(done, len(session_ids), found)


@persist.command(epilog="Example: persist replace var/sessions s-42 mended.json")
@store_argument
@session_argument
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--if-version", help="Replace a session that can be read, if it has this version (persist show --json).")
@json_option
def replace(store: Store, session_id: str, file: Path, if_version: str | None, as_json: bool) -> None:
    """Put the JSON object in FILE in place of a session that cannot be read.

    The old content is lost. Copy it first if it may be of use. A session whose stream is alive is left alone.
    The fields of a stream that ran, such as active_stream_id, are left out.
    """
    try:
        data = decode_strict(file.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except StrictError as error:
        raise StoreFailure(f"{printable(str(file))}, byte {error.offset}: {error.reason} Mend it, and retry.") from None
    if type(data) is not dict:
        raise StoreFailure(f"{printable(str(file))} is JSON, but not an object. Give a document.")
    header = data.pop(HEADER, None)
    if type(header) is dict and header.get("journal") is not None:
        raise StoreFailure(
            f"{printable(str(file))} has later commits in a journal. Copy both files back with cp instead."
        )
    # A mended copy may name the stream that ran. It is not taken over.
    for field in turn.IDLE:
        data.pop(field, None)
    session = store.replace(session_id, data, if_version=if_version)
    if as_json:
        print_json({"id": session.id, "revision": session.revision, "version": session.version})
    else:
        click.echo(f"{printable(session.id)} is replaced, at revision {session.revision}.")


@persist.command(epilog="Example: persist delete var/sessions s-42 --force")
@store_argument
@session_argument
@click.option("--force", is_flag=True, help="Also if it is damaged, and also while a live stream owns it.")
@json_option
def delete(store: Store, session_id: str, force: bool, as_json: bool) -> None:
    """Remove a session, with its journal and its events."""
    store.delete(session_id, force=force)
    if as_json:
        print_json({"id": session_id})
    else:
        click.echo(f"{printable(session_id)} is deleted.")


# --- serving ---


@persist.command(epilog="Example: persist serve var/sessions --workers 2 --responder openai")
@click.argument("store", default="var/sessions", metavar="[STORE]")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that serve.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0 takes any free port.")
@click.option("--responder", default="echo", show_default=True, help="Who answers: echo, openai, or module:name.")
@click.option("--origin", "origins", multiple=True, metavar="URL", help="The address in the browser, behind a proxy.")
def serve(store: str, workers: int, host: str, port: int, responder: str, origins: tuple[str, ...]) -> None:
    """Serve the sessions in STORE (var/sessions) as a chat, with a page for the browser. A missing STORE is made.

    Only this machine can reach the server, unless --host says otherwise. Ctrl-C ends it.

    openai asks the endpoint at OPENAI_BASE_URL for the model OPENAI_MODEL, with OPENAI_API_KEY. The server knows no
    users, so keep it on this machine, or put a proxy before it that does.
    """
    try:
        from persist.asgi import safety, serving
    except ImportError as error:
        news = f"serving needs {error.name}: pip install '.[server]', in a checkout of persist"
        raise click.UsageError(news) from None
    settings = serving.Settings(store, responder, origins, serving.is_loopback(host))
    serving.responder_named(responder)
    safety.checked_origins(origins)
    # A store that cannot be used is refused here, once, and not by each worker.
    Store(store).close()
    try:
        listening = serving.listen(host, port)
    except OSError as error:
        raise StoreFailure(f"{printable(host)}:{port} cannot be listened at: {error.strerror or error}.") from None
    if settings.is_local:
        click.echo("Only this machine can reach the server. --host lets others in.", err=True)
    else:
        warning = f"Warning: {printable(host)} can be reached from other machines, and this server knows no users."
        click.secho(f"{warning} Whoever reaches it can read, change and delete every session.", err=True, fg="yellow")
    with listening:
        if not serving.serve(settings, listening, workers, lambda: click.echo(serving.address_of(listening, host))):
            raise StoreFailure("The workers could not be started. Their messages stand above.")


def _damaged_journals(store: Store, session_id: str) -> set[Path]:
    # A store that is no directory has none.
    directory = Path(store.place)
    names = (path.name for path in directory.glob("*"))
    mine = {name for name in names if (found := journal_of(name, copies=True)) and found[0] == name_of(session_id)}
    return {directory / name for name in mine if journal_of(name) is None}


def _trouble(store: Store, session_id: str) -> CorruptSession | None:
    try:
        store.load(session_id)
    except CorruptSession as error:
        return error
    return None
