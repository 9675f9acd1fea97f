"""The HTML that a worker keeps: as much as fits into a bound, whatever is asked for."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("markdown_it", reason="the extra `server` is not installed")

from persist.asgi import markdown


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Begin with nothing kept, and list the texts that are rendered."""
    texts: list[str] = []
    render = markdown._MARKDOWN.render

    def note(text: str) -> str:
        texts.append(text)
        return str(render(text))

    monkeypatch.setattr(markdown._MARKDOWN, "render", note)
    monkeypatch.setattr(markdown, "_kept", markdown._Kept())
    return texts


def kept_bytes() -> int:
    """Count again what is kept."""
    return sum(markdown._size(*pair) for pair in markdown._kept._html.items())


def test_a_text_is_rendered_once(rendered: list[str]) -> None:
    """Also one whose HTML is empty."""
    for text in ("*a*", "", "*a*", "", "*a*"):
        assert markdown.html_of(text) == ("<p><em>a</em></p>\n" if text else "")
    assert rendered == ["*a*", ""]


def test_what_is_kept_is_bounded_by_its_size(rendered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many long texts push each other out, the one that was not asked for longest first. Fails with a bounded count."""
    monkeypatch.setattr(markdown, "KEPT_BYTES", 500_000)
    texts = [f"{n} " + "<" * 20_000 for n in range(10)]
    for text in texts:
        markdown.html_of(texts[0])
        markdown.html_of(text)
    assert markdown._kept._bytes == kept_bytes() <= 500_000
    rendered.clear()
    markdown.html_of(texts[0])
    markdown.html_of(texts[-1])
    assert rendered == []
    markdown.html_of(texts[1])
    assert rendered == [texts[1]]


def test_a_text_larger_than_the_bound_is_not_kept(rendered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "KEPT_BYTES", 1000)
    assert markdown.html_of("x" * 2000) == f"<p>{'x' * 2000}</p>\n"
    assert (markdown._kept._bytes, kept_bytes()) == (0, 0)


def test_threads_keep_the_count_right(rendered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that render the same texts at once count each once."""
    monkeypatch.setattr(markdown, "KEPT_BYTES", 1000)
    barrier = threading.Barrier(8)

    def render() -> None:
        barrier.wait()
        for n in range(200):
            markdown.html_of(f"text {n % 20}")

    threads = [threading.Thread(target=render) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert markdown._kept._bytes == kept_bytes() <= 1000
    assert len(rendered) > 20
