"""Mutants of contents, of changes, and of the document as a file."""

from __future__ import annotations

from mutation.catalogue.suites import CONTENT, DIFF, DOCUMENT, HALVES, UNREAD
from mutation.edits import (
    Edit,
    condition,
    drop_call,
    drop_operand,
    drop_statement,
    replace_expression,
    replace_statement,
    return_now,
)
from mutation.mutant import Change, Mutant

MODULE = "storage/content.py"
CHANGES = "storage/diff.py"
FILE = "storage/document.py"

AS_HEADER_SAYS = "not_as_their_header_says or among_the_items"


def _of(name: str, function: str, edit: Edit, select: str, *also: Change) -> Mutant:
    return Mutant(name, MODULE, function, edit, CONTENT, select, also)


MUTANTS = (
    # --- halves of surrogate pairs ---
    Mutant(
        "the join of two halves",
        "json_codec.py",
        "joined",
        condition("text.isascii() or _PAIR.search(text) is None", "True"),
        HALVES,
        "halves_are_joined",
    ),
    Mutant(
        "halves: two keys that become one",
        "json_codec.py",
        "_encode_surrogates",
        condition("len({*map(joined, value)}) < len(value)", "False"),
        HALVES,
        "two_keys",
    ),
    Mutant(
        "halves: two names that become one",
        MODULE,
        "encode_values",
        condition("name in data or name in halves", "False"),
        HALVES,
        "two_keys",
    ),
    Mutant(
        "halves: another order of keys",
        MODULE,
        "as_before",
        drop_operand("not found.isascii() and json_codec.same(there, json_codec.decode(found))"),
        HALVES,
        "another_order",
    ),
    Mutant(
        "halves: the id that is looked for",
        MODULE,
        "as_id",
        replace_expression("json_codec.joined(value)", "value"),
        HALVES,
        "finds_by_either_form",
    ),
    Mutant(
        "halves: the caller's own key",
        "session.py",
        "Session._patch",
        replace_expression("own.get(name, name)", "name"),
        HALVES,
        "merge_beside_halves",
    ),
    Mutant(
        "the new list that a split returns",
        MODULE,
        "Items.split",
        replace_expression("items[:length]", "items"),
        ("tests/unit/test_reports.py",),
        "split_before or mid_refresh",
    ),
    # --- items ---
    _of(
        "the look whether another value has grown the list",
        "Items.spliced",
        condition("is_append and in_place and len(items) == length", "is_append and in_place"),
        "do_not_meet",
    ),
    _of(
        "the list of its own of an encoding without the lock",
        "Items.spliced",
        condition("is_append and in_place and len(items) == length", "is_append and len(items) == length"),
        "shares_no_list",
    ),
    _of(
        "the end of a text within a block",
        "_unchanged",
        replace_expression("SEPARATOR if stop < in_text else b'\\n]'", "b''"),
        "blocks_compare",
    ),
    _of(
        "the refusal of a place that is not there",
        "Items.spliced",
        condition("not 0 <= at <= at + remove <= self.count", "False"),
        "items_that_are_not_there",
    ),
    _of(
        "the ids that move with their items",
        "Items._hand_over_places",
        replace_expression("after.last(after.count - at)", "after.last(after.count - at)[:1]"),
        "row_of_changes or at_any_place",
        Change(
            MODULE,
            "Items._hand_over_places",
            replace_expression("self.last(self.count - at)", "self.last(self.count - at)[:1]"),
        ),
    ),
    Mutant(
        "the ids of new items",
        MODULE,
        "Items._hand_over_places",
        drop_call("places.put"),
        UNREAD,
        "come_to_the_same and 3000",
    ),
    _of(
        "the ids that are forgotten with a changed value",
        "Items._hand_over_places",
        replace_statement("handed_over, self._places = self._places, {}", "handed_over = self._places"),
        "row_of_changes or at_any_place",
    ),
    _of(
        "the look for another item of the same id",
        "Items._hand_over_places",
        condition("places.repeated.isdisjoint(gone)", "True"),
        "row_of_changes or at_any_place",
    ),
    _of(
        "the ids in a text that was not split",
        "Items.ids",
        replace_expression("[item.value for item in _id_readers(key)[1](text)] if text else []", "[]"),
        "however_it_is_spelt",
    ),
    # --- where a value stands ---
    _of(
        "the place of a large value",
        "placed",
        drop_operand("(size_bytes > APART_BYTES and name != ALWAYS_FIELD)"),
        "stands_apart_above",
    ),
    _of(
        "the bound of the fields together",
        "placed",
        condition("total > FIELDS_BYTES", "False"),
        "largest_fields",
    ),
    _of(
        "the order of equally large fields",
        "placed",
        replace_expression("(len(fields[name]), name)", "len(fields[name])"),
        "follows_from_the_content_alone or largest_fields",
    ),
    _of(
        "the one size of a list",
        "_json_bytes",
        return_now("value.size_bytes"),
        "one_size",
    ),
    # --- what is no exact JSON ---
    _of("the look at the keys of the data", "encode_values", condition("type(key) is not str", "False"), "no_key"),
    _of(
        "the check of an item that differs",
        "_encoded_value",
        replace_expression("json_codec.encode_exact(value, path)", "found or json_codec.encode_exact(value, path)"),
        "what_json_would_change",
    ),
    # --- changes ---
    Mutant(
        "the several changes of distant edits",
        CHANGES,
        "splices",
        replace_expression("[*reversed(align(removed, added)), (-1, -1)]", "[(-1, -1)]"),
        DIFF,
        "distant",
    ),
    Mutant(
        "the end that does not reach into the beginning",
        MODULE,
        "window",
        drop_statement("tail = min(tail, rest)"),
        DIFF,
        "makes_one_the_other",
    ),
    Mutant(
        "the refusal of a change of what is no list",
        CHANGES,
        "apply",
        replace_statement("raise DoesNotFit(change.name)", "return"),
        DIFF,
        "does_not_fit",
    ),
    # --- the document ---
    Mutant(
        "the text between two parts",
        FILE,
        "_checked_content",
        condition('content[place:start] != b",\\n" + key', "False"),
        DOCUMENT,
        "flipped_bit or changed_places",
    ),
    Mutant(
        "the brackets and the count of a list",
        FILE,
        "_value",
        drop_operand("not is_list"),
        DOCUMENT,
        "count_of_a_list",
    ),
    Mutant(
        "as many items as the header says",
        MODULE,
        "Items.decode",
        condition("len(found) != text_count", "False"),
        DOCUMENT,
        AS_HEADER_SAYS,
        (Change(MODULE, "Items.split", condition("len(split) != text_count", "False")),),
    ),
    Mutant(
        "the look of a head for a field that is called like a part",
        FILE,
        "_read_ending",
        condition("not fields.keys().isdisjoint(parts.parts)", "False"),
        ("tests/faults/test_fuzz.py",),
        "not_as_it_says",
    ),
    Mutant(
        "the checksum of a part",
        FILE,
        "_checked",
        drop_operand("_checksum(text) != part.checksum"),
        DOCUMENT,
        "flipped_bit",
    ),
    Mutant(
        "the checksum of the header",
        FILE,
        "_checked_header",
        drop_operand("_checksum(memoryview(line)[shape.end():]).encode() != shape[1]"),
        DOCUMENT,
        "flipped_bit",
    ),
)
