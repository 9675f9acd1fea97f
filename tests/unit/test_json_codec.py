"""Strict JSON: a value comes back type for type, or it is refused."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import enum
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persist import json_codec
from persist.errors import NotJSON, ValuePath

#: The number of items of a long list.
MANY = 300
GREATEST = 10**json_codec.MAX_DIGITS - 1


def exactly(value: Any) -> Any:
    """Return a form of a value that is equal only if type, sign, value and order are equal."""
    if type(value) is dict:
        return [(key, exactly(item)) for key, item in value.items()]
    if type(value) is list:
        return ("list", [exactly(item) for item in value])
    if type(value) is float:
        return (float, value.hex())
    return (type(value), value)


def round_trip(value: Any) -> Any:
    json_codec.check(value)
    return json_codec.decode(json_codec.encode(value))


def nested(depth: int, kind: str = "list") -> Any:
    value: Any = [] if kind == "list" else {}
    for _ in range(depth - 1):
        value = [value] if kind == "list" else {"k": value}
    return value


def deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"k": value}
    return value


any_text = st.text(st.characters(codec=None, exclude_categories=()))
paired_text = any_text.filter(lambda text: json.loads(json.dumps(text)) == text)
long_integers = st.builds(
    lambda digits, sign: sign * int(digits),
    st.text("0123456789", min_size=1, max_size=json_codec.MAX_DIGITS),
    st.sampled_from([1, -1]),
)
finite = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | st.integers() | finite | paired_text
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(paired_text, inner, max_size=4)
)


# --- what goes in comes out -------------------------------------------------------------------------------------------


@given(values)
def test_every_value_that_is_accepted_comes_back_exactly(value: Any) -> None:
    """Type, sign, value and order come back, whatever the shape."""
    assert exactly(round_trip(value)) == exactly(value)


@given(st.lists(values), st.dictionaries(paired_text, values))
@example([1e22, "é", 2**64, "\ud800"], {"\ud800": "é", "é": 1e16})
def test_a_part_has_the_same_bytes_alone_and_in_a_whole(items: list[Any], members: dict[str, Any]) -> None:
    """Equal values have equal bytes, whatever is beside them, even half a surrogate pair.

    Fails if a whole is encoded in another way than its parts, because then equal data differs.
    """
    assert json_codec.encode(items) == b"[%b]" % b",".join(map(json_codec.encode, items))
    parts = [json_codec.encode(key) + b":" + json_codec.encode(value) for key, value in members.items()]
    assert json_codec.encode(members) == b"{%b}" % b",".join(parts)


@given(values)
def test_what_is_written_is_json_for_everybody(value: Any) -> None:
    """The standard library reads the output of `encode`, and reads the same value."""
    assert exactly(json.loads(json_codec.encode(value))) == exactly(value)


@given(values)
def test_what_encode_writes_is_taken_by_the_strict_reader(value: Any) -> None:
    """`decode_strict` refuses nothing that `encode` writes, and reads it like `decode`."""
    assert exactly(json_codec.decode_strict(json_codec.encode(value))) == exactly(value)


@given(st.integers() | long_integers)
@example(GREATEST)
@example(-GREATEST)
@example(2**63 - 1)
@example(2**63)
@example(2**64 - 1)
@example(2**64)
@example(-(2**63))
@example(-(2**63) - 1)
@example(2**14_000)
def test_integers_of_up_to_4300_digits_come_back(number: int) -> None:
    """No integer is rounded to a float or cut at 64 bits."""
    assert exactly(round_trip(number)) == exactly(number)


@given(finite)
@example(-0.0)
@example(5e-324)
@example(2.2250738585072009e-308)
@example(1.7976931348623157e308)
@example(1e22)
@example(1e23)
@example(9007199254740993.0)
@example(0.1)
def test_every_finite_float_comes_back_bit_for_bit(number: float) -> None:
    """The sign of zero, subnormals and the extremes come back. A float stays a float."""
    assert exactly(round_trip(number)) == exactly(number)


@given(paired_text)
@example("\u0000")
@example("\ud800")
@example("\udfff tail")
@example("😀\ud83d😀\ude00")
@example("\ude00\ud83d")
@example("\u2028\u2029\ufeff\uffff\x7f")
@example('"\\\b\f\n\r\t/')
def test_every_text_comes_back(text: str) -> None:
    """NUL, lone surrogates (also beside emoji), line separators and quotes come back, as value and as key."""
    assert round_trip(text) == text
    assert round_trip({text: text}) == {text: text}


@pytest.mark.parametrize(
    ("value", "encoded"), [(True, b"true"), (1, b"1"), (1.0, b"1.0"), (0.0, b"0.0"), (-0.0, b"-0.0"), (None, b"null")]
)
def test_types_that_python_calls_equal_are_kept_apart(value: Any, encoded: bytes) -> None:
    """``True``, ``1`` and ``1.0`` have different bytes and come back as they were."""
    assert json_codec.encode(value) == encoded
    assert exactly(json_codec.decode(encoded)) == exactly(value)


def test_order_inside_nested_values_is_kept() -> None:
    """Keys are never sorted, at any level."""
    value = {"z": {"b": 1, "a": [{"y": 1, "x": 2}]}, "a": 0}
    assert exactly(round_trip(value)) == exactly(value)
    assert json_codec.encode(value) == b'{"z":{"b":1,"a":[{"y":1,"x":2}]},"a":0}'


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_two_hundred_levels_come_back_and_one_more_is_refused(kind: str) -> None:
    """The limit of nesting is exactly `MAX_DEPTH`, for both containers."""
    deepest = nested(json_codec.MAX_DEPTH, kind)
    assert round_trip(deepest) == deepest
    assert json_codec.decode_strict(json_codec.encode(deepest)) == deepest
    with pytest.raises(NotJSON, match="deeper than 200 levels") as caught:
        json_codec.check(nested(json_codec.MAX_DEPTH + 1, kind))
    assert caught.value.path == (0 if kind == "list" else "k",) * json_codec.MAX_DEPTH


@pytest.mark.parametrize("above", [0, 150, 189, 190, 191, 192, 193, 198, 199])
def test_the_limit_of_nesting_is_the_same_in_a_long_list(above: int) -> None:
    """Levels above and inside a long list count together, although its many values are checked as a whole."""
    for inside, is_accepted in ((json_codec.MAX_DEPTH - above - 1, True), (json_codec.MAX_DEPTH - above, False)):
        value = deep([*range(MANY), *([nested(inside)] if inside else [])], above)
        with contextlib.nullcontext() if is_accepted else pytest.raises(NotJSON, match="deeper than 200 levels"):
            json_codec.check(value)


def test_the_limit_of_values_counts_those_of_a_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document has a limit of values, however they are spread."""
    value = [[0] * MANY, {str(n): 1 for n in range(MANY)}, 5]
    monkeypatch.setattr(json_codec, "MAX_VALUES", 2 * MANY + 3)
    json_codec.check(value)
    monkeypatch.setattr(json_codec, "MAX_VALUES", 2 * MANY + 2)
    with pytest.raises(NotJSON, match="too large"):
        json_codec.check(value)


def test_a_long_list_that_contains_itself_many_times_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check as a whole ends level by level at the limit of values, before the memory ends."""
    monkeypatch.setattr(json_codec, "MAX_VALUES", 100_000)
    endless: list[Any] = []
    endless += [endless] * MANY
    with pytest.raises(NotJSON, match="containing itself"):
        json_codec.check({"messages": endless})


def test_a_list_that_is_used_twice_is_no_cycle() -> None:
    """Two references to one object are two copies in JSON, and no error."""
    shared = [1]
    assert round_trip({"a": shared, "b": [shared, shared]}) == {"a": [1], "b": [[1], [1]]}


# --- what does not go in ----------------------------------------------------------------------------------------------


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Name(str):
    pass


class Rows(list[Any]):
    pass


REFUSED = [
    (math.nan, "NaN"),
    (math.inf, "infinities"),
    (-math.inf, "infinities"),
    (b"raw", "bytes; decode it"),
    (bytearray(b"raw"), "bytearray"),
    ({1, 2}, "set; convert it with sorted"),
    (frozenset(), "frozenset"),
    ((1, 2), r"tuple; convert it with list\(\)"),
    (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), r"datetime\.datetime"),
    (datetime.date(2026, 1, 1), r"datetime\.date"),
    (decimal.Decimal("1.5"), r"decimal\.Decimal"),
    (1j, "complex"),
    (object(), "object"),
    (Colour.RED, r"Colour; take its \.value"),
    (Level.LOW, r"Level; take its \.value"),
    (Name("x"), r"Name; convert it with str\(\)"),
    (Rows(), r"Rows; convert it with list\(\)"),
    (collections.OrderedDict(a=1), r"OrderedDict; convert it with dict\(\)"),
    (collections.defaultdict(int), r"defaultdict; convert it with dict\(\)"),
    (GREATEST + 1, "at most 4,300 digits"),
    (-GREATEST - 1, "at most 4,300 digits"),
    ({1: "x"}, "only string keys"),
    ({None: "x"}, "only string keys"),
    ({("a", "b"): "x"}, "only string keys"),
    ({Name("x"): "x"}, "only string keys"),
]


@pytest.mark.parametrize(
    ("value", "reason"), REFUSED, ids=lambda part: part if isinstance(part, str) else type(part).__name__
)
@pytest.mark.parametrize(
    ("place", "path"),
    [
        (lambda value: value, ()),
        (lambda value: {"meta": value}, ("meta",)),
        (lambda value: {"messages": [{}, {"role": "user", "content": [0, value]}]}, ("messages", 1, "content", 1)),
        (lambda value: {"messages": [{}] * MANY + [{"at": value}]}, ("messages", MANY, "at")),
    ],
    ids=["alone", "in a field", "in a message", "behind many messages"],
)
def test_a_value_that_json_would_change_is_refused_by_its_path(
    value: Any, reason: str, place: Callable[[Any], Any], path: ValuePath
) -> None:
    """`NotJSON` names the place of the value and says what to do with it."""
    with pytest.raises(NotJSON, match=reason) as caught:
        json_codec.check(place(value))
    assert caught.value.path == path
    assert str(caught.value).startswith("data" + "".join(f"[{step!r}]" for step in path) + " cannot be kept as JSON:")


@pytest.mark.parametrize("value", [case[0] for case in REFUSED], ids=lambda value: type(value).__name__)
def test_what_lies_deep_behind_many_values_is_refused_by_its_path(value: Any) -> None:
    """The error names the path at any level, also below the values that are checked as a whole."""
    for depth in range(12):
        with pytest.raises(NotJSON) as caught:
            json_codec.check([*range(MANY), deep(value, depth)])
        assert caught.value.path == (MANY, *["k"] * depth)


def test_the_path_begins_where_the_caller_says() -> None:
    """A message that is checked alone is named by its place in the document."""
    with pytest.raises(NotJSON) as caught:
        json_codec.check({"at": {1}}, ("messages", 7))
    assert caught.value.path == ("messages", 7, "at")


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_a_value_that_contains_itself_is_refused(kind: str) -> None:
    """A cycle ends in `NotJSON`, not in a hang or a RecursionError."""
    inner: Any = [] if kind == "list" else {}
    outer = {"meta": inner}
    if kind == "list":
        inner.append(outer)
    else:
        inner["back"] = outer
    with pytest.raises(NotJSON, match="containing itself") as caught:
        json_codec.check(outer)
    assert caught.value.path[0] == "meta"


@given(any_text)
@example("\ud83d\ude00")
@example("\ud83d\ud83d\ude00\ude00")
@example("\udbff\udfff😀")
def test_halves_are_joined_and_all_else_comes_back(text: str) -> None:
    """A text of any code points comes back as JSON means it.
    The value that is read has the same bytes as the one written.
    """
    encoded = json_codec.encode(text)
    meant = json.loads(json.dumps(text))
    assert json_codec.decode(encoded) == meant == json_codec.joined(text)
    assert json_codec.encode(meant) == encoded
    assert json_codec.encode({text: [text]}) == json_codec.encode({meant: [meant]})


@pytest.mark.parametrize("value", [{"\ud83d\ude00": 1, "😀": 2}, [{"a": {"\ud83d\ude00😀": 1, "😀\ud83d\ude00": 1}}]])
def test_keys_that_would_be_one_are_refused(value: Any) -> None:
    """Two keys that would become one are refused, because one of the two values would be lost.
    The error names the caller's path.
    """
    with pytest.raises(NotJSON, match="two of its keys become the same") as caught:
        json_codec.encode(value, ("title",))
    assert caught.value.path == ("title",)


@given(values)
def test_encode_exact_is_check_and_encode(value: Any) -> None:
    """A value that JSON keeps exactly has one encoding, whether it was checked on the way or not."""
    encoded = json_codec.encode_exact(value)
    assert encoded == json_codec.encode(value)
    assert json_codec.encode_unchecked(value) in (encoded, None)
    assert json_codec.encode_all_unchecked([value]) in ([encoded], None)


@pytest.mark.parametrize("value", [case[0] for case in REFUSED], ids=lambda value: type(value).__name__)
def test_encode_exact_refuses_what_check_refuses(value: Any) -> None:
    """The error names the path that the caller gave, and nothing is encoded."""
    with pytest.raises(NotJSON) as caught:
        json_codec.encode_exact([value], ("messages", 7))
    assert caught.value.path == ("messages", 7, 0)


@given(values, values)
def test_same_tells_values_as_their_json_does(one: Any, other: Any) -> None:
    """Two values are the same exactly if their JSON is the same, apart from the order of keys."""

    def ordered(value: Any) -> Any:
        if type(value) is dict:
            return {key: ordered(value[key]) for key in sorted(value)}
        return list(map(ordered, value)) if type(value) is list else value

    alike = json_codec.encode(ordered(one)) == json_codec.encode(ordered(other))
    assert json_codec.same(one, other) is json_codec.same(other, one) is alike
    assert json_codec.same(one, ordered(one))


@given(values, values)
@example(1, True)
@example(0.0, -0.0)
@example("\ud83d", "\\ud83d")
@example({"a": "\ud800", "b": 1}, {"b": 1, "a": "\ud800"})
@example(["\ud83d\ude00", "\ud800"], ["\U0001f600", "\ud800"])
def test_values_have_one_canonical_text_exactly_if_they_are_the_same(one: Any, other: Any) -> None:
    """Types, signs and lone surrogates are kept apart. The order of keys does not count."""

    def turned(value: Any) -> Any:
        if type(value) is dict:
            return {key: turned(item) for key, item in reversed(value.items())}
        return list(map(turned, value)) if type(value) is list else value

    canonical = json_codec.canonical
    assert (canonical(one) == canonical(other)) is json_codec.same(one, other)
    assert canonical(turned(one)) == canonical(one)


# --- files that no checksum vouches for -------------------------------------------------------------------------------

TWICE = "an object has the same key twice"
NOT_JSON = "not JSON, or it was cut off"
DEEP = "nested deeper than 200 levels"
RANGE = "a number is out of range"

UNREADABLE = [
    ("empty", b"", "it is empty", 0),
    ("only space", b" \n", "it is empty", 0),
    ("only zeros", bytes(9), "nothing but zeros", 0),
    ("a value a line", b' {"a":1}\n[2]\n3', "JSONL", 9),
    ("duplicate key", b'{"a":1,"a":2}', TWICE, 7),
    ("duplicate key, nested", b'{"a":[{"b":{}, "c":0,\n"b" :1}]}', TWICE, 22),
    ("duplicate key, one spelled with escapes", b'{"ab":1,"\\u0061\\u0062":2}', TWICE, 8),
    ("duplicate key, a lone surrogate", b'{"\\ud800":1,"\\ud800":2}', TWICE, 12),
    ("duplicate key behind two bytes a letter", '{"ää":1,"ää":2}'.encode(), TWICE, 10),
    ("NaN", b'{"a":NaN}', "NaN and infinities", 5),
    ("Infinity", b"[1, Infinity]", "NaN and infinities", 4),
    ("-Infinity", b"[-Infinity]", "NaN and infinities", 1),
    ("NaN behind its own name in a string", b'["NaN", NaN]', "NaN and infinities", 8),
    ("1e400", b'{"a":"1e400","b":1e400}', RANGE, 17),
    ("-1e400", b"[-1e400]", RANGE, 1),
    ("1e400 behind four bytes a letter", '{"😀":1e400}'.encode(), RANGE, 8),
    ("4,301 digits", b"[" + b"9" * 4301 + b"]", RANGE, 1),
    ("-4,301 digits", b"[ -" + b"9" * 4301 + b"]", RANGE, 2),
    ("byte order mark", b"\xef\xbb\xbf{}", "byte order mark", 0),
    ("UTF-16", '{"a":1}'.encode("utf-16"), "byte order mark", 0),
    ("bad UTF-8", b'{"\xc3\xa4":"\xff"}', "not UTF-8", 7),
    ("half a letter", b'{"a":"\xf0\x9f\x98"}', "not UTF-8", 6),
    ("a surrogate in UTF-8", b'["\xed\xa0\x80"]', "not UTF-8", 2),
    ("cut off before a value", b'{"a":', NOT_JSON, 5),
    ("cut off inside a string", b'{"a":"bc', NOT_JSON, 5),
    ("cut off inside a list", b"[1,2", NOT_JSON, 4),
    ("cut off behind letters of three bytes", '["日本"'.encode(), NOT_JSON, 9),
    ("something after the value", b'{"a":1} x', "there is more text behind", 8),
    ("two values", b"{}{}", "there is more text behind", 2),
    # Python 3.13 names the comma as the fault. Earlier versions name the place where a value should follow.
    ("a comma too many", b"[1,]", NOT_JSON, 2 if sys.version_info >= (3, 13) else 3),
    ("a key without quotes", b"{a:1}", NOT_JSON, 1),
    ("single quotes", b"['a']", NOT_JSON, 1),
    ("a raw control character", b'["a\nb"]', NOT_JSON, 3),
    ("201 levels", b"[" * 201 + b"]" * 201, DEEP, 200),
    ("201 levels of objects", b'{"k":' * 201 + b"1" + b"}" * 201, DEEP, 1000),
    ("100,000 lists", b"[" * 100_000, DEEP, 200),
    ("100,000 closed lists", b"[" * 100_000 + b"]" * 100_000, DEEP, 200),
    ("100,000 objects", b'{"":' * 100_000, DEEP, 800),
]


@pytest.mark.parametrize(
    ("encoded", "reason", "offset"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE]
)
def test_what_two_readers_would_take_differently_is_refused_at_its_byte(
    encoded: bytes, reason: str, offset: int
) -> None:
    """Damage and ambiguity in a foreign file are refused with the offset, in bytes, of the first bad one."""
    with pytest.raises(json_codec.StrictError, match=reason) as caught:
        json_codec.decode_strict(encoded)
    assert caught.value.offset == offset


@pytest.mark.parametrize("value", [None, True, 0, -1, 0.5, -0.0, "text", "", [], {}, GREATEST, "\ud800"])
def test_a_single_value_is_a_document_for_the_strict_reader(value: Any) -> None:
    """Scalars are JSON, too. The codec does not decide whether a document may be one."""
    assert exactly(json_codec.decode_strict(json_codec.encode(value))) == exactly(value)


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        (b' { "a" : [ 1 , 2.50 ] } \n', {"a": [1, 2.5]}),
        (b'["\\ud83d\\ude00"]', ["😀"]),
        (b'{"a":{"b":1},"b":{"b":1}}', {"a": {"b": 1}, "b": {"b": 1}}),
        (b'{"a":"a","b":["a","a"]}', {"a": "a", "b": ["a", "a"]}),
        (b"[1E5,1e-400]", [100000.0, 0.0]),
    ],
)
def test_json_as_others_write_it_is_taken(encoded: bytes, value: Any) -> None:
    """Spaces, escapes, exponents and equal names in different objects are no damage."""
    assert exactly(json_codec.decode_strict(encoded)) == exactly(value)


@given(values, st.data())
def test_no_truncation_is_taken_for_a_whole_object(value: Any, data: st.DataObject) -> None:
    """Every proper beginning of an object is refused, at an offset inside it."""
    encoded = json_codec.encode({"value": value})
    beginning = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
    with pytest.raises(json_codec.StrictError) as caught:
        json_codec.decode_strict(beginning)
    assert 0 <= caught.value.offset <= len(beginning)


def strictly(encoded: bytes) -> Any:
    """Return the value that the strict reader reads from some bytes, or its error."""
    try:
        return json_codec.decode_strict(encoded)
    except json_codec.StrictError as error:
        return error


@given(st.binary(max_size=60) | st.text('{}[]",:\\u0aeNI-+.1 ', max_size=40).map(str.encode))
def test_the_strict_reader_accepts_or_says_where(encoded: bytes) -> None:
    """Any bytes give a value that JSON keeps exactly, or a `StrictError` with an offset."""
    outcome = strictly(encoded)
    if isinstance(outcome, json_codec.StrictError):
        assert 0 <= outcome.offset <= len(encoded)
    else:
        assert exactly(round_trip(outcome)) == exactly(outcome)
