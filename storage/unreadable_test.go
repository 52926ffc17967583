package storage

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A segment that the disk does not give is asked for again; when that lasts while
// the disk takes writes, it is damage, and the next start salvages.
func TestSegmentThatStaysUnreadable(t *testing.T) {
	db, _ := openStore(t)
	dir := filepath.Dir(db.path)
	pool, err := openDSN(plainDSN(t.TempDir())+"&mode=ro", 1) // a directory is a file that it cannot read
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	failed := pool.QueryRow(`PRAGMA user_version`).Scan(new(int))
	if failed == nil {
		t.Fatal("a directory was read")
	}
	long := func() { db.unreadable.since[7] = time.Now().Add(-2 * stubborn) }
	want := func(what string, err error, damage bool) {
		t.Helper()
		if errors.Is(err, ErrDamaged) != damage || (db.Damage() != "") != damage || (readMark(dir) != "") != damage {
			t.Errorf("%s: got %v, damage %q, mark %q, want that it is damage: %v", what, err, db.Damage(), readMark(dir), damage)
		}
	}
	want("once", db.suspectSegment(7, failed), false)
	want("again", db.suspectSegment(7, failed), false)
	long()
	want("read at last", db.suspectSegment(7, nil), false)
	want("once more", db.suspectSegment(7, failed), false)
	long()
	want("another one", db.suspectSegment(8, failed), false)
	path := db.path
	db.path = t.TempDir()
	want("nothing can be read", db.suspectSegment(7, failed), false)
	db.path = path
	long()
	write := db.write
	db.write = pool
	want("no disk at all", db.suspectSegment(7, failed), false)
	db.write = write
	want("it is back", db.suspectSegment(7, failed), false)
	long()
	want("for long", db.suspectSegment(7, failed), true)
}

// Of a database, or its log, that the disk does not give nothing is salvaged, for
// that would be a new one with nothing in it, and nothing is set aside.
func TestNoSalvageOfUnreadable(t *testing.T) {
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{fileName, fileName + "-wal"} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil { // which can be opened, and not read
			t.Fatal(err)
		}
		db := &DB{cfg: DefaultConfig(), log: slog.New(slog.DiscardHandler), path: filepath.Join(dir, fileName)}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		err := db.salvage(ctx, steps, "a test")
		cancel()
		if err == nil || db.Salvage() != nil {
			t.Errorf("%s: got %v and report %+v, want an error and none", name, err, db.Salvage())
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != name {
			t.Errorf("%s: left: %v, %v", name, left, err)
		}
	}
}
