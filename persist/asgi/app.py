"""The app: all routes on one store, to be served as it is or mounted under any prefix."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import persist.aio
from persist.asgi import static
from persist.asgi.chat import Chat
from persist.asgi.exchange import HANDLERS, Answered, Authorize, Prefix, within
from persist.asgi.openapi import DOCUMENT
from persist.asgi.responder import Responder, checked_responder
from persist.asgi.safety import Guard, checked_origins
from persist.asgi.sessions import Sessions
from persist.asgi.turns import Turns
from persist.errors import InvalidArgument
from persist.log import log


def create_app(
    store: persist.aio.Store | persist.Store | str | os.PathLike[str],
    responder: Responder,
    *,
    prefix: Prefix | None = None,
    authorize: Authorize | None = None,
    allowed_origins: Collection[str] = (),
    allowed_hosts: Collection[str] | None = None,
    max_body_bytes: int = 1024 * 1024,
    heartbeat_s: float = 15.0,
    checkpoint_s: float = 1.0,
    sweep_s: float = 30.0,
) -> Starlette:
    """Return a chat server as an ASGI app.

    Any number of workers may serve it on one store. Its lifespan clears the streams of dead workers, and ends the
    turns of this worker. An app that it is mounted in must run that lifespan:
    ``FastAPI(lifespan=chat.router.lifespan_context)``.

    Args:
        store: a store, its directory, or its URL.
        responder: what answers a prompt.
        prefix: returns what the ids of a request's sessions begin with: the user and a colon, for example. The request
            sees no other session, and a new one gets such an id. Without it everybody sees everything.
        authorize: tells whether a request may see a session, by the session's id. It may be asynchronous. It is asked
            after `prefix`. A session that is refused answers like an unknown one.
        allowed_origins: origins as ``https://chat.example.org`` whose pages may write, beside the server's own.
        allowed_hosts: the names by which this server is known, without a port. None takes any.
        max_body_bytes: how large a request's body may be.
        heartbeat_s: how often a quiet stream gives a sign of life, for the proxies on its way.
        checkpoint_s: how often a running turn makes its partial answer durable. That is what a crash may cost.
        sweep_s: how often this worker looks for streams of dead workers.

    Raises:
        InvalidArgument: the store is none of these three, the responder or an origin can be none, or a number is out of
            its range.
    """
    for what, value in {"heartbeat_s": heartbeat_s, "sweep_s": sweep_s, "max_body_bytes": max_body_bytes}.items():
        if not value > 0:
            raise InvalidArgument(what=what, expected="more than 0", got=str(value))
    origins, responder = checked_origins(allowed_origins), checked_responder(responder)
    if not isinstance(store, persist.aio.Store):
        if not isinstance(store, (persist.Store, str, os.PathLike)):
            raise InvalidArgument(what="store", expected="a store, a path or a URL", got=type(store).__name__)
        store = persist.aio.Store(store)
    authorize = within(prefix, authorize)
    turns = Turns(store, responder, checkpoint_s=checkpoint_s)
    sessions = Sessions(store, turns, authorize=authorize, prefix=prefix, heartbeat_s=heartbeat_s)
    chat = Chat(store, turns, authorize=authorize, heartbeat_s=heartbeat_s)
    guard = Middleware(Guard, allowed_origins=origins, allowed_hosts=allowed_hosts, max_body_bytes=max_body_bytes)
    own = [Route("/healthz", partial(_health, store)), Route("/openapi.json", _describe)]
    app = Starlette(
        routes=[*sessions.routes(), *chat.routes(), *own, *static.routes()],
        middleware=[guard],
        exception_handlers=HANDLERS,
        lifespan=lambda _: _lifespan(store, turns, sweep_s),
    )
    app.router.redirect_slashes = False
    return app


async def _health(store: persist.aio.Store, _request: Request) -> Response:
    await store.ids(limit=1)
    return Answered({"status": "ok"})


async def _describe(_request: Request) -> Response:
    return Answered(DOCUMENT)


@asynccontextmanager
async def _lifespan(store: persist.aio.Store, turns: Turns, sweep_s: float) -> AsyncIterator[None]:
    """Clear the streams of dead workers, now and then again, and end this worker's turns when the app ends."""
    await _sweep(store)
    sweeping = asyncio.create_task(_sweep_for_ever(store, sweep_s))
    try:
        yield
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await turns.close()


async def _sweep_for_ever(store: persist.aio.Store, sweep_s: float) -> None:
    while True:
        await asyncio.sleep(sweep_s)
        await _sweep(store)


async def _sweep(store: persist.aio.Store) -> None:
    """Clear the streams of dead workers. A session that is in use is for the next sweep."""
    try:
        sweep = await store.clear_stale_streams(timeout_s=0.5)
    except persist.PersistError as error:
        log.error("No stream could be cleared: %s", error)
        return
    for session_id, failure in sweep.failures.items():
        log.warning("Session %r could not be looked at: %s", session_id, failure)
