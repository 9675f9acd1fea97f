"""Mutants of the pytest plugin. For each, the docstring of a test says that the test fails without the mechanism."""

from __future__ import annotations

from mutation.edits import condition, drop_call, drop_handler, replace_call, replace_statement, return_now
from mutation.mutant import Mutant

# The place of the plugin. Only these lines name its modules.
HOOKS = "pytest_plugin/plugin.py"
SHARED = "pytest_plugin"

FAILURES = ("tests/plugin/test_failures.py",)
UNTOUCHED = ("tests/plugin/test_untouched.py",)
USE = ("tests/plugin/test_use.py",)
WAITING = ("tests/plugin/test_waiting.py",)
GOING_ON = ("tests/plugin/test_going_on.py",)

MUTANTS = (
    Mutant(
        "plugin: the second look at the record",
        f"{SHARED}/once.py",
        "Once.value",
        condition("self.record() is None", "True"),
        USE,
        "just_before_the_claim",
    ),
    Mutant(
        "plugin: the claim that stays with its holder",
        f"{SHARED}/run.py",
        "Run.try_stream",
        replace_statement(
            "return busy",
            """
            self.store.cancel(session_id, busy.stream_id, force=True)
            return self.store.start_stream(session_id, stream_id=f"{self.worker}-{os.urandom(4).hex()}")
            """,
        ),
        USE,
        "asks_meanwhile or named_lock",
    ),
    Mutant(
        "plugin: the one step that draws a number",
        f"{SHARED}/run.py",
        "Run.count",
        replace_statement(
            "return self.store.update(session_id, take)",
            """
            data = self.store.load(session_id).data
            number = take(data)
            self.store.update(session_id, lambda there: there.update(data))
            return number
            """,
        ),
        USE,
        "drawn_once",
    ),
    Mutant(
        "plugin: the mark on what is torn down",
        f"{SHARED}/ending.py",
        "end",
        drop_call("mark_ended"),
        USE,
        "interrupted_end",
    ),
    Mutant(
        "plugin: the end of the run in the controller",
        HOOKS,
        "Controller._end",
        return_now(),
        FAILURES,
        "producer_that_died",
    ),
    Mutant(
        "plugin: the wait for the other workers",
        f"{SHARED}/uses.py",
        "Uses._end",
        replace_call("self._await_others", "None"),
        WAITING,
        "finish_waits_for",
    ),
    Mutant(
        "plugin: the use that outlasts a parameter's turn",
        f"{SHARED}/uses.py",
        "Uses.release",
        condition("self.is_ending", "True"),
        WAITING,
        "each_parameter",
    ),
    Mutant(
        "plugin: the run's own directory",
        HOOKS,
        "Controller.directory",
        replace_call("os.urandom", "b'same'"),
        UNTOUCHED,
        "belongs_to_one_run",
    ),
    Mutant(
        "plugin: the word that is taken back",
        f"{SHARED}/uses.py",
        "Uses._go_on",
        return_now(),
        GOING_ON,
        "while_it_is_finished or after_the_last_teardown",
    ),
    Mutant(
        "plugin: the end of a value that is no JSON",
        f"{SHARED}/once.py",
        "Once._require_json",
        condition("self._teardown is not None", "False"),
        GOING_ON,
        "refused_and_torn_down",
    ),
    Mutant(
        "plugin: the look whether the directory is of use",
        HOOKS,
        "Controller._run",
        drop_handler("PersistError"),
        GOING_ON,
        "directory_without_locks",
    ),
    Mutant(
        "plugin: the directories that go",
        HOOKS,
        "keep",
        return_now(),
        GOING_ON,
        "three_at_most",
    ),
    Mutant(
        "plugin: the end by a supervisor",
        HOOKS,
        "end_on_signals",
        return_now(),
        GOING_ON,
        "signals_run",
    ),
)
