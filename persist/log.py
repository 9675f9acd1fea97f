"""The log of the library, `logging.getLogger("persist")`. It names files and streams by their ids.

    DEBUG    a fold; a wait for a lock of over 50 ms, or in vain; a replica that caught up with the commits of others
    INFO     a stale stream that was cleared; a torn tail that was folded away
    WARNING  a commit whose outcome is unknown; a disk that refused; a journal that is older than what was read of it
    ERROR    a turn of the chat server that broke off, with its traceback; a request that it had to refuse

The log never holds the content of a document. No verb logs anything on its usual path.
"""

from __future__ import annotations

import logging

log = logging.getLogger("persist")
# A program that sets up no logging sees nothing of this log. `persist serve` sets it up.
log.addHandler(logging.NullHandler())
