package storage

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

var (
	// ErrNoDatabase means that a data directory has no penstock.db.
	ErrNoDatabase = errors.New("no database here")
	// ErrDamaged means that a database cannot be read as a whole.
	ErrDamaged = errors.New("the database is damaged")
)

// Backup writes a copy of the database in dir to file, which must not exist.
// The copy is of one moment, and free of unused pages. The broker may be
// running; it is not held up. A backup that fails leaves nothing behind.
func Backup(ctx context.Context, dir, file string) error {
	path := filepath.Join(dir, fileName)
	if _, err := os.Stat(path); err != nil {
		return noDatabase(err, dir)
	}
	if _, err := os.Lstat(file); err == nil {
		return fmt.Errorf("back up: %s: %w: choose another name", file, fs.ErrExist)
	}
	pool, err := openDSN(dsn(path), 1)
	if err != nil {
		return err
	}
	defer pool.Close()
	// SQLite takes an empty file, and would make one that everybody can read.
	part := file + ".part"
	_ = os.Remove(part) // of one that was cut short
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("back up: %w", err)
	}
	if _, err = pool.ExecContext(ctx, `VACUUM INTO ?`, part); err == nil {
		err = place(f, part, file)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(part) // nothing is left to do about it
		if isDamage(err) {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return wrap(err, "back up to "+file)
	}
	return nil
}

// Restore makes the database in file that of dir, which no broker may be using
// (ErrInUse). It refuses a file that is damaged or that this binary cannot
// read. The database that is there is kept beside the new one, under the name
// that is returned; it is empty if there is none.
func Restore(ctx context.Context, dir, file string) (kept string, err error) {
	if _, err := Verify(ctx, file); err != nil {
		return "", fmt.Errorf("restore: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("restore: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := give(lock, dir); err != nil {
		return "", fmt.Errorf("restore: %w", err)
	}
	if len(siblings(dir, nextName)) > 0 { // of one that was cut short, before its database is the one that is there
		if _, err := replace(dir); err != nil {
			return "", fmt.Errorf("restore: %w", err)
		}
	}
	part := filepath.Join(dir, fileName+".part")
	if err := copyFile(file, part); err != nil {
		return "", fmt.Errorf("restore: %w", err)
	}
	if kept, err = install(dir, part, asideName(dir, beforeName)); err != nil {
		return kept, fmt.Errorf("restore: %w", err)
	}
	return kept, nil
}

// place makes the finished file part, which is open as f, durable under its name.
func place(f *os.File, part, name string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(part, name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// copyFile makes a durable copy that its owner alone may read. The owner is that
// of the directory it is made in: root restores for the broker's user.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	_ = os.Remove(to) // of a restore that was cut short
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Sync()
	}
	if err == nil {
		err = give(out, filepath.Dir(to))
	}
	if err = errors.Join(err, out.Close()); err != nil {
		_ = os.Remove(to) // the error that counts is the one above
	}
	return err
}

// give gives a file, if it is root's, to the owner of its directory.
func give(f *os.File, dir string) error {
	info, err := os.Stat(dir)
	if err != nil || os.Geteuid() != 0 {
		return err
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		return f.Chown(int(owner.Uid), int(owner.Gid))
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// syncDir makes renames in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func noDatabase(err error, where string) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s", ErrNoDatabase, where)
	}
	return err
}

// Report is what Verify found in a database.
type Report struct {
	Schema      int // number of the last migration
	Sessions    int
	Messages    int // that wait in queues; one that waits for three sessions counts three times
	Bytes       int // of these messages: topics, payloads and properties
	Retained    int
	Wills       int
	Credentials int
	Operators   int
	Damage      []string // what is wrong, for people; empty if all is well
}

// Verify reads everything in a database file and checks it: the structure of the
// file, and every record in it. The broker may be running. The error wraps
// ErrNoDatabase, ErrTooNew or ErrDamaged; with the latter the report says what
// is left.
func Verify(ctx context.Context, file string) (Report, error) {
	var r Report
	// What cannot be read is not damaged.
	f, err := os.Open(file)
	if err != nil {
		return r, noDatabase(err, file)
	}
	info, err := f.Stat()
	if err = errors.Join(err, f.Close()); err != nil {
		return r, err
	}
	if info.IsDir() {
		return r, fmt.Errorf("%s is a directory: name the file in it", file)
	}
	steps, err := embeddedMigrations()
	if err != nil {
		return r, err
	}
	pool, err := openDSN("file:"+(&url.URL{Path: file}).EscapedPath()+"?_pragma=busy_timeout(5000)&_pragma=query_only(on)", 1)
	if err != nil {
		return r, err
	}
	defer pool.Close()
	version, oldest, err := schemaVersion(ctx, pool)
	r.Schema = version
	switch {
	case err != nil:
		r.Damage = append(r.Damage, "schema version: "+err.Error())
	case version == 0:
		r.Damage = append(r.Damage, "it is empty, or not a database of penstock")
	case oldest > len(steps):
		return r, fmt.Errorf("%w: %s has schema %d", ErrTooNew, file, version)
	}
	if len(r.Damage) > 0 {
		return r, fmt.Errorf("%w: %s: %s", ErrDamaged, file, r.Damage[0])
	}
	conn, err := pool.Conn(ctx)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	r.read(ctx, &sqliteStore{conn: conn, torn: r.torn})
	if err := ctx.Err(); err != nil {
		return r, err
	}
	if len(r.Damage) > 0 {
		return r, fmt.Errorf("%w: %s: %s", ErrDamaged, file, r.Damage[0])
	}
	return r, nil
}

// torn notes a record that cannot be read.
func (r *Report) torn(what string, keys ...any) {
	for i := 0; i+1 < len(keys); i += 2 {
		what += fmt.Sprintf(" %v=%q", keys[i], fmt.Sprint(keys[i+1]))
	}
	r.Damage = append(r.Damage, what)
}

// read reads everything that s has into the report. What cannot be read does
// not keep it from the rest.
func (r *Report) read(ctx context.Context, s *sqliteStore) {
	const most = 20 // of the same kind; the rest says nothing new
	err := s.each(fmt.Sprintf(`PRAGMA integrity_check(%d)`, most), func(rows *sql.Rows) error {
		var line string
		if err := rows.Scan(&line); err != nil || line == "ok" {
			return err
		}
		for line := range strings.Lines(line) { // the first row may be a list
			if line = strings.TrimSuffix(line, "\n"); !strings.HasPrefix(line, "*** in database") {
				r.Damage = append(r.Damage, line)
			}
		}
		return nil
	})
	if err != nil {
		r.torn("file cannot be checked", "err", err)
	}
	for query, n := range map[string]*int{`SELECT count(*) FROM credential`: &r.Credentials, `SELECT count(*) FROM operator`: &r.Operators} {
		if err := s.conn.QueryRowContext(ctx, query).Scan(n); err != nil {
			r.torn("logins cannot be read", "err", err)
		}
	}
	img, err := s.loadRows(r.Schema)
	if err != nil {
		r.torn("not all can be read", "err", err)
		return
	}
	r.Sessions, r.Retained, r.Wills = len(img.Sessions), len(img.Retained), len(img.Wills)
	progress := make(map[SessionID]Progress, len(img.Sessions))
	for _, s := range img.Sessions {
		progress[s.ID] = s.Progress
	}
	segments := map[string]string{`SELECT id FROM segment`: getSegment}
	if r.Schema < 3 {
		segments = map[string]string{`SELECT id FROM segment`: `SELECT x'', body FROM segment WHERE id=?`}
	} else if old, err := s.hasOldSegments(); err != nil {
		r.torn("segments cannot be read", "err", err)
	} else if old {
		segments[oldSegments] = getOldSegment
	}
	for ids, get := range segments {
		if err := r.readSegments(ctx, s, ids, get, progress); err != nil {
			r.torn("segments cannot be read", "err", err)
		}
	}
}

// readSegments reads the segments whose ids a query has, one at a time: all of
// them may be more than there is memory.
func (r *Report) readSegments(ctx context.Context, s *sqliteStore, ids, get string, progress map[SessionID]Progress) error {
	var all []int64
	err := s.each(ids, func(rows *sql.Rows) error {
		var id int64
		err := rows.Scan(&id)
		all = append(all, id)
		return err
	})
	if err != nil {
		return err
	}
	for _, id := range all {
		seg, err := scanSegment(id, s.conn.QueryRowContext(ctx, get, id))
		if err == nil && seg != nil && len(seg.Head) == 0 {
			*seg, err = seg.withHead()
		}
		if err != nil {
			r.torn("segment is damaged", "err", err, "segment", id)
		}
		if seg == nil {
			continue // not to be read, or gone meanwhile
		}
		c := seg.contents()
		if c.torn != nil {
			r.torn("segment is damaged", "err", c.torn, "segment", id)
		}
		for _, p := range c.pieces {
			q, ok := progress[p.session]
			if !ok {
				continue
			}
			c.Deliveries(p.session, max(p.first, q.Cursor), p.first+uint64(p.count), func(d ClaimRecord, m *Message) bool {
				if _, done := slices.BinarySearch(q.Finished, d.Seq); !done {
					r.Messages++
					r.Bytes += m.Size()
				}
				return true
			})
		}
	}
	return nil
}
