"""Storage: sessions as files. It knows neither streams nor events.

These are the names that the layers above use, and that another engine has to offer:

    SessionFiles   read, read_head, exists, session_ids, leases, stream_ids, transaction
    Transaction    read, head, exists, commit, confirm, compact, accept, delete

A `Transaction` also turns the disk's errors into typed ones (`refusals`). The layer of the streams tries and takes a
session's leases inside a transaction (`lease.probe`, `lease.take`).

To read the code, begin with `commit`: it shows from top to bottom how a change becomes durable. `content` holds a
session's values. `document` and `journal` are its two files. `transaction` is the lock, with the operations under it.
"""
