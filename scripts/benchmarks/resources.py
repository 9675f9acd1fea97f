"""Memory, bytes and the first append: figures that only a process that has done nothing else can show.

Run as ``python -m benchmarks.resources CHECK STORE SECONDS``, it prints its figures as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tables import Findings, Table, Target, at_most, shown
from benchmarks.workload import SESSION, conversation, new_message, open_store

MEBIBYTE = 1 << 20
SCRIPTS = Path(__file__).resolve().parents[1]
WARM_APPENDS = 100
# So many that folds are among them, because each fold rewrites the document. With fewer, the mean says nothing.
COUNTED_APPENDS = 10_000
COUNTING_S = 60.0
PEEK_DEADLINE_S = 300.0


def main() -> None:
    """In a fresh process: make one check and print its figures."""
    check, directory, seconds = sys.argv[1:]
    found = {"memory": memory, "written": written}[check](Path(directory), float(seconds))
    print(json.dumps(found))


def memory(directory: Path, limit_s: float) -> dict[str, float]:
    """Append to the large session, and return the times and the memory of that.

    The memory is counted above that of a process that has only appended to a small session.
    """
    store = open_store(directory)
    store.append("small", "messages", new_message())
    idle = _resident_bytes()
    first_s = _append_s(store)
    after_first = _resident_bytes()
    warm: list[float] = []
    end = time.monotonic() + limit_s
    while len(warm) < WARM_APPENDS and time.monotonic() < end:
        warm.append(_append_s(store))
    return {
        "first_s": first_s,
        "warm_s": median(warm),
        "appends": len(warm),
        "first_bytes": after_first - idle,
        "warm_bytes": _resident_bytes() - idle,
        "peak_bytes": _peak_bytes() - idle,
    }


def written(directory: Path, limit_s: float) -> dict[str, float]:
    """Append many messages of 400 bytes, and count the bytes that were handed to the kernel for them."""
    store = open_store(directory)
    end, count, before = time.monotonic() + limit_s, 0, _bytes_written()
    while count < COUNTED_APPENDS and time.monotonic() < end:
        _append_s(store)
        count += 1
    return {"appends": count, "bytes": (_bytes_written() - before) / count}


def _append_s(store: Any) -> float:
    # The id is of this process alone.
    message = new_message() | {"id": f"{os.getpid()}-{time.monotonic_ns()}"}
    started = time.perf_counter()
    store.append(SESSION, "messages", message)
    return time.perf_counter() - started


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _bytes_written() -> int:
    return int(Path("/proc/self/io").read_text().partition("wchar:")[2].split()[0])


def measured(check: str, directory: Path, messages: int, limit_s: float) -> dict[str, float]:
    """Prepare a store, and make a check of it in a fresh process."""
    store = open_store(directory)
    store.create("small", conversation(1))
    store.create(SESSION, conversation(messages))
    command = [sys.executable, "-m", "benchmarks.resources", check, str(directory), str(limit_s)]
    done = subprocess.run(command, cwd=SCRIPTS, check=True, capture_output=True, text=True, timeout=PEEK_DEADLINE_S)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def findings(directory: Path, sizes: tuple[int, ...], limit_s: float) -> Findings:
    """Measure memory and the first append at each size, and the bytes of an append at 10,000 messages."""
    found = {size: measured("memory", directory / f"memory-{size}", size, limit_s) for size in sizes}
    io = measured("written", directory / "written", 10_000, COUNTING_S)
    columns = ("first append", "warm", "memory after the first", f"after {WARM_APPENDS} warm", "peak")
    rows = [_row(size, each) for size, each in found.items()]
    average = f"{io['bytes']:,.0f} bytes, over {io['appends']:,.0f} of {COUNTED_APPENDS:,} appends."
    notes = [
        "Memory above that of an idle process. First: of a process that has not seen the session.",
        f"Written for an append of 400 bytes at 10,000 messages: {average}",
    ]
    notes += [
        f"Cut off after {limit_s:.0f} s: {each['appends']:.0f} warm appends at {size:,} messages."
        for size, each in found.items()
        if each["appends"] < WARM_APPENDS
    ]
    return Findings([Table("store.append() in a fresh process", columns, rows, notes)], _targets(found, io))


def _row(size: int, found: dict[str, float]) -> tuple[str, ...]:
    sizes = (f"{found[name] / MEBIBYTE:.1f} MiB" for name in ("first_bytes", "warm_bytes", "peak_bytes"))
    return (f"{size:,} messages", shown(found["first_s"]), shown(found["warm_s"]), *sizes)


def _targets(found: dict[int, dict[str, float]], io: dict[str, float]) -> list[Target]:
    largest = max(found)
    kilobytes = io["bytes"] / 1e3 if io["appends"] == COUNTED_APPENDS else None
    return [
        at_most(f"memory of a warm append() at {largest:,} messages", 10, found[largest]["warm_bytes"] / 1e6, "MB"),
        at_most("bytes written for an append of 400 bytes at 10,000, folds included", 3, kilobytes, "KB"),
    ]


if __name__ == "__main__":
    main()
