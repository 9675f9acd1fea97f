"""Lazy data is a dict like any other, but that some of it is read when somebody looks at it: then, and once."""

from __future__ import annotations

import copy
import json
import pickle
import random
import threading
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import msgspec
import pytest

from persist.lazy import BY_KEY, OF_ALL, Data, LazyData

LATE = ("messages", "tool_calls")
KNOWN: Data = {"title": "Locks", "tags": ["a"]}
READ: Data = {"messages": [{"id": "m1"}]}
ALL = KNOWN | READ


class Reader:
    """Reads new lists each time, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Data:
        self.times += 1
        return copy.deepcopy(READ)


def lazy(reader: Callable[[], Data] | None = None) -> LazyData:
    return LazyData(copy.deepcopy(KNOWN), LATE, reader or Reader())


def test_every_method_of_a_dict_is_thought_of() -> None:
    """One that a new version of Python brings cannot go past what has not been read."""
    own = {name for name, value in vars(LazyData).items() if callable(value)}
    of_no_content = {"__class_getitem__", "__getattribute__", "__new__", "__sizeof__", "fromkeys"}
    not_for_dicts = {"__ge__", "__gt__", "__le__", "__lt__"}
    assert {name for name in vars(dict) if callable(getattr(dict, name))} - own == of_no_content | not_for_dicts
    assert own >= {*BY_KEY, *OF_ALL}


@pytest.mark.parametrize(
    "use",
    [
        lambda data: data["title"],
        lambda data: data.get("nothing", 5),
        lambda data: "title" in data,
        lambda data: data.pop("title"),
        lambda data: data.setdefault("n", 1),
        lambda data: data.update(title="Other", n=1),
        lambda data: data.update({"n": 1}),
        lambda data: data.update([("n", 1)]),
        lambda data: data.__setitem__("n", 1),
        lambda data: data.__delitem__("title"),
        lambda data: data["tags"].append("b"),
    ],
)
def test_what_is_known_is_used_without_reading(use: Callable[[Data], Any]) -> None:
    """All that names a key which is not late; what comes of it is what comes of it in a plain dict."""
    reader, plain = Reader(), copy.deepcopy(ALL)
    data = lazy(reader)
    assert use(data) == use(plain)
    assert reader.times == 0
    known, is_all = data.known()
    assert (known | READ, is_all) == (plain, False)
    assert reader.times == 0
    assert data == plain


@pytest.mark.parametrize(
    "use",
    [
        lambda data: data["messages"],
        lambda data: data.get("tool_calls"),
        lambda data: "messages" in data,
        lambda data: "tool_calls" in data,
        lambda data: data.pop("messages"),
        lambda data: data.setdefault("tool_calls", []),
        lambda data: data.update(messages=[]),
        lambda data: data.update([("tool_calls", [])]),
        lambda data: data.__setitem__("messages", []),
        lambda data: data.__delitem__("messages"),
        len,
        list,
        lambda data: list(reversed(data)),
        lambda data: list(data.items()),
        lambda data: [*data.values(), *data.keys()],
        lambda data: data.popitem(),
        lambda data: data.clear(),
        lambda data: data.copy(),
        lambda data: data == ALL,
        lambda data: data != ALL,
        lambda data: data == lazy(),
        lambda data: data | {"n": 1},
        lambda data: {"n": 1} | data,
        lambda data: data | lazy(),
        lambda data: data.__ior__({"messages": []}),
        repr,
        str,
        lambda data: f"{data}",
        dict,
        lambda data: {**data},
        lambda data: dict(**data),
        lambda data: dict[str, Any]().__ior__(data),
        json.dumps,
        lambda data: json.dumps(data, indent=1),
        copy.copy,
        copy.deepcopy,
        lambda data: pickle.loads(pickle.dumps(data)),
        bool,
    ],
)
def test_what_is_late_is_read_for_whoever_looks_at_it(use: Callable[[Data], Any]) -> None:
    """And once: what comes of it, and what is left, is what it is with a plain dict."""
    reader, plain = Reader(), copy.deepcopy(ALL)
    data = lazy(reader)
    assert use(data) == use(plain)
    assert reader.times == 1
    assert data.known() == (plain, True)
    assert data == plain
    assert reader.times == 1


def test_match_statement_reads() -> None:
    """It asks for keys by a way of its own."""
    match lazy():
        case {"messages": [first]}:
            assert first == {"id": "m1"}
        case _:
            pytest.fail("There are messages.")


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_uses_comes_to_the_same(seed: int) -> None:
    """Random reads and changes, on lazy data and on a plain dict."""
    dice = random.Random(seed)
    data: Data = lazy()
    plain = copy.deepcopy(ALL)
    for _ in range(30):
        key = dice.choice(["title", "n", "messages", "tool_calls"])
        value = dice.choice([1, "x", []])
        uses: list[Callable[[Data], Any]] = [
            methodcaller("get", key),
            methodcaller("pop", key, None),
            methodcaller("setdefault", key, value),
            methodcaller("update", {key: value}),
            methodcaller("__contains__", key),
        ]
        use = dice.choice(uses * 3 + [len, sorted])
        assert use(data) == use(plain)
    assert data == plain


def test_lists_that_were_read_are_its_own() -> None:
    """What is done to them is done to its data."""
    data = lazy()
    data["messages"].append({"id": "m2"})
    assert data["messages"] == [{"id": "m1"}, {"id": "m2"}]


def test_what_cannot_be_read_goes_to_whoever_asks() -> None:
    """All is as before then: it can be asked for again, and what is known is there."""

    def fail_first() -> Data:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("not now")
        return copy.deepcopy(READ)

    attempts: list[int] = []
    data = lazy(fail_first)
    with pytest.raises(OSError, match="not now"):
        len(data)
    assert data["title"] == "Locks"
    assert data == ALL


def test_threads_get_the_same_lists() -> None:
    """Who comes while it is read waits for that: it must not replace what the first one has changed.

    Fails without the lock of `LazyData.fill`.
    """
    readers: list[int] = []
    somebody_reads, another_reads = threading.Event(), threading.Event()

    def read() -> Data:
        readers.append(threading.get_ident())
        (somebody_reads if len(readers) == 1 else another_reads).set()
        another_reads.wait(0.2)
        return copy.deepcopy(READ)

    data = lazy(read)
    threads = [threading.Thread(target=lambda: data["messages"].append(threading.get_ident())) for _ in range(2)]
    threads[0].start()
    assert somebody_reads.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert len(readers) == 1
    assert len(data["messages"]) == 3


def test_half_read_is_never_taken_for_all() -> None:
    """Who wants what is known waits for a thread that reads: lists that it has not put there yet are not missing.

    Fails without the lock of `LazyData.known`.
    """
    is_reading, is_asking = threading.Event(), threading.Event()

    def read() -> Data:
        is_reading.set()
        is_asking.wait(0.2)
        return copy.deepcopy(READ)

    data = lazy(read)
    reader = threading.Thread(target=lambda: data["messages"])
    reader.start()
    assert is_reading.wait(10)
    found = data.known()
    is_asking.set()
    reader.join(10)
    assert found == (ALL, True)


def test_one_that_is_read_while_it_is_read_keeps_the_first_lists() -> None:
    """A signal handler may look at it in the middle: the lists that it was given stay."""
    inner: list[Any] = []

    def read() -> Data:
        if not inner:
            inner.append(None)
            inner[0] = data["messages"]
        return copy.deepcopy(READ)

    data = lazy(read)
    assert data["messages"] is inner[0]


def test_c_code_that_goes_past_the_methods_is_refused() -> None:
    """It finds something that it can make nothing of, not a document without messages."""
    with pytest.raises(TypeError, match="_Unread"):
        msgspec.json.encode(lazy())
    assert msgspec.json.decode(msgspec.json.encode(dict(lazy()))) == ALL
