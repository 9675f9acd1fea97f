"""The checkers of histories: what they accept, and every kind of bug that they must catch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from harness.linearizability import (
    UNKNOWN,
    Operation,
    Owned,
    Prefix,
    Versioned,
    check_list,
    check_object,
    ownership,
    register,
)
from hypothesis import given
from hypothesis import strategies as st


def op(
    kind: str, argument: Any, called: float, returned: float = math.inf, result: Any = UNKNOWN, process: int = 0
) -> Operation:
    return Operation(process, kind, argument, called, returned, result)


def append(item: str, called: float, returned: float = math.inf, *, answered: bool = True) -> Operation:
    return op("append", item, called, returned, None if answered else UNKNOWN)


def read(items: str, called: float, returned: float) -> Operation:
    return op("read", None, called, returned, Prefix.of(items))


def count(number: int, called: float, returned: float) -> Operation:
    return op("count", None, called, returned, number)


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
        ],
    )
    def test_linearizable_history_has_no_anomaly(self, history: list[Operation], final: str) -> None:
        """What can be explained is accepted."""
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
        ],
    )
    def test_planted_bug_is_named(self, history: list[Operation], final: str, kind: str) -> None:
        """Each bug has its anomaly, and no other."""
        assert kinds_in_list(history, final) == {kind}


def register_anomalies(*history: Operation) -> list[str]:
    return [anomaly.kind for anomaly in check_object(history, Versioned(0, "x"), register)]


class TestRegisters:
    @pytest.mark.parametrize(
        "history",
        [
            pytest.param([], id="nothing"),
            pytest.param([op("write", "a", 0, 1, None), op("read", None, 2, 3, (1, "a"))], id="write-then-read"),
            pytest.param(
                # Herlihy and Wing, 1990: overlapping operations may take effect in either order.
                [op("write", "a", 0, 4, None), op("write", "b", 1, 3, None), op("read", None, 5, 6, (2, "a"))],
                id="overlapping-writes-in-either-order",
            ),
            pytest.param(
                [op("write", "a", 0, 9, None), op("read", None, 1, 2, (0, "x"))], id="read-before-a-concurrent-write"
            ),
            pytest.param([op("swap", ("x", "a"), 0, 9, True), op("swap", ("x", "b"), 0, 9, False)], id="one-winner"),
            pytest.param([op("put", (0, "a"), 0, 9, 0), op("put", (0, "b"), 0, 9, 1)], id="one-winner-by-revision"),
            pytest.param([op("write", "a", 0), op("read", None, 5, 6, (1, "a"))], id="pending-write-took-effect"),
            pytest.param([op("write", "a", 0), op("read", None, 5, 6, (0, "x"))], id="pending-write-had-no-effect"),
            pytest.param(
                [op("write", "a", 0), op("read", None, 1, 2, (0, "x")), op("read", None, 8, 9, (1, "a"))],
                id="pending-write-took-effect-late",
            ),
        ],
    )
    def test_linearizable_history_has_an_order(self, history: list[Operation]) -> None:
        """What can be explained is accepted."""
        assert register_anomalies(*history) == []

    @pytest.mark.parametrize(
        "history",
        [
            pytest.param([op("write", "a", 0, 1, None), op("read", None, 2, 3, (0, "x"))], id="stale-read"),
            pytest.param([op("read", None, 0, 1, (1, "a")), op("write", "a", 2, 3, None)], id="read-from-the-future"),
            pytest.param([op("read", None, 0, 1, (1, "y"))], id="value-of-nowhere"),
            pytest.param([op("swap", ("x", "a"), 0, 9, True), op("swap", ("x", "b"), 0, 9, True)], id="two-winners"),
            pytest.param([op("put", (0, "a"), 0, 9, 0), op("put", (0, "b"), 0, 9, 0)], id="two-winners-by-revision"),
            pytest.param([op("swap", ("x", "a"), 0, 1, False)], id="no-winner"),
            pytest.param(
                [op("write", "a", 0, 9, None), op("read", None, 1, 2, (1, "a")), op("read", None, 3, 4, (0, "x"))],
                id="reads-go-back",
            ),
            pytest.param(
                # After two concurrent writes, each reader sees another winner.
                [
                    op("write", "a", 0, 1, None),
                    op("write", "b", 0, 1, None),
                    op("read", None, 2, 3, (2, "a")),
                    op("read", None, 2, 3, (2, "b")),
                ],
                id="readers-disagree",
            ),
            pytest.param(
                [op("write", "a", 0, 1, None), op("write", "b", 2, 3, None), op("read", None, 4, 5, (2, "a"))],
                id="lost-write",
            ),
            pytest.param(
                [op("write", "a", 0), op("read", None, 1, 2, (1, "a")), op("read", None, 3, 4, (0, "x"))],
                id="pending-write-is-undone",
            ),
            pytest.param(
                [op("write", "a", 0, 2), op("read", None, 3, 4, (0, "x")), op("read", None, 5, 6, (1, "a"))],
                id="dead-writes",
            ),
        ],
    )
    def test_planted_bug_has_no_order(self, history: list[Operation]) -> None:
        """Each of these answers is wrong in every order that the instants allow."""
        assert register_anomalies(*history) == ["not linearizable"]

    def test_the_first_operation_that_nothing_explains_is_named(self) -> None:
        """A long history is of no use without the place to look at."""
        stale = op("read", None, 4, 5, (0, "x"))
        [anomaly] = check_object(
            [op("write", "a", 0, 1, None), stale, op("read", None, 6, 7, (1, "a"))], Versioned(0, "x"), register
        )
        assert str(stale) in anomaly.detail

    def test_many_concurrent_operations_are_searched_in_bounded_time(self) -> None:
        """Without a memory for configurations, a dozen writes that cannot explain a read would be put into 12!
        orders.
        """
        writes = [op("write", "a", 0, 9, None) for _ in range(12)]
        assert register_anomalies(*writes, op("read", None, 10, 11, (12, "y"))) == ["not linearizable"]


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Operations that took effect one after another at instants of their own, with intervals drawn around these."""
    state = Versioned(0, "x")
    history = []
    for instant in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["read", "write", "swap", "put"]))
        value = f"v{instant}"
        seen = state if draw(st.booleans()) else Versioned(99, "other")
        argument = {"read": None, "write": value, "swap": (seen.value, value), "put": (seen.revision, value)}[kind]
        before, after = draw(st.integers(0, 30)), draw(st.integers(0, 30))
        operation = op(kind, argument, instant * 10 - before, instant * 10 + after, process=instant)
        state, result = register(state, operation)
        history.append(
            op(kind, argument, operation.called, operation.returned, UNKNOWN if draw(st.booleans()) else result)
        )
    return draw(st.permutations(history))


@given(histories())
def test_whatever_took_effect_one_after_another_is_linearizable(history: list[Operation]) -> None:
    """No false alarm: a history made from a sequence is accepted,
    whatever the overlap and whichever answers were lost.
    """
    assert register_anomalies(*history) == []


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
        ],
    )
    def test_linearizable_history_has_an_order(self, history: list[Operation]) -> None:
        """What can be explained is accepted."""
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
        ],
    )
    def test_planted_bug_has_no_order(self, history: list[Operation]) -> None:
        """Two owners, a cleared live stream, a spared dead one, a missing fence: each is caught."""
        assert owner_anomalies(*history) == ["not linearizable"]
