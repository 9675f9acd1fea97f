"""The clock by which waits are measured: time-outs, pauses between retries, and silences.

Test tools replace the clocks of the `time` module. freezegun stops `time.monotonic`, also under another name, and
time-machine moves every clock that tells the time of day. A time-out would then never come, or come at once
(freezegun #383). Both tools leave the kernel's monotonic clock alone.

Times that a document keeps come from `datetime`, because a test that freezes the clock wants to see them frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

#: Seconds since some moment. No function of Python's, because a lock asks each time that it is taken.
#: Windows has no `clock_gettime`. freezegun replaces the names of a module, and does not look into a `partial`. There
#: it stops this clock only if it was at work when this module was imported.
now_s: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_MONOTONIC) if hasattr(time, "clock_gettime") else partial(time.monotonic)
)
