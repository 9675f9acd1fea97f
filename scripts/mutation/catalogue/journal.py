"""Mutants of the journal: its grammar, its end, its damage, and readers that a fold overtakes."""

from __future__ import annotations

from mutation.catalogue.suites import JOURNAL, JOURNAL_DAMAGE, REPLICA
from mutation.edits import (
    Edit,
    condition,
    drop_context,
    drop_operand,
    replace_call,
    replace_expression,
    replace_statement,
)
from mutation.mutant import Change, Mutant

MODULE = "storage/journal.py"
TRANSACTION = "storage/transaction.py"
SALVAGE = "storage/salvage.py"


def _grammar(name: str, function: str, edit: Edit, select: str, *also: Change) -> Mutant:
    return Mutant(f"journal: {name}", MODULE, function, edit, JOURNAL, select, also)


def _damage(name: str, function: str, edit: Edit, select: str, *also: Change) -> Mutant:
    return Mutant(f"journal: {name}", MODULE, function, edit, JOURNAL_DAMAGE, select, also)


MUTANTS = (
    # --- records ---
    _damage(
        "the CRC of a record",
        "_is_whole",
        replace_expression(
            "line[:_CHECKED_FROM] == _PREFIX % zlib.crc32(line[_CHECKED_FROM:], seed)", "_LINE.match(line) is not None"
        ),
        "whole_journal",
    ),
    _grammar(
        "the record before",
        "Journal.read_new_records",
        drop_operand("record.after != tail.after"),
        "another_one_than",
    ),
    _grammar(
        "the revision of a record",
        "Journal.read_new_records",
        drop_operand("record.revision != revision"),
        "does_not_follow",
    ),
    _grammar(
        "the place of the last head",
        "Journal.read_new_records",
        drop_operand("record.head is None and record.head_at != tail.head_at"),
        "does_not_follow",
    ),
    _grammar(
        "the number of items",
        "Journal.catch_up",
        drop_operand("records[-1].counts != content.counts"),
        "does_not_follow",
    ),
    _damage(
        "the look for a field that is called like a list",
        "Journal.catch_up",
        drop_operand("not content.fields.keys().isdisjoint(content.apart)"),
        "called_like_a_list",
    ),
    _damage(
        "the look of a head for a field that is called like a list",
        "Journal.read_head",
        condition("not fields.keys().isdisjoint(record.counts)", "False"),
        "called_like_a_list",
    ),
    _damage(
        "the look of a tail at what each record follows on",
        "Journal.last_items",
        condition(
            "[record.after for record in records] != [*before, *(record.crc for record in records)][:-1]",
            "False",
        ),
        "tail_of_a_journal",
    ),
    Mutant(
        "journal: the records that a tail has not read",
        MODULE,
        "_last_of",
        condition("not records and base is None", "False"),
        REPLICA,
        "behind_a_large_record",
    ),
    _grammar(
        "the name in its opening",
        "Journal.check_opening",
        condition("found != expected", "False"),
        "another_name",
    ),
    _grammar(
        "its version",
        "Journal.check_opening",
        condition("version is not None and int(version[1]) != VERSION", "False"),
        "unknown_version",
    ),
    # A record that this version does not know is taken for one that a crash has left.
    _grammar(
        "the refusal of a record of a newer version",
        "Journal.read_new_records",
        replace_statement(
            "lines = list(_lines(content, tail.seed))",
            """
            lines = list(_lines(content, tail.seed))
            try:
                list(self._all_decoded(lines, start))
            except UnsupportedFormat:
                tail.is_torn = True
                tail.unsynced = disk.read_at(fd, tail.end - tail.synced, tail.synced)
                return
            """,
        ),
        "newer_version",
    ),
    _grammar(
        "the opening that looks at no time",
        "Journal.open",
        replace_call("disk.open_unseen", "disk.open_plain(self.path, flags)"),
        "looks_at_the_times",
    ),
    # --- its end ---
    _grammar(
        "the look at the last known record",
        "Tail.is_end_of",
        condition("found[:len(fingerprint)] != fingerprint", "False"),
        "known_by_its_last_bytes",
    ),
    _grammar(
        "the commit id in the bytes before its end",
        "Tail.is_end_of",
        replace_expression('b\'"commit":"%b"}\\n\' % self.commit.encode()', "b'\"}\\n'"),
        "known_by_its_last_bytes",
    ),
    # --- readers ---
    Mutant(
        "journal: the new start of a reader that was overtaken",
        TRANSACTION,
        "SessionFiles._not_overtaken",
        drop_context("contextlib.suppress(Overtaken)"),
        JOURNAL,
        "starts_over",
    ),
    Mutant(
        "journal: the lock that a reader takes at last",
        TRANSACTION,
        "SessionFiles._not_overtaken",
        replace_statement(
            "with self.transaction(session_id) as tx:\n    found: Found = tx.undisturbed(look)\n    return found",
            "return look(session_id)",
        ),
        JOURNAL,
        "takes_the_lock",
    ),
    Mutant(
        "journal: the look under the lock that takes no second one",
        TRANSACTION,
        "Transaction.head",
        replace_expression("self._files.read_head_now", "self._files.read_head"),
        JOURNAL,
        "told_by_every_look",
    ),
    _grammar(
        "the second look of a load",
        "Journal.read_new_records",
        condition("rest == before", "True"),
        "looks_again and load",
    ),
    _grammar(
        "the second look of a head",
        "Journal._last_line",
        condition("content == before", "True"),
        "looks_again and head",
    ),
    # --- torn tails and damage ---
    _damage(
        "the rule of an altered newline",
        "_is_torn",
        replace_call("_is_whole_but_for_its_newline", "False"),
        "flipped_bit_of_a",
    ),
    _damage(
        "the end of a record whose newline was lost",
        "_is_whole_but_for_its_newline",
        replace_expression("found.start() - 1", "found.start()"),
        "newline_in_a",
    ),
    _damage(
        "the CRC of a record whose newline was altered",
        "_is_whole_but_for_its_newline",
        condition("crc == int(shape[1], 16)", "False"),
        "flipped_bit_of_a_whole",
    ),
    _damage(
        "the rule of whole sectors",
        "_is_torn",
        condition("any(b'\\0' in sector and sector.strip(b'\\0') for sector in sectors)", "False"),
        "part_of_a_sector",
    ),
    _damage(
        "what a later record knew to be durable",
        "_is_torn",
        replace_expression(
            r"any(_synced_of(each) > position for each in behind.split(b'\n')[:-1] if _is_whole(each, seed))", "False"
        ),
        "knew_it_durable",
    ),
    _damage(
        "records that nobody acknowledged",
        "_is_torn",
        replace_expression("_synced_of(each) > position", "True"),
        "nobody_acknowledged",
    ),
    _damage(
        "the look of a head behind the last record",
        "Journal._last_line",
        condition("not rest or _is_torn(rest, end, tail.seed)", "True"),
        "last_record_was_altered",
    ),
    _damage(
        "the way of a head back to what is surely there",
        "_durable_line",
        replace_expression("min(_synced_of(content[begin:stop]) - start, begin)", "begin + 1"),
        "behind_one_that_was_lost",
    ),
    # --- what accept takes ---
    _damage(
        "the places in an edited document",
        "only_appends",
        drop_operand("change.at != counts.get(change.name)"),
        "places_are_others",
    ),
    Mutant(
        "journal: the replacement of half a copy",
        SALVAGE,
        "_with_records",
        replace_statement(
            "write_new(layout.copy_of(str(log.path)), copy, place.options.file_mode)",
            """
            if not disk.exists(layout.copy_of(str(log.path))):
                write_new(layout.copy_of(str(log.path)), copy, place.options.file_mode)
            """,
        ),
        JOURNAL_DAMAGE,
        "always_whole",
    ),
    Mutant(
        "journal: the revisions of a journal that is lost",
        SALVAGE,
        "salvage",
        replace_expression("edited.header.revision + _MOST_RECORDS", "edited.header.revision"),
        JOURNAL,
        "not_used_again",
    ),
)
