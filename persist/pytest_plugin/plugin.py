"""The pytest plugin for the tests of one run, in however many processes: the fixtures, the decorator and the hooks.

    from persist.pytest_plugin import shared_fixture

    @shared_fixture
    def database():                        # runs once per run, in the first worker that needs it
        url = start_database()
        yield {"url": url}                 # every worker gets this JSON value
        stop_database(url)                 # runs when all the others are done with it

The plugin works the same without pytest-xdist. Before a fixture is used, it imports nothing of `persist`, and makes
nothing on the disk.

The controller draws a new name for the run's directory, and hands it to the workers. xdist's ``testrun_uid`` cannot be
the name, because ``--testrunuid`` may give the same one again. The directory is removed after a run that passed, and
kept otherwise.

PYTEST_DONT_REWRITE: there is no test in here, and a conftest.py may import this module before pytest registers it.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Protocol

    from persist.pytest_plugin.run import Run
    from persist.pytest_plugin.uses import Uses
    from persist.store import Store

    class PersistOnce(Protocol):
        """The type of the fixture `persist_once`."""

        def __call__(
            self,
            key: str,
            factory: Callable[[], Any],
            *,
            teardown: Callable[[Any], object] | None = None,
            timeout_s: float = 300.0,
        ) -> Any: ...

    class PersistLock(Protocol):
        """The type of the fixture `persist_lock`."""

        def __call__(self, name: str, *, timeout_s: float = 60.0) -> AbstractContextManager[None]: ...

    class PersistCounter(Protocol):
        """The type of the fixture `persist_counter`."""

        def __call__(self, name: str, *, start: int = 0) -> int: ...


_KEY = "persist_directory"
#: Long, because many workers on few cores may queue for one session. A wait for a value has a time-out of its own above
#: this one.
_STORE_LOCK_TIMEOUT_S = 60.0


# --- the processes of a run ---


class Participant:
    """A process that runs tests: a worker, or the only process.

    Args:
        directory: the run's directory, or None if this process cannot reach it.
        worker: the worker's name, or None if this is the only process.
    """

    def __init__(self, directory: Path | None, worker: str | None) -> None:
        self._directory = directory
        self._worker = worker

    @property
    def directory(self) -> Path:
        """The run's directory. It may not be there yet."""
        if self._directory is None:
            from persist.pytest_plugin.errors import NotShared

            reason = "it runs on another machine, or its controller has not loaded the plugin"
            remedy = "Load it with '-p persist.pytest_plugin', in addopts say, and in no conftest.py of a subdirectory."
            raise NotShared(reason=reason, remedy=remedy)
        return self._directory

    def store(self, name: str) -> Store:
        """Open a store of the run's directory.

        Raises:
            NotShared: the store cannot be opened, because locks do not work there for example. This fails the test that
                asks for the store, and not the run.
        """
        from persist.errors import PersistError
        from persist.pytest_plugin.errors import NotShared
        from persist.store import Store

        try:
            return Store(self.directory / name, timeout_s=_STORE_LOCK_TIMEOUT_S)
        except NotShared:
            raise
        except (PersistError, OSError) as error:
            remedy = (
                "Name one on a local disk: PERSIST_TEST_DIR in the environment, or persist_test_dir in the ini file."
            )
            raise NotShared(reason=str(error).rstrip("."), remedy=remedy) from error

    @functools.cached_property
    def run(self) -> Run:
        """The run, opened at the first use."""
        from persist.pytest_plugin.run import Run

        run = Run(self.store("run"), self._worker or "main")
        if self._worker is None:
            end_on_signals()
        return run

    @functools.cached_property
    def uses(self) -> Uses:
        """The yield-style fixtures that this process uses."""
        from persist.pytest_plugin.uses import Uses

        return Uses(self.run, is_alone=self._worker is None)

    @property
    def _is_involved(self) -> bool:
        """Whether other processes may wait for an announcement of this one."""
        return "uses" in self.__dict__ or (
            self._worker is not None and self._directory is not None and self._directory.exists()
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> None:
        """Note whether a test follows. If none does, the fixtures that end now end for good."""
        if "uses" in self.__dict__:
            self.uses.is_ending = nextitem is None

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Generator[None, object, object]:
        """Tell the others at the end that this process uses nothing any more."""
        # This runs inside xdist's wrapper, which tells the controller that this worker has finished. It runs around
        # pytest's own teardown of the remaining fixtures.
        if "uses" in self.__dict__:
            self.uses.is_ending = True
            self.uses.is_hurried = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
        try:
            return (yield)
        finally:
            if self._is_involved:
                self.uses.end()


class Controller:
    """The process that outlives the others. It says where they meet and which workers live, and it ends the run.

    Without xdist it is the only process, and a `Participant` besides.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._live: set[str] = set()
        self._gateways: list[Any] = []
        self._published: set[str] | None = None
        self._problems: list[str] = []
        self._has_ended = False

    @functools.cached_property
    def directory(self) -> Path:
        """The path of the run's directory. The directory itself may not be there yet."""
        root = os.environ.get("PERSIST_TEST_DIR") or self._config.getini("persist_test_dir")
        root = root or os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()
        return Path(root).expanduser().resolve() / f"persist-run-{os.urandom(16).hex()}"

    @property
    def _is_used(self) -> bool:
        return "directory" in self.__dict__ and self.directory.exists()

    @functools.cached_property
    def _run(self) -> Run | None:
        """The run, as this process sees it.

        None if its directory is of no use. The tests that met that have failed.
        """
        # In a thread, because Ctrl-C in the middle of an import leaves modules half-made, asyncio for one. Then the
        # end of the run could not import them either.
        importing = threading.Thread(target=_import_for_the_run)
        importing.start()
        importing.join()
        from persist.errors import PersistError
        from persist.pytest_plugin.run import Run

        try:
            return Run(Participant(self.directory, None).store("run"), "controller")
        except PersistError:
            return None

    def pytest_report_header(self, config: pytest.Config) -> list[str]:
        """Print with ``-v`` where the run's directory is."""
        return [f"persist: shared directory of this run: {self.directory}"] if config.get_verbosity() > 0 else []

    # --- the workers ---

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a new worker of this machine where the processes meet."""
        spec = node.gateway.spec
        if spec.popen and not spec.via:
            node.workerinput[_KEY] = str(self.directory)
            self._live.add(node.gateway.id)
            self._gateways.append(node.gateway)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Tell the waiting processes that a worker is gone."""
        self._live.discard(node.gateway.id)
        self._publish()

    def pytest_runtest_logreport(self) -> None:
        # A worker makes the directory in a test, and the report of this test comes before the worker waits for others.
        self._publish()

    def _publish(self) -> None:
        if self._live != self._published and self._live and self._is_used:
            # First, because from now on the run has something to tear down.
            end_on_signals()
            if self._run is not None:
                from persist.pytest_plugin.uses import publish_live

                publish_live(self._run, sorted(self._live))
                self._published = set(self._live)

    # --- the end ---

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """End the run when its workers are gone. Run the teardowns, and remove the directory if all went well."""
        # This runs around xdist's own hook, which waits for the workers' ends. It runs inside the terminal's hook,
        # which prints the summary.
        try:
            return (yield)
        finally:
            self._end()
            if self._problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            if self._is_used:
                if session.exitstatus == pytest.ExitCode.OK:
                    shutil.rmtree(self.directory, ignore_errors=True)
                else:
                    keep(self.directory)

    def pytest_unconfigure(self) -> None:
        # An interrupt may have cut the end short. Then the rest of it runs here.
        self._end()

    def _end(self) -> None:
        if self._is_used and not self._has_ended:
            from persist.pytest_plugin.ending import end, outlive

            # A second interrupt cuts xdist's own end short. Then workers may still be in their tests.
            self._problems += outlive(self._gateways) or ([] if self._run is None else end(self._run))
            self._has_ended = True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the errors of the end, and where the directory is kept."""
        if self._problems:
            terminalreporter.write_sep("=", "persist: errors at the end of the run", red=True)
            for problem in self._problems:
                terminalreporter.write_line(problem)
        if self._is_used:
            terminalreporter.write_line(f"persist: the shared directory of this run is kept: {self.directory}")


def _import_for_the_run() -> None:
    from persist.pytest_plugin import ending, uses  # noqa: F401


#: The number of directories of failed runs that are kept.
_MOST_KEPT = 3
_ENDED = "ended"


def keep(directory: Path) -> None:
    """Keep the directory of a failed run, and remove the directories of the oldest failed runs.

    The directory of a run that was killed has no end mark, and stays.
    """
    with suppress(OSError):
        directory.joinpath(_ENDED).touch()
        ends = [path for path in directory.parent.glob(f"persist-run-*/{_ENDED}") if path.owner() == directory.owner()]
        for path in sorted(ends, key=lambda path: path.stat().st_mtime_ns)[:-_MOST_KEPT]:
            shutil.rmtree(path.parent, ignore_errors=True)


def end_on_signals() -> None:
    """Let SIGTERM, and SIGHUP of a closed terminal, end the run as an interrupt does, with its teardowns.

    A signal that has a handler already keeps it. Only a run that shares something does that.
    """
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit)


def _exit(number: int, *_: object) -> None:
    pytest.exit(f"terminated by {signal.Signals(number).name}", returncode=128 + number)


_PARTICIPANT = pytest.StashKey[Participant]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting in the ini file."""
    parser.addini("persist_test_dir", "the directory on a local disk that the processes of a run share", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Find out which process of the run this is."""
    worker_input: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker_input is None:
        controller = Controller(config)
        # The controller comes first, because a wrapper that is registered later runs inside it. So the participant ends
        # before the run does.
        config.pluginmanager.register(controller, "persist-controller")
        participant: Participant = _Alone(controller)
    else:
        directory = worker_input.get(_KEY)
        participant = Participant(None if directory is None else Path(directory), worker_input["workerid"])
    config.stash[_PARTICIPANT] = participant
    config.pluginmanager.register(participant, "persist-participant")


class _Alone(Participant):
    """The only process. It names its directory at the first use, because naming it looks for a place on the disk."""

    def __init__(self, controller: Controller) -> None:
        super().__init__(None, None)
        self._controller = controller

    @property
    def directory(self) -> Path:
        return self._controller.directory


def _participant(request: pytest.FixtureRequest) -> Participant:
    if _PARTICIPANT not in request.config.stash:
        raise pytest.UsageError(
            "The pytest plugin of persist is not loaded. Load it with '-p persist.pytest_plugin', in addopts say; "
            "where plugins are loaded by themselves, leave out '-p no:persist.pytest_plugin'."
        )
    return request.config.stash[_PARTICIPANT]


# --- fixtures ---


@pytest.fixture(scope="session")
def persist_once(request: pytest.FixtureRequest) -> PersistOnce:
    """Produce a JSON value once per test run: ``persist_once(key, factory, teardown=None, timeout_s=300.0)``.

    The first process runs the factory. All others wait for its value, and each call gets a copy of its own. If that
    process dies meanwhile, the next one takes over. If the factory raises an error (also by `pytest.skip` or
    `pytest.fail`), the error is raised everywhere, after that one run.

    Args:
        teardown: a function of the value, at the top of a module. It runs once, at the end of the run, in the process
            that started pytest, when all workers are gone. It also runs after a crash of a worker, after ``-x`` and
            after an interrupt.
        timeout_s: seconds to wait for another process that is producing the value.

    Raises:
        FactoryFailed: the factory raised. The error holds the traceback of that one run.
        SharedTimeout: another process is still producing the value. The error names the process, and for how long.
        InvalidArgument: the key stands for another factory or teardown.
        InvalidArgument: the teardown cannot be imported.
        LockError: the factory asks for its own value.
    """
    participant = _participant(request)

    def once(
        key: str,
        factory: Callable[[], Any],
        *,
        teardown: Callable[[Any], object] | None = None,
        timeout_s: float = 300.0,
    ) -> Any:
        __tracebackhide__ = True
        from persist.errors import InvalidArgument
        from persist.pytest_plugin.once import Once, origin_of

        if type(key) is not str:
            raise InvalidArgument(what="the key of persist_once", expected="a string", got=type(key).__name__)
        if not callable(factory):
            raise InvalidArgument(what="the factory", got=type(factory).__name__, expected="make, and not make()")
        return Once(participant.run, key, origin_of(factory), teardown=teardown).value(factory, timeout_s)

    return once


@pytest.fixture(scope="session")
def persist_store(request: pytest.FixtureRequest) -> Store:
    """Return a `persist.Store` that all workers of this run share. It is empty at first."""
    return _participant(request).store("store")


@pytest.fixture
def tmp_persist_store(tmp_path: Path) -> Store:
    """Return a `persist.Store` of this test alone."""
    from persist.store import Store

    return Store(tmp_path / "persist-store", timeout_s=_STORE_LOCK_TIMEOUT_S)


@pytest.fixture(scope="session")
def persist_lock(request: pytest.FixtureRequest) -> PersistLock:
    """Keep tests of all workers apart: ``with persist_lock("printer"):``. The kernel frees the lock if its holder dies.

    Raises:
        SharedTimeout: the lock is not free within ``timeout_s`` (60 seconds). The error names the holder and its test.
        LockError: this thread holds the lock already.
    """
    participant = _participant(request)

    def lock(name: str, *, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        from persist.pytest_plugin.locks import hold

        return hold(participant.run, name, timeout_s)

    return lock


@pytest.fixture(scope="session")
def persist_counter(request: pytest.FixtureRequest) -> PersistCounter:
    """Draw numbers that no other test of this run gets: ``20_000 + persist_counter("port")``.

    The numbers go up from ``start`` (0).
    """
    participant = _participant(request)

    def count(name: str, *, start: int = 0) -> int:
        return participant.run.count(name, start)

    return count


# --- the decorator ---

Function = Callable[..., Any]


@overload
def shared_fixture(function: Function, /) -> Any: ...


@overload
def shared_fixture(
    *,
    scope: str = "session",
    params: Iterable[object] | None = None,
    autouse: bool = False,
    ids: Sequence[object | None] | Callable[[Any], object | None] | None = None,
    name: str | None = None,
    teardown: Callable[[Any], object] | None = None,
    timeout_s: float = 300.0,
    end_timeout_s: float = 3600.0,
) -> Callable[[Function], Any]: ...


def shared_fixture(
    function: Function | None = None,
    /,
    *,
    teardown: Callable[[Any], object] | None = None,
    timeout_s: float = 300.0,
    end_timeout_s: float = 3600.0,
    **options: Any,
) -> Any:
    """Make a session fixture whose function runs once per test run, in place of ``@pytest.fixture(scope="session")``.

    The value is JSON, and each worker has a copy of its own. A function with a ``yield`` resumes in the worker that ran
    it. It resumes when this worker is ending, and the other workers have ended or are done with the fixture. If this
    worker dies, the code after the ``yield`` cannot run, and the summary says so. A `teardown` runs in the controller,
    so it survives the death of a worker.

    Args:
        scope: "session", which is the default and the only choice.
        params, autouse, ids, name: as for `pytest.fixture`. Parameters must be JSON values, because they are part of
            the key.
        teardown: as for `persist_once`. It cannot be combined with a ``yield``.
        timeout_s: seconds to wait for another worker that is producing the value.
        end_timeout_s: seconds that the code after a ``yield`` waits for the other workers. Then it runs all the same.

    Raises:
        TypeError: the function is no plain function, but an asynchronous one, or a class method. Or the scope is
            another one than the session, an option is unknown, or a ``yield`` and a teardown stand together.
        Besides, in the tests: as `persist_once`.
    """
    if options.pop("scope", "session") != "session":
        raise TypeError(
            "A shared fixture lasts for the whole run: leave scope= out, or keep pytest.fixture for a shorter one."
        )
    if unknown := sorted(options.keys() - {"params", "autouse", "ids", "name"}):
        raise TypeError(f"shared_fixture() has no option {unknown[0]!r}.")
    if function is None:
        own = {"teardown": teardown, "timeout_s": timeout_s, "end_timeout_s": end_timeout_s}
        return lambda function: shared_fixture(function, **own, **options)
    if not inspect.isfunction(function):
        raise TypeError(
            f"{function!r} is not a plain function, as a shared fixture must be. Leave out @pytest.fixture."
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{function.__qualname__} is asynchronous: a shared fixture is a plain function. Call asyncio.run() in it."
        )
    if inspect.isgeneratorfunction(function):
        if teardown is not None:
            raise TypeError(
                f"{function.__qualname__} has a yield: finish it there, or return the value and keep teardown=."
            )
        shared = _yield_style(function, timeout_s, end_timeout_s)
    else:
        shared = _return_style(function, teardown, timeout_s)
    return pytest.fixture(scope="session", **options)(_needing_request(shared, function))


def _return_style(function: Function, teardown: Callable[[Any], object] | None, timeout_s: float) -> Function:
    @functools.wraps(function)
    def shared(*args: Any, request: pytest.FixtureRequest, **fixtures: Any) -> Any:
        __tracebackhide__ = True
        from persist.pytest_plugin.once import Once, origin_of

        key = _fixture_key(function, request)
        once = Once(_participant(request).run, key, origin_of(function), teardown=teardown)
        return once.value(_call(function, args, fixtures, request), timeout_s)

    return shared


def _yield_style(function: Function, timeout_s: float, end_timeout_s: float) -> Function:
    @functools.wraps(function)
    def shared(*args: Any, request: pytest.FixtureRequest, **fixtures: Any) -> Generator[Any, None, None]:
        __tracebackhide__ = True
        from persist.pytest_plugin.once import Once, origin_of
        from persist.pytest_plugin.uses import Use

        participant = _participant(request)
        once = Once(participant.run, _fixture_key(function, request), origin_of(function), style="yield")
        use = Use(once, end_timeout_s)
        yield participant.uses.begin(use, _call(function, args, fixtures, request), timeout_s)
        participant.uses.release(use)

    return shared


def _call(
    function: Function, args: tuple[Any, ...], fixtures: dict[str, Any], request: pytest.FixtureRequest
) -> Function:
    own = {"request": request} if "request" in inspect.signature(function).parameters else {}
    return functools.partial(function, *args, **fixtures, **own)


def _needing_request(shared: Function, function: Function) -> Function:
    """Show pytest the arguments of the function, by which it finds the fixtures to set up, and the request."""
    signature = inspect.signature(function)
    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
    others = [parameter for parameter in signature.parameters.values() if parameter.name != "request"]
    shared.__signature__ = signature.replace(parameters=[*others, request])  # type: ignore[attr-defined]
    return shared


def _place(function: Function, request: pytest.FixtureRequest) -> str:
    """Return the part of the key that tells apart the fixtures that pytest makes of one function.

    They have other names, or are in other modules or in derived classes.
    """
    definition = request._fixturedef  # type: ignore[attr-defined]
    name, base = definition.argname, definition.baseid
    file, _, classes = base.partition("::")
    is_elsewhere = file.endswith(".py") and Path(file).name != Path(function.__code__.co_filename).name
    parts = [f"as {name}"] if name != function.__name__ else []
    parts += [f"of {base}"] if classes or is_elsewhere else []
    return "".join(f" {part}" for part in parts)


def _dependencies(request: pytest.FixtureRequest) -> str:
    """Return a text with the parameter of each fixture that this fixture is made of.

    Another parameter there makes another value here.
    """
    chosen: dict[str, str] = {}
    pending = list(request._fixturedef.argnames)  # type: ignore[attr-defined]
    indices = getattr(getattr(request._pyfuncitem, "callspec", None), "indices", {})
    while pending:
        name = pending.pop()
        if name == "request" or name in chosen:
            continue
        definition = request._get_active_fixturedef(name)
        chosen[name] = f"[{indices[name]}]" if name in indices else ""
        pending += definition.argnames
    told = ", ".join(f"{name}{which}" for name, which in sorted(chosen.items()) if which)
    return f" with {told}" if told else ""


def _fixture_key(function: Function, request: pytest.FixtureRequest) -> str:
    """Return the key of a fixture.

    It is the same in every worker, and another one for every fixture and parameter, like a node id.
    """
    key = f"{function.__code__.co_filename}::{function.__qualname__}{_place(function, request)}{_dependencies(request)}"
    if not hasattr(request, "param"):
        return key
    try:
        return f"{key}[{json.dumps(request.param, sort_keys=True, allow_nan=False)}]"
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The parameter {request.param!r} of {key} must be a JSON value, to be told in every worker."
        ) from error
