// Package storage keeps everything of Penstock that must outlive a power cut in
// one SQLite database, penstock.db, in WAL mode with synchronous=FULL. It is the
// only package that knows SQL.
//
// A DB may be used by any number of goroutines. Every method takes a context
// first, which bounds how long it waits for the disk, and returns errors that
// say what was being done and wrap ErrNotFound or ErrConflict where they apply.
package storage

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"penstock/internal/units"
)

var (
	// ErrNotFound means that no row has the key asked for.
	ErrNotFound = errors.New("not found")
	// ErrConflict means that the key is taken, or that a row refers to one
	// that does not exist.
	ErrConflict = errors.New("conflict")
)

// fileName is the one database that must not be lost.
const fileName = "penstock.db"

// readers is how many connections read beside the writer, for API requests and
// logins; each costs some 100 kB of page cache and more would not make a single
// flash chip faster.
const readers = 4

// Config is the section [storage] of the configuration file.
type Config struct {
	// Dir is the data directory. Open makes it if need be.
	Dir string `toml:"dir"`
	// CommitDelay is how long the first operation of a group commit may wait
	// for others to share its fsync. 0 is allowed: every group is then what
	// gathered during the commit before it.
	CommitDelay units.Duration `toml:"commit_delay"`
	// RetainFlush is how long a retained QoS 0 message may be in RAM only.
	RetainFlush units.Duration `toml:"retain_flush"`
	// Reserve is the room on the file system of Dir, in bytes, below which
	// nothing new is stored; at most an eighth of the file system is kept. 0: the
	// disk is filled to its end.
	Reserve units.Bytes `toml:"reserve"`
	// CompactFrom is the size in bytes from which on a segment of the queues is
	// written anew when little of it is needed; below 0, for tests, each is
	// whenever something of it is not. It is no key of the file.
	CompactFrom int `toml:"-"`
	// MergeFrom, for tests, is how many small segments are merged into one; 0: as
	// many as is worth it. It is no key of the file.
	MergeFrom int `toml:"-"`
	// DailyBudget is how many bytes a day may go to the flash before writes that
	// can wait are put off, and a warning is given; 0: there is none.
	DailyBudget units.Bytes `toml:"daily_budget"`
	// WALPages is the length of the write-ahead log in pages from which on it is
	// moved into the database; 0: the usual one. It is no key of the file.
	WALPages int `toml:"-"`
	// SalvageTime is how long a start may read queues from a damaged database
	// before service begins; the rest is read afterwards. It is no key of the file.
	SalvageTime time.Duration `toml:"-"`
	// Damaged, where it is not empty, has Open salvage the database whatever it
	// looks like. It says why. It is no key of the file.
	Damaged string `toml:"-"`
}

// DefaultConfig returns the configuration of a gateway installed as a service.
func DefaultConfig() Config {
	return Config{
		Dir:         "/var/lib/penstock",
		CommitDelay: units.Duration(20 * time.Millisecond),
		RetainFlush: units.Duration(10 * time.Second),
		Reserve:     32 << 20,
		CompactFrom: 16 << 10, // less is not worth a row's rewriting
		SalvageTime: 2 * time.Second,
	}
}

// Validate returns an error that names the first key whose value cannot work.
func (c Config) Validate() error {
	if c.Dir == "" {
		return errors.New("storage.dir: is empty: name the data directory")
	}
	if d := c.CommitDelay.D(); d < 0 || d > time.Second {
		return fmt.Errorf("storage.commit_delay: %s is outside 0s to 1s", c.CommitDelay)
	}
	if d := c.RetainFlush.D(); d < 0 || d > time.Hour {
		return fmt.Errorf("storage.retain_flush: %s is outside 0s to 1h", c.RetainFlush)
	}
	if c.Reserve > 1<<40 {
		return fmt.Errorf("storage.reserve: %s is outside 0 to 1024GiB", c.Reserve)
	}
	if b := c.DailyBudget; b != 0 && b < 1<<20 {
		return fmt.Errorf("storage.daily_budget: %s is below 1MiB; 0 for none", b)
	}
	return nil
}

// DB is the open database.
type DB struct {
	cfg   Config
	log   *slog.Logger
	path  string
	flash *flashMeter

	// write has one connection: SQLite has one writer at a time, and waiting
	// for it here is fairer than its busy handler, which sleeps and retries.
	write *sql.DB
	// read cannot write, whatever the statement.
	read  *sql.DB
	space *Space

	unclean    bool // the last one who had the database open did not close it
	damage     damage
	unreadable unreadable
	salvaged   salvaged
}

// Open makes the data directory, opens penstock.db in it and migrates it to the
// schema of this binary. A database that is damaged is set aside, and one with
// what could be read of it takes its place: Salvage has the report. It returns an
// error that wraps ErrInUse if another process serves from a database that is to be
// migrated, and one that wraps ErrTooNew, and leaves the file untouched, if only a newer
// binary can read the database.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*DB, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	slowDisk()
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("resolve data directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	db := &DB{cfg: cfg, log: log, path: filepath.Join(dir, fileName)}
	db.space = newSpace(db)
	db.flash = newFlashMeter(db.path, cfg.DailyBudget, log)
	steps, err := embeddedMigrations()
	if err != nil {
		return nil, err
	}
	// Before anything opens the file for writing: the pragmas of the DSN alone
	// would change it.
	if err := db.mend(ctx, steps); err != nil {
		return nil, err
	}
	if err = db.open(ctx, steps); isDamage(err) {
		// What the look at it has not met, a migration has.
		err = db.mendUnlocked(ctx, err)
	}
	if err != nil {
		return nil, err
	}
	return db, nil
}

// open opens the pools of a database that was looked at.
func (db *DB) open(ctx context.Context, steps []migration) (err error) {
	db.unclean = fileSize(db.path+"-wal") > 0
	db.salvaged.state = readState(filepath.Dir(db.path))
	if err := keepPrivate(db.path); err != nil {
		return err
	}
	if db.write, err = db.openPool(1); err != nil {
		return err
	}
	if err := db.migrate(ctx, steps); err != nil {
		return errors.Join(err, db.Close())
	}
	if db.read, err = openDSN(dsn(db.path, "query_only(on)"), readers); err != nil {
		return errors.Join(err, db.Close())
	}
	return nil
}

// migrate is migrate of a database that no other process serves: one of an older
// version would lose the tables that it writes to. It returns ErrInUse then.
func (db *DB) migrate(ctx context.Context, steps []migration) error {
	version, _, err := schemaVersion(ctx, db.write)
	if err != nil {
		return wrap(err, "read schema version")
	}
	if version >= len(steps) {
		return nil
	}
	lock, err := lockDir(filepath.Dir(db.path))
	if err != nil {
		return err
	}
	return errors.Join(migrate(ctx, db.write, steps, db.log), lock.Close())
}

// keepPrivate makes the database file if need be, readable by its owner only:
// it holds password hashes, and SQLite would make it as the umask says. The
// files that SQLite puts beside it take their mode from it.
func keepPrivate(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("make database: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at database: %w", err)
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	for _, p := range []string{path, path + "-wal", path + "-shm"} {
		if err := os.Chmod(p, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make database private: %w", err)
		}
	}
	return nil
}

// Close waits for running statements and closes the database. Whoever opened
// another pool closes it before.
func (db *DB) Close() error {
	var errs []error
	for _, pool := range []*sql.DB{db.read, db.write} {
		if pool != nil {
			errs = append(errs, pool.Close())
		}
	}
	errs = append(errs, db.flash.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close %s: %w", db.path, err)
	}
	return nil
}

// openPool opens a further pool of at most conns connections on penstock.db, all
// of them with the pragmas of the writer. The caller closes it.
func (db *DB) openPool(conns int) (*sql.DB, error) {
	return openDSN(dsn(db.path,
		"wal_autocheckpoint(0)", // see checkpoints
		fmt.Sprintf("journal_size_limit(%d)", walSizeLimit(db.cfg.walPages()))), conns)
}

// dsn names the database and the pragmas of every connection to it. They stand
// here because a PRAGMA that is executed reaches one connection of a pool only.
func dsn(path string, more ...string) string {
	q := url.Values{
		"_txlock": {"immediate"}, // a transaction that writes late cannot wait its turn: it fails at once
		"_pragma": append([]string{
			"busy_timeout(5000)",
			"foreign_keys(on)",
			"journal_mode(wal)",
			"synchronous(full)",
		}, more...),
	}
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
}

func openDSN(dsn string, conns int) (*sql.DB, error) {
	pool, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, wrap(err, "open database")
	}
	pool.SetMaxOpenConns(conns)
	pool.SetMaxIdleConns(conns)
	return pool, nil
}

// wrap says what was being done when err happened, and translates what the
// callers have to tell apart, by result code and never by text. It returns nil
// for nil.
func wrap(err error, doing string) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%s: %w", doing, ErrNotFound)
	}
	var se *sqlite.Error
	if errors.As(err, &se) {
		switch se.Code() {
		case sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
			sqlite3.SQLITE_CONSTRAINT_UNIQUE,
			sqlite3.SQLITE_CONSTRAINT_ROWID,
			sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
			return fmt.Errorf("%s: %w", doing, ErrConflict)
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// affected turns a statement that should have found its row and did not into
// ErrNotFound.
func affected(res sql.Result, err error, doing string) error {
	if err != nil {
		return wrap(err, doing)
	}
	n, err := res.RowsAffected()
	if err == nil && n == 0 {
		return fmt.Errorf("%s: %w", doing, ErrNotFound)
	}
	return wrap(err, doing)
}

// millis and fromMillis are how a time is stored: Unix milliseconds, and 0 for
// the zero time.
func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// blob returns b, or an empty slice for nil: the driver stores a nil []byte as
// NULL, and an empty payload or user name is not nothing.
func blob(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
