package storage

import (
	"log/slog"
	"path/filepath"
	"reflect"
	"testing"
)

// Where nobody has used the gateway yet, nothing is allowed; where somebody has,
// what was allowed without a rule is allowed by one.
func TestMigrationKeepsWhatWasAllowed(t *testing.T) {
	all, sys := ACLRule{Action: "any", Filter: "#", Allow: true}, ACLRule{Action: "any", Filter: "$SYS/#", Allow: true}
	deny := ACLRule{Action: "publish", Filter: "secret"}
	for name, tt := range map[string]struct {
		had  []string
		want []ACLRule
	}{
		"new":     {},
		"device":  {[]string{`INSERT INTO credential VALUES ('pump', 'h', 0)`}, []ACLRule{all, sys}},
		"rule":    {[]string{`INSERT INTO acl_rule VALUES (1, '', '', '', 'publish', 'secret', 0)`}, []ACLRule{deny, all, sys}},
		"session": {[]string{`INSERT INTO session (id, client_id, expiry_s, protocol, created_ms, ceiling, progress) VALUES (1, 'c', 1, 5, 0, 0, x'')`}, []ACLRule{all, sys}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			older(t, dir, 5, tt.had...)
			db := mustOpen(t, dir)
			got, err := db.ACLRules(t.Context())
			for i := range got {
				got[i].Position = 0
			}
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, %v, want %+v", got, err, tt.want)
			}
		})
	}
}

// older makes a database of an older schema in dir, and runs queries on it.
func older(t *testing.T, dir string, schema int, queries ...string) {
	t.Helper()
	steps, err := embeddedMigrations()
	if err != nil {
		t.Fatal(err)
	}
	pool := mustPool(t, filepath.Join(dir, fileName))
	if err := migrate(t.Context(), pool, steps[:schema], slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for _, q := range queries {
		if _, err := pool.ExecContext(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	if err := pool.Close(); err != nil {
		t.Fatal(err)
	}
}
