package storage

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"testing"
)

func TestDatabaseIsPrivate(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Dir = t.TempDir()
	if err := os.Chmod(cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, before := range []os.FileMode{0, 0o644} { // new, and as an older program left it
		if before != 0 {
			if err := os.Chmod(cfg.Dir+"/penstock.db", before); err != nil {
				t.Fatal(err)
			}
		}
		db, err := Open(context.Background(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		files, err := os.ReadDir(cfg.Dir)
		if err != nil || len(files) < 2 {
			t.Fatalf("%d files, error %v, want the database and its log", len(files), err)
		}
		for _, f := range files {
			info, err := f.Info()
			if err != nil {
				t.Fatal(err)
			}
			if got := info.Mode().Perm(); got != 0o600 {
				t.Errorf("%s has mode %o, want 600", f.Name(), got)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOneJournalPerDirectory(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Dir = t.TempDir()
	log := slog.New(slog.DiscardHandler)
	open := func() *DB {
		db, err := Open(context.Background(), cfg, log)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { db.Close() })
		return db
	}
	first, second := open(), open() // a command may open the database beside a server
	j, err := first.NewJournal(log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.NewJournal(log); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("second journal: got %v, want ErrInUse with the process", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, err = second.NewJournal(log)
	if err != nil {
		t.Fatalf("journal after the first was closed: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}
