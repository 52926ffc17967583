package storage

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// DamagedName is a file in the data directory that has the next start salvage the
// database. Its text, if any, is why: damage that the look at the start is too
// short to meet.
const DamagedName = fileName + ".damaged"

const (
	// checkAfter is how long after a start that follows an unclean stop the
	// database is read in the background, and checkEvery how often it is besides.
	checkAfter = time.Minute
	checkEvery = 7 * 24 * time.Hour
	// checkDose is how many bytes of segments are read at a time, and checkRest
	// how much longer than that took nothing is read after it.
	checkDose = 1 << 20
	checkRest = 9
)

// sqliteCode returns the result code of SQLite that err has, with its extension, and 0
// if it has none.
func sqliteCode(err error) int {
	var se *sqlite.Error
	if errors.As(err, &se) {
		return se.Code()
	}
	return 0
}

// isDamage reports whether an error says that what stands in the database is not
// what belongs there.
func isDamage(err error) bool {
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT:
		return true
	}
	// A file that ends too early is no disk that fails.
	return sqliteCode(err) == sqlite3.SQLITE_IOERR_SHORT_READ || errors.Is(err, ErrDamaged)
}

// isUnreadable reports whether an error keeps a start from reading the database
// and would do so again: damage, a sector that the disk does not give, a schema or a
// value that is not ours. While a broker runs only damage counts, for a disk may
// read at the next try what it did not at the last.
func isUnreadable(err error) bool {
	switch sqliteCode(err) {
	case sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_CORRUPTFS,
		sqlite3.SQLITE_ERROR, // no such table
		0:                    // of a value that cannot be scanned
		return true
	}
	return isDamage(err)
}

// isFull reports whether the disk has no room.
func isFull(err error) bool {
	return sqliteCode(err)&0xff == sqlite3.SQLITE_FULL || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func isConstraint(err error) bool { return sqliteCode(err)&0xff == sqlite3.SQLITE_CONSTRAINT }

// damage holds what was found out about damage while the database was open.
type damage struct {
	mu  sync.Mutex
	why string
}

// Damage says why the next start salvages the database; it is empty when nothing
// is known to be damaged.
func (db *DB) Damage() string {
	db.damage.mu.Lock()
	defer db.damage.mu.Unlock()
	return db.damage.why
}

// suspect looks at an error of a statement. If it is one of damage, the next
// start will salvage, and the error that is returned wraps ErrDamaged.
func (db *DB) suspect(err error) error {
	if err == nil || !isDamage(err) {
		return err
	}
	// To SQLite also a page that the disk does not give (EIO) is malformed. Where it
	// gives little of the file it is the disk, which may be back at the next try.
	if sqliteCode(err) == sqlite3.SQLITE_CORRUPT && !db.readable() {
		return err
	}
	return db.found(err)
}

// found notes that the database is damaged, and returns err as one that wraps
// ErrDamaged.
func (db *DB) found(err error) error {
	db.damage.mu.Lock()
	defer db.damage.mu.Unlock()
	if db.damage.why == "" {
		db.damage.why = err.Error()
		db.log.Error("database is damaged, the next start salvages it", "err", err)
		// The disk may take nothing any more; whoever starts the database again
		// in this process says it by Config.Damaged.
		if err := writeMark(filepath.Dir(db.path), db.damage.why); err != nil {
			db.log.Warn("damage could not be noted", "err", err)
		}
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

func writeMark(dir, why string) error {
	f, err := os.OpenFile(filepath.Join(dir, DamagedName), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(why + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return syncDir(dir)
}

// readMark returns why the database is to be salvaged, empty if it is not.
func readMark(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, DamagedName))
	if err != nil {
		return ""
	}
	if why := strings.TrimSpace(string(b)); why != "" {
		return why
	}
	return "it was found damaged" // the power went before the reason was written
}

// plainDSN names a database that is opened with these pragmas and no others.
func plainDSN(path string, pragmas ...string) string {
	q := url.Values{"_pragma": pragmas}
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
}

// probe finds out cheaply whether the database at db.path is damaged, and why;
// why is empty if nothing was found or there is no database. It does not change
// a database that is not ours. It reads the ends of each table, and all of those
// that every start needs; the rest shows when it is loaded. It returns ErrTooNew
// like refuseTooNew.
func (db *DB) probe(ctx context.Context, steps []migration) (why string, err error) {
	size, logged := fileSize(db.path), fileSize(db.path+"-wal")
	if size <= 0 {
		// SQLite deletes the log of an empty database, unread.
		if logged > logHeader {
			return "the file is missing, its log is there", nil
		}
		return "", nil
	}
	if err := refuseTooNew(ctx, db.path, len(steps)); err != nil {
		if ctx.Err() == nil && !errors.Is(err, ErrTooNew) && isUnreadable(err) {
			return err.Error(), nil
		}
		return "", err
	}
	// Read-only, or its close would move the log, all at once and uncounted.
	err = lookIn(ctx, db.path, "ro", size, logged)
	var se *sqlite.Error
	if errors.As(err, &se) && se.Code()&0xFF == sqlite3.SQLITE_READONLY {
		err = lookIn(ctx, db.path, "rw", size, logged) // a transaction is to be rolled back first
	}
	switch {
	case err == nil:
		return "", nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	case isUnreadable(err):
		return err.Error(), nil
	}
	return "", fmt.Errorf("look at database: %w", err)
}

// lookIn looks at the database of a file, opened in a mode of SQLite's.
func lookIn(ctx context.Context, path, mode string, size, logged int64) error {
	pool, err := openDSN(plainDSN(path, "busy_timeout(5000)", "query_only(on)")+"&mode="+mode, 1)
	if err != nil {
		return err
	}
	defer pool.Close()
	return look(ctx, pool, size, logged)
}

func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}

// look reads a little of everything. The errors that it returns and that are not
// SQLite's are damage.
func look(ctx context.Context, pool *sql.DB, size, logged int64) error {
	var version, pages, page, objects int64
	for query, to := range map[string]*int64{`PRAGMA user_version`: &version, `PRAGMA page_count`: &pages, `PRAGMA page_size`: &page,
		`SELECT count(*) FROM sqlite_schema`: &objects} {
		if err := pool.QueryRowContext(ctx, query).Scan(to); err != nil {
			return err
		}
	}
	if version == 0 {
		if objects > 0 {
			return errors.New("it is not a database of penstock")
		}
		return nil // the very first start was cut short
	}
	// What the file lacks is in the log, and so is a page that it has a part of. A
	// log of the right size with something else in it is found when the pages are
	// read.
	if lacks := pages - size/page; lacks > 0 && lacks > max(logged-logHeader, 0)/(page+frameHeader) {
		return fmt.Errorf("%d pages of %d are missing", lacks, pages)
	}
	for _, t := range salvagedTables() {
		if later := int64(max(t.since, t.addedIn)); version < later {
			// A version that is too low would have migrations run again.
			if done, err := hasColumns(ctx, pool, &t); err != nil {
				return err
			} else if done {
				return fmt.Errorf("it has table %s as of schema %d, and says that it has schema %d", t.name, later, version)
			}
		}
		if version < int64(t.since) {
			continue
		}
		columns := t.columns
		if version < int64(t.addedIn) {
			columns = columns[:len(columns)-t.added]
		}
		names := make([]string, len(columns))
		for i, c := range columns {
			names[i] = c.name
		}
		query := "SELECT " + strings.Join(names, ", ") + " FROM " + t.name
		queries := []string{query + " ORDER BY 1 LIMIT 1", query + " ORDER BY 1 DESC LIMIT 1"}
		switch t.name {
		case "operator", "token", "credential", "acl_rule": // nothing can be served without them
			queries = []string{query}
		}
		for _, q := range queries {
			if err := lookAt(ctx, pool, q, &t, len(columns)); err != nil {
				return err
			}
		}
	}
	return nil
}

// hasColumns reports whether the database has the table with all of its columns.
func hasColumns(ctx context.Context, pool *sql.DB, t *salvagedTable) (bool, error) {
	rows, err := pool.QueryContext(ctx, `SELECT name FROM pragma_table_info(?)`, t.name)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	n := 0
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return false, err
		}
		if slices.ContainsFunc(t.columns, func(c column) bool { return c.name == name }) {
			n++
		}
	}
	return n == len(t.columns), rows.Err()
}

// lookAt reads the rows of a query, which have so many columns, and checks them.
func lookAt(ctx context.Context, pool *sql.DB, query string, t *salvagedTable, columns int) error {
	rows, err := pool.QueryContext(ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	values := make([]any, columns)
	to := make([]any, columns)
	for i := range values {
		to[i] = &values[i]
	}
	for rows.Next() {
		if err := rows.Scan(to...); err != nil {
			return err
		}
		rowid, _ := values[0].(int64)
		if t.rowid {
			values[0] = nil
		}
		if row, ok := t.row(cell{rowid: rowid}, values, true); !ok && !torn(t, row) {
			return fmt.Errorf("a row of table %s is not one", t.name)
		}
	}
	return rows.Err()
}

// torn reports whether what is wrong with a row is its packed message, which a
// start leaves out and goes on.
func torn(t *salvagedTable, row []any) bool {
	return row != nil && (t.name == "retained" || t.name == "will")
}

// Watch looks for damage in the background: it reads the whole database a minute
// after a start that follows an unclean stop, and once a week, a little at a time
// and without holding up anybody. What it finds is in the log and in Damage, and
// the next start salvages. It returns nil when ctx ends.
func (db *DB) Watch(ctx context.Context) error {
	wait := checkAfter
	if !db.unclean && time.Since(db.checked(ctx)).Abs() < checkEvery {
		wait = checkEvery
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		timer.Reset(checkEvery)
		began := time.Now()
		if err := db.check(ctx, pause); err != nil {
			if db.suspect(err); ctx.Err() == nil && !isDamage(err) {
				db.log.Warn("database could not be checked", "err", err)
			}
			continue
		}
		db.log.Info("database checked, no damage found", "took", time.Since(began).Round(time.Millisecond))
		_, err := db.write.ExecContext(ctx, `INSERT INTO meta (key, value) VALUES ('checked', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, millis(time.Now()))
		if err != nil && ctx.Err() == nil {
			db.log.Warn("check not noted", "err", err)
		}
	}
}

// checked returns when the database was last read whole, by the gateway's clock.
func (db *DB) checked(ctx context.Context) time.Time {
	var ms int64
	if err := db.read.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = 'checked'`).Scan(&ms); err != nil {
		return time.Time{}
	}
	return fromMillis(ms)
}

// pause waits, and returns ctx's error if that ends first.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// check reads everything: each small table by SQLite's own check, the segments row
// by row, for that check of a large table would hold one moment of the database,
// and with it all of its log, for as long as it takes. An error that wraps
// ErrDamaged, or that isDamage knows, says what is wrong.
func (db *DB) check(ctx context.Context, rest func(context.Context, time.Duration) error) error {
	conn, err := db.read.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, t := range salvagedTables() {
		if t.name == segmentTable {
			continue
		}
		began := time.Now()
		var line string
		if err := conn.QueryRowContext(ctx, "PRAGMA quick_check("+t.name+")").Scan(&line); err != nil {
			return err
		}
		if line != "ok" {
			return fmt.Errorf("%w: table %s: %s", ErrDamaged, t.name, line)
		}
		if err := rest(ctx, checkRest*time.Since(began)); err != nil {
			return err
		}
	}
	last := int64(-1 << 63)
	for {
		began := time.Now()
		n, err := checkSegments(ctx, conn, &last)
		if err != nil || n == 0 {
			return err
		}
		if err := rest(ctx, checkRest*time.Since(began)); err != nil {
			return err
		}
	}
}

// checkSegments reads the segments behind last, about checkDose bytes of them,
// and returns how many.
func checkSegments(ctx context.Context, conn *sql.Conn, last *int64) (n int, err error) {
	rows, err := conn.QueryContext(ctx, `SELECT id, head, body FROM segment WHERE id > ? ORDER BY id`, *last)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	var head, body sql.RawBytes
	for size := 0; size < checkDose && rows.Next(); n++ {
		if err := rows.Scan(last, &head, &body); err != nil {
			return n, fmt.Errorf("%w: segment: %w", ErrDamaged, err)
		}
		size += len(body)
		if err := (StoredSegment{Head: head, Body: body}).contents().torn; err != nil {
			return n, fmt.Errorf("%w: segment %d: %w", ErrDamaged, *last, err)
		}
	}
	return n, rows.Err()
}
