package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// put commits one group of about pages pages.
func put(t testing.TB, s *sqliteStore, id int64, pages int) {
	t.Helper()
	tx, err := s.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.PutSegment(StoredSegment{ID: id, Body: make([]byte, pages*4096)}); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
}

func logPages(t testing.TB, db *DB) uint32 {
	t.Helper()
	h, ok := db.flash.header()
	if !ok {
		t.Fatal("no log header")
	}
	return h.frames
}

// While the goroutine that moves the log hangs in writing to the database, commits
// go on, up to the bound of the log.
func TestCommitDoesNotWaitForCheckpoint(t *testing.T) {
	installTape()
	_, s := openCounted(t, func(c *Config) { c.WALPages = 100 })
	entered, release := make(chan struct{}), make(chan struct{})
	once, free := sync.OnceFunc(func() { close(entered) }), sync.OnceFunc(func() { close(release) })
	hold(func(kind byte, path string) {
		if kind == 'w' && strings.HasSuffix(path, fileName) {
			once()
			<-release
		}
	})
	defer hold(nil)
	t.Cleanup(free) // before the store is closed
	s.checkpoints.start()
	id := int64(0)
	for range 12 { // 120 pages
		id++
		put(t, s, id, 10)
	}
	<-entered
	for range 15 { // 150 more, below the bound of 400
		id++
		put(t, s, id, 10)
	}
	if got := logPages(t, s.db); got < 250 {
		t.Errorf("the log has %d pages, want all that was written since", got)
	}
}

// Where nobody moves the log meanwhile, or not fast enough, commits do at the
// bound; and then the log begins anew.
func TestLogIsBounded(t *testing.T) {
	db, s := openCounted(t, func(c *Config) { c.WALPages = 100 })
	longest := uint32(0)
	for i := range int64(300) {
		put(t, s, i+1, 5)
		longest = max(longest, logPages(t, db))
	}
	if longest < 4*100 || longest > 4*100+20 {
		t.Errorf("the log grew to %d pages, want the bound of 400", longest)
	}
}

// Where a goroutine moves the log, it begins anew near the length from which on
// it is moved, though commits never pause: there is always one that comes while
// the others are moved.
func TestLogBeginsAnew(t *testing.T) {
	installTape()
	db, s := openCounted(t, func(c *Config) { c.WALPages = 100 })
	longest, id, during := uint32(0), int64(0), false
	commit := func() {
		id++
		put(t, s, id, 3)
		longest = max(longest, logPages(t, db))
	}
	hold(func(kind byte, path string) {
		if during && longest < 300 && kind == 'w' && strings.HasSuffix(path, fileName) {
			during = false
			commit()
		}
	})
	defer hold(nil)
	for range 300 {
		commit()
		during = true
		moveLog(s.checkpoints)
		during = false
	}
	if longest < 100 || longest > 150 {
		t.Errorf("the log grew to %d pages, want little more than 100", longest)
	}
}

// The page numbers in the index are those in the log, also where they go on in
// the index's second and third block.
func TestLogPageNumbers(t *testing.T) {
	db, s := openCounted(t, func(c *Config) { c.WALPages = 10000 })
	put(t, s, 1, 3)
	put(t, s, 2, 9000)
	h, ok := db.flash.header()
	if !ok || h.frames < 9000 {
		t.Fatalf("the log has %d pages, too few for this test", h.frames)
	}
	text, err := os.ReadFile(db.path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []uint32{0, 2, 4061, 4062, 5000, 8158} {
		got := db.flash.index.pages(from, h.frames)
		if len(got) != int(h.frames-from) {
			t.Fatalf("%d page numbers from %d on, want %d", len(got), from, h.frames-from)
		}
		for i, n := range got {
			if want := binary.BigEndian.Uint32(text[h.end(from+uint32(i)):]); n != want {
				t.Fatalf("frame %d has page %d in the index, and %d in the log", from+uint32(i), n, want)
			}
		}
	}
}

// Who reads an old state, as a backup does, holds up nobody. The log grows
// meanwhile, which is said once, and is cut when it is over.
func TestReaderHoldsLogNotCommits(t *testing.T) {
	var text bytes.Buffer
	db, s := openCounted(t, func(c *Config) { c.WALPages = 50 })
	s.checkpoints.log = slog.New(slog.NewTextHandler(&text, nil))
	put(t, s, 1, 1)
	reader, err := db.read.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := reader.ExecContext(t.Context(), "BEGIN; SELECT count(*) FROM segment"); err != nil {
		t.Fatal(err)
	}
	id := int64(1)
	start := time.Now()
	for range 100 {
		id++
		put(t, s, id, 5)
		moveLog(s.checkpoints)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("commits took %s: they wait for the reader", took)
	}
	if got := logPages(t, db); got < 500 {
		t.Errorf("the log has %d pages, though somebody reads what was before them", got)
	}
	if got := strings.Count(text.String(), "write-ahead log grows"); got != 1 {
		t.Errorf("it was said %d times that the log grows, want once:\n%s", got, &text)
	}
	if _, err := reader.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	for range 30 {
		id++
		put(t, s, id, 1)
		moveLog(s.checkpoints)
	}
	if got := logPages(t, db); got > 50 {
		t.Errorf("the log has %d pages after the reader has gone", got)
	}
	if size := logSize(t, db); size > walSizeLimit(50) {
		t.Errorf("its file still has %d bytes, want %d", size, walSizeLimit(50))
	}
}

func logSize(t testing.TB, db *DB) int64 {
	t.Helper()
	info, err := os.Stat(db.path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// A file that is too large is cut when nobody commits, and left alone before.
func TestIdleLogIsCut(t *testing.T) {
	db, s := openCounted(t, func(c *Config) { c.WALPages = 50 })
	for i := range int64(25) {
		put(t, s, i+1, 4)
	}
	if size := logSize(t, db); size <= walSizeLimit(50) {
		t.Fatalf("the file has %d bytes, too few for this test", size)
	}
	if later := s.checkpoints.shrink(); !later || logSize(t, db) == 0 {
		t.Error("the file was cut while there were commits")
	}
	s.checkpoints.last.Store(int64(time.Since(s.checkpoints.began) - walIdle))
	if later := s.checkpoints.shrink(); later || logSize(t, db) != 0 {
		t.Errorf("the file has %d bytes when nobody has committed for a minute", logSize(t, db))
	}
}

// A log that was left by a kill is moved with the first commits of the next
// start.
func TestLogOfLastTimeIsMoved(t *testing.T) {
	db, s := openCounted(t, func(c *Config) { c.WALPages = 1000 })
	for i := range int64(60) {
		put(t, s, i+1, 4)
	}
	cfg := db.cfg
	cfg.Dir, cfg.WALPages = t.TempDir(), 50
	for _, suffix := range []string{"", "-wal"} { // as a kill leaves them
		b, err := os.ReadFile(db.path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.Dir, fileName+suffix), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	db, s = reopenCounted(t, cfg)
	if got := logPages(t, db); got < 240 {
		t.Fatalf("the log has %d pages, too few for this test", got)
	}
	put(t, s, 1000, 1)
	moveLog(s.checkpoints)
	put(t, s, 1001, 1)
	if got := logPages(t, db); got > 10 {
		t.Errorf("the log has %d pages, want a new one", got)
	}
}

// The Journal of a database moves the log by itself, and its end ends that.
func TestJournalMovesLog(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Dir, cfg.WALPages = t.TempDir(), 100
	log := slog.New(slog.DiscardHandler)
	db, err := Open(t.Context(), cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	j, err := db.NewJournal(log)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if _, _, err := j.Load(); err != nil {
		t.Fatal(err)
	}
	j.Attach(testState{})
	for i := int64(1); logPages(t, db) < 110; i++ { // too few for a commit to do it
		j.Change(func(tx Tx) error { return tx.PutSegment(StoredSegment{ID: i, Body: make([]byte, 8000)}) }, nil)
		if err := j.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(30 * time.Second); db.Flash().Total["checkpoint"] == 0; runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatal("the log is never moved")
		}
	}
}

// A checkpoint that fails costs nobody anything, and is said once.
func TestCheckpointFails(t *testing.T) {
	var text bytes.Buffer
	db, s := openCounted(t, func(c *Config) { c.WALPages = 20 })
	s.checkpoints.log = slog.New(slog.NewTextHandler(&text, nil))
	for i := range int64(10) {
		put(t, s, i+1, 4)
	}
	s.checkpoints.mu.Lock()
	for range 3 {
		s.checkpoints.pass("(")
	}
	s.checkpoints.mu.Unlock()
	if got := strings.Count(text.String(), "checkpoint failed"); got != 1 {
		t.Errorf("it was said %d times, want once:\n%s", got, &text)
	}
	for i := range int64(40) {
		put(t, s, i+100, 4)
		moveLog(s.checkpoints)
	}
	if got := logPages(t, db); got > 40 {
		t.Errorf("the log has %d pages after it works again", got)
	}
}

// After the disk has failed in a sync, all of the log is moved again: what was
// moved before may not be on the disk, whatever the next sync says.
func TestLogIsMovedAgainAfterFailedSync(t *testing.T) {
	installTape()
	for _, tt := range []struct {
		name string
		fail func(*checkpoints) (mend func())
	}{
		{"the sync ahead", func(c *checkpoints) func() {
			ahead := c.sync
			c.sync = func() error { return errors.New("EIO") }
			return func() { c.sync = ahead }
		}},
		{"the sync of the last pages", func(c *checkpoints) func() {
			tape.Lock()
			tape.on, tape.ops, tape.failSync = true, nil, fileName
			tape.Unlock()
			return func() { tape.Lock(); tape.failSync = ""; tape.Unlock() }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db, s := openCounted(t, func(c *Config) { c.WALPages = 100 })
			during := false
			hold(func(kind byte, path string) {
				if during && kind == 'w' && strings.HasSuffix(path, fileName) {
					during = false
					put(t, s, 1000, 3) // so that the pass does not reach the end
				}
			})
			defer hold(nil)
			for i := int64(1); logPages(t, db) < 110; i++ {
				put(t, s, i, 3)
			}
			if strings.Contains(tt.name, "last") {
				during = true
				s.checkpoints.work() // without fault, and not to the end
				if h, _ := db.flash.header(); h.backfilled == 0 || h.rest() == 0 {
					t.Fatalf("%d of %d pages are moved, want some", h.backfilled, h.frames)
				}
			}
			mend := tt.fail(s.checkpoints)
			during = tt.name == "the sync ahead"
			s.checkpoints.work()
			mend()
			h, _ := db.flash.header()
			if h.backfilled != 0 || h.frames < 110 {
				t.Errorf("%d of %d pages count as moved", h.backfilled, h.frames)
			}
			want := map[uint32]bool{}
			for _, n := range db.flash.index.pages(0, h.frames) {
				want[n] = true
			}
			recordDisk()
			s.checkpoints.work()
			put(t, s, 2000, 1)
			pages := 0
			for _, op := range stopRecording() {
				if op.kind == 'w' && strings.HasSuffix(op.path, fileName) {
					pages++
				}
			}
			if pages != len(want) {
				t.Errorf("%d pages were moved again, want all %d", pages, len(want))
			}
			if got := logPages(t, db); got > 20 {
				t.Errorf("the log has %d pages, want a new one", got)
			}
			var result string
			if err := db.read.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&result); err != nil || result != "ok" {
				t.Errorf("integrity: %s, %v", result, err)
			}
		})
	}
}
