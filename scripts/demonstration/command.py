"""The command `scripts/run`: it runs the four parts one after the other, and prints the table of each."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from demonstration import crowd, killed, one_more, orphan
from demonstration.part import OURS, Part, Progress
from persist.cli.output import print_json

BROKEN = 1
PARTS: tuple[Callable[[Path, Progress], Part], ...] = (crowd.run, orphan.run, killed.run, one_more.run)
_NAME_WIDTH, _COLUMN_WIDTH = 42, 20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="A new or empty directory for the files; by default one in /var/tmp, because /tmp may be no disk.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def run(ctx: click.Context, directory: Path | None, as_json: bool) -> None:
    """Show what happens to conversations in JSON files, and what persist does instead.

    Each of the four parts runs real code of both kinds. The command takes about 20 seconds. The exit status is 1 if
    anything that persist promises did not hold. The files stay, so that you can look at them.
    """
    directory = _empty_directory(directory)
    started, parts = time.monotonic(), list[Part]()
    for number, part in enumerate(PARTS, 1):
        with _progress_line(number) as progress:
            parts.append(part(directory, progress))
        if not as_json:
            _print_part(number, parts[-1])
    took_s = time.monotonic() - started
    broken = [f"{number}: {what}" for number, part in enumerate(parts, 1) for what in part.broken]
    if as_json:
        facts = {"held": not broken, "seconds": round(took_s, 1), "directory": str(directory)}
        print_json({**facts, "parts": [asdict(part) for part in parts]})
    else:
        _print_end(directory, broken, took_s)
    if broken:
        ctx.exit(BROKEN)


def _empty_directory(directory: Path | None) -> Path:
    if directory is None:
        disk = Path("/var/tmp")
        return Path(tempfile.mkdtemp(prefix="persist-demonstration-", dir=disk if disk.is_dir() else None))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise click.UsageError(f"--directory: {directory} must be new, or an empty directory.")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def _progress_line(number: int) -> Iterator[Progress]:
    """Show on the terminal how far a part is. Remove the line at the end of the part."""

    def show(share: float) -> None:
        if sys.stderr.isatty():
            click.echo(f"\rpart {number} of {len(PARTS)}: {share:4.0%}", nl=False, err=True)

    show(0.0)
    try:
        yield show
    finally:
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", nl=False, err=True)


def _print_part(number: int, part: Part) -> None:
    click.secho(f"{number}. {part.title}", bold=True)
    click.echo(" " * _NAME_WIDTH + "".join(f"{way:>{_COLUMN_WIDTH}}" for way in part.ways))
    for what, values in part.rows.items():
        line = f"   {what:<{_NAME_WIDTH - 3}}"
        for way, value in zip(part.ways, values, strict=True):
            color = ("red" if part.broken else "green") if way == OURS else None
            line += click.style(f"{value:>{_COLUMN_WIDTH}}", fg=color)
        click.echo(line)
    click.echo()


def _print_end(directory: Path, broken: list[str], took_s: float) -> None:
    for what in broken:
        click.secho(f"persist did not hold in part {what}", fg="red")
    if not broken:
        click.secho(f"persist lost nothing in all {len(PARTS)} parts ({took_s:.0f} s).", fg="green")
    document = directory / "persist" / f"{killed.SESSION}.json"
    click.echo("The conversations are plain JSON. Look at one:")
    if shutil.which("jq"):
        click.echo(f"   jq '.messages[:4]' {document}")
    click.echo(f"   .venv/bin/persist show {document.parent} {killed.SESSION}")
    click.echo(f"Then remove them: rm -r {directory}")
