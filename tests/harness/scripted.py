"""A responder that does what its prompt says, word by word.

- ``<file`` waits until that file is there.
- ``~`` waits until it is cancelled, and ``~0.1`` for some seconds.
- ``!`` fails with an exception, and ``!word`` with an error that the user sees.
- ``?word`` is a thought.
- ``@tool`` calls a tool and gets its output.
- ``#`` yields no part but another value.
- Any other word is said, with a blank behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from persist.asgi import Conversation, Error, Part, Reasoning, Text, ToolInput, ToolOutput


async def scripted(conversation: Conversation) -> AsyncIterator[Part]:
    """Answer a prompt."""
    for place, word in enumerate(conversation.prompt.split()):
        kind, rest = word[0], word[1:]
        if kind == "<":
            while not Path(rest).exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
                await asyncio.sleep(0.005)
        elif kind == "~":
            await asyncio.sleep(float(rest or 3600))
        elif kind == "!":
            if not rest:
                raise RuntimeError("The script says so.")
            yield Error(rest)
        elif kind == "?":
            yield Reasoning(rest)
        elif kind == "@":
            yield ToolInput(f"call-{place}", rest, {"place": place})
            yield ToolOutput(f"call-{place}", {"found": rest})
        elif kind == "#":
            wrong: Any = rest
            yield wrong
        else:
            yield Text(word + " ")
