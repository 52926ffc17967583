package storage

import (
	"context"
	"time"
)

// AuditEntry is a line of the audit trail: who has changed what from where, or
// has signed in, or was refused.
type AuditEntry struct {
	ID      int64     // given by Audit, in order
	Time    time.Time // by the gateway's clock, to the millisecond; given by Audit
	Actor   string    // operator:NAME, device:NAME, local:UID, or "" for nobody known
	Address string    // where it came from, host:port or a word as "unix"
	Action  string    // as "device.delete", "login", "login.refused"
	Target  string    // what was changed, as a user name; may be empty
	Detail  string    // for people, without secrets; may be empty
}

// Audit adds an entry to the audit trail in history.db. It never waits for the
// disk. It may be called by any goroutine.
func (db *DB) Audit(e AuditEntry) {}

// AuditEntries returns at most limit entries, the newest first, with an ID below
// before; 0 begins with the newest.
func (db *DB) AuditEntries(ctx context.Context, before int64, limit int) ([]AuditEntry, error) {
	return nil, nil
}
