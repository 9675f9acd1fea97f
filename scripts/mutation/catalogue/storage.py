"""Mutants of the way to the disk."""

from __future__ import annotations

from mutation.catalogue.suites import FILE_SYSTEM, HAZARDS
from mutation.edits import drop_operand, replace_expression, replace_statement
from mutation.mutant import Mutant

MUTANTS = (
    Mutant("the exclusive temporary file", "storage/disk.py", "create", drop_operand("os.O_EXCL"), HAZARDS, "b5"),
    Mutant(
        "the probe of a file system that is not known",
        "storage/file_system.py",
        "probe",
        replace_statement(
            "return answers[0] if answers else f'whose locks do not answer within {PROBE_S:g} s'", "return 'passed'"
        ),
        FILE_SYSTEM,
        "fails_the_probe",
    ),
    Mutant(
        "the second lock of the probe",
        "storage/held.py",
        "is_exclusive",
        replace_expression("lock_descriptor(other, blocking=False)", "False"),
        FILE_SYSTEM,
        "fails_the_probe",
    ),
    Mutant(
        "what a mount is known for, beside its kind",
        "storage/file_system.py",
        "Mount.verdict",
        replace_expression("_BAD.isdisjoint(self.names)", "_BAD.isdisjoint(self.names[:1])"),
        FILE_SYSTEM,
        "locks_do_not_hold",
    ),
    Mutant(
        "a device is judged once",
        "storage/file_system.py",
        "check",
        replace_expression("_judged.get(device)", "None"),
        FILE_SYSTEM,
        "judged_once or one_warning",
    ),
)
