"""The end of a run, in the controller.

When all workers are gone, each teardown runs once. The value that was made last is torn down first.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from persist.pytest_plugin import outcome
from persist.pytest_plugin.once import KIND, mark_ended
from persist.pytest_plugin.outcome import ENDED, VALUE, Record
from persist.pytest_plugin.run import Data, Run

_WORKER_END_S = 3.0


def end(run: Run) -> list[str]:
    """Run the remaining teardowns, and return the errors as texts for the summary.

    Each value is marked as ended before its teardown runs. So a second call, after an interrupt for example, goes on
    with the rest and repeats nothing.
    """
    problems = []
    for session_id, data in sorted(run.sessions(KIND), key=_number, reverse=True):
        records = data.get("messages", [])
        problems += [
            f"{data['name']}: its end failed.\n{each['error']}"
            for each in records
            if each.get("error") and each["kind"] == ENDED
        ]
        if not records or records[-1]["kind"] != VALUE:
            continue
        if data["style"] == "yield":
            what = (
                f"{records[-1]['worker']}, which produced it, died before the end: what follows its yield did not run."
            )
            problems.append(f"{data['name']}: {what}")
        elif data["teardown"] is not None:
            mark_ended(run, session_id)
            problems += _torn_down(data, records[-1]["value"])
    return problems


def outlive(gateways: Iterable[Any]) -> list[str]:
    """Wait for the worker processes to end, and kill those that do not end soon.

    Return a text for each process that keeps the run from ending.
    """
    left = []
    for gateway in gateways:
        # execnet has no public name for the process behind a gateway.
        process = getattr(getattr(gateway, "_io", None), "popen", None)
        if process is not None and not _is_gone(process):
            left.append(f"{gateway.id} (pid {process.pid}) cannot be ended: the teardowns of this run were not run.")
    return left


def _is_gone(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_WORKER_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_WORKER_END_S)
    return process.poll() is not None


def _number(session: tuple[str, Data]) -> int:
    records = session[1].get("messages", [])
    return max((int(record.get("number", -1)) for record in records), default=-1)


def _torn_down(data: Data, value: Any) -> Iterator[str]:
    address = data["teardown"]
    try:
        function_at(address)(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        teardown = f"{address['module']}:{address['qualname']}"
        yield f"{data['name']}: its teardown {teardown} failed.\n{outcome.text_of(error)}"


def function_at(address: Record) -> Callable[..., Any]:
    """Import a function by its address.

    A worker finds test modules and conftest files through the paths that pytest puts into ``sys.path`` while it
    collects. Several conftest files may share one name. So the module must come from the file that the address names.
    """
    found: Any = _module(address["module"], address["file"])
    for name in address["qualname"].split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def _module(name: str, file: str | None) -> ModuleType:
    with _on_path(name, file):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if file is None or error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
        else:
            if file is None or _is_from(module, file):
                return module
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} cannot be imported", name=name, path=file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _is_from(module: ModuleType, file: str) -> bool:
    return Path(module.__file__ or "").resolve() == Path(file).resolve()


@contextmanager
def _on_path(name: str, file: str | None) -> Iterator[None]:
    """Put the module's root on the path for a block, as pytest does, so that the module's own imports are found."""
    depth = name.count(".") + (file is not None and Path(file).name == "__init__.py")
    roots = [] if file is None else [str(Path(file).resolve().parents[depth])]
    sys.path[:0] = roots
    try:
        yield
    finally:
        for root in roots:
            sys.path.remove(root)
