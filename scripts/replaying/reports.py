"""Reports: the lines that a played server sends to its supervisor, one after each verb that has returned.

A report is an acknowledgement. The thing that it reports was durable when it was sent. So this thing must be found at
the end, whatever is killed.
"""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass

from persist import json_codec

_STDOUT = 1


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that happened.

    Attributes:
        verb: a commit ("create", "append", "start", "checkpoint", "finish", "title"), a look ("seen"), or something to
            count ("busy", "conflict", "cleared", "taken-over").
        session_id: the session it happened to.
        item: the message's id. For a title, the id of its turn's prompt. For a stream that was cleared or taken over,
            the stream's id.
        stream_id: the stream that did it, if one did.
        took_s: seconds that the commit took, seen by its caller.
        revision: one that holds the commit. For a look, the revision that was seen.
        count: for a look, how many messages of the transcript were there, from the first on without a gap.
        has_merged: for a title, whether others had committed since its object was loaded.
    """

    verb: str
    session_id: str
    item: str | None = None
    stream_id: str | None = None
    took_s: float = 0.0
    revision: int = 0
    count: int = 0
    has_merged: bool = False

    def send(self) -> None:
        """Write the report to the standard output, which is the supervisor's pipe."""
        # One write of less than PIPE_BUF is atomic. So threads need no lock, and a kill tears no line.
        os.write(_STDOUT, json_codec.encode(astuple(self)) + b"\n")


COMMITS = frozenset({"create", "append", "start", "checkpoint", "finish", "title"})


def parse(line: bytes) -> Report:
    """Read a line that `Report.send` has written."""
    return Report(*json_codec.decode(line))
