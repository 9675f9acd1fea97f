"""The command line of `scripts/mutants`: apply mutants, run their tests, and tell which of them nothing notices."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mutation.catalogue import MUTANTS
from mutation.edits import DoesNotApply
from mutation.mutant import Mutant, mutated_modules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "persist"
PYTHON = ROOT / ".venv" / "bin" / "python"
TIMEOUT_S = 300


def run_tests(package_parent: Path, mutant: Mutant) -> bool:
    """Tell whether the mutant's tests pass on the package under `package_parent`."""
    # -P: the working directory, with the unchanged package, must not come before PYTHONPATH.
    command = [
        str(PYTHON),
        "-P",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *mutant.tests,
        "-k",
        mutant.select,
    ]
    if any(file.startswith("tests/unit/") for file in mutant.tests):
        command.append("--hypothesis-profile=mutants")
    environment = os.environ | {"PYTHONPATH": str(package_parent), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        sys.exit(f"pytest could not run the tests of {mutant.name!r}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def survives(mutant: Mutant) -> bool:
    """Tell whether the tests pass although the mechanism is out."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "persist"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for module, source in mutated_modules(PACKAGE, mutant).items():
            (copy / module).write_text(source)
        return run_tests(Path(scratch), mutant)


def faults(mutant: Mutant) -> Iterator[str]:
    """Yield why the mutant cannot be tried. The package or the tests have changed since it was written."""
    try:
        mutated_modules(PACKAGE, mutant)
    except DoesNotApply as reason:
        yield str(reason)
    yield from (f"there is no {file}" for file in mutant.tests if not (ROOT / file).exists())


def check(mutants: list[Mutant]) -> int:
    """Apply every edit to a copy in memory, and print each edit that does not apply.

    Return how many mutants can be tried.
    """
    sound = 0
    for mutant in mutants:
        found = list(faults(mutant))
        sound += not found
        for fault in found:
            print(f"DOES NOT APPLY: without {mutant.name}: {fault}", flush=True)
    return sound


def parse() -> argparse.Namespace:
    """Return the command line. `options.chosen` are the mutants that it names, or all."""
    description = "Take one mechanism out of persist at a time, and see the tests that guard it fail."
    parser = argparse.ArgumentParser(prog="mutants", description=description, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant's name, as --list gives it; all without one")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the names, and do nothing")
    instead.add_argument("--check", action="store_true", help="see that each edit applies, and run no tests")
    options = parser.parse_args()
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in options.names if name not in by_name]:
        parser.error(f"there is no mutant {unknown[0]!r}; --list names them")
    options.chosen = [by_name[name] for name in options.names] or list(MUTANTS)
    return options


def main() -> int:
    """Do what the command line asks for, and return the exit status."""
    options = parse()
    if options.list:
        print("\n".join(mutant.name for mutant in MUTANTS))
        return 0
    chosen: list[Mutant] = options.chosen
    sound = check(chosen)
    if options.check:
        print(f"{sound} of {len(chosen)} mutants apply")
    if options.check or sound < len(chosen):
        return 0 if sound == len(chosen) else 1
    failures = 0
    for mutant in chosen:
        passes = run_tests(ROOT, mutant)
        caught = passes and not survives(mutant)
        failures += not caught
        print(
            f"{'caught' if caught else 'SURVIVED' if passes else 'TEST FAILS UNCHANGED'}: without {mutant.name}",
            flush=True,
        )
    print(f"{len(chosen) - failures} of {len(chosen)} mutants caught")
    return 1 if failures else 0
