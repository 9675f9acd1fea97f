"""Mutants of the engine in PostgreSQL. Some of its mechanisms are in its statements, so these are edited, too."""

from __future__ import annotations

from pathlib import Path

from mutation.catalogue.suites import POSTGRES
from mutation.edits import (
    DoesNotApply,
    Edit,
    Function,
    condition,
    drop_call,
    drop_handler,
    drop_keyword,
    drop_operand,
    replace_expression,
    replace_statement,
    return_now,
)
from mutation.mutant import Change, Mutant

TRANSACTION = "postgres/transaction.py"
EMITTER = "postgres/emitter.py"
LISTENER = "postgres/listener.py"
STATEMENTS = "postgres/statements.py"
_QUERIES = Path(__file__).parents[3] / "persist" / "postgres" / "queries.sql"


def _without(*texts: str) -> Edit:
    """Take texts out of the statements."""

    def edit(function: Function) -> None:
        for text in texts:
            if text not in _QUERIES.read_text():
                raise DoesNotApply(f"no statement has {text!r}")
        calls = "".join(f".replace({text!r}, '')" for text in texts)
        replace_expression("_FILE.read_text()", f"IT{calls}")(function)

    return edit


def _statement(name: str, edit: Edit, select: str, *also: Change) -> Mutant:
    return Mutant(f"postgres: {name}", STATEMENTS, "Statements.__init__", edit, POSTGRES, select, also)


def _postgres(name: str, module: str, function: str, edit: Edit, select: str, *also: Change) -> Mutant:
    return Mutant(f"postgres: {name}", module, function, edit, POSTGRES, select, also)


ALIVE = " AND expires_at > clock_timestamp()"

MUTANTS = (
    # A row's lock stands behind that of its name, so each alone would do.
    _statement(
        "the lock of a session",
        _without(" FOR UPDATE\n\n-- name: lock_name", "pg_advisory_xact_lock(%(lock)s),\n       "),
        "updates_of_several_processes",
        Change("postgres/engine.py", "PostgresEngine.lock_row", replace_expression("name[0][1]", "name[0][0]")),
    ),
    _statement(
        "the comparison with what was read",
        _without(" AND commit = %(before)s\n    AND (%(lease)s::uuid IS NULL\n        OR"),
        "changed_without_the_lock",
        # A transaction that takes its lock again compares, too.
        Change(
            TRANSACTION,
            "Transaction._lock_again",
            condition("_commit_in(before) != _commit_in(self._row)", "False"),
        ),
    ),
    _statement(
        "the fence of an event",
        _without(" AND ended IS NULL AND last BETWEEN %(last)s AND %(last)s + %(count)s"),
        "forced_cancel",
    ),
    _postgres(
        "the owner of a turn's write",
        "streams.py",
        "Stream._require_ownership",
        condition("owner is None or active_stream_id != self.id or header.epoch != self.epoch", "owner is None"),
        "turn_of_a_successor",
        Change(
            "streams.py",
            "owner_of",
            replace_expression("owner if owner.stream_id == stream_id else None", "owner"),
        ),
    ),
    _statement("the server's clock in the write of a turn", _without(ALIVE), "is_late_writes_nothing"),
    _postgres(
        "the look-up of an unknown COMMIT",
        TRANSACTION,
        "Transaction._stands",
        condition("sent and self._has_happened(before, commit, sent)", "False"),
        "cut_in_a_commit",
    ),
    _postgres(
        "the server's memory of a transaction",
        TRANSACTION,
        "Transaction._became",
        return_now(),
        "any_number_of_commits or deleted_since",
    ),
    _postgres(
        "the look whether the server has crashed since",
        TRANSACTION,
        "Transaction._became",
        condition("became == b'committed' and now.decode() != since", "False"),
        "given_again_after_a_crash",
    ),
    _postgres(
        "the look for the commit that was read, among the last ones",
        TRANSACTION,
        "Transaction._has_happened",
        drop_operand("_commit_in(before) not in commits"),
        "not_unknown_behind_a_few",
    ),
    _postgres(
        "the end of a transaction whose process is stopped",
        "postgres/engine.py",
        "PostgresEngine.lock_row",
        replace_expression("self.connections.while_idle", "b'SET LOCAL jit = off'"),
        "process_that_is_stopped",
    ),
    _postgres(
        "the patience of a start with its server",
        "postgres/connections.py",
        "Own.run",
        condition("now_s() + pause_s > deadline", "True"),
        "start_waits_for_a_server",
    ),
    _postgres(
        "the short pauses before a server is tried again",
        "postgres/connections.py",
        "Connections._new_pool",
        drop_keyword("ConnectionPool", "reconnect_timeout"),
        "verb_waits_for_a_server",
    ),
    _postgres(
        "the end of a stream that lost its authority for a while",
        "streams.py",
        "Stream.__exit__",
        drop_call("self._close"),
        "while_the_server_is_away",
    ),
    _postgres(
        "the look at the process whose events they are",
        EMITTER,
        "RemoteWriter.close",
        condition("not self.is_here", "False"),
        "forked_child",
    ),
    _postgres(
        "the error of events that expire under a reader",
        "follow.py",
        "Cursor.__init__",
        drop_handler("FileNotFoundError"),
        "expire_under_a_reader",
    ),
    _postgres(
        "the lock of a name that has no row",
        "postgres/engine.py",
        "PostgresEngine.lock_row",
        replace_expression("text('lock_name', lock=self._lock_of(session_id))", "b\"SELECT 1, ''\""),
        "first_writes",
    ),
    _postgres(
        "the lock of a migration",
        "postgres/migrate.py",
        "_migrate",
        replace_expression(
            "\"SELECT pg_advisory_xact_lock(hashtextextended('persist migrate ' || %s, 0))\"", '"SELECT %s"'
        ),
        "migrate_once",
    ),
    _postgres(
        "the next try of a batch that failed", EMITTER, "Emitter.write_all", drop_call("self._wake.set"), "waited_for"
    ),
    _postgres(
        "the events in a stream's commit",
        TRANSACTION,
        "Transaction.commit",
        replace_statement("batch = writer, last, events", "pass"),
        "never_knows and postgres",
    ),
    _postgres(
        "the events at the end of a process", EMITTER, "_close_all", drop_call("each.close"), "exits and postgres"
    ),
    _postgres(
        "the news that followers share",
        LISTENER,
        "RemoteReader.read",
        replace_expression("self.read_cached() if until is None else None", "None"),
        "share",
    ),
    _postgres(
        "the items that come with the lock",
        "postgres/engine.py",
        "PostgresEngine.transaction",
        replace_expression("Sought.of(seeking)", "None"),
        "two_messages",
    ),
    _postgres(
        "the rollback behind a refused write of events",
        "postgres/connections.py",
        "Own.run",
        drop_call("connection.rollback"),
        "error_in_a_write_of_events",
    ),
    _postgres(
        "the connection before the stream's turn",
        EMITTER,
        "RemoteWriter.flush",
        replace_statement(
            "self._engine.connections.run(write_own, self._engine.timeout_s)",
            "with self.writing: self._engine.connections.run(write_own, self._engine.timeout_s)",
        ),
        "more_streams_than_connections",
    ),
    _postgres(
        "the durable write of events",
        EMITTER,
        "write",
        replace_expression(
            "b'BEGIN ISOLATION LEVEL READ COMMITTED'",
            "b'BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off'",
        ),
        "crash_of_the_server_takes_no_event",
    ),
    _postgres(
        "the events of a commit whose lease ends meanwhile",
        TRANSACTION,
        "Transaction._write",
        replace_expression("'emit_within'", "'emit'"),
        "not_stored_without_its_events",
    ),
    _postgres(
        "the patience of emissions",
        EMITTER,
        "Emitter.write_all",
        replace_expression("now_s() - self._failing_since >= self._patience_s", "True"),
        "away_for_a_moment",
    ),
    _postgres(
        "the beat that a lease outlives a failed renewal",
        "postgres/heartbeat.py",
        "Heartbeat.beat",
        replace_expression("now_s() + self._beat_s", "-1.0"),
        "away_for_a_moment",
    ),
    _postgres(
        "the time of a look at the server",
        LISTENER,
        "RemoteReader.look_again",
        replace_expression("now_s()", "self._asks_until"),
        "no_older_news",
    ),
    _postgres(
        "a finaliser inside of the emitter",
        EMITTER,
        "Emitter.__init__",
        replace_expression("threading.RLock()", "threading.Lock()"),
        "dropped_wherever",
    ),
    _postgres(
        "the parent's writers in a forked child",
        "postgres/engine.py",
        "PostgresEngine.writer_of",
        replace_expression("writer is not None and writer.is_here", "writer is not None"),
        "forked_child_asks",
    ),
    _postgres(
        "the free of a start that failed",
        "postgres/heartbeat.py",
        "Heartbeat.lease",
        drop_call("self._to_free.remove"),
        "start_that_failed",
    ),
    _postgres(
        "the number of a lease",
        "postgres/heartbeat.py",
        "Heartbeat.free",
        replace_expression(
            "self._held.get((session_id, stream_id)) == number", "(session_id, stream_id) in self._held"
        ),
        "old_block",
    ),
    _postgres(
        "the look at a closed pool",
        "postgres/connections.py",
        "Connections._here",
        replace_expression("self._pool.closed", "False"),
        "exit_handler",
    ),
    _postgres(
        "the end of the beats",
        "postgres/heartbeat.py",
        "Heartbeat.close",
        replace_statement("self._proven_until, self._to_free = -1.0, []", "pass"),
        "beat_behind",
    ),
    _postgres(
        "the last round of writes",
        EMITTER,
        "Emitter.close",
        drop_call("self.write_all"),
        "last_events",
    ),
    _postgres(
        "the end of a child of multiprocessing",
        "postgres/heartbeat.py",
        "Heartbeat.lease",
        drop_call("at_end_of_children"),
        "child_of_multiprocessing",
    ),
    _postgres(
        "the close of an idle process",
        "postgres/engine.py",
        "PostgresEngine.close",
        drop_call("self.heartbeat.rest"),
        "closed_store",
    ),
    _postgres(
        "the connections of a closed store",
        "postgres/engine.py",
        "PostgresEngine.close",
        drop_call("self.connections.close"),
        "closed_store",
    ),
    _postgres(
        "the silence of the pool",
        "postgres/connections.py",
        "_OfOurPools.filter",
        return_now("True"),
        "not_asked_again",
    ),
    _postgres(
        "the close of a connection at the end of the interpreter",
        "postgres/connections.py",
        "Own.close",
        replace_statement("close(*arguments)", "pass"),
        "end_of_a_process_is_silent",
    ),
    _postgres(
        "the level of isolation",
        "postgres/engine.py",
        "PostgresEngine.lock_row",
        replace_expression("b'BEGIN ISOLATION LEVEL READ COMMITTED'", "b'BEGIN'"),
        "isolation_is_not_the_role",
    ),
)
