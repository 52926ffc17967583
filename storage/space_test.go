package storage

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// The flag rises below the reserve and falls a quarter above it, and each
// change is logged once.
func TestSpaceHysteresis(t *testing.T) {
	const mib = 1 << 20
	var log bytes.Buffer
	free, unused, growth := int64(0), int64(0), int64(0)
	s := &Space{
		reserve: 32 * mib, log: slog.New(slog.NewTextHandler(&log, nil)),
		statfs: func(string) (int64, int64, error) { return 1000 * mib, free, nil },
		inside: func() (int64, int64, error) { return unused, growth, nil },
	}
	for i, step := range []struct {
		free, unused, growth int64 // MiB
		low                  bool
	}{
		{500, 0, 0, false},
		{32, 0, 0, false},
		{31, 0, 0, true},
		{39, 0, 0, true}, // not yet
		{40, 0, 0, false},
		{20, 12, 0, false}, // a database that was drained takes messages, and does not shrink
		{20, 11, 0, true},
		{20, 20, 0, false},
		{34, 0, 3, true}, // what is only in the log is going to take room
		{50, 0, 3, false},
		{7, 500, 0, true}, // the log has no use for the database's free pages
		{10, 500, 0, false},
	} {
		free, unused, growth = step.free*mib, step.unused*mib, step.growth*mib
		s.look()
		if s.Low() != step.low {
			t.Errorf("step %d: %+v: low is %v", i, step, s.Low())
		}
		if st := s.Stats(); st.Free != free || st.Reserve != 32*mib || st.Low != step.low {
			t.Errorf("step %d: got %+v", i, st)
		}
	}
	if n := strings.Count(log.String(), "disk is nearly full"); n != 4 || strings.Count(log.String(), "has room again") != 4 {
		t.Errorf("4 times nearly full and 4 times not any more, the log has:\n%s", &log)
	}
}

// On a small file system the reserve is a part of it, and a disk of which
// nothing is known is taken for what it was.
func TestSpaceOfSmallAndUnknown(t *testing.T) {
	var log bytes.Buffer
	var fails error
	s := &Space{
		reserve: 32 << 20, log: slog.New(slog.NewTextHandler(&log, nil)),
		statfs: func(string) (int64, int64, error) { return 8000, 999, fails },
		inside: func() (int64, int64, error) { return 0, 0, nil },
	}
	s.look()
	if st := s.Stats(); st.Reserve != 1000 || !st.Low {
		t.Errorf("999 of 8000 bytes are free: got %+v, want a reserve of 1000, and low", st)
	}
	fails = errors.New("no such disk")
	s.look()
	s.look()
	if !s.Low() || strings.Count(log.String(), "no such disk") != 1 {
		t.Errorf("low is %v after a look that failed, want it as it was, logged once:\n%s", s.Low(), &log)
	}
	s.reserve, fails = 0, nil
	s.low.Store(false)
	if s.look(); s.Low() {
		t.Error("low, though nothing is to be kept free")
	}
}

// The numbers of the real thing: free pages of a database whose rows are gone.
func TestSpaceInside(t *testing.T) {
	db, store := openStore(t)
	put := func(change func(Tx) error) {
		t.Helper()
		tx, err := store.Begin()
		if err == nil {
			err = errors.Join(change(tx), tx.Commit())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	const size = 1 << 20
	put(func(tx Tx) error { return tx.PutSegment(StoredSegment{ID: 1, Body: make([]byte, size)}) })
	_, growth, err := db.freeInside()
	if err != nil || growth < size {
		t.Errorf("with %d bytes in the log: growth %d, %v", size, growth, err)
	}
	put(func(tx Tx) error { return tx.DeleteSegment(1) })
	if unused, _, err := db.freeInside(); err != nil || unused < size {
		t.Errorf("with %d bytes deleted: %d free, %v", size, unused, err)
	}
	if got := db.Space().Stats(); got.Free == 0 || got.Reserve == 0 {
		t.Errorf("after commits: %+v, want numbers", got)
	}
}
