"""A responder whose words are the times at which it said them, for `scripts/bench-server`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from persist.asgi import Conversation, Part, Text


async def stamped(conversation: Conversation) -> AsyncIterator[Part]:
    """Answer a prompt ``"<count> <pause in seconds>"`` with so many times, in nanoseconds of the machine's clock."""
    count, pause_s = conversation.prompt.split()
    for _ in range(int(count)):
        await asyncio.sleep(float(pause_s))
        yield Text(f"{time.monotonic_ns()} ")
