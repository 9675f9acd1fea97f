"""The checkers of histories: the histories that they accept, and every kind of bug that they must catch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from harness.linearizability import (
    ABSENT,
    UNKNOWN,
    Operation,
    Owned,
    Prefix,
    Versioned,
    check_list,
    check_object,
    check_versions,
    ownership,
    register,
)
from hypothesis import given
from hypothesis import strategies as st


def op(
    kind: str, argument: Any, called: float, returned: float = math.inf, result: Any = UNKNOWN, process: int = 0
) -> Operation:
    return Operation(process, kind, argument, called, returned, result)


def append(
    item: str, called: float, returned: float = math.inf, *, answered: bool = True, version: str | None = None
) -> Operation:
    return op("append", item, called, returned, version if answered else UNKNOWN)


def extend(pair: str, called: float, returned: float = math.inf, *, answered: bool = True) -> Operation:
    return op("extend", tuple(pair), called, returned, None if answered else UNKNOWN)


def append_if(version: str, item: str, called: float, returned: float, result: Any) -> Operation:
    return op("append_if", (version, item), called, returned, result)


def read(items: str, called: float, returned: float, version: str | None = None) -> Operation:
    return op("read", None, called, returned, Prefix.of(items, version))


def count(number: int, called: float, returned: float, version: str | None = None) -> Operation:
    return op("count", None, called, returned, (number, version))


def tail(items: str, called: float, returned: float) -> Operation:
    return op("tail", None, called, returned, tuple(items))


def at(version: str, called: float, returned: float) -> Operation:
    return op("at", None, called, returned, version)


def kinds_in_list(history: Sequence[Operation], final: str) -> set[str]:
    return {anomaly.kind for anomaly in check_list(history, final)}


class TestLists:
    @pytest.mark.parametrize(
        ("history", "final"),
        [
            pytest.param([], "", id="nothing"),
            pytest.param([append("a", 0, 1), append("b", 2, 3), read("ab", 4, 5)], "ab", id="one-after-another"),
            pytest.param(
                [append("a", 0, 9), append("b", 1, 2), read("b", 3, 4)], "ba", id="concurrent-appends-in-either-order"
            ),
            pytest.param(
                [append("a", 0, 9), read("", 1, 2), read("a", 3, 4)], "a", id="a-read-during-an-append-sees-either"
            ),
            pytest.param([append("a", 0, 2), read("", 2, 3)], "a", id="touching-intervals-are-concurrent"),
            pytest.param([append("a", 0, 1), count(0, 0, 1), count(1, 2, 3)], "a", id="counts"),
            pytest.param(
                [append("a", 0, answered=False), read("", 1, 2), read("a", 8, 9)], "a", id="pending-takes-effect-late"
            ),
            pytest.param([append("a", 0, answered=False), read("", 8, 9)], "", id="pending-never-takes-effect"),
            pytest.param([append("a", 0, 1), op("read", None, 2)], "a", id="a-read-without-an-answer-says-nothing"),
            pytest.param([extend("ab", 0, 1), append("c", 2, 3), read("abc", 4, 5)], "abc", id="a-pair"),
            pytest.param([extend("ab", 0, 9), append("c", 0, 9), read("c", 1, 2)], "cab", id="concurrent-pair"),
            pytest.param([extend("ab", 0, answered=False), read("", 8, 9)], "", id="pending-pair-never-takes-effect"),
            pytest.param([extend("ab", 0, answered=False), read("ab", 8, 9)], "ab", id="pending-pair-takes-effect"),
            pytest.param([append(each, 0, 9) for each in "abcdefg"] + [tail("bcdef", 1, 8)], "abcdefg", id="a-tail"),
            pytest.param([tail("", 0, 1), append("a", 2, 3), tail("a", 4, 5)], "a", id="a-short-tail"),
            pytest.param(
                [read("", 0, 1, "V0"), append_if("V0", "a", 2, 3, (True, "V1")), at("V1", 4, 5)], "a", id="at-a-version"
            ),
            pytest.param(
                [
                    read("", 0, 1, "V0"),
                    append("b", 2, 3, version="V1"),
                    append_if("V0", "a", 4, 5, (False, "V1")),
                    count(1, 6, 7, "V1"),
                ],
                "b",
                id="version-that-has-gone",
            ),
            pytest.param([append("a", 0, answered=False), at("V1", 2, 3)], "a", id="version-that-nobody-else-has-seen"),
        ],
    )
    def test_linearizable_history_has_no_anomaly(self, history: list[Operation], final: str) -> None:
        """A history that some order explains is accepted."""
        assert check_list(history, final) == []

    @pytest.mark.parametrize(
        ("history", "final", "kind"),
        [
            pytest.param([append("a", 0, 1), append("b", 2, 3)], "a", "lost append", id="lost"),
            pytest.param([append("a", 0, 1), append("b", 2, 3)], "aba", "doubled append", id="doubled"),
            pytest.param([append("a", 0, answered=False)], "aa", "doubled append", id="doubled-unknown"),
            pytest.param([append("a", 0, 1)], "ax", "invented item", id="invented"),
            pytest.param([append("a", 0, 1), append("b", 2, 3)], "ba", "reordered appends", id="reordered"),
            pytest.param([append("a", 0, 1), read("", 2, 3)], "a", "stale read", id="stale"),
            pytest.param([append("a", 0, 1), count(0, 2, 3)], "a", "stale read", id="stale-count"),
            pytest.param([append("a", 0, 9), read("a", 1, 2), read("", 3, 4)], "a", "stale read", id="reads-go-back"),
            pytest.param(
                [append("a", 0, 2, answered=False), read("", 3, 4)], "a", "stale read", id="died-before-the-read"
            ),
            pytest.param([read("a", 0, 1), append("a", 2, 3)], "a", "read from the future", id="future"),
            pytest.param([count(1, 0, 1), append("a", 2, 3)], "a", "read from the future", id="future-count"),
            pytest.param([append("a", 0, 5), append("b", 0, 5), read("b", 1, 2)], "ab", "wrong items", id="no-prefix"),
            pytest.param([append("a", 0, 5), count(2, 1, 2)], "a", "wrong items", id="longer-than-the-final-list"),
            pytest.param([extend("ab", 0, 1)], "a", "lost append", id="half-a-pair-is-lost"),
            pytest.param([extend("ab", 0, answered=False)], "a", "split pair", id="half-a-pending-pair"),
            pytest.param([extend("ab", 0, 9), append("c", 0, 9)], "acb", "split pair", id="something-within-a-pair"),
            pytest.param([extend("ab", 0, 9)], "ba", "split pair", id="a-pair-the-other-way-round"),
            pytest.param([extend("ab", 0, 9), read("a", 1, 2)], "ab", "split pair", id="half-a-pair-is-seen"),
            pytest.param([extend("ab", 0, 9), tail("a", 1, 2)], "ab", "split pair", id="half-a-pair-at-the-end"),
            pytest.param([append("a", 0, 1), tail("", 2, 3)], "a", "stale read", id="stale-tail"),
            pytest.param([append("a", 0, 1), append("b", 2, 3), tail("b", 4, 5)], "ab", "wrong items", id="too-short"),
            pytest.param([append("a", 0, 9), tail("x", 1, 2)], "a", "wrong items", id="tail-of-nothing"),
            pytest.param(
                [append("a", 0, 1, version="V1"), append("b", 2, 3, version="V1")],
                "ab",
                "version of two commits",
                id="two-commits",
            ),
            pytest.param(
                [append("a", 0, 1, version="V1"), read("a", 2, 3, "V2")],
                "a",
                "commit of two versions",
                id="two-versions",
            ),
            pytest.param(
                [read("", 0, 1, "V0"), append("b", 2, 3), append_if("V0", "a", 4, 5, (True, "V2"))],
                "ba",
                "append to another version",
                id="another-version",
            ),
            pytest.param(
                [read("", 0, 1, "V0"), append_if("V0", "a", 2, 3, (False, "V0"))],
                "",
                "right version refused",
                id="refused",
            ),
            pytest.param(
                [read("", 0, 1, "V0"), append_if("V1", "a", 2, 3, (False, "V0"))],
                "a",
                "invented item",
                id="refused-and-written",
            ),
            pytest.param(
                [read("", 0, 1, "V0"), append("a", 2, 3, version="V1"), at("V0", 4, 5)],
                "a",
                "stale read",
                id="version-of-before",
            ),
            pytest.param(
                [
                    read("", 0, 1, "V0"),
                    append("a", 2, 3, version="V1"),
                    append_if("X", "b", 4, 5, (False, "V0")),
                ],
                "a",
                "stale read",
                id="mismatch-with-what-has-gone",
            ),
        ],
    )
    def test_planted_bug_is_named(self, history: list[Operation], final: str, kind: str) -> None:
        """Each planted bug gives its own anomaly, and no other."""
        assert kinds_in_list(history, final) == {kind}


START = Versioned(1, "START", "x")


def looks(*answers: Any) -> list[Operation]:
    """Return looks of several kinds at one instant: `exists`, `look` and `value`."""
    return [op(kind, None, 6, 7, answer) for kind, answer in zip(("exists", "look", "value"), answers, strict=True)]


def register_anomalies(*history: Operation) -> list[str]:
    return [anomaly.kind for anomaly in check_object(history, START, register)]


def write(value: str, called: float, returned: float = math.inf, *, answered: bool = True) -> Operation:
    """Return a write whose version is its value in capitals."""
    return op("write", value, called, returned, value.upper() if answered else UNKNOWN)


def seen(revision: int, value: str, called: float, returned: float) -> Operation:
    return op("read", None, called, returned, (revision, "START" if value == "x" else value.upper(), value))


class TestRegisters:
    @pytest.mark.parametrize(
        "history",
        [
            pytest.param([], id="nothing"),
            pytest.param([write("a", 0, 1), seen(2, "a", 2, 3)], id="write-then-read"),
            pytest.param(
                # Herlihy and Wing, 1990: overlapping operations may take effect in either order.
                [write("a", 0, 4), write("b", 1, 3), seen(3, "a", 5, 6)],
                id="overlapping-writes-in-either-order",
            ),
            pytest.param([write("a", 0, 9), seen(1, "x", 1, 2)], id="read-before-a-concurrent-write"),
            pytest.param(
                [op("swap", ("x", "a"), 0, 9, (True, "A")), op("swap", ("x", "b"), 0, 9, (False, "A"))], id="one-winner"
            ),
            pytest.param(
                [op("put", ("START", "a"), 0, 9, (True, "A")), op("put", ("START", "b"), 0, 9, (False, "A"))],
                id="one-winner-by-version",
            ),
            pytest.param(
                [
                    write("a", 0, answered=False),
                    op("put", ("START", "b"), 5, 6, (False, "A")),
                    op("put", ("A", "c"), 7, 8, (True, "C")),
                ],
                id="version-of-a-pending-write-is-told-by-a-mismatch",
            ),
            pytest.param(
                [op("swap", ("x", "a"), 0, 1, (True, None)), seen(2, "a", 2, 3)], id="version-that-was-not-told"
            ),
            pytest.param([write("a", 0, answered=False), seen(2, "a", 5, 6)], id="pending-write-took-effect"),
            pytest.param([write("a", 0, answered=False), seen(1, "x", 5, 6)], id="pending-write-had-no-effect"),
            pytest.param(
                [write("a", 0, answered=False), seen(1, "x", 1, 2), seen(2, "a", 8, 9)],
                id="pending-write-took-effect-late",
            ),
            pytest.param([op("delete", None, 0, 1, True), *looks(False, None, None)], id="deleted"),
            pytest.param([op("delete", None, 0, 9, True), op("delete", None, 0, 9, False)], id="deleted-once"),
            pytest.param(
                [op("delete", None, 0, 1, True), op("create", "a", 2, 3, "A"), *looks(True, (1, "A"), "a")],
                id="made-anew",
            ),
            pytest.param(
                [op("delete", None, 0, 1, True), write("a", 2, 3), seen(1, "a", 4, 5)], id="made-by-its-first-write"
            ),
            pytest.param([op("create", "a", 0, 1, False), *looks(True, (1, "START"), "x")], id="there-already"),
            pytest.param(
                [op("delete_if", "START", 0, 9, (True, None)), op("put", ("START", "a"), 0, 9, (False, None))],
                id="put-to-what-is-gone",
            ),
            pytest.param(
                [write("a", 0, 1), op("delete_if", "START", 2, 3, (False, "A")), seen(2, "a", 4, 5)],
                id="delete-of-a-version-that-has-gone",
            ),
            pytest.param([op("delete", None, 0), *looks(True, (1, "START"), "x")], id="pending-delete-had-no-effect"),
            pytest.param([op("delete", None, 0), *looks(False, None, None)], id="pending-delete-took-effect"),
        ],
    )
    def test_linearizable_history_has_an_order(self, history: list[Operation]) -> None:
        """A history that some order explains is accepted."""
        assert register_anomalies(*history) == []

    @pytest.mark.parametrize(
        "history",
        [
            pytest.param([write("a", 0, 1), seen(1, "x", 2, 3)], id="stale-read"),
            pytest.param([seen(2, "a", 0, 1), write("a", 2, 3)], id="read-from-the-future"),
            pytest.param([seen(2, "y", 0, 1)], id="value-of-nowhere"),
            pytest.param(
                [op("swap", ("x", "a"), 0, 9, (True, None)), op("swap", ("x", "b"), 0, 9, (True, None))],
                id="two-winners",
            ),
            pytest.param(
                [op("put", ("START", "a"), 0, 9, (True, "A")), op("put", ("START", "b"), 0, 9, (True, "B"))],
                id="two-winners-by-version",
            ),
            pytest.param(
                [write("a", 0, 1), op("read", None, 2, 3, (2, "Z", "a"))], id="read-of-another-version-than-was-written"
            ),
            pytest.param(
                [
                    write("a", 0, answered=False),
                    op("read", None, 2, 3, (2, "Y", "a")),
                    op("read", None, 4, 5, (2, "Z", "a")),
                ],
                id="two-versions-of-one-write",
            ),
            pytest.param([op("put", ("START", "a"), 0, 1, (False, "START"))], id="the-right-version-is-refused"),
            pytest.param(
                [write("a", 0, 1), op("put", ("START", "b"), 2, 3, (False, "Z"))], id="mismatch-with-what-never-stood"
            ),
            pytest.param([op("swap", ("x", "a"), 0, 1, (False, None))], id="no-winner"),
            pytest.param(
                [write("a", 0, 9), seen(2, "a", 1, 2), seen(1, "x", 3, 4)],
                id="reads-go-back",
            ),
            pytest.param(
                # After two concurrent writes, each reader sees another winner.
                [
                    write("a", 0, 1),
                    write("b", 0, 1),
                    seen(3, "a", 2, 3),
                    seen(3, "b", 2, 3),
                ],
                id="readers-disagree",
            ),
            pytest.param(
                [write("a", 0, 1), write("b", 2, 3), seen(3, "a", 4, 5)],
                id="lost-write",
            ),
            pytest.param(
                [write("a", 0, answered=False), seen(2, "a", 1, 2), seen(1, "x", 3, 4)],
                id="pending-write-is-undone",
            ),
            pytest.param(
                [write("a", 0, 2, answered=False), seen(1, "x", 3, 4), seen(2, "a", 5, 6)],
                id="dead-writes",
            ),
            pytest.param([op("delete", None, 0, 1, True), *looks(True, (1, "START"), "x")], id="deleted-and-there"),
            pytest.param([op("delete", None, 0, 1, True), op("delete", None, 2, 3, True)], id="deleted-twice"),
            pytest.param([op("create", "a", 0, 1, "A")], id="created-where-one-is"),
            pytest.param(
                [op("delete", None, 0, 1, True), op("create", "a", 2, 3, "A"), seen(3, "a", 4, 5)],
                id="revision-of-the-one-before",
            ),
            pytest.param([write("a", 0, 1), op("delete_if", "START", 2, 3, (True, None))], id="delete-of-any-version"),
            pytest.param([op("delete_if", "START", 0, 1, (False, "START"))], id="delete-of-the-right-one-is-refused"),
            pytest.param(
                [op("delete", None, 0, 1, True), op("put", ("START", "a"), 2, 3, (True, "A"))], id="put-that-revives"
            ),
            pytest.param([write("a", 0, 1), seen(1, "a", 2, 3)], id="write-that-made-it-anew"),
            pytest.param([op("look", None, 0, 1, (2, "START"))], id="look-at-another-revision"),
            pytest.param([op("value", None, 0, 1, None)], id="value-of-nothing"),
        ],
    )
    def test_planted_bug_has_no_order(self, history: list[Operation]) -> None:
        """Each of these answers is wrong in every order that the instants allow."""
        assert register_anomalies(*history) == ["not linearizable"]

    def test_the_first_operation_that_nothing_explains_is_named(self) -> None:
        """The error names the first operation that nothing explains. A long history is useless without that place."""
        stale = seen(1, "x", 4, 5)
        [anomaly] = check_object([write("a", 0, 1), stale, seen(2, "a", 6, 7)], START, register)
        assert str(stale) in anomaly.detail

    def test_many_concurrent_operations_are_searched_in_bounded_time(self) -> None:
        """The search ends soon.
        Without a memory for configurations, a dozen writes that cannot explain a read would be tried in 12! orders.
        """
        writes = [write("a", 0, 9) for _ in range(12)]
        assert register_anomalies(*writes, seen(13, "y", 10, 11)) == ["not linearizable"]

    def test_version_of_two_commits_is_named(self) -> None:
        """Two writes never have one version, whatever the order, and whichever operation reveals the version."""
        history = [write("a", 0, 1), op("swap", ("a", "b"), 2, 3, (True, "A")), seen(3, "b", 4, 5)]
        assert [anomaly.kind for anomaly in check_versions(history)] == ["version of two commits"]
        assert check_versions([write("a", 0, 1), seen(2, "a", 2, 3), write("b", 4, 5)]) == []


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Draw operations that took effect one after another at instants of their own, with intervals around these.

    No operation names a version that no operation was told.
    """
    state, versions = START, {START.version}
    history = []
    for instant in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["read", "write", "swap", "put", "delete", "exists"]))
        value = f"v{instant}"
        is_named = kind != "put" or state.version in versions
        other = state if is_named and draw(st.booleans()) else Versioned(99, "O", "other")
        argument = {"write": value, "swap": (other.value, value), "put": (other.version, value)}.get(kind)
        is_write = kind == "write" or (kind in ("swap", "put") and other is state and state.is_there)
        was_there = state.is_there
        state = state.after(value, value.upper()) if is_write else ABSENT if kind == "delete" else state
        told = state.version if draw(st.booleans()) else None
        results = {"read": state if state.is_there else None, "write": state.version, "delete": was_there}
        result = (results | {"exists": was_there, "swap": (is_write, told), "put": (is_write, told)})[kind]
        called, returned = instant * 10 - draw(st.integers(0, 30)), instant * 10 + draw(st.integers(0, 30))
        is_told = draw(st.booleans())
        if is_told and (kind in ("read", "write") or (kind in ("swap", "put") and told is not None)):
            versions.add(state.version)
        history.append(op(kind, argument, called, returned, result if is_told else UNKNOWN, process=instant))
    return draw(st.permutations(history))


@given(histories())
def test_whatever_took_effect_one_after_another_is_linearizable(history: list[Operation]) -> None:
    """There is no false alarm: a history made from a sequence is accepted, whatever overlaps or loses its answer."""
    assert register_anomalies(*history) == []
    assert check_versions(history) == []


def owner_anomalies(*history: Operation) -> list[str]:
    return [anomaly.kind for anomaly in check_object(history, Owned(), ownership)]


def dies(process: int, called: float, returned: float) -> Operation:
    return op("die", None, called, returned, None, process=process)


class TestOwners:
    @pytest.mark.parametrize(
        "history",
        [
            pytest.param(
                [op("start", "s", 0, 1, None), op("read", None, 2, 3, "s"), op("end", "s", 4, 5, True)], id="a-turn"
            ),
            pytest.param([op("start", "s", 0, 9, None), op("start", "t", 0, 9, "s")], id="one-winner"),
            pytest.param(
                [op("start", "s", 0, 1, None, 7), dies(7, 2, 3), op("clear", "s", 4, 5, True)], id="dead-then-cleared"
            ),
            pytest.param(
                [op("start", "s", 0, 1, None, 7), dies(7, 2, 3), op("start", "t", 4, 5, None)], id="dead-then-replaced"
            ),
            pytest.param(
                [op("start", "s", 0, 3, UNKNOWN, 7), dies(7, 2, 3), op("read", None, 4, 5, None)], id="killed-too-soon"
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("cancel", "s", 2, 3, True), op("asked", "s", 4, 5, True)], id="cancel"
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("force", "s", 2, 3, True), op("end", "s", 4, 5, False)], id="fenced"
            ),
            pytest.param([op("start", "s", 0, 1, None), op("cancel", "t", 2, 3, False)], id="cancel-of-another"),
            pytest.param([op("start", "s", 0, 1, None), op("held", "s", 2, 3, True)], id="held"),
            pytest.param(
                [op("start", "s", 0, 1, None), op("again", ("t", "s"), 2, 3, ("runs", "s"))], id="again-while-it-runs"
            ),
            pytest.param(
                [
                    op("start", "s", 0, 1, None),
                    op("force", "s", 2, 3, True),
                    op("again", ("t", "s"), 4, 5, ("has started", "t")),
                    op("read", None, 6, 7, "t"),
                ],
                id="again-after-it-was-taken-away",
            ),
            pytest.param(
                [
                    op("start", "s", 0, 1, None),
                    op("force", "s", 2, 3, True),
                    op("start", "u", 4, 5, None),
                    op("again", ("t", "s"), 6, 7, ("is busy", "u")),
                ],
                id="again-while-another-runs",
            ),
        ],
    )
    def test_linearizable_history_has_an_order(self, history: list[Operation]) -> None:
        """A history that some order explains is accepted."""
        assert owner_anomalies(*history) == []

    @pytest.mark.parametrize(
        "history",
        [
            pytest.param(
                [op("start", "s", 0, 9, None), op("start", "t", 0, 9, None), op("end", "s", 10, 11, True)],
                id="two-owners",
            ),
            pytest.param([op("start", "s", 0, 1, None), op("clear", "s", 2, 3, True)], id="live-stream-cleared"),
            pytest.param(
                [op("start", "s", 0, 1, None, 7), dies(7, 2, 3), op("clear", "s", 4, 5, False)], id="dead-stream-spared"
            ),
            pytest.param(
                [op("start", "s", 0, 1, None, 7), dies(7, 2, 3), op("start", "t", 4, 5, "s")],
                id="stuck-behind-a-dead-stream",
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("force", "s", 2, 3, True), op("end", "s", 4, 5, True)],
                id="not-fenced",
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("cancel", "s", 2, 3, True), op("asked", "s", 4, 5, False)], id="deaf"
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("end", "s", 2, 3, True), op("read", None, 4, 5, "s")],
                id="ended-yet-shown",
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("force", "s", 2, 3, True), op("held", "s", 4, 5, True)],
                id="held-and-not-fenced",
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("again", ("t", "s"), 2, 3, ("has started", "t"))],
                id="started-twice",
            ),
            pytest.param(
                [op("start", "s", 0, 1, None), op("again", ("t", "s"), 2, 3, ("is busy", "s"))],
                id="running-prompt-not-recognised",
            ),
        ],
    )
    def test_planted_bug_has_no_order(self, history: list[Operation]) -> None:
        """Two owners, a cleared live stream, a spared dead one, and a missing fence are each caught."""
        assert owner_anomalies(*history) == ["not linearizable"]
