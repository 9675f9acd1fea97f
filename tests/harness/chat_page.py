"""The page of the chat server as a user has it: a tab of a browser."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import Page, expect

__all__ = ["Tab", "expect", "words"]


def words(count: int, first: int = 0) -> str:
    """Return a text of so many words, no two alike."""
    return " ".join(f"word{number}" for number in range(first, first + count))


class Tab:
    """A tab that has the page open.

    `faults` are the errors on its console, and its requests to elsewhere. Those that match `errors` are no faults.
    """

    def __init__(self, page: Page, url: str, errors: str | None = None) -> None:
        self.page, self.url, self.faults = page, url, list[str]()
        self.requests: list[Any] = []
        self._errors = errors
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", self._look)
        self.prompt = page.get_by_role("textbox", name="Your message")
        self.log = page.get_by_role("log")
        self.live = page.locator("article.live")
        self.answers = page.get_by_role("article", name="Assistant")
        self.prompts = page.get_by_role("article", name="You")
        self.note = page.locator(".note")
        self.marks = page.locator(".mark")
        self.notice = page.locator("#notice")
        self.connection = page.locator("#connection")
        self.rows = page.locator("#sessions a")
        page.goto(url)

    def _hear(self, message: Any) -> None:
        is_fault = message.type in ("error", "warning")
        if is_fault and not (self._errors and re.search(self._errors, message.text)):
            self.faults.append(f"console: {message.text}")

    def _look(self, request: Any) -> None:
        self.requests.append(request)
        origin = "/".join(self.url.split("/", 3)[:3])
        if not request.url.startswith(f"{origin}/"):
            self.faults.append(f"request to elsewhere: {request.url}")

    def send(self, text: str) -> str:
        """Send a prompt, and return the id of the chat."""
        self.prompt.fill(text)
        self.prompt.press("Enter")
        expect(self.prompts.last).to_have_text(text)
        expect(self.prompt).to_have_value("")
        return self.chat_id

    def hide(self, is_hidden: bool) -> None:
        """Bring another tab before this one, or this one back."""
        self.page.evaluate(
            """(isHidden) => {
                Object.defineProperty(document, "hidden", { get: () => isHidden, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            is_hidden,
        )

    def hold(self, pattern: str | re.Pattern[str]) -> list[Any]:
        """Hold back the next request to such an address. Return the list that it comes into."""
        held = list[Any]()

        def keep(route: Any) -> None:
            if held:
                route.fallback()
            else:
                held.append(route)

        self.page.route(pattern, keep)  # not `times=1`: without any route Playwright lets go of what is held
        return held

    @property
    def chat_id(self) -> str:
        return self.page.url.partition("#")[2]

    def expect_live(self, text: str) -> None:
        """Wait until the answer that is being written has exactly this text."""
        expect(self.live.locator(".plain")).to_have_text([text], use_inner_text=False)

    def expect_answer(self, text: str) -> None:
        """Wait until the last answer is whole, and see that it has exactly this text."""
        expect(self.live).to_have_count(0)
        expect(self.answers.last.locator(".markdown")).to_have_text(text)

    def bodies(self, method: str, pattern: str) -> list[Any]:
        """Return the JSON of the requests that this tab has sent to such an address."""
        sent = [each for each in self.requests if each.method == method and re.search(pattern, each.url)]
        return [each.post_data_json for each in sent]
