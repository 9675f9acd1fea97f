"""Mutants of the way to the disk."""

from __future__ import annotations

from mutation.catalogue.suites import HAZARDS
from mutation.edits import drop_operand
from mutation.mutant import Mutant

MUTANTS = (
    Mutant("the exclusive temporary file", "storage/disk.py", "create", drop_operand("os.O_EXCL"), HAZARDS, "b5"),
)
