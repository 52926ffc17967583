package storage

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// oldDatabase makes a database of schema 2 in a new directory, with what fill has.
func oldDatabase(t *testing.T) (dir string) {
	t.Helper()
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	pool := mustPool(t, filepath.Join(dir, fileName))
	if err := migrate(t.Context(), pool, steps[:2], slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	var body []byte
	for seq := range uint64(10) {
		body = appendMessage(body, &Message{Topic: "t", Payload: make([]byte, 99), QoS: 1})
		body = append(body, 2) // claims: flags, session, sequence number, no identifiers
		for id := range uint64(2) {
			body = binary.AppendUvarint(append(body, 1), id+1)
			body = append(binary.AppendUvarint(body, seq), 0)
		}
	}
	for query, args := range map[string][]any{
		`INSERT INTO session VALUES (1,'a',4294967295,4,0,16384,?), (2,'b',4294967295,5,0,16384,?)`: {
			appendProgress(nil, Progress{Cursor: 5, Finished: []uint64{7}}), appendProgress(nil, Progress{})},
		`INSERT INTO segment VALUES (1,?)`:      {body},
		`INSERT INTO retained VALUES ('r',?)`:   {appendMessage(nil, &Message{Topic: "r", Payload: []byte("x")})},
		`INSERT INTO will VALUES ('a',0,?)`:     {appendMessage(nil, &Message{Topic: "w"})},
		`INSERT INTO credential VALUES (?,?,0)`: {"device", "h"},
	} {
		if _, err := pool.ExecContext(t.Context(), query, args...); err != nil {
			t.Fatal(err)
		}
	}
	if err := pool.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// verifiedAs is verified of a database of a certain schema.
func verifiedAs(t *testing.T, schema int, file string) {
	t.Helper()
	want := filled
	want.Schema = schema
	got, err := Verify(t.Context(), file)
	if err != nil || got.Schema != schema || got.Messages != want.Messages || got.Bytes != want.Bytes || got.Sessions != want.Sessions ||
		got.Retained != want.Retained || got.Wills != want.Wills || got.Credentials != want.Credentials {
		t.Errorf("%s: got %+v, %v, want %+v", file, got, err, want)
	}
}

// A database of schema 2 is verified, backed up and restored as it is, and so is
// its backup; a start brings it to the newest schema, with all that is in it.
func TestOldDatabase(t *testing.T) {
	dir := oldDatabase(t)
	verifiedAs(t, 2, filepath.Join(dir, fileName))
	file := filepath.Join(t.TempDir(), "backup")
	if err := Backup(t.Context(), dir, file); err != nil {
		t.Fatal(err)
	}
	verifiedAs(t, 2, file)
	again := t.TempDir()
	if _, err := Restore(t.Context(), again, file); err != nil {
		t.Fatal(err)
	}
	verifiedAs(t, 2, filepath.Join(again, fileName))
	db, j, _ := reopen(t, again)
	if db.Salvage() != nil {
		t.Error("it was salvaged")
	}
	verified(t, db.path, filled)
	if err := errors.Join(j.Close(), db.Close()); err != nil {
		t.Fatal(err)
	}
	verifiedAs(t, 2, file) // is as it was
}

// A migration has to wait while another process serves: that may be an older
// program, which would lose the tables that it writes to.
func TestNoMigrationInUse(t *testing.T) {
	dir := oldDatabase(t)
	lock, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Dir = dir
	if db, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v, want ErrInUse", err)
		if err == nil {
			db.Close()
		}
	}
	verifiedAs(t, 2, filepath.Join(dir, fileName))
	lock.Close()
	reopen(t, dir)
}

// Damage that only a migration meets does not keep the start from serving either.
func TestDamageInMigration(t *testing.T) {
	dir := oldDatabase(t)
	f, err := os.OpenFile(filepath.Join(dir, fileName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	list := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 0x7fffffff), 5) // of free pages
	if _, err := f.WriteAt(list, 32); err != nil {
		t.Fatal(err)
	}
	f.Close()
	db, _, rows := reopen(t, dir)
	if db.Salvage() == nil {
		t.Error("it was not salvaged")
	}
	if len(rows["session"]) != 2 || len(rows["retained"]) != 1 || len(rows[segmentTable]) == 0 {
		t.Errorf("got %v", rows)
	}
}
