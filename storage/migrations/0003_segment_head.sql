-- readable-by: 3
--
-- A segment says at its head whose its messages are, so that a start need not
-- read the messages, and a session that comes back finds its own. The head comes
-- before the body: SQLite reads what is behind a large value by way of it. The
-- next start moves the segments over, and drops the old table (segment_old.go).

ALTER TABLE segment RENAME TO segment_old;

CREATE TABLE segment (
  id            INTEGER PRIMARY KEY,
  head          BLOB    NOT NULL,         -- which of the messages are whose (segment.go)
  body          BLOB    NOT NULL          -- packed messages, one after the other
) STRICT;
