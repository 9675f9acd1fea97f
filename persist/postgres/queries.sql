-- Each query has a name. {schema} stands for the quoted name of the schema.
-- Times are read as microseconds since 1970, and sent as ISO 8601, because a role may have a DateStyle of its own.

-- name: lock
-- Lock a session's row until the end of the transaction, and return it.
SELECT number, incarnation, revision, commit, epoch, (extract(epoch FROM created_at) * 1000000)::bigint,
       (extract(epoch FROM updated_at) * 1000000)::bigint, owner, fields, apart, commits, process, stream_id
FROM {schema}.sessions WHERE id = %(id)s FOR UPDATE

-- name: lock_name
-- Lock a session's name until the end of the transaction, whether there is such a session or not. Those who wait are
-- served in their order. A row's lock would go to whoever comes just when it is free. The transaction's number tells
-- later what has become of it. After a crash, the server gives the numbers again under which nothing was written.
-- Statistics begin anew then, so their time tells whether there was a crash.
SELECT pg_advisory_xact_lock(%(lock)s),
       pg_current_xact_id()::text || ' ' || coalesce(pg_stat_get_bgwriter_stat_reset_time()::text, '')

-- name: head
SELECT number, incarnation, revision, commit, epoch, (extract(epoch FROM created_at) * 1000000)::bigint,
       (extract(epoch FROM updated_at) * 1000000)::bigint, owner, fields, apart
FROM {schema}.sessions WHERE id = %(id)s

-- name: all_items
-- The items of all lists, one list after the other. Its name stands beside its first item.
SELECT CASE WHEN place = 0 THEN list END, item FROM {schema}.items
WHERE session = (SELECT number FROM {schema}.sessions WHERE id = %(id)s) ORDER BY list, place

-- name: all_parts
SELECT name, value FROM {schema}.parts WHERE session = (SELECT number FROM {schema}.sessions WHERE id = %(id)s)

-- name: last
-- The last items of a list, the last one first, with the session's fields.
SELECT s.fields, s.apart, i.item
FROM {schema}.sessions s LEFT JOIN LATERAL (
    SELECT item, place FROM {schema}.items WHERE session = s.number AND list = %(list)s ORDER BY place DESC LIMIT %(limit)s
) i ON true
WHERE s.id = %(id)s ORDER BY i.place DESC

-- name: items
SELECT item FROM {schema}.items WHERE session = %(session)s AND list = %(list)s AND place >= %(start)s AND place < %(stop)s ORDER BY place

-- name: items_of_key
-- The items with an id, the last one first. Two of them tell that the id is repeated.
SELECT place, item FROM {schema}.items
WHERE session = %(session)s AND list = %(list)s AND key = %(key)s AND place < %(stop)s ORDER BY place DESC LIMIT 2

-- name: seek_one
-- As `items_of_key`, of the session that was locked just now.
SELECT key, place, item FROM {schema}.items
WHERE session = (SELECT number FROM {schema}.sessions WHERE id = %(id)s) AND list = %(list)s AND key = %(key)s
ORDER BY place DESC LIMIT 2

-- name: seek
SELECT k.key, i.place, i.item
FROM {schema}.sessions s CROSS JOIN unnest(%(keys)s::text[]) AS k (key) CROSS JOIN LATERAL (
    SELECT place, item FROM {schema}.items
    WHERE session = s.number AND list = %(list)s AND key = k.key ORDER BY place DESC LIMIT 2
) i WHERE s.id = %(id)s ORDER BY i.place DESC

-- name: items_with
-- The items in whose text a value stands, the last one first.
SELECT place, item FROM {schema}.items
WHERE session = %(session)s AND list = %(list)s AND place < %(stop)s AND strpos(item, %(value)s) > 0 ORDER BY place DESC

-- name: parts
SELECT name, value FROM {schema}.parts WHERE session = %(session)s

-- name: create
INSERT INTO {schema}.sessions
    (id, incarnation, revision, commit, commits, epoch, created_at, updated_at, owner, process, stream_id, fields, apart)
VALUES (%(id)s, %(incarnation)s, %(revision)s, %(commit)s, %(commit)s, %(epoch)s, %(created_at)s, %(updated_at)s,
    %(owner)s, %(process)s, %(stream_id)s, %(fields)s, %(apart)s)

-- name: created
-- The number of the session that this transaction has created.
currval('{schema}.sessions_number_seq')

-- name: update
-- Compare and swap: if somebody has committed since, or if the stream's process is dead, nothing is found, and the
-- division by zero ends the transaction. So the statements behind this one, COMMIT included, need no answer of it.
WITH found AS (UPDATE {schema}.sessions SET revision = %(revision)s, commit = %(commit)s,
    commits = left(%(commit)s || commits, 512), epoch = %(epoch)s, updated_at = %(updated_at)s, owner = %(owner)s,
    process = %(process)s, stream_id = %(stream_id)s, fields = %(fields)s, apart = %(apart)s
WHERE number = %(session)s AND incarnation = %(incarnation)s AND commit = %(before)s
    AND (%(lease)s::uuid IS NULL
        OR EXISTS (SELECT FROM {schema}.processes WHERE id = %(lease)s::uuid AND expires_at > clock_timestamp()))
    RETURNING number)
SELECT 1 / count(*) FROM found

-- name: put_item
INSERT INTO {schema}.items (session, list, place, key, item)
VALUES (%(session)s, %(list)s, %(place)s, %(key)s, %(item)s)
ON CONFLICT (session, list, place) DO UPDATE SET key = excluded.key, item = excluded.item

-- name: put_items
INSERT INTO {schema}.items (session, list, place, key, item) VALUES %(rows)s
ON CONFLICT (session, list, place) DO UPDATE SET key = excluded.key, item = excluded.item

-- name: remove_items
DELETE FROM {schema}.items WHERE session = %(session)s AND list = %(list)s AND place >= %(start)s AND place < %(stop)s

-- name: move_items
-- In two steps, because no two items may have one place even for an instant.
UPDATE {schema}.items SET place = -1 - place WHERE session = %(session)s AND list = %(list)s AND place >= %(start)s;
UPDATE {schema}.items SET place = -1 - place + %(by)s WHERE session = %(session)s AND list = %(list)s AND place < 0

-- name: remove_list
DELETE FROM {schema}.items WHERE session = %(session)s AND list = %(list)s

-- name: put_part
INSERT INTO {schema}.parts (session, name, value) VALUES (%(session)s, %(name)s, %(value)s)
ON CONFLICT (session, name) DO UPDATE SET value = excluded.value

-- name: remove_part
DELETE FROM {schema}.parts WHERE session = %(session)s AND name = %(name)s

-- name: delete
-- As `update`.
WITH found AS (DELETE FROM {schema}.sessions
    WHERE number = %(session)s AND incarnation = %(incarnation)s AND commit = %(before)s RETURNING number)
SELECT 1 / count(*) FROM found

-- name: became
-- "committed", "aborted", or NULL for a transaction that is too long ago, and the time that `lock_name` tells.
SELECT CASE WHEN %(transaction)s::xid8 < pg_snapshot_xmax(pg_current_snapshot())
    THEN pg_xact_status(%(transaction)s::xid8) ELSE 'aborted' END,
    coalesce(pg_stat_get_bgwriter_stat_reset_time()::text, '')

-- name: exists
SELECT EXISTS (SELECT FROM {schema}.sessions WHERE id = %(id)s)

-- name: has_number
SELECT EXISTS (SELECT FROM {schema}.sessions WHERE number = %(session)s)

-- name: ids
SELECT id FROM {schema}.sessions ORDER BY id

-- name: recent
SELECT id, (extract(epoch FROM updated_at) * 1000000)::bigint, number FROM {schema}.sessions
WHERE (%(before)s::timestamptz IS NULL OR (updated_at, number) < (%(before)s::timestamptz, %(number)s))
ORDER BY updated_at DESC, number DESC LIMIT %(limit)s

-- name: leases
-- A stream that was dropped without an end has no process any more.
SELECT id, stream_id FROM {schema}.sessions WHERE stream_id IS NOT NULL ORDER BY id

-- name: holder
-- The transaction that has locked a session's name, or its row.
SELECT a.pid, a.application_name, to_char(a.xact_start AT TIME ZONE 'UTC', 'HH24:MI:SS')
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.classid = (%(lock)s >> 32 & 4294967295)::oid AND l.objid = (%(lock)s & 4294967295)::oid
UNION ALL SELECT a.pid, a.application_name, to_char(a.xact_start AT TIME ZONE 'UTC', 'HH24:MI:SS')
FROM {schema}.sessions s JOIN pg_stat_activity a ON a.backend_xid = s.xmax WHERE s.id = %(id)s
LIMIT 1

-- name: beat
-- Renew the process's row, or make it. A row whose time is over is never renewed.
UPDATE {schema}.processes SET expires_at = clock_timestamp() + make_interval(secs => %(lease_s)s)
WHERE id = %(process)s AND expires_at > clock_timestamp() RETURNING true

-- name: register
INSERT INTO {schema}.processes (id, host, pid, command, expires_at)
VALUES (%(process)s, %(host)s, %(pid)s, %(command)s, clock_timestamp() + make_interval(secs => %(lease_s)s))
ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at

-- name: unregister
DELETE FROM {schema}.processes WHERE id = %(process)s

-- name: is_alive
SELECT EXISTS (SELECT FROM {schema}.processes WHERE id = %(process)s AND expires_at > clock_timestamp())

-- name: remove_dead_processes
DELETE FROM {schema}.processes WHERE expires_at < clock_timestamp() - interval '1 day'

-- name: begin_stream
-- What an earlier stream of that id has left is gone.
DELETE FROM {schema}.streams WHERE session = %(session)s AND stream_id = %(stream_id)s;
INSERT INTO {schema}.streams (session, stream_id) VALUES (%(session)s, %(stream_id)s) RETURNING number

-- name: end_stream
WITH ended AS (
    UPDATE {schema}.streams SET ended = %(ended)s, ended_at = clock_timestamp()
    WHERE session = %(session)s AND stream_id = %(stream_id)s AND ended IS NULL RETURNING number
)
SELECT pg_notify(%(channel)s, number::text) FROM ended

-- name: emit
-- The fence: nothing is emitted to a stream that has ended, nor by a process whose time is over. Only this process
-- numbers the stream's events. So a part of them is there already if the answer of an earlier write was lost.
-- The oldest events are dropped by the way. A second update of the row in this transaction would make the server look
-- at the session's row, too, and wait for its lock.
WITH owned AS (
    UPDATE {schema}.streams SET last = %(last)s + %(count)s, first = greatest(first, %(first)s)
    WHERE number = %(stream)s AND ended IS NULL AND last BETWEEN %(last)s AND %(last)s + %(count)s
      AND EXISTS (SELECT FROM {schema}.processes WHERE id = %(process)s AND expires_at > clock_timestamp())
    RETURNING number
), made AS (
    INSERT INTO {schema}.events (stream, place, event)
    SELECT owned.number, %(last)s + n, event FROM owned, unnest(%(events)s::text[]) WITH ORDINALITY AS t(event, n)
    ON CONFLICT (stream, place) DO NOTHING
), dropped AS (
    DELETE FROM {schema}.events WHERE stream IN (SELECT number FROM owned) AND place < %(first)s
)
SELECT number FROM owned

-- name: emit_within
-- As `emit`, in a commit of the stream, which has proven the lease. As in `update`, nothing found ends the transaction.
WITH owned AS (
    UPDATE {schema}.streams SET last = %(last)s + %(count)s
    WHERE number = %(stream)s AND ended IS NULL AND last BETWEEN %(last)s AND %(last)s + %(count)s
    RETURNING number
), made AS (
    INSERT INTO {schema}.events (stream, place, event)
    SELECT owned.number, %(last)s + n, event FROM owned, unnest(%(events)s::text[]) WITH ORDINALITY AS t(event, n)
    ON CONFLICT (stream, place) DO NOTHING
)
SELECT 1 / count(*) FROM owned

-- name: find_stream
SELECT t.number, t.first, t.last, t.ended, t.session FROM {schema}.streams t JOIN {schema}.sessions s ON s.number = t.session
WHERE s.id = %(id)s AND t.stream_id = %(stream_id)s

-- name: events
SELECT t.first, t.last, t.ended, e.place, e.event
FROM {schema}.streams t LEFT JOIN LATERAL (
    SELECT place, event FROM {schema}.events
    WHERE stream = t.number AND place > %(after)s AND place <= %(until)s ORDER BY place LIMIT %(limit)s
) e ON true
WHERE t.number = %(stream)s ORDER BY e.place

-- name: news
-- The events of streams behind offsets, and what has become of these streams. Without an offset only that.
SELECT t.number, t.last, t.ended, s.stream_id IS NOT DISTINCT FROM t.stream_id AND p.id IS NOT NULL, e.place, e.event
FROM unnest(%(streams)s::bigint[], %(after)s::bigint[]) AS w (number, after)
JOIN {schema}.streams t ON t.number = w.number
JOIN {schema}.sessions s ON s.number = t.session
LEFT JOIN {schema}.processes p ON p.id = s.process AND p.expires_at > clock_timestamp()
LEFT JOIN LATERAL (
    SELECT place, event FROM {schema}.events WHERE stream = t.number AND place > w.after ORDER BY place LIMIT %(limit)s
) e ON true
ORDER BY t.number, e.place

-- name: runs
-- Whether a session's stream is this one, and whether its process is alive.
SELECT s.stream_id = %(stream_id)s, p.id IS NOT NULL
FROM {schema}.sessions s LEFT JOIN {schema}.processes p ON p.id = s.process AND p.expires_at > clock_timestamp()
WHERE s.id = %(id)s

-- name: remove_expired
-- Streams that never emitted keep no row for longer than the others.
DELETE FROM {schema}.streams WHERE number IN (
    SELECT number FROM {schema}.streams WHERE ended_at < clock_timestamp() - make_interval(secs => %(keep_s)s)
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED)

-- name: notify
SELECT pg_notify(%(channel)s, %(streams)s)

-- name: free
-- It never waits, because the heartbeat does it: a session that is locked just now is left for the next time.
WITH dropped AS (
    SELECT number FROM {schema}.sessions WHERE id = %(id)s AND stream_id = %(stream_id)s AND process = %(process)s
), free AS (
    SELECT number FROM {schema}.sessions WHERE number IN (SELECT number FROM dropped) FOR UPDATE SKIP LOCKED
), freed AS (
    UPDATE {schema}.sessions SET process = NULL WHERE number IN (SELECT number FROM free) RETURNING number
)
SELECT (SELECT count(*) FROM dropped) = (SELECT count(*) FROM freed)
