"""The page: the files of the folder `page`, as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

PAGE = Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def routes() -> list[Route]:
    """Return a route for each file of the page. The index is at the root."""
    files = sorted(path for path in PAGE.glob("*") if path.suffix in _KINDS)
    return [Route("/" if path.name == "index.html" else f"/{path.name}", _serving(path)) for path in files]


def _serving(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def serve(_request: Request) -> Response:
        headers = {"Cache-Control": "no-cache"}
        return FileResponse(path, media_type=_KINDS[path.suffix], headers=headers)

    return serve
