-- readable-by: 3
--
-- Rights by group, devices that are switched off, certificates, and where a
-- token came from. A binary from before this migration can read the result,
-- which an image that falls back needs to find its queues; it does not know of
-- groups, of devices that are switched off, or that what no rule allows is
-- denied.

-- The device may not connect, but keeps its place. A device whose hash is ''
-- has no password: it connects with a certificate, or not at all.
ALTER TABLE credential ADD COLUMN disabled INTEGER NOT NULL DEFAULT 0;

-- The groups that a device is in. They end with it.
CREATE TABLE device_group (
    username TEXT NOT NULL REFERENCES credential (username) ON DELETE CASCADE ON UPDATE CASCADE,
    name     TEXT NOT NULL CHECK (name <> ''),
    PRIMARY KEY (username, name)
) STRICT, WITHOUT ROWID;

-- The group whose devices the rule is for; '' is any client, as in username.
ALTER TABLE acl_rule ADD COLUMN group_name TEXT NOT NULL DEFAULT '';

-- When the token was given out, when it ends however much it is used (0: never),
-- and the address that it was given to.
ALTER TABLE token ADD COLUMN created INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token ADD COLUMN ends INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token ADD COLUMN address TEXT NOT NULL DEFAULT '';

-- Certificates that the gateway has made, or that were put in over the API.
-- Those that an administrator keeps as files are not here.
CREATE TABLE certificate (
    name  TEXT    NOT NULL PRIMARY KEY CHECK (name <> ''),
    own   INTEGER NOT NULL CHECK (own IN (0, 1)), -- 1: made here, and made anew when it is time
    made  INTEGER NOT NULL,
    chain BLOB    NOT NULL, -- PEM: the certificate, and behind it those that lead to a known one
    key   BLOB    NOT NULL  -- PEM
) STRICT, WITHOUT ROWID;

-- So far what no rule forbade was allowed. Where somebody uses the gateway, it
-- stays so, as a rule that is seen and can be taken away.
INSERT INTO acl_rule (position, username, client_id, address, action, filter, allow)
    SELECT (SELECT coalesce(max(position), 0) + 1 FROM acl_rule), '', '', '', 'any', '#', 1
    WHERE EXISTS (SELECT 1 FROM credential) OR EXISTS (SELECT 1 FROM acl_rule) OR EXISTS (SELECT 1 FROM session);
INSERT INTO acl_rule (position, username, client_id, address, action, filter, allow)
    SELECT (SELECT max(position) + 1 FROM acl_rule), '', '', '', 'any', '$SYS/#', 1
    WHERE EXISTS (SELECT 1 FROM acl_rule);
