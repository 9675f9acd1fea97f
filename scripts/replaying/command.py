"""The command `scripts/replay`: the main job on real conversations, with its progress bar and its table."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from harness.postgres import databases
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from persist.cli.commands import errors_as_messages
from persist.cli.output import console, print_json, printable
from replaying import conversations, outcome
from replaying.conversations import BadTranscript, Conversation
from replaying.outcome import Outcome
from replaying.supervise import Plan, Progress

LOSS = 1
_FINDINGS_SHOWN = 50


class StoreCommand(click.Command):
    """A command whose `PersistError` or `OSError` becomes a message."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with errors_as_messages():
            return super().invoke(ctx)


@click.command(cls=StoreCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("transcripts", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--workers", type=click.IntRange(1, 256), default=4, show_default=True, help="Server processes.")
@click.option(
    "--kills", type=click.IntRange(0), default=0, show_default=True, help="Workers to kill in mid-turn (SIGKILL)."
)
@click.option("--store", type=click.Path(path_type=Path), help="A new or empty directory; by default a temporary one.")
@click.option(
    "--postgres",
    metavar="URL",
    is_flag=False,
    flag_value="",
    help="Play into PostgreSQL: a scratch server, or a new database on the server of a URL.",
)
@click.option("--seed", type=int, help="Repeat the random choices of another run (not its timing).")
@click.option(
    "--timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds without a sign of life after which a worker, or the store, counts as stuck.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def replay(
    ctx: click.Context,
    transcripts: Path | None,
    workers: int,
    kills: int,
    store: Path | None,
    postgres: str | None,
    seed: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Play conversations, kill servers, compare.

    The conversations are played as live turns, through several server processes, into one store. Some of these
    processes are killed in mid-turn and replaced. At the end every session is compared with its transcript.

    TRANSCRIPTS is a file, or a directory of *.json files, each with
    {"title": ..., "messages": [{"role": ..., "content": ...}, ...]}. Without it the sample conversations are played.
    If there are more kills than the conversations allow, they are played again, in rounds.

    The exit status is 1 if anything is lost, doubled, changed or stuck, or if a process failed.

    \b
    Examples:
      scripts/replay
      scripts/replay --workers 4 --kills 20
      scripts/replay my/transcripts --kills 500 --store /var/tmp/replay
      scripts/replay --kills 500 --postgres
    """
    if store is not None and postgres is not None:
        raise click.UsageError("--store names a directory, and --postgres plays into a server.")
    played = _conversations(transcripts)
    if kills and not any(conversation.turns for conversation in played):
        raise click.UsageError(
            "--kills needs a conversation with a user message: workers are killed in the middle of a turn."
        )
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    directory = _empty_directory(store)
    try:
        with ExitStack() as stack:
            place = directory if postgres is None else stack.enter_context(databases(postgres))()
            stack.enter_context(_ended_by_signals())
            on_progress = stack.enter_context(_progress_bar())
            result = outcome.replay(Plan(played, place, workers, kills, seed, timeout_s), on_progress)
    except KeyboardInterrupt:
        if store is None:
            shutil.rmtree(directory)
        raise click.ClickException("Interrupted; nothing was compared.") from None
    is_kept = store is not None or (postgres is None and not result.is_clean)
    if not is_kept:
        shutil.rmtree(directory)
    _print(result, directory if is_kept else None, seed, as_json)
    if not result.is_clean:
        ctx.exit(LOSS)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end a replay as Ctrl-C does, with no process and no temporary store left."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _conversations(transcripts: Path | None) -> list[Conversation]:
    try:
        return conversations.samples() if transcripts is None else conversations.read(transcripts)
    except BadTranscript as error:
        raise click.UsageError(printable(str(error))) from None


def _empty_directory(store: Path | None) -> Path:
    if store is None:
        return Path(tempfile.mkdtemp(prefix="persist-replay-"))
    if store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise click.UsageError(f"--store: {printable(str(store))} must be new, or an empty directory.")
    return store


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("turns"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            description = f"round {progress.round_number}, {progress.kills} killed"
            bar.update(task, description=description, completed=progress.turns_done, total=progress.turns)

        yield show


def _print(result: Outcome, directory: Path | None, seed: int, as_json: bool) -> None:
    if as_json:
        verdict = {"is_clean": result.is_clean, "lost": result.lost, "doubled": result.doubled}
        print_json({**verdict, **asdict(result), "seed": seed, "store": None if directory is None else str(directory)})
        return
    _print_figures(f"replay, seed {seed}", _figures(result))
    for finding in result.findings[:_FINDINGS_SHOWN]:
        click.echo(f"{finding.kind}: session {finding.session_id}: {printable(finding.what)}")
    if len(result.findings) > _FINDINGS_SHOWN:
        click.echo(f"and {len(result.findings) - _FINDINGS_SHOWN} findings more (see --json)")
    for failure in result.failures:
        click.echo(printable(failure, keep="\n"), err=True)
    if not result.is_clean and directory is not None:
        click.echo(f"The store is kept for a look: {directory}")


def _figures(result: Outcome) -> list[tuple[str, str]]:
    counted = {
        "rounds": result.rounds,
        "sessions": result.sessions,
        "turns": result.turns,
        "messages": result.messages,
        "commits": result.commits,
    }
    measured = {
        "commits/s": f"{result.commits_per_s:,.0f}",
        "p50 of a commit": f"{result.commit_p50_ms:.2f} ms",
        "p99 of a commit": f"{result.commit_p99_ms:.2f} ms",
    }
    survived = {
        "kills survived": result.kills,
        "stale streams cleared": result.stale_cleared,
        "conflicts merged": result.merged,
        "conflicts refused and redone": result.conflicts,
        "sessions met busy": result.busy,
        "lost": result.lost,
        "doubled": result.doubled,
        "other findings": len(result.findings) - result.lost - result.doubled,
        "failed processes": len(result.failures),
    }
    figures = [(name, f"{count:,}") for name, count in counted.items()]
    return [*figures, *measured.items(), *((name, f"{count:,}") for name, count in survived.items())]


def _print_figures(title: str, figures: Sequence[tuple[str, str]]) -> None:
    """Print named figures below each other."""
    out = console()
    if not out.is_terminal:
        width = max(len(name) for name, _ in figures)
        click.echo(title)
        for name, value in figures:
            click.echo(f"  {name:<{width}}  {value:>12}")
        return
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in figures:
        table.add_row(name, value)
    Console().print(table)
