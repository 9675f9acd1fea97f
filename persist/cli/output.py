"""The output of the commands: tables on a terminal, plain lines for pipes, JSON for programs.

Documents hold text that strangers wrote. This text must not steer the terminal, so every text passes through
`printable`.

A list of 50,000 sessions and a session of 100 MB are printed in blocks, as they are read. So the first lines come at
once. A reader that has seen enough (`| head`) ends the work.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from persist.errors import PersistError

# Control characters, the separators of lines and paragraphs, and halves of surrogate pairs, which no terminal can show.
# Also marks that reorder the text around them, because they could make one title look like another. Joiners have the
# same category (Cf), but they are kept, because emoji need them.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
#: The size of a printed block. The first block is smaller.
_BLOCK_CHARACTERS = 32 * 1024
#: The longest time that finished text is kept back.
_BLOCK_S = 0.1
#: A table with more rows is not drawn, because rich looks at all of them first.
_MOST_DRAWN = 200
#: The options that `git` gives `less`: leave at once if all fits on the screen, show colours, do not clear the screen.
_LESS = "FRX"


def printable(text: str, *, keep: str = "") -> str:
    r"""Escape characters that steer a terminal (controls, reordering marks) or that no terminal can show (surrogates).

    >>> printable("a\x1b[31mb\n", keep="\n")
    'a\\x1b[31mb\n'
    """
    if text.isprintable():  # Most texts are, and a table of 50,000 sessions has 300,000 of them.
        return text
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def console() -> Console:
    """Return a console on the standard output that prints text as it is: no markup, highlighting or wrapping."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def tolerate_any_terminal() -> None:
    """Let the outputs print an escape for a character that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Discard all further output, because its reader has left. Otherwise Python would complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- text ------------------------------------------------------------------------------------------------------------


def print_pieces(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come, in blocks."""
    for block in _blocks(pieces):
        click.echo(block, nl=False, color=True)


def page(pieces: Iterable[str]) -> None:
    """Show pieces of text in a pager on a terminal. Elsewhere print them as they come."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print_pieces(pieces)
        return
    os.environ.setdefault("LESS", _LESS)
    click.echo_via_pager(_blocks(pieces))


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    waiting, size, since, limit = list[str](), 0, time.monotonic(), 1
    try:
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= limit or time.monotonic() - since > _BLOCK_S:
                yield "".join(waiting)
                waiting.clear()
                size, since, limit = 0, time.monotonic(), _BLOCK_CHARACTERS
    except (PersistError, ValueError):
        # The text that was ready before the error is printed before it.
        yield "".join(waiting)
        raise
    yield "".join(waiting)


#: A function that gives a text a style: ``style(text, bold=True)``.
Style = Callable[..., str]


def styles() -> Style:
    """Return a function that styles a text.

    It leaves the text plain if the output is no terminal, and does not count as one either (FORCE_COLOR).
    """
    out = console()
    return click.style if out.is_terminal and not out.no_color else _plain


def _plain(text: str, **_style: bool) -> str:
    return text


# --- JSON ------------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Print a value as JSON in ASCII."""
    click.echo(json.dumps(value, indent=2))


def json_list(items: Iterable[Any], indent: int = 0) -> Iterator[str]:
    """Yield the JSON of a list piece by piece, as `json.dumps` with ``indent=2`` writes it, without a newline."""
    before = f"[\n{' ' * (indent + 2)}"
    for item in items:
        yield before + json_value(item, indent + 2)
        before = f",\n{' ' * (indent + 2)}"
    yield f"\n{' ' * indent}]" if before[0] == "," else "[]"


def json_value(value: Any, indent: int = 0) -> str:
    """Return the JSON of a value. All lines but the first are indented by `indent` blanks more."""
    text = json.dumps(value, indent=2)
    # A JSON string never holds a newline itself.
    return text.replace("\n", f"\n{' ' * indent}") if indent else text


def json_record(values: Mapping[str, Any], indent: int) -> str:
    """Return the JSON of an object of plain values, as `json_value` does, in a fifth of the time."""
    blanks, lines = "\n" + " " * (indent + 2), []
    for name, value in values.items():
        text = "null" if value is None else encode_basestring_ascii(value) if type(value) is str else json.dumps(value)
        lines.append(f"{blanks}{encode_basestring_ascii(name)}: {text}")
    return f"{{{','.join(lines)}\n{' ' * indent}}}"


# --- tables ----------------------------------------------------------------------------------------------------------


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on a terminal. Elsewhere print a heading and one line for each row, its cells parted by tabs.

    A table with many rows is printed as the rows come. Then the first rows set the widths of the columns.
    """
    cells = ([printable(str(cell)) for cell in row] for row in rows)
    if not console().is_terminal:
        print_pieces("\t".join(line) + "\n" for line in itertools.chain([columns], cells))
        return
    first = list(itertools.islice(cells, _MOST_DRAWN + 1))
    if len(first) <= _MOST_DRAWN:
        _draw(columns, first)
        return
    widths = [max(map(cell_len, column)) for column in zip(columns, *first, strict=True)]
    print_pieces(_padded(line, widths) for line in itertools.chain([columns], first, cells))


def _padded(line: Sequence[str], widths: list[int]) -> str:
    padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
    return "  ".join(padded).rstrip() + "\n"


def _draw(columns: Sequence[str], rows: list[list[str]]) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out = Console()
    with out.capture() as drawn:
        out.print(table)
    # rich does not print the table itself, because it treats a reader that has left as a failure.
    click.echo(drawn.get(), nl=False, color=True)
