"""The PostgreSQL engine: sessions as rows of a database, for any number of machines. It needs ``persist[postgres]``.

    transaction   the lock of a session's row, and the operations under it
    items         the items of a list that stay in the database until a verb needs them
    heartbeat     the row by which others see that this process lives
    events        the events of streams, and who is told of them
    connections   the connections, and the errors of the server
    queries.sql   every statement, by name
    migrations/   the schema, step by step

The schema's rule: a transaction locks one session's row first. So no two transactions wait for each other.
"""
