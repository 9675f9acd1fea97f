"""The guard of every route: it bounds bodies, looks at the origin of a write and at the host, and adds headers."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persist.asgi.exchange import Refused
from persist.errors import InvalidArgument, shown
from persist.log import log

_READING = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
#: Clients choose the names that they use, so only so many are logged.
_MOST_LOGGED = 20
_ORIGIN = re.compile(r"https?://[^/?#@\s]+", re.IGNORECASE)


def checked_origins(origins: Collection[str]) -> frozenset[str]:
    """Return origins in the form in which a browser sends them.

    Raises:
        InvalidArgument: one is none, and so no page could ever have it.
    """
    found = frozenset(each.rstrip("/").lower() for each in ([origins] if isinstance(origins, str) else origins))
    for each in found:
        if not _ORIGIN.fullmatch(each):
            raise InvalidArgument(what="origin", got=shown(each), expected="an address as https://chat.example.org")
    return found


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None  # an address in brackets that is none


class Guard:
    """An ASGI middleware.

    Args:
        allowed_origins: origins that may write, beside the request's own host. See `checked_origins`.
        allowed_hosts: the values of ``Host`` that are served, without their port. None serves any. On a machine of your
            own, names of this machine keep out a page whose name an attacker has pointed at it (DNS rebinding).
        max_body_bytes: a larger body is refused, also one that does not tell its length.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_origins: Collection[str],
        allowed_hosts: Collection[str] | None,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._origins = allowed_origins
        self._hosts = None if allowed_hosts is None else {host.lower() for host in allowed_hosts}
        self._max_body_bytes = max_body_bytes
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        count = 0

        async def receive_bounded() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._max_body_bytes:
                raise self._too_large()
            return message

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refused = self._refusal(scope["method"], Headers(scope=scope))
        if refused is not None:
            await refused.response()(scope, receive, send_guarded)
        else:
            await self._app(scope, receive_bounded, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> Refused | None:
        """Return why a request is refused before its body is read, or None."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            self._log_once(f"https://{host}", "allowed_hosts")
            return Refused(421, "unknown_host", "This server is not known by that name.")
        if method not in _READING and origin is not None:
            is_own = bool(host) and origin.lower() in (f"http://{host}", f"https://{host}")
            if not is_own and origin.lower() not in self._origins:
                self._log_once(origin, "allowed_origins")
                return Refused(403, "foreign_origin", "A page of another origin may not write here.")
        length = headers.get("content-length", "")
        return self._too_large() if length.isdecimal() and int(length) > self._max_body_bytes else None

    def _log_once(self, address: str, option: str) -> None:
        """Log an address that was refused, and the option that admits it."""
        if address not in self._logged and len(self._logged) < _MOST_LOGGED:
            self._logged.add(address)
            remedy = f"If browsers know the server by it, start with --origin and it, or give create_app {option}"
            log.warning("The chat server refused a request for the address %s. %s.", shown(address), remedy)

    def _too_large(self) -> Refused:
        return Refused(413, "too_large", f"A body may have {self._max_body_bytes} bytes.")
