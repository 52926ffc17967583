-- readable-by: 3
--
-- Time on a gateway whose clock may start in 1970 and jump. What expires is
-- measured in stamps of the broker's own time, which only goes forward and at
-- the rate of the monotonic clock. broker/clock.go says what a stamp is; to one
-- who reads the rows its low 44 bits are milliseconds, Unix milliseconds in a
-- database that began on a clock that was right.

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

CREATE TABLE time_off (                   -- time off that was counted only after stamps of its era had been given
  era           INTEGER PRIMARY KEY,      -- earlier eras are that much longer ago
  ms            INTEGER NOT NULL
) STRICT;

-- When the client left; 0 while it is connected, or if that was not long ago.
ALTER TABLE session ADD COLUMN left_at INTEGER NOT NULL DEFAULT 0;

-- When a delayed will is due; 0 while its client is connected, or if it left not
-- long ago.
ALTER TABLE will ADD COLUMN due_at INTEGER NOT NULL DEFAULT 0;

-- A binary from before this migration, of an image that fell back, can read the
-- result and goes on with it, but knows nothing of marks. What a stop in order
-- has said of who was connected when would still stand when the newer binary
-- comes back, and sessions of clients that were here all the time would have
-- expired. So whoever writes without having taken that mark back voids it; the
-- newer binary takes it back before it serves. Cursors, which are written most,
-- do not count: a segment or a ceiling was written before them.
CREATE TRIGGER clock_void_session_new AFTER INSERT ON session WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;
CREATE TRIGGER clock_void_session AFTER UPDATE OF ceiling, expiry_s ON session WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;
CREATE TRIGGER clock_void_segment AFTER INSERT ON segment WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;
CREATE TRIGGER clock_void_will AFTER INSERT ON will WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;
CREATE TRIGGER clock_void_retained_new AFTER INSERT ON retained WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;
CREATE TRIGGER clock_void_retained AFTER UPDATE ON retained WHEN (SELECT stopped FROM clock) BEGIN
  UPDATE clock SET wall_ms = 0, true_ms = 0, boot = '', stopped = 0;
END;
