"""Mutants of the way to the disk."""

from __future__ import annotations

from mutation.catalogue.suites import FILE_SYSTEM, HAZARDS, IO_ERRORS, OPENING, WAYS_OUT
from mutation.edits import (
    condition,
    drop_call,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    replace_statement,
)
from mutation.mutant import Mutant

MUTANTS = (
    Mutant("the exclusive temporary file", "storage/disk.py", "create", drop_operand("os.O_EXCL"), HAZARDS, "b5"),
    Mutant(
        "the look whether the directory is the one that was opened",
        "storage/directory.py",
        "SessionDirectory.require_same",
        condition("not is_same", "False"),
        WAYS_OUT,
        "lost",
    ),
    Mutant(
        "the look at the directory before a lock file is made",
        "storage/transaction.py",
        "SessionFiles.transaction",
        drop_statement("locked.before_create = self.require_same"),
        WAYS_OUT,
        "lost",
    ),
    Mutant(
        "a directory made anew under the same inode",
        "storage/directory.py",
        "SessionDirectory.require_same",
        condition("is_same and is_missing and self._has_leases and (not disk.exists(self.layout.leases))", "False"),
        WAYS_OUT,
        "lost or overlay",
    ),
    Mutant(
        "the inode of an overlay's directory",
        "storage/file_system.py",
        "check",
        drop_operand("mount.kind != 'overlay'"),
        WAYS_OUT,
        "overlay",
    ),
    Mutant(
        "the home directory behind a tilde",
        "store.py",
        "_directory",
        replace_call("expanded", "directory"),
        OPENING,
        "home",
    ),
    Mutant(
        "replace: the leases of a damaged session",
        "streams.py",
        "_replace_damaged",
        condition("not is_dead", "False"),
        WAYS_OUT,
        "live_stream",
    ),
    Mutant(
        "replace: the version of a session that can be read",
        "streams.py",
        "replace",
        condition("if_version is None", "False"),
        WAYS_OUT,
        "by_its_version",
    ),
    Mutant(
        "replace: the end of a damaged session's journals",
        "storage/commit.py",
        "replace_damaged",
        drop_call("_remove"),
        WAYS_OUT,
        "can_be_replaced or damaged_journal",
    ),
    Mutant(
        "replace: the name of the journal that goes out of use",
        "storage/commit.py",
        "replace_damaged",
        replace_expression("journals[-1][1] if journals else None", "None"),
        IO_ERRORS,
        "every_error and replace_of_a_damaged",
    ),
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
