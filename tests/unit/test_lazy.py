"""Lazy data is a dict like any other, but that some of it is read when somebody looks at it: then, and once."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from types import FrameType
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
    """Both read at once; who comes second must not replace what the first one has changed, or lose its own change."""
    both_read = threading.Barrier(2, timeout=20)

    def read() -> Data:
        both_read.wait()
        return copy.deepcopy(READ)

    data = lazy(read)
    threads = [threading.Thread(target=lambda: data["messages"].append(threading.get_ident())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(data["messages"]) == 3


class AtLine:
    """Lets something be done at one line of the module, as a signal handler does it."""

    def __init__(self, place: int, interfere: Callable[[], object]) -> None:
        self.left = place
        self._interfere = interfere

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.endswith("persist/lazy.py"):
            return None
        if event in ("line", "return"):
            self.left -= 1
            if self.left == 0:
                self._interfere()
        return self


def interfered(
    use: Callable[[LazyData], Any], interfere: Callable[[LazyData], object]
) -> Iterator[tuple[LazyData, Any]]:
    """Use new data again and again, with an interference at the first line, at the second one, and so on."""
    for place in itertools.count(1):
        data = lazy()
        before, at_line = sys.gettrace(), AtLine(place, partial(interfere, data))
        sys.settrace(at_line)
        try:
            result = use(data)
        finally:
            sys.settrace(before)
        if at_line.left > 0:
            assert place > 3
            return
        yield data, result


def test_what_is_known_is_of_one_instant() -> None:
    """A signal handler that reads the lists at any line: what is taken is all, or without the lists, and said to be so.

    Fails if what is late is looked at twice: the small fields would pass for the whole document.
    """
    for _, found in interfered(LazyData.known, lambda data: data["messages"]):
        assert found in [(KNOWN, False), (ALL, True)]


def test_handler_and_its_thread_get_the_same_lists() -> None:
    """Whoever is first; and what one of them sets stays. Fails if lists that were read meanwhile are put in their place."""
    for data, _ in interfered(lambda data: data["messages"].append(1), lambda data: data["messages"].append(2)):
        assert sorted(data["messages"][1:]) == [1, 2]
    for data, _ in interfered(LazyData.fill, lambda data: data.update(tool_calls=[3], messages=[4])):
        assert data.known() == (KNOWN | {"tool_calls": [3], "messages": [4]}, True)


def test_it_can_be_made_like_any_dict() -> None:
    """As code does that makes a container of the same kind out of what it has changed."""
    for made in (LazyData(), LazyData(ALL), LazyData(list(ALL.items())), type(lazy())(lazy()), LazyData.fromkeys("ab")):
        assert made == dict(made)
    assert type(lazy())(lazy()) == ALL


def test_names_of_its_parameters_are_no_keys_of_its_own() -> None:
    """Any field can be set by its name."""
    data = lazy()
    data.update(self=1, key=2, others=3)
    assert data == ALL | {"self": 1, "key": 2, "others": 3}
    with pytest.raises(TypeError, match="keyword"):
        data.get(key="title")  # type: ignore[call-overload]


def test_c_code_that_goes_past_the_methods_is_refused() -> None:
    """It finds something that it can make nothing of, not a document without messages."""
    with pytest.raises(TypeError, match="_Unread"):
        msgspec.json.encode(lazy())
    with pytest.raises(TypeError, match=r"dict\(data\)"):
        msgspec.json.encode(lazy(), enc_hook=str)
    assert msgspec.json.decode(msgspec.json.encode(dict(lazy()))) == ALL
