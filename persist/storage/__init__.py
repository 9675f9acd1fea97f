"""Storage: sessions as files. It knows neither streams nor events.

The layers above use it through an engine (see `persist.engine` and `persist.files`).

To read the code, begin with `commit`: it shows from top to bottom how a change becomes durable. `content` holds a
session's values. `document` and `journal` are its two files. `transaction` is the lock, with the operations under it.
"""
