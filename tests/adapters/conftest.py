"""The fixtures of the adapters' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import openai_server


@pytest.fixture
def model() -> Iterator[openai_server.Model]:
    """A local server that speaks the OpenAI protocol."""
    with openai_server.serving() as found:
        yield found
