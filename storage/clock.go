package storage

import (
	"database/sql"
	"fmt"
)

// Mark is what the clocks said at one moment, for a start to go on from.
type Mark struct {
	Stamp    int64  // the broker's time
	Wall     int64  // what the wall clock said, Unix milliseconds; 0: nothing that makes sense
	True     int64  // what it would have said since the kernel last vouched for it; 0: it never did
	OwedFrom int64  // era before which there may be time off not counted yet; 0: there is none
	Guessed  bool   // the time off before this boot was counted by a clock that is not synchronised
	Boot     string // names the boot of the machine; empty: nobody knows
	Uptime   int64  // milliseconds since that boot
	Stopped  bool   // written by a stop in order: nothing happened after it
}

// TimeOff is time that the machine was off for and that was counted only when
// stamps of an era had been given already: those of earlier eras are that much
// longer ago.
type TimeOff struct {
	Era int64
	MS  int64 // milliseconds
}

// ClockTx is the part of a Tx that is about time. Stamps are the broker's.
type ClockTx interface {
	PutMark(Mark) error       // in the place of the last one
	PutTimeOff(TimeOff) error // in the place of that of the same era
	// PutLeft notes when the client of a session left; 0: it is connected.
	// Nothing if the session is gone.
	PutLeft(id SessionID, stamp int64) error
	// PutWillDue notes when a delayed will is due; 0: its client is connected.
	// Nothing if the will is gone.
	PutWillDue(clientID string, stamp int64) error
}

const (
	putMark    = `INSERT INTO clock (id, stamp, wall_ms, true_ms, owed_from, guessed, boot, boot_ms, stopped) VALUES (1,?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET stamp=excluded.stamp, wall_ms=excluded.wall_ms, true_ms=excluded.true_ms, owed_from=excluded.owed_from, guessed=excluded.guessed, boot=excluded.boot, boot_ms=excluded.boot_ms, stopped=excluded.stopped`
	putTimeOff = `INSERT INTO time_off (era, ms) VALUES (?,?) ON CONFLICT DO UPDATE SET ms=excluded.ms`
	putLeft    = `UPDATE session SET left_at=? WHERE id=?`
	putWillDue = `UPDATE will SET due_at=? WHERE client_id=?`
)

// PutMark implements ClockTx.
func (t *sqliteTx) PutMark(m Mark) error {
	return t.exec(putMark, m.Stamp, m.Wall, m.True, m.OwedFrom, m.Guessed, m.Boot, m.Uptime, m.Stopped)
}

// PutTimeOff implements ClockTx.
func (t *sqliteTx) PutTimeOff(o TimeOff) error { return t.exec(putTimeOff, o.Era, o.MS) }

// PutLeft implements ClockTx.
func (t *sqliteTx) PutLeft(id SessionID, stamp int64) error { return t.exec(putLeft, stamp, int64(id)) }

// PutWillDue implements ClockTx.
func (t *sqliteTx) PutWillDue(clientID string, stamp int64) error {
	return t.exec(putWillDue, stamp, clientID)
}

// loadClock reads what is durable of time into img.
func (s *sqliteStore) loadClock(img *Image) error {
	err := s.each(`SELECT stamp, wall_ms, true_ms, owed_from, guessed, boot, boot_ms, stopped FROM clock`, func(r *sql.Rows) error {
		m := &Mark{}
		img.Mark = m
		return r.Scan(&m.Stamp, &m.Wall, &m.True, &m.OwedFrom, &m.Guessed, &m.Boot, &m.Uptime, &m.Stopped)
	})
	if err != nil {
		return fmt.Errorf("load clock: %w", err)
	}
	err = s.each(`SELECT era, ms FROM time_off ORDER BY era`, func(r *sql.Rows) error {
		var o TimeOff
		err := r.Scan(&o.Era, &o.MS)
		img.TimeOff = append(img.TimeOff, o)
		return err
	})
	if err != nil {
		return fmt.Errorf("load time off: %w", err)
	}
	return nil
}
