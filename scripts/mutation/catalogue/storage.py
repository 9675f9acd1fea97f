"""Mutants of the way to the disk."""

from __future__ import annotations

from mutation.catalogue.suites import CHECK, HAZARDS
from mutation.edits import drop_operand, drop_statement
from mutation.mutant import Mutant

MUTANTS = (
    Mutant("the exclusive temporary file", "storage/disk.py", "create", drop_operand("os.O_EXCL"), HAZARDS, "b5"),
    Mutant(
        "check: a temporary file that is there under the lock",
        "maintenance.py",
        "_judged",
        drop_operand("disk.exists(paths.temp)"),
        CHECK,
        "since_the_listing",
    ),
    Mutant(
        "check: a journal that is there under the lock",
        "maintenance.py",
        "_journal",
        drop_statement("disk.version_of(path)"),
        CHECK,
        "since_the_listing",
    ),
)
