-- Who may do what. Everything here is changed by people over the API, seldom,
-- and is in force at once; nothing here is touched by traffic.
--
-- All times are Unix milliseconds by the gateway's clock, which may have no
-- battery: they are shown and used for expiry, never for order.

-- meta holds facts about the database itself: 'oldest_reader' is the number of
-- the oldest migration whose binary can still read this schema (the number of
-- the last one applied is PRAGMA user_version).
CREATE TABLE meta (
    key   TEXT    NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- An operator is a person or a program that signs in to the HTTP APIs. It is
-- not an MQTT user: devices have a row in credential and may never sign in
-- here, operators have no MQTT access by being one.
CREATE TABLE operator (
    name    TEXT    NOT NULL PRIMARY KEY CHECK (name <> ''),
    role    TEXT    NOT NULL CHECK (role IN ('admin', 'editor', 'viewer')),
    hash    TEXT    NOT NULL, -- argon2id, as a PHC string
    created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- A token stands for an operator who has signed in. Only its SHA-256 is kept:
-- who copies the database cannot sign in with it. A token is 32 random bytes, so
-- a plain hash is enough. It ends with its operator.
CREATE TABLE token (
    hash      BLOB    NOT NULL PRIMARY KEY CHECK (length(hash) = 32),
    operator  TEXT    NOT NULL REFERENCES operator (name) ON DELETE CASCADE ON UPDATE CASCADE,
    expires   INTEGER NOT NULL, -- pushed out while the token is used, some minutes at a time
    last_used INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX token_operator ON token (operator);
CREATE INDEX token_expires ON token (expires);

-- A credential lets MQTT clients connect under a user name.
CREATE TABLE credential (
    username TEXT    NOT NULL PRIMARY KEY,
    hash     TEXT    NOT NULL,
    created  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The rules by which topics are allowed, read from the first position to the
-- last; the first that matches decides. '' in username, client_id or address
-- matches any. The whole list is replaced at once, never a rule of it.
CREATE TABLE acl_rule (
    position  INTEGER NOT NULL PRIMARY KEY,
    username  TEXT    NOT NULL,
    client_id TEXT    NOT NULL,
    address   TEXT    NOT NULL, -- a CIDR prefix: 192.0.2.0/24
    action    TEXT    NOT NULL CHECK (action IN ('publish', 'subscribe', 'receive', 'any')),
    filter    TEXT    NOT NULL, -- a topic filter; %u is the user name, %c the client id
    allow     INTEGER NOT NULL CHECK (allow IN (0, 1))
) STRICT;
