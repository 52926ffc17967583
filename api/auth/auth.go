// Package auth signs operators in to the HTTP APIs: password to token, token to
// identity. All APIs share it, so that a token of one is good for all and the
// limits on guessing hold over all of them.
package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"penstock/storage"
)

var (
	// ErrInvalidLogin means that there is no operator with that name and
	// password. It does not say which of the two is wrong.
	ErrInvalidLogin = errors.New("invalid login")
	// ErrInvalidToken means that the token was never given out, has expired
	// or was ended by a logout.
	ErrInvalidToken = errors.New("invalid token")
)

// The roles of an operator. Each may do what the one before may.
const (
	Viewer = "viewer" // reads
	Editor = "editor" // publishes, changes devices and bridges
	Admin  = "admin"  // changes the gateway itself
)

var ranks = map[string]int{Viewer: 1, Editor: 2, Admin: 3}

// Identity is who makes a request.
type Identity struct {
	Operator string
	Role     string
}

// May reports whether i has the role or a higher one. Nobody has a role that
// does not exist.
func (i Identity) May(role string) bool {
	need, ok := ranks[role]
	return ok && ranks[i.Role] >= need
}

const (
	tokenBytes = 32
	// longestToken bounds what is hashed for a stranger.
	longestToken = 256
	// touchEvery is how often a token in use is written to flash: its idle
	// time is exact to this much, to the bearer's advantage.
	touchEvery = 5 * time.Minute
	// touchTimeout bounds the write, which no request waits for.
	touchTimeout = 10 * time.Second
)

// store is what Authority needs of storage.DB.
type store interface {
	Operator(ctx context.Context, name string) (storage.Operator, error)
	PutToken(ctx context.Context, t storage.Token) error
	Token(ctx context.Context, hash []byte) (storage.Token, error)
	TouchToken(ctx context.Context, hash []byte, lastUsed, expires time.Time) error
	DeleteToken(ctx context.Context, hash []byte) error
	DeleteExpiredTokens(ctx context.Context, now time.Time) (int, error)
}

// Authority gives out tokens and knows them again. It may be used by any number
// of goroutines.
//
// A token is looked up in the database with every request, so that a deleted
// operator, a changed role and a logout hold at once, also when another process
// made them. Only the note that it was used is spared: see touchEvery.
type Authority struct {
	db    store
	idle  time.Duration
	log   *slog.Logger
	now   func() time.Time
	limit *limiter

	touching chan struct{} // holds one value while a touch is being written
	pending  sync.WaitGroup
}

// New returns an Authority whose tokens expire when they have not been used for
// idle.
func New(db *storage.DB, idle time.Duration, log *slog.Logger) *Authority {
	return newAuthority(db, idle, log, time.Now)
}

func newAuthority(db store, idle time.Duration, log *slog.Logger, now func() time.Time) *Authority {
	return &Authority{db: db, idle: idle, log: log, now: now, limit: newLimiter(), touching: make(chan struct{}, 1)}
}

// Login returns a new token for the operator with that name and password.
// address is where the request came from, host:port. It returns
// ErrInvalidLogin, a *RateLimitError when the address or everybody has to wait,
// or an error of the storage.
func (a *Authority) Login(ctx context.Context, address, name, password string) (string, error) {
	from := client(address)
	if err := a.limit.begin(from, a.now()); err != nil {
		return "", err
	}
	if err := a.limit.acquire(ctx); err != nil {
		return "", err
	}
	defer a.limit.release()

	op, err := a.db.Operator(ctx, name)
	known := err == nil
	if errors.Is(err, storage.ErrNotFound) {
		// As much work as for a real one, or the time would tell the names.
		op.Hash = nobodysHash
	} else if err != nil {
		return "", err
	}
	ok, err := VerifyPassword(op.Hash, password)
	if err != nil {
		return "", fmt.Errorf("verify password of operator: %w", err)
	}
	if !known || !ok {
		// A name that nobody has may be a password in the wrong field.
		if known {
			a.log.Warn("sign-in refused", "operator", name, "address", address)
		} else {
			a.log.Warn("sign-in refused", "address", address)
		}
		return "", ErrInvalidLogin
	}
	a.limit.succeed(from)

	token := newToken()
	now := a.now()
	err = a.db.PutToken(ctx, storage.Token{Hash: hashToken(token), Operator: op.Name, Expires: a.expiry(now), LastUsed: now})
	if err != nil {
		return "", err
	}
	a.log.Info("operator signed in", "operator", op.Name, "address", address)
	return token, nil
}

// Authenticate returns whose token it is, or ErrInvalidToken, or an error of the
// storage.
func (a *Authority) Authenticate(ctx context.Context, token string) (Identity, error) {
	if token == "" || len(token) > longestToken {
		return Identity{}, ErrInvalidToken
	}
	hash := hashToken(token)
	t, err := a.db.Token(ctx, hash)
	if errors.Is(err, storage.ErrNotFound) {
		return Identity{}, ErrInvalidToken
	}
	if err != nil {
		return Identity{}, err
	}
	now := a.now()
	if !now.Before(t.Expires) {
		return Identity{}, ErrInvalidToken
	}
	op, err := a.db.Operator(ctx, t.Operator)
	if errors.Is(err, storage.ErrNotFound) { // deleted between the two reads
		return Identity{}, ErrInvalidToken
	}
	if err != nil {
		return Identity{}, err
	}
	// A clock that has gone back, as it does at the boot of a gateway without
	// a battery, leaves the token the time it has.
	if now.Sub(t.LastUsed) >= touchEvery {
		a.touch(hash, now)
	}
	return Identity{Operator: op.Name, Role: op.Role}, nil
}

// touch notes in the background that the token was used. While one note is being
// written others are left out: the next request of that token makes up for it.
func (a *Authority) touch(hash []byte, now time.Time) {
	select {
	case a.touching <- struct{}{}:
	default:
		return
	}
	a.pending.Go(func() {
		defer func() { <-a.touching }()
		ctx, cancel := context.WithTimeout(context.Background(), touchTimeout)
		defer cancel()
		err := a.db.TouchToken(ctx, hash, now, a.expiry(now))
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			// The request is none the worse, and a full disk is what
			// the operator may be signed in for.
			a.log.Warn("token use not noted", "err", err)
		}
	})
}

// Logout ends the token. It returns ErrInvalidToken if there is none.
func (a *Authority) Logout(ctx context.Context, token string) error {
	err := a.db.DeleteToken(ctx, hashToken(token))
	if errors.Is(err, storage.ErrNotFound) {
		return ErrInvalidToken
	}
	return err
}

// Run deletes expired tokens every hour until ctx ends, and returns nil when the
// last note of a token's use is written. No request may come after.
func (a *Authority) Run(ctx context.Context) error {
	defer a.pending.Wait()
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if n, err := a.db.DeleteExpiredTokens(ctx, a.now()); err != nil && ctx.Err() == nil {
			a.log.Warn("expired tokens not deleted", "err", err)
		} else if n > 0 {
			a.log.Debug("expired tokens deleted", "tokens", n)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *Authority) expiry(now time.Time) time.Time { return now.Add(a.idle + touchEvery) }

func newToken() string {
	b := make([]byte, tokenBytes)
	rand.Read(b) // never fails: it ends the process instead
	return base64.RawURLEncoding.EncodeToString(b)
}

func hashToken(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// Token returns the token of an Authorization header, written alone or after
// "Bearer", and "" if there is none.
func Token(h http.Header) string {
	v := strings.TrimSpace(h.Get("Authorization"))
	if scheme, rest, ok := strings.Cut(v, " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(rest)
	}
	if strings.EqualFold(v, "Bearer") {
		return ""
	}
	return v
}
