"""The tables and the targets that are printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Target:
    """A target: the wanted figure and the one that was found. `is_met` is None if the figure could not be measured."""

    what: str
    wanted: str
    found: str
    is_met: bool | None

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "met", False: "MISSED"}[self.is_met]


def at_most(what: str, limit: float, found: float | None, unit: str = "×") -> Target:
    """Return a target that a figure must not exceed. The figure is None if it was not measured."""
    shown = "-" if found is None else f"{found:.2f} {unit}"
    return Target(what, f"≤ {limit:g} {unit}", shown, None if found is None else found <= limit)


def at_least(what: str, limit: float, found: float | None, unit: str = "×") -> Target:
    """Return a target that a figure must reach."""
    shown = "-" if found is None else f"{found:.2f} {unit}"
    return Target(what, f"≥ {limit:g} {unit}", shown, None if found is None else found >= limit)


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the names of the columns after the first, the rows, and the notes below them.

    Figures are flush right. A last column of prose is flush left.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)
    ends_in_prose: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """The tables and the targets of one part of the benchmark."""

    tables: list[Table]
    targets: list[Target] = field(default_factory=list)


def shown(seconds: float) -> str:
    """Return a time as a readable text."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def ratio(value: float, base: float | None) -> str:
    return "" if not base else f"{value / base:.2f} ×"


def compared(title: str, seconds: dict[str, float], base: str) -> Table:
    """Return a table of medians beside one of them."""
    rows = [(name, shown(value), ratio(value, seconds[base])) for name, value in seconds.items()]
    return Table(title, ("median", f"to {base}"), rows)


def print_table(table: Table) -> None:
    lines = [(table.title, *table.columns), *((f"  {first}", *others) for first, *others in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for first, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        if table.ends_in_prose:
            cells[-1] = others[-1]
        print("   ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    for note in table.notes:
        print(f"  {note}")
    print(end="", flush=True)


def print_targets(targets: Iterable[Target]) -> int:
    """Print all targets, and return how many were missed."""
    targets = list(targets)
    print_table(Table("Targets", ("wanted", "found", ""), [(t.what, t.wanted, t.found, t.verdict) for t in targets]))
    missed = sum(target.is_met is False for target in targets)
    print(f"\n{missed} targets missed." if missed else "\nAll targets met.")
    return missed
