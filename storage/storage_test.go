package storage

import (
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/semver"
)

var update = flag.Bool("update", false, "record golden files anew")

// mustOpen opens the database in dir and closes it at the end of the test.
func mustOpen(t testing.TB, dir string) *DB {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Dir = dir
	db, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func TestConfigValidate(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for _, tt := range []struct {
		key    string
		change func(*Config)
	}{
		{"storage.dir", func(c *Config) { c.Dir = "" }},
		{"storage.commit_delay", func(c *Config) { c.CommitDelay.UnmarshalText([]byte("2s")) }},
		{"storage.daily_budget", func(c *Config) { c.DailyBudget = 1000 }},
		{"storage.retain_flush", func(c *Config) { c.RetainFlush.UnmarshalText([]byte("2h")) }},
	} {
		c := DefaultConfig()
		tt.change(&c)
		err := c.Validate()
		if err == nil || !strings.HasPrefix(err.Error(), tt.key+": ") {
			t.Errorf("got error %v, want one that starts with %q", err, tt.key)
		}
	}
}

// A PRAGMA run with Exec reaches one connection of a pool. Held open all at
// once, the connections of a pool are different ones.
func TestPragmasReachEveryConnection(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	extra, err := db.openPool(3)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	for _, pool := range []struct {
		name      string
		db        *sql.DB
		conns     int
		queryOnly string
	}{
		{"write", db.write, 1, "0"},
		{"read", db.read, readers, "1"},
		{"extra", extra, 3, "0"},
	} {
		if got := pool.db.Stats().MaxOpenConnections; got != pool.conns {
			t.Errorf("%s: got at most %d connections, want %d", pool.name, got, pool.conns)
		}
		for i := range pool.conns {
			c, err := pool.db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for pragma, want := range map[string]string{
				"journal_mode": "wal",
				"synchronous":  "2", // FULL
				"busy_timeout": "5000",
				"foreign_keys": "1",
				"query_only":   pool.queryOnly,
				// Checkpoints are made elsewhere; who only reads makes none.
				"wal_autocheckpoint": map[string]string{"0": "0", "1": "1000"}[pool.queryOnly],
			} {
				var got string
				if err := c.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil {
					t.Fatal(err)
				}
				if got != want {
					t.Errorf("%s connection %d: got %s = %s, want %s", pool.name, i, pragma, got, want)
				}
			}
		}
	}
}

// A directory may be called anything; the DSN is a URL.
func TestOpenOddDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a b%20?mode=ro#&ü")
	mustOpen(t, dir)
	if _, err := os.Stat(filepath.Join(dir, fileName)); err != nil {
		t.Error(err)
	}
}

// A transaction that only finds out at its first write that it has to wait fails
// at once with SQLITE_BUSY, whatever the busy timeout. So it takes the lock when
// it begins.
func TestTransactionsLockAtBegin(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	impatient, err := openDSN(strings.Replace(dsn(db.path), "busy_timeout%285000%29", "busy_timeout%280%29", 1), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer impatient.Close()
	first, err := db.write.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	const nothing = `UPDATE meta SET value = value`
	if _, err := impatient.ExecContext(t.Context(), nothing); err == nil {
		t.Error("another connection wrote while a transaction was open")
	}
	if err := first.Rollback(); err != nil {
		t.Fatal(err)
	}
	if _, err := impatient.ExecContext(t.Context(), nothing); err != nil {
		t.Errorf("after the transaction: %v", err)
	}
}

func TestWrap(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	exec := func(query string) error {
		_, err := db.write.ExecContext(t.Context(), query)
		return wrap(err, "test")
	}
	const add = `INSERT INTO credential (username, hash, created) VALUES ('u', '', 0)`
	if err := exec(add); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what string
		err  error
		want error
	}{
		{"primary key", exec(add), ErrConflict},
		{"foreign key", exec(`INSERT INTO token (hash, operator, expires, last_used) VALUES (zeroblob(32), 'nobody', 0, 0)`), ErrConflict},
		{"no rows", wrap(sql.ErrNoRows, "test"), ErrNotFound},
		{"wrapped", wrap(fmt.Errorf("deeper: %w", sql.ErrNoRows), "test"), ErrNotFound},
	} {
		if !errors.Is(tt.err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.what, tt.err, tt.want)
		}
	}
	err := exec(`INSERT INTO operator (name, role, hash, created) VALUES ('o', 'king', '', 0)`)
	if err == nil || errors.Is(err, ErrConflict) || errors.Is(err, ErrNotFound) {
		t.Errorf("check: got %v, want an error of no special kind", err)
	}
	if err := wrap(nil, "test"); err != nil {
		t.Errorf("nil: got %v", err)
	}
}

// The driver stores a nil []byte as NULL.
func TestBlob(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	if _, err := db.write.ExecContext(t.Context(), `CREATE TABLE b (payload BLOB NOT NULL) STRICT`); err != nil {
		t.Fatal(err)
	}
	const add = `INSERT INTO b (payload) VALUES (?)`
	if _, err := db.write.ExecContext(t.Context(), add, []byte(nil)); err == nil {
		t.Error("the driver stores nil as an empty blob now: blob is no longer needed")
	}
	for _, payload := range [][]byte{nil, {}, {0}} {
		if _, err := db.write.ExecContext(t.Context(), add, blob(payload)); err != nil {
			t.Errorf("payload %#v: %v", payload, err)
		}
		var n int
		if err := db.read.QueryRowContext(t.Context(), `SELECT length(payload) FROM b ORDER BY rowid DESC LIMIT 1`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		if n != len(payload) {
			t.Errorf("payload %#v: got length %d", payload, n)
		}
	}
}

func TestMillis(t *testing.T) {
	if got := millis(time.Time{}); got != 0 {
		t.Errorf("zero time: got %d, want 0", got)
	}
	for _, tm := range []time.Time{{}, time.UnixMilli(1), time.UnixMilli(1653671250425)} {
		if got := fromMillis(millis(tm)); !got.Equal(tm) || got.IsZero() != tm.IsZero() {
			t.Errorf("got %v, want %v", got, tm)
		}
	}
}

// Before 3.51.3 a WAL reset could corrupt the database.
func TestSQLiteVersion(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	var got string
	if err := db.read.QueryRowContext(t.Context(), `SELECT sqlite_version()`).Scan(&got); err != nil {
		t.Fatal(err)
	}
	if semver.Compare("v"+got, "v3.51.3") < 0 {
		t.Errorf("got SQLite %s, want 3.51.3 or later", got)
	}
}

// With any other modernc.org/libc than the one modernc.org/sqlite was generated
// for, 32-bit ARM crashes in WAL mode.
func TestLibcIsTheOneOfSQLite(t *testing.T) {
	ours := requirements(t, filepath.Join("..", "go.mod"))
	const lib = "modernc.org/sqlite"
	if ours[lib] == "" {
		t.Fatalf("go.mod does not require %s", lib)
	}
	cache := os.Getenv("GOMODCACHE")
	if cache == "" {
		gopath := os.Getenv("GOPATH")
		if gopath == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				t.Fatal(err)
			}
			gopath = filepath.Join(home, "go")
		}
		cache = filepath.Join(filepath.SplitList(gopath)[0], "pkg", "mod")
	}
	theirs := requirements(t, filepath.Join(cache, "cache", "download", lib, "@v", ours[lib]+".mod"))
	if got, want := ours["modernc.org/libc"], theirs["modernc.org/libc"]; got != want || want == "" {
		t.Errorf("go.mod has modernc.org/libc %s, want %s: run go get modernc.org/libc@%[2]s", got, want)
	}
}

func requirements(t *testing.T, gomod string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(gomod)
	if err != nil {
		t.Fatal(err)
	}
	f, err := modfile.ParseLax(gomod, text, nil)
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]string{}
	for _, r := range f.Require {
		versions[r.Mod.Path] = r.Mod.Version
	}
	return versions
}
