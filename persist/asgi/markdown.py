"""Markdown as HTML that is safe to show: HTML in the text stays text, and a link leads only to the web or to mail."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

#: A longer text is not rendered, because hostile Markdown of this length takes a second. The page shows it as it is.
MOST_CHARACTERS = 50_000
#: How many bytes of texts and their HTML a worker keeps.
KEPT_BYTES = 8 * 2**20


class _Renderer(RendererHTML):
    def link_open(self, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
        tokens[at].attrSet("rel", "noopener noreferrer nofollow")
        tokens[at].attrSet("target", "_blank")
        return self.renderToken(tokens, at, options, env)

    def image(self, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
        # The page asks no other server for anything, and so an image is a link.
        source, shown = str(tokens[at].attrGet("src") or ""), tokens[at].content
        link = Token("link_open", "a", 1, attrs={"href": source})
        text = Token("text", "", 0, content=shown or source)
        return self.link_open([link], 0, options, env) + self.text([text], 0, options, env) + "</a>"


_MARKDOWN = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable(["table", "strikethrough"])


def _is_safe(url: str) -> bool:
    # A browser reads "http:path" as a relative address, which would lead to an endpoint of the server.
    return url.strip().lower().startswith(("http://", "https://", "mailto:"))


# Not the built-in check, which lets through images as `data:` and any scheme that it does not know.
_validated: Any = _is_safe
_MARKDOWN.validateLink = _validated  # type: ignore[method-assign]


class _Kept:
    """The HTML of the texts that were asked for last, as much as fits into a bound."""

    def __init__(self) -> None:
        self._html: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()

    def get(self, text: str) -> str | None:
        with self._guard:
            html = self._html.get(text)
            if html is not None:
                self._html.move_to_end(text)
            return html

    def put(self, text: str, html: str) -> None:
        with self._guard:
            if text not in self._html:
                self._html[text] = html
                self._bytes += _size(text, html)
            while self._bytes > KEPT_BYTES:
                self._bytes -= _size(*self._html.popitem(last=False))


def _size(text: str, html: str) -> int:
    return sys.getsizeof(text) + sys.getsizeof(html)


_kept = _Kept()


def html_of(text: str) -> str | None:
    """Return the HTML of a text, or None if the text is too long for that."""
    if len(text) > MOST_CHARACTERS:
        return None
    html = _kept.get(text)
    if html is None:
        # Half an emoji cannot be encoded, and the renderer quotes links as UTF-8.
        html = str(_MARKDOWN.render(text.encode("utf-8", "replace").decode()))
        _kept.put(text, html)
    return html
