"""Journals, for tests: the grammar, spelt out once more, and the bytes that a verb reads and writes."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import persist
from persist.storage import disk

# Not taken from `persist.storage.journal`, because an error in its own idea of the grammar must show.
_OPENING = re.compile(rb'\{"persist_journal":3,"name":"([0-9a-f]{16})"\}\n')
_NAME = re.compile(rb'"journal":(?:null|"([0-9a-f]{16})")')
_CRC = re.compile(rb'\{"crc":"([0-9a-f]{8})",')

Record = dict[str, Any]


def journal_of(store: persist.Store, session_id: str = "s") -> Path:
    """Return the one journal of a session. Fail if it has none, or several."""
    [path] = store.path.glob(f"{session_id}.*.journal")
    return path


def has_journal(store: persist.Store, session_id: str = "s") -> bool:
    """Tell whether the document names a journal. Fails unless exactly that one is there."""
    header = (store.path / f"{session_id}.json").read_bytes().partition(b"\n")[0]
    named = _NAME.search(header)
    assert named is not None
    names = [] if named[1] is None else [f"{session_id}.{named[1].decode()}.journal"]
    assert [path.name for path in store.path.glob(f"{session_id}.*.journal")] == names
    return bool(names)


def parted(content: bytes) -> tuple[bytes, list[bytes]]:
    """Return the opening and the records of a whole journal, each with its newline.

    The room for more behind them is left out.
    """
    first, *lines = content.rstrip(b"\0").splitlines(keepends=True)
    assert _OPENING.fullmatch(first)
    return first, lines


def record_of(line: bytes) -> Record:
    """Return the content of a record, without its CRC."""
    record: Record = json.loads(line)
    del record["crc"]
    return record


def line_of(opening: bytes, rest: bytes) -> bytes:
    """Return a sealed record. `rest` is its JSON, without the brace that opens it."""
    return b'{"crc":"%08x",' % zlib.crc32(rest, zlib.crc32(opening)) + rest + b"\n"


def sealed(opening: bytes, records: Sequence[Record | bytes]) -> bytes:
    """Return a journal of these records, with every CRC right, and each `after` that of the record before.

    A record of bytes is JSON already, brace and all, and is sealed as it is.
    """
    content, after = opening, b"%08x" % zlib.crc32(opening)
    for record in records:
        line = line_of(opening, (_json(record | {"after": after.decode()}) if isinstance(record, dict) else record)[1:])
        content, after = content + line, line[8:16]
    return content


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def chain_is_right(content: bytes) -> bool:
    """Tell whether each record has its own CRC, and the CRC of the one before."""
    opening, lines = parted(content)
    seed = zlib.crc32(opening)
    after = f"{seed:08x}"
    for line in lines:
        crc = _CRC.match(line)
        if (
            crc is None
            or int(crc[1], 16) != zlib.crc32(line[crc.end() : -1], seed)
            or json.loads(line)["after"] != after
        ):
            return False
        after = crc[1].decode()
    return True


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Traffic:
    """The bytes that were read and written through `persist.storage.disk`."""

    read: int = 0
    written: int = 0


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes that go through `persist.storage.disk` in the block."""
    counted = Traffic()
    names = ("read", "read_version", "read_at", "write", "write_at")
    real: dict[str, Callable[..., Any]] = {name: getattr(disk, name) for name in names}

    def reading(name: str) -> Callable[..., Any]:
        def read(*arguments: Any) -> Any:
            answer = real[name](*arguments)
            counted.read += len(answer[0] if name == "read_version" else answer)
            return answer

        return read

    def writing(name: str) -> Callable[..., None]:
        def write(fd: int, content: bytes, *position: int) -> None:
            counted.written += len(content)
            real[name](fd, content, *position)

        return write

    for name in names:
        setattr(disk, name, (writing if name.startswith("write") else reading)(name))
    try:
        yield counted
    finally:
        for name in names:
            setattr(disk, name, real[name])
