"""The items of a thread's session.

A session holds:

    run           the token of the run that wrote last
    checkpoints   one item a checkpoint, in the order of their commits: id, ns, checkpoint_id, parent, metadata,
                  checkpoint (without its values), and values: the id of each channel's item in the next list
    values        one item a value of a channel. Checkpoints that have the value in common share the item
    writes        one item a task that wrote to a checkpoint: id, checkpoint, task, and writes: idx, channel, path, …

The id of a checkpoint's item is ``<ns>|<checkpoint_id>``, and the id of a task's item is that with ``|<task>`` behind
it. In the last two parts ``%25`` stands for ``%``, and ``%7C`` for ``|``. So no two have one id.

A value stands as ``"json": …`` if the serializer is LangGraph's own and JSON gives the value back exactly. Otherwise it
stands as ``"type": …, "base64": …``, as the serializer made it. So messages and other objects stand, and all that is
encrypted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from langgraph.checkpoint.base import writes_sort_key

from persist.transaction import Transaction
from persist.working_copy import WorkingList

Item = dict[str, Any]

CHECKPOINTS, VALUES, WRITES, RUN = "checkpoints", "values", "writes", "run"


def item_id(ns: str, *parts: str) -> str:
    """Return the id of an item."""
    return "|".join([ns, *(part.replace("%", "%25").replace("|", "%7C") for part in parts)])


def has(item: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Tell whether an item has all these values."""
    return all(item.get(name) == value for name, value in wanted.items())


def lineage(item: Item, find: Callable[[str], Item | None]) -> Iterator[Item]:
    """Yield a checkpoint, its parent, the parent of that, and so on.

    Args:
        find: returns the checkpoint of an id, or None.
    """
    # A checkpoint that was put again may name one of its descendants as its parent.
    seen = set[str]()
    found: Item | None = item
    while found is not None and found["id"] not in seen:
        seen.add(found["id"])
        yield found
        found = None if found["parent"] is None else find(item_id(found["ns"], found["parent"]))


def in_order(tasks: Iterable[Item]) -> list[tuple[str, Item]]:
    """Return the writes of tasks, each with its task, in the order in which LangGraph applies them."""
    writes = [(task["task"], write) for task in tasks for write in task["writes"]]
    return sorted(writes, key=lambda each: writes_sort_key(each[1]["path"], each[0], each[1]["idx"]))


def put_in_order(checkpoints: WorkingList, item: Item, *, is_next: bool) -> None:
    """Add a checkpoint: at the end if its parent is there, else by its id among those of its namespace.

    Ids begin with a time, so that is the same, unless the clock was set back. Without its parent it is perhaps copied
    from another saver, whose `list` gives the last one first.

    Args:
        is_next: whether its parent is there.
    """
    place = len(checkpoints)
    if not is_next:
        for each in reversed(range(place)):
            other = checkpoints.peek(each)
            if other["ns"] == item["ns"]:
                if other["checkpoint_id"] < item["checkpoint_id"]:
                    break
                place = each
    checkpoints.insert(place, item)


def keep(tx: Transaction, kept: Collection[str]) -> None:
    """Remove all checkpoints but these, their writes, and the values that no checkpoint has any more.

    Writes whose checkpoint is still to come stay. A session in which nothing is left is deleted.
    """
    checkpoints, tasks = tx.list(CHECKPOINTS), tx.list(WRITES)
    gone = {item["id"] for item in checkpoints} - set(kept)
    if not gone:
        return
    checkpoints[:] = [item for item in checkpoints if item["id"] in kept]
    tasks[:] = [task for task in tasks if task["checkpoint"] not in gone]
    drop_unused_values(tx)
    if not checkpoints and not tasks:
        tx.delete()


def drop_unused_values(tx: Transaction) -> None:
    """Remove the values that no checkpoint has."""
    used = {value_id for item in tx.list(CHECKPOINTS) for value_id in item["values"].values()}
    values = tx.list(VALUES)
    values[:] = [value for value in values if value["id"] in used]
