"""Mutants of the way to the disk."""

from __future__ import annotations

from mutation.catalogue.suites import BACKUP, CHECK, HAZARDS, LOOKS
from mutation.edits import condition, drop_call, drop_handler, drop_operand, drop_statement
from mutation.mutant import Mutant

MUTANTS = (
    Mutant("the exclusive temporary file", "storage/disk.py", "create", drop_operand("os.O_EXCL"), HAZARDS, "b5"),
    Mutant(
        "cli: a reader that leaves is no failure",
        "cli/commands.py",
        "errors_as_messages",
        drop_handler("BrokenPipeError"),
        LOOKS,
        "seen_enough",
    ),
    Mutant(
        "cli: Ctrl-C ends between two sessions",
        "cli/progress.py",
        "Watched._watch_for_sigint",
        condition("not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler", "True"),
        LOOKS,
        "ctrl_c_ends_between",
    ),
    Mutant(
        "backup: the lease of a running stream",
        "backup.py",
        "_Copies.write",
        condition("layout.is_stream_id(stream_id)", "False"),
        BACKUP,
        "dead_and_is_cleared",
    ),
    Mutant(
        "backup: the mark that names the store",
        "backup.py",
        "_Copies._check_mark",
        condition("version != FORMAT or store != self._source", "False"),
        BACKUP,
        "with_other_files",
    ),
    Mutant(
        "backup: an empty store prunes nothing",
        "backup.py",
        "backing_up",
        condition("prune and gone and not names", "False"),
        BACKUP,
        "empty_store",
    ),
    Mutant(
        "backup: the sync of the directory",
        "backup.py",
        "_Copies.__exit__",
        drop_call("disk.sync_directory"),
        BACKUP,
        "synced_behind",
    ),
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
