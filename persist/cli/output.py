"""The output of the commands: tables on a terminal, plain lines for pipes, JSON for programs.

Documents hold what strangers wrote. Nothing of it may steer the terminal, so every text passes through `printable`.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Marks that reorder the text around them: a title could pass for another one. Joiners (Cf, too) are kept: emoji need
# them.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


def printable(text: str, *, keep: str = "") -> str:
    r"""Escape what steers a terminal (control characters, reordering marks) and what no terminal can show (surrogates).

    >>> printable("a\x1b[31mb\n", keep="\n")
    'a\\x1b[31mb\n'
    """
    return "".join(c if c in keep or _is_harmless(c) else _escaped(c) for c in text)


def _is_harmless(character: str) -> bool:
    return unicodedata.category(character) not in _UNPRINTABLE and character not in _REORDERING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def console() -> Console:
    """A console on the standard output that prints text as it is: no markup, no highlighting,
    no wrapping of its own.
    """
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def tolerate_any_terminal() -> None:
    """Let a character that the output's encoding does not know be printed as an escape, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print a value as JSON in ASCII."""
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on a terminal; elsewhere a line a row, its cells parted by tabs, with a heading."""
    out = console()
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not out.is_terminal:
        for line in [list(columns), *cells]:
            click.echo("\t".join(line))
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)
