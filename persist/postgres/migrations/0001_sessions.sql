-- Sessions: one row a session, one row an item of a list that stands apart, and one row any other value that does.
-- All JSON is text, because jsonb would reorder keys, turn -0.0 into 0.0, and refuse \u0000.

CREATE TABLE {schema}.sessions (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The session's id, with a backslash as \\ and a NUL as \0.
    id text COLLATE "C" NOT NULL UNIQUE,
    incarnation text NOT NULL,
    revision bigint NOT NULL,
    commit text NOT NULL,
    -- The ids of the last commits, one after the other, the last one first. See commit.py.
    commits text NOT NULL,
    epoch bigint NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    owner text,
    -- The process that runs the session's stream. It need not live. See heartbeat.py.
    process uuid,
    stream_id text,
    -- The small values, as one JSON object.
    fields text NOT NULL,
    -- The values that stand apart: name -> [items, or null for another value, bytes]. Their order is that of the keys.
    apart text NOT NULL
);
CREATE INDEX sessions_recent ON {schema}.sessions (updated_at DESC, number DESC);
CREATE INDEX sessions_leases ON {schema}.sessions (id) WHERE stream_id IS NOT NULL;

CREATE TABLE {schema}.items (
    session bigint NOT NULL REFERENCES {schema}.sessions ON DELETE CASCADE,
    list text COLLATE "C" NOT NULL,
    -- Places count from 0, without gaps.
    place bigint NOT NULL,
    -- The JSON of the item's "id", by which it is found, or a hash of a long one. See items.py.
    key text COLLATE "C",
    item text NOT NULL,
    PRIMARY KEY (session, list, place)
);
-- With the place, so that the server never reads a whole list backwards to find the last item with a key.
CREATE INDEX items_keys ON {schema}.items (session, list, key, place) WHERE key IS NOT NULL;

CREATE TABLE {schema}.parts (
    session bigint NOT NULL REFERENCES {schema}.sessions ON DELETE CASCADE,
    name text COLLATE "C" NOT NULL,
    value text NOT NULL,
    PRIMARY KEY (session, name)
);

-- Processes that run streams, by the clock of the server.
CREATE TABLE {schema}.processes (
    id uuid PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    command text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL
);

CREATE TABLE {schema}.streams (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session bigint NOT NULL REFERENCES {schema}.sessions ON DELETE CASCADE,
    stream_id text COLLATE "C" NOT NULL,
    -- The offsets of the first event that is left, and of the last one.
    first bigint NOT NULL DEFAULT 1,
    last bigint NOT NULL DEFAULT 0,
    ended text,
    ended_at timestamptz,
    UNIQUE (session, stream_id)
);
CREATE INDEX streams_ended ON {schema}.streams (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE {schema}.events (
    stream bigint NOT NULL REFERENCES {schema}.streams ON DELETE CASCADE,
    place bigint NOT NULL,
    event text NOT NULL,
    PRIMARY KEY (stream, place)
);
