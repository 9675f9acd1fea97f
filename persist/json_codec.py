"""Strict JSON: a value comes back as it was, type for type, or it is refused.

msgspec does the work. It is fast, but it quietly turns sets, bytes and dates into other things, and NaN into null. So
`check` refuses, before encoding, each value that would not come back as it was. The standard library encodes the
values that msgspec cannot hold (a lone surrogate).

The two halves of a surrogate pair mean one character, and become it. A model's tokens may cut an emoji in two. A caller
that puts the tokens together then has both halves side by side.

`decode` trusts its input. `decode_strict` is for files that no checksum vouches for.

The limits are 200 levels of nesting, and integers up to 4,300 digits. A document has at most 512 MiB. An item has at
most 10 million values, which also ends the check of a list that contains itself many times over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from typing import Any

import msgspec

from persist.errors import NotJSON, ValuePath

MAX_DEPTH = 200
MAX_DIGITS = 4300
MAX_VALUES = 10_000_000
MAX_BYTES = 512 * 1024 * 1024

_MAX_INT = 10**MAX_DIGITS
# An integer of fewer bits surely has few enough digits. Only the others need the exact comparison.
_SAFE_BITS = 14_000

_encoder = msgspec.json.Encoder()
_encode = _encoder.encode
_encode_canonical = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder().decode


def same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values have the same types and values all through. The order of keys does not count."""
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is dict:
        return len(one) == len(other) and all(key in other and same(one[key], other[key]) for key in one)
    if kind is list:
        return len(one) == len(other) and all(map(same, one, other))
    if kind is float:
        return bool(one == other) and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def canonical(value: Any) -> bytes:
    """Return a text of a JSON value. Two values have the same text if `same` holds for them, and only then."""
    try:
        return _encode_canonical(value)
    except UnicodeEncodeError:
        # The value holds a lone surrogate. No text of msgspec holds one, so the texts stay distinct.
        return json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")


def check(value: Any, path: ValuePath = ()) -> None:
    """Raise `NotJSON`, naming the place, unless `value` would come back from JSON exactly as it is.

    Only exact types pass, because a subclass (an enum, an OrderedDict) would come back as its base. The check is
    iterative, so that no nesting of the value can exhaust Python's stack.
    """
    pending = [(value, path)] if _is_container(value, path) else []
    budget = MAX_VALUES
    while pending:
        container, here = pending.pop()
        budget -= len(container)
        if len(here) >= MAX_DEPTH or budget < 0:
            raise NotJSON(path=here, reason=f"nested deeper than {MAX_DEPTH} levels, too large, or containing itself")
        if type(container) is dict:
            if not _KEYS.issuperset(map(type, container)):
                other = next(type(key) for key in container if type(key) is not str)
                raise NotJSON(path=here, reason=f"a key is {_name(other)}, and JSON has only string keys")
            # Most messages hold only strings, and one call finds that out.
            if PLAIN.issuperset(map(type, container.values())):
                continue
            children: Iterable[tuple[str | int, Any]] = list(container.items())
        else:
            children = enumerate(container)
        pending += [(child, (*here, key)) for key, child in children if _is_container(child, here, key)]


#: The types whose values have exactly one JSON form, and hold no other value.
PLAIN = frozenset({str, bool, type(None)})
_KEYS = frozenset({str})


def _is_container(value: Any, *path: Any) -> bool:
    """Tell a dict or list from a leaf, and refuse any other value. `path` is a path and, for a child, its key."""
    kind = type(value)
    if kind is dict or kind is list:
        return True
    if kind in PLAIN or (kind is int and (value.bit_length() <= _SAFE_BITS or abs(value) < _MAX_INT)):
        return False
    if kind is float and math.isfinite(value):
        return False
    raise NotJSON(path=(*path[0], *path[1:]), reason=_advice(kind))


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _advice(kind: type) -> str:
    if kind is int:
        return f"an integer has at most {MAX_DIGITS:,} digits"
    if kind is float:
        return "NaN and infinities have no JSON form"
    hints = {
        "WorkingList": "convert it with list()",
        "Fields": "convert it with dict()",
        "tuple": "convert it with list()",
        "set": "convert it with sorted()",
        "bytes": "decode it",
    }
    hint = hints.get(kind.__name__, "convert it, with str() or .isoformat() say, or to a dict of its fields")
    for plain in (str, int, float, dict, list):
        if issubclass(kind, plain):
            hint = f"convert it with {plain.__name__}()"
    return f"it is {_name(kind)}; {'take its .value' if issubclass(kind, Enum) else hint}"


def encode_exact(value: Any, path: ValuePath = ()) -> bytes:
    """Check and encode a value."""
    # Most messages hold only strings. They need no walk, and no call of `encode`.
    if type(value) is not dict or not {*map(type, value)} <= _KEYS or not {*map(type, value.values())} <= PLAIN:
        check(value, path)
    try:
        return _encode(value)
    except UnicodeEncodeError:
        return _encode_surrogates(value, path)


def encode_unchecked(value: Any) -> bytes | None:
    """Encode a value that may have no exact JSON form. Return None if it has no JSON form at all."""
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError):
        return None


def encode_all_unchecked(items: list[Any]) -> list[bytes] | None:
    """Encode each item as `encode_unchecked` does, all of them or none."""
    lines = encode_lines_unchecked(items)
    return None if lines is None else lines.split(b"\n")[:-1]


def encode_lines_unchecked(items: list[Any]) -> bytes | None:
    """Encode each item as `encode_unchecked` does, and a newline behind each: all of them or none."""
    try:
        return _encoder.encode_lines(items)
    except (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError):
        return None


def encode(value: Any, path: ValuePath = ()) -> bytes:
    """Encode a value that `check` has accepted, without spaces.

    The same value always gives the same bytes, and equal bytes mean equal values of equal types. An error names `path`,
    the place of the value.
    """
    try:
        return _encode(value)
    except UnicodeEncodeError:
        return _encode_surrogates(value, path)


@lru_cache(maxsize=1024)
def encode_key(name: str) -> bytes:
    """Encode the name of a top-level value, and the colon behind it. Cached, because sessions have the same names."""
    return encode(name, (name,)) + b":"


_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def joined(text: str) -> str:
    """Join the halves of each surrogate pair into the character that they mean. A lone half stays as it is."""
    if text.isascii() or _PAIR.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _encode_surrogates(value: Any, path: ValuePath) -> bytes:
    """Encode a value with a surrogate in it. Every other part of it has its usual bytes.

    So the value has the same bytes as the value that is read back, in which the halves of pairs are joined.
    """
    if isinstance(value, list | tuple):
        return b"[%b]" % b",".join([encode(item, path) for item in value])
    if type(value) is dict:
        if len({*map(joined, value)}) < len(value):
            raise twins(path)
        return b"{%b}" % b",".join([encode(key, path) + b":" + encode(item, path) for key, item in value.items()])
    text = joined(value)
    try:
        return _encode(text)
    except UnicodeEncodeError:
        return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace")


def twins(path: ValuePath) -> NotJSON:
    """Return the error for an object that would have a key twice."""
    return NotJSON(path=path, reason="two of its keys become the same key when surrogate pairs are joined")


class Undecodable(ValueError):
    """A text that `encode` cannot have written."""


def decode(encoded: bytes | memoryview) -> Any:
    """Decode JSON that `encode` has written. Raise `Undecodable` for anything else."""
    try:
        return _decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        # It may be a lone surrogate, which msgspec does not read. Real damage raises here, too.
        return json.loads(bytes(encoded).decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Undecodable(type(error).__name__) from None


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal} is not JSON")
    return number


class StrictError(ValueError):
    """Foreign JSON that cannot be taken as it is. `offset` counts bytes."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.offset = offset


def decode_strict(encoded: bytes) -> Any:
    """Decode JSON from another program. Raise `StrictError` if one reader would take it and another would not.

    It refuses a byte order mark, bad UTF-8, duplicate keys, NaN and infinities (also as 1e400), integers and nesting
    over the limits, and anything after the value.
    """
    if not encoded.strip(b"\0"):
        # A power cut leaves zeros where a program did not sync.
        raise StrictError("it holds nothing but zeros." if encoded else "it is empty.", 0)
    for mark, name in _MARKS.items():
        if encoded.startswith(mark):
            raise StrictError(f"it begins with a byte order mark ({name}).", 0)
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        raise StrictError("it is not UTF-8.", error.start) from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        check(value)
    except json.JSONDecodeError as error:
        reason, position = _not_json(text, error.pos)
        raise StrictError(reason, len(text[:position].encode())) from None
    except (ValueError, RecursionError):
        # A key twice, an integer of too many digits, or a value that `check` refuses.
        reason, position = _locate(text)
        raise StrictError(reason, len(text[:position].encode())) from None
    return value


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MARKS = {BYTE_ORDER_MARK: "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def _not_json(text: str, position: int) -> tuple[str, int]:
    """Tell why a text is not one JSON value, and where that shows."""
    if not text.strip():
        return "it is empty.", 0
    with suppress(ValueError, RecursionError):
        start = len(text) - len(text.lstrip())
        _, end = json.JSONDecoder().raw_decode(text, start)
        rest = text[end:].lstrip()
        if rest and "\n" in text[end : len(text) - len(rest)]:
            json.JSONDecoder().raw_decode(rest)
            return "it has one JSON value a line: it is JSONL, and no document.", len(text) - len(rest)
        return "there is more text behind its JSON value.", position
    return "it is not JSON, or it was cut off.", position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(?:\s*:)?|[{}\[\]]|-?Infinity|NaN|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)


def _locate(text: str) -> tuple[str, int]:
    """Find the refused value, because neither the parser's hook nor `check` knows its place in the text."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        literal, start = token[0], token.start()
        if literal in "{[":
            keys.append(set())
            if len(keys) > MAX_DEPTH:
                return f"it is nested deeper than {MAX_DEPTH} levels.", start
        elif literal in "}]":
            keys.pop()
        elif literal[-1] == ":":
            key = json.loads(literal[:-1])
            if key in keys[-1]:
                return "an object has the same key twice.", start
            keys[-1].add(key)
        elif literal[0] == '"':
            continue
        elif literal in ("NaN", "Infinity", "-Infinity"):
            return "NaN and infinities are not JSON.", start
        elif math.isinf(float(literal)) if re.search("[.eE]", literal) else len(literal.lstrip("-")) > MAX_DIGITS:
            return "a number is out of range.", start
    return "it cannot be read exactly.", 0
