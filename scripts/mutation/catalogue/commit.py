"""Mutants of the commit: records, folds, marks, syncs, and what a process keeps from one verb to the next."""

from __future__ import annotations

from textwrap import indent

from mutation.catalogue.suites import (
    COMMIT,
    IO_ERRORS,
    JOURNAL,
    JOURNAL_DAMAGE,
    JOURNAL_STATES,
    KEPT_HEADS,
    REPLICA,
    SHARED_SESSIONS,
)
from mutation.edits import (
    Edit,
    body,
    condition,
    drop_call,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    replace_statement,
    return_now,
)
from mutation.mutant import Change, Mutant

MODULE = "storage/commit.py"
TRANSACTION = "storage/transaction.py"
CACHE = "storage/cache.py"

FULL_DISK = "not is_full or place.is_marked or tail.is_torn or not before.is_synced or options.mode == 'never'"


MAKE_ROOM = "disk.write_at(fd, bytes(room), tail.end)\ntail.room_end = tail.end + room"
ACKNOWLEDGED = "acknowledged_without_a_commit"


def _commit(name: str, function: str, edit: Edit, tests: tuple[str, ...], select: str, *also: Change) -> Mutant:
    return Mutant(f"commit: {name}", MODULE, function, edit, tests, select, also)


def _fold(name: str, edit: Edit, tests: tuple[str, ...], select: str) -> Mutant:
    return Mutant(f"fold: {name}", MODULE, "commit", edit, tests, select)


def _replica(name: str, function: str, edit: Edit, tests: tuple[str, ...], select: str) -> Mutant:
    return Mutant(f"replica: {name}", TRANSACTION, function, edit, tests, select)


def _mark(of: str) -> Mutant:
    return _commit(
        f"the mark before {of}", "_publish", condition("mark is not None", "False"), COMMIT, f"mark and {of}"
    )


MUTANTS = (
    # --- when the document is written ---
    _fold("of a torn tail", drop_operand("tail.is_torn"), JOURNAL_DAMAGE, "torn_tail"),
    _fold("of a journal that is too large", drop_operand("tail.end > limit"), JOURNAL, "outgrows"),
    _fold("by a store without journals", drop_operand("options.mode == 'never'"), JOURNAL, "never_leaves"),
    _fold(
        "in the place of writing much again",
        drop_operand("len(tail.unsynced) > MOST_UNSYNCED_BYTES"),
        COMMIT,
        "much_that_nobody_synced",
    ),
    _commit(
        "the record while a fold does not fit",
        "commit",
        condition(FULL_DISK, "True"),
        JOURNAL_DAMAGE,
        "does_not_fit_on",
    ),
    _commit(
        "the difference of a failed fsync and a full disk",
        "commit",
        drop_operand("not isinstance(error.__cause__, disk.SyncFailed)"),
        IO_ERRORS,
        "append and folding",
    ),
    _commit(
        "the smaller size at which journals are left",
        "Options.wants_journal",
        replace_expression("LEAVE_BYTES if header.journal else ENTER_BYTES", "ENTER_BYTES"),
        JOURNAL,
        "enters_above",
    ),
    # --- the record ---
    _commit(
        "the end of a record that was cut off",
        "append_record",
        drop_call("disk.truncate"),
        JOURNAL_DAMAGE,
        "leaves_no_torn_tail",
    ),
    _commit(
        "the records of others that are written again",
        "append_record",
        replace_expression("tail.unsynced + line", "line"),
        COMMIT,
        "known_to_have_synced",
        Change(MODULE, "append_record", replace_expression("tail.synced if tail.unsynced else tail.end", "tail.end")),
    ),
    _commit(
        "the mark behind a record that could not be synced",
        "append_record",
        drop_statement("disk.write_at(fd, journal.MARK, end)"),
        JOURNAL_DAMAGE,
        "appended_to_by_nobody",
    ),
    _commit(
        "the sync of a record",
        "append_record",
        drop_call("disk.sync_data"),
        JOURNAL_STATES,
        "one_write_and_one",
    ),
    _commit(
        "the room for more",
        "append_record",
        condition("end > tail.room_end and len(line) <= room <= tail.end", "False"),
        JOURNAL,
        "into_the_room",
    ),
    _commit(
        "the room that is made now and then",
        "append_record",
        drop_operand("end > tail.room_end"),
        JOURNAL,
        "into_the_room",
        Change(MODULE, "append_record", condition("end > tail.room_end", "True")),
    ),
    _commit(
        "the record where the disk refuses room",
        "append_record",
        replace_statement(
            f"with contextlib.suppress(OSError):\n{indent(MAKE_ROOM, '    ')}",
            MAKE_ROOM,
        ),
        JOURNAL,
        "no_room_for_more",
    ),
    # --- the first sync, and acknowledgements without a commit ---
    _commit(
        "the first sync by a replica",
        "_settle",
        body("found.is_synced = True"),
        JOURNAL_STATES,
        "bears_its_name_durably",
    ),
    _commit(
        "the first sync of the document",
        "_settle",
        drop_call("disk.sync_file"),
        JOURNAL_STATES,
        "another_program_has_copied",
    ),
    _commit(
        "the first sync of the directory",
        "_settle",
        drop_call("disk.sync_directory"),
        JOURNAL_STATES,
        "bears_its_name_durably",
    ),
    _commit(
        "the write of what is confirmed",
        "confirm",
        drop_statement("disk.write_at(fd, tail.unsynced, tail.synced)"),
        COMMIT,
        "confirmed",
    ),
    _commit("the document that is confirmed", "_settle", drop_call("disk.sync_file"), COMMIT, ACKNOWLEDGED),
    _commit("the name that is confirmed", "_settle", drop_call("disk.sync_directory"), COMMIT, ACKNOWLEDGED),
    Mutant(
        "commit: the sync before a known item is acknowledged",
        "working_copy.py",
        "WorkingCopy.commit_changes",
        replace_call("self._tx.confirm", "self._tx.read()"),
        COMMIT,
        f"{ACKNOWLEDGED} and (append or update)",
    ),
    Mutant(
        "commit: the sync before it is told that a session exists",
        "store.py",
        "Store._created",
        drop_call("tx.confirm"),
        COMMIT,
        f"{ACKNOWLEDGED} and create",
    ),
    Mutant(
        "commit: the sync before a repeated cancel is acknowledged",
        "streams.py",
        "cancel",
        drop_call("tx.confirm"),
        COMMIT,
        f"{ACKNOWLEDGED} and cancel",
    ),
    Mutant(
        "commit: the sync before a save without a change is acknowledged",
        "session.py",
        "Session._write",
        drop_call("tx.confirm"),
        COMMIT,
        f"{ACKNOWLEDGED} and save",
    ),
    _commit(
        "the refusal after an unknown commit", "Place.require_known", return_now(), SHARED_SESSIONS, "unknown_commit"
    ),
    # --- the document ---
    _commit(
        "the directory that is opened in time",
        "_publish",
        replace_statement("directory = disk.open_directory(paths.directory)", "directory = -1"),
        SHARED_SESSIONS,
        "lack_of_descriptors",
        Change(
            MODULE,
            "_publish",
            replace_expression(
                "disk.sync_directory(paths.directory, directory)", "disk.sync_directory(paths.directory)"
            ),
        ),
        Change(MODULE, "_publish", drop_call("disk.close_directory")),
    ),
    Mutant(
        "commit: the id that tells it from an equal one",
        "storage/document.py",
        "Header.next",
        replace_call("os.urandom(8).hex", "f'{self.revision + 1:016x}'"),
        SHARED_SESSIONS,
        "equal_commit or cut_off_under_the_commit",
    ),
    _mark("fold"),
    _mark("leaving"),
    _mark("accept"),
    _commit(
        "the mark before a delete",
        "delete",
        drop_call("put_mark"),
        COMMIT,
        "mark and delete",
    ),
    _commit(
        "the place of the mark behind all of a damaged journal",
        "_publish",
        replace_expression("mark.end", "len(journal.opening(mark.name))"),
        COMMIT,
        "mark and accept",
    ),
    Mutant(
        "commit: the removal of every journal with the session",
        TRANSACTION,
        "Transaction.delete",
        replace_statement(
            "journals = [path for path, _ in self._files.journals(self.session_id, copies=True)]", "journals = []"
        ),
        JOURNAL,
        "every_journal",
    ),
    # --- the replica ---
    _replica(
        "the version of the document",
        "Transaction.read",
        drop_operand("kept.version == version"),
        JOURNAL_DAMAGE,
        "sees_that_its_document",
    ),
    Mutant(
        "replica: the time of the last change of status",
        "storage/disk.py",
        "version_of",
        replace_expression("status.st_ctime_ns", "0"),
        COMMIT,
        "keeps_size_and_time",
        (Change("storage/disk.py", "version_in", replace_expression("status.st_ctime_ns", "0")),),
    ),
    Mutant(
        "kept head: the version of its document",
        "storage/directory.py",
        "_KeptHead.is_last",
        condition("disk.version_of(paths.document) != self.version", "False"),
        KEPT_HEADS,
        "only_while",
    ),
    Mutant(
        "kept head: the look at its journal's end",
        "storage/directory.py",
        "_KeptHead.is_last",
        replace_expression("self.tail.is_end_of(fd) is True", "True"),
        KEPT_HEADS,
        "only_while",
    ),
    _replica(
        "the small commit that reads no document",
        "Transaction.read",
        replace_expression("self._caught_up(kept) if kept is not None and kept.version == version else None", "None"),
        REPLICA,
        "commit_to_a_large_session",
    ),
    _replica(
        "the end of the journal",
        "Transaction._caught_up",
        replace_call("tail.is_end_of", "IT is not False"),
        REPLICA,
        "restored",
    ),
    _replica(
        "the commits of others",
        "Transaction._caught_up",
        condition("is_end is False", "False"),
        REPLICA,
        "followed",
    ),
    _replica(
        "the drop where the journal ends in a tear",
        "Transaction._caught_up",
        drop_operand("not tail.is_torn"),
        COMMIT,
        "mark and fold",
    ),
    _replica(
        "the drop by an exception",
        "Transaction.commit",
        replace_statement("before, self._replica = self._replica, None", "before = self._replica"),
        JOURNAL,
        "cut_off_is_idempotent",
    ),
    _replica(
        "the drop before an accept",
        "Transaction.accept",
        drop_call("self._files.cache.take"),
        COMMIT,
        "by_the_files",
    ),
    Mutant(
        "replica: the bound of the cache",
        CACHE,
        "Cache.put",
        condition("self._total_bytes > self._limit_bytes and self._replicas", "False"),
        REPLICA,
        "within_the_bound",
    ),
    Mutant(
        "replica: the hand-over by the cache",
        CACHE,
        "Cache.take",
        replace_call("self._replicas.pop", "self._replicas.get(session_id)"),
        REPLICA,
        "within_the_bound",
    ),
)
