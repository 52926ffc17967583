package auth

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

const (
	// hashesWaiting is how many sign-ins may wait for the one that is being
	// hashed. A hash takes 19 MiB and up to a second on a small gateway.
	hashesWaiting = 8
	// freeAttempts is how many sign-ins in a row may fail before the address
	// has to wait: a second, then twice as long each time, up to longestWait.
	freeAttempts = 5
	longestWait  = time.Minute
	// addresses bounds the table of addresses that failed lately. Who has
	// more of them is still held by hashesWaiting.
	addresses = 1024
)

// RateLimitError means that a sign-in was refused unheard.
type RateLimitError struct {
	RetryAfter time.Duration // how long to wait, at least
}

func (e *RateLimitError) Error() string {
	return fmt.Sprintf("too many sign-ins: try again in %s", e.RetryAfter.Round(time.Second))
}

// limiter bounds how fast passwords can be guessed, and what guessing costs the
// gateway.
type limiter struct {
	hashing chan struct{} // one at a time
	waiting chan struct{} // hashesWaiting besides

	mu     sync.Mutex
	failed map[netip.Prefix]*failures
}

// failures are the sign-ins of an address since the last that succeeded.
type failures struct {
	count int
	last  time.Time
	next  time.Time // not before
}

func newLimiter() *limiter {
	return &limiter{
		hashing: make(chan struct{}, 1),
		waiting: make(chan struct{}, hashesWaiting+1), // and the one that does not wait
		failed:  map[netip.Prefix]*failures{},
	}
}

// client returns what counts as one client: an IPv4 address, or the /64 that a
// single IPv6 host may choose its addresses from.
func client(address string) netip.Prefix {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// begin counts a sign-in as failed until succeed is called, so that many at once
// count as many. It returns a *RateLimitError if from has to wait.
func (l *limiter) begin(from netip.Prefix, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.failed[from]
	if f == nil {
		if len(l.failed) >= addresses {
			l.forgetOldest()
		}
		f = &failures{}
		l.failed[from] = f
	}
	if wait := f.next.Sub(now); wait > 0 {
		return &RateLimitError{RetryAfter: wait}
	}
	f.count++
	f.last = now
	if over := f.count - freeAttempts; over >= 0 {
		f.next = now.Add(min(time.Second<<min(over, 16), longestWait))
	}
	return nil
}

func (l *limiter) succeed(from netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.failed, from)
}

func (l *limiter) forgetOldest() {
	var oldest netip.Prefix
	var at time.Time
	for from, f := range l.failed {
		if at.IsZero() || f.last.Before(at) {
			oldest, at = from, f.last
		}
	}
	delete(l.failed, oldest)
}

// acquire waits for the right to hash a password. The caller calls release after
// a nil error.
func (l *limiter) acquire(ctx context.Context) error {
	select {
	case l.waiting <- struct{}{}:
	default:
		return &RateLimitError{RetryAfter: time.Second}
	}
	select {
	case l.hashing <- struct{}{}:
		return nil
	case <-ctx.Done():
		<-l.waiting
		return ctx.Err()
	}
}

func (l *limiter) release() {
	<-l.hashing
	<-l.waiting
}
