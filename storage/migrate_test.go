package storage

import (
	"bytes"
	"database/sql"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// The schema as the migrations leave it, for reading and for diffs.
func TestSchemaGolden(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	rows, err := db.read.QueryContext(t.Context(), `
		SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL
		ORDER BY tbl_name, type DESC, name`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var got strings.Builder
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			t.Fatal(err)
		}
		got.WriteString(text + ";\n\n")
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "schema.golden.sql")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("the migrations leave another schema than %s:\n%s\nif that is meant, run go test ./storage -update", golden, got.String())
	}
}

// Without STRICT a column takes any type, and the mistake shows years later.
func TestTablesAreStrict(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	rows, err := db.read.QueryContext(t.Context(), `
		SELECT name FROM pragma_table_list
		WHERE schema = 'main' AND type = 'table' AND NOT strict AND name NOT LIKE 'sqlite\_%' ESCAPE '\'`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			t.Fatal(err)
		}
		t.Errorf("table %s is not STRICT", name)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
}

func TestReadMigrations(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	for _, tt := range []struct {
		name string
		dir  fs.FS
		want string // part of the error, "" for none
	}{
		{"good", fstest.MapFS{"0001_a.sql": file(""), "0002_b.sql": file("-- readable-by: 1\n")}, ""},
		{"gap", fstest.MapFS{"0001_a.sql": file(""), "0003_b.sql": file("")}, "0003_b.sql: number 0002 was expected"},
		{"double", fstest.MapFS{"0001_a.sql": file(""), "0001_b.sql": file("")}, "0001_b.sql: number 0002 was expected"},
		{"does not begin at 1", fstest.MapFS{"0000_a.sql": file("")}, "number 0001 was expected"},
		{"no number", fstest.MapFS{"more.sql": file("")}, "not NNNN_name.sql"},
		{"short number", fstest.MapFS{"1_a.sql": file("")}, "not NNNN_name.sql"},
		{"reader of the future", fstest.MapFS{"0001_a.sql": file("-- readable-by: 2\n")}, "from 1 to 1"},
		{"reader zero", fstest.MapFS{"0001_a.sql": file("-- readable-by: 0\n")}, "from 1 to 1"},
		{"reader is a word", fstest.MapFS{"0001_a.sql": file("-- readable-by: all\n")}, "from 1 to 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := readMigrations(tt.dir)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v, want no error", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// metaStep makes the table that migrate itself needs.
var metaStep = migration{number: 1, name: "0001", oldestReader: 1,
	sql: `CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value INTEGER NOT NULL) STRICT`}

func TestMigrate(t *testing.T) {
	pool := mustPool(t, filepath.Join(t.TempDir(), fileName))
	log := slog.New(slog.DiscardHandler)
	check := func(version, oldest int) {
		t.Helper()
		v, o, err := schemaVersion(t.Context(), pool)
		if err != nil || v != version || o != oldest {
			t.Errorf("got version %d, oldest reader %d, error %v, want %d, %d", v, o, err, version, oldest)
		}
	}
	steps := []migration{
		metaStep,
		{number: 2, name: "0002", oldestReader: 2, sql: `CREATE TABLE a (x INTEGER) STRICT; CREATE TABLE b (x INTEGER) STRICT`},
		{number: 3, name: "0003", oldestReader: 1, sql: `CREATE TABLE c (x INTEGER) STRICT`},
	}
	if err := migrate(t.Context(), pool, steps[:1], log); err != nil {
		t.Fatal(err)
	}
	check(1, 1)
	if err := migrate(t.Context(), pool, steps, log); err != nil {
		t.Fatal(err)
	}
	// 0003 alone is readable by 1, but not what 0002 left.
	check(3, 2)
	if err := migrate(t.Context(), pool, steps, log); err != nil {
		t.Errorf("again: %v", err)
	}
	// An older binary that can read it opens it and leaves it as it is.
	if err := migrate(t.Context(), pool, steps[:2], log); err != nil {
		t.Errorf("fallen back: %v", err)
	}
	check(3, 2)
	if err := migrate(t.Context(), pool, steps[:1], log); !errors.Is(err, ErrTooNew) {
		t.Errorf("fallen back too far: got %v, want ErrTooNew", err)
	}

	// A migration is done wholly or not at all.
	bad := append(steps, migration{number: 4, name: "0004", oldestReader: 4, sql: `CREATE TABLE d (x INTEGER) STRICT; nonsense`})
	if err := migrate(t.Context(), pool, bad, log); err == nil || !strings.Contains(err.Error(), "0004") {
		t.Errorf("got %v, want an error that names 0004", err)
	}
	check(3, 2)
	if _, err := pool.ExecContext(t.Context(), `SELECT * FROM d`); err == nil {
		t.Error("half of a failed migration stayed")
	}
}

func TestOpenTwiceKeepsData(t *testing.T) {
	dir := t.TempDir()
	cfg := DefaultConfig()
	cfg.Dir = dir
	db, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := db.PutOperator(t.Context(), Operator{Name: "ann", Role: "admin"}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := mustOpen(t, dir).Operator(t.Context(), "ann"); err != nil {
		t.Error(err)
	}
}

// What a newer binary left is refused without a byte of it changed, also when
// its last transactions are in the WAL only, as after a power cut.
func TestOpenLeavesTooNewUntouched(t *testing.T) {
	crashed := t.TempDir()
	pool := mustPool(t, filepath.Join(crashed, fileName))
	if err := migrate(t.Context(), pool, []migration{metaStep}, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{
		`PRAGMA wal_checkpoint(TRUNCATE)`,
		`UPDATE meta SET value = 9999`,
		`PRAGMA user_version = 10000`,
	} {
		if _, err := pool.ExecContext(t.Context(), query); err != nil {
			t.Fatal(err)
		}
	}
	// A copy of the open database is what a power cut leaves.
	dir := t.TempDir()
	for _, name := range []string{fileName, fileName + "-wal"} {
		if err := os.WriteFile(filepath.Join(dir, name), mustRead(t, filepath.Join(crashed, name)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before, beforeWAL := mustRead(t, filepath.Join(dir, fileName)), mustRead(t, filepath.Join(dir, fileName+"-wal"))
	if len(beforeWAL) == 0 {
		t.Fatal("the copy has an empty WAL: this test tests nothing")
	}
	cfg := DefaultConfig()
	cfg.Dir = dir
	db, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if !errors.Is(err, ErrTooNew) {
		t.Errorf("got %v, want ErrTooNew", err)
	}
	if err == nil {
		db.Close()
	} else if !strings.Contains(err.Error(), "needs at least schema 9999") {
		t.Errorf("got %q, want the schema it needs", err)
	}
	if !bytes.Equal(mustRead(t, filepath.Join(dir, fileName)), before) {
		t.Error("the database has changed")
	}
	if !bytes.Equal(mustRead(t, filepath.Join(dir, fileName+"-wal")), beforeWAL) {
		t.Error("the WAL has changed")
	}
}

func mustPool(t *testing.T, path string) *sql.DB {
	t.Helper()
	pool, err := openDSN(dsn(path), 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pool.Close() })
	return pool
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
