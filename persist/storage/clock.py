"""The clock by which waits are measured: time-outs, pauses between retries, and silences.

Test tools replace the clocks of the `time` module. freezegun stops `time.monotonic`, also under another name, and
time-machine moves every clock that tells the time of day. A time-out would then never come, or come at once
(freezegun #383). Both tools leave the kernel's monotonic clock alone.

The times in a document come from `datetime`, because a test that freezes the clock wants to see them frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

#: Seconds since some moment. This is no function in Python, because a lock calls it each time that it is taken.
#: It is a `partial`, because freezegun replaces the names of a module, and does not look into a `partial`. Windows has
#: no `clock_gettime`. There freezegun stops this clock only if it was active when this module was imported.
now_s: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_MONOTONIC) if hasattr(time, "clock_gettime") else partial(time.monotonic)
)
#: Nanoseconds since the epoch, by the clock that stamps files.
file_time_ns: Callable[[], int] = (
    partial(time.clock_gettime_ns, time.CLOCK_REALTIME) if hasattr(time, "clock_gettime") else partial(time.time_ns)
)
