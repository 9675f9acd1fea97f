"""The plugin for the tests of one run, in however many processes it runs: the fixtures, the decorator and the hooks.

    from persist.pytest_plugin import shared_fixture

    @shared_fixture
    def database():                        # runs once per run, in whichever worker comes first;
        url = start_database()
        yield {"url": url}                 # every worker gets this JSON value;
        stop_database(url)                 # goes on when all the others are done with it

Works the same without pytest-xdist. Nothing of `persist` is imported, and nothing made on disk, before a fixture is
used.

The run's directory has a name of its own, drawn by the controller and handed to the workers. xdist's ``testrun_uid``
would not do: ``--testrunuid`` may name the same one again. It is removed when the run has passed, and kept otherwise.

PYTEST_DONT_REWRITE: there is no test in here, and a conftest.py may import it before it registers it.
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
#: Many workers on few cores may queue for one session. What waits for a value has a time-out of its own above.
_STORE_LOCK_TIMEOUT_S = 60.0


# --- the processes of a run ---


class Participant:
    """A process that runs tests: a worker, or the only process.

    Args:
        directory: the run's; None if this process cannot reach it.
        worker: its name, or None if it is the only process.
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
            NotShared: locks do not work there, say. It fails the test that asks for it, and not the run.
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
        """The yield-style fixtures in use here."""
        from persist.pytest_plugin.uses import Uses

        return Uses(self.run, is_alone=self._worker is None)

    @property
    def _is_involved(self) -> bool:
        """Whether others may wait for a word of this process."""
        return "uses" in self.__dict__ or (
            self._worker is not None and self._directory is not None and self._directory.exists()
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> None:
        """Know whether the fixtures that end now end for good."""
        if "uses" in self.__dict__:
            self.uses.is_ending = nextitem is None

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Generator[None, object, object]:
        """Say to the others, at the end, that nothing is used here any more."""
        # Inside xdist's wrapper, which tells the controller that this worker has finished, and around pytest's own
        # teardown of the fixtures that are left.
        if "uses" in self.__dict__:
            self.uses.is_ending = True
            self.uses.is_hurried = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
        try:
            return (yield)
        finally:
            if self._is_involved:
                self.uses.end()


class Controller:
    """The process that outlives the others: it says where they meet and who is there, and ends the run.

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
        """The run's directory; nobody has made it yet."""
        root = os.environ.get("PERSIST_TEST_DIR") or self._config.getini("persist_test_dir")
        root = root or os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()
        return Path(root).expanduser().resolve() / f"persist-run-{os.urandom(16).hex()}"

    @property
    def _is_used(self) -> bool:
        return "directory" in self.__dict__ and self.directory.exists()

    @functools.cached_property
    def _run(self) -> Run | None:
        """The run, as this process sees it. None if its directory is of no use: the tests that met that have failed."""
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
        """Tell with ``-v`` where the run's directory is."""
        return [f"persist: what this run shares: {self.directory}"] if config.get_verbosity() > 0 else []

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
        """Tell those who wait for others that one is gone."""
        self._live.discard(node.gateway.id)
        self._publish()

    def pytest_runtest_logreport(self) -> None:
        # The worker that makes the directory does so in a test, and its report comes before that worker waits for
        # others.
        self._publish()

    def _publish(self) -> None:
        if self._live != self._published and self._live and self._is_used and self._run is not None:
            from persist.pytest_plugin.uses import publish_live

            publish_live(self._run, sorted(self._live))
            self._published = set(self._live)
            end_on_signals()

    # --- the end ---

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """End the run when its workers are gone: the teardowns, and the directory if all went well."""
        # Around xdist's own, which waits for the workers' ends; inside the terminal's, which prints the summary.
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
        # For an end that was cut short, by a second interrupt say.
        self._end()

    def _end(self) -> None:
        if self._is_used and not self._has_ended:
            from persist.pytest_plugin.ending import end, outlive

            # xdist's own end is cut short by a second interrupt: then workers may still be in their tests.
            self._problems += outlive(self._gateways) or ([] if self._run is None else end(self._run))
            self._has_ended = True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what went wrong at the end, and where the directory is kept."""
        if self._problems:
            terminalreporter.write_sep("=", "persist: errors at the end of the run", red=True)
            for problem in self._problems:
                terminalreporter.write_line(problem)
        if self._is_used:
            terminalreporter.write_line(f"persist: what this run shared is kept in {self.directory}")


def _import_for_the_run() -> None:
    from persist.pytest_plugin import ending, uses  # noqa: F401


#: So many directories of runs that failed are kept.
_MOST_KEPT = 3
_ENDED = "ended"


def keep(directory: Path) -> None:
    """Keep the directory of a run that has failed, and remove those of the oldest ones.

    Those of runs that were killed have no end, and stay.
    """
    with suppress(OSError):
        directory.joinpath(_ENDED).touch()
        ends = [path for path in directory.parent.glob(f"persist-run-*/{_ENDED}") if path.owner() == directory.owner()]
        for path in sorted(ends, key=lambda path: path.stat().st_mtime_ns)[:-_MOST_KEPT]:
            shutil.rmtree(path.parent, ignore_errors=True)


def end_on_signals() -> None:
    """Let SIGTERM, and SIGHUP of a terminal that was closed, end the run as an interrupt does, with its teardowns.

    Not if somebody else has asked for the signal. Only a run that shares something does that.
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
    parser.addini("persist_test_dir", "where the processes of a run meet: a directory on a local disk", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Find out which process of the run this is."""
    worker_input: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker_input is None:
        controller = Controller(config)
        # First: a wrapper that is registered later stands inside, so that the participant ends before the run does.
        config.pluginmanager.register(controller, "persist-controller")
        participant: Participant = _Alone(controller)
    else:
        directory = worker_input.get(_KEY)
        participant = Participant(None if directory is None else Path(directory), worker_input["workerid"])
    config.stash[_PARTICIPANT] = participant
    config.pluginmanager.register(participant, "persist-participant")


class _Alone(Participant):
    """The only process. Its directory has no name before somebody asks: that would look for a place on the disk."""

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

    Whichever process comes first runs the factory; all others wait for its value, and each call gets a copy of its own.
    If that process dies meanwhile, the next one takes over. What the factory raises (also `pytest.skip` and
    `pytest.fail`) is raised everywhere, after that one run.

    Args:
        teardown: a function of the value, at the top of a module: it runs once, at the end of the run, in the process
            that started pytest, when all workers are gone; also after a crash of a worker, after ``-x`` and after an
            interrupt.
        timeout_s: seconds to wait for another process that is producing the value.

    Raises:
        FactoryFailed: the factory raised; with the traceback of its one run.
        SharedTimeout: another process is still producing it; it names which one, and for how long.
        InvalidArgument: the key stands for another factory or teardown. LockError: the factory asks for its own value.
        InvalidArgument: the teardown cannot be imported.
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
    """A `persist.Store` that all workers of this run share. It begins empty, and goes with the run."""
    return _participant(request).store("store")


@pytest.fixture
def tmp_persist_store(tmp_path: Path) -> Store:
    """A `persist.Store` of this test alone."""
    from persist.store import Store

    return Store(tmp_path / "persist-store", timeout_s=_STORE_LOCK_TIMEOUT_S)


@pytest.fixture(scope="session")
def persist_lock(request: pytest.FixtureRequest) -> PersistLock:
    """Keep tests of all workers apart: ``with persist_lock("printer"):``. Freed by the kernel if its holder dies.

    Raises:
        SharedTimeout: not free within ``timeout_s`` (60 seconds); it names the holder and its test.
        LockError: this thread holds it already.
    """
    participant = _participant(request)

    def lock(name: str, *, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        from persist.pytest_plugin.locks import hold

        return hold(participant.run, name, timeout_s)

    return lock


@pytest.fixture(scope="session")
def persist_counter(request: pytest.FixtureRequest) -> PersistCounter:
    """Draw numbers that no other test of this run gets: ``20_000 + persist_counter("port")``; from ``start`` (0) up."""
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

    Its value is JSON, and each worker has a copy of its own. A function with a ``yield`` goes on where it ran, as its
    worker ends, when the other workers have ended or are done with the fixture. If its worker dies, what follows the
    ``yield`` cannot run; the summary says so. A `teardown` runs in the controller, and survives that.

    Args:
        scope: "session", which it is anyway.
        params, autouse, ids, name: as for `pytest.fixture`. Parameters must be JSON values: they are part of the key.
        teardown: as for `persist_once`; not together with a ``yield``.
        timeout_s: seconds to wait for another worker that is producing the value.
        end_timeout_s: seconds that what follows a ``yield`` waits for the other workers; then it runs all the same.

    Raises:
        TypeError: no plain function: an asynchronous one, or a class method.
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
    """Let pytest see the arguments of the function, by which it finds the fixtures to set up, and the request."""
    signature = inspect.signature(function)
    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
    others = [parameter for parameter in signature.parameters.values() if parameter.name != "request"]
    shared.__signature__ = signature.replace(parameters=[*others, request])  # type: ignore[attr-defined]
    return shared


def _place(function: Function, request: pytest.FixtureRequest) -> str:
    """The key that tells apart the fixtures that pytest makes of one function: by other names, in other modules, in
    derived classes.
    """
    definition = request._fixturedef  # type: ignore[attr-defined]
    name, base = definition.argname, definition.baseid
    file, _, classes = base.partition("::")
    is_elsewhere = file.endswith(".py") and Path(file).name != Path(function.__code__.co_filename).name
    parts = [f"as {name}"] if name != function.__name__ else []
    parts += [f"of {base}"] if classes or is_elsewhere else []
    return "".join(f" {part}" for part in parts)


def _dependencies(request: pytest.FixtureRequest) -> str:
    """Which of its possible values each fixture has that this one is made of: another one makes another value."""
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
    """The same in every worker, and another one for every fixture and parameter, like a node id."""
    key = f"{function.__code__.co_filename}::{function.__qualname__}{_place(function, request)}{_dependencies(request)}"
    if not hasattr(request, "param"):
        return key
    try:
        return f"{key}[{json.dumps(request.param, sort_keys=True, allow_nan=False)}]"
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The parameter {request.param!r} of {key} must be a JSON value, to be told in every worker."
        ) from error
