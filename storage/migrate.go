package storage

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// ErrTooNew means that the database was written by a newer Penstock and that
// this one cannot read it.
var ErrTooNew = errors.New("the database needs a newer penstock")

//go:embed migrations/*.sql
var migrationFiles embed.FS

// migration is one numbered file. It runs in a transaction of its own and is
// never edited once a release has carried it.
type migration struct {
	number int // from 1, without gaps
	name   string
	sql    string
	// oldestReader is the oldest schema number whose binary can still read
	// the result: N of a first line "-- readable-by: N", else number.
	oldestReader int
}

func embeddedMigrations() ([]migration, error) {
	dir, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	return readMigrations(dir)
}

// readMigrations reads NNNN_name.sql files and refuses a gap or a double in
// their numbers: two branches that each added the same number would otherwise
// leave databases that differ under one version.
func readMigrations(dir fs.FS) ([]migration, error) {
	names, err := fs.Glob(dir, "*.sql")
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	slices.Sort(names)
	var steps []migration
	for i, name := range names {
		prefix, _, ok := strings.Cut(name, "_")
		number, err := strconv.Atoi(prefix)
		if !ok || len(prefix) != 4 || err != nil {
			return nil, fmt.Errorf("migration %s: the name is not NNNN_name.sql", name)
		}
		if number != i+1 {
			return nil, fmt.Errorf("migration %s: number %04d was expected here", name, i+1)
		}
		text, err := fs.ReadFile(dir, name)
		if err != nil {
			return nil, fmt.Errorf("read migrations: %w", err)
		}
		m := migration{number: number, name: name, sql: string(text), oldestReader: number}
		first, _, _ := strings.Cut(m.sql, "\n")
		if by, ok := strings.CutPrefix(first, "-- readable-by:"); ok {
			m.oldestReader, err = strconv.Atoi(strings.TrimSpace(by))
			if err != nil || m.oldestReader < 1 || m.oldestReader > number {
				return nil, fmt.Errorf("migration %s: readable-by takes a number from 1 to %d", name, number)
			}
		}
		steps = append(steps, m)
	}
	return steps, nil
}

// refuseTooNew returns ErrTooNew if the database at path exists and cannot be
// read by a binary whose newest migration is ours. It opens the file read-only,
// unless a power cut has left a transaction to be rolled back first.
func refuseTooNew(ctx context.Context, path string, ours int) error {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	version, oldest, err := schemaOf(ctx, path, "ro")
	var se *sqlite.Error
	if errors.As(err, &se) && se.Code()&0xFF == sqlite3.SQLITE_READONLY {
		version, oldest, err = schemaOf(ctx, path, "rw")
	}
	if err != nil {
		return fmt.Errorf("read schema version of %s: %w", path, err)
	}
	if oldest > version {
		return fmt.Errorf("%w: schema %d, which needs schema %d", ErrDamaged, version, oldest)
	}
	if oldest > ours {
		return fmt.Errorf("%w: %s has schema %d, which needs at least schema %d; this binary has %d",
			ErrTooNew, path, version, oldest, ours)
	}
	return nil
}

// schemaOf is schemaVersion of a file, opened in a mode of SQLite's.
func schemaOf(ctx context.Context, path, mode string) (version, oldestReader int, err error) {
	pool, err := openDSN("file:"+(&url.URL{Path: path}).EscapedPath()+"?mode="+mode+"&_pragma=busy_timeout(5000)", 1)
	if err != nil {
		return 0, 0, err
	}
	defer pool.Close()
	return schemaVersion(ctx, pool)
}

// queryer is the part of sql.DB and sql.Tx that reads one row.
type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// schemaVersion returns the number of the last migration applied, 0 for a new
// database, and of the oldest whose binary can read it.
func schemaVersion(ctx context.Context, q queryer) (version, oldestReader int, err error) {
	if err := q.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return 0, 0, err
	}
	if version == 0 {
		return 0, 0, nil
	}
	err = q.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = 'oldest_reader'`).Scan(&oldestReader)
	return version, oldestReader, err
}

// migrate brings the database to the last of steps. A database that is ahead but
// still readable stays as it is, so that an image that fell back finds its queue
// and the newer image can come back to it.
func migrate(ctx context.Context, pool *sql.DB, steps []migration, log *slog.Logger) error {
	for {
		done, err := migrateOne(ctx, pool, steps, log)
		if done || err != nil {
			return err
		}
	}
}

func migrateOne(ctx context.Context, pool *sql.DB, steps []migration, log *slog.Logger) (done bool, err error) {
	tx, err := pool.BeginTx(ctx, nil)
	if err != nil {
		return false, wrap(err, "migrate")
	}
	defer tx.Rollback()
	// Read inside the transaction: another process may have migrated meanwhile.
	version, oldest, err := schemaVersion(ctx, tx)
	if err != nil {
		return false, wrap(err, "migrate: read schema version")
	}
	if oldest > len(steps) {
		return false, fmt.Errorf("migrate: %w", ErrTooNew)
	}
	if version >= len(steps) {
		return true, nil
	}
	m := steps[version]
	if _, err := tx.ExecContext(ctx, m.sql); err != nil {
		return false, wrap(err, "migrate: "+m.name)
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO meta (key, value) VALUES ('oldest_reader', ?)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value`, max(oldest, m.oldestReader)); err != nil {
		return false, wrap(err, "migrate: "+m.name+": note oldest reader")
	}
	// A pragma takes no parameter.
	if _, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA user_version = %d`, m.number)); err != nil {
		return false, wrap(err, "migrate: "+m.name+": note version")
	}
	if err := tx.Commit(); err != nil {
		return false, wrap(err, "migrate: "+m.name+": commit")
	}
	log.Info("database migrated", "migration", m.name)
	return false, nil
}
