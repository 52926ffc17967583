package storage

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// fill makes a database with something of everything, and returns its journal.
func fill(t *testing.T, db *DB, store *sqliteStore) *Journal {
	t.Helper()
	j := newTestJournal(t, store, testState{})
	j.Change(func(tx Tx) error {
		return errors.Join(
			tx.PutSession(Session{ID: 1, ClientID: "a", Progress: Progress{Cursor: 5, Finished: []uint64{7}}}),
			tx.PutSession(Session{ID: 2, ClientID: "b"}),
			tx.PutRetained(&Message{Topic: "r", Payload: []byte("x")}), tx.PutWill(Will{ClientID: "a", Message: &Message{Topic: "w"}}))
	}, nil)
	for seq := range uint64(10) { // of which 5, 6, 8 and 9 wait for a, and all for b
		m := &Message{Topic: "t", Payload: bytes.Repeat([]byte{'x'}, 99), QoS: 1}
		j.Publish(&Publication{Message: m, Claims: []Claim{
			&testClaim{ClaimRecord: ClaimRecord{Session: 1, Seq: seq, QoS: 1}},
			&testClaim{ClaimRecord: ClaimRecord{Session: 2, Seq: seq, QoS: 1}},
		}})
	}
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := db.PutCredential(t.Context(), Credential{Username: "device", Hash: "h"}, true); err != nil {
		t.Fatal(err)
	}
	return j
}

// filled is what is in it, but for the schema, which is the newest.
var filled = Report{Sessions: 2, Messages: 14, Bytes: 1400, Retained: 1, Wills: 1, Credentials: 1}

func verified(t *testing.T, file string, want Report) {
	t.Helper()
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	want.Schema = len(steps)
	got, err := Verify(t.Context(), file)
	if err != nil {
		t.Errorf("%s: %v", file, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %+v, want %+v", file, got, want)
	}
}

// A backup beside a running journal has what was durable, and a restore brings
// back just that, and keeps what was there.
func TestBackupAndRestore(t *testing.T) {
	db, store := openStore(t)
	j := fill(t, db, store)
	dir := filepath.Dir(db.path)
	verified(t, db.path, filled)

	file := filepath.Join(t.TempDir(), "backup")
	if err := Backup(t.Context(), dir, file); err != nil {
		t.Fatal(err)
	}
	verified(t, file, filled)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the backup has mode %v, %v", info.Mode(), err)
	}
	if err := Backup(t.Context(), dir, file); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over an existing file: got %v, want fs.ErrExist", err)
	}

	j.Change(func(tx Tx) error { return tx.DeleteRetained("r") }, nil)
	if err := j.Commit(); err != nil {
		t.Fatal(err)
	}
	later := filled
	later.Retained = 0
	verified(t, db.path, later)
	if _, err := Restore(t.Context(), dir, file); !errors.Is(err, ErrInUse) {
		t.Errorf("beside a running broker: got %v, want ErrInUse", err)
	}
	// As a power cut leaves it: with a log beside it.
	image := t.TempDir()
	for _, name := range []string{fileName, fileName + "-wal"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(image, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	kept, err := Restore(t.Context(), image, file)
	if err != nil {
		t.Fatal(err)
	}
	verified(t, filepath.Join(image, fileName), filled)
	verified(t, kept, later)
	if leftover, _ := filepath.Glob(filepath.Join(image, "*.part*")); len(leftover) > 0 {
		t.Errorf("left behind: %v", leftover)
	}
	empty := filepath.Join(t.TempDir(), "new")
	if kept, err := Restore(t.Context(), empty, file); err != nil || kept != "" {
		t.Errorf("into a new directory: kept %q, %v", kept, err)
	}
	verified(t, filepath.Join(empty, fileName), filled)
}

// A backup that fails leaves nothing behind.
func TestBackupThatFails(t *testing.T) {
	db, _ := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	where := t.TempDir()
	if err := Backup(ctx, filepath.Dir(db.path), filepath.Join(where, "backup")); err == nil {
		t.Error("a backup under a context that has ended went well")
	}
	if err := Backup(t.Context(), where, filepath.Join(where, "backup")); !errors.Is(err, ErrNoDatabase) {
		t.Errorf("of nothing: got %v, want ErrNoDatabase", err)
	}
	if left, err := os.ReadDir(where); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// What is damaged is found, is not restored, and nothing is touched by the try.
func TestDamagedIsRefused(t *testing.T) {
	db, store := openStore(t)
	fill(t, db, store)
	good := filepath.Join(t.TempDir(), "good")
	if err := Backup(t.Context(), filepath.Dir(db.path), good); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"cut in half":     func(b []byte) []byte { return b[:len(b)/2] },
		"all zero":        func(b []byte) []byte { return make([]byte, len(b)) },
		"empty":           func(b []byte) []byte { return nil },
		"something else":  func(b []byte) []byte { return []byte(strings.Repeat("no database\n", 1000)) },
		"a record torn":   func(b []byte) []byte { return bytes.Replace(b, []byte("\x00\x01r\x01x"), []byte("\x00\x7fr\x01x"), 1) },
		"a page of zeros": func(b []byte) []byte { copy(b[4096:8192], make([]byte, 4096)); return b },
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "bad")
			if err := os.WriteFile(file, damage(bytes.Clone(whole)), 0o600); err != nil {
				t.Fatal(err)
			}
			if r, err := Verify(t.Context(), file); !errors.Is(err, ErrDamaged) || len(r.Damage) == 0 {
				t.Errorf("got %v and %q, want ErrDamaged and why", err, r.Damage)
			}
			dir := t.TempDir()
			if _, err := Restore(t.Context(), dir, file); !errors.Is(err, ErrDamaged) {
				t.Errorf("restore: got %v, want ErrDamaged", err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// What cannot be read is not called damaged, and a second restore keeps what the
// first has kept.
func TestRestoreIsCareful(t *testing.T) {
	db, store := openStore(t)
	fill(t, db, store)
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "backup")
	if err := Backup(t.Context(), filepath.Dir(db.path), file); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir); err == nil || errors.Is(err, ErrDamaged) {
		t.Errorf("a directory: got %v, want an error that says so", err)
	}
	kept := map[string]bool{}
	for range 4 {
		name, err := Restore(t.Context(), dir, file)
		if err != nil {
			t.Fatal(err)
		}
		kept[name] = true
	}
	if len(kept) != 4 { // of the first there was nothing
		t.Errorf("kept %v, want three files", kept)
	}
	if err := os.WriteFile(file+"2.part", []byte("of a backup that was cut short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Backup(t.Context(), filepath.Dir(db.path), file+"2"); err != nil {
		t.Error(err)
	}
}
