-- readable-by: 3
--
-- What was written to the flash, so that a person can say how long it will
-- last. Written by the Journal along with commits that happen anyway, at most
-- once a minute, and at the stop: a power cut loses the count of that minute.

CREATE TABLE flash (
  day    INTEGER NOT NULL,  -- days since 1970-01-01 UTC by the gateway's clock; 0 = while the clock was plainly wrong, -1 = days that are no longer listed
  cause  TEXT    NOT NULL,  -- what was written (flash.go)
  bytes  INTEGER NOT NULL,  -- in whole blocks of the file system
  PRIMARY KEY (day, cause)
) STRICT, WITHOUT ROWID;
