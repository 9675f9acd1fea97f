"""Plots, as PNG and SVG: an append and a load against the size, and several processes at once."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import ours, peers
from benchmarks.contest import ALL, DECODE, LOAD_FRESH, Costs
from benchmarks.processes import CROWDS, Crowd

Line = dict[int, float]


def draw(directory: Path, costs: list[Costs], crowds: list[Crowd]) -> list[Path]:
    """Draw all plots into a directory, and return the files. Draw none without matplotlib."""
    # The files that matplotlib caches stay in the environment.
    os.environ.setdefault("MPLCONFIGDIR", str(Path(sys.prefix) / "matplotlib"))
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        print(f"Skipped: the plots: {error}")
        return []
    verbs = {kind.name for kind in ours.VERBS} | {LOAD_FRESH}
    appends = {name: line for name, line in _lines(costs, "appends").items() if name not in verbs}
    loads = {name: line for name, line in _lines(costs, "loads").items() if name not in verbs}
    figures = {
        "append": _against_size(pyplot, appends, peers.LIMIT, "One message appended, ms"),
        "load": _against_size(pyplot, loads, DECODE, "The whole conversation loaded, ms"),
        "processes": _bars(pyplot, crowds),
    }
    return [path for name, figure in figures.items() for path in _saved(figure, directory / name)]


def _lines(costs: list[Costs], kind: str) -> dict[str, Line]:
    found: dict[str, Line] = {}
    for at in costs:
        for name, seconds in getattr(at, kind).items():
            found.setdefault(name, {})[at.messages] = seconds
    return found


def _against_size(pyplot: Any, lines: dict[str, Line], limit: str, title: str) -> Any:
    figure, axes = pyplot.subplots(figsize=(11, 6.5), layout="constrained")
    durable = {kind.name for kind in ALL if kind.durable == peers.YES}
    colours = pyplot.get_cmap("tab20").colors
    # The lines come in the order of their last points, so that the legend has the order of the lines' ends.
    for number, (name, line) in enumerate(sorted(lines.items(), key=lambda item: -list(item[1].values())[-1])):
        style: dict[str, Any] = {"color": colours[number % len(colours)], "marker": "o", "markersize": 4}
        style["linestyle"] = "-" if name in durable or "load" in title.lower() else ":"
        if name == limit:
            style |= {"color": "black", "linestyle": "--", "marker": ""}
        elif name.startswith("persist"):
            style |= {"linewidth": 3, "marker": "s", "markersize": 7}
        axes.plot(list(line), [seconds * 1e3 for seconds in line.values()], label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="messages of 430 bytes in the conversation", title=title)
    if limit == peers.LIMIT:
        axes.text(0.01, 0.98, "dotted: an append may be lost in a power cut", transform=axes.transAxes, va="top")
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def _bars(pyplot: Any, crowds: list[Crowd]) -> Any:
    most = max(crowd.processes for crowd in crowds)
    at = {crowd.name: crowd for crowd in crowds if crowd.processes == most}
    names = [name for name in CROWDS if name in at][::-1]
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    colours = ["tab:blue" if "persist" in name else "black" if "write +" in name else "tab:gray" for name in names]
    bars = axes.barh(names, [at[name].rate for name in names], color=colours)
    labels = [_label(at[name]) for name in names]
    axes.bar_label(bars, labels=labels)
    axes.margins(x=0.5)
    axes.set(xlabel="durable commits a second, in all", title=f"{most} processes at once")
    return figure


def _label(crowd: Crowd) -> str:
    return f" {crowd.rate:,.0f}/s, slowest/fastest {crowd.fairness:.2f}, p99 {crowd.p99_s * 1e3:.0f} ms"


def _saved(figure: Any, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for each in paths:
        figure.savefig(each, dpi=150)
    return paths
