package auth

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"
)

func TestBackOff(t *testing.T) {
	l := newLimiter()
	now := time.Now()
	from, other := client("192.0.2.1:1000"), client("192.0.2.2:1000")
	for i := range freeAttempts {
		if err := l.begin(from, now); err != nil {
			t.Fatalf("attempt %d: %v", i+1, err)
		}
	}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60} {
		want *= time.Second
		var wait *RateLimitError
		if err := l.begin(from, now); !errors.As(err, &wait) || wait.RetryAfter != want {
			t.Fatalf("wait %d: got %v, want %v", i+1, err, want)
		}
		now = now.Add(want)
		if err := l.begin(from, now); err != nil {
			t.Fatalf("after wait %d: %v", i+1, err)
		}
	}
	if err := l.begin(other, now); err != nil {
		t.Errorf("another address: %v", err)
	}
	l.succeed(from)
	for i := range freeAttempts {
		if err := l.begin(from, now); err != nil {
			t.Errorf("attempt %d after success: %v", i+1, err)
		}
	}
}

func TestBackOffTableIsBounded(t *testing.T) {
	l := newLimiter()
	now := time.Now()
	for i := range addresses + 10 {
		from := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32)
		if err := l.begin(from, now.Add(time.Duration(i)*time.Millisecond)); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(l.failed); got != addresses {
		t.Errorf("got %d addresses, want %d", got, addresses)
	}
	if l.failed[client("10.0.0.9:1")] != nil || l.failed[client("10.0.0.10:1")] == nil {
		t.Error("it is not the oldest that were forgotten")
	}
}

func TestClient(t *testing.T) {
	for _, tt := range []struct{ address, want string }{
		{"192.0.2.1:1000", "192.0.2.1/32"},
		{"[::ffff:192.0.2.1]:1000", "192.0.2.1/32"},
		{"[2001:db8::1]:1000", "2001:db8::/64"},
		{"[2001:db8::ffff:1]:1000", "2001:db8::/64"},
		{"[fe80::1%eth0]:1000", "fe80::/64"},
		{"nonsense", "invalid Prefix"},
	} {
		if got := client(tt.address).String(); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.address, got, tt.want)
		}
	}
}

// One password is hashed at a time, a few wait, and the rest is turned away.
func TestHashesAreBounded(t *testing.T) {
	l := newLimiter()
	if err := l.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, hashesWaiting)
	for range hashesWaiting {
		go func() { waited <- l.acquire(ctx) }()
	}
	for deadline := time.Now().Add(10 * time.Second); len(l.waiting) < hashesWaiting+1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("they do not wait")
		}
	}
	var wait *RateLimitError
	if err := l.acquire(t.Context()); !errors.As(err, &wait) {
		t.Errorf("one too many: got %v, want a RateLimitError", err)
	}
	l.release()
	if err := <-waited; err != nil {
		t.Errorf("the next: %v", err)
	}
	cancel()
	for range hashesWaiting - 1 {
		if err := <-waited; !errors.Is(err, context.Canceled) {
			t.Errorf("one whose client has gone: got %v", err)
		}
	}
	l.release()
	if len(l.hashing) != 0 || len(l.waiting) != 0 {
		t.Errorf("%d hash and %d wait after all have ended", len(l.hashing), len(l.waiting))
	}
}
