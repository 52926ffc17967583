package auth

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"penstock/storage"
)

// The hash of "secret", at little cost.
const secretHash = "$argon2id$v=19$m=64,t=1,p=1$cGVuc3RvY2stdGVzdGluZw$BKGQFT4X7rGGUBoAPjbybCwavSzjYkvSq/mK+MTUeqM"

const here = "192.0.2.1:1000"

// bench is an Authority on a real database, with a clock to set and a count of
// what is written.
type bench struct {
	*Authority
	*storage.DB
	clock   time.Time
	touches atomic.Int32
	failing atomic.Bool
	log     bytes.Buffer
}

func newBench(t *testing.T) *bench {
	cfg := storage.DefaultConfig()
	cfg.Dir = t.TempDir()
	db, err := storage.Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{DB: db, clock: time.UnixMilli(1_800_000_000_000)}
	b.Authority = newAuthority(b, 12*time.Hour, slog.New(slog.NewTextHandler(&b.log, nil)), func() time.Time { return b.clock })
	t.Cleanup(func() {
		b.pending.Wait()
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := db.PutOperator(t.Context(), storage.Operator{Name: "ann", Role: Editor, Hash: secretHash}); err != nil {
		t.Fatal(err)
	}
	return b
}

// TouchToken hides the one of the database.
func (b *bench) TouchToken(ctx context.Context, hash []byte, lastUsed, expires time.Time) error {
	b.touches.Add(1)
	if b.failing.Load() {
		return errors.New("disk full")
	}
	return b.DB.TouchToken(ctx, hash, lastUsed, expires)
}

func (b *bench) mustLogin(t *testing.T) string {
	t.Helper()
	token, err := b.Login(t.Context(), here, "ann", "secret")
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// valid fails the test unless the token is as valid as want.
func (b *bench) valid(t *testing.T, token string, want bool) {
	t.Helper()
	who, err := b.Authenticate(t.Context(), token)
	b.pending.Wait()
	switch {
	case want && (err != nil || who != Identity{"ann", Editor}):
		t.Errorf("got %v, %v, want ann", who, err)
	case !want && !errors.Is(err, ErrInvalidToken):
		t.Errorf("got %v, %v, want ErrInvalidToken", who, err)
	}
}

func TestLoginLogout(t *testing.T) {
	b := newBench(t)
	first, second := b.mustLogin(t), b.mustLogin(t)
	if len(first) != 43 || first == second {
		t.Errorf("got tokens %q and %q, want two of 32 random bytes", first, second)
	}
	b.valid(t, first, true)
	b.valid(t, second, true)
	if err := b.Logout(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	b.valid(t, first, false)
	b.valid(t, second, true)
	if err := b.Logout(t.Context(), first); !errors.Is(err, ErrInvalidToken) {
		t.Errorf("logout again: got %v, want ErrInvalidToken", err)
	}
	b.valid(t, "", false)
}

// What no token of ours can be is not even hashed.
func TestTokenTooLong(t *testing.T) {
	b := newBench(t)
	for length, want := range map[int]bool{longestToken: true, longestToken + 1: false} {
		token := strings.Repeat("x", length)
		err := b.PutToken(t.Context(), storage.Token{Hash: hashToken(token), Operator: "ann", Expires: b.clock.Add(time.Hour), LastUsed: b.clock})
		if err != nil {
			t.Fatal(err)
		}
		b.valid(t, token, want)
	}
}

func TestLoginRefuses(t *testing.T) {
	b := newBench(t)
	for _, tt := range []struct{ name, password string }{
		{"ann", "wrong"}, {"ann", ""}, {"hunter2", "secret"}, {"", ""},
	} {
		if token, err := b.Login(t.Context(), here, tt.name, tt.password); !errors.Is(err, ErrInvalidLogin) || token != "" {
			t.Errorf("%q, %q: got %q, %v, want ErrInvalidLogin", tt.name, tt.password, token, err)
		}
	}
	if strings.Contains(b.log.String(), "hunter2") {
		t.Errorf("a name that nobody has is in the log, and may be a password:\n%s", &b.log)
	}
	if !strings.Contains(b.log.String(), "operator=ann") {
		t.Errorf("refused sign-ins are not in the log:\n%s", &b.log)
	}
}

func TestLoginIsRateLimited(t *testing.T) {
	b := newBench(t)
	for range freeAttempts {
		if _, err := b.Login(t.Context(), here, "ann", "wrong"); !errors.Is(err, ErrInvalidLogin) {
			t.Fatal(err)
		}
	}
	var wait *RateLimitError
	if _, err := b.Login(t.Context(), here, "ann", "secret"); !errors.As(err, &wait) || wait.RetryAfter != time.Second {
		t.Errorf("got %v, want to wait a second", err)
	}
	b.clock = b.clock.Add(time.Second)
	b.mustLogin(t)
	if len(b.limit.failed) != 0 {
		t.Error("success does not clear the address")
	}
}

// The database has no token from which the real one could be found.
func TestTokensAreStoredHashed(t *testing.T) {
	b := newBench(t)
	token := b.mustLogin(t)
	hash := sha256.Sum256([]byte(token))
	if _, err := b.Token(t.Context(), hash[:]); err != nil {
		t.Errorf("it is not under its SHA-256: %v", err)
	}
}

func TestIdleExpiry(t *testing.T) {
	b := newBench(t)
	token := b.mustLogin(t)
	// In use it does not expire.
	for range 4 {
		b.clock = b.clock.Add(11 * time.Hour)
		b.valid(t, token, true)
	}
	// It lives its idle time at least, and not much longer, from a use that
	// was not noted.
	b.clock = b.clock.Add(touchEvery - time.Millisecond)
	b.valid(t, token, true)
	b.clock = b.clock.Add(12*time.Hour - time.Millisecond)
	if _, err := b.DB.DeleteExpiredTokens(t.Context(), b.clock); err != nil {
		t.Fatal(err)
	}
	b.valid(t, token, true)
	b.clock = b.clock.Add(12*time.Hour + touchEvery)
	b.valid(t, token, false)
	if n, err := b.DB.DeleteExpiredTokens(t.Context(), b.clock); err != nil || n != 1 {
		t.Errorf("got %d expired, %v, want 1", n, err)
	}
}

// Requests do not write to flash each.
func TestUseIsNotedSeldom(t *testing.T) {
	b := newBench(t)
	token := b.mustLogin(t)
	for range 60 { // an hour
		b.valid(t, token, true)
		b.clock = b.clock.Add(time.Minute)
	}
	if got := b.touches.Load(); got != 11 {
		t.Errorf("got %d writes in an hour, want 11", got)
	}
}

// A request is none the worse for a disk that is full.
func TestUseThatCannotBeNoted(t *testing.T) {
	b := newBench(t)
	token := b.mustLogin(t)
	b.failing.Store(true)
	b.clock = b.clock.Add(time.Hour)
	b.valid(t, token, true)
	if !strings.Contains(b.log.String(), "disk full") {
		t.Errorf("the log does not say so:\n%s", &b.log)
	}
}

// A gateway without a battery boots in 1970 and jumps to the present later.
func TestClockGoesBack(t *testing.T) {
	b := newBench(t)
	token := b.mustLogin(t)
	present := b.clock
	b.clock = time.UnixMilli(1000)
	b.valid(t, token, true)
	b.clock = present.Add(time.Hour)
	b.valid(t, token, true)
}

// What changes about an operator holds at once, whoever changes it.
func TestOperatorChanges(t *testing.T) {
	b := newBench(t)
	token := b.mustLogin(t)
	b.valid(t, token, true)
	if err := b.PutOperator(t.Context(), storage.Operator{Name: "ann", Role: Viewer, Hash: secretHash}); err != nil {
		t.Fatal(err)
	}
	if who, err := b.Authenticate(t.Context(), token); err != nil || who.Role != Viewer {
		t.Errorf("got %v, %v, want a viewer", who, err)
	}
	if err := b.DeleteOperator(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	b.valid(t, token, false)
}

func TestMay(t *testing.T) {
	for _, tt := range []struct {
		is   string
		may  []string
		mayn []string
	}{
		{Viewer, []string{Viewer}, []string{Editor, Admin, ""}},
		{Editor, []string{Viewer, Editor}, []string{Admin, ""}},
		{Admin, []string{Viewer, Editor, Admin}, []string{"", "king"}},
		{"king", nil, []string{Viewer, Editor, Admin, "king", ""}},
		{"", nil, []string{Viewer, Editor, Admin, ""}},
	} {
		for _, role := range tt.may {
			if !(Identity{Role: tt.is}).May(role) {
				t.Errorf("%q may not what %q may", tt.is, role)
			}
		}
		for _, role := range tt.mayn {
			if (Identity{Role: tt.is}).May(role) {
				t.Errorf("%q may what %q may", tt.is, role)
			}
		}
	}
}

func TestToken(t *testing.T) {
	for _, tt := range []struct{ header, want string }{
		{"", ""},
		{"abc", "abc"},
		{" abc ", "abc"},
		{"Bearer abc", "abc"},
		{"bearer  abc", "abc"},
		{"Bearer", ""},
		{"Bearer ", ""},
		{"Basic abc", "Basic abc"}, // no token of ours
	} {
		h := http.Header{}
		if tt.header != "" {
			h.Set("Authorization", tt.header)
		}
		if got := Token(h); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.header, got, tt.want)
		}
	}
}

// countingStore only counts how often expired tokens are deleted.
type countingStore struct {
	store
	deletions int
}

func (c *countingStore) DeleteExpiredTokens(context.Context, time.Time) (int, error) {
	c.deletions++
	return 1, nil
}

func TestRunDeletesExpiredTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &countingStore{}
		a := newAuthority(db, time.Hour, slog.New(slog.DiscardHandler), time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		time.Sleep(3*time.Hour + time.Minute)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if db.deletions != 4 { // at the start and with every hour
			t.Errorf("got %d deletions, want 4", db.deletions)
		}
	})
}
