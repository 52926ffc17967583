CREATE TABLE acl_rule (
    position  INTEGER NOT NULL PRIMARY KEY,
    username  TEXT    NOT NULL,
    client_id TEXT    NOT NULL,
    address   TEXT    NOT NULL, -- a CIDR prefix: 192.0.2.0/24
    action    TEXT    NOT NULL CHECK (action IN ('publish', 'subscribe', 'receive', 'any')),
    filter    TEXT    NOT NULL, -- a topic filter; %u is the user name, %c the client id
    allow     INTEGER NOT NULL CHECK (allow IN (0, 1))
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

CREATE TABLE retained (
  topic         TEXT    PRIMARY KEY,
  message       BLOB    NOT NULL          -- packed message (message.go)
) STRICT, WITHOUT ROWID;

CREATE TABLE segment (
  id            INTEGER PRIMARY KEY,
  head          BLOB    NOT NULL,         -- which of the messages are whose (segment.go)
  body          BLOB    NOT NULL          -- packed messages, one after the other
) STRICT;

CREATE TABLE "segment_old" (
  id            INTEGER PRIMARY KEY,
  body          BLOB    NOT NULL          -- packed records (delivery.go)
) STRICT;

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

CREATE TABLE token (
    hash      BLOB    NOT NULL PRIMARY KEY CHECK (length(hash) = 32),
    operator  TEXT    NOT NULL REFERENCES operator (name) ON DELETE CASCADE ON UPDATE CASCADE,
    expires   INTEGER NOT NULL, -- pushed out while the token is used, some minutes at a time
    last_used INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX token_expires ON token (expires);

CREATE INDEX token_operator ON token (operator);

CREATE TABLE will (                       -- wills of connected clients, and delayed ones that are due
  client_id     TEXT    PRIMARY KEY,
  delay_s       INTEGER NOT NULL,         -- Will Delay Interval, seconds
  message       BLOB    NOT NULL
) STRICT, WITHOUT ROWID;

