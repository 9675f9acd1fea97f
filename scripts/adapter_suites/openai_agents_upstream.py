"""A pytest plugin for the session tests of the OpenAI Agents SDK: they run on `persist` in the place of SQLite.

It puts a `PersistSession` where the SDK has ``SQLiteSession`` and ``AsyncSQLiteSession``, before a test module imports
them. The tests themselves stay as they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import agents
import agents.extensions.memory
import agents.extensions.memory.async_sqlite_session
import agents.memory
import agents.memory.sqlite_session
import pytest

from persist.adapters.openai_agents import PersistSession

#: The cases that cannot hold, by the reason. Each looks into SQLite itself.
LEFT_OUT = {
    "It counts the connections of SQLite.": """
        test_sqlite_session_close_closes_worker_thread_connections
        test_sqlite_session_reaps_connections_from_exited_worker_threads
        test_sqlite_session_closes_retired_connections_before_the_next_allocation
        test_sqlite_session_keeps_connections_of_live_worker_threads
        test_sqlite_session_close_retries_quarantined_connection
        test_failed_initialization_closes_candidate_connection
        test_initialization_retries_transient_wal_lock
        test_initialization_does_not_retry_unrecoverable_wal_errors
        test_cancelled_wal_retry_closes_startup_connection
        test_close_retries_quarantined_failed_initialization_candidate
        test_cancelled_initialization_finishes_candidate_close
        test_initialization_failure_then_cancellation_during_candidate_close
        test_cancelled_connect_closes_eventually_acquired_connection
    """,
    "It expects a closed session to refuse. A session of persist holds nothing that must be closed.": """
        test_sqlite_session_closed_rejects_empty_add_items
        test_async_sqlite_session_closed_operations_raise_runtime_error
        test_async_sqlite_session_closed_rejects_empty_add_items
        test_async_sqlite_session_close_before_use_is_terminal
        test_async_sqlite_session_close_is_idempotent
        test_cancelled_close_finishes_cleanup_and_propagates_cancellation
    """,
    "It writes broken rows by SQL and expects them to be skipped. persist raises CorruptSession instead.": """
        test_sqlite_session_pop_item_skips_corrupt_most_recent
        test_sqlite_session_pop_item_returns_none_after_dropping_only_corrupt_rows
        test_sqlite_session_get_items_limit_skips_corrupt_newest_rows
        test_sqlite_session_get_items_session_settings_limit_skips_corrupt_rows
        test_async_sqlite_session_pop_item_skips_corrupt_most_recent
        test_async_sqlite_session_pop_item_returns_none_after_dropping_only_corrupt_rows
        test_async_sqlite_session_get_items_limit_skips_corrupt_newest_rows
    """,
    "It looks at SQLite's lock.": """
        test_sqlite_session_file_lock_is_shared_across_instances
        test_sqlite_session_failed_add_items_releases_write_lock
        test_sqlite_session_failed_pop_item_releases_write_lock
        test_failed_pop_item_releases_write_lock
    """,
    "It makes a statement of SQLite fail, through its connection.": """
        test_sqlite_session_failed_clear_session_rolls_back
        test_sqlite_session_rollback_failure_evicts_connection
        test_suffix_transaction_rolls_back_failed_insert
        test_failed_encrypted_suffix_transaction_preserves_original_tokens
        test_failed_add_items_rolls_back_and_reuses_connection
        test_failed_clear_session_rolls_back
        test_cancelled_add_items_rolls_back_write_transaction
        test_operation_failure_then_cancellation_during_rollback
        test_rollback_failure_closes_and_evicts_connection
        test_close_retries_connection_quarantined_after_rollback_failure
    """,
    "It holds a commit of SQLite, through its connection.": """
        test_sqlite_session_post_commit_cancellation_propagates_after_known_outcome
        test_cancelled_suffix_transaction_settles_before_newer_append
        test_settled_pop_failure_invalidates_response_chain
        test_settled_clear_failure_invalidates_response_chain
        test_post_commit_cancellation_propagates_after_known_mutation_outcome
    """,
    "It sets the times of rows by SQL. A list of persist has an order of its own.": """
        test_async_sqlite_session_get_items_same_timestamp_consistent_order
        test_async_sqlite_session_pop_item_same_timestamp_returns_latest
    """,
}


class SQLiteSession(PersistSession):
    """A session that is made with the arguments of the SDK's own class: a database's path names a directory."""

    def __init__(self, session_id: str, db_path: str | Path = ":memory:", *_tables: str, **options: Any) -> None:
        path = str(db_path) if str(db_path) != ":memory:" else tempfile.mkdtemp()
        super().__init__(session_id, f"{path}.persist", **options)

    def close(self) -> Any:
        """Do nothing, whether it is awaited or not."""

        class Closed:
            def __await__(self) -> Any:
                return iter(())

        return Closed()


for module in (agents, agents.memory, agents.memory.sqlite_session):
    setattr(module, "SQLiteSession", SQLiteSession)  # noqa: B010 - mypy takes no assignment to a module
for extension in (agents.extensions.memory, agents.extensions.memory.async_sqlite_session):
    setattr(extension, "AsyncSQLiteSession", SQLiteSession)  # noqa: B010


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the cases that cannot hold."""
    reasons = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}
    for item in items:
        name = item.name.partition("[")[0]
        if name in reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[name]))
