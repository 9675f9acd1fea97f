"""The peers. Each does what an application does to append one message so that it is there for the next reader.

Stores of whole values read the value, append to it and write it back. Libraries that know messages are called in their
own way. A peer imports its packages when it is prepared, so that a missing package keeps no other peer from running.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import filelock
import msgspec

from benchmarks import bare
from benchmarks.workload import SESSION, Message, conversation

LIMIT = "limit: write + fdatasync"
SQLITE = "SQLite WAL, synchronous=FULL"
REPLACE = "limit: replace"

#: How durable a peer is. YES survives a power cut. NO may lose messages that it acknowledged. IN_PLACE may lose all,
#: because it writes over its file in place.
YES, NO, IN_PLACE = "yes", "no", "no, in place"


class Peer(ABC):
    """One session of so many messages in a directory of its own.

    Attributes:
        durable: whether an append that has returned survives a power cut.
        way: how a message is appended.
        modules: the modules that must be installed.
        most: the most messages that are measured, in a full run and in a quick one.
        too_slow: why there is such a limit.
    """

    name: ClassVar[str]
    durable: ClassVar[str] = YES
    way: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    most: ClassVar[tuple[int, int]] = (100_000, 100_000)
    too_slow: ClassVar[str] = ""

    def __init__(self, directory: Path, messages: int) -> None:
        self.directory = directory
        self.prepare(conversation(messages))

    @abstractmethod
    def prepare(self, data: dict[str, Any]) -> None:
        """Put the conversation there, and open all that stays open in a server."""

    def before(self) -> None:
        """Prepare an append. The preparation is not timed."""
        return

    @abstractmethod
    def append(self, message: Message) -> None: ...

    def load(self) -> object:
        """Read the whole conversation. Return None where there is no such thing."""
        return None

    def close(self) -> None:
        """Close what is open."""
        return


class Rewriting(Peer):
    """A peer that writes the whole conversation for each message."""

    most = (100_000, 10_000)
    too_slow = "each append reads and writes the whole conversation"


class BareAppend(Peer):
    name = LIMIT
    way = "the encoded message and fdatasync, to a file that is open"

    def prepare(self, data: dict[str, Any]) -> None:
        self._path = self.directory / "records"
        self._path.write_bytes(b"".join(map(self._record, data["messages"])))
        self._fd = bare.open_appending(self._path)
        os.fsync(self._fd)

    def append(self, message: Message) -> None:
        bare.append(self._fd, self._record(message))

    def close(self) -> None:
        os.close(self._fd)

    @staticmethod
    def _record(message: Message) -> bytes:
        return msgspec.json.encode(message) + b"\n"


class BareReplace(Rewriting):
    name = REPLACE
    way = "all encoded messages to a temporary file, fsync, rename, fsync of the directory"

    def prepare(self, data: dict[str, Any]) -> None:
        self._content = msgspec.json.encode(data)
        bare.replace(self.directory / "document", self._content)

    def append(self, message: Message) -> None:
        self._content = b"%b,%b]}" % (self._content[:-2], msgspec.json.encode(message))
        bare.replace(self.directory / "document", self._content)


class SQLiteFull(Peer):
    """SQLite, with a row for each message."""

    name = SQLITE
    way = "BEGIN IMMEDIATE, INSERT of a row, COMMIT"
    synchronous: ClassVar[str] = "FULL"

    def prepare(self, data: dict[str, Any]) -> None:
        self._connection = connect(self.directory / "sessions.db", self.synchronous)
        rows = [(SESSION, json.dumps(message)) for message in data["messages"]]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(INSERT, rows)
        self._connection.execute("COMMIT")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def append(self, message: Message) -> None:
        insert(self._connection, SESSION, message)

    def load(self) -> object:
        rows = self._connection.execute("SELECT body FROM messages WHERE session = ? ORDER BY number", (SESSION,))
        return [json.loads(body) for (body,) in rows.fetchall()]

    def close(self) -> None:
        self._connection.close()


class SQLiteNormal(SQLiteFull):
    name = "SQLite WAL, synchronous=NORMAL"
    durable = NO
    way = "the same, without a sync at the commit"
    synchronous = "NORMAL"


INSERT = "INSERT INTO messages (session, body) VALUES (?, ?)"


def connect(path: Path, synchronous: str) -> sqlite3.Connection:
    """Open the database of rows, made if it is missing."""
    connection = sqlite3.connect(path, timeout=60.0, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={synchronous}")
    connection.execute("CREATE TABLE IF NOT EXISTS messages (number INTEGER PRIMARY KEY, session TEXT, body TEXT)")
    connection.execute("CREATE INDEX IF NOT EXISTS of_session ON messages (session, number)")
    return connection


def insert(connection: sqlite3.Connection, session: str, message: Message) -> None:
    """Commit one message."""
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(INSERT, (session, json.dumps(message)))
    connection.execute("COMMIT")


class NaiveFile(Rewriting):
    name = "FileLock + json + fsync + replace"
    way = "under a FileLock: json.load, append, json.dump, fsync, rename, fsync of the directory"

    def prepare(self, data: dict[str, Any]) -> None:
        self._path = self.directory / "session.json"
        self._path.write_text(json.dumps(data))

    @classmethod
    def opened(cls, directory: Path) -> NaiveFile:
        """Return a peer that another process has prepared."""
        found = cls.__new__(cls)
        found._path = directory / "session.json"
        return found

    def append(self, message: Message) -> None:
        with filelock.FileLock(f"{self._path}.lock"):
            data = json.loads(self._path.read_bytes())
            data["messages"].append(message)
            bare.replace(self._path, json.dumps(data).encode())

    def load(self) -> object:
        return json.loads(self._path.read_bytes())


class DiskCache(Rewriting):
    name = "diskcache"
    durable = NO
    way = "in a transaction: get the list (a pickle), append, set"
    modules = ("diskcache",)

    def prepare(self, data: dict[str, Any]) -> None:
        self._cache: Any = importlib.import_module("diskcache").Cache(str(self.directory), size_limit=1 << 40)
        self._cache[SESSION] = data["messages"]

    def append(self, message: Message) -> None:
        with self._cache.transact():
            messages = self._cache[SESSION]
            messages.append(message)
            self._cache[SESSION] = messages

    def load(self) -> object:
        found: object = self._cache[SESSION]
        return found

    def close(self) -> None:
        self._cache.close()


class TinyDB(Rewriting):
    name = "TinyDB"
    durable = IN_PLACE
    way = "update() of the document's list; it reads and writes the whole file"
    modules = ("tinydb",)

    def prepare(self, data: dict[str, Any]) -> None:
        self._database: Any = importlib.import_module("tinydb").TinyDB(self.directory / "db.json")
        self._document: int = self._database.insert(data)

    def append(self, message: Message) -> None:
        self._database.update(lambda document: document["messages"].append(message), doc_ids=[self._document])

    def load(self) -> object:
        found: object = self._database.get(doc_id=self._document)
        return found

    def close(self) -> None:
        self._database.close()


class CacheLib(Rewriting):
    name = "cachelib FileSystemCache"
    durable = NO
    way = "get the list (a pickle), append, set"
    modules = ("cachelib",)

    def prepare(self, data: dict[str, Any]) -> None:
        cachelib = importlib.import_module("cachelib")
        self._cache: Any = cachelib.FileSystemCache(str(self.directory), threshold=0, default_timeout=0)
        self._cache.set(SESSION, data["messages"])

    def append(self, message: Message) -> None:
        messages = self._cache.get(SESSION)
        messages.append(message)
        self._cache.set(SESSION, messages)

    def load(self) -> object:
        found: object = self._cache.get(SESSION)
        return found


class LangChain(Peer):
    name = "LangChain FileChatMessageHistory"
    durable = IN_PLACE
    way = "add_message(), which reads and writes the whole file"
    modules = ("langchain_community.chat_message_histories.file", "langchain_core.messages")
    most = (10_000, 1_000)
    too_slow = "each add_message() rebuilds every message as an object"

    def prepare(self, data: dict[str, Any]) -> None:
        history, messages = map(importlib.import_module, self.modules)
        self._human: Any = messages.HumanMessage
        self._history: Any = history.FileChatMessageHistory(str(self.directory / "history.json"))
        # add_message() would take hours for the messages that this writes at once.
        earlier = messages.messages_to_dict([self._message(message) for message in data["messages"]])
        self._history.file_path.write_text(json.dumps(earlier))

    def append(self, message: Message) -> None:
        self._history.add_message(self._message(message))

    def load(self) -> object:
        found: object = self._history.messages
        return found

    def _message(self, message: Message) -> object:
        made: object = self._human(content=message["content"], id=message["id"])
        return made


def is_wal_full_by_default() -> bool:
    """Tell whether SQLite, as it was built here, syncs each commit to a write-ahead log unless it is told otherwise."""
    connection = sqlite3.connect(":memory:")
    options = {option for (option,) in connection.execute("PRAGMA compile_options")}
    connection.close()
    return not options & {"DEFAULT_WAL_SYNCHRONOUS=0", "DEFAULT_WAL_SYNCHRONOUS=1"}


class OpenAIAgents(Peer):
    name = "OpenAI Agents SQLiteSession"
    durable = YES if is_wal_full_by_default() else NO
    way = "await add_items([item]), on a loop that is kept; `synchronous` is left as SQLite was built"
    modules = ("agents.memory.sqlite_session", "asyncio")

    def prepare(self, data: dict[str, Any]) -> None:
        sessions, asyncio = map(importlib.import_module, self.modules)
        self._loop: Any = asyncio.new_event_loop()
        self._session: Any = sessions.SQLiteSession(SESSION, str(self.directory / "agents.db"))
        self._wait(self._session.add_items(list(map(self._item, data["messages"]))))

    def append(self, message: Message) -> None:
        self._wait(self._session.add_items([self._item(message)]))

    def load(self) -> object:
        return self._wait(self._session.get_items())

    def close(self) -> None:
        self._session.close()
        self._wait(self._loop.shutdown_default_executor())
        self._loop.close()

    def _wait(self, coroutine: Any) -> object:
        found: object = self._loop.run_until_complete(coroutine)
        return found

    @staticmethod
    def _item(message: Message) -> dict[str, str]:
        return {"role": message["role"], "content": message["content"]}


class LMDBValue(Rewriting):
    name = "lmdb, a value a session"
    way = "in a write transaction, sync on: get, json.loads, append, json.dumps, put"
    modules = ("lmdb",)

    def prepare(self, data: dict[str, Any]) -> None:
        self._lmdb: Any = importlib.import_module("lmdb").open(str(self.directory), map_size=1 << 33)
        with self._lmdb.begin(write=True) as transaction:
            self._fill(transaction, data["messages"])

    def _fill(self, transaction: Any, messages: list[Message]) -> None:
        transaction.put(b"s", json.dumps(messages).encode())

    def append(self, message: Message) -> None:
        with self._lmdb.begin(write=True) as transaction:
            messages = json.loads(transaction.get(b"s"))
            messages.append(message)
            transaction.put(b"s", json.dumps(messages).encode())

    def load(self) -> object:
        with self._lmdb.begin() as transaction:
            return json.loads(transaction.get(b"s"))

    def close(self) -> None:
        self._lmdb.close()


class LMDBRows(LMDBValue):
    name = "lmdb, a key a message"
    way = "in a write transaction, sync on: put of the encoded message under the next key"
    most = Peer.most
    too_slow = ""

    def _fill(self, transaction: Any, messages: list[Message]) -> None:
        self._count = 0
        for message in messages:
            self._put(transaction, message)

    def _put(self, transaction: Any, message: Message) -> None:
        self._count += 1
        transaction.put(b"s-%010d" % self._count, json.dumps(message).encode(), append=True)

    def append(self, message: Message) -> None:
        with self._lmdb.begin(write=True) as transaction:
            self._put(transaction, message)

    def load(self) -> object:
        with self._lmdb.begin() as transaction:
            return [json.loads(value) for _key, value in transaction.cursor()]


class SqliteDict(Rewriting):
    name = "sqlitedict"
    # The default of sqlitedict is PRAGMA synchronous=OFF.
    durable = NO
    way = "get the list (a pickle), append, set, commit()"
    modules = ("sqlitedict",)

    def prepare(self, data: dict[str, Any]) -> None:
        logging.getLogger("sqlitedict").setLevel(logging.WARNING)
        self._dict: Any = importlib.import_module("sqlitedict").SqliteDict(str(self.directory / "dict.sqlite"))
        self._write(data["messages"])

    def _write(self, messages: object) -> None:
        self._dict[SESSION] = messages
        self._dict.commit()

    def append(self, message: Message) -> None:
        messages = self._dict[SESSION]
        messages.append(message)
        self._write(messages)

    def load(self) -> object:
        found: object = self._dict[SESSION]
        return found

    def close(self) -> None:
        self._dict.close()


class DjangoFile(Rewriting):
    name = "Django file sessions"
    durable = NO
    way = "SessionStore(key): load, append to the list, save()"
    modules = ("django.conf", "django.contrib.sessions.backends.file")

    def prepare(self, data: dict[str, Any]) -> None:
        settings = importlib.import_module(self.modules[0]).settings
        if not settings.configured:
            settings.configure(SECRET_KEY="benchmark", USE_TZ=True)
        backend = importlib.import_module(self.modules[1])
        # Django keeps the directory in the class, so each peer has a class of its own.
        self._store: Any = type("SessionStore", (backend.SessionStore,), {"_storage_path": str(self.directory)})
        session = self._store()
        session["messages"] = data["messages"]
        session.create()
        self._key: str = session.session_key

    def append(self, message: Message) -> None:
        session = self._store(self._key)
        messages = session["messages"]
        messages.append(message)
        session["messages"] = messages
        session.save()

    def load(self) -> object:
        found: object = self._store(self._key)["messages"]
        return found


OTHERS: tuple[type[Peer], ...] = (
    BareAppend,
    BareReplace,
    SQLiteFull,
    SQLiteNormal,
    NaiveFile,
    DiskCache,
    TinyDB,
    CacheLib,
    LangChain,
    OpenAIAgents,
    LMDBValue,
    LMDBRows,
    SqliteDict,
    DjangoFile,
)


def why_missing(peer: type[Peer]) -> str | None:
    """Return why a peer cannot be run here, or None if it can."""
    try:
        for module in peer.modules:
            importlib.import_module(module)
    except Exception as error:
        # The import may fail in any way. The other peers go on.
        return f"{type(error).__name__}: {error}"
    return None
