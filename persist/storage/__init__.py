"""Storage: sessions as files. It knows neither streams nor events.

What the layers above use, and what another engine has to offer:

    SessionFiles   read, read_head, exists, session_ids, leases, stream_ids, transaction
    Transaction    read, head, exists, commit, confirm, compact, accept, delete

A `Transaction` also turns the disk's errors into typed ones (`refusals`). The streams try and take a session's leases in
it (`lease.probe`, `lease.take`).

To read the code, begin with `commit`: it shows from top to bottom how a change becomes durable. `content` is what a
session holds, `document` and `journal` are its two files, and `transaction` is the lock with what may be done under it.
"""
