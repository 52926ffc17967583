package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	sqlite3 "modernc.org/sqlite/lib"
)

// stubborn is how long a segment cannot be read before that is taken for damage.
// A disk that stalls, or is away for a moment, is back by then.
const stubborn = time.Minute

// unreadable is the segments that the disk does not give, and since when.
type unreadable struct {
	mu    sync.Mutex
	since map[int64]time.Time
}

// suspectSegment is suspect for the error, which may be nil, of reading a segment.
// What the flash does not give is to SQLite damage or an I/O error, by what the
// kernel says. With the latter the queue would wait for ever, and no start would
// meet it. So it is damage when it lasts and the disk works otherwise: it gives most
// of the database, and takes a write.
func (db *DB) suspectSegment(id int64, err error) error {
	u := &db.unreadable
	u.mu.Lock()
	defer u.mu.Unlock()
	if err = db.suspect(err); sqliteCode(err)&0xff != sqlite3.SQLITE_IOERR || errors.Is(err, ErrDamaged) {
		delete(u.since, id)
		return err
	}
	since, failed := u.since[id]
	switch {
	case !failed && u.since == nil:
		u.since = map[int64]time.Time{id: time.Now()}
	case !failed:
		u.since[id] = time.Now()
	case time.Since(since) < stubborn:
	case !db.readable():
		u.since[id] = time.Now() // it is all of the disk
	default:
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, failed := db.write.ExecContext(ctx, `INSERT INTO meta (key, value) VALUES ('unreadable', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, id); failed != nil {
			u.since[id] = time.Now() // likewise
			return err
		}
		return db.found(fmt.Errorf("for %s, while the disk takes writes: %w", time.Since(since).Round(time.Second), err))
	}
	return err
}

// readPatience is how long a salvage waits for a disk that does not give the
// database.
const readPatience = 10 * time.Second

// awaitReadable waits until the disk gives most of the database at path. A salvage of what it
// does not give would begin with nothing, although all may be there.
func awaitReadable(ctx context.Context, path string) error {
	for began := time.Now(); !readable(path); {
		if time.Since(began) > readPatience {
			return fmt.Errorf("the disk does not give %s: nothing was changed", path)
		}
		if err := pause(ctx, 250*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// readable reports whether the disk gives most of the database at path, and of its
// log. No connection to it may be open: see walIndex.
func readable(path string) bool { return mostOf(path) && mostOf(path+"-wal") }

// readable is that for a database that is open.
func (db *DB) readable() bool {
	if f := db.flash.databaseFile(); f != nil {
		return mostOfFile(f) && mostOf(db.path+"-wal")
	}
	return readable(db.path)
}

// mostOf reports whether the disk gives most of a file, or there is none.
func mostOf(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	return mostOfFile(f)
}

// mostOfFile is that for an open file: of 32 places in it the disk gives all but a
// few.
func mostOfFile(f *os.File) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	const places = 32
	failed, size := 0, info.Size()
	var buf [usualPage]byte
	for i := range int64(places) {
		if _, err := f.ReadAt(buf[:], size/places*i); err != nil && !errors.Is(err, io.EOF) {
			failed++
		}
	}
	return failed <= places/4
}
