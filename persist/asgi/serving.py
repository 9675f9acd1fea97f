"""Serving: workers of uvicorn that share one socket and one store. A worker that dies is replaced at once."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette

from persist.asgi.app import create_app
from persist.asgi.responder import OpenAI, Responder, checked_responder, echo
from persist.errors import InvalidArgument
from persist.log import log

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: How long a worker that is told to end waits for its requests, and how long the parent waits for the worker.
_GRACE_S, _PATIENCE_S = 5, 30.0
#: A worker that ends sooner than this could not start. The exit status says so.
_STARTUP_S = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """The store and the responder of a worker, and the names that it answers to.

    Attributes:
        store: a directory, or the URL of a database.
        responder: ``echo``, ``openai``, or ``module:name``.
        origins: the addresses under which browsers know the server, if a proxy stands before it.
        is_local: only requests that name this machine, or one of the origins, are served.
    """

    store: str
    responder: str = "echo"
    origins: tuple[str, ...] = ()
    is_local: bool = True


def responder_named(name: str) -> Responder:
    """Return a built-in responder, or one of a module that can be imported from the working directory.

    Raises:
        InvalidArgument: there is none of that name, or it cannot answer. The message says why.
    """
    if name == "echo":
        return echo
    if name == "openai":
        return OpenAI().checked()
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise _no_responder(repr(name))
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        found: Responder = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise _no_responder(f"{name!r}, and {_fault_of(module, error, directory)}") from error
    return checked_responder(found)


def _no_responder(got: str) -> InvalidArgument:
    return InvalidArgument(what="responder", got=got, expected="echo, openai, or the module:name of a responder")


def _fault_of(module: str, error: Exception, directory: str) -> str:
    """Return why the responder of a module cannot be had."""
    match error:
        case ModuleNotFoundError(name=str(missing)) if f"{module}.".startswith(f"{missing}."):
            return f"{directory} has no module {missing}"
        case ImportError():
            return f"{module} cannot be imported: {error}"
        case AttributeError(obj=ModuleType(__name__=name)) if name == module:
            return f"{module} has no {error.name}"
        case SyntaxError():
            return f"{module} has an error in line {error.lineno} of {error.filename}: {error.msg}"
    return f"{module} cannot be imported, because it raised {type(error).__name__}: {error}"


def app_of(settings: Settings) -> Starlette:
    """Return the app of a worker."""
    hosts = {*_LOOPBACK, *(urlsplit(origin).hostname or "" for origin in settings.origins)}
    return create_app(
        settings.store,
        responder_named(settings.responder),
        allowed_origins=settings.origins,
        allowed_hosts=hosts if settings.is_local else None,
    )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Port 0 takes any free one.

    Raises:
        OSError: the address is taken, or is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY. Without it, an event may wait for 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def address_of(listening: socket.socket, host: str) -> str:
    """Return the URL of a socket."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def serve(settings: Settings, listening: socket.socket, workers: int, ready: Callable[[], None]) -> bool:
    """Serve until SIGINT or SIGTERM. `ready` is called when the first workers have been started.

    The socket is shared, so a connection that nobody has accepted yet survives the death of a worker.

    Returns:
        Whether the workers could be started.
    """
    _tell_warnings()
    # A worker has dozens of threads, and glibc would keep freed memory apart for many of them (70 MB against 53 MB).
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    told_to_end, tell = multiprocessing.Pipe(duplex=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: tell.send_bytes(b"end"))
    started = {_started(settings, listening): time.monotonic() for _ in range(workers)}
    ready()
    is_well = True
    while is_well and not told_to_end.poll():
        wait([told_to_end, *(worker.sentinel for worker in started)])
        for worker in [each for each in started if not each.is_alive()]:
            # A worker that somebody has killed ends with a negative status.
            since = started.pop(worker)
            is_well = (worker.exitcode or 0) < 0 or time.monotonic() - since > _STARTUP_S
            dead, status = worker.pid, worker.exitcode
            worker.close()
            if not is_well or told_to_end.poll():
                break
            log.warning("Worker %s died with status %s. Another one takes its place.", dead, status)
            started[_started(settings, listening)] = time.monotonic()
    for worker in started:
        worker.terminate()
    for worker in started:
        worker.join(_PATIENCE_S)
        worker.kill()
    return is_well


def _tell_warnings() -> None:
    """Write warnings and errors to standard error, as a program does that serves by itself."""
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")


def _started(settings: Settings, listening: socket.socket) -> SpawnProcess:
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=(settings, listening))
    worker.start()
    return worker


def _work(settings: Settings, listening: socket.socket) -> None:
    """Serve in a worker, until a signal ends it or its parent is gone."""
    _tell_warnings()
    _raise_limit_of_descriptors()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    config = uvicorn.Config(
        app_of(settings),
        log_level="warning",
        # The client's address is of no use here, and so no header of a proxy is believed.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # the parent got the signal, too


def _raise_limit_of_descriptors() -> None:
    """Let this process open as many files as it may. A follower takes two, and the usual limit is 1,024."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # macOS has a limit below its unlimited one
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_with(parent: int) -> None:
    wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)
