CREATE TABLE acl_rule (
    position  INTEGER NOT NULL PRIMARY KEY,
    username  TEXT    NOT NULL,
    client_id TEXT    NOT NULL,
    address   TEXT    NOT NULL, -- a CIDR prefix: 192.0.2.0/24
    action    TEXT    NOT NULL CHECK (action IN ('publish', 'subscribe', 'receive', 'any')),
    filter    TEXT    NOT NULL, -- a topic filter; %u is the user name, %c the client id
    allow     INTEGER NOT NULL CHECK (allow IN (0, 1))
) STRICT;

CREATE TABLE clock (                      -- one row: what the clocks said when it was written
  id            INTEGER PRIMARY KEY CHECK (id = 1),
  stamp         INTEGER NOT NULL,         -- the broker's time
  wall_ms       INTEGER NOT NULL,         -- what the wall clock said, Unix milliseconds; 0: nothing that makes sense
  true_ms       INTEGER NOT NULL,         -- what it would have said since the kernel last vouched for it; 0: it never did
  owed_from     INTEGER NOT NULL,         -- era before which there may be time off not counted yet; 0: there is none
  guessed       INTEGER NOT NULL,         -- 1: time off before this boot was counted by an unsynchronised clock
  boot          TEXT    NOT NULL,         -- which boot of the machine; '': nobody knows
  boot_ms       INTEGER NOT NULL,         -- time since that boot
  stopped       INTEGER NOT NULL          -- 1: written by a stop in order, so that nothing came after it
) STRICT;

CREATE TABLE credential (
    username TEXT    NOT NULL PRIMARY KEY,
    hash     TEXT    NOT NULL,
    created  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE flash (
  day    INTEGER NOT NULL,  -- days since 1970-01-01 UTC by the gateway's clock; 0 = while the clock was plainly wrong, -1 = days that are no longer listed
  cause  TEXT    NOT NULL,  -- what was written (flash.go)
  bytes  INTEGER NOT NULL,  -- in whole blocks of the file system
  PRIMARY KEY (day, cause)
) STRICT, WITHOUT ROWID;

CREATE TABLE inbound (                    -- QoS 2 packet identifiers received and not yet released
  session_id    INTEGER NOT NULL,
  packet_id     INTEGER NOT NULL,
  PRIMARY KEY (session_id, packet_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE meta (
    key   TEXT    NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE operator (
    name    TEXT    NOT NULL PRIMARY KEY CHECK (name <> ''),
    role    TEXT    NOT NULL CHECK (role IN ('admin', 'editor', 'viewer')),
    hash    TEXT    NOT NULL, -- argon2id, as a PHC string
    created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER clock_void_retained AFTER UPDATE ON retained WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;

CREATE TRIGGER clock_void_retained_new AFTER INSERT ON retained WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;

CREATE TABLE retained (
  topic         TEXT    PRIMARY KEY,
  message       BLOB    NOT NULL          -- packed message (message.go)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER clock_void_segment AFTER INSERT ON segment WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;

CREATE TABLE segment (
  id            INTEGER PRIMARY KEY,
  head          BLOB    NOT NULL,         -- which of the messages are whose (segment.go)
  body          BLOB    NOT NULL          -- packed messages, one after the other
) STRICT;

CREATE TABLE "segment_old" (
  id            INTEGER PRIMARY KEY,
  body          BLOB    NOT NULL          -- packed records (delivery.go)
) STRICT;

CREATE TRIGGER clock_void_session AFTER UPDATE OF ceiling, expiry_s ON session WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;

CREATE TRIGGER clock_void_session_new AFTER INSERT ON session WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;

CREATE TABLE session (
  id            INTEGER PRIMARY KEY,      -- never used again for another session while a segment names it
  client_id     TEXT    NOT NULL UNIQUE,
  expiry_s      INTEGER NOT NULL,         -- Session Expiry Interval, seconds; 4294967295 = never
  protocol      INTEGER NOT NULL,         -- 3, 4 or 5: how the client spoke last
  created_ms    INTEGER NOT NULL,         -- Unix milliseconds, for people only: the clock may be wrong
  ceiling       INTEGER NOT NULL,         -- sequence numbers below it may have been used; a restart goes on from here
  progress      BLOB    NOT NULL          -- cursor, finished and released sequence numbers (delivery.go, Progress)
, left_at INTEGER NOT NULL DEFAULT 0) STRICT;

CREATE TABLE subscription (
  session_id    INTEGER NOT NULL,
  filter        TEXT    NOT NULL,         -- as the client wrote it, with $share/…
  options       INTEGER NOT NULL,         -- subscription options byte of MQTT 5 (3.8.3.1)
  identifier    INTEGER NOT NULL,         -- Subscription Identifier, 0 = none
  PRIMARY KEY (session_id, filter)
) STRICT, WITHOUT ROWID;

CREATE TABLE time_off (                   -- time off that was counted only after stamps of its era had been given
  era           INTEGER PRIMARY KEY,      -- earlier eras are that much longer ago
  ms            INTEGER NOT NULL
) STRICT;

CREATE TABLE token (
    hash      BLOB    NOT NULL PRIMARY KEY CHECK (length(hash) = 32),
    operator  TEXT    NOT NULL REFERENCES operator (name) ON DELETE CASCADE ON UPDATE CASCADE,
    expires   INTEGER NOT NULL, -- pushed out while the token is used, some minutes at a time
    last_used INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX token_expires ON token (expires);

CREATE INDEX token_operator ON token (operator);

CREATE TRIGGER clock_void_will AFTER INSERT ON will WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;

CREATE TABLE will (                       -- wills of connected clients, and delayed ones that are due
  client_id     TEXT    PRIMARY KEY,
  delay_s       INTEGER NOT NULL,         -- Will Delay Interval, seconds
  message       BLOB    NOT NULL
, due_at INTEGER NOT NULL DEFAULT 0) STRICT, WITHOUT ROWID;

