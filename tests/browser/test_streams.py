"""An answer on the page while it comes: from any worker, through reloads, crashes and lost connections.

The tests allow the model so many words. So an answer stands still where a test wants it, and no test depends on time.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
from actors import eventually
from harness.chat_workers import Chat

pytest.importorskip("playwright", reason="the browser tests need the package playwright")
from harness.chat_page import Tab, expect, words

OpenTab = Callable[..., Tab]
#: Chromium writes one of these about a connection that is gone.
LOST = "ERR_|Failed to load resource"
#: The connection of an answer, and the list of chats as the page asks for it.
EVENTS, LISTS = re.compile(r"/events\?"), re.compile(r"/api/sessions\?limit=50$")


def test_an_answer_streams_and_ends_as_markdown(chat: Chat, open_tab: OpenTab) -> None:
    """A prompt's answer grows word by word as plain text. When it is whole, it is shown as Markdown."""
    tab = open_tab(chat.workers[0].url)
    chat.pace.allow(3)
    tab.send("This has **strong** words and `code`")
    tab.expect_live("This has **strong**")
    expect(tab.page.get_by_role("button", name="Stop the answer")).to_be_visible()
    expect(tab.rows.first.get_by_role("img", name="An answer is being written")).to_be_visible()
    chat.pace.allow(5)
    tab.expect_live("This has **strong** words and")
    chat.pace.allow(100)
    tab.expect_answer("This has strong words and code")
    expect(tab.answers.last.locator("strong")).to_have_text("strong")
    expect(tab.page.get_by_role("button", name="Stop the answer")).to_be_hidden()
    expect(tab.rows.first.get_by_role("img")).to_have_count(0)


def test_a_reload_goes_on_without_gap_or_repeat(chat: Chat, open_tab: OpenTab) -> None:
    """After a reload in mid-answer the page shows what was said, and goes on behind it. The stored part is not streamed
    again."""
    text = words(200)
    chat.pace.allow(40)
    tab = open_tab(chat.workers[0].url)
    chat_id = tab.send(text)
    tab.expect_live(words(40))
    eventually(lambda: chat.store.tail(chat_id, limit=1)[0].get("offset", 0) > 0)
    for allowed in (40, 41, 90, 150):
        chat.pace.allow(allowed)
        with tab.page.expect_request("**/events?*") as followed:
            tab.page.reload()
        tab.expect_live(words(allowed))
        assert int(re.findall(r"after=(\d+)", followed.value.url)[0]) > 0
    chat.pace.allow(1000)
    tab.expect_answer(text)


def test_reloads_beside_a_fast_answer(chat: Chat, open_tab: OpenTab) -> None:
    """However often the page is reloaded while words pour in, its text is always a beginning of the answer."""
    text = words(2000)
    chat.pace.allow(1)
    tab = open_tab(chat.workers[0].url)
    tab.send(text)
    for allowed in range(50, 2000, 250):
        chat.pace.allow(allowed)
        tab.page.reload()
        tab.live.locator(".plain").wait_for()
        for _ in range(5):
            shown = tab.live.locator(".plain").evaluate("node => node.textContent")
            assert text.startswith(shown)
    chat.pace.allow(10_000)
    tab.expect_answer(text)


def test_two_tabs_on_two_workers_follow_one_turn(chat: Chat, open_tab: OpenTab) -> None:
    """A tab on another worker shows a turn that was not there when it was opened, and both end with the same text."""
    here = open_tab(chat.workers[0].url)
    chat_id = here.send("Hello there")
    here.expect_answer("Hello there")
    there = open_tab(f"{chat.workers[1].url}#{chat_id}")
    there.expect_answer("Hello there")
    chat.pace.allow(20)
    here.send(words(60))
    here.expect_live(words(20))
    there.expect_live(words(20))
    chat.pace.allow(40)
    here.expect_live(words(40))
    there.expect_live(words(40))
    chat.pace.allow(1000)
    here.expect_answer(words(60))
    there.expect_answer(words(60))


def test_stop_from_the_other_tab(chat: Chat, open_tab: OpenTab) -> None:
    """A stop from a tab on another worker ends the answer in both tabs. They keep its words, and can ask again."""
    chat.pace.allow(20)
    here = open_tab(chat.workers[0].url)
    chat_id = here.send(words(60))
    there = open_tab(f"{chat.workers[1].url}#{chat_id}")
    there.expect_live(words(20))
    there.page.get_by_role("button", name="Stop the answer").click()
    for tab in (here, there):
        expect(tab.note).to_contain_text("The answer was stopped.")
        expect(tab.answers.last.locator(".plain")).to_have_text(words(20))
        expect(tab.live).to_have_count(0)
    assert chat.store.stream(chat_id) is None
    chat.pace.allow(1000)
    there.note.get_by_role("button", name="Try again").click()
    for tab in (here, there):
        tab.expect_answer(words(60))
        expect(tab.note).to_have_count(0)
        expect(tab.prompts).to_have_count(1)


def test_earlier_partial_answers_stay_beside_a_live_one(chat: Chat, open_tab: OpenTab) -> None:
    """A stopped and a cut off answer stay in the chat while a later one is written. Each says how it ended."""
    chat.pace.allow(3)
    tab = open_tab(chat.workers[0].url, errors=LOST)
    chat_id = tab.send(words(10))
    tab.expect_live(words(3))
    tab.page.get_by_role("button", name="Stop the answer").click()
    expect(tab.note).to_contain_text("The answer was stopped.")
    expect(tab.marks).to_have_count(0)  # the note says it
    tab.send(words(10, 10))
    tab.expect_live(words(3, 10))
    expect(tab.answers.first.locator(".plain")).to_have_text(words(3))
    expect(tab.marks).to_have_text(["Stopped"])
    chat.wait_until_kept(chat_id, words(3, 10))
    chat.workers[0].kill()
    tab = open_tab(f"{chat.workers[1].url}#{chat_id}")
    expect(tab.note).to_contain_text("The server ended before the answer was whole.")
    tab.send(words(10, 20))
    for _ in range(2):
        tab.expect_live(words(3, 20))
        expect(tab.answers.locator(".plain")).to_have_text([words(3), words(3, 10), words(3, 20)])
        expect(tab.marks).to_have_text(["Stopped", "Cut off: the server ended"])
        chat.wait_until_kept(chat_id, words(3, 20))
        tab.page.reload()
    chat.pace.allow(1000)
    tab.expect_answer(words(10, 20))
    expect(tab.answers).to_have_count(3)
    expect(tab.marks).to_have_text(["Stopped", "Cut off: the server ended"])


def test_a_prompt_without_an_answer_says_so(chat: Chat, open_tab: OpenTab) -> None:
    """An answer that was stopped before its first word leaves nothing in the chat. Its prompt says that, once a next
    prompt has taken the place of the note."""
    chat.pace.allow(0)
    tab = open_tab(chat.workers[0].url)
    tab.send("Stopped")
    tab.page.get_by_role("button", name="Stop the answer").click()
    expect(tab.note).to_contain_text("The answer ended before its first word.")
    expect(tab.marks).to_have_count(0)
    tab.prompt.fill("Answered")
    tab.prompt.press("Enter")
    chat.pace.allow(10)
    tab.expect_answer("Answered")
    for _ in range(2):
        expect(tab.prompts.first.locator(".mark")).to_have_text("No answer")
        expect(tab.marks).to_have_count(1)
        tab.page.reload()


def test_a_retry_in_a_tab_that_is_behind_replaces_nothing(chat: Chat, open_tab: OpenTab) -> None:
    """Another tab has sent a message since. Fails if a retry names no message: the answer of the other tab is gone."""
    here = open_tab(chat.workers[0].url, errors="409")
    chat_id = here.send("First")
    here.expect_answer("First")
    here.hide(True)
    there = open_tab(f"{chat.workers[1].url}#{chat_id}")
    there.send("Second")
    there.expect_answer("Second")
    stored = chat.store.tail(chat_id)
    here.page.get_by_role("button", name="Answer again").click()
    expect(here.notice).to_have_text("The session has changed meanwhile. Look at it again.")
    here.hide(False)
    expect(here.answers).to_have_text([re.compile("First"), re.compile("Second")])
    assert chat.store.tail(chat_id) == stored


def test_a_worker_dies_in_mid_answer(chat: Chat, open_tab: OpenTab) -> None:
    """After `kill -9` the page says that the server ended, shows what was kept, and a retry answers in full."""
    chat.pace.allow(30)
    here = open_tab(chat.workers[0].url, errors=LOST)
    chat_id = here.send(words(60))
    there = open_tab(f"{chat.workers[1].url}#{chat_id}")
    for tab in (here, there):
        tab.expect_live(words(30))
    chat.wait_until_kept(chat_id, words(30))
    chat.workers[0].kill()
    expect(there.note).to_contain_text("The server ended before the answer was whole.")
    expect(here.connection).to_contain_text("The connection is lost.")
    here.expect_live(words(30))
    there.page.reload()
    expect(there.note).to_contain_text("What was written until then is kept.")
    expect(there.answers.last.locator(".plain")).to_have_text(words(30))
    chat.start("--port", str(chat.workers[0].port))
    expect(here.note).to_contain_text("The server ended before the answer was whole.")
    expect(here.connection).to_be_empty()
    chat.pace.allow(1000)
    here.note.get_by_role("button", name="Try again").click()
    for tab in (here, there):
        tab.expect_answer(words(60))
        expect(tab.note).to_have_count(0)
        expect(tab.prompts).to_have_count(1)


def test_offline_and_back(chat: Chat, open_tab: OpenTab) -> None:
    """A tab that loses its connection says so, keeps its text, and goes on behind it without gap or repeat."""
    chat.pace.allow(20)
    tab = open_tab(chat.workers[0].url, errors=LOST)
    tab.send(words(100))
    tab.expect_live(words(20))
    tab.page.context.set_offline(True)
    expect(tab.connection).to_contain_text("The connection is lost.")
    chat.pace.allow(60)
    tab.expect_live(words(20))
    tab.page.context.set_offline(False)
    tab.expect_live(words(60))
    expect(tab.connection).to_be_empty()
    tab.page.context.set_offline(True)
    expect(tab.connection).to_contain_text("The connection is lost.")
    chat.pace.allow(1000)
    tab.page.context.set_offline(False)
    tab.expect_answer(words(100))


def test_a_worker_that_hangs_is_no_harm_to_a_reload_elsewhere(chat: Chat, open_tab: OpenTab) -> None:
    """A worker that stands still keeps its turn. The other worker shows the text so far, and the rest when it wakes."""
    chat.pace.allow(20)
    here = open_tab(chat.workers[0].url)
    chat_id = here.send(words(60))
    here.expect_live(words(20))
    with chat.store.transaction(chat_id):  # so the worker does not hold the session's lock when it stops
        chat.workers[0].send(signal.SIGSTOP)
    there = open_tab(f"{chat.workers[1].url}#{chat_id}")
    there.expect_live(words(20))
    chat.pace.allow(1000)
    chat.workers[0].send(signal.SIGCONT)
    there.expect_answer(words(60))
    here.expect_answer(words(60))


def test_an_expired_cursor_shows_the_stored_answer(chat: Chat, open_tab: OpenTab) -> None:
    """A tab that was away while its next events were dropped is told so. It goes on behind the stored answer."""
    small = chat.start("--keep-events-bytes", "4096")
    chat.pace.allow(20)
    tab = open_tab(small.url, errors=LOST)
    text = words(3000)
    tab.send(text)
    tab.expect_live(words(20))
    tab.page.context.set_offline(True)
    expect(tab.connection).to_contain_text("The connection is lost.")
    chat.pace.allow(2000)
    there = open_tab(tab.page.url)
    there.expect_live(words(2000))
    told = list[Any]()
    tab.page.expose_function("tellExpired", lambda: told.append("expired"))
    tab.page.evaluate("""
        const listen = EventSource.prototype.addEventListener;
        EventSource.prototype.addEventListener = function (name, heard) {
          listen.call(this, name, name === "expired" ? (event) => (tellExpired(), heard(event)) : heard);
        };
    """)
    tab.page.context.set_offline(False)
    tab.expect_live(words(2000))
    assert told == ["expired"]
    chat.pace.allow(10_000)
    tab.expect_answer(text)


def test_a_failed_request_is_sent_again_with_its_id(chat: Chat, open_tab: OpenTab) -> None:
    """If the answer to a prompt is lost on its way, the prompt stays in the box. Sent again it is not doubled."""
    tab = open_tab(chat.workers[0].url, errors=LOST)

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    tab.page.route("**/turns", lose, times=1)
    tab.prompt.fill("Only once")
    tab.prompt.press("Enter")
    expect(tab.notice).to_contain_text("Your message stays here")
    expect(tab.prompt).to_have_value("Only once")
    tab.page.reload()
    expect(tab.prompt).to_have_value("Only once")
    tab.prompt.press("Enter")
    tab.expect_answer("Only once")
    expect(tab.prompt).to_have_value("")
    expect(tab.prompts).to_have_count(1)
    first, second = tab.bodies("POST", "/turns$")
    assert first == second
    assert [each["role"] for each in chat.store.tail(tab.chat_id)] == ["user", "assistant"]


def test_a_prompt_that_arrived_all_the_same_leaves_the_box(chat: Chat, open_tab: OpenTab) -> None:
    """If the server got the prompt and the page did not learn it, the page shows it as sent as soon as it sees it."""
    tab = open_tab(chat.workers[0].url, errors=LOST)
    tab.send("First")
    tab.expect_answer("First")

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    tab.page.route("**/turns", lose, times=1)
    tab.prompt.fill("Second")
    tab.prompt.press("Enter")
    tab.expect_answer("Second")
    expect(tab.prompt).to_have_value("")
    expect(tab.prompts).to_have_text(["First", "Second"])


def test_a_busy_chat_keeps_the_prompt(chat: Chat, open_tab: OpenTab) -> None:
    """A prompt that is sent while an answer comes is refused kindly. It stays in the box, also after a reload."""
    chat.pace.allow(5)
    here = open_tab(chat.workers[0].url)
    chat_id = here.send(words(60))
    there = open_tab(f"{chat.workers[1].url}#{chat_id}", errors="409")
    there.expect_live(words(5))
    there.prompt.fill("And now?")
    there.prompt.press("Enter")
    expect(there.notice).to_contain_text("Another answer was being written")
    expect(there.prompt).to_have_value("And now?")
    there.page.reload()
    expect(there.prompt).to_have_value("And now?")
    chat.pace.allow(1000)
    there.expect_answer(words(60))
    expect(there.notice).to_be_empty()
    there.prompt.press("Enter")
    there.expect_answer("And now?")
    here.expect_answer("And now?")


def test_two_tabs_send_at_once(chat: Chat, open_tab: OpenTab) -> None:
    """Of two prompts that are sent at the same time one is answered. The other tab says why, and keeps its prompt."""
    chat.store.create("one", {"title": "One", "messages": []})
    chat.pace.allow(1)
    tabs = [open_tab(f"{worker.url}#one", errors="409") for worker in chat.workers]
    for number, tab in enumerate(tabs):
        expect(tab.rows).to_have_count(1)
        tab.prompt.fill(f"Prompt {number}")
    with chat.store.transaction("one"):  # so both of them wait for the lock
        for tab in tabs:
            with tab.page.expect_request("**/turns"):
                tab.prompt.press("Enter")
    for tab in tabs:
        expect(tab.prompts).to_have_count(1)
    (sent,) = (each["content"] for each in chat.store.tail("one") if each["role"] == "user")
    winner, loser = tabs if sent == "Prompt 0" else tabs[::-1]
    expect(loser.notice).to_contain_text("Another answer was being written")
    expect(loser.prompt).not_to_have_value("")
    expect(winner.prompt).to_have_value("")
    expect(winner.notice).to_be_empty()
    chat.pace.allow(100)
    loser.expect_answer(sent)
    expect(loser.notice).to_be_empty()
    loser.prompt.press("Enter")
    for tab in tabs:
        expect(tab.prompts).to_have_count(2)
        expect(tab.answers).to_have_count(2)
        expect(tab.live).to_have_count(0)


def test_a_connection_dies_in_silence_before_the_end(chat: Chat, open_tab: OpenTab) -> None:
    """Nothing comes on the connection any more, and no error. The list tells that the answer is over."""
    tab = open_tab(chat.workers[0].url)
    held = tab.hold(EVENTS)
    tab.send("Hello there")
    tab.expect_answer("Hello there")
    assert len(held) == 1


def test_a_connection_dies_in_silence_before_the_next_answer(chat: Chat, open_tab: OpenTab) -> None:
    """The list tells that another answer is written by now, and the page follows that one."""
    chat.store.create("one", {"title": "One", "messages": []})
    here, there = (open_tab(f"{worker.url}#one") for worker in chat.workers)
    expect(here.rows).to_have_count(1)
    with here.page.expect_request(LISTS):
        listed = here.hold(LISTS)
    held = here.hold(EVENTS)
    here.send("Hello there")
    there.expect_answer("Hello there")
    chat.pace.allow(5)
    there.send(words(60))
    there.expect_live(words(5))
    listed[0].continue_()
    here.expect_live(words(5))
    assert len(held) == 1
    expect(here.prompts).to_have_count(2)
    chat.pace.allow(1000)
    here.expect_answer(words(60))


def test_a_hidden_tab_follows_nothing(chat: Chat, open_tab: OpenTab) -> None:
    """A tab behind another one holds no connection. Seen again, it goes on without gap or repeat."""
    chat.pace.allow(20)
    tab = open_tab(chat.workers[0].url)
    tab.hide(True)
    tab.hide(False)
    chat_id = tab.send(words(100))
    tab.expect_live(words(20))
    with tab.page.expect_event("requestfailed", lambda request: "/events?" in request.url):
        tab.hide(True)
    there = open_tab(f"{chat.workers[1].url}#{chat_id}")
    chat.pace.allow(40)
    there.expect_live(words(40))
    tab.expect_live(words(20))
    tab.hide(False)
    tab.expect_live(words(40))
    tab.hide(True)
    chat.pace.allow(1000)
    there.expect_answer(words(100))
    tab.expect_live(words(40))
    tab.hide(False)
    tab.expect_answer(words(100))


def test_a_server_is_restarted_in_mid_answer(chat: Chat, open_tab: OpenTab) -> None:
    """A server that is told to end keeps what was said. The page says so, and asks again at the new server."""
    chat.pace.allow(20)
    tab = open_tab(chat.workers[0].url, errors=LOST)
    tab.send(words(60))
    tab.expect_live(words(20))
    chat.workers[0].send(signal.SIGTERM)
    chat.workers[0].wait()
    chat.start("--port", str(chat.workers[0].port))
    expect(tab.note).to_contain_text("The server was stopped in the middle of this answer.")
    expect(tab.answers.last.locator(".plain").first).to_have_text(words(20))
    expect(tab.connection).to_be_empty()
    chat.pace.allow(1000)
    tab.note.get_by_role("button", name="Try again").click()
    tab.expect_answer(words(60))
    expect(tab.prompts).to_have_count(1)
