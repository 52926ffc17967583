package storage

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

const (
	// walPages is the length in pages from which on the log is moved into the
	// database: 8 MiB. Measured: see docs/decisions.md.
	walPages = 2000
	// walBound is how many times as long the log may become while moving does
	// not keep up; then commits wait for it.
	walBound = 4
	// walLimit is how many times as large the file may stay. SQLite writes over
	// it from the beginning, which costs the file system less than a file that
	// grows.
	walLimit = 2
	// walIdle is for how long nothing must have been committed before a file
	// that is too large is cut.
	walIdle = time.Minute
	// lockWait is how long a checkpoint waits for a lock; commits may wait for it.
	lockWait = "100" // ms
)

// checkpoints moves what is in the log into the database. SQLite would do it
// within the COMMIT that makes the log too long, and whoever waits for that
// acknowledgement would wait for all of it. So a goroutine of its own
// does, while commits go on. The log only begins anew when all of it was moved,
// and while there are commits it never is: the few pages that came meanwhile are
// moved between two commits.
type checkpoints struct {
	db    *DB
	log   *slog.Logger
	pages uint32 // from which on the log is moved

	wake chan struct{} // capacity 1: there is something to move
	stop chan struct{} // closed to end the goroutine; nil if there is none
	done chan struct{} // closed when it has ended

	sync func() error // of the database file

	began  time.Time
	last   atomic.Int64  // when the last commit was, after began
	passed atomic.Uint32 // how long the log was when the last checkpoint had ended, pages

	fails atomic.Bool // the last checkpoint has failed, which was said

	mu   sync.Mutex // held while a checkpoint runs
	pool *sql.DB
	conn *sql.Conn

	next uint32  // of the journal's goroutine: how long the log has to be for the next try between two commits
	salt [8]byte // the round of the log that next is about
	held bool    // the log is too long, which was said
}

// newCheckpoints returns the checkpoints of db. Somebody has to call start, or
// pass when wake says so.
func newCheckpoints(db *DB, log *slog.Logger) *checkpoints {
	return &checkpoints{
		db: db, log: log, pages: uint32(db.cfg.walPages()), began: time.Now(),
		wake: make(chan struct{}, 1), sync: db.flash.syncDatabase,
	}
}

// start has a goroutine move the log until close is called.
func (c *checkpoints) start() {
	c.stop, c.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(c.done)
		idle := time.NewTimer(walIdle)
		defer idle.Stop()
		for {
			select {
			case <-c.stop:
				return
			case <-c.wake:
				c.work()
				idle.Reset(walIdle)
			case <-idle.C:
				if c.shrink() {
					idle.Reset(walIdle)
				}
			}
		}
	}()
}

// work moves the log while commits go on.
func (c *checkpoints) work() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pass("PASSIVE")
	if h, ok := c.db.flash.header(); !ok || h.rest() == 0 || c.fails.Load() {
		return
	}
	// SQLite syncs the database only when all of the log is in it, and leaves
	// that to whoever moves the last pages: the journal, between two commits.
	// That shall find little that is not written yet.
	if err := c.sync(); err != nil {
		c.failed(fmt.Errorf("sync database: %w", err), true)
	}
}

// close ends the goroutine, if start was called, after the checkpoint that runs.
// It moves what is left of the log, which SQLite would do after it, uncounted.
func (c *checkpoints) close() error {
	if c == nil {
		return nil
	}
	if c.stop != nil {
		close(c.stop)
		<-c.done
		c.stop = nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if h, ok := c.db.flash.header(); ok && h.rest() > 0 {
		c.pass("PASSIVE")
	}
	return c.disconnect()
}

// little is how many pages are moved between two commits; and by how many the
// log has to grow before a checkpoint that could not move all is tried again.
func (c *checkpoints) little() uint32 { return max(c.pages/16, 1) }

// committed is called by the journal's goroutine after a commit, with the header
// that the log has now.
func (c *checkpoints) committed(h walHeader) {
	if c == nil {
		return
	}
	c.last.Store(int64(time.Since(c.began)))
	passed := c.passed.Load()
	if h.frames >= c.pages && h.rest() > c.little() && (h.frames < passed || h.frames-passed >= c.little()) {
		c.hurry()
	}
}

// commitFailed is called by the journal's goroutine after a commit that failed. A
// checkpoint may make room: a log that begins anew needs none on a full disk. One
// that has failed as well is not tried with each commit.
func (c *checkpoints) commitFailed() {
	if c != nil && !c.fails.Load() {
		c.hurry()
	}
}

// hurry has the goroutine do a checkpoint.
func (c *checkpoints) hurry() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// between is called by the journal's goroutine before it begins a transaction.
// It moves the little that is left of a long log, so that the next commit begins
// a new one; and all of it if the log has grown too long. Then commits wait, but
// not for somebody who reads an old state of the database, as a backup does: the
// log grows until he is done.
func (c *checkpoints) between() {
	if c == nil {
		return
	}
	h, ok := c.db.flash.header()
	if !ok || h.frames < c.pages || h.rest() == 0 {
		return
	}
	if h.salt != c.salt {
		c.salt, c.next, c.held = h.salt, 0, false
	}
	bound := h.frames >= walBound*c.pages
	switch {
	case h.frames < c.next:
		return
	case bound:
		c.mu.Lock()
	case h.rest() > c.little() || !c.mu.TryLock():
		return
	}
	c.pass("PASSIVE")
	fails := c.fails.Load()
	c.mu.Unlock()
	c.next = h.frames + c.little()
	if h, _ := c.db.flash.header(); bound && h.rest() > 0 && !fails && !c.held {
		c.held = true
		c.log.Warn("write-ahead log grows, somebody reads an old state of the database", "pages", h.frames, "not_moved", h.rest())
	}
}

// pass does a checkpoint. c.mu is held.
func (c *checkpoints) pass(mode string) {
	err := c.connect()
	if err == nil {
		err = c.db.flash.checkpoint(func() error {
			var busy, frames, moved int
			return c.conn.QueryRowContext(context.Background(), "PRAGMA wal_checkpoint("+mode+")").Scan(&busy, &frames, &moved)
		})
	}
	if h, ok := c.db.flash.header(); ok {
		c.passed.Store(h.frames)
	}
	if err == nil {
		c.fails.Store(false)
		return
	}
	var se *sqlite.Error
	c.failed(err, errors.As(err, &se) && se.Code()&0xFF == sqlite3.SQLITE_IOERR)
	_ = c.disconnect() // the error that counts is the one above
}

// failed notes that a checkpoint has failed; io means that the disk has. Nothing
// is lost by it: what is not moved stays in the log.
func (c *checkpoints) failed(err error, io bool) {
	if !c.fails.Swap(true) {
		c.log.Warn("checkpoint failed, the write-ahead log grows", "err", err)
	}
	if io {
		if err := c.db.flash.moveAgain(); err != nil {
			c.log.Error("write-ahead log cannot be moved again", "err", err)
		}
	}
}

// shrink cuts the file of the log if it is too large and nobody commits. It
// returns true if it has to be tried later.
func (c *checkpoints) shrink() bool {
	info, err := os.Stat(c.db.path + "-wal")
	if err != nil || info.Size() <= walSizeLimit(int(c.pages)) {
		return false
	}
	if time.Since(c.began)-time.Duration(c.last.Load()) < walIdle {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pass("TRUNCATE")
	return false
}

// connect opens the connection if there is none. c.mu is held.
func (c *checkpoints) connect() error {
	if c.conn != nil {
		return nil
	}
	pool, err := c.db.openPool(1)
	if err != nil {
		return fmt.Errorf("open checkpoint connection: %w", err)
	}
	conn, err := pool.Conn(context.Background())
	if err == nil {
		_, err = conn.ExecContext(context.Background(), "PRAGMA busy_timeout="+lockWait)
	}
	if err != nil {
		return fmt.Errorf("open checkpoint connection: %w", errors.Join(err, pool.Close()))
	}
	c.pool, c.conn = pool, conn
	return nil
}

// disconnect closes the connection; the next checkpoint opens a new one. c.mu is
// held.
func (c *checkpoints) disconnect() error {
	if c.conn == nil {
		return nil
	}
	err := errors.Join(c.conn.Close(), c.pool.Close())
	c.pool, c.conn = nil, nil
	return err
}

// walSizeLimit returns how large the file of the log may stay, bytes.
func walSizeLimit(pages int) int64 {
	return walHeaderBytes + walLimit*int64(pages)*(blockBytes+frameHeaderBytes)
}

// walPages returns from how many pages on the log is moved.
func (c Config) walPages() int {
	if c.WALPages <= 0 {
		return walPages
	}
	return c.WALPages
}
