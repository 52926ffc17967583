-- readable-by: 2
--
-- Everything MQTT promises to remember, written by the Journal in group
-- commits and by nobody else.
--
-- The queue store is a log. What a group commit has to keep is packed into a
-- few segment rows: each record is a message and the sessions that still owe
-- it to their clients, each with the sequence number it has there. A session
-- keeps a cursor instead of a row per message; what it finished or released
-- out of order behind the cursor stands in `progress`. A segment row goes when
-- no session needs any record of it.

CREATE TABLE session (
  id            INTEGER PRIMARY KEY,      -- never used again for another session while a segment names it
  client_id     TEXT    NOT NULL UNIQUE,
  expiry_s      INTEGER NOT NULL,         -- Session Expiry Interval, seconds; 4294967295 = never
  protocol      INTEGER NOT NULL,         -- 3, 4 or 5: how the client spoke last
  created_ms    INTEGER NOT NULL,         -- Unix milliseconds, for people only: the clock may be wrong
  ceiling       INTEGER NOT NULL,         -- sequence numbers below it may have been used; a restart goes on from here
  progress      BLOB    NOT NULL          -- cursor, finished and released sequence numbers (delivery.go, Progress)
) STRICT;

CREATE TABLE subscription (
  session_id    INTEGER NOT NULL,
  filter        TEXT    NOT NULL,         -- as the client wrote it, with $share/…
  options       INTEGER NOT NULL,         -- subscription options byte of MQTT 5 (3.8.3.1)
  identifier    INTEGER NOT NULL,         -- Subscription Identifier, 0 = none
  PRIMARY KEY (session_id, filter)
) STRICT, WITHOUT ROWID;

CREATE TABLE segment (
  id            INTEGER PRIMARY KEY,
  body          BLOB    NOT NULL          -- packed records (delivery.go)
) STRICT;

CREATE TABLE inbound (                    -- QoS 2 packet identifiers received and not yet released
  session_id    INTEGER NOT NULL,
  packet_id     INTEGER NOT NULL,
  PRIMARY KEY (session_id, packet_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE retained (
  topic         TEXT    PRIMARY KEY,
  message       BLOB    NOT NULL          -- packed message (message.go)
) STRICT, WITHOUT ROWID;

CREATE TABLE will (                       -- wills of connected clients, and delayed ones that are due
  client_id     TEXT    PRIMARY KEY,
  delay_s       INTEGER NOT NULL,         -- Will Delay Interval, seconds
  message       BLOB    NOT NULL
) STRICT, WITHOUT ROWID;
