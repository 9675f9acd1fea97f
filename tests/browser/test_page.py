"""The page at rest: the list of chats, old messages, hostile content, titles, deletion, keys, and narrow screens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from harness.chat_workers import Chat

pytest.importorskip("playwright", reason="the browser tests need the package playwright")
from harness.chat_page import Tab, expect, words

OpenTab = Callable[..., Tab]
#: The list of chats, as the page asks for it.
LISTS = "**/api/sessions?limit=50"
NARROW: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


def exchange(number: int, answer: str | None = None) -> list[dict[str, Any]]:
    """Return a prompt and its answer."""
    answer = f"Answer {number}" if answer is None else answer
    return [
        {"id": f"p{number}", "role": "user", "content": f"Prompt {number}"},
        {"id": f"a{number}", "role": "assistant", "content": answer},
    ]


def is_at_end(tab: Tab) -> bool:
    return bool(
        tab.page.locator("#scroll").evaluate("node => node.scrollHeight - node.scrollTop - node.clientHeight < 2")
    )


# --- the list of chats ---


def test_a_list_of_200_chats(chat: Chat, open_tab: OpenTab) -> None:
    """The list begins with the newest chats. Scrolling loads the others, each once and in order, and they open."""
    store = chat.store
    for number in range(200):
        store.create(f"chat-{number}", {"title": f"Title {number}", "messages": exchange(number)})
    tab = open_tab(chat.workers[0].url)
    expect(tab.rows).to_have_count(50)
    while tab.rows.count() < 200:
        before = tab.rows.count()
        tab.rows.last.scroll_into_view_if_needed()
        expect(tab.rows).not_to_have_count(before)
    expect(tab.page.get_by_role("button", name="Show more chats")).to_be_hidden()
    expect(tab.rows.locator(".name")).to_have_text([f"Title {number}" for number in reversed(range(200))])
    tab.page.get_by_role("link", name=re.compile(r"^Title 3 ")).click()
    tab.expect_answer("Answer 3")
    expect(tab.page.get_by_role("link", name=re.compile(r"^Title 3 "))).to_have_attribute("aria-current", "page")
    tab.send("Once more")
    expect(tab.rows.first).to_contain_text("Title 3")
    expect(tab.rows).to_have_count(200)


def test_an_empty_page_of_the_list_hides_no_chat(chat: Chat, open_tab: OpenTab) -> None:
    """A server that admits a user to few sessions may answer with an empty page, and more to come."""
    for number in range(3):
        chat.store.create(f"chat-{number}", {"title": f"Title {number}", "messages": []})
    tab = open_tab(chat.workers[0].url)
    expect(tab.rows).to_have_count(3)
    tab.page.route(LISTS, lambda route: route.fulfill(json={"sessions": [], "cursor": "1-x"}))
    for _ in range(2):  # the second request comes after the first answer was shown
        with tab.page.expect_response(LISTS):
            pass
    expect(tab.rows).to_have_count(3)
    expect(tab.connection).to_be_empty()


def test_an_empty_list(chat: Chat, open_tab: OpenTab) -> None:
    """A page without any chat says so, and a new chat comes into its list."""
    tab = open_tab(chat.workers[0].url)
    expect(tab.page.get_by_text("No chats yet.")).to_be_visible()
    expect(tab.page.get_by_role("heading", name="What would you like to talk about?")).to_be_visible()
    tab.send("Hello there")
    expect(tab.rows).to_have_text([re.compile("Hello there")])
    expect(tab.page.get_by_text("No chats yet.")).to_be_hidden()


# --- old messages ---


def test_old_messages_come_by_scrolling(chat: Chat, open_tab: OpenTab) -> None:
    """A chat opens at its end. Scrolling up loads the earlier messages, each once and in order, and the text stays."""
    messages = [message for number in range(100) for message in exchange(number)]
    chat.store.create("long", {"title": "Long", "messages": messages})
    tab = open_tab(f"{chat.workers[0].url}#long")
    tab.expect_answer("Answer 99")
    assert is_at_end(tab)
    articles, first = tab.page.locator("article"), tab.page.locator("article[data-id=p75]")
    expect(articles).to_have_count(50)
    top = first.evaluate("""node => {
        document.getElementById("scroll").scrollTop = 150;
        return node.getBoundingClientRect().top;
    }""")
    expect(articles).to_have_count(100)
    assert abs(first.evaluate("node => node.getBoundingClientRect().top") - top) < 2
    while articles.count() < 200:
        before = articles.count()
        tab.page.locator("#scroll").evaluate("node => node.scrollTo(0, 0)")
        expect(articles).not_to_have_count(before)
    expect(tab.prompts).to_have_text([f"Prompt {number}" for number in range(100)])
    expect(tab.page.get_by_role("button", name="Show earlier messages")).to_be_hidden()


def test_the_text_follows_only_a_reader_at_its_end(chat: Chat, open_tab: OpenTab) -> None:
    """A reader at the end sees new words come, also when the message box grows. A reader further up is left alone."""
    chat.pace.allow(2000)
    tab = open_tab(chat.workers[0].url)
    tab.send(words(4000))
    tab.expect_live(words(2000))
    expect(tab.page.get_by_role("button", name="Go to the newest message")).to_be_hidden()
    assert is_at_end(tab)
    tab.prompt.fill("line\n" * 20)
    chat.pace.allow(2500)
    tab.expect_live(words(2500))
    assert is_at_end(tab)
    tab.page.locator("#scroll").evaluate("node => node.scrollTo(0, 300)")
    expect(tab.page.get_by_role("button", name="Go to the newest message")).to_be_visible()
    chat.pace.allow(3000)
    tab.expect_live(words(3000))
    assert tab.page.locator("#scroll").evaluate("node => node.scrollTop") == 300
    tab.page.get_by_role("button", name="Go to the newest message").click()
    assert is_at_end(tab)
    chat.pace.allow(10_000)
    tab.expect_answer(words(4000))
    assert is_at_end(tab)


def test_earlier_answers_that_are_not_whole_say_so(chat: Chat, open_tab: OpenTab) -> None:
    """Each says how it ended, to a screen reader too. The last one has the note with its button instead."""
    ends: list[dict[str, Any]] = [
        {"interrupted": True, "stopped": True},
        {"interrupted": True, "error": "The model failed to answer."},
        {"interrupted": True},
        {},
        {"interrupted": True, "stopped": True},
    ]
    messages = [message for number in range(5) for message in exchange(number)]
    for number, end in enumerate(ends):
        messages[2 * number + 1].update(end)
    chat.store.create("one", {"title": "One", "messages": messages})
    tab = open_tab(f"{chat.workers[0].url}#one")
    expect(tab.note).to_contain_text("The answer was stopped.")
    for answer, mark in zip(
        tab.answers.all(),
        ["Stopped", "Failed: The model failed to answer.", "Cut off: the server ended", None, None],
        strict=True,
    ):
        expect(answer.locator(".mark")).to_have_text([mark] if mark else [])
        if mark:
            assert f"paragraph: {mark}" in answer.aria_snapshot().replace('"', "").replace("'", "")


# --- hostile content ---

SCRIPT = "globalThis.isHurt = true"
HOSTILE = f"""\
<script>{SCRIPT}</script> <img src=x onerror="{SCRIPT}"> <svg onload="{SCRIPT}"> <b onmouseover="{SCRIPT}">bold</b>

<iframe srcdoc="<script>parent.{SCRIPT}</script>"></iframe> <style>* {{ display: none }}</style>
<form action="api/sessions"><button id="send">x</button></form> <base href="http://elsewhere.example/">

[a](javascript:{SCRIPT.replace(" ", "")}) [b](JaVaScRiPt:alert`1`) [c](data:text/html,<script>{SCRIPT}</script>)
[d](vbscript:x) [e](&#106;avascript:alert(1)) [f](//elsewhere.example) [g](api/sessions) [h](java&#9;script:alert(1))
![i](http://elsewhere.example/pixel.png) ![j](javascript:alert(1)) <javascript:alert(1)> <http://elsewhere.example/k>
[l](http://elsewhere.example/" onmouseover="{SCRIPT}) [m](http://elsewhere.example/'onclick='x "t\\" onclick=\\"x")

[n]: javascript:alert(1)
[n] &lt;script&gt;{SCRIPT}&lt;/script&gt;

```html" onclick="{SCRIPT}
</code></pre><script>{SCRIPT}</script>
```

`<img src=x onerror={SCRIPT}>`

| <script>{SCRIPT}</script> | b |
|---|---|
| [x](javascript:alert(1)) | <img src=x> |
"""


def expect_harmless(tab: Tab) -> None:
    """See that no script has run, and that nothing on the page could run one, load something or submit something."""
    elements = "#log, #log *, #sessions, #sessions *"
    assert not tab.page.evaluate("globalThis.isHurt")
    wrong = "script, img, iframe, svg, object, embed, style, base, form, input, link, meta, video, audio"
    expect(tab.page.locator(f":is(#log, #sessions) :is({wrong})")).to_have_count(0)
    names = tab.page.locator(elements).evaluate_all("nodes => nodes.flatMap((node) => node.getAttributeNames())")
    assert {
        name for name in names if name.startswith("on") or name in ("style", "src", "srcdoc", "formaction")
    } == set()
    ids = tab.page.locator("#log *").evaluate_all("nodes => nodes.map((node) => node.id).filter(Boolean)")
    assert ids == []
    links = tab.page.locator("#log a").evaluate_all("nodes => nodes.map((node) => [node.protocol, node.rel])")
    assert all(protocol in ("http:", "https:", "mailto:") and "noopener" in rel for protocol, rel in links), links


def test_hostile_text_does_nothing(chat: Chat, open_tab: OpenTab) -> None:
    """HTML, scripts and links in a prompt, in its title and in its answer are text. A link leads to the web only."""
    tab = open_tab(chat.workers[0].url)
    chat.pace.allow(40)
    tab.prompt.fill(HOSTILE)
    tab.prompt.press("Enter")
    expect(tab.live.locator(".plain")).to_contain_text("<script>")
    expect_harmless(tab)
    chat.pace.allow(10**9)
    expect(tab.answers.last.locator(".markdown")).to_contain_text(f"<script>{SCRIPT}</script>")
    expect(tab.prompts.last.locator(".plain")).to_have_text(HOSTILE.strip())
    expect_harmless(tab)
    links = tab.page.locator("#log .markdown a").evaluate_all("nodes => nodes.map((node) => new URL(node.href).host)")
    assert links
    assert set(links) == {"elsewhere.example"}
    expect(tab.rows.first.locator(".name")).to_contain_text("<script>")
    for link in tab.page.locator("#log .markdown *").all():
        link.dispatch_event("mouseover")
    tab.page.reload()
    expect(tab.answers.last.locator(".markdown")).to_contain_text(f"<script>{SCRIPT}</script>")
    expect_harmless(tab)


def test_hostile_records_do_nothing(chat: Chat, open_tab: OpenTab) -> None:
    """Nothing in a stored session is taken for HTML: its title, the ids, roles, tools and errors of its messages."""
    evil = f'"><img src=x onerror="{SCRIPT}"><script>{SCRIPT}</script>'
    parts = [
        {"type": "reasoning", "text": evil},
        {"type": f"tool-{evil}", "toolCallId": evil, "input": evil, "output": {evil: evil}},
        {"type": evil, "text": evil},
        {"type": "text", "text": evil, "html": evil},
        {"type": "error", "text": evil},
    ]
    messages = [
        {"id": evil, "role": evil, "content": evil},
        {"id": "answer", "role": "assistant", "content": evil, "parts": parts},
        {"id": "constructor", "role": "__proto__", "content": [{"type": "text", "text": evil}]},
        {"id": "failed", "role": "assistant", "content": evil, "error": evil, "interrupted": True},
    ]
    chat.store.create("evil", {"title": evil, "messages": messages})
    tab = open_tab(f"{chat.workers[0].url}#evil")
    expect(tab.note).to_contain_text(evil)
    expect(tab.page.locator("article")).to_have_count(4)
    expect(tab.page.get_by_role("textbox", name="Title of this chat")).to_have_value(evil)
    expect_harmless(tab)
    assert tab.page.title() == evil


def test_thoughts_and_tools_are_folded(chat: Chat, open_tab: OpenTab) -> None:
    """The model's thoughts and its use of tools open on a click. They are the same while it comes and later."""
    chat.pace.allow(1)
    tab = open_tab(chat.workers[0].url)
    tab.send("think twice")
    summaries = tab.answers.last.locator("summary")
    expect(summaries).to_have_text(["Thoughts", "Used think twice"])
    summaries.last.click()
    expect(tab.live.locator("details").last).to_contain_text('"of": "think twice"')
    chat.pace.allow(10)
    expect(tab.live).to_have_count(0)
    expect(tab.answers.last.locator(":scope > :is(.plain, .markdown)")).to_have_text("think twice")
    expect(summaries).to_have_text(["Thoughts", "Used think twice"])
    summaries.last.click()
    expect(tab.answers.last.locator("details").last).to_contain_text('"of": "think twice"')


def test_a_whole_answer_keeps_the_order_of_its_parts(chat: Chat, open_tab: OpenTab) -> None:
    """Text, a tool and text again stand in the same order while they come and later. Each text has its own Markdown."""
    texts = ["**Before**", "*After*"]
    call = {"type": "tool-search", "toolCallId": "call", "state": "output-available", "input": "cats", "output": "two"}
    parts = [{"type": "text", "text": texts[0]}, call, {"type": "text", "text": texts[1]}]
    answer = {**exchange(1, "".join(texts))[1], "parts": parts}
    chat.store.create("one", {"title": "One", "messages": [exchange(1)[0], answer]})
    tab = open_tab(f"{chat.workers[0].url}#one")
    shown = tab.answers.last.locator(":scope > :is(.plain, .markdown, details)")
    expect(shown).to_have_text([re.compile("Before"), re.compile("Used search"), re.compile("After")])

    def render(route: Any) -> None:
        """Give each text its own HTML, or none."""
        told = route.fetch()
        body = told.json()
        for part in body["messages"][1]["parts"]:
            part.pop("html", None)
        body["messages"][1]["parts"][0]["html"] = "<p><strong>Before</strong></p>"
        route.fulfill(response=told, json=body)

    tab.page.route("**/sessions/one?*", render)
    tab.page.reload()
    expect(shown).to_have_text(["Before", re.compile("Used search"), texts[1]])
    expect(shown.first.locator("strong")).to_have_text("Before")


def test_code_is_copied_as_it_is(chat: Chat, open_tab: OpenTab) -> None:
    """The button of a block of code copies exactly that code, and the button of an answer its Markdown."""
    code = 'if a < b && c:\n\tprint("x")\n'
    answer = f"So:\n\n```python\n{code}```\n"
    chat.store.create("code", {"title": "Code", "messages": exchange(1, answer)})
    tab = open_tab(f"{chat.workers[0].url}#code", permissions=["clipboard-read", "clipboard-write"])
    tab.page.get_by_role("button", name="Copy", exact=True).click()
    expect(tab.page.get_by_role("button", name="Copied")).to_be_visible()
    assert tab.page.evaluate("navigator.clipboard.readText()") == code
    tab.page.get_by_role("button", name="Copy answer").click()
    tab.page.wait_for_function("text => navigator.clipboard.readText().then((found) => found === text)", arg=answer)


def test_code_that_is_cut_off_is_shaded(chat: Chat, open_tab: OpenTab) -> None:
    """An edge of a block of code is shaded only while it hides more of the code."""
    code = "```\nshort\n```\n\n```\n" + "long " * 100 + "\n```\n"
    chat.store.create("code", {"title": "Code", "messages": exchange(1, code)})
    tab = open_tab(f"{chat.workers[0].url}#code")
    blocks = tab.page.locator(".code pre")
    expect(blocks).to_have_count(2)
    short, long = blocks.all()

    def edges(block: Any) -> list[bytes]:
        """Return pictures of the two edges above the text."""
        box = block.bounding_box()
        top, ends = box["y"] + 1, (box["x"] + 1, box["x"] + box["width"] - 9)
        clips: list[Any] = [{"x": x, "y": top, "width": 8, "height": 8} for x in ends]
        return [tab.page.screenshot(clip=clip) for clip in clips]

    plain, same = edges(short)
    assert plain == same
    assert [edge == plain for edge in edges(long)] == [True, False]
    long.evaluate("node => node.scrollTo(200, 0)")
    assert [edge == plain for edge in edges(long)] == [False, False]
    long.evaluate("node => node.scrollTo(10_000, 0)")
    assert [edge == plain for edge in edges(long)] == [False, True]


# --- whose chats ---


def test_a_new_chat_has_an_id_that_the_server_offered(chat: Chat, open_tab: OpenTab) -> None:
    """Where each user may have other ids, both users begin chats from the page, and no id is used twice."""
    url = chat.start("--users").url
    tabs = {user: open_tab(url, extra_http_headers={"X-User": user}) for user in ("ann", "bob")}
    for user, tab in tabs.items():
        used = set[str]()
        for number in range(3):
            tab.page.get_by_role("link", name="New chat").click()
            tab.send(f"Chat {number} of {user}")
            tab.expect_answer(f"Chat {number} of {user}")
            used.add(tab.chat_id)
        assert len(used) == 3
        assert all(each.startswith(f"{user}:") for each in used)
    for user, tab in tabs.items():
        expect(tab.rows.locator(".name")).to_have_text([f"Chat {number} of {user}" for number in (2, 1, 0)])


def test_a_first_message_waits_for_the_offered_id(chat: Chat, open_tab: OpenTab) -> None:
    """A user who is faster than the first list gets an offered id all the same."""
    tab = open_tab(chat.start("--users").url, extra_http_headers={"X-User": "ann"})
    tab.page.goto("about:blank")  # or a request of the first page may be held
    held = tab.hold(LISTS)
    tab.page.goto(tab.url)
    tab.prompt.fill("At once")
    tab.prompt.press("Enter")
    tab.prompt.press("Enter")
    expect(tab.page.locator("#composer")).to_have_attribute("aria-busy", "true")
    held[0].continue_()
    tab.expect_answer("At once")
    assert tab.chat_id.startswith("ann:")
    assert len(tab.bodies("POST", "/turns$")) == 1


def test_a_new_chat_that_the_server_refuses(chat: Chat, open_tab: OpenTab) -> None:
    """A user who may begin no chat is told so, and keeps the message. Later it is sent with another id."""
    tab = open_tab(chat.start("--users").url, errors="404", extra_http_headers={"X-User": "ann"})
    tab.page.route(LISTS, lambda route: route.fulfill(json={"sessions": [], "cursor": None, "new_id": "bob:1"}))
    tab.page.reload()
    tab.prompt.fill("May I?")
    tab.prompt.press("Enter")
    expect(tab.notice).to_have_text("This server does not let you begin this chat. Your message stays here.")
    expect(tab.prompt).to_have_value("May I?")
    tab.page.unroute(LISTS)
    tab.page.reload()
    expect(tab.prompt).to_have_value("May I?")
    tab.prompt.press("Enter")
    tab.expect_answer("May I?")
    assert tab.chat_id.startswith("ann:")
    tab.page.goto(f"{tab.url}#bob:1")
    expect(tab.notice).to_contain_text("There is no chat here any more.")
    tab.prompt.fill("And here?")
    tab.prompt.press("Enter")
    expect(tab.notice).to_have_text("This server does not let you begin this chat. Your message stays here.")


def test_a_chat_that_was_begun_from_another_place_is_not_new(chat: Chat, open_tab: OpenTab) -> None:
    """A user who opens another chat before the first message is taken finds it in the list, and an empty new chat."""
    chat.store.create("one", {"title": "One", "messages": exchange(1)})
    tab = open_tab(chat.workers[0].url)
    held = tab.hold("**/turns")
    tab.prompt.fill("Hello there")
    with tab.page.expect_request("**/turns"):
        tab.prompt.press("Enter")
    tab.page.get_by_role("link", name="One").click()
    tab.expect_answer("Answer 1")
    held[0].continue_()
    expect(tab.rows.first).to_contain_text("Hello there")
    tab.page.get_by_role("link", name="New chat").click()
    expect(tab.prompt).to_have_value("")
    tab.send("Another one")
    tab.expect_answer("Another one")
    expect(tab.rows.locator(".name")).to_have_text(["Another one", "Hello there", "One"])


# --- titles, and deletion ---


def test_a_typed_title_stays_with_its_chat(chat: Chat, open_tab: OpenTab) -> None:
    """Back in the middle of typing a title: it goes to the chat that it was typed for, and not to the other one."""
    for name in ("one", "two"):
        chat.store.create(name, {"title": f"Chat {name}", "messages": exchange(1)})
    tab = open_tab(f"{chat.workers[0].url}#one")
    tab.expect_answer("Answer 1")
    tab.page.get_by_role("link", name="Chat two").click()
    expect(tab.page).to_have_title("Chat two")
    tab.page.get_by_role("textbox", name="Title of this chat").click()
    tab.page.keyboard.type("!")
    with tab.page.expect_response(lambda response: response.request.method == "PATCH"):
        tab.page.go_back()
    expect(tab.page).to_have_title("Chat one")
    expect(tab.rows.locator(".name")).to_have_text([re.compile("two"), "Chat one"])
    assert chat.store.load("one").data["title"] == "Chat one"
    assert "!" in chat.store.load("two").data["title"]


def test_a_title_is_changed_in_all_tabs(chat: Chat, open_tab: OpenTab) -> None:
    """A new title is stored and shown everywhere. Escape leaves the title as it was."""
    chat.store.create("one", {"title": "Old", "messages": exchange(1)})
    here, there = (open_tab(f"{worker.url}#one") for worker in chat.workers)
    titles = [tab.page.get_by_role("textbox", name="Title of this chat") for tab in (here, there)]
    expect(titles[0]).to_have_value("Old")
    titles[0].fill("Not so")
    titles[0].press("Escape")
    expect(titles[0]).to_have_value("Old")
    titles[0].fill("New")
    titles[0].press("Enter")
    expect(here.prompt).to_be_focused()
    expect(here.prompt).to_have_value("")
    expect(titles[1]).to_have_value("New")
    for tab in (here, there):
        expect(tab.rows).to_have_text([re.compile("New")])
        expect(tab.page).to_have_title("New")
    assert chat.store.load("one").data["title"] == "New"
    assert len(here.bodies("PATCH", "/one$")) == 1


def test_delete_asks_first(chat: Chat, open_tab: OpenTab) -> None:
    """A chat is deleted only after a question. A tab that has it open elsewhere says that it is gone."""
    for name in ("one", "two"):
        chat.store.create(name, {"title": f"Chat {name}", "messages": exchange(1)})
    here, there = (open_tab(f"{worker.url}#one", errors="404") for worker in chat.workers)
    delete = here.page.get_by_role("button", name="Delete this chat")
    there.expect_answer("Answer 1")
    delete.click()
    here.page.get_by_role("dialog", name="Delete this chat?").get_by_role("button", name="Keep it").click()
    expect(here.page.get_by_role("dialog")).to_be_hidden()
    delete.click()
    expect(here.page.get_by_role("button", name="Keep it")).to_be_focused()
    here.page.keyboard.press("Escape")
    expect(here.page.get_by_role("dialog")).to_be_hidden()
    assert here.bodies("DELETE", "") == []
    delete.click()
    here.page.get_by_role("button", name="Delete", exact=True).click()
    for tab in (here, there):
        expect(tab.rows).to_have_text([re.compile("Chat two")])
        expect(tab.page.locator("article")).to_have_count(0)
        expect(tab.page.get_by_role("button", name="Delete this chat")).to_be_hidden()
    expect(there.notice).to_contain_text("There is no chat here any more.")
    assert not chat.store.exists("one")
    there.send("Begin anew")
    there.expect_answer("Begin anew")
    expect(there.notice).to_be_empty()
    expect(there.page.get_by_role("button", name="Delete this chat")).to_be_visible()


def test_back_takes_the_question_away(chat: Chat, open_tab: OpenTab) -> None:
    """The question names its chat, and ends when another chat is opened. A confirmation cannot reach that other one."""
    for name in ("one", "two"):
        chat.store.create(name, {"title": f"Chat {name}", "messages": exchange(1)})
    tab = open_tab(f"{chat.workers[0].url}#one")
    tab.expect_answer("Answer 1")
    tab.page.get_by_role("link", name="Chat two").click()
    expect(tab.page).to_have_title("Chat two")
    tab.page.get_by_role("button", name="Delete this chat").click()
    expect(tab.page.get_by_role("dialog", name="Delete this chat?")).to_have_accessible_description(
        "All messages of “Chat two” are removed. This cannot be undone."
    )
    tab.page.go_back()
    expect(tab.page).to_have_title("Chat one")
    expect(tab.page.get_by_role("dialog")).to_be_hidden()
    expect(tab.prompt).to_be_focused()
    assert tab.bodies("DELETE", "") == []


def test_a_deletion_reaches_the_chat_that_was_asked_for(chat: Chat, open_tab: OpenTab) -> None:
    """The question is answered in the same moment as another chat is opened, which stays open."""
    for name in ("one", "two"):
        chat.store.create(name, {"title": f"Chat {name}", "messages": exchange(1)})
    tab = open_tab(f"{chat.workers[0].url}#two")
    tab.expect_answer("Answer 1")
    tab.page.get_by_role("button", name="Delete this chat").click()
    tab.page.evaluate("""
        document.getElementById("confirm").close("delete"); // its event comes later
        history.replaceState(null, "", "#one");
        dispatchEvent(new Event("hashchange"));
    """)
    expect(tab.rows).to_have_text([re.compile("Chat one")])
    expect(tab.page).to_have_title("Chat one")
    assert tab.chat_id == "one"
    assert [chat.store.exists(name) for name in ("one", "two")] == [True, False]


def test_a_chat_is_deleted_in_mid_answer(chat: Chat, open_tab: OpenTab) -> None:
    """Deleting a chat ends its answer. The other tab, which was reading it, says that the chat is gone."""
    chat.pace.allow(10)
    here = open_tab(chat.workers[0].url, errors="404")
    chat_id = here.send(words(30))
    there = open_tab(f"{chat.workers[1].url}#{chat_id}", errors="404")
    there.expect_live(words(10))
    here.page.get_by_role("button", name="Delete this chat").click()
    here.page.get_by_role("button", name="Delete", exact=True).click()
    expect(there.notice).to_contain_text("There is no chat here any more.")
    for tab in (here, there):
        expect(tab.rows).to_have_count(0)
        expect(tab.page.locator("article")).to_have_count(0)
        expect(tab.page.get_by_role("button", name="Stop the answer")).to_be_hidden()


# --- drafts ---


def test_a_draft_stays_with_its_chat(chat: Chat, open_tab: OpenTab) -> None:
    """A tab keeps a draft for each chat, through a change of chats, a reload and a new server."""
    chat.store.create("one", {"title": "One", "messages": exchange(1)})
    tab = open_tab(chat.workers[0].url, errors="ERR_|Failed to load resource")
    tab.prompt.fill("Not sent yet")
    tab.page.get_by_role("link", name="One").click()
    expect(tab.prompt).to_have_value("")
    tab.prompt.fill("For one")
    port = chat.workers[0].port
    chat.workers[0].kill()
    expect(tab.connection).to_contain_text("The connection is lost.")
    tab.prompt.press("End")
    tab.page.keyboard.type(", and more")
    chat.start("--port", str(port))
    expect(tab.connection).to_be_empty()
    expect(tab.prompt).to_have_value("For one, and more")
    expect(tab.prompt).to_be_focused()
    tab.page.reload()
    expect(tab.prompt).to_have_value("For one, and more")
    tab.page.get_by_role("link", name="New chat").click()
    expect(tab.prompt).to_have_value("Not sent yet")
    tab.send("Not sent yet")
    tab.page.get_by_role("link", name="New chat").click()
    expect(tab.prompt).to_have_value("")
    expect(tab.page.locator("article")).to_have_count(0)


# --- keys, screen readers, narrow screens ---


def test_all_by_keys(chat: Chat, open_tab: OpenTab) -> None:
    """Without a mouse: skip to the box, send, stop, open another chat, rename it and delete it."""
    chat.store.create("one", {"title": "One", "messages": exchange(1)})
    chat.pace.allow(3)
    tab = open_tab(chat.workers[0].url)
    keys = tab.page.keyboard
    expect(tab.prompt).to_be_focused()
    keys.type("This is")
    keys.press("Shift+Enter")
    keys.type("a prompt in two lines")
    keys.press("Enter")
    expect(tab.prompts.last).to_have_text("This is\na prompt in two lines", use_inner_text=True)
    tab.expect_live("This is\na")
    keys.press("Escape")
    expect(tab.note).to_contain_text("The answer was stopped.")
    tab.page.locator("#skip").focus()
    expect(tab.page.get_by_role("button", name="Skip to the message box")).to_be_in_viewport()
    keys.press("Tab")
    expect(tab.page.get_by_role("link", name="New chat")).to_be_focused()
    keys.press("Tab")
    keys.press("Tab")
    expect(tab.page.get_by_role("link", name="One")).to_be_focused()
    keys.press("Enter")
    tab.expect_answer("Answer 1")
    expect(tab.prompt).to_be_focused()
    tab.page.get_by_role("button", name="Skip to the message box").focus()
    keys.press("Enter")
    expect(tab.prompt).to_be_focused()
    keys.press("Shift+Tab")  # the answer's buttons
    expect(tab.page.get_by_role("button", name="Answer again")).to_be_focused()
    keys.press("Shift+Tab")
    expect(tab.page.get_by_role("button", name="Copy answer")).to_be_focused()
    keys.press("Shift+Tab")
    expect(tab.page.get_by_role("region", name="Messages")).to_be_focused()
    keys.press("Shift+Tab")
    expect(tab.page.get_by_role("button", name="Delete this chat")).to_be_focused()
    keys.press("Shift+Tab")
    keys.press("ControlOrMeta+a")
    keys.type("Renamed")
    keys.press("Enter")
    expect(tab.rows.filter(has_text="Renamed")).to_have_count(1)
    tab.page.get_by_role("button", name="Delete this chat").focus()
    keys.press("Enter")
    expect(tab.page.get_by_role("button", name="Keep it")).to_be_focused()
    keys.press("Tab")
    keys.press("Enter")
    expect(tab.rows).to_have_count(1)
    assert not chat.store.exists("one")


def test_a_screen_reader_is_told(chat: Chat, open_tab: OpenTab) -> None:
    """All that can be used has a name. An answer is told once it is whole, and an old chat is not read out."""
    chat.store.create("one", {"title": "One", "messages": exchange(1, "So:\n\n```\ncode\n```")})
    chat.pace.allow(2)
    tab = open_tab(f"{chat.workers[0].url}#one")
    expect(tab.answers).to_have_count(1)
    assert tab.log.get_attribute("aria-live") == "off"
    tab.send("Three more words")
    tab.expect_live("Three more")
    expect(tab.log).to_have_attribute("aria-live", "polite")
    expect(tab.live).to_have_attribute("aria-busy", "true")
    chat.pace.allow(100)
    tab.expect_answer("Three more words")
    expect(tab.page.locator("[aria-busy=true]")).to_have_count(0)
    for id in ("connection", "notice"):
        expect(tab.page.locator(f"#{id}")).to_have_attribute("role", "status")
    expect(tab.page.get_by_role("navigation", name="Chats")).to_be_visible()
    expect(tab.page.get_by_role("main")).to_be_visible()
    expect(tab.log).to_have_attribute("aria-label", "Conversation")
    snapshot = tab.page.locator("body").aria_snapshot()
    nameless = re.findall(r"^\s*- (?:button|link|textbox|checkbox|img|dialog|region)(?!.*\").*$", snapshot, re.M)
    assert nameless == []


def test_a_screen_reader_is_not_told_twice(chat: Chat, open_tab: OpenTab) -> None:
    """An article that was shown stays when the next turn begins and ends. Only its button or its mark changes."""
    chat.pace.allow(2)
    tab = open_tab(chat.workers[0].url)
    again, articles = tab.page.get_by_role("button", name="Answer again"), tab.page.locator("article:not(.live)")

    def expect_kept(ids: list[str]) -> None:
        """See that these articles were not made again, and remember all that are shown now."""
        assert (
            articles.evaluate_all("nodes => nodes.filter((node) => node.isKept).map((node) => node.dataset.id)") == ids
        )
        articles.evaluate_all("nodes => nodes.forEach((node) => (node.isKept = true))")

    def ids() -> list[str]:
        return list(articles.evaluate_all("nodes => nodes.map((node) => node.dataset.id)"))

    tab.send("One two")
    tab.expect_answer("One two")
    expect(again).to_have_count(1)
    expect_kept([])
    before = ids()
    tab.send("Stopped after two")
    tab.expect_live("Stopped after")
    expect(again).to_have_count(0)
    expect_kept(before)
    before = ids()
    assert len(before) == 3
    tab.page.get_by_role("button", name="Stop the answer").click()
    expect(tab.note).to_contain_text("The answer was stopped.")
    expect_kept(before)
    before = ids()
    tab.send("Three four")
    tab.expect_answer("Three four")
    expect(tab.marks).to_have_text(["Stopped"])
    expect(again).to_have_count(1)
    expect(tab.page.get_by_role("button", name="Copy answer")).to_have_count(2)
    expect_kept(before)


def test_a_narrow_screen(chat: Chat, open_tab: OpenTab) -> None:
    """On a phone the list is a drawer, nothing is wider than the screen, and no keyboard comes up by itself."""
    wide = "w" * 300
    answer = f"{wide}\n\n```\n{wide}\n```\n\n| {wide} | b |\n|---|---|\n| a | b |\n\nhttp://elsewhere.example/{wide}"
    chat.store.create("one", {"title": wide, "messages": [*exchange(1, answer), *exchange(2)]})
    chat.store.create("two", {"title": "Two", "messages": exchange(3)})
    tab = open_tab(chat.workers[0].url, **NARROW)
    menu, new = tab.page.get_by_role("button", name="Chats"), tab.page.get_by_role("link", name="New chat")
    expect(new).to_be_hidden()
    assert tab.page.evaluate("document.activeElement === document.body")
    menu.tap()
    expect(menu).to_have_attribute("aria-expanded", "true")
    expect(new).to_be_focused()
    tab.page.keyboard.press("Escape")
    expect(new).to_be_hidden()
    expect(menu).to_be_focused()
    menu.tap()
    tab.rows.last.tap()
    expect(new).to_be_hidden()
    expect(menu).to_have_attribute("aria-expanded", "false")
    tab.expect_answer("Answer 2")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.page.locator("#scroll").evaluate("node => node.scrollWidth <= node.clientWidth")
    menu.tap()
    tab.page.locator("#backdrop").tap(position={"x": 350, "y": 600})
    expect(new).to_be_hidden()
    tab.prompt.tap()
    tab.prompt.fill("From a phone")
    tab.page.get_by_role("button", name="Send").tap()
    tab.expect_answer("From a phone")


def test_only_the_page_sets_the_focus(chat: Chat, open_tab: OpenTab) -> None:
    """The page gives its box the focus. An `autofocus` beside it makes Chromium complain on the console."""
    tab = open_tab(chat.workers[0].url)
    expect(tab.prompt).to_be_focused()
    expect(tab.page.locator("[autofocus]")).to_have_count(0)


# --- where it is served ---


def test_the_page_below_a_prefix(chat: Chat, open_tab: OpenTab) -> None:
    """The page works where an app has mounted it, because all of its addresses are relative."""
    tab = open_tab(chat.start("--prefix", "/deep/down").url)
    tab.send("Hello there")
    tab.expect_answer("Hello there")
    tab.page.reload()
    tab.expect_answer("Hello there")
    assert all("/deep/down/" in each.url for each in tab.requests)
